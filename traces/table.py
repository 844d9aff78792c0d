"""A whole trace in memory, for statistics that need it whole: a polars DataFrame, one row a request, in order of time.

    received_at                                  f64, epoch seconds, finite, never null, non-decreasing
    elapsed_s ttft_s tpot_s queue_s              f32, seconds >= 0: exact to 1 part in 16 million
    request_tokens response_tokens               i32, >= 0
    status                                       i16
    session                                      u64, a hash of the session id: of a million sessions two share
                                                 one with a probability of 3 in 10^8
    model error_type endpoint upstream           Categorical: names are the clients' own, any number of them
    log_type outcome origin                      Enum of the record's

Null is unknown. Rows of equal stamps stay in the order they came in. A column that is null in every row takes no memory
until it is asked for. BurstGPT's columns take 35 bytes a row, and 30 % more while they are gathered.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.batch import complete_batch
from traces.record import LogType, Origin, Outcome


def _enum(values: type[enum.StrEnum]) -> pl.Enum:
    return pl.Enum([str(value) for value in values])


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

SCHEMA: Final[dict[str, pl.DataType]] = {
    "received_at": pl.Float64(),
    "elapsed_s": pl.Float32(),
    "ttft_s": pl.Float32(),
    "tpot_s": pl.Float32(),
    "queue_s": pl.Float32(),
    "request_tokens": pl.Int32(),
    "response_tokens": pl.Int32(),
    "status": pl.Int16(),
    "session": pl.UInt64(),
    "model": pl.Categorical(),
    "error_type": pl.Categorical(),
    "endpoint": pl.Categorical(),
    "upstream": pl.Categorical(),
    "log_type": _enum(LogType),
    "outcome": _enum(Outcome),
    "origin": _enum(Origin),
}
"""Column name to type, in the table's order."""
READS: Final = tuple("session_id" if name == "session" else name for name in SCHEMA)
"""The columns of a batch that a table is made of; a reader may leave the others out."""
FIRST_S: Final = -62_135_596_800.0
END_S: Final = 253_402_300_800.0
"""The years 1 to 9999: stamps outside have no date."""
MAX_SPAN_S: Final = 100 * 366 * 86_400
"""Statistics that have a place for each hour or window of the calendar are left out for longer traces."""
_LIMITS: Final = {
    **dict.fromkeys(("elapsed_s", "ttft_s", "tpot_s", "queue_s"), float(np.finfo(np.float32).max)),
    **dict.fromkeys(("request_tokens", "response_tokens"), 2**31 - 1),
    "status": 2**15 - 1,
}

_USABLE: Final = {name: pl.col(name).is_between(0, limit) for name, limit in _LIMITS.items()}
_COMPACT: Final = [
    (
        pl.when(_USABLE[name]).then(name).cast(dtype)
        if name in _USABLE
        else pl.when(pl.col("session_id").is_not_null()).then(pl.col("session_id").hash())
        if name == "session"
        else pl.col(name).cast(dtype)
    ).alias(name)
    for name, dtype in SCHEMA.items()
]
"""A batch's columns in the table's types."""


@dataclass(frozen=True, slots=True)
class Collected:
    """A trace's table, and what did not go into it."""

    table: pl.DataFrame
    rows_read: int
    dropped: dict[str, int]
    """Reason to rows: those without a usable stamp have no place in time."""
    blanked: dict[str, int]
    """Column to values taken as unknown: negative, not a number, or more than the column's type holds."""


def collect(batches: Iterable[pl.DataFrame]) -> Collected:
    """The table of a trace given in batches, sorted or not.

    batches: of `traces.batch.SCHEMA`; columns that a batch lacks are taken at the record's defaults.
    Raises ValueError when a batch has a column that is not the record's.
    """
    rows_read = 0
    dropped: Counter[str] = Counter()
    blanked: Counter[str] = Counter()
    # A part of nulls alone is kept as its length.
    parts: dict[str, list[pl.Series | int]] = {name: [] for name in SCHEMA}
    for batch in batches:
        rows_read += batch.height
        rows, lost = _with_stamps(batch if set(READS) <= set(batch.columns) else complete_batch(batch))
        dropped.update(lost)
        blanked.update(rows.select((~good).sum().alias(name) for name, good in _USABLE.items()).row(0, named=True))
        for values in rows.select(_COMPACT):
            parts[values.name].append(values if values.null_count() < len(values) else len(values))
    return Collected(_joined(parts), rows_read, dict(+dropped), dict(+blanked))


class Service(msgspec.Struct, frozen=True):
    """A model and a log type: what the paper calls a service. `model` is None where it is unknown."""

    model: str | None
    log_type: LogType
    requests: int


def _with_stamps(batch: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    stamps_s = batch["received_at"]
    is_finite = stamps_s.is_finite().fill_null(value=False)
    is_dated = stamps_s.is_between(FIRST_S, END_S, closed="left").fill_null(value=False)
    if is_dated.all():
        return batch, {}
    lost = {
        "received_at: not a finite number": int((~is_finite).sum()),
        "received_at: outside the years 1 to 9999": int((is_finite & ~is_dated).sum()),
    }
    return batch.filter(is_dated), lost


def _joined(parts: dict[str, list[pl.Series | int]]) -> pl.DataFrame:
    """The parts end to end, in order of time. Takes them out of `parts`: one column at a time is held twice."""
    columns: list[pl.Series] = []
    nulls: list[str] = []
    order: pl.Series | None = None
    for name, dtype in SCHEMA.items():
        column = parts.pop(name)
        if all(isinstance(part, int) for part in column):
            nulls.append(name)
            continue
        values = pl.concat(
            [pl.Series(name, [], dtype).clear(part) if isinstance(part, int) else part for part in column],
            rechunk=True,
        )
        del column
        if name == "received_at" and not values.is_sorted():
            order = pl.Series(np.argsort(values.to_numpy(), kind="stable").astype(np.uint32))
        columns.append(values if order is None else values.gather(order))
    if not columns:
        return pl.DataFrame(schema=SCHEMA)
    return (
        pl.DataFrame(columns)
        .with_columns(pl.lit(None, SCHEMA[name]).alias(name) for name in nulls)
        .select(list(SCHEMA))
    )


PIECE_ROWS: Final = 1 << 20


def view(values: pl.Series) -> NDArray[Any]:
    """A column's numbers: its own memory, read-only, where nothing is null; else a copy of floats, NaN for null."""
    if not values.null_count():
        return values.rechunk().to_numpy(allow_copy=False)
    dtype = values.dtype if values.dtype.is_float() else pl.Float64()
    return values.cast(dtype).fill_null(float("nan")).to_numpy()


def pieces(n: int) -> Iterator[slice]:
    """Of n rows a million at a time: what is made of them on the way takes little memory then."""
    return (slice(first, min(first + PIECE_ROWS, n)) for first in range(0, n, PIECE_ROWS))


def services(table: pl.DataFrame, columns: Sequence[str], most: int) -> Iterator[tuple[Service, pl.DataFrame]]:
    """The `most` largest services, most requests first and then by name, each with its rows of `columns` in order.

    One service's rows are held at a time.
    """
    sizes = (
        table.group_by("model", "log_type")
        .agg(pl.len().alias("requests"))
        .sort("requests", "model", "log_type", descending=[True, False, False])
    )
    for model, log_type, requests in sizes.head(most).iter_rows():
        is_here = pl.col("model").eq_missing(pl.lit(model, pl.Categorical())) & (pl.col("log_type") == log_type)
        rows = table if requests == table.height else table.lazy().filter(is_here)
        yield Service(model, LogType(log_type), requests), rows.lazy().select(columns).collect()


def clock_s(stamps_s: NDArray[np.float64], zone: ZoneInfo) -> NDArray[np.float64]:
    """What a clock in `zone` shows, in seconds since 1970-01-01 00:00 of that clock.

    stamps_s: shape (n,), epoch seconds of the years 1 to 9999. A clock that is set back shows an hour twice.
    """
    # No zone changes its clock but on a quarter of an hour, as UTC counts; local mean time is older than any trace.
    quarter = np.floor_divide(stamps_s, 900).astype(np.int64)
    distinct, place = np.unique(quarter, return_inverse=True)
    offsets_s = [_offset_s(number * 900, zone) for number in distinct.tolist()]
    return stamps_s + np.array(offsets_s, dtype=np.float64)[place]


def _offset_s(stamp_s: float, zone: ZoneInfo) -> float:
    # A day from either end of the calendar an offset cannot leave it.
    within_s = min(max(stamp_s, FIRST_S + 86_400), END_S - 2 * 86_400)
    offset = (_EPOCH + timedelta(seconds=within_s)).astimezone(zone).utcoffset()
    return 0.0 if offset is None else offset.total_seconds()
