from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.pacing import NEVER_NS, Moments, Pacer, cv_of, gamma_gaps, pattern_gaps

S = 1_000_000_000


def comings(rate_rps: float, cv: float, n: int, seed: int = 1) -> list[int]:
    draws, shape = random.Random(seed), 1 / cv**2
    at_s, found = 1.0, []
    for _ in range(n):
        at_s += draws.gammavariate(shape, 1 / shape) / rate_rps
        found.append(int(at_s * S))
    return found


def paced(pacer: Pacer[int], came_ns: list[int]) -> list[int]:
    """When each leaves."""
    left: list[int] = []
    number = 0
    while number < len(came_ns) or len(pacer):
        now_ns = pacer.next_ns
        if number < len(came_ns) and came_ns[number] <= now_ns:
            now_ns = came_ns[number]
            pacer.offer(number, now_ns)
            number += 1
        for item in pacer.take(now_ns):
            assert item == len(left)  # in the order of coming
            left.append(now_ns)
    return left


def gaps_of(left_ns: list[int]) -> list[float]:
    return [(b - a) / S for a, b in itertools.pairwise(left_ns)]


def gamma(seed: int = 3) -> Any:
    return gamma_gaps(random.Random(seed).gammavariate)


@pytest.mark.parametrize(
    ("rate_rps", "budget_s", "cv_in", "cv"),
    [
        (100, 2, 1, 0.5),  # smooth
        (100, 2, 2, 0.5),
        (50, 2, 1, 0.3),
        (100, 4, 1, 0.3),  # 200 are held: it takes long until they are
        (20, 2, 2, 1),  # 20 are
        (50, 2, 1, 2),  # Poisson made bursty
        (50, 2, 0.3, 2),  # steady made bursty
        (200, 4, 1, 2),
        (50, 2, 1, 1),
    ],
)
def test_cv_and_rate_are_reached_within_the_budget(rate_rps: float, budget_s: float, cv_in: float, cv: float) -> None:
    pacer: Pacer[int] = Pacer(budget_s, cv=cv, gaps=gamma())
    came_ns = comings(rate_rps, cv_in, 30_000)
    left_ns = paced(pacer, came_ns)
    delays_s = [(left - came) / S for left, came in zip(left_ns, came_ns, strict=True)]
    gaps_s = gaps_of(left_ns[2000:-1000])  # without the ends, when more and more are held, or fewer and fewer
    assert cv_of(gaps_s) == pytest.approx(cv, rel=0.03)
    assert len(gaps_s) / sum(gaps_s) == pytest.approx(len(came_ns) / ((came_ns[-1] - came_ns[0]) / S), rel=0.03)
    assert 0 <= min(delays_s) <= max(delays_s) <= budget_s + 1e-6
    assert sum(delays_s) / len(delays_s) == pytest.approx(budget_s / 2, rel=0.1)
    shown = Moments()
    for gap_s in gaps_of(left_ns):
        shown.add(gap_s)
    assert pacer.left.cv == shown.cv
    assert pacer.forced < len(came_ns) / 100


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.floats(0, 3), min_size=1, max_size=60),
    st.floats(0.01, 5),
    st.one_of(st.tuples(st.just("peak"), st.floats(0.1, 100)), st.tuples(st.just("cv"), st.floats(0, 5))),
)
def test_nobody_waits_longer_than_the_budget(gaps_s: list[float], budget_s: float, goal: tuple[str, float]) -> None:
    kind, value = goal
    pacer: Pacer[int] = Pacer(budget_s, peak_rps=value) if kind == "peak" else Pacer(budget_s, cv=value, gaps=gamma())
    at_ns, came_ns = S, []
    for gap_s in gaps_s:
        at_ns += int(gap_s * S)
        came_ns.append(at_ns)
    left_ns = paced(pacer, came_ns)
    assert all(0 <= left - came <= int(budget_s * S) for left, came in zip(left_ns, came_ns, strict=True))
    assert pacer.next_ns == NEVER_NS


def test_peak_rate_is_never_passed_while_the_budget_lasts() -> None:
    pacer: Pacer[int] = Pacer(100.0, peak_rps=60)
    left_ns = paced(pacer, comings(50, 2, 20_000))
    assert min(gaps_of(left_ns)) >= 1 / 60 - 1e-6
    assert pacer.forced == 0
    assert pacer.asked_cv is None


def test_over_budget_leaves_and_is_counted() -> None:
    pacer: Pacer[int] = Pacer(0.1, peak_rps=10)
    left_ns = paced(pacer, [S] * 5)
    assert [left - S for left in left_ns] == [0, S // 10, S // 10, S // 10, S // 10]
    assert pacer.forced == 3


def test_a_pattern_is_followed_at_the_live_rate() -> None:
    draws = random.Random(5)
    recorded = [draws.gammavariate(0.25, 40) for _ in range(20_000)]  # bursty, one in 10 s
    pacer: Pacer[int] = Pacer(4.0, cv=cv_of(recorded), gaps=pattern_gaps(recorded))
    left_ns = paced(pacer, comings(100, 1, 20_000))
    gaps_s = gaps_of(left_ns)
    assert 1 / (sum(gaps_s) / len(gaps_s)) == pytest.approx(100, rel=0.05)
    assert cv_of(gaps_s) == pytest.approx(cv_of(recorded), rel=0.05)


def test_who_gives_up_is_not_given_back() -> None:
    pacer: Pacer[str] = Pacer(10.0, peak_rps=1)
    for item in "abc":
        pacer.offer(item, S)
    assert pacer.take(S) == ["a"]
    pacer.remove("b", S)
    assert pacer.take(2 * S) == ["c"]
    pacer.offer("d", 2 * S)
    assert (pacer.take_all(), len(pacer)) == (["d"], 0)


@pytest.mark.parametrize("recorded", [[], [0.0], [0.0, 0.0]])
def test_a_pattern_needs_gaps(recorded: list[float]) -> None:
    with pytest.raises(ValueError, match="two arrivals"):
        pattern_gaps(recorded)


@given(st.lists(st.floats(0.001, 1000), min_size=2, max_size=50))
def test_moments_of_few_values_are_theirs(values: list[float]) -> None:
    moments = Moments()
    for value in values:
        moments.add(value)
    assert moments.mean == pytest.approx(sum(values) / len(values))
    assert moments.cv == pytest.approx(cv_of(values), abs=1e-4)
    assert math.isfinite(moments.mean)
    assert Moments().cv is None
