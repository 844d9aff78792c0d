"""Which requests get a span, and how the upstream learns of it: W3C Trace Context (https://www.w3.org/TR/trace-context/).

    traceparent: 00-TRACE ID (32 hex)-PARENT ID (16 hex)-FLAGS (2 hex), lower case; ids are not zero; bit 0: sampled

A request with a valid `traceparent` is sampled when its flag says so, and never else. One without, or with one that is
not valid, begins a trace of its own with the probability `telemetry.traces_sample`. A sampled request's attempts each
reach the upstream with a `traceparent` of their own: same trace and flags, the attempt's span as the parent. All other
headers, `tracestate` among them, an invalid `traceparent`, and every header of a request that is not sampled, pass
unchanged.

Nothing is exported here: a request that is over goes into a bounded queue, from which `proxy/otel.py` makes spans.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable

from proxy.request_head import RequestHead
from proxy.telemetry import WorkerMetrics
from traces.record import TraceRecord
from wire.http import BaseUrl
from wire.http1 import Headers, encode_lines

MAX_QUEUED = 4096
"""Requests whose spans wait for the collector. Beyond it they are dropped, and counted."""
SAMPLED = 0x01
_KNOWN_FLAGS = 0x03
"""Sampled, and random trace id; of a version that we do not know no other flag is passed on."""
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[!-~]*)?")


class Parent:
    """A valid `traceparent`."""

    __slots__ = ("flags", "span_id", "trace_id")

    def __init__(self, trace_id: int, span_id: int, flags: int) -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self.flags = flags


def read_traceparent(headers: Headers) -> tuple[Parent | None, bool]:
    """The parent that the headers name, None where that is nobody or not valid; and whether there is such a header."""
    values = [value for name, value in headers if len(name) == 11 and name.lower() == b"traceparent"]
    if len(values) != 1:
        return None, bool(values)
    found = _TRACEPARENT.fullmatch(values[0].strip())
    if found is None:
        return None, True
    version, trace, span, flags, rest = found.groups()
    trace_id, span_id = int(trace, 16), int(span, 16)
    if version == b"ff" or (version == b"00" and rest is not None) or not trace_id or not span_id:
        return None, True
    return Parent(trace_id, span_id, int(flags, 16) & (0xFF if version == b"00" else _KNOWN_FLAGS)), True


class Attempt:
    """One time that a request was sent. Times are monotonic ns."""

    __slots__ = ("end_ns", "error_type", "name", "span_id", "start_ns", "url")

    def __init__(self, name: str, url: BaseUrl, span_id: int, start_ns: int) -> None:
        self.name = name
        self.url = url
        self.span_id = span_id
        self.start_ns = start_ns
        self.end_ns = 0
        """0: when the request ended."""
        self.error_type: str | None = None
        """Set where another attempt was made, or could not be."""


class Trace:
    """One request that is sampled."""

    __slots__ = ("_keeps_header", "attempts", "flags", "parent_id", "span_id", "trace_id", "tracer")

    def __init__(self, tracer: Tracer, parent: Parent | None, *, keeps_header: bool) -> None:
        """keeps_header: there is a `traceparent`, which is not valid and is not touched."""
        self.tracer = tracer
        self.trace_id = parent.trace_id if parent is not None else _draw(128)
        self.parent_id = parent.span_id if parent is not None else 0
        self.flags = parent.flags if parent is not None else SAMPLED
        self.span_id = _draw(64)
        self.attempts: list[Attempt] = []
        self._keeps_header = keeps_header

    @property
    def trace_hex(self) -> str:
        """The trace's id as text."""
        return f"{self.trace_id:032x}"

    def sends(self, head: RequestHead, lines: bytes, name: str, url: BaseUrl, now_ns: int) -> bytes:
        """The header lines for an attempt, which begins. lines: as they would be sent without it."""
        attempt = Attempt(name, url, _draw(64), now_ns)
        self.attempts.append(attempt)
        if self._keeps_header:
            return lines
        line = f"traceparent: 00-{self.trace_id:032x}-{attempt.span_id:016x}-{self.flags:02x}\r\n".encode()
        if not self.parent_id:
            return lines + line
        old = encode_lines([header for header in head.forward if header[0].lower() == b"traceparent"])
        return lines.replace(old, line, 1)

    def failed(self, error_type: str, now_ns: int) -> None:
        """The last attempt led to nothing."""
        if self.attempts:
            self.attempts[-1].end_ns = now_ns
            self.attempts[-1].error_type = error_type

    def ended(self, record: TraceRecord, method: bytes, operation: str, start_ns: int) -> None:
        """The request's record has been made. start_ns: when it was received, monotonic."""
        self.tracer.put(Finished(self, record, method.decode("ascii", "replace"), operation, start_ns))


class Finished:
    """All that a request's spans are made of."""

    __slots__ = ("method", "operation", "record", "start_ns", "trace")

    def __init__(self, trace: Trace, record: TraceRecord, method: str, operation: str, start_ns: int) -> None:
        self.trace = trace
        self.record = record
        self.method = method
        self.operation = operation
        self.start_ns = start_ns

    @property
    def count(self) -> int:
        """How many spans."""
        return 1 + len(self.trace.attempts)


def _draw(bits: int) -> int:
    """A random id; not zero."""
    return random.getrandbits(bits) or 1


class Tracer:
    """Decides who is sampled, and keeps what is finished until it is exported."""

    def __init__(self, share: float, metrics: Callable[[], WorkerMetrics]) -> None:
        """share: of the requests that no parent decides for, 0 to 1. metrics: where drops are counted, as of now."""
        self._share = share
        self._metrics = metrics
        self.queue: deque[Finished] = deque()
        self._is_closed = False

    def start(self, head: RequestHead) -> Trace | None:
        """A request's trace; None where it is not sampled."""
        parent, has_header = read_traceparent(head.forward)
        if parent is not None:
            return Trace(self, parent, keeps_header=False) if parent.flags & SAMPLED else None
        return Trace(self, None, keeps_header=has_header) if random.random() < self._share else None

    def put(self, finished: Finished) -> None:
        """Keep it for the exporter, or count it as dropped."""
        if len(self.queue) >= MAX_QUEUED:
            self._metrics().spans_dropped(finished.count)
        else:
            self.queue.append(finished)

    def sent(self, count: int, *, is_taken: bool) -> None:
        """So many spans have gone to the collector, or are lost."""
        if not self._is_closed:
            self._metrics().spans_sent(count, is_taken=is_taken)

    def close(self, sending: int) -> None:
        """Count what waits, and what is on its way, as lost; from now on nothing is: the counters are being closed."""
        self._is_closed = True
        self._metrics().spans_dropped(sending + sum([each.count for each in self.queue]))
        self.queue.clear()
