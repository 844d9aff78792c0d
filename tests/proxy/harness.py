"""A gateway without a server around it: an ASGI client, an upstream that follows a script, and the journal read back.

The gateway is built by its own composition root and speaks to the upstream over real sockets; only uvicorn is left out,
so that a test sees each ASGI message and can look at the journal while one is being sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec

import msgspec

from proxy.app import build_gateway
from proxy.exchange import Gateway, Message
from proxy.settings import Settings
from storage.counters import read_counters
from storage.frame import decode_frames
from storage.journal import Begun, JournalWriter
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

    def __init__(self, *scripts: Script, reads_body: bool = True) -> None:
        self.requests: list[Received] = []
        self.connections = 0
        self.url = ""
        self._scripts = list(scripts)
        self._reads_body = reads_body
        self._problems: list[BaseException] = []

    async def __aenter__(self) -> Upstream:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
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


class Client:
    """One request of a client, as an ASGI server would hand it over.

    body: one message, or several. on_send is awaited before each message counts as sent.
    """

    def __init__(
        self,
        body: bytes | Sequence[bytes] = b"",
        *,
        method: str = "POST",
        path: str = CHAT,
        raw_path: bytes | None = None,
        query: bytes = b"",
        headers: Iterable[tuple[bytes, bytes]] = (JSON,),
        on_send: Callable[[Message], Awaitable[None]] | None = None,
    ) -> None:
        parts = [body] if isinstance(body, bytes) else list(body)
        self._incoming = [
            {"type": "http.request", "body": part, "more_body": index < len(parts) - 1}
            for index, part in enumerate(parts)
        ]
        self.is_hesitant = False
        """The body's last message never comes."""
        self.sent: list[Message] = []
        self.has_left = asyncio.Event()
        self._on_send = on_send
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode() if raw_path is None else raw_path,
            "query_string": query,
            "headers": list(headers),
            "http_version": "1.1",
            "scheme": "http",
        }

    async def receive(self) -> Message:
        if self._incoming and not self.has_left.is_set() and not (self.is_hesitant and len(self._incoming) == 1):
            return self._incoming.pop(0)
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._on_send is not None:
            await self._on_send(message)
        if not self.has_left.is_set():  # an ASGI server drops what a client that left can not get
            self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> Headers:
        return list(self.sent[0]["headers"])

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name]

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])

    @property
    def is_whole(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False

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
        try:
            await self.gateway(client.scope, client.receive, client.send)
        finally:
            client.has_left.set()  # as a server does: nobody waits for a request that is over
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
            assert used == len(data)
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
    """A gateway in front of these upstreams, with everything that a worker gives it."""
    gateway = build_gateway(Settings(upstreams=urls, data_dir=data_dir, gateway="test", **settings))
    try:
        async with asyncio.TaskGroup() as tasks, gateway.watch.running(tasks):
            yield Bench(gateway)
    finally:
        gateway.fleet.close()
        gateway.journal.close()
        if gateway.sessions is not None:
            gateway.sessions.close()
