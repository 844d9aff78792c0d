"""Requests added up by minute, five minutes, hour and six hours: a year's history is as quick to draw as an hour's.

`rollups` counts requests and tokens by (step, start, origin, model, upstream, outcome), `rollup_latencies` holds
histograms of TTFT, TPOT and end to end. Whatever inserts requests marks their minutes in `rollup_dirty`, in the same
transaction; `roll` adds a marked minute up anew from its rows and takes the mark away, so that late rows, imports and
repetitions come out right. A minute is left alone until it is over; storage/history.py adds up what is still marked
by itself. Rows that retention has deleted stay in the sums: their minutes are not marked.

A latency's bucket is n where 2^((n-1)/4) ms < value <= 2^(n/4) ms: four buckets a doubling, 1 ms to 1,000 s.
A model counts under its name unless the request was refused as wrong: names that nobody serves are anybody's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import sqlalchemy as sa

from storage.engine import database_errors
from storage.schema import requests, rollup_dirty, rollup_latencies, rollups

ALL_MODELS = "all_"
"""How kinds of latencies begin that are of all models together."""
MINUTE_S = 60
STEPS_S = (MINUTE_S, 300, 3600, 21_600)
"""What is added up, each from the one before it, of which it is a multiple."""
_LONGEST_S = 3600
"""Of rows that are read at a time."""
BUCKETS = 80
"""The last one holds everything above 2^(79/4) ms, 885 s."""
KINDS = {"ttft": requests.c.ttft_s, "tpot": requests.c.tpot_s, "e2e": requests.c.elapsed_s}
_SETTLE_S = 60.0
"""How long after its end a minute is first added up: most of its requests have ended by then."""


@functools.cache
def bucket_bounds_s() -> tuple[float, ...]:
    """Upper bounds of all buckets but the last, seconds."""
    return tuple(0.001 * 2 ** (number / 4) for number in range(BUCKETS - 1))


@functools.cache
def _bucket(kind: str) -> sa.ColumnElement[int]:
    """The bucket's number, by bisection: SQLite may have no logarithm."""
    value = KINDS[kind]
    bounds = bucket_bounds_s()

    def between(low: int, high: int) -> sa.ColumnElement[int]:
        if low == high:
            return sa.literal_column(str(low), sa.Integer())
        middle = (low + high) // 2
        bound: sa.ColumnElement[float] = sa.literal_column(repr(bounds[middle]), sa.Double())
        return sa.case((value <= bound, between(low, middle)), else_=between(middle + 1, high))

    return between(0, BUCKETS - 1)


def start_of(dialect: str, stamp: sa.ColumnElement[float], step_s: int) -> sa.ColumnElement[int]:
    """The start of the step in which a stamp lies, epoch seconds; also before 1970."""
    if dialect == "postgresql":
        return sa.cast(sa.func.floor(stamp / step_s), sa.BigInteger()) * step_s
    whole = sa.cast(stamp / step_s, sa.BigInteger())  # towards zero
    return (whole - sa.case((whole * step_s > stamp, 1), else_=0)) * step_s


MODEL = sa.case(
    (requests.c.outcome == "invalid_request", sa.literal_column("''")), else_=sa.func.coalesce(requests.c.model, "")
)
_UPSTREAM = sa.func.coalesce(requests.c.upstream, "")


def counts_of(dialect: str, step_s: int, first_s: int, end_s: int) -> sa.Select[tuple[object, ...]]:
    """The counts of a stretch, from its rows: the columns of `rollups`."""
    at = start_of(dialect, requests.c.received_at, step_s)
    keys = (at, requests.c.origin, MODEL, _UPSTREAM, requests.c.outcome)
    return (
        sa.select(
            sa.literal_column(str(step_s)).label("step_s"),
            at.label("at"),
            requests.c.origin,
            MODEL.label("model"),
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


def latencies_of(dialect: str, step_s: int, first_s: int, end_s: int, kind: str) -> sa.Select[tuple[object, ...]]:
    """One latency's histogram over a stretch, from its rows: the columns of `rollup_latencies`."""
    value = KINDS[kind]
    at = start_of(dialect, requests.c.received_at, step_s)
    bucket = _bucket(kind)
    return (
        sa.select(
            sa.literal_column(str(step_s)).label("step_s"),
            at.label("at"),
            requests.c.origin,
            MODEL.label("model"),
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
        .group_by(at, requests.c.origin, MODEL, bucket)
    )


def stretches(
    starts: Sequence[int], step_s: int = MINUTE_S, longest_s: float = _LONGEST_S
) -> Iterator[tuple[int, int]]:
    """Neighbouring steps, in order, as (start, end), none longer than `longest_s` (or one step)."""
    first = last = None
    for start in starts:
        if first is not None and last is not None and (start != last + step_s or start - first >= longest_s):
            yield first, last + step_s
            first = start
        elif first is None:
            first = start
        last = start
    if first is not None and last is not None:
        yield first, last + step_s


def steps_of(minutes: Sequence[int], step_s: int) -> list[int]:
    """The starts of the steps in which these minutes lie, in order."""
    return sorted({math.floor(minute / step_s) * step_s for minute in minutes})


def roll(engine: sa.Engine, now_s: float, *, limit: int = 60) -> int:
    """Add up the newest `limit` marked minutes that are over, and the longer steps they lie in; returns how many they
    were.

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
        for first_s, end_s in stretches(minutes):
            for table in (rollups, rollup_latencies):
                connection.execute(
                    sa.delete(table).where(table.c.step_s == MINUTE_S, table.c.at >= first_s, table.c.at < end_s)
                )
            connection.execute(
                sa.insert(rollups).from_select(
                    [column.name for column in rollups.c], counts_of(dialect, MINUTE_S, first_s, end_s)
                )
            )
            for kind in KINDS:
                connection.execute(
                    sa.insert(rollup_latencies).from_select(
                        [column.name for column in rollup_latencies.c],
                        latencies_of(dialect, MINUTE_S, first_s, end_s, kind),
                    )
                )
            _add_all_models(connection, first_s, end_s)
        for base_s, step_s in pairwise(STEPS_S):
            for first_s, end_s in stretches(steps_of(minutes, step_s), step_s):
                _add_up(connection, base_s, step_s, first_s, end_s)
        return len(minutes)


def _add_all_models(connection: sa.Connection, first_s: int, end_s: int) -> None:
    """The minutes' histograms of all models together, as kinds of their own: what is looked at most."""
    table = rollup_latencies
    keys = (table.c.step_s, table.c.at, table.c.origin)
    kind = sa.literal_column(f"'{ALL_MODELS}' || kind", sa.Text())
    connection.execute(
        sa.insert(table).from_select(
            [column.name for column in table.c],
            sa.select(
                *keys,
                sa.literal_column("''"),
                kind,
                table.c.bucket,
                sa.cast(sa.func.sum(table.c.requests), sa.BigInteger()),
            )
            .where(table.c.step_s == MINUTE_S, table.c.at >= first_s, table.c.at < end_s)
            .group_by(*keys, table.c.kind, table.c.bucket),
        )
    )


_ROLL_LOCK = 5_236_914_402_211
"""Key of the advisory lock under which PostgreSQL's sums are made."""


def _add_up(connection: sa.Connection, base_s: int, step_s: int, first_s: int, end_s: int) -> None:
    """Whole steps anew, from the sums of shorter ones."""
    for table, sums in (
        (rollups, ("requests", "request_tokens", "response_tokens")),
        (rollup_latencies, ("requests",)),
    ):
        keys = [column for column in table.c if column.name not in (*sums, "step_s", "at")]
        step = sa.literal_column(str(step_s), sa.BigInteger())
        at = table.c.at - (table.c.at % step + step) % step
        connection.execute(sa.delete(table).where(table.c.step_s == step_s, table.c.at >= first_s, table.c.at < end_s))
        connection.execute(
            sa.insert(table).from_select(
                [column.name for column in table.c],
                sa.select(
                    sa.literal_column(str(step_s)),
                    at,
                    *keys,
                    *(sa.cast(sa.func.sum(table.c[name]), sa.BigInteger()) for name in sums),
                )
                .where(table.c.step_s == base_s, table.c.at >= first_s, table.c.at < end_s)
                .group_by(at, *keys),
            )
        )
