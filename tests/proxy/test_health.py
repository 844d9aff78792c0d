from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.health import Counts, Health, State, Window, is_outlier, may_eject
from proxy.settings import HealthSettings

S = 1_000_000_000


def health(slow_start_s: float = 0.0, **rules: Any) -> Health:
    return Health(
        HealthSettings(**{"max_failures": 3, "pause_s": 1, "max_pause_s": 8, "trials": 2, **rules}), slow_start_s
    )


def act(of: Health, now_ns: int, what: str) -> bool:
    """One thing that happens: fail, cut (a trial fails), ok, trial (a trial is well), refused, probe+, probe-."""
    match what:
        case "fail" | "cut":
            return of.request_failed(now_ns, what, is_trial=what == "cut", may_eject=True)
        case "ok" | "trial":
            return of.answered(now_ns, is_trial=what == "trial")
        case "refused":
            return of.connect_failed(now_ns, what)
        case "probe+" | "probe-":
            return of.probed(now_ns, None if what == "probe+" else "no answer")
        case "outlier":
            return of.eject(now_ns, what)
    raise AssertionError(what)


UP, DOWN, EJECTED, HALF_OPEN, SLOW_START = State.UP, State.DOWN, State.EJECTED, State.HALF_OPEN, State.SLOW_START


@pytest.mark.parametrize(
    ("story", "state"),
    [
        ([], UP),
        ([(0, "fail"), (0, "fail")], UP),
        ([(0, "fail"), (0, "fail"), (0, "fail")], EJECTED),
        ([(0, "refused")], DOWN),
        ([(0, "refused"), (0.9, "ok")], DOWN),  # a request that began before says nothing
        ([(0, "refused"), (1, None)], HALF_OPEN),
        ([(0, "refused"), (1, "trial")], HALF_OPEN),
        ([(0, "refused"), (1, "trial"), (1, "trial")], UP),
        ([(0, "refused"), (0.5, "trial"), (0.6, "trial")], UP),  # a guess that went well is as good as a trial
        ([(0, "refused"), (1, "ok"), (1, "ok")], HALF_OPEN),
        ([(0, "refused"), (1, "trial"), (1, "cut")], DOWN),
        ([(0, "refused"), (1, "fail")], HALF_OPEN),
        ([(0, "refused"), (1, "refused"), (2.9, None)], DOWN),  # the second pause is twice as long
        ([(0, "refused"), (1, "refused"), (3, None)], HALF_OPEN),
        ([(0, "refused"), (0, "refused"), (0, "refused"), (1, None)], HALF_OPEN),  # at once counts once
        ([(0, "fail"), (0, "fail"), (0, "fail"), (1, "cut"), (2.9, None)], EJECTED),
        ([(0, "refused"), (0.1, "probe+")], UP),  # connections can be made again
        ([(0, "outlier"), (0.1, "probe+")], EJECTED),  # which says nothing of requests
        ([(0, "outlier"), (0.1, "outlier"), (1, None)], HALF_OPEN),
        ([(0, "probe-")], UP),
        ([(0, "probe-"), (0, "probe+"), (0, "probe-")], UP),  # not in a row
        ([(0, "probe-"), (0, "probe-")], DOWN),
        ([(0, "probe-"), (0, "probe-"), (99, "trial"), (99, "ok")], DOWN),  # only a probe brings it back
        ([(0, "probe-"), (0, "probe-"), (1, "probe+")], UP),
        ([(0, "probe-"), (0, "probe-"), (1, "refused"), (1, "probe+")], UP),
        ([(0, "probe-"), (0, "probe-"), (1, "outlier"), (1, "probe+"), (1, None)], EJECTED),
    ],
)  # fmt: skip
def test_story(story: list[tuple[float, str | None]], state: State) -> None:
    of = health()
    now_ns = 0
    for at_s, what in story:
        now_ns = int(at_s * S)
        before = of.state(now_ns)
        if what is not None:
            assert act(of, now_ns, what) or of.state(now_ns) is before
    assert of.state(now_ns) is state
    assert of.is_ready(now_ns) == (state in (UP, HALF_OPEN))


def test_nobody_is_ejected_for_failures_where_that_is_not_allowed() -> None:
    of = health()
    assert not any(of.request_failed(0, "e", is_trial=False, may_eject=False) for _ in range(99))
    assert of.state(0) is UP
    assert (of.failures, of.error) == (99, "e")


def test_pauses_grow_to_the_longest_and_start_again_after_a_long_time_well() -> None:
    of = health()
    pauses, now_ns = [], 0
    for _ in range(6):
        act(of, now_ns, "refused")
        pauses.append((of.until_ns - now_ns) / S)
        now_ns = of.until_ns
    assert pauses == [1, 2, 4, 8, 8, 8]
    act(of, now_ns, "trial")
    assert act(of, now_ns, "trial")
    now_ns += 5 * S
    act(of, now_ns, "refused")
    assert (of.until_ns - now_ns) / S == 8  # well for a short time only: the same story
    now_ns = of.until_ns
    assert [act(of, now_ns, "trial"), act(of, now_ns, "trial")] == [False, True]
    now_ns += 9 * S
    act(of, now_ns, "refused")
    assert (of.until_ns - now_ns) / S == 1


def test_more_connections_than_one_may_fail() -> None:
    of = health(max_connect_failures=3)
    assert [act(of, 0, what) for what in ("refused", "refused", "ok", "refused", "refused")] == [False] * 5
    assert act(of, 0, "refused")


def test_half_open_lets_a_bounded_number_through() -> None:
    of = health()
    act(of, 0, "refused")
    assert not of.is_ready(S - 1)
    ready = []
    for trials in range(4):
        of.trials = trials
        ready.append(of.is_ready(S))
    assert ready == [True, True, False, False]


def test_weight_grows_in_steps_and_says_when() -> None:
    of = health(slow_start_s=9)
    assert of.ramp(0) == 1.0
    act(of, 0, "refused")
    assert of.ramp(S) == 0.1
    assert of.changes_at_ns(0) == S
    assert of.changes_at_ns(S) is None  # from here on requests decide
    act(of, 2 * S, "trial")
    act(of, 2 * S, "trial")
    assert of.state(2 * S) is SLOW_START
    now_ns: int | None = 2 * S
    seen = []
    while now_ns is not None:
        seen.append((now_ns / S, of.ramp(now_ns)))
        assert of.ramp(now_ns - 1) < of.ramp(now_ns) or now_ns == 2 * S
        now_ns = of.changes_at_ns(now_ns)
    assert seen == [(2.0 + step, (step + 1) / 10) for step in range(10)]
    assert of.state(11 * S) is UP


def test_weight_grows_from_when_the_probes_are_well_again() -> None:
    of = health(slow_start_s=9)
    act(of, 0, "refused")
    act(of, S, "trial")
    act(of, S, "trial")
    act(of, 2 * S, "probe-")
    act(of, 2 * S, "probe-")
    assert (of.state(99 * S), of.ramp(99 * S), of.changes_at_ns(2 * S)) == (DOWN, 0.1, None)
    act(of, 99 * S, "probe+")
    assert (of.state(99 * S), of.ramp(99 * S), of.changes_at_ns(99 * S)) == (State.SLOW_START, 0.1, 100 * S)


@given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from(
    ["fail", "cut", "ok", "trial", "refused", "probe+", "probe-", "outlier"])), max_size=60),
    st.sampled_from([0.0, 0.7, 10.0]))  # fmt: skip
def test_whatever_happens_changes_are_announced_and_a_way_back_is_open(
    story: list[tuple[float, str]], slow_start_s: float
) -> None:
    of = health(slow_start_s)
    now_ns = 0
    for gap_s, what in story:
        until_ns = now_ns + int(gap_s * S)
        at_ns = of.changes_at_ns(now_ns)
        if at_ns is None or at_ns > until_ns:  # nothing was announced: nothing may have changed
            assert (of.state(until_ns), of.ramp(until_ns)) == (of.state(now_ns), of.ramp(now_ns))
        else:
            assert at_ns > now_ns
            assert (of.state(at_ns - 1), of.ramp(at_ns - 1)) == (of.state(now_ns), of.ramp(now_ns))
        now_ns = until_ns
        before = of.is_ready(now_ns)
        assert act(of, now_ns, what) or of.is_ready(now_ns) == before
        assert 0 < of.ramp(now_ns) <= 1
    act(of, now_ns, "probe+")
    now_ns = max(now_ns, of.until_ns)
    assert of.is_ready(now_ns)
    for _ in range(of.rules.trials):
        act(of, now_ns, "trial")
    assert of.state(now_ns + int(slow_start_s * S)) is UP


@pytest.mark.parametrize(
    ("own", "rest", "is_one"),
    [
        ((100, 50), [(100, 0)], True),
        ((100, 29), [(100, 0)], False),
        ((100, 30), [(100, 0)], True),
        ((100, 100), [(100, 100)], False),  # everybody fails: the cause is elsewhere
        ((100, 60), [(100, 40), (100, 20)], True),  # the rest is taken together: 30 %
        ((100, 59), [(100, 40), (100, 20)], False),
        ((19, 19), [(100, 0)], False),  # too few to say
        ((100, 100), [(19, 0)], False),
        ((100, 100), [(10, 0), (10, 0)], True),
        ((100, 100), [], False),
        ((0, 0), [(0, 0)], False),
    ],
)
def test_outliers(own: tuple[int, int], rest: list[tuple[int, int]], is_one: bool) -> None:
    counts = [Counts(*each) for each in rest]
    assert is_outlier(Counts(*own), counts, HealthSettings()) == is_one
    assert not is_outlier(Counts(*own), counts, HealthSettings(outlier_margin=0))


@pytest.mark.parametrize(
    ("size", "share", "most"),
    [(1, 1.0, 0), (2, 0.5, 1), (2, 0.1, 1), (2, 0.0, 0), (8, 0.5, 4), (8, 0.3, 2), (3, 1.0, 3)],
)
def test_only_so_many_are_ejected(size: int, share: float, most: int) -> None:
    rules = HealthSettings(max_ejected_share=share)
    assert next(ejected for ejected in itertools.count() if not may_eject(ejected, size, rules)) == most


@given(st.lists(st.tuples(st.integers(0, 400), st.booleans()), max_size=80), st.integers(0, 300))
def test_window_counts_what_is_not_older_than_it(events: list[tuple[int, bool]], later: int) -> None:
    window = Window(1000)  # ten steps of 100
    now, seen = 0, []
    for gap, marked in events:
        now += gap
        window.add(now, 1, int(marked))
        seen.append((now, marked))
    now += later
    kept = [(at, marked) for at, marked in seen if now // 100 - at // 100 < 10]
    assert window.counts(now) == Counts(len(kept), sum(marked for _, marked in kept))


def test_another_span_starts_anew_and_the_same_does_not() -> None:
    window = Window(1000)
    window.add(50, 3, 1)
    window.resize(1000)
    assert window.counts(50) == Counts(3, 1)
    window.resize(2000)
    assert window.counts(50) == Counts(0, 0)
