"""How bursty arrivals are: gaps, counts by window, Gamma fits of the gaps window by window, and burst episodes.

    stamps_s    shape (n,), epoch seconds, finite, non-decreasing: the column `received_at` of `traces.table`
    alpha       the Gamma shape of the gaps: CV = 1 / sqrt(alpha); 1 is Poisson, below 1 bursty, above 1 even
    beta        the Gamma rate (1 / scale), 1/s: the mean gap is alpha / beta
    windows     lie on the epoch's grid (stamp // window_s), so that one window is the same of every service

**Likelihood.** A window's gaps lie between its first and its last request, so that given those two and the number of
gaps their shares of the time between are Dirichlet(alpha, ..., alpha) for any rate: the edges of the window do not
bias the fit, and n small gaps do not bias it by the 3 / n of the usual maximum likelihood. What is maximised is

    sum log f(x_i; alpha, alpha / m) - log f_S(n m; n alpha, alpha / m)          m = mean gap, S = the sum of n gaps

where f and f_S are Gamma densities; the rate alpha / m drops out of it. The standard error is 1 / sqrt(observed Fisher
information), taken in log alpha (Efron and Hinkley 1978, Biometrika 65); log beta = log alpha - log m, and m is
independent of the shares (Lukacs 1955, Ann. Math. Stat. 26), so Var log beta = Var log alpha + 1 / (n alpha).

**Below the second** stamps are taken as they are, but a gap under SHORT_GAP_S counts as the chance of one so short, not
as its density: of bursty gaps (alpha 0.25, 1 request/s) 4 % are that short, and the clock's steps would decide the fit.

**Whole seconds.** BurstGPT's stamps are floors. A gap x that begins at a phase u of its second is recorded as
g = floor(u + x). Over a window phases are uniform, so

    P(g) = integral of f(x) max(0, 1 - |x - g|) dx = H(g + 1) - 2 H(g) + H(g - 1),   H(y) = E max(X - y, 0)

which takes the place of f above: a gap of 0 is not a density at 0, which no Gamma with alpha > 1 has and which for
alpha < 1 is infinite. m stays the mean recorded gap: rounding moves the sum of a window by under a second. Consecutive
gaps share a phase, so this is a composite likelihood (Varin, Reid and Firth 2011, Statistica Sinica 21). In simulations
of 20-minute windows at 0.05 to 3 requests/s and alpha 0.25 to 2 the errors divided by the standard error stated here
had a standard deviation of 0.84 to 1.05; the tests repeat it. In busy windows nearly every gap is 0 or 1, and the
seconds hide the shape: without LONG_GAPS of the others such a window has no alpha. A rule by the standard error would
keep just the windows that chance made look bursty (Poisson at 10/s: 17 of 400, all of them "alpha" about 0.6). Near
the border this rule leans the same way, by about one standard error at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.table import MAX_SPAN_S, clock_s, pieces

WINDOWS_S: Final = (1, 10, 60, 300, 1200, 3600)
"""Windows that counts are described by."""
FIT_WINDOW_S: Final = 1200
"""The paper's."""
DETRENDED_WINDOW_S: Final = 300
MIN_GAPS: Final = 20
MAX_LOG_SE: Final = 0.4
"""An alpha known less well than within a factor of 1.5 is not given."""
BUSY_GAP_S: Final = 0.3
LONG_GAPS: Final = 10
"""Whole seconds show the shape of gaps shorter than that on average only by this many gaps of 2 s or more."""
LOG_SHAPES: Final = (math.log(1e-3), math.log(1e4))
DISPERSION_BINS: Final = 20
SHORT_GAP_S: Final = 1e-5
"""Stamps are kept to a microsecond, some coarser: of a shorter gap it is only known that it is that short."""
THREADS: Final = 2
CHUNK_ROWS: Final = 300_000
CHUNK_CELLS: Final = 2_000_000
"""Windows are fitted so many requests, and so many places for a gap, at a time."""
LEVELS: Final = 5
"""Halves of an octave that a detrended rate may lie from its window's."""
STEP: Final = 0.01
"""Of the differences in log alpha."""
SMOOTH_SHAPE: Final = 8.0
SMOOTH_RATE: Final = 2.0
"""Up to this alpha, and this beta in 1/s, a density turns so little within a second that quadrature is as good."""
QUADRATURE_NODES: Final = 5

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


class Quantiles(msgspec.Struct, frozen=True):
    """Of a sample that is not empty; linear between order statistics."""

    mean: float
    p10: float
    p50: float
    p90: float
    p99: float
    max: float


class WindowCounts(msgspec.Struct, frozen=True):
    """Requests by window of one length, from the second of the first request on, empty windows included.

    windows: whole ones in the span; all but the peak is of these. dispersion: variance / mean of the counts, 1 for
    Poisson; None under two windows. peak_rps: of the fullest window, the broken last one included, which begins at
    peak_at_s; a window elsewhere than on this grid may hold up to twice as many.
    """

    window_s: int
    windows: int
    p50_rps: float | None
    p99_rps: float | None
    dispersion: float | None
    peak_rps: float
    peak_at_s: float


class Arrivals(msgspec.Struct, frozen=True):
    """When requests came. rate_rps: requests / span_s, None when the span is 0. gap_cv: None when every gap is 0 and
    under two gaps. zero_gaps: gaps between equal stamps."""

    requests: int
    first_s: float | None
    last_s: float | None
    span_s: float | None
    rate_rps: float | None
    gap_s: Quantiles | None
    gap_cv: float | None
    zero_gaps: int
    windows: tuple[WindowCounts, ...]


def quantiles(values: Array, *, may_reorder: bool = False) -> Quantiles | None:
    """None of an empty sample. may_reorder: the values need not stay in their order, which saves copies."""
    if not len(values):
        return None
    mean, most = float(values.mean()), float(values.max())
    if not may_reorder:
        values = values.copy()
    place = np.array((0.1, 0.5, 0.9, 0.99)) * (len(values) - 1)
    low = place.astype(np.int64)
    high = np.minimum(low + 1, len(values) - 1)
    values.partition(np.union1d(low, high))
    p10, p50, p90, p99 = (values[low] + (values[high] - values[low]) * (place - low)).tolist()
    return Quantiles(mean, p10, p50, p90, p99, most)


def describe_arrivals(stamps_s: Array) -> Arrivals:
    """Gaps, and counts by each of WINDOWS_S."""
    n = len(stamps_s)
    if n == 0:
        return Arrivals(0, None, None, None, None, None, None, 0, ())
    first_s, last_s = float(stamps_s[0]), float(stamps_s[-1])
    gaps_s = np.diff(stamps_s)
    mean_s = (last_s - first_s) / max(n - 1, 1)
    squares = sum(float(np.square(gaps_s[here] - mean_s).sum()) for here in pieces(n - 1))
    zero_gaps = int(np.count_nonzero(gaps_s == 0))
    gap_s = quantiles(gaps_s, may_reorder=True)
    del gaps_s
    return Arrivals(
        requests=n,
        first_s=first_s,
        last_s=last_s,
        span_s=last_s - first_s,
        rate_rps=n / (last_s - first_s) if last_s > first_s else None,
        gap_s=gap_s,
        gap_cv=math.sqrt(squares / (n - 1)) / mean_s if n > 2 and mean_s else None,
        zero_gaps=zero_gaps,
        windows=_window_counts(stamps_s),
    )


def _window_counts(stamps_s: Array) -> tuple[WindowCounts, ...]:
    base_s = math.floor(stamps_s[0])
    # Sparse, so that a gap of years costs nothing; each length is counted from the one before.
    place, sums = _counts(stamps_s, 1)
    place -= base_s
    length_s = 1
    span_s = stamps_s[-1] - base_s + (1 if has_whole_seconds(stamps_s) else 0)
    described = []
    for window_s in WINDOWS_S:
        windows = int(span_s // window_s)
        if window_s > length_s:
            place, sums = _summed(place // (window_s // length_s), sums)
            length_s = window_s
        peak = int(sums.argmax())
        inside = np.bincount(sums[: np.searchsorted(place, windows)], minlength=1)
        inside[0] = windows - int(inside.sum())
        count = np.arange(len(inside))
        mean = int(inside @ count) / windows if windows else 0.0
        squares = float(inside @ np.square(count - mean))
        rank = np.cumsum(inside)
        described.append(
            WindowCounts(
                window_s=window_s,
                windows=windows,
                p50_rps=int(np.searchsorted(rank, math.ceil(0.5 * windows))) / window_s if windows else None,
                p99_rps=int(np.searchsorted(rank, math.ceil(0.99 * windows))) / window_s if windows else None,
                dispersion=squares / (windows - 1) / mean if windows > 1 and mean else None,
                peak_rps=int(sums[peak]) / window_s,
                peak_at_s=float(base_s + place[peak] * window_s),
            )
        )
    return tuple(described)


def _runs(places: Ints) -> tuple[Ints, Ints]:
    """The distinct values of non-decreasing `places`, and how often each stands there."""
    starts = np.flatnonzero(np.diff(places, prepend=places[:1] - 1))
    return places[starts], np.diff(starts, append=len(places))


def _counts(stamps_s: Array, window_s: int) -> tuple[Ints, Ints]:
    """The windows that have requests, and how many."""
    numbers: list[Ints] = []
    counts: list[Ints] = []
    for here in pieces(len(stamps_s)):
        number, count = _runs(np.floor_divide(stamps_s[here], window_s).astype(np.int64))
        if numbers and numbers[-1][-1] == number[0]:  # it goes on here
            counts[-1][-1] += count[0]
            number, count = number[1:], count[1:]
        if len(number):
            numbers.append(number)
            counts.append(count)
    return np.concatenate(numbers), np.concatenate(counts)


def _summed(places: Ints, counts: Ints) -> tuple[Ints, Ints]:
    distinct, lengths = _runs(places)
    return distinct, np.add.reduceat(counts, np.cumsum(lengths) - lengths)


def has_whole_seconds(stamps_s: Array) -> bool:
    """Whether every stamp is a whole second; with an empty sample, yes."""
    return all((np.floor(stamps_s[here]) == stamps_s[here]).all() for here in pieces(len(stamps_s)))


FIT_SCHEMA: Final[dict[str, pl.DataType]] = {
    "start_s": pl.Float64(),
    "requests": pl.Int64(),
    "gaps": pl.Int64(),
    "cv": pl.Float64(),
    "alpha": pl.Float64(),
    "alpha_se": pl.Float64(),
    "beta": pl.Float64(),
    "beta_se": pl.Float64(),
    "method": pl.Enum(["mle", "moments"]),
    "poisson_p": pl.Float64(),
    "dispersion_p": pl.Float64(),
}
"""The columns of `fit_windows`."""


def fit_windows(
    stamps_s: Array,
    *,
    window_s: int = FIT_WINDOW_S,
    detrend: bool = False,
    whole_seconds: bool | None = None,
    min_gaps: int = MIN_GAPS,
    most_fits: int | None = None,
    threads: int = THREADS,
) -> pl.DataFrame:
    """A row for each window with a request, in order of time; null for what is not defined there.

    most_fits: of more windows, every k-th is fitted, k odd and no multiple of 3, so that all times of the hour and the
    day are among them; the others have their requests, gaps and cv. None fits all.

    detrend: each gap counts times the rate at its middle: the requests of three windows around, linear between the
    middles of windows, and scaled so that the window's mean gap stays. A rate that climbs through a window is then
    not taken for burstiness. whole_seconds: how stamps are read; None looks at them.
    requests, gaps: in the window, and between two requests of it. cv: of these gaps as recorded, from two on.
    alpha, beta: from `min_gaps` gaps on. method: `mle` is the likelihood at the head of this file. `moments`, where
    that has no maximum or MAX_LOG_SE is passed, is Var x = m^2 (n - 1) / (n alpha + 1), less 1/6 s^2 for the rounding
    of whole seconds (for g = floor(u + x): Var g = Var x + E phi (1 - phi), phi the fraction of x, and 1/6 for a
    uniform phi), which needs a mean gap of at least 1 s; it has no standard error.
    poisson_p: likelihood ratio test of alpha = 1 (chi-square, 1 degree of freedom; Wilks 1938). dispersion_p: Fisher's
    index of dispersion of the counts in DISPERSION_BINS parts of the window, two-sided (Fisher 1950, Biometrics 6).
    """
    if not len(stamps_s):
        return pl.DataFrame(schema=FIT_SCHEMA)
    is_whole = has_whole_seconds(stamps_s) if whole_seconds is None else whole_seconds
    number, requests = _counts(stamps_s, window_s)
    trend = _trend(number, requests) if detrend else None
    row = np.concatenate(([0], np.cumsum(requests)))
    every = 1
    while most_fits is not None and (len(number) > most_fits * every or every % 2 == 0 or every % 3 == 0):
        every += 1
    most_windows = max(1, CHUNK_CELLS // (window_s + 3) // (LEVELS if detrend else 1))
    chunks = []
    first = 0
    while first < len(number):
        last = int(np.searchsorted(row, row[first] + CHUNK_ROWS))
        last = min(max(last, first + 1), first + most_windows, len(number))
        chunks.append(slice(first, last))
        first = last

    def fit(here: slice) -> pl.DataFrame:
        part = stamps_s[row[here.start] : row[here.stop]]
        around = None if trend is None else trend[:, here]
        is_asked = number[here] % every == 0
        return _fit(_Windows(part, number[here], requests[here], window_s, is_whole, around), min_gaps, is_asked)

    # numpy and scipy compute without the interpreter's lock.
    with ThreadPoolExecutor(threads) as pool:
        return pl.concat(pool.map(fit, chunks))


@dataclass(frozen=True, slots=True)
class _Windows:
    """Some windows with requests. `trend`: None, or shape (3, windows): the rate a window before, in and after each."""

    stamps_s: Array
    number: Ints
    requests: Ints
    window_s: int
    is_whole: bool
    trend: Array | None


def _fit(windows: _Windows, min_gaps: int, is_asked: NDArray[np.bool_]) -> pl.DataFrame:
    """is_asked: shape (windows,), which to fit."""
    from scipy.special import chdtr, chdtrc  # type: ignore[import-untyped]

    requests, gaps = windows.requests, windows.requests - 1
    of_request = np.repeat(np.arange(len(gaps)), requests)
    is_inside = of_request[1:] == of_request[:-1]
    place = of_request[1:][is_inside]
    phase = windows.stamps_s / windows.window_s - windows.number[of_request]
    recorded_s: Array = np.diff(windows.stamps_s)[is_inside]

    def summed(values: Array) -> Array:
        return np.bincount(place, values, len(gaps)).astype(np.float64)

    span_s = summed(recorded_s)
    mean_s = span_s / np.maximum(gaps, 1)
    gaps_s, weight = recorded_s, None
    if windows.trend is not None:
        from_middle = ((phase[1:] + phase[:-1])[is_inside] - 1) / 2
        before, rate, after = windows.trend
        weight = rate[place] + np.where(from_middle < 0, (rate - before)[place], (after - rate)[place]) * from_middle
        weighted_s = summed(recorded_s * weight)
        weight *= np.divide(span_s, weighted_s, out=np.ones_like(span_s), where=weighted_s > 0)[place]
        gaps_s = recorded_s * weight
    off = summed(np.square(gaps_s - mean_s[place]))
    has_cv = (gaps > 1) & (mean_s > 0)
    cv = np.sqrt(off / np.maximum(gaps, 1)) / np.where(has_cv, mean_s, 1)

    is_fitted = has_cv & (gaps >= min_gaps) & is_asked
    fitted = np.flatnonzero(is_fitted)
    n, m = gaps[fitted], mean_s[fitted]
    here = is_fitted[place]
    where = (np.cumsum(is_fitted) - 1)[place[here]]
    rounding = n / 6 if windows.is_whole else np.zeros(len(n))
    squares = (off[fitted] - rounding) / np.square(m)
    moments = (n * (n - 1) / np.where(squares > 0, squares, np.inf) - 1) / n
    has_moments = (moments > 0) & ((m >= 1) | (not windows.is_whole))

    data = (
        _rounded(recorded_s[here], None if weight is None else weight[here], where, m, windows.window_s)
        if windows.is_whole
        else _exact(gaps_s[here], where, m)
    )
    start = np.log(np.clip(np.where(moments > 0, moments, 1), 0.05, 20))
    log_alpha, log_se, ratio = _maximum(lambda log_a, at: data(log_a, at) - _of_sum(np.exp(log_a), n[at], m[at]), start)
    is_seen = (
        (not windows.is_whole) | (m >= BUSY_GAP_S) | (summed((recorded_s >= 2).astype(np.float64))[fitted] >= LONG_GAPS)
    )
    is_mle = (log_se <= MAX_LOG_SE) & is_seen
    alpha = np.where(is_mle, np.exp(log_alpha), np.where(has_moments, moments, np.nan))
    beta = alpha / m
    se = np.where(is_mle, log_se, np.nan)
    # Rounding may put a stamp's phase at 1.
    bins = np.minimum((phase * DISPERSION_BINS).astype(np.int64), DISPERSION_BINS - 1) + of_request * DISPERSION_BINS
    counts = np.bincount(bins, minlength=len(gaps) * DISPERSION_BINS).reshape(-1, DISPERSION_BINS)[fitted]
    expected = requests[fitted] / DISPERSION_BINS
    index = np.sum(np.square(counts - expected[:, None]), axis=1) / expected
    freedom = DISPERSION_BINS - 1

    def all_windows(values: Array, at: Ints) -> pl.Series:
        column = np.full(len(gaps), np.nan)
        column[at] = values
        return pl.Series(column).fill_nan(None)

    fits = pl.DataFrame(
        {
            "start_s": windows.number.astype(np.float64) * windows.window_s,
            "requests": requests,
            "gaps": gaps,
            "cv": all_windows(cv[has_cv], np.flatnonzero(has_cv)),
            "alpha": all_windows(alpha, fitted),
            "alpha_se": all_windows(alpha * se, fitted),
            "beta": all_windows(beta, fitted),
            "beta_se": all_windows(beta * np.sqrt(se**2 + 1 / (n * alpha)), fitted),
            "poisson_p": all_windows(np.where(is_mle, chdtrc(1, np.maximum(2 * ratio, 0)), np.nan), fitted),
            "dispersion_p": all_windows(
                np.minimum(1, 2 * np.minimum(chdtr(freedom, index), chdtrc(freedom, index))), fitted
            ),
        }
    )
    by = pl.when(pl.col("alpha_se").is_not_null()).then(pl.lit("mle")).when(pl.col("alpha").is_not_null())
    return fits.with_columns(method=by.then(pl.lit("moments")).cast(FIT_SCHEMA["method"])).select(list(FIT_SCHEMA))


def _trend(number: Ints, requests: Ints) -> Array:
    """Mean requests of the three windows around the one before, the one itself and the one after, of each window.

    Shape (3, windows). Outside the trace the rate is that of its end.
    """

    def count(window: Ints) -> Array:
        window = np.clip(window, number[0], number[-1])
        at = np.searchsorted(number, window)
        return np.where(number[at] == window, requests[at], 0).astype(np.float64)

    counts = [count(number + shift) for shift in (-2, -1, 0, 1, 2)]
    return np.stack([sum(counts[first : first + 3], np.zeros(len(number))) / 3 for first in range(3)])


LogLikelihood = Callable[[Array, Ints], Array]
"""(log alpha of each of some windows, which windows) -> log likelihood of each, up to a constant of the window."""


def _of_sum(alpha: Array, n: Ints, mean_s: Array) -> Array:
    """Log density of the sum of n gaps, at n * mean_s, when the rate is alpha / mean_s."""
    from scipy.special import gammaln

    total: Array = n * alpha * np.log(alpha) + (n * alpha - 1) * np.log(n) - n * alpha - gammaln(n * alpha)
    return total - np.log(mean_s)


def _exact(gaps_s: Array, place: Ints, mean_s: Array) -> LogLikelihood:
    """The sum of log f, and of log F(SHORT_GAP_S) for gaps shorter than that."""
    from scipy.special import gammainc, gammaln

    windows, is_short = len(mean_s), gaps_s < SHORT_GAP_S
    short = np.bincount(place[is_short], minlength=windows)
    n = np.bincount(place, minlength=windows) - short
    logs = np.bincount(place[~is_short], np.log(gaps_s[~is_short]), windows)
    sums_s = np.bincount(place[~is_short], gaps_s[~is_short], windows)

    def log_likelihood(log_alpha: Array, at: Ints) -> Array:
        alpha = np.exp(log_alpha)
        rate = alpha / mean_s[at]
        below = np.log(np.maximum(gammainc(alpha, rate * SHORT_GAP_S), 1e-300))
        values: Array = n[at] * (alpha * np.log(rate) - gammaln(alpha)) + (alpha - 1) * logs[at] - rate * sums_s[at]
        values += short[at] * below
        return values

    return log_likelihood


def _rounded(gaps_s: Array, weight: Array | None, place: Ints, mean_s: Array, window_s: int) -> LogLikelihood:
    """The sum of log P(g) for gaps in whole seconds.

    weight: the rate at each gap, the window's being 1. Gaps of a window whose length is the same and whose weights lie
    in the same half of an octave are taken together, at the mean of those weights.
    """
    levels, wide = (1, window_s + 3) if weight is None else (LEVELS, window_s + 3)
    row = place
    row_mean_s = mean_s
    if weight is not None:
        row = place * levels + np.clip(np.rint(np.log2(weight) * 2) + levels // 2, 0, levels - 1).astype(np.int64)
        rows = len(mean_s) * levels
        weights, sizes = np.bincount(row, weight, rows), np.bincount(row, minlength=rows)
        row_mean_s = np.repeat(mean_s, levels) * np.divide(sizes, weights, out=np.ones(rows), where=sizes > 0)
    # Column y + 1 of a row is for H(y). Windows are few and short enough for all of them, mostly empty.
    counts = np.bincount(row * wide + gaps_s.astype(np.int64) + 1, minlength=len(row_mean_s) * wide)
    cell = np.flatnonzero(counts)
    n = counts[cell]
    is_needed = np.zeros(len(counts), dtype=np.bool_)
    for shift in (-1, 0, 1):
        is_needed[cell + shift] = True
    point = np.flatnonzero(is_needed)
    same = np.searchsorted(point, cell)
    gap = (cell % wide - 1).astype(np.float64)
    y = (point % wide - 1).astype(np.float64)
    cell_mean_s, point_mean_s = row_mean_s[cell // wide], row_mean_s[point // wide]
    edges = np.arange(len(mean_s) + 1) * (levels * wide)
    cell_first, point_first = np.searchsorted(cell, edges), np.searchsorted(point, edges)
    h = np.empty(len(point))

    log_ratio, offset, hat = _hat_nodes(int(gap.max(initial=0)))

    def log_likelihood(log_alpha: Array, at: Ints) -> Array:
        from scipy.special import gammaincc, gammaln

        def spread(values: Array, first: Ints) -> Array:
            return np.repeat(values, np.diff(first)[at])

        alpha, gamma_log = np.exp(log_alpha), gammaln(np.exp(log_alpha))
        is_smooth = ((alpha <= SMOOTH_SHAPE) & (alpha <= SMOOTH_RATE * mean_s[at])).astype(np.float64)
        here, cells = _spread(point_first, at), _spread(cell_first, at)
        is_exact = (spread(is_smooth, point_first) == 0) | (y[here] <= 2)
        here = here[is_exact]
        a, m, t = spread(alpha, point_first)[is_exact], point_mean_s[here], np.maximum(y[here], 0)
        z = a * t / m
        # By parts: H(y) = (m - y) Q(alpha, z) + m z^alpha e^-z / Gamma(alpha + 1), z = alpha y / m; m - y below 0.
        log_scale = spread(gamma_log + log_alpha, point_first)[is_exact]
        density = np.exp(a * np.log(np.maximum(z, 1e-300)) - z - log_scale)
        h[here] = np.where(y[here] > 0, (m - t) * gammaincc(a, z) + m * density, m - y[here])
        log_p = np.empty(len(cells))
        is_exact = (spread(is_smooth, cell_first) == 0) | (gap[cells] <= 1)
        at_g = same[cells[is_exact]]
        p = h[at_g + 1] - 2 * h[at_g] + h[at_g - 1]
        has_p = p > 1e-11 * h[at_g]
        log_p[is_exact] = np.log(np.where(has_p, p, 1))
        a, m, x = spread(alpha, cell_first), cell_mean_s[cells], np.maximum(gap[cells], 0.5)
        # The log density at g; of a gap so far out that the difference is lost in rounding it is all but P.
        log_f = a * np.log(a / m) - spread(gamma_log, cell_first) + (a - 1) * np.log(x) - a * x / m
        far = np.flatnonzero(is_exact)[~has_p]
        log_p[far] = log_f[far]
        rest = np.flatnonzero(~is_exact)
        around = log_ratio[gap[cells[rest]].astype(np.int64)] * (a[rest] - 1)[:, None]
        around -= (a[rest] / m[rest])[:, None] * offset
        log_p[rest] = log_f[rest] + np.log(np.exp(around, out=around) @ hat)
        of = spread(np.arange(len(at)).astype(np.float64), cell_first).astype(np.int64)
        return np.bincount(of, n[cells] * log_p, len(at)).astype(np.float64)

    return log_likelihood


def _hat_nodes(most: int) -> tuple[Array, Array, Array]:
    """Gauss-Legendre quadrature of P(g), g >= 2, over (g - 1, g) and (g, g + 1): nodes x, weights times 1 - |x - g|.

    Returns log(x / g), shape (most + 1, nodes), rows 0 and 1 unused; x - g and the weights, shape (nodes,). With f as
    smooth as SMOOTH_SHAPE and SMOOTH_RATE say, P is right to 1 part in 10^6, in a tenth of the time of two H.
    """
    nodes, weights = np.polynomial.legendre.leggauss(QUADRATURE_NODES)
    offset: Array = np.concatenate(((nodes - 1) / 2, (nodes + 1) / 2))
    hat: Array = np.tile(weights / 2, 2) * (1 - np.abs(offset))
    gap = np.maximum(np.arange(most + 1), 2)[:, None]
    return np.log1p(offset / gap), offset, hat


def _spread(first: Ints, at: Ints) -> Ints:
    """The indices first[i] to first[i + 1] - 1 of every i in `at`, end to end."""
    lengths = first[at + 1] - first[at]
    return np.repeat(first[at] - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _maximum(log_likelihood: LogLikelihood, start: Array) -> tuple[Array, Array, Array]:
    """log alpha where it is greatest, its standard error (inf without a maximum), and how far log L at 1 lies below.

    Newton's method on differences of STEP, all windows at once. One has arrived when its next step is under 5 % of the
    standard error; that step is still taken, and the one after it would be some hundred times smaller.
    """
    log_alpha, log_se, best = start.copy(), np.full(len(start), np.inf), np.zeros(len(start))
    active = np.arange(len(start))
    for _ in range(60):
        if not len(active):
            break
        here = log_alpha[active]
        low, middle, high = (log_likelihood(here + step, active) for step in (-STEP, 0.0, STEP))
        slope, bend = (high - low) / (2 * STEP), (high - 2 * middle + low) / STEP**2
        is_concave = bend < 0
        curvature = np.where(is_concave, -bend, 1)
        step = np.clip(np.where(is_concave, slope / curvature, np.sign(slope)), -1, 1)
        has_arrived = is_concave & (np.abs(step) < 0.05 / np.sqrt(curvature))
        best[active] = middle + slope * step / 2
        log_se[active[has_arrived]] = 1 / np.sqrt(curvature[has_arrived])
        log_alpha[active] = here + step
        is_out = (log_alpha[active] < LOG_SHAPES[0]) | (log_alpha[active] > LOG_SHAPES[1])
        active = active[~has_arrived & ~is_out]
    found = np.flatnonzero(np.isfinite(log_se))
    best[found] -= log_likelihood(np.zeros(len(found)), found)
    return log_alpha, log_se, best


class FitSummary(msgspec.Struct, frozen=True):
    """What `fit_windows` found. alpha, cv: over the windows that have one. poisson_rejected, dispersion_rejected: the
    share of tested windows whose test rejects Poisson at `level`; None without a tested window. by_moments: windows
    whose alpha is not by maximum likelihood."""

    windows: int
    fitted: int
    by_moments: int
    cv: Quantiles | None
    alpha: Quantiles | None
    level: float
    poisson_rejected: float | None
    dispersion_rejected: float | None


def summarize_fits(fits: pl.DataFrame, *, level: float = 0.05, min_gaps: int = MIN_GAPS) -> FitSummary:
    """The summary of what `fit_windows` returned. CVs are of windows with at least `min_gaps` gaps."""

    def rejected(column: str) -> float | None:
        p = fits[column].drop_nulls()
        return int((p < level).sum()) / len(p) if len(p) else None

    return FitSummary(
        windows=fits.height,
        fitted=fits["alpha"].count(),
        by_moments=int((fits["method"] == "moments").sum()),
        cv=quantiles(fits.filter(pl.col("gaps") >= min_gaps)["cv"].drop_nulls().to_numpy()),
        alpha=quantiles(fits["alpha"].drop_nulls().to_numpy()),
        level=level,
        poisson_rejected=rejected("poisson_p"),
        dispersion_rejected=rejected("dispersion_p"),
    )


class DaySlot(msgspec.Struct, frozen=True):
    """One time of day, averaged over work days: alpha(t) and beta(t).

    start_s: since local midnight. windows: in the span of the fits, with requests or not; rate_rps is over all of them,
    alpha and beta (arithmetic means) over the `fitted`.
    """

    start_s: int
    windows: int
    fitted: int
    rate_rps: float
    alpha: float | None
    alpha_median: float | None
    beta: float | None


def work_day_slots(fits: pl.DataFrame, zone: ZoneInfo, *, window_s: int = FIT_WINDOW_S) -> tuple[DaySlot, ...]:
    """A slot for each time of day, `window_s` long, that work days (Monday to Friday) have in the span of the fits.

    fits: of `fit_windows` with the same window_s. A window belongs to the local day and time at which it begins; the
    hour that a change to summer time leaves out has a window less, the one that comes twice has one more. Empty
    without fits and for a span over MAX_SPAN_S.
    """
    if not fits.height or fits["start_s"][-1] - fits["start_s"][0] > MAX_SPAN_S:
        return ()
    starts_s = np.arange(fits["start_s"][0], fits["start_s"][-1] + window_s, window_s, dtype=np.float64)
    local_s = clock_s(starts_s, zone)
    day, slot = np.floor_divide(local_s, 86_400), (local_s % 86_400 // window_s * window_s).astype(np.int64)
    # 1970-01-01 was a Thursday.
    calendar = pl.DataFrame({"start_s": starts_s, "slot": slot, "weekday": ((day + 3) % 7).astype(np.int8)})
    by_slot = (
        calendar.filter(pl.col("weekday") < 5)
        .join(fits.select("start_s", "requests", "alpha", "beta"), on="start_s", how="left")
        .group_by("slot")
        .agg(
            pl.len().alias("windows"),
            pl.col("alpha").count().alias("fitted"),
            pl.col("requests").sum() / (pl.len() * window_s),
            pl.col("alpha").mean(),
            pl.col("alpha").median().alias("median"),
            pl.col("beta").mean(),
        )
        .sort("slot")
    )
    return tuple(DaySlot(*row) for row in by_slot.iter_rows())


class Episode(msgspec.Struct, frozen=True):
    """A burst. start_s, end_s: epoch seconds of its first window's begin and its last one's end. peak_over_baseline:
    None where the baseline is 0."""

    start_s: float
    end_s: float
    requests: int
    peak_rps: float
    baseline_rps: float
    peak_over_baseline: float | None


class Episodes(msgspec.Struct, frozen=True):
    """Bursts in order of time, and the share of requests and of the trace's windows that lie in them."""

    window_s: int
    episodes: tuple[Episode, ...]
    request_share: float | None
    time_share: float | None


def burst_episodes(
    stamps_s: Array, *, window_s: int = 10, around_s: int = 3600, sigmas: float = 5.0, merge_s: float = 30.0
) -> Episodes:
    """Where requests come much faster than around.

    A window bursts when its count is over b + sigmas * sqrt(max(b, 1)), where b, the baseline, is the median count of
    the windows in the `around_s` seconds around it (half before, half after; fewer at the trace's ends): a Poisson
    process with that mean has the standard deviation sqrt(b). Bursting windows with at most `merge_s` seconds between
    them are one episode, which then includes what lies between. An episode's peak is that of the window with the
    most requests, its baseline the one there.
    """
    if not len(stamps_s):
        return Episodes(window_s, (), None, None)
    window, counts = _counts(stamps_s, window_s)
    wide = around_s // window_s // 2 * 2 + 1
    # Of a longer gap so many empty windows are kept that both its sides see only empty ones beyond.
    place = np.cumsum(np.minimum(np.diff(window, prepend=window[:1]), 2 * wide))
    dense = np.zeros(int(place[-1]) + 1, dtype=np.int32)
    dense[place] = counts
    baselines = pl.Series(dense).rolling_median(wide, center=True, min_samples=1).to_numpy()[place]
    is_burst = counts > baselines + sigmas * np.sqrt(np.maximum(baselines, 1))
    first = np.flatnonzero(is_burst)
    windows = int(window[-1] - window[0]) + 1
    if not len(first):
        return Episodes(window_s, (), 0.0, 0.0)
    is_new = np.diff(window[first], prepend=-(2**62)) > merge_s / window_s + 1
    begins, ends = first[is_new], first[np.append(np.flatnonzero(is_new)[1:] - 1, len(first) - 1)]
    before = np.concatenate(([0], np.cumsum(counts)))
    requests = before[ends + 1] - before[begins]
    found = []
    for begin, end, n in zip(begins.tolist(), ends.tolist(), requests.tolist(), strict=True):
        peak = begin + int(counts[begin : end + 1].argmax())
        found.append(
            Episode(
                start_s=float(window[begin]) * window_s,
                end_s=float(window[end] + 1) * window_s,
                requests=n,
                peak_rps=int(counts[peak]) / window_s,
                baseline_rps=float(baselines[peak]) / window_s,
                peak_over_baseline=int(counts[peak]) / float(baselines[peak]) if baselines[peak] else None,
            )
        )
    inside = int((window[ends] - window[begins] + 1).sum())
    return Episodes(window_s, tuple(found), int(requests.sum()) / len(stamps_s), inside / windows)
