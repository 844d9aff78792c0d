"""Journal in, database out, exactly once: through restarts, damage, a database that is away, and any order of these."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.doctor import take_balance
from storage.engine import open_engine, upgrade
from storage.entries import Begun
from storage.frame import decode_frames, encode_frame
from storage.journal import JournalWriter, NotRecording, segment_path
from storage.recorder import READ_BYTES, Recorder, SegmentReader, open_segments
from storage.schema import requests
from storage.sink import SegmentProgress, Sink, SinkUnavailable, WriterTotals, open_sink
from traces.record import Outcome, TraceRecord

AT_S = 1_700_000_000.0


def begun(name: str) -> Begun:
    return Begun(name, AT_S, model="m")


def ended(name: str, padding: str = "") -> TraceRecord:
    return TraceRecord(name, AT_S, model="m", response_tokens=7, endpoint=padding)


def serve(writer: JournalWriter, *names: str, padding: str = "") -> None:
    for name in names:
        assert writer.begin(begun(name))
        writer.end(ended(name, padding))


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def database(sqlite_url: str) -> Iterator[sa.Engine]:
    engine = open_engine(sqlite_url)
    upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def writer(journal: Path) -> Iterator[JournalWriter]:
    opened = JournalWriter(journal, "w", gateway="g", segment_bytes=2048)
    yield opened
    opened.close()


def new_recorder(journal: Path, database: sa.Engine) -> Recorder:
    return Recorder(journal, lambda: open_sink(database))


def drain(recorder: Recorder) -> int:
    """Steps until nothing moves; the number of records moved."""
    total = 0
    while moved := recorder.step():
        total += moved
    return total


def outcomes(database: sa.Engine) -> dict[str, str]:
    """Outcome by request id; the key makes a second row impossible, `recorded` counts would show a second commit."""
    with database.connect() as connection:
        return {row.request_id: row.outcome for row in connection.execute(sa.select(requests))}


def assert_balanced(journal: Path, database: sa.Engine) -> None:
    balance = take_balance(journal, open_sink(database))
    assert balance.is_balanced, balance
    assert balance.in_database == len(outcomes(database))


def test_what_was_ended_is_in_the_database_once(journal: Path, database: sa.Engine, writer: JournalWriter) -> None:
    recorder = new_recorder(journal, database)
    serve(writer, "a", "b")
    assert recorder.step() == 2
    assert recorder.step() == 0
    serve(writer, "c")
    writer.begin(begun("open"))
    assert recorder.step() == 1
    assert outcomes(database) == {"a": "ok", "b": "ok", "c": "ok"}
    assert_balanced(journal, database)
    recorder.close()


def test_segments_go_once_all_of_them_is_committed(journal: Path, database: sa.Engine, writer: JournalWriter) -> None:
    names = [f"r{number}" for number in range(60)]
    writer.begin(begun("open"))
    serve(writer, *names)
    assert len(open_segments(writer.directory)) > 3
    recorder = new_recorder(journal, database)
    assert drain(recorder) == 60
    assert open_segments(writer.directory) == [writer._segment]
    assert {segment for _, segment in open_sink(database).progress()} <= {writer._segment}
    recorder.close()
    recorder = new_recorder(journal, database)  # knows of `open` from the newest segment alone
    writer.close()
    assert drain(recorder) == 1
    assert outcomes(database) == {**dict.fromkeys(names, "ok"), "open": "gateway_crash"}
    assert_balanced(journal, database)
    recorder.close()


@pytest.mark.parametrize("is_read_before", [True, False])
def test_a_request_in_flight_when_its_worker_died_is_a_crash_once(
    is_read_before: bool, journal: Path, database: sa.Engine, writer: JournalWriter
) -> None:
    writer.begin(begun("open"))
    serve(writer, "whole")
    recorder = new_recorder(journal, database)
    if is_read_before:  # then the end of the segment is committed before the crash is known
        assert recorder.step() == 1
    writer.close()
    assert drain(recorder) == (1 if is_read_before else 2)
    assert outcomes(database) == {"whole": "ok", "open": "gateway_crash"}
    assert not writer.directory.exists()
    assert (journal / "retired" / "w.counters").exists()
    assert_balanced(journal, database)
    recorder.close()
    recorder = new_recorder(journal, database)
    assert drain(recorder) == 0
    recorder.close()
    assert_balanced(journal, database)


class Killed(BaseException):
    """The recorder's process is gone."""


class DeadlySink:
    """A real sink; the process dies right behind its commit, or once it has forgotten a segment."""

    def __init__(self, sink: Sink, *, after: str) -> None:
        self._sink = sink
        self._after = after
        self.progress, self.totals, self.close = sink.progress, sink.totals, sink.close
        self.pruned = sink.pruned

    def commit(
        self,
        records: Sequence[TraceRecord],
        progress: Sequence[SegmentProgress] = (),
        totals: Sequence[WriterTotals] = (),
    ) -> int:
        new = self._sink.commit(records, progress, totals)
        if self._after == "commit":
            raise Killed
        return new

    def forget(self, writer_id: str, segment: int) -> None:
        self._sink.forget(writer_id, segment)
        raise Killed


@pytest.mark.parametrize("after", ["commit", "forget"])
@pytest.mark.parametrize("is_dead", [False, True])
def test_a_recorder_that_died_between_commit_and_deletion(
    is_dead: bool, after: str, journal: Path, database: sa.Engine, writer: JournalWriter
) -> None:
    """What is left of its segments is read again, and nothing of them is recorded again."""
    names = [f"r{number}" for number in range(30)]
    writer.begin(begun("open"))
    serve(writer, *names)
    if is_dead:
        writer.close()
    segments = open_segments(writer.directory)
    first = Recorder(journal, lambda: DeadlySink(open_sink(database), after=after))
    with pytest.raises(Killed):
        first.step()
    if after == "commit":
        assert open_segments(writer.directory) == segments
    expected = dict.fromkeys(names, "ok")
    expected |= {"open": "gateway_crash"} if is_dead else {}
    assert outcomes(database) == expected
    assert_balanced(journal, database)
    second = new_recorder(journal, database)
    assert drain(second) == 0
    second.close()
    assert open_segments(writer.directory) == ([] if is_dead else segments[-1:])
    assert outcomes(database) == expected
    assert_balanced(journal, database)


def test_a_commit_whose_answer_was_lost_is_repeated(journal: Path, database: sa.Engine, writer: JournalWriter) -> None:
    """The same frames committed twice, by two recorders that read the same offsets."""
    serve(writer, "a", "b")
    reader = SegmentReader(writer.directory, {})
    records, progress = reader.read(100)
    sink = open_sink(database)
    assert sink.commit(records, progress) == 2
    assert sink.commit(records, progress) == 0
    recorder = new_recorder(journal, database)
    assert recorder.step() == 0
    assert_balanced(journal, database)
    recorder.close()


def test_two_writers_are_read_side_by_side(journal: Path, database: sa.Engine) -> None:
    writers = [JournalWriter(journal, name, gateway=name, segment_bytes=2048) for name in ("a", "b")]
    recorder = new_recorder(journal, database)
    for number in range(40):
        serve(writers[number % 2], f"r{number}")
        if number % 7 == 0:
            recorder.step()
    writers[0].begin(begun("open"))
    writers[0].close()
    drain(recorder)
    assert not (journal / "a").exists()
    assert (journal / "b").exists()
    assert outcomes(database) == {**{f"r{number}": "ok" for number in range(40)}, "open": "gateway_crash"}
    with database.connect() as connection:
        gateway = sa.select(requests.c.gateway).where(requests.c.request_id == "open")
        assert connection.execute(gateway).scalar() == "a"
    assert_balanced(journal, database)
    writers[1].close()
    recorder.close()


def test_a_writer_in_the_making_is_left_alone(journal: Path, database: sa.Engine) -> None:
    making = journal / ".w"
    making.mkdir(parents=True)
    (making / "00000001.seg").write_bytes(b"")
    recorder = new_recorder(journal, database)
    assert recorder.step() == 0
    assert (making / "00000001.seg").exists()
    assert not (journal / "retired").exists()
    recorder.close()


def _tear(path: Path) -> None:
    """Half a frame behind the last whole one: its writer is in the middle of it, or was killed there."""
    with path.open("r+b") as file:
        file.seek(decode_frames(file.read())[1])
        file.write(encode_frame(b"E" + b"x" * 100)[:50])


def test_a_half_frame_is_read_when_it_is_whole(journal: Path, database: sa.Engine, writer: JournalWriter) -> None:
    recorder = new_recorder(journal, database)
    serve(writer, "a")
    _tear(segment_path(writer.directory, 1))
    assert recorder.step() == 1
    serve(writer, "b")  # over it
    assert recorder.step() == 1
    assert outcomes(database) == {"a": "ok", "b": "ok"}
    recorder.close()


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("has_later", [False, True])
def test_a_torn_tail_is_nobodys_record(
    is_cut: bool, has_later: bool, journal: Path, database: sa.Engine, writer: JournalWriter,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    serve(writer, "a")
    path = segment_path(writer.directory, 1)
    allocated = path.stat().st_size
    if has_later:
        assert writer._rotate()
        serve(writer, "b")
    writer.close()
    _tear(path)
    if not is_cut:  # as a kill leaves it: allocated ahead
        os.truncate(path, allocated)
    recorder = new_recorder(journal, database)
    drain(recorder)
    assert outcomes(database) == ({"a": "ok", "b": "ok"} if has_later else {"a": "ok"})
    assert_balanced(journal, database)
    assert caplog.records == []
    recorder.close()


def _damage(path: Path, name: str) -> None:
    """Flips a byte in the last frame that names the request."""
    data = bytearray(path.read_bytes())
    data[data.rindex(name.encode())] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("has_later", [False, True])
def test_damage_in_the_middle_costs_its_frame_alone(
    has_later: bool, journal: Path, database: sa.Engine, writer: JournalWriter, caplog: pytest.LogCaptureFixture
) -> None:
    serve(writer, "a", "b", "c")
    _damage(segment_path(writer.directory, 1), "b")
    if has_later:
        assert writer._rotate()
        serve(writer, "d")
    writer.close()
    recorder = new_recorder(journal, database)
    with caplog.at_level(logging.ERROR):
        drain(recorder)
    # b's begin was read: what is known of it is that it began. In a new segment it would have been repeated.
    expected = {"a": "ok", "c": "ok"} | ({"d": "ok"} if has_later else {"b": "gateway_crash"})
    assert outcomes(database) == expected
    assert "damaged bytes at offset" in caplog.text
    balance = take_balance(journal, open_sink(database))
    assert balance.is_balanced, balance
    assert balance.dropped == ({"corrupt": 1} if has_later else {})
    recorder.close()


def test_damage_before_more_than_is_read_at_a_time(journal: Path, database: sa.Engine) -> None:
    writer = JournalWriter(journal, "w", gateway="g", segment_bytes=1 << 30)
    padding = "x" * 1000
    count = 3 * READ_BYTES // 1000
    names = [f"r{number:05d}" for number in range(count)]
    serve(writer, *names, padding=padding)
    _damage(segment_path(writer.directory, 1), names[0])
    recorder = new_recorder(journal, database)
    drain(recorder)  # of a living writer: nothing waits for a new segment
    assert set(outcomes(database)) == set(names[1:])
    writer.close()
    drain(recorder)
    assert outcomes(database) == {**dict.fromkeys(names[1:], "ok"), names[0]: "gateway_crash"}
    assert_balanced(journal, database)
    recorder.close()


@pytest.mark.parametrize("noise_bytes", [READ_BYTES - 20, READ_BYTES + 12_345])
def test_noise_in_the_middle_is_stepped_over(noise_bytes: int, journal: Path, database: sa.Engine) -> None:
    """About as long as a read: the frame behind it may begin in one piece and end in the next."""
    writer = JournalWriter(journal, "w", gateway="g", segment_bytes=1 << 30)
    serve(writer, "before")
    with segment_path(writer.directory, 1).open("ab") as file:
        file.write(b"\xff" * noise_bytes)
    writer.begin(begun("open"))
    writer.close()
    recorder = new_recorder(journal, database)
    drain(recorder)
    assert outcomes(database) == {"before": "ok", "open": "gateway_crash"}
    assert_balanced(journal, database)
    recorder.close()


@pytest.mark.parametrize("payload", [b"Zsomething new", b"E\xc1", b"B\x90", b"H{}", b"Enot messagepack"])
def test_a_frame_of_a_newer_version_is_left_in_place_and_said(
    payload: bytes, journal: Path, database: sa.Engine, writer: JournalWriter, caplog: pytest.LogCaptureFixture
) -> None:
    serve(writer, "a", "b")
    path = segment_path(writer.directory, 1)
    assert writer._append(encode_frame(payload))
    serve(writer, "c")
    content = path.read_bytes()
    other = JournalWriter(journal, "x", gateway="g")
    serve(other, "d")
    recorder = new_recorder(journal, database)
    assert drain(recorder) == 3
    assert outcomes(database) == {"a": "ok", "b": "ok", "d": "ok"}  # all that lies before it, and all others
    recorder.step()
    assert recorder.stats.unreadable_writers == 1
    assert ["00000001.seg" in record.getMessage() for record in caplog.records] == [True]  # said once
    balance = take_balance(journal, open_sink(database))
    assert not balance.is_balanced
    assert len(balance.unreadable) == 1
    writer.close()
    other.close()
    drain(recorder)
    assert path.read_bytes() == content.rstrip(b"\0")
    assert not other.directory.exists()
    recorder.close()


def test_a_database_that_is_away_is_waited_out(journal: Path, sqlite_url: str, writer: JournalWriter) -> None:
    serve(writer, "a")
    engine = open_engine(sqlite_url)  # no schema yet
    recorder = new_recorder(journal, engine)
    for _ in range(2):
        with pytest.raises(SinkUnavailable, match="no such table"):
            recorder.step()
    serve(writer, "b")
    upgrade(engine)
    assert recorder.step() == 2
    assert outcomes(engine) == {"a": "ok", "b": "ok"}
    recorder.close()
    engine.dispose()


def test_run_empties_the_journal_before_it_stops(journal: Path, database: sa.Engine, writer: JournalWriter) -> None:
    serve(writer, *(f"r{number}" for number in range(100)))
    writer.close()
    recorder = new_recorder(journal, database)
    recorder.stop()
    recorder.run()
    recorder.close()
    assert len(outcomes(database)) == 100
    assert not writer.directory.exists()


def test_records_are_gathered_and_soon_there(journal: Path, database: sa.Engine, writer: JournalWriter) -> None:
    """A commit for each wake-up would cost more than its rows; nobody waits for more than about a second."""
    recorder = new_recorder(journal, database)
    thread = threading.Thread(target=recorder.run)
    thread.start()
    end_s = time.monotonic() + 1.5
    number = 0
    while time.monotonic() < end_s:
        serve(writer, f"r{number}")
        number += 1
        time.sleep(0.005)
    written_s = time.monotonic()
    while len(outcomes(database)) < number and time.monotonic() < written_s + 30:
        time.sleep(0.02)
    waited_s = time.monotonic() - written_s
    assert recorder.stats.commits <= 6  # without gathering, 300 records would be dozens
    recorder.stop()
    thread.join()
    assert len(outcomes(database)) == number
    assert waited_s < 5
    recorder.close()


def test_what_is_left_over_is_taken_at_once(
    journal: Path, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a backlog there is no gathering."""
    monkeypatch.setattr("storage.recorder.MAX_BATCH", 10)
    monkeypatch.setattr("storage.recorder.GATHER_S", 3600.0)
    monkeypatch.setattr("storage.recorder.READ_BYTES", 2048)
    writer = JournalWriter(journal, "w", gateway="g")
    serve(writer, *(f"r{number}" for number in range(200)))
    writer.close()
    recorder = new_recorder(journal, database)
    thread = threading.Thread(target=recorder.run)
    thread.start()
    deadline_s = time.monotonic() + 30
    while (journal / "w").exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    recorder.stop()
    thread.join()
    assert len(outcomes(database)) == 200
    assert recorder.stats.commits > 10
    recorder.close()


@pytest.mark.parametrize("is_usual", [True, False])
def test_begins_are_known_whatever_their_ids_look_like(is_usual: bool, journal: Path, database: sa.Engine) -> None:
    """Those of 36 characters are taken without being decoded, where their end is in sight."""

    def name(number: int) -> str:
        return f"018bcfe5-687d-7000-8000-{number:012}" if is_usual else f"short-{number}"

    writer = JournalWriter(journal, "w", gateway="g")
    recorder = new_recorder(journal, database)
    serve(writer, name(0))
    recorder.step()  # the header is behind us
    writer.begin(begun(name(1)))
    serve(writer, name(2), name(3))
    writer.begin(begun(name(4)))
    assert recorder.step() == 2
    assert recorder._readers["w"].open == {name(1): begun(name(1)), name(4): begun(name(4))}
    writer.end(ended(name(1)))  # begun in an earlier piece
    writer.begin(begun(name(5)))
    assert recorder.step() == 1
    writer.close()
    assert drain(recorder) == 2
    assert outcomes(database) == {
        **{name(number): "ok" for number in (0, 1, 2, 3)},
        **{name(number): "gateway_crash" for number in (4, 5)},
    }
    assert_balanced(journal, database)
    recorder.close()


def test_a_writer_that_records_nothing_is_finished_in_balance(journal: Path, database: sa.Engine) -> None:
    writer = NotRecording(journal, "w")
    recorder = new_recorder(journal, database)
    for name in ("a", "b"):
        writer.begin(begun(name))
    writer.end(ended("a"))
    assert recorder.step() == 0
    assert_balanced(journal, database)
    writer.close()
    assert drain(recorder) == 0
    assert outcomes(database) == {}
    assert (journal / "retired" / "w.counters").exists()
    balance = take_balance(journal, open_sink(database))
    assert (balance.is_balanced, balance.accepted, balance.dropped) == (True, 2, {"off": 2})
    recorder.close()


def test_one_recorder_a_journal(journal: Path, database: sa.Engine) -> None:
    first, second = new_recorder(journal, database), new_recorder(journal, database)
    first.acquire()
    with pytest.raises(BlockingIOError):
        second.acquire()
    second.close()
    first.close()
    second.acquire()
    second.close()


ACTIONS = (
    "begin",
    "end",
    "end",
    "rotate",
    "lose a writer",
    "step",
    "step",
    "restart the recorder",
    "one more writer",
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(ACTIONS), max_size=40))
def test_any_order_of_work_and_deaths_records_each_request_once(actions: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(f"sqlite:///{folder}/b.db")
        upgrade(engine)
        journal = Path(folder) / "journal"
        writers = [JournalWriter(journal, "w0", gateway="g", segment_bytes=700)]
        recorder = new_recorder(journal, engine)
        numbers = iter(range(1000))
        open_names: list[list[str]] = [[]]
        expected: dict[str, str] = {}
        for action in actions:
            if action == "begin":
                name = f"r{next(numbers)}"
                assert writers[-1].begin(begun(name))
                open_names[-1].append(name)
                expected[name] = Outcome.GATEWAY_CRASH.value
            elif action == "end" and open_names[-1]:
                name = open_names[-1].pop(0)
                writers[-1].end(ended(name))
                expected[name] = Outcome.OK.value
            elif action == "rotate":
                assert writers[-1]._rotate()
            elif action == "lose a writer":
                writers.pop().close()  # a kill lets go of the lock as this does; what is open stays open
                open_names.pop()
                if not writers:
                    writers.append(JournalWriter(journal, f"v{next(numbers)}", gateway="g", segment_bytes=700))
                    open_names.append([])
            elif action == "one more writer":
                writers.append(JournalWriter(journal, f"v{next(numbers)}", gateway="g", segment_bytes=700))
                open_names.append([])
            elif action == "step":
                recorder.step()
            elif action == "restart the recorder":
                recorder.close()
                recorder = new_recorder(journal, engine)
            assert_balanced(journal, engine)
        for writer in writers:
            writer.close()
        drain(recorder)
        assert outcomes(engine) == expected
        assert_balanced(journal, engine)
        assert [path.name for path in journal.iterdir()] == ["retired"]
        recorder.close()
        engine.dispose()
