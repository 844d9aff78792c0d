from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.schedule import PlanOptions
from replay.simulator.config import SimulatorConfig
from replay.simulator.report import as_json, as_text
from replay.simulator.virtual import SimulatedRequest, VirtualOptions, VirtualSummary, simulate, split_blocks
from traces.batch import complete_batch
from traces.record import Outcome

TRACES = Path(os.environ.get("BURSTGATE_TRACES") or Path(__file__).parents[3] / "shared" / "traces")
SMALL = SimulatorConfig(
    prefill_tokens_per_s=1000.0,
    step_base_s=0.5,
    step_per_seq_s=0.25,
    kv_capacity_tokens=64,
    max_num_seqs=2,
    max_batched_tokens=32,
    max_model_len=64,
)


def trace(
    at_s: Sequence[float],
    request_tokens: Sequence[int | None],
    response_tokens: Sequence[int | None],
    prefix_blocks: Sequence[Any] | None = None,
) -> pl.DataFrame:
    columns: dict[str, Any] = {
        "request_id": [f"{row:032x}" for row in range(len(at_s))],
        "received_at": [float(each) for each in at_s],
        "model": "m",
        "request_tokens": request_tokens,
        "response_tokens": response_tokens,
        "outcome": "ok",
        "log_type": "API log",
    }
    if prefix_blocks is not None:
        columns["prefix_blocks"] = pl.Series(prefix_blocks, dtype=pl.List(pl.UInt64()))
    return complete_batch(pl.DataFrame(columns))


def run(
    frame: pl.DataFrame, config: SimulatorConfig = SMALL, **options: Any
) -> tuple[list[SimulatedRequest], VirtualSummary]:
    ended: list[SimulatedRequest] = []
    plan = options.pop("plan", PlanOptions(ties="keep"))
    return ended, simulate([frame], config, VirtualOptions(plan=plan, **options), ended.append)


def test_one_request_is_a_closed_form() -> None:
    # Prompt of 40 on a budget of 32: 0.5 + 0.032, 0.5 + 0.008; then 9 steps of 0.75 s.
    (ended,), summary = run(trace([7.0], [40], [10]))
    assert ended == SimulatedRequest(
        index=0,
        due_s=0.0,
        queue_s=0.0,
        ttft_s=1.04,
        tpot_s=0.75,
        e2e_s=1.04 + 9 * 0.75,
        request_tokens=40,
        response_tokens=10,
        response_tokens_asked=10,
        cached_tokens=0,
        preemptions=0,
        outcome=Outcome.OK,
    )
    assert (summary.requests, summary.ok, summary.failures, summary.steps) == (1, 1, {}, 11)
    assert summary.span_s == pytest.approx(7.79)
    assert summary.offered_rps is None
    assert (summary.max_running, summary.max_waiting, summary.kv_usage_peak) == (1, 1, 1.0)
    # 3 of 4 blocks, and the fourth for the token that is computed from place 48 on: the last of the 9 steps.
    assert summary.kv_usage_mean == pytest.approx((0.75 * 7.04 + 0.75) / 7.79)
    assert summary.prefix_hit_rate is None


def test_a_single_token_has_no_tpot() -> None:
    ended, summary = run(trace([0.0], [10], [1]))
    assert (ended[0].tpot_s, summary.tpot_s) == (None, None)
    assert ended[0].ttft_s == ended[0].e2e_s == pytest.approx(0.51)


def test_a_request_waits_for_the_step_that_runs() -> None:
    # The second comes 0.1 s into the first one's prefill of 0.51 s.
    ended, _ = run(trace([0.0, 0.1], [10, 10], [1, 1]))
    assert [each.queue_s for each in ended] == pytest.approx([0.0, 0.41])
    assert [each.ttft_s for each in ended] == pytest.approx([0.51, 0.41 + 0.51])


def test_speed_divides_the_gaps() -> None:
    for speed in (1.0, 4.0):
        ended, _ = run(trace([0.0, 400.0], [10, 10], [1, 1]), plan=PlanOptions(ties="keep", speed=speed))
        assert [each.due_s for each in ended] == [0.0, 400.0 / speed]
        assert [each.e2e_s for each in ended] == pytest.approx([0.51, 0.51])


def test_rows_that_can_not_be_sent_are_counted() -> None:
    ended, summary = run(trace([0, 1, 2, 3], [10, None, 0, 10], [1, 5, 5, None]))
    assert (len(ended), summary.rows_read, summary.not_sent, summary.requests) == (1, 4, 3, 1)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_do(rows: int) -> None:
    ended, summary = run(trace(list(range(rows)), [None] * rows, [None] * rows))
    assert (ended, summary.requests, summary.span_s, summary.ttft_s, summary.steps) == ([], 0, 0.0, None, 0)
    assert "- offered" in as_text(summary, SMALL, 0.0)


def test_a_request_too_long_for_the_model_is_refused() -> None:
    ended, summary = run(trace([0, 0], [60, 60], [4, 5]))
    assert [(each.index, each.outcome) for each in ended] == [(1, Outcome.INVALID_REQUEST), (0, Outcome.OK)]
    assert summary.failures == {"invalid_request": 1}


def test_a_full_queue_refuses() -> None:
    config = replace(SMALL, max_num_seqs=1, max_num_waiting=2)
    ended, summary = run(trace([0, 0, 0, 0, 5], [10] * 5, [1] * 5), config)
    assert summary.failures == {"rejected": 2}
    refused = [each for each in ended if each.outcome is Outcome.REJECTED]
    assert [(each.index, each.ttft_s, each.e2e_s, each.queue_s) for each in refused] == [
        (2, None, 0.0, None),
        (3, None, 0.0, None),
    ]
    assert summary.max_waiting == 2


def test_a_client_that_leaves() -> None:
    # One of 100 steps each; the second waits behind it and leaves without a token, the first while it decodes.
    config = replace(SMALL, max_num_seqs=1, kv_capacity_tokens=128, max_model_len=128)
    ended, summary = run(trace([0, 0, 20], [10, 10, 10], [100, 100, 2]), config, timeout_s=10.0)
    assert summary.failures == {"upstream_timeout": 2}
    first, second, third = ended
    assert (first.index, first.e2e_s, first.tpot_s) == (0, 10.0, None)
    assert first.ttft_s == pytest.approx(0.51)
    assert first.response_tokens == 1 + 13  # the 13th step of 0.75 s ends at 10.26 s
    assert (second.index, second.e2e_s, second.ttft_s, second.queue_s, second.response_tokens) == (
        1,
        10.0,
        None,
        None,
        0,
    )
    assert (third.index, third.outcome) == (2, Outcome.OK)
    assert summary.ttft_s is not None
    assert summary.ttft_s.count == 1


def test_a_client_that_leaves_during_the_last_step() -> None:
    ended, _ = run(trace([0], [10], [1]), timeout_s=0.4)
    assert [(each.outcome, each.e2e_s, each.ttft_s) for each in ended] == [(Outcome.UPSTREAM_TIMEOUT, 0.4, None)]
    ended, _ = run(trace([0], [10], [1]), timeout_s=0.51)
    assert ended[0].outcome is Outcome.OK


def test_preemptions_are_counted_by_request() -> None:
    config = replace(SMALL, max_batched_tokens=64)
    ended, summary = run(trace([0, 0], [32, 32], [2, 2]), config)
    assert [(each.index, each.preemptions) for each in ended] == [(0, 0), (1, 1)]
    assert (summary.preemptions, summary.preempted_requests) == (1, 1)
    assert ended[1].e2e_s == pytest.approx(0.564 + 0.75 + 0.533)
    assert ended[1].ttft_s == pytest.approx(0.564)  # its first token was not taken back


# --- prefixes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "prompt_tokens", "blocks"),
    [
        ([], 100, 0),
        ([1, 2], 64, 4),
        ([1, 2], 63, 3),
        ([1, 2], 1000, 4),  # named for 64 tokens only
        ([1], 3, 0),
    ],
)
def test_split_blocks(named: list[int], prompt_tokens: int, blocks: int) -> None:
    assert len(split_blocks(named, 32, 16, prompt_tokens)) == blocks


@given(
    st.lists(st.integers(0, 9) | st.integers(0, 2**64 - 1), max_size=6),
    st.lists(st.integers(0, 9) | st.integers(0, 2**64 - 1), max_size=6),
    st.sampled_from([8, 16, 24, 512]),
)
def test_equal_beginnings_have_equal_hashes(first: list[int], second: list[int], size: int) -> None:
    shared = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    shared = min(len(first), len(second)) if shared is None else shared
    left = split_blocks(first, size, 16, len(first) * size)
    right = split_blocks(second, size, 16, len(second) * size)
    same = shared * size // 16
    assert left[:same] == right[:same]
    assert not set(left[same:]) & set(right[same:])
    assert len(set(left)) == len(left)
    assert all(0 <= each < 2**64 for each in left)


@pytest.mark.parametrize("rows_a_batch", [1, 2, 100])
def test_prefixes_of_the_trace_are_found(rows_a_batch: int) -> None:
    """The rows keep their own blocks through windows, rows that are not sent and batches of any size."""
    config = replace(SMALL, kv_capacity_tokens=640, enable_prefix_caching=True)
    frame = trace(
        [0, 100, 200, 300, 400, 500],
        [40, 40, None, 40, 40, 40],
        [1, 1, 1, 1, 1, 1],
        [[1, 2, 3], [4, 5, 6], [7], None, [1, 2, 9], [4, 8]],
    )
    batches = [frame[at : at + rows_a_batch] for at in range(0, frame.height, rows_a_batch)]
    ended: list[SimulatedRequest] = []
    options = VirtualOptions(plan=PlanOptions(ties="keep"), hash_block_tokens=16)
    summary = simulate(batches, config, options, ended.append)
    assert [(each.index, each.cached_tokens) for each in ended] == [(0, 0), (1, 0), (3, 0), (4, 32), (5, 16)]
    assert summary.prefix_hit_rate == pytest.approx(48 / 200)
    options = VirtualOptions(plan=PlanOptions(ties="keep", start_s=100.0), hash_block_tokens=16)
    ended.clear()
    simulate(batches, config, options, ended.append)
    assert [(each.index, each.cached_tokens) for each in ended] == [(1, 0), (3, 0), (4, 0), (5, 16)]


# --- properties -----------------------------------------------------------------------------------------------------

workloads = st.lists(
    st.tuples(st.sampled_from([0.0, 0.0, 0.3, 4.0]), st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=25
)


@settings(max_examples=100, deadline=None)
@given(
    workloads,
    st.integers(1, 4),
    st.sampled_from([0, 1, 3]),
    st.one_of(st.none(), st.floats(0.1, 60.0)),
    st.integers(0, 20),
)
def test_every_request_ends_once_and_the_same_way_each_time(
    rows: list[tuple[float, int, int]], seqs: int, queue: int, timeout_s: float | None, seed: int
) -> None:
    frame = trace(np.cumsum([row[0] for row in rows]).tolist(), [row[1] for row in rows], [row[2] for row in rows])
    config = replace(SMALL, max_num_seqs=seqs, max_num_waiting=queue)
    plan = PlanOptions(seed=seed)
    ended, summary = run(frame, config, plan=plan, timeout_s=timeout_s)
    assert run(frame, config, plan=plan, timeout_s=timeout_s) == (ended, summary)
    assert sorted(each.index for each in ended) == list(range(len(rows)))
    assert (summary.requests, summary.ok + sum(summary.failures.values())) == (len(rows), len(rows))
    for each in ended:
        if each.outcome is Outcome.OK:
            assert each.response_tokens == each.response_tokens_asked
            assert each.queue_s is not None
            assert each.ttft_s is not None
            assert 0 <= each.queue_s < each.ttft_s <= each.e2e_s
        if timeout_s is not None:
            assert each.e2e_s <= timeout_s + 1e-9
    assert 0 <= summary.kv_usage_peak <= 1
    assert summary.kv_usage_mean is None or 0 <= summary.kv_usage_mean <= summary.kv_usage_peak + 1e-9


# --- the paper's finding, real traces -------------------------------------------------------------------------------


def bursty(shape: float, rate_rps: float, rows: int, seed: int) -> pl.DataFrame:
    """Gamma gaps of one mean rate; the lengths are the same for every shape."""
    rng = np.random.default_rng(seed)
    prompts, answers = rng.integers(50, 600, rows), rng.integers(20, 300, rows)
    gaps_s = rng.gamma(shape, 1 / (shape * rate_rps), rows)
    at_s = np.cumsum(gaps_s / gaps_s.mean() / rate_rps)
    return trace(at_s.tolist(), prompts.tolist(), answers.tolist())


@pytest.mark.parametrize("seed", range(3))
def test_burstier_arrivals_of_one_rate_raise_ttft_and_preemptions(seed: int) -> None:
    """The BurstGPT paper's finding: at an equal mean rate, burstiness is what the KV cache suffers from."""
    config = SimulatorConfig(kv_capacity_tokens=12_000, max_model_len=2048)
    summaries = []
    for shape in (1.0, 0.25):
        _, summary = run(bursty(shape, 8.0, 2000, seed), config)
        assert summary.offered_rps == pytest.approx(8.0, rel=0.02)
        summaries.append(summary)
    poisson, burst = summaries
    assert poisson.ttft_s is not None
    assert burst.ttft_s is not None
    assert burst.ttft_s.p99 > 1.5 * poisson.ttft_s.p99
    assert burst.preemptions > 1.5 * poisson.preemptions
    # The same bursts fill a bounded queue, and outlast the patience of clients.
    for bounded, timeout_s in ((replace(config, max_num_waiting=10), None), (config, 3.5)):
        calm, wild = (
            run(bursty(shape, 8.0, 2000, seed), bounded, timeout_s=timeout_s)[1].failures for shape in (1.0, 0.25)
        )
        assert sum(wild.values()) > 1.5 * sum(calm.values())


def test_a_hundred_seconds_take_less_than_one() -> None:
    """The bar is 100 x real time at 10 requests/s. An idle core does 1,300 x, so that a busy one passes too."""
    frame = bursty(1.0, 10.0, 2000, 0)
    began_s = time.perf_counter()
    _, summary = run(frame, SimulatorConfig())
    assert summary.span_s / (time.perf_counter() - began_s) > 100


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"{TRACES}: no real traces there (BURSTGATE_TRACES)")
def test_mooncake_s_prefixes_are_found_to_the_token() -> None:
    """A cache that forgets nothing hits exactly what the trace's own structure has, in whole blocks of 16."""
    from traces.codec import read_trace

    frame = next(read_trace(TRACES / "mooncake_conversation_trace.jsonl")).head(300)
    config = SimulatorConfig(
        prefill_tokens_per_s=1e6,
        enable_prefix_caching=True,
        kv_capacity_tokens=10_000_000,
        max_model_len=200_000,
    )
    ended, summary = run(frame, config)
    seen: set[tuple[int, int]] = set()
    expected = {}
    for index, (tokens, named) in enumerate(frame.select("request_tokens", "prefix_blocks").iter_rows()):
        blocks = [(named[at // 32], at % 32) for at in range(tokens // 16)]
        hits = next((at for at, block in enumerate(blocks) if block not in seen), len(blocks))
        expected[index] = 16 * min(hits, (tokens - 1) // 16)
        seen.update(blocks)
    assert {each.index: each.cached_tokens for each in ended} == expected
    assert summary.prefix_hit_rate is not None
    assert summary.prefix_hit_rate > 0.05
    assert summary.prefix_hit_rate == sum(expected.values()) / frame["request_tokens"].sum()


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"{TRACES}: no real traces there (BURSTGATE_TRACES)")
@pytest.mark.parametrize("name", ["BurstGPT_1_head.csv", "BurstGPT_3_head.csv"])
def test_a_head_of_burstgpt(name: str) -> None:
    from traces.codec import read_trace

    frame = pl.concat(list(read_trace(TRACES / name)))
    began_s = time.perf_counter()
    ended, summary = run(frame, SimulatorConfig(), plan=PlanOptions())
    assert time.perf_counter() - began_s < 1
    assert summary.rows_read == frame.height == 400
    assert summary.not_sent == frame.filter(pl.col("response_tokens").is_null()).height
    assert len(ended) == summary.ok + sum(summary.failures.values()) == 400 - summary.not_sent
    assert as_json(summary) == as_json(run(frame, SimulatorConfig(), plan=PlanOptions())[1])
