"""Requests added up by minute and by hour, so that a year's history is as quick to draw as an hour's.

`rollups` counts requests and tokens by (step, start, origin, model, upstream, outcome), `rollup_latencies` holds
histograms of TTFT, TPOT and end to end. Whatever inserts requests marks their minutes in `rollup_dirty`, in the same
transaction; `roll` adds a marked minute up anew from its rows and takes the mark away, so that late rows, imports and
repetitions come out right. A minute is left alone until it is over; `read_history` adds up what is still marked by
itself. Rows that retention has deleted stay in the sums: their minutes are not marked.

A latency's bucket is n where 2^((n-1)/4) ms < value <= 2^(n/4) ms: four buckets a doubling, 1 ms to 1,000 s.
A model counts under its name unless the request was refused as wrong: names that nobody serves are anybody's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl
import sqlalchemy as sa

from storage.engine import database_errors
from storage.schema import requests, rollup_dirty, rollup_latencies, rollups

MINUTE_S = 60
HOUR_S = 3600
BUCKETS = 80
"""The last one holds everything above 2^(79/4) ms, 885 s."""
_KINDS = {"ttft": requests.c.ttft_s, "tpot": requests.c.tpot_s, "e2e": requests.c.elapsed_s}
_SETTLE_S = 60.0
"""How long after its end a minute is first added up: most of its requests have ended by then."""
MAX_MINUTES = 360
"""Marked minutes that `read_history` adds up by itself; of more (an import at work) only the newest."""


def bucket_bounds_s() -> tuple[float, ...]:
    """Upper bounds of all buckets but the last, seconds."""
    return tuple(0.001 * 2 ** (number / 4) for number in range(BUCKETS - 1))


@functools.cache
def _bucket(kind: str) -> sa.ColumnElement[int]:
    """The bucket's number, by bisection: SQLite may have no logarithm."""
    value = _KINDS[kind]
    bounds = bucket_bounds_s()

    def between(low: int, high: int) -> sa.ColumnElement[int]:
        if low == high:
            return sa.literal_column(str(low), sa.Integer())
        middle = (low + high) // 2
        bound: sa.ColumnElement[float] = sa.literal_column(repr(bounds[middle]), sa.Double())
        return sa.case((value <= bound, between(low, middle)), else_=between(middle + 1, high))

    return between(0, BUCKETS - 1)


def _start(dialect: str, stamp: sa.ColumnElement[float], step_s: int) -> sa.ColumnElement[int]:
    """The start of the step in which a stamp lies, epoch seconds; also before 1970."""
    if dialect == "postgresql":
        return sa.cast(sa.func.floor(stamp / step_s), sa.BigInteger()) * step_s
    whole = sa.cast(stamp / step_s, sa.BigInteger())  # towards zero
    return (whole - sa.case((whole * step_s > stamp, 1), else_=0)) * step_s


_MODEL = sa.case(
    (requests.c.outcome == "invalid_request", sa.literal_column("''")), else_=sa.func.coalesce(requests.c.model, "")
)
_UPSTREAM = sa.func.coalesce(requests.c.upstream, "")


def _counts(dialect: str, step_s: int, first_s: int, end_s: int) -> sa.Select[tuple[object, ...]]:
    at = _start(dialect, requests.c.received_at, step_s)
    keys = (at, requests.c.origin, _MODEL, _UPSTREAM, requests.c.outcome)
    return (
        sa.select(
            sa.literal_column(str(step_s)).label("step_s"),
            at.label("at"),
            requests.c.origin,
            _MODEL.label("model"),
            _UPSTREAM.label("upstream"),
            requests.c.outcome,
            sa.func.count().label("requests"),
            sa.cast(sa.func.coalesce(sa.func.sum(requests.c.request_tokens), 0), sa.BigInteger()).label(
                "request_tokens"
            ),
            sa.cast(sa.func.coalesce(sa.func.sum(requests.c.response_tokens), 0), sa.BigInteger()).label(
                "response_tokens"
            ),
        )
        .where(requests.c.received_at >= first_s, requests.c.received_at < end_s)
        .group_by(*keys)
    )


def _latencies(dialect: str, step_s: int, first_s: int, end_s: int, kind: str) -> sa.Select[tuple[object, ...]]:
    value = _KINDS[kind]
    at = _start(dialect, requests.c.received_at, step_s)
    bucket = _bucket(kind)
    return (
        sa.select(
            sa.literal_column(str(step_s)).label("step_s"),
            at.label("at"),
            requests.c.origin,
            _MODEL.label("model"),
            sa.literal_column(f"'{kind}'").label("kind"),
            bucket.label("bucket"),
            sa.func.count().label("requests"),
        )
        .where(
            requests.c.received_at >= first_s,
            requests.c.received_at < end_s,
            value.is_not(None),
            requests.c.outcome == "ok",
        )
        .group_by(at, requests.c.origin, _MODEL, bucket)
    )


def _stretches(minutes: Sequence[int], longest_s: int = HOUR_S) -> Iterator[tuple[int, int]]:
    """Neighbouring minutes as (start, end), none longer than `longest_s`."""
    first = last = None
    for minute in minutes:
        if first is not None and last is not None and (minute != last + MINUTE_S or minute - first >= longest_s):
            yield first, last + MINUTE_S
            first = minute
        elif first is None:
            first = minute
        last = minute
    if first is not None and last is not None:
        yield first, last + MINUTE_S


def roll(engine: sa.Engine, now_s: float, *, limit: int = 60) -> int:
    """Add up the newest `limit` marked minutes that are over, and their hours; returns how many they were.

    One transaction: a minute's sums are whole, old or new. Raises DatabaseUnavailable.
    """
    dialect = engine.dialect.name
    with database_errors(engine), engine.begin() as connection:
        if dialect == "postgresql":
            # Two recorders on one database take turns; a mark that is set meanwhile is a row of its own (below).
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ROLL_LOCK)))
        over = rollup_dirty.c.at < now_s - MINUTE_S - _SETTLE_S
        minutes = sorted(
            connection.execute(
                sa.select(rollup_dirty.c.at).distinct().where(over).order_by(rollup_dirty.c.at.desc()).limit(limit)
            ).scalars()
        )
        if not minutes:
            return 0
        # The marks go first: whoever inserts from here on, unseen by this snapshot, marks the minute again.
        connection.execute(sa.delete(rollup_dirty).where(rollup_dirty.c.at.in_(minutes)))
        for first_s, end_s in _stretches(minutes):
            for table in (rollups, rollup_latencies):
                connection.execute(
                    sa.delete(table).where(table.c.step_s == MINUTE_S, table.c.at >= first_s, table.c.at < end_s)
                )
            connection.execute(
                sa.insert(rollups).from_select(
                    [column.name for column in rollups.c], _counts(dialect, MINUTE_S, first_s, end_s)
                )
            )
            for kind in _KINDS:
                connection.execute(
                    sa.insert(rollup_latencies).from_select(
                        [column.name for column in rollup_latencies.c],
                        _latencies(dialect, MINUTE_S, first_s, end_s, kind),
                    )
                )
        for hour_s in sorted({math.floor(minute / HOUR_S) * HOUR_S for minute in minutes}):
            _roll_hour(connection, hour_s)
        return len(minutes)


_ROLL_LOCK = 5_236_914_402_211
"""Key of the advisory lock under which PostgreSQL's sums are made."""


def _roll_hour(connection: sa.Connection, hour_s: int) -> None:
    for table, sums in (
        (rollups, ("requests", "request_tokens", "response_tokens")),
        (rollup_latencies, ("requests",)),
    ):
        keys = [column for column in table.c if column.name not in (*sums, "step_s", "at")]
        connection.execute(sa.delete(table).where(table.c.step_s == HOUR_S, table.c.at == hour_s))
        connection.execute(
            sa.insert(table).from_select(
                [column.name for column in table.c],
                sa.select(
                    sa.literal_column(str(HOUR_S)),
                    sa.literal_column(str(hour_s)),
                    *keys,
                    *(sa.cast(sa.func.sum(table.c[name]), sa.BigInteger()) for name in sums),
                )
                .where(table.c.step_s == MINUTE_S, table.c.at >= hour_s, table.c.at < hour_s + HOUR_S)
                .group_by(*keys),
            )
        )


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
    base_s = HOUR_S if step_s >= HOUR_S else MINUTE_S
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
        # Hours with a marked minute are taken by the minute.
        hours = sorted({math.floor(minute / HOUR_S) * HOUR_S for minute in marked}) if base_s == HOUR_S else []
        for table, frames in ((rollups, counts), (rollup_latencies, latencies)):
            at = table.c.at
            wanted = [at >= first_s, at < last_s, table.c.origin.in_(origins)]
            if models:
                wanted.append(table.c.model.in_(models))
            whole = [*wanted, table.c.step_s == base_s, at.not_in(hours if base_s == HOUR_S else marked)]
            frames.append(_read(connection, table, whole, step_s, dialect))
            if hours:
                parts = sa.or_(*(sa.and_(at >= hour, at < hour + HOUR_S) for hour in hours))
                by_minute = [*wanted, table.c.step_s == MINUTE_S, at.not_in(marked), parts]
                frames.append(_read(connection, table, by_minute, step_s, dialect))
        for stretch in _stretches(marked):
            chosen = sa.and_(requests.c.origin.in_(origins), *([_MODEL.in_(models)] if models else []))
            counts.append(_frame(connection, _counts(dialect, step_s, *stretch).where(chosen)))
            latencies.extend(
                _frame(connection, _latencies(dialect, step_s, *stretch, kind).where(chosen)) for kind in _KINDS
            )
    return History(step_s, _summed(counts, rollups), _summed(latencies, rollup_latencies))


def _read(
    connection: sa.Connection, table: sa.Table, wanted: Sequence[sa.ColumnElement[bool]], step_s: int, dialect: str
) -> pl.DataFrame:
    sums = [column for column in table.c if column.name in _SUMS]
    keys = [column for column in table.c if column.name in _KEYS[table.name]]
    at = _start(dialect, sa.cast(table.c.at, sa.Double()), step_s)
    statement = (
        sa.select(
            sa.literal_column(str(step_s)).label("step_s"),
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
    return pl.DataFrame([tuple(row) for row in result], schema=_types(names), orient="row")


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
