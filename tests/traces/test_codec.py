"""What holds for every format; what is particular to BurstGPT's is in test_burstgpt."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces.strategies import RECORDS
from traces import codec, jsonl, parquet
from traces.batch import batch_from_records, records_from_batch
from traces.codec import (
    COLUMNS_6,
    COLUMNS_8,
    FORMATS,
    TraceFormatError,
    WriteReport,
    block_tokens,
    open_writer,
    read_trace,
    sniff,
)
from traces.record import Outcome, TraceRecord

ROW = TraceRecord(request_id="r-1", received_at=1700000000.25, model="m", request_tokens=2, response_tokens=3)
FAILED = TraceRecord(request_id="r-2", received_at=1700000001.0, model="m", outcome=Outcome.CLIENT_GONE)
LATER = msgspec.structs.replace(ROW, request_id="r-3", received_at=1700000002.5)
OURS = ("burstgpt", "burstgpt6", "parquet", "jsonl")
"""The formats that can say that a request failed."""


def write(path: Path, batches: list[list[TraceRecord]], **options: Any) -> WriteReport:
    with path.open("wb") as stream:
        writer = open_writer(stream, **options)
        for rows in batches:
            writer.write(batch_from_records(rows))
        report = writer.close()
        assert not stream.closed
    return report


def records(path: Path, **options: Any) -> list[TraceRecord]:
    return [record for batch in read_trace(path, **options) for record in records_from_batch(batch)]


UNSAYABLE = {"azure": "request_tokens_unknown", "azure_multimodal": "request_tokens_unknown"}


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_recognised_and_counts(tmp_path: Path, format: str) -> None:
    path = tmp_path / "trace"
    report = write(path, [[ROW, FAILED], [], [LATER]], format=format)
    lost = {} if format in OURS else {UNSAYABLE.get(format, "no_request_tokens"): 1}
    assert (report.rows_in, report.rows_written, report.dropped) == (3, 3 - len(lost), lost)
    # Without a session AIPerf's rows are Mooncake's.
    assert sniff(path) == ("mooncake" if format == "aiperf" else format)
    assert len(records(path, format=format)) == 3 - len(lost)

    report = write(path, [[ROW, FAILED], [LATER]], format=format, failures="drop")
    assert (report.rows_in, report.rows_written, report.dropped) == (3, 2, {"failure": 1})
    rows = records(path)
    assert [row.outcome for row in rows] == [Outcome.OK] * 2
    assert [(row.request_tokens, row.response_tokens) for row in rows] == [(2, 3)] * 2


@pytest.mark.parametrize("format", FORMATS)
def test_a_trace_of_no_rows(tmp_path: Path, format: str) -> None:
    path = tmp_path / "trace"
    assert write(path, [], format=format) == WriteReport(0, 0, {}, {})
    assert records(path, format=format) == []


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
@settings(max_examples=40, deadline=None)
@given(batches=st.lists(st.lists(RECORDS, max_size=4), max_size=3), batch_rows=st.integers(1, 5))
def test_every_field_survives(
    tmp_path_factory: pytest.TempPathFactory, format: str, batches: list[list[TraceRecord]], batch_rows: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"trip.{format}"
    rows = [row for batch in batches for row in batch]
    assert write(path, batches, format=format) == WriteReport(len(rows), len(rows), {}, {})
    frames = list(read_trace(path, format=format, batch_rows=batch_rows))
    assert all(1 <= frame.height <= batch_rows for frame in frames)
    assert [record for frame in frames for record in records_from_batch(frame)] == rows


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_stream_that_is_no_file(format: str) -> None:
    stream = io.BytesIO()
    writer = open_writer(stream, format=format)
    writer.write(batch_from_records([ROW]))
    writer.close()
    assert len(stream.getvalue()) > 100


KNOWN = (
    f"expected a Parquet file, a JSON object a line, or a CSV header with the columns {','.join(COLUMNS_6)}"
    f" or {','.join(COLUMNS_8)} or TIMESTAMP,ContextTokens,GeneratedTokens, got "
)
HINT = "; another CSV needs a map of its columns"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"TIMESTAMP,ContextTokens\n", f":1: {KNOWN}'TIMESTAMP,ContextTokens'{HINT}"),
        (b"\n", f":1: {KNOWN}''{HINT}"),
        (b"[1]\n", f":1: {KNOWN}'[1]'{HINT}"),
        (b"", ":1: expected a header line, got an empty file"),
        (b"\xfe\xff", ":1: expected a CSV header in UTF-8, got b'\\xfe\\xff'"),
        (b"\x1f\x8b\x08\0", ": expected a trace that is not compressed, got gzip: unpack it first"),
        (b"\x28\xb5\x2f\xfd\x04", ": expected a trace that is not compressed, got zstd: unpack it first"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(TraceFormatError) as caught:
        read_trace(path)
    assert str(caught.value) == f"{path}{message}"


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    message = re.escape(f"format: expected one of {', '.join(FORMATS)}, got 'csv'")
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path, format="csv")
    with pytest.raises(ValueError, match=message):
        open_writer(io.BytesIO(), format="csv")
    for format in (None, *FORMATS):
        with pytest.raises(FileNotFoundError):
            list(read_trace(tmp_path / "nothing", format=format))


# jsonl


def test_json_lines_are_objects_with_every_field(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    write(path, [[ROW]], format="jsonl")
    assert path.read_text() == (
        '{"request_id":"r-1","received_at":1700000000.25,"session_id":null,"elapsed_s":null,"model":"m",'
        '"request_tokens":2,"response_tokens":3,"log_type":"API log","outcome":"ok","client_request_id":null,'
        '"served_model":null,"status":null,"error_type":null,"ttft_s":null,"tpot_s":null,"queue_s":null,'
        '"endpoint":"","stream":false,"upstream":null,"attempts":0,"finish_reason":null,"cached_tokens":null,'
        '"max_tokens":null,"token_source":"none","prefix_blocks":null,"origin":"client","run_id":null,'
        '"shadow_of":null,"tenant":null,"gateway":null,'
        '"shaping_rule":null,"shaping_class":null,"agreement":null}\n'
    )


MINIMAL = b'{"request_id":"r","received_at":5}'


@pytest.mark.parametrize(
    "content",
    [MINIMAL, MINIMAL + b"\n", b"\xef\xbb\xbf" + MINIMAL + b"\r\n", b"\n\n " + MINIMAL + b" \n\n"],
)
def test_json_lines_may_be_sparse(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    assert records(path) == [TraceRecord(request_id="r", received_at=5.0)]


def json_line(fields: str) -> bytes:
    return b'{"request_id":"r","received_at":5,' + fields.encode() + b"}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json_line('"request_tokens":"5"'), "column 'request_tokens': expected `int | null`, got `str`, in b'{"),
        (json_line('"request_tokens":5.5'), "column 'request_tokens': expected `int | null`, got `float`"),
        (
            json_line('"request_tokens":-5'),
            "column 'request_tokens': expected a number of tokens >= 0, or null, got '-5'",
        ),
        (json_line('"max_tokens":9223372036854775808'), "column 'max_tokens': expected `int` <= 9223372036854775807"),
        (json_line('"prefix_blocks":[-1]'), "column 'prefix_blocks': expected `int` >= 0"),
        (json_line('"prefix_blocks":[18446744073709551616]'), "column 'prefix_blocks': expected integers < 2^64, got"),
        (json_line('"elapsed_s":-0.5'), "column 'elapsed_s': expected a finite number of seconds >= 0, or null, got"),
        (json_line('"elapsed_s":1e999'), "column 'elapsed_s': expected a trace record: Number out of range"),
        (json_line('"outcome":"fine"'), "column 'outcome': expected a trace record: Invalid enum value 'fine'"),
        (json_line('"tokens":5'), "expected a trace record: Object contains unknown field `tokens`"),
        (b'{"request_id":"r"}\n', "expected a trace record: Object missing required field `received_at`"),
        (b'{"request_id":"","received_at":5}\n', "column 'request_id': expected a request id, got ''"),
        (b"[1]\n", "expected `object`, got `array`"),
        (b'{"request_id":\n', "expected a trace record: Input data was truncated"),
        (MINIMAL + MINIMAL + b"\n", "expected a trace record: JSON is malformed: trailing characters"),
        (b'{"request_id":"\xff","received_at":5}\n', "expected UTF-8, got b'{"),
    ],
)
def test_a_wrong_json_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(MINIMAL + b"\n\n" + line + MINIMAL + b"\n")
    with pytest.raises(TraceFormatError) as caught:
        records(path)
    assert str(caught.value).startswith(f"{path}:3: {message}")


def test_an_endless_json_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace"
    path.write_bytes(MINIMAL + b"\n" + json_line(f'"model":"{"x" * 5000}"'))
    assert len(records(path)) == 2
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 4096)
    for chunk_bytes in (codec.CHUNK_BYTES, 64):
        monkeypatch.setattr(codec, "CHUNK_BYTES", chunk_bytes)
        with pytest.raises(TraceFormatError, match=r":2: expected a line of at most 4096 bytes, got a longer one, b'"):
            records(path)


# parquet


def parquet_file(path: Path, **columns: Any) -> Path:
    pl.DataFrame({"request_id": ["a", "b"], "received_at": [5.0, 6.0]} | columns).write_parquet(path)
    return path


@pytest.mark.parametrize(
    "columns",
    [
        {"received_at": [5, 6]},
        {"received_at": pl.Series([5.0, 6.0], dtype=pl.Float32)},
        {"request_id": pl.Series(["a", "b"], dtype=pl.Categorical)},
        {"session_id": [None, None]},
        {"request_tokens": pl.Series([None, None], dtype=pl.Int8)},
    ],
)
def test_parquet_from_elsewhere(tmp_path: Path, columns: dict[str, Any]) -> None:
    path = parquet_file(tmp_path / "trace[1].parquet", **columns)  # the brackets are no pattern
    assert records(path) == [TraceRecord(request_id="a", received_at=5.0), TraceRecord(request_id="b", received_at=6.0)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [1, 2]}, ": column 'x': expected only fields of a trace record, got this one"),
        ({"request_tokens": [1.5, 2.0]}, ": column 'request_tokens': expected the type Int64, got Float64"),
        ({"received_at": ["5", "6"]}, ": column 'received_at': expected the type Float64, got String"),
        (
            {"prefix_blocks": [["x"], None]},
            ": column 'prefix_blocks': expected the type List(UInt64), got List(String)",
        ),
        ({"prefix_blocks": [[-1], None]}, ": expected a Parquet file, got one where polars says: "),
        (
            {"request_tokens": [1, -2]},
            ":2: column 'request_tokens': expected a number of tokens >= 0, or null, got '-2'",
        ),
        ({"outcome": ["ok", None]}, ":2: column 'outcome': expected one of ok, rejected, "),
        (
            {"received_at": [5.0, float("nan")]},
            ":2: column 'received_at': expected epoch seconds in the years 1 to 9999, got 'nan'",
        ),
        (
            {"received_at": [5.0, 1.7e12]},
            ":2: column 'received_at': expected epoch seconds in the years 1 to 9999, got",
        ),
        ({"stream": [True, None]}, ":2: column 'stream': expected a value, not null, got 'None'"),
    ],
)
def test_wrong_parquet_is_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = parquet_file(tmp_path / "trace", **columns)
    with pytest.raises(TraceFormatError) as caught:
        records(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    whole = parquet_file(tmp_path / "whole").read_bytes()
    path = tmp_path / "torn"
    for content in (b"PAR1", whole[:-20], b"PAR1 not at all PAR1", b""):
        path.write_bytes(content)
        with pytest.raises(TraceFormatError, match=f"{path}: expected a Parquet file"):
            records(path, format="parquet")
    pl.DataFrame({"request_id": ["a"]}).write_parquet(path)
    with pytest.raises(TraceFormatError, match="column 'received_at': expected in every trace, got request_id"):
        records(path)


def test_parquet_is_written_a_row_group_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 3)
    path = tmp_path / "trace"
    rows = [TraceRecord(request_id=f"r-{number}", received_at=float(number)) for number in range(20)]
    with path.open("wb", buffering=0) as stream:
        writer = open_writer(stream, format="parquet")
        sizes = []
        for part in (rows[:2], rows[2:9], rows[9:]):
            writer.write(batch_from_records(part))
            sizes.append(stream.tell())
        assert writer.close() == WriteReport(20, 20, {}, {})
    assert sizes[0] < sizes[1] < sizes[2] < path.stat().st_size
    assert records(path, batch_rows=4) == rows


# What tells formats apart


MOONCAKE = b'{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [7]}'


@pytest.mark.parametrize(
    ("content", "format"),
    [
        (MOONCAKE, "mooncake"),
        (b"\xef\xbb\xbf\r\n" + MOONCAKE, "mooncake"),
        (MOONCAKE.replace(b": 0,", b": 0.0,"), "timed_trace"),
        # The second row says that these are seconds.
        (MOONCAKE + b"\n" + MOONCAKE.replace(b": 0,", b": 1e0,"), "timed_trace"),
        (MOONCAKE.replace(b"{", b'{"session_id": "s", '), "aiperf"),
        (MOONCAKE.replace(b"{", b'{"chat_id": 5, "parent_chat_id": -1, '), "bailian"),
        (b'{"body": {"model": "m", "messages": []}, "timestamp": 5}', "workload_trace"),
        (b'{"timestamp": 5, "request_id": "r", "body": "{}"}', "workload_trace"),
        (MINIMAL, "jsonl"),
        (b'{"x": 1}', "jsonl"),
        (b"{", "jsonl"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n", "azure"),
        (b"\xef\xbb\xbfTIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n", "azure_multimodal"),
    ],
)
def test_a_format_is_told_by_what_the_file_holds(tmp_path: Path, content: bytes, format: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    assert sniff(path) == format


def test_block_tokens_come_from_metadata_or_from_lengths(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(MOONCAKE)
    assert block_tokens(path) == 512
    path.write_bytes(MOONCAKE.replace(b"3", b"33").replace(b"[7]", b"[7, 8, 9]"))
    assert block_tokens(path) == 16
    path.write_bytes(MOONCAKE.replace(b"3", b"33").replace(b"[7]", b"[7, 8]"))
    assert block_tokens(path) == 32
    # One block for 3 tokens and 2 for 600 fit 512; no size fits 3 blocks for 2 tokens.
    path.write_bytes(MOONCAKE.replace(b"3", b"2").replace(b"[7]", b"[7, 8, 9]"))
    assert block_tokens(path) is None
    write(path, [[ROW]], format="jsonl")
    assert block_tokens(path) is None
    for said, tokens in (({}, None), ({codec.BLOCK_TOKENS_KEY: "64"}, 64), ({codec.BLOCK_TOKENS_KEY: "-1"}, None)):
        pl.DataFrame({"request_id": ["a"]}).write_parquet(path, metadata=said)
        assert block_tokens(path) == tokens
    path.write_bytes(b"PAR1 torn")
    with pytest.raises(TraceFormatError, match="expected a Parquet file"):
        block_tokens(path)
