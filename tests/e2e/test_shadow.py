"""Shadow traffic with real processes: mirrored, recorded, compared, replayed, and not lost by `kill -9`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from proxy.cli import main
from storage.query import Filter
from tests.e2e.harness import Installation, Simulator, wait_until
from traces.record import Origin, Outcome, TraceRecord

SHADOWS = Filter(origins=(Origin.SHADOW,))
REQUESTS = 40
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command in this process: (exit status, standard output, standard error)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["burstgate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


def ask(url: str, number: int) -> None:
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        json={"model": "simulated", "max_tokens": 5, "messages": [{"role": "user", "content": f"hello {number}"}]},
        headers={"x-session-id": f"s{number % 4}", "authorization": "Bearer sk-client"},
        timeout=30,
    )
    assert answer.status_code == 200, answer.text


def mirrored(url: str, **more: object) -> dict[str, str]:
    return {"BURSTGATE_MIRROR__TARGETS": json.dumps([{"url": url, "name": "next", **more}])}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Installation, str]]:
    """An installation that has mirrored REQUESTS of four sessions, and its shadow target's URL."""
    data_dir = tmp_path_factory.mktemp("shadow") / "data"
    with (
        Simulator("--fast") as production,
        Simulator("--fast") as staging,
        Installation(production.url, data_dir=data_dir, env=mirrored(staging.url, agreement="exact")) as installation,
    ):
        for number in range(REQUESTS):
            ask(installation.gateway_url, number)
        installation.wait_rows(2 * REQUESTS)
        yield installation, staging.url


def test_each_shadow_is_joined_with_its_primary(recorded: tuple[Installation, str]) -> None:
    installation, _ = recorded
    rows = installation.rows()
    primaries = {row.request_id: row for row in rows if row.origin is Origin.CLIENT}
    shadows = [row for row in rows if row.origin is Origin.SHADOW]
    assert sorted(str(row.shadow_of) for row in shadows) == sorted(primaries)

    def shared(row: TraceRecord) -> tuple[object, ...]:
        return row.session_id, row.model, row.request_tokens, row.response_tokens, row.finish_reason, row.outcome

    assert [shared(row) for row in shadows] == [shared(primaries[str(row.shadow_of)]) for row in shadows]
    assert {row.upstream for row in shadows} == {"next"}
    assert all(row.agreement is not None for row in shadows)
    assert installation.doctor()["accounting"].is_ok
    metrics = httpx.get(f"{installation.control_url}/metrics").text
    assert f"burstgate_mirror_sent_total {REQUESTS}.0" in metrics
    assert f'burstgate_mirror_requests_total{{outcome="ok"}} {REQUESTS}.0' in metrics
    assert f'burstgate_requests_total{{outcome="ok"}} {REQUESTS}.0' in metrics  # the clients' alone


def test_compare_says_what_differs_and_its_status_is_for_gates(recorded: tuple[Installation, str], run: Run) -> None:
    data_dir = recorded[0].data_dir
    loose = ("--failure-tolerance", "0.5", "--latency-tolerance", "1e6", "--finish-tolerance", "0.5",
             "--agreement-tolerance", "2", "--rounds", "50")  # fmt: skip
    found = json.loads(run("compare", "--shadow", "next", "--data-dir", data_dir, "--json", "-", *loose)[1])
    assert (found["pairs"], found["unpaired"], found["target"]) == (REQUESTS, 0, "next")
    known = {axis["name"]: axis["verdict"] for axis in found["axes"] if axis["is_known"]}
    assert (known["outcome"], known["tokens"], known["output"]) == ("same", "same", "same")
    status, out, _ = run("compare", "--shadow", "next", "--data-dir", data_dir, "--rounds", "50")
    assert out.splitlines()[0].strip().endswith(f"next, {REQUESTS} requests beside their primaries")
    assert status in (1, 3)
    for arguments, rule in (
        (("--shadow", "nobody"), "no request to 'nobody' is recorded; there are next"),
        (("--shadow", "next", "a.csv"), "expected without A and B"),
        (("--shadow", "next", "--rounds", "1"), "rounds: expected 20"),
        ((), "expected two traces A and B, or --shadow TARGET"),
    ):
        status, out, err = run("compare", *arguments, "--data-dir", data_dir)
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert rule in err
    assert run("compare", "--shadow", "next", "--to", "1", "--data-dir", data_dir)[0] == 3


def test_what_production_saw_is_replayed_from_the_database(
    recorded: tuple[Installation, str], run: Run, tmp_path: Path
) -> None:
    installation, staging = recorded
    rows = installation.rows(Filter(origins=(Origin.CLIENT,)))
    middle_s = rows[10].received_at

    def replay(*arguments: str) -> tuple[int, str]:
        status, _, err = run(
            "replay", "--from-database", "--data-dir", installation.data_dir, "--target", staging, "--keep-models",
            "--speed", "10", "--quiet", "--samples", tmp_path / "samples.jsonl", *arguments,
        )  # fmt: skip
        return status, err

    status, said = replay("--from", repr(middle_s), "--only-session", "s1")
    assert status in (0, 3), said  # the machine may be too busy for a good run
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    wanted = [row for row in rows[10:] if row.session_id == "s1"]
    assert [sample["session_id"] for sample in samples] == ["s1"] * len(wanted)
    assert replay("--to", "1") == (2, "burstgate: --from-database: no recorded request matches\n")
    assert replay("trace.csv")[0] == 2


def test_a_shadow_in_flight_when_its_worker_is_killed_has_its_record(tmp_path: Path) -> None:
    with (
        Simulator("--fast") as production,
        Simulator("--step-base-s", "30") as staging,
        Installation(production.url, data_dir=tmp_path / "data", env=mirrored(staging.url)) as installation,
    ):
        ask(installation.gateway_url, 0)
        wait_until(lambda: staging.stats().running + staging.stats().waiting == 1, 10, "the shadow is in flight")
        os.kill(installation.pid("worker"), signal.SIGKILL)
        rows = installation.wait_rows(2)
        assert installation.doctor()["accounting"].is_ok
    (primary,) = [row for row in rows if row.origin is Origin.CLIENT]
    (shadow,) = [row for row in rows if row.origin is Origin.SHADOW]
    assert primary.outcome is Outcome.OK
    assert (shadow.outcome, shadow.shadow_of) == (Outcome.GATEWAY_CRASH, primary.request_id)
