"""How long the dashboard's views take with a long history behind them: the requests that its page makes, over HTTP.

    python -m benchmarks.dashboard [--rows 10000000] [--folder .bench/dashboard] [--rounds 10] [--out FILE]

The database (SQLite) is filled once, through the sink that the recorder uses, and its minutes are added up as the
recorder does: 30 days up to the hour it is made, eight models, six upstreams, hours of the day, 2 % failures, a fifth
of the rows injected or shadows. Then `burstgate serve` stands in front of it, with a simulated vLLM as its one upstream
and nothing to do. Views take turns, so that what slows the machine for a while meets all of them.

Bar: every view within VIEW_S; the median of its rounds counts, the slowest and the first (caches cold) are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np

from benchmarks.gateway.install import ROOT, say
from benchmarks.gateway.processes import BenchError, free_ports
from storage.engine import open_engine, upgrade
from storage.query import Filter, newest
from storage.rollup import roll
from storage.sink import open_sink
from traces.record import LogType, Origin, Outcome, TokenSource, TraceRecord

ROWS = 10_000_000
VIEW_S = 0.3
DAYS = 30
BATCH_ROWS = 20_000
MODELS = [f"model-{number}" for number in range(8)]
UPSTREAMS = [f"http://vllm-{number}:8000" for number in range(6)]
FAILURES = [Outcome.REJECTED, Outcome.UPSTREAM_ERROR, Outcome.UPSTREAM_TIMEOUT, Outcome.CLIENT_GONE, Outcome.TRUNCATED]
ORIGINS = [Origin.CLIENT, Origin.SHADOW, Origin.INJECTED]
RANGES_S = {"1 h": 3600, "24 h": 86_400, "7 d": 604_800, "30 d": 2_592_000}


def records(rng: np.random.Generator, count: int, begin_s: float, span_s: float) -> Iterator[TraceRecord]:
    """Rows within a span, in order of time."""
    stamps_s = begin_s + np.sort(rng.random(count)) * span_s
    failed = rng.random(count) < 0.02
    kinds = rng.integers(0, len(FAILURES), count)
    models = rng.choice(
        len(MODELS), count, p=np.arange(1, len(MODELS) + 1)[::-1] / (len(MODELS) * (len(MODELS) + 1) / 2)
    )
    upstreams = rng.integers(0, len(UPSTREAMS), count)
    origins = rng.choice(len(ORIGINS), count, p=[0.8, 0.15, 0.05])
    request = np.ceil(rng.lognormal(5.5, 1.0, count)).astype(np.int64)
    response = np.ceil(rng.lognormal(4.8, 0.8, count)).astype(np.int64)
    ttft_s, tpot_s = rng.lognormal(-1.5, 0.7, count), rng.lognormal(-3.7, 0.3, count)
    drawn = zip(
        stamps_s.tolist(), failed.tolist(), kinds.tolist(), models.tolist(), upstreams.tolist(), origins.tolist(),
        request.tolist(), response.tolist(), ttft_s.tolist(), tpot_s.tolist(), strict=True,
    )  # fmt: skip
    for number, (at_s, is_failure, kind, model, upstream, origin, asked, got, first_s, per_s) in enumerate(drawn):
        yield TraceRecord(
            request_id=f"{int(at_s * 1000):012x}{number:020x}",
            received_at=at_s,
            elapsed_s=first_s + per_s * got,
            model=MODELS[model],
            served_model=MODELS[model],
            request_tokens=asked,
            response_tokens=0 if is_failure else got,
            log_type=LogType.API,
            outcome=FAILURES[kind] if is_failure else Outcome.OK,
            status=503 if is_failure else 200,
            error_type="upstream_disconnected" if is_failure else None,
            ttft_s=None if is_failure else first_s,
            tpot_s=None if is_failure else per_s,
            endpoint="/v1/chat/completions",
            stream=True,
            upstream=UPSTREAMS[upstream],
            attempts=1,
            finish_reason=None if is_failure else "stop",
            token_source=TokenSource.USAGE,
            origin=ORIGINS[origin],
            gateway="bench",
        )


def fill(folder: Path, rows: int) -> None:
    """Make the database, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = open_engine(f"sqlite:///{folder / 'burstgate.db'}")
    try:
        upgrade(engine)
        if newest(engine, Filter(), 1):
            return
        say(f"recording {rows:,} rows")
        rng = np.random.default_rng(0)
        sink = open_sink(engine)
        hours = DAYS * 24
        begin_s = time.time() // 3600 * 3600 - hours * 3600
        of_day = 1.05 + np.sin((np.arange(hours) % 24 - 8) / 24 * 2 * np.pi)
        for hour, count in enumerate(rng.multinomial(rows, of_day / of_day.sum()).tolist()):
            batch = list(records(rng, count, begin_s + hour * 3600, 3600.0))
            for first in range(0, count, BATCH_ROWS):
                sink.commit(batch[first : first + BATCH_ROWS])
        say("adding up its minutes")
        while roll(engine, time.time(), limit=1440):
            pass
    finally:
        engine.dispose()


def views(control: httpx.Client, now_s: float) -> dict[str, str]:
    """Every request of the page, by what it shows."""
    found = {"page": "/"}
    for name, span_s in RANGES_S.items():
        wanted = f"from={now_s - span_s:.0f}&to={now_s:.0f}&origin=client"
        rows = f"/api/v1/requests?failures=true&limit=50&{wanted}"
        found[f"history, {name}"] = f"/api/v1/history?points=120&{wanted}"
        found[f"history of injected, {name}"] = f"/api/v1/history?points=120&{wanted.replace('client', 'injected')}"
        found[f"failures, {name}"] = rows
        found[f"failures of an outcome, {name}"] = f"{rows}&outcome=client_gone"
        found[f"failures of a model, {name}"] = f"{rows}&model={MODELS[-1]}"
        found[f"failures, nothing found, {name}"] = f"{rows}&model=nobody"
    last = control.get(found["failures, 30 d"]).json()[-1]
    found["failures, next page"] = (
        f"{found['failures, 30 d']}&before={last['received_at']}&before_id={last['request_id']}"
    )
    found["one record"] = f"/api/v1/requests/{last['request_id']}"
    for name in ("status", "upstreams", "injections", "config", "config/history", "audit?limit=200", "whoami"):
        found[name.partition("?")[0]] = f"/api/v1/{name}"
    return found


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The control plane's URL of a gateway on that folder."""
    simulator, port, control = free_ports(3)
    commands = (
        [sys.executable, "-m", "replay.simulator", "--port", str(simulator), "--fast"],
        [
            sys.executable, "-m", "proxy.cli", "serve", "--data-dir", str(folder), "--port", str(port),
            "--control-port", str(control), "--upstream", f"http://127.0.0.1:{simulator}",
        ],
    )  # fmt: skip
    with (folder / "serve.log").open("wb") as log, contextlib.ExitStack() as opened:
        for command in commands:
            process = opened.enter_context(subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT))
            opened.callback(process.terminate)
        url = f"http://127.0.0.1:{control}"
        for _ in range(300):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/api/v1/status").status_code == 200:
                    break
            time.sleep(0.1)
        else:
            raise BenchError(f"the gateway does not answer; its output is in {folder / 'serve.log'}")
        yield url


def main() -> int:
    """Measure and print a table; 1 when a view is over the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--folder", type=Path, default=Path(".bench/dashboard"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    fill(given.folder, given.rows)
    took_s: dict[str, list[float]] = {}
    with serving(given.folder) as url, httpx.Client(base_url=url, timeout=60.0) as control:
        last_s: float = control.get("/api/v1/requests?limit=1").json()[0]["received_at"]
        asked = views(control, last_s + 60)
        for _ in range(given.rounds):
            for name, path in asked.items():
                begun_s = time.perf_counter()
                control.get(path).raise_for_status()
                took_s.setdefault(name, []).append(time.perf_counter() - begun_s)
    lines = [
        (name, *(round(1000 * value, 1) for value in (statistics.median(each), max(each), each[0])))
        for name, each in took_s.items()
    ]
    print("| view | median ms | slowest | first |\n|---|---|---|---|")
    for line in lines:
        print("| {} | {} | {} | {} |".format(*line))
    late = [name for name, median, *_ in lines if float(median) > VIEW_S * 1000]
    print(f"views over {VIEW_S * 1000:.0f} ms: {', '.join(late) or 'none'}, of {len(lines)}; {given.rows:,} rows")
    if given.out is not None:
        with given.out.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([("view", "median_ms", "slowest_ms", "first_ms"), *lines])
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
