"""What an answer's head says, read once for equal heads."""

from __future__ import annotations

from collections.abc import Callable

from wire.http1 import Headers, KnownHead, encode_lines

# RFC 9110, section 7.6.1.
_RESPONSE_HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade",
    b"x-request-id",
})  # fmt: skip


class AnswerHead:
    """What an answer's headers say: those for the client, and what the gateway itself needs.

    headers: as sent, without Content-Length. place: before which of them that stood; `lines` are those for the client
    before it, `more_lines` those behind. locate: gives a Location its form for the client.
    """

    __slots__ = ("has_location", "headers", "is_encoded", "is_event_stream", "is_json", "known", "lines", "more_lines",
                 "place")  # fmt: skip

    def __init__(self, headers: Headers, place: int, locate: Callable[[bytes], bytes]) -> None:
        self.headers = headers
        self.place = place
        self.known: KnownHead | None = None
        """The client's name for this head."""
        self.has_location = False
        content_type = b""
        self.is_encoded = False
        before: Headers = []
        behind: Headers = []
        named: set[bytes] = set()
        for index, (name, value) in enumerate(headers):
            lower = name.lower()
            if lower in _RESPONSE_HOP_BY_HOP:
                if lower == b"connection":
                    named.update(token.strip().lower() for token in value.split(b","))
                continue
            if lower == b"content-type":
                content_type = value.lower()
            elif lower == b"content-encoding":
                self.is_encoded = value.lower() not in (b"", b"identity")
            elif lower == b"location":
                value = locate(value)
                self.has_location = True
            (before if index < place else behind).append((name, value))
        self.is_event_stream = content_type.startswith(b"text/event-stream")
        self.is_json = b"json" in content_type
        self.lines = encode_lines([header for header in before if header[0].lower() not in named])
        self.more_lines = encode_lines([header for header in behind if header[0].lower() not in named])
