"""Stored runs, on both databases."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from storage.engine import downgrade, upgrade
from storage.errors import DatabaseUnavailable
from storage.query import Filter, count
from storage.runs import Run, RunConflict, check_new, read_runs, store_run
from traces.record import Origin, TraceRecord

RUN = Run(
    "r-1", 1_700_000_000.5, "http://h:8000", "m", 3, 2, "missed", '{"speed": 2.0}', '{"ok": 2, "error": "\\u0000"}'
)
RECORDS = [
    TraceRecord(f"018bcfe5-687d-7000-8000-{number:012x}", 1_700_000_000.5 + number, origin=Origin.REPLAY, run_id="r-1")
    for number in range(3)
]


def test_a_run_comes_back_with_its_requests(engine: sa.Engine) -> None:
    assert read_runs(engine) == []
    assert store_run(engine, RUN, RECORDS) == 3
    (found,) = read_runs(engine)
    assert json.loads(found.summary) == json.loads(RUN.summary)
    assert json.loads(found.options) == {"speed": 2.0}
    assert found == Run(**{**_fields(RUN), "options": found.options, "summary": found.summary})
    assert count(engine, Filter(run_ids=("r-1",), origins=("replay",))) == 3


def _fields(run: Run) -> dict[str, Any]:
    return dataclasses.asdict(run)


def test_a_run_is_stored_once(engine: sa.Engine) -> None:
    check_new(engine, "r-1")
    store_run(engine, RUN, [])
    with pytest.raises(RunConflict, match="run id 'r-1': expected a new one"):
        store_run(engine, RUN, RECORDS)
    with pytest.raises(RunConflict, match="run id 'r-1': expected a new one"):
        check_new(engine, "r-1")
    assert count(engine, Filter()) == 0


def test_requests_that_are_there_are_not_doubled(engine: sa.Engine) -> None:
    store_run(engine, RUN, RECORDS[:2])
    again = Run(**{**_fields(RUN), "run_id": "r-2"})
    assert store_run(engine, again, RECORDS) == 1
    assert count(engine, Filter()) == 3


def test_a_run_whose_samples_break_off_is_not_stored(engine: sa.Engine) -> None:
    def broken() -> Iterator[TraceRecord]:
        yield RECORDS[0]
        raise ValueError("s:2: expected a sample")

    with pytest.raises(ValueError, match="s:2"):
        store_run(engine, RUN, broken())
    assert (read_runs(engine), count(engine, Filter())) == ([], 0)


def test_the_newest_run_comes_first(engine: sa.Engine) -> None:
    for number in range(3):
        store_run(engine, Run(**{**_fields(RUN), "run_id": f"r-{number}", "started_at": float(number)}), [])
    assert [run.run_id for run in read_runs(engine)] == ["r-2", "r-1", "r-0"]
    assert [run.run_id for run in read_runs(engine, "r-1")] == ["r-1"]


def test_the_migration_goes_down_and_keeps_the_requests(engine: sa.Engine) -> None:
    store_run(engine, RUN, RECORDS)
    downgrade(engine, "0001")
    assert "runs" not in sa.inspect(engine).get_table_names()
    with pytest.raises(DatabaseUnavailable, match="burstgate db upgrade"):
        read_runs(engine)
    assert count(engine, Filter()) == 3
    upgrade(engine)
    assert read_runs(engine) == []
