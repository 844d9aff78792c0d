"""Bursts and faults through a whole installation: what is recorded, what clients see, and what ends it."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from proxy.audit import read_audit
from storage.engine import open_engine
from storage.query import Filter
from storage.runs import read_runs
from tests.e2e.harness import Installation, Simulator, burstgate, wait_until
from traces.record import Origin, Outcome

MODEL = "m"
BURST = {"model": MODEL, "rate_rps": 40.0, "request_tokens": 20, "response_tokens": 3}


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    settings = {"BURSTGATE_INJECTION__ALLOWED": "true", "BURSTGATE_INJECTION__MAX_RATE_RPS": "200"}
    with (
        Simulator("--fast", "--models", MODEL) as upstream,
        Installation(upstream.url, data_dir=tmp_path_factory.mktemp("data"), env=settings) as started,
    ):
        yield started


def api(serving: Installation, method: str, path: str = "", **more: Any) -> httpx.Response:
    return httpx.request(method, f"{serving.control_url}/api/v1/injections{path}", timeout=30.0, **more)


def started(serving: Installation, **plan: Any) -> str:
    answer = api(serving, "POST", json=plan)
    assert answer.status_code == 201, answer.text
    run_id: str = answer.json()["run_id"]
    return run_id


def status_of(serving: Installation, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api(serving, "GET", f"/{run_id}").json()
    return found


def wait_over(serving: Installation, run_id: str) -> dict[str, Any]:
    wait_until(lambda: status_of(serving, run_id)["ended_at"] is not None, 20.0, "the injection has ended")
    wait_until(lambda: not (serving.data_dir / "faults.json").exists(), 5.0, "no faults are left")
    return status_of(serving, run_id)


def ask(serving: Installation, text: str = "hi", **headers: str) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 3}
    return httpx.post(f"{serving.gateway_url}/v1/chat/completions", json=body, headers=headers, timeout=20.0)


def test_a_burst_is_recorded_apart_and_leaves_live_traffic_as_it_is(serving: Installation) -> None:
    run_id = started(serving, **BURST, duration_s=1.5, run_id="burst-1")
    assert run_id == "burst-1"
    answers = []
    while status_of(serving, run_id)["ended_at"] is None:
        answers.append(ask(serving).status_code)
        time.sleep(0.05)
    status = wait_over(serving, run_id)
    assert (status["state"], status["reason"]) == ("completed", "the plan is done")
    assert status["sent"] == status["ok"] > 30
    injected = serving.wait_rows(status["sent"] + 1, selection=Filter(run_ids=(run_id,)))  # and the question for models
    assert {(row.origin, row.outcome) for row in injected} == {(Origin.INJECTED, Outcome.OK)}
    live = serving.wait_rows(len(answers), selection=Filter(without_origins=(Origin.INJECTED,)))
    assert {(row.origin, row.run_id, row.outcome, row.response_tokens) for row in live} == {
        (Origin.CLIENT, None, Outcome.OK, 3)
    }
    assert set(answers) == {200}

    done = burstgate("stats", "--json", "--data-dir", serving.data_dir)
    assert msgspec.json.decode(done.stdout)["requests"] == len(answers), done.stderr
    audit = [(each.action, each.detail["run_id"]) for each in read_audit(serving.data_dir)]
    assert ("injection.start", run_id) in audit
    assert ("injection.end", run_id) in audit
    engine = open_engine(serving.database_url)
    (stored,) = read_runs(engine, run_id)
    engine.dispose()
    assert (stored.sent, stored.verdict) == (status["sent"], "good")
    assert msgspec.json.decode(stored.summary)["injection"]["reason"] == "the plan is done"


def test_no_client_passes_for_the_injector(serving: Installation) -> None:
    claims = {"x-burstgate-origin": "injected", "x-burstgate-injection": "0" * 32, "x-burstgate-run-id": "claimed"}
    assert ask(serving, **claims).status_code == 200
    (row,) = serving.wait_rows(1, selection=Filter(run_ids=("claimed",)))
    assert row.origin is Origin.CLIENT


def test_the_kill_switch_and_one_at_a_time(serving: Installation) -> None:
    run_id = started(serving, **BURST, duration_s=60.0)
    wait_until(lambda: status_of(serving, run_id)["sent"] > 0, 20.0, "it sends")
    second = api(serving, "POST", json={**BURST, "duration_s": 1.0})
    assert second.status_code == 409
    assert second.json()["error"]["message"] == f"another injection runs: {run_id}"
    began_s = time.monotonic()
    answer = api(serving, "DELETE", headers={"x-burstgate-actor": "an operator"})
    assert time.monotonic() - began_s < 2.0
    assert (answer.json()["state"], answer.json()["reason"]) == ("stopped", "stopped by an operator (127.0.0.1)")
    assert api(serving, "DELETE").status_code == 404


def test_failing_live_traffic_stops_a_burst_within_two_seconds(serving: Installation) -> None:
    run_id = started(serving, **BURST, duration_s=60.0)
    wait_until(lambda: status_of(serving, run_id)["sent"] > 40, 20.0, "it sends")
    gateway = httpx.URL(serving.gateway_url)
    for _ in range(30):  # clients that leave
        with socket.create_connection((gateway.host, gateway.port or 80)) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 10\r\n\r\n{")
            time.sleep(0.01)
    began_s = time.monotonic()
    status = wait_over(serving, run_id)
    assert status["state"] == "tripped"
    assert status["reason"].startswith("injection.stop_failure_rate")
    assert time.monotonic() - began_s < 3.0
    assert 'burstgate_injections_total{state="tripped"} 1.0' in httpx.get(f"{serving.control_url}/metrics").text


SEEN_AS = {
    (openai.RateLimitError, 429),
    (openai.InternalServerError, 500),
    (openai.InternalServerError, 503),
    (openai.APIConnectionError, None),  # a reset, and a truncated answer
    (openai.APITimeoutError, None),  # a stall
}


def test_the_openai_sdk_sees_faults_as_such(serving: Installation) -> None:
    def counts() -> dict[str, float]:
        lines = httpx.get(f"{serving.control_url}/metrics").text.splitlines()
        names = ("burstgate_injected_faults_total", "burstgate_live_failures_total")
        return {name: float(line.split()[1]) for line in lines for name in names if line.startswith(f"{name} ")}

    shares = {"status_429": 0.15, "status_500": 0.15, "status_503": 0.15, "reset": 0.15, "truncate": 0.15, "stall": 0.1}
    before, recorded = counts(), len(serving.rows(Filter(origins=(Origin.CLIENT,))))
    run_id = started(serving, duration_s=60.0, faults={**shares, "seed": 3})
    wait_until((serving.data_dir / "faults.json").exists, 20.0, "the faults hold")
    time.sleep(0.5)
    seen: Counter[tuple[type[Exception] | None, int | None]] = Counter()
    with openai.OpenAI(base_url=f"{serving.gateway_url}/v1", api_key="k", max_retries=0, timeout=0.5) as client:
        for _ in range(60):
            try:
                client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=3)
                seen[None, None] += 1
            except openai.APIStatusError as error:
                seen[type(error), error.status_code if error.type == "injected_fault" else -1] += 1
            except openai.APIError as error:
                seen[type(error), None] += 1
    assert seen.keys() == {*SEEN_AS, (None, None)}  # an upstream ejected for them would be 502
    assert status_of(serving, run_id)["state"] == "running"  # its own failures do not stop it
    api(serving, "DELETE")
    after, faults = counts(), 60 - seen[None, None]
    assert after["burstgate_injected_faults_total"] - before["burstgate_injected_faults_total"] == faults
    assert after["burstgate_live_failures_total"] == before["burstgate_live_failures_total"]
    rows = serving.wait_rows(recorded + 60, selection=Filter(origins=(Origin.CLIENT,)))[recorded:]
    assert {(row.outcome, row.status) for row in rows if row.error_type == "injected_fault"} == {
        (Outcome.REJECTED, 429),
        (Outcome.UPSTREAM_ERROR, 500),
        (Outcome.UPSTREAM_ERROR, 503),
        (Outcome.UPSTREAM_ERROR, None),
        (Outcome.TRUNCATED, 200),
        (Outcome.CLIENT_GONE, None),
    }
    assert sum(row.error_type == "injected_fault" for row in rows) == faults


def test_the_command_watches_and_says_how_it_ended(serving: Installation, tmp_path: Path) -> None:
    control = ("--control", serving.control_url)
    flags = ("--rate", "40", "--model", MODEL, "--request-tokens", "20", "--response-tokens", "3")
    done = burstgate("inject", *flags, "--duration", "1", "--watch", *control)
    assert (done.returncode, "the plan is done" in done.stdout) == (0, True), done.stderr
    refused = burstgate("inject", *flags, "--duration", "9999", "--watch", *control)
    assert refused.returncode == 2
    assert refused.stderr == "burstgate: injection.max_duration_s: expected at most 600 s, got 9999 s\n"
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"{{model: {MODEL}, rate_rps: 190, shape: 0.02, duration_s: 60, request_tokens: 5}}")
    tripped = burstgate("inject", plan, "--watch", *control)
    assert tripped.returncode == 1, tripped.stdout
    assert "injection.max_rate_rps: more than 200 requests in 1 s" in tripped.stdout
    assert burstgate("inject", "--stop", *control).returncode == 1  # nothing runs


def test_an_injection_ends_with_its_control_plane(serving: Installation) -> None:
    run_id = started(serving, **BURST, duration_s=60.0, faults={"status_503": 1.0}, run_id="orphan")
    wait_until(lambda: status_of(serving, run_id)["sent"] > 0, 20.0, "it sends")
    wait_until(lambda: ask(serving).status_code == 503, 10.0, "the faults hold")
    os.kill(serving.pid("control"), signal.SIGKILL)

    def ended() -> bool:
        found = [each for each in read_audit(serving.data_dir) if each.detail.get("run_id") == run_id]
        return any(each.action == "injection.end" for each in found)

    wait_until(ended, 5.0, "the end is in the audit")
    wait_until(lambda: ask(serving).status_code == 200, 5.0, "the faults have ended")
