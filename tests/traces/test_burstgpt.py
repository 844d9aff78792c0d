from __future__ import annotations

import csv
import datetime
import io
import math
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import burstgpt, codec
from traces.batch import SCHEMA, batch_from_records, records_from_batch
from traces.codec import COLUMNS_6, COLUMNS_8, TraceClock, TraceFormatError, WriteReport, open_writer, read_trace
from traces.record import LogType, Origin, Outcome, TokenSource, TraceRecord

TRACES = Path(os.environ.get("BURSTGATE_TRACES", Path(__file__).parents[2] / ".." / "shared" / "traces"))
HEAD_8 = ",".join(COLUMNS_8)
HEAD_6 = ",".join(COLUMNS_6)


def real_head(name: str) -> Path:
    path = TRACES / name
    if not path.exists():
        pytest.skip(f"no real trace at {path}: set BURSTGATE_TRACES to the folder that holds it")
    return path


def records(path: Path, **options: Any) -> list[TraceRecord]:
    return [record for batch in read_trace(path, **options) for record in records_from_batch(batch)]


def read_text(tmp_path: Path, text: str | bytes, **options: Any) -> list[TraceRecord]:
    path = tmp_path / "site.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return records(path, **options)


def written(rows: Sequence[TraceRecord], **options: Any) -> tuple[str, WriteReport]:
    stream = io.BytesIO()
    writer = open_writer(stream, **options)
    writer.write(batch_from_records(rows))
    report = writer.close()
    return stream.getvalue().decode(), report


def rewritten(path: Path, **options: Any) -> bytes:
    stream = io.BytesIO()
    writer = open_writer(stream, **options)
    for batch in read_trace(path, batch_rows=64):
        writer.write(batch)
    writer.close()
    return stream.getvalue()


# reading


def test_a_row_becomes_a_record(tmp_path: Path) -> None:
    (row,) = read_text(tmp_path, f"{HEAD_8}\n12.345678,s-1,43,GPT-4,906,446,1352,API log\n")
    assert row == TraceRecord(
        request_id=row.request_id,
        received_at=12.345678,
        session_id="s-1",
        elapsed_s=43.0,
        model="GPT-4",
        request_tokens=906,
        response_tokens=446,
        log_type=LogType.API,
        outcome=Outcome.OK,
        token_source=TokenSource.USAGE,
        origin=Origin.IMPORTED,
        run_id="site",
    )


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        # request, response, total -> request, response, outcome, token source
        ("906,446,1352", (906, 446, Outcome.OK, TokenSource.USAGE)),
        ("0,446,446", (0, 446, Outcome.OK, TokenSource.USAGE)),
        ("472,0,472", (472, None, Outcome.UPSTREAM_ERROR, TokenSource.NONE)),
        ("0,0,0", (None, None, Outcome.UPSTREAM_ERROR, TokenSource.NONE)),  # the published files lose the length too
        ("007,1,8", (7, 1, Outcome.OK, TokenSource.USAGE)),
    ],
)
def test_zero_response_tokens_are_a_failure(tmp_path: Path, tokens: str, expected: tuple[Any, ...]) -> None:
    (row,) = read_text(tmp_path, f"{HEAD_6}\n5,GPT-4,{tokens},API log\n")
    assert (row.request_tokens, row.response_tokens, row.outcome, row.token_source) == expected
    assert row.elapsed_s is None
    assert row.session_id is None


GOOD_ROW = "5,s,1,GPT-4,2,3,5,API log"


@pytest.mark.parametrize(
    "text",
    [
        f"{HEAD_8}\n{GOOD_ROW}\n{GOOD_ROW}\n",
        f"{HEAD_8}\n{GOOD_ROW}\n{GOOD_ROW}",  # no last line end
        f"{HEAD_8}\r\n{GOOD_ROW}\r\n{GOOD_ROW}\r\n",
        f"{HEAD_8}\r\n{GOOD_ROW}\n{GOOD_ROW}\r\n",  # both line ends in one file
        f"\ufeff{HEAD_8}\n{GOOD_ROW}\n{GOOD_ROW}\n",
        f"{HEAD_8}\n\n{GOOD_ROW}\n\n\n{GOOD_ROW}\n\n",  # blank lines
        f'{HEAD_8}\n"5","s","1","GPT-4","2","3","5","API log"\n{GOOD_ROW}\n',
        f'"Timestamp"{HEAD_8.removeprefix("Timestamp")}\n{GOOD_ROW}\n{GOOD_ROW}\n',
        "Log Type,x,Total tokens,Response tokens,,Request tokens,,Model,Elapsed time,Session ID,Timestamp\n"
        + "API log,?,5,3,,2,,GPT-4,1,s,5\n" * 2,  # any order; others ignored, nameless and repeated ones too
        f"{HEAD_8}\n5.0,s,1.0,GPT-4,2,3,5,API log\n5,s,1e0,GPT-4,2,3,5,API log\n",
        f"{HEAD_8}\n5,s,1,GPT-4,2.0,3,5.,API log\n{GOOD_ROW}\n",  # whole numbers written as floats
        f"{HEAD_8}\n 5,s,1 ,GPT-4, 2,3 ,5,API log\n{GOOD_ROW}\n",  # spaces around numbers
    ],
)
def test_spellings_of_one_trace(tmp_path: Path, text: str) -> None:
    plain = read_text(tmp_path, f"{HEAD_8}\n{GOOD_ROW}\n{GOOD_ROW}\n")
    assert len(plain) == 2
    assert read_text(tmp_path, text) == plain


def test_asked_fields_are_those_of_the_whole_rows(tmp_path: Path) -> None:
    """And the columns that none of them needs are not looked at."""
    text = f"{HEAD_8}\n{GOOD_ROW}\n7,,2,ChatGPT,0,0,0,Conversation log\n8,s,2,ChatGPT,4.0,6,10,API log\n"
    path = tmp_path / "site.csv"
    path.write_text(text)
    (whole,) = read_trace(path)
    for name in SCHEMA:
        (part,) = read_trace(path, fields=[name, "received_at"])
        assert part.equals(whole.select(column for column in SCHEMA if column in (name, "received_at")))
    path.write_text(text.replace("Conversation log", "no log type"))
    (part,) = read_trace(path, fields=["received_at", "model"])
    assert part["model"].to_list() == ["GPT-4", "ChatGPT", "ChatGPT"]
    with pytest.raises(TraceFormatError, match=":3: column 'Log Type'"):
        list(read_trace(path, fields=["log_type"]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{HEAD_6}\n5,M,1,1,2,API log\n5,M,1,1,2,API log\n9.5,M,1,1,2,API log\n", 2 / 4.5),
        (f"{HEAD_6}\n5,M,1,1,2,API log\n9,M,1,1,2,API log", 1 / 4),  # no last line end
        ("Model,x,Timestamp\nM,1,5\nM,1,7\n", 1 / 2),
        (f"{HEAD_6}\n5,M,1,1,2,API log\n", None),  # one row has no rate
        (f"{HEAD_6}\n", None),
        (f"{HEAD_6}\n5,M,1,1,2,API log\n5,M,1,1,2,API log\n", None),
        (f"{HEAD_6}\n9,M,1,1,2,API log\n5,M,1,1,2,API log\n", None),
        (f"{HEAD_6}\n5,M,1,1,2,API log\n\n9,M,1,1,2,API log\n", None),  # a line is no row
        (f"{HEAD_6}\n\n5,M,1,1,2,API log\n9,M,1,1,2,API log\n", None),
        (f'{HEAD_6}\n5,"M\nN",1,1,2,API log\n9,M,1,1,2,API log\n', None),
        (f"{HEAD_6}\r\n5,M,1,1,2,API log\r\n9,M,1,1,2,API log\r\n", None),
        (f"{HEAD_6}\nx,M,1,1,2,API log\n9,M,1,1,2,API log\n", None),
        ("x\n5\n", None),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [codec.CHUNK_BYTES, 3])
def test_a_rate_by_counting_lines_is_right_or_none(
    tmp_path: Path, text: str, expected: float | None, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burstgpt, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "site.csv"
    path.write_text(text, newline="")
    assert burstgpt.mean_rate_rps(path) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("text", [f"{HEAD_8}\n", HEAD_8, f"{HEAD_6}\r\n", f"{HEAD_6}\n\n\n"])
def test_a_header_alone_is_a_trace_of_no_rows(tmp_path: Path, text: str) -> None:
    assert read_text(tmp_path, text) == []


def test_unsorted_rows_stay_in_the_files_order(tmp_path: Path) -> None:
    rows = read_text(tmp_path, f"{HEAD_6}\n9,A,1,1,2,API log\n3,B,1,1,2,API log\n9,C,1,1,2,API log\n")
    assert [(row.received_at, row.model) for row in rows] == [(9.0, "A"), (3.0, "B"), (9.0, "C")]


def test_session_columns_are_read_where_they_are(tmp_path: Path) -> None:
    # Session ID without Elapsed time: neither published form, and no reason to lose the sessions.
    (row,) = read_text(tmp_path, f"{HEAD_6},Session ID\n9,A,1,1,2,API log,s-1\n")
    assert (row.session_id, row.elapsed_s) == ("s-1", None)


LONG = "x" * (1 << 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: expected a header line, got an empty file"),
        (b"\xff\xfeT\0i\0m\0", r":1: expected a CSV header in UTF-8, got b'\xff\xfeT\x00i\x00m\x00'"),  # UTF-16
        ("a" * 70_000, ":1: expected a line of at most 65536 bytes, got a longer one, b'aaaa"),
        (f"{HEAD_6},Model\n", ":1: column 'Model': expected once, got 2 times"),
        (f"{HEAD_6}\n-3,M,1,1,2,API log\n", ":2: column 'Timestamp': expected a number of seconds, >= 0 and < 4294"),
        (f"{HEAD_6}\nnan,M,1,1,2,API log\n", "got 'nan'"),
        (f"{HEAD_6}\ninf,M,1,1,2,API log\n", ":2: column 'Timestamp'"),
        (f"{HEAD_6}\n1700000000000,M,1,1,2,API log\n", ":2: column 'Timestamp'"),  # milliseconds
        (f"{HEAD_6}\n,M,1,1,2,API log\n", "and < 4294967296, got ''"),
        (f"{HEAD_6}\n2023-11-16,M,1,1,2,API log\n", "got '2023-11-16'"),
        (f"{HEAD_6}\n5,,1,1,2,API log\n", ":2: column 'Model': expected a model's name, got ''"),
        (f"{HEAD_6}\n5,M,-3,1,2,API log\n", ":2: column 'Request tokens': expected an integer >= 0, got '-3'"),
        (f"{HEAD_6}\n5,M,1,50.5,2,API log\n", ":2: column 'Response tokens': expected an integer >= 0, got '50.5'"),
        (f"{HEAD_6}\n5,M,1,+5,6,API log\n", "got '+5'"),
        (f"{HEAD_6}\n5,M,1,٣,4,API log\n", "got '٣'"),
        (f"{HEAD_6}\n5,M,1,1,99999999999999999999,API log\n", "expected an integer >= 0, got '99999999999999999999'"),
        (f"{HEAD_6}\n5,M,1,1,,API log\n", ":2: column 'Total tokens': expected an integer >= 0, got ''"),
        (
            f"{HEAD_6}\n5,M,1,1,3,API log\n",
            ":2: column 'Total tokens': expected Request tokens + Response tokens, got '3'",
        ),
        (f"{HEAD_6}\n5,M,1,1,2,API\n", ":2: column 'Log Type': expected 'Conversation log' or 'API log', got 'API'"),
        (f"{HEAD_8}\n5,s,-1,M,1,1,2,API log\n", ":2: column 'Elapsed time': expected a finite number of seconds >= 0"),
        (f"{HEAD_8}\n5,s,inf,M,1,1,2,API log\n", "got 'inf'"),
        (f"{HEAD_8}\n5,s,,M,1,1,2,API log\n", ":2: column 'Elapsed time'"),
        (f"{HEAD_6}\n5,M,1,1,2\n", ":2: expected 6 fields, got 5"),
        (f"{HEAD_6}\n5,M,1,1,2,API log,\n", ":2: expected 6 fields, got 7"),
        # one too few and one too many: the commas add up
        (f"{HEAD_6}\n5,M,1,1,2\n5,M,1,1,2,API log,x\n", ":2: expected 6 fields, got 5"),
        (f"{HEAD_6}\n5,M,1,1,2,API log\n5,M\0,1,1,2,API log\n", ":3: column 'Model': expected text without NUL bytes"),
        (f"{HEAD_6}\n5,M,1,1,2,API log\n".encode() + b"5,M\xe9,1,1,2,API log\n", ":3: column 'Model': expected UTF-8"),
        (f'{HEAD_6}\n5,"M,1,1,2,API log\n', ":2: expected a line of CSV"),  # never closed
        (f'{HEAD_6}\n5,"M" x,1,1,2,API log\n', ":2: expected a line of CSV"),
        (f"{HEAD_6}\n5,M\rN,1,1,2,API log\n", ":2: expected a line of CSV"),
        (f"{HEAD_6}\n5,M,1,1,2,API log\n5,{LONG},1,1,2,API log\n", ":3: expected a line of at most 1048576 bytes"),
        (f"{HEAD_6}\n5,M,1,1,2,API log\n5,{LONG * 6},1,1,2,API log\n", ":3: expected a line of at most 1048576 bytes"),
        (f"{HEAD_6}\n5,M,1,1,2,API log\n{LONG * 2}", ":3: expected a line of at most 1048576 bytes"),
        # the first wrong line counts, whatever is wrong with a later one
        (f"{HEAD_6}\n5,M,1,1,2,API log\n5,M,1,1,3,API log\n5,M\n", ":3: column 'Total tokens'"),
        (f"{HEAD_6}\n5,M,1,1,3,API log\n-5,M,1,1,2,API log\n", ":2: column 'Total tokens'"),
        (f'{HEAD_6}\n5,"M\n\nN",1,1,2,API log\n\n5,M,1,1,x,API log\n', ":6: column 'Total tokens'"),  # lines, not rows
    ],
)
@pytest.mark.parametrize("chunk_bytes", [codec.CHUNK_BYTES, 64])
def test_rubbish_is_one_clear_line(
    tmp_path: Path, text: str | bytes, message: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "CHUNK_BYTES", chunk_bytes)
    with pytest.raises(TraceFormatError) as caught:
        read_text(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'site.csv'}:")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(TraceFormatError, match=re.escape("which lacks Session ID, Elapsed time")):
        read_text(tmp_path, f"{HEAD_6}\n", format="burstgpt")


def test_rows_before_a_malformed_line_arrive(tmp_path: Path) -> None:
    path = tmp_path / "site.csv"
    path.write_text(f"{HEAD_6}\n5,M,1,1,2,API log\n6,M,1,1,2,API log\n7,M\n")
    batches = read_trace(path)
    assert next(batches)["received_at"].to_list() == [5.0, 6.0]
    with pytest.raises(TraceFormatError, match=":4: expected 6 fields, got 2"):
        next(batches)


def test_batches_hold_at_most_batch_rows(tmp_path: Path) -> None:
    path = tmp_path / "site.csv"
    path.write_text(f"{HEAD_6}\n" + "5,M,1,1,2,API log\n" * 10)
    assert [batch.height for batch in read_trace(path, batch_rows=4)] == [4, 4, 2]
    with pytest.raises(ValueError, match="batch_rows: expected an integer >= 1, got 0"):
        read_trace(path, batch_rows=0)


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/site-\xff.csv"))
    try:
        path.write_text(f"{HEAD_6}\n5,M,1,1,2,API log\n")
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    assert [row.run_id for row in records(path)] == ["site-?"]


# ids and clocks


def test_ids_are_uuid7_in_file_order_and_the_same_again(tmp_path: Path) -> None:
    text = f"{HEAD_6}\n" + "5,M,1,1,2,API log\n" * 300 + "6.5,M,1,1,2,API log\n"
    ids = [row.request_id for row in read_text(tmp_path, text)]
    assert ids == sorted(set(ids))
    assert [row.request_id for row in read_text(tmp_path, text, batch_rows=7)] == ids
    for text_id, millis in ((ids[0], 5_000), (ids[-1], 6_500)):
        parsed = uuid.UUID(text_id)
        assert (str(parsed), parsed.version, parsed.variant) == (text_id, 7, uuid.RFC_4122)
        assert parsed.int >> 80 == millis
    renamed = read_text(tmp_path, text, dataset="other")
    assert {row.run_id for row in renamed} == {"other"}
    assert not {row.request_id for row in renamed} & set(ids)


@given(
    row=st.integers(0, (1 << 34) - 2),
    micros=st.integers(-(10**15), (1 << 48) * 1000 - 1),
    dataset=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_ids_order_by_time_then_row(row: int, micros: int, dataset: str) -> None:
    first, second = burstgpt.request_ids(np.array([micros, micros]), row, dataset).to_list()
    assert first < second
    parsed = uuid.UUID(first)
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    assert parsed.int >> 80 == max(micros, 0) // 1000
    assert (parsed.int >> 64 & 0xFFF) << 22 | (parsed.int >> 40 & 0x3FFFFF) == row


@pytest.mark.parametrize(
    ("day_zero", "timezone", "zero_s"),
    [
        (datetime.date(1970, 1, 1), "UTC", 0.0),
        (datetime.date(1970, 1, 1), "Asia/Shanghai", -8 * 3600.0),
        (datetime.date(2024, 7, 1), "Europe/Rome", 1719784800.0),
        (datetime.date(2018, 11, 4), "America/Sao_Paulo", 1541300400.0),  # this midnight was skipped
    ],
)
def test_clock_zero_is_local_midnight(tmp_path: Path, day_zero: datetime.date, timezone: str, zero_s: float) -> None:
    clock = TraceClock(day_zero, timezone)
    assert clock.zero_s == zero_s
    rows = read_text(tmp_path, f"{HEAD_6}\n12.345678,M,1,1,2,API log\n", clock=clock)
    assert rows[0].received_at == round(zero_s + 12.345678, 6)
    assert written(rows, format="burstgpt", clock=clock)[0].splitlines()[1].startswith("12.345678,")


@pytest.mark.parametrize("timezone", ["Mars/Olympus", "", "../etc/passwd", "Europe"])
def test_an_unknown_time_zone_is_named(timezone: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"timezone: expected an IANA time zone name, got {timezone!r}")):
        TraceClock(datetime.date(2024, 1, 1), timezone)


# writing

OK = TraceRecord(
    request_id="r",
    received_at=12.345678,
    session_id="s",
    elapsed_s=2.6,
    model="GPT-4",
    request_tokens=2,
    response_tokens=3,
)
FAILED = TraceRecord(request_id="r", received_at=7.0, model="GPT-4", outcome=Outcome.TRUNCATED)


def changed(record: TraceRecord, **fields: Any) -> TraceRecord:
    return TraceRecord(**({name: getattr(record, name) for name in record.__struct_fields__} | fields))


@pytest.mark.parametrize(
    ("record", "line", "notes"),
    [
        (OK, "12.345678,s,3,GPT-4,2,3,5,API log", {"elapsed_rounded": 1}),
        (changed(OK, elapsed_s=None), "12.345678,s,0,GPT-4,2,3,5,API log", {"elapsed_unknown": 1}),
        (changed(OK, elapsed_s=0.0, received_at=19440110.0), "19440110.0,s,0,GPT-4,2,3,5,API log", {}),
        (changed(OK, elapsed_s=1.0, received_at=0.00005), "5e-05,s,1,GPT-4,2,3,5,API log", {}),  # as Python spells it
        (changed(OK, elapsed_s=1.0, received_at=0.0), "0.0,s,1,GPT-4,2,3,5,API log", {}),
        (changed(OK, elapsed_s=1.0, session_id=""), "12.345678,,1,GPT-4,2,3,5,API log", {}),
        (changed(OK, elapsed_s=1.0, request_tokens=0), "12.345678,s,1,GPT-4,0,3,3,API log", {}),
        (changed(OK, elapsed_s=1.0, model="a,b"), '12.345678,s,1,"a,b",2,3,5,API log', {}),
        (changed(OK, elapsed_s=1.0, model='a"b'), '12.345678,s,1,"a""b",2,3,5,API log', {}),
        (
            FAILED,
            "7.0,,0,GPT-4,0,0,0,API log",
            {"elapsed_unknown": 1, "failure_request_tokens_unknown": 1},
        ),
        (
            changed(FAILED, elapsed_s=1.0, request_tokens=9, response_tokens=4),
            "7.0,,1,GPT-4,9,0,9,API log",
            {"failure_response_tokens_lost": 1},
        ),
    ],
)
def test_a_record_becomes_a_row(record: TraceRecord, line: str, notes: dict[str, int]) -> None:
    assert written([record], format="burstgpt") == (f"{HEAD_8}\n{line}\n", WriteReport(1, 1, {}, notes))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (changed(OK, received_at=-1e-6), "before_day_zero"),
        (changed(OK, model=None), "no_model"),
        (changed(OK, model=""), "no_model"),
        (changed(OK, model="a\0b"), "unspellable_text"),
        (changed(OK, session_id="x" * 70_000), "unspellable_text"),
        (changed(OK, response_tokens=None), "no_response_tokens"),
        (changed(OK, response_tokens=0), "no_response_tokens"),  # 0 would say that it failed
        (changed(OK, request_tokens=None), "request_tokens_unknown"),
        (changed(OK, request_tokens=None, response_tokens=None), "no_response_tokens"),  # one reason a row
        (changed(FAILED, model=None), "no_model"),
    ],
)
@pytest.mark.parametrize(("format", "header"), [("burstgpt", HEAD_8), ("burstgpt6", HEAD_6)])
def test_what_cannot_be_said_is_dropped_and_counted(record: TraceRecord, reason: str, format: str, header: str) -> None:
    assert written([record], format=format) == (f"{header}\n", WriteReport(1, 0, {reason: 1}, {}))


@pytest.mark.parametrize(
    ("options", "stamp", "notes"),
    [
        ({"format": "burstgpt"}, "12.345678", {"elapsed_rounded": 1}),
        ({"format": "burstgpt", "stamps": "int"}, "12", {"elapsed_rounded": 1, "stamps_floored": 1}),
        ({"format": "burstgpt6"}, "12", {"stamps_floored": 1}),
        ({"format": "burstgpt6", "stamps": "float"}, "12.345678", {}),
    ],
)
def test_stamps(options: dict[str, Any], stamp: str, notes: dict[str, int]) -> None:
    text, report = written([OK], **options)
    assert text.splitlines()[1].split(",")[0] == stamp
    assert report.notes == notes


def test_failures_are_kept_or_dropped() -> None:
    rows = [OK, FAILED, OK]
    assert written(rows, format="burstgpt6")[1] == WriteReport(
        3, 3, {}, {"stamps_floored": 2, "failure_request_tokens_unknown": 1}
    )
    text, report = written(rows, format="burstgpt6", failures="drop")
    assert text == f"{HEAD_6}\n" + "12,GPT-4,2,3,5,API log\n" * 2
    assert report == WriteReport(3, 2, {"failure": 1}, {"stamps_floored": 2})


def test_nothing_written_is_a_header() -> None:
    assert written([], format="burstgpt6") == (f"{HEAD_6}\n", WriteReport(0, 0, {}, {}))


# both ways

TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8
) | st.sampled_from(["a,b", 'say "hi"', '"', "two\nlines", "cr\rlf\r\n", " spaced ", "#1", "é\u2028\u0085", "\ufeff"])
FAILURES = [outcome for outcome in Outcome if outcome is not Outcome.OK]
SPEAKABLE = st.builds(
    TraceRecord,
    request_id=st.just("r"),
    received_at=st.integers(0, 2**32 * 10**6 - 1).map(lambda micros: micros / 1e6)
    | st.integers(0, 200).map(lambda n: n / 1e6),
    session_id=st.none() | TEXT,
    elapsed_s=st.integers(0, 10**6).map(float),
    model=TEXT,
    request_tokens=st.integers(0, 10**17),
    response_tokens=st.integers(1, 10**17),
    log_type=st.sampled_from(LogType),
) | st.builds(
    TraceRecord,
    request_id=st.just("r"),
    received_at=st.integers(0, 10**9).map(float),
    elapsed_s=st.integers(0, 10**6).map(float),
    model=TEXT,
    request_tokens=st.none() | st.integers(1, 10**6),
    outcome=st.sampled_from(FAILURES),
)


def as_imported(record: TraceRecord, request_id: str) -> TraceRecord:
    """What is left of a record after BurstGPT's eight columns."""
    is_ok = record.outcome is Outcome.OK
    return changed(
        record,
        request_id=request_id,
        outcome=record.outcome if is_ok else Outcome.UPSTREAM_ERROR,
        token_source=TokenSource.USAGE if is_ok else TokenSource.NONE,
        origin=Origin.IMPORTED,
        run_id="site",
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(SPEAKABLE, max_size=12),
    chunk_bytes=st.sampled_from([1, 7, 64, codec.CHUNK_BYTES]),
    clock=st.sampled_from([codec.UNIX_CLOCK, TraceClock(datetime.date(2023, 3, 14), "Asia/Shanghai")]),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[TraceRecord], chunk_bytes: int, clock: TraceClock
) -> None:
    rows = [changed(row, received_at=round((clock.zero_s + row.received_at) * 1e6) / 1e6) for row in rows]
    text, report = written(rows, format="burstgpt", clock=clock)
    assert report == WriteReport(len(rows), len(rows), {}, report.notes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "CHUNK_BYTES", chunk_bytes)  # a cut may fall anywhere, inside a quoted field too
        again = read_text(tmp_path_factory.mktemp("trip"), text, clock=clock)
    assert again == [as_imported(row, back.request_id) for row, back in zip(rows, again, strict=True)]
    assert written(again, format="burstgpt", clock=clock)[0] == text


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(
        st.text(st.sampled_from('5,M"\r\n '), max_size=12)
        | st.just("5,M,1,1,2,API log")
        | st.just('5,"M,",1,1,2,API log'),
        max_size=6,
    )
)
def test_any_cut_reads_the_same(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    text = "\n".join([HEAD_6, *lines])
    folder = tmp_path_factory.mktemp("cut")

    def outcome(chunk_bytes: int) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(codec, "CHUNK_BYTES", chunk_bytes)
            try:
                return read_text(folder, text)
            except TraceFormatError as error:
                return str(error)

    whole = outcome(codec.CHUNK_BYTES)
    assert [outcome(1), outcome(5), outcome(40)] == [whole] * 3


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(["GPT-4", "é", "a b"]), st.integers(0, 3), st.integers(0, 3)),
        max_size=20,
    )
)
def test_the_plain_and_the_quoted_path_agree(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("paths")
    plain = io.StringIO()
    quoted = io.StringIO()
    for table in (csv.writer(plain, lineterminator="\n"), csv.writer(quoted, quoting=csv.QUOTE_ALL)):
        table.writerow(COLUMNS_6)
        table.writerows((at, model, ask, got, ask + got, "API log") for at, model, ask, got in rows)
    assert '"' not in plain.getvalue()
    assert read_text(folder, plain.getvalue()) == read_text(folder, quoted.getvalue())


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_rows_or_a_format_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(f"{HEAD_6}\n5,M,1,1,2,API log\n".encode() + data)
    try:
        assert records(path)[0].model == "M"
    except TraceFormatError as error:
        assert re.match(rf"{re.escape(str(path))}:\d+: .*expected ", str(error))  # noqa: PT017 (either way is fine)


# the real heads


@pytest.mark.parametrize(
    ("name", "format"), [("BurstGPT_1_head.csv", "burstgpt6"), ("BurstGPT_3_head.csv", "burstgpt")]
)
@pytest.mark.parametrize(("day_zero", "timezone"), [("1970-01-01", "UTC"), ("2023-03-14", "Asia/Shanghai")])
def test_real_heads(name: str, format: str, day_zero: str, timezone: str) -> None:
    path = real_head(name)
    clock = TraceClock(datetime.date.fromisoformat(day_zero), timezone)
    stream = io.BytesIO()
    writer = open_writer(stream, format=format, clock=clock)
    frames = list(read_trace(path, clock=clock, batch_rows=64))
    for frame in frames:
        writer.write(frame)
    report = writer.close()
    assert stream.getvalue() == path.read_bytes()

    with path.open(newline="") as text:
        plain = list(csv.DictReader(text))
    failed = sum(row["Response tokens"] == "0" for row in plain)
    rows = pl.concat(frames)
    assert codec.sniff(path) == format
    assert (report.rows_in, report.rows_written) == (len(plain), len(plain))
    assert rows.height == len(plain)
    assert rows.filter(pl.col("outcome") != "ok").height == failed
    assert rows["request_tokens"].sum() == sum(int(row["Request tokens"]) for row in plain)
    assert rows["response_tokens"].sum() == sum(int(row["Response tokens"]) for row in plain)
    sessions = {row["Session ID"] for row in plain if row.get("Session ID")}
    assert set(rows["session_id"].drop_nulls()) == sessions
    assert [stamp - clock.zero_s for stamp in rows["received_at"]] == [float(row["Timestamp"]) for row in plain]
    assert rows.sort("received_at", "request_id", maintain_order=False).equals(
        rows.sort("received_at", maintain_order=True)
    )
    assert set(rows["run_id"]) == {path.stem}
    assert all(math.isfinite(stamp) for stamp in rows["received_at"])


def test_real_head_survives_being_written_by_others(tmp_path: Path) -> None:
    # CRLF and every field quoted, as spreadsheets and pandas do.
    path = real_head("BurstGPT_3_head.csv")
    with path.open(newline="") as text:
        plain = list(csv.reader(text))
    quoted = tmp_path / path.name
    with quoted.open("w", newline="", encoding="utf-8-sig") as text:
        csv.writer(text, quoting=csv.QUOTE_ALL).writerows(plain)
    assert records(quoted) == records(path)
    assert rewritten(quoted, format="burstgpt") == path.read_bytes()
