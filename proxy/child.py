"""How a supervised process learns what to do, says that it is ready, and notices that its supervisor is gone."""

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

from proxy.settings import ConfigError, Settings


@dataclass(frozen=True, slots=True)
class ChildTask:
    """What a process is started with."""

    settings: Settings
    socket_fd: int
    """The listening socket it inherits; -1 for a process without one."""
    ready_fd: int
    """A pipe on which it says that it is ready; -1 when nobody waits."""

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
    }
    return json.dumps(fields).encode() + b"\n"


def configure_logging(name: str) -> None:
    """One line an event on standard error: time, process, level, text."""
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s burstgate {name}[%(process)d] %(levelname)s %(message)s"
    )
    # It reports every answer that a vanished upstream or client left unfinished; those are records, not errors.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def read_task(name: str) -> ChildTask:
    """The process's task, from standard input. Ctrl-C is the supervisor's business and is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(name)
    fields = json.loads(sys.stdin.buffer.readline())
    return ChildTask(Settings.model_validate(fields["settings"]), fields["socket_fd"], fields["ready_fd"])


def run_child(name: str, main: Callable[[ChildTask], None]) -> None:
    """A supervised process's life. What keeps it from its work is one line on standard error and exit status 1."""
    task = read_task(name)
    try:
        main(task)
    except (ConfigError, OSError) as error:
        logging.getLogger("burstgate").critical("%s", error)
        sys.exit(1)


def watch_parent(stop: Callable[[], None]) -> None:
    """Call `stop` when standard input ends."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        stop()

    threading.Thread(target=wait, daemon=True, name="watch-parent").start()
