"""The whole analysis: rubbish gives plain answers and no NaN, parts add up, and the terminal shows names as text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.traces.strategies import RECORDS
from tests.traces.test_burstgpt import real_head
from traces.analysis import (
    FIELDS,
    WINDOW_SCHEMA,
    Analysis,
    Analyzed,
    Options,
    analyze,
    analyze_failures,
    parse_bounds,
)
from traces.analysis_report import render, render_comparison, render_failures
from traces.batch import SCHEMA, batch_from_records
from traces.burstiness import describe_arrivals
from traces.codec import read_trace
from traces.compare import compare
from traces.record import LogType, Origin, Outcome, TraceRecord
from traces.table import collect


def record(received_at: float, **fields: Any) -> TraceRecord:
    return TraceRecord(request_id="r", received_at=received_at, **fields)


def analyzed(records: Sequence[TraceRecord], options: Options | None = None) -> Analyzed:
    return analyze([batch_from_records(records)] if records else [], options)


def printed(analysis: Analysis) -> str:
    console = Console(file=io.StringIO(), width=150, highlight=False)
    render(analysis, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def numbers(value: object) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from numbers(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from numbers(each)


def is_finite(value: object) -> bool:
    return all(map(math.isfinite, numbers(msgspec.to_builtins(value))))


MONDAY_S = 1_000_080_000.0
"""2001-09-10 00:00 UTC."""


def trace(n: int, seed: int = 0, **fields: Any) -> list[TraceRecord]:
    rng = np.random.default_rng(seed)
    stamps_s = MONDAY_S + np.floor(np.cumsum(rng.gamma(0.5, 2.0, n)))
    return [
        record(
            float(stamp_s),
            elapsed_s=float(rng.integers(0, 20)),
            model=("ChatGPT", "GPT-4")[int(rng.integers(2))],
            log_type=tuple(LogType)[int(rng.integers(2))],
            session_id=f"s{rng.integers(n // 4 + 1)}",
            request_tokens=int(rng.integers(1, 3000)),
            response_tokens=int(rng.integers(1, 600)),
            outcome=Outcome.OK if rng.random() < 0.9 else Outcome.REJECTED,
            upstream=f"http://u{rng.integers(2)}",
            ttft_s=float(rng.random()),
            **fields,
        )
        for stamp_s in stamps_s
    ]


RUBBISH: dict[str, list[TraceRecord]] = {
    "empty": [],
    "one row": [record(5.0, request_tokens=1, response_tokens=1, elapsed_s=1.0)],
    "one failed row": [record(5.0, outcome=Outcome.REJECTED)],
    "all failures": [record(float(n), outcome=Outcome.UPSTREAM_ERROR, session_id="s") for n in range(100)],
    "all equal": [record(7.0, request_tokens=3, response_tokens=3, elapsed_s=0.0)] * 50,
    "giant gap": [record(float(n % 9), elapsed_s=1.0) for n in range(40)] + [record(2e11, elapsed_s=1.0)],
    "unsorted": trace(60)[::-1],
    "not a number": [record(math.nan), record(math.inf), record(4.0, elapsed_s=math.nan, ttft_s=math.inf)],
    "negative": [record(4.0, request_tokens=-5, response_tokens=-1, elapsed_s=-3.0), record(-1e6, request_tokens=1)],
    "huge": [record(4.0, request_tokens=2**62, elapsed_s=1e300), record(5.0, response_tokens=2**62)],
    "just before the epoch": [record(-3.6e-86)],  # less its hour's start it is the hour's end
    "the last year": [record(253402300799.0, elapsed_s=1e9), record(-62135596800.0)],
}


@pytest.mark.parametrize("records", RUBBISH.values(), ids=RUBBISH)
def test_rubbish_gives_an_answer_without_nan(records: list[TraceRecord]) -> None:
    found = analyzed(records, Options(zone="America/New_York", bounds_s={"ttft_s": 1.0}))
    assert is_finite(found.analysis)
    text = printed(found.analysis)
    assert "nan" not in text.lower()
    assert "inf" not in text.replace("Pacific", "").lower().split()
    assert msgspec.json.decode(msgspec.json.encode(found.analysis), type=Analysis) == found.analysis
    for column in found.windows.select(pl.col(pl.Float64)):
        assert column.is_nan().sum() == 0


def test_rows_that_are_left_out_are_told() -> None:
    analysis = analyzed([*RUBBISH["not a number"], *RUBBISH["negative"]]).analysis
    assert (analysis.source.rows_read, analysis.source.requests) == (5, 3)
    assert analysis.source.blanked == {"elapsed_s": 2, "ttft_s": 1, "request_tokens": 1, "response_tokens": 1}
    assert any("2 rows left out" in text for text in analysis.warnings)
    assert "2 rows left out: received_at: not a finite number" in printed(analysis)


@settings(max_examples=30, deadline=None)
@given(st.lists(RECORDS, max_size=30))
def test_any_records_give_an_answer_without_nan(records: list[TraceRecord]) -> None:
    found = analyzed(records, Options(all_origins=True))
    assert is_finite(found.analysis)
    assert found.analysis.source.requests == len(records)
    printed(found.analysis)


def test_order_and_batches_do_not_matter() -> None:
    # Without equal stamps, of which rows keep the order they came in.
    records = [msgspec.structs.replace(each, received_at=1e9 + n * 1.7) for n, each in enumerate(trace(400))]
    whole = analyzed(records).analysis
    batches = [batch_from_records(part) for part in (records[300:], records[:120], records[120:300])]
    assert analyze(batches).analysis == whole


def test_parts_add_up() -> None:
    found = analyzed(trace(3000))
    analysis = found.analysis
    everything, *parts = analysis.arrivals
    assert {part.log_type for part in parts} == set(LogType)
    assert sum(part.arrivals.requests for part in parts) == everything.arrivals.requests == 3000
    services = [each for each in analysis.lengths if each.service is not None]
    for side in ("request", "response"):
        whole = getattr(analysis.lengths[0].lengths, side).lengths.n
        assert sum(getattr(each.lengths, side).lengths.n for each in services) == whole
    assert analysis.failures.total.failures == 3000 - analysis.lengths[0].lengths.request.lengths.n  # type: ignore[union-attr]
    windows = found.windows
    assert dict(windows.schema) == WINDOW_SCHEMA
    for log_type in (None, *LogType):
        mine = windows.filter(pl.col("log_type").eq_missing(log_type), window_s=1200)
        (part,) = (each for each in analysis.arrivals if each.log_type == log_type)
        assert mine["requests"].sum() == part.arrivals.requests
        assert sum(each.windows for each in part.over_time) == mine.height == part.windows.windows


def test_a_part_is_described_by_its_own_stamps() -> None:
    records = trace(500)
    part = next(each for each in analyzed(records).analysis.arrivals if each.log_type is LogType.API)
    stamps_s = np.array([each.received_at for each in records if each.log_type is LogType.API])
    assert part.arrivals == describe_arrivals(stamps_s)


def test_failures_alone_are_those_of_the_analysis() -> None:
    records = trace(500)
    source, failures = analyze_failures([batch_from_records(records)])
    analysis = analyzed(records).analysis
    assert (source, failures) == (analysis.source, analysis.failures)


def test_others_than_clients_are_left_out_and_told() -> None:
    clients = trace(60, 1)
    replayed = [msgspec.structs.replace(each, origin=Origin.REPLAY, outcome=Outcome.REJECTED) for each in trace(30, 2)]
    found = analyzed(clients + replayed).analysis
    alone = analyzed(clients).analysis
    assert found.source.requests == 60
    assert msgspec.structs.replace(found, source=alone.source, warnings=alone.warnings) == alone
    assert any(text.endswith("left out: replay 30 (--origin takes them)") for text in found.warnings)
    both = analyzed(clients + replayed, Options(all_origins=True)).analysis
    assert both.source.requests == 90
    assert any("several origins together (client 60, replay 30)" in text for text in both.warnings)
    source, failures = analyze_failures([batch_from_records(clients + replayed)])
    assert failures.total.requests == 60
    console = Console(file=io.StringIO(), width=150, highlight=False)
    render_failures(source, failures, console)
    assert isinstance(console.file, io.StringIO)
    assert "left out: replay 30" in console.file.getvalue()


def test_without_clients_all_origins_are_together() -> None:
    records = [record(1.0, origin=Origin.SHADOW), record(2.0, origin=Origin.IMPORTED)]
    assert analyzed(records).analysis.source.requests == 2


def test_names_are_shown_as_text() -> None:
    evil = "[red]\x1b[31m\n</script>"
    records = [
        record(float(n), model=evil, upstream=evil + str(n % 2), error_type=evil, outcome=Outcome.REJECTED)
        for n in range(9)
    ]
    text = printed(analyzed(records).analysis)
    assert "\x1b" not in text
    assert "[red]?[31m?" in text


def test_steps_are_told() -> None:
    steps: list[str] = []
    analyze([batch_from_records(trace(20))], on_step=steps.append)
    assert steps[:2] == ["reading", "reading: 20 rows"]
    assert steps[-1] == "load"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ttft=0.5", {"ttft_s": 0.5}),
        ("ttft=0.5, e2e=10,tpot=1e-3,queue=2", {"ttft_s": 0.5, "elapsed_s": 10.0, "tpot_s": 0.001, "queue_s": 2.0}),
    ],
)
def test_bounds(text: str, expected: dict[str, float]) -> None:
    assert parse_bounds(text) == expected


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=", "ttft=0", "ttft=-1", "ttft=nan", "ttft=inf", "itl=1", "ttft=1,ttft=2"]
)
def test_wrong_bounds_name_the_rule(text: str) -> None:
    with pytest.raises(ValueError, match=r"slo: .*expected"):
        parse_bounds(text)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (Options(zone="Mars/Base"), "timezone"),
        (Options(slo=1.0), "availability"),
        (Options(most_services=0), "services"),
    ],
)
def test_wrong_options_name_the_rule(options: Options, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        analyze([], options)


def test_a_comparison_shows_its_verdict_and_names() -> None:
    a, b = (collect([batch_from_records(trace(300, seed))]).table for seed in (0, 1))
    console = Console(file=io.StringIO(), width=150, highlight=False)
    found = compare(a, b)
    render_comparison(found, "a[b].csv", "c.csv", console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.startswith(f"{found.verdict.upper()}: A a[b].csv, 300 requests; B c.csv, 300")
    assert all(axis.name in text for axis in found.axes)


def test_failures_of_an_empty_trace_are_shown() -> None:
    console = Console(file=io.StringIO(), width=100, highlight=False)
    render_failures(*analyze_failures([]), console)
    assert isinstance(console.file, io.StringIO)
    assert "Failures" in console.file.getvalue()


@pytest.mark.parametrize("name", ["BurstGPT_1_head.csv", "BurstGPT_3_head.csv"])
def test_real_head_by_plain_python(name: str) -> None:
    path = real_head(name)
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    analysis = analyze(read_trace(path, fields=FIELDS)).analysis
    stamps_s = sorted(float(row["Timestamp"]) for row in rows)
    good = [int(row["Response tokens"]) for row in rows if int(row["Response tokens"]) > 0]
    whole = analysis.arrivals[0].arrivals
    assert (whole.requests, whole.span_s) == (len(rows), stamps_s[-1] - stamps_s[0])
    assert analysis.failures.total.failures == len(rows) - len(good)
    response = analysis.lengths[0].lengths.response.lengths
    assert response is not None
    assert (response.n, response.max) == (len(good), max(good))
    assert response.mean == pytest.approx(sum(good) / len(good))
    services = {(row["Model"], row["Log Type"]) for row in rows}
    assert {(each.service.model, each.service.log_type.value) for each in analysis.lengths if each.service} == services
    assert sum(week for part in analysis.periodicity[0].weeks for week in part.requests if week) == len(rows)


def test_fields_are_the_records_own() -> None:
    assert set(FIELDS) <= SCHEMA.keys()
