"""Senders as Ray actors, on a local cluster of several worker processes, judged by the server that they send to."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from replay.client import ReplayError
from replay.options import ReplayOptions, plan_file
from replay.runner import replay
from tests.replay.test_processes import counted, index_of, running, tokenize
from tests.replay.test_processes import trace as trace
from tests.replay.test_runner import CHAT, samples_of

MARK = "BURSTGATE_TEST_RAY"
"""In the environment of the cluster's processes."""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: burstgate[ray]")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one with three cores and no dashboard, on the loopback interface."""
    root = str(Path(__file__).parents[2])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # A cluster of its own also in this: a token that is good for nothing else. Ray reads it here when it is imported.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=3",
        "--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}", "--include-dashboard=false",
        "--disable-usage-stats", f"--object-store-memory={100 * 1024 * 1024}",
    ]  # fmt: skip
    with (
        (tmp_path_factory.mktemp("ray") / "log").open("w+") as log,
        subprocess.Popen(
            command,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
                MARK: str(os.getpid()),
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        ) as head,
    ):
        try:
            deadline_s = time.monotonic() + 60
            while "Ray runtime started" not in Path(log.name).read_text():
                assert head.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline_s, Path(log.name).read_text()
                time.sleep(0.1)
            yield address
        finally:
            head.terminate()


def test_the_actors_send_the_whole_schedule_once(cluster: str, trace: Path, tmp_path: Path) -> None:
    options = ReplayOptions("", "m", speed=4.0, ray=cluster, senders=3, samples=tmp_path / "s", run_id="r")
    with running({CHAT: counted, "/tokenize": tokenize}) as script:
        summary = replay(trace, replace(options, target=script.url), console=Console(file=io.StringIO()))
    zero_s = time.monotonic() - (time.time() - (summary.started_at or 0.0))
    planned = {row.index: row for row in plan_file(trace, options) if row.is_sendable}
    seen = script.of(CHAT)
    assert sorted(map(index_of, seen)) == sorted(planned)
    assert (summary.sent, summary.ok, summary.rows_read, summary.lost) == (239, 239, 240, 0)
    assert summary.prompts.exact_share == 1.0
    samples = {sample.index: sample for sample in samples_of(tmp_path / "s")}
    assert {index: sample.due_s for index, sample in samples.items()} == {n: row.due_s for n, row in planned.items()}
    for each in seen:
        assert each.headers.get("x-session-id") == planned[index_of(each)].session_id
        assert each.at_s - zero_s > planned[index_of(each)].due_s - 0.02
    far_s = sorted(abs(each.at_s - zero_s - (samples[index_of(each)].sent_s or 0.0)) for each in seen)
    assert far_s[120] < 0.1
    assert len({facts.name for facts in summary.senders}) == 3
    for facts in summary.senders:
        assert facts.dispatch_lag_s is not None
        assert facts.clock_error_s is not None
        assert facts.clock_offset_s is not None
        assert abs(facts.clock_offset_s) <= facts.clock_error_s + 0.001  # it is one clock here
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("s", "t.csv")] == []


def test_an_actor_that_dies_is_lost(cluster: str, trace: Path) -> None:
    """Its process is killed while it sends."""
    killed: list[int] = []

    async def answer(seen: object, writer: asyncio.StreamWriter) -> None:
        await counted(seen, writer)  # type: ignore[arg-type]

    def kill_one() -> None:
        while len(script.of(CHAT)) < 60:
            time.sleep(0.01)
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                name = (entry / "cmdline").read_bytes()
                inherits = (entry / "environ").read_bytes()
            except OSError:
                continue
            if name.startswith(b"ray::SenderActor") and f"{MARK}={os.getpid()}".encode() in inherits:
                killed.append(int(entry.name))
                os.kill(int(entry.name), signal.SIGKILL)
                return

    with running({CHAT: answer, "/tokenize": tokenize}) as script:
        killer = threading.Thread(target=kill_one)
        killer.start()
        options = ReplayOptions(script.url, "m", speed=4.0, ray=cluster, senders=2)
        summary = replay(trace, options, console=Console(file=io.StringIO()))
        killer.join()
    (lost,) = [sender.lost for sender in summary.senders if sender.lost is not None]
    assert len(killed) == 1
    assert "died" in lost
    assert summary.sent + summary.lost == 239
    assert 0 < summary.lost < 239


def test_what_is_wrong_says_why(cluster: str, trace: Path) -> None:
    with running({CHAT: counted, "/tokenize": tokenize}) as script:
        with trace.open("a") as file:
            file.write("2,s1,0,m,5,5,10,API log\n")
        with pytest.raises(ValueError, match="row 241: received_at"):
            replay(trace, ReplayOptions(script.url, "m", ray=cluster, senders=2), console=Console(file=io.StringIO()))
        assert script.of(CHAT) == []


def test_a_cluster_without_room_says_so(cluster: str, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.ray_senders.START_TIMEOUT_S", 3.0)
    with (
        running({CHAT: counted, "/tokenize": tokenize}) as script,
        pytest.raises(ReplayError, match=r"Ray at '127.0.0.1:[0-9]+': 9 senders: no core for each within 3 s"),
    ):
        replay(trace, ReplayOptions(script.url, "m", ray=cluster, senders=9), console=Console(file=io.StringIO()))
