"""The control plane's composition root: metrics, status and diagnosis over HTTP, on its own port.

`python -m proxy.control` is its process. It reads the counters files and the database; no request passes through it,
and the gateway does not notice whether it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import msgspec
import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException

from proxy.admin_auth import AdminGate
from proxy.audit import AuditEntry, append_audit, read_audit
from proxy.child import ChildTask, run_child, watch_parent
from proxy.config_error import ConfigError
from proxy.control_config import Steering, config_router
from proxy.control_dashboard import dashboard_router
from proxy.control_injection import Injections, actor_of, injection_router
from proxy.control_keys import keys_router
from proxy.control_live import Live, live_router
from proxy.control_schema import answers, document
from proxy.control_traces import Reader, traces_router
from proxy.doctor import Check, balance_of, diagnose
from proxy.health import State
from proxy.keeper import KeyKeeper
from proxy.logs import configure_logging
from proxy.retention import RetentionState, read_state
from proxy.series import MAX_UPSTREAMS
from proxy.settings import Settings, show_value
from proxy.telemetry import CountersReader, ShapingMetrics, Totals, all_worker_metrics, counting_since_ns, sum_counters
from proxy.tls import server_tls
from proxy.view import read_views
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

    def __init__(self, settings: Settings, balances: _Balances, injections: Injections) -> None:
        self._settings = settings
        self._balances = balances
        self._injections = injections
        self._reader = CountersReader(settings.journal_dir)
        self._shaping = ShapingMetrics(settings.journal_dir)
        self._exporting: Any = None
        self._export_failures = 0

    def export(self, settings: Settings | None) -> None:
        """Send all of it to the collector of these settings from now on; None: to nobody. Raises ConfigError."""
        exporting = None
        if settings is not None and settings.telemetry.otlp_endpoint is not None:
            if self._exporting is not None and self._exporting.settings == settings:
                return
            from proxy.otel import MetricExporting

            exporting = MetricExporting(settings, self._gather)
            exporting.start()
        old, self._exporting = self._exporting, exporting
        if old is not None:
            old.stop()
            self._export_failures += old.failures

    def _gather(self) -> tuple[Totals, list[Metric], int]:
        totals = self._reader.read()
        return totals, list(self._families(totals)), counting_since_ns(self._settings.journal_dir)

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        return self._families(self._reader.read())

    def _families(self, totals: Totals) -> Iterator[Metric]:
        journal = self._settings.journal_dir
        yield from all_worker_metrics(totals)
        failures = self._export_failures + (self._exporting.failures if self._exporting is not None else 0)
        yield CounterMetricFamily(
            "burstgate_metric_exports_failed", "Exports of metrics that the collector did not take.", failures
        )
        yield from self._shaping.collect()
        yield GaugeMetricFamily("burstgate_workers", "Gateway workers that live.", live_writers(journal))
        yield GaugeMetricFamily(
            "burstgate_journal_size_bytes", "Size of the journal's segments.", directory_bytes(journal)
        )
        yield GaugeMetricFamily(
            "burstgate_database_up", "The database answered when last asked.", float(self._balances.is_database_up)
        )
        ended = CounterMetricFamily("burstgate_injections", "Injections ended, by how.", labels=["state"])
        for state, count in self._injections.ended().items():
            ended.add_metric([state], count)
        yield ended
        yield from retention_metrics(read_state(self._settings.data_dir))
        well: dict[str, float] = {}
        for view in read_views(self._settings.data_dir):
            for upstream in view.upstreams:
                well[upstream.name] = max(
                    well.get(upstream.name, 0.0), float(upstream.state not in (State.DOWN, State.EJECTED))
                )
        ups = GaugeMetricFamily(
            "burstgate_upstream_up", "Neither down nor ejected, by at least one worker.", labels=["upstream"]
        )
        for name in sorted(well)[:MAX_UPSTREAMS]:
            ups.add_metric([name], well[name])
        yield ups
        balance = self._balances.latest
        if balance is not None:
            yield GaugeMetricFamily(
                "burstgate_records_missing",
                "Accepted less in the database, in the journal and dropped: 0, or requests are lost (or there twice).",
                balance.missing,
            )
            yield CounterMetricFamily(
                "burstgate_records_in_database",
                "Records committed to the database.",
                balance.in_database + balance.pruned,
            )
            yield GaugeMetricFamily(
                "burstgate_records_in_journal", "Requests begun or ended, not yet committed.", balance.in_journal
            )


def retention_metrics(state: RetentionState | None) -> Iterator[Metric]:
    """What retention has noted, where it ever ran."""
    if state is None:
        return
    yield CounterMetricFamily("burstgate_retention_runs", "Looks at what is due, with what followed.", state.runs)
    yield CounterMetricFamily("burstgate_retention_failures", "Those that database or archive ended.", state.failures)
    yield CounterMetricFamily(
        "burstgate_records_pruned", "Records that retention took out of the database.", state.rows_pruned
    )
    yield CounterMetricFamily(
        "burstgate_records_archived", "Records in the archive's days as they were written.", state.rows_archived
    )
    if state.last_success_at is not None:
        yield GaugeMetricFamily(
            "burstgate_retention_last_success_timestamp_seconds",
            "When retention last did all that was due.",
            state.last_success_at,
        )
    if state.database_bytes is not None:
        yield GaugeMetricFamily(
            "burstgate_database_size_bytes",
            "What the requests take in the database, when retention last looked.",
            state.database_bytes,
        )


class Overview(msgspec.Struct, frozen=True):
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
    read_only: bool
    """Whatever changes something is refused."""


class Diagnosis(msgspec.Struct, frozen=True):
    """What `burstgate doctor` finds."""

    ok: bool
    checks: tuple[Check, ...]


def _error(status: int, message: str) -> Response:
    """OpenAI's error envelope, as everywhere."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def _say_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail))


def _say_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return _error(422, f"{place}: {first['msg']}")


def build_control(settings: Settings, reload: Callable[[], None] | None = None, gateway_url: str = "") -> FastAPI:
    """The control plane's application. New settings go to its `state.settings`.

    reload: asks the supervisor to load its configuration again; None where there is none. gateway_url: where the
    workers listen; empty is host and port of the settings.
    """
    balances = _Balances(settings)
    registry = CollectorRegistry()
    injections = Injections(lambda: app.state.settings, gateway_url)
    source = _Metrics(settings, balances, injections)
    registry.register(source)
    started_s = time.monotonic()
    version = importlib.metadata.version("burstgate")

    key_keeper = KeyKeeper(settings)

    async def lifespan(app: FastAPI) -> Any:
        key_keeper.recall()
        async with asyncio.TaskGroup() as tasks:
            kept = (balances.keep(), key_keeper.keep(), live.keep(), _watch_certificate(app))
            chores = [tasks.create_task(each) for each in kept]
            source.export(settings)
            yield
            source.export(None)
            for chore in chores:
                chore.cancel()
            reader.close()

    app = FastAPI(
        title="burstgate control plane",
        version=version,
        lifespan=contextlib.asynccontextmanager(lifespan),
        docs_url=None,  # its page fetches scripts from elsewhere
        redoc_url=None,
    )

    app.state.settings = settings
    app.add_exception_handler(HTTPException, _say_http_error)
    app.add_exception_handler(RequestValidationError, _say_invalid)

    def current() -> Settings:
        now: Settings = app.state.settings
        return now

    reader = Reader(current)

    live = Live(current, lambda: (balances.latest, balances.is_database_up))

    def audit(actor: str, action: str, detail: dict[str, Any]) -> None:
        append_audit(current().data_dir, actor, action, detail)

    app.include_router(traces_router(reader))
    app.include_router(config_router(Steering(current, reload, audit), actor_of))
    app.state.export = source.export
    app.include_router(injection_router(injections))
    app.state.keeper = key_keeper
    app.state.tls = None
    app.state.live = live
    app.add_middleware(AdminGate, keeper=key_keeper, settings=lambda: app.state.settings)
    app.include_router(keys_router(key_keeper))
    app.include_router(live_router(live))
    app.include_router(dashboard_router())

    def as_json(value: object) -> Response:
        return Response(msgspec.json.encode(value), media_type="application/json")

    @app.get("/healthz", response_class=PlainTextResponse, responses=answers(str, media="text/plain"))
    def healthz() -> Response:
        """The control plane answers."""
        return Response("ok\n", media_type="text/plain")

    @app.get("/metrics", response_class=PlainTextResponse, responses=answers(str, media="text/plain"))
    def metrics(request: Request) -> Response:
        """Everything for Prometheus, all workers in one scrape; with exemplars for those who accept OpenMetrics."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    @app.get("/api/v1/status", responses=answers(Overview))
    def status() -> Response:
        """What runs, in one look."""
        values = sum_counters(settings.journal_dir)
        now: Settings = app.state.settings
        return as_json(
            Overview(
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
                now.control.read_only,
            )
        )

    @app.get("/api/v1/doctor", responses=answers(Diagnosis))
    def doctor() -> Response:
        """The same checks as `burstgate doctor`."""
        checks = tuple(diagnose(app.state.settings))
        return as_json(Diagnosis(all(check.is_ok is not False for check in checks), checks))

    @app.get("/api/v1/audit", summary="Who did what, newest first", responses=answers(list[AuditEntry]))
    def audit_trail(limit: Annotated[int, Query(ge=1, le=10_000)] = 100) -> Response:
        newest = deque(read_audit(current().data_dir), maxlen=limit)
        return as_json(list(reversed(newest)))

    document(app)
    return app


def run_control(task: ChildTask) -> None:
    """Serve until told to stop."""
    supervisor = os.getppid()

    def reload_configuration() -> None:
        if os.getppid() == supervisor:  # else it has gone, and this process is about to
            os.kill(supervisor, signal.SIGHUP)

    app = build_control(task.settings, reload_configuration, task.gateway_url)
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
    app.state.live.is_stopping = lambda: server.should_exit

    def stop() -> None:
        server.should_exit = True

    def reload(settings: Settings) -> None:
        app.state.settings = app.state.keeper.settings = settings
        app.state.export(settings)
        configure_logging("control", settings.log)

    watch_parent(stop, reload)
    task.tell_ready_when(lambda: server.started)
    server.run(sockets=[socket.socket(fileno=task.socket_fd)])


if __name__ == "__main__":
    run_child("control", run_control)
