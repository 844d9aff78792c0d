"""Samples: how a reply is measured, files of both kinds and back, and the record that a sample becomes."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import msgspec
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.client import ReplayError, Reply
from replay.sample import Sample, SamplesFile, failure_class, measure, read_samples, record_of
from replay.schedule import Planned
from traces.record import LogType, Origin, Outcome, TokenSource, TraceRecord
from wire.shapes import Usage

ROW = Planned(7, 2.0, "s1", "GPT-4", 20, 3)
MS = 1_000_000
ZERO_NS = 1_000_000 * MS
REPLY = Reply(
    Outcome.OK,
    began_ns=ZERO_NS + 2100 * MS,
    end_ns=ZERO_NS + 2600 * MS,
    sent_ns=ZERO_NS + 2110 * MS,
    first_chunk_ns=ZERO_NS + 2200 * MS,
    last_chunk_ns=ZERO_NS + 2400 * MS,
    usage=Usage(20, 3),
    status=200,
    gaps_ns=[50 * MS, 150 * MS],
)
SAMPLE = Sample(
    index=7,
    due_s=2.0,
    sent_s=2.11,
    dispatch_lag_s=0.08,
    wake_lag_s=0.01,
    ttft_s=0.09,
    tpot_s=0.1,
    e2e_s=0.49,
    e2e_from_due_s=0.57,
    request_tokens_asked=20,
    request_tokens_got=20,
    response_tokens_asked=3,
    response_tokens_got=3,
    status=200,
    outcome=Outcome.OK,
    first_s=2.2,
    last_s=2.6,
    ttft_from_due_s=0.17,
    itl_max_s=0.15,
    held_back_s=0.06,
    session_id="s1",
    session_wait_s=0.03,
    sender="h:1",
)
REFUSED = Sample(
    index=8, due_s=1.0, sent_s=None, dispatch_lag_s=None, wake_lag_s=0.5, ttft_s=None, tpot_s=None, e2e_s=None,
    e2e_from_due_s=None, request_tokens_asked=20, request_tokens_got=None, response_tokens_asked=3,
    response_tokens_got=None, status=None, outcome=Outcome.CONNECT_ERROR, error="refused",
)  # fmt: skip


def test_a_whole_sample() -> None:
    found = measure(
        ROW, REPLY, ZERO_NS, ready_ns=ZERO_NS + round(ROW.due_s * 1e9) + 30 * MS, held_back_ns=60 * MS, sender="h:1"
    )
    assert found == SAMPLE
    assert [found.began_s, found.end_s] == pytest.approx([2.1, 2.6])


def test_a_request_that_was_never_sent() -> None:
    reply = Reply(Outcome.CONNECT_ERROR, began_ns=ZERO_NS + 1500 * MS, end_ns=ZERO_NS + 1600 * MS, error="refused")
    found = measure(Planned(8, 1.0, None, None, 20, 3), reply, ZERO_NS)
    assert found == REFUSED
    assert (found.began_s, found.end_s) == (1.5, 1.5)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"outcome": Outcome.CONNECT_ERROR}, "connect"),
        ({"outcome": Outcome.UPSTREAM_TIMEOUT}, "timeout"),
        ({"outcome": Outcome.REJECTED, "status": 429}, "http_429"),
        ({"outcome": Outcome.INVALID_REQUEST, "status": 400}, "http_4xx"),
        ({"outcome": Outcome.UPSTREAM_ERROR, "status": 503}, "http_5xx"),
        ({"outcome": Outcome.UPSTREAM_ERROR, "status": 200}, "bad_answer"),
        ({"outcome": Outcome.UPSTREAM_ERROR, "status": None}, "bad_answer"),
        ({"outcome": Outcome.TRUNCATED}, "mid_stream"),
        ({"outcome": Outcome.CLIENT_GONE}, "cancelled"),
        ({"outcome": Outcome.UPSTREAM_TIMEOUT, "failure_class": "timeout_first_byte"}, "timeout_first_byte"),
    ],
)
def test_failure_classes(changes: dict[str, object], name: str) -> None:
    assert failure_class(msgspec.structs.replace(SAMPLE, **changes)) == name


def written(path: Path, samples: list[Sample]) -> SamplesFile:
    with SamplesFile(path) as file:
        for sample in samples:
            file.write(sample)
    return file


TEXTS = st.none() | st.text(max_size=20)
SECONDS = st.none() | st.floats(0, 1e6)
SAMPLES = st.builds(
    lambda **changes: msgspec.structs.replace(SAMPLE, **changes),
    index=st.integers(0, 2**62),
    due_s=st.floats(0, 1e9),
    sent_s=SECONDS,
    ttft_s=SECONDS,
    status=st.none() | st.integers(100, 599),
    outcome=st.sampled_from(Outcome),
    error=TEXTS,
    is_warmup=st.booleans(),
    failure_class=TEXTS,
    session_id=TEXTS,
    sender=TEXTS,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(SAMPLES, max_size=8), st.sampled_from(["s.jsonl", "s.parquet", "S.PQ", "s"]))
def test_what_is_written_is_read(samples: list[Sample], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        assert written(path, samples).error is None
        assert list(read_samples(path)) == samples
        assert [each.name for each in Path(folder).iterdir()] == [name]


def test_parquet_has_row_groups_and_columns_that_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.sample.ROW_GROUP_ROWS", 100)
    samples = [msgspec.structs.replace(REFUSED if n % 3 else SAMPLE, index=n) for n in range(1050)]
    written(tmp_path / "s.parquet", samples)
    frame = pl.read_parquet(tmp_path / "s.parquet")
    assert frame.columns == list(Sample.__struct_fields__)
    assert frame["index"].to_list() == list(range(1050))
    assert frame["outcome"].value_counts(sort=True).rows() == [("connect_error", 700), ("ok", 350)]
    assert frame.schema["sent_s"] == pl.Float64
    assert frame.schema["status"] == pl.Int64
    assert frame["is_warmup"].sum() == 0
    assert list(read_samples(tmp_path / "s.parquet")) == samples


def test_what_cannot_be_made_parquet_keeps_its_rows(tmp_path: Path) -> None:
    """The name is taken by a folder: no file of that name appears, and the rows are where the message says."""
    path = tmp_path / "s.parquet"
    with SamplesFile(path) as file:
        file.write(SAMPLE)
        path.mkdir()
    assert file.error is not None
    found = re.search(r"s\.parquet: .*; its rows are in (.*)", file.error)
    assert found is not None
    assert list(read_samples(Path(found[1]))) == [SAMPLE]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_said_once_and_stops_nothing() -> None:
    file = written(Path("/dev/full"), [SAMPLE] * 1000)
    assert file.error == "/dev/full: No space left on device"


@pytest.mark.parametrize("name", ["s.jsonl", "s.parquet"])
def test_a_samples_file_that_cannot_be_begun(name: str) -> None:
    with pytest.raises(ReplayError, match=f"samples file /nonexistent/{name}: No such file"):
        SamplesFile(Path("/nonexistent") / name).__enter__()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{}\n", "s:1: expected a sample: Object missing required field"),
        (msgspec.json.encode(SAMPLE) + b"\nrubbish\n", "s:2: expected a sample: "),
        (msgspec.json.encode(SAMPLE)[:-9], "s:1: expected a sample: "),
        (b"\xff\n", "s:1: expected a sample: "),
        (b"x" * 2_000_000, "s:1: expected a sample, got a line of over 1048576 bytes"),
        (b"PAR1 and no more", "s: expected samples, got a Parquet file where polars says: "),
    ],
)
def test_what_is_no_samples_file(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_samples(tmp_path / "s"))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_of_something_else_names_the_row(tmp_path: Path) -> None:
    pl.DataFrame({"index": [1, 2]}).write_parquet(tmp_path / "s")
    with pytest.raises(ValueError, match="s:1: expected a sample: Object missing required field"):
        list(read_samples(tmp_path / "s"))


def test_older_samples_are_read(tmp_path: Path) -> None:
    """As they were before they had more than the first fields."""
    new = set(Sample.__struct_fields__[17:])
    lines = {name: value for name, value in msgspec.to_builtins(SAMPLE).items() if name not in new}
    (tmp_path / "s").write_bytes(msgspec.json.encode(lines) + b"\n\n")
    (found,) = read_samples(tmp_path / "s")
    assert (found.index, found.sender, found.held_back_s) == (7, None, 0.0)


def test_a_sample_as_a_record() -> None:
    found = record_of(SAMPLE, run_id="r", started_at=1_700_000_000.0, model="m", endpoint="chat", stream=True)
    assert found == TraceRecord(
        request_id=found.request_id,
        received_at=1_700_000_002.11,
        session_id="s1",
        elapsed_s=0.49,
        model="m",
        request_tokens=20,
        response_tokens=3,
        log_type=LogType.CONVERSATION,
        outcome=Outcome.OK,
        client_request_id="r-7",
        status=200,
        ttft_s=0.09,
        tpot_s=0.1,
        endpoint="/v1/chat/completions",
        stream=True,
        attempts=1,
        max_tokens=3,
        token_source=TokenSource.USAGE,
        origin=Origin.REPLAY,
        run_id="r",
    )
    failed = record_of(REFUSED, run_id="r", started_at=1_700_000_000.0, model="m", endpoint="completions", stream=False)
    assert (failed.received_at, failed.outcome, failed.error_type) == (
        1_700_000_001.5,
        Outcome.CONNECT_ERROR,
        "connect",
    )
    assert (failed.endpoint, failed.token_source, failed.log_type) == ("/v1/completions", TokenSource.NONE, LogType.API)


@given(st.integers(0, 10**6), st.floats(0, 4e9))
def test_request_ids_are_uuid7_of_run_and_place(index: int, started_at: float) -> None:
    sample = msgspec.structs.replace(SAMPLE, index=index)
    ids = [
        record_of(sample, run_id=run, started_at=started_at, model="m", endpoint="chat", stream=True).request_id
        for run in ("r", "r", "other")
    ]
    assert ids[0] == ids[1] != ids[2]
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", ids[0])
    assert int(ids[0][:8] + ids[0][9:13], 16) == pytest.approx((started_at + 2.11) * 1000, abs=1)
