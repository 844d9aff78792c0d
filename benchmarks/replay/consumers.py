"""Whether other tools take burstgate's exports: `python -m benchmarks.replay.consumers [TOOL ...]`, by hand.

    simulated vLLM <- burstgate serve <- burstgate replay        one recording of bursty traffic
    burstgate export --format F                                  in the format of each tool
    tool -> mock                                                 what arrived against what was recorded

For each tool: rows in the file and requests at the mock, the output tokens asked for (each row's, whatever the order),
and the arrivals against the stamps of the file, anchored as in `benchmarks.replay.measure`. Prints the table of
docs/exports.md. Exit status 0 when every tool that could be had sent every row with its length, else 1.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.gateway.install import BENCH, say
from benchmarks.gateway.processes import BenchError, choose_cores, free_ports, get_json, running
from benchmarks.gateway.report import markdown
from benchmarks.replay.measure import SETTLE_S, Bench, Run, fitted_lags_s, open_mock, run_tool
from benchmarks.replay.tools import TOOLS, Job, Tool, guidellm, make_tokenizer, new_folder
from benchmarks.replay.workload import MODEL, steady, write
from traces.codec import read_trace

ROWS = 60
RATE_RPS = 6.0
RECORDED_TIMEOUT_S = 30.0
BURSTGPT_COLUMNS = {
    "timestamp_column": "Timestamp",
    "prompt_tokens_column": "Request tokens",
    "output_tokens_column": "Response tokens",
}


@dataclass(frozen=True, slots=True)
class Consumer:
    """A tool and the export that it is given."""

    tool: Tool
    file: str

    @property
    def export(self) -> tuple[str, ...]:
        """The flags of `burstgate export`."""
        stamps = ("--stamps", "float") if self.tool.format == "burstgpt" else ()
        return ("--format", self.tool.format, *stamps)


CONSUMERS = (
    Consumer(TOOLS["aiperf"], "day.mooncake.jsonl"),
    Consumer(Tool("aiperf", "aiperf", TOOLS["aiperf"].command), "day.aiperf.jsonl"),
    Consumer(Tool("guidellm", "burstgpt", partial(guidellm, **BURSTGPT_COLUMNS)), "day.csv"),
    Consumer(TOOLS["guidellm"], "day.timed.jsonl"),
    Consumer(TOOLS["evalscope"], "day.workload.jsonl"),
    Consumer(TOOLS["inference-perf"], "day.azure.csv"),
    Consumer(TOOLS["vllm"], "day.timed.jsonl"),
)


def burstgate(program: Path, *words: str) -> str:
    """Run a command to its end; what it printed. Raises BenchError."""
    done = subprocess.run([str(program), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"burstgate {' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@contextmanager
def _server(name: str, argv: tuple[str, ...], port: int, folder: Path, cores: str) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    with running(name, argv, cores=cores, folder=folder) as process:
        process.wait_until_ready(lambda: get_json(f"{url}/v1/models"), 30.0)
        yield url


def record(program: Path, folder: Path, cores: str) -> Path:
    """A gateway's data directory with ROWS recorded requests. Raises BenchError."""
    data = folder / "data"
    source = write(steady("source", ROWS, RATE_RPS), folder, program, {"mooncake"})["mooncake"]
    vllm_port, port = free_ports(2)
    simulate = (str(program), "simulate", "--port", str(vllm_port), "--models", MODEL)
    upstream = f"http://127.0.0.1:{vllm_port}"
    serve = (
        str(program), "serve", "--upstream", upstream, "--port", str(port), "--control-port", "0",
        "--data-dir", str(data),
    )  # fmt: skip
    with (
        _server("simulator", simulate, vllm_port, folder, cores),
        _server("gateway", serve, port, folder, cores) as url,
    ):
        burstgate(program, "replay", str(source), "--target", url, "--model", MODEL, "--ties", "keep", "--quiet")
        deadline_s = time.monotonic() + RECORDED_TIMEOUT_S
        while exported_rows(program, data, folder) < ROWS:
            if time.monotonic() > deadline_s:
                raise BenchError(f"not all of {ROWS} requests were recorded within {RECORDED_TIMEOUT_S:g} s")
            time.sleep(0.5)
    return data


def exported_rows(program: Path, data: Path, folder: Path) -> int:
    path = folder / "day.parquet"
    try:
        burstgate(program, "export", "--data-dir", str(data), "--format", "parquet", "--output", str(path))
    except BenchError:  # nothing is recorded yet
        return 0
    return sum(batch.height for batch in read_trace(path))


def line(version: str, consumer: Consumer, run: Run, trace: pl.DataFrame) -> tuple[tuple[str, ...], bool]:
    """The table's line for a tool, and whether it sent every row with its length."""
    arrivals = run.arrivals
    due_s = np.sort(trace["received_at"].to_numpy())
    due_s = due_s - due_s[0]
    asked = sorted(arrivals.max_tokens.tolist())
    has_all = arrivals.at_s.size == trace.height
    has_lengths = asked == sorted(trace["response_tokens"].to_list())
    late_s = fitted_lags_s(arrivals.at_s, due_s)
    shown = f"p50 {np.percentile(late_s, 50) * 1e3:.0f}, max {late_s.max() * 1e3:.0f} ms" if has_all else "-"
    lengths = "all as recorded" if has_lengths else "none" if set(asked) == {-1} else "differ"
    status = "stopped" if run.status is None else str(run.status)
    requests = f"{arrivals.at_s.size} of {trace.height}"
    cells = (version, f"`{' '.join(consumer.export)}`", requests, lengths, shown, status)
    return cells, has_all and has_lengths


def consume(bench: Bench, consumer: Consumer, path: Path) -> Run:
    """Raises BenchError where the tool is not to be had."""
    job = Job(
        bench.mock.url,
        path,
        ROWS,
        new_folder(bench.folder / f"job-{consumer.tool.name}-{consumer.tool.format}"),
        bench.hub,
        bench.burstgate,
    )
    span_s = ROWS / RATE_RPS
    return run_tool(bench, consumer.tool, job, cores=bench.core, start_limit_s=120.0, limit_s=span_s * 2 + SETTLE_S)


def main(names: list[str]) -> int:
    """The command. names: of tools; none for all."""
    try:
        folder = new_folder(BENCH / "consumers")
        cores = choose_cores()
        program = Path(sys.executable).with_name("burstgate")
        make_tokenizer(folder / "hub")
        data = record(program, folder, cores.two)
        lines, is_good = [], True
        with open_mock(folder, cores.load) as mock:
            bench = Bench(folder, mock, folder / "hub", program, None, cores.gateway, cores.two)
            for consumer in (each for each in CONSUMERS if not names or each.tool.name in names):
                path = folder / consumer.file
                say(f"{consumer.tool.name}: burstgate export {' '.join(consumer.export)} --output {path.name}")
                burstgate(program, "export", "--data-dir", str(data), *consumer.export, "--output", str(path))
                trace = pl.concat(read_trace(path, format=consumer.tool.format))
                try:
                    run = consume(bench, consumer, path)
                    version = consumer.tool.version()
                except BenchError as error:
                    say(f"{consumer.tool.name}: not checked: {error}")
                    continue
                cells, is_whole = line(version, consumer, run, trace)
                lines.append(cells)
                is_good = is_good and is_whole
        print(markdown(("tool", "export", "requests", "output tokens asked", "after the stamp", "exit"), lines))
    except BenchError as error:
        print(f"consumers: {error}", file=sys.stderr)
        return 1
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
