"""Trace files in and out: one way to read any of the formats, one way to write any of them.

    burstgpt          CSV, the eight columns of BurstGPT_3.csv                   traces/burstgpt.py
    burstgpt6         CSV, the six columns of BurstGPT_1.csv and BurstGPT_2.csv  traces/burstgpt.py
    parquet           every field of the record, typed columns                   traces/parquet.py
    jsonl             every field of the record, one JSON object a line          traces/jsonl.py
    azure             CSV of Azure's LLM inference traces, 2023 and 2024         traces/azure.py
    azure_multimodal  CSV of Azure's multimodal inference trace, 2025            traces/azure.py
    mooncake          JSON lines with prefix blocks, milliseconds                traces/mooncake.py
    aiperf            Mooncake's as AIPerf reads conversations: new tokens only  traces/mooncake.py
    bailian           JSON lines of Alibaba's Qwen traces: chats, seconds        traces/mooncake.py
    timed_trace       JSON lines as vLLM's benchmark takes them, seconds         traces/mooncake.py
    workload_trace    JSON lines as EvalScope takes them: whole request bodies   traces/evalscope.py

Any other CSV is read by a map of its columns (traces/mapped.py).

Reading yields batches (`traces.batch.SCHEMA`) and writing takes them, so that memory does not grow with the file. What
a format cannot say is dropped or simplified at writing, never guessed, and `WriteReport` counts it. What is wrong in a
file raises `TraceFormatError` at its first wrong line.
"""

from __future__ import annotations

import csv
import datetime
import re
import secrets
import zoneinfo
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, Protocol

import msgspec
import polars as pl

from traces.batch import SCHEMA
from traces.record import LogType, Origin, Outcome, TokenSource

FORMATS: Final = (
    "burstgpt",
    "burstgpt6",
    "parquet",
    "jsonl",
    "azure",
    "azure_multimodal",
    "mooncake",
    "aiperf",
    "bailian",
    "timed_trace",
    "workload_trace",
)
MAPPED: Final = "mapped"
"""The name under which a CSV file that was read by a column map is reported."""

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

AZURE_COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""The header of Azure's traces of 2023 and 2024; the multimodal one of 2025 has NumImages after the first."""

BLOCK_TOKENS_KEY: Final = "burstgate.block_tokens"
"""The key in a Parquet file's metadata for the tokens of one prefix block."""

_COMPRESSED: Final = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "zip": b"PK\x03\x04", "xz": b"\xfd7zX"}
"""How compressed files begin."""
CHUNK_BYTES: Final = 8 << 20
"""How much of a text file is held and parsed at once: some 50,000 BurstGPT rows."""
FIRST_CHUNK_BYTES: Final = 128 << 10
"""The same at a file's beginning, from where it doubles: a replay waits for its first rows only."""
SNIFFED_BYTES: Final = 1 << 20
"""How much of a file of JSON lines is looked at to tell its format."""
SHOWN_CHARACTERS: Final = 100
"""How much of a wrong value an error message shows."""


class TraceFormatError(ValueError):
    """A file is not the trace that it should be. The message names file, line, column, rule and value."""


BROKEN_PARQUET: Final = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""What polars raises at a damaged file; some damage makes it panic, which is no Exception of Python's."""


def broken_parquet(path: Path, error: BaseException) -> TraceFormatError:
    """The error for one of BROKEN_PARQUET, on one line."""
    return TraceFormatError(f"{path}: expected a Parquet file, got one where polars says: {shown_line(error)}")


class UnsortedTrace(TraceFormatError):
    """Rows are not in the order of time, and the format that is written demands it. The message names no file."""


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


def shown_line(error: BaseException) -> str:
    """What another library says, on one line, and not all of it when it is long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 2 * SHOWN_CHARACTERS else f"{text[: 2 * SHOWN_CHARACTERS]}..."


def split(batch: pl.DataFrame, reasons: Mapping[str, pl.Expr]) -> tuple[pl.DataFrame, Counter[str]]:
    """The rows to which no reason applies, and of the others how many were dropped for the first reason that fits."""
    reason = pl.coalesce(pl.when(condition).then(pl.lit(name)) for name, condition in reasons.items())
    rows = batch.with_columns(_reason=reason)
    dropped = Counter[str](rows["_reason"].drop_nulls().to_list())
    return rows.filter(pl.col("_reason").is_null()).drop("_reason"), dropped


class TimeOrder:
    """Refuses a row that is earlier than one before it, for the formats whose readers take rows as they come."""

    def __init__(self, format: str) -> None:
        self._format = format
        self._rows = 0
        self._last_s = float("-inf")

    def check(self, received_at: pl.Series) -> None:
        """Raise UnsortedTrace naming the first such row, counted from 1 over all batches."""
        if received_at.is_empty():
            return
        before = received_at.shift(1, fill_value=self._last_s)
        backwards = (received_at < before).arg_true()
        if len(backwards):
            row = int(backwards[0])
            raise UnsortedTrace(
                f"row {self._rows + row + 1}: column 'received_at': expected rows in the order of time, as"
                f" {self._format} demands, got {shown(received_at[row])} after {shown(before[row])}"
                " (`burstgate import` and `burstgate export` sort)"
            )
        self._rows += len(received_at)
        self._last_s = received_at[-1]


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
    first_at = stream.tell()
    size = min(FIRST_CHUNK_BYTES, CHUNK_BYTES)
    while block := stream.read(size):
        size = min(2 * size, CHUNK_BYTES)
        if not block.endswith(b"\n"):
            cut = block.rfind(b"\n") + 1
            end = stream.readline(max_line_bytes + 1)
            if len(block) - cut + len(end.removesuffix(b"\n")) > max_line_bytes:
                at = stream.tell() - len(end) - len(block) + cut
                if cut:
                    yield block[:cut]
                stream.seek(first_at)
                before = sum(part.count(b"\n") for part in _parts(stream, at - first_at))
                raise line_too_long(path, first_line + before, max_line_bytes, block[cut:] + end)
            block += end
        yield block


def _parts(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes."""
    while size and (part := stream.read(min(size, CHUNK_BYTES))):
        size -= len(part)
        yield part


def line_too_long(path: Path, line: int, max_line_bytes: int, start: bytes) -> TraceFormatError:
    """The error for a line over the limit; `start` is its beginning or all of it."""
    return TraceFormatError(
        f"{path}:{line}: expected a line of at most {max_line_bytes} bytes, got a longer one, {shown(start[:200])}"
    )


_WHERE: Final = re.compile(r"(?P<rule>.*?)(?: - at `\$\.(?P<column>\w+).*`)?", re.DOTALL)


def json_rows(
    path: Path, decoder: msgspec.json.Decoder[Any], max_line_bytes: int
) -> Iterator[tuple[list[Any], list[int]]]:
    """The rows of a file of JSON lines with the line of each, about a chunk of the file at a time. Blank lines are
    skipped, and a byte order mark.

    Raises TraceFormatError at the first line that is too long or that `decoder` refuses.
    """
    with path.open("rb") as stream:
        line = 1
        for chunk in line_chunks(stream, path, line, max_line_bytes):
            rows: list[Any] = []
            lines: list[int] = []
            for raw in chunk.removesuffix(b"\n").split(b"\n"):
                if len(raw) > max_line_bytes:
                    raise line_too_long(path, line, max_line_bytes, raw)
                text = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
                if text.strip():
                    try:
                        rows.append(decoder.decode(text))
                    except UnicodeDecodeError as error:
                        raise TraceFormatError(f"{path}:{line}: expected UTF-8, got {shown(raw)}") from error
                    except (msgspec.DecodeError, RecursionError) as error:
                        raise TraceFormatError(f"{path}:{line}: {_json_fault(error)}, in {shown(raw)}") from error
                    lines.append(line)
                line += 1
            if rows:
                yield rows, lines


def _json_fault(error: Exception) -> str:
    where = _WHERE.fullmatch(str(error))
    rule, column = (where["rule"], where["column"]) if where else (str(error), None)
    place = f"column '{column}': " if column else ""
    return place + (f"e{rule[1:]}" if rule.startswith("Expected") else f"expected a row of this format: {rule}")


def refused(path: Path, line: int, column: str, expected: str, value: object) -> TraceFormatError:
    """The error for one wrong value."""
    return TraceFormatError(f"{path}:{line}: column '{column}': expected {expected}, got {shown(value)}")


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
        magic = stream.read(4)
        if magic == b"PAR1":
            return "parquet"
        _refuse_compressed(magic, path)
        stream.seek(0)
        if stream.read(256).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            stream.seek(0)
            return _sniff_json(stream.read(SNIFFED_BYTES))
        stream.seek(0)
        names = read_header(stream, path)
    if set(COLUMNS_8) <= set(names):
        return "burstgpt"
    if set(COLUMNS_6) <= set(names):
        return "burstgpt6"
    if set(AZURE_COLUMNS) <= set(names):
        return "azure_multimodal" if "NumImages" in names else "azure"
    raise TraceFormatError(
        f"{path}:1: expected a Parquet file, a JSON object a line, or a CSV header with the columns"
        f" {','.join(COLUMNS_6)} or {','.join(COLUMNS_8)} or {','.join(AZURE_COLUMNS)}, got {shown(','.join(names))};"
        " another CSV needs a map of its columns"
    )


def _refuse_compressed(magic: bytes, path: Path) -> None:
    for name, start in _COMPRESSED.items():
        if magic.startswith(start):
            raise TraceFormatError(f"{path}: expected a trace that is not compressed, got {name}: unpack it first")


def _sniff_json(head: bytes) -> str:
    """The format of JSON lines, by the keys of the first; `head` may end inside a line.

    Mooncake's rows and vLLM's have the same keys: a timestamp with a decimal point is one in seconds.
    """
    keys = set(re.findall(rb'"(\w+)"\s*:', head.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")[0]))
    if b"request_id" in keys and b"received_at" in keys:
        return "jsonl"
    if b"body" in keys and b"timestamp" in keys:
        return "workload_trace"
    if b"input_length" not in keys:
        return "jsonl"
    if b"chat_id" in keys:
        return "bailian"
    if re.search(rb'"timestamp"\s*:\s*-?[0-9]+[.eE]', head):
        return "timed_trace"
    return "aiperf" if re.search(rb'"session_id"\s*:', head) else "mooncake"


def block_tokens(path: Path, *, format: str | None = None) -> int | None:
    """Tokens of one of the trace's prefix blocks; None where the file does not say.

    Parquet says it in its metadata (BLOCK_TOKENS_KEY). In Mooncake's kind of file the blocks cover the prompt, so the
    size follows from the lengths: 512 or 16 where it can be, else the power of two that fits the first rows.
    Raises TraceFormatError, OSError as `read_trace`.
    """
    from traces import mooncake

    name = sniff(path) if format is None else format
    if name == "parquet":
        try:
            said = pl.read_parquet_metadata(path).get(BLOCK_TOKENS_KEY, "")
        except BROKEN_PARQUET as error:
            raise broken_parquet(path, error) from error
        return int(said) if re.fullmatch("[1-9][0-9]{0,8}", said) else None
    if name in mooncake.SHAPES:
        return mooncake.block_tokens(next(mooncake.read(path, shape=name, clock=UNIX_CLOCK, dataset=""), None), name)
    return None


def read_trace(
    path: Path,
    *,
    format: str | None = None,
    clock: TraceClock = UNIX_CLOCK,
    batch_rows: int = 65_536,
    dataset: str | None = None,
    columns: Mapping[str, str] | None = None,
    fields: Collection[str] | None = None,
) -> Iterator[pl.DataFrame]:
    """The trace in `path` as batches of 1 to `batch_rows` rows, in the file's order.

    format: one of FORMATS; None finds it out (`sniff`).
    clock: what a relative timestamp's 0 is, and the time zone of a date that has none; Parquet and JSONL carry epoch
    seconds.
    dataset: the data set's name, for `run_id` and the ids of imported rows; None is the file's name without its suffix.
    columns: for a CSV of any other kind, which of its columns is what (`traces.mapped`).
    fields: of the record; the batches have these columns and no others, which is faster in BurstGPT's files and in
    Parquet: what they do not come from is not looked at there. None is all.
    Raises ValueError for an unknown format or batch_rows < 1, TraceFormatError while iterating at the first wrong line,
    OSError where the file cannot be read.
    """
    # The codecs stand on this module's vocabulary, so it imports them only here.
    from traces import azure, burstgpt, evalscope, jsonl, mapped, mooncake, parquet

    wanted = SCHEMA.keys() if fields is None else fields
    if batch_rows < 1:
        raise ValueError(f"batch_rows: expected an integer >= 1, got {batch_rows}")
    # A file's name may hold bytes that are no text; a run_id may not.
    title = dataset or path.stem.encode("utf-8", "replace").decode()
    if columns is not None:
        format = MAPPED
    elif format is not None:
        _known_format(format)
    if format is not None and path.is_file():
        with path.open("rb") as stream:
            _refuse_compressed(stream.read(4), path)
    match format or sniff(path):
        case "mapped":
            frames = mapped.read(path, columns=columns or {}, clock=clock, dataset=title)
        case "parquet":
            frames = parquet.read(path, batch_rows=batch_rows, fields=wanted)
        case "jsonl":
            frames = jsonl.read(path)
        case "azure" | "azure_multimodal":
            frames = azure.read(path, clock=clock, dataset=title)
        case "workload_trace":
            frames = evalscope.read(path, clock=clock, dataset=title)
        case "burstgpt" | "burstgpt6" as name:
            required = COLUMNS_8 if name == "burstgpt" else COLUMNS_6
            frames = burstgpt.read(path, required=required, clock=clock, dataset=title, fields=wanted)
        case name:
            frames = mooncake.read(path, shape=name, clock=clock, dataset=title)
    if fields is not None:
        frames = (frame.select(name for name in SCHEMA if name in fields) for frame in frames)
    return (part for frame in frames for part in frame.iter_slices(batch_rows))


def open_writer(
    stream: BinaryIO,
    *,
    format: str,
    clock: TraceClock = UNIX_CLOCK,
    failures: Literal["keep", "drop"] = "keep",
    stamps: Literal["auto", "int", "float"] = "auto",
    block_tokens: int | None = None,
    salt: bytes | None = None,
) -> TraceWriter:
    """A writer of `format` to `stream`, which the caller opened and closes.

    clock: what BurstGPT's Timestamp 0 is. Mooncake's kind of file starts at 0 with its first row.
    failures: "drop" leaves out rows whose outcome is not `ok` and counts them as `failure`.
    stamps: BurstGPT's Timestamp as whole seconds (rounded down) or with microseconds; "auto" is what the published
    files of that form have, `float` for eight columns and `int` for six. The other formats take neither.
    block_tokens: tokens of one of the rows' prefix blocks, where that is known. salt: what the block ids in this file
    are made from; None draws one. Both are for the formats that have blocks.
    Raises ValueError for an unknown format.
    """
    from traces import azure, burstgpt, evalscope, jsonl, mooncake, parquet

    drop_failures = failures == "drop"
    match _known_format(format):
        case "parquet":
            return parquet.Writer(stream, drop_failures=drop_failures)
        case "jsonl":
            return jsonl.Writer(stream, drop_failures=drop_failures)
        case "azure" | "azure_multimodal" as name:
            return azure.Writer(stream, has_images=name == "azure_multimodal", drop_failures=drop_failures)
        case "workload_trace":
            blocks = mooncake.Blocks("workload_trace", block_tokens, _salt(salt))
            return evalscope.Writer(stream, blocks=blocks, clock=clock, drop_failures=drop_failures)
        case "mooncake" | "aiperf" | "bailian" | "timed_trace" as name:
            blocks = mooncake.Blocks(name, block_tokens, _salt(salt))
            return mooncake.Writer(stream, shape=name, blocks=blocks, clock=clock, drop_failures=drop_failures)
        case name:
            is_long = name == "burstgpt"
            return burstgpt.Writer(
                stream,
                columns=COLUMNS_8 if is_long else COLUMNS_6,
                clock=clock,
                drop_failures=drop_failures,
                whole_seconds=stamps == "int" or (stamps == "auto" and not is_long),
            )


def _salt(given: bytes | None) -> bytes:
    return secrets.token_bytes(16) if given is None else given


def _known_format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {name!r}")
    return name
