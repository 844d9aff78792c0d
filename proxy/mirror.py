"""Shadow traffic: requests sent once more, to targets whose answers nobody waits for.

The order that matters: a request is drawn and put into a target's queue while it is on its way to its upstream; that
is all that happens there. The target's own turn sends what waits, on its own connections; what arrives calls the
shadow, which accounts for it as for any answer, drops the bytes and writes a record (`origin=shadow`, `shadow_of`, the
target's name as `upstream`). No task belongs to a shadow that finds an idle connection.

    drawn       by a keyed hash of its session, or of its own id where it has none, below the target's share: the same
                requests in every worker, whole sessions together
    refused     counted by reason (`telemetry.MIRROR_DROPS`), when a bound is reached; never is a bound waited for
    waits       in the queue, or until it is due: copies are late by a draw, collected requests by their window
    in flight   at most `concurrency`; its begin is in the journal, so that a crash leaves a record
    ended       its record waits for the primary's output where agreement is asked for and it comes later

Only POST requests of families that are known are mirrored: they change nothing at a server. Clients' credentials never
leave: headers and query parameters whose names sound like one, cookies, what a proxy was told, who the client is.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import heapq
import itertools
import logging
import os
import random
import re
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from proxy.agreement import exact, similarity
from proxy.answer_head import AnswerHead
from proxy.config_error import ConfigError
from proxy.health import Health
from proxy.request_head import RequestHead, clean, countable
from proxy.settings import CollectSettings, HealthSettings, MirrorTargetSettings, Settings
from storage.entries import Begun
from traces.record import Origin, Outcome, TokenSource, TraceRecord
from wire import latency
from wire.accounting import MAX_ANSWER_BYTES, Account, Accounted, NoAccount, StreamAccount, UnaryAccount
from wire.http import ConnectFailed, Exchange, HttpClient, client_context
from wire.http1 import BadResponse, Headers, encode_lines
from wire.openai import USAGE_ON_REQUEST, ask_for_usage, with_model
from wire.shapes import Family

if TYPE_CHECKING:
    from proxy.exchange import Gateway, Request

log = logging.getLogger("burstgate.gateway")

TICK_S = 0.25
"""How often timers are looked at: a shadow may end so much later than `timeout_s` says."""
BATCH = 8
"""Sent in one turn; between turns the loop serves clients."""
MAX_COMPARING = 64
"""Outputs that wait for the thread that compares them; beyond it a record has no agreement."""
DRAIN_S = 2.0
"""What is in flight has this long when the worker stops."""
_WHOLE = 1 << 64
_SECRET = re.compile(rb"auth|key|token|secret|cookie|credential|passw|signature|^proxy-", re.IGNORECASE)
"""Names of headers and query parameters that do not leave."""
_OWN = frozenset({b"accept-encoding", b"via", b"forwarded", b"x-real-ip", b"x-forwarded-for", b"x-forwarded-user",
                  b"x-forwarded-email", b"traceparent", b"tracestate", b"baggage"})  # fmt: skip
"""Others that do not: an answer must be readable, a trace is the primary's, and who asks is nobody's business."""
_NO_ACCOUNT = NoAccount()
_serials = itertools.count()
"""Of a target with its settings, under which a head remembers its lines for it."""


def keep_headers(headers: Headers, settings: MirrorTargetSettings, api_key: str | None) -> Headers:
    """A client's headers as they go to a target: without credentials, with the target's own."""
    own = {} if api_key is None else {b"authorization": b"Bearer " + api_key.encode()}
    own |= {name.lower().encode(): value.encode() for name, value in settings.headers.items()}
    gone = {name.lower().encode() for name in settings.drop_headers} | own.keys() | _OWN
    kept = [header for header in headers if header[0].lower() not in gone and not _SECRET.search(header[0])]
    return kept + list(own.items())


@functools.lru_cache(maxsize=1024)
def public_target(target: bytes) -> bytes:
    """A request target without the query parameters that sound like credentials."""
    path, question, query = target.partition(b"?")
    if not question:
        return target
    kept = [part for part in query.split(b"&") if not _SECRET.search(part.partition(b"=")[0])]
    return path + b"?" + b"&".join(kept) if kept else path


def read_key(settings: MirrorTargetSettings) -> str | None:
    """The target's API key. Raises ConfigError, which does not show it."""
    place = f"mirror.targets: {settings.url}"
    if settings.api_key_env is not None:
        key = os.environ.get(settings.api_key_env, "").strip()
        if not key:
            raise ConfigError(f"{place}: api_key_env: {settings.api_key_env} is not set in the environment")
    elif settings.api_key_file is not None:
        try:
            key = Path(settings.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ConfigError(f"{place}: api_key_file: {settings.api_key_file}: {reason}") from None
        if not key:
            raise ConfigError(f"{place}: api_key_file: {settings.api_key_file}: expected a key, it is empty")
    else:
        return None
    if not all("!" <= letter <= "~" for letter in key):
        raise ConfigError(f"{place}: api_key: expected visible ASCII without spaces")
    return key


def is_drawn(name: str, key: bytes, threshold: int) -> bool:
    """Whether a session or request is mirrored: its keyed hash of 64 bits is below the threshold."""
    digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "big") < threshold


class Windows:
    """When what is collected is due: windows of `collect_s`, released one behind the other. Pure.

    A window begins with the first request after the one before; its requests keep their gaps, divided by the speed. A
    slow release makes the next one wait.
    """

    __slots__ = ("_begun_ns", "_free_ns", "_release_ns", "collect_ns", "speed")

    def __init__(self, collect: CollectSettings) -> None:
        self.collect_ns = int(collect.collect_s * 1e9)
        self.speed = collect.speed
        self._begun_ns = -1
        self._release_ns = 0
        self._free_ns = 0
        """When the last window's release is over."""

    def due_ns(self, now_ns: int) -> int:
        """When a request that comes now is to leave. Times do not go back."""
        if self._begun_ns < 0 or now_ns >= self._begun_ns + self.collect_ns:
            self._begun_ns = now_ns
            self._release_ns = max(now_ns + self.collect_ns, self._free_ns)
            self._free_ns = self._release_ns + int(self.collect_ns / self.speed)
        return self._release_ns + int((now_ns - self._begun_ns) / self.speed)


class Shadow:
    """One request on its way to a target."""

    __slots__ = ("_account", "_answer", "_has_fed", "_is_prepared", "_is_primary_over", "_primary_answer", "_record",
                 "_texts_bytes", "begun", "body", "endpoint", "exchange", "facts", "family", "head", "is_over",
                 "is_trial", "log_type", "model", "primary_id", "received_at", "request_id", "run_id", "session",
                 "shown_id", "start_ns", "status", "target", "task", "tenant", "url_target", "wants_answer",
                 "whole_ns")  # fmt: skip

    def __init__(self, target: Target, request: Request, body: bytes) -> None:
        self.target = target
        self.body = body
        self.primary_id = request.request_id
        self.shown_id = request.shown_id
        self.url_target = request.target
        self.endpoint = request.endpoint
        self.family = request.family
        self.facts = request.facts
        self.head = request.head
        self.model = request.model
        self.session = request.session
        self.log_type = request.log_type
        self.tenant = request.tenant
        self.run_id = request.head.run_id
        self.request_id = ""
        self.received_at = 0.0
        self.start_ns = 0
        self.whole_ns = 0
        """When the answer's last event came, before its connection said so."""
        self.begun = False
        self.is_over = False
        self.is_trial = False
        self.status: int | None = None
        self.exchange: Exchange | None = None
        self.task: asyncio.Task[None] | None = None
        """Makes a connection; None else."""
        self._account: Account = _NO_ACCOUNT
        self._is_prepared = False
        self._has_fed = False
        self._answer: bytes | None = None
        self._record: TraceRecord | None = None
        """Made, and waiting for the primary's output."""
        self._is_primary_over = False
        self._primary_answer: bytes | None = None
        self.wants_answer = False
        """Its primary knows of it, and will say what it answered."""
        self._texts_bytes = 0
        """Of outputs held for the comparison, as the target counts them."""

    def begin(self, now_ns: int, request_id: str) -> None:
        """It leaves now."""
        self.request_id = request_id
        self.received_at = time.time()
        self.start_ns = now_ns
        facts = self.facts
        self.begun = self.target.mirror.gateway.journal.begin(
            Begun(
                request_id,
                self.received_at,
                self.session,
                self.model,
                self.log_type,
                self.head.client_request_id,
                self.endpoint,
                facts.stream,
                countable(facts.max_tokens),
                Origin.SHADOW,
                self.run_id,
                self.tenant,
                self.primary_id,
            )
        )

    def sent(self, exchange: Exchange) -> None:
        """It is on its way."""
        self.task = None
        if self.is_over:
            exchange.abort()
            return
        self.exchange = exchange
        exchange.listener = self.look

    def look(self) -> None:
        """Something has come."""
        exchange = self.exchange
        if exchange is None or self.is_over:
            return
        try:
            if exchange.interim:
                exchange.interim.clear()
            if exchange.has_head and not self._is_prepared:
                self._prepare(exchange)
            data = exchange.take()
            if data and self._is_prepared:
                self._has_fed = True
                self._account.feed(exchange.received_ns, data)
                if self._account.terminal and not self.whole_ns:
                    self.whole_ns = exchange.received_ns
            if exchange.is_complete:
                self._account.eof(exchange.received_ns)
                self.end(self._outcome(), None, exchange.received_ns)
            elif exchange.error is not None:
                self._failed(exchange, exchange.error)
        except Exception:  # noqa: BLE001 (never in the way: a defect here is nobody's but the shadow's)
            self.target.mirror.defect()
            self.end(Outcome.UPSTREAM_ERROR, "gateway_internal_error", time.monotonic_ns())

    def _prepare(self, exchange: Exchange) -> None:
        self._is_prepared = True
        self.status = exchange.status
        head = self.target.answer_head(exchange)
        keep = self.wants_answer
        if head.is_encoded:
            return
        if head.is_event_stream:
            self._account = StreamAccount(self.family, keep_answer=keep)
        elif head.is_json:
            self._account = UnaryAccount(self.family, keep_answer=keep)

    def _outcome(self) -> Outcome:
        status = self.status or 0
        if status < 400:
            return Outcome.OK
        if status == 429:
            return Outcome.REJECTED
        return Outcome.INVALID_REQUEST if status < 500 else Outcome.UPSTREAM_ERROR

    def _failed(self, exchange: Exchange, error: Exception) -> None:
        now_ns = time.monotonic_ns()
        if isinstance(error, ConnectFailed):
            self.end(Outcome.CONNECT_ERROR, "upstream_connect_error", now_ns)
        elif isinstance(error, BadResponse):
            self.end(Outcome.UPSTREAM_ERROR, "upstream_protocol_error", now_ns)
        else:
            outcome = Outcome.TRUNCATED if self._has_fed else Outcome.UPSTREAM_ERROR
            self.end(outcome, "upstream_disconnected", now_ns)

    def end(self, outcome: Outcome, error_type: str | None, now_ns: int) -> None:
        """It is over: judge the target, and make the record."""
        if self.is_over:
            return
        self.is_over = True
        exchange = self.exchange
        if exchange is not None and not exchange.is_complete:
            exchange.listener = None
            exchange.abort()
        if self.task is not None:
            self.task.cancel()
            self.task = None
        try:
            done = self._account.result()
        except Exception:  # noqa: BLE001 (never in the way: a defect in accounting must not break a shadow's end)
            self.target.mirror.defect()
            done = Accounted()
        if outcome is Outcome.OK and done.error_type is not None and type(self._account) is StreamAccount:
            outcome = Outcome.UPSTREAM_ERROR
        self._account = _NO_ACCOUNT
        self.target.ended(self, outcome, now_ns)
        record = self._make_record(outcome, error_type, done, self.whole_ns or now_ns)
        self.exchange = None
        self.body = b""
        if outcome is not Outcome.OK or done.answer is None or (self._is_primary_over and self._primary_answer is None):
            self.let_go()
            self._write(record)
            return
        self._record = record
        self._answer = self._held(done.answer)
        self.target.mirror.waiting.add(self)
        if self._is_primary_over:
            self._compare()

    def primary_over(self, answer: bytes | None) -> None:
        """The primary has ended, with this output; None where it can not be compared."""
        self._is_primary_over = True
        if answer is not None and (not self.is_over or self._record is not None):
            self._primary_answer = self._held(answer)
        if self._record is not None:
            self._compare()

    def _held(self, text: bytes) -> bytes | None:
        """An output to keep for the comparison; None for one too many."""
        size = len(text)
        target = self.target
        if size > MAX_ANSWER_BYTES or target.held_bytes + size > target.settings.queue_bytes:
            return None
        target.held_bytes += size
        self._texts_bytes += size
        return text

    def let_go(self) -> None:
        """Nothing is held for a comparison any more."""
        self.is_over = True
        self.target.held_bytes -= self._texts_bytes
        self._texts_bytes = 0
        self._primary_answer = self._answer = None

    def _compare(self) -> None:
        a, b = self._primary_answer, self._answer
        self.let_go()
        mirror = self.target.mirror
        if a is None or b is None:
            self.settle(None)
        elif a == b or self.target.settings.agreement == "exact":
            self.settle(exact(a, b))
        else:
            mirror.compare(self, a, b)

    def settle(self, agreement: float | None) -> None:
        """Write the record that has waited for the comparison."""
        record = self._record
        if record is None:
            return
        self._record = None
        self.let_go()
        self.target.mirror.waiting.discard(self)
        self._write(record if agreement is None else msgspec.structs.replace(record, agreement=agreement))

    def _write(self, record: TraceRecord) -> None:
        if self.begun:
            try:
                self.target.mirror.gateway.journal.end(record)
            except Exception:  # noqa: BLE001 (never in the way: a defect in recording must not end the worker's turn)
                self.target.mirror.defect()

    def _make_record(self, outcome: Outcome, error_type: str | None, done: Accounted, end_ns: int) -> TraceRecord:
        gateway = self.target.mirror.gateway
        usage = done.usage
        request_tokens = usage.request_tokens if usage is not None else None
        if done.content_chunks and (usage is None or usage.response_tokens is None):
            source = TokenSource.ESTIMATED
            if request_tokens is None:
                request_tokens = gateway.estimates.request_tokens(self.model, len(self.body))
        else:
            source = TokenSource.NONE if usage is None else TokenSource.USAGE
        response_tokens = countable(done.response_tokens)
        return TraceRecord(
            request_id=self.request_id,
            received_at=self.received_at,
            session_id=self.session,
            elapsed_s=(end_ns - self.start_ns) / 1e9,
            model=self.model,
            request_tokens=countable(request_tokens),
            response_tokens=response_tokens,
            log_type=self.log_type,
            outcome=outcome,
            client_request_id=self.head.client_request_id,
            served_model=clean(done.served_model),
            status=self.status,
            error_type=clean(done.error_type) or error_type,
            ttft_s=latency.ttft_s(self.exchange.sent_ns if self.exchange is not None else 0, done.first_chunk_ns),
            tpot_s=latency.tpot_s(done.first_chunk_ns, done.last_chunk_ns, response_tokens),
            endpoint=self.endpoint,
            stream=self.facts.stream,
            upstream=self.target.name,
            attempts=1,
            finish_reason=clean(done.finish_reason),
            cached_tokens=countable(usage.cached_tokens if usage is not None else None),
            max_tokens=countable(self.facts.max_tokens),
            token_source=source,
            origin=Origin.SHADOW,
            run_id=self.run_id,
            shadow_of=self.primary_id,
            tenant=self.tenant,
            gateway=gateway.name,
        )


class Target:
    """One target, as one worker sees it."""

    __slots__ = ("_alarm", "_alarm_ns", "_entries", "_head", "_is_pumping", "_key", "_later",
                 "_limit_ns", "_queue", "_serial", "_share", "_ticker", "_windows", "api_key", "client",
                 "health", "held_bytes", "in_flight", "is_retired", "mirror", "name", "settings",
                 "wants_answers")  # fmt: skip

    def __init__(self, mirror: Mirror, settings: MirrorTargetSettings, client: HttpClient, api_key: str | None) -> None:
        self.mirror = mirror
        self.client = client
        self.name = settings.name or client.url.text
        self.health = Health(HealthSettings(), 0.0)
        self.held_bytes = 0
        """Of bodies that wait or are in flight."""
        self.in_flight: set[Shadow] = set()
        self.is_retired = False
        self._queue: deque[Shadow] = deque()
        self._later: list[tuple[int, int, Shadow]] = []
        """What is not due yet: when, in which order, what."""
        self._entries = 0
        self._is_pumping = False
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_ns = 0
        self._ticker: asyncio.TimerHandle | None = None
        self._head = AnswerHead([], 0, bytes)
        self._windows: Windows | None = None
        self._key = hashlib.blake2b(mirror.gateway.secret + self.name.encode(), digest_size=32).digest()
        self.settings = settings
        self.use(settings, api_key)

    def use(self, settings: MirrorTargetSettings, api_key: str | None) -> None:
        """Take these settings; what waits and is in flight goes on."""
        if self._windows is None or settings.release != self.settings.release:
            self._windows = Windows(settings.release) if isinstance(settings.release, CollectSettings) else None
        self.settings = settings
        self.api_key = api_key
        self._serial = next(_serials)
        self._share = int(settings.share * _WHOLE)
        self._limit_ns = int(settings.timeout_s * 1e9)
        self.wants_answers = settings.agreement != "none"
        breaker = settings.breaker
        self.health.rules = HealthSettings(
            max_connect_failures=breaker.max_connect_failures,
            max_failures=breaker.max_failures,
            pause_s=breaker.pause_s,
            max_pause_s=breaker.max_pause_s,
            trials=breaker.trials,
        )

    # drawn ------------------------------------------------------------------------------------------------------------

    def offer(self, request: Request, body: bytes, *, is_upload: bool) -> None:
        """Draw a request, and let it wait."""
        settings = self.settings
        if self._share < _WHOLE:
            session = request.session if settings.by == "session" else None
            if not self._share or not is_drawn(session or request.request_id, self._key, self._share):
                return
        mirror = self.mirror
        now_ns = time.monotonic_ns()
        for number in range(settings.copies):
            reason = self._refusal(len(body), now_ns, is_upload=is_upload)
            if reason is not None:
                mirror.gateway.metrics.mirror_refused(reason)
                continue
            shadow = Shadow(self, request, body)
            if self.wants_answers and request.facts.choices == 1:
                if request.shadows is None:
                    request.shadows = []
                request.shadows.append(shadow)
                shadow.wants_answer = True
            self.held_bytes += len(body)
            mirror.gateway.metrics.mirror_queued()
            due_ns = now_ns if self._windows is None else self._windows.due_ns(now_ns)
            if number:
                due_ns += int(settings.jitter_s * 1e9 * random.random())
            if due_ns > now_ns:
                self._wait(shadow, due_ns)
            else:
                self._queue.append(shadow)
                self._pump_soon()

    def _refusal(self, size: int, now_ns: int, *, is_upload: bool) -> str | None:
        settings = self.settings
        if is_upload:
            return "upload"
        if size > settings.max_body:
            return "too_large"
        if self.mirror.is_stopping or self.mirror.gateway.is_stopping:
            return "stopping"
        if not self.health.is_closed and self._windows is None and now_ns < self.health.until_ns:
            return "breaker_open"
        if len(self._queue) + len(self._later) >= settings.queue:
            return "queue_full"
        return "bytes" if self.held_bytes + size > settings.queue_bytes else None

    def _wait(self, shadow: Shadow, due_ns: int) -> None:
        self._entries += 1
        heapq.heappush(self._later, (due_ns, self._entries, shadow))
        if self._alarm is None or due_ns < self._alarm_ns:
            self._set_alarm()

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._later:
            self._alarm_ns = self._later[0][0]
            delay_s = max(0.0, (self._alarm_ns - time.monotonic_ns()) / 1e9)
            self._alarm = self.mirror.loop.call_later(delay_s, self._ring)

    def _ring(self) -> None:
        """The first that was not due is."""
        self._alarm = None
        now_ns = time.monotonic_ns()
        while self._later and self._later[0][0] <= now_ns:
            self._queue.append(heapq.heappop(self._later)[2])
        self._set_alarm()
        self._pump_soon()

    # sent -------------------------------------------------------------------------------------------------------------

    def _pump_soon(self) -> None:
        if not self._is_pumping and len(self.in_flight) < self.settings.concurrency:
            self._is_pumping = True
            self.mirror.loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Send what waits, a few at a time."""
        self._is_pumping = False
        sent = 0
        now_ns = time.monotonic_ns()
        while self._queue and len(self.in_flight) < self.settings.concurrency:
            if sent == BATCH:
                self._pump_soon()
                return
            shadow = self._queue.popleft()
            if not self.health.is_ready(now_ns):
                self._drop(shadow, "breaker_open")
                continue
            try:
                sent += 1
                self._send(shadow, now_ns)
            except Exception:  # noqa: BLE001 (never in the way: a defect here is nobody's but the shadow's)
                self.mirror.defect()
                if shadow in self.in_flight:
                    shadow.end(Outcome.UPSTREAM_ERROR, "gateway_internal_error", now_ns)
                else:
                    self._drop(shadow, "defect")

    def _drop(self, shadow: Shadow, reason: str) -> None:
        shadow.let_go()
        self.held_bytes -= len(shadow.body)
        self.mirror.gateway.metrics.mirror_dropped(reason)

    def _send(self, shadow: Shadow, now_ns: int) -> None:
        body = shadow.body
        facts = shadow.facts
        models = self.settings.models
        if models and facts.model is not None:
            model = models.get(facts.model) or models.get("*")
            if model is not None and model != facts.model:
                renamed = with_model(body, model)
                if renamed is None:
                    self._drop(shadow, "model")
                    return
                body = renamed
                shadow.model = clean(model)
        if facts.stream and not facts.asks_usage and shadow.family in USAGE_ON_REQUEST:
            body = ask_for_usage(body, facts) or body
        lines = b"%bx-request-id: %b\r\ncontent-length: %d\r\n" % (self._lines(shadow.head), shadow.shown_id, len(body))
        if self.settings.tells:
            lines += b"x-burstgate-shadow-of: %b\r\n" % shadow.primary_id.encode()
        if not self.health.is_closed:
            shadow.is_trial = True
            self.health.trials += 1
        self.in_flight.add(shadow)
        self.mirror.gateway.metrics.mirror_sent()
        shadow.begin(time.monotonic_ns(), self.mirror.new_id(time.time()))
        target = public_target(shadow.url_target)
        exchange = self.client.start(b"POST", target, lines, body)
        if exchange is not None:
            shadow.exchange = exchange
            exchange.listener = shadow.look
        else:
            shadow.task = self.mirror.gateway.spawn(self._connect(shadow, target, lines, body))
        if self._ticker is None:
            self._ticker = self.mirror.loop.call_later(TICK_S, self._tick)

    def _lines(self, head: RequestHead) -> bytes:
        """A client's headers for this target; worked out once for requests that share them."""
        memory = head.shadow_lines
        if memory is None:
            head.shadow_lines = memory = {}
        lines = memory.get(self._serial)
        if lines is None:
            lines = encode_lines(keep_headers(head.forward, self.settings, self.api_key))
            memory[self._serial] = lines
        return lines

    async def _connect(self, shadow: Shadow, target: bytes, lines: bytes, body: bytes) -> None:
        try:
            exchange = await self.client.request(b"POST", target, lines, body)
        except ConnectFailed as error:
            shadow.task = None
            log.debug("shadow target %s: %s", self.name, error)
            shadow.end(Outcome.CONNECT_ERROR, "upstream_connect_error", time.monotonic_ns())
        except Exception:  # noqa: BLE001 (never in the way: a defect here is nobody's but the shadow's)
            shadow.task = None
            self.mirror.defect()
            shadow.end(Outcome.UPSTREAM_ERROR, "gateway_internal_error", time.monotonic_ns())
        else:
            shadow.sent(exchange)
            shadow.look()

    def answer_head(self, exchange: Exchange) -> AnswerHead:
        """What the answer's head says; a target repeats itself."""
        head = self._head
        known = exchange.known
        if known is None or known is not head.known:
            self._head = head = AnswerHead(exchange.headers, len(exchange.headers), bytes)
            head.known = known
        return head

    def _tick(self) -> None:
        """End what has run out of time."""
        self._ticker = None
        now_ns = time.monotonic_ns()
        for shadow in list(self.in_flight):
            if now_ns - shadow.start_ns > self._limit_ns:
                shadow.end(Outcome.UPSTREAM_TIMEOUT, "upstream_timeout", now_ns)
        if self.in_flight and self._ticker is None:
            self._ticker = self.mirror.loop.call_later(TICK_S, self._tick)

    # ended ------------------------------------------------------------------------------------------------------------

    def ended(self, shadow: Shadow, outcome: Outcome, now_ns: int) -> None:
        """A shadow is over: judge by it, and send the next."""
        self.in_flight.discard(shadow)
        self.held_bytes -= len(shadow.body)
        self.mirror.gateway.metrics.mirror_ended(outcome)
        was_closed = self.health.is_closed
        if shadow.is_trial:
            self.health.trials -= 1
        if outcome is Outcome.CONNECT_ERROR:
            self.health.connect_failed(now_ns, "no connection")
        elif outcome is Outcome.GATEWAY_CRASH:
            pass  # the worker stops: nothing is said of the target
        elif outcome in (Outcome.UPSTREAM_TIMEOUT, Outcome.TRUNCATED) or (
            outcome is Outcome.UPSTREAM_ERROR and shadow.status != 501
        ):
            self.health.request_failed(now_ns, outcome.value, is_trial=shadow.is_trial, may_eject=True)
        else:
            self.health.answered(now_ns, is_trial=shadow.is_trial)
            self.health.failures = 0
        if was_closed is not self.health.is_closed:
            what = "well again" if self.health.is_closed else f"left alone: {outcome.value}"
            log.warning("shadow target %s: %s", self.name, what)
        if self._queue:
            self._pump_soon()
        elif self.is_retired and not self.in_flight:
            self.client.close()

    def retire(self) -> None:
        """Drop what waits; what is in flight goes on."""
        self.is_retired = True
        for shadow in (*self._queue, *[entry[2] for entry in self._later]):
            self._drop(shadow, "stopping")
        self._queue.clear()
        self._later = []
        self._set_alarm()
        if not self.in_flight:
            self.client.close()

    def stop(self) -> None:
        """End everything."""
        self.retire()
        for shadow in list(self.in_flight):
            shadow.end(Outcome.GATEWAY_CRASH, "gateway_shutdown", time.monotonic_ns())
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        self.client.close()


def _let_others_run() -> None:
    time.sleep(0)


class Mirror:
    """All targets of a worker."""

    def __init__(self, gateway: Gateway, settings: Settings, new_id: Callable[[float], str]) -> None:
        """new_id: a request id for a moment. Raises ConfigError."""
        self.gateway = gateway
        self.new_id = new_id
        self.loop = asyncio.get_running_loop()
        self.targets: list[Target] = []
        self.is_stopping = False
        self.waiting: set[Shadow] = set()
        """Ended, and waiting for their primary or for the comparison."""
        self._retired: list[Target] = []
        self._times_s = (0.0, 0.0)
        """To make a connection, and how long an idle one is kept."""
        self._comparing = 0
        self._comparer: ThreadPoolExecutor | None = None
        self.apply(settings)

    def apply(self, settings: Settings) -> None:
        """Change to other settings. Targets are kept by name and URL, with what waits and is in flight.

        Raises ConfigError; then nothing has changed.
        """
        made = []
        timeouts = settings.timeouts
        times_s = (timeouts.connect_s, timeouts.upstream_idle_s)
        for wanted in settings.mirror.targets:
            files = (wanted.ca_file, wanted.cert_file, wanted.key_file)
            try:
                tls = client_context(*files) if any(files) else None
            except (OSError, ValueError) as error:
                raise ConfigError(f"mirror.targets: {wanted.url}: {error}") from None
            client = HttpClient(wanted.url, connect_timeout_s=times_s[0], idle_s=times_s[1], tls=tls)
            made.append((wanted, client, read_key(wanted)))
        here = {(target.name, target.client.url.text): target for target in self.targets}
        targets = []
        for wanted, client, api_key in made:
            kept = here.pop((wanted.name or client.url.text, client.url.text), None)
            if kept is None:
                targets.append(Target(self, wanted, client, api_key))
                continue
            if client.url.is_tls or times_s != self._times_s:  # the same names, maybe other certificates
                kept.client.close()
                kept.client = client
            kept.use(wanted, api_key)
            targets.append(kept)
        self.targets = targets
        self._times_s = times_s
        self._retired = [each for each in (*self._retired, *here.values()) if each.in_flight]
        for gone in here.values():
            gone.retire()

    def offer(self, request: Request, body: bytes, *, is_upload: bool) -> None:
        """A request is sent for the first time: draw it, for each target."""
        if request.method != b"POST" or request.family is Family.OTHER:
            return
        try:
            for target in self.targets:
                target.offer(request, body, is_upload=is_upload)
        except Exception:  # noqa: BLE001 (never in the way: a defect here must not refuse a request)
            self.defect()

    def compare(self, shadow: Shadow, a: bytes, b: bytes) -> None:
        """Compare two outputs in a thread of its own, which gives way every tenth of a millisecond."""
        if self._comparing >= MAX_COMPARING or self.is_stopping:
            shadow.settle(None)
            return
        if self._comparer is None:
            self._comparer = ThreadPoolExecutor(1, "agreement")
        self._comparing += 1
        done = self.loop.run_in_executor(self._comparer, similarity, a, b, _let_others_run)
        done.add_done_callback(functools.partial(self._compared, shadow))

    def _compared(self, shadow: Shadow, done: asyncio.Future[float]) -> None:
        self._comparing -= 1
        if done.cancelled() or done.exception() is not None:
            self.defect()
            shadow.settle(None)
        else:
            shadow.settle(done.result())

    def defect(self) -> None:
        """Something broke that should not: said in the log, and counted."""
        log.exception("a mirrored request ended in a defect of the gateway")
        self.gateway.metrics.accounting_failed()

    async def drain(self) -> None:
        """Drop what waits; give what is in flight a moment."""
        self.is_stopping = True
        for target in self.targets:
            target.retire()
        deadline_s = time.monotonic() + DRAIN_S
        while self.is_busy and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)

    @property
    def is_busy(self) -> bool:
        """Something is in flight, or being compared."""
        return self._comparing > 0 or any(target.in_flight for target in (*self.targets, *self._retired))

    def stop(self) -> None:
        """End everything; every shadow that was sent has its record."""
        self.is_stopping = True
        for target in (*self.targets, *self._retired):
            target.stop()
        for shadow in list(self.waiting):
            shadow.settle(None)
        if self._comparer is not None:
            self._comparer.shutdown(cancel_futures=True)
            self._comparer = None
