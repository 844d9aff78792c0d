"""Ways to cut a byte stream, as Hypothesis draws them."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st


def pieces_at(data: bytes, at: list[int]) -> list[bytes]:
    """`data` cut at the positions `at`, taken modulo its length; pieces may be empty."""
    positions = sorted(position % (len(data) + 1) for position in at)
    return [data[start:end] for start, end in pairwise([0, *positions, len(data)])]


def every_byte(data: bytes) -> list[bytes]:
    """`data` cut into single bytes."""
    return [data[position : position + 1] for position in range(len(data))]


CUTS = st.lists(st.integers(0, 1 << 20), max_size=12)
