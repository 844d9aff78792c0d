"""The sums by minute and longer steps against the rows themselves, added up here in plain Python."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.engine import downgrade, upgrade
from storage.history import History, quantile_s, read_history, step_for
from storage.rollup import BUCKETS, STEPS_S, bucket_bounds_s, roll
from storage.schema import rollup_dirty, rollup_latencies, rollups
from storage.sink import open_sink
from traces.record import Origin, Outcome, TraceRecord

DAY_S = 1_763_683_200  # a UTC midnight
OUTCOMES = (Outcome.OK, Outcome.OK, Outcome.UPSTREAM_ERROR, Outcome.INVALID_REQUEST)


def records(count: int, seed: int, first_s: float = DAY_S, span_s: float = 3 * 3600) -> list[TraceRecord]:
    rng = np.random.default_rng(seed)
    return [
        TraceRecord(
            f"{seed:08d}-{number:08d}",
            round(first_s + float(rng.uniform(0, span_s)), 6),
            model=(None, "a", "b")[rng.integers(3)],
            upstream=(None, "u", "v")[rng.integers(3)],
            outcome=OUTCOMES[rng.integers(4)],
            origin=(Origin.CLIENT, Origin.REPLAY)[int(rng.random() < 0.2)],
            request_tokens=(None, 10, 300)[rng.integers(3)],
            response_tokens=(None, 5)[rng.integers(2)],
            ttft_s=None if rng.random() < 0.5 else float(10 ** rng.uniform(-4, 3.5)),
            elapsed_s=float(10 ** rng.uniform(-3, 2)),
        )
        for number in range(count)
    ]


def bucket_of(value_s: float) -> int:
    return next((number for number, bound in enumerate(bucket_bounds_s()) if value_s <= bound), BUCKETS - 1)


def added_up(rows: Sequence[TraceRecord], step_s: int, start_s: float, end_s: float, origins: Sequence[str]) -> tuple[
    Counter[tuple[object, ...]], Counter[tuple[object, ...]], int
]:  # fmt: skip
    counts: Counter[tuple[object, ...]] = Counter()
    latencies: Counter[tuple[object, ...]] = Counter()
    tokens = 0
    for row in rows:
        at = math.floor(row.received_at / step_s) * step_s
        if not start_s <= row.received_at < end_s or row.origin.value not in origins:
            continue
        model = "" if row.outcome is Outcome.INVALID_REQUEST else row.model or ""
        counts[at, row.origin.value, model, row.upstream or "", row.outcome.value] += 1
        tokens += row.request_tokens or 0
        if row.outcome is Outcome.OK:
            for kind, value_s in (("ttft", row.ttft_s), ("e2e", row.elapsed_s)):
                if value_s is not None:
                    latencies[at, kind, bucket_of(value_s)] += 1
    return counts, latencies, tokens


def assert_equal(found: History, rows: Sequence[TraceRecord], start_s: int, end_s: int, origins: Sequence[str]) -> None:
    counts, latencies, tokens = added_up(rows, found.step_s, start_s, end_s, origins)
    assert {row[:5]: row[5] for row in found.counts.iter_rows()} == counts
    assert {row[:3]: row[3] for row in found.latencies.iter_rows()} == latencies
    assert found.counts["request_tokens"].sum() == tokens


@pytest.mark.parametrize("rolled", ["nothing", "half", "all", "all, then late rows"])
def test_history_is_the_rows_added_up(engine: sa.Engine, rolled: str) -> None:
    rows = records(600, 1)
    late = records(60, 2)
    sink = open_sink(engine)
    sink.commit(rows)
    if rolled == "half":
        assert roll(engine, DAY_S + 2 * 3600) == 60  # the newest ones that are over
    elif rolled != "nothing":
        while roll(engine, DAY_S + 86_400):
            pass
    if rolled == "all, then late rows":
        sink.commit([*late, *rows[:7]])  # and some that were there: nothing counts twice
        rows = rows + late
    for span_s, points in (
        (3 * 3600, 200),
        (3 * 3600, 40),
        (3 * 3600, 12),
        (86_400, 24),
        (86_400, 4),
        (30 * 86_400, 30),
    ):
        found = read_history(engine, DAY_S, DAY_S + span_s, points=points, origins=("client",))
        assert_equal(found, rows, DAY_S, DAY_S + span_s, ("client",))
    one = read_history(engine, DAY_S, DAY_S + 3 * 3600, models=("a",))
    assert one.counts["requests"].sum() == sum(
        row.model == "a" and row.outcome is not Outcome.INVALID_REQUEST and row.origin is Origin.CLIENT for row in rows
    )
    both = read_history(engine, DAY_S + 3600, DAY_S + 7200, origins=("client", "replay"))
    assert_equal(both, rows, DAY_S + 3600, DAY_S + 7200, ("client", "replay"))
    while roll(engine, DAY_S + 86_400):
        pass
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(rollup_dirty)).scalar_one() == 0
        by_step = connection.execute(
            sa.select(rollups.c.step_s, sa.func.sum(rollups.c.requests)).group_by(rollups.c.step_s)
        ).all()
    assert {step: int(total) for step, total in by_step} == dict.fromkeys(STEPS_S, len(rows))
    assert_equal(read_history(engine, DAY_S, DAY_S + 3 * 3600, points=3), rows, DAY_S, DAY_S + 3 * 3600, ("client",))


def test_a_minute_is_left_alone_until_it_is_over(engine: sa.Engine) -> None:
    open_sink(engine).commit([TraceRecord("r", DAY_S + 30.0)])
    assert roll(engine, DAY_S + 119) == 0
    assert roll(engine, DAY_S + 121) == 1
    assert roll(engine, DAY_S + 121) == 0


def test_stamps_before_1970(engine: sa.Engine) -> None:
    rows = [TraceRecord("a", -61.5), TraceRecord("b", -60.0), TraceRecord("c", -0.5), TraceRecord("d", 0.0)]
    open_sink(engine).commit(rows)
    assert roll(engine, 1e6) == 3
    found = read_history(engine, -3600, 3600)
    assert dict(found.counts.select("at", "requests").iter_rows()) == {-120: 1, -60: 2, 0: 1}


def test_an_empty_database_has_an_empty_history(engine: sa.Engine) -> None:
    found = read_history(engine, DAY_S, DAY_S + 3600)
    assert (found.step_s, found.counts.height, found.latencies.height) == (60, 0, 0)


@pytest.mark.parametrize(
    ("span_s", "points", "step_s"),
    [(3600, 300, 60), (86_400, 300, 300), (7 * 86_400, 300, 3600), (365 * 86_400, 300, 2 * 86_400), (1, 1, 60)],
)
def test_steps_cover_the_span(span_s: float, points: int, step_s: int) -> None:
    assert step_for(span_s, points) == step_s


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0011, 800.0), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_quantiles_are_within_a_buckets_width(values_s: list[float], share: float) -> None:
    buckets = sorted(Counter(map(bucket_of, values_s)).items())
    found_s = quantile_s(buckets, share)
    true_s = sorted(values_s)[math.ceil(share * len(values_s) - 1e-9) - 1]
    assert found_s is not None
    assert found_s == pytest.approx(true_s, rel=0.19)


def test_nothing_has_no_quantile() -> None:
    assert quantile_s([], 0.5) is None
    assert quantile_s([(BUCKETS - 1, 3)], 0.5) == bucket_bounds_s()[-1]


def test_sums_of_a_database_from_before_the_longer_steps(engine: sa.Engine) -> None:
    rows = records(300, 3, first_s=-7200.0, span_s=30 * 3600)
    open_sink(engine).commit(rows)
    while roll(engine, DAY_S):
        pass

    def sums() -> list[tuple[object, ...]]:
        with engine.connect() as connection:
            return [tuple(row) for table in (rollups, rollup_latencies) for row in connection.execute(
                sa.select(table).order_by(*table.primary_key.columns)
            )]  # fmt: skip

    before = sums()
    downgrade(engine, "0006")
    assert {row[0] for row in sums()} == {60, 3600}
    upgrade(engine)
    assert sums() == before
