"""The live stream over HTTP, and how its figures follow from what is counted."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxy import control_live
from proxy.control_live import Baseline, Reading, models_of, point_of, rules_of
from proxy.shaping_view import RuleView, ShapingView
from proxy.telemetry import CountersReader
from tests.proxy.test_control import Installation, serving
from traces.record import Outcome


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Installation, httpx.Client]]:
    installation = Installation(tmp_path_factory.mktemp("live"))
    with contextlib.closing(installation.journal), serving(installation.settings) as client:
        yield installation, client


def events(text: str) -> list[dict[str, Any]]:
    """Each event's fields; `data` decoded."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append({**fields, "data": json.loads(fields["data"])})
    return found


def watch(client: httpx.Client, count: int, last: str | None = None) -> list[dict[str, Any]]:
    headers = {} if last is None else {"last-event-id": last}
    answer = client.get("/api/v1/live", params={"events": count}, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    return events(answer.text)


def test_history_then_an_event_a_second(control: tuple[Installation, httpx.Client]) -> None:
    installation, client = control
    watch(client, 1)  # it samples
    for outcome in (Outcome.OK, Outcome.OK, Outcome.UPSTREAM_ERROR):
        installation.request(outcome)
    history, *nows = watch(client, 3)
    assert (history["event"], history["retry"]) == ("history", "1000")
    assert {now["event"] for now in nows} == {"now"}
    points = [now["data"]["point"] for now in nows]
    assert all(0.5 < after["at"] - before["at"] < 5 for before, after in itertools.pairwise(points))
    last = nows[-1]["data"]
    (model,) = last["models"]
    assert (model["name"], model["requests_rps"] > model["failures_rps"] > 0) == ("m", True)
    assert model["ttft_s"] == [0.0175, 0.02425, 0.02485], "inside the bucket from 10 to 25 ms"
    (upstream,) = last["upstreams"]
    assert (upstream["name"], upstream["states"], upstream["drain"]) == ("http://user-a:8000", {}, False)
    assert (last["rules"], last["workers_wanted"], last["baseline_rps"]) == ([], 2, None)
    assert last["journal_bytes"] > 0


def test_who_comes_back_gets_what_was_missed(control: tuple[Installation, httpx.Client]) -> None:
    _, client = control
    first = watch(client, 2)
    seen = first[-1]["data"]["point"]["at"]
    missed = watch(client, 0, first[-1]["id"])[0]["data"]["points"]
    assert all(point["at"] > seen for point in missed)
    everything = watch(client, 0)[0]["data"]["points"]
    assert len(everything) > len(missed)
    for strange in ("1-1", "rubbish", "", "-", f"{first[-1]['id']}9999", "9" * 4000):
        assert len(watch(client, 0, strange)[0]["data"]["points"]) >= len(everything), strange


def test_viewers_are_bounded_and_leave_their_places(
    control: tuple[Installation, httpx.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client = control
    monkeypatch.setattr(control_live, "MAX_VIEWERS", 2)
    with client.stream("GET", "/api/v1/live") as one, client.stream("GET", "/api/v1/live") as two:
        assert (one.status_code, two.status_code) == (200, 200)
        refused = client.get("/api/v1/live")
        assert refused.status_code == 503
        assert refused.json()["error"]["message"].startswith("2 streams are open, as many as may be")
    deadline_s = time.monotonic() + 20
    while client.get("/api/v1/live", params={"events": 0}).status_code != 200:
        assert time.monotonic() < deadline_s, "a viewer that has left keeps its place"
        time.sleep(0.05)


def read(installation: Installation, at_s: float) -> Reading:
    return Reading(at_s, CountersReader(installation.settings.journal_dir).read(), {})


def test_a_point_is_what_moved_within_its_second(tmp_path: Path) -> None:
    installation = Installation(tmp_path)
    with contextlib.closing(installation.journal):
        installation.request(Outcome.OK)
        first = read(installation, 100.0)
        for outcome in (Outcome.OK, Outcome.CLIENT_GONE):
            installation.request(outcome)
        installation.metrics.live_ended(Outcome.OK, 0.02)
        before = read(installation, 109.0)
        installation.request(Outcome.OK)
        installation.request(None)
        point = point_of(before, read(installation, 109.5), first, is_burst=False)
    assert point.arrivals_rps == 4.0  # two in half a second
    assert point.outcomes_rps == {"ok": 2.0}
    assert (point.live_rps, point.injected_rps) == (0.0, 2.0)
    assert (point.request_tokens_per_s, point.response_tokens_per_s) == (14.0, 6.0)
    assert point.in_flight == 1
    assert point.tpot_s == (0.0075, 0.00975, 0.00995)
    nothing = point_of(before, dataclasses.replace(before, at_s=110.0), before, is_burst=True)
    assert (nothing.outcomes_rps, nothing.ttft_s, nothing.is_burst) == ({}, (), True)
    assert models_of(before, dataclasses.replace(before, at_s=110.0)) == ()


@pytest.mark.parametrize(
    ("windows", "rate_rps", "expected"),
    [
        ([], 100.0, False),  # nothing is known to be usual
        ([10, 10], 100.0, False),
        ([10, 10, 10], 20.0, False),  # over twice, not twice
        ([10, 10, 10], 20.1, True),
        ([10, 0, 0, 0, 10, 10], 21.0, True),  # a quiet night does not make the morning a burst
        ([10, 0, 0, 0, 10, 10], 19.0, False),
        ([0.1, 0.1, 0.1], 1.9, False),  # a few requests are none
        ([0.1, 0.1, 0.1], 2.0, True),
    ],
)
def test_burst(windows: list[float], rate_rps: float, expected: bool) -> None:
    baseline = Baseline()
    for rate in windows:
        baseline.add(rate)
    assert baseline.is_burst(rate_rps) is expected


def test_rules_are_summed_over_workers() -> None:
    views = {
        "a": ShapingView((RuleView("all", 3, 1, 2, 8), RuleView("one", 0, 0, 0, None)), None, False),
        "b": ShapingView((RuleView("all", 1, 1, 0, 4),), None, False),
    }
    assert rules_of(views) == {"all": (2, 4, 2, 12), "one": (0, 0, 0, None)}
