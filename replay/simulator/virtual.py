"""A trace through the simulated GPU on a virtual clock: no sockets, no waiting, same input same result.

Requests arrive open loop when `replay.schedule` has them due. A request that would exceed the model's length is refused
(`invalid_request`), one that meets a full queue too (`rejected`); one that is not answered when the client's patience
ends is taken out of the batch (`upstream_timeout`), between two steps. Rows without token counts are counted and not
sent, as in a replay. The answer has the trace's length.

Latencies are on the virtual clock and by `wire.latency`: no network, no HTTP, no tokenizer. Memory holds the requests
in flight, not the trace.

Prefix sharing is only what the trace says. A row's `prefix_blocks` name the beginnings of its prompt, block by block of
`hash_block_tokens`; each is split into the engine's own blocks. Rows without them share nothing: a floor.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec
import polars as pl

from replay.metrics import Distribution, Histogram
from replay.schedule import Planned, PlanOptions, plan
from replay.simulator.config import SimulatorConfig
from replay.simulator.engine import Engine, SequenceRequest, blocks_for
from traces.record import Outcome
from wire.latency import e2e_s, tpot_s, ttft_s

_LATENCIES = ("queue_s", "ttft_s", "tpot_s", "e2e_s")
_MASK = (1 << 64) - 1
_SPLIT = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd: the parts of a named block get names of their own."""


@dataclass(frozen=True, slots=True)
class VirtualOptions:
    """How a trace is simulated. Raises ValueError naming the option, the value and the rule."""

    plan: PlanOptions = field(default_factory=PlanOptions)
    timeout_s: float | None = None
    """The client's patience with one request."""
    hash_block_tokens: int = 512
    """Prompt tokens that one of a row's `prefix_blocks` stands for. Mooncake's traces have 512."""

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"timeout: expected seconds > 0, got {self.timeout_s:g}")
        if self.hash_block_tokens < 1:
            raise ValueError(f"hash block: expected tokens >= 1, got {self.hash_block_tokens}")


class SimulatedRequest(msgspec.Struct, frozen=True, gc=False):
    """What became of one request: one line of the output. Seconds; None is what never happened."""

    index: int
    """The row's place in the trace, from 0."""
    due_s: float
    """Its arrival, after that of the window's first row."""
    queue_s: float | None
    """From the arrival to the first admission."""
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    """To the last token, or to the failure."""
    request_tokens: int
    response_tokens: int
    """Tokens produced, with that of the step in which its client left."""
    response_tokens_asked: int
    cached_tokens: int
    """Prompt tokens found in the prefix cache when it was first admitted."""
    preemptions: int
    outcome: Outcome


class VirtualSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A simulated trace in figures. Latencies in virtual seconds, over the requests that ended `ok`."""

    rows_read: int
    not_sent: int
    """Rows without a length on one side, so that nothing can be asked for."""
    requests: int
    ok: int
    failures: dict[str, int]
    """By outcome."""
    span_s: float
    """Virtual time from the first arrival to the end of the last step, or of the last request where that is later."""
    offered_rps: float | None
    """Requests over the time from the first arrival to the last."""
    prompt_tokens: int
    """Of the requests that ended `ok`."""
    response_tokens: int
    """Of the requests that ended `ok`."""
    response_tokens_per_s: float | None
    queue_s: Distribution | None
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    e2e_s: Distribution | None
    steps: int
    preemptions: int
    preempted_requests: int
    kv_blocks: int
    kv_usage_mean: float | None
    """Share of the KV cache in use, over `span_s`."""
    kv_usage_peak: float
    prefix_hit_rate: float | None
    """Prompt tokens found in the prefix cache over those looked for; None when none was looked for."""
    max_running: int
    max_waiting: int


class _InFlight:
    __slots__ = (
        "cached_tokens",
        "first_s",
        "index",
        "preemptions",
        "queue_s",
        "request_tokens",
        "response_tokens",
        "s",
    )

    def __init__(self, row: Planned, request_tokens: int, response_tokens: int) -> None:
        self.index = row.index
        self.s = row.due_s
        """The arrival."""
        self.request_tokens = request_tokens
        self.response_tokens = response_tokens
        self.queue_s: float | None = None
        self.first_s: float | None = None
        self.cached_tokens = 0
        self.preemptions = 0


def split_blocks(
    prefix_blocks: Sequence[int], hash_block_tokens: int, block_size: int, prompt_tokens: int
) -> list[int]:
    """Hashes of a prompt's full blocks of the engine, from its named blocks of the trace.

    Equal beginnings get equal hashes, and hashes that differ stay different from there on: each covers all names up to
    that of the token in which its block ends.
    """
    full = min(prompt_tokens, len(prefix_blocks) * hash_block_tokens) // block_size
    chain, covered = [], 0
    for name in prefix_blocks[: blocks_for(full * block_size, hash_block_tokens)]:
        covered = _mixed((covered ^ name) + _SPLIT & _MASK)
        chain.append(covered)
    return [(chain[((at + 1) * block_size - 1) // hash_block_tokens] + at * _SPLIT) & _MASK for at in range(full)]


def _mixed(value: int) -> int:
    """A number < 2^64 that looks random, another for each; the last steps of SplitMix64 (Steele and others, 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


class _Simulation:
    """One run."""

    def __init__(self, config: SimulatorConfig, options: VirtualOptions) -> None:
        self._config = config
        self._options = options
        self._engine = Engine(config)
        self._in_flight: dict[int, _InFlight] = {}
        self._deadlines: deque[tuple[float, int]] = deque()
        self._histograms = {name: Histogram() for name in _LATENCIES}
        self._outcomes: Counter[Outcome] = Counter()
        self._rows_read = self._not_sent = self._preemptions = self._preempted_requests = 0
        self._prompt_tokens = self._response_tokens = 0
        self._max_running = self._max_waiting = 0
        self._first_s: float | None = None
        self._last_arrival_s = self._last_end_s = 0.0

    def run(self, batches: Iterable[pl.DataFrame]) -> Iterator[SimulatedRequest]:
        """The requests in the order in which they end."""
        arrivals = self._sendable(plan(batches, self._options.plan))
        engine, infinite = self._engine, float("inf")
        arrival = next(arrivals, None)
        now_s = 0.0
        while arrival is not None or not engine.is_idle:
            if arrival is not None and engine.is_idle:
                now_s = max(now_s, arrival.due_s)
            while arrival is not None and arrival.due_s <= now_s:
                refused = self._arrive(arrival)
                if refused is not None:
                    yield refused
                arrival = next(arrivals, None)
            yield from self._expire(now_s)
            if engine.is_idle:
                continue
            self._max_waiting = max(self._max_waiting, engine.waiting)
            until_s = arrival.due_s if arrival is not None else infinite
            if self._deadlines:
                until_s = min(until_s, self._deadlines[0][0])
            after_s = engine.skip(now_s, until_s)
            if after_s >= until_s:
                now_s = self._last_end_s = after_s
                continue
            step = engine.step(after_s)
            now_s = self._last_end_s = after_s + step.duration_s
            self._max_running = max(self._max_running, engine.running + len(step.finished))
            for sequence_id, queue_s in step.admitted:
                self._in_flight[sequence_id].queue_s = queue_s
            for sequence_id, tokens in step.cached:
                self._in_flight[sequence_id].cached_tokens = tokens
            for sequence_id in step.preempted:
                self._in_flight[sequence_id].preemptions += 1
            for sequence_id in step.started:
                self._in_flight[sequence_id].first_s = now_s
            finished = step.finished
            if finished:
                late = self._options.timeout_s
                for sequence_id in finished:
                    request = self._in_flight[sequence_id]
                    end_s, outcome = now_s, Outcome.OK
                    if late is not None and now_s > request.s + late:  # its client left during its last step
                        end_s, outcome = request.s + late, Outcome.UPSTREAM_TIMEOUT
                    yield self._end(sequence_id, end_s, outcome, request.response_tokens)

    def _sendable(self, planned: Iterator[Planned]) -> Iterator[Planned]:
        for row in planned:
            self._rows_read += 1
            if row.is_sendable:
                yield row
            else:
                self._not_sent += 1

    def _arrive(self, row: Planned) -> SimulatedRequest | None:
        """Puts a request into the queue, or refuses it."""
        config, engine = self._config, self._engine
        request_tokens, response_tokens = row.request_tokens or 0, row.response_tokens or 0
        request = _InFlight(row, request_tokens, response_tokens)
        self._first_s = row.due_s if self._first_s is None else self._first_s
        self._last_arrival_s = row.due_s
        self._in_flight[row.index] = request
        if request_tokens + response_tokens > config.max_model_len:
            return self._end(row.index, row.due_s, Outcome.INVALID_REQUEST, 0)
        if engine.is_full:
            return self._end(row.index, row.due_s, Outcome.REJECTED, 0)
        hashes: Sequence[int] = ()
        if config.enable_prefix_caching and row.prefix_blocks:
            hashes = split_blocks(row.prefix_blocks, self._options.hash_block_tokens, config.block_size, request_tokens)
        engine.add(SequenceRequest(row.index, request_tokens, response_tokens, row.due_s, hashes))
        if self._options.timeout_s is not None:
            self._deadlines.append((row.due_s + self._options.timeout_s, row.index))
        return None

    def _expire(self, now_s: float) -> Iterator[SimulatedRequest]:
        """Takes out the requests whose clients have left by now."""
        deadlines = self._deadlines
        while deadlines and (deadlines[0][0] <= now_s or deadlines[0][1] not in self._in_flight):
            deadline_s, sequence_id = deadlines.popleft()
            if sequence_id in self._in_flight:
                tokens = self._engine.generated_tokens(sequence_id) or 0
                self._engine.abort(sequence_id)
                yield self._end(sequence_id, deadline_s, Outcome.UPSTREAM_TIMEOUT, tokens)

    def _end(self, sequence_id: int, end_s: float, outcome: Outcome, response_tokens: int) -> SimulatedRequest:
        request = self._in_flight.pop(sequence_id)
        sent_ns, end_ns = round(request.s * 1e9), round(end_s * 1e9)
        # A first token that came in the very step in which the client left has not reached it.
        first_ns = None if request.first_s is None or request.first_s > end_s else round(request.first_s * 1e9)
        ok = outcome is Outcome.OK
        ended = SimulatedRequest(
            sequence_id,
            request.s,
            request.queue_s,
            ttft_s(sent_ns, first_ns),
            tpot_s(first_ns, end_ns, response_tokens) if ok else None,
            e2e_s(sent_ns, end_ns),
            request.request_tokens,
            response_tokens,
            request.response_tokens,
            request.cached_tokens,
            request.preemptions,
            outcome,
        )
        self._outcomes[outcome] += 1
        self._preemptions += request.preemptions
        self._preempted_requests += request.preemptions > 0
        self._last_end_s = max(self._last_end_s, end_s)
        if ok:
            self._prompt_tokens += request.request_tokens
            self._response_tokens += response_tokens
            for name in _LATENCIES:
                value_s = getattr(ended, name)
                if value_s is not None:
                    self._histograms[name].add(value_s)
        return ended

    def summary(self) -> VirtualSummary:
        """The figures so far."""
        engine, requests, ok = self._engine, self._outcomes.total(), self._outcomes[Outcome.OK]
        first_s = self._first_s or 0.0
        span_s = max(0.0, self._last_end_s - first_s)
        arrivals_s = self._last_arrival_s - first_s
        return VirtualSummary(
            rows_read=self._rows_read,
            not_sent=self._not_sent,
            requests=requests,
            ok=ok,
            failures={
                outcome.value: count for outcome, count in sorted(self._outcomes.items()) if outcome is not Outcome.OK
            },
            span_s=span_s,
            offered_rps=requests / arrivals_s if arrivals_s > 0 else None,
            prompt_tokens=self._prompt_tokens,
            response_tokens=self._response_tokens,
            response_tokens_per_s=self._response_tokens / span_s if span_s > 0 else None,
            **{name: histogram.distribution() for name, histogram in self._histograms.items()},
            steps=engine.steps,
            preemptions=self._preemptions,
            preempted_requests=self._preempted_requests,
            kv_blocks=engine.total_blocks,
            kv_usage_mean=engine.block_seconds / engine.total_blocks / span_s if span_s > 0 else None,
            kv_usage_peak=engine.peak_blocks / engine.total_blocks,
            prefix_hit_rate=engine.prefix_hits / engine.prefix_queries if engine.prefix_queries else None,
            max_running=self._max_running,
            max_waiting=self._max_waiting,
        )


class RequestsFile:
    """Requests as JSON lines. Raises OSError, naming the file, when it cannot be made or the disk refuses a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("wb")
        self._encoder = msgspec.json.Encoder()

    def __enter__(self) -> RequestsFile:
        return self

    def __exit__(self, *_: object) -> None:
        with self._naming_the_file():
            self._file.close()

    def write(self, ended: SimulatedRequest) -> None:
        """Adds a line."""
        with self._naming_the_file():
            self._file.write(self._encoder.encode(ended) + b"\n")

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def simulate(
    batches: Iterable[pl.DataFrame],
    config: SimulatorConfig,
    options: VirtualOptions,
    on_end: Callable[[SimulatedRequest], None] = lambda ended: None,
) -> VirtualSummary:
    """Runs a trace to its end on a virtual clock.

    batches: columns of `traces.batch.SCHEMA`, rows in order of `received_at`.
    on_end: called with each request as it ends.
    Raises ValueError as `replay.schedule.plan` does.
    """
    simulation = _Simulation(config, options)
    for ended in simulation.run(batches):
        on_end(ended)
    return simulation.summary()
