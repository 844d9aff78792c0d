"""A Parquet file piece by piece: polars encodes each row group, this module puts them into one file.

    "PAR1"
    the column chunks of the first row group, of the second, ...      as polars wrote them into a file of one row group
    footer: FileMetaData in Thrift's compact protocol, its length (4 bytes, little-endian), "PAR1"

Polars writes a whole file at once only. Its files of one row group are taken apart here: chunks are copied, and their
places in the new file go into one footer. What a footer says else stays as polars wrote it, but for page indexes, which
are optional and are left out. A column that has one value all through a row group is encoded once and its chunk used
again for as long as it goes on so: most columns of most traces are such, and polars takes 10 to 100 ns a row for each.

Formats: https://parquet.apache.org/docs/file-format/metadata/ (parquet.thrift) and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, Literal

import polars as pl

_MAGIC: Final = b"PAR1"

# Thrift's types, in the compact protocol's numbers.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)

Struct = dict[int, tuple[int, Any]]
"""Thrift's struct: by a field's number its type and value. A list's value is (type, values), a double's its 8 bytes."""

# Fields in parquet.thrift.
_FILE_ROWS, _FILE_GROUPS = 3, 4
_GROUP_COLUMNS, _GROUP_BYTES, _GROUP_ROWS, _GROUP_OFFSET, _GROUP_STORED_BYTES = 1, 2, 3, 5, 6
_CHUNK_OFFSET, _CHUNK_META = 2, 3
_META_BYTES, _META_STORED_BYTES, _META_DATA_AT, _META_DICTIONARY_AT = 6, 7, 9, 11


@dataclass(frozen=True, slots=True)
class _Chunk:
    """An encoded column of a row group. meta: its ColumnMetaData, with offsets from the chunk's beginning."""

    data: bytes
    meta: Struct


class RowGroups:
    """Writes frames of one schema as the row groups of a Parquet file. Raises polars' errors and the stream's OSError.

    compression and statistics: as polars' `write_parquet` takes them. metadata: goes into the footer.
    """

    def __init__(
        self,
        stream: BinaryIO,
        schema: Mapping[str, pl.DataType],
        *,
        compression: Literal["lz4", "zstd"],
        statistics: bool,
        metadata: Mapping[str, str],
    ) -> None:
        self._stream = stream
        self._compression: Literal["lz4", "zstd"] = compression
        self._statistics = statistics
        whole = self._encoded(pl.DataFrame(schema=schema), metadata)
        self._footer = _footer(whole)
        self._groups: list[bytes] = []
        self._rows = 0
        self._at = len(_MAGIC)
        self._repeated: dict[str, tuple[tuple[int, object], _Chunk]] = {}
        """By column: rows and value of the last row group where it was one, and the chunk of that."""
        stream.write(_MAGIC)

    def write(self, frame: pl.DataFrame) -> None:
        """Append a row group of a row or more."""
        values = {column.name: (frame.height, repeated_value(column)) for column in frame}
        chunks = {
            name: self._repeated[name][1]
            for name, value in values.items()
            if value[1] is not VARIES and name in self._repeated and self._repeated[name][0] == value
        }
        fresh = [name for name in frame.columns if name not in chunks]
        if fresh:
            for name, chunk in zip(fresh, _chunks(self._encoded(frame.select(fresh))), strict=True):
                chunks[name] = chunk
                if values[name][1] is not VARIES:
                    self._repeated[name] = (values[name], chunk)
        self._append([chunks[name] for name in frame.columns], frame.height)

    def close(self) -> None:
        """Write the footer; the stream stays open."""
        fields = self._footer | {_FILE_ROWS: (_I64, self._rows)}
        head = {number: field for number, field in fields.items() if number < _FILE_GROUPS}
        tail = {number: field for number, field in fields.items() if number > _FILE_GROUPS}
        out = bytearray()
        last = _write_fields(out, head, 0)
        _write_field_head(out, _FILE_GROUPS, _LIST, last)
        _write_list_head(out, _STRUCT, len(self._groups))
        out += b"".join(self._groups)
        _write_fields(out, tail, _FILE_GROUPS)
        out.append(0)
        self._stream.write(b"".join((out, len(out).to_bytes(4, "little"), _MAGIC)))

    def _encoded(self, frame: pl.DataFrame, metadata: Mapping[str, str] | None = None) -> bytes:
        whole = io.BytesIO()
        frame.write_parquet(
            whole,
            compression=self._compression,
            statistics=self._statistics,
            row_group_size=max(1, frame.height),
            metadata=dict(metadata) if metadata else None,
        )
        return whole.getvalue()

    def _append(self, chunks: Sequence[_Chunk], rows: int) -> None:
        first_at = self._at
        columns: list[Struct] = []
        for chunk in chunks:
            moved = {
                number: (kind, value + self._at if number in (_META_DATA_AT, _META_DICTIONARY_AT) else value)
                for number, (kind, value) in chunk.meta.items()
            }
            # The chunk's own offset is deprecated: writers say 0.
            columns.append({_CHUNK_OFFSET: (_I64, 0), _CHUNK_META: (_STRUCT, moved)})
            self._at += len(chunk.data)
        group: Struct = {
            _GROUP_COLUMNS: (_LIST, (_STRUCT, columns)),
            _GROUP_BYTES: (_I64, sum(chunk.meta[_META_BYTES][1] for chunk in chunks)),
            _GROUP_ROWS: (_I64, rows),
            _GROUP_OFFSET: (_I64, first_at),
            _GROUP_STORED_BYTES: (_I64, self._at - first_at),
        }
        # As bytes, since a footer of objects would take tens of times as much memory until the file's end.
        out = bytearray()
        _write_value(out, _STRUCT, group)
        self._groups.append(bytes(out))
        self._rows += rows
        self._stream.writelines(chunk.data for chunk in chunks)


VARIES: Final = object()
"""Of a column: it has not the same value in all rows, or is not looked at."""


def repeated_value(column: pl.Series) -> object:
    """The value of every row of a column of texts, integers or booleans, None where all are null; else VARIES.

    Columns of other types are only looked at for nulls. The column has a row or more.
    """
    if nulls := column.null_count():
        return None if nulls == len(column) else VARIES
    if column.dtype != pl.String and column.dtype != pl.Boolean and not column.dtype.is_integer():
        return VARIES
    first = column[0]
    is_same = column[-1] == first and column[len(column) // 2] == first and bool((column == first).all())
    return first if is_same else VARIES


def _footer(whole: bytes) -> Struct:
    size = int.from_bytes(whole[-8:-4], "little")
    value: Struct = _Reader(whole, len(whole) - 8 - size).struct()
    return value


def _chunks(whole: bytes) -> list[_Chunk]:
    """The columns of a file of one row group."""
    ((_, (_, (group,))),) = (_footer(whole)[_FILE_GROUPS],)
    chunks = []
    for column in group[_GROUP_COLUMNS][1][1]:
        meta: Struct = column[_CHUNK_META][1]
        places = [meta[number][1] for number in (_META_DATA_AT, _META_DICTIONARY_AT) if number in meta]
        first_at = min(places)
        own = {
            number: (kind, value - first_at if number in (_META_DATA_AT, _META_DICTIONARY_AT) else value)
            for number, (kind, value) in meta.items()
        }
        chunks.append(_Chunk(whole[first_at : first_at + meta[_META_STORED_BYTES][1]], own))
    return chunks


# Thrift's compact protocol


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at

    def struct(self) -> Struct:
        fields: Struct = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            fields[number] = (kind, None if kind in (_TRUE, _FALSE) else self._value(kind))
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (_I16, _I32, _I64):
            return self._signed()
        if kind == _BINARY:
            return self._take(self._unsigned())
        if kind == _STRUCT:
            return self.struct()
        if kind == _BYTE:
            return self._byte()
        if kind == _DOUBLE:
            return self._take(8)
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            of = head & 15
            return of, [self._byte() if of in (_TRUE, _FALSE) else self._value(of) for _ in range(count)]
        raise ValueError(f"thrift: expected a type that Parquet's footers have, got {kind}")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _take(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) > 127:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)


def _write_fields(out: bytearray, fields: Struct, last: int) -> int:
    """Returns the last field's number, from which the next one's is counted."""
    for number, (kind, value) in sorted(fields.items()):
        _write_field_head(out, number, kind, last)
        if kind not in (_TRUE, _FALSE):
            _write_value(out, kind, value)
        last = number
    return last


def _write_field_head(out: bytearray, number: int, kind: int, last: int) -> None:
    if 0 < number - last < 16:
        out.append((number - last) << 4 | kind)
    else:
        out.append(kind)
        _write_signed(out, number)


def _write_list_head(out: bytearray, kind: int, count: int) -> None:
    if count < 15:
        out.append(count << 4 | kind)
    else:
        out.append(15 << 4 | kind)
        _write_unsigned(out, count)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    if kind in (_I16, _I32, _I64):
        _write_signed(out, value)
    elif kind == _BINARY:
        _write_unsigned(out, len(value))
        out += value
    elif kind == _STRUCT:
        _write_fields(out, value, 0)
        out.append(0)
    elif kind == _BYTE:
        out.append(value)
    elif kind == _DOUBLE:
        out += value
    else:  # a list or a set
        of, values = value
        _write_list_head(out, of, len(values))
        for each in values:
            if of in (_TRUE, _FALSE):
                out.append(each)
            else:
                _write_value(out, of, each)


def _write_signed(out: bytearray, value: int) -> None:
    _write_unsigned(out, value << 1 ^ value >> 63)


def _write_unsigned(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
