"""A replay: one sender in this process or several elsewhere, one zero for all, their samples and figures as one.

    plan -> senders ready -> zero, noted before the first send -> progress -> samples and tallies merged -> summary

Rules: what the target must be asked is asked once, before there are senders. The zero is set when every sender has its
first prompts, or is the asked `start_at_s`. Ctrl-C goes to all senders, as `replay.sender` says. A sender that dies is
no end of the others: its samples that reached the disk count, its other rows are lost and counted, and the run is not
good. A summary is made however the run ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from replay.ahead import Ahead
from replay.bodies import header_lines
from replay.client import ReplayError as ReplayError
from replay.client import check_target, origin_headers, read_api_key
from replay.metrics import Recent, SenderFacts, Summary, Tally, Workload
from replay.options import ReplayOptions as ReplayOptions
from replay.options import Shard, check_start_at, rows_of
from replay.options import plan_file as plan_file
from replay.page import page
from replay.processes import ChildSender, RemoteSender, SenderLost
from replay.prompts import with_block_tokens
from replay.report import Progress, progress_shown, render, summary_json
from replay.rows import source_rate_rps
from replay.sample import Sample, SamplesFile
from replay.schedule import Planned
from replay.scrape import metrics_urls, scraping
from replay.sender import Counts, Job, Learned, Sender, SenderResult, base_url, fast_loop, open_ahead
from replay.sender import Stop as Stop
from replay.verdict import judged
from wire.http import HttpClient

if TYPE_CHECKING:
    from rich.console import Console

PROGRESS_S = 0.5
PROCESS_RPS = 1000.0
"""What one process sends on time; a higher rate, where it is known beforehand, gets more of them."""


def replay(trace: Path | None, options: ReplayOptions, *, console: Console) -> Summary:
    """Replay a trace file, or without one a profile; blocks until it is over, shows progress and the summary, writes
    the files asked for.

    Raises ReplayError when it cannot start, TraceFormatError or ValueError for what is wrong in the trace's beginning,
    OSError where the trace cannot be read. An error further down ends the run early: `Summary.stopped_by`.
    """
    for path in (options.json, options.html):
        if path is not None and not path.parent.is_dir():
            raise ReplayError(f"{path}: no such directory")
    if options.start_at_s is not None:
        check_start_at(options.start_at_s, time.time())
    is_here = options.ray is None and process_count(options, os.cpu_count() or 1) == 1
    if not is_here and trace is not None and trace.exists() and not trace.is_file():
        raise ReplayError(f"{trace}: expected a regular file, which each sender reads by itself")
    planned = rows_of(plan_file(trace, options), [] if options.shard is None else [options.shard])
    options = dataclasses.replace(options, prompts=with_block_tokens(options.prompts, trace, options.format))
    stop = Stop()
    with asyncio.Runner(loop_factory=fast_loop()) as runner, ExitStack() as undo:
        show = None if options.quiet else undo.enter_context(progress_shown(console))
        scraper = undo.enter_context(scraping(metrics_urls(options.target, options.metrics_urls)))
        with _signals(runner.get_loop(), stop.press):
            if is_here:
                summary = runner.run(run(planned, options, stop=stop, on_progress=show))
            else:
                summary = runner.run(_run_elsewhere(trace, options, stop, show))
        scraper.stop()
    summary = judged(msgspec.structs.replace(summary, server=scraper.facts(summary.started_at)), options.limits())
    if options.json is not None:
        _write_whole(options.json, summary_json(summary))
    if options.html is not None:
        _write_whole(options.html, page(summary))
    if not options.quiet:
        console.print(render(summary))
    return summary


def process_count(options: ReplayOptions, cores: int) -> int:
    """Sender processes on this host: those asked for, else as many as a rate that is known beforehand needs.

    One core is left to the target or the network; a rate that only the trace knows gets one process.
    """
    if options.processes is not None:
        return options.processes
    rate_rps = options.arrivals.rate_rps or options.source.target_rps or 0.0
    return max(1, min(math.ceil(rate_rps / PROCESS_RPS), cores - 1, options.max_in_flight or cores))


async def run(
    planned: Iterable[Planned],
    options: ReplayOptions,
    *,
    stop: Stop | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    learned: Learned | None = None,
) -> Summary:
    """Send the planned rows from this process, in order of `due_s`; returns when the last request has ended.

    learned: of the target, instead of asking it. Raises as `replay` does.
    """
    stop = stop or Stop()
    start = _Start(options)
    api_key = await _check(options)
    sender = Sender(iter(planned), options, run_id=start.run_id, api_key=api_key, stop=stop, learned=learned)

    async def zero() -> int:
        return start.set(0.0)

    async with _shown(on_progress, sender.progress):
        result = await sender.run(zero)
    return _summary(options, start, [result], stop, result.samples_error)


async def run_senders(
    trace: Path | None,
    options: ReplayOptions,
    senders: Sequence[RemoteSender],
    *,
    stop: Stop,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Send a trace file from several senders; each sends the rows of its shard. Raises as `replay` does."""
    start = _Start(options)
    api_key = await _check(options)
    options = _with_source_rate(trace, options)
    learned = await _learn(options, api_key, stop)
    jobs = _jobs(trace, dataclasses.replace(options, run_id=start.run_id), len(senders), learned, api_key)
    with ExitStack() as undo:
        samples = None if options.samples is None else undo.enter_context(SamplesFile(options.samples))
        obeying = asyncio.create_task(_press(senders, stop))
        undo.callback(obeying.cancel)
        try:
            are_ready = await asyncio.gather(*(sender.prepare(job) for sender, job in zip(senders, jobs, strict=True)))
        except SenderLost as error:
            raise ReplayError(f"{error} before the first send") from None
        async with _shown(on_progress, lambda: _sum_progress(senders, start, stop)):
            if all(are_ready) and not stop.sending.is_set():
                zero_ns = start.set(max(sender.lead_s for sender in senders))
                await asyncio.gather(*(sender.go(zero_ns, start.zero_s or 0.0) for sender in senders))
            ended = await asyncio.gather(*(sender.result() for sender in senders), return_exceptions=True)
        is_cut = stop.sending.is_set() or options.source.passes is None
        cut_s = start.elapsed_s() if is_cut else math.inf
        results: list[SenderResult] = []
        lost_rows = 0
        for sender, job, result in zip(senders, jobs, ended, strict=True):
            if isinstance(result, SenderLost):
                found, lost = await asyncio.to_thread(_found_of, sender.name, str(result), job, cut_s)
                lost_rows += lost
                results.append(found)
            elif isinstance(result, BaseException):
                raise result
            else:
                results.append(result)
        errors = [result.samples_error for result in results]
        if samples is not None:
            await asyncio.to_thread(_join, [job.options.samples for job in jobs], samples)
            errors.append(samples.close())
    return _summary(options, start, results, stop, next(filter(None, errors), None), lost_rows)


async def _run_elsewhere(
    trace: Path | None, options: ReplayOptions, stop: Stop, on_progress: Callable[[Progress], None] | None
) -> Summary:
    senders: list[RemoteSender] = []
    try:
        if options.ray is None:
            senders += [ChildSender() for _ in range(process_count(options, os.cpu_count() or 1))]
        else:
            from replay.ray_senders import open_cluster

            senders += await open_cluster(options.ray, options.senders, trace)
        return await run_senders(trace, options, senders, stop=stop, on_progress=on_progress)
    finally:
        await asyncio.gather(*(sender.close() for sender in senders))


class _Start:
    """A run's id, and its zero once it is set."""

    def __init__(self, options: ReplayOptions) -> None:
        made = f"run-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
        self.run_id = options.run_id or made
        self._asked_s = options.start_at_s
        self._zero_ns: int | None = None
        self.zero_s: float | None = None
        """Epoch seconds."""

    def set(self, lead_s: float) -> int:
        """The zero in monotonic nanoseconds: as asked for, else `lead_s` from now."""
        now_s = time.time()
        self.zero_s = now_s + lead_s if self._asked_s is None else self._asked_s
        self._zero_ns = time.monotonic_ns() + round((self.zero_s - now_s) * 1e9)
        return self._zero_ns

    def elapsed_s(self) -> float:
        """Since the zero; 0 before."""
        return 0.0 if self._zero_ns is None else (time.monotonic_ns() - self._zero_ns) / 1e9


async def _check(options: ReplayOptions) -> str | None:
    """The API key, after a look at the target. Raises ReplayError."""
    try:
        http = HttpClient(base_url(options))
    except ValueError as error:
        raise ReplayError(str(error)) from None
    api_key = read_api_key(options.api_key_env)
    try:
        extra = header_lines(options.prompts.extra_headers)
        if options.injection_token is not None:
            extra = [
                *extra,
                *origin_headers(options.injection_token),
                (b"x-burstgate-run-id", (options.run_id or "").encode()),
            ]
        await check_target(http, options.models, api_key, extra)
    finally:
        http.close()
    return api_key


async def _learn(options: ReplayOptions, api_key: str | None, stop: Stop) -> Learned:
    """The target's tokenizer, for all senders; nothing when a press comes first."""
    ahead: Ahead = open_ahead(iter(()), options, api_key)
    tasks = [asyncio.create_task(ahead.learn()), asyncio.create_task(stop.sending.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return ahead.learned
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        ahead.close()


def _with_source_rate(trace: Path | None, options: ReplayOptions) -> ReplayOptions:
    """With the trace's own rate where a target rate needs it, so that not every sender reads the trace for it."""
    if trace is None or options.source.target_rps is None:
        return options
    source = dataclasses.replace(options.source, speed=options.speed, seed=options.seed)
    found_rps = source_rate_rps(trace, source, options.format)
    return dataclasses.replace(options, source=dataclasses.replace(options.source, source_rps=found_rps))


def _jobs(trace: Path | None, options: ReplayOptions, senders: int, learned: Learned, api_key: str | None) -> list[Job]:
    """One for each sender: a shard each of the plan, or of this run's shard of it; `max_in_flight` is shared."""
    jobs = []
    outer = [] if options.shard is None else [options.shard]
    for index in range(senders):
        part, limit = options.samples, options.max_in_flight
        if part is not None:
            part = part.with_name(f".{part.name}.{os.getpid()}.part-{index}.jsonl")
        if limit is not None:
            limit = limit // senders + (index < limit % senders)
        own = dataclasses.replace(options, samples=part, max_in_flight=limit, processes=None, senders=None)
        jobs.append(Job(trace, own, (*outer, Shard(index, senders)), learned, api_key))
    return jobs


async def _press(senders: Sequence[RemoteSender], stop: Stop) -> None:
    """Pass presses on."""
    for press in (stop.sending, stop.waiting):
        await press.wait()
        for sender in senders:
            sender.press()


@asynccontextmanager
async def _shown(
    on_progress: Callable[[Progress], None] | None, progress: Callable[[], Progress]
) -> AsyncIterator[None]:
    """Show progress meanwhile, if it is to be shown."""

    async def show_on(show: Callable[[Progress], None]) -> None:
        while True:
            show(progress())
            await asyncio.sleep(PROGRESS_S)

    showing = None if on_progress is None else asyncio.create_task(show_on(on_progress))
    try:
        yield
    finally:
        if showing is not None:
            showing.cancel()
            with suppress(asyncio.CancelledError):
                await showing


def _sum_progress(senders: Sequence[RemoteSender], start: _Start, stop: Stop) -> Progress:
    known = [sender.progress for sender in senders if sender.progress is not None]
    return Progress(
        start.elapsed_s() if start.zero_s is not None else None,
        sum(each.sent for each in known),
        sum(each.ok for each in known),
        sum(each.failed for each in known),
        sum(each.in_flight for each in known),
        stop.sending.is_set(),
        _worst_recent([each.recent for each in known if each.recent is not None]),
    )


def _worst_recent(parts: Sequence[Recent]) -> Recent | None:
    """Of several senders the worst figure each: theirs can not be joined."""
    if not parts:
        return None
    return Recent(
        *(
            max((value for value in values if value is not None), default=None)
            for values in zip(*map(msgspec.structs.astuple, parts), strict=True)
        )
    )


def _read_samples(path: Path) -> Iterator[Sample]:
    """Of a part; what a sender that died left of a line is no sample."""
    decoder = msgspec.json.Decoder(Sample)
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield decoder.decode(line)


def _found_of(name: str, how: str, job: Job, cut_s: float) -> tuple[SenderResult, int]:
    """What is known of a sender that died, and how many of its rows have no sample.

    how: it died. cut_s: rows that are due later would not have been sent; seconds after the zero.
    """
    counts, tally = Counts(), Tally(job.options.slo)
    path = job.options.samples
    for sample in _read_samples(path) if path is not None and path.exists() else ():
        counts.tried += 1
        if sample.is_warmup:
            tally.warmup += 1
        else:
            tally.add(sample)
    sendable = 0
    for row in rows_of(plan_file(job.trace, job.options), job.shards):
        if row.due_s > cut_s:
            break
        counts.rows_read += 1
        sendable += row.is_sendable
        counts.failed_in_source += row.is_failure and not row.is_sendable
        counts.without_tokens += not row.is_failure and not row.is_sendable
    facts = SenderFacts(
        name=name,
        host=name.rpartition(":")[0],
        sent=counts.tried,
        dispatch_lag_s=tally.distribution("dispatch_lag_s"),
        wake_lag_s=tally.distribution("wake_lag_s"),
        cpu_share=None,
        stall_max_s=None,
        lost=how,
    )
    words, max_model_len = job.learned
    found = SenderResult(facts, tally, counts, "usage" if words is None else "tokenize", (), max_model_len, None, None)
    return found, max(sendable - counts.tried, 0)


def _join(parts: Iterable[Path | None], samples: SamplesFile) -> None:
    """Move the senders' samples into one file."""
    for part in parts:
        if part is not None and part.exists():
            for sample in _read_samples(part):
                samples.write(sample)
            part.unlink()


def _summary(
    options: ReplayOptions,
    start: _Start,
    results: Sequence[SenderResult],
    stop: Stop,
    samples_error: str | None,
    lost_rows: int = 0,
) -> Summary:
    """The figures of all senders, not judged. lost_rows: without a sample, of senders that died."""
    tally, counts = Tally(options.slo), Counts()
    for result in results:
        tally.merge(result.tally)
        counts.add(result.counts)
    sendable = counts.rows_read - counts.failed_in_source - counts.without_tokens
    workload = Workload(
        target=base_url(options),
        model=options.model,
        endpoint=options.endpoint,
        stream=options.stream and options.endpoint != "embeddings",
        run_id=start.run_id,
        speed=options.speed,
        warmup_s=options.warmup_s,
        process=options.arrivals.process,
        seed=options.seed,
        ties=options.ties,
        max_in_flight=options.max_in_flight,
        started_at=start.zero_s,
        rows_read=counts.rows_read,
        failed_in_source=counts.failed_in_source,
        without_tokens=counts.without_tokens,
        unsent=sendable - counts.tried - counts.late_dropped - lost_rows,
        is_interrupted=stop.sending.is_set(),
        stopped_by=next((result.stopped_by for result in results if result.stopped_by is not None), None),
        prompt_method=next((result.prompt_method for result in results if result.prompt_method != "usage"), "usage"),
        prompt_notes=tuple(dict.fromkeys(note for result in results for note in result.prompt_notes)),
        prompts_counted=counts.prompts_counted,
        max_model_len=next((result.max_model_len for result in results if result.max_model_len is not None), None),
        over_max_model_len=counts.over_max_model_len,
        samples_error=samples_error,
        senders=tuple(result.facts for result in results),
        sessions=options.sessions,
        gaps_estimated=counts.gaps_estimated,
        read_late=counts.read_late,
        late_dropped=counts.late_dropped,
        shard=None if options.shard is None else f"{options.shard.index}/{options.shard.count}",
        lost=lost_rows,
    )
    return tally.summary(workload, counts.in_flight_max)


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
    """Ctrl-C and SIGTERM call `pressed`, where the main thread runs the loop; afterwards what they did before."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        loop.add_signal_handler(number, pressed)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            # uvloop leaves a handler of its own, which does nothing once the loop is closed.
            signal.signal(number, handler or signal.SIG_DFL)
