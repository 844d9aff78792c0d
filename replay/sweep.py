"""A sweep: the same requests at the same mean rate, arriving more and less burstily, over a ladder of rates.

    arrivals   poisson; gamma K for each Gamma shape K of the gaps, below 1 bursty; trace: the trace's own gaps
    cell       one arrival process at one rate with one seed: `requests` requests, or as many as the rate makes in
               `duration_s`. The arrivals are scaled to exactly the mean rate: (requests - 1) / rate from the first to
               the last. Cells of one seed and size send the same lengths in the same order: only the times differ
    order      rate by rate, in each seed by seed, in each the arrivals in turns: what drifts, drifts for all
    knee       a rate holds when, by the medians over the seeds,
                 served       >= SERVED_SHARE: ok / requests * arrivals_s / max(arrivals_s, answered_s - tail), where
                              arrivals_s and answered_s are the times from the first arrival to the last one and to the
                              last answer, and tail the E2E p99 at the lowest rate: answers that took their normal time
                 TTFT p99     <= the SLO's, or TTFT_FACTOR times that of the calmest arrivals at the lowest rate
               and all lower ones hold. The highest one is the arrivals' `capacity_rps`; the first that does not is
               measured too and ends the climb of its arrivals, unless all are asked for
    invalid    a cell of a live target in which the replay itself was the bottleneck, by `replay.verdict`. It is kept
               and marked; the medians leave it out. A rate without a valid cell ends the climb too, and is no knee

Latencies are over requests that ended `ok`, quantiles are values of the sample. Goodput is `replay.metrics`'. Where the
cells come from is `replay.cells`'; the page is `replay.sweep_report`'s.
"""

from __future__ import annotations

import csv
import io
import math
import signal
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Final

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from replay.client import ReplayError
from replay.metrics import Slo, missed_bounds
from replay.schedule import Planned
from traces.arrivals import MAX_RATE_RPS, SHAPE_RANGE, arrival_times_s, steady
from traces.batch import complete_batch
from traces.record import Outcome

SERVED_SHARE: Final = 0.95
TTFT_FACTOR: Final = 10.0
MAX_REQUESTS: Final = 1_000_000
"""Of one cell: its samples are held."""
MAX_RUNGS: Final = 1000


@dataclass(frozen=True, slots=True)
class Arrivals:
    """One of the arrival processes that are compared; no shape is the trace's own."""

    name: str
    gamma_shape: float | None


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """What to measure. Raises ValueError naming the option, the value and the rule."""

    rates_rps: tuple[float, ...]
    """Ascending."""
    shapes: tuple[float, ...] = (0.5, 0.25)
    """Beside Poisson."""
    duration_s: float | None = 60.0
    requests: int | None = None
    """Instead of a duration: as many at every rate."""
    seeds: int = 3
    seed: int = 0
    """The first one."""
    slo: Slo | None = None
    is_full: bool = False
    """Every rate for all arrivals, past the knee too."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.rates_rps) <= MAX_RUNGS:
            raise ValueError(f"rates: expected 1 to {MAX_RUNGS} of them, got {len(self.rates_rps)}")
        for before, rate_rps in zip((0.0, *self.rates_rps), self.rates_rps, strict=False):
            if not before < rate_rps <= MAX_RATE_RPS:
                raise ValueError(f"rates: expected ascending, above 0 to {MAX_RATE_RPS:g}, got {rate_rps:g}")
        for shape in self.shapes:
            if not SHAPE_RANGE[0] <= shape <= SHAPE_RANGE[1]:
                raise ValueError(f"shapes: expected {SHAPE_RANGE[0]:g} to {SHAPE_RANGE[1]:g}, got {shape:g}")
        if len({1.0, *self.shapes}) != len(self.shapes) + 1:
            raise ValueError("shapes: expected each once, and not 1, which is Poisson")
        if (self.duration_s is None) == (self.requests is None):
            raise ValueError("requests: expected either a number of requests or a duration")
        if self.duration_s is not None and not 0 < self.duration_s < math.inf:
            raise ValueError(f"duration: expected seconds > 0, got {self.duration_s:g}")
        if self.seeds < 1 or self.seed < 0:
            raise ValueError(f"seeds: expected at least 1, the first >= 0, got {self.seeds} from {self.seed}")
        for rate_rps in self.rates_rps:
            if not 2 <= self.cell_requests(rate_rps) <= MAX_REQUESTS:
                raise ValueError(
                    f"requests: expected 2 to {MAX_REQUESTS:,} in a cell, got {self.cell_requests(rate_rps):,} at"
                    f" {rate_rps:g} requests/s"
                )

    def cell_requests(self, rate_rps: float) -> int:
        """Requests of a cell."""
        return self.requests if self.requests is not None else round(rate_rps * (self.duration_s or 0.0))


class Ended(msgspec.Struct, frozen=True, gc=False):
    """One request of a cell: what its sample says that a sweep needs."""

    due_s: float
    outcome: str
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    itl_max_s: float | None = None
    dispatch_lag_s: float | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """A cell as it was run."""

    ended: Sequence[Ended]
    preemptions: int | None = None
    kv_usage_mean: float | None = None
    kv_usage_max: float | None = None
    invalid: str | None = None
    """Why the replay itself was the bottleneck, if it was."""
    warning: str | None = None


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One arrival process at one rate with one seed. Seconds, requests a second, shares; None is unknown."""

    arrivals: str
    gamma_shape: float | None
    rate_rps: float
    """Offered."""
    seed: int
    requests: int
    ok: int
    failures: dict[str, int]
    """By outcome."""
    arrivals_s: float
    """First arrival to the last."""
    answered_s: float
    """First arrival to the last answer or failure."""
    achieved_rps: float | None
    """Ok over `answered_s`."""
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p99_s: float | None
    e2e_p99_s: float | None
    failure_share: float
    preemptions: int | None
    kv_usage_mean: float | None
    kv_usage_max: float | None
    goodput_share: float | None
    """Requests within the SLO over all."""
    goodput_rps: float | None
    dispatch_lag_p99_s: float | None
    """How late the requests were sent."""
    invalid: str | None = None
    """Why the figures are those of the replay and not of the target; None where they are not."""


FIGURES: Final = (
    "achieved_rps", "ttft_p50_s", "ttft_p99_s", "tpot_p99_s", "e2e_p99_s", "failure_share", "preemptions",
    "kv_usage_mean", "kv_usage_max", "goodput_share", "goodput_rps", "dispatch_lag_p99_s",
)  # fmt: skip


class Spread(msgspec.Struct, frozen=True):
    """One figure over the seeds."""

    median: float
    low: float
    high: float


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """One arrival process at one rate, over the seeds."""

    arrivals: str
    gamma_shape: float | None
    rate_rps: float
    cells: int
    invalid_cells: int
    """In `figures` only where all are."""
    figures: dict[str, Spread | None]
    """By the names of FIGURES."""
    served_share: float
    holds: bool
    why_not: str | None
    """Why the rate does not hold."""

    @property
    def is_valid(self) -> bool:
        """The figures are the target's."""
        return self.invalid_cells < self.cells


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """Where one arrival process has its knee."""

    arrivals: str
    gamma_shape: float | None
    capacity_rps: float | None
    """The highest rate that holds; None where the lowest one does not."""
    is_knee_found: bool
    """A higher rate was measured that does not hold."""


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """What came out."""

    target: str
    lengths: str
    knee: str
    """The rule, in words."""
    seeds: tuple[int, ...]
    slo: Slo | None
    capacities: tuple[Capacity, ...]
    rungs: tuple[Rung, ...]
    cells: tuple[Cell, ...]
    warnings: tuple[str, ...]
    is_interrupted: bool
    stopped_by: str | None = None
    """The error that ended the sweep."""

    @property
    def is_valid(self) -> bool:
        """Each rate has figures that are the target's."""
        return all(rung.is_valid for rung in self.rungs)


RunCell = Callable[[pl.DataFrame, int], Measured | None]
"""Sends a trace with a seed; None when it was interrupted. Raises ReplayError when it cannot."""


def ladder(first_rps: float, last_rps: float, steps: int) -> tuple[float, ...]:
    """Rates in geometric steps, both ends included. Raises ValueError naming what is wrong."""
    if not 0 < first_rps < last_rps < math.inf:
        raise ValueError(f"from: expected above 0 and below to, got {first_rps:g} and {last_rps:g}")
    if not 2 <= steps <= MAX_RUNGS:
        raise ValueError(f"steps: expected 2 to {MAX_RUNGS}, got {steps}")
    return tuple(float(f"{rate_rps:.4g}") for rate_rps in np.geomspace(first_rps, last_rps, steps))


def numbers(text: str, name: str) -> tuple[float, ...]:
    """Those in `1,2,4`; none in an empty text. Raises ValueError naming what is none."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append(float(part))
        except ValueError:
            raise ValueError(f"{name}: expected numbers with commas between them, got {part!r}") from None
    return tuple(found)


class Workload:
    """The requests that cells are made of, in order: rows with both lengths, and where they are a trace's, its gaps."""

    def __init__(self, rows: Sequence[Planned], *, has_gaps: bool) -> None:
        """Raises ValueError under two rows, or for a trace that spans no time."""
        self._rows = [row for row in rows if row.is_sendable]
        if len(self._rows) < 2:
            raise ValueError(f"trace: expected at least 2 rows with both lengths, got {len(self._rows)}")
        self._times_s = np.array([row.due_s for row in self._rows])
        self._span_s = float(self._times_s[-1] - self._times_s[0])
        self.has_gaps = has_gaps
        if has_gaps and not self._span_s:
            raise ValueError("trace: expected rows that span some time, got all at once")

    def trace(self, arrivals: Arrivals, rate_rps: float, seed: int, requests: int) -> pl.DataFrame:
        """A cell as a trace from 0 s. Seed s begins s cells after the workload's first row, and goes round."""
        places = (seed * requests + np.arange(requests)) % len(self._rows)
        if arrivals.gamma_shape is None:
            rounds = (seed * requests % len(self._rows) + np.arange(requests)) // len(self._rows)
            # The next round begins a mean gap after the last row.
            times_s = self._times_s[places] + rounds * self._span_s * len(self._rows) / (len(self._rows) - 1)
        else:
            times_s = _draws_s(arrivals.gamma_shape, seed, requests)
        span_s = float(times_s[-1] - times_s[0])
        if not span_s:
            raise ValueError(f"trace: expected rows that span some time, got {requests} at once")
        rows = [self._rows[place] for place in places]
        return complete_batch(
            pl.DataFrame(
                {
                    "request_id": [f"{number:032x}" for number in range(requests)],
                    "received_at": np.round((times_s - times_s[0]) * ((requests - 1) / rate_rps / span_s), 6),
                    "model": "sweep",
                    "request_tokens": [row.request_tokens for row in rows],
                    "response_tokens": [row.response_tokens for row in rows],
                    "log_type": "API log",
                    "outcome": Outcome.OK.value,
                    "prefix_blocks": pl.Series([row.prefix_blocks for row in rows], dtype=pl.List(pl.UInt64())),
                }
            )
        )


def _draws_s(shape: float, seed: int, requests: int) -> NDArray[np.float64]:
    rng = np.random.default_rng([seed, round(shape * 1e6)])
    held, have = [], 0
    for chunk in arrival_times_s(steady(1.0, shape).segments(), rng):
        held.append(chunk)
        have += len(chunk)
        if have >= requests:
            break
    return np.concatenate(held)[:requests]


def compared(options: SweepOptions, workload: Workload) -> tuple[Arrivals, ...]:
    """The arrival processes of a sweep: Poisson first, then by falling shape, then the trace's."""
    gammas = [Arrivals(f"gamma {shape:g}", shape) for shape in sorted(options.shapes, reverse=True)]
    own = [Arrivals("trace", None)] if workload.has_gaps else []
    return (Arrivals("poisson", 1.0), *gammas, *own)


def measure(arrivals: Arrivals, rate_rps: float, seed: int, run: Measured, slo: Slo | None) -> Cell:
    """The figures of a cell."""
    ended = run.ended
    good = [each for each in ended if each.outcome == Outcome.OK]
    outcomes = Counter(each.outcome for each in ended)
    first_s = min((each.due_s for each in ended), default=0.0)
    arrivals_s = max((each.due_s for each in ended), default=0.0) - first_s
    answered_s = max((each.due_s + (each.e2e_s or 0.0) for each in ended), default=0.0) - first_s
    within = None if slo is None else sum(not missed_bounds(each, slo) for each in good)
    return Cell(
        arrivals=arrivals.name,
        gamma_shape=arrivals.gamma_shape,
        rate_rps=rate_rps,
        seed=seed,
        requests=len(ended),
        ok=len(good),
        failures={name: count for name, count in sorted(outcomes.items()) if name != Outcome.OK},
        arrivals_s=arrivals_s,
        answered_s=answered_s,
        achieved_rps=len(good) / answered_s if answered_s else None,
        ttft_p50_s=_quantile((each.ttft_s for each in good), 0.5),
        ttft_p99_s=_quantile((each.ttft_s for each in good), 0.99),
        tpot_p99_s=_quantile((each.tpot_s for each in good), 0.99),
        e2e_p99_s=_quantile((each.e2e_s for each in good), 0.99),
        failure_share=1 - len(good) / len(ended) if ended else 0.0,
        preemptions=run.preemptions,
        kv_usage_mean=run.kv_usage_mean,
        kv_usage_max=run.kv_usage_max,
        goodput_share=None if within is None or not ended else within / len(ended),
        goodput_rps=None if within is None or not answered_s else within / answered_s,
        dispatch_lag_p99_s=_quantile((each.dispatch_lag_s for each in ended), 0.99),
        invalid=run.invalid,
    )


def _quantile(values: Iterable[float | None], share: float) -> float | None:
    """The value of rank ceil(share * count)."""
    known = sorted(value for value in values if value is not None)
    return known[math.ceil(share * len(known)) - 1] if known else None


def sweep(
    options: SweepOptions,
    workload: Workload,
    run_cell: RunCell,
    *,
    target: str,
    lengths: str,
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> Sweep:
    """Measure the cells. After Ctrl-C, or a ReplayError past the first cell, there are those that were whole by then.

    Raises what `run_cell` does for the first one.
    """
    climbing = list(compared(options, workload))
    cells: list[Cell] = []
    warnings: dict[str, None] = {}
    is_interrupted = False
    stopped_by = None
    try:
        with _interrupting():
            for rate_rps in options.rates_rps:
                for seed in range(options.seed, options.seed + options.seeds):
                    for arrivals in climbing:
                        trace = workload.trace(arrivals, rate_rps, seed, options.cell_requests(rate_rps))
                        run = run_cell(trace, seed)
                        if run is None:
                            raise KeyboardInterrupt
                        if run.warning is not None:
                            warnings.setdefault(run.warning)
                        cells.append(measure(arrivals, rate_rps, seed, run, options.slo))
                        on_cell(cells[-1])
                if not options.is_full:
                    held = {(rung.arrivals, rung.rate_rps) for rung in judge(cells, options.slo) if rung.holds}
                    climbing = [arrivals for arrivals in climbing if (arrivals.name, rate_rps) in held]
                if not climbing:
                    break
    except KeyboardInterrupt:
        is_interrupted = True
    except ReplayError as error:
        if not cells:
            raise
        stopped_by = str(error)
    rungs = judge(cells, options.slo)
    return Sweep(
        target=target,
        lengths=lengths,
        knee=knee_rule(options.slo),
        seeds=tuple(range(options.seed, options.seed + options.seeds)),
        slo=options.slo,
        capacities=tuple(_capacity(arrivals, rungs) for arrivals in compared(options, workload)),
        rungs=rungs,
        cells=tuple(cells),
        warnings=tuple(warnings),
        is_interrupted=is_interrupted,
        stopped_by=stopped_by,
    )


@contextmanager
def _interrupting() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, between cells too: a cell's own handlers are there while it sends."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    before = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM) if is_main}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler or signal.SIG_DFL)  # None is a handler that was not set from Python


def judge(cells: Sequence[Cell], slo: Slo | None) -> tuple[Rung, ...]:
    """The cells over their seeds, in their order, and whether their rates hold, each by itself."""
    groups: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.arrivals, cell.rate_rps), []).append(cell)
    valid = {key: [cell for cell in group if cell.invalid is None] for key, group in groups.items()}
    lowest_rps = min((cell.rate_rps for cell in cells), default=0.0)
    lowest = {name: group for (name, rate_rps), group in valid.items() if rate_rps == lowest_rps and group}
    calm_s = min((_middle(group, "ttft_p99_s") for group in lowest.values()), default=math.inf)
    limit_s = slo.ttft_s if slo is not None and slo.ttft_s is not None else TTFT_FACTOR * calm_s
    rungs = []
    for (name, rate_rps), group in groups.items():
        judged = valid[name, rate_rps] or group
        tail_s = _middle(lowest.get(name, judged), "e2e_p99_s")
        served = statistics.median(_served_share(cell, tail_s) for cell in judged)
        ttft_s = _middle(judged, "ttft_p99_s")
        why_not = None
        if not valid[name, rate_rps]:
            why_not = f"no cell is valid: {group[0].invalid}"
        elif served < SERVED_SHARE:
            why_not = f"served {served:.1%} < {SERVED_SHARE:.0%}"
        elif not ttft_s <= limit_s:
            why_not = f"TTFT p99 {ttft_s:.3g} s > {limit_s:.3g} s"
        rungs.append(
            Rung(
                arrivals=name,
                gamma_shape=group[0].gamma_shape,
                rate_rps=rate_rps,
                cells=len(group),
                invalid_cells=len(group) - len(valid[name, rate_rps]),
                figures={figure: _spread(judged, figure) for figure in FIGURES},
                served_share=served,
                holds=why_not is None,
                why_not=why_not,
            )
        )
    return tuple(rungs)


def knee_rule(slo: Slo | None) -> str:
    """When a rate holds, in words."""
    bound = (
        f"{slo.ttft_s:g} s"
        if slo is not None and slo.ttft_s is not None
        else f"{TTFT_FACTOR:g} x that of the calmest arrivals at the lowest rate"
    )
    return f"the highest rate up to which at least {SERVED_SHARE:.0%} is served in time and TTFT p99 <= {bound}"


def _capacity(arrivals: Arrivals, rungs: Sequence[Rung]) -> Capacity:
    own = [rung for rung in rungs if rung.arrivals == arrivals.name]
    broken = next((at for at, rung in enumerate(own) if not rung.holds), None)
    held = own if broken is None else own[:broken]
    return Capacity(
        arrivals=arrivals.name,
        gamma_shape=arrivals.gamma_shape,
        capacity_rps=held[-1].rate_rps if held else None,
        is_knee_found=broken is not None and own[broken].is_valid,
    )


def _served_share(cell: Cell, tail_s: float) -> float:
    if not cell.requests or not cell.ok:
        return 0.0
    late = cell.arrivals_s / max(cell.arrivals_s, cell.answered_s - tail_s) if cell.arrivals_s else 1.0
    return cell.ok / cell.requests * late


def _middle(cells: Sequence[Cell], figure: str) -> float:
    spread = _spread(cells, figure)
    return math.inf if spread is None else spread.median


def _spread(cells: Sequence[Cell], figure: str) -> Spread | None:
    values = [value for cell in cells if (value := getattr(cell, figure)) is not None]
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def progress_text(cell: Cell) -> str:
    """One line a cell."""
    ttft = "-" if cell.ttft_p99_s is None else f"{cell.ttft_p99_s * 1e3:,.0f} ms"
    preempted = "" if cell.preemptions is None else f", {cell.preemptions:,} preempted"
    return (
        f"{cell.rate_rps:g} requests/s, {cell.arrivals}, seed {cell.seed}: {cell.requests:,} sent, {cell.ok:,} ok,"
        f" TTFT p99 {ttft}{preempted}{'' if cell.invalid is None else '; INVALID'}"
    )


def as_csv(cells: Sequence[Cell]) -> str:
    """One line a cell, by the names of Cell's fields; failures as `name=count` words."""
    names = [entry for entry in Cell.__struct_fields__ if entry != "failures"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "failures"])
    for cell in cells:
        failures = " ".join(f"{name}={count}" for name, count in cell.failures.items())
        writer.writerow([*(_plain(getattr(cell, name)) for name in names), failures])
    return text.getvalue()


def _plain(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
