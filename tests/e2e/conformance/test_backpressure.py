"""Backpressure: who reads slowly holds the sender back, and nobody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from tests.e2e.conformance.upstream import Gone, Talk
from tests.e2e.conformance.world import CLOSE_S, STREAM_HEAD, World, case, chunk, event, response

Record = Callable[[str, object], None]
MIB = 1024 * 1024
TOTAL_BYTES = 64 * MIB
BOUND_BYTES = 32 * MIB
"""Of one connection: the kernel's own buffers on both sides of the gateway take up to 10 MiB on loopback."""
RECEIVE_BYTES = 64 * 1024


async def stalled(count: Callable[[], int]) -> int:
    """The count, once it has not grown for half a second. Raises AssertionError when it never stops."""
    deadline_s = time.monotonic() + 15.0
    before = -1
    while (now := count()) != before:
        assert time.monotonic() < deadline_s, f"still growing at {now / MIB:.0f} MiB"
        before = now
        await asyncio.sleep(0.5)
    return now


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@case
async def test_slow_reader(world: World, stream: bool, record_property: Record) -> None:
    """A client that does not read: the upstream can not send all of a 64 MiB answer, and others are served."""
    block = event("long " * 13_000)
    sent_bytes = 0

    async def script(talk: Talk) -> None:
        nonlocal sent_bytes
        await talk.read_body()
        if stream:
            await talk.send(STREAM_HEAD)
        else:
            await talk.send(response(b"")[:-5].replace(b"length: 0", b"") + b"length: %d\r\n\r\n" % TOTAL_BYTES)
        while sent_bytes < TOTAL_BYTES:
            data = chunk(block) if stream else b" " * MIB
            await talk.send(data)
            sent_bytes += len(data)
        raise Gone

    one = world.case(script)
    async with await world.connect(receive_bytes=RECEIVE_BYTES) as client:
        await client.send(one.request(body=one.body(stream=stream)))
        await one.arrival()
        held_bytes = await stalled(lambda: sent_bytes)
        record_property("buffered_mib", round(held_bytes / MIB, 1))
        start_s = time.monotonic()
        other = await world.case().ask()
        record_property("other_ms", round((time.monotonic() - start_s) * 1000, 1))
        assert other.status == 200, f"another client meanwhile: {other}"
        assert time.monotonic() - start_s < CLOSE_S, f"another client waited {time.monotonic() - start_s:.1f} s"
        assert held_bytes < BOUND_BYTES, f"the upstream got rid of {held_bytes / MIB:.0f} MiB that nobody read"
        client.leave(politely=False)
    request = one.seen[0]
    deadline_s = time.monotonic() + CLOSE_S
    while request.closed_s is None:
        assert time.monotonic() < deadline_s, "the upstream request goes on after the slow reader left"
        await asyncio.sleep(0.01)


@case
async def test_slow_reader_gets_all(world: World) -> None:
    """A client that reads slowly gets every byte in the end."""
    body = bytes(range(256)) * 4096 * 16

    async def script(talk: Talk) -> None:
        await talk.read_body()
        await talk.send(response(body, content_type=b"content-type: application/octet-stream"))

    one = world.case(script)
    async with await world.connect(receive_bytes=RECEIVE_BYTES) as client:
        await client.send(one.request())
        await asyncio.sleep(1.0)
        answer = await client.answer()
    assert answer.status == 200, f"{answer}"
    assert answer.body == body, f"{answer}"


@case
async def test_slow_upstream(world: World, record_property: Record) -> None:
    """An upstream that does not read: a client can not send all of a 48 MiB upload."""
    size = 48 * MIB
    sent_bytes = 0

    async def script(talk: Talk) -> None:
        talk.connection.transport.pause_reading()
        await asyncio.sleep(60.0)

    one = world.case(script)
    lines = (b"content-type: multipart/form-data; boundary=b", b"content-length: %d" % size)
    async with await world.connect() as client:

        async def upload() -> None:
            nonlocal sent_bytes
            await client.send(one.head(*lines, path=b"/v1/audio/transcriptions") + b"\r\n")
            while sent_bytes < size:
                await client.send(bytes(256 * 1024))
                sent_bytes += 256 * 1024

        task = asyncio.create_task(upload())
        held_bytes = await stalled(lambda: sent_bytes)
        task.cancel()
    record_property("buffered_mib", round(held_bytes / MIB, 1))
    assert held_bytes < BOUND_BYTES, f"the gateway took {held_bytes / MIB:.0f} MiB that nobody read"
