"""A vLLM-like server on a simulated GPU: a raw ASGI application, and uvicorn to run it.

It speaks vLLM 0.32's wire protocol (see `shapes`) with the timing of `engine`, and does on demand what servers should
not (see `faults`). One timer drives all sequences: it fires at the end of a step, hands each token to its request and
starts the next step, on absolute deadlines. A request costs two tasks, uvicorn's own and one that waits for the client
to leave; a token costs no task and no timer.

Every accepted request ends exactly once, as finished when the whole response was handed to the transport, else as
aborted. A client that leaves takes its sequences out of the batch at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from replay.simulator import requests, shapes
from replay.simulator.config import SimulatorConfig as SimulatorConfig
from replay.simulator.engine import Engine, SequenceRequest, Step
from replay.simulator.faults import NO_FAULT, Fault, find_fault
from replay.simulator.metrics import Counters, Stats, exposition
from replay.simulator.requests import ApiError, Body, Generation, Pooling
from replay.simulator.text import Tokenizer

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_BACKLOG = 4096
_MAX_LAG_S = 0.1
"""A step that starts later than this after its deadline drops the deadline: a stalled host must not cause a burst."""
_SHUTDOWN_S = 2
_DRAIN_S = 0.02
_TRANSPORT = "burstgate.transport"

_JSON = b"application/json"
_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"vary", b"Origin")]


class _Exchange:
    """One request's share of the batch: which sequences are its own, and the tokens that it has not sent yet."""

    __slots__ = (
        "admitted_s",
        "arrived_s",
        "cached",
        "ended",
        "first_s",
        "generation",
        "gone",
        "last_s",
        "left",
        "prompts",
        "sequences",
        "started",
        "streamed",
        "tokens",
        "waiter",
        "whole",
    )

    def __init__(self, prompts: Sequence[int], generation: Generation | None, arrived_s: float) -> None:
        self.prompts = prompts
        self.generation = generation
        self.streamed = generation is not None and generation.streamed
        self.arrived_s = arrived_s
        self.sequences: range = range(0)
        self.left = len(prompts)
        self.started = False
        # Of each sequence, on the loop's clock: its admission and the step ends of its first and its latest token.
        self.admitted_s = [0.0] * len(prompts)
        self.first_s = [0.0] * len(prompts)
        self.last_s = [0.0] * len(prompts)
        self.cached = [0] * len(prompts)
        """Prompt tokens of each sequence that were in the prefix cache."""
        self.tokens: list[int] = []
        """The answer of each token produced and not taken; only of a stream."""
        self.gone = False
        self.ended = False
        self.whole = False
        """Whether the whole response was handed to the transport."""
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None:
            if not self.waiter.done():
                self.waiter.set_result(None)
            self.waiter = None

    async def changed(self) -> None:
        """Returns when there are tokens, when the last sequence has ended, or when the client is gone."""
        if not self.gone:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were in the prefix cache; of n answers to a prompt, the first one's count."""
        answers = len(self.prompts) // self.generation.prompts if self.generation is not None else 1
        return sum(self.cached[:: max(1, answers)])

    async def client_left(self) -> None:
        while not self.gone:
            self.tokens.clear()
            await self.changed()


class _Driver:
    """The engine's clock: runs its steps on the event loop and hands their tokens to the exchanges."""

    def __init__(self, config: SimulatorConfig) -> None:
        self.counters = Counters()
        self._engine = Engine(config)
        self._owners: dict[int, tuple[_Exchange, int]] = {}
        self._next_id = 0
        self._stepping = False
        self._delivered_s = 0.0

    def submit(self, prompts: Sequence[int], outputs: Sequence[int], generation: Generation | None) -> _Exchange:
        """Puts one sequence a prompt into the queue. All or none: the edge has checked that each fits.

        Raises ApiError when the queue is full.
        """
        if self._engine.is_full:
            raise ApiError("simulator: the queue is full, try again later", type="ServiceUnavailable", status=503)
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        exchange = _Exchange(prompts, generation, now_s)
        exchange.sequences = range(self._next_id, self._next_id + len(prompts))
        self._next_id += len(prompts)
        for index, sequence_id in enumerate(exchange.sequences):
            blocks = generation.answers[index].prompt_blocks if generation is not None else ()
            self._engine.add(SequenceRequest(sequence_id, prompts[index], outputs[index], now_s, blocks))
            self._owners[sequence_id] = (exchange, index)
        self.counters.accepted += 1
        if not self._stepping:
            self._stepping = True
            loop.call_soon(self._begin, loop, now_s)
        return exchange

    def end(self, exchange: _Exchange, *, whole: bool) -> None:
        """Ends a request, once: takes what is left of it out of the batch and counts it."""
        if exchange.ended:
            return
        exchange.ended = True
        for sequence_id in exchange.sequences:
            if self._owners.pop(sequence_id, None) is not None:
                self._engine.abort(sequence_id)
                self.counters.reasons["abort"] += 1
        if whole:
            self.counters.finished += 1
            self.counters.e2e_s.observe(asyncio.get_running_loop().time() - exchange.arrived_s)
        else:
            self.counters.aborted += 1

    def stats(self) -> Stats:
        """The counters and the state of the batch."""
        engine = self._engine
        return self.counters.stats(
            running=engine.running,
            waiting=engine.waiting,
            kv_usage=engine.kv_usage,
            prefix_queries=engine.prefix_queries,
            prefix_hits=engine.prefix_hits,
        )

    def _begin(self, loop: asyncio.AbstractEventLoop, start_s: float) -> None:
        if self._engine.is_idle:
            self._stepping = False
            return
        step = self._engine.step(start_s)
        counters = self.counters
        counters.preempted += len(step.preempted)
        counters.step_tokens.observe(step.prompt_tokens + step.decode_sequences)
        counters.max_running = max(counters.max_running, self._engine.running + len(step.finished))
        due_s = start_s + step.duration_s
        if due_s <= loop.time():
            loop.call_soon(self._deliver, loop, step, due_s)
        else:
            loop.call_at(due_s, self._deliver, loop, step, due_s)

    def _deliver(self, loop: asyncio.AbstractEventLoop, step: Step, due_s: float) -> None:
        now_s = loop.time()
        counters, owners = self.counters, self._owners
        # Most gaps between tokens are the one between this step and the one before: they are counted together.
        common_last_s, common, self._delivered_s = self._delivered_s, 0, now_s
        for sequence_id, queued_s in step.admitted:
            owner = owners.get(sequence_id)
            if owner is not None:
                counters.queue_s.observe(queued_s)
                counters.prompt_tokens += owner[0].prompts[owner[1]]
                owner[0].admitted_s[owner[1]] = owner[0].arrived_s + queued_s
        for sequence_id, cached_tokens in step.cached:
            owner = owners.get(sequence_id)
            if owner is not None:
                owner[0].cached[owner[1]] = cached_tokens
        for sequence_id in step.produced:
            owner = owners.get(sequence_id)
            if owner is None:
                continue  # its client left during the step
            exchange, index = owner
            counters.generation_tokens += 1
            if not exchange.started:
                exchange.started = True
                counters.ttft_s.observe(now_s - exchange.arrived_s)
            last_s = exchange.last_s[index]
            exchange.last_s[index] = now_s
            if not last_s:
                exchange.first_s[index] = now_s
            elif last_s == common_last_s:
                common += 1
            else:
                counters.itl_s.observe(now_s - last_s)
            if exchange.streamed:
                exchange.tokens.append(index)
                exchange.wake()
        if common:
            counters.itl_s.observe(now_s - common_last_s, common)
        for sequence_id in step.finished:
            owner = owners.pop(sequence_id, None)
            if owner is not None:
                self._finish(*owner, now_s)
        self._begin(loop, due_s if now_s - due_s < _MAX_LAG_S else now_s)

    def _finish(self, exchange: _Exchange, index: int, now_s: float) -> None:
        counters = self.counters
        answer = exchange.generation.answers[index] if exchange.generation is not None else None
        counters.reasons["length" if answer is not None and answer.finish_reason == "length" else "stop"] += 1
        counters.request_prompt_tokens.observe(exchange.prompts[index])
        counters.request_generation_tokens.observe(answer.output_tokens if answer is not None else 0)
        counters.inference_s.observe(now_s - exchange.admitted_s[index])
        if answer is not None:
            counters.prefill_s.observe(exchange.first_s[index] - exchange.admitted_s[index])
            counters.decode_s.observe(now_s - exchange.first_s[index])
            if answer.output_tokens > 1:
                counters.tpot_s.observe((now_s - exchange.first_s[index]) / (answer.output_tokens - 1))
        exchange.left -= 1
        if not exchange.left:
            exchange.wake()


@dataclass(frozen=True, slots=True)
class _Call:
    """One HTTP request with its whole body."""

    scope: Scope
    receive: Receive
    send: Send
    headers: dict[bytes, bytes]
    body: bytes
    fault: Fault

    def json(self) -> Body:
        """The body's JSON object. Raises ApiError as vLLM does."""
        media_type = self.headers.get(b"content-type", b"").lower().partition(b";")[0]
        if media_type != _JSON:
            message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
            raise ApiError(message, type="Bad Request")
        return requests.decode_body(self.body)

    def identity(self, own_id: str | None, details: bool) -> shapes.Identity:
        """What the response says of itself: vLLM takes the id from X-Request-Id, else from the body."""
        given = self.headers.get(b"x-request-id")
        name = given.decode("latin-1") if given is not None else own_id or secrets.token_hex(8)
        cached = self.fault.cached
        return shapes.Identity(name, int(time.time()), 0 if cached is None and details else cached)


class _Reset(Exception):
    """The fault asks to cut the connection now."""


class _Application:
    """The simulator as an ASGI application."""

    def __init__(self, config: SimulatorConfig) -> None:
        self._config = config
        self._driver = _Driver(config)
        self._tokenizer = Tokenizer()
        generate, pool, quick = self._generate, self._pool, self._quick
        pooling_routes = {
            "/v1/embeddings": (requests.parse_embeddings, shapes.embeddings),
            "/pooling": (requests.parse_embeddings, shapes.poolings),
            "/classify": (requests.parse_embeddings, shapes.classes),
            **dict.fromkeys(("/score", "/v1/score"), (requests.parse_score, shapes.scores)),
            **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), (requests.parse_rerank, shapes.ranks)),
        }
        json_routes = {
            "/v1/chat/completions": ("chat", requests.parse_chat),
            "/v1/completions": ("completion", requests.parse_completion),
            "/v1/responses": ("responses", requests.parse_responses),
            "/v1/messages": ("messages", requests.parse_messages),
        }
        self._routes: dict[str, dict[str, Callable[[_Call], Awaitable[None]]]] = {
            "/health": {"GET": quick(lambda call: (b"", b""))},
            "/ping": {"GET": quick(lambda call: (b"", b"")), "POST": quick(lambda call: (b"", b""))},
            "/version": {"GET": quick(lambda call: (_JSON, msgspec.json.encode({"version": shapes.VLLM_VERSION})))},
            "/load": {"GET": quick(lambda call: (_JSON, b'{"server_load":%d}' % self._driver.stats().in_flight))},
            "/stats": {"GET": quick(lambda call: (_JSON, msgspec.json.encode(self._driver.stats())))},
            "/metrics": {"GET": quick(self._metrics)},
            "/v1/models": {"GET": quick(self._models)},
            "/tokenize": {"POST": quick(self._tokenize)},
            "/detokenize": {"POST": quick(self._detokenize)},
            "/v1/messages/count_tokens": {"POST": quick(self._count_tokens)},
            "/v1/audio/transcriptions": {"POST": generate("transcription", self._transcription)},
        }
        for path, (family, parse) in json_routes.items():
            self._routes[path] = {"POST": generate(family, partial(self._parse_json, parse))}
        for path, (parse_pooling, shape) in pooling_routes.items():
            self._routes[path] = {"POST": pool(parse_pooling, shape)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1000})
        path = scope["path"]
        methods = self._routes.get(path)
        if methods is None:
            return await _reply(send, b'{"detail":"Not Found"}', status=404)
        handler = methods.get(scope["method"])
        if handler is None:
            allow = (b"allow", ", ".join(methods).encode())
            return await _reply(send, b'{"detail":"Method Not Allowed"}', status=405, first_header=allow)
        body = await _read_body(receive)
        if body is None:
            return None
        call = _Call(scope, receive, send, dict(scope["headers"]), body, NO_FAULT)
        try:
            fault = find_fault(scope["headers"], scope["query_string"])
            if fault.status is not None:
                raise ApiError(f"simulated fault: status {fault.status}", type="SimulatedFault", status=fault.status)
            await handler(call if fault is NO_FAULT else _Call(scope, receive, send, call.headers, body, fault))
        except ApiError as error:
            anthropic = path.startswith("/v1/messages")
            await _reply(send, shapes.error_body(error, anthropic=anthropic), status=error.status)
        except _Reset:
            _cut_connection(scope)
            # uvicorn complains of an incomplete response unless it has seen the connection go.
            while (await receive())["type"] != "http.disconnect":
                pass
        return None

    def _parse_json(self, parse: Callable[[Body, SimulatorConfig], Generation], call: _Call) -> Generation:
        return parse(call.json(), self._config)

    def _quick(self, answer: Callable[[_Call], tuple[bytes, bytes]]) -> Callable[[_Call], Awaitable[None]]:
        """A handler without work for the engine: `answer` gives the content type and the body."""

        async def handle(call: _Call) -> None:
            content_type, body = answer(call)
            if call.fault is NO_FAULT:
                await _reply(call.send, body, content_type=content_type)
                return
            exchange = _Exchange((), None, 0.0)
            exchange.ended = True  # it never was in the batch: it is not counted
            await self._attend(call, exchange, _send_whole(call, exchange, body, content_type))

        return handle

    def _generate(self, family: str, parse: Callable[[_Call], Generation]) -> Callable[[_Call], Awaitable[None]]:
        """A handler that generates answers."""

        async def handle(call: _Call) -> None:
            generation = parse(call)
            if call.fault.no_usage:
                generation = replace(generation, include_usage=False, continuous_usage=False)
            identity = call.identity(generation.request_id, self._config.prompt_tokens_details)
            prompts = [answer.prompt_tokens for answer in generation.answers]
            exchange = self._driver.submit(prompts, [answer.output_tokens for answer in generation.answers], generation)
            if generation.streamed:
                writer = shapes.stream_writer(family, generation, identity)

                def closing() -> list[bytes]:
                    self._note_cached(call, exchange, identity)
                    return writer.closing()

                await self._attend(call, exchange, _send_stream(call, exchange, generation, writer, closing))
            else:

                def body() -> bytes:
                    self._note_cached(call, exchange, identity)
                    return shapes.whole(family, generation, identity)

                await self._attend(call, exchange, _send_when_done(call, exchange, body))

        return handle

    def _pool(
        self, parse: Callable[[Body, SimulatorConfig], Pooling], shape: Callable[[Pooling, shapes.Identity], bytes]
    ) -> Callable[[_Call], Awaitable[None]]:
        """A handler that computes prompts."""

        async def handle(call: _Call) -> None:
            pooling = parse(call.json(), self._config)
            identity = call.identity(pooling.request_id, details=False)
            exchange = self._driver.submit(pooling.prompt_tokens, [0] * len(pooling.prompt_tokens), None)
            await self._attend(call, exchange, _send_when_done(call, exchange, lambda: shape(pooling, identity)))

        return handle

    def _note_cached(self, call: _Call, exchange: _Exchange, identity: shapes.Identity) -> None:
        """Tells the usage what was in the prefix cache, unless a fault says otherwise."""
        if call.fault.cached is None and self._config.prompt_tokens_details:
            identity.cached_tokens = exchange.cached_tokens

    async def _attend(self, call: _Call, exchange: _Exchange, response: Coroutine[Any, Any, None]) -> None:
        """Sends the response while watching for the client to leave, then ends the exchange."""
        watcher = asyncio.create_task(self._watch(call.receive, exchange))
        try:
            await response
        finally:
            self._driver.end(exchange, whole=exchange.whole)
            watcher.cancel()
            await asyncio.wait((watcher,))

    async def _watch(self, receive: Receive, exchange: _Exchange) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        exchange.gone = True
        self._driver.end(exchange, whole=False)
        exchange.wake()

    def _metrics(self, call: _Call) -> tuple[bytes, bytes]:
        body = exposition(self._driver.counters, self._driver.stats(), self._config)
        return CONTENT_TYPE_LATEST.encode(), body

    def _models(self, call: _Call) -> tuple[bytes, bytes]:
        return _JSON, shapes.model_list(self._config.models, self._config.max_model_len, int(time.time()))

    def _tokenize(self, call: _Call) -> tuple[bytes, bytes]:
        asked = requests.parse_tokenize(call.json())
        if asked.chat:
            tokens = self._tokenizer.encode_chat(asked.texts, generation_prompt=asked.generation_prompt)
        else:
            tokens = self._tokenizer.encode(asked.texts[0])
        answer = {
            "count": len(tokens),
            "max_model_len": self._config.max_model_len,
            "tokens": tokens,
            "token_strs": self._tokenizer.pieces(tokens) if asked.token_strs else None,
        }
        return _JSON, msgspec.json.encode(answer)

    def _detokenize(self, call: _Call) -> tuple[bytes, bytes]:
        return _JSON, msgspec.json.encode({"prompt": self._tokenizer.decode(requests.parse_detokenize(call.json()))})

    def _count_tokens(self, call: _Call) -> tuple[bytes, bytes]:
        tokens = requests.count_messages(call.json())
        answer = {"input_tokens": tokens, "context_management": {"original_input_tokens": tokens}}
        return _JSON, msgspec.json.encode(answer)

    def _transcription(self, call: _Call) -> Generation:
        content_type = call.headers.get(b"content-type", b"").decode("latin-1")
        return requests.parse_transcription(call.body, content_type, self._config)


async def _send_stream(
    call: _Call,
    exchange: _Exchange,
    generation: Generation,
    writer: shapes.StreamWriter,
    closing: Callable[[], list[bytes]],
) -> None:
    """Server-sent events as the tokens come."""
    fault, send = call.fault, call.send
    if not await _before_headers(fault, exchange):
        return
    await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
    out = _Outlet(send, fault, exchange)
    await out.write(writer.preamble())
    opened = False
    outputs = [answer.output_tokens for answer in generation.answers]
    sent, ready = [0] * len(outputs), [0] * len(outputs)
    unfinished = len(outputs)
    while unfinished:
        if not exchange.tokens:
            await exchange.changed()
        if exchange.gone:
            return
        tokens, exchange.tokens = exchange.tokens, []
        if not opened:
            opened = True
            await out.write(writer.opening())
        for answer in tokens:
            ready[answer] += 1
            ends = ready[answer] == outputs[answer]
            if not ends and ready[answer] - sent[answer] < fault.multi:
                continue
            event = writer.event(answer, sent[answer], ready[answer])
            if fault is NO_FAULT:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            else:
                await out.write([event])
            sent[answer] = ready[answer]
            unfinished -= ends
    await out.write(closing())
    if not exchange.gone:
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        exchange.whole = True


async def _send_when_done(call: _Call, exchange: _Exchange, body: Callable[[], bytes]) -> None:
    """A JSON body when the last of the sequences has ended."""
    while exchange.left and not exchange.gone:
        await exchange.changed()
    if not exchange.gone:
        await _send_whole(call, exchange, body(), _JSON)


async def _send_whole(call: _Call, exchange: _Exchange, body: bytes, content_type: bytes) -> None:
    """A complete body, or as much of it as the fault allows."""
    fault = call.fault
    if not await _before_headers(fault, exchange):
        return
    if fault.reset_after is None and fault.stall_after is None and not fault.cut:
        await _reply(call.send, body, content_type=content_type)
    else:
        headers = _headers(content_type, len(body))
        await call.send({"type": "http.response.start", "status": 200, "headers": headers})
        out = _Outlet(call.send, fault, exchange)
        if fault.reset_after is not None or fault.stall_after is not None:
            await out.put(body[: len(body) // 2])
            await out.break_off()
            return
        await out.put(body)
        await call.send({"type": "http.response.body", "body": b"", "more_body": False})
    exchange.whole = not exchange.gone


class _Outlet:
    """Writes events as the fault wants them."""

    __slots__ = ("_exchange", "_fault", "_left", "_send")

    def __init__(self, send: Send, fault: Fault, exchange: _Exchange) -> None:
        self._send = send
        self._fault = fault
        self._exchange = exchange
        limits = [limit for limit in (fault.reset_after, fault.stall_after) if limit is not None]
        self._left = min(limits) if limits else None

    async def write(self, events: Sequence[bytes]) -> None:
        """Writes each event by itself, and breaks off where the fault says so."""
        for event in events:
            if self._left is not None:
                if not self._left:
                    await self.break_off()
                    return
                self._left -= 1
            await self.put(event)

    async def put(self, event: bytes) -> None:
        """Writes the bytes, in one piece or cut: pieces of 1, 3, 5 ... bytes, so that most end at odd positions."""
        if not self._fault.cut:
            await self._send({"type": "http.response.body", "body": event, "more_body": True})
            return
        start, size = 0, 1
        while start < len(event):
            await self._send({"type": "http.response.body", "body": event[start : start + size], "more_body": True})
            # Gives the transport a turn, so that the piece is a segment of its own.
            await asyncio.sleep(0)
            start, size = start + size, size + 2

    async def break_off(self) -> None:
        """Cuts the connection, or says no more until the client leaves."""
        if self._fault.reset_after is not None:
            # What was written has to reach the client: a reset discards what the socket still holds.
            await asyncio.sleep(_DRAIN_S)
            raise _Reset
        await self._exchange.client_left()


async def _before_headers(fault: Fault, exchange: _Exchange) -> bool:
    """What the fault does before the first byte; False when the client has left meanwhile."""
    if fault is NO_FAULT:
        return True
    if fault.reset_before:
        raise _Reset
    if fault.stall_before:
        await exchange.client_left()
    if fault.late_headers:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(exchange.client_left(), fault.late_headers)
    return not exchange.gone


def _headers(content_type: bytes, length: int) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-length", b"%d" % length)]
    if content_type:
        headers.append((b"content-type", content_type))
    headers.append((b"vary", b"Origin"))
    return headers


async def _reply(
    send: Send,
    body: bytes,
    *,
    status: int = 200,
    content_type: bytes = _JSON,
    first_header: tuple[bytes, bytes] | None = None,
) -> None:
    headers = _headers(content_type, len(body))
    if first_header is not None:
        headers.insert(0, first_header)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _read_body(receive: Receive) -> bytes | None:
    """The whole request body; None when the client left before its end."""
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        return bytes(message.get("body", b""))
    parts: list[bytes] = []
    while message["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()
    return None


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def _cut_connection(scope: Scope) -> None:
    """Resets the TCP connection. Raises ConnectionResetError where there is none, as under an in-process client."""
    transport = scope.get("extensions", {}).get(_TRANSPORT)
    if transport is None:
        raise ConnectionResetError("simulated fault: the connection was reset")
    # SO_LINGER of 0 s: close sends RST instead of FIN.
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol; it also tells the application the transport, which a reset needs."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions: dict[Any, Any] = {_TRANSPORT: self.transport}
        self.scope["extensions"] = extensions


def build_app(config: SimulatorConfig) -> AsgiApp:
    """The simulated server as an ASGI application. It belongs to one event loop and needs no lifespan events."""
    return _Application(config)


def serve(
    config: SimulatorConfig,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    announce: Callable[[str], None] | None = None,
) -> None:
    """Runs the server until SIGINT or SIGTERM. Port 0 takes a free one.

    announce: called with one line that has the server's URL, as soon as connections are accepted.
    Raises OSError, its message naming host, port and reason, when the address cannot be listened on.
    """
    listener = _listen(host, port)
    url = _url(listener)
    # What is loaded by now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    if announce is not None:
        announce(f"simulator: serving {', '.join(config.models)} on {url}")
    with contextlib.suppress(KeyboardInterrupt):
        _uvicorn(config).run(sockets=[listener])


@contextlib.contextmanager
def running(config: SimulatorConfig, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Runs the server in a thread of this process; the value is its URL. For tests and demos.

    Raises OSError as `serve` does.
    """
    listener = _listen(host, port)
    server = _uvicorn(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="simulator", daemon=True)
    thread.start()
    try:
        yield _url(listener)
    finally:
        server.should_exit = True
        thread.join()


class _Server(uvicorn.Server):
    """uvicorn's server; when it is told to stop it cuts what is in flight, as vLLM does, instead of waiting for it."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await super().shutdown(sockets)


def _uvicorn(config: SimulatorConfig) -> uvicorn.Server:
    return _Server(
        uvicorn.Config(
            build_app(config),
            http=_Protocol,
            loop="uvloop",
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="error",
            backlog=_BACKLOG,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OverflowError as error:
        raise OSError(f"simulator: cannot listen on {host}:{port}: {error}") from error
    except OSError as error:
        # Python adds the address to strerror; a name that does not resolve has a negative errno and its own text.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise OSError(f"simulator: cannot listen on {host}:{port}: {reason}") from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
