"""What one program leaves to the next, through a real execve(2)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy.config_error import ConfigError
from proxy.handover import VARIABLE, Handover, LeftProcess, Preflight, execute, take_handover
from proxy.settings import Settings
from proxy.supervisor import settings_after

_NOBODY = LeftProcess("nobody")


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def left(sock: socket.socket, **changed: Any) -> Handover:
    fields: dict[str, Any] = {
        "settings": {},
        "gateways": (sock.fileno(),),
        "control": sock.fileno(),
        "workers": (),
        "recorder": _NOBODY,
        "control_plane": _NOBODY,
    }
    return Handover(**(fields | changed))


def given(handover: Handover | bytes, tmp_path: Path) -> dict[str, str]:
    """An environment as `execute` makes it."""
    path = tmp_path / "state"
    path.write_bytes(handover if isinstance(handover, bytes) else msgspec.json.encode(handover))
    return {VARIABLE: f"{os.getpid()}:{os.open(path, os.O_RDONLY)}"}


def test_next_program_of_the_same_process_has_sockets_children_and_settings() -> None:
    program = """
import os, signal, socket, subprocess, sys
from proxy.handover import Handover, LeftProcess, execute, take_handover
from proxy.process import AdoptedProcess
handover = take_handover()
if handover is None:
    sock = socket.create_server(("127.0.0.1", 0))
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    cat = LeftProcess("cat", child.pid, child.stdin.fileno(), (0,), 12.5)
    nobody = LeftProcess("nobody")
    print(os.getpid(), sock.getsockname()[1], child.pid, flush=True)
    execute(Handover({"a": "hidden"}, (sock.fileno(),), sock.fileno(), (cat,), nobody, nobody),
            [sys.executable, *sys.orig_argv[1:]])
assert "hidden" not in open("/proc/self/environ").read()
(cat,) = handover.workers
assert not any(map(os.get_inheritable, (*handover.gateways, cat.stdin_fd)))
process = AdoptedProcess(cat.pid)
assert process.poll() is None
os.write(cat.stdin_fd, b"lives\\n")
os.close(cat.stdin_fd)
while process.poll() is None:
    pass
process.send_signal(signal.SIGKILL)
print(os.getpid(), socket.socket(fileno=handover.control).getsockname()[1], cat.pid, process.poll(), handover.settings,
      cat.kill_at_s, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    before, lives, after = done.stdout.splitlines()
    assert lives == "lives"
    assert after == f"{before} 0 {{'a': 'hidden'}} 12.5"


def test_program_that_can_not_be_executed_leaves_everything_as_it_was(listening: socket.socket) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        execute(left(listening), ["/nowhere/python"])
    assert set(os.listdir("/proc/self/fd")) == before
    assert not os.get_inheritable(listening.fileno())
    assert VARIABLE not in os.environ


@pytest.mark.parametrize("environment", [{}, {VARIABLE: "1:3"}, {VARIABLE: f"{os.getppid()}:3"}, {VARIABLE: ""}])
def test_nothing_is_taken_that_is_not_meant_for_this_process(environment: dict[str, str]) -> None:
    assert take_handover(environment) is None
    assert environment == {}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda sock: b"{", "Input data was truncated"),
        (lambda sock: b"{}", "Object missing required field `settings`"),
        (lambda sock: left(sock, control=99), "[Errno 9] Bad file descriptor"),
        (lambda sock: left(sock, workers=(LeftProcess("w", os.getpid(), 0),)), "descriptor 0 is no pipe"),
        (lambda sock: left(sock, workers=(LeftProcess("w", sockets=(1,)),)), "the w listens on (1,) of 1 sockets"),
    ],
)  # fmt: skip
def test_what_is_not_as_it_must_be_is_refused(
    wrong: Callable[[socket.socket], Handover | bytes], reason: str, listening: socket.socket, tmp_path: Path
) -> None:
    environment = given(wrong(listening), tmp_path)
    text = environment[VARIABLE]
    with pytest.raises(ConfigError) as caught:
        take_handover(environment)
    assert str(caught.value) == f"{VARIABLE}: {text!r}: {reason}"
    assert environment == {}
    assert os.get_inheritable(0)  # descriptors that turn out to be somebody else's stay as they are


def test_process_that_is_no_child_and_socket_that_does_not_listen(listening: socket.socket, tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    try:
        stranger = left(listening, recorder=LeftProcess("recorder", os.getppid(), write_fd))
        with pytest.raises(ConfigError, match="No child processes"):
            take_handover(given(stranger, tmp_path))
        with socket.socket() as deaf, pytest.raises(ConfigError, match=r"descriptor \d+ does not listen$"):
            take_handover(given(left(listening, gateways=(deaf.fileno(),)), tmp_path))
    finally:
        os.close(read_fd)
        os.close(write_fd)


def test_later_versions_may_add_fields(listening: socket.socket, tmp_path: Path) -> None:
    fields = msgspec.to_builtins(left(listening)) | {"new": 1}
    assert take_handover(given(msgspec.json.encode(fields), tmp_path)) == left(listening)


@pytest.mark.parametrize(
    ("program", "deadline_s", "went_well"),
    [
        ("import sys; sys.exit(0 if sys.argv[1:] == ['--check'] else 3)", 1e12, True),
        ("raise SystemExit(2)", 1e12, False),
        ("import time; time.sleep(60)", 0.0, False),  # too late at once
    ],
)
def test_trial_run(program: str, deadline_s: float, went_well: bool) -> None:
    trial = Preflight([sys.executable, "-c", program], deadline_s)
    while (result := trial.result(1.0)) is None:
        pass
    assert result is went_well


def test_settings_after_a_restart_are_the_configured_ones_but_for_what_needs_a_start(listening: socket.socket) -> None:
    old = Settings(upstreams=("http://a",), port=0, data_dir=Path("/old"), gateway="one", workers=2)  # type: ignore[arg-type,unused-ignore]
    new = Settings(upstreams=("http://b",), port=1, data_dir=Path("/new"), gateway="two", workers=3)  # type: ignore[arg-type,unused-ignore]
    running = old.model_dump(mode="json") | {"setting of another version": 1}
    said: list[str] = []
    after = settings_after(left(listening, settings=running), lambda: new, said.append)
    assert after == new.model_copy(update={"port": 0, "data_dir": Path("/old")})
    assert said == ["port: 0 -> 1 needs a stop and a start", "data_dir: /old -> /new needs a stop and a start"]

    def fail() -> Settings:
        raise ConfigError("x.yaml: wrong")

    said.clear()
    running = old.model_dump(mode="json")
    assert settings_after(left(listening, settings=running), fail, said.append) == old
    assert said == ["the configuration stays as it is: x.yaml: wrong"]
