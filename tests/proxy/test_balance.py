from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balance import (
    Decision,
    Policy,
    Pool,
    build_ring,
    choose,
    first_on_ring,
    hash64,
    least_loaded,
    take_turn,
    with_room,
)

LEAST: Policy = "least_in_flight"


def pool(
    ready: Sequence[int], reserve: Sequence[int] = (), weights: Sequence[float] | None = None, size: int = 8
) -> Pool:
    return Pool(tuple(ready), tuple(reserve), tuple(weights or [1.0] * size), [0.0] * size)


@pytest.mark.parametrize(
    ("of", "loads", "policy", "without", "decision"),
    [
        (pool([]), [], LEAST, {}, None),
        (pool([0]), [9], LEAST, {}, Decision(0, LEAST, 1)),
        (pool([0]), [9], LEAST, {0}, None),
        (pool([0, 1, 2]), [2, 1, 3], LEAST, {}, Decision(1, LEAST, 3)),
        (pool([0, 1, 2]), [2, 1, 3], LEAST, {1}, Decision(0, LEAST, 2)),
        (pool([0, 1], weights=[1.0, 4.0]), [1, 3], LEAST, {}, Decision(1, LEAST, 2)),  # 3/4 < 1
        (pool([0, 1], weights=[1.0, 0.1]), [2, 1], LEAST, {}, Decision(0, LEAST, 2)),  # starting slowly
        (pool([1], [0]), [0, 9], LEAST, {}, Decision(1, LEAST, 1)),  # not well is passed over, however idle
        (pool([1], [0]), [0, 9], LEAST, {1}, Decision(0, LEAST, 1, is_guess=True)),  # better than a refusal
        (pool([], [0, 1]), [3, 1], "round_robin", {}, Decision(1, LEAST, 2, is_guess=True)),
        (pool([0, 2]), [9, 0, 0], "round_robin", {}, Decision(0, "round_robin", 2)),  # whatever the load
        (pool([0, 2]), [1, 0, 0], "session", {}, Decision(2, LEAST, 2)),  # no session
        (pool([0, 2]), [1, 0, 0], "prefix", {}, Decision(2, LEAST, 2)),  # no prefix
    ],
)
def test_choice(
    of: Pool, loads: list[int], policy: Policy, without: Collection[int], decision: Decision | None
) -> None:
    assert choose(of, loads, policy, without=without) == decision


def test_nobody_who_is_unwell_where_guesses_are_not_wanted() -> None:
    assert choose(pool([], [0]), [0], LEAST, may_guess=False) is None


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ([5, 1, 1], "aabacaa"),  # nginx's own example
        ([1, 1, 1], "abcabc"),
        ([2, 1], "abaaba"),
        ([1, 3], "babbbabb"),
        ([0.5, 0.25, 0.25], "abcaabca"),
    ],
)
def test_smooth_turns(weights: list[float], turns: str) -> None:
    credits = [0.0] * len(weights)
    assert "".join("abc"[take_turn(range(len(weights)), weights, credits)] for _ in turns) == turns


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_a_round_of_turns_gives_each_its_weight(weights: list[int]) -> None:
    credits = [0.0] * len(weights)
    turns = [take_turn(range(len(weights)), weights, credits) for _ in range(sum(weights))]
    assert [turns.count(index) for index in range(len(weights))] == weights
    assert credits == [0.0] * len(weights)


@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=200))
def test_credits_stay_bounded_whoever_takes_part(rounds: list[set[int]]) -> None:
    credits = [0.0] * 6
    for candidates in rounds:
        assert take_turn(sorted(candidates), [1.0] * 6, credits) in candidates
    assert max(map(abs, credits)) <= 6
    assert sum(credits) == 0


fleets = st.integers(1, 8).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(0, 20), min_size=size, max_size=size),
        st.lists(st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=size, max_size=size),
        st.sets(st.integers(0, size - 1), min_size=1),
    )
)


@given(fleets, st.sampled_from([LEAST, "round_robin", "session", "prefix"]), st.integers(0, 2**64 - 1), st.data())
def test_the_chosen_one_is_a_candidate_and_ready_if_any_is(fleet: Any, policy: Policy, key: int, data: Any) -> None:
    loads, weights, ready = fleet
    others = sorted(set(range(len(loads))) - ready)
    without = data.draw(st.sets(st.integers(0, len(loads) - 1)))
    ring = build_ring([(index, f"u{index}", weight) for index, weight in enumerate(weights)])
    of = Pool(tuple(sorted(ready)), tuple(others), tuple(weights), [0.0] * len(loads), ring)
    decision = choose(of, loads, policy, 1.5, without, key, lambda candidates: candidates[:1])
    wanted = ready - without or set(others) - without
    if decision is None:
        assert not wanted
        return
    assert decision.index in wanted
    assert decision.candidates == len(wanted)
    assert decision.is_guess == (not ready - without)
    if decision.policy == LEAST:
        assert loads[decision.index] / weights[decision.index] == min(loads[each] / weights[each] for each in wanted)


@given(fleets, st.floats(1.01, 5))
def test_somebody_always_has_room_and_nobody_with_too_much_has(fleet: Any, max_load: float) -> None:
    loads, weights, ready = fleet
    candidates = sorted(ready)
    roomy = with_room(candidates, loads, weights, max_load)
    assert roomy
    in_flight, weight = 1 + sum(loads[each] for each in candidates), sum(weights[each] for each in candidates)
    for index in candidates:
        share = max_load * in_flight * weights[index] / weight
        if index in roomy:
            assert loads[index] + 1 <= math.ceil(share + 1e-6)
        else:
            assert loads[index] + 1 > share - 1e-6


@given(st.integers(1, 6))
def test_idle_fleet_is_used_evenly(size: int) -> None:
    credits = [0.0] * size
    turns = [least_loaded(range(size), [0] * size, [1.0] * size, credits) for _ in range(3 * size)]
    assert turns == list(range(size)) * 3


SESSIONS = [hash64(f"session-{number}") for number in range(4000)]


def homes(names: Sequence[str], weights: Sequence[float] | None = None, absent: Collection[str] = ()) -> list[str]:
    """Where each session goes in an idle fleet."""
    ring = build_ring([(index, name, (weights or [1.0] * len(names))[index]) for index, name in enumerate(names)])
    there = [index for index, name in enumerate(names) if name not in absent]
    return [names[first_on_ring(ring, session, there)] for session in SESSIONS]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_sessions_spread_over_the_fleet(size: int) -> None:
    where = homes([f"http://host-{index}:8000" for index in range(size)])
    for index in range(size):
        assert where.count(f"http://host-{index}:8000") == pytest.approx(len(SESSIONS) / size, rel=0.35)


def test_sessions_spread_by_weight() -> None:
    where = homes(["a", "b"], [3.0, 1.0])
    assert where.count("a") == pytest.approx(len(SESSIONS) * 3 / 4, rel=0.1)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_one_more_upstream_takes_its_part_and_moves_nothing_else(size: int) -> None:
    names = [f"http://host-{index}:8000" for index in range(size)]
    before, after = homes(names), homes([*names, "http://new:8000"])
    moved = [now for was, now in zip(before, after, strict=True) if was != now]
    assert set(moved) == {"http://new:8000"}
    assert len(moved) == pytest.approx(len(SESSIONS) / (size + 1), rel=0.35)
    assert homes(list(reversed(names))) == before  # the order in the settings is of no account


@pytest.mark.parametrize("how", ["removed", "not ready"])
def test_one_upstream_less_moves_only_its_own_sessions(how: str) -> None:
    names = ["a", "b", "c", "d"]
    before = homes(names)
    after = homes(names[:3]) if how == "removed" else homes(names, absent={"d"})
    assert {was for was, now in zip(before, after, strict=True) if was != now} == {"d"}
    assert "d" not in after


def test_a_session_stays_until_its_upstream_is_full_and_then_overflows() -> None:
    ring = build_ring([(index, name, 1.0) for index, name in enumerate("abcd")])
    of = Pool((0, 1, 2, 3), (), (1.0,) * 4, [0.0] * 4, ring)
    loads = [0] * 4
    taken = []
    for _ in range(40):  # all of one session, none of which ends
        decision = choose(of, loads, "session", 1.25, key=SESSIONS[0])
        assert decision is not None
        taken.append(decision.index)
        loads[decision.index] += 1
    assert max(loads) <= math.ceil(1.25 * 40 / 4)
    assert loads[taken[0]] == max(loads)
    loads = [0] * 4
    assert {getattr(choose(of, loads, "session", 1.25, key=SESSIONS[0]), "index", None) for _ in range(9)} == {taken[0]}


def test_a_hot_prefix_does_not_overload_its_holder() -> None:
    of = pool([0, 1, 2, 3], size=4)
    loads = [0] * 4
    for number in range(100):
        decision = choose(
            of, loads, "prefix", 1.5, holders=lambda candidates: [each for each in candidates if each == 2]
        )
        assert decision is not None
        loads[decision.index] += 1
        assert loads[2] <= math.ceil(1.5 * (number + 1) / 4)
    assert loads[2] == max(loads)
