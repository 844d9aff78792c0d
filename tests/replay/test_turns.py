"""Which turn goes when, as tables and as a small simulation of a target."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay import turns as module
from replay.ahead import Prepared
from replay.schedule import Planned
from replay.turns import ESTIMATED_S_PER_TOKEN, Turns

ZERO_NS = 5_000_000_000


def row(index: int, due_s: float, session: str | None, elapsed_s: float | None = 1.0, tokens: int = 10) -> Planned:
    return Planned(index, due_s, session, None, tokens, 100, elapsed_s=elapsed_s)


def prepared(planned: Planned) -> Prepared:
    return Prepared(planned, planned.request_tokens or 0, has_earlier_turns=False)


def played(turns: Turns, rows: Iterable[Planned], took_s: float) -> dict[int, float]:
    """When each row goes, in seconds after zero, at a target that takes `took_s` for each; all are read at once."""
    for each in rows:
        turns.add(prepared(each), ZERO_NS)
    turns.close()
    in_flight: list[tuple[int, int, Prepared]] = []
    went_s = {}
    while not turns.is_over or in_flight:
        first_ns = turns.first_ns
        if first_ns is not None and (not in_flight or first_ns < in_flight[0][0]):
            turn = turns.pop()
            went_s[turn.prepared.row.index] = (turn.ready_ns - ZERO_NS) / 1e9
            heapq.heappush(in_flight, (turn.ready_ns + round(took_s * 1e9), turn.number, turn.prepared))
        else:
            end_ns, _, ended = heapq.heappop(in_flight)
            turns.ended(ended, end_ns)
    return went_s


A3 = [row(0, 0.0, "a"), row(1, 2.0, "a"), row(2, 2.5, "b"), row(3, 6.0, "a"), row(4, 6.0, None)]
"""The turns of a: recorded ends at 1 and 3, so think times of 1 and 3."""


@pytest.mark.parametrize(
    ("mode", "took_s", "went_s"),
    [
        ("ordered", 0.5, [0, 2, 2.5, 6, 6]),  # a fast target changes nothing
        ("ordered", 3.0, [0, 3, 2.5, 6, 6]),  # the second turn waits for the first; the third need not any more
        ("ordered", 5.0, [0, 5, 2.5, 10, 6]),
        ("think-time", 1.0, [0, 2, 2.5, 6, 6]),  # as recorded
        ("think-time", 0.5, [0, 1.5, 2.5, 5, 6]),  # a faster target is asked sooner
        ("think-time", 5.0, [0, 6, 2.5, 14, 6]),
    ],
)
def test_moments(mode: str, took_s: float, went_s: list[float]) -> None:
    turns = Turns(mode, 1.0, ZERO_NS)  # type: ignore[arg-type]
    assert [time_s for _, time_s in sorted(played(turns, A3, took_s).items())] == pytest.approx(went_s)
    assert turns.estimated == 0


def test_turns_that_overlap_have_no_think_time() -> None:
    turns = Turns("think-time", 1.0, ZERO_NS)
    assert played(turns, [row(0, 0.0, "a", 10.0), row(1, 2.0, "a")], 4.0) == {0: 0.0, 1: 4.0}


def test_speed_divides_the_recorded_end_too() -> None:
    """At 10 times the speed the second arrival is due at 0.5 s, and the recorded 2 s are 0.2 s: a think time of 0.3."""
    turns = Turns("think-time", 10.0, ZERO_NS)
    assert played(turns, [row(0, 0.0, "a", 2.0), row(1, 0.5, "a")], 1.0) == {0: 0.0, 1: pytest.approx(1.3)}


def test_an_unknown_elapsed_time_is_estimated_and_counted() -> None:
    turns = Turns("think-time", 1.0, ZERO_NS)
    rows = [row(0, 0.0, "a", None), row(1, 10.0, "a", None), row(2, 20.0, None, None)]
    went_s = played(turns, rows, 1.0)
    assert went_s[1] == pytest.approx(1.0 + 10.0 - 100 * ESTIMATED_S_PER_TOKEN)
    assert turns.estimated == 1


def test_a_turn_read_late_goes_when_it_is_read_but_not_after_its_due_time() -> None:
    turns = Turns("think-time", 1.0, ZERO_NS)
    first, second = row(0, 0.0, "a", 5.0), row(1, 6.0, "a")
    turns.add(prepared(first), ZERO_NS)
    turn = turns.pop()
    assert turns.ended(turn.prepared, ZERO_NS + 1) is None
    turns.add(prepared(second), ZERO_NS + 4_000_000_000)  # its moment would have been 1 s
    assert turns.first_ns == ZERO_NS + 4_000_000_000
    turns.pop()
    turns.ended(prepared(second), ZERO_NS + 7_000_000_000)
    turns.add(prepared(row(2, 6.5, "a")), ZERO_NS + 9_000_000_000)
    assert turns.first_ns == ZERO_NS + 7_000_000_000  # since then it is late, and that is lag


def test_waiting_turns_are_bounded_and_hold_up_no_other_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TURNS", 3)
    monkeypatch.setattr(module, "MAX_TOKENS", 35)
    turns = Turns("ordered", 1.0, ZERO_NS)
    turns.add(prepared(row(0, 0.0, "a")), 0)
    hanging = turns.pop()
    turns.add(prepared(row(1, 0.1, "a")), 0)
    turns.add(prepared(row(2, 0.2, "b")), 0)
    assert not turns.is_full
    turns.add(prepared(row(3, 0.3, "a")), 0)
    assert turns.is_full
    assert turns.pop().prepared.row.index == 2
    assert not turns.is_full
    turns.add(prepared(row(4, 0.4, None, tokens=20)), 0)
    assert turns.is_full  # by its tokens
    assert turns.pop().prepared.row.index == 4
    assert turns.first_ns is None
    turns.close()
    assert not turns.is_over
    released = turns.ended(hanging.prepared, ZERO_NS + 10**9)
    assert released is not None
    assert released.row.index == 1
    assert turns.pop().ready_ns == ZERO_NS + 10**9


def test_of_forgotten_sessions_the_next_turn_is_a_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SESSIONS", 1)
    turns = Turns("think-time", 1.0, ZERO_NS)
    for index, session in enumerate("ab"):
        turns.add(prepared(row(index, 0.0, session)), 0)
        turns.ended(turns.pop().prepared, ZERO_NS + 9_000_000_000)
    turns.add(prepared(row(2, 3.0, "a")), 0)
    turns.add(prepared(row(3, 3.0, "b")), 0)
    assert [turns.pop().ready_ns - ZERO_NS for _ in range(2)] == [3_000_000_000, 11_000_000_000]


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.sampled_from(["a", "b", "c", None]), st.one_of(st.none(), st.floats(0, 9))),
        max_size=30,
    ),
    st.sampled_from(["ordered", "think-time"]),
    st.floats(0, 8),
)
def test_every_row_goes_once_and_turns_keep_their_order(
    drawn: list[tuple[float, str | None, float | None]], mode: str, took_s: float
) -> None:
    rows, due_s = [], 0.0
    for index, (gap_s, session, elapsed_s) in enumerate(drawn):
        due_s += gap_s
        rows.append(row(index, due_s, session, elapsed_s))
    went_s = played(Turns(mode, 1.0, ZERO_NS), rows, took_s)  # type: ignore[arg-type]
    assert sorted(went_s) == list(range(len(rows)))
    ends_s: dict[str, float] = {}
    for each in rows:
        if each.session_id is None:
            assert went_s[each.index] == pytest.approx(each.due_s, abs=1e-6)
            continue
        before_s = ends_s.get(each.session_id)
        assert before_s is None or went_s[each.index] >= before_s - 1e-6
        assert mode != "ordered" or went_s[each.index] == pytest.approx(max(each.due_s, before_s or 0.0), abs=1e-6)
        ends_s[each.session_id] = went_s[each.index] + took_s
