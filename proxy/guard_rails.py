"""What keeps an injection from doing harm. Pure: planned rows, counters and limits in, a reason to stop out.

    ahead     `within` ends the plan before the first row that would break a ceiling: requests in any second (of a rate
              below 1, in 1 / rate seconds), tokens asked for, duration. So no ceiling is ever passed.
    checked   every CHECK_S the counters of live traffic (`origin=client`, without injected faults) are read; over the
              last WINDOW_S: the share of failures, the p95 of the time to first token (from its histogram, linear
              inside a bucket), and the injected share of all requests. Under MIN_REQUESTS nothing is judged.

What was so before the injection began is no reason: windows begin with it. Counters that cannot be read are one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Final

import msgspec

from proxy.series import TTFT_BUCKETS_S
from proxy.settings import InjectionSettings
from replay.schedule import Planned

CHECK_S: Final = 1.0
WINDOW_S: Final = 10.0
MIN_REQUESTS: Final = 10

_TTFT: Final = (*(f"live_ttft_le_{bound:g}" for bound in TTFT_BUCKETS_S), "live_ttft_le_inf")


class Readings(msgspec.Struct, frozen=True):
    """What the guard rails saw last, over the window. None: too few requests to say."""

    live_rps: float
    """Live requests ended."""
    live_failure_rate: float | None
    live_ttft_p95_s: float | None
    injected_rps: float
    injected_share: float | None
    """Of injected and live requests."""


class _Seen(msgspec.Struct, frozen=True):
    at_s: float
    sent: int
    ended: int
    failed: int
    ttft: tuple[int, ...]


class LiveWindow:
    """Counters of the last seconds. Times are of one monotonic clock."""

    def __init__(self) -> None:
        self._seen: deque[_Seen] = deque()

    def add(self, at_s: float, sent: int, counters: Mapping[str, int]) -> Readings | None:
        """Take the counters as they are now; None at the first time, and where there are none.

        sent: requests injected so far.
        """
        if "live_ended" not in counters:
            return None
        ttft = tuple(counters.get(name, 0) for name in _TTFT)
        now = _Seen(at_s, sent, counters["live_ended"], counters.get("live_failed", 0), ttft)
        self._seen.append(now)
        while len(self._seen) > 2 and self._seen[1].at_s <= at_s - WINDOW_S:
            self._seen.popleft()
        first = self._seen[0]
        span_s = at_s - first.at_s
        if span_s <= 0:
            return None
        # A counters file may be passed over while its worker retires: the sums then fall for a moment.
        ended, failed = max(now.ended - first.ended, 0), max(now.failed - first.failed, 0)
        counts = [max(after - before, 0) for before, after in zip(first.ttft, now.ttft, strict=True)]
        injected = now.sent - first.sent
        together = injected + ended
        return Readings(
            live_rps=ended / span_s,
            live_failure_rate=min(failed / ended, 1.0) if ended >= MIN_REQUESTS else None,
            live_ttft_p95_s=histogram_quantile(counts, 0.95) if sum(counts) >= MIN_REQUESTS else None,
            injected_rps=injected / span_s,
            injected_share=injected / together if together >= MIN_REQUESTS else None,
        )


def histogram_quantile(counts: list[int], level: float, bounds: tuple[float, ...] = TTFT_BUCKETS_S) -> float:
    """A quantile of counts up to each bound and above the last, linear inside a bucket, as Prometheus has it.

    Beyond the last bound it is that bound. counts: not all 0.
    """
    rank, below = level * sum(counts), 0
    for (low, high), count in zip(pairwise((0.0, *bounds)), counts, strict=False):
        if count and below + count >= rank:
            return low + (high - low) * (rank - below) / count
        below += count
    return bounds[-1]


def tripped(readings: Readings, limits: InjectionSettings) -> str | None:
    """Why the injection must stop now; None when it may go on."""
    rules = (
        ("stop_failure_rate", "of live requests failed", readings.live_failure_rate, limits.stop_failure_rate),
        ("stop_ttft_p95_s", "s to live traffic's first token (p95)", readings.live_ttft_p95_s, limits.stop_ttft_p95_s),
        ("max_share", "of all requests were injected", readings.injected_share, limits.max_share),
    )
    for name, what, value, limit in rules:
        is_off = name == "stop_ttft_p95_s" and limit == 0
        if value is not None and not is_off and value > limit:
            return f"injection.{name}: {value:.3g} {what} in the last {WINDOW_S:g} s, more than {limit:g}"
    return None


def within(planned: Iterable[Planned], limits: InjectionSettings, trip: Callable[[str], None]) -> Iterator[Planned]:
    """The rows before the first that would break a ceiling, which is said to `trip`."""
    window_s = max(1.0, 1 / limits.max_rate_rps)
    most = limits.max_rate_rps * window_s
    recent_s: deque[float] = deque()
    tokens = 0
    for row in planned:
        if row.due_s > limits.max_duration_s:
            trip(f"injection.max_duration_s: the plan is longer than {limits.max_duration_s:g} s")
            return
        if row.is_sendable:
            while recent_s and recent_s[0] <= row.due_s - window_s:
                recent_s.popleft()
            recent_s.append(row.due_s)
            if len(recent_s) > most + 1e-9:
                trip(f"injection.max_rate_rps: more than {most:g} requests in {window_s:g} s, at {row.due_s:.1f} s")
                return
            tokens += (row.request_tokens or 0) + (row.response_tokens or 0)
            if tokens > limits.max_tokens:
                trip(f"injection.max_tokens: more than {limits.max_tokens:,} tokens, at {row.due_s:.1f} s")
                return
        yield row
