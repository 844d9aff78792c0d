from __future__ import annotations

import asyncio
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import wave
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import anthropic
import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from replay.simulator.config import SimulatorConfig
from replay.simulator.faults import Fault, parse_fault
from replay.simulator.requests import ApiError, decode_body
from replay.simulator.server import build_app, running

HI = [{"role": "user", "content": "hi there"}]  # 4 + 2 tokens, and 2 for the generation prompt
FORCED: dict[str, Any] = {"max_tokens": 5, "ignore_eos": True}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"properties": {"city": {"type": "string"}}}}}]
SLOW = SimulatorConfig(step_base_s=0.01, kv_capacity_tokens=4096, max_model_len=4096, max_num_seqs=8)


@pytest.fixture(scope="module")
def fast() -> Iterator[httpx.Client]:
    with running(SimulatorConfig.fast(models=("one", "two"))) as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture
def slow() -> Iterator[httpx.Client]:
    with running(SLOW) as url, httpx.Client(base_url=url) as client:
        yield client


def chat(client: httpx.Client, fault: str = "", **body: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": HI, **body}, headers={"x-sim-fault": fault})


def events(response: httpx.Response) -> list[Any]:
    """The payloads of a `data:` stream; `[DONE]` as None."""
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.text.endswith("\n\n")
    lines = [line for line in response.text.split("\n") if line and not line.startswith("event: ")]
    assert all(line.startswith("data: ") for line in lines)
    return [None if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def stats(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/stats").json()
    return found


def wait_for(client: httpx.Client, **expected: int) -> None:
    """Waits until /stats says so, at most 2 s."""
    deadline = time.monotonic() + 2
    while not expected.items() <= stats(client).items():
        assert time.monotonic() < deadline, f"expected {expected}, got {stats(client)}"
        time.sleep(0.005)


def masked(value: Any) -> Any:
    """A body with what differs from run to run, and the texts, taken out. Field order is kept as a list of pairs."""
    if isinstance(value, dict):
        volatile = {"id", "created", "created_at", "content", "text", "delta", "item_id", "system_fingerprint", "bytes"}
        return [
            (name, masked(item) if isinstance(item, (dict, list)) else "*" if name in volatile and item else item)
            for name, item in value.items()
        ]
    return [masked(item) for item in value] if isinstance(value, list) else value


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_chat_unary_is_vllm_s_body(fast: httpx.Client) -> None:
    response = chat(fast, model="any/name", **FORCED)
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    text = body["choices"][0]["message"]["content"]
    assert len(text.split()) == 5
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{16}", body["id"])
    message = f'"role":"assistant","content":"{text}","refusal":null,"annotations":null,"audio":null'
    assert response.text == (
        f'{{"id":"{body["id"]}","object":"chat.completion","created":{body["created"]},"model":"any/name","choices":['
        f'{{"index":0,"message":{{{message},"function_call":null,"reasoning":null}},"logprobs":null,'
        '"finish_reason":"length","stop_reason":null,"token_ids":null,"routed_experts":null}],"service_tier":null,'
        f'"system_fingerprint":"{body["system_fingerprint"]}","usage":{{"prompt_tokens":8,"total_tokens":13,'
        '"completion_tokens":5,"prompt_tokens_details":null,"completion_tokens_details":null},"prompt_logprobs":null,'
        '"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}'
    )


def test_chat_stream_is_vllm_s_events(fast: httpx.Client) -> None:
    options = {"include_usage": True}
    body = {
        "messages": HI,
        "model": "m",
        "max_tokens": 2,
        "ignore_eos": True,
        "stream": True,
        "stream_options": options,
    }
    response = fast.post("/v1/chat/completions", json=body, headers={"x-request-id": 'a"1'})
    created = events(response)[0]["created"]
    fingerprint = events(response)[-2]["system_fingerprint"]
    first, second = (event["choices"][0]["delta"]["content"] for event in events(response)[1:3])
    assert first
    assert second.startswith(" ")
    head = f'data: {{"id":"chatcmpl-a\\"1","object":"chat.completion.chunk","created":{created},"model":"m"'
    assert response.text == (
        f'{head},"choices":[{{"index":0,"delta":{{"role":"assistant","content":""}},"logprobs":null,'
        '"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}\n\n'
        f'{head},"choices":[{{"index":0,"delta":{{"content":"{first}"}},"logprobs":null,"finish_reason":null,'
        '"token_ids":null}]}\n\n'
        f'{head},"choices":[{{"index":0,"delta":{{"content":"{second}"}},"logprobs":null,"finish_reason":"length",'
        '"stop_reason":null,"token_ids":null}]}\n\n'
        f'{head},"choices":[],"usage":{{"prompt_tokens":8,"total_tokens":10,"completion_tokens":2}},'
        f'"system_fingerprint":"{fingerprint}"}}\n\n'
        "data: [DONE]\n\n"
    )


def test_without_include_usage_the_last_chunk_has_the_fingerprint_and_no_usage_comes(fast: httpx.Client) -> None:
    chunks = events(chat(fast, stream=True, **FORCED))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 5 + ["length"]
    assert [name for chunk in chunks[:-1] for name in chunk if name in ("usage", "system_fingerprint")] == [
        "system_fingerprint"
    ]
    assert chunks[-1] is None


def test_continuous_usage_is_cumulative_and_an_answer_s_own(fast: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(chat(fast, stream=True, n=2, stream_options=options, **FORCED))
    for index in (0, 1):
        own = [chunk["usage"] for chunk in chunks[:-2] if chunk["choices"][0]["index"] == index]
        assert [usage["completion_tokens"] for usage in own] == [0, 1, 2, 3, 4, 5]
        assert {usage["prompt_tokens"] for usage in own} == {8}
    assert chunks[-2]["usage"] == {"prompt_tokens": 8, "total_tokens": 18, "completion_tokens": 10}


def test_completions_of_several_prompts(fast: httpx.Client) -> None:
    body = {"prompt": ["a b c", "d"], "n": 2, "max_tokens": 3, "ignore_eos": True}
    whole = fast.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert whole["usage"]["prompt_tokens"] == 4
    assert whole["usage"]["completion_tokens"] == 12
    chunks = events(
        fast.post("/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}})
    )
    texts = ["".join(c["choices"][0]["text"] for c in chunks[:-2] if c["choices"][0]["index"] == i) for i in range(4)]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert len(set(texts)) == 4
    assert chunks[-2]["usage"] == {"prompt_tokens": 4, "total_tokens": 16, "completion_tokens": 12}


@pytest.mark.parametrize(("prompt", "tokens"), [("a b", 2), ([5, 6, 7], 3), ([[5], [6, 7]], 3), (["a"], 1)])
def test_prompts_of_every_kind(fast: httpx.Client, prompt: Any, tokens: int) -> None:
    usage = fast.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == tokens


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 3},
        {"include_reasoning": True},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"tools": TOOLS, "tool_choice": "required"},
        {"logprobs": True, "top_logprobs": 2},
    ],
)
@pytest.mark.parametrize("fault", ["", "cut", "multi=3", "multi=1000,cut"])
def test_streamed_and_unary_answers_are_equal(fast: httpx.Client, extra: dict[str, Any], fault: str) -> None:
    body = {"max_tokens": 20, "ignore_eos": True, **extra}
    whole = chat(fast, **body).json()
    chunks = events(chat(fast, fault, stream=True, stream_options={"include_usage": True}, **body))
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks[:-2] if c["choices"][0]["index"] == choice["index"]]
        message = choice["message"]
        for name in ("content", "reasoning"):
            assert "".join(part["delta"].get(name) or "" for part in own) == (message[name] or "")
        calls = [call for part in own for call in part["delta"].get("tool_calls", [])]
        for call in message.get("tool_calls", []):
            assert calls[0]["function"]["name"] == call["function"]["name"] == "look"
            arguments = "".join(part["function"].get("arguments", "") for part in calls)
            assert arguments == call["function"]["arguments"]
            assert list(json.loads(arguments)) == ["city"]
        if choice["logprobs"] is not None:
            logprobs = [entry for part in own if part["logprobs"] for entry in part["logprobs"]["content"]]
            assert logprobs == choice["logprobs"]["content"]
            assert "".join(entry["token"] for entry in logprobs) == message["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-2]["usage"][name] == whole["usage"][name]
    if whole["usage"]["completion_tokens_details"] is not None:
        assert chunks[-2]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 10}


def test_each_token_is_an_event_of_its_own_and_no_two_are_equal(fast: httpx.Client) -> None:
    chunks = events(chat(fast, stream=True, max_tokens=300, ignore_eos=True))
    contents = [chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:-1]]
    assert len(contents) == len(set(contents)) == 300


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "look"}}, "stop")],
)
def test_a_tool_call_ends_with_vllm_s_reason(fast: httpx.Client, choice: Any, reason: str) -> None:
    body = chat(fast, tools=TOOLS, tool_choice=choice, max_tokens=4000).json()["choices"][0]
    assert body["finish_reason"] == reason
    assert body["message"]["content"] == ""


def test_lengths_without_ignore_eos(fast: httpx.Client) -> None:
    bodies = [chat(fast, max_tokens=150, user=str(number)).json() for number in range(60)]
    by_reason = {"stop": [0], "length": [0]}
    for body in bodies:
        by_reason[body["choices"][0]["finish_reason"]].append(body["usage"]["completion_tokens"])
    assert set(by_reason["length"]) == {0, 150}
    assert len(set(by_reason["stop"])) > 10
    assert max(by_reason["stop"]) <= 150
    assert chat(fast, max_tokens=150, min_tokens=150).json()["usage"]["completion_tokens"] == 150


def test_one_body_one_answer(fast: httpx.Client) -> None:
    contents = [chat(fast, seed=seed).json()["choices"][0]["message"]["content"] for seed in (0, 0, 1)]
    assert contents[0] == contents[1] != contents[2]
    with running(SimulatorConfig.fast(seed=1)) as url, httpx.Client(base_url=url) as other:
        assert chat(other, seed=0).json()["choices"][0]["message"]["content"] != contents[0]


def test_responses(fast: httpx.Client) -> None:
    body = {"input": "hi there", "max_output_tokens": 3, "ignore_eos": True, "instructions": "be kind"}
    whole = fast.post("/v1/responses", json=body).json()
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (whole["usage"]["input_tokens"], whole["usage"]["output_tokens"], whole["usage"]["total_tokens"]) == (
        14,
        3,
        17,
    )
    stream = events(fast.post("/v1/responses", json={**body, "stream": True}))
    assert [event["type"].removeprefix("response.") for event in stream] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 3,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in stream] == list(range(11))
    assert stream[-1]["response"]["usage"] == whole["usage"]
    text = "".join(event["delta"] for event in stream if event["type"].endswith("text.delta"))
    assert text == whole["output"][0]["content"][0]["text"] == stream[-4]["text"]


def test_messages(fast: httpx.Client) -> None:
    body = {"model": "m", "messages": HI, "max_tokens": 3, "ignore_eos": True, "system": "be kind"}
    whole = fast.post("/v1/messages", json=body).json()
    assert whole["usage"] == {"input_tokens": 14, "output_tokens": 3}
    assert whole["stop_reason"] == "max_tokens"
    stream = events(fast.post("/v1/messages", json={**body, "stream": True}))
    assert [event["type"] for event in stream] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert stream[0]["message"]["usage"] == {"input_tokens": 14, "output_tokens": 0}
    assert stream[-2]["usage"] == whole["usage"]
    assert "".join(event["delta"]["text"] for event in stream[2:5]) == whole["content"][0]["text"]
    assert fast.post("/v1/messages/count_tokens", json=body).json()["input_tokens"] == 14


def test_cached_tokens_on_demand(fast: httpx.Client) -> None:
    details = {"cached_tokens": 5, "created_cache_tokens": 0, "multimodal_tokens": None}
    assert chat(fast, "cached=5", **FORCED).json()["usage"]["prompt_tokens_details"] == details
    chunks = events(chat(fast, "cached=99", stream=True, stream_options={"include_usage": True}, **FORCED))
    assert chunks[-2]["usage"]["prompt_tokens_details"] == {"cached_tokens": 8, "created_cache_tokens": 0}
    with running(SimulatorConfig.fast(prompt_tokens_details=True)) as url:
        usage = httpx.post(f"{url}/v1/chat/completions", json={"messages": HI}).json()["usage"]
        assert usage["prompt_tokens_details"] == {**details, "cached_tokens": 0}


@pytest.mark.parametrize(
    ("path", "body", "prompt_tokens", "results"),
    [
        ("/v1/embeddings", {"input": "a b c"}, 3, 1),
        ("/v1/embeddings", {"input": ["a b", [7, 8, 9], "c"]}, 6, 3),
        ("/v1/embeddings", {"input": [7, 8]}, 2, 1),
        ("/pooling", {"input": ["a", "b c"]}, 3, 2),
        ("/classify", {"input": ["a", "b c"]}, 3, 2),
        ("/v1/score", {"text_1": "q q", "text_2": ["a", "b c"]}, 7, 2),
        ("/score", {"queries": ["q", "r"], "documents": ["a", "b"]}, 4, 2),
        ("/rerank", {"query": "q", "documents": ["a", "b", "c c"], "top_n": 2}, 7, 2),
        ("/v2/rerank", {"query": "q", "documents": ["a"]}, 2, 1),
    ],
)
def test_pooling_routes(fast: httpx.Client, path: str, body: dict[str, Any], prompt_tokens: int, results: int) -> None:
    answer = fast.post(path, json={"model": "emb", **body}).json()
    assert answer["model"] == "emb"
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == prompt_tokens
    found = answer["data"] if "data" in answer else answer["results"]
    assert len(found) == results
    if "results" in answer:
        scores = [result["relevance_score"] for result in found]
        assert scores == sorted(scores, reverse=True)


def _wav(seconds: float) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(8000)
        writer.writeframes(b"\0\0" * int(8000 * seconds))
    return buffer.getvalue()


def test_transcription(fast: httpx.Client) -> None:
    files = {"file": ("a.wav", _wav(2.5), "audio/wav")}
    path = "/v1/audio/transcriptions"
    whole = fast.post(path, files=files, data={"model": "whisper"}).json()
    assert whole["usage"] == {"type": "duration", "seconds": 3}
    form = {"model": "whisper", "stream": "true", "stream_include_usage": "true", "max_completion_tokens": "4"}
    stream = events(fast.post(path, files=files, data=form))
    assert stream[-2]["usage"]["prompt_tokens"] == 125
    assert stream[0]["object"] == "transcription.chunk"
    refused = fast.post(path, files=files, data={"stream_include_usage": "1"})
    assert refused.json()["error"]["param"] == "stream_include_usage"
    assert fast.post(path, content=b"\xff", headers={"content-type": "multipart/form-data"}).status_code == 400


def test_the_small_routes(fast: httpx.Client) -> None:
    assert fast.get("/health").content == b""
    assert fast.post("/ping").status_code == fast.get("/ping").status_code == 200
    assert fast.get("/version").json() == {"version": "0.32.0"}
    models = fast.get("/v1/models").json()["data"]
    assert [(card["id"], card["max_model_len"]) for card in models] == [("one", 16384), ("two", 16384)]
    assert chat(fast, **FORCED).json()["model"] == "one"


@given(st.lists(st.text(max_size=40), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_tokenize_agrees_with_usage(fast: httpx.Client, texts: list[str]) -> None:
    messages = [{"role": "user", "content": text} for text in texts]
    counted = fast.post("/tokenize", json={"messages": messages, "return_token_strs": True}).json()
    assert counted["count"] == len(counted["tokens"]) == len(counted["token_strs"])
    usage = chat(fast, messages=messages, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens"] == counted["count"]
    plain = fast.post("/tokenize", json={"prompt": texts[0], "add_special_tokens": True}).json()
    if plain["count"]:
        usage = fast.post("/v1/completions", json={"prompt": texts[0], "max_tokens": 1}).json()["usage"]
        assert usage["prompt_tokens"] == plain["count"]
        back = fast.post("/detokenize", json={"tokens": plain["tokens"]}).json()["prompt"]
        assert fast.post("/tokenize", json={"prompt": back}).json()["tokens"] == plain["tokens"]


# --- errors ---------------------------------------------------------------------------------------------------------

MISSING = "1 validation error:\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', 'input': "
TOO_LONG = (
    "This model's maximum context length is 16384 tokens. However, your prompt contains at least 16385 input tokens"
)


@pytest.mark.parametrize(
    ("body", "kind", "param", "message"),
    [
        (b"{bad", "Bad Request", "body.1", "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.1', 'msg'"),
        (b"", "Bad Request", "body", "1 validation error:\n  {'type': 'missing', 'loc': 'body', 'msg'"),
        (b'{"a":"\xff"}', "Bad Request", None, "There was an error parsing the body"),
        (b"[" * 100_000, "Bad Request", None, "There was an error parsing the body"),
        (b"[]", "Bad Request", "body", "1 validation error:\n  {'type': 'model_attributes_type', 'loc': 'body'"),
        (b'{"model":"\\ud800","messages":[]}', "Bad Request", "body", "1 validation error:\n  {'type': 'string_unic"),
        ({}, "Bad Request", "body.messages", MISSING + "'<dict of 0 items>'}"),
        ({"messages": []}, "BadRequestError", None, "Cannot apply chat template to an empty conversation."),
        ({"messages": "x"}, "Bad Request", "body.messages", "1 validation error:\n  {'type': 'list_type', 'loc'"),
        ({"messages": [1]}, "Bad Request", "body.messages.0", "1 validation error:\n  {'type': 'dict_type', 'loc'"),
        ({"messages": [{"content": "x"}]}, "Bad Request", "body.messages.0.role", "1 validation error:\n  {'type': 'm"),
        (
            {"max_tokens": 0},
            "BadRequestError",
            "max_tokens",
            "max_tokens must be at least 1, got 0. (parameter=max_tok",
        ),
        ({"max_tokens": "x"}, "Bad Request", "body.max_tokens", "1 validation error:\n  {'type': 'int_parsing', 'loc'"),
        ({"max_tokens": 1.5}, "Bad Request", "body.max_tokens", "1 validation error:\n  {'type': 'int_from_float', '"),
        (
            {"max_tokens": 99999},
            "BadRequestError",
            "max_tokens",
            "max_tokens=99999 cannot be greater than max_model_len",
        ),
        ({"max_tokens": 10**30}, "BadRequestError", "max_tokens", "max_tokens=1000000000000000000000000000000 cannot"),
        ({"n": 0}, "BadRequestError", None, "n must be at least 1, got 0."),
        ({"n": 10**6}, "BadRequestError", "n", "n must be at most 16384, got 1000000."),
        ({"min_tokens": 5, "max_tokens": 3}, "BadRequestError", None, "min_tokens must be less than or equal to max_"),
        ({"temperature": -1}, "BadRequestError", "temperature", "temperature must be non-negative, got -1.0. (param"),
        ({"top_p": 2}, "BadRequestError", "top_p", "top_p must be in (0, 1], got 2.0. (parameter=top_p, value=2.0)"),
        ({"stream": 7}, "Bad Request", "body.stream", "1 validation error:\n  {'type': 'bool_type', 'loc': 'body.str"),
        (
            {"stream_options": {}},
            "BadRequestError",
            "stream_options",
            "Stream options can only be defined when `stream",
        ),
        ({"top_logprobs": 3}, "BadRequestError", "top_logprobs", "when using `top_logprobs`, `logprobs` must be set"),
        (
            {"tool_choice": "required"},
            "BadRequestError",
            "tool_choice",
            "When using `tool_choice`, `tools` must be set.",
        ),
        ({"messages": [{"role": "user", "content": "a " * 16400}]}, "BadRequestError", "input_tokens", TOO_LONG),
    ],
)
def test_errors(fast: httpx.Client, body: bytes | dict[str, Any], kind: str, param: str | None, message: str) -> None:
    if isinstance(body, dict) and body and "messages" not in body:
        body = {"messages": HI, **body}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = fast.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"], error["param"]) == (400, 400, kind, param)
    assert error["message"].startswith(message)


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("GET", "/nope", 404, {"detail": "Not Found"}),
        ("POST", "/v1/chat/completions/", 404, {"detail": "Not Found"}),
        ("GET", "/v1/chat/completions", 405, {"detail": "Method Not Allowed"}),
        ("DELETE", "/v1/models", 405, {"detail": "Method Not Allowed"}),
    ],
)
def test_routes_that_are_not_there(fast: httpx.Client, method: str, path: str, status: int, body: Any) -> None:
    response = fast.request(method, path)
    assert (response.status_code, response.json()) == (status, body)
    assert (response.headers.get("allow") is not None) == (status == 405)


def test_a_media_type_that_is_not_json_is_refused(fast: httpx.Client) -> None:
    error = fast.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}).json()["error"]
    assert error["message"] == "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"


def test_messages_errors_are_anthropic_s(fast: httpx.Client) -> None:
    body = {"model": "m", "messages": HI, "max_tokens": 99999}
    assert fast.post("/v1/messages", json=body).json()["error"].keys() == {"type", "message"}
    assert fast.post("/v1/messages", json={"model": "m", "messages": HI}).json()["error"]["param"] == "body.max_tokens"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "messages",
    "prompt",
    "input",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n",
    "min_tokens",
    "ignore_eos",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "temperature",
    "top_p",
    "tools",
    "tool_choice",
    "include_reasoning",
    "query",
    "documents",
    "text_1",
    "text_2",
    "tokens",
    "dimensions",
    "encoding_format",
    "top_n",
    "system",
    "instructions",
    "echo",
    "model",
    "request_id",
    "user",
]


@given(
    st.sampled_from(
        [
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/responses",
            "/v1/messages",
            "/v1/embeddings",
            "/score",
            "/rerank",
            "/tokenize",
            "/detokenize",
            "/classify",
            "/v1/messages/count_tokens",
        ]
    ),
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_rubbish_is_answered_with_200_or_400(
    fast: httpx.Client, path: str, body: dict[str, Any], completed: bool
) -> None:
    if completed:  # get past the first objection
        body = {"messages": HI, "prompt": "a", "input": "a", "max_tokens": 3, "max_output_tokens": 3} | body
    content = json.dumps(body).encode()
    response = fast.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400), response.text


@given(st.binary(max_size=30))
def test_any_bytes_are_an_object_or_an_api_error(content: bytes) -> None:
    try:
        assert isinstance(decode_body(content), dict)
    except ApiError as error:
        assert error.status == 400  # noqa: PT017


# --- timing, aborts, counters ---------------------------------------------------------------------------------------


def _raw_request(client: httpx.Client, fault: str = "", **body: Any) -> socket.socket:
    url = client.base_url
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.connect((url.host, url.port or 0))
    content = json.dumps({"messages": HI, **body}).encode()
    head = (
        f"host: x\r\nx-sim-fault: {fault}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + content)
    return connection


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_aborts_its_sequences_within_50_ms(slow: httpx.Client, streamed: bool) -> None:
    def took_s(number: int) -> float:
        connection = _raw_request(slow, max_tokens=4000, ignore_eos=True, stream=streamed, n=2)
        wait_for(slow, running=2, accepted=number)
        if streamed:
            connection.recv(1000)
        connection.close()
        left_s = time.monotonic()
        wait_for(slow, aborted=number, running=0, in_flight=0)
        return time.monotonic() - left_s

    assert min(map(took_s, range(1, 6))) < 0.05
    assert stats(slow)["kv_usage"] == 0
    assert stats(slow)["finished"] == 0


def test_a_client_that_leaves_while_it_waits_frees_its_place(slow: httpx.Client) -> None:
    held = [_raw_request(slow, max_tokens=4000, ignore_eos=True, n=8, stream=True)]
    wait_for(slow, running=8)
    held.append(_raw_request(slow, max_tokens=4000, ignore_eos=True))
    wait_for(slow, waiting=1)
    held.pop().close()
    wait_for(slow, waiting=0, aborted=1, running=8)
    held.pop().close()
    wait_for(slow, running=0, aborted=2, finished=0, accepted=2)


def test_many_clients_that_leave_are_all_counted(slow: httpx.Client) -> None:
    connections = [_raw_request(slow, max_tokens=4000, ignore_eos=True, stream=n % 2 == 0) for n in range(100)]
    wait_for(slow, accepted=100)
    for connection in connections:
        connection.close()
    wait_for(slow, aborted=100, in_flight=0, running=0, waiting=0, finished=0)
    assert stats(slow)["max_running"] == 8


def test_a_client_that_stops_reading_and_leaves_is_counted(fast: httpx.Client) -> None:
    before = stats(fast)
    # 10 MB of events: more than the sockets' buffers hold, so the server waits in the middle of a write.
    with _raw_request(fast, max_tokens=1000, ignore_eos=True, stream=True, n=50):
        wait_for(fast, in_flight=1, running=0, generation_tokens=before["generation_tokens"] + 50_000)
    wait_for(fast, in_flight=0, aborted=before["aborted"] + 1, finished=before["finished"])


def test_a_client_that_leaves_keeps_no_task_behind() -> None:
    with running(SLOW) as url, httpx.Client(base_url=url) as client:
        with _raw_request(client, "stall_after=2", max_tokens=4000, ignore_eos=True, stream=True):
            wait_for(client, running=1)
            time.sleep(0.1)
        wait_for(client, in_flight=0, aborted=1)
        left_s = time.monotonic()
    # A task that still served this client would hold up the end of the server for its 2 s of grace.
    assert time.monotonic() - left_s < 1


def test_the_application_runs_in_process_without_lifespan() -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(build_app(SimulatorConfig.fast()))
        async with httpx.AsyncClient(transport=transport, base_url="http://simulated") as client:
            return await client.post("/v1/chat/completions", json={"messages": HI, "stream": True, **FORCED})

    assert len(events(asyncio.run(ask()))) == 7


def test_steps_take_their_time(slow: httpx.Client) -> None:
    def took_s() -> float:
        started_s = time.monotonic()
        assert chat(slow, max_tokens=31, ignore_eos=True).status_code == 200
        return time.monotonic() - started_s

    # 31 steps of 10 ms, and what the sequence adds. A machine that is busy with other things adds to it, too.
    assert min(took_s() for _ in range(8)) == pytest.approx(0.312, abs=0.1)


def test_metrics_and_stats_agree(slow: httpx.Client) -> None:
    chat(slow, max_tokens=6, ignore_eos=True)
    chat(slow, max_tokens=4, ignore_eos=True, n=2, stream=True)
    slow.post("/v1/embeddings", json={"input": "a b c"})
    response = slow.get("/metrics")
    samples = {
        (sample.name, sample.labels.get("finished_reason")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }
    assert samples["vllm:num_requests_running", None] == samples["vllm:num_requests_waiting", None] == 0
    assert samples["vllm:kv_cache_usage_perc", None] == 0
    assert samples["vllm:num_preemptions_total", None] == 0
    assert samples["vllm:prompt_tokens_total", None] == 8 + 2 * 8 + 3
    assert samples["vllm:generation_tokens_total", None] == 6 + 2 * 4
    assert samples["vllm:request_success_total", "length"] == 3
    assert samples["vllm:request_success_total", "stop"] == 1
    assert samples["vllm:time_to_first_token_seconds_count", None] == 2
    assert samples["vllm:e2e_request_latency_seconds_count", None] == 3
    found = stats(slow)
    assert (found["accepted"], found["finished"], found["aborted"]) == (3, 3, 0)
    assert found["max_running"] == 2


def test_preemption_is_counted_and_every_answer_is_whole() -> None:
    config = SimulatorConfig.fast(kv_capacity_tokens=512, max_model_len=512)
    with running(config) as url, httpx.Client(base_url=url, timeout=20) as client:
        body = chat(client, n=20, max_tokens=200, ignore_eos=True).json()
        assert [len(choice["message"]["content"].split()) for choice in body["choices"]] == [200] * 20
        assert stats(client)["preempted"] > 0
        assert stats(client)["kv_usage"] == 0


def metric(client: httpx.Client, name: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    values = [sample.value for family in families for sample in family.samples if sample.name == name]
    assert len(values) == 1, name
    return values[0]


CACHED = SimulatorConfig.fast(enable_prefix_caching=True, prompt_tokens_details=True)


@pytest.mark.parametrize(
    ("path", "body", "find"),
    [
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "word " * 100}]},
            ["usage", "prompt_tokens_details", "cached_tokens"],
        ),
        ("/v1/completions", {"prompt": "word " * 106}, ["usage", "prompt_tokens_details", "cached_tokens"]),
        ("/v1/completions", {"prompt": list(range(106))}, ["usage", "prompt_tokens_details", "cached_tokens"]),
        ("/v1/responses", {"input": "word " * 100}, ["usage", "input_tokens_details", "cached_tokens"]),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "word " * 100}], "max_tokens": 9},
            ["usage", "cache_read_input_tokens"],
        ),
    ],
)
def test_the_second_of_two_equal_prompts_is_cached(path: str, body: dict[str, Any], find: list[str]) -> None:
    with running(CACHED) as url, httpx.Client(base_url=url) as client:
        for cached in (0, 96):  # 106 tokens are 6 full blocks
            found = client.post(path, json={"model": "m", **body}).json()
            for name in find:
                found = found[name]
            assert found == cached
        assert metric(client, "vllm:prefix_cache_queries_total") == stats(client)["prefix_queries"] == 212
        assert metric(client, "vllm:prefix_cache_hits_total") == stats(client)["prefix_hits"] == 96


def test_cached_tokens_of_a_stream_are_told_at_its_end() -> None:
    message = [{"role": "user", "content": "word " * 100}]
    with running(CACHED) as url, httpx.Client(base_url=url) as client:
        for cached in (0, 96):
            chunks = events(
                chat(client, messages=message, stream=True, stream_options={"include_usage": True}, n=2, **FORCED)
            )
            assert chunks[-2]["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
        # A conversation that goes on: the template wraps the answer, the earlier messages are found.
        longer = [*message, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "go on"}]
        usage = chat(client, messages=longer, **FORCED).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 96
        assert chat(client, "cached=7", messages=longer, **FORCED).json()["usage"]["prompt_tokens_details"] == {
            "cached_tokens": 7,
            "created_cache_tokens": 0,
            "multimodal_tokens": None,
        }


def test_without_prefix_caching_nothing_is_looked_for(fast: httpx.Client) -> None:
    chat(fast, **FORCED)
    assert (stats(fast)["prefix_queries"], stats(fast)["prefix_hits"]) == (0, 0)


def test_a_full_queue_refuses_with_503() -> None:
    config = SimulatorConfig(step_base_s=0.2, max_num_seqs=1, max_num_waiting=1)
    with running(config) as url, httpx.Client(base_url=url) as client:
        body = {"messages": HI, "stream": True, "max_tokens": 50, "ignore_eos": True}
        with client.stream("POST", "/v1/chat/completions", json=body):
            wait_for(client, running=1, waiting=0)
            with httpx.Client(base_url=url) as other, other.stream("POST", "/v1/chat/completions", json=body):
                wait_for(client, running=1, waiting=1)
                refused = chat(client)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, 503)
        wait_for(client, accepted=2, aborted=2, running=0, waiting=0)


def test_each_latency_has_its_histogram(slow: httpx.Client) -> None:
    chat(slow, max_tokens=6, ignore_eos=True)
    slow.post("/v1/embeddings", json={"input": "a b c"})
    for name, count in (
        ("inter_token_latency_seconds", 5),
        ("request_time_per_output_token_seconds", 1),
        ("request_prefill_time_seconds", 1),
        ("request_decode_time_seconds", 1),
        ("request_inference_time_seconds", 2),
        ("iteration_tokens_total", 7),
    ):
        assert metric(slow, f"vllm:{name}_count") == count, name
    # 5 steps of 10 ms and 50 us, later than that on a busy host.
    for name in ("inter_token_latency_seconds", "request_decode_time_seconds"):
        assert metric(slow, f"vllm:{name}_sum") == pytest.approx(5 * 0.01005, abs=0.03), name
    assert metric(slow, "vllm:request_time_per_output_token_seconds_sum") == pytest.approx(0.01005, abs=0.01)
    assert metric(slow, "vllm:iteration_tokens_total_sum") == 8 + 5 + 3
    assert 'vllm:cache_config_info{block_size="16",' in slow.get("/metrics").text
    assert 'num_gpu_blocks="256",num_gpu_blocks_override="None"' in slow.get("/metrics").text
    assert 'kv_cache_size_tokens="4096"' in slow.get("/metrics").text


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", Fault()),
        ("status=503", Fault(status=503)),
        (" multi=4 , cut=1,", Fault(multi=4, cut=True)),
        ("cut=0", Fault()),
        ("late_headers=0.5,reset_after=0", Fault(late_headers=0.5, reset_after=0)),
    ],
)
def test_fault_texts(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("explode", "x-sim-fault: explode: expected one of status, reset_before"),
        ("status=200", "x-sim-fault: status: expected an integer from 400 to 599, got '200'"),
        ("status=499", "x-sim-fault: status: expected a status that HTTP defines, got '499'"),
        ("reset_after=1.5", "x-sim-fault: reset_after: expected an integer from 0 to 2.14748e+09, got '1.5'"),
        ("late_headers=nan", "x-sim-fault: late_headers: expected a number from 0 to 3600, got 'nan'"),
    ],
)
def test_faults_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ApiError, match=re.escape(message)):
        parse_fault(text)


def test_status_fault_by_header_and_query(fast: httpx.Client) -> None:
    assert chat(fast, "status=503").status_code == 503
    response = fast.get("/v1/models?x-sim-fault=status%3D429")
    assert response.json()["error"]["code"] == response.status_code == 429


def test_reset_before_the_first_byte(fast: httpx.Client) -> None:
    for streamed in (True, False):
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            chat(fast, "reset_before", stream=streamed)


def test_reset_after_events(fast: httpx.Client) -> None:
    with _raw_request(fast, "reset_after=3", stream=True, **FORCED) as connection:
        received = b""
        end = "closed"
        try:
            while piece := connection.recv(65536):
                received += piece
        except ConnectionResetError:
            end = "reset"
        assert end == "reset"
        assert received.count(b"data: ") == 3
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        chat(fast, "reset_after=1")


def test_stall_counts_as_an_abort_when_the_client_gives_up(slow: httpx.Client) -> None:
    for fault, streamed in (("stall_before", False), ("stall_before", True), ("stall_after=2", True)):
        before = stats(slow)["aborted"]
        with pytest.raises(httpx.ReadTimeout):
            slow.post(
                "/v1/chat/completions",
                json={"messages": HI, "stream": streamed, **FORCED},
                headers={"x-sim-fault": fault},
                timeout=0.2,
            )
        wait_for(slow, aborted=before + 1, in_flight=0)


def test_no_usage_is_an_old_server(fast: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(chat(fast, "no_usage", stream=True, stream_options=options, **FORCED))
    assert not any("usage" in chunk for chunk in chunks[:-1])


def test_late_headers(fast: httpx.Client) -> None:
    started_s = time.monotonic()
    assert chat(fast, "late_headers=0.3", **FORCED).status_code == 200
    assert time.monotonic() - started_s > 0.3


def test_multi_puts_several_tokens_in_an_event(fast: httpx.Client) -> None:
    chunks = events(chat(fast, "multi=4", stream=True, max_tokens=10, ignore_eos=True))
    assert [len(chunk["choices"][0]["delta"]["content"].split()) for chunk in chunks[1:-1]] == [4, 4, 2]


def test_cut_splits_events_at_odd_positions(fast: httpx.Client) -> None:
    url, content = fast.base_url, json.dumps({"messages": HI, "stream": True, **FORCED}).encode()
    with socket.create_connection((url.host, url.port or 0)) as connection:
        head = f"content-type: application/json\r\nconnection: close\r\ncontent-length: {len(content)}\r\n\r\n"
        connection.sendall(
            b"POST /v1/chat/completions?x-sim-fault=cut HTTP/1.1\r\nhost: x\r\n" + head.encode() + content
        )
        raw = b"".join(iter(lambda: connection.recv(65536), b""))
    body = raw.partition(b"\r\n\r\n")[2]
    sizes = []
    while body:
        size, _, body = body.partition(b"\r\n")
        sizes.append(int(size, 16))
        body = body[sizes[-1] + 2 :]
    assert sizes[:6] == [1, 3, 5, 7, 9, 11]


# --- clients and command line ---------------------------------------------------------------------------------------


def test_the_openai_and_anthropic_clients_understand_it(fast: httpx.Client) -> None:
    url = str(fast.base_url)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
            max_tokens=5,
            extra_body={"ignore_eos": True},
        )
        usages = [chunk.usage for chunk in stream]
        assert usages[-1] is not None
        assert usages[-1].completion_tokens == 5
        assert len(client.embeddings.create(model="m", input="a").data[0].embedding) == 64
        assert client.responses.create(model="m", input="hi").usage is not None
    with anthropic.Anthropic(base_url=url, api_key="none") as other:
        message = other.messages.create(model="m", max_tokens=4, messages=[{"role": "user", "content": "hi"}])
        assert message.usage.input_tokens == 7


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "replay.simulator", *arguments], capture_output=True, text=True, timeout=30, check=False
    )


def test_help_names_every_flag_with_its_default() -> None:
    result = _command("--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    for entry in fields(SimulatorConfig):
        assert f"--{entry.name.replace('_', '-')}" in text
    assert text.count("(default: ") == len(fields(SimulatorConfig)) + 2


def test_a_port_in_use_is_one_line_and_status_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = _command("--port", str(port))
    assert result.returncode == 2
    assert result.stderr == f"burstgate: simulator: cannot listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-num-seqs", "0"], "burstgate: simulator: max_num_seqs: expected at least 1, got 0"),
        (
            ["--kv-capacity-tokens", "100"],
            "burstgate: simulator: kv_capacity_tokens: expected blocks of 16 for at least max_mod",
        ),
        (
            ["--prefill-tokens-per-s", "nan"],
            "burstgate: simulator: prefill_tokens_per_s: expected a finite number > 0, got nan",
        ),
        (["--port", "99999"], "burstgate: simulator: cannot listen on 127.0.0.1:99999: "),
        (["--host", "no.such.invalid"], "burstgate: simulator: cannot listen on no.such.invalid:8000: "),
    ],
)
def test_wrong_values_are_one_line_and_status_2(arguments: list[str], message: str) -> None:
    result = _command(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_the_process_starts_on_a_free_port_and_stops_on_sigterm() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "replay.simulator", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.rsplit(" ", 1)[1].strip()
        assert httpx.get(f"{url}/health").status_code == 200
        process.terminate()
        process.wait(timeout=10)


# --- real vLLM ------------------------------------------------------------------------------------------------------

COMPARED = [
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 3, "ignore_eos": True, "temperature": 0}),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 2, "ignore_eos": True, "n": 2}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 3, "ignore_eos": True, "temperature": 0}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "ignore_eos": True}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 40, "ignore_eos": True}),
    ("/v1/messages", {"messages": HI, "max_tokens": 40}),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"stream": True},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 0}),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": "x"}),
    ("/v1/chat/completions", {"messages": HI, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {}),
    ("/v1/completions", {"prompt": "a", "n": 0}),
    ("/v1/messages", {"model": "m", "messages": HI}),
    ("/v1/responses", {}),
]


def _shape(value: Any) -> Any:
    """A body with every string that is content, every number and every id replaced; names and order kept."""
    if isinstance(value, dict):
        return [
            (name, "*" if name in ("root", "signature", "system_fingerprint", "phase") else _shape(item))
            for name, item in value.items()
        ]
    if isinstance(value, list):
        return [_shape(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    return type(value).__name__ if not isinstance(value, (int, float)) else "number"


def _shapes(response: httpx.Response) -> list[Any]:
    """The shapes of a response's events without those that are repeated: real tokens may have no text of their own."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return [response.status_code, _shape(response.json())]
    distinct: list[Any] = []
    for event in events(response):
        shape = None if event is None else [event.get("type"), _shape(event)]
        if shape not in distinct:
            distinct.append(shape)
    return [response.status_code, *distinct]


@pytest.mark.vllm
@pytest.mark.skipif("BURSTGATE_VLLM_URL" not in os.environ, reason="BURSTGATE_VLLM_URL names no real vLLM")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("path", "body"), COMPARED)
def test_shapes_are_those_of_real_vllm(fast: httpx.Client, path: str, body: Any, options: dict[str, Any]) -> None:
    if "stream_options" in options and path in ("/v1/responses", "/v1/messages"):
        pytest.skip("the route has no stream_options")
    with httpx.Client(base_url=os.environ["BURSTGATE_VLLM_URL"], timeout=60) as real:
        asked = {**body, **options, "model": real.get("/v1/models").json()["data"][0]["id"]}
        expected = _shapes(real.post(path, json=asked))
    assert _shapes(fast.post(path, json=asked)) == expected


@pytest.mark.vllm
@pytest.mark.skipif("BURSTGATE_VLLM_URL" not in os.environ, reason="BURSTGATE_VLLM_URL names no real vLLM")
@pytest.mark.parametrize(("path", "body"), REFUSED)
def test_errors_are_those_of_real_vllm(fast: httpx.Client, path: str, body: dict[str, Any]) -> None:
    with httpx.Client(base_url=os.environ["BURSTGATE_VLLM_URL"], timeout=60) as real:
        expected = real.post(path, json=body)
    answer = fast.post(path, json=body)
    assert (answer.status_code, answer.text) == (expected.status_code, expected.text)
