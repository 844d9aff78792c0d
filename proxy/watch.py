"""Looks after what nobody calls about: timers that run out, clients that leave unread, connections that idle."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self

from proxy.server import SWEEP_S, ClientConnection
from proxy.settings import TimeoutSettings

log = logging.getLogger("burstgate.gateway")


class Watched(Protocol):
    """What is watched: one request."""

    def check_timers(self, now_ns: int, timers: Timers) -> None:
        """Look whether a timer has run out."""
        ...

    def stopped(self) -> None:
        """The worker is being stopped."""
        ...


@dataclass(frozen=True, slots=True)
class Timers:
    """Timeouts in nanoseconds; 0 is off."""

    first_byte_ns: int = 0
    chunk_ns: int = 0
    total_ns: int = 0
    comment_ns: int = 0

    @classmethod
    def of(cls, timeouts: TimeoutSettings) -> Self:
        """From the settings."""
        return cls(
            first_byte_ns=int(timeouts.first_byte_s * 1e9),
            chunk_ns=int(timeouts.chunk_s * 1e9),
            total_ns=int(timeouts.total_s * 1e9),
            comment_ns=int(timeouts.sse_comment_s * 1e9),
        )


class Watch:
    """All requests of a worker, and its clients' connections.

    A timer for each request would cost more than most requests: all are looked at every `TICK_S`, which is how much
    later than asked a timer may end a request.
    """

    TICK_S = 0.05
    TIMER_TICKS = 4
    """Timers are checked every so many ticks."""

    def __init__(self, connections: set[ClientConnection]) -> None:
        self.timers = Timers()
        self._connections = connections
        self._requests: set[Watched] = set()
        self.add = self._requests.add
        self.remove = self._requests.discard

    def __len__(self) -> int:
        """How many requests are not over."""
        return len(self._requests)

    def requests(self) -> Iterable[Watched]:
        """Those that are not over, at this moment."""
        return tuple(self._requests)

    async def run(self) -> None:
        """Tick until cancelled."""
        ticks = 0
        next_sweep_s = time.monotonic() + SWEEP_S
        while True:
            await asyncio.sleep(self.TICK_S)
            ticks += 1
            for connection in [each for each in self._connections if each.is_held]:
                connection.look()
            if ticks % self.TIMER_TICKS == 0:
                self._check_timers(time.monotonic_ns())
            if time.monotonic() >= next_sweep_s:
                next_sweep_s = time.monotonic() + SWEEP_S
                for connection in tuple(self._connections):
                    connection.sweep()

    def _check_timers(self, now_ns: int) -> None:
        for request in self.requests():
            try:
                request.check_timers(now_ns, self.timers)
            except Exception:
                log.exception("a request's timers could not be checked")
