"""Traces as JSON lines: one object a line with every field of the record by its name; unknown is null.

    {"request_id":"0190...","received_at":1700000000.25,"session_id":null,...}

Nothing is lost in either direction. Reading is strict: UTF-8, a field that no record has, a missing required field or a
value of another type raises; a field that is missing and has a default gets it. Blank lines are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, get_args

import msgspec
import polars as pl

from traces.batch import SCHEMA
from traces.codec import RECORD_RULES, TraceFormatError, WriteReport, line_chunks, line_too_long, require, shown
from traces.record import Outcome, TraceRecord

MAX_LINE_BYTES: Final = 1 << 24
"""Longest line: a record with prefix blocks of a prompt of a million tokens has about 2 MB."""
WRITE_ROWS: Final = 8_192
"""Rows that are Python objects at one time while writing."""

_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_UInt64 = Annotated[int, msgspec.Meta(ge=0)]  # msgspec has no upper bound past int64: `_decode` checks it


def _json_type(name: str, declared: Any) -> Any:
    """A record field's type, with the range that its column has."""
    if name == "prefix_blocks":
        return tuple[_UInt64, ...] | None
    if SCHEMA[name] == pl.Int64:
        return _Int64 | None if get_args(declared) else _Int64
    return declared


# The record itself is array-like for the journal; here it is an object with names.
_Line = msgspec.defstruct(
    "_Line",
    [
        (field.name, _json_type(field.name, field.type))
        if field.default is msgspec.NODEFAULT
        else (field.name, _json_type(field.name, field.type), field.default)
        for field in msgspec.structs.fields(TraceRecord)
    ],
    frozen=True,
    forbid_unknown_fields=True,
)
_decoder: Final = msgspec.json.Decoder(_Line)
_encoder: Final = msgspec.json.Encoder()
_WHERE: Final = re.compile(r"(?P<rule>.*?)(?: - at `\$\.(?P<column>\w+).*`)?", re.DOTALL)


def read(path: Path) -> Iterator[pl.DataFrame]:
    """The file's rows as batches in the file's order, of about a chunk of the file each.

    Raises TraceFormatError at the first wrong line.
    """
    with path.open("rb") as stream:
        line = 1
        for chunk in line_chunks(stream, path, line, MAX_LINE_BYTES):
            rows: list[msgspec.Struct] = []
            lines: list[int] = []
            for raw in chunk.removesuffix(b"\n").split(b"\n"):
                if raw.strip():
                    rows.append(_decode(raw, line, path))
                    lines.append(line)
                line += 1
            if rows:
                batch = _to_batch(rows)
                require(batch, RECORD_RULES, path, lines)
                yield batch


def _decode(raw: bytes, line: int, path: Path) -> msgspec.Struct:
    if len(raw) > MAX_LINE_BYTES:
        raise line_too_long(path, line, MAX_LINE_BYTES, raw)
    try:
        row: Any = _decoder.decode(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw)
    except UnicodeDecodeError as error:
        raise TraceFormatError(f"{path}:{line}: expected UTF-8, got {shown(raw)}") from error
    except msgspec.DecodeError as error:
        where = _WHERE.fullmatch(str(error))
        rule, column = (where["rule"], where["column"]) if where else (str(error), None)
        place = f"column '{column}': " if column else ""
        said = f"e{rule[1:]}" if rule.startswith("Expected") else f"expected a trace record: {rule}"
        raise TraceFormatError(f"{path}:{line}: {place}{said}, in {shown(raw)}") from error
    if row.prefix_blocks and max(row.prefix_blocks) >= 1 << 64:
        raise TraceFormatError(
            f"{path}:{line}: column 'prefix_blocks': expected integers < 2^64, got '{max(row.prefix_blocks)}'"
        )
    return row  # type: ignore[no-any-return]


def _to_batch(rows: list[msgspec.Struct]) -> pl.DataFrame:
    columns = zip(*map(msgspec.structs.astuple, rows), strict=True)
    return pl.DataFrame(
        [pl.Series(name, column, dtype) for (name, dtype), column in zip(SCHEMA.items(), columns, strict=True)]
    )


class Writer:
    """A `TraceWriter` of JSON lines."""

    def __init__(self, stream: BinaryIO, *, drop_failures: bool) -> None:
        self._stream = stream
        self._drop_failures = drop_failures
        self._rows_in = 0
        self._rows_written = 0

    def write(self, batch: pl.DataFrame) -> None:
        """Append the batch's rows."""
        kept = batch.filter(pl.col("outcome") == Outcome.OK.value) if self._drop_failures else batch
        self._rows_in += batch.height
        self._rows_written += kept.height
        for part in kept.select(list(SCHEMA)).iter_slices(WRITE_ROWS):
            self._stream.write(_encoder.encode_lines(part.rows(named=True)))

    def close(self) -> WriteReport:
        """Flush, and say what was done."""
        self._stream.flush()
        dropped = self._rows_in - self._rows_written
        return WriteReport(self._rows_in, self._rows_written, {"failure": dropped} if dropped else {}, {})
