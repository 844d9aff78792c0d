"""Old days leave a live gateway's database and stay readable; the commands do the same by hand."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import httpx

from storage.engine import open_engine, upgrade
from storage.schema import utc_day
from storage.sink import open_sink
from tests.e2e.harness import Installation, Simulator, burstgate, wait_until
from tests.e2e.load import Ask, fetch
from traces.codec import read_trace
from traces.record import TraceRecord

DAY_S = 86_400


def fill(data_dir: Path, days: int, rows: int, *, gateway: str | None = None) -> list[TraceRecord]:
    """Old days in a new installation's database; today is not among them."""
    data_dir.mkdir()
    engine = open_engine(f"sqlite:///{data_dir / 'burstgate.db'}")
    upgrade(engine)
    today_s = utc_day(time.time()) * DAY_S
    records = [
        TraceRecord(
            f"old-{day}-{n}", today_s - (days - day + 1) * DAY_S + n * 60.5, "secret-session", tenant="secret-tenant",
            model="m", gateway=gateway, upstream="http://secret-upstream",
        )
        for day in range(days) for n in range(rows)
    ]  # fmt: skip
    open_sink(engine).commit(records)
    engine.dispose()
    return records


def test_a_gateway_that_serves_archives_and_prunes(tmp_path: Path) -> None:
    data_dir, archive = tmp_path / "data", tmp_path / "archive"
    old = fill(data_dir, 3, 50)
    settings = {
        "BURSTGATE_RETENTION__MAX_AGE_DAYS": "0.5",
        "BURSTGATE_RETENTION__ARCHIVE": str(archive),
        "BURSTGATE_RETENTION__CHECK_INTERVAL_S": "1",
    }
    with (
        Simulator("--fast") as simulator,
        Installation(simulator.url, data_dir=data_dir, env=settings) as installation,
    ):
        for number in range(5):
            assert asyncio.run(fetch(installation.gateway_url, Ask(f"r{number}", False, 3))).is_whole

        def scrape() -> dict[str, float]:
            text = httpx.get(f"{installation.control_url}/metrics").text
            lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
            return {name: float(value) for name, _, value in lines}

        wait_until(lambda: scrape().get("burstgate_records_pruned_total") == 150, 60.0, "150 records pruned")
        wait_until(lambda: scrape()["burstgate_retention_runs_total"] >= 2, 30.0, "another look")
        values = scrape()
        assert values["burstgate_records_archived_total"] == 150
        assert values["burstgate_retention_failures_total"] == 0
        assert time.time() - values["burstgate_retention_last_success_timestamp_seconds"] < 60
        assert values["burstgate_database_size_bytes"] > 0
        rows = installation.wait_rows(5)
        checks = installation.doctor()
        assert checks["accounting"].is_ok, checks["accounting"].detail
        assert checks["accounting"].detail.startswith("accepted 5 = in database 5 + in journal 0")
        assert checks["retention"].detail.endswith("runs, 150 records taken out")
        installation.stop()  # asserts that no process is left
    output = tmp_path / "all.parquet"
    assert not burstgate(
        "export", "--archive", archive, "--data-dir", data_dir, "--format", "parquet", "-o", output
    ).returncode
    ids = [name for batch in read_trace(output) for name in batch["request_id"]]
    assert ids == [row.request_id for row in (*old, *rows)]


def test_what_retention_can_not_do_is_said(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    fill(data_dir, 1, 3)
    settings = {
        "BURSTGATE_RETENTION__MAX_AGE_DAYS": "0.5",
        "BURSTGATE_RETENTION__ARCHIVE": "nothing://here",
        "BURSTGATE_RETENTION__CHECK_INTERVAL_S": "1",
    }
    with Installation("http://127.0.0.1:9", data_dir=data_dir, env=settings) as installation:
        wait_until(lambda: "retention: archive nothing://here: Protocol not known" in installation.output, 60.0, "word")
        wait_until(lambda: "retention" in installation.doctor(), 15.0, "a finding")
        done = burstgate("doctor", "--json", "--data-dir", data_dir, env=settings)
        check = next(each for each in json.loads(done.stdout) if each["name"] == "retention")
        assert (done.returncode, check["is_ok"]) == (1, False)
        assert "Protocol not known" in check["detail"]
        assert len(installation.rows()) == 3


def test_by_hand(tmp_path: Path) -> None:
    data_dir, archive = tmp_path / "data", tmp_path / "archive"
    old = fill(data_dir, 4, 10)
    here = ("--data-dir", data_dir)

    dry = burstgate("prune", "--older-than", "3d", "--dry-run", *here)
    assert [line.split()[1] for line in dry.stdout.splitlines()] == ["10", "10"]
    assert "2 days, 20 rows would go; nothing was changed" in dry.stderr

    done = burstgate("archive", "--to", archive, "--keep", *here)
    assert done.stderr.splitlines()[-1] == f"{archive}: 4 days, 40 rows there, still in the database"
    done = burstgate("prune", "--older-than", "3d", "--archive", archive, *here)
    assert f"2 days, 20 rows taken out, archived in {archive};" in done.stderr

    for rows, flags in ((20, ()), (40, ("--archive", archive))):
        summary = json.loads(burstgate("stats", "--json", *here, *flags).stdout)
        assert summary["requests"] == rows

    output = tmp_path / "public.parquet"
    done = burstgate(
        "export", "--archive", archive, "--anonymize", "--coarsen", "60s", "--anonymize-models", "--format", "parquet",
        "--session", "secret-session", "-o", output, *here,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (exported,) = read_trace(output)
    assert exported["received_at"].to_list() == [row.received_at // 60 * 60 for row in old]
    assert (exported["session_id"].n_unique(), exported["tenant"].n_unique(), exported["request_id"].n_unique()) == (
        1,
        1,
        40,
    )
    assert set(exported["model"]) == {"model-1"}
    for path in (output, output.with_name("public.parquet.json")):
        assert b"secret" not in path.read_bytes()
        assert b"old-" not in path.read_bytes()
    assert json.loads(output.with_name("public.parquet.json").read_text())["anonymized"]["coarsen_s"] == 60


def test_wrong_words(tmp_path: Path) -> None:
    fill(tmp_path / "data", 1, 1)
    for words, said in (
        (("prune",), "prune: name --older-than, --max-size, both, or --vacuum"),
        (("prune", "--older-than", "30"), "--older-than: expected a duration as 90s, 15m, 12h or 30d, got '30'"),
        (("prune", "--max-size", "big"), "--max-size: expected a size as 50GB or 200MiB, got 'big'"),
        (("archive",), "--to: name a folder or a URL, or set retention.archive"),
    ):
        done = burstgate(*words, "--data-dir", tmp_path / "data")
        assert (done.returncode, done.stderr) == (2, f"burstgate: {said}\n")
