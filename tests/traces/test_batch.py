from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.traces.strategies import RECORDS
from traces.batch import SCHEMA, batch_from_records, complete_batch, empty_batch, records_from_batch
from traces.record import TraceRecord


def test_the_schema_has_the_records_fields_in_order() -> None:
    assert tuple(SCHEMA) == TraceRecord.__struct_fields__


@given(rows=st.lists(RECORDS, max_size=5))
def test_records_survive_a_batch(rows: list[TraceRecord]) -> None:
    batch = batch_from_records(rows)
    assert dict(batch.schema) == SCHEMA
    assert list(records_from_batch(batch)) == rows


def test_missing_columns_get_the_records_defaults() -> None:
    batch = complete_batch(pl.DataFrame({"received_at": [5], "request_id": ["r"]}))
    assert dict(batch.schema) == SCHEMA
    assert list(records_from_batch(batch)) == [TraceRecord(request_id="r", received_at=5.0)]
    assert complete_batch(empty_batch()).equals(empty_batch())


def test_a_column_that_no_record_has_is_refused() -> None:
    with pytest.raises(ValueError, match="not columns of a trace record: Timestamp"):
        complete_batch(pl.DataFrame({"Timestamp": [5]}))
