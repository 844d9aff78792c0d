"""What one replayed request was and did: one row of the samples file, which is JSON lines or Parquet by its suffix.

Seconds since schedule zero in `due_s`, `sent_s`, `first_s` and `last_s`; latencies from `wire.latency`, so that they
mean what the gateway's mean. Unknown is None. `error` says what went wrong in our words and the upstream's error type,
never a body's text.

    planned ──held_back, session_wait──wake_lag──► began ──connection──► sent ──► first ──► last
    (due_s)                                                            (sent_s)

A Parquet file is made when the run is over: while it lasts its samples are JSON lines in `.NAME.PID.jsonl` beside it,
so that the sending loop does no more than append, and a run that was killed leaves them. It gets its name when it is
whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from replay.client import TARGETS, ReplayError, Reply
from replay.schedule import Planned
from traces.record import LogType, Origin, Outcome, TokenSource, TraceRecord
from wire.latency import e2e_s, tpot_s, ttft_s

FLUSH_BYTES = 64 * 1024
ROW_GROUP_ROWS = 65_536
MAX_LINE_BYTES = 1024 * 1024
"""No sample is near this; what is longer is no line of one."""
PARQUET_SUFFIXES = (".parquet", ".pq")
_PARQUET_MAGIC = b"PAR1"


class Sample(msgspec.Struct, frozen=True, gc=False):
    """One request that was due and was tried."""

    index: int
    due_s: float
    sent_s: float | None
    """None when no connection could be made."""
    dispatch_lag_s: float | None
    """Real send minus planned send, connection set-up included; but see `session_wait_s`."""
    wake_lag_s: float
    """How late the replay itself began with the request: not what was held back, not waiting for the turn before."""
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    """Real send to the last byte, or to the failure."""
    e2e_from_due_s: float | None
    """Planned send to the last byte: what a user who came on time saw."""
    request_tokens_asked: int
    request_tokens_got: int | None
    """By the upstream's usage."""
    response_tokens_asked: int
    response_tokens_got: int | None
    status: int | None
    outcome: Outcome
    error: str | None = None
    is_warmup: bool = False
    """In no figure of the summary."""
    first_s: float | None = None
    """First content."""
    last_s: float | None = None
    """Last byte, or the failure; None when nothing was sent."""
    ttft_from_due_s: float | None = None
    itl_max_s: float | None = None
    """Longest gap between two content chunks."""
    failure_class: str | None = None
    """One of `replay.client.FailureClass`; None for `ok`."""
    held_back_s: float = 0.0
    """The part of the lag for which `max_in_flight` held it back."""
    session_id: str | None = None
    session_wait_s: float | None = None
    """With sessions whose turns wait: how much later than `due_s` its moment was, because of the turn before; below 0
    where that one ended sooner than recorded. Lag and latencies from the planned send count from that moment."""
    sender: str | None = None
    """The process that sent it, as `SenderFacts.name`."""

    @property
    def began_s(self) -> float:
        """When the replay turned to it, since schedule zero."""
        return self.due_s + self.held_back_s + (self.session_wait_s or 0.0) + self.wake_lag_s

    @property
    def end_s(self) -> float:
        """When it ended, since schedule zero; where nothing was sent, when the replay turned to it."""
        return self.began_s if self.sent_s is None or self.e2e_s is None else self.sent_s + self.e2e_s


_CLASSES = {
    Outcome.CONNECT_ERROR: "connect",
    Outcome.UPSTREAM_TIMEOUT: "timeout",
    Outcome.REJECTED: "http_429",
    Outcome.INVALID_REQUEST: "http_4xx",
    Outcome.TRUNCATED: "mid_stream",
    Outcome.CLIENT_GONE: "cancelled",
}


def failure_class(sample: Sample) -> str:
    """What a failed request failed with: the class it was given, else the one that outcome and status tell.

    `connect`, `timeout` (or a kind of it), `http_4xx`, `http_429`, `http_5xx`, `mid_stream`, `bad_answer`, `cancelled`.
    """
    if sample.failure_class is not None:
        return sample.failure_class
    is_5xx = sample.status is not None and sample.status >= 500
    return _CLASSES.get(sample.outcome, "http_5xx" if is_5xx else "bad_answer")


def measure(
    row: Planned,
    reply: Reply,
    start_ns: int,
    *,
    ready_ns: int | None = None,
    held_back_ns: int = 0,
    sender: str | None = None,
) -> Sample:
    """The sample of a sendable row.

    start_ns: schedule zero; ready_ns: when the row was to go, where that is not simply its due time.
    """
    planned_ns = start_ns + round(row.due_s * 1e9)
    due_ns = planned_ns if ready_ns is None else ready_ns
    sent_ns, first_ns = reply.sent_ns, reply.first_chunk_ns
    usage = reply.usage
    response_tokens = usage.response_tokens if usage is not None else None
    is_sent = sent_ns is not None
    return Sample(
        index=row.index,
        due_s=row.due_s,
        sent_s=None if sent_ns is None else (sent_ns - start_ns) / 1e9,
        dispatch_lag_s=None if sent_ns is None else (sent_ns - due_ns) / 1e9,
        wake_lag_s=(reply.began_ns - due_ns - held_back_ns) / 1e9,
        ttft_s=None if sent_ns is None else ttft_s(sent_ns, first_ns),
        tpot_s=tpot_s(first_ns, reply.last_chunk_ns, response_tokens),
        e2e_s=None if sent_ns is None else e2e_s(sent_ns, reply.end_ns),
        e2e_from_due_s=e2e_s(due_ns, reply.end_ns) if is_sent else None,
        request_tokens_asked=row.request_tokens or 0,
        request_tokens_got=usage.request_tokens if usage is not None else None,
        response_tokens_asked=row.response_tokens or 0,
        response_tokens_got=response_tokens,
        status=reply.status,
        outcome=reply.outcome,
        error=reply.error,
        is_warmup=row.is_warmup,
        failure_class=reply.failure_class,
        first_s=None if first_ns is None else (first_ns - start_ns) / 1e9,
        last_s=(reply.end_ns - start_ns) / 1e9 if is_sent else None,
        ttft_from_due_s=ttft_s(due_ns, first_ns) if is_sent else None,
        itl_max_s=max(reply.gaps_ns) / 1e9 if reply.gaps_ns else None,
        held_back_s=held_back_ns / 1e9,
        session_id=row.session_id,
        session_wait_s=None if ready_ns is None else (ready_ns - planned_ns) / 1e9,
        sender=sender,
    )


def record_of(
    sample: Sample, *, run_id: str, started_at: float, model: str, endpoint: str, stream: bool
) -> TraceRecord:
    """The request as the record that a gateway would have made of it. started_at: schedule zero, epoch seconds.

    Its id comes from run and place, so that storing a run again stores no row twice.
    """
    received_at = round(started_at + (sample.began_s if sample.sent_s is None else sample.sent_s), 6)
    session_id = sample.session_id
    is_counted = sample.request_tokens_got is not None
    return TraceRecord(
        request_id=_request_id(received_at, f"{run_id}-{sample.index}"),
        received_at=received_at,
        session_id=session_id,
        elapsed_s=sample.e2e_s,
        model=model,
        request_tokens=sample.request_tokens_got,
        response_tokens=sample.response_tokens_got,
        log_type=LogType.API if session_id is None else LogType.CONVERSATION,
        outcome=sample.outcome,
        client_request_id=f"{run_id}-{sample.index}",
        status=sample.status,
        error_type=None if sample.outcome is Outcome.OK else failure_class(sample),
        ttft_s=sample.ttft_s,
        tpot_s=sample.tpot_s,
        endpoint=TARGETS[endpoint].decode() if endpoint in ("chat", "completions") else endpoint,  # type: ignore[index]
        stream=stream,
        attempts=1,
        max_tokens=sample.response_tokens_asked,
        token_source=TokenSource.USAGE if is_counted else TokenSource.NONE,
        origin=Origin.REPLAY,
        run_id=run_id,
    )


def _request_id(wall_s: float, name: str) -> str:
    """A UUIDv7 (RFC 9562, section 5.7) whose random bits are a hash of the name."""
    digest = hashlib.sha256(name.encode()).digest()
    number = int(wall_s * 1000) << 80 | 7 << 76 | (digest[0] << 4 | digest[1] >> 4) << 64 | 2 << 62
    text = f"{number | int.from_bytes(digest[2:10]) >> 2:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class SamplesFile:
    """Samples as JSON lines or Parquet. When the disk refuses them the replay goes on and `error` says why.

    Raises ReplayError when it is entered and cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_parquet = path.suffix.lower() in PARQUET_SUFFIXES
        self._lines = path.with_name(f".{path.name}.{os.getpid()}.jsonl") if self._is_parquet else path
        self._encoder = msgspec.json.Encoder()
        self._buffer = bytearray()
        self._file: BinaryIO | None = None
        self.error: str | None = None

    def __enter__(self) -> SamplesFile:
        try:
            self._file = self._lines.open("wb", buffering=0)
        except OSError as error:
            raise ReplayError(f"samples file {self._path}: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, sample: Sample) -> None:
        """Add a row."""
        self._buffer += self._encoder.encode(sample) + b"\n"
        if len(self._buffer) >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        data, self._buffer = self._buffer, bytearray()
        try:
            while data and self._file is not None and self.error is None:
                del data[: self._file.write(data)]
        except OSError as error:
            self.error = f"{self._path}: {error.strerror}"

    def close(self) -> str | None:
        """Write what is held and, once, make the Parquet file; returns why the file is not whole, if it is not."""
        self.flush()
        if self._file is None:
            return self.error
        self._file.close()
        self._file = None
        if self._is_parquet and self.error is None:
            try:
                _to_parquet(self._lines, self._path)
            except OSError as error:
                self.error = f"{self._path}: {error.strerror or error}; its rows are in {self._lines}"
            else:
                self._lines.unlink(missing_ok=True)
        return self.error


def _schema() -> dict[str, Any]:
    """The columns of a samples file in Parquet, by the fields of a Sample."""
    import polars as pl

    types: dict[str, Any] = {"int": pl.Int64(), "float": pl.Float64(), "bool": pl.Boolean()}
    fields = msgspec.structs.fields(Sample)
    return {
        field.name: types.get(str(getattr(field.type, "__name__", field.type)).removesuffix(" | None"), pl.String())
        for field in fields
    }


def _to_parquet(lines: Path, path: Path) -> None:
    """JSON lines to Parquet, a row group at a time, through a temporary file. Raises OSError."""
    import polars as pl

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if lines.stat().st_size:
            rows = pl.scan_ndjson(lines, schema=_schema(), batch_size=ROW_GROUP_ROWS, low_memory=True)
        else:
            rows = pl.LazyFrame(schema=_schema())
        rows.sink_parquet(part, row_group_size=ROW_GROUP_ROWS)
        part.replace(path)
    except pl.exceptions.PolarsError as error:
        raise OSError(" ".join(str(error).split())) from error
    finally:
        part.unlink(missing_ok=True)


def read_samples(path: Path) -> Iterator[Sample]:
    """The rows of a samples file, JSON lines or Parquet by its first bytes, in the file's order.

    Raises ValueError naming file, row and what is wrong with it, OSError.
    """
    with path.open("rb") as file:
        if file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC:
            yield from _read_parquet(path)
            return
        file.seek(0)
        decoder = msgspec.json.Decoder(Sample)
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise ValueError(f"{path}:{number}: expected a sample, got a line of over {MAX_LINE_BYTES} bytes")
            if not line.strip():
                continue
            try:
                yield decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}:{number}: expected a sample: {error}") from None


def _read_parquet(path: Path) -> Iterator[Sample]:
    import polars as pl

    first = 0
    try:
        query = pl.scan_parquet(path, glob=False, hive_partitioning=False)
        count = query.select(pl.len()).collect().item()
        while first < count:
            for number, row in enumerate(query.slice(first, ROW_GROUP_ROWS).collect().iter_rows(named=True), first + 1):
                try:
                    yield msgspec.convert(row, Sample)
                except msgspec.ValidationError as error:
                    raise ValueError(f"{path}:{number}: expected a sample: {error}") from None
            first += ROW_GROUP_ROWS
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path}: expected samples, got a Parquet file where polars says: {error}") from None
