"""What each case works with: the gateway's addresses, the scripted upstream behind it, and a chat request."""

from __future__ import annotations

import asyncio
import functools
import json
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, ParamSpec

import pytest

from tests.e2e.conformance.client import Answer, Client
from tests.e2e.conformance.upstream import Request, Script, Talk, Upstream

P = ParamSpec("P")

CHAT = b"/v1/chat/completions"
JSON = b"content-type: application/json"
CASE_S = 60.0
"""A case that takes longer hangs."""
CLOSE_S = 2.0
"""What is asserted of a close that takes 100 ms: the machine's noise is not the gateway's."""
CONNECT_S, FIRST_BYTE_S, CHUNK_S, TOTAL_S = 1.0, 1.0, 1.0, 3.0
"""The timers of the tight gateway."""
BODY_BYTES = 1024 * 1024
"""The tight gateway's limit on bodies."""
HEADER_BYTES = 64 * 1024
"""Every gateway's limit on heads, where one can be set."""
FEATURES = frozenset({
    "usage", "request-id", "body-limit", "connect-timer", "first-byte-timer", "chunk-timer", "total-timer",
    "timer-messages",
})  # fmt: skip
"""What a gateway may offer or not; everything else is HTTP, and asked of all."""


def case(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """An async test that takes the fixture `world`, on its event loop and bounded."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        world = kwargs["world"]  # pytest passes fixtures by name
        assert isinstance(world, World)
        world.run(test(*args, **kwargs))

    return run


def response(body: bytes, *lines: bytes, status: bytes = b"200 OK", content_type: bytes = JSON) -> bytes:
    """A whole answer with Content-Length."""
    head = b"\r\n".join([b"HTTP/1.1 " + status, content_type, b"content-length: %d" % len(body), *lines])
    return head + b"\r\n\r\n" + body


def chunk(data: bytes) -> bytes:
    """One chunk of the chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


END = b"0\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def says(*pieces: bytes) -> Script:
    """A script: read the request, send the pieces."""

    async def script(talk: Talk) -> None:
        await talk.read_body()
        await talk.send(*pieces)

    return script


def completion(text: str) -> bytes:
    """A chat answer."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "bench-model"}
    return json.dumps({**answer, "choices": [choice], "usage": usage}).encode()


def event(text: str, **more: Any) -> bytes:
    """An event of a chat stream."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    piece = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "bench-model"}
    return b"data: " + json.dumps({**piece, "choices": [choice], **more}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def echo(talk: Talk) -> None:
    """Where the answer does not matter: it names the target, so that answers can be told apart."""
    await talk.read_body()
    await talk.send(response(completion(f"<{talk.request.target.decode('latin-1')}>")))


async def echo_message(talk: Talk) -> None:
    """The same, for gateways that drop the query: it answers with the last message."""
    body = json.loads(await talk.read_body())
    await talk.send(response(completion(body["messages"][-1]["content"])))


class Case:
    """One case's token, its requests, and what the upstream saw of them."""

    def __init__(self, world: World, script: Script) -> None:
        self.world = world
        self.token = b"case-" + secrets.token_hex(8).encode()
        self._scripted = world.upstream.add(self.token, script)

    @property
    def seen(self) -> list[Request]:
        """The requests that reached the upstream."""
        return self._scripted.requests

    def body(self, **more: Any) -> bytes:
        """A chat request's."""
        messages = [{"role": "user", "content": f"say {self.token.decode()}"}]
        return json.dumps({"model": "bench-model", "messages": messages, **more}).encode()

    def target(self, path: bytes = CHAT) -> bytes:
        """A path with the token in its query."""
        return path + (b"&" if b"?" in path else b"?") + b"case=" + self.token

    def head(self, *lines: bytes, method: bytes = b"POST", path: bytes = CHAT, version: bytes = b"1.1") -> bytes:
        """A request's head without its empty line; `lines` follow the ones that all have."""
        first = method + b" " + self.target(path) + b" HTTP/" + version
        own = [b"host: gateway.test", b"authorization: Bearer sk-bench", b"x-case: " + self.token]
        return b"\r\n".join([first, *own, *lines]) + b"\r\n"

    def request(
        self,
        *lines: bytes,
        body: bytes | None = None,
        method: bytes = b"POST",
        path: bytes = CHAT,
        version: bytes = b"1.1",
        content_type: bytes = JSON,
    ) -> bytes:
        """A whole request; by default a chat."""
        if body is None:
            body = self.body() if method == b"POST" else b""
        own = [content_type, b"content-length: %d" % len(body)] if body or method == b"POST" else []
        return self.head(*own, *lines, method=method, path=path, version=version) + b"\r\n" + body

    async def ask(self, data: bytes | None = None, *, tight: bool = False, is_head: bool = False) -> Answer:
        """Send one request on a connection of its own, and read its answer."""
        async with await self.world.connect(tight=tight) as client:
            await client.send(self.request() if data is None else data)
            return await client.answer(is_head=is_head)

    async def arrival(self, count: int = 1, within_s: float = 8.0) -> Request:
        """The request, as soon as it has reached the upstream. Raises AssertionError."""
        await until(lambda: len(self.seen) >= count, f"{count} requests reach the upstream", within_s)
        return self.seen[count - 1]


async def until(is_true: Callable[[], bool], what: str, within_s: float = 8.0) -> None:
    """Wait for a fact. Raises AssertionError naming it."""
    deadline_s = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.001)


class World:
    """The gateway under test, twice: as anyone runs it, and with short timers and a small limit on bodies."""

    def __init__(self, upstream_port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.upstream = Upstream(upstream_port)
        self.main = self.tight = ("127.0.0.1", 0)
        self.offers: frozenset[str] = FEATURES
        self.run(self.upstream.start())

    def close(self) -> None:
        """End the upstream and the loop."""
        self.run(self.upstream.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, None], within_s: float = CASE_S) -> None:
        """Do it on the loop, to its end."""

        async def bounded() -> None:
            async with asyncio.timeout(within_s):
                await work

        asyncio.run_coroutine_threadsafe(bounded(), self._loop).result()

    def need(self, feature: str) -> None:
        """Leave the case out where the gateway does not have the feature."""
        assert feature in FEATURES
        if feature not in self.offers:
            pytest.skip(f"not offered: {feature}")

    def case(self, script: Script = echo) -> Case:
        """A new one, which runs from now on."""
        return Case(self, script)

    async def connect(self, *, tight: bool = False, receive_bytes: int | None = None) -> Client:
        """A connection to the gateway."""
        host, port = self.tight if tight else self.main
        return await Client.connect(host, port, receive_bytes)

    async def wait_until_served(self, *, tight: bool = False, within_s: float) -> None:
        """Until the gateway answers a plain chat. Raises AssertionError."""
        deadline_s = time.monotonic() + within_s
        while True:
            try:
                answer: object = await self.case().ask(tight=tight)
                if isinstance(answer, Answer) and answer.status == 200:
                    return
            except (OSError, AssertionError) as error:
                answer = error
            assert time.monotonic() < deadline_s, f"no 200 for a plain chat within {within_s:g} s: {answer}"
            await asyncio.sleep(0.2)

    @asynccontextmanager
    async def without_upstream(self, *, blackhole: bool = False) -> AsyncIterator[None]:
        """Refuse the gateway's connections, or leave its SYNs unanswered; afterwards wait until it serves again."""
        await self.upstream.stop()
        fillers: list[socket.socket] = []
        try:
            if blackhole:
                fillers = _full_backlog(self.upstream.port)
            yield
        finally:
            for sock in fillers:
                sock.close()
            await self.upstream.start()
            for tight in (False, True):
                await self.wait_until_served(tight=tight, within_s=40.0)


def _full_backlog(port: int) -> list[socket.socket]:
    """A listening socket that takes no connection any more (Linux: backlog 0 has room for one), and what fills it."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(0)
    sockets = [listener]
    for _ in range(4):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", port))
        sockets.append(sock)
    time.sleep(0.05)
    return sockets


async def normal_service(world: World, times: int = 3) -> None:
    """Requests on new connections get their own answers: nothing was left behind in the gateway's connections."""
    for number in range(times):
        after = world.case()
        answer = await after.ask(after.request(path=CHAT + b"?n=%d" % number))
        assert answer.status == 200, f"afterwards a normal request got {answer}"
        assert len(after.seen) == 1, f"afterwards a normal request reached the upstream {len(after.seen)} times"
        assert answer.body.count(b"<") == 1, "afterwards a normal request got another's answer"
