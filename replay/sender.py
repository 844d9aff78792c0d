"""One sender: its rows of the plan, prepared ahead and sent on their absolute deadlines, however the target fares.

    rows -> prompts, prepared ahead -> sleep(zero + due - now) -> send -> sample -> tally

Rules: every deadline counts from the zero that the coordinator sets once all senders are ready, so lateness never adds
up; a late request goes at once and none is skipped but by `late` "drop", which counts it; a send waits for no
completion (but for a turn of its own session, where `replay.turns` is asked for) and no tokenizer: a prompt that has
not been counted by its time goes as it is. What `max_in_flight` holds back counts as lag. Each request ends in one
sample, whatever happens to it. The first press of `Stop` ends the sending and waits `DRAIN_S` for what is in flight,
the second ends that at once.

Bounded: rows and prompts ahead (`replay.ahead`, `replay.turns`). Not bounded, on purpose: requests in flight.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import importlib
import os
import re
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from replay.ahead import COUNTERS, Ahead, Prepared
from replay.bodies import header_lines
from replay.client import Reply, Request, request_headers
from replay.metrics import SenderFacts, Tally
from replay.options import ReplayOptions, Shard
from replay.priority import Priority
from replay.prompts import WordModel
from replay.report import Progress
from replay.sample import SamplesFile, measure
from replay.schedule import Planned
from replay.timer import Alarm
from replay.turns import Turns
from traces.record import Outcome
from wire.http import ConnectFailed, ConnectionLost, HttpClient
from wire.http1 import encode_lines

DRAIN_S = 10.0
WARM_CONNECTIONS = 32
"""Opened before the zero: what a burst's first requests would else wait for."""
MAX_BURST = 16
"""Requests that are sent before answers are looked at again: about a millisecond."""
GC_THRESHOLD = (50_000, 20, 50)
"""Samples leave no cycles; Python's default would look for some every few milliseconds."""
HEARTBEAT_S = 0.010
"""A hundred wake-ups a second cost a core less than 0.1 %."""
SWITCH_INTERVAL_S = 0.0001
"""How long the thread that reads the trace may keep the loop from the interpreter; Python's 5 ms would be lag."""

Learned = tuple[WordModel | None, int | None]
"""What the target was asked once, for all senders: its tokenizer and its model's longest request."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one of several senders is to do. Goes to other processes as a pickle."""

    trace: Path | None
    options: ReplayOptions
    """With the run's id, this sender's part of `max_in_flight` and a samples file of its own."""
    shards: tuple[Shard, ...]
    learned: Learned
    api_key: str | None = field(repr=False)


@dataclass(slots=True)
class Counts:
    """What a sender counts beside its samples."""

    rows_read: int = 0
    failed_in_source: int = 0
    without_tokens: int = 0
    tried: int = 0
    """Requests begun; each ends in a sample."""
    late_dropped: int = 0
    prompts_counted: int = 0
    over_max_model_len: int = 0
    gaps_estimated: int = 0
    read_late: int = 0
    in_flight_max: int = 0
    """Of several senders the sum, which is at least the most there were at one time."""

    def add(self, other: Counts) -> None:
        """Take another sender's."""
        for each in dataclasses.fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True, slots=True)
class SenderResult:
    """What a sender did. Comes from other processes as a pickle."""

    facts: SenderFacts
    tally: Tally
    counts: Counts
    prompt_method: str
    prompt_notes: tuple[str, ...]
    max_model_len: int | None
    stopped_by: str | None
    """The error that ended the reading of the trace."""
    samples_error: str | None


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


class Sender:
    """`run` is called once."""

    def __init__(
        self,
        planned: Iterator[Planned],
        options: ReplayOptions,
        *,
        run_id: str,
        api_key: str | None,
        stop: Stop,
        learned: Learned | None = None,
    ) -> None:
        self._http = HttpClient(base_url(options), bursts=True)
        self._ahead = open_ahead(planned, options, api_key, self._head)
        self._options = options
        self._extra_headers = header_lines(options.prompts.extra_headers)
        self._run_id = run_id
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._api_key = api_key
        self._stop = stop
        self._learned = learned
        self._samples: SamplesFile | None = None
        self._tally = Tally(options.slo)
        self._counts = Counts()
        self._alarm: Alarm
        self._turns: Turns | None = None
        self._room = asyncio.Event()
        """In the turns."""
        self._settling: set[asyncio.Task[None]] = set()
        self._zero_ns = 0
        self._is_started = False
        self._slots = None if options.max_in_flight is None else asyncio.Semaphore(options.max_in_flight)
        self._limits: set[asyncio.Timeout] = set()
        """Of the requests in flight."""
        self._is_cut = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._in_flight = 0
        self._started_in_turn = 0
        """Since the loop turned."""
        self._stall_max_s: float | None = None
        self._cpu_share: float | None = None

    async def run(self, zero: Callable[[], Awaitable[int]]) -> SenderResult:
        """Prepare, wait for the zero, send, drain; returns when the last request has ended.

        zero: awaited once the first prompts are ready; schedule zero in monotonic nanoseconds.
        Raises ReplayError where the samples file cannot be made, what is wrong in the beginning of the plan.
        """
        raise_file_limit()
        interval_s = sys.getswitchinterval()
        with ExitStack() as undo:
            undo.callback(self._http.close)
            undo.callback(self._ahead.close)
            if self._options.samples is not None:
                self._samples = undo.enter_context(SamplesFile(self._options.samples))
            undo.callback(sys.setswitchinterval, interval_s)
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            undo.callback(gc.unfreeze)
            undo.callback(gc.set_threshold, *gc.get_threshold())
            gc.set_threshold(*GC_THRESHOLD)
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(self._prepare_and_send(group, zero))
                obeying = group.create_task(self._obey_stop(sending))
                await asyncio.wait([sending])
                await self._is_idle.wait()
                obeying.cancel()
        if self._ahead.error is not None and not self._is_started:
            raise self._ahead.error
        return self._result()

    def progress(self) -> Progress:
        """Where it stands; the time is None before the zero."""
        ended, ok = self._tally.ended + self._tally.warmup, self._tally.ok + self._tally.warmup
        elapsed_s = (time.monotonic_ns() - self._zero_ns) / 1e9 if self._is_started else None
        is_draining = self._stop.sending.is_set()
        recent = None if elapsed_s is None else self._tally.recent(elapsed_s)
        return Progress(elapsed_s, self._counts.tried, ok, ended - ok, self._in_flight, is_draining, recent)

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

    async def _prepare_and_send(self, requests: asyncio.TaskGroup, zero: Callable[[], Awaitable[int]]) -> None:
        if self._learned is None:
            await self._ahead.learn()
        else:
            self._ahead.adopt(self._learned)
        async with asyncio.TaskGroup() as group:
            helpers = [group.create_task(self._ahead.fill())]
            if self._ahead.has_tokenizer:
                helpers += [group.create_task(self._ahead.count()) for _ in range(COUNTERS)]
            await self._ahead.first_prompts()
            if self._ahead.error is None:
                with suppress(ConnectFailed, ConnectionLost):  # which the requests will tell
                    await self._http.warm(min(WARM_CONNECTIONS, self._options.max_in_flight or WARM_CONNECTIONS))
                gc.collect()
                gc.freeze()  # what exists now stays: a collection during the run need not walk it
                self._zero_ns = await zero()
                await self._dispatch(requests)
            for helper in helpers:
                helper.cancel()

    async def _dispatch(self, requests: asyncio.TaskGroup) -> None:
        self._is_started = True
        self._alarm = Alarm()
        began_ns, began_cpu_ns = time.monotonic_ns(), time.process_time_ns()
        priority = Priority()
        heart = _Heart(priority)
        try:
            if self._options.sessions == "independent":
                await self._send_in_order(requests)
            else:
                self._turns = Turns(self._options.sessions, self._options.speed, self._zero_ns)
                await self._send_turns(requests, self._turns)
        finally:
            self._alarm.close()
            self._stall_max_s = heart.stop()
            priority.close()
            wall_ns = time.monotonic_ns() - began_ns
            self._cpu_share = (time.process_time_ns() - began_cpu_ns) / wall_ns if wall_ns else None

    async def _send_in_order(self, requests: asyncio.TaskGroup) -> None:
        while (prepared := await self._ahead.next()) is not None:
            due_ns = self._zero_ns + round(prepared.row.due_s * 1e9)
            await self._alarm.until(due_ns)
            await self._begin(requests, prepared, due_ns)

    async def _send_turns(self, requests: asyncio.TaskGroup, turns: Turns) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read_turns(turns))
            while not turns.is_over:
                first_ns = turns.first_ns
                if first_ns is None or first_ns > time.monotonic_ns():
                    await self._alarm.until(first_ns)
                    continue
                turn = turns.pop()
                self._room.set()
                await self._begin(requests, turn.prepared, turn.ready_ns)

    async def _read_turns(self, turns: Turns) -> None:
        while (prepared := await self._ahead.next()) is not None:
            has_waited = turns.is_full
            while turns.is_full:
                self._room.clear()
                await self._room.wait()
            now_ns = time.monotonic_ns()
            turns.add(prepared, now_ns)
            self._counts.read_late += has_waited and now_ns > self._zero_ns + round(prepared.row.due_s * 1e9)
            self._alarm.ring()
        turns.close()
        self._alarm.ring()

    def _head(self, row: Planned) -> bytes:
        """The header lines of a row's request, but for Content-Length."""
        options = self._options
        return encode_lines(
            request_headers(
                row,
                self._run_id,
                self._api_key,
                self._extra_headers,
                injection_token=options.injection_token,
            )
        )

    async def _begin(self, requests: asyncio.TaskGroup, prepared: Prepared, ready_ns: int) -> None:
        """Start a request whose moment has come, or drop it."""
        held_ns = 0
        if self._slots is not None:
            asked_ns = time.monotonic_ns()
            await self._slots.acquire()
            held_ns = time.monotonic_ns() - asked_ns
        options = self._options
        if options.late == "drop" and (now_ns := time.monotonic_ns()) - ready_ns > options.late_after_s * 1e9:
            self._counts.late_dropped += 1
            self._end(prepared, now_ns)
            return
        request = Request(self._http, options.endpoint, prepared.head, prepared.body, keep_text=self._ahead.wants_text)
        is_started = request.start()
        prepared.is_sent = True
        self._counts.tried += 1
        self._in_flight += 1
        self._counts.in_flight_max = max(self._counts.in_flight_max, self._in_flight)
        self._is_idle.clear()
        requests.create_task(self._request(prepared, request, ready_ns, held_ns))
        # What was started needs no turn of the loop: a burst goes out in one piece, and answers wait for its end.
        self._started_in_turn = self._started_in_turn + 1 if is_started else 0
        if not is_started or self._started_in_turn >= MAX_BURST:
            self._started_in_turn = 0
            await asyncio.sleep(0)

    async def _request(self, prepared: Prepared, request: Request, ready_ns: int, held_ns: int) -> None:
        row, options = prepared.row, self._options
        self._counts.prompts_counted += prepared.is_counted
        if self._ahead.max_model_len is not None:
            asked_tokens = (row.request_tokens or 0) + (row.response_tokens or 0)
            self._counts.over_max_model_len += asked_tokens > self._ahead.max_model_len
        limit = asyncio.timeout(options.timeout_s)
        self._limits.add(limit)
        reply = await request.finish(limit)
        self._limits.discard(limit)
        if self._is_cut and reply.outcome is Outcome.UPSTREAM_TIMEOUT:
            reply = dataclasses.replace(
                reply, outcome=Outcome.CLIENT_GONE, failure_class="cancelled", error="the replay was interrupted"
            )
        self._in_flight -= 1
        if not self._in_flight:
            self._is_idle.set()
        self._answered(prepared, reply)
        self._end(prepared, reply.end_ns)
        turn_ns = None if self._turns is None else ready_ns
        sample = measure(row, reply, self._zero_ns, ready_ns=turn_ns, held_back_ns=held_ns, sender=self._name)
        if row.is_warmup:
            self._tally.warmup += 1
        else:
            self._tally.add(sample, reply.gaps_ns)
        if self._samples is not None:
            self._samples.write(sample)

    def _answered(self, prepared: Prepared, reply: Reply) -> None:
        """What the prompts to come learn from an answer."""
        self._ahead.answered(prepared, reply.text, reply.usage, reply.outcome is Outcome.OK)

    def _end(self, prepared: Prepared, end_ns: int) -> None:
        """Make room for the requests that wait for this one's end."""
        if self._slots is not None:
            self._slots.release()
        if self._turns is not None:
            released = self._turns.ended(prepared, end_ns)
            self._alarm.ring()
            if released is not None and self._ahead.needs_history(released):
                settling = asyncio.get_running_loop().create_task(self._ahead.settle(released))
                self._settling.add(settling)
                settling.add_done_callback(self._settling.discard)

    def _result(self) -> SenderResult:
        ahead, counts = self._ahead, self._counts
        counts.rows_read, counts.failed_in_source = ahead.rows_read, ahead.failed_in_source
        counts.without_tokens = ahead.without_tokens
        counts.gaps_estimated = 0 if self._turns is None else self._turns.estimated
        facts = SenderFacts(
            name=self._name,
            host=self._name.rpartition(":")[0],
            sent=counts.tried,
            dispatch_lag_s=self._tally.distribution("dispatch_lag_s"),
            wake_lag_s=self._tally.distribution("wake_lag_s"),
            cpu_share=self._cpu_share,
            stall_max_s=self._stall_max_s,
        )
        return SenderResult(
            facts,
            self._tally,
            counts,
            ahead.method,
            ahead.notes,
            ahead.max_model_len,
            None if ahead.error is None else str(ahead.error),
            None if self._samples is None else self._samples.close(),
        )


class _Heart:
    """Beats every HEARTBEAT_S on the running loop; the longest delay of a beat is how long the loop stood still."""

    def __init__(self, priority: Priority) -> None:
        self._priority = priority
        self._stall_max_s = 0.0
        self._sleep()

    def _sleep(self) -> None:
        self._due_s = time.monotonic() + HEARTBEAT_S
        self._timer = asyncio.get_running_loop().call_later(HEARTBEAT_S, self._beat)

    def _beat(self) -> None:
        self._stall_max_s = max(self._stall_max_s, time.monotonic() - self._due_s)
        self._priority.look()
        self._sleep()

    def stop(self) -> float:
        """The longest delay in seconds, that of the beat which is due included."""
        self._timer.cancel()
        return max(self._stall_max_s, time.monotonic() - self._due_s)


def base_url(options: ReplayOptions) -> str:
    """Of the target; a trailing /v1 is understood."""
    return re.sub(r"/v1/?$", "", options.target.rstrip("/"))


def open_ahead(
    planned: Iterator[Planned],
    options: ReplayOptions,
    api_key: str | None,
    head: Callable[[Planned], bytes] = lambda _row: b"",
) -> Ahead:
    """What prepares the plan's requests. head: see `Ahead`."""
    return Ahead(
        planned,
        base_url(options),
        endpoint=options.endpoint,
        model=options.model,
        stream=options.stream,
        seed=options.seed,
        api_key=api_key,
        prompts=options.prompts,
        head=head,
    )


def raise_file_limit() -> None:
    """Every request in flight is an open file; the usual soft limit of 1,024 would show up as connect errors."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed."""
    try:
        return importlib.import_module("uvloop").new_event_loop  # type: ignore[no-any-return]
    except ImportError:
        return None
