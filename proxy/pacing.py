"""When requests leave, so that their gaps are what was asked: smoother or burstier than they came. Pure.

    peak        no two leave closer than 1 / peak; the first of a burst leaves at once
    process     gaps are drawn with mean 1 in operational time, which runs at (requests held) / (half the delay
                budget) a second. By Little's law the mean delay is then half the budget at any rate of arrivals, so
                requests leave at the rate at which they come, without that rate being known; none leaves while none
                is held.
    budget      a request whose whole delay budget has passed leaves at once, whatever its gap; `forced` counts these

How many are held varies, and with it the clock, by v = var / mean^2. That makes even gaps vary more, and long gaps
shorter, as the clock gains while more and more are held. In simulations (20 to 200 requests/s, budgets of 1 to 4 s,
CVs of 0.2 to 3, in and out) cv^2 came out higher than drawn by v (1.15 - 0.8 cv^2). v is measured, and so much is taken
off what is drawn; what is wrong with that shows in the gaps that come out, and is taken off as well, by and by
(integral control); where nothing is left, gaps are equal. Below about ten held on average (rate * budget / 2) asked and
achieved part: both are reported.

Times are monotonic nanoseconds given by the caller, who calls `take` when `next_ns` has come; draws are the caller's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, TypeVar

MEMORY: Final = 2000
"""Leavings over which CVs and delays are averaged."""
NEVER_NS: Final = 1 << 63
SETTLED: Final = 4
"""Times as many as are held must have left before what is measured counts: until then more and more are held."""
RECENT: Final = 500
"""Leavings over which the CV is taken that is compared with the one asked for."""
GAIN: Final = 1 / 2500
"""Of the difference of their squares, what is taken off the next gap's. Above 1 / (4 RECENT) it would swing."""
_EVEN: Final = 1e6
"""The shape from which on gaps are as good as equal."""

T = TypeVar("T")
Gaps = Callable[[float], float]
"""A gap of mean 1, for a CV that it should have (a pattern has its own)."""


class Moments:
    """Mean and CV of the last values, exponentially forgetting; of the first `memory` all alike."""

    __slots__ = ("_count", "_memory", "_square", "mean")

    def __init__(self, memory: int = MEMORY) -> None:
        self._memory = memory
        self._count = 0
        self.mean = 0.0
        self._square = 0.0

    def add(self, value: float) -> None:
        """One more."""
        self._count = min(self._count + 1, self._memory)
        self.mean += (value - self.mean) / self._count
        self._square += (value * value - self._square) / self._count

    @property
    def is_full(self) -> bool:
        """As many were added as are remembered."""
        return self._count == self._memory

    @property
    def cv(self) -> float | None:
        """Of the population; None under two values or for a mean of 0."""
        if self._count < 2 or self.mean <= 0:
            return None
        return math.sqrt(max(0.0, self._square - self.mean * self.mean)) / self.mean


def gamma_gaps(gammavariate: Callable[[float, float], float]) -> Gaps:
    """Gamma gaps of the asked CV; gammavariate: as `random.Random`'s, of a shape and a scale."""

    def gap(cv: float) -> float:
        shape = 1 / (cv * cv) if cv > 1e-3 else _EVEN
        return 1.0 if shape >= _EVEN else gammavariate(shape, 1 / shape)

    return gap


def pattern_gaps(gaps: Sequence[float]) -> Gaps:
    """Recorded gaps again and again, scaled to mean 1. Raises ValueError for fewer than one, or none above 0."""
    mean = sum(gaps) / len(gaps) if gaps else 0.0
    if mean <= 0:
        raise ValueError("pattern: expected two arrivals at different times, got fewer")

    def cycle() -> Iterator[float]:
        while True:
            yield from gaps

    numbers = cycle()
    return lambda cv: next(numbers) / mean


def cv_of(gaps: Sequence[float]) -> float:
    """CV of recorded gaps, of which one at least is above 0."""
    mean = sum(gaps) / len(gaps)
    return math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean


class Pacer(Generic[T]):
    """Holds what is offered, and says when each leaves: in the order of coming."""

    def __init__(
        self, budget_s: float, *, peak_rps: float | None = None, cv: float | None = None, gaps: Gaps | None = None
    ) -> None:
        """Either peak_rps, or gaps and the CV that they are to have."""
        self.asked_cv = cv
        self.came = Moments()
        """Gaps between comings, seconds."""
        self.left = Moments()
        """Gaps between leavings, seconds."""
        self.delays = Moments()
        self.forced = 0
        self._held: OrderedDict[T, int] = OrderedDict()
        self._budget_ns = int(budget_s * 1e9)
        self._mean_ns = self._budget_ns / 2
        self._gap_ns = 1e9 / peak_rps if peak_rps else 0.0
        self._gaps = gaps
        self._clock = Moments()
        self._recent = Moments(RECENT)
        self._leavings = 0
        self._excess = 0.0
        """Of cv^2, what came out above what was asked for."""
        self._rest = 0.0
        """Of the gap that runs, in operational time."""
        self._at_ns = 0
        """Until when operational time has been counted."""
        self._came_ns = 0
        self._left_ns = 0
        self._due_ns = 0
        """When the last one that left was due."""
        if gaps is not None:
            self._rest = gaps(cv or 0.0)

    def __len__(self) -> int:
        return len(self._held)

    def offer(self, item: T, now_ns: int) -> None:
        """It comes."""
        self._run(now_ns)
        if self._came_ns:
            self.came.add((now_ns - self._came_ns) / 1e9)
        self._came_ns = now_ns
        self._held[item] = now_ns

    def remove(self, item: T, now_ns: int) -> None:
        """It gives up."""
        self._run(now_ns)
        self._held.pop(item, None)

    def take_all(self) -> list[T]:
        """Everything at once: pacing ends."""
        items = list(self._held)
        self._held.clear()
        return items

    @property
    def next_ns(self) -> int:
        """When the next leaves; NEVER_NS while none is held."""
        if not self._held:
            return NEVER_NS
        last_ns = next(iter(self._held.values())) + self._budget_ns
        if self._gaps is None:
            return min(last_ns, math.ceil(self._due_ns + self._gap_ns)) if self._due_ns else 0
        return min(last_ns, self._at_ns + math.ceil(self._rest * self._mean_ns / len(self._held)))

    def take(self, now_ns: int) -> list[T]:
        """Those that leave now.

        A caller who comes late gets what was due meanwhile; the gaps that follow run from when it was due.
        """
        items: list[T] = []
        while self._held and (due_ns := self.next_ns) <= now_ns:
            item, came_ns = self._held.popitem(last=False)
            due_ns = max(due_ns, came_ns)
            # `next_ns` counted on this one being held.
            self._run(due_ns, held=len(self._held) + 1)
            if self._gaps is not None:
                if self._rest > 1e-9 and due_ns >= came_ns + self._budget_ns:
                    self.forced += 1
                else:
                    self._rest = self._draw(self._gaps)
            elif self._due_ns and due_ns < self._due_ns + self._gap_ns:
                self.forced += 1
            self._due_ns = due_ns
            self._count(now_ns, came_ns)
            items.append(item)
        return items

    def _count(self, now_ns: int, came_ns: int) -> None:
        if self._left_ns:
            gap_s = (now_ns - self._left_ns) / 1e9
            self.left.add(gap_s)
            self._leavings += 1
            if self._leavings > SETTLED * (len(self._held) + 1):
                self._recent.add(gap_s)
                self._clock.add(len(self._held) + 1.0)
        self._left_ns = now_ns
        self.delays.add((now_ns - came_ns) / 1e9)

    def _draw(self, gaps: Gaps) -> float:
        asked = (self.asked_cv or 0.0) ** 2
        v = (self._clock.cv or 0.0) ** 2
        drawn = asked - v * (1.15 - 0.8 * asked)
        if self._recent.is_full:
            wrong = (self._recent.cv or 0.0) ** 2 - asked
            self._excess += GAIN * min(max(wrong, -asked), asked)  # a process that stood still is no reason for more
            self._excess = min(max(self._excess, drawn - 2 * asked), drawn)
        return gaps(math.sqrt(max(0.0, drawn - self._excess)))

    def _run(self, now_ns: int, *, held: int | None = None) -> None:
        """Let operational time pass."""
        count = len(self._held) if held is None else held
        if count and self._gaps is not None and now_ns > self._at_ns:
            self._rest = max(0.0, self._rest - (now_ns - self._at_ns) * count / self._mean_ns)
        self._at_ns = max(self._at_ns, now_ns)
