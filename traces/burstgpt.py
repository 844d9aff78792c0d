"""BurstGPT's CSV files, both ways.

    Timestamp        seconds since local midnight of day 0 (`TraceClock`): an integer (files 1, 2) or a float (file 3)
    Session ID       text, may be empty                                                 (file 3 only)
    Elapsed time     seconds from submission to the last byte                           (file 3 only)
    Model            text, not empty
    Request tokens   integer >= 0
    Response tokens  integer >= 0; 0 is how the format spells a failure
    Total tokens     Request tokens + Response tokens
    Log Type         `Conversation log` or `API log`

Reading finds columns by name and ignores others; it takes a byte order mark, LF or CRLF, quoted fields (RFC 4180) and
blank lines, `50.0` for 50, spaces around numbers, and rows in any order. A failure becomes outcome `upstream_error`
with its response tokens unknown, and its request tokens too when the row is `0,0,0`. Writing uses LF, always has a
header, and quotes only what needs it.

Nearly every chunk of a real file is plain: no quote, a fixed number of commas a line. Polars parses those, and where
every value is right, into numbers at once. Others are read as text, so that the first wrong value is named as it is
spelt; what is not even plain goes through the `csv` module line by line, the one place where malformed lines are named.
"""

from __future__ import annotations

import csv
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.batch import SCHEMA, complete_batch
from traces.codec import (
    CHUNK_BYTES,
    COLUMNS_8,
    Rule,
    TraceClock,
    TraceFormatError,
    WriteReport,
    line_chunks,
    line_too_long,
    read_header,
    require,
    shown,
    split,
)
from traces.record import LogType, Origin, Outcome, TokenSource

MAX_LINE_BYTES: Final = 1 << 20
"""Longest line, and longest record of quoted lines. BurstGPT's are under 150 bytes; past this it is some other file."""
MAX_TEXT_BYTES: Final = 1 << 16
"""Longest model or session id that is written; the csv module refuses to read a field over 131,072 characters."""
TIMESTAMP_LIMIT_S: Final = 2**32
"""A Timestamp is below this: 136 years, so that an epoch stamp in float64 still has its microseconds, and so that
milliseconds given for seconds are refused."""
SLOW_ROWS: Final = 65_536
"""Rows that the line-by-line path gathers before it yields them."""

# Row numbers of request ids: 34 bits.
_MAX_ROWS: Final = 1 << 34
_SMALL_STAMPS: Final = {micros: repr(micros / 1e6) for micros in range(1, 100)}

_TOKENS: Final = ("Request tokens", "Response tokens", "Total tokens")
_TIMESTAMP: Final = pl.col("Timestamp").str.strip_chars().cast(pl.Float64, strict=False)
_SECONDS: Final = pl.col("Elapsed time").str.strip_chars().cast(pl.Float64, strict=False)
_TYPES: Final = {
    name: pl.Float64() if name in ("Timestamp", "Elapsed time") else pl.Int64() if name in _TOKENS else pl.String()
    for name in COLUMNS_8
}
# 18 digits cannot overflow, nor can the sum of two such counts.
_INTEGER: Final = r"^ *([0-9]{1,18})(?:\.0*)? *$"
_LOG_TYPES: Final = [str(log_type) for log_type in LogType]


def _tokens(column: str) -> pl.Expr:
    return pl.col(column).str.extract(_INTEGER).cast(pl.Int64)


def _is_integer(column: str) -> Rule:
    return Rule(column, "an integer >= 0", pl.col(column).str.contains(_INTEGER))


_RULES: Final = (
    Rule(
        "Timestamp",
        f"a number of seconds, >= 0 and < {TIMESTAMP_LIMIT_S}",
        (_TIMESTAMP >= 0) & (_TIMESTAMP < TIMESTAMP_LIMIT_S),
    ),
    Rule("Elapsed time", "a finite number of seconds >= 0", (_SECONDS >= 0) & _SECONDS.is_finite()),
    Rule("Model", "a model's name", pl.col("Model") != ""),
    *map(_is_integer, _TOKENS),
    Rule(
        "Total tokens",
        "Request tokens + Response tokens",
        _tokens("Total tokens") == _tokens("Request tokens") + _tokens("Response tokens"),
    ),
    Rule("Log Type", f"'{LogType.CONVERSATION}' or '{LogType.API}'", pl.col("Log Type").is_in(_LOG_TYPES)),
)
"""Of columns of text."""
_HOLDS: Final = {
    "Timestamp": pl.col("Timestamp").is_between(0, TIMESTAMP_LIMIT_S, closed="left"),
    "Elapsed time": (pl.col("Elapsed time") >= 0) & pl.col("Elapsed time").is_finite(),
    "Model": pl.col("Model") != "",
    **{name: pl.col(name).is_between(0, 10**18, closed="left") for name in _TOKENS},
    "Log Type": pl.any_horizontal(pl.col("Log Type") == log_type for log_type in _LOG_TYPES),
}
"""The same of columns of _TYPES, but for the sum of the tokens."""
_ADDS_UP: Final = pl.col("Total tokens") == pl.col("Request tokens") + pl.col("Response tokens")
_PLAIN: Final = {
    "elapsed_s": "Elapsed time",
    "model": "Model",
    "request_tokens": "Request tokens",
    "response_tokens": "Response tokens",
    "log_type": "Log Type",
}
"""Fields of the record that are columns of the file."""
_TOKEN_FIELDS: Final = {"request_tokens", "response_tokens", "outcome", "token_source"}


def read(
    path: Path,
    *,
    required: Sequence[str],
    clock: TraceClock,
    dataset: str,
    fields: Collection[str] = SCHEMA.keys(),
) -> Iterator[pl.DataFrame]:
    """The file's rows as batches in the file's order, some tens of thousands of rows each.

    required: the columns that must be there; `Session ID` and `Elapsed time` are read where they are.
    dataset: becomes `run_id` and part of each `request_id`: the same file, clock and name give the same ids again.
    fields: of the record, which the batches have; columns of the file that none of them needs are not looked at.
    Raises TraceFormatError at the first wrong line.
    """
    zero_s = clock.zero_s
    first_row = 0
    with path.open("rb") as stream:
        header = read_header(stream, path)
        _check_header(header, required, path)
        places: dict[str, int] = {
            name: header.index(name) for name in COLUMNS_8 if name in header and _is_needed(name, fields)
        }
        rules = [rule for rule in _RULES if rule.column in places]
        for frame, lines in text_rows(stream, header, places, path, lambda chunk: _parsed(chunk, header, places)):
            if frame["Timestamp"].dtype == pl.String:
                require(frame, rules, path, lines)
                frame = _from_text(frame)
            yield _to_batch(frame, zero_s, dataset, first_row, fields)
            first_row += frame.height
            if first_row >= _MAX_ROWS:
                raise TraceFormatError(f"{path}:{lines[-1]}: expected fewer than {_MAX_ROWS} rows, got more")


def _is_needed(column: str, fields: Collection[str]) -> bool:
    if column in _TOKENS:
        return not _TOKEN_FIELDS.isdisjoint(fields)
    return (
        column == "Timestamp"
        or (column == "Session ID" and "session_id" in fields)
        or any(_PLAIN.get(field) == column for field in fields)
    )


def _parsed(chunk: bytes, header: Sequence[str], places: Mapping[str, int]) -> pl.DataFrame | None:
    """The columns at `places` of a plain chunk as _TYPES; None where a value is wrong, or not as numbers are spelt."""
    # Polars takes + as a sign, and a line that lacks fields as one with nulls: the last column's rule refuses those.
    if any(byte in chunk for byte in (b"+", b'"', b"\r", b"\0")) or not _is_utf8(chunk) or _has_long_line(chunk):
        return None
    if not (header[-1] in _HOLDS and header[-1] in places) and not _is_plain(chunk, len(header)):
        return None
    types = {place: _TYPES[name] for name, place in places.items()}
    try:
        frame = pl.read_csv(
            chunk,
            has_header=False,
            schema={str(place): types.get(place, pl.String()) for place in range(len(header))},
            columns=sorted(types),
            quote_char=None,
        ).select(pl.col(str(place)).alias(name) for name, place in places.items())
    except pl.exceptions.PolarsError:
        return None
    ends = int(np.count_nonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")))
    if frame.height != ends + (not chunk.endswith(b"\n")):  # polars leaves out blank lines
        return None
    holds = [_HOLDS[name] for name in places if name in _HOLDS]
    if "Total tokens" in places:
        holds.append(_ADDS_UP)
    is_right = frame.select(pl.all_horizontal(rule.all(ignore_nulls=False) for rule in holds).fill_null(False)).item()
    return frame if is_right else None


def _from_text(frame: pl.DataFrame) -> pl.DataFrame:
    """Columns of text that pass _RULES as _TYPES."""
    numbers = {"Timestamp": _TIMESTAMP, "Elapsed time": _SECONDS} | {name: _tokens(name) for name in _TOKENS}
    return frame.with_columns(numbers[name].alias(name) for name in frame.columns if name in numbers)


def mean_rate_rps(path: Path) -> float | None:
    """Requests a second from the first row to the last, by counting lines: nothing between those two is looked at.

    None where lines are not rows for certain (quotes, blank lines, CR), where the stamps are no times in order, or
    under two rows: `read` then says more. Raises TraceFormatError for a header that is none, OSError.
    """
    rows, first, last = 0, b"", b"\n"
    with path.open("rb") as stream:
        header = read_header(stream, path)
        if "Timestamp" not in header:
            return None
        place = header.index("Timestamp")
        for block in iter(lambda: stream.read(CHUNK_BYTES), b""):
            if b'"' in block or b"\r" in block or b"\n\n" in last[-1:] + block:
                return None
            if b"\n" not in first:
                first += block[:MAX_LINE_BYTES]
            rows += block.count(b"\n")
            last = block if len(block) > MAX_LINE_BYTES else (last + block)[-MAX_LINE_BYTES:]
    rows += not last.endswith(b"\n")
    try:
        first_s, last_s = (
            float(line.split(b",")[place])
            for line in (first.partition(b"\n")[0], last.removesuffix(b"\n").split(b"\n")[-1])
        )
    except (ValueError, IndexError):
        return None
    return (rows - 1) / (last_s - first_s) if rows > 1 and 0 <= first_s < last_s < TIMESTAMP_LIMIT_S else None


def request_ids(micros: NDArray[np.int64], first_row: int, dataset: str) -> pl.Series:
    """Deterministic ids for rows of a data set, in the layout of a UUIDv7 (RFC 9562, 5.7).

    48 bits of epoch milliseconds, then in the 74 free bits the row number (34) and a hash of `dataset` (40): ids of
    equal stamps sort in the file's order, and two data sets do not share one.
    micros: shape (n,), epoch microseconds; those before 1970 count as 0 here. first_row: the number of the first.
    Returns n lower-case texts of 36 characters.
    """
    rows = np.arange(first_row, first_row + len(micros), dtype=np.uint64)
    mark = int.from_bytes(hashlib.blake2b(dataset.encode(), digest_size=5).digest())
    millis = np.clip(micros // 1000, 0, (1 << 48) - 1).astype(np.uint64)
    words = np.empty((len(micros), 2), dtype=">u8")
    words[:, 0] = (millis << np.uint64(16)) | np.uint64(7 << 12) | (rows >> np.uint64(22))
    words[:, 1] = np.uint64(2 << 62 | mark) | ((rows & np.uint64((1 << 22) - 1)) << np.uint64(40))
    quarters, digits = words.view(">u2").astype(np.uint16), _four_digits()
    text = np.full((len(micros), 36), ord("-"), dtype=np.uint8)
    for place, first in enumerate((0, 4, 9, 14, 19, 24, 28, 32)):
        text[:, first : first + 4].view(np.uint32)[:, 0] = digits[quarters[:, place]]
    # By way of lists polars makes texts of an array a tenfold faster than of numpy's own texts.
    lists = pl.Series("request_id", text, dtype=pl.Array(pl.UInt8, 36)).cast(pl.List(pl.UInt8))
    return lists.cast(pl.Binary).cast(pl.String)


@functools.cache
def _four_digits() -> NDArray[np.uint32]:
    """The four hexadecimal digits of each number of 16 bits, their bytes taken as one number."""
    return np.frombuffer(np.arange(1 << 16, dtype=">u2").tobytes().hex().encode(), dtype=np.uint32)


def _check_header(header: list[str], required: Sequence[str], path: Path) -> None:
    missing = [name for name in required if name not in header]
    if missing:
        raise TraceFormatError(
            f"{path}:1: expected the columns {','.join(required)}, got {shown(','.join(header))},"
            f" which lacks {', '.join(missing)}"
        )
    repeated = [name for name in COLUMNS_8 if header.count(name) > 1]
    if repeated:
        raise TraceFormatError(
            f"{path}:1: column '{repeated[0]}': expected once, got {header.count(repeated[0])} times"
        )


def text_rows(
    stream: BinaryIO,
    header: list[str],
    places: Mapping[str, int],
    path: Path,
    parse: Callable[[bytes], pl.DataFrame | None] = lambda chunk: None,
) -> Iterator[tuple[pl.DataFrame, Sequence[int]]]:
    """The columns of a CSV file at `places` as text, with each row's line in the file. stream: behind the header.

    parse: makes a frame of another kind of a chunk where that can be, with a row a line, or None for text.
    """
    chunks = line_chunks(stream, path, 2, MAX_LINE_BYTES)
    line = 2
    for chunk in chunks:
        unix = chunk.replace(b"\r\n", b"\n") if b"\r" in chunk else chunk
        frame = parse(unix)
        if frame is None and _is_plain(unix, len(header)):
            frame = pl.read_csv(
                unix,
                has_header=False,
                schema={str(place): pl.String() for place in range(len(header))},
                quote_char=None,
            ).select(pl.col(str(place)).fill_null("").alias(name) for name, place in places.items())
        if frame is not None:
            yield frame, range(line, line + frame.height)
            line += frame.height
        else:
            line = yield from _quoted_rows(chunk, chunks, line, header, places, path)


def _is_plain(chunk: bytes, width: int) -> bool:
    """Whether each line is `width` fields of UTF-8 without quotes, and of a permitted length."""
    if b'"' in chunk or b"\r" in chunk or b"\0" in chunk or not _is_utf8(chunk):
        return False
    data = np.frombuffer(chunk, dtype=np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if not chunk.endswith(b"\n"):
        ends = np.append(ends, len(chunk))
    commas = np.flatnonzero(data == ord(","))
    if len(commas) != len(ends) * (width - 1):
        return False
    starts = np.concatenate(([0], ends[:-1] + 1))
    by_line = commas.reshape(len(ends), width - 1)
    return bool(
        (by_line[:, 0] >= starts).all() and (by_line[:, -1] < ends).all() and (ends - starts).max() <= MAX_LINE_BYTES
    )


def _is_utf8(chunk: bytes) -> bool:
    if not chunk.isascii():
        try:
            chunk.decode()
        except UnicodeDecodeError:
            return False
    return True


def _has_long_line(chunk: bytes) -> bool:
    """Whether a line is over MAX_LINE_BYTES; found by leaps to the last line end that is not further."""
    at = 0
    while len(chunk) - at > MAX_LINE_BYTES:
        at = chunk.rfind(b"\n", at, at + MAX_LINE_BYTES + 1) + 1
        if not at:
            return True
    return False


def _quoted_rows(
    chunk: bytes, chunks: Iterator[bytes], first_line: int, header: list[str], places: Mapping[str, int], path: Path
) -> Generator[tuple[pl.DataFrame, Sequence[int]], None, int]:
    """As `text_rows`, for a chunk that the csv module must read, and the next ones where a quoted field goes on.

    Returns the line after the last that it took. What comes before a malformed line is yielded before that raises.
    """
    rows: list[list[str]] = []
    lines: list[int] = []
    is_inside = False  # a record has begun and not ended
    start = first_line
    held_bytes = 0

    def texts() -> Iterator[str]:
        nonlocal is_inside, held_bytes
        line = first_line
        block: bytes | None = chunk
        while block:
            for raw in block.removesuffix(b"\n").split(b"\n"):
                held_bytes = held_bytes + len(raw) if is_inside else len(raw)
                if held_bytes > MAX_LINE_BYTES:
                    raise line_too_long(path, start if is_inside else line, MAX_LINE_BYTES, raw)
                is_inside = True
                yield _text(raw, line, header, path) + "\n"
                line += 1
            block = next(chunks, None) if is_inside else None

    def gathered() -> tuple[pl.DataFrame, list[int]]:
        columns = list(zip(*rows, strict=True))
        frame = pl.DataFrame({name: pl.Series(columns[place], dtype=pl.String) for name, place in places.items()})
        return frame, lines

    reader = csv.reader(texts(), strict=True)
    fault: TraceFormatError | None = None
    while fault is None:
        try:
            row = next(reader, None)
        except TraceFormatError as error:
            fault = error
            break
        except csv.Error as error:
            fault = TraceFormatError(f"{path}:{start}: expected a line of CSV, got one where the parser says: {error}")
            break
        if row is None:
            break
        if row and len(row) != len(header):
            fault = TraceFormatError(f"{path}:{start}: expected {len(header)} fields, got {len(row)}")
        elif row:
            rows.append(row)
            lines.append(start)
        is_inside = False
        start = first_line + reader.line_num
        if len(rows) == SLOW_ROWS:
            yield gathered()
            rows, lines = [], []
    if rows:
        yield gathered()
    if fault is not None:
        raise fault
    return start


def _text(raw: bytes, line: int, header: list[str], path: Path) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        rule, place = "UTF-8", error.start
    else:
        if "\0" not in text:
            return text
        rule, place = "text without NUL bytes", raw.index(b"\0")
    column = header[min(raw.count(b",", 0, place), len(header) - 1)]
    raise TraceFormatError(
        f"{path}:{line}: column '{column}': expected {rule}, got {shown(raw[max(0, place - 8) : place + 8])}"
    )


def _to_batch(
    frame: pl.DataFrame, zero_s: float, dataset: str, first_row: int, fields: Collection[str]
) -> pl.DataFrame:
    is_failure = pl.col("response_tokens") == 0
    micros = frame.select(((pl.col("Timestamp") + zero_s) * 1e6).round().cast(pl.Int64))["Timestamp"].to_numpy()
    parsed = frame.select(
        _seconds(micros).alias("received_at"),
        *([request_ids(micros, first_row, dataset)] if "request_id" in fields else []),
        *(pl.col(column).alias(name) for name, column in _PLAIN.items() if column in frame.columns),
        *([_or_null("Session ID").alias("session_id")] if "Session ID" in frame.columns else []),
        pl.lit(Origin.IMPORTED.value).alias("origin"),
        pl.lit(dataset).alias("run_id"),
    )
    if "response_tokens" in parsed.columns:
        parsed = parsed.with_columns(
            request_tokens=pl.when(~(is_failure & (pl.col("request_tokens") == 0))).then("request_tokens"),
            response_tokens=pl.when(~is_failure).then("response_tokens"),
            outcome=_choose(is_failure, Outcome.UPSTREAM_ERROR, Outcome.OK),
            token_source=_choose(is_failure, TokenSource.NONE, TokenSource.USAGE),
        )
    return complete_batch(parsed, fields)


def _seconds(micros: NDArray[np.int64]) -> pl.Series:
    """The float64 nearest to each number of microseconds: numpy divides, polars multiplies by an inexact 1e-6."""
    return pl.Series(micros / 1e6)


def _choose(condition: pl.Expr, then: str, otherwise: str) -> pl.Expr:
    return pl.when(condition).then(pl.lit(str(then))).otherwise(pl.lit(str(otherwise)))


def _or_null(column: str) -> pl.Expr:
    return pl.when(pl.col(column) != "").then(column)


class Writer:
    """A `TraceWriter` of BurstGPT's CSV. The header is written at once.

    Rows dropped, by the first reason that fits: `before_day_zero`; `failure`, where asked; `no_model`;
    `unspellable_text` (a NUL or over MAX_TEXT_BYTES in model or session id); and for an ok row, as 0 would say that it
    failed, `no_response_tokens` (0 or unknown) and `request_tokens_unknown`.
    Notes: `stamps_floored` and `elapsed_rounded` to whole seconds; `elapsed_unknown`, written as 0; and on failed rows
    `failure_request_tokens_unknown` and `failure_response_tokens_lost`, written as 0.
    """

    def __init__(
        self, stream: BinaryIO, *, columns: Sequence[str], clock: TraceClock, drop_failures: bool, whole_seconds: bool
    ) -> None:
        self._stream = stream
        self._columns = columns
        self._zero_s = clock.zero_s
        self._drop_failures = drop_failures
        self._whole_seconds = whole_seconds
        self._rows_in = 0
        self._rows_written = 0
        self._dropped: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        stream.write((",".join(columns) + "\n").encode())

    def write(self, batch: pl.DataFrame) -> None:
        """Append the batch's rows, less those that the format cannot say."""
        kept = batch.with_columns(
            micros=((pl.col("received_at") - self._zero_s) * 1e6).round().cast(pl.Int64),
            is_ok=pl.col("outcome") == Outcome.OK.value,
        )
        reasons = self._reasons()
        # Most batches have no such row, which costs less to find out than a reason for each.
        if kept.select(pl.any_horizontal(condition.any() for condition in reasons.values())).item():
            kept, dropped = split(kept, reasons)
            self._dropped.update(dropped)
        self._rows_in += batch.height
        self._rows_written += kept.height
        self._note(kept)
        text = kept.select(self._spelling(kept)).write_csv(include_header=False, quote_style="necessary")
        self._stream.write(text.encode())

    def close(self) -> WriteReport:
        """Flush, and say what was done."""
        self._stream.flush()
        return WriteReport(self._rows_in, self._rows_written, dict(self._dropped), dict(self._notes))

    def _reasons(self) -> dict[str, pl.Expr]:
        """Why a row cannot be written."""
        unspellable = [
            pl.col(name).str.contains("\0", literal=True) | (pl.col(name).str.len_bytes() > MAX_TEXT_BYTES)
            for name in ("model", "session_id")
        ]
        return {
            "before_day_zero": pl.col("micros") < 0,
            "failure": ~pl.col("is_ok") & self._drop_failures,
            "no_model": pl.col("model").fill_null("") == "",
            "unspellable_text": pl.any_horizontal(unspellable).fill_null(False),
            "no_response_tokens": pl.col("is_ok") & (pl.col("response_tokens").fill_null(0) == 0),
            "request_tokens_unknown": pl.col("is_ok") & pl.col("request_tokens").is_null(),
        }

    def _note(self, kept: pl.DataFrame) -> None:
        notes = {
            "failure_request_tokens_unknown": ~pl.col("is_ok") & pl.col("request_tokens").is_null(),
            "failure_response_tokens_lost": ~pl.col("is_ok") & (pl.col("response_tokens") > 0),
        }
        if self._whole_seconds:
            notes["stamps_floored"] = pl.col("micros") % 1_000_000 != 0
        if "Elapsed time" in self._columns:
            notes["elapsed_unknown"] = pl.col("elapsed_s").is_null()
            notes["elapsed_rounded"] = pl.col("elapsed_s") != pl.col("elapsed_s").round()
        counts = kept.select(condition.sum().alias(name) for name, condition in notes.items()).row(0, named=True)
        self._notes.update({name: count for name, count in counts.items() if count})

    def _spelling(self, kept: pl.DataFrame) -> list[pl.Expr]:
        request = pl.col("request_tokens").fill_null(0)
        response = pl.when("is_ok").then("response_tokens").otherwise(0)
        columns = {
            "Timestamp": self._stamp(kept),
            "Session ID": _or_null("session_id"),
            "Elapsed time": pl.col("elapsed_s").fill_null(0).round().cast(pl.Int64),
            "Model": pl.col("model"),
            "Request tokens": request,
            "Response tokens": response,
            "Total tokens": request + response,
            "Log Type": pl.col("log_type"),
        }
        return [columns[name].alias(name) for name in self._columns]

    def _stamp(self, kept: pl.DataFrame) -> pl.Expr:
        micros = pl.col("micros")
        if self._whole_seconds:
            return micros // 1_000_000
        spelt = pl.lit(_seconds(kept["micros"].to_numpy()).cast(pl.String))
        if kept["micros"].is_between(1, 99).any():
            # Polars and Python write floats alike but for these.
            return micros.replace_strict(_SMALL_STAMPS, default=spelt, return_dtype=pl.String)
        return spelt
