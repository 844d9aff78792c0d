"""Which arrival process a replay gets, rate curves from files, and a trace's rows on other times."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.arrivals import ArrivalOptions, modeled, open_process, read_curve, retime
from traces.arrivals import Process, arrival_times_s, steady, take_until
from traces.batch import complete_batch
from traces.generation import generate
from traces.profile import LEVELS as PROFILE_LEVELS
from traces.profile import Service, Slot, WorkloadProfile
from traces.record import LogType

HOUR_S = 3600.0
MONDAY_S = 4 * 24 * HOUR_S


def trace(n: int, rows_each: int = 1000) -> list[pl.DataFrame]:
    frame = pl.DataFrame({"request_id": [f"r{row}" for row in range(n)], "received_at": np.arange(n) + 500.0})
    return list(complete_batch(frame).iter_slices(rows_each))


def profile(*services: list[Slot]) -> WorkloadProfile:
    made = (Service(number, LogType.API, 1, 0.0, 0.0, tuple(slots)) for number, slots in enumerate(services))
    return WorkloadProfile(1, 1, 1.0, False, PROFILE_LEVELS, tuple(made))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"process": "constant", "rate_rps": 3.0}, steady(3.0, math.inf)),
        ({"process": "poisson", "rate_rps": 3.0}, steady(3.0, 1.0)),
        ({"process": "gamma", "rate_rps": 3.0, "shape": 0.2}, steady(3.0, 0.2)),
        # alpha 0.5 and beta 2 as a rate: a mean gap of 0.25 s.
        ({"process": "modeled"}, steady(4.0, 0.5)),
        ({"process": "modeled", "rate_rps": 100.0}, steady(100.0, 0.5)),
        ({"process": "modeled", "profile": profile([Slot(2.0, 0.3, 0.4, 9)])}, steady(2.0, 0.3)),
    ],
)
def test_processes(options: dict[str, Any], expected: Process | None) -> None:
    assert open_process(ArrivalOptions(**options)) == expected


def test_services_of_a_profile_add_up() -> None:
    # Dispersions add up by rate: (3 / 0.5 + 1 / 1) / 4.
    process = modeled(profile([Slot(3.0, 0.5, 1.0, 9)], [Slot(1.0, 1.0, 1.0, 9)]))
    assert process.rates_rps == (4.0,)
    assert process.shapes == pytest.approx((4 / 7,))
    assert modeled(profile([Slot(0.0, 0.5, 1.0, 0)], [Slot(1.0, 2.0, 1.0, 9)])) == steady(1.0, 2.0)


@pytest.mark.parametrize("start_s", [MONDAY_S, MONDAY_S + 0.5 * HOUR_S, MONDAY_S + 167.25 * HOUR_S, 0.0])
def test_a_profiles_hours_are_found_by_the_clock(start_s: float) -> None:
    """Every hour of the week has its own rate, the hour's number; whole weeks are looked through from the start."""
    process = modeled(profile([Slot(float(hour), 1.0, 1.0, 9) for hour in range(168)]), start_s=start_s)
    seen = {}
    for segment in islice(process.segments(), 400):
        middle_s = start_s + (segment.start_s + segment.end_s) / 2
        hour = int((middle_s - MONDAY_S) // HOUR_S) % 168
        assert segment.rate_rps == hour
        seen[hour] = segment.end_s - segment.start_s
    assert set(seen) == set(range(168))
    assert process.mean_rps == pytest.approx(167 / 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("time_s,rps\n0,5\n", ((0.0,), (5.0,))),
        ("\ufefftime_s,rps\r\n0,5\r\n60,0.5\r\n", ((0.0, 60.0), (5.0, 0.5))),
        ('rps, time_s ,note\n"5",0,start\n\n0,1e3,end\n', ((0.0, 1000.0), (5.0, 0.0))),
    ],
)
def test_curves(tmp_path: Path, text: str, expected: tuple[tuple[float, ...], ...]) -> None:
    path = tmp_path / "curve.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_curve(path, shape=0.5) == Process(expected[0], expected[1], (0.5,) * len(expected[0]))
    options = ArrivalOptions("curve", rate_rps=10.0, curve=path)
    scaled = open_process(options)
    assert scaled is not None
    assert scaled.mean_rps == pytest.approx(10.0)
    assert set(scaled.shapes) == {1.0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"curve\.csv:1: expected the columns time_s,rps"),
        (b"time,rps\n0,1\n", r":1: expected the columns time_s,rps, got 'time,rps'"),
        (b"time_s,rps\n", "expected a row with rps > 0, got none"),
        (b"time_s,rps\n0,0\n9,0\n", "expected a row with rps > 0, got none"),
        (b"time_s,rps\n1,5\n", r":2: column 'time_s': expected 0 in the first row, got 1"),
        (b"time_s,rps\n0,5\n9,1\n9,2\n", r":4: column 'time_s': expected above 9, as times ascend, got 9"),
        (b"time_s,rps\n0,5\n9\n", ":3: expected 2 fields, got 1"),
        (b"time_s,rps\n0,-5\n", r":2: column 'rps': expected 0 to 1e\+07, got -5"),
        (b"time_s,rps\n0,1e99\n", r":2: column 'rps': expected 0 to 1e\+07, got 1e\+99"),
        (b"time_s,rps\n0,nan\n", ":2: column 'rps': expected a number, got 'nan'"),
        (b"time_s,rps\n0,five\n", ":2: column 'rps': expected a number, got 'five'"),
        (b"time_s,rps\n0,\xff\n", "expected CSV in UTF-8"),
        (b'time_s,rps\n0,"5\n', "expected CSV in UTF-8"),
    ],
)
def test_wrong_curves(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "curve.csv"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_curve(path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"process": "uniform"}, "process: expected one of trace, constant, .* got 'uniform'"),
        ({"process": "poisson"}, "rate: expected with the process poisson, got none"),
        ({"process": "gamma", "rate_rps": 1.0}, "shape: expected with the process gamma"),
        ({"process": "gamma", "rate_rps": 1.0, "shape": 0.0}, "shape: expected 0.001"),
        ({"process": "gamma", "rate_rps": 1.0, "shape": math.nan}, "shape: .* got nan"),
        ({"process": "poisson", "rate_rps": math.nan}, "rate: .* got nan"),
        ({"process": "poisson", "rate_rps": 1.0, "shape": 2.0}, "shape: .* got it with poisson"),
        ({"process": "curve"}, "curve: expected a file"),
        ({"process": "poisson", "rate_rps": 1.0, "curve": Path("x")}, "curve: .* got poisson"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArrivalOptions(**wrong)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9), st.sampled_from([0.2, 1.0, math.inf]), st.integers(0, 2**40))
def test_retimed_rows_are_the_same_rows_at_the_processs_arrivals(
    n: int, rows_each: int, shape: float, seed: int
) -> None:
    process = steady(5.0, shape)
    found = pl.concat([*retime(trace(n, rows_each), process, np.random.default_rng(seed)), *trace(1)]).head(n)
    expected_s = take_until(arrival_times_s(process.segments(), np.random.default_rng(seed)))(1e4)[:n]
    assert found["received_at"].to_numpy() - 500 == pytest.approx(expected_s, abs=1e-6)
    assert found["request_id"].to_list() == [f"r{row}" for row in range(n)]


def test_a_process_that_ends_ends_the_trace() -> None:
    process = Process((0.0, 3.0), (2.0, 0.0), (math.inf, math.inf))
    for rows_each in (1, 4, 1000):
        found = pl.concat(retime(trace(100, rows_each), process, np.random.default_rng(0)))
        assert found["received_at"].to_list() == [500.0, 500.5, 501.0, 501.5, 502.0, 502.5]


def test_a_generated_profile_can_be_retimed() -> None:
    rows = retime(
        generate(profile([Slot(2.0, 1.0, 1.0, 9)]), seed=0, rows=1000), steady(50.0, 0.3), np.random.default_rng(1)
    )
    stamps_s = pl.concat(rows)["received_at"].to_numpy()
    assert len(stamps_s) == 1000
    assert stamps_s[-1] - stamps_s[0] == pytest.approx(20, rel=0.4)
