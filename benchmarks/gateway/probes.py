"""The two loads that wrk has no words for, each a process of its own that prints one line of JSON.

    python -m benchmarks.gateway.probes latency URL BODY RATE_RPS SECONDS SEED
    python -m benchmarks.gateway.probes streams URL BODY COUNT RAMP_S GIVE_UP_S

latency: an open loop. Requests leave at Poisson times whatever came back so far, each on a connection that nobody
uses; the first fifth is left out. Latency runs from the send to the last byte; how late the sends were stands beside
it. It waits in select(2), whose timeout is in microseconds, for epoll, whose own is in milliseconds.

streams: COUNT streams opened evenly over RAMP_S. The upstream writes its clock into every event, and both read the
same clock, so that how late an event arrives needs no assumption about when it should.
"""

from __future__ import annotations

import asyncio
import gc
import random
import re
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import numpy as np
import uvloop

from wire.http1 import ResponseParser, encode_head

WARM_UP = 0.2
_STAMP = re.compile(rb'"content":" (\d+)"')


class Latency(msgspec.Struct, frozen=True):
    """The result of `latency`."""

    requests: int
    errors: int
    p50_us: float
    p99_us: float
    lag_p99_us: float


class Streams(msgspec.Struct, frozen=True):
    """The result of `streams`."""

    streams: int
    whole: int
    """Those whose [DONE] arrived."""
    events: int
    """Content events."""
    with_usage: int
    """Streams in which the client saw usage, for which it did not ask."""
    late_p50_ms: float
    late_p99_ms: float
    late_max_ms: float


def _request(url: str, body: bytes) -> tuple[str, int, bytes]:
    parts = urlsplit(url)
    if parts.hostname is None or parts.port is None:
        raise ValueError(f"URL {url!r}: expected http://HOST:PORT")
    headers = [
        (b"host", parts.netloc.encode()),
        (b"content-type", b"application/json"),
        (b"authorization", b"Bearer sk-bench"),
        (b"content-length", b"%d" % len(body)),
    ]
    return parts.hostname, parts.port, encode_head(b"POST", b"/v1/chat/completions", headers) + body


def poisson_times_ns(rate_rps: float, seconds: float, rng: random.Random) -> list[int]:
    """Send times of a Poisson process, in ns from its start."""
    times: list[int] = []
    at_s = rng.expovariate(rate_rps)
    while at_s < seconds:
        times.append(int(at_s * 1e9))
        at_s += rng.expovariate(rate_rps)
    return times


def measure_latency(url: str, body: bytes, rate_rps: float, seconds: float, seed: int) -> Latency:
    """Raises OSError when a connection can not be made."""
    host, port, request = _request(url, body)

    def connect() -> socket.socket:
        sock = socket.create_connection((host, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    idle = [connect() for _ in range(32)]
    busy: dict[socket.socket, tuple[int, ResponseParser]] = {}
    asked: dict[int, socket.socket] = {}
    poller = select.epoll()  # select(2) takes no descriptor beyond 1,023, and a gateway that stalls needs them
    waiting = deque(poisson_times_ns(rate_rps, seconds, random.Random(seed)))
    measured_from_ns = int(seconds * WARM_UP * 1e9)
    latencies_ns: list[int] = []
    lags_ns: list[int] = []
    errors = 0
    gc.disable()
    start_ns = time.monotonic_ns()
    end_ns = start_ns + int((seconds + 10) * 1e9)
    while (waiting or busy) and time.monotonic_ns() < end_ns:
        while waiting and start_ns + waiting[0] <= time.monotonic_ns():
            due_ns = waiting.popleft()
            sock = idle.pop() if idle else connect()
            sent_ns = time.monotonic_ns()
            sock.sendall(request)
            asked[sock.fileno()] = sock
            poller.register(sock, select.EPOLLIN)
            busy[sock] = (sent_ns if due_ns >= measured_from_ns else 0, ResponseParser())
            if due_ns >= measured_from_ns:
                lags_ns.append(sent_ns - start_ns - due_ns)
        timeout_s = (start_ns + waiting[0] - time.monotonic_ns()) / 1e9 if waiting else 1.0
        select.select([poller.fileno()], (), (), max(0.0, timeout_s))
        for descriptor, _ in poller.poll(0):
            sock = asked[descriptor]
            data = sock.recv(262144)
            now_ns = time.monotonic_ns()
            sent_ns, parser = busy[sock]
            if data:
                parser.feed(data)
            else:
                parser.feed_eof()
            if data and not parser.is_complete:
                continue
            del busy[sock]
            poller.unregister(sock)
            errors += parser.status != 200
            if sent_ns and parser.status == 200:
                latencies_ns.append(now_ns - sent_ns)
            if parser.is_reusable:
                idle.append(sock)
            else:
                sock.close()
    errors += len(busy) + len(waiting)
    p50, p99 = np.percentile(latencies_ns, [50, 99]) / 1e3 if latencies_ns else (np.nan, np.nan)
    lag = float(np.percentile(lags_ns, 99)) / 1e3 if lags_ns else 0.0
    return Latency(len(latencies_ns), errors, float(p50), float(p99), lag)


class _Stream(asyncio.Protocol):
    def __init__(self, request: bytes, late_ns: list[int]) -> None:
        self._request = request
        self._late_ns = late_ns
        self._tail = b""
        self.has_usage = False
        self.is_whole = False
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        self._late_ns.extend(now_ns - int(stamp) for stamp in _STAMP.findall(data))
        self.has_usage |= b'"usage":{' in data
        self._tail = (self._tail + data)[-64:]
        if b"data: [DONE]" in self._tail:
            self.is_whole = True
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


async def measure_streams(url: str, body: bytes, count: int, ramp_s: float, give_up_s: float) -> Streams:
    """Streams that are not over `give_up_s` after the last was opened are not whole. Raises OSError."""
    host, port, request = _request(url, body)
    loop = asyncio.get_running_loop()
    late_ns: list[int] = []
    streams: list[_Stream] = []
    start_s = loop.time()
    for index in range(count):
        await asyncio.sleep(start_s + index * ramp_s / count - loop.time())
        _, stream = await loop.create_connection(lambda: _Stream(request, late_ns), host, port)
        streams.append(stream)
    gc.disable()
    await asyncio.wait([stream.over for stream in streams], timeout=give_up_s)
    late_ms = np.array(late_ns, dtype=np.float64) / 1e6 if late_ns else np.array([np.nan])
    p50, p99 = np.percentile(late_ms, [50, 99])
    return Streams(
        streams=count,
        whole=sum(stream.is_whole for stream in streams),
        events=len(late_ns),
        with_usage=sum(stream.has_usage for stream in streams),
        late_p50_ms=float(p50),
        late_p99_ms=float(p99),
        late_max_ms=float(late_ms.max()),
    )


def main(argv: list[str]) -> None:
    """One measurement."""
    what, url, path, *numbers = argv
    body = Path(path).read_bytes()
    if what == "latency":
        rate_rps, seconds, seed = numbers
        result: msgspec.Struct = measure_latency(url, body, float(rate_rps), float(seconds), int(seed))
    else:
        count, ramp_s, give_up_s = numbers
        result = uvloop.run(measure_streams(url, body, int(count), float(ramp_s), float(give_up_s)))
    print(msgspec.json.encode(result).decode())


if __name__ == "__main__":
    main(sys.argv[1:])
