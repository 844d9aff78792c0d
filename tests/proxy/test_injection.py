"""A plan, and an injector in this process before a real simulator, with live traffic's counters of a real journal."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy import guard_rails
from proxy.exchange import uuid7
from proxy.fault_lease import read_lease
from proxy.faults import FaultPlan
from proxy.injection import (
    K_RAMP_RPS,
    Injector,
    Plan,
    Status,
    Task,
    check_plan,
    decode_plan,
    injector_pid,
    planned_rows,
)
from proxy.settings import InjectionSettings, Settings
from proxy.telemetry import WORKER_COUNTERS, WorkerMetrics
from storage.journal import JournalWriter
from tests.e2e.harness import Simulator
from traces.generation import fixed_lengths, plain_profile
from traces.profile import encode_profile
from traces.record import Outcome

URL = "http://127.0.0.1:9"
HEADER = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def plan_of(**fields: Any) -> Plan:
    return msgspec.convert(fields, Plan)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    lines = [f"{second},,1,m,10,5,15,API log\n" for second in range(100)]
    (folder / "trace.csv").write_text(HEADER + "".join(lines))
    profile = plain_profile(fixed_lengths(10, 5))
    failing = msgspec.structs.replace(profile.services[0], failure_share=0.25, requests=100)
    (folder / "profile.json").write_bytes(encode_profile(msgspec.structs.replace(profile, services=(failing,))))
    return folder


# The plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        (b"rate_rps: 5\nmodel: m\nduration_s: 3\n", plan_of(rate_rps=5.0, model="m", duration_s=3.0)),
        (b'{"preset": "k-ramp", "model": "m"}', plan_of(preset="k-ramp", model="m")),
        (b"{duration_s: 9, faults: {reset: 0.5}}", plan_of(duration_s=9.0, faults={"reset": 0.5})),
    ],
)
def test_a_plan_is_yaml_or_json(text: bytes, plan: Plan) -> None:
    assert decode_plan(text, "plan") == plan
    assert decode_plan(msgspec.json.encode(plan), "plan") == plan


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (b"", "p.yaml: Expected `object`, got `null`"),
        (b"{", "p.yaml: expected a plan in YAML or JSON"),
        (b"\xff", "p.yaml: expected a plan in YAML or JSON"),
        (b"rate: 5", "p.yaml: .*unknown field `rate`"),
        (b"model: m", "p.yaml: expected a trace, a profile, a rate_rps, a ramp, a preset or faults, got none"),
        (b"rate_rps: 5", "p.yaml: model: expected the model to ask for, got none"),
        (b"{rate_rps: 5, model: m}", "p.yaml: expected duration_s or requests, got neither"),
        (b"{rate_rps: 5, preset: k-ramp, model: m}", "expected one of rate_rps, ramp and preset, got several"),
        (b"{trace: t, rate_rps: 5}", "trace: expected without"),
        (b"{profile: t, shape: 5, model: m, duration_s: 1}", "shape: expected with rate_rps, ramp or preset"),
        (b"{rate_rps: 5, model: m, duration_s: 0}", "duration_s: expected a number above 0, got 0"),
        (b"{faults: {reset: 0.5}}", "duration_s: expected with faults alone, got none"),
        (b"{faults: {reset: 2}, duration_s: 1}", "faults: reset: expected a share of 0 to 1, got 2"),
    ],
)
def test_a_plan_that_is_none_is_one_line(text: bytes, rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as error:
        decode_plan(text, "p.yaml")
    assert "\n" not in str(error.value)


def test_k_ramp_climbs_to_64_and_back() -> None:
    due_s = [row.due_s for row in planned_rows(plan_of(preset="k-ramp", model="m", duration_s=110.0))]
    counts = [sum(1 for each in due_s if step * 10 <= each < step * 10 + 10) for step in range(len(K_RAMP_RPS))]
    for count, rate_rps in zip(counts, K_RAMP_RPS, strict=True):
        assert count == pytest.approx(rate_rps * 10, abs=4 * (rate_rps * 10) ** 0.5 + 5)


@pytest.mark.parametrize(
    ("fields", "rows", "last_s"),
    [
        ({"trace": "trace.csv"}, 100, 100.0),
        ({"trace": "trace.csv", "start_s": 10.0, "duration_s": 20.0}, 20, 20.0),
        ({"trace": "trace.csv", "duration_s": 20.0, "speed": 10.0}, 20, 2.0),
        ({"trace": "trace.csv", "duration_s": 20.0, "amplify": 3.0}, 60, 81.0),  # copies come up to a minute later
        ({"trace": "trace.csv", "requests": 7}, 7, 8.0),
        ({"model": "m", "ramp": [[0, 10], [5, 0]], "duration_s": 10.0}, None, 5.0),
        ({"model": "m", "rate_rps": 10.0, "amplify": 2.0, "duration_s": 50.0, "speed": 5.0}, None, 10.0),
        ({"model": "m", "profile": "profile.json", "rate_rps": 10.0, "duration_s": 20.0}, None, 20.0),
    ],
)
def test_rows_of_each_source(files: Path, fields: dict[str, Any], rows: int | None, last_s: float) -> None:
    for name in ("trace", "profile"):
        if name in fields:
            fields = {**fields, name: str(files / fields[name])}
    found = list(planned_rows(plan_of(**fields)))
    assert rows is None or len(found) == rows
    assert 0.5 * last_s <= found[-1].due_s <= last_s
    assert found == list(planned_rows(plan_of(**fields)))  # the same seed, the same burst


@pytest.mark.parametrize(
    ("fields", "limits", "rule"),
    [
        (
            {"rate_rps": 101.0, "duration_s": 1.0},
            {},
            "injection.max_rate_rps: expected at most 100 requests/s, got 101",
        ),
        ({"preset": "k-ramp", "amplify": 2.0}, {}, "injection.max_rate_rps: .* got 128"),
        ({"rate_rps": 20.0, "speed": 6.0, "duration_s": 1.0}, {}, "injection.max_rate_rps: .* got 120"),
        ({"rate_rps": 1.0, "duration_s": 601.0}, {}, "injection.max_duration_s: expected at most 600 s, got 601 s"),
        ({"duration_s": 1.0, "faults": {"reset": 0.6}}, {"max_share": 0.5}, "injection.max_share: .* 0.5, got 0.6"),
        ({"trace": "/nowhere"}, {}, "plan: trace: expected a file, got '/nowhere'"),
        ({"trace": "/etc/passwd"}, {"trace_dir": Path("/nowhere")}, "expected a file in injection.trace_dir"),
        ({"rate_rps": 1.0, "duration_s": 1.0, "request_tokens": 0}, {}, "request tokens: expected 1 to"),
    ],
)
def test_plans_past_a_ceiling_are_refused(fields: dict[str, Any], limits: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        check_plan(plan_of(model="m", **fields), InjectionSettings(allowed=True, **limits), URL)


# The injector ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulator() -> Iterator[str]:
    with Simulator("--fast", "--models", "m") as started:
        yield started.url


class Bench:
    """An injector at the simulator, beside live traffic that the test makes up."""

    def __init__(self, data_dir: Path, url: str) -> None:
        self.data_dir = data_dir
        self._url = url
        self.writer = JournalWriter(
            data_dir / "journal", uuid7(time.time()), gateway="test", counter_names=WORKER_COUNTERS
        )
        self.metrics = WorkerMetrics(self.writer.slots)
        self.said: list[Status] = []

    def injector(self, plan: dict[str, Any], **limits: Any) -> Injector:
        settings = Settings(data_dir=self.data_dir, injection=InjectionSettings(allowed=True, **limits))
        return Injector(Task({}, plan_of(**plan), self._url, "run", "user"), settings, self.said.append)

    def run(self, plan: dict[str, Any], **limits: Any) -> tuple[Status, float]:
        """How it ended, and how long it took."""
        injector = self.injector(plan, **limits)
        began_s = time.monotonic()
        asyncio.run(injector.run())
        return injector.ended(), time.monotonic() - began_s


@pytest.fixture
def bench(tmp_path: Path, simulator: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(guard_rails, "CHECK_S", 0.1)
    made = Bench(tmp_path, simulator)
    yield made
    made.writer.close()


BURST = {"model": "m", "rate_rps": 50.0, "duration_s": 20.0, "request_tokens": 20, "response_tokens": 3}
FOREVER_S = 10.0


def test_a_plan_that_ends_is_completed(bench: Bench) -> None:
    status, _ = bench.run({**BURST, "duration_s": 0.5})
    assert (status.state, status.reason) == ("completed", "the plan is done")
    assert status.sent == status.ok > 5
    assert [each.state for each in bench.said][-1] == "running"


@pytest.mark.parametrize(
    ("live", "limits", "rule"),
    [
        ((Outcome.UPSTREAM_ERROR, None), {}, "injection.stop_failure_rate: 1 of live requests failed"),
        ((Outcome.OK, 7.0), {}, "injection.stop_ttft_p95_s: 9"),
        ((Outcome.OK, 0.01), {"max_share": 0.05}, "injection.max_share: 0."),
    ],
)
def test_live_traffic_that_suffers_stops_it(
    bench: Bench, live: tuple[Outcome, float | None], limits: dict[str, Any], rule: str
) -> None:
    is_over = threading.Event()

    def suffer() -> None:
        while not is_over.wait(0.05):
            for _ in range(5):
                bench.metrics.live_ended(*live)

    suffering = threading.Thread(target=suffer)
    suffering.start()
    try:
        status, took_s = bench.run(BURST, **limits)
    finally:
        is_over.set()
        suffering.join()
    assert status.state == "tripped"
    assert (status.reason or "").startswith(rule)
    assert took_s < FOREVER_S
    assert status.sent < 900


@pytest.mark.parametrize(
    ("plan", "limits", "rule", "most"),
    [
        ({}, {"max_rate_rps": 50.0, "max_tokens": 230}, "injection.max_tokens", 10),
        ({"shape": 0.05}, {"max_rate_rps": 50.0}, "injection.max_rate_rps", 500),
        ({"duration_s": None, "requests": 10_000}, {"max_duration_s": 0.5}, "injection.max_duration_s", 60),
    ],
)
def test_ceilings_end_it(bench: Bench, plan: dict[str, Any], limits: dict[str, Any], rule: str, most: int) -> None:
    status, took_s = bench.run({**BURST, **plan}, **limits)
    assert status.state == "tripped"
    assert (status.reason or "").startswith(rule)
    assert status.sent <= most
    assert took_s < FOREVER_S


def test_counters_that_can_not_be_read_stop_it(bench: Bench) -> None:
    bench.writer.close()
    for path in (bench.data_dir / "journal").rglob("counters"):
        path.unlink()
    status, _ = bench.run(BURST)
    assert (status.state, status.reason) == ("tripped", "live traffic's counters can not be read")


def test_faults_hold_as_long_as_the_run(bench: Bench, files: Path) -> None:
    held: list[object] = []
    injector = bench.injector({"duration_s": 0.5, "failures_like": str(files / "profile.json")})
    looking = threading.Timer(0.35, lambda: held.append(read_lease(bench.data_dir, time.time())))
    looking.start()
    asyncio.run(injector.run())
    looking.join()
    assert injector.ended().state == "completed"
    (lease,) = held
    assert lease is not None
    assert getattr(lease, "faults") == FaultPlan(status_500=1.0, failure_shares={"API log": 0.25})  # noqa: B009
    assert read_lease(bench.data_dir, time.time()) is None


def test_a_target_without_the_model_is_a_failure(bench: Bench) -> None:
    status, _ = bench.run({**BURST, "model": "nobody"})
    assert status.state == "failed"
    assert (status.reason or "").startswith("model 'nobody': the target")


def test_a_stale_lock_is_nobody(tmp_path: Path) -> None:
    assert injector_pid(tmp_path) is None
    (tmp_path / "injection.lock").write_text("1\n")  # a living process, which does not hold it
    assert injector_pid(tmp_path) is None
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys; file = open(sys.argv[1], 'a+b'); fcntl.flock(file, 2);"
         " file.truncate(0); file.write(b'%d' % __import__('os').getpid()); file.flush(); print(flush=True);"
         " sys.stdin.read()", str(tmp_path / "injection.lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert injector_pid(tmp_path) == holder.pid != os.getpid()
        holder.kill()
    assert injector_pid(tmp_path) is None
