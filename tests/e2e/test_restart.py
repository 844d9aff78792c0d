"""SIGHUP and SIGUSR2 under load: no connection refused or reset, every request answered and recorded exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import pty
import re
import signal
import socket
import subprocess
import termios
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from tests.e2e.harness import BURSTGATE, Installation, ScriptedUpstream, Simulator, clean_environment, wait_until
from tests.e2e.load import Answer, Ask, Load, assert_recorded, fetch
from traces.record import Outcome

TAKE_OVER_S = 30.0


@dataclass(slots=True)
class KeepAlive:
    """Clients that ask again and again on a connection of their own, until an answer says `connection: close`.

    One that is closed without that word, or that breaks off, is an answer that is not whole.
    """

    url: str
    clients: int
    answers: list[Answer]
    connections: int = 0
    is_over: bool = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.clients):
                tasks.create_task(self._client(number))
            try:
                yield
            finally:
                self.is_over = True

    async def _client(self, number: int) -> None:
        parts = urlsplit(self.url)
        asks = (Ask(f"keep-{number}-{count}", False, 2) for count in itertools.count())
        while not self.is_over:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            self.connections += 1
            is_open = True
            while is_open and not self.is_over:
                ask = next(asks)
                start_s = time.monotonic()
                status = None
                try:
                    writer.write(ask.encode(parts.netloc))
                    head = await reader.readuntil(b"\r\n\r\n")
                    status = int(head.split(b" ", 2)[1])
                    length = re.search(rb"(?im)^content-length: *(\d+)", head)
                    assert length is not None, head
                    await reader.readexactly(int(length[1]))
                    is_open = re.search(rb"(?im)^connection: *close", head) is None
                    self.answers.append(Answer(ask, status, True, time.monotonic() - start_s))
                except (OSError, asyncio.IncompleteReadError):
                    self.answers.append(Answer(ask, status, False, time.monotonic() - start_s))
                    is_open = False
                await asyncio.sleep(0.02)
            writer.close()


class Config:
    """A configuration file that changes."""

    def __init__(self, path: Path, **settings: object) -> None:
        self.path = path
        self._settings = settings
        self.write()

    def write(self, **settings: object) -> None:
        self._settings |= settings
        self.path.write_text(yaml.safe_dump(self._settings))


def serving(tmp_path: Path, config: Config) -> Installation:
    """Everything but the ports comes from the file."""
    installation = Installation(data_dir=tmp_path / "data")
    installation._command = [BURSTGATE, "serve", "--data-dir", tmp_path / "data", "--config", config.path]
    installation._command += ["--port", "0", "--control-port", "0"]
    return installation


def said(installation: Installation, pattern: str) -> int:
    return len(re.findall(rf"^burstgate: {pattern}", installation.output, re.MULTILINE))


def send(installation: Installation, signum: signal.Signals, answer: str) -> None:
    """Send a signal to the supervisor and wait for one more line that answers it."""
    before = said(installation, answer)
    os.kill(installation.process.pid, signum)
    wait_until(lambda: said(installation, answer) > before, TAKE_OVER_S, f"one more {answer!r}")


def restart(installation: Installation) -> None:
    send(installation, signal.SIGUSR2, r"restarted as version \S+: new workers \(\d+\) serve")


def wait_settled(installation: Installation, workers: int) -> None:
    """One set of processes, and no other."""
    parts = (("worker", workers), ("recorder", 1), ("control", 1))
    for part, count in parts:
        wait_until(lambda: len(installation.pids(part)) == count, TAKE_OVER_S, f"{count} {part}")  # type: ignore[arg-type]  # noqa: B023


@pytest.mark.parametrize("rounds", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_nobody_notices_reloads_restarts_and_another_number_of_workers(rounds: int, tmp_path: Path) -> None:
    with Simulator("--fast") as simulator:
        config = Config(tmp_path / "burstgate.yaml", upstreams=[simulator.url], workers=2)
        with serving(tmp_path, config) as installation:
            probe = asyncio.run(fetch(installation.gateway_url, Ask("probe", False, 3)))
            request_tokens = installation.wait_rows(1)[0].request_tokens
            assert request_tokens
            fresh = Load(lambda: installation.gateway_url, clients=8, seed=rounds, pause_s=0.02)
            kept = KeepAlive(installation.gateway_url, 8, [])
            pid = installation.process.pid

            def disturb() -> None:
                for number in range(rounds):
                    config.write(timeouts={"chunk_s": 100 + number})
                    send(installation, signal.SIGHUP, "reloaded: timeouts.chunk_s")
                    restart(installation)
                    workers = 3 if number % 2 else 1
                    config.write(workers=workers)
                    send(installation, signal.SIGHUP, r"reloaded: new workers")
                    restart(installation)
                    wait_settled(installation, workers)

            async def run() -> None:
                async with fresh.running(), kept.running():
                    await asyncio.sleep(0.5)
                    await asyncio.to_thread(disturb)
                    await asyncio.sleep(0.5)

            asyncio.run(run())
            answers = [probe, *fresh.answers, *kept.answers]
            assert [answer for answer in answers if not (answer.is_whole and answer.status == 200)] == []
            assert installation.process.pid == pid
            assert installation.process.is_running
            rows = installation.wait_rows(len(answers))
            installation.stop()
            accounting = installation.doctor()["accounting"]
    assert accounting.is_ok, accounting.detail
    assert_recorded(answers, rows, request_tokens)
    assert len(fresh.answers) > 100 * rounds
    assert len(kept.answers) > 100 * rounds
    assert kept.connections < len(kept.answers) / 10, "they did keep their connections"
    assert "Traceback" not in installation.output


class Endless(ScriptedUpstream):
    """Its answer is a stream that goes on until `is_over` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.is_over = threading.Event()

    def serve(self, client: socket.socket) -> None:
        client.recv(65536)
        client.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        while not self.is_over.wait(0.05):
            client.sendall(b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n')
        client.sendall(b"data: [DONE]\n\n")


def test_stream_outlives_restarts_and_the_settings_reach_every_process(tmp_path: Path) -> None:
    with Endless() as endless, Simulator("--fast") as simulator:
        config = Config(tmp_path / "burstgate.yaml", upstreams=[endless.url], workers=1)
        with serving(tmp_path, config) as installation:

            async def run() -> tuple[Answer, list[Answer]]:
                url = installation.gateway_url
                async with asyncio.TaskGroup() as tasks:
                    stream = tasks.create_task(fetch(url, Ask("long", True, 60)))
                    await asyncio.sleep(0.5)
                    await asyncio.to_thread(restart, installation)
                    config.write(upstreams=[simulator.url])
                    await asyncio.to_thread(send, installation, signal.SIGHUP, "reloaded: upstreams")
                    await asyncio.sleep(0.5)
                    others = [await fetch(url, Ask(f"short-{number}", True, 20)) for number in range(4)]
                    await asyncio.to_thread(restart, installation)
                    assert not stream.done()
                    endless.is_over.set()
                return stream.result(), others

            try:
                stream, others = asyncio.run(run())
            finally:
                endless.is_over.set()
            assert [answer.is_whole for answer in (stream, *others)] == [True] * 5
            assert {row.client_request_id: row.upstream for row in installation.wait_rows(5)} == {
                "long": endless.url, **{f"short-{number}": simulator.url for number in range(4)}
            }  # fmt: skip
            status = httpx.get(f"{installation.control_url}/api/v1/status").json()
            assert status["upstreams"] == [simulator.url]
            wait_settled(installation, 1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"upstreams": ["ftp://nowhere"]}, r"burstgate: \S+/burstgate\.yaml: upstreams: .*ftp://nowhere.*"),
        ({"port": 1, "prot": 2}, r"burstgate: \S+/burstgate\.yaml: unknown setting 'prot'; .*"),
        ({"upstreams": []}, r"burstgate: upstreams: name at least one.*"),
    ],
)
def test_configuration_that_does_not_load_changes_nothing(
    settings: dict[str, object], reason: str, tmp_path: Path
) -> None:
    with Simulator("--fast") as simulator:
        config = Config(tmp_path / "burstgate.yaml", upstreams=[simulator.url], workers=2)
        with serving(tmp_path, config) as installation:
            before = installation.process.commands()
            config.write(**settings)
            send(installation, signal.SIGHUP, "not reloaded, the configuration stays as it is: ")
            send(installation, signal.SIGUSR2, "not restarted, everything goes on as it was: the reason is above")
            assert re.search(f"^{reason}$", installation.output, re.MULTILINE), installation.output
            assert installation.process.commands() == before
            assert asyncio.run(fetch(installation.gateway_url, Ask("still", True, 5))).is_whole
            config.write(upstreams=[simulator.url])
            if "prot" not in settings:
                restart(installation)
                wait_settled(installation, 2)
                assert set(installation.process.commands()) & set(before) == {installation.process.pid}
            assert "Traceback" not in installation.output


def test_new_workers_that_do_not_come_up_leave_the_old_ones_serving(tmp_path: Path) -> None:
    with Simulator("--fast") as simulator:
        config = Config(tmp_path / "burstgate.yaml", upstreams=[simulator.url], workers=2)
        with serving(tmp_path, config) as installation:
            old = installation.pids("worker")
            secret = tmp_path / "data" / "secret"
            good = secret.read_bytes()
            secret.write_bytes(b"short")
            send(installation, signal.SIGUSR2, r"not restarted, the old ones go on: the worker \d did not start")
            assert installation.pids("worker") == old
            config.write(workers=3)
            send(installation, signal.SIGHUP, r"workers not replaced, the old ones go on: the worker \d did not start")
            wait_until(lambda: installation.pids("worker") == old, 10.0, "the new ones are gone")
            answers = [asyncio.run(fetch(installation.gateway_url, Ask(f"a-{n}", True, 5))) for n in range(20)]
            assert all(answer.is_whole for answer in answers)
            secret.write_bytes(good)
            restart(installation)
            wait_settled(installation, 3)
            assert not set(installation.pids("worker")) & set(old)
            installation.wait_rows(20)
            installation.stop()
            assert installation.doctor()["accounting"].is_ok


def test_what_can_not_change_is_named_and_the_rest_is_applied(tmp_path: Path) -> None:
    with Simulator("--fast") as simulator:
        config = Config(tmp_path / "burstgate.yaml", upstreams=[simulator.url], database_url=None, gateway="one")
        with serving(tmp_path, config) as installation:
            url = "postgresql://user:hidden@127.0.0.1:1/x"
            config.write(database_url=url, gateway="two", journal={"segment": "1MiB"}, timeouts={"total_s": 60})
            send(installation, signal.SIGHUP, r"journal.segment: 16.0MiB -> 1.0MiB needs a restart \(SIGUSR2\)$")
            lines = [line for line in installation.output.splitlines() if line.startswith("burstgate: ")]
            stays = "burstgate: database_url: (none) -> postgresql://user:***@127.0.0.1:1/x needs a stop and a start"
            assert lines == [
                "burstgate: reloaded: timeouts.total_s: 3600.0 -> 60.0",
                stays,
                "burstgate: gateway: one -> two needs a restart (SIGUSR2)",
                "burstgate: journal.segment: 16.0MiB -> 1.0MiB needs a restart (SIGUSR2)",
            ]
            assert asyncio.run(fetch(installation.gateway_url, Ask("before", False, 3))).is_whole
            restart(installation)
            assert installation.output.splitlines().count(stays) == 2
            wait_settled(installation, 1)  # until then the old worker, too, may take a request
            assert asyncio.run(fetch(installation.gateway_url, Ask("after", False, 3))).is_whole
            rows = installation.wait_rows(2)
            assert [(row.client_request_id, row.gateway) for row in rows] == [("before", "one"), ("after", "two")]
            assert "hidden" not in installation.output
            send(installation, signal.SIGHUP, "reloaded: nothing changes$")


def test_worker_that_dies_after_a_restart_is_replaced_and_a_stop_ends_all(tmp_path: Path) -> None:
    with Simulator("--step-base-s", "0.1") as simulator:
        config = Config(tmp_path / "burstgate.yaml", upstreams=[simulator.url], timeouts={"drain_s": 2})
        with serving(tmp_path, config) as installation:

            async def run() -> list[Answer]:
                async with asyncio.TaskGroup() as tasks:
                    stream = tasks.create_task(fetch(installation.gateway_url, Ask("cut by the drain", True, 300)))
                    await asyncio.sleep(0.5)
                    await asyncio.to_thread(restart, installation)
                    return [await stream]

            (cut,) = asyncio.run(run())
            assert (cut.status, cut.is_whole) == (200, False)
            assert cut.elapsed_s > 2
            wait_settled(installation, 1)
            (old,) = installation.pids("worker")
            os.kill(old, signal.SIGKILL)
            wait_until(lambda: installation.pids("worker") not in ([], [old]), 15.0, "another worker")
            assert said(installation, "the worker 0 ended with status -9; starting it again") == 1
            assert asyncio.run(fetch(installation.gateway_url, Ask("after", False, 2))).is_whole
            installation.stop()
            outcomes = {row.client_request_id: row.outcome for row in installation.rows()}
            assert outcomes.keys() == {"cut by the drain", "after"}
            assert outcomes["after"] is Outcome.OK
            assert outcomes["cut by the drain"] is not Outcome.OK
            assert installation.doctor()["accounting"].is_ok


def _while_streaming(installation: Installation, act: Callable[[], None]) -> Answer:
    async def run() -> Answer:
        async with asyncio.TaskGroup() as tasks:
            stream = tasks.create_task(fetch(installation.gateway_url, Ask("stream", True, 300)))
            await asyncio.sleep(0.5)
            await asyncio.to_thread(act)
        return stream.result()

    return asyncio.run(run())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_stops_now_and_the_record_is_kept(signum: signal.Signals, tmp_path: Path) -> None:
    with Simulator("--step-base-s", "0.1") as simulator:
        config = Config(tmp_path / "burstgate.yaml", upstreams=[simulator.url])
        with serving(tmp_path, config) as installation:

            def stop_twice() -> None:
                os.kill(installation.process.pid, signum)
                time.sleep(0.5)
                assert installation.process.is_running
                os.kill(installation.process.pid, signum)
                wait_until(lambda: not installation.process.is_running, 10.0, "the end")

            answer = _while_streaming(installation, stop_twice)
            assert (answer.status, answer.is_whole) == (200, False)
            assert installation.process.terminate(1.0) == 0
            assert installation.process.commands() == {}
            (row,) = installation.rows()
            assert (row.client_request_id, row.outcome is Outcome.OK) == ("stream", False)
            assert installation.doctor()["accounting"].is_ok


def test_stop_cuts_at_the_limit_with_a_record_and_refuses_meanwhile(tmp_path: Path) -> None:
    with Simulator("--step-base-s", "0.1") as simulator:
        config = Config(tmp_path / "burstgate.yaml", upstreams=[simulator.url], timeouts={"drain_s": 1})
        with serving(tmp_path, config) as installation:

            def stop() -> None:
                os.kill(installation.process.pid, signal.SIGTERM)
                time.sleep(0.5)
                with pytest.raises(httpx.ConnectError):
                    httpx.get(installation.gateway_url)
                installation.stop()

            answer = _while_streaming(installation, stop)
            assert (answer.status, answer.is_whole) == (200, False)
            (row,) = installation.rows()
            assert (row.client_request_id, row.outcome is Outcome.OK) == ("stream", False)
            assert installation.doctor()["accounting"].is_ok


def test_closed_terminal_is_a_stop_and_not_a_reload(tmp_path: Path) -> None:
    here, there = pty.openpty()
    process = subprocess.Popen(
        [BURSTGATE, "serve", "--upstream", "http://127.0.0.1:1", "--port", "0", "--control-port", "0",
         "--data-dir", tmp_path],
        env=clean_environment(), stdin=there, stdout=there, stderr=there, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    try:
        os.close(there)
        text = b""
        while b"recording" not in text:
            text += os.read(here, 65536)
        os.kill(process.pid, signal.SIGHUP)  # the terminal is still there
        while b"reloaded: nothing changes" not in text:
            text += os.read(here, 65536)
        assert process.poll() is None
        os.close(here)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
