"""Changes through the control plane's API: every worker works with them, and they outlive a stop when asked to."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.harness import Installation, Simulator, burstgate, wait_until

BODY = {"model": "simulated", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def simulators() -> Iterator[tuple[str, str]]:
    with Simulator() as one, Simulator() as two:
        yield one.url, two.url


@contextlib.contextmanager
def running(data_dir: Path, url: str, workers: int = 2) -> Iterator[tuple[Installation, httpx.Client]]:
    with (
        Installation(url, data_dir=data_dir, workers=workers) as gateway,
        httpx.Client(base_url=f"{gateway.control_url}/api/v1", timeout=20.0) as control,
    ):
        yield gateway, control


def applied(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    assert result["workers_late"] == []
    return result


def served_by(gateway: Installation, tries: int = 24) -> set[str]:
    """Who answers, over fresh connections: of every worker."""
    names = set()
    for _ in range(tries):
        answer = httpx.post(f"{gateway.gateway_url}/v1/chat/completions", json=BODY, timeout=20.0)
        assert answer.status_code == 200, answer.text
        names.add(answer.headers["x-burstgate-upstream"])
    return names


def test_upstreams_come_drain_and_go_while_requests_run(tmp_path: Path, simulators: tuple[str, str]) -> None:
    one, two = simulators
    with running(tmp_path, one) as (gateway, control):
        assert served_by(gateway, 4) == {one}
        result = applied(control.post("/upstreams", json={"upstream": {"url": two, "name": "two"}}))
        assert result["took_s"] < 1.0
        assert [each["name"] for each in control.get("/upstreams").json()] == [one, "two"]
        wait_until(lambda: served_by(gateway) == {one, "two"}, 20.0, "both take requests")
        applied(control.patch(f"/upstreams/{one}", json={"drain": True}))
        assert served_by(gateway) == {"two"}
        states = {
            each["name"]: {w["view"]["state"] for w in each["workers"]} for each in control.get("/upstreams").json()
        }
        assert states[one] == {"draining"}
        applied(control.delete(f"/upstreams/{one}"))
        assert [each["name"] for each in control.get("/upstreams").json()] == ["two"]
        last = control.delete("/upstreams/two")
        assert (last.status_code, last.json()["error"]["message"]) == (409, "the last upstream can not be removed")
        unknown = control.patch("/upstreams/nobody", json={"weight": 2})
        assert (unknown.status_code, unknown.json()["error"]["message"]) == (404, "no upstream is named 'nobody'")
        # Back to where it began, in one step.
        applied(control.post("/config/rollback/0"))
        assert served_by(gateway) == {one}
        assert [each["action"] for each in control.get("/audit").json()] == [
            "config.rollback", "config.apply", "config.apply", "config.apply"
        ]  # fmt: skip


def test_settings_outlive_a_restart_always_and_a_stop_when_asked(tmp_path: Path, simulators: tuple[str, str]) -> None:
    with running(tmp_path, simulators[0]) as (gateway, control):
        wrong = control.post("/config", json={"values": {"retry.budget": 7}})
        assert wrong.status_code == 422
        assert "retry.budget" in wrong.json()["error"]["message"]
        for_ever = applied(control.post("/config", json={"values": {"retry.budget": 0.5}, "keep": True, "note": "why"}))
        assert for_ever["changed"] == ["retry.budget: 0.2 -> 0.5"]
        applied(control.post("/config", json={"values": {"retry.max_attempts": 7}}))
        stale = control.post("/config", json={"values": {"retry.budget": 0.1}, "expected": 1})
        assert (stale.status_code, stale.json()["error"]["message"]) == (409, "revision 2 is in force, not 1")
        assert "retry.budget" in burstgate("config", "show", "--data-dir", tmp_path).stdout
        old = gateway.pid("control")
        gateway.process._popen.send_signal(signal.SIGUSR2)
        wait_until(lambda: gateway.pids("control") not in ([], [old]), 30.0, "a new control plane")

        def shown(*keys: str) -> list[str]:
            rows = control.get("/config").json()["settings"]
            return [next(row["value"] for row in rows if row["key"] == key) for key in keys]

        wait_until(lambda: len(gateway.pids("control")) == 1, 30.0, "one control plane")
        assert shown("retry.budget", "retry.max_attempts") == ["0.5", "7"]
        gateway.stop()
        gateway.kill_tree()  # nothing is left; its output is closed
        gateway.start()
        control.base_url = httpx.URL(f"{gateway.control_url}/api/v1")
        assert shown("retry.budget", "retry.max_attempts") == ["0.5", "3"]
        assert [each["note"] for each in control.get("/config/history").json()] == [
            "what was not kept is dropped", "", "why"
        ]  # fmt: skip


def test_a_worker_that_is_replaced_meanwhile_has_the_change_too(tmp_path: Path, simulators: tuple[str, str]) -> None:
    with running(tmp_path, simulators[0], workers=1) as (gateway, control):
        old = gateway.pid("worker")
        applied(control.post("/config", json={"values": {"response_headers.upstream": False}}))
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: gateway.pids("worker") not in ([], [old]), 15.0, "a new worker")

        def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{gateway.gateway_url}/v1/models", timeout=5.0)
                return True
            return False

        wait_until(answers, 15.0, "the new worker answers")
        assert "x-burstgate-upstream" not in httpx.get(f"{gateway.gateway_url}/v1/models").headers
        begun_s = time.monotonic()
        applied(control.post("/config", json={"values": {"response_headers.upstream": None}}))
        assert time.monotonic() - begun_s < 2.0
        assert "x-burstgate-upstream" in httpx.get(f"{gateway.gateway_url}/v1/models").headers


def test_read_only_shows_and_changes_nothing(tmp_path: Path, simulators: tuple[str, str]) -> None:
    one, two = simulators
    with (
        Installation(one, data_dir=tmp_path, flags=("--read-only",)) as gateway,
        httpx.Client(base_url=f"{gateway.control_url}/api/v1", timeout=20.0) as control,
    ):
        refused = control.post("/upstreams", json={"upstream": {"url": two}})
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "read_only")
        assert [each["name"] for each in control.get("/upstreams").json()] == [one]
