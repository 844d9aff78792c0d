"""The recorder process: `burstgate record`, or `python -m proxy.record` under a supervisor.

At its start it waits for the database and brings its schema up to date; then it moves records until it is stopped.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType

from proxy.child import ChildTask, run_child, watch_parent
from proxy.config_error import ConfigError
from proxy.retention import Retention
from proxy.settings import Settings
from storage.engine import open_engine, upgrade
from storage.errors import DatabaseUnavailable, SchemaError
from storage.recorder import Recorder
from storage.sink import Sink, SinkUnavailable, open_sink

log = logging.getLogger("burstgate.recorder")

NICENESS = 5
"""Beside workers on a busy core the recorder takes a quarter: a batch that waits delays nobody, a request does."""
PREDECESSOR_S = 5.0
"""How long it waits for the recorder of a supervisor that was killed to finish its last batch and go."""


def _open(settings: Settings) -> Sink:
    engine = open_engine(settings.database)
    try:
        upgrade(engine)
    except (DatabaseUnavailable, SchemaError) as error:
        engine.dispose()
        raise SinkUnavailable(str(error)) from error
    return open_sink(engine)


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
    recorder = HandingRecorder(settings.journal_dir, lambda: _open(settings))
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


def run_recorder(recorder: HandingRecorder) -> None:
    """Run until SIGTERM or SIGINT (then everything is recorded first) or SIGUSR1 (a successor waits)."""

    def stop(signum: int, frame: FrameType | None) -> None:
        recorder.stop()

    def hand_over(signum: int, frame: FrameType | None) -> None:
        recorder.hand_over()

    signal.signal(signal.SIGUSR1, hand_over)
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as under a supervisor
        signal.signal(signal.SIGINT, stop)
    try:
        recorder.run()
    finally:
        recorder.close()


def run_supervised(task: ChildTask) -> None:
    """Record until told to stop."""
    os.nice(NICENESS)
    recorder = open_recorder(task.settings, wait_s=PREDECESSOR_S)

    def reload(settings: Settings) -> None:
        assert recorder.retention is not None
        recorder.retention.settings = settings

    watch_parent(recorder.stop, reload)
    task.tell_ready()
    run_recorder(recorder)


if __name__ == "__main__":
    run_child("recorder", run_supervised)
