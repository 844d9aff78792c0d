"""A sender's turn at the processor: on a busy host the scheduler, and not the timer, is what makes a request late.

On Linux the thread that sends asks for, in this order,

    real time      SCHED_FIFO, 1 (sched(7)): before all that is not. Root or CAP_SYS_NICE only
    short slices   of 0.1 ms, from kernel 6.12 (sched_setattr(2)): sooner on, and sooner off again. For everybody

and else runs as all others do. Real time is given up once the thread has used over half a core for a second: a sender
that is near its limit may not starve the target beside it. Threads and processes that it starts do not inherit it.
Nothing here can fail a run, and none of it changes what counts as lag.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import time
from contextlib import suppress
from typing import Final

SLICE_NS: Final = 100_000
"""The shortest that the kernel grants."""
MAX_SHARE: Final = 0.5
"""Of a core, for real time."""
LOOK_NS: Final = 1_000_000_000
"""Between two looks at that share."""

_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
"""The call's number; the C library has no function for it."""


class Priority:
    """That of the calling thread, from `__init__` to `close`; both on that thread. One that somebody has chosen for the
    process (chrt(1)) stays."""

    def __init__(self) -> None:
        self._is_ours = _is_as_all_others()
        self._is_real_time = self._is_ours and _ask_real_time()
        if self._is_ours and not self._is_real_time:
            _ask_slice(SLICE_NS)
        self._looked_ns = time.monotonic_ns()
        self._used_ns = time.thread_time_ns()

    def look(self) -> None:
        """Call it now and then: gives up real time where too much of it is used."""
        now_ns = time.monotonic_ns()
        if not self._is_real_time or now_ns - self._looked_ns < LOOK_NS:
            return
        used_ns = time.thread_time_ns()
        if used_ns - self._used_ns > MAX_SHARE * (now_ns - self._looked_ns):
            self._is_real_time = False
            _ask_slice(SLICE_NS)
        self._looked_ns, self._used_ns = now_ns, used_ns

    def close(self) -> None:
        """Be as all others again."""
        if self._is_ours:
            _ask_slice(0)


def _is_as_all_others() -> bool:
    try:
        return os.sched_getscheduler(0) == os.SCHED_OTHER
    except (AttributeError, OSError):  # not Linux
        return False


def _ask_real_time() -> bool:
    with suppress(OSError):  # not permitted
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        return True
    return False


def _ask_slice(slice_ns: int) -> None:
    """Scheduled as all others, with this slice; 0 is the kernel's own. An older kernel takes no notice of it."""
    with suppress(OSError, KeyError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
        attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, slice_ns, 0, 0)
        ctypes.CDLL(None).syscall(_SCHED_SETATTR[platform.machine()], 0, attributes, 0)
