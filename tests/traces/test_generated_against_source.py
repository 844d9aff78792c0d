"""Generated traces against what their profile was fitted on, over seeds: real traces, and processes of known truth.

Each row states its tolerance. Of 16 seeds the mean is compared, as one hour of bursts says little: Azure's two halves
differ by a factor of 1.8 in their dispersion at 60 s, BurstGPT's by 2.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.traces.test_generation import ks, steps, turns, whole
from tests.traces.test_profile import TRACES, trace
from traces.arrivals import Array, Process, arrival_times_s, steady, take_until
from traces.burstiness import describe_arrivals
from traces.codec import read_trace
from traces.generation import generate
from traces.profile import WorkloadProfile, decode_profile, encode_profile, fit_profile
from traces.swings import HOLDS_S, Bursts, Swing, level_blocks

SEEDS = range(16)


def drawn(process: Process, end_s: float, seed: int) -> Array:
    return take_until(arrival_times_s(process.segments(), np.random.default_rng(seed)))(end_s)


def swinging(rate_rps: float, shape: float, end_s: float, seed: int, *swings: Swing) -> Process:
    """A rate that the swings multiply."""
    levels = level_blocks(swings, np.random.SeedSequence(seed).spawn(len(HOLDS_S)))(0.0, end_s)
    rates = levels.values * rate_rps
    return Process(tuple(levels.starts_s.tolist()), tuple(rates.tolist()), (shape,) * len(rates))


def counts(stamps_s: Array) -> dict[str, float]:
    """The CV of gaps, the share of gaps that are 0, and dispersion by window."""
    arrivals = describe_arrivals(stamps_s)
    assert arrivals.gap_cv is not None
    found = {"cv": arrivals.gap_cv, "zeros": arrivals.zero_gaps / (len(stamps_s) - 1)}
    for window in arrivals.windows[:3]:
        assert window.dispersion is not None
        found[f"{window.window_s} s"] = window.dispersion
    return found


def generated(profile: WorkloadProfile, seed: int, span_s: float | None = None) -> pl.DataFrame:
    """A trace as long as the source's, its stamps as coarse."""
    found = whole(profile, seed=seed, duration_s=span_s or profile.span_s)
    return found.with_columns(pl.col("received_at").floor()) if profile.has_whole_second_stamps else found


def mean_counts(profile: WorkloadProfile, seeds: range = SEEDS) -> dict[str, float]:
    each = [counts(generated(profile, seed)["received_at"].to_numpy()) for seed in seeds]
    return {name: float(np.mean([found[name] for found in each])) for name in each[0]}


def fitted(stamps_s: Array) -> WorkloadProfile:
    return decode_profile(encode_profile(fit_profile([trace(stamps_s)])))


def bursts(profile: WorkloadProfile) -> Bursts | None:
    (service,) = profile.services
    return service.bursts


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"no traces at {TRACES} (BURSTGATE_TRACES)")
@pytest.mark.parametrize(
    ("name", "dispersions", "cv", "distance"),
    [
        ("AzureLLMInferenceTrace_code.csv", (1.25, 1.25, 1.25), 1.25, 0.02),
        # A swing of 5 minutes holds 12 times in the hour: that much is the hour's own.
        ("mooncake_conversation_trace.jsonl", (1.1, 1.25, 1.4), 1.05, 0.02),
        # 400 rows in whose 10 hours the rate climbs from almost nothing.
        ("BurstGPT_1_head.csv", (1.1, 1.25, 1.25), 1.3, 0.08),
        # So it does here, and only 135 sessions start; their turns come at gaps of their own, whatever the hour.
        ("BurstGPT_3_head.csv", (1.1, 1.25, 1.5), 1.75, 0.12),
    ],
)
def test_real_traces(name: str, dispersions: tuple[float, ...], cv: float, distance: float) -> None:
    """dispersions (at 1, 10 and 60 s), cv: the factor within which each comes back.

    distance: Kolmogorov-Smirnov's, of both lengths.
    """
    rows = pl.concat(list(read_trace(TRACES / name))).sort("received_at")
    profile = decode_profile(encode_profile(fit_profile([rows])))
    wanted, found = counts(rows["received_at"].to_numpy()), mean_counts(profile)
    for window, dispersion in zip(("1 s", "10 s", "60 s"), dispersions, strict=True):
        assert abs(math.log(found[window] / wanted[window])) < math.log(dispersion), window
    assert abs(math.log(found["cv"] / wanted["cv"])) < math.log(cv)
    assert found["zeros"] == pytest.approx(wanted["zeros"], abs=0.03)
    source = rows.filter(pl.col("outcome") == "ok")
    correlation = pl.corr("request_tokens", "response_tokens", method="spearman")
    distances, correlations, mean_turns, gaps_s = [], [], [], []
    for seed in SEEDS[:5]:
        again = generated(profile, seed)
        good = again.filter(pl.col("outcome") == "ok")
        distances += [ks(source[name], good[name]) for name in ("request_tokens", "response_tokens")]
        correlations.append(good.select(correlation).item())
        if again["session_id"].count():
            mean_turns.append(turns(again).mean())
            gaps_s.append(float(np.median(steps(again)["gap_s"].to_numpy())))
    assert np.mean(distances) < distance
    assert np.mean(correlations) == pytest.approx(source.select(correlation).item(), abs=0.07)
    assert bool(mean_turns) == bool(rows["session_id"].count())
    if mean_turns:
        # Sessions that go on when the trace ends are cut, there and here.
        assert np.mean(mean_turns) == pytest.approx(turns(rows).mean(), rel=0.2)
        assert np.mean(gaps_s) == pytest.approx(np.median(steps(rows)["gap_s"].to_numpy()), rel=0.25)


@pytest.mark.parametrize("shape", [0.25, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("rate_rps", [0.05, 1.0, 20.0])
def test_renewals_come_back_as_renewals(rate_rps: float, shape: float) -> None:
    """Poisson as Poisson: nothing is made of what chance does to counts."""
    for seed in range(4):
        found = fitted(drawn(steady(rate_rps, shape), max(10_000 / rate_rps, 1300.0), seed))
        assert bursts(found) is None
        assert found.services[0].slots[0].shape == pytest.approx(shape, rel=0.2 if rate_rps > 0.1 else 0.5)


@pytest.mark.parametrize("shape", [0.25, 1.0])
def test_renewals_keep_their_dispersion(shape: float) -> None:
    profile = fitted(drawn(steady(5.0, shape), 7200.0, 1))
    found = mean_counts(profile, range(5))
    # 25 and more gaps a window: 1 / shape but for an edge of (1 - 1 / shape^2) / 6.
    assert (found["10 s"], found["60 s"]) == pytest.approx((1 / shape, 1 / shape), rel=0.15)
    assert found["cv"] == pytest.approx(1 / math.sqrt(shape), rel=0.08)


@pytest.mark.parametrize(
    ("rate_rps", "shape", "swings"),
    [
        (5.0, 1.0, (Swing(10.0, 2.0, True),)),
        (5.0, 1.0, (Swing(10.0, 0.5),)),
        (2.0, 0.5, (Swing(1.0, 0.5), Swing(60.0, 1.0, True))),
        (20.0, 1.0, (Swing(300.0, 0.3),)),
        (0.5, 4.0, (Swing(60.0, 1.0, True),)),
    ],
)
def test_swings_come_back(rate_rps: float, shape: float, swings: tuple[Swing, ...]) -> None:
    """Counts and gaps within a factor of 1.25; and the largest swing is known as what it is."""
    end_s = 20_000.0
    source = drawn(swinging(rate_rps, shape, end_s, 5, *swings), end_s, 5)
    profile = fitted(source)
    wanted, found = counts(source), mean_counts(profile, range(8))
    for name in ("cv", "1 s", "10 s", "60 s"):
        assert abs(math.log(found[name] / wanted[name])) < math.log(1.25), name
    told = bursts(profile)
    assert told is not None
    largest = max(told.swings, key=lambda swing: swing.variance)
    assert largest.is_on_off == max(swings, key=lambda swing: swing.variance).is_on_off


def clock(seed: int) -> Array:
    """8 rows each 3 s."""
    return np.repeat(np.arange(2000) * 3.0 + 0.25, 8)


def mailings(seed: int) -> Array:
    """Groups at Poisson times, their sizes geometric with a mean of 5."""
    times_s = drawn(steady(0.2, 1.0), 20_000.0, seed)
    return np.repeat(times_s, np.random.default_rng(seed + 100).geometric(0.2, len(times_s)))


@pytest.mark.parametrize("source", [clock, mailings])
def test_batches_come_back(source: Callable[[int], Array]) -> None:
    stamps_s = np.round(source(3), 3)
    profile = fitted(stamps_s)
    told = bursts(profile)
    assert told is not None
    assert told.batch == pytest.approx(len(stamps_s) / len(np.unique(stamps_s)))
    wanted, found = counts(stamps_s), mean_counts(profile, range(8))
    assert found == pytest.approx(wanted, rel=0.2, abs=0.02)


def test_a_clock_stays_a_clock() -> None:
    again = generated(fitted(clock(0)), 1)["received_at"].to_numpy()
    stamps_s, sizes = np.unique(again, return_counts=True)
    assert np.diff(stamps_s) == pytest.approx(3.0, abs=0.02)
    assert set(sizes) == {8}


@pytest.mark.parametrize("rate_rps", [20.0, 300.0])
def test_stamps_in_milliseconds_make_no_batches(rate_rps: float) -> None:
    """At 300 a second a quarter of the gaps is 0, and as many are 1 ms."""
    assert bursts(fitted(np.floor(drawn(steady(rate_rps, 1.0), 1300.0, 0) * 1000) / 1000)) is None


@pytest.mark.parametrize("is_common", [True, False])
def test_services_swing_together_or_apart(is_common: bool) -> None:
    """Two models, half of the requests each; together their counts vary twice as much as apart."""
    end_s = 100_000.0
    swing = Swing(1200.0, 1.0)
    both = [drawn(swinging(0.2, 1.0, end_s, 0 if is_common else number, swing), end_s, number) for number in (0, 1)]
    rows = pl.concat(
        [trace(stamps_s, model=[f"m{number}"] * len(stamps_s)) for number, stamps_s in enumerate(both)]
    ).sort("received_at")
    profile = decode_profile(encode_profile(fit_profile([rows])))
    assert profile.has_common_levels == is_common
    ratios = []
    for seed in range(6):
        again = generated(profile, seed)
        each = [
            np.histogram(again.filter(pl.col("model") == name)["received_at"], np.arange(0, end_s, 300.0))[0]
            for name in ("model-0", "model-1")
        ]
        ratios.append(float(np.corrcoef(each[0], each[1])[0, 1]))
    assert (np.mean(ratios) > 0.7) == is_common
    assert is_common or abs(np.mean(ratios)) < 0.2


def test_a_rate_is_kept_and_scaled_with_bursts() -> None:
    end_s = 20_000.0
    profile = fitted(drawn(swinging(5.0, 1.0, end_s, 5, Swing(10.0, 2.0, True)), end_s, 5))
    for rate_rps in (None, 50.0):
        heights = [whole(profile, seed=seed, duration_s=4000.0, rate_rps=rate_rps).height for seed in range(6)]
        assert np.mean(heights) == pytest.approx((rate_rps or profile.mean_rps) * 4000, rel=0.1)


@pytest.mark.parametrize(
    "source", [clock, lambda seed: drawn(swinging(3.0, 0.5, 9000.0, 1, Swing(10.0, 2.0)), 9000.0, 1)]
)
def test_the_same_seed_gives_the_same_bytes(source: Callable[[int], Array]) -> None:
    profile = fitted(source(0))
    assert bursts(profile) is not None
    assert encode_profile(profile) == encode_profile(fitted(source(0)))
    options: dict[str, Any] = {"duration_s": 3000.0, "start_s": 1.7e9 + 0.5}
    first, again, other = (pl.concat(list(generate(profile, seed=seed, **options))) for seed in (7, 7, 8))
    assert first.equals(again)
    assert not first.equals(other)
    # A longer trace begins with the shorter one, over the edge of an hour too.
    longer = whole(profile, seed=7, duration_s=9000.0, start_s=1.7e9 + 0.5)
    assert longer.head(first.height).equals(first)
