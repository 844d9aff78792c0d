"""The replay benchmark: `python -m benchmarks.replay [--quick] [--only FIGURES] [--tools TOOLS] [--out FOLDER]`.

Installs the rivals, measures, writes a CSV for each figure, and prints the table of bars. Exit status 0 when it
measured, whatever the verdicts; 1 when it could not. A rival that cannot be had is left out, and the table says why.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from benchmarks.codec import write as write_generated
from benchmarks.gateway.install import BENCH, installed_burstgate, say
from benchmarks.gateway.processes import BenchError, choose_cores
from benchmarks.replay.measure import (
    Bench,
    Rung,
    highest_kept_rps,
    measure_ladder,
    measure_lag,
    measure_start,
    open_mock,
)
from benchmarks.replay.report import Batch, Results, Sample, tables, write_samples
from benchmarks.replay.tools import FLOOR, OURS, TOOLS, make_tokenizer
from benchmarks.replay.workload import Workload, convert, ladder, steady, write

FIGURES = ("lag-100", "lag-1000", "ladder", "start", "convert", "simulate")
LOWER_RPS = tuple(round(50 * 2 ** (step / 2)) for step in range(10))
UPPER_RPS = tuple(round(1600 * 2 ** (step / 2)) for step in range(7))
"""For a tool that keeps the last of the lower ones."""
RUNG_S = 3.0
START_LIMIT_S = 240.0
SIMULATED = "l4-8b"
CONVERT_ROWS = 10_632_000
"""As many as BurstGPT's files have together."""


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description="Measure replayers side by side.")
    parser.add_argument(
        "--only",
        type=_names(FIGURES),
        default=list(FIGURES),
        metavar="FIGURES",
        help=f"comma-separated, of {', '.join(FIGURES)} (default: all)",
    )
    parser.add_argument(
        "--tools",
        type=_names(tuple(TOOLS)),
        metavar="TOOLS",
        help=f"comma-separated, of {', '.join(TOOLS)} (default: all; with --quick burstgate)",
    )
    parser.add_argument("--repeats", type=int, default=1, help="of each lag (default: 1)")
    parser.add_argument("--processes", type=int, help="burstgate's --processes (default: not passed)")
    parser.add_argument("--quick", action="store_true", help="shorter, with the burstgate of this Python: 2 minutes")
    parser.add_argument("--out", type=Path, default=BENCH / "results", help="folder (default: .bench/results)")
    options = parser.parse_args(argv)
    if options.tools is None:
        options.tools = [OURS, FLOOR] if options.quick else list(TOOLS)
    for name in ("repeats", "processes"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name}: expected a number >= 1, got {value}")
    return options


class Traces:
    """Each schedule's files, written when they are first asked for."""

    def __init__(self, bench: Bench, tools: list[str]) -> None:
        self._bench = bench
        self._formats = {TOOLS[name].format for name in tools}
        self._written: dict[str, dict[str, Path]] = {}

    def of(self, workload: Workload, tool: str) -> Path:
        if workload.name not in self._written:
            bench = self._bench
            self._written[workload.name] = write(workload, bench.folder, bench.burstgate, self._formats)
        return self._written[workload.name][TOOLS[tool].format]


def measure(bench: Bench, options: argparse.Namespace, results: Results) -> Iterator[Sample | Batch]:
    """Every figure that is asked for; the tools take turns within each."""
    traces = Traces(bench, options.tools)
    short = options.quick
    lags = {
        "lag-100": steady("lag-100", 600 if short else 3000, 100.0),
        "lag-1000": steady("lag-1000", 3000, 1000.0),
    }
    for figure, workload in lags.items():
        for repeat in range(options.repeats if figure in options.only else 0):
            for name in _present(options.tools, results):
                say(f"{figure}, {name}")
                with _absent(results, name):
                    yield measure_lag(bench, figure, name, workload, traces.of(workload, name), repeat)
    if "ladder" in options.only:
        lower = ladder("lower", LOWER_RPS[::3] if short else LOWER_RPS, RUNG_S)
        upper = ladder("upper", UPPER_RPS[::3] if short else UPPER_RPS, RUNG_S)
        for name in _replayers(options.tools, results):
            say(f"ladder, {name}")
            with _absent(results, name):
                rungs: list[Rung] = measure_ladder(bench, name, lower, traces.of(lower, name))
                if highest_kept_rps(rungs) == lower.rates_rps[-1]:
                    rungs += measure_ladder(bench, name, upper, traces.of(upper, name))
                yield from rungs
    if "start" in options.only:
        long = steady("long", 100_000, 100.0)
        for name in _replayers(options.tools, results):
            say(f"start, {name}")
            with _absent(results, name):
                yield measure_start(bench, name, long, traces.of(long, name), START_LIMIT_S)
    if "convert" in options.only:
        yield from convert_rates(bench)
    if "simulate" in options.only:
        yield simulate_rate(20_000 if short else 100_000)


def _replayers(tools: list[str], results: Results) -> list[str]:
    return [name for name in _present(tools, results) if name != FLOOR]


def _present(tools: list[str], results: Results) -> list[str]:
    return [name for name in tools if name not in results.absent]


class _absent:  # noqa: N801
    """Leaves a rival out that cannot be had; burstgate's absence is an error."""

    def __init__(self, results: Results, name: str) -> None:
        self._results, self._name = results, name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, BenchError) and self._name != OURS:
            say(f"{self._name}: {error}")
            self._results.absent[self._name] = str(error)
            return True
        return False


def convert_rates(bench: Bench) -> Iterator[Batch]:
    """BurstGPT CSV of the published size to Parquet, and that back: the command, from its start to its end.

    Each file written is read back and compared, as ever. What the codec alone does on one core, of which the command
    has as many as there are, tells benchmarks/codec.py.
    """
    say(f"convert, {CONVERT_ROWS:,} rows")
    csv_path, parquet_path = bench.folder / "convert.csv", bench.folder / "convert.parquet"
    write_generated(csv_path, "burstgpt", CONVERT_ROWS)
    pinned = os.sched_getaffinity(0)
    for source, target, format in ((csv_path, parquet_path, "parquet"), (parquet_path, csv_path, "burstgpt")):
        target.unlink(missing_ok=True)
        os.sched_setaffinity(0, set(map(int, bench.cores.split(","))))  # which the command takes over
        begin_s = time.perf_counter()
        convert(bench.burstgate, source, target, format)
        rate = CONVERT_ROWS / (time.perf_counter() - begin_s)
        os.sched_setaffinity(0, pinned)
        work = f"`convert` of {CONVERT_ROWS:,} rows to {format}, read back and compared"
        yield Batch(figure="convert", work=work, value=rate, unit="rows/s")
    for path in (csv_path, parquet_path):
        path.unlink()


def simulate_rate(rows: int) -> Batch:
    """Poisson arrivals at 10/s through the preset that has the most to do for them (benchmarks/simulator.py)."""
    from benchmarks.simulator import generated, timed
    from replay.simulator.config import SimulatorConfig
    from replay.simulator.costs import PRESETS

    say("simulate")
    summary, wall_s = timed(generated(rows, 10.0, 1.0), SimulatorConfig(**PRESETS[SIMULATED]))  # type: ignore[arg-type]
    work = f"simulator on its virtual clock, {rows:,} requests at 10/s, {SIMULATED}"
    return Batch(figure="simulate", work=work, value=summary.span_s / wall_s, unit="x real time")


def main(argv: list[str]) -> int:
    """The command."""
    options = parse_arguments(argv)

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    start_s = time.monotonic()
    results = Results()
    allowed = os.sched_getaffinity(0)
    try:
        cores = choose_cores()
        folder = BENCH / "replay"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        bin_folder = Path(sys.executable).parent if options.quick else installed_burstgate()
        make_tokenizer(folder / "hub")
        with open_mock(folder, cores.load) as mock:
            burstgate = bin_folder / "burstgate"
            # The tools and the mock have their cores by taskset; this process waits on the mock's.
            os.sched_setaffinity(0, {int(cores.load.split(",")[0])})
            both = ",".join(map(str, sorted(allowed)))
            bench = Bench(folder, mock, folder / "hub", burstgate, options.processes, cores.gateway, both)
            for sample in measure(bench, options, results):
                results.samples.append(sample)
        versions = [TOOLS[name].version() for name in _replayers(options.tools, results) if name != OURS]
        text = tables(results, versions, len(allowed), is_compiled=not options.quick)
        print(text)
        options.out.mkdir(parents=True, exist_ok=True)
        write_samples(options.out, results.samples)
        (options.out / "replay.md").write_text(text, encoding="utf-8")
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
