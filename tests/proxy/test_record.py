"""How the recorder shares a core with the workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proxy.record import MAX_PAUSE_S, NICENESS, SLICE_NS, Pauses
from storage.engine import open_engine, upgrade
from storage.entries import Begun
from storage.journal import JournalWriter
from storage.recorder import Recorder
from storage.sink import open_sink
from traces.record import TraceRecord

SHOW = """
import os, pathlib, threading
from proxy.record import stand_back
stand_back()
told = pathlib.Path("/proc/self/sched")
lines = [line.split() for line in told.read_text().splitlines()] if told.exists() else []
print(os.nice(0), next((line[-1] for line in lines if line and line[0] == "se.slice"), "unknown"))
thread = threading.Thread(target=lambda: print(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
thread.start()
thread.join()
"""


def test_it_yields_to_the_workers_with_its_threads() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    niceness, slice_ns, thread_niceness = done.stdout.split()
    assert (int(niceness), int(thread_niceness)) == (NICENESS, NICENESS)
    release = tuple(map(int, Path("/proc/sys/kernel/osrelease").read_text().split("-")[0].split(".")[:2]))
    if release < (6, 12) or slice_ns == "unknown":
        pytest.skip("Linux before 6.12, or one that does not tell a task's slice")
    assert int(slice_ns) == SLICE_NS


def test_a_batch_takes_a_quarter_of_a_core_unless_more_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_s = iter([1.0, 1.001, 1.0015, 1.1, 1.1, 1.2, 1.2])
    slept_s: list[float] = []
    monkeypatch.setattr("time.thread_time", lambda: next(cpu_s))
    monkeypatch.setattr("time.sleep", slept_s.append)
    pauses = Pauses()
    pauses.is_pressed = lambda: False
    pauses()  # after a millisecond of work
    assert slept_s == [pytest.approx(0.003)]
    pauses()  # after what can not be cut: a commit of 98.5 ms
    assert slept_s[1:] == [MAX_PAUSE_S]
    pauses.is_pressed = lambda: True
    pauses()
    assert len(slept_s) == 2


def test_pressed_are_a_recorder_that_is_behind_and_one_that_is_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.recorder.MAX_BATCH", 1000)
    calls: list[bool] = []
    engine = open_engine(f"sqlite:///{tmp_path}/burstgate.db")
    upgrade(engine)

    def breathe() -> None:
        calls.append(recorder.is_pressed)

    recorder = Recorder(tmp_path / "journal", lambda: open_sink(engine, breathe), breathe=breathe)
    writer = JournalWriter(tmp_path / "journal", "w", gateway="g")
    for number in range(8000):
        name = f"{number:08x}-0000-7000-8000-000000000000"
        assert writer.begin(Begun(name, 1.7e9))
        writer.end(TraceRecord(name, 1.7e9))
    moved = recorder.step()
    assert recorder.is_pressed
    assert calls[0] is False
    assert calls[-1] is True, "it knows once it has read, and what it has read is committed without pauses"
    assert 1000 <= moved < 8000
    while recorder.step():
        pass
    assert not recorder.is_pressed
    recorder.stop()
    assert recorder.is_pressed
    writer.close()
    recorder.close()
