"""EvalScope's workload traces."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from traces.batch import batch_from_records, records_from_batch
from traces.codec import TraceFormatError, UnsortedTrace, WriteReport, open_writer, read_trace
from traces.evalscope import FIRST_TOKEN, TOKENS
from traces.record import Origin, Outcome, TokenSource, TraceRecord


def read(tmp_path: Path, lines: Sequence[dict[str, Any]]) -> list[TraceRecord]:
    path = tmp_path / "trace"
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    return [record for batch in read_trace(path) for record in records_from_batch(batch)]


def test_rows(tmp_path: Path) -> None:
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_completion_tokens": 9}
    rows: list[dict[str, Any]] = [
        {"body": chat, "timestamp": 1.5, "request_id": "q", "completion_tokens": 4, "headers": {"X": "y"}},
        {"body": json.dumps({"model": "m", "prompt": [1, 2, 3], "max_tokens": 5}), "timestamp": "2.25"},
        {"body": {"model": "m", "prompt": ["a", "b"]}, "timestamp": "2023-11-16T18:17:03Z"},
    ]
    records = read(tmp_path, rows)
    fields: dict[str, Any] = {"model": "m", "origin": Origin.IMPORTED, "run_id": "trace"}
    assert records == [
        TraceRecord(
            records[0].request_id,
            1.5,
            response_tokens=4,
            client_request_id="q",
            endpoint="/v1/chat/completions",
            stream=True,
            max_tokens=9,
            token_source=TokenSource.USAGE,
            **fields,
        ),
        TraceRecord(records[1].request_id, 2.25, request_tokens=3, max_tokens=5, endpoint="/v1/completions", **fields),
        TraceRecord(records[2].request_id, 1700158623.0, endpoint="/v1/completions", **fields),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestamp": -1}, "column 'timestamp': expected seconds >= 0 and < 4294967296, got '-1'"),
        ({"timestamp": "noon"}, "column 'timestamp': expected a number of seconds or a date and time, got 'noon'"),
        ({"timestamp": "nan"}, "column 'timestamp': expected seconds >= 0"),
        ({"completion_tokens": 0}, "column 'completion_tokens': expected an integer > 0, got '0'"),
        ({"completion_tokens": 2**63}, "column 'completion_tokens': expected an integer > 0, got"),
        ({"body": {"max_tokens": -5}}, "column 'max_tokens': expected an integer > 0, got '-5'"),
        ({"body": "{"}, "column 'body': expected a JSON object, got '{'"),
        ({"body": 5}, "column 'body': expected `str | object`, got `int`"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"body": {"model": "m"}, "timestamp": 1}
    with pytest.raises(TraceFormatError) as caught:
        read(tmp_path, [good, good | change])
    assert str(caught.value).startswith(f"{tmp_path / 'trace'}:3: {message}")


def request(second: float, tokens: int, **fields: Any) -> TraceRecord:
    return TraceRecord(
        request_id=f"r-{second}", received_at=second, model="m", request_tokens=tokens, response_tokens=3, **fields
    )


def written(rows: list[TraceRecord], **options: Any) -> tuple[list[dict[str, Any]], WriteReport]:
    stream = io.BytesIO()
    writer = open_writer(stream, format="workload_trace", salt=b"s", **options)
    writer.write(batch_from_records(rows))
    report = writer.close()
    return [json.loads(line) for line in stream.getvalue().splitlines()], report


def test_bodies_have_exact_prompts_and_share_what_the_trace_shares() -> None:
    rows = [
        request(10.0, 40, prefix_blocks=(1, 2, 3), client_request_id="q", session_id="s"),
        request(11.5, 33, prefix_blocks=(1, 2, 9), stream=True),
        request(12.0, 33),
    ]
    lines, report = written(rows, block_tokens=16)
    assert [line["timestamp"] for line in lines] == [0.0, 1.5, 2.0]
    assert [line.get("request_id") for line in lines] == ["q", None, None]
    prompts = [line["body"].pop("prompt") for line in lines]
    assert lines[0]["body"] == {
        "model": "m",
        "max_tokens": 3,
        "min_tokens": 3,
        "ignore_eos": True,
        "stream": False,
    }
    assert [len(prompt) for prompt in prompts] == [40, 33, 33]
    assert {FIRST_TOKEN <= token < FIRST_TOKEN + TOKENS for prompt in prompts for token in prompt} == {True}
    assert prompts[0][:32] == prompts[1][:32]
    assert prompts[0][32:33] != prompts[1][32:33]
    assert prompts[2][:16] != prompts[0][:16]
    assert report == WriteReport(3, 3, {}, {"session_not_said": 1, "prefix_unknown": 1})
    # EvalScope takes no key that it does not know.
    assert {key for line in lines for key in line} == {"timestamp", "body", "completion_tokens", "request_id"}


def test_rows_that_can_not_be_sent_are_dropped() -> None:
    rows = [
        TraceRecord(request_id="a", received_at=1.0, request_tokens=4, response_tokens=4),
        TraceRecord(request_id="b", received_at=1.0, model="m", request_tokens=4),
        request(1.0, 4, outcome=Outcome.REJECTED),
    ]
    dropped = {"no_model": 1, "no_response_tokens": 1, "failure": 1}
    assert written(rows, failures="drop")[1] == WriteReport(3, 0, dropped, {})


def test_rows_out_of_order_are_refused() -> None:
    with pytest.raises(UnsortedTrace, match=r"row 2: .* as workload_trace demands"):
        written([request(2.0, 5), request(1.0, 5)])
