"""The rows of a replay: a trace's, the same at a process's arrivals, or a profile's, made as they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from replay.arrivals import ArrivalOptions
from replay.rows import open_rows
from replay.source import SourceOptions
from tests.traces.test_generation import PROFILE
from traces.codec import COLUMNS_6, TraceFormatError
from traces.generation import generate
from traces.profile import LEVELS, MONDAY_S, Service, Slot, WorkloadProfile
from traces.record import LogType


def trace(tmp_path: Path, stamps: list[int]) -> Path:
    path = tmp_path / "trace.csv"
    rows = "".join(f"{stamp},m{stamp % 2},1,2,3,API log\n" for stamp in stamps)
    path.write_text(f"{','.join(COLUMNS_6)}\n{rows}")
    return path


def taken(rows: Iterable[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(list(rows))


def test_a_target_rate_counts_the_rows_by_their_stamps(tmp_path: Path) -> None:
    """And by a filter's columns: half of the rows are of m1, one in 2 s, and twice that is asked for."""
    path = trace(tmp_path, list(range(400)))
    for models, expected in (((), 1.0), (("m1",), 0.5)):
        found = taken(open_rows(path, SourceOptions(target_rps=2 * expected, models=models), ArrivalOptions()))
        assert found.height == 2 * 400 * expected
    # What the counting does not look at is still said, by the reading.
    path.write_text(path.read_text().replace("1,2,3,API log", "1,2,9,API log"))
    with pytest.raises(TraceFormatError, match=":2: column 'Total tokens'"):
        list(open_rows(path, SourceOptions(target_rps=2.0), ArrivalOptions()))


def test_a_profiles_rows_are_those_that_generate_makes() -> None:
    source = SourceOptions(seed=3, duration_s=200.0, start_s=1000.0)
    found = taken(open_rows(None, source, ArrivalOptions(profile=PROFILE)))
    assert found.equals(taken(generate(PROFILE, seed=3, duration_s=200.0, start_s=MONDAY_S + 1000.0)))
    assert found["session_id"].n_unique() > 10


@pytest.mark.parametrize(
    ("source", "arrivals"),
    [
        ({"target_rps": 30.0}, {}),
        ({"target_rps": 60.0, "speed": 2.0}, {}),  # which the schedule plays twice as fast
        ({}, {"rate_rps": 30.0}),
        ({}, {"process": "modeled", "rate_rps": 30.0}),
        ({}, {"process": "gamma", "rate_rps": 30.0, "shape": 0.5}),
    ],
)
def test_a_profiles_rows_have_the_rate_asked_for(source: dict[str, Any], arrivals: dict[str, Any]) -> None:
    options = ArrivalOptions(profile=PROFILE, **arrivals)
    found = taken(open_rows(None, SourceOptions(duration_s=2000.0, **source), options))
    assert found.height == pytest.approx(60_000, rel=0.15)


def test_a_profiles_rows_are_endless_and_lazy() -> None:
    batches = list(islice(open_rows(None, SourceOptions(), ArrivalOptions(profile=PROFILE)), 3))
    assert sum(batch.height for batch in batches) < 300_000


def test_filters_take_a_profiles_rows_too() -> None:
    source = SourceOptions(duration_s=300.0, models=("model-1",), model_map={"model-1": "llama"})
    found = taken(open_rows(None, source, ArrivalOptions(profile=PROFILE)))
    assert set(found["model"]) == {"llama"}


def weekly() -> WorkloadProfile:
    """One request a second in Monday's first hour and in Thursday's; one in 100 s else."""
    slots = tuple(Slot(1.0 if hour in (0, 72) else 0.01, 1.0, 1.0, 9) for hour in range(168))
    return WorkloadProfile(1, 1, 1.0, False, LEVELS, (Service(0, LogType.API, 1, 0.0, 0.0, slots),))


@pytest.mark.parametrize(("start_h", "rows"), [(0, 3600), (1, 36), (72, 3600), (71.5, 1818)])
def test_start_is_an_hour_of_the_week(start_h: float, rows: int) -> None:
    source = SourceOptions(start_s=start_h * 3600, duration_s=3600.0)
    found = taken(open_rows(None, source, ArrivalOptions(profile=weekly())))
    assert found.height == pytest.approx(rows, abs=4 * rows**0.5)


def test_a_traces_rows_at_a_profiles_hours(tmp_path: Path) -> None:
    """Its first stamp is a Monday, 0:30: half an hour of 1 request/s, then one in 100 s."""
    stamp = int(MONDAY_S) + 1800
    path = trace(tmp_path, [stamp + row for row in range(1900)])
    found = taken(open_rows(path, SourceOptions(), ArrivalOptions("modeled", profile=weekly())))
    at_s = found["received_at"].to_numpy() - stamp
    assert np.sum(at_s < 1800) == pytest.approx(1800, abs=4 * 1800**0.5)
    assert at_s[-1] > 2500


@pytest.mark.parametrize(
    ("has_trace", "source", "arrivals", "message"),
    [
        (False, {}, {}, "trace: expected a file, or a profile to make rows of, got neither"),
        (True, {}, {"profile": PROFILE}, "profile: expected without a trace or with the process modeled, got .* trace"),
        (True, {}, {"rate_rps": 5.0}, "rate: expected with a process or a profile, got 5 with a trace's own arrivals"),
        (False, {"target_rps": 1.0}, {"profile": PROFILE, "rate_rps": 1.0}, "target rps: expected without a rate"),
        (False, {"start_s": 1e12}, {"profile": PROFILE}, "start: expected epoch seconds"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, has_trace: bool, source: dict[str, Any], arrivals: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_rows(trace(tmp_path, [1, 2]) if has_trace else None, SourceOptions(**source), ArrivalOptions(**arrivals))
