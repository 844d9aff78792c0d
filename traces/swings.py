"""Bursts that last some seconds, and rows that share a stamp: what renewals with one rate a window cannot say.

    swings      the rate is multiplied by one level for each swing. A level holds for an exponential time of mean
                `hold_s` and is then drawn anew, with mean 1 and the relative variance `variance`: from a Gamma
                distribution, or with `is_on_off` 0 or 1 + variance. An on/off swing is a two-state Markov-modulated
                process (Fischer and Meier-Hellstern 1993, Performance Evaluation 18); some of them at holds from
                seconds to minutes follow dispersion over as many scales (Andersen and Nielsen 1998, IEEE JSAC 16).
    shape       of the gaps while levels hold: fitted within windows as long as the shortest swing holds
    batches     rows with one stamp: stamps are renewals, each with 1 + X rows, X Gamma of mean (batch - 1) times the
                levels, rounded at random; so swings change how many come together, and a clock of 3 s stays a clock

**Fit.** By moments of counts N in windows w, as long as the holds. The levels' product has the autocovariance
C(t) = prod (1 + v_i exp(-t / h_i)) - 1 of a mean of 1, so with mu = E N and V the variance of a renewal process

    Var N = V(mu) + mu^2 e(w),    e(w) = 2 / w^2 integral from 0 to w of (w - t) C(t) dt        (Cox and Isham 1980)

An excess e counts where it is significant and its windows vary by TOLERANCE more or less than renewals do; otherwise
the trace is the renewal process that it looks like. A swing is on/off where windows are empty more often than half-way
between what a Gamma level of that excess leaves empty and what on and off do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from traces.arrivals import SHAPE_RANGE, Array, fit_gamma_shape

HOLDS_S: Final = (1.0, 10.0, 60.0, 300.0, 1200.0)
"""How long swings hold; the last is the paper's window."""
TOLERANCE: Final = 0.2
SIGMAS: Final = 4.0
ON_OFF_VARIANCE: Final = 0.25
"""Excess of an on/off swing, at least: silence for a fifth of the time."""
MIN_WINDOWS: Final = 4
"""Windows of a length that say something about its variance."""
MIN_GAPS: Final = 50
"""Gaps that a shape is fitted on, at least."""
MAX_VARIANCE: Final = 1e3
MAX_PEAK: Final = 1e3
"""Of all swings together, the product of 1 + variance: their highest levels multiply, and a slab holds what comes."""
MIN_VARIANCE: Final = 1e-3
"""A level that swings by 3 % is none."""
MAX_BATCH: Final = 1e5
"""Rows of one stamp, at most."""
SHORT_GAP_S: Final = 0.002
"""Stamps of whole milliseconds leave no shorter gap but 0; gaps of 0 are batches where they are ZERO_GAPS times as many
as those above 0 and up to here."""
ZERO_GAPS: Final = 10
COMMON_HOLD_S: Final = 300.0
"""Swings that hold as long may be those of all services: of the people behind them."""
MIN_ZERO_SHARE: Final = 0.05

CHUNK_ROWS: Final = 1 << 20
SAMPLED_BLOCKS: Final = 16
"""Of 65,536 rows each, in which a longer trace's shape is looked for."""

Ints = NDArray[np.int64] | NDArray[np.int32]


class Swing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One level of the rate."""

    hold_s: float
    """One of HOLDS_S."""
    variance: float
    """Relative to the square of the mean."""
    is_on_off: bool = False


class Bursts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a service's arrivals differ from renewals at its slots' rates and shapes."""

    shape: float | None
    """Of gaps between stamps; None: the slots'."""
    swings: tuple[Swing, ...]
    batch: float = 1.0
    """Rows that share a stamp, on average."""
    batch_variance: float = 0.0
    """Relative variance of the rows beyond the first, swings apart."""


class Counted(NamedTuple):
    """A service's stamps, and how often they are expected: by slot its rate and how much of the span it is."""

    stamps_s: Array
    """In order."""
    first_s: float
    span_s: float
    slot_of: Callable[[Array], Ints]
    rates_rps: Array
    exposure_s: Array


class _Runs(NamedTuple):
    """Windows that hold a stamp, as numbers from the first one on, and how many they hold."""

    windows: Ints
    counts: Ints


def _seconds(counted: Counted) -> _Runs:
    """By the second; of CHUNK_ROWS rows at a time, as whole columns would be the most of a fit's memory."""
    number = np.int32 if counted.span_s < 2**31 else np.int64
    windows, counts = [], []
    for row in range(0, len(counted.stamps_s), CHUNK_ROWS):
        second = np.floor(counted.stamps_s[row : row + CHUNK_ROWS] - counted.first_s).astype(number)
        starts = np.flatnonzero(np.diff(second, prepend=second[0] - 1))
        windows.append(second[starts])
        counts.append(np.diff(starts, append=len(second)).astype(np.int32))
    # A second that two chunks share is joined.
    return _joined(np.concatenate(windows), np.concatenate(counts))


def _joined(windows: Ints, counts: Ints) -> _Runs:
    starts = np.flatnonzero(np.diff(windows, prepend=windows[0] - 1))
    return _Runs(windows[starts], np.add.reduceat(counts, starts))


def within_peak(swings: tuple[Swing, ...]) -> tuple[Swing, ...]:
    """The swings, all of them flattened alike where their product would be over MAX_PEAK."""
    peak = math.prod(1 + swing.variance for swing in swings)
    if peak <= MAX_PEAK:
        return swings
    share = math.log(MAX_PEAK) / math.log(peak)
    return tuple(msgspec.structs.replace(swing, variance=(1 + swing.variance) ** share - 1) for swing in swings)


def batch_starts(stamps_s: Array) -> NDArray[np.bool_] | None:
    """Which stamps, in order, begin a batch; None where equal stamps are no more than rounding makes."""
    gaps_s = np.diff(stamps_s)
    zeros = int(np.count_nonzero(gaps_s == 0))
    short = int(np.count_nonzero((gaps_s > 0) & (gaps_s <= SHORT_GAP_S)))
    if zeros < MIN_GAPS or zeros < MIN_ZERO_SHARE * len(gaps_s) or zeros < ZERO_GAPS * short:
        return None
    return np.concatenate(([True], gaps_s > 0))


def fit_bursts(counted: Counted, shapes: Array, *, has_batches: bool) -> Bursts | None:
    """The bursts; None where renewals of the slots' shapes explain the counts. has_batches: look for equal stamps."""
    starts = batch_starts(counted.stamps_s) if has_batches else None
    holds_s = tuple(hold_s for hold_s in HOLDS_S if counted.span_s >= MIN_WINDOWS * hold_s)
    if len(counted.stamps_s) < MIN_GAPS:
        return None
    seconds = _seconds(counted)
    if starts is not None:
        return _fit_batches(counted, seconds, starts, holds_s)
    plain = [_excess(counted, seconds, hold_s, shapes) for hold_s in holds_s]
    if not any(excess.is_seen for excess in plain):
        return None
    for number, hold_s in enumerate(holds_s):
        if hold_s == HOLDS_S[-1]:
            shape, found = None, plain[number:]
        else:
            shape = _shape(counted, hold_s)
            if shape is None:
                continue
            found = [_excess(counted, seconds, each_s, np.full(len(shapes), shape)) for each_s in holds_s[number:]]
        swings = _swings(holds_s[number:], found, counted.span_s)
        if swings and swings[0].hold_s == hold_s:
            return Bursts(shape, within_peak(swings))
    return None


def _fit_batches(counted: Counted, seconds: _Runs, starts: NDArray[np.bool_], holds_s: Sequence[float]) -> Bursts:
    first = np.flatnonzero(starts)
    sizes = np.diff(first, append=len(starts))
    batch, size_variance = float(sizes.mean()), float(sizes.var())
    gaps_s = np.diff(counted.stamps_s[first])
    fit = fit_gamma_shape(gaps_s, np.zeros(len(gaps_s), dtype=np.int64))
    shape = 1.0 if fit is None or fit.gaps < MIN_GAPS else fit.moments
    rates = np.full(len(counted.rates_rps), shape)
    found = [_excess(counted, seconds, hold_s, rates, batch, size_variance) for hold_s in holds_s]
    # Levels change the rows beyond a batch's first.
    share = ((batch - 1) / batch) ** 2
    swings = within_peak(
        tuple(
            Swing(swing.hold_s, min(swing.variance / share, MAX_VARIANCE))
            for swing in _swings(holds_s, found, counted.span_s)
        )
    )
    # 1/6: of rounding at random, on average.
    own = max(0.0, size_variance - 1 / 6) / (batch - 1) ** 2
    modulation = math.prod(1 + swing.variance for swing in swings)
    return Bursts(shape, swings, min(batch, MAX_BATCH), min(max(0.0, (1 + own) / modulation - 1), MAX_VARIANCE))


def _shape(counted: Counted, window_s: float) -> float | None:
    rows, size = len(counted.stamps_s), 1 << 16
    firsts = (
        [0] if rows <= SAMPLED_BLOCKS * size else np.linspace(0, rows - size, SAMPLED_BLOCKS, dtype=np.int64).tolist()
    )
    gaps_s, windows = [], []
    for first in firsts:
        stamps_s = counted.stamps_s[first : first + size] if len(firsts) > 1 else counted.stamps_s
        window = ((stamps_s - counted.first_s) // window_s).astype(np.int64)
        is_inside = window[1:] == window[:-1]
        gaps_s.append(np.diff(stamps_s)[is_inside])
        windows.append(window[1:][is_inside])
    # Windows far apart may have large numbers.
    place = np.unique(np.concatenate(windows), return_inverse=True)[1]
    fit = fit_gamma_shape(np.concatenate(gaps_s), place)
    return None if fit is None or fit.gaps < MIN_GAPS else fit.moments


class _Excess(NamedTuple):
    """e(w), whether it is one, and whether windows are so often empty that levels must be 0 at times."""

    value: float
    is_seen: bool
    is_on_off: bool


def _excess(
    counted: Counted,
    seconds: _Runs,
    window_s: float,
    shapes: Array,
    batch: float = 1.0,
    size_variance: float = 0.0,
) -> _Excess:
    windows = int(counted.span_s // window_s)
    # In order: the last, broken window is at the end.
    end = int(np.searchsorted(seconds.windows, windows * int(window_s)))
    if not end:
        return _Excess(0.0, False, False)
    places, sums = _joined(seconds.windows[:end] // int(window_s), seconds.counts[:end])
    counts = sums.astype(np.float64)
    slots = counted.slot_of(counted.first_s + places.astype(np.float64) * window_s)
    means = counted.rates_rps * window_s
    share = counted.exposure_s / counted.exposure_s.sum() * windows
    crossed = float(np.bincount(slots, counts, len(means)) @ means)
    weight = float(share @ means**2)
    if not weight:
        return _Excess(0.0, False, False)
    squares = float(counts @ counts) - 2 * crossed + weight

    def variances(concentration: float) -> Array:
        # A level of `concentration`, or else 0, is what most counts come from.
        stamps = means / batch * concentration
        of_stamps = np.array([renewal_variance(x, k) for x, k in zip(stamps, shapes, strict=True)])
        return (batch**2 * of_stamps + size_variance * stamps) / concentration

    explained = variances(1.0)
    value = max(0.0, (squares - float(share @ explained)) / weight)
    explained = variances(1 + value)
    variance = float(share @ explained)
    value = (squares - variance) / weight
    error = math.sqrt(float(share @ (2 * explained**2 + batch**2 * explained)))
    is_seen = abs(squares - variance) > max(SIGMAS * error, TOLERANCE * variance)
    is_on_off = False
    if value > ON_OFF_VARIANCE:
        empty = windows - len(counts)
        level = float(share @ _empty(means, variances(1.0) + value * means**2))
        on_off = float(share @ (value + _empty(means * (1 + value), variances(1 + value) * (1 + value)))) / (1 + value)
        is_on_off = empty > (level + on_off) / 2
    return _Excess(value, is_seen, is_on_off)


def _empty(means: Array, variances: Array) -> Array:
    """P(N = 0) by the negative binomial with these moments, or where they are no wider than Poisson's by that."""
    relative = (variances - means) / np.maximum(means, 1e-150) ** 2
    is_wide = relative > 1e-9
    safe = np.where(is_wide, relative, 1.0)
    return np.where(is_wide, (1 + safe * means) ** (-1 / safe), np.exp(-means))


def _swings(holds_s: Sequence[float], found: Sequence[_Excess], span_s: float) -> tuple[Swing, ...]:
    """Those whose excess at windows as long as they hold is the one found; the nearest where none has.

    What was found is about the trace's own mean, which has swung too: it lacks the excess of the whole span.
    """
    seen = [(hold_s, excess) for hold_s, excess in zip(holds_s, found, strict=True) if excess.is_seen]
    seen = [(hold_s, excess) for hold_s, excess in seen if excess.value > 0]
    if not seen:
        return ()
    holds, wanted = np.array([hold_s for hold_s, _ in seen]), 1 + np.array([excess.value for _, excess in seen])
    windows_s = np.append(holds, max(span_s, holds[-1]))
    variances = np.zeros(len(seen))
    for _ in range(300):
        excess = level_excess(variances, holds, windows_s)
        ratio = (wanted + excess[-1]) / (1 + excess[:-1])
        variances = np.clip((1 + variances) * np.sqrt(ratio) - 1, 0, MAX_VARIANCE)
    return tuple(
        Swing(hold_s, float(variance), excess.is_on_off)
        for (hold_s, excess), variance in zip(seen, variances, strict=True)
        if variance > MIN_VARIANCE
    )


def level_excess(variances: Array, holds_s: Array, windows_s: Array) -> Array:
    """e(w) of the head of this file, for each window. variances, holds_s: of the swings; all shapes (n,)."""
    steps = 200
    part = (np.arange(steps) + 0.5) / steps
    # t = w part^2, so that the shortest swings have steps of their own in the longest windows.
    times_s = windows_s[:, None] * part**2
    covariance = np.prod(1 + variances * np.exp(-times_s[..., None] / holds_s), axis=-1) - 1
    result: Array = (2 * (1 - part**2) * covariance * 2 * part / steps).sum(axis=1)
    return result


def renewal_variance(x: float, shape: float) -> float:
    """Var N of a stationary renewal process with Gamma gaps of mean 1 in an interval of length x >= 0.

    x - x^2 + 2 sum over n of E max(x - S_n, 0), S_n the sum of n gaps (Cox 1962, Renewal Theory, 4.5); of long
    intervals its asymptote x / k + (1 - 1 / k^2) / 6.
    """
    from scipy.special import gammainc  # type: ignore[import-untyped]

    shape = min(max(shape, SHAPE_RANGE[0]), SHAPE_RANGE[1])
    if shape == 1 or x == 0:
        return x
    if x > 30 * max(1.0, 1 / shape):
        return x / shape + (1 - 1 / shape**2) / 6
    n = np.arange(1, int(x + 12 * math.sqrt((x + 1) / shape) + 12 / shape) + 8)
    sums = x * gammainc(n * shape, shape * x) - n * gammainc(n * shape + 1, shape * x)
    return max(0.0, x - x * x + 2 * float(sums.sum()))


def have_common_levels(counts: Sequence[Array]) -> bool:
    """Whether services swing together: counts by service, each of the same windows, the shape (windows,).

    Beyond Poisson's, the variance of the sum is the sum of the variances where services swing apart, and the square of
    the sum of their roots where they swing together; the answer is what it is nearer to.
    """
    own = [max(0.0, float(each.var() - each.mean())) for each in counts]
    total = np.sum(counts, axis=0)
    apart, together = sum(own), sum(map(math.sqrt, own)) ** 2
    return together > apart and float(total.var() - total.mean()) > (apart + together) / 2


class Levels(NamedTuple):
    """The product of swings' levels in a stretch of time: `values[i]` from `starts_s[i]` on."""

    starts_s: Array
    values: Array


def level_blocks(swings: Sequence[Swing], seeds: Sequence[np.random.SeedSequence]) -> Callable[[float, float], Levels]:
    """A function that returns the levels from its start_s to its end_s; each call goes on where the last one ended.

    seeds: one for each of HOLDS_S. Swings of one seed and hold have the same holds, and levels of the same rank, in
    blocks that begin and end at the same times.
    """
    from scipy.special import gammaincinv

    def level(swing: Swing, ranks: Array) -> Array:
        if swing.is_on_off:
            return np.where((1 - ranks) * (1 + swing.variance) < 1, 1 + swing.variance, 0.0)
        result: Array = gammaincinv(1 / swing.variance, ranks) * swing.variance
        return result

    swings = [swing for swing in swings if swing.variance > MIN_VARIANCE]
    places = [HOLDS_S.index(swing.hold_s) for swing in swings]
    held = [
        level(swing, np.random.default_rng(seeds[place]).random(1)) for swing, place in zip(swings, places, strict=True)
    ]

    def block(start_s: float, end_s: float) -> Levels:
        changes, drawn = [], []
        for number, (swing, place) in enumerate(zip(swings, places, strict=True)):
            # A stream for each block, by its end: services that began earlier have drawn more before.
            rng = np.random.default_rng([*seeds[place].generate_state(4).tolist(), int(end_s) % 2**32])
            # What is left of a hold is as long as a whole one: exponential times have no memory.
            times_s = np.empty(0)
            last_s = start_s
            while last_s < end_s:
                expected = (end_s - last_s) / swing.hold_s
                more = last_s + np.cumsum(rng.exponential(swing.hold_s, int(expected + 4 * math.sqrt(expected)) + 4))
                times_s, last_s = np.concatenate((times_s, more)), float(more[-1])
            times_s = times_s[times_s < end_s]
            levels = np.concatenate((held[number], level(swing, rng.random(len(times_s)))))
            held[number] = levels[-1:]
            changes.append(times_s)
            drawn.append(levels)
        starts_s = np.sort(np.concatenate(([start_s], *changes)))
        values = np.ones(len(starts_s))
        for times_s, levels in zip(changes, drawn, strict=True):
            values *= levels[np.searchsorted(times_s, starts_s, side="right")]
        return Levels(starts_s, values)

    return block
