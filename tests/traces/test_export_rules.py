"""What keeps other tools from breaking, of every file that is written: integers, order, unique ids, covered prompts."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.traces.test_generation import PROFILE
from traces.codec import FORMATS, open_writer, read_trace
from traces.generation import generate

ROWS = pl.concat(list(generate(PROFILE, seed=5, rows=400))).with_columns(
    prefix_blocks=pl.when(pl.int_range(pl.len()) % 3 == 0).then(
        pl.concat_list(pl.lit(7, pl.UInt64), pl.lit(8, pl.UInt64))
    )
)
"""Conversations and API calls, failures among them, a third of the rows with known blocks."""
JSON = ("mooncake", "aiperf", "bailian", "timed_trace", "workload_trace")


def written(tmp_path: Path, format: str, failures: Any = "drop") -> Path:
    path = tmp_path / "trace"
    with path.open("wb") as stream:
        writer = open_writer(stream, format=format, failures=failures, block_tokens=512)
        for batch in ROWS.iter_slices(90):
            writer.write(batch)
        writer.close()
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_in_order_with_ids_of_their_own(tmp_path: Path, format: str) -> None:
    rows = pl.concat(list(read_trace(written(tmp_path, format), format=format)))
    assert rows["received_at"].is_sorted()
    assert rows["request_id"].is_unique().all()
    assert rows.height == ROWS.filter(pl.col("outcome") == "ok").height


@pytest.mark.parametrize("format", FORMATS)
def test_failures_are_dropped_as_asked(tmp_path: Path, format: str) -> None:
    rows = pl.concat(list(read_trace(written(tmp_path, format), format=format)))
    assert set(rows["outcome"]) == {"ok"}
    kept = pl.concat(list(read_trace(written(tmp_path, format, "keep"), format=format)))
    # A format that knows no failures cannot say a row without a length.
    says_failures = format in ("burstgpt", "burstgpt6", "parquet", "jsonl")
    assert kept.height == (ROWS.height if says_failures else rows.height)


@pytest.mark.parametrize("format", ["burstgpt", "burstgpt6", "azure", "azure_multimodal"])
def test_counts_in_csv_are_integers(tmp_path: Path, format: str) -> None:
    with written(tmp_path, format).open(newline="") as stream:
        for row in csv.DictReader(stream):
            for name in row.keys() & {"Request tokens", "Response tokens", "Total tokens", "Elapsed time", "NumImages",
                                      "ContextTokens", "GeneratedTokens"}:  # fmt: skip
                assert row[name].isdigit(), (name, row[name])


@pytest.mark.parametrize("format", JSON)
def test_counts_in_json_are_integers_above_zero(tmp_path: Path, format: str) -> None:
    for line in lines_of(written(tmp_path, format)):
        names = ("completion_tokens",) if format == "workload_trace" else ("input_length", "output_length")
        counts = [line[name] for name in names]
        if format == "workload_trace":
            counts += [line["body"][name] for name in ("max_tokens", "min_tokens")]
        assert all(type(count) is int and count > 0 for count in counts)


@pytest.mark.parametrize("format", JSON)
def test_timestamps_begin_at_zero_in_the_formats_unit(tmp_path: Path, format: str) -> None:
    stamps = [line["timestamp"] for line in lines_of(written(tmp_path, format))]
    assert stamps[0] == 0
    assert stamps == sorted(stamps)
    times_s = ROWS.filter(pl.col("outcome") == "ok")["received_at"].to_list()
    if format in ("mooncake", "aiperf"):
        assert all(type(stamp) is int for stamp in stamps)
        assert stamps == [pytest.approx((time_s - times_s[0]) * 1e3, abs=1) for time_s in times_s]
    else:
        assert stamps == [pytest.approx(time_s - times_s[0], abs=1e-6) for time_s in times_s]


@pytest.mark.parametrize("format", ["mooncake", "bailian", "timed_trace"])
def test_blocks_cover_the_prompt_and_are_shared_only_where_the_trace_shares(tmp_path: Path, format: str) -> None:
    lines = lines_of(written(tmp_path, format))
    for line in lines:
        assert len(line["hash_ids"]) == math.ceil(line["input_length"] / 512)
        assert all(type(block) is int and 0 <= block < 1 << 63 for block in line["hash_ids"])
    known = ROWS.filter(pl.col("outcome") == "ok")["prefix_blocks"].is_not_null().to_list()
    seen: dict[int, int] = defaultdict(int)
    for line, is_known in zip(lines, known, strict=True):
        for block in line["hash_ids"][2 if is_known else 0 :]:
            seen[block] += 1
    assert set(seen.values()) <= {1}  # a session alone shares nothing
    firsts = {line["hash_ids"][0] for line, is_known in zip(lines, known, strict=True) if is_known}
    assert len(firsts) == 1
    assert not firsts & seen.keys()
    assert 7 not in firsts  # block ids never leave as they came


def test_aiperfs_turns_are_new_tokens_only(tmp_path: Path) -> None:
    """What AIPerf puts in front of a turn, the turns and answers before it, and the turn make the prompt recorded."""
    lines = lines_of(written(tmp_path, "aiperf"))
    history: dict[str, int] = defaultdict(int)
    prompts = ROWS.filter(pl.col("outcome") == "ok")["request_tokens"].to_list()
    exact = 0
    for line, prompt in zip(lines, prompts, strict=True):
        before = history[line["session_id"]] if "session_id" in line else 0
        assert line["input_length"] == max(1, prompt - before)
        exact += before + line["input_length"] == prompt
        if "session_id" in line:
            history[line["session_id"]] = before + line["input_length"] + line["output_length"]
    assert exact > 300


def test_alibabas_chats_have_ids_of_their_own_and_parents_before_them(tmp_path: Path) -> None:
    chats: set[int] = set()
    for line in lines_of(written(tmp_path, "bailian")):
        assert line["chat_id"] not in chats
        assert line["parent_chat_id"] == -1 or line["parent_chat_id"] in chats
        chats.add(line["chat_id"])


def test_evalscopes_prompts_have_the_recorded_length(tmp_path: Path) -> None:
    lines = lines_of(written(tmp_path, "workload_trace"))
    prompts = ROWS.filter(pl.col("outcome") == "ok")["request_tokens"].to_list()
    assert [len(line["body"]["prompt"]) for line in lines] == prompts
    assert all(type(token) is int for token in lines[0]["body"]["prompt"])
    assert {line["body"]["ignore_eos"] for line in lines} == {True}
    ids = [line["request_id"] for line in lines if "request_id" in line]
    assert len(set(ids)) == len(ids)
