"""Bins over time: what goes where, and that joining and merging them loses nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.timeline import BIN_RATIO, MAX_BINS, OverTime, Timeline, bin_of

Request = tuple[float, float, float]
"""Due, sent after, end after."""
REQUESTS = st.lists(st.tuples(st.floats(0, 20), st.floats(0, 2), st.floats(0, 30)), min_size=1, max_size=20)


def filled(requests: list[Request], tokens: int = 10) -> Timeline:
    timeline = Timeline()
    for due_s, lag_s, e2e_s in requests:
        sent_s, end_s = due_s + lag_s, due_s + lag_s + e2e_s
        timeline.add(due_s, lag_s, sent_s, end_s, is_ok=True)
        timeline.add_latency(sent_s, bin_of(e2e_s / 2), bin_of(e2e_s))
        timeline.add_tokens(tokens, sent_s + e2e_s / 2, end_s)
    return timeline


def integral(values: list[float], found: OverTime) -> float:
    return sum(values) * found.bin_s


@given(REQUESTS)
def test_everything_is_counted_once(requests: list[Request]) -> None:
    found = filled(requests).result()
    assert sum(found.offered) == sum(found.sent) == sum(found.ok) == len(requests)
    assert sum(found.failed) == 0
    assert integral(found.in_flight, found) == pytest.approx(sum(e2e_s for _, _, e2e_s in requests), abs=1e-3)
    assert integral(found.response_tokens_per_s, found) == pytest.approx(10 * len(requests), rel=1e-3)
    assert max(lag_s or 0 for lag_s in found.dispatch_lag_max_s) == max(lag_s for _, lag_s, _ in requests)


def test_a_mean_in_flight_is_that_of_its_bin() -> None:
    """In flight from 0.5 s to 2.25 s and, beside it, from 2 s to 2.5 s."""
    timeline = Timeline()
    timeline.add(0.5, 0.0, 0.5, 2.25, is_ok=True)
    timeline.add(2.0, 0.0, 2.0, 2.5, is_ok=False)
    found = timeline.result()
    assert found.in_flight == [0.5, 1.0, 0.75]
    assert (found.ok, found.failed) == ([0, 0, 1], [0, 0, 1])


def test_bins_double_when_there_are_too_many() -> None:
    timeline = Timeline()
    for second in range(5 * MAX_BINS):
        timeline.add(float(second), second / 1e6, float(second), second + 0.5, is_ok=second % 2 == 0)
        timeline.add_latency(float(second), bin_of(0.01), bin_of(0.5))
    found = timeline.result()
    assert (found.bin_s, len(found.offered)) == (8.0, 5 * MAX_BINS // 8)
    assert set(found.offered) == set(found.sent) == {8}
    assert set(found.ok) == set(found.failed) == {4}
    assert set(found.in_flight) == {0.5}
    assert found.dispatch_lag_max_s[:2] == [7e-6, 15e-6]
    assert set(found.ttft_p50_s) == {found.ttft_p99_s[0]}
    assert found.ttft_p50_s[0] == pytest.approx(0.01, rel=0.06)


@settings(max_examples=20, deadline=None)
@given(REQUESTS, REQUESTS)
def test_a_timeline_of_wide_bins_takes_one_of_narrow_bins(early: list[Request], late: list[Request]) -> None:
    """Two senders, one of which had a request a long time later."""
    far = [(due_s + 3 * MAX_BINS, lag_s, e2e_s) for due_s, lag_s, e2e_s in late]
    whole, one, other = filled(early + far).result(), filled(early), filled(far)
    for first, second in ((one, other), (filled(far), filled(early))):
        first.merge(second)
        found = first.result()
        assert (found.bin_s, found.offered, found.ok) == (whole.bin_s, whole.offered, whole.ok)
        assert found.in_flight == pytest.approx(whole.in_flight, abs=1e-4)
        assert found.response_tokens_per_s == pytest.approx(whole.response_tokens_per_s, abs=1e-2)
        assert (found.ttft_p99_s, found.e2e_p50_s) == (whole.ttft_p99_s, whole.e2e_p50_s)
    assert other.result() == filled(far).result(), "merging leaves the other as it was"


@given(st.lists(st.floats(1e-5, 1e4), min_size=1, max_size=50))
def test_quantiles_of_a_bin_are_within_five_per_cent(values_s: list[float]) -> None:
    timeline = Timeline()
    for value_s in values_s:
        timeline.add(0.0, 0.0, 0.0, 0.5, is_ok=True)
        timeline.add_latency(0.0, bin_of(value_s), None)
    found = timeline.result()
    ranked = sorted(values_s)
    assert found.ttft_p50_s[0] == pytest.approx(ranked[(len(ranked) + 1) // 2 - 1], rel=BIN_RATIO**5 - 1 + 0.001)
    assert found.e2e_p50_s[0] is None


def test_nothing_is_no_bin() -> None:
    found = Timeline().result()
    assert (found.bin_s, found.offered, found.in_flight, found.ttft_p50_s) == (1.0, [], [], [])
