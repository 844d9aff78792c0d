"""What is measured: each figure of the benchmark as a function from a bench to samples.

Rates: wrk drives one gateway at a time while the others stand idle; CPU a request is what the gateway's whole process
tree used, from quiet to quiet, over the requests that were answered. Gateways take turns within a repeat, so that a
slow moment of the machine meets all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from benchmarks.gateway.install import BENCH, ROOT, compiled, program, say
from benchmarks.gateway.probes import Latency, Streams
from benchmarks.gateway.processes import (
    BenchError,
    Cores,
    Running,
    choose_cores,
    free_ports,
    get_json,
    machine_cpu_s,
    pinned,
    running,
)
from benchmarks.gateway.rivals import RIVALS, Site

HERE = Path(__file__).resolve().parent
DIRECT = "direct"
RECORDING = frozenset({"burstgate", "burstgate-2-workers"})
SLOW = frozenset({"litellm"})
"""Measured `SLOW_TIMES` as long, or too few requests would end."""
SLOW_TIMES = 2
WARM_UP_S = 1.0
CHUNKS = 128
SHARE_OF_CAPACITY = 0.3


@dataclass(frozen=True, slots=True)
class Load:
    """A closed loop of wrk: so many connections, each with one request at a time."""

    prompt_bytes: int
    is_stream: bool
    connections: int
    delay_us: int = 0
    """Between two events of a stream."""


UNARY = Load(prompt_bytes=375, is_stream=False, connections=64)
RATES = {
    "unary": UNARY,
    "stream": Load(prompt_bytes=375, is_stream=True, connections=16),
    "paced": Load(prompt_bytes=375, is_stream=True, connections=16, delay_us=1000),
    "prompt": Load(prompt_bytes=100_000, is_stream=False, connections=16),
}
RATE_GATEWAYS = {
    "unary": ("burstgate", "burstgate-unrecorded", "envoy", "vllm-router", "nginx", "litellm", DIRECT),
    "stream": ("burstgate", "envoy", "vllm-router", "nginx", "litellm", DIRECT),
    "paced": ("burstgate", "envoy", "vllm-router", "nginx", DIRECT),
    "prompt": ("burstgate", "envoy", "vllm-router", "nginx", DIRECT),
}
LATENCY_GATEWAYS = (DIRECT, "burstgate", "envoy", "vllm-router", "nginx")
STREAMS_GATEWAYS = (DIRECT, "burstgate", "envoy")


class RateSample(msgspec.Struct, frozen=True):
    """One gateway under wrk."""

    figure: str
    gateway: str
    repeat: int
    seconds: float
    requests: int
    errors: int
    rps: float
    cpu_us: float | None
    """CPU of the gateway's process tree a request; None for `direct`."""
    load_cpu_us: float
    """CPU of wrk and the upstream a request."""
    rss_mb: float | None
    foreign_cores: float
    """What the rest of the machine used meanwhile, in cores: the noise."""


class LatencySample(msgspec.Struct, frozen=True):
    """One gateway under an open loop."""

    gateway: str
    repeat: int
    rate_rps: float
    requests: int
    errors: int
    p50_us: float
    p99_us: float
    lag_p99_us: float


class StreamsSample(msgspec.Struct, frozen=True):
    """One gateway with many streams that rarely move."""

    gateway: str
    streams: int
    whole: int
    events: int
    with_usage: int
    rss_before_mb: float | None
    rss_during_mb: float | None
    rss_stream_kb: float | None
    cpu_cores: float | None
    """CPU of the tree while all streams were open, in cores."""
    late_p50_ms: float
    late_p99_ms: float
    late_max_ms: float


class MemorySample(msgspec.Struct, frozen=True):
    """burstgate after so many requests."""

    gateway: str
    requests: int
    rss_mb: float


def chat_body(load: Load) -> bytes:
    """A chat request as an SDK writes it: a system message, a question, an answer, a question.

    prompt_bytes is about the size of the messages' texts; the words are drawn with a fixed seed.
    """
    rng = random.Random(1)
    words = "the gateway of a fleet that serves many models keeps what it has seen in a trace and says when it is late"

    def text(size: int) -> str:
        out: list[str] = []
        length = 0
        while length < size:
            word = rng.choice(words.split()) + ("\n" if rng.random() < 0.02 else "")
            out.append(word)
            length += len(word) + 1
        return " ".join(out)

    fields: dict[str, Any] = {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": text(load.prompt_bytes * 3 // 4)},
            {"role": "assistant", "content": text(load.prompt_bytes // 8)},
            {"role": "user", "content": text(load.prompt_bytes // 8)},
        ],
        "model": "bench-model",
        "max_tokens": CHUNKS,
        "temperature": 0.7,
    }
    if load.is_stream:
        fields["stream"] = True
    return json.dumps(fields, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway that listens."""

    name: str
    url: str
    process: Running | None
    """None for the upstream itself."""


@dataclass(frozen=True, slots=True)
class Bench:
    """The upstream, and where everything of a run lies."""

    folder: Path
    cores: Cores
    upstream: Running
    upstream_port: int
    answered: dict[str, int]
    """Requests that wrk saw answered, by URL."""

    @property
    def url(self) -> str:
        """The upstream."""
        return f"http://127.0.0.1:{self.upstream_port}"

    def stats(self) -> dict[str, int]:
        """The upstream's counters."""
        counters: dict[str, int] = get_json(f"{self.url}/stats")
        return counters

    def configure(self, *, chunks: int = CHUNKS, delay_us: int = 0, first_us: int = 0) -> None:
        """How the upstream answers from now on."""
        get_json(f"{self.url}/configure?chunks={chunks}&delay_us={delay_us}&first_us={first_us}")

    def body(self, load: Load) -> Path:
        """The file of a load's request."""
        path = self.folder / f"body-{load.prompt_bytes}-{'stream' if load.is_stream else 'plain'}.json"
        if not path.exists():
            path.write_bytes(chat_body(load))
        return path


@contextlib.contextmanager
def open_bench() -> Iterator[Bench]:
    """Start the upstream and check that it is a fair one. Raises BenchError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        cores = choose_cores()
        folder = BENCH / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        port = free_ports(1)[0]
        argv = [str(compiled(HERE / "upstream.c")), str(port)]
        with running("upstream", argv, cores=cores.load, folder=folder) as upstream:
            bench = Bench(folder, cores, upstream, port, {})
            upstream.wait_until_ready(bench.stats, 10.0)
            check_upstream(bench)
            yield bench
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _post(url: str, body: bytes) -> tuple[bytes, list[bytes]]:
    """One request on a raw socket: the answer's bytes, and the pieces in which they arrived."""
    parts = urlsplit(url)
    pieces = []
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: %b\r\nconnection: close\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer sk-bench\r\ncontent-length: %d\r\n\r\n%b" % (parts.netloc.encode(), len(body), body)
        )
        while True:
            data = sock.recv(65536)
            pieces.append(data)
            answer = b"".join(pieces)  # the last chunk may come alone
            if not data or answer.endswith(b"\r\n0\r\n\r\n") or _is_whole_plain(answer):
                return answer, pieces


def _is_whole_plain(answer: bytes) -> bool:
    head, blank, body = answer.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if blank and line.startswith(b"content-length:"):
            return len(body) >= int(line[15:])
    return False


def _expect(fact: bool, rule: str) -> None:
    if not fact:
        raise BenchError(f"upstream: {rule}: it does not keep this rule of a fair mock")


def check_upstream(bench: Bench) -> None:
    """Every rule of a fair mock, seen from outside. Raises BenchError naming the one that is broken."""
    chunks = 5
    bench.configure(chunks=chunks, delay_us=50_000, first_us=50_000)
    plain = chat_body(RATES["stream"])
    asking = plain[:-1] + b',"stream_options":{"include_usage":true}}'
    answer, pieces = _post(bench.url, plain)
    events = [line for line in answer.split(b"\n") if line.startswith(b"data: {")]
    _expect(len(events) == chunks + 1 == len(set(events)), "events differ, one for each token")
    _expect(sum(b"data: {" in piece for piece in pieces) == chunks + 1, "every event is its own write")
    _expect(b'"usage"' not in answer, "usage comes only when it is asked for")
    _expect(b'"usage":{' in _post(bench.url, asking)[0], "usage comes when it is asked for")
    _expect(_post(bench.url, chat_body(UNARY))[0] != _post(bench.url, chat_body(UNARY))[0], "plain answers differ")
    before = bench.stats()
    bench.configure(chunks=chunks, delay_us=100_000, first_us=100_000)
    for body in (plain, chat_body(UNARY)):
        with socket.create_connection(("127.0.0.1", bench.upstream_port)) as sock:
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            time.sleep(0.05)
    time.sleep(0.05)
    after = bench.stats()
    _expect(after["aborted"] == before["aborted"] + 2 and after["in_flight"] == 0, "aborted requests are counted")


def check_gateway(gateway: Gateway, bench: Bench) -> None:
    """A plain answer and a stream arrive whole; burstgate asks for usage and hides it. Raises BenchError."""
    bench.configure(chunks=5, delay_us=1000)
    plain, _ = _post(gateway.url, chat_body(UNARY))
    asked = bench.stats()["usage_asked"]
    stream, _ = _post(gateway.url, chat_body(RATES["stream"]))
    asked = bench.stats()["usage_asked"] - asked
    if b"chatcmpl-" not in plain or stream.count(b"data: {") < 5 or b"data: [DONE]" not in stream:
        raise BenchError(f"{gateway.name}: its answers are not whole: {plain[:200]!r}, {stream[:200]!r}")
    if gateway.name.startswith("burstgate") and (asked != 1 or b'"usage":{' in stream):
        raise BenchError(f"{gateway.name}: expected usage to be asked for and hidden in a stream")


def check_records(database: Path, answered: int) -> None:
    """Every answered request is a row; those that wrk left at its end are rows too. Raises BenchError."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows, whole = connection.execute("SELECT count(*), sum(outcome = 'ok') FROM requests").fetchone()
    say(f"burstgate recorded {rows} requests, {whole or 0} of them whole; wrk saw {answered} answered")
    if (whole or 0) < answered:
        raise BenchError(f"{database}: {answered} requests were answered, {whole or 0} are recorded as whole")


@contextlib.contextmanager
def open_gateway(bench: Bench, name: str, cores: str | None = None) -> Iterator[Gateway]:
    """A gateway for the length of a with block. Raises BenchError."""
    if name == DIRECT:
        yield Gateway(name, bench.url, None)
        return
    folder = bench.folder / f"{name}-{time.monotonic_ns()}"
    folder.mkdir()
    port = free_ports(1)[0]
    command = RIVALS[name](Site(folder, port, bench.upstream_port))
    started = running(name, command.argv, cores=cores or bench.cores.gateway, folder=folder, env=command.env)
    with started as process:
        gateway = Gateway(name, f"http://127.0.0.1:{port}", process)
        body = chat_body(UNARY)
        process.wait_until_ready(lambda: get_json(f"{gateway.url}/v1/chat/completions", body), 180.0)
        check_gateway(gateway, bench)
        yield gateway
    if name in RECORDING:
        check_records(folder / "data" / "burstgate.db", bench.answered.get(gateway.url, 0))


class _WrkResult(msgspec.Struct, frozen=True):
    requests: int
    seconds: float
    errors: int


def _wrk(bench: Bench, url: str, load: Load, seconds: float, cores: str | None = None) -> _WrkResult:
    path, env = program("wrk")
    argv = [
        path, "-t1", f"-c{load.connections}", f"-d{max(1, round(seconds))}s", "--timeout", "60s",
        "-s", str(HERE / "load.lua"), f"{url}/v1/chat/completions", "--", str(bench.body(load)),
    ]  # fmt: skip
    done = subprocess.run(
        pinned(cores or bench.cores.load, argv),
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )
    if done.returncode:
        raise BenchError(f"wrk ended with status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    result = msgspec.json.decode(done.stdout.splitlines()[-1], type=_WrkResult)
    bench.answered[url] = bench.answered.get(url, 0) + result.requests
    return result


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_rate(
    bench: Bench, gateway: Gateway, figure: str, load: Load, seconds: float, repeat: int, cores: str | None = None
) -> RateSample:
    """One gateway under wrk, from quiet to quiet."""
    process = gateway.process
    if gateway.name in SLOW:
        seconds *= SLOW_TIMES
    bench.configure(delay_us=load.delay_us)
    _wrk(bench, gateway.url, load, WARM_UP_S, cores)
    before_s = process.wait_until_quiet() if process is not None else 0.0
    load_before_s = bench.upstream.cpu_s() + _children_cpu_s()
    machine_before_s, start_s = machine_cpu_s(), time.monotonic()
    result = _wrk(bench, gateway.url, load, seconds, cores)
    load_s = bench.upstream.cpu_s() + _children_cpu_s() - load_before_s
    own_s = load_s + (process.cpu_s() - before_s if process is not None else 0.0)
    foreign_cores = (machine_cpu_s() - machine_before_s - own_s) / (time.monotonic() - start_s)
    used_s = process.wait_until_quiet() - before_s if process is not None else None
    if not result.requests:
        raise BenchError(f"{gateway.name}: no request of figure {figure!r} was answered in {seconds:g} s")
    return RateSample(
        figure=figure,
        gateway=gateway.name,
        repeat=repeat,
        seconds=result.seconds,
        requests=result.requests,
        errors=result.errors,
        rps=result.requests / result.seconds,
        cpu_us=None if used_s is None else used_s / result.requests * 1e6,
        load_cpu_us=load_s / result.requests * 1e6,
        rss_mb=None if process is None else process.resident_bytes() / 1e6,
        foreign_cores=max(0.0, foreign_cores),
    )


def measure_rates(
    bench: Bench, figures: Sequence[str], names: Sequence[str], seconds: float, repeats: int
) -> Iterator[RateSample]:
    """All figures of `RATES` that are asked for. Each gateway is started once."""
    wanted = {figure: [name for name in RATE_GATEWAYS[figure] if name in names] for figure in figures}
    with contextlib.ExitStack() as stack:
        gateways: dict[str, Gateway] = {}
        for name in dict.fromkeys(name for some in wanted.values() for name in some):
            say(f"starting {name}")
            gateways[name] = stack.enter_context(open_gateway(bench, name))
        for figure, some in wanted.items():
            for repeat in range(repeats):
                for name in some:
                    sample = measure_rate(bench, gateways[name], figure, RATES[figure], seconds, repeat)
                    cpu = "" if sample.cpu_us is None else f"{sample.cpu_us:9.1f} CPU µs,"
                    say(f"{figure:8} {name:20} {cpu} {sample.rps:8.0f}/s, {sample.errors} errors")
                    yield sample


@contextlib.contextmanager
def _probe(bench: Bench, what: str, url: str, load: Load, *numbers: float) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "benchmarks.gateway.probes", what, url, str(bench.body(load)), *map(str, numbers)]
    with subprocess.Popen(pinned(bench.cores.load, argv), stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def _result(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate()
    if process.returncode:
        raise BenchError(f"a probe ended with status {process.returncode}; its reason is above")
    return text


def measure_latency(
    bench: Bench, names: Sequence[str], capacity_rps: float | None, seconds: float, repeats: int
) -> Iterator[LatencySample]:
    """Latency through each gateway and directly, at one rate: 30 % of burstgate's capacity, measured if not given."""
    wanted = [name for name in LATENCY_GATEWAYS if name in names]
    with contextlib.ExitStack() as stack:
        gateways = {}
        for name in wanted:
            say(f"starting {name}")
            gateways[name] = stack.enter_context(open_gateway(bench, name))
        if capacity_rps is None:
            capacity_rps = measure_rate(
                bench, gateways.get("burstgate", gateways[wanted[-1]]), "unary", UNARY, 3, 0
            ).rps
        rate_rps = capacity_rps * SHARE_OF_CAPACITY
        bench.configure()
        for repeat in range(repeats):
            for name, gateway in gateways.items():
                if gateway.process is not None:
                    gateway.process.wait_until_quiet()
                with _probe(bench, "latency", gateway.url, UNARY, rate_rps, seconds, repeat) as probe:
                    found = msgspec.json.decode(_result(probe), type=Latency)
                say(f"latency  {name:20} p50 {found.p50_us:.0f} µs, p99 {found.p99_us:.0f} µs at {rate_rps:.0f}/s")
                yield LatencySample(name, repeat, rate_rps, *msgspec.structs.astuple(found))


def measure_streams(bench: Bench, names: Sequence[str], count: int, seconds: float) -> Iterator[StreamsSample]:
    """Streams of one event a second, that many at once. RSS a stream is against the same gateway after a warm-up."""
    ramp_s = max(2.0, count / 500)
    chunks = round(ramp_s + max(4.0, seconds))
    load = RATES["stream"]
    for name in (name for name in STREAMS_GATEWAYS if name in names):
        with open_gateway(bench, name) as gateway:
            process = gateway.process
            bench.configure()
            _wrk(bench, gateway.url, UNARY, 2)
            _wrk(bench, gateway.url, load, 1)
            if process is not None:
                process.wait_until_quiet()
            before = process.resident_bytes() if process is not None else 0
            bench.configure(chunks=chunks, delay_us=1_000_000)
            peak = 0
            cpu_s = open_s = 0.0
            with _probe(bench, "streams", gateway.url, load, count, ramp_s, chunks + 20.0) as probe:
                start_s = time.monotonic()
                while probe.poll() is None and time.monotonic() < start_s + chunks - 0.5:
                    time.sleep(0.25)
                    if process is not None and bench.stats()["in_flight"] == count:
                        peak = max(peak, process.resident_bytes())
                        cpu_s = cpu_s or process.cpu_s()
                        open_s = open_s or time.monotonic()
                now_s = time.monotonic()
                used = (process.cpu_s() - cpu_s) / (now_s - open_s) if process is not None and open_s else None
                found = msgspec.json.decode(_result(probe), type=Streams)
        if process is not None and not peak:
            raise BenchError(f"{name}: the {count} streams were never open at once")
        mb = None if process is None else (before / 1e6, peak / 1e6, (peak - before) / count / 1e3)
        before_mb, during_mb, stream_kb = mb or (None, None, None)
        say(f"streams  {name:20} {stream_kb or 0:.1f} KB a stream, events at most {found.late_max_ms:.1f} ms late")
        yield StreamsSample(
            gateway=name,
            streams=found.streams,
            whole=found.whole,
            events=found.events,
            with_usage=found.with_usage,
            rss_before_mb=before_mb,
            rss_during_mb=during_mb,
            rss_stream_kb=stream_kb,
            cpu_cores=used,
            late_p50_ms=found.late_p50_ms,
            late_p99_ms=found.late_p99_ms,
            late_max_ms=found.late_max_ms,
        )


def measure_memory(bench: Bench, marks: Sequence[int]) -> Iterator[MemorySample]:
    """burstgate's resident memory, once quiet, after so many requests each."""
    with open_gateway(bench, "burstgate") as gateway:
        process = gateway.process
        assert process is not None
        bench.configure()
        begin = bench.stats()["requests"]
        for mark in marks:
            while (done := bench.stats()["requests"] - begin) < mark:
                left_s = (mark - done) / 5000
                _wrk(bench, gateway.url, UNARY, min(10.0, max(1.0, left_s)))
            process.wait_until_quiet()
            sample = MemorySample("burstgate", done, process.resident_bytes() / 1e6)
            say(f"memory   burstgate            {sample.rss_mb:.1f} MB after {done} requests")
            yield sample


def measure_workers(bench: Bench, seconds: float, repeats: int) -> Iterator[RateSample]:
    """One worker on its core, the load on the others, against two workers on two cores."""
    cores = bench.cores
    load = Load(UNARY.prompt_bytes, is_stream=False, connections=UNARY.connections * 2)
    with open_gateway(bench, "burstgate") as one, open_gateway(bench, "burstgate-2-workers", cores.two) as two:
        for repeat in range(repeats):
            for gateway, load_cores in ((one, cores.load), (two, cores.load_of_two)):
                sample = measure_rate(bench, gateway, "workers", load, seconds, repeat, load_cores)
                say(f"workers  {gateway.name:20} {sample.cpu_us or 0:9.1f} CPU µs, {sample.rps:8.0f}/s")
                yield sample
