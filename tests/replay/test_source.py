"""Which rows of a trace are replayed: window, filters, scale, loop; sessions whole, in flat memory."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.schedule import PlanOptions, plan
from replay.source import Batches, SourceOptions, mean_rate_rps, select
from traces.batch import SCHEMA, complete_batch
from traces.codec import read_trace

TRACES = Path(os.environ.get("BURSTGATE_TRACES", Path(__file__).parents[2].parent / "shared" / "traces"))


def trace(stamps_s: list[float], rows_each: int = 1000, **columns: Any) -> Batches:
    """A trace of these stamps that can be opened again and again."""
    frame = complete_batch(
        pl.DataFrame(
            {
                "request_id": [f"r{row}" for row in range(len(stamps_s))],
                "received_at": pl.Series(stamps_s, dtype=pl.Float64),
                **columns,
            }
        )
    )
    return lambda: frame.iter_slices(rows_each)


def taken(source: Batches, options: SourceOptions) -> pl.DataFrame:
    frames = list(select(source, options))
    assert all(frame.height and frame.columns == list(SCHEMA) for frame in frames)
    return pl.concat([pl.DataFrame(schema=SCHEMA), *frames])


def stamps(source: Batches, **options: Any) -> list[float]:
    return taken(source, SourceOptions(**options))["received_at"].to_list()


FIVE: dict[str, Any] = {
    "model": ["a", "b", None, "a", "b"],
    "log_type": ["API log", "Conversation log", "API log", "Conversation log", "API log"],
    "session_id": [None, "s", None, "t", None],
    "outcome": ["ok", "ok", "upstream_error", "ok", "client_gone"],
}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 2, 4, 6, 100]),
        ({"start_s": 2.0, "duration_s": 4.0}, [2, 4]),
        ({"start_s": 3.0}, [4, 6, 100]),
        ({"start_s": 101.0}, []),
        ({"models": ("a",)}, [0, 6]),
        ({"models": ("a", "b")}, [0, 2, 6, 100]),
        ({"models": ("c",)}, []),
        ({"log_types": ("Conversation log",)}, [2, 6]),
        ({"sessions": ("s", "t")}, [2, 6]),
        ({"outcomes": ("ok",), "models": ("b",)}, [2]),
        # The window is of the trace, before a filter moves its first row.
        ({"models": ("b",), "start_s": 2.0, "duration_s": 1.0}, [2]),
        ({"idle_cap_s": 3.0}, [0, 2, 4, 6, 9]),
        ({"idle_cap_s": 1.0}, [0, 1, 2, 3, 4]),
        # Gaps are those between the rows that are left.
        ({"outcomes": ("client_gone", "upstream_error"), "idle_cap_s": 10.0}, [4, 14]),
        ({"passes": 2, "duration_s": 3.0}, [0, 2, 4, 6]),
        # A pass after a mean gap: (6 - 0) / 3.
        ({"passes": 3, "duration_s": 7.0}, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]),
        ({"passes": 3, "duration_s": 1.0}, [0, 1, 2]),
        ({"passes": 3, "models": ("c",)}, []),
    ],
)
@pytest.mark.parametrize("rows_each", [1, 2, 1000])
def test_selection(options: dict[str, Any], expected: list[float], rows_each: int) -> None:
    source = trace([1000.0, 1002.0, 1004.0, 1006.0, 1100.0], rows_each, **FIVE)
    assert [stamp - 1000 for stamp in stamps(source, **options)] == expected


def test_model_map_follows_the_filters() -> None:
    rows = taken(trace([0.0] * 5, **FIVE), SourceOptions(models=("a", "b"), model_map={"a": "llama", "b": "a"}))
    assert rows["model"].to_list() == ["llama", "a", "llama", "a"]


def test_each_pass_has_its_own_sessions_and_ids() -> None:
    rows = taken(trace([0.0, 1.0, 2.0], session_id=["s", None, "s"]), SourceOptions(passes=2))
    assert rows["session_id"].to_list() == ["s", None, "s", "s~2", None, "s~2"]
    assert rows["request_id"].to_list() == ["r0", "r1", "r2", "r0~2", "r1~2", "r2~2"]


def test_an_endless_loop_is_lazy() -> None:
    opened = 0
    source = trace([0.0, 0.5, 1.0])

    def counted() -> Iterator[pl.DataFrame]:
        nonlocal opened
        opened += 1
        yield from source()

    rows = islice(select(counted, SourceOptions(passes=None)), 5)
    assert [frame["received_at"][0] for frame in rows] == [0.0, 1.5, 3.0, 4.5, 6.0]
    assert opened == 5


ROWS = st.lists(st.tuples(st.integers(0, 200), st.sampled_from([None, "a", "b", "c", "d"])), max_size=50).map(
    lambda rows: sorted(rows, key=lambda row: row[0])
)


@settings(max_examples=80, deadline=None)
@given(ROWS, st.floats(0.05, 4.5), st.integers(0, 2**70), st.integers(1, 9), st.integers(1, 40))
def test_scaling_keeps_sessions_whole_and_order(
    rows: list[tuple[int, str | None]], scale: float, seed: int, rows_each: int, jitter_s: int
) -> None:
    stamps_s, sessions = [float(stamp) for stamp, _ in rows], [session for _, session in rows]
    options = SourceOptions(rate_scale=scale, seed=seed, jitter_s=jitter_s)
    found = taken(trace(stamps_s, rows_each, session_id=sessions), options)
    # The batches' size does not show; the same seed gives the same rows.
    assert found.equals(taken(trace(stamps_s, session_id=sessions), options))
    assert found["received_at"].is_sorted()
    assert found["request_id"].is_unique().all()
    assert all(stamp.is_integer() for stamp in found["received_at"])
    own = {
        name: [stamp for stamp, session in zip(stamps_s, sessions, strict=True) if session == name] for name in "abcd"
    }
    copies: Counter[str] = Counter()
    for (name,), part in found.filter(pl.col("session_id").is_not_null()).group_by("session_id"):
        original, _, copy = str(name).partition("#")
        copies[original] += 1
        shifts = {late - stamp for late, stamp in zip(part["received_at"], own[original], strict=True)}
        assert len(shifts) == 1
        shift_s = shifts.pop()
        assert 1 <= shift_s <= jitter_s if copy else shift_s == 0
    for name in set(sessions) - {None}:
        assert math.floor(scale) <= copies[str(name)] <= math.ceil(scale)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 2e-6), st.floats(0, 0.01), st.floats(0, 1e6)), max_size=40),
    st.sampled_from([0.0, 1.7e9 + 0.123457]),
    st.none() | st.floats(0.001, 100.0),
    st.integers(1, 4),
    st.sampled_from([None, 0.5, 1.5]),
    st.integers(1, 9),
)
def test_any_selection_can_be_planned(
    gaps_s: list[float], start_s: float, cap_s: float | None, passes: int, scale: float | None, rows_each: int
) -> None:
    """No rounding turns two rows around; what is not scaled has its rows and no gap over the cap."""
    stamps_s = np.round(start_s + np.cumsum(gaps_s), 6).tolist()
    source = trace(stamps_s, rows_each)
    options = SourceOptions(idle_cap_s=cap_s, passes=passes, rate_scale=scale)
    dues_s = [row.due_s for row in plan(select(source, options), PlanOptions(ties="keep"))]
    assert dues_s == sorted(dues_s)
    if scale is None:
        assert len(dues_s) == passes * len(gaps_s)
        if cap_s is not None:
            # The passes of a trace that spans no time, or has whole seconds, are a second apart.
            is_apart = len(set(stamps_s)) == 1 or all(stamp.is_integer() for stamp in stamps_s)
            assert np.diff(dues_s).max(initial=0.0) <= (math.ceil(cap_s) if is_apart else cap_s) + 2e-6


@pytest.mark.parametrize("scale", [0.1, 0.5, 0.9, 1.7, 3.25])
def test_the_rate_is_scaled(scale: float) -> None:
    rng = np.random.default_rng(4)
    sessions = [None if n < 0 else f"s{n}" for n in rng.integers(-3000, 3000, 20_000)]
    source = trace(np.cumsum(rng.exponential(1.0, 20_000)).tolist(), session_id=sessions)
    for seed in range(3):
        found = taken(source, SourceOptions(rate_scale=scale, seed=seed)).height / 20_000
        # Half the rows are alone, half in 3,000 sessions of 3.3: the share's error is about sqrt(f (1 - f) * 2.7 / n).
        part = scale - math.floor(scale)
        assert abs(found - scale) < 4 * math.sqrt(part * (1 - part) * 2.7 / 20_000)


def test_a_smaller_scale_keeps_a_part_and_seeds_differ() -> None:
    source = trace([float(n) for n in range(500)], session_id=[f"s{n % 100}" for n in range(500)])

    def kept(scale: float, seed: int) -> set[str]:
        return set(taken(source, SourceOptions(rate_scale=scale, seed=seed))["session_id"])

    assert kept(0.2, 7) < kept(0.5, 7) < kept(0.8, 7)
    assert kept(0.5, 0) == kept(0.5, 0) != kept(0.5, 1)
    # Thinning a session's rows one by one would leave parts of nearly all.
    assert 30 < len(kept(0.5, 0)) < 70


def test_target_rps_is_a_scale_of_the_traces_own_mean() -> None:
    source = trace([n / 2 for n in range(20_001)])
    assert mean_rate_rps(source, SourceOptions()) == pytest.approx(2.0)
    for target_rps, speed in ((0.5, 1.0), (5.0, 1.0), (5.0, 2.0)):
        rows = taken(source, SourceOptions(target_rps=target_rps, speed=speed))
        span_s = (rows["received_at"][-1] - rows["received_at"][0]) / speed
        assert rows.height / span_s == pytest.approx(target_rps, rel=0.05)
    known = SourceOptions(target_rps=0.5, source_rps=2.0)
    assert taken(source, known).equals(taken(source, SourceOptions(target_rps=0.5)))
    # The mean is that of the rows that are left, with idle time cut.
    gappy = trace([0.0, 1.0, 2.0, 1000.0, 1001.0], model=["a", "b", "a", "a", "b"])
    assert mean_rate_rps(gappy, SourceOptions(models=("a",), idle_cap_s=4.0)) == pytest.approx(2 / 6)


def test_ties_are_still_spread_after_copying_and_looping() -> None:
    source = trace([0.0] * 30 + [50.0] * 30, session_id=[f"s{n}" for n in range(60)])
    rows = select(source, SourceOptions(rate_scale=2.0, passes=2, jitter_s=5))
    dues_s = [row.due_s for row in plan(rows, PlanOptions())]
    assert len(dues_s) == 240
    assert len(set(dues_s)) > 230


@pytest.mark.parametrize(
    ("stamps_s", "options", "message"),
    [
        ([5.0, 6.0, 5.5], {}, r"row 3: received_at: expected .* got 5\.5; sort the trace"),
        ([5.0, math.nan], {}, "row 2: received_at: .* got nan"),
        ([5.0, math.inf], {}, "row 2: received_at: .* got inf"),
        ([math.nan], {}, "row 1: received_at"),
        ([1.0], {"target_rps": 2.0}, "target rps: expected a trace with a mean rate, got 1 rows"),
        ([1.0, 1.0], {"target_rps": 2.0}, "got 2 rows that span no time"),
        ([], {"target_rps": 2.0}, "got 0 rows"),
        ([1.0, 11.0], {"target_rps": 101.0}, r"at most 1000 times the trace's 0\.1 requests/s, got 101"),
    ],
)
@pytest.mark.parametrize("rows_each", [1, 1000])
def test_wrong_traces(stamps_s: list[float], options: dict[str, Any], message: str, rows_each: int) -> None:
    with pytest.raises(ValueError, match=message):
        stamps(trace(stamps_s, rows_each), **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start_s": -1.0}, "start: .* got -1"),
        ({"duration_s": 0.0}, "duration: .* got 0"),
        ({"log_types": ("api",)}, "log type: expected one of Conversation log, API log, got 'api'"),
        ({"outcomes": ("bad",)}, "outcome: expected one of ok, .* got 'bad'"),
        ({"idle_cap_s": 0.0}, "idle cap: expected seconds >= 0.001, got 0"),
        ({"passes": 0}, "loop: expected passes >= 1, got 0"),
        ({"rate_scale": 0.0}, "rate scale: expected above 0 to 1000, got 0"),
        ({"rate_scale": math.nan}, "rate scale: .* got nan"),
        ({"target_rps": math.inf}, "target rps: .* got inf"),
        ({"source_rps": 0.0}, "source rps: .* got 0"),
        ({"target_rps": 1.0, "rate_scale": 1.0}, "rate scale: .* got both"),
        ({"speed": 0.0}, "speed: .* got 0"),
        ({"jitter_s": 0.5}, "jitter: expected 1 to 86400 seconds, got 0.5"),
        ({"seed": -1}, "seed: .* got -1"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceOptions(**wrong)


def test_no_rows() -> None:
    assert stamps(trace([]), passes=None, rate_scale=2.0) == []
    assert stamps(lambda: iter(()), rate_scale=0.5, idle_cap_s=1.0) == []


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"no traces at {TRACES} (BURSTGATE_TRACES)")
def test_a_real_trace() -> None:
    def source() -> Iterator[pl.DataFrame]:
        return read_trace(TRACES / "BurstGPT_3_head.csv", batch_rows=64)

    whole = taken(source, SourceOptions())
    assert whole.height == 400
    sizes = dict(whole["session_id"].drop_nulls().value_counts().iter_rows())
    half = taken(source, SourceOptions(rate_scale=0.5, seed=3))
    assert 100 < half.height < 300
    assert all(sizes[name] == n for name, n in half["session_id"].drop_nulls().value_counts().iter_rows())
    double = taken(source, SourceOptions(rate_scale=2.0))
    assert double.height == 800
    assert double["session_id"].drop_nulls().n_unique() == 2 * len(sizes)
