"""What retention takes out, what it leaves, and that it is counted; on both databases."""

from __future__ import annotations

import datetime
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from storage.archive import Archive
from storage.doctor import take_balance
from storage.engine import open_engine, upgrade
from storage.entries import Begun
from storage.errors import ArchiveError, DatabaseUnavailable, RetentionBusy
from storage.journal import JournalWriter
from storage.query import Filter, read_batches
from storage.recorder import Recorder
from storage.retention import DayRows, database_bytes, days_before, due_days, prune, vacuum
from storage.schema import partition_bounds_s, partition_name, requests, utc_day
from storage.sink import open_sink
from traces.batch import records_from_batch
from traces.record import Origin, TraceRecord

DAY = 20_000
"""2024-10-04."""
DAY_S = 86_400
NOW_S = partition_bounds_s(DAY + 10)[0] + 3 * 3600.0
"""Three hours into the eleventh day."""


def records(day: int, count: int, *, origin: Origin = Origin.CLIENT, gateway: str = "g") -> list[TraceRecord]:
    first_s = partition_bounds_s(day)[0]
    return [
        TraceRecord(f"{origin.value}-{day}-{n:06}", first_s + n * 0.5, model="m", origin=origin, gateway=gateway)
        for n in range(count)
    ]


def rows_of(engine: sa.Engine) -> list[TraceRecord]:
    return [record for batch in read_batches(engine, Filter()) for record in records_from_batch(batch)]


def pruned_of(engine: sa.Engine) -> dict[tuple[datetime.date, str], tuple[int, int]]:
    with engine.connect() as connection:
        found = connection.execute(sa.text('SELECT day, gateway, "rows", archived FROM pruned'))
        return {(datetime.date.fromisoformat(str(day)), name): (rows, held) for day, name, rows, held in found}


def shown(days: list[DayRows]) -> list[tuple[int, int, int]]:
    return [(day.day - DAY, day.rows, day.imported) for day in days]


@pytest.fixture
def filled(engine: sa.Engine) -> sa.Engine:
    """Eleven days of 20 rows, the fourth of which has imported rows too, and a day before with imported rows alone."""
    sink = open_sink(engine)
    for day in range(DAY, DAY + 11):
        sink.commit(records(day, 20))
    sink.commit(records(DAY + 3, 7, origin=Origin.IMPORTED))
    sink.commit(records(DAY - 1, 5, origin=Origin.IMPORTED))
    return engine


@pytest.mark.parametrize(
    ("max_age_days", "due"),
    [
        (30, []),
        (9, [0]),  # that day ended nine days and three hours ago
        (7, [0, 1, 2]),
        (0, list(range(10))),  # never the day that is not over
    ],
)
def test_days_due_by_age(filled: sa.Engine, max_age_days: float, due: list[int]) -> None:
    days = due_days(filled, NOW_S, max_age_s=max_age_days * DAY_S)
    assert [day.day - DAY for day in days] == due


def test_a_day_may_go_two_hours_after_its_end(filled: sa.Engine) -> None:
    ended_s = partition_bounds_s(DAY + 9)[1]
    assert [day.day - DAY for day in due_days(filled, ended_s + 7199, max_age_s=0)][-1] == 8
    assert [day.day - DAY for day in due_days(filled, ended_s + 7200, max_age_s=0)][-1] == 9


def test_days_of_the_database(filled: sa.Engine) -> None:
    assert shown(days_before(filled, partition_bounds_s(DAY + 4)[0])) == [
        (-1, 0, 5), (0, 20, 0), (1, 20, 0), (2, 20, 0), (3, 20, 7)
    ]  # fmt: skip


def test_what_goes_is_gone_and_what_was_imported_stays(filled: sa.Engine) -> None:
    days = due_days(filled, NOW_S, max_age_s=6 * DAY_S)
    assert shown(days) == [(0, 20, 0), (1, 20, 0), (2, 20, 0), (3, 20, 7)]
    done = prune(filled, days)
    assert (done.rows, done.archived, done.days[0], len(done.days)) == (80, 0, "2024-10-04", 4)
    left = rows_of(filled)
    assert len([row for row in left if row.origin == Origin.IMPORTED]) == 12
    assert {utc_day(row.received_at) - DAY for row in left if row.origin == Origin.CLIENT} == set(range(4, 11))
    first = datetime.date(2024, 10, 4)
    assert pruned_of(filled) == {(first + datetime.timedelta(n), "g"): (20, 0) for n in range(4)}
    assert due_days(filled, NOW_S, max_age_s=6 * DAY_S) == []
    if filled.dialect.name == "postgresql":
        tables = set(sa.inspect(filled).get_table_names())
        assert {partition_name(DAY), partition_name(DAY + 2)} & tables == set()
        assert partition_name(DAY + 3) in tables


def test_a_row_that_comes_after_its_day_went_is_recorded(filled: sa.Engine) -> None:
    sink = open_sink(filled)
    sink.commit(records(DAY, 1))  # this sink believes to know the partition
    prune(filled, due_days(filled, NOW_S, max_age_s=9 * DAY_S))
    late = TraceRecord("late", partition_bounds_s(DAY)[0] + 1.0, gateway="g")
    for _ in range(2):  # the recorder tries again
        try:
            sink.commit([late])
        except DatabaseUnavailable:
            continue
    assert late in rows_of(filled)
    prune(filled, due_days(filled, NOW_S, max_age_s=9 * DAY_S))
    assert pruned_of(filled) == {(datetime.date(2024, 10, 4), "g"): (21, 0)}


def test_days_due_by_size(engine: sa.Engine) -> None:
    sink = open_sink(engine)
    for day in range(DAY, DAY + 5):
        sink.commit(records(day, 3000))
    before = database_bytes(engine)
    assert due_days(engine, NOW_S, max_bytes=before) == []
    days = due_days(engine, NOW_S, max_bytes=int(before * 0.5))
    assert [day.day - DAY for day in days] == [0, 1, 2]
    done = prune(engine, days)
    assert done.bytes_before == before
    assert before * 0.3 < done.bytes_after < before * 0.5
    # Both bounds at once: what age takes counts for the size.
    assert due_days(engine, NOW_S, max_age_s=6 * DAY_S, max_bytes=done.bytes_after) == days_before(
        engine, partition_bounds_s(DAY + 4)[0]
    )
    assert len(due_days(engine, NOW_S, max_bytes=0)) == 2


def test_one_at_a_time(filled: sa.Engine) -> None:
    days = due_days(filled, NOW_S, max_age_s=6 * DAY_S)
    seen = []

    def again() -> None:
        other = open_engine(filled.url.render_as_string(hide_password=False))
        with pytest.raises(RetentionBusy, match="another process"):
            prune(other, days)
        other.dispose()
        seen.append(1)

    prune(filled, days, on_day=lambda day, rows, archived: again())
    assert len(seen) == 4
    prune(filled, [])  # and the lock is free again


def test_a_run_can_be_ended_between_pieces(engine: sa.Engine) -> None:
    open_sink(engine).commit(records(DAY, 2500))
    open_sink(engine).commit(records(DAY + 1, 10))

    def stop() -> None:
        raise InterruptedError

    days = due_days(engine, NOW_S, max_age_s=0)
    if engine.dialect.name == "sqlite":
        with pytest.raises(InterruptedError):
            prune(engine, days, breathe=stop)
        assert len(rows_of(engine)) == 1510
        assert pruned_of(engine) == {(datetime.date(2024, 10, 4), "g"): (1000, 0)}
    prune(engine, due_days(engine, NOW_S, max_age_s=0))
    assert rows_of(engine) == []
    assert pruned_of(engine) == {
        (datetime.date(2024, 10, 4), "g"): (2500, 0),
        (datetime.date(2024, 10, 5), "g"): (10, 0),
    }


# The archive first --------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(str(tmp_path / "archive"))


def archived(archive: Archive) -> list[TraceRecord]:
    return [
        record
        for held in archive.days().values()
        for batch in archive.read(held)
        for record in records_from_batch(batch)
    ]


def test_what_goes_is_in_the_archive(filled: sa.Engine, archive: Archive) -> None:
    before = [row for row in rows_of(filled) if row.origin != Origin.IMPORTED]
    done = prune(filled, due_days(filled, NOW_S, max_age_s=6 * DAY_S), archive)
    assert (done.rows, done.archived) == (80, 80)
    held = archived(archive)
    assert [row for row in before if row.received_at < partition_bounds_s(DAY + 4)[0]] == held
    assert pruned_of(filled)[datetime.date(2024, 10, 4), "g"] == (20, 20)


def test_kept_and_then_taken_out_is_there_once(filled: sa.Engine, archive: Archive) -> None:
    days = due_days(filled, NOW_S, max_age_s=9 * DAY_S)
    assert prune(filled, days, archive, keep=True).rows == 0
    assert len(rows_of(filled)) == 232
    first = archive.days()
    assert prune(filled, days, archive).rows == 20
    assert archive.days() == first  # nothing new, nothing written
    assert len(archived(archive)) == 20


def test_late_rows_join_their_archived_day(filled: sa.Engine, archive: Archive) -> None:
    days = due_days(filled, NOW_S, max_age_s=9 * DAY_S)
    prune(filled, days, archive)
    late = [TraceRecord(f"late-{n}", partition_bounds_s(DAY)[0] + n * 100.25, gateway="h") for n in range(3)]
    sink = open_sink(filled)
    sink.commit(late)
    (old,) = archive.days().values()
    prune(filled, due_days(filled, NOW_S, max_age_s=9 * DAY_S), archive)
    held = archived(archive)
    assert len(held) == 23
    assert held == sorted(held, key=lambda row: (row.received_at, row.request_id))
    assert set(late) <= set(held)
    assert not Path(archive._path(old.file)).exists()
    assert pruned_of(filled)[datetime.date(2024, 10, 4), "h"] == (3, 3)


def test_what_changes_between_archiving_and_removal_is_archived_again(engine: sa.Engine, archive: Archive) -> None:
    """A late row, and a first turn that learns of its session: neither may be lost with its day."""
    first_s = partition_bounds_s(DAY)[0]
    millis = f"{int(first_s * 1000):012x}"
    opener = TraceRecord(f"{millis[:8]}-{millis[8:]}-7000-8000-{0:012}", first_s, gateway="g")
    sink = open_sink(engine)
    sink.commit([opener, *records(DAY, 10)])
    pieces = 0

    def meanwhile() -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 1:  # the day has been read, and not yet removed
            sink.commit([TraceRecord("late", first_s + 0.1, gateway="g")])
        elif pieces == 2:
            sink.commit([TraceRecord("second-turn", first_s + 2 * DAY_S, opener.request_id, gateway="g")])

    assert prune(engine, days_before(engine, first_s + DAY_S), archive, breathe=meanwhile).rows == 12
    held = {row.request_id: row for row in archived(archive)}
    assert len(held) == 12
    assert "late" in held
    assert held[opener.request_id].session_id == opener.request_id
    assert [row.request_id for row in rows_of(engine)] == ["second-turn"]


def test_an_archive_that_can_not_be_written_takes_nothing_out(filled: sa.Engine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ArchiveError, match=r"file: .*(directory|exists)"):
        prune(filled, due_days(filled, NOW_S, max_age_s=9 * DAY_S), Archive(str(tmp_path / "file")))
    assert len(rows_of(filled)) == 232
    assert pruned_of(filled) == {}


# The accounting -----------------------------------------------------------------------------------------------------


def test_the_identity_holds_after_pruning(engine: sa.Engine, tmp_path: Path) -> None:
    """Live and stopped; and the terms are what the database really has."""
    journal = tmp_path / "journal"

    def serve(writer: JournalWriter, day: int, count: int) -> None:
        for record in records(day, count, gateway="g1"):
            name = f"{writer.writer_id}{record.request_id}"
            writer.begin(Begun(name, record.received_at))
            writer.end(TraceRecord(name, record.received_at, gateway="g1"))

    def record_all() -> None:
        recorder = Recorder(journal, lambda: open_sink(engine))
        while recorder.step():
            pass
        recorder.close()

    old, live = (JournalWriter(journal, name, gateway="g1") for name in ("old", "live"))
    serve(old, DAY, 30)
    old.close()
    serve(live, DAY, 5)
    serve(live, DAY + 10, 7)
    record_all()
    open_sink(engine).commit(records(DAY, 9, gateway="another host"))
    assert prune(engine, due_days(engine, NOW_S, max_age_s=0)).rows == 44
    serve(live, DAY + 10, 1)
    balance = take_balance(journal, open_sink(engine))
    assert balance.is_balanced
    assert (balance.accepted, balance.in_database, balance.pruned, balance.in_journal) == (43, 7, 35, 1)
    assert len(rows_of(engine)) == balance.in_database
    live.close()
    record_all()
    balance = take_balance(journal, open_sink(engine))
    assert (balance.accepted, balance.in_database, balance.pruned, balance.in_journal) == (43, 8, 35, 0)


# Never in the way ---------------------------------------------------------------------------------------------------


def test_the_recorder_does_not_wait(engine: sa.Engine, tmp_path: Path) -> None:
    """Commits go on at their pace while days are archived and removed."""
    sink = open_sink(engine)
    for day in range(DAY, DAY + 4):
        sink.commit(records(day, 3000))
    slowest_s = 0.0
    is_over = threading.Event()

    def record() -> None:
        nonlocal slowest_s
        own = open_engine(engine.url.render_as_string(hide_password=False))
        recorder = open_sink(own)
        at_s = partition_bounds_s(DAY + 10)[0]
        number = 0
        while not is_over.is_set():
            start_s = time.monotonic()
            recorder.commit([TraceRecord(f"now-{number}-{n}", at_s + n, gateway="g") for n in range(50)])
            slowest_s = max(slowest_s, time.monotonic() - start_s)
            number += 1
            time.sleep(0.01)
        own.dispose()

    thread = threading.Thread(target=record)
    thread.start()
    try:
        done = prune(
            engine,
            days_before(engine, partition_bounds_s(DAY + 4)[0]),
            Archive(str(tmp_path / "archive")),
            breathe=lambda: time.sleep(0.005),
        )
    finally:
        is_over.set()
        thread.join()
    assert done.rows == 12_000
    assert slowest_s < 2.0  # of which a busy machine takes most; a removal in one piece takes longer than its rows


@pytest.mark.postgres
def test_a_reader_holds_up_the_removal_and_not_the_recorder(postgres_url: str) -> None:
    engine = open_engine(postgres_url)
    upgrade(engine)
    sink = open_sink(engine)
    sink.commit(records(DAY, 10))
    sink.commit(records(DAY + 10, 10))
    with engine.connect() as reader:
        reader.execute(sa.select(requests)).fetchone()
        commits_s: list[float] = []

        def record() -> None:
            start_s = time.monotonic()
            sink.commit([TraceRecord(f"r{len(commits_s)}", NOW_S, gateway="g")])
            commits_s.append(time.monotonic() - start_s)

        with pytest.raises(DatabaseUnavailable, match="lock timeout"):
            prune(engine, days_before(engine, NOW_S - DAY_S), breathe=record)
    assert len(commits_s) > 5
    assert max(commits_s) < 2.0
    assert len([row for row in rows_of(engine) if row.received_at < NOW_S - DAY_S]) == 10
    assert prune(engine, days_before(engine, NOW_S - DAY_S)).rows == 10
    engine.dispose()


# SQLite's file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[sa.Engine]:
    opened = open_engine(sqlite_url)
    upgrade(opened)
    yield opened
    opened.dispose()


def size_of(engine: sa.Engine) -> int:
    assert engine.url.database is not None
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    return os.path.getsize(engine.url.database)


def test_the_file_shrinks(sqlite: sa.Engine) -> None:
    for day in (DAY, DAY + 10):
        open_sink(sqlite).commit(records(day, 5000))
    before = size_of(sqlite)
    done = prune(sqlite, due_days(sqlite, NOW_S, max_age_s=0))
    assert (done.rows, done.keeps_file_size) == (5000, False)
    assert size_of(sqlite) < before * 0.6


def test_a_file_from_before_keeps_its_size_until_it_is_vacuumed(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as old:  # as SQLite makes them
        old.execute("CREATE TABLE something (x)")
    old.close()
    engine = open_engine(f"sqlite:///{path}")
    upgrade(engine)
    for day in (DAY, DAY + 10):
        open_sink(engine).commit(records(day, 5000))
    before = size_of(engine)
    assert prune(engine, due_days(engine, NOW_S, max_age_s=0)).keeps_file_size
    assert size_of(engine) == before
    vacuum(engine)
    assert size_of(engine) < before * 0.6
    assert not prune(engine, []).keeps_file_size
    engine.dispose()


@pytest.mark.postgres
def test_postgres_is_not_vacuumed(postgres_url: str) -> None:
    engine = open_engine(postgres_url)
    with pytest.raises(ValueError, match="--vacuum: expected an SQLite database"):
        vacuum(engine)
    engine.dispose()
