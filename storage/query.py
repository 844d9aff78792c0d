"""The read side: a selection of `requests`, as batches in time order.

Memory is one batch, whatever the size of the selection: SQLite steps through its key, PostgreSQL through a server-side
cursor. A selection is one snapshot: rows committed while it is read are not in it. The driver's cursor is read
directly, because making SQLAlchemy rows of 30 columns costs as much again as fetching them.
"""

from __future__ import annotations

import contextlib
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

_Cursor: TypeAlias = "sqlite3.Cursor | psycopg.ServerCursor[Any]"


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
    return batch.filter(wanted) if wanted else batch


def count(engine: sa.Engine, selection: Filter) -> int:
    """How many requests match. Raises DatabaseUnavailable."""
    with database_errors(engine), engine.connect() as connection:
        statement = sa.select(sa.func.count()).select_from(requests).where(*conditions(selection))
        return connection.execute(statement).scalar_one()


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
