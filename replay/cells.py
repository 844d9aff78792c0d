"""Where a sweep's cells are run: on the virtual simulator, or against a live target by the replay itself.

    virtual    `replay.simulator.virtual`: no sockets, deterministic
    live       `replay.runner.replay` of a temporary Parquet file. Before it the wait until the target is idle by its
               /metrics (running and waiting 0, twice in a row; not for longer than `idle_timeout_s`), then the
               cool-down; beside it KV use and preemptions, read every POLL_S in a thread

A target without vLLM's metrics is measured without them, and the sweep says so.
"""

from __future__ import annotations

import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final, Self

import msgspec
import polars as pl

from replay.report import LATE_S
from replay.schedule import PlanOptions
from replay.sweep import Ended, Measured, RunCell

if TYPE_CHECKING:
    from replay.runner import ReplayOptions
    from replay.simulator.config import SimulatorConfig

POLL_S: Final = 0.25
ASK_TIMEOUT_S: Final = 5.0
MAX_METRICS_BYTES: Final = 16 * 1024 * 1024
_SERIES: Final = re.compile(rb"^vllm:(\w+)(?:\{.*\})? (\S+)", re.MULTILINE)
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Gauges:
    """A moment of the target, over all its engines."""

    in_flight: float
    """Running and waiting."""
    kv_usage: float
    """Share, the mean of the engines."""
    preemptions: float
    """Since its start."""


def parse_gauges(text: bytes) -> Gauges | None:
    """What Prometheus text says of a vLLM; None where it says nothing of requests or of the KV cache."""
    found: dict[bytes, list[float]] = {}
    for name, value in _SERIES.findall(text):
        with suppress(ValueError):
            found.setdefault(name, []).append(float(value))
    usage = found.get(b"kv_cache_usage_perc") or found.get(b"gpu_cache_usage_perc")  # the second in older versions
    running = found.get(b"num_requests_running")
    if not usage or not running:
        return None
    return Gauges(
        in_flight=sum(running) + sum(found.get(b"num_requests_waiting", ())),
        kv_usage=sum(usage) / len(usage),
        preemptions=sum(found.get(b"num_preemptions_total", ())),
    )


def read_gauges(url: str) -> Gauges | None:
    """Those of a /metrics page; None where it does not answer with them."""
    try:
        with _OPENER.open(url, timeout=ASK_TIMEOUT_S) as answer:
            return parse_gauges(answer.read(MAX_METRICS_BYTES))
    except (OSError, ValueError):
        return None


class Watch:
    """Reads the gauges in a thread for as long as it is entered. KV use is the mean of the readings."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self.seen: list[Gauges] = []

    def __enter__(self) -> Self:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._take()

    def _read(self) -> None:
        while not self._over.wait(POLL_S):
            self._take()

    def _take(self) -> None:
        gauges = read_gauges(self._url)
        if gauges is not None:
            self.seen.append(gauges)


def wait_until_idle(url: str, timeout_s: float) -> bool | None:
    """Wait until nothing runs or waits, twice in a row; False when it did not come to that, None without metrics."""
    until_s = time.monotonic() + timeout_s
    idle = 0
    while idle < 2:
        gauges = read_gauges(url)
        if gauges is None:
            return None
        idle = idle + 1 if gauges.in_flight == 0 else 0
        if time.monotonic() > until_s:
            return False
        time.sleep(POLL_S)
    return True


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ctrl-C does after it what it did before: uvloop leaves a handler that does nothing."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)


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


def live_cells(options: ReplayOptions, *, metrics_url: str, idle_timeout_s: float, cool_down_s: float) -> RunCell:
    """Cells against a live target. options: how a cell is replayed; its trace, seed and files are set from here.

    The cells raise ReplayError as `replay.runner.replay` does.
    """
    from rich.console import Console

    from replay.runner import replay
    from traces.codec import open_writer

    numbers = iter(range(1 << 31))
    run_id = options.run_id or f"sweep-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
    console = Console(quiet=True)

    def run(trace: pl.DataFrame, seed: int) -> Measured | None:
        with TemporaryDirectory(prefix="burstgate-sweep-") as folder:
            file, samples = Path(folder, "cell.parquet"), Path(folder, "samples.jsonl")
            with file.open("wb") as stream:
                writer = open_writer(stream, format="parquet")
                writer.write(trace)
                writer.close()
            is_idle = wait_until_idle(metrics_url, idle_timeout_s)
            time.sleep(cool_down_s)
            cell = replace(
                options, ties="keep", seed=seed, format="parquet", run_id=f"{run_id}-{next(numbers)}",
                samples=samples, json=None, quiet=True,
            )  # fmt: skip
            with Watch(metrics_url) as watch, _own_signals():
                summary = replay(file, cell, console=console)
            if summary.is_interrupted:
                return None
            decoder = msgspec.json.Decoder(Ended)
            with samples.open("rb") as lines:
                ended = [decoder.decode(line) for line in lines]
        warning = None
        if is_idle is None:
            warning = f"{metrics_url} has none of vLLM's metrics: KV use and preemptions are unknown"
        elif not is_idle:
            warning = f"the target was not idle after {idle_timeout_s:g} s, and the next cell began"
        elif summary.dispatch_lag_s is not None and summary.dispatch_lag_s.p99 > LATE_S:
            warning = "1 % of a cell's requests were sent late: its latencies may be this machine's, see dispatch_lag"
        seen = watch.seen
        if not seen:
            return Measured(ended, warning=warning)
        usages = [gauges.kv_usage for gauges in seen]
        return Measured(
            ended,
            preemptions=round(seen[-1].preemptions - seen[0].preemptions),
            kv_usage_mean=sum(usages) / len(usages),
            kv_usage_max=max(usages),
            warning=warning,
        )

    return run
