"""`GET /api/v1/live`: what the gateway does now, as server-sent events, one a second.

    event: history     first, and after an unknown `Last-Event-ID`: {"points": [...]} of the last KEPT_S seconds
    event: now         then every second: {"point": {...}, "upstreams": [...], ...}

Everything comes from the counters and views of the workers: a database that is away changes nothing. One sampler for
all viewers, which runs while the control plane does, so that a fresh page has its charts at once. An event's id is
`START-NUMBER`; who comes back with a `Last-Event-ID` of this process gets, as `history`, the points since. A viewer has
no queue: it takes what is newest when it is ready, and one that is slow misses seconds. There are at most MAX_VIEWERS,
then 503. A stream ends after MAX_STREAM_S: browsers come back by themselves, and whose token has ended meanwhile
does not.
"""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
from fastapi import APIRouter, Header, HTTPException, Query, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from proxy.control_schema import answers
from proxy.guard_rails import histogram_quantile
from proxy.series import E2E_BUCKETS_S, TOKEN_BUCKETS, TPOT_BUCKETS_S, TTFT_BUCKETS_S, column, fold
from proxy.settings import Settings, show_value
from proxy.shaping_view import ShapingView
from proxy.telemetry import MIRROR_DROPS, CountersReader, ShapingMetrics, Totals
from proxy.view import WorkerView, read_views
from storage.doctor import Balance
from storage.journal import directory_bytes
from traces.record import Outcome
from wire.http import parse_base_url

log = logging.getLogger("burstgate.control")

PERIOD_S: Final = 1.0
KEPT_S: Final = 900
WINDOW_S: Final = 10
"""Of quantiles, and of rates by model and upstream."""
BASELINE_S: Final = 3600
BURST_FACTOR: Final = 2.0
BURST_MIN_REQUESTS: Final = 20
"""In the window: fewer are no burst, whatever came before."""
MIN_BASELINE_WINDOWS: Final = 3
MAX_VIEWERS: Final = 64
MAX_STREAM_S: Final = 300.0
QUANTILES: Final = (0.5, 0.95, 0.99)
_BUCKETS: Final = {"ttft": TTFT_BUCKETS_S, "tpot": TPOT_BUCKETS_S, "e2e": E2E_BUCKETS_S}
_OUTCOMES: Final = tuple(outcome.value for outcome in Outcome)


class Point(msgspec.Struct, frozen=True, omit_defaults=True):
    """One second in figures. Rates are of this second, quantiles of the last WINDOW_S."""

    at: float
    """Epoch seconds, its end."""
    arrivals_rps: float = 0.0
    outcomes_rps: dict[str, float] = {}
    """Of requests that ended; an outcome that did not occur is left out."""
    live_rps: float = 0.0
    """Ended, clients' own and without an injected fault."""
    injected_rps: float = 0.0
    """Ended, all others: injected, replayed, faulted."""
    request_tokens_per_s: float = 0.0
    response_tokens_per_s: float = 0.0
    in_flight: int = 0
    ttft_s: tuple[float, ...] = ()
    """At QUANTILES, linear inside a bucket of the metrics' histograms; empty where nothing ended."""
    tpot_s: tuple[float, ...] = ()
    e2e_s: tuple[float, ...] = ()
    shaping_waiting: int = 0
    shaping_held_rps: float = 0.0
    shaping_rejected_rps: float = 0.0
    is_burst: bool = False


class UpstreamNow(msgspec.Struct, frozen=True):
    """One upstream over all workers; rates of the last WINDOW_S."""

    name: str
    url: str
    drain: bool
    states: dict[str, int]
    """How many workers see it so; empty before the first has said it."""
    weight: float
    in_flight: int
    models: tuple[str, ...] | None
    error: str | None
    requests_rps: float
    failures_rps: float
    response_tokens_per_s: float


class ModelNow(msgspec.Struct, frozen=True):
    """One model, of the last WINDOW_S."""

    name: str
    requests_rps: float
    failures_rps: float
    request_tokens_per_s: float
    response_tokens_per_s: float
    ttft_s: tuple[float, ...]


class RuleNow(msgspec.Struct, frozen=True):
    """One rule of shaping over all workers; rates of the last WINDOW_S."""

    name: str
    waiting: int
    limit: int | None
    """Of an adaptive limit."""
    held_rps: float
    rejected_rps: float


class MirrorNow(msgspec.Struct, frozen=True):
    """Shadow traffic; rates of the last WINDOW_S."""

    queued: int
    in_flight: int
    sent_rps: float
    dropped_rps: float


class Now(msgspec.Struct, frozen=True):
    """All that one event says."""

    point: Point
    upstreams: tuple[UpstreamNow, ...]
    models: tuple[ModelNow, ...]
    rules: tuple[RuleNow, ...]
    mirror: MirrorNow
    workers: int
    workers_wanted: int
    journal_bytes: int
    records_in_journal: int | None
    """Not yet in the database, as counted last; None before that."""
    is_database_up: bool
    rate_rps: float
    """Arrivals over the last WINDOW_S."""
    baseline_rps: float | None
    """Median over the last hour's windows with requests; None before there are MIN_BASELINE_WINDOWS of them."""


class History(msgspec.Struct, frozen=True):
    """The points that were kept."""

    points: tuple[Point, ...]
    quantiles: tuple[float, ...] = QUANTILES
    window_s: int = WINDOW_S
    period_s: float = PERIOD_S
    kept_s: int = KEPT_S


@dataclass(frozen=True, slots=True)
class Reading:
    """All that is read at one moment."""

    at_s: float
    """Epoch."""
    totals: Totals
    rules: dict[str, tuple[int, int]]
    """Held and rejected by rule, since the start."""


def rules_of(views: dict[str, ShapingView]) -> dict[str, tuple[int, int, int, int | None]]:
    """Waiting, held, rejected and limit by rule, over all workers."""
    found: dict[str, tuple[int, int, int, int | None]] = {}
    for view in views.values():
        for rule in view.rules:
            waiting, held, rejected, limit = found.get(rule.name, (0, 0, 0, None))
            if rule.limit is not None:
                limit = rule.limit + (limit or 0)
            found[rule.name] = (waiting + rule.waiting, held + rule.held, rejected + rule.rejected, limit)
    return found


def _short(value: float) -> float:
    """To four digits: an event is read by eyes."""
    return float(f"{value:.4g}")


def _rate(now: int, before: int, span_s: float) -> float:
    """A counters file may be passed over while its worker retires: sums then fall for a moment."""
    return _short(max(now - before, 0) / span_s)


def _quantiles(counts: list[int], bounds: tuple[float, ...]) -> tuple[float, ...]:
    if not any(counts):
        return ()
    return tuple(_short(histogram_quantile(counts, share, bounds)) for share in QUANTILES)


class Baseline:
    """What is usual: the median arrival rate of the last hour's windows that had requests."""

    def __init__(self) -> None:
        self._windows: deque[float] = deque(maxlen=BASELINE_S // WINDOW_S)

    def add(self, rate_rps: float) -> None:
        """A window is over."""
        self._windows.append(rate_rps)

    @property
    def rate_rps(self) -> float | None:
        """None before there are enough."""
        busy = [rate for rate in self._windows if rate > 0]
        return statistics.median(busy) if len(busy) >= MIN_BASELINE_WINDOWS else None

    def is_burst(self, rate_rps: float) -> bool:
        """So many requests are more than usual."""
        usual = self.rate_rps
        return usual is not None and rate_rps > BURST_FACTOR * usual and rate_rps * WINDOW_S >= BURST_MIN_REQUESTS


def point_of(before: Reading, now: Reading, first: Reading, *, is_burst: bool) -> Point:
    """The second from `before` to `now`; quantiles since `first`."""
    old, new, start = before.totals.values, now.totals.values, first.totals.values
    span_s = now.at_s - before.at_s

    def rate(name: str) -> float:
        return _rate(new.get(name, 0), old.get(name, 0), span_s)

    def quantiles(name: str) -> tuple[float, ...]:
        bounds = _BUCKETS[name]
        keys = [*(f"{name}_le_{bound:g}" for bound in bounds), f"{name}_le_inf"]
        return _quantiles([max(new.get(key, 0) - start.get(key, 0), 0) for key in keys], bounds)

    outcomes = {outcome: found for outcome in _OUTCOMES if (found := rate(f"outcome_{outcome}"))}
    live_rps = rate("live_ended")
    return Point(
        at=round(now.at_s, 3),
        arrivals_rps=rate("accepted"),
        outcomes_rps=outcomes,
        live_rps=live_rps,
        injected_rps=_short(max(sum(outcomes.values()) - live_rps, 0.0)),
        request_tokens_per_s=rate("request_tokens"),
        response_tokens_per_s=rate("response_tokens"),
        in_flight=new.get("in_flight", 0),
        ttft_s=quantiles("ttft"),
        tpot_s=quantiles("tpot"),
        e2e_s=quantiles("e2e"),
        shaping_waiting=new.get("shaping_waiting", 0),
        shaping_held_rps=rate("shaping_held"),
        shaping_rejected_rps=rate("shaping_rejected"),
        is_burst=is_burst,
    )


def _moved(first: Reading, now: Reading, place: int) -> dict[str, list[int]]:
    """How far each model's (1) or upstream's (2) counts have moved."""
    before = fold(first.totals.rows, keep=(place,))
    moved = {}
    for (name,), counts in fold(now.totals.rows, keep=(place,)).items():
        old = before.get((name,), [0] * len(counts))
        moved[name] = [max(b - a, 0) for a, b in zip(old, counts, strict=True)]
    return moved


def _requests(counts: list[int]) -> tuple[int, int]:
    """Ended, and failed."""
    outcomes = dict(zip(_OUTCOMES, counts, strict=False))
    ended = sum(outcomes.values())
    return ended, ended - outcomes[Outcome.OK.value]


def _tokens(counts: list[int], direction: str) -> int:
    return column(counts, f"{direction}_tokens", TOKEN_BUCKETS)[1]


def models_of(first: Reading, now: Reading) -> tuple[ModelNow, ...]:
    """Each model that had requests, the busiest first."""
    span_s = now.at_s - first.at_s
    found = []
    for name, counts in _moved(first, now, 1).items():
        ended, failed = _requests(counts)
        if ended:
            found.append(
                ModelNow(
                    name,
                    _short(ended / span_s),
                    _short(failed / span_s),
                    _short(_tokens(counts, "request") / span_s),
                    _short(_tokens(counts, "response") / span_s),
                    _quantiles(column(counts, "ttft", TTFT_BUCKETS_S)[0], TTFT_BUCKETS_S),
                )
            )
    return tuple(sorted(found, key=lambda model: (-model.requests_rps, model.name)))


def upstreams_of(settings: Settings, views: list[WorkerView], first: Reading, now: Reading) -> tuple[UpstreamNow, ...]:
    """Each upstream of the settings, as the workers see it."""
    span_s = now.at_s - first.at_s
    moved = _moved(first, now, 2)
    found = []
    for upstream in settings.upstreams:
        name = upstream.name or parse_base_url(upstream.url).text
        seen = [each for view in views for each in view.upstreams if each.name == name]
        states: dict[str, int] = {}
        for each in seen:
            states[each.state] = states.get(each.state, 0) + 1
        ended, failed = _requests(moved[name]) if name in moved else (0, 0)
        tokens = _tokens(moved[name], "response") if name in moved else 0
        found.append(
            UpstreamNow(
                name,
                show_value(upstream.url),
                upstream.drain,
                states,
                upstream.weight,
                sum(each.in_flight for each in seen),
                next((each.models for each in seen if each.models is not None), None),
                next((each.error for each in seen if each.error is not None), None),
                _short(ended / span_s),
                _short(failed / span_s),
                _short(tokens / span_s),
            )
        )
    return tuple(found)


class Live:
    """The sampler, and what it has seen last. Everything but `read` belongs to the event loop.

    settings: as they are now. balance: the journal's and the database's terms as taken last, and whether the database
    answered.
    """

    def __init__(self, settings: Callable[[], Settings], balance: Callable[[], tuple[Balance | None, bool]]) -> None:
        self._settings = settings
        self._balance = balance
        journal = settings().journal_dir
        self._reader = CountersReader(journal)
        self._shaping = ShapingMetrics(journal)
        self._readings: deque[Reading] = deque(maxlen=WINDOW_S + 1)
        self._points: deque[Point] = deque(maxlen=KEPT_S)
        self._baseline = Baseline()
        self._start = int(time.time())
        self._number = 0
        self._event = b""
        self._ticked = asyncio.Event()
        self.viewers = 0
        self.is_stopping: Callable[[], bool] = lambda: False
        """Asked every second: streams end then."""

    async def keep(self) -> None:
        """Sample on whole seconds, again and again."""
        while True:
            now_s = time.time()
            await asyncio.sleep((math.floor(now_s / PERIOD_S) + 1) * PERIOD_S - now_s)
            try:
                await self._sample()
            except Exception:  # the next one may be better; whoever watches sees a stream that stands still
                log.exception("the live figures could not be read")
            ticked, self._ticked = self._ticked, asyncio.Event()
            ticked.set()

    async def _sample(self) -> None:
        settings = self._settings()
        reading, rules, views, journal_bytes = await asyncio.to_thread(self._read, settings)
        if self._readings and reading.at_s <= self._readings[-1].at_s:
            self._readings.clear()  # the clock was set back
        self._readings.append(reading)
        if len(self._readings) < 2:
            return
        first, before = self._readings[0], self._readings[-2]
        span_s = reading.at_s - first.at_s
        rate_rps = _rate(reading.totals.values.get("accepted", 0), first.totals.values.get("accepted", 0), span_s)
        if self._number % WINDOW_S == WINDOW_S - 1:
            self._baseline.add(rate_rps)
        point = point_of(before, reading, first, is_burst=self._baseline.is_burst(rate_rps))
        balance, is_database_up = self._balance()
        usual_rps = self._baseline.rate_rps
        values, old = reading.totals.values, first.totals.values
        now = Now(
            point=point,
            upstreams=upstreams_of(settings, views, first, reading),
            models=models_of(first, reading),
            rules=tuple(
                RuleNow(
                    name,
                    waiting,
                    limit,
                    _rate(held, first.rules.get(name, (0, 0))[0], span_s),
                    _rate(rejected, first.rules.get(name, (0, 0))[1], span_s),
                )
                for name, (waiting, held, rejected, limit) in rules.items()
            ),
            mirror=MirrorNow(
                values.get("mirror_queued", 0),
                values.get("mirror_in_flight", 0),
                _rate(values.get("mirror_sent", 0), old.get("mirror_sent", 0), span_s),
                _short(
                    sum(
                        _rate(values.get(f"mirror_dropped_{each}", 0), old.get(f"mirror_dropped_{each}", 0), span_s)
                        for each in MIRROR_DROPS
                    )
                ),
            ),
            workers=len(views),
            workers_wanted=settings.workers,
            journal_bytes=journal_bytes,
            records_in_journal=None if balance is None else balance.in_journal,
            is_database_up=is_database_up,
            rate_rps=rate_rps,
            baseline_rps=None if usual_rps is None else _short(usual_rps),
        )
        self._number += 1
        self._points.append(point)
        self._event = self._encoded("now", now)

    def _read(
        self, settings: Settings
    ) -> tuple[Reading, dict[str, tuple[int, int, int, int | None]], list[WorkerView], int]:
        rules = rules_of(self._shaping.views())
        counted = {name: (held, rejected) for name, (_, held, rejected, _) in rules.items()}
        reading = Reading(time.time(), self._reader.read(), counted)
        return reading, rules, read_views(settings.data_dir), directory_bytes(settings.journal_dir)

    def _encoded(self, name: str, value: Now | History) -> bytes:
        data = msgspec.json.encode(value)
        return b"id: %d-%d\nevent: %s\ndata: %s\n\n" % (self._start, self._number, name.encode(), data)

    def _since(self, last_event_id: str | None) -> tuple[Point, ...]:
        """The points that who had this event last has not seen; all for an unknown one."""
        start, _, number = (last_event_id or "").partition("-")
        points = tuple(self._points)
        if start == str(self._start) and number.isascii() and number.isdigit():
            missed = self._number - int(number[:18])
            if 0 <= missed <= len(points):
                return points[len(points) - missed :]
        return points

    async def events(self, last_event_id: str | None, limit: int | None) -> AsyncIterator[bytes]:
        """The stream, for one viewer. limit: so many events after the first."""
        deadline_s = time.monotonic() + MAX_STREAM_S
        yield b"retry: 1000\n" + self._encoded("history", History(self._since(last_event_id)))
        sent = 0
        while sent != limit and time.monotonic() < deadline_s and not self.is_stopping():
            await self._ticked.wait()
            if self._event:
                yield self._event
                sent += 1


class _Watched(StreamingResponse):
    """A stream that has its place among the viewers as long as it lasts, however it ends."""

    def __init__(self, live: Live, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._live = live
        live.viewers += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._live.viewers -= 1


def live_router(live: Live) -> APIRouter:
    """`/api/v1/live`."""
    router = APIRouter(prefix="/api/v1", tags=["live"])

    @router.get(
        "/live",
        summary="What happens now, an event a second",
        response_class=StreamingResponse,
        responses=answers(str, 503, media="text/event-stream"),
    )
    async def stream(
        last_event_id: Annotated[str | None, Header(description="the last event seen: what came since is sent")] = None,
        events: Annotated[int | None, Query(ge=0, description="end after so many, beside the first")] = None,
    ) -> Response:
        if live.viewers >= MAX_VIEWERS:
            raise HTTPException(503, f"{MAX_VIEWERS} streams are open, as many as may be: close one, or use /metrics")
        return _Watched(live, live.events(last_event_id, events))

    return router
