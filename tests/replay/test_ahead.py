"""Requests prepared ahead: lengths, histories and bodies, by a local tokenizer, the target's, or none."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.ahead import CHUNK_ROWS, COUNTERS, Ahead, Prepared
from replay.bodies import Prompt
from replay.client import Endpoint
from replay.history import Turn
from replay.prompts import WORDS, PromptHistory, PromptOptions
from replay.runner import ReplayOptions, run
from replay.schedule import Planned
from replay.simulator.config import SimulatorConfig
from replay.simulator.server import running
from replay.tokenizer import load_tokenizer
from tests.replay.test_runner import Answer, scripted, status
from tests.replay.test_tokenizer import REFUSING, make_tokenizer
from wire.shapes import Usage

NOWHERE = "http://127.0.0.1:9"
"""Nobody is asked where the tokenizer is local."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def poor_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes, or nearly: no word is one token."""
    return make_tokenizer(tmp_path_factory.mktemp("poor"), vocabulary=300)


def row(index: int, request: int, response: int = 5, session: str | None = None) -> Planned:
    return Planned(index, index * 0.01, session, None, request, response)


def ahead_of(rows: list[Planned], options: PromptOptions, endpoint: Endpoint = "chat", url: str = NOWHERE) -> Ahead:
    return Ahead(
        iter(rows), url, endpoint=endpoint, model="m", stream=False, seed=3, api_key=None, prompts=options
    )  # fmt: skip


Visit = Callable[[Ahead, Prepared], Awaitable[None]]


async def nothing(ahead: Ahead, prepared: Prepared) -> None:
    """Sends nothing."""


async def visit_all(ahead: Ahead, visit: Visit = nothing) -> list[Prepared]:
    """Every request in its order, visited when it is handed out, as a runner would."""
    found = []
    try:
        async with asyncio.TaskGroup() as group:
            await ahead.learn()
            tasks = [group.create_task(ahead.fill())]
            tasks += [group.create_task(ahead.count()) for _ in range(COUNTERS if ahead.has_tokenizer else 0)]
            await ahead.first_prompts()
            while (prepared := await ahead.next()) is not None:
                found.append(prepared)
                await visit(ahead, prepared)
            for task in tasks:
                task.cancel()
    finally:
        ahead.close()
    return found


def prepared_for(
    rows: list[Planned], options: PromptOptions, endpoint: Endpoint = "chat", visit: Visit = nothing
) -> list[Prepared]:
    return asyncio.run(visit_all(ahead_of(rows, options, endpoint), visit))


def prompt_of(body: bytes) -> Prompt:
    """Of a request's body."""
    found: dict[str, Any] = json.loads(body)
    if "messages" not in found:
        return Prompt(found["prompt"] if "prompt" in found else found["input"])
    said = [message["content"] for message in found["messages"]]
    assert [message["role"] for message in found["messages"]] == [*["user", "assistant"] * (len(said) // 2), "user"]
    return Prompt(said[-1], tuple(Turn(user, answer, 0) for user, answer in zip(said[::2], said[1::2], strict=False)))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(6, 3000), min_size=1, max_size=12),
    st.sampled_from(["chat", "completions", "embeddings"]),
    st.booleans(),
)
def test_exact_by_a_local_tokenizer(tokenizer: Path, lengths: list[int], endpoint: Endpoint, has_blocks: bool) -> None:
    blocks = (11, 12, 13) if has_blocks else None
    rows = [msgspec.structs.replace(row(n, asked), prefix_blocks=blocks) for n, asked in enumerate(lengths)]
    found = prepared_for(rows, PromptOptions(tokenizer=tokenizer), endpoint)
    local = load_tokenizer(tokenizer, chat=endpoint == "chat")
    assert [local.count(prompt_of(each.body)) for each in found] == lengths
    assert [each.counted_tokens for each in found] == lengths
    assert all(each.is_counted for each in found)


def test_a_poor_tokenizer_comes_near(poor_tokenizer: Path) -> None:
    found = prepared_for([row(n, 100 + 37 * n) for n in range(30)], PromptOptions(tokenizer=poor_tokenizer))
    local = load_tokenizer(poor_tokenizer, chat=True)
    errors = [abs(local.count(prompt_of(each.body)) - each.tokens) for each in found]
    assert max(errors) <= 2
    assert errors.count(0) > 5


def test_a_pool_is_exact_too(tokenizer: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool.txt"
    pool.write_text("".join(f"Number {n}: is résumé spelt so, {'really ' * (n % 7)}?\n" for n in range(50)))
    lengths = [12 + 13 * n for n in range(120)]
    rows = [row(n, asked) for n, asked in enumerate(lengths)]
    found = prepared_for(rows, PromptOptions(tokenizer=tokenizer, pool=pool))
    local = load_tokenizer(tokenizer, chat=True)
    assert [local.count(prompt_of(each.body)) for each in found] == lengths
    assert len({each.text[:20] for each in found}) == 120


GROWING = [row(0, 40, 10, "s"), row(1, 90, 20, "s"), row(2, 30, 5, "t"), row(3, 200, 7, "s"), row(4, 60, 9, None)]


@pytest.mark.parametrize("which", ["tokenizer", "poor_tokenizer"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_synthetic_histories_grow(which: str, endpoint: Endpoint, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    factor = 1 if which == "tokenizer" else 5  # a word has some five of its tokens
    rows = [
        msgspec.structs.replace(each, request_tokens=factor * (each.request_tokens or 0), response_tokens=20)
        for each in GROWING
    ]
    first, second, other, third, alone = prepared_for(
        rows, PromptOptions(tokenizer=path, history="synthetic"), endpoint
    )
    local = load_tokenizer(path, chat=endpoint == "chat")
    errors = [abs(local.count(prompt_of(each.body)) - each.tokens) for each in (first, second, other, third, alone)]
    assert max(errors) <= (0 if which == "tokenizer" else 2)
    if endpoint == "chat":
        turns = [prompt_of(each.body).turns for each in (first, second, other, third, alone)]
        assert list(map(len, turns)) == [0, 1, 0, 2, 0]
        assert [turn.user for turn in turns[3]] == [first.text, second.text]
        assert turns[3][0] == turns[1][0]
        assert len(turns[1][0].assistant.split()) in ([20] if which == "tokenizer" else [3, 4, 5, 6])
    else:
        assert prompt_of(second.body).text.startswith(prompt_of(first.body).text + " ")
        assert prompt_of(third.body).text.startswith(prompt_of(second.body).text + " ")
    assert not any(map(ahead_of([], PromptOptions(history="synthetic")).needs_history, (second, third)))


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(6, 400), st.integers(1, 60)), min_size=2, max_size=12))
def test_histories_are_cut_with_the_trace(tokenizer: Path, lengths: list[tuple[int, int]]) -> None:
    """Whatever the lengths: the leading turns that fit and a new message, together exact."""
    rows = [row(n, request, response, "s") for n, (request, response) in enumerate(lengths)]
    found = prepared_for(rows, PromptOptions(tokenizer=tokenizer, history="synthetic"))
    local = load_tokenizer(tokenizer, chat=True)
    said: list[str] = []
    for each in found:
        prompt = prompt_of(each.body)
        assert local.count(prompt) == each.tokens
        users = [turn.user for turn in prompt.turns]
        assert users == said[: len(users)]
        said = [*users, prompt.text]
    assert len({each.text for each in found}) == len(found)


def test_a_history_is_cut_no_more_than_needed(tokenizer: Path) -> None:
    """Turn 1 ends at 40 + 10 tokens and turn 2 at 90 + 20; the template adds </s> <|user|> </s> <|assistant|>."""
    options = PromptOptions(tokenizer=tokenizer, history="synthetic")
    for asked, kept in ((50 + 3, 0), (50 + 5, 1), (110 + 4, 1), (110 + 5, 2), (9, 0)):
        rows = [row(0, 40, 10, "s"), row(1, 90, 20, "s"), row(2, asked, 1, "s"), row(3, 300, 1, "s")]
        found = prepared_for(rows, options)
        assert len(prompt_of(found[2].body).turns) == kept, asked
        assert len(prompt_of(found[3].body).turns) == kept + 1
        assert [each.counted_tokens for each in found] == [40, 90, asked, 300]


def test_rows_with_blocks_have_no_history(tokenizer: Path) -> None:
    rows = [msgspec.structs.replace(row(n, 40 + 40 * n, 5, "s"), prefix_blocks=(1, 2)) for n in range(3)]
    found = prepared_for(rows, PromptOptions(tokenizer=tokenizer, history="synthetic", block_tokens=16))
    assert [len(prompt_of(each.body).turns) for each in found] == [0, 0, 0]


def test_real_histories_hold_what_was_said(tokenizer: Path) -> None:
    """Each turn ends before the next is handed out; the second one fails."""
    local = load_tokenizer(tokenizer, chat=True)
    said = ["an answer of the model", None, 'and\none "more" é']

    async def visit(ahead: Ahead, prepared: Prepared) -> None:
        number = prepared.row.index
        assert ahead.needs_history(prepared) is (number > 0)
        await ahead.settle(prepared)
        prepared.is_sent = True
        text = said[number] if number < len(said) else "last"
        usage = Usage(local.count(prompt_of(prepared.body)), 6, None)
        ahead.answered(prepared, text, usage, text is not None)

    rows = [row(n, 60 * (n + 1), 6, "s") for n in range(4)]
    found = prepared_for(rows, PromptOptions(tokenizer=tokenizer, history="real"), visit=visit)
    prompts = [prompt_of(each.body) for each in found]
    assert [[(turn.user, turn.assistant) for turn in prompt.turns] for prompt in prompts] == [
        [],
        [(found[0].text, said[0])],
        [(found[0].text, said[0])],
        [(found[0].text, said[0]), (found[2].text, said[2])],
    ]
    assert [local.count(prompt) for prompt in prompts] == [60, 120, 180, 240]


def test_answers_longer_than_known_are_cut(tokenizer: Path) -> None:
    """The usage says 6 tokens, and the text has 100: the turn does not fit after all."""

    async def visit(ahead: Ahead, prepared: Prepared) -> None:
        await ahead.settle(prepared)
        prepared.is_sent = True
        ahead.answered(prepared, " hello" * 100, Usage(prepared.tokens, 6, None), True)

    rows = [row(0, 60, 6, "s"), row(1, 90, 6, "s"), row(2, 300, 6, "s")]
    found = prepared_for(rows, PromptOptions(tokenizer=tokenizer, history="real"), visit=visit)
    local = load_tokenizer(tokenizer, chat=True)
    assert [len(prompt_of(each.body).turns) for each in found] == [0, 0, 1]
    assert [local.count(prompt_of(each.body)) for each in found] == [60, 90, 300]


def test_a_row_goes_with_what_has_ended(tokenizer: Path) -> None:
    """Nobody calls `settle`: an answer that comes while the next row waits for its time is still in that row."""
    pending: list[Prepared] = []

    async def visit(ahead: Ahead, prepared: Prepared) -> None:
        if prepared.row.index == 1:
            assert prompt_of(prepared.body).turns == ()
            ahead.answered(pending[0], "early", Usage(60, 6, None), True)
            assert len(prompt_of(prepared.body).turns) == 1
        elif prepared.row.index == 2:  # row 1 has not ended
            assert [turn.assistant for turn in prompt_of(prepared.body).turns] == ["early"]
        prepared.is_sent = True
        body = prepared.body
        await asyncio.sleep(0.05)
        assert prepared.body == body
        pending.append(prepared)

    options = PromptOptions(tokenizer=tokenizer, history="real")
    assert len(prepared_for([row(n, 60 * (n + 1), 6, "s") for n in range(3)], options, visit=visit)) == 3


@pytest.mark.parametrize("history", ["none", "synthetic"])
def test_the_same_seed_gives_the_same_bytes_in_another_process(history: PromptHistory, tokenizer: Path) -> None:
    rows = [row(n, 20 + 7 * n, 6, f"s{n % 3}") for n in range(40)]
    bodies = [each.body for each in prepared_for(rows, PromptOptions(tokenizer=tokenizer, history=history))]
    program = (
        "import hashlib, sys; from pathlib import Path; from tests.replay.test_ahead import *;"
        "rows = [row(n, 20 + 7 * n, 6, f's{n % 3}') for n in range(40)];"
        "found = prepared_for(rows, PromptOptions(tokenizer=Path(sys.argv[1]), history=sys.argv[2]));"
        "print(hashlib.sha256(b''.join(each.body for each in found)).hexdigest())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program, str(tokenizer), history], cwd=Path(__file__).parents[2], check=True,
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True,
        ).stdout.strip()
        for seed in ("5", "6")
    }  # fmt: skip
    assert printed == {hashlib.sha256(b"".join(bodies)).hexdigest()}


def test_a_template_without_answers_is_said_at_once(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path, REFUSING)
    ahead_of([], PromptOptions(tokenizer=folder)).close()
    with pytest.raises(ValueError, match="the chat template fails: one message only"):
        ahead_of([], PromptOptions(tokenizer=folder, history="synthetic"))


@pytest.mark.parametrize(("over", "noted"), [(0, False), (1, True), (-2, True)])
def test_a_target_that_counts_otherwise_is_noted(over: int, noted: bool, tokenizer: Path) -> None:
    async def visit(ahead: Ahead, prepared: Prepared) -> None:
        prepared.is_sent = True
        ahead.answered(prepared, None, Usage(prepared.tokens + over, 5, None), True)

    async def body() -> tuple[str, ...]:
        ahead = ahead_of([row(n, 30) for n in range(20)], PromptOptions(tokenizer=tokenizer))
        await visit_all(ahead, visit)
        return ahead.notes

    expected = f"local tokenizer: the target's count differs by {over:+d} tokens in 20 of the first 20 answers"
    assert asyncio.run(body()) == ((expected,) if noted else ())


@pytest.mark.parametrize(("tokens_per_word", "template"), [(1, 13), (1, 30), (2, 9)])
def test_without_a_tokenizer_the_template_is_learned_soon(tokens_per_word: int, template: int) -> None:
    """Of a token a word the second prompt is exact already; of two tokens the fourth comes near."""
    errors: list[int] = []

    async def visit(ahead: Ahead, prepared: Prepared) -> None:
        prepared.is_sent = True
        got = template + tokens_per_word * len(prepared.text.split())
        errors.append(abs(got - prepared.tokens))
        ahead.answered(prepared, None, Usage(got, 5, None), True)

    async def body() -> list[Prepared]:
        async with scripted({}) as script:
            ahead = ahead_of([row(n, 80 + 17 * (n % 5)) for n in range(60)], PromptOptions(), url=script.url)
            return await visit_all(ahead, visit)

    asyncio.run(body())
    # Those in the look-ahead were built before the first answer.
    later = errors[20:]
    assert max(later) <= tokens_per_word - 1 + (tokens_per_word > 1)


def counting(sizes: list[int]) -> Answer:
    """A /tokenize that counts words and seven a message."""

    async def answer(seen: Any, writer: asyncio.StreamWriter) -> None:
        said = msgspec.json.decode(seen.body)["messages"]
        sizes.append(len(said))
        count = sum(7 + len(message["content"].split()) for message in said)
        await status(200, b'{"count":%d}' % count)(seen, writer)

    return answer


def test_histories_by_the_targets_tokenizer() -> None:
    sizes: list[int] = []

    async def visit(ahead: Ahead, prepared: Prepared) -> None:
        await ahead.settle(prepared)
        prepared.is_sent = True
        ahead.answered(prepared, "four words it said", Usage(prepared.tokens, 4, None), True)

    async def body() -> list[Prepared]:
        async with scripted({"/tokenize": counting(sizes)}) as script:
            ahead = ahead_of(
                [row(n, 50 * (n + 1), 4, "s") for n in range(4)], PromptOptions(history="real"), url=script.url
            )
            return await visit_all(ahead, visit)

    found = asyncio.run(body())
    prompts = [prompt_of(each.body) for each in found]
    assert [len(prompt.turns) for prompt in prompts] == [0, 1, 2, 3]
    assert [each.counted_tokens for each in found] == [50, 100, 150, 200]
    assert max(sizes) == 7


def test_long_prompts_leave_the_loop_alone(tokenizer: Path) -> None:
    """Twelve prompts of 20,000 tokens, each counted for 20 ms: the loop turns meanwhile. A busy machine is slower."""
    late_s: list[float] = []

    async def watch() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + 0.002
            await asyncio.sleep(0.002)
            late_s.append(loop.time() - due_s)

    async def body() -> None:
        watcher = asyncio.create_task(watch())
        await visit_all(ahead_of([row(n, 20_000) for n in range(12)], PromptOptions(tokenizer=tokenizer)))
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher

    asyncio.run(body())
    assert len(late_s) > 12
    assert sorted(late_s)[len(late_s) // 2] < 0.010


@pytest.mark.parametrize("history", ["none", "synthetic", "real"])
def test_a_replay_with_histories(history: PromptHistory) -> None:
    """Against the simulator, whose /tokenize and usage agree; turns come a while after each other."""
    rows = [msgspec.structs.replace(row(n, 60 * (n + 1), 8, "s"), due_s=n * 0.3) for n in range(4)]
    with running(SimulatorConfig.fast()) as url:
        options = ReplayOptions(url, "simulated", prompts=PromptOptions(history=history))
        summary = asyncio.run(run(rows, options))
    assert (summary.ok, summary.prompts.exact_share, summary.outputs.exact_share) == (4, 1.0, 1.0)


def test_embeddings_are_sent_and_checked() -> None:
    """Rows need no answer's length; a failure that kept its request's length is sent as any other row."""
    rows = [
        Planned(0, 0.0, None, None, 25, None),
        Planned(1, 0.01, None, None, 300, 0),
        Planned(2, 0.02, None, None, 40, 7),
        Planned(3, 0.02, None, None, None, 7),
    ]
    with running(SimulatorConfig.fast()) as url:
        summary = asyncio.run(run(rows, ReplayOptions(url, "simulated", endpoint="embeddings")))
    assert (summary.ok, summary.without_tokens, summary.failures, summary.stream) == (3, 1, {}, False)
    assert (summary.prompts.exact_share, summary.prompts.got_tokens) == (1.0, 365)
    assert (summary.outputs.known, summary.outputs.asked_tokens, summary.outputs.got_tokens) == (3, 0, 0)


def test_headers_and_fields_go_with_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_SECRET", "s3cret")
    body = b'{"choices":[{"index":0,"message":{"content":"x"},"finish_reason":"length"}],"usage":{"prompt_tokens":9,"completion_tokens":5}}'  # noqa: E501
    prompts = PromptOptions(
        extra_headers=(("api-key", "$THE_SECRET"),), extra_body={"temperature": 0.5}, ignore_eos=False
    )

    async def replayed() -> tuple[Any, Any]:
        async with scripted({"/v1/chat/completions": status(200, body)}) as script:
            options = ReplayOptions(script.url, "m", stream=False, prompts=prompts)
            return await run([row(0, 9)], options), script

    summary, script = asyncio.run(replayed())
    assert summary.ok == 1
    assert {seen.path for seen in script.seen} == {"/v1/models", "/tokenize", "/v1/chat/completions"}
    assert {seen.headers.get("api-key") for seen in script.seen} == {"s3cret"}
    sent = cast("dict[str, Any]", script.of("/v1/chat/completions")[0].json())
    assert (sent["temperature"], sent["max_tokens"], "ignore_eos" in sent) == (0.5, 5, False)
    assert "s3cret" not in repr(summary) + repr(prompts)


def test_words_are_used() -> None:
    """A prompt for a row without anything else is words."""

    async def body() -> list[Prepared]:
        async with scripted({}) as script:
            return await visit_all(ahead_of([row(0, 30)], PromptOptions(), url=script.url))

    (only,) = asyncio.run(body())
    assert set(only.text.split()) <= set(WORDS)


def test_the_next_rows_are_read_while_the_last_ones_wait() -> None:
    """Without a tokenizer few prompts are built ahead, and the file is not among what a send waits for."""
    reading = threading.Event()

    def planned() -> Iterator[Planned]:
        for index in range(2 * CHUNK_ROWS):
            if index == CHUNK_ROWS:
                reading.set()
            yield row(index, 10)

    async def main() -> None:
        ahead = Ahead(planned(), NOWHERE, endpoint="chat", model="m", stream=False, seed=3, api_key=None)
        filling = asyncio.create_task(ahead.fill())
        assert await ahead.next() is not None
        assert await asyncio.to_thread(reading.wait, 10.0)
        filling.cancel()
        await asyncio.wait([filling])
        ahead.close()

    asyncio.run(main())
