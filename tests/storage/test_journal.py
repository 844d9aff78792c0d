"""The journal's writer, read back by the recorder's reader: what it keeps through rotation, a full disk and a kill."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from storage.counters import read_counters
from storage.entries import Begun, Header, crash_record
from storage.frame import decode_frames, encode_frame
from storage.journal import (
    RESERVE_BYTES,
    VERSION,
    JournalWriter,
    NotRecording,
    directory_bytes,
    is_writer_alive,
    list_directory,
    segment_path,
    writer_directories,
)
from storage.recorder import SegmentReader, open_segments
from traces.record import LogType, Origin, Outcome, TraceRecord

AT_S = 1_700_000_000.25


def begun(number: int) -> Begun:
    return Begun(f"request-{number}", AT_S + number, model="m", endpoint="/v1/chat/completions")


def ended(number: int) -> TraceRecord:
    return TraceRecord(f"request-{number}", AT_S + number, model="m", request_tokens=number, response_tokens=7)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond it: a write to there is cut short, the next one fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[JournalWriter]:
    opened = JournalWriter(tmp_path, "w", gateway="g", segment_bytes=4096)
    yield opened
    opened.close()


def read_back(directory: Path) -> tuple[list[TraceRecord], set[str]]:
    """All records, and the ids of the requests that are open."""
    reader = SegmentReader(directory, {})
    records, _ = reader.read(1 << 30)
    assert reader.rest == b""
    return records, set(reader.open)


def test_what_is_written_is_read(writer: JournalWriter) -> None:
    for number in range(3):
        assert writer.begin(begun(number))
    writer.end(ended(1))
    assert read_back(writer.directory) == ([ended(1)], {"request-0", "request-2"})
    assert writer.open_requests == 2
    counters = read_counters(writer.directory / "counters")
    size = segment_path(writer.directory, 1).stat().st_size
    assert (counters["accepted"], counters["ended"], counters["dropped_budget"], counters["dropped_io"]) == (3, 1, 0, 0)
    assert 0 < counters["journal_bytes"] < size


def test_a_segment_begins_with_what_it_is(writer: JournalWriter) -> None:
    payloads, _ = decode_frames(segment_path(writer.directory, 1).read_bytes())
    header = msgspec.json.decode(payloads[0][1:], type=Header)
    assert payloads[0][:1] == b"H"
    assert (header.format, header.version, header.writer, header.gateway, header.segment) == (
        *("burstgate-journal", VERSION, "w", "g", 1),
    )
    assert header.record_fields == TraceRecord.__struct_fields__
    assert header.begun_fields == Begun.__struct_fields__


def test_every_segment_can_go_alone(writer: JournalWriter) -> None:
    """Rotation repeats what is open, so that the newest segment alone knows it."""
    writer.begin(begun(-1))
    for number in range(100):
        writer.begin(begun(number))
        writer.end(ended(number))
    segments = open_segments(writer.directory)
    assert len(segments) > 2
    assert read_back(writer.directory) == ([ended(number) for number in range(100)], {"request--1"})
    for segment in segments[:-1]:
        segment_path(writer.directory, segment).unlink()
    assert read_back(writer.directory)[1] == {"request--1"}
    assert [path.name for path in list_directory(writer.directory) if path.suffix == ".new"] == []


def test_the_crash_record_says_what_was_known() -> None:
    start = Begun(
        "id", AT_S, "s", "m", LogType.CONVERSATION, "c", "/v1/x", True, 9, Origin.REPLAY, "run", "tenant"
    )  # fmt: skip
    record = crash_record(start, "g")
    assert record.outcome is Outcome.GATEWAY_CRASH
    assert record.gateway == "g"
    assert (record.response_tokens, record.status, record.elapsed_s) == (None, None, None)
    for name in Begun.__struct_fields__:
        assert getattr(record, name) == getattr(start, name)


def test_a_writer_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / ".making").mkdir()
    (tmp_path / "retired").mkdir()
    (tmp_path / "recorder.lock").touch()
    assert list(writer_directories(tmp_path)) == []
    writer = JournalWriter(tmp_path, "w", gateway="g")
    assert list(writer_directories(tmp_path)) == [tmp_path / "w"]
    assert is_writer_alive(tmp_path / "w")
    assert open_segments(tmp_path / "w") == [1]
    writer.close()
    assert not is_writer_alive(tmp_path / "w")
    assert not is_writer_alive(tmp_path / "gone")


@pytest.mark.parametrize("spare_bytes", [0, 100, 5_000])
def test_the_budget_drops_and_counts_and_what_is_open_still_ends(spare_bytes: int, tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, "w", gateway="g", budget_bytes=RESERVE_BYTES + 3_000 + spare_bytes)
    accepted = [number for number in range(200) if writer.begin(begun(number))]
    assert accepted == list(range(len(accepted)))
    assert 0 < len(accepted) < 200
    for number in accepted:
        writer.end(ended(number))
    counters = read_counters(writer.directory / "counters")
    assert (counters["accepted"], counters["ended"]) == (200, len(accepted))
    assert (counters["dropped_budget"], counters["dropped_io"]) == (200 - len(accepted), 0)
    assert read_back(writer.directory) == ([ended(number) for number in accepted], set())
    writer.close()


def test_a_full_budget_leaves_its_segment_so_that_it_can_be_deleted(tmp_path: Path) -> None:
    """The recorder deletes only what is behind the newest segment: a budget of less than one must not end for good."""
    writer = JournalWriter(tmp_path, "w", gateway="g", segment_bytes=1 << 20, budget_bytes=16_384)
    number = 0
    while writer.begin(begun(number)):
        writer.end(ended(number))
        number += 1
    for _ in range(50):
        assert not writer.begin(begun(-1))
    assert open_segments(writer.directory) == [1, 2]
    segment_path(writer.directory, 1).unlink()  # as the recorder does
    writer.refresh_budget()
    assert writer.begin(begun(number))
    writer.close()


def test_a_budget_of_nothing_journals_nothing(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, "w", gateway="g", budget_bytes=0)
    assert [writer.begin(begun(number)) for number in range(10)] == [False] * 10
    assert open_segments(writer.directory) == [1]
    assert read_back(writer.directory) == ([], set())
    writer.close()


def test_what_a_full_disk_refuses_leaves_no_trace_and_ends_are_written_later(writer: JournalWriter) -> None:
    for number in range(4):
        writer.begin(begun(number))
    writer.end(ended(0))
    path = segment_path(writer.directory, 1)
    before = path.read_bytes().rstrip(b"\0")
    allocated = path.stat().st_size
    with file_size_limit(allocated):
        begins = 0
        while writer.begin(begun(9 + begins)):
            begins += 1
        full = path.read_bytes()
        assert len(full) == allocated
        assert full.startswith(before)
        assert begins  # what had been allocated is used
        assert not full[-20:].rstrip(b"\0")  # and nothing of the frame that did not fit
        writer.end(ended(1))
        writer.end(ended(2))
        writer.retry_unwritten()
        assert path.read_bytes() == full
        counters = read_counters(writer.directory / "counters")
        assert (counters["dropped_io"], counters["journal_unwritten"], counters["ended"]) == (1, 2, 3)
    writer.end(ended(3))  # in its turn, behind those that wait
    others = {f"request-{9 + number}" for number in range(begins)}
    assert read_back(writer.directory) == ([ended(0)], {"request-1", "request-2", "request-3"} | others)
    writer.retry_unwritten()
    assert read_back(writer.directory) == ([ended(0), ended(1), ended(2), ended(3)], others)
    assert read_counters(writer.directory / "counters")["journal_unwritten"] == 0


def test_a_disk_with_little_room_is_used_to_the_end(writer: JournalWriter) -> None:
    path = segment_path(writer.directory, 1)
    room = path.stat().st_size + 1000
    with file_size_limit(room):
        begins = 0
        while writer.begin(begun(begins)):
            begins += 1
    assert room - path.stat().st_size < 100
    assert read_back(writer.directory) == ([], {f"request-{number}" for number in range(begins)})


def test_a_segment_is_cut_to_its_size_when_it_is_left(writer: JournalWriter) -> None:
    number = 0
    while open_segments(writer.directory) == [1]:
        writer.begin(begun(number))
        writer.end(ended(number))
        number += 1
    data = segment_path(writer.directory, 1).read_bytes()
    assert decode_frames(data)[1] == len(data)
    writer.close()
    data = segment_path(writer.directory, 2).read_bytes()
    assert decode_frames(data)[1] == len(data)


def test_where_blocks_can_not_be_allocated_zeros_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    writer = JournalWriter(tmp_path, "w", gateway="g", segment_bytes=4096)
    for number in range(100):
        assert writer.begin(begun(number))
        writer.end(ended(number))
    with file_size_limit(100):
        assert not writer._rotate()
    path = segment_path(writer.directory, open_segments(writer.directory)[-1])
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    writer.close()
    assert read_back(writer.directory) == ([ended(number) for number in range(100)], set())


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """No file can be opened, as where a gateway's connections use up its limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_no_segment_can_be_started_the_present_one_grows(writer: JournalWriter) -> None:
    with no_descriptors():
        for number in range(100):
            assert writer.begin(begun(number))
            writer.end(ended(number))
    assert open_segments(writer.directory) == [1]
    writer.begin(begun(100))
    writer.end(ended(100))
    assert open_segments(writer.directory) == [1, 2]
    assert read_back(writer.directory) == ([ended(number) for number in range(101)], set())
    counters = read_counters(writer.directory / "counters")
    assert (counters["dropped_io"], counters["journal_unwritten"]) == (0, 0)


def test_a_disk_that_fills_up_leaves_no_draft_of_a_segment(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, "w", gateway="g", budget_bytes=0)
    with file_size_limit(100):  # a header does not fit
        assert not writer._rotate()
    assert [path.name for path in sorted(writer.directory.iterdir())] == ["00000001.seg", "counters", "lock"]
    writer.close()


def test_close_writes_what_waits_and_lets_go(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, "w", gateway="g")
    writer.begin(begun(1))
    with file_size_limit(segment_path(writer.directory, 1).stat().st_size):
        writer.end(ended(1))
    writer.close()
    assert read_back(tmp_path / "w") == ([ended(1)], set())
    assert not is_writer_alive(tmp_path / "w")


def _write_until_killed(journal: Path, ready: int) -> None:
    writer = JournalWriter(journal, "w", gateway="g", segment_bytes=4096)
    for number in range(1_000_000):
        writer.begin(begun(number))
        writer.end(ended(number))
        if number == 200:
            os.write(ready, b"r")


def test_a_killed_writer_leaves_whole_records_in_their_order(tmp_path: Path) -> None:
    reading, ready = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(tmp_path, ready))
    process.start()
    os.read(reading, 1)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    os.close(reading)
    os.close(ready)
    reader = SegmentReader(tmp_path / "w", {})
    records, _ = reader.read(1 << 30)
    assert [record.request_id for record in records] == [f"request-{number}" for number in range(len(records))]
    counters = read_counters(tmp_path / "w" / "counters")
    assert 0 <= len(records) - counters["ended"] + 1 <= 1  # `ended` is counted first, then written
    assert len(reader.open) <= 1
    assert not is_writer_alive(tmp_path / "w")


def test_the_size_of_a_journal_that_changes_under_the_reader(tmp_path: Path) -> None:
    assert directory_bytes(tmp_path / "nowhere") == 0
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "00000001.seg").write_bytes(encode_frame(b"x"))
    (tmp_path / "a" / "counters").write_bytes(bytes(100))
    (tmp_path / "a" / "dangling.seg").symlink_to("gone")
    (tmp_path / "file").write_bytes(bytes(100))
    assert directory_bytes(tmp_path) == 9


def test_sync_closes_the_segments_that_were_left(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, "w", gateway="g", segment_bytes=1)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        writer.begin(begun(number))
        writer.end(ended(number))
    assert len(os.listdir("/proc/self/fd")) == before + 20
    writer.sync()
    assert len(os.listdir("/proc/self/fd")) == before
    writer.close()


def test_a_writer_that_records_nothing_counts_all_the_same(tmp_path: Path) -> None:
    writer = NotRecording(tmp_path, "w", counter_names=("mine",))
    assert list(writer_directories(tmp_path)) == [tmp_path / "w"]
    assert is_writer_alive(tmp_path / "w")
    for number in range(3):
        assert writer.begin(begun(number))
    writer.end(ended(1))
    writer.slots[-1] += 5
    writer.sync()
    writer.retry_unwritten()
    writer.refresh_budget()
    assert writer.open_requests == 2
    counters = read_counters(tmp_path / "w" / "counters")
    counted = {name: count for name, count in counters.items() if count}
    assert counted == {"accepted": 3, "ended": 1, "dropped_off": 3, "mine": 5}
    assert directory_bytes(tmp_path) == 0
    assert read_back(writer.directory) == ([], set())
    writer.close()
    writer.close()
    assert not is_writer_alive(tmp_path / "w")


@pytest.mark.parametrize("kind", [JournalWriter, NotRecording])
def test_a_writer_that_can_not_start_leaves_nothing(kind: type[JournalWriter | NotRecording], tmp_path: Path) -> None:
    with file_size_limit(100), pytest.raises(OSError):
        _ = JournalWriter(tmp_path, "w", gateway="g") if kind is JournalWriter else NotRecording(tmp_path, "w")
    assert list_directory(tmp_path) == []
