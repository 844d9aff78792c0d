"""Traces as Parquet: a column for each field of the record, by its name and with its type, and no other.

Nothing is lost in either direction. Reading streams and takes columns in any order; those missing get the record's
defaults, so that files older than a field stay readable.

Writing streams: a row group is encoded and written as soon as its rows are there (traces/row_groups.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final, Literal

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
from traces.row_groups import RowGroups

ROW_GROUP_ROWS: Final = 65_536
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


class Writer:
    """A `TraceWriter` of Parquet.

    compression and statistics: as polars' `write_parquet` takes them. metadata: goes into the file's.
    """

    def __init__(
        self,
        stream: BinaryIO,
        *,
        drop_failures: bool,
        compression: Literal["lz4", "zstd"] = "zstd",
        statistics: bool = True,
        metadata: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._stream = stream
        self._drop_failures = drop_failures
        self._groups = RowGroups(stream, SCHEMA, compression=compression, statistics=statistics, metadata=metadata)
        self._held = empty_batch()
        self._rows_in = 0
        self._rows_written = 0

    def write(self, batch: pl.DataFrame) -> None:
        """Append the batch's rows."""
        kept = batch.select(list(SCHEMA))
        if self._drop_failures:
            kept = kept.filter(pl.col("outcome") == Outcome.OK.value)
        self._rows_in += batch.height
        self._rows_written += kept.height
        self._held = pl.concat([self._held, kept])
        while self._held.height >= ROW_GROUP_ROWS:
            self._write(self._held[:ROW_GROUP_ROWS])
            self._held = self._held[ROW_GROUP_ROWS:]

    def close(self) -> WriteReport:
        """Write what is left and say what was done."""
        if self._held.height:
            self._write(self._held)
        self._groups.close()
        self._stream.flush()
        dropped = self._rows_in - self._rows_written
        return WriteReport(self._rows_in, self._rows_written, {"failure": dropped} if dropped else {}, {})

    def _write(self, rows: pl.DataFrame) -> None:
        try:
            self._groups.write(rows)
        except BROKEN_PARQUET as error:
            raise TraceFormatError(f"expected rows that Parquet can hold, polars says: {shown_line(error)}") from error
