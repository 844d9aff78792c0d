"""Azure's CSV files of 2023, 2024 and 2025, as they were published."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.batch import batch_from_records, records_from_batch
from traces.codec import AZURE_COLUMNS, UNIX_CLOCK, TraceClock, TraceFormatError, WriteReport, open_writer, read_trace
from traces.record import Origin, Outcome, TokenSource, TraceRecord

TRACES = Path(os.environ.get("BURSTGATE_TRACES", "../shared/traces"))
HEADER = ",".join(AZURE_COLUMNS)
NOV_16 = 1700158623.0
"""2023-11-16 18:17:03 UTC."""


def read(path: Path, text: str | bytes, **options: Any) -> list[TraceRecord]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [record for batch in read_trace(path, **options) for record in records_from_batch(batch)]


@pytest.mark.parametrize(
    ("stamp", "received_at"),
    [
        ("2023-11-16 18:17:03.9799600", NOV_16 + 0.97996),
        # The seventh decimal is dropped.
        ("2023-11-16 18:17:03.0000019", NOV_16 + 0.000001),
        ("2023-11-16 18:17:03.009930+00:00", NOV_16 + 0.00993),
        ("2023-11-16 18:17:03+00:00", NOV_16),
        ("2023-11-16 18:17:03", NOV_16),
        ("2023-11-16T18:17:03Z", NOV_16),
        ("2023-11-16 20:47:03+02:30", NOV_16),
        ("2023-11-16 12:17:03-0600", NOV_16),
        ("1969-12-31 23:59:59.5", -0.5),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_stamps(tmp_path: Path, stamp: str, received_at: float, end: str) -> None:
    (record,) = read(tmp_path / "code.csv", f"{HEADER}{end or chr(10)}{stamp},4808,10{end}")
    assert record == TraceRecord(
        request_id=record.request_id,
        received_at=received_at,
        request_tokens=4808,
        response_tokens=10,
        token_source=TokenSource.USAGE,
        origin=Origin.IMPORTED,
        run_id="code",
    )


def test_a_stamp_without_a_zone_is_in_the_clocks(tmp_path: Path) -> None:
    clock = TraceClock(UNIX_CLOCK.day_zero, "Europe/Rome")
    rows = "2023-11-16 19:17:03,1,1\n2023-11-16 18:17:03+00:00,1,1\n"
    records = read(tmp_path / "t", f"{HEADER}\n{rows}", clock=clock)
    assert [record.received_at for record in records] == [NOV_16, NOV_16]


def test_multimodal_and_other_columns_are_found_by_name(tmp_path: Path) -> None:
    text = '\ufeffGeneratedTokens,TIMESTAMP,NumImages,ContextTokens\r\n"7","2023-11-16 18:17:03",3,50.0\r\n\r\n'
    (record,) = read(tmp_path / "t", text)
    assert (record.received_at, record.request_tokens, record.response_tokens) == (NOV_16, 50, 7)


GOOD = "2023-11-16 18:17:03,1,1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2023-11-16 18:17:03,1,-1", "column 'GeneratedTokens': expected an integer >= 0, got '-1'"),
        ("2023-11-16 18:17:03,,1", "column 'ContextTokens': expected an integer >= 0, got ''"),
        ("2023-11-16 18:17:03,NaN,1", "column 'ContextTokens': expected an integer >= 0, got 'NaN'"),
        ("2023-11-16 18:17:03,1.5,1", "column 'ContextTokens': expected an integer >= 0, got '1.5'"),
        ("2023-13-16 18:17:03,1,1", "column 'TIMESTAMP': expected seconds >= 0 and < 4294967296, or a date and time"),
        ("2023-11-16 25:17:03,1,1", "column 'TIMESTAMP': expected seconds"),
        ("yesterday,1,1", "column 'TIMESTAMP': expected seconds"),
        ("-5,1,1", "column 'TIMESTAMP': expected seconds"),
        ("inf,1,1", "column 'TIMESTAMP': expected seconds"),
        ("2023-11-16 18:17:03,1", "expected 3 fields, got 2"),
        ('2023-11-16 18:17:03,"1,1', "expected a line of CSV, got one where the parser says: unexpected end of data"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "t"
    with pytest.raises(TraceFormatError) as caught:
        read(path, f"{HEADER}\n{GOOD}\n{line}")
    assert str(caught.value).startswith(f"{path}:3: {message}")


def test_a_stamp_that_clocks_skip_is_named(tmp_path: Path) -> None:
    clock = TraceClock(UNIX_CLOCK.day_zero, "Europe/Rome")
    with pytest.raises(TraceFormatError, match=r"t:2: column 'TIMESTAMP'"):
        read(tmp_path / "t", f"{HEADER}\n2024-03-31 02:30:00,1,1\n", clock=clock)


def written(rows: list[TraceRecord], format: str, **options: Any) -> tuple[str, WriteReport]:
    stream = io.BytesIO()
    writer = open_writer(stream, format=format, **options)
    writer.write(batch_from_records(rows))
    return stream.getvalue().decode(), writer.close()


def test_what_is_written() -> None:
    rows = [
        TraceRecord(request_id="a", received_at=NOV_16, request_tokens=5, response_tokens=0, session_id="s"),
        TraceRecord(request_id="b", received_at=NOV_16 + 0.25, request_tokens=6, outcome=Outcome.TRUNCATED),
        TraceRecord(request_id="c", received_at=NOV_16, request_tokens=7, response_tokens=8, outcome=Outcome.TRUNCATED),
    ]
    text, report = written(rows, "azure")
    assert text == f"{HEADER}\n2023-11-16 18:17:03.000000+00:00,5,0\n2023-11-16 18:17:03.000000+00:00,7,8\n"
    notes = {"failure_as_request": 1, "session_not_said": 1}
    assert report == WriteReport(3, 2, {"response_tokens_unknown": 1}, notes)
    text, report = written(rows, "azure_multimodal", failures="drop")
    assert text == "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.000000+00:00,0,5,0\n"
    assert report == WriteReport(3, 1, {"failure": 2}, {"images_unknown": 1, "session_not_said": 1})


@pytest.mark.parametrize("format", ["azure", "azure_multimodal"])
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.builds(
            TraceRecord,
            request_id=st.just("r"),
            received_at=st.integers(-62_135_596_800 * 10**6, 32_503_680_000 * 10**6).map(lambda micros: micros / 1e6),
            request_tokens=st.integers(0, 10**18 - 1),
            response_tokens=st.integers(0, 10**18 - 1),
        ),
        max_size=5,
    )
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, format: str, rows: list[TraceRecord]
) -> None:
    text, report = written(rows, format)
    assert report.rows_written == len(rows)
    back = read(tmp_path_factory.getbasetemp() / "trip.csv", text, format=format)
    assert [(row.request_tokens, row.response_tokens) for row in back] == [
        (row.request_tokens, row.response_tokens) for row in rows
    ]
    for row, record in zip(rows, back, strict=True):
        # Beyond the year 2200 a float64 of epoch seconds holds no whole microsecond.
        assert abs(row.received_at - record.received_at) < 1e-5


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"BURSTGATE_TRACES: no folder {TRACES}")
def test_the_published_trace(tmp_path: Path) -> None:
    source = TRACES / "AzureLLMInferenceTrace_code.csv"
    original = source.read_text().split()
    stream = io.BytesIO()
    writer = open_writer(stream, format="azure")
    for batch in read_trace(source):
        writer.write(batch)
    assert writer.close() == WriteReport(8819, 8819, {}, {})
    lines = stream.getvalue().decode().splitlines()
    # Each stamp has a space, so that split() made two of it; its seventh decimal is 0 in this file.
    expected = [f"{day} {rest[:15]}+00:00{rest[16:]}" for day, rest in zip(original[1::2], original[2::2], strict=True)]
    assert lines == [HEADER, *expected]
