"""The replay itself: an open loop that sends each row on its absolute deadline, however the target fares.

    trace -> plan (in a thread) -> prompts, prepared ahead -> sleep(zero + due - now) -> send -> sample -> tally

Rules: schedule zero is set before the first send and every deadline counts from it, so lateness never adds up; a late
request goes at once and none is skipped; a send waits for no completion and no tokenizer (a prompt that the target has
not counted by its time goes as it is); what `max_in_flight` holds back counts as lag. Each request ends in one sample,
whatever happens to it. The first Ctrl-C stops the sending and waits `DRAIN_S` for what is in flight, the second ends
that at once; both leave a summary.

Bounded: rows and prompts ahead (`replay.ahead`). Not bounded, on purpose: requests in flight.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import importlib
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from replay.ahead import COUNTERS, Ahead, Prepared
from replay.arrivals import ArrivalOptions, open_process, retime
from replay.client import FAMILIES, Endpoint, check_target, read_api_key, request_headers, send
from replay.client import ReplayError as ReplayError
from replay.metrics import Slo, Summary, Tally, Workload
from replay.page import page
from replay.report import Progress, progress_shown, render, summary_json
from replay.sample import SamplesFile, measure
from replay.schedule import Planned, PlanOptions, Ties, plan
from replay.scrape import metrics_urls, scraping
from replay.source import SourceOptions, select
from replay.timer import Alarm
from replay.verdict import MAX_LAG_S, Limits, judged
from traces.codec import read_trace
from traces.record import Outcome
from wire.http import HttpClient

if TYPE_CHECKING:
    from rich.console import Console

DRAIN_S = 10.0
PROGRESS_S = 0.5
SWITCH_INTERVAL_S = 0.0005
"""How long the thread that reads the trace may keep the loop from the interpreter; Python's 5 ms would be lag."""

_ARRIVALS = 1
"""The random numbers of arrivals; prompts and ties have the seed's own."""
_RUN_ID = re.compile(r"[!-~]{1,100}")


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What to replay, at what, and how. Raises ValueError naming the option, the value and the rule."""

    target: str
    """http[s]://HOST[:PORT][/PREFIX]; a trailing /v1 is understood."""
    model: str
    speed: float = 1.0
    limit: int | None = None
    source: SourceOptions = field(default_factory=SourceOptions)
    """Which rows of the trace; its speed and seed are set from here."""
    arrivals: ArrivalOptions = field(default_factory=ArrivalOptions)
    """When they are due, if not as the trace says."""
    warmup_s: float = 0.0
    """Of the replay: what is due before is sent, and in none of the figures."""
    seed: int = 0
    ties: Ties = "spread"
    endpoint: Endpoint = "chat"
    stream: bool = True
    format: str | None = None
    """Of the trace; None finds it out."""
    api_key_env: str | None = None
    """The environment variable that holds the key, so that no secret is an argument."""
    run_id: str | None = None
    """None makes one."""
    samples: Path | None = None
    json: Path | None = None
    html: Path | None = None
    metrics_urls: tuple[str, ...] = ()
    """Of the servers' metrics; none is the target's /metrics."""
    slo: Slo | None = None
    min_goodput: float | None = None
    """Of `slo`: see `replay.verdict`, as for the next two."""
    max_lag_s: float = MAX_LAG_S
    max_in_flight: int | None = None
    timeout_s: float = 600.0
    """A request's, from its start to its last byte."""
    max_error_rate: float | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        self.plan_options()
        if self.arrivals.process != "trace" and self.speed != 1:
            raise ValueError(f"speed: expected 1 with the process {self.arrivals.process}, got {self.speed:g}")
        if self.endpoint not in FAMILIES:
            raise ValueError(f"endpoint: expected chat or completions, got {self.endpoint!r}")
        if not self.model:
            raise ValueError("model: expected a name, got ''")
        if self.run_id is not None and not _RUN_ID.fullmatch(self.run_id):
            raise ValueError(f"run id: expected 1 to 100 visible ASCII characters, got {self.run_id!r}")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ValueError(f"max in flight: expected requests >= 1, got {self.max_in_flight}")
        if not 0 < self.timeout_s < 1e9:
            raise ValueError(f"timeout: expected seconds > 0, got {self.timeout_s:g}")
        if self.min_goodput is not None and self.slo is None:
            raise ValueError("min goodput: expected with an slo, got no slo")
        if self.slo is not None and not self.stream and self.slo.bounds().keys() - {"e2e"}:
            raise ValueError(
                "slo: expected only e2e where answers are not streamed, got a bound on first or next tokens"
            )
        self.limits()

    def plan_options(self) -> PlanOptions:
        """The schedule's part."""
        return PlanOptions(self.speed, 0.0, None, self.limit, self.ties, self.seed, self.warmup_s)

    def limits(self) -> Limits:
        """The verdict's part."""
        return Limits(self.max_lag_s, max_error_rate=self.max_error_rate, min_goodput=self.min_goodput)


class Stop:
    """Ctrl-C, as two events."""

    def __init__(self) -> None:
        self.sending = asyncio.Event()
        self.waiting = asyncio.Event()

    def press(self) -> None:
        """The first press ends the sending, the second also the wait for what is in flight."""
        if self.sending.is_set():
            self.waiting.set()
        self.sending.set()


def plan_file(trace: Path, options: ReplayOptions) -> Iterator[Planned]:
    """The schedule of a trace file, read as it is asked for. Raises as `replay` does."""
    source = dataclasses.replace(options.source, speed=options.speed, seed=options.seed)
    opened = [read_trace(trace, format=options.format)]  # now, so that a file that is none is said before all else
    batches = select(lambda: opened.pop() if opened else read_trace(trace, format=options.format), source)
    process = open_process(options.arrivals)
    if process is not None:
        batches = retime(batches, process, np.random.default_rng([options.seed, _ARRIVALS]))
    return plan(batches, options.plan_options())


def replay(trace: Path, options: ReplayOptions, *, console: Console) -> Summary:
    """Replay a trace file; blocks until it is over, shows progress and the summary, writes the files asked for.

    Raises ReplayError when it cannot start, TraceFormatError or ValueError for what is wrong in the trace's beginning,
    OSError where the trace cannot be read. An error further down ends the run early: `Summary.stopped_by`.
    """
    for path in (options.json, options.html):
        if path is not None and not path.parent.is_dir():
            raise ReplayError(f"{path}: no such directory")
    planned = plan_file(trace, options)
    stop = Stop()
    with asyncio.Runner(loop_factory=_fast_loop()) as runner, ExitStack() as undo:
        undo.enter_context(_signals(runner.get_loop(), stop.press))
        show = None if options.quiet else undo.enter_context(progress_shown(console))
        scraper = undo.enter_context(scraping(metrics_urls(options.target, options.metrics_urls)))
        summary = runner.run(run(planned, options, stop=stop, on_progress=show))
        scraper.stop()
    summary = judged(msgspec.structs.replace(summary, server=scraper.facts(summary.started_at)), options.limits())
    if options.json is not None:
        _write_whole(options.json, summary_json(summary))
    if options.html is not None:
        _write_whole(options.html, page(summary))
    if not options.quiet:
        console.print(render(summary))
    return summary


async def run(
    planned: Iterable[Planned],
    options: ReplayOptions,
    *,
    stop: Stop | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Send the planned rows, in order of `due_s`; returns when the last request has ended. Raises as `replay` does."""
    try:
        http = HttpClient(re.sub(r"/v1/?$", "", options.target.rstrip("/")))
    except ValueError as error:
        raise ReplayError(str(error)) from None
    api_key = read_api_key(options.api_key_env)
    _raise_file_limit()
    await check_target(http, options.model, api_key)
    with ExitStack() as undo:
        undo.callback(http.close)
        samples = None if options.samples is None else undo.enter_context(SamplesFile(options.samples))
        interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        undo.callback(sys.setswitchinterval, interval_s)
        work = _Run(iter(planned), options, http, api_key, samples, stop or Stop(), on_progress)
        return await work.run()


class _Run:
    """One replay's state. `run` is called once."""

    def __init__(
        self,
        planned: Iterator[Planned],
        options: ReplayOptions,
        http: HttpClient,
        api_key: str | None,
        samples: SamplesFile | None,
        stop: Stop,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._ahead = Ahead(
            planned,
            http.url.text,
            endpoint=options.endpoint,
            model=options.model,
            stream=options.stream,
            seed=options.seed,
            api_key=api_key,
        )
        self._options = options
        self._http = http
        self._api_key = api_key
        self._samples = samples
        self._stop = stop
        self._on_progress = on_progress
        self._run_id = options.run_id or f"run-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
        self._tally = Tally(options.slo)
        self._start_ns: int | None = None
        self._started_at: float | None = None
        self._slots = None if options.max_in_flight is None else asyncio.Semaphore(options.max_in_flight)
        self._limits: set[asyncio.Timeout] = set()
        """Of the requests in flight."""
        self._is_cut = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._in_flight = self._in_flight_max = 0
        self._tried = self._prompts_counted = self._over_max_model_len = 0

    async def run(self) -> Summary:
        """Prepare, send, drain, sum up."""
        try:
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(self._prepare_and_send(group))
                helpers = [group.create_task(self._obey_stop(sending))]
                if self._on_progress is not None:
                    helpers.append(group.create_task(self._show_progress(self._on_progress)))
                await asyncio.wait([sending])
                await self._is_idle.wait()
                for helper in helpers:
                    helper.cancel()
        finally:
            gc.unfreeze()
            self._ahead.close()
        if self._ahead.error is not None and self._start_ns is None:
            raise self._ahead.error
        return self._summary()

    async def _obey_stop(self, sending: asyncio.Task[None]) -> None:
        await self._stop.sending.wait()
        sending.cancel()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.waiting.wait(), DRAIN_S)
        self._is_cut = True
        now_s = asyncio.get_running_loop().time()
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(now_s)

    async def _prepare_and_send(self, requests: asyncio.TaskGroup) -> None:
        await self._ahead.learn()
        async with asyncio.TaskGroup() as group:
            helpers = [group.create_task(self._ahead.fill())]
            if self._ahead.has_tokenizer:
                helpers += [group.create_task(self._ahead.count()) for _ in range(COUNTERS)]
            await self._ahead.first_prompts()
            if self._ahead.error is None:
                await self._dispatch(requests)
            for helper in helpers:
                helper.cancel()

    async def _dispatch(self, requests: asyncio.TaskGroup) -> None:
        gc.collect()
        gc.freeze()  # what exists now stays: a collection during the run need not walk it
        self._started_at = time.time()
        self._start_ns = start_ns = time.monotonic_ns()
        alarm = Alarm()
        try:
            await self._send_all(requests, alarm, start_ns)
        finally:
            alarm.close()

    async def _send_all(self, requests: asyncio.TaskGroup, alarm: Alarm, start_ns: int) -> None:
        while (prepared := await self._ahead.next()) is not None:
            await alarm.until(start_ns + round(prepared.row.due_s * 1e9))
            held_ns = -time.monotonic_ns()
            if self._slots is not None:
                await self._slots.acquire()
            held_ns += time.monotonic_ns()
            self._tried += 1
            self._in_flight += 1
            self._in_flight_max = max(self._in_flight_max, self._in_flight)
            self._is_idle.clear()
            requests.create_task(self._request(prepared, start_ns, held_ns))
            await asyncio.sleep(0)  # the request's own first step: in a burst each is sent before the next is begun

    async def _request(self, prepared: Prepared, start_ns: int, held_ns: int) -> None:
        began_ns = time.monotonic_ns()
        row, options = prepared.row, self._options
        prepared.is_sent = True
        self._prompts_counted += prepared.is_counted
        if self._ahead.max_model_len is not None:
            asked_tokens = (row.request_tokens or 0) + (row.response_tokens or 0)
            self._over_max_model_len += asked_tokens > self._ahead.max_model_len
        limit = asyncio.timeout(options.timeout_s)
        self._limits.add(limit)
        headers = request_headers(row, self._run_id, self._api_key)
        reply = await send(self._http, options.endpoint, headers, prepared.body, limit, began_ns)
        self._limits.discard(limit)
        if self._is_cut and reply.outcome is Outcome.UPSTREAM_TIMEOUT:
            reply = dataclasses.replace(reply, outcome=Outcome.CLIENT_GONE, error="the replay was interrupted")
        self._in_flight -= 1
        if self._slots is not None:
            self._slots.release()
        if not self._in_flight:
            self._is_idle.set()
        self._ahead.learn_from(prepared, reply.usage)
        sample = measure(row, reply, start_ns, held_back_ns=held_ns if self._slots is not None else 0)
        if row.is_warmup:
            self._tally.warmup += 1
        else:
            self._tally.add(sample, reply.gaps_ns)
        if self._samples is not None:
            self._samples.write(sample)

    async def _show_progress(self, show: Callable[[Progress], None]) -> None:
        while True:
            show(self._progress())
            await asyncio.sleep(PROGRESS_S)

    def _progress(self) -> Progress:
        ended, ok = self._tally.ended + self._tally.warmup, self._tally.ok + self._tally.warmup
        elapsed_s = None if self._start_ns is None else (time.monotonic_ns() - self._start_ns) / 1e9
        is_draining = self._stop.sending.is_set()
        recent = None if elapsed_s is None else self._tally.recent(elapsed_s)
        return Progress(elapsed_s, self._tried, ok, ended - ok, self._in_flight, is_draining, recent)

    def _summary(self) -> Summary:
        options, ahead = self._options, self._ahead
        workload = Workload(
            target=self._http.url.text,
            model=options.model,
            endpoint=options.endpoint,
            stream=options.stream,
            run_id=self._run_id,
            speed=options.speed,
            warmup_s=options.warmup_s,
            process=options.arrivals.process,
            seed=options.seed,
            ties=options.ties,
            max_in_flight=options.max_in_flight,
            started_at=self._started_at,
            rows_read=ahead.rows_read,
            failed_in_source=ahead.failed_in_source,
            without_tokens=ahead.without_tokens,
            unsent=ahead.rows_read - ahead.failed_in_source - ahead.without_tokens - self._tried,
            is_interrupted=self._stop.sending.is_set(),
            stopped_by=None if ahead.error is None else str(ahead.error),
            prompt_method="tokenize" if ahead.has_tokenizer else "usage",
            prompts_counted=self._prompts_counted,
            max_model_len=ahead.max_model_len,
            over_max_model_len=self._over_max_model_len,
            samples_error=None if self._samples is None else self._samples.close(),
        )
        return self._tally.summary(workload, self._in_flight_max)


def _raise_file_limit() -> None:
    """Every request in flight is an open file; the usual soft limit of 1,024 would show up as connect errors."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed."""
    try:
        return importlib.import_module("uvloop").new_event_loop  # type: ignore[no-any-return]
    except ImportError:
        return None


def _write_whole(path: Path, data: bytes) -> None:
    """Write through a temporary file beside it, so that no reader sees a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ReplayError(f"{path}: {error.strerror}") from None


@contextmanager
def _signals(loop: asyncio.AbstractEventLoop, pressed: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `pressed`, where the main thread runs the loop."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    for number in numbers:
        loop.add_signal_handler(number, pressed)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
