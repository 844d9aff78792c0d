"""Mooncake's shapes of JSON lines, as published and as tools read them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import mooncake
from traces.batch import batch_from_records, records_from_batch
from traces.codec import UNIX_CLOCK, TraceFormatError, UnsortedTrace, WriteReport, block_tokens, open_writer, read_trace
from traces.mooncake import SHAPES, Blocks
from traces.record import LogType, Origin, Outcome, TokenSource, TraceRecord

TRACES = Path(os.environ.get("BURSTGATE_TRACES", "../shared/traces"))
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason=f"BURSTGATE_TRACES: no folder {TRACES}")


def request(second: float, tokens: int, answer: int = 5, **fields: Any) -> TraceRecord:
    return TraceRecord(
        request_id=f"r-{second}", received_at=second, request_tokens=tokens, response_tokens=answer, **fields
    )


def written(
    rows: Sequence[TraceRecord], shape: str, *, salt: bytes = b"salt", **options: Any
) -> tuple[list[dict[str, Any]], WriteReport]:
    stream = io.BytesIO()
    writer = open_writer(stream, format=shape, salt=salt, **options)
    for row in rows:
        writer.write(batch_from_records([row]))
    report = writer.close()
    return [json.loads(line) for line in stream.getvalue().splitlines()], report


def read(tmp_path: Path, lines: Sequence[dict[str, Any] | str], **options: Any) -> list[TraceRecord]:
    path = tmp_path / "trace"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return [record for batch in read_trace(path, **options) for record in records_from_batch(batch)]


# Reading


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            {"timestamp": 27_482, "input_length": 600, "output_length": 3, "hash_ids": [0, 2**64 - 1], "x": {}},
            {"received_at": 27.482, "request_tokens": 600, "response_tokens": 3, "prefix_blocks": (0, 2**64 - 1)},
        ),
        # No blocks, a fraction of a millisecond, integers as some libraries write them, no answer.
        (
            {"timestamp": 0.5, "input_length": 50.0, "output_length": 0},
            {"received_at": 0.0005, "request_tokens": 50, "response_tokens": 0, "prefix_blocks": None},
        ),
    ],
)
def test_mooncake_rows(tmp_path: Path, line: dict[str, Any], expected: dict[str, Any]) -> None:
    (record,) = read(tmp_path, [line], format="mooncake", dataset="set")
    assert record == TraceRecord(
        request_id=record.request_id, token_source=TokenSource.USAGE, origin=Origin.IMPORTED, run_id="set", **expected
    )


def test_vllm_rows_are_in_seconds(tmp_path: Path) -> None:
    (record,) = read(tmp_path, [{"timestamp": 1.5, "input_length": 3, "output_length": 1, "hash_ids": [4]}])
    assert (record.received_at, record.prefix_blocks) == (1.5, (4,))


def chat(id: int, parent: int, **fields: Any) -> dict[str, Any]:
    return {
        "chat_id": id,
        "parent_chat_id": parent,
        "timestamp": id / 4,
        "input_length": 20,
        "output_length": 2,
    } | fields


def test_bailian_chats_make_sessions(tmp_path: Path) -> None:
    rows = [chat(1, -1, type="text", turn=1), chat(2, 1), chat(3, -1), chat(4, 2), chat(5, 99), chat(6, 99)]
    records = read(tmp_path, rows)
    assert [row.session_id for row in records] == ["1", "1", "3", "1", "99", "99"]
    assert {row.log_type for row in records} == {LogType.CONVERSATION}
    assert records[3].received_at == 1.0


def test_aiperf_turns_hold_what_is_new(tmp_path: Path) -> None:
    """A turn's prompt is the turns before it with their answers, and the new tokens."""
    rows: list[dict[str, Any]] = [
        {"session_id": "a", "timestamp": 0, "input_length": 10, "output_length": 5},
        {"timestamp": 5, "input_length": 7, "output_length": 1},
        {"session_id": "a", "timestamp": 9, "input_length": 20, "output_length": 6},
        {"session_id": "a", "timestamp": 12, "input_length": 1, "output_length": 1},
    ]
    records = read(tmp_path, rows, format="aiperf")
    assert [(row.session_id, row.request_tokens) for row in records] == [("a", 10), (None, 7), ("a", 35), ("a", 42)]
    assert written(records, "aiperf")[0] == rows


GOOD = '{"timestamp":1,"input_length":2,"output_length":3}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"timestamp":1,"input_length":2}', "expected a row of this format: Object missing required field `output_l"),
        ('{"input_length":2,"output_length":3}', "column 'timestamp': expected a time in every row, got 'None'"),
        ('{"delay":1,"input_length":2,"output_length":3}', "column 'timestamp': expected a time in every row"),
        (GOOD.replace(":1", ":-1"), "column 'timestamp': expected a time >= 0 and < 4294967296 s, got '-1'"),
        (GOOD.replace(":1", ":1e300"), "column 'timestamp': expected a time >= 0 and < 4294967296 s, got '1e+300'"),
        (GOOD.replace(":1", ":1e999"), "column 'timestamp': expected a row of this format: Number out of range"),
        (GOOD.replace(":1", ":NaN"), "expected a row of this format: JSON is malformed"),
        (GOOD.replace(":2", ":2.5"), "column 'input_length': expected an integer >= 0, got '2.5'"),
        (GOOD.replace(":2", ":-2"), "column 'input_length': expected an integer >= 0, got '-2'"),
        (GOOD.replace(":2", ':"2"'), "column 'input_length': expected `int | float`, got `str`"),
        (GOOD.replace(":3", ":1000000000000000000"), "column 'output_length': expected an integer >= 0, got"),
        (GOOD.replace("}", ',"hash_ids":[-1]}'), "column 'hash_ids': expected `int` >= 0"),
        (GOOD.replace("}", ',"hash_ids":[18446744073709551616]}'), "column 'hash_ids': expected integers < 2^64, got"),
        (GOOD.replace("}", ',"hash_ids":[1.5]}'), "column 'hash_ids': expected `int`, got `float`"),
        (
            GOOD.replace(":1", ":1" + "0" * 400),
            "column 'timestamp': expected a time >= 0 and < 4294967296 s, got '1000",
        ),
        (GOOD.replace(":1", ":1" + "0" * 9999), "column 'timestamp': expected"),
        (GOOD.replace(":2", ":1" + "0" * 400), "column 'input_length': expected an integer >= 0, got '1000"),
        (
            GOOD.replace("{", '{"x":' + "[" * 9999 + "]" * 9999 + ","),
            "expected a row of this format: maximum recursion",
        ),
        (GOOD[:-3], "expected a row of this format: Input data was truncated"),
        ("[1]", "expected `object`, got `array`"),
        ("\x00", "expected a row of this format: JSON is malformed"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(TraceFormatError) as caught:
        read(tmp_path, [GOOD, "", line, GOOD], format="mooncake")
    assert str(caught.value).startswith(f"{tmp_path / 'trace'}:3: {message}")


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "MAX_LINE_BYTES", 4096)
    ids = ",".join(["1"] * 5000)
    with pytest.raises(TraceFormatError, match=r"trace:2: expected a line of at most 4096 bytes, got a longer one, b'"):
        read(tmp_path, [GOOD, GOOD.replace("}", f',"hash_ids":[{ids}]}}')], format="mooncake")


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b'{"timestamp":1,"input_length":2,"output_length":3,"session_id":"\xff"}')
    with pytest.raises(TraceFormatError, match=":1: "):
        list(read_trace(path, format="mooncake"))


# Writing


def test_what_tools_read(tmp_path: Path) -> None:
    rows = [
        request(100.0, 600, session_id="s", prefix_blocks=(1, 2)),
        request(100.0015, 1100, session_id="s", prefix_blocks=(1, 3, 4)),
        request(101.25, 512, prefix_blocks=(1,)),
    ]
    lines, report = written(rows, "mooncake", block_tokens=512)
    assert report == WriteReport(3, 3, {}, {"stamps_floored": 1, "session_not_said": 2})
    assert [list(line) for line in lines] == [["timestamp", "input_length", "output_length", "hash_ids"]] * 3
    assert [line["timestamp"] for line in lines] == [0, 1, 1250]
    assert all(type(line["timestamp"]) is int for line in lines)
    first, second, third = (line["hash_ids"] for line in lines)
    assert third == first[:1] == second[:1]
    assert len({*first, *second}) == 4
    # vLLM's are seconds, and a session is a chain of chats in Alibaba's.
    lines, report = written(rows, "timed_trace", block_tokens=512)
    assert [line["timestamp"] for line in lines] == [0.0, 0.0015, 1.25]
    assert report.notes == {"session_not_said": 2}
    lines, report = written(rows, "bailian", block_tokens=512)
    assert [(line["chat_id"], line["parent_chat_id"], line["turn"]) for line in lines] == [
        (0, -1, 1),
        (1, 0, 2),
        (2, -1, 1),
    ]
    assert report.notes == {"session_of_one_request": 1}


def test_ids_are_new_in_each_file() -> None:
    rows = [request(1.0, 600, prefix_blocks=(1, 2)), request(2.0, 600)]

    def ids(salt: bytes) -> list[int]:
        return [
            block for line in written(rows, "mooncake", salt=salt, block_tokens=512)[0] for block in line["hash_ids"]
        ]

    assert ids(b"a") == ids(b"a")
    assert not {*ids(b"a")} & {*ids(b"b"), 1, 2}
    assert max(ids(b"a")) < 2**63


def test_without_a_salt_one_is_drawn() -> None:
    def ids() -> bytes:
        stream = io.BytesIO()
        open_writer(stream, format="mooncake").write(batch_from_records([request(1.0, 600)]))
        return stream.getvalue()

    assert ids() != ids()


def test_a_session_alone_shares_no_block() -> None:
    rows = [request(float(turn), 600 * turn, session_id="s") for turn in range(1, 5)]
    for shape, size in (("mooncake", 512), ("bailian", 16), ("timed_trace", 16)):
        lines, report = written(rows, shape)
        ids = [block for line in lines for block in line["hash_ids"]]
        assert len(set(ids)) == len(ids) == sum(-(-600 * turn // size) for turn in range(1, 5))
        assert report.notes["prefix_unknown"] == 4


def test_blocks_of_unknown_size_share_whole_ones_only() -> None:
    """The gateway's own: 256 bytes of text each, and what is left over after the last is not in them."""
    rows = [request(1.0, 150, prefix_blocks=(1, 2, 3, 4)), request(2.0, 150, prefix_blocks=(1, 2)), request(3.0, 150)]
    lines, report = written(rows, "mooncake")
    first, second, third = (line["hash_ids"] for line in lines)
    assert [len(first), len(second), len(third)] == [3, 3, 3]
    assert first[:2] == second[:2]
    assert len({*first, *second, *third}) == 7
    assert report.notes == {"prefix_block_size_estimated": 2, "prefix_unknown": 1}


def test_blocks_that_do_not_cover_are_filled_up() -> None:
    (line,), report = written([request(1.0, 600, prefix_blocks=(1,))], "timed_trace", block_tokens=512)
    assert len(line["hash_ids"]) == 2
    assert report.notes == {"prefix_partly_known": 1}
    (line,), report = written([request(1.0, 600, prefix_blocks=(1, 2, 3, 4))], "timed_trace", block_tokens=512)
    assert (len(line["hash_ids"]), report.notes) == (2, {})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (request(1.0, 0), "no_request_tokens"),
        (request(1.0, 5, 0), "no_response_tokens"),
        (TraceRecord(request_id="r", received_at=1.0, request_tokens=5), "no_response_tokens"),
        (TraceRecord(request_id="r", received_at=1.0, response_tokens=5), "no_request_tokens"),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_end_a_run_are_dropped(shape: str, row: TraceRecord, reason: str) -> None:
    assert written([row], shape) == ([], WriteReport(1, 0, {reason: 1}, {}))


def test_failures_are_kept_or_dropped() -> None:
    rows = [request(1.0, 5, outcome=Outcome.TRUNCATED)]
    assert written(rows, "aiperf")[1] == WriteReport(1, 1, {}, {"failure_as_request": 1})
    assert written(rows, "aiperf", failures="drop")[1] == WriteReport(1, 0, {"failure": 1}, {})


def test_aiperf_history_that_was_cut() -> None:
    rows = [request(1.0, 100, session_id="s"), request(2.0, 50, session_id="s"), request(3.0, 200, session_id="s")]
    lines, report = written(rows, "aiperf")
    # 105 tokens are in front of the second turn, 111 in front of the third.
    assert [line["input_length"] for line in lines] == [100, 1, 89]
    assert report.notes == {"history_cut": 1}


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_out_of_order_are_refused(shape: str) -> None:
    rows = [request(2.0, 5), request(2.0, 5), request(1.0, 5)]
    with pytest.raises(UnsortedTrace, match=f"row 3: column 'received_at': .* as {shape} demands, got '1.0' after"):
        written(rows, shape)


REQUESTS = st.lists(
    st.builds(
        request,
        st.integers(0, 10**9).map(lambda millis: millis / 1e3),
        st.integers(1, 3000),
        st.integers(1, 10**6),
        session_id=st.none() | st.sampled_from(["a", "b", "c"]),
        prefix_blocks=st.none() | st.lists(st.integers(0, 2**64 - 1), max_size=8).map(tuple),
    ),
    min_size=1,
    max_size=12,
).map(lambda rows: sorted(rows, key=lambda row: row.received_at))


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=40, deadline=None)
@given(rows=REQUESTS, size=st.sampled_from([None, 16, 512]))
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, shape: str, rows: list[TraceRecord], size: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / f"trip.{shape}"
    with path.open("wb") as stream:
        writer = mooncake.Writer(
            stream, shape=shape, blocks=Blocks(shape, size, b"s"), clock=UNIX_CLOCK, drop_failures=False
        )
        writer.write(batch_from_records(rows))
        report = writer.close()
    assert report.rows_written == len(rows)
    back = [record for batch in read_trace(path, format=shape) for record in records_from_batch(batch)]
    said = list(records_from_batch(writer.said))
    for record, expected, row in zip(back, said, rows, strict=True):
        fields = ("received_at", "request_tokens", "response_tokens", "session_id", "prefix_blocks")
        assert [getattr(record, name) for name in fields] == [getattr(expected, name) for name in fields]
        assert abs(record.received_at - (row.received_at - rows[0].received_at)) < 0.0011
        if shape != "aiperf":
            assert record.request_tokens == row.request_tokens
            assert writer.block_tokens is not None
            assert len(record.prefix_blocks or ()) == -(-(row.request_tokens or 0) // writer.block_tokens)
    if shape == "bailian":
        pairs = {(row.session_id, record.session_id) for row, record in zip(rows, back, strict=True) if row.session_id}
        assert len(pairs) == len({row.session_id for row in rows if row.session_id})


@settings(max_examples=40, deadline=None)
@given(rows=REQUESTS)
def test_shared_prefixes_are_those_of_the_source(rows: list[TraceRecord]) -> None:
    def shared(one: Sequence[int], other: Sequence[int]) -> int:
        differ = np.flatnonzero([a != b for a, b in zip(one, other, strict=False)])
        return int(differ[0]) if len(differ) else min(len(one), len(other))

    lines, _ = written(rows, "timed_trace", block_tokens=64)
    known = [(row.prefix_blocks or ())[: -(-(row.request_tokens or 0) // 64)] for row in rows]
    for index, line in enumerate(lines):
        for other in range(index):
            assert shared(line["hash_ids"], lines[other]["hash_ids"]) == shared(known[index], known[other])


@needs_traces
def test_the_published_trace_keeps_its_structure(tmp_path: Path) -> None:
    source = TRACES / "mooncake_conversation_trace.jsonl"
    assert block_tokens(source) == 512
    path = tmp_path / "trace"
    with source.open("rb") as stream, path.open("wb") as head:
        head.writelines(line for _, line in zip(range(500), stream, strict=False))
    original = [json.loads(line) for line in path.read_bytes().splitlines()]
    records = [record for batch in read_trace(path) for record in records_from_batch(batch)]
    lines, report = written(records, "mooncake", block_tokens=512)
    assert report == WriteReport(500, 500, {}, {})
    renamed: dict[int, int] = {}
    for line, row in zip(lines, original, strict=True):
        assert [line[key] for key in ("timestamp", "input_length", "output_length")] == [
            row[key] for key in ("timestamp", "input_length", "output_length")
        ]
        assert [
            renamed.setdefault(old, new) for old, new in zip(row["hash_ids"], line["hash_ids"], strict=True)
        ] == line["hash_ids"]
    assert len(set(renamed.values())) == len(renamed)
    assert msgspec.json.decode(path.read_bytes().splitlines()[0])["hash_ids"] != lines[0]["hash_ids"]
