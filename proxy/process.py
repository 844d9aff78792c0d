"""One process that the supervisor runs: starting, telling, ending, and passing it on to a next supervisor."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from proxy.child import ChildTask, encode_settings, encode_task
from proxy.handover import LeftProcess
from proxy.settings import Settings

TASK_TIMEOUT_S = 10.0
TELL_TIMEOUT_S = 1.0
"""How long a process may leave its standard input full: at its start, and later."""


class Process(Protocol):
    """What is used of a child process."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """Its exit status; None while it lives."""
        ...

    def send_signal(self, signum: int, /) -> None:
        """Nothing when it has ended."""
        ...


class AdoptedProcess:
    """A child that the program before this one has started: `subprocess.Popen` can not be made for it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it lives."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Nothing when it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)


@dataclass(slots=True)
class Child:
    """One supervised process: what it is, and the one that runs as it now."""

    name: str
    module: str
    settings: Settings
    """What the process has been told; what the next one will be."""
    sockets: tuple[socket.socket, ...] = ()
    gateway_url: str = ""
    process: Process | None = None
    stdin_fd: int = -1
    ready_fd: int = -1
    is_ready: bool = False
    started_s: float = 0.0
    quick_deaths: int = 0
    restart_at_s: float = 0.0
    kill_at_s: float | None = None
    """Until when the process may live; None when nobody asked it to end."""

    def start(self) -> None:
        """Start the process; it says on `ready_fd` when it is ready. Raises OSError."""
        fds = [sock.fileno() for sock in self.sockets] or [-1]
        self.ready_fd, write_fd = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE,
                bufsize=0,
                pass_fds=[fd for fd in (*fds, write_fd) if fd >= 0],
                start_new_session=True,
            )
        except OSError:
            self._close()
            raise
        finally:
            os.close(write_fd)
        assert process.stdin is not None
        self.process = process
        self.stdin_fd = os.dup(process.stdin.fileno())
        process.stdin.close()
        self.started_s = time.monotonic()
        self.is_ready = False
        self.kill_at_s = None
        task = ChildTask(self.settings, fds[0], write_fd, tuple(fds[1:]), self.gateway_url)
        if not self._write(encode_task(task), TASK_TIMEOUT_S):
            process.kill()  # half a task is none

    def look(self) -> None:
        """Take note when it has become ready."""
        if self.ready_fd >= 0 and select.select([self.ready_fd], [], [], 0)[0]:
            self.is_ready = os.read(self.ready_fd, 1) == b"r"
            os.close(self.ready_fd)
            self.ready_fd = -1

    @property
    def is_running(self) -> bool:
        """The process lives."""
        return self.process is not None and self.process.poll() is None

    def tell(self, settings: Settings) -> bool:
        """Give it new settings; False when it does not read them."""
        self.settings = settings
        return self._write(encode_settings(settings), TELL_TIMEOUT_S)

    def _write(self, data: bytes, timeout_s: float) -> bool:
        os.set_blocking(self.stdin_fd, False)
        deadline_s = time.monotonic() + timeout_s
        while data:
            try:
                data = data[os.write(self.stdin_fd, data) :]
            except BlockingIOError:
                if not select.select([], [self.stdin_fd], [], max(0.0, deadline_s - time.monotonic()))[1]:
                    return False
            except BrokenPipeError:  # it has died, which is seen elsewhere
                break
        return True

    def ask_to_end(self, timeout_s: float, signum: signal.Signals = signal.SIGTERM) -> None:
        """Send it a signal; `kill_if_late` kills it after `timeout_s`."""
        self.kill_at_s = time.monotonic() + timeout_s
        if self.process is not None:
            self.process.send_signal(signum)

    def kill_if_late(self) -> None:
        """SIGKILL when it has had its time."""
        if self.process is not None and self.kill_at_s is not None and time.monotonic() >= self.kill_at_s:
            self.process.send_signal(signal.SIGKILL)

    def reap(self) -> int | None:
        """Forget the process that has ended; its status, None when there was none."""
        status = None if self.process is None else self.process.returncode
        self.process = None
        self.kill_at_s = None
        self.is_ready = False
        self._close()
        return status

    def _close(self) -> None:
        for fd in (self.stdin_fd, self.ready_fd):
            if fd >= 0:
                os.close(fd)
        self.stdin_fd = self.ready_fd = -1

    def leave(self, gateways: Sequence[socket.socket] = ()) -> LeftProcess:
        """What a handover says of it."""
        places = tuple(gateways.index(sock) for sock in self.sockets if sock in gateways)
        pid = self.process.pid if self.process is not None else 0
        return LeftProcess(self.name, pid, self.stdin_fd, places, self.kill_at_s)

    def adopt(self, left: LeftProcess) -> None:
        """The other side of `leave`."""
        if left.pid:
            self.process = AdoptedProcess(left.pid)
            self.stdin_fd = left.stdin_fd
            self.kill_at_s = left.kill_at_s
            self.started_s = time.monotonic()
            self.is_ready = True
