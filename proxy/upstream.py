"""The upstreams of a worker: their connections, load and health; and each request's way through them.

`balance.py` decides who takes a request, `health.py` who is well; this file keeps their state, asks the clock and talks
to the upstreams. What a choice needs apart from the load (who is ready, with what weight, for which model) is worked
out when it changes, not at each request.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import random
import re
import ssl
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from proxy.balance import Decision, Pool, Ring, build_ring, choose, hash64
from proxy.config_error import ConfigError
from proxy.health import Health, State, Window, is_outlier, may_eject
from proxy.models import ask, ask_models, merge
from proxy.prefix import PrefixTable
from proxy.request_head import CREDENTIALS
from proxy.settings import Settings, UpstreamSettings
from proxy.view import UpstreamStatus
from wire.http import HttpClient, client_context, parse_base_url
from wire.http1 import Headers

log = logging.getLogger("burstgate.gateway")

BUDGET_WINDOW_NS = 10_000_000_000
"""Over which the retry budget counts."""
ASK_AGAIN_S = 5.0
"""An upstream that could not be asked for its models is asked again after this."""
_NEVER_NS = 1 << 63
_KEY = re.compile(r"[!-~]{1,4096}")
_PLAIN = Decision(0, "least_in_flight", 1)


class Upstream:
    """One vLLM server, as one worker sees it."""

    __slots__ = ("bit", "client", "credential", "header", "health", "in_flight", "index", "is_retired", "models",
                 "name", "settings", "window")  # fmt: skip

    def __init__(
        self,
        url: str | UpstreamSettings,
        *,
        connect_timeout_s: float,
        idle_s: float,
        tls: ssl.SSLContext | None = None,
        api_key: str | None = None,
    ) -> None:
        self.credential = b"" if api_key is None else b"authorization: Bearer %b\r\n" % api_key.encode()
        """A header line that takes the place of the client's own credentials; empty: those are sent on."""
        self.settings = UpstreamSettings(url=url) if isinstance(url, str) else url
        self.client = HttpClient(self.settings.url, connect_timeout_s=connect_timeout_s, idle_s=idle_s, tls=tls)
        self.name = self.settings.name or self.client.url.text
        self.header = b"x-burstgate-upstream: %b\r\n" % self.name.encode()
        """What an answer says of it."""
        self.in_flight = 0
        self.models = self.settings.models
        """What it serves; None when that is not known."""
        self.is_retired = False
        """No longer configured: it finishes what is in flight."""
        defaults = Settings()
        self.health = Health(defaults.health, defaults.balance.slow_start_s)
        self.window = Window(int(defaults.health.window_s * 1e9))
        """Requests and failed ones."""
        self.index = -1
        """In the fleet; -1 when it is not in it."""
        self.bit = 0
        """In the prefix table."""

    def headers_for(self, headers: Headers) -> Headers:
        """A client's headers for this upstream: its own credential replaces the client's."""
        if not self.credential:
            return headers
        name, _, value = self.credential[:-2].partition(b": ")
        return [header for header in headers if header[0].lower() not in CREDENTIALS] + [(name, value)]

    def connect_failed(self) -> None:
        """Pass it over for a while."""
        self.health.connect_failed(time.monotonic_ns(), "no connection")

    def release(self) -> None:
        """A request is over."""
        self.in_flight -= 1
        if self.is_retired:
            self.client.close()


def _make(wanted: UpstreamSettings, settings: Settings) -> Upstream:
    """Raises ConfigError."""
    files: tuple[Path | None, ...] = (wanted.ca_file, wanted.cert_file, wanted.key_file)
    try:
        tls = client_context(*files) if any(files) else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"upstreams: {wanted.url}: {error}") from None
    timeouts = settings.timeouts
    return Upstream(
        wanted,
        connect_timeout_s=timeouts.connect_s,
        idle_s=timeouts.upstream_idle_s,
        tls=tls,
        api_key=read_api_key(wanted),
    )


def read_api_key(wanted: UpstreamSettings) -> str | None:
    """The upstream's key, from wherever it is configured. Raises ConfigError, which does not show it."""
    key = wanted.api_key
    place = "api_key"
    if wanted.api_key_env is not None:
        place = f"api_key_env: {wanted.api_key_env}"
        key = os.environ.get(wanted.api_key_env)
        if key is None:
            raise ConfigError(f"upstreams: {wanted.url}: {place}: no such environment variable")
    elif wanted.api_key_file is not None:
        place = f"api_key_file: {wanted.api_key_file}"
        try:
            key = wanted.api_key_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"upstreams: {wanted.url}: {place}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"upstreams: {wanted.url}: {place}: expected text") from None
    if key is not None and not _KEY.fullmatch(key):
        raise ConfigError(f"upstreams: {wanted.url}: {place}: expected 1 to 4096 visible ASCII characters")
    return key


def build_fleet(settings: Settings) -> Fleet:
    """All upstreams of the settings. Raises ConfigError."""
    return Fleet([_make(wanted, settings) for wanted in settings.upstreams], settings)


class Fleet:
    """All upstreams."""

    def __init__(self, upstreams: Sequence[Upstream], settings: Settings | None = None) -> None:
        self.upstreams: tuple[Upstream, ...] = ()
        self._budget = Window(BUDGET_WINDOW_NS)
        """Requests and retries."""
        self._prefixes = PrefixTable(0)
        self._tasks: asyncio.TaskGroup | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._running = contextlib.AsyncExitStack()
        self._configure(tuple(upstreams), settings or Settings())

    # Configuration ---------------------------------------------------------------------------------------------------

    def _configure(self, upstreams: tuple[Upstream, ...], settings: Settings) -> None:
        self.upstreams = upstreams
        self.settings = settings
        self.policy = settings.balance.policy
        self.needs_prefix = self.policy == "prefix"
        self._max_load = settings.balance.max_load
        self.aliases = settings.aliases
        self.fallbacks = settings.fallbacks
        self.is_plain = len(upstreams) == 1 and not self.aliases and not self.fallbacks
        """One upstream, and nothing is renamed: there is nothing to choose."""
        self._compares = len(upstreams) > 1 and settings.health.outlier_margin > 0
        self._credits: dict[str | None, list[float]] = {}
        if self._prefixes.capacity != settings.balance.prefix_entries:
            self._prefixes = PrefixTable(settings.balance.prefix_entries)
        used = {upstream.bit for upstream in upstreams}
        free = (bit for number in range(len(upstreams)) if (bit := 1 << number) not in used)
        for index, upstream in enumerate(upstreams):
            upstream.index = index
            upstream.bit = upstream.bit or next(free)
            upstream.health.rules = settings.health
            upstream.health.slow_start_ns = int(settings.balance.slow_start_s * 1e9)
            upstream.window.resize(int(settings.health.window_s * 1e9))
            if settings.health.interval_s == 0:
                upstream.health.forget_probes()
        self._learnt()

    def apply(self, settings: Settings) -> None:
        """Change to other settings. Upstreams are kept by their URL, with connections, health and load.

        Those that are no longer there finish what is in flight. Raises ConfigError; then nothing has changed.
        """
        here = {upstream.client.url.text: upstream for upstream in self.upstreams}
        made = [(here.pop(parse_base_url(wanted.url).text, None), _make(wanted, settings))
                for wanted in settings.upstreams]  # fmt: skip
        was = self.settings.timeouts
        is_same = (was.connect_s, was.upstream_idle_s) == (
            settings.timeouts.connect_s,
            settings.timeouts.upstream_idle_s,
        )
        now_ns = time.monotonic_ns()
        fleet = []
        for kept, new in made:
            if kept is None:
                new.health.slow_start_ns = int(settings.balance.slow_start_s * 1e9)
                new.health.start_slowly(now_ns)
                fleet.append(new)
                continue
            tls = (kept.settings, new.settings)
            if not is_same or any(each.ca_file or each.cert_file for each in tls):  # the same names, other certificates
                kept.client.close()
                kept.client = new.client
            if new.models is not None or kept.settings.models is not None:
                kept.models = new.models
            kept.settings = new.settings
            kept.name = new.name
            kept.header = new.header
            kept.credential = new.credential
            fleet.append(kept)
        for gone in here.values():
            gone.is_retired = True
            gone.index = -1
            gone.client.close()
        self._configure(tuple(fleet), settings)
        self._watch_all()

    def reread_keys(self) -> None:
        """Take over keys that have changed in their files; one that can not be read stays as it was."""
        for upstream in self.upstreams:
            if upstream.settings.api_key_file is not None:
                try:
                    key = read_api_key(upstream.settings)
                except ConfigError as error:
                    log.error("%s", error)
                    continue
                upstream.credential = b"authorization: Bearer %b\r\n" % (key or "").encode()

    def close(self) -> None:
        """Close idle connections."""
        for upstream in self.upstreams:
            upstream.client.close()

    # The choice ------------------------------------------------------------------------------------------------------

    def select(self, *, model: str | None, session: str | None, prefix: tuple[int, ...] = ()) -> Selection:
        """A request's way through the fleet."""
        return Selection(self, model, session, prefix)

    def _learnt(self) -> None:
        """The upstreams, or what they serve, have changed."""
        serving: dict[str, list[int]] = {}
        for upstream in self.upstreams:
            for model in dict.fromkeys(upstream.models or ()):
                serving.setdefault(model, []).append(upstream.index)
        self._serving = serving
        self._credits = {model: each for model, each in self._credits.items() if model is None or model in serving}
        self._rings: dict[tuple[int, ...], Ring] = {}
        self._stale()

    def _stale(self) -> None:
        """Something other than the load has changed."""
        self.fresh_until_ns = 0

    def refresh(self, now_ns: int) -> None:
        """Work out anew who is ready, with what weight, and until when that holds."""
        self._ready: set[int] = set()
        self._reserve: set[int] = set()
        self._pools: dict[str | None, Pool] = {}
        weights = []
        until_ns = _NEVER_NS
        for upstream in self.upstreams:
            health = upstream.health
            weights.append(upstream.settings.weight * health.ramp(now_ns))
            changes_at_ns = health.changes_at_ns(now_ns)
            if changes_at_ns is not None:
                until_ns = min(until_ns, changes_at_ns)
            if not upstream.settings.drain:
                (self._ready if health.is_ready(now_ns) else self._reserve).add(upstream.index)
        self._weights = tuple(weights)
        self.fresh_until_ns = until_ns

    def pool(self, model: str | None) -> Pool:
        """Who serves a model; of one that nobody is known to serve, everybody: the upstream's 404 is the truth."""
        pool = self._pools.get(model)
        if pool is not None:
            return pool
        indices: Sequence[int] | None = self._serving.get(model) if model is not None else None
        if indices is None:
            if model is not None:
                return self.pool(None)
            indices = range(len(self.upstreams))
        pool = self._pools[model] = Pool(
            tuple(index for index in indices if index in self._ready),
            tuple(index for index in indices if index in self._reserve),
            self._weights,
            self._credits.setdefault(model, [0.0] * len(self.upstreams)),
            self._ring(tuple(indices)) if self.policy == "session" else None,
        )
        return pool

    def _ring(self, indices: tuple[int, ...]) -> Ring:
        ring = self._rings.get(indices)
        if ring is None:
            upstreams = [self.upstreams[index] for index in indices]
            ring = build_ring([(each.index, each.name, each.settings.weight) for each in upstreams])
            self._rings[indices] = ring
        return ring

    def serves(self, model: str | None) -> bool:
        """Whether somebody is known to serve it."""
        return model in self._serving

    def decide(
        self, model: str | None, key: int | None, blocks: tuple[int, ...], without: Sequence[int], may_guess: bool
    ) -> Decision | None:
        """The next one for a request."""
        pool = self._pools.get(model) or self.pool(model)
        holders = functools.partial(self._holders, blocks) if blocks else None
        loads = [upstream.in_flight for upstream in self.upstreams]
        return choose(pool, loads, self.policy, self._max_load, without, key, holders, may_guess)

    def _holders(self, blocks: tuple[int, ...], candidates: Sequence[int]) -> list[int]:
        upstreams = self.upstreams
        allowed = sum(upstreams[index].bit for index in candidates)
        held = self._prefixes.holders(blocks, allowed)
        return [index for index in candidates if upstreams[index].bit & held]

    def taken(self, upstream: Upstream, blocks: tuple[int, ...]) -> bool:
        """A request is on its way to an upstream; True when it is a trial of one whose circuit is not closed."""
        if blocks:
            self._prefixes.saw(blocks, upstream.bit)
        if upstream.health.is_closed:
            return False
        upstream.health.trials += 1
        self._stale()
        return True

    def trial_over(self, upstream: Upstream) -> None:
        """Another trial may begin."""
        upstream.health.trials -= 1
        self._stale()

    def count_request(self, now_ns: int) -> None:
        """Towards the retry budget."""
        self._budget.add(now_ns, 1, 0)

    def take_retry(self, now_ns: int) -> bool:
        """One retry of the budget, if there is one left."""
        counts = self._budget.counts(now_ns)
        rules = self.settings.retry
        if counts.marked >= max(rules.budget * counts.total, rules.min_per_s * BUDGET_WINDOW_NS / 1e9):
            return False
        self._budget.add(now_ns, 0, 1)
        return True

    # What became of a request ----------------------------------------------------------------------------------------

    def went_well(self, upstream: Upstream, *, is_trial: bool) -> None:
        """It was answered."""
        now_ns = time.monotonic_ns()
        if self._compares:
            upstream.window.add(now_ns, 1, 0)
        health = upstream.health
        if (is_trial or health.connect_failures) and health.answered(now_ns, is_trial=is_trial):
            self._turned(upstream)

    def went_wrong(self, upstream: Upstream, error: str, *, is_trial: bool, was_counted: bool = False) -> None:
        """It failed after it was sent. was_counted: it had counted as answered."""
        now_ns = time.monotonic_ns()
        upstream.window.add(now_ns, 0 if was_counted else 1, 1)
        rules = self.settings.health
        health = upstream.health
        others = [other for other in self.upstreams if other is not upstream]
        allowed = upstream.index >= 0 and may_eject(
            sum(other.health.is_ejected for other in others), len(self.upstreams), rules
        )
        if health.request_failed(now_ns, error, is_trial=is_trial, may_eject=allowed):
            self._turned(upstream)
        elif (
            allowed
            and health.is_closed
            and is_outlier(upstream.window.counts(now_ns), [other.window.counts(now_ns) for other in others], rules)
        ):
            health.eject(now_ns, f"fails more often than the rest: {error}")
            self._turned(upstream)

    def not_reached(self, upstream: Upstream, error: str) -> None:
        """No connection could be made."""
        if upstream.health.connect_failed(time.monotonic_ns(), error):
            self._turned(upstream)

    def _turned(self, upstream: Upstream) -> None:
        """An upstream's state has changed."""
        self._stale()
        health = upstream.health
        state = health.state(time.monotonic_ns())
        if state in (State.UP, State.SLOW_START):
            log.warning("upstream %s: well again", upstream.name)
        else:
            log.warning("upstream %s: %s: %s", upstream.name, state, health.error)
            upstream.window.clear()  # what it did before says nothing of how it will be after

    # Questions -------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Look after the upstreams; returns once each was asked for its models, or `health.timeout_s` later."""
        async with contextlib.AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            asked = [tasks.create_task(self._ask(upstream)) for upstream in self.upstreams if self._is_asked(upstream)]
            if asked:
                await asyncio.wait(asked)
            self._tasks = tasks
            stack.callback(self._watch_none)
            self._watch_all()
            self._running = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        """Leave them."""
        await self._running.__aexit__(*exc_info)

    def _watch_none(self) -> None:
        self._tasks = None
        for watcher in self._watchers:
            watcher.cancel()
        self._watchers = []

    def _watch_all(self) -> None:
        if self._tasks is None:
            return
        for watcher in self._watchers:
            watcher.cancel()
        self._watchers = [self._tasks.create_task(self._watch(upstream)) for upstream in self.upstreams]

    def _is_asked(self, upstream: Upstream) -> bool:
        return (
            len(self.upstreams) > 1 and self.settings.health.models_interval_s > 0 and upstream.settings.models is None
        )

    async def _watch(self, upstream: Upstream) -> None:
        """Probe an upstream, and ask for its models, until cancelled."""
        rules = self.settings.health
        start_s = time.monotonic()
        probe_at_s = start_s + rules.interval_s * random.random() if rules.interval_s else float("inf")
        ask_at_s = float("inf")
        if self._is_asked(upstream):
            ask_at_s = start_s if upstream.models is None else start_s + rules.models_interval_s * random.random()
        while min(probe_at_s, ask_at_s) < float("inf"):
            await asyncio.sleep(min(probe_at_s, ask_at_s) - time.monotonic())
            try:
                if time.monotonic() >= probe_at_s:
                    is_up_again = await self._probe(upstream)
                    probe_at_s = time.monotonic() + rules.interval_s * random.uniform(0.9, 1.1)
                    if is_up_again and ask_at_s < float("inf"):
                        ask_at_s = 0.0  # it may serve something else now
                if time.monotonic() >= ask_at_s:
                    pause_s = rules.models_interval_s
                    if not await self._ask(upstream):
                        pause_s = min(pause_s, ASK_AGAIN_S)
                    ask_at_s = time.monotonic() + pause_s * random.uniform(0.9, 1.1)
            except Exception:  # never in the way: a defect in asking must not end the worker
                log.exception("upstream %s: a probe ended in a defect of the gateway", upstream.name)
                await asyncio.sleep(1.0)

    async def _probe(self, upstream: Upstream) -> bool:
        """True when it is up again."""
        path = self.settings.health.path
        try:
            status, _ = await ask(
                upstream.client, path.encode(), upstream.headers_for([]), self.settings.health.timeout_s
            )
        except OSError as failure:
            error: str | None = f"GET {path}: {failure}"
        else:
            error = f"GET {path}: status {status}" if status >= 500 else None
        if not upstream.health.probed(time.monotonic_ns(), error):
            return False
        self._turned(upstream)
        return error is None

    async def _ask(self, upstream: Upstream) -> bool:
        """Learn an upstream's models; False when it could not be asked. What it says wrongly changes nothing."""
        try:
            _, models = await ask_models(upstream.client, upstream.headers_for([]), self.settings.health.timeout_s)
        except OSError:
            return False
        if models is not None and upstream.settings.models is None and upstream.models != tuple(models):
            upstream.models = tuple(models)
            self._learnt()
        return True

    async def models(self, headers: Headers) -> bytes | None:
        """The body of /v1/models for all upstreams together, asked with a client's headers; None when nobody answered.

        `proxy.models.merge` says what it holds. Upstreams that drain are left out: nothing new reaches them.
        """
        timeout_s = self.settings.health.timeout_s
        asking = [
            ask_models(each.client, each.headers_for(headers), timeout_s)
            for each in self.upstreams
            if not each.settings.drain
        ]
        answers = []
        for answer in await asyncio.gather(*asking, return_exceptions=True):
            if isinstance(answer, BaseException):
                if not isinstance(answer, OSError):
                    raise answer
            elif answer[1] is not None:
                answers.append(answer[1])
        return merge(answers, self.aliases) if answers else None

    def views(self) -> list[UpstreamStatus]:
        """Each upstream's status, for the control plane."""
        now_ns = time.monotonic_ns()
        return [
            UpstreamStatus(
                upstream.name,
                str(State.DRAINING if upstream.settings.drain else upstream.health.state(now_ns)),
                upstream.in_flight,
                upstream.settings.weight,
                upstream.health.ramp(now_ns),
                upstream.models,
                upstream.health.error,
                upstream.health.failures,
            )
            for upstream in self.upstreams
        ]


class Selection:
    """One request's way through the fleet: `pick`, then what became of it, until it is answered or nobody is left."""

    __slots__ = ("_asked", "_blocks", "_chain", "_fleet", "_has_failed", "_holds", "_is_granted", "_is_judged",
                 "_is_ok", "_is_trial", "_sent", "_session", "_tried", "attempts", "decision", "model", "problem",
                 "upstream")  # fmt: skip

    def __init__(self, fleet: Fleet, model: str | None, session: str | None, blocks: tuple[int, ...]) -> None:
        self._fleet = fleet
        self._asked = model
        self._session = session
        self._blocks = blocks
        self._chain: tuple[str | None, ...] | None = None
        self._tried: tuple[Upstream, ...] = ()
        self._sent = 0
        """Attempts that reached an upstream."""
        self._has_failed = False
        """The last attempt reached an upstream, and failed."""
        self._is_granted = False
        self._is_judged = self._is_ok = self._holds = self._is_trial = False
        self.upstream: Upstream | None = None
        self.attempts = 0
        self.model: str | None = None
        """The name to send, when it is not what the client asked for."""
        self.problem = ""
        """Why nobody is left, in one line."""
        self.decision: Decision | None = None
        """The last choice."""

    def pick(self) -> Upstream | None:
        """The next upstream, with a slot; the previous one's is released. None: nobody is left, or no retry is."""
        if self._holds:
            self.release()
        fleet = self._fleet
        if fleet.is_plain and not self._tried:
            upstream = fleet.upstreams[0]
            if upstream.settings.drain:
                self.problem = f"{upstream.name}: draining"
                return None
            self.decision = _PLAIN
            self._is_trial = not upstream.health.is_closed and fleet.taken(upstream, ())
        elif self._has_failed and not self._is_granted and not self.may_retry():
            return None
        else:
            found = self._choose(fleet)
            if found is None:
                return None
            upstream = found
        self._tried = (*self._tried, upstream)
        self._has_failed = self._is_granted = self._is_judged = self._is_ok = False
        self._holds = True
        self._sent += 1
        self.attempts += 1
        self.upstream = upstream
        upstream.in_flight += 1
        return upstream

    def _choose(self, fleet: Fleet) -> Upstream | None:
        now_ns = time.monotonic_ns()
        if now_ns >= fleet.fresh_until_ns:
            fleet.refresh(now_ns)
        if not self.attempts:
            fleet.count_request(now_ns)
        chain = self._chain or self._make_chain(fleet)
        without = [upstream.index for upstream in self._tried] if self._tried else ()
        session = self._session
        key = hash64(session) if session is not None and fleet.policy == "session" else None
        blocks = self._blocks if fleet.needs_prefix else ()
        for may_guess in (False, True):
            for name in chain:
                decision = fleet.decide(name, key, blocks, without, may_guess)
                if decision is not None:
                    upstream = fleet.upstreams[decision.index]
                    self.decision = decision
                    self.model = None if name == self._asked else name
                    self._is_trial = (bool(blocks) or not upstream.health.is_closed) and fleet.taken(upstream, blocks)
                    return upstream
        if not self.problem:
            self.problem = "every upstream is draining" if fleet.upstreams else "no upstream is configured"
            if fleet.serves(chain[0]):
                self.problem = f"model '{chain[0]}': every upstream that serves it is draining"
        return None

    def _make_chain(self, fleet: Fleet) -> tuple[str | None, ...]:
        """The models to try: the one asked for, then its fallbacks; those first when nobody serves it."""
        asked = self._asked
        chain: tuple[str | None, ...] = (asked,)
        if asked is not None:
            name = fleet.aliases.get(asked, asked)
            others = fleet.fallbacks.get(asked) or fleet.fallbacks.get(name) or ()
            names = tuple(fleet.aliases.get(other, other) for other in others)
            served = tuple(other for other in names if fleet.serves(other))
            chain = (name, *names) if fleet.serves(name) or not served else (*served, name)
        self._chain = chain
        return chain

    def may_retry(self) -> bool:
        """Whether one more attempt is allowed and makes sense; uses up one of the budget.

        Somebody must be left. After a failed connection that is all, because nothing was sent; else it must be
        somebody who is well, and neither `retry.max_attempts` nor the budget may be used up.
        """
        fleet = self._fleet
        if self._is_granted or not self.attempts:
            return True
        now_ns = time.monotonic_ns()
        if now_ns >= fleet.fresh_until_ns:
            fleet.refresh(now_ns)
        without = {upstream.index for upstream in self._tried}
        pools = [fleet.pool(name) for name in self._chain or self._make_chain(fleet)]
        if not self._has_failed:
            return any(not without.issuperset(pool.ready + pool.reserve) for pool in pools)
        if self._sent >= fleet.settings.retry.max_attempts:
            return False
        if all(without.issuperset(pool.ready) for pool in pools) or not fleet.take_retry(now_ns):
            return False
        self._is_granted = True
        return True

    def connect_failed(self, error: str) -> None:
        """No connection could be made; nothing was sent."""
        if self.upstream is None or self._is_judged:
            return
        self._is_judged = True
        self._sent -= 1
        self.problem = error
        self._fleet.not_reached(self.upstream, error)

    def failed(self, error: str) -> None:
        """It was sent, but nothing of an answer has reached the client."""
        if self.upstream is None or self._is_judged:
            return
        self._is_judged = self._has_failed = True
        name = self.upstream.name
        self.problem = error if error.startswith(name) else f"{name}: {error}"
        self._fleet.went_wrong(self.upstream, error, is_trial=self._is_trial)

    def answered(self, status: int) -> None:
        """The answer's head is being passed on. 501 says what an upstream can not do, not that it is unwell."""
        upstream = self.upstream
        if upstream is None or self._is_judged:
            return
        self._is_judged = True
        if status >= 500 and status != 501:
            self._fleet.went_wrong(upstream, f"status {status}", is_trial=self._is_trial)
        else:
            self._is_ok = True
            self._fleet.went_well(upstream, is_trial=self._is_trial)

    def broke_off(self) -> None:
        """The answer failed in the middle."""
        if self.upstream is not None and self._is_ok:
            self._is_ok = False
            self._fleet.went_wrong(self.upstream, "cut off", is_trial=self._is_trial, was_counted=True)

    def release(self) -> None:
        """The slot is free."""
        if not self._holds or self.upstream is None:
            return
        self._holds = False
        upstream = self.upstream
        upstream.release()
        if self._is_ok and upstream.health.failures:
            upstream.health.failures = 0
        if self._is_trial:
            self._is_trial = False
            self._fleet.trial_over(upstream)
