"""The worker's application under the real server, spoken to in bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from proxy.app import build_app, server_config
from proxy.child import ChildTask, encode_task
from proxy.settings import HealthSettings, LimitSettings, Settings
from storage.counters import read_counters
from storage.frame import decode_frames
from tests.proxy.harness import (
    DONE,
    JSON,
    PIECES,
    Talk,
    Upstream,
    chat_answer,
    chat_body,
    in_loop,
    plain,
    streaming,
    until,
)

STREAM = chat_body("hi", stream=True)


@dataclass
class Worker:
    """A worker that serves."""

    port: int
    data_dir: Path

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[Connection]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield Connection(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def records(self) -> int:
        """Ends in the journal."""
        segments = (self.data_dir / "journal").glob("*/*.seg")
        return sum(payload[:1] == b"E" for path in segments for payload in decode_frames(path.read_bytes())[0])

    def in_flight(self) -> int:
        (path,) = (self.data_dir / "journal").glob("*/counters")
        return read_counters(path)["in_flight"]


@dataclass
class Answer:
    head: bytes
    body: bytes

    @property
    def status(self) -> int:
        return int(self.head.split(b" ", 2)[1])

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.body)["error"])


class Connection:
    """A client's connection, in bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def post(self, body: bytes, *lines: bytes, path: bytes = b"/v1/chat/completions") -> Answer:
        head = [b"POST %b HTTP/1.1" % path, b"host: h", b"content-type: application/json", *lines]
        await self.send(b"\r\n".join([*head, b"content-length: %d" % len(body), b"", b""]) + body)
        return await self.answer()

    async def answer(self, *, has_body: bool = True) -> Answer:
        """One answer, unchunked."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        lower = head.lower()
        body = b""
        if not has_body:
            pass
        elif b"transfer-encoding: chunked" in lower:
            while size := int((await self.reader.readuntil(b"\r\n"))[:-2], 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        elif b"content-length:" in lower:
            body = await self.reader.readexactly(int(lower.split(b"content-length:")[1].split(b"\r\n")[0]))
        else:
            body = await self.reader.read()
        return Answer(head, body)

    async def is_closed(self) -> bool:
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True


@contextlib.asynccontextmanager
async def serving(data_dir: Path, *urls: str, **settings: Any) -> AsyncIterator[Worker]:
    """A worker as `python -m proxy.app` runs it, but for its process."""
    settings.setdefault("health", HealthSettings(interval_s=0, models_interval_s=0))
    made = Settings(upstreams=urls, data_dir=data_dir, **settings)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        server = uvicorn.Server(server_config(build_app(made), made))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            await until(lambda: server.started or not thread.is_alive(), "the worker serves", 10.0)
            assert server.started, "the worker does not serve"
            yield Worker(sock.getsockname()[1], data_dir)
        finally:
            server.should_exit = True
            await asyncio.to_thread(thread.join)


@in_loop
async def test_connection_carries_many_requests(tmp_path: Path) -> None:
    async with (
        Upstream(plain(chat_answer()), streaming(), plain(chat_answer())) as upstream,
        serving(tmp_path, upstream.url) as worker,
        worker.connect() as client,
    ):
        bodies = [(await client.post(body)).body for body in (chat_body("1"), STREAM, chat_body("2"))]
        assert worker.records() == 3
        assert worker.in_flight() == 0
    assert bodies == [chat_answer(), b"".join(PIECES) + DONE, chat_answer()]
    assert upstream.connections == 1


@in_loop
async def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    async def echo(talk: Talk) -> None:
        await asyncio.sleep(0.05 if talk.request.target == b"/0" else 0)
        await talk.answer(talk.request.target)

    async with Upstream(echo) as upstream, serving(tmp_path, upstream.url) as worker, worker.connect() as client:
        await client.send(b"".join(b"GET /%d HTTP/1.1\r\nhost: h\r\n\r\n" % number for number in range(5)))
        assert [(await client.answer()).body for _ in range(5)] == [b"/0", b"/1", b"/2", b"/3", b"/4"]
        assert worker.records() == 5


@in_loop
async def test_target_passes_byte_for_byte(tmp_path: Path) -> None:
    targets = [b"/", b"/a%2Fb//c?x=%20&y", b"/a?", b"/a?b?", b"//h/a", b"/%FF", b"/a?q=%C3%A9;x", b"/?"]
    async with (
        Upstream(plain(b"ok")) as upstream,
        serving(tmp_path, upstream.url) as worker,
        worker.connect() as client,
    ):
        for target in targets:
            await client.send(b"GET %b HTTP/1.1\r\nhost: h\r\n\r\n" % target)
            assert (await client.answer()).status == 200
    assert [request.target for request in upstream.requests] == targets


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nhost: h\r\nx: " + b"y" * 5000 + b"\r\n\r\n",  # at once
        b"GET /" + b"y" * 5000 + b" HTTP/1.1\r\nhost: h\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"x-%d: y\r\n" % number for number in range(1000)) + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: h\r\nx: " + b"y" * 5000,  # it never ends
        b"GET /" + b"y" * 5000,
    ],
)
@pytest.mark.parametrize("piece_bytes", [100_000, 1000])
@in_loop
async def test_head_over_the_limit_is_refused(tmp_path: Path, data: bytes, piece_bytes: int) -> None:
    limits = LimitSettings.model_validate({"headers": 2048})
    async with (
        Upstream(plain()) as upstream,
        serving(tmp_path, upstream.url, limits=limits) as worker,
        worker.connect() as client,
    ):
        reading = asyncio.create_task(client.answer())
        for start in range(0, len(data), piece_bytes):
            if not reading.done():
                await client.send(data[start : start + piece_bytes])
                await asyncio.sleep(0.01)
        answer = await reading
        assert await client.is_closed()
    assert answer.head.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert answer.error["type"] == "request_header_fields_too_large"
    assert answer.error["message"] == "request line and headers over 2048 bytes"
    assert upstream.requests == []


@in_loop
async def test_bodies_do_not_count_as_heads(tmp_path: Path) -> None:
    limits = LimitSettings.model_validate({"headers": 2048})
    async with (
        Upstream(plain(b"ok")) as upstream,
        serving(tmp_path, upstream.url, limits=limits) as worker,
        worker.connect() as client,
    ):
        body = b"x" * 60_000
        head = b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % len(body)
        await client.send(head + body + head[:20])  # the next head begins in the same piece
        assert (await client.answer()).body == b"ok"
        await client.send(head[20:] + body)
        assert (await client.answer()).body == b"ok"
    assert [request.body for request in upstream.requests] == [body, body]


@pytest.mark.parametrize(
    "data",
    [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS to a plain port
        b"GET / HTTP/1.1\r\nhost: h\r\nbad header\r\n\r\n",
        b"GET /\xc3\xa9 HTTP/1.1\r\nhost: h\r\n\r\n",
        b"GET / HTTP/3.0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: gzip, x\r\n\r\n",
    ],
)
@in_loop
async def test_what_is_no_request_is_refused_readably(tmp_path: Path, data: bytes) -> None:
    async with Upstream(plain()) as upstream, serving(tmp_path, upstream.url) as worker, worker.connect() as client:
        await client.send(data)
        answer = await client.answer()
        assert await client.is_closed()
    assert answer.head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert answer.error["type"] == "invalid_http"
    assert upstream.requests == []


@in_loop
async def test_expect_continue_is_answered_when_the_body_is_wanted(tmp_path: Path) -> None:
    async with (
        Upstream(plain(b"ok")) as upstream,
        serving(tmp_path, upstream.url) as worker,
        worker.connect() as client,
    ):
        await client.send(b"POST / HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"abc")
        assert (await client.answer()).body == b"ok"
    assert upstream.requests[0].body == b"abc"
    assert upstream.requests[0].values(b"expect") == []


@in_loop
async def test_body_over_the_limit_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    async with Upstream(plain()) as upstream, serving(tmp_path, upstream.url) as worker, worker.connect() as client:
        await client.send(b"POST / HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 99999999999\r\n\r\n")
        answer = await client.answer()
        assert await client.is_closed()
        assert worker.records() == 1
    assert (answer.status, answer.error["type"]) == (413, "request_too_large")
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("script", "body", "whole"),
    [(plain(chat_answer()), chat_body("hi"), chat_answer()), (streaming(), STREAM, b"".join(PIECES) + DONE)],
)
@in_loop
async def test_http_1_0_is_served_without_chunks(tmp_path: Path, script: Any, body: bytes, whole: bytes) -> None:
    """RFC 9112, section 6.1: no transfer coding to a client of HTTP/1.0; the body ends with the connection."""
    async with Upstream(script) as upstream, serving(tmp_path, upstream.url) as worker, worker.connect() as client:
        await client.send(b"POST /v1/chat/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        data = await client.reader.read()
        assert worker.records() == 1
    head, _, rest = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert rest == whole


@in_loop
async def test_head_and_no_content(tmp_path: Path) -> None:
    async def nothing(talk: Talk) -> None:
        if talk.request.method == b"HEAD":
            await talk.head(200, (b"content-length", b"77"))
        else:
            await talk.head(204)
        talk.is_kept = True

    async with Upstream(nothing) as upstream, serving(tmp_path, upstream.url) as worker, worker.connect() as client:
        await client.send(b"HEAD /health HTTP/1.1\r\nhost: h\r\n\r\n")
        assert b"content-length: 77" in (await client.answer(has_body=False)).head
        await client.send(b"DELETE /x HTTP/1.1\r\nhost: h\r\n\r\n")
        assert (await client.answer(has_body=False)).status == 204
        await client.send(b"HEAD /health HTTP/1.1\r\nhost: h\r\n\r\n")  # the connection is in step
        assert (await client.answer(has_body=False)).status == 200


@in_loop
async def test_chunked_request_cut_anywhere(tmp_path: Path) -> None:
    body = b"".join(b"%x\r\n%b\r\n" % (len(STREAM[i : i + 9]), STREAM[i : i + 9]) for i in range(0, len(STREAM), 9))
    data = b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"
    async with Upstream(streaming()) as upstream, serving(tmp_path, upstream.url) as worker, worker.connect() as client:
        for start in range(0, len(data), 5):
            await client.send(data[start : start + 5])
            await asyncio.sleep(0)
        assert (await client.answer()).body == b"".join(PIECES) + DONE
    assert upstream.requests[0].fields["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c"])
@in_loop
async def test_upgrade_is_not_taken_up(tmp_path: Path, upgrade: bytes) -> None:
    async with (
        Upstream(plain(b"plain")) as upstream,
        serving(tmp_path, upstream.url) as worker,
        worker.connect() as client,
    ):
        lines = [
            b"connection: upgrade",
            b"upgrade: " + upgrade,
            b"sec-websocket-version: 13",
            b"sec-websocket-key: eA==",
        ]
        await client.send(b"\r\n".join([b"GET /v1/realtime HTTP/1.1", b"host: h", *lines, b"", b""]))
        answer = await client.answer()
        async with worker.connect() as other:
            assert (await other.post(b"{}")).status == 200
    assert (answer.status, answer.body) == (200, b"plain")
    assert upstream.requests[0].values(b"upgrade") == []


@in_loop
async def test_slow_reader_holds_the_upstream_back(tmp_path: Path) -> None:
    piece = b"x" * 65536
    sent = 0
    total = 1000

    async def flood(talk: Talk) -> None:
        nonlocal sent
        await talk.begin_stream()
        for _ in range(total):
            await talk.piece(piece)
            sent += 1
        await talk.end_stream()

    async with Upstream(flood) as upstream, serving(tmp_path, upstream.url) as worker:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", worker.port))
            await loop.sock_sendall(sock, b"GET /download HTTP/1.1\r\nhost: h\r\n\r\n")
            before = -1
            while before != sent or not sent:  # until nothing moves
                before = sent
                await asyncio.sleep(0.2)
            held = sent
            received = 0
            while received < total * len(piece):
                data = await loop.sock_recv(sock, 1024 * 1024)
                assert data
                received += len(data)
        await until(lambda: worker.in_flight() == 0, "it is over")
        assert worker.records() == 1
    assert held * len(piece) < 20 * 1024**2  # the kernel's buffers, and less than 1 MiB of the worker's
    assert sent == total


@in_loop
async def test_clients_that_leave_free_the_upstream(tmp_path: Path) -> None:
    gone = 0

    async def endless(talk: Talk) -> None:
        nonlocal gone
        await talk.begin_stream()
        await talk.piece(PIECES[0])
        await talk.gone()
        gone += 1

    async with Upstream(endless) as upstream, serving(tmp_path, upstream.url) as worker:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(worker.connect()) for _ in range(50)]
            for client in clients:
                await client.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n%b"
                                  % (len(STREAM), STREAM))  # fmt: skip
            for client in clients:
                assert await client.reader.readuntil(PIECES[0])
        await until(lambda: gone == 50, "the upstream is left")
        await until(lambda: worker.in_flight() == 0, "nothing is in flight")
        assert worker.records() == 50


@in_loop
async def test_client_that_leaves_with_more_requests_queued_frees_the_upstream(tmp_path: Path) -> None:
    gone = asyncio.Event()

    async def silent(talk: Talk) -> None:
        await talk.gone()
        gone.set()

    async with Upstream(silent) as upstream, serving(tmp_path, upstream.url) as worker:
        async with worker.connect() as client:
            await client.send(b"GET /1 HTTP/1.1\r\nhost: h\r\n\r\nGET /2 HTTP/1.1\r\nhost: h\r\n\r\n")
            await until(lambda: bool(upstream.requests), "the first one runs")
            await asyncio.sleep(0.1)
        async with asyncio.timeout(1.0):
            await gone.wait()
        await until(lambda: worker.in_flight() == 0, "nothing is in flight")
    assert [request.target for request in upstream.requests] == [b"/1"]


@in_loop
async def test_unfinished_answer_is_cut_not_closed_politely(tmp_path: Path) -> None:
    async def breaks(talk: Talk) -> None:
        await talk.begin_stream()
        await talk.piece(PIECES[0])

    async with Upstream(breaks) as upstream, serving(tmp_path, upstream.url) as worker, worker.connect() as client:
        with pytest.raises(asyncio.IncompleteReadError):
            await client.post(STREAM)
        assert worker.records() == 1


@in_loop
async def test_worker_that_is_stopped_finishes_what_runs(tmp_path: Path) -> None:
    async def slow(talk: Talk) -> None:
        await asyncio.sleep(0.3)
        await talk.answer(chat_answer(), 200, JSON)

    async with Upstream(slow) as upstream:
        async with serving(tmp_path, upstream.url) as worker:
            async with worker.connect() as client:
                request = asyncio.create_task(client.post(chat_body("hi")))
                await until(lambda: bool(upstream.requests), "it runs")
            # The context ends here: the worker is asked to stop while the request runs.
            request.cancel()
        assert worker.records() == 1


def test_worker_that_can_not_start_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        task = ChildTask(Settings(upstreams=("http://127.0.0.1:1",), data_dir=tmp_path), sock.fileno(), -1)
        done = subprocess.run(
            [sys.executable, "-m", "proxy.app"],
            input=encode_task(task),
            pass_fds=[sock.fileno()],
            capture_output=True,
            check=False,
        )
    assert done.returncode != 0
    assert done.stderr.decode().splitlines() == [done.stderr.decode().strip()]
    assert f"{tmp_path / 'secret'}: expected 32 bytes, found 5" in done.stderr.decode()
