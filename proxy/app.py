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
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from proxy.child import ChildTask, run_child, watch_parent
from proxy.errors import GatewayError, error_body
from proxy.exchange import Gateway, Receive, Scope, Send, uuid7
from proxy.sessions import SessionTable, load_secret
from proxy.settings import Settings
from proxy.telemetry import WORKER_COUNTERS, WorkerMetrics
from proxy.upstream import Fleet, Upstream
from storage.journal import JOURNAL_COUNTERS, JournalWriter, Unrecorded

log = logging.getLogger("burstgate.gateway")

CLIENT_KEEP_ALIVE_S = 75
"""Longer than the idle timeouts of common load balancers and SDKs, so that they close first."""
MAINTENANCE_S = 1.0
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DROPPED_IO = JOURNAL_COUNTERS.index("dropped_io")
GC_THRESHOLD = (50_000, 20, 50)
"""A request leaves hardly any cycles; Python's default of 700 spends 7 % of a worker looking for them."""


class GatewayApp(FastAPI):
    """FastAPI for the lifespan; every HTTP request goes straight to the gateway.

    Each path and method belongs to the upstream, so there is nothing to route, and the router's and middleware's cost
    (about 60 µs a request) buys nothing.
    """

    gateway: Gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""
        if scope["type"] == "http":
            await self.gateway(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def build_gateway(settings: Settings) -> Gateway:
    """Open the journal, the session table and the upstreams. Raises OSError, but not for a journal on a full disk."""
    journal: JournalWriter | Unrecorded
    try:
        journal = _open_journal(settings)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        log.error("requests are not recorded until the disk has room: %s", error)
        journal = Unrecorded(WORKER_COUNTERS)
    timeouts = settings.timeouts
    fleet = Fleet(
        [
            Upstream(url, connect_timeout_s=timeouts.connect_s, idle_s=timeouts.upstream_idle_s)
            for url in settings.upstreams
        ]
    )
    sessions = SessionTable(settings.data_dir / "sessions.table") if settings.sessions.infer else None
    metrics = WorkerMetrics(journal.slots)
    return Gateway(settings, fleet, journal, metrics, sessions, load_secret(settings.data_dir))


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
        async with asyncio.TaskGroup() as tasks:
            upkeep = tasks.create_task(_maintain(gateway))
            async with gateway.watch.running(tasks):
                yield
            upkeep.cancel()
        gateway.fleet.close()
        await asyncio.to_thread(gateway.journal.close)
        if gateway.sessions is not None:
            gateway.sessions.close()

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
        except OSError as error:  # again in a while: a worker without upkeep would lose what a power cut takes
            log.error("the journal could not be looked after: %s", error)


class _UnchunkedCycle(RequestResponseCycle):
    """uvicorn's side of one HTTP/1.0 request: no transfer coding (RFC 9112, section 6.1), the end closes."""

    async def send(self, message: Any) -> None:
        """As uvicorn's, with each piece as long as it is."""
        self.chunked_encoding = False
        self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


class GatewayProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with a bound on the request head, and refusals in OpenAI's envelope."""

    limit_bytes = 65536
    _head_bytes = 0
    _piece_bytes = 0
    _is_in_head = False
    _refusal: GatewayError | None = None
    _running: RequestResponseCycle | None = None

    def data_received(self, data: bytes) -> None:
        """Refuse a head that does not end within the limit."""
        self._piece_bytes = len(data)
        super().data_received(data)
        if self._is_in_head:
            self._head_bytes += self._piece_bytes
            if self._head_bytes > self.limit_bytes and not self.transport.is_closing():
                self._refuse_head()
                self.send_400_response("")

    def on_message_begin(self) -> None:
        """A head begins."""
        self._head_bytes = 0
        self._is_in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Refuse a head that came at once and is too large."""
        self._is_in_head = False
        if self._head_bytes + self._piece_bytes > self.limit_bytes:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self.limit_bytes:
                self._refuse_head()
                raise ValueError("request head too large")
        super().on_headers_complete()
        if self.url.endswith(b"?") and not self.scope["query_string"]:
            self.scope["raw_path"] += b"?"  # an empty query, which ASGI can not tell from none
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _UnchunkedCycle

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request that runs, too, and not only the newest of a pipeline."""
        if self._running is not None and self._running is not self.cycle:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def on_message_complete(self) -> None:
        """What lies before the next head does not count as one."""
        self._piece_bytes = 0
        super().on_message_complete()

    def _refuse_head(self) -> None:
        self._refusal = GatewayError(
            431, "request_header_fields_too_large", f"request line and headers over {self.limit_bytes} bytes"
        )

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are no HTTP request."""
        error = self._refusal or GatewayError(400, "invalid_http", msg or "Invalid HTTP request received.")
        reason = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}[error.status]
        body = error_body(error)
        self.transport.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (error.status, reason, len(body), body)
        )
        self.transport.close()


def server_config(app: Any, settings: Settings) -> uvicorn.Config:
    """How uvicorn runs a worker."""
    protocol = type("Protocol", (GatewayProtocol,), {"limit_bytes": int(settings.limits.headers)})
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=4096,
        timeout_keep_alive=CLIENT_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, int(settings.timeouts.drain_s)),
    )


def raise_descriptor_limit() -> None:
    """Two descriptors a stream: the usual soft limit of 1,024 would end at 500 of them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_worker(task: ChildTask) -> None:
    """Serve until told to stop."""
    raise_descriptor_limit()
    settings = task.settings
    server = uvicorn.Server(server_config(build_app(settings), settings))

    def stop() -> None:
        server.should_exit = True

    watch_parent(stop)
    task.tell_ready_when(lambda: server.started)
    gc.freeze()  # what the imports made stays for good: no collection need look at it
    gc.set_threshold(*GC_THRESHOLD)
    server.run(sockets=[socket.socket(fileno=task.socket_fd)])
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    run_child("worker", run_worker)
