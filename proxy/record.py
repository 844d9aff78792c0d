"""The recorder process: `burstgate record`, or `python -m proxy.record` under a supervisor.

At its start it waits for the database and brings its schema up to date; then it moves records until it is stopped.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import platform
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Self

from proxy.child import ChildTask, run_child, watch_parent
from proxy.config_error import ConfigError
from proxy.retention import Retention
from proxy.settings import Settings
from storage.engine import open_engine, upgrade
from storage.errors import DatabaseUnavailable, SchemaError
from storage.recorder import Recorder
from storage.rollup import roll
from storage.sink import Breathe, Sink, SinkUnavailable, open_sink

log = logging.getLogger("burstgate.recorder")

GC_THRESHOLD = (100_000, 20, 50)
"""A batch is many thousand rows, of which none is garbage before its end: looking at them took an eighth of it."""
NICENESS = 5
"""Beside workers on a busy core the recorder takes a quarter: a batch that waits delays nobody, a request does."""
WORK_SHARE = 0.25
"""Of the time that a batch takes, how much is work."""
MAX_PAUSE_S = 0.02
SLICE_NS = 20_000_000
"""How long it wants to run at a time; Linux's own is 3 ms."""
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""The system call's number."""
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")
"""size, policy, flags, nice, priority, runtime, deadline, period: sched_setattr(2)."""
PREDECESSOR_S = 5.0
"""How long it waits for the recorder of a supervisor that was killed to finish its last batch and go."""


def _open(settings: Settings, breathe: Breathe) -> Sink:
    engine = open_engine(settings.database)
    try:
        upgrade(engine)
    except (DatabaseUnavailable, SchemaError) as error:
        engine.dispose()
        raise SinkUnavailable(str(error)) from error
    return open_sink(engine, breathe)


class Pauses:
    """Sleeps between the pieces of a batch, so that it takes a quarter of a core, unless more comes in than that moves.

    A batch is a tenth of a second's work every half second. In one go it shares the core with the worker in turns of
    milliseconds, and every request of that while waits; in pieces it is in nobody's way.
    """

    is_pressed: Callable[[], bool] = staticmethod(lambda: True)

    def __init__(self) -> None:
        self._since_s = time.thread_time()

    def __call__(self) -> None:
        """Sleep for three times the CPU time since the last call."""
        worked_s = time.thread_time() - self._since_s
        if not self.is_pressed():
            time.sleep(min(MAX_PAUSE_S, worked_s * (1 / WORK_SHARE - 1)))
        self._since_s = time.thread_time()


class HandingRecorder(Recorder):
    """One that can hand over: it ends with the round it is at, and its successor goes on from there. With retention."""

    _hands_over = False
    retention: Retention | None = None

    def hand_over(self) -> None:
        """Ask `run` to return soon, whatever is still to be read: under load there is always more."""
        self._hands_over = True
        self.stop()

    def step(self) -> int:
        """As ever; nothing more to do once it hands over."""
        moved = super().step()
        if self.retention is not None:
            self.retention.tend()
        return 0 if self._hands_over else moved

    def close(self) -> None:
        """As ever; a run of retention ends where it stands."""
        if self.retention is not None:
            self.retention.close()
        super().close()


def open_recorder(settings: Settings, *, wait_s: float = 0.0) -> HandingRecorder:
    """A recorder that holds its data directory. Raises ConfigError when another does after `wait_s`, OSError."""
    pauses = Pauses()
    recorder = HandingRecorder(settings.journal_dir, lambda: _open(settings, pauses), breathe=pauses)
    pauses.is_pressed = lambda: recorder.is_pressed
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            recorder.acquire()
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise ConfigError(
                    f"{settings.journal_dir}: another recorder is at work on this data directory"
                ) from None
            time.sleep(0.1)
        else:
            recorder.retention = Retention(settings)
            return recorder


class Roller:
    """Keeps the sums by minute and longer steps (storage/rollup.py), in a thread beside the recorder; never in its way.

    A transaction takes about `BUSY_S`, for which SQLite's other writers wait: how many minutes it adds up follows from
    how long the last one took.
    """

    PAUSE_S = 5.0
    BUSY_S = 0.2

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="roller")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        limit = 1
        engine = open_engine(self._settings.database)
        try:
            while not self._is_over.wait(self.PAUSE_S):
                while not self._is_over.is_set():
                    begun_s = time.monotonic()
                    try:
                        done = roll(engine, time.time(), limit=limit)
                    except (DatabaseUnavailable, SchemaError):  # the recorder says so; here it is tried again
                        break
                    took_s = time.monotonic() - begun_s
                    if done < limit:
                        break
                    limit = min(360, max(1, int(limit * min(4.0, self.BUSY_S / max(took_s, 1e-3)))))
                    self._is_over.wait(took_s)  # half of the time is the recorder's
        finally:
            engine.dispose()


def run_recorder(recorder: HandingRecorder, settings: Settings) -> None:
    """Run until SIGTERM or SIGINT (then everything is recorded first) or SIGUSR1 (a successor waits)."""

    def stop(signum: int, frame: FrameType | None) -> None:
        recorder.stop()

    def hand_over(signum: int, frame: FrameType | None) -> None:
        recorder.hand_over()

    signal.signal(signal.SIGUSR1, hand_over)
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as under a supervisor
        signal.signal(signal.SIGINT, stop)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    try:
        with Roller(settings):
            recorder.run()
    finally:
        recorder.close()


def stand_back() -> None:
    """Take less of a busy core than a worker, and give it up at once when a worker has something to do.

    For the calling thread and those that it starts later. Since 6.12 Linux lets a task that wakes up take the core from
    one that asked for a longer slice, where else it waits until the slice ends: a request that comes in the middle of a
    batch is not milliseconds late. Older ones know the niceness alone.
    """
    niceness = os.nice(NICENESS)
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None and sys.platform == "linux":
        wanted = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, niceness, 0, SLICE_NS, 0, 0)
        # Whatever it answers: a sandbox may forbid it.
        ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_int(0), wanted, ctypes.c_uint(0))


def run_supervised(task: ChildTask) -> None:
    """Record until told to stop."""
    stand_back()
    recorder = open_recorder(task.settings, wait_s=PREDECESSOR_S)

    def reload(settings: Settings) -> None:
        assert recorder.retention is not None
        recorder.retention.settings = settings

    watch_parent(recorder.stop, reload)
    task.tell_ready()
    run_recorder(recorder, task.settings)


if __name__ == "__main__":
    run_child("recorder", run_supervised)
