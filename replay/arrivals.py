"""Other times for a trace: the arrival processes that a replay can ask for, and a trace's rows moved onto them.

    trace       the trace's own stamps
    constant    one request every 1 / rate seconds
    poisson     Gamma gaps of shape 1
    gamma       Gamma gaps of an asked shape, below 1 bursty; vLLM's --burstiness is this shape
    curve       Poisson, or Gamma by `shape`, whose rate follows a CSV of `time_s,rps` by time rescaling: a rate holds
                from its time to the next row's, the last one for ever (0 ends the arrivals there)
    modeled     Modeled Scaling: gaps Gamma(alpha(t), beta(t)). With a profile alpha and the rate are those of its hour
                of the week; without one the paper's constants 0.5, 2 and (for lengths, in `traces.generation`) 1.1.
                beta is the rate parameter, as the paper says, so the mean gap is alpha / beta = 0.25 s; the authors'
                code takes it as numpy's scale, a mean gap of 1 s.

An asked rate scales the process as a whole. `traces.arrivals` has the mathematics.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import polars as pl

from traces.arrivals import MAX_RATE_RPS, SHAPE_RANGE, Process, arrival_times_s, steady
from traces.codec import shown
from traces.profile import HOUR_S, MONDAY_S, WEEK_S, WorkloadProfile

Name = Literal["trace", "constant", "poisson", "gamma", "curve", "modeled"]

PAPER_ALPHA: Final = 0.5
PAPER_BETA: Final = 2.0
PAPER_THETA: Final = 1.1
MAX_CURVE_ROWS: Final = 1_000_000
_CURVE: Final = ("time_s", "rps")


@dataclass(frozen=True, slots=True)
class ArrivalOptions:
    """Which process. Raises ValueError naming the option, the value and the rule."""

    process: Name = "trace"
    rate_rps: float | None = None
    """The mean rate. None is a curve's or a model's own; constant, poisson and gamma need it."""
    shape: float | None = None
    """Of the gaps, for gamma and curve."""
    curve: Path | None = None
    profile: WorkloadProfile | None = None
    """For modeled; None is the paper's constants."""

    def __post_init__(self) -> None:
        if self.process not in get_args(Name):
            raise ValueError(f"process: expected one of {', '.join(get_args(Name))}, got {self.process!r}")
        if self.rate_rps is not None and not 0 < self.rate_rps <= MAX_RATE_RPS:
            raise ValueError(f"rate: expected above 0 to {MAX_RATE_RPS:g} requests/s, got {self.rate_rps:g}")
        if self.process in ("constant", "poisson", "gamma") and self.rate_rps is None:
            raise ValueError(f"rate: expected with the process {self.process}, got none")
        if self.process == "gamma" and self.shape is None:
            raise ValueError("shape: expected with the process gamma, got none")
        if self.shape is not None and self.process not in ("gamma", "curve"):
            raise ValueError(f"shape: expected with the processes gamma and curve only, got it with {self.process}")
        if self.shape is not None and not SHAPE_RANGE[0] <= self.shape <= SHAPE_RANGE[1]:
            raise ValueError(f"shape: expected {SHAPE_RANGE[0]:g} to {SHAPE_RANGE[1]:g}, got {self.shape:g}")
        if (self.curve is not None) != (self.process == "curve"):
            raise ValueError(f"curve: expected a file with the process curve and no other, got {self.process}")


def open_process(options: ArrivalOptions, *, start_s: float = 0.0) -> Process | None:
    """The process asked for; None for the trace's own stamps. Reads the curve's file.

    start_s: epoch seconds of the process's zero, for the hours of the week of a profile.
    Raises ValueError naming file, line and rule for a curve that is none; OSError where it cannot be read.
    """
    rate_rps = options.rate_rps
    process: Process
    match options.process:
        case "trace":
            return None
        case "constant":
            return steady(rate_rps or 0.0, math.inf)
        case "poisson":
            return steady(rate_rps or 0.0, 1.0)
        case "gamma":
            return steady(rate_rps or 0.0, options.shape or 1.0)
        case "curve":
            assert options.curve is not None  # by ArrivalOptions
            process = read_curve(options.curve, shape=options.shape or 1.0)
        case "modeled":
            process = modeled(options.profile, start_s=start_s)
    if rate_rps is None:
        return process
    if not process.mean_rps:
        raise ValueError(f"rate: expected a curve with a mean rate > 0 to scale to {rate_rps:g}, got one of 0")
    return process.scaled(rate_rps / process.mean_rps)


def modeled(profile: WorkloadProfile | None, *, start_s: float = 0.0) -> Process:
    """alpha(t) and beta(t): the paper's constants, or a profile's services together, hour of the week by hour.

    A profile's rate counts requests, turns too. Of several services the shape is that of their joined gaps' variance
    in the long run: counts add up, so the index of dispersion is the services' 1 / shape, weighted by their rates.
    """
    if profile is None:
        return steady(PAPER_BETA / PAPER_ALPHA, PAPER_ALPHA)
    hours = max(len(service.slots) for service in profile.services)
    rates_rps, dispersions = np.zeros(hours), np.zeros(hours)
    for service in profile.services:
        turns = 1.0 if service.sessions is None else service.sessions.mean_turns
        rates = np.resize([slot.rate_rps * turns for slot in service.slots], hours)
        rates_rps += rates
        dispersions += rates / np.resize([slot.shape for slot in service.slots], hours)
    shapes = np.divide(rates_rps, dispersions, out=np.ones(hours), where=dispersions > 0)
    if hours == 1:
        return steady(float(rates_rps[0]), float(shapes[0]))
    # Process time 0 is start_s: the week's hours follow from there, the first one cut.
    phase_s = (start_s - MONDAY_S) % WEEK_S
    first = int(phase_s // HOUR_S)
    starts_s = [
        0.0,
        *(number * HOUR_S - phase_s for number in range(first + 1, first + hours + (phase_s % HOUR_S > 0))),
    ]
    order = [(first + step) % hours for step in range(len(starts_s))]
    return Process(
        tuple(starts_s), tuple(rates_rps[order].tolist()), tuple(shapes[order].tolist()), period_s=WEEK_S
    )  # fmt: skip


def read_curve(path: Path, *, shape: float = 1.0) -> Process:
    """The rate curve in a CSV file with the columns time_s and rps; times from 0, strictly ascending.

    Raises ValueError naming file, line, column, rule and value; OSError where it cannot be read.
    """
    starts_s: list[float] = []
    rates_rps: list[float] = []
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if not set(_CURVE) <= set(header):
                raise ValueError(f"{path}:1: expected the columns time_s,rps, got {shown(','.join(header))}")
            for row in reader:
                if not row:
                    continue
                place = f"{path}:{reader.line_num}"
                if len(row) != len(header):
                    raise ValueError(f"{place}: expected {len(header)} fields, got {len(row)}")
                time_s, rps = (_number(row[header.index(name)], f"{place}: column '{name}'") for name in _CURVE)
                if starts_s and not time_s > starts_s[-1]:
                    raise ValueError(
                        f"{place}: column 'time_s': expected above {starts_s[-1]:g}, as times ascend, got {time_s:g}"
                    )
                if not starts_s and time_s != 0:
                    raise ValueError(f"{place}: column 'time_s': expected 0 in the first row, got {time_s:g}")
                if not 0 <= rps <= MAX_RATE_RPS:
                    raise ValueError(f"{place}: column 'rps': expected 0 to {MAX_RATE_RPS:g}, got {rps:g}")
                starts_s.append(time_s)
                rates_rps.append(rps)
                if len(starts_s) > MAX_CURVE_ROWS:
                    raise ValueError(f"{place}: expected at most {MAX_CURVE_ROWS} rows, got more")
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}:{reader.line_num + 1}: expected CSV in UTF-8: {error}") from error
    if not any(rates_rps):
        raise ValueError(f"{path}: expected a row with rps > 0, got none")
    return Process(tuple(starts_s), tuple(rates_rps), (shape,) * len(starts_s))


def retime(batches: Iterable[pl.DataFrame], process: Process, rng: np.random.Generator) -> Iterator[pl.DataFrame]:
    """The trace's rows in their order, each at the next arrival of the process, which begins at the first row's stamp.

    What a row asks for stays, and so does the order of a session's turns; gaps inside sessions become the process's.
    Ends with the rows or with the process, whichever is first.
    """
    times_s = arrival_times_s(process.segments(), rng)
    held = np.empty(0)
    zero_s: float | None = None
    for batch in batches:
        if batch.is_empty():
            continue
        if zero_s is None:
            zero_s = float(batch["received_at"][0])
        while len(held) < batch.height and (chunk := next(times_s, None)) is not None:
            held = np.concatenate((held, chunk))
        now_s, held = held[: batch.height], held[batch.height :]
        kept = batch.head(len(now_s))
        if kept.height:
            yield kept.with_columns(received_at=pl.Series(np.round((zero_s + now_s) * 1e6) / 1e6))
        if kept.height < batch.height:
            return


def _number(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{place}: expected a number, got {shown(text)}") from None
    return value
