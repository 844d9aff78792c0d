"""A real trace replayed through the gateway into a real vLLM: its recording equals its source."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from replay.schedule import Planned, PlanOptions, plan
from tests.e2e.harness import MODEL, Installation, burstgate
from traces.codec import read_trace

SPEED = 500.0
"""Trace seconds a second: a bit over a minute a head, which vLLM on two cores sustains."""
SEED = 3
REPLAY_TIMEOUT_S = 480.0
LATE_S = 0.020
HEADS = ["BurstGPT_1_head.csv", "BurstGPT_3_head.csv"]


@dataclass(frozen=True, slots=True)
class Replayed:
    """A replay as its files tell it.

    plan: the rows that were to be sent. exported: the rows recorded, in order of arrival. places: for each of these,
    its place in the plan, by the request id that the replay gave it.
    """

    source: Path
    plan: list[Planned]
    exported: pl.DataFrame
    places: list[int]
    arrived_s: NDArray[np.float64]
    """After schedule zero."""


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
    summary, recorded, ids = folder / "summary.json", folder / "recorded.csv", folder / "recorded.jsonl"
    with Installation(vllm_url, data_dir=folder / "data") as gateway:
        done = burstgate(
            "replay", source, "--target", gateway.gateway_url, "--model", MODEL, "--speed", str(SPEED),
            "--seed", str(SEED), "--run-id", "head", "--json", summary, "--max-error-rate", "0", "--max-lag", "1",
            "--quiet", timeout_s=REPLAY_TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        gateway.stop()
        assert gateway.doctor()["accounting"].is_ok
    for file, options in ((recorded, ["--format", "burstgpt", "--stamps", "float"]), (ids, ["--format", "jsonl"])):
        done = burstgate("export", *options, "--run-id", "head", "--data-dir", folder / "data", "-o", file)
        assert done.returncode == 0, done.stderr
    told = json.loads(summary.read_text())
    print(f"\n{source.name}: dispatch lag {told['dispatch_lag_s']}, ttft {told['ttft_s']}")
    rows = [row for row in plan(read_trace(source), PlanOptions(speed=SPEED, seed=SEED)) if row.is_sendable]
    place_of = {f"head-{row.index}": place for place, row in enumerate(rows)}
    exported = pl.read_csv(recorded)
    sidecar = json.loads(recorded.with_name(recorded.name + ".json").read_text())
    midnight_s = datetime.datetime.fromisoformat(f"{sidecar['day_zero']}T00:00:00+00:00").timestamp()
    return Replayed(
        source,
        rows,
        exported,
        [place_of[json.loads(line)["client_request_id"]] for line in ids.read_text().splitlines()],
        exported["Timestamp"].to_numpy() + midnight_s - told["started_at"],
    )


def good_rows(source: Path) -> pl.DataFrame:
    """The source's rows that are no failures, read without our codec."""
    return pl.read_csv(source).filter(pl.col("Response tokens") > 0)


@pytest.mark.vllm
@pytest.mark.slow
class TestReplayedHead:
    def test_each_good_row_is_sent_once_and_succeeds(self, replayed: Replayed) -> None:
        assert replayed.exported.height == good_rows(replayed.source).height
        assert sorted(replayed.places) == list(range(len(replayed.plan)))
        assert (replayed.exported["Response tokens"] > 0).all()

    def test_columns_are_the_sources_row_by_row(self, replayed: Replayed) -> None:
        source = good_rows(replayed.source)
        columns = ["Request tokens", "Response tokens", "Total tokens", "Log Type"]
        assert replayed.exported.select(columns).rows() == source.select(columns)[replayed.places].rows()
        if "Session ID" in source.columns:
            assert replayed.exported["Session ID"].to_list() == source["Session ID"][replayed.places].to_list()
            assert source["Session ID"].n_unique() > 100
        else:
            assert replayed.exported["Session ID"].null_count() == source.height

    def test_rows_are_in_the_sources_order(self, replayed: Replayed) -> None:
        """But for those that the spreading of equal stamps puts closer together than arrivals are exact."""
        due_s = np.array([replayed.plan[place].due_s for place in replayed.places])
        steps_back_s = np.maximum.accumulate(due_s) - due_s
        print(f"out of order: {np.count_nonzero(steps_back_s)} rows, by at most {steps_back_s.max() * 1e3:.2f} ms")
        assert steps_back_s.max() <= LATE_S

    def test_arrivals_are_on_schedule(self, replayed: Replayed) -> None:
        late_s = replayed.arrived_s - np.array([replayed.plan[place].due_s for place in replayed.places])
        print(f"arrival - schedule, ms: {np.percentile(late_s * 1e3, [0, 1, 50, 90, 99, 100]).round(2).tolist()}")
        worst = [(replayed.plan[replayed.places[i]], f"{late_s[i] * 1e3:.0f} ms") for i in np.argsort(-late_s)[:8]]
        print(
            "latest:", *[f"{row.index} due {row.due_s:.1f} s, {row.request_tokens} tokens: {ms}" for row, ms in worst]
        )
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
