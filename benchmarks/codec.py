"""How fast and how large the BurstGPT codec is, and what the other formats cost.

    taskset -c 0 env POLARS_MAX_THREADS=1 python benchmarks/codec.py [ROWS]

Writes a generated trace of ROWS rows (2,000,000) and of a tenth of them in each format, reads it back, and prints rows
a second and the peak resident memory of a process that does only that. Reading includes everything: validation, ids,
and batches with every column of the record.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from traces.batch import complete_batch
from traces.codec import FORMATS, open_writer, read_trace

BATCH_ROWS = 65_536


def generated(rows: int) -> Iterator[pl.DataFrame]:
    """A trace like BurstGPT_3.csv: whole-second stamps, UUID sessions on a third of the rows, 7 % failures."""
    rng = np.random.default_rng(0)
    stamp_s = 19_440_110.0
    for first in range(0, rows, BATCH_ROWS):
        n = min(BATCH_ROWS, rows - first)
        stamps = stamp_s + np.floor(np.cumsum(rng.gamma(0.25, 4.0, n)))
        stamp_s = float(stamps[-1])
        has_session = rng.random(n) < 0.33
        is_failure = rng.random(n) < 0.07
        yield complete_batch(
            pl.DataFrame(
                {
                    "request_id": [f"{first + row:032x}" for row in range(n)],
                    "received_at": stamps,
                    "session_id": [
                        f"{number:08x}-0a46-4bf0-aa08-89794e7a2b3f" if known else None
                        for number, known in zip(rng.integers(0, 2**32, n), has_session, strict=True)
                    ],
                    "elapsed_s": rng.integers(0, 60, n).astype(np.float64),
                    "model": rng.choice(["ChatGPT", "GPT-4"], n),
                    "request_tokens": rng.integers(1, 4_000, n),
                    "response_tokens": rng.integers(1, 1_000, n),
                    "log_type": np.where(has_session, "Conversation log", "API log"),
                    "outcome": np.where(is_failure, "upstream_error", "ok"),
                }
            )
        )


def write(path: Path, format: str, rows: int) -> float:
    """Seconds spent in the writer; generating the rows is not counted."""
    spent_s = 0.0
    with path.open("wb") as stream:
        writer = open_writer(stream, format=format)
        for batch in generated(rows):
            begin = time.perf_counter()
            writer.write(batch)
            spent_s += time.perf_counter() - begin
        begin = time.perf_counter()
        writer.close()
        return spent_s + time.perf_counter() - begin


def read(path: Path, format: str, rows: int) -> float:
    """Seconds to read the whole file."""
    begin = time.perf_counter()
    seen = sum(batch.height for batch in read_trace(path, format=format))
    if seen != rows:
        raise RuntimeError(f"{path}: expected {rows} rows, got {seen}")
    return time.perf_counter() - begin


def measure(action: str, path: str, format: str, rows: str) -> None:
    seconds = {"write": write, "read": read}[action](Path(path), format, int(rows))
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{format:10} {action:5} {int(rows):>10,} rows {int(rows) / seconds:>12,.0f} rows/s  peak {peak_mib:.0f} MiB")


def main() -> None:
    """Each measurement in its own process, so that its peak memory is its own."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000
    with tempfile.TemporaryDirectory() as folder:
        for format in FORMATS:
            for count in (rows // 10, rows):
                for action in ("write", "read"):
                    path = str(Path(folder) / f"{format}-{count}")
                    subprocess.run([sys.executable, __file__, action, path, format, str(count)], check=True)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        measure(*sys.argv[1:])
    else:
        main()
