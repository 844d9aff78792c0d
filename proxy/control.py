"""The control plane's composition root: metrics, status and diagnosis over HTTP, on its own port.

`python -m proxy.control` is its process. It reads the counters files and the database; no request passes through it,
and the gateway does not notice whether it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.admin_auth import AdminGate
from proxy.child import ChildTask, run_child, watch_parent
from proxy.config_error import ConfigError
from proxy.control_keys import keys_router
from proxy.doctor import Check, balance_of, diagnose
from proxy.keeper import KeyKeeper
from proxy.settings import Settings, show_value
from proxy.telemetry import sum_counters, worker_metrics
from proxy.tls import server_tls
from storage.doctor import Balance, live_writers
from storage.errors import DatabaseUnavailable, DatabaseUrlError
from storage.journal import DROP_REASONS, directory_bytes

log = logging.getLogger("burstgate.control")

BALANCE_AGE_S = 10.0
"""How old the database's and the journal's part of the metrics may be: a scrape never waits for the database."""
MAX_READ_BYTES = 256 * 1024**2
"""A journal larger than this (the database has been away for long) is not read for the metrics."""


class _Balances:
    """The accounting identity's slow terms, taken in the background."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.latest: Balance | None = None
        self.is_database_up = False

    async def keep(self) -> None:
        """Take them again and again."""
        while True:
            try:
                if directory_bytes(self._settings.journal_dir) <= MAX_READ_BYTES:
                    self.latest = await asyncio.to_thread(balance_of, self._settings)
                    self.is_database_up = True
            except (DatabaseUnavailable, DatabaseUrlError, OSError):
                self.is_database_up = False
            await asyncio.sleep(BALANCE_AGE_S)


async def _watch_certificate(app: FastAPI) -> None:
    while True:
        await asyncio.sleep(1.0)
        try:
            if app.state.tls is not None and app.state.tls.refresh():
                log.warning("the control plane's certificate was read again")
        except ConfigError as error:  # the old one stays
            log.error("%s", error)


class _Metrics(Collector):
    """All workers and the identity in one scrape."""

    def __init__(self, settings: Settings, balances: _Balances) -> None:
        self._settings = settings
        self._balances = balances

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        journal = self._settings.journal_dir
        yield from worker_metrics(sum_counters(journal))
        yield GaugeMetricFamily("burstgate_workers", "Gateway workers that live.", live_writers(journal))
        yield GaugeMetricFamily(
            "burstgate_journal_size_bytes", "Size of the journal's segments.", directory_bytes(journal)
        )
        yield GaugeMetricFamily(
            "burstgate_database_up", "The database answered when last asked.", float(self._balances.is_database_up)
        )
        balance = self._balances.latest
        if balance is not None:
            yield CounterMetricFamily(
                "burstgate_records_in_database", "Records committed to the database.", balance.in_database
            )
            yield GaugeMetricFamily(
                "burstgate_records_in_journal", "Requests begun or ended, not yet committed.", balance.in_journal
            )


class Status(msgspec.Struct, frozen=True):
    """What runs, in one look."""

    version: str
    gateway: str
    upstreams: tuple[str, ...]
    workers_alive: int
    workers_wanted: int
    in_flight: int
    accepted: int
    dropped: dict[str, int]
    journal_bytes: int
    database: str
    is_database_up: bool
    uptime_s: float


def build_control(settings: Settings) -> FastAPI:
    """The control plane's application. New settings go to its `state.settings`."""
    balances = _Balances(settings)
    registry = CollectorRegistry()
    registry.register(_Metrics(settings, balances))
    started_s = time.monotonic()
    version = importlib.metadata.version("burstgate")

    key_keeper = KeyKeeper(settings)

    async def lifespan(app: FastAPI) -> Any:
        key_keeper.recall()
        async with asyncio.TaskGroup() as tasks:
            chores = [tasks.create_task(each) for each in (balances.keep(), key_keeper.keep(), _watch_certificate(app))]
            yield
            for chore in chores:
                chore.cancel()

    app = FastAPI(
        title="burstgate control plane",
        version=version,
        lifespan=contextlib.asynccontextmanager(lifespan),
        docs_url=None,  # its page fetches scripts from elsewhere
        redoc_url=None,
    )

    app.state.settings = settings
    app.state.keeper = key_keeper
    app.state.tls = None
    app.add_middleware(AdminGate, keeper=key_keeper, settings=lambda: app.state.settings)
    app.include_router(keys_router(key_keeper))

    def as_json(value: object) -> Response:
        return Response(msgspec.json.encode(value), media_type="application/json")

    @app.get("/healthz")
    def healthz() -> Response:
        """The control plane answers."""
        return Response("ok\n", media_type="text/plain")

    @app.get("/metrics")
    def metrics() -> Response:
        """Everything for Prometheus, all workers in one scrape."""
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/api/v1/status")
    def status() -> Response:
        """What runs, in one look."""
        values = sum_counters(settings.journal_dir)
        now: Settings = app.state.settings
        return as_json(
            Status(
                version,
                settings.gateway,
                tuple(map(str, now.upstreams)),
                live_writers(settings.journal_dir),
                now.workers,
                values.get("in_flight", 0),
                values.get("accepted", 0),
                {reason: values.get(f"dropped_{reason}", 0) for reason in DROP_REASONS},
                directory_bytes(settings.journal_dir),
                show_value(settings.database),
                balances.is_database_up,
                time.monotonic() - started_s,
            )
        )

    @app.get("/api/v1/doctor")
    def doctor() -> Response:
        """The same checks as `burstgate doctor`."""
        checks: list[Check] = list(diagnose(app.state.settings))
        return as_json({"ok": all(check.is_ok is not False for check in checks), "checks": checks})

    return app


def run_control(task: ChildTask) -> None:
    """Serve until told to stop."""
    app = build_control(task.settings)
    tls = server_tls("tls.control_cert_file", task.settings.tls.control_cert_file, task.settings.tls.control_key_file)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=2,
        proxy_headers=False,  # whose address counts as wrong tokens' is not for a header to say
    )
    config.load()
    if tls is not None:
        config.ssl = tls.context
        app.state.tls = tls
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    def reload(settings: Settings) -> None:
        app.state.settings = app.state.keeper.settings = settings

    watch_parent(stop, reload)
    task.tell_ready_when(lambda: server.started)
    server.run(sockets=[socket.socket(fileno=task.socket_fd)])


if __name__ == "__main__":
    run_child("control", run_control)
