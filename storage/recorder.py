"""The recorder: journal in, database out, exactly once.

It reads every writer's segments, commits their records in batches together with how far it has read (one transaction),
and deletes a segment when all of it is committed and a newer one exists. A writer whose lock is free has died or
stopped: after its last frame has been read, a record of outcome `gateway_crash` is made for each request still open,
and the writer is finished: its counters move to `retired/`, its directory goes.

While the database is away nothing is read on: the journal is the buffer, and memory stays flat. After any death of the
recorder the next one reads the surviving segments from their start (to know what is open) and commits what lies behind
the committed offset.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from storage.counters import read_counters, trim_counters
from storage.entries import Begun, Header, crash_record
from storage.frame import HEAD_BYTES, MAX_PAYLOAD_BYTES, decode_frames, find_frame
from storage.journal import DROP_REASONS, RETIRED, SEGMENT_SUFFIX, is_writer_alive, list_directory, writer_directories
from storage.sink import Breathe, SegmentProgress, Sink, SinkUnavailable, WriterTotals, in_turns
from traces.record import TraceRecord

log = logging.getLogger("burstgate.recorder")

READ_BYTES = 1024 * 1024
"""How much of a segment is read at a time; more than the longest frame."""
_LONGEST_FRAME_BYTES = HEAD_BYTES + MAX_PAYLOAD_BYTES
MAX_BATCH = 20_000
"""Records a commit."""
GATHER_S = 0.5
"""While records come in, the time from one commit's start to the next one's: a commit costs as much as 100 rows."""
BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

_begun_decoder = msgspec.msgpack.Decoder(Begun)
_record_decoder = msgspec.msgpack.Decoder(TraceRecord)
_BEGUN_HEAD = b"B%c\xd9\x24" % (0x90 | len(Begun.__struct_fields__))
_ENDED_HEAD = b"E\xdc\x00%c\xd9\x24" % len(TraceRecord.__struct_fields__)
"""How this version's frames start: an array of that many fields, of which the first is a text of 36 bytes, the id."""
_BEGUN_ID = slice(len(_BEGUN_HEAD), len(_BEGUN_HEAD) + 36)
_ENDED_ID = slice(len(_ENDED_HEAD), len(_ENDED_HEAD) + 36)


class JournalCorrupt(Exception):
    """A segment holds frames that this version can not read."""


def open_segments(directory: Path) -> list[int]:
    """The segment numbers of a writer, ascending."""
    numbers = []
    for path in list_directory(directory):
        if path.name.endswith(SEGMENT_SUFFIX):
            with contextlib.suppress(ValueError):
                numbers.append(int(path.name.removesuffix(SEGMENT_SUFFIX)))
    return sorted(numbers)


@dataclass(slots=True)
class SegmentReader:
    """Where one writer's journal has been read to. `read` goes on from there."""

    directory: Path
    committed: dict[int, int]
    """Offsets by segment up to which the database holds the records."""
    breathe: Breathe = lambda: None
    gateway: str = ""
    segment: int = 0
    offset: int = 0
    rest: bytes = b""
    """What lies behind `offset` and is no whole frame: one being written, the torn tail of a dead writer, damage."""
    open: dict[str, Begun] = field(default_factory=dict)
    is_drained: bool = False
    """Everything that was in the segments when last read has been returned."""
    corrupt_bytes: int = 0
    finished_segments: list[int] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The segment being read."""
        return self.directory / f"{self.segment:08d}{SEGMENT_SUFFIX}"

    def read(self, limit: int) -> tuple[list[TraceRecord], list[SegmentProgress]]:
        """At most about `limit` new records, and how far each segment has been read for them.

        Raises JournalCorrupt at a frame that it can not read, once everything before it has been returned.
        """
        records: list[TraceRecord] = []
        progress: list[SegmentProgress] = []
        self.is_drained = False
        while len(records) < limit:
            if self.segment == 0:
                numbers = open_segments(self.directory)
                if not numbers:
                    self.is_drained = True
                    break
                self._enter(numbers[0])
            later = [number for number in open_segments(self.directory) if number > self.segment]
            before = len(records)
            is_readable = True
            try:
                at_end = self._read_some(records, has_later=bool(later))
            except JournalCorrupt:
                if not records:
                    raise
                at_end = is_readable = False
            if len(records) > before or (at_end and later):
                progress.append(SegmentProgress(self.directory.name, self.segment, self.offset, len(records) - before))
            if not is_readable:
                break
            if at_end:
                if not later:
                    self.is_drained = True
                    break
                self.finished_segments.append(self.segment)
                self._enter(later[0])
        return records, progress

    def _enter(self, segment: int) -> None:
        self.segment = segment
        self.offset = 0
        self.rest = b""

    def _read_some(self, records: list[TraceRecord], *, has_later: bool) -> bool:
        """One piece of the segment; True at its present end.

        What is no whole frame is read again the next time: the writer may have cut it off and written another.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(READ_BYTES)
        except FileNotFoundError:
            self.rest = b""
            return True
        payloads, used = decode_frames(data)
        end = self.offset + used
        if payloads and payloads[0].startswith(b"H"):  # as each segment begins
            self._take_one(payloads.pop(0), records)
        if not self._take_pairs(payloads, end, records):
            for some in in_turns(payloads, self.breathe):
                for payload in some:
                    self._take_one(payload, records)
        self.rest = data[used:].rstrip(b"\0")  # a segment is allocated ahead
        at_end = len(data) < READ_BYTES
        if not at_end and not used:  # no frame is that long, and no segment is allocated so far ahead
            self.rest = data
            self.skip_damage(len(data) - _LONGEST_FRAME_BYTES)
        if self.rest and at_end and has_later:
            return not self.skip_damage()
        return at_end

    def skip_damage(self, at_most: int | None = None) -> bool:
        """Nobody writes here any more: step over what is no frame; True when whole frames lie behind."""
        if not self.rest:
            return False
        found = find_frame(self.rest, 1)
        skipped = found or at_most or len(self.rest)
        # Zero bytes are what a power cut leaves of a file's end, and a cut frame is what a crash leaves; neither is
        # a record that was promised. Damage with frames behind it is.
        if found is not None or at_most is not None:
            self.corrupt_bytes += skipped
            log.error("%s: %d damaged bytes at offset %d skipped", self.path, skipped, self.offset)
        self.offset += skipped
        self.rest = b""
        return found is not None

    def _take_pairs(self, payloads: list[bytes], end: int, records: list[TraceRecord]) -> bool:
        """Take frames that are nothing but new B and E; False, with nothing changed, where one needs a closer look.

        Most requests begin and end within a piece. Then what their B says is of no interest, and it is not decoded.
        """
        if self.offset < self.committed.get(self.segment, 0):
            return False
        ends = [payload for payload in payloads if payload.startswith(_ENDED_HEAD)]
        begun = {payload[_BEGUN_ID]: payload for payload in payloads if payload.startswith(_BEGUN_HEAD)}
        if len(ends) + len(begun) != len(payloads):
            return False
        ids = [payload[_ENDED_ID] for payload in ends]
        try:
            closed = [request_id.decode() for request_id in ids if begun.pop(request_id, None) is None]
            opened = {request_id.decode(): _begun_decoder.decode(payload[1:]) for request_id, payload in begun.items()}
            decode = _record_decoder.decode
            ended = [decode(payload[1:]) for some in in_turns(ends, self.breathe) for payload in some]
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        for request_id in closed:
            self.open.pop(request_id, None)
        self.open.update(opened)
        records += ended
        self.offset = end
        return True

    def _take_one(self, payload: bytes, records: list[TraceRecord]) -> None:
        kind = payload[:1]
        end = self.offset + HEAD_BYTES + len(payload)
        try:
            if kind == b"B":
                begun = _begun_decoder.decode(payload[1:])
                self.open[begun.request_id] = begun
            elif kind == b"E":
                record = _record_decoder.decode(payload[1:])
                self.open.pop(record.request_id, None)
                if end > self.committed.get(self.segment, 0):
                    records.append(record)
            elif kind == b"H":
                header = msgspec.json.decode(payload[1:], type=Header)
                self.gateway = header.gateway
                self.open.clear()  # a new segment repeats what is open
            else:
                raise JournalCorrupt(f"{self.path}: unknown frame kind {kind!r}: written by a newer burstgate?")
        except msgspec.DecodeError as error:
            raise JournalCorrupt(
                f"{self.path}: a {kind.decode()} frame that ends at {end} is unreadable: {error}"
            ) from None
        self.offset = end


@dataclass(slots=True)
class RecorderStats:
    """What the recorder has done since it started."""

    recorded: int = 0
    commits: int = 0
    retries: int = 0
    is_database_up: bool = True
    unreadable_writers: int = 0
    """Writers whose journal holds a frame that this version can not read; it is left in place."""
    last_error: str | None = None
    last_commit_s: float | None = None


class Recorder:
    """Moves records until told to stop. One a data directory; `acquire` fails when another runs."""

    def __init__(
        self,
        journal: Path,
        sink_factory: Callable[[], Sink],
        *,
        poll_s: float = 0.2,
        breathe: Breathe = lambda: None,
    ) -> None:
        self._journal = journal
        self._breathe = breathe
        self._sink_factory = sink_factory
        self._poll_s = poll_s
        self._sink: Sink | None = None
        self._readers: dict[str, SegmentReader] = {}
        self._broken: set[str] = set()
        self._stopping = False
        self._stop_asked = os.eventfd(0)
        """Readable for good once `run` is to return: whoever waits then waits no more."""
        self._is_behind = False
        """The last round left something unread."""
        self._lock = -1
        self.stats = RecorderStats()

    def acquire(self) -> None:
        """Take the recorder's lock. Raises BlockingIOError when another recorder holds it, OSError when unwritable."""
        self._journal.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._journal / "recorder.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        self._lock = descriptor

    def stop(self) -> None:
        """Ask `run` to return once everything readable is in the database, or the database is away."""
        self._stopping = True
        if self._stop_asked >= 0:
            os.eventfd_write(self._stop_asked, 1)

    def run(self) -> None:
        """Move records until stopped."""
        failures = 0
        while True:
            stopping = self._stopping
            start_s = time.monotonic()
            try:
                moved = self.step()
                failures = 0
            except SinkUnavailable as error:
                self._note_failure(error, failures)
                if stopping:
                    return
                self._sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
                failures += 1
                continue
            if moved == 0:
                if stopping:
                    return
                self._sleep(self._poll_s)
            elif not self._is_behind:
                self._sleep(start_s + GATHER_S - time.monotonic())

    def _note_failure(self, error: SinkUnavailable, failures: int) -> None:
        self.stats.retries += 1
        self.stats.last_error = str(error)
        if self.stats.is_database_up:
            log.warning("database unavailable, records wait in the journal: %s", error)
        self.stats.is_database_up = False

    def _sleep(self, duration_s: float) -> None:
        asked = select.poll()
        asked.register(self._stop_asked, select.POLLIN)
        asked.poll(max(0.0, duration_s * 1000))

    @property
    def is_pressed(self) -> bool:
        """There is more to move than one round takes, or somebody waits for the end."""
        return self._is_behind or self._stopping

    def close(self) -> None:
        """Close the database and let go of the lock."""
        if self._sink is not None:
            self._sink.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        if self._stop_asked >= 0:
            os.close(self._stop_asked)
            self._stop_asked = -1

    def step(self) -> int:
        """One round over all writers; returns how many records were committed. Raises SinkUnavailable.

        When the database refuses, the readers are thrown away: the next round reads again from the committed offsets.
        """
        try:
            return self._step()
        except SinkUnavailable:
            self._readers.clear()
            if self._sink is not None:
                with contextlib.suppress(SinkUnavailable):
                    self._sink.close()
                self._sink = None
            raise

    def _step(self) -> int:
        if self._sink is None:
            self._sink = self._sink_factory()
        sink = self._sink
        self._refresh_readers(sink)
        alive = {name: is_writer_alive(reader.directory) for name, reader in self._readers.items()}
        records: list[TraceRecord] = []
        progress: list[SegmentProgress] = []
        share = MAX_BATCH // max(1, len(self._readers))
        for name, reader in self._readers.items():
            try:
                more, steps = reader.read(share)
                while reader.is_drained and not alive[name] and reader.skip_damage():
                    extra, further = reader.read(share)
                    more += extra
                    steps += further
            except JournalCorrupt as error:
                self._give_up_on(name, error)
                continue
            records += more
            progress += steps
        for name in self._broken:
            self._readers.pop(name, None)
        self._is_behind = not all(reader.is_drained for reader in self._readers.values())
        finished = [
            name for name, reader in self._readers.items() if not alive[name] and reader.is_drained and not reader.rest
        ]
        totals = []
        for name in finished:
            crashed = [crash_record(begun, self._readers[name].gateway) for begun in self._readers[name].open.values()]
            records += crashed
            # One beyond the end: an offset that does not move counts nothing.
            progress.append(
                SegmentProgress(name, self._readers[name].segment, self._readers[name].offset + 1, len(crashed))
            )
            totals.append(self._final_totals(sink, name, progress))
        if records or progress or totals:
            sink.commit(records, progress, totals)
            self.stats.recorded += len(records)
            self.stats.commits += 1
            self.stats.last_commit_s = time.time()
        if not self.stats.is_database_up:
            log.warning("database available again after %d retries", self.stats.retries)
        self.stats.is_database_up = True
        self.stats.last_error = None
        for name, reader in self._readers.items():
            for segment in reader.finished_segments:
                (reader.directory / f"{segment:08d}{SEGMENT_SUFFIX}").unlink(missing_ok=True)
                sink.forget(name, segment)
            reader.finished_segments.clear()
        for name in finished:
            self._retire(sink, self._readers.pop(name).directory)
        return len(records)

    def _give_up_on(self, name: str, error: JournalCorrupt) -> None:
        log.error("%s (left in place; no more is read of this writer)", error)
        self._broken.add(name)
        self.stats.unreadable_writers = len(self._broken)
        self.stats.last_error = str(error)

    def _refresh_readers(self, sink: Sink) -> None:
        new = [
            d for d in writer_directories(self._journal) if d.name not in self._readers and d.name not in self._broken
        ]
        if not new:
            return
        done = {row.writer_id for row in sink.totals() if row.finished}
        for directory in [d for d in new if d.name in done]:  # the last recorder died between commit and clean-up
            self._retire(sink, directory)
        committed = sink.progress()
        for directory in [d for d in new if d.name not in done]:
            offsets = {segment: offset for (writer, segment), offset in committed.items() if writer == directory.name}
            self._readers[directory.name] = SegmentReader(directory, offsets, self._breathe)

    def _final_totals(self, sink: Sink, name: str, progress: list[SegmentProgress]) -> WriterTotals:
        """The writer's last word: its counters, reconciled with what was recorded.

        A kill between a frame's write and its counter leaves the counter one behind; the frame is the truth.
        """
        reader = self._readers[name]
        try:
            counters = read_counters(reader.directory / "counters")
        except (OSError, ValueError):
            counters = {}
        dropped = {reason: counters.get(f"dropped_{reason}", 0) for reason in DROP_REASONS}
        recorded = sum(step.records for step in progress if step.writer_id == name)
        recorded += sum(row.recorded for row in sink.totals() if row.writer_id == name)
        accepted = max(counters.get("accepted", 0), recorded + sum(dropped.values()))
        if reader.corrupt_bytes:
            dropped["corrupt"] = accepted - recorded - sum(dropped.values())
        return WriterTotals(name, reader.gateway, accepted, dropped, finished=True)

    def _retire(self, sink: Sink, directory: Path) -> None:
        retired = self._journal / RETIRED
        retired.mkdir(exist_ok=True, mode=0o700)
        with contextlib.suppress(FileNotFoundError):
            (directory / "counters").rename(retired / f"{directory.name}.counters")
            with contextlib.suppress(ValueError):  # garbage, which counts nothing
                trim_counters(retired / f"{directory.name}.counters")
        shutil.rmtree(directory, ignore_errors=True)
        sink.forget(directory.name, -1)
