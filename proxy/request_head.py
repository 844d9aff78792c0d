"""What a request's headers say: those to send on, and what the gateway itself needs."""

from __future__ import annotations

from collections.abc import Iterable

from traces.record import LogType, Origin
from wire.http1 import Headers

MAX_TEXT = 256
"""Texts from outside are cut to this in a record."""
MAX_COUNT = 2**40
"""Counts from outside are unknown beyond this."""

# RFC 9110, section 7.6.1, and what a proxy answers itself (Expect, section 10.1.1).
_HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"expect", b"host",
})  # fmt: skip
_OURS = b"x-burstgate-"
LOG_TYPES = {
    "conversation": LogType.CONVERSATION,
    "conversation log": LogType.CONVERSATION,
    "api": LogType.API,
    "api log": LogType.API,
}


def clean(text: str | None) -> str | None:
    """A text from outside, fit for a record: bounded, and without NUL, which PostgreSQL can not store."""
    if text is None:
        return None
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT]
    return text.replace("\0", "\ufffd") if "\0" in text else text


def countable(number: int | None) -> int | None:
    """A count from outside, fit for a record and a sum; None for what no count can be."""
    return number if number is not None and 0 <= number <= MAX_COUNT else None


class RequestHead:
    """What the headers say: those to send on, and what the gateway itself needs."""

    __slots__ = ("content_length", "content_type", "forward", "host", "log_type", "origin", "request_id", "run_id",
                 "session")  # fmt: skip

    def __init__(self, headers: Iterable[tuple[bytes, bytes]], session_header: bytes, log_type_header: bytes) -> None:
        self.forward: Headers = []
        self.content_type = b""
        self.host: bytes | None = None
        self.content_length: int | None = None
        self.request_id: bytes | None = None
        self.session: str | None = None
        self.log_type: LogType | None = None
        self.origin = Origin.CLIENT
        self.run_id: str | None = None
        named: frozenset[bytes] = frozenset()
        for header in headers:
            name, value = header
            if name in _HOP_BY_HOP:
                if name == b"connection" and value not in (b"keep-alive", b"close"):
                    named |= {token.strip().lower() for token in value.split(b",")}
                elif name == b"host":
                    self.host = value
                continue
            if name == b"content-type":
                self.content_type = value
            elif name == b"content-length":
                self.content_length = int(value) if value.isdigit() else None
                continue
            elif name == b"x-request-id":
                self.request_id = value
                continue
            if name == session_header:
                self.session = clean(value.decode("latin-1")) or None
            if name == log_type_header:
                self.log_type = LOG_TYPES.get(value.decode("latin-1").strip().lower())
                continue
            if name.startswith(_OURS):
                self._control(name, value)
                continue
            self.forward.append(header)
        if named:
            self.forward = [header for header in self.forward if header[0] not in named]

    def _control(self, name: bytes, value: bytes) -> None:
        if name == b"x-burstgate-origin" and value == b"replay":
            self.origin = Origin.REPLAY
        elif name == b"x-burstgate-run-id":
            self.run_id = clean(value.decode("latin-1"))
