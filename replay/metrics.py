"""The figures of a replay: samples in, one summary out, in memory that does not grow with the run.

Latencies are over requests that ended `ok`; the lag is over all that were sent. Quantiles come from a histogram of
log-spaced bins, each 1 % wide from 1 µs to 10^5 s, so a quantile is within 0.5 % of a sample's value; mean, minimum and
maximum are exact. What is not known is None: an empty sample has no mean.

Goodput is what DistServe (OSDI 2024) calls so: the rate of requests that ended `ok` and met every bound of an `Slo`.
Its share is over all requests sent, so that a failure is a miss. A bound on a figure that an `ok` request has not is
met where there is nothing to bound (no gap between fewer than two tokens), and missed for `ttft` and `e2e`.

Samples come from inside the sending loop, one `Tally.add` each: plain lists and floats, no array of one element.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import msgspec
import numpy as np

from replay.sample import Sample, failure_class
from replay.timeline import BINS, LOG_RATIO, LOWEST_S, OverTime, Timeline, bin_of
from traces.record import Outcome

MAX_ERRORS = 20
"""Different error texts that are counted one by one; the others are counted together."""
CDF_POINTS = 200
RECENT_S = 10.0
"""What the live view calls now."""
_RECENT_ENDED = 2000
_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to be good, in seconds; None bounds nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None
    """Every gap between its content chunks."""
    e2e_s: float | None = None

    def bounds(self) -> dict[str, float]:
        """The bounds that there are, by the names that `parse_slo` takes."""
        named = {"ttft": self.ttft_s, "tpot": self.tpot_s, "itl": self.itl_s, "e2e": self.e2e_s}
        return {name: bound_s for name, bound_s in named.items() if bound_s is not None}


def parse_slo(text: str) -> Slo:
    """`ttft=0.5,tpot=0.05,itl=0.2,e2e=10`, in seconds. Raises ValueError naming the part, its value and the rule."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (each.strip() for each in part.partition("="))
        if name not in ("ttft", "tpot", "itl", "e2e"):
            raise ValueError(f"slo: expected ttft=, tpot=, itl= or e2e= with seconds, got {part.strip()!r}")
        if name in found:
            raise ValueError(f"slo: expected {name} once, got it again in {text!r}")
        try:
            bound_s = float(value)
        except ValueError:
            bound_s = math.nan
        if not 0 < bound_s < math.inf:
            raise ValueError(f"slo: {name}: expected seconds > 0, got {value!r}")
        found[name] = bound_s
    return Slo(**{f"{name}_s": bound_s for name, bound_s in found.items()})


class Distribution(msgspec.Struct, frozen=True):
    """A sample in figures, in the unit of its values."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Cdf(msgspec.Struct, frozen=True):
    """Values in seconds, ascending, and the share of the sample at or below each."""

    values_s: list[float]
    shares: list[float]


class Histogram:
    """Durations in seconds, in constant memory."""

    def __init__(self) -> None:
        self._bins = [0] * BINS
        self._sum_s = 0.0
        self._min_s = math.inf
        self._max_s = -math.inf
        self._waiting: list[float] = []
        """Values that are in no bin yet."""

    def add(self, value_s: float) -> int:
        """Take one value; returns its `bin_of`."""
        at = bin_of(value_s)
        self._bins[at] += 1
        self._sum_s += value_s
        if value_s < self._min_s:
            self._min_s = value_s
        if value_s > self._max_s:
            self._max_s = value_s
        return at

    def extend(self, values_s: Iterable[float]) -> None:
        """Take many; they get their bins a few thousand at a time, which is a tenth of the work."""
        self._waiting.extend(values_s)
        if len(self._waiting) >= _AT_ONCE:
            self._bin_waiting()

    def _bin_waiting(self) -> None:
        if not self._waiting:
            return
        values_s = np.array(self._waiting)
        self._waiting.clear()
        at = (np.log(np.maximum(values_s, LOWEST_S) / LOWEST_S) / LOG_RATIO).astype(np.int64) + 1
        at[values_s < LOWEST_S] = 0
        counts = np.bincount(np.minimum(at, BINS - 1))
        bins = self._bins
        for each in np.flatnonzero(counts).tolist():
            bins[each] += int(counts[each])
        self._sum_s += float(values_s.sum())
        self._min_s = min(self._min_s, float(values_s.min()))
        self._max_s = max(self._max_s, float(values_s.max()))

    def merge(self, other: Histogram) -> None:
        """Take all values of another."""
        other._bin_waiting()
        self._bins = [mine + others for mine, others in zip(self._bins, other._bins, strict=True)]
        self._sum_s += other._sum_s
        self._min_s = min(self._min_s, other._min_s)
        self._max_s = max(self._max_s, other._max_s)

    def distribution(self) -> Distribution | None:
        """The figures; None when there is no value."""
        self._bin_waiting()
        cumulative = list(accumulate(self._bins))
        count = cumulative[-1]
        if not count:
            return None

        def quantile_s(share: float) -> float:
            """The value of rank ceil(share * count), to half a bin."""
            at = bisect_left(cumulative, math.ceil(share * count))
            middle_s = 0.0 if at == 0 else LOWEST_S * math.exp((at - 0.5) * LOG_RATIO)
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

    def cdf(self) -> Cdf | None:
        """At most CDF_POINTS points, the first value and the last among them; None when there is no value."""
        self._bin_waiting()
        cumulative = list(accumulate(self._bins))
        count = cumulative[-1]
        if not count:
            return None
        points = [(self._min_s, 0.0)]
        for at, below in enumerate(cumulative):
            if self._bins[at] and (below - points[-1][1] * count) * (CDF_POINTS - 2) >= count and below < count:
                points.append((min(LOWEST_S * math.exp(at * LOG_RATIO), self._max_s), below / count))
        points.append((self._max_s, 1.0))
        return Cdf([float(f"{value_s:.5g}") for value_s, _ in points], [round(share, 5) for _, share in points])


class Fidelity(msgspec.Struct, frozen=True):
    """Tokens asked for against tokens that the upstream's usage reports, over `ok` requests that report them."""

    known: int
    exact: int
    exact_share: float | None
    max_error_tokens: int | None
    """Largest difference, either way."""
    asked_tokens: int
    got_tokens: int


class Goodput(msgspec.Struct, frozen=True):
    """What met the bounds asked for."""

    slo_s: dict[str, float]
    """The bounds, by figure."""
    good: int
    """Requests that ended `ok` and met every bound."""
    share: float | None
    """Of all sent, failures included."""
    rps: float | None
    """Good requests over `duration_s`."""
    missed_share: dict[str, float | None]
    """By figure, the share of the `ok` requests that missed that bound."""


class ServerOverTime(msgspec.Struct, frozen=True, kw_only=True):
    """What the servers said of themselves, one value a scrape in each list; all servers together."""

    at_s: list[float]
    """Since schedule zero."""
    running: list[float]
    waiting: list[float]
    kv_share: list[float | None]
    """The largest of the servers' KV-cache use, 0 to 1."""
    preemptions: list[float]
    """Since schedule zero, as the others below."""
    prefix_hits: list[float]
    prefix_queries: list[float]
    prompt_tokens: list[float]
    generation_tokens: list[float]


class ServerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The servers' own metrics, scraped during the run, by vLLM's names."""

    urls: tuple[str, ...]
    scrapes: int
    """Answers with such metrics in them."""
    failed_scrapes: int
    error: str | None
    """What the last failed one failed with."""
    kv_max: float | None
    """KV-cache use, 0 to 1."""
    kv_mean: float | None
    running_max: float | None
    """Requests."""
    waiting_max: float | None
    preemptions: float | None
    """During the run, as all that follows."""
    prefix_hit_share: float | None
    """Prompt tokens found in the prefix cache over those looked for."""
    prompt_tokens: float | None
    generation_tokens: float | None
    over_time: ServerOverTime | None


class Recent(msgspec.Struct, frozen=True):
    """The last seconds, for the live view."""

    ttft_p50_s: float | None
    ttft_p99_s: float | None
    lag_max_s: float | None


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
    lost: str | None = None
    """Why it ended without its figures; None when it did not."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What was replayed and how; the part of the summary that no sample tells. None: unknown, as for samples alone."""

    target: str | None = None
    model: str | None = None
    endpoint: str | None = None
    stream: bool | None = None
    run_id: str | None = None
    speed: float | None = None
    warmup_s: float = 0.0
    process: str = "trace"
    """Of the arrivals."""
    seed: int | None = None
    ties: str | None = None
    max_in_flight: int | None = None
    started_at: float | None = None
    """Schedule zero, epoch seconds; None when the replay was stopped before it."""
    rows_read: int | None = None
    failed_in_source: int = 0
    """Rows that failed in the trace and whose lengths are lost: counted, not sent."""
    without_tokens: int = 0
    """Other rows without a length on one side, so that nothing can be asked for."""
    unsent: int = 0
    """Rows read whose turn never came because the replay was stopped."""
    is_interrupted: bool = False
    stopped_by: str | None = None
    """The error that ended the reading of the trace."""
    prompt_method: str | None = None
    """Who counted before it was sent: `local`, a local tokenizer; `tokenize`, the target; `usage`: nobody, lengths
    follow from the usage of earlier answers."""
    prompts_counted: int = 0
    """Prompts that had been counted when they were sent."""
    prompt_notes: tuple[str, ...] = ()
    """What is to be known of the prompts, a line each."""
    max_model_len: int | None = None
    """Of the target, where it says so."""
    over_max_model_len: int = 0
    """Sent rows that ask for more than that."""
    samples_error: str | None = None
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
    server: ServerFacts | None = None
    """None where nobody asked for it."""


def merge_workloads(parts: Sequence[Workload]) -> Workload:
    """Of one run that was sent in shards: counts add up, what a shard ran into stands for all, the rest is the first's.

    Raises ValueError where the shards are of different runs.
    """
    first = parts[0]
    names = sorted({part.run_id or "unnamed" for part in parts})
    if len(names) > 1:
        raise ValueError(f"run id: expected shards of one run, got {', '.join(names)}")
    known = [part.rows_read for part in parts if part.rows_read is not None]
    fields = {name: getattr(first, name) for name in Workload.__struct_fields__}
    fields |= {
        name: sum(getattr(part, name) for part in parts)
        for name in (
            "failed_in_source",
            "without_tokens",
            "unsent",
            "prompts_counted",
            "over_max_model_len",
            "gaps_estimated",
            "read_late",
            "late_dropped",
            "lost",
        )
    }
    fields |= {
        name: next((getattr(part, name) for part in parts if getattr(part, name) is not None), None)
        for name in ("stopped_by", "samples_error", "server")
    }
    return Workload(
        **fields
        | {
            "rows_read": sum(known) if known else None,
            "is_interrupted": any(part.is_interrupted for part in parts),
            "prompt_notes": tuple(dict.fromkeys(note for part in parts for note in part.prompt_notes)),
            "shard": None if len(parts) > 1 else first.shard,
            "senders": tuple(sender for part in parts for sender in part.senders),
        }
    )


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
    failure_classes: dict[str, int]
    """By what went wrong: see `replay.sample.failure_class`."""
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
    sent_rps: float | None
    """The same requests over the time that sending them took: below `offered_rps` when sending fell behind."""
    achieved_rps: float | None
    """Ok over `duration_s`."""
    request_tokens_per_s: float | None
    response_tokens_per_s: float | None
    in_flight_max: int
    goodput: Goodput | None
    """None where no bounds were given."""
    ttft_s: Distribution | None
    """From the real send, as all but those that say otherwise."""
    ttft_from_due_s: Distribution | None
    """From the planned send."""
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None
    e2e_from_due_s: Distribution | None
    """From the planned send."""
    dispatch_lag_s: Distribution | None
    """Real send minus planned send, connection set-up included."""
    wake_lag_s: Distribution | None
    """The part of it before the connection was asked for, but for what was held back: the replay's own lateness."""
    held_back_s: Distribution | None
    """What `max_in_flight` held back."""
    session_wait_s: Distribution | None
    """What waiting for the turn before took, where sessions are in order."""
    prompts: Fidelity
    outputs: Fidelity
    over_time: OverTime
    cdfs: dict[str, Cdf]
    """Of `ttft_s`, `tpot_s` and `e2e_s`, where they are known."""
    verdict: str = "good"
    """`good`, `missed` (a threshold) or `invalid` (the replay itself was the bottleneck): see `replay.verdict`."""
    reasons: tuple[str, ...] = ()
    """Of a verdict that is not good, the worst first."""


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


_LATENCIES = ("ttft_s", "ttft_from_due_s", "tpot_s", "itl_s", "e2e_s", "e2e_from_due_s")
_LAGS = ("dispatch_lag_s", "wake_lag_s", "held_back_s", "session_wait_s")


class Tally:
    """Takes the samples as they end, in any order. Can be pickled: a sender sends its own, and all are merged."""

    def __init__(self, slo: Slo | None = None) -> None:
        self._slo = slo
        self._good = 0
        self._missed = dict.fromkeys(slo.bounds(), 0) if slo is not None else {}
        self._outcomes: Counter[str] = Counter()
        self._classes: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._histograms = {name: Histogram() for name in _LATENCIES + _LAGS}
        self._timeline = Timeline()
        self._recent: deque[tuple[float, float | None, float]] = deque(maxlen=_RECENT_ENDED)
        """(end, ttft, lag) in seconds."""
        self._prompts = _FidelityCount()
        self._outputs = _FidelityCount()
        self.warmup = 0
        """Requests that are counted and nothing else."""
        self._last_due_s: float | None = None
        self._first_sent_s = math.inf
        self._last_sent_s = -math.inf
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
        is_ok = sample.outcome is Outcome.OK
        self._outcomes[sample.outcome._value_] += 1
        if sample.error is not None:
            is_listed = sample.error in self._errors or len(self._errors) < MAX_ERRORS
            self._errors[sample.error if is_listed else "others"] += 1
        histograms, due_s, sent_s = self._histograms, sample.due_s, sample.sent_s
        self._last_due_s = due_s if self._last_due_s is None else max(self._last_due_s, due_s)
        histograms["wake_lag_s"].add(sample.wake_lag_s)
        if sample.dispatch_lag_s is not None:
            histograms["dispatch_lag_s"].add(sample.dispatch_lag_s)
        if sample.held_back_s:
            histograms["held_back_s"].add(sample.held_back_s)
        if sample.session_wait_s:
            histograms["session_wait_s"].add(sample.session_wait_s)
        lag_s = sample.dispatch_lag_s if sample.dispatch_lag_s is not None else sample.began_s - due_s
        end_s = sample.end_s
        if sent_s is not None:
            self._first_sent_s = min(self._first_sent_s, sent_s)
            self._last_sent_s = max(self._last_sent_s, sent_s)
            self._last_end_s = max(self._last_end_s, end_s)
        self._timeline.add(due_s, lag_s, sent_s, end_s, is_ok=is_ok)
        self._recent.append((end_s, sample.ttft_s if is_ok else None, lag_s))
        if is_ok:
            self._add_ok(sample, gaps_ns, end_s)
        else:
            self._classes[failure_class(sample)] += 1

    def _add_ok(self, sample: Sample, gaps_ns: Sequence[int], end_s: float) -> None:
        histograms, sent_s, got = self._histograms, sample.sent_s, sample.response_tokens_got
        ttft = e2e = None
        if sample.ttft_s is not None:
            ttft = histograms["ttft_s"].add(sample.ttft_s)
            if sample.ttft_from_due_s is not None:
                histograms["ttft_from_due_s"].add(sample.ttft_from_due_s)
        if sample.tpot_s is not None:
            histograms["tpot_s"].add(sample.tpot_s)
        if sample.e2e_s is not None:
            e2e = histograms["e2e_s"].add(sample.e2e_s)
        if sample.e2e_from_due_s is not None:
            histograms["e2e_from_due_s"].add(sample.e2e_from_due_s)
        histograms["itl_s"].extend([gap_ns / 1e9 for gap_ns in gaps_ns])
        if sent_s is not None:
            self._timeline.add_latency(sent_s, ttft, e2e)
            if got:
                self._timeline.add_tokens(got, end_s if sample.ttft_s is None else sent_s + sample.ttft_s, end_s)
        self._prompts.add(sample.request_tokens_asked, sample.request_tokens_got)
        self._outputs.add(sample.response_tokens_asked, got)
        if self._slo is not None:
            missed = missed_bounds(sample, self._slo)
            self._good += not missed
            for name in missed:
                self._missed[name] += 1

    def merge(self, other: Tally) -> None:
        """Take all that another one took, which had the same bounds."""
        self._outcomes += other._outcomes
        self._classes += other._classes
        self._good += other._good
        for name, n in other._missed.items():
            self._missed[name] += n
        for text, n in other._errors.items():
            is_listed = text in self._errors or len(self._errors) < MAX_ERRORS
            self._errors[text if is_listed else "others"] += n
        for name, histogram in self._histograms.items():
            histogram.merge(other._histograms[name])
        self._timeline.merge(other._timeline)
        self._recent.extend(other._recent)
        self._prompts.merge(other._prompts)
        self._outputs.merge(other._outputs)
        self.warmup += other.warmup
        if other._last_due_s is not None:
            self._last_due_s = max(other._last_due_s, self._last_due_s or 0.0)
        self._first_sent_s = min(self._first_sent_s, other._first_sent_s)
        self._last_sent_s = max(self._last_sent_s, other._last_sent_s)
        self._last_end_s = max(self._last_end_s, other._last_end_s)

    def distribution(self, name: str) -> Distribution | None:
        """Of one kind of duration, by its name in `Summary`."""
        return self._histograms[name].distribution()

    def recent(self, now_s: float) -> Recent:
        """Of the requests that ended in the RECENT_S before now, of at most so many. now_s: since schedule zero."""
        ended = [each for each in self._recent if each[0] > now_s - RECENT_S]
        ttfts_s = sorted(ttft_s for _, ttft_s, _ in ended if ttft_s is not None)

        def ttft_s(share: float) -> float | None:
            return ttfts_s[math.ceil(share * len(ttfts_s)) - 1] if ttfts_s else None

        return Recent(ttft_s(0.5), ttft_s(0.99), max((lag_s for _, _, lag_s in ended), default=None))

    def summary(self, workload: Workload, in_flight_max: int) -> Summary:
        """The figures so far, not judged."""
        sent = self.ended
        ok = self.ok
        duration_s = self._last_end_s - self._first_sent_s if self._last_end_s >= self._first_sent_s else None
        offered_s = None if self._last_due_s is None else self._last_due_s - workload.warmup_s
        sending_s = None if self._last_sent_s < 0 else self._last_sent_s - workload.warmup_s
        prompts, outputs = self._prompts.result(), self._outputs.result()
        distributions: dict[str, Any] = {name: each.distribution() for name, each in self._histograms.items()}
        cdfs = {name: self._histograms[name].cdf() for name in ("ttft_s", "tpot_s", "e2e_s")}
        return Summary(
            **{name: getattr(workload, name) for name in Workload.__struct_fields__},
            **distributions,
            warmup=self.warmup,
            sent=sent,
            ok=ok,
            failures={name: n for name, n in sorted(self._outcomes.items()) if n and name != Outcome.OK},
            failure_classes=dict(sorted(self._classes.items())),
            errors=dict(self._errors.most_common()),
            error_rate=(sent - ok) / sent if sent else None,
            schedule_s=self._last_due_s,
            duration_s=duration_s,
            offered_rps=_rate(sent, offered_s),
            sent_rps=_rate(sent, sending_s),
            achieved_rps=_rate(ok, duration_s),
            request_tokens_per_s=_rate(prompts.got_tokens if prompts.known else None, duration_s),
            response_tokens_per_s=_rate(outputs.got_tokens if outputs.known else None, duration_s),
            in_flight_max=in_flight_max,
            goodput=None if self._slo is None else self._goodput(self._slo, duration_s),
            prompts=prompts,
            outputs=outputs,
            over_time=self._timeline.result(),
            cdfs={name: cdf for name, cdf in cdfs.items() if cdf is not None},
        )

    def _goodput(self, slo: Slo, duration_s: float | None) -> Goodput:
        sent, ok = self.ended, self.ok
        return Goodput(
            slo.bounds(),
            self._good,
            self._good / sent if sent else None,
            _rate(self._good, duration_s),
            {name: n / ok if ok else None for name, n in self._missed.items()},
        )


class Latencies(Protocol):
    """The figures of a request that bounds are for, as a Sample has them."""

    @property
    def ttft_s(self) -> float | None:
        """Of the first content."""

    @property
    def tpot_s(self) -> float | None:
        """Of the others, on average."""

    @property
    def itl_max_s(self) -> float | None:
        """Longest gap."""

    @property
    def e2e_s(self) -> float | None:
        """Of the whole answer."""


def missed_bounds(sample: Latencies, slo: Slo) -> list[str]:
    """The names of the bounds that an `ok` request missed."""
    missed = []
    if slo.ttft_s is not None and (sample.ttft_s is None or sample.ttft_s > slo.ttft_s):
        missed.append("ttft")
    if slo.tpot_s is not None and sample.tpot_s is not None and sample.tpot_s > slo.tpot_s:
        missed.append("tpot")
    if slo.itl_s is not None and sample.itl_max_s is not None and sample.itl_max_s > slo.itl_s:
        missed.append("itl")
    if slo.e2e_s is not None and (sample.e2e_s is None or sample.e2e_s > slo.e2e_s):
        missed.append("e2e")
    return missed


def summarize(samples: Iterable[Sample], workload: Workload, slo: Slo | None = None) -> Summary:
    """The summary of a run made again from its samples, in any order; gaps between chunks are not in them.

    Holds two numbers a sample, from which the largest number in flight is found.
    """
    tally = Tally(slo)
    began_s, ended_s = array("d"), array("d")
    for sample in samples:
        if sample.is_warmup:
            tally.warmup += 1
        else:
            tally.add(sample)
        began_s.append(sample.began_s)
        ended_s.append(sample.end_s)
    began, ended = np.sort(np.asarray(began_s)), np.sort(np.asarray(ended_s))
    in_flight = np.arange(1, began.size + 1) - np.searchsorted(ended, began, side="left")
    return tally.summary(workload, int(in_flight.max(initial=0)))


def _rate(count: int | None, seconds: float | None) -> float | None:
    return count / seconds if count is not None and seconds and seconds > 0 else None
