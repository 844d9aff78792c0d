from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces.strategies import RECORDS
from tests.traces.test_burstgpt import real_head
from traces.batch import batch_from_records, empty_batch
from traces.codec import read_trace
from traces.record import LogType, Outcome, TraceRecord
from traces.table import READS, SCHEMA, Service, collect, services, view


def record(received_at: float, **fields: Any) -> TraceRecord:
    return TraceRecord(request_id="r", received_at=received_at, **fields)


def rows_of(*records: TraceRecord) -> list[dict[str, Any]]:
    return collect([batch_from_records(records)]).table.to_dicts()


@pytest.mark.parametrize("batches", [[], [empty_batch()], [batch_from_records([record(math.nan)])]])
def test_a_trace_without_rows_has_every_column(batches: list[pl.DataFrame]) -> None:
    assert collect(batches).table.schema == SCHEMA
    assert collect(batches).table.height == 0
    assert list(services(collect(batches).table, ["received_at"], 9)) == []


def test_rows_are_in_order_of_time_and_ties_in_the_order_they_came() -> None:
    stamps = [3.0, 1.0, 2.0, 1.0, 3.0]
    rows = rows_of(*(record(stamp, request_tokens=place) for place, stamp in enumerate(stamps)))
    assert [(row["received_at"], row["request_tokens"]) for row in rows] == [(1, 1), (1, 3), (2, 2), (3, 0), (3, 4)]


@pytest.mark.parametrize(
    ("stamp", "reason"),
    [
        (math.nan, "received_at: not a finite number"),
        (math.inf, "received_at: not a finite number"),
        (-math.inf, "received_at: not a finite number"),
        (253_402_300_800.0, "received_at: outside the years 1 to 9999"),
        (-62_135_596_801.0, "received_at: outside the years 1 to 9999"),
    ],
)
def test_a_row_without_a_usable_stamp_is_dropped_and_counted(stamp: float, reason: str) -> None:
    collected = collect([batch_from_records([record(stamp), record(5.0), record(stamp)])])
    assert (collected.rows_read, collected.dropped) == (3, {reason: 2})
    assert collected.table["received_at"].to_list() == [5.0]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("request_tokens", -1),
        ("response_tokens", 2**31),
        ("elapsed_s", math.nan),
        ("ttft_s", math.inf),
        ("tpot_s", -0.5),
        ("queue_s", 1e300),  # more than an f32 holds
        ("status", 2**40),
    ],
)
def test_a_value_that_cannot_be_is_unknown_and_counted(column: str, value: float) -> None:
    # An unknown value beside it is not counted.
    collected = collect([batch_from_records([record(1.0, **{column: value}), record(2.0, **{column: 0}), record(3.0)])])
    assert collected.blanked == {column: 1}
    assert collected.dropped == {}
    assert collected.table[column].to_list() == [None, 0, None]


def test_a_column_appears_when_its_first_value_does() -> None:
    parts = [record(1.0), record(2.0, ttft_s=0.5, session_id="s"), record(3.0), record(4.0, session_id="s")]
    table = collect(batch_from_records([part]) for part in parts).table
    assert table["ttft_s"].to_list() == [None, 0.5, None, None]
    assert [session is None for session in table["session"]] == [True, False, True, False]
    assert table["session"][1] == table["session"][3]


def test_a_batch_may_lack_columns_and_may_not_have_strange_ones() -> None:
    table = collect([pl.DataFrame({"received_at": [1.0], "model": ["m"]})]).table
    assert table.select("model", "log_type", "outcome", "origin", "status").row(0) == (
        "m", "API log", "ok", "client", None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="not columns of a trace record: tokens"):
        collect([pl.DataFrame({"received_at": [1.0], "tokens": [3]})])


@settings(max_examples=40, deadline=None)
@given(st.lists(RECORDS, max_size=20), st.integers(1, 20))
def test_it_holds_what_the_records_hold_however_the_batches_fall(records: list[TraceRecord], cut: int) -> None:
    whole = batch_from_records(records)
    collected = collect(whole[first : first + cut].select(READS) for first in range(0, whole.height, cut))
    table = collected.table
    assert (collected.rows_read, collected.dropped) == (len(records), {})
    assert table.schema == SCHEMA
    ordered = sorted(records, key=lambda record: record.received_at)
    for name in ("received_at", "model", "error_type", "endpoint", "upstream", "log_type", "outcome", "origin"):
        assert table[name].to_list() == [getattr(record, name) for record in ordered]
    for name in ("request_tokens", "response_tokens"):
        given_values = [getattr(record, name) for record in ordered]
        assert table[name].to_list() == [v if v is not None and v < 2**31 else None for v in given_values]
    for name in ("elapsed_s", "ttft_s"):
        most = float(np.finfo(np.float32).max)
        assert table[name].to_list() == [
            None if v is None or v > most else float(np.float32(v)) for v in (getattr(r, name) for r in ordered)
        ]
    names = [record.session_id for record in ordered]
    assert [session is None for session in table["session"]] == [name is None for name in names]
    assert table["session"].drop_nulls().n_unique() == len(set(names) - {None})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pl.Series([1, 2], dtype=pl.Int32), [1, 2]),
        (pl.Series([1, None], dtype=pl.Int32), [1.0, math.nan]),
        (pl.Series([None, 0.5], dtype=pl.Float32), [math.nan, 0.5]),
        (pl.Series([], dtype=pl.Float64), []),
    ],
)
def test_a_view_has_nan_for_unknown(values: pl.Series, expected: list[float]) -> None:
    np.testing.assert_array_equal(view(values), expected)


def test_a_view_of_known_numbers_is_the_column_itself() -> None:
    stamps = collect([batch_from_records([record(1.0), record(2.0)])]).table["received_at"]
    assert np.shares_memory(view(stamps), stamps.to_numpy(allow_copy=False))


def test_services_come_by_size_and_then_by_name() -> None:
    fields = [
        ("b", LogType.API),
        ("a", LogType.API),
        (None, LogType.API),
        ("b", LogType.CONVERSATION),
        (None, LogType.API),
    ]
    records = [record(float(at), model=model, log_type=log_type) for at, (model, log_type) in enumerate(fields)]
    table = collect([batch_from_records(records)]).table
    expected = [
        (Service(None, LogType.API, 2), [2.0, 4.0]),
        (Service("a", LogType.API, 1), [1.0]),
        (Service("b", LogType.CONVERSATION, 1), [3.0]),
        (Service("b", LogType.API, 1), [0.0]),
    ]
    got = [(service, rows["received_at"].to_list()) for service, rows in services(table, ["received_at"], 9)]
    assert got == expected
    assert [service for service, _ in services(table, ["received_at"], 2)] == [service for service, _ in expected[:2]]


@pytest.mark.parametrize(("name", "known"), [("BurstGPT_1_head.csv", 0), ("BurstGPT_3_head.csv", None)])
def test_a_real_head(name: str, known: int | None) -> None:
    batches = list(read_trace(real_head(name), batch_rows=37))
    collected = collect(batches)
    table = collected.table
    assert (collected.rows_read, collected.dropped, collected.blanked) == (sum(map(len, batches)), {}, {})
    assert table["received_at"].is_sorted()
    assert (table["elapsed_s"].count() == 0) == (known == 0)
    assert set(table["outcome"].unique()) <= {Outcome.OK.value, *Outcome}
