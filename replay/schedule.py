"""From the rows of a trace to when each is due: a pure function over batches, in memory that does not grow.

    zero        the stamp of the first row of the window, whether or not that row can be sent
    due_s       (stamp - zero + offset) / speed
    window      rows with start_s <= stamp - (stamp of the trace's first row) < start_s + duration_s; then `limit` rows
    offset      0, or for rows with equal stamps (`ties="spread"`) sorted uniform draws in [0, 1) s of trace time
    warm-up     rows due before `warmup_s`: sent like all others, and marked as not to be measured

BurstGPT's stamps are whole seconds, so several rows with one stamp are an artefact of rounding: sent at once they would
be a burst that never was. Only a trace whose stamps are all whole is treated so (judged by its first
`LOOK_AHEAD_ROWS` rows of the window; a fraction seen later ends the spreading). The draws depend on the seed and the
stamp alone: the same seed gives the same schedule, and a smaller limit a prefix of it.

A trace must be in order of time. It holds the rows of one stamp at a time, and the look-ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import polars as pl

from traces.record import LogType, Outcome

Ties = Literal["spread", "keep"]

LOOK_AHEAD_ROWS = 10_000
MAX_TIES = 1_000_000
"""Rows with one stamp that are held at once. BurstGPT's busiest second is below 1,000; past this it is no trace."""
SPEED_RANGE = (1e-6, 1e9)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Which rows, and how fast. Raises ValueError naming the option, the value and the rule."""

    speed: float = 1.0
    """Trace seconds a second."""
    start_s: float = 0.0
    """Trace time after the trace's first row."""
    duration_s: float | None = None
    """Trace time; None is to the end."""
    limit: int | None = None
    """Rows read, sent or not."""
    ties: Ties = "spread"
    seed: int = 0
    warmup_s: float = 0.0
    """Of the schedule's own time, after the speed; from it on rows count."""

    def __post_init__(self) -> None:
        if not SPEED_RANGE[0] <= self.speed <= SPEED_RANGE[1]:
            raise ValueError(f"speed: expected {SPEED_RANGE[0]:g} to {SPEED_RANGE[1]:g}, got {self.speed:g}")
        if not 0 <= self.start_s < math.inf:
            raise ValueError(f"start: expected seconds >= 0, got {self.start_s:g}")
        if self.duration_s is not None and not 0 < self.duration_s < math.inf:
            raise ValueError(f"duration: expected seconds > 0, got {self.duration_s:g}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected rows >= 1, got {self.limit}")
        if self.ties not in ("spread", "keep"):
            raise ValueError(f"ties: expected spread or keep, got {self.ties!r}")
        if self.seed < 0:
            raise ValueError(f"seed: expected an integer >= 0, got {self.seed}")
        if not 0 <= self.warmup_s < math.inf:
            raise ValueError(f"warmup: expected seconds >= 0, got {self.warmup_s:g}")


class Planned(msgspec.Struct, frozen=True, gc=False):
    """One row of the trace and when it is due, seconds after schedule zero."""

    index: int
    """The row's place in the trace, from 0."""
    due_s: float
    session_id: str | None
    model: str | None
    """As the trace has it."""
    request_tokens: int | None
    response_tokens: int | None
    log_type: str = LogType.API
    is_failure: bool = False
    """The trace's outcome is not `ok`."""
    is_warmup: bool = False
    """To be sent and not measured."""
    elapsed_s: float | None = None
    """How long the request took where the trace was recorded."""
    prefix_blocks: tuple[int, ...] | None = None
    """Of its prompt, as the trace has them."""

    @property
    def is_sendable(self) -> bool:
        """Both lengths are known and at least 1, so that there is something to ask for."""
        return bool(self.request_tokens and self.response_tokens)


class _Row(NamedTuple):
    received_at: float
    session_id: str | None
    model: str | None
    request_tokens: int | None
    response_tokens: int | None
    log_type: str
    outcome: str
    elapsed_s: float | None
    prefix_blocks: list[int] | None


def plan(batches: Iterable[pl.DataFrame], options: PlanOptions) -> Iterator[Planned]:
    """The rows of the window in order, each with its due time; `due_s` never decreases.

    batches: columns of `traces.batch.SCHEMA`, rows in order of `received_at`.
    Raises ValueError, while iterating, naming the first row that goes backwards, a stamp that is no number, or a
    stamp shared by more than MAX_TIES rows.
    """
    parts = _window(batches, options)
    first = next(parts, None)
    if first is None:
        return
    first_index, head = first
    rows = (_Row(*row) for frame in chain([head], (part for _, part in parts)) for row in frame.iter_rows())
    zero_s = head["received_at"][0]
    offsets = _spread(rows, options.seed) if options.ties == "spread" else ((0.0, row) for row in rows)
    for index, (offset_s, row) in enumerate(islice(offsets, options.limit), first_index):
        due_s = (row.received_at - zero_s + offset_s) / options.speed
        yield Planned(
            index,
            due_s,
            row.session_id,
            row.model,
            row.request_tokens,
            row.response_tokens,
            row.log_type,
            row.outcome != Outcome.OK,
            due_s < options.warmup_s,
            row.elapsed_s,
            None if row.prefix_blocks is None else tuple(row.prefix_blocks),
        )


def _window(batches: Iterable[pl.DataFrame], options: PlanOptions) -> Iterator[tuple[int, pl.DataFrame]]:
    """The parts of the batches within the window, each with the index of its first row; none is empty."""
    rows_before = 0
    last_s = -math.inf
    first_s = None
    for batch in batches:
        if batch.is_empty():
            continue
        stamps_s = batch["received_at"].cast(pl.Float64).to_numpy()
        broken = np.flatnonzero(~np.isfinite(stamps_s))
        if broken.size:
            row = rows_before + int(broken[0]) + 1
            raise ValueError(f"row {row}: received_at: expected seconds, got {batch['received_at'][int(broken[0])]}")
        previous_s = np.concatenate(([last_s], stamps_s[:-1]))
        backwards = np.flatnonzero(stamps_s < previous_s)
        if backwards.size:
            at = int(backwards[0])
            raise ValueError(
                f"row {rows_before + at + 1}: received_at: expected >= {previous_s[at]:.6f}, the row before it, "
                f"got {stamps_s[at]:.6f}; a replay reads a trace in order of time: sort it by its timestamps first"
            )
        if first_s is None:
            first_s = float(stamps_s[0])
        start_s = first_s + options.start_s
        end_s = math.inf if options.duration_s is None else start_s + options.duration_s
        lower, upper = np.searchsorted(stamps_s, [start_s, end_s])
        if upper > lower:
            yield rows_before + int(lower), batch[int(lower) : int(upper)].select(_Row._fields)
        if upper < stamps_s.size:
            return
        rows_before += stamps_s.size
        last_s = float(stamps_s[-1])


def _spread(rows: Iterator[_Row], seed: int) -> Iterator[tuple[float, _Row]]:
    """Each row with its offset in seconds."""
    ahead: list[_Row] = []
    is_whole = True
    while is_whole and len(ahead) < LOOK_AHEAD_ROWS and (row := next(rows, None)) is not None:
        ahead.append(row)
        is_whole = row.received_at.is_integer()
    rows = chain(ahead, rows)
    del ahead
    ties: list[_Row] = []
    for row in rows:
        if not is_whole:
            yield from ((0.0, tied) for tied in ties)
            ties.clear()
            yield 0.0, row
            continue
        if ties and row.received_at != ties[0].received_at:
            is_whole = row.received_at.is_integer()
            yield from zip(_offsets_s(ties, seed) if is_whole else [0.0] * len(ties), ties, strict=True)
            ties.clear()
        ties.append(row)
        if len(ties) > MAX_TIES:
            raise ValueError(f"received_at {row.received_at:.0f}: expected at most {MAX_TIES} rows with one stamp")
    yield from zip(_offsets_s(ties, seed) if is_whole else [0.0] * len(ties), ties, strict=True)


def _offsets_s(ties: list[_Row], seed: int) -> list[float]:
    if len(ties) < 2:
        return [0.0] * len(ties)
    rng = np.random.default_rng([seed, int(ties[0].received_at) % (1 << 64)])
    return np.sort(rng.random(len(ties))).tolist()  # type: ignore[no-any-return]
