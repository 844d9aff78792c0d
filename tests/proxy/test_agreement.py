from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.agreement import MAX_CHARS, common_length, exact, similarity

TEXTS = st.text(alphabet="abcé ", max_size=60)


def naive(a: str, b: str) -> int:
    """The textbook's table."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for place, y in enumerate(b, start=1):
            before, row[place] = row[place], before + 1 if x == y else max(row[place], row[place - 1])
    return row[-1]


@given(TEXTS, TEXTS)
def test_the_common_part_is_the_textbooks(a: str, b: str) -> None:
    assert common_length(a, b) == naive(a, b)


@pytest.mark.parametrize(
    ("a", "b", "agreement"),
    [
        ("", "", 1.0),
        ("", "abc", 0.0),
        ("abc", "abc", 1.0),
        ("abc", "xyz", 0.0),
        ("the cat sat", "the cat sat down", 2 * 11 / 27),
        ("kitten", "sitting", 2 * 4 / 13),
        ("日本語", "日本", 2 * 2 / 5),  # characters, not bytes
    ],
)
def test_similarity_of(a: str, b: str, agreement: float) -> None:
    assert similarity(a.encode(), b.encode()) == pytest.approx(agreement)
    assert similarity(b.encode(), a.encode()) == pytest.approx(agreement)


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_any_bytes_have_a_similarity(a: bytes, b: bytes) -> None:
    assert 0 <= similarity(a, b) <= 1
    assert similarity(a, a) == 1
    assert exact(a, b) == float(a == b)


def test_long_texts_are_compared_by_their_beginning_in_bounded_time() -> None:
    rng = random.Random(1)
    a, b = ("".join(rng.choices("abcdefgh ", k=200_000)) for _ in range(2))
    pauses: list[None] = []
    start_s = time.monotonic()
    found = similarity(a.encode(), b.encode(), lambda: pauses.append(None))
    assert time.monotonic() - start_s < 2
    assert 0.4 < found < 0.9
    assert len(pauses) >= MAX_CHARS // 256 - 1
    assert similarity(b"x" * MAX_CHARS + b"a", b"x" * MAX_CHARS + b"b") == 1.0
