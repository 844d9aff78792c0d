"""What an operator looks at: two readings of the control plane, and what happened between them.

A reading is `/metrics`, `/api/v1/status`, `/api/v1/upstreams` and the newest of `/api/v1/requests?failures=true`. Rates
and percentiles are those of the time between two readings; a counter that went back counts as one that stood still.
Percentiles are interpolated within a histogram's bucket, as Prometheus' histogram_quantile does it; beyond the last
bound they are that bound. `burstgate top` draws it, `burstgate top --once` prints it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

if TYPE_CHECKING:
    import httpx

WINDOW_S: Final = 10.0
"""Over how long rates and percentiles are taken: a second of a quiet gateway has none."""
TIMEOUT_S: Final = 5.0
FAILURES: Final = 50
"""Of the latest, so many are asked for."""
_TTFT: Final = "time_to_first_token_seconds_bucket"
_WANTED: Final = tuple(
    f"burstgate_{name}"
    for name in (
        "requests_total", "requests_in_flight", "tokens_total", "shaping_queue", _TTFT, "model_requests_total",
        "model_tokens_total", f"model_{_TTFT}", "upstream_requests_total", "upstream_tokens_total", f"upstream_{_TTFT}",
    )
)  # fmt: skip

_Listed = TypeVar("_Listed")
Samples = Mapping[str, Mapping[tuple[str, ...], float]]
"""Values by metric and labels; labels are in the order of their names."""


class ControlAway(Exception):
    """The control plane does not answer, or answers what is none of its own."""


class Installation(msgspec.Struct, frozen=True):
    """Of `/api/v1/status`."""

    version: str
    gateway: str
    workers_alive: int
    workers_wanted: int
    dropped: dict[str, int]
    journal_bytes: int
    is_database_up: bool


class _Seen(msgspec.Struct, frozen=True):
    state: str
    error: str | None = None


class _Worker(msgspec.Struct, frozen=True):
    view: _Seen


class Upstream(msgspec.Struct, frozen=True):
    """Of `/api/v1/upstreams`."""

    name: str
    weight: float
    drain: bool
    in_flight: int
    workers: tuple[_Worker, ...] = ()

    @property
    def state(self) -> str:
        """As the workers see it: `up`, `down 1/2` where one of two does not see it up, `?` where none says."""
        states = [each.view.state for each in self.workers]
        if not states:
            return "?"
        worst = next((state for state in ("down", "ejected", "half_open") if state in states), "up")
        agree = states.count(worst)
        return worst if agree == len(states) else f"{worst} {agree}/{len(states)}"

    @property
    def error(self) -> str | None:
        """What failed last, while it is not up."""
        return next((each.view.error for each in self.workers if each.view.state != "up" and each.view.error), None)


class Failure(msgspec.Struct, frozen=True):
    """Of `/api/v1/requests`."""

    request_id: str
    received_at: float
    outcome: str
    model: str | None = None
    status: int | None = None
    error_type: str | None = None
    upstream: str | None = None
    elapsed_s: float | None = None
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What the control plane said. at_s: monotonic."""

    at_s: float
    samples: Samples
    installation: Installation
    upstreams: tuple[Upstream, ...]
    failures: tuple[Failure, ...]
    problem: str | None
    """Why upstreams or failures are not known."""


@dataclass(frozen=True, slots=True)
class Row:
    """A model or an upstream, between two readings."""

    name: str
    requests_per_s: float
    failures_per_s: float
    tokens_per_s: float
    """Of answers."""
    ttft_s: tuple[float | None, float | None, float | None]
    """p50, p95, p99; None where there was no stream."""


@dataclass(frozen=True, slots=True)
class Glance:
    """What happened between two readings, and how things stand."""

    over_s: float
    requests_per_s: float
    failures_per_s: float
    request_tokens_per_s: float
    response_tokens_per_s: float
    in_flight: int
    held: int
    """By shaping."""
    ttft_s: tuple[float | None, float | None, float | None]
    outcomes: tuple[tuple[str, float, int], ...]
    """Failed ones that ever occurred: name, a second, in all."""
    models: tuple[Row, ...]
    upstreams: tuple[tuple[Upstream, Row], ...]
    reading: Reading


class Control:
    """The control plane at a URL. token: of a viewer at least, where it asks for one."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """Raises ValueError for a URL that is none."""
        import httpx

        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--control: expected http://HOST:PORT, got {url!r}")
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        try:
            self._client = httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=False)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"--control: {error}") from None
        self.url = url

    async def close(self) -> None:
        """Let go of its connections."""
        await self._client.aclose()

    async def read(self) -> Reading:
        """Everything, now. Raises ControlAway saying why it can not be had."""
        import httpx

        try:
            page, status, upstreams, failures = await asyncio.gather(
                self._client.get("/metrics"),
                self._client.get("/api/v1/status"),
                self._client.get("/api/v1/upstreams"),
                self._client.get("/api/v1/requests", params={"failures": "true", "limit": FAILURES}),
            )
        except httpx.HTTPError as error:
            raise ControlAway(f"no answer: {' '.join(str(error).split()) or type(error).__name__}") from None
        for answer in (page, status):
            if not answer.is_success:
                raise ControlAway(_reason(answer))
        try:
            return Reading(
                time.monotonic(),
                parse_samples(page.text),
                msgspec.json.decode(status.content, type=Installation),
                _listed(upstreams, Upstream),
                _listed(failures, Failure),
                next((_reason(each) for each in (upstreams, failures) if not each.is_success), None),
            )
        except (ValueError, msgspec.MsgspecError) as error:
            raise ControlAway(f"not burstgate's control plane, or one of another version: {error}") from None


def _listed(answer: httpx.Response, kind: type[_Listed]) -> tuple[_Listed, ...]:
    return msgspec.json.decode(answer.content, type=tuple[kind, ...]) if answer.is_success else ()  # type: ignore[valid-type]


def _reason(answer: httpx.Response) -> str:
    try:
        said = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = "expected burstgate's control plane"
    more = "; name a token's file: --token-file" if answer.status_code == 401 else ""
    return f"HTTP {answer.status_code} of {answer.url.path}: {' '.join(said.split())}{more}"


def parse_samples(text: str) -> Samples:
    """The samples of a Prometheus page that are looked at. Raises ValueError."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in _WANTED}
    kept = "\n".join(line for line in text.splitlines() if line.startswith(_WANTED))
    for family in text_string_to_metric_families(kept + "\n"):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """Of counts by upper bound, not cumulative; None for none. Linear within a bucket, from 0 on."""
    total = sum(buckets.values())
    if total <= 0:
        return None
    rank = share * total
    below = lower = 0.0
    for bound, count in sorted(buckets.items()):
        if count and below + count >= rank:
            return lower if math.isinf(bound) else lower + (bound - lower) * max(0.0, rank - below) / count
        below += count
        lower = lower if math.isinf(bound) else bound
    return lower


class _Between:
    """Differences of two readings' samples."""

    def __init__(self, before: Reading, now: Reading) -> None:
        self._before = before.samples
        self._now = now.samples
        self.over_s = max(now.at_s - before.at_s, 1e-3)

    def total(self, name: str, labels: tuple[str, ...]) -> float:
        return self._now[name].get(labels, 0.0)

    def grown(self, name: str, labels: tuple[str, ...]) -> float:
        return max(0.0, self.total(name, labels) - self._before[name].get(labels, 0.0))

    def labels(self, name: str) -> Iterable[tuple[str, ...]]:
        return self._now[name]

    def ttft_s(self, prefix: str, *labels: str) -> tuple[float | None, float | None, float | None]:
        """labels: those beside `le`, which comes first."""
        name = f"burstgate_{prefix}{_TTFT}"
        own = [each for each in self.labels(name) if each[1:] == labels]
        buckets: dict[float, float] = {}
        before = 0.0
        for bound in sorted(own, key=lambda each: float(each[0])):
            grown = self.grown(name, bound)
            buckets[float(bound[0])] = max(0.0, grown - before)
            before = grown
        return quantile(buckets, 0.5), quantile(buckets, 0.95), quantile(buckets, 0.99)

    def row(self, kind: str, name: str) -> Row:
        """kind: model or upstream."""
        requests = f"burstgate_{kind}_requests_total"
        ended: dict[str, float] = {}
        for labels in self.labels(requests):
            # In the order of the labels' names: (model, outcome), but (outcome, upstream).
            outcome, owner = (labels[1], labels[0]) if kind == "model" else labels
            if owner == name:
                ended[outcome] = self.grown(requests, labels)
        tokens = ("response", name)
        return Row(
            name,
            sum(ended.values()) / self.over_s,
            sum(count for outcome, count in ended.items() if outcome != "ok") / self.over_s,
            self.grown(f"burstgate_{kind}_tokens_total", tokens) / self.over_s,
            self.ttft_s(f"{kind}_", name),
        )


def glance(before: Reading, now: Reading) -> Glance:
    """What happened between two readings."""
    between = _Between(before, now)
    over_s = between.over_s
    requests = "burstgate_requests_total"
    outcomes = [labels for labels in between.labels(requests) if labels != ("ok",)]
    failed = {each[0]: between.grown(requests, each) for each in outcomes}
    models = sorted({labels[0] for labels in between.labels("burstgate_model_requests_total")})
    return Glance(
        over_s,
        sum(between.grown(requests, labels) for labels in between.labels(requests)) / over_s,
        sum(failed.values()) / over_s,
        between.grown("burstgate_tokens_total", ("request",)) / over_s,
        between.grown("burstgate_tokens_total", ("response",)) / over_s,
        int(between.total("burstgate_requests_in_flight", ())),
        int(between.total("burstgate_shaping_queue", ())),
        between.ttft_s(""),
        tuple(
            (name, count / over_s, int(between.total(requests, (name,))))
            for name, count in failed.items()
            if between.total(requests, (name,))
        ),
        tuple(between.row("model", name) for name in models),
        tuple((each, between.row("upstream", each.name)) for each in now.upstreams),
        now,
    )


class Readings:
    """The latest readings: each is looked at together with the one WINDOW_S before it."""

    def __init__(self) -> None:
        self._kept: deque[Reading] = deque()

    def add(self, reading: Reading) -> Glance | None:
        """None for the first."""
        while len(self._kept) > 1 and self._kept[1].at_s <= reading.at_s - WINDOW_S:
            self._kept.popleft()
        self._kept.append(reading)
        return glance(self._kept[0], reading) if len(self._kept) > 1 else None


# As text --------------------------------------------------------------------------------------------------------------

MODEL_COLUMNS = ("model", "requests/s", "failed/s", "tokens/s", "ttft p50", "p95", "p99")
UPSTREAM_COLUMNS = ("upstream", "state", "in flight", "weight", "requests/s", "failed/s", "ttft p95")
FAILURE_COLUMNS = ("time", "outcome", "status", "error", "model", "upstream", "request")
SORTS = ("requests", "failures", "tokens", "ttft", "name")


def shown_s(value_s: float | None) -> str:
    """Seconds, as an operator reads them."""
    if value_s is None:
        return "-"
    return f"{value_s * 1000:.0f} ms" if value_s < 1 else f"{value_s:.2f} s" if value_s < 100 else f"{value_s:.0f} s"


def shown_rate(value: float) -> str:
    """Something a second."""
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def shown_ttft(ttft_s: Sequence[float | None]) -> str:
    """Its percentiles."""
    return "  ".join(f"p{share} {shown_s(value)}" for share, value in zip((50, 95, 99), ttft_s, strict=True))


def _rank(row: Row, by: str) -> tuple[float, str]:
    values = {
        "requests": row.requests_per_s,
        "failures": row.failures_per_s,
        "tokens": row.tokens_per_s,
        "ttft": row.ttft_s[1] or 0.0,
        "name": 0.0,
    }
    return -values[by], row.name


def model_rows(seen: Glance, by: str) -> list[tuple[str, ...]]:
    """by: one of SORTS."""
    return [
        (
            row.name, shown_rate(row.requests_per_s), shown_rate(row.failures_per_s), shown_rate(row.tokens_per_s),
            *map(shown_s, row.ttft_s),
        )
        for row in sorted(seen.models, key=lambda row: _rank(row, by))
    ]  # fmt: skip


def upstream_rows(seen: Glance, by: str) -> list[tuple[str, ...]]:
    """by: one of SORTS."""
    return [
        (
            each.name, f"{each.state} (drain)" if each.drain else each.state, str(each.in_flight), f"{each.weight:g}",
            shown_rate(row.requests_per_s), shown_rate(row.failures_per_s), shown_s(row.ttft_s[1]),
        )
        for each, row in sorted(seen.upstreams, key=lambda pair: _rank(pair[1], by))
    ]  # fmt: skip


def failure_rows(seen: Glance) -> list[tuple[str, ...]]:
    """The newest first."""
    return [
        (
            time.strftime("%H:%M:%S", time.localtime(each.received_at)), each.outcome,
            str(each.status or "-"), each.error_type or "-", each.model or "-", each.upstream or "-", each.request_id,
        )
        for each in seen.reading.failures
    ]  # fmt: skip


def head_line(seen: Glance) -> str:
    """Which installation, and whether it is whole."""
    found = seen.reading.installation
    parts = [
        f"burstgate {found.version}",
        found.gateway,
        f"workers {found.workers_alive}/{found.workers_wanted}",
        f"database {'up' if found.is_database_up else 'DOWN'}",
    ]
    if dropped := sum(found.dropped.values()):
        parts.append(f"NOT RECORDED {dropped:,}")
    return "  ".join(parts)


def outcome_line(seen: Glance) -> str:
    """Failures by outcome: a second, and in all."""
    return "  ".join(f"{name} {shown_rate(rate)}/s ({total:,})" for name, rate, total in seen.outcomes) or "none"


def figures(seen: Glance) -> tuple[tuple[str, str], ...]:
    """What is drawn large: name and value."""
    held = f" ({seen.held:,} held by shaping)" if seen.held else ""
    tokens = f"{shown_rate(seen.request_tokens_per_s)} in, {shown_rate(seen.response_tokens_per_s)} out"
    return (
        ("requests/s", shown_rate(seen.requests_per_s)),
        ("tokens/s", tokens),
        ("in flight", f"{seen.in_flight:,}{held}"),
        ("ttft", shown_ttft(seen.ttft_s)),
        ("failed/s", shown_rate(seen.failures_per_s)),
    )


def as_text(seen: Glance, width: int = 80) -> str:
    """Everything as plain lines of at most `width` characters."""
    lines = [f"{head_line(seen)}  over {seen.over_s:.1f} s"]
    lines += [f"{name:<12}{value}" for name, value in figures(seen)]
    lines.append(f"{'failures':<12}{outcome_line(seen)}")
    for columns, rows in (
        (UPSTREAM_COLUMNS, upstream_rows(seen, "requests")),
        (MODEL_COLUMNS, model_rows(seen, "requests")),
        (FAILURE_COLUMNS[:6], [row[:6] for row in failure_rows(seen)[:10]]),
    ):
        if rows:
            widths = [max(len(row[place]) for row in (columns, *rows)) for place in range(len(columns))]
            lines.append("")
            lines += ["  ".join(f"{text:<{size}}" for text, size in zip(row, widths, strict=True)).rstrip()
                      for row in (columns, *rows)]  # fmt: skip
    if seen.reading.problem is not None:
        lines += ["", f"not known: {seen.reading.problem}"]
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in lines)
