"""What a worker counts, and how it is shown to Prometheus.

A worker counts into the memory-mapped slots of its journal's counters file (storage/counters.py): a store of eight
bytes, no lock, and any process can read all workers at once. What has labels that are not known beforehand (models,
upstreams), and the exemplars, lie in two blocks of the same file (proxy/series.py). The control plane sums the files
of living and retired writers into one scrape.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Final

import msgspec
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from proxy.series import (
    E2E_BUCKETS_S,
    E2E_EXEMPLARS,
    EXEMPLAR_SLOTS,
    HISTOGRAMS,
    SERIES_BLOCKS,
    TPOT_BUCKETS_S,
    TTFT_BUCKETS_S,
    Example,
    Examples,
    Exemplars,
    Labels,
    Rows,
    SeriesTable,
    add_examples,
    add_rows,
    column,
    fold,
    histogram,
    series_metrics,
)
from proxy.shaping_view import SHAPING_VIEW, ShapingView
from storage.counters import places, read_blocks
from storage.journal import DROP_REASONS, JOURNAL_COUNTERS, RETIRED, is_writer_alive, list_directory, writer_directories
from traces.record import Outcome, TraceRecord

WAIT_BUCKETS_S: Final[tuple[float, ...]] = (
    0.001,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)

MIRROR_DROPS = ("queue_full", "bytes", "too_large", "upload", "model", "breaker_open", "stopping", "defect")
"""Why a mirrored request was not sent: as many wait as may; the bodies held are as large as they may be; its own body
is larger than `max_body`; its body was never whole in memory; its model could not be rewritten; the target is left
alone; the gateway stops, or the target is no longer configured; a defect of the mirror."""


def _histogram_names(name: str, buckets: tuple[float, ...]) -> tuple[str, ...]:
    return (*(f"{name}_le_{bound:g}" for bound in buckets), f"{name}_le_inf", f"{name}_sum_us")


WORKER_COUNTERS = (
    "in_flight",
    "request_tokens",
    "response_tokens",
    "usage_unknown",
    "accounting_errors",
    "retries",
    "keys_refused",
    "routes_refused",
    *(f"outcome_{outcome.value}" for outcome in Outcome),
    "spans_exported",
    "spans_dropped_queue",
    "spans_dropped_export",
    "shaping_waiting",
    "shaping_held",
    "shaping_rejected",
    "shaping_fallbacks",
    *_histogram_names("shaping_wait", WAIT_BUCKETS_S),
    "faults",
    "live_ended",
    "live_failed",
    *_histogram_names("live_ttft", TTFT_BUCKETS_S),
    "mirror_offered",
    "mirror_sent",
    "mirror_queued",
    "mirror_in_flight",
    *(f"mirror_dropped_{reason}" for reason in MIRROR_DROPS),
    *(f"mirror_outcome_{outcome.value}" for outcome in Outcome),
    *SERIES_BLOCKS,
)
"""The slots behind the journal's own, in order. Those in `GAUGES` are gauges; the rest only grow. Blocks come last."""

_SLOT = dict(places(JOURNAL_COUNTERS + WORKER_COUNTERS))
_IN_FLIGHT = _SLOT["in_flight"]
_REQUEST_TOKENS = _SLOT["request_tokens"]
_RESPONSE_TOKENS = _SLOT["response_tokens"]
_USAGE_UNKNOWN = _SLOT["usage_unknown"]
_ACCOUNTING_ERRORS = _SLOT["accounting_errors"]
_RETRIES = _SLOT["retries"]
_KEYS_REFUSED = _SLOT["keys_refused"]
_ROUTES_REFUSED = _SLOT["routes_refused"]
# By text: an enum's own hash is a call in Python.
_OUTCOMES = {outcome.value: _SLOT[f"outcome_{outcome.value}"] for outcome in Outcome}
_EXEMPLAR_DUE: Final = _SLOT["exemplars"] + 1
"""From when on the first bucket's exemplar may be replaced."""
_E2E_EXEMPLAR_DUE: Final = _EXEMPLAR_DUE + E2E_EXEMPLARS * EXEMPLAR_SLOTS
_SPANS_EXPORTED: Final = _SLOT["spans_exported"]
_SPANS_DROPPED_QUEUE: Final = _SLOT["spans_dropped_queue"]
_SPANS_DROPPED_EXPORT: Final = _SLOT["spans_dropped_export"]
SPAN_DROP_REASONS = ("queue", "export")
_WAITING = _SLOT["shaping_waiting"]
_HELD = _SLOT["shaping_held"]
_REJECTED = _SLOT["shaping_rejected"]
_FALLBACKS = _SLOT["shaping_fallbacks"]
_WAIT = _SLOT[f"shaping_wait_le_{WAIT_BUCKETS_S[0]:g}"]
_WAIT_SUM = _SLOT["shaping_wait_sum_us"]
_FAULTS = _SLOT["faults"]
_LIVE_ENDED = _SLOT["live_ended"]
_LIVE_FAILED = _SLOT["live_failed"]
_LIVE_TTFT = _SLOT[f"live_ttft_le_{TTFT_BUCKETS_S[0]:g}"]
_LIVE_TTFT_SUM = _SLOT["live_ttft_sum_us"]
# What a client has done wrong says nothing about how it is served.
_WELL_SERVED = frozenset({Outcome.OK.value, Outcome.INVALID_REQUEST.value})
_MIRROR_OFFERED = _SLOT["mirror_offered"]
_MIRROR_SENT = _SLOT["mirror_sent"]
_MIRROR_QUEUED = _SLOT["mirror_queued"]
_MIRROR_IN_FLIGHT = _SLOT["mirror_in_flight"]
_MIRROR_DROPPED = {reason: _SLOT[f"mirror_dropped_{reason}"] for reason in MIRROR_DROPS}
_MIRROR_OUTCOMES = {outcome.value: _SLOT[f"mirror_outcome_{outcome.value}"] for outcome in Outcome}


class WorkerMetrics:
    """Counts one worker's requests into its slots."""

    __slots__ = ("_exemplars", "_series", "_slots")

    def __init__(self, slots: memoryview) -> None:
        self._slots = slots
        self._series = SeriesTable(slots, _SLOT["series"])
        self._exemplars = Exemplars(slots, _SLOT["exemplars"])

    def started(self) -> None:
        """A request came in."""
        self._slots[_IN_FLIGHT] += 1

    def ended(
        self,
        record: TraceRecord,
        operation: str = "other",
        upstream_s: float | None = None,
        trace_id: str | None = None,
    ) -> None:
        """Its record has been made.

        operation: OpenTelemetry's word for its route. upstream_s: from sent to the last byte. trace_id: 32 hexadecimal
        digits, where a span tells of it.
        """
        slots = self._slots
        outcome, request_tokens, response_tokens = record.outcome, record.request_tokens, record.response_tokens
        slots[_OUTCOMES[outcome._value_]] += 1
        if request_tokens is None or response_tokens is None:
            slots[_USAGE_UNKNOWN] += 1
        if request_tokens:
            slots[_REQUEST_TOKENS] += request_tokens
        if response_tokens:
            slots[_RESPONSE_TOKENS] += response_tokens
        e2e_s = record.elapsed_s or 0.0
        ended_s = record.received_at + e2e_s
        ttft_s = record.ttft_s
        ttft_bucket = 0
        if ttft_s is not None:
            ttft_bucket = bisect_left(TTFT_BUCKETS_S, ttft_s)
            if trace_id is not None or ended_s >= slots[_EXEMPLAR_DUE + ttft_bucket * EXEMPLAR_SLOTS]:
                self._exemplars.take(ttft_bucket, ttft_s, ended_s, record.request_id, trace_id)
        e2e_bucket = bisect_left(E2E_BUCKETS_S, e2e_s)
        if trace_id is not None or ended_s >= slots[_E2E_EXEMPLAR_DUE + e2e_bucket * EXEMPLAR_SLOTS]:
            self._exemplars.take(E2E_EXEMPLARS + e2e_bucket, e2e_s, ended_s, record.request_id, trace_id)
        self._series.ended(record, operation, ttft_bucket, e2e_bucket, upstream_s)

    def spans_dropped(self, count: int) -> None:
        """The exporter's queue was full, or its time was up."""
        self._slots[_SPANS_DROPPED_QUEUE] += count

    def spans_sent(self, count: int, *, is_taken: bool) -> None:
        """The collector has taken them, or they are lost. Only the exporter's thread calls this."""
        self._slots[_SPANS_EXPORTED if is_taken else _SPANS_DROPPED_EXPORT] += count

    def live_ended(self, outcome: Outcome, ttft_s: float | None) -> None:
        """It was a client's own: what the guard rails of an injection look at."""
        slots = self._slots
        slots[_LIVE_ENDED] += 1
        if outcome._value_ not in _WELL_SERVED:
            slots[_LIVE_FAILED] += 1
        if ttft_s is not None:
            slots[_LIVE_TTFT + bisect_left(TTFT_BUCKETS_S, ttft_s)] += 1
            slots[_LIVE_TTFT_SUM] += int(ttft_s * 1e6)

    def fault(self) -> None:
        """A fault was injected."""
        self._slots[_FAULTS] += 1

    def left(self) -> None:
        """The request is over for the gateway."""
        self._slots[_IN_FLIGHT] -= 1

    def retried(self) -> None:
        """A request went to another upstream."""
        self._slots[_RETRIES] += 1

    def key_refused(self) -> None:
        """A request had no key that is good."""
        self._slots[_KEYS_REFUSED] += 1

    def route_refused(self) -> None:
        """A request asked for what is not for clients."""
        self._slots[_ROUTES_REFUSED] += 1

    def accounting_failed(self) -> None:
        """An answer could not be accounted for; its bytes passed on."""
        self._slots[_ACCOUNTING_ERRORS] += 1

    def shaping_waiting(self, requests: int) -> None:
        """So many are held by shaping now."""
        self._slots[_WAITING] = requests

    def shaping_held(self) -> None:
        """A request has to wait."""
        self._slots[_HELD] += 1

    def shaping_waited(self, wait_s: float) -> None:
        """It waits no more."""
        self._slots[_WAIT + bisect_left(WAIT_BUCKETS_S, wait_s)] += 1
        self._slots[_WAIT_SUM] += int(wait_s * 1e6)

    def shaping_rejected(self) -> None:
        """A request was refused."""
        self._slots[_REJECTED] += 1

    def shaping_fell_back(self) -> None:
        """The shared limits are gone, and parts of them hold."""
        self._slots[_FALLBACKS] += 1

    def mirror_queued(self) -> None:
        """A request was drawn for a shadow target, and waits."""
        self._slots[_MIRROR_OFFERED] += 1
        self._slots[_MIRROR_QUEUED] += 1

    def mirror_refused(self, reason: str) -> None:
        """A request was drawn, and does not wait: one of MIRROR_DROPS."""
        self._slots[_MIRROR_OFFERED] += 1
        self._slots[_MIRROR_DROPPED[reason]] += 1

    def mirror_dropped(self, reason: str) -> None:
        """One that waited will not be sent: one of MIRROR_DROPS."""
        self._slots[_MIRROR_QUEUED] -= 1
        self._slots[_MIRROR_DROPPED[reason]] += 1

    def mirror_sent(self) -> None:
        """One that waited is in flight."""
        slots = self._slots
        slots[_MIRROR_QUEUED] -= 1
        slots[_MIRROR_SENT] += 1
        slots[_MIRROR_IN_FLIGHT] += 1

    def mirror_ended(self, outcome: Outcome) -> None:
        """The exchange with the shadow target is over."""
        self._slots[_MIRROR_IN_FLIGHT] -= 1
        self._slots[_MIRROR_OUTCOMES[outcome._value_]] += 1


GAUGES = frozenset({"in_flight", "journal_unwritten", "shaping_waiting", "mirror_queued", "mirror_in_flight"})


@dataclass(slots=True)
class Totals:
    """What all writers have counted together."""

    values: dict[str, int] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)
    examples: Examples = field(default_factory=dict)
    """Of living writers."""

    def add(self, path: Path, *, is_alive: bool) -> bool:
        """Add a counters file; gauges of the living only. False when it is none, or no more."""
        try:
            values, blocks = read_blocks(path)
        except (OSError, ValueError):
            return False
        for name, value in values.items():
            if is_alive or name not in GAUGES:
                self.values[name] = self.values.get(name, 0) + value
        add_rows(self.rows, blocks.get("series", _NOTHING))
        if is_alive:
            add_examples(self.examples, blocks.get("exemplars", _NOTHING))
        return True


_NOTHING = memoryview(b"").cast("Q")


class CountersReader:
    """Reads all writers' counters again and again, from any thread; those of a retired one, which stay, once."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._retired = Totals()
        self._seen_retired: set[str] = set()
        self._labels = Labels()
        self._lock = Lock()

    def read(self) -> Totals:
        """The totals now, with as many models and upstreams as may be shown."""
        with self._lock:
            return self._read()

    def _read(self) -> Totals:
        total = Totals()
        living: set[str] = set()
        for directory in writer_directories(self._journal):
            name = directory.name
            if name not in self._seen_retired and total.add(
                directory / "counters", is_alive=is_writer_alive(directory)
            ):
                living.add(name)
        # The retired ones are looked for last: a writer that retires meanwhile is found there, and counted once.
        for path in sorted(list_directory(self._journal / RETIRED)):
            name = path.name.removesuffix(".counters")
            if name not in living and name not in self._seen_retired and self._retired.add(path, is_alive=False):
                self._seen_retired.add(name)
        for key, value in self._retired.values.items():
            total.values[key] = total.values.get(key, 0) + value
        rows = dict(self._retired.rows)
        for row, counts in total.rows.items():
            rows[row] = [a + b for a, b in zip(rows[row], counts, strict=True)] if row in rows else counts
        total.rows = self._labels.bound(rows)
        add_histograms(total.values, total.rows)
        return total


def add_histograms(values: dict[str, int], rows: Rows) -> None:
    """Add what the rows have counted of times, all together, to the slots by name; older versions had slots of them."""
    for counts in fold(rows, keep=()).values():
        for name, bounds in HISTOGRAMS:
            if name in ("ttft", "e2e", "tpot"):
                buckets, total_us = column(counts, name, bounds)
                names = _histogram_names(name, bounds)
                for each, value in zip(names, (*buckets, total_us), strict=True):
                    values[each] = values.get(each, 0) + value


def counting_since_ns(journal: Path) -> int:
    """Epoch time of the oldest writer whose counters there are, of its UUIDv7; now where there is none."""
    names = [directory.name for directory in writer_directories(journal)]
    names += [path.name for path in list_directory(journal / RETIRED)]
    stamps = [int(name[:13].replace("-", ""), 16) for name in names if _UUID_BEGIN.match(name)]
    return min(stamps) * 1_000_000 if stamps else time.time_ns()


_UUID_BEGIN = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7")


def sum_counters(journal: Path) -> dict[str, int]:
    """Every slot summed over all writers; gauges over the living ones only."""
    return CountersReader(journal).read().values


def _histogram(
    name: str,
    text: str,
    prefix: str,
    buckets: tuple[float, ...],
    values: Mapping[str, int],
    examples: Mapping[int, Example] | None = None,
) -> HistogramMetricFamily:
    counts = [values.get(f"{prefix}_le_{bound:g}", 0) for bound in buckets] + [values.get(f"{prefix}_le_inf", 0)]
    family = HistogramMetricFamily(name, text, labels=[])
    histogram(family, [], buckets, counts, values.get(f"{prefix}_sum_us", 0) / 1e6, examples)
    return family


def all_worker_metrics(totals: Totals) -> Iterator[Metric]:
    """All that the workers count as Prometheus metrics."""
    yield from worker_metrics(totals.values, totals.examples)
    yield from series_metrics(totals.rows)


def worker_metrics(values: Mapping[str, int], examples: Mapping[int, Example] | None = None) -> Iterator[Metric]:
    """The summed slots as Prometheus metrics."""
    of_ttft: Examples = {}
    of_e2e: Examples = {}
    for place, example in (examples or {}).items():
        if place < E2E_EXEMPLARS:
            of_ttft[place] = example
        else:
            of_e2e[place - E2E_EXEMPLARS] = example

    def get(name: str) -> int:
        return values.get(name, 0)

    yield CounterMetricFamily(
        "burstgate_requests_accepted", "Requests begun by the gateway, recorded or dropped.", get("accepted")
    )
    dropped = CounterMetricFamily(
        "burstgate_records_dropped", "Requests of which no record is kept, by reason.", labels=["reason"]
    )
    for reason in DROP_REASONS:
        dropped.add_metric([reason], get(f"dropped_{reason}"))
    yield dropped
    outcomes = CounterMetricFamily("burstgate_requests", "Requests ended, by outcome.", labels=["outcome"])
    for outcome in Outcome:
        outcomes.add_metric([outcome.value], get(f"outcome_{outcome.value}"))
    yield outcomes
    tokens = CounterMetricFamily("burstgate_tokens", "Tokens counted, by direction.", labels=["direction"])
    tokens.add_metric(["request"], get("request_tokens"))
    tokens.add_metric(["response"], get("response_tokens"))
    yield tokens
    yield CounterMetricFamily(
        "burstgate_usage_unknown", "Requests that ended without both token counts.", get("usage_unknown")
    )
    yield CounterMetricFamily(
        "burstgate_accounting_errors", "Answers passed on that could not be accounted for.", get("accounting_errors")
    )
    yield CounterMetricFamily("burstgate_upstream_retries", "Requests sent to another upstream.", get("retries"))
    yield CounterMetricFamily("burstgate_injected_faults", "Faults injected into clients' requests.", get("faults"))
    yield CounterMetricFamily(
        "burstgate_keys_refused", "Requests refused for want of a good API key.", get("keys_refused")
    )
    yield CounterMetricFamily(
        "burstgate_routes_refused", "Requests for routes that are not for clients.", get("routes_refused")
    )
    yield CounterMetricFamily("burstgate_journal_bytes", "Bytes appended to the journal.", get("journal_bytes"))
    yield GaugeMetricFamily("burstgate_requests_in_flight", "Requests in the gateway now.", get("in_flight"))
    yield GaugeMetricFamily(
        "burstgate_journal_unwritten", "Ended requests kept in memory: the disk refuses them.", get("journal_unwritten")
    )
    yield _histogram(
        "burstgate_time_to_first_token_seconds",
        "First content chunk minus request sent, of streams.",
        "ttft",
        TTFT_BUCKETS_S,
        values,
        of_ttft,
    )
    yield CounterMetricFamily(
        "burstgate_live_requests", "Clients' own requests ended: the guard rails' view.", get("live_ended")
    )
    yield CounterMetricFamily(
        "burstgate_live_failures", "Those that failed, but for wrong requests.", get("live_failed")
    )
    yield _histogram("burstgate_live_time_to_first_token_seconds", "Theirs.", "live_ttft", TTFT_BUCKETS_S, values)
    yield _histogram(
        "burstgate_request_duration_seconds",
        "Submission to last byte, all outcomes.",
        "e2e",
        E2E_BUCKETS_S,
        values,
        of_e2e,
    )
    yield _histogram(
        "burstgate_time_per_output_token_seconds",
        "Last chunk minus first chunk, over output tokens but one, of streams.",
        "tpot",
        TPOT_BUCKETS_S,
        values,
    )
    yield CounterMetricFamily("burstgate_spans_exported", "Spans that the collector took.", get("spans_exported"))
    lost = CounterMetricFamily(
        "burstgate_spans_dropped",
        "Spans that were lost, by reason: the queue was full (or the worker ended), the collector did not take them.",
        labels=["reason"],
    )
    for reason in SPAN_DROP_REASONS:
        lost.add_metric([reason], get(f"spans_dropped_{reason}"))
    yield lost
    yield GaugeMetricFamily("burstgate_shaping_queue", "Requests held by shaping now.", get("shaping_waiting"))
    yield CounterMetricFamily("burstgate_shaping_held", "Requests that had to wait.", get("shaping_held"))
    yield CounterMetricFamily("burstgate_shaping_rejected", "Requests refused with 429.", get("shaping_rejected"))
    yield CounterMetricFamily(
        "burstgate_shaping_fallbacks", "Times that the shared limits' backend was gone.", get("shaping_fallbacks")
    )
    yield _histogram(
        "burstgate_shaping_wait_seconds", "How long requests were held.", "shaping_wait", WAIT_BUCKETS_S, values
    )
    yield from _mirror_metrics(values)


class ShapingMetrics:
    """What the workers' views of their shaping (`proxy/shaper.py`) say, as metrics by rule."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._seen: dict[str, ShapingView] = {}
        """By writer; those of writers that are gone, too: what was counted stays counted."""

    def views(self) -> dict[str, ShapingView]:
        """Of the writers that live."""
        living = {}
        for directory in writer_directories(self._journal):
            try:
                view = msgspec.json.decode((directory / SHAPING_VIEW).read_bytes(), type=ShapingView)
            except (OSError, msgspec.DecodeError):
                continue
            self._seen[directory.name] = view
            if is_writer_alive(directory):
                living[directory.name] = view
        return living

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        living = self.views()
        counted = ["rule"]
        held = CounterMetricFamily("burstgate_shaping_rule_held", "Requests that a rule held.", labels=counted)
        rejected = CounterMetricFamily(
            "burstgate_shaping_rule_rejected", "Requests that a rule refused.", labels=counted
        )
        waiting = GaugeMetricFamily("burstgate_shaping_rule_queue", "Requests that wait for a rule.", labels=counted)
        limit = GaugeMetricFamily(
            "burstgate_shaping_adaptive_limit",
            "Lowest adaptive concurrency limit, summed over workers.",
            labels=counted,
        )
        for family, values in (
            (held, _sum_by_rule(self._seen, "held")),
            (rejected, _sum_by_rule(self._seen, "rejected")),
            (waiting, _sum_by_rule(living, "waiting")),
            (limit, _sum_by_rule(living, "limit")),
        ):
            for rule, value in values.items():
                family.add_metric([rule], value)
            yield family
        paced = ("worker", "stage")
        cv = GaugeMetricFamily("burstgate_pacing_cv", "CV of gaps: asked, as requests came, achieved.", labels=paced)
        delay = GaugeMetricFamily("burstgate_pacing_delay_seconds", "Mean delay that pacing added.", labels=["worker"])
        forced = CounterMetricFamily(
            "burstgate_pacing_forced", "Requests that left because their delay budget was over.", labels=["worker"]
        )
        for writer, view in living.items():
            pacing = view.pacing
            if pacing is not None:
                stages = {"asked": pacing.asked_cv, "came": pacing.came_cv, "achieved": pacing.achieved_cv}
                for stage, found in stages.items():
                    if found is not None:
                        cv.add_metric([writer, stage], found)
                delay.add_metric([writer], pacing.mean_delay_s)
                forced.add_metric([writer], pacing.forced)
        yield from (cv, delay, forced)


def _sum_by_rule(views: Mapping[str, ShapingView], name: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for view in views.values():
        for rule in view.rules:
            value: int | None = getattr(rule, name)
            if value is not None:
                total[rule.name] = total.get(rule.name, 0) + value
    return total


def _mirror_metrics(values: Mapping[str, int]) -> Iterator[Metric]:
    def get(name: str) -> int:
        return values.get(name, 0)

    yield CounterMetricFamily(
        "burstgate_mirror_offered", "Requests drawn for a shadow target, copies included.", get("mirror_offered")
    )
    yield CounterMetricFamily("burstgate_mirror_sent", "Requests sent to a shadow target.", get("mirror_sent"))
    dropped = CounterMetricFamily(
        "burstgate_mirror_dropped", "Requests drawn for a shadow target and not sent, by reason.", labels=["reason"]
    )
    for reason in MIRROR_DROPS:
        dropped.add_metric([reason], get(f"mirror_dropped_{reason}"))
    yield dropped
    ended = CounterMetricFamily(
        "burstgate_mirror_requests", "Requests to shadow targets that ended, by outcome.", labels=["outcome"]
    )
    for outcome in Outcome:
        ended.add_metric([outcome.value], get(f"mirror_outcome_{outcome.value}"))
    yield ended
    yield GaugeMetricFamily("burstgate_mirror_queued", "Requests that wait to be mirrored.", get("mirror_queued"))
    yield GaugeMetricFamily(
        "burstgate_mirror_in_flight", "Requests in flight at shadow targets.", get("mirror_in_flight")
    )
