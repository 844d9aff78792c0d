"""Histories of requests of any length: the sums of storage/rollup.py, and the minutes that are still marked there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import sqlalchemy as sa

from storage.engine import database_errors
from storage.rollup import (
    ALL_MODELS,
    BUCKETS,
    KINDS,
    MODEL,
    STEPS_S,
    bucket_bounds_s,
    counts_of,
    latencies_of,
    steps_of,
    stretches,
)
from storage.schema import requests, rollup_dirty, rollup_latencies, rollups

MAX_MINUTES = 360
"""Marked minutes that `read_history` adds up by itself; of more (an import at work) only the newest."""

MAX_NAMED_STEPS = 1000
"""Up to which a stretch names its steps, so that the database seeks the rest of the key in each."""


@dataclass(frozen=True, slots=True)
class History:
    """A stretch of time, added up.

    step_s: length of a point. counts: columns at, origin, model, upstream, outcome, requests, request_tokens,
    response_tokens. latencies: columns at, kind, bucket, requests. `at` is a point's start, epoch s.
    """

    step_s: int
    counts: pl.DataFrame
    latencies: pl.DataFrame


def step_for(span_s: float, points: int) -> int:
    """The shortest step of which at most `points` cover the span, seconds."""
    for step_s in (60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400):
        if span_s / step_s <= points:
            return step_s
    return math.ceil(span_s / points / 86_400) * 86_400


def read_history(
    engine: sa.Engine,
    start_s: float,
    end_s: float,
    *,
    points: int = 300,
    origins: Sequence[str] = ("client",),
    models: Sequence[str] = (),
) -> History:
    """The sums of a stretch, start included, end not, both taken to whole steps; of all models where none is named.

    Raises DatabaseUnavailable.
    """
    step_s = step_for(end_s - start_s, points)
    bases_s = [base_s for base_s in reversed(STEPS_S) if step_s % base_s == 0]
    first_s = math.floor(start_s / step_s) * step_s
    last_s = math.ceil(end_s / step_s) * step_s
    dialect = engine.dialect.name
    counts: list[pl.DataFrame] = []
    latencies: list[pl.DataFrame] = []

    with database_errors(engine), engine.connect() as connection:
        marked = sorted(
            connection.execute(
                sa.select(rollup_dirty.c.at)
                .distinct()
                .where(rollup_dirty.c.at >= first_s, rollup_dirty.c.at < last_s)
                .order_by(rollup_dirty.c.at.desc())
                .limit(MAX_MINUTES)
            ).scalars()
        )
        for table, frames in ((rollups, counts), (rollup_latencies, latencies)):
            at = table.c.at
            wanted = [at >= first_s, at < last_s, table.c.origin.in_(origins)]
            if models:
                wanted.append(table.c.model.in_(models))
            if table is rollup_latencies:
                if models:
                    wanted.append(table.c.kind.in_(KINDS))
                else:
                    wanted += [table.c.model == "", table.c.kind.in_([f"{ALL_MODELS}{kind}" for kind in KINDS])]
            # The longest steps; of those with a marked minute the shorter ones, and so on to the minutes.
            rest: list[sa.ColumnElement[bool]] = [sa.true()]
            for base_s in bases_s:
                stale = steps_of(marked, base_s)
                whole = [*wanted, table.c.step_s == base_s, sa.or_(*rest), at.not_in(stale)]
                if (last_s - first_s) // base_s <= MAX_NAMED_STEPS:
                    whole.append(at.in_(range(first_s, last_s, base_s)))
                frames.append(_read(connection, table, whole, step_s, base_s))
                rest = [sa.and_(at >= start, at < end) for start, end in stretches(stale, base_s, math.inf)]
                if not rest:
                    break
        for stretch in stretches(marked):
            chosen = sa.and_(requests.c.origin.in_(origins), *([MODEL.in_(models)] if models else []))
            counts.append(_frame(connection, counts_of(dialect, step_s, *stretch).where(chosen)))
            latencies.extend(
                _frame(connection, latencies_of(dialect, step_s, *stretch, kind).where(chosen)) for kind in KINDS
            )
    latencies = [frame.with_columns(pl.col("kind").str.strip_prefix(ALL_MODELS)) for frame in latencies]
    return History(step_s, _summed(counts, rollups), _summed(latencies, rollup_latencies))


def _read(
    connection: sa.Connection, table: sa.Table, wanted: Sequence[sa.ColumnElement[bool]], step_s: int, base_s: int
) -> pl.DataFrame:
    sums = [column for column in table.c if column.name in _SUMS]
    keys = [column for column in table.c if column.name in _KEYS[table.name]]
    if step_s == base_s:  # nothing to add up, and the database need not sort
        return _frame(connection, sa.select(table.c.at, *keys, *sums).where(*wanted))
    step = sa.literal_column(str(step_s), sa.BigInteger())
    at = table.c.at - (table.c.at % step + step) % step  # of whole seconds: also before 1970, and twice as quick
    statement = (
        sa.select(
            at.label("at"),
            *keys,
            *(sa.cast(sa.func.sum(column), sa.BigInteger()).label(column.name) for column in sums),
        )
        .where(*wanted)
        .group_by(at, *keys)
    )
    return _frame(connection, statement)


_SUMS = ("requests", "request_tokens", "response_tokens")
_KEYS = {"rollups": ("origin", "model", "upstream", "outcome"), "rollup_latencies": ("kind", "bucket")}
"""What a history's rows are told apart by, beside `at`."""


def _frame(connection: sa.Connection, statement: sa.Select[tuple[object, ...]]) -> pl.DataFrame:
    result = connection.execute(statement)
    names = list(result.keys())
    rows = result.cursor.fetchall() if result.cursor is not None else []  # the driver's own: there may be many
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    return pl.DataFrame(
        [
            pl.Series(name, values, dtype=kind)
            for (name, kind), values in zip(_types(names).items(), columns, strict=True)
        ]
    )


def _types(names: Sequence[str]) -> dict[str, pl.DataType]:
    text = ("origin", "model", "upstream", "outcome", "kind")
    return {name: pl.String() if name in text else pl.Int64() for name in names}


def _summed(frames: Sequence[pl.DataFrame], table: sa.Table) -> pl.DataFrame:
    keys = ["at", *_KEYS[table.name]]
    sums = [column.name for column in table.c if column.name in _SUMS]
    return (
        pl.concat([frame.select(*keys, *sums) for frame in frames])
        .group_by(keys)
        .agg(pl.col(name).sum() for name in sums)
        .sort(keys)
    )


def quantile_s(buckets: Sequence[tuple[int, int]], share: float) -> float | None:
    """The value below which `share` of the requests lie, from (bucket, requests) by bucket, seconds; None of nothing.

    Interpolated on a logarithmic scale inside its bucket: off by at most 19 %, the width of one. Above the last
    bucket's bound it is that bound.
    """
    total = sum(count for _, count in buckets)
    if not total:
        return None
    bounds = bucket_bounds_s()
    rank = share * total
    below = 0
    for bucket, count in buckets:
        if below + count >= rank:
            if bucket >= BUCKETS - 1:
                return bounds[-1]
            within = (rank - below) / count
            return bounds[bucket] * math.exp2((within - 1) / 4)
        below += count
    return bounds[min(buckets[-1][0], BUCKETS - 2)]
