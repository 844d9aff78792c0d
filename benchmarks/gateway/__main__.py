"""The gateway benchmark: `python -m benchmarks.gateway [--only FIGURES] [--repeats N] [--seconds S] [--out FOLDER]`.

Installs its rivals, measures, writes a CSV for each figure and a picture, and prints the table of bars. Exit status 0
when it measured, whatever the verdicts; 1 when it could not.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from benchmarks.gateway.install import BENCH, environment, run_quietly, say
from benchmarks.gateway.measure import (
    DIRECT,
    RATES,
    Bench,
    measure_latency,
    measure_memory,
    measure_rates,
    measure_streams,
    measure_workers,
    open_bench,
)
from benchmarks.gateway.processes import BenchError
from benchmarks.gateway.report import FIGURES, Results, Sample, tables, write_samples
from benchmarks.gateway.rivals import RIVALS

SHORT_MARKS = (20_000, 100_000)
LONG_MARKS = (100_000, 1_000_000)


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}: expected some of {', '.join(known)}")
        return names

    return parse


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Exits with status 2 for what it does not know."""
    gateways = (DIRECT, *RIVALS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description="Measure gateways side by side.")
    parser.add_argument(
        "--only",
        type=_names(FIGURES),
        default=[figure for figure in FIGURES if figure != "memory-long"],
        metavar="FIGURES",
        help=f"comma-separated, of {', '.join(FIGURES)} (default: all but memory-long)",
    )
    parser.add_argument(
        "--gateways",
        type=_names(gateways),
        default=list(gateways),
        help=f"comma-separated, of {', '.join(gateways)} (default: all)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each rate and latency (default: 3)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load (default: 4)")
    parser.add_argument("--streams", type=int, default=2000, help="idle-ish streams at once (default: 2000)")
    parser.add_argument("--out", type=Path, default=BENCH / "results", help="folder (default: .bench/results)")
    options = parser.parse_args(argv)
    for name in ("repeats", "seconds", "streams"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name}: expected a number > 0, got {getattr(options, name)}")
    return options


def measure(bench: Bench, options: argparse.Namespace, results: Results) -> Iterator[tuple[str, Sample]]:
    """Every figure that is asked for."""
    names, seconds, repeats = options.gateways, options.seconds, options.repeats
    if rates := [figure for figure in RATES if figure in options.only]:
        for sample in measure_rates(bench, rates, names, seconds, repeats):
            yield sample.figure, sample
    if "latency" in options.only:
        for latency in measure_latency(bench, names, results.rps("unary", "burstgate"), seconds, repeats):
            yield "latency", latency
    if "streams" in options.only:
        for streams in measure_streams(bench, names, options.streams, seconds * 2):
            yield "streams", streams
    for figure, marks in (("memory", SHORT_MARKS), ("memory-long", LONG_MARKS)):
        if figure in options.only:
            for memory in measure_memory(bench, marks):
                yield figure, memory
    if "workers" in options.only:
        for workers in measure_workers(bench, seconds, repeats):
            yield "workers", workers


def publish(results: Results, text: str, folder: Path) -> None:
    """Write a CSV for each figure, the table and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure, samples in results.by_figure.items():
        write_samples(folder, figure, samples)
    (folder / "table.md").write_text(text, encoding="utf-8")
    draw = Path(__file__).with_name("draw.py")
    run_quietly([str(environment("plot") / "python"), str(draw), str(folder)], what="drawing the results")


def main(argv: list[str]) -> int:
    """The command."""
    options = parse_arguments(argv)

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    start_s = time.monotonic()
    results = Results()
    try:
        with open_bench() as bench:
            try:
                for figure, sample in measure(bench, options, results):
                    results.add(figure, sample)
            finally:
                text = tables(results, bench.cores)
                if results.by_figure:
                    print(text)
        publish(results, text, options.out)  # only of a whole run: files of two runs are not to be mixed
    except BenchError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmark: interrupted", file=sys.stderr)
        return 1
    say(f"{time.monotonic() - start_s:.0f} s; results in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
