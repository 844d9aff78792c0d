"""What a feature costs the requests it is not for: CPU and p99 with it, beside the same gateway without.

    python -m benchmarks.overhead [--rounds 12] [--seconds 3] [--only telemetry,healthy] [--path FOLDER] [--out FILE]

healthy, dead, slow, stalled: every request is mirrored (`share: 1`) to a target that is a second mock as quick as the
first; refuses connections; takes 200 ms an answer; lets the kernel accept connections and never answers.
telemetry: OpenTelemetry as it is when switched on, metrics of every request and spans of 1 %, to a collector here,
exported each second instead of each fifteenth.

Plain chats of 0.6 KB. For each case two gateways, with and without, take turns, one idle meanwhile, and ratios are
those of one round: what slows the machine for a while meets both. CPU a request is the whole process tree's, recorder
included, from quiet to quiet, under wrk (64 connections, closed loop), in the first CPU_ROUNDS rounds; latency is that
of an open loop at one rate for both, 30 % of what the gateway does without, in each. A p99 is decided by the stalls of
the machine that happen to meet it, so its ratio is shown with the interval in which the median lies. The gateway has a
core of its own; load, upstream, shadow and collector share the others. --path: a compiled burstgate to run (`pip
install --target`, see docs/operating.md); without it one is built and installed below .bench, as for `make bench`.
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
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from scipy.stats import binom

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
from benchmarks.gateway.processes import free_ports, get_json, pinned, running
from benchmarks.soak import collector

OFF = "off"
CPU_ROUNDS = 4
SLOW_US = 200_000


@dataclass(frozen=True, slots=True)
class Bar:
    """The largest ratios to the gateway without; None where nothing is asked for."""

    cpu: float
    p99: float | None


MIRROR = Bar(cpu=1.40, p99=1.05)
BARS = {
    "healthy": MIRROR,
    "dead": MIRROR,
    "slow": MIRROR,
    "stalled": MIRROR,
    "telemetry": Bar(cpu=1.10, p99=None),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One gateway in one round."""

    case: str
    beside: str
    """The case whose turn it was; of the gateway without, the one that it is compared with."""
    round: int
    p50_us: float
    p99_us: float
    cpu_us: float | None
    rps: float | None
    foreign_cores: float | None
    errors: int


@contextlib.contextmanager
def environment(bench: Bench, case: str) -> Iterator[dict[str, str]]:
    """The case's settings, and what they speak of running."""
    port = free_ports(1)[0]
    url = f"http://127.0.0.1:{port}"
    mirrored = {"BURSTGATE_MIRROR__TARGETS": json.dumps([{"url": url, "name": case}])}
    if case == OFF:
        yield {}
    elif case == "telemetry":
        with collector() as otlp:
            yield {
                "BURSTGATE_TELEMETRY__OTLP_ENDPOINT": otlp,
                "BURSTGATE_TELEMETRY__METRICS_INTERVAL_S": "1",
                "PYTHONPATH": sysconfig.get_path("purelib"),  # the exporter is an extra, and installed where this runs
            }
    elif case == "dead":
        yield mirrored
    elif case == "stalled":
        with socket.create_server(("127.0.0.1", port), backlog=4096):
            yield mirrored
    else:
        argv = [str(compiled(HERE / "upstream.c")), str(port)]
        with running(f"shadow-{case}", argv, cores=bench.cores.load, folder=bench.folder) as mock:
            mock.wait_until_ready(lambda: get_json(f"{url}/stats"), 10.0)
            get_json(f"{url}/configure?chunks=1&delay_us=0&first_us={SLOW_US if case == 'slow' else 0}")
            yield mirrored


@contextlib.contextmanager
def gateway(bench: Bench, case: str, path: Path | None) -> Iterator[Gateway]:
    """An installation in front of the bench's upstream."""
    folder = bench.folder / case
    folder.mkdir()
    program = installed_burstgate() if path is None else Path(sys.executable).parent
    port = free_ports(1)[0]
    argv = [
        str(program / "burstgate"), "serve", "--upstream", bench.url, "--port", str(port), "--control-port", "0",
        "--data-dir", str(folder / "data"),
    ]  # fmt: skip
    with environment(bench, case) as env:
        if path is not None:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), env.get("PYTHONPATH"))))
        with running(f"burstgate-{case}", argv, cores=bench.cores.gateway, folder=folder, env=env) as process:
            address = f"http://127.0.0.1:{port}"
            process.wait_until_ready(lambda: get_json(f"{address}/v1/chat/completions", chat_body(UNARY)), 60.0)
            yield Gateway(case, address, process)


def latency(bench: Bench, url: str, rate_rps: float, seconds: float, seed: int) -> Latency:
    """An open loop through one gateway."""
    argv = [sys.executable, "-m", "benchmarks.gateway.probes", "latency", url, str(bench.body(UNARY)),
            str(rate_rps), str(seconds), str(seed)]  # fmt: skip
    done = subprocess.run(
        pinned(bench.cores.load, argv), stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True, env={**os.environ}
    )
    return msgspec.json.decode(done.stdout, type=Latency)


def measure(rounds: int, seconds: float, path: Path | None, cases: list[str]) -> Iterator[Sample]:
    """Each case beside the gateway without, round by round."""
    for case in cases:
        with open_bench() as bench, contextlib.ExitStack() as opened:
            gateways = {each: opened.enter_context(gateway(bench, each, path)) for each in (OFF, case)}
            bench.configure()
            rate_rps = measure_rate(bench, gateways[OFF], case, UNARY, 3, 0).rps * SHARE_OF_CAPACITY
            for number in range(rounds):
                for each in (OFF, case) if number % 2 == 0 else (case, OFF):
                    rate = measure_rate(bench, gateways[each], case, UNARY, 2, number) if number < CPU_ROUNDS else None
                    took = latency(bench, gateways[each].url, rate_rps, seconds, number)
                    sample = Sample(
                        case=each,
                        beside=case,
                        round=number,
                        p50_us=took.p50_us,
                        p99_us=took.p99_us,
                        cpu_us=rate and rate.cpu_us,
                        rps=rate and rate.rps,
                        foreign_cores=rate and rate.foreign_cores,
                        errors=took.errors + (rate.errors if rate else 0),
                    )
                    cpu = "" if sample.cpu_us is None else f"{sample.cpu_us:6.1f} CPU µs, {sample.rps:6.0f}/s, "
                    say(f"{each:9} {cpu}p50 {took.p50_us:6.0f} p99 {took.p99_us:7.0f} µs at {rate_rps:.0f}/s")
                    yield sample


def interval(values: list[float]) -> tuple[float, float]:
    """Bounds within which the median of what the values are drawn from lies with 95 %: the binomial order statistics.

    The whole range where there are fewer than six values, which is as much as they can say.
    """
    low, high = binom.interval(0.95, len(values), 0.5)
    ordered = sorted(values)
    return ordered[max(0, int(low) - 1)], ordered[min(len(values) - 1, int(high))]


def table(samples: list[Sample], cases: list[str]) -> Iterator[str]:
    """Medians over the rounds, absolute and of the ratios to the gateway without; a bar of p99 is met or missed when
    the whole interval of its median ratio is on one side of it."""
    off = {(sample.beside, sample.round): sample for sample in samples if sample.case == OFF}
    yield "| case | CPU µs | x off | p50 µs | x off | p99 µs | x off (95 %) | CPU | p99 |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for case in cases:
        own = [sample for sample in samples if sample.case == case]
        shown = []
        ratios: dict[str, list[float]] = {}
        for name in ("cpu_us", "p50_us", "p99_us"):
            pairs = [(getattr(sample, name), getattr(off[case, sample.round], name)) for sample in own]
            pairs = [pair for pair in pairs if None not in pair]
            ratios[name] = [ours / without for ours, without in pairs]
            middle = statistics.median(ours for ours, _ in pairs)
            shown.append(f"{middle:.0f} | {statistics.median(ratios[name]):.2f}")
        low, high = interval(ratios["p99_us"])
        bar = BARS[case]
        cpu = "meets" if statistics.median(ratios["cpu_us"]) <= bar.cpu else "misses"
        p99 = "" if bar.p99 is None else "meets" if high <= bar.p99 else "misses" if low > bar.p99 else "undecided"
        yield f"| {case} | {' | '.join(shown)} ({low:.2f} to {high:.2f}) | {cpu} | {p99} |"


def main() -> None:
    """Measure, and print medians of the rounds' ratios to the gateway without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=",".join(BARS))
    given = parser.parse_args()
    cases = given.only.split(",")
    for case in cases:
        if case not in BARS:
            parser.error(f"--only: expected some of {', '.join(BARS)}, got {case!r}")
    samples = list(measure(given.rounds, given.seconds, given.path and given.path.absolute(), cases))
    if given.out is not None:
        with given.out.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(Sample.__slots__)
            writer.writerows([getattr(sample, name) for name in Sample.__slots__] for sample in samples)
    for line in table(samples, cases):
        print(line)
    noise = statistics.median(sample.foreign_cores for sample in samples if sample.foreign_cores is not None)
    print(f"others' cores: {noise:.2f} at the median; beyond 0.1 this is no result")
    errors = sum(sample.errors for sample in samples)
    print(f"errors: {errors}")


if __name__ == "__main__":
    main()
