"""The supervisor with real processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from proxy.config_error import ConfigError
from proxy.process import Child
from proxy.settings import JournalSettings, Settings, TimeoutSettings
from proxy.supervisor import Supervisor, listen

LOOPBACK = "127.0.0.1"


def eventually(is_true: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def listening(*options: int) -> Iterator[int]:
    """Somebody else's port."""
    with socket.socket() as sock:
        for option in options:
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
        sock.bind((LOOPBACK, 0))
        sock.listen()
        yield int(sock.getsockname()[1])


@pytest.mark.parametrize("options", [[], [socket.SO_REUSEADDR], [socket.SO_REUSEPORT]])
@pytest.mark.parametrize("shares", [1, 3])
def test_port_in_use_is_never_shared_with_a_stranger(options: list[int], shares: int) -> None:
    with listening(*options) as port, pytest.raises(ConfigError) as caught:
        listen(LOOPBACK, port, shares=shares, setting="port")
    assert str(caught.value) == f"port: can not listen on 127.0.0.1:{port}: Address already in use"


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("no-such-host.invalid", r"control_port: no-such-host\.invalid: .+"),
        ("192.0.2.1", r"control_port: can not listen on 192\.0\.2\.1:0: Cannot assign requested address"),
        ("x" * 70 + ".invalid", r"control_port: 'x+\.invalid': not a host name"),  # no DNS label is that long
    ],
)
def test_host_that_is_not_ours(host: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        listen(host, 0, shares=1, setting="control_port")


@pytest.mark.parametrize(("shares", "host"), [(1, LOOPBACK), (3, LOOPBACK), (2, "localhost")])
def test_sockets_share_one_free_port(shares: int, host: str) -> None:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(sock) for sock in listen(host, 0, shares=shares, setting="port")]
        assert len(sockets) == shares
        assert len({sock.getsockname() for sock in sockets}) == 1
        client = stack.enter_context(socket.create_connection(sockets[0].getsockname()[:2], timeout=5))
        assert client.getpeername() == sockets[0].getsockname()


def test_failed_start_leaves_no_socket_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with listening() as port:
        with pytest.raises(ConfigError, match=r"^port: "):
            listen(LOOPBACK, port, shares=4, setting="port")
        settings = settings_for(tmp_path).model_copy(update={"control_port": port})
        with pytest.raises(ConfigError, match=r"^control_port: "):
            Supervisor(settings, say=print).start()
    assert len(os.listdir("/proc/self/fd")) == before


# Processes ------------------------------------------------------------------------------------------------------------


class Running:
    """A supervisor whose loop runs here."""

    def __init__(self, settings: Settings) -> None:
        self.said: list[str] = []
        self.configured: Settings | ConfigError = settings
        self.supervisor = Supervisor(settings, say=self.said.append, load=self._load)
        self.gateway_url, self.control_url = self.supervisor.start()

    def _load(self) -> Settings:
        if isinstance(self.configured, ConfigError):
            raise self.configured
        return self.configured

    def reload(self) -> None:
        """As after SIGHUP."""
        self.supervisor._is_reload_asked = True
        self.tend(lambda: not self.supervisor._is_reload_asked, "it has been reloaded")

    @property
    def children(self) -> dict[str, Child]:
        return {child.name: child for child in self.supervisor._children()}

    def pid(self, name: str) -> int | None:
        process = self.children[name].process
        return None if process is None or process.poll() is not None else process.pid

    def tend(self, is_true: Callable[[], bool], what: str) -> None:
        """Keep everything running until a fact."""

        def step() -> bool:
            self.supervisor.tend()
            return is_true()

        eventually(step, what)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.gateway_url}/x", timeout=10.0).status_code == 502
        except httpx.HTTPError:
            return False

    def workers(self) -> int:
        return int(httpx.get(f"{self.control_url}/api/v1/status", timeout=10.0).json()["workers_alive"])


def settings_for(data_dir: Path, workers: int = 1) -> Settings:
    return Settings(
        upstreams=("http://127.0.0.1:1",),  # nobody: every request is answered 502 by the gateway itself
        data_dir=data_dir,
        port=0,
        control_port=0,
        workers=workers,
        timeouts=TimeoutSettings(drain_s=1.0),
    )


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(settings_for(tmp_path, workers=2))
    try:
        yield made
    finally:
        made.supervisor.stop()


def test_children_that_die_are_started_again_on_the_same_ports(running: Running) -> None:
    assert running.answers()
    before = {name: running.pid(name) for name in running.children}
    assert set(before) == {"recorder", "control plane", "worker 0", "worker 1"}
    assert None not in before.values()
    for name in before:
        pid = running.pid(name)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    running.tend(lambda: all(running.pid(name) not in (None, before[name]) for name in before), "all are replaced")
    assert sorted(running.said) == sorted(f"the {name} ended with status -9; starting it again" for name in before)
    running.tend(running.answers, "the gateway answers")
    running.tend(lambda: running.workers() == 2, "both workers are back")
    after = {name: running.pid(name) for name in before}
    time.sleep(1.5)  # and they stay
    running.tend(lambda: True, "")
    assert {name: running.pid(name) for name in before} == after


def test_request_that_comes_while_the_worker_is_replaced_waits_for_it(tmp_path: Path) -> None:
    running = Running(settings_for(tmp_path))
    try:
        pid = running.pid("worker 0")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: running.pid("worker 0") is None, "it is dead")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.get, f"{running.gateway_url}/x", timeout=20.0)
            running.tend(answer.done, "the request is answered")
            assert answer.result().status_code == 502
    finally:
        running.supervisor.stop()


def test_stop_records_everything_and_leaves_nobody(running: Running) -> None:
    for _ in range(5):
        assert running.answers()
    processes = [child.process for child in running.children.values()]
    running.supervisor.stop()
    # uvicorn ends with the signal that stopped it, once it has shut down; SIGKILL would be another.
    assert {process.poll() for process in processes if process is not None} <= {0, -signal.SIGTERM}
    assert list(running.supervisor._settings.journal_dir.glob("*/*.seg")) == []  # the recorder has emptied it
    with pytest.raises(httpx.ConnectError):
        httpx.get(running.gateway_url)


def test_loop_ends_with_a_signal_and_children_without_a_supervisor_end_too(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from proxy.settings import Settings, TimeoutSettings\n"
        "from proxy.supervisor import Supervisor\n"
        "supervisor = Supervisor(Settings(upstreams=('http://127.0.0.1:1',), data_dir=Path(sys.argv[1]), port=0,"
        " control_port=0, timeouts=TimeoutSettings(drain_s=1)), say=print)\n"
        "supervisor.start()\n"
        "print(*(child.process.pid for child in supervisor._children()), flush=True)\n"
        "supervisor.run()\n"
    )
    for how, status in ((signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -9)):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 3
        eventually(lambda: catches_sigterm(process.pid), "the loop runs")  # noqa: B023
        time.sleep(0.1)
        process.send_signal(how)
        assert process.wait(20) == status
        process.stdout.close()
        eventually(lambda: not any(map(is_alive, pids)), f"nobody is left after {how.name}")  # noqa: B023


def catches_sigterm(pid: int) -> bool:
    """The process has a handler for it."""
    (mask,) = re.findall(r"SigCgt:\s+([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


def is_alive(pid: int) -> bool:
    """The process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_child_that_can_not_start_is_an_error_that_leaves_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    supervisor = Supervisor(settings_for(tmp_path), say=print)
    with pytest.raises(ConfigError, match=r"^the worker 0 did not start; its reason is above$"):
        supervisor.start()
    assert [child.is_running for child in supervisor._children()] == [False, False, False]
    assert [(child.stdin_fd, child.ready_fd) for child in supervisor._children()] == [(-1, -1)] * 3
    assert "expected 32 bytes, found 5" in capfd.readouterr().err


def test_second_installation_on_the_same_data_directory_is_refused(
    running: Running, capfd: pytest.CaptureFixture[str]
) -> None:
    second = Supervisor(running.supervisor._settings, say=print)
    with pytest.raises(ConfigError, match=r"^the recorder did not start; its reason is above$"):
        second.start()
    assert "another recorder is at work on this data directory" in capfd.readouterr().err
    assert running.answers()


def test_pause_grows_with_quick_deaths_and_is_bounded(tmp_path: Path) -> None:
    said: list[str] = []
    supervisor = Supervisor(settings_for(tmp_path), say=said.append)
    child = Child("broken thing", "proxy.no_such_module", settings_for(tmp_path))
    pauses = []
    for _ in range(9):
        child.start()
        eventually(lambda: not child.is_running, "it is dead")
        before_s = time.monotonic()
        child.restart_at_s = 0.0
        supervisor._keep_running(child)
        pauses.append(child.restart_at_s - before_s)
        assert child.process is None
    assert pauses == pytest.approx([0.1, 0.3, 0.7, 1.5, 3.1, 5.0, 5.0, 5.0, 5.0], abs=0.05)
    assert len(said) == 9


# Reload ---------------------------------------------------------------------------------------------------------------


def status(running: Running) -> dict[str, object]:
    answer: dict[str, object] = httpx.get(f"{running.control_url}/api/v1/status", timeout=10.0).json()
    return answer


def test_reload_reaches_processes_and_names_what_can_not_change(running: Running) -> None:
    settings = running.supervisor._settings
    before = {name: running.pid(name) for name in running.children}
    running.configured = settings.model_copy(
        update={
            "upstreams": Settings.model_validate({"upstreams": "http://127.0.0.1:2"}).upstreams,
            "database_url": "postgresql://user:hidden@127.0.0.1:1/x",
            "timeouts": TimeoutSettings(drain_s=2.0),
            "port": 1,
            "gateway": "another",
            "journal": JournalSettings(fsync_interval_s=2.0),
        }
    )
    running.reload()
    assert running.said == [
        "reloaded: upstreams: http://127.0.0.1:1 -> http://127.0.0.1:2, timeouts.drain_s: 1.0 -> 2.0",
        "port: 0 -> 1 needs a stop and a start",
        "database_url: (none) -> postgresql://user:***@127.0.0.1:1/x needs a stop and a start",
        f"gateway: {settings.gateway} -> another needs a restart (SIGUSR2)",
        "journal.fsync_interval_s: 1.0 -> 2.0 needs a restart (SIGUSR2)",
    ]
    running.tend(lambda: status(running)["upstreams"] == ["http://127.0.0.1:2"], "the control plane knows")
    assert {child.settings.timeouts.drain_s for name, child in running.children.items()} == {2.0}
    assert {child.settings.gateway for child in running.children.values()} == {settings.gateway}
    assert {name: running.pid(name) for name in before} == before
    running.said.clear()
    running.reload()  # what was not applied is named again, and nothing else
    assert running.said[0] == "reloaded: nothing changes"
    assert len(running.said) == 5
    running.configured = ConfigError("burstgate.yaml: port: wrong")
    running.said.clear()
    running.reload()
    assert running.said == ["not reloaded, the configuration stays as it is: burstgate.yaml: port: wrong"]
    assert running.answers()


def test_child_that_dies_while_it_starts_gets_the_new_settings_all_the_same(running: Running) -> None:
    settings = running.supervisor._settings
    pid = running.pid("control plane")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    running.tend(lambda: running.pid("control plane") not in (None, pid), "another is starting")
    assert not running.children["control plane"].is_ready
    running.configured = settings.model_copy(
        update={"upstreams": Settings.model_validate({"upstreams": "http://127.0.0.1:3"}).upstreams}
    )
    running.reload()
    running.tend(lambda: running.children["control plane"].is_ready, "it is ready")
    running.tend(lambda: status(running)["upstreams"] == ["http://127.0.0.1:3"], "it has been told")


def test_process_that_does_not_read_its_input_is_replaced(running: Running) -> None:
    child = running.children["control plane"]
    pid = running.pid("control plane")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        aliases = {f"alias-{number:05d}": "model" for number in range(8000)}  # more than a pipe holds
        running.configured = running.supervisor._settings.model_copy(update={"aliases": aliases})
        running.reload()
        assert running.said[1:] == ["the control plane does not take new settings; starting it again"]
        assert child.kill_at_s is not None
        assert child.kill_at_s <= time.monotonic() + 6
    finally:
        os.kill(pid, signal.SIGCONT)
    running.tend(lambda: running.pid("control plane") not in (None, pid), "another runs")
    running.tend(lambda: running.children["control plane"].is_ready, "it is ready")


def test_more_and_fewer_workers_listen_on_every_socket(running: Running) -> None:
    settings = running.supervisor._settings
    first = {running.pid("worker 0"), running.pid("worker 1")}
    ports = set()
    for count, sockets in ((3, 3), (1, 3), (2, 3)):
        running.configured = settings.model_copy(update={"workers": count})
        running.reload()
        running.tend(lambda: not running.supervisor._upcoming, "the new ones serve")
        workers = [child for name, child in running.children.items() if name.startswith("worker")]
        assert len(workers) == count
        used = [sock for child in workers for sock in child.sockets]
        assert len(used) == len(set(used)) == sockets
        ports |= {sock.getsockname() for sock in used}
        running.tend(lambda: not running.supervisor._leaving, "the old ones have ended")
        assert not first & {running.pid(child.name) for child in workers}
        # A connection may land in the queue of any socket.
        assert all(running.answers() for _ in range(12))
    assert len(ports) == 1


def test_workers_that_do_not_come_up_leave_the_old_ones(running: Running, capfd: pytest.CaptureFixture[str]) -> None:
    settings = running.supervisor._settings
    secret = settings.data_dir / "secret"
    good = secret.read_bytes()
    before = {name: running.pid(name) for name in running.children}
    secret.write_bytes(b"short")
    running.configured = settings.model_copy(update={"workers": 4})
    running.reload()
    running.tend(lambda: not running.supervisor._upcoming, "it has given up")
    assert re.fullmatch(
        r"workers not replaced, the old ones go on: the worker \d did not start, its reason is above", running.said[-1]
    )
    assert {name: running.pid(name) for name in running.children} == before
    assert len(running.supervisor._gateways) == 2
    running.tend(lambda: not running.supervisor._leaving, "the new ones have ended")
    assert all(running.answers() for _ in range(12))
    secret.write_bytes(good)
    running.reload()  # it was not taken as done
    running.tend(lambda: len(running.children) == 6, "four workers")
    assert "expected 32 bytes, found 5" in capfd.readouterr().err
