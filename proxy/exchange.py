"""One request, from its admission to exactly one outcome.

The order that matters: the request's body is read; its begin goes to the journal; it is sent; every piece of the answer
is accounted for and passed on; and before the piece that makes the answer whole for its client is passed on, the record
goes to the journal. A record is made once, by whoever comes first: the answer's end, a failure, the client's leaving.

No task belongs to a request that finds an idle connection to its upstream: what arrives on either side calls it, and it
does then what can be done. Only making a connection, sending on an upload and asking several upstreams wait in a task.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from proxy.access import Access, RouteRules, access_of
from proxy.answer_head import AnswerHead
from proxy.errors import GatewayError, error_body
from proxy.estimates import Estimates
from proxy.faults import FAULT_STATUSES, Faults
from proxy.logs import FailureLog
from proxy.mirror import Mirror, Shadow
from proxy.prefix import prefix_blocks, prompt_of
from proxy.request_head import LOG_TYPES, RequestHead, clean, countable
from proxy.server import ClientConnection, Incoming
from proxy.sessions import ConversationKeys, SessionTable, conversation_keys, injection_token, response_key
from proxy.settings import Settings, TelemetrySettings
from proxy.shaper import Shaper
from proxy.shaping import Ticket
from proxy.telemetry import WorkerMetrics
from proxy.tracing import Trace, Tracer
from proxy.upload import Upload
from proxy.upstream import Fleet, Selection, Upstream
from proxy.watch import Timers, Watch
from storage.entries import Begun
from storage.journal import JournalWriter, NotRecording, Unrecorded
from storage.key_file import NO_LIMITS, CachedKey
from traces.record import LogType, Origin, Outcome, TokenSource, TraceRecord
from wire import latency
from wire.accounting import Account, Accounted, NoAccount, StreamAccount, UnaryAccount
from wire.http import ConnectFailed, ConnectTimedOut, Exchange
from wire.http1 import BadResponse, Headers
from wire.openai import USAGE_ON_REQUEST, ask_for_usage, family_of, read_form, read_request, with_model
from wire.shapes import NO_FACTS, Family, RequestFacts

log = logging.getLogger("burstgate.gateway")

Journal = JournalWriter | NotRecording | Unrecorded

STREAM_BODY_BYTES = 1024 * 1024
"""A body that is not JSON is sent on as it comes beyond this; JSON is read whole (up to `limits.body`)."""
_WITH_LENGTH = frozenset({b"POST", b"PUT", b"PATCH"})
"""Methods whose empty body has a Content-Length (RFC 9110, section 8.6)."""
_UNSHAPED = frozenset({b"GET", b"HEAD", b"OPTIONS"})
"""Methods that ask nothing of a model."""
_SSE_COMMENT = b": keep-alive\n\n"
_OPERATIONS = {family.value: family.value for family in Family} | {
    "completions": "text_completion", "responses": "chat", "messages": "chat",
}  # fmt: skip
"""OpenTelemetry's words for the families (`gen_ai.operation.name`); where it has none, ours."""
INJECTED_FAULT = "injected_fault"


def uuid7(wall_s: float, draw: Callable[[int], int] = random.getrandbits) -> str:
    """A UUID of version 7 (RFC 9562, section 5.7): 48 bits of milliseconds, 74 random bits."""
    text = (
        f"{int(wall_s * 1000) << 80 | 0x7 << 76 | draw(12) << 64 | 0x2 << 62 | draw(62):032x}"  # version 7, variant 10
    )
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _session_text(session: bytes) -> str:
    """A session of the table, 16 bytes, as the text of a UUID."""
    text = session.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


@functools.lru_cache(maxsize=1024)
def _route(target: bytes) -> tuple[bytes, str, Family, str]:
    """A request target as it goes to the upstream, its decoded path, that path's family, and as it is recorded."""
    if not target.startswith(b"/") and target != b"*":  # absolute form (RFC 9112, section 3.2.2)
        _, _, rest = target.partition(b"://")
        slash = rest.find(b"/")
        question = rest.find(b"?")
        if slash < 0 or 0 <= question < slash:
            target = b"/" + (rest[question:] if question >= 0 else b"")
        else:
            target = rest[slash:]
    path = unquote_to_bytes(target.partition(b"?")[0]).decode("utf-8", "replace")
    return target, path, family_of(path), clean(path[:200]) or ""


class Gateway:
    """The data plane of one worker."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        journal: Journal,
        metrics: WorkerMetrics,
        sessions: SessionTable,
        secret: bytes,
        key_secret: bytes | None = None,
        keys: Sequence[CachedKey] | None = None,
    ) -> None:
        """key_secret: under which keys are hashed, `secret` by default. keys: those that are valid."""
        self.fleet = fleet
        self.journal = journal
        self.metrics = metrics
        self.sessions = sessions
        self.secret = secret
        self._key_secret = key_secret or secret
        self._keys = keys
        self.keys_used: set[str] = set()
        """Ids of keys, until somebody takes note of them."""
        self.estimates = Estimates()
        self.injection_token = injection_token(secret)
        self.faults: Faults | None = None
        """What an active fault run asks for; None nearly always."""
        self.last_answer = AnswerHead([], 0, bytes)
        """Of the last answer: an upstream repeats itself."""
        self.connections: set[ClientConnection] = set()
        self.is_stopping = False
        """Connections end with what they have now."""
        self.watch = Watch(self.connections)
        self.mirror: Mirror | None = None
        """None without shadow targets; `any_mirror` is one whose targets may be gone."""
        self.any_mirror: Mirror | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.tracer: Tracer | None = None
        """None: no request has a span."""
        self.failure_log: FailureLog | None = None
        self._telemetry = TelemetrySettings()
        self._exporting: Any = None
        self.shaping = Shaper(settings, lambda: self.metrics)
        self.shaper: Shaper | None = None
        """The same where there is something to shape; else requests are not asked about."""
        self.shapes_all = False
        """There is more to it than the limits of keys."""
        self._use(settings)
        self._use_mirror(settings)

    def _use(self, settings: Settings) -> None:
        if settings.telemetry != self._telemetry:
            self._trace(settings)
        if settings.log.has_failures:
            self.failure_log = FailureLog(settings.log.failures_per_s)
        else:
            self.failure_log = None
        self.settings = settings
        self.name = settings.gateway
        self.session_header = settings.sessions.header.encode()
        self.log_type_header = settings.sessions.log_type_header.encode()
        self.default_log_type = LOG_TYPES.get(settings.sessions.log_type)
        self.infers_sessions = settings.sessions.infer
        self.body_limit = int(settings.limits.body)
        self.head_limit = int(settings.limits.headers)
        self.shows_overhead = settings.response_headers.overhead
        self.shows_upstream = settings.response_headers.upstream
        self.keeps_prefixes = settings.record.prefix_blocks
        self.retry_statuses = frozenset(settings.retry.statuses)
        self.watch.timers = Timers.of(settings.timeouts)
        self.shapes_all = settings.shaping.is_on
        self.tenant_header = settings.shaping.tenant_header.encode() if settings.shaping.tenant_header else b""
        self.is_tls = settings.tls.cert_file is not None
        routes = settings.routes
        rules = RouteRules(deny_management=routes.deny_management, allow=routes.allow, deny=routes.deny)
        self.refuses = functools.lru_cache(maxsize=1024)(rules.refuses)
        self.take_keys(self._keys)

    def _trace(self, settings: Settings) -> None:
        """Give requests spans, or others, or none any more. Raises ConfigError; then nothing has changed."""
        tracer = exporting = None
        if settings.telemetry.otlp_endpoint is not None:
            from proxy.otel import SpanExporting

            tracer = Tracer(settings.telemetry.traces_sample, self._current_metrics)
            exporting = SpanExporting(settings, tracer)
            exporting.start()
        if self._exporting is not None:
            self._exporting.stop()
        self.tracer, self._exporting, self._telemetry = tracer, exporting, settings.telemetry

    def _current_metrics(self) -> WorkerMetrics:
        return self.metrics

    def end_telemetry(self) -> None:
        """Send what has not gone to the collector yet; waits for it, but not for long."""
        if self._exporting is not None:
            self._exporting.stop()
            self._exporting.join()

    def _use_mirror(self, settings: Settings) -> None:
        """Raises ConfigError; then nothing has changed."""
        if self.any_mirror is not None:
            self.any_mirror.apply(settings)
        elif settings.mirror.targets:
            self.any_mirror = Mirror(self, settings, uuid7)
        self.mirror = self.any_mirror if settings.mirror.targets else None

    def take_keys(self, keys: Sequence[CachedKey] | None) -> None:
        """Other keys are valid from now on."""
        self._keys = keys
        self.access = access_of(keys, self._key_secret, required=self.settings.keys.required)
        self.shaping.take_keys(keys or ())
        self.shaper = self.shaping if self.shapes_all or self.shaping.has_limited_keys else None

    def apply(self, settings: Settings) -> None:
        """Take over a reloaded configuration; requests that run keep what they have been told."""
        self._use_mirror(settings)
        self._use(settings)
        self.fleet.apply(settings)
        self.shaping.apply(settings)
        for connection in self.connections:
            connection.forget_head()

    def read_head(self, headers: Headers) -> RequestHead:
        """What a request's headers say."""
        return RequestHead(headers, self.session_header, self.log_type_header, self.tenant_header, self.injection_token)

    def incoming(self, connection: ClientConnection, method: bytes, target: bytes, head: RequestHead) -> Request:
        """A request begins."""
        return Request(self, connection, method, target, head)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task for a request; it ends with the request, which cancels it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def stop(self) -> None:
        """End what still runs: the worker has waited long enough."""
        for request in self.watch.requests():
            request.stopped()
        if self.any_mirror is not None:
            self.any_mirror.stop()
        for connection in list(self.connections):
            connection.transport.abort()


class Request(Incoming):
    """The state of one request."""

    __slots__ = ("_body", "_comment_ns", "_has_sent", "_is_event_stream", "_is_prepared", "_is_sized", "_lines",
                 "_parts", "_ready_ns", "_size", "_task", "_upload", "account", "answered", "begun", "body_bytes",
                 "client_gone", "endpoint", "error", "exchange", "facts", "family", "fault", "gateway", "granted",
                 "is_over", "is_recorded", "keys", "log_type", "model", "path", "prefix", "received_at", "request_id",
                 "selection", "sends_usage", "session", "shadows", "shown_id", "start_ns", "status", "tenant", "ticket",
                 "timed_out", "trace", "upstream")  # fmt: skip

    def __init__(
        self, gateway: Gateway, connection: ClientConnection, method: bytes, target: bytes, head: RequestHead
    ) -> None:
        self.connection = connection
        self.method = method
        self.head = head
        self.content_length = None
        self.is_whole = False
        self.trailers = None
        self.gateway = gateway
        self.received_at = time.time()
        self.start_ns = time.monotonic_ns()
        self.request_id = uuid7(self.received_at)
        self.shown_id = head.request_id or self.request_id.encode()
        self.target, self.path, self.family, self.endpoint = _route(target)
        self.facts: RequestFacts = NO_FACTS
        self.model: str | None = None
        """As asked for, fit for a record."""
        self.session: str | None = head.session
        self.tenant: str | None = None
        """Whom it is accounted to."""
        self.ticket: Ticket | None = None
        """Its way through shaping; None where it is not shaped."""
        self.granted: CachedKey | None = None
        """The client's key, where it has shown one of ours."""
        self.keys: ConversationKeys | None = None
        self.prefix: tuple[int, ...] | None = None
        self.log_type = LogType.API
        self.begun: bool | None = None
        """The record's begin is in the journal; False when it was dropped, None when it has not come to that."""
        self.is_recorded = False
        self.is_over = False
        self.answered = False
        """The answer's head has gone to the client, or must."""
        self.client_gone = False
        self.timed_out: str | None = None
        self.error: GatewayError | None = None
        self.fault: str | None = None
        """The injected one, once it has been drawn."""
        self.exchange: Exchange | None = None
        self.selection: Selection | None = None
        self.upstream: Upstream | None = None
        self.body_bytes = 0
        self.status: int | None = None
        self.trace: Trace | None = None
        """Of a request that gets a span."""
        self.sends_usage = False
        self.shadows: list[Shadow] | None = None
        """Those that wait for the answer's text."""
        self.account: Account = _NO_ACCOUNT
        self._parts: list[bytes] = []
        self._size = 0
        self._body = b""
        self._upload: Upload | None = None
        self._task: asyncio.Task[None] | None = None
        """Makes a connection, or sends the upload; None else."""
        self._ready_ns = 0
        """When it was first ready to be sent."""
        self._comment_ns = 0
        """When the client last got a comment."""
        self._is_prepared = False
        """The answer's head has been read, and `_lines` are its headers for the client."""
        self._is_event_stream = False
        self._is_sized = False
        self._has_sent = False
        """Something of the answer's body has gone to the client."""
        self._lines = b""
        gateway.metrics.started()

    # what the connection says -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Its turn has come."""
        gateway = self.gateway
        gateway.watch.add(self)
        if gateway.tracer is not None:
            self.trace = gateway.tracer.start(self.head)
        if gateway.refuses(self.target):
            gateway.metrics.route_refused()
            self._refuse(GatewayError(403, "route_not_allowed", "this route is not for clients (routes)"))
        elif gateway.access is not None and not self._is_granted(gateway.access):
            return
        elif (self.content_length or 0) > self.gateway.body_limit or self._size > self.gateway.body_limit:
            self._refuse(self._too_large())
        elif self.is_whole:
            self._whole()
        elif self.head.expects_continue and not self._size and not self.is_http_10:
            self.connection.ask_for_body()

    def _is_granted(self, access: Access) -> bool:
        """Whether its key is good, or it needs none."""
        found = access.check(self.head, self.received_at)
        if isinstance(found, GatewayError):
            self.gateway.metrics.key_refused()
            self._refuse(found)
            return False
        if found is not None:
            self.granted = found
            self.tenant = found.tenant
            self.gateway.keys_used.add(found.key_id)
        return True

    def received(self, data: bytes) -> None:
        """A piece of the body."""
        if self.is_over or self.answered:
            return
        self._size += len(data)
        if self._upload is not None:
            if self._size > self.gateway.body_limit:
                self._refuse(self._too_large())
            else:
                self._upload.push(data)
            return
        if self._size > self.gateway.body_limit:
            if self.connection.current is self:
                self._refuse(self._too_large())
            return
        self._parts.append(data)
        if self._size > STREAM_BODY_BYTES and self.connection.current is self:
            content_type = self.head.content_type
            if content_type and b"json" not in content_type:
                self._begin_upload()

    def received_all(self) -> None:
        """The body is whole."""
        if self._upload is not None:
            self._upload.end()
        elif self.connection.current is self and not self.is_over:
            self._whole()

    def broken(self, error: GatewayError) -> None:
        """The rest of the body can not be read."""
        if not self.is_over:
            self._refuse(error)

    def writable(self) -> None:
        """The client has read on."""
        self._on_upstream()

    def left(self) -> None:
        """The client has gone: abort the upstream."""
        if not self.is_over:
            self.client_gone = True
            self._finish(Outcome.CLIENT_GONE)
            self._over()

    def stopped(self) -> None:
        """The worker is being stopped, and has waited long enough."""
        if not self.is_over:
            self.error = self.error or GatewayError(503, "gateway_shutdown", "the gateway was stopped")
            self._finish(Outcome.GATEWAY_CRASH)
            self._over()
            self.connection.cut()

    def _too_large(self) -> GatewayError:
        return GatewayError(
            413, "request_too_large", f"request body over {self.gateway.body_limit} bytes (limits.body)"
        )

    # what the watch says ----------------------------------------------------------------------------------------------

    def check_timers(self, now_ns: int, timers: Timers) -> None:
        """End the exchange when one of the timers has run out; comfort a client that waits for its stream."""
        if self.is_over or (self.answered and self.connection.is_blocked):
            return  # waiting for a slow client is no fault of the upstream's
        exchange = self.exchange
        rule = None
        if timers.total_ns and now_ns - self.start_ns > timers.total_ns:
            rule = f"not complete within {timers.total_ns / 1e9:g} s (timeouts.total_s)"
        elif exchange is None:
            return
        elif not exchange.first_byte_ns or not (self.answered or exchange.has_body):
            if timers.first_byte_ns and now_ns - exchange.sent_ns > timers.first_byte_ns:
                rule = f"no first byte within {timers.first_byte_ns / 1e9:g} s (timeouts.first_byte_s)"
        elif timers.chunk_ns and now_ns - exchange.received_ns > timers.chunk_ns:
            rule = f"silent for {timers.chunk_ns / 1e9:g} s (timeouts.chunk_s)"
        if rule is not None:
            self._time_out(rule)
        elif timers.comment_ns and self._is_event_stream and exchange is not None and not exchange.has_body:
            self._comment(now_ns, timers.comment_ns)

    def _time_out(self, rule: str) -> None:
        self.timed_out = rule
        if self.selection is not None and self.exchange is not None:
            self.selection.failed(rule) if not self.answered else self.selection.broke_off()
        name = self.upstream.name if self.upstream is not None else "upstream"
        error = GatewayError(504, "upstream_timeout", f"{name}: {rule}")
        if self.answered:
            self._break_off(b"", error, Outcome.UPSTREAM_TIMEOUT)
        else:
            self._refuse(error)

    def _comment(self, now_ns: int, comment_ns: int) -> None:
        """Every so often, while a stream's first event is awaited. From the first on, an error comes too late."""
        exchange = self.exchange
        if exchange is None or self._has_sent or now_ns - (self._comment_ns or exchange.sent_ns) < comment_ns:
            return
        self._comment_ns = now_ns
        if not self.answered:
            self._begin_answer(exchange)
        self.connection.write(_SSE_COMMENT)

    # the request ------------------------------------------------------------------------------------------------------

    def _whole(self) -> None:
        """The body is whole: admit the request and send it."""
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        self._parts = []
        if len(body) > self.gateway.body_limit:
            self._refuse(self._too_large())
            return
        try:
            self._admit(body)
            if self.gateway.faults is not None and self._fail_on_purpose(self.gateway.faults, body):
                return
            if self.method == b"GET" and self.path == "/v1/models" and not self.gateway.fleet.is_plain:
                self._task = self.gateway.spawn(self._list_models())
            else:
                self._body = body
                if self.gateway.shaper is None or self._may_go(self.gateway.shaper):
                    self._forward()
        except Exception:  # noqa: BLE001 (the last line of defence: one request's defect is not the worker's end)
            self._defect()

    def _fail_on_purpose(self, faults: Faults, body: bytes) -> bool:
        """Draw a fault; whether the request goes no further for now."""
        if self.head.origin is Origin.INJECTED:
            return False
        self.fault = fault = faults.draw(self.model, self.tenant, self.log_type)
        if fault is None:
            return False
        self.gateway.metrics.fault()
        if fault == "stall":
            self._body = body
            self._task = self.gateway.spawn(self._stall(faults.stall_s))
            return True
        if fault == "truncate":  # see `_relay`
            return False
        self.error = error = GatewayError(FAULT_STATUSES.get(fault, 502), INJECTED_FAULT, f"injected fault: {fault}")
        if fault == "reset":
            self._finish(Outcome.UPSTREAM_ERROR)
            self._over()
            self.connection.reset()
            return True
        self.status = error.status
        self._finish(Outcome.REJECTED if error.status == 429 else Outcome.UPSTREAM_ERROR)
        self._answer(error.status, error_body(error))
        return True

    async def _stall(self, stall_s: float) -> None:
        await asyncio.sleep(stall_s)
        self._task = None
        try:
            self._forward()
        except Exception:  # noqa: BLE001 (see `_whole`)
            self._defect()

    def _begin_upload(self) -> None:
        try:
            self.facts = read_form(b"".join(self._parts))
            self._upload = Upload(self.connection, self._parts)
            self._parts = []
            self._admit(b"")
            if self.gateway.shaper is None or self._may_go(self.gateway.shaper):
                self._forward()
        except Exception:  # noqa: BLE001 (see `_whole`)
            self._defect()

    def _defect(self) -> None:
        log.exception("a request ended in a defect of the gateway")
        if not self.is_over:
            self._refuse(GatewayError(500, "gateway_internal_error", "the gateway failed; see its log"))

    def _admit(self, body: bytes) -> None:
        """Read what the request says, and begin its record."""
        if body:
            self.body_bytes = len(body)
            try:
                is_form = b"multipart/form-data" in self.head.content_type
                self.facts = read_form(body[:65536]) if is_form else read_request(body)
                if self.gateway.keeps_prefixes or self.gateway.fleet.needs_prefix:
                    self.prefix = prefix_blocks(prompt_of(body), self.gateway.secret)
            except Exception:  # noqa: BLE001 (never in the way: a defect in reading must not refuse a request)
                self._accounting_failed()
        self.model = clean(self.facts.model)
        if self.tenant is None:
            self.tenant = self.head.tenant
        self._find_session()
        self._begin()

    def _find_session(self) -> None:
        gateway = self.gateway
        facts = self.facts
        session = self.session or clean(facts.session_id)
        if session is None and gateway.infers_sessions:
            session = self._infer_session(gateway.sessions)
        self.session = session
        log_type = self.head.log_type or (self.granted.log_type if self.granted is not None else None)
        log_type = log_type or gateway.default_log_type
        self.log_type = log_type or (LogType.API if session is None else LogType.CONVERSATION)

    def _infer_session(self, table: SessionTable) -> str | None:
        key = None
        if self.family is Family.CHAT and self.facts.messages and self.facts.choices == 1:
            self.keys = conversation_keys(self.facts.messages, self.gateway.secret)
            key = self.keys.earlier if self.keys is not None else None
        elif self.family is Family.RESPONSES and self.facts.previous_response_id is not None:
            key = response_key(self.facts.previous_response_id, self.gateway.secret)
        found = table.get(key) if key is not None else None
        return None if found is None else _session_text(found)

    def _remember(self, done: Accounted) -> None:
        """Keep the keys under which the next turn of this conversation will be recognised."""
        if not self.gateway.infers_sessions:
            return
        table = self.gateway.sessions
        session = self.session or self.request_id
        if self.keys is not None and done.answer is not None:
            key = self.keys.after(done.answer)
        elif self.family is Family.RESPONSES and done.response_id is not None:
            key = response_key(done.response_id, self.gateway.secret)
        else:
            return
        try:
            value = bytes.fromhex(session.replace("-", ""))
        except ValueError:
            return
        if len(value) == 16 and _session_text(value) == session:  # another spelling could not be given back
            table.put(key, value)

    def _begin(self) -> None:
        head = self.head
        try:
            self.begun = self.gateway.journal.begin(
                Begun(
                    self.request_id,
                    self.received_at,
                    self.session,
                    self.model,
                    self.log_type,
                    head.client_request_id,
                    self.endpoint,
                    self.facts.stream,
                    countable(self.facts.max_tokens),
                    head.origin,
                    head.run_id,
                    self.tenant,
                )
            )
        except Exception:  # noqa: BLE001 (never in the way: a defect in recording must not refuse a request)
            self.begun = False
            self._accounting_failed()

    # shaping ----------------------------------------------------------------------------------------------------------

    def _may_go(self, shaper: Shaper) -> bool:
        """Ask the shaper. False when it holds the request, or has refused it."""
        granted = self.granted
        key_id = granted.key_id if granted is not None and granted.limits != NO_LIMITS else None
        if self.method in _UNSHAPED or (key_id is None and not self.gateway.shapes_all):
            return True
        try:
            facts = self.facts
            prompt = self.gateway.estimates.request_tokens(self.model, self.body_bytes)
            self.ticket = ticket = Ticket(
                time.monotonic_ns(),
                shaper.estimate(prompt, facts.max_tokens, facts.choices),
                model=self.model,
                tenant=self.tenant,
                session=self.session,
                log_type=self.log_type,
                origin=self.head.origin,
                key_id=key_id,
                owner=self,
            )
            may_go = shaper.enter(ticket)
        except Exception:  # noqa: BLE001 (never in the way: a defect in shaping must not refuse a request)
            self._accounting_failed()
            return not self.is_over and self.exchange is None and self.selection is None
        if ticket.refusal is not None and not self.is_over:
            self.shaped()
        return may_go

    def shaped(self) -> None:
        """The shaper, which held the request, lets it go, or refuses it."""
        ticket = self.ticket
        if self.is_over or ticket is None:
            return
        try:
            if ticket.refusal is None:
                self._forward()
            else:
                error = GatewayError(429, "rate_limit_exceeded", ticket.refusal, retry_after_s=ticket.retry_after_s)
                self._refuse(error)
        except Exception:  # noqa: BLE001 (see `_whole`)
            self._defect()

    # to the upstream --------------------------------------------------------------------------------------------------

    def _forward(self) -> None:
        """Send it to the next upstream that may take it."""
        selection = self.selection
        if selection is None:
            self.selection = selection = self.gateway.fleet.select(
                model=self.facts.model, session=self.session, prefix=self.prefix or ()
            )
        upstream = selection.pick()
        if upstream is None:
            self._refuse(self.error or GatewayError(502, "upstream_connect_error", selection.problem))
            return
        self.upstream = upstream
        if selection.attempts > 1:
            self.gateway.metrics.retried()
        if not self._ready_ns:
            self._ready_ns = time.monotonic_ns()
            if self.gateway.mirror is not None:
                self.gateway.mirror.offer(self, self._body, is_upload=self._upload is not None)
        upload = self._upload
        body = self._body
        if upload is None and self.trailers is None:
            if selection.model is not None:
                body = with_model(body, selection.model) or body
            if self.facts.stream and not self.facts.asks_usage and self.family in USAGE_ON_REQUEST:
                asking = ask_for_usage(body, self.facts)
                if asking is not None:
                    body = asking
                    self.sends_usage = True
            lines = b"%bx-request-id: %b\r\n" % (self._lines_for(upstream), self.shown_id)
            if body or self.content_length is not None or self.method in _WITH_LENGTH:
                lines += b"content-length: %d\r\n" % len(body)
            exchange = upstream.client.start(self.method, self.target, lines, body)
            if exchange is not None:
                exchange.listener = self._on_upstream
                self.exchange = exchange
                return
            self._task = self.gateway.spawn(self._connect(upstream, lines, body))
        else:
            self._task = self.gateway.spawn(self._send_upload(upstream, upload or Upload(self.connection, [body])))

    def _lines_for(self, upstream: Upstream) -> bytes:
        """The client's headers for an upstream. A key of ours is none of its business, and its own is not ours."""
        if upstream.credential:
            lines = self.head.bare_lines + upstream.credential
        else:
            lines = self.head.lines if self.granted is None else self.head.bare_lines
        if self.trace is None:
            return lines
        return self.trace.sends(self.head, lines, upstream.name, upstream.client.url, time.monotonic_ns())

    async def _connect(self, upstream: Upstream, lines: bytes, body: bytes) -> None:
        """As `_forward`, where a connection must be made first."""
        try:
            exchange = await upstream.client.request(self.method, self.target, lines, body)
        except ConnectFailed as error:
            self._connect_failed(error)
        except Exception:  # noqa: BLE001 (see `_whole`)
            self._defect()
        else:
            self._sent(exchange)

    async def _send_upload(self, upstream: Upstream, upload: Upload) -> None:
        """Send a body that is still arriving, or one with trailers."""
        if self._upload is None:
            upload.end()
        lines = b"%bx-request-id: %b\r\n" % (self._lines_for(upstream), self.shown_id)
        is_chunked = self.content_length is None
        if not is_chunked:
            lines += b"content-length: %d\r\n" % (self.content_length or 0)
        try:
            exchange = await upstream.client.request(
                self.method, self.target, lines, upload, chunked=is_chunked, trailers=lambda: self.trailers or []
            )
        except ConnectFailed as error:
            self._connect_failed(error)
        except Exception:  # noqa: BLE001 (see `_whole`)
            self._defect()
        else:
            self._sent(exchange)

    def _connect_failed(self, error: ConnectFailed) -> None:
        self._task = None
        problem = f"{error} (timeouts.connect_s)" if isinstance(error, ConnectTimedOut) else str(error)
        if self.selection is not None and not self.is_over:
            if self.trace is not None:
                self.trace.failed("upstream_connect_error", time.monotonic_ns())
            self.selection.connect_failed(problem)
            self._forward()

    def _sent(self, exchange: Exchange) -> None:
        self._task = None
        self.exchange = exchange
        if self.is_over:
            exchange.abort()
            return
        exchange.listener = self._on_upstream
        self._on_upstream()

    async def _list_models(self) -> None:
        """The models of all upstreams as one list."""
        try:
            body = await self.gateway.fleet.models(self.head.forward if self.granted is None else self.head.bare)
        except Exception:  # noqa: BLE001 (see `_whole`)
            self._task = None
            self._defect()
            return
        self._task = None
        if body is None:
            self._refuse(GatewayError(502, "upstream_connect_error", "no upstream listed its models"))
        else:
            self.status = 200
            self._finish(Outcome.OK)
            self._answer(200, body)

    # the answer -------------------------------------------------------------------------------------------------------

    def _on_upstream(self) -> None:
        """Something has come from the upstream, or the client has read on: do what can be done now."""
        exchange = self.exchange
        if exchange is None or self.is_over:
            return
        try:
            if not self.answered and not self._may_answer(exchange):
                return
            if not self.connection.is_blocked:
                self._relay(exchange)
        except Exception:  # noqa: BLE001 (see `_whole`)
            self._defect()

    def _on_piece(self) -> None:
        """As `_on_upstream`, once the answer has begun: the way of every event of a stream."""
        exchange = self.exchange
        if exchange is None or exchange.is_complete or exchange.error is not None or self.connection.is_blocked:
            self._on_upstream()
            return
        try:
            data = exchange.take()
            account = self.account
            data = account.feed(exchange.received_ns, data)
            if data:
                if account.terminal:
                    self._finish(self._outcome())
                self.connection.write(data)
        except Exception:  # noqa: BLE001 (never in the way: a defect in accounting must not break an answer)
            self._accounting_failed()
            self.connection.write(data)

    def _may_answer(self, exchange: Exchange) -> bool:
        """Begin the answer, unless it must wait, is another upstream's to give, or will be an error."""
        if exchange.interim:
            for status, headers in exchange.interim:
                self.connection.interim(status, headers)
            exchange.interim.clear()
        if exchange.has_head and not self._is_prepared:
            if exchange.status in self.gateway.retry_statuses and self._goes_elsewhere(f"status {exchange.status}"):
                return False
            self._prepare(exchange)
        # vLLM sends a stream's head at once and its first event after the prefill. Until then nothing has been promised
        # to the client, and an upstream that fails or stays silent is still an error that it can read.
        if exchange.has_head and (not self._is_event_stream or exchange.has_body):
            self._begin_answer(exchange)
            return True
        if exchange.error is not None:
            self._failed(exchange.error)
        return False

    def _goes_elsewhere(self, problem: str) -> bool:
        """Whether another upstream is asked instead of passing on this one's failure."""
        selection = self.selection
        if selection is None:
            return False
        selection.failed(problem)
        if self._upload is not None or self.trailers is not None or not selection.may_retry():
            return False
        exchange, self.exchange = self.exchange, None
        if self.trace is not None:
            kind = str(exchange.status) if exchange is not None and exchange.has_head else "upstream_disconnected"
            self.trace.failed(kind, time.monotonic_ns())
        if exchange is not None:
            exchange.listener = None
            exchange.abort()
        self._is_prepared = self._is_event_stream = self.sends_usage = False
        self._forward()
        return True

    def _failed(self, error: Exception) -> None:
        """No answer has come, and none will."""
        if isinstance(error, ConnectFailed):  # the retry on a fresh connection found nobody
            self.exchange = None
            self._connect_failed(error)
            return
        name = self.upstream.name if self.upstream is not None else "upstream"
        if isinstance(error, BadResponse):
            self.error = GatewayError(502, "upstream_protocol_error", f"{name}: not an HTTP response: {error}")
        else:
            text = f"{name}: connection ended before a response: {error}"
            self.error = GatewayError(502, "upstream_disconnected", text)
        if not self._goes_elsewhere(str(error)):
            self._refuse(self.error)

    def _prepare(self, exchange: Exchange) -> None:
        """Read the answer's head: what goes to the client, and how the answer is accounted for."""
        gateway = self.gateway
        head = gateway.last_answer
        known = exchange.known
        if known is not None and known is head.known:
            length: bytes | None = exchange.headers[known.place][1]
        else:
            length = None
            place = 0
            headers: Headers = []
            for header in exchange.headers:
                if len(header[0]) == 14 and header[0].lower() == b"content-length":
                    length = header[1]
                    place = len(headers)
                else:
                    headers.append(header)
            if headers != head.headers or place != head.place or head.has_location:
                gateway.last_answer = head = AnswerHead(headers, place, self._own_location)
            head.known = None if head.has_location else known
        self._is_prepared = True
        self._is_event_stream = head.is_event_stream
        if length is not None and not (head.is_event_stream and self.sends_usage):  # which changes the length
            self._is_sized = True
            self._lines = b"%bcontent-length: %b\r\n%b" % (head.lines, length, head.more_lines)
        else:
            self._lines = head.lines + head.more_lines
        self.account = self._new_account(exchange.status, head)

    def _begin_answer(self, exchange: Exchange) -> None:
        self.answered = True
        self.status = exchange.status
        self.error = None
        if self.selection is not None:
            self.selection.answered(exchange.status)
        self.connection.begin(exchange.status, self._lines + self._own_lines(exchange), is_sized=self._is_sized)

    def _own_lines(self, exchange: Exchange | None) -> bytes:
        """The gateway's own headers."""
        gateway = self.gateway
        lines = b"x-request-id: %b\r\n" % self.shown_id
        if gateway.shows_upstream and self.upstream is not None:
            lines += self.upstream.header
        if gateway.shows_overhead:
            now_ns = time.monotonic_ns()
            own_ns = (self._ready_ns or now_ns) - self.start_ns
            if self.ticket is not None:
                own_ns -= max(0, self.ticket.left_ns - self.ticket.arrived_ns)
            if exchange is not None and exchange.has_body:  # without one, a comment begins the answer
                own_ns += now_ns - exchange.received_ns
            lines += b"x-burstgate-overhead-ms: %.3f\r\n" % (own_ns / 1e6)
        return lines

    def _relay(self, exchange: Exchange) -> None:
        """Pass on what has arrived, accounting for it."""
        data = exchange.take()
        if data:
            data = self._fed(exchange, data)
            if self.fault == "truncate":
                part = data[: max(1, len(data) // 2)] if exchange.is_complete else data
                error = GatewayError(502, INJECTED_FAULT, "injected fault: truncate")
                self._break_off(part, error, Outcome.TRUNCATED)
                return
        if exchange.is_complete:
            rest = self._ended(exchange)
            self._finish(self._outcome())
            self._over()
            self.connection.end(data + rest if rest else data, exchange.trailers)
        elif exchange.error is not None:
            text = str(exchange.error)
            if self.selection is not None:
                self.selection.broke_off()
            self._break_off(data, GatewayError(502, "upstream_disconnected", text), Outcome.TRUNCATED)
        elif data:
            if self.account.terminal:
                self._finish(self._outcome())
            self._has_sent = True
            self.connection.write(data)
            exchange.listener = self._on_piece
        elif self._is_sized:
            self.connection.flush()

    def _break_off(self, data: bytes, error: GatewayError, outcome: Outcome) -> None:
        """The answer stays unfinished, and the client's connection is cut so that it sees that."""
        if self.exchange is not None:
            data += self._ended(self.exchange)
        self.error = error
        self._finish(outcome)
        self._over()
        if data:
            self.connection.write(data)
        self.connection.cut()

    def _refuse(self, error: GatewayError) -> None:
        """Answer with the gateway's own error."""
        outcomes = {
            "upstream_connect_error": Outcome.CONNECT_ERROR,
            "upstream_timeout": Outcome.UPSTREAM_TIMEOUT,
            "rate_limit_exceeded": Outcome.REJECTED,
        }
        outcome = outcomes.get(error.type, Outcome.UPSTREAM_ERROR if error.status >= 500 else Outcome.INVALID_REQUEST)
        if self.answered:
            self._break_off(b"", error, outcome)
            return
        self.error = error
        self.status = error.status
        self._finish(outcome)
        retry = b"" if error.retry_after_s is None else b"retry-after: %d\r\n" % error.retry_after_s
        self._answer(error.status, error_body(error), retry)

    def _answer(self, status: int, body: bytes, more_lines: bytes = b"") -> None:
        """An answer of the gateway's own, after its record."""
        self.answered = True
        lines = b"content-type: application/json\r\ncontent-length: %d\r\n%b" % (len(body), more_lines)
        lines += self._own_lines(None)
        if status == 401:
            lines += b"www-authenticate: Bearer\r\n"  # RFC 9110, section 11.6.1
        self._over()
        self.connection.begin(status, lines, is_sized=True)
        self.connection.end(b"" if self.method == b"HEAD" else body)

    def _over(self) -> None:
        """Nothing is done for the request any more; the upstream's connection is let go or cut."""
        self.is_over = True
        gateway = self.gateway
        gateway.watch.remove(self)
        if self.selection is not None:
            self.selection.release()
        if self.ticket is not None:
            gateway.shaping.leave(self.ticket)
        exchange = self.exchange
        if exchange is not None:
            exchange.listener = None
            if not exchange.is_complete:
                exchange.abort()
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._upload = None
        self._parts = []
        gateway.metrics.left()

    def _own_location(self, location: bytes) -> bytes:
        """A redirect to the upstream itself, as one to the gateway: else the client's next request would pass it by."""
        if self.upstream is None or self.head.host is None:
            return location
        url = self.upstream.client.url
        there = (b"https://" if url.is_tls else b"http://") + url.authority + url.prefix
        if not location.startswith(there):
            return location
        scheme = b"https" if self.gateway.is_tls else b"http"
        return b"%b://%b%b" % (scheme, self.head.host, location[len(there) :])

    def _new_account(self, status: int, head: AnswerHead) -> Account:
        if head.is_encoded:
            return _NO_ACCOUNT
        keep = self.keys is not None or self.shadows is not None
        if head.is_event_stream:
            if self.family is Family.OTHER:
                return _NO_ACCOUNT
            return StreamAccount(self.family, strip_usage=self.sends_usage, keep_answer=keep)
        if head.is_json and (self.family is not Family.OTHER or status >= 400):
            return UnaryAccount(self.family, keep_answer=keep)
        return _NO_ACCOUNT

    def _fed(self, exchange: Exchange, data: bytes) -> bytes:
        """Account for a piece; whatever breaks there, the bytes pass on."""
        try:
            return self.account.feed(exchange.received_ns, data)
        except Exception:  # noqa: BLE001 (never in the way: a defect in accounting must not break an answer)
            self._accounting_failed()
            return data

    def _ended(self, exchange: Exchange) -> bytes:
        """Account for the end; returns what was still held back."""
        try:
            return self.account.eof(exchange.received_ns)
        except Exception:  # noqa: BLE001 (never in the way: a defect in accounting must not break an answer)
            self._accounting_failed()
            return b""

    def _accounting_failed(self) -> None:
        log.exception("a request or its answer could not be accounted for")
        self.gateway.metrics.accounting_failed()
        self.account = _NO_ACCOUNT

    def _outcome(self) -> Outcome:
        """Of an answer that is whole."""
        if self.client_gone:
            return Outcome.CLIENT_GONE
        status = self.status or 0
        if status < 400:
            return Outcome.OK
        if status == 429:
            return Outcome.REJECTED
        return Outcome.INVALID_REQUEST if status < 500 else Outcome.UPSTREAM_ERROR

    def _finish(self, outcome: Outcome) -> None:
        """Make the request's one record."""
        if self.is_recorded:
            return
        self.is_recorded = True
        try:
            self._conclude(outcome, time.monotonic_ns())
        except Exception:  # noqa: BLE001 (never in the way: a defect in recording must not break an answer)
            self._accounting_failed()
            self._tell_shadows(None)

    def _tell_shadows(self, answer: bytes | None) -> None:
        shadows, self.shadows = self.shadows, None
        for shadow in shadows or ():
            shadow.primary_over(answer)

    def _conclude(self, outcome: Outcome, now_ns: int) -> None:
        try:
            done = self.account.result()
        except Exception:  # noqa: BLE001 (never in the way: a defect in accounting must not break an answer)
            self._accounting_failed()
            done = Accounted()
        if outcome is Outcome.OK and done.error_type is not None and type(self.account) is StreamAccount:
            outcome = Outcome.UPSTREAM_ERROR
        if self.begun is None:
            self._find_session()
            self._begin()
        record = self._record(outcome, done, now_ns)
        if self.begun:
            self.gateway.journal.end(record)
        if self.shadows is not None:
            self._tell_shadows(done.answer if outcome is Outcome.OK else None)
        if outcome is Outcome.OK and self.status is not None and self.status < 300:
            self._remember(done)
            if record.token_source is TokenSource.USAGE and record.request_tokens and self.body_bytes:
                self.gateway.estimates.learn(record.model, self.body_bytes, record.request_tokens)
        sent_ns = self.exchange.sent_ns if self.exchange is not None else 0
        operation = _OPERATIONS[self.family._value_]
        trace = self.trace
        if self.ticket is not None:
            self._settle(self.ticket, outcome, record, now_ns)
        self.gateway.metrics.ended(
            record,
            operation,
            (now_ns - sent_ns) / 1e9 if sent_ns else None,
            trace.trace_hex if trace is not None else None,
        )
        if trace is not None:
            trace.ended(record, self.method, operation, self.start_ns)
        if self.gateway.failure_log is not None and outcome is not Outcome.OK:
            self.gateway.failure_log.ended(record)
        if self.head.origin is Origin.CLIENT and self.fault is None:
            self.gateway.metrics.live_ended(outcome, record.ttft_s)

    def _settle(self, ticket: Ticket, outcome: Outcome, record: TraceRecord, now_ns: int) -> None:
        """Tell the shaper what became of the request."""
        tokens = None
        if record.token_source is not TokenSource.NONE:
            tokens = (record.request_tokens or 0) + (record.response_tokens or 0)
        elif outcome is not Outcome.OK:
            tokens = 0  # nothing was generated for it that anybody has counted
        sent_ns = self.exchange.sent_ns if self.exchange is not None else 0
        whole_s = (now_ns - sent_ns) / 1e9 if sent_ns and outcome is Outcome.OK else None
        dropped = outcome in (Outcome.REJECTED, Outcome.UPSTREAM_TIMEOUT) or self.status == 503
        self.gateway.shaping.ended(ticket, tokens, record.response_tokens, record.ttft_s, whole_s, dropped=dropped)

    def _record(self, outcome: Outcome, done: Accounted, now_ns: int) -> TraceRecord:
        facts = self.facts
        head = self.head
        model = self.model
        usage = done.usage
        request_tokens = usage.request_tokens if usage is not None else None
        cached = usage.cached_tokens if usage is not None else None
        if done.content_chunks and (usage is None or usage.response_tokens is None):
            source = TokenSource.ESTIMATED
            if request_tokens is None:
                request_tokens = self.gateway.estimates.request_tokens(model, self.body_bytes)
        else:
            source = TokenSource.NONE if usage is None else TokenSource.USAGE
        response_tokens = countable(done.response_tokens)
        queue_s: float | None = None
        rule: str | None = None
        kind: str | None = None
        ticket = self.ticket
        if ticket is not None:
            queue_s = ((ticket.left_ns or now_ns) - ticket.arrived_ns) / 1e9
            rule, kind = self.gateway.shaping.rule_of(ticket)
        sent_ns = self.exchange.sent_ns if self.exchange is not None else 0
        return TraceRecord(
            request_id=self.request_id,
            received_at=self.received_at,
            session_id=self.session,
            elapsed_s=(now_ns - self.start_ns) / 1e9,
            model=model,
            request_tokens=countable(request_tokens),
            response_tokens=response_tokens,
            log_type=self.log_type,
            outcome=outcome,
            client_request_id=head.client_request_id,
            served_model=clean(done.served_model),
            status=self.status,
            error_type=clean(done.error_type)
            or (self.error.type if self.error is not None else INJECTED_FAULT if self.fault == "stall" else None),
            ttft_s=latency.ttft_s(sent_ns, done.first_chunk_ns),
            tpot_s=latency.tpot_s(done.first_chunk_ns, done.last_chunk_ns, response_tokens),
            queue_s=queue_s,
            endpoint=self.endpoint,
            stream=facts.stream,
            upstream=self.upstream.name if self.upstream is not None else None,
            attempts=self.selection.attempts if self.selection is not None else 0,
            finish_reason=clean(done.finish_reason),
            cached_tokens=countable(cached),
            max_tokens=countable(facts.max_tokens),
            token_source=source,
            origin=head.origin,
            run_id=head.run_id,
            prefix_blocks=self.prefix if self.gateway.keeps_prefixes else None,
            tenant=self.tenant,
            gateway=self.gateway.name,
            shaping_rule=rule,
            shaping_class=kind,
        )


_NO_ACCOUNT = NoAccount()
