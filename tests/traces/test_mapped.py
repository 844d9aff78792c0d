"""A CSV of any kind, by a map of its columns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from traces import burstgpt
from traces.batch import records_from_batch
from traces.codec import TraceFormatError, read_trace
from traces.mapped import parse_columns
from traces.record import LogType, Origin, TokenSource, TraceRecord


def read(path: Path, text: str, map: str, **options: Any) -> list[TraceRecord]:
    path.write_bytes(text.encode())
    frames = read_trace(path, columns=parse_columns(map), **options)
    return [record for batch in frames for record in records_from_batch(batch)]


def test_every_target(tmp_path: Path) -> None:
    text = (
        "when,in,out,who,what,took,else\n"
        '1.5,50.0,0,s1,"llama, large",2.25,x\n'
        "\n"
        '0.25, 7 ,,"",,,"two\nlines"\n'
        "2023-11-16 18:17:03.5,,3,s2,m,0,\n"
    )
    map = "timestamp=when,prompt_tokens=in,output_tokens=out,session=who,model=what,elapsed_s=took"
    records = read(tmp_path / "any.csv", text, map)
    fields: dict[str, Any] = {"token_source": TokenSource.USAGE, "origin": Origin.IMPORTED, "run_id": "any"}
    chat = LogType.CONVERSATION
    assert records == [
        TraceRecord(records[0].request_id, 1.5, "s1", 2.25, "llama, large", 50, 0, chat, **fields),
        TraceRecord(records[1].request_id, 0.25, None, None, None, 7, None, **fields),
        TraceRecord(records[2].request_id, 1700158623.5, "s2", 0.0, "m", None, 3, chat, **fields),
    ]


def test_milliseconds_and_the_least_that_is_needed(tmp_path: Path) -> None:
    (record,) = read(tmp_path / "t", "a,b\n1500.25,3", "timestamp_ms=a,request_tokens=b")
    assert (record.received_at, record.request_tokens, record.response_tokens) == (1.50025, 3, None)


def test_one_column_may_serve_twice(tmp_path: Path) -> None:
    (record,) = read(tmp_path / "t", "a,b\n1,3", "timestamp=a,prompt_tokens=b,output_tokens=b")
    assert (record.request_tokens, record.response_tokens) == (3, 3)


def test_rows_keep_their_order_and_have_ids_of_their_own(tmp_path: Path) -> None:
    text = "a,b\n" + "".join(f"{row % 7},{row}\n" for row in range(5000)) + '"3",1\n'
    records = read(tmp_path / "t", text, "timestamp=a,prompt_tokens=b", batch_rows=1000)
    assert [record.request_tokens for record in records] == [*range(5000), 1]
    assert len({record.request_id for record in records}) == 5001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,c\n1,2\n", ":1: column 'b': expected once, got 0 times in 'a,c'"),
        ("a,b,b\n1,2,3\n", ":1: column 'b': expected once, got 2 times in 'a,b,b'"),
        ("", ":1: expected a header line, got an empty file"),
        ("a,b\n1,2\n1,-2\n", ":3: column 'b': expected an integer >= 0, or nothing, got '-2'"),
        ("a,b\n1,2\n1,1e3\n", ":3: column 'b': expected an integer >= 0, or nothing, got '1e3'"),
        ("a,b\n1,2\n,2\n", ":3: column 'a': expected seconds >= 0"),
        ("a,b\n1,2\nnan,2\n", ":3: column 'a': expected seconds >= 0"),
        ("a,b\n1,2\n5000000000,2\n", ":3: column 'a': expected seconds >= 0 and < 4294967296, or a date and time"),
        ("a,b\n1,2\n1,2,3\n", ":3: expected 2 fields, got 3"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t"
    with pytest.raises(TraceFormatError) as caught:
        read(path, text, "timestamp=a,prompt_tokens=b")
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_wrong_elapsed_time_is_named(tmp_path: Path) -> None:
    for value in ("-1", "inf", "soon"):
        with pytest.raises(TraceFormatError, match=":2: column 'c': expected a finite number of seconds >= 0, or noth"):
            read(tmp_path / "t", f"a,b,c\n1,2,{value}", "timestamp=a,prompt_tokens=b,elapsed_s=c")


def test_a_line_of_a_hundred_megabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"a,b\n1,2\n1,")
    with path.open("ab") as stream:
        for _ in range(100):
            stream.write(b"9" * 10**6)
    limit = burstgpt.MAX_LINE_BYTES
    with pytest.raises(TraceFormatError, match=f":3: expected a line of at most {limit} bytes, got a longer one, b'"):
        list(read_trace(path, columns=parse_columns("timestamp=a,prompt_tokens=b")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected TARGET=COLUMN,... with targets timestamp, timestamp_ms, "),
        ("timestamp", "expected TARGET=COLUMN"),
        ("timestamp=", "expected TARGET=COLUMN"),
        ("tokens=a", "elapsed_s, got 'tokens=a'"),
        ("timestamp=a,timestamp=b,prompt_tokens=c", "expected 'timestamp' once, got 'a' and 'b'"),
        ("received_at=a,timestamp=b,prompt_tokens=c", "expected 'timestamp' once"),
        ("timestamp=a", "expected prompt_tokens and one of timestamp and timestamp_ms, got 'timestamp'"),
        ("timestamp=a,timestamp_ms=b,prompt_tokens=c", "expected prompt_tokens and one of"),
        ("prompt_tokens=a", "expected prompt_tokens and one of"),
    ],
)
def test_a_wrong_map_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="map: .*" + re.escape(message)):
        parse_columns(text)


def test_maps_take_the_names_of_others() -> None:
    guidellm = "timestamp= t ,prompt_tokens_count=p,output_tokens_count=o"
    assert parse_columns(guidellm) == {"timestamp": " t ", "prompt_tokens": "p", "output_tokens": "o"}
    assert parse_columns("received_at=t,request_tokens=p,response_tokens=o,session_id=s") == {
        "timestamp": "t",
        "prompt_tokens": "p",
        "output_tokens": "o",
        "session": "s",
    }
