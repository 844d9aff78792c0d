from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balance import UpstreamView, choose

NOW_NS = 1_000
UP, DOWN = 0, NOW_NS + 1
views = st.lists(st.builds(UpstreamView, st.integers(0, 5), st.sampled_from([UP, NOW_NS, DOWN])), max_size=8)


def view(in_flight: int, down_until_ns: int = UP) -> UpstreamView:
    return UpstreamView(in_flight, down_until_ns)


@pytest.mark.parametrize(
    ("fleet", "excluded", "turn", "chosen"),
    [
        ([], {}, 0, None),
        ([view(9)], {}, 5, 0),
        ([view(9)], {0}, 5, None),
        ([view(2), view(1), view(3)], {}, 0, 1),
        ([view(2), view(1), view(3)], {1}, 0, 0),
        ([view(0), view(0), view(0)], {}, 4, 1),  # ties go round
        ([view(0), view(0), view(0)], {1}, 4, 2),
        ([view(0, DOWN), view(9)], {}, 0, 1),  # one that is down is passed over, however idle
        ([view(0, DOWN), view(9)], {1}, 0, 0),  # a guess that may fail beats a refusal that must
        ([view(3, DOWN), view(1, DOWN)], {}, 0, 1),
        ([view(0, NOW_NS), view(9)], {}, 0, 0),  # its time is over
    ],
)
def test_choice(fleet: list[UpstreamView], excluded: set[int], turn: int, chosen: int | None) -> None:
    assert choose(fleet, NOW_NS, excluded=frozenset(excluded), turn=turn) == chosen


@given(views, st.frozensets(st.integers(0, 8)), st.integers(0, 10**9))
def test_chosen_one_is_allowed_well_if_any_is_and_least_loaded_of_those(
    fleet: list[UpstreamView], excluded: frozenset[int], turn: int
) -> None:
    chosen = choose(fleet, NOW_NS, excluded=excluded, turn=turn)
    allowed = {index: each for index, each in enumerate(fleet) if index not in excluded}
    if chosen is None:
        assert not allowed
        return
    well = [each for each in allowed.values() if each.down_until_ns <= NOW_NS]
    assert fleet[chosen] in (well or allowed.values())
    assert fleet[chosen].in_flight == min(each.in_flight for each in well or allowed.values())


@given(st.integers(1, 6), st.integers(0, 100))
def test_idle_fleet_is_used_evenly(size: int, start: int) -> None:
    turns = [choose([view(0)] * size, NOW_NS, excluded=frozenset(), turn=start + turn) for turn in range(3 * size)]
    assert [turns.count(index) for index in range(size)] == [3] * size
