"""The scheduler's treatment of the thread that sends. Each case has a process of its own: it is a process's state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_FIFO"), reason="sched(7): Linux only")


def may_be_real_time() -> bool:
    program = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def said(program: str) -> list[str]:
    program = f"import os, time, threading\nfrom replay.priority import Priority\n{program}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


POLICY = "print(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)"


def test_it_ends_with_the_run_and_keeps_to_its_thread() -> None:
    program = (
        f"before = os.getpriority(os.PRIO_PROCESS, 0)\npriority = Priority()\npriority.look()\n{POLICY}\n"
        f"thread = threading.Thread(target=lambda: {POLICY}); thread.start(); thread.join()\n"
        f"priority.close()\n{POLICY}\nprint(os.getpriority(os.PRIO_PROCESS, 0) == before)"
    )
    own = os.SCHED_FIFO if may_be_real_time() else os.SCHED_OTHER
    assert said(program) == [str(own), str(os.SCHED_OTHER), str(os.SCHED_OTHER), "True"]


def test_one_that_was_chosen_stays() -> None:
    program = (
        "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))\n"
        f"priority = Priority()\n{POLICY}\npriority.close()\n{POLICY}"
    )
    assert said(program) == [str(os.SCHED_BATCH)] * 2


def test_real_time_is_given_up_by_a_thread_that_takes_too_much() -> None:
    if not may_be_real_time():
        pytest.skip("sched(7): this user may not ask for real time")
    program = (
        "import replay.priority as module; module.LOOK_NS = 50_000_000\npriority = Priority()\n"
        f"time.sleep(0.1); priority.look(); {POLICY}\n"
        f"end = time.monotonic() + 0.3\nwhile time.monotonic() < end: pass\npriority.look(); {POLICY}\n"
        f"time.sleep(0.1); priority.look(); {POLICY}"
    )
    assert said(program) == [str(os.SCHED_FIFO), str(os.SCHED_OTHER), str(os.SCHED_OTHER)]
