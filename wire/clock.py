"""The clock, as something that can be handed in. Durations are monotonic; the wall is read once a record."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What the gateway and the replayer ask of time."""

    def now_ns(self) -> int:
        """Monotonic nanoseconds from an arbitrary zero."""
        ...

    def wall_s(self) -> float:
        """Epoch seconds."""
        ...


class SystemClock:
    """The machine's clocks."""

    now_ns = staticmethod(time.monotonic_ns)
    wall_s = staticmethod(time.time)
