from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.guard_rails import MIN_REQUESTS, WINDOW_S, LiveWindow, Readings, histogram_quantile, tripped, within
from proxy.series import TTFT_BUCKETS_S
from proxy.settings import InjectionSettings
from proxy.telemetry import WORKER_COUNTERS, WorkerMetrics
from replay.schedule import Planned
from storage.counters import places, slot_count
from storage.journal import JOURNAL_COUNTERS
from traces.record import Outcome

NAMES = JOURNAL_COUNTERS + WORKER_COUNTERS


class Live:
    """A worker's live traffic, counted as a worker counts it."""

    def __init__(self) -> None:
        self._slots = memoryview(bytearray(8 * slot_count(NAMES))).cast("Q")
        self._metrics = WorkerMetrics(self._slots)

    def ended(self, outcome: Outcome, ttft_s: float | None = None, times: int = 1) -> None:
        for _ in range(times):
            self._metrics.live_ended(outcome, ttft_s)

    @property
    def counters(self) -> dict[str, int]:
        return {name: self._slots[first] for name, first in places(NAMES)}


def limits(**fields: Any) -> InjectionSettings:
    return InjectionSettings(allowed=True, **fields)


def rows(due_s: Sequence[float], tokens: int = 10) -> list[Planned]:
    return [Planned(index, at_s, None, "m", tokens, tokens) for index, at_s in enumerate(due_s)]


def test_what_was_before_the_injection_is_no_reading() -> None:
    live, window = Live(), LiveWindow()
    live.ended(Outcome.UPSTREAM_ERROR, times=1000)
    assert window.add(0.0, 0, live.counters) is None
    live.ended(Outcome.OK, 0.02, times=MIN_REQUESTS)
    found = window.add(2.0, 5, live.counters)
    assert found is not None
    assert (found.live_rps, found.live_failure_rate) == (5.0, 0.0)
    assert found.live_ttft_p95_s == pytest.approx(0.0243, abs=0.001)
    assert (found.injected_rps, found.injected_share) == (2.5, 5 / 15)


def test_the_window_forgets() -> None:
    live, window = Live(), LiveWindow()
    window.add(0.0, 0, live.counters)
    live.ended(Outcome.TRUNCATED, times=50)
    found = window.add(1.0, 0, live.counters)
    assert found is not None
    assert found.live_failure_rate == 1.0
    for second in range(2, int(WINDOW_S) + 3):
        live.ended(Outcome.OK, times=5)
        found = window.add(float(second), 0, live.counters)
    assert found is not None
    assert found.live_failure_rate == 0.0


def test_too_few_requests_say_nothing() -> None:
    live, window = Live(), LiveWindow()
    window.add(0.0, 0, live.counters)
    live.ended(Outcome.UPSTREAM_ERROR, 60.0, times=MIN_REQUESTS - 1)
    assert window.add(1.0, 0, live.counters) == Readings(9.0, None, None, 0.0, None)


@pytest.mark.parametrize(("outcome", "is_failure"), [(each, each not in ("ok", "invalid_request")) for each in Outcome])
def test_what_counts_as_a_live_failure(outcome: Outcome, is_failure: bool) -> None:
    live, window = Live(), LiveWindow()
    window.add(0.0, 0, live.counters)
    live.ended(outcome, times=MIN_REQUESTS)
    found = window.add(1.0, 0, live.counters)
    assert found is not None
    assert found.live_failure_rate == is_failure


def test_counters_that_are_missing_are_no_reading() -> None:
    assert LiveWindow().add(0.0, 0, {}) is None


def test_sums_that_fall_for_a_moment_are_no_negative_rates() -> None:
    live, window = Live(), LiveWindow()
    live.ended(Outcome.OK, 0.1, times=100)
    window.add(0.0, 0, live.counters)
    found = window.add(1.0, 0, dict.fromkeys(NAMES, 0))
    assert found == Readings(0.0, None, None, 0.0, None)


@given(st.lists(st.floats(0.0, 59.0), min_size=20, max_size=200))
def test_p95_is_in_the_bucket_of_the_exact_one(ttft_s: list[float]) -> None:
    live = Live()
    for each in ttft_s:
        live.ended(Outcome.OK, each)
    counts = [live.counters[f"live_ttft_le_{bound:g}"] for bound in TTFT_BUCKETS_S] + [
        live.counters["live_ttft_le_inf"]
    ]
    exact_s = float(np.quantile(ttft_s, 0.95, method="inverted_cdf"))
    bounds_s = (0.0, *TTFT_BUCKETS_S)
    bucket = next(n for n, bound in enumerate(TTFT_BUCKETS_S) if exact_s <= bound)
    assert bounds_s[bucket] - 1e-9 <= histogram_quantile(counts, 0.95) <= bounds_s[bucket + 1] + 1e-9


def test_beyond_the_last_bucket_is_its_bound() -> None:
    assert histogram_quantile([0] * len(TTFT_BUCKETS_S) + [7], 0.95) == TTFT_BUCKETS_S[-1]


@pytest.mark.parametrize(
    ("readings", "rule"),
    [
        (Readings(1.0, None, None, 5.0, None), None),
        (Readings(1.0, 0.05, 4.9, 5.0, 1.0), None),  # at the limits
        (Readings(1.0, 0.06, None, 5.0, None), "injection.stop_failure_rate: 0.06 of live requests failed"),
        (Readings(1.0, 0.0, 5.1, 5.0, None), "injection.stop_ttft_p95_s: 5.1 s"),
    ],
)
def test_thresholds(readings: Readings, rule: str | None) -> None:
    found = tripped(readings, limits())
    assert found is None if rule is None else found is not None and found.startswith(rule)


def test_share_of_all_requests_and_rails_that_are_off() -> None:
    over = Readings(1.0, 1.0, 60.0, 5.0, 0.6)
    assert "injection.max_share: 0.6" in (
        tripped(over, limits(max_share=0.5, stop_failure_rate=1.0, stop_ttft_p95_s=0)) or ""
    )
    assert tripped(over, limits(stop_failure_rate=1.0, stop_ttft_p95_s=0)) is None


@given(st.lists(st.floats(0, 20), max_size=80).map(sorted), st.sampled_from([0.5, 1.0, 3.0, 7.5]))
def test_never_more_requests_in_a_second_than_the_ceiling(due_s: list[float], rate_rps: float) -> None:
    said: list[str] = []
    kept = list(within(rows(due_s), limits(max_rate_rps=rate_rps), said.append))
    window_s = max(1.0, 1 / rate_rps)
    for row in kept:
        together = [each for each in kept if row.due_s - window_s < each.due_s <= row.due_s]
        assert len(together) <= max(rate_rps, 1.0) or row.index < kept[0].index
    assert bool(said) == (len(kept) < len(due_s))
    assert kept == rows(due_s)[: len(kept)]  # a prefix, and nothing is changed


@pytest.mark.parametrize(
    ("fields", "due_s", "kept", "rule"),
    [
        ({"max_duration_s": 2.0}, [0.0, 2.0, 2.1], 2, "injection.max_duration_s: the plan is longer than 2 s"),
        ({"max_tokens": 45}, [0.0, 1.0, 2.0], 2, "injection.max_tokens: more than 45 tokens, at 2.0 s"),
        ({"max_rate_rps": 2.0}, [0.0, 0.1, 0.2], 2, "injection.max_rate_rps: more than 2 requests in 1 s, at 0.2 s"),
        ({}, [0.0, 1.0, 2.0], 3, None),
    ],
)
def test_ceilings_end_the_plan_before_they_are_passed(
    fields: dict[str, float], due_s: list[float], kept: int, rule: str | None
) -> None:
    said: list[str] = []
    assert len(list(within(rows(due_s), limits(**fields), said.append))) == kept
    assert said == ([] if rule is None else [rule])


def test_rows_that_are_not_sent_count_for_nothing() -> None:
    unsendable = [Planned(index, 0.0, None, "m", None, None) for index in range(100)]
    said: list[str] = []
    assert len(list(within(unsendable, limits(max_rate_rps=1.0), said.append))) == 100
    assert said == []
