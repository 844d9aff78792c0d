"""Where a sweep's cells are run: on the virtual simulator, or against a live target by the replay itself.

    virtual    `replay.simulator.virtual`: no sockets, deterministic
    live       `replay.runner.replay` of a temporary Parquet file, which also scrapes KV use and preemptions. Before it
               the wait until the target is idle by its metrics (running and waiting 0, twice in a row; not for longer
               than `idle_timeout_s`), then the cool-down

A target without vLLM's metrics is measured without them, and the sweep says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import polars as pl

from replay.client import ReplayError
from replay.report import LATE_S
from replay.sample import read_samples
from replay.schedule import PlanOptions
from replay.scrape import Unscraped, fetch, metrics_urls, parse_metrics
from replay.sweep import Ended, Measured, RunCell

if TYPE_CHECKING:
    from replay.metrics import Summary
    from replay.runner import ReplayOptions
    from replay.simulator.config import SimulatorConfig

POLL_S: Final = 0.25
UNANSWERED: Final = 3
"""Looks in a row without an answer, after which it is unknown whether the target is idle."""


def wait_until_idle(urls: Sequence[str], timeout_s: float) -> bool | None:
    """Wait until nothing runs or waits, twice in a row; False when it did not come to that, None without metrics."""
    until_s = time.monotonic() + timeout_s
    idle = unanswered = 0
    while idle < 2:
        try:
            found = [parse_metrics(fetch(url)[0]) for url in urls]
        except (Unscraped, ValueError) as error:
            idle, unanswered = 0, unanswered + 1
            if unanswered == UNANSWERED or (isinstance(error, Unscraped) and error.is_final):
                return None
        else:
            if not all("running" in each for each in found):
                return None
            unanswered = 0
            idle = 0 if any(each["running"] + each.get("waiting", 0.0) for each in found) else idle + 1
        if time.monotonic() > until_s:
            return False
        time.sleep(POLL_S)
    return True


def virtual_cells(config: SimulatorConfig, timeout_s: float | None) -> RunCell:
    """Cells on the simulated machine. timeout_s: the clients' patience."""
    from replay.simulator.virtual import SimulatedRequest, VirtualOptions, simulate

    def run(trace: pl.DataFrame, seed: int) -> Measured:
        ended: list[Ended] = []

        def take(each: SimulatedRequest) -> None:
            ended.append(Ended(each.due_s, each.outcome, each.ttft_s, each.tpot_s, each.e2e_s))

        options = VirtualOptions(PlanOptions(ties="keep", seed=seed), timeout_s)
        summary = simulate([trace], config, options, take)
        return Measured(ended, summary.preemptions, summary.kv_usage_mean, summary.kv_usage_peak)

    return run


def live_cells(options: ReplayOptions, *, idle_timeout_s: float, cool_down_s: float) -> RunCell:
    """Cells against a live target. options: how a cell is replayed; its trace, seed and files are set from here.

    The cells raise ReplayError as `replay.runner.replay` does.
    """
    from rich.console import Console

    from replay.runner import replay
    from traces.codec import open_writer

    numbers = iter(range(1 << 31))
    run_id = options.run_id or f"sweep-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
    urls = metrics_urls(options.target, options.metrics_urls)

    def run(trace: pl.DataFrame, seed: int) -> Measured | None:
        with TemporaryDirectory(prefix="burstgate-sweep-") as folder:
            file, samples = Path(folder, "cell.parquet"), Path(folder, "samples.jsonl")
            with file.open("wb") as stream:
                writer = open_writer(stream, format="parquet")
                writer.write(trace)
                writer.close()
            is_idle = wait_until_idle(urls, idle_timeout_s)
            time.sleep(cool_down_s)
            cell = replace(
                options, ties="keep", seed=seed, format="parquet", run_id=f"{run_id}-{next(numbers)}",
                samples=samples, json=None, html=None, quiet=True,
            )  # fmt: skip
            summary = replay(file, cell, console=Console(quiet=True))
            if summary.is_interrupted:
                return None
            if summary.samples_error is not None:
                raise ReplayError(f"the samples of a cell are not whole: {summary.samples_error}")
            ended = [
                Ended(each.due_s, each.outcome, each.ttft_s, each.tpot_s, each.e2e_s, each.itl_max_s,
                      each.dispatch_lag_s)
                for each in read_samples(samples)
            ]  # fmt: skip
        server = summary.server
        preemptions = None if server is None else server.preemptions
        return Measured(
            ended,
            preemptions=None if preemptions is None else round(preemptions),
            kv_usage_mean=None if server is None else server.kv_mean,
            kv_usage_max=None if server is None else server.kv_max,
            invalid="; ".join(summary.reasons) if summary.verdict == "invalid" else None,
            warning=_warning(summary, is_idle, idle_timeout_s),
        )

    return run


def _warning(summary: Summary, is_idle: bool | None, idle_timeout_s: float) -> str | None:
    server, lag = summary.server, summary.dispatch_lag_s
    if server is None or server.over_time is None:
        why = "no answer" if server is None or server.error is None else server.error
        return f"KV use and preemptions are unknown: {why}"
    if is_idle is None:
        return "whether the target was idle before a cell is unknown: its metrics did not answer"
    if not is_idle:
        return f"the target was not idle after {idle_timeout_s:g} s, and the next cell began"
    if summary.verdict != "invalid" and lag is not None and lag.p99 > LATE_S:
        return "1 % of a cell's requests were sent late, as opening connections took that long: see dispatch_lag"
    return None
