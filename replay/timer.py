"""Waking on time: an event loop's own timers are whole milliseconds, a schedule's deadlines are not.

On Linux a timerfd (timerfd_create(2)) on the monotonic clock wakes the loop, some 150 us late on a virtual machine;
elsewhere the loop's own timer does, up to 2 ms late. So it is set `SPIN_NS` early, and the loop turns until the moment.
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

SPIN_NS = 250_000
"""What a sleeping core takes to wake. At 1,000 moments a second a quarter of a core goes into this."""


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
        self._is_rung = False
        self._libc = ctypes.CDLL(None, use_errno=True)
        create = getattr(self._libc, "timerfd_create", None)
        self._fd = -1 if create is None else create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._rang)

    async def until(self, at_ns: int | None) -> None:
        """Return at that moment of `time.monotonic_ns`, or at once when it has passed; sooner when `ring` is called.

        None is no moment at all: only `ring` ends it.
        """
        self._is_rung = False
        if at_ns is None:
            await self._sleep()
            return
        while not self._is_rung and (now_ns := time.monotonic_ns()) < at_ns - SPIN_NS:
            timer = self._set(at_ns - SPIN_NS, now_ns)
            try:
                await self._sleep()
            finally:
                if timer is not None:
                    timer.cancel()
        while not self._is_rung and time.monotonic_ns() < at_ns:
            await asyncio.sleep(0)

    def _set(self, at_ns: int, now_ns: int) -> asyncio.TimerHandle | None:
        """Have `_wake` called at that moment; the timer, where it is one of the loop's."""
        if self._fd < 0:
            return self._loop.call_later((at_ns - now_ns) / 1e9, self._wake)
        spec = _TimerSpec(0, 0, at_ns // 1_000_000_000, at_ns % 1_000_000_000)
        if self._libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(spec), None):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return None

    async def _sleep(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def ring(self) -> None:
        """End the sleep, if somebody sleeps."""
        self._is_rung = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _rang(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
            self._wake()

    def close(self) -> None:
        """Give the timer back."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
