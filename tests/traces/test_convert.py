"""`burstgate convert`: any format into any other, reconciled and compared, or nothing at all."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from proxy.cli import app
from tests.traces.strategies import RECORDS
from traces import convert as conversion
from traces.batch import batch_from_records, records_from_batch
from traces.codec import FORMATS, TraceClock, TraceFormatError, block_tokens, open_writer, read_trace
from traces.convert import Conversion, convert, describe
from traces.record import LogType, Origin, Outcome, TraceRecord

ROOT = Path(__file__).parent.parent.parent
TRACES = Path(os.environ.get("BURSTGATE_TRACES", "../shared/traces"))
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason=f"BURSTGATE_TRACES: no folder {TRACES}")

HEADER = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
CSV = f"""{HEADER}
5.0,s1,3,gpt,10,20,30,Conversation log
6.0,,1,gpt,0,0,0,API log
6.5,s1,2,gpt,40,5,45,Conversation log
9.0,,0,llama,7,1,8,API log
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.csv"
    path.write_text(CSV)
    return path


def records(path: Path, **options: Any) -> list[TraceRecord]:
    return [record for batch in read_trace(path, **options) for record in records_from_batch(batch)]


def store(path: Path, rows: list[TraceRecord], format: str = "parquet") -> Path:
    with path.open("wb") as stream:
        writer = open_writer(stream, format=format)
        writer.write(batch_from_records(rows))
        writer.close()
    return path


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# Round trips


@pytest.mark.parametrize("text", [CSV, CSV.replace("llama", '"lla,ma ""x"""'), f"{HEADER}\n"])
@pytest.mark.parametrize("via", ["parquet", "jsonl"])
def test_burstgpt_comes_back_byte_for_byte(tmp_path: Path, source: Path, text: str, via: str) -> None:
    source.write_text(text)
    middle, back = tmp_path / f"middle.{via}", tmp_path / "back.csv"
    convert(source, middle)
    done = convert(middle, back, source_format=via)  # an empty file of JSON lines looks like nothing
    assert back.read_text() == text
    assert (done.rows_read, done.rows_kept, done.dropped) == (text.count("\n") - 1, text.count("\n") - 1, {})
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("format", FORMATS)
def test_any_format_from_burstgpt(tmp_path: Path, source: Path, format: str) -> None:
    target = tmp_path / "out"
    done = convert(source, target, target_format=format)
    lost = {"azure": "request_tokens_unknown", "azure_multimodal": "request_tokens_unknown"}
    dropped = {} if format in ("burstgpt", "burstgpt6", "parquet", "jsonl") else {
        lost.get(format, "no_request_tokens"): 1
    }  # fmt: skip
    assert (done.source_format, done.target_format) == ("burstgpt", format)
    assert (done.rows_read, done.rows_kept, done.dropped) == (4, 4 - len(dropped), dropped)
    rows = records(target, format=format)
    kept = [row for row in records(source) if not dropped or row.outcome == Outcome.OK]
    assert [row.response_tokens for row in rows] == [row.response_tokens for row in kept]
    if format != "aiperf":  # its second turn is shorter than the first with its answer: see test_mooncake
        assert [row.request_tokens for row in rows] == [row.request_tokens for row in kept]
    # And back again, into a format with every field.
    assert convert(target, tmp_path / "again.parquet", source_format=format).rows_read == len(rows)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(RECORDS, max_size=5))
def test_every_field_survives(tmp_path_factory: pytest.TempPathFactory, rows: list[TraceRecord]) -> None:
    folder = tmp_path_factory.getbasetemp()
    source = store(folder / "any.jsonl", rows, "jsonl")
    convert(source, folder / "any.parquet", source_format="jsonl")
    convert(folder / "any.parquet", folder / "any2.jsonl")
    assert (folder / "any2.jsonl").read_bytes() == source.read_bytes()


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(RECORDS, max_size=6), to=st.sampled_from(["burstgpt", "burstgpt6"]), drops=st.booleans())
def test_burstgpt_drops_what_its_writer_says(
    tmp_path_factory: pytest.TempPathFactory, rows: list[TraceRecord], to: str, drops: bool
) -> None:
    """Rows of every kind: the rules of what is kept are stated twice, and `convert` compares both."""
    folder = tmp_path_factory.getbasetemp()
    rows = [
        msgspec.structs.replace(
            row,
            received_at=row.received_at % 2**31,
            elapsed_s=None if row.elapsed_s is None else row.elapsed_s % 1e6,
            request_tokens=None if row.request_tokens is None else row.request_tokens % 10**9,
            response_tokens=None if row.response_tokens is None else row.response_tokens % 10**9,
        )
        for row in rows
    ]
    source = store(folder / "rows.parquet", rows)
    done = convert(source, folder / "rows.csv", target_format=to, failures="drop" if drops else "keep")
    assert done.rows_read == len(rows) == done.rows_kept + sum(done.dropped.values())


# Options


def test_failures_model_and_clock(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out.parquet"
    clock = TraceClock(datetime.date(2026, 11, 21), "Europe/Rome")
    done = convert(source, target, failures="drop", model="mine", clock=clock)
    assert done.dropped == {"failure": 1}
    rows = records(target)
    assert [(row.model, row.received_at - clock.zero_s) for row in rows] == [("mine", 5.0), ("mine", 6.5), ("mine", 9)]
    convert(target, tmp_path / "back.csv", clock=clock)
    assert (tmp_path / "back.csv").read_text().splitlines()[1] == "5.0,s1,3,mine,10,20,30,Conversation log"


def test_a_map_of_columns(tmp_path: Path, source: Path) -> None:
    columns = {"timestamp": "Timestamp", "prompt_tokens": "Request tokens", "output_tokens": "Response tokens"}
    done = convert(source, tmp_path / "out.parquet", columns=columns)
    assert done.source_format == "mapped"
    assert [row.request_tokens for row in records(tmp_path / "out.parquet")] == [10, 0, 40, 7]


def blocks_of(path: Path) -> list[list[int]]:
    return [json.loads(line)["hash_ids"] for line in path.read_bytes().splitlines()]


def test_block_size_travels_with_the_trace(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    rows = [{"timestamp": n, "input_length": 33, "output_length": 1, "hash_ids": [7, 8, n]} for n in range(3)]
    source.write_text("\n".join(map(json.dumps, rows)))
    middle, target = tmp_path / "m.parquet", tmp_path / "out.jsonl"
    assert convert(source, middle).block_tokens == 16
    assert block_tokens(middle) == 16
    done = convert(middle, target, target_format="timed_trace", salt=b"x")
    assert (done.block_tokens, done.is_prefix_floor, done.notes) == (16, False, {})
    first, second, third = blocks_of(target)
    assert first[:2] == second[:2] == third[:2]
    assert len({*first, *second, *third}) == 5
    # The same salt gives the same file, another one another file.
    for salt, is_equal in ((b"x", True), (b"y", False), (None, False)):
        convert(middle, tmp_path / "other.jsonl", target_format="timed_trace", salt=salt)
        assert ((tmp_path / "other.jsonl").read_bytes() == target.read_bytes()) == is_equal
    # A size that is given counts more than what the file says.
    assert convert(middle, target, target_format="mooncake", source_block_tokens=32).block_tokens == 32


def test_unknown_prefixes_make_a_floor(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out.jsonl"
    done = convert(source, target, target_format="mooncake")
    assert done.is_prefix_floor
    ids = [block for blocks in blocks_of(target) for block in blocks]
    assert len(set(ids)) == len(ids)
    lines = describe(done, source, target)
    assert lines == [
        f"{source}: 4 rows read (burstgpt) = 3 kept + 1 dropped, 1 no_request_tokens",
        f"{target}: 3 rows written (mooncake), read back and equal in received_at, request_tokens, response_tokens,"
        " prefix_blocks",
        f"{target}: 3 rows with prefix_unknown",
        f"{target}: 2 rows with session_not_said",
        f"{target}: prefix blocks of 512 tokens",
        f"{target}: prefix reuse is a floor: where no prefix is known, block ids are unique",
    ]


def test_recorded_prefixes_reach_every_tool(tmp_path: Path) -> None:
    """Rows as the gateway records them, with hashes of 256 bytes of text."""
    row = TraceRecord(
        request_id="a",
        received_at=1.0,
        model="m",
        request_tokens=200,
        response_tokens=2,
        log_type=LogType.API,
        prefix_blocks=(5, 6, 7),
        origin=Origin.CLIENT,
    )
    source = store(tmp_path / "in.parquet", [row, msgspec.structs.replace(row, request_id="b", received_at=2.0)])
    target = tmp_path / "out.jsonl"
    done = convert(source, target, target_format="mooncake")
    first, second = blocks_of(target)
    assert (first[:3] == second[:3], first[3] == second[3]) == (True, False)
    assert (done.block_tokens, done.is_prefix_floor) == (64, True)


# What goes wrong


def test_unsorted_rows_are_refused_with_their_row(tmp_path: Path, source: Path) -> None:
    source.write_text(CSV + "7.0,,0,llama,7,1,8,API log\n")
    with pytest.raises(TraceFormatError, match=r"in\.csv: row 5: .* got '7\.0' after '9\.0'"):
        convert(source, tmp_path / "out.jsonl", target_format="mooncake")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv"]
    convert(source, tmp_path / "out.jsonl")  # which does not demand an order


@pytest.mark.parametrize("to", ["parquet", "jsonl", "mooncake"])
def test_a_wrong_line_leaves_what_was_there(tmp_path: Path, source: Path, to: str) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    source.write_text(CSV + "10,,0,llama,-7,1,8,API log\n")
    with pytest.raises(
        TraceFormatError, match=r"in\.csv:6: column 'Request tokens': expected an integer >= 0, got '-7'"
    ):
        convert(source, target, target_format=to)
    assert target.read_bytes() == b"old"
    assert left_behind(tmp_path) == []


def test_a_torn_parquet_file_is_named(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    torn = tmp_path / "torn.parquet"
    for content in (whole[:-9], whole[: len(whole) // 2], b"PAR1"):
        torn.write_bytes(content)
        with pytest.raises(TraceFormatError, match=r"torn\.parquet: expected a Parquet file"):
            convert(torn, tmp_path / "out.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "torn.parquet", "whole.parquet"]


@pytest.mark.parametrize(
    ("column", "broken"),
    [
        ("Request tokens", "10,20,30"),
        ("Model", "gpt"),
        ("Timestamp", "5.0"),
    ],
)
def test_a_file_that_does_not_say_what_was_written_is_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, column: str, broken: str
) -> None:
    """A disk that gives back other bytes than it took."""
    read_back = conversion._read_back

    def from_a_bad_disk(path: Path, format: str, clock: TraceClock) -> Iterator[pl.DataFrame]:
        swapped = {"10,20,30": "20,10,30", "gpt": "tpg", "5.0": "5.25"}[broken]
        path.write_text(path.read_text().replace(broken, swapped, 1))
        return read_back(path, format, clock)

    monkeypatch.setattr(conversion, "_read_back", from_a_bad_disk)
    target = tmp_path / "out.csv"
    with pytest.raises(TraceFormatError, match=f"out.csv: column '{column}': expected the values written, read back"):
        convert(source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv"]


def test_swapped_and_missing_rows_are_noticed() -> None:
    frame = pl.DataFrame({"a": [1, 2, None], "b": [["x"], None, []]})
    whole, cut, swapped, short = (conversion._Digest() for _ in range(4))
    whole.add(frame)
    for part in frame.iter_slices(1):
        cut.add(part)
    swapped.add(frame[[1, 0, 2]])
    short.add(frame[:2])
    assert (cut.sums, cut.rows) == (whole.sums, 3)
    assert swapped.sums["a"] != whole.sums["a"]
    assert swapped.sums["b"] != whole.sums["b"]
    with pytest.raises(TraceFormatError, match="expected 3 rows, of which 2 were read back"):
        conversion._check_equal(whole, short, Path("x"))


@pytest.mark.parametrize("to", ["parquet", "jsonl", "burstgpt", "mooncake", "azure", "workload_trace"])
def test_a_full_disk_is_one_line(tmp_path: Path, to: str) -> None:
    source = tmp_path / "in.csv"
    rows = "".join(
        f"{row},,0,m,{row % 900 + 1},{row % 70 + 1},{row % 900 + row % 70 + 2},API log\n" for row in range(40_000)
    )
    source.write_text(f"{HEADER}\n{rows}")
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "from proxy.cli import main; sys.argv[0] = 'burstgate'; main()"
    )
    target = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", program, "convert", str(source), str(target), "--to", to],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, f"burstgate: {target}: File too large\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv"]


def test_places_that_are_no_file(tmp_path: Path, source: Path) -> None:
    for target in (tmp_path, Path("/dev/null"), tmp_path / "no" / "folder.csv"):
        with pytest.raises(OSError) as caught:
            convert(source, target, target_format="burstgpt")
        assert caught.value.filename == str(target)
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "nothing.csv", tmp_path / "out.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv"]


def test_a_file_may_replace_itself(source: Path) -> None:
    convert(source, source, failures="drop", target_format="burstgpt6")
    assert source.read_text().startswith("Timestamp,Model")
    assert source.read_text().count("\n") == 4


# The command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_command(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out.parquet"
    done = run(source, target, "--relabel-model", "mine", "--failures", "drop", "--day-zero", "2026-11-21")
    assert done.exit_code == 0
    assert done.stderr == (
        f"{source}: 4 rows read (burstgpt) = 3 kept + 1 dropped, 1 failure\n"
        f"{target}: 3 rows written (parquet), read back and equal in every field\n"
    )
    assert {row.model for row in records(target)} == {"mine"}
    mapped = run(source, target, "--map", "timestamp=Timestamp,prompt_tokens=Request tokens")
    assert mapped.stderr.startswith(f"{source}: 4 rows read (mapped) = 4 kept + 0 dropped\n")


def test_command_refuses_what_it_does_not_know(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out.parquet"
    for arguments, message in (
        ([source, tmp_path / "out.xyz"], "--to: expected one of burstgpt, .* got 'out.xyz'"),
        ([source, target, "--from", "csv"], "--from: expected one of burstgpt, .* got 'csv'"),
        ([source, target, "--map", "a=b"], "--map: expected TARGET=COLUMN"),
        ([source, target, "--from", "azure", "--map", "timestamp=a,prompt_tokens=b"], "--from: expected no format be"),
        ([source, target, "--failures", "no"], "--failures: expected keep or drop"),
        ([source, target, "--timezone", "Mars"], "--timezone: expected an IANA time zone"),
    ):
        done = run(*arguments)
        assert done.exit_code != 0
        assert type(done.exception).__name__ == "ConfigError"
        assert re.match(message, str(done.exception)), done.exception
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv"]


# Published files


@needs_traces
@pytest.mark.parametrize("name", ["BurstGPT_1_head.csv", "BurstGPT_3_head.csv"])
def test_published_burstgpt_through_parquet(tmp_path: Path, name: str) -> None:
    middle, back = tmp_path / "m.parquet", tmp_path / "b.csv"
    convert(TRACES / name, middle)
    convert(middle, back, target_format="burstgpt6" if "_1_" in name else "burstgpt")
    assert back.read_bytes() == (TRACES / name).read_bytes()


@needs_traces
@pytest.mark.parametrize("name", ["AzureLLMInferenceTrace_code.csv", "mooncake_conversation_trace.jsonl"])
def test_published_traces_reach_parquet_whole(tmp_path: Path, name: str) -> None:
    done: Conversion = convert(TRACES / name, tmp_path / "m.parquet")
    assert (done.rows_read, done.rows_kept, done.block_tokens) == (
        (12_031, 12_031, 512) if "mooncake" in name else (8_819, 8_819, None)
    )


@pytest.mark.slow
def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    def peak_kib(rows: int) -> int:
        source = tmp_path / f"{rows}.csv"
        with source.open("w") as stream:
            stream.write(f"{HEADER}\n")
            stream.writelines(
                f"{row},s{row // 7},3,m,{row % 900 + 1},7,{row % 900 + 8},API log\n" for row in range(rows)
            )
        program = (
            "import re, sys; from pathlib import Path; from traces.convert import convert\n"
            "middle = Path(sys.argv[1] + '.parquet'); convert(Path(sys.argv[1]), middle)\n"
            "convert(middle, Path(sys.argv[1]))\n"
            "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(source)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert peak_kib(4_000_000) < 1.5 * peak_kib(1_000_000)
