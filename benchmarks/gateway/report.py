"""What the samples come to: a CSV for each figure, medians over repeats, and the bars of the data plane's issue."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.gateway.install import PACKAGES, interpreter
from benchmarks.gateway.measure import CHUNKS, DIRECT, LatencySample, MemorySample, RateSample, StreamsSample
from benchmarks.gateway.processes import Cores

Sample = RateSample | LatencySample | StreamsSample | MemorySample
QUIET_CORES = 0.1
"""What others may use of the machine at the median."""
FIGURES = ("unary", "stream", "paced", "prompt", "latency", "streams", "memory", "memory-long", "workers")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line of the table. value is what the bar is about; None where it could not be measured."""

    work: str
    shown: str
    value: float | None
    bar: float
    beyond: float | None = None
    at_least: bool = False
    """The bar is a floor and not a ceiling."""
    errors: int = 0

    @property
    def verdict(self) -> str:
        """`beyond` the better bar, `meets`, `misses`; nothing is met by a run with errors."""
        if self.errors:
            return f"invalid: {self.errors} errors"
        if self.value is None:
            return "not measured"

        def within(bar: float, value: float = self.value) -> bool:
            return value >= bar if self.at_least else value <= bar

        if self.beyond is not None and within(self.beyond):
            return "beyond"
        return "meets" if within(self.bar) else "misses"


def write_samples(folder: Path, figure: str, samples: Sequence[Sample]) -> None:
    """FIGURE.csv: a line for each gateway and repeat."""
    with (folder / f"{figure}.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(samples[0].__struct_fields__)
        for sample in samples:
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in msgspec.structs.astuple(sample)])


def median(values: Iterable[float | None]) -> float | None:
    """Of the known values; None when there is none."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratio(a: float | None, b: float | None) -> float | None:
    """None when either is unknown or there is nothing to divide by."""
    return None if a is None or not b else a / b


class Results:
    """Samples by figure, and the medians over them."""

    def __init__(self) -> None:
        self.by_figure: dict[str, list[Sample]] = {}

    def add(self, figure: str, sample: Sample) -> None:
        """One more."""
        self.by_figure.setdefault(figure, []).append(sample)

    def rates(self, figure: str, gateway: str) -> list[RateSample]:
        """The repeats of one gateway under wrk."""
        return [s for s in self.by_figure.get(figure, ()) if isinstance(s, RateSample) and s.gateway == gateway]

    def cpu_us(self, figure: str, gateway: str) -> float | None:
        """CPU µs a request."""
        return median(sample.cpu_us for sample in self.rates(figure, gateway))

    def rps(self, figure: str, gateway: str) -> float | None:
        """Requests a second."""
        return median(sample.rps for sample in self.rates(figure, gateway))

    def added_us(self, gateway: str) -> tuple[float | None, float | None]:
        """Median over repeats of (via minus direct), for p50 and p99."""
        found = [s for s in self.by_figure.get("latency", ()) if isinstance(s, LatencySample)]
        direct = {s.repeat: s for s in found if s.gateway == DIRECT}
        via = [s for s in found if s.gateway == gateway and s.repeat in direct]
        return (
            median(s.p50_us - direct[s.repeat].p50_us for s in via),
            median(s.p99_us - direct[s.repeat].p99_us for s in via),
        )

    def errors(self, figure: str, *gateways: str) -> int:
        """Errors of these gateways in a figure."""
        return sum(
            sample.errors
            for sample in self.by_figure.get(figure, ())
            if isinstance(sample, RateSample | LatencySample) and sample.gateway in gateways
        )

    def verdicts(self, cores: Cores) -> list[Verdict]:
        """A line for each bar whose figure was measured."""
        found: list[Verdict] = []
        for figure, work, bar, beyond in (
            ("unary", "unary chat, 0.6 KB, 64 connections, against Envoy", 1.3, 1.0),
            ("stream", f"{CHUNKS}-chunk stream, 16 connections, against Envoy", 1.3, 1.0),
            ("paced", "the same with 1 ms between chunks, against Envoy", 1.3, 1.0),
            ("prompt", "100 KB prompt, unary, against Envoy", 1.5, None),
        ):
            if figure in self.by_figure:
                found.append(self._against(figure, work, "envoy", bar, beyond))
        if "unary" in self.by_figure:
            found.append(self._against("unary", "unary chat, against LiteLLM", "litellm", 1 / 80, None))
            found.append(self._against("unary", "recording on, against off", "burstgate-unrecorded", 1.25, 1.15))
        if "latency" in self.by_figure:
            for name, ours, theirs in zip(
                ("p50", "p99"), self.added_us("burstgate"), self.added_us("envoy"), strict=True
            ):
                shown = f"{_number(ours)} µs, Envoy {_number(theirs)} µs"
                errors = self.errors("latency", DIRECT, "burstgate", "envoy")
                work = f"added latency at 30 % of capacity, {name}, against Envoy"
                found.append(Verdict(work, shown, ratio(ours, theirs), 1.5, errors=errors))
        for sample in self.by_figure.get("streams", ()):
            if isinstance(sample, StreamsSample) and sample.gateway == "burstgate":
                broken = sample.streams - sample.whole + sample.with_usage
                work = f"{sample.streams} streams, one event a second"
                shown = f"{_number(sample.rss_stream_kb)} KB a stream"
                found.append(Verdict(work + ": RSS", shown, sample.rss_stream_kb, 60.0, errors=broken))
                shown = f"at most {sample.late_max_ms:.1f} ms late (p99 {sample.late_p99_ms:.1f})"
                found.append(Verdict(work + ": drift", shown, sample.late_max_ms, 50.0, errors=broken))
        for figure in ("memory", "memory-long"):
            marks = [s for s in self.by_figure.get(figure, ()) if isinstance(s, MemorySample)]
            if len(marks) == 2:
                first, last = marks
                work = f"RSS after {last.requests} requests, against {first.requests}"
                shown = f"{last.rss_mb:.1f} MB, {first.rss_mb:.1f} MB"
                found.append(Verdict(work, shown, ratio(last.rss_mb, first.rss_mb), 1.05))
        if "workers" in self.by_figure:
            one, two = self.rps("workers", "burstgate"), self.rps("workers", "burstgate-2-workers")
            shown = f"{_number(two)}/s, one {_number(one)}/s"
            if cores.shares_two:
                shown += f"; at most {_number(self._workers_limit(), 2)} x where the load has no core of its own"
            errors = self.errors("workers", "burstgate", "burstgate-2-workers")
            found.append(Verdict("two workers, against one", shown, ratio(two, one), 1.8, at_least=True, errors=errors))
        return found

    def _workers_limit(self) -> float | None:
        """Two cores that do the load's work too: 2 g / (g + l), with what gateway and load use for a request."""
        gateway = self.cpu_us("workers", "burstgate")
        load = median(sample.load_cpu_us for sample in self.rates("workers", "burstgate"))
        return None if gateway is None or load is None else 2 * gateway / (gateway + load)

    def _against(self, figure: str, work: str, rival: str, bar: float, beyond: float | None) -> Verdict:
        ours, theirs = self.cpu_us(figure, "burstgate"), self.cpu_us(figure, rival)
        shown = f"{_number(ours)} CPU µs, {_number(theirs)}"
        return Verdict(work, shown, ratio(ours, theirs), bar, beyond, errors=self.errors(figure, "burstgate", rival))

    def rate_lines(self) -> list[tuple[str, ...]]:
        """Medians: figure, gateway, CPU µs, against Envoy, requests/s, load's CPU µs, RSS in MB, others' cores."""
        lines: list[tuple[str, ...]] = []
        for figure, samples in self.by_figure.items():
            for gateway in dict.fromkeys(s.gateway for s in samples if isinstance(s, RateSample)):
                rates = self.rates(figure, gateway)
                cpu_us = self.cpu_us(figure, gateway)
                against = ratio(cpu_us, self.cpu_us(figure, "envoy"))
                lines.append(
                    (
                        figure,
                        gateway,
                        _number(cpu_us),
                        _number(against, 2),
                        _number(self.rps(figure, gateway)),
                        _number(median(s.load_cpu_us for s in rates)),
                        _number(median(s.rss_mb for s in rates)),
                        _number(median(s.foreign_cores for s in rates), 2),
                    )
                )
        return lines


def _number(value: float | None, digits: int = 0) -> str:
    """Three digits at least, a dash for what is unknown."""
    if value is None:
        return "-"
    return f"{value:.{digits or (1 if abs(value) < 100 else 0)}f}"


def machine() -> str:
    """Date, processor, cores, kernel and the versions of the rivals; nothing that names the machine."""
    model = platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    versions = ", ".join(PACKAGES[name][0] for name in ("envoy", "vllm-router", "litellm"))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    cores = len(os.sched_getaffinity(0))
    return (
        f"{today}; {model}, {cores} cores, Linux {platform.release()}, Python {interpreter()[1]}, burstgate compiled;"
        f" {versions}"
    )


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up."""
    widths = [max(len(row[column]) for row in (head, *lines)) for column in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([row(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(row, lines)])


def tables(results: Results, cores: Cores) -> str:
    """The bars, and beneath them what they are made of."""
    verdicts = [
        (
            v.work,
            v.shown,
            "-" if v.value is None else f"{v.value:.4f}" if v.value < 0.1 else f"{v.value:.2f}",
            f"{'>=' if v.at_least else '<='} {v.bar:.4g}",
            v.verdict,
        )
        for v in results.verdicts(cores)
    ]
    parts = [machine(), markdown(("work", "measured", "value", "bar", "verdict"), verdicts)]
    if lines := results.rate_lines():
        head = (
            "figure",
            "gateway",
            "CPU µs a request",
            "x Envoy",
            "requests/s",
            "load's CPU µs",
            "RSS MB",
            "others' cores",
        )
        parts.append(markdown(head, lines))
    noise = [s.foreign_cores for some in results.by_figure.values() for s in some if isinstance(s, RateSample)]
    if noise and statistics.median(noise) > QUIET_CORES:
        parts.append(
            f"The machine was not quiet: others used {statistics.median(noise):.2f} cores. These are no results."
        )
    return "\n\n".join(parts) + "\n"
