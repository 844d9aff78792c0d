"""The journal: where a request's record is safe before its client has the last byte.

Layout of `DATA_DIR/journal/`:

    WRITER/lock             held with flock(2) while the writer lives; the kernel lets go of it however the writer dies
    WRITER/counters         see storage/counters.py
    WRITER/00000001.seg     segments, frames as in storage/frame.py, one writer, append only; each appears by a rename,
                            with its header and every open B in it
    retired/WRITER.counters the counters of writers whose every record is in the database

WRITER is a UUIDv7, new for every process that writes. A frame's payload is one kind byte and a body:

    H  header, JSON, first frame of a segment: format, version, writer, gateway, segment, created_at, field names
    B  begun, MessagePack array in the order of `Begun`: a request was accepted
    E  ended, MessagePack array in the order of `traces.record.TraceRecord`: its one record

Rules: every B is followed, in the same or a later segment, by one E with the same request id, unless the writer died;
then the recorder writes that request's record, outcome `gateway_crash`. A new segment repeats the B of every request
still open, so that each segment can be deleted as soon as its own records are in the database.

Appending is a copy into a shared memory map of the segment: as write(2) does, it leaves the bytes with the kernel, so
they survive any death of the process, and it costs no system call; `sync()` once a second bounds what a power cut
takes. The map goes ahead of the frames by `WINDOW_BYTES` at most, over blocks that were allocated before
(posix_fallocate): a full disk is met there, as an error, and not in the map, as a signal. Behind the last frame a
segment is zeros until it is cut to its size.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec

from storage.counters import Counters, slot_count
from storage.entries import Begun, Header
from storage.frame import encode_frame
from traces.record import TraceRecord

VERSION = 1
SEGMENT_SUFFIX = ".seg"
RETIRED = "retired"
MAX_UNWRITTEN = 10_000
"""Records kept in memory while the disk refuses them. Beyond it an end is lost: its request, begun in the journal, is
recorded as `gateway_crash` when the writer has gone."""
WINDOW_BYTES = 256 * 1024
"""Of a segment, what is allocated and mapped at a time. The recorder reads more than that at a time."""
RESERVE_BYTES = 2048
"""What a request must find free in the budget to be accepted, so that its end finds room too."""


JOURNAL_COUNTERS = (
    "accepted", "ended", "dropped_budget", "dropped_io", "journal_bytes", "journal_unwritten", "dropped_off",
)  # fmt: skip
"""Slots that the journal keeps, in this order, before those of its owner.

accepted: requests begun, journaled or dropped. ended: requests whose end is in the journal or in memory to be written.
dropped_*: requests of which nothing is recorded, by reason (off: recording is switched off). journal_bytes: bytes
appended. journal_unwritten (a gauge): ends that wait in memory because the disk refused them.
"""
_ACCEPTED, _ENDED, _BUDGET, _IO, _BYTES, _UNWRITTEN, _OFF = range(len(JOURNAL_COUNTERS))
DROP_REASONS = tuple(name.removeprefix("dropped_") for name in JOURNAL_COUNTERS if name.startswith("dropped_"))
"""Why a request is not recorded; a counter each."""


def segment_path(directory: Path, segment: int) -> Path:
    """The file of a writer's segment."""
    return directory / f"{segment:08d}{SEGMENT_SUFFIX}"


def directory_bytes(journal: Path) -> int:
    """The size of all segments of all writers."""
    total = 0
    for writer in list_directory(journal):
        for path in list_directory(writer):
            if path.name.endswith(SEGMENT_SUFFIX):
                with contextlib.suppress(OSError):
                    total += path.stat().st_size
    return total


def list_directory(path: Path) -> list[Path]:
    """What is in a directory; nothing when it is none, or no more: the recorder removes those of dead writers."""
    try:
        return list(path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def writer_directories(journal: Path) -> Iterator[Path]:
    """The directories of all writers, oldest first."""
    for path in sorted(list_directory(journal)):
        if path.is_dir() and path.name != RETIRED and not path.name.startswith("."):
            yield path


def is_writer_alive(directory: Path) -> bool:
    """Whether the writer's process still holds its lock."""
    try:
        descriptor = os.open(directory / "lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, size: int, more: int) -> None:
    """Allocate what a file is to grow by. Raises OSError, ENOSPC among others.

    Where the file system can not allocate ahead, and the C library does not stand in for it, zeros are written.
    """
    try:
        os.posix_fallocate(descriptor, size, more)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        if os.pwrite(descriptor, bytes(more), size) != more:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


class Unrecorded:
    """Stands in for a journal that can not be opened because the disk is full: requests go on, dropped and counted."""

    def __init__(self, counter_names: tuple[str, ...] = ()) -> None:
        self.slots = memoryview(bytearray(8 * slot_count(JOURNAL_COUNTERS + counter_names))).cast("Q")

    def begin(self, begun: Begun) -> bool:
        """Nothing is kept of it."""
        self.slots[_IO] += 1
        self.slots[_ACCEPTED] += 1
        return False

    def end(self, record: TraceRecord) -> None:
        """Never called: every `begin` was refused."""

    def close(self) -> None:
        """Nothing is open."""


@contextlib.contextmanager
def _new_writer(journal: Path, writer_id: str, counter_names: tuple[str, ...]) -> Iterator[tuple[Path, int, Counters]]:
    """A new writer's directory, its lock and its counters. Raises OSError; then nothing is left behind.

    Made under a hidden name and renamed at the end: whoever sees a writer's directory sees it locked and whole.
    """
    directory = journal / f".{writer_id}"
    directory.mkdir(parents=True, mode=0o700)
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        undo.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        counters = Counters(directory / "counters", JOURNAL_COUNTERS + counter_names)
        undo.callback(counters.close)
        yield directory, lock, counters
        directory.rename(journal / writer_id)
        undo.pop_all()


class NotRecording:
    """A writer that only counts, where recording is switched off: no segments, no records, the same metrics.

    Its requests are accepted, dropped for the reason `off`, and ended. The interface is `JournalWriter`'s.
    """

    def __init__(self, journal: Path, writer_id: str, *, counter_names: tuple[str, ...] = ()) -> None:
        """Create the writer's directory. Raises OSError; then nothing is left behind."""
        self.writer_id = writer_id
        self.directory = journal / writer_id
        with _new_writer(journal, writer_id, counter_names) as (_, self._lock, self.counters):
            self.slots = self.counters.slots
        self.open_requests = 0
        """Requests begun and not ended."""

    def begin(self, begun: Begun) -> bool:
        """Count a request."""
        self.slots[_ACCEPTED] += 1
        self.slots[_OFF] += 1
        self.open_requests += 1
        return True

    def end(self, record: TraceRecord) -> None:
        """Count its end."""
        self.slots[_ENDED] += 1
        self.open_requests -= 1

    def retry_unwritten(self) -> None:
        """Nothing waits."""

    def refresh_budget(self) -> None:
        """Nothing is used."""

    def sync(self) -> None:
        """Nothing was appended."""

    def close(self) -> None:
        """Let go of the lock: the recorder may finish this writer. Again is without effect."""
        if self._lock >= 0:
            self.counters.close()
            os.close(self._lock)
            self._lock = -1


class JournalWriter:
    """One process's journal. All methods but `sync` are for one thread; none waits for the disk.

    budget_bytes is for the whole journal directory: `refresh_budget()`, about once a second, measures what is left.
    """

    def __init__(
        self,
        journal: Path,
        writer_id: str,
        *,
        gateway: str,
        counter_names: tuple[str, ...] = (),
        segment_bytes: int = 16 * 1024 * 1024,
        budget_bytes: int = 10 * 1024**3,
        taking_over: Unrecorded | None = None,
    ) -> None:
        """Create the writer's directory and first segment; go on from the counts of `taking_over`.

        Raises OSError; then nothing is left behind.
        """
        self.writer_id = writer_id
        self._journal = journal
        self._gateway = gateway
        self._segment_bytes = segment_bytes
        self._window_bytes = min(WINDOW_BYTES, segment_bytes)
        self._budget_bytes = budget_bytes
        self._allowance_bytes = 0
        self._open: dict[str, bytes] = {}
        self._unwritten: deque[tuple[str, bytes]] = deque()
        self._retired: deque[int] = deque()
        self._encoder = msgspec.msgpack.Encoder()
        self._segment = 0
        self._fd = -1
        self._map: mmap.mmap | None = None
        self._mapped_bytes = 0
        self._size = self._first_size = 0
        """Up to the end of the last frame, and what that was when the segment was new."""
        with _new_writer(journal, writer_id, counter_names) as (self.directory, self._lock, self.counters):
            self._slots = self.counters.slots
            self._start_segment()
            if taking_over is not None:
                self._slots[:] = taking_over.slots
        self.directory = journal / writer_id
        self.refresh_budget()

    def begin(self, begun: Begun) -> bool:
        """Accept a request. False: its record is dropped and counted, and `end` must not be called for it."""
        frame = encode_frame(b"B" + self._encoder.encode(begun))
        if self._allowance_bytes < RESERVE_BYTES + len(frame):
            # The recorder deletes only what is behind the newest segment, so a full budget must not end within it.
            if self._size > self._first_size:
                self._rotate()
            self._slots[_BUDGET] += 1
            self._slots[_ACCEPTED] += 1
            return False
        if not self._append(frame):
            self._slots[_IO] += 1
            self._slots[_ACCEPTED] += 1
            return False
        self._open[begun.request_id] = frame
        self._slots[_ACCEPTED] += 1
        return True

    def end(self, record: TraceRecord) -> None:
        """The request's one record. When this returns it survives the process (unless the disk refuses it)."""
        frame = encode_frame(b"E" + self._encoder.encode(record))
        self._slots[_ENDED] += 1
        if self._unwritten or not self._append(frame):
            if len(self._unwritten) < MAX_UNWRITTEN:
                self._unwritten.append((record.request_id, frame))
                self._slots[_UNWRITTEN] = len(self._unwritten)
            return
        self._open.pop(record.request_id, None)
        if self._size >= self._segment_bytes:
            self._rotate()

    def _append(self, frame: bytes) -> bool:
        start = self._size
        end = start + len(frame)
        if end > self._mapped_bytes and not self._map_on(end):
            return False
        assert self._map is not None
        self._map[start:end] = frame
        self._size = end
        self._allowance_bytes -= len(frame)
        self._slots[_BYTES] += len(frame)
        return True

    def _map_on(self, needed: int) -> bool:
        """Map more of the segment, up to there at least; False where the disk has no room."""
        assert self._map is not None
        mapped = self._mapped_bytes
        for size in (max(mapped + self._window_bytes, needed), needed):
            try:
                _allocate(self._fd, mapped, size - mapped)
                self._map.resize(size)
            except OSError:
                continue
            self._mapped_bytes = size
            # What has been written is the kernel's business: out of this process' memory with it.
            self._map.madvise(mmap.MADV_DONTNEED, 0, self._size - self._size % mmap.PAGESIZE)
            return True
        return False

    def _rotate(self) -> bool:
        """Go on in a new segment; False where none can be made, and the present one must do."""
        try:
            self._start_segment()
        except OSError:
            return False
        return True

    def _start_segment(self) -> None:
        segment = self._segment + 1
        header = Header(
            "burstgate-journal",
            VERSION,
            self.writer_id,
            self._gateway,
            segment,
            time.time(),
            Begun.__struct_fields__,
            TraceRecord.__struct_fields__,
        )
        data = encode_frame(b"H" + msgspec.json.encode(header)) + b"".join(self._open.values())
        path = segment_path(self.directory, segment)
        draft = path.with_suffix(".new")
        length = len(data) + self._window_bytes
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _allocate(descriptor, 0, length)
            new = mmap.mmap(descriptor, length)
            new[: len(data)] = data
            draft.rename(path)
        except OSError:
            os.close(descriptor)
            draft.unlink(missing_ok=True)
            raise
        self._leave_segment()
        self._fd = descriptor
        self._segment = segment
        self._map, self._mapped_bytes = new, length
        self._size = self._first_size = len(data)
        self._allowance_bytes -= len(data)

    def _leave_segment(self) -> None:
        """Cut the present segment, if any, to its size; `sync` closes it."""
        if self._map is None:
            return
        self._map.close()
        self._map = None
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self._size)
        self._retired.append(self._fd)

    def retry_unwritten(self) -> None:
        """Write the ends that the disk refused before."""
        while self._unwritten:
            request_id, frame = self._unwritten[0]
            if not self._append(frame):
                break
            self._unwritten.popleft()
            self._open.pop(request_id, None)
        self._slots[_UNWRITTEN] = len(self._unwritten)

    def refresh_budget(self) -> None:
        """Measure what the budget leaves; what this writer has allocated and not used is not spent."""
        unused = self._mapped_bytes - self._size
        self._allowance_bytes = self._budget_bytes - directory_bytes(self._journal) + unused

    def sync(self) -> None:
        """fdatasync what was appended. May run in another thread."""
        if self._map is not None:
            with contextlib.suppress(OSError):
                os.fdatasync(self._fd)
        while self._retired:
            descriptor = self._retired.popleft()
            with contextlib.suppress(OSError):
                os.fdatasync(descriptor)
            os.close(descriptor)

    @property
    def slots(self) -> memoryview:
        """The counters' slots, the journal's own first."""
        return self._slots

    @property
    def open_requests(self) -> int:
        """Requests begun and not ended."""
        return len(self._open)

    def close(self) -> None:
        """Sync and let go of the lock: the recorder may finish this writer. Again is without effect."""
        if self._map is None:
            return
        self.retry_unwritten()
        self._leave_segment()
        self.sync()
        self.counters.close()
        os.close(self._lock)
