"""A long run with everything on: is memory flat, is each request recorded, does a scrape stay quick?

    python -m benchmarks.soak OUT_FOLDER [--minutes 30] [--rate 20] [--workers 2]

Two simulated vLLMs and a third as shadow target; a gateway that records with prefix blocks, shapes, mirrors a tenth,
sends spans and metrics to a collector here, asks for keys with limits, looks after retention; each
minute a burst is injected. Clients come as a Poisson process of `rate` requests a second: streams, plain chats,
embeddings, clients that leave, wrong keys, bodies that are no JSON.

memory.csv: the PSS of each process of the gateway every SAMPLE_S (`/proc/PID/smaps_rollup`), scrapes.csv: each scrape's
duration, taken by a process that does nothing else, and how long the machine stood still for I/O meanwhile (all that
would run waited: `full` of /proc/pressure/io). Printed is one line a condition; the exit status is 1 when one does not
hold:

    memory      over the second half of the run, the line fitted to a process's PSS rises by at most FLAT_BYTES or
                FLAT_SHARE of it, whichever is more
    scrape      the 99th percentile of /metrics, asked for each second, is under SCRAPE_S; told is of how many of them
                the machine stood still for more than half
    accounting  `burstgate doctor` finds accepted = in database + in journal + dropped, with nothing dropped
    journal     nothing is left in it half a minute after the last request
    processes   none has ended
    load        half of the requests or more went well
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import json
import multiprocessing
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx
import numpy as np

from tests.e2e.harness import Installation, Simulator, burstgate

MODEL = "m"
SAMPLE_S = 5.0
SCRAPE_S = 0.050
FLAT_BYTES = 8 * 1024 * 1024
FLAT_SHARE = 0.05
INJECT_EVERY_S = 60.0
DRAIN_S = 30.0
KINDS = {"stream": 55, "plain": 20, "embeddings": 10, "leaves": 8, "no key": 4, "no json": 3}
"""Of a hundred requests."""


class _Collector(BaseHTTPRequestHandler):
    """Takes what OpenTelemetry sends, and forgets it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextlib.contextmanager
def collector() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def everything_on(shadow: str, otlp: str, folder: Path, key: str) -> dict[str, str]:
    """The environment of a gateway that does all it can."""
    rules = [
        {"name": "all", "concurrency": "adaptive", "queue": 500, "max_wait_s": 20, "fair_by": "tenant"},
        {"name": "sessions", "per": "session", "concurrency": 4},
    ]
    return {
        "SOAK_KEY": key,
        "BURSTGATE_RECORD__PREFIX_BLOCKS": "true",
        "BURSTGATE_SHAPING__RULES": json.dumps(rules),
        "BURSTGATE_MIRROR__TARGETS": json.dumps([{"url": shadow, "name": "shadow", "share": 0.1}]),
        "BURSTGATE_TELEMETRY__OTLP_ENDPOINT": otlp,
        "BURSTGATE_TELEMETRY__TRACES_SAMPLE": "0.1",
        "BURSTGATE_TELEMETRY__METRICS_INTERVAL_S": "5",
        "BURSTGATE_KEYS__REQUIRED": "true",
        "BURSTGATE_INJECTION__ALLOWED": "true",
        "BURSTGATE_INJECTION__API_KEY_ENV": "SOAK_KEY",
        "BURSTGATE_RETENTION__MAX_AGE_DAYS": "1",
        "BURSTGATE_RETENTION__ARCHIVE": str(folder / "archive"),
        "BURSTGATE_RETENTION__CHECK_INTERVAL_S": "10",
    }


def memory_bytes(pid: int) -> int | None:
    """A process's share of the memory it uses; None when it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


class Clients:
    """The load: an open loop, in one event loop of a thread of its own."""

    def __init__(self, url: str, key: str, rate_rps: float) -> None:
        self.ended: Counter[str] = Counter()
        """By kind and what came of it."""
        self._url = url
        self._key = key
        self._rate_rps = rate_rps
        self._rng = random.Random(0)
        self._conversation = 0

    async def run(self, seconds: float) -> None:
        begun_s = time.monotonic()
        due_s = 0.0
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
        async with (
            httpx.AsyncClient(base_url=self._url, limits=limits, timeout=60.0, trust_env=False) as client,
            asyncio.TaskGroup() as tasks,
        ):
            while (due_s := due_s + self._rng.expovariate(self._rate_rps)) < seconds:
                await asyncio.sleep(begun_s + due_s - time.monotonic())
                (kind,) = self._rng.choices(list(KINDS), list(KINDS.values()))
                tasks.create_task(self._one(client, kind))

    def _body(self, kind: str) -> tuple[str, bytes]:
        if kind == "no json":
            return "/v1/chat/completions", b'{"model": "m", "messages"'
        if kind == "embeddings":
            return "/v1/embeddings", json.dumps({"model": MODEL, "input": "x " * 50}).encode()
        self._conversation += self._rng.random() < 0.3
        words = " ".join(str(self._rng.random()) for _ in range(self._rng.randrange(5, 60)))
        fields = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"{self._conversation} {words}"}],
            "max_tokens": self._rng.randrange(4, 64),
            "stream": kind != "plain",
            "metadata": {"session_id": f"s{self._conversation}"},
        }
        return "/v1/chat/completions", json.dumps(fields).encode()

    async def _one(self, client: httpx.AsyncClient, kind: str) -> None:
        path, body = self._body(kind)
        headers = {"content-type": "application/json"}
        if kind != "no key":
            headers["authorization"] = f"Bearer {self._key}"
        try:
            async with client.stream("POST", path, content=body, headers=headers) as answer:
                async for _ in answer.aiter_raw():
                    if kind == "leaves":
                        break
            self.ended[f"{kind}: {answer.status_code}"] += 1
        except httpx.HTTPError as error:
            self.ended[f"{kind}: {type(error).__name__}"] += 1


def stalled_s() -> float:
    """For how long the machine has stood still for I/O so far; 0 where the kernel does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/pressure/io").read_text().splitlines():
            if line.startswith("full"):
                return int(line.rpartition("=")[2]) / 1e6
    return 0.0


def scrape(url: str, path: Path, stop: Event) -> None:
    """Ask for the metrics each second, and write down how long that takes."""
    begun_s = time.monotonic()
    with path.open("w", newline="") as stream, httpx.Client(timeout=30.0, trust_env=False) as client:
        rows = csv.writer(stream)
        rows.writerow(("at_s", "duration_s", "stalled_s", "bytes"))
        while not stop.wait(1.0):
            stalled, start_s = stalled_s(), time.perf_counter()
            size = len(client.get(f"{url}/metrics").content)
            took_s = time.perf_counter() - start_s
            rows.writerow((f"{time.monotonic() - begun_s:.1f}", f"{took_s:.6f}", f"{stalled_s() - stalled:.6f}", size))


class Watch:
    """Samples memory and has the metrics scraped, until it is told to stop."""

    def __init__(self, gateway: Installation, folder: Path) -> None:
        self.memory: dict[str, list[tuple[float, int]]] = {}
        self.has_ended: set[str] = set()
        self._gateway = gateway
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        spawn = multiprocessing.get_context("spawn")
        self._stop_scrapes = spawn.Event()
        self._scraper = spawn.Process(target=scrape, args=(gateway.control_url, self.scrapes_file, self._stop_scrapes))

    @property
    def scrapes_file(self) -> Path:
        return self._folder / "scrapes.csv"

    def __enter__(self) -> Watch:
        self._thread.start()
        self._scraper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._stop_scrapes.set()
        self._thread.join()
        self._scraper.join()

    def _run(self) -> None:
        begun_s = time.monotonic()
        pids = {f"{part} {pid}": pid for part in ("worker", "recorder", "control") for pid in self._gateway.pids(part)}
        pids["supervisor"] = self._gateway.process.pid
        next_sample_s = next_inject_s = 0.0
        with (
            (self._folder / "memory.csv").open("w", newline="") as memory_file,
            httpx.Client(base_url=self._gateway.control_url, timeout=30.0, trust_env=False) as control,
        ):
            memory = csv.writer(memory_file)
            memory.writerow(("at_s", "process", "pss_bytes"))
            while not self._stop.wait(1.0):
                now_s = time.monotonic() - begun_s
                if now_s >= next_sample_s:
                    next_sample_s = now_s + SAMPLE_S
                    for name, pid in pids.items():
                        used = memory_bytes(pid)
                        if used is None:
                            self.has_ended.add(name)
                            continue
                        self.memory.setdefault(name, []).append((now_s, used))
                        memory.writerow((f"{now_s:.1f}", name, used))
                if now_s >= next_inject_s:
                    next_inject_s = now_s + INJECT_EVERY_S
                    plan = {"model": MODEL, "rate_rps": 10.0, "shape": 0.25, "duration_s": 10.0, "response_tokens": 16}
                    control.post("/api/v1/injections", json=plan)


def growth(samples: list[tuple[float, int]]) -> tuple[float, float]:
    """What the line through the second half of the samples rises by, and what is there in the middle, bytes."""
    half = np.array(samples[len(samples) // 2 :], dtype=float)
    if len(half) < 3:
        return 0.0, float(half[-1, 1]) if len(half) else 0.0
    slope, _ = np.polyfit(half[:, 0], half[:, 1], 1)
    return float(slope * (half[-1, 0] - half[0, 0])), float(np.median(half[:, 1]))


def verdicts(gateway: Installation, watch: Watch, clients: Clients) -> Iterator[tuple[str, bool, str]]:
    """Condition, whether it holds, and what was found."""
    for name, samples in watch.memory.items():
        rise, middle = growth(samples)
        is_flat = rise <= max(FLAT_BYTES, FLAT_SHARE * middle)
        yield "memory", is_flat, f"{name}: {middle / 2**20:.1f} MiB, {rise / 2**20:+.2f} MiB over the second half"
    took_s, still_s = np.loadtxt(watch.scrapes_file, delimiter=",", skiprows=1, usecols=(1, 2), ndmin=2).T
    p50_s, p99_s = np.quantile(took_s, (0.5, 0.99))
    found = f"p50 {p50_s * 1000:.1f} ms, p99 {p99_s * 1000:.1f} ms of {len(took_s)}"
    still = int(np.count_nonzero(still_s > took_s / 2))
    yield "scrape", bool(p99_s < SCRAPE_S), f"{found}; the machine stood still for most of {still} of them"
    deadline_s = time.monotonic() + DRAIN_S
    left = -1.0
    while left and time.monotonic() < deadline_s:
        time.sleep(1.0)
        left = gauge(gateway, "burstgate_records_in_journal")
    yield "journal", left == 0, f"{left:.0f} records left"
    found = gateway.doctor()["accounting"]
    status = httpx.get(f"{gateway.control_url}/api/v1/status", trust_env=False).json()
    dropped = sum(status["dropped"].values())
    yield "accounting", found.is_ok is True and dropped == 0, f"{found.detail}; dropped {dropped}"
    yield "processes", not watch.has_ended, ", ".join(sorted(watch.has_ended)) or "all live"
    well = sum(count for text, count in clients.ended.items() if text.endswith(": 200"))
    total = clients.ended.total()
    yield "load", well >= total / 2, f"{total} requests: {dict(sorted(clients.ended.items()))}"


def gauge(gateway: Installation, name: str) -> float:
    page = httpx.get(f"{gateway.control_url}/metrics", trust_env=False).text
    return next((float(line.split()[1]) for line in page.splitlines() if line.startswith(f"{name} ")), -1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    folder = given.out
    data_dir = folder / "data"
    data_dir.mkdir(parents=True)
    for arguments in (("db", "upgrade"), ("keys", "create", "soak", "--tenant", "t", "--concurrency", "400")):
        done = burstgate(*arguments, "--data-dir", data_dir)
        if done.returncode:
            sys.exit(done.stderr)
    key = done.stdout.strip()
    with collector() as otlp, Simulator("--models", MODEL) as first, Simulator("--models", MODEL) as second, (
        Simulator("--models", MODEL)
    ) as shadow:  # fmt: skip
        env = everything_on(shadow.url, otlp, folder, key)
        with Installation(first.url, second.url, data_dir=data_dir, workers=given.workers, env=env) as gateway:
            clients = Clients(gateway.gateway_url, key, given.rate)
            with Watch(gateway, folder) as watch:
                asyncio.run(clients.run(given.minutes * 60))
            found = list(verdicts(gateway, watch, clients))
            (folder / "output.txt").write_text(gateway.output)
            gateway.stop()
    with (folder / "verdict.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("condition", "holds", "found"))
        table.writerows(found)
    for condition, holds, text in found:
        print(f"{'ok  ' if holds else 'FAIL'} {condition}: {text}")
    sys.exit(0 if all(holds for _, holds, _ in found) else 1)


if __name__ == "__main__":
    main()
