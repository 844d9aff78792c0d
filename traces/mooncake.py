"""JSON lines of requests with prefix blocks, both ways: one object a line, in four shapes.

    mooncake     {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}
                 Mooncake's published traces (kvcache-ai/Mooncake, FAST'25): integer milliseconds from the trace's
                 start; a block is 512 tokens, the last of a prompt may be shorter; ids are chained, so that equal ids
                 at the start of two rows are one prefix. SGLang, AIPerf and GuideLLM read it.
    timed_trace  The same keys with `timestamp` in seconds from 0: `vllm bench serve --dataset-name timed_trace`
                 (vllm/benchmarks/datasets). Its prompt is made of the blocks alone, so they must cover it; it takes
                 16 tokens a block unless --timed-trace-chunk-hash-size says otherwise.
    bailian      {"chat_id": id, "parent_chat_id": id or -1, "timestamp": s, "input_length", "output_length", "type",
                 "turn", "hash_ids"}: Alibaba's Qwen traces (alibaba-edu/qwen-bailian-usagetraces-anon), 16 tokens a
                 block. The chain of parents is the session; a parent that the file lacks begins one.
    aiperf       {"session_id": id, "timestamp": ms, "input_length": n, "output_length": n}: Mooncake's rows as AIPerf
                 (`--custom-dataset-type mooncake_trace`) takes conversations. It puts the turns before, and their
                 answers, in front of each turn itself, so `input_length` holds a turn's new tokens only.

Reading ignores other keys, takes rows in any order, `50.0` for 50, and rows without blocks; blank lines are skipped. A
row is a request that succeeded: these formats know no failures. Reading `bailian` and `aiperf` holds some 100 bytes a
chat. Writing demands rows in the order of time and starts at 0 with the first.

Block ids never leave as they came: `Blocks` makes new ones from a salt, unique ones where no prefix is known. A session
alone never makes two rows share a block.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, cast

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.batch import complete_batch, empty_batch
from traces.burstgpt import TIMESTAMP_LIMIT_S, request_ids
from traces.codec import TimeOrder, TraceClock, WriteReport, json_rows, refused, split
from traces.record import LogType, Origin, Outcome, TokenSource

SHAPES: Final = ("mooncake", "aiperf", "bailian", "timed_trace")
MAX_LINE_BYTES: Final = 1 << 24
"""Longest line: a prompt of ten million tokens in blocks of 16 has about 6 MB of ids."""
WRITE_ROWS: Final = 2_048
"""Rows whose block ids are Python integers at one time while writing."""
DEFAULT_BLOCK_TOKENS: Final = {"mooncake": 512, "aiperf": 512, "bailian": 16, "timed_trace": 16, "workload_trace": 512}
ESTIMATED_BLOCK_TOKENS: Final = 64
"""Tokens of a block of unknown size. The gateway's own cover 256 bytes of text each, at some four bytes a token."""
PREFIX_NOTES: Final = ("prefix_unknown", "prefix_partly_known", "prefix_block_size_estimated")
"""The notes that make a file's prefix reuse a floor: the real traffic shared at least as much."""

_MILLIS: Final = ("mooncake", "aiperf")
_MAX_TOKENS: Final = 10**18


class _Row(msgspec.Struct, gc=False):
    input_length: int | float
    output_length: int | float
    timestamp: int | float | None = None
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    session_id: str | int | None = None
    chat_id: int | str | None = None
    parent_chat_id: int | str = -1


_decoder: Final = msgspec.json.Decoder(_Row)
_encoder: Final = msgspec.json.Encoder()


def read(path: Path, *, shape: str, clock: TraceClock, dataset: str) -> Iterator[pl.DataFrame]:
    """The file's rows as batches in the file's order, of about a chunk of the file each.

    shape: one of SHAPES. clock: what timestamp 0 is. dataset: becomes `run_id` and part of each `request_id`.
    Raises TraceFormatError at the first wrong line.
    """
    zero_us = round(clock.zero_s * 1e6)
    unit_us = 1_000 if shape in _MILLIS else 1_000_000
    sessions = _Sessions(shape)
    first_row = 0
    for rows, lines in json_rows(path, _decoder, MAX_LINE_BYTES):
        columns: dict[str, list[Any]] = {name: [] for name in ("micros", "request", "response", "session", "blocks")}
        for row, line in zip(cast(list[_Row], rows), lines, strict=True):
            columns["micros"].append(zero_us + _micros(row.timestamp, unit_us, path, line))
            request = _tokens(row.input_length, "input_length", path, line)
            response = _tokens(row.output_length, "output_length", path, line)
            session, before = sessions.of(row, request + response, path, line)
            columns["request"].append(before + request)
            columns["response"].append(response)
            columns["session"].append(session)
            columns["blocks"].append(_blocks(row.hash_ids, path, line))
        yield _to_batch(columns, dataset, first_row)
        first_row += len(rows)


def _micros(value: float | None, unit_us: int, path: Path, line: int) -> int:
    if value is None:
        # AIPerf's `delay` counts from the end of an answer, which no file of this kind has.
        raise refused(path, line, "timestamp", "a time in every row", value)
    if not 0 <= value * unit_us < TIMESTAMP_LIMIT_S * 1_000_000:
        raise refused(path, line, "timestamp", f"a time >= 0 and < {TIMESTAMP_LIMIT_S} s", value)
    return round(value * unit_us)


def _tokens(value: float, column: str, path: Path, line: int) -> int:
    if not 0 <= value < _MAX_TOKENS or value != int(value):
        raise refused(path, line, column, "an integer >= 0", value)
    return int(value)


def _blocks(ids: list[int] | None, path: Path, line: int) -> list[int] | None:
    if ids and max(ids) >= 1 << 64:
        raise refused(path, line, "hash_ids", "integers < 2^64", max(ids))
    return ids


class _Sessions:
    """Which conversation a row belongs to, and how many tokens AIPerf would put in front of it."""

    def __init__(self, shape: str) -> None:
        self._shape = shape
        self._roots: dict[int | str, str] = {}
        self._history: dict[int | str, int] = {}

    def of(self, row: _Row, new_tokens: int, path: Path, line: int) -> tuple[str | None, int]:
        if self._shape == "bailian":
            if row.chat_id is None:
                raise refused(path, line, "chat_id", "an id in every row", None)
            parent = row.parent_chat_id
            root = str(row.chat_id) if parent in (-1, "-1") else self._roots.get(parent, str(parent))
            self._roots[row.chat_id] = root
            return root, 0
        if self._shape == "aiperf" and row.session_id is not None:
            before = self._history.get(row.session_id, 0)
            self._history[row.session_id] = before + new_tokens
            return str(row.session_id), before
        return None, 0


def _to_batch(columns: dict[str, list[Any]], dataset: str, first_row: int) -> pl.DataFrame:
    micros = np.array(columns["micros"], dtype=np.int64)
    session = pl.Series(columns["session"], dtype=pl.String)
    return complete_batch(
        pl.DataFrame(
            [
                request_ids(micros, first_row, dataset),
                pl.Series("received_at", micros / 1e6),
                session.alias("session_id"),
                pl.Series("request_tokens", columns["request"], dtype=pl.Int64),
                pl.Series("response_tokens", columns["response"], dtype=pl.Int64),
                pl.Series("prefix_blocks", columns["blocks"], dtype=pl.List(pl.UInt64)),
            ]
        ).with_columns(
            log_type=pl.when(pl.col("session_id").is_null())
            .then(pl.lit(LogType.API.value))
            .otherwise(pl.lit(LogType.CONVERSATION.value)),
            token_source=pl.lit(TokenSource.USAGE.value),
            origin=pl.lit(Origin.IMPORTED.value),
            run_id=pl.lit(dataset),
        )
    )


def block_tokens(batch: pl.DataFrame | None, shape: str) -> int | None:
    """Tokens of a block, from rows whose blocks cover their prompts: the first of 512 and 16 (16 and 512 but for
    Mooncake's), then of the powers of two, of which every row's prompt has as many as it lists; None where none fits.
    """
    if batch is None:
        return None
    rows = batch.select("request_tokens", pl.col("prefix_blocks").list.len().alias("blocks")).filter(
        (pl.col("blocks") > 0) & (pl.col("request_tokens") > 0)
    )
    if rows.is_empty():
        return None
    tokens, blocks = rows["request_tokens"].to_numpy(), rows["blocks"].to_numpy()
    usual = DEFAULT_BLOCK_TOKENS[shape]
    for size in (usual, 528 - usual, *(1 << power for power in range(21))):
        if (-(-tokens // size) == blocks).all():
            return size
    return None


class Blocks:
    """The block ids of a file that is being written.

    A known block's id is a keyed hash (BLAKE2b) of the id it had, so that equal ids stay equal within the file and two
    files share none; a block about which nothing is known gets an id of its own. Ids are below 2^63: some tools hold
    them in signed integers. Two of a hundred million differ by chance with a probability over 99.9 %.
    """

    def __init__(self, format: str, block_tokens: int | None, salt: bytes) -> None:
        """block_tokens: of the rows' own blocks; where None, their size is estimated and only whole ones are used."""
        self._format = format
        self._is_exact = block_tokens is not None
        self._tokens = block_tokens
        self._key = hashlib.blake2b(salt, digest_size=32).digest()
        self._seed = np.uint64(int.from_bytes(hashlib.blake2b(salt, digest_size=8, person=b"filler").digest()))
        self._made = 0

    @property
    def tokens(self) -> int:
        """Tokens of a block in the file; the last of a prompt may be shorter."""
        return self._tokens or DEFAULT_BLOCK_TOKENS[self._format]

    def cover(self, rows: pl.DataFrame) -> tuple[list[list[int]], Counter[str]]:
        """For each row the ids that cover its prompt, and how many rows have which of PREFIX_NOTES."""
        listed = rows["prefix_blocks"].to_list()
        if self._tokens is None and rows.height:
            # One size for the file: what the first rows have decides.
            has_blocks = any(blocks is not None for blocks in listed)
            self._tokens = ESTIMATED_BLOCK_TOKENS if has_blocks else self.tokens
        size = self.tokens
        is_usable = self._is_exact or size == ESTIMATED_BLOCK_TOKENS
        needed = [-(-tokens // size) for tokens in rows["request_tokens"]]
        known: list[Sequence[int]] = []
        notes: Counter[str] = Counter()
        for blocks, tokens, need in zip(listed, rows["request_tokens"], needed, strict=True):
            usable = need if self._is_exact else tokens // size
            known.append(blocks[:usable] if blocks is not None and is_usable else ())
            if blocks is None or not is_usable:
                notes["prefix_unknown"] += 1
            elif not self._is_exact:
                notes["prefix_block_size_estimated"] += 1
            elif len(blocks) < need:
                notes["prefix_partly_known"] += 1
        renamed = {block: self._renamed(block) for block in set().union(*known)}
        made = iter(self._fresh(sum(needed) - sum(map(len, known))))
        covered = [
            [renamed[block] for block in blocks] + [next(made) for _ in range(need - len(blocks))]
            for blocks, need in zip(known, needed, strict=True)
        ]
        return covered, notes

    def _renamed(self, block: int) -> int:
        digest = hashlib.blake2b(block.to_bytes(8, "little"), key=self._key, digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def _fresh(self, count: int) -> list[int]:
        ids = mixed(self._seed + np.arange(self._made, self._made + count, dtype=np.uint64))
        self._made += count
        return cast(list[int], (ids >> np.uint64(1)).tolist())


def mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea, Flood 2014) after its increment: one to one, and looks random."""
    words = words * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Writer:
    """A `TraceWriter` of one of SHAPES.

    Rows dropped, by the first reason that fits: `failure`, where asked; `no_request_tokens` and `no_response_tokens`
    (0 or unknown: AIPerf ends a run at such a row).
    Notes: PREFIX_NOTES; `stamps_floored` to milliseconds; `session_not_said`; `session_of_one_request`, a row without a
    session as a chat of its own; `failure_as_request`; and for AIPerf `history_cut`, a turn that is shorter than what
    AIPerf puts in front of it, written with one new token, and `prefix_not_said`.
    Raises UnsortedTrace for a row that is earlier than one before it.
    """

    def __init__(self, stream: BinaryIO, *, shape: str, blocks: Blocks, clock: TraceClock, drop_failures: bool) -> None:
        self._stream = stream
        self._shape = shape
        self._blocks = blocks
        self._zero_us = round(clock.zero_s * 1e6)
        self._order = TimeOrder(shape)
        self._drop_failures = drop_failures
        self._first_us: int | None = None
        self._rows_in = 0
        self._rows_written = 0
        self._dropped: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self._history: dict[str, int] = {}
        self._chats: dict[str, tuple[int, int, int]] = {}
        self._next_chat = 0
        self.said = empty_batch()
        """The rows that the last `write` wrote, as a reader of the file finds them."""

    @property
    def block_tokens(self) -> int | None:
        """Tokens of a block in the file; None for AIPerf's, which has none."""
        return None if self._shape == "aiperf" else self._blocks.tokens

    def write(self, batch: pl.DataFrame) -> None:
        """Append the batch's rows, less those that the format cannot say."""
        self._order.check(batch["received_at"])
        kept, dropped = split(batch, unsayable(self._drop_failures))
        self._rows_in += batch.height
        self._dropped.update(dropped)
        self.said = pl.concat([empty_batch(), *map(self._write, kept.iter_slices(WRITE_ROWS))])

    def close(self) -> WriteReport:
        """Flush, and say what was done."""
        self._stream.flush()
        return WriteReport(self._rows_in, self._rows_written, dict(self._dropped), dict(self._notes))

    def _write(self, rows: pl.DataFrame) -> pl.DataFrame:
        micros = rows.select((pl.col("received_at") * 1e6).round().cast(pl.Int64)).to_series().to_list()
        if self._first_us is None:
            self._first_us = micros[0]
        offsets_us = [each - self._first_us for each in micros]
        stamps: list[float] = [each / 1e6 for each in offsets_us]
        if self._shape in _MILLIS:
            self._notes += Counter({"stamps_floored": sum(each % 1_000 != 0 for each in offsets_us)})
            stamps = [each // 1_000 for each in offsets_us]
            offsets_us = [each // 1_000 * 1_000 for each in offsets_us]
        self._notes += Counter({"failure_as_request": rows.filter(pl.col("outcome") != Outcome.OK.value).height})
        inputs, sessions = rows["request_tokens"].to_list(), rows["session_id"].to_list()
        blocks: list[list[int]] | None = None
        if self._shape != "aiperf":
            blocks, notes = self._blocks.cover(rows)
            self._notes += notes
        outputs = rows["response_tokens"].to_list()
        lines: list[dict[str, Any]] = []
        said: list[tuple[int, str | None]] = []
        for index, (stamp, tokens, output, session) in enumerate(zip(stamps, inputs, outputs, sessions, strict=True)):
            line: dict[str, Any] = {"timestamp": stamp, "input_length": tokens, "output_length": output}
            match self._shape:
                case "aiperf":
                    before = self._before(session, tokens, output)
                    line["input_length"] = tokens - before if tokens > before else 1
                    said.append((before + line["input_length"], session))
                    if session is not None:
                        line = {"session_id": session} | line
                    if rows["prefix_blocks"][index] is not None:
                        self._notes["prefix_not_said"] += 1
                case "bailian":
                    chat, parent, root, turn = self._chat(session)
                    line = {"chat_id": chat, "parent_chat_id": parent} | line | {"type": "text", "turn": turn}
                    said.append((tokens, str(root)))
                case _:
                    self._notes["session_not_said"] += session is not None
                    said.append((tokens, None))
            if blocks is not None:
                line["hash_ids"] = blocks[index]
            lines.append(line)
        self._stream.write(_encoder.encode_lines(lines))
        self._rows_written += rows.height
        self._notes = +self._notes
        return rows.with_columns(
            pl.Series("received_at", (np.array(offsets_us, dtype=np.int64) + self._zero_us) / 1e6),
            pl.Series("request_tokens", [tokens for tokens, _ in said], dtype=pl.Int64),
            pl.Series("session_id", [session for _, session in said], dtype=pl.String),
            pl.Series("prefix_blocks", blocks or [None] * rows.height, dtype=pl.List(pl.UInt64)),
        )

    def _before(self, session: str | None, tokens: int, output: int) -> int:
        """The tokens that AIPerf puts in front of this turn."""
        if session is None:
            return 0
        before = self._history.get(session, 0)
        if tokens <= before:
            self._notes["history_cut"] += 1
        self._history[session] = max(tokens, before + 1) + output
        return before

    def _chat(self, session: str | None) -> tuple[int, int, int, int]:
        """Ids of a row's chat, of its parent and of its session's first chat, and its turn."""
        chat = self._next_chat
        self._next_chat += 1
        if session is None:
            self._notes["session_of_one_request"] += 1
            return chat, -1, chat, 1
        parent, root, turn = self._chats.get(session, (-1, chat, 0))
        self._chats[session] = (chat, root, turn + 1)
        return chat, parent, root, turn + 1


def unsayable(drop_failures: bool) -> dict[str, pl.Expr]:
    """Why a row can not be a request of a known size."""
    return {
        "failure": (pl.col("outcome") != Outcome.OK.value) & drop_failures,
        "no_request_tokens": pl.col("request_tokens").fill_null(0) == 0,
        "no_response_tokens": pl.col("response_tokens").fill_null(0) == 0,
    }
