"""What a supervisor leaves to the program that takes its place: listening sockets and living processes.

A zero-downtime restart is one execve(2): the process keeps its id, its children and, of its descriptors, those named
here; all else is new code. What is left lies as JSON in a file without a name, and `_BURSTGATE_HANDOVER=PID:FD` in the
environment says which descriptor it is and for which process it is meant. (A file, and not the variable itself: the
settings may hold a password, and an environment can be read in /proc.) A later version must be able to read it: fields
may be added, none may change.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping, Sequence
from typing import Any

import msgspec

from proxy.config_error import ConfigError

VARIABLE = "_BURSTGATE_HANDOVER"


class LeftProcess(msgspec.Struct, frozen=True):
    """One child."""

    name: str
    pid: int = 0
    """0: it has just died, and is to be started again."""
    stdin_fd: int = -1
    sockets: tuple[int, ...] = ()
    """What it listens on: places in `gateways`."""
    kill_at_s: float | None = None
    """Monotonic time until which it may live, if it has been asked to end."""


class Handover(msgspec.Struct, frozen=True):
    """All that is left."""

    settings: dict[str, Any]
    """The running ones, as they go to a child."""
    gateways: tuple[int, ...]
    """Listening sockets of the gateway."""
    control: int
    workers: tuple[LeftProcess, ...]
    recorder: LeftProcess
    control_plane: LeftProcess
    leaving: tuple[LeftProcess, ...] = ()
    """Processes of earlier restarts that finish what they have."""

    @property
    def living(self) -> tuple[LeftProcess, ...]:
        """Every child that there is."""
        every = (*self.workers, self.recorder, self.control_plane, *self.leaving)
        return tuple(process for process in every if process.pid)


def command_line() -> list[str]:
    """What this process was started with, to start it again."""
    return [sys.executable, *sys.orig_argv[1:]]


def execute(handover: Handover, command: list[str]) -> None:
    """Become `command`, which takes the handover. Returns only by raising OSError."""
    descriptors = [*handover.gateways, handover.control, *(process.stdin_fd for process in handover.living)]
    with tempfile.TemporaryFile() as file:
        file.write(msgspec.json.encode(handover))
        file.seek(0)
        descriptors.append(file.fileno())
        try:
            for descriptor in descriptors:
                os.set_inheritable(descriptor, True)
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os.execve(command[0], command, {**os.environ, VARIABLE: f"{os.getpid()}:{file.fileno()}"})
        finally:
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)


def take_handover(environment: MutableMapping[str, str] = os.environ) -> Handover | None:
    """What the program before this one has left; None when there was none.

    The variable is taken out of the environment. Raises ConfigError when what it names is not as it must be.
    """
    text = environment.pop(VARIABLE, None)
    if text is None:
        return None
    pid, _, descriptor = text.partition(":")
    if pid != str(os.getpid()):  # meant for a parent of ours
        return None
    try:
        with os.fdopen(int(descriptor), "rb") as file:
            handover = msgspec.json.decode(file.read(), type=Handover)
        _check(handover)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{VARIABLE}: {text!r}: {error}") from None
    return handover


def _check(handover: Handover) -> None:
    """Descriptors are what they are said to be, and close on the next exec; processes are ours. Raises ValueError."""
    for descriptor in (*handover.gateways, handover.control):
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise ValueError(f"descriptor {descriptor} does not listen")
    for process in handover.living:
        if not stat.S_ISFIFO(os.fstat(process.stdin_fd).st_mode):
            raise ValueError(f"descriptor {process.stdin_fd} is no pipe")
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # raises for what is no child of ours
    for process in handover.workers:
        if any(not 0 <= place < len(handover.gateways) for place in process.sockets):
            raise ValueError(f"the {process.name} listens on {process.sockets} of {len(handover.gateways)} sockets")
    # Last: what is refused is not ours to change.
    for descriptor in (*handover.gateways, handover.control, *(process.stdin_fd for process in handover.living)):
        os.set_inheritable(descriptor, False)


class Preflight:
    """A trial run of the command that is to take over: does its code load, does its configuration?"""

    TIMEOUT_S = 60.0

    def __init__(self, command: Sequence[str], deadline_s: float) -> None:
        """Raises OSError."""
        self._deadline_s = deadline_s
        # What is wrong goes to standard error, as from any start.
        self._process = subprocess.Popen(
            [*command, "--check"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def result(self, now_s: float) -> bool | None:
        """Whether it went well; None while it runs."""
        if self._process.poll() is None and now_s >= self._deadline_s:
            self.cancel()
        return None if self._process.poll() is None else self._process.returncode == 0

    def cancel(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
