"""How a supervised process learns what to do, says that it is ready, and notices that its supervisor is gone.

Its standard input is a pipe from the supervisor with one JSON object a line: the task first, then, at any time, new
settings (`{"settings": ...}`). The end of the pipe is the end of the supervisor.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from proxy.config_error import ConfigError
from proxy.logs import configure_logging
from proxy.settings import Settings, validate

log = logging.getLogger("burstgate")


@dataclass(frozen=True, slots=True)
class ChildTask:
    """What a process is started with."""

    settings: Settings
    socket_fd: int
    """The listening socket it inherits; -1 for a process without one."""
    ready_fd: int
    """A pipe on which it says that it is ready; -1 when nobody waits."""
    more_socket_fds: tuple[int, ...] = ()
    """Further listening sockets of the same address, when there are more sockets than workers."""
    gateway_url: str = ""
    """Of a control plane: where the workers listen."""

    @property
    def socket_fds(self) -> tuple[int, ...]:
        """All listening sockets that it inherits."""
        return (self.socket_fd, *self.more_socket_fds) if self.socket_fd >= 0 else ()

    def tell_ready(self) -> None:
        """Say that the process does its work now."""
        if self.ready_fd >= 0:
            with contextlib.suppress(BrokenPipeError):  # nobody waits for one that is started again
                os.write(self.ready_fd, b"r")
            os.close(self.ready_fd)

    def tell_ready_when(self, is_ready: Callable[[], bool]) -> None:
        """Say so once it is true, without holding up anybody."""

        def wait() -> None:
            while not is_ready():
                time.sleep(0.01)
            self.tell_ready()

        threading.Thread(target=wait, daemon=True).start()


def encode_task(task: ChildTask) -> bytes:
    """The line that `read_task` reads."""
    fields = {
        "settings": json.loads(task.settings.model_dump_json()),
        "socket_fd": task.socket_fd,
        "ready_fd": task.ready_fd,
        "more_socket_fds": task.more_socket_fds,
        "gateway_url": task.gateway_url,
    }
    return json.dumps(fields).encode() + b"\n"


def encode_settings(settings: Settings) -> bytes:
    """The line that gives a running process new settings."""
    return b'{"settings":%b}\n' % settings.model_dump_json().encode()


def read_task(name: str) -> ChildTask:
    """The process's task, from standard input. Raises ConfigError.

    Ctrl-C, and what `systemctl kill` sends to every process of a service, is the supervisor's business and is ignored.
    """
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    configure_logging(name)
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"\n", b""):  # what lies behind the line is for `watch_parent`
        line += byte
    fields = json.loads(line)
    settings = validate(fields["settings"], {})
    configure_logging(name, settings.log)
    return ChildTask(
        settings,
        fields["socket_fd"],
        fields["ready_fd"],
        tuple(fields["more_socket_fds"]),
        fields["gateway_url"],
    )


def run_child(name: str, main: Callable[[ChildTask], None]) -> None:
    """A supervised process's life. What keeps it from its work is one line on standard error and exit status 1."""
    try:
        main(read_task(name))
    except (ConfigError, OSError) as error:
        log.critical("%s", error)
        sys.exit(1)


def watch_parent(stop: Callable[[], None], reload: Callable[[Settings], None] | None = None) -> None:
    """Call `stop` when standard input ends, and `reload` with each new settings that come; both from a thread."""

    def wait() -> None:
        rest = b""
        while data := os.read(0, 65536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if reload is not None:
                    _take_settings(line, reload)
        stop()

    threading.Thread(target=wait, daemon=True, name="watch-parent").start()


def _take_settings(line: bytes, reload: Callable[[Settings], None]) -> None:
    try:
        reload(validate(json.loads(line)["settings"], {}))
    except (ValueError, OSError) as error:  # a supervisor of a later version may say what this process does not know
        log.error("new settings can not be used, the old ones stay: %s", error)
