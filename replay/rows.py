"""The rows that a replay plans: from a trace file, or made as they are needed from a profile or a process.

    trace                     its rows by `replay.source`
    trace, process            the same rows at the process's arrivals, by `replay.arrivals`
    profile                   rows of `traces.generation`: arrivals with bursts and hours, joint lengths, sessions
    profile, process          its lengths, models and log types at the process's arrivals, without sessions

Nothing is written to disk and nothing is held but the batch at hand. A profile's rows have no end of their own: a
duration or a limit ends them. Its hours of the week begin at `start_s` of the options, in seconds after Monday 0:00
UTC; what began before that goes on there, so that the rate is right from the first second on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl

from replay.arrivals import ArrivalOptions, open_process, retime
from replay.source import SourceOptions, counted_fields, mean_rate_rps, select, takes_every_row
from traces import burstgpt
from traces.codec import read_trace, sniff
from traces.profile import MONDAY_S

_ARRIVALS = 1
"""The random numbers of arrivals; prompts and ties have the seed's own."""


def open_rows(
    trace: Path | None, source: SourceOptions, arrivals: ArrivalOptions, *, format: str | None = None
) -> Iterator[pl.DataFrame]:
    """Batches of `traces.batch.SCHEMA` in order of time, read or made as they are asked for.

    trace: None takes the profile of `arrivals`. format: of the trace; None finds it out.
    Raises ValueError naming the option or the row and the rule, TraceFormatError, OSError: what is wrong with options
    and files at once, what is wrong with a row when it is reached.
    """
    if trace is None:
        return _generated(source, arrivals)
    if arrivals.profile is not None and arrivals.process != "modeled":
        raise ValueError(
            f"profile: expected without a trace or with the process modeled, got it with {arrivals.process}"
        )
    if arrivals.rate_rps is not None and arrivals.process == "trace":
        raise ValueError(
            f"rate: expected with a process or a profile, got {arrivals.rate_rps:g} with a trace's own arrivals,"
            " which a target rps scales"
        )
    if source.target_rps is not None and source.source_rps is None:
        source = replace(source, source_rps=_counted_rps(trace, source, format))
    opened = [read_trace(trace, format=format)]  # now, so that a file that is none is said before all else
    batches = select(
        lambda: opened.pop() if opened else read_trace(trace, format=format),
        source,
        open_counted=lambda: read_trace(trace, format=format, fields=counted_fields(source)),
    )
    if arrivals.process == "trace":
        return batches
    zero_s = 0.0
    if arrivals.profile is not None:  # whose hours of the week are those of the rows
        first = next(batches, None)
        if first is None:
            return batches
        zero_s = float(first["received_at"][0])
        batches = chain((first,), batches)
    process = open_process(arrivals, start_s=zero_s)
    return batches if process is None else retime(batches, process, np.random.default_rng([source.seed, _ARRIVALS]))


def source_rate_rps(trace: Path, source: SourceOptions, format: str | None) -> float:
    """The mean rate of the rows that are taken, before loop and scale, in requests a second of trace time.

    Raises as `open_rows`.
    """
    counted_rps = _counted_rps(trace, source, format)
    if counted_rps is not None:
        return counted_rps
    return mean_rate_rps(lambda: read_trace(trace, format=format, fields=counted_fields(source)), source)


def _counted_rps(trace: Path, source: SourceOptions, format: str | None) -> float | None:
    """The same where it follows from counting lines."""
    if takes_every_row(source) and (format or sniff(trace)) in ("burstgpt", "burstgpt6"):
        return burstgpt.mean_rate_rps(trace)
    return None


def _generated(source: SourceOptions, arrivals: ArrivalOptions) -> Iterator[pl.DataFrame]:
    from traces.generation import generate

    profile, rate_rps = arrivals.profile, arrivals.rate_rps
    if profile is None:
        raise ValueError("trace: expected a file, or a profile to make rows of, got neither")
    start_s = MONDAY_S + source.start_s
    if source.target_rps is not None:
        if rate_rps is not None:
            raise ValueError("target rps: expected without a rate, which is the same for a profile's rows, got both")
        rate_rps = source.target_rps / source.speed
    process = open_process(replace(arrivals, rate_rps=rate_rps), start_s=start_s)

    def made() -> Iterator[pl.DataFrame]:
        return generate(
            profile,
            seed=source.seed,
            duration_s=source.duration_s,
            start_s=start_s,
            rate_rps=rate_rps if process is None else None,
            process=process,
        )

    opened = [made()]  # now, so that a wrong option is said before all else
    rest = replace(source, start_s=0.0, duration_s=None, target_rps=None)
    return select(lambda: opened.pop() if opened else made(), rest)
