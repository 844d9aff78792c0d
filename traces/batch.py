"""Traces in bulk: a batch is a polars DataFrame whose columns are `TraceRecord`'s fields, in its order.

Every codec yields batches and every writer takes them, so that a file of any size passes through in bounded memory and
at the speed of columns. A row is valid in a batch exactly when the same values are a valid `TraceRecord`; codecs
validate at the edge and name file, line and column when they refuse.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec
import polars as pl

from traces.record import LogType, Origin, Outcome, TokenSource, TraceRecord

SCHEMA: dict[str, pl.DataType] = {
    "request_id": pl.String(),
    "received_at": pl.Float64(),
    "session_id": pl.String(),
    "elapsed_s": pl.Float64(),
    "model": pl.String(),
    "request_tokens": pl.Int64(),
    "response_tokens": pl.Int64(),
    "log_type": pl.String(),
    "outcome": pl.String(),
    "client_request_id": pl.String(),
    "served_model": pl.String(),
    "status": pl.Int64(),
    "error_type": pl.String(),
    "ttft_s": pl.Float64(),
    "tpot_s": pl.Float64(),
    "queue_s": pl.Float64(),
    "endpoint": pl.String(),
    "stream": pl.Boolean(),
    "upstream": pl.String(),
    "attempts": pl.Int64(),
    "finish_reason": pl.String(),
    "cached_tokens": pl.Int64(),
    "max_tokens": pl.Int64(),
    "token_source": pl.String(),
    "prefix_blocks": pl.List(pl.UInt64()),
    "origin": pl.String(),
    "run_id": pl.String(),
    "shadow_of": pl.String(),
    "tenant": pl.String(),
    "gateway": pl.String(),
    "shaping_rule": pl.String(),
    "shaping_class": pl.String(),
    "agreement": pl.Float64(),
}
"""Column name to type. Epoch stamps are float seconds with microseconds kept; enums are their text."""

_DEFAULTS = {
    field.name: field.default for field in msgspec.structs.fields(TraceRecord) if field.default is not msgspec.NODEFAULT
}


AHEAD_BATCHES: Final = 2
"""That are read before they are needed."""


def ahead(batches: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The same batches, made on another thread: polars and numpy let go of the interpreter while they work."""
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, batches, None) for _ in range(AHEAD_BATCHES))
        while (batch := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, batches, None))
            yield batch


def empty_batch() -> pl.DataFrame:
    """A batch of no rows, with every column."""
    return pl.DataFrame(schema=SCHEMA)


def complete_batch(frame: pl.DataFrame, fields: Collection[str] = SCHEMA.keys()) -> pl.DataFrame:
    """`frame` with the columns it lacks added at the record's defaults, in the record's order and types.

    fields: the columns wanted; others of the frame are left out.
    Raises ValueError when a column is not one of the record's.
    """
    unknown = set(frame.columns) - SCHEMA.keys()
    if unknown:
        raise ValueError(f"not columns of a trace record: {', '.join(sorted(unknown))}")
    return frame.select(
        pl.col(name).cast(dtype) if name in frame.columns else pl.lit(_DEFAULTS.get(name), dtype=dtype).alias(name)
        for name, dtype in SCHEMA.items()
        if name in fields
    )


def batch_from_records(records: Iterable[TraceRecord]) -> pl.DataFrame:
    """The records as one batch, in their order."""
    return pl.DataFrame([msgspec.structs.astuple(record) for record in records], schema=SCHEMA, orient="row")


def records_from_batch(batch: pl.DataFrame) -> Iterator[TraceRecord]:
    """The batch's rows as records, in order."""
    for row in batch.select(list(SCHEMA)).iter_rows(named=True):
        row["log_type"] = LogType(row["log_type"])
        row["outcome"] = Outcome(row["outcome"])
        row["token_source"] = TokenSource(row["token_source"])
        row["origin"] = Origin(row["origin"])
        if row["prefix_blocks"] is not None:
            row["prefix_blocks"] = tuple(row["prefix_blocks"])
        yield TraceRecord(**row)
