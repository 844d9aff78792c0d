"""The suite's own upstream: each case scripts what it answers, and it keeps exactly what it received.

A request belongs to the case whose token (`case-` and 16 hex digits) stands in its head or else in its body, because
those are the places that every gateway passes on. A request without a token belongs to the case that runs: a smuggled
request must be counted somewhere. Routers ask their upstreams about health and models by themselves; such requests,
without a token, are answered and not counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

Headers = list[tuple[bytes, bytes]]
Script = Callable[["Talk"], Awaitable[None]]

TOKEN = re.compile(rb"case-[0-9a-f]{16}")
_BACKGROUND = re.compile(rb"GET /(health|v1/models|models|get_model_info|get_server_info|server_info|metrics|ping)\b")
_BACKGROUND_BODY = b'{"object":"list","data":[{"id":"bench-model","object":"model"}],"status":"ok"}'
_BACKGROUND_ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
    % (len(_BACKGROUND_BODY), _BACKGROUND_BODY)
)
"""It closes, so that no case finds a kept connection that it knows nothing of."""
_READ_AHEAD_BYTES = 4 * 1024**2


def split_head(head: bytes) -> Headers:
    """The header lines of a head, in their order and spelling; the start line is left out."""
    lines = head.split(b"\r\n")[1:]
    pairs = (line.partition(b":") for line in lines if line)
    return [(name, value.strip(b" \t")) for name, _, value in pairs]


@dataclass(slots=True)
class Request:
    """One request as it came."""

    head: bytes
    connection: Connection
    is_reused: bool
    """The connection has carried another one before."""
    body: bytearray = field(default_factory=bytearray)
    is_whole: bool = False

    @property
    def closed_s(self) -> float | None:
        """Monotonic time at which the gateway was seen to close or reset the connection."""
        return self.connection.closed_s

    @property
    def method(self) -> bytes:
        """As spelt."""
        return self.head.split(b" ", 1)[0]

    @property
    def target(self) -> bytes:
        """As spelt."""
        return self.head.split(b"\r\n", 1)[0].split(b" ")[1]

    @property
    def headers(self) -> Headers:
        """In their order and spelling."""
        return split_head(self.head)

    def values(self, name: bytes) -> list[bytes]:
        """Of every header with this name, in their order."""
        return [value for found, value in self.headers if found.lower() == name]


class Gone(Exception):
    """The gateway has closed the connection before what was waited for came."""


class Connection(asyncio.Protocol):
    """One connection of the gateway's: what came in, when it ended, and whether more may be written."""

    transport: asyncio.Transport

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self.buffer = bytearray()
        self.closed_s: float | None = None
        self.sent_bytes = 0
        self._came = asyncio.Event()
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._upstream.connected(self)
        self._task = asyncio.get_running_loop().create_task(self._upstream.serve(self))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if len(self.buffer) > _READ_AHEAD_BYTES:
            self.transport.pause_reading()
        self._came.set()

    def eof_received(self) -> bool:
        self._ended()
        return True  # the script goes on: what it still sends finds out by itself

    def connection_lost(self, error: Exception | None) -> None:
        self._ended()
        self._upstream.disconnected(self)

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def _ended(self) -> None:
        if self.closed_s is None:
            self.closed_s = time.monotonic()
        self._came.set()
        self._may_write.set()

    async def more(self) -> None:
        """Wait for more bytes. Raises Gone."""
        if self.closed_s is not None:
            raise Gone
        if not self.transport.is_reading():
            self.transport.resume_reading()
        self._came.clear()
        await self._came.wait()

    async def take(self, count: int) -> bytes:
        """The next bytes, exactly so many. Raises Gone."""
        while len(self.buffer) < count:
            await self.more()
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        return taken

    async def take_through(self, mark: bytes) -> bytes:
        """The next bytes up to and with a mark. Raises Gone."""
        while (found := self.buffer.find(mark)) < 0:
            await self.more()
        return await self.take(found + len(mark))

    async def write(self, data: bytes) -> None:
        """Send; returns when the kernel has room for more. Raises Gone."""
        await self._may_write.wait()
        if self.transport.is_closing() or self.closed_s is not None:
            raise Gone
        self.transport.write(data)
        self.sent_bytes += len(data)
        await self._may_write.wait()

    async def wait_closed(self) -> None:
        """Until the gateway closes or resets the connection."""
        with contextlib.suppress(Gone):
            while True:
                await self.more()

    def reset(self) -> None:
        """End the connection with a RST."""
        reset(self.transport)

    def stop(self) -> None:
        """End the connection and whatever is done for it."""
        if self._task is not None:
            self._task.cancel()
        self.transport.abort()


def reset(transport: asyncio.BaseTransport) -> None:
    """Close with a RST instead of a FIN."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert isinstance(transport, asyncio.Transport)
    transport.abort()


class Talk:
    """What a script works with: one request, and the connection to answer on."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.connection = request.connection

    async def read_body(self) -> bytes:
        """The rest of the request. Raises Gone when it does not come."""
        request = self.request
        if request.is_whole:
            return bytes(request.body)
        if request.values(b"transfer-encoding"):
            while (size := int((await self.connection.take_through(b"\r\n")).split(b";")[0], 16)) > 0:
                request.body += (await self.connection.take(size + 2))[:-2]
            while await self.connection.take_through(b"\r\n") != b"\r\n":
                pass
        elif lengths := request.values(b"content-length"):
            while missing := int(lengths[0]) - len(request.body):
                if not self.connection.buffer:
                    await self.connection.more()
                request.body += await self.connection.take(min(missing, len(self.connection.buffer)))
        request.is_whole = True
        return bytes(request.body)

    async def send(self, *pieces: bytes) -> None:
        """Write the pieces, each for itself. Raises Gone."""
        for index, piece in enumerate(pieces):
            if index:
                await asyncio.sleep(0.001)  # so that they do not travel as one
            await self.connection.write(piece)

    def close(self) -> None:
        """End the connection politely, after what was sent."""
        self.connection.transport.close()

    def reset(self) -> None:
        """End the connection with a RST."""
        self.connection.reset()


@dataclass(slots=True)
class Scripted:
    """A case as the upstream knows it."""

    script: Script
    requests: list[Request] = field(default_factory=list)


class Upstream:
    """A server on a port of 127.0.0.1. All of it runs on one event loop."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self._cases: dict[bytes, Scripted] = {}
        self._current: Scripted | None = None
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; on the same port again after `stop`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections from now on, and end those that are open."""
        assert self._server is not None
        self._server.close()
        for connection in list(self._connections):
            connection.stop()
        while self._connections:
            await asyncio.sleep(0.001)
        await self._server.wait_closed()

    async def hang_up(self) -> None:
        """Close the open connections politely, and give the gateway the time to notice."""
        for connection in self._connections:
            connection.transport.close()
        await asyncio.sleep(0.05)

    def add(self, token: bytes, script: Script) -> Scripted:
        """Make a case known, and the one that runs."""
        self._current = self._cases[token] = Scripted(script)
        return self._current

    def connected(self, connection: Connection) -> None:
        """A connection is new."""
        self._connections.add(connection)

    def disconnected(self, connection: Connection) -> None:
        """A connection is over."""
        self._connections.discard(connection)

    async def serve(self, connection: Connection) -> None:
        """One connection, to its end."""
        is_reused = False
        try:
            while not connection.transport.is_closing():
                head = await connection.take_through(b"\r\n\r\n")
                await self._answer(Talk(Request(head, connection, is_reused)))
                is_reused = True
        except Gone:
            connection.transport.close()
        except ValueError:  # of `int`: what was forwarded is no HTTP, and the case that runs sees that in `requests`
            connection.reset()

    async def _answer(self, talk: Talk) -> None:
        request = talk.request
        found = TOKEN.search(request.head)
        if found is None and _BACKGROUND.match(request.head):
            await talk.send(_BACKGROUND_ANSWER)
            talk.close()
            return
        if found is None:
            with contextlib.suppress(Gone):
                found = TOKEN.search(await talk.read_body())
        case = self._current if found is None else self._cases.get(found[0])
        assert case is not None, f"a request of no case: {request.head!r}"
        case.requests.append(request)
        await case.script(talk)
        await talk.read_body()
