"""Trace files into the database.

A file is imported whole or not at all: its rows go in within one transaction, so that a wrong line near the end leaves
nothing behind (on PostgreSQL but for empty day partitions), and what was recorded before stays as it was. Ids of
BurstGPT rows come from the data set's name and the row, so that importing the same file again inserts nothing.

A BurstGPT file becomes a data set: its rows carry `origin` imported and its name as `run_id`, and `datasets` keeps what
an export needs to write the same file again. Parquet and JSONL carry whole records, which come back as they were
recorded; they become a data set only when they are given a name.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import sqlalchemy as sa

from storage.engine import database_errors
from storage.query import read_datasets
from storage.sink import Row, Transaction, transaction
from traces.codec import UNIX_CLOCK, TraceClock, read_trace, sniff
from traces.record import Origin

_WHOLE_RECORDS = ("parquet", "jsonl")


class DatasetConflict(ValueError):
    """The name belongs to a data set that holds other rows than the file; choose another name."""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did: `rows_read == rows_inserted + rows_already_there`.

    dataset: the name that selects the rows (`run_id`); None for records that came back as they were.
    """

    rows_read: int
    rows_inserted: int
    rows_already_there: int
    format: str
    dataset: str | None


def import_trace(
    engine: sa.Engine,
    path: Path,
    *,
    dataset: str | None = None,
    format: str | None = None,
    clock: TraceClock = UNIX_CLOCK,
    on_rows: Callable[[int], None] = lambda rows_read: None,
) -> ImportReport:
    """Imports a trace file whole, in one transaction; a file that is there already inserts nothing.

    dataset: the data set's name; None is the file's name without its suffix, or no data set for Parquet and JSONL.
    format: one of FORMATS; None finds it out. clock: what BurstGPT's Timestamp 0 is.
    on_rows: called with the rows read so far, after each batch.
    Raises TraceFormatError naming file, line and column, DatasetConflict, OSError, DatabaseUnavailable; then nothing
    was inserted.
    """
    known_format = sniff(path) if format is None else format
    name = path.stem if dataset is None and known_format not in _WHOLE_RECORDS else dataset
    batches = read_trace(path, format=known_format, clock=clock, dataset=name)
    known = read_datasets(engine).get(name) if name is not None else None
    rows_read = rows_inserted = 0
    with database_errors(engine), transaction(engine) as active:
        for batch in batches:
            rows_inserted += active.insert(_rows_of(batch, name))
            rows_read += batch.height
            on_rows(rows_read)
        already_there = rows_read - rows_inserted
        if name is not None:
            # A file that grew holds all rows that were there; one that lacks some of them is another file.
            if known is not None and rows_inserted and already_there < known.rows:
                raise DatasetConflict(
                    f"{path}: data set {name!r} holds {known.rows} rows of which this file has {already_there}:"
                    " expected the same file and clock, or another name"
                )
            if known is None or rows_inserted:
                _save_dataset(active, name, known_format, clock, rows_read)
    return ImportReport(rows_read, rows_inserted, already_there, known_format, name)


def _rows_of(batch: pl.DataFrame, dataset: str | None) -> list[Row]:
    """The batch as rows of `requests`; text loses its NULs, which PostgreSQL cannot hold."""
    frame = batch.with_columns(
        pl.col(pl.String).str.replace_all("\0", "\N{REPLACEMENT CHARACTER}", literal=True),
        pl.Series("prefix_blocks", _packed(batch["prefix_blocks"]), dtype=pl.Binary()),
    )
    if dataset is not None:
        frame = frame.with_columns(origin=pl.lit(Origin.IMPORTED.value), run_id=pl.lit(dataset))
    return frame.rows()


def _packed(blocks: pl.Series) -> list[bytes | None]:
    if blocks.null_count() == len(blocks):
        return [None] * len(blocks)
    return [None if each is None else np.asarray(each, dtype="<u8").tobytes() for each in blocks.to_list()]


def _save_dataset(active: Transaction, name: str, format: str, clock: TraceClock, rows: int) -> None:
    stamps = "int" if format == "burstgpt6" else "float"
    active.execute(
        'INSERT INTO datasets (name, format, day_zero, timezone, stamps, "rows", imported_at)'
        " VALUES (?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (name)"
        ' DO UPDATE SET format = excluded.format, stamps = excluded.stamps, "rows" = excluded."rows"',
        (name, format, clock.day_zero.isoformat(), clock.timezone, stamps, rows, time.time()),
    )
