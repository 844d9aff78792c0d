from __future__ import annotations

import datetime
import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import sqlalchemy as sa

from storage.engine import open_engine
from storage.errors import DatabaseUnavailable
from storage.export import ExportReport, export, export_batches
from storage.importing import import_trace
from storage.query import Filter
from storage.sink import open_sink
from traces.batch import SCHEMA, batch_from_records
from traces.codec import FORMATS, read_trace
from traces.record import LogType, Outcome, TraceRecord

# 2023-11-14 22:13:20 UTC, which is the 15th in Kolkata (+05:30)
T0_S = 1_700_000_000.0
RECORDS = [
    TraceRecord("a", T0_S, "s1", 2.4, "m1", 10, 20, LogType.CONVERSATION),
    TraceRecord("b", T0_S + 1.25, None, 0.5, "m2", 7, None, outcome=Outcome.TRUNCATED),
    TraceRecord("c", T0_S + 100_000, None, None, "m1", 3, 4),
]
CSV_UTC = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
80000.0,s1,2,m1,10,20,30,Conversation log
80001.25,,0,m2,7,0,7,API log
180000.0,,0,m1,3,4,7,API log
"""


@pytest.fixture
def filled(engine: sa.Engine) -> sa.Engine:
    open_sink(engine).commit(RECORDS)
    return engine


def sidecar_of(path: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(path.with_name(path.name + ".json").read_text())
    return parsed


def test_what_is_exported_when_nothing_is_asked(filled: sa.Engine, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    report = export(filled, path)
    assert path.read_text() == CSV_UTC
    assert sorted(child.name for child in tmp_path.iterdir() if "db" not in child.name) == ["out.csv", "out.csv.json"]
    said = sidecar_of(path)
    assert datetime.datetime.fromisoformat(said.pop("created_at")).tzinfo is not None
    assert said.pop("burstgate_version")
    columns = said.pop("columns")
    assert list(columns) == CSV_UTC.splitlines()[0].split(",")
    assert "failed" in columns["Response tokens"]
    assert said == {
        "format": "burstgpt",
        "day_zero": "2023-11-14",
        "timezone": "UTC",
        "stamps": "float",
        "failures": "keep",
        "filters": {},
        "rows_in": 3,
        "rows_written": 3,
        "dropped": {},
        "notes": {"elapsed_rounded": 2, "elapsed_unknown": 1},
        "anonymized": None,
    }
    assert (report.rows_in, report.rows_written, report.notes) == (3, 3, said["notes"])


@pytest.mark.parametrize(
    ("options", "first_line", "said"),
    [
        ({"format": "burstgpt6"}, "80000,m1,10,20,30,Conversation log", {"stamps": "int", "day_zero": "2023-11-14"}),
        ({"stamps": "int"}, "80000,s1,2,m1,10,20,30,Conversation log", {"stamps": "int"}),
        # The first row's day in Kolkata is the 15th, which begins there 5.5 h before UTC's.
        ({"timezone": "Asia/Kolkata"}, "13400.0,s1", {"day_zero": "2023-11-15", "timezone": "Asia/Kolkata"}),
        ({"day_zero": datetime.date(2023, 11, 13)}, "166400.0,s1", {"day_zero": "2023-11-13"}),
        ({"day_zero": datetime.date(2023, 11, 15)}, "93600.0,,0,m1", {"dropped": {"before_day_zero": 2}}),
        ({"failures": "drop"}, "80000.0", {"failures": "drop", "rows_written": 2, "dropped": {"failure": 1}}),
        ({"format": "jsonl"}, '{"request_id":"a"', {"day_zero": None, "timezone": None, "stamps": None}),
    ],
)
def test_options(
    filled: sa.Engine, tmp_path: Path, options: dict[str, Any], first_line: str, said: dict[str, object]
) -> None:
    path = tmp_path / "out"
    export(filled, path, **options)
    lines = path.read_text().splitlines()
    assert lines[0 if options.get("format") == "jsonl" else 1].startswith(first_line)
    got = sidecar_of(path)
    assert {key: got[key] for key in said} == said


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_with_one_name_for_all_models(filled: sa.Engine, tmp_path: Path, format: str) -> None:
    path = tmp_path / "out"
    report = export(filled, path, format=format, model="mine", failures="drop", salt=b"s")
    assert (report.rows_in, report.dropped) == (3, {"failure": 1})
    rows = [row for batch in read_trace(path, format=format) for row in batch["model"]]
    # Of the formats that name no model, none is read.
    assert rows == ["mine" if format in ("burstgpt", "burstgpt6", "parquet", "jsonl", "workload_trace") else None] * 2


def test_a_salt_gives_the_same_block_ids_again(filled: sa.Engine, tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for path, salt in zip(files, (b"s", b"s", b"t"), strict=True):
        export(filled, path, format="mooncake", salt=salt)
    first, second, third = (path.read_bytes() for path in files)
    assert first == second != third


def test_a_filter_selects_and_is_said(filled: sa.Engine, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    selection = Filter(start_s=T0_S, models=("m1",), outcomes=(Outcome.OK,))
    assert export(filled, path, selection).rows_written == 2
    assert sidecar_of(path)["filters"] == {"start_s": T0_S, "models": ["m1"], "outcomes": ["ok"]}


def test_nothing_selected_is_a_header(engine: sa.Engine, tmp_path: Path) -> None:
    report = export(engine, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == CSV_UTC.splitlines(keepends=True)[0]
    assert (report.rows_in, report.day_zero) == (0, "1970-01-01")


def test_parquet_says_what_its_columns_mean_and_reads_back(filled: sa.Engine, tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    report = export(filled, path, format="parquet")
    assert list(report.columns) == list(SCHEMA)
    assert pl.concat(read_trace(path)).equals(batch_from_records(RECORDS))


IMPORTED = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,m,1,2,3,API log
90000,m,1,2,3,API log
"""


@pytest.fixture
def imported(engine: sa.Engine, tmp_path: Path) -> sa.Engine:
    (tmp_path / "set.csv").write_text(IMPORTED)
    import_trace(engine, tmp_path / "set.csv")
    return engine


@pytest.mark.parametrize(
    ("selection", "options", "header", "first_row", "stamps"),
    [
        (Filter(), {}, 6, "5,m", "int"),
        (Filter(run_ids=("set",)), {}, 6, "5,m", "int"),
        (Filter(start_s=10.0), {}, 6, "90000,m", "int"),  # a part of the data set, on its clock
        (Filter(), {"format": "burstgpt"}, 8, "5.0,", "float"),  # what is given wins
        (Filter(), {"stamps": "float"}, 6, "5.0,m", "float"),
        (Filter(), {"timezone": "Asia/Tokyo"}, 6, "32405,m", "int"),  # 09:00:05 there
        (Filter(), {"day_zero": datetime.date(1969, 12, 31)}, 6, "86405,m", "int"),
    ],
)
def test_a_data_set_comes_out_as_it_came_in_unless_told_otherwise(
    imported: sa.Engine,
    tmp_path: Path,
    selection: Filter,
    options: dict[str, Any],
    header: int,
    first_row: str,
    stamps: str,
) -> None:
    report = export(imported, tmp_path / "out.csv", selection, **options)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert len(lines[0].split(",")) == header
    assert lines[1].startswith(first_row)
    assert report.stamps == stamps


@pytest.mark.parametrize("other", [TraceRecord("x", 1.0, model="m"), TraceRecord("x", 1e9, model="m", run_id="run")])
def test_a_mixed_selection_is_no_data_set(imported: sa.Engine, tmp_path: Path, other: TraceRecord) -> None:
    open_sink(imported).commit([other])
    assert export(imported, tmp_path / "out.csv").format == "burstgpt"
    assert export(imported, tmp_path / "out.csv", Filter(run_ids=("set",))).format == "burstgpt6"


# The file


def broken_batches() -> Iterator[pl.DataFrame]:
    yield batch_from_records(RECORDS)
    raise KeyboardInterrupt


@pytest.mark.parametrize("existed", [False, True])
def test_a_failed_export_leaves_nothing_behind(tmp_path: Path, existed: bool) -> None:
    path, sidecar = tmp_path / "out.csv", tmp_path / "out.csv.json"
    if existed:
        path.write_text("precious")
        sidecar.write_text("about it")
    before = {child.name: child.read_bytes() for child in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        export_batches(broken_batches(), path)
    assert {child.name: child.read_bytes() for child in tmp_path.iterdir()} == before


def test_an_existing_file_is_replaced(filled: sa.Engine, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("old, and longer than the new one" * 100)
    export(filled, path)
    assert path.read_text() == CSV_UTC


def test_a_link_is_followed_and_the_mode_is_the_usual(filled: sa.Engine, tmp_path: Path) -> None:
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    link.symlink_to(target)
    export(filled, link)
    assert link.is_symlink()
    assert target.read_text() == CSV_UTC
    umask = os.umask(0o022)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    ("name", "blocked", "error"),
    [
        ("no/such/folder.csv", None, FileNotFoundError),
        (".", None, IsADirectoryError),
        ("out.csv", "out.csv.json", IsADirectoryError),
        ("x" * 300, None, OSError),
    ],
)
def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, name: str, blocked: str | None, error: type[OSError]
) -> None:
    if blocked is not None:
        (tmp_path / blocked).mkdir()
    with pytest.raises(error) as caught:
        export_batches([batch_from_records(RECORDS)], tmp_path / name)
    assert str(tmp_path) in str(caught.value)
    assert "partial" not in str(caught.value)
    assert [child.name for child in tmp_path.rglob("*")] == ([blocked] if blocked else [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_is_written_not_replaced() -> None:
    with pytest.raises(OSError, match="No space left"):
        export_batches([batch_from_records(RECORDS)], "/dev/full")
    assert Path("/dev/full").is_char_device()


def test_a_pipe_is_written_without_a_sidecar(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    export_batches([batch_from_records(RECORDS)], pipe)
    reader.join(timeout=10)
    assert got == [CSV_UTC]
    assert [child.name for child in tmp_path.iterdir()] == ["pipe"]


def test_standard_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    stdout = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", stdout)
    report = export_batches([batch_from_records(RECORDS)], "-")
    assert stdout.buffer.getvalue().decode() == CSV_UTC
    assert isinstance(report, ExportReport)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "xml"}, "format: expected one of"),
        ({"timezone": "Mars/Olympus"}, "timezone: expected an IANA time zone name, got 'Mars/Olympus'"),
        ({"timezone": "../../etc/passwd"}, "timezone: expected an IANA"),
    ],
)
def test_wrong_options_touch_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_batches([batch_from_records(RECORDS)], tmp_path / "out.csv", **options)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[int] = []
    batch = batch_from_records(RECORDS)
    export_batches([batch, batch], tmp_path / "x", on_rows=told.append)
    assert told == [3, 6]


def test_a_database_without_its_schema_writes_no_file(database_url: str, tmp_path: Path) -> None:
    bare = open_engine(database_url)
    with pytest.raises(DatabaseUnavailable, match="burstgate db upgrade"):
        export(bare, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    bare.dispose()
