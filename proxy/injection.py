"""A burst or faults injected into a running gateway: the plan, and the process that carries it out.

A plan is YAML or JSON with one source of requests, or faults, or both:

    trace         a window of a trace file: `trace`, `start_s`, `duration_s`; `amplify` sends copies of its sessions
    profile       requests like a WorkloadProfile's: `profile`, `duration_s`; `rate_rps` scales it
    parametric    `rate_rps`, Gamma `shape` (1 is Poisson, lower is burstier), `duration_s`, `request_tokens`,
                  `response_tokens`; or `ramp`, steps of [from second, requests/s]; or `preset: k-ramp`, the staircase
                  2, 4, 8 ... 64 ... 8, 4, 2 requests/s in equal steps over `duration_s`
    faults        shares of clients' requests that are failed on purpose (`proxy.faults`) for `duration_s`;
                  `failures_like` takes how often each log type fails from a profile

`python -m proxy.injection` is a child of the control plane. It reads one line of JSON (`Task`) on standard input and
sends to the gateway's own address like any client, with a token that marks its requests `injected`. It says how it
stands as lines of JSON (`Status`) on standard output. A further line on standard input, or its end, stops it: nothing
more is sent, and what is in flight is aborted. The guard rails (`proxy.guard_rails`) do the same. One injection at a
time: it holds a lock on `injection.lock` in the data directory, which holds its pid, and whose lock dies with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import itertools
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from proxy.audit import append_audit
from proxy.config_error import ConfigError
from proxy.faults import FaultPlan
from proxy.logs import configure_logging
from proxy.settings import InjectionSettings, Settings, show_value, validate

if TYPE_CHECKING:
    from proxy.guard_rails import Readings
    from replay.options import ReplayOptions
    from replay.report import Progress
    from replay.schedule import Planned
    from replay.sender import Stop
    from traces.arrivals import Process
    from traces.profile import WorkloadProfile

log = logging.getLogger("burstgate.injection")

K_RAMP_RPS: Final = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 32.0, 16.0, 8.0, 4.0, 2.0)
K_RAMP_S: Final = 110.0
MAX_PLAN_BYTES: Final = 1024 * 1024

State = Literal["starting", "running", "completed", "tripped", "stopped", "failed"]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to inject. Raises ValueError naming the field, the rule and the value."""

    model: str = ""
    """To ask for; empty is each row's own, of a trace."""
    trace: str | None = None
    profile: str | None = None
    rate_rps: float | None = None
    shape: float | None = None
    ramp: tuple[tuple[float, float], ...] = ()
    preset: Literal["k-ramp"] | None = None
    request_tokens: int = 512
    response_tokens: int = 128
    start_s: float = 0.0
    duration_s: float | None = None
    """Of the source's time, before `speed`."""
    requests: int | None = None
    """At most so many."""
    speed: float = 1.0
    """Divides the source's time."""
    amplify: float = 1.0
    """Multiplies its rate."""
    seed: int = 0
    endpoint: Literal["chat", "completions", "embeddings"] = "chat"
    stream: bool = True
    timeout_s: float = 120.0
    tokenizer: str | None = None
    """A tokenizer.json for prompts of exact length; without one lengths follow from the first answers' usage."""
    run_id: str | None = None
    faults: FaultPlan | None = None
    failures_like: str | None = None

    def __post_init__(self) -> None:
        rates = [self.rate_rps is not None, bool(self.ramp), self.preset is not None]
        if sum(rates) > 1:
            raise ValueError("plan: expected one of rate_rps, ramp and preset, got several")
        if self.trace is not None and (any(rates) or self.profile is not None or self.shape is not None):
            raise ValueError(
                "plan: trace: expected without profile, rate_rps, shape, ramp and preset; amplify scales it"
            )
        if not self.has_load:
            if self.asked_faults is None:
                raise ValueError("plan: expected a trace, a profile, a rate_rps, a ramp, a preset or faults, got none")
            if self.duration_s is None:
                raise ValueError("plan: duration_s: expected with faults alone, got none")
        if self.has_load and self.trace is None and not self.model:
            raise ValueError("plan: model: expected the model to ask for, got none")
        if self.shape is not None and not any(rates):
            raise ValueError("plan: shape: expected with rate_rps, ramp or preset, got it without")
        if self.has_load and self.trace is None and self.preset is None and self.duration_s is self.requests is None:
            raise ValueError("plan: expected duration_s or requests, got neither")
        for name in ("duration_s", "speed", "amplify"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e9:
                raise ValueError(f"plan: {name}: expected a number above 0, got {value:g}")

    @property
    def has_load(self) -> bool:
        """Requests are sent."""
        return self.profile is not None or self.trace is not None or bool(self.ramp) or (
            self.rate_rps is not None or self.preset is not None
        )  # fmt: skip

    @property
    def asked_faults(self) -> FaultPlan | None:
        """The faults; where only a failure model is named, every failure is an answer of status 500."""
        return self.faults or (None if self.failures_like is None else FaultPlan(status_500=1.0))

    @property
    def span_s(self) -> float | None:
        """How long it takes, where the plan itself says so."""
        duration_s = K_RAMP_S if self.preset is not None and self.duration_s is None else self.duration_s
        return None if duration_s is None else duration_s / self.speed

    def files(self) -> Iterator[tuple[str, str]]:
        """The fields that name files, and their paths."""
        for name in ("trace", "profile", "tokenizer", "failures_like"):
            if (path := getattr(self, name)) is not None:
                yield name, path


class Task(msgspec.Struct, frozen=True):
    """What the process is started with."""

    settings: dict[str, Any]
    plan: Plan
    gateway_url: str
    run_id: str
    actor: str


class Status(msgspec.Struct, frozen=True):
    """How an injection stands. Times are epoch seconds."""

    run_id: str
    actor: str
    plan: Plan
    state: State
    reason: str | None = None
    """Why it ended."""
    started_at: float | None = None
    ended_at: float | None = None
    elapsed_s: float = 0.0
    sent: int = 0
    ok: int = 0
    failed: int = 0
    in_flight: int = 0
    rate_rps: float | None = None
    """Achieved so far."""
    lag_max_s: float | None = None
    """The latest of the last sends, behind its plan."""
    readings: dict[str, float | None] | None = None
    """Of the guard rails."""

    @property
    def is_over(self) -> bool:
        """It has ended."""
        return self.state not in ("starting", "running")


def decode_plan(data: bytes, place: str) -> Plan:
    """The plan in YAML or JSON. Raises ValueError of one line naming the place, the field and the rule."""
    try:
        return msgspec.yaml.decode(data, type=Plan)
    except msgspec.ValidationError as error:
        text = str(error).removeprefix("plan: ")
        raise ValueError(f"{place}: {text}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: expected a plan in YAML or JSON: {' '.join(str(error).split())}") from None


def new_run_id() -> str:
    """For a plan without one."""
    return f"injection-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def check_plan(plan: Plan, limits: InjectionSettings, gateway_url: str) -> None:
    """Whether it may and can be carried out, as far as that is known before. Raises ValueError naming the rule."""
    for name, path in plan.files():
        found = Path(path).resolve()
        if limits.trace_dir is not None and not found.is_relative_to(limits.trace_dir.resolve()):
            raise ValueError(f"plan: {name}: expected a file in injection.trace_dir, got {path!r}")
        if not found.is_file():
            raise ValueError(f"plan: {name}: expected a file, got {path!r}")
    faults = _resolved_faults(plan)
    if faults is not None and faults.total > limits.max_share:
        raise ValueError(f"injection.max_share: expected faults of at most {limits.max_share:g}, got {faults.total:g}")
    span_s = plan.span_s
    if span_s is not None and span_s > limits.max_duration_s:
        raise ValueError(f"injection.max_duration_s: expected at most {limits.max_duration_s:g} s, got {span_s:g} s")
    if plan.has_load:
        process = _process(plan)
        peak_rps = 0.0 if process is None else max(process.rates_rps) * plan.speed
        if peak_rps > limits.max_rate_rps:
            raise ValueError(
                f"injection.max_rate_rps: expected at most {limits.max_rate_rps:g} requests/s, got {peak_rps:g}"
            )
        replay_options(plan, gateway_url, plan.run_id or "new", b"", limits)
        planned_rows(plan)


def replay_options(plan: Plan, gateway_url: str, run_id: str, token: bytes, limits: InjectionSettings) -> ReplayOptions:
    """The replay that sends the plan. Raises ValueError naming the option and the rule."""
    from replay.options import ReplayOptions
    from replay.prompts import PromptOptions, with_block_tokens

    prompts = PromptOptions(tokenizer=None if plan.tokenizer is None else Path(plan.tokenizer))
    if plan.trace is not None:
        prompts = with_block_tokens(prompts, Path(plan.trace), None)
    return ReplayOptions(
        target=gateway_url, model=plan.model, speed=plan.speed, limit=plan.requests, seed=plan.seed,
        endpoint=plan.endpoint, stream=plan.stream, prompts=prompts, run_id=run_id, timeout_s=plan.timeout_s,
        api_key_env=limits.api_key_env, injection_token=token,
    )  # fmt: skip


def _process(plan: Plan) -> Process | None:
    """The arrivals asked for; None for a trace's or a profile's own."""
    from traces.arrivals import Process, steady

    shape = 1.0 if plan.shape is None else plan.shape
    if plan.rate_rps is not None and (plan.profile is None or plan.shape is not None):
        return steady(plan.rate_rps * plan.amplify, shape)
    steps = plan.ramp
    if plan.preset is not None:
        step_s = (plan.duration_s or K_RAMP_S) / len(K_RAMP_RPS)
        steps = tuple((number * step_s, rate_rps) for number, rate_rps in enumerate(K_RAMP_RPS))
    if not steps:
        return None
    starts_s, rates_rps = zip(*steps, strict=True)
    return Process(starts_s, rates_rps, (shape,) * len(steps)).scaled(plan.amplify)


def planned_rows(plan: Plan) -> Iterator[Planned]:
    """The plan's requests and when they are due. Raises ValueError or TraceFormatError naming what is wrong."""
    from replay.arrivals import ArrivalOptions
    from replay.rows import open_rows
    from replay.schedule import PlanOptions
    from replay.schedule import plan as scheduled
    from replay.source import SourceOptions
    from traces.generation import fixed_lengths, generate, plain_profile
    from traces.profile import MONDAY_S

    options = PlanOptions(plan.speed, limit=plan.requests, seed=plan.seed)
    duration_s = None if plan.span_s is None else plan.span_s * plan.speed
    if plan.trace is not None:
        scale = None if plan.amplify == 1 else plan.amplify
        source = SourceOptions(
            start_s=plan.start_s, duration_s=duration_s, rate_scale=scale, speed=plan.speed, seed=plan.seed
        )
        return scheduled(open_rows(Path(plan.trace), source, ArrivalOptions()), options)
    if plan.profile is not None:
        profile = _read_profile(plan.profile)
    else:
        profile = plain_profile(fixed_lengths(plan.request_tokens, plan.response_tokens))
    process = _process(plan)
    rate_rps = None if process is not None else (plan.rate_rps or profile.mean_rps) * plan.amplify
    batches = generate(
        profile, seed=plan.seed, duration_s=duration_s, start_s=MONDAY_S + plan.start_s, rate_rps=rate_rps,
        process=process,
    )  # fmt: skip
    return scheduled(batches, options)


def _read_profile(path: str) -> WorkloadProfile:
    from traces.profile import decode_profile

    try:
        return decode_profile(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _resolved_faults(plan: Plan) -> FaultPlan | None:
    """The plan's faults, with the failure shares of the recorded failure model that it names."""
    faults = plan.asked_faults
    if faults is None or plan.failures_like is None:
        return faults
    shares: dict[str, tuple[float, float]] = {}
    for service in _read_profile(plan.failures_like).services:
        requests, failures = shares.get(service.log_type, (0.0, 0.0))
        shares[service.log_type] = requests + service.requests, failures + service.requests * service.failure_share
    return msgspec.structs.replace(
        faults, failure_shares={key: failures / max(requests, 1) for key, (requests, failures) in shares.items()}
    )


def injector_pid(data_dir: Path) -> int | None:
    """The process that injects now; None where none does, whatever an old lock file says."""
    try:
        with (data_dir / _LOCK).open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = lock.read().strip()
                return int(text) if text.isdigit() else -1
    except FileNotFoundError:
        pass
    return None


_LOCK = "injection.lock"


@contextlib.contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """Raises ConfigError where another injection runs, OSError."""
    with (data_dir / _LOCK).open("a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another injection runs (process {injector_pid(data_dir)}); one at a time") from None
        lock.truncate(0)
        lock.write(b"%d\n" % os.getpid())
        lock.flush()
        yield
        lock.truncate(0)


class Injector:
    """One injection, from its start to its one end. say: takes each status on the way."""

    def __init__(self, task: Task, settings: Settings, say: Callable[[Status], None]) -> None:
        self._task = task
        self._say = say
        self._settings = settings
        self._limits = settings.injection
        self._stop: Stop
        self._end: tuple[State, str] | None = None
        self._progress: Progress | None = None
        self._readings: Readings | None = None
        self._started_at: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        """None before it runs."""
        self._is_over = asyncio.Event()
        self.summary: Any = None

    def stop(self, reason: str, state: State = "stopped") -> None:
        """End it now; the first reason counts. From any thread."""
        if self._loop is None:
            self._end = self._end or (state, reason)
            return
        with contextlib.suppress(RuntimeError):  # it has just ended by itself
            self._loop.call_soon_threadsafe(self._stop_now, state, reason)

    def _stop_now(self, state: State, reason: str) -> None:
        if self._end is None:
            self._end = state, reason
        self._is_over.set()
        self._stop.press()
        self._stop.press()

    def status(self) -> Status:
        """As it stands."""
        task, now = self._task, self._progress
        status = Status(task.run_id, task.actor, task.plan, "starting", started_at=self._started_at)
        if self._readings is not None:
            status = msgspec.structs.replace(status, state="running", readings=msgspec.structs.asdict(self._readings))
        if now is not None and now.elapsed_s is not None:
            lag_s = None if now.recent is None else now.recent.lag_max_s
            rate_rps = now.sent / now.elapsed_s if now.elapsed_s > 0 else None
            status = msgspec.structs.replace(
                status, state="running", elapsed_s=now.elapsed_s, sent=now.sent, ok=now.ok, failed=now.failed,
                in_flight=now.in_flight, rate_rps=rate_rps, lag_max_s=lag_s,
            )  # fmt: skip
        return status

    def ended(self) -> Status:
        """The last one."""
        state, reason = self._end or ("completed", "the plan is done")
        status = msgspec.structs.replace(self.status(), state=state, reason=reason, ended_at=time.time())
        found = self.summary
        if found is not None:
            status = msgspec.structs.replace(
                status, sent=found.sent, ok=found.ok, failed=found.sent - found.ok, in_flight=0
            )
            if found.stopped_by is not None and self._end is None:
                status = msgspec.structs.replace(status, state="failed", reason=found.stopped_by)
        return status

    async def run(self) -> None:
        """Send, look at the guard rails, say how it stands; returns at the end, whatever it was."""
        from replay.client import ReplayError
        from replay.sender import Stop

        self._loop = asyncio.get_running_loop()
        self._stop = Stop()
        self._started_at = time.time()
        if self._end is not None:
            return
        guarding = asyncio.create_task(self._guard())
        try:
            await self._carry_out()
        except (ReplayError, ValueError, OSError) as error:
            if self._end is None:
                self._end = "failed", " ".join(str(error).split()) or type(error).__name__
        finally:
            guarding.cancel()
            await asyncio.gather(guarding, return_exceptions=True)

    async def _carry_out(self) -> None:
        from proxy.guard_rails import within
        from proxy.sessions import injection_token, load_secret
        from replay.runner import run

        task = self._task
        if not task.plan.has_load:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_over.wait(), task.plan.span_s)
            return

        def trip(reason: str) -> None:  # the rows before it are still sent
            self._end = self._end or ("tripped", reason)

        token = injection_token(load_secret(self._settings.data_dir))
        options = replay_options(task.plan, task.gateway_url, task.run_id, token, self._limits)
        rows = within(planned_rows(task.plan), self._limits, trip)
        learned = None if task.plan.tokenizer is not None else (None, None)  # no questions beside the plan
        self.summary = await run(rows, options, stop=self._stop, on_progress=self._note, learned=learned)

    def _note(self, progress: Progress) -> None:
        self._progress = progress
        self._say(self.status())

    async def _guard(self) -> None:
        """Check the guard rails every CHECK_S, and keep the faults up as long as they hold."""
        from proxy.fault_lease import end_lease, renew_lease
        from proxy.guard_rails import CHECK_S, LiveWindow, tripped
        from proxy.telemetry import sum_counters

        settings, window = self._settings, LiveWindow()
        faults = _resolved_faults(self._task.plan)
        start_s = time.monotonic()
        try:
            for tick in itertools.count():
                await asyncio.sleep(start_s + tick * CHECK_S - time.monotonic())
                counters = await asyncio.to_thread(sum_counters, settings.journal_dir)
                sent = 0 if self._progress is None else self._progress.sent
                now_s = time.monotonic()
                readings = window.add(now_s, sent, counters)
                reason = None
                if "live_ended" not in counters:
                    reason = "live traffic's counters can not be read"
                elif now_s - start_s > self._limits.max_duration_s + CHECK_S:
                    reason = f"injection.max_duration_s: it has taken {self._limits.max_duration_s:g} s"
                elif readings is not None:
                    self._readings = readings
                    reason = tripped(readings, self._limits)
                if reason is not None:
                    self._stop_now("tripped", reason)
                    return
                if faults is not None:
                    renew_lease(settings.data_dir, self._task.run_id, faults)
                self._say(self.status())
        except OSError as error:
            self._stop_now("failed", f"the guard rails can not be looked at: {error.strerror}")
        finally:
            if faults is not None:
                end_lease(settings.data_dir)

    def obey(self) -> None:
        """Stop at a line on standard input, which says who asks, or at its end. For a thread."""
        said = b""
        while (data := os.read(0, 4096)) and b"\n" not in data:
            said += data
        who = (said + data).decode(errors="replace").strip()
        self.stop(f"stopped by {who}" if who else "stopped: the control plane has ended")


def say(status: Status) -> None:
    """One line for the control plane, which may be gone."""
    with contextlib.suppress(OSError):
        os.write(1, msgspec.json.encode(status) + b"\n")


def _keep(task: Task, settings: Settings, status: Status, summary: Any) -> None:
    """Store the run where a database is there. What is in the way is logged: the audit has it in any case."""
    from storage.engine import open_engine
    from storage.errors import DatabaseUnavailable, DatabaseUrlError, SchemaError
    from storage.runs import Run, store_run

    if settings.database_url is None and not (settings.data_dir / "burstgate.db").exists():
        return
    found = {} if summary is None else msgspec.to_builtins(summary)
    facts = msgspec.to_builtins(status)
    verdict = "good" if status.state == "completed" else "missed"
    run = Run(
        task.run_id, status.started_at or time.time(), task.gateway_url, task.plan.model, status.sent, status.ok,
        verdict, msgspec.json.encode(task.plan).decode(), msgspec.json.encode({**found, "injection": facts}).decode(),
    )  # fmt: skip
    try:
        engine = open_engine(settings.database)
        try:
            store_run(engine, run, ())
        finally:
            engine.dispose()
    except (DatabaseUnavailable, DatabaseUrlError, SchemaError, ValueError) as error:
        log.error("the run is not stored in %s: %s", show_value(settings.database), error)


def main() -> int:
    """The process; its exit status is 0 however the injection ends, and 1 where it could not begin."""
    from replay.sender import fast_loop

    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    configure_logging("injector")
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"\n", b""):  # what lies behind the line is for `_obey`
        line += byte
    task = msgspec.json.decode(line, type=Task)
    try:
        settings = validate(task.settings, {})
        if not settings.injection.allowed:
            raise ConfigError("injection.allowed: expected true, got false")
        with _only_one(settings.data_dir):
            plan = msgspec.to_builtins(task.plan)
            append_audit(settings.data_dir, task.actor, "injection.start", {"run_id": task.run_id, "plan": plan})
            injector = Injector(task, settings, say)
            signal.signal(signal.SIGTERM, lambda *_: injector.stop("stopped by a signal"))
            threading.Thread(target=injector.obey, daemon=True, name="obey").start()
            with asyncio.Runner(loop_factory=fast_loop()) as runner:
                runner.run(injector.run())
            status = injector.ended()
            ended = {
                "run_id": task.run_id, "state": status.state, "reason": status.reason, "sent": status.sent,
                "ok": status.ok, "failed": status.failed, "readings": status.readings,
            }  # fmt: skip
            append_audit(settings.data_dir, task.actor, "injection.end", ended)
        say(status)  # the next one may begin
        _keep(task, settings, status, injector.summary)
    except (ConfigError, OSError) as error:
        now_s = datetime.datetime.now(datetime.UTC).timestamp()
        say(Status(task.run_id, task.actor, task.plan, "failed", str(error), ended_at=now_s))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
