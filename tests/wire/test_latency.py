from __future__ import annotations

import pytest

from wire.latency import e2e_s, tpot_s, ttft_s

MS = 1_000_000


@pytest.mark.parametrize(
    ("sent_ns", "first_chunk_ns", "expected"),
    [(5 * MS, 12 * MS, 0.007), (5, 5, 0.0), (0, 1, 1e-9), (5, None, None)],
)
def test_ttft(sent_ns: int, first_chunk_ns: int | None, expected: float | None) -> None:
    assert ttft_s(sent_ns, first_chunk_ns) == expected


@pytest.mark.parametrize(
    ("first_chunk_ns", "last_chunk_ns", "tokens", "expected"),
    [
        (10 * MS, 40 * MS, 4, 0.01),
        (10 * MS, 40 * MS, 2, 0.03),
        (10, 10, 100, 0.0),  # all in one chunk
        (10, 40, 1, None),
        (10, 40, 0, None),
        (10, 40, None, None),
        (None, None, 4, None),
        (10, None, 4, None),
    ],
)
def test_tpot(
    first_chunk_ns: int | None, last_chunk_ns: int | None, tokens: int | None, expected: float | None
) -> None:
    assert tpot_s(first_chunk_ns, last_chunk_ns, tokens) == expected


def test_e2e() -> None:
    assert e2e_s(5 * MS, 30 * MS) == 0.025
