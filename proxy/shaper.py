"""Shaping's rim: holds a worker's requests, asks Redis for leases, and tells each request when it may go.

A request that is held is a ticket in a queue, not a task: one timer of the event loop stands for all of them. What
breaks here lets requests through. Redis, when it is the backend: while it does not answer, each worker takes its part
of the limits (`fallbacks` counts), and tries it again every RETRY_S.
"""

from __future__ import annotations

import array
import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from proxy.pacing import Gaps, Pacer, cv_of, gamma_gaps, pattern_gaps
from proxy.settings import PacingSettings, Settings
from proxy.shaping import KEY_RULE, NEVER_NS, Shaping, Ticket
from proxy.shaping_view import PacingView, RuleView, ShapingView
from proxy.shared_limits import SharedLimits, SharedLimitsGone, Wanted, WantedPlaces
from storage.key_file import NO_LIMITS, CachedKey, KeyLimits

if TYPE_CHECKING:
    from proxy.telemetry import WorkerMetrics

log = logging.getLogger("burstgate.gateway")

RETRY_S: Final = 1.0
"""Between tries of a Redis that is gone."""
MAX_PATTERN: Final = 1_000_000
"""Gaps of a pattern that are followed before it begins anew."""
DEFAULT_ANSWER_TOKENS: Final = 256.0
"""Estimated for a request without max_tokens, until answers have been seen."""


class Held(Protocol):
    """Whoever owns a ticket."""

    def shaped(self) -> None:
        """Its ticket, which was held, is through or refused."""
        ...


class Shaper:
    """All of a worker's shaping."""

    def __init__(self, settings: Settings, metrics: Callable[[], WorkerMetrics]) -> None:
        self._metrics = metrics
        self._settings = settings
        self._answer_tokens = DEFAULT_ANSWER_TOKENS
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = NEVER_NS
        self._ask_timer: asyncio.TimerHandle | None = None
        self._is_turning = False
        self._held: set[Ticket] = set()
        self._shared: SharedLimits | None = None
        self._asked = asyncio.Event()
        self._is_down = False
        self._pacer: Pacer[Ticket] | None = None
        self._core = Shaping(())
        self._limits: dict[str, KeyLimits] = {}
        """Of keys that have some, by key id."""
        self._apply(settings)

    # Settings ---------------------------------------------------------------------------------------------------------

    def apply(self, settings: Settings) -> None:
        """Other settings; whoever waits goes on waiting, under them."""
        old, self._settings = self._settings.shaping, settings
        self._apply(settings, old.pacing if old.backend == settings.shaping.backend else None, old.backend)
        self._turn()

    def take_keys(self, keys: Sequence[CachedKey]) -> None:
        """Other keys are valid; whoever waits goes on waiting, under their limits."""
        limits = {key.key_id: key.limits for key in keys if key.limits != NO_LIMITS}
        if limits != self._limits:
            self._limits = limits
            self._configure()
            self._turn()

    @property
    def has_limited_keys(self) -> bool:
        """Some key has limits of its own."""
        return bool(self._limits)

    def _apply(self, settings: Settings, old: PacingSettings | None = None, old_backend: str | None = None) -> None:
        shaping = settings.shaping
        if self._shared is None or old_backend != shaping.backend:
            self._shared = self._open_shared(shaping.backend)
            self._is_down = False
        self._configure()
        if old != shaping.pacing or old is None:
            pacer, self._pacer = self._pacer, self._new_pacer(shaping.pacing)
            now_ns = time.monotonic_ns()
            for ticket in pacer.take_all() if pacer is not None else ():
                self._offer(ticket, now_ns)

    def _configure(self) -> None:
        shaping = self._settings.shaping
        self._core.configure(
            shaping.rules,
            keys=self._limits,
            ageing_s=shaping.ageing_s,
            shares=self._settings.workers * shaping.hosts,
            is_leased=self._shared is not None and not self._is_down,
            now_ns=time.monotonic_ns(),
        )

    def _open_shared(self, url: str | None) -> SharedLimits | None:
        if url is None:
            return None
        try:
            return SharedLimits(url)
        except ImportError:
            log.error("shaping.backend needs the package redis (pip install burstgate[redis]); limits are shared out")
        except ValueError as error:
            log.error("shaping.backend: %s; limits are shared out", error)
        self._metrics().shaping_fell_back()
        return None

    def _new_pacer(self, pacing: PacingSettings) -> Pacer[Ticket] | None:
        budget_s = pacing.delay_budget_s
        if pacing.mode == "off":
            return None
        if pacing.peak_rps is not None:
            return Pacer(budget_s, peak_rps=pacing.peak_rps)
        if pacing.pattern is not None:
            reading = asyncio.get_running_loop().run_in_executor(None, read_pattern, pacing.pattern, pacing.seed or 0)
            reading.add_done_callback(lambda done: self._have_pattern(done, pacing))
            return None
        cv = pacing.cv if pacing.cv is not None else (pacing.shape or 1.0) ** -0.5
        gaps: Gaps = gamma_gaps(random.Random(pacing.seed).gammavariate)
        return Pacer(budget_s, cv=cv, gaps=gaps)

    def _have_pattern(self, read: asyncio.Future[array.array[float]], pacing: PacingSettings) -> None:
        """Pace by it, unless the settings have changed since."""
        if read.cancelled() or self._settings.shaping.pacing != pacing:
            return
        error = read.exception()
        if error is not None:
            log.error("shaping.pacing.pattern: %s; requests are not paced", error)
            return
        gaps = read.result()
        self._pacer = Pacer(pacing.delay_budget_s, cv=cv_of(gaps), gaps=pattern_gaps(gaps))

    # Requests ---------------------------------------------------------------------------------------------------------

    def estimate(self, prompt_tokens: int | None, max_tokens: int | None, choices: int) -> int:
        """Tokens of a request, before it is answered."""
        answer = max_tokens if max_tokens is not None and max_tokens >= 0 else self._answer_tokens
        return min(2**31, (prompt_tokens or 0) + int(answer) * max(1, choices))

    def enter(self, ticket: Ticket) -> bool:
        """True when it may go on now; else it is refused (`refusal`), or held: its owner hears of it."""
        self._offer(ticket, ticket.arrived_ns)
        if ticket.is_through:
            if self._core.leases or self._core.asks_places:
                self._asked.set()
            if self._core.next_ns < self._timer_ns:
                self._plan()
            return True
        if ticket.refusal is not None:
            self._metrics().shaping_rejected()
        else:
            self._metrics().shaping_held()
            self._held.add(ticket)
        self._turn()
        return False

    def _offer(self, ticket: Ticket, now_ns: int) -> None:
        if self._pacer is None:
            self._core.offer(ticket, now_ns)
        else:
            self._pacer.offer(ticket, now_ns)

    def leave(self, ticket: Ticket) -> None:
        """The request is over, wherever it was."""
        now_ns = time.monotonic_ns()
        if not ticket.is_through and not ticket.is_over and self._pacer is not None:
            self._pacer.remove(ticket, now_ns)
        self._core.leave(ticket, now_ns)
        if ticket in self._held:
            self._held.discard(ticket)
            self._metrics().shaping_waiting(len(self._held))
            self._metrics().shaping_waited((now_ns - ticket.arrived_ns) / 1e9)
        if self._core.next_ns == 0:
            self._turn()

    def ended(
        self,
        ticket: Ticket,
        tokens: int | None,
        answer_tokens: int | None,
        ttft_s: float | None,
        whole_s: float | None,
        *,
        dropped: bool,
    ) -> None:
        """What became of a request that was through. tokens: of prompt and answer, where known."""
        if not ticket.is_through:
            return
        if tokens is not None:
            self._core.settle(ticket, tokens)
            if answer_tokens:
                self._answer_tokens += 0.02 * (answer_tokens - self._answer_tokens)
        self._core.sample(ticket, ttft_s, whole_s, dropped=dropped, now_ns=time.monotonic_ns())

    def rule_of(self, ticket: Ticket) -> tuple[str | None, str | None]:
        """For the record: the rule that held or refused it, and the class."""
        bucket = ticket.held_by
        if bucket is not None:
            return bucket.rule.settings.name, bucket.name
        return ("pacing", None) if self._pacer is not None and ticket.left_ns > ticket.arrived_ns else (None, None)

    def _tell(self, ticket: Ticket) -> None:
        if ticket not in self._held:
            return  # its owner knows
        self._held.discard(ticket)
        metrics = self._metrics()
        metrics.shaping_waited((ticket.left_ns - ticket.arrived_ns) / 1e9)
        if ticket.refusal is not None:
            metrics.shaping_rejected()
        owner: Held = ticket.owner
        owner.shaped()

    def _turn(self) -> None:
        """Whatever is due."""
        if self._is_turning:
            return  # an owner that was told came back; the loop below looks again
        self._is_turning = True
        try:
            while True:
                now_ns = time.monotonic_ns()
                paced = self._pacer.take(now_ns) if self._pacer is not None else []
                done = [each for each in paced if self._core.offer(each, now_ns) or each.refusal is not None]
                done += self._core.advance(now_ns)
                for ticket in done:
                    self._tell(ticket)
                if not done and self._core.next_ns > now_ns:
                    break
        except Exception:  # noqa: BLE001 (the last line of defence: see `_broke`)
            self._broke()
        finally:
            self._is_turning = False
        if self._core.leases or self._core.asks_places:
            self._asked.set()
        self._metrics().shaping_waiting(len(self._held))
        self._plan()

    def _broke(self) -> None:
        """Never in the way: a defect here lets everybody go, and shapes nobody until other settings come."""
        log.exception("shaping failed; requests are not shaped")
        self._metrics().accounting_failed()
        self._core = Shaping(())
        self._pacer = None
        held, self._held = self._held, set()
        for ticket in held:
            ticket.refusal = None
            ticket.left_ns = time.monotonic_ns()
            owner: Held = ticket.owner
            asyncio.get_running_loop().call_soon(owner.shaped)

    def _plan(self) -> None:
        next_ns = min(self._core.next_ns, self._pacer.next_ns if self._pacer is not None else NEVER_NS)
        if next_ns == self._timer_ns:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_ns = next_ns
        if next_ns < NEVER_NS:
            delay_s = max(0.0, (next_ns - time.monotonic_ns()) / 1e9)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._timer_ns = NEVER_NS
        self._turn()

    # Redis ------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Lease from Redis what is wanted, until cancelled."""
        try:
            while True:
                await self._asked.wait()
                self._asked.clear()
                shared = self._shared
                if shared is not None:
                    await self._lease(shared)
                    _heed_cancellation()
        finally:
            self._ask_at(NEVER_NS)
            if self._shared is not None:
                await self._shared.close()

    async def _lease(self, shared: SharedLimits) -> None:
        core = self._core
        now_ns = time.monotonic_ns()
        rates = []
        wanted = []
        for key in [key for key, (rate, _) in core.leases.items() if rate.retry_ns <= now_ns]:
            rate, waiting = core.leases.pop(key)
            rates.append(rate)
            wanted.append(Wanted(key, rate.interval_ns, rate.burst, rate.wanted(waiting, now_ns), rate.owed))
        buckets = core.places_due(now_ns)
        places = []
        for bucket in buckets:
            assert bucket.places is not None
            used, needed, beside = bucket.ask_places()
            places.append(WantedPlaces(bucket.places.key, bucket.places.total, used, needed, beside))
        if wanted or places:
            try:
                granted, granted_places = await shared.lease(wanted, places)
            except SharedLimitsGone as error:
                await self._without(shared, error)
                return
            now_ns = time.monotonic_ns()
            for rate, asked, each in zip(rates, wanted, granted, strict=True):
                rate.owed -= asked.owed
                rate.lease(each.cells, each.ahead_ns, now_ns)
            for bucket, need, answer in zip(buckets, places, granted_places, strict=True):
                core.places_answered(bucket, need.needed, answer.places, now_ns, is_full=answer.is_full)
            core.touch_all()
            self._turn()
        self._ask_at(min((rate.retry_ns for rate, _ in core.leases.values()), default=NEVER_NS), core.places_ns)

    def _ask_at(self, *times_ns: int) -> None:
        """Ask Redis again at the first of these times."""
        if self._ask_timer is not None:
            self._ask_timer.cancel()
            self._ask_timer = None
        next_ns = min(times_ns)
        if next_ns < NEVER_NS:
            delay_s = max(0.0, (next_ns - time.monotonic_ns()) / 1e9)
            self._ask_timer = asyncio.get_running_loop().call_later(delay_s, self._asked.set)

    async def _without(self, shared: SharedLimits, error: Exception) -> None:
        """Go on with a part of the limits until Redis is back."""
        log.error("shaping.backend does not answer, every worker takes its part of the limits: %s", error)
        self._metrics().shaping_fell_back()
        self._is_down = True
        self._configure()
        self._turn()
        while self._shared is shared:
            await asyncio.sleep(RETRY_S)
            try:
                await shared.ping()
            except SharedLimitsGone:
                _heed_cancellation()
                continue
            break
        if self._shared is shared:
            log.error("shaping.backend answers again, limits are exact")
            self._is_down = False
            self._configure()
            self._turn()

    # What others see --------------------------------------------------------------------------------------------------

    def view(self) -> ShapingView:
        """What is counted by rule."""
        rules = []
        keys = RuleView(KEY_RULE, 0, 0, 0, None)
        for rule in self._core.rules:
            limits = [bucket.limit for bucket in rule.buckets.values() if bucket.gradient is not None]
            lowest = min((limit for limit in limits if limit is not None), default=None)
            if rule.settings.name == KEY_RULE:  # in one row, however many keys there are
                keys = RuleView(
                    KEY_RULE, keys.held + rule.held, keys.rejected + rule.rejected, keys.waiting + rule.waiting, None
                )
            else:
                rules.append(RuleView(rule.settings.name, rule.held, rule.rejected, rule.waiting, lowest))
        if self._limits:
            rules.append(keys)
        pacer = self._pacer
        pacing = None
        if pacer is not None:
            pacing = PacingView(
                pacer.asked_cv, pacer.came.cv, pacer.left.cv, pacer.delays.mean, pacer.forced
            )  # fmt: skip
        return ShapingView(tuple(rules), pacing, self._shared is not None and not self._is_down)


def read_pattern(path: Path, seed: int) -> array.array[float]:
    """The gaps of a trace or of a workload profile's arrivals, seconds, at most MAX_PATTERN.

    Raises ValueError naming what is wrong, OSError.
    """
    import numpy as np

    from replay.arrivals import modeled
    from traces.arrivals import arrival_times_s
    from traces.burstiness import has_whole_seconds
    from traces.codec import read_trace
    from traces.profile import decode_profile

    rng = np.random.default_rng(seed)
    found: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = []
    count = 0
    if path.suffix == ".json":
        chunks = arrival_times_s(modeled(decode_profile(path.read_bytes())).segments(), rng)
    else:
        chunks = (batch["received_at"].to_numpy() for batch in read_trace(path, fields=("received_at",)))
    for chunk in chunks:
        found.append(chunk)
        count += len(chunk)
        if count > MAX_PATTERN:
            break
    stamps_s = np.concatenate(found)[: MAX_PATTERN + 1] if found else np.empty(0)
    if path.suffix != ".json" and len(stamps_s) and has_whole_seconds(stamps_s):
        stamps_s = stamps_s + rng.random(len(stamps_s))  # a second's requests lie anywhere in it
    gaps_s = np.diff(np.sort(stamps_s))
    if not len(gaps_s) or not gaps_s.any():
        raise ValueError(f"{path}: expected two arrivals at different times, got fewer")
    return array.array("d", gaps_s.tolist())


def _heed_cancellation() -> None:
    """Raise what the Redis client keeps for itself: that the task is to end (redis 8.1 swallows every other time)."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
