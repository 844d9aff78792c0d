"""What leaves the database: whole UTC days, the oldest first, by age or by size, into an archive or for good.

A day can go two hours after its end. Rows of imported traces stay: they are as old as their file says. Each removal
counts its rows, by day and gateway, in the transaction that removes them, so that the accounting identity holds.

With an archive a day is archived, read back and compared first (storage/archive.py), and what is removed is exactly
what was archived: a row that comes late, or a session that is recognised late, changes the counts under which the
removal goes, and the day is archived again. Rows are only ever added and their session only ever set: two counts tell.
A death at any point leaves rows in the database, in the archive or in both: the next run goes on from there.

Nobody waits for it long. PostgreSQL: a day is a partition that is detached and dropped under a lock that is waited for
0.1 s at a time. SQLite: 1,000 rows a transaction and the file shrunk by some pages at a time, with pauses between; a
file from before incremental vacuum keeps its size and reuses the space, until `vacuum` rewrites it.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import polars as pl
import psycopg
import sqlalchemy as sa

from storage.archive import Archive, day_text, merged
from storage.engine import database_errors
from storage.errors import DatabaseUnavailable, RetentionBusy
from storage.query import Filter, read_batches
from storage.schema import partition_bounds_s, partition_name, utc_day
from storage.sink import Transaction, transaction
from traces.record import Origin

SETTLED_S: Final = 7200.0
"""How long after its end a day may go: its longest requests have ended, and an hour is left to record them."""
CHUNK_ROWS: Final = 1000
"""Rows that SQLite deletes in a transaction: some 10 ms in which the recorder waits."""
_VACUUM_PAGES: Final = 256
_ARCHIVE_ROWS: Final = 20_000
_TRIES: Final = 5
_LOCK_TRIES: Final = 10
_LOCK_TIMEOUT: Final = "100ms"
_LOCK_PAUSE_S: Final = 0.25
_RETENTION_LOCK: Final = 0x7265746E  # "retn": the advisory lock's key
_DAY_OF_PARTITION: Final = re.compile(r"requests_(\d{4})(\d\d)(\d\d)")
_EPOCH: Final = datetime.date(1970, 1, 1)
_IMPORTED: Final = Origin.IMPORTED.value

Breathe = Callable[[], None]
"""Called between small pieces of work; it may pause, or raise to end the run there."""


class DayChanged(DatabaseUnavailable):
    """A day's rows change faster than they can be archived; worth trying again."""


@dataclass(frozen=True, slots=True)
class DayRows:
    """A day of the database, its recorded rows and its imported ones.

    size_bytes: what the recorded ones take, with their indexes; of SQLite a share of the whole; None: not asked for.
    """

    day: int
    rows: int
    imported: int
    size_bytes: int | None

    def __str__(self) -> str:
        return day_text(self.day)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a run did, or with `dry_run` would do. bytes_before, bytes_after: of the database's used pages."""

    days: tuple[str, ...]
    rows: int
    archived: int
    bytes_before: int
    bytes_after: int
    keeps_file_size: bool
    """SQLite without incremental vacuum: the space is used again, and the file does not shrink."""


def days_before(engine: sa.Engine, before_s: float, *, sized: bool = False) -> list[DayRows]:
    """The days that ended before a moment, oldest first. sized: with their sizes, for which SQLite reads every row.

    Raises DatabaseUnavailable.
    """
    with database_errors(engine):
        if engine.dialect.name == "sqlite":
            return _sqlite_days(engine, before_s, sized=sized)
        return _postgres_days(engine, before_s)


def database_bytes(engine: sa.Engine) -> int:
    """What the requests take in the database: of SQLite the pages in use. Raises DatabaseUnavailable."""
    with database_errors(engine), engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            pages, free, size = (
                connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                for name in ("page_count", "freelist_count", "page_size")
            )
            return int((pages - free) * size)
        return int(
            connection.exec_driver_sql(
                "SELECT coalesce(sum(pg_total_relation_size(inhrelid)), 0) FROM pg_inherits"
                " WHERE inhparent = 'requests'::regclass"
            ).scalar_one()
        )


def due_days(
    engine: sa.Engine,
    now_s: float,
    *,
    max_age_s: float | None = None,
    max_bytes: int | None = None,
    sized: bool = False,
) -> list[DayRows]:
    """The days that have to go, oldest first: those that ended `max_age_s` ago, and more until `max_bytes` are kept.

    sized: with their sizes. Raises DatabaseUnavailable.
    """
    settled_s = now_s - SETTLED_S
    excess = 0 if max_bytes is None else max(0, database_bytes(engine) - max_bytes)
    days = days_before(
        engine,
        settled_s if excess or max_age_s is None else min(settled_s, now_s - max_age_s),
        sized=sized or excess > 0,
    )
    due = []
    for day in days:
        is_old = max_age_s is not None and partition_bounds_s(day.day)[1] <= now_s - max_age_s
        if (is_old or excess > 0) and (day.rows or not day.imported):
            due.append(day)
            excess -= day.size_bytes or 0
    return due


def prune(
    engine: sa.Engine,
    days: Sequence[DayRows],
    archive: Archive | None = None,
    *,
    keep: bool = False,
    breathe: Breathe = lambda: None,
    on_day: Callable[[DayRows, int, int], None] = lambda day, rows, archived: None,
) -> Pruned:
    """Takes these days out of the database; with an archive, each goes there first. keep: archives, takes nothing out.

    on_day: called after each day with the rows taken out and the rows that the archive has of it now.
    Raises RetentionBusy when another process is at it, DatabaseUnavailable (a lock not had, too), ArchiveError, and
    what `breathe` raises; the days before are done then.
    """
    rows = archived = 0
    before = database_bytes(engine)
    with _alone(engine):
        if archive is not None:
            archive.sweep()
        for day in days:
            gone, held = _prune_day(engine, day.day, archive, keep=keep, breathe=breathe)
            rows += gone
            archived += held
            on_day(day, gone, held)
        keeps = not keep and not _shrink(engine, breathe)
    return Pruned(tuple(map(str, days)), rows, archived, before, database_bytes(engine), keeps)


def vacuum(engine: sa.Engine) -> None:
    """SQLite: writes the file anew, without free pages, and so that it can shrink by itself from now on.

    Needs the file's size again in free disk; the recorder waits meanwhile and its journal grows.
    Raises ValueError on PostgreSQL, whose autovacuum and dropped partitions need no such thing, DatabaseUnavailable.
    """
    if engine.dialect.name != "sqlite":
        raise ValueError("--vacuum: expected an SQLite database; PostgreSQL gives a dropped day's space back at once")
    with database_errors(engine), _sqlite(engine) as driver:
        driver.execute("PRAGMA auto_vacuum=INCREMENTAL")
        driver.execute("VACUUM")
        driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")


# A day --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some neighbouring rows of a day that are archived, from just behind the last chunk's end to `last`, included."""

    last: tuple[float, str]
    rows: int
    with_session: int


def _prune_day(
    engine: sa.Engine, day: int, archive: Archive | None, *, keep: bool, breathe: Breathe
) -> tuple[int, int]:
    """The rows taken out, and the rows that the archive has."""
    gone = 0
    for _ in range(_TRIES):
        held = 0
        chunks: list[_Chunk] | None = None
        if archive is not None:
            held, chunks = _archive_day(engine, day, archive, breathe)
        if keep:
            return 0, held
        more, is_done = (_delete_sqlite if engine.dialect.name == "sqlite" else _delete_postgres)(
            engine, day, chunks, breathe
        )
        gone += more
        if is_done:
            return gone, held
    raise DayChanged(f"{day_text(day)}: its rows changed each of {_TRIES} times between their archiving and removal")


def _archive_day(engine: sa.Engine, day: int, archive: Archive, breathe: Breathe) -> tuple[int, list[_Chunk]]:
    """Puts what the database has of a day into the archive, beside what that has of it already."""
    first_s, end_s = partition_bounds_s(day)
    before = archive.days().get(day)
    chunks: list[_Chunk] = []
    # The imported rows are left out by their origin; a filter says which it wants.
    wanted = Filter(start_s=first_s, end_s=end_s, origins=tuple(o.value for o in Origin if o is not Origin.IMPORTED))

    def in_chunks(batches: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        for batch in batches:
            for part in batch.iter_slices(CHUNK_ROWS):
                last = (part["received_at"][-1], part["request_id"][-1])
                chunks.append(_Chunk(last, part.height, part.height - part["session_id"].null_count()))
            yield batch
            breathe()

    with contextlib.closing(read_batches(engine, wanted, batch_rows=_ARCHIVE_ROWS)) as batches:
        rows = in_chunks(batches)
        if before is None:
            first = next(rows, None)
            if first is None:
                return 0, []  # no file for a day without rows
            rows = _prepended(first, rows)
            return archive.put(day, rows).rows, chunks
        with contextlib.closing(archive.read(before)) as archived:
            return archive.put(day, merged(rows, archived)).rows, chunks


def _prepended(first: pl.DataFrame, rest: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    yield first
    yield from rest


_NOTE = (
    'INSERT INTO pruned (day, gateway, "rows", archived) VALUES (?, ?, ?, ?) ON CONFLICT (day, gateway)'
    ' DO UPDATE SET "rows" = pruned."rows" + excluded."rows", archived = pruned.archived + excluded.archived'
)


def _note(active: Transaction, day: int, counts: Sequence[tuple[str, int, int]], *, is_archived: bool) -> None:
    for gateway, rows, _ in counts:
        active.execute(_NOTE, (day_text(day), gateway, rows, rows if is_archived else 0))


def _delete_sqlite(engine: sa.Engine, day: int, chunks: Sequence[_Chunk] | None, breathe: Breathe) -> tuple[int, bool]:
    """The rows deleted, and whether the day has none left."""
    first_s, end_s = partition_bounds_s(day)
    within = f"received_at >= ? AND received_at < ? AND (received_at, request_id) <= (?, ?) AND origin <> '{_IMPORTED}'"
    planned = iter(chunks) if chunks is not None else None
    gone = 0
    while True:
        expected = next(planned, None) if planned is not None else None
        with database_errors(engine), transaction(engine) as active:
            last = expected.last if expected is not None else _nth(active, first_s, end_s, CHUNK_ROWS)
            if last is None:
                return gone, True
            if planned is not None and expected is None:  # late rows
                return gone, False
            counts = active.query(
                f"SELECT coalesce(gateway, ''), count(*), count(session_id) FROM requests WHERE {within} GROUP BY 1",
                (first_s, end_s, *last),
            )
            found = (sum(rows for _, rows, _ in counts), sum(sessions for _, _, sessions in counts))
            if expected is not None and found != (expected.rows, expected.with_session):
                return gone, False
            active.execute(f"DELETE FROM requests WHERE {within}", (first_s, end_s, *last))
            _note(active, day, counts, is_archived=chunks is not None)
        gone += found[0]
        breathe()


def _nth(active: Transaction, first_s: float, end_s: float, n: int) -> tuple[float, str] | None:
    """The key of the n-th row of a day, or of its last; None without rows."""
    rows = active.query(
        "SELECT received_at, request_id FROM requests"
        f" WHERE received_at >= ? AND received_at < ? AND origin <> '{_IMPORTED}'"
        " ORDER BY received_at, request_id LIMIT ?",
        (first_s, end_s, n),
    )
    return (rows[-1][0], rows[-1][1]) if rows else None


def _delete_postgres(
    engine: sa.Engine, day: int, chunks: Sequence[_Chunk] | None, breathe: Breathe
) -> tuple[int, bool]:
    """The rows that went with the day's partition, and whether all did."""
    for attempt in range(_LOCK_TRIES):
        try:
            with database_errors(engine):
                return _drop(engine, day, chunks)
        except DatabaseUnavailable as error:
            cause = getattr(error.__cause__, "orig", error.__cause__)
            if not isinstance(cause, psycopg.errors.LockNotAvailable) or attempt == _LOCK_TRIES - 1:
                raise
        time.sleep(_LOCK_PAUSE_S)
        breathe()
    raise AssertionError  # the last attempt returns or raises


def _drop(engine: sa.Engine, day: int, chunks: Sequence[_Chunk] | None) -> tuple[int, bool]:
    name = partition_name(day)
    with transaction(engine) as active:
        active.execute(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'")
        if not active.query("SELECT 1 FROM pg_inherits WHERE inhrelid = to_regclass(?)", (name,)):
            return 0, True
        # From here on nobody adds to this day; whoever waits to do so waits for the count, or comes again.
        active.execute(f"LOCK TABLE {name} IN SHARE MODE")
        counts = active.query(
            f"SELECT coalesce(gateway, ''), count(*), count(session_id) FROM {name}"
            f" WHERE origin <> '{_IMPORTED}' GROUP BY 1"
        )
        found = (sum(rows for _, rows, _ in counts), sum(sessions for _, _, sessions in counts))
        if chunks is not None and found != (sum(c.rows for c in chunks), sum(c.with_session for c in chunks)):
            return 0, False
        if active.query(f"SELECT 1 FROM {name} WHERE origin = '{_IMPORTED}' LIMIT 1"):
            active.execute(f"DELETE FROM {name} WHERE origin <> '{_IMPORTED}'")
        else:
            # Readers and the recorder wait while this waits, which is why it does not wait long.
            active.execute(f"ALTER TABLE requests DETACH PARTITION {name}")
            active.execute(f"DROP TABLE {name}")
        _note(active, day, counts, is_archived=chunks is not None)
    return found[0], True


# The database -------------------------------------------------------------------------------------------------------


def _sqlite_days(engine: sa.Engine, before_s: float, *, sized: bool) -> list[DayRows]:
    """Each day's counts in a query of its own: no reader holds the write-ahead log for long."""
    days: list[tuple[int, int, int]] = []
    with engine.connect() as connection:
        at_s = _first_from(connection, -1e300)
        while at_s is not None and partition_bounds_s(utc_day(at_s))[1] <= before_s:
            day = utc_day(at_s)
            first_s, end_s = partition_bounds_s(day)
            rows, imported = connection.exec_driver_sql(
                f"SELECT count(*), coalesce(sum(origin = '{_IMPORTED}'), 0) FROM requests"
                " WHERE received_at >= ? AND received_at < ?",
                (first_s, end_s),
            ).one()
            connection.rollback()
            days.append((day, rows - imported, imported))
            at_s = _first_from(connection, end_s)
        if not sized or not days:
            return [DayRows(*day, None) for day in days]
        total = connection.exec_driver_sql("SELECT count(*) FROM requests").scalar_one()
    used = database_bytes(engine)
    return [DayRows(day, rows, imported, used * rows // max(1, total)) for day, rows, imported in days]


def _first_from(connection: sa.Connection, at_s: float) -> float | None:
    at: float | None = connection.exec_driver_sql(
        "SELECT min(received_at) FROM requests WHERE received_at >= ?", (at_s,)
    ).scalar()
    return at


def _postgres_days(engine: sa.Engine, before_s: float) -> list[DayRows]:
    days = []
    with engine.connect() as connection:
        partitions = connection.exec_driver_sql(
            "SELECT relname, pg_total_relation_size(inhrelid) FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid"
            " WHERE inhparent = 'requests'::regclass ORDER BY relname"
        ).all()
        for name, size in partitions:
            found = _DAY_OF_PARTITION.fullmatch(name)
            if found is None:
                continue
            day = (datetime.date(*map(int, found.groups())) - _EPOCH).days
            if partition_bounds_s(day)[1] > before_s:
                continue
            rows, imported = connection.exec_driver_sql(
                f"SELECT count(*), count(*) FILTER (WHERE origin = '{_IMPORTED}') FROM {name}"
            ).one()
            connection.rollback()
            days.append(DayRows(day, rows - imported, imported, size * (rows - imported) // max(1, rows)))
    return days


@contextlib.contextmanager
def _alone(engine: sa.Engine) -> Iterator[None]:
    """One at a time: an advisory lock on PostgreSQL, a locked file beside SQLite's."""
    busy = RetentionBusy("another process is archiving or pruning this database")
    if engine.dialect.name == "sqlite":
        descriptor = os.open(f"{engine.url.database}-retention.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        else:
            yield
        finally:
            os.close(descriptor)
        return
    with contextlib.ExitStack() as opened:
        with database_errors(engine):
            connection = opened.enter_context(engine.connect().execution_options(isolation_level="AUTOCOMMIT"))
            has_lock = connection.execute(sa.select(sa.func.pg_try_advisory_lock(_RETENTION_LOCK))).scalar_one()
        if not has_lock:
            raise busy
        try:
            yield
        finally:
            with contextlib.suppress(sa.exc.SQLAlchemyError):  # a lost connection has let go already
                connection.execute(sa.select(sa.func.pg_advisory_unlock(_RETENTION_LOCK)))


@contextlib.contextmanager
def _sqlite(engine: sa.Engine) -> Iterator[sqlite3.Connection]:
    pooled = engine.raw_connection()
    try:
        driver = pooled.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        yield driver
    finally:
        pooled.close()


def _shrink(engine: sa.Engine, breathe: Breathe) -> bool:
    """Gives an SQLite file's free pages back, some at a time; False when it was not made for that."""
    if engine.dialect.name != "sqlite":
        return True
    with database_errors(engine), _sqlite(engine) as driver:
        if driver.execute("PRAGMA auto_vacuum").fetchone() != (2,):
            return False
        before = None
        while (free := driver.execute("PRAGMA freelist_count").fetchone()) != (0,) and free != before:
            driver.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()
            before = free
            breathe()
        driver.execute("PRAGMA wal_checkpoint(PASSIVE)")
    return True
