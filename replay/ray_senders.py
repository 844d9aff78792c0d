"""Senders as actors on the nodes of a Ray cluster (the extra `burstgate[ray]`), spread over them, a core each.

Each actor runs a `Sender` on an event loop in a thread of its own. A trace of at most `MAX_SENT_BYTES` comes through
Ray's object store; a longer one, and every other file that the options name, must lie at the same path on each node,
as must burstgate itself. So do the API key and the samples travel: over Ray's connections, which are encrypted only if
Ray is told so. Samples come back at the end; those of an actor that died are lost.

One zero for clocks that differ: `ROUND_TRIPS` times each actor is asked its time, as in NTP. The shortest round trip
gives its clock minus ours to within half of that trip, which is reported as `clock_error_s`.
Ray's usage statistics are switched off, here and for a cluster that is started here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from replay.client import ReplayError
from replay.options import plan_file, rows_of
from replay.processes import PROGRESS_S, SenderLost
from replay.report import Progress
from replay.sender import Job, Sender, SenderResult, Stop, fast_loop

MAX_SENT_BYTES = 64 * 1024 * 1024
ROUND_TRIPS = 16
START_TIMEOUT_S = 60.0
"""For an actor to get its core; a cluster that is full would keep it waiting for ever."""
_POLL_S = 0.05
_THREADS = 4
"""Of an actor: one sends, the others answer."""

Said = tuple[SenderResult | Exception, bytes | None]
"""What an actor ends with, and its samples file."""


async def open_cluster(address: str, senders: int | None, trace: Path | None) -> list[RaySender]:
    """Connect, and start the actors: one a node unless told otherwise. Raises ReplayError."""
    try:
        ray = _ray()
    except ImportError:
        raise ReplayError("Ray is not installed: pip install 'burstgate[ray]'") from None
    found = _start_actors(ray, address, senders, trace)
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            for sender in found:
                await sender.start()
    except (TimeoutError, SenderLost) as error:
        for sender in found:
            await sender.close()
        why = error if isinstance(error, SenderLost) else f"no core for each within {START_TIMEOUT_S:g} s"
        raise ReplayError(f"Ray at {address!r}: {len(found)} senders: {why}") from None
    return found


def _ray() -> Any:
    """The package: most of its functions have no types."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of a default to come
    import ray

    return ray


def _start_actors(ray: Any, address: str, senders: int | None, trace: Path | None) -> list[RaySender]:
    is_ours = not ray.is_initialized()
    if is_ours:
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        local: dict[str, Any] = {"num_cpus": senders or 1, "include_dashboard": False}
        try:
            ray.init("local" if address == "local" else address, **quiet, **(local if address == "local" else {}))
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ReplayError(f"Ray at {address!r}: cannot connect: {reason}") from None
    nodes = sum(node["Alive"] for node in ray.nodes())
    actor = ray.remote(max_concurrency=_THREADS, num_cpus=1, scheduling_strategy="SPREAD")(SenderActor)
    is_sent = trace is not None and trace.stat().st_size <= MAX_SENT_BYTES
    data = ray.put(trace.read_bytes()) if trace is not None and is_sent else None
    return [RaySender(actor.remote(), data, ray.shutdown if is_ours else None) for _ in range(senders or nodes)]


class RaySender:
    """A RemoteSender in a worker process of Ray's."""

    lead_s = 1.0

    def __init__(self, actor: Any, data: Any, shutdown: Callable[[], None] | None) -> None:
        self.name = "a Ray actor"
        self.progress: Progress | None = None
        self._actor = actor
        self._data = data
        self._shutdown = shutdown
        self._result: asyncio.Task[Said] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._offset_s = self._error_s = 0.0
        self._samples: Path | None = None

    async def start(self) -> None:
        """Wait for the actor. Raises SenderLost."""
        self.name = await self._ask("name")

    async def prepare(self, job: Job) -> bool:
        """As RemoteSender's."""
        self._samples = job.options.samples
        self._result = asyncio.create_task(self._ask("run", job, self._data))
        while not await self._ask("is_ready"):
            await asyncio.wait([self._result], timeout=_POLL_S)
            if self._result.done():
                said, _ = self._result.result()
                if isinstance(said, Exception):
                    raise said
                return False
        trips = []
        for _ in range(ROUND_TRIPS):
            asked_ns, asked_s = time.perf_counter_ns(), time.time()
            theirs_s = await self._ask("clock")
            trip_s = (time.perf_counter_ns() - asked_ns) / 1e9
            trips.append((trip_s, theirs_s - (asked_s + trip_s / 2)))
        trip_s, self._offset_s = min(trips)
        self._error_s = trip_s / 2
        self._asking = asyncio.create_task(self._ask_progress())
        return True

    async def go(self, zero_ns: int, zero_s: float) -> None:
        """As RemoteSender's; told in the actor's own epoch clock."""
        await self._ask("go", zero_s + self._offset_s)

    def press(self) -> None:
        """As RemoteSender's."""
        self._actor.press.remote()

    async def result(self) -> SenderResult:
        """As RemoteSender's."""
        assert self._result is not None  # prepared before
        said, samples = await self._result
        if isinstance(said, Exception):
            raise said
        if samples is not None and self._samples is not None:
            await asyncio.to_thread(self._samples.write_bytes, samples)
        facts = msgspec.structs.replace(said.facts, clock_offset_s=self._offset_s, clock_error_s=self._error_s)
        return dataclasses.replace(said, facts=facts)

    async def close(self) -> None:
        """As RemoteSender's."""
        tasks = [task for task in (self._result, self._asking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        ray = _ray()
        if ray.is_initialized():  # else another one's shutdown has ended this actor too
            ray.kill(self._actor)
            if self._shutdown is not None:
                self._shutdown()

    async def _ask_progress(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            self.progress = await self._ask("progress")

    async def _ask(self, question: str, *arguments: Any) -> Any:
        """Call a method of the actor. Raises SenderLost."""
        try:
            return await asyncio.wrap_future(getattr(self._actor, question).remote(*arguments).future())
        except _ray().exceptions.RayError as error:
            reason = " ".join(str(error).split())[:200]
            raise SenderLost(f"sender {self.name} died: {type(error).__name__}: {reason}") from None


class SenderActor:
    """In a worker process of Ray's, its methods in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: Stop | None = None
        self._presses = 0
        self._sender: Sender | None = None
        self._zero: asyncio.Future[int] | None = None
        self._is_ready = False

    def name(self) -> str:
        """Of this process, as `host:pid`."""
        return f"{socket.gethostname()}:{os.getpid()}"

    def clock(self) -> float:
        """This host's epoch seconds."""
        return time.time()

    def is_ready(self) -> bool:
        """The sender waits for its zero."""
        return self._is_ready

    def progress(self) -> Progress | None:
        """Of the sender, once there is one."""
        return None if self._sender is None else self._sender.progress()

    def go(self, zero_s: float) -> None:
        """The zero, in this host's epoch seconds."""
        zero_ns = time.monotonic_ns() + round((zero_s - time.time()) * 1e9)
        if self._loop is not None and self._zero is not None:
            self._loop.call_soon_threadsafe(_set, self._zero, zero_ns)

    def press(self) -> None:
        """As `Stop.press`; one that comes too soon is kept."""
        with self._lock:
            self._presses += 1
            if self._loop is not None and self._stop is not None:
                self._loop.call_soon_threadsafe(self._stop.press)

    def run(self, job: Job, data: bytes | None) -> Said:
        """Send. data: the trace, where it is not to be read from its path."""
        with ExitStack() as undo:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="burstgate-")))
            samples = None if job.options.samples is None else folder / "samples.jsonl"
            trace = job.trace
            try:
                if data is not None and trace is not None:
                    trace = folder / trace.name
                    trace.write_bytes(data)
                own = dataclasses.replace(job, trace=trace, options=dataclasses.replace(job.options, samples=samples))
                runner = undo.enter_context(asyncio.Runner(loop_factory=fast_loop()))
                result = runner.run(_send(self, own))
                return result, None if samples is None else samples.read_bytes()
            except (ReplayError, ValueError, OSError) as error:
                return error, None

    def begin(self, stop: Stop) -> asyncio.Future[int]:
        """In the loop that sends, before it does: presses go to `stop` from now on. Returns the zero to come."""
        with self._lock:
            self._loop, self._stop = asyncio.get_running_loop(), stop
            for _ in range(self._presses):
                stop.press()
        self._zero = self._loop.create_future()
        return self._zero

    def show(self, sender: Sender) -> None:
        """Whose progress is asked for."""
        self._sender = sender

    def set_ready(self) -> None:
        """The first prompts are there."""
        self._is_ready = True

    def end(self) -> None:
        """The loop is about to close."""
        with self._lock:
            self._loop = None


async def _send(actor: SenderActor, job: Job) -> SenderResult:
    """Outside the class, because Ray would run all methods of one with a coroutine in a single thread."""
    stop = Stop()
    zero = actor.begin(stop)

    async def ready() -> int:
        actor.set_ready()
        return await zero

    planned = rows_of(plan_file(job.trace, job.options), job.shards)
    run_id = job.options.run_id or ""
    sender = Sender(planned, job.options, run_id=run_id, api_key=job.api_key, stop=stop, learned=job.learned)
    actor.show(sender)
    try:
        return await sender.run(ready)
    finally:
        actor.end()


def _set(zero: asyncio.Future[int], zero_ns: int) -> None:
    if not zero.done():  # else a press came first
        zero.set_result(zero_ns)
