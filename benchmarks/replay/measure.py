"""Each figure of the replay benchmark, judged at the mock: when every request had arrived, against the schedule.

Lag of a request is its arrival minus (schedule zero + its due time).

    explicit zero   burstgate's own, from its summary (`started_at`), and each request known by its X-Request-Id; the
                    floor's too: floor.c, which has every byte ready, shows what of a lag is the machine's
    fitted zero     for a tool that states none: arrivals in order against due times in order, and the zero is the first
                    percentile of their differences. This favours the tool: what is always late is not late at all, and
                    requests that overtake each other even out. burstgate's is computed too, for comparison.

The mock has the first core, with this process; the tool the last, or all where a figure says so. Arrivals include
loopback, the kernel and the mock's turn, all within 0.1 ms here.
"""

from __future__ import annotations

import contextlib
import json
import resource
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.gateway.install import ROOT, compiled
from benchmarks.gateway.processes import Running, free_ports, get_json, machine_cpu_s, running
from benchmarks.replay.tools import FLOOR, OURS, TOOLS, Job, Tool, new_folder
from benchmarks.replay.workload import Workload

POLL_S = 0.2
LOOK_S = 0.5
"""Between two looks at the memory of a tool."""
CHUNKS = 8
"""Content events of an answer: sent at once, so that the mock costs little and requests end soon."""
SETTLE_S = 10.0
"""A tool that has not sent all by this time after the last row was due is stopped; what it sent counts."""
AFTER_START_S = 5.0
"""Memory is watched for so long after the first request, while the tool is sending."""
LIMIT_MS = 10.0
"""Lag p99 up to which a rate counts as kept."""


class Lag(msgspec.Struct, frozen=True, kw_only=True):
    """One tool and one schedule. None: not every row came once, so that no lag can be told."""

    figure: str
    tool: str
    repeat: int
    rate_rps: float
    rows: int
    arrived: int
    status: int | None
    """None: it was stopped."""
    zero: str
    """`explicit` or `fitted`."""
    lag_p50_ms: float | None
    lag_p99_ms: float | None
    lag_max_ms: float | None
    fitted_p99_ms: float | None
    body_bytes: float | None
    """Of a request, in the mean."""
    start_s: float | None
    """From the tool's start to the first request's arrival."""
    foreign_cores: float
    """What the rest of the machine used meanwhile, in cores: the noise."""


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """One rate of a ladder."""

    figure: str
    tool: str
    rate_rps: float
    rows: int
    arrived: int
    lag_p99_ms: float | None


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """A tool's start with a long trace."""

    figure: str
    tool: str
    rows: int
    start_s: float | None
    """From the tool's start to the first request's arrival; None when none came within the limit."""
    limit_s: float
    rss_mb: float
    """Peak of VmRSS summed over the process tree."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What the mock noted, in order."""

    at_s: NDArray[np.float64]
    """Epoch seconds."""
    body_bytes: NDArray[np.int64]
    max_tokens: NDArray[np.int64]
    """-1: none asked."""
    ids: list[str]


@dataclass(frozen=True, slots=True)
class Mock:
    """The upstream of benchmarks/gateway."""

    url: str
    process: Running

    def expect(self, rows: int) -> None:
        """Forget all arrivals, and be ready to note this many and some."""
        get_json(f"{self.url}/configure?chunks={CHUNKS}&delay_us=0&first_us=0&arrivals={rows + rows // 10 + 100}")

    def requests(self) -> int:
        """All so far, since its start."""
        return int(get_json(f"{self.url}/stats")["requests"])

    def arrivals(self) -> Arrivals:
        """Those since `expect`."""
        with urllib.request.urlopen(f"{self.url}/arrivals", timeout=30) as response:
            lines = [line.split() for line in response.read().decode().splitlines()]
        return Arrivals(
            np.array([int(line[0]) for line in lines], dtype=np.int64) / 1e9,
            np.array([int(line[1]) for line in lines], dtype=np.int64),
            np.array([int(line[2]) for line in lines], dtype=np.int64),
            [line[3] for line in lines],
        )


@dataclass(frozen=True, slots=True)
class Bench:
    """Where everything of a run lies."""

    folder: Path
    mock: Mock
    hub: Path
    burstgate: Path
    processes: int | None
    core: str
    """The tool's own."""
    cores: str
    """All."""

    def cpu_s(self) -> float:
        """CPU seconds so far of the mock, of this process and of the tools that have ended."""
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return self.mock.process.cpu_s() + time.process_time() + ended.ru_utime + ended.ru_stime

    def job(self, workload: Workload, trace: Path, name: str) -> Job:
        """A run with an empty folder."""
        folder = new_folder(self.folder / name)
        return Job(self.mock.url, trace, workload.rows, folder, self.hub, self.burstgate, self.processes)


@contextlib.contextmanager
def open_mock(folder: Path, cores: str) -> Iterator[Mock]:
    """The mock for the length of a with block. Raises BenchError."""
    port = free_ports(1)[0]
    source = ROOT / "benchmarks" / "gateway" / "upstream.c"
    url = f"http://127.0.0.1:{port}"
    with running("upstream", [str(compiled(source)), str(port)], cores=cores, folder=folder) as process:
        process.wait_until_ready(lambda: get_json(f"{url}/stats"), 10.0)
        yield Mock(url, process)


@dataclass(frozen=True, slots=True)
class Run:
    """How a tool's run went."""

    arrivals: Arrivals
    status: int | None
    began_s: float
    """Epoch seconds when it was started."""
    peak_rss_bytes: int
    foreign_cores: float
    summary: dict[str, float] | None
    """burstgate's own."""

    @property
    def start_s(self) -> float | None:
        """To the first arrival."""
        return float(self.arrivals.at_s[0]) - self.began_s if self.arrivals.at_s.size else None


def run_tool(
    bench: Bench,
    tool: Tool,
    job: Job,
    *,
    cores: str,
    start_limit_s: float,
    limit_s: float,
    watches_memory: bool = False,
) -> Run:
    """Start a tool and wait until it ends, no request has come `start_limit_s` after its start, or it is `limit_s`
    after its first request: then it is stopped. Raises BenchError where the tool is not to be had."""
    command = tool.command(job)
    bench.mock.expect(job.rows)
    before = bench.mock.requests()
    machine_s, bench_s = machine_cpu_s(), bench.cpu_s()
    began_s, start_s = time.time(), time.monotonic()
    first_s: float | None = None
    look_s = start_s + LOOK_S
    peak = 0
    with running(tool.name, command.argv, cores=cores, folder=job.folder, env=command.env) as process:
        while (status := process.status()) is None:
            time.sleep(POLL_S)
            now_s = time.monotonic()
            if first_s is None and bench.mock.requests() > before:
                first_s = now_s
            if watches_memory and now_s >= look_s:  # which takes some ms of a core that the tool starts on
                peak = max(peak, process.resident_bytes())
                look_s = now_s + LOOK_S
            if now_s > (start_s + start_limit_s if first_s is None else first_s + limit_s):
                break
    used_s = bench.cpu_s() - bench_s
    foreign = max(0.0, machine_cpu_s() - machine_s - used_s) / (time.monotonic() - start_s)
    path = job.folder / "summary.json"
    summary = json.loads(path.read_text()) if tool.name in (OURS, FLOOR) and path.is_file() else None
    return Run(bench.mock.arrivals(), status, began_s, peak, foreign, summary)


def fitted_lags_s(at_s: NDArray[np.float64], due_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the first arrivals in order, against the due times in order; what is left of the longer is left out."""
    count = min(at_s.size, due_s.size)
    late_s = np.sort(at_s)[:count] - due_s[:count]
    return late_s - np.percentile(late_s, 1) if count else late_s


def explicit_lags_s(run: Run, due_s: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """By row, from burstgate's own zero. None without its summary, or when not every row came exactly once."""
    if run.summary is None or run.summary["started_at"] is None:
        return None
    rows = [int(name.rpartition("-")[2]) for name in run.arrivals.ids]
    if sorted(rows) != list(range(due_s.size)):
        return None
    return run.arrivals.at_s - run.summary["started_at"] - due_s[rows]


def _ms(lags_s: NDArray[np.float64] | None, percent: float) -> float | None:
    return None if lags_s is None else float(np.percentile(lags_s, percent)) * 1e3


def measure_lag(bench: Bench, figure: str, name: str, workload: Workload, trace: Path, repeat: int) -> Lag:
    """One tool on one core. Raises BenchError where the tool is not to be had."""
    job = bench.job(workload, trace, f"{figure}-{name}")
    limit_s = float(workload.due_s[-1]) + SETTLE_S
    run = run_tool(bench, TOOLS[name], job, cores=bench.core, start_limit_s=120.0, limit_s=limit_s)
    is_whole = run.arrivals.at_s.size == workload.rows
    fitted = fitted_lags_s(run.arrivals.at_s, workload.due_s) if is_whole else None
    lags = explicit_lags_s(run, workload.due_s) if name in (OURS, FLOOR) else fitted
    return Lag(
        figure=figure,
        tool=name,
        repeat=repeat,
        rate_rps=workload.rates_rps[0],
        rows=workload.rows,
        arrived=int(run.arrivals.at_s.size),
        status=run.status,
        zero="explicit" if name in (OURS, FLOOR) else "fitted",
        lag_p50_ms=_ms(lags, 50),
        lag_p99_ms=_ms(lags, 99),
        lag_max_ms=_ms(lags, 100),
        fitted_p99_ms=_ms(fitted, 99),
        body_bytes=float(run.arrivals.body_bytes.mean()) if run.arrivals.body_bytes.size else None,
        start_s=run.start_s,
        foreign_cores=run.foreign_cores,
    )


def measure_ladder(bench: Bench, name: str, workload: Workload, trace: Path) -> list[Rung]:
    """One tool on all cores, the mock on one of them. Its zero is fitted, burstgate's too: it is stopped at the end."""
    job = bench.job(workload, trace, f"ladder-{name}")
    limit_s = float(workload.due_s[-1]) + SETTLE_S / 2
    run = run_tool(bench, TOOLS[name], job, cores=bench.cores, start_limit_s=60.0, limit_s=limit_s)
    lags_s = fitted_lags_s(run.arrivals.at_s, workload.due_s)
    rungs = []
    for number, rate_rps in enumerate(workload.rates_rps):
        own = workload.rung == number
        found_s = lags_s[own[: lags_s.size]]
        is_whole = found_s.size == own.sum()
        rungs.append(
            Rung(
                figure="ladder",
                tool=name,
                rate_rps=rate_rps,
                rows=int(own.sum()),
                arrived=int(found_s.size),
                lag_p99_ms=_ms(found_s, 99) if is_whole else None,
            )
        )
    return rungs


def highest_kept_rps(rungs: list[Rung]) -> float | None:
    """The highest rate whose lag p99 is within the limit, even above one that is not."""
    return max((r.rate_rps for r in rungs if r.lag_p99_ms is not None and r.lag_p99_ms <= LIMIT_MS), default=None)


def measure_start(bench: Bench, name: str, workload: Workload, trace: Path, limit_s: float) -> Start:
    """A tool's start and memory, on all cores."""
    job = bench.job(workload, trace, f"start-{name}")
    run = run_tool(
        bench, TOOLS[name], job, cores=bench.cores, start_limit_s=limit_s, limit_s=AFTER_START_S, watches_memory=True
    )
    return Start(
        figure="start",
        tool=name,
        rows=workload.rows,
        start_s=run.start_s,
        limit_s=limit_s,
        rss_mb=run.peak_rss_bytes / 1e6,
    )
