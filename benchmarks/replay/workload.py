"""What is replayed: bursty schedules on whole milliseconds, each written in every format that a tool reads.

One trace of ours (Parquet) is made with fixed seeds; `burstgate convert` makes of it the file of each tool, so that all
replay the same rows. Gaps are Gamma of shape 0.25 (CV 2); prompts about 120 tokens, answers about 45, log-normal.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from benchmarks.gateway.processes import BenchError
from traces.batch import complete_batch
from traces.codec import open_writer

MODEL = "bench-model"
"""The only one that the mock serves."""
GAMMA_SHAPE = 0.25
BEGIN_S = 1_790_000_000
SUFFIXES = {
    "mooncake": ".mooncake.jsonl",
    "timed_trace": ".timed.jsonl",
    "workload_trace": ".workload.jsonl",
    "azure": ".azure.csv",
}
"""GuideLLM goes by the end of a file's name."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows in order of time."""

    name: str
    due_s: NDArray[np.float64]
    """Shape (n,), from 0, whole milliseconds."""
    rung: NDArray[np.int64]
    """Shape (n,): which step of a ladder the row belongs to; 0 where there is none."""
    rates_rps: tuple[float, ...]
    """Of each rung."""

    @property
    def rows(self) -> int:
        """How many."""
        return int(self.due_s.size)


def _burst(rng: np.random.Generator, rows: int, rate_rps: float) -> NDArray[np.float64]:
    """Arrival times with exactly this mean rate. Shape (rows,), seconds from the begin of a mean gap."""
    gaps_s = rng.gamma(GAMMA_SHAPE, 1.0, rows)
    times_s: NDArray[np.float64] = np.cumsum(gaps_s) * (rows / rate_rps / gaps_s.sum())
    return times_s


def ladder(name: str, rates_rps: tuple[float, ...], rung_s: float, *, seed: int = 0) -> Workload:
    """Each rate for `rung_s` seconds, one after the other."""
    rng = np.random.default_rng(seed)
    counts = [round(rate * rung_s) for rate in rates_rps]
    parts = [_burst(rng, n, rate) + k * rung_s for k, (n, rate) in enumerate(zip(counts, rates_rps, strict=True))]
    due_ms = np.floor(np.concatenate(parts) * 1e3)
    return Workload(name, (due_ms - due_ms[0]) / 1e3, np.repeat(np.arange(len(counts)), counts), rates_rps)


def steady(name: str, rows: int, rate_rps: float) -> Workload:
    """So many rows at one mean rate."""
    return ladder(name, (rate_rps,), rows / rate_rps)


def write(workload: Workload, folder: Path, burstgate: Path, formats: set[str]) -> dict[str, Path]:
    """The trace in these formats, each a key of SUFFIXES. Raises BenchError."""
    rng = np.random.default_rng(1)
    rows = workload.rows
    batch = complete_batch(
        pl.DataFrame(
            {
                "request_id": [f"{row:032x}" for row in range(rows)],
                "received_at": BEGIN_S + workload.due_s,
                "model": [MODEL] * rows,
                "request_tokens": np.clip(rng.lognormal(4.5, 0.7, rows), 8, 1000).astype(np.int64),
                "response_tokens": np.clip(rng.lognormal(3.5, 0.7, rows), 2, 500).astype(np.int64),
                "log_type": ["API log"] * rows,
                "outcome": ["ok"] * rows,
            }
        )
    )
    source = folder / f"{workload.name}.parquet"
    with source.open("wb") as stream:
        writer = open_writer(stream, format="parquet")
        writer.write(batch)
        writer.close()
    paths = {format: folder / (workload.name + SUFFIXES[format]) for format in sorted(formats)}
    for format, path in paths.items():
        convert(burstgate, source, path, format)
    return paths


def convert(burstgate: Path, source: Path, target: Path, format: str) -> None:
    """`burstgate convert`. Raises BenchError with what it said."""
    argv = [str(burstgate), "convert", str(source), str(target), "--to", format]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(argv[1:])}: {(done.stderr or done.stdout).strip()}")
