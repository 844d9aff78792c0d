"""The routes' refusals; what they start is tested in tests/e2e/test_injection.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from proxy.control import build_control
from proxy.settings import InjectionSettings, Settings

PLAN = {"model": "m", "rate_rps": 5, "duration_s": 3}


def client(data_dir: Path, **injection: Any) -> TestClient:
    settings = Settings(upstreams=("http://127.0.0.1:9",), data_dir=data_dir, injection=InjectionSettings(**injection))
    return TestClient(build_control(settings, gateway_url="http://127.0.0.1:9"), base_url="http://127.0.0.1")


def test_refused_unless_allowed(tmp_path: Path) -> None:
    answer = client(tmp_path).post("/api/v1/injections", json=PLAN)
    assert answer.status_code == 403
    assert answer.json()["error"] == {
        "message": "injection.allowed: expected true, got false", "type": "injection_not_allowed", "param": None,
        "code": "injection_not_allowed",
    }  # fmt: skip
    assert not (tmp_path / "audit.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ({"json": {**PLAN, "rate_rps": 101}}, 400, "injection.max_rate_rps: expected at most 100 requests/s, got 101"),
        ({"json": {**PLAN, "rate": 1}}, 400, "plan: Object contains unknown field `rate`"),
        ({"json": {}}, 400, "plan: expected a trace, a profile, a rate_rps, a ramp, a preset or faults, got none"),
        ({"json": {**PLAN, "trace": "/x"}}, 400, "plan: trace: expected without profile"),
        (
            {"content": b"[", "headers": {"content-type": "application/json"}},
            400,
            "plan: Expected `object`, got `array`",
        ),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, "content-type: expected application/json"),
        ({"content": b"[" * (1 << 21), "headers": {"content-type": "application/json"}}, 413, "plan: expected at most"),
    ],
)
def test_plans_that_are_none(tmp_path: Path, more: dict[str, Any], status: int, message: str) -> None:
    answer = client(tmp_path, allowed=True).post("/api/v1/injections", **more)
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(message)


def test_unknown_runs(tmp_path: Path) -> None:
    control = client(tmp_path, allowed=True)
    assert control.get("/api/v1/injections").json() == []
    assert control.get("/api/v1/injections/x").status_code == control.delete("/api/v1/injections/x").status_code == 404
    assert control.delete("/api/v1/injections").json()["error"]["message"] == "no injection runs"
