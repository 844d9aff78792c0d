"""Waking on time: an event loop's own timers are whole milliseconds, a schedule's deadlines are not.

On Linux a timerfd (timerfd_create(2)) on the monotonic clock wakes the loop, some 50 us late; elsewhere the loop's own
timer does, up to 2 ms late.
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
    """Sleeps until moments of the monotonic clock, or until it is rung; for one sleeper at a time. `close` it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)
        create = getattr(self._libc, "timerfd_create", None)
        self._fd = -1 if create is None else create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._rang)

    async def until(self, at_ns: int | None) -> None:
        """Return at that moment of `time.monotonic_ns`, or at once when it has passed; sooner when `ring` is called.

        None is no moment at all: only `ring` ends it.
        """
        if at_ns is not None and at_ns <= time.monotonic_ns():
            return
        timer: asyncio.TimerHandle | None = None
        if at_ns is not None and self._fd >= 0:
            spec = _TimerSpec(0, 0, at_ns // 1_000_000_000, at_ns % 1_000_000_000)
            if self._libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(spec), None):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        elif at_ns is not None:
            timer = self._loop.call_later((at_ns - time.monotonic_ns()) / 1e9 + 0.001, self.ring)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def ring(self) -> None:
        """End the sleep, if somebody sleeps."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _rang(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
            self.ring()

    def close(self) -> None:
        """Give the timer back."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
