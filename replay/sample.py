"""What one replayed request was and did: one line of the samples file.

Seconds since schedule zero in `due_s` and `sent_s`; latencies from `wire.latency`, so that they mean what the gateway's
mean. Unknown is None. `error` says what went wrong in our words and the upstream's error type, never a body's text.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import msgspec

from replay.client import ReplayError, Reply
from replay.schedule import Planned
from traces.record import Outcome
from wire.latency import e2e_s, tpot_s, ttft_s

FLUSH_BYTES = 64 * 1024


class Sample(msgspec.Struct, frozen=True, gc=False):
    """One request that was due and was tried."""

    index: int
    due_s: float
    sent_s: float | None
    """None when no connection could be made."""
    dispatch_lag_s: float | None
    """Real send minus planned send, connection set-up included; but see `session_wait_s`."""
    wake_lag_s: float
    """How late the replay itself began with the request."""
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
    failure_class: str | None = None
    """One of `replay.client.FailureClass`; None for `ok`."""
    held_back_s: float | None = None
    """The part of the lag for which `max_in_flight` held it back; None without one."""
    session_wait_s: float | None = None
    """With sessions whose turns wait: how much later than `due_s` its moment was, because of the turn before; below 0
    where that one ended sooner than recorded. Lag and `e2e_from_due_s` count from that moment. Else None."""


def measure(
    row: Planned, reply: Reply, start_ns: int, *, ready_ns: int | None = None, held_back_ns: int | None = None
) -> Sample:
    """The sample of a sendable row.

    start_ns: schedule zero; ready_ns: when the row was to go, where that is not simply its due time.
    """
    planned_ns = start_ns + round(row.due_s * 1e9)
    due_ns = planned_ns if ready_ns is None else ready_ns
    sent_ns = reply.sent_ns
    usage = reply.usage
    response_tokens = usage.response_tokens if usage is not None else None
    return Sample(
        index=row.index,
        due_s=row.due_s,
        sent_s=None if sent_ns is None else (sent_ns - start_ns) / 1e9,
        dispatch_lag_s=None if sent_ns is None else (sent_ns - due_ns) / 1e9,
        wake_lag_s=(reply.began_ns - due_ns) / 1e9,
        ttft_s=None if sent_ns is None else ttft_s(sent_ns, reply.first_chunk_ns),
        tpot_s=tpot_s(reply.first_chunk_ns, reply.last_chunk_ns, response_tokens),
        e2e_s=None if sent_ns is None else e2e_s(sent_ns, reply.end_ns),
        e2e_from_due_s=None if sent_ns is None else e2e_s(due_ns, reply.end_ns),
        request_tokens_asked=row.request_tokens or 0,
        request_tokens_got=usage.request_tokens if usage is not None else None,
        response_tokens_asked=row.response_tokens or 0,
        response_tokens_got=response_tokens,
        status=reply.status,
        outcome=reply.outcome,
        error=reply.error,
        is_warmup=row.is_warmup,
        failure_class=reply.failure_class,
        held_back_s=None if held_back_ns is None else held_back_ns / 1e9,
        session_wait_s=None if ready_ns is None else (ready_ns - planned_ns) / 1e9,
    )


class SamplesFile:
    """Samples as JSON lines. When the disk refuses them the replay goes on and `error` says why.

    Raises ReplayError when it is entered and cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encoder = msgspec.json.Encoder()
        self._buffer = bytearray()
        self._file: BinaryIO | None = None
        self.error: str | None = None

    def __enter__(self) -> SamplesFile:
        try:
            self._file = self._path.open("wb", buffering=0)
        except OSError as error:
            raise ReplayError(f"samples file {self._path}: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()

    def write(self, sample: Sample) -> None:
        """Add a line."""
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
