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
            self.is_reusable = self.is_reusable and not data
            return
        if not self.head_done:
            room = MAX_HEAD_BYTES - self._head_bytes
            self._head_bytes += len(data)
            if len(data) > room:  # wherever the stream is cut, the same heads are refused
                self._feed(data[:room])
                if not self.head_done:
                    raise BadResponse(f"response head over {MAX_HEAD_BYTES} bytes")
                data = data[room:]
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise BadResponse("the upstream switched protocols unasked") from None
        except httptools.HttpParserError as error:
            if not self.is_complete:
                raise BadResponse(str(error.__context__ or error)) from None
            self.is_reusable = False

    def feed_eof(self) -> None:
        """The connection has ended; a body without a length is now whole."""
        self.is_reusable = False
        if self.head_done and self._body_until_close:
            self.is_complete = True

    # llhttp's callbacks
    def on_message_begin(self) -> None:
        """A message after the answer was not asked for."""
        if self.is_complete:
            self.is_reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect, without the white space that llhttp leaves; what comes after the head is a trailer, and left out."""
        if not self.head_done:
            self.headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """The head is whole, unless it is an interim one."""
        if self.head_done:
            return
        status = self._parser.get_status_code()
        if status < 200:
            if status < 100:
                raise BadResponse(f"status {status:03}")
            self.headers = []
            return
        self.status = status
        self.head_done = True
        framed = status in (204, 304)
        for name, value in self.headers:
            if len(name) == 14 and name.lower() == b"content-length":
                framed = True
            elif len(name) == 17 and name.lower() == b"transfer-encoding":
                framed = value.lower().endswith(b"chunked")
        self._body_until_close = not framed
        if self._is_head:
            self.is_reusable = self._parser.should_keep_alive()
            self.is_complete = True

    def on_body(self, data: bytes) -> None:
        """Collect; after the end (of an answer to HEAD, say) it is nobody's."""
        if self.is_complete:
            self.is_reusable = False
        else:
            self.body.append(data)

    def on_message_complete(self) -> None:
        """Interim responses complete too; only the final one counts."""
        if self.head_done and not self.is_complete:
            self.is_reusable = self._parser.should_keep_alive()
            self.is_complete = True
