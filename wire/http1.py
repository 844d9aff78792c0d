"""HTTP/1.1 from the client's side, sans-IO: request heads out, response bytes in.

Parsing is llhttp's (through httptools), in its strict default. This module adds what a client must know beyond the
parser: a HEAD answer has no body whatever its headers say, a 1xx answer is not the answer, a body without a length
ends with the connection (RFC 9112, section 6.3), and which responses leave the connection reusable.
"""

from __future__ import annotations

import httptools

Headers = list[tuple[bytes, bytes]]

MAX_HEAD_BYTES = 256 * 1024
"""Response heads beyond this are refused: nothing legitimate comes near it."""


class BadResponse(Exception):
    """The upstream's bytes are not an HTTP/1.1 response."""


def encode_head(method: bytes, target: bytes, headers: Headers) -> bytes:
    """A request's start line and headers, in their order, with the blank line."""
    lines = [b"%b %b HTTP/1.1" % (method, target)]
    lines.extend([b"%b: %b" % header for header in headers])
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


class ResponseParser:
    """Reads one response. `feed` as bytes arrive, `feed_eof` when the connection ends; then look at the fields.

    body holds the body bytes that came since it was last emptied. `is_complete` and `head_done` only ever turn true.
    """

    __slots__ = ("_body_until_close", "_head_bytes", "_is_head", "_parser", "body", "head_done",
                 "headers", "is_complete", "is_reusable", "status")  # fmt: skip

    def __init__(self, *, is_head: bool = False) -> None:
        self.status = 0
        self.headers: Headers = []
        self.body: list[bytes] = []
        self.head_done = False
        self.is_complete = False
        self.is_reusable = False
        """The connection may carry another request after this response."""
        self._is_head = is_head
        self._head_bytes = 0
        self._body_until_close = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Raises BadResponse; bytes after the end of the response make the connection unusable, not the response."""
        if self.is_complete:
            self.is_reusable = False
            return
        if not self.head_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise BadResponse("the upstream switched protocols unasked") from None
        except httptools.HttpParserError as error:
            if not self.is_complete:
                raise BadResponse(str(error) or type(error).__name__) from None
            self.is_reusable = False
        if not self.head_done and self._head_bytes > MAX_HEAD_BYTES:
            raise BadResponse(f"response head over {MAX_HEAD_BYTES} bytes")

    def feed_eof(self) -> None:
        """The connection has ended; a body without a length is now whole."""
        self.is_reusable = False
        if self.head_done and self._body_until_close:
            self.is_complete = True

    # llhttp's callbacks
    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect; what comes after the head is a trailer and is left out."""
        if not self.head_done:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is whole, unless it is an interim one."""
        status = self._parser.get_status_code()
        if status < 200:
            self.headers = []
            return
        self.status = status
        self.head_done = True
        framed = status in (204, 304) or self._is_head
        for name, _ in self.headers:
            if len(name) in (14, 17) and name.lower() in (b"content-length", b"transfer-encoding"):
                framed = True
        self._body_until_close = not framed
        if self._is_head:
            self.is_reusable = self._parser.should_keep_alive()
            self.is_complete = True

    def on_body(self, data: bytes) -> None:
        """Collect."""
        if not self.is_complete:
            self.body.append(data)

    def on_message_complete(self) -> None:
        """Interim responses complete too; only the final one counts."""
        if self.head_done and not self.is_complete:
            self.is_reusable = self._parser.should_keep_alive() and not self._body_until_close
            self.is_complete = True
