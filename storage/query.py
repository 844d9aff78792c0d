"""The read side: a selection of `requests`, as batches in time order.

Memory is one batch, whatever the size of the selection: SQLite steps through its key, PostgreSQL through a server-side
cursor. A selection is one snapshot: rows committed while it is read are not in it. The driver's cursor is read
directly, because making SQLAlchemy rows of 30 columns costs as much again as fetching them.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import polars as pl
import psycopg
import sqlalchemy as sa

from storage.engine import database_errors
from storage.schema import datasets, requests
from traces.batch import SCHEMA
from traces.codec import TraceClock
from traces.shadow import PAIR_FIELDS, PAIRS

_Cursor: TypeAlias = "sqlite3.Cursor | psycopg.ServerCursor[Any]"

MAX_SHADOW_DELAY_S = 2 * 86_400.0
"""Between a primary and its shadow lie a collected window, of a day at most, its release and the queue."""
CLOCK_STEP_S = 60.0


@dataclass(frozen=True, slots=True)
class Filter:
    """Which requests: those that match every part. An empty tuple matches all values, None has no bound.

    start_s, end_s: epoch seconds, start included, end not.
    """

    start_s: float | None = None
    end_s: float | None = None
    models: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    log_types: tuple[str, ...] = ()
    run_ids: tuple[str, ...] = ()
    without_origins: tuple[str, ...] = ()
    """These do not match, whatever else does."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A trace that came from a file; `name` is its rows' run_id.

    format: of the file. clock: what its Timestamp 0 is. stamps: `int` or `float`, how it spells Timestamp.
    """

    name: str
    format: str
    clock: TraceClock
    stamps: Literal["int", "float"]
    rows: int


def conditions(selection: Filter) -> list[sa.ColumnElement[bool]]:
    """The filter as conditions on `requests`, to be joined by AND."""
    wanted: list[sa.ColumnElement[bool]] = []
    if selection.start_s is not None:
        wanted.append(requests.c.received_at >= selection.start_s)
    if selection.end_s is not None:
        wanted.append(requests.c.received_at < selection.end_s)
    for column, values in (
        (requests.c.model, selection.models),
        (requests.c.session_id, selection.sessions),
        (requests.c.outcome, selection.outcomes),
        (requests.c.origin, selection.origins),
        (requests.c.log_type, selection.log_types),
        (requests.c.run_id, selection.run_ids),
    ):
        if values:
            wanted.append(column.in_([str(value) for value in values]))
    if selection.without_origins:
        wanted.append(requests.c.origin.not_in([str(value) for value in selection.without_origins]))
    return wanted


def matching(batch: pl.DataFrame, selection: Filter) -> pl.DataFrame:
    """The rows of a batch that match: the same filter for a trace that is not in the database."""
    wanted: list[pl.Expr] = []
    if selection.start_s is not None:
        wanted.append(pl.col("received_at") >= selection.start_s)
    if selection.end_s is not None:
        wanted.append(pl.col("received_at") < selection.end_s)
    for name, values in (
        ("model", selection.models),
        ("session_id", selection.sessions),
        ("outcome", selection.outcomes),
        ("origin", selection.origins),
        ("log_type", selection.log_types),
        ("run_id", selection.run_ids),
    ):
        if values:
            wanted.append(pl.col(name).is_in([str(value) for value in values]))
    if selection.without_origins:
        wanted.append(~pl.col("origin").is_in([str(value) for value in selection.without_origins]))
    return batch.filter(wanted) if wanted else batch


def count(engine: sa.Engine, selection: Filter) -> int:
    """How many requests match. Raises DatabaseUnavailable."""
    with database_errors(engine), engine.connect() as connection:
        statement = sa.select(sa.func.count()).select_from(requests).where(*conditions(selection))
        return connection.execute(statement).scalar_one()


def newest(
    engine: sa.Engine,
    selection: Filter,
    limit: int,
    *,
    failures: bool = False,
    before: float | None = None,
    before_id: str = "",
    request_id: str | None = None,
) -> list[dict[str, Any]]:
    """The newest requests that match, newest first, as every column by name.

    failures: only those whose outcome is not ok. before, before_id: those older than this (received_at, request_id).
    Raises DatabaseUnavailable.
    """
    statement = sa.select(requests).where(*conditions(selection))
    if failures:
        statement = statement.where(sa.literal_column("outcome") != sa.literal_column("'ok'"))
    if before is not None:
        key = sa.tuple_(requests.c.received_at, requests.c.request_id)
        statement = statement.where(key < sa.tuple_(sa.literal(before), sa.literal(before_id)))
    if request_id is not None:
        statement = statement.where(requests.c.request_id == request_id)
        stamp_s = uuid7_stamp_s(request_id)
        if stamp_s is not None:  # the time of day is in the id: no need to look at every day
            statement = statement.where(requests.c.received_at.between(stamp_s - 2, stamp_s + 2))
    order = (requests.c.received_at.desc(), requests.c.request_id.desc())
    statement = statement.order_by(*order).limit(limit)
    if failures:  # their index knows what they are mostly looked for by: rows are read of those that are wanted only
        keys = (requests.c.received_at, requests.c.request_id)
        found_keys = statement.with_only_columns(*keys).subquery()
        statement = sa.select(requests).where(sa.tuple_(*keys).in_(sa.select(found_keys))).order_by(*order)
    with database_errors(engine), engine.connect() as connection:
        found = [dict(row) for row in connection.execute(statement).mappings()]
    for row in found:
        packed = row["prefix_blocks"]
        row["prefix_blocks"] = None if packed is None else np.frombuffer(packed, dtype="<u8").tolist()
    return found


_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def uuid7_stamp_s(text: str) -> float | None:
    """The epoch seconds in a UUIDv7 (RFC 9562, section 5.7); None for another text."""
    return int(text[:8] + text[9:13], 16) / 1000 if _UUID7.fullmatch(text) else None


def read_datasets(engine: sa.Engine) -> dict[str, Dataset]:
    """The imported data sets, by name. Raises DatabaseUnavailable."""
    with database_errors(engine), engine.connect() as connection:
        return {
            row.name: Dataset(row.name, row.format, TraceClock(row.day_zero, row.timezone), row.stamps, row.rows)
            for row in connection.execute(sa.select(datasets).order_by(datasets.c.name))
        }


def read_batches(
    engine: sa.Engine, selection: Filter, *, batch_rows: int = 50_000, fields: Collection[str] | None = None
) -> Generator[pl.DataFrame]:
    """The matching requests as batches of 1 to `batch_rows` rows, ordered by (received_at, request_id).

    fields: of the record; the batches have these columns and no others, in the record's order. None is all: a reader
    of half of them takes half of the time. Holds one connection until it is exhausted or closed.
    Raises ValueError for batch_rows < 1 and for fields that name none of the record's, DatabaseUnavailable while
    iterating.
    """
    if batch_rows < 1:
        raise ValueError(f"batch_rows: expected an integer >= 1, got {batch_rows}")
    names = [name for name in SCHEMA if fields is None or name in fields]
    if not names:
        raise ValueError(f"fields: expected fields of a record, got {', '.join(fields or ()) or 'none'}")
    return _read_batches(engine, selection, batch_rows, names)


def _read_batches(
    engine: sa.Engine, selection: Filter, batch_rows: int, names: Sequence[str]
) -> Generator[pl.DataFrame]:
    statement = (
        sa.select(*(requests.c[name] for name in names))
        .where(*conditions(selection))
        .order_by(requests.c.received_at, requests.c.request_id)
        .compile(engine, compile_kwargs={"render_postcompile": True})
    )
    values: Any = statement.params
    if statement.positiontup is not None:
        values = [values[name] for name in statement.positiontup]
    with contextlib.ExitStack() as opened:
        with database_errors(engine):
            pooled = opened.enter_context(contextlib.closing(engine.raw_connection()))
            cursor = _execute(pooled.driver_connection, str(statement), values)
            opened.callback(_close_quietly, cursor)
            rows = cursor.fetchmany(batch_rows)
        while rows:
            yield _batch_of(rows, names)
            with database_errors(engine):
                rows = cursor.fetchmany(batch_rows)


def read_pairs(
    engine: sa.Engine,
    target: str,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    batch_rows: int = 50_000,
) -> Generator[pl.DataFrame]:
    """A shadow target's requests beside their primaries, as batches of `traces.shadow.PAIRS`.

    start_s, end_s: of the shadows, epoch seconds, start included, end not. Where the primary is not there, its columns
    are null. Raises DatabaseUnavailable while iterating.
    """
    shadow, primary = requests.alias("shadow"), requests.alias("primary")
    is_its = primary.c.request_id == shadow.c.shadow_of
    if start_s is not None:  # so that not all that was ever recorded is joined
        is_its &= primary.c.received_at >= start_s - MAX_SHADOW_DELAY_S
    if end_s is not None:
        is_its &= primary.c.received_at < end_s + CLOCK_STEP_S
    columns = [
        side.c[name].label(f"{of}_{name}") for of, side in (("a", primary), ("b", shadow)) for name in PAIR_FIELDS
    ]
    statement = (
        sa.select(*columns, shadow.c.agreement)
        .select_from(shadow.outerjoin(primary, is_its))
        .where(shadow.c.origin == "shadow", shadow.c.upstream == target)
    )
    if start_s is not None:
        statement = statement.where(shadow.c.received_at >= start_s)
    if end_s is not None:
        statement = statement.where(shadow.c.received_at < end_s)
    with database_errors(engine), engine.connect() as connection:
        found = connection.execution_options(yield_per=batch_rows).execute(statement)
        for rows in found.partitions():
            yield pl.DataFrame([tuple(row) for row in rows], schema=PAIRS, orient="row")


def read_shadow_targets(engine: sa.Engine) -> list[str]:
    """The shadow targets that have requests, by name. Raises DatabaseUnavailable."""
    with database_errors(engine), engine.connect() as connection:
        statement = sa.select(requests.c.upstream).where(requests.c.origin == "shadow").distinct()
        return sorted(name for name in connection.execute(statement).scalars() if name is not None)


def _execute(driver: object, statement: str, values: Any) -> _Cursor:
    if isinstance(driver, sqlite3.Connection):
        return driver.execute(statement, values)
    assert isinstance(driver, psycopg.Connection)
    cursor = driver.cursor("burstgate_read", binary=True)
    try:
        return cursor.execute(statement.encode(), values)
    except BaseException:
        _close_quietly(cursor)
        raise


def _close_quietly(cursor: _Cursor) -> None:
    """Closes a cursor whose connection may be broken; the pool finds out about that by itself."""
    with contextlib.suppress(sqlite3.Error, psycopg.Error):
        cursor.close()


def _batch_of(rows: Sequence[tuple[Any, ...]], names: Sequence[str]) -> pl.DataFrame:
    """Rows of the driver as a batch; SQLite has booleans as 0 and 1, and blocks are packed in both."""
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    if "stream" in columns:
        columns["stream"] = tuple(map(bool, columns["stream"]))
    blocks = columns.get("prefix_blocks", ())
    if any(packed is not None for packed in blocks):
        columns["prefix_blocks"] = tuple(
            None if packed is None else np.frombuffer(packed, dtype="<u8").tolist() for packed in blocks
        )
    return pl.DataFrame([pl.Series(name, columns[name], dtype=SCHEMA[name]) for name in names])
