"""Who is sampled, and what a full queue drops."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from proxy.request_head import RequestHead
from proxy.telemetry import WORKER_COUNTERS, WorkerMetrics
from proxy.tracing import MAX_QUEUED, Tracer, read_traceparent
from storage.counters import read_counters
from storage.journal import JournalWriter
from traces.record import TraceRecord
from wire.http import parse_base_url

URL = parse_base_url("http://127.0.0.1:8000")


def metrics() -> WorkerMetrics:
    raise AssertionError("nothing is to be counted")


def head(*headers: tuple[bytes, bytes]) -> RequestHead:
    return RequestHead(list(headers), b"x-session-id", b"x-log-type")


def test_as_many_are_sampled_as_asked() -> None:
    random.seed(7)
    for share in (0.0, 0.01, 0.25, 1.0):
        tracer = Tracer(share, metrics)
        count = sum(tracer.start(head()) is not None for _ in range(20_000))
        assert abs(count - 20_000 * share) <= 4 * (20_000 * share * (1 - share)) ** 0.5


def test_a_parent_decides_whatever_the_share() -> None:
    def parent(flags: str) -> RequestHead:
        return head((b"Traceparent", f"00-{7:032x}-{8:016x}-{flags}".encode()))

    for share in (0.0, 1.0):
        tracer = Tracer(share, metrics)
        assert tracer.start(parent("00")) is None
        trace = tracer.start(parent("01"))
        assert trace is not None
        assert (trace.trace_id, trace.parent_id) == (7, 8)


hexadecimal = st.text("0123456789abcdef")


@given(
    st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 255),
    st.lists(st.tuples(st.sampled_from([b"x-a", b"tracestate"]), st.sampled_from([b"", b"traceparent: x"]))),
    st.integers(0, 4), st.sampled_from([b"traceparent", b"TraceParent"]),
)  # fmt: skip
def test_only_the_parent_changes_on_the_way(
    trace_id: int, span_id: int, flags: int, others: list[tuple[bytes, bytes]], place: int, name: bytes
) -> None:
    value = f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}".encode()
    headers = [*others[:place], (name, value), *others[place:]]
    found, has_header = read_traceparent(headers)
    assert has_header
    assert found is not None
    assert (found.trace_id, found.span_id, found.flags) == (trace_id, span_id, flags)
    trace = Tracer(0.0, metrics).start(head(*headers))
    assert (trace is not None) == bool(flags & 1)
    if trace is not None:
        sent = trace.sends(head(*headers), head(*headers).lines, "u", URL, 1)
        attempt = trace.attempts[-1]
        ours = f"traceparent: 00-{trace_id:032x}-{attempt.span_id:016x}-{flags:02x}\r\n".encode()
        assert sent == head(*headers).lines.replace(name + b": " + value + b"\r\n", ours)
        assert len({trace.span_id, attempt.span_id, span_id}) == 3


@given(st.binary(max_size=80) | st.builds("00-{}-{}-{}".format, hexadecimal, hexadecimal, hexadecimal).map(str.encode))
def test_any_header_is_read_or_left(value: bytes) -> None:
    found, has_header = read_traceparent([(b"traceparent", value)])
    assert has_header
    if found is not None:
        assert f"-{found.trace_id:032x}-{found.span_id:016x}-".encode() in value


def test_a_full_queue_drops_and_counts(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, "w", gateway="test", counter_names=WORKER_COUNTERS)
    counting = WorkerMetrics(writer.slots)
    tracer = Tracer(1.0, lambda: counting)

    def finish() -> None:
        trace = tracer.start(head())
        assert trace is not None
        trace.sends(head(), head().lines, "u", URL, 1)
        trace.ended(TraceRecord("01a1fde2-4089-79ca-a20c-000000000000", 1.7e9, elapsed_s=1.0), b"GET", "chat", 1)

    def dropped() -> int:
        return read_counters(writer.directory / "counters")["spans_dropped_queue"]

    for _ in range(MAX_QUEUED):
        finish()
    assert (len(tracer.queue), dropped()) == (MAX_QUEUED, 0)
    for _ in range(3):
        finish()
    assert (len(tracer.queue), dropped()) == (MAX_QUEUED, 6)  # the request's span and its attempt's
    tracer.close(5)
    assert (len(tracer.queue), dropped()) == (0, 6 + 5 + 2 * MAX_QUEUED)
    tracer.sent(7, is_taken=True)  # too late to be counted
    assert read_counters(writer.directory / "counters")["spans_exported"] == 0
    writer.close()
