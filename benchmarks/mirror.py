"""What shadow traffic costs its primaries: p99 and worker CPU with a target that is healthy, dead, slow or stalled.

    python -m benchmarks.mirror [--rounds 5] [--seconds 2] [--path FOLDER] [--out FILE]

Every request is mirrored (`share: 1`), plain chats of 0.6 KB. For each case two gateways, with the mirror and without,
take turns, one idle meanwhile, and ratios are those of one round: what slows the machine for a while meets both. CPU is
the worker process's alone, from quiet to quiet, under wrk (64 connections, closed loop); latency is that of an open
loop at one rate for both, 30 % of what the gateway does with the mirror off. The gateway has a core of its own; load,
upstream and the shadow share the others.

healthy: a second mock as quick as the first. dead: connections are refused. slow: each answer takes 200 ms. stalled:
connections are accepted by the kernel, and nobody ever answers. --path: a compiled burstgate to run (`pip install
--target`, see docs/operating.md); without it one is built and installed below .bench, as for `make bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.gateway.install import ROOT, compiled, installed_burstgate, say
from benchmarks.gateway.measure import (
    HERE,
    SHARE_OF_CAPACITY,
    UNARY,
    Bench,
    Gateway,
    chat_body,
    measure_rate,
    open_bench,
)
from benchmarks.gateway.probes import Latency
from benchmarks.gateway.processes import BenchError, Running, free_ports, get_json, pinned, read_stat, running, tree

CASES = ("off", "healthy", "dead", "slow", "stalled")
SLOW_US = 200_000
MAX_P99_RATIO = 1.05
MAX_CPU_RATIO = 1.40


class Worker:
    """The worker process of an installation, in the place of its whole tree."""

    def __init__(self, whole: Running) -> None:
        self._whole = whole
        found = [stat.pid for stat in tree(whole.pid) if b"proxy.app" in _command(stat.pid)]
        if len(found) != 1:
            raise BenchError(f"{whole.name}: expected one worker process, got {len(found)}")
        self._pid = found[0]

    def cpu_s(self) -> float:
        """CPU seconds so far."""
        stat = read_stat(self._pid)
        if stat is None:
            raise BenchError(f"{self._whole.name}: its worker has ended; its output is in {self._whole.log}")
        return stat.cpu_s

    def wait_until_quiet(self) -> float:
        """As of the tree, whose recorder must not run into the next case."""
        self._whole.wait_until_quiet()
        return self.cpu_s()

    def resident_bytes(self) -> int:
        """Of the tree."""
        return self._whole.resident_bytes()


@dataclass(frozen=True, slots=True)
class Sample:
    """One case in one round."""

    case: str
    beside: str
    """The case whose turn it was; of the mirror off, the one that it is compared with."""
    round: int
    cpu_us: float
    rps: float
    p50_us: float
    p99_us: float
    errors: int
    foreign_cores: float


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@contextlib.contextmanager
def shadow(bench: Bench, case: str) -> Iterator[str | None]:
    """A shadow target's URL; None for the mirror off."""
    port = free_ports(1)[0]
    url = f"http://127.0.0.1:{port}"
    if case == "off":
        yield None
    elif case == "dead":
        yield url
    elif case == "stalled":
        with socket.create_server(("127.0.0.1", port), backlog=4096):
            yield url
    else:
        argv = [str(compiled(HERE / "upstream.c")), str(port)]
        with running(f"shadow-{case}", argv, cores=bench.cores.load, folder=bench.folder) as mock:
            mock.wait_until_ready(lambda: get_json(f"{url}/stats"), 10.0)
            get_json(f"{url}/configure?chunks=1&delay_us=0&first_us={SLOW_US if case == 'slow' else 0}")
            yield url


@contextlib.contextmanager
def gateway(bench: Bench, case: str, path: Path | None) -> Iterator[Gateway]:
    """An installation in front of the bench's upstream."""
    folder = bench.folder / f"mirror-{case}"
    folder.mkdir()
    program = installed_burstgate() if path is None else Path(sys.executable).parent
    port = free_ports(1)[0]
    argv = [
        str(program / "burstgate"), "serve", "--upstream", bench.url, "--port", str(port), "--control-port", "0",
        "--data-dir", str(folder / "data"),
    ]  # fmt: skip
    env = {} if path is None else {"PYTHONPATH": str(path)}
    with shadow(bench, case) as url:
        if url is not None:
            env["BURSTGATE_MIRROR__TARGETS"] = json.dumps([{"url": url, "name": case}])
        with running(f"mirror-{case}", argv, cores=bench.cores.gateway, folder=folder, env=env) as whole:
            address = f"http://127.0.0.1:{port}"
            whole.wait_until_ready(lambda: get_json(f"{address}/v1/chat/completions", chat_body(UNARY)), 60.0)
            worker = Worker(whole)
            yield Gateway(case, address, worker)  # type: ignore[arg-type]


def latency(bench: Bench, url: str, rate_rps: float, seconds: float, seed: int) -> Latency:
    """An open loop through one gateway."""
    argv = [sys.executable, "-m", "benchmarks.gateway.probes", "latency", url, str(bench.body(UNARY)),
            str(rate_rps), str(seconds), str(seed)]  # fmt: skip
    done = subprocess.run(
        pinned(bench.cores.load, argv), stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True, env={**os.environ}
    )
    return msgspec.json.decode(done.stdout, type=Latency)


def measure(rounds: int, seconds: float, path: Path | None, cases: tuple[str, ...]) -> Iterator[Sample]:
    """Each case beside the mirror off, round by round."""
    for case in cases[1:]:
        with open_bench() as bench, contextlib.ExitStack() as opened:
            gateways = {each: opened.enter_context(gateway(bench, each, path)) for each in (cases[0], case)}
            bench.configure()
            rate_rps = measure_rate(bench, gateways[cases[0]], "mirror", UNARY, 3, 0).rps * SHARE_OF_CAPACITY
            for number in range(rounds):
                for each in (cases[0], case) if number % 2 == 0 else (case, cases[0]):
                    rate = measure_rate(bench, gateways[each], "mirror", UNARY, seconds, number)
                    took = latency(bench, gateways[each].url, rate_rps, seconds, number)
                    assert rate.cpu_us is not None
                    say(f"{each:8} {rate.cpu_us:7.1f} CPU µs, {rate.rps:6.0f}/s, p50 {took.p50_us:6.0f}"
                        f" p99 {took.p99_us:7.0f} µs at {rate_rps:.0f}/s")  # fmt: skip
                    yield Sample(
                        each, case, number, rate.cpu_us, rate.rps, took.p50_us, took.p99_us, rate.errors + took.errors,
                        rate.foreign_cores,
                    )  # fmt: skip


def main() -> None:
    """Measure, and print medians of the rounds' ratios to the mirror off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=",".join(CASES))
    given = parser.parse_args()
    cases = tuple(case for case in CASES if case in given.only.split(",") or case == "off")
    samples = list(measure(given.rounds, given.seconds, given.path and given.path.absolute(), cases))
    if given.out is not None:
        with given.out.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(Sample.__slots__)
            writer.writerows([getattr(sample, name) for name in Sample.__slots__] for sample in samples)
    off = {(sample.beside, sample.round): sample for sample in samples if sample.case == "off"}
    print("| shadow | CPU µs | x off | p50 µs | x off | p99 µs | x off | bars |\n|---|---|---|---|---|---|---|---|")
    for case in cases[1:]:
        own = [sample for sample in samples if sample.case == case]
        ratios = [
            statistics.median(getattr(each, name) / getattr(off[case, each.round], name) for each in own)
            for name in ("cpu_us", "p50_us", "p99_us")
        ]
        medians = [statistics.median(getattr(each, name) for each in own) for name in ("cpu_us", "p50_us", "p99_us")]
        shown = " | ".join(f"{value:.0f} | {ratio:.2f}" for value, ratio in zip(medians, ratios, strict=True))
        meets = ratios[0] <= MAX_CPU_RATIO and ratios[2] <= MAX_P99_RATIO
        print(f"| {case} | {shown} | {'meets' if meets else 'misses'} |")
    noise = statistics.median(sample.foreign_cores for sample in samples)
    print(f"others' cores: {noise:.2f} at the median; beyond 0.1 this is no result")
    errors = sum(sample.errors for sample in samples)
    print(f"errors: {errors}")


if __name__ == "__main__":
    main()
