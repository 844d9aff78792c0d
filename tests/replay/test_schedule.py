"""The schedule: which rows, in what order, due when."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay import schedule
from replay.schedule import Planned, PlanOptions, plan
from traces.batch import complete_batch
from traces.codec import read_trace

TRACES = Path(os.environ.get("BURSTGATE_TRACES", Path(__file__).parents[2].parent / "shared" / "traces"))


def batches(stamps_s: list[float], rows_each: int = 1000, **columns: object) -> Iterator[pl.DataFrame]:
    frame = pl.DataFrame(
        {
            "request_id": [str(row) for row in range(len(stamps_s))],
            "received_at": pl.Series(stamps_s, dtype=pl.Float64),
            "request_tokens": [10] * len(stamps_s),
            "response_tokens": [5] * len(stamps_s),
            **columns,
        }
    )
    yield from complete_batch(frame).iter_slices(rows_each)


def dues_s(stamps_s: list[float], options: PlanOptions = PlanOptions(), rows_each: int = 1000) -> list[float]:  # noqa: B008
    return [row.due_s for row in plan(batches(stamps_s, rows_each), options)]


def test_a_row_carries_what_a_request_needs() -> None:
    rows = batches(
        [100.0, 100.5, 103.0],
        session_id=["s", None, None],
        model=["ChatGPT", "GPT-4", None],
        request_tokens=[472, 0, None],
        response_tokens=[18, 0, None],
        log_type=["Conversation log", "API log", "API log"],
        outcome=["ok", "ok", "upstream_error"],
    )
    planned = list(plan(rows, PlanOptions(speed=2.0)))
    assert planned == [
        Planned(0, 0.0, "s", "ChatGPT", 472, 18, "Conversation log", False),
        Planned(1, 0.25, None, "GPT-4", 0, 0, "API log", False),
        Planned(2, 1.5, None, None, None, None, "API log", True),
    ]
    assert [row.is_sendable for row in planned] == [True, False, False]


@pytest.mark.parametrize(
    ("options", "indexes", "due_s"),
    [
        (PlanOptions(), [0, 1, 2, 3, 4], [0.0, 2.5, 5.0, 10.0, 20.0]),
        (PlanOptions(speed=0.5), [0, 1, 2, 3, 4], [0.0, 5.0, 10.0, 20.0, 40.0]),
        (PlanOptions(limit=2), [0, 1], [0.0, 2.5]),
        (PlanOptions(limit=99), [0, 1, 2, 3, 4], [0.0, 2.5, 5.0, 10.0, 20.0]),
        # Zero is the window's first row, not the window's start.
        (PlanOptions(start_s=3.0), [2, 3, 4], [0.0, 5.0, 15.0]),
        # The window's end is not in it, its start is.
        (PlanOptions(start_s=2.5, duration_s=7.5), [1, 2], [0.0, 2.5]),
        (PlanOptions(start_s=2.5, duration_s=7.6, limit=3), [1, 2, 3], [0.0, 2.5, 7.5]),
        (PlanOptions(start_s=21.0), [], []),
        (PlanOptions(start_s=11.0, duration_s=1.0), [], []),
    ],
)
@pytest.mark.parametrize("rows_each", [1, 2, 1000])
def test_window(options: PlanOptions, indexes: list[int], due_s: list[float], rows_each: int) -> None:
    planned = list(plan(batches([1000.0, 1002.5, 1005.0, 1010.0, 1020.0], rows_each), options))
    assert [row.index for row in planned] == indexes
    assert [row.due_s for row in planned] == due_s


def test_a_failed_first_row_is_zero_time_too() -> None:
    rows = batches([50.0, 60.0], outcome=["upstream_error", "ok"], response_tokens=[None, 5])
    assert [(row.due_s, row.is_sendable) for row in plan(rows, PlanOptions())] == [(0.0, False), (10.0, True)]


def test_warmup_is_of_the_schedules_own_time() -> None:
    rows = plan(batches([10.0, 12.0, 14.0, 16.0]), PlanOptions(speed=2.0, warmup_s=2.0))
    assert [(row.due_s, row.is_warmup) for row in rows] == [(0.0, True), (1.0, True), (2.0, False), (3.0, False)]
    assert not any(row.is_warmup for row in plan(batches([1.0, 2.0]), PlanOptions()))


def test_no_rows() -> None:
    assert dues_s([]) == []


STAMPS = st.lists(st.integers(0, 40), max_size=60).map(lambda stamps: [float(s) for s in sorted(stamps)])


@given(STAMPS, st.integers(0, 2**70), st.integers(1, 9), st.integers(1, 70))
def test_ties_spread_inside_their_second(stamps_s: list[float], seed: int, rows_each: int, limit: int) -> None:
    found = dues_s(stamps_s, PlanOptions(seed=seed), rows_each)
    assert len(found) == len(stamps_s)
    assert all(a <= b for a, b in pairwise(found))
    assert [math.floor(due_s + stamps_s[0]) for due_s in found] == stamps_s
    for stamp_s, due_s in zip(stamps_s, found, strict=True):
        if stamps_s.count(stamp_s) == 1:
            assert due_s == stamp_s - stamps_s[0]
    # The batches' size does not show, and a limit takes a prefix.
    assert dues_s(stamps_s, PlanOptions(seed=seed)) == found
    assert dues_s(stamps_s, PlanOptions(seed=seed, limit=limit), rows_each) == found[:limit]


def test_seeds_differ_and_zero_is_a_seed() -> None:
    stamps_s = [7.0] * 20
    draws = [dues_s(stamps_s, PlanOptions(seed=seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 20


def test_spread_ties_are_uniform() -> None:
    found = dues_s([3.0] * 5000)
    assert abs(sum(found) / 5000 - 0.5) < 0.02
    assert abs(found[1250] - 0.25) < 0.03


@pytest.mark.parametrize(
    "stamps_s",
    [
        [1.0, 1.0, 1.5, 2.0, 2.0],  # a fraction anywhere near: these are not rounded stamps
        [1.25, 1.25, 3.0, 3.0],
    ],
)
def test_fractional_stamps_are_left_alone(stamps_s: list[float]) -> None:
    assert dues_s(stamps_s) == [s - stamps_s[0] for s in stamps_s]


def test_a_fraction_past_the_look_ahead_ends_the_spreading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LOOK_AHEAD_ROWS", 3)
    found = dues_s([0.0, 0.0, 5.0, 5.0, 5.5, 6.0, 6.0])
    assert 0 < found[0] < found[1] < 1
    assert found[2:] == [5.0, 5.0, 5.5, 6.0, 6.0]


def test_keep_keeps_ties() -> None:
    assert dues_s([4.0, 4.0, 6.0], PlanOptions(ties="keep", speed=2)) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("rows_each", [1, 2, 1000])
def test_an_unsorted_trace_names_the_row(rows_each: int) -> None:
    with pytest.raises(ValueError, match=r"row 3: received_at: expected >= 6\.000000, .* got 5\.500000; .* sort it"):
        dues_s([5.0, 6.0, 5.5, 1.0], rows_each=rows_each)


@pytest.mark.parametrize("stamp", [math.nan, math.inf, None])
def test_a_stamp_that_is_no_number_names_the_row(stamp: float | None) -> None:
    with pytest.raises(ValueError, match="row 2: received_at: expected seconds"):
        list(plan(batches([5.0, 0.0], received_at=pl.Series([5.0, stamp], dtype=pl.Float64)), PlanOptions()))


def test_too_many_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MAX_TIES", 10)
    assert len(dues_s([1.0] * 10)) == 10
    with pytest.raises(ValueError, match="received_at 1: expected at most 10 rows"):
        dues_s([1.0] * 11)


def test_the_trace_is_read_as_it_is_needed() -> None:
    taken = 0

    def endless() -> Iterator[pl.DataFrame]:
        nonlocal taken
        while True:
            yield from batches([float(taken)])
            taken += 1

    assert len(list(islice(plan(endless(), PlanOptions(ties="keep")), 5))) == 5
    assert taken < 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"speed": 0.0}, "speed: expected 1e-06 to 1e"),
        ({"speed": math.nan}, "speed: .* got nan"),
        ({"start_s": -1.0}, "start: expected seconds >= 0, got -1"),
        ({"duration_s": 0.0}, "duration: expected seconds > 0, got 0"),
        ({"limit": 0}, "limit: expected rows >= 1, got 0"),
        ({"ties": "drop"}, "ties: expected spread or keep, got 'drop'"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"warmup_s": -1.0}, "warmup: expected seconds >= 0, got -1"),
        ({"warmup_s": math.inf}, "warmup: expected seconds >= 0, got inf"),
    ],
)
def test_wrong_options(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"no traces at {TRACES} (BURSTGATE_TRACES)")
@pytest.mark.parametrize("name", ["BurstGPT_1_head.csv", "BurstGPT_3_head.csv"])
def test_real_traces(name: str) -> None:
    stamps_s = [s for batch in read_trace(TRACES / name) for s in batch["received_at"].to_list()]
    planned = list(plan(read_trace(TRACES / name), PlanOptions()))
    assert len(planned) == len(stamps_s) == 400
    assert [math.floor(row.due_s) for row in planned] == [s - stamps_s[0] for s in stamps_s]
    assert [math.floor(row.due_s) for row in plan(read_trace(TRACES / name), PlanOptions(ties="keep"))] == [
        s - stamps_s[0] for s in stamps_s
    ]
