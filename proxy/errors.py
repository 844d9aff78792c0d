"""The gateway's own error answers, in OpenAI's envelope: one clear line in `message`, never a traceback."""

from __future__ import annotations

import msgspec

from wire.http1 import Headers


class _Error(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class _Envelope(msgspec.Struct, frozen=True):
    error: _Error


class GatewayError(Exception):
    """An answer that the gateway gives itself. type is the record's `error_type` too."""

    def __init__(self, status: int, type_: str, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.status = status
        self.type = type_
        self.message = message


def error_body(error: GatewayError) -> bytes:
    """The JSON body, as OpenAI's API and vLLM spell errors."""
    return msgspec.json.encode(_Envelope(_Error(error.message, error.type, None, error.type)))


def error_headers(body: bytes, request_id: bytes) -> Headers:
    """The headers of such an answer."""
    return [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id),
    ]
