"""The control plane's routes for bursts and faults: start, watch, stop.

    POST   /api/v1/injections            a plan (`proxy.injection`) as JSON; 201 with the injection's status
    GET    /api/v1/injections            those of this control plane, the newest first
    GET    /api/v1/injections/RUN_ID     one
    DELETE /api/v1/injections[/RUN_ID]   the kill switch: that one, or whichever runs

Each injection is a child process; this side starts it, keeps what it says of itself, and kills it where it does not end
within STOP_S of being told to. Errors are in OpenAI's envelope: 403 where `injection.allowed` is false, 409 while
another one runs, 400 for a plan that is none or passes a ceiling, 404 for an unknown run. A body must be declared as
JSON, which no page of another site can do without asking first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from proxy.audit import append_audit
from proxy.control_schema import answers, takes
from proxy.errors import GatewayError, error_body
from proxy.fault_lease import end_lease
from proxy.injection import MAX_PLAN_BYTES, Plan, State, Status, Task, check_plan, injector_pid, new_run_id
from proxy.settings import Settings

log = logging.getLogger("burstgate.control")

STOP_S = 2.0
KEPT_RUNS = 100
MAX_ACTOR = 100
ENDED: tuple[State, ...] = ("completed", "tripped", "stopped", "failed")


class _Run:
    """One injector process and what it last said."""

    def __init__(self, task: Task, settings: Settings) -> None:
        """Starts it. Raises OSError."""
        self._settings = settings
        self.status = Status(task.run_id, task.actor, task.plan, "starting", started_at=time.time())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "proxy.injection"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._stdin_lock = threading.Lock()
        self._write(msgspec.json.encode(task) + b"\n")
        self._reader = threading.Thread(target=self._read, daemon=True, name=f"injection {task.run_id}")
        self._reader.start()

    @property
    def is_over(self) -> bool:
        """It sends nothing any more, nor do its faults hold."""
        return self.status.is_over

    def stop(self, actor: str) -> None:
        """Tell it to end; wait until it has, and kill it after STOP_S."""
        self._write(f"{actor}\n".encode())
        deadline_s = time.monotonic() + STOP_S
        while not self.is_over and time.monotonic() < deadline_s:
            time.sleep(0.01)
        if not self.is_over:
            self._process.kill()
            self._reader.join(STOP_S)

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with self._stdin_lock:
            try:
                self._process.stdin.write(data)
                self._process.stdin.flush()
            except (OSError, ValueError):  # it has ended, which `_read` sees
                return

    def _read(self) -> None:
        process = self._process
        assert process.stdout is not None
        assert process.stdin is not None
        for line in process.stdout:
            try:
                self.status = msgspec.json.decode(line, type=Status)
            except msgspec.DecodeError:  # half a line of one that was killed
                continue
        process.stdout.close()
        code = process.wait()
        with self._stdin_lock, contextlib.suppress(OSError):  # for what was not written
            process.stdin.close()
        if not self.status.is_over:
            end_lease(self._settings.data_dir)
            reason = f"the injector ended with status {code}"
            self.status = msgspec.structs.replace(self.status, state="failed", reason=reason, ended_at=time.time())
            detail = {"run_id": self.status.run_id, "state": "failed", "reason": reason}
            try:
                append_audit(self._settings.data_dir, self.status.actor, "injection.end", detail)
            except OSError as error:
                log.error("the audit can not be written: %s", error)


class Injections:
    """The injections of one control plane. Its methods are for threads.

    settings: as they are now. gateway_url: where the workers listen; empty is by the settings.
    """

    def __init__(self, settings: Callable[[], Settings], gateway_url: str) -> None:
        self._settings = settings
        self._gateway_url = gateway_url
        self._runs: dict[str, _Run] = {}
        self._forgotten: Counter[State] = Counter()
        self._lock = threading.Lock()

    def ended(self) -> dict[State, int]:
        """How many have ended, by how, since this control plane began."""
        with self._lock:
            states = self._forgotten + Counter(run.status.state for run in self._runs.values())
        return {state: states[state] for state in ENDED}

    def start(self, plan: Plan, actor: str) -> Status:
        """Begin one. Raises GatewayError."""
        settings = self._settings()
        if not settings.injection.allowed:
            raise GatewayError(403, "injection_not_allowed", "injection.allowed: expected true, got false")
        target = settings.injection.target or self._gateway_url or _own_url(settings)
        try:
            check_plan(plan, settings.injection, target)
        except (ValueError, OSError) as error:
            raise GatewayError(400, "invalid_plan", " ".join(str(error).split())) from None
        with self._lock:
            running = next((run.status.run_id for run in self._runs.values() if not run.is_over), None)
            pid = injector_pid(settings.data_dir)
            if running is not None or pid is not None:
                raise GatewayError(409, "injection_running", f"another injection runs: {running or f'process {pid}'}")
            run_id = plan.run_id or new_run_id()
            if run_id in self._runs:
                raise GatewayError(409, "run_id_taken", f"run_id: expected a new one, got {run_id!r} again")
            fields = json.loads(settings.model_dump_json())
            try:
                run = _Run(Task(fields, plan, target, run_id, actor), settings)
            except OSError as error:
                raise GatewayError(500, "injection_failed", f"the injector can not start: {error.strerror}") from None
            self._runs[run_id] = run
            while len(self._runs) > KEPT_RUNS:
                self._forgotten[self._runs.pop(next(iter(self._runs))).status.state] += 1
        return run.status

    def all(self) -> list[Status]:
        """The newest first."""
        return [run.status for run in reversed(list(self._runs.values()))]

    def one(self, run_id: str) -> Status:
        """Raises GatewayError for one that is unknown."""
        return self._run(run_id).status

    def stop(self, run_id: str | None, actor: str) -> Status:
        """End one, or the one that runs; returns when it has. Raises GatewayError where there is none."""
        if run_id is None:
            run = next((run for run in self._runs.values() if not run.is_over), None)
            if run is None:
                raise GatewayError(404, "no_injection", "no injection runs")
        else:
            run = self._run(run_id)
        if not run.is_over:
            run.stop(actor)
        return run.status

    def _run(self, run_id: str) -> _Run:
        run = self._runs.get(run_id)
        if run is None:
            raise GatewayError(404, "no_injection", f"no injection {run_id!r} of this control plane")
        return run


def injection_router(injections: Injections) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["injection"])

    @router.post(
        "/api/v1/injections",
        status_code=201,
        responses=answers(Status, 409, 413, 415, 500, status=201),
        openapi_extra=takes(Plan),
    )
    async def start(request: Request) -> Response:
        """Start a burst or faults on the running gateway."""
        try:
            plan = await _plan_of(request)
            return _as_json(await run_in_threadpool(injections.start, plan, actor_of(request)), 201)
        except GatewayError as error:
            return _refusal(error)

    @router.get("/api/v1/injections", responses=answers(list[Status]))
    def all_of_them() -> Response:
        """The injections of this control plane, the newest first."""
        return _as_json(injections.all())

    @router.get("/api/v1/injections/{run_id}", responses=answers(Status, 404))
    def one(run_id: str) -> Response:
        """How an injection stands."""
        try:
            return _as_json(injections.one(run_id))
        except GatewayError as error:
            return _refusal(error)

    @router.delete("/api/v1/injections", responses=answers(Status, 404))
    def stop_any(request: Request) -> Response:
        """The kill switch: stop whatever is being injected."""
        try:
            return _as_json(injections.stop(None, actor_of(request)))
        except GatewayError as error:
            return _refusal(error)

    @router.delete("/api/v1/injections/{run_id}", responses=answers(Status, 404))
    def stop(run_id: str, request: Request) -> Response:
        """Stop an injection."""
        try:
            return _as_json(injections.stop(run_id, actor_of(request)))
        except GatewayError as error:
            return _refusal(error)

    return router


async def _plan_of(request: Request) -> Plan:
    """The body. Raises GatewayError."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise GatewayError(415, "invalid_plan", "content-type: expected application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_PLAN_BYTES:
            raise GatewayError(413, "invalid_plan", f"plan: expected at most {MAX_PLAN_BYTES:,} bytes")
    try:
        return msgspec.json.decode(body, type=Plan)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise GatewayError(400, "invalid_plan", f"plan: {str(error).removeprefix('plan: ')}") from None


def actor_of(request: Request) -> str:
    """Who asks: whom authentication has found, else who they say they are, and from where."""
    known = request.scope.get("burstgate.user")
    said = request.headers.get("x-burstgate-actor", "")[:MAX_ACTOR]
    said = "".join(each if each.isprintable() else "?" for each in said)
    address = request.client.host if request.client is not None else "unknown"
    if known is not None and known != "local":
        return str(known)
    return f"{said} ({address})" if said else str(address)


def _own_url(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def _as_json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _refusal(error: GatewayError) -> Response:
    return Response(error_body(error), error.status, media_type="application/json")
