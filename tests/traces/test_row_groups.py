"""Row groups that polars encoded, put together as one Parquet file."""

from __future__ import annotations

import io
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces.strategies import RECORDS
from traces.batch import SCHEMA, batch_from_records
from traces.record import TraceRecord
from traces.row_groups import VARIES, RowGroups, repeated_value


def file_of(groups: list[pl.DataFrame], schema: dict[str, pl.DataType], **options: Any) -> bytes:
    stream = io.BytesIO()
    chosen: dict[str, Any] = {"compression": "lz4", "statistics": False, "metadata": {}} | options
    writer = RowGroups(stream, schema, **chosen)
    for group in groups:
        writer.write(group)
    writer.close()
    return stream.getvalue()


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.lists(RECORDS, min_size=1, max_size=4), max_size=5),
    compression=st.sampled_from(["lz4", "zstd"]),
    statistics=st.booleans(),
)
def test_what_is_written_is_read(groups: list[list[TraceRecord]], compression: str, statistics: bool) -> None:
    frames = [batch_from_records(rows) for rows in groups]
    whole = file_of(frames, SCHEMA, compression=compression, statistics=statistics, metadata={"a": "é"})
    assert pl.read_parquet(whole).equals(pl.concat([pl.DataFrame(schema=SCHEMA), *frames]))
    assert pl.read_parquet_schema(io.BytesIO(whole)) == SCHEMA
    assert pl.read_parquet_metadata(io.BytesIO(whole))["a"] == "é"


def test_a_value_that_repeats_is_encoded_once_and_only_while_it_does() -> None:
    schema = {"a": pl.String(), "b": pl.Int64(), "c": pl.Boolean(), "d": pl.Float64(), "e": pl.List(pl.UInt64())}
    rows: list[dict[str, list[Any]]] = [
        {"a": ["x", "x"], "b": [1, 1], "c": [True, True], "d": [0.0, 0.0], "e": [None, None]},
        {"a": ["x", "x"], "b": [1, 1], "c": [True, True], "d": [-0.0, 0.0], "e": [None, None]},
        {"a": ["x", "y"], "b": [2, 2], "c": [False, False], "d": [None, None], "e": [[1], []]},
        {"a": ["x", "x"], "b": [None, None], "c": [True, True], "d": [None, None], "e": [None, None]},
        # Fewer rows: the same value in another chunk.
        {"a": ["x"], "b": [1], "c": [None], "d": [0.0], "e": [None]},
    ]
    frames = [pl.DataFrame(each, schema=schema) for each in rows]
    back = pl.read_parquet(file_of(frames, schema))
    assert back.equals(pl.concat(frames))
    assert [str(value) for value in back["d"]] == ["0.0", "0.0", "-0.0", "0.0", "None", "None", "None", "None", "0.0"]
    text = pl.DataFrame({"a": ["a text that would be compressed"] * 3})
    once, twice = (len(file_of([text] * n, {"a": pl.String()}, compression="zstd")) for n in (1, 2))
    assert once < twice < 2 * once


def test_more_row_groups_than_a_short_list_holds() -> None:
    frame = pl.DataFrame({"a": [1, 2]})
    whole = file_of([frame] * 300, {"a": pl.Int64()})
    assert pl.read_parquet(whole)["a"].to_list() == [1, 2] * 300
    # Any part can be taken by its row group's place.
    assert pl.scan_parquet(io.BytesIO(whole)).slice(597, 3).collect()["a"].to_list() == [2, 1, 2]


def test_statistics_are_kept_where_they_are_asked_for() -> None:
    frames = [pl.DataFrame({"a": [1, 2]}), pl.DataFrame({"a": [30, 40]})]
    bare, full = (file_of(frames, {"a": pl.Int64()}, statistics=asked) for asked in (False, True))
    assert len(bare) < len(full)
    assert pl.scan_parquet(io.BytesIO(full)).filter(pl.col("a") > 20).collect()["a"].to_list() == [30, 40]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        (["x", "x"], pl.String, "x"),
        (["x", "y", "x"], pl.String, VARIES),
        (["x", "x", "y", "x", "x", "x", "x"], pl.String, VARIES),
        (["x", None], pl.String, VARIES),
        ([None, None], pl.String, None),
        ([7], pl.Int64, 7),
        ([False, False], pl.Boolean, False),
        ([1.0, 1.0], pl.Float64, VARIES),  # 0.0 and -0.0 are equal and not the same
        ([None], pl.Float64, None),
        ([[1], [1]], pl.List(pl.UInt64), VARIES),
        ([None, None], pl.List(pl.UInt64), None),
    ],
)
def test_repeated_value(values: list[Any], dtype: pl.DataType, expected: object) -> None:
    assert repeated_value(pl.Series(values, dtype=dtype)) is expected or (
        repeated_value(pl.Series(values, dtype=dtype)) == expected != VARIES
    )
