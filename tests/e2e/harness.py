"""Real processes for the end-to-end tests: an installation of burstgate, a simulated vLLM, a scripted upstream, a tap.

Rules: every process is started with a mark of its own in its environment, which its children inherit, and whatever
carries that mark is killed by pid when the context ends, however it ends; servers take free ports on 127.0.0.1; nothing
is read from this process's `BURSTGATE_...` environment but what the caller passes on.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import httpx
import msgspec

from proxy.doctor import Check
from replay.simulator.metrics import Stats
from storage.engine import open_engine
from storage.errors import DatabaseUnavailable
from storage.query import Filter, read_batches
from traces.batch import records_from_batch
from traces.record import TraceRecord

MODEL = "tiny"
"""What the real vLLM of the tests serves."""
BURSTGATE = str(Path(sys.executable).with_name("burstgate"))
"""The console script of the environment that runs the tests."""
MARK = "E2E_MARK"
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 75.0
"""The gateway's own limits on a stop: 35 s for the workers, 30 s for the recorder, 5 s for the control plane."""

Part = Literal["worker", "recorder", "control"]
_MODULES: dict[Part, str] = {"worker": "proxy.app", "recorder": "proxy.record", "control": "proxy.control"}


def wait_until(is_true: Callable[[], bool], timeout_s: float, what: str, poll_s: float = 0.05) -> None:
    """Return as soon as `is_true()`. Raises AssertionError naming `what` after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(poll_s)


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without burstgate's settings, and `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BURSTGATE_")}
    return {**kept, **(extra or {})}


def burstgate(
    *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout_s: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run one `burstgate` command to its end; its status is the caller's to judge."""
    return subprocess.run(
        [BURSTGATE, *map(str, arguments)],
        env=clean_environment(env),
        cwd=cwd,
        timeout=timeout_s,
        capture_output=True,
        text=True,
        check=False,
    )


def read_rows(database_url: str, selection: Filter | None = None) -> list[TraceRecord]:
    """The matching rows, ordered by (received_at, request_id). Raises DatabaseUnavailable."""
    engine = open_engine(database_url)
    try:
        batches = read_batches(engine, selection or Filter())
        return [record for batch in batches for record in records_from_batch(batch)]
    finally:
        engine.dispose()


class Process:
    """A subprocess whose output is read as it comes, and which is gone with all its descendants after `kill_tree`."""

    def __init__(
        self, command: Sequence[str | Path], env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self.mark = secrets.token_hex(16)
        self._popen = subprocess.Popen(
            [str(part) for part in command],
            env={**clean_environment(env), MARK: self.mark},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._is_killed = False
        self._output = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        while data := self._popen.stdout.read1(65536):  # type: ignore[attr-defined]
            self._output += data

    @property
    def pid(self) -> int:
        """The process itself; its descendants are in `pids()`."""
        return self._popen.pid

    @property
    def output(self) -> str:
        """What it has written so far to standard output and standard error."""
        return bytes(self._output).decode(errors="replace")

    @property
    def is_running(self) -> bool:
        """The process itself lives."""
        return self._popen.poll() is None

    def commands(self) -> dict[int, list[str]]:
        """Living processes of this tree, orphans included, with their command lines."""
        found: dict[int, list[str]] = {}
        for entry in () if self._is_killed else Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    if self._owns(entry):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue
        return found

    def _owns(self, entry: Path) -> bool:
        """By the mark, which a new session keeps, or by the session, which a process that renames itself keeps."""
        state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        if state == "Z":
            return False
        return int(session) == self.pid or f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes()

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """The first match in the output. Raises AssertionError with the output when it does not come."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            is_over = not self.is_running
            if is_over:
                self._reader.join(5.0)
            if found := re.search(pattern, self.output, re.MULTILINE):
                return found
            assert not is_over, f"ended with status {self._popen.returncode}:\n{self.output}"
            assert time.monotonic() < deadline_s, f"no {pattern!r} within {timeout_s:g} s:\n{self.output}"
            time.sleep(0.02)

    def terminate(self, timeout_s: float) -> int:
        """SIGTERM to the process itself; its exit status. Raises AssertionError when it is not gone in time."""
        self._popen.send_signal(signal.SIGTERM)
        try:
            status = self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running {timeout_s:g} s after SIGTERM:\n{self.output}") from None
        self._reader.join(5.0)
        return status

    def kill_tree(self) -> None:
        """SIGKILL to everything of this tree, again until nothing is left."""
        if self.is_running:
            os.kill(self.pid, signal.SIGSTOP)  # it must not replace a child between the look and the kill
        while left := self.commands():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)
        self._is_killed = True
        self._popen.wait()
        self._reader.join(5.0)
        if self._popen.stdout is not None and not self._reader.is_alive():
            self._popen.stdout.close()


class Installation:
    """`burstgate serve` with all its processes, on its own data directory and free ports.

    flags: more of `serve`'s. env: `BURSTGATE_...` settings without a flag. After `stop` or `kill_tree`, `start` starts
    it again on the same data.
    """

    def __init__(
        self,
        *upstreams: str,
        data_dir: Path,
        database_url: str | None = None,
        workers: int = 1,
        env: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        self.data_dir = data_dir
        self.database_url = database_url or f"sqlite:///{data_dir / 'burstgate.db'}"
        self.gateway_url = self.control_url = ""
        self._env = env
        self._command: list[str | Path] = [BURSTGATE, "serve", "--data-dir", data_dir, "--workers", str(workers)]
        self._command += [part for url in upstreams for part in ("--upstream", url)]
        self._command += [] if database_url is None else ["--database-url", database_url]
        self._command += ["--port", "0", "--control-port", "0", *flags]
        self._process: Process | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_tree()
        if error is not None:
            error.add_note(f"burstgate serve said:\n{self.output}")

    @property
    def process(self) -> Process:
        """The supervisor."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def output(self) -> str:
        """What all its processes have written so far."""
        return self.process.output

    def start(self) -> None:
        """Start it and wait until all its processes are ready."""
        assert self._process is None or not self._process.is_running
        self._process = Process(self._command, self._env)
        try:
            self.gateway_url = self._process.wait_for(r"^gateway +(https?://\S+) ->", READY_TIMEOUT_S)[1]
            self.control_url = self._process.wait_for(r"^control +(https?://\S+) ", READY_TIMEOUT_S)[1]
        except BaseException:
            self._process.kill_tree()
            raise

    def pids(self, part: Part) -> list[int]:
        """The living processes of one kind."""
        return sorted(pid for pid, command in self.process.commands().items() if _MODULES[part] in command)

    def pid(self, part: Part) -> int:
        """The one living process of a kind, waited for: a killed one is being replaced."""
        wait_until(lambda: len(self.pids(part)) == 1, 15.0, f"one {part} process")
        return self.pids(part)[0]

    def rows(self, selection: Filter | None = None) -> list[TraceRecord]:
        """The rows in the database, ordered by (received_at, request_id). Raises DatabaseUnavailable."""
        return read_rows(self.database_url, selection)

    def wait_rows(self, count: int, timeout_s: float = 30.0, selection: Filter | None = None) -> list[TraceRecord]:
        """The rows, as soon as there are `count` of them. Raises AssertionError when they do not come, or too many."""
        rows: list[TraceRecord] = []

        def are_there() -> bool:
            nonlocal rows
            try:
                rows = self.rows(selection)
            except DatabaseUnavailable:
                return False  # the recorder is bringing up the schema, or waits for the database itself
            return len(rows) >= count

        wait_until(are_there, timeout_s, f"{count} rows in the database", poll_s=0.1)
        assert len(rows) == count
        return rows

    def doctor(self) -> dict[str, Check]:
        """What `burstgate doctor` finds, by name."""
        done = burstgate("doctor", "--json", "--data-dir", self.data_dir, "--database-url", self.database_url)
        assert done.returncode in (0, 1), done.stderr
        return {check.name: check for check in msgspec.json.decode(done.stdout, type=list[Check])}

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> str:
        """SIGTERM, as an operator does; everything it has written. Raises AssertionError when it does not end well."""
        status = self.process.terminate(timeout_s)
        assert status == 0, f"burstgate serve ended with status {status}:\n{self.output}"
        assert self.process.commands() == {}, "processes outlive the supervisor"
        return self.output

    def kill_tree(self) -> None:
        """`kill -9` of all its processes at once."""
        if self._process is not None:
            self._process.kill_tree()


class Simulator:
    """`burstgate simulate` as a process, on a free port. flags: the simulator's own."""

    def __init__(self, *flags: str) -> None:
        self._command = [sys.executable, "-m", "replay.simulator", "--port", "0", *flags]
        self.url = ""

    def __enter__(self) -> Self:
        self._process = Process(self._command)
        try:
            self.url = self._process.wait_for(r"\b(http://\S+)$", READY_TIMEOUT_S)[1]
        except BaseException:
            self._process.kill_tree()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill_tree()

    def stats(self) -> Stats:
        """Its counters now."""
        return msgspec.json.decode(httpx.get(f"{self.url}/stats", timeout=30.0).content, type=Stats)


class _Server:
    """A TCP server on a free port, a thread for each connection."""

    def __init__(self) -> None:
        self.url = ""

    def serve(self, client: socket.socket) -> None:
        """One connection, to its end. An OSError means that the other side has left."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        serve = self.serve

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    serve(self.request)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class ScriptedUpstream(_Server):
    """A server that answers each connection's first request with the given pieces, then closes.

    pieces: bytes are sent as they are, numbers are seconds waited. `requests` holds what came, raw.
    """

    def __init__(self, *pieces: bytes | float) -> None:
        super().__init__()
        self.requests: deque[bytes] = deque()
        self._pieces = pieces

    def serve(self, client: socket.socket) -> None:
        self.requests.append(_read_request(client.recv))
        for piece in self._pieces:
            if isinstance(piece, bytes):
                client.sendall(piece)
            else:
                time.sleep(piece)


class Tap(_Server):
    """A relay in front of a server that keeps what passes, byte for byte. For one request at a time."""

    def __init__(self, target_url: str) -> None:
        super().__init__()
        url = httpx.URL(target_url)
        self._target = (url.host, url.port or 80)
        self._asked, self._answered = bytearray(), bytearray()

    def serve(self, client: socket.socket) -> None:
        with socket.create_connection(self._target) as upstream:
            back = threading.Thread(target=_pump, args=(upstream, client, self._answered))
            back.start()
            _pump(client, upstream, self._asked)
            back.join()

    def take(self) -> tuple[bytes, bytes]:
        """What was asked and what was answered since the last call."""
        taken = bytes(self._asked), bytes(self._answered)
        self._asked.clear()
        self._answered.clear()
        return taken


def _pump(source: socket.socket, sink: socket.socket, seen: bytearray) -> None:
    """Pass on until the source ends; then end the sink's side too."""
    try:
        while data := source.recv(65536):
            seen += data
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return  # one side has broken off; the other pump hears of it by itself


def _read_request(receive: Callable[[int], bytes]) -> bytes:
    """A request with its body, whose length must be given; what there is of it when the client leaves."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := receive(65536)):
            return data
        data += more
    head_bytes = data.index(b"\r\n\r\n") + 4
    length = re.search(rb"(?im)^content-length: *(\d+)", data[:head_bytes])
    while length is not None and len(data) < head_bytes + int(length[1]):
        if not (more := receive(65536)):
            return data
        data += more
    return data
