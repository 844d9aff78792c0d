from __future__ import annotations

import contextlib
import sqlite3
import struct
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import sink as sink_module
from storage.engine import open_engine, upgrade
from storage.query import Filter, read_batches
from storage.schema import is_partition, requests, segments
from storage.sink import SegmentProgress, SinkUnavailable, WriterRow, WriterTotals, open_sink
from traces.batch import records_from_batch
from traces.record import LogType, Origin, Outcome, TokenSource, TraceRecord

DAY_S = 86_400
T0_S = 1_700_000_000.125

FULL = TraceRecord(
    request_id="018bcfe5-687d-7000-8000-000000000001",
    received_at=T0_S,
    session_id="s",
    elapsed_s=1.5,
    model="m",
    request_tokens=0,
    response_tokens=2**63 - 1,
    log_type=LogType.CONVERSATION,
    outcome=Outcome.CLIENT_GONE,
    client_request_id="c",
    served_model="über-模型-🦙",
    status=200,
    error_type="e\n\"quoted\",\t'x'\\N",
    ttft_s=0.1,
    tpot_s=1e-9,
    queue_s=0.0,
    endpoint="/v1/chat/completions",
    stream=True,
    upstream="http://u",
    attempts=2,
    finish_reason="",
    cached_tokens=3,
    max_tokens=4,
    token_source=TokenSource.USAGE,
    prefix_blocks=(0, 1, 2**64 - 1),
    origin=Origin.REPLAY,
    run_id="r",
    shadow_of="x",
    tenant="t",
    gateway="g",
)


def uuid7(epoch_s: float, number: int = 0) -> str:
    millis = f"{int(epoch_s * 1000):012x}"
    return f"{millis[:8]}-{millis[8:]}-7000-8000-{number:012x}"


def turn(number: int, session_id: str | None = None, at_s: float | None = None, **fields: Any) -> TraceRecord:
    at_s = T0_S + number if at_s is None else at_s
    values: dict[str, Any] = {"request_id": uuid7(at_s, number), "received_at": at_s, "session_id": session_id}
    return msgspec.structs.replace(TraceRecord("", 0.0), **(values | fields))


def stored(engine: sa.Engine) -> list[TraceRecord]:
    return [record for batch in read_batches(engine, Filter()) for record in records_from_batch(batch)]


def sessions(engine: sa.Engine) -> dict[str, tuple[str | None, str]]:
    return {record.request_id: (record.session_id, record.log_type) for record in stored(engine)}


def test_records_come_back_as_they_were(engine: sa.Engine) -> None:
    plain = TraceRecord("018bcfe5-687d-7000-8000-000000000002", T0_S)
    empty_blocks = msgspec.structs.replace(plain, request_id="z", prefix_blocks=())
    assert open_sink(engine).commit([plain, empty_blocks, FULL]) == 3
    assert stored(engine) == [FULL, plain, empty_blocks]


texts = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
counts = st.none() | st.integers(0, 2**63 - 1)
durations = st.none() | st.floats(0, 1e9)
records = st.builds(
    TraceRecord,
    request_id=st.uuids().map(str),
    received_at=st.integers(int((T0_S - DAY_S) * 1e6), int((T0_S + DAY_S) * 1e6)).map(lambda micros: micros / 1e6),
    session_id=texts,
    elapsed_s=durations,
    model=texts,
    request_tokens=counts,
    response_tokens=counts,
    log_type=st.sampled_from(LogType),
    outcome=st.sampled_from(Outcome),
    error_type=texts,
    ttft_s=durations,
    endpoint=texts.map(lambda text: text or ""),
    stream=st.booleans(),
    attempts=st.integers(0, 9),
    token_source=st.sampled_from(TokenSource),
    prefix_blocks=st.none() | st.lists(st.integers(0, 2**64 - 1), max_size=3).map(tuple),
    origin=st.sampled_from(Origin),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(records, max_size=12, unique_by=lambda record: record.request_id))
def test_any_records_come_back_in_time_order_and_once(engine: sa.Engine, batch: list[TraceRecord]) -> None:
    with engine.begin() as connection:
        connection.execute(sa.delete(requests))
    sink = open_sink(engine)
    assert sink.commit(batch[:7]) == len(batch[:7])
    assert sink.commit(batch) == len(batch[7:])
    assert sink.commit(batch + batch) == 0
    assert stored(engine) == sorted(batch, key=lambda record: (record.received_at, record.request_id))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model", "a\0b", "a\N{REPLACEMENT CHARACTER}b"),
        ("client_request_id", "a\ud800b", "a?b"),
        ("max_tokens", 2**64, 2**63 - 1),
        ("cached_tokens", -(2**70), -(2**63)),
        ("prefix_blocks", (2**64 + 5, -1), (5, 2**64 - 1)),
    ],
)
def test_a_value_that_the_database_cannot_hold_does_not_stop_recording(
    engine: sa.Engine, field: str, value: object, expected: object
) -> None:
    bad = msgspec.structs.replace(FULL, **{field: value})
    good = turn(7)
    sink = open_sink(engine)
    assert sink.commit([bad, good], [SegmentProgress("w", 1, 10, 2)]) == 2
    got, other = stored(engine)
    assert other == good
    # SQLite holds a NUL; PostgreSQL does not.
    assert getattr(got, field) in (expected, value)
    assert msgspec.structs.replace(got, **{field: value}) == bad
    assert [row.recorded for row in sink.totals()] == [2]


@pytest.mark.parametrize("received_at", [float("nan"), float("inf"), 1e12, -1e12])
def test_a_stamp_that_is_no_time_is_refused_with_its_request(engine: sa.Engine, received_at: float) -> None:
    with pytest.raises(ValueError, match=r"request 018bcfe5.*: received_at: expected epoch seconds in the years"):
        open_sink(engine).commit([msgspec.structs.replace(FULL, received_at=received_at)])
    assert stored(engine) == []


def test_progress_and_totals(engine: sa.Engine) -> None:
    sink = open_sink(engine)
    assert (sink.progress(), sink.totals()) == ({}, [])
    sink.commit(
        [turn(1), turn(2)],
        [SegmentProgress("a", 1, 100, 1), SegmentProgress("b", 1, 50, 1)],
        [WriterTotals("a", "gw", 5, {"disk_budget": 2}, False)],
    )
    assert sink.progress() == {("a", 1): 100, ("b", 1): 50}
    assert sink.totals() == [
        WriterRow("a", "gw", 5, {"disk_budget": 2}, 1, False),
        WriterRow("b", "", 0, {}, 1, False),  # its totals have not been seen yet
    ]
    sink.commit([turn(3)], [SegmentProgress("a", 2, 30, 1)], [WriterTotals("a", "gw", 9, {}, True)])
    sink.commit([], [SegmentProgress("a", 2, 40, 0)])
    assert sink.progress() == {("a", 1): 100, ("a", 2): 40, ("b", 1): 50}
    assert sink.totals()[0] == WriterRow("a", "gw", 9, {}, 2, True)
    sink.forget("a", 1)
    assert sink.progress() == {("a", 2): 40, ("b", 1): 50}
    sink.forget("a", -1)
    sink.forget("nobody", 1)
    assert sink.progress() == {("b", 1): 50}
    sink.close()
    assert open_sink(engine).progress() == {("b", 1): 50}


def test_a_repeated_commit_changes_nothing(engine: sa.Engine) -> None:
    sink = open_sink(engine)
    commit = ([turn(1), turn(2)], [SegmentProgress("w", 1, 10, 2)], [WriterTotals("w", "g", 2, {}, False)])
    assert sink.commit(*commit) == 2
    before = (stored(engine), sink.progress(), sink.totals())
    assert sink.commit(*commit) == 0
    assert open_sink(engine).commit(*commit) == 0  # a recorder that died before it heard of its commit
    assert (stored(engine), sink.progress(), sink.totals()) == before


def test_a_commit_is_whole_or_not_at_all(engine: sa.Engine) -> None:
    sink = open_sink(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE segments RENAME TO hidden"))
    with pytest.raises(SinkUnavailable):
        sink.commit([turn(1)], [SegmentProgress("w", 1, 10, 1)], [WriterTotals("w", "g", 1, {}, False)])
    assert (stored(engine), sink.totals()) == ([], [])
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE hidden RENAME TO segments"))
    assert sink.commit([turn(1)], [SegmentProgress("w", 1, 10, 1)]) == 1


def test_a_database_without_its_schema_says_so(database_url: str) -> None:
    bare = open_engine(database_url)
    for call in (lambda: open_sink(bare).commit([turn(1)]), open_sink(bare).progress):
        with pytest.raises(SinkUnavailable, match="burstgate db upgrade"):
            call()
    bare.dispose()


# Promotion

ROOT = turn(0)
PROMOTED = (ROOT.request_id, LogType.CONVERSATION.value)


def reply(number: int, **fields: Any) -> TraceRecord:
    return turn(number, ROOT.request_id, log_type=LogType.CONVERSATION, **fields)


@pytest.mark.parametrize(
    "commits",
    [
        [[ROOT, reply(1)]],
        [[reply(1), ROOT]],
        [[ROOT], [reply(1)]],
        [[reply(1)], [ROOT]],
        [[ROOT], [turn(5)], [reply(1), reply(2)], [reply(3)]],
        [[reply(1)], *([turn(number)] for number in range(10, 60)), [ROOT]],
        [[ROOT], [reply(1, at_s=T0_S + 40 * DAY_S)]],
    ],
    ids=["together", "reversed", "after", "before", "many turns", "long before", "weeks later"],
)
def test_the_first_turn_joins_the_session_that_is_named_after_it(
    engine: sa.Engine, commits: list[list[TraceRecord]]
) -> None:
    sink = open_sink(engine)
    for batch in commits:
        assert sink.commit(batch) == len(batch)
    got = sessions(engine)
    assert got.pop(ROOT.request_id) == PROMOTED
    rest = {record.request_id: (record.session_id, record.log_type.value) for batch in commits for record in batch}
    del rest[ROOT.request_id]
    assert got == rest  # nothing else changed


@pytest.mark.parametrize("off_s", [-1.9, -0.01, 0.01, 1.9])
def test_the_stamp_in_an_id_may_be_off_by_two_seconds(engine: sa.Engine, off_s: float) -> None:
    root = msgspec.structs.replace(ROOT, received_at=ROOT.received_at + off_s)
    sink = open_sink(engine)
    sink.commit([root])
    sink.commit([reply(1)])
    assert sessions(engine)[ROOT.request_id] == PROMOTED


def test_a_first_turn_that_another_recorder_brings_is_found_later(engine: sa.Engine) -> None:
    ours, theirs = open_sink(engine), open_sink(engine)
    ours.commit([reply(1)])
    ours.commit([turn(8)])
    theirs.commit([ROOT])
    assert sessions(engine)[ROOT.request_id] == (None, LogType.API.value)
    ours.commit([turn(9)])
    assert sessions(engine)[ROOT.request_id] == PROMOTED


@pytest.mark.parametrize(
    ("root", "follower"),
    [
        (turn(0, "own-session"), reply(1)),  # has a session: stays in it
        (turn(0, request_id="018bcfe5-687d-4000-8000-000000000000"), turn(1, "018bcfe5-687d-4000-8000-000000000000")),
        (turn(0, request_id=uuid7(T0_S).upper()), turn(1, uuid7(T0_S).upper())),
        (turn(0, request_id="x"), turn(1, "x")),
        (turn(0, at_s=T0_S + 10, request_id=ROOT.request_id), reply(1)),  # not the time that its id says
    ],
    ids=["in a session", "version 4", "upper case", "no uuid", "elsewhere in time"],
)
def test_what_is_not_a_first_turn_stays_as_it_is(engine: sa.Engine, root: TraceRecord, follower: TraceRecord) -> None:
    sink = open_sink(engine)
    sink.commit([root, follower])
    sink.commit([turn(5)])
    assert sessions(engine)[root.request_id] == (root.session_id, root.log_type.value)


def test_a_first_turn_that_names_itself_is_left_alone(engine: sa.Engine) -> None:
    record = turn(0, ROOT.request_id, log_type=LogType.API)
    open_sink(engine).commit([record])
    assert stored(engine) == [record]


def test_a_failed_commit_forgets_no_first_turn(engine: sa.Engine) -> None:
    sink = open_sink(engine)
    sink.commit([reply(1)])
    with pytest.raises(SinkUnavailable), _segments_missing(engine):
        sink.commit([ROOT], [SegmentProgress("w", 1, 1, 1)])
    sink.commit([ROOT], [SegmentProgress("w", 1, 1, 1)])
    assert sessions(engine)[ROOT.request_id] == PROMOTED


def test_session_ids_of_clients_that_look_like_ours_stay_bounded(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_module, "_PENDING_LIMIT", 20)
    sink = open_sink(engine)
    firsts = [turn(number) for number in range(200)]
    sink.commit([turn(1000 + first_number, first.request_id) for first_number, first in enumerate(firsts)])
    for number in range(40):  # past the last attempt of each
        sink.commit([turn(2000 + number)])
    sink.commit(firsts)
    got = sessions(engine)
    assert sum(got[first.request_id][0] == first.request_id for first in firsts) == 20


@contextlib.contextmanager
def _segments_missing(engine: sa.Engine) -> Iterator[None]:
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE segments RENAME TO hidden"))
    try:
        yield
    finally:
        with engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE hidden RENAME TO segments"))


# Databases in trouble


def test_a_locked_file_is_waited_out_by_the_caller(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.engine.BUSY_TIMEOUT_S", 0.05)
    engine = open_engine(sqlite_url)
    upgrade(engine)
    sink = open_sink(engine)
    sink.commit([turn(1)])
    holder = sqlite3.connect(engine.url.database or "")
    holder.execute("BEGIN IMMEDIATE")
    for _ in range(3):
        with pytest.raises(SinkUnavailable, match="database is locked") as caught:
            sink.commit([turn(2)])
        assert "\n" not in str(caught.value)
        assert sink.progress() == {}  # reading needs no lock
    holder.close()
    assert sink.commit([turn(2)]) == 1
    engine.dispose()


def test_a_full_disk_is_waited_out_by_the_caller(sqlite_url: str) -> None:
    engine = open_engine(sqlite_url)
    upgrade(engine)
    limit = {"pages": 40}

    @sa.event.listens_for(engine, "checkout")
    def _limit_pages(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count={limit['pages']}")

    sink = open_sink(engine)
    many = [turn(number, model="m" * 500) for number in range(500)]
    with pytest.raises(SinkUnavailable, match="full"):
        sink.commit(many)
    assert stored(engine) == []
    limit["pages"] = 100_000
    assert sink.commit(many) == 500
    engine.dispose()


def test_nobody_answers() -> None:
    engine = open_engine("postgresql://u:secret@127.0.0.1:1/db")
    with pytest.raises(SinkUnavailable, match=r"u:\*\*\*@127\.0\.0\.1.*Connection refused"):
        open_sink(engine).commit([turn(1)])


@pytest.mark.postgres
def test_a_server_that_was_restarted_is_found_again(postgres_url: str, postgres_server: str) -> None:
    engine = open_engine(postgres_url)
    upgrade(engine)
    sink = open_sink(engine)
    sink.commit([turn(1)])
    with psycopg.connect(postgres_server, autocommit=True) as other:
        for _ in range(2):  # whether noticed before the commit or by it, one more attempt succeeds
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
                (engine.url.database,),
            )
            with contextlib.suppress(SinkUnavailable):
                sink.commit([turn(2)])
            sink.commit([turn(2)])
    assert [record.request_id for record in stored(engine)] == [turn(1).request_id, turn(2).request_id]
    engine.dispose()


@pytest.mark.postgres
def test_a_table_held_by_a_long_migration_is_not_waited_for(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_module, "_LOCK_TIMEOUT", "100ms")
    engine = open_engine(postgres_url)
    upgrade(engine)
    sink = open_sink(engine)
    sink.commit([turn(1)])
    with psycopg.connect(postgres_url) as holder:
        holder.execute("LOCK TABLE requests IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(SinkUnavailable, match="lock timeout"):
            sink.commit([turn(2)])
    assert sink.commit([turn(2)]) == 1
    engine.dispose()


# Partitions


def _partitions(engine: sa.Engine) -> list[str]:
    return sorted(filter(is_partition, sa.inspect(engine).get_table_names()))


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[sa.Engine]:
    engine = open_engine(postgres_url)
    upgrade(engine)
    yield engine
    engine.dispose()


@pytest.mark.postgres
def test_each_utc_day_has_its_partition(postgres: sa.Engine) -> None:
    midnight = 1_709_251_200.0  # 2024-03-01, the day after a 29th of February
    batch = [turn(number, at_s=midnight + at_s) for number, at_s in enumerate((-1e-6, 0.0, DAY_S - 1e-6, 3 * DAY_S))]
    assert open_sink(postgres).commit(batch) == 4
    assert _partitions(postgres) == ["requests_20240229", "requests_20240301", "requests_20240304"]
    assert stored(postgres) == batch


@pytest.mark.postgres
def test_partitions_have_the_indexes_of_their_parent(postgres: sa.Engine) -> None:
    open_sink(postgres).commit([turn(1)])
    (name,) = _partitions(postgres)
    assert len(sa.inspect(postgres).get_indexes(name)) == 2
    with postgres.connect() as connection:
        valid = connection.exec_driver_sql(
            "SELECT indisvalid FROM pg_index WHERE indrelid = 'requests'::regclass"
        ).scalars()
        assert list(valid) == [True] * 3


@pytest.mark.postgres
def test_a_new_day_does_not_wait_for_a_long_export(postgres: sa.Engine) -> None:
    sink = open_sink(postgres)
    sink.commit([turn(number) for number in range(3)])
    reading = read_batches(postgres, Filter(), batch_rows=1)
    next(reading)  # holds its lock on requests until it is done
    assert sink.commit([turn(9, at_s=T0_S + 5 * DAY_S)]) == 1
    assert sum(len(batch) for batch in reading) == 2  # its snapshot has not moved


@pytest.mark.postgres
def test_recorders_that_begin_a_day_at_once_both_succeed(postgres: sa.Engine) -> None:
    start = threading.Barrier(4)
    inserted: list[int] = []

    def record(worker: int) -> None:
        sink = open_sink(postgres)
        for day in range(10):
            start.wait()
            inserted.append(sink.commit([turn(worker, at_s=T0_S + day * DAY_S)]))

    threads = [threading.Thread(target=record, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert inserted == [1] * 40
    assert len(_partitions(postgres)) == 10


@pytest.mark.postgres
@pytest.mark.parametrize("how", ["DROP TABLE {}", "ALTER TABLE requests DETACH PARTITION {}"])
def test_a_day_that_was_taken_away_is_made_again(postgres: sa.Engine, how: str) -> None:
    sink = open_sink(postgres)
    sink.commit([turn(1)])
    (name,) = _partitions(postgres)
    with postgres.begin() as connection:
        connection.exec_driver_sql(how.format(name))
    with pytest.raises(SinkUnavailable, match="no partition"):
        sink.commit([turn(2)])
    assert sink.commit([turn(2)]) == 1


def test_prefix_blocks_are_packed_little_endian(engine: sa.Engine) -> None:
    open_sink(engine).commit([FULL])
    with engine.connect() as connection:
        packed = connection.execute(sa.select(requests.c.prefix_blocks)).scalar_one()
    assert struct.unpack("<3Q", packed) == FULL.prefix_blocks


def test_segment_numbers_are_64_bit(engine: sa.Engine) -> None:
    sink = open_sink(engine)
    sink.commit([], [SegmentProgress("w", 2**40, 2**50, 0)])
    with engine.connect() as connection:
        assert connection.execute(sa.select(segments)).all() == [("w", 2**40, 2**50)]
