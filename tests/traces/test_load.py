from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces.test_burstgpt import real_head
from traces.batch import batch_from_records
from traces.codec import read_trace
from traces.load import arrival_rates_rps, in_flight_at_arrivals, load_over_time
from traces.record import TraceRecord
from traces.table import collect

Rows = Sequence[tuple[float, float | None]]
# Quarters of a second: ties of every kind happen, and sums are exact.
ROWS = st.lists(st.tuples(st.integers(0, 60).map(lambda n: n / 4), st.none() | st.integers(0, 80).map(lambda n: n / 4)))


def table_of(rows: Rows, **fields: Any) -> pl.DataFrame:
    records = [TraceRecord(request_id="r", received_at=at, elapsed_s=elapsed_s, **fields) for at, elapsed_s in rows]
    return collect([batch_from_records(records)]).table


def in_flight(rows: Rows, at_s: float) -> int:
    return sum(elapsed_s is not None and start_s <= at_s < start_s + elapsed_s for start_s, elapsed_s in rows)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        ([(0, 5)], [0]),
        ([(0, 5), (1, 5), (2, 1)], [0, 1, 2]),
        ([(0, 2), (2, 1)], [0, 0]),  # one ends as the other begins
        ([(0, 2), (0, 2), (0, None), (0, 2)], [0, 1, 2, 2]),  # of equal stamps; unknown is not in flight
        ([(0, 0), (0, 0), (0, 1), (0, 0)], [0, 0, 0, 1]),  # 0 s is no time
        ([(1e9, 1e-9), (1e9, 1)], [0, 0]),  # lost in a stamp's rounding
    ],
)
def test_in_flight_at_arrivals(rows: Rows, expected: list[int]) -> None:
    assert in_flight_at_arrivals(table_of(rows)).tolist() == expected


@settings(max_examples=80, deadline=None)
@given(ROWS)
def test_in_flight_equals_counting_each_pair(rows: Rows) -> None:
    rows = sorted(rows, key=lambda row: row[0])
    expected = [in_flight(rows[:place], at) for place, (at, _) in enumerate(rows)]
    assert in_flight_at_arrivals(table_of(rows)).tolist() == expected


@settings(max_examples=80, deadline=None)
@given(ROWS, st.integers(1, 30))
def test_bins_hold_the_exact_mean_and_the_exact_maximum(rows: Rows, most_bins: int) -> None:
    load = load_over_time(table_of(rows, request_tokens=3, response_tokens=4), most_bins=most_bins)
    timed = [(at, elapsed_s) for at, elapsed_s in rows if elapsed_s]
    if not timed:
        assert load is None
        return
    assert load is not None
    assert (load.timed, load.untimed) == (
        sum(elapsed_s is not None for _, elapsed_s in rows),
        sum(elapsed_s is None for _, elapsed_s in rows),
    )
    start_s, end_s = min(at for at, _ in rows), max(at + elapsed_s for at, elapsed_s in timed)
    assert load.start_s == start_s
    instants = sorted({at for at, _ in timed} | {at + elapsed_s for at, elapsed_s in timed})
    for number, (mean, most) in enumerate(zip(load.requests.mean, load.requests.max, strict=True)):
        begin_s, until_s = start_s + number * load.bin_s, min(start_s + (number + 1) * load.bin_s, end_s)
        busy_s = sum(max(0.0, min(at + elapsed_s, until_s) - max(at, begin_s)) for at, elapsed_s in timed)
        if until_s - begin_s > 1e-6:
            assert mean == pytest.approx(busy_s / (until_s - begin_s), abs=1e-9)
            inside = [begin_s, *(at for at in instants if begin_s <= at < until_s - 1e-9)]
            assert most == max(in_flight(timed, at) for at in inside)
    assert load.requests.overall_max == max(in_flight(timed, at) for at, _ in timed)
    assert load.requests.overall_mean == pytest.approx(sum(elapsed_s for _, elapsed_s in timed) / (end_s - start_s))
    assert load.tokens.max == tuple(7 * most for most in load.requests.max)
    assert load.tokens.mean == pytest.approx([7 * mean for mean in load.requests.mean])
    assert len(load.requests.mean) <= most_bins or load.bin_s == 1


@pytest.mark.parametrize(
    ("stamps", "expected"),
    [
        ([], []),
        ([5], [0]),
        ([0, 0, 1, 2, 12], [0, 0.1, 0.2, 0.3, 0.0]),  # 2 is not in (2, 12]
        ([0, 9.5, 10], [0, 0.1, 0.1]),
    ],
)
def test_arrival_rates(stamps: list[float], expected: list[float]) -> None:
    assert arrival_rates_rps(np.array(stamps, dtype=np.float64), 10).tolist() == pytest.approx(expected)


def test_little_s_law_on_a_queue_without_a_queue() -> None:
    """M/M/inf: the number in flight that an arrival sees is Poisson with mean rate * mean time (PASTA)."""
    rng = np.random.default_rng(5)
    stamps_s = np.cumsum(rng.exponential(0.1, 60_000))
    rows: Rows = list(zip(stamps_s.tolist(), rng.exponential(2.0, 60_000).tolist(), strict=True))
    seen = in_flight_at_arrivals(table_of(rows))[500:]
    # A busy period forgets in 2 s, that is 20 arrivals: variance of the mean 20 * (2 * 20) / n; 5 standard errors.
    assert seen.mean() == pytest.approx(20, abs=5 * (20 * 40 / len(seen)) ** 0.5)
    assert seen.var() == pytest.approx(20, rel=0.12)


def test_a_real_head() -> None:
    path = real_head("BurstGPT_3_head.csv")
    with path.open(newline="") as text:
        rows: Rows = [(float(row["Timestamp"]), float(row["Elapsed time"])) for row in csv.DictReader(text)]
    table = collect(read_trace(path)).table
    ordered = sorted(rows, key=lambda row: row[0])
    expected = [in_flight(ordered[:place], at) for place, (at, _) in enumerate(ordered)]
    assert in_flight_at_arrivals(table).tolist() == expected
    load = load_over_time(table)
    assert load is not None
    assert load.requests.overall_max == max(expected) + 1
    span_s = max(at + (elapsed_s or 0) for at, elapsed_s in rows) - ordered[0][0]
    assert load.requests.overall_mean == pytest.approx(sum(elapsed_s or 0 for _, elapsed_s in rows) / span_s)
