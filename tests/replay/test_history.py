"""Histories: what is kept of a session, and how much of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.history import Histories, Turn, fitting


def turn(tokens: int, text: str = "") -> Turn:
    return Turn(text, "", tokens)


@pytest.mark.parametrize(
    ("ends", "tokens", "kept"),
    [
        ([], 100, 0),
        ([10, 30, 60], 9, 0),
        ([10, 30, 60], 10, 1),
        ([10, 30, 60], 59.9, 2),
        ([10, 30, 60], 1000, 3),
        ([10, 30, 60], -5, 0),
    ],
)
def test_the_leading_turns_that_fit(ends: list[int], tokens: float, kept: int) -> None:
    turns = tuple(map(turn, ends))
    assert fitting(turns, tokens) == turns[:kept]


def test_a_session_is_open_from_its_first_row() -> None:
    histories = Histories()
    assert [histories.open("a"), histories.open("a"), histories.open("b")] == [False, True, False]
    assert (histories.of("a"), histories.of("never")) == ((), ())


def test_a_late_answer_of_an_earlier_row_is_left_out() -> None:
    histories = Histories()
    histories.put("a", 7, (turn(10), turn(20)))
    histories.put("a", 3, (turn(10),))
    assert histories.of("a") == (turn(10), turn(20))
    histories.put("a", 8, (turn(10),))  # the trace has cut it
    assert histories.of("a") == (turn(10),)


def test_the_session_longest_not_used_is_forgotten() -> None:
    histories = Histories(max_sessions=2)
    for session in ("a", "b", "a", "c"):
        histories.open(session)
        histories.put(session, 0, (turn(1, session),))
    assert (histories.of("a"), histories.of("b"), histories.of("c")) == ((turn(1, "a"),), (), (turn(1, "c"),))
    assert histories.forgotten == 1
    assert not histories.open("b")


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3000)), max_size=60))
def test_memory_is_bounded(puts: list[tuple[str, int]]) -> None:
    """A session alone may be larger than the bound: the latest is always kept."""
    histories = Histories(max_bytes=4000)
    for index, (session, size) in enumerate(puts):
        turns = (turn(1, "x" * size),)
        histories.put(session, index, turns)
        assert histories.of(session) == turns
        held = [found for name in "abcdef" if (found := histories.of(name))]
        assert len(held) == 1 or sum(each.size_bytes for found in held for each in found) <= 4000
