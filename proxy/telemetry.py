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

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from storage.counters import read_counters
from storage.journal import DROP_REASONS, JOURNAL_COUNTERS, RETIRED, is_writer_alive, list_directory, writer_directories
from traces.record import Outcome

TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
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
    "keys_refused",
    "routes_refused",
    *(f"outcome_{outcome.value}" for outcome in Outcome),
    *_histogram_names("ttft", TTFT_BUCKETS_S),
    *_histogram_names("e2e", E2E_BUCKETS_S),
)
"""The slots behind the journal's own, in order. in_flight is a gauge; the rest only grow."""

_SLOT = {name: index for index, name in enumerate(JOURNAL_COUNTERS + WORKER_COUNTERS)}
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
_TTFT = _SLOT[f"ttft_le_{TTFT_BUCKETS_S[0]:g}"]
_TTFT_SUM = _SLOT["ttft_sum_us"]
_E2E = _SLOT[f"e2e_le_{E2E_BUCKETS_S[0]:g}"]
_E2E_SUM = _SLOT["e2e_sum_us"]


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

    def key_refused(self) -> None:
        """A request had no key that is good."""
        self._slots[_KEYS_REFUSED] += 1

    def route_refused(self) -> None:
        """A request asked for what is not for clients."""
        self._slots[_ROUTES_REFUSED] += 1

    def accounting_failed(self) -> None:
        """An answer could not be accounted for; its bytes passed on."""
        self._slots[_ACCOUNTING_ERRORS] += 1


GAUGES = frozenset({"in_flight", "journal_unwritten"})


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
    )
    yield _histogram(
        "burstgate_request_duration_seconds", "Submission to last byte, all outcomes.", "e2e", E2E_BUCKETS_S, values
    )
