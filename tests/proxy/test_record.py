"""How the recorder shares a core with the workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proxy.record import NICENESS, SLICE_NS

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
