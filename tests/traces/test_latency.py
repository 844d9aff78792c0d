"""Latency and goodput against numpy and rows worked by hand."""

from __future__ import annotations

import csv
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces.test_burstgpt import real_head
from traces.batch import batch_from_records
from traces.codec import read_trace
from traces.latency import LatencyReport, describe_latency, goodput, percentiles
from traces.record import Outcome, TraceRecord
from traces.table import collect


def table(*rows: TraceRecord) -> pl.DataFrame:
    return collect([batch_from_records(rows)] if rows else []).table


def record(received_at: float, outcome: Outcome = Outcome.OK, **fields: Any) -> TraceRecord:
    return TraceRecord("r", received_at, outcome=outcome, **fields)


def test_goodput_worked_by_hand() -> None:
    rows = [
        record(0, ttft_s=0.5, tpot_s=0.01),
        record(1, ttft_s=1.0),  # one token: no TPOT to exceed; the bound itself is within
        record(2, ttft_s=1.5, tpot_s=0.5),  # late twice
        record(12, Outcome.TRUNCATED, ttft_s=0.1),
        record(13),  # nothing known
    ]
    found = goodput(table(*rows), {"ttft_s": 1.0, "tpot_s": 0.1}, 10.0)
    assert (found.requests, found.good, found.failed, found.unjudged) == (5, 2, 1, 1)
    assert found.late == {"ttft_s": 1, "tpot_s": 1}
    assert found.share == 2 / 4
    assert [(each.start_s, each.good, each.goodput_rps, each.share) for each in found.over_time] == [
        (0, 2, 0.2, 2 / 3),
        (10, 0, 0.0, 0.0),
    ]


@pytest.mark.parametrize("bounds_s", [{"speed": 1.0}, {"ttft_s": 0.0}, {"ttft_s": float("nan")}])
def test_a_wrong_objective_is_named(bounds_s: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="objectives"):
        describe_latency(table(record(0)), bounds_s=bounds_s)
    with pytest.raises(ValueError, match="wider than 0"):
        describe_latency(table(record(0)), bin_s=-1.0)


def test_an_empty_trace_has_no_latency() -> None:
    nothing = dict.fromkeys(("ttft_s", "tpot_s", "elapsed_s", "queue_s"))
    assert describe_latency(table()) == LatencyReport(nothing, None, (), None, None)


seconds = st.none() | st.floats(0, 1e5, width=32)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.builds(record, st.integers(0, 50), st.sampled_from(Outcome), ttft_s=seconds, elapsed_s=seconds), max_size=40
    )
)
def test_bins_hold_all_rows_and_numpys_percentiles(rows: list[TraceRecord]) -> None:
    load = np.arange(len(rows)) % 5
    found = describe_latency(table(*rows), in_flight=load, bin_s=10.0, bounds_s={"ttft_s": 5.0})
    assert sum(each.requests for each in found.over_time) == len(rows)
    assert found.by_in_flight is not None
    assert sum(each.requests for each in found.by_in_flight) == len(rows)
    ok = [row for row in rows if row.outcome is Outcome.OK]
    for name in ("ttft_s", "elapsed_s"):
        known = [value for row in ok if (value := getattr(row, name)) is not None]
        figures = found.total[name]
        assert (figures.n if figures else 0) == len(known)
        if figures:
            assert figures.p90 == np.percentile(known, 90, method="inverted_cdf")
        for parts in (found.over_time, found.by_in_flight):
            assert sum(each.measures[name].n for each in parts if name in each.measures) == len(known)
    for each in found.over_time:
        here = [row.ttft_s for row in ok if row.ttft_s is not None and each.low <= row.received_at < each.high]
        assert ("ttft_s" in each.measures) == bool(here)
        if here:
            assert each.measures["ttft_s"].p99 == np.percentile(here, 99, method="inverted_cdf")
    assert found.goodput is not None
    assert found.goodput.good == sum(row.ttft_s is not None and row.ttft_s <= 5 for row in ok)
    assert sum(each.good for each in found.goodput.over_time) == found.goodput.good


def test_more_load_shows_as_more_latency() -> None:
    rng = np.random.default_rng(0)
    load = rng.integers(1, 101, 5000)
    rows = [record(float(at), elapsed_s=float(load[at] * 0.1)) for at in range(5000)]
    bins = describe_latency(table(*rows), in_flight=load).by_in_flight
    assert bins is not None
    assert len(bins) == 10
    for each in bins:
        assert each.measures["elapsed_s"].p50 == pytest.approx((each.low + each.high - 1) / 2 * 0.1, abs=0.2)


def test_what_is_not_finite_is_unknown() -> None:
    assert percentiles(np.array([np.nan, np.inf])) is None


def test_real_head_equals_plain_counting() -> None:
    path = real_head("BurstGPT_3_head.csv")
    with path.open(newline="") as text:
        rows = [row for row in csv.DictReader(text) if row["Response tokens"] != "0"]
    elapsed = sorted(float(row["Elapsed time"]) for row in rows)
    figures = describe_latency(collect(read_trace(path)).table).total["elapsed_s"]
    assert figures is not None
    assert [figures.n, figures.mean] == pytest.approx([len(elapsed), sum(elapsed) / len(elapsed)])
    assert (figures.p50, figures.max) == (elapsed[(len(elapsed) + 1) // 2 - 1], elapsed[-1])
