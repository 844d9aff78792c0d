"""When requests arrive: point processes as lazy arrays of times, and the fit of their shape.

    segment     from start_s to end_s the rate is rate_rps and gaps have the Gamma shape `shape`
    gaps        drawn with mean 1 in tau(t), the integral of the rate (time rescaling), so that a gap that crosses into
                the next segment runs on there at that segment's rate
    shape       1 is Poisson, below 1 bursty, above 1 even; inf is constant, with the first arrival at the start
    first gap   that of the stationary process, U * Gamma(shape + 1): no burst and no hole because the clock starts

Numpy's Gamma takes a scale; here it is 1 / (shape * rate), so the mean rate is `rate_rps` for every shape. Both
`traces.profile` and `replay.arrivals` stand on this. Draws come from the caller's generator and from nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

CHUNK: Final = 65_536
"""Arrivals drawn at once, at most."""
MAX_RATE_RPS: Final = 1e7
SHAPE_RANGE: Final = (1e-3, 1e6)
MIN_GAP_S: Final = 1e-6
"""A record's resolution. Equal stamps count as this far apart where a logarithm is taken of their gap."""

Array = NDArray[np.float64]


class Segment(NamedTuple):
    """A stretch of time in which a process keeps its rate and shape."""

    start_s: float
    end_s: float
    rate_rps: float
    shape: float


@dataclass(frozen=True, slots=True)
class Process:
    """Steps of rate and shape. Raises ValueError naming the step, the value and the rule.

    The last step lasts for ever, or to `period_s`, after which the first follows again.
    """

    starts_s: tuple[float, ...]
    """Strictly increasing from 0."""
    rates_rps: tuple[float, ...]
    shapes: tuple[float, ...]
    period_s: float | None = None

    def __post_init__(self) -> None:
        if not self.starts_s or len(self.starts_s) != len(self.rates_rps) or len(self.rates_rps) != len(self.shapes):
            raise ValueError("arrivals: expected at least one step, and as many starts, rates and shapes")
        if self.starts_s[0] != 0:
            raise ValueError(f"arrivals: expected the first step at 0 s, got {self.starts_s[0]:g}")
        ends_s = (*self.starts_s[1:], math.inf if self.period_s is None else self.period_s)
        for step, (start_s, end_s, rate_rps, shape) in enumerate(
            zip(self.starts_s, ends_s, self.rates_rps, self.shapes, strict=True), 1
        ):
            if not start_s < end_s:
                raise ValueError(f"arrivals: step {step}: expected an end after {start_s:g} s, got {end_s:g}")
            if not 0 <= rate_rps <= MAX_RATE_RPS:
                raise ValueError(f"rate: step {step}: expected 0 to {MAX_RATE_RPS:g} requests/s, got {rate_rps:g}")
            if not (SHAPE_RANGE[0] <= shape <= SHAPE_RANGE[1] or shape == math.inf):
                raise ValueError(
                    f"shape: step {step}: expected {SHAPE_RANGE[0]:g} to {SHAPE_RANGE[1]:g}, or inf, got {shape:g}"
                )
        if not any(self.rates_rps):
            raise ValueError("rate: expected a step with a rate > 0, got 0 in all")

    def scaled(self, factor: float) -> Process:
        """The same with every rate multiplied."""
        return replace(self, rates_rps=tuple(rate_rps * factor for rate_rps in self.rates_rps))

    @property
    def mean_rps(self) -> float:
        """Over its period; without one over the steps that end, or where none does, the one rate."""
        end_s = self.starts_s[-1] if self.period_s is None else self.period_s
        if end_s == 0:
            return self.rates_rps[0]
        spans_s = np.diff(np.append(self.starts_s, end_s))
        return float(spans_s @ np.array(self.rates_rps)) / end_s

    def segments(self, start_s: float = 0.0) -> Iterator[Segment]:
        """The process from `start_s` >= 0 of its own clock on: endless where it has a period."""
        period_s = math.inf if self.period_s is None else self.period_s
        ends_s = (*self.starts_s[1:], period_s)
        cycle = 0 if self.period_s is None else int(start_s // period_s)
        for number in itertools.count(cycle):
            base_s = 0.0 if self.period_s is None else number * period_s
            for step_s, end_s, rate_rps, shape in zip(self.starts_s, ends_s, self.rates_rps, self.shapes, strict=True):
                if base_s + end_s > start_s:
                    yield Segment(max(base_s + step_s, start_s), base_s + end_s, rate_rps, shape)
            if self.period_s is None:
                return


def steady(rate_rps: float, shape: float) -> Process:
    """One rate and one shape: 1 for Poisson, `math.inf` for constant gaps."""
    return Process((0.0,), (rate_rps,), (shape,))


def arrival_times_s(segments: Iterable[Segment], rng: np.random.Generator) -> Iterator[Array]:
    """The arrivals as arrays of 1 to CHUNK times, non-decreasing throughout; ends with the last segment.

    segments: consecutive. Nothing is drawn before it is asked for.
    """
    wait: float | None = None
    most = 256
    for start_s, end_s, rate_rps, shape in segments:
        if rate_rps <= 0:
            continue
        span = (end_s - start_s) * rate_rps
        if wait is None:
            wait = 0.0 if shape == math.inf else rng.random() * rng.gamma(shape + 1, 1 / shape)
        while wait < span:
            expected = span - wait
            draws = min(most, 16 + expected + 4 * math.sqrt(expected / shape))
            most = min(4 * most, CHUNK)
            gaps = np.ones(int(draws)) if shape == math.inf else rng.gamma(shape, 1 / shape, int(draws))
            taus = np.cumsum(np.concatenate(([wait], gaps)))
            inside = min(int(np.searchsorted(taus, span)), len(gaps))
            times_s = start_s + taus[:inside] / rate_rps
            yield np.minimum(times_s, np.nextafter(end_s, start_s)) if end_s < math.inf else times_s
            wait = float(taus[inside])
        wait -= span


def take_until(times_s: Iterator[Array]) -> Callable[[float], Array]:
    """A function that returns, at each call, the arrivals not yet returned that come before `until_s`."""
    held: list[Array] = []

    def take(until_s: float) -> Array:
        while not held or held[-1][-1] < until_s:
            chunk = next(times_s, None)
            if chunk is None:
                break
            held.append(chunk)
        if not held:
            return np.empty(0)
        whole = np.concatenate(held)
        cut = int(np.searchsorted(whole, until_s))
        held[:] = [whole[cut:]] if cut < len(whole) else []
        return whole[:cut]

    return take


class ShapeFit(NamedTuple):
    """Two estimates of a Gamma shape: by moments (1 / cv^2 of the gaps) and by maximum likelihood."""

    moments: float
    mle: float
    gaps: int


def fit_gamma_shape(gaps_s: Array, window: NDArray[np.int64]) -> ShapeFit | None:
    """The shape that gaps share whose mean may differ from window to window; None under two gaps in every window.

    gaps_s: shape (n,), seconds >= 0. window: shape (n,), the window of each, >= 0.
    Within a window only each gap's share of their sum is used; of n gaps of one shape k those shares are
    Dirichlet(k, ..., k). Moments solve E sum (x / mean - 1)^2 = sum n (n - 1) / (n k + 1). The likelihood's score is
    sum n (psi(k) - psi(n k) + log n) = sum log(x / mean). So a rate that drifts is not taken for burstiness, and few
    gaps in a window do not bias the shape. Results are kept within SHAPE_RANGE.
    """
    counts = np.bincount(window)[window] if len(window) else window
    is_shared = counts >= 2
    gaps_s, window = np.maximum(gaps_s[is_shared], MIN_GAP_S), window[is_shared]
    if not len(gaps_s):
        return None
    _, place, sizes = np.unique(window, return_inverse=True, return_counts=True)
    shares = gaps_s / (np.bincount(place, gaps_s) / sizes)[place]
    squares, logs = float(np.sum((shares - 1) ** 2)), float(np.sum(np.log(shares)))
    n, windows = (column.astype(np.float64) for column in np.unique(sizes, return_counts=True))

    def excess(k: float) -> float:
        return squares - float(np.sum(windows * n * (n - 1) / (n * k + 1)))

    def score(k: float) -> float:
        return float(np.sum(windows * n * (digamma(np.array([k])) - digamma(n * k) + np.log(n)))) - logs

    return ShapeFit(_increasing_root(excess), _increasing_root(score), len(gaps_s))


def _increasing_root(function: Callable[[float], float]) -> float:
    low, high = (math.log(bound) for bound in SHAPE_RANGE)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(math.exp(middle)) < 0 else (low, middle)
    return math.exp((low + high) / 2)


def digamma(x: Array) -> Array:
    """The logarithmic derivative of the Gamma function for x > 0, to 1e-12 (Abramowitz and Stegun 6.3.5, 6.3.18)."""
    shift = np.zeros_like(x)
    z = x.copy()
    for _ in range(10):
        is_small = z < 10
        shift -= np.where(is_small, 1 / z, 0.0)
        z += is_small
    w = 1 / (z * z)
    series = w * (1 / 12 - w * (1 / 120 - w * (1 / 252 - w * (1 / 240 - w * (1 / 132)))))
    return shift + np.log(z) - 0.5 / z - series
