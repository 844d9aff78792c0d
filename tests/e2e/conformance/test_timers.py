"""Four timers: connect, first byte, between chunks, total. Asked of the tight gateway, in which each is short."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

from tests.e2e.conformance.client import Answer
from tests.e2e.conformance.upstream import Talk
from tests.e2e.conformance.world import (
    CHUNK_S,
    CLOSE_S,
    CONNECT_S,
    FIRST_BYTE_S,
    STREAM_HEAD,
    TOTAL_S,
    Case,
    World,
    case,
    chunk,
    completion,
    event,
    response,
    until,
)

Record = Callable[[str, object], None]
GATEWAY_TIMEOUT = (502, 503, 504)


async def silent(talk: Talk) -> None:
    """Take the request and never answer."""
    await talk.read_body()
    await talk.connection.wait_closed()


async def stops(talk: Talk) -> None:
    """One event, and silence."""
    await talk.read_body()
    await talk.send(STREAM_HEAD, chunk(event("only")))
    await talk.connection.wait_closed()


async def endless(talk: Talk) -> None:
    """An event every 100 ms."""
    await talk.read_body()
    await talk.send(STREAM_HEAD)
    while True:
        await talk.send(chunk(event("more")))
        await asyncio.sleep(0.1)


async def timed(one: Case, timer_s: float, record_property: Record, *, stream: bool = False) -> Answer:
    """The answer of the tight gateway, which must come when the timer has run out, and not before."""
    start_s = time.monotonic()
    answer = await one.ask(one.request(body=one.body(stream=stream)), tight=True)
    took_s = time.monotonic() - start_s
    record_property("took_s", round(took_s, 2))
    record_property("timer_s", timer_s)
    assert took_s > timer_s * 0.9, f"{answer} after {took_s:.2f} s, before the timer of {timer_s:g} s"
    assert took_s < timer_s + CLOSE_S, f"{answer} after {took_s:.2f} s for a timer of {timer_s:g} s"
    return answer


def message(answer: Answer) -> str:
    """Of an error in OpenAI's envelope."""
    return str(json.loads(answer.body)["error"]["message"])


@case
async def test_connect(world: World, record_property: Record) -> None:
    """An upstream that answers no SYN: a 5xx when the connect timer has run out."""
    world.need("connect-timer")
    async with world.without_upstream(blackhole=True):
        answer = await timed(world.case(), CONNECT_S, record_property)
        assert answer.status in GATEWAY_TIMEOUT, f"{answer}"
        assert answer.is_whole, f"{answer}"
    if "timer-messages" in world.offers:
        assert "timeouts.connect_s" in message(answer), f"the message does not name the setting: {message(answer)}"


@case
async def test_first_byte(world: World, record_property: Record) -> None:
    """An upstream that never answers: a 5xx when the timer has run out, and the upstream request is aborted."""
    world.need("first-byte-timer")
    one = world.case(silent)
    answer = await timed(one, FIRST_BYTE_S, record_property)
    assert answer.status in GATEWAY_TIMEOUT, f"{answer}"
    await until(lambda: one.seen[0].closed_s is not None, "the upstream's connection is closed", CLOSE_S)
    if "timer-messages" in world.offers:
        assert "timeouts.first_byte_s" in message(answer), f"the message does not name the setting: {message(answer)}"


@case
async def test_first_byte_is_not_total(world: World) -> None:
    """An answer that has begun is not bound by the timer for its beginning."""
    world.need("first-byte-timer")

    async def script(talk: Talk) -> None:
        await talk.read_body()
        data = response(completion("slow"))
        await talk.send(data[:-20])
        for at in range(4):
            await asyncio.sleep(FIRST_BYTE_S / 2.5)
            await talk.send(data[-20 + at * 5 : -15 + at * 5 or None])

    answer = await world.case(script).ask(tight=True)
    assert answer.status == 200, f"{answer}"
    assert answer.is_whole, f"{answer}"


@case
async def test_between_chunks(world: World, record_property: Record) -> None:
    """A stream that falls silent: cut when the timer has run out, and the upstream request is aborted."""
    world.need("chunk-timer")
    one = world.case(stops)
    answer = await timed(one, CHUNK_S, record_property, stream=True)
    assert answer.status == 200, f"{answer}"
    assert not answer.is_whole, "a silently complete stream"
    assert b"only" in answer.body, f"{answer}"
    await until(lambda: one.seen[0].closed_s is not None, "the upstream's connection is closed", CLOSE_S)


@case
async def test_total(world: World, record_property: Record) -> None:
    """A stream that goes on for ever: cut when the timer has run out, and the upstream request is aborted."""
    world.need("total-timer")
    one = world.case(endless)
    answer = await timed(one, TOTAL_S, record_property, stream=True)
    assert answer.status == 200, f"{answer}"
    assert not answer.is_whole, "a silently complete stream"
    await until(lambda: one.seen[0].closed_s is not None, "the upstream's connection is closed", CLOSE_S)


@case
async def test_timers_are_apart(world: World) -> None:
    """A slow request beside others: theirs are served while its timer runs."""
    world.need("first-byte-timer")
    slow = asyncio.create_task(world.case(silent).ask(tight=True))
    await asyncio.sleep(0.1)
    for _ in range(5):
        answer = await world.case().ask(tight=True)
        assert answer.status == 200, f"{answer}"
    assert (await slow).status >= 400
