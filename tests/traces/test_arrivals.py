"""Arrival processes against their closed forms, and the fit of a shape against its standard error."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.arrivals import Array, Process, arrival_times_s, digamma, fit_gamma_shape, steady, take_until


def drawn(process: Process, end_s: float, seed: int = 0) -> Array:
    return take_until(arrival_times_s(process.segments(), np.random.default_rng(seed)))(end_s)


def dispersion(times_s: Array, end_s: float, width_s: float) -> float:
    """Variance / mean of the counts in windows."""
    counts = np.histogram(times_s, np.arange(0.0, end_s + width_s / 2, width_s))[0]
    return float(counts.var() / counts.mean())


def trigamma(x: float) -> float:
    """The sum of 1 / (x + n)^2, its end by the integral's first terms."""
    n = np.arange(1000)
    return float(np.sum(1 / (x + n) ** 2)) + 1 / (x + 1000) + 0.5 / (x + 1000) ** 2


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_rate_and_cv_are_those_asked(shape: float) -> None:
    rates, cvs = [], []
    for seed in range(20):
        times_s = drawn(steady(20.0, shape), 500.0, seed)
        gaps_s = np.diff(times_s)
        rates.append(len(times_s) / 500)
        cvs.append(gaps_s.std() / gaps_s.mean())
    # Var N(t) = rate t / shape in the long run; the CV's error is below 4 / sqrt(n) at these shapes.
    assert abs(np.mean(rates) - 20) < 4 * math.sqrt(20 / shape / 500 / 20)
    assert np.mean(cvs) == pytest.approx(1 / math.sqrt(shape), rel=0.02)


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_windows_of_a_gamma_process_have_its_dispersion(shape: float) -> None:
    # Windows of many gaps: 1 / shape, the renewal theorem's limit. 2,000 windows: a standard error of 3 %.
    assert dispersion(drawn(steady(20.0, shape), 20_000.0), 20_000.0, 10.0) == pytest.approx(1 / shape, rel=0.12)


def test_the_start_is_stationary() -> None:
    """A first gap like any other would put 1.5 requests too many into the first seconds at shape 0.25."""
    early = [len(drawn(steady(5.0, 0.25), 1.0, seed)) for seed in range(4000)]
    assert np.mean(early) == pytest.approx(5, abs=4 * float(np.std(early)) / math.sqrt(4000))
    assert np.mean(early) < 5.5


def test_constant_gaps_begin_at_zero_and_do_not_drift() -> None:
    times_s = drawn(steady(4.0, math.inf), 1e5)
    assert len(times_s) == 400_000
    assert np.array_equal(times_s, np.arange(400_000) / 4)


def test_steps_have_their_own_rates() -> None:
    process = Process((0.0, 100.0, 200.0, 300.0), (10.0, 0.0, 50.0, 0.0), (1.0,) * 4)
    assert process.mean_rps == pytest.approx(20)
    times_s = drawn(process, math.inf, 3)
    counts = np.histogram(times_s, [0, 100, 200, 300])[0]
    assert counts[1] == 0
    assert counts.sum() == len(times_s)
    assert abs(counts[0] - 1000) < 4 * math.sqrt(1000)
    assert abs(counts[2] - 5000) < 4 * math.sqrt(5000)


def test_a_gap_runs_on_over_a_change_of_rate() -> None:
    # One arrival each 4 s, then each 0.5 s: a quarter of the gap is left at 3 s, and passes 8 times as fast.
    process = Process((0.0, 3.0), (0.25, 2.0), (math.inf, math.inf))
    assert drawn(process, 4.4).tolist() == pytest.approx([0.0, 3.125, 3.625, 4.125])


def test_a_period_repeats_and_can_begin_in_its_middle() -> None:
    process = Process((0.0, 6.0), (1.0, 0.0), (math.inf, math.inf), period_s=10.0)
    rng = np.random.default_rng(0)
    assert take_until(arrival_times_s(process.segments(), rng))(13.0).tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12]
    assert take_until(arrival_times_s(process.segments(24.5), rng))(32.0).tolist() == [24.5, 25.5, 30.5, 31.5]
    assert process.mean_rps == pytest.approx(0.6)


STEPS = st.lists(st.tuples(st.floats(0.1, 50), st.floats(0, 20), st.sampled_from([0.05, 0.5, 1.0, 9.0, math.inf])),
                 min_size=1, max_size=6)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(0, 2**40), st.lists(st.floats(0, 200), max_size=6))
def test_arrivals_ascend_lie_where_there_is_a_rate_and_do_not_depend_on_how_they_are_taken(
    steps: list[tuple[float, float, float]], seed: int, cuts_s: list[float]
) -> None:
    spans_s, rates_rps, shapes = zip(*steps, strict=True)
    starts_s = np.concatenate(([0.0], np.cumsum(spans_s)))
    process = Process(tuple(starts_s.tolist()), (*rates_rps, 1.0), (*shapes, 1.0))
    whole = drawn(process, 300.0, seed)
    assert np.all(np.diff(whole) >= 0)
    rates = np.array([*rates_rps, 1.0])[np.searchsorted(starts_s, whole, side="right") - 1]
    assert np.all(rates > 0)
    take = take_until(arrival_times_s(process.segments(), np.random.default_rng(seed)))
    assert np.array_equal(np.concatenate([take(cut_s) for cut_s in [*sorted(cuts_s), 300.0]]), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), (), ()), "at least one step"),
        (((0.0, 1.0), (1.0,), (1.0,)), "as many starts"),
        (((1.0,), (1.0,), (1.0,)), "first step at 0 s, got 1"),
        (((0.0, 5.0, 5.0), (1.0,) * 3, (1.0,) * 3), "step 2: expected an end after 5 s, got 5"),
        (((0.0,), (-1.0,), (1.0,)), "rate: step 1: .* got -1"),
        (((0.0,), (math.nan,), (1.0,)), "rate: step 1: .* got nan"),
        (((0.0,), (1.0,), (0.0,)), "shape: step 1: .* got 0"),
        (((0.0,), (1.0,), (math.nan,)), "shape: step 1: .* got nan"),
        (((0.0,), (0.0,), (1.0,)), "a step with a rate > 0"),
        (((0.0, 9.0), (1.0, 1.0), (1.0, 1.0), 8.0), "step 2: expected an end after 9 s, got 8"),
    ],
)
def test_wrong_processes(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Process(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (1.0, -0.5772156649015329),  # minus Euler's constant
        (0.5, -0.5772156649015329 - 2 * math.log(2)),
        (0.25, -0.5772156649015329 - math.pi / 2 - 3 * math.log(2)),
        (11.0, -0.5772156649015329 + sum(1 / n for n in range(1, 11))),
        (1e6, math.log(1e6) - 0.5e-6 - 1e-12 / 12),
    ],
)
def test_digamma_against_closed_forms(x: float, expected: float) -> None:
    assert float(digamma(np.array([x]))[0]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [0.5, 1.0, 3.0])
def test_a_shape_is_recovered_within_its_standard_error(shape: float) -> None:
    """Windows of 150 gaps, whose rates differ by up to 20 times: what drifts must not look bursty."""
    moments, mles, gaps = [], [], 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        window = np.repeat(np.arange(10), 150)
        gaps_s = rng.gamma(shape, 1.0, 1500) * np.exp(rng.uniform(0, 3, 10))[window]
        fit = fit_gamma_shape(gaps_s, window)
        assert fit is not None
        moments.append(fit.moments)
        mles.append(fit.mle)
        gaps = fit.gaps
    # Asymptotic variances: k / (n (k psi'(k) - 1)) for likelihood, 2 k (k + 1) / n for moments.
    mle_error = math.sqrt(shape / (gaps * (shape * trigamma(shape) - 1)))
    moments_error = math.sqrt(2 * shape * (shape + 1) / gaps)
    for found, error in ((mles, mle_error), (moments, moments_error)):
        assert abs(np.mean(found) - shape) < 4 * error / math.sqrt(40)
        assert 0.6 * error < np.std(found) < 1.6 * error


def test_few_gaps_in_each_window_do_not_bias_the_shape() -> None:
    """Three gaps to a window: fits that divide by each window's own mean find half again too much."""
    rng = np.random.default_rng(1)
    window = np.repeat(np.arange(20_000), 3)
    fit = fit_gamma_shape(rng.gamma(0.5, 1.0, 60_000), window)
    assert fit is not None
    assert fit.moments == pytest.approx(0.5, rel=0.03)
    assert fit.mle == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize(
    ("gaps_s", "window", "expected"),
    [
        ([], [], None),
        ([1.0], [0], None),
        ([1.0, 1.0], [0, 1], None),
        ([2.0, 2.0, 2.0], [5, 5, 5], (1e6, 1e6)),  # no spread at all: as even as can be said
        ([0.0, 0.0, 9.0, 9.0], [0, 0, 1, 1], (1e6, 1e6)),  # equal stamps count as a microsecond apart
    ],
)
def test_a_shape_of_few_gaps(gaps_s: list[float], window: list[int], expected: tuple[float, float] | None) -> None:
    fit = fit_gamma_shape(np.array(gaps_s), np.array(window, dtype=np.int64))
    assert fit is None if expected is None else fit is not None and fit[:2] == pytest.approx(expected, rel=1e-3)
