from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.simulator.config import SimulatorConfig
from replay.simulator.engine import BLOCK_TOKENS, Engine, SequenceRequest, Step, blocks_for

SMALL = SimulatorConfig(
    prefill_tokens_per_s=1000.0,
    step_base_s=0.5,
    step_per_seq_s=0.25,
    kv_capacity_tokens=64,  # 4 blocks
    max_num_seqs=2,
    max_batched_tokens=32,
    max_model_len=64,
)


def run(engine: Engine, limit: int = 10_000) -> list[Step]:
    """Steps until idle, each starting where the last one ended."""
    steps, now_s = [], 0.0
    while not engine.is_idle:
        steps.append(engine.step(now_s))
        now_s += steps[-1].duration_s
        assert len(steps) < limit, "the engine does not come to an end"
    return steps


def outline(step: Step) -> tuple[float, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return round(step.duration_s, 9), step.produced, step.finished, step.preempted


@pytest.mark.parametrize(
    ("config", "requests", "expected"),
    [
        # One prompt of 10 tokens: the prefill step produces the first token, each later step one more.
        (SMALL, [(10, 3)], [(0.51, (0,), (), ()), (0.75, (0,), (), ()), (0.75, (0,), (0,), ())]),
        # A pooling request ends when its prompt is computed, without a token.
        (SMALL, [(10, 0)], [(0.51, (), (0,), ())]),
        # A prompt above the budget of 32 tokens is computed in chunks; the second chunk shares its step.
        (SMALL, [(40, 1), (16, 1)], [(0.532, (), (), ()), (0.524, (0, 1), (0, 1), ())]),
        # max_num_seqs is 2: the third waits until the first has ended.
        (
            SMALL,
            [(8, 1), (8, 2), (8, 1)],
            [(0.516, (0, 1), (0,), ()), (0.758, (1, 2), (1, 2), ())],
        ),
        # 3 blocks of 4 taken: the second prompt, of 2 blocks, waits for them though a slot is free.
        (
            replace(SMALL, max_batched_tokens=64),
            [(48, 1), (32, 1)],
            [(0.548, (0,), (0,), ()), (0.532, (1,), (1,), ())],
        ),
        # Two prompts of 2 blocks fill the cache; the first one's next token takes the youngest's blocks.
        # The second is computed again, its token included, when the first has ended.
        (
            replace(SMALL, max_batched_tokens=64),
            [(32, 2), (32, 2)],
            [(0.564, (0, 1), (), ()), (0.75, (0,), (0,), (1,)), (0.533, (1,), (1,), ())],
        ),
    ],
)
def test_steps(config: SimulatorConfig, requests: list[tuple[int, int]], expected: list[Any]) -> None:
    engine = Engine(config)
    for number, (prompt, output) in enumerate(requests):
        engine.add(SequenceRequest(number, prompt, output))
    assert [outline(step) for step in run(engine)] == expected


def test_the_time_in_the_queue_is_told_once() -> None:
    engine = Engine(replace(SMALL, max_num_seqs=1))
    engine.add(SequenceRequest(0, 10, 1, arrived_s=0.0))
    engine.add(SequenceRequest(1, 10, 1, arrived_s=0.25))
    assert [step.admitted for step in run(engine)] == [((0, 0.0),), ((1, pytest.approx(0.26)),)]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SequenceRequest(7, 0, 1), "sequence 7: expected a prompt of at least 1 token"),
        (SequenceRequest(7, 1, -1), "sequence 7: expected a prompt of at least 1 token"),
        (SequenceRequest(0, 1, 1), "sequence 0: this id is in use"),
        (SequenceRequest(7, 64, 2), r"sequence 7: its 64 \+ 2 tokens need 5 KV-cache blocks, and there are 4"),
    ],
)
def test_what_can_never_run_is_refused(request_: SequenceRequest, message: str) -> None:
    engine = Engine(SMALL)
    engine.add(SequenceRequest(0, 1, 1))
    with pytest.raises(ValueError, match=message):
        engine.add(request_)


def test_an_idle_engine_steps_without_time() -> None:
    assert Engine(SMALL).step(5.0) == Step(0.0, (), (), (), (), 0)


@st.composite
def configs(draw: st.DrawFn) -> SimulatorConfig:
    longest = draw(st.integers(1, 80))
    seqs = draw(st.integers(1, 6))
    return SimulatorConfig(
        max_model_len=longest,
        kv_capacity_tokens=blocks_for(longest) * BLOCK_TOKENS + draw(st.integers(0, 100)),
        max_num_seqs=seqs,
        max_batched_tokens=seqs + draw(st.integers(0, 40)),
    )


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 80), st.integers(0, 80)),
        st.tuples(st.just("step"), st.just(0), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 40), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(configs(), actions)
def test_blocks_never_leak_and_every_sequence_ends(config: SimulatorConfig, script: list[tuple[str, int, int]]) -> None:
    def play() -> tuple[list[Step], dict[int, int], set[int], set[int]]:
        engine, steps = Engine(config), []
        wanted: dict[int, int] = {}
        aborted: set[int] = set()
        now_s = 0.0
        for kind, first, second in script:
            if kind == "add":
                prompt = min(first, config.max_model_len)
                output = min(second, config.max_model_len - prompt)
                wanted[len(wanted)] = output
                engine.add(SequenceRequest(len(wanted) - 1, prompt, output, now_s))
            elif kind == "step":
                steps.append(engine.step(now_s))
                now_s += steps[-1].duration_s
            elif engine.abort(first):
                aborted.add(first)
            assert 0 <= engine.free_blocks <= engine.total_blocks
            assert engine.running <= config.max_num_seqs
        while not engine.is_idle:
            step = engine.step(now_s)
            # An engine with work always works, so it always comes to an end.
            assert step.produced or step.prompt_tokens or step.preempted
            assert step.duration_s >= 0
            assert 0 <= engine.free_blocks <= engine.total_blocks
            steps.append(step)
            now_s += step.duration_s
        assert engine.free_blocks == engine.total_blocks
        finished = [sequence for step in steps for sequence in step.finished]
        assert len(finished) == len(set(finished))
        return steps, wanted, aborted, set(finished)

    steps, wanted, aborted, finished = play()
    assert finished | aborted == set(wanted)
    assert not finished & aborted
    produced = [sequence for step in steps for sequence in step.produced]
    for sequence, output in wanted.items():
        if sequence in finished:
            assert produced.count(sequence) == output
        else:
            assert produced.count(sequence) < max(output, 1)
    for step in steps:
        assert len(step.produced) <= config.max_num_seqs
        assert len(set(step.produced)) == len(step.produced)
    assert play() == (steps, wanted, aborted, finished)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=12))
def test_first_tokens_come_in_order_of_arrival(requests: list[tuple[int, int]]) -> None:
    engine = Engine(replace(SMALL, max_model_len=80, kv_capacity_tokens=160, max_num_seqs=4))
    for number, (prompt, output) in enumerate(requests):
        engine.add(SequenceRequest(number, prompt, output))
    firsts = list(dict.fromkeys(sequence for step in run(engine) for sequence in step.produced))
    assert firsts == sorted(firsts)


# --- prefix caching -------------------------------------------------------------------------------------------------

SHARED = replace(SMALL, kv_capacity_tokens=128, max_batched_tokens=64, max_model_len=128, enable_prefix_caching=True)


@pytest.mark.parametrize(
    ("first", "second", "cached"),
    [
        # Two full blocks of equal prompts: the second is computed from the last token's block on.
        ((40, (1, 2)), (40, (1, 2)), 32),
        # The last token is always computed: of a prompt of exactly 2 blocks, 1 is shared.
        ((32, (1, 2)), (32, (1, 2)), 16),
        # The prompts part after one block.
        ((40, (1, 2)), (40, (1, 3)), 16),
        # The beginning differs, so that nothing after it is the same.
        ((40, (1, 2)), (40, (3, 2)), 0),
        # Without hashes nothing is shared.
        ((40, ()), (40, ()), 0),
    ],
)
@pytest.mark.parametrize("is_over", [False, True], ids=["the first runs", "the first has ended"])
def test_cached_tokens(
    first: tuple[int, tuple[int, ...]], second: tuple[int, tuple[int, ...]], cached: int, is_over: bool
) -> None:
    engine = Engine(SHARED)
    engine.add(SequenceRequest(0, first[0], 1 if is_over else 3, block_hashes=first[1]))
    engine.step(0.0)
    engine.add(SequenceRequest(1, second[0], 1, block_hashes=second[1]))
    step = engine.step(1.0)
    assert step.cached == (((1, cached),) if cached else ())
    assert step.prompt_tokens == second[0] - cached
    assert (engine.prefix_queries, engine.prefix_hits) == (first[0] + second[0], cached)
    run(engine)
    assert engine.free_blocks == engine.total_blocks


def test_a_shared_block_is_held_once() -> None:
    engine = Engine(SHARED)  # 8 blocks; each of these would need 5 of its own
    for number in range(2):
        engine.add(SequenceRequest(number, 79, 2, block_hashes=(1, 2, 3, 4)))
    engine.step(0.0)
    step = engine.step(1.0)
    assert engine.running == 2
    assert engine.total_blocks - engine.free_blocks == 6
    assert step.preempted == ()


def test_without_prefix_caching_hashes_mean_nothing() -> None:
    engine = Engine(replace(SHARED, enable_prefix_caching=False))
    for number in range(2):
        engine.add(SequenceRequest(number, 40, 1, block_hashes=(1, 2)))
    assert sum(step.prompt_tokens for step in run(engine)) == 80
    assert (engine.prefix_queries, engine.prefix_hits) == (0, 0)


# --- costs and skipping ---------------------------------------------------------------------------------------------


def test_a_step_costs_what_its_context_costs() -> None:
    config = replace(SMALL, step_per_context_token_s=0.125)
    engine = Engine(config)
    engine.add(SequenceRequest(0, 40, 3))
    steps = run(engine)
    # 32 tokens on nothing, 8 on 32; then one token each on 40 and 41.
    assert [(step.prompt_tokens, step.decode_sequences, step.context_tokens) for step in steps] == [
        (32, 0, 0),
        (8, 0, 32),
        (0, 1, 40),
        (0, 1, 41),
    ]
    assert [step.duration_s for step in steps] == pytest.approx([0.532, 0.508 + 4, 0.75 + 5, 0.75 + 5.125])


@st.composite
def arrivals(draw: st.DrawFn) -> list[SequenceRequest]:
    at_s = 0.0
    found = []
    for number in range(draw(st.integers(1, 14))):
        at_s += draw(st.sampled_from([0.0, 0.001, 0.03, 0.7]))
        prompt, family = draw(st.integers(1, 60)), draw(st.integers(0, 2))
        hashes = tuple(family * 100 + at for at in range(prompt // 4))
        found.append(SequenceRequest(number, prompt, draw(st.integers(0, 60)), at_s, hashes))
    return found


def play(config: SimulatorConfig, requests: list[SequenceRequest], *, skips: bool) -> tuple[list[Any], Engine]:
    """Every event with its time."""
    engine, events = Engine(config), list[Any]()
    waiting = list(requests)
    now_s = 0.0
    while waiting or not engine.is_idle:
        if engine.is_idle:
            now_s = max(now_s, waiting[0].arrived_s)
        while waiting and waiting[0].arrived_s <= now_s:
            engine.add(waiting.pop(0))
        until_s = waiting[0].arrived_s if waiting else float("inf")
        if skips:
            now_s = engine.skip(now_s, until_s)
            if now_s >= until_s:
                continue
        step = engine.step(now_s)
        now_s += step.duration_s
        assert step.prompt_tokens + step.decode_sequences <= config.max_batched_tokens
        assert len(step.produced) <= config.max_num_seqs
        assert 0 <= engine.free_blocks <= engine.total_blocks
        if step.started or step.finished or step.preempted or step.admitted or step.cached:
            events.append((now_s, step.started, step.finished, step.preempted, step.admitted, step.cached))
    return events, engine


@settings(max_examples=200, deadline=None)
@given(arrivals(), st.sampled_from([1, 4, 16]), st.integers(1, 5), st.integers(0, 30), st.booleans())
def test_skipping_is_stepping(
    requests: list[SequenceRequest], block_size: int, seqs: int, more_blocks: int, cached: bool
) -> None:
    config = SimulatorConfig(
        step_per_context_token_s=1e-6,
        block_size=block_size,
        num_gpu_blocks_override=blocks_for(120, block_size) + more_blocks,
        max_model_len=120,
        max_num_seqs=seqs,
        max_batched_tokens=seqs + 20,
        enable_prefix_caching=cached,
    )
    slow, fast = play(config, requests, skips=False), play(config, requests, skips=True)
    assert slow[0] == fast[0]
    for name in ("steps", "peak_blocks", "block_seconds", "prefix_queries", "prefix_hits", "free_blocks"):
        assert getattr(slow[1], name) == getattr(fast[1], name)
    assert fast[1].free_blocks == fast[1].total_blocks
    assert sorted(number for event in fast[0] for number in event[2]) == [request.id for request in requests]
    admitted = [number for event in fast[0] for number, _ in event[4]]
    assert admitted == sorted(admitted)


def test_skipping_stops_where_something_happens() -> None:
    engine = Engine(replace(SMALL, kv_capacity_tokens=128, max_model_len=128))
    engine.add(SequenceRequest(0, 8, 100))
    assert engine.skip(0.0, 10.0) == 0.0  # the prompt is not computed
    engine.step(0.0)
    assert engine.skip(1.0, 1.0) == 1.0
    assert engine.skip(1.0, 2.0) == 2.5  # steps of 0.75 s that start at 1 and at 1.75
    assert engine.generated_tokens(0) == 3
    engine.add(SequenceRequest(1, 8, 1))
    assert engine.skip(2.5, 9.0) == 2.5  # the other could be admitted
    engine.step(2.5)
    engine.skip(3.0, float("inf"))
    assert engine.generated_tokens(0) == 99  # the step that ends it is not skipped
    assert engine.step(0.0).finished == (0,)
    assert engine.generated_tokens(0) is None
