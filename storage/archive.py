"""The archive: a Parquet file for each UTC day, in a folder or an object store, beside the database or instead of it.

    ARCHIVE/manifest.json                          what the archive holds; nothing else counts
    ARCHIVE/requests-YYYY-MM-DD-CONTENT.parquet    the day's rows by (received_at, request_id), each id once

CONTENT is the beginning of the content's hash, so that a file is never written over: a day that gets more rows gets a
new file, then a new manifest, then the old file goes. A file counts once the manifest names it, and the manifest names
it once it has been read back: as many rows, the same content, the same bytes. So a writer that dies at any moment
leaves the archive as it was, or as it should be, and perhaps a file that the next one removes.

The place is a path or any URL that fsspec knows (`s3://` with s3fs, `gs://` with gcsfs). In a folder, files are
written under another name, synced and renamed; an object store shows an upload when it is whole. One database writes an
archive at a time, any number of readers read it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import os
import re
import tempfile
from collections.abc import Collection, Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import polars as pl
import sqlalchemy as sa

from storage.errors import ArchiveError
from storage.query import Filter, matching, read_batches
from storage.schema import partition_bounds_s
from traces import parquet
from traces.batch import SCHEMA
from traces.codec import open_writer

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_MANIFEST: Final = "manifest.json"
_FILE: Final = re.compile(r"requests-\d{4}-\d\d-\d\d-[0-9a-f]{16}\.parquet")
_PART: Final = ".part"
_KEY: Final = ("received_at", "request_id")
_EPOCH: Final = datetime.date(1970, 1, 1)
BATCH_ROWS: Final = 50_000


class ArchivedDay(msgspec.Struct, frozen=True):
    """One day of the archive. sha256: of the file. content_sha256: of its rows, whatever the file's encoding."""

    file: str
    rows: int
    sha256: str
    content_sha256: str
    archived_at: str


class _Manifest(msgspec.Struct, frozen=True):
    days: dict[str, ArchivedDay] = {}
    format: str = "burstgate-archive"
    version: int = 1


def day_text(day: int) -> str:
    """A UTC day counted from 1970-01-01, as YYYY-MM-DD."""
    return (_EPOCH + datetime.timedelta(days=day)).isoformat()


class Archive:
    """One archive. Every method raises ArchiveError, one line that names the place."""

    def __init__(self, url: str) -> None:
        """url: a path, or a URL of fsspec's. Nothing is read yet, nothing is made."""
        import fsspec  # by those who have an archive

        self.shown = re.sub(r"(://)[^/@]*@", r"\1***@", url)
        with self._errors():
            fs, root = fsspec.core.url_to_fs(url)
        self._fs: AbstractFileSystem = fs
        self._root = str(root).rstrip("/")
        self._is_local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)

    def days(self) -> dict[int, ArchivedDay]:
        """What the archive holds, by UTC day counted from 1970-01-01, in order; empty where there is no archive."""
        with self._errors():
            self._fs.invalidate_cache()
            try:
                data = self._fs.cat_file(self._path(_MANIFEST))
            except FileNotFoundError:
                return {}
        try:
            manifest = msgspec.json.decode(data, type=_Manifest)
            if (manifest.format, manifest.version) != ("burstgate-archive", 1):
                raise ValueError(f"format {manifest.format!r} version {manifest.version}")
            days = {(datetime.date.fromisoformat(day) - _EPOCH).days: held for day, held in manifest.days.items()}
        except ValueError as error:
            raise ArchiveError(f"{self.shown}/{_MANIFEST}: expected a manifest of version 1: {error}") from None
        return dict(sorted(days.items()))

    def read(
        self, held: ArchivedDay, *, batch_rows: int = BATCH_ROWS, fields: Collection[str] = SCHEMA.keys()
    ) -> Generator[pl.DataFrame]:
        """A day's rows by (received_at, request_id), in batches. A file that is not here is fetched first, whole."""
        with contextlib.ExitStack() as opened:
            if self._is_local:
                path = Path(self._path(held.file))
                if not path.is_file():
                    raise ArchiveError(f"{self.shown}/{held.file}: the manifest names it, and it is not there")
            else:
                folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="burstgate-archive-"))
                path = Path(folder) / held.file
                with self._errors():
                    self._fs.get_file(self._path(held.file), str(path))
            yield from parquet.read(path, batch_rows=batch_rows, fields=fields)

    def put(self, day: int, batches: Iterable[pl.DataFrame]) -> ArchivedDay:
        """Makes these rows the day's, ordered as above: written, read back, and only then named by the manifest.

        Rows that are there already, and nothing else, change nothing. Raises also what `batches` raises; then the
        archive is as it was.
        """
        with contextlib.ExitStack() as opened:
            folder: str = self._root
            with self._errors():
                if self._is_local:
                    os.makedirs(folder, exist_ok=True)
                else:
                    folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="burstgate-archive-"))
                part = Path(folder) / f"requests-{day_text(day)}{_PART}"
                opened.callback(part.unlink, missing_ok=True)
                content = _Content()
                with part.open("wb") as stream:
                    writer = open_writer(stream, format="parquet")
                    for batch in batches:
                        content.add(batch)
                        writer.write(batch)
                    writer.close()
                    os.fsync(stream.fileno())
                held = ArchivedDay(
                    file=f"requests-{day_text(day)}-{content.sha256()[:16]}.parquet",
                    rows=content.rows,
                    sha256=_file_sha256(part),
                    content_sha256=content.sha256(),
                    archived_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                )
                before = self.days().get(day)
                if before is not None and before.content_sha256 == held.content_sha256:
                    held = before
                elif self._is_local:
                    os.replace(part, self._path(held.file))
                    _sync_folder(folder)
                else:
                    self._fs.put_file(str(part), self._path(held.file))
            self._verify(held)
            if held is not before:
                self._name(day, held)
        return held

    def sweep(self) -> int:
        """Removes what a writer that died has left: files that the manifest does not name. Returns how many."""
        named = {held.file for held in self.days().values()}
        with self._errors():
            if not self._fs.isdir(self._root):
                return 0
            names = {str(path).rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)}
            left = {n for n in names - named if _FILE.fullmatch(n) or (n.startswith("requests-") and n.endswith(_PART))}
            for name in left:
                self._fs.rm_file(self._path(name))
        return len(left)

    def _verify(self, held: ArchivedDay) -> None:
        """Raises ArchiveError unless the file is what was written. What is compared comes from the archive itself."""
        content = _Content()
        for batch in self.read(held):
            content.add(batch)
        if (content.rows, content.sha256()) != (held.rows, held.content_sha256):
            raise ArchiveError(
                f"{self.shown}/{held.file}: read back {content.rows} rows of content {content.sha256()[:16]}, expected"
                f" {held.rows} of {held.content_sha256[:16]}"
            )

    def _name(self, day: int, held: ArchivedDay) -> None:
        """Commits: the manifest with this day, whole in its place."""
        days = self.days()
        before = days.get(day)
        days[day] = held
        manifest = _Manifest({day_text(each): days[each] for each in sorted(days)})
        data = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
        with self._errors():
            if self._is_local:
                part = Path(self._path(_MANIFEST + _PART))
                with part.open("wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(part, self._path(_MANIFEST))
                _sync_folder(self._root)
            else:
                self._fs.pipe_file(self._path(_MANIFEST), data)
            if before is not None and before.file != held.file:
                self._fs.rm_file(self._path(before.file))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever a store's client raises, as one line; errors with a meaning of their own pass."""
        try:
            yield
        except (ArchiveError, FileNotFoundError, sa.exc.SQLAlchemyError):
            raise
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("storage", "traces"):
                raise
            reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__
            raise ArchiveError(f"archive {self.shown}: {reason}") from error


class _Content:
    """Rows and hash of a day's content, however it is cut into batches."""

    def __init__(self) -> None:
        self.rows = 0
        self._hash = hashlib.sha256()

    def add(self, batch: pl.DataFrame) -> None:
        self.rows += batch.height
        self._hash.update(batch.select(list(SCHEMA)).write_ndjson().encode())

    def sha256(self) -> str:
        return self._hash.hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_with_archive(
    engine: sa.Engine, archive: Archive, selection: Filter, *, batch_rows: int = BATCH_ROWS
) -> Generator[pl.DataFrame]:
    """The matching requests of database and archive together, each once, by (received_at, request_id).

    Of a request in both, the database's row counts: it may have learnt since that it began a conversation. The
    database is asked before the manifest is read, so that a day which moves meanwhile is in one of them.
    Raises DatabaseUnavailable, ArchiveError.
    """
    # A row's session and log type may differ between the two, so that they are looked at last.
    early = dataclasses.replace(selection, sessions=(), log_types=())
    with contextlib.closing(read_batches(engine, early, batch_rows=batch_rows)) as recent:
        first = next(recent, None)
        days = [
            held
            for day, held in archive.days().items()
            if (selection.end_s is None or partition_bounds_s(day)[0] < selection.end_s)
            and (selection.start_s is None or partition_bounds_s(day)[1] > selection.start_s)
        ]
        archived = (matching(batch, early) for held in days for batch in archive.read(held, batch_rows=batch_rows))
        newer = _and_then(first, recent)
        for batch in merged(newer, archived):
            found = matching(batch, selection)
            if found.height:
                yield found


def _and_then(first: pl.DataFrame | None, rest: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    if first is not None:
        yield first
        yield from rest


def merged(newer: Iterator[pl.DataFrame], older: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Two streams of batches, each by (received_at, request_id), as one; of a key in both, the row of `newer`.

    Holds a batch of each.
    """
    sides = [_next_rows(newer), _next_rows(older)]
    while sides[0] is not None and sides[1] is not None:
        last = min(_key(sides[0], -1), _key(sides[1], -1))
        heads: list[pl.DataFrame] = []
        for place, stream in enumerate((newer, older)):
            rows = sides[place]
            assert rows is not None
            count = _rows_up_to(rows, last)
            heads.append(rows.head(count))
            sides[place] = rows.slice(count) if count < rows.height else _next_rows(stream)
        both = [head for head in heads if head.height]
        if len(both) == 1:
            yield both[0]
        else:
            yield pl.concat(both).unique(_KEY, keep="first", maintain_order=True).sort(_KEY)
    for rows, stream in zip(sides, (newer, older), strict=True):
        if rows is not None:
            yield rows
            yield from stream


def _next_rows(stream: Iterator[pl.DataFrame]) -> pl.DataFrame | None:
    return next((batch for batch in stream if batch.height), None)


def _key(rows: pl.DataFrame, place: int) -> tuple[float, str]:
    return rows["received_at"][place], rows["request_id"][place]


def _rows_up_to(rows: pl.DataFrame, last: tuple[float, str]) -> int:
    """How many of the sorted rows have a key of at most `last`."""
    at_s, request_id = last
    before = pl.col("received_at") < at_s
    same = (pl.col("received_at") == at_s) & (pl.col("request_id") <= request_id)
    return int(rows.select((before | same).sum()).item())
