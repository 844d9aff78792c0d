"""Notices clients that leave and timers that run out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from proxy.settings import TimeoutSettings


class Watched(Protocol):
    """What is watched: one request."""

    @property
    def receive(self) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
        """Its ASGI `receive`."""
        ...

    def left(self) -> None:
        """Its client has left."""
        ...

    def check_timers(self, now_ns: int, timers: Timers) -> None:
        """Look whether a timer has run out."""
        ...


@dataclass(frozen=True, slots=True)
class Timers:
    """Timeouts in nanoseconds; 0 is off."""

    first_byte_ns: int
    chunk_ns: int
    total_ns: int


class Watch:
    """Notices clients that leave and timers that run out, for requests that live long enough to matter.

    Waiting for a client's disconnect costs a task. Most plain requests are answered within milliseconds, so a request
    gets its task only when it has lived through a whole tick: a client that leaves is noticed within two ticks.
    """

    TICK_S = 0.025
    TIMER_TICKS = 10
    """Timers are checked every so many ticks."""

    def __init__(self, timeouts: TimeoutSettings) -> None:
        self._timers = Timers(
            int(timeouts.first_byte_s * 1e9), int(timeouts.chunk_s * 1e9), int(timeouts.total_s * 1e9)
        )
        self._young: set[Watched] = set()
        self._older: set[Watched] = set()
        self._watched: set[Watched] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._is_ticking = False
        self._ticks = 0

    @contextlib.asynccontextmanager
    async def running(self, tasks: asyncio.TaskGroup) -> AsyncIterator[None]:
        """Its tasks belong to this group, and end with the context."""
        self._tasks = tasks
        try:
            yield
        finally:
            self._tasks = None
            for task in self._leaving:
                task.cancel()

    def add(self, request: Watched) -> None:
        """Watch a request whose body has been read."""
        self._young.add(request)
        if not self._is_ticking:
            self._is_ticking = True
            asyncio.get_running_loop().call_later(self.TICK_S, self._tick)

    def remove(self, request: Watched) -> None:
        """The request is over."""
        self._young.discard(request)
        self._older.discard(request)
        self._watched.discard(request)

    def _tick(self) -> None:
        for request in self._older:
            self._watched.add(request)
            if self._tasks is not None:
                task = self._tasks.create_task(self._wait_for_leaving(request))
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
        self._older, self._young = self._young, set()
        self._ticks += 1
        if self._ticks % self.TIMER_TICKS == 0:
            now_ns = time.monotonic_ns()
            for request in self._watched:
                request.check_timers(now_ns, self._timers)
        self._is_ticking = bool(self._older or self._watched)
        if self._is_ticking:
            asyncio.get_running_loop().call_later(self.TICK_S, self._tick)

    @staticmethod
    async def _wait_for_leaving(request: Watched) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        request.left()
