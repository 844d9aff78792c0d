"""Waking on time: an event loop's own timers are whole milliseconds, a schedule's deadlines are not.

On Linux a timerfd (timerfd_create(2)) on the monotonic clock wakes the loop, some 50 us late; elsewhere the loop's own
timer does, up to 1 ms late.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time

_CLOCK_MONOTONIC = 1
_ABSOLUTE = 1
"""TFD_TIMER_ABSTIME."""


class _TimerSpec(ctypes.Structure):
    """struct itimerspec: the interval, and the first expiry."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Alarm:
    """Sleeps until moments of the monotonic clock; for one sleeper at a time. `close` it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)
        create = getattr(self._libc, "timerfd_create", None)
        self._fd = -1 if create is None else create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._rang)

    async def until(self, at_ns: int) -> None:
        """Return at that moment of `time.monotonic_ns`, or at once when it has passed."""
        if at_ns <= time.monotonic_ns():
            return
        if self._fd < 0:
            while (wait_ns := at_ns - time.monotonic_ns()) > 0:
                await asyncio.sleep(min(wait_ns / 1e9, 3600.0))
            return
        spec = _TimerSpec(0, 0, at_ns // 1_000_000_000, at_ns % 1_000_000_000)
        if self._libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(spec), None):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _rang(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)

    def close(self) -> None:
        """Give the timer back."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
