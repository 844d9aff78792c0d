"""One trace file into another: `burstgate convert`.

    read -> relabel -> write under a temporary name -> read back and compare -> rename

Memory is flat: batches stream through. The next ones are read on a thread of their own, what is written is taken
account of on another, and the disk takes the file while it is read back. Of a Parquet file that becomes a BurstGPT one,
only the columns that this has are read. The rows reconcile: read = kept + dropped by reason, and as many are in the
file that was written. That file is then read back and compared
with what was to be written, column by column in the columns that its format can say, through a digest of every value
and its place; only then does it get its name. A failure of any kind leaves what was at the target as it was.

What is compared: Parquet and JSONL, every field. BurstGPT, all its columns, parsed by polars' own CSV reader unless a
field is quoted. The others: time, tokens, and, where the format has them, session, model and block ids, as their
readers find them. What a format can not say is in the notes of its writer.

Parquet carries the tokens of a prefix block in its metadata; the other formats do not need it (traces/codec.py).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import numpy as np
import polars as pl

from traces.batch import SCHEMA, ahead
from traces.burstgpt import MAX_LINE_BYTES, MAX_TEXT_BYTES
from traces.codec import (
    BLOCK_TOKENS_KEY,
    COLUMNS_6,
    COLUMNS_8,
    FORMATS,
    MAPPED,
    UNIX_CLOCK,
    TraceClock,
    TraceFormatError,
    TraceWriter,
    UnsortedTrace,
    WriteReport,
    block_tokens,
    line_chunks,
    open_writer,
    read_trace,
    sniff,
)
from traces.mooncake import PREFIX_NOTES
from traces.parquet import ROW_GROUP_ROWS, Writer
from traces.record import Outcome
from traces.row_groups import VARIES, repeated_value

SUFFIXES: Final = {".csv": "burstgpt", ".parquet": "parquet", ".jsonl": "jsonl"}
"""What a target is written as when nobody says."""
BATCH_ROWS: Final = 131_072
"""Rows of a batch at most, so that a chunk of a BurstGPT file, of some 70,000, stays one."""
BURSTGPT_FIELDS: Final = frozenset(
    (
        "received_at",
        "session_id",
        "elapsed_s",
        "model",
        "request_tokens",
        "response_tokens",
        "log_type",
        "outcome",
    )
)
"""Of the record, what a BurstGPT file says."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did: `rows_read == rows_kept + sum(dropped.values())`, and the file was found to be so.

    dropped: rows left out, by reason. notes: rows written with something simplified, by what. compared: the columns in
    which the file that was written equals the source's rows. block_tokens: of a block of the file's, None without.
    """

    source_format: str
    target_format: str
    rows_read: int
    rows_kept: int
    dropped: Mapping[str, int]
    notes: Mapping[str, int]
    compared: tuple[str, ...]
    block_tokens: int | None

    @property
    def is_prefix_floor(self) -> bool:
        """Whether the file's prefix reuse is a floor: of some rows' prompts it is not known what they share."""
        return self.block_tokens is not None and any(note in self.notes for note in PREFIX_NOTES)


def convert(
    source: Path,
    target: Path,
    *,
    source_format: str | None = None,
    target_format: str | None = None,
    columns: Mapping[str, str] | None = None,
    clock: TraceClock = UNIX_CLOCK,
    failures: Literal["keep", "drop"] = "keep",
    model: str | None = None,
    salt: bytes | None = None,
    source_block_tokens: int | None = None,
) -> Conversion:
    """Writes the trace in `source` to `target`.

    source_format: None finds it out. target_format: None goes by the target's suffix. columns: for a CSV of any kind,
    as traces.mapped.parse_columns returns. clock: what 0 is in relative timestamps, on both sides. model: every row's
    new model. salt: what block ids are made from, None draws one. source_block_tokens: where the source does not say.
    Raises ValueError for an unknown format, TraceFormatError when the source is wrong or the target does not read back
    as it should, OSError naming the file.
    """
    read_as, write_as = chosen_formats(source, target, source_format, target_format, columns)
    blocks = source_block_tokens or (None if read_as == MAPPED else block_tokens(source, format=read_as))
    batches = read_trace(
        source,
        format=None if read_as == MAPPED else read_as,
        clock=clock,
        columns=columns,
        batch_rows=BATCH_ROWS,
        fields=BURSTGPT_FIELDS if write_as in ("burstgpt", "burstgpt6") else None,
    )
    kept = _Kept(write_as, clock, failures == "drop")
    with _replacing(target) as stream:
        flow = _counted(ahead(_relabelled(batches, model)), kept)
        try:
            writer = (
                _parquet_writer(stream, failures, blocks)
                if write_as == "parquet"
                else open_writer(
                    stream, format=write_as, clock=clock, failures=failures, block_tokens=blocks, salt=salt
                )
            )
            report = _write(flow, writer, kept)
            blocks = getattr(writer, "block_tokens", blocks if write_as in ("parquet", "jsonl") else None)
        except UnsortedTrace as error:
            raise TraceFormatError(f"{source}: {error}") from error
        except pl.exceptions.PanicException as error:  # what polars' Parquet reader does at some damaged files
            raise TraceFormatError(f"{source}: expected a whole file, polars gave up: {error}") from error
        _check_counts(report, kept, target)
        with ThreadPoolExecutor(1) as pool:  # the disk takes the file meanwhile
            stored = pool.submit(os.fsync, stream.fileno())
            try:
                back = _Digest()
                for frame in ahead(_read_back(Path(stream.name), write_as, clock)):
                    back.add(frame)
            except TraceFormatError as error:
                raise TraceFormatError(f"{target}: was written and can not be read back: {error}") from error
            _check_equal(kept.digest, back, target)
            stored.result()
    return Conversion(
        source_format=read_as,
        target_format=write_as,
        rows_read=kept.rows_read,
        rows_kept=report.rows_written,
        dropped=report.dropped,
        notes=report.notes,
        compared=_COMPARED[write_as],
        block_tokens=blocks,
    )


def chosen_formats(
    source: Path, target: Path, source_format: str | None, target_format: str | None, columns: Mapping[str, str] | None
) -> tuple[str, str]:
    """What `convert` reads and writes. Raises ValueError for an unknown one, and as `sniff`."""
    chosen = {"from": source_format, "to": target_format or SUFFIXES.get(target.suffix.lower(), target.name)}
    if columns is not None:
        if source_format not in (None, MAPPED):
            raise ValueError(f"from: expected no format beside a map of columns, got {source_format!r}")
        chosen["from"] = None
    for flag, name in chosen.items():
        if name is not None and name not in FORMATS:
            raise ValueError(f"{flag}: expected one of {', '.join(FORMATS)}, got {name!r}")
    return MAPPED if columns is not None else chosen["from"] or sniff(source), str(chosen["to"])


def describe(done: Conversion, source: Path, target: Path) -> list[str]:
    """A conversion in lines for its user."""
    reasons = "".join(f", {n:,} {reason}" for reason, n in done.dropped.items())
    lines = [
        f"{source}: {done.rows_read:,} rows read ({done.source_format}) = {done.rows_kept:,} kept"
        f" + {done.rows_read - done.rows_kept:,} dropped{reasons}",
        f"{target}: {done.rows_kept:,} rows written ({done.target_format}), read back and equal in"
        f" {'every field' if set(done.compared) == SCHEMA.keys() else ', '.join(done.compared)}",
        *(f"{target}: {n:,} rows with {note}" for note, n in done.notes.items()),
    ]
    if done.block_tokens is not None:
        lines.append(f"{target}: prefix blocks of {done.block_tokens} tokens")
    if done.is_prefix_floor:
        lines.append(f"{target}: prefix reuse is a floor: where no prefix is known, block ids are unique")
    return lines


def _relabelled(batches: Iterable[pl.DataFrame], model: str | None) -> Iterator[pl.DataFrame]:
    return (batch if model is None else batch.with_columns(model=pl.lit(model)) for batch in batches)


class _Kept:
    """What the file that is being written should hold."""

    def __init__(self, format: str, clock: TraceClock, drop_failures: bool) -> None:
        self.format = format
        self.rows_read = 0
        self.digest = _Digest()
        self._rules = [pl.col("outcome") == Outcome.OK.value] if drop_failures else []
        if format in ("burstgpt", "burstgpt6"):
            self._rules.append(_is_sayable_in_burstgpt(clock))
        self._columns = _comparable(format, clock)

    def add(self, batch: pl.DataFrame) -> None:
        """Go on with those rows of a batch that should be in the file."""
        if self._rules:
            is_kept = batch.select(pl.all_horizontal(self._rules)).to_series()
            batch = batch if is_kept.all() else batch.filter(is_kept)
        self.add_said(batch)

    def add_said(self, rows: pl.DataFrame) -> None:
        """Go on with these rows of the file."""
        self.digest.add(rows.select(self._columns))


def _counted(batches: Iterable[pl.DataFrame], kept: _Kept) -> Iterator[pl.DataFrame]:
    for batch in batches:
        kept.rows_read += batch.height
        yield batch


def _parquet_writer(stream: BinaryIO, failures: str, blocks: int | None) -> TraceWriter:
    # Without statistics and in the fastest compression: readers here take every row group.
    metadata = {} if blocks is None else {BLOCK_TOKENS_KEY: str(blocks)}
    return Writer(stream, drop_failures=failures == "drop", compression="lz4", statistics=False, metadata=metadata)


def _write(batches: Iterable[pl.DataFrame], writer: TraceWriter, kept: _Kept) -> WriteReport:
    """What is written is taken account of on a thread of its own, a batch behind at most."""
    says = hasattr(writer, "said")
    with ThreadPoolExecutor(1) as pool:
        adding: Future[None] | None = None
        for batch in batches:
            # A writer that changes rows says what it made of them; of the others it is known what they keep.
            added = None if says else pool.submit(kept.add, batch)
            writer.write(batch)
            if adding is not None:
                adding.result()
            adding = added or pool.submit(kept.add_said, writer.said)  # type: ignore[attr-defined]
        if adding is not None:
            adding.result()
    return writer.close()


# What is compared


class _Digest:
    """A number for each column, the sum over its rows of hash(value) * (2 * row + 1) modulo 2^64: it follows the values
    and their order, and not where batches were cut."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums: Counter[str] = Counter()

    def add(self, frame: pl.DataFrame) -> None:
        """Go on with these rows."""
        if not frame.height:
            return
        first, end = self.rows, self.rows + frame.height
        place = np.arange(2 * first + 1, 2 * end + 1, 2, dtype=np.uint64)
        for column in frame:
            value = repeated_value(column)
            if value is VARIES:
                number = int(np.dot(column.hash().to_numpy(), place))
            else:  # as most columns of most traces are: the sum of the odd numbers from first to end is known
                number = _hash(value, column.dtype) * (end**2 - first**2)
            self.sums[column.name] = (self.sums[column.name] + number) % (1 << 64)
        self.rows = end


@functools.lru_cache(256)
def _hash(value: object, dtype: pl.DataType) -> int:
    number: int = pl.Series([value], dtype=dtype).hash()[0]
    return number


_REQUEST: Final = ("received_at", "request_tokens", "response_tokens")
_COMPARED: Final[dict[str, tuple[str, ...]]] = {
    "burstgpt": COLUMNS_8,
    "burstgpt6": COLUMNS_6,
    "parquet": tuple(SCHEMA),
    "jsonl": tuple(SCHEMA),
    "azure": _REQUEST,
    "azure_multimodal": _REQUEST,
    "mooncake": (*_REQUEST, "prefix_blocks"),
    "aiperf": (*_REQUEST, "session_id"),
    "bailian": (*_REQUEST, "session_id", "prefix_blocks"),
    "timed_trace": (*_REQUEST, "prefix_blocks"),
    "workload_trace": (*_REQUEST, "model", "client_request_id"),
}


def _comparable(format: str, clock: TraceClock) -> list[pl.Expr]:
    """The columns of _COMPARED from those of a batch."""
    if format in ("parquet", "jsonl"):
        return [pl.col(name) for name in SCHEMA]
    if format not in ("burstgpt", "burstgpt6"):
        names = [pl.col(name) for name in _COMPARED[format][1:]]
        return [(pl.col("received_at") * 1e6).round().cast(pl.Int64), *names]
    micros = _micros(clock)
    request = pl.col("request_tokens").fill_null(0)
    response = pl.when(pl.col("outcome") == Outcome.OK.value).then("response_tokens").otherwise(0)
    columns = {
        "Timestamp": micros if format == "burstgpt" else micros // 1_000_000 * 1_000_000,
        "Session ID": pl.when(pl.col("session_id") != "").then("session_id"),
        "Elapsed time": pl.col("elapsed_s").fill_null(0).round().cast(pl.Int64),
        "Model": pl.col("model"),
        "Request tokens": request,
        "Response tokens": response,
        "Total tokens": request + response,
        "Log Type": pl.col("log_type"),
    }
    return [columns[name].alias(name) for name in _COMPARED[format]]


def _micros(clock: TraceClock) -> pl.Expr:
    return ((pl.col("received_at") - clock.zero_s) * 1e6).round().cast(pl.Int64)


def _is_sayable_in_burstgpt(clock: TraceClock) -> pl.Expr:
    """The rows that `traces.burstgpt.Writer` should not drop, said a second time: the counts show a difference."""
    has_tokens = (pl.col("response_tokens").fill_null(0) > 0) & pl.col("request_tokens").is_not_null()
    texts = [pl.col(name).fill_null("") for name in ("model", "session_id")]
    return (
        (_micros(clock) >= 0)
        & (pl.col("model").fill_null("") != "")
        & ((pl.col("outcome") != Outcome.OK.value) | has_tokens)
        & pl.all_horizontal([~text.str.contains("\0", literal=True) for text in texts])
        & pl.all_horizontal([text.str.len_bytes() <= MAX_TEXT_BYTES for text in texts])
    )


def _read_back(path: Path, format: str, clock: TraceClock) -> Iterator[pl.DataFrame]:
    """The file's rows in the columns of _COMPARED."""
    if format == "parquet":
        # Without the rules for a record: the source's reader has checked them, and equal values pass them as well.
        return _row_groups(path)
    if format in ("burstgpt", "burstgpt6") and not _has_quotes(path):
        return _read_plain_burstgpt(path, _COMPARED[format])
    columns = _comparable(format, clock)
    return (batch.select(columns) for batch in read_trace(path, format=format, clock=clock))


def _row_groups(path: Path) -> Iterator[pl.DataFrame]:
    query = pl.scan_parquet(path, glob=False, hive_partitioning=False)
    rows = query.select(pl.len()).collect().item()
    return (query.slice(first, ROW_GROUP_ROWS).collect() for first in range(0, rows, ROW_GROUP_ROWS))


def _has_quotes(path: Path) -> bool:
    with path.open("rb") as stream:
        return any(b'"' in block for block in iter(lambda: stream.read(1 << 20), b""))


def _read_plain_burstgpt(path: Path, names: Iterable[str]) -> Iterator[pl.DataFrame]:
    types: dict[str, Any] = {name: pl.Int64() for name in names}
    types |= {name: pl.String() for name in ("Session ID", "Model", "Log Type") if name in types}
    types["Timestamp"] = pl.Float64()
    with path.open("rb") as stream:
        stream.readline()
        for chunk in line_chunks(stream, path, 2, MAX_LINE_BYTES):
            try:
                frame = pl.read_csv(chunk, has_header=False, schema=types, quote_char=None)
            except pl.exceptions.PolarsError as error:
                raise TraceFormatError(f"polars says: {error}") from error
            yield frame.with_columns((pl.col("Timestamp") * 1e6).round().cast(pl.Int64))


def _check_counts(report: WriteReport, kept: _Kept, target: Path) -> None:
    counts = (kept.rows_read, report.rows_in, report.rows_written + sum(report.dropped.values()))
    if len(set(counts)) > 1 or report.rows_written != kept.digest.rows:
        raise TraceFormatError(
            f"{target}: expected rows read = rows kept + rows dropped, got {counts[0]} read, {report.rows_written} of"
            f" {kept.digest.rows} kept, dropped {dict(report.dropped)}"
        )


def _check_equal(written: _Digest, back: _Digest, target: Path) -> None:
    if written.rows != back.rows:
        raise TraceFormatError(f"{target}: expected {written.rows} rows, of which {back.rows} were read back")
    columns = sorted(name for name in written.sums.keys() | back.sums.keys() if written.sums[name] != back.sums[name])
    if columns:
        raise TraceFormatError(f"{target}: column '{columns[0]}': expected the values written, read back others")


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the target's place at the end, or leaves no mark; the caller has it stored (fsync).

    Raises OSError naming the target.
    """
    place = target.resolve()
    if place.exists() and not place.is_file():
        number = errno.EISDIR if place.is_dir() else errno.EINVAL
        raise OSError(number, "expected a place for a file, which can be read back", str(target))
    partial = place.with_name(f".burstgate-{secrets.token_hex(8)}.partial")
    try:
        try:
            with partial.open("xb") as stream:
                yield stream
            os.replace(partial, place)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(partial):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
