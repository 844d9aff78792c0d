"""The accounting identity: it holds on every sound installation, and says so when something is missing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from storage.doctor import Balance, live_writers, take_balance
from storage.engine import open_engine, upgrade
from storage.entries import Begun
from storage.journal import JournalWriter, segment_path
from storage.recorder import Recorder
from storage.sink import open_sink
from traces.record import TraceRecord

AT_S = 1_700_000_000.0


def serve(writer: JournalWriter, first: int, count: int) -> None:
    for number in range(first, first + count):
        if writer.begin(Begun(f"{writer.writer_id}-{number}", AT_S)):
            writer.end(TraceRecord(f"{writer.writer_id}-{number}", AT_S))


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def database(sqlite_url: str) -> Iterator[sa.Engine]:
    engine = open_engine(sqlite_url)
    upgrade(engine)
    yield engine
    engine.dispose()


def record_all(journal: Path, database: sa.Engine) -> None:
    recorder = Recorder(journal, lambda: open_sink(database))
    while recorder.step():
        pass
    recorder.close()


def balance_of(journal: Path, database: sa.Engine) -> Balance:
    return take_balance(journal, open_sink(database))


@pytest.mark.parametrize(
    ("balance", "missing", "is_balanced"),
    [
        (Balance(0, 0, 0, {}, 0), 0, True),
        (Balance(10, 4, 3, {"budget": 2, "io": 1}, 0), 0, True),
        (Balance(10, 4, 3, {}, 0), 3, False),
        (Balance(10, 9, 3, {}, 0), -2, False),
        (Balance(10, 4, 4, {}, 2), 0, True),  # within what moved while it was read
        (Balance(10, 4, 3, {}, 2), 1, False),
        (Balance(10, 9, 3, {}, 1), -1, False),
        (Balance(0, 0, 0, {}, 0, strangers=("w",)), 0, False),
        (Balance(0, 0, 0, {}, 0, unreadable=("w",)), 0, False),
    ],
)
def test_the_identity(balance: Balance, missing: int, is_balanced: bool) -> None:
    assert (balance.missing, balance.is_balanced) == (missing, is_balanced)


def test_nothing_at_all_is_balanced(journal: Path, database: sa.Engine) -> None:
    assert balance_of(journal, database) == Balance(0, 0, 0, {}, 0)
    assert live_writers(journal) == 0


def test_each_term_is_where_it_should_be(journal: Path, database: sa.Engine) -> None:
    writer = JournalWriter(journal, "w", gateway="g", budget_bytes=1 << 20)
    serve(writer, 0, 5)
    record_all(journal, database)
    serve(writer, 5, 3)
    writer.begin(Begun("open", AT_S))
    assert balance_of(journal, database) == Balance(9, 5, 4, {}, 1)
    assert live_writers(journal) == 1
    writer.close()
    assert balance_of(journal, database) == Balance(9, 5, 4, {}, 1)
    assert live_writers(journal) == 0
    record_all(journal, database)
    assert balance_of(journal, database) == Balance(9, 9, 0, {}, 0)


def test_drops_are_kept_when_their_writer_is_gone(journal: Path, database: sa.Engine) -> None:
    for name in ("a", "b"):
        writer = JournalWriter(journal, name, gateway="g", budget_bytes=6_000)
        serve(writer, 0, 100)
        writer.close()
        before = balance_of(journal, database)
        assert before.is_balanced
        record_all(journal, database)
    balance = balance_of(journal, database)
    assert balance.is_balanced
    assert (balance.accepted, balance.in_journal, balance.slack) == (200, 0, 0)
    assert 0 < balance.in_database < 200
    assert balance.dropped == {"budget": 200 - balance.in_database}


def test_a_segment_that_somebody_deleted_is_missed(journal: Path, database: sa.Engine) -> None:
    writer = JournalWriter(journal, "w", gateway="g")
    serve(writer, 0, 10)
    segment_path(writer.directory, 1).unlink()
    balance = balance_of(journal, database)
    assert (balance.missing, balance.is_balanced) == (9, False)  # one may be on its way
    writer.close()
    record_all(journal, database)
    assert balance_of(journal, database).missing == 10


def test_another_database_is_noticed(journal: Path, database: sa.Engine, tmp_path: Path) -> None:
    writer = JournalWriter(journal, "w", gateway="g")
    serve(writer, 0, 3)
    writer.close()
    record_all(journal, database)
    other = open_engine(f"sqlite:///{tmp_path / 'other.db'}")
    upgrade(other)
    assert balance_of(journal, other).strangers == ("w",)
    other.dispose()


def test_a_database_shared_by_two_hosts_counts_its_own_writers(database: sa.Engine, tmp_path: Path) -> None:
    for host, count in (("one", 4), ("two", 7)):
        writer = JournalWriter(tmp_path / host, host, gateway=host)
        serve(writer, 0, count)
        writer.close()
        record_all(tmp_path / host, database)
    assert balance_of(tmp_path / "one", database) == Balance(4, 4, 0, {}, 0)
    assert balance_of(tmp_path / "two", database) == Balance(7, 7, 0, {}, 0)


def test_it_holds_while_everything_moves(journal: Path, database: sa.Engine) -> None:
    """Writers come and go, the recorder commits and deletes, and the doctor looks: never a false alarm."""
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            writer = JournalWriter(journal, f"w{number}", gateway="g", segment_bytes=4096)
            for start in range(0, 60, 10):
                serve(writer, start, 10)
                stop.wait(0.005)
            writer.close()
            number += 1

    def record() -> None:
        recorder = Recorder(journal, lambda: open_sink(database))
        while not stop.is_set():
            recorder.step()
            stop.wait(0.02)
        recorder.close()

    threads = [threading.Thread(target=write), threading.Thread(target=record)]
    for thread in threads:
        thread.start()
    try:
        balances = [balance_of(journal, database) for _ in range(40)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert [balance for balance in balances if not balance.is_balanced] == []
    assert balances[-1].accepted > balances[0].accepted
    record_all(journal, database)
    final = balance_of(journal, database)
    assert final.is_balanced
    assert final.in_journal == 0
