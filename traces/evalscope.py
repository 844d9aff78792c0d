"""EvalScope's workload traces (`evalscope perf --dataset workload_trace`, modelscope/evalscope), both ways.

    {"body": {...}, "timestamp": s, "request_id": text or absent, "completion_tokens": n or absent, "headers": ...}

One JSON object a line: the whole body of a request, which EvalScope sends as it is; its time, a number of seconds of
which only the differences count, or text as in ISO 8601; how many tokens the answer had, more than 0. No other key may
be there, and the rows must be in the order of time.

Reading takes a body as an object or as a text that holds one, and keeps no text of it: the model, whether it streams,
`max_tokens`, and the prompt's tokens where the prompt is a list of them; of a prompt in words the number of tokens is
unknown. Headers are not read.

Writing makes bodies for `/v1/completions` whose prompt is a list of token ids, so that its length is exact in any
tokenizer with 10,000 entries, without a text: the ids of a block are drawn from the block's id (traces/mooncake.py),
equal blocks equal tokens, and nothing else shared. `max_tokens`, `min_tokens` and `ignore_eos` force the length of the
answer. A body needs a model: rows without one are dropped, or named by --relabel-model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import msgspec
import numpy as np
import polars as pl

from traces.batch import complete_batch, empty_batch
from traces.burstgpt import TIMESTAMP_LIMIT_S, request_ids
from traces.codec import TimeOrder, TraceClock, WriteReport, json_rows, refused, split
from traces.mapped import date_micros
from traces.mooncake import Blocks, mixed, unsayable
from traces.record import Origin, Outcome, TokenSource

MAX_LINE_BYTES: Final = 1 << 24
"""Longest line: a prompt of two million token ids."""
FIRST_TOKEN: Final = 1_000
"""Token ids that are drawn: past the special ones at the start of common vocabularies, below the end of all."""
TOKENS: Final = 9_000
WRITE_ROWS: Final = 256
"""Rows whose block ids are Python integers at one time while writing."""

_encoder: Final = msgspec.json.Encoder()


class _Body(msgspec.Struct, gc=False):
    model: str | None = None
    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool | None = None


class _Row(msgspec.Struct, gc=False):
    body: _Body | str
    timestamp: int | float | str
    request_id: str | None = None
    completion_tokens: int | None = None


_decoder: Final = msgspec.json.Decoder(_Row)
_body_decoder: Final = msgspec.json.Decoder(_Body)
_ids_decoder: Final = msgspec.json.Decoder(list[int])


def read(path: Path, *, clock: TraceClock, dataset: str) -> Iterator[pl.DataFrame]:
    """The file's rows as batches in the file's order, of about a chunk of the file each.

    clock: what timestamp 0 is, and the zone of a date without one. dataset: `run_id`, and part of each `request_id`.
    Raises TraceFormatError at the first wrong line.
    """
    zero_us = round(clock.zero_s * 1e6)
    first_row = 0
    for rows, lines in json_rows(path, _decoder, MAX_LINE_BYTES):
        columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        micros: list[int] = []
        for row, line in zip(cast(list[_Row], rows), lines, strict=True):
            micros.append(_micros(row.timestamp, zero_us, clock.timezone, path, line))
            for name, value in zip(_COLUMNS, _fields(row, path, line), strict=True):
                columns[name].append(value)
        stamps = np.array(micros, dtype=np.int64)
        yield complete_batch(
            pl.DataFrame(
                [
                    request_ids(stamps, first_row, dataset),
                    pl.Series("received_at", stamps / 1e6),
                    *(pl.Series(name, columns[name], dtype=dtype) for name, dtype in _COLUMNS.items()),
                ]
            ).with_columns(origin=pl.lit(Origin.IMPORTED.value), run_id=pl.lit(dataset))
        )
        first_row += len(rows)


_COLUMNS: Final[dict[str, pl.DataType]] = {
    "model": pl.String(),
    "request_tokens": pl.Int64(),
    "response_tokens": pl.Int64(),
    "client_request_id": pl.String(),
    "endpoint": pl.String(),
    "stream": pl.Boolean(),
    "max_tokens": pl.Int64(),
    "token_source": pl.String(),
}


def _fields(row: _Row, path: Path, line: int) -> tuple[Any, ...]:
    """The values of _COLUMNS."""
    body = row.body
    if isinstance(body, str):
        try:
            body = _body_decoder.decode(body)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise refused(path, line, "body", "a JSON object", body) from error
    limit = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    for name, value in (("completion_tokens", row.completion_tokens), ("max_tokens", limit)):
        if value is not None and not 0 < value < 1 << 63:
            raise refused(path, line, name, "an integer > 0", value)
    raw = bytes(body.prompt)
    try:
        prompt = len(_ids_decoder.decode(raw)) if raw.startswith(b"[") else None
    except msgspec.DecodeError:  # a list of texts
        prompt = None
    return (
        body.model,
        prompt,
        row.completion_tokens,
        row.request_id,
        "/v1/chat/completions" if bytes(body.messages) else "/v1/completions",
        bool(body.stream),
        limit,
        (TokenSource.NONE if row.completion_tokens is None else TokenSource.USAGE).value,
    )


def _micros(value: float | str, zero_us: int, timezone: str, path: Path, line: int) -> int:
    if isinstance(value, str):
        micros = date_micros(pl.Series([value.strip()]), timezone)[0]
        try:
            value = float(value) if micros is None else value
        except ValueError:
            raise refused(path, line, "timestamp", "a number of seconds or a date and time", value) from None
        if not isinstance(value, float):
            return int(micros)
    if not 0 <= value < TIMESTAMP_LIMIT_S:
        raise refused(path, line, "timestamp", f"seconds >= 0 and < {TIMESTAMP_LIMIT_S}", value)
    return zero_us + round(value * 1e6)


class Writer:
    """A `TraceWriter` of EvalScope's workload traces.

    Rows dropped: as `traces.mooncake.Writer`, then `no_model`. Notes: those of traces.mooncake.PREFIX_NOTES,
    `failure_as_request` and `session_not_said`.
    Raises UnsortedTrace for a row that is earlier than one before it.
    """

    def __init__(self, stream: BinaryIO, *, blocks: Blocks, clock: TraceClock, drop_failures: bool) -> None:
        self._stream = stream
        self._blocks = blocks
        self._zero_us = round(clock.zero_s * 1e6)
        self._order = TimeOrder("workload_trace")
        self._reasons = unsayable(drop_failures) | {"no_model": pl.col("model").fill_null("") == ""}
        self._first_us: int | None = None
        self._rows_in = 0
        self._rows_written = 0
        self._dropped: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self.said = empty_batch()
        """The rows that the last `write` wrote, as a reader of the file finds them."""

    @property
    def block_tokens(self) -> int:
        """Tokens of a block of the prompts."""
        return self._blocks.tokens

    def write(self, batch: pl.DataFrame) -> None:
        """Append the batch's rows, less those that the format cannot say."""
        self._order.check(batch["received_at"])
        kept, dropped = split(batch, self._reasons)
        self._rows_in += batch.height
        self._dropped.update(dropped)
        self._notes.update(
            failure_as_request=kept.filter(pl.col("outcome") != Outcome.OK.value).height,
            session_not_said=kept["session_id"].count(),
        )
        self.said = pl.concat([empty_batch(), *map(self._write, kept.iter_slices(WRITE_ROWS))])

    def close(self) -> WriteReport:
        """Flush, and say what was done."""
        self._stream.flush()
        return WriteReport(self._rows_in, self._rows_written, dict(self._dropped), dict(+self._notes))

    def _write(self, rows: pl.DataFrame) -> pl.DataFrame:
        micros = [round(second * 1e6) for second in rows["received_at"]]
        if self._first_us is None:
            self._first_us = micros[0]
        offsets_us = np.array(micros, dtype=np.int64) - self._first_us
        covered, notes = self._blocks.cover(rows)
        self._notes += notes
        names = ("model", "request_tokens", "response_tokens", "stream", "origin", "client_request_id")
        for offset_us, ids, fields in zip(offsets_us.tolist(), covered, rows.select(names).iter_rows(), strict=True):
            model, request, response, stream, origin, client_request_id = fields
            line: dict[str, Any] = {
                "timestamp": offset_us / 1e6,
                "body": {
                    "model": model,
                    "prompt": self._prompt(ids, request),
                    "max_tokens": response,
                    "min_tokens": response,
                    "ignore_eos": True,
                    # Imported rows do not say whether they streamed; the first token's time is what is to be measured.
                    "stream": stream or origin == Origin.IMPORTED.value,
                },
                "completion_tokens": response,
            }
            if client_request_id is not None:
                line["request_id"] = client_request_id
            self._stream.write(_encoder.encode(line) + b"\n")
        self._rows_written += rows.height
        return rows.with_columns(pl.Series("received_at", (offsets_us + self._zero_us) / 1e6))

    def _prompt(self, ids: list[int], tokens: int) -> list[int]:
        offsets = np.arange(self._blocks.tokens, dtype=np.uint64)
        words = mixed(mixed(np.array(ids, dtype=np.uint64))[:, None] + offsets[None, :])
        drawn = FIRST_TOKEN + words.reshape(-1)[:tokens] % np.uint64(TOKENS)
        return cast(list[int], drawn.tolist())
