"""Any cut of any bytes, by Hypothesis: streams like real ones with a few changes, and rubbish.

`make fuzz` looks longer, with atheris; both check what tests/fuzz/targets.py says.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import SEEDS_HTTP, SEEDS_SSE, TARGETS, TOKENS, check_account, check_response
from tests.wire.cuts import CUTS

EDIT = st.tuples(st.integers(0, 1 << 20), st.integers(0, 12), st.sampled_from(TOKENS) | st.binary(max_size=4))
"""Where, how many bytes go, and what comes in their place."""


@st.composite
def streams(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One or two seeds behind each other with a few edits, or rubbish."""
    stream = b"".join(draw(st.lists(st.sampled_from(seeds) | st.sampled_from(TOKENS), min_size=1, max_size=3)))
    for position, removed, inserted in draw(st.lists(EDIT, max_size=5)):
        start = position % (len(stream) + 1)
        stream = stream[:start] + inserted + stream[start + removed :]
    return stream


NUMBER = st.integers(0, 7)


@settings(max_examples=300, deadline=None)
@given(stream=streams(SEEDS_HTTP) | st.binary(max_size=60), at=CUTS, number=NUMBER)
def test_any_cut_of_any_bytes_is_the_same_response(stream: bytes, at: list[int], number: int) -> None:
    check_response(stream, at, number)


@settings(max_examples=150, deadline=None)
@given(stream=streams(SEEDS_SSE), at=CUTS, number=NUMBER)
def test_any_cut_of_any_bytes_counts_the_same(stream: bytes, at: list[int], number: int) -> None:
    check_account(stream, at, number)


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_of_the_long_runs(name: str) -> None:
    check, seeds = TARGETS[name]
    for stream in seeds:
        for number in range(8):
            check(stream, list(range(0, len(stream), 7)), number)
