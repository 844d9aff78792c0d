"""What a worker counts, and how it is shown to Prometheus.

A worker counts into the memory-mapped slots of its journal's counters file (storage/counters.py): a store of eight
bytes, no lock, no label lookup, and any process can read all workers at once. The control plane sums the files of
living and retired writers into one scrape.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from proxy.shaping_view import SHAPING_VIEW, ShapingView
from storage.counters import read_counters
from storage.journal import DROP_REASONS, JOURNAL_COUNTERS, RETIRED, is_writer_alive, list_directory, writer_directories
from traces.record import Outcome

TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WAIT_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
E2E_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


def _histogram_names(name: str, buckets: tuple[float, ...]) -> tuple[str, ...]:
    return (*(f"{name}_le_{bound:g}" for bound in buckets), f"{name}_le_inf", f"{name}_sum_us")


WORKER_COUNTERS = (
    "in_flight",
    "request_tokens",
    "response_tokens",
    "usage_unknown",
    "accounting_errors",
    "retries",
    *(f"outcome_{outcome.value}" for outcome in Outcome),
    *_histogram_names("ttft", TTFT_BUCKETS_S),
    *_histogram_names("e2e", E2E_BUCKETS_S),
    "shaping_waiting",
    "shaping_held",
    "shaping_rejected",
    "shaping_fallbacks",
    *_histogram_names("shaping_wait", WAIT_BUCKETS_S),
)
"""The slots behind the journal's own, in order. in_flight and shaping_waiting are gauges; the rest only grow."""

_SLOT = {name: index for index, name in enumerate(JOURNAL_COUNTERS + WORKER_COUNTERS)}
_IN_FLIGHT = _SLOT["in_flight"]
_REQUEST_TOKENS = _SLOT["request_tokens"]
_RESPONSE_TOKENS = _SLOT["response_tokens"]
_USAGE_UNKNOWN = _SLOT["usage_unknown"]
_ACCOUNTING_ERRORS = _SLOT["accounting_errors"]
_RETRIES = _SLOT["retries"]
# By text: an enum's own hash is a call in Python.
_OUTCOMES = {outcome.value: _SLOT[f"outcome_{outcome.value}"] for outcome in Outcome}
_TTFT = _SLOT[f"ttft_le_{TTFT_BUCKETS_S[0]:g}"]
_TTFT_SUM = _SLOT["ttft_sum_us"]
_E2E = _SLOT[f"e2e_le_{E2E_BUCKETS_S[0]:g}"]
_E2E_SUM = _SLOT["e2e_sum_us"]
_WAITING = _SLOT["shaping_waiting"]
_HELD = _SLOT["shaping_held"]
_REJECTED = _SLOT["shaping_rejected"]
_FALLBACKS = _SLOT["shaping_fallbacks"]
_WAIT = _SLOT[f"shaping_wait_le_{WAIT_BUCKETS_S[0]:g}"]
_WAIT_SUM = _SLOT["shaping_wait_sum_us"]


class WorkerMetrics:
    """Counts one worker's requests into its slots."""

    __slots__ = ("_slots",)

    def __init__(self, slots: memoryview) -> None:
        self._slots = slots

    def started(self) -> None:
        """A request came in."""
        self._slots[_IN_FLIGHT] += 1

    def ended(
        self,
        outcome: Outcome,
        request_tokens: int | None,
        response_tokens: int | None,
        ttft_s: float | None,
        e2e_s: float,
    ) -> None:
        """Its record has been made."""
        slots = self._slots
        slots[_OUTCOMES[outcome._value_]] += 1
        if request_tokens is None or response_tokens is None:
            slots[_USAGE_UNKNOWN] += 1
        if request_tokens:
            slots[_REQUEST_TOKENS] += request_tokens
        if response_tokens:
            slots[_RESPONSE_TOKENS] += response_tokens
        if ttft_s is not None:
            slots[_TTFT + bisect_left(TTFT_BUCKETS_S, ttft_s)] += 1
            slots[_TTFT_SUM] += int(ttft_s * 1e6)
        slots[_E2E + bisect_left(E2E_BUCKETS_S, e2e_s)] += 1
        slots[_E2E_SUM] += int(e2e_s * 1e6)

    def left(self) -> None:
        """The request is over for the gateway."""
        self._slots[_IN_FLIGHT] -= 1

    def retried(self) -> None:
        """A request went to another upstream."""
        self._slots[_RETRIES] += 1

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


GAUGES = frozenset({"in_flight", "journal_unwritten", "shaping_waiting"})


def sum_counters(journal: Path) -> dict[str, int]:
    """Every slot summed over all writers; gauges over the living ones only."""
    total: dict[str, int] = {}
    seen: set[str] = set()

    def add(writer: str, path: Path, *, is_alive: bool) -> None:
        if writer in seen:
            return
        try:
            values = read_counters(path)
        except (OSError, ValueError):
            return
        seen.add(writer)
        for name, value in values.items():
            if is_alive or name not in GAUGES:
                total[name] = total.get(name, 0) + value

    # The retired ones are looked for last: a writer that retires meanwhile is found there, and counted once.
    for directory in writer_directories(journal):
        add(directory.name, directory / "counters", is_alive=is_writer_alive(directory))
    for path in list_directory(journal / RETIRED):
        add(path.name.removesuffix(".counters"), path, is_alive=False)
    return total


def _histogram(
    name: str, text: str, prefix: str, buckets: tuple[float, ...], values: Mapping[str, int]
) -> HistogramMetricFamily:
    counts = [values.get(f"{prefix}_le_{bound:g}", 0) for bound in buckets] + [values.get(f"{prefix}_le_inf", 0)]
    bounds = [*(f"{bound:g}" for bound in buckets), "+Inf"]
    cumulative = list(zip(bounds, map(float, itertools.accumulate(counts)), strict=True))
    return HistogramMetricFamily(name, text, buckets=cumulative, sum_value=values.get(f"{prefix}_sum_us", 0) / 1e6)


def worker_metrics(values: Mapping[str, int]) -> Iterator[Metric]:
    """The summed slots as Prometheus metrics."""

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
    )
    yield _histogram(
        "burstgate_request_duration_seconds", "Submission to last byte, all outcomes.", "e2e", E2E_BUCKETS_S, values
    )
    yield GaugeMetricFamily("burstgate_shaping_queue", "Requests held by shaping now.", get("shaping_waiting"))
    yield CounterMetricFamily("burstgate_shaping_held", "Requests that had to wait.", get("shaping_held"))
    yield CounterMetricFamily("burstgate_shaping_rejected", "Requests refused with 429.", get("shaping_rejected"))
    yield CounterMetricFamily(
        "burstgate_shaping_fallbacks", "Times that the shared limits' backend was gone.", get("shaping_fallbacks")
    )
    yield _histogram(
        "burstgate_shaping_wait_seconds", "How long requests were held.", "shaping_wait", WAIT_BUCKETS_S, values
    )


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
