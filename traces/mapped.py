"""Any CSV file with a header, read by a map of its columns, as GuideLLM's column mapper does.

    --map timestamp=TIMESTAMP,prompt_tokens=ContextTokens,output_tokens=GeneratedTokens

    timestamp      seconds from the clock's zero, or a date and time as in ISO 8601: `T` or a space between them, up to
                   nine decimals (microseconds are kept), `Z` or an offset; without one it is in the clock's time zone
    timestamp_ms   the same in milliseconds, as a number; one of the two must be there
    prompt_tokens  integer >= 0, `50.0` too; empty is unknown; must be there
    output_tokens  the same; 0 is an answer without tokens, not a failure
    session        text; empty is none
    model          text; empty is unknown
    elapsed_s      seconds from submission to the last byte; empty is unknown

The record's own names (`request_tokens`, `response_tokens`, `session_id`, `received_at`) and GuideLLM's
(`prompt_tokens_count`, `output_tokens_count`) mean the same. Columns are found by name, others ignored; a byte order
mark, LF or CRLF, quoted fields (RFC 4180) and blank lines are taken, and rows in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import polars as pl

from traces.batch import complete_batch
from traces.burstgpt import TIMESTAMP_LIMIT_S, request_ids, text_rows
from traces.codec import Rule, TraceClock, TraceFormatError, read_header, require, shown
from traces.record import LogType, Origin, TokenSource

TARGETS: Final = ("timestamp", "timestamp_ms", "prompt_tokens", "output_tokens", "session", "model", "elapsed_s")
_OTHER_NAMES: Final = {
    "received_at": "timestamp",
    "request_tokens": "prompt_tokens",
    "prompt_tokens_count": "prompt_tokens",
    "response_tokens": "output_tokens",
    "output_tokens_count": "output_tokens",
    "session_id": "session",
}
_DATE: Final = (
    r"^(?<date>[0-9]{4}-[0-9]{2}-[0-9]{2})[ T](?<time>[0-9]{2}:[0-9]{2}:[0-9]{2})"
    r"(?:\.(?<fraction>[0-9]{1,9}))?(?:Z|(?<sign>[+-])(?<hours>[0-9]{2}):?(?<minutes>[0-9]{2}))?$"
)
_MICROS: Final = "\0micros"
"""A column of ours beside the file's: no header has a NUL."""


def parse_columns(text: str) -> dict[str, str]:
    """`target=column,...` as a map of TARGETS to the file's columns.

    Raises ValueError for anything else, an unknown or repeated target, or one that is missing.
    """
    columns: dict[str, str] = {}
    for part in text.split(","):
        name, equals, column = part.partition("=")
        target = _OTHER_NAMES.get(name.strip(), name.strip())
        if not equals or not column or target not in TARGETS:
            raise ValueError(f"map: expected TARGET=COLUMN,... with targets {', '.join(TARGETS)}, got {shown(part)}")
        if target in columns:
            raise ValueError(f"map: expected '{target}' once, got {shown(columns[target])} and {shown(column)}")
        columns[target] = column
    if ("timestamp" in columns) == ("timestamp_ms" in columns) or "prompt_tokens" not in columns:
        raise ValueError(
            f"map: expected prompt_tokens and one of timestamp and timestamp_ms, got {shown(', '.join(columns))}"
        )
    return columns


def read(
    path: Path, *, columns: Mapping[str, str], clock: TraceClock, dataset: str, may_be_empty: bool = True
) -> Iterator[pl.DataFrame]:
    """The file's rows as batches in the file's order, some tens of thousands of rows each.

    columns: as `parse_columns` returns. dataset: becomes `run_id` and part of each `request_id`.
    may_be_empty: whether an empty number of tokens is an unknown one.
    Raises TraceFormatError at the first wrong line.
    """
    first_row = 0
    with path.open("rb") as stream:
        header = read_header(stream, path)
        for column in columns.values():
            if header.count(column) != 1:
                raise TraceFormatError(
                    f"{path}:1: column '{column}': expected once, got {header.count(column)} times"
                    f" in {shown(','.join(header))}"
                )
        rules = list(_rules(columns, may_be_empty))
        for frame, lines in _rows(stream, header, set(columns.values()), path):
            timed = frame.with_columns(_micros(frame, columns, clock).alias(_MICROS))
            require(timed, rules, path, lines)
            yield _to_batch(timed, columns, dataset, first_row)
            first_row += frame.height


def _rows(
    stream: BinaryIO, header: list[str], wanted: set[str], path: Path
) -> Iterator[tuple[pl.DataFrame, Sequence[int]]]:
    """The wanted columns as text without spaces around it, with each row's line in the file."""
    places = {name: index for index, name in enumerate(header) if name in wanted}
    for frame, lines in text_rows(stream, header, places, path):
        yield frame.select(pl.all().str.strip_chars()), lines


def _rules(columns: Mapping[str, str], may_be_empty: bool) -> Iterator[Rule]:
    if "timestamp" in columns:
        expected = f"seconds >= 0 and < {TIMESTAMP_LIMIT_S}, or a date and time as 2024-05-10 00:00:00.009930+00:00"
        yield Rule(columns["timestamp"], expected, pl.col(_MICROS).is_not_null())
    else:
        expected = f"milliseconds >= 0 and < {TIMESTAMP_LIMIT_S}000"
        yield Rule(columns["timestamp_ms"], expected, pl.col(_MICROS).is_not_null())
    for target in ("prompt_tokens", "output_tokens"):
        if target in columns:
            number = r"^[0-9]{1,18}(\.0*)?$"
            yield Rule(
                columns[target],
                "an integer >= 0" + (", or nothing" if may_be_empty else ""),
                pl.col(columns[target]).str.contains(f"^$|{number}" if may_be_empty else number),
            )
    if "elapsed_s" in columns:
        column = pl.col(columns["elapsed_s"])
        seconds = column.cast(pl.Float64, strict=False)
        holds = (column == "") | ((seconds >= 0) & seconds.is_finite())
        yield Rule(columns["elapsed_s"], "a finite number of seconds >= 0, or nothing", holds)


def _micros(frame: pl.DataFrame, columns: Mapping[str, str], clock: TraceClock) -> pl.Series:
    """Epoch microseconds, null where the text is no time."""
    unit_us = 1_000_000 if "timestamp" in columns else 1_000
    text = frame[columns["timestamp" if "timestamp" in columns else "timestamp_ms"]].alias("text")
    number = text.cast(pl.Float64, strict=False)
    within = (number >= 0) & (number * unit_us < TIMESTAMP_LIMIT_S * 1_000_000)
    relative_us = pl.select(pl.when(within).then((number * unit_us).round())).to_series().cast(pl.Int64)
    micros = relative_us + round(clock.zero_s * 1e6)
    if "timestamp_ms" in columns or not number.null_count():
        return micros
    return pl.select(pl.coalesce(micros, date_micros(text, clock.timezone))).to_series()


def date_micros(text: pl.Series, timezone: str) -> pl.Series:
    """Epoch microseconds of dates and times; a text that is none is null. timezone: of those that do not say."""
    parts = text.str.extract_groups(_DATE).struct.unnest()
    naive = (pl.col("date") + "T" + pl.col("time")).str.to_datetime("%Y-%m-%dT%H:%M:%S", strict=False, time_unit="us")
    # Where clocks go back the first of two equal times is meant; where they go forward there is no such time.
    local = naive.dt.replace_time_zone(timezone, ambiguous="earliest", non_existent="null").dt.epoch("us")
    east_us = (pl.col("hours").cast(pl.Int64) * 60 + pl.col("minutes").cast(pl.Int64)) * 60_000_000
    zoned = naive.dt.epoch("us") - pl.when(pl.col("sign") == "-").then(-east_us).otherwise(east_us).fill_null(0)
    fraction_us = pl.col("fraction").str.pad_end(6, "0").str.slice(0, 6).cast(pl.Int64).fill_null(0)
    is_zoned = pl.col("sign").is_not_null() | text.str.ends_with("Z")
    return parts.select(pl.when(is_zoned).then(zoned).otherwise(local) + fraction_us).to_series()


def _to_batch(frame: pl.DataFrame, columns: Mapping[str, str], dataset: str, first_row: int) -> pl.DataFrame:
    micros = frame[_MICROS].to_numpy()
    text = {target: pl.when(pl.col(column) != "").then(pl.col(column)) for target, column in columns.items()}
    counts = {
        name: text[target].str.extract("^([0-9]+)").cast(pl.Int64).alias(name)
        for name, target in (("request_tokens", "prompt_tokens"), ("response_tokens", "output_tokens"))
        if target in text
    }
    log_type = pl.lit(LogType.API.value)
    if "session" in text:
        is_api = text["session"].is_null()
        log_type = pl.when(is_api).then(pl.lit(LogType.API.value)).otherwise(pl.lit(LogType.CONVERSATION.value))
    return complete_batch(
        frame.select(
            request_ids(micros, first_row, dataset),
            # numpy divides to the nearest float64, polars multiplies by an inexact 1e-6.
            pl.Series("received_at", micros / 1e6),
            *counts.values(),
            *([text["session"].alias("session_id")] if "session" in text else []),
            *([text["model"].alias("model")] if "model" in text else []),
            *([text["elapsed_s"].cast(pl.Float64).alias("elapsed_s")] if "elapsed_s" in text else []),
            log_type.alias("log_type"),
            pl.lit(TokenSource.USAGE.value).alias("token_source"),
            pl.lit(Origin.IMPORTED.value).alias("origin"),
            pl.lit(dataset).alias("run_id"),
        )
    )
