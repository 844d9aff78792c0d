"""`burstgate demo`: the whole of burstgate in half a minute, on a machine without a GPU.

A simulated vLLM with a small KV cache, the gateway in front of it with a short first-byte timeout, a bursty trace
replayed through both, and what the gateway recorded: a burst fills the cache, requests wait, some run into the timeout.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from replay.runner import ReplayOptions, replay
from storage.engine import open_engine
from storage.export import export, export_batches
from storage.query import Filter, count, read_batches
from traces.batch import complete_batch
from traces.record import LogType
from traces.summary import render, summarize

REQUESTS = 240
SPAN_S = 16.0
GAMMA_SHAPE = 0.25
FIRST_BYTE_S = 1.0
MODEL = "demo-8b"
_SIMULATOR = (
    "--models",
    MODEL,
    "--kv-capacity-tokens",
    "3200",
    "--max-model-len",
    "2048",
    "--max-num-seqs",
    "48",
    "--seed",
    "7",
)


def bursty_arrivals_s(rng: np.random.Generator, n: int, span_s: float, gamma_shape: float) -> NDArray[np.float64]:
    """n arrival times in seconds whose gaps are Gamma(shape) with mean span / n. Shape (n,), from 0, ascending."""
    gaps_s = rng.gamma(gamma_shape, span_s / n / gamma_shape, n)
    arrivals_s: NDArray[np.float64] = np.cumsum(gaps_s) - gaps_s[0]
    return arrivals_s


def demo_trace(seed: int = 3) -> pl.DataFrame:
    """A small bursty trace of conversations and API calls, as a batch."""
    rng = np.random.default_rng(seed)
    at_s = bursty_arrivals_s(rng, REQUESTS, SPAN_S, GAMMA_SHAPE)
    talks = rng.random(REQUESTS) < 0.4
    sessions = [f"demo-{rng.integers(0, 40):02d}" if talk else None for talk in talks]
    request_tokens = np.clip(rng.lognormal(5.2, 0.8, REQUESTS), 12, 1500).astype(np.int64)
    response_tokens = np.clip(rng.lognormal(3.6, 0.7, REQUESTS), 2, 400).astype(np.int64)
    return complete_batch(
        pl.DataFrame(
            {
                "request_id": [f"demo-{index}" for index in range(REQUESTS)],
                "received_at": np.round(at_s, 6),
                "session_id": sessions,
                "elapsed_s": np.zeros(REQUESTS),
                "model": [MODEL] * REQUESTS,
                "request_tokens": request_tokens,
                "response_tokens": response_tokens,
                "log_type": [str(LogType.CONVERSATION if talk else LogType.API) for talk in talks],
            },
            schema_overrides={"session_id": pl.String()},
        )
    )


@contextlib.contextmanager
def _process(command: list[str], pattern: str, *, env: dict[str, str] | None = None) -> Iterator[str]:
    """Run a command that prints its URL when it is ready; gives the URL, and ends the process at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line.strip())
            found = re.search(pattern, line)
            if found:
                break
        else:
            raise OSError(f"{command[0]} did not start: {' '.join(said)}")
        yield found[1]
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def run_demo(directory: Path, console: Console) -> None:
    """Run it; its files lie in `directory`, which is made anew."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    source = directory / "source.csv"
    export_batches([demo_trace()], source, format="burstgpt")
    data_dir = directory / "data"
    say = functools.partial(console.print, soft_wrap=True)
    console.rule("burstgate demo")
    with (
        _process(["replay.simulator", "--port", "0", *_SIMULATOR], r"(http://\S+)") as vllm,
        _process(
            [
                "proxy.cli",
                "serve",
                "--upstream",
                vllm,
                "--port",
                "0",
                "--control-port",
                "0",
                "--data-dir",
                str(data_dir),
            ],
            r"gateway\s+(http://\S+)",
            env={"BURSTGATE_TIMEOUTS__FIRST_BYTE_S": str(FIRST_BYTE_S)},
        ) as gateway,
    ):
        say(f"simulated vLLM   {vllm}  (KV cache of 3,200 tokens)")
        say(f"gateway          {gateway}  (recording to {data_dir / 'burstgate.db'})")
        say(f"bursty trace     {source}  ({REQUESTS} requests in {SPAN_S:g} s, Gamma shape {GAMMA_SHAPE})")
        summary = replay(
            source, ReplayOptions(target=gateway, model=MODEL, json=directory / "replay.json"), console=console
        )
        _wait_recorded(data_dir, str(summary.run_id), summary.sent)
    _report(directory, data_dir, str(summary.run_id), console)


def _wait_recorded(data_dir: Path, run_id: str, sent: int) -> None:
    engine = open_engine(f"sqlite:///{data_dir / 'burstgate.db'}")
    deadline_s = time.monotonic() + 10
    while count(engine, Filter(run_ids=(run_id,))) < sent and time.monotonic() < deadline_s:
        time.sleep(0.1)
    engine.dispose()


def _report(directory: Path, data_dir: Path, run_id: str, console: Console) -> None:
    engine = open_engine(f"sqlite:///{data_dir / 'burstgate.db'}")
    selection = Filter(run_ids=(run_id,))
    summary = summarize(read_batches(engine, selection))
    console.rule("what the gateway recorded")
    render(summary, console)
    report = directory / "report.txt"
    with report.open("w", encoding="utf-8") as file:
        render(summary, Console(file=file, width=100))
    written = export(engine, directory / "recorded.csv", selection, format="burstgpt")
    engine.dispose()
    say = functools.partial(console.print, soft_wrap=True)
    console.rule("files")
    say(f"report           {report}")
    say(f"replay's summary {directory / 'replay.json'}")
    say(f"recorded trace   {directory / 'recorded.csv'}  ({written.rows_written} rows, BurstGPT's 8 columns)")
