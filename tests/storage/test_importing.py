from __future__ import annotations

import datetime
from pathlib import Path

import polars as pl
import pytest
import sqlalchemy as sa

from storage.engine import open_engine, upgrade
from storage.export import export
from storage.importing import DatasetConflict, ImportReport, import_trace
from storage.query import Filter, count, read_batches, read_datasets
from storage.sink import open_sink
from traces.batch import batch_from_records
from traces.codec import TraceClock, TraceFormatError
from traces.record import Origin, TraceRecord

HEADER_6 = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
HEADER_8 = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
ROME = TraceClock(datetime.date(2023, 3, 26), "Europe/Rome")  # a day of 23 hours
RECORDED = TraceRecord("018bcfe5-687d-7000-8000-000000000001", 1_700_000_000.0, model="live")


def write_trace(
    path: Path, rows: int, *, first_s: int = 5, header: str = HEADER_6, model: str = "m", end: str = ""
) -> Path:
    form = f"{{}}.0,,1,{model},7,3,10,API log\n" if header == HEADER_8 else f"{{}},{model},7,3,10,API log\n"
    text = header + "".join(form.format(first_s + number // 3) for number in range(rows)) + end
    path.write_text(text, encoding="latin-1")
    return path


def rows_of(engine: sa.Engine, selection: Filter = Filter()) -> pl.DataFrame:  # noqa: B008
    return pl.concat(read_batches(engine, selection))


@pytest.mark.parametrize(("name", "form"), [("BurstGPT_1_head", "burstgpt6"), ("BurstGPT_3_head", "burstgpt")])
def test_a_real_trace_comes_out_byte_for_byte(
    engine: sa.Engine, real_traces: Path, tmp_path: Path, name: str, form: str
) -> None:
    source = real_traces / f"{name}.csv"
    rows = source.read_bytes().count(b"\n") - 1
    assert import_trace(engine, source) == ImportReport(rows, rows, 0, form, name)
    assert import_trace(engine, source) == ImportReport(rows, 0, rows, form, name)
    export(engine, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == source.read_bytes()
    got = rows_of(engine)
    assert got["origin"].unique().to_list() == [Origin.IMPORTED]
    assert got["run_id"].unique().to_list() == [name]


def test_two_real_traces_beside_live_records(engine: sa.Engine, real_traces: Path, tmp_path: Path) -> None:
    open_sink(engine).commit([RECORDED])
    for name in ("BurstGPT_1_head", "BurstGPT_3_head"):
        import_trace(engine, real_traces / f"{name}.csv")
    for name in ("BurstGPT_1_head", "BurstGPT_3_head"):
        export(engine, tmp_path / name, Filter(run_ids=(name,)))
        assert (tmp_path / name).read_bytes() == (real_traces / f"{name}.csv").read_bytes()


@pytest.mark.parametrize("header", [HEADER_6, HEADER_8])
@pytest.mark.parametrize("clock", [TraceClock(datetime.date(1970, 1, 1), "UTC"), ROME])
def test_export_is_the_inverse_of_import(engine: sa.Engine, tmp_path: Path, header: str, clock: TraceClock) -> None:
    source = write_trace(tmp_path / "trace.csv", 100, first_s=3 * 3600 - 10, header=header)
    import_trace(engine, source, clock=clock)
    assert read_datasets(engine)["trace"].clock == clock
    export(engine, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == source.read_text()


def test_the_name_can_be_chosen(engine: sa.Engine, tmp_path: Path) -> None:
    source = write_trace(tmp_path / "trace.csv", 3)
    assert import_trace(engine, source, dataset="ours").dataset == "ours"
    assert rows_of(engine)["run_id"].to_list() == ["ours"] * 3
    # Under another name the same file is another data set.
    assert import_trace(engine, source, dataset="theirs") == ImportReport(3, 3, 0, "burstgpt6", "theirs")
    assert list(read_datasets(engine)) == ["ours", "theirs"]


def test_progress_is_told(engine: sa.Engine, tmp_path: Path) -> None:
    told: list[int] = []
    import_trace(engine, write_trace(tmp_path / "t.csv", 2_000, model="m" * 5_000), on_rows=told.append)
    assert told == sorted(told)
    assert len(told) > 1
    assert told[-1] == 2_000


@pytest.mark.parametrize("bad", ["x,m,7,3,10,API log\n", "1,m,7,-3,4,API log\n", "1,m\n", "\xff\n"])
def test_a_broken_file_leaves_nothing(engine: sa.Engine, tmp_path: Path, bad: str) -> None:
    open_sink(engine).commit([RECORDED])
    told: list[int] = []
    long = "m" * 5_000  # so that few rows are several of the codec's chunks
    source = write_trace(tmp_path / "t.csv", 2_000, model=long, end=bad)
    with pytest.raises(TraceFormatError, match=r"t\.csv:2002"):
        import_trace(engine, source, on_rows=told.append)
    assert told  # rows had gone in when the wrong line was met
    assert rows_of(engine)["request_id"].to_list() == [RECORDED.request_id]
    assert read_datasets(engine) == {}
    assert import_trace(engine, write_trace(source, 2_000, model=long)).rows_inserted == 2_000


def test_an_interrupted_import_leaves_nothing(engine: sa.Engine, tmp_path: Path) -> None:
    def interrupt(rows_read: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_trace(engine, write_trace(tmp_path / "t.csv", 100), on_rows=interrupt)
    assert count(engine, Filter()) == 0
    assert import_trace(engine, tmp_path / "t.csv").rows_inserted == 100


def test_an_empty_trace_is_a_data_set_of_no_rows(engine: sa.Engine, tmp_path: Path) -> None:
    source = write_trace(tmp_path / "t.csv", 0)
    assert import_trace(engine, source) == ImportReport(0, 0, 0, "burstgpt6", "t")
    assert read_datasets(engine)["t"].rows == 0


def test_a_file_that_is_not_there(engine: sa.Engine, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        import_trace(engine, tmp_path / "none.csv")


def test_an_unknown_format(engine: sa.Engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format: expected one of .*, got 'xml'"):
        import_trace(engine, write_trace(tmp_path / "t.csv", 1), format="xml")


def test_a_file_that_grew_adds_its_new_rows(engine: sa.Engine, tmp_path: Path) -> None:
    source = tmp_path / "t.csv"
    import_trace(engine, write_trace(source, 10))
    assert import_trace(engine, write_trace(source, 15)) == ImportReport(15, 5, 10, "burstgpt6", "t")
    assert read_datasets(engine)["t"].rows == 15
    # A part of what is there changes nothing.
    assert import_trace(engine, write_trace(source, 10)) == ImportReport(10, 0, 10, "burstgpt6", "t")
    assert read_datasets(engine)["t"].rows == 15


@pytest.mark.parametrize(
    ("first_s", "clock"),
    [(1000, TraceClock(datetime.date(1970, 1, 1), "UTC")), (5, ROME)],
    ids=["other rows", "another clock"],
)
def test_another_file_under_a_name_that_is_taken_is_refused(
    engine: sa.Engine, tmp_path: Path, first_s: int, clock: TraceClock
) -> None:
    source = tmp_path / "t.csv"
    import_trace(engine, write_trace(source, 10))
    with pytest.raises(DatasetConflict, match=r"t\.csv: data set 't' holds 10 rows of which this file has 0"):
        import_trace(engine, write_trace(source, 10, first_s=first_s), clock=clock)
    assert count(engine, Filter()) == 10
    assert read_datasets(engine)["t"].clock.timezone == "UTC"


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_whole_records_come_back_as_they_were_recorded(tmp_path: Path, engine: sa.Engine, form: str) -> None:
    records = [
        TraceRecord("018bcfe5-687d-7000-8000-00000000000a", 1_700_000_000.25, model="m", prefix_blocks=(2**64 - 1,)),
        TraceRecord("018bcfe5-687d-7000-8000-00000000000b", 1_700_000_001.5, origin=Origin.REPLAY, run_id="r"),
    ]
    open_sink(engine).commit(records)
    export(engine, tmp_path / "all", format=form)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM requests"))
    assert import_trace(engine, tmp_path / "all") == ImportReport(2, 2, 0, form, None)
    assert read_datasets(engine) == {}
    export(engine, tmp_path / "again", format=form)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "all").read_bytes()


def test_whole_records_become_a_data_set_when_named(tmp_path: Path, engine: sa.Engine) -> None:
    open_sink(engine).commit([RECORDED])
    export(engine, tmp_path / "all.jsonl", format="jsonl")
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM requests"))
    import_trace(engine, tmp_path / "all.jsonl", dataset="from-site")
    assert rows_of(engine).select("origin", "run_id").rows() == [("imported", "from-site")]
    assert read_datasets(engine)["from-site"].format == "jsonl"


def test_text_with_a_nul_is_imported(tmp_path: Path, engine: sa.Engine) -> None:
    batch_from_records([TraceRecord("a", 1.0, model="m\0m")]).write_parquet(tmp_path / "t.parquet")
    import_trace(engine, tmp_path / "t.parquet")
    assert rows_of(engine)["model"].to_list() == ["m\N{REPLACEMENT CHARACTER}m"]


@pytest.mark.postgres
def test_an_import_does_not_keep_the_recorder_waiting(postgres_url: str, tmp_path: Path) -> None:
    engine = open_engine(postgres_url)
    upgrade(engine)
    sink = open_sink(engine)
    inserted: list[int] = []

    def record_meanwhile(rows_read: int) -> None:
        at_s = 1_700_000_000.0 + len(inserted) * 86_400  # a new day each time
        inserted.append(sink.commit([TraceRecord(f"r{len(inserted)}", at_s)]))

    import_trace(engine, write_trace(tmp_path / "t.csv", 3_000, model="m" * 5_000), on_rows=record_meanwhile)
    assert len(inserted) > 1
    assert inserted == [1] * len(inserted)
    assert count(engine, Filter()) == 3_000 + len(inserted)
    engine.dispose()
