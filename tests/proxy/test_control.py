"""The control plane over HTTP, in front of a data directory with a real journal and a real database."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from proxy.control import build_control
from proxy.health import State
from proxy.settings import Settings
from proxy.telemetry import WORKER_COUNTERS, WorkerMetrics
from proxy.view import UpstreamStatus, WorkerView, write_view
from storage.counters import places
from storage.engine import open_engine, upgrade
from storage.entries import Begun
from storage.frame import encode_frame
from storage.journal import JOURNAL_COUNTERS, JournalWriter
from storage.recorder import Recorder
from storage.sink import open_sink
from traces.record import Outcome, TraceRecord


def request_id(number: int) -> str:
    return f"01a1fde2-4089-79ca-a20c-{number:012x}"


class Installation:
    """A data directory as a worker and a recorder leave it. in_flight requests stay open."""

    def __init__(self, data_dir: Path, database_url: str | None = None) -> None:
        self.settings = Settings(
            upstreams=("http://user-a:8000",), data_dir=data_dir, database_url=database_url, gateway="test", workers=2
        )
        self.journal = JournalWriter(
            self.settings.journal_dir, "01a1fde2-4089-79ca-a20c-000000000000", gateway="test",
            counter_names=WORKER_COUNTERS,
        )  # fmt: skip
        self.metrics = WorkerMetrics(self.journal.counters.slots)
        self._count = 0

    def request(self, outcome: Outcome | None) -> None:
        """One request; None: still in flight."""
        self._count += 1
        self.metrics.started()
        self.journal.begin(Begun(request_id(self._count), time.time(), endpoint="/v1/x"))
        if outcome is not None:
            record = TraceRecord(
                request_id(self._count), time.time(), elapsed_s=0.5, model="m", outcome=outcome, ttft_s=0.02,
                tpot_s=0.01, request_tokens=7, response_tokens=3, upstream="http://user-a:8000",
            )  # fmt: skip
            self.journal.end(record)
            self.metrics.ended(record, "chat", 0.4)
            self.metrics.left()

    def see(self, *states: State) -> None:
        """A worker's view of upstreams in these states, as it writes one every second."""
        upstreams = tuple(
            UpstreamStatus(f"upstream-{number}", state, 0, 1.0, 1.0, None, None, 0)
            for number, state in enumerate(states, 1)
        )
        write_view(self.settings.data_dir, WorkerView(os.getpid(), time.time(), "", 0, upstreams))

    def record(self) -> None:
        """Move everything into the database."""
        engine = open_engine(self.settings.database)
        upgrade(engine)
        recorder = Recorder(self.settings.journal_dir, lambda: open_sink(engine))
        recorder.acquire()
        while recorder.step():
            pass
        recorder.close()
        engine.dispose()


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    made = Installation(tmp_path)
    yield made
    made.journal.close()


@contextlib.contextmanager
def serving(settings: Settings, port: int = 0) -> Iterator[httpx.Client]:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        server = uvicorn.Server(uvicorn.Config(build_control(settings), log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=20.0) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


def scrape(client: httpx.Client) -> dict[tuple[str, str], float]:
    """Samples by name and first label value, from a page that Prometheus can read."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def scrape_until(client: httpx.Client, name: str) -> dict[tuple[str, str], float]:
    """A scrape that has `name`: what comes from the database is taken in the background."""
    deadline_s = time.monotonic() + 10
    while (name, "") not in (found := scrape(client)):
        assert time.monotonic() < deadline_s, f"no {name}"
        time.sleep(0.02)
    return found


def test_metrics_keep_the_identity(installation: Installation) -> None:
    for outcome in (Outcome.OK, Outcome.OK, Outcome.CLIENT_GONE):
        installation.request(outcome)
    installation.record()
    installation.request(Outcome.OK)
    installation.request(None)
    with serving(installation.settings) as client:
        found = scrape_until(client, "burstgate_records_in_database_total")
    assert found["burstgate_requests_total", "ok"] == 3
    assert found["burstgate_requests_total", "client_gone"] == 1
    assert found["burstgate_requests_in_flight", ""] == 1
    assert found["burstgate_workers", ""] == 1
    assert found["burstgate_database_up", ""] == 1
    assert found["burstgate_journal_size_bytes", ""] > 0
    assert found["burstgate_tokens_total", "request"] == 28
    assert (found["burstgate_records_in_database_total", ""], found["burstgate_records_in_journal", ""]) == (3, 2)
    dropped = sum(value for (name, _), value in found.items() if name == "burstgate_records_dropped_total")
    assert found["burstgate_requests_accepted_total", ""] == 3 + 2 + dropped


def test_status_in_one_look(installation: Installation) -> None:
    installation.request(None)
    installation.record()
    with serving(installation.settings) as client:
        scrape_until(client, "burstgate_records_in_database_total")
        status = client.get("/api/v1/status").json()
    assert status.pop("uptime_s") > 0
    assert status.pop("journal_bytes") > 0
    assert status.pop("version")
    assert status == {
        "gateway": "test",
        "upstreams": ["http://user-a:8000"],
        "workers_alive": 1,
        "workers_wanted": 2,
        "in_flight": 1,
        "accepted": 1,
        "dropped": {"budget": 0, "io": 0, "off": 0},
        "database": installation.settings.database,
        "is_database_up": True,
        "read_only": False,
    }


def test_doctor_finds_all_well(installation: Installation) -> None:
    installation.request(Outcome.OK)
    installation.record()
    with serving(installation.settings) as client:
        found = client.get("/api/v1/doctor").json()
    assert found["ok"] is True
    assert [(check["name"], check["is_ok"]) for check in found["checks"]] == [
        ("data directory", True),
        ("journal", True),
        ("database", True),
        ("accounting", True),
    ]
    assert found["checks"][3]["detail"].startswith("accepted 1 = in database 1 + in journal 0 + dropped 0")


def test_health_and_unknown_paths(installation: Installation) -> None:
    with serving(installation.settings) as client:
        assert (client.get("/healthz").status_code, client.get("/healthz").text) == (200, "ok\n")
        assert client.get("/nothing").status_code == 404
        assert client.post("/metrics").status_code == 405
        assert client.get("/docs").status_code == 404


@pytest.mark.parametrize("trouble", ["refused", "locked", "garbage", "not upgraded"])
def test_database_in_trouble_holds_up_nobody(tmp_path: Path, trouble: str) -> None:
    with contextlib.ExitStack() as stack:
        refused = "postgresql://bob:hidden@127.0.0.1:1/x"
        installation = Installation(tmp_path, refused if trouble == "refused" else None)
        stack.callback(installation.journal.close)
        installation.request(Outcome.OK)
        file = tmp_path / "burstgate.db"
        if trouble == "locked":
            installation.record()
            lock = stack.enter_context(contextlib.closing(sqlite3.connect(file)))
            lock.execute("PRAGMA locking_mode = EXCLUSIVE")
            lock.execute("BEGIN EXCLUSIVE")
        elif trouble == "garbage":
            file.write_bytes(b"this is no database" * 1000)
        client = stack.enter_context(serving(installation.settings))
        start_s = time.monotonic()
        found = scrape(client)
        status = client.get("/api/v1/status")
        assert client.get("/healthz").text == "ok\n"
        assert time.monotonic() - start_s < 1.0
        assert found["burstgate_requests_total", "ok"] == 1
        assert found["burstgate_database_up", ""] == 0
        assert status.json()["accepted"] == 1
        assert "hidden" not in status.text
        start_s = time.monotonic()
        doctor = client.get("/api/v1/doctor")
        assert time.monotonic() - start_s < 12.0
        if trouble != "locked":  # readers of a WAL database may or may not wait for its writer
            assert doctor.json()["ok"] is False
            assert [check["is_ok"] for check in doctor.json()["checks"]][:3] == [True, True, False]
        assert "hidden" not in doctor.text
        assert "Traceback" not in doctor.text


@pytest.mark.parametrize("damage", ["unreadable frame", "no journal", "no data directory"])
def test_files_in_trouble_are_findings(tmp_path: Path, damage: str) -> None:
    installation = Installation(tmp_path / "data")
    installation.request(Outcome.OK)
    installation.record()
    installation.journal.close()
    if damage == "unreadable frame":
        with next(installation.journal.directory.glob("*.seg")).open("ab") as file:
            file.write(encode_frame(b"Z of the future"))
    elif damage == "no journal":
        os.rename(installation.settings.journal_dir, tmp_path / "away")
    else:
        os.rename(tmp_path / "data", tmp_path / "away")
    with serving(installation.settings) as client:
        for _ in range(2):
            assert scrape(client)["burstgate_workers", ""] == 0
            doctor = client.get("/api/v1/doctor")
            assert doctor.status_code == 200
            assert doctor.json()["ok"] is (damage == "no journal")
            assert client.get("/api/v1/status").status_code == 200


def test_an_upstream_is_up_unless_down_or_ejected(installation: Installation) -> None:
    installation.see(*State)
    with serving(installation.settings) as client:
        up = {label: value for (name, label), value in scrape(client).items() if name == "burstgate_upstream_up"}
    assert up == {
        f"upstream-{number}": float(state not in {State.DOWN, State.EJECTED}) for number, state in enumerate(State, 1)
    }


def test_missing_records_are_a_metric(installation: Installation) -> None:
    for _ in range(3):
        installation.request(Outcome.OK)
    installation.record()
    with serving(installation.settings) as client:
        assert scrape_until(client, "burstgate_records_missing")["burstgate_records_missing", ""] == 0
    accepted = dict(places(JOURNAL_COUNTERS))["accepted"]
    installation.journal.counters.slots[accepted] += 20  # begun, and in no frame
    with serving(installation.settings) as client:
        assert scrape_until(client, "burstgate_records_missing")["burstgate_records_missing", ""] > 10


def test_ended_injections_are_counted_by_how(installation: Installation) -> None:
    with serving(installation.settings) as client:
        ended = {
            label: value for (name, label), value in scrape(client).items() if name == "burstgate_injections_total"
        }
    assert ended == {"completed": 0, "tripped": 0, "stopped": 0, "failed": 0}
