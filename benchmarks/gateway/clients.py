"""Which HTTP client the gateway should forward with: `python -m benchmarks.gateway.clients [--seconds S] [...]`.

Each client runs alone in a process of its own on one core, on uvloop, against the benchmark's upstream on another:
plain requests of 0.6 KB at 64 in flight, and 128-chunk streams at 16, each piece taken as it comes. CPU µs is the
process's own time over the requests that it ended. The libraries come from a virtual environment of the benchmark's
own; ours is wire/http.py. It prints a table and writes clients.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

URL = "/v1/chat/completions"
HEADERS = {"content-type": "application/json", "authorization": "Bearer sk-bench"}
WARM_UP_S = 0.5
LOADS = {"unary": 64, "stream": 16}

Fetch = Callable[[bytes], Awaitable[int]]
"""Send the body, take every piece of the answer, return how many bytes came. Raises on a status other than 200."""


@asynccontextmanager
async def httpx_client(base: str) -> AsyncIterator[Fetch]:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=base, limits=limits, timeout=60, trust_env=False) as client:

        async def fetch(body: bytes) -> int:
            async with client.stream("POST", URL, content=body, headers=HEADERS) as response:
                response.raise_for_status()
                return sum([len(piece) async for piece in response.aiter_raw()])

        yield fetch


@asynccontextmanager
async def aiohttp_client(base: str) -> AsyncIterator[Fetch]:
    import aiohttp  # type: ignore[import-not-found]

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base, connector=connector, auto_decompress=False) as client:

        async def fetch(body: bytes) -> int:
            async with client.post(URL, data=body, headers=HEADERS) as response:
                response.raise_for_status()
                return sum([len(piece) async for piece in response.content.iter_any()])

        yield fetch


@asynccontextmanager
async def pyreqwest_client(base: str) -> AsyncIterator[Fetch]:
    from pyreqwest.client import ClientBuilder  # type: ignore[import-not-found]

    async with ClientBuilder().base_url(base).error_for_status(True).build() as client:

        async def fetch(body: bytes) -> int:
            request = client.post(URL).headers(HEADERS).body_bytes(body).build_streamed()
            size = 0
            async with request as response:
                while (piece := await response.body_reader.read_chunk()) is not None:
                    size += len(piece)
            return size

        yield fetch


@asynccontextmanager
async def our_client(base: str) -> AsyncIterator[Fetch]:
    from wire.http import HttpClient

    client = HttpClient(base)
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def fetch(body: bytes) -> int:
        exchange = await client.request(b"POST", URL.encode(), [*headers, (b"content-length", b"%d" % len(body))], body)
        await exchange.wait_head()
        if exchange.status != 200:
            raise RuntimeError(f"status {exchange.status}")
        size = 0
        while True:
            size += len(exchange.take())
            if exchange.is_complete:
                return size + len(exchange.take())
            await exchange.wait()

    yield fetch
    client.close()


CLIENTS: dict[str, Callable[[str], AbstractAsyncContextManager[Fetch]]] = {
    "httpx": httpx_client,
    "aiohttp": aiohttp_client,
    "pyreqwest": pyreqwest_client,
    "wire/http.py": our_client,
}


async def drive(name: str, base: str, body: bytes, in_flight: int, seconds: float) -> tuple[int, float]:
    """A closed loop: (requests ended, CPU seconds of this process), after a warm-up."""
    ended = 0

    async with CLIENTS[name](base) as fetch:

        async def loop(until_s: float) -> None:
            nonlocal ended
            while time.monotonic() < until_s:
                if not await fetch(body):
                    raise RuntimeError(f"{name}: an empty answer")
                ended += 1

        async def run(duration_s: float) -> None:
            until_s = time.monotonic() + duration_s
            async with asyncio.TaskGroup() as tasks:
                for _ in range(in_flight):
                    tasks.create_task(loop(until_s))

        await run(WARM_UP_S)
        ended = 0
        before_s = time.process_time()
        await run(seconds)
        return ended, time.process_time() - before_s


def child(name: str, load: str, base: str, path: str, seconds: str) -> None:
    """In the environment of the clients: one measurement, printed as JSON."""
    import uvloop

    body = Path(path).read_bytes()
    ended, cpu_s = uvloop.run(drive(name, base, body, LOADS[load], float(seconds)))
    print(json.dumps({"requests": ended, "cpu_us": cpu_s / ended * 1e6}))


def compare(seconds: float, repeats: int, out: Path) -> None:
    """All clients in turn, a CSV, a table. Raises BenchError."""
    from benchmarks.gateway.install import ROOT, environment
    from benchmarks.gateway.measure import RATES, open_bench
    from benchmarks.gateway.processes import BenchError, pinned
    from benchmarks.gateway.report import machine, markdown

    python = str(environment("clients") / "python")
    samples: dict[tuple[str, str], list[float]] = {}
    with open_bench() as bench:
        bench.configure()
        for _ in range(repeats):
            for load in LOADS:
                for name in CLIENTS:
                    argv = [python, "-m", "benchmarks.gateway.clients", "--child", name, load, bench.url,
                            str(bench.body(RATES[load])), str(seconds)]  # fmt: skip
                    done = subprocess.run(
                        pinned(bench.cores.gateway, argv), cwd=ROOT, capture_output=True, text=True, check=False
                    )
                    if done.returncode:
                        raise BenchError(f"{name}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
                    cpu_us = float(json.loads(done.stdout)["cpu_us"])
                    print(f"{load:7} {name:13} {cpu_us:8.1f} CPU µs", file=sys.stderr, flush=True)
                    samples.setdefault((load, name), []).append(cpu_us)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "clients.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("load", "client", "repeat", "cpu_us"))
        for (load, name), values in samples.items():
            writer.writerows((load, name, index, f"{value:.6g}") for index, value in enumerate(values))
    medians = {key: statistics.median(values) for key, values in samples.items()}
    ours = {load: medians[load, "wire/http.py"] for load in LOADS}
    lines = []
    for name in CLIENTS:
        found = {load: medians[load, name] for load in LOADS}
        lines.append(
            [name, *(cell for load in LOADS for cell in (f"{found[load]:.1f}", f"{found[load] / ours[load]:.2f}"))]
        )
    head = ("client", "CPU µs a unary request", "x ours", "CPU µs a 128-chunk stream", "x ours")
    print(f"{machine()}\n\n{markdown(head, lines)}")


def main(argv: list[str]) -> int:
    """The command, or with --child one measurement of it."""
    if argv[:1] == ["--child"]:
        child(*argv[1:])
        return 0
    from benchmarks.gateway.install import BENCH
    from benchmarks.gateway.processes import BenchError

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway.clients", description="Measure HTTP clients.")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement (default: 4)")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--out", type=Path, default=BENCH / "results", help="folder (default: .bench/results)")
    options = parser.parse_args(argv)
    try:
        compare(options.seconds, options.repeats, options.out)
    except BenchError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
