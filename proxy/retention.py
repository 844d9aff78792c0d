"""Retention in the background: a process of the recorder's, started every `retention.check_interval_s`.

`python -m proxy.retention` reads the settings from its standard input, takes out of the database what is due
(storage/retention.py), notes how it went in `DATA_DIR/retention.json` and ends. It works a quarter of the time at most,
at the lowest priority, in memory of its own. Whatever becomes of it, records are recorded: the recorder starts it and
looks whether it has ended, and never waits for it. It ends when the recorder does, killed where it stands: the next
one goes on from there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

from proxy.logs import configure_logging
from proxy.settings import Settings, validate

log = logging.getLogger("burstgate.retention")

NICENESS = 19
WORK_SHARE = 0.25
MAX_PAUSE_S = 1.0
FIRST_CHECK_S = 5.0
"""After the recorder's start, which has a journal to read."""


class RetentionState(msgspec.Struct, frozen=True):
    """How the runs went, over all of them. Stamps in epoch seconds; error: of the latest run."""

    runs: int = 0
    failures: int = 0
    rows_pruned: int = 0
    rows_archived: int = 0
    last_run_at: float | None = None
    last_success_at: float | None = None
    database_bytes: int | None = None
    error: str | None = None


def read_state(data_dir: Path) -> RetentionState | None:
    """What the runs have noted; None where none has."""
    try:
        return msgspec.json.decode((data_dir / "retention.json").read_bytes(), type=RetentionState)
    except (OSError, ValueError):
        return None


def _write_state(data_dir: Path, state: RetentionState) -> None:
    part = data_dir / ".retention.json.part"
    part.write_bytes(msgspec.json.encode(state))
    part.replace(data_dir / "retention.json")


class Retention:
    """Starts the runs. `tend` is called often and never waits."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        """May be changed at any time."""
        self._process: subprocess.Popen[bytes] | None = None
        self._next_s = time.monotonic() + FIRST_CHECK_S

    def tend(self) -> None:
        """Start a run that is due, notice one that has ended."""
        now_s = time.monotonic()
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._let_go()
            self._next_s = now_s + self.settings.retention.check_interval_s
        elif self.settings.retention.is_on and now_s >= self._next_s:
            try:
                self._start()
            except OSError as error:
                log.warning("retention can not be started: %s", error.strerror)
                self._let_go()
                self._next_s = now_s + self.settings.retention.check_interval_s

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "proxy.retention"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        os.write(self._process.stdin.fileno(), self.settings.model_dump_json().encode() + b"\n")  # a pipe takes 64 KiB

    def _let_go(self) -> None:
        if self._process is not None:
            if self._process.stdin is not None:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End a run where it stands."""
        if self._process is not None:
            self._process.kill()
            self._let_go()


def run_once(settings: Settings, now_s: float) -> RetentionState:
    """One run, and what is noted of it. Raises nothing that a database or an archive does."""
    from storage.archive import Archive
    from storage.engine import open_engine
    from storage.errors import ArchiveError, DatabaseUnavailable, RetentionBusy
    from storage.retention import database_bytes, due_days, prune

    retention = settings.retention
    before = read_state(settings.data_dir) or RetentionState()
    engine = open_engine(settings.database)
    rows = archived = 0

    def count(day: object, rows_out: int, rows_held: int) -> None:
        nonlocal rows, archived
        rows += rows_out
        archived += rows_held

    error: str | None = None
    size_bytes = before.database_bytes
    try:
        days = due_days(
            engine,
            now_s,
            max_age_s=None if retention.max_age_days is None else retention.max_age_days * 86_400,
            max_bytes=retention.max_size,
        )
        if days:
            prune(
                engine,
                days,
                Archive(retention.archive) if retention.archive else None,
                breathe=_breathe_slowly(),
                on_day=count,
            )
        size_bytes = database_bytes(engine)
        if retention.max_size is not None and size_bytes > retention.max_size:
            log.warning("retention: %d bytes in use, and nothing left that may go", size_bytes)
    except RetentionBusy:
        return before  # another gateway's recorder does it
    except (DatabaseUnavailable, ArchiveError, ValueError, OSError) as reason:
        error = " ".join(str(reason).split())
        log.warning("retention: %s", error)
    finally:
        engine.dispose()
    return RetentionState(
        runs=before.runs + 1,
        failures=before.failures + (error is not None),
        rows_pruned=before.rows_pruned + rows,
        rows_archived=before.rows_archived + archived,
        last_run_at=now_s,
        last_success_at=before.last_success_at if error is not None else now_s,
        database_bytes=size_bytes,
        error=error,
    )


class _Pauses:
    """Sleeps between pieces of work, so that work is a quarter of the time."""

    def __init__(self) -> None:
        self._since_s = time.monotonic()

    def __call__(self) -> None:
        worked_s = time.monotonic() - self._since_s
        time.sleep(min(MAX_PAUSE_S, worked_s * (1 / WORK_SHARE - 1)))
        self._since_s = time.monotonic()


def _breathe_slowly() -> _Pauses:
    return _Pauses()


def main() -> None:
    """One run; ends at once when whoever started it is gone."""
    configure_logging("retention")
    os.nice(NICENESS)
    line = sys.stdin.buffer.readline()
    if not line:
        return

    def leave_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    settings = validate(msgspec.json.decode(line), {})
    _write_state(settings.data_dir, run_once(settings, time.time()))
    sys.stderr.flush()
    os._exit(0)  # the thread above holds standard input


if __name__ == "__main__":
    main()
