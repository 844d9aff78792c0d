"""From a trace to the trace that a replay plans: which rows, at what rate, how often, in memory that does not grow.

    window      rows with start_s <= stamp - (stamp of the trace's first row) < start_s + duration_s
    filters     model, log type, session, outcome: a row stays when each filter that is given names its value
    model map   names of models after the filters
    idle cap    a gap that is longer is cut to it
    loop        the trace so far again and again, a mean gap after its end; sessions are new ones at each pass
    rate scale  below 1: each session stays with that probability, whole. Above 1: copies of each session, whole, as
                new sessions, each `1 to jitter_s` whole seconds later; of 2.3 two and, with probability 0.3, a third
    target rps  a rate scale: asked rate / (the trace's mean rate after all of the above but the loop, at this speed)

In this order. A row without a session counts as a session of its own. Speed, ties and limit are `replay.schedule`'s.
Which sessions stay follows from the seed and the session's id alone: a smaller scale keeps a part of what a larger one
keeps. Whole-second stamps stay whole (as the idle cap is then to be), so that the schedule still spreads their ties.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.record import LogType, Outcome

Batches = Callable[[], Iterable[pl.DataFrame]]
"""Opens the trace from its beginning; a loop and a target rate read it more than once."""

MAX_RATE_SCALE: Final = 1000.0
MAX_JITTER_S: Final = 86_400.0
COPIED_ROWS: Final = 8_192
"""Rows of which copies are made at once."""
MIN_GAP_S: Final = 0.001
"""Shortest idle cap, and shortest gap between passes: far above what rounding an epoch stamp can turn around."""


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What to take from a trace. Raises ValueError naming the option, the value and the rule."""

    start_s: float = 0.0
    """Trace time after the trace's first row."""
    duration_s: float | None = None
    """Trace time; None is to the end."""
    models: tuple[str, ...] = ()
    """An empty filter lets everything pass."""
    log_types: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()
    model_map: Mapping[str, str] = field(default_factory=dict)
    idle_cap_s: float | None = None
    passes: int | None = 1
    """How often the trace is read; None is for ever."""
    rate_scale: float | None = None
    target_rps: float | None = None
    """Needs one more pass over the trace before the first row, unless `source_rps` is known."""
    source_rps: float | None = None
    """What `mean_rate_rps` would find, for `target_rps`."""
    speed: float = 1.0
    """The schedule's, for `target_rps`; it is not applied here."""
    jitter_s: float = 60.0
    """Rows of so many seconds of trace time are held while copies are made."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start_s < math.inf:
            raise ValueError(f"start: expected seconds >= 0, got {self.start_s:g}")
        if self.duration_s is not None and not 0 < self.duration_s < math.inf:
            raise ValueError(f"duration: expected seconds > 0, got {self.duration_s:g}")
        for name, values, known in (("log type", self.log_types, LogType), ("outcome", self.outcomes, Outcome)):
            texts = [str(each) for each in known]
            for value in values:
                if value not in texts:
                    raise ValueError(f"{name}: expected one of {', '.join(texts)}, got {value!r}")
        if self.idle_cap_s is not None and not MIN_GAP_S <= self.idle_cap_s < math.inf:
            raise ValueError(f"idle cap: expected seconds >= {MIN_GAP_S:g}, got {self.idle_cap_s:g}")
        if self.passes is not None and self.passes < 1:
            raise ValueError(f"loop: expected passes >= 1, got {self.passes}")
        if self.rate_scale is not None and not 0 < self.rate_scale <= MAX_RATE_SCALE:
            raise ValueError(f"rate scale: expected above 0 to {MAX_RATE_SCALE:g}, got {self.rate_scale:g}")
        if self.target_rps is not None and not 0 < self.target_rps < math.inf:
            raise ValueError(f"target rps: expected requests/s > 0, got {self.target_rps:g}")
        if self.source_rps is not None and not 0 < self.source_rps < math.inf:
            raise ValueError(f"source rps: expected requests/s > 0, got {self.source_rps:g}")
        if self.rate_scale is not None and self.target_rps is not None:
            raise ValueError("rate scale: expected without a target rps, which sets it, got both")
        if not 0 < self.speed < math.inf:
            raise ValueError(f"speed: expected a number > 0, got {self.speed:g}")
        if not 1 <= self.jitter_s <= MAX_JITTER_S:
            raise ValueError(f"jitter: expected 1 to {MAX_JITTER_S:g} seconds, got {self.jitter_s:g}")
        if self.seed < 0:
            raise ValueError(f"seed: expected an integer >= 0, got {self.seed}")


def select(
    open_trace: Batches, options: SourceOptions, *, open_counted: Batches | None = None
) -> Iterator[pl.DataFrame]:
    """The trace that the options ask for, as batches, none empty, in order of time.

    open_trace: gives columns of `traces.batch.SCHEMA`, rows in order of `received_at`.
    open_counted: gives the same rows with at least `counted_fields(options)`, for what only counts them.
    Raises ValueError while iterating: for a first row that goes backwards, for a target rate of a trace that has none,
    or that needs a scale past MAX_RATE_SCALE.
    """
    scale = options.rate_scale
    if options.target_rps is not None:
        source_rps = options.source_rps or mean_rate_rps(open_counted or open_trace, options)
        scale = _scale_for(options.target_rps, source_rps * options.speed)
    rows = _looped(open_trace, options)
    if scale is None or scale == 1:
        yield from rows
    else:
        yield from _scaled(rows, scale, int(options.jitter_s), options.seed)


def counted_fields(options: SourceOptions) -> list[str]:
    """The fields of a record that `mean_rate_rps` looks at."""
    return ["received_at", *(column for column, values in _filters(options) if values)]


def takes_every_row(options: SourceOptions) -> bool:
    """Whether the mean rate is that of the whole file: no window, no filter, no idle cap."""
    return counted_fields(options) == ["received_at"] and (
        (options.start_s, options.duration_s, options.idle_cap_s) == (0.0, None, None)
    )


def _filters(options: SourceOptions) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (
        ("session_id", options.sessions),
        ("model", options.models),
        ("log_type", options.log_types),
        ("outcome", options.outcomes),
    )


def mean_rate_rps(open_trace: Batches, options: SourceOptions) -> float:
    """Requests a second of trace time, before loop and scale: gaps / span. Reads the trace once.

    Raises ValueError under two rows, or where all have one stamp.
    """
    rows, first_s, last_s = 0, math.inf, -math.inf
    for batch in _one_pass(open_trace, replace(options, model_map={})):
        rows += batch.height
        first_s, last_s = min(first_s, batch["received_at"][0]), batch["received_at"][-1]
    if rows < 2 or last_s <= first_s:
        raise ValueError(f"target rps: expected a trace with a mean rate, got {rows} rows that span no time")
    return (rows - 1) / (last_s - first_s)


def _scale_for(target_rps: float, mean_rps: float) -> float:
    scale = target_rps / mean_rps
    if scale > MAX_RATE_SCALE:
        raise ValueError(
            f"target rps: expected at most {MAX_RATE_SCALE:g} times the trace's {mean_rps:g} requests/s,"
            f" got {target_rps:g}"
        )
    return scale


def _one_pass(open_trace: Batches, options: SourceOptions) -> Iterator[pl.DataFrame]:
    """Window, filters, model map and idle cap."""
    kept = pl.lit(True)
    for column, values in _filters(options):
        if values:
            kept &= pl.col(column).is_in(list(values)).fill_null(False)
    cut_s = 0.0
    previous_s: float | None = None
    for window in _window(open_trace(), options):
        batch = window.filter(kept)
        if batch.is_empty():
            continue
        if options.model_map:
            batch = batch.with_columns(pl.col("model").replace(dict(options.model_map)))
        if options.idle_cap_s is not None:
            stamps_s = batch["received_at"].to_numpy()
            gaps_s = np.diff(stamps_s, prepend=stamps_s[0] if previous_s is None else previous_s)
            previous_s = float(stamps_s[-1])
            cuts_s = cut_s + np.cumsum(np.maximum(gaps_s - options.idle_cap_s, 0.0))
            cut_s = float(cuts_s[-1])
            batch = batch.with_columns(received_at=_rounded(stamps_s - cuts_s))
        yield batch


def _window(batches: Iterable[pl.DataFrame], options: SourceOptions) -> Iterator[pl.DataFrame]:
    first_s: float | None = None
    last_s = -math.inf
    rows_before = 0
    for batch in batches:
        if batch.is_empty():
            continue
        stamps_s = batch["received_at"].cast(pl.Float64).to_numpy()
        wrong = np.flatnonzero(~(np.diff(stamps_s, prepend=last_s) >= 0) | ~np.isfinite(stamps_s))
        if wrong.size:
            at = int(wrong[0])
            raise ValueError(
                f"row {rows_before + at + 1}: received_at: expected seconds, not before the row before it,"
                f" got {batch['received_at'][at]}; sort the trace by its timestamps first"
            )
        first_s = float(stamps_s[0]) if first_s is None else first_s
        end_s = math.inf if options.duration_s is None else first_s + options.start_s + options.duration_s
        lower, upper = np.searchsorted(stamps_s, [first_s + options.start_s, end_s])
        if upper > lower:
            yield batch[int(lower) : int(upper)]
        if upper < stamps_s.size:
            return
        rows_before += stamps_s.size
        last_s = float(stamps_s[-1])


def _looped(open_trace: Batches, options: SourceOptions) -> Iterator[pl.DataFrame]:
    number, shift_s = 1, 0.0
    while options.passes is None or number <= options.passes:
        rows, first_s, last_s, is_whole = 0, 0.0, 0.0, True
        for batch in _one_pass(open_trace, options):
            first_s = batch["received_at"][0] if not rows else first_s
            last_s = batch["received_at"][-1]
            is_whole = is_whole and bool((batch["received_at"] % 1 == 0).all())
            rows += batch.height
            if number > 1:
                stamps_s = _rounded(batch["received_at"].to_numpy() + shift_s)
                batch = _renamed(batch, pl.lit(f"~{number}")).with_columns(received_at=stamps_s)
            yield batch
        if not rows:
            return
        # A trace of one stamp goes on a second later; whole seconds stay whole.
        gap_s = (last_s - first_s) / (rows - 1) if last_s > first_s else 1.0
        shift_s += last_s - first_s + (math.ceil(gap_s) if is_whole else max(gap_s, MIN_GAP_S))
        number += 1


def _scaled(batches: Iterator[pl.DataFrame], scale: float, jitter_s: int, seed: int) -> Iterator[pl.DataFrame]:
    """Thinned, or with copies. Copies wait until all rows before them are out; equal stamps keep the trace's order."""
    key = seed.to_bytes((seed.bit_length() + 7) // 8 or 1)
    key = key if len(key) <= 64 else hashlib.blake2b(key).digest()
    most = math.ceil(scale)
    held: list[pl.DataFrame] = []
    rows = 0
    for batch in (part for whole in batches for part in whole.iter_slices(COPIED_ROWS)):
        numbered = batch.with_columns(pl.int_range(rows, rows + batch.height, dtype=pl.Int64).alias("_row"))
        rows += batch.height
        name = pl.coalesce(pl.lit("s") + pl.col("session_id"), pl.lit("r") + pl.col("request_id"))
        names, places = np.unique(numbered.select(name).to_series().to_numpy(), return_inverse=True)
        draws = _draws(names, key, most)[places]
        # Of the `most` copies the last is there with a probability: the scale's fraction.
        has_last = draws[:, 0] < scale - (most - 1)
        for copy in range(1, most + 1):
            part = numbered if copy < most else numbered.filter(pl.Series(has_last))
            if copy > 1:
                shift_s = 1 + np.floor(draws[:, copy - 1] * jitter_s)
                shift_s = shift_s if copy < most else shift_s[has_last]
                part = _renamed(part, pl.lit(f"#{copy}")).with_columns(pl.col("received_at") + pl.Series(shift_s))
            held.append(part.with_columns(pl.lit(copy, dtype=pl.Int64).alias("_copy")))
        waiting = pl.concat(held)
        if most == 1:
            held = []
            out = waiting
        else:
            is_due = pl.col("received_at") < batch["received_at"][-1]
            held = [waiting.filter(~is_due)]
            out = waiting.filter(is_due)
        if out.height:
            yield _in_order(out)
    if held and (out := pl.concat(held)).height:
        yield _in_order(out)


def _in_order(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.sort("received_at", "_row", "_copy").drop("_row", "_copy")


def _draws(names: NDArray[np.object_], key: bytes, columns: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), `columns` for each name; the first of a name is the same for any number of columns."""
    words = [hashlib.shake_128(key + len(key).to_bytes() + name.encode()).digest(8 * columns) for name in names]
    bits = np.frombuffer(b"".join(words), dtype="<u8").reshape(len(names), columns) >> 11
    return bits.astype(np.float64) * 2.0**-53


def _renamed(batch: pl.DataFrame, suffix: pl.Expr) -> pl.DataFrame:
    """Copies of rows: new request ids, and sessions of their own where there are sessions."""
    return batch.with_columns(pl.col("request_id") + suffix, pl.col("session_id") + suffix)


def _rounded(stamps_s: NDArray[np.float64]) -> pl.Series:
    """To the microseconds that a record keeps, so that sums leave whole seconds whole."""
    return pl.Series(np.round(stamps_s * 1e6) / 1e6)
