"""The hot-path HTTP client: one small interface over asyncio, for the gateway and the replayer.

    client = HttpClient("http://127.0.0.1:8000")
    exchange = await client.request(b"POST", b"/v1/completions", headers, body)
    while True:
        data = exchange.take()
        ...
        if exchange.is_complete: break
        await exchange.wait()

Where every microsecond counts, without a task to wake up:

    exchange = client.start(b"POST", b"/v1/completions", lines, body) or await client.request(...)
    exchange.listener = look    # called whenever there is something new to look at

Rules: an idle connection is reused newest first, and not after `idle_s`. A request on a reused connection that ends
within `STALE_NS` and without a byte of a response is sent once more on a fresh one: the server had closed it while the
request was on its way (RFC 9112, section 9.3.1). There is no cap on connections, because a hidden cap is a hidden
queue. Reading stops while more than `READ_AHEAD_BYTES` wait to be taken. `abort()` closes the connection, which is how
vLLM learns that nobody listens any more. A body without a length is whole only when its connection ends in order: by
FIN, and under TLS by close_notify. Times are monotonic nanoseconds.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns
from typing import Any, cast
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

from wire.http1 import BadResponse, Headers, HeadMemory, Response, ResponseParser, encode_lines

READ_AHEAD_BYTES = 256 * 1024

STALE_NS = 1_000_000_000
"""A server that ends a connection later than this after a request has, for all that is known, worked on it."""

NEXT_ADDRESS_S = 0.25
"""How long a name's next address waits for the one before (RFC 8305, section 5)."""

_JOIN_BYTES = 16 * 1024
"""A longer body is not copied behind its head: two pieces for one system call cost less from about here."""

_MAX_SOCKET_PATH_BYTES = 107
"""unix(7): `sun_path` has 108, with the NUL."""

_URL_TEXT = re.compile(r"(?:(?![?#@])[!-~])+")
"""Visible ASCII, without a query, a fragment or a user, whose password would be shown."""

_SOCKET_PATH = re.compile(r"(?i:%2F)(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+")
"""An absolute path as the host of a URL: its slashes, and whatever else RFC 3986 reserves, percent-encoded."""


class ConnectFailed(Exception):
    """No connection could be made; nothing was sent."""


class ConnectTimedOut(ConnectFailed):
    """Not in time."""


class ConnectionLost(Exception):
    """The connection ended before the response was whole. `Exchange.has_head` says on which side of its first byte."""


@dataclass(frozen=True, slots=True)
class BaseUrl:
    """Where an upstream is: `http[s]://host[:port][/prefix]`, or `http+unix://%2Fpath%2Fof.sock[/prefix]`."""

    text: str
    is_tls: bool
    host: str
    port: int
    prefix: bytes
    """Path prefix without a trailing slash, prepended to every target."""
    authority: bytes
    """The Host header."""
    socket_path: bytes | None = None
    """Of a unix socket, instead of host and port."""


def parse_base_url(text: str) -> BaseUrl:
    """Raises ValueError with one line naming the URL and the rule."""
    shown = re.sub(r"//[^/]*@", "//***@", text)
    rule = f"upstream URL {shown!r}: expected http://HOST[:PORT][/PREFIX], https://... or http+unix://..."
    try:
        parts: SplitResult = urlsplit(text)
        port = None if parts.scheme == "http+unix" else parts.port
    except ValueError as error:
        raise ValueError(f"{rule} ({error})") from None
    prefix = parts.path.rstrip("/").encode("ascii", "replace")
    if parts.scheme == "http+unix":
        rule = f"upstream URL {shown!r}: expected http+unix://%2FPATH%2FTO.sock[/PREFIX]"
        if not _URL_TEXT.fullmatch(text) or not _SOCKET_PATH.fullmatch(parts.netloc):
            raise ValueError(f"{rule}, an absolute path with every / written as %2F")
        path = unquote_to_bytes(parts.netloc)
        if len(path) > _MAX_SOCKET_PATH_BYTES or b"\0" in path:
            raise ValueError(f"{rule}, a path of at most {_MAX_SOCKET_PATH_BYTES} bytes, none of them NUL")
        return BaseUrl(text.rstrip("/"), False, "localhost", 0, prefix, b"localhost", path)
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host or port == 0 or not _URL_TEXT.fullmatch(text):
        raise ValueError(rule)
    is_tls = parts.scheme == "https"
    default = 443 if is_tls else 80
    authority = f"[{host}]" if ":" in host else host
    if port not in (None, default):
        authority += f":{port}"
    return BaseUrl(text.rstrip("/"), is_tls, host, port or default, prefix, authority.encode())


def client_context(
    ca_file: Path | None = None, cert_file: Path | None = None, key_file: Path | None = None
) -> ssl.SSLContext:
    """A verifying TLS context.

    ca_file: trusted instead of the system's authorities. cert_file, key_file: shown to a server that asks; the key may
    be in cert_file too. All PEM, the key without a password. Raises ValueError with one line naming the file.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_file is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ValueError) as error:
            raise ValueError(f"CA file {str(ca_file)!r}: expected PEM certificates ({_reason(error)})") from None
    if cert_file is None:
        if key_file is not None:
            raise ValueError(f"key file {str(key_file)!r}: expected a certificate file beside it")
        return context
    for name, file in (("certificate file", cert_file), ("key file", key_file or cert_file)):
        try:
            file.read_bytes()
        except OSError as error:
            raise ValueError(f"{name} {str(file)!r}: {error.strerror}") from None
    try:
        context.load_cert_chain(cert_file, key_file, password=_refuse_password)
    except (ssl.SSLError, ValueError) as error:
        files = repr(str(cert_file)) if key_file is None else f"{str(cert_file)!r} with key {str(key_file)!r}"
        raise ValueError(
            f"certificate file {files}: expected a PEM certificate and its key ({_reason(error)})"
        ) from None
    return context


def _refuse_password() -> str:
    """In place of OpenSSL's question on the terminal."""
    raise ValueError("the key has a password")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        reason: str | None = getattr(error, "reason", None)  # typeshed says that there always is one
        return reason.replace("_", " ").lower() if reason else "not PEM"
    return getattr(error, "strerror", None) or str(error)


class _Connection:
    """One connection. At most one exchange at a time uses it.

    An asyncio.Protocol in all but its base: a class with one that is not compiled would not be compiled either.
    """

    __slots__ = ("_drained", "client", "error", "exchange", "idle_since_ns", "is_closed", "is_ended", "parser",
                 "transport")  # fmt: skip

    def __init__(self, client: HttpClient) -> None:
        self.client = client
        self.transport: asyncio.Transport
        self.parser = ResponseParser(memory=client.memory)
        self.exchange: Exchange | None = None
        self.is_ended = False
        """The other side has ended it, and in order."""
        self.is_closed = False
        self.idle_since_ns = 0
        self.error: str = "closed by the upstream"
        self._drained: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        if self.client.writes_at_once:
            self.transport.set_write_buffer_limits(high=0)

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            self.transport.abort()  # bytes that nobody asked for: never reuse this connection
            return
        exchange.received_ns = now_ns = monotonic_ns()
        if not exchange.first_byte_ns:
            exchange.first_byte_ns = now_ns
            exchange._again = None
        if exchange.parts:
            exchange._behind_bytes += len(data)
        try:
            self.parser.feed(data)
        except BadResponse as error:
            exchange._cut()
            exchange._fail(error)
            return
        if exchange.is_complete:
            self._release(exchange)
            exchange._end()
            return
        if not exchange.upload_done and exchange.has_head:
            self.stop_draining()
        if exchange._behind_bytes > READ_AHEAD_BYTES and not exchange._is_paused:
            exchange._is_paused = True
            self.transport.pause_reading()
        listener = exchange.listener  # last: it may abort, or send the next request
        if listener is not None:
            listener()
        elif exchange._waiter is not None:
            exchange._wake()

    def _release(self, exchange: Exchange) -> None:
        exchange._connection = None
        self.exchange = None
        transport = self.transport
        if not exchange.upload_done or transport.get_write_buffer_size():
            self.stop_draining()
            transport.abort()  # an early answer: the rest of the request is nobody's any more
        elif self.parser.is_reusable:
            self.idle_since_ns = exchange.received_ns
            self.client._put(self)
        else:
            transport.close()

    def eof_received(self) -> None:
        """Under TLS only a close_notify is an end; else anybody on the way may have cut a body without a length."""
        secured: ssl.SSLObject | None = self.transport.get_extra_info("ssl_object")
        try:
            self.is_ended = secured is None or not secured.read(1)
        except ssl.SSLZeroReturnError:
            self.is_ended = True
        except ssl.SSLError:
            self.error = "cut by the upstream without TLS's close_notify"

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        if error is not None:
            self.error = str(error) or type(error).__name__
        self.stop_draining()
        if self.exchange is not None:
            self.exchange._lost()

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
        if self._drained is not None:
            if not self._drained.done():
                self._drained.set_result(None)
            self._drained = None


class Exchange(Response):
    """One request and its response.

    Whoever sets `listener` looks at the fields when it is called, and calls neither `wait` nor `wait_head`.
    """

    __slots__ = ("_again", "_behind_bytes", "_connection", "_is_paused", "_sending_again", "_waiter", "error",
                 "first_byte_ns", "listener", "received_ns", "sent_ns", "upload_done")  # fmt: skip

    def __init__(self) -> None:
        self.known = None  # as in Response, without the call
        self.status = 0
        self.headers = []
        self.has_head = False
        self.parts = []
        self.is_complete = False
        self.trailers = []
        self.interim = []
        self.listener: Callable[[], None] | None = None
        """Called when something has come: the head, body bytes, an interim response, the end, or a failure (`error`).

        Never from within `start`, `request` or `abort`, and not again after the end, a failure or `abort`: it is
        dropped then. Bytes that came before the end or a failure are still there to be taken.
        """
        self.error: Exception | None = None
        """ConnectionLost: the connection ended before the response was whole; BadResponse: broken HTTP; ConnectFailed:
        a stale connection could not be replaced."""
        self.first_byte_ns = 0
        """When the first byte of the response arrived; 0 before."""
        self.received_ns = 0
        """When the newest bytes arrived."""
        self.sent_ns = 0
        """When the request was handed to the kernel."""
        self.upload_done = True
        self._again: tuple[bytes, ...] | None = None
        """For a reused connection, what to send once more on a fresh one should this one turn out to be stale."""
        self._sending_again: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._behind_bytes = 0
        """That came while others waited to be taken."""
        self._is_paused = False
        self._connection: _Connection | None = None

    def _send(self, connection: _Connection, pieces: tuple[bytes, ...], *, is_head: bool) -> None:
        self._connection = connection
        connection.exchange = self
        connection.parser.begin(self, is_head=is_head)
        if connection.is_closed:  # uvloop raises on its transport; and the listener is not set yet
            asyncio.get_running_loop().call_soon(self._lost)
        elif len(pieces) == 1:
            connection.transport.write(pieces[0])
        else:
            connection.transport.writelines(pieces)
        self.sent_ns = monotonic_ns()

    @property
    def is_unanswered(self) -> bool:
        """Neither the response's head nor a failure has come."""
        return self.error is None and not self.has_head

    @property
    def has_body(self) -> bool:
        """Body bytes wait to be taken, or the response is complete."""
        return bool(self.parts) or self.is_complete

    @property
    def is_waiting(self) -> bool:
        """Somebody waits for the upstream (and not, say, for a slow client)."""
        return self._waiter is not None or (self.listener is not None and not self.parts)

    def take(self) -> bytes:
        """The body bytes that have arrived since the last call; may be empty."""
        parts = self.parts
        if not parts:
            return b""
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if self._behind_bytes:
            self._behind_bytes = 0
            if self._is_paused:
                self._is_paused = False
                if self._connection is not None:
                    self._connection.transport.resume_reading()
        return data

    async def wait(self) -> None:
        """Wait for the head, for body bytes or for the end; now and then it returns for less.

        Raises `error`, but only after the bytes that arrived before have been taken.
        """
        if self.parts or self.is_complete:
            return
        if self.error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.error is not None and not self.parts:
            raise self.error

    async def wait_head(self) -> None:
        """Wait for the response's head; raises as `wait` does."""
        while not self.has_head:
            await self.wait()

    def abort(self) -> None:
        """End the exchange at once. Without effect on one that is complete or has failed."""
        if self.is_complete or self.error is not None:
            return
        if self._sending_again is not None:
            self._sending_again.cancel()
        self._cut()
        self._again = None
        self.listener = None
        self._fail(ConnectionLost("aborted"))

    def _cut(self) -> None:
        connection = self._connection
        if connection is not None:
            self._connection = None
            connection.exchange = None
            connection.stop_draining()
            connection.transport.abort()

    def _lost(self) -> None:
        connection = self._connection
        if connection is None:
            return
        self._connection = None
        connection.exchange = None
        if connection.is_ended:
            connection.parser.feed_eof()
            if self.is_complete:
                self._end()
                return
        again, self._again = self._again, None
        if again is None or monotonic_ns() - self.sent_ns > STALE_NS:
            self._fail(ConnectionLost(connection.error))
        else:
            self._sending_again = connection.client._send_again(self, again, is_head=connection.parser.is_head)

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._end()

    def _end(self) -> None:
        """Tell of the end, and let go of whoever listens."""
        listener = self.listener
        if listener is not None:
            self.listener = None
            listener()
        elif self._waiter is not None:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class HttpClient:
    """Connections to one upstream.

    connect_timeout_s bounds name look-up, TCP and TLS set-up; idle_s is how long an unused connection may be reused
    (vLLM's server closes after 5 s by default); tls is the context for https (default: `client_context()`). bursts: for
    requests that come in bursts and count by their moment: connections take turns, so that as many stay open as a burst
    has used, and a request is written at once instead of with the loop's next turn (uvloop).
    """

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout_s: float = 5.0,
        idle_s: float = 4.0,
        tls: ssl.SSLContext | None = None,
        bursts: bool = False,
    ) -> None:
        self.url = parse_base_url(base_url)
        self._next_idle = 0 if bursts else -1
        """Which of the idle ones is used."""
        self.writes_at_once = bursts and not self.url.is_tls
        self._connect_timeout_s = connect_timeout_s
        self._idle_ns = int(idle_s * 1e9)
        self._tls = (tls or client_context()) if self.url.is_tls else None
        self._host_line = b" HTTP/1.1\r\nhost: %b\r\n" % self.url.authority
        self._before_target = b" " + self.url.prefix
        self.memory = HeadMemory()
        self._idle: list[_Connection] = []
        """Oldest first; some may have been closed."""
        self._sweep: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, method: bytes, target: bytes, lines: bytes, body: bytes = b"") -> Exchange | None:
        """Send a request on an idle connection, at once; None when there is none: then `request`.

        lines: of the headers, as `encode_lines` makes them; Host is added, and they must frame the body.
        """
        idle = self._idle
        while idle:
            connection = idle.pop(self._next_idle)
            if not connection.transport.is_closing():
                pieces = self._encode(method, target, lines, body)
                exchange = Exchange()
                exchange._again = pieces
                exchange._send(connection, pieces, is_head=method == b"HEAD")
                return exchange
        return None

    async def request(
        self,
        method: bytes,
        target: bytes,
        headers: Headers | bytes,
        body: bytes | AsyncIterator[bytes] = b"",
        *,
        chunked: bool = False,
        trailers: Callable[[], Headers] | None = None,
    ) -> Exchange:
        """Send a request; returns once it is on its way, without waiting for an answer.

        headers go out as they are (or are lines already, as for `start`), after a Host header; they must frame the
        body (Content-Length, or `chunked=True` with an iterator, for which Transfer-Encoding is added; trailers is
        called when it is through). An iterator is read on while the upstream takes it; an answer that arrives first
        ends the upload, at the latest with the iterator's next part.
        Raises ConnectFailed, ConnectionLost.
        """
        lines = headers if isinstance(headers, bytes) else encode_lines(headers)
        is_head = method == b"HEAD"
        if isinstance(body, bytes):
            exchange = self.start(method, target, lines, body)
            if exchange is None:
                connection = await self._connect()
                exchange = Exchange()
                exchange._send(connection, self._encode(method, target, lines, body), is_head=is_head)
            return exchange
        if chunked:
            lines += b"transfer-encoding: chunked\r\n"
        connection = await self._connect()  # a body that can be read once can not be retried: take no chances
        exchange = Exchange()
        exchange._send(connection, self._encode(method, target, lines, b""), is_head=is_head)
        exchange.upload_done = False
        try:
            await _upload(connection, exchange, body, chunked=chunked, trailers=trailers)
        except BaseException:
            exchange.abort()
            raise
        return exchange

    def _encode(self, method: bytes, target: bytes, lines: bytes, body: bytes) -> tuple[bytes, ...]:
        """What to write, in one piece or, for a long body, in two."""
        if len(body) < _JOIN_BYTES:
            return (b"".join((method, self._before_target, target, self._host_line, lines, b"\r\n", body)),)
        return (b"".join((method, self._before_target, target, self._host_line, lines, b"\r\n")), body)

    def _send_again(self, exchange: Exchange, pieces: tuple[bytes, ...], *, is_head: bool) -> asyncio.Task[None]:
        """Send on a fresh connection, in a task that `Exchange.abort` cancels."""

        async def send() -> None:
            try:
                connection = await self._connect()
            except ConnectFailed as error:
                exchange._fail(error)
            else:
                exchange._send(connection, pieces, is_head=is_head)

        task = asyncio.get_running_loop().create_task(send())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _connect(self) -> _Connection:
        url = self.url
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                return await self._open()
        except TimeoutError:
            raise ConnectTimedOut(f"{url.text}: no connection within {self._connect_timeout_s:g} s") from None
        except (OSError, ValueError) as error:  # a host that IDNA refuses is a UnicodeError, and that a ValueError
            raise ConnectFailed(f"{url.text}: {getattr(error, 'strerror', None) or error}") from None

    async def _open(self) -> _Connection:
        url = self.url
        loop = asyncio.get_running_loop()
        connection = _Connection(self)
        protocol = cast("asyncio.Protocol", connection)
        if url.socket_path is not None:
            await loop.create_unix_connection(lambda: protocol, os.fsdecode(url.socket_path))
            return connection
        sock = await _connected(await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM))
        try:
            await loop.create_connection(
                lambda: protocol, sock=sock, ssl=self._tls, server_hostname=url.host if self._tls else None
            )
        except BaseException:
            sock.close()
            raise
        return connection

    async def warm(self, connections: int) -> None:
        """Open that many connections ahead, for requests that are not to wait for one. Raises ConnectFailed."""
        for opened in await asyncio.gather(*[self._connect() for _ in range(connections)]):
            opened.idle_since_ns = monotonic_ns()
            self._put(opened)

    def _put(self, connection: _Connection) -> None:
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self._idle_ns / 8e9, self._close_expired)

    def _close_expired(self) -> None:
        idle = self._idle
        oldest_ns = monotonic_ns() - self._idle_ns
        expired = next((at for at, each in enumerate(idle) if each.idle_since_ns > oldest_ns), len(idle))
        for connection in idle[:expired]:
            connection.transport.close()
        del idle[:expired]
        self._sweep = None
        if idle:
            self._sweep = asyncio.get_running_loop().call_later(self._idle_ns / 8e9, self._close_expired)

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.transport.close()
        self._idle.clear()
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None


async def _upload(
    connection: _Connection,
    exchange: Exchange,
    body: AsyncIterator[bytes],
    *,
    chunked: bool,
    trailers: Callable[[], Headers] | None,
) -> None:
    async for part in body:
        if part and exchange.is_unanswered:
            connection.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
            await connection.drain()
        if not exchange.is_unanswered:
            return
    if exchange.is_unanswered:
        if chunked:
            connection.write(b"0\r\n%b\r\n" % (encode_lines(trailers()) if trailers is not None else b""))
        exchange.upload_done = True


Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]
"""As getaddrinfo gives it."""


def _by_turns(addresses: Sequence[Address]) -> list[Address]:
    """The families take turns, the first one first (RFC 8305, section 4)."""
    first = [each for each in addresses if each[0] == addresses[0][0]]
    others = [each for each in addresses if each[0] != addresses[0][0]]
    return [each for pair in itertools.zip_longest(first, others) for each in pair if each is not None]


async def _connected(addresses: Sequence[Address]) -> socket.socket:
    """A socket connected to the first address that takes it.

    Each attempt begins when the one before has failed, or after NEXT_ADDRESS_S. Raises the first one's OSError.
    """
    if len(addresses) == 1:
        return await _dial(addresses[0])
    waiting = _by_turns(addresses)
    attempts: list[asyncio.Task[socket.socket]] = []
    try:
        while True:
            if waiting:
                attempts.append(asyncio.create_task(_dial(waiting.pop(0))))
            open_ones = [each for each in attempts if not each.done()]
            if not open_ones:
                raise attempts[0].exception() or OSError("no address")
            await asyncio.wait(
                open_ones, timeout=NEXT_ADDRESS_S if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for each in attempts:
                if each.done() and each.exception() is None:
                    attempts.remove(each)
                    return each.result()
    finally:
        for each in attempts:
            each.cancel()
        for outcome in await asyncio.gather(*attempts, return_exceptions=True):
            if isinstance(outcome, socket.socket):
                outcome.close()


async def _dial(address: Address) -> socket.socket:
    sock = socket.socket(*address[:3])
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address[4])
    except OSError as error:
        sock.close()
        raise OSError(error.errno, os.strerror(error.errno or 0)) from None
    except BaseException:
        sock.close()
        raise
    return sock
