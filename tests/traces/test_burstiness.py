"""Gamma fits are checked over many windows by their errors in standard errors: these have mean 0 and mean square 1.

Bounds are 4.5 standard deviations of that mean and mean square, 7e-6 for each: with fixed seeds they pass or fail for
good, and with others all of this file would fail by chance once in some thousand times.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections import Counter
from statistics import median
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats  # type: ignore[import-untyped]

from tests.traces.test_burstgpt import real_head
from traces.burstiness import (
    FIT_SCHEMA,
    Arrivals,
    Episodes,
    burst_episodes,
    describe_arrivals,
    fit_windows,
    has_whole_seconds,
    summarize_fits,
    work_day_slots,
)
from traces.codec import read_trace
from traces.table import collect, view

Array = np.ndarray[Any, np.dtype[np.float64]]
STAMPS = st.lists(st.integers(0, 40_000).map(lambda n: n / 4), max_size=80).map(sorted)


def gamma_stamps(shape: float, rate_rps: float, span_s: float, seed: int) -> Array:
    """A stationary Gamma process, seen from long after its beginning."""
    rng = np.random.default_rng(seed)
    lead_s = 50 / rate_rps
    n = int((span_s + lead_s) * rate_rps + 10 * math.sqrt((span_s + lead_s) * rate_rps / shape)) + 10
    stamps_s = np.cumsum(rng.gamma(shape, 1 / shape / rate_rps, n)) - lead_s
    return stamps_s[(stamps_s >= 0) & (stamps_s < span_s)]


def errors(fits: pl.DataFrame, shape: float) -> Array:
    """In standard errors, of log alpha."""
    known = fits.drop_nulls("alpha_se")
    z: Array = (known["alpha"] / shape).log().to_numpy() / (known["alpha_se"] / known["alpha"]).to_numpy()
    return z


def check(z: Array) -> None:
    """Mean 0 within 4.5 of its standard errors; mean square not over what 4.5 standard deviations of it allow."""
    assert abs(z.mean()) < 4.5 / math.sqrt(len(z)) + 0.05
    assert np.mean(z**2) < 1 + 4.5 * math.sqrt(2 / len(z)) + 0.05
    assert np.mean(z**2) > 0.5  # and not said to be far worse than it is


# Gaps, rates and counts


@pytest.mark.parametrize(
    ("stamps", "span_s", "rate_rps", "mean_gap_s", "cv", "zero_gaps"),
    [
        ([5.0], 0.0, None, None, None, 0),
        ([5.0, 5.0, 5.0], 0.0, None, 0.0, None, 2),
        ([5.0, 7.0], 2.0, 1.0, 2.0, None, 0),
        ([5.0, 5.0, 7.0], 2.0, 1.5, 1.0, 1.0, 1),
        ([-62135596800.0, 0.0, 253402300799.0], 315537897599.0, 3 / 315537897599, 157768948799.5, 0.6061, 0),
    ],
)
def test_gaps(
    stamps: list[float], span_s: float, rate_rps: float, mean_gap_s: float, cv: float, zero_gaps: int
) -> None:
    got = describe_arrivals(np.array(stamps))
    assert (got.requests, got.span_s, got.zero_gaps) == (len(stamps), span_s, zero_gaps)
    assert got.rate_rps == (None if rate_rps is None else pytest.approx(rate_rps))
    assert (got.gap_s and got.gap_s.mean) == (None if mean_gap_s is None else pytest.approx(mean_gap_s))
    assert got.gap_cv == (None if cv is None else pytest.approx(cv, abs=1e-4))


def test_no_arrivals() -> None:
    empty = np.empty(0)
    assert describe_arrivals(empty) == Arrivals(0, None, None, None, None, None, None, 0, ())
    assert fit_windows(empty).schema == FIT_SCHEMA
    assert summarize_fits(fit_windows(empty)).fitted == 0
    assert work_day_slots(fit_windows(empty), ZoneInfo("UTC")) == ()
    assert burst_episodes(empty) == Episodes(10, (), None, None)


@settings(max_examples=60, deadline=None)
@given(STAMPS, st.booleans())
def test_counts_by_window_equal_plain_counting(stamps: list[float], floored: bool) -> None:
    stamps = [float(math.floor(stamp)) if floored else stamp for stamp in stamps]
    got = describe_arrivals(np.array(stamps))
    if not stamps:
        return
    base = math.floor(stamps[0])
    end = stamps[-1] + (1 if all(stamp == int(stamp) for stamp in stamps) else 0)
    for window in got.windows:
        counts = Counter(int((stamp - base) // window.window_s) for stamp in stamps)
        whole = [counts[number] for number in range(int((end - base) // window.window_s))]
        assert window.windows == len(whole)
        assert window.peak_rps == max(counts.values()) / window.window_s
        assert counts[int((window.peak_at_s - base) // window.window_s)] == max(counts.values())
        if whole:
            assert window.p50_rps == np.quantile(whole, 0.5, method="inverted_cdf") / window.window_s
            assert window.p99_rps == np.quantile(whole, 0.99, method="inverted_cdf") / window.window_s
        if len(whole) > 1 and any(whole):
            assert window.dispersion == pytest.approx(np.var(whole, ddof=1) / np.mean(whole))
        else:
            assert window.dispersion is None


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_the_dispersion_of_long_windows_is_one_over_the_shape(shape: float) -> None:
    """Cox, Renewal Theory, 4.2: Var N / E N -> 1 / shape. Relative standard error sqrt(2 / windows); 4.5 of them."""
    windows = {window.window_s: window for window in describe_arrivals(gamma_stamps(shape, 5.0, 60_000, 7)).windows}
    assert windows[60].dispersion == pytest.approx(1 / shape, rel=4.5 * math.sqrt(2 / 1000) + 0.02)


# Fits


@pytest.mark.parametrize("rate_rps", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("shape", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("whole", [False, True])
def test_a_shape_is_recovered_within_its_standard_errors(whole: bool, shape: float, rate_rps: float) -> None:
    stamps_s = gamma_stamps(shape, rate_rps, 150 * 1200, seed=11)
    fits = fit_windows(np.floor(stamps_s) if whole else stamps_s, whole_seconds=whole)
    z = errors(fits, shape)
    assert len(z) > 145
    check(z)
    known = fits.drop_nulls("beta_se")
    check((known["beta"] / (shape * rate_rps)).log().to_numpy() / (known["beta_se"] / known["beta"]).to_numpy())


@pytest.mark.parametrize("whole", [False, True])
def test_poisson_is_rejected_as_often_as_the_level_says(whole: bool) -> None:
    stamps_s = gamma_stamps(1.0, 0.5, 400 * 1200, seed=3)
    summary = summarize_fits(fit_windows(np.floor(stamps_s) if whole else stamps_s, whole_seconds=whole))
    # Binomial(400, 0.05): 4.5 standard deviations are 0.049.
    assert summary.poisson_rejected == pytest.approx(0.05, abs=0.049)
    assert summary.dispersion_rejected == pytest.approx(0.05, abs=0.049)
    assert summary.poisson_rejected != 0.0


@pytest.mark.parametrize("shape", [0.25, 4.0])
def test_bursty_and_even_arrivals_are_told_from_poisson(shape: float) -> None:
    stamps_s = np.floor(gamma_stamps(shape, 0.5, 20 * 1200, seed=3))
    summary = summarize_fits(fit_windows(stamps_s))
    assert summary.poisson_rejected == 1.0
    assert summary.dispersion_rejected is not None
    assert summary.dispersion_rejected > 0.5


def test_the_fit_is_the_maximum_of_the_dirichlet_likelihood() -> None:
    stamps_s = gamma_stamps(0.6, 0.2, 5 * 1200, seed=9)
    fits = fit_windows(stamps_s)
    for row in fits.iter_rows(named=True):
        inside = stamps_s[(stamps_s >= row["start_s"]) & (stamps_s < row["start_s"] + 1200)]
        gaps = np.diff(inside)
        n, logs = len(gaps), np.log(gaps / gaps.sum()).sum()

        def loss(k: float, n: int = n, logs: float = float(logs)) -> float:
            return float(-(special.gammaln(n * k) - n * special.gammaln(k) + (k - 1) * logs))

        best = optimize.minimize_scalar(loss, bounds=(0.05, 5), method="bounded", options={"xatol": 1e-9})
        information = n * special.polygamma(1, best.x) - n**2 * special.polygamma(1, n * best.x)
        assert (row["requests"], row["gaps"], row["method"]) == (len(inside), n, "mle")
        assert row["alpha"] == pytest.approx(best.x, rel=1e-3)
        assert row["alpha_se"] == pytest.approx(information**-0.5, rel=1e-3)
        assert row["beta"] == pytest.approx(row["alpha"] / gaps.mean())
        assert row["cv"] == pytest.approx(gaps.std() / gaps.mean())
        assert row["poisson_p"] == pytest.approx(stats.chi2.sf(2 * (loss(1.0) - best.fun), 1), rel=1e-2, abs=1e-9)
        counts = np.histogram(inside, row["start_s"] + np.arange(21) * 60)[0]
        index = ((counts - counts.mean()) ** 2).sum() / counts.mean()
        assert row["dispersion_p"] == pytest.approx(2 * min(stats.chi2.cdf(index, 19), stats.chi2.sf(index, 19)))


def test_the_fit_of_whole_seconds_is_the_maximum_of_the_integrated_density() -> None:
    """P(g) by numerical integration of density times triangle."""
    stamps_s = np.floor(gamma_stamps(0.5, 0.1, 1200, seed=4))
    (row,) = fit_windows(stamps_s).iter_rows(named=True)
    gaps, n = np.diff(stamps_s), len(stamps_s) - 1
    mean = gaps.mean()

    nodes, weights = np.polynomial.legendre.leggauss(200)

    def integral(k: float, g: float, low: float, high: float) -> float:
        if low == high:
            return 0.0
        # The substitution x = v^4 takes the pole at 0 away.
        v = low**0.25 + (high**0.25 - low**0.25) * (nodes + 1) / 2
        values = stats.gamma(k, scale=mean / k).pdf(v**4) * (1 - np.abs(v**4 - g)) * 4 * v**3
        return float(weights @ values * (high**0.25 - low**0.25) / 2)

    def loss(k: float) -> float:
        p = {g: integral(k, g, max(g - 1, 0), g) + integral(k, g, g, g + 1) for g in set(gaps.tolist())}
        return float(stats.gamma(n * k, scale=mean / k).logpdf(n * mean) - sum(math.log(p[g]) for g in gaps.tolist()))

    best = optimize.minimize_scalar(loss, bounds=(0.2, 1.2), method="bounded", options={"xatol": 1e-3})
    assert row["alpha"] == pytest.approx(best.x, rel=5e-3)
    assert row["poisson_p"] == pytest.approx(stats.chi2.sf(2 * (loss(1.0) - best.fun), 1), rel=0.02)


def test_windows_without_a_shape() -> None:
    hour = 3600.0
    few = [10.0, 20.5, 30.0]
    equal = [hour + 100.5] * 50  # no time between
    even = [2 * hour + at for at in range(0, 1000, 10)]  # as even as can be: no maximum
    fits = fit_windows(np.array(few + equal + even), whole_seconds=False)
    assert fits["requests"].to_list() == [3, 50, 100]
    assert fits["alpha"].to_list() == [None, None, None]
    assert fits["cv"].to_list() == [pytest.approx(0.05), None, 0.0]
    assert fits["method"].to_list() == [None, None, None]
    assert fits["poisson_p"].null_count() == 3
    assert fits["dispersion_p"].to_list()[0] is None
    assert summarize_fits(fits).alpha is None


@pytest.mark.parametrize(("shape", "rate_rps"), [(0.25, 100.0), (1.0, 10.0), (2.0, 6.0), (2.0, 30.0)])
def test_a_busy_window_whose_shape_the_seconds_hide_has_none(shape: float, rate_rps: float) -> None:
    fits = fit_windows(np.floor(gamma_stamps(shape, rate_rps, 30 * 1200, seed=1)))
    assert fits["requests"].min() > 500  # type: ignore[operator]
    assert fits["alpha"].null_count() == fits["poisson_p"].null_count() == 30
    assert fits["cv"].null_count() == fits["dispersion_p"].null_count() == 0


@pytest.mark.parametrize(("shape", "rate_rps"), [(0.25, 8.0), (0.5, 5.0)])
def test_a_busy_window_with_long_gaps_shows_its_shape(shape: float, rate_rps: float) -> None:
    z = errors(fit_windows(np.floor(gamma_stamps(shape, rate_rps, 100 * 1200, seed=1))), shape)
    assert len(z) == 100
    check(z)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 3), st.integers(1, 20))
def test_a_fit_knows_no_origin_and_no_neighbours(seed: int, shape: float, shift: int) -> None:
    stamps_s = gamma_stamps(shape, 0.2, 2400, seed)
    fits = fit_windows(stamps_s, whole_seconds=False)
    moved = fit_windows(stamps_s + shift * 1200, whole_seconds=False)
    assert moved["start_s"].to_list() == [start + shift * 1200 for start in fits["start_s"]]
    assert np.allclose(moved["alpha"].to_numpy(), fits["alpha"].to_numpy(), rtol=1e-4, equal_nan=True)
    alone = pl.concat(
        fit_windows(stamps_s[(stamps_s >= start) & (stamps_s < start + 1200)], whole_seconds=False)
        for start in fits["start_s"]
    )
    assert np.allclose(alone["alpha"].to_numpy(), fits["alpha"].to_numpy(), rtol=1e-9, equal_nan=True)


def test_the_unit_of_time_does_not_matter() -> None:
    stamps_s = gamma_stamps(1.5, 0.2, 12_000, seed=2)
    seconds, tenths = fit_windows(stamps_s), fit_windows(stamps_s * 10, window_s=12_000)
    assert tenths["alpha"].to_list() == pytest.approx(seconds["alpha"].to_list())
    assert (tenths["beta"] * 10).to_list() == pytest.approx(seconds["beta"].to_list())


@pytest.mark.parametrize("whole", [False, True])
def test_a_rate_that_climbs_is_not_burstiness_once_it_is_detrended(whole: bool) -> None:
    """Poisson, its rate going up and down in 40 minutes. The mean alpha's standard error is 0.005."""
    steady = gamma_stamps(1.0, 1.0, 200_000, seed=6)
    grid = np.linspace(0, 200_000, 200_001)
    rate = 1.02 - np.cos(2 * np.pi * grid / 2400)
    stamps_s = np.interp(steady, np.concatenate(([0], np.cumsum((rate[1:] + rate[:-1]) / 2))) / 1.02, grid)
    stamps_s = np.floor(stamps_s) if whole else stamps_s
    raw, detrended = (
        summarize_fits(fit_windows(stamps_s, window_s=300, detrend=detrend, whole_seconds=whole)).alpha
        for detrend in (False, True)
    )
    assert raw is not None
    assert detrended is not None
    assert raw.mean < 0.94
    assert abs(1 - detrended.mean) < 0.6 * (1 - raw.mean)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
def test_detrending_a_steady_rate_changes_little(shape: float) -> None:
    stamps_s = np.floor(gamma_stamps(shape, 1.0, 300 * 300, seed=8))
    z = errors(fit_windows(stamps_s, window_s=300, detrend=True), shape)
    # The trend is the noise of some hundred requests, and takes a little of the variance with it.
    assert abs(z.mean()) < 0.5
    assert np.mean((z - z.mean()) ** 2) == pytest.approx(1, abs=0.4)


def test_slots_of_work_days() -> None:
    day = 86_400
    monday, saturday = 4 * day, 9 * day  # 1970-01-05 and 1970-01-10
    rows = [
        (monday, 100, 0.5, 1.0),
        (monday + day, 140, 1.5, 2.0),
        (saturday, 900, 9.0, 9.0),
        (monday + 7 * day, 0, None, None),
    ]
    fits = pl.DataFrame(
        rows,
        schema={"start_s": pl.Float64, "requests": pl.Int64, "alpha": pl.Float64, "beta": pl.Float64},
        orient="row",
    )
    slots = work_day_slots(fits, ZoneInfo("UTC"))
    assert len(slots) == 72
    first = slots[0]
    assert (first.start_s, first.windows, first.fitted) == (0, 6, 2)
    assert (first.alpha, first.alpha_median, first.beta) == (1.0, 1.0, 1.5)
    assert first.rate_rps == pytest.approx(240 / (6 * 1200))
    assert {(slot.windows, slot.fitted, slot.rate_rps, slot.alpha) for slot in slots[1:]} == {(5, 0, 0.0, None)}
    # In Shanghai the same windows are at 08:00.
    assert [slot.start_s for slot in work_day_slots(fits, ZoneInfo("Asia/Shanghai")) if slot.fitted] == [8 * 3600]


# Episodes


def test_an_episode_worked_by_hand() -> None:
    quiet = [float(at) for at in range(0, 7200, 5)]  # 2 requests in each window of 10 s
    burst = [3000 + at / 10 for at in range(150)]  # 100 and 50 more in two windows
    after = [3035 + at / 100 for at in range(50)]  # and 50 in a third, one window later
    found = burst_episodes(np.sort(np.array(quiet + burst + after)))
    (episode,) = found.episodes
    assert (episode.start_s, episode.end_s, episode.requests) == (3000.0, 3040.0, 200 + 8)
    assert (episode.peak_rps, episode.baseline_rps, episode.peak_over_baseline) == (10.2, 0.2, 51.0)
    assert found.time_share == 4 / 720
    assert found.request_share == 208 / (len(quiet) + 200)
    apart = burst_episodes(np.sort(np.array(quiet + burst + after)), merge_s=0)
    assert [(each.start_s, each.end_s) for each in apart.episodes] == [(3000.0, 3020.0), (3030.0, 3040.0)]


def test_poisson_arrivals_have_no_bursts_and_a_burst_out_of_nothing_has_no_baseline() -> None:
    # A Poisson count with mean 5 is over 5 + 5 sqrt(5) = 16.2 with a chance of 1.4e-5; the baseline moves by 1 at most.
    assert burst_episodes(gamma_stamps(1.0, 0.5, 20_000, seed=1), sigmas=8).episodes == ()
    (episode,) = burst_episodes(np.array([0.0] * 50 + [1e9])).episodes
    assert (episode.requests, episode.baseline_rps, episode.peak_over_baseline) == (50, 0.0, None)


@settings(max_examples=60, deadline=None)
@given(STAMPS, st.integers(1, 5), st.sampled_from([0, 20, 100]))
def test_episodes_follow_their_definition(stamps: list[float], sigmas: int, merge_s: int) -> None:
    found = burst_episodes(np.array(stamps), around_s=200, sigmas=sigmas, merge_s=merge_s)
    counts = Counter(int(stamp // 10) for stamp in stamps)
    ends = (min(counts), max(counts)) if counts else (0, 0)
    bursting = []
    for number in sorted(counts):
        around = range(max(number - 10, ends[0]), min(number + 10, ends[1]) + 1)
        baseline = median(counts[each] for each in around)
        if counts[number] > baseline + sigmas * math.sqrt(max(baseline, 1)):
            bursting.append(number)
    spans: list[list[int]] = []
    for number in bursting:
        if spans and (number - spans[-1][1] - 1) * 10 <= merge_s:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    assert [(each.start_s, each.end_s) for each in found.episodes] == [(a * 10.0, (b + 1) * 10.0) for a, b in spans]
    inside = [sum(counts[number] for number in range(first, last + 1)) for first, last in spans]
    assert [each.requests for each in found.episodes] == inside
    assert found.request_share == (sum(inside) / len(stamps) if stamps else None)


# Real traces


@pytest.mark.parametrize("name", ["BurstGPT_1_head.csv", "BurstGPT_3_head.csv"])
def test_a_real_head(name: str) -> None:
    path = real_head(name)
    with path.open(newline="") as text:
        stamps = sorted(float(row["Timestamp"]) for row in csv.DictReader(text))
    stamps_s = view(collect(read_trace(path)).table["received_at"])
    assert has_whole_seconds(stamps_s)
    got = describe_arrivals(stamps_s)
    gaps = [after - before for before, after in itertools.pairwise(stamps)]
    mean = sum(gaps) / len(gaps)
    assert got.gap_s is not None
    assert (got.requests, got.zero_gaps, got.gap_s.max) == (len(stamps), gaps.count(0), max(gaps))
    assert got.gap_s.p50 == median(gaps)
    assert got.gap_cv == pytest.approx(math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean)
    fits = fit_windows(stamps_s)
    counts = Counter(int(stamp // 1200) * 1200 for stamp in stamps)
    assert dict(fits.select("start_s", "requests").iter_rows()) == counts
    for start_s, n, cv in fits.select("start_s", "gaps", "cv").iter_rows():
        inside = [stamp for stamp in stamps if start_s <= stamp < start_s + 1200]
        here = [after - before for before, after in itertools.pairwise(inside)]
        assert n == len(here)
        if n > 1 and sum(here):
            assert cv == pytest.approx(float(np.std(here) / np.mean(here)))
        else:
            assert cv is None
