"""The archive: what it holds is what was put there; killed at any line, nothing is lost and nothing is there twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import fsspec
import polars as pl
import pytest
import sqlalchemy as sa
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from storage.archive import Archive, day_text, merged, read_with_archive
from storage.engine import open_engine
from storage.errors import ArchiveError
from storage.query import Filter
from storage.retention import days_before, prune
from storage.schema import partition_bounds_s
from storage.sink import open_sink
from traces.batch import batch_from_records, empty_batch, records_from_batch
from traces.codec import read_trace
from traces.record import LogType, Outcome, TraceRecord

DAY = 20_000
FIRST_S = float(partition_bounds_s(DAY)[0])
DAY_S = 86_400


def records(day: int, count: int, *, first: int = 0, **fields: Any) -> list[TraceRecord]:
    at_s = partition_bounds_s(day)[0]
    return [
        TraceRecord(f"r{day}-{n:05}", at_s + n * 7.25, model="m", gateway="g", **fields)
        for n in range(first, first + count)
    ]


def held_by(archive: Archive) -> list[TraceRecord]:
    return [row for held in archive.days().values() for b in archive.read(held) for row in records_from_batch(b)]


def together(engine: sa.Engine, archive: Archive, selection: Filter | None = None, size: int = 7) -> list[TraceRecord]:
    batches = list(read_with_archive(engine, archive, selection or Filter(), batch_rows=size))
    assert all(batch.height for batch in batches)
    return [row for batch in batches for row in records_from_batch(batch)]


@pytest.fixture
def store() -> Iterator[str]:
    """A place that is no folder: fsspec's store in memory."""
    yield "memory://burst/archive"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["folder", "file URL", "store"])
def archive(request: pytest.FixtureRequest, tmp_path: Path, store: str) -> Archive:
    places = {"folder": str(tmp_path / "an archive"), "file URL": f"file://{tmp_path}/a", "store": store}
    return Archive(places[request.param])


def test_what_was_put_comes_back(archive: Archive) -> None:
    assert archive.days() == {}
    rows = records(DAY, 100, session_id="s", prefix_blocks=(1, 2**64 - 1))
    put = archive.put(DAY, [batch_from_records(rows[:30]), batch_from_records(rows[30:])])
    assert archive.put(DAY + 1, [batch_from_records(records(DAY + 1, 5))]).rows == 5
    assert archive.days() == {DAY: put, DAY + 1: archive.days()[DAY + 1]}
    assert held_by(archive) == rows + records(DAY + 1, 5)
    # The content's hash does not know how the rows were cut.
    assert archive.put(DAY, [batch_from_records(rows)]) == put


def test_the_files_are_what_the_page_says(tmp_path: Path) -> None:
    archive = Archive(str(tmp_path))
    put = archive.put(DAY, [batch_from_records(records(DAY, 3))])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", put.file]
    assert put.file.startswith("requests-2024-10-04-")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("burstgate-archive", 1)
    assert manifest["days"]["2024-10-04"]["rows"] == 3
    (rows,) = read_trace(tmp_path / put.file)  # any tool that reads Parquet
    assert list(records_from_batch(rows)) == records(DAY, 3)


def test_a_new_file_replaces_a_days_old_one(archive: Archive) -> None:
    old = archive.put(DAY, [batch_from_records(records(DAY, 3))])
    new = archive.put(DAY, [batch_from_records(records(DAY, 4))])
    assert archive.days() == {DAY: new}
    assert archive.sweep() == 0
    with pytest.raises((ArchiveError, FileNotFoundError)):
        list(archive.read(old))


def test_sweep_removes_what_nobody_names(tmp_path: Path) -> None:
    archive = Archive(str(tmp_path))
    put = archive.put(DAY, [batch_from_records(records(DAY, 3))])
    left = [tmp_path / "requests-2024-10-05-0123456789abcdef.parquet", tmp_path / "requests-2024-10-05.part"]
    for path in (*left, tmp_path / "requests-mine.parquet"):
        path.write_bytes(b"x")
    assert archive.sweep() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", put.file, "requests-mine.parquet"]


def test_rows_that_break_off_leave_the_archive_as_it_was(archive: Archive) -> None:
    put = archive.put(DAY, [batch_from_records(records(DAY, 3))])

    def breaking() -> Iterator[pl.DataFrame]:
        yield batch_from_records(records(DAY, 2))
        raise ArchiveError("broken off")

    with pytest.raises(ArchiveError, match="broken off"):
        archive.put(DAY, breaking())
    assert archive.days() == {DAY: put}
    assert archive.sweep() == 0


class Lossy(MemoryFileSystem):  # type: ignore[misc]
    """A store that confirms an upload and keeps half of it."""

    protocol = "lossy"

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        super().put_file(lpath, rpath, *args, **kwargs)
        data = self.cat_file(rpath)
        self.pipe_file(rpath, data[: len(data) // 2])


def test_a_store_that_loses_bytes_takes_nothing_out(engine: sa.Engine, store: str) -> None:
    fsspec.register_implementation("lossy", Lossy, clobber=True)
    archive = Archive("lossy://archive")
    open_sink(engine).commit(records(DAY, 50))
    with pytest.raises(Exception, match="requests-2024-10-04"):
        prune(engine, days_before(engine, FIRST_S + DAY_S), archive)
    assert archive.days() == {}
    assert len(together(engine, archive)) == 50


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "manifest.json: expected a manifest of version 1"),
        ('{"days":{},"format":"burstgate-archive","version":2}', "version 2"),
        ('{"days":{},"format":"other","version":1}', "'other'"),
        ('{"days":{"yesterday":{"file":"","rows":1,"sha256":"","content_sha256":"","archived_at":""}}}', "yesterday"),
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArchiveError, match=said):
        Archive(str(tmp_path)).days()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nothing://bucket", "archive nothing://bucket: Protocol not known"),
        ("s3://key:secret@bucket/x", r"archive s3://\*\*\*@bucket/x: .*s3fs"),
    ],
)
def test_a_place_that_can_not_be_used(url: str, said: str) -> None:
    with pytest.raises(ArchiveError, match=said):
        Archive(url)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    archive = Archive(str(tmp_path))
    put = archive.put(DAY, [batch_from_records(records(DAY, 3))])
    (tmp_path / put.file).unlink()
    with pytest.raises(ArchiveError, match=put.file):
        held_by(archive)


# Archive and database together ----------------------------------------------------------------------------------------


def test_a_range_over_both_has_each_row_once(engine: sa.Engine, tmp_path: Path) -> None:
    archive = Archive(str(tmp_path / "archive"))
    sink = open_sink(engine)
    every = [row for day in range(DAY, DAY + 5) for row in records(day, 20)]
    sink.commit(every)
    days = days_before(engine, FIRST_S + 4 * DAY_S)
    prune(engine, days[:2], archive)
    prune(engine, days[2:3], archive, keep=True)
    late = [TraceRecord("late", FIRST_S + 33.5, gateway="g")]
    open_sink(engine).commit(late)
    assert together(engine, archive) == sorted(every + late, key=lambda row: (row.received_at, row.request_id))
    some = Filter(start_s=FIRST_S + DAY_S + 7.25, end_s=FIRST_S + 3 * DAY_S + 14.5)
    assert together(engine, archive, some) == every[21:62]


def test_filters_look_at_the_row_that_counts(engine: sa.Engine, tmp_path: Path) -> None:
    """The archive has a turn as it was; the database has learnt since that it began a conversation."""
    archive = Archive(str(tmp_path / "archive"))
    open_sink(engine).commit([TraceRecord("a", FIRST_S, "s", log_type=LogType.CONVERSATION, outcome=Outcome.TRUNCATED)])
    archive.put(DAY, [batch_from_records([TraceRecord("a", FIRST_S, outcome=Outcome.TRUNCATED)])])
    rows = [
        len(together(engine, archive, chosen))
        for chosen in (
            Filter(sessions=("s",)),
            Filter(log_types=(LogType.CONVERSATION,)),
            Filter(log_types=(LogType.API,)),
            Filter(outcomes=(Outcome.TRUNCATED,)),
            Filter(outcomes=(Outcome.OK,)),
            Filter(models=("m",)),
        )
    ]
    assert rows == [1, 1, 0, 1, 0, 0]


_rows = st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc")), unique=True, max_size=9).map(sorted)


@given(_rows, _rows, st.integers(1, 4), st.integers(1, 4))
def test_merging_is_the_union_by_key(
    newer: list[tuple[int, str]], older: list[tuple[int, str]], size: int, other_size: int
) -> None:
    def batches(rows: list[tuple[int, str]], model: str, size: int) -> Iterator[pl.DataFrame]:
        yield empty_batch()
        for start in range(0, len(rows), size):
            yield batch_from_records([TraceRecord(name, at, model=model) for at, name in rows[start : start + size]])

    found = [
        (row.received_at, row.request_id, row.model)
        for batch in merged(batches(newer, "new", size), batches(older, "old", other_size))
        for row in records_from_batch(batch)
    ]
    models = dict.fromkeys(older, "old") | dict.fromkeys(newer, "new")
    assert found == [(at, name, models[at, name]) for at, name in sorted(models)]


# Killed ---------------------------------------------------------------------------------------------------------------

_TRACED = ("storage/archive.py", "storage/retention.py")


def _die_at(line: int, database_url: str, place: str) -> None:
    """Archives and prunes, and is killed before the given line of the two files that it runs, counted from 1."""
    count = 0

    def on_line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    def on_call(frame: FrameType, event: str, argument: object) -> Any:
        return on_line if frame.f_code.co_filename.endswith(_TRACED) else None

    engine = open_engine(database_url)
    archive = Archive(place)
    days = days_before(engine, FIRST_S + 2 * DAY_S)
    sys.settrace(on_call)
    prune(engine, days, archive)
    sys.settrace(None)
    print(f"lines {count}", flush=True)
    os._exit(0 if count < line else 3)


def _killed_at(lines: Iterator[int], engine: sa.Engine, folder: Path) -> int:
    """How many of the runs were killed before they were through."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["storage.retention", "fsspec.implementations.local", "psycopg"])
    url = engine.url.render_as_string(hide_password=False)
    killed = 0
    for line in lines:
        place = folder / f"archive-{line}"
        archive = Archive(str(place))
        with engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM requests"))
            connection.execute(sa.text("DELETE FROM pruned"))
        every = [*records(DAY, 1500), *records(DAY + 1, 3)]
        archive.put(DAY, [batch_from_records(every[:20])])  # it was archived before, and these rows went
        open_sink(engine).commit(every[20:])
        child = context.Process(target=_die_at, args=(line, url, str(place)))
        child.start()
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL)
        killed += child.exitcode != 0
        assert together(engine, archive, size=1000) == every
        prune(engine, days_before(engine, FIRST_S + 2 * DAY_S), archive)
        assert held_by(archive) == every
        assert together(engine, archive, size=1000) == every
        assert sorted(path.name for path in place.iterdir()) == sorted(
            ["manifest.json", *(held.file for held in archive.days().values())]
        )
        with engine.connect() as connection:
            assert connection.execute(sa.text('SELECT sum("rows"), sum(archived) FROM pruned')).one() == (1483, 1483)
            assert connection.execute(sa.text("SELECT count(*) FROM requests")).scalar() == 0
        assert [day_text(day) for day in archive.days()] == ["2024-10-04", "2024-10-05"]
    return killed


def test_killed_at_some_lines(engine: sa.Engine, tmp_path: Path) -> None:
    assert _killed_at(iter(range(40, 400, 60)), engine, tmp_path) >= 4


@pytest.mark.slow
def test_killed_all_over(engine: sa.Engine, tmp_path: Path) -> None:
    assert _killed_at(iter(range(1, 500, 9)), engine, tmp_path) > 30
