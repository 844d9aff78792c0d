"""Who leaves when: the client at every moment of a request, and the upstream at every moment of an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.e2e.conformance.upstream import Gone, Request, Talk
from tests.e2e.conformance.world import (
    CHAT,
    CLOSE_S,
    JSON,
    STREAM_HEAD,
    World,
    case,
    chunk,
    completion,
    event,
    normal_service,
    response,
    until,
)

Record = Callable[[str, object], None]
POLITELY = pytest.mark.parametrize("politely", [True, False], ids=["fin", "rst"])


async def closed(request: Request, left_s: float, record_property: Record) -> None:
    """Wait until the upstream's connection is closed; the time goes into the report."""
    await until(
        lambda: request.closed_s is not None, "the upstream's connection is closed after its client left", CLOSE_S
    )
    assert request.closed_s is not None
    record_property("abort_ms", round((request.closed_s - left_s) * 1000, 1))


async def silent(talk: Talk) -> None:
    """Take the request and never answer."""
    await talk.read_body()
    await talk.connection.wait_closed()


async def endless(talk: Talk) -> None:
    """An event every 20 ms."""
    await talk.read_body()
    await talk.send(STREAM_HEAD)
    while True:
        await talk.send(chunk(event("more")))
        await asyncio.sleep(0.02)


async def half_an_answer(talk: Talk) -> None:
    """A plain answer of which the second half never comes."""
    await talk.read_body()
    body = completion("half")
    await talk.send(response(body)[: -len(body) // 2])
    await talk.connection.wait_closed()


@POLITELY
@case
async def test_client_leaves_before_its_body(world: World, politely: bool, record_property: Record) -> None:
    """A client that leaves with its body unsent: no upstream request, or one that is closed again."""
    one = world.case(silent)
    async with await world.connect() as client:
        await client.send(one.head(JSON, b"content-length: 1000") + b"\r\n" + b'{"messages":')
        await asyncio.sleep(0.1)
        client.leave(politely=politely)
        left_s = time.monotonic()
        await asyncio.sleep(0.2)
        for request in one.seen:
            await closed(request, left_s, record_property)
    await normal_service(world, 1)


@POLITELY
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@case
async def test_client_leaves_before_the_first_byte(
    world: World, politely: bool, stream: bool, record_property: Record
) -> None:
    """A client that leaves while the upstream works: the upstream request is aborted."""
    one = world.case(silent)
    async with await world.connect() as client:
        await client.send(one.request(body=one.body(stream=stream)))
        request = await one.arrival()
        client.leave(politely=politely)
        await closed(request, time.monotonic(), record_property)
    assert len(one.seen) == 1, f"the upstream was asked {len(one.seen)} times"


@POLITELY
@case
async def test_client_leaves_mid_stream(world: World, politely: bool, record_property: Record) -> None:
    """A client that leaves in the middle of a stream: the upstream request is aborted."""
    one = world.case(endless)
    async with await world.connect() as client:
        await client.send(one.request(body=one.body(stream=True)))
        await client.wait_for(b"more")
        await client.wait_for(b"more")
        client.leave(politely=politely)
        await closed(one.seen[0], time.monotonic(), record_property)


@case
async def test_client_leaves_while_a_stream_is_silent(world: World, record_property: Record) -> None:
    """The same while the upstream sends nothing: the next event is not waited for."""

    async def script(talk: Talk) -> None:
        await talk.read_body()
        await talk.send(STREAM_HEAD, chunk(event("only")))
        await talk.connection.wait_closed()

    one = world.case(script)
    async with await world.connect() as client:
        await client.send(one.request(body=one.body(stream=True)))
        await client.wait_for(b"only")
        client.leave(politely=True)
        await closed(one.seen[0], time.monotonic(), record_property)


@POLITELY
@case
async def test_client_leaves_mid_answer(world: World, politely: bool, record_property: Record) -> None:
    """A client that leaves in the middle of a plain answer: the upstream request is aborted."""
    one = world.case(half_an_answer)
    async with await world.connect() as client:
        await client.send(one.request())
        request = await one.arrival()
        await asyncio.sleep(0.1)
        client.leave(politely=politely)
        await closed(request, time.monotonic(), record_property)


@POLITELY
@case
async def test_client_leaves_while_it_uploads(world: World, politely: bool, record_property: Record) -> None:
    """A client that leaves in the middle of a long upload: no upstream request, or one that is closed again."""
    one = world.case(silent)
    async with await world.connect() as client:
        lines = (b"content-type: multipart/form-data; boundary=b", b"content-length: %d" % (8 * 1024**2))
        await client.send(one.head(*lines, path=b"/v1/audio/transcriptions") + b"\r\n" + bytes(3 * 1024**2))
        await asyncio.sleep(0.2)
        client.leave(politely=politely)
        left_s = time.monotonic()
        await asyncio.sleep(0.2)
        for request in one.seen:
            await closed(request, left_s, record_property)
            assert not request.is_whole, "half an upload reached the upstream as a whole one"


@case
async def test_many_clients_leave(world: World, record_property: Record) -> None:
    """Thirty-two streams whose clients leave at once: every upstream request is aborted."""
    one = world.case(endless)
    clients = [await world.connect() for _ in range(32)]
    for client in clients:
        await client.send(one.request(body=one.body(stream=True)))
    await until(lambda: len(one.seen) == 32, "32 streams reach the upstream")
    for client in clients:
        await client.wait_for(b"more")
        client.leave(politely=False)
    left_s = time.monotonic()
    await until(lambda: all(request.closed_s for request in one.seen), "all 32 are closed", CLOSE_S)
    record_property("abort_ms", round((max(request.closed_s or 0.0 for request in one.seen) - left_s) * 1000, 1))
    await normal_service(world, 1)


# The upstream -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Death:
    """An upstream that ends its connection."""

    name: str
    must_hold: str
    pieces: tuple[bytes, ...]
    politely: bool = True
    stream: bool = False
    begun: bool = True
    """The answer has begun: it can only be cut. Before that it must be an error that a client can read."""


CHAT_BODY = completion("some words")
CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
DEATHS = [
    Death("before the head", "502 or 503", (), begun=False),
    Death("before the head, rst", "502 or 503", (), politely=False, begun=False),
    Death("before a stream's head", "502 or 503", (), stream=True, begun=False),
    Death("in the head", "502 or 503", (b"HTTP/1.1 200 OK\r\ncontent-ty",), begun=False),
    Death("no http", "502 or 503 for an answer that is no HTTP", (b"SSH-2.0-OpenSSH_9.2\r\n\r\n",), begun=False),
    Death("in a body with a length", "the client sees it cut", (response(CHAT_BODY)[:-9],)),
    Death("in a body with a length, rst", "the client sees it cut", (response(CHAT_BODY)[:-9],), politely=False),
    Death("in a chunk", "the client sees it cut", (CHUNKED_HEAD, b"ff\r\n" + CHAT_BODY[:100])),
    Death("between chunks", "the client sees it cut", (CHUNKED_HEAD, chunk(CHAT_BODY[:100]))),
    Death("before the last chunk", "the client sees it cut, though all data came", (CHUNKED_HEAD, chunk(CHAT_BODY))),
    Death("in a stream", "the client sees it cut", (STREAM_HEAD, chunk(event("a"))), stream=True),
    Death("in a stream, rst", "the client sees it cut", (STREAM_HEAD, chunk(event("a"))), politely=False, stream=True),
    Death("in an event", "the client sees it cut", (STREAM_HEAD, chunk(event("a")[:20])), stream=True),
    Death(
        "bad chunk",
        "the client sees it cut at a size that is none",
        (STREAM_HEAD, chunk(event("a")), b"zz\r\n"),
        stream=True,
    ),
]


@pytest.mark.parametrize("row", DEATHS, ids=lambda row: row.name)
@case
async def test_upstream_dies(world: World, row: Death) -> None:
    async def script(talk: Talk) -> None:
        await talk.read_body()
        await talk.send(*row.pieces)
        if row.begun:
            await asyncio.sleep(0.1)  # a RST takes what has not been read with it
        if row.politely:
            talk.close()
        else:
            talk.reset()

    one = world.case(script)
    answer = await one.ask(one.request(body=one.body(stream=row.stream)))
    if row.begun:
        assert not (answer.status == 200 and answer.is_whole), f"a silently complete {answer}"
        assert answer.status in (0, 200) or answer.status >= 500, f"{answer}"
    else:
        assert answer.status in (502, 503), f"{answer}"
        assert answer.is_whole, f"{answer}"
    await normal_service(world, 1)


@case
async def test_upstream_refuses(world: World) -> None:
    """An upstream that refuses connections: 502 or 503, and service as soon as it is back."""
    async with world.without_upstream():
        start_s = time.monotonic()
        answer = await world.case().ask()
        assert answer.status in (502, 503), f"{answer}"
        assert answer.is_whole, f"{answer}"
        assert time.monotonic() - start_s < CLOSE_S * 2, f"{time.monotonic() - start_s:.1f} s to refuse"


@case
async def test_idle_connection_that_died(world: World) -> None:
    """An upstream that closes an idle connection before the next request: the client does not notice."""
    assert (await world.case().ask()).status == 200
    await world.upstream.hang_up()
    answer = await world.case().ask()
    assert answer.status == 200, f"{answer}"


@case
async def test_idle_connection_that_dies_with_the_request(world: World) -> None:
    """A kept connection that ends when the next request comes, unanswered: sent once more on a fresh one."""
    assert (await world.case().ask()).status == 200
    closed_one = False

    async def script(talk: Talk) -> None:
        nonlocal closed_one
        await talk.read_body()
        if talk.request.is_reused and not closed_one:
            closed_one = True
            talk.close()
            raise Gone
        await talk.send(response(CHAT_BODY))

    one = world.case(script)
    answer = await one.ask()
    assert answer.status == 200, f"{answer} ({'on' if closed_one else 'not on'} a kept connection)"
    assert len(one.seen) <= 2, f"the upstream was asked {len(one.seen)} times"


@case
async def test_early_answer(world: World) -> None:
    """An upstream that answers before it has read the body, and closes: the client gets that answer."""
    body = b'{"error": "too large"}'

    async def script(talk: Talk) -> None:
        await talk.send(response(body, b"connection: close", status=b"413 Content Too Large"))
        await talk.read_body()
        talk.close()

    one = world.case(script)
    form = bytes(3 * 1024**2)
    data = one.request(
        body=form, path=b"/v1/audio/transcriptions", content_type=b"content-type: multipart/form-data; boundary=b"
    )
    answer = await one.ask(data)
    assert answer.status == 413, f"{answer}"
    assert answer.body == body


@case
async def test_stop_is_no_end(world: World) -> None:
    """Half an answer, then silence, then the rest: the client waits and gets all of it."""

    async def script(talk: Talk) -> None:
        await talk.read_body()
        data = response(CHAT_BODY)
        await talk.send(data[:-9])
        await asyncio.sleep(1.5)
        await talk.send(data[-9:])

    one = world.case(script)
    answer = await one.ask(one.request(path=CHAT))
    assert answer.status == 200, f"{answer}"
    assert answer.body == CHAT_BODY, f"{answer}"
