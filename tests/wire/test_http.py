"""The client against scripted servers on real sockets, under asyncio's event loop and uvloop's."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import socket
import ssl
import struct
import subprocess
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.compiled import needs_source
from wire.http import (
    NEXT_ADDRESS_S,
    READ_AHEAD_BYTES,
    STALE_NS,
    Address,
    BaseUrl,
    ConnectFailed,
    ConnectionLost,
    Exchange,
    HttpClient,
    client_context,
    parse_base_url,
)
from wire.http1 import BadResponse, Headers, encode_lines

Play = Callable[["Peer"], Awaitable[None]]
Run = Callable[[Coroutine[Any, Any, None]], None]

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
LIMIT_S = 10.0
ABORT_S = 0.1
"""How soon a server must see that its client has left."""


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine to its end, at most `LIMIT_S`; what the loop would only log is a failure."""

    def runner(main: Coroutine[Any, Any, None]) -> None:
        problems: list[dict[str, Any]] = []

        async def watched() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
            async with asyncio.timeout(LIMIT_S):
                await main

        with asyncio.Runner(loop_factory=request.param) as loop:
            loop.run(watched())
        assert problems == []

    return runner


class Peer:
    """One connection, from the server's side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number
        """Of the connection, from 1."""
        self.is_over = False
        """The script has been played; of one that answers, because the client has left."""

    async def request(self) -> bytes:
        """The next request, head and body, as it came."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                return head + await self.reader.readexactly(int(line.split(b":")[1]))
            if line == b"transfer-encoding: chunked":
                return head + await self.reader.readuntil(b"0\r\n\r\n")
        return head

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer_all(self, answer: bytes = OK) -> None:
        """Answer each request until the client leaves."""
        while True:
            await self.request()
            await self.send(answer)

    async def left(self) -> int:
        """Wait until the client has left; the bytes that came until then."""
        size = 0
        with contextlib.suppress(ConnectionError):
            while data := await self.reader.read(65536):
                size += len(data)
        return size


class Server:
    """A server that plays one script on each connection."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def serving(play: Play, **options: Any) -> AsyncIterator[Server]:
    """A server on a free port; errors of the script come out at the end, those of a client that left do not."""
    server = Server()
    errors: list[Exception] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer, len(server.peers) + 1)
        server.peers.append(peer)
        try:
            await play(peer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except Exception as error:
            errors.append(error)
        finally:
            peer.is_over = True
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()

    listener = await asyncio.start_server(serve, **{"host": "127.0.0.1", "port": 0, **options})
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for peer in server.peers:
            peer.writer.close()
        for _ in range(3):
            await asyncio.sleep(0.005)
    assert errors == []


async def read_into(body: list[bytes], exchange: Exchange) -> None:
    """Append what comes, to the end."""
    while True:
        body.append(exchange.take())
        if exchange.is_complete:
            body.append(exchange.take())
            return
        await exchange.wait()


async def read_all(exchange: Exchange) -> bytes:
    """The whole body."""
    body: list[bytes] = []
    await read_into(body, exchange)
    return b"".join(body)


async def get(client: HttpClient, target: bytes = b"/") -> tuple[int, bytes]:
    exchange = await client.request(b"GET", target, [])
    body = await read_all(exchange)
    return exchange.status, body


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


async def until(is_true: Callable[[], bool], limit_s: float = 2.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.002)


# --- one exchange ---------------------------------------------------------------------------------------------------


def test_a_request_goes_out_as_given_and_its_answer_comes_back(run: Run) -> None:
    got: list[bytes] = []

    async def play(peer: Peer) -> None:
        got.append(await peer.request())
        await peer.send(b"HTTP/1.1 201 Made\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 5\r\n\r\nhe")
        await asyncio.sleep(0.02)
        await peer.send(b"llo")
        await peer.left()

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(f"{server.url}/prefix/")
            headers: Headers = [(b"X-B", b"\xff"), (b"content-length", b"2")]
            exchange = await client.request(b"POST", b"/v1/x?y=%20", headers, b"hi")
            assert not exchange.has_head
            assert exchange.first_byte_ns == 0
            await exchange.wait_head()
            assert exchange.status == 201
            assert exchange.headers == [(b"X-A", b"1"), (b"x-a", b"2"), (b"Content-Length", b"5")]
            assert exchange.has_body
            assert not exchange.is_complete
            assert exchange.take() == b"he"
            assert exchange.take() == b""
            assert not exchange.has_body
            await exchange.wait()
            assert exchange.is_complete
            assert exchange.take() == b"llo"
            assert exchange.sent_ns <= exchange.first_byte_ns <= exchange.received_ns - 10_000_000
            exchange.abort()  # without effect
            await exchange.wait()
            assert exchange.error is None
            host = f"127.0.0.1:{server.port}".encode()
            expected = b"POST /prefix/v1/x?y=%%20 HTTP/1.1\r\nhost: %b\r\nX-B: \xff\r\ncontent-length: 2\r\n\r\nhi"
            assert got == [expected % host]
            client.close()

    run(main())


ANSWERS: list[tuple[bytes, bytes, bool, int, bytes]] = [
    # method, answer, the server then closes, status, body
    (b"GET", OK, False, 200, b"hi"),
    (b"GET", OK, True, 200, b"hi"),
    (b"GET", CHUNKED + b"2\r\nhi\r\n0\r\n\r\n", False, 200, b"hi"),
    (b"GET", CHUNKED + b"2\r\nhi\r\n0\r\nx-t: 1\r\n\r\n", True, 200, b"hi"),
    (b"GET", b"HTTP/1.1 100 Continue\r\n\r\n" + OK, False, 200, b"hi"),
    (b"GET", b"HTTP/1.1 204 X\r\n\r\n", False, 204, b""),
    (b"HEAD", b"HTTP/1.1 200 X\r\ncontent-length: 99\r\n\r\n", False, 200, b""),
    (b"GET", b"HTTP/1.1 200 X\r\n\r\nhi", True, 200, b"hi"),
    (b"GET", b"HTTP/1.0 200 X\r\n\r\nhi" + b"x" * 300_000, True, 200, b"hi" + b"x" * 300_000),
    (b"GET", b"HTTP/1.1 200 X\r\n\r\n", True, 200, b""),
]


@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize(("method", "answer", "closes", "status", "body"), ANSWERS)
def test_answers_of_every_framing(
    run: Run, method: bytes, answer: bytes, closes: bool, status: int, body: bytes, is_late: bool
) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)
        if not closes:
            await peer.left()

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            exchange = await client.request(method, b"/", [])
            if is_late:  # data and the end of the connection have come before anybody looks
                await asyncio.sleep(0.02)
            assert (await read_all(exchange), exchange.status) == (body, status)
            client.close()

    run(main())


BROKEN = [
    # answer, has a head, body, failure
    (b"", False, b"", ConnectionLost),
    (b"HTTP/1.1 200 OK\r\ncontent-", False, b"", ConnectionLost),
    (b"HTTP/1.1 100 Continue\r\n\r\n", False, b"", ConnectionLost),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nhi", True, b"hi", ConnectionLost),
    (CHUNKED + b"2\r\nhi\r\n", True, b"hi", ConnectionLost),
    (CHUNKED + b"2\r\nhi\r\n0\r\n", True, b"hi", ConnectionLost),
    (CHUNKED + b"2\r\nhi\r\nzz\r\n", True, b"hi", BadResponse),
    (b"<html>", False, b"", BadResponse),
    (b"HTTP/1.1 101 X\r\n\r\n", False, b"", BadResponse),
]


@pytest.mark.parametrize(("answer", "has_head", "body", "failure"), BROKEN)
def test_an_answer_that_breaks_off_gives_what_came_and_then_says_so(
    run: Run, answer: bytes, has_head: bool, body: bytes, failure: type[Exception]
) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)

    async def main() -> None:
        async with serving(play) as server:
            for is_late in (False, True):
                exchange = await HttpClient(server.url).request(b"GET", b"/", [])
                if is_late:
                    await asyncio.sleep(0.02)
                came: list[bytes] = []
                with pytest.raises(failure, match=r"^.+$"):
                    await read_into(came, exchange)
                assert (exchange.has_head, b"".join(came), exchange.take()) == (has_head, body, b"")
                with pytest.raises(failure):
                    await exchange.wait()
                exchange.abort()
            assert len(server.peers) == 2  # a fresh connection is not tried again

    run(main())


# --- connections ----------------------------------------------------------------------------------------------------


def test_a_connection_is_reused_newest_first(run: Run) -> None:
    async def main() -> None:
        answered = 0  # the connection whose turn it is

        async def play(peer: Peer) -> None:
            while True:
                request = await peer.request()
                if request.startswith(b"GET /held"):
                    await until(lambda: answered == peer.number)
                await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n%d" % peer.number)

        async with serving(play) as server:
            client = HttpClient(server.url)
            assert [await get(client) for _ in range(5)] == [(200, b"1")] * 5
            held = [await client.request(b"GET", b"/held", []) for _ in range(3)]  # as many as are asked for
            for answered in (3, 1, 2):
                assert await read_all(held[answered - 1]) == b"%d" % answered
            assert [await get(client) for _ in range(5)] == [(200, b"2")] * 5
            client.close()
            await until(lambda: all(peer.is_over for peer in server.peers))
            assert len(server.peers) == 3

    run(main())


NOT_KEPT = [
    b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi",
    b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi",
    OK + b"HTTP/1.1 500 Smuggled\r\ncontent-length: 0\r\n\r\n",
    OK + b"\0",
]


@pytest.mark.parametrize("answer", NOT_KEPT)
def test_a_connection_that_can_not_be_kept_is_closed(run: Run, answer: bytes) -> None:
    gone: list[int] = []

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)
        await peer.left()
        gone.append(peer.number)

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            assert await get(client) == (200, b"hi")
            await until(lambda: gone == [1], ABORT_S)
            assert await get(client) == (200, b"hi")
            assert len(server.peers) == 2

    run(main())


def test_bytes_on_an_idle_connection_end_it(run: Run) -> None:
    gone: list[int] = []

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        if peer.number == 1:
            await asyncio.sleep(0.02)
            await peer.send(b"HTTP/1.1 500 Unasked\r\ncontent-length: 0\r\n\r\n")
        await peer.left()
        gone.append(peer.number)

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            assert await get(client) == (200, b"hi")
            await until(lambda: gone == [1])
            assert await get(client) == (200, b"hi")
            client.close()

    run(main())


def test_an_idle_connection_is_not_reused_after_its_time(run: Run) -> None:
    async def main() -> None:
        async with serving(Peer.answer_all) as server:
            client = HttpClient(server.url, idle_s=0.05)
            for _ in range(3):
                exchanges = [await client.request(b"GET", b"/", []) for _ in range(2)]
                for exchange in exchanges:
                    await read_all(exchange)
            assert len(server.peers) == 2
            await asyncio.sleep(0.08)
            await get(client)
            assert len(server.peers) == 3
            await until(lambda: all(peer.is_over for peer in server.peers[:2]))  # not the newest of the old ones only
            client.close()

    run(main())


def test_an_idle_connection_is_closed_after_its_time_though_nothing_is_sent(run: Run) -> None:
    async def main() -> None:
        async with serving(Peer.answer_all) as server:
            client = HttpClient(server.url, idle_s=0.05)
            exchanges = [await client.request(b"GET", b"/", []) for _ in range(3)]
            for exchange in exchanges:
                await read_all(exchange)
            await until(lambda: all(peer.is_over for peer in server.peers))
            before = len(server.peers)
            assert client.start(b"GET", b"/", b"") is None
            await get(client)
            assert len(server.peers) == before + 1
            client.close()

    run(main())


def test_the_server_closing_idle_connections_is_no_failure(run: Run) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            for number in range(1, 6):
                assert await get(client) == (200, b"hi")
                await asyncio.sleep(0.02)
                assert len(server.peers) == number

    run(main())


def closes_on_the_second_request(answers: Callable[[int], bytes], begin: bytes = b"") -> tuple[Play, list[bytes]]:
    """A script: the first request of a connection is answered, the second gets `begin` and the connection's end."""
    requests: list[bytes] = []

    async def play(peer: Peer) -> None:
        requests.append(await peer.request())
        await peer.send(answers(peer.number))
        requests.append(await peer.request())
        await peer.send(begin)

    return play, requests


def test_a_stale_connection_is_replaced_once(run: Run) -> None:
    play, requests = closes_on_the_second_request(lambda number: OK)

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            await get(client)
            body = b'{"a":1}'
            exchange = await client.request(b"POST", b"/b", [(b"content-length", b"%d" % len(body))], body)
            sent_ns = exchange.sent_ns
            assert await read_all(exchange) == b"hi"
            assert exchange.sent_ns > sent_ns  # what the latencies are counted from
            assert len(server.peers) == 2
            assert requests[1] == requests[2]
            assert requests[1].endswith(body)
            client.close()

    run(main())


def test_a_stale_connection_is_not_replaced_twice(run: Run) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        if peer.number == 1:
            await peer.send(OK)
            await peer.request()

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            await get(client)
            exchange = await client.request(b"GET", b"/", [])
            with pytest.raises(ConnectionLost):
                await exchange.wait_head()
            assert not exchange.has_head
            assert len(server.peers) == 2

    run(main())


def test_after_a_first_byte_nothing_is_sent_again(run: Run) -> None:
    play, requests = closes_on_the_second_request(lambda number: OK, begin=b"H")

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            await get(client)
            exchange = await client.request(b"GET", b"/", [])
            with pytest.raises(ConnectionLost):
                await exchange.wait_head()
            await asyncio.sleep(0.02)
            assert (len(server.peers), len(requests)) == (1, 2)

    run(main())


def test_a_connection_that_ends_long_after_the_request_is_not_stale(run: Run) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        await asyncio.sleep(STALE_NS / 1e9 + 0.1)

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            await get(client)
            exchange = await client.request(b"POST", b"/", [(b"content-length", b"0")])
            with pytest.raises(ConnectionLost):
                await exchange.wait_head()
            assert len(server.peers) == 1

    run(main())


def test_a_stale_connection_whose_server_has_gone(run: Run) -> None:
    async def main() -> None:
        closing = asyncio.Event()

        async def play(peer: Peer) -> None:
            await peer.request()
            await peer.send(OK)
            await peer.request()
            await closing.wait()

        async with serving(play) as server:
            client = HttpClient(server.url)
            await get(client)
            exchange = await client.request(b"GET", b"/", [])
            waiting = asyncio.ensure_future(exchange.wait_head())
            await asyncio.sleep(0.02)
            client.url = parse_base_url(f"http://127.0.0.1:{free_port()}")
            closing.set()
            with pytest.raises(ConnectFailed):
                await waiting

    run(main())


@needs_source
def test_an_abort_while_a_stale_connection_is_replaced(run: Run) -> None:
    requests: list[int] = []

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            requests.append(peer.number)
            if len(requests) == 2:
                return
            await peer.send(OK)

    class Gated(HttpClient):
        async def _connect(self) -> Any:
            connecting.set()
            await gate.wait()
            return await super()._connect()

    gate, connecting = asyncio.Event(), asyncio.Event()

    async def main() -> None:
        async with serving(play) as server:
            client = Gated(server.url)
            gate.set()
            await get(client)
            gate.clear()
            connecting.clear()
            exchange = await client.request(b"GET", b"/", [])
            waiting = asyncio.ensure_future(exchange.wait_head())
            await connecting.wait()
            exchange.abort()
            gate.set()
            with pytest.raises(ConnectionLost, match="aborted"):
                await waiting
            await asyncio.sleep(0.02)
            assert (len(server.peers), requests) == (1, [1, 1])

    run(main())


def test_a_server_that_takes_a_connection_and_drops_it(run: Run) -> None:
    async def play(peer: Peer) -> None:
        peer.writer.transport.abort()

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            for is_late in (False, True):
                exchange = await client.request(b"GET", b"/", [])
                if is_late:
                    await asyncio.sleep(0.02)
                with pytest.raises(ConnectionLost):
                    await exchange.wait_head()

    run(main())


@needs_source
def test_a_connection_lost_between_connecting_and_sending(run: Run) -> None:
    """The server's end has come and is known when the request is about to be written."""

    async def play(peer: Peer) -> None:
        peer.writer.close()

    class Late(HttpClient):
        async def _connect(self) -> Any:
            connection = await super()._connect()
            await until(lambda: connection.is_closed)
            return connection

    async def body() -> AsyncIterator[bytes]:
        yield b"a"

    async def main() -> None:
        async with serving(play) as server:
            exchange = await Late(server.url).request(b"GET", b"/", [])
            with pytest.raises(ConnectionLost):
                await exchange.wait()
            exchange = await Late(server.url).request(b"POST", b"/", [], body(), chunked=True)
            with pytest.raises(ConnectionLost):
                await exchange.wait()

    run(main())


def test_bytes_before_any_request_are_no_answer(run: Run) -> None:
    async def play(peer: Peer) -> None:
        await peer.send(OK)
        await peer.left()

    async def main() -> None:
        async with serving(play) as server:
            exchange = await HttpClient(server.url).request(b"GET", b"/", [])
            with contextlib.suppress(ConnectionLost):  # the bytes may come in time to be taken for an early answer
                await read_all(exchange)

    run(main())


# --- without a task: start and listener -----------------------------------------------------------------------------


class Looker:
    """What a listener sees at each call; and the future that it resolves at the end."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.seen: list[tuple[int, bytes]] = []
        """Status (0: no head yet) and the body bytes taken."""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        exchange.listener = self.look

    def look(self) -> None:
        exchange = self.exchange
        self.seen.append((exchange.status if exchange.has_head else 0, exchange.take()))
        if exchange.is_complete or exchange.error is not None:
            assert exchange.listener is None
            self.over.set_result(None)


async def warm(client: HttpClient) -> None:
    """Leave one idle connection."""
    assert await get(client) == (200, b"hi")


def test_for_bursts_requests_leave_at_once_and_connections_take_turns(run: Run) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = HttpClient(f"http://127.0.0.1:{listener.getsockname()[1]}", bursts=True)
            await client.warm(2)
            peers = [listener.accept()[0] for _ in range(2)]

            def sent_on(target: bytes) -> tuple[Exchange, socket.socket]:
                exchange = client.start(b"GET", target, b"")
                assert exchange is not None
                (peer,) = select.select(peers, [], [], 5.0)[0]  # the loop stands still meanwhile
                assert target in peer.recv(4096)
                return exchange, peer

            used = []
            for target in (b"/1", b"/2", b"/3", b"/4"):
                exchange, peer = sent_on(target)
                peer.sendall(OK)
                assert await read_all(exchange) == b"hi"
                used.append(peer)
            assert used[0] is used[2] is not used[1] is used[3]
            client.close()
            for peer in peers:
                peer.close()

    run(main())


def test_a_request_starts_on_an_idle_connection_only(run: Run) -> None:
    got: list[bytes] = []

    async def play(peer: Peer) -> None:
        while True:
            got.append(await peer.request())
            await peer.send(OK)

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url + "/p")
            lines = encode_lines([(b"X-A", b"1"), (b"content-length", b"2")])
            assert client.start(b"POST", b"/x?y", lines, b"ab") is None
            await warm(client)
            exchange = client.start(b"POST", b"/x?y", lines, b"ab")
            assert exchange is not None
            assert client.start(b"POST", b"/x?y", lines, b"ab") is None  # the one connection is taken
            looker = Looker(exchange)
            assert looker.seen == []
            await looker.over
            assert looker.seen == [(200, b"hi")]
            assert exchange.sent_ns <= exchange.first_byte_ns == exchange.received_ns
            await read_all(await client.request(b"POST", b"/x?y", lines, b"ab"))
            host = f"127.0.0.1:{server.port}".encode()
            assert got[1] == got[2] == b"POST /p/x?y HTTP/1.1\r\nhost: %b\r\n%b\r\nab" % (host, lines)
            assert len(server.peers) == 1
            client.close()

    run(main())


def test_a_listener_hears_of_all_that_comes(run: Run) -> None:
    steps = [
        # what is sent, what is seen then
        (b"HTTP/1.1 103 X\r\nlink: a\r\n\r\n", (0, b"")),
        (CHUNKED, (200, b"")),
        (b"2\r\nhi\r\n", (200, b"hi")),
        (b"2\r\n, \r\n2\r\nyo\r\n", (200, b", yo")),
        (b"0\r\nx-t: 1\r\n\r\n", (200, b"")),
    ]

    async def main() -> None:
        seen: list[tuple[int, bytes]] = []

        async def play(peer: Peer) -> None:
            await peer.request()
            await peer.send(OK)
            await peer.request()
            for number, (data, _) in enumerate(steps, 1):
                await peer.send(data)
                await until(lambda number=number: len(seen) == number)  # type: ignore[misc]
            await peer.left()

        async with serving(play) as server:
            client = HttpClient(server.url)
            await warm(client)
            exchange = client.start(b"GET", b"/", b"")
            assert exchange is not None
            looker = Looker(exchange)
            seen = looker.seen
            assert exchange.is_waiting
            await looker.over
            assert not exchange.is_waiting
            assert seen == [step[1] for step in steps]
            assert exchange.interim == [(103, [(b"link", b"a")])]
            assert exchange.trailers == [(b"x-t", b"1")]
            assert exchange.error is None
            client.close()

    run(main())


@pytest.mark.parametrize(("answer", "has_head", "body", "failure"), BROKEN)
def test_a_listener_hears_of_a_failure_once(
    run: Run, answer: bytes, has_head: bool, body: bytes, failure: type[Exception]
) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)

    async def main() -> None:
        async with serving(play) as server:
            exchange = await HttpClient(server.url).request(b"GET", b"/", b"")
            looker = Looker(exchange)
            await looker.over
            await asyncio.sleep(0.01)
            assert isinstance(exchange.error, failure)
            assert (exchange.has_head, b"".join(data for _, data in looker.seen)) == (has_head, body)
            assert len(server.peers) == 1

    run(main())


def test_an_abort_is_not_told_to_the_listener(run: Run) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.left()

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            await warm(client)
            exchange = client.start(b"GET", b"/", b"")
            assert exchange is not None
            looker = Looker(exchange)
            exchange.abort()
            await until(lambda: server.peers[0].is_over, ABORT_S)
            assert looker.seen == []
            assert exchange.listener is None
            assert isinstance(exchange.error, ConnectionLost)

    run(main())


def test_a_listener_may_abort_and_may_send_the_next_request(run: Run) -> None:
    async def main() -> None:
        async with serving(Peer.answer_all) as server:
            client = HttpClient(server.url)
            await warm(client)
            over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            left = 50

            def send() -> None:
                exchange = client.start(b"GET", b"/", b"")
                assert exchange is not None

                def look() -> None:
                    nonlocal left
                    assert exchange.is_complete
                    left -= 1
                    if left:
                        send()
                    else:
                        over.set_result(None)

                exchange.listener = look

            send()
            await over
            assert len(server.peers) == 1
            exchange = client.start(b"GET", b"/", b"")
            assert exchange is not None
            exchange.listener = exchange.abort  # without effect on what is complete
            while not exchange.is_complete:
                await asyncio.sleep(0.002)
            await warm(client)
            assert len(server.peers) == 1
            client.close()

    run(main())


def test_an_abort_by_the_listener_at_the_first_bytes(run: Run) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"2\r\nhi\r\n")
        await peer.left()

    async def main() -> None:
        async with serving(play) as server:
            exchange = await HttpClient(server.url).request(b"GET", b"/", b"")
            exchange.listener = exchange.abort
            await until(lambda: server.peers[0].is_over)
            assert exchange.take() == b"hi"
            assert isinstance(exchange.error, ConnectionLost)

    run(main())


def test_an_exchange_that_is_over_keeps_nobody_alive(run: Run) -> None:
    """A listener that holds its exchange is a cycle; it must not take the garbage collector to free it."""

    async def main() -> None:
        async with serving(Peer.answer_all) as server:
            client = HttpClient(server.url)
            await warm(client)
            gone: list[weakref.ref[Looker]] = []
            gc.disable()
            try:
                for answered in (True, False):
                    exchange = client.start(b"GET", b"/", b"")
                    assert exchange is not None
                    looker = Looker(exchange)
                    if answered:
                        await looker.over
                    else:
                        exchange.abort()
                    gone.append(weakref.ref(looker))
                    del looker, exchange
                assert [each() for each in gone] == [None, None]
            finally:
                gc.enable()
            client.close()

    run(main())


@pytest.mark.parametrize("size", [7, 20_000, 3_000_000])
def test_a_stale_connection_is_replaced_without_anybody_waiting(run: Run, size: int) -> None:
    body = b"x" * size
    play, requests = closes_on_the_second_request(lambda number: OK)

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            await warm(client)
            gc.freeze()  # what other tests have left would take it longer than a connection may be stale
            exchange = client.start(b"POST", b"/b", b"content-length: %d\r\n" % size, body)
            assert exchange is not None
            sent_ns = exchange.sent_ns
            looker = Looker(exchange)
            gc.collect()  # the task that sends again is nobody's but the client's
            gc.unfreeze()
            await looker.over
            assert looker.seen == [(200, b"hi")]
            assert exchange.sent_ns > sent_ns
            assert len(server.peers) == 2
            assert requests[1] == requests[2]
            assert requests[1].endswith(body)
            client.close()

    run(main())


@needs_source
@pytest.mark.parametrize("is_aborted", [False, True])
def test_a_stale_connection_without_a_server_to_replace_it(run: Run, is_aborted: bool) -> None:
    async def main() -> None:
        play, _ = closes_on_the_second_request(lambda number: OK)
        connecting, gate = asyncio.Event(), asyncio.Event()

        class Gated(HttpClient):
            async def _connect(self) -> Any:
                connecting.set()
                await gate.wait()
                return await super()._connect()

        async with serving(play) as server:
            client = Gated(server.url)
            gate.set()
            await warm(client)
            gate.clear()
            connecting.clear()
            client.url = parse_base_url(f"http://127.0.0.1:{free_port()}")
            exchange = client.start(b"GET", b"/", b"")
            assert exchange is not None
            looker = Looker(exchange)
            await connecting.wait()
            assert exchange.error is None
            assert looker.seen == []
            if is_aborted:
                exchange.abort()
            gate.set()
            await asyncio.sleep(0.02)
            assert isinstance(exchange.error, ConnectionLost if is_aborted else ConnectFailed)
            assert looker.seen == ([] if is_aborted else [(0, b"")])

    run(main())


def test_a_listener_that_does_not_take_slows_the_server(run: Run) -> None:
    total = 32 * 1024 * 1024
    piece = b"x" * 65536
    sent = 0

    async def play(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(b"HTTP/1.1 200 X\r\ncontent-length: %d\r\n\r\n" % total)
        while sent < total:
            await peer.send(piece)
            sent += len(piece)
        await peer.left()

    async def main() -> None:
        async with serving(play) as server:
            exchange = await HttpClient(server.url).request(b"GET", b"/", b"")
            calls = 0

            def count() -> None:
                nonlocal calls
                calls += 1

            exchange.listener = count
            await asyncio.sleep(0.2)
            before = (sent, calls)
            await asyncio.sleep(0.1)
            assert before == (sent, calls)
            assert sent < total
            assert not exchange.is_waiting  # what is slow is whoever should take
            size = 0
            while not exchange.is_complete:
                size += len(exchange.take())
                await asyncio.sleep(0)
            assert size + len(exchange.take()) == total

    run(main())


# --- connecting -----------------------------------------------------------------------------------------------------


def test_a_refused_connection(run: Run) -> None:
    async def main() -> None:
        port = free_port()
        with pytest.raises(ConnectFailed, match=rf"^http://127.0.0.1:{port}: .*[Cc]onnect"):
            await HttpClient(f"http://127.0.0.1:{port}").request(b"GET", b"/", [])

    run(main())


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 64 + ".invalid", "a..invalid"])
def test_a_host_that_does_not_resolve(run: Run, host: str) -> None:
    async def main() -> None:
        with pytest.raises(ConnectFailed, match=rf"^http://{host}: .+"):
            await HttpClient(f"http://{host}").request(b"GET", b"/", [])

    run(main())


def test_a_server_that_does_not_accept(run: Run) -> None:
    async def main() -> None:
        with deaf_address() as (*_, (_, port)):
            start_s = time.monotonic()
            with pytest.raises(ConnectFailed, match=r"no connection within 0\.2 s"):
                await HttpClient(f"http://127.0.0.1:{port}", connect_timeout_s=0.2).request(b"GET", b"/", [])
            assert 0.15 < time.monotonic() - start_s < 2

    run(main())


def test_an_ipv6_literal(run: Run) -> None:
    got: list[bytes] = []

    async def play(peer: Peer) -> None:
        got.append(await peer.request())
        await peer.send(OK)

    async def main() -> None:
        try:
            serving_v6 = serving(play, host="::1")
            async with serving_v6 as server:
                client = HttpClient(f"http://[::1]:{server.port}")
                assert await get(client) == (200, b"hi")
                assert f"\r\nhost: [::1]:{server.port}\r\n".encode() in got[0]
                client.close()
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")

    run(main())


def test_a_unix_socket(run: Run, tmp_path: Path) -> None:
    got: list[bytes] = []

    async def play(peer: Peer) -> None:
        while True:
            got.append(await peer.request())
            await peer.send(OK)

    async def main() -> None:
        folder = os.open(tmp_path, os.O_RDONLY)  # a temporary folder's own path may be too long for a socket
        path = f"/proc/self/fd/{folder}/a b.sock"
        url = "http+unix://" + path.replace("/", "%2F").replace(" ", "%20")
        with pytest.raises(ConnectFailed, match=r"^http\+unix://.*: No such file or directory$"):
            await HttpClient(url).request(b"GET", b"/", [])
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(path)
        async with serving(play, sock=listening, host=None, port=None) as server:
            client = HttpClient(url + "/v1")
            for _ in range(3):
                assert await get(client, b"/x") == (200, b"hi")
            assert len(server.peers) == 1
            assert got == [b"GET /v1/x HTTP/1.1\r\nhost: localhost\r\n\r\n"] * 3
            client.close()
        os.close(folder)

    run(main())


@contextlib.contextmanager
def deaf_address(family: socket.AddressFamily = socket.AF_INET) -> Iterator[Address]:
    """An address that neither takes nor refuses connections."""
    with socket.socket(family) as deaf, contextlib.ExitStack() as fillers:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(8):  # the queue of a socket that nobody accepts from
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        yield family, socket.SOCK_STREAM, 0, "", deaf.getsockname()


def name(found: list[Address]) -> list[tuple[str, int]]:
    """Have the running loop's name server say `found` of vllm.example; the questions that it is asked for it."""
    loop = asyncio.get_running_loop()
    real = loop.getaddrinfo
    asked: list[tuple[str, int]] = []

    async def getaddrinfo(host: str, port: int, **options: Any) -> Any:
        if host != "vllm.example":
            return await real(host, port, **options)  # uvloop's sock_connect asks for addresses, too
        asked.append((host, port))
        return found

    loop.getaddrinfo = getaddrinfo  # type: ignore[assignment, method-assign]
    return asked


def test_each_address_of_a_name_is_tried(run: Run) -> None:
    """First those that refuse, at once; then one that stays silent, for a while."""

    async def main() -> None:
        async with serving(Peer.answer_all) as server:
            refusing: Address = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", free_port()))
            serving_one: Address = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", server.port))
            with deaf_address() as deaf:
                for addresses, limit_s in (
                    ([refusing, refusing, serving_one], NEXT_ADDRESS_S),
                    ([deaf, serving_one], 2 * NEXT_ADDRESS_S),
                    ([deaf, refusing, refusing, serving_one], 2 * NEXT_ADDRESS_S),
                    ([serving_one, deaf], NEXT_ADDRESS_S),
                ):
                    asked = name(addresses)
                    client = HttpClient("http://vllm.example:8000")
                    start_s = time.monotonic()
                    exchange = await client.request(b"GET", b"/", [])
                    assert time.monotonic() - start_s < limit_s + 0.2
                    assert await read_all(exchange) == b"hi"
                    assert asked == [("vllm.example", 8000)]
                    client.close()
            assert len(server.peers) == 4

    run(main())


@needs_source
def test_no_address_of_a_name_answers(run: Run) -> None:
    async def main() -> None:
        addresses: list[Address] = [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", free_port())) for _ in range(3)
        ]

        name(addresses)
        with pytest.raises(ConnectFailed, match=r"^http://vllm\.example: Connection refused$"):
            await HttpClient("http://vllm.example").request(b"GET", b"/", [])
        with deaf_address() as deaf:
            addresses.append(deaf)
            with pytest.raises(ConnectFailed, match=r"no connection within 0\.4 s$"):
                await HttpClient("http://vllm.example", connect_timeout_s=0.4).request(b"GET", b"/", [])

    run(main())


def test_small_requests_are_sent_at_once(run: Run) -> None:
    """Nagle's algorithm is off: it would hold an upload's parts back for the server's acknowledgements."""

    async def main() -> None:
        async with serving(Peer.answer_all) as server:
            exchange = await HttpClient(server.url).request(b"GET", b"/", [])
            assert exchange._connection is not None
            sock = exchange._connection.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            exchange.abort()

    run(main())


# --- TLS ------------------------------------------------------------------------------------------------------------


class Certificates:
    """Made now, each self-signed, in a folder: NAME.pem and NAME.key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, subject in (("named", "DNS:localhost"), ("numbered", "IP:127.0.0.1"), ("client", "DNS:client")):
            command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                       "-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName={subject}",
                       "-keyout", f"{name}.key", "-out", f"{name}.pem"]  # fmt: skip
            subprocess.run(command, cwd=folder, check=True, capture_output=True)

    def file(self, name: str) -> Path:
        return self.folder / name

    def server(self, name: str = "named") -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file(f"{name}.pem"), self.file(f"{name}.key"))
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    try:
        return Certificates(tmp_path_factory.mktemp("tls"))
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")


def test_tls_is_verified(run: Run, certificates: Certificates) -> None:
    async def main() -> None:
        async with serving(Peer.answer_all, ssl=certificates.server()) as server:
            trusting = client_context(certificates.file("named.pem"))
            client = HttpClient(f"https://localhost:{server.port}", tls=trusting)
            for _ in range(3):
                assert await get(client) == (200, b"hi")
            assert len(server.peers) == 1
            big = await client.request(b"POST", b"/", [(b"content-length", b"2000000")], b"x" * 2_000_000)
            assert await read_all(big) == b"hi"
            aborted = await client.request(b"POST", b"/", [(b"content-length", b"9")], b"x")
            aborted.abort()
            await until(lambda: server.peers[0].is_over, ABORT_S)
            client.close()

            with pytest.raises(ConnectFailed, match=r"(?i)certificate verify failed"):  # of nobody that we know
                await get(HttpClient(f"https://localhost:{server.port}"))
            with pytest.raises(ConnectFailed, match=r"(?i)certificate verify failed"):  # for another name
                await get(HttpClient(f"https://127.0.0.1:{server.port}", tls=trusting))

    run(main())


def test_tls_by_address_and_by_name(run: Run, certificates: Certificates) -> None:
    """A certificate may be for an address; and the server is told which name was meant."""
    names: list[str | None] = []

    async def main() -> None:
        context = certificates.server("numbered")
        context.sni_callback = lambda _, name, __: names.append(name)
        async with serving(Peer.answer_all, ssl=context) as server:
            trusting = client_context(certificates.file("numbered.pem"))
            client = HttpClient(f"https://127.0.0.1:{server.port}", tls=trusting)
            assert await get(client) == (200, b"hi")
            client.close()
            with pytest.raises(ConnectFailed, match=r"(?i)certificate verify failed"):
                await get(HttpClient(f"https://localhost:{server.port}", tls=trusting))
            assert names == [None, "localhost"]

    run(main())


def test_a_server_that_asks_for_a_certificate(run: Run, certificates: Certificates) -> None:
    async def main() -> None:
        context = certificates.server()
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(certificates.file("client.pem"))
        ca = certificates.file("named.pem")
        async with serving(Peer.answer_all, ssl=context) as server:
            url = f"https://localhost:{server.port}"
            shown = client_context(ca, certificates.file("client.pem"), certificates.file("client.key"))
            client = HttpClient(url, tls=shown)
            assert await get(client) == (200, b"hi")
            client.close()
            with pytest.raises((ConnectFailed, ConnectionLost)):  # TLS 1.3: told after the handshake
                await get(HttpClient(url, tls=client_context(ca)))

    run(main())


CONTEXTS = [
    # CA file, certificate, key, what is said of it
    ("gone", None, None, r"^CA file '.*gone': expected PEM certificates \(No such file or directory\)$"),
    ("text", None, None, r"^CA file '.*text': expected PEM certificates \(.+\)$"),
    (None, None, "client.key", r"^key file '.*client\.key': expected a certificate file beside it$"),
    (None, "gone", None, r"^certificate file '.*gone': No such file or directory$"),
    (None, "client.pem", "gone", r"^key file '.*gone': No such file or directory$"),
    (None, "client.pem", None, r"^certificate file '.*client\.pem': expected a PEM certificate and its key \(.+\)$"),
    (None, "client.pem", "named.key", r"^certificate file '.*' with key '.*named\.key': .* \(key values mismatch\)$"),
    (None, "text", "client.key", r"^certificate file '.*text' with key '.*': expected a PEM certificate and its key"),
    (None, "client.pem", "locked.key", r"^certificate file '.*' with key '.*': .* \(the key has a password\)$"),
]


@pytest.mark.parametrize(("ca", "cert", "key", "rule"), CONTEXTS)
def test_wrong_tls_files_are_named(
    certificates: Certificates, ca: str | None, cert: str | None, key: str | None, rule: str
) -> None:
    certificates.file("text").write_text("no PEM\n")
    subprocess.run(
        ["openssl", "ec", "-in", "client.key", "-aes128", "-passout", "pass:secret", "-out", "locked.key"],
        cwd=certificates.folder,
        check=True,
        capture_output=True,
    )
    with pytest.raises(ValueError, match=rule) as info:
        client_context(*[None if name is None else certificates.file(name) for name in (ca, cert, key)])
    assert "\n" not in str(info.value)


def test_a_context_always_verifies(certificates: Certificates) -> None:
    for context in (client_context(), client_context(certificates.file("named.pem"))):
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname
    assert client_context().cert_store_stats()["x509_ca"] > 1  # the system's
    assert client_context(certificates.file("named.pem")).cert_store_stats()["x509"] == 1  # and no other


UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\nhi"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_body_until_close_is_whole_only_with_close_notify(
    run: Run, certificates: Certificates, version: ssl.TLSVersion, is_whole: bool
) -> None:
    """Anybody on the way can end a TCP connection; only the server can end the TLS in it."""
    context = certificates.server()
    context.maximum_version = version

    def serve(listening: socket.socket) -> None:
        taken, _ = listening.accept()
        with context.wrap_socket(taken, server_side=True) as secured:
            secured.recv(65536)
            secured.sendall(UNTIL_CLOSE)
            if is_whole:
                with contextlib.suppress(OSError):  # the client need not answer in kind
                    secured.unwrap()
            else:
                secured.shutdown(socket.SHUT_WR)  # of TCP
                secured.recv(1)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            serving_one = asyncio.get_running_loop().run_in_executor(None, serve, listening)
            url = f"https://localhost:{listening.getsockname()[1]}"
            exchange = await HttpClient(url, tls=client_context(certificates.file("named.pem"))).request(
                b"GET", b"/", []
            )
            body: list[bytes] = []
            with contextlib.nullcontext() if is_whole else pytest.raises(ConnectionLost):
                await read_into(body, exchange)
            assert (b"".join(body), exchange.is_complete) == (b"hi", is_whole)
            await serving_one

    run(main())


def test_a_body_until_close_is_not_whole_after_a_reset(run: Run) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(UNTIL_CLOSE)
        await asyncio.sleep(0.02)
        sock = peer.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.writer.transport.abort()

    async def main() -> None:
        async with serving(play) as server:
            exchange = await HttpClient(server.url).request(b"GET", b"/", [])
            body: list[bytes] = []
            with pytest.raises(ConnectionLost, match="reset"):
                await read_into(body, exchange)
            assert b"".join(body) == b"hi"

    run(main())


def test_tls_to_a_server_without(run: Run) -> None:
    async def play(peer: Peer) -> None:
        await peer.reader.read(1)
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async def main() -> None:
        async with serving(play) as server:
            with pytest.raises(ConnectFailed, match=r"^https://127.0.0.1:\d+: .+"):
                await get(HttpClient(f"https://127.0.0.1:{server.port}"))

    run(main())


# --- aborts ---------------------------------------------------------------------------------------------------------

PHASES = [
    ("before the head", b""),
    ("within the head", b"HTTP/1.1 200 OK\r\nconte"),
    ("after an interim answer", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ("after the head", CHUNKED),
    ("within the body", CHUNKED + b"2\r\nhi\r\n"),
    ("behind on reading", CHUNKED + b"100000\r\n" + b"x" * 0x100000 + b"\r\n"),
]


@pytest.mark.parametrize("by", ["abort", "abort while waiting", "cancel"])
@pytest.mark.parametrize("begin", [row[1] for row in PHASES], ids=[row[0] for row in PHASES])
def test_an_abort_reaches_the_server_at_once(run: Run, begin: bytes, by: str) -> None:
    gone_s: list[float] = []

    async def play(peer: Peer) -> None:
        await peer.request()
        peer.writer.write(begin)
        await peer.left()
        gone_s.append(time.monotonic())

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            exchange = await client.request(b"GET", b"/", [])

            async def read() -> None:
                try:
                    while "xx" not in (exchange.take()[-2:]).decode():
                        await exchange.wait()
                    await asyncio.sleep(LIMIT_S)
                finally:
                    exchange.abort()

            reading = asyncio.ensure_future(read()) if by != "abort" else None
            await asyncio.sleep(0.03)
            start_s = time.monotonic()
            if by == "cancel" and reading is not None:
                reading.cancel()
            else:
                exchange.abort()
            await until(lambda: bool(gone_s))
            assert gone_s[0] - start_s < ABORT_S
            if reading is not None:
                reading.cancel()
                with contextlib.suppress(ConnectionLost, asyncio.CancelledError):
                    await reading
            while exchange.take():
                pass
            with pytest.raises(ConnectionLost, match="aborted"):
                await exchange.wait()
            assert not exchange.is_complete

    run(main())


def test_whoever_waits_hears_of_an_abort(run: Run) -> None:
    async def play(peer: Peer) -> None:
        await peer.left()

    async def main() -> None:
        async with serving(play) as server:
            exchange = await HttpClient(server.url).request(b"GET", b"/", [])
            assert not exchange.is_waiting
            waiting = asyncio.ensure_future(exchange.wait_head())
            await asyncio.sleep(0.01)
            assert exchange.is_waiting
            exchange.abort()
            exchange.abort()
            with pytest.raises(ConnectionLost, match="aborted"):
                await waiting
            assert not exchange.is_waiting

    run(main())


# --- bodies that are sent as they come ------------------------------------------------------------------------------


async def parts(*given: bytes) -> AsyncIterator[bytes]:
    for part in given:
        yield part


def test_a_body_is_sent_as_it_comes(run: Run) -> None:
    got: list[bytes] = []

    async def play(peer: Peer) -> None:
        for _ in range(3):
            got.append((await peer.request()).partition(b"\r\n\r\n")[2])
            await peer.send(OK)
        await peer.left()

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            # An iterator can not be sent again, so its request takes no reused connection, but leaves one.
            first = await client.request(b"POST", b"/", [(b"content-length", b"4")], parts(b"ab", b"", b"cd"))
            assert first.upload_done
            assert await read_all(first) == b"hi"
            second = await client.request(b"POST", b"/", [], parts(b"ab", b"", b"x" * 17), chunked=True)
            assert await read_all(second) == b"hi"
            third = await client.request(b"POST", b"/", [], parts(), chunked=True)
            assert await read_all(third) == b"hi"
            assert got == [b"abcd", b"2\r\nab\r\n11\r\n" + b"x" * 17 + b"\r\n0\r\n\r\n", b"0\r\n\r\n"]
            assert len(server.peers) == 3
            assert await get(client) == (200, b"hi")
            assert len(server.peers) == 3
            client.close()

    run(main())


def test_trailers_follow_a_chunked_body(run: Run) -> None:
    got: list[bytes] = []

    async def play(peer: Peer) -> None:
        got.append(await peer.reader.readuntil(b"\r\nx-sum: 4\r\n\r\n"))
        await peer.send(OK)
        await peer.left()

    async def main() -> None:
        size = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            for part in (b"ab", b"cd"):
                size += len(part)
                yield part

        async with serving(play) as server:
            client = HttpClient(server.url)
            exchange = await client.request(
                b"POST", b"/", [], counted(), chunked=True, trailers=lambda: [(b"x-sum", b"%d" % size)]
            )
            assert await read_all(exchange) == b"hi"
            assert got[0].endswith(b"\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n2\r\ncd\r\n0\r\nx-sum: 4\r\n\r\n")
            client.close()

    run(main())


REFUSAL = b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno"


@pytest.mark.parametrize("as_it_comes", [True, False])
def test_an_early_answer_ends_the_upload(run: Run, as_it_comes: bool) -> None:
    """Also where the server reads nothing more, so that there is no room to write."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    async def main() -> None:
        has_head, answered = asyncio.Event(), asyncio.Event()
        body = b"x" * 64 * 1024 * 1024

        async def play(peer: Peer) -> None:
            await peer.reader.readuntil(b"\r\n\r\n")
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(0.05)
            await peer.send(REFUSAL[:-1])
            await has_head.wait()
            await peer.send(REFUSAL[-1:])
            await answered.wait()
            peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert await peer.left() < len(body) / 2

        async with serving(play) as server:
            client = HttpClient(server.url)
            if as_it_comes:
                exchange = await client.request(b"POST", b"/", [], endless(), chunked=True)
                assert not exchange.upload_done
            else:
                exchange = await client.request(b"POST", b"/", [(b"content-length", b"%d" % len(body))], body)
            await exchange.wait_head()
            assert exchange.status == 413
            has_head.set()
            assert await read_all(exchange) == b"no"
            answered.set()
            await until(lambda: server.peers[0].is_over)  # a connection with half a request on it is not kept

    run(main())


def test_an_upload_whose_source_fails_or_is_cancelled_ends_the_connection(run: Run) -> None:
    gone: list[int] = []

    async def play(peer: Peer) -> None:
        await peer.left()
        gone.append(peer.number)

    async def failing() -> AsyncIterator[bytes]:
        yield b"ab"
        raise RuntimeError("the client left")

    async def stuck() -> AsyncIterator[bytes]:
        yield b"ab"
        await asyncio.sleep(LIMIT_S)

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            with pytest.raises(RuntimeError, match="the client left"):
                await client.request(b"POST", b"/", [], failing(), chunked=True)
            await until(lambda: gone == [1], ABORT_S)
            sending = asyncio.ensure_future(client.request(b"POST", b"/", [], stuck(), chunked=True))
            await asyncio.sleep(0.02)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            await until(lambda: gone == [1, 2], ABORT_S)

    run(main())


def test_an_upload_to_a_server_that_leaves(run: Run) -> None:
    async def play(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.writer.transport.abort()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536
            await asyncio.sleep(0)

    async def main() -> None:
        async with serving(play) as server:
            exchange = await HttpClient(server.url).request(b"POST", b"/", [], endless(), chunked=True)
            with pytest.raises(ConnectionLost):
                await exchange.wait()

    run(main())


def test_a_slow_server_slows_the_upload(run: Run) -> None:
    sent = 0

    async def play(peer: Peer) -> None:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await peer.writer.wait_closed()

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 65536
            yield b"x" * 65536

    async def main() -> None:
        async with serving(play, limit=1) as server:
            sending = asyncio.ensure_future(HttpClient(server.url).request(b"POST", b"/", [], endless(), chunked=True))
            await asyncio.sleep(0.1)
            before = sent
            await asyncio.sleep(0.1)
            assert sent == before < 64 * 1024 * 1024
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            server.peers[0].writer.transport.abort()

    run(main())


# --- reading ahead --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["length", "chunked", "until close"])
def test_a_slow_reader_slows_the_server(run: Run, framing: str) -> None:
    total = 64 * 1024 * 1024
    piece = b"x" * 65536
    heads = {
        "length": b"HTTP/1.1 200 X\r\ncontent-length: %d\r\n\r\n" % total,
        "chunked": CHUNKED,
        "until close": b"HTTP/1.1 200 X\r\n\r\n",
    }
    sent = 0

    async def play(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(heads[framing])
        while sent < total:
            await peer.send(b"10000\r\n" + piece + b"\r\n" if framing == "chunked" else piece)
            sent += len(piece)
        if framing == "chunked":
            await peer.send(b"0\r\n\r\n")
        if framing != "until close":
            await peer.left()

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            exchange = await client.request(b"GET", b"/", [])
            await asyncio.sleep(0.3)
            before = sent
            await asyncio.sleep(0.1)
            assert sent == before < total  # the kernel's buffers are full, ours hold no more
            first = exchange.take()
            assert READ_AHEAD_BYTES < len(first) < 4 * READ_AHEAD_BYTES
            size = len(first)
            while not exchange.is_complete:
                await exchange.wait()
                size += len(exchange.take())
            assert size + len(exchange.take()) == total
            client.close()

    run(main())


def test_framing_alone_does_not_stop_the_reading(run: Run) -> None:
    """Trailers are read past the read-ahead, though there is nothing to take."""

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"%x\r\n%b\r\n" % (READ_AHEAD_BYTES, b"x" * READ_AHEAD_BYTES))
        await asyncio.sleep(0.02)
        await peer.send(b"0\r\n")
        for _ in range(40):
            await peer.send(b"x: " + b"y" * 4091 + b"\r\n")
        await peer.send(b"\r\n")
        await peer.left()

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            exchange = await client.request(b"GET", b"/", [])
            assert len(await read_all(exchange)) == READ_AHEAD_BYTES
            assert exchange.trailers == [(b"x", b"y" * 4091)] * 40
            client.close()

    run(main())


def test_many_at_once_each_get_their_own_answer(run: Run) -> None:
    async def play(peer: Peer) -> None:
        while True:
            target = (await peer.request()).split(b" ")[1]
            await asyncio.sleep(0.001 * (peer.number % 7))
            await peer.send(CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(target), target))

    async def main() -> None:
        async with serving(play) as server:
            client = HttpClient(server.url)
            for turn in range(3):
                targets = [b"/%d/%d" % (turn, number) for number in range(100)]
                assert await asyncio.gather(*[get(client, t) for t in targets]) == [(200, t) for t in targets]
            assert len(server.peers) <= 110
            client.close()

    run(main())


# --- URLs -----------------------------------------------------------------------------------------------------------

URLS = [
    # text, shown as, TLS, host, port, prefix, Host header
    ("http://h", "http://h", False, "h", 80, b"", b"h"),
    ("http://h:80", "http://h:80", False, "h", 80, b"", b"h"),
    ("http://h:8000/", "http://h:8000", False, "h", 8000, b"", b"h:8000"),
    ("https://h", "https://h", True, "h", 443, b"", b"h"),
    ("https://h:80", "https://h:80", True, "h", 80, b"", b"h:80"),
    ("HTTP://Host.Example", "HTTP://Host.Example", False, "host.example", 80, b"", b"host.example"),
    ("http://h/v1/x//", "http://h/v1/x", False, "h", 80, b"/v1/x", b"h"),
    ("http://h/%20a", "http://h/%20a", False, "h", 80, b"/%20a", b"h"),
    ("http://127.0.0.1:1", "http://127.0.0.1:1", False, "127.0.0.1", 1, b"", b"127.0.0.1:1"),
    ("http://[::1]", "http://[::1]", False, "::1", 80, b"", b"[::1]"),
    ("https://[FE80::1]:8000/p", "https://[FE80::1]:8000/p", True, "fe80::1", 8000, b"/p", b"[fe80::1]:8000"),
    ("http://h:", "http://h:", False, "h", 80, b"", b"h"),
]

SOCKETS = [
    # text, shown as, path, prefix
    ("http+unix://%2Frun%2Fvllm.sock", "http+unix://%2Frun%2Fvllm.sock", b"/run/vllm.sock", b""),
    ("http+unix://%2frun%2FA%20b%C3%A9.sock/v1/", "http+unix://%2frun%2FA%20b%C3%A9.sock/v1", b"/run/A b\xc3\xa9.sock",
     b"/v1"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "shown", "is_tls", "host", "port", "prefix", "authority"), URLS)
def test_a_base_url(text: str, shown: str, is_tls: bool, host: str, port: int, prefix: bytes, authority: bytes) -> None:
    assert parse_base_url(text) == BaseUrl(shown, is_tls, host, port, prefix, authority)


@pytest.mark.parametrize(("text", "shown", "path", "prefix"), SOCKETS)
def test_a_base_url_of_a_unix_socket(text: str, shown: str, path: bytes, prefix: bytes) -> None:
    assert parse_base_url(text) == BaseUrl(shown, False, "localhost", 0, prefix, b"localhost", path)


BAD_SOCKETS = [
    "http+unix://", "http+unix:///run/vllm.sock", "http+unix://run%2Fvllm.sock", "http+unix://%2F", "http+unix://%2Frun:80",
    "http+unix://%2Frun%2", "http+unix://%2Frun%zz", "http+unix://%2Frun%00", "http+unix://%2Frun?a", "http+unix://%2Frun#a",
    "http+unix://%2F" + "x" * 107, "http+unix://%2Frün", "http+unix://%2Frun /x",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_SOCKETS)
def test_a_wrong_url_of_a_unix_socket_is_refused_with_the_rule(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^upstream URL .*: expected http\+unix://%2FPATH%2FTO\.sock\[/PREFIX\], a.* path "
    ) as info:
        parse_base_url(text)
    assert repr(text) in str(info.value)


BAD_URLS = [
    "", "h", "h:8000", "//h", "ftp://h", "unix:///run/x", "http://", "http:///x", "http://:80", "http://h:x", "http://h:0",
    "http://h:65536", "http://h:-1", "http://h?a=b", "http://h/?", "http://h/#a", "http://[::1", "http://::1:80x",
    " http://h", "http://h ", "http://h/a b", "http://h/a\nb", "http://h/é", "http://bücher.example", "http://h\t",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_URLS)
def test_a_wrong_base_url_is_refused_with_the_rule(text: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"^upstream URL .*: expected http://HOST\[:PORT\]\[/PREFIX\], https://\.\.\. or http\+unix://\.\.\.",
    ) as info:
        parse_base_url(text)
    assert repr(text) in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("text", ["http://me:secret@h", "http://:secret@h:80/x", "http://secret@h"])
def test_a_base_url_with_a_password_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(ValueError, match="expected http://HOST") as info:
        parse_base_url(text)
    assert "secret" not in str(info.value)
