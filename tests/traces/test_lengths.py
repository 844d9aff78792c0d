"""Lengths: fits against known truth and scipy, the rest against plain Python."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]
from scipy.special import polygamma  # type: ignore[import-untyped]

from tests.traces.test_burstgpt import real_head
from traces.codec import read_trace
from traces.lengths import (
    LengthCounts,
    bimodality,
    count_lengths,
    describe_lengths,
    distribution,
    fit_families,
    fit_zipf,
    fit_zipf_tail,
    length_stats,
    log_histogram,
    relate,
    sarle_coefficient,
)
from traces.table import collect

SIGMAS = 5.0
"""Of a normal error, 5 standard errors are passed once in 1.7 million draws: below 1e-4 over all seeds here."""


def counted(values: object) -> LengthCounts:
    return count_lengths(pl.Series(np.asarray(values, dtype=np.int64)))


def family(lengths: LengthCounts, name: str) -> dict[str, float]:
    return next(fit for fit in fit_families(lengths) if fit.family == name).parameters


@pytest.mark.parametrize("theta", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_zipf_gives_back_its_exponent(theta: float, seed: int) -> None:
    draws = np.minimum(np.random.default_rng(seed).zipf(theta, 20_000), 2**40)
    fit = fit_zipf(counted(draws), 1)
    assert fit is not None
    assert abs(fit.exponent - theta) < SIGMAS * fit.standard_error
    # Kolmogorov's distribution bounds a discrete one's: P(sqrt(n) D > 2.4) = 2e-5.
    assert fit.ks < 2.4 / math.sqrt(20_000)


def test_zipf_standard_error_is_the_spread_over_seeds() -> None:
    fits = [fit_zipf(counted(np.random.default_rng(seed).zipf(2.5, 2000)), 1) for seed in range(200)]
    exponents = [fit.exponent for fit in fits if fit is not None]
    errors = [fit.standard_error for fit in fits if fit is not None]
    # The standard deviation of 200 draws has a relative error of 1 / sqrt(400).
    assert np.std(exponents) == pytest.approx(np.mean(errors), rel=SIGMAS / math.sqrt(400))


def test_zipf_tail_begins_where_the_power_law_does() -> None:
    rng = np.random.default_rng(3)
    body = rng.integers(1, 100, 10_000)
    tail = np.floor(99.5 * (1 - rng.random(10_000)) ** (-1 / 1.5) + 0.5)  # Clauset et al., appendix D
    fit = fit_zipf_tail(counted(np.concatenate((body, np.minimum(tail, 1e8)))))
    assert fit is not None
    assert 60 <= fit.x_min <= 300
    assert fit.exponent == pytest.approx(2.5, abs=SIGMAS * fit.standard_error + 0.02)


@pytest.mark.parametrize("seed", range(5))
def test_lognormal_and_gamma_give_back_their_parameters(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 20_000
    lognormal = family(counted(np.rint(rng.lognormal(6.0, 1.0, n))), "lognormal")
    assert abs(lognormal["mu"] - 6) < SIGMAS / math.sqrt(n)
    assert abs(lognormal["sigma"] - 1) < SIGMAS / math.sqrt(2 * n)
    shape = 2.0
    gamma = family(counted(np.maximum(np.rint(rng.gamma(shape, 300.0, n)), 1)), "gamma")
    # Fisher information of (shape, rate): the shape's variance is 1 / n (psi'(k) - 1 / k).
    error = 1 / math.sqrt(n * (float(polygamma(1, shape)) - 1 / shape))
    assert abs(gamma["shape"] - shape) < SIGMAS * error
    assert gamma["rate"] * 300 == pytest.approx(1, abs=SIGMAS * error)


@pytest.mark.parametrize("seed", range(5))
def test_a_mixture_gives_back_its_parameters(seed: int) -> None:
    """Two parts 6.7 sigmas apart overlap in 1 of 2,000 lengths: each has its own sample's errors."""
    rng = np.random.default_rng(seed)
    n, share = 20_000, 0.3
    is_short = rng.random(n) < share
    two = family(
        counted(np.rint(np.where(is_short, rng.lognormal(4, 0.4, n), rng.lognormal(7, 0.5, n)))), "lognormal_mixture"
    )
    assert abs(two["share_1"] - share) < SIGMAS * math.sqrt(share * (1 - share) / n)
    for number, part, mu, sigma in ((1, share * n, 4.0, 0.4), (2, (1 - share) * n, 7.0, 0.5)):
        assert abs(two[f"mu_{number}"] - mu) < SIGMAS * sigma / math.sqrt(part)
        assert abs(two[f"sigma_{number}"] - sigma) < SIGMAS * sigma / math.sqrt(2 * part)


@pytest.mark.parametrize("truth", ["lognormal", "gamma", "zipf", "lognormal_mixture"])
def test_the_information_criterion_finds_the_family(truth: str) -> None:
    rng = np.random.default_rng(11)
    n = 20_000
    samples: dict[str, Callable[[], NDArray[Any]]] = {
        "lognormal": lambda: rng.lognormal(5.0, 1.0, n),
        "gamma": lambda: rng.gamma(1.5, 200.0, n),
        "zipf": lambda: rng.zipf(2.0, n),
        "lognormal_mixture": lambda: np.where(rng.random(n) < 0.3, rng.lognormal(2, 0.4, n), rng.lognormal(6, 0.6, n)),
    }
    draws = samples[truth]()
    lengths = counted(np.maximum(np.rint(np.minimum(draws, 1e9)), 1))
    fits = fit_families(lengths)
    assert fits[0].family == truth
    assert [fit.bic for fit in fits] == sorted(fit.bic for fit in fits)
    two = bimodality(lengths, fits)
    assert two is not None
    assert two.is_bimodal == (truth == "lognormal_mixture")
    if truth == "lognormal_mixture":
        assert two.low_share == pytest.approx(0.3, abs=0.02)
        assert math.log(two.low_tokens) == pytest.approx(2, abs=0.05)
        assert math.log(two.high_tokens) == pytest.approx(6, abs=0.05)
        assert two.sarle is not None
        assert two.sarle > 5 / 9


def test_likelihood_and_ks_are_those_of_whole_tokens() -> None:
    values = np.maximum(np.rint(np.random.default_rng(1).gamma(1.2, 40.0, 500)), 1)
    fits = {fit.family: fit for fit in fit_families(counted(values))}
    below = np.where(values == 1, 0.0, values - 0.5)
    grid = np.arange(0, values.max() + 1)
    steps = np.searchsorted(np.sort(values), grid, side="right") / len(values)
    p, q = fits["gamma"].parameters, fits["lognormal"].parameters
    laws = {
        "gamma": stats.gamma(p["shape"], scale=1 / p["rate"]),
        "lognormal": stats.lognorm(q["sigma"], scale=math.exp(q["mu"])),
    }
    for name, law in laws.items():
        expected = np.log(law.cdf(values + 0.5) - law.cdf(below)).sum()
        assert fits[name].log_likelihood == pytest.approx(expected, rel=1e-9)
        assert fits[name].bic == pytest.approx(2 * math.log(500) - 2 * expected, rel=1e-9)
        model = np.where(grid < 1, 0.0, law.cdf(grid + 0.5))
        assert fits[name].ks == pytest.approx(np.abs(steps - model).max(), abs=1e-9)
    assert p["shape"] == pytest.approx(stats.gamma.fit(values, floc=0)[0], rel=1e-4)


@pytest.mark.parametrize(
    ("values", "families"),
    [([], 0), ([7], 0), ([7, 7, 7], 0), ([0, 0], 0), ([7, 8], 3), ([1, 2_147_483_647], 3), ([1, 2, 3, 4], 4)],
)
def test_few_lengths_have_the_fits_that_they_allow(values: list[int], families: int) -> None:
    found = length_stats(counted(values))
    assert len([fit for fit in found.families if fit.family != "zipf"]) <= families
    assert (found.lengths is None) == (not values)
    assert found.zeros == values.count(0)
    for fit in found.families:
        assert all(math.isfinite(x) for x in (*fit.parameters.values(), fit.log_likelihood, fit.bic, fit.ks))


lists = st.lists(st.integers(0, 3000), min_size=1, max_size=80)


@settings(deadline=None, max_examples=60)
@given(values=lists, seed=st.integers(0, 99))
def test_figures_are_numpys_in_any_order(values: list[int], seed: int) -> None:
    lengths = counted(values)
    found = length_stats(lengths)
    figures = found.lengths
    assert figures is not None
    assert figures == length_stats(counted(np.random.default_rng(seed).permutation(values))).lengths
    again = distribution(np.array(values, dtype=np.float64))
    assert again is not None
    assert (figures.n, figures.p50, figures.p99, figures.max) == (again.n, again.p50, again.p99, again.max)
    assert [figures.mean, figures.std] == pytest.approx([np.mean(values), np.std(values)])
    for share, value in ((0.05, figures.p5), (0.5, figures.p50), (0.9, figures.p90)):
        assert value == np.percentile(values, round(share * 100), method="inverted_cdf")
        assert lengths.percentile(share) == value
    histogram = log_histogram(lengths)
    assert histogram is not None
    assert list(histogram.counts) == np.histogram(values, histogram.edges)[0].tolist()
    assert sum(histogram.counts) == len(values)
    assert histogram.edges[-1] > max(values)  # numpy's last bin has its end too: it must be empty there


@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), min_size=2, max_size=60))
def test_relation_is_scipys_and_bins_add_up(pairs: list[tuple[int, int]]) -> None:
    request, response = zip(*pairs, strict=True)
    found = relate(pl.DataFrame({"request_tokens": request, "response_tokens": response}))
    if len(set(request)) > 1 and len(set(response)) > 1:
        assert found.spearman == pytest.approx(stats.spearmanr(request, response).statistic, abs=1e-9)
        assert found.pearson == pytest.approx(stats.pearsonr(request, response).statistic, abs=1e-9)
    else:
        assert found.spearman is None
    assert sum(each.n for each in found.bins) == found.n == len(pairs)
    for each in found.bins:
        inside = [b for a, b in pairs if each.from_tokens <= a < each.from_tokens + 10]
        p5, p50, p95 = (int(np.percentile(inside, q, method="inverted_cdf")) for q in (5, 50, 95))
        assert [each.n, each.mean] == pytest.approx([len(inside), np.mean(inside)])
        assert (each.p5, each.p50, each.p95) == (p5, p50, p95)


def test_sarle_is_five_ninths_for_a_uniform() -> None:
    values = np.arange(100_000, dtype=np.float64)
    assert sarle_coefficient(values, np.ones(100_000, dtype=np.int64)) == pytest.approx(5 / 9, abs=1e-3)
    draws = np.random.default_rng(0).normal(size=300)
    bias_free = (stats.skew(draws, bias=False) ** 2 + 1) / (
        stats.kurtosis(draws, bias=False) + 3 * 299**2 / (298 * 297)
    )
    assert sarle_coefficient(draws, np.ones(300, dtype=np.int64)) == pytest.approx(bias_free)
    assert sarle_coefficient(np.array([1.0, 2.0]), np.array([1, 2])) is None


@pytest.mark.parametrize("name", ["BurstGPT_1_head.csv", "BurstGPT_3_head.csv"])
def test_real_heads_equal_plain_counting(name: str) -> None:
    path = real_head(name)
    with path.open(newline="") as text:
        rows = [row for row in csv.DictReader(text) if row["Response tokens"] != "0"]
    found = describe_lengths(collect(read_trace(path)).table)
    bins: Counter[int] = Counter(int(row["Request tokens"]) // 10 * 10 for row in rows)
    assert {each.from_tokens: each.n for each in found.relation.bins} == bins
    for column, side in (("Request tokens", found.request), ("Response tokens", found.response)):
        values = sorted(int(row[column]) for row in rows)
        figures = side.lengths
        assert figures is not None
        assert [figures.n, figures.mean] == pytest.approx([len(values), sum(values) / len(values)])
        assert figures.p90 == values[math.ceil(0.9 * len(values)) - 1]
        logs = [math.log(value) for value in values]
        mu = sum(logs) / len(logs)
        lognormal = next(fit for fit in side.families if fit.family == "lognormal")
        assert lognormal.parameters["mu"] == pytest.approx(mu)
        sigma = math.sqrt(sum((x - mu) ** 2 for x in logs) / len(logs))
        assert lognormal.parameters["sigma"] == pytest.approx(sigma)
