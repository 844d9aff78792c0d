"""The write side: records into the database, at the raw driver's speed.

`Transaction` is one write transaction on either database; the recorder (through `Sink`) and the import share it.
PostgreSQL takes rows by binary COPY into a temporary table and from there by INSERT ... ON CONFLICT DO NOTHING, after
making the UTC-day partitions that they need; SQLite by one prepared INSERT in one BEGIN IMMEDIATE.

A commit of the sink is one transaction and is safe to repeat: rows are there once by their key, a segment's records
are counted once by its offset, which only grows, and totals are what they are. So when a commit ends in
`SinkUnavailable`, even for a connection lost while the database said yes, the caller commits the same again.

Promotion. The gateway infers that a request continues a conversation only at the second turn; it then uses the first
turn's request id as the session id, and the first turn is already recorded without one. So a record whose session id
is a UUIDv7 other than its own id gives that row its own id as session id, and its own log type. The row is looked for
around the stamp inside the UUIDv7, so that one partition and a short stretch of the key are read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sqlite3
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
import psycopg
import sqlalchemy as sa

from storage.engine import database_errors
from storage.errors import DatabaseUnavailable
from storage.schema import partition_bounds_s, partition_name, pruned, requests, segments, utc_day, writers
from traces.record import TraceRecord

Row = tuple[str | float | bool | bytes | None, ...]
"""The values of one `requests` row, in the table's order."""

_COLUMNS = tuple(column.name for column in requests.columns)
_COLUMN_LIST = ", ".join(_COLUMNS)
_POSTGRES_TYPES = {sa.Text: "text", sa.Double: "float8", sa.BigInteger: "int8", sa.Boolean: "bool"}
_COPY_TYPES = [_POSTGRES_TYPES.get(type(column.type), "bytea") for column in requests.columns]
_PARTITION_LOCK = 0x70617274  # "part": the advisory lock's key
_LOCK_TIMEOUT = "5s"
_FIRST_S, _END_S = -62_135_596_800, 253_402_300_800
"""The years 1 to 9999, which partitions are named for."""
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1

_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_NEAR_S = 0.005
"""The gateway takes id and stamp from one clock reading, so nearly every first turn lies this close to its id's."""
_FAR_S = 2.0
_FAR_LOOKUPS = 32
_RETRIES = 32
"""Lookups of each kind a commit: a client whose own session ids are UUIDv7 must not make each commit read the table."""
_TRIES = 32
_PENDING_LIMIT = 10_000
_SETTLED_LIMIT = 100_000


class SinkUnavailable(DatabaseUnavailable):
    """The database did not take the commit (down, locked, full): one line; commit the same again later."""


@dataclass(frozen=True, slots=True)
class SegmentProgress:
    """The frames of a journal segment that end at or before `offset_bytes` are in the database with this commit."""

    writer_id: str
    segment: int
    offset_bytes: int
    records: int
    """How many records of this commit came from the segment."""


@dataclass(frozen=True, slots=True)
class WriterTotals:
    """What a journal writer says of itself: requests accepted, records dropped by reason, whether it has ended."""

    writer_id: str
    gateway: str
    accepted: int
    dropped: Mapping[str, int]
    finished: bool


@dataclass(frozen=True, slots=True)
class WriterRow:
    """A writer's totals beside the number of its records that reached the database."""

    writer_id: str
    gateway: str
    accepted: int
    dropped: Mapping[str, int]
    recorded: int
    finished: bool


class Sink(Protocol):
    """Where the recorder puts records. Every method raises SinkUnavailable for trouble with the database."""

    def progress(self) -> dict[tuple[str, int], int]:
        """Committed offsets in bytes, by (writer_id, segment)."""

    def commit(
        self,
        records: Sequence[TraceRecord],
        progress: Sequence[SegmentProgress] = (),
        totals: Sequence[WriterTotals] = (),
    ) -> int:
        """Writes everything in one transaction; returns how many records were new. Safe to repeat.

        Raises ValueError naming the request whose `received_at` is not a time in the years 1 to 9999.
        """

    def forget(self, writer_id: str, segment: int) -> None:
        """Drops the progress of a segment whose file is gone; of all the writer's segments for -1."""

    def totals(self) -> list[WriterRow]:
        """Every writer's totals, by writer id."""

    def pruned(self) -> dict[str, int]:
        """How many requests retention took out of the database, by gateway."""

    def close(self) -> None:
        """Gives the connections back. The engine stays usable."""


Breathe = Callable[[], None]
"""Called between small pieces of work, about half a millisecond each, to let others have the core."""


def open_sink(engine: sa.Engine, breathe: Breathe = lambda: None) -> Sink:
    """A sink on an upgraded database. Nothing is connected before the first call."""
    return _DatabaseSink(engine, breathe)


class Transaction(Protocol):
    """One write transaction on the raw driver; placeholders are `?` on both databases."""

    def insert(self, rows: Sequence[Row]) -> int:
        """Inserts the rows whose key is not there yet; returns how many were."""

    def execute(self, sql: str, parameters: Sequence[object] = ()) -> int:
        """Runs one statement; returns the number of rows it changed."""

    def execute_many(self, sql: str, parameters: Sequence[Sequence[object]]) -> None:
        """Runs one statement with each of the parameters."""

    def query(self, sql: str, parameters: Sequence[object] = ()) -> list[Any]:
        """The rows that one statement gives."""

    def find(self, ids: Mapping[str, float], within_s: float) -> list[tuple[str, float, str | None]]:
        """(request_id, received_at, session_id) of the rows with these ids, within `within_s` of the ids' stamps."""


@contextlib.contextmanager
def transaction(
    engine: sa.Engine, known_days: set[int] | None = None, breathe: Breathe = lambda: None
) -> Iterator[Transaction]:
    """One write transaction: committed at the end, rolled back on any error.

    known_days: UTC days whose partitions are known to exist; kept up to date, PostgreSQL only.
    Raises the driver's and SQLAlchemy's own errors.
    """
    pooled = engine.raw_connection()
    try:
        driver = pooled.driver_connection
        if isinstance(driver, sqlite3.Connection):
            yield _SqliteTransaction(driver, breathe)
            driver.commit()
        else:
            assert isinstance(driver, psycopg.Connection)
            yield _PostgresTransaction(engine, driver, set() if known_days is None else known_days, breathe)
            driver.commit()
    except (sqlite3.Error, psycopg.Error):
        pooled.invalidate()
        raise
    finally:
        pooled.close()  # the pool rolls back what was not committed


_TURN = 64
_T = TypeVar("_T")


def in_turns(items: Sequence[_T], breathe: Breathe) -> Iterator[Sequence[_T]]:
    """The items, a few at a time; before each of these one may breathe."""
    for start in range(0, len(items), _TURN):
        breathe()
        yield items[start : start + _TURN]


def row_of(record: TraceRecord) -> Row:
    """The record as a row of `requests`. (An enum's `value` is a call in Python, its `_value_` is not.)"""
    blocks = record.prefix_blocks
    return (
        record.request_id,
        record.received_at,
        record.session_id,
        record.elapsed_s,
        record.model,
        record.request_tokens,
        record.response_tokens,
        record.log_type._value_,
        record.outcome._value_,
        record.client_request_id,
        record.served_model,
        record.status,
        record.error_type,
        record.ttft_s,
        record.tpot_s,
        record.queue_s,
        record.endpoint,
        record.stream,
        record.upstream,
        record.attempts,
        record.finish_reason,
        record.cached_tokens,
        record.max_tokens,
        record.token_source._value_,
        None if blocks is None else struct.pack(f"<{len(blocks)}Q", *blocks),
        record.origin._value_,
        record.run_id,
        record.shadow_of,
        record.tenant,
        record.gateway,
        record.shaping_rule,
        record.shaping_class,
        record.agreement,
    )


def _minutes(rows: Sequence[Row]) -> list[tuple[int]]:
    """Starts of the minutes in which the rows' requests came in: what is to be added up (storage/rollup.py)."""
    return [(minute * 60,) for minute in {int(row[1] // 60) for row in rows}]  # type: ignore[operator]


class _SqliteTransaction:
    _FIND = (
        "SELECT request_id, received_at, session_id FROM requests"
        " WHERE received_at BETWEEN ? AND ? AND request_id = ? LIMIT 1"
    )

    def __init__(self, connection: sqlite3.Connection, breathe: Breathe) -> None:
        self._breathe = breathe
        # The journal segment is deleted after the commit, so the commit must outlive a power cut: in WAL mode only
        # FULL syncs at each one. The recorder's batches make that a few syncs a second at most.
        connection.execute("PRAGMA synchronous=FULL")
        self._cursor = connection.cursor()
        self._cursor.execute("BEGIN IMMEDIATE")

    def insert(self, rows: Sequence[Row]) -> int:
        if not rows:
            return 0
        self.execute_many("INSERT INTO rollup_dirty (at) VALUES (?)", _minutes(rows))
        return sum(map(self._insert, in_turns(rows, self._breathe)))

    def _insert(self, rows: Sequence[Row]) -> int:
        # The driver binds text and numbers at once, but looks for an adapter for each None and each bool: of a row's 30
        # values those would cost more than the rest. So columns that are NULL in all rows are left out.
        names: list[str] = []
        columns: list[Iterable[object]] = []
        for name, values in zip(_COLUMNS, zip(*rows, strict=True), strict=True):
            if values.count(None) < len(rows):
                names.append(name)
                columns.append(map(int, values) if name == "stream" else values)
        sql = f"INSERT INTO requests ({', '.join(names)}) VALUES ({', '.join('?' * len(names))}) ON CONFLICT DO NOTHING"
        return self._cursor.executemany(sql, zip(*columns, strict=True)).rowcount

    def execute(self, sql: str, parameters: Sequence[object] = ()) -> int:
        return self._cursor.execute(sql, tuple(parameters)).rowcount

    def execute_many(self, sql: str, parameters: Sequence[Sequence[object]]) -> None:
        self._cursor.executemany(sql, [tuple(values) for values in parameters])

    def query(self, sql: str, parameters: Sequence[object] = ()) -> list[Any]:
        return self._cursor.execute(sql, tuple(parameters)).fetchall()

    def find(self, ids: Mapping[str, float], within_s: float) -> list[tuple[str, float, str | None]]:
        found = (
            self._cursor.execute(self._FIND, (at - within_s, at + within_s, request_id)).fetchone()
            for request_id, at in ids.items()
        )
        return [row for row in found if row is not None]


class _PostgresTransaction:
    # ON COMMIT DELETE ROWS keeps the table between commits: dropped and made each time it would bloat the catalogue.
    _STAGING = (
        "CREATE TEMPORARY TABLE IF NOT EXISTS burstgate_staging (LIKE requests) ON COMMIT DELETE ROWS",
        "TRUNCATE pg_temp.burstgate_staging",
    )
    _COPY = f"COPY pg_temp.burstgate_staging ({_COLUMN_LIST}) FROM STDIN (FORMAT BINARY)"
    _INSERT = (
        f"INSERT INTO requests ({_COLUMN_LIST}) SELECT {_COLUMN_LIST} FROM pg_temp.burstgate_staging"
        " ON CONFLICT DO NOTHING"
    )
    # OFFSET 0 keeps the subquery whole: one pruned index scan an id, never a join over all partitions.
    _FIND = (
        "SELECT row.request_id, row.received_at, row.session_id"
        " FROM unnest(%s::text[], %s::float8[], %s::float8[]) AS wanted (request_id, first_s, last_s),"
        " LATERAL (SELECT request_id, received_at, session_id FROM requests"
        "  WHERE received_at BETWEEN wanted.first_s AND wanted.last_s AND request_id = wanted.request_id"
        "  OFFSET 0) AS row"
    )

    def __init__(
        self, engine: sa.Engine, connection: psycopg.Connection[Any], known_days: set[int], breathe: Breathe
    ) -> None:
        self._engine = engine
        self._breathe = breathe
        self._known_days = known_days
        self._cursor = connection.cursor()
        self._cursor.execute(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'")

    def insert(self, rows: Sequence[Row]) -> int:
        if not rows:
            return 0
        days = {utc_day(row[1]) for row in rows}  # type: ignore[arg-type]
        if not days <= self._known_days:
            _make_partitions(self._engine, days)
            self._known_days |= days
        self.execute_many("INSERT INTO rollup_dirty (at) VALUES (?)", _minutes(rows))
        for statement in self._STAGING:
            self._cursor.execute(statement)
        with self._cursor.copy(self._COPY) as copy:
            copy.set_types(_COPY_TYPES)
            for some in in_turns(rows, self._breathe):
                for row in some:
                    copy.write_row(row)
        try:
            return self._cursor.execute(self._INSERT).rowcount
        except psycopg.errors.CheckViolation:  # a partition was dropped since: the next attempt makes it again
            self._known_days.clear()
            raise

    def execute(self, sql: str, parameters: Sequence[object] = ()) -> int:
        return self._cursor.execute(sql.replace("?", "%s").encode(), parameters).rowcount

    def execute_many(self, sql: str, parameters: Sequence[Sequence[object]]) -> None:
        self._cursor.executemany(sql.replace("?", "%s").encode(), parameters)

    def query(self, sql: str, parameters: Sequence[object] = ()) -> list[Any]:
        return self._cursor.execute(sql.replace("?", "%s").encode(), parameters).fetchall()

    def find(self, ids: Mapping[str, float], within_s: float) -> list[tuple[str, float, str | None]]:
        if not ids:
            return []
        stamps = [(at - within_s, at + within_s) for at in ids.values()]
        self._cursor.execute(self._FIND, (list(ids), [low for low, _ in stamps], [high for _, high in stamps]))
        return self._cursor.fetchall()


def _make_partitions(engine: sa.Engine, days: Iterable[int]) -> None:
    """Makes the partitions of these UTC days that are missing, in a transaction of its own.

    A table made first and then attached takes a lock on `requests` that neither readers nor writers wait for;
    CREATE TABLE ... PARTITION OF would wait for the longest export, and everyone behind it.
    """
    names = {partition_name(day): partition_bounds_s(day) for day in sorted(days)}
    with engine.begin() as connection:
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'")
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_PARTITION_LOCK)))
        attached = connection.exec_driver_sql(
            "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid"
            " WHERE inhparent = 'requests'::regclass"
        ).scalars()
        for name in names.keys() - set(attached):
            first_s, end_s = names[name]
            connection.exec_driver_sql(f"CREATE TABLE IF NOT EXISTS {name} (LIKE requests INCLUDING ALL)")
            connection.exec_driver_sql(
                f"ALTER TABLE requests ATTACH PARTITION {name} FOR VALUES FROM ({first_s}) TO ({end_s})"
            )


class _DatabaseSink:
    def __init__(self, engine: sa.Engine, breathe: Breathe) -> None:
        self._engine = engine
        self._breathe = breathe
        self._known_days: set[int] = set()
        self._promotions = _Promotions()

    def progress(self) -> dict[tuple[str, int], int]:
        with database_errors(self._engine, SinkUnavailable), self._engine.connect() as connection:
            return {(row.writer_id, row.segment): row.offset_bytes for row in connection.execute(sa.select(segments))}

    def commit(
        self,
        records: Sequence[TraceRecord],
        progress: Sequence[SegmentProgress] = (),
        totals: Sequence[WriterTotals] = (),
    ) -> int:
        for record in records:
            if not _FIRST_S <= record.received_at < _END_S:
                raise ValueError(
                    f"request {record.request_id}: received_at: expected epoch seconds in the years 1 to 9999,"
                    f" got {record.received_at}"
                )
        with database_errors(self._engine, SinkUnavailable):
            try:
                return self._commit(records, progress, totals)
            except (psycopg.DataError, OverflowError, UnicodeError, struct.error):
                # A value that the database cannot hold, put there by a client (a NUL in a model name). Refusing it
                # would stop all recording, so the record goes in with the nearest values that can be held.
                return self._commit([_storable(record) for record in records], progress, totals)

    def forget(self, writer_id: str, segment: int) -> None:
        gone = sa.delete(segments).where(segments.c.writer_id == writer_id)
        if segment >= 0:
            gone = gone.where(segments.c.segment == segment)
        with database_errors(self._engine, SinkUnavailable), self._engine.begin() as connection:
            connection.execute(gone)

    def totals(self) -> list[WriterRow]:
        columns = [writers.c[name] for name in WriterRow.__dataclass_fields__]
        with database_errors(self._engine, SinkUnavailable), self._engine.connect() as connection:
            return [WriterRow(*row) for row in connection.execute(sa.select(*columns).order_by(writers.c.writer_id))]

    def pruned(self) -> dict[str, int]:
        counts = sa.select(pruned.c.gateway, sa.func.sum(pruned.c.rows)).group_by(pruned.c.gateway)
        with database_errors(self._engine, SinkUnavailable), self._engine.connect() as connection:
            return {gateway: int(rows) for gateway, rows in connection.execute(counts)}

    def close(self) -> None:
        self._engine.dispose()

    def _commit(
        self,
        records: Sequence[TraceRecord],
        progress: Sequence[SegmentProgress],
        totals: Sequence[WriterTotals],
    ) -> int:
        rows = [row_of(record) for some in in_turns(records, self._breathe) for record in some]
        with transaction(self._engine, self._known_days, self._breathe) as active:
            inserted = active.insert(rows)
            lookup = self._promotions.apply(active, records)
            for writer in totals:
                _save_totals(active, writer)
            for step in progress:
                _advance(active, step)
        self._promotions.learn(lookup)
        return inserted


def _save_totals(active: Transaction, writer: WriterTotals) -> None:
    active.execute(
        "INSERT INTO writers (writer_id, gateway, accepted, dropped, recorded, finished) VALUES (?, ?, ?, ?, 0, ?)"
        " ON CONFLICT (writer_id) DO UPDATE SET gateway = excluded.gateway, accepted = excluded.accepted,"
        " dropped = excluded.dropped, finished = excluded.finished",
        (writer.writer_id, writer.gateway, writer.accepted, json.dumps(dict(writer.dropped)), writer.finished),
    )


def _advance(active: Transaction, step: SegmentProgress) -> None:
    """Moves a segment's offset forward and counts its records; a repeated commit moves nothing and counts nothing."""
    moved = active.execute(
        "INSERT INTO segments (writer_id, segment, offset_bytes) VALUES (?, ?, ?)"
        " ON CONFLICT (writer_id, segment) DO UPDATE SET offset_bytes = excluded.offset_bytes"
        " WHERE segments.offset_bytes < excluded.offset_bytes",
        (step.writer_id, step.segment, step.offset_bytes),
    )
    if moved:
        active.execute(
            "INSERT INTO writers (writer_id, gateway, accepted, dropped, recorded, finished)"
            " VALUES (?, '', 0, '{}', ?, ?)"
            " ON CONFLICT (writer_id) DO UPDATE SET recorded = writers.recorded + excluded.recorded",
            (step.writer_id, step.records, False),
        )


def _storable(record: TraceRecord) -> TraceRecord:
    """The record with values that both databases hold: no NUL or lone surrogate in text, 64-bit numbers."""

    def nearest(value: object) -> object:
        if isinstance(value, str):
            return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
        if isinstance(value, tuple):
            return tuple(block % 2**64 for block in value)
        if isinstance(value, int) and not isinstance(value, bool):
            return min(max(value, _INT64_MIN), _INT64_MAX)
        return value

    kept = ("log_type", "outcome", "token_source", "origin")
    return msgspec.structs.replace(
        record,
        **{name: nearest(getattr(record, name)) for name in record.__struct_fields__ if name not in kept},
    )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A first turn that is looked for: the log type it is to get, and how often it was looked for in vain."""

    log_type: str
    tries: int = 0


@dataclass(frozen=True, slots=True)
class _Lookup:
    """What one commit learnt about first turns: session ids found, session ids still wanted."""

    found: frozenset[str]
    missing: Mapping[str, _Wanted]


class _Promotions:
    """Which first turns are still to be found, across commits. Bounded: the oldest wanted one is given up first."""

    def __init__(self) -> None:
        self._pending: dict[str, _Wanted] = {}
        self._settled: dict[str, None] = {}

    def apply(self, active: Transaction, records: Sequence[TraceRecord]) -> _Lookup:
        """Promotes the first turns that can be found now. `learn` what it returns once the commit stands."""
        wanted = self._wanted_by(records)
        found = {row[0]: row for row in active.find(_stamps_s(wanted), _NEAR_S)}
        far = itertools.islice((session_id for session_id in wanted if session_id not in found), _FAR_LOOKUPS)
        found |= {row[0]: row for row in active.find(_stamps_s(far), _FAR_S)}
        active.execute_many(
            "UPDATE requests SET session_id = request_id, log_type = ?"
            " WHERE received_at = ? AND request_id = ? AND session_id IS NULL",
            [
                (wanted[request_id].log_type, received_at, request_id)
                for request_id, received_at, session_id in found.values()
                if session_id is None
            ],
        )
        missing = {key: _Wanted(value.log_type, value.tries + 1) for key, value in wanted.items() if key not in found}
        return _Lookup(frozenset(found), missing)

    def learn(self, lookup: _Lookup) -> None:
        """Takes over what a commit that stands has learnt."""
        for session_id in lookup.found:
            self._pending.pop(session_id, None)
            self._settled[session_id] = None
        for session_id, wanted in lookup.missing.items():
            self._pending.pop(session_id, None)  # to the back: whoever waited longest is tried first
            self._pending[session_id] = wanted
        _drop_oldest(self._pending, _PENDING_LIMIT)
        _drop_oldest(self._settled, _SETTLED_LIMIT)

    def _wanted_by(self, records: Sequence[TraceRecord]) -> dict[str, _Wanted]:
        """The first turns to look for in this commit: new ones, those that it brings, and some that were missing."""
        wanted: dict[str, _Wanted] = {}
        for record in records:
            session_id = record.session_id
            if session_id is None:
                if record.request_id in self._pending:
                    wanted[record.request_id] = self._pending[record.request_id]
            elif (
                session_id != record.request_id
                and session_id not in self._settled
                and session_id not in self._pending
                and session_id not in wanted
                and _UUID7.fullmatch(session_id)
            ):
                wanted[session_id] = _Wanted(record.log_type.value)
        again = (item for item in self._pending.items() if item[1].tries < _TRIES)
        return wanted | dict(itertools.islice(again, _RETRIES))


def _stamps_s(session_ids: Iterable[str]) -> dict[str, float]:
    """The epoch seconds in the first 48 bits of each UUIDv7 (RFC 9562, section 5.7)."""
    return {session_id: int(session_id[:8] + session_id[9:13], 16) / 1000 for session_id in session_ids}


def _drop_oldest(entries: dict[str, Any], limit: int) -> None:
    for key in list(itertools.islice(entries, max(0, len(entries) - limit))):
        del entries[key]
