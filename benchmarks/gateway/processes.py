"""Processes of the benchmark: pinned to cores, counted as trees from /proc, and ended by their ids.

CPU time is utime + stime of the root and all its descendants, with those of children that have already been waited
for; the kernel counts it exactly and shows it in ticks of 10 ms. Memory is VmRSS, summed over the tree: pages that
processes share count in each.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
QUIET_WINDOW_S = 0.5
QUIET_CPU_S = 0.02
"""A tree that uses no more than this in a window has done its work: what it put off, such as recording, is over."""
QUIET_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 40.0


class BenchError(Exception):
    """The benchmark can not go on: one line that says why."""


@dataclass(frozen=True, slots=True)
class Stat:
    """One line of /proc/PID/stat. started tells a process from a later one with its id."""

    pid: int
    parent: int
    started: int
    cpu_s: float


def read_stat(pid: int) -> Stat | None:
    """None when there is no such process, or only its zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    if fields[0] in "ZX":
        return None
    return Stat(pid, int(fields[1]), int(fields[19]), sum(map(int, fields[11:15])) * TICK_S)


def tree(root: int) -> list[Stat]:
    """A process and its descendants; the root first."""
    stats = [stat for name in os.listdir("/proc") if name.isdigit() and (stat := read_stat(int(name)))]
    children: dict[int, list[Stat]] = {}
    for stat in stats:
        children.setdefault(stat.parent, []).append(stat)
    found = [stat for stat in stats if stat.pid == root]
    for stat in found:
        found.extend(children.get(stat.pid, ()))
    return found


def resident_bytes(pid: int) -> int:
    """VmRSS; 0 for a process that is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def machine_cpu_s() -> float:
    """CPU seconds that all cores have been busy so far, and those that a hypervisor gave to others."""
    with open("/proc/stat", encoding="ascii") as stream:
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stream.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) * TICK_S


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback address that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


@dataclass(frozen=True, slots=True)
class Cores:
    """Who runs where, as lists for taskset."""

    gateway: str
    load: str
    two: str
    """For a gateway of two workers."""
    load_of_two: str
    shares_two: bool
    """Its load has no core of its own."""


def choose_cores() -> Cores:
    """The last core for the gateway, the others for the load. Raises BenchError on a machine with one core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise BenchError(f"the gateway and its load need a core each; this process may use {len(cores)}")
    rest = cores[:-2] if len(cores) > 2 else cores

    def listed(some: Sequence[int]) -> str:
        return ",".join(map(str, some))

    return Cores(str(cores[-1]), listed(cores[:-1]), listed(cores[-2:]), listed(rest), len(cores) == 2)


def pinned(cores: str, argv: Sequence[str]) -> list[str]:
    """The command on these cores; it ends when this process dies, however that comes."""
    guard = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
    return [*guard, "taskset", "-c", cores, *argv]


class Running:
    """A started process with its descendants."""

    def __init__(self, name: str, argv: Sequence[str], *, log: Path, env: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env={**os.environ, **env}, cwd=folder
            )

    @property
    def pid(self) -> int:
        """Of the root."""
        return self._process.pid

    def status(self) -> int | None:
        """What it ended with; None while it runs."""
        return self._process.poll()

    def cpu_s(self) -> float:
        """CPU seconds of the tree so far. Raises BenchError when it has ended."""
        if self._process.poll() is not None:
            raise BenchError(f"{self.name} ended with status {self._process.returncode}; its output is in {self.log}")
        return sum(stat.cpu_s for stat in tree(self._process.pid))

    def resident_bytes(self) -> int:
        """Resident memory of the tree."""
        return sum(resident_bytes(stat.pid) for stat in tree(self._process.pid))

    def wait_until_quiet(self) -> float:
        """Wait until what was put off is done; returns the CPU seconds of the tree then."""
        deadline_s = time.monotonic() + QUIET_TIMEOUT_S
        before_s = self.cpu_s()
        while True:
            time.sleep(QUIET_WINDOW_S)
            now_s = self.cpu_s()
            if now_s - before_s <= QUIET_CPU_S + TICK_S / 2 or time.monotonic() > deadline_s:
                return now_s
            before_s = now_s

    def wait_until_ready(self, probe: Any, timeout_s: float) -> None:
        """Until `probe()` returns without OSError. Raises BenchError."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self.cpu_s()
            try:
                probe()
            except (OSError, ValueError) as error:
                if time.monotonic() > deadline_s:
                    raise BenchError(
                        f"{self.name} did not answer within {timeout_s:g} s ({error}); see {self.log}"
                    ) from None
                time.sleep(0.1)
            else:
                return

    def stop(self) -> None:
        """SIGTERM to the root, and SIGKILL to whatever of its tree is left after that."""
        family = tree(self._process.pid)
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stat in family:
            left = read_stat(stat.pid)
            if left is not None and left.started == stat.started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stat.pid, signal.SIGKILL)


@contextlib.contextmanager
def running(
    name: str, argv: Sequence[str], *, cores: str, folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """A process for the length of a with block. Its output goes to FOLDER/NAME.log."""
    process = Running(name, pinned(cores, argv), log=folder / f"{name}.log", env=env or {}, folder=folder)
    try:
        yield process
    finally:
        process.stop()


def get_json(url: str, body: bytes | None = None, timeout_s: float = 10.0) -> Any:
    """GET, or POST of a JSON body. Raises OSError, ValueError."""
    request = urllib.request.Request(
        url, body, {"content-type": "application/json", "authorization": "Bearer sk-bench"}
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        return json.load(response)
