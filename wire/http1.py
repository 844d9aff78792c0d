"""HTTP/1.1 from the client's side, sans-IO: request heads out, response bytes in.

Parsing is llhttp's (through httptools), in its strict default. This module adds what a client must know beyond the
parser: a HEAD answer has no body whatever its headers say, a 1xx answer is not the answer, a body without a length
ends with the connection (RFC 9112, section 6.3), which responses leave the connection reusable, and what llhttp lets
pass: other versions than 1.0 and 1.1, and a Transfer-Encoding that is not exactly one `chunked` (section 7: a server
uses no other coding unasked, and nobody here could undo one).

Sizes are bounded, and refused alike wherever the bytes are cut: a head and the interim heads before it together, the
trailers, and the interim responses that wait to be looked at.
"""

from __future__ import annotations

import re

import httptools

Headers = list[tuple[bytes, bytes]]

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,15})(?=\r\n)", re.IGNORECASE)
"""Of a head, the digits."""

MAX_HEAD_BYTES = 256 * 1024
"""Response heads beyond this are refused, and so are trailers: nothing legitimate comes near it."""

MAX_INTERIM = 16
"""Interim responses that wait in `Response.interim`; one more is refused."""

_NOT_IN_TRAILERS = frozenset({b"connection", b"host", b"keep-alive", b"trailer", b"transfer-encoding", b"upgrade"})
"""RFC 9110, section 6.5.1: framing and routing do not belong there. (llhttp refuses a Content-Length.)"""

_PARSER_ERRORS = (httptools.HttpParserError, httptools.HttpParserUpgrade)


class BadResponse(Exception):
    """The upstream's bytes are not an HTTP/1.1 response."""


def encode_lines(headers: Headers) -> bytes:
    """Header lines in their order, each with its CRLF."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def encode_head(method: bytes, target: bytes, headers: Headers) -> bytes:
    """A request's start line and headers, in their order, with the blank line."""
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (method, target, encode_lines(headers))


class KnownHead:
    """A head that has been parsed, but for the digits of its Content-Length.

    before, after: the bytes around these digits, to the end of the head. place: of that header in `headers`.
    """

    __slots__ = ("after", "before", "headers", "place", "status")

    def __init__(self, before: bytes, after: bytes, status: int, headers: Headers, place: int) -> None:
        self.before = before
        self.after = after
        self.status = status
        self.headers = headers
        self.place = place


class HeadMemory:
    """The last head of a whole response that came in one piece. A server repeats itself: what differs from one answer
    to the next is the length, and once a second the date. Shared by the parsers of one client.
    """

    __slots__ = ("known",)

    def __init__(self) -> None:
        self.known: KnownHead | None = None

    def learn(self, data: bytes, response: Response) -> None:
        """data: the whole of a response that ended in order, and nothing else."""
        end = data.find(b"\r\n\r\n") + 4
        found = CONTENT_LENGTH.search(data, 0, end)
        if found is None or end + int(found[1]) != len(data) or response.interim or response.trailers:
            return
        places = [place for place, (name, _) in enumerate(response.headers) if name.lower() == b"content-length"]
        if len(places) == 1:
            start, stop = found.span(1)
            self.known = KnownHead(data[:start], data[stop:end], response.status, response.headers, places[0])


class Response:
    """What has arrived of one response. Flags only ever turn true."""

    __slots__ = ("has_head", "headers", "interim", "is_complete", "known", "parts", "status", "trailers")

    def __init__(self) -> None:
        self.known: KnownHead | None = None
        """The same for each response whose head differs from an earlier one in its Content-Length only."""
        self.status = 0
        """Valid once `has_head`."""
        self.headers: Headers = []
        """As sent, in order, without white space around values."""
        self.has_head = False
        self.parts: list[bytes] = []
        """The body bytes that came since it was last emptied."""
        self.is_complete = False
        """The whole response has arrived."""
        self.trailers: Headers = []
        """Whole with `is_complete`."""
        self.interim: list[tuple[int, Headers]] = []
        """Interim responses but for 100 (Continue), to be emptied by whoever passes them on."""


class ResponseParser:
    """Reads the responses of one connection, one after the other, each into its own `Response`.

    `begin` each but the first; `feed` as bytes arrive, `feed_eof` when the connection ends in order.
    """

    __slots__ = (
        "_framing_bytes",
        "_head_bytes",
        "_is_chunked",
        "_parser",
        "_until_close",
        "is_head",
        "is_reusable",
        "memory",
        "response",
    )

    def __init__(self, *, is_head: bool = False, memory: HeadMemory | None = None) -> None:
        """memory: shared with other parsers of the same server's responses; its own when there is none."""
        self.memory = memory or HeadMemory()
        self._parser = httptools.HttpResponseParser(self)
        self.begin(Response(), is_head=is_head)

    def begin(self, response: Response, *, is_head: bool) -> None:
        """The next response; only after one that left the connection reusable. is_head: it answers HEAD."""
        self.response = response
        self.is_reusable = False
        """The connection may carry another request after this response."""
        self.is_head = is_head
        self._head_bytes = 0
        self._framing_bytes = 0
        self._is_chunked = False
        self._until_close = False

    @property
    def status(self) -> int:
        """The response's status."""
        return self.response.status

    @property
    def is_complete(self) -> bool:
        """The whole response has arrived."""
        return self.response.is_complete

    def feed(self, data: bytes) -> None:
        """Raises BadResponse; bytes after the end of the response make the connection unusable, not the response."""
        response = self.response
        parts = response.parts
        before = len(parts)
        has_head = response.has_head
        if not has_head:
            if self.is_head and len(lines := data.splitlines(keepends=True)) > 1:
                for line in lines:  # so that what follows the head is seen to be too much
                    self.feed(line)
                return
            is_first = not self._head_bytes
            if is_first and self._is_known(data, response):
                return
            data = self._within_head(data)
        elif response.is_complete:
            if data.strip(b"\r\n"):  # as llhttp does: empty lines before a response are nothing
                self.is_reusable = False
            return
        try:
            self._parser.feed_data(data)
        except _PARSER_ERRORS as error:
            self._failed(error)
        if not has_head:
            if is_first and response.is_complete and self.is_reusable and parts and response.status not in (204, 304):
                self.memory.learn(data, response)
        else:
            if len(parts) != before:
                self._framing_bytes = 0
            else:  # llhttp keeps a trailer until its end comes
                self._framing_bytes += len(data)
                if self._framing_bytes > MAX_HEAD_BYTES:
                    raise BadResponse(f"response trailers over {MAX_HEAD_BYTES} bytes")

    def _is_known(self, data: bytes, response: Response) -> bool:
        """Read a whole response whose head has been parsed before: llhttp need not see it again."""
        known = self.memory.known
        if known is None or not data.startswith(known.before):
            return False
        start = len(known.before)
        stop = data.find(b"\r", start)
        digits = data[start:stop]
        body = stop + len(known.after)
        if not data.startswith(known.after, stop) or len(digits) > 15 or not digits.isdigit():
            return False
        if body + int(digits) != len(data) or body == len(data):
            return False
        response.known = known
        response.status = known.status
        response.headers = headers = known.headers.copy()
        headers[known.place] = (headers[known.place][0], digits)
        response.has_head = response.is_complete = self.is_reusable = True
        response.parts.append(data[body:])
        return True

    def _within_head(self, data: bytes) -> bytes:
        """Count, and parse as much as may be head; returns the rest. Wherever it is cut, the same heads are refused."""
        room = MAX_HEAD_BYTES - self._head_bytes
        self._head_bytes += len(data)
        if len(data) <= room:
            return data
        try:
            self._parser.feed_data(data[:room])
        except _PARSER_ERRORS as error:
            self._failed(error)
        if not self.response.has_head:
            raise BadResponse(f"response head over {MAX_HEAD_BYTES} bytes")
        return data[room:]

    def _failed(self, error: Exception) -> None:
        if self.response.is_complete:
            self.is_reusable = False
        elif isinstance(error, httptools.HttpParserUpgrade):
            raise BadResponse("the upstream switched protocols unasked") from None
        else:
            raise BadResponse(str(error.__context__ or error)) from None

    def feed_eof(self) -> None:
        """The connection has ended in order; a body without a length is now whole."""
        self.is_reusable = False
        if self._until_close:
            self.response.is_complete = True

    # llhttp's callbacks
    def on_message_begin(self) -> None:
        """A message after the answer was not asked for."""
        if self.response.is_complete:
            self.is_reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect, without the white space (blanks and tabs) that llhttp leaves behind a value."""
        response = self.response
        if not response.has_head:
            if len(name) == 17 and name.lower() == b"transfer-encoding":
                # llhttp takes what it does not know for a body until close: `gzip`, two lines, even a tab at the end.
                if self._is_chunked or value.rstrip(b" ").lower() != b"chunked":
                    raise BadResponse("Transfer-Encoding: expected one 'chunked'")
                self._is_chunked = True
            response.headers.append((name, value.rstrip()))
        elif not response.is_complete:
            self._head_bytes += len(name) + len(value)
            if self._head_bytes > MAX_HEAD_BYTES:
                raise BadResponse(f"response trailers over {MAX_HEAD_BYTES} bytes")
            if name.lower() not in _NOT_IN_TRAILERS:
                response.trailers.append((name, value.rstrip()))

    def on_headers_complete(self) -> None:
        """The head is whole, unless it is an interim one."""
        response = self.response
        if response.has_head:
            return
        status = self._parser.get_status_code()
        if status < 200:
            self._interim(status)
            return
        is_kept = self._parser.should_keep_alive()
        is_plain = is_kept  # without a Connection header llhttp keeps HTTP/1.1 only, and only with an end in sight
        for name, _ in response.headers:
            if len(name) in (10, 16) and name.lower() in (b"connection", b"proxy-connection"):
                is_plain = False
        if not is_plain:
            is_kept = self._frame(status) and is_kept
        if status == 204 and (self._is_chunked or self._content_length() not in (None, b"0")):
            is_kept = False  # what has no body announces one: the next bytes may be it
        response.status = status
        response.has_head = True
        self.is_reusable = is_kept
        self._head_bytes = 0
        if self.is_head:
            # llhttp waits for a body now.
            self._parser = httptools.HttpResponseParser(self)
            self._until_close = False
            response.is_complete = True

    def _interim(self, status: int) -> None:
        response = self.response
        if status < 100:
            raise BadResponse(f"status {status:03}")
        if status > 101:  # llhttp itself sees to 101
            if len(response.interim) == MAX_INTERIM:
                raise BadResponse(f"more than {MAX_INTERIM} interim responses")
            response.interim.append((status, response.headers))
        response.headers = []
        self._is_chunked = False

    def _frame(self, status: int) -> bool:
        """Note whether the body ends with the connection; returns whether the version can keep a connection."""
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise BadResponse(f"HTTP version {version}")
        self._until_close = status not in (204, 304) and not self._is_chunked and self._content_length() is None
        return version == "1.1" or not self._is_chunked  # RFC 9112, section 6.1: HTTP/1.0 has no Transfer-Encoding

    def _content_length(self) -> bytes | None:
        return next((value for name, value in self.response.headers if name.lower() == b"content-length"), None)

    def on_body(self, data: bytes) -> None:
        """Collect; after the end it is nobody's."""
        response = self.response
        if response.is_complete:
            self.is_reusable = False
        else:
            response.parts.append(data)

    def on_message_complete(self) -> None:
        """Interim responses complete too; only the final one counts."""
        response = self.response
        if response.has_head and not response.is_complete:
            if self._head_bytes:  # trailers: llhttp reads a Connection there as well
                self.is_reusable = self.is_reusable and self._parser.should_keep_alive()
            response.is_complete = True
