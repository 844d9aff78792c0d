"""Traces as Parquet: a column for each field of the record, by its name and with its type, and no other.

Nothing is lost in either direction. Reading streams and takes columns in any order; those missing get the record's
defaults, so that files older than a field stay readable.

Polars writes a Parquet file from a query, not piece by piece. The writer therefore keeps its row groups as files in a
temporary folder (`tempfile`'s rules say where) and streams them into the real file at the end: memory stays flat, and
the disk holds the trace twice until then.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import polars as pl

from traces.batch import SCHEMA, complete_batch, empty_batch
from traces.codec import (
    BROKEN_PARQUET,
    RECORD_RULES,
    TraceFormatError,
    WriteReport,
    broken_parquet,
    require,
    shown_line,
)
from traces.record import Outcome

ROW_GROUP_ROWS: Final = 131_072
"""Rows of a row group, some tens of MB while polars works on it."""


def read(path: Path, *, batch_rows: int, fields: Collection[str] = SCHEMA.keys()) -> Iterator[pl.DataFrame]:
    """The file's rows as batches of up to `batch_rows` rows in the file's order.

    fields: of the record, which the batches have; the file's other columns are not looked at.
    Raises TraceFormatError when it is no Parquet file, has other columns or types, or a value that a record cannot
    have; the number of the row, from 1, stands for the line.
    """
    try:
        query = pl.scan_parquet(path, glob=False, hive_partitioning=False)
        schema = query.collect_schema()
        _check_schema(schema, path)
        rows = query.select(pl.len()).collect().item()
        query = query.select(name for name in schema if name in fields)
        rules = [rule for rule in RECORD_RULES if rule.column in fields]
        # Slices, not collect_batches: that ran ahead of its reader, to 1.4 GB in a file with row groups of 10^6 rows.
        for first in range(0, rows, batch_rows):
            batch = complete_batch(query.slice(first, batch_rows).collect(), fields)
            require(batch, rules, path, range(first + 1, first + 1 + batch.height))
            yield batch
    except BROKEN_PARQUET as error:
        raise broken_parquet(path, error) from error


def _check_schema(schema: pl.Schema, path: Path) -> None:
    if unknown := sorted(schema.keys() - SCHEMA.keys()):
        raise TraceFormatError(f"{path}: column '{unknown[0]}': expected only fields of a trace record, got this one")
    for name in ("request_id", "received_at"):
        if name not in schema:
            raise TraceFormatError(
                f"{path}: column '{name}': expected in every trace, got {', '.join(schema) or 'none'}"
            )
    for name, dtype in schema.items():
        if not _is_lossless(dtype, SCHEMA[name]):
            raise TraceFormatError(f"{path}: column '{name}': expected the type {SCHEMA[name]}, got {dtype}")


def _is_lossless(dtype: pl.DataType, target: pl.DataType) -> bool:
    """Whether a cast keeps every value or raises: 5.5 must not become 5, nor a datetime a number."""
    if isinstance(dtype, pl.List) and isinstance(target, pl.List):
        return dtype.inner.is_integer()
    if target.is_float():
        return dtype.is_numeric() or dtype == pl.Null
    if target.is_integer():
        return dtype.is_integer() or dtype == pl.Null
    if target == pl.String:
        return dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null)
    return dtype in (target, pl.Null)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Raises OSError for what the operating system refuses polars, TraceFormatError for rows that it refuses itself."""
    try:
        yield
    except BROKEN_PARQUET as error:
        # Polars words what the operating system said; the number is the last thing in it.
        if number := re.search(r"\(os error ([0-9]+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise TraceFormatError(f"expected rows that Parquet can hold, polars says: {shown_line(error)}") from error


class Writer:
    """A `TraceWriter` of Parquet. A writer that is dropped without `close` removes its temporary files."""

    def __init__(self, stream: BinaryIO, *, drop_failures: bool) -> None:
        self._stream = stream
        self._drop_failures = drop_failures
        self._folder = Path(tempfile.mkdtemp(prefix="burstgate-parquet-"))
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._parts: list[Path] = []
        self._held: list[pl.DataFrame] = []
        self._held_rows = 0
        self._rows_in = 0
        self._rows_written = 0

    def write(self, batch: pl.DataFrame) -> None:
        """Append the batch's rows."""
        kept = batch.select(list(SCHEMA))
        if self._drop_failures:
            kept = kept.filter(pl.col("outcome") == Outcome.OK.value)
        self._rows_in += batch.height
        self._rows_written += kept.height
        self._held.append(kept)
        self._held_rows += kept.height
        if self._held_rows >= ROW_GROUP_ROWS:
            self._spill()

    def close(self) -> WriteReport:
        """Put the row groups into the stream and say what was done."""
        try:
            self._spill()
            with writing():
                pl.scan_parquet(self._parts, glob=False, hive_partitioning=False).sink_parquet(
                    self._stream, row_group_size=ROW_GROUP_ROWS
                )
            self._stream.flush()
        finally:
            self._remove()
        dropped = self._rows_in - self._rows_written
        return WriteReport(self._rows_in, self._rows_written, {"failure": dropped} if dropped else {}, {})

    def _spill(self) -> None:
        part = self._folder / f"{len(self._parts)}.parquet"
        with writing():
            pl.concat([empty_batch(), *self._held]).write_parquet(part, compression="lz4")
        self._parts.append(part)
        self._held, self._held_rows = [], 0
