"""The figures of a replay: samples in, one summary out, in memory that does not grow with the run.

Latencies are over requests that ended `ok`; the lag is over all that were sent. Quantiles come from a histogram of
log-spaced bins, each 1 % wide from 1 µs to 10^5 s, so a quantile is within 0.5 % of a sample's value; mean, minimum and
maximum are exact. What is not known is None: an empty sample has no mean.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from replay.sample import Sample
from traces.record import Outcome

LOWEST_S = 1e-6
HIGHEST_S = 1e5
BIN_RATIO = 1.01
_LOG_RATIO = math.log(BIN_RATIO)
_BINS = math.ceil(math.log(HIGHEST_S / LOWEST_S) / _LOG_RATIO) + 2
"""The first holds what is below LOWEST_S, zero and gaps of chunks that arrived together; the last the rest above."""

MAX_ERRORS = 20
"""Different error texts that are counted one by one; the others are counted together."""


class Distribution(msgspec.Struct, frozen=True):
    """A sample in figures, in the unit of its values."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Histogram:
    """Durations in seconds, in constant memory."""

    def __init__(self) -> None:
        self._bins: NDArray[np.int64] = np.zeros(_BINS, np.int64)
        self._sum_s = 0.0
        self._min_s = math.inf
        self._max_s = -math.inf

    def add(self, value_s: float) -> None:
        """Take one value."""
        at = 0 if value_s < LOWEST_S else min(int(math.log(value_s / LOWEST_S) / _LOG_RATIO) + 1, _BINS - 1)
        self._bins[at] += 1
        self._sum_s += value_s
        self._min_s = min(self._min_s, value_s)
        self._max_s = max(self._max_s, value_s)

    def add_all(self, values_s: NDArray[np.float64]) -> None:
        """Take many; shape (n,)."""
        if not values_s.size:
            return
        at = (np.log(np.maximum(values_s, LOWEST_S) / LOWEST_S) / _LOG_RATIO).astype(np.int64) + 1
        at[values_s < LOWEST_S] = 0
        np.add.at(self._bins, np.minimum(at, _BINS - 1), 1)
        self._sum_s += float(values_s.sum())
        self._min_s = min(self._min_s, float(values_s.min()))
        self._max_s = max(self._max_s, float(values_s.max()))

    def merge(self, other: Histogram) -> None:
        """Take all values of another."""
        self._bins += other._bins
        self._sum_s += other._sum_s
        self._min_s = min(self._min_s, other._min_s)
        self._max_s = max(self._max_s, other._max_s)

    def distribution(self) -> Distribution | None:
        """The figures; None when there is no value."""
        count = int(self._bins.sum())
        if not count:
            return None
        cumulative = np.cumsum(self._bins)

        def quantile_s(share: float) -> float:
            """The value of rank ceil(share * count), to half a bin."""
            at = int(np.searchsorted(cumulative, math.ceil(share * count)))
            middle_s = 0.0 if at == 0 else LOWEST_S * math.exp((at - 0.5) * _LOG_RATIO)
            return min(max(middle_s, self._min_s), self._max_s)

        return Distribution(
            count,
            self._sum_s / count,
            quantile_s(0.5),
            quantile_s(0.9),
            quantile_s(0.95),
            quantile_s(0.99),
            self._max_s,
        )


class Fidelity(msgspec.Struct, frozen=True):
    """Tokens asked for against tokens that the upstream's usage reports, over `ok` requests that report them."""

    known: int
    exact: int
    exact_share: float | None
    max_error_tokens: int | None
    """Largest difference, either way."""
    asked_tokens: int
    got_tokens: int


class SenderFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One sender process: what it did and whether it could keep up."""

    name: str
    """Unique in the run, as `host:pid`."""
    host: str
    sent: int
    dispatch_lag_s: Distribution | None
    wake_lag_s: Distribution | None
    cpu_share: float | None
    """Its CPU seconds over its wall seconds while it sent; one process can use 1 core."""
    stall_max_s: float | None
    """Longest time that its event loop did not turn."""
    clock_offset_s: float | None = None
    """Its epoch clock minus the coordinator's; None on the coordinator's own host."""
    clock_error_s: float | None = None
    """That estimate's bound: half the shortest round trip."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What was replayed and how; the part of the summary that is known without a sample."""

    target: str
    model: str
    endpoint: str
    stream: bool
    run_id: str
    speed: float
    warmup_s: float = 0.0
    process: str = "trace"
    """Of the arrivals."""
    seed: int
    ties: str
    max_in_flight: int | None
    started_at: float | None
    """Schedule zero, epoch seconds; None when the replay was stopped before it."""
    rows_read: int
    failed_in_source: int
    """Rows that failed in the trace and whose lengths are lost: counted, not sent."""
    without_tokens: int
    """Other rows without a length on one side, so that nothing can be asked for."""
    unsent: int
    """Rows read whose turn never came because the replay was stopped."""
    is_interrupted: bool
    stopped_by: str | None
    """The error that ended the reading of the trace."""
    prompt_method: str
    """Who counted before it was sent: `local`, a local tokenizer; `tokenize`, the target; `usage`: nobody, lengths
    follow from the usage of earlier answers."""
    prompts_counted: int
    """Prompts that had been counted when they were sent."""
    prompt_notes: tuple[str, ...] = ()
    """What is to be known of the prompts, a line each."""
    max_model_len: int | None
    """Of the target, where it says so."""
    over_max_model_len: int
    """Sent rows that ask for more than that."""
    samples_error: str | None
    """Why the samples file is not whole."""
    senders: tuple[SenderFacts, ...] = ()
    sessions: str = "independent"
    """Or `ordered`, `think-time`: a turn waits for the one before it. Lag counts from the end of that wait."""
    gaps_estimated: int = 0
    """Think times whose recorded end was estimated, as the trace has no elapsed time there."""
    read_late: int = 0
    """Turns that were read after their moment, because too many others waited for their sessions; counted as lag."""
    late_dropped: int = 0
    """Rows that were later than `--late-after` when their turn came, and were not sent, as `--late drop` asks."""
    shard: str | None = None
    """`i/n` where this is a part of the plan."""
    lost: int = 0
    """Sendable rows of senders that died: sent or not, there is no sample of them."""
    lost_senders: tuple[str, ...] = ()
    """Which, and how they died."""


class Summary(Workload, frozen=True, kw_only=True):
    """A replay in figures. Durations in seconds."""

    loop: str = "open"
    """Sends never wait for completions."""
    warmup: int = 0
    """Requests that were due within `warmup_s`: sent, and in no figure but this one."""
    sent: int
    """Other requests tried; each is in `ok` or in `failures`."""
    ok: int
    failures: dict[str, int]
    """By outcome."""
    errors: dict[str, int]
    """By text."""
    error_rate: float | None
    """Failures over sent."""
    schedule_s: float | None
    """Schedule zero to the last planned send."""
    duration_s: float | None
    """First send to the last byte."""
    offered_rps: float | None
    """Sent over `schedule_s` without the warm-up."""
    achieved_rps: float | None
    """Ok over `duration_s`."""
    request_tokens_per_s: float | None
    response_tokens_per_s: float | None
    in_flight_max: int
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None
    """From the real send."""
    e2e_from_due_s: Distribution | None
    """From the planned send."""
    dispatch_lag_s: Distribution | None
    """Real send minus planned send, connection set-up included."""
    wake_lag_s: Distribution | None
    """The part of it before the connection was asked for: the replay's own lateness."""
    prompts: Fidelity
    outputs: Fidelity


class _FidelityCount:
    def __init__(self) -> None:
        self._known = self._exact = self._asked = self._got = self._max_error = 0

    def add(self, asked: int, got: int | None) -> None:
        if got is None:
            return
        self._known += 1
        self._exact += asked == got
        self._asked += asked
        self._got += got
        self._max_error = max(self._max_error, abs(asked - got))

    def merge(self, other: _FidelityCount) -> None:
        self._known += other._known
        self._exact += other._exact
        self._asked += other._asked
        self._got += other._got
        self._max_error = max(self._max_error, other._max_error)

    def result(self) -> Fidelity:
        known = self._known
        return Fidelity(
            known,
            self._exact,
            self._exact / known if known else None,
            self._max_error if known else None,
            self._asked,
            self._got,
        )


class Tally:
    """Takes the samples as they end, in any order. Can be pickled: a sender sends its own, and all are merged."""

    def __init__(self) -> None:
        self._outcomes: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._histograms = {
            name: Histogram()
            for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s", "e2e_from_due_s", "dispatch_lag_s", "wake_lag_s")
        }
        self._prompts = _FidelityCount()
        self._outputs = _FidelityCount()
        self.warmup = 0
        """Requests that are counted and nothing else."""
        self._last_due_s: float | None = None
        self._first_sent_s = math.inf
        self._last_end_s = -math.inf

    @property
    def ended(self) -> int:
        """Requests that have ended."""
        return self._outcomes.total()

    @property
    def ok(self) -> int:
        """Those that ended well."""
        return self._outcomes[Outcome.OK]

    def add(self, sample: Sample, gaps_ns: Sequence[int] = ()) -> None:
        """Take one sample, and the gaps between its content chunks."""
        self._outcomes[sample.outcome.value] += 1
        if sample.error is not None:
            is_listed = sample.error in self._errors or len(self._errors) < MAX_ERRORS
            self._errors[sample.error if is_listed else "others"] += 1
        self._last_due_s = sample.due_s if self._last_due_s is None else max(self._last_due_s, sample.due_s)
        self._add_duration("wake_lag_s", sample.wake_lag_s)
        self._add_duration("dispatch_lag_s", sample.dispatch_lag_s)
        if sample.sent_s is not None and sample.e2e_s is not None:
            self._first_sent_s = min(self._first_sent_s, sample.sent_s)
            self._last_end_s = max(self._last_end_s, sample.sent_s + sample.e2e_s)
        if sample.outcome is not Outcome.OK:
            return
        for name in ("ttft_s", "tpot_s", "e2e_s", "e2e_from_due_s"):
            self._add_duration(name, getattr(sample, name))
        self._histograms["itl_s"].add_all(np.asarray(gaps_ns, np.float64) / 1e9)
        self._prompts.add(sample.request_tokens_asked, sample.request_tokens_got)
        self._outputs.add(sample.response_tokens_asked, sample.response_tokens_got)

    def merge(self, other: Tally) -> None:
        """Take all that another one took."""
        self._outcomes += other._outcomes
        for text, n in other._errors.items():
            is_listed = text in self._errors or len(self._errors) < MAX_ERRORS
            self._errors[text if is_listed else "others"] += n
        for name, histogram in self._histograms.items():
            histogram.merge(other._histograms[name])
        self._prompts.merge(other._prompts)
        self._outputs.merge(other._outputs)
        self.warmup += other.warmup
        if other._last_due_s is not None:
            self._last_due_s = max(other._last_due_s, self._last_due_s or 0.0)
        self._first_sent_s = min(self._first_sent_s, other._first_sent_s)
        self._last_end_s = max(self._last_end_s, other._last_end_s)

    def distribution(self, name: str) -> Distribution | None:
        """Of one kind of duration, by its name in `Summary`."""
        return self._histograms[name].distribution()

    def _add_duration(self, name: str, value_s: float | None) -> None:
        if value_s is not None:
            self._histograms[name].add(value_s)

    def summary(self, workload: Workload, in_flight_max: int) -> Summary:
        """The figures so far."""
        sent = self.ended
        ok = self.ok
        duration_s = self._last_end_s - self._first_sent_s if self._last_end_s >= self._first_sent_s else None
        prompts, outputs = self._prompts.result(), self._outputs.result()
        return Summary(
            **msgspec.structs.asdict(workload),
            warmup=self.warmup,
            sent=sent,
            ok=ok,
            failures={name: n for name, n in sorted(self._outcomes.items()) if n and name != Outcome.OK},
            errors=dict(self._errors.most_common()),
            error_rate=(sent - ok) / sent if sent else None,
            schedule_s=self._last_due_s,
            duration_s=duration_s,
            offered_rps=_rate(sent, None if self._last_due_s is None else self._last_due_s - workload.warmup_s),
            achieved_rps=_rate(ok, duration_s),
            request_tokens_per_s=_rate(prompts.got_tokens if prompts.known else None, duration_s),
            response_tokens_per_s=_rate(outputs.got_tokens if outputs.known else None, duration_s),
            in_flight_max=in_flight_max,
            prompts=prompts,
            outputs=outputs,
            ttft_s=self._histograms["ttft_s"].distribution(),
            tpot_s=self._histograms["tpot_s"].distribution(),
            itl_s=self._histograms["itl_s"].distribution(),
            e2e_s=self._histograms["e2e_s"].distribution(),
            e2e_from_due_s=self._histograms["e2e_from_due_s"].distribution(),
            dispatch_lag_s=self._histograms["dispatch_lag_s"].distribution(),
            wake_lag_s=self._histograms["wake_lag_s"].distribution(),
        )


def _rate(count: int | None, seconds: float | None) -> float | None:
    return count / seconds if count is not None and seconds else None
