"""Trace files in and out: one way to read any of the formats, one way to write any of them.

    burstgpt    CSV, the eight columns of BurstGPT_3.csv                         traces/burstgpt.py
    burstgpt6   CSV, the six columns of BurstGPT_1.csv and BurstGPT_2.csv        traces/burstgpt.py
    parquet     every field of the record, typed columns                         traces/parquet.py
    jsonl       every field of the record, one JSON object a line                traces/jsonl.py

Reading yields batches (`traces.batch.SCHEMA`) and writing takes them, so that memory does not grow with the file. What
a format cannot say is dropped or simplified at writing, never guessed, and `WriteReport` counts it. What is wrong in a
file raises `TraceFormatError` at its first wrong line.
"""

from __future__ import annotations

import csv
import datetime
import zoneinfo
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal, Protocol

import polars as pl

from traces.record import LogType, Origin, Outcome, TokenSource

FORMATS: Final = ("burstgpt", "burstgpt6", "parquet", "jsonl")

COLUMNS_8: Final = (
    "Timestamp",
    "Session ID",
    "Elapsed time",
    "Model",
    "Request tokens",
    "Response tokens",
    "Total tokens",
    "Log Type",
)
"""The header of BurstGPT_3.csv."""
COLUMNS_6: Final = tuple(name for name in COLUMNS_8 if name not in ("Session ID", "Elapsed time"))
"""The header of BurstGPT_1.csv and BurstGPT_2.csv."""

CHUNK_BYTES: Final = 4 << 20
"""How much of a text file is held and parsed at once: some 50,000 BurstGPT rows."""
SHOWN_CHARACTERS: Final = 100
"""How much of a wrong value an error message shows."""


class TraceFormatError(ValueError):
    """A file is not the trace that it should be. The message names file, line, column, rule and value."""


@dataclass(frozen=True, slots=True)
class TraceClock:
    """Where a trace's Timestamp 0 lies: local midnight of `day_zero` in `timezone`, an IANA name such as Europe/Rome.

    Raises ValueError for a time zone that this machine does not know.
    """

    day_zero: datetime.date
    timezone: str

    def __post_init__(self) -> None:
        self._midnight()

    @property
    def zero_s(self) -> float:
        """Timestamp 0 in epoch seconds. Where clocks skip that midnight, the instant of the change."""
        return self._midnight().timestamp()

    def _midnight(self) -> datetime.datetime:
        try:
            # UTC is spelt out so that it works where no time zone database is installed.
            zone = datetime.UTC if self.timezone == "UTC" else zoneinfo.ZoneInfo(self.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"timezone: expected an IANA time zone name, got {self.timezone!r}") from error
        return datetime.datetime.combine(self.day_zero, datetime.time.min, zone)


UNIX_CLOCK: Final = TraceClock(datetime.date(1970, 1, 1), "UTC")
"""Timestamps are epoch seconds."""


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What became of the rows given to a writer: `rows_in == rows_written + sum(dropped.values())`.

    dropped: rows left out, by reason. notes: rows written with something simplified, by what. Neither holds zeros.
    """

    rows_in: int
    rows_written: int
    dropped: Mapping[str, int]
    notes: Mapping[str, int]


class TraceWriter(Protocol):
    """Takes batches in order; the file is whole when `close` has returned."""

    def write(self, batch: pl.DataFrame) -> None:
        """Append the batch's rows."""

    def close(self) -> WriteReport:
        """Write what is left and say what was done. The stream is flushed and stays open. Call it once."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What every value of a column must satisfy; `holds` is a boolean expression, null counts as false."""

    column: str
    expected: str
    holds: pl.Expr


def require(frame: pl.DataFrame, rules: Sequence[Rule], path: Path, lines: Sequence[int]) -> None:
    """Raise TraceFormatError for the first row that breaks a rule, and of its broken rules for the first.

    lines: the line in the file of each row of `frame`.
    """
    verdicts = frame.select(rule.holds.fill_null(False).alias(str(index)) for index, rule in enumerate(rules))
    broken = [(int((~held).arg_true()[0]), index) for index, held in enumerate(verdicts) if not held.all()]
    if broken:
        row, index = min(broken)
        rule = rules[index]
        got = shown(frame[rule.column][row])
        raise TraceFormatError(f"{path}:{lines[row]}: column '{rule.column}': expected {rule.expected}, got {got}")


def shown(value: object) -> str:
    """A wrong value as an error message quotes it: on one line, and not all of it when it is long."""
    text = repr(value) if isinstance(value, str | bytes) else f"'{value}'"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _is_one_of(column: str, values: type[LogType | Outcome | TokenSource | Origin]) -> Rule:
    names = [str(value) for value in values]
    return Rule(column, f"one of {', '.join(names)}", pl.col(column).is_in(names))


RECORD_RULES: Final = (
    Rule("request_id", "a request id", pl.col("request_id") != ""),
    Rule(
        "received_at",
        "epoch seconds in the years 1 to 9999",
        pl.col("received_at").is_between(-62_135_596_800, 253_402_300_800, closed="left"),
    ),
    *(
        Rule(name, "a number of tokens >= 0, or null", pl.col(name).is_null() | (pl.col(name) >= 0))
        for name in ("request_tokens", "response_tokens", "cached_tokens")
    ),
    *(
        Rule(
            name,
            "a finite number of seconds >= 0, or null",
            pl.col(name).is_null() | ((pl.col(name) >= 0) & pl.col(name).is_finite()),
        )
        for name in ("elapsed_s", "ttft_s", "tpot_s", "queue_s")
    ),
    _is_one_of("log_type", LogType),
    _is_one_of("outcome", Outcome),
    _is_one_of("token_source", TokenSource),
    _is_one_of("origin", Origin),
    *(Rule(name, "a value, not null", pl.col(name).is_not_null()) for name in ("endpoint", "stream", "attempts")),
)
"""What the types of a batch do not say: checked where a format that carries every field is read."""


def line_chunks(stream: BinaryIO, path: Path, first_line: int, max_line_bytes: int) -> Iterator[bytes]:
    """The rest of a text file in chunks of whole lines; only the last may lack its line end.

    Holds about CHUNK_BYTES. Raises TraceFormatError when a line has not ended after `max_line_bytes`; a shorter line
    than CHUNK_BYTES may pass, so that the caller checks those it sees.
    """
    carry = b""
    line = first_line
    while block := stream.read(CHUNK_BYTES):
        cut = block.rfind(b"\n") + 1
        if cut:
            chunk = carry + block[:cut]
            yield chunk
            line += chunk.count(b"\n")
            carry = block[cut:]
        else:
            carry += block
        if len(carry) > max_line_bytes:
            raise line_too_long(path, line, max_line_bytes, carry)
    if carry:
        yield carry


def line_too_long(path: Path, line: int, max_line_bytes: int, start: bytes) -> TraceFormatError:
    """The error for a line over the limit; `start` is its beginning or all of it."""
    return TraceFormatError(
        f"{path}:{line}: expected a line of at most {max_line_bytes} bytes, got a longer one, {shown(start[:200])}"
    )


def read_header(stream: BinaryIO, path: Path) -> list[str]:
    """The names in a CSV file's first line; the stream then stands at line 2. A byte order mark is left out.

    Raises TraceFormatError when there is no such line.
    """
    limit = 1 << 16
    raw = stream.readline(limit)
    if not raw:
        raise TraceFormatError(f"{path}:1: expected a header line, got an empty file")
    if len(raw) == limit:
        raise line_too_long(path, 1, limit, raw)
    try:
        return next(csv.reader([raw.decode("utf-8-sig").rstrip("\r\n")], strict=True), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceFormatError(f"{path}:1: expected a CSV header in UTF-8, got {shown(raw)}") from error


def sniff(path: Path) -> str:
    """The format of a trace file, by what it holds: Parquet's magic, a JSON object, or the names of a CSV header.

    Raises TraceFormatError naming what was seen and what is known; OSError where the file cannot be read.
    """
    with path.open("rb") as stream:
        if stream.read(4) == b"PAR1":
            return "parquet"
        stream.seek(0)
        if stream.read(256).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            return "jsonl"
        stream.seek(0)
        names = read_header(stream, path)
    if set(COLUMNS_8) <= set(names):
        return "burstgpt"
    if set(COLUMNS_6) <= set(names):
        return "burstgpt6"
    raise TraceFormatError(
        f"{path}:1: expected a Parquet file, a JSON object a line, or a CSV header with the columns"
        f" {','.join(COLUMNS_6)} or {','.join(COLUMNS_8)}, got {shown(','.join(names))}"
    )


def read_trace(
    path: Path,
    *,
    format: str | None = None,
    clock: TraceClock = UNIX_CLOCK,
    batch_rows: int = 65_536,
    dataset: str | None = None,
) -> Iterator[pl.DataFrame]:
    """The trace in `path` as batches of 1 to `batch_rows` rows, in the file's order.

    format: one of FORMATS; None finds it out (`sniff`).
    clock: what BurstGPT's Timestamp 0 is; the other formats carry epoch seconds.
    dataset: the data set's name, for `run_id` and the ids of BurstGPT rows; None is the file's name without its suffix.
    Raises ValueError for an unknown format or batch_rows < 1, TraceFormatError while iterating at the first wrong line,
    OSError where the file cannot be read.
    """
    # The codecs stand on this module's vocabulary, so it imports them only here.
    from traces import burstgpt, jsonl, parquet

    if batch_rows < 1:
        raise ValueError(f"batch_rows: expected an integer >= 1, got {batch_rows}")
    name = sniff(path) if format is None else _known_format(format)
    if name == "parquet":
        frames = parquet.read(path, batch_rows=batch_rows)
    elif name == "jsonl":
        frames = jsonl.read(path)
    else:
        required = COLUMNS_8 if name == "burstgpt" else COLUMNS_6
        # A file's name may hold bytes that are no text; a run_id may not.
        stem = path.stem.encode("utf-8", "replace").decode()
        frames = burstgpt.read(path, required=required, clock=clock, dataset=dataset or stem)
    return (part for frame in frames for part in frame.iter_slices(batch_rows))


def open_writer(
    stream: BinaryIO,
    *,
    format: str,
    clock: TraceClock = UNIX_CLOCK,
    failures: Literal["keep", "drop"] = "keep",
    stamps: Literal["auto", "int", "float"] = "auto",
) -> TraceWriter:
    """A writer of `format` to `stream`, which the caller opened and closes.

    clock: what BurstGPT's Timestamp 0 is.
    failures: "drop" leaves out rows whose outcome is not `ok` and counts them as `failure`.
    stamps: BurstGPT's Timestamp as whole seconds (rounded down) or with microseconds; "auto" is what the published
    files of that form have, `float` for eight columns and `int` for six. Parquet and JSONL take neither.
    Raises ValueError for an unknown format.
    """
    from traces import burstgpt, jsonl, parquet

    drop_failures = failures == "drop"
    match _known_format(format):
        case "parquet":
            return parquet.Writer(stream, drop_failures=drop_failures)
        case "jsonl":
            return jsonl.Writer(stream, drop_failures=drop_failures)
        case name:
            is_long = name == "burstgpt"
            return burstgpt.Writer(
                stream,
                columns=COLUMNS_8 if is_long else COLUMNS_6,
                clock=clock,
                drop_failures=drop_failures,
                whole_seconds=stamps == "int" or (stamps == "auto" and not is_long),
            )


def _known_format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {name!r}")
    return name
