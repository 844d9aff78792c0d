"""Shards of a plan, and when a run may start."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.options import Shard, check_start_at, parse_shard, rows_of
from replay.schedule import Planned


def rows(sessions: list[str | None]) -> list[Planned]:
    return [Planned(n, n / 10, session, None, 10, 10) for n, session in enumerate(sessions)]


@given(
    st.lists(st.one_of(st.none(), st.text(max_size=3)), max_size=60),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_shards_hold_every_row_once_in_order_and_sessions_whole(
    sessions: list[str | None], count: int, inner: int
) -> None:
    planned = rows(sessions)
    parts = [list(rows_of(planned, [Shard(n, count)])) for n in range(count)]
    assert sorted(chain.from_iterable(parts), key=lambda row: row.index) == planned
    homes: dict[str, int] = {}
    for number, part in enumerate(parts):
        assert [row.index for row in part] == sorted(row.index for row in part)
        for row in part:
            if row.session_id is not None:
                assert homes.setdefault(row.session_id, number) == number
        nested = [list(rows_of(planned, [Shard(number, count), Shard(n, inner)])) for n in range(inner)]
        assert sorted(chain.from_iterable(nested), key=lambda row: row.index) == part
    assert list(rows_of(planned, [])) == planned


def test_shards_are_even_at_both_levels() -> None:
    planned = rows([f"s{n}" for n in range(4000)] + [None] * 4000)
    for outer in range(4):
        for inner in range(2):
            part = list(rows_of(planned, [Shard(outer, 4), Shard(inner, 2)]))
            assert 850 < len(part) < 1150


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_every_process_finds_the_same_shard(hash_seed: str) -> None:
    program = (
        "from replay.options import Shard, rows_of; from replay.schedule import Planned as P; "
        "print([row.index for row in rows_of([P(n, 0.0, f's{n}', None, 1, 1) for n in range(40)], [Shard(1, 3)])])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    here = [row.index for row in rows_of(rows([f"s{n}" for n in range(40)]), [Shard(1, 3)])]
    assert done.stdout.strip() == str(here)


@pytest.mark.parametrize(
    ("text", "environment", "shard"),
    [
        ("0/1", {}, Shard(0, 1)),
        ("3/8", {}, Shard(3, 8)),
        ("auto/8", {"JOB_COMPLETION_INDEX": "7"}, Shard(7, 8)),
    ],
)
def test_parse_shard(text: str, environment: dict[str, str], shard: Shard) -> None:
    assert parse_shard(text, environment) == shard


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("1", {}, "shard: expected i/n or auto/n, as 0/4, got '1'"),
        ("a/2", {}, "got 'a/2'"),
        ("-1/2", {}, "got '-1/2'"),
        ("2/2", {}, r"expected i/n with 0 <= i < n <= 1024, got 2/2"),
        ("0/0", {}, "got 0/0"),
        ("0/5000", {}, "got 0/5000"),
        ("auto/2", {}, "expected JOB_COMPLETION_INDEX in the environment"),
        ("auto/2", {"JOB_COMPLETION_INDEX": "x"}, "got 'auto/2'"),
    ],
)
def test_wrong_shards(text: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_shard(text, environment)


@pytest.mark.parametrize("ahead_s", [0.0, -1.0, 86_401.0])
def test_a_start_that_is_past_or_too_far_is_refused(ahead_s: float) -> None:
    check_start_at(1000.0 + 86_400.0, 1000.0)
    with pytest.raises(ValueError, match="start at: expected a time within the next 24 hours"):
        check_start_at(1000.0 + ahead_s, 1000.0)
