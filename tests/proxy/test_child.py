"""A supervised process's standard input: the task, then new settings, then the end."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from proxy.child import ChildTask, encode_settings, encode_task
from proxy.settings import Settings, TimeoutSettings

PROGRAM = """
import threading
from proxy.child import ChildTask, run_child, watch_parent

def main(task: ChildTask) -> None:
    print(task.settings.timeouts.drain_s, task.socket_fds, flush=True)
    ended = threading.Event()
    watch_parent(ended.set, lambda settings: print(settings.timeouts.drain_s, flush=True))
    ended.wait(30)
    print("end")

run_child("test", main)
"""


def settings(drain_s: float) -> Settings:
    return Settings(timeouts=TimeoutSettings(drain_s=drain_s))


def run(pieces: list[bytes]) -> tuple[int, str, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdin is not None
    for piece in pieces[:-1]:
        process.stdin.write(piece)
        time.sleep(0.05)
    out, err = process.communicate(pieces[-1], timeout=60)
    return process.returncode, out.decode(), err.decode()


TASK = encode_task(ChildTask(settings(1), 5, -1, (6, 7)))
LINES = encode_settings(settings(2)) + encode_settings(settings(3))


@pytest.mark.parametrize(
    "pieces",
    [
        [TASK + LINES],  # all before it has started
        [TASK, LINES],
        [TASK[:100], TASK[100:] + LINES[:100], LINES[100:]],
        [TASK, *(LINES[at : at + 300] for at in range(0, len(LINES), 300))],
    ],
)
def test_task_and_new_settings_arrive_however_they_are_cut(pieces: list[bytes]) -> None:
    assert run(pieces) == (0, "1.0 (5, 6, 7)\n2.0\n3.0\nend\n", "")


def test_settings_of_another_version_are_one_line_and_the_old_ones_stay() -> None:
    status, out, err = run([TASK, b'{"settings": {"newer": 1}}\n{\n' + encode_settings(settings(2))])
    assert (status, out) == (0, "1.0 (5, 6, 7)\n2.0\nend\n")
    first, second = err.splitlines()
    assert first.endswith("ERROR new settings can not be used, the old ones stay: settings: newer: "
                          "Extra inputs are not permitted, got 1")  # fmt: skip
    assert "the old ones stay: " in second


def test_task_of_another_version_is_one_line_and_status_1() -> None:
    status, out, err = run([b'{"settings": {"newer": 1}, "socket_fd": -1, "ready_fd": -1, "more_socket_fds": []}\n'])
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.endswith("CRITICAL settings: newer: Extra inputs are not permitted, got 1\n")


@pytest.mark.parametrize(("task", "fds"), [(ChildTask(settings(1), -1, -1), ()), (ChildTask(settings(1), 4, -1), (4,))])
def test_process_without_and_with_one_socket(task: ChildTask, fds: tuple[int, ...]) -> None:
    assert task.socket_fds == fds
