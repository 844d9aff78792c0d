"""One request, from its admission to exactly one outcome.

The order that matters: the request's body is read; its begin goes to the journal; it is sent; every piece of the answer
is accounted for and passed on; and before the piece that makes the answer whole for its client is passed on, the record
goes to the journal. A record is made once, by whoever comes first: the answer's end, a failure, the client's leaving.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from proxy.errors import GatewayError, error_body, error_headers
from proxy.request_head import LOG_TYPES, RequestHead, clean, countable
from proxy.sessions import ConversationKeys, SessionTable, conversation_keys, response_key
from proxy.settings import Settings
from proxy.telemetry import WorkerMetrics
from proxy.upstream import Fleet, Upstream
from proxy.watch import Timers, Watch
from storage.journal import Begun, JournalWriter, Unrecorded
from traces.record import LogType, Outcome, TokenSource, TraceRecord
from wire import latency
from wire.accounting import Account, Accounted, NoAccount, StreamAccount, UnaryAccount
from wire.http import ConnectFailed, ConnectionLost, Exchange
from wire.http1 import BadResponse, Headers
from wire.openai import (
    NO_FACTS,
    USAGE_ON_REQUEST,
    Family,
    RequestFacts,
    ask_for_usage,
    family_of,
    read_form,
    read_request,
)

log = logging.getLogger("burstgate.gateway")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

STREAM_BODY_BYTES = 1024 * 1024
"""A body that is not JSON is sent on as it comes beyond this; JSON is read whole (up to `limits.body`)."""
# RFC 9110, section 7.6.1.
_RESPONSE_HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-connection", b"trailer", b"transfer-encoding", b"upgrade",
    b"x-request-id",
})  # fmt: skip
_VIA = (b"via", b"1.1 burstgate")


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


class ClientGone(Exception):
    """The client left while its request was being read."""


class Gateway:
    """The data plane of one worker: a raw ASGI application."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        journal: JournalWriter | Unrecorded,
        metrics: WorkerMetrics,
        sessions: SessionTable | None,
        secret: bytes,
    ) -> None:
        self.settings = settings
        self.fleet = fleet
        self.journal = journal
        self.metrics = metrics
        self.sessions = sessions
        self.secret = secret
        self.session_header = settings.sessions.header.encode()
        self.log_type_header = settings.sessions.log_type_header.encode()
        self.default_log_type = LOG_TYPES.get(settings.sessions.log_type)
        self.body_limit = int(settings.limits.body)
        self.estimates = Estimates()
        self.watch = Watch(settings.timeouts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        self.metrics.started()
        try:
            await _Request(self, scope, receive, send).run()
        finally:
            self.metrics.left()


class _Request:
    """The state of one request. `run` is its whole life."""

    __slots__ = ("account", "answered", "attempts", "begun", "body_bytes", "client_gone", "error", "exchange", "facts",
                 "family", "gateway", "head", "holds_slot", "is_over", "is_recorded", "keys", "log_type", "path",
                 "receive", "received_at", "request_id", "scope", "send", "sends_usage", "session", "shown_id",
                 "start_ns", "status", "timed_out", "upstream")  # fmt: skip

    def __init__(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
        self.gateway = gateway
        self.scope = scope
        self.receive = receive
        self.send = send
        self.received_at = time.time()
        self.start_ns = time.monotonic_ns()
        self.request_id = uuid7(self.received_at)
        self.head = RequestHead(scope["headers"], gateway.session_header, gateway.log_type_header)
        self.shown_id = self.head.request_id or self.request_id.encode()
        self.path: str = scope["path"]
        self.family = family_of(self.path)
        self.facts: RequestFacts = NO_FACTS
        self.session: str | None = self.head.session
        self.keys: ConversationKeys | None = None
        self.log_type = LogType.API
        self.begun: bool | None = None
        """The record's begin is in the journal; False when it was dropped, None when it has not come to that."""
        self.is_recorded = False
        self.is_over = False
        self.answered = False
        self.client_gone = False
        self.timed_out: str | None = None
        self.error: GatewayError | None = None
        self.exchange: Exchange | None = None
        self.upstream: Upstream | None = None
        self.holds_slot = False
        self.body_bytes = 0
        self.attempts = 0
        self.status: int | None = None
        self.sends_usage = False
        self.account: Account = NoAccount()

    async def run(self) -> None:
        """From the body to the record."""
        try:
            body = await self._read_body()
            self._admit(body)
            await self._forward(body)
        except ClientGone:
            self.client_gone = True
            self._finish(Outcome.CLIENT_GONE)
        except GatewayError as error:
            await self._refuse(error)
        except Exception:
            log.exception("a request ended in a defect of the gateway")
            await self._refuse(GatewayError(500, "gateway_internal_error", "the gateway failed; see its log"))
        finally:
            self.is_over = True
            self.gateway.watch.remove(self)
            if self.exchange is not None:
                self.exchange.abort()
            if not self.is_recorded:  # cancelled: the worker is being stopped and has waited long enough
                self.error = self.error or GatewayError(503, "gateway_shutdown", "the gateway was stopped")
                self._finish(Outcome.CLIENT_GONE if self.client_gone else Outcome.GATEWAY_CRASH)

    def left(self) -> None:
        """The client has left: abort the upstream."""
        if not self.is_over:
            self.client_gone = True
            if self.exchange is not None:
                self.exchange.abort()

    def check_timers(self, now_ns: int, timers: Timers) -> None:
        """Abort the upstream when one of the timers has run out."""
        exchange = self.exchange
        if exchange is None or not exchange.is_waiting or self.timed_out is not None:
            return
        if timers.total_ns and now_ns - self.start_ns > timers.total_ns:
            self.timed_out = f"not complete within {timers.total_ns / 1e9:g} s (timeouts.total_s)"
        elif not self.answered:
            if timers.first_byte_ns and now_ns - exchange.sent_ns > timers.first_byte_ns:
                self.timed_out = f"no first byte within {timers.first_byte_ns / 1e9:g} s (timeouts.first_byte_s)"
        elif timers.chunk_ns and now_ns - exchange.received_ns > timers.chunk_ns:
            self.timed_out = f"silent for {timers.chunk_ns / 1e9:g} s (timeouts.chunk_s)"
        if self.timed_out is not None:
            exchange.abort()

    async def _read_body(self) -> bytes | AsyncIterator[bytes]:
        """The whole body; for a long one that is not JSON, an iterator over it. Raises ClientGone, GatewayError."""
        limit = self.gateway.body_limit
        if (self.head.content_length or 0) > limit:
            raise GatewayError(413, "request_too_large", f"request body over {limit} bytes (limits.body)")
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            return self._within(body, limit)
        parts = [body]
        size = len(body)
        is_json = b"json" in self.head.content_type or not self.head.content_type
        while True:
            if size > limit:
                raise GatewayError(413, "request_too_large", f"request body over {limit} bytes (limits.body)")
            if size > STREAM_BODY_BYTES and not is_json:
                self.facts = read_form(b"".join(parts))
                return self._rest_of_body(parts, size)
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if not message.get("more_body", False):
                return self._within(b"".join(parts), limit)

    @staticmethod
    def _within(body: bytes, limit: int) -> bytes:
        if len(body) > limit:
            raise GatewayError(413, "request_too_large", f"request body over {limit} bytes (limits.body)")
        return body

    async def _rest_of_body(self, parts: list[bytes], size: int) -> AsyncIterator[bytes]:
        for part in parts:
            yield part
        parts.clear()
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > self.gateway.body_limit:
                limit = self.gateway.body_limit
                raise GatewayError(413, "request_too_large", f"request body over {limit} bytes (limits.body)")
            yield part
            if not message.get("more_body", False):
                return

    def _admit(self, body: bytes | AsyncIterator[bytes]) -> None:
        """Read what the request says, and begin its record."""
        if isinstance(body, bytes) and body:
            self.body_bytes = len(body)
            try:
                is_form = b"multipart/form-data" in self.head.content_type
                self.facts = read_form(body[:65536]) if is_form else read_request(body)
            except Exception:  # noqa: BLE001 (never in the way: a defect in reading must not refuse a request)
                self._accounting_failed()
        self._find_session()
        self._begin()

    def _find_session(self) -> None:
        gateway = self.gateway
        facts = self.facts
        session = self.session or clean(facts.session_id)
        if session is None and gateway.sessions is not None:
            session = self._infer_session(gateway.sessions)
        self.session = session
        log_type = self.head.log_type or gateway.default_log_type
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
        table = self.gateway.sessions
        if table is None:
            return
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
                    clean(self.facts.model),
                    self.log_type,
                    None if head.request_id is None else clean(head.request_id.decode("latin-1")),
                    clean(self.path[:200]) or "",
                    self.facts.stream,
                    countable(self.facts.max_tokens),
                    head.origin,
                    head.run_id,
                )
            )
        except Exception:  # noqa: BLE001 (never in the way: a defect in recording must not refuse a request)
            self.begun = False
            self._accounting_failed()

    async def _forward(self, body: bytes | AsyncIterator[bytes]) -> None:
        if isinstance(body, bytes):
            self.gateway.watch.add(self)
            exchange = await self._open(body)
        else:
            exchange = await self._upload(body)
            self.gateway.watch.add(self)  # only now: until here the body's reader has heard of a client that left
        try:
            await exchange.wait_head()
            headers, content_type, encoding = self._response_headers(exchange)
            if content_type.startswith(b"text/event-stream"):
                # vLLM sends a stream's head at once and its first event after the prefill. Until then nothing has been
                # promised to the client, and an upstream that fails or stays silent is still an error it can read.
                while not exchange.has_body:
                    await exchange.wait()
        except (ConnectionLost, BadResponse) as error:
            raise self._upstream_failed(error) from None
        except ConnectFailed as error:  # the retry on a fresh connection found nobody
            raise GatewayError(502, "upstream_connect_error", str(error)) from None
        self.status = exchange.status
        self.account = self._new_account(content_type, encoding)
        await self._relay(exchange, headers)

    async def _upload(self, body: AsyncIterator[bytes]) -> Exchange:
        """As `_open`, in bounded time: until the body is through, the watch's timers have nothing to look at."""
        total_s = self.gateway.settings.timeouts.total_s
        try:
            async with asyncio.timeout(total_s or None):
                return await self._open(body)
        except TimeoutError:
            self.timed_out = f"not complete within {total_s:g} s (timeouts.total_s)"
            raise self._upstream_failed() from None

    async def _open(self, body: bytes | AsyncIterator[bytes]) -> Exchange:
        """Send the request to an upstream; to another one as long as no connection could be made."""
        scope = self.scope
        target: bytes = scope.get("raw_path") or self.path.encode()
        if scope["query_string"]:
            target = b"%b?%b" % (target, scope["query_string"])
        headers = [*self.head.forward, (b"x-request-id", self.shown_id), _VIA]
        method: bytes = scope["method"].encode()
        chunked = False
        if isinstance(body, bytes):
            if self.facts.stream and not self.facts.asks_usage and self.family in USAGE_ON_REQUEST:
                asking = ask_for_usage(body, self.facts)
                if asking is not None:
                    body = asking
                    self.sends_usage = True
            if body or self.head.content_length is not None or method in (b"POST", b"PUT", b"PATCH"):
                headers.append((b"content-length", b"%d" % len(body)))
        elif self.head.content_length is not None:
            headers.append((b"content-length", b"%d" % self.head.content_length))
        else:
            chunked = True
        failed: frozenset[int] = frozenset()
        problem = "no upstream is configured"
        fleet = self.gateway.fleet
        while (index := fleet.pick(failed)) is not None:
            self.upstream = upstream = fleet.upstreams[index]
            self.attempts += 1
            if self.attempts > 1:
                self.gateway.metrics.retried()
            upstream.in_flight += 1
            self.holds_slot = True
            try:
                self.exchange = await upstream.client.request(method, target, headers, body, chunked=chunked)
            except ConnectFailed as error:
                self._release_slot()
                upstream.connect_failed()
                problem = str(error)
                failed |= {index}
            if self.client_gone:
                raise ClientGone
            if self.exchange is not None:
                return self.exchange
        raise GatewayError(502, "upstream_connect_error", problem)

    def _release_slot(self) -> None:
        if self.holds_slot and self.upstream is not None:
            self.holds_slot = False
            self.upstream.in_flight -= 1

    def _upstream_failed(self, error: Exception | None = None) -> Exception:
        """What a failure before the response's head means."""
        if self.client_gone:
            return ClientGone()
        name = self.upstream.name if self.upstream is not None else "upstream"
        if self.timed_out is not None:
            return GatewayError(504, "upstream_timeout", f"{name}: {self.timed_out}")
        if isinstance(error, BadResponse):
            return GatewayError(502, "upstream_protocol_error", f"{name}: not an HTTP response: {error}")
        return GatewayError(502, "upstream_disconnected", f"{name}: connection ended before a response: {error}")

    async def _relay(self, exchange: Exchange, headers: Headers) -> None:
        """Pass the answer on, accounting for it."""
        send = self.send
        self.answered = True
        await send({"type": "http.response.start", "status": exchange.status, "headers": headers})
        while True:
            data = exchange.take()
            is_complete = exchange.is_complete
            if data:
                data = self._fed(data)
            if is_complete:
                data += self._ended()
                self._finish(self._outcome())
                await send({"type": "http.response.body", "body": data, "more_body": False})
                return
            if data:
                if self.account.terminal:
                    self._finish(self._outcome())
                await send({"type": "http.response.body", "body": data, "more_body": True})
            try:
                await exchange.wait()
            except (ConnectionLost, BadResponse) as error:
                await self._broke_off(error)
                return

    async def _broke_off(self, error: Exception) -> None:
        """The answer stays unfinished: returning without its end makes the server cut the client's connection."""
        rest = self._ended()
        if rest and not self.client_gone:
            await self.send({"type": "http.response.body", "body": rest, "more_body": True})
        if self.client_gone:
            self._finish(Outcome.CLIENT_GONE)
        elif self.timed_out is not None:
            self.error = GatewayError(504, "upstream_timeout", self.timed_out)
            self._finish(Outcome.UPSTREAM_TIMEOUT)
        else:
            self.error = GatewayError(502, "upstream_disconnected", str(error))
            self._finish(Outcome.TRUNCATED)

    def _response_headers(self, exchange: Exchange) -> tuple[Headers, bytes, bytes]:
        content_type = encoding = b""
        headers: Headers = []
        named: set[bytes] = set()
        for header in exchange.headers:
            name = header[0].lower()
            if name in _RESPONSE_HOP_BY_HOP:
                if name == b"connection":
                    named.update(token.strip().lower() for token in header[1].split(b","))
                continue
            if name == b"content-type":
                content_type = header[1].lower()
            elif name == b"content-encoding":
                encoding = header[1].lower()
            elif name == b"content-length" and exchange.status in (204, 304):
                continue  # the server would wait for a body
            elif name == b"location":
                header = (header[0], self._own_location(header[1]))
            headers.append(header)
        if self.sends_usage and content_type.startswith(b"text/event-stream"):
            headers = [header for header in headers if header[0].lower() != b"content-length"]
        if named - {b"close", b"keep-alive"}:
            headers = [header for header in headers if header[0].lower() not in named]
        headers.append((b"x-request-id", self.shown_id))
        return headers, content_type, encoding

    def _own_location(self, location: bytes) -> bytes:
        """A redirect to the upstream itself, as one to the gateway: else the client's next request would pass it by."""
        if self.upstream is None or self.head.host is None:
            return location
        url = self.upstream.client.url
        there = (b"https://" if url.is_tls else b"http://") + url.authority + url.prefix
        if not location.startswith(there):
            return location
        return b"%b://%b%b" % (self.scope["scheme"].encode(), self.head.host, location[len(there) :])

    def _new_account(self, content_type: bytes, encoding: bytes) -> Account:
        if encoding not in (b"", b"identity"):
            return NoAccount()
        keep = self.keys is not None
        if content_type.startswith(b"text/event-stream"):
            if self.family is Family.OTHER:
                return NoAccount()
            return StreamAccount(self.family, strip_usage=self.sends_usage, keep_answer=keep)
        if b"json" in content_type and (self.family is not Family.OTHER or (self.status or 0) >= 400):
            return UnaryAccount(self.family, keep_answer=keep)
        return NoAccount()

    def _fed(self, data: bytes) -> bytes:
        """Account for a piece; whatever breaks there, the bytes pass on."""
        try:
            return self.account.feed(self.exchange.received_ns, data) if self.exchange is not None else data
        except Exception:  # noqa: BLE001 (never in the way: a defect in accounting must not break an answer)
            self._accounting_failed()
            return data

    def _ended(self) -> bytes:
        """Account for the end; returns what was still held back."""
        try:
            return self.account.eof(self.exchange.received_ns) if self.exchange is not None else b""
        except Exception:  # noqa: BLE001 (never in the way: a defect in accounting must not break an answer)
            self._accounting_failed()
            return b""

    def _accounting_failed(self) -> None:
        log.exception("a request or its answer could not be accounted for")
        self.gateway.metrics.accounting_failed()
        self.account = NoAccount()

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

    async def _refuse(self, error: GatewayError) -> None:
        """Answer with the gateway's own error."""
        self.error = error
        outcomes = {"upstream_connect_error": Outcome.CONNECT_ERROR, "upstream_timeout": Outcome.UPSTREAM_TIMEOUT}
        outcome = outcomes.get(error.type, Outcome.UPSTREAM_ERROR if error.status >= 500 else Outcome.INVALID_REQUEST)
        body = error_body(error)
        if self.answered:
            self._finish(outcome)
            return
        self.status = error.status
        self.answered = True
        self._finish(outcome)
        headers = error_headers(body, self.shown_id)
        if error.status == 413:
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    def _finish(self, outcome: Outcome) -> None:
        """Make the request's one record."""
        if self.is_recorded:
            return
        self.is_recorded = True
        self._release_slot()
        try:
            self._conclude(outcome, time.monotonic_ns())
        except Exception:  # noqa: BLE001 (never in the way: a defect in recording must not break an answer)
            self._accounting_failed()

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
        if outcome is Outcome.OK and self.status is not None and self.status < 300:
            self._remember(done)
            if record.token_source is TokenSource.USAGE and record.request_tokens and self.body_bytes:
                self.gateway.estimates.learn(record.model, self.body_bytes, record.request_tokens)
        self.gateway.metrics.ended(
            outcome, record.request_tokens, record.response_tokens, record.ttft_s, (now_ns - self.start_ns) / 1e9
        )

    def _record(self, outcome: Outcome, done: Accounted, now_ns: int) -> TraceRecord:
        facts = self.facts
        head = self.head
        model = clean(facts.model)
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
            client_request_id=None if head.request_id is None else clean(head.request_id.decode("latin-1")),
            served_model=clean(done.served_model),
            status=self.status,
            error_type=clean(done.error_type) or (self.error.type if self.error is not None else None),
            ttft_s=latency.ttft_s(sent_ns, done.first_chunk_ns),
            tpot_s=latency.tpot_s(done.first_chunk_ns, done.last_chunk_ns, response_tokens),
            queue_s=None,
            endpoint=clean(self.path[:200]) or "",
            stream=facts.stream,
            upstream=self.upstream.name if self.upstream is not None else None,
            attempts=self.attempts,
            finish_reason=clean(done.finish_reason),
            cached_tokens=countable(cached),
            max_tokens=countable(facts.max_tokens),
            token_source=source,
            origin=head.origin,
            run_id=head.run_id,
            gateway=self.gateway.settings.gateway,
        )


class Estimates:
    """How many tokens a request body has, learned from those whose usage came back.

    Used only where an answer began and no usage arrived. Before anything is learned, 4 bytes count as a token.
    """

    MAX_MODELS = 256

    def __init__(self) -> None:
        self._tokens_per_byte: dict[str | None, float] = {}

    def learn(self, model: str | None, body_bytes: int, request_tokens: int) -> None:
        """One request whose usage is known."""
        ratio = request_tokens / body_bytes
        old = self._tokens_per_byte.get(model)
        if old is not None or len(self._tokens_per_byte) < self.MAX_MODELS:
            self._tokens_per_byte[model] = ratio if old is None else 0.9 * old + 0.1 * ratio

    def request_tokens(self, model: str | None, body_bytes: int) -> int | None:
        """The estimate, at least 1; None for a body that was not read."""
        return max(1, round(body_bytes * self._tokens_per_byte.get(model, 0.25))) if body_bytes else None
