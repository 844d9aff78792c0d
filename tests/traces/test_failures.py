"""Failures: intervals against scipy, groups and runs against plain Python, alerts against minutes worked by hand."""

from __future__ import annotations

import csv
import math
from collections import Counter
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from tests.traces.test_burstgpt import real_head
from traces import failures as module
from traces.batch import batch_from_records, complete_batch
from traces.codec import read_trace
from traces.failures import (
    GROUPED,
    BurnRule,
    Contrast,
    Run,
    availability,
    bin_width_s,
    by_cause,
    by_hour,
    by_load,
    by_request_tokens,
    by_value,
    contrast_of,
    describe_failures,
    failure_runs,
    inside,
    over_time,
    rate,
    runs_by_upstream,
    wasted_tokens,
    wilson,
)
from traces.record import Outcome, TraceRecord
from traces.table import collect


def table(*rows: TraceRecord) -> pl.DataFrame:
    return collect([batch_from_records(rows)] if rows else []).table


def record(received_at: float, outcome: Outcome = Outcome.OK, **fields: Any) -> TraceRecord:
    return TraceRecord("r", received_at, outcome=outcome, **fields)


@settings(max_examples=100)
@given(n=st.integers(1, 10**7), share=st.floats(0, 1))
def test_wilson_is_scipys_and_holds_the_share(n: int, share: float) -> None:
    k = round(share * n)
    low, high = wilson(k, n)
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert [low, high] == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert 0 <= low <= k / n <= high <= 1


def test_odds_ratio_is_scipys() -> None:
    found = contrast_of(rate(100, 30), rate(400, 20))
    expected = stats.contingency.odds_ratio([[30, 70], [20, 380]], kind="sample")
    interval = expected.confidence_interval(0.95)
    assert found.odds_ratio == pytest.approx(expected.statistic)
    assert [found.low, found.high] == pytest.approx([interval.low, interval.high])
    assert not found.is_corrected


@pytest.mark.parametrize(
    ("inside_rate", "outside_rate", "odds_ratio"),
    [
        (rate(10, 0), rate(20, 5), (0.5 / 10.5) / (5.5 / 15.5)),
        (rate(10, 10), rate(20, 5), (10.5 / 0.5) / (5.5 / 15.5)),
        (rate(10, 0), rate(20, 0), (0.5 / 10.5) / (0.5 / 20.5)),
    ],
)
def test_an_empty_cell_is_corrected(inside_rate: Any, outside_rate: Any, odds_ratio: float) -> None:
    found = contrast_of(inside_rate, outside_rate)
    assert found.is_corrected
    assert found.odds_ratio == pytest.approx(odds_ratio)
    assert found.low is not None
    assert found.high is not None
    assert found.low < odds_ratio < found.high


def test_one_side_alone_has_no_odds() -> None:
    assert contrast_of(rate(0, 0), rate(5, 1)) == Contrast(rate(0, 0), rate(5, 1), None, None, None, is_corrected=False)


names = st.sampled_from(["a", "b", None])
rows = st.lists(
    st.builds(
        record,
        st.floats(-1e6, 2e9),
        st.sampled_from(Outcome),
        model=names,
        upstream=names,
        error_type=names,
        status=st.sampled_from([200, 429, None]),
        request_tokens=st.none() | st.integers(0, 2**31 - 1),
        response_tokens=st.none() | st.integers(0, 9),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(rows=rows, most=st.sampled_from([1, 100]))
def test_every_breakdown_adds_up_to_the_whole(rows: list[TraceRecord], most: int) -> None:
    whole = table(*rows)
    failed = sum(row.outcome is not Outcome.OK for row in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_GROUPS", most)
        load = np.arange(len(rows)) % 4
        report = describe_failures(whole, in_flight=load, arrival_rate_rps=load / 3, episodes=np.array([[0.0, 1e9]]))
    breakdowns: list[tuple[Any, ...]] = [*report.by.values(), report.by_hour]
    for parts in [*breakdowns, report.by_request_tokens, report.over_time]:
        assert sum(part.requests.requests for part in parts) == len(rows)
        assert sum(part.requests.failures for part in parts) == failed
    for parts in report.causes.values():
        assert sum(part.requests.failures for part in parts) == failed
        assert all(part.requests.requests == len(rows) for part in parts)
    assert report.by_in_flight is not None
    assert sum(span.requests.requests for span in report.by_in_flight.bins) == len(rows)
    assert report.bursts is not None
    assert report.bursts.inside.failures + report.bursts.outside.failures == failed
    assert report.bursts.inside.requests == sum(0 <= row.received_at < 1e9 for row in rows)
    assert report.availability.valid + report.availability.excluded == len(rows)
    assert report.wasted.response_tokens == sum(
        row.response_tokens or 0 for row in rows if row.outcome is not Outcome.OK
    )


@settings(deadline=None, max_examples=40)
@given(rows=rows, seed=st.integers(0, 99))
def test_groups_do_not_depend_on_the_order_of_rows(rows: list[TraceRecord], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    a, b = table(*rows), table(*(rows[i] for i in order))
    assert [by_value(a, column) for column in GROUPED] == [by_value(b, column) for column in GROUPED]
    assert [set(by_cause(a, "outcome")), by_request_tokens(a), wasted_tokens(a)] == [
        set(by_cause(b, "outcome")),
        by_request_tokens(b),
        wasted_tokens(b),
    ]


def test_length_bins_double_and_unknown_is_last() -> None:
    rows = [record(0, request_tokens=tokens) for tokens in (0, 1, 2, 3, 4, 7, 8, 2**31 - 1, None)]
    assert [(span.low, span.high, span.requests.requests) for span in by_request_tokens(table(*rows))] == [
        (0, 1, 1),
        (1, 2, 1),
        (2, 4, 2),
        (4, 8, 2),
        (8, 16, 1),
        (2**30, 2**31, 1),
        (None, None, 1),
    ]


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Asia/Kathmandu", "America/St_Johns"])
def test_hours_are_those_of_the_zone_over_a_change_of_clocks(zone: str) -> None:
    import datetime

    stamps_s = np.arange(1_729_900_000.0, 1_730_900_000.0, 1234.5)  # Berlin's clocks go back on 2024-10-27
    found = by_hour(table(*(record(float(at)) for at in stamps_s)), zone)
    clock = ZoneInfo(zone)
    expected = Counter(f"{datetime.datetime.fromtimestamp(at, clock).hour:02}" for at in stamps_s)
    assert {group.name: group.requests.requests for group in found} == expected
    with pytest.raises(ValueError, match="IANA name"):
        by_hour(table(record(0.0)), "Mars/Olympus")


@settings(deadline=None, max_examples=80)
@given(load=st.lists(st.integers(0, 20) | st.just(math.nan), max_size=60), seed=st.integers(0, 9))
def test_load_bins_hold_what_their_edges_say(load: list[float], seed: int) -> None:
    values = np.array(load, dtype=np.float64)
    failed = np.random.default_rng(seed).random(len(values)) < 0.4
    bins = by_load(failed, values).bins
    assert len(bins) <= 10
    assert sum(span.requests.requests for span in bins) == np.count_nonzero(np.isfinite(values))
    for number, span in enumerate(bins):
        assert span.low is not None
        assert span.high is not None
        here = (values >= span.low) & ((values < span.high) | ((number == len(bins) - 1) & (values == span.high)))
        assert span.requests.requests == np.count_nonzero(here) > 0
        assert span.requests.failures == np.count_nonzero(here & failed)


def test_deciles_of_different_values_are_of_equal_size() -> None:
    load = np.random.default_rng(0).permutation(1000).astype(np.float64)
    effect = by_load(load >= 950, load)
    assert [span.requests.requests for span in effect.bins] == [100] * 10
    assert effect.highest is not None
    assert (effect.highest.inside.failures, effect.highest.outside.failures) == (50, 0)


def test_a_stamp_is_inside_from_the_start_to_before_the_end() -> None:
    stamps_s = np.array([0.0, 1, 2, 2, 3, 4, 9])
    episodes = np.array([[1.0, 3.0], [2.0, 4.0], [100.0, 200.0]])
    assert inside(stamps_s, episodes).tolist() == [False, True, True, True, True, False, False]
    assert not inside(stamps_s, np.empty((0, 2))).any()


def test_runs_worked_by_hand() -> None:
    flags = [1, 0, 1, 1, 1, 0, 0, 1]
    found = failure_runs(np.arange(0, 80, 10, dtype=np.float64), np.array(flags, dtype=np.bool_), "u")
    assert (found.runs, found.longest, found.requests.failures) == (3, 3, 5)
    assert found.listed == (Run(0, 10, 1), Run(20, 50, 3), Run(70, None, 1))
    assert (found.mttr_s, found.max_recovery_s) == (20, 30)
    assert found.mtbf_s == (70 - 10 - 30) / 3
    long = failure_runs(np.arange(0, 80, 10, dtype=np.float64), np.array(flags, dtype=np.bool_), "u", min_failures=2)
    assert (long.runs, long.listed) == (1, (Run(20, 50, 3),))


@pytest.mark.parametrize(("flags", "runs"), [([], 0), ([0, 0], 0), ([1, 1], 1)])
def test_runs_without_a_recovery(flags: list[int], runs: int) -> None:
    found = failure_runs(np.zeros(len(flags)), np.array(flags, dtype=np.bool_))
    assert (found.runs, found.mttr_s, found.max_recovery_s) == (runs, None, None)
    assert found.mtbf_s == (0.0 if runs else None)


@settings(deadline=None, max_examples=60)
@given(flags=st.lists(st.booleans(), max_size=60))
def test_runs_are_itertools_groups(flags: list[bool]) -> None:
    from itertools import groupby

    found = failure_runs(np.arange(len(flags), dtype=np.float64), np.array(flags, dtype=np.bool_))
    sizes = [len(list(group)) for key, group in groupby(flags) if key]
    assert (found.runs, found.longest) == (len(sizes), max(sizes, default=0))
    if len(sizes) <= module.MAX_RUNS:
        assert [run.failures for run in found.listed] == sizes


@pytest.mark.parametrize("seed", range(5))
def test_runs_of_a_chain_have_its_times(seed: int) -> None:
    """A request a second, up and down by a Markov chain: geometric times of mean 1 / chance, CV near 1."""
    rng, n, fails, recovers = np.random.default_rng(seed), 200_000, 0.02, 0.25
    draws, state = rng.random(n), False
    flags = np.empty(n, dtype=np.bool_)
    for at in range(n):
        state = draws[at] >= recovers if state else draws[at] < fails
        flags[at] = state
    found = failure_runs(np.arange(n, dtype=np.float64), flags)
    runs = n * fails * recovers / (fails + recovers)
    assert found.runs == pytest.approx(runs, rel=4.5 / math.sqrt(runs))
    assert found.mttr_s == pytest.approx(1 / recovers, rel=4.5 / math.sqrt(runs))
    assert found.mtbf_s == pytest.approx(1 / fails, rel=4.5 / math.sqrt(runs))
    # A run is longer than k with a chance of 0.75^k: the longest of 3,700 has about 29, 17 to 60 but once in 10^4.
    assert 17 < found.longest < 60


@pytest.mark.parametrize("share", [0.0005, 0.02])
def test_a_steady_share_of_failures_burns_its_multiple_of_the_budget(share: float) -> None:
    """3,600 requests an hour, of which exactly `share` fail, evenly spread."""
    n, slo = 400_000, 0.999
    stamps_s = np.arange(n, dtype=np.float64)
    failed = np.arange(1, n + 1) % round(1 / share) == 0
    rows = pl.DataFrame({"received_at": stamps_s, "outcome": np.where(failed, "truncated", "ok")})
    found = availability(collect([complete_batch(rows.with_columns(request_id=pl.lit("r")))]).table, slo)
    assert found.budget_used == pytest.approx(share / (1 - slo))
    for alert in found.alerts:
        assert alert.burn_at_end == pytest.approx(share / (1 - slo), rel=0.45 if share < 0.001 else 0.02)
        assert bool(alert.episodes) == (share / (1 - slo) > alert.rule.burn_rate)


@pytest.mark.parametrize("truth", [1.0, 4.0])
def test_odds_intervals_cover_the_truth_as_often_as_they_say(truth: float) -> None:
    """Of 2,000 draws; at 95 % the standard error of the share is 0.005."""
    rng, outside = np.random.default_rng(5), 0.05
    inside_share = truth * outside / (1 - outside + truth * outside)
    covered = 0
    for a, b in zip(rng.binomial(500, inside_share, 2000), rng.binomial(5000, outside, 2000), strict=True):
        found = contrast_of(rate(500, int(a)), rate(5000, int(b)))
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_upstreams_have_runs_of_their_own() -> None:
    bad = Outcome.CONNECT_ERROR
    rows = [record(at, bad if at % 2 else Outcome.OK, upstream="ab"[at % 2]) for at in range(6)]
    whole, a, b = runs_by_upstream(table(*rows))
    assert (whole.name, whole.runs, whole.longest) == (None, 3, 1)
    assert (a.name, a.runs) == ("a", 0)
    assert (b.name, b.runs, b.longest) == ("b", 1, 3)


def test_availability_leaves_out_the_clients_own_failures() -> None:
    rows = [record(at) for at in range(997)]
    rows += [record(1000, Outcome.UPSTREAM_ERROR)] * 3 + [record(1001, Outcome.INVALID_REQUEST)] * 50
    found = availability(table(*rows), 0.999)
    assert (found.valid, found.bad, found.excluded) == (1000, 3, 50)
    assert (found.availability, found.budget, found.is_met) == (0.997, 1, False)
    assert found.budget_used == 3
    assert availability(table(*rows), 0.997).is_met  # 3 of 1,000 are just within it
    assert availability(table(), 0.9).is_met is None
    with pytest.raises(ValueError, match="slo: expected"):
        availability(table(), 1.0)


def test_a_burn_alert_needs_both_windows() -> None:
    def minute(number: int, failures: int) -> list[TraceRecord]:
        at = number * 60.0 + 5
        return [record(at, Outcome.UPSTREAM_ERROR if i < failures else Outcome.OK) for i in range(10)]

    rule = BurnRule("page", 2.0, 300.0, 120.0)
    share = {10: 10, 11: 10, 40: 10}  # two bad minutes together, and one, among good ones
    rows = [row for number in range(60) for row in minute(number, share.get(number, 0))]
    (alert,) = availability(table(*rows), 0.9, [rule]).alerts
    # Long window of five minutes: one bad minute is 20 % of it, a burn of 2; the short one clears two minutes later.
    assert alert.episodes == ((600.0, 780.0), (2400.0, 2520.0))
    assert [alert.burn_max, alert.burn_at_end] == pytest.approx([4, 0])
    apart = [*minute(0, 10), *minute(500, 10)]
    assert availability(table(*apart), 0.9, [rule]).alerts[0].episodes == ((0.0, 60.0), (30_000.0, 30_060.0))


def test_time_bins_are_multiples_of_their_width() -> None:
    found = over_time(np.array([-1.0, 0, 9, 10, 35]), np.array([True, False, True, False, False]), 10.0)
    assert [(span.low, span.high, span.requests.requests, span.requests.failures) for span in found] == [
        (-10, 0, 1, 1),
        (0, 10, 2, 1),
        (10, 20, 1, 0),
        (30, 40, 1, 0),
    ]
    with pytest.raises(ValueError, match="wider than 0"):
        over_time(np.empty(0), np.empty(0, dtype=np.bool_), 0.0)


@given(span_s=st.floats(0, 1e12))
def test_time_bins_are_few(span_s: float) -> None:
    assert span_s / bin_width_s(span_s) + 1 <= 500


@pytest.mark.parametrize("name", ["BurstGPT_1_head.csv", "BurstGPT_3_head.csv"])
def test_real_heads_equal_plain_counting(name: str) -> None:
    path = real_head(name)
    with path.open(newline="") as text:
        rows = list(csv.DictReader(text))
    report = describe_failures(collect(read_trace(path)).table)
    bad = [row for row in rows if row["Response tokens"] == "0"]
    p, n, z = len(bad) / len(rows), len(rows), 1.959963984540054
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert (report.total.failures, report.total.rate) == (len(bad), p)
    assert report.total.low == pytest.approx((p + z * z / (2 * n)) / (1 + z * z / n) - half)
    for column, groups in (("Model", report.by["model"]), ("Log Type", report.by["log_type"])):
        assert {each.name: each.requests.requests for each in groups} == Counter(row[column] for row in rows)
        assert {each.name: each.requests.failures for each in groups if each.requests.failures} == Counter(
            row[column] for row in bad
        )
    hours = Counter(f"{int(float(row['Timestamp'])) // 3600 % 24:02}" for row in rows)
    assert {each.name: each.requests.requests for each in report.by_hour} == hours
    flags = [row["Response tokens"] == "0" for row in sorted(rows, key=lambda row: float(row["Timestamp"]))]
    longest = max(map(len, "".join("x" if flag else " " for flag in flags).split()), default=0)
    assert report.runs[0].longest == longest
