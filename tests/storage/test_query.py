from __future__ import annotations

import tracemalloc
from pathlib import Path

import polars as pl
import pytest
import sqlalchemy as sa

from storage.engine import open_engine, upgrade
from storage.errors import DatabaseUnavailable
from storage.importing import import_trace
from storage.query import Dataset, Filter, count, read_batches, read_datasets, read_pairs, read_shadow_targets
from storage.sink import open_sink
from traces.batch import SCHEMA, batch_from_records
from traces.codec import UNIX_CLOCK
from traces.record import OWN_ORIGINS, LogType, Origin, Outcome, TraceRecord
from traces.shadow import PAIRS
from traces.table import READS

T0_S = 1_700_000_000.5
RECORDS = [
    TraceRecord("a", T0_S, session_id="s1", model="m1", log_type=LogType.CONVERSATION, origin=Origin.CLIENT),
    TraceRecord("c", T0_S + 1, model="m2", outcome=Outcome.TRUNCATED, prefix_blocks=(1, 2**64 - 1), stream=True),
    TraceRecord("b", T0_S + 1, session_id="s2", model="m1", outcome=Outcome.REJECTED, prefix_blocks=()),  # a tie
    TraceRecord("d", T0_S + 90_000, model=None, origin=Origin.REPLAY, run_id="r1"),
    TraceRecord("e", T0_S + 90_001, session_id="s1", model="ü'; DROP TABLE requests", origin=Origin.SHADOW),
]
ORDER = "abcde"


@pytest.fixture
def filled(engine: sa.Engine) -> sa.Engine:
    open_sink(engine).commit(list(reversed(RECORDS)))
    return engine


FILTERS = [
    (Filter(), ORDER),
    (Filter(start_s=T0_S + 1), "bcde"),  # the start is included
    (Filter(end_s=T0_S + 90_000), "abc"),  # the end is not
    (Filter(start_s=T0_S + 1, end_s=T0_S + 1), ""),
    (Filter(start_s=0.0, end_s=0.0), ""),  # zero is a bound
    (Filter(models=("m1",)), "ab"),
    (Filter(models=("m1", "m2", "nobody's")), "abc"),
    (Filter(models=("ü'; DROP TABLE requests",)), "e"),
    (Filter(sessions=("s1",)), "ae"),
    (Filter(outcomes=(Outcome.TRUNCATED, Outcome.REJECTED)), "bc"),
    (Filter(outcomes=("ok",)), "ade"),
    (Filter(origins=(Origin.REPLAY,)), "d"),
    (Filter(log_types=(LogType.CONVERSATION,)), "a"),
    (Filter(log_types=("conversation log",)), ""),
    (Filter(run_ids=("r1",)), "d"),
    (Filter(without_origins=OWN_ORIGINS), "abcd"),
    (Filter(without_origins=(Origin.CLIENT,), origins=(Origin.CLIENT, Origin.REPLAY)), "d"),
    (Filter(models=("m1",), sessions=("s2",), start_s=T0_S), "b"),
    (Filter(models=("m1",), sessions=("s1",), outcomes=("rejected",)), ""),
    (Filter(sessions=tuple(f"s{number}" for number in range(2000))), "abe"),
]


@pytest.mark.parametrize(("selection", "ids"), FILTERS)
def test_what_a_filter_selects_in_time_order(filled: sa.Engine, selection: Filter, ids: str) -> None:
    batches = list(read_batches(filled, selection))
    assert "".join("".join(batch["request_id"]) for batch in batches) == ids
    assert count(filled, selection) == len(ids)
    assert len(batches) == bool(ids)  # no rows, no batch


@pytest.mark.parametrize("batch_rows", [1, 2, 3, 4, 5, 6])
def test_batches_are_whole_however_they_are_cut(filled: sa.Engine, batch_rows: int) -> None:
    batches = list(read_batches(filled, Filter(), batch_rows=batch_rows))
    assert {batch.height for batch in batches[:-1]} <= {batch_rows}
    assert all(batch.schema == pl.Schema(SCHEMA) for batch in batches)
    expected = batch_from_records(sorted(RECORDS, key=lambda record: record.request_id))
    assert pl.concat(batches).equals(expected)


@pytest.mark.parametrize("fields", [READS, ("stream", "prefix_blocks"), ("request_id",), ("outcome", "received_at")])
def test_fields_are_those_columns_of_the_same_rows(filled: sa.Engine, fields: tuple[str, ...]) -> None:
    whole = pl.concat(read_batches(filled, Filter()))
    names = [name for name in SCHEMA if name in fields]
    assert pl.concat(read_batches(filled, Filter(), fields=fields)).equals(whole.select(names))


def test_fields_that_are_none_are_refused(filled: sa.Engine) -> None:
    with pytest.raises(ValueError, match="fields: expected fields of a record, got tokens"):
        read_batches(filled, Filter(), fields=("tokens",))


def test_a_reader_that_stops_early_gives_its_connection_back(filled: sa.Engine) -> None:
    for _ in range(20):  # more than a pool has
        reading = read_batches(filled, Filter(), batch_rows=1)
        next(reading)
        reading.close()
    assert count(filled, Filter()) == 5


def test_rows_written_while_reading_are_not_in_it(filled: sa.Engine) -> None:
    reading = read_batches(filled, Filter(), batch_rows=1)
    first = next(reading)
    open_sink(filled).commit([TraceRecord("z", T0_S + 90_002)])
    assert sum(batch.height for batch in reading) + first.height == 5
    assert count(filled, Filter()) == 6


def test_no_batch_of_no_rows_can_be_asked_for(engine: sa.Engine) -> None:
    with pytest.raises(ValueError, match="batch_rows: expected an integer >= 1, got 0"):
        read_batches(engine, Filter(), batch_rows=0)


@pytest.mark.parametrize("read", [count, lambda engine, selection: next(read_batches(engine, selection))])
def test_a_database_without_its_schema_says_so(database_url: str, read: object) -> None:
    bare = open_engine(database_url)
    assert callable(read)
    with pytest.raises(DatabaseUnavailable, match="burstgate db upgrade"):
        read(bare, Filter())
    bare.dispose()


def test_a_database_that_is_down_says_so() -> None:
    with pytest.raises(DatabaseUnavailable, match="Connection refused"):
        next(read_batches(open_engine("postgresql://u@127.0.0.1:1/db"), Filter()))


def test_data_sets(engine: sa.Engine, tmp_path: Path) -> None:
    assert read_datasets(engine) == {}
    path = tmp_path / "x.csv"
    path.write_text("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,m,1,2,3,API log\n")
    import_trace(engine, path)
    assert read_datasets(engine) == {"x": Dataset("x", "burstgpt6", UNIX_CLOCK, "int", 1)}


@pytest.fixture
def large(engine: sa.Engine) -> sa.Engine:
    sink = open_sink(engine)
    for start in range(0, 40_000, 10_000):
        sink.commit(
            [TraceRecord(f"{number:08}", T0_S + number, model="m" * 50) for number in range(start, start + 10_000)]
        )
    return engine


def test_memory_does_not_grow_with_the_selection(large: sa.Engine) -> None:
    def peak_bytes(selection: Filter) -> int:
        tracemalloc.start()
        rows = sum(batch.height for batch in read_batches(large, selection, batch_rows=2_000))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == count(large, selection)
        return peak

    peak_bytes(Filter(end_s=T0_S + 100))
    assert peak_bytes(Filter()) < 1.5 * peak_bytes(Filter(end_s=T0_S + 4_000))


def test_reading_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    engine = open_engine(f"sqlite:///{path}")
    upgrade(engine)
    open_sink(engine).commit(RECORDS)
    engine.dispose()
    before = path.read_bytes()
    engine = open_engine(f"sqlite:///{path}")
    assert count(engine, Filter()) == 5
    engine.dispose()
    assert path.read_bytes() == before


def test_shadows_stand_beside_their_primaries(engine: sa.Engine) -> None:
    def shadow(name: str, at_s: float, of: str, upstream: str = "next") -> TraceRecord:
        return TraceRecord(
            name, T0_S + at_s, origin=Origin.SHADOW, shadow_of=of, upstream=upstream, agreement=0.5, ttft_s=0.25,
            outcome=Outcome.TRUNCATED,
        )  # fmt: skip

    records = [
        TraceRecord("p1", T0_S, status=200, response_tokens=3, finish_reason="stop", elapsed_s=1.5),
        TraceRecord("p2", T0_S + 10, request_tokens=2**40),
        shadow("s1", 0.01, "p1"),
        shadow("s2", 5, "p1"),  # a copy
        shadow("s3", 11, "p2"),
        shadow("s4", 12, "gone"),
        shadow("s5", 13, "p2", upstream="other"),
    ]
    open_sink(engine).commit(records)
    pairs = pl.concat(list(read_pairs(engine, "next", batch_rows=2)))
    assert dict(pairs.schema) == PAIRS
    assert sorted(pairs["a_elapsed_s"].to_list(), key=str) == [1.5, 1.5, None, None]
    assert pairs.filter(pl.col("a_outcome").is_null()).height == 1
    assert sorted(pairs["a_request_tokens"].drop_nulls().to_list()) == [2**40]
    assert set(pairs["b_outcome"]) == {"truncated"}
    assert set(pairs["agreement"]) == {0.5}

    def found(start_s: float | None = None, end_s: float | None = None) -> int:
        return sum(batch.height for batch in read_pairs(engine, "next", start_s=start_s, end_s=end_s))

    assert found(start_s=T0_S + 5) == 3
    assert found(end_s=T0_S + 11) == 2  # the end is not included
    assert found(start_s=T0_S + 20) == 0
    later = pl.concat(list(read_pairs(engine, "next", start_s=T0_S + 5, end_s=T0_S + 6)))
    assert later["a_status"].to_list() == [200]  # its primary came before the start
    assert read_shadow_targets(engine) == ["next", "other"]
