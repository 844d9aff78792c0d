"""The gateway's side towards its clients: HTTP/1.1 on llhttp, without an ASGI cycle or a task for each request.

uvicorn accepts connections, runs the loop and stops it; each connection is one `ClientConnection`. It makes an
`Incoming` of every request, tells it what arrives, and writes its answer, with these rules:

- Requests of one connection are answered in order, one at a time; those pipelined behind wait, their number bounded.
- A request's target and headers beyond the limit (a little more for a head that does not end), and bytes that are no
  HTTP request, are refused in OpenAI's envelope and end the connection. Framing that could be read in two ways (RFC
  9112, section 6.3) is llhttp's to refuse.
- An answer is framed by its own Content-Length, else chunked (for HTTP/1.0: by the end of the connection).
- An answer that begins before its request has ended ends the connection: half-closed first, so that a client that still
  sends can read it.
- `shutdown` lets a connection's present requests end. An idle one gets `LINGER_S` more, and the answer to a request of
  that time says `connection: close`: what was on its way when the worker was told to stop is not reset.
"""

from __future__ import annotations

import abc
import asyncio
import http
import logging
import select
import socket
import struct
from collections import deque
from typing import Any, Protocol

import httptools

from proxy.errors import GatewayError, error_body
from proxy.request_head import RequestHead
from wire.http1 import CONTENT_LENGTH, Headers, encode_lines

log = logging.getLogger("burstgate.gateway")

SWEEP_S = 15.0
IDLE_SWEEPS = 5
"""A connection is closed when it has waited so many sweeps for a request's head to begin, or to end. 75 s: longer than
the idle timeouts of common load balancers and SDKs, so that they close first."""
LINGER_S = 1.0
HEAD_SLACK_BYTES = 1024
"""Of a head that is not whole all bytes count, of one that is its target and headers: method, version, white space."""
MAX_WAITING = 16
MAX_WAITING_BYTES = 64 * 1024
"""Requests, and bytes of their bodies, that may be pipelined behind the one being answered before reading stops."""
GATHER_BYTES = 1024 * 1024
"""A body that is longer is handed on as it comes."""
WRITE_HIGH_BYTES = 64 * 1024
"""Bytes that wait for a slow client before its upstream is held back."""

_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in http.HTTPStatus}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Site(Protocol):
    """What a connection needs of the gateway."""

    connections: set[ClientConnection]
    head_limit: int
    is_stopping: bool

    def read_head(self, headers: Headers) -> RequestHead:
        """What the headers say. Not kept apart for equal headers, so it may be shared between requests."""
        ...

    def incoming(self, connection: ClientConnection, method: bytes, target: bytes, head: RequestHead) -> Incoming:
        """A request; the connection calls its methods in the order of their definition."""
        ...


class Incoming(abc.ABC):
    """A request as its connection sees it. Its methods do not raise."""

    __slots__ = ("connection", "content_length", "head", "is_http_10", "is_whole", "keep_alive", "method", "target",
                 "trailers")  # fmt: skip

    def __init__(self, connection: ClientConnection, method: bytes, target: bytes, head: RequestHead) -> None:
        self.connection = connection
        self.method = method
        self.target = target
        """As sent."""
        self.head = head
        self.content_length: int | None = None
        self.is_http_10 = False
        self.keep_alive = True
        self.is_whole = False
        """The whole body has arrived."""
        self.trailers: Headers | None = None

    @abc.abstractmethod
    def start(self) -> None:
        """Its turn has come: it may be answered from now on."""

    @abc.abstractmethod
    def received(self, data: bytes) -> None:
        """A piece of the body; perhaps before its turn."""

    @abc.abstractmethod
    def received_all(self) -> None:
        """The body is whole; perhaps before its turn."""

    @abc.abstractmethod
    def broken(self, error: GatewayError) -> None:
        """The rest of the body can not be read."""

    @abc.abstractmethod
    def writable(self) -> None:
        """The client has read on: its connection is no longer `is_blocked`."""

    @abc.abstractmethod
    def left(self) -> None:
        """The client has gone; nothing can be written any more."""


class _Refused(Exception):
    """Leaves llhttp's callbacks; `_refusal` says why."""


class _KnownRequest:
    """The head of a request that has been parsed, but for the digits of its Content-Length.

    before, after: the bytes around these digits, to the end of the head.
    """

    __slots__ = ("after", "before", "head", "method", "target")

    def __init__(self, before: bytes, after: bytes, request: Incoming) -> None:
        self.before = before
        self.after = after
        self.method = request.method
        self.target = request.target
        self.head = request.head


class _BodyOfUpgrade:
    """Reads the rest of a request that would upgrade: its body, framed as its head said, and nothing behind it."""

    def __init__(self, connection: ClientConnection) -> None:
        request = connection._incoming
        assert request is not None
        length = request.content_length
        framing = b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length
        self._connection = connection
        self.on_body = connection.on_body
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % framing)

    def on_message_complete(self) -> None:
        """The body is whole."""
        self._connection.on_message_complete()


class ClientConnection:
    """One client's connection: an asyncio.Protocol in all but its base, so that it can be compiled."""

    __slots__ = (
        "_bad_rest",
        "_ends",
        "_gathered",
        "_head",
        "_head_bytes",
        "_headers",
        "_incoming",
        "_is_chunked",
        "_is_in_head",
        "_is_open_ended",
        "_known",
        "_known_head",
        "_known_request",
        "_left_bytes",
        "_length",
        "_loop",
        "_parser",
        "_piece_bytes",
        "_refusal",
        "_served",
        "_site",
        "_skips_body",
        "_sweeps",
        "_target",
        "_waiting",
        "_waiting_bytes",
        "current",
        "is_blocked",
        "is_gone",
        "is_held",
        "transport",
    )  # fmt: skip

    def __init__(self, site: Site, loop: asyncio.AbstractEventLoop, served: set[Any]) -> None:
        """served: uvicorn's own register of connections, which it waits for when it stops."""
        self.transport: asyncio.Transport
        self.current: Incoming | None = None
        """The request that is being answered."""
        self.is_blocked = False
        """The client reads too slowly: write no more until `Incoming.writable`."""
        self.is_gone = False
        self._site = site
        self._served = served
        self._loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""
        self._headers: Headers = []
        self._length: bytes | None = None
        self._known: Headers | None = None
        """The headers of the last request, without Content-Length, and what they say: a client repeats itself."""
        self._known_head: RequestHead
        self._known_request: _KnownRequest | None = None
        self._left_bytes = 0
        """Of the body of a request whose head was known."""
        self._gathered: list[bytes | memoryview] = []
        """The pieces of that body so far: a prompt of 100 KB is put together once."""
        self._is_in_head = False
        self._head_bytes = 0
        self._piece_bytes = 0
        self._skips_body = False
        """llhttp passes over the present request's body, because it would upgrade."""
        self._incoming: Incoming | None = None
        """The request whose body is being read."""
        self._waiting: deque[Incoming] = deque()
        self._waiting_bytes = 0
        self.is_held = False
        """Reading is held back, and `look` notices a client that leaves meanwhile."""
        self._head = b""
        """The head of the present answer, until its first bytes are written."""
        self._is_chunked = False
        self._is_open_ended = False
        """The answer's body ends with the connection."""
        self._ends = False
        """Nothing more is read; the connection closes when it has answered what it has."""
        self._refusal: GatewayError | None = None
        self._bad_rest: GatewayError | None = None
        """What came behind the present requests is no HTTP: said once they are answered."""
        self._sweeps = 0

    # asyncio's side ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self.transport = transport  # type: ignore[assignment]
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        self._site.connections.add(self)
        self._served.add(self)
        if self._site.is_stopping:  # accepted just before
            self.shutdown()

    def data_received(self, data: bytes) -> None:
        """Parse; requests are handled from within."""
        if self._left_bytes:
            self._take_body(data)
            return
        known = self._known_request
        if known is not None and data.startswith(known.before) and self.current is None and self._is_known(data, known):
            return
        if self._ends:
            return
        self._piece_bytes = len(data)
        is_between = not self._is_in_head and (self._incoming is None or self._incoming.is_whole)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as error:
            # Not taken up: the request is served, and the connection ends with its answer. httptools reads no body.
            if self._skips_body:
                self._skips_body = False
                self._parser = _BodyOfUpgrade(self).parser
                self.data_received(data[error.args[0] :])
        except httptools.HttpParserError as error:
            if isinstance(error, httptools.HttpParserCallbackError) and self._refusal is None:
                log.error("a request could not be read", exc_info=error.__context__)
                self._refusal = GatewayError(500, "gateway_internal_error", "the gateway failed; see its log")
            self._refuse(self._refusal or GatewayError(400, "invalid_http", f"not an HTTP/1.1 request: {error}"))
        else:
            if is_between:
                self._learn(data)
            if self._is_in_head:
                self._head_bytes += self._piece_bytes
                if self._head_bytes > self._site.head_limit + HEAD_SLACK_BYTES:  # its size is known when it is whole
                    self._refuse(self._too_large())

    def _learn(self, data: bytes) -> None:
        """Keep what may come again: the head of a request that was all of `data`."""
        request = self._incoming
        if request is None or not request.content_length or not request.is_whole or not request.keep_alive:
            return
        if request.is_http_10 or request.head.expects_continue or request.head.is_chunked:
            return
        end = data.find(b"\r\n\r\n") + 4
        found = CONTENT_LENGTH.search(data, 0, end)
        if found is not None and end + request.content_length == len(data) == end + int(found[1]):
            start, stop = found.span(1)
            self._known_request = _KnownRequest(data[:start], data[stop:end], request)

    def _is_known(self, data: bytes, known: _KnownRequest) -> bool:
        """Read a whole request whose head has been parsed before, but for its length: llhttp need not see it again."""
        if self._ends or self._is_in_head or (self._incoming is not None and not self._incoming.is_whole):
            return False
        start = len(known.before)
        stop = data.find(b"\r", start)
        digits = data[start:stop]
        body = stop + len(known.after)
        if not data.startswith(known.after, stop) or len(digits) > 15 or not digits.isdigit():
            return False
        length = int(digits)
        if body + length < len(data) or not length:
            return False
        request = self._site.incoming(self, known.method, known.target, known.head)
        request.is_http_10 = False
        request.keep_alive = True
        request.content_length = length
        self._incoming = self.current = request
        self._sweeps = 0
        self._left_bytes = length
        request.start()
        if body + length == len(data):
            self._take_body(data[body:])
        elif length > GATHER_BYTES:
            if body < len(data):
                self._take_body(data[body:])
        else:
            self._gathered.append(memoryview(data)[body:])
            self._left_bytes -= len(data) - body
        return True

    def _take_body(self, data: bytes) -> None:
        """A piece of the body of such a request: its length is all its framing."""
        request = self._incoming
        if request is None or self._ends:
            return
        left = self._left_bytes
        if len(data) > left:  # the next request begins in it
            self._take_body(data[:left])
            self.data_received(data[left:])
            return
        self._left_bytes = left - len(data)
        if self._gathered:
            self._gathered.append(data)
            if left != len(data):
                return
            data = b"".join(self._gathered)
            self._gathered.clear()
            left = len(data)
        request.received(data)
        if left == len(data):
            request.is_whole = True
            request.received_all()

    def eof_received(self) -> None:
        """The client sends no more, and so it has left: the transport closes."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left; every request that it still waits for is told."""
        self._site.connections.discard(self)
        self._served.discard(self)
        self.is_gone = True
        self._ends = True
        current, self.current = self.current, None
        waiting, self._waiting = self._waiting, deque()
        if current is not None:
            current.left()
        for request in waiting:
            request.left()

    def pause_writing(self) -> None:
        """The client reads more slowly than its answer comes."""
        self.is_blocked = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self.is_blocked = False
        if self.current is not None:
            self.current.writable()

    # llhttp's callbacks -----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A head begins."""
        self._head_bytes = 0
        self._is_in_head = True
        self._headers = []
        self._length = None
        self._target = b""

    def on_url(self, url: bytes) -> None:
        """The request target, perhaps in pieces."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or behind the body a trailer."""
        if not self._is_in_head:
            request = self._incoming
            if request is not None:
                request.trailers = [*(request.trailers or ()), (name, value)]
        elif len(name) == 14 and name.lower() == b"content-length":
            self._length = value
        else:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is whole: here is a request."""
        self._is_in_head = False
        site = self._site
        headers = self._headers
        if headers == self._known:
            head = self._known_head
        else:
            self._known_head = head = site.read_head(headers)
            self._known = headers
        if len(self._target) + head.size > site.head_limit:
            self._refusal = self._too_large()
            raise _Refused
        parser = self._parser
        method = parser.get_method()
        version = parser.get_http_version()
        is_http_10 = version == "1.0"
        if not is_http_10 and version != "1.1":
            status, type_ = (400, "invalid_http") if version == "0.9" else (505, "http_version_not_supported")
            self._refusal = GatewayError(status, type_, f"expected HTTP/1.1 or HTTP/1.0, got {version}")
            raise _Refused
        if method == b"CONNECT":
            self._refusal = GatewayError(400, "invalid_http", "CONNECT is not for this server")
            raise _Refused
        if head.hosts != 1 and (head.hosts or not is_http_10):
            self._refusal = GatewayError(400, "invalid_http", f"expected one Host header, got {head.hosts}")
            raise _Refused
        request = site.incoming(self, method, self._target, head)
        request.is_http_10 = is_http_10
        request.keep_alive = parser.should_keep_alive()
        if self._length is not None:
            request.content_length = int(self._length)
        if parser.should_upgrade():
            request.keep_alive = False
            self._skips_body = head.is_chunked or bool(request.content_length)
        self._incoming = request
        self._sweeps = 0
        if self.current is None:
            self.current = request
            request.start()
        else:
            self._waiting.append(request)
            if len(self._waiting) >= MAX_WAITING:
                self.hold()

    def on_body(self, data: bytes) -> None:
        """A piece of a body."""
        request = self._incoming
        if request is None or request.is_whole:
            return
        request.received(data)
        if request is not self.current and not self._ends:
            self._waiting_bytes += len(data)
            if self._waiting_bytes > MAX_WAITING_BYTES:
                self.hold()

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._piece_bytes = 0  # what lies before the next head does not count as one
        request = self._incoming
        if request is not None and not self._skips_body and not request.is_whole:
            request.is_whole = True
            request.received_all()

    # refusals ---------------------------------------------------------------------------------------------------------

    def _too_large(self) -> GatewayError:
        limit = self._site.head_limit
        return GatewayError(431, "request_header_fields_too_large", f"request line and headers over {limit} bytes")

    def _refuse(self, error: GatewayError) -> None:
        """What arrives is no HTTP request, or no more of one."""
        if self._ends:
            return
        self._ends = True
        broken = self._incoming
        if broken is not None and not broken.is_whole and not self._is_in_head:
            if broken is self.current:
                broken.broken(error)
                return
            if broken in self._waiting:
                self._waiting.remove(broken)
                broken.left()
        if self.current is not None:
            self._bad_rest = error
        else:
            self._answer_bad_rest(error)

    def _answer_bad_rest(self, error: GatewayError) -> None:
        body = error_body(error)
        lines = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
        self.transport.write(status_line(error.status) + lines % (len(body), body))
        self._linger()

    # the answer: `begin`, then `write` any number of times, then `end` or `cut` ---------------------------------------

    def begin(self, status: int, lines: bytes, *, is_sized: bool) -> None:
        """Make ready the head of the present request's answer; it leaves with the first bytes behind it, or `flush`.

        lines: encoded header lines without Connection and Transfer-Encoding. is_sized: a Content-Length is among them.
        """
        request = self.current
        if request is None:
            return
        has_body = not (status in (204, 304) or request.method == b"HEAD")
        self._is_chunked = has_body and not is_sized and not request.is_http_10
        self._is_open_ended = has_body and not is_sized and request.is_http_10
        ends = self._ends and self._bad_rest is None
        if not request.is_whole or self._site.is_stopping or ends or self._is_open_ended:
            request.keep_alive = False
        head = status_line(status) + lines
        if self._is_chunked:
            head += b"transfer-encoding: chunked\r\n"
        if not request.keep_alive:
            head += b"connection: close\r\n"
        elif request.is_http_10:
            head += b"connection: keep-alive\r\n"
        self._head = head + b"\r\n"

    def flush(self) -> None:
        """Send the head by itself."""
        head, self._head = self._head, b""
        if head and not self.is_gone:
            self.transport.write(head)

    def write(self, data: bytes) -> None:
        """A piece of the body."""
        if self._is_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head:
            data = self._head + data
            self._head = b""
        if not self.is_gone:
            self.transport.write(data)

    def end(self, data: bytes = b"", trailers: Headers | None = None) -> None:
        """The last piece of the body; the next request's turn."""
        if self._is_chunked:
            last = b"0\r\n%b\r\n" % encode_lines(trailers) if trailers else b"0\r\n\r\n"
            data = b"%x\r\n%b\r\n%b" % (len(data), data, last) if data else last
        if self._head:
            data = self._head + data
            self._head = b""
        request = self.current
        if self.is_gone or request is None:
            return
        self.transport.write(data)
        self.current = None
        if not request.is_whole:
            self._linger()
        elif not request.keep_alive:
            self._ends = True
            self.transport.close()
        elif self._waiting:
            self.current = self._waiting.popleft()
            self._loop.call_soon(self._start, self.current)
        elif self._bad_rest is not None:
            self._answer_bad_rest(self._bad_rest)
        elif self._site.is_stopping:
            self._loop.call_later(LINGER_S, self._close_if_idle)

    def _start(self, request: Incoming) -> None:
        if request is self.current:
            if not self._waiting:
                self._waiting_bytes = 0
                self.release()
            request.start()

    def cut(self) -> None:
        """Leave the answer unfinished: the client must see that it is."""
        self.current = None
        self._ends = True
        if self.is_gone:
            return
        self.flush()
        if self._is_open_ended:  # only a reset tells an end from the end
            self.reset()
        else:
            self.transport.close()

    def reset(self) -> None:
        """End the connection as a crash does, by a reset; what was not sent is lost."""
        self.current = None
        self._ends = True
        if not self.is_gone:
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.transport.abort()

    def interim(self, status: int, headers: Headers) -> None:
        """An interim answer (RFC 9110, section 15.2), to those who know of them."""
        if self.current is not None and not self.current.is_http_10 and not self.is_gone:
            self.transport.write(status_line(status) + encode_lines(headers) + b"\r\n")

    def ask_for_body(self) -> None:
        """Tell a client that expects it to send the body."""
        if not self.is_gone:
            self.transport.write(_CONTINUE)

    def _linger(self) -> None:
        """Close our side, and read on for a while: a reset would take the answer from a client that still sends."""
        self._ends = True
        self.release()
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._loop.call_later(LINGER_S, self.transport.close)
        else:
            self.transport.close()

    # reading, held back -----------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Read no more for now. A client that leaves meanwhile is noticed by `look`."""
        if not self.is_held and not self.is_gone:
            self.is_held = True
            self.transport.pause_reading()

    def release(self) -> None:
        """Read on."""
        if self.is_held:
            self.is_held = False
            if not self.is_gone and not self.transport.is_closing():
                self.transport.resume_reading()

    def look(self) -> None:
        """Notice a client that left while reading is held back."""
        if self.is_held and not self.is_gone:
            poller = select.poll()
            poller.register(self.transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
            if poller.poll(0):
                self.transport.abort()

    # closing ----------------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Called every `SWEEP_S`: close what has been idle for long."""
        if self.current is None:
            self._sweeps += 1
            if self._sweeps > IDLE_SWEEPS:
                self.transport.close()

    def forget_head(self) -> None:
        """Headers mean something else now."""
        self._known = None
        self._known_request = None

    def shutdown(self) -> None:
        """The worker stops (uvicorn calls this): finish what is there."""
        if self.current is None:
            self._loop.call_later(LINGER_S, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.current is None and not self.is_gone:
            self.transport.close()


def status_line(status: int) -> bytes:
    """Of any status, known or not."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
