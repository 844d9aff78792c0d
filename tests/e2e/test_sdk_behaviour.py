"""The `openai` and `anthropic` SDKs behave through the gateway as they do without it: the same events, the same
exceptions, as many requests, and the same end for a stream that is left.

Each case runs against a scripted upstream twice, directly and through burstgate, and what was observed is compared. Two
differences are meant: a connection that breaks before any answer is the gateway's 502, which SDKs retry alike; and a
stream that is reset is cut with a FIN, so that what came before is not lost, which SDKs raise as another exception.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import anthropic
import openai
import pytest

from tests.e2e.conformance.upstream import Script, Talk
from tests.e2e.conformance.world import (
    DONE,
    END,
    STREAM_HEAD,
    Case,
    World,
    chunk,
    completion,
    event,
    response,
    says,
)
from tests.e2e.harness import Installation, wait_until

Sdk = Literal["openai", "openai-async", "anthropic", "anthropic-async"]
SDKS: tuple[Sdk, ...] = ("openai", "openai-async", "anthropic", "anthropic-async")
TIMEOUT_S = 0.4
"""Of the cases in which a client's timer runs out."""
PATIENT_S = 20.0
CLOSE_S = 2.0

MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "yes"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 3, "output_tokens": 2},
}


def named(kind: str, **fields: Any) -> bytes:
    """An event of the Messages API."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json.dumps({"type": kind, **fields}).encode())


def delta(text: str) -> bytes:
    return named("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


OPENAI_STREAM = (event("a"), event("b"), event("c"))
ANTHROPIC_STREAM = (
    named("message_start", message={**MESSAGE, "content": []}),
    named("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    delta("a"),
    delta("b"),
    named("content_block_stop", index=0),
    named("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 2}),
)


@dataclass(frozen=True)
class Dialect:
    """What an upstream says to one of the SDKs."""

    whole: bytes
    stream: tuple[bytes, ...]
    last: bytes
    error_event: bytes

    def error(self, status: bytes, *lines: bytes) -> bytes:
        """An error answer, which both SDKs read."""
        error = {"message": "as scripted", "type": "scripted_error", "param": None, "code": "scripted"}
        return response(json.dumps({"type": "error", "error": error}).encode(), *lines, status=status)


OPENAI = Dialect(
    completion("yes"), OPENAI_STREAM, DONE, b'data: {"error": {"message": "broke", "type": "e", "code": 500}}\n\n'
)
ANTHROPIC = Dialect(
    json.dumps(MESSAGE).encode(),
    ANTHROPIC_STREAM,
    named("message_stop"),
    named("error", error={"type": "overloaded_error", "message": "broke"}),
)


@dataclass(frozen=True)
class Observed:
    """What a client and the upstream saw of one call."""

    events: tuple[str, ...] = ()
    error: str | None = None
    status: int | None = None
    body: str | None = None
    requests: int = 0
    aborted: int = 0
    """Upstream requests whose connection was closed under them."""


@dataclass(frozen=True)
class Call:
    """One row: what the upstream does, how the client calls, and what it must see without a gateway."""

    name: str
    script: Callable[[Dialect], Script]
    requests: int
    error: str | tuple[str, str] | None = None
    """The exception's class, of both SDKs or of each."""
    stream: bool = False
    max_retries: int = 0
    timeout_s: float = PATIENT_S
    take: int | None = None
    """Leave the stream after so many events."""
    aborted: int = 0
    via_error: str | None = None
    """The exception's class through the gateway, where it can not be the same."""


def first(count: int, bad: Callable[[Dialect], bytes | None], stream: bool = False) -> Callable[[Dialect], Script]:
    """A script that answers the first `count` requests with `bad` (None: it resets the connection), then well."""

    def of(dialect: Dialect) -> Script:
        asked = 0

        async def script(talk: Talk) -> None:
            nonlocal asked
            await talk.read_body()
            asked += 1
            if asked > count:
                await talk.send(*(good_stream(dialect) if stream else (response(dialect.whole),)))
            elif (answer := bad(dialect)) is not None:
                await talk.send(answer)
            else:
                talk.reset()

        return script

    return of


def good_stream(dialect: Dialect) -> tuple[bytes, ...]:
    return (STREAM_HEAD, *map(chunk, dialect.stream), chunk(dialect.last), END)


def always(bad: Callable[[Dialect], bytes | None]) -> Callable[[Dialect], Script]:
    return first(1000, bad)


def answers(status: bytes, *lines: bytes) -> Callable[[Dialect], bytes | None]:
    return lambda dialect: dialect.error(status, *lines)


def resets(_: Dialect) -> bytes | None:
    return None


def silent(_: Dialect) -> Script:
    async def script(talk: Talk) -> None:
        await talk.read_body()
        await talk.connection.wait_closed()

    return script


def then(what: Literal["silence", "fin", "rst"]) -> Callable[[Dialect], Script]:
    """Two pieces of a stream, and then no more of it."""

    def of(dialect: Dialect) -> Script:
        async def script(talk: Talk) -> None:
            await talk.read_body()
            await talk.send(STREAM_HEAD, *map(chunk, dialect.stream[:2]))
            await asyncio.sleep(0.1)  # a RST takes what has not been read with it
            if what == "silence":
                await talk.connection.wait_closed()
            elif what == "fin":
                talk.close()
            else:
                talk.reset()

        return script

    return of


def breaks_in_event(dialect: Dialect) -> Script:
    return says(STREAM_HEAD, *map(chunk, dialect.stream[:2]), chunk(dialect.error_event), END)


def half_an_answer(dialect: Dialect) -> Script:
    async def script(talk: Talk) -> None:
        await talk.read_body()
        await talk.send(response(dialect.whole)[:-20])
        await asyncio.sleep(0.1)
        talk.close()

    return script


def endless(dialect: Dialect) -> Script:
    async def script(talk: Talk) -> None:
        await talk.read_body()
        await talk.send(STREAM_HEAD, *map(chunk, dialect.stream[:3]))
        while True:
            await asyncio.sleep(0.02)
            await talk.send(chunk(dialect.stream[2]))

    return script


SOON = b"retry-after-ms: 20"
BUSY = b"429 Too Many Requests"
CALLS = [
    Call("plain", lambda dialect: says(response(dialect.whole)), 1),
    Call("stream", lambda dialect: says(*good_stream(dialect)), 1, stream=True),
    Call("400", always(answers(b"400 Bad Request")), 1, "BadRequestError", max_retries=2),
    Call("401", always(answers(b"401 Unauthorized")), 1, "AuthenticationError", max_retries=2),
    Call("403", always(answers(b"403 Forbidden")), 1, "PermissionDeniedError", max_retries=2),
    Call("404 of a stream", always(answers(b"404 Not Found")), 1, "NotFoundError", stream=True, max_retries=2),
    Call("409 is retried", always(answers(b"409 Conflict", SOON)), 3, "ConflictError", max_retries=2),
    Call("422", always(answers(b"422 Unprocessable Entity")), 1, "UnprocessableEntityError", max_retries=2),
    Call("429 to the end", always(answers(BUSY, SOON)), 3, "RateLimitError", max_retries=2),
    Call("429 without retries", always(answers(BUSY, SOON)), 1, "RateLimitError"),
    Call("429 and then good", first(2, answers(BUSY, SOON)), 3, max_retries=3),
    Call("429, Retry-After in seconds", first(1, answers(BUSY, b"retry-after: 1")), 2, max_retries=1),
    Call("429 and then a stream", first(1, answers(BUSY, SOON), stream=True), 2, stream=True, max_retries=1),
    Call("500 and then good", first(1, answers(b"500 Internal Server Error", SOON)), 2, max_retries=2),
    Call("502 to the end", always(answers(b"502 Bad Gateway", SOON)), 2, "InternalServerError", max_retries=1),
    Call(
        "503 to the end",
        always(answers(b"503 Service Unavailable", SOON)),
        3,
        ("InternalServerError", "*"),
        max_retries=2,
    ),
    Call(
        "504 to the end",
        always(answers(b"504 Gateway Timeout", SOON)),
        2,
        ("InternalServerError", "*"),
        max_retries=1,
    ),
    Call("529", always(answers(b"529 Overloaded", SOON)), 2, ("InternalServerError", "*"), max_retries=1),
    Call(
        "told not to retry",
        always(answers(b"500 Internal Server Error", b"x-should-retry: false")),
        1,
        "InternalServerError",
        max_retries=3,
    ),
    Call(
        "told to retry",
        always(answers(b"400 Bad Request", SOON, b"x-should-retry: true")),
        2,
        "BadRequestError",
        max_retries=1,
    ),
    Call("reset", always(resets), 2, "APIConnectionError", max_retries=1, via_error="InternalServerError"),
    Call("reset and then good", first(1, resets), 2, max_retries=1),
    Call("reset and then a stream", first(1, resets, stream=True), 2, stream=True, max_retries=1),
    Call("no answer in time", silent, 2, "APITimeoutError", max_retries=1, timeout_s=TIMEOUT_S, aborted=2),
    Call("no stream in time", silent, 1, "APITimeoutError", stream=True, timeout_s=TIMEOUT_S, aborted=1),
    Call("half an answer", half_an_answer, 1, "APIConnectionError"),
    Call("a stream that falls silent", then("silence"), 1, "*", stream=True, timeout_s=TIMEOUT_S, aborted=1),
    Call("a stream that is cut", then("fin"), 1, "*", stream=True, max_retries=2),
    Call("a stream that is reset", then("rst"), 1, "*", stream=True, max_retries=2, via_error="*"),
    Call("an error in a stream", breaks_in_event, 1, ("APIError", "*"), stream=True, max_retries=2),
    Call("a stream that is left", endless, 1, stream=True, take=2, aborted=1),
]
"""`*`: some exception; the same one is what counts."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(0)
    try:
        upstream = f"http://127.0.0.1:{world.upstream.port}"
        with Installation(upstream, data_dir=tmp_path_factory.mktemp("sdk")) as installation:
            world.main = ("127.0.0.1", int(installation.gateway_url.rpartition(":")[2]))
            yield world
    finally:
        world.close()


def shown(item: Any) -> str:
    """An event or an answer, as the SDK gives it."""
    return str(item.to_json(indent=None))


def options(call: Call, sdk: Sdk, base_url: str) -> dict[str, Any]:
    base_url += "/v1" if sdk.startswith("openai") else ""
    return {"api_key": "k", "base_url": base_url, "max_retries": call.max_retries, "timeout": call.timeout_s}


def request(one: Case, call: Call, sdk: Sdk) -> dict[str, Any]:
    more = {} if sdk.startswith("openai") else {"max_tokens": 8}
    messages = [{"role": "user", "content": one.token.decode()}]
    return {"model": "m", "messages": messages, "stream": call.stream, **more}


def create_of(sdk: Sdk, client: Any) -> Any:
    return client.chat.completions.create if sdk.startswith("openai") else client.messages.create


def run_sync(one: Case, call: Call, sdk: Sdk, base_url: str, events: list[str]) -> None:
    """Call, and collect what comes into `events`. Raises what the SDK raises."""
    new: Any = openai.OpenAI if sdk == "openai" else anthropic.Anthropic
    with new(**options(call, sdk, base_url)) as client:
        answer = create_of(sdk, client)(**request(one, call, sdk))
        if not call.stream:
            events.append(shown(answer))
            return
        with answer:
            for item in answer:
                events.append(shown(item))
                if call.take is not None and len(events) >= call.take:
                    return


async def run_async(one: Case, call: Call, sdk: Sdk, base_url: str, events: list[str]) -> None:
    """The same with the async clients."""
    new: Any = openai.AsyncOpenAI if sdk == "openai-async" else anthropic.AsyncAnthropic
    async with new(**options(call, sdk, base_url)) as client:
        answer = await create_of(sdk, client)(**request(one, call, sdk))
        if not call.stream:
            events.append(shown(answer))
            return
        async with answer:
            async for item in answer:
                events.append(shown(item))
                if call.take is not None and len(events) >= call.take:
                    return


def observe(world: World, call: Call, sdk: Sdk, base_url: str) -> Observed:
    """Make the call, and see what comes of it."""
    one = world.case(call.script(OPENAI if sdk.startswith("openai") else ANTHROPIC))
    events: list[str] = []
    error: Exception | None = None
    try:
        if sdk.endswith("async"):
            asyncio.run(run_async(one, call, sdk, base_url, events))
        else:
            run_sync(one, call, sdk, base_url, events)
    except Exception as raised:
        error = raised
    if call.aborted:
        wait_until(
            lambda: sum(seen.closed_s is not None for seen in one.seen) >= call.aborted, CLOSE_S, "aborted", 0.01
        )
    status = getattr(error, "status_code", None)
    return Observed(
        tuple(events),
        None if error is None else type(error).__name__,
        status,
        None if status is None else json.dumps(getattr(error, "body", None)),
        len(one.seen),
        sum(seen.closed_s is not None for seen in one.seen) if call.aborted else 0,
    )


@pytest.mark.parametrize("sdk", SDKS)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_behaves_as_direct(world: World, call: Call, sdk: Sdk) -> None:
    world.run(world.upstream.hang_up())  # on a kept connection the gateway may send once more what broke
    with ThreadPoolExecutor(2) as both:
        ports = (world.upstream.port, world.main[1])
        waiting = [both.submit(observe, world, call, sdk, f"http://127.0.0.1:{port}") for port in ports]
    direct, via = (one.result() for one in waiting)
    expected = call.error[sdk.startswith("anthropic")] if isinstance(call.error, tuple) else call.error
    assert direct.error == expected or (expected == "*" and direct.error is not None), direct
    assert direct.requests == call.requests, direct
    if call.via_error is None:
        assert via == direct
    else:
        assert via.error == call.via_error or (call.via_error == "*" and via.error is not None), via
        assert (via.events, via.requests) == (direct.events, direct.requests)


@pytest.mark.parametrize("kind", ["openai-async", "anthropic-async"])
def test_cancelled_stream_is_aborted(world: World, kind: Sdk) -> None:
    """A task that is cancelled while it waits for the next event: the upstream sees it leave, as it does directly."""

    async def cancel(one: Case, base_url: str) -> int:
        call = Call("", endless, 1, stream=True)
        events: list[str] = []
        task = asyncio.create_task(run_async(one, call, kind, base_url, events))
        async with asyncio.timeout(PATIENT_S):
            while len(events) < 3:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(events)

    for host, port in (("127.0.0.1", world.upstream.port), world.main):
        one = world.case(endless(OPENAI if kind.startswith("openai") else ANTHROPIC))
        assert asyncio.run(cancel(one, f"http://{host}:{port}")) >= 3
        wait_until(lambda one=one: one.seen[0].closed_s is not None, CLOSE_S, "the upstream request is aborted", 0.01)  # type: ignore[misc]
        assert len(one.seen) == 1


def test_backoff_is_the_upstreams(world: World) -> None:
    """Retry-After reaches the SDK: it waits as long as it was told, and no longer."""
    took_s: dict[str, float] = {}
    call = Call("", first(2, answers(BUSY, b"retry-after-ms: 400")), 3, max_retries=2)
    for name, port in (("direct", world.upstream.port), ("via", world.main[1])):
        start_s = time.monotonic()
        assert observe(world, call, "openai", f"http://127.0.0.1:{port}").requests == 3
        took_s[name] = time.monotonic() - start_s
    assert all(0.8 <= took < 0.8 + CLOSE_S for took in took_s.values()), took_s
