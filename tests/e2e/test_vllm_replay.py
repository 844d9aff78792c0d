"""A real trace replayed through the gateway into a real vLLM: its recording equals its source."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from replay.schedule import Planned, PlanOptions, plan
from tests.e2e.harness import MODEL, Installation, burstgate
from traces.codec import read_trace

SPEED = 300.0
"""Trace seconds a second: about two minutes a head, which two cores sustain."""
SEED = 3
REPLAY_TIMEOUT_S = 480.0
LATE_S = 0.020
HEADS = ["BurstGPT_1_head.csv", "BurstGPT_3_head.csv"]


@dataclass(frozen=True, slots=True)
class Replayed:
    """A replay as its files tell it. plan: the rows that were to be sent. exported: the rows recorded, in order."""

    source: Path
    plan: list[Planned]
    summary: dict[str, object]
    started_at: float
    exported: pl.DataFrame
    sidecar: dict[str, object]


def source_of(real_traces: Path, head: str) -> Path:
    source = real_traces / head
    if not source.exists():
        pytest.skip(f"needs {source} (BURSTGATE_TRACES)")
    return source


@pytest.fixture(scope="module", params=HEADS)
def replayed(
    request: pytest.FixtureRequest, real_traces: Path, vllm_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Replayed:
    source = source_of(real_traces, request.param)
    folder = tmp_path_factory.mktemp(source.stem)
    summary, recorded = folder / "summary.json", folder / "recorded.csv"
    with Installation(vllm_url, data_dir=folder / "data") as gateway:
        done = burstgate(
            "replay", source, "--target", gateway.gateway_url, "--model", MODEL, "--speed", str(SPEED),
            "--seed", str(SEED), "--run-id", "head", "--json", summary, "--max-error-rate", "0", "--quiet",
            timeout_s=REPLAY_TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        gateway.stop()
        assert gateway.doctor()["accounting"].is_ok
    done = burstgate(
        "export", "--format", "burstgpt", "--stamps", "float", "--run-id", "head",
        "--data-dir", folder / "data", "-o", recorded,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(summary.read_text())
    print(done.stderr, json.dumps(told))
    return Replayed(
        source,
        [row for row in plan(read_trace(source), PlanOptions(speed=SPEED, seed=SEED)) if row.is_sendable],
        told,
        told["workload"]["started_at"],
        pl.read_csv(recorded),
        json.loads(recorded.with_name(recorded.name + ".json").read_text()),
    )


def good_rows(source: Path) -> pl.DataFrame:
    """The source's rows that are no failures, read without our codec."""
    return pl.read_csv(source).filter(pl.col("Response tokens") > 0)


@pytest.mark.vllm
@pytest.mark.slow
class TestReplayedHead:
    def test_each_good_row_is_sent_once_and_succeeds(self, replayed: Replayed) -> None:
        assert replayed.exported.height == good_rows(replayed.source).height
        assert replayed.exported["Response tokens"].min() > 0  # type: ignore[operator]

    def test_tokens_are_the_sources_row_by_row(self, replayed: Replayed) -> None:
        columns = ["Request tokens", "Response tokens", "Total tokens", "Log Type"]
        assert replayed.exported.select(columns).rows() == good_rows(replayed.source).select(columns).rows()

    def test_sessions_are_the_sources(self, replayed: Replayed) -> None:
        source = good_rows(replayed.source)
        sessions = source["Session ID"] if "Session ID" in source.columns else pl.Series([None] * source.height)
        assert replayed.exported["Session ID"].to_list() == sessions.to_list()

    def test_arrivals_are_on_schedule(self, replayed: Replayed) -> None:
        midnight_s = datetime.datetime.fromisoformat(f"{replayed.sidecar['day_zero']}T00:00:00+00:00").timestamp()
        arrived_s = replayed.exported["Timestamp"].to_numpy() + midnight_s - replayed.started_at
        late_s = arrived_s - np.array([row.due_s for row in replayed.plan])
        print(f"arrival - schedule, ms: {np.percentile(late_s * 1e3, [0, 1, 50, 90, 99, 100]).round(2).tolist()}")
        assert np.percentile(np.abs(late_s), 99) <= LATE_S


@pytest.mark.parametrize("head", HEADS)
def test_export_of_an_import_is_byte_identical(head: str, real_traces: Path, tmp_path: Path) -> None:
    source, copy = source_of(real_traces, head), tmp_path / "copy.csv"
    done = burstgate("import", source, "--data-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    done = burstgate("export", "-o", copy, "--run-id", source.stem, "--data-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == source.read_bytes()
    sidecar = json.loads(copy.with_name("copy.csv.json").read_text())
    assert (sidecar["rows_written"], sidecar["filters"]) == (400, {"run_ids": [source.stem]})
    done = burstgate("export", "-o", tmp_path / "origin.csv", "--origin", "imported", "--data-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "origin.csv").read_bytes() == source.read_bytes()
