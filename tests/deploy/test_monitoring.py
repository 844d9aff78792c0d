"""Alert rules, dashboard, KEDA and the autoscaler ask for metrics that there are; promtool finds the rules good."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from proxy.control import retention_metrics
from proxy.health import State
from proxy.retention import RetentionState
from tests.deploy.test_helm import pick
from tests.proxy.test_control import Installation, scrape_until, serving
from traces.record import Outcome

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every sample's name with its labels, of an installation that has done everything once."""
    installation = Installation(tmp_path_factory.mktemp("data"))
    installation.request(Outcome.OK)
    installation.see(State.UP)
    installation.record()
    with serving(installation.settings) as client:
        scrape_until(client, "burstgate_records_in_database_total")
        text = client.get("/metrics").text
    installation.journal.close()
    found: dict[str, set[str]] = {}
    state = RetentionState(runs=1, last_success_at=1.0, database_bytes=1)
    for family in (*text_string_to_metric_families(text), *retention_metrics(state)):
        found.setdefault(family.name, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    for name in [name.removesuffix("_bucket") for name in found if name.endswith("_bucket")]:
        del found[name]  # a histogram's own name is no series
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Where and what is asked of Prometheus."""
    for rule in RULES:
        yield f"rules.yaml {rule.get('alert', rule.get('record'))}", rule["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"dashboard {panel['title']}", target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield f"dashboard ${variable['name']}", variable["query"]["query"]
    for trigger in yaml.safe_load((DEPLOY / "keda" / "scaledobject.yaml").read_text())["spec"]["triggers"]:
        yield f"keda {trigger['name']}", trigger["metadata"]["query"]
    for metric in pick("everything", "HorizontalPodAutoscaler")["spec"]["metrics"]:
        yield "autoscaler", metric["pods"]["metric"]["name"]


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_metrics_asked_for_are_exported(where: str, expression: str, exported: dict[str, set[str]]) -> None:
    names = set(re.findall(r"\bburstgate_\w+", expression))
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    assert names or set(re.findall(r"burstgate:[\w:]+", expression)) <= recorded
    assert names <= exported.keys(), f"{where}: no such metric"
    for name, matchers in re.findall(r"\b(burstgate_\w+)\{([^}]*)\}", expression):
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert labels <= exported[name] | {"job", "instance"}, f"{where}: {name} has no such label"
    for outcome in re.findall(r'outcome[=!]~"([^"]+)"', expression):
        assert set(outcome.split("|")) <= {each.value for each in Outcome}


@pytest.mark.parametrize("alert", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_alerts_say_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("page", "ticket", "info")
    page, _, section = alert["annotations"]["runbook"].rpartition("docs/")[2].partition("#")
    text = (ROOT / "docs" / page).read_text()
    sections = {line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("#")}
    assert not section or section in sections


def test_each_alert_is_tried_silent_and_loud() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "rules_test.yaml").read_text())["tests"]
    tried = [each for test in tests for each in test["alert_rule_test"]]
    names = {rule["alert"] for rule in ALERTS}
    assert {each["alertname"] for each in tried if each.get("exp_alerts")} == names
    assert {each["alertname"] for each in tried if not each.get("exp_alerts")} == names


@pytest.mark.parametrize("words", [("check", "rules", "rules.yaml"), ("test", "rules", "rules_test.yaml")])
def test_promtool_agrees(words: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool (Debian: prometheus)")
    done = subprocess.run([promtool, *words], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_scrape_configuration(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool (Debian: prometheus)")
    for path in (DEPLOY / "compose" / "prometheus.yaml", DEPLOY / "prometheus" / "rules.yaml"):
        shutil.copy(path, tmp_path)
    command = [promtool, "check", "config", "prometheus.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_lie_side_by_side_and_are_described() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert [panel["title"] for panel in PANELS if not panel.get("description")] == []
    assert {json.dumps(target["datasource"]) for panel in PANELS for target in panel["targets"]} == {
        '{"type": "prometheus", "uid": "${datasource}"}'
    }
