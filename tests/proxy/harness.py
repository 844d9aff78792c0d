"""A gateway without a kernel before it: a client in memory, an upstream that follows a script, the journal read back.

The gateway is built by its own composition root and speaks to the upstream over real sockets; only uvicorn and the
client's socket are left out, so that a test sees each write and can look at the journal while one is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, Protocol

import msgspec

from proxy.app import build_gateway
from proxy.exchange import Gateway
from proxy.server import ClientConnection
from proxy.settings import HealthSettings, Settings
from storage.counters import read_counters
from storage.entries import Begun
from storage.frame import decode_frames
from storage.journal import JournalWriter
from traces.record import TraceRecord

P = ParamSpec("P")
Headers = list[tuple[bytes, bytes]]
JSON = (b"content-type", b"application/json")
CHAT = "/v1/chat/completions"
LIMIT_S = 20.0
"""A test that waits longer hangs."""


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test to its end, bounded."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(LIMIT_S):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


async def until(is_true: Callable[[], bool], what: str, timeout_s: float = 5.0) -> float:
    """Wait for a fact; returns how long it took. Raises AssertionError naming it."""
    start_s = time.monotonic()
    while not is_true():
        assert time.monotonic() - start_s < timeout_s, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.002)
    return time.monotonic() - start_s


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# What vLLM says -------------------------------------------------------------------------------------------------------


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat_body(
    *texts: str, stream: bool = False, system: str | None = None, model: str | None = "m", **more: Any
) -> bytes:
    """A chat request: user and assistant take turns, beginning with the user."""
    messages = [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(texts)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    fields: dict[str, Any] = {"model": model, "messages": messages, **more}
    if stream:
        fields["stream"] = True
    return json.dumps(fields).encode()


def chat_answer(text: str = "hello", prompt: int = 7, completion: int = 3) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    fields = {"id": "chatcmpl-1", "object": "chat.completion", "model": "served", "choices": [choice]}
    return json.dumps({**fields, "usage": usage(prompt, completion)}).encode()


def event(fields: object) -> bytes:
    return b"data: " + (fields if isinstance(fields, bytes) else json.dumps(fields).encode()) + b"\n\n"


def chunk(text: str | None = None, finish: str | None = None, use: dict[str, int] | None = None) -> bytes:
    """One event of a chat stream; with `use` the usage event."""
    delta = {} if text is None else {"content": text}
    choices = [] if use is not None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return event({"id": "chatcmpl-1", "model": "served", "choices": choices, "usage": use})


DONE = event(b"[DONE]")
PIECES = [chunk("a"), chunk("b"), chunk("c"), chunk(finish="stop")]
USAGE = chunk(use=usage(7, 3))
"""The event that vLLM adds when it is asked for usage."""


# The upstream ---------------------------------------------------------------------------------------------------------


@dataclass
class Received:
    """A request as the upstream saw it."""

    method: bytes = b""
    target: bytes = b""
    headers: Headers = field(default_factory=list)
    body: bytes = b""

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]

    @property
    def fields(self) -> Any:
        return json.loads(self.body)


class Talk:
    """One request at the upstream, and the connection that it came on."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.request = Received()
        self.is_kept = False
        """The connection may carry another request."""

    async def read_head(self) -> None:
        head = (await self.reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
        self.request.method, self.request.target, _ = head[0].split(b" ")
        pairs = [line.split(b": ", 1) for line in head[1:]]
        self.request.headers = [(name, value) for name, value in pairs]

    async def read_body(self) -> None:
        if self.request.values(b"transfer-encoding") == [b"chunked"]:
            while size := int((await self.reader.readuntil(b"\r\n"))[:-2], 16):
                self.request.body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        for length in self.request.values(b"content-length"):
            self.request.body = await self.reader.readexactly(int(length))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status: int = 200, *headers: tuple[bytes, bytes]) -> None:
        lines = [b"HTTP/1.1 %d X" % status, *(b"%b: %b" % header for header in headers)]
        await self.send(b"\r\n".join(lines) + b"\r\n\r\n")

    async def answer(self, body: bytes, status: int = 200, *headers: tuple[bytes, bytes]) -> None:
        """A whole plain answer."""
        await self.head(status, *(headers or (JSON,)), (b"content-length", b"%d" % len(body)))
        await self.send(body)
        self.is_kept = True

    async def begin_stream(self) -> None:
        await self.head(200, (b"content-type", b"text/event-stream; charset=utf-8"), (b"transfer-encoding", b"chunked"))

    async def piece(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end_stream(self) -> None:
        await self.send(b"0\r\n\r\n")
        self.is_kept = True

    async def stream(self, *pieces: bytes) -> None:
        """A whole stream, with usage only where it is asked for, as vLLM does it."""
        await self.begin_stream()
        options = self.request.fields.get("stream_options") or {}
        for data in (*pieces, USAGE, DONE) if options.get("include_usage") else (*pieces, DONE):
            await self.piece(data)
        await self.end_stream()

    def reset(self) -> None:
        """End the connection at once, as a killed process does."""
        linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Returns when the gateway has closed the connection."""
        with contextlib.suppress(ConnectionError):
            assert await self.reader.read(1) == b""


Script = Callable[[Talk], Awaitable[None]]


class Upstream:
    """Serves each request by the next script; the last one serves all that follow."""

    def __init__(self, *scripts: Script, reads_body: bool = True, port: int = 0) -> None:
        self._port = port
        self.requests: list[Received] = []
        self.connections = 0
        self.url = ""
        self._scripts = list(scripts)
        self._reads_body = reads_body
        self._problems: list[BaseException] = []

    async def __aenter__(self) -> Upstream:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._tasks: set[asyncio.Task[None] | None] = set()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in self._tasks if task is not None), return_exceptions=True)
        assert not self._problems, self._problems

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        self.connections += 1
        try:
            while True:
                talk = Talk(reader, writer)
                await talk.read_head()
                self.requests.append(talk.request)
                if self._reads_body:
                    await talk.read_body()
                script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
                await script(talk)
                if not talk.is_kept:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except asyncio.CancelledError:
            return
        except BaseException as error:
            self._problems.append(error)
        finally:
            writer.close()


def plain(body: bytes = b"{}", status: int = 200, *headers: tuple[bytes, bytes]) -> Script:
    return lambda talk: talk.answer(body, status, *headers)


def streaming(*pieces: bytes) -> Script:
    return lambda talk: talk.stream(*(pieces or PIECES))


# The gateway and its client -------------------------------------------------------------------------------------------


class Writes(Protocol):
    """The client's end of a wire."""

    has_ended: asyncio.Event

    def written(self, data: bytes) -> None: ...


class Wire(asyncio.Transport):
    """What lies between a client and the gateway: no kernel, so that a test sees each write as it is made."""

    def __init__(self, client: Writes) -> None:
        super().__init__()
        self._client = client
        self._is_closing = False
        self._ends = socket.socketpair()
        """What the gateway looks at when it wants to know whether the client is still there."""
        self.reads = asyncio.Event()
        self.reads.set()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._ends[0] if name == "socket" else default

    def hang_up(self) -> None:
        """The client's end of the connection is closed."""
        self._ends[1].close()

    def drop(self) -> None:
        """Nobody has the connection any more."""
        for end in self._ends:
            end.close()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._is_closing:
            self._client.written(bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing is buffered."""

    def pause_reading(self) -> None:
        self.reads.clear()

    def resume_reading(self) -> None:
        self.reads.set()

    def is_closing(self) -> bool:
        return self._is_closing

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._client.has_ended.set()

    def close(self) -> None:
        self._is_closing = True
        self._client.has_ended.set()

    def abort(self) -> None:
        self.close()


class Client:
    """One request of a client on a connection of its own.

    body: bytes have a Content-Length (but for an empty body of GET and the like), a list of parts is sent in chunks,
    `pace_s` apart; a Content-Length among the headers is taken at its word. on_write: sees what the gateway writes,
    before it counts as written. blocks: the client takes one write and reads no more.
    """

    def __init__(
        self,
        body: bytes | Sequence[bytes] = b"",
        *,
        method: str = "POST",
        target: bytes | None = None,
        path: str = CHAT,
        headers: Iterable[tuple[bytes, bytes]] = (JSON,),
        on_write: Callable[[bytes], None] | None = None,
        on_part: Callable[[], None] | None = None,
        blocks: bool = False,
        pace_s: float = 0.0,
    ) -> None:
        parts = [body] if isinstance(body, bytes) else list(body)
        lines = list(headers)
        if not any(name.lower() == b"host" for name, _ in lines):
            lines.insert(0, (b"Host", b"h"))
        is_sized = any(name.lower() == b"content-length" for name, _ in lines)
        if not is_sized and not isinstance(body, bytes):
            lines.append((b"Transfer-Encoding", b"chunked"))
            parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts if part] + [b"0\r\n\r\n"]
        elif not is_sized and (body or method == "POST"):
            lines.append((b"Content-Length", b"%d" % len(body)))
        head = b"%b %b HTTP/1.1\r\n" % (method.encode(), path.encode() if target is None else target)
        self._parts = [head + b"".join(b"%b: %b\r\n" % line for line in lines) + b"\r\n" + parts[0], *parts[1:]]
        self._method = method
        self._on_write = on_write
        self._on_part = on_part
        self._blocks = blocks
        self._pace_s = pace_s
        self.is_hesitant = False
        """The last part never comes."""
        self.raw = b""
        """What the gateway has written."""
        self.has_left = asyncio.Event()
        self.has_ended = asyncio.Event()
        """The answer is whole, or the gateway has closed the connection."""
        self._connection: ClientConnection

    async def run(self, gateway: Gateway) -> None:
        """The connection's life."""
        wire = Wire(self)
        self._connection = ClientConnection(gateway, asyncio.get_running_loop(), set())
        self._connection.connection_made(wire)
        sending = asyncio.create_task(self._send(wire))
        waits = [asyncio.create_task(event.wait()) for event in (self.has_left, self.has_ended)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, *waits):
                task.cancel()
            self._connection.connection_lost(None)
            wire.drop()

    async def _send(self, wire: Wire) -> None:
        for part in self._parts[: -1 if self.is_hesitant else None]:
            await wire.reads.wait()
            if self._on_part is not None:
                self._on_part()
            self._connection.data_received(part)
            await asyncio.sleep(self._pace_s)

    def written(self, data: bytes) -> None:
        if self._on_write is not None:
            self._on_write(data)
        if not self.has_left.is_set():
            self.raw += data
        if self._blocks:
            self._connection.pause_writing()
        if self.is_whole:
            self.has_ended.set()

    def _split(self) -> tuple[list[bytes], bytes]:
        head, _, rest = self.raw.partition(b"\r\n\r\n")
        while re.match(rb"HTTP/1.1 1\d\d ", head):
            head, _, rest = rest.partition(b"\r\n\r\n")
        return head.split(b"\r\n"), rest

    @property
    def has_answer(self) -> bool:
        """The final answer's head is there."""
        return bool(self._split()[0][0]) and b"\r\n\r\n" in self.raw

    @property
    def status(self) -> int:
        return int(self._split()[0][0].split(b" ")[1])

    @property
    def headers(self) -> Headers:
        """But for how the body is framed in chunks, and what the gateway adds to any answer."""
        own = (b"transfer-encoding", b"x-burstgate-overhead-ms", b"x-burstgate-upstream")
        pairs = [line.split(b": ", 1) for line in self._split()[0][1:]]
        return [(name, value) for name, value in pairs if name not in own]

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name]

    def _unframed(self) -> tuple[bytes, bool]:
        """The body, and whether it is whole."""
        head, rest = self._split()
        if not self.has_answer:
            return b"", False
        if b"transfer-encoding: chunked" in head:
            body = b""
            while b"\r\n" in rest:
                size, _, rest = rest.partition(b"\r\n")
                length = int(size, 16)
                if not length:
                    return body, rest.endswith(b"\r\n")
                assert rest[length : length + 2] in (b"\r\n", b"\r", b"")
                body += rest[:length]
                rest = rest[length + 2 :]
            return body, False
        length = int((self.values(b"content-length") or [b"0"])[0])
        return rest, self._method == "HEAD" or self.status in (204, 304) or len(rest) == length

    @property
    def body(self) -> bytes:
        return self._unframed()[0]

    @property
    def is_whole(self) -> bool:
        return self._unframed()[1]

    @property
    def error(self) -> dict[str, Any]:
        """The gateway's own error."""
        found = json.loads(self.body)["error"]
        assert found.keys() == {"message", "type", "param", "code"}
        return dict(found)


class Bench:
    """A gateway on its own data directory."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    async def serve(self, client: Client) -> Client:
        """One request from its start to its end."""
        await client.run(self.gateway)
        return client

    def start(self, client: Client) -> asyncio.Task[Client]:
        return asyncio.create_task(self.serve(client))

    @property
    def writer(self) -> JournalWriter:
        """The gateway's journal, which the disk has room for."""
        assert isinstance(self.gateway.journal, JournalWriter)
        return self.gateway.journal

    def journal(self) -> tuple[list[Begun], list[TraceRecord]]:
        """Everything in the journal now."""
        begun, ended = [], []
        for path in sorted(self.writer.directory.glob("*.seg")):
            data = path.read_bytes()
            payloads, used = decode_frames(data)
            assert not data[used:].strip(b"\0")  # allocated ahead
            begun += [msgspec.msgpack.decode(each[1:], type=Begun) for each in payloads if each[:1] == b"B"]
            ended += [msgspec.msgpack.decode(each[1:], type=TraceRecord) for each in payloads if each[:1] == b"E"]
        return begun, ended

    def records(self) -> list[TraceRecord]:
        """The records, in the order of their ends: one for each request begun, and nothing is held any more."""
        begun, ended = self.journal()
        assert sorted(each.request_id for each in begun) == sorted(each.request_id for each in ended)
        assert len({each.request_id for each in ended}) == len(ended)
        self.assert_idle()
        return ended

    def record(self) -> TraceRecord:
        """The only record."""
        (record,) = self.records()
        return record

    def assert_idle(self) -> None:
        assert self.counter("in_flight") == 0
        assert [upstream.in_flight for upstream in self.gateway.fleet.upstreams] == [0] * len(
            self.gateway.fleet.upstreams
        )
        assert self.writer.open_requests == 0

    def counter(self, name: str) -> int:
        return read_counters(self.writer.directory / "counters")[name]


@contextlib.asynccontextmanager
async def running(data_dir: Path, *urls: str, **settings: Any) -> AsyncIterator[Bench]:
    """A gateway in front of these upstreams, with everything that a worker gives it; it asks them nothing by itself."""
    settings.setdefault("health", HealthSettings(interval_s=0, models_interval_s=0))
    gateway = build_gateway(Settings(upstreams=urls, data_dir=data_dir, gateway="test", **settings))
    try:
        async with asyncio.TaskGroup() as tasks, gateway.fleet:
            ticking = tasks.create_task(gateway.watch.run())
            yield Bench(gateway)
            ticking.cancel()
    finally:
        gateway.stop()
        gateway.fleet.close()
        await asyncio.to_thread(gateway.end_telemetry)
        gateway.journal.close()
        gateway.sessions.close()
