"""Is everything accounted for? `accepted = in database + pruned + in journal + dropped{reason}`, live or stopped.

The terms come from their own places: accepted and dropped from the writers' counters (from the database for writers
that are finished), in journal from reading the segments, in database and pruned from the recorder's committed counts,
of which retention has counted what it took out since. It counts by gateway, the name that its rows carry: where
several installations write under one name into one database, the two terms are right in their sum alone. On a live
gateway they move while they are read, so the check is a bracket: the database is read first, then the journal behind
the committed offsets, and their sum must lie between the begun requests counted before and those counted after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from storage.counters import read_counters
from storage.journal import RETIRED, is_writer_alive, writer_directories
from storage.recorder import JournalCorrupt, SegmentReader
from storage.sink import Sink, WriterRow

_PIECE = 20_000
"""Records read at a time: a journal of many GiB is counted in little memory."""
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Balance:
    """The identity's terms, in requests."""

    accepted: int
    in_database: int
    in_journal: int
    """Recorded ends that are not committed yet, and requests in flight."""
    dropped: Mapping[str, int]
    slack: int
    """How far live counters moved while they were read; 0 when nothing runs."""
    strangers: tuple[str, ...] = ()
    """Writers that finished into another database than the one asked."""
    unreadable: tuple[str, ...] = ()
    """What is wrong with journals that this version can not read to their end."""
    pruned: int = 0
    """Recorded, and taken out of the database since, by retention."""

    @property
    def missing(self) -> int:
        """Requests that are nowhere; negative when something is there twice."""
        there = self.in_database + self.pruned + self.in_journal
        difference = self.accepted - there - sum(self.dropped.values())
        if difference > 0:
            return max(0, difference - self.slack)
        return min(0, difference + self.slack)

    @property
    def is_balanced(self) -> bool:
        """Nothing missing, nothing twice, nothing that can not be told."""
        return self.missing == 0 and not self.strangers and not self.unreadable


@dataclass(frozen=True, slots=True)
class _Count:
    accepted: int
    dropped: Mapping[str, int]


def _count(directory: Path) -> _Count:
    try:
        values = read_counters(directory / "counters")
    except (OSError, ValueError):
        return _Count(0, {})
    dropped = {name.removeprefix("dropped_"): n for name, n in values.items() if name.startswith("dropped_") and n}
    return _Count(values.get("accepted", 0), dropped)


def take_balance(journal: Path, sink: Sink) -> Balance:
    """Read the terms, again while a segment is deleted under the reader. Raises SinkUnavailable, OSError."""
    for _ in range(_TRIES):
        balance = _take_once(journal, sink)
        if balance.is_balanced:
            break
    return balance


def _take_once(journal: Path, sink: Sink) -> Balance:
    directories = {directory.name: directory for directory in writer_directories(journal)}
    retired = {path.name.removesuffix(".counters") for path in (journal / RETIRED).glob("*.counters")}
    before = {name: _count(directory) for name, directory in directories.items()}
    rows, offsets = _committed(sink)
    pruned = sink.pruned()
    gateways = set()
    in_journal = 0
    slack = 0
    unreadable = []
    for name, directory in directories.items():
        row = rows.get(name)
        if row is not None and row.finished:
            continue
        reader = SegmentReader(directory, {s: offset for (writer, s), offset in offsets.items() if writer == name})
        try:
            while not reader.is_drained:
                in_journal += len(reader.read(_PIECE)[0])
        except JournalCorrupt as error:
            unreadable.append(str(error))
        in_journal += len(reader.open)
        gateways.add(reader.gateway)
        slack += 1  # a frame is written before its counter
    after = {name: _count(directory) for name, directory in directories.items()}
    accepted = 0
    dropped: dict[str, int] = {}
    for name in directories:
        row = rows.get(name)
        counts = _finished_count(row) if row is not None and row.finished else after[name]
        accepted += counts.accepted
        slack += max(0, after[name].accepted - before[name].accepted)
        _add(dropped, counts.dropped)
    for name in retired - directories.keys():
        row = rows.get(name)
        if row is not None:
            accepted += row.accepted
            _add(dropped, row.dropped)
    known = [row for name, row in rows.items() if name in directories or name in retired]
    strangers = tuple(sorted(name for name in retired if name not in rows))
    recorded = sum(row.recorded for row in known)
    gone = min(recorded, sum(pruned.get(name, 0) for name in gateways | {row.gateway for row in known} if name))
    return Balance(accepted, recorded - gone, in_journal, dropped, slack, strangers, tuple(unreadable), gone)


def _committed(sink: Sink) -> tuple[dict[str, WriterRow], dict[tuple[str, int], int]]:
    """Recorded counts by writer and the offsets that belong to them: no commit came between the two queries."""
    totals = sink.totals()
    while True:
        offsets = sink.progress()
        again = sink.totals()
        if again == totals:
            return {row.writer_id: row for row in totals}, offsets
        totals = again


def _finished_count(row: WriterRow) -> _Count:
    return _Count(row.accepted, row.dropped)


def _add(total: dict[str, int], more: Mapping[str, int]) -> None:
    for reason, n in more.items():
        if n:
            total[reason] = total.get(reason, 0) + n


def live_writers(journal: Path) -> int:
    """How many writers hold their lock."""
    return sum(is_writer_alive(directory) for directory in writer_directories(journal))
