"""The same request to a real vLLM, directly and through the gateway: what the client sees, and what is recorded.

vLLM puts the tokens of a stream into chunks as its own scheduling goes, so that two equal requests may be cut
differently. A comparison of two streams is therefore made again a few times until the cuts agree (what the gateway
changed would differ every time), and `test_every_byte_that_vllm_sends_arrives` compares one and the same stream on both
sides of the gateway.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.e2e.harness import MODEL, Installation, Tap, wait_until
from traces.record import Outcome, TokenSource, TraceRecord

pytestmark = pytest.mark.vllm

ATTEMPTS = 8
TIMEOUT_S = 120.0
JSON = {"content-type": "application/json"}
WORDS = {"allowed_token_ids": list(range(261, 325))}
"""Tokens with visible text; the model's random weights prefer others."""
SEEDED = {"model": MODEL, "max_tokens": 16, "temperature": 1.0, "seed": 7}
CHAT: dict[str, Any] = {**SEEDED, **WORDS, "messages": [{"role": "user", "content": "burst trace replay"}]}
TEXT: dict[str, Any] = {**SEEDED, **WORDS, "prompt": "burst trace replay"}
EMPTY: dict[str, Any] = {**CHAT, "temperature": 0.0, "allowed_token_ids": None}
"""Answers with tokens that have no text."""
LONG = {"max_tokens": 20_000, "min_tokens": 20_000, "ignore_eos": True}
"""Minutes of generating."""
RESPONSE: dict[str, Any] = {
    "model": MODEL,
    "max_output_tokens": 8,
    "temperature": 0.0,
    "input": [
        {"role": "user", "content": "hello"},
        {
            "type": "message",
            "id": "msg_1",
            "status": "in_progress",  # vLLM goes on with it, which gives an answer with text
            "role": "assistant",
            "content": [{"type": "output_text", "text": "burst trace replay", "annotations": []}],
        },
    ],
}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["burst", "trace"]}}, "required": ["a"]}
CLOSED_SCHEMA = {**SCHEMA, "additionalProperties": False}
MESSAGE: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 24,
    "temperature": 0.0,
    "messages": [{"role": "user", "content": "hello"}],
    "output_config": {"format": {"type": "json_schema", "schema": CLOSED_SCHEMA}},
}
TOOLS = [{"type": "function", "function": {"name": "replay", "parameters": CLOSED_SCHEMA}}]
USAGE = {"include_usage": True}


@dataclass(frozen=True, slots=True)
class Ask:
    """A request; a body that is no bytes is sent as JSON."""

    path: str
    body: Any = None
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: JSON)

    @property
    def content(self) -> bytes | None:
        return self.body if self.body is None or isinstance(self.body, bytes) else json.dumps(self.body).encode()

    @property
    def is_stream(self) -> bool:
        return isinstance(self.body, dict) and self.body.get("stream") is True


def chat(**changes: Any) -> Ask:
    return Ask("/v1/chat/completions", {**CHAT, **changes})


def text(**changes: Any) -> Ask:
    return Ask("/v1/completions", {**TEXT, **changes})


def both(name: str, make: Callable[..., Ask], **changes: Any) -> dict[str, Ask]:
    """The same request plain, streamed, and streamed by a client that asks for usage."""
    return {
        f"{name}": make(**changes),
        f"{name}-stream": make(**changes, stream=True),
        f"{name}-stream-usage": make(**changes, stream=True, stream_options=USAGE),
    }


GENERATED: dict[str, Ask] = {
    **both("chat", chat),
    **both("chat-n", chat, n=2),
    **both("chat-logprobs", chat, logprobs=True, top_logprobs=2),
    **both("chat-stop", chat, stop=["que"]),
    **both("chat-no-text", lambda **changes: Ask("/v1/chat/completions", {**EMPTY, **changes})),
    **both("chat-one-token", chat, max_tokens=1),
    **both("chat-schema", chat, response_format={
        "type": "json_schema", "json_schema": {"name": "s", "schema": CLOSED_SCHEMA}
    }, allowed_token_ids=None),
    "chat-stream-continuous": chat(stream=True, stream_options={**USAGE, "continuous_usage_stats": True}),
    "chat-n-stream-continuous": chat(n=2, stream=True, stream_options={**USAGE, "continuous_usage_stats": True}),
    # Without include_usage vLLM ignores it; the gateway must not switch it on by asking for usage.
    "chat-stream-only-continuous": chat(stream=True, stream_options={"continuous_usage_stats": True}),
    "chat-stream-options-empty": chat(stream=True, stream_options={}),
    "chat-stream-options-null": chat(stream=True, stream_options=None),
    "chat-stream-no-usage": chat(stream=True, stream_options={"include_usage": False}),
    "chat-token-ids": chat(stream=True, return_token_ids=True),
    **both("text", text),
    **both("text-n", text, n=2),
    **both("text-echo", text, echo=True),
    **both("text-logprobs", text, logprobs=2),
    **both("text-stop", text, stop=["que"]),
    **both("text-prompts", text, prompt=["burst trace", "replay"]),
    **both("text-token-prompt", text, prompt=[311, 323, 316]),
    **both("text-every-byte", text, allowed_token_ids=None, temperature=2.0, max_tokens=64),
    "text-stream-continuous": text(stream=True, stream_options={**USAGE, "continuous_usage_stats": True}),
    "responses": Ask("/v1/responses", RESPONSE),
    "responses-stream": Ask("/v1/responses", {**RESPONSE, "stream": True}),
    "messages": Ask("/v1/messages", MESSAGE),
    "messages-stream": Ask("/v1/messages", {**MESSAGE, "stream": True}),
}  # fmt: skip

SPACED = json.dumps({**CHAT, "stream": True}, indent=1).encode()
OTHER: dict[str, Ask] = {
    "chat-spaced-body": Ask("/v1/chat/completions", b" \n" + SPACED + b"\n "),
    "chat-no-model": Ask("/v1/chat/completions", {key: CHAT[key] for key in CHAT if key != "model"}),
    "chat-unknown-fields": chat(burst={"gate": [1, None]}, messages=[{"role": "user", "content": "hi", "x": "☃"}]),
    "chat-tools-auto": chat(tools=TOOLS, tool_choice="auto"),
    "chat-tools-none": chat(tools=TOOLS, tool_choice="none"),
    # Without a tool parser vLLM refuses these, and its refusal must come through.
    "chat-tools-required": chat(tools=TOOLS, tool_choice="required", max_tokens=64, allowed_token_ids=None),
    "chat-tools-required-stream": chat(
        tools=TOOLS, tool_choice="required", max_tokens=64, allowed_token_ids=None, stream=True
    ),
    "chat-batch": Ask("/v1/chat/completions/batch", {**CHAT, "messages": [CHAT["messages"], CHAT["messages"]]}),
    "invocations": Ask("/invocations", TEXT),
    "generative-scoring": Ask(
        "/generative_scoring", {"model": MODEL, "query": "hello", "items": ["world"], "label_token_ids": [1, 2]}
    ),
    "count-tokens": Ask("/v1/messages/count_tokens", {key: MESSAGE[key] for key in ("model", "messages")}),
    "tokenize": Ask("/tokenize", {"model": MODEL, "prompt": "hello burst ☃"}),
    "tokenize-chat": Ask("/tokenize", {"model": MODEL, "messages": CHAT["messages"]}),
    "detokenize": Ask("/detokenize", {"model": MODEL, "tokens": [311, 323]}),
    "models": Ask("/v1/models", method="GET", headers={}),
    "models-query": Ask("/v1/models?a=%2F%20+&b=&a=2", method="GET", headers={}),
    "models-slash": Ask("/v1/models/", method="GET", headers={}),
    "model-unknown": Ask("/v1/models/nope%2Fnope", method="GET", headers={}),
    "health": Ask("/health", method="GET", headers={}),
    "ping": Ask("/ping", method="GET", headers={}),
    "version": Ask("/version", method="GET", headers={}),
    "load": Ask("/load", method="GET", headers={}),
    "docs": Ask("/docs", method="GET", headers={}),
    "openapi": Ask("/openapi.json", method="GET", headers={"accept-encoding": "gzip"}),
    "embeddings": Ask("/v1/embeddings", {"model": MODEL, "input": "hello"}),
    "rerank": Ask("/v1/rerank", {"model": MODEL, "query": "hello", "documents": ["world"]}),
    "score": Ask("/v1/score", {"model": MODEL, "text_1": "hello", "text_2": "world"}),
    "pooling": Ask("/pooling", {"model": MODEL, "input": "hello"}),
    "classify": Ask("/classify", {"model": MODEL, "input": "hello"}),
    "response-unknown": Ask("/v1/responses/resp_nope", method="GET", headers={}),
    "head": Ask("/v1/models", method="HEAD", headers={}),
    "head-docs": Ask("/docs", method="HEAD", headers={}),
    "options": Ask("/v1/chat/completions", method="OPTIONS", headers={}),
    "preflight": Ask(
        "/v1/chat/completions",
        method="OPTIONS",
        headers={
            "origin": "http://example.org",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        },
    ),
    "cors": Ask("/v1/models", method="GET", headers={"origin": "http://example.org"}),
}

REFUSED: dict[str, tuple[Ask, int]] = {
    "unknown-model": (chat(model="nope"), 404),
    "unknown-model-stream": (chat(model="nope", stream=True), 404),
    "unknown-model-text": (text(model="nope"), 404),
    "prompt-too-long": (text(prompt="a " * 40_000), 400),
    "prompt-too-long-stream": (text(prompt="a " * 40_000, stream=True), 400),
    "bad-json": (Ask("/v1/chat/completions", b'{"model": "tiny", "stream": true,'), 400),
    "bad-utf8": (Ask("/v1/completions", b'{"model": "tiny", "prompt": "\xff\xfe"}'), 400),
    "no-object": (Ask("/v1/completions", b"[1, 2]"), 400),
    "empty-body": (Ask("/v1/completions", b""), 400),
    "missing-messages": (Ask("/v1/chat/completions", {"model": MODEL}), 400),
    "wrong-type": (chat(max_tokens="many"), 400),
    "negative": (chat(max_tokens=-1), 400),
    "stream-options-without-stream": (chat(stream_options=USAGE), 400),
    "stream-options-wrong": (chat(stream=True, stream_options="yes"), 400),
    "stream-text": (chat(stream="perhaps"), 400),
    "wrong-content-type": (Ask("/v1/completions", b"hello", headers={"content-type": "text/plain"}), 400),
    "unknown-route": (Ask("/v1/nope", {"model": MODEL}), 404),
    "unknown-root": (Ask("/nope%20%E2%98%83?x", method="GET", headers={}), 404),
    "wrong-method": (Ask("/v1/chat/completions", method="GET", headers={}), 405),
    "wrong-method-delete": (Ask("/v1/models", method="DELETE", headers={}), 405),
    "message-missing": (Ask("/v1/messages", {"model": MODEL}), 400),
    "message-unknown-model": (Ask("/v1/messages", {**MESSAGE, "model": "nope"}), 404),
    "response-unknown-model": (Ask("/v1/responses", {**RESPONSE, "model": "nope"}), 404),
}
NO_PARTS = {"date", "x-request-id", "connection", "keep-alive", "transfer-encoding",
            "x-burstgate-overhead-ms", "x-burstgate-upstream"}  # fmt: skip
"""What the two answers may differ in: the time, the id that the gateway returns, and hop-by-hop framing."""
_NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got: header names and values in order, the body as it came."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


@pytest.fixture(scope="module")
def gateway(vllm_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with Installation(vllm_url, data_dir=tmp_path_factory.mktemp("transparency")) as installation:
        yield installation
        installation.stop()
        assert installation.doctor()["accounting"].is_ok


def new_id() -> str:
    return f"e2e-{next(_NUMBERS):06d}"


def send(url: str, ask: Ask, request_id: str) -> Answer:
    with (
        httpx.Client(timeout=TIMEOUT_S) as client,
        client.stream(
            ask.method,
            url + ask.path,
            content=ask.content,
            headers={"accept-encoding": "identity", **ask.headers, "x-request-id": request_id},
        ) as response,
    ):
        body = b"".join(response.iter_raw())
        headers = [(name.decode(), value.decode()) for name, value in response.headers.raw]
        return Answer(response.status_code, headers, body)


def without_noise(answer: Answer) -> Answer:
    """Without what differs between two equal requests to one and the same vLLM: its own ids and stamps."""
    body = re.sub(rb'"(created|created_at)":\d+', rb'"\1":0', answer.body)
    body = re.sub(rb'"(resp|msg|rs|chatcmpl-tool|modelperm)[-_][0-9a-f]{8,}"', rb'"\1"', body)
    body = by_choice(body)  # how the events of several choices interleave is vLLM's scheduling too
    return Answer(answer.status, [header for header in answer.headers if header[0].lower() not in NO_PARTS], body)


def by_choice(body: bytes) -> bytes:
    """A stream's events, those of each choice in their order; any other body as it is."""

    def index_of(event: bytes) -> int:
        found = re.search(rb'"choices":\[\{"index":(\d+)', event)
        return int(found[1]) if found else 1_000  # of no choice: these come last

    if not body.startswith(b"data: "):
        return body
    events: list[bytes] = body.split(b"\n\n")
    events.sort(key=index_of)
    return b"\n\n".join(events)


def assert_equal_answers(direct_url: str, gateway_url: str, ask: Ask) -> tuple[Answer, str]:
    """Compare both ways until they agree; returns the gateway's answer and the id of its request."""
    for attempt in range(1, ATTEMPTS + 1):
        request_id = new_id()
        direct, through = send(direct_url, ask, request_id), send(gateway_url, ask, request_id)
        if without_noise(through) == without_noise(direct) or attempt == ATTEMPTS or not ask.is_stream:
            break
    there, here = (url.removeprefix("http://") for url in (direct_url, gateway_url))
    headers = [(name, value.replace(there, here)) for name, value in direct.headers]  # a redirect leads back here
    assert without_noise(through) == without_noise(dataclasses.replace(direct, headers=headers))
    assert dict(through.headers)["x-request-id"] == request_id
    return through, request_id


def record_of(installation: Installation, request_id: str) -> TraceRecord:
    """The one record of a request that the test named."""
    found: list[TraceRecord] = []

    def is_there() -> bool:
        nonlocal found
        found = [row for row in installation.rows() if row.client_request_id == request_id]
        return bool(found)

    wait_until(is_there, 15.0, f"a record of {request_id}")
    assert len(found) == 1
    return found[0]


def true_usage(vllm_url: str, ask: Ask) -> tuple[int, int]:
    """The request's tokens, asked of vLLM itself by the same request without streaming."""
    body = {key: value for key, value in ask.body.items() if key not in ("stream", "stream_options")}
    answer = send(vllm_url, Ask(ask.path, body), new_id())
    assert answer.status == 200, answer.body
    usage = json.loads(answer.body)["usage"]
    if "input_tokens" in usage:
        return usage["input_tokens"], usage["output_tokens"]
    return usage["prompt_tokens"], usage["completion_tokens"]


@pytest.mark.parametrize("name", GENERATED)
def test_generation_is_equal_and_its_tokens_are_vllms(name: str, vllm_url: str, gateway: Installation) -> None:
    ask = GENERATED[name]
    answer, request_id = assert_equal_answers(vllm_url, gateway.gateway_url, ask)
    assert answer.status == 200, answer.body
    record = record_of(gateway, request_id)
    assert (record.request_tokens, record.response_tokens) == true_usage(vllm_url, ask)
    assert record.token_source is TokenSource.USAGE
    assert (record.outcome, record.status, record.attempts) == (Outcome.OK, 200, 1)
    assert (record.stream, record.model, record.served_model) == (ask.is_stream, MODEL, MODEL)
    assert (record.endpoint, record.upstream) == (ask.path, vllm_url)
    assert record.elapsed_s is not None
    if ask.is_stream and "no-text" not in name:
        assert record.ttft_s is not None
        assert 0 < record.ttft_s <= record.elapsed_s


@pytest.mark.parametrize("name", OTHER)
def test_other_answers_are_equal(name: str, vllm_url: str, gateway: Installation) -> None:
    answer, request_id = assert_equal_answers(vllm_url, gateway.gateway_url, OTHER[name])
    record = record_of(gateway, request_id)
    assert record.status == answer.status
    assert record.outcome is (Outcome.OK if answer.status < 400 else Outcome.INVALID_REQUEST)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_equal(name: str, vllm_url: str, gateway: Installation) -> None:
    ask, status = REFUSED[name]
    answer, request_id = assert_equal_answers(vllm_url, gateway.gateway_url, ask)
    assert answer.status == status, answer.body
    record = record_of(gateway, request_id)
    assert (record.outcome, record.status) == (Outcome.INVALID_REQUEST, status)
    assert (record.request_tokens, record.response_tokens, record.token_source) == (None, None, TokenSource.NONE)
    error = json.loads(answer.body).get("error") or {}
    assert record.error_type == error.get("type")


def test_metrics_are_vllms_own(vllm_url: str, gateway: Installation) -> None:
    ask = Ask("/metrics", method="GET", headers={})
    direct, through = send(vllm_url, ask, new_id()), send(gateway.gateway_url, ask, new_id())

    def series(answer: Answer) -> list[bytes]:
        return [line.rpartition(b" ")[0] for line in answer.body.splitlines()]

    assert series(through) == series(direct)
    assert b"vllm:num_requests_running" in through.body
    names = [[name for name, _ in answer.headers if name.lower() not in NO_PARTS] for answer in (direct, through)]
    assert names[0] == names[1]


def test_a_request_without_an_id_gets_one(vllm_url: str, gateway: Installation) -> None:
    response = httpx.post(f"{gateway.gateway_url}/v1/completions", json=TEXT, timeout=TIMEOUT_S)
    request_id = response.headers["x-request-id"]
    assert response.json()["id"] == f"cmpl-{request_id}"  # vLLM got it too

    def record() -> list[TraceRecord]:
        return [row for row in gateway.rows() if row.request_id == request_id]

    wait_until(lambda: bool(record()), 15.0, f"a record of {request_id}")
    assert record()[0].client_request_id is None


# Both sides of the gateway at once


def parse_exchange(asked: bytes, answered: bytes) -> tuple[list[bytes], bytes, list[bytes], bytes]:
    """Head lines and body of the one request and its one answer, as they went over the wire."""
    request_head, _, request_body = asked.partition(b"\r\n\r\n")
    answer_head, _, answer_body = answered.partition(b"\r\n\r\n")
    answer_lines = answer_head.split(b"\r\n")
    if b"transfer-encoding: chunked" in [line.lower() for line in answer_lines]:
        parts, rest = [], answer_body
        while True:
            size, _, rest = rest.partition(b"\r\n")
            if not (length := int(size, 16)):
                break
            parts.append(rest[:length])
            rest = rest[length + 2 :]
        answer_body = b"".join(parts)
    return request_head.split(b"\r\n"), request_body, answer_lines, answer_body


def without_usage(ask: Ask, body: bytes) -> bytes:
    """The stream as vLLM sends it to a client that did not ask for usage.

    There is no usage event then, and its `system_fingerprint` stands in the events that end a choice.
    """
    options = ask.body.get("stream_options") or {}
    if not ask.is_stream or options.get("include_usage") or not ask.path.endswith("completions"):
        return body
    events = body.split(b"\n\n")
    usage = [event for event in events if b'"choices":[],' in event]
    assert len(usage) == 1, "vLLM sent one usage event to the gateway"
    fingerprint = re.search(rb',"system_fingerprint":"[^"]*"', usage[0])
    stamp = fingerprint[0] if fingerprint else b""
    return b"\n\n".join(
        event[:-1] + stamp + event[-1:] if b'"finish_reason":"' in event else event
        for event in events
        if event not in usage
    )


@pytest.fixture(scope="module")
def tapped(vllm_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tap, Installation]]:
    folder = tmp_path_factory.mktemp("tapped")
    unasked = {"BURSTGATE_HEALTH__INTERVAL_S": "0"}  # the gateway's own questions would lie between the client's
    with Tap(vllm_url) as tap, Installation(tap.url, data_dir=folder, env=unasked) as installation:
        yield tap, installation


@pytest.mark.parametrize("name", GENERATED)
def test_every_byte_that_vllm_sends_arrives(name: str, tapped: tuple[Tap, Installation]) -> None:
    tap, installation = tapped
    ask = GENERATED[name]
    tap.take()
    answer = send(installation.gateway_url, ask, request_id := new_id())
    request_lines, request_body, answer_lines, answer_body = parse_exchange(*tap.take())
    expected = without_usage(ask, answer_body)
    # An event that ends a choice waits for the usage event, and those of other choices may overtake it.
    is_reordered = expected is not answer_body and ("n" in ask.body or isinstance(ask.body.get("prompt"), list))
    assert answer.body == expected or (is_reordered and by_choice(answer.body) == by_choice(expected))
    seen = [f"{name}: {value}".encode() for name, value in answer.headers]
    hop = (b"transfer-encoding", b"connection", b"x-burstgate-")
    assert [line for line in seen if not line.lower().startswith(hop)] == [
        line for line in answer_lines[1:] if not line.lower().startswith(hop)
    ] + [f"x-request-id: {request_id}".encode()]
    assert request_lines[0] == f"POST {ask.path} HTTP/1.1".encode()
    options = ask.body.get("stream_options") or {}
    if not ask.is_stream or options.get("include_usage") or not ask.path.endswith("completions"):
        assert request_body == ask.content
    else:
        assert json.loads(request_body) == {**ask.body, "stream_options": USAGE}


# SDKs


def forget(value: Any) -> Any:
    """An SDK's object as plain data, without ids and stamps."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json", warnings=False)
    if isinstance(value, dict):
        return {
            key: forget(part) for key, part in value.items() if key not in ("id", "created", "created_at", "item_id")
        }
    return [forget(part) for part in value] if isinstance(value, list) else value


def _for_sdk(body: dict[str, Any]) -> dict[str, Any]:
    return {**{key: body[key] for key in body if key not in WORDS}, "extra_body": WORDS}


def _for_anthropic(body: dict[str, Any]) -> dict[str, Any]:
    """Its SDK has no `temperature`."""
    return {**{key: body[key] for key in body if key != "temperature"}, "extra_body": {"temperature": 0.0}}


CALLS: dict[str, Callable[[Any], Any]] = {
    "chat": lambda client: client.chat.completions.create(**_for_sdk(CHAT)),
    "chat-n": lambda client: client.chat.completions.create(**_for_sdk(CHAT), n=2),
    "chat-stream": lambda client: client.chat.completions.create(**_for_sdk(CHAT), stream=True),
    "chat-stream-usage": lambda client: client.chat.completions.create(
        **_for_sdk(CHAT), stream=True, stream_options=USAGE
    ),
    "text": lambda client: client.completions.create(**_for_sdk(TEXT)),
    "text-stream": lambda client: client.completions.create(**_for_sdk(TEXT), stream=True),
    "text-stream-usage": lambda client: client.completions.create(**_for_sdk(TEXT), stream=True, stream_options=USAGE),
    "responses": lambda client: client.responses.create(**RESPONSE),
    "responses-stream": lambda client: client.responses.create(**RESPONSE, stream=True),
    "models": lambda client: client.models.list(),
}
MESSAGE_CALLS: dict[str, Callable[[Any], Any]] = {
    "messages": lambda client: client.messages.create(**_for_anthropic(MESSAGE)),
    "messages-stream": lambda client: client.messages.create(**_for_anthropic(MESSAGE), stream=True),
}


def call_sync(client: Any, call: Callable[[Any], Any], *, streams: bool) -> Any:
    with client:
        result = call(client)
        return [forget(event) for event in result] if streams else forget(result)


def call_async(client: Any, call: Callable[[Any], Any], *, streams: bool) -> Any:
    async def run() -> Any:
        async with client:
            pending = call(client)
            if not hasattr(pending, "__await__"):
                return [forget(item) async for item in pending]
            result = await pending
            return [forget(event) async for event in result] if streams else forget(result)

    return asyncio.run(run())


def assert_equal_calls(run: Callable[..., Any], make: Callable[[str], Any], name: str, urls: tuple[str, str]) -> None:
    call = CALLS.get(name) or MESSAGE_CALLS[name]
    streams = "stream" in name
    for _ in range(ATTEMPTS):
        direct, through = (run(make(url), call, streams=streams) for url in urls)
        if through == direct or not streams:
            break
    assert through == direct
    assert through


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_openai_sdk_sees_no_difference(name: str, is_async: bool, vllm_url: str, gateway: Installation) -> None:
    run = call_async if is_async else call_sync
    kind = openai.AsyncOpenAI if is_async else openai.OpenAI
    assert_equal_calls(
        run,
        lambda url: kind(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S),
        name,
        (vllm_url, gateway.gateway_url),
    )


@pytest.mark.parametrize("name", MESSAGE_CALLS)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_anthropic_sdk_sees_no_difference(name: str, is_async: bool, vllm_url: str, gateway: Installation) -> None:
    run = call_async if is_async else call_sync
    kind = anthropic.AsyncAnthropic if is_async else anthropic.Anthropic
    assert_equal_calls(
        run,
        lambda url: kind(base_url=url, api_key="none", max_retries=0, timeout=TIMEOUT_S),
        name,
        (vllm_url, gateway.gateway_url),
    )


def test_openai_sdk_raises_the_same_errors(vllm_url: str, gateway: Installation) -> None:
    for changes, kind in (({"model": "nope"}, openai.NotFoundError), ({"max_tokens": -1}, openai.BadRequestError)):
        bodies = []
        for url in (vllm_url, gateway.gateway_url):
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                arguments: Any = {**_for_sdk(CHAT), **changes}
                with pytest.raises(kind) as raised:
                    client.chat.completions.create(**arguments)
                bodies.append(raised.value.body)
        assert bodies[0] == bodies[1]


# Clients that leave


def running_requests(vllm_url: str) -> int:
    text = httpx.get(f"{vllm_url}/metrics", timeout=30.0).text
    found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([0-9.]+)$", text, re.MULTILINE)
    assert len(found) == 2
    return sum(int(float(value)) for value in found)


def wait_idle(vllm_url: str, timeout_s: float) -> None:
    wait_until(lambda: running_requests(vllm_url) == 0, timeout_s, "vLLM runs and holds no request")


@pytest.mark.parametrize("ask", [chat(**LONG, stream=True), text(**LONG, stream=True)], ids=["chat", "text"])
def test_leaving_a_stream_aborts_it_at_vllm(ask: Ask, vllm_url: str, gateway: Installation) -> None:
    wait_idle(vllm_url, TIMEOUT_S)
    request_id = new_id()
    with (
        httpx.Client(timeout=TIMEOUT_S) as client,
        client.stream(
            "POST", gateway.gateway_url + ask.path, json=ask.body, headers={"x-request-id": request_id}
        ) as response,
    ):
        pieces = response.iter_raw()
        came = b""
        while came.count(b"data: ") < 10:
            came += next(pieces)
        wait_until(lambda: running_requests(vllm_url) == 1, 20.0, "vLLM says that the request runs")
    wait_idle(vllm_url, 10.0)
    record = record_of(gateway, request_id)
    assert (record.outcome, record.status, record.stream) == (Outcome.CLIENT_GONE, 200, True)
    assert record.token_source is TokenSource.ESTIMATED
    assert record.response_tokens is not None
    assert record.response_tokens >= 8
    assert record.request_tokens is not None
    assert record.request_tokens > 0
    assert record.ttft_s is not None


def test_leaving_a_plain_request_aborts_it_at_vllm(vllm_url: str, gateway: Installation) -> None:
    wait_idle(vllm_url, TIMEOUT_S)
    request_id = new_id()
    started_s = time.monotonic()
    with httpx.Client(timeout=httpx.Timeout(TIMEOUT_S, read=2.0)) as client, pytest.raises(httpx.ReadTimeout):
        client.post(
            f"{gateway.gateway_url}/v1/chat/completions", json={**CHAT, **LONG}, headers={"x-request-id": request_id}
        )
    wait_idle(vllm_url, 10.0)
    gone_s = time.monotonic() - started_s
    record = record_of(gateway, request_id)
    assert (record.outcome, record.status, record.stream) == (Outcome.CLIENT_GONE, None, False)
    assert (record.response_tokens, record.token_source) == (None, TokenSource.NONE)
    assert record.elapsed_s is not None
    assert 1.9 < record.elapsed_s < gone_s
