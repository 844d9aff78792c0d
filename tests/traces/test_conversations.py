"""Conversations against sessions worked by hand and plain Python."""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces.test_burstgpt import real_head
from traces.batch import batch_from_records, empty_batch
from traces.codec import read_trace
from traces.conversations import Conversations, Switches, describe_conversations, session_gaps
from traces.record import TraceRecord
from traces.table import collect


def record(received_at: float, session_id: str | None, **fields: Any) -> TraceRecord:
    return TraceRecord("r", received_at, session_id, **fields)


def described(*rows: TraceRecord) -> Conversations:
    return describe_conversations(collect([batch_from_records(rows)]).table)


def test_sessions_worked_by_hand() -> None:
    found = described(
        record(0, "a", elapsed_s=2, model="x", request_tokens=10, response_tokens=5),
        record(1, None, request_tokens=1000),
        record(2, "b", elapsed_s=10, model="y", request_tokens=7),
        record(5, "a", elapsed_s=None, model="y", request_tokens=30),  # thought for 3 s, model switched
        record(6, "b", model=None, request_tokens=None),  # submitted before the answer's end; lengths unknown
        record(9, "a", model="x", request_tokens=25, response_tokens=9),  # the end before it is unknown
        record(11, "b", model="y"),  # an unknown model in between is no switch
        record(12, "c"),
    )
    assert (found.sessions, found.requests, found.without_session) == (3, 7, 1)
    assert found.turn_counts == ((1, 1), (3, 2))
    assert found.turns is not None
    assert found.turns.mean == pytest.approx(7 / 3)
    assert found.gap_s is not None
    assert (found.gap_s.n, found.gap_s.mean, found.gap_s.min, found.gap_s.max) == (4, 4.5, 4, 5)
    assert found.think_s is not None
    assert (found.think_s.n, found.think_s.mean, found.overlapping) == (1, 3, 1)
    assert found.growth_tokens is not None
    assert (found.growth_tokens.n, found.growth_tokens.min, found.growth_tokens.max) == (2, -5, 20)
    assert found.duration_s is not None
    assert (found.duration_s.n, found.duration_s.mean) == (2, 9)
    assert found.first_request_tokens is not None
    assert (found.first_request_tokens.n, found.first_request_tokens.mean) == (2, 8.5)
    assert found.later_request_tokens is not None
    assert (found.later_request_tokens.n, found.later_request_tokens.mean) == (2, 27.5)
    assert found.models == Switches(switches=2, sessions=1, session_share=0.5)
    assert [turn.requests for turn in found.by_turn] == [3, 2, 2]


@pytest.mark.parametrize("rows", [[], [record(1.0, None)]])
def test_a_trace_without_sessions_has_none(rows: list[TraceRecord]) -> None:
    found = describe_conversations(collect([batch_from_records(rows) if rows else empty_batch()]).table)
    assert (found.sessions, found.requests, found.without_session) == (0, 0, len(rows))
    assert (found.turns, found.gap_s, found.think_s, found.duration_s) == (None,) * 4
    assert found.models.session_share is None


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["a", "b", "c", None])), max_size=40))
def test_turns_add_up_to_the_rows_and_gaps_to_the_spans(rows: list[tuple[int, str | None]]) -> None:
    table = collect([batch_from_records([record(at, name) for at, name in rows])]).table if rows else collect([]).table
    found = describe_conversations(table)
    assert sum(turns * sessions for turns, sessions in found.turn_counts) == found.requests
    assert found.requests + found.without_session == len(rows)
    sizes, gaps_s = session_gaps(table)
    assert Counter(sizes.tolist()) == Counter(Counter(name for _, name in rows if name is not None).values())
    spans: dict[str | None, list[int]] = defaultdict(list)
    for at, name in rows:
        spans[name].append(at)
    spans.pop(None, None)
    assert gaps_s.sum() == sum(max(stamps) - min(stamps) for stamps in spans.values())
    assert found.zero_gaps == np.count_nonzero(gaps_s == 0)


def test_lognormal_gaps_give_back_their_parameters() -> None:
    rng = np.random.default_rng(2)
    gaps_s = rng.lognormal(5.18, 1.96, (2000, 4))  # file 3's
    stamps_s = np.cumsum(np.column_stack((rng.random(2000) * 1e5, gaps_s)), axis=1).ravel()
    batch = pl.DataFrame({"received_at": stamps_s, "session_id": np.repeat(np.arange(2000), 5).astype(str),
                          "request_id": [""] * 10_000})  # fmt: skip
    found = describe_conversations(collect([batch]).table)
    assert found.gap_log_mean == pytest.approx(5.18, abs=5 * 1.96 / math.sqrt(8000))
    assert found.gap_log_std == pytest.approx(1.96, abs=5 * 1.96 / math.sqrt(16_000))


def test_real_head_equals_plain_counting() -> None:
    path = real_head("BurstGPT_3_head.csv")
    sessions = defaultdict(list)
    with path.open(newline="") as text:
        for row in csv.DictReader(text):
            if row["Session ID"]:
                sessions[row["Session ID"]].append(row)
    for rows in sessions.values():
        rows.sort(key=lambda row: float(row["Timestamp"]))
    found = describe_conversations(collect(read_trace(path)).table)
    assert dict(found.turn_counts) == Counter(map(len, sessions.values()))
    pairs = [pair for rows in sessions.values() for pair in pairwise(rows)]
    gaps = sorted(float(after["Timestamp"]) - float(before["Timestamp"]) for before, after in pairs)
    assert found.gap_s is not None
    assert [found.gap_s.n, found.gap_s.mean] == pytest.approx([len(gaps), sum(gaps) / len(gaps)])
    assert found.gap_s.p50 == gaps[math.ceil(len(gaps) / 2) - 1]
    growth = [
        int(after["Request tokens"]) - int(before["Request tokens"])
        for before, after in pairs
        if "0" not in (before["Response tokens"], after["Response tokens"])
    ]
    assert found.growth_tokens is not None
    assert [found.growth_tokens.n, found.growth_tokens.mean] == pytest.approx([len(growth), np.mean(growth)])
    thinks = [
        gap
        for before, after in pairs
        if (gap := float(after["Timestamp"]) - float(before["Timestamp"]) - float(before["Elapsed time"])) >= 0
    ]
    assert found.think_s is not None
    assert (found.think_s.n, found.overlapping) == (len(thinks), len(pairs) - len(thinks))
    assert found.think_s.mean == pytest.approx(np.mean(thinks))
    assert found.models.switches == sum(before["Model"] != after["Model"] for before, after in pairs)
