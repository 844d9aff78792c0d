"""Traces out of the database, or from any batches, into a file.

The file appears whole or not at all: it is written beside its place, synced, and renamed over it. Its sidecar
`FILE.json` says what was done, so that a trace that travels alone can still be read years later: the selection, what
Timestamp 0 is, what the format could not say and how often, what each column means. `-` is standard output; that, a
device and a pipe are written straight, and have no sidecar.

Where nothing is asked for, a selection that is exactly one imported data set comes out in the form in which it came
in, so that import and export of a file give the same bytes; anything else is `burstgpt` with the first row's day as
day 0, in UTC.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import importlib.metadata
import itertools
import os
import secrets
import sys
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import polars as pl
import sqlalchemy as sa

from storage.archive import Archive, read_with_archive
from storage.engine import database_errors
from storage.query import Dataset, Filter, conditions, read_batches, read_datasets
from storage.schema import REQUESTS_COMMENTS, requests
from traces.anonymize import Anonymizer
from traces.codec import COLUMNS_6, COLUMNS_8, UNIX_CLOCK, TraceClock, open_writer

Failures = Literal["keep", "drop"]
Stamps = Literal["auto", "int", "float"]

_BURSTGPT_COMMENTS = {
    "Timestamp": "seconds since local midnight of day_zero in timezone",
    "Session ID": "the conversation; empty for API requests",
    "Elapsed time": "submission to last byte, whole seconds",
    "Model": "the model as the client asked for it",
    "Request tokens": "prompt tokens",
    "Response tokens": "output tokens; 0 is a failed request",
    "Total tokens": "request plus response tokens",
    "Log Type": "Conversation log or API log",
}
_PARTIAL = ".partial"
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_HEADERS = {"burstgpt": COLUMNS_8, "burstgpt6": COLUMNS_6}


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did, as its sidecar says it: `rows_in == rows_written + sum(dropped.values())`.

    created_at: ISO 8601, UTC. filters: those parts of the selection that were given. columns: what each one means.
    day_zero, timezone, stamps: None for the formats that carry epoch seconds.
    """

    burstgate_version: str
    created_at: str
    format: str
    day_zero: str | None
    timezone: str | None
    stamps: str | None
    failures: str
    filters: Mapping[str, object]
    rows_in: int
    rows_written: int
    dropped: Mapping[str, int]
    notes: Mapping[str, int]
    columns: Mapping[str, str]
    anonymized: Mapping[str, object] | None = None
    """How, where it was."""


def export(
    engine: sa.Engine,
    path: Path | str | BinaryIO,
    selection: Filter | None = None,
    *,
    format: str | None = None,
    day_zero: datetime.date | None = None,
    timezone: str | None = None,
    failures: Failures = "keep",
    model: str | None = None,
    salt: bytes | None = None,
    stamps: Stamps | None = None,
    archive: Archive | None = None,
    anonymize: Anonymizer | None = None,
    on_rows: Callable[[int], None] = lambda rows_in: None,
) -> ExportReport:
    """Writes the requests that match to `path`, in time order, and a sidecar beside it; an open file has none.

    selection: None is every request. What else is None is the data set's own where all the requests belong to one,
    else as `export_batches` says. A time zone without a day 0 makes that the first row's day in it.
    model: every row's new model. salt: what block ids are made from, None draws one. The gateway's own blocks have no
    known size in tokens, so it is estimated where a format needs it, which the notes say.
    archive: whose rows come along. anonymize: each row's names replaced; the sidecar then names no filter's value.
    on_rows: called with the rows taken so far, after each batch.
    Raises ValueError for an unknown format or time zone, OSError naming the path, DatabaseUnavailable, ArchiveError;
    then neither file is there, or each is what it was.
    """
    chosen = selection or Filter()
    own = _dataset_of(engine, chosen) if archive is None and anonymize is None else None
    if own is not None:
        if timezone is None:
            timezone, day_zero = own.clock.timezone, day_zero or own.clock.day_zero
        if format is None:
            format, stamps = own.format, stamps or own.stamps
    filters = {key: value for key, value in dataclasses.asdict(chosen).items() if value not in (None, ())}
    if anonymize is not None:
        filters = dict.fromkeys(filters, "given")
    elif archive is not None:
        filters["archive"] = archive.shown
    read = read_batches(engine, chosen) if archive is None else read_with_archive(engine, archive, chosen)
    with contextlib.closing(read) as batches:
        return export_batches(
            batches if anonymize is None else map(anonymize, batches),
            path,
            format=format or "burstgpt",
            day_zero=day_zero,
            timezone=timezone or "UTC",
            failures=failures,
            model=model,
            salt=salt,
            stamps=stamps or "auto",
            filters=filters,
            anonymized=None if anonymize is None else anonymize.said,
            on_rows=on_rows,
        )


def export_batches(
    batches: Iterable[pl.DataFrame],
    path: Path | str | BinaryIO,
    *,
    format: str = "burstgpt",
    day_zero: datetime.date | None = None,
    timezone: str = "UTC",
    failures: Failures = "keep",
    model: str | None = None,
    salt: bytes | None = None,
    stamps: Stamps = "auto",
    filters: Mapping[str, object] | None = None,
    anonymized: Mapping[str, object] | None = None,
    on_rows: Callable[[int], None] = lambda rows_in: None,
) -> ExportReport:
    """Writes batches to `path`, in their order, and a sidecar beside it.

    day_zero: None is the local date of the first row. filters, anonymized: for the sidecar, how the batches were made.
    model, salt, on_rows, Raises: as in `export`.
    """
    remaining = iter(batches)
    first = next(remaining, None)
    clock = TraceClock(day_zero or _local_date(first, timezone), timezone)
    with _replacing(path) as files:
        writer = open_writer(files.trace, format=format, clock=clock, failures=failures, stamps=stamps, salt=salt)
        rows_in = 0
        for batch in itertools.chain(() if first is None else (first,), remaining):
            writer.write(batch if model is None else batch.with_columns(model=pl.lit(model)))
            rows_in += batch.height
            on_rows(rows_in)
        written = writer.close()
        header = _HEADERS.get(format)
        spelt = ("float" if format == "burstgpt" else "int") if stamps == "auto" else stamps
        report = ExportReport(
            burstgate_version=importlib.metadata.version("burstgate"),
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            format=format,
            day_zero=clock.day_zero.isoformat() if header else None,
            timezone=clock.timezone if header else None,
            stamps=spelt if header else None,
            failures=failures,
            filters=filters or {},
            rows_in=written.rows_in,
            rows_written=written.rows_written,
            dropped=written.dropped,
            notes=written.notes,
            columns={name: _BURSTGPT_COMMENTS[name] for name in header} if header else REQUESTS_COMMENTS,
            anonymized=anonymized,
        )
        if files.sidecar is not None:
            files.sidecar.write(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return report


def _dataset_of(engine: sa.Engine, selection: Filter) -> Dataset | None:
    """The data set that every selected request belongs to, if there is one."""
    known = read_datasets(engine)
    if not known:
        return None
    wanted = conditions(selection)
    run_ids = sa.select(requests.c.run_id).where(*wanted)
    with database_errors(engine), engine.connect() as connection:
        name = connection.execute(run_ids.order_by(requests.c.received_at).limit(1)).scalar()
        if name not in known:
            return None
        others = run_ids.where(requests.c.run_id.is_distinct_from(name)).limit(1)
        return known[name] if connection.execute(others).first() is None else None


def _local_date(first: pl.DataFrame | None, timezone: str) -> datetime.date:
    """The first row's date in the time zone; 1970-01-01 without rows. Raises ValueError for an unknown time zone."""
    if first is None:
        return UNIX_CLOCK.day_zero
    utc = _EPOCH + datetime.timedelta(seconds=first["received_at"][0])
    TraceClock(UNIX_CLOCK.day_zero, timezone)  # says what is wrong with the name
    return utc.date() if timezone == "UTC" else utc.astimezone(zoneinfo.ZoneInfo(timezone)).date()


@dataclass(frozen=True, slots=True)
class _Files:
    trace: BinaryIO
    sidecar: BinaryIO | None


@contextlib.contextmanager
def _replacing(path: Path | str | BinaryIO) -> Iterator[_Files]:
    """New files for the trace and its sidecar, which take their places together at the end, or leave no mark.

    Raises OSError naming `path`.
    """
    if not isinstance(path, Path | str):
        yield _Files(path, None)
        path.flush()
        return
    if str(path) == "-":
        yield _Files(sys.stdout.buffer, None)
        sys.stdout.buffer.flush()
        return
    target = Path(path).resolve()
    if target.exists() and not target.is_file() and not target.is_dir():  # a device or a pipe is not to be replaced
        with target.open("wb") as device:
            yield _Files(device, None)
        return
    sidecar = target.with_name(target.name + ".json")
    for place in (target, sidecar):
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
    try:
        with _partial(target) as trace, _partial(sidecar) as note:
            yield _Files(trace, note)
            for stream in (trace, note):
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(trace.name, target)
            os.replace(note.name, sidecar)
            _sync_folder(target.parent)
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(_PARTIAL):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[BinaryIO]:
    """A new file beside `target`, removed at the end if it has not been renamed."""
    partial = target.with_name(f".burstgate-{secrets.token_hex(8)}{_PARTIAL}")
    with partial.open("xb") as stream:
        try:
            yield stream
        finally:
            partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the renames in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
