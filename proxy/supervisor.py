"""`burstgate serve`: starts the workers, the recorder and the control plane, and keeps them running.

The supervisor owns the listening sockets, one a worker (SO_REUSEPORT), so that a connection that arrives while a worker
is being replaced waits in its queue and is not refused. A process that dies is started again, after a pause that grows
with quick deaths. SIGTERM and SIGINT stop the workers first (they finish what is in flight, up to `timeouts.drain_s`),
then the recorder (it empties the journal), then the control plane.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

from proxy.child import ChildTask, encode_task
from proxy.settings import ConfigError, Settings

READY_TIMEOUT_S = 30.0
QUICK_DEATH_S = 5.0
MAX_PAUSE_S = 5.0


def listen(host: str, port: int, *, shares: int, setting: str) -> list[socket.socket]:
    """`shares` listening sockets on one address. Raises ConfigError when it is taken or not ours."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"{setting}: {host}: {error.strerror}") from None
    except UnicodeError:  # a label too long for a name
        raise ConfigError(f"{setting}: {host!r}: not a host name") from None
    sockets: list[socket.socket] = []
    try:
        # A first bind without SO_REUSEPORT: with it, another gateway's port would be shared without a word.
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            address = probe.getsockname()
        for _ in range(shares):
            sock = socket.socket(family, kind, proto)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shares > 1:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
            sock.listen(4096)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise ConfigError(f"{setting}: can not listen on {host}:{port}: {error.strerror}") from None
    return sockets


@dataclass(slots=True)
class Child:
    """One supervised process."""

    name: str
    module: str
    settings: Settings
    sock: socket.socket | None = None
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    quick_deaths: int = 0
    restart_at_s: float = 0.0
    ready_fd: int = field(default=-1)

    def start(self) -> None:
        """Start the process; it says on `ready_fd` when it is ready."""
        self.ready_fd, write_fd = os.pipe()
        socket_fd = self.sock.fileno() if self.sock is not None else -1
        inherited = [fd for fd in (socket_fd, write_fd) if fd >= 0]
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module], stdin=subprocess.PIPE, pass_fds=inherited, start_new_session=True
        )
        os.close(write_fd)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(encode_task(ChildTask(self.settings, socket_fd, write_fd)))
            self.process.stdin.flush()
        self.started_s = time.monotonic()

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether it became ready in time."""
        readable, _, _ = select.select([self.ready_fd], [], [], timeout_s)
        is_ready = bool(readable) and os.read(self.ready_fd, 1) == b"r"
        os.close(self.ready_fd)
        self.ready_fd = -1
        return is_ready

    @property
    def is_running(self) -> bool:
        """The process lives."""
        return self.process is not None and self.process.poll() is None

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, and SIGKILL when that does not help in time."""
        process = self.process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


class Supervisor:
    """All processes of one installation."""

    def __init__(self, settings: Settings, *, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._is_stopping = False
        self._sockets: list[socket.socket] = []
        self._workers: list[Child] = []
        self._recorder = Child("recorder", "proxy.record", settings)
        self._control: Child | None = None

    def start(self) -> tuple[str, str]:
        """Start everything; returns the URLs of the gateway and the control plane.

        Raises ConfigError when an address is taken or a process does not come up.
        """
        settings = self._settings
        gateways = listen(settings.host, settings.port, shares=settings.workers, setting="port")
        self._sockets += gateways
        try:
            control = listen(settings.control_host, settings.control_port, shares=1, setting="control_port")
        except ConfigError:
            self.stop()
            raise
        self._sockets += control
        self._workers = [Child(f"worker {index}", "proxy.app", settings, sock) for index, sock in enumerate(gateways)]
        self._control = Child("control plane", "proxy.control", settings, control[0])
        for child in self._children():
            child.start()
        for child in self._children():
            if not child.wait_ready(READY_TIMEOUT_S):
                self.stop()
                raise ConfigError(f"the {child.name} did not start; its reason is above")
        return _url(gateways[0]), _url(control[0])

    def _children(self) -> list[Child]:
        return [self._recorder, *([self._control] if self._control is not None else []), *self._workers]

    def run(self) -> None:
        """Keep everything running until SIGTERM or SIGINT."""

        def stop(signum: int, frame: FrameType | None) -> None:
            self._is_stopping = True

        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, stop)
        while not self._is_stopping:
            for child in self._children():
                self._keep_running(child)
            time.sleep(0.05)
        self.stop()

    def _keep_running(self, child: Child) -> None:
        if child.is_running:
            return
        now_s = time.monotonic()
        if child.process is not None:
            code = child.process.returncode
            if child.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    child.process.stdin.close()
            child.process = None
            child.quick_deaths = child.quick_deaths + 1 if now_s - child.started_s < QUICK_DEATH_S else 0
            pause_s = min(MAX_PAUSE_S, 0.1 * (2**child.quick_deaths - 1))
            child.restart_at_s = now_s + pause_s
            self._say(f"the {child.name} ended with status {code}; starting it again")
        if now_s >= child.restart_at_s:
            child.start()
            os.close(child.ready_fd)

    def stop(self) -> None:
        """Stop everything, the data plane first."""
        for sock in self._sockets:
            sock.close()
        drain_s = self._settings.timeouts.drain_s
        for worker in self._workers:
            if worker.is_running and worker.process is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.stop(drain_s + 5)
        self._recorder.stop(30.0)
        if self._control is not None:
            self._control.stop(5.0)


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
