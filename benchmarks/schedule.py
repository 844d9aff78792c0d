"""How fast traces are generated and fitted, and how soon a long schedule has its first row.

    taskset -c 0 env POLARS_MAX_THREADS=1 python -m benchmarks.schedule [ROWS]

Writes a trace of ROWS rows (10,600,000: all of BurstGPT) in BurstGPT's eight columns, then starts schedules on it. Each
measurement is a process of its own, with its own peak of resident memory.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.codec import generated as codec_rows
from replay.arrivals import ArrivalOptions, retime
from replay.rows import open_rows
from replay.schedule import PlanOptions, plan
from replay.source import SourceOptions
from traces.arrivals import steady
from traces.codec import open_writer, read_trace
from traces.generation import generate, plain_profile, zipf_lengths
from traces.profile import FIELDS, fit_profile

FIRST_ROWS = 1_000
PLANNED_ROWS = 3_000_000
SOURCES = {
    "as it is": SourceOptions(),
    "idle cap, loop": SourceOptions(idle_cap_s=60.0, passes=None),
    "rate scale 0.3": SourceOptions(rate_scale=0.3),
    "rate scale 3.5": SourceOptions(rate_scale=3.5),
    "target rps 5": SourceOptions(target_rps=5.0),
}


def opened(path: Path, name: str) -> Iterator[pl.DataFrame]:
    return open_rows(path, SOURCES[name], ArrivalOptions())


def start(path: Path, name: str) -> str:
    begin = time.perf_counter()
    rows = plan(opened(path, name), PlanOptions())
    first_s = 0.0
    for _ in islice(rows, FIRST_ROWS):
        first_s = first_s or time.perf_counter() - begin
    return f"first row after {first_s:.2f} s, {FIRST_ROWS:,} after {time.perf_counter() - begin:.2f} s"


def run_through(path: Path, name: str) -> str:
    begin = time.perf_counter()
    rows = sum(1 for _ in islice(plan(opened(path, name), PlanOptions()), PLANNED_ROWS))
    return f"{rows:,} rows planned, {rows / (time.perf_counter() - begin):,.0f} rows/s"


def fit(path: Path) -> str:
    begin = time.perf_counter()
    profile = fit_profile(read_trace(path, fields=FIELDS))
    return (
        f"{profile.requests:,} rows, {profile.requests / (time.perf_counter() - begin):,.0f} rows/s, reading included"
    )


def make(path: Path, rows: int, what: str) -> str:
    if what == "process":
        batches = generate(plain_profile(zipf_lengths(1.1, 4096)), seed=0, rows=rows, process=steady(100.0, 0.25))
    elif what == "profile":
        batches = generate(fit_profile(codec_rows(200_000)), seed=0, rows=rows)
    else:
        batches = retime(codec_rows(rows), steady(100.0, 0.25), np.random.default_rng(0))
    begin = time.perf_counter()
    made = sum(batch.height for batch in batches)
    return f"{made:,} rows, {made / (time.perf_counter() - begin):,.0f} rows/s"


def measure(path: Path, rows: int, what: str, name: str) -> None:
    match what:
        case "start":
            said = start(path, name)
        case "plan":
            said = run_through(path, name)
        case "fit":
            said = fit(path)
        case _:
            said = make(path, rows, name)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what:9} {name:15} {said}, peak {peak_mib:.0f} MiB", flush=True)


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 10_600_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.csv"
        with path.open("wb") as stream:
            writer = open_writer(stream, format="burstgpt")
            for batch in codec_rows(rows):
                writer.write(batch)
            writer.close()
        work = [("start", name) for name in SOURCES]
        work += [
            ("plan", "rate scale 3.5"),
            ("fit", ""),
            *(("generate", name) for name in ("process", "profile", "retime")),
        ]
        for what, name in work:
            count = min(rows, 1_000_000) if what == "generate" else rows
            command = [sys.executable, "-m", "benchmarks.schedule", str(path), str(count), what, name]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        measure(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        main()
