"""The hot-path HTTP client: one small interface over asyncio, for the gateway and the replayer.

    client = HttpClient("http://127.0.0.1:8000")
    exchange = await client.request(b"POST", b"/v1/completions", headers, body)
    while True:
        data = exchange.take()
        ...
        if exchange.is_complete: break
        await exchange.wait()

Rules: an idle connection is reused newest first, and not after `idle_s`. A request on a reused connection that ends
within `STALE_NS` and without a byte of a response is sent once more on a fresh one: the server had closed it while the
request was on its way (RFC 9112, section 9.3.1). There is no cap on connections, because a hidden cap is a hidden
queue. Reading stops while more than `READ_AHEAD_BYTES` wait to be taken. `abort()` closes the connection, which is how
vLLM learns that nobody listens any more. Times are monotonic nanoseconds.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from wire.http1 import BadResponse, Headers, ResponseParser, encode_head

READ_AHEAD_BYTES = 256 * 1024

STALE_NS = 1_000_000_000
"""A server that ends a connection later than this after a request has, for all that is known, worked on it."""

_URL_TEXT = re.compile(r"(?:(?![?#@])[!-~])+")
"""Visible ASCII, without a query, a fragment or a user, whose password would be shown."""


class ConnectFailed(Exception):
    """No connection could be made; nothing was sent."""


class ConnectionLost(Exception):
    """The connection ended before the response was whole. `Exchange.has_head` says on which side of its first byte."""


@dataclass(frozen=True, slots=True)
class BaseUrl:
    """Where an upstream is: `http[s]://host[:port][/prefix]`."""

    text: str
    is_tls: bool
    host: str
    port: int
    prefix: bytes
    """Path prefix without a trailing slash, prepended to every target."""
    authority: bytes
    """The Host header."""


def parse_base_url(text: str) -> BaseUrl:
    """Raises ValueError with one line naming the URL and the rule."""
    shown = re.sub(r"//[^/]*@", "//***@", text)
    rule = f"upstream URL {shown!r}: expected http://HOST[:PORT][/PREFIX] or https://..."
    try:
        parts: SplitResult = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{rule} ({error})") from None
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host or port == 0 or not _URL_TEXT.fullmatch(text):
        raise ValueError(rule)
    is_tls = parts.scheme == "https"
    default = 443 if is_tls else 80
    authority = f"[{host}]" if ":" in host else host
    if port not in (None, default):
        authority += f":{port}"
    return BaseUrl(text.rstrip("/"), is_tls, host, port or default, parts.path.rstrip("/").encode(), authority.encode())


class _Connection(asyncio.Protocol):
    """One TCP connection. At most one exchange at a time uses it."""

    __slots__ = ("_client", "_drained", "error", "exchange", "idle_since_ns", "is_closed", "transport")

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self.transport: asyncio.Transport
        self.exchange: Exchange | None = None
        self.is_closed = False
        self.idle_since_ns = 0
        self.error: str = "closed by the upstream"
        self._drained: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            self.transport.abort()  # bytes that nobody asked for: never reuse this connection
            return
        exchange._received(data)

    def eof_received(self) -> None:
        return None

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        if error is not None:
            self.error = str(error) or type(error).__name__
        self.stop_draining()
        if self.exchange is not None:
            self.exchange._lost()
        else:
            self._client._forget(self)

    def pause_writing(self) -> None:
        self._drained = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        self.stop_draining()

    def write(self, data: bytes) -> None:
        if not self.is_closed:  # uvloop raises on a transport that is
            self.transport.write(data)

    async def drain(self) -> None:
        """Wait until the transport takes more bytes, or `stop_draining`."""
        if self._drained is not None:
            await self._drained

    def stop_draining(self) -> None:
        """Nobody need wait for the transport any more."""
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None


class Exchange:
    """One request and its response."""

    __slots__ = ("_again", "_buffered_bytes", "_connection", "_is_paused", "_parser", "_waiter", "error",
                 "first_byte_ns", "received_ns", "sent_ns", "upload_done")  # fmt: skip

    def __init__(
        self, connection: _Connection, *, is_head: bool, again: tuple[HttpClient, bytes] | None = None
    ) -> None:
        self._parser = ResponseParser(is_head=is_head)
        self._again = again
        """For a reused connection, what to send once more on a fresh one should this one turn out to be stale."""
        self._waiter: asyncio.Future[None] | None = None
        self._buffered_bytes = 0
        self._is_paused = False
        self.error: Exception | None = None
        self.sent_ns = 0
        """When the request was handed to the kernel."""
        self.first_byte_ns = 0
        """When the first byte of the response arrived; 0 before."""
        self.received_ns = 0
        """When the newest bytes arrived."""
        self.upload_done = True
        self._connection: _Connection | None = connection
        connection.exchange = self
        if connection.is_closed:
            self._lost()

    @property
    def status(self) -> int:
        """The response's status; valid once `has_head`."""
        return self._parser.status

    @property
    def headers(self) -> Headers:
        """The response's headers as sent, in order."""
        return self._parser.headers

    @property
    def has_head(self) -> bool:
        """The response's head has arrived."""
        return self._parser.head_done

    @property
    def is_complete(self) -> bool:
        """The whole response has arrived (and its end may still wait to be taken)."""
        return self._parser.is_complete

    @property
    def is_unanswered(self) -> bool:
        """Neither the response's head nor a failure has come."""
        return self.error is None and not self._parser.head_done

    @property
    def has_body(self) -> bool:
        """Body bytes wait to be taken, or the response is complete."""
        return bool(self._parser.body) or self._parser.is_complete

    @property
    def is_waiting(self) -> bool:
        """Somebody waits for the upstream (and not, say, for a slow client)."""
        return self._waiter is not None

    def take(self) -> bytes:
        """The body bytes that have arrived since the last call; may be empty."""
        parts = self._parser.body
        if not parts:
            return b""
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self._buffered_bytes = 0
        if self._is_paused and self._connection is not None:
            self._is_paused = False
            self._connection.transport.resume_reading()
        return data

    async def wait(self) -> None:
        """Wait for the head, for body bytes or for the end; now and then it returns for less.

        Raises ConnectionLost when the connection ends before the response is whole, BadResponse for broken HTTP, both
        only after the bytes that arrived before have been taken; ConnectFailed when a stale connection was to be
        replaced.
        """
        while True:
            if self._parser.body or self._parser.is_complete:
                return
            if self.error is None:
                self._waiter = asyncio.get_running_loop().create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            if self.error is None or self._parser.body:
                return
            if self._again is None:
                raise self.error
            await self._send_again(*self._again)

    async def _send_again(self, client: HttpClient, data: bytes) -> None:
        self._again = None
        lost = self.error
        connection = await client._connect()
        if self.error is not lost:  # aborted meanwhile
            connection.transport.abort()
            return
        self.error = None
        self._connection = connection
        connection.exchange = self
        connection.write(data)
        self.sent_ns = time.monotonic_ns()
        if connection.is_closed:
            self._lost()

    async def wait_head(self) -> None:
        """Wait for the response's head; raises as `wait` does."""
        while not self._parser.head_done:
            await self.wait()

    def abort(self) -> None:
        """End the exchange at once. Without effect on one that is complete."""
        if self._parser.is_complete:
            return
        self._cut()
        self._again = None
        self._fail(ConnectionLost("aborted"))

    def _cut(self) -> None:
        connection = self._connection
        if connection is not None:
            self._connection = None
            connection.exchange = None
            connection.stop_draining()
            connection.transport.abort()

    def _received(self, data: bytes) -> None:
        self.received_ns = now_ns = time.monotonic_ns()
        if not self.first_byte_ns:
            self.first_byte_ns = now_ns
            self._again = None
        parser = self._parser
        try:
            parser.feed(data)
        except BadResponse as error:
            self._cut()
            self._fail(error)
            return
        if not parser.head_done:
            return
        connection = self._connection
        if connection is not None and not self.upload_done:
            connection.stop_draining()
        if parser.is_complete:
            self._release()
        elif parser.body:
            self._buffered_bytes += len(data)
            if self._buffered_bytes > READ_AHEAD_BYTES and not self._is_paused and connection is not None:
                self._is_paused = True
                connection.transport.pause_reading()
        self._wake()

    def _release(self) -> None:
        connection = self._connection
        if connection is None:
            return
        self._connection = None
        connection.exchange = None
        transport = connection.transport
        if not self.upload_done or transport.get_write_buffer_size():
            transport.abort()  # an early answer: the rest of the request is nobody's any more
        elif self._parser.is_reusable:
            connection._client._put(connection)
        else:
            transport.close()

    def _lost(self) -> None:
        connection = self._connection
        if connection is None:
            return
        self._connection = None
        connection.exchange = None
        self._parser.feed_eof()
        if self._parser.is_complete:
            self._wake()
            return
        if time.monotonic_ns() - self.sent_ns > STALE_NS:
            self._again = None
        self._fail(ConnectionLost(connection.error))

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class HttpClient:
    """Connections to one upstream.

    connect_timeout_s bounds TCP and TLS set-up; idle_s is how long an unused connection may be reused (vLLM's server
    closes after 5 s by default); tls is the context for https (default: the system's, verifying).
    """

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout_s: float = 5.0,
        idle_s: float = 4.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.url = parse_base_url(base_url)
        self._connect_timeout_s = connect_timeout_s
        self._idle_ns = int(idle_s * 1e9)
        self._tls = (tls or ssl.create_default_context()) if self.url.is_tls else None
        self._idle: dict[_Connection, None] = {}
        """Oldest first."""

    async def request(
        self,
        method: bytes,
        target: bytes,
        headers: Headers,
        body: bytes | AsyncIterator[bytes] = b"",
        *,
        chunked: bool = False,
    ) -> Exchange:
        """Send a request; returns once it is on its way, without waiting for an answer.

        headers go out as they are, after a Host header; they must frame the body (Content-Length, or `chunked=True`
        with an iterator, for which Transfer-Encoding is added). An iterator is read on while the upstream takes it;
        an answer that arrives first ends the upload, at the latest with the iterator's next part.
        Raises ConnectFailed, ConnectionLost.
        """
        head = encode_head(method, self.url.prefix + target, [(b"host", self.url.authority), *headers])
        if isinstance(body, bytes):
            return await self._send(method, head + body if body else head)
        if chunked:
            head = head[:-2] + b"transfer-encoding: chunked\r\n\r\n"
        connection = await self._connect()  # a body that can be read once can not be retried: take no chances
        exchange = Exchange(connection, is_head=method == b"HEAD")
        exchange.upload_done = False
        exchange.sent_ns = time.monotonic_ns()
        connection.write(head)
        try:
            await self._upload(connection, exchange, body, chunked)
        except BaseException:
            exchange.abort()
            raise
        return exchange

    async def _upload(
        self, connection: _Connection, exchange: Exchange, body: AsyncIterator[bytes], chunked: bool
    ) -> None:
        async for part in body:
            if part and exchange.is_unanswered:
                connection.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
                await connection.drain()
            if not exchange.is_unanswered:
                return
        if exchange.is_unanswered:
            if chunked:
                connection.write(b"0\r\n\r\n")
            exchange.upload_done = True

    async def _send(self, method: bytes, data: bytes) -> Exchange:
        is_head = method == b"HEAD"
        connection = self._take_idle()
        if connection is not None:
            exchange = Exchange(connection, is_head=is_head, again=(self, data))
        else:
            connection = await self._connect()
            exchange = Exchange(connection, is_head=is_head)
        connection.write(data)
        exchange.sent_ns = time.monotonic_ns()
        return exchange

    def _take_idle(self) -> _Connection | None:
        self._close_expired()
        while self._idle:
            connection, _ = self._idle.popitem()
            if not connection.transport.is_closing():
                return connection
        return None

    def _close_expired(self) -> None:
        oldest_ns = time.monotonic_ns() - self._idle_ns
        while self._idle and (connection := next(iter(self._idle))).idle_since_ns < oldest_ns:
            del self._idle[connection]
            connection.transport.close()

    async def _connect(self) -> _Connection:
        url = self.url
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self), url.host, url.port, ssl=self._tls
                )
        except TimeoutError:
            raise ConnectFailed(f"{url.text}: no connection within {self._connect_timeout_s:g} s") from None
        except (OSError, UnicodeError) as error:  # a host that IDNA refuses is a UnicodeError
            raise ConnectFailed(f"{url.text}: {getattr(error, 'strerror', None) or error}") from None
        return connection

    def _put(self, connection: _Connection) -> None:
        connection.idle_since_ns = time.monotonic_ns()
        self._idle[connection] = None

    def _forget(self, connection: _Connection) -> None:
        self._idle.pop(connection, None)

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.transport.close()
        self._idle.clear()
