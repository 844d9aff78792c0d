"""Token lengths of a trace: percentiles, histograms, fitted families, two modes, response against request.

Lengths are whole numbers with few distinct values, so every figure is computed from `LengthCounts`, how many requests
have each length: 10 M rows cost one pass. Lengths are those of rows with outcome `ok` whose count is known. Percentiles
are nearest-rank: the smallest observed length that at least that share of the rows does not exceed.

Families are fitted to lengths of at least 1 and ranked by the Bayesian information criterion. The continuous ones are
fitted by the likelihood of their densities and judged as what a trace holds of them, whole tokens: the probability of n
is that of (n - 1/2, n + 1/2], of 1 that of (0, 3/2]. So all log-likelihoods and KS distances are on one footing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.record import Outcome

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

BIN_TOKENS: Final = 10
"""Width of the bins of request tokens in which responses are described: the paper's."""
BINS_PER_DECADE: Final = 20
MAX_EXPONENT: Final = 50.0
"""A Zipf exponent above this says that nearly all lengths are equal: there is no tail to speak of."""
MAX_TAIL_STARTS: Final = 50
"""Values of x_min that are tried; all of them where there are no more, else evenly spaced in rank."""
MIN_TAIL: Final = 50
"""Requests that a tail needs for x_min to be chosen by its fit."""
MAX_EM_POINTS: Final = 4096
MAX_EM_STEPS: Final = 500
LEAST_PROBABILITY: Final = 1e-300
STRONG_BIC_GAIN: Final = 10.0
"""Kass & Raftery, Bayes Factors, JASA 90 (1995): above 10 the evidence is very strong."""
CLEAR_SEPARATION: Final = 2.0
"""Ashman, Bird & Zepf, AJ 108 (1994): D above 2 separates two modes cleanly."""


class Distribution(msgspec.Struct, frozen=True):
    """A sample in figures, in the unit of its values; percentiles are nearest-rank."""

    n: int
    mean: float
    std: float
    min: float
    p1: float
    p5: float
    p10: float
    p25: float
    p50: float
    p75: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float


class Histogram(msgspec.Struct, frozen=True):
    """Bin i holds the lengths from edges[i] to edges[i + 1], the latter excluded; it may be the only one at 0."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]


class ZipfFit(msgspec.Struct, frozen=True):
    """P(n) ~ n^-exponent for n >= x_min. ks: distance to the lengths of at least x_min; `tail` is their number."""

    exponent: float
    standard_error: float
    x_min: int
    tail: int
    ks: float


class FamilyFit(msgspec.Struct, frozen=True):
    """One family fitted to all lengths of at least 1, its log-likelihood over them in nats."""

    family: str
    """`zipf`, `lognormal`, `gamma` or `lognormal_mixture`."""
    parameters: dict[str, float]
    """zipf: exponent, x_min. lognormal: mu, sigma of the natural log. gamma: shape, rate a token. lognormal_mixture:
    share_1, mu_1, sigma_1, mu_2, sigma_2, component 1 the shorter one."""
    log_likelihood: float
    bic: float
    ks: float


class Bimodality(msgspec.Struct, frozen=True):
    """Whether lengths have two modes, on the log scale; both tests must agree for `is_bimodal`.

    sarle: (skewness^2 + 1) / kurtosis with the small-sample correction; above 5/9, the uniform's, it points to two
    modes (Sarle, SAS/STAT). bic_gain: BIC of one lognormal minus BIC of two. separation: Ashman's D of the two, the
    distance of their means over the root of their mean variance.
    """

    sarle: float | None
    bic_gain: float
    separation: float
    low_tokens: float
    """Median of the shorter component."""
    high_tokens: float
    low_share: float
    is_bimodal: bool
    """bic_gain > STRONG_BIC_GAIN and separation > CLEAR_SEPARATION."""


class LengthStats(msgspec.Struct, frozen=True):
    """One side's lengths; the None are for too few or all equal lengths."""

    lengths: Distribution | None
    histogram: Histogram | None
    zeros: int
    """Lengths of 0: in the percentiles and the histogram, not in the fits."""
    zipf_tail: ZipfFit | None
    """x_min chosen by the fit."""
    families: tuple[FamilyFit, ...]
    """Best first."""
    bimodality: Bimodality | None


class ResponseBin(msgspec.Struct, frozen=True):
    """Responses to requests of from_tokens to from_tokens + BIN_TOKENS - 1."""

    from_tokens: int
    n: int
    mean: float
    p5: int
    p50: int
    p95: int


class Relation(msgspec.Struct, frozen=True):
    """Response against request tokens, over rows that have both; the correlations are None where one side is constant.

    spearman: the Pearson correlation of ranks, equal values sharing their mean rank.
    """

    n: int
    pearson: float | None
    spearman: float | None
    bins: tuple[ResponseBin, ...]
    """Those with rows, ascending."""


class LengthReport(msgspec.Struct, frozen=True):
    """All of this file for one trace, or one part of it."""

    request: LengthStats
    response: LengthStats
    relation: Relation


@dataclass(frozen=True, slots=True)
class LengthCounts:
    """`counts[i]` requests have length `values[i]`; both shape (k,), values ascending and distinct, counts >= 1."""

    values: Ints
    counts: Ints

    @property
    def n(self) -> int:
        """Requests."""
        return int(self.counts.sum())

    def at_least(self, length: int) -> LengthCounts:
        """The part whose lengths are `length` or more."""
        first = int(np.searchsorted(self.values, length))
        return LengthCounts(self.values[first:], self.counts[first:])

    def percentile(self, share: float) -> int:
        """Nearest-rank; share in 0 to 1, n >= 1."""
        return int(self.values[np.searchsorted(np.cumsum(self.counts), nearest_rank(share, self.n))])


def describe_lengths(table: pl.DataFrame) -> LengthReport:
    """The lengths of a table's rows that went well."""
    ok = table.filter(pl.col("outcome") == Outcome.OK.value).select("request_tokens", "response_tokens")
    return LengthReport(
        length_stats(count_lengths(ok["request_tokens"])),
        length_stats(count_lengths(ok["response_tokens"])),
        relate(ok),
    )


def count_lengths(lengths: pl.Series) -> LengthCounts:
    """How many rows have each length; nulls are left out."""
    known = lengths.drop_nulls()
    by_value = known.alias("value").value_counts(name="n").sort("value")  # several times faster than sorting them all
    return LengthCounts(*(by_value[name].cast(pl.Int64).to_numpy() for name in ("value", "n")))


def length_stats(lengths: LengthCounts) -> LengthStats:
    """All figures of one side."""
    positive = lengths.at_least(1)
    families = fit_families(positive)
    return LengthStats(
        lengths=distribution_of_counts(lengths),
        histogram=log_histogram(lengths),
        zeros=lengths.n - positive.n,
        zipf_tail=fit_zipf_tail(positive),
        families=families,
        bimodality=bimodality(positive, families),
    )


def nearest_rank(share: float, n: int) -> int:
    """The rank, from 1, of the percentile `share` among n. Rounded first: 0.07 * 100 is 7, not 8."""
    return min(max(math.ceil(round(share * n, 6)), 1), n)


_SHARES: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


def distribution_of_counts(lengths: LengthCounts) -> Distribution | None:
    """The figures of counted lengths; None for none."""
    n = lengths.n
    if not n:
        return None
    cumulative = np.cumsum(lengths.counts)
    at = np.searchsorted(cumulative, [nearest_rank(share, n) for share in _SHARES])
    mean = float(lengths.values @ lengths.counts) / n
    variance = float(np.square(lengths.values - mean) @ lengths.counts) / n
    low, high = float(lengths.values[0]), float(lengths.values[-1])
    return Distribution(n, *map(float, (mean, math.sqrt(variance), low, *lengths.values[at], high)))


def distribution(values: NDArray[np.floating | np.integer]) -> Distribution | None:
    """The figures of `values`, shape (n,); what is not finite is unknown and left out. None when nothing is known."""
    known = np.sort(values[np.isfinite(values)])
    n = len(known)
    if not n:
        return None
    at = np.array([nearest_rank(share, n) for share in _SHARES]) - 1
    mean = float(known.mean(dtype=np.float64))
    # Shifted in slices: a second array of doubles would be most of the memory in use.
    squares = sum(
        float(np.square(part.astype(np.float64) - mean).sum()) for part in np.array_split(known, n // 1_000_000 + 1)
    )
    return Distribution(n, *map(float, (mean, math.sqrt(squares / n), known[0], *known[at], known[-1])))


def log_histogram(lengths: LengthCounts, bins_per_decade: int = BINS_PER_DECADE) -> Histogram | None:
    """Bins of equal width in log length, rounded to whole tokens; [0, 1) is one of its own. None for no lengths."""
    if not lengths.n:
        return None
    steps = math.ceil(math.log10(float(lengths.values[-1]) + 2) * bins_per_decade) + 1
    # Rounded first, as 10^(2k/20) may come out above 10^k.
    starts = np.ceil(np.round(10 ** (np.arange(steps + 1) / bins_per_decade), 6)).astype(np.int64)
    edges = np.unique(np.concatenate(([0], starts)))
    edges = edges[: int(np.searchsorted(edges, lengths.values[-1], side="right")) + 1]
    counts = np.bincount(
        np.searchsorted(edges, lengths.values, side="right") - 1, lengths.counts, minlength=len(edges) - 1
    )
    return Histogram(tuple(edges.tolist()), tuple(counts.astype(np.int64).tolist()))


def fit_zipf(lengths: LengthCounts, x_min: int) -> ZipfFit | None:
    """The exponent over lengths of at least `x_min` >= 1, by maximum likelihood, with its asymptotic standard error.

    Clauset, Shalizi & Newman, Power-law distributions in empirical data, SIAM Review 51 (2009), eq. 3.5 (the likelihood
    with Hurwitz's zeta) and 3.6 (1 / sqrt(n (log zeta)'')). The support has no upper end, so the exponent is above 1;
    `traces.profile.fit_zipf` is the one cut at the longest length. None under two different lengths.
    """
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
    from scipy.special import zeta  # type: ignore[import-untyped]

    tail = lengths.at_least(x_min)
    if len(tail.values) < 2:
        return None
    n = tail.n
    mean_log = float(np.log(tail.values) @ tail.counts) / n

    def cost(exponent: float) -> float:
        return math.log(zeta(exponent, x_min)) + exponent * mean_log

    # zeta is about x_min^(1 - exponent): above e^-690 it is a normal double.
    high = min(MAX_EXPONENT, 690 / math.log(x_min + 1))
    exponent = float(minimize_scalar(cost, bounds=(1 + 1e-9, high), method="bounded", options={"xatol": 1e-9}).x)
    step = (exponent - 1) * 1e-3
    curvature = (cost(exponent + step) - 2 * cost(exponent) + cost(exponent - step)) / step**2
    if not curvature > 0 or exponent > high - 1e-6:
        return None
    return ZipfFit(exponent, 1 / math.sqrt(n * curvature), x_min, n, _ks(tail, _zipf_cdf(exponent, x_min)))


def fit_zipf_tail(lengths: LengthCounts, x_min: int | None = None) -> ZipfFit | None:
    """`fit_zipf` above the x_min that brings the fit nearest to the lengths by KS (the paper cited there, 3.3)."""
    if x_min is not None:
        return fit_zipf(lengths, x_min)
    tails = np.cumsum(lengths.counts[::-1])[::-1]
    starts = lengths.values[(tails >= MIN_TAIL) & (lengths.values >= 1)]
    if len(starts) > MAX_TAIL_STARTS:
        starts = starts[np.linspace(0, len(starts) - 1, MAX_TAIL_STARTS).astype(np.int64)]
    fits = [fit for start in starts.tolist() if (fit := fit_zipf(lengths, start)) is not None]
    return min(fits, key=lambda fit: fit.ks, default=None)


def _zipf_cdf(exponent: float, x_min: int) -> Callable[[Array], Array]:
    from scipy.special import zeta

    whole = zeta(exponent, x_min)
    return lambda lengths: np.asarray(1 - zeta(exponent, np.floor(lengths) + 1) / whole, dtype=np.float64)


def _ks(lengths: LengthCounts, cdf: Callable[[Array], Array]) -> float:
    """sup |F_n - F| over whole numbers: at each length, and just before it, where F_n still is the last length's."""
    empirical = np.cumsum(lengths.counts) / lengths.n
    before = np.concatenate(([0.0], empirical[:-1]))
    values = lengths.values.astype(np.float64)
    return float(max(np.abs(empirical - cdf(values)).max(), np.abs(before - cdf(values - 1)).max()))


def fit_families(lengths: LengthCounts) -> tuple[FamilyFit, ...]:
    """The families fitted to lengths >= 1 by maximum likelihood, best BIC first; () under two different lengths.

    BIC = p log n - 2 log L with p parameters (Schwarz 1978). The mixture is there from four different lengths on.
    """
    if len(lengths.values) < 2:
        return ()
    fits = [_fit_lognormal(lengths), _fit_gamma(lengths)]
    zipf = fit_zipf(lengths, int(lengths.values[0]))
    if zipf is not None:
        from scipy.special import zeta

        log_p = -zipf.exponent * np.log(lengths.values) - math.log(zeta(zipf.exponent, zipf.x_min))
        log_likelihood = float(log_p @ lengths.counts)
        parameters = {"exponent": zipf.exponent, "x_min": float(zipf.x_min)}
        fits.append(FamilyFit("zipf", parameters, log_likelihood, _bic(1, lengths.n, log_likelihood), zipf.ks))
    if len(lengths.values) >= 4:
        fits.append(_fit_mixture(lengths))
    return tuple(sorted(fits, key=lambda fit: fit.bic))


def _bic(parameters: int, n: int, log_likelihood: float) -> float:
    return parameters * math.log(n) - 2 * log_likelihood


def _fit_lognormal(lengths: LengthCounts) -> FamilyFit:
    logs = np.log(lengths.values)
    mu = float(logs @ lengths.counts) / lengths.n
    sigma = math.sqrt(float(np.square(logs - mu) @ lengths.counts) / lengths.n)
    return _judged("lognormal", {"mu": mu, "sigma": sigma}, lengths, [(1.0, mu, sigma)])


def _fit_mixture(lengths: LengthCounts) -> FamilyFit:
    components = _em(lengths)
    (share, mu_1, sigma_1), (_, mu_2, sigma_2) = components
    parameters = {"share_1": share, "mu_1": mu_1, "sigma_1": sigma_1, "mu_2": mu_2, "sigma_2": sigma_2}
    return _judged("lognormal_mixture", parameters, lengths, components)


def _judged(
    family: str, parameters: Mapping[str, float], lengths: LengthCounts, components: list[tuple[float, float, float]]
) -> FamilyFit:
    """A mixture of lognormals, each a (share, mu, sigma), against whole lengths."""
    from scipy.special import ndtr

    def standard(tokens: Array, mu: float, sigma: float) -> Array:
        with np.errstate(divide="ignore"):
            return np.asarray((np.log(tokens) - mu) / sigma, dtype=np.float64)

    def cdf(tokens: Array) -> Array:
        above: Array = np.where(tokens < 1, 0.0, tokens + 0.5)
        return np.asarray(sum(share * ndtr(standard(above, mu, sigma)) for share, mu, sigma in components))

    low, high = _cells(lengths)
    p: Array = np.zeros(len(low))
    for share, mu, sigma in components:
        a, b = standard(low, mu, sigma), standard(high, mu, sigma)
        # The difference of the smaller tails: near 1 a difference of cdfs has no digits left.
        p += share * np.where(a > 0, ndtr(-a) - ndtr(-b), ndtr(b) - ndtr(a))
    return _fit_of(family, parameters, lengths, p, cdf)


def _fit_gamma(lengths: LengthCounts) -> FamilyFit:
    """Shape k from log k - digamma(k) = log mean - mean log (the root is unique), rate k / mean."""
    from scipy.optimize import brentq
    from scipy.special import digamma, gammainc, gammaincc

    mean = float(lengths.values @ lengths.counts) / lengths.n
    excess = math.log(mean) - float(np.log(lengths.values) @ lengths.counts) / lengths.n
    # 1 / 2k < log k - digamma(k) < 1 / k brackets it.
    shape = float(brentq(lambda k: math.log(k) - digamma(k) - excess, 0.4 / excess, 1.1 / excess, rtol=1e-12))
    rate = shape / mean

    def cdf(tokens: Array) -> Array:
        return np.asarray(gammainc(shape, np.where(tokens < 1, 0.0, tokens + 0.5) * rate), dtype=np.float64)

    low, high = (edge * rate for edge in _cells(lengths))
    p = np.where(
        low > shape, gammaincc(shape, low) - gammaincc(shape, high), gammainc(shape, high) - gammainc(shape, low)
    )
    return _fit_of("gamma", {"shape": shape, "rate": rate}, lengths, p, cdf)


def _cells(lengths: LengthCounts) -> tuple[Array, Array]:
    """What rounds to each length; 1 takes all that is below it."""
    values = lengths.values.astype(np.float64)
    return np.where(values == 1, 0.0, values - 0.5), values + 0.5


def _fit_of(
    family: str, parameters: Mapping[str, float], lengths: LengthCounts, p: Array, cdf: Callable[[Array], Array]
) -> FamilyFit:
    # A length that the family all but excludes must not make the sum infinite.
    log_likelihood = float(np.log(np.maximum(p, LEAST_PROBABILITY)) @ lengths.counts)
    bic = _bic(len(parameters), lengths.n, log_likelihood)
    return FamilyFit(family, dict(parameters), log_likelihood, bic, _ks(lengths, cdf))


def _em(lengths: LengthCounts) -> list[tuple[float, float, float]]:
    """Two lognormals as (share, mu, sigma), the shorter first, by expectation-maximisation (Dempster et al. 1977).

    Deterministic: it starts from the lengths cut at their quartiles and keeps the most likely end. No sigma falls below
    that of rounding to whole tokens, 1 / (sqrt(12) e^mu): a narrower peak cannot be told from one length.
    """
    logs, weights = _compressed(np.log(lengths.values), lengths.counts / lengths.n)
    cumulative = np.cumsum(weights)
    best: tuple[float, list[tuple[float, float, float]]] | None = None
    for quartile in (0.25, 0.5, 0.75):
        cut = min(max(int(np.searchsorted(cumulative, quartile)), 1), len(logs) - 1)
        belongs: Array = np.zeros((2, len(logs)))
        belongs[0, :cut] = belongs[1, cut:] = 1.0
        last = -math.inf
        for _ in range(MAX_EM_STEPS):
            mass = belongs * weights
            shares = np.maximum(mass.sum(axis=1), 1e-12)
            mu = mass @ logs / shares
            variance = np.sum(mass * np.square(logs - mu[:, None]), axis=1) / shares
            sigma = np.maximum(np.sqrt(variance), np.exp(-np.maximum(mu, 0)) / math.sqrt(12))
            log_p = (
                np.log(shares / sigma)[:, None] - 0.5 * np.square((logs - mu[:, None]) / sigma[:, None])
            )  # fmt: skip
            top = log_p.max(axis=0)
            total = top + np.log(np.exp(log_p - top).sum(axis=0))
            belongs = np.exp(log_p - total)
            likelihood = float(total @ weights)
            if likelihood - last < 1e-10:
                break
            last = likelihood
        if best is None or likelihood > best[0] + 1e-9:
            shares = shares / shares.sum()
            rows = zip(shares.tolist(), mu.tolist(), sigma.tolist(), strict=True)
            best = (likelihood, sorted(rows, key=lambda row: row[1]))
    assert best is not None
    return best[1]


def _compressed(logs: Array, weights: Array) -> tuple[Array, Array]:
    """At most MAX_EM_POINTS points: neighbours within 1 / MAX_EM_POINTS of the range become their mean."""
    if len(logs) <= MAX_EM_POINTS:
        return logs, weights
    place = ((logs - logs[0]) / (logs[-1] - logs[0]) * (MAX_EM_POINTS - 1)).astype(np.int64)
    mass: Array = np.bincount(place, weights).astype(np.float64)
    sums: Array = np.bincount(place, weights * logs).astype(np.float64)
    return sums[mass > 0] / mass[mass > 0], mass[mass > 0]


def bimodality(lengths: LengthCounts, families: tuple[FamilyFit, ...]) -> Bimodality | None:
    """Two modes or one, from lengths >= 1 and their fits; None where no mixture was fitted."""
    by_name = {fit.family: fit for fit in families}
    if "lognormal_mixture" not in by_name:
        return None
    two = by_name["lognormal_mixture"]
    p = two.parameters
    gain = by_name["lognormal"].bic - two.bic
    spread = math.sqrt((p["sigma_1"] ** 2 + p["sigma_2"] ** 2) / 2)
    separation = (p["mu_2"] - p["mu_1"]) / spread
    return Bimodality(
        sarle=sarle_coefficient(np.log(lengths.values), lengths.counts),
        bic_gain=gain,
        separation=separation,
        low_tokens=math.exp(p["mu_1"]),
        high_tokens=math.exp(p["mu_2"]),
        low_share=p["share_1"],
        is_bimodal=gain > STRONG_BIC_GAIN and separation > CLEAR_SEPARATION,
    )


def sarle_coefficient(values: Array, counts: Ints) -> float | None:
    """(g^2 + 1) / (k + 3 (n - 1)^2 / ((n - 2)(n - 3))), g and k the unbiased skewness and excess kurtosis.

    values, counts: shape (k,), each value and how often it occurs. None under four values or where all are equal.
    """
    n = int(counts.sum())
    if n < 4 or len(values) < 2:
        return None
    off = values - float(values @ counts) / n
    m2, m3, m4 = (float(off**power @ counts) / n for power in (2, 3, 4))
    if m2 <= 0:
        return None
    skew: float = m3 / m2**1.5 * math.sqrt(n * (n - 1)) / (n - 2)
    kurtosis: float = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * (m4 / m2**2 - 3) + 6)
    return (skew**2 + 1) / (kurtosis + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3)))


def relate(lengths: pl.DataFrame, bin_tokens: int = BIN_TOKENS) -> Relation:
    """Response against request tokens of rows that have both; other columns are not read."""
    known = lengths.select("request_tokens", "response_tokens").drop_nulls()
    # One 64-bit key a pair, sorted: several times faster than grouping by two columns.
    keys = known.select(pl.col("request_tokens").cast(pl.Int64) * 2**32 + pl.col("response_tokens")).to_series()
    sorted_keys = keys.to_numpy(writable=True)
    del keys
    sorted_keys.sort()
    first = np.flatnonzero(np.concatenate((sorted_keys[:1] >= 0, sorted_keys[1:] != sorted_keys[:-1])))
    key, n = sorted_keys[first], np.diff(first, append=len(sorted_keys))
    del sorted_keys
    request, response = key >> 32, key & (2**32 - 1)
    return Relation(
        n=known.height,
        pearson=_correlation(request.astype(np.float64), response.astype(np.float64), n),
        spearman=_correlation(_ranks(request, n), _ranks(response, n), n),
        bins=_response_bins(request // bin_tokens, response, n, bin_tokens),
    )


def _ranks(values: Ints, n: Ints) -> Array:
    """The mean rank of each value, where values[i] occurs n[i] times."""
    _, place = np.unique(values, return_inverse=True)
    sizes = np.bincount(place, n)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[place]


def _correlation(x: Array, y: Array, n: Ints) -> float | None:
    if not len(n):
        return None
    total = float(n.sum())
    x, y = x - float(x @ n) / total, y - float(y @ n) / total
    spread = float(np.square(x) @ n) * float(np.square(y) @ n)
    return max(-1.0, min(1.0, float((x * y) @ n) / math.sqrt(spread))) if spread > 0 else None


def _response_bins(place: Ints, response: Ints, n: Ints, bin_tokens: int) -> tuple[ResponseBin, ...]:
    if not len(n):
        return ()
    order = np.lexsort((response, place))
    place, response, n = place[order], response[order], n[order]
    cumulative = np.cumsum(n)
    first = np.flatnonzero(np.concatenate(([True], place[1:] != place[:-1])))
    before = np.concatenate(([0], cumulative))[first]
    sizes = np.add.reduceat(n, first)
    means = np.add.reduceat(response.astype(np.float64) * n, first) / sizes
    bands = [
        response[np.searchsorted(cumulative, before + np.maximum(np.ceil(np.round(share * sizes, 6)), 1))]
        for share in (0.05, 0.5, 0.95)
    ]
    columns = (place[first] * bin_tokens, sizes, means, *bands)
    return tuple(ResponseBin(*row) for row in zip(*(column.tolist() for column in columns), strict=True))
