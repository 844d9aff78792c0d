from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.traces.test_burstgpt import real_head
from traces import summary as module
from traces.batch import batch_from_records, empty_batch
from traces.codec import read_trace
from traces.record import LogType, Outcome, TraceRecord
from traces.summary import GroupStats, Summary, TokenStats, render, summarize

NO_TOKENS = TokenStats(requests=0, sum=None, mean=None, p50=None, p90=None, p99=None, max=None)
EMPTY = Summary(
    requests=0,
    first_received_at=None,
    last_received_at=None,
    span_s=None,
    rate_rps=None,
    iat_mean_s=None,
    iat_cv=None,
    sessions=0,
    failures=0,
    failure_rate=None,
    request_tokens=NO_TOKENS,
    response_tokens=NO_TOKENS,
    by_outcome={},
    by_model=(),
    by_log_type=(),
)


TOKENS = st.one_of(st.integers(0, 60), st.sampled_from([2**40 - 1, 2**40]))
"""Some too large to share an integer with their group."""


def record(received_at: float, **fields: Any) -> TraceRecord:
    return TraceRecord(request_id="r", received_at=received_at, **fields)


def rendered(summary: Summary, width: int = 80) -> str:
    stream = io.StringIO()
    render(summary, Console(file=stream, width=width))
    return stream.getvalue()


def test_a_small_trace_worked_by_hand() -> None:
    rows = [
        record(14.0, model="a", session_id="s", request_tokens=30, response_tokens=3, log_type=LogType.CONVERSATION),
        record(10.0, model="a", session_id="s", request_tokens=10, response_tokens=1),
        record(11.0, model=None, outcome=Outcome.TRUNCATED, request_tokens=999, response_tokens=5),  # failed: no tokens
        record(12.0, model="b", session_id="t", request_tokens=None, response_tokens=2),
    ]
    request_a = TokenStats(requests=2, sum=40, mean=20.0, p50=10, p90=30, p99=30, max=30)
    response_a = TokenStats(requests=2, sum=4, mean=2.0, p50=1, p90=3, p99=3, max=3)
    one = TokenStats(requests=1, sum=2, mean=2.0, p50=2, p90=2, p99=2, max=2)
    expected = Summary(
        requests=4,
        first_received_at=10.0,
        last_received_at=14.0,
        span_s=4.0,
        rate_rps=1.0,
        iat_mean_s=4 / 3,
        iat_cv=pytest.approx(math.sqrt(2) / 4),  # type: ignore[arg-type]  # gaps 1, 1, 2
        sessions=2,
        failures=1,
        failure_rate=0.25,
        request_tokens=request_a,
        response_tokens=TokenStats(requests=3, sum=6, mean=2.0, p50=2, p90=3, p99=3, max=3),
        by_outcome={"ok": 3, "truncated": 1},
        by_model=(
            GroupStats("a", 2, 0, 0.0, request_a, response_a),
            GroupStats(None, 1, 1, 1.0, NO_TOKENS, NO_TOKENS),
            GroupStats("b", 1, 0, 0.0, NO_TOKENS, one),
        ),
        by_log_type=(
            GroupStats(
                "API log",
                3,
                1,
                1 / 3,
                TokenStats(requests=1, sum=10, mean=10.0, p50=10, p90=10, p99=10, max=10),
                TokenStats(requests=2, sum=3, mean=1.5, p50=1, p90=2, p99=2, max=2),
            ),
            GroupStats(
                "Conversation log",
                1,
                0,
                0.0,
                TokenStats(requests=1, sum=30, mean=30.0, p50=30, p90=30, p99=30, max=30),
                TokenStats(requests=1, sum=3, mean=3.0, p50=3, p90=3, p99=3, max=3),
            ),
        ),
    )
    assert summarize([batch_from_records(rows)]) == expected
    assert summarize(batch_from_records([row]) for row in rows) == expected


@pytest.mark.parametrize("batches", [[], [empty_batch()]])
def test_an_empty_trace_has_no_statistics(batches: list[Any]) -> None:
    summary = summarize(batches)
    assert summary == EMPTY
    assert "requests" in rendered(summary)


@pytest.mark.parametrize(
    ("stamps", "span_s", "rate_rps", "iat_mean_s", "iat_cv"),
    [
        ([5.0], 0.0, None, None, None),
        ([5.0, 5.0, 5.0], 0.0, None, 0.0, None),
        ([5.0, 7.0], 2.0, 1.0, 2.0, None),
        ([7.0, 5.0, 6.0], 2.0, 1.5, 1.0, 0.0),
    ],
)
def test_gaps(stamps: list[float], span_s: float, rate_rps: float, iat_mean_s: float, iat_cv: float) -> None:
    summary = summarize([batch_from_records([record(stamp) for stamp in stamps])])
    assert (summary.span_s, summary.rate_rps, summary.iat_mean_s, summary.iat_cv) == (
        span_s,
        rate_rps,
        iat_mean_s,
        iat_cv,
    )
    rendered(summary)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.tuples(st.floats(0, 1e9), TOKENS, st.sampled_from("abc")), min_size=1, max_size=60),
    cut=st.integers(1, 60),
    compact_rows=st.sampled_from([0, 3, 100_000]),
)
def test_it_equals_numpy_however_the_batches_fall(
    values: list[tuple[float, int, str]], cut: int, compact_rows: int
) -> None:
    rows = [record(at, response_tokens=tokens, session_id=name) for at, tokens, name in values]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COMPACT_ROWS", max(compact_rows, 1))
        got = summarize(batch_from_records(rows[first : first + cut]) for first in range(0, len(rows), cut))
    tokens = [tokens for _, tokens, _ in values]
    assert got.sessions == len({name for _, _, name in values})
    assert got.response_tokens == TokenStats(
        len(tokens),
        sum(tokens),
        sum(tokens) / len(tokens),
        int(np.percentile(tokens, 50, method="inverted_cdf")),
        int(np.percentile(tokens, 90, method="inverted_cdf")),
        int(np.percentile(tokens, 99, method="inverted_cdf")),
        max(tokens),
    )
    gaps = np.diff(np.sort([at for at, _, _ in values]))
    if len(gaps) > 1 and gaps.sum() > 1e-3:
        assert got.iat_mean_s == pytest.approx(gaps.mean())
        assert got.iat_cv == pytest.approx(gaps.std() / gaps.mean(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["BurstGPT_1_head.csv", "BurstGPT_3_head.csv"])
def test_real_heads_equal_plain_counting(name: str) -> None:
    path = real_head(name)
    with path.open(newline="") as text:
        rows = list(csv.DictReader(text))
    good = [row for row in rows if row["Response tokens"] != "0"]
    stamps = sorted(float(row["Timestamp"]) for row in rows)
    gaps = [after - before for before, after in itertools.pairwise(stamps)]
    mean_gap = sum(gaps) / len(gaps)
    got = summarize(read_trace(path, batch_rows=37))

    assert (got.requests, got.failures) == (len(rows), len(rows) - len(good))
    assert got.failure_rate == (len(rows) - len(good)) / len(rows)
    assert (got.first_received_at, got.last_received_at, got.span_s) == (stamps[0], stamps[-1], stamps[-1] - stamps[0])
    assert got.rate_rps == len(rows) / (stamps[-1] - stamps[0])
    assert got.iat_mean_s == pytest.approx(mean_gap)
    assert got.iat_cv == pytest.approx(math.sqrt(sum((gap - mean_gap) ** 2 for gap in gaps) / len(gaps)) / mean_gap)
    assert got.sessions == len({row["Session ID"] for row in rows if row.get("Session ID")})
    for column, stats in (("Request tokens", got.request_tokens), ("Response tokens", got.response_tokens)):
        values = sorted(int(row[column]) for row in good)
        p50, p90, p99 = (values[math.ceil(share * len(values)) - 1] for share in (0.5, 0.9, 0.99))
        assert stats == TokenStats(len(values), sum(values), sum(values) / len(values), p50, p90, p99, values[-1])
    for column, groups in (("Model", got.by_model), ("Log Type", got.by_log_type)):
        assert {group.name: group.requests for group in groups} == Counter(row[column] for row in rows)
        assert {group.name: group.requests - group.failures for group in groups} == Counter(row[column] for row in good)
    assert f"{len(rows)}" in rendered(got)


def test_json_form_has_null_for_unknown() -> None:
    decoded = json.loads(msgspec.json.encode(summarize([])))
    assert decoded["requests"] == 0
    assert decoded["iat_cv"] is None
    assert decoded["request_tokens"]["p99"] is None


def test_tables_fit_a_terminal_and_defuse_names() -> None:
    hostile = "\x1b[31m[bold]red[/bold]\n" + "x" * 200
    rows = [record(float(number), model=f"model-{number}", request_tokens=7) for number in range(30)]
    text = rendered(summarize([batch_from_records([*rows, record(5.0, model=hostile), record(5.5, model=hostile)])]))
    assert "\x1b" not in text
    assert "?[31m[bold]re" in text  # shown as it is, not obeyed
    assert "11 more are not shown" in text
    assert max(map(len, text.splitlines())) <= 80


def test_sums_beyond_64_bits_are_exact() -> None:
    rows = [record(1.0, model="m", request_tokens=2**62)] * 5
    assert summarize([batch_from_records(rows)]).request_tokens.sum == 5 * 2**62
