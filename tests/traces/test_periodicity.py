from __future__ import annotations

import csv
from collections import Counter
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces.test_burstgpt import real_head
from traces.batch import batch_from_records, complete_batch
from traces.codec import read_trace
from traces.periodicity import Week, autocorrelation, describe_periodicity, dominant_periods
from traces.record import LogType, TraceRecord
from traces.table import Service, clock_s, collect

UTC_ZONE = ZoneInfo("UTC")
BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone: ZoneInfo = UTC_ZONE) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


def table_of(stamps_s: list[float], **fields: Any) -> pl.DataFrame:
    return collect([batch_from_records(TraceRecord("r", stamp, **fields) for stamp in stamps_s)]).table


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-2e9, 4e9), min_size=1, max_size=5),
    st.sampled_from(
        ["UTC", "Asia/Shanghai", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"]
    ),
)
def test_the_clock_is_the_zone_s(stamps_s: list[float], name: str) -> None:
    zone = ZoneInfo(name)
    expected = [
        stamp + datetime.fromtimestamp(stamp // 900 * 900, zone).utcoffset().total_seconds()  # type: ignore[union-attr]
        for stamp in stamps_s
    ]
    assert clock_s(np.array(stamps_s), zone).tolist() == expected


def test_the_clock_at_both_ends_of_the_calendar() -> None:
    ends = np.array([-62_135_596_800.0, 253_402_300_799.0])
    assert clock_s(ends, ZoneInfo("UTC")).tolist() == ends.tolist()
    assert np.abs(clock_s(ends, ZoneInfo("America/New_York")) - ends).max() < 86_400


def test_weeks_begin_on_monday_and_end_where_the_trace_does() -> None:
    # A Saturday and the Tuesday after it.
    stamps = [at("2024-03-02T00:00"), at("2024-03-02T23:59"), at("2024-03-05T12:00")]
    (whole, service) = describe_periodicity(table_of(stamps, model="m"), UTC_ZONE)
    assert (
        whole.weeks
        == service.weeks
        == (
            Week("2024-02-26", (None, None, None, None, None, 2, 0)),
            Week("2024-03-04", (0, 1, None, None, None, None, None)),
        )
    )
    assert (whole.service, service.service) == (None, Service("m", LogType.API, 3))


def test_a_day_begins_at_local_midnight() -> None:
    (whole, _) = describe_periodicity(table_of([at("2024-03-01T23:30")]), ZoneInfo("Asia/Shanghai"))
    assert whole.weeks == (Week("2024-02-26", (None, None, None, None, None, 1, None)),)
    assert (whole.requests_by_hour, whole.periods, whole.autocorrelation_bound) == ((), (), None)


@pytest.mark.parametrize(
    ("day", "samples"),
    [
        ("2024-03-30", {2: 1}),
        ("2024-03-31", {2: 0}),  # clocks go from 2 to 3
        ("2024-10-27", {2: 2}),  # and from 3 back to 2
    ],
)
def test_days_on_which_clocks_change(day: str, samples: dict[int, int]) -> None:
    first, last = at(f"{day}T00:00", BERLIN), at(f"{day}T23:59:59", BERLIN)
    (whole, _) = describe_periodicity(table_of([first, last]), BERLIN)
    expected = dict.fromkeys(range(24), 1) | samples
    assert {box.hour: box.hours for box in whole.requests_by_hour} == {h: n for h, n in expected.items() if n}


def test_boxes_are_of_whole_hours_and_know_the_empty_ones() -> None:
    # 0:30 to 3:30 on one day: the hours 1 and 2 are whole; 2 is empty.
    day = at("2024-03-02T00:00")
    stamps = [day + 1800, day + 3600, day + 3700, day + 3 * 3600 + 1800]
    (whole, _) = describe_periodicity(table_of(stamps, request_tokens=10, response_tokens=None), UTC_ZONE)
    assert [(box.hour, box.hours, box.mean, box.p50, box.max) for box in whole.requests_by_hour] == [
        (1, 1, 2.0, 2.0, 2.0), (2, 1, 0.0, 0.0, 0.0),
    ]  # fmt: skip
    assert [box.mean for box in whole.request_tokens_by_hour] == [20.0, 0.0]
    assert [box.mean for box in whole.response_tokens_by_hour] == [0.0, 0.0]
    assert whole.peak_to_trough is None


@pytest.mark.parametrize("stamps", [[], [0.0, 2e11]])
def test_no_rows_and_a_span_beyond_any_calendar_have_no_periodicity(stamps: list[float]) -> None:
    assert describe_periodicity(table_of(stamps), UTC_ZONE) == ()


def counts_of(rng: np.random.Generator, days: int, daily: float, weekly: float = 0.0) -> np.ndarray[Any, Any]:
    hour = np.arange(days * 24)
    rate = 100 * (1 + daily * np.sin(2 * np.pi * hour / 24) + weekly * np.sin(2 * np.pi * hour / 168))
    return rng.poisson(rate)


@pytest.mark.parametrize("seed", range(5))
def test_a_day_and_a_week_are_found(seed: int) -> None:
    periods = dominant_periods(counts_of(np.random.default_rng(seed), 84, 0.5, 0.3), 3600)
    assert [period.period_s / 3600 for period in periods[:2]] == pytest.approx([24, 168])
    day, week = periods[:2]
    # Of sqrt(100 (1 + d + w)) the first order is 10 (1 + d / 2 + w / 2): the shares are nearly d^2 and w^2.
    assert day.power / week.power == pytest.approx(0.25 / 0.09, rel=0.2)
    assert 0.5 < day.autocorrelation < 1
    assert max(day.p_value, week.p_value) < 1e-6


def test_noise_has_no_period() -> None:
    """20 series of white and 20 of red noise at chances of 0.001 and 0.0025: 4 false ones have one of 1e-6."""
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        level = np.zeros(2000)
        for hour in range(1, 2000):
            level[hour] = 0.9 * level[hour - 1] + rng.normal()
        for rates in (np.full(2000, 50.0), np.exp(3 + level / 3)):
            found += len(dominant_periods(rng.poisson(rates), 3600))
    assert found < 4


@pytest.mark.parametrize("counts", [[], [1], [0] * 100, [7] * 100])
def test_counts_that_do_not_vary_have_no_period(counts: list[int]) -> None:
    assert dominant_periods(np.array(counts, dtype=np.int64), 3600) == ()
    assert len(autocorrelation(np.array(counts, dtype=np.float64), 10)) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=4, max_size=60), st.integers(0, 100))
def test_autocorrelation_is_its_definition(values: list[int], shift: int) -> None:
    x = np.array(values, dtype=np.float64) + shift
    got = autocorrelation(x, 20)
    off = x - x.mean()
    if len(set(values)) == 1:
        assert len(got) == 0
        return
    expected = [float(off[: len(x) - lag] @ off[lag:]) / float(off @ off) for lag in range(min(20, len(x) // 2) + 1)]
    assert got.tolist() == pytest.approx(expected, abs=1e-9)


def test_services_add_up_to_the_whole() -> None:
    rng = np.random.default_rng(3)
    n = 5000
    batch = complete_batch(
        pl.DataFrame(
            {
                "received_at": np.sort(rng.uniform(0, 20 * 86_400, n)),
                "model": rng.choice(["a", "b"], n),
                "log_type": rng.choice([str(each) for each in LogType], n),
                "request_tokens": rng.integers(0, 100, n),
            }
        )
    )
    whole, *services = describe_periodicity(collect([batch]).table, ZoneInfo("Asia/Kathmandu"))
    assert len(services) == 4
    for week, *parts in zip(*(each.weeks for each in (whole, *services)), strict=True):
        for total, *shares in zip(week.requests, *(part.requests for part in parts), strict=True):
            assert total == (sum(shares) if total is not None else None)
    for name in ("requests_by_hour", "request_tokens_by_hour"):
        for box, *boxes in zip(*(getattr(each, name) for each in (whole, *services)), strict=True):
            assert box.mean == pytest.approx(sum(part.mean for part in boxes))


@pytest.mark.parametrize("name", ["BurstGPT_1_head.csv", "BurstGPT_3_head.csv"])
def test_a_real_head(name: str) -> None:
    path = real_head(name)
    with path.open(newline="") as text:
        stamps = [float(row["Timestamp"]) for row in csv.DictReader(text)]
    whole = describe_periodicity(collect(read_trace(path)).table, UTC_ZONE)[0]
    days = Counter(datetime.fromtimestamp(stamp, UTC).date() for stamp in stamps)
    cells = [cell for week in whole.weeks for cell in week.requests if cell is not None]
    assert [cell for cell in cells if cell] == [days[day] for day in sorted(days)]
    assert whole.requests == len(stamps)
