"""Counters by operation, model and upstream, and exemplars: two blocks of a worker's counters file, bounded.

`series[SLOTS]`: `ROWS` rows of `ROW_SLOTS` slots, taken in order and never given back. A row is its key and its counts:

    slot 0      length of the key in bytes, stored last; 0: free
    48 slots    the key, UTF-8: operation, model and upstream with a NUL between them
    the rest    `COLUMNS`: outcomes, histograms (one slot a bucket, then the sum)

Who may have a row of its own: names of upstreams and operations come from the gateway; a model comes from outside, so
it must first have been answered, and only the first `MAX_MODELS` are told apart. All else counts under `OTHER`, and
what finds no room in the row of everything else, row 0.

`exemplars[SLOTS]`: the latest request of each bucket of two histograms, `EXEMPLAR_SLOTS` each:

    end, replaceable from (epoch s), id (128 bits in two), epoch ms, microseconds * 2 + (the id is a trace's), begin

A writer counts `begin` up first and sets `end` to it last; a reader, which copies upwards, trusts what has both equal.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import CounterMetricFamily, Exemplar, HistogramMetricFamily, Metric

from traces.record import Outcome, TraceRecord

TTFT_BUCKETS_S: Final[tuple[float, ...]] = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
E2E_BUCKETS_S: Final[tuple[float, ...]] = (
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
    120.0,
    300.0,
)
TPOT_BUCKETS_S: Final[tuple[float, ...]] = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
)
TOKEN_BUCKETS: Final[tuple[float, ...]] = (
    1,
    4,
    16,
    64,
    256,
    1024,
    4096,
    16384,
    65536,
    262144,
    1048576,
    4194304,
    16777216,
    67108864,
)
"""The last two as OpenTelemetry's GenAI conventions advise."""

MAX_MODELS: Final = 64
MAX_UPSTREAMS = 64
"""Of all workers together, in what is shown."""
ROWS: Final = 256
OTHER: Final = "other"
_KEY_SLOTS = 48
_MAX_MODEL_BYTES = 192
_MAX_UPSTREAM_BYTES = 128
_OUTCOMES = tuple(outcome.value for outcome in Outcome)

HISTOGRAMS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("request_tokens", TOKEN_BUCKETS),
    ("response_tokens", TOKEN_BUCKETS),
    ("ttft", TTFT_BUCKETS_S),
    ("e2e", E2E_BUCKETS_S),
    ("upstream", E2E_BUCKETS_S),
    ("tpot", TPOT_BUCKETS_S),
)
"""A row's histograms and their bounds; times are summed in microseconds. upstream: from sent to the last byte."""


def _columns() -> dict[str, int]:
    at = {}
    next_column = len(_OUTCOMES)
    for name, bounds in HISTOGRAMS:
        at[name] = next_column
        next_column += len(bounds) + 2
    at["end"] = next_column
    return at


COLUMNS = _columns()
"""Where each histogram begins behind a row's key; the outcomes are the first."""
ROW_SLOTS: Final = 1 + _KEY_SLOTS + COLUMNS["end"]
_COUNTS: Final = 1 + _KEY_SLOTS
_OUTCOME_AT: Final = {name: _COUNTS + index for index, name in enumerate(_OUTCOMES)}
_REQUEST_TOKENS: Final = _COUNTS + COLUMNS["request_tokens"]
_RESPONSE_TOKENS: Final = _COUNTS + COLUMNS["response_tokens"]
_TTFT: Final = _COUNTS + COLUMNS["ttft"]
_E2E: Final = _COUNTS + COLUMNS["e2e"]
_UPSTREAM: Final = _COUNTS + COLUMNS["upstream"]
_TPOT: Final = _COUNTS + COLUMNS["tpot"]
_TTFT_SUM: Final = _TTFT + len(TTFT_BUCKETS_S) + 1
_E2E_SUM: Final = _E2E + len(E2E_BUCKETS_S) + 1
_UPSTREAM_SUM: Final = _UPSTREAM + len(E2E_BUCKETS_S) + 1
_TPOT_SUM: Final = _TPOT + len(TPOT_BUCKETS_S) + 1
_TOKENS_SUM: Final = len(TOKEN_BUCKETS) + 1

EXEMPLAR_SLOTS: Final = 7
EXEMPLAR_HISTOGRAMS = (("ttft", TTFT_BUCKETS_S), ("e2e", E2E_BUCKETS_S))
E2E_EXEMPLARS: Final = len(TTFT_BUCKETS_S) + 1
"""Where those of the second begin."""
_EXEMPLARS = sum(len(bounds) + 1 for _, bounds in EXEMPLAR_HISTOGRAMS)
EXEMPLAR_S: Final = 1
TRACE_EXEMPLAR_S: Final = 60
"""How long an exemplar stands before another replaces it; one that names a trace stands longer, and gives way to the
next of its kind."""

SERIES_BLOCKS = (f"exemplars[{_EXEMPLARS * EXEMPLAR_SLOTS}]", f"series[{ROWS * ROW_SLOTS}]")
"""The names of both blocks; the rows come last, so that those that nobody took can be cut off in the end."""

Key = tuple[str, str, str]
"""Operation, model, upstream."""


def _cut(text: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8, and no NUL."""
    return text.replace("\0", " ").encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")


class SeriesTable:
    """The writing side: one worker's rows."""

    __slots__ = ("_first", "_models", "_places", "_rows", "_slots")

    def __init__(self, slots: memoryview, first: int) -> None:
        """first: the slot where the block begins. Goes on from the rows that are there."""
        self._slots = slots
        self._first = first
        self._rows = 0
        self._models: set[str] = set()
        self._places: dict[tuple[str, str | None, str | None], int] = {}
        while self._rows < ROWS and slots[first + self._rows * ROW_SLOTS]:
            start = first + self._rows * ROW_SLOTS
            self._keep(_key(slots[start : start + ROW_SLOTS]), start)
        if not self._rows:
            self._add((OTHER, OTHER, ""))

    def ended(
        self, record: TraceRecord, operation: str, ttft_bucket: int, e2e_bucket: int, upstream_s: float | None
    ) -> None:
        """Count a request. The buckets are those of its `ttft_s` and `elapsed_s`."""
        slots = self._slots
        row = self._places.get((operation, record.model, record.upstream), -1)
        if row < 0:
            row = self._find(operation, record.model, record.upstream, record.outcome._value_ == "ok")
        slots[row + _OUTCOME_AT[record.outcome._value_]] += 1
        tokens = record.request_tokens
        if tokens is not None:
            slots[row + _REQUEST_TOKENS + bisect_left(TOKEN_BUCKETS, tokens)] += 1
            slots[row + _REQUEST_TOKENS + _TOKENS_SUM] += tokens
        tokens = record.response_tokens
        if tokens is not None:
            slots[row + _RESPONSE_TOKENS + bisect_left(TOKEN_BUCKETS, tokens)] += 1
            slots[row + _RESPONSE_TOKENS + _TOKENS_SUM] += tokens
        if record.ttft_s is not None:
            slots[row + _TTFT + ttft_bucket] += 1
            slots[row + _TTFT_SUM] += int(record.ttft_s * 1e6)
        if record.elapsed_s is not None:
            slots[row + _E2E + e2e_bucket] += 1
            slots[row + _E2E_SUM] += int(record.elapsed_s * 1e6)
        if upstream_s is not None:
            slots[row + _UPSTREAM + bisect_left(E2E_BUCKETS_S, upstream_s)] += 1
            slots[row + _UPSTREAM_SUM] += int(upstream_s * 1e6)
        if record.tpot_s is not None:
            slots[row + _TPOT + bisect_left(TPOT_BUCKETS_S, record.tpot_s)] += 1
            slots[row + _TPOT_SUM] += int(record.tpot_s * 1e6)

    def _find(self, operation: str, model: str | None, upstream: str | None, is_answered: bool) -> int:
        """The row of a request whose own one is not known yet, or does not exist."""
        name = _cut(model, _MAX_MODEL_BYTES) if model is not None else ""
        is_known = model is None or name in self._models or (is_answered and len(self._models) < MAX_MODELS)
        key = (operation, name if is_known else OTHER, _cut(upstream or "", _MAX_UPSTREAM_BYTES))
        row = self._places.get(key, -1)
        if row < 0:
            row = self._add(key) if self._rows < ROWS else self._first
        if is_known and row != self._first:
            self._places[operation, model, upstream] = row
        return row

    def _add(self, key: Key) -> int:
        row = self._first + self._rows * ROW_SLOTS
        data = "\0".join(key).encode()
        for index in range(0, len(data), 8):
            self._slots[row + 1 + index // 8] = int.from_bytes(data[index : index + 8], "little")
        self._slots[row] = len(data)
        self._keep(key, row)
        return row

    def _keep(self, key: Key, row: int) -> None:
        self._rows += 1
        self._places[key] = row
        if key[1] not in ("", OTHER):
            self._models.add(key[1])


class Exemplars:
    """The writing side: the latest request of each bucket."""

    __slots__ = ("_first", "_slots")

    def __init__(self, slots: memoryview, first: int) -> None:
        self._slots = slots
        self._first = first

    def take(self, place: int, value_s: float, at_s: float, request_id: str, trace_id: str | None) -> None:
        """Take a request for one of the buckets. at_s: when it ended; not before the one there may be replaced, unless
        it has a trace."""
        slots = self._slots
        start = self._first + place * EXEMPLAR_SLOTS
        number = int((trace_id or request_id).replace("-", ""), 16)
        begun = slots[start + 6] + 1
        slots[start + 6] = begun
        slots[start + 1] = int(at_s) + (EXEMPLAR_S if trace_id is None else TRACE_EXEMPLAR_S)
        slots[start + 2] = number >> 64
        slots[start + 3] = number & 0xFFFFFFFFFFFFFFFF
        slots[start + 4] = int(at_s * 1e3)
        slots[start + 5] = int(value_s * 1e6) << 1 | (trace_id is not None)
        slots[start] = begun


# Reading --------------------------------------------------------------------------------------------------------------


def _key(row: memoryview) -> Key:
    data = row[1:_COUNTS].tobytes()[: row[0]]
    operation, _, rest = data.decode("utf-8", "replace").partition("\0")
    model, _, upstream = rest.partition("\0")
    return operation, model, upstream


Rows = dict[Key, list[int]]
"""Counts, in the order of `COLUMNS`, by key."""


def add_rows(total: Rows, block: memoryview) -> None:
    """Add one writer's rows to those of others."""
    for start in range(0, len(block), ROW_SLOTS):
        row = block[start : start + ROW_SLOTS]
        if not row[0]:
            return
        counts = row[_COUNTS:].tolist()
        counts += [0] * (COLUMNS["end"] - len(counts))  # of a file that was cut
        _add_counts(total, _key(row), counts)


def _add_counts(total: Rows, key: Key, counts: list[int]) -> None:
    there = total.get(key)
    total[key] = counts if there is None else [a + b for a, b in zip(there, counts, strict=True)]


class Labels:
    """Which names are told apart over all writers, first come first kept: a series that was shown stays shown."""

    def __init__(self) -> None:
        self._models: set[str] = {"", OTHER}
        self._upstreams: set[str] = {"", OTHER}

    def bound(self, rows: Rows) -> Rows:
        """The rows with what is too many as `OTHER`, and without those that have counted nothing."""
        bounded: Rows = {}
        for (operation, model, upstream), counts in rows.items():
            if any(counts):
                model = self._label(self._models, model, MAX_MODELS)
                upstream = self._label(self._upstreams, upstream, MAX_UPSTREAMS)
                _add_counts(bounded, (operation, model, upstream), counts)
        return bounded

    @staticmethod
    def _label(known: set[str], name: str, limit: int) -> str:
        if name not in known:
            if len(known) >= limit + 2:
                return OTHER
            known.add(name)
        return name


@dataclass(frozen=True, slots=True)
class Example:
    """An exemplar as it is read."""

    id_hex: str
    is_trace: bool
    value: float
    at_s: float

    def shown(self) -> Exemplar:
        """For Prometheus."""
        if self.is_trace:
            return Exemplar({"trace_id": self.id_hex}, self.value, self.at_s)
        text = self.id_hex
        name = f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
        return Exemplar({"request_id": name}, self.value, self.at_s)


Examples = dict[int, Example]
"""By the bucket's place in the block."""


def add_examples(total: Examples, block: memoryview) -> None:
    """Take one writer's exemplars where they are younger than those there are."""
    for place in range(len(block) // EXEMPLAR_SLOTS):
        end, _, high, low, at_ms, value, begin = block[place * EXEMPLAR_SLOTS : (place + 1) * EXEMPLAR_SLOTS]
        if end and end == begin and (place not in total or total[place].at_s < at_ms / 1e3):
            total[place] = Example(f"{high << 64 | low:032x}", bool(value & 1), (value >> 1) / 1e6, at_ms / 1e3)


def histogram(
    family: HistogramMetricFamily,
    labels: list[str],
    bounds: tuple[float, ...],
    counts: Iterable[int],
    total: float,
    examples: Mapping[int, Example] | None = None,
) -> None:
    """Add one histogram: counts of its buckets, the last without a bound. examples: by bucket."""
    names = [*(f"{bound:g}" for bound in bounds), "+Inf"]
    buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
    for place, (name, count) in enumerate(zip(names, itertools.accumulate(counts), strict=True)):
        example = examples.get(place) if examples else None
        buckets.append((name, float(count)) if example is None else (name, float(count), example.shown()))
    family.add_metric(labels, buckets, total)


def column(counts: list[int], name: str, bounds: tuple[float, ...]) -> tuple[list[int], int]:
    """A histogram's buckets and sum in a row."""
    first = COLUMNS[name]
    return counts[first : first + len(bounds) + 1], counts[first + len(bounds) + 1]


def fold(rows: Rows, *, keep: tuple[int, ...]) -> dict[tuple[str, ...], list[int]]:
    """Rows summed over the parts of the key that are not kept. keep: 0 operation, 1 model, 2 upstream."""
    folded: dict[tuple[str, ...], list[int]] = {}
    for key, counts in rows.items():
        part = tuple([key[place] for place in keep])
        there = folded.get(part)
        folded[part] = counts if there is None else [a + b for a, b in zip(there, counts, strict=True)]
    return folded


def series_metrics(rows: Rows) -> Iterator[Metric]:
    """The rows as Prometheus metrics, by model and by upstream."""
    for label, place, text in (
        ("model", 1, "by model (as asked for; 'other': never answered, or beyond the first 64)"),
        ("upstream", 2, "by upstream (empty: none was reached)"),
    ):
        requests = CounterMetricFamily(
            f"burstgate_{label}_requests", f"Requests ended, {text} and outcome.", labels=[label, "outcome"]
        )
        tokens = CounterMetricFamily(
            f"burstgate_{label}_tokens", f"Tokens counted, {text} and direction.", labels=[label, "direction"]
        )
        ttft = HistogramMetricFamily(
            f"burstgate_{label}_time_to_first_token_seconds",
            f"First content chunk minus request sent, of streams, {text}.",
            labels=[label],
        )
        for (name,), counts in fold(rows, keep=(place,)).items():
            for outcome, count in zip(_OUTCOMES, counts, strict=False):
                if count:
                    requests.add_metric([name, outcome], count)
            for direction in ("request", "response"):
                tokens.add_metric([name, direction], column(counts, f"{direction}_tokens", TOKEN_BUCKETS)[1])
            buckets, total_us = column(counts, "ttft", TTFT_BUCKETS_S)
            if any(buckets):
                histogram(ttft, [name], TTFT_BUCKETS_S, buckets, total_us / 1e6)
        yield from (requests, tokens, ttft)
