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
