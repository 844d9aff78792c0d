"""The data plane's composition root: one gateway worker, as a FastAPI application on uvicorn.

`python -m proxy.app` is the worker process. It reads its settings as one line of JSON on standard input and serves the
listening socket it inherits; when standard input ends, its supervisor is gone and it drains and stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any, cast

import msgspec
import uvicorn
from fastapi import FastAPI

from proxy.child import ChildTask, run_child, watch_parent
from proxy.config_error import ConfigError
from proxy.exchange import Gateway, Journal, uuid7
from proxy.fault_lease import follow_leases
from proxy.logs import configure_logging
from proxy.server import ClientConnection
from proxy.sessions import SessionTable, load_key_secret, load_secret
from proxy.settings import Settings
from proxy.shaping_view import SHAPING_VIEW
from proxy.telemetry import WORKER_COUNTERS, WorkerMetrics
from proxy.tls import ServerTls, server_tls
from proxy.upstream import build_fleet
from proxy.view import WorkerView, digest_of, remove_view, write_view
from storage.journal import JOURNAL_COUNTERS, JournalWriter, NotRecording, Unrecorded
from storage.key_file import key_file, read_key_file, signature, touch_used

log = logging.getLogger("burstgate.gateway")

MAINTENANCE_S = 1.0
VIEW_S = 1.0
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DROPPED_IO = JOURNAL_COUNTERS.index("dropped_io")
GC_THRESHOLD = (50_000, 20, 50)
"""A request leaves hardly any cycles; Python's default of 700 spends 7 % of a worker looking for them."""


class GatewayApp(FastAPI):
    """FastAPI for the lifespan. No HTTP request comes through it: `server_config` gives uvicorn a protocol of our own.

    Each path and method belongs to the upstream, so there is nothing to route; and ASGI's cycle with its tasks and
    messages costs more than everything that the gateway does for a request.
    """

    gateway: Gateway
    loop: asyncio.AbstractEventLoop
    changed: asyncio.Event
    """Set when the gateway has taken new settings."""
    tls: ServerTls | None = None


def build_gateway(settings: Settings) -> Gateway:
    """Open the journal, the session table and the upstreams. Raises OSError, but not for a journal on a full disk."""
    journal: Journal
    try:
        if settings.record.enabled:
            journal = _open_journal(settings)
        else:
            journal = NotRecording(settings.journal_dir, uuid7(time.time()), counter_names=WORKER_COUNTERS)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        log.error("requests are not recorded until the disk has room: %s", error)
        journal = Unrecorded(WORKER_COUNTERS)
    sessions = SessionTable(settings.data_dir / "sessions.table")
    metrics = WorkerMetrics(journal.slots)
    return Gateway(
        settings,
        build_fleet(settings),
        journal,
        metrics,
        sessions,
        load_secret(settings.data_dir),
        load_key_secret(settings.data_dir, settings.keys.secret_file),
        read_key_file(key_file(settings.data_dir)),
    )


def _open_journal(settings: Settings, taking_over: Unrecorded | None = None) -> JournalWriter:
    return JournalWriter(
        settings.journal_dir,
        uuid7(time.time()),
        gateway=settings.gateway,
        counter_names=WORKER_COUNTERS,
        segment_bytes=int(settings.journal.segment),
        budget_bytes=int(settings.journal.budget),
        taking_over=taking_over,
    )


def build_app(settings: Settings) -> GatewayApp:
    """A worker's application; everything opens at its start-up."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        assert isinstance(app, GatewayApp)
        try:
            gateway = build_gateway(settings)
        except (OSError, ValueError) as error:
            log.critical("can not start: %s", error)  # uvicorn would keep the reason to itself
            raise
        app.gateway = gateway
        app.loop = asyncio.get_running_loop()
        app.changed = asyncio.Event()
        async with asyncio.TaskGroup() as tasks, gateway.fleet:
            chores = [
                tasks.create_task(_maintain(gateway)),
                tasks.create_task(gateway.watch.run()),
                tasks.create_task(_report(gateway, app.changed)),
                tasks.create_task(gateway.shaping.run()),
            ]
            chores.append(tasks.create_task(follow_leases(gateway)))
            chores.append(tasks.create_task(_watch_files(gateway, app)))
            yield
            for chore in chores:
                chore.cancel()
        if gateway.any_mirror is not None:
            await gateway.any_mirror.drain()
        gateway.stop()
        await asyncio.sleep(0)  # the connections cut there say so
        gateway.fleet.close()
        await asyncio.to_thread(gateway.end_telemetry)  # which still counts
        await asyncio.to_thread(gateway.journal.close)
        gateway.sessions.close()
        remove_view(settings.data_dir, os.getpid())

    return GatewayApp(lifespan=lifespan, openapi_url=None)


async def _maintain(gateway: Gateway) -> None:
    """Open a journal that could not be opened; sync it, retry what the disk refused, measure the budget."""
    interval_s = gateway.settings.journal.fsync_interval_s
    next_upkeep_s = 0.0
    while True:
        await asyncio.sleep(interval_s)
        journal = gateway.journal
        if isinstance(journal, Unrecorded):
            with contextlib.suppress(OSError):
                gateway.journal = _open_journal(gateway.settings, journal)
                gateway.metrics = WorkerMetrics(gateway.journal.slots)
                log.error("requests are recorded again; %d were not", gateway.journal.slots[_DROPPED_IO])
            continue
        try:
            await asyncio.to_thread(journal.sync)
            if time.monotonic() >= next_upkeep_s:
                next_upkeep_s = time.monotonic() + MAINTENANCE_S
                journal.retry_unwritten()
                await asyncio.to_thread(journal.refresh_budget)
                if gateway.shaper is not None or (journal.directory / SHAPING_VIEW).exists():
                    _show_shaping(journal.directory, msgspec.json.encode(gateway.shaping.view()))
        except OSError as error:  # again in a while: a worker without upkeep would lose what a power cut takes
            log.error("the journal could not be looked after: %s", error)


async def _report(gateway: Gateway, changed: asyncio.Event) -> None:
    """Say how the worker is, every second and when its settings have changed."""
    says = True
    while True:
        view = WorkerView(
            os.getpid(),
            time.time(),
            digest_of(gateway.settings),
            len(gateway.watch),
            tuple(gateway.fleet.views()),
        )
        try:
            await asyncio.to_thread(write_view, gateway.settings.data_dir, view)
            says = True
        except OSError as error:
            if says:  # once: it is tried again in a second
                log.error("the control plane does not see this worker: %s", error)
            says = False
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), VIEW_S)
        changed.clear()


def _show_shaping(directory: Path, view: bytes) -> None:
    """For the control plane, which reads a whole file or none. Raises OSError."""
    path = directory / f"{SHAPING_VIEW}.new"
    path.write_bytes(view)
    path.rename(directory / SHAPING_VIEW)


async def _watch_files(gateway: Gateway, app: GatewayApp) -> None:
    """Take over keys, credentials and certificates that change; note which keys are used. It never ends the worker."""
    data_dir = gateway.settings.data_dir
    keys = key_file(data_dir)
    seen = signature(keys)
    noted: dict[str, int] = {}
    while True:
        await asyncio.sleep(MAINTENANCE_S)
        try:
            if signature(keys) != seen:
                seen = signature(keys)
                gateway.take_keys(read_key_file(keys))
            gateway.fleet.reread_keys()
            if app.tls is not None and app.tls.refresh():
                log.warning("the gateway's certificate was read again")
            today = int(time.time() // 86_400)
            used, gateway.keys_used = gateway.keys_used, set()
            for key_id in used:
                if noted.get(key_id) != today:
                    touch_used(data_dir, key_id)
                    noted[key_id] = today
        except (OSError, ValueError, ConfigError) as error:  # what was there before stays in force
            log.error("keys or certificates can not be taken over: %s", error)


def server_config(app: Any, settings: Settings) -> uvicorn.Config:
    """How uvicorn runs a worker. Raises ConfigError for a certificate that can not be used."""

    def connection(*, _loop: asyncio.AbstractEventLoop | None = None, server_state: Any, **_: Any) -> ClientConnection:
        return ClientConnection(app.gateway, _loop or asyncio.get_running_loop(), server_state.connections)

    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=cast("type[asyncio.Protocol]", connection),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=4096,
        timeout_graceful_shutdown=drain_seconds(settings),
    )
    config.load()
    tls = server_tls("tls.cert_file", settings.tls.cert_file, settings.tls.key_file)
    if tls is not None:
        config.ssl = tls.context
        app.tls = tls
    return config


def drain_seconds(settings: Settings) -> int:
    """Whole ones, as uvicorn takes them."""
    return max(1, round(settings.timeouts.drain_s))


def raise_descriptor_limit() -> None:
    """Two descriptors a stream: the usual soft limit of 1,024 would end at 500 of them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class WorkerServer(uvicorn.Server):
    """uvicorn, whose connections hear of the end before they are listed, and whose second signal means it."""

    def __init__(self, config: uvicorn.Config, app: GatewayApp) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain."""
        self._app.gateway.is_stopping = True
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends what still runs; either way every request is recorded."""
        if self.should_exit and self.started:
            self._app.loop.call_soon_threadsafe(self._app.gateway.stop)
        self.should_exit = True


def run_worker(task: ChildTask) -> None:
    """Serve until told to stop."""
    raise_descriptor_limit()
    app = build_app(task.settings)
    server = WorkerServer(server_config(app, task.settings), app)

    def stop() -> None:
        server.should_exit = True

    def reload(settings: Settings) -> None:
        """From another thread; raises what the gateway says to the settings."""
        done: Future[None] = Future()

        def apply() -> None:
            try:
                app.gateway.apply(settings)
                app.changed.set()
                configure_logging("worker", settings.log)
                server.config.timeout_graceful_shutdown = drain_seconds(settings)
            except Exception as error:  # noqa: BLE001 (raised again where it was asked for)
                done.set_exception(error)
            else:
                done.set_result(None)

        while not server.started:
            time.sleep(0.01)
        app.loop.call_soon_threadsafe(apply)
        done.result()

    watch_parent(stop, reload)
    task.tell_ready_when(lambda: server.started)
    gc.freeze()  # what the imports made stays for good: no collection need look at it
    gc.set_threshold(*GC_THRESHOLD)
    server.run(sockets=[socket.socket(fileno=fd) for fd in task.socket_fds])
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    run_child("worker", run_worker)
