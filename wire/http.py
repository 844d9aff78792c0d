"""The hot-path HTTP client: one small interface over asyncio, for the gateway and the replayer.

    client = HttpClient("http://127.0.0.1:8000")
    exchange = await client.request(b"POST", b"/v1/completions", headers, body)
    while True:
        data = exchange.take()
        ...
        if exchange.is_complete: break
        await exchange.wait()

Rules: an idle connection is reused newest first, and not after `idle_s`; a reused connection that dies before the
first byte of a response is retried once on a fresh one; there is no cap on connections, because a hidden cap is a
hidden queue; reading stops while more than `READ_AHEAD_BYTES` wait to be taken. `abort()` closes the connection, which
is how vLLM learns that nobody listens any more. Times are monotonic nanoseconds.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from wire.http1 import BadResponse, Headers, ResponseParser, encode_head

READ_AHEAD_BYTES = 256 * 1024


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
    rule = f"upstream URL {text!r}: expected http://HOST[:PORT][/PREFIX] or https://..."
    try:
        parts: SplitResult = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{rule} ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError(rule)
    is_tls = parts.scheme == "https"
    default = 443 if is_tls else 80
    host = parts.hostname
    shown = f"[{host}]" if ":" in host else host
    authority = shown if port in (None, default) else f"{shown}:{port}"
    return BaseUrl(text.rstrip("/"), is_tls, host, port or default, parts.path.rstrip("/").encode(), authority.encode())


class _Connection(asyncio.Protocol):
    """One TCP connection. At most one exchange at a time uses it."""

    __slots__ = ("_client", "_drained", "_waiter", "error", "exchange", "idle_since_ns", "is_closed", "transport")

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
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self.exchange is not None:
            self.exchange._lost()
        else:
            self._client._forget(self)

    def pause_writing(self) -> None:
        self._drained = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    async def drain(self) -> None:
        """Wait until the transport takes more bytes."""
        if self._drained is not None:
            await self._drained


class Exchange:
    """One request and its response."""

    __slots__ = ("_again", "_buffered_bytes", "_connection", "_is_paused", "_parser", "_waiter", "error",
                 "first_byte_ns", "received_ns", "sent_ns", "upload_done")  # fmt: skip

    def __init__(
        self, connection: _Connection, *, is_head: bool, again: tuple[HttpClient, bytes, bool] | None = None
    ) -> None:
        self._parser = ResponseParser(is_head=is_head)
        self._again = again
        """For a reused connection, what to send once more on a fresh one should it die before a byte comes back."""
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
        """The whole response has arrived (and may still wait to be taken)."""
        return self._parser.is_complete

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
        """Wait for the head, for body bytes or for the end.

        Raises ConnectionLost when the connection ends before the response is whole, BadResponse for broken HTTP;
        bytes that arrived before can still be taken.
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
            if self._again is None or self.first_byte_ns or type(self.error) is not ConnectionLost:
                raise self.error
            await self._send_again(*self._again)

    async def _send_again(self, client: HttpClient, data: bytes, is_head: bool) -> None:
        self._again = None
        connection = await client._connect()
        self.error = None
        self._parser = ResponseParser(is_head=is_head)
        self._connection = connection
        connection.exchange = self
        connection.transport.write(data)
        self.sent_ns = time.monotonic_ns()
        if connection.is_closed:
            self._lost()

    async def wait_head(self) -> None:
        """Wait for the response's head; raises as `wait` does."""
        while not self._parser.head_done:
            await self.wait()

    def abort(self) -> None:
        """End the exchange at once. Without effect on one that is complete."""
        connection = self._connection
        if connection is not None:
            self._connection = None
            connection.exchange = None
            connection.transport.abort()
        self._again = None
        self._fail(ConnectionLost("aborted"))

    def _received(self, data: bytes) -> None:
        self.received_ns = now_ns = time.monotonic_ns()
        if not self.first_byte_ns:
            self.first_byte_ns = now_ns
        parser = self._parser
        try:
            parser.feed(data)
        except BadResponse as error:
            connection = self._connection
            self._connection = None
            if connection is not None:
                connection.exchange = None
                connection.transport.abort()
            self._fail(error)
            return
        if parser.is_complete:
            self._release()
        else:
            self._buffered_bytes += len(data)
            if self._buffered_bytes > READ_AHEAD_BYTES and not self._is_paused and self._connection is not None:
                self._is_paused = True
                self._connection.transport.pause_reading()
        if self._waiter is not None and not self._waiter.done() and (parser.head_done or parser.is_complete):
            self._waiter.set_result(None)

    def _release(self) -> None:
        connection = self._connection
        if connection is None:
            return
        self._connection = None
        connection.exchange = None
        if self._parser.is_reusable and self.upload_done and not connection.is_closed:
            if self._is_paused:
                connection.transport.resume_reading()
            connection._client._put(connection)
        else:
            connection.transport.close()

    def _lost(self) -> None:
        connection = self._connection
        if connection is None:
            return
        self._connection = None
        connection.exchange = None
        self._parser.feed_eof()
        if self._parser.is_complete:
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
        else:
            self._fail(ConnectionLost(connection.error))

    def _fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
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
        self._idle: deque[_Connection] = deque()

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
        an answer that arrives first ends the upload.
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
        connection.transport.write(head)
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
            if exchange.has_head or exchange.error is not None or connection.is_closed:
                return
            if part:
                connection.transport.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
                await connection.drain()
        if not connection.is_closed:
            if chunked:
                connection.transport.write(b"0\r\n\r\n")
            exchange.upload_done = True

    async def _send(self, method: bytes, data: bytes) -> Exchange:
        is_head = method == b"HEAD"
        connection = self._take_idle()
        if connection is not None:
            exchange = Exchange(connection, is_head=is_head, again=(self, data, is_head))
        else:
            exchange = Exchange(connection := await self._connect(), is_head=is_head)
        connection.transport.write(data)
        exchange.sent_ns = time.monotonic_ns()
        return exchange

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_closed or connection.transport.is_closing():
                continue
            if time.monotonic_ns() - connection.idle_since_ns > self._idle_ns:
                connection.transport.close()
                continue
            return connection
        return None

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
        except OSError as error:
            raise ConnectFailed(f"{url.text}: {error.strerror or error}") from None
        return connection

    def _put(self, connection: _Connection) -> None:
        connection.idle_since_ns = time.monotonic_ns()
        self._idle.append(connection)

    def _forget(self, connection: _Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().transport.close()
