"""Comparisons: traces of known truth get the verdict they must, intervals cover it, distances are scipy's."""

from __future__ import annotations

import csv
import math
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from tests.traces.test_burstgpt import real_head
from traces.batch import complete_batch
from traces.codec import read_trace
from traces.compare import Axis, Comparison, Difference, Options, Verdict, compare
from traces.table import collect

LENIENT = Options(arrival_tolerance=0.3, length_tolerance=0.1)
"""A dispersion over 500 minutes has a standard error of 6 %, a 99th percentile of 60,000 lengths one of 2 %."""
SAME, DIFFERENT, UNKNOWN = Verdict.SAME, Verdict.DIFFERENT, Verdict.UNKNOWN


def trace(seed: int, n: int = 20_000, *, rate_rps: float = 2.0, shape: float = 1.0, longer: float = 1.0,
          failed: float = 0.02, slower: float = 1.0) -> pl.DataFrame:  # fmt: skip
    """Gamma gaps, lognormal lengths, four turns a session, exponential latencies."""
    rng = np.random.default_rng(seed)
    return table(
        received_at=1e9 + np.cumsum(rng.gamma(shape, 1 / (shape * rate_rps), n)),
        session_id=[str(i) for i in rng.permutation(n) // 4],
        request_tokens=np.rint(rng.lognormal(5, 1, n) * longer).astype(np.int64),
        response_tokens=np.rint(rng.lognormal(4, 1, n)).astype(np.int64),
        ttft_s=rng.exponential(0.3 * slower, n),
        outcome=np.where(rng.random(n) < failed, "truncated", "ok").tolist(),
    )


def table(**columns: Any) -> pl.DataFrame:
    frame = pl.DataFrame({name: pl.Series(values) for name, values in columns.items()})
    return collect([complete_batch(frame.with_columns(request_id=pl.lit("r")))]).table


def axes(comparison: Comparison) -> dict[str, Axis]:
    return {axis.name: axis for axis in comparison.axes}


def figure(comparison: Comparison, axis: str, name: str) -> Difference:
    return next(each for each in axes(comparison)[axis].differences if each.name == name)


@pytest.fixture(scope="module")
def source() -> pl.DataFrame:
    return trace(0, 60_000)


def test_two_draws_of_one_process_are_the_same(source: pl.DataFrame) -> None:
    found = compare(source, trace(1, 60_000), LENIENT)
    assert {name: axis.verdict for name, axis in axes(found).items()} == dict.fromkeys(axes(found), SAME)
    assert found.verdict is SAME


@pytest.mark.parametrize(
    ("change", "axis"),
    [
        ({"rate_rps": 3.0}, "arrivals"),
        ({"shape": 0.5}, "arrivals"),
        ({"longer": 1.3}, "lengths"),
        ({"failed": 0.05}, "failures"),
        ({"slower": 1.5}, "latency"),
    ],
)
def test_a_change_is_found_on_its_axis_alone(source: pl.DataFrame, change: dict[str, Any], axis: str) -> None:
    found = compare(source, trace(1, 60_000, **change))
    different = {name for name, each in axes(found).items() if each.verdict is DIFFERENT}
    # Gaps between turns are as long as the whole trace, so a rate shows in them.
    assert different - ({"sessions"} if axis == "arrivals" else set()) == {axis}
    assert found.verdict is DIFFERENT


@pytest.mark.parametrize("seed", range(10))
def test_intervals_cover_the_truth(seed: int) -> None:
    """Fixed seeds: of 40 intervals of 99.95 %, one misses the truth with a chance of 2 %, were the seeds others."""
    a, b = trace(seed, 8000), trace(100 + seed, 8000, rate_rps=2.4, longer=1.2, failed=0.1, slower=2.0)
    found = compare(a, b, Options(confidence=0.9995, rounds=4000, block_s=60))
    for axis, name, truth in (
        ("arrivals", "rate_rps", 0.2),
        ("lengths", "request_tokens_p50", 0.2),
        ("failures", "failure_rate", 0.08),
        ("latency", "ttft_s_p50", 1.0),
    ):
        difference = figure(found, axis, name)
        assert difference.low is not None
        assert difference.high is not None
        assert difference.low <= truth <= difference.high, name


def test_intervals_of_90_percent_cover_nine_times_in_ten() -> None:
    """Of 4 figures in 25 pairs; those of one pair are all but independent: the standard error is 0.03, and a
    bootstrap of 100 blocks is a little too sure."""
    options = Options(confidence=0.9, rounds=120, block_s=20)
    truths = {
        ("arrivals", "rate_rps"): 0.0,
        ("lengths", "response_tokens_p50"): 0.0,
        ("failures", "failure_rate"): 0.08,
        ("latency", "ttft_s_p50"): 0.0,
    }
    covered = []
    for seed in range(25):
        found = compare(trace(seed, 4000), trace(1000 + seed, 4000, failed=0.1), options)
        for (axis, name), truth in truths.items():
            difference = figure(found, axis, name)
            assert difference.low is not None
            assert difference.high is not None
            covered.append(difference.low <= truth <= difference.high)
    assert 0.78 < np.mean(covered) < 0.98


def test_failures_of_another_kind_are_different_though_as_many(source: pl.DataFrame) -> None:
    dtype = source.schema["outcome"]
    swapped = source.with_columns(pl.col("outcome").cast(pl.String).replace("truncated", "rejected").cast(dtype))
    axis = axes(compare(source, swapped))["failures"]
    assert {each.name: each.verdict for each in axis.differences} == {
        "failure_rate": SAME, "truncated": DIFFERENT, "rejected": DIFFERENT
    }  # fmt: skip
    share = source["outcome"].value_counts(normalize=True).filter(pl.col("outcome") == "truncated")["proportion"][0]
    for name, a, b in (("truncated", share, 0.0), ("rejected", 0.0, share)):
        difference = next(each for each in axis.differences if each.name == name)
        assert [difference.a, difference.b] == pytest.approx([a, b])
    assert axis.verdict is DIFFERENT


def test_failures_in_clusters_are_less_sure_than_alone(source: pl.DataFrame) -> None:
    minute = ((source["received_at"] - source["received_at"][0]) // 60).cast(pl.Int64)
    outage = source.with_columns(
        outcome=pl.when((minute // 10) % 20 == 0).then(pl.lit("truncated")).otherwise(pl.lit("ok"))
        .cast(source.schema["outcome"])
    )  # fmt: skip
    share = float((outage["outcome"] != "ok").mean())  # type: ignore[arg-type]
    alone = trace(0, 60_000, failed=share)

    def width(each: pl.DataFrame) -> float:
        difference = figure(compare(each, each), "failures", "failure_rate")
        assert difference.low is not None
        assert difference.high is not None
        return difference.high - difference.low

    assert width(outage) > 3 * width(alone)


def test_short_traces_cannot_be_told_apart() -> None:
    found = compare(trace(0, 60), trace(1, 60))
    assert found.verdict is UNKNOWN
    assert axes(found)["failures"].is_known


@pytest.mark.parametrize("n", [0, 1, 2])
def test_next_to_nothing_is_unknown(n: int, source: pl.DataFrame) -> None:
    for a, b in ((source[:n], source), (source, source[:n]), (source[:n], source[:n])):
        found = compare(a, b)
        assert found.verdict is UNKNOWN
        assert b"NaN" not in msgspec.json.encode(found)


def test_an_axis_that_one_trace_lacks_does_not_count(source: pl.DataFrame) -> None:
    blank = [pl.lit(None, source.schema[name]).alias(name) for name in ("session", "ttft_s")]
    found = compare(source, source.with_columns(blank), LENIENT)
    assert {name for name, axis in axes(found).items() if not axis.is_known} == {"sessions", "latency"}
    assert found.verdict is SAME


def test_the_same_seed_gives_the_same_result(source: pl.DataFrame) -> None:
    other = trace(1, 5000)
    assert compare(source, other, Options(seed=7)) == compare(source, other, Options(seed=7))
    first, second = (figure(compare(source, other, Options(seed=seed)), "arrivals", "cv") for seed in (0, 1))
    assert (first.a, first.b) == (second.a, second.b)
    assert first.low != second.low


lists = st.lists(st.integers(0, 200), min_size=10, max_size=50)


@settings(deadline=None, max_examples=40)
@given(a=lists, b=lists)
def test_distances_are_scipys(a: list[int], b: list[int]) -> None:
    tables = [table(received_at=np.arange(float(len(values))), response_tokens=values) for values in (a, b)]
    (found,) = axes(compare(tables[0], tables[1], Options(rounds=20)))["lengths"].distances
    assert found.ks == pytest.approx(stats.ks_2samp(a, b, method="asymp").statistic)
    assert found.wasserstein == pytest.approx(stats.wasserstein_distance(a, b))
    assert found.ks_low <= found.ks <= found.ks_high
    mirrored = axes(compare(tables[1], tables[0], Options(rounds=20)))["lengths"].distances[0]
    assert mirrored.ks == pytest.approx(found.ks)
    assert mirrored.wasserstein == pytest.approx(found.wasserstein)


def test_arrival_figures_are_those_of_whole_minutes(source: pl.DataFrame) -> None:
    stamps_s = source["received_at"].to_numpy() - source["received_at"][0]
    minutes = int(stamps_s[-1] // 60)
    stamps_s = stamps_s[stamps_s < minutes * 60]
    gaps_s = np.diff(stamps_s)
    found = compare(source, source)
    assert figure(found, "arrivals", "rate_rps").a == pytest.approx(len(stamps_s) / (minutes * 60))
    assert figure(found, "arrivals", "cv").a == pytest.approx(gaps_s.std() / gaps_s.mean(), rel=1e-6)
    for width_s in (1, 10, 60):
        counts = np.histogram(stamps_s, np.arange(0, minutes * 60 + 1, width_s))[0]
        assert figure(found, "arrivals", f"dispersion_{width_s}s").a == pytest.approx(counts.var() / counts.mean())


def test_a_giant_gap_takes_neither_time_nor_memory() -> None:
    stamps_s = np.concatenate((np.arange(100.0), 2e11 + np.arange(100.0), [2.001e11]))
    found = compare(table(received_at=stamps_s), table(received_at=stamps_s), Options(rounds=20))
    assert figure(found, "arrivals", "rate_rps").a == pytest.approx(200 / 2e11, rel=0.02)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"rounds": 1}, "rounds: expected 20"),
        ({"confidence": 1.0}, "confidence: expected 0.5"),
        ({"block_s": 0.0}, "block_s: expected a number above 0, got 0"),
        ({"ks_tolerance": math.nan}, "ks_tolerance"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], rule: str, source: pl.DataFrame) -> None:
    with pytest.raises(ValueError, match=rule):
        compare(source, source, Options(**options))


def test_real_heads_equal_plain_counting() -> None:
    lengths, failed, tables = [], [], []
    for name in ("BurstGPT_1_head.csv", "BurstGPT_3_head.csv"):
        path = real_head(name)
        with path.open(newline="") as text:
            rows = list(csv.DictReader(text))
        lengths.append([int(row["Response tokens"]) for row in rows if row["Response tokens"] != "0"])
        failed.append(sum(row["Response tokens"] == "0" for row in rows) / len(rows))
        tables.append(collect(read_trace(path)).table)
    found = compare(tables[0], tables[1])
    mean = figure(found, "lengths", "response_tokens_mean")
    assert [mean.a, mean.b] == pytest.approx([sum(values) / len(values) for values in lengths])
    assert figure(found, "failures", "failure_rate").difference == pytest.approx(failed[1] - failed[0])
    grid = set(lengths[0]) | set(lengths[1])
    ks = max(abs(sum(v <= x for v in lengths[0]) / len(lengths[0]) - sum(v <= x for v in lengths[1]) / len(lengths[1]))
             for x in grid)  # fmt: skip
    assert axes(found)["lengths"].distances[1].ks == pytest.approx(ks)
    assert not axes(found)["sessions"].is_known  # file 1 has none
