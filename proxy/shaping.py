"""Who may go on to an upstream now, who waits, and who is refused: limits, queues and their order. Pure.

Rules. A request has to pass every rule that matches it; of the rules of one `group` only the first that matches counts.
A rule's limits hold for each class of it: the value of `per` (a tenant, a model, ...), or the one class of all. A key
with limits of its own is the one class of a rule named `key`, which stands behind the rules `per: session`.

    bucket      one class of one rule: its rates (GCRA), its concurrency, its queue
    passing     a request passes its buckets from the narrowest to the broadest. Where one has no room or others wait,
                it waits there; what it passed before keeps room for it. It goes when it has passed all, and only then
                counts against any: so limits hold for the moments at which requests leave, nobody waits for a bucket
                that others could use, and as all take buckets in one order, no two wait for each other.
    queue       bounded in length and wait. Of those who wait, the highest priority goes first; every `ageing_s` of its
                oldest one's wait lifts a priority by one. Within a priority: first come, first served, or by turns
                between sessions or tenants (`fair_by`), each turn worth QUANTUM_TOKENS estimated tokens.
    overflow    whoever comes to a full queue is refused, unless somebody of a lower priority waits there: then the last
                of these is. Who has waited `max_wait_s` (the least of its rules') is refused.

Rates are the generic cell rate algorithm (ITU-T I.371, 1.3 of annex A): with T = 1 / rate and a burst of B, a cost of c
conforms at t when max(TAT, t) + c T <= t + B T, and makes TAT = max(TAT, t) + c T. So in any window of w seconds at
most B + (w + SLACK_NS) / T go; the slack makes up for timers that come late. A cost above B conforms when nothing is
owed, and is owed afterwards. Tokens are estimated when a request comes (prompt + max_tokens) and settled by their true
number at its end: TAT moves by the difference.

Limits that are leased (`is_leased`) hold over many processes, which get their parts of them from one place: of a rate,
cells of one GCRA; of a concurrency, places. Who asks for places is told how many it may use from then on: what all need
where that is no more than there are, else equal parts, least needs first (max-min fair). Until the answer it starts
nothing beyond what is in flight, which is what it holds for certain. A request that finds nothing leased waits for the
answer, be its queue full: it is refused when the answer is that there is nothing.

Order is deficit round robin (Shreedhar and Varghese 1996, IEEE/ACM ToN 4(3)): of two that both wait all the time,
neither gets more than a quantum and two requests' tokens ahead.

`concurrency: adaptive` is Gradient2 of Netflix's concurrency-limits (Gradient2Limit.java), on the mean time to first
token of at least MIN_SAMPLES requests and a second:

    gradient = max(0.5, min(1, 1.5 long / short))       long: exponential mean over 600 windows; short: this window
    limit    = 0.8 limit + 0.2 (limit gradient + 4)     held between 4 and 1000; not moved while under half is used

A window with an answer of 429, 503 or no answer multiplies the limit by 0.9 instead. Without streams the time to the
whole answer stands in for the time to first token.

Times are monotonic nanoseconds, given by the caller; `advance` must be called when `next_ns` has come.
"""

from __future__ import annotations

import fnmatch
import heapq
import math
import re
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from proxy.settings import RuleSettings
from storage.key_file import KeyLimits
from traces.record import LogType, Origin

NEVER_NS: Final = 1 << 63
QUANTUM_TOKENS: Final = 1024
"""A turn. A short chat is less, so that short ones do not wait for a round of long ones."""
SLACK_NS: Final = 5_000_000
"""An event loop's timers come this much late at times; a rate of small bursts would lose it with every request."""
MAX_CLASSES: Final = 10_000
"""Of a rule, before idle ones are forgotten; where all are busy, new ones share one class."""
MAX_ROUTES: Final = 4096
"""Kinds of requests whose rules are remembered."""
OTHERS: Final = "(others)"
MIN_SAMPLES: Final = 10
LEASE_S: Final = 0.05
"""Of a global limit, so much is leased ahead at most: what a process that stops keeps from the others."""
PLACES_NS: Final = 50_000_000
"""Between two askings for places, so that what is not needed goes to the others."""
CONTENDED_NS: Final = 10_000_000
"""The same while all together need more than there are."""
EACH_PLACES_NS: Final = 200_000
"""The least time between two askings, for each class that has places: of thousands of sessions none is asked often."""
MOST_PLACES: Final = 100
"""Classes for which places are asked at a time: a round trip has a time limit."""
ANSWER_NS: Final = 250_000_000
"""The longest that a request waits for the answer to an asking, beyond its own limits."""
MOST_ASKING: Final = 1000
"""Requests of a class that do so."""
WINDOW_NS: Final = 1_000_000_000
ADAPTIVE_START: Final = 20.0
ADAPTIVE_RANGE: Final = (4.0, 1000.0)
KEY_RULE: Final = "key"
"""The name of every key's own rule."""
_RANK = {"session": 3, "tenant": 2, "model": 1, "log_type": 1, "none": 0}
"""How narrow a rule's classes are."""


class Rate:
    """GCRA over a cost, in this process alone or over what was leased of a global limit."""

    __slots__ = ("burst", "depth_ns", "interval_ns", "key", "leased_ns", "owed", "quota", "reserved", "retry_ns",
                 "tat_ns", "used")  # fmt: skip

    def __init__(self, key: str, per_s: float, burst: float) -> None:
        self.key = key
        """Of the global limit."""
        self.tat_ns = 0.0
        self.reserved = 0.0
        """Kept for those who have passed and not gone."""
        self.quota = math.inf
        """What may still go before more is leased; infinite where nothing is leased."""
        self.used = 0.0
        """Since the last lease."""
        self.leased_ns = 0
        """When that was."""
        self.retry_ns = 0
        """Before this there is nothing to lease."""
        self.owed = 0.0
        """Settlements that the global limit has not heard of."""
        self.configure(per_s, burst)

    def configure(self, per_s: float, burst: float) -> None:
        """Other limits; what is owed stays owed."""
        self.interval_ns = 1e9 / per_s
        self.burst = burst
        self.depth_ns = burst * self.interval_ns

    def ready_ns(self, cost: float) -> float:
        """When this much conforms, beside what is reserved; NEVER_NS until something else happens."""
        wanted = self.reserved + cost
        if wanted > self.quota:
            return NEVER_NS
        if wanted > self.burst:
            return self.tat_ns if self.reserved == 0 else NEVER_NS
        return self.tat_ns - self.depth_ns + wanted * self.interval_ns

    def take(self, cost: float, now_ns: int) -> None:
        """It goes."""
        self.tat_ns = max(self.tat_ns, now_ns - SLACK_NS) + cost * self.interval_ns
        self.quota -= cost
        self.used += cost

    def wanted(self, waiting: float, now_ns: int) -> float:
        """How much to lease: what those who wait need or what will go within two leases, at most LEASE_S' worth."""
        per_s = self.used * 1e9 / max(now_ns - self.leased_ns, LEASE_S * 1e9)
        wanted = max(waiting - self.quota, 2 * LEASE_S * per_s)
        return math.ceil(max(1.0, min(wanted, LEASE_S * 1e9 / self.interval_ns)))

    def lease(self, granted: float, ahead_ns: float, now_ns: int) -> None:
        """So much of the global limit is this process's; ahead_ns: of now, the global TAT before it was granted."""
        if self.quota == math.inf:
            return  # leases have ended meanwhile
        self.tat_ns = now_ns + ahead_ns - self.quota * self.interval_ns
        self.quota += granted
        self.used = 0.0
        self.leased_ns = now_ns
        if not granted:
            first_ns = now_ns + ahead_ns + self.interval_ns - self.depth_ns - LEASE_S * 1e9
            self.retry_ns = int(min(max(first_ns, now_ns + 2e6), now_ns + LEASE_S * 1e9))

    def settle(self, difference: float) -> None:
        """It was this much more than was taken."""
        if self.quota == math.inf:
            self.tat_ns += difference * self.interval_ns
        else:
            self.owed += difference


class Places:
    """Places in flight, leased of a global limit."""

    __slots__ = ("is_due", "is_full", "key", "limit", "next_ns", "total")

    def __init__(self, key: str) -> None:
        self.key = key
        """Of the global limit."""
        self.total = 0
        """Of all processes together."""
        self.limit = 0
        """What this process may use."""
        self.is_full = False
        """No more can be had, as last heard."""
        self.is_due = False
        """More is needed than is leased."""
        self.next_ns = 0
        """When to ask in any case."""

    def answer(self, granted: int, now_ns: int, *, is_full: bool, least_ns: int) -> None:
        """What may be used from now on; is_full: it is less than what was needed. least_ns: until the next asking."""
        self.limit = granted
        self.is_full = is_full or granted >= self.total
        self.next_ns = now_ns + max(CONTENDED_NS if is_full else PLACES_NS, least_ns)


class Gradient:
    """The adaptive limit of one bucket: Gradient2."""

    __slots__ = ("_begin_ns", "_count", "_dropped", "_long", "_most", "_seen", "_sum", "_windows", "has_ttft", "limit")

    def __init__(self) -> None:
        self.limit = ADAPTIVE_START
        self.has_ttft = False
        self._long = 0.0
        self._windows = 0
        self._begin_ns = 0
        self._count = 0
        self._sum = 0.0
        self._most = 0
        self._dropped = False

    def sample(
        self, ttft_s: float | None, whole_s: float | None, *, dropped: bool, in_flight: int, now_ns: int
    ) -> None:
        """A request ended. whole_s: from its sending to its end, where it was answered well."""
        if ttft_s is not None and not self.has_ttft:
            self.has_ttft = True  # of another kind than what was measured before
            self._count = self._windows = 0
            self._sum = 0.0
        latency_s = ttft_s if self.has_ttft else whole_s
        self._dropped = self._dropped or dropped
        self._most = max(self._most, in_flight)
        if latency_s is not None and not dropped:
            self._count += 1
            self._sum += latency_s
        if not self._begin_ns:
            self._begin_ns = now_ns
        if now_ns - self._begin_ns >= WINDOW_NS and (self._count >= MIN_SAMPLES or self._dropped):
            self._close()
            self._begin_ns = now_ns

    def _close(self) -> None:
        if self._dropped:
            self.limit *= 0.9
        elif self._sum > 0:
            short = self._sum / self._count
            self._windows += 1
            # A plain mean of the first ten, as ExpAvgMeasurement's warm-up.
            weight = 1 / self._windows if self._windows <= 10 else 2 / 601
            self._long += (short - self._long) * weight
            if self._long > 2 * short:  # the load has gone: do not wait for 600 windows
                self._long *= 0.95
            if self._most >= self.limit / 2:
                gradient = max(0.5, min(1.0, 1.5 * self._long / short))
                self.limit = 0.8 * self.limit + 0.2 * (self.limit * gradient + 4)
        self.limit = min(max(self.limit, ADAPTIVE_RANGE[0]), ADAPTIVE_RANGE[1])
        self._count = self._most = 0
        self._sum = 0.0
        self._dropped = False


class Ticket:
    """One request on its way through the rules."""

    __slots__ = ("arrived_ns", "asks_ns", "buckets", "deadline_ns", "held_by", "is_over", "is_through", "key_id",
                 "left_ns", "log_type", "model", "origin", "owner", "place", "priority", "refusal", "retry_after_s",
                 "seq", "session", "stage", "tenant", "tokens")  # fmt: skip

    def __init__(
        self,
        arrived_ns: int,
        tokens: int,
        *,
        model: str | None = None,
        tenant: str | None = None,
        session: str | None = None,
        log_type: LogType = LogType.API,
        origin: Origin = Origin.CLIENT,
        key_id: str | None = None,
        owner: Any = None,
    ) -> None:
        self.owner = owner
        """Whoever asked."""
        self.tokens = tokens
        """Estimated."""
        self.model = model
        self.tenant = tenant
        self.session = session
        self.log_type = log_type
        self.origin = origin
        self.key_id = key_id
        self.arrived_ns = arrived_ns
        self.left_ns = 0
        """When it was admitted or refused, or gave up; 0 before."""
        self.deadline_ns = NEVER_NS
        self.asks_ns = 0
        """Its deadline, where it waits for the answer to an asking only; else 0."""
        self.priority = 0
        self.seq = 0
        self.buckets: tuple[Bucket, ...] = ()
        self.stage = 0
        """How many of its buckets it has passed."""
        self.place: Bucket | None = None
        """Where it waits."""
        self.held_by: Bucket | None = None
        """Where it first waited, or was refused."""
        self.refusal: str | None = None
        self.retry_after_s = 1
        self.is_through = False
        self.is_over = False


class _Flow:
    """Those of one session or tenant who wait."""

    __slots__ = ("deficit", "tickets")

    def __init__(self) -> None:
        self.deficit = 0.0
        self.tickets: OrderedDict[Ticket, None] = OrderedDict()


class _Level:
    """Those of one priority who wait."""

    __slots__ = ("_flows", "_turns", "fair_by", "tickets")

    def __init__(self, fair_by: str) -> None:
        self.fair_by = fair_by
        self.tickets: OrderedDict[Ticket, None] = OrderedDict()
        """In the order of their coming."""
        self._flows: dict[str | None, _Flow] = {}
        self._turns: deque[str | None] = deque()

    def _key(self, ticket: Ticket) -> str | None:
        return ticket.session if self.fair_by == "session" else ticket.tenant

    def add(self, ticket: Ticket) -> None:
        self.tickets[ticket] = None
        if self.fair_by != "none":
            key = self._key(ticket)
            if key not in self._flows:
                self._flows[key] = _Flow()
                self._turns.append(key)
            self._flows[key].tickets[ticket] = None

    def remove(self, ticket: Ticket, *, is_served: bool) -> None:
        del self.tickets[ticket]
        if self.fair_by != "none":
            key = self._key(ticket)
            flow = self._flows[key]
            del flow.tickets[ticket]
            if is_served:
                flow.deficit = max(0.0, flow.deficit - ticket.tokens)  # 0: it went alone, or by its age
            if not flow.tickets:
                del self._flows[key]
                self._turns.remove(key)

    def head(self) -> Ticket:
        """Whose turn it is."""
        if self.fair_by == "none" or len(self._turns) == 1:
            return next(iter(self.tickets))
        least = math.inf
        for _ in range(len(self._turns)):
            flow = self._flows[self._turns[0]]
            ticket = next(iter(flow.tickets))
            if flow.deficit >= ticket.tokens:
                return ticket
            flow.deficit += QUANTUM_TOKENS
            least = min(least, ticket.tokens - flow.deficit)
            self._turns.rotate(-1)
        if least > 0:  # nobody's turn is worth its request yet: as many rounds at once as that takes
            rounds = math.ceil(least / QUANTUM_TOKENS)
            for flow in self._flows.values():
                flow.deficit += rounds * QUANTUM_TOKENS
        return self.head()


class Queue:
    """Who waits at a bucket, in the order in which they go."""

    __slots__ = ("_fair_by", "_levels", "size", "tokens")

    def __init__(self, fair_by: str) -> None:
        self._fair_by = fair_by
        self._levels: dict[int, _Level] = {}
        self.size = 0
        self.tokens = 0

    def add(self, ticket: Ticket) -> None:
        """Behind the others of its priority."""
        level = self._levels.get(ticket.priority)
        if level is None:
            level = self._levels[ticket.priority] = _Level(self._fair_by)
        level.add(ticket)
        self.size += 1
        self.tokens += ticket.tokens

    def remove(self, ticket: Ticket, *, is_served: bool = False) -> None:
        """It goes on, or gives up."""
        level = self._levels[ticket.priority]
        level.remove(ticket, is_served=is_served)
        if not level.tickets:
            del self._levels[ticket.priority]
        self.size -= 1
        self.tokens -= ticket.tokens

    def head(self, now_ns: int, ageing_ns: int) -> Ticket:
        """Who is next; the queue is not empty."""
        if len(self._levels) == 1:
            return next(iter(self._levels.values())).head()
        best: _Level | None = None
        best_rank = (0, 0)
        for priority, level in self._levels.items():
            oldest = next(iter(level.tickets))
            steps = (now_ns - oldest.arrived_ns) // ageing_ns if ageing_ns else 0
            rank = (priority + steps, -oldest.seq)
            if best is None or rank > best_rank:
                best, best_rank = level, rank
        assert best is not None
        oldest = next(iter(best.tickets))
        # Who has lifted its priority goes itself, else it might lift the others for ever.
        return oldest if best_rank[0] > oldest.priority else best.head()

    def last_below(self, priority: int) -> Ticket | None:
        """Who came last of the lowest priority, if that is a lower one."""
        lowest = min(self._levels, default=priority)
        return next(reversed(self._levels[lowest].tickets)) if lowest < priority else None

    def tickets(self) -> Iterator[Ticket]:
        """All."""
        for level in self._levels.values():
            yield from level.tickets


class Bucket:
    """One class of one rule."""

    __slots__ = ("asking", "gradient", "in_flight", "name", "places", "queue", "requests", "reserved", "rule", "slots",
                 "tokens", "wake_ns")  # fmt: skip

    def __init__(self, rule: Rule, name: str | None) -> None:
        self.rule = rule
        self.name = name
        """Of the class; None where it is not known, or there is but one."""
        self.queue = Queue(rule.settings.fair_by)
        self.in_flight = 0
        self.reserved = 0
        """Requests that have passed and not gone."""
        self.asking = 0
        """Of those in the queue, who wait for the answer to an asking only."""
        self.slots: int | None = None
        self.places: Places | None = None
        """In the place of slots, where they are leased."""
        self.gradient: Gradient | None = None
        self.requests: Rate | None = None
        self.tokens: Rate | None = None
        self.wake_ns: float = NEVER_NS
        self.configure()

    def configure(self) -> None:
        """Take the rule's limits."""
        settings, shares = self.rule.settings, self.rule.shares
        adaptive = settings.concurrency == "adaptive"
        self.gradient = (self.gradient or Gradient()) if adaptive else None
        key = f"{self.rule.settings.name}:{self.name or ''}"
        self.slots = None
        places, self.places = self.places, None
        if isinstance(settings.concurrency, int):
            self.slots = max(1, settings.concurrency // shares)
            if self.rule.is_leased:
                self.places = places or Places(f"{key}:places")
                self.places.total = settings.concurrency
        each = 1 if self.rule.is_leased else shares
        per_s = settings.requests_per_s
        burst = settings.burst or max(1.0, per_s or 0.0)
        self.requests = _rate(self.requests, f"{key}:requests", per_s, burst, each, self.rule.is_leased)
        per_s = settings.tokens_per_s
        burst = settings.burst_tokens or max(1.0, per_s or 0.0)
        self.tokens = _rate(self.tokens, f"{key}:tokens", per_s, burst, each, self.rule.is_leased)

    @property
    def limit(self) -> int | None:
        """Requests that may be in flight."""
        if self.places is not None:
            return self.places.limit
        return self.slots if self.gradient is None else max(1, int(self.gradient.limit) // self.rule.shares)

    @property
    def is_idle(self) -> bool:
        """Nothing would be lost with it."""
        return self.in_flight == self.reserved == self.queue.size == 0

    def ready_ns(self, tokens: int) -> float:
        """When such a request may pass; NEVER_NS until something else happens."""
        limit = self.limit
        if limit is not None and self.in_flight + self.reserved >= limit:
            return NEVER_NS
        ready_ns = self.requests.ready_ns(1.0) if self.requests is not None else 0.0
        return ready_ns if self.tokens is None else max(ready_ns, self.tokens.ready_ns(tokens))

    def is_refused(self, tokens: int, now_ns: int) -> bool:
        """Of what such a request lacks here, it is known that there is none; False where it is to be asked for."""
        if not self.rule.is_leased:
            return True
        places = self.places
        limit = self.limit
        if limit is not None and self.in_flight + self.reserved >= limit:
            return places is None or places.is_full
        for rate, cost in ((self.requests, 1.0), (self.tokens, float(tokens))):
            if rate is not None and rate.ready_ns(cost) > now_ns:
                return rate.reserved + cost <= rate.quota or rate.retry_ns > now_ns
        return True

    def ask_places(self) -> tuple[int, int, int]:
        """Used, needed, and wanted beside. Until the answer comes nothing more than what is used now may be."""
        places = self.places
        assert places is not None
        used = self.in_flight + self.reserved
        needed = used + self.queue.size
        places.limit = min(places.limit, used)
        places.is_due = False
        return used, needed, 1 + needed // 8 if needed else 0

    def reserve(self, tokens: int, sign: int) -> None:
        """Keep room for one who has passed (1), or give it up (-1)."""
        self.reserved += sign
        if self.requests is not None:
            self.requests.reserved += sign
        if self.tokens is not None:
            self.tokens.reserved += sign * tokens

    def take(self, tokens: int, now_ns: int) -> None:
        """It goes."""
        self.in_flight += 1
        if self.requests is not None:
            self.requests.take(1.0, now_ns)
        if self.tokens is not None:
            self.tokens.take(tokens, now_ns)

    def wait_s(self, tokens: int, now_ns: int) -> int:
        """Seconds after which a request may try again, at least 1, as far as rates say."""
        ready_ns = 0.0
        for rate, ahead in ((self.requests, self.queue.size + 1.0), (self.tokens, float(self.queue.tokens + tokens))):
            if rate is not None:
                ready_ns = max(ready_ns, rate.tat_ns - rate.depth_ns + (rate.reserved + ahead) * rate.interval_ns)
        return max(1, min(3600, math.ceil((ready_ns - now_ns) / 1e9)))


def _rate(rate: Rate | None, key: str, per_s: float | None, burst: float, shares: int, is_leased: bool) -> Rate | None:
    if per_s is None:
        return None
    per_s, burst = per_s / shares, max(1.0, burst / shares)
    if rate is None:
        rate = Rate(key, per_s, burst)
        rate.quota = 0.0 if is_leased else math.inf
    else:
        rate.configure(per_s, burst)
        if is_leased != (rate.quota != math.inf):
            rate.quota = 0.0 if is_leased else math.inf
            rate.owed = 0.0
    return rate


class Rule:
    """A rule and its classes."""

    __slots__ = ("buckets", "held", "is_leased", "patterns", "rejected", "settings", "shares", "waiting")

    def __init__(self, settings: RuleSettings) -> None:
        self.settings = settings
        self.shares = 1
        self.is_leased = False
        self.buckets: dict[str | None, Bucket] = {}
        self.held = 0
        self.rejected = 0
        self.waiting = 0
        self.patterns = _patterns(settings)

    def configure(self, settings: RuleSettings, shares: int, *, is_leased: bool) -> None:
        """Other limits; classes and what is counted in them stay."""
        self.settings, self.shares, self.is_leased = settings, shares, is_leased
        self.patterns = _patterns(settings)
        for bucket in self.buckets.values():
            bucket.configure()

    def matches(self, facts: Mapping[str, str | None]) -> bool:
        """Whether it is for such a request."""
        return all(pattern.match(facts[name] or "") for name, pattern in self.patterns)

    def bucket(self, name: str | None, now_ns: int) -> Bucket:
        """The bucket of a class."""
        bucket = self.buckets.get(name)
        if bucket is None:
            if len(self.buckets) >= MAX_CLASSES:
                self._forget(now_ns)
                if len(self.buckets) >= MAX_CLASSES and name != OTHERS:
                    return self.bucket(OTHERS, now_ns)
            bucket = self.buckets[name] = Bucket(self, name)
        return bucket

    def _forget(self, now_ns: int) -> None:
        for name, bucket in list(self.buckets.items()):
            rates = [rate for rate in (bucket.requests, bucket.tokens) if rate is not None]
            if bucket.is_idle and all(rate.tat_ns <= now_ns for rate in rates):
                del self.buckets[name]


def _patterns(settings: RuleSettings) -> tuple[tuple[str, re.Pattern[str]], ...]:
    given = settings.match.model_dump(exclude_none=True)
    return tuple((name, re.compile(fnmatch.translate(text))) for name, text in given.items())


@dataclass(frozen=True, slots=True)
class _Route:
    """The rules for one kind of request, narrowest first."""

    rules: tuple[Rule, ...]
    priority: int
    sessions: int
    """How many of them are for sessions, of which a key has many."""


class Shaping:
    """All rules and all who wait."""

    def __init__(
        self,
        rules: Sequence[RuleSettings],
        *,
        keys: Mapping[str, KeyLimits] | None = None,
        ageing_s: float = 10.0,
        shares: int = 1,
        is_leased: bool = False,
    ) -> None:
        self._rules: dict[str, Rule] = {}
        self._keys: dict[str, Rule] = {}
        """The rules of keys with limits, by key id."""
        self._routes: dict[tuple[str | None, str | None, LogType, Origin], _Route] = {}
        self._numbers = 0
        self._deadlines: list[tuple[int, int, Ticket]] = []
        self._wakes: list[tuple[float, int, Bucket]] = []
        self._dirty: deque[Bucket] = deque()
        self._done: list[Ticket] = []
        self.waiting = 0
        self.leases: dict[str, tuple[Rate, float]] = {}
        """Rates of which more is wanted than was leased, and how much those who wait need; by their keys."""
        self.places: dict[str, Bucket] = {}
        """Those that have places of a global limit, or need some; by their keys."""
        self.asks_places = False
        """Some of them need more than they have."""
        self.configure(rules, keys=keys, ageing_s=ageing_s, shares=shares, is_leased=is_leased, now_ns=0)

    def configure(
        self,
        rules: Sequence[RuleSettings],
        *,
        keys: Mapping[str, KeyLimits] | None = None,
        ageing_s: float,
        shares: int,
        is_leased: bool,
        now_ns: int,
    ) -> None:
        """Other rules. Those of a known name keep what they have counted; all who wait stay, under the new rules.

        keys: the limits of keys that have some, by key id.
        """
        waiting = [ticket for rule in self.rules for bucket in rule.buckets.values()
                   for ticket in bucket.queue.tickets()]  # fmt: skip
        for ticket in waiting:
            self._unqueue(ticket)
            self._give_up_places(ticket)
        kept = self._rules
        self._rules = {each.name: kept.get(each.name) or Rule(each) for each in rules}
        for each in rules:
            rule = self._rules[each.name]
            has_other_turns = rule.settings.fair_by != each.fair_by
            has_other_classes = rule.settings.per != each.per
            rule.configure(each, shares, is_leased=is_leased)
            if has_other_classes:
                rule.buckets = {}
            for bucket in rule.buckets.values() if has_other_turns else ():
                bucket.queue = Queue(each.fair_by)
        known = self._keys
        self._keys = {}
        for key_id, limits in (keys or {}).items():
            own = _key_settings(limits)
            self._keys[key_id] = rule = known.get(key_id) or Rule(own)
            rule.configure(own, shares, is_leased=is_leased)
        self._ageing_ns = int(ageing_s * 1e9)
        self.is_leased = is_leased
        self._routes.clear()
        self._wakes.clear()
        self._dirty.clear()
        self._deadlines.clear()
        self.leases.clear()
        self.places.clear()
        for rule in self.rules:
            for bucket in rule.buckets.values():
                bucket.wake_ns = NEVER_NS
                if bucket.places is not None and not bucket.is_idle:
                    self.places[bucket.places.key] = bucket
                    bucket.places.is_due = self.asks_places = True
        for ticket in sorted(waiting, key=lambda each: each.seq):
            self._prepare(ticket, ticket.arrived_ns)
            if self._pass(ticket, now_ns, may_refuse=False):
                self._done.append(ticket)
        self._drain(now_ns)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """In the order of the settings, and behind them those of keys."""
        return (*self._rules.values(), *self._keys.values())

    # One request ------------------------------------------------------------------------------------------------------

    def offer(self, ticket: Ticket, now_ns: int) -> bool:
        """A request comes. True when it is through; else it is refused at once (`refusal`) or waits.

        What else may have changed by it comes with the next `advance`, which should follow at once.
        """
        self._numbers += 1
        ticket.seq = self._numbers
        self._prepare(ticket, now_ns)
        return self._pass(ticket, now_ns, may_refuse=True)

    def _prepare(self, ticket: Ticket, since_ns: int) -> None:
        """Find its buckets. since_ns: from when it waits."""
        key = (ticket.model, ticket.tenant, ticket.log_type, ticket.origin)
        route = self._routes.get(key)
        if route is None:
            if len(self._routes) >= MAX_ROUTES:
                self._routes.clear()
            route = self._routes[key] = self._route(*key)
        wait_s = math.inf
        buckets = []
        for rule in route.rules:
            settings = rule.settings
            match settings.per:
                case "none":
                    name = None
                case "tenant":
                    name = ticket.tenant
                case "session":
                    name = ticket.session
                case "model":
                    name = ticket.model
                case "log_type":
                    name = _short(ticket.log_type)
            buckets.append(rule.buckets.get(name) or rule.bucket(name, since_ns))
            wait_s = min(wait_s, settings.max_wait_s)
        own = self._keys.get(ticket.key_id) if ticket.key_id is not None else None
        if own is not None:
            buckets.insert(route.sessions, own.bucket(ticket.key_id, since_ns))
            wait_s = min(wait_s, own.settings.max_wait_s)
        ticket.buckets = tuple(buckets)
        ticket.priority = route.priority
        ticket.stage = 0
        ticket.deadline_ns = NEVER_NS if wait_s == math.inf else since_ns + int(wait_s * 1e9)

    def _route(self, model: str | None, tenant: str | None, log_type: LogType, origin: Origin) -> _Route:
        facts: dict[str, str | None] = {
            "model": model,
            "tenant": tenant,
            "log_type": _short(log_type),
            "origin": origin.value,
        }
        groups: set[str] = set()
        rules: list[Rule] = []
        for rule in self._rules.values():
            group = rule.settings.group
            if group not in groups and rule.matches(facts):
                rules.append(rule)
                if group is not None:
                    groups.add(group)
        priority = next((each.settings.priority for each in rules if each.settings.priority is not None), 0)
        limits = [rule for rule in rules if _limits(rule.settings)]
        limits.sort(key=lambda rule: (-_RANK[rule.settings.per], -len(rule.patterns)))
        return _Route(tuple(limits), priority, sum(rule.settings.per == "session" for rule in limits))

    def _pass(self, ticket: Ticket, now_ns: int, *, may_refuse: bool) -> bool:
        """On through its buckets as far as there is room. True when it is through."""
        buckets = ticket.buckets
        while ticket.stage < len(buckets):
            bucket = buckets[ticket.stage]
            # Who was picked from this queue is not in it any more, but those behind it are: `_drain` says `place`.
            if (bucket.queue.size and ticket.place is not bucket) or bucket.ready_ns(ticket.tokens) > now_ns:
                ticket.place = None
                self._wait(ticket, bucket, now_ns, may_refuse=may_refuse)
                return False
            ticket.place = None
            bucket.reserve(ticket.tokens, 1)
            ticket.stage += 1
        for bucket in buckets:
            bucket.reserve(ticket.tokens, -1)
            bucket.take(ticket.tokens, now_ns)
            self._want_lease(bucket, 0)
            if bucket.queue.size:
                self._touch(bucket)
        ticket.left_ns = now_ns
        ticket.is_through = True
        return True

    def _wait(self, ticket: Ticket, bucket: Bucket, now_ns: int, *, may_refuse: bool) -> None:
        settings = bucket.rule.settings
        asks = (
            may_refuse
            and (bucket.queue.size >= settings.queue or now_ns >= ticket.deadline_ns)
            and bucket.asking < MOST_ASKING
            and (bucket.asking > 0 or not bucket.queue.size)
            and not bucket.is_refused(ticket.tokens, now_ns)
        )
        if asks:
            ticket.asks_ns = ticket.deadline_ns
            ticket.deadline_ns = max(ticket.deadline_ns, now_ns + ANSWER_NS)
            bucket.asking += 1
        elif may_refuse and bucket.queue.size >= settings.queue:
            weaker = bucket.queue.last_below(ticket.priority)
            if weaker is None:
                why = f"{settings.queue} requests wait already (queue)" if settings.queue else "no room, and no queue"
                self._refuse(ticket, bucket, why, now_ns)
                return
            self._unqueue(weaker)
            self._refuse(weaker, bucket, f"{settings.queue} requests of higher priority wait (queue)", now_ns)
            self._done.append(weaker)
        if not asks and may_refuse and now_ns >= ticket.deadline_ns:
            self._refuse(ticket, bucket, "no room, and max_wait_s is 0", now_ns)
            return
        if ticket.held_by is None:
            ticket.held_by = bucket
            bucket.rule.held += 1
        bucket.queue.add(ticket)
        ticket.place = bucket
        self.waiting += 1
        bucket.rule.waiting += 1
        if ticket.deadline_ns < NEVER_NS:
            heapq.heappush(self._deadlines, (ticket.deadline_ns, ticket.seq, ticket))
            if len(self._deadlines) > 2 * self.waiting + 1024:
                self._deadlines = [each for each in self._deadlines if each[2].place is not None]
                heapq.heapify(self._deadlines)
        self._touch(bucket)

    def _refuse(self, ticket: Ticket, bucket: Bucket, why: str, now_ns: int) -> None:
        self._give_up_places(ticket)
        rule = bucket.rule
        rule.rejected += 1
        ticket.held_by = bucket
        ticket.left_ns = now_ns
        ticket.is_over = True
        ticket.retry_after_s = bucket.wait_s(ticket.tokens, now_ns)
        kind = "id" if rule.settings.name == KEY_RULE else rule.settings.per
        place = f"rule '{rule.settings.name}'" + (f", {kind} '{bucket.name}'" if bucket.name else "")
        ticket.refusal = f"over the limits of shaping {place}: {why}; try again in {ticket.retry_after_s} s"

    def leave(self, ticket: Ticket, now_ns: int) -> None:
        """A request gave up waiting, or is over: its places are free."""
        if ticket.is_over:
            return
        ticket.is_over = True
        if ticket.is_through:
            for bucket in ticket.buckets:
                bucket.in_flight -= 1
                if bucket.queue.size:
                    self._touch(bucket)
            return
        ticket.left_ns = now_ns
        if ticket.place is not None:
            self._unqueue(ticket)
        self._give_up_places(ticket)

    def settle(self, ticket: Ticket, tokens: int) -> None:
        """The true number of tokens of a request that is through."""
        difference = tokens - ticket.tokens
        if difference and ticket.is_through:
            for bucket in ticket.buckets:
                if bucket.tokens is not None:
                    bucket.tokens.settle(difference)
                    if bucket.queue.size:
                        self._touch(bucket)

    def sample(
        self, ticket: Ticket, ttft_s: float | None, whole_s: float | None, *, dropped: bool, now_ns: int
    ) -> None:
        """How a request that is through went, for the adaptive limits."""
        for bucket in ticket.buckets:
            if bucket.gradient is not None:
                bucket.gradient.sample(ttft_s, whole_s, dropped=dropped, in_flight=bucket.in_flight, now_ns=now_ns)

    def _unqueue(self, ticket: Ticket, *, is_served: bool = False) -> None:
        bucket = ticket.place
        assert bucket is not None
        bucket.queue.remove(ticket, is_served=is_served)
        if ticket.asks_ns:
            ticket.asks_ns = 0
            bucket.asking -= 1
        bucket.rule.waiting -= 1
        self.waiting -= 1
        if not is_served:
            ticket.place = None
            if bucket.queue.size:
                self._touch(bucket)

    def _give_up_places(self, ticket: Ticket) -> None:
        for bucket in ticket.buckets[: ticket.stage]:
            bucket.reserve(ticket.tokens, -1)
            if bucket.queue.size:
                self._touch(bucket)
        ticket.stage = 0

    # Time -------------------------------------------------------------------------------------------------------------

    def _touch(self, bucket: Bucket) -> None:
        """Look at its queue again."""
        self._dirty.append(bucket)

    def advance(self, now_ns: int) -> list[Ticket]:
        """Who is through now, or refused, in this order, of those who waited."""
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            ticket = heapq.heappop(self._deadlines)[2]
            bucket = ticket.place
            if bucket is not None and ticket.deadline_ns <= now_ns:
                if bucket.queue.head(now_ns, self._ageing_ns) is ticket and bucket.ready_ns(ticket.tokens) <= now_ns:
                    self._touch(bucket)
                    self._drain(now_ns)  # its turn and its end come together
                if ticket.place is not None:
                    bucket = ticket.place
                    self._unqueue(ticket)
                    why = f"no room within {(now_ns - ticket.arrived_ns) / 1e9:.3g} s (max_wait_s)"
                    self._refuse(ticket, bucket, why, now_ns)
                    self._done.append(ticket)
        while self._wakes and self._wakes[0][0] <= now_ns:
            wake_ns, _, bucket = heapq.heappop(self._wakes)
            if wake_ns == bucket.wake_ns:
                bucket.wake_ns = NEVER_NS
                self._touch(bucket)
        self._drain(now_ns)
        done, self._done = self._done, []
        return done

    def touch_all(self) -> None:
        """Limits may have changed: look at every queue."""
        for rule in self.rules:
            for bucket in rule.buckets.values():
                if bucket.queue.size:
                    self._touch(bucket)

    @property
    def next_ns(self) -> int:
        """When `advance` must be called, at the latest; NEVER_NS while nobody waits for a time."""
        if self._dirty or self._done:
            return 0
        while self._wakes and self._wakes[0][0] != self._wakes[0][2].wake_ns:
            heapq.heappop(self._wakes)
        while self._deadlines and self._deadlines[0][2].place is None:
            heapq.heappop(self._deadlines)
        wake_ns = self._wakes[0][0] if self._wakes else NEVER_NS
        return min(math.ceil(wake_ns), self._deadlines[0][0] if self._deadlines else NEVER_NS)

    def _drain(self, now_ns: int) -> None:
        while self._dirty:
            bucket = self._dirty.popleft()
            queue = bucket.queue
            while queue.size:
                ticket = queue.head(now_ns, self._ageing_ns)
                ready_ns = bucket.ready_ns(ticket.tokens)
                if ready_ns > now_ns:
                    if bucket.asking and bucket.is_refused(ticket.tokens, now_ns):
                        self._refuse_asking(bucket, now_ns)
                        continue
                    self._want_lease(bucket, ticket.tokens)
                    self._wake_at(bucket, ready_ns)
                    break
                self._unqueue(ticket, is_served=True)
                if self._pass(ticket, now_ns, may_refuse=False):
                    self._done.append(ticket)

    def _refuse_asking(self, bucket: Bucket, now_ns: int) -> None:
        """The answer is no: who waited for it alone is refused, or goes on waiting where queue and time allow it."""
        queue_size = bucket.rule.settings.queue
        kept = 0
        for ticket in list(bucket.queue.tickets()):
            deadline_ns = ticket.asks_ns
            if not deadline_ns:
                kept += 1
                continue
            if kept < queue_size and now_ns < deadline_ns:
                kept += 1
                ticket.asks_ns = 0
                bucket.asking -= 1
                if deadline_ns < ticket.deadline_ns:
                    ticket.deadline_ns = deadline_ns
                    heapq.heappush(self._deadlines, (deadline_ns, ticket.seq, ticket))
                continue
            self._unqueue(ticket)
            self._refuse(ticket, bucket, "no room, and no queue" if not queue_size else "no room in time", now_ns)
            self._done.append(ticket)

    def _wake_at(self, bucket: Bucket, ready_ns: float) -> None:
        if ready_ns < NEVER_NS and ready_ns != bucket.wake_ns:
            bucket.wake_ns = ready_ns
            self._numbers += 1
            heapq.heappush(self._wakes, (ready_ns, self._numbers, bucket))

    # Leases -----------------------------------------------------------------------------------------------------------

    def _want_lease(self, bucket: Bucket, tokens: int) -> None:
        if not self.is_leased:
            return
        queue = bucket.queue
        places = bucket.places
        if places is not None:
            self.places[places.key] = bucket
            if not places.is_full and bucket.in_flight + bucket.reserved + queue.size >= places.limit:
                places.is_due = self.asks_places = True  # one ahead, so that the next need not wait
        for rate, cost, waiting in ((bucket.requests, 1, queue.size), (bucket.tokens, tokens, queue.tokens)):
            # Half of what went since the last lease is left: ask early, so that nobody waits for the answer.
            if rate is not None and rate.quota < max(rate.reserved + cost, rate.used / 2, 0.5):
                self.leases[rate.key] = (rate, rate.reserved + max(cost, waiting))

    def places_due(self, now_ns: int) -> list[Bucket]:
        """Those for which places are to be asked for now; where they are too many, some of them."""
        self.asks_places = False
        urgent: list[Bucket] = []
        others: list[Bucket] = []
        for bucket in self.places.values():
            places = bucket.places
            if places is not None and places.is_due:
                urgent.append(bucket)
            elif places is not None and places.next_ns <= now_ns:
                others.append(bucket)
        self.asks_places = len(urgent) > MOST_PLACES
        return (urgent + others)[:MOST_PLACES]

    def places_answered(self, bucket: Bucket, needed: int, granted: int, now_ns: int, *, is_full: bool) -> None:
        """What came of `Bucket.ask_places`."""
        places = bucket.places
        if places is None or self.places.get(places.key) is not bucket:
            return  # the settings have changed meanwhile
        places.answer(granted, now_ns, is_full=is_full, least_ns=len(self.places) * EACH_PLACES_NS)
        if bucket.is_idle and not needed:
            del self.places[places.key]
        needs = bucket.in_flight + bucket.reserved + bucket.queue.size
        places.is_due = not places.is_full and needs > granted
        self.asks_places = self.asks_places or places.is_due
        if bucket.queue.size:
            self._touch(bucket)

    @property
    def places_ns(self) -> int:
        """When places are to be asked for next; NEVER_NS where none are held."""
        soonest_ns = NEVER_NS
        for bucket in self.places.values():
            if bucket.places is not None:
                soonest_ns = min(soonest_ns, bucket.places.next_ns)
        return 0 if self.asks_places else soonest_ns


def _limits(settings: RuleSettings) -> bool:
    limits = (settings.requests_per_s, settings.tokens_per_s, settings.concurrency)
    return any(limit is not None for limit in limits)


def _key_settings(limits: KeyLimits) -> RuleSettings:
    """A key's limits as a rule; beyond what a rule takes, as much as it does."""
    return RuleSettings(
        name=KEY_RULE,
        requests_per_s=None if limits.requests_per_s is None else min(max(limits.requests_per_s, 1e-9), 1e6),
        tokens_per_s=None if limits.tokens_per_s is None else min(max(limits.tokens_per_s, 1e-9), 1e9),
        concurrency=None if limits.concurrency is None else min(max(limits.concurrency, 1), 10**6),
    )


def _short(log_type: LogType) -> str:
    return "api" if log_type is LogType.API else "conversation"
