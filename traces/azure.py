"""Azure's LLM inference traces (Azure/AzurePublicDataset), both ways.

    TIMESTAMP        date and time: `2023-11-16 18:17:03.9799600` in the traces of 2023, UTC without saying so;
                     `2024-05-10 00:00:00.009930+00:00` in those of 2024, where a whole second has no fraction
    NumImages        integer >= 0                                                   (multimodal, 2025, only)
    ContextTokens    integer >= 0
    GeneratedTokens  integer >= 0

Reading is that of any CSV (traces/mapped.py): columns by name, LF or CRLF; a stamp without a zone is in the clock's,
UTC unless told otherwise; of the seven decimals six are kept. A record has no place for images: their number is not
read, and written as 0. Writing takes the form of 2024, always with six decimals: that is what strptime's `%f` and
`fromisoformat` both read, and some readers drop a row stamped on a whole second. Models, sessions and failures can not
be said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import polars as pl

from traces import mapped
from traces.batch import empty_batch
from traces.codec import AZURE_COLUMNS, TraceClock, WriteReport, split
from traces.record import Outcome

_COLUMNS: Final = dict(zip(("timestamp", "prompt_tokens", "output_tokens"), AZURE_COLUMNS, strict=True))


def read(path: Path, *, clock: TraceClock, dataset: str) -> Iterator[pl.DataFrame]:
    """The file's rows as batches in the file's order.

    clock: its time zone is that of stamps without one. dataset: becomes `run_id` and part of each `request_id`.
    Raises TraceFormatError at the first wrong line.
    """
    return mapped.read(path, columns=_COLUMNS, clock=clock, dataset=dataset, may_be_empty=False)


class Writer:
    """A `TraceWriter` of Azure's CSV. The header is written at once.

    Rows dropped, by the first reason that fits: `failure`, where asked; `request_tokens_unknown` and
    `response_tokens_unknown`. Notes: `failure_as_request`, `images_unknown` (written as 0), `session_not_said`.
    """

    def __init__(self, stream: BinaryIO, *, has_images: bool, drop_failures: bool) -> None:
        self._stream = stream
        self._has_images = has_images
        self._reasons = {
            "failure": (pl.col("outcome") != Outcome.OK.value) & drop_failures,
            "request_tokens_unknown": pl.col("request_tokens").is_null(),
            "response_tokens_unknown": pl.col("response_tokens").is_null(),
        }
        self._rows_in = 0
        self._rows_written = 0
        self._dropped: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self.said = empty_batch()
        """The rows that the last `write` wrote, as a reader of the file finds them."""
        names = [AZURE_COLUMNS[0], *(["NumImages"] if has_images else []), *AZURE_COLUMNS[1:]]
        stream.write((",".join(names) + "\n").encode())

    def write(self, batch: pl.DataFrame) -> None:
        """Append the batch's rows, less those that the format cannot say."""
        kept, dropped = split(batch, self._reasons)
        self._rows_in += batch.height
        self._rows_written += kept.height
        self._dropped.update(dropped)
        self._notes.update(
            failure_as_request=kept.filter(pl.col("outcome") != Outcome.OK.value).height,
            images_unknown=kept.height if self._has_images else 0,
            session_not_said=kept["session_id"].count(),
        )
        stamp = pl.from_epoch((pl.col("received_at") * 1e6).round().cast(pl.Int64), time_unit="us")
        text = kept.select(
            stamp.dt.strftime("%Y-%m-%d %H:%M:%S%.6f+00:00").alias("stamp"),
            *([pl.lit(0).alias("images")] if self._has_images else []),
            "request_tokens",
            "response_tokens",
        ).write_csv(include_header=False)
        self._stream.write(text.encode())
        self.said = kept.with_columns(session_id=pl.lit(None, dtype=pl.String))

    def close(self) -> WriteReport:
        """Flush, and say what was done."""
        self._stream.flush()
        return WriteReport(self._rows_in, self._rows_written, dict(self._dropped), dict(+self._notes))
