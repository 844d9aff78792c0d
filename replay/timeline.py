"""A run over time: what was offered, sent, answered and how late, in bins of a second that widen as the run grows.

Bins start at schedule zero and are `width_s` wide: 1 s, doubled by joining neighbours whenever more than MAX_BINS would
be needed, so a run of any length is at most MAX_BINS bins. Two timelines add up to the one of all their samples.

    offered             requests due in the bin
    sent                requests sent in it
    ok, failed          requests that ended in it
    in_flight           on average over it
    ttft, e2e           quantiles over the `ok` requests sent in it, to 5 % (ten of the summary's bins joined)
    dispatch lag        the largest of the requests due in it
    response tokens     of `ok` requests, spread evenly between first content and last byte
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import TypeVar

import msgspec

_T = TypeVar("_T")

MAX_BINS = 2000
LOWEST_S = 1e-6
HIGHEST_S = 1e5
BIN_RATIO = 1.01
LOG_RATIO = math.log(BIN_RATIO)
BINS = math.ceil(math.log(HIGHEST_S / LOWEST_S) / LOG_RATIO) + 2
"""Of duration: the first holds what is below LOWEST_S, zero and gaps of chunks that arrived together; the last the
rest above."""
_JOINED = 10
"""Bins of duration that are one here: quantiles over a second need less than those over a run."""


def bin_of(value_s: float) -> int:
    """The bin of a duration, BIN_RATIO - 1 wide."""
    if value_s < LOWEST_S:
        return 0
    return min(int(math.log(value_s / LOWEST_S) / LOG_RATIO) + 1, BINS - 1)


class OverTime(msgspec.Struct, frozen=True, kw_only=True):
    """One value a bin in each list; bin n begins n * `bin_s` seconds after schedule zero. Unknown is None."""

    bin_s: float
    offered: list[int]
    """Requests due, a bin; as `sent`, `ok` and `failed`."""
    sent: list[int]
    ok: list[int]
    failed: list[int]
    in_flight: list[float]
    """Mean."""
    ttft_p50_s: list[float | None]
    ttft_p99_s: list[float | None]
    e2e_p50_s: list[float | None]
    e2e_p99_s: list[float | None]
    dispatch_lag_max_s: list[float | None]
    response_tokens_per_s: list[float]


def _merged(first: dict[int, int], second: dict[int, int]) -> dict[int, int]:
    if not first or not second:
        return first or second
    return {key: first.get(key, 0) + second.get(key, 0) for key in first.keys() | second.keys()}


class Timeline:
    """Takes requests as they end, in any order."""

    def __init__(self) -> None:
        self._width_s = 1.0
        self._offered: list[int] = []
        self._sent: list[int] = []
        self._ok: list[int] = []
        self._failed: list[int] = []
        self._lag_s: list[float] = []
        """Below zero: none."""
        self._ttft: list[dict[int, int]] = []
        self._e2e: list[dict[int, int]] = []
        # A quantity of constant rate r between a and b adds r at a and takes it away at b. The sums of r and of r * a
        # over a bin are all that its integral up to any bin's edge needs, and they stay right when bins are joined.
        self._open: list[float] = []
        self._open_at: list[float] = []
        self._tokens: list[float] = []
        self._tokens_at: list[float] = []

    def _at(self, at_s: float) -> int:
        """The bin of a moment, made where it is missing."""
        at = int(at_s / self._width_s) if at_s > 0 else 0
        while at >= MAX_BINS:
            self._double()
            at = int(at_s / self._width_s)
        missing = at + 1 - len(self._offered)
        if missing > 0:
            for counts in (self._offered, self._sent, self._ok, self._failed):
                counts.extend([0] * missing)
            for sums in (self._open, self._open_at, self._tokens, self._tokens_at):
                sums.extend([0.0] * missing)
            self._lag_s.extend([-1.0] * missing)
            for histograms in (self._ttft, self._e2e):
                histograms.extend({} for _ in range(missing))
        return at

    def add(self, due_s: float, lag_s: float, sent_s: float | None, end_s: float, *, is_ok: bool) -> None:
        """Take one request. Seconds since schedule zero; sent_s is None where no connection could be made."""
        at = self._at(due_s)
        self._offered[at] += 1
        if lag_s > self._lag_s[at]:
            self._lag_s[at] = lag_s
        end = self._at(end_s)
        (self._ok if is_ok else self._failed)[end] += 1
        if sent_s is not None:
            self._sent[self._at(sent_s)] += 1
            self._spread(self._open, self._open_at, 1.0, sent_s, end_s)

    def add_latency(self, sent_s: float, ttft: int | None, e2e: int | None) -> None:
        """Take the latencies of an `ok` request, as `bin_of` them."""
        at = self._at(sent_s)
        for histogram, value in ((self._ttft[at], ttft), (self._e2e[at], e2e)):
            if value is not None:
                key = value // _JOINED
                histogram[key] = histogram.get(key, 0) + 1

    def add_tokens(self, tokens: int, first_s: float, end_s: float) -> None:
        """Take an answer's tokens, which came between first content and last byte."""
        first_s = max(0.0, min(first_s, end_s - 1e-3))  # no rate is endless
        end_s = max(end_s, first_s + 1e-3)
        self._spread(self._tokens, self._tokens_at, tokens / (end_s - first_s), first_s, end_s)

    def _spread(self, rates: list[float], rates_at: list[float], rate: float, first_s: float, end_s: float) -> None:
        end = self._at(end_s)
        first = self._at(first_s)
        if first == end:
            rates_at[first] -= rate * (end_s - first_s)
            return
        rates[first] += rate
        rates_at[first] += rate * first_s
        rates[end] -= rate
        rates_at[end] -= rate * end_s

    def _double(self) -> None:
        self._width_s *= 2
        for counts in (self._offered, self._sent, self._ok, self._failed):
            _join(counts, operator.add, 0)
        for sums in (self._open, self._open_at, self._tokens, self._tokens_at):
            _join(sums, operator.add, 0.0)
        _join(self._lag_s, max, -1.0)
        for histograms in (self._ttft, self._e2e):
            _join(histograms, _merged, {})

    def merge(self, other: Timeline) -> None:
        """Take all that another one took; the other is left as it is."""
        while self._width_s < other._width_s:
            self._double()
        factor = round(self._width_s / other._width_s)
        if other._offered:
            self._at((len(other._offered) - 1) * other._width_s)
        for mine, others in (
            (self._offered, other._offered),
            (self._sent, other._sent),
            (self._ok, other._ok),
            (self._failed, other._failed),
        ):
            for at, count in enumerate(others):
                mine[at // factor] += count
        for sums, other_sums in (
            (self._open, other._open),
            (self._open_at, other._open_at),
            (self._tokens, other._tokens),
            (self._tokens_at, other._tokens_at),
        ):
            for at, value in enumerate(other_sums):
                sums[at // factor] += value
        for at, lag_s in enumerate(other._lag_s):
            self._lag_s[at // factor] = max(self._lag_s[at // factor], lag_s)
        for mine_h, others_h in ((self._ttft, other._ttft), (self._e2e, other._e2e)):
            for at, histogram in enumerate(others_h):
                mine_h[at // factor] = dict(_merged(mine_h[at // factor], histogram))

    def result(self) -> OverTime:
        """The bins up to the last in which anything happened."""
        return OverTime(
            bin_s=self._width_s,
            offered=list(self._offered),
            sent=list(self._sent),
            ok=list(self._ok),
            failed=list(self._failed),
            in_flight=self._means(self._open, self._open_at),
            ttft_p50_s=[_quantile_s(each, 0.5) for each in self._ttft],
            ttft_p99_s=[_quantile_s(each, 0.99) for each in self._ttft],
            e2e_p50_s=[_quantile_s(each, 0.5) for each in self._e2e],
            e2e_p99_s=[_quantile_s(each, 0.99) for each in self._e2e],
            dispatch_lag_max_s=[None if lag_s < 0 else lag_s for lag_s in self._lag_s],
            response_tokens_per_s=self._means(self._tokens, self._tokens_at),
        )

    def _means(self, rates: list[float], rates_at: list[float]) -> list[float]:
        """Of each bin. The integral up to the edge T is sum(r) * T - sum(r * a) over what began before it."""
        width_s = self._width_s
        integrals = [0.0] + [
            rate * width_s * (at + 1) - rate_at
            for at, (rate, rate_at) in enumerate(zip(accumulate(rates), accumulate(rates_at), strict=True))
        ]
        # The integral never falls but by rounding.
        return [round(max(0.0, after - before) / width_s, 6) for before, after in pairwise(integrals)]


def _join(values: list[_T], joined: Callable[[_T, _T], _T], neutral: _T) -> None:
    """Neighbours become one, in place."""
    if len(values) % 2:
        values.append(neutral)
    values[:] = [joined(values[at], values[at + 1]) for at in range(0, len(values), 2)]


def _quantile_s(histogram: dict[int, int], share: float) -> float | None:
    """The middle of the joined bin in which the value of rank ceil(share * count) lies."""
    left = math.ceil(share * sum(histogram.values()))
    for key in sorted(histogram):
        left -= histogram[key]
        if left <= 0:
            return (
                0.0 if not key else float(f"{LOWEST_S * math.exp((key * _JOINED + _JOINED / 2 - 1) * LOG_RATIO):.4g}")
            )
    return None
