"""Whether an upstream is well, as one worker sees it. Pure: times are arguments, nothing here waits or sends.

Three things can take an upstream out of the choice:
- probes: `health.unhealthy_after` of them failed in a row. Only good probes bring it back.
- the circuit breaker, opened by failed connections (state `down`), or by failed requests in a row or an error rate far
  above the rest's (state `ejected`). After a pause it is half open: `health.trials` requests at a time are let through.
  As many that are well close it; one that fails opens it again, for twice as long, up to `health.max_pause_s`. A good
  probe shows that connections can be made, and closes what failed connections opened.
- `drain`, which is the fleet's business.
An upstream that comes back is eased in: its weight grows over `balance.slow_start_s`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from proxy.settings import HealthSettings

RAMP_STEPS = 10
"""A weight grows in so many steps, the first of which is one of them: it never starts at nothing."""
_STEPS = 10
"""Of a window: what is older than it is forgotten a tenth at a time."""


class State(enum.StrEnum):
    """An upstream's state, as the control plane shows it."""

    UP = "up"
    DOWN = "down"
    EJECTED = "ejected"
    HALF_OPEN = "half_open"
    DRAINING = "draining"
    SLOW_START = "slow_start"


@dataclass(frozen=True, slots=True)
class Counts:
    """What a window holds."""

    total: int
    marked: int


class Window:
    """Counts events of the last `span_ns`, and how many of them were marked (failures, retries)."""

    __slots__ = ("_marked", "_now", "_step_ns", "_total")

    def __init__(self, span_ns: int) -> None:
        self._step_ns = 0
        self.resize(span_ns)

    def resize(self, span_ns: int) -> None:
        """Count over another span from now on; what was counted over the old one is forgotten."""
        step_ns = max(1, span_ns // _STEPS)
        if step_ns != self._step_ns:
            self._step_ns = step_ns
            self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._now = 0
        self._total = [0] * _STEPS
        self._marked = [0] * _STEPS

    def add(self, now_ns: int, total: int, marked: int) -> None:
        """Count. Times do not go back."""
        step = now_ns // self._step_ns
        if step != self._now:
            self._forget(step)
        self._total[step % _STEPS] += total
        self._marked[step % _STEPS] += marked

    def counts(self, now_ns: int) -> Counts:
        """The counts at this moment."""
        step = now_ns // self._step_ns
        if step != self._now:
            self._forget(step)
        return Counts(sum(self._total), sum(self._marked))

    def _forget(self, step: int) -> None:
        for gone in range(max(self._now + 1, step - _STEPS + 1), step + 1):
            self._total[gone % _STEPS] = self._marked[gone % _STEPS] = 0
        self._now = step


def is_outlier(own: Counts, rest: Sequence[Counts], rules: HealthSettings) -> bool:
    """Whether an upstream fails more often than the rest together, by `outlier_margin`.

    Where everybody fails nobody is an outlier: the cause is elsewhere. A margin and not a multiple of the standard
    deviation, which says nothing for the two or three upstreams that most fleets have.
    """
    total = sum(counts.total for counts in rest)
    if rules.outlier_margin == 0 or min(own.total, total) < rules.min_requests:
        return False
    rest_rate = sum(counts.marked for counts in rest) / total
    return own.marked / own.total >= rest_rate + rules.outlier_margin


def may_eject(ejected: int, size: int, rules: HealthSettings) -> bool:
    """Whether one more of `size` upstreams may be ejected; of several it may always be one, unless the share is 0."""
    if size < 2 or rules.max_ejected_share == 0:
        return False
    return ejected < max(1, int(rules.max_ejected_share * size))


class Health:
    """One upstream's health. What happened to it returns whether its state may have changed by that."""

    __slots__ = ("_cause", "_closed_ns", "_is_probed_down", "_opened", "_passed", "_probes",
                 "_ramp_from_ns", "connect_failures", "error", "failures", "is_closed", "rules", "slow_start_ns",
                 "trials", "until_ns")  # fmt: skip

    def __init__(self, rules: HealthSettings, slow_start_s: float) -> None:
        self.rules = rules
        self.slow_start_ns = int(slow_start_s * 1e9)
        self.error: str | None = None
        """What failed last."""
        self.failures = 0
        """Failed requests in a row."""
        self.is_closed = True
        """The circuit is closed: requests flow."""
        self.until_ns = 0
        """Of an open circuit, when its pause ends."""
        self.trials = 0
        """Requests in flight that began while the circuit was not closed."""
        self._passed = 0
        self.connect_failures = 0
        """Failed connections in a row."""
        self._cause = State.DOWN
        self._opened = 0
        self._closed_ns: int | None = None
        self._is_probed_down = False
        self._probes = 0
        """Probes in a row that say otherwise than `_is_probed_down`."""
        self._ramp_from_ns: int | None = None

    def state(self, now_ns: int) -> State:
        """The state at this moment, `drain` left aside."""
        if self._is_probed_down:
            return State.DOWN
        if not self.is_closed:
            return self._cause if now_ns < self.until_ns else State.HALF_OPEN
        return State.UP if self.ramp(now_ns) == 1.0 else State.SLOW_START

    def is_ready(self, now_ns: int) -> bool:
        """Whether it takes requests: it is well, or its circuit is half open and has room for a trial."""
        if self._is_probed_down:
            return False
        return self.is_closed or (now_ns >= self.until_ns and self.trials < self.rules.trials)

    @property
    def is_ejected(self) -> bool:
        """Out for failed requests, until its trials are passed."""
        return not self.is_closed and self._cause is State.EJECTED

    def ramp(self, now_ns: int) -> float:
        """The part of its weight that it has, in (0, 1]; the smallest while its circuit is open or its probes fail."""
        if self._is_probed_down or not self.is_closed:
            return 1 / RAMP_STEPS
        if self._ramp_from_ns is None:
            return 1.0
        age_ns = now_ns - self._ramp_from_ns
        if age_ns >= self.slow_start_ns:
            return 1.0
        return (1 + age_ns * (RAMP_STEPS - 1) // self.slow_start_ns) / RAMP_STEPS

    def changes_at_ns(self, now_ns: int) -> int | None:
        """When time alone will next change its state or weight; None when it will not."""
        if self._is_probed_down:
            return None
        if not self.is_closed:
            return self.until_ns if now_ns < self.until_ns else None
        if self._ramp_from_ns is None or now_ns - self._ramp_from_ns >= self.slow_start_ns:
            return None
        step = (now_ns - self._ramp_from_ns) * (RAMP_STEPS - 1) // self.slow_start_ns + 1
        return self._ramp_from_ns - (-step * self.slow_start_ns // (RAMP_STEPS - 1))

    def start_slowly(self, now_ns: int) -> None:
        """Begin with a small weight."""
        self._ramp_from_ns = now_ns

    def answered(self, now_ns: int, *, is_trial: bool) -> bool:
        """A request was answered, and not with a server's error."""
        self.connect_failures = 0
        if not is_trial or self.is_closed:
            return False
        self._passed += 1
        if self._passed < self.rules.trials:
            return False
        self._close(now_ns)
        return True

    def request_failed(self, now_ns: int, error: str, *, is_trial: bool, may_eject: bool) -> bool:
        """A request that was sent failed, or was answered with a server's error."""
        self.error = error
        self.failures += 1
        self.connect_failures = 0
        if not self.is_closed:  # requests that began before the circuit opened tell nothing new
            return is_trial and now_ns >= self.until_ns and self._open(now_ns, self._cause)
        return may_eject and self.failures >= self.rules.max_failures and self._open(now_ns, State.EJECTED)

    def connect_failed(self, now_ns: int, error: str) -> bool:
        """No connection could be made."""
        self.error = error
        self.connect_failures += 1
        if not self.is_closed:
            return now_ns >= self.until_ns and self._open(now_ns, State.DOWN)
        return self.connect_failures >= self.rules.max_connect_failures and self._open(now_ns, State.DOWN)

    def eject(self, now_ns: int, error: str) -> bool:
        """Its error rate is far above the rest's."""
        self.error = error
        return self.is_closed and self._open(now_ns, State.EJECTED)

    def probed(self, now_ns: int, error: str | None) -> bool:
        """A probe came back, well or with an error."""
        closes = error is None and not self.is_closed and self._cause is State.DOWN
        if closes:
            self._close(now_ns)
        if error is not None:
            self.error = error
        if (error is not None) == self._is_probed_down:
            self._probes = 0
            return closes
        self._probes += 1
        if self._probes < (self.rules.healthy_after if self._is_probed_down else self.rules.unhealthy_after):
            return closes
        self._probes = 0
        self._is_probed_down = not self._is_probed_down
        if not self._is_probed_down and self.is_closed:
            self.start_slowly(now_ns)
        return True

    def forget_probes(self) -> None:
        """Nobody probes any more: what probes said no longer holds."""
        self._is_probed_down = False
        self._probes = 0

    def _open(self, now_ns: int, cause: State) -> bool:
        rules = self.rules
        if self._closed_ns is not None and now_ns - self._closed_ns > rules.max_pause_s * 1e9:
            self._opened = 0  # it was well for long: this is a new story
        pause_s = min(rules.pause_s * 2.0 ** min(self._opened, 64), rules.max_pause_s)
        self._opened += 1
        self._closed_ns = None
        self.is_closed = False
        self.until_ns = now_ns + int(pause_s * 1e9)
        self._cause = cause
        self._passed = 0
        return True

    def _close(self, now_ns: int) -> None:
        self.is_closed = True
        self._closed_ns = now_ns
        self.failures = self.connect_failures = 0
        self.start_slowly(now_ns)
