"""What vLLM 0.32 writes: response bodies and stream events, byte for byte in its field names and their order. Pure.

A `StreamWriter` turns the tokens of one request into server-sent events:
- `preamble()` goes out with the headers, before any token exists;
- `opening()` goes out with the first token;
- `event(answer, first, last)` is one event that holds the tokens from first to last - 1 of one answer; with the last
  token of an answer it carries the finish reason;
- `closing()` ends the stream: usage when it was asked for, and `[DONE]` where the route has one.
A unary response is `whole(generation, ...)`. Every token of the answers has its own text, so a plain stream has exactly
one event a token.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from replay.simulator.requests import Answer, ApiError, Generation, Pooling
from replay.simulator.text import vector

VLLM_VERSION = "0.32.0"
FINGERPRINT = f"vllm-{VLLM_VERSION}-51b0a7e5"
DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.encode
Fields = dict[str, Any]


@dataclass(slots=True)
class Identity:
    """What a response says of itself, besides its content. Not frozen: what was cached is known after the preamble."""

    id: str
    """Without the route's prefix."""
    created_s: int
    cached_tokens: int | None = None
    """None when usage has no prompt_tokens_details. It is read when usage is written, at the end."""


class StreamWriter(Protocol):
    """The events of one streamed response."""

    def preamble(self) -> list[bytes]:
        """Events sent before the first token exists."""

    def opening(self) -> list[bytes]:
        """Events sent together with the first token."""

    def event(self, answer: int, first: int, last: int) -> bytes:
        """The event of an answer's tokens first to last - 1."""

    def closing(self) -> list[bytes]:
        """Events sent after the last token."""


def stream_writer(family: str, generation: Generation, identity: Identity) -> StreamWriter:
    """The writer of a route family: chat, completion, responses, messages or transcription."""
    return _WRITERS[family](generation, identity)


def whole(family: str, generation: Generation, identity: Identity) -> bytes:
    """The body of a unary response."""
    return _encode(_WHOLES[family](generation, identity))


class _Chat:
    """chat.completion.chunk events."""

    def __init__(self, generation: Generation, identity: Identity) -> None:
        self._generation = generation
        self._identity = identity
        head = {
            "id": f"chatcmpl-{identity.id}",
            "object": "chat.completion.chunk",
            "created": identity.created_s,
            "model": generation.model,
        }
        self._head = b"data: " + _encode(head)[:-1]
        # One pair of constants an answer: almost every event of a stream is prefix + text + suffix.
        self._prefix = [
            self._head + b',"choices":[{"index":%d,"delta":' % index for index in range(len(generation.answers))
        ]

    def preamble(self) -> list[bytes]:
        return []

    def opening(self) -> list[bytes]:
        return [
            b"".join(
                (
                    prefix,
                    b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]',
                    self._continuous(answer, 0),
                    b',"prompt_token_ids":null,"prompt_text":null}\n\n',
                )
            )
            for prefix, answer in zip(self._prefix, self._generation.answers, strict=True)
        ]

    def event(self, answer: int, first: int, last: int) -> bytes:
        generation, content = self._generation, self._generation.answers[answer]
        if generation.logprobs is None and not generation.reasoning and content.tool is None:
            text = content.stream.text(first, last).encode()
            return b"".join((self._prefix[answer], b'{"content":"', text, b'"}', self._tail(content, first, last)))
        return b"".join(
            (self._prefix[answer], _encode(self._delta(answer, first, last)), self._tail(content, first, last))
        )

    def closing(self) -> list[bytes]:
        generation = self._generation
        if not generation.include_usage:
            return [DONE]
        usage = _stream_usage(generation, self._identity)
        return [
            b'%s,"choices":[],"usage":%s,"system_fingerprint":"%s"}\n\n' % (self._head, usage, FINGERPRINT.encode()),
            DONE,
        ]

    def _delta(self, answer: int, first: int, last: int) -> Fields:
        content = self._generation.answers[answer]
        if content.tool is not None:
            return _tool_delta(content, first, last, f"chatcmpl-tool-{self._identity.id[:15]}{answer:x}")
        split = min(max(content.reasoning_tokens, first), last)
        delta: Fields = {}
        if first < split:
            delta["reasoning"] = content.stream.text(first, split)
        if split < last:
            delta["content"] = content.stream.text(split, last)
        return delta

    def _tail(self, content: Answer, first: int, last: int) -> bytes:
        generation = self._generation
        if generation.logprobs is None:
            logprobs = b"null"
        else:
            logprobs = _encode(_chat_logprobs(content, first, last, generation.logprobs))
        if last < content.output_tokens:
            finish = b',"finish_reason":null,"token_ids":null}]'
            fingerprint = b""
        else:
            finish = b',"finish_reason":"%s","stop_reason":null,"token_ids":null}]' % content.finish_reason.encode()
            fingerprint = b"" if generation.include_usage else b',"system_fingerprint":"%s"' % FINGERPRINT.encode()
        return b"".join((b',"logprobs":', logprobs, finish, self._continuous(content, last), fingerprint, b"}\n\n"))

    def _continuous(self, content: Answer, tokens: int) -> bytes:
        if not self._generation.continuous_usage:
            return b""
        details = b"null"
        if self._generation.reasoning:
            details = b'{"reasoning_tokens":%d}' % min(tokens, content.reasoning_tokens)
        return b',"usage":%s,"completion_tokens_details":%s}' % (_usage_head(content.prompt_tokens, tokens), details)


class _Completion:
    """text_completion events."""

    def __init__(self, generation: Generation, identity: Identity) -> None:
        self._generation = generation
        self._identity = identity
        head = {
            "id": f"cmpl-{identity.id}",
            "object": "text_completion",
            "created": identity.created_s,
            "model": generation.model,
        }
        self._head = b"data: " + _encode(head)[:-1]

    def preamble(self) -> list[bytes]:
        return []

    def opening(self) -> list[bytes]:
        return []

    def event(self, answer: int, first: int, last: int) -> bytes:
        generation, content = self._generation, self._generation.answers[answer]
        text = _encode((content.echo if first == 0 else "") + content.stream.text(first, last))
        logprobs = b"null"
        if generation.logprobs is not None:
            logprobs = _encode(_completion_logprobs(content, first, last, generation.logprobs))
        ends = last == content.output_tokens
        finish = b'"%s"' % content.finish_reason.encode() if ends else b"null"
        usage = b""
        if generation.continuous_usage:
            usage = b',"usage":%s}' % _usage_head(content.prompt_tokens, last)
        fingerprint = b""
        if ends and not generation.include_usage:
            fingerprint = b',"system_fingerprint":"%s"' % FINGERPRINT.encode()
        return (
            b'%s,"choices":[{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s,"stop_reason":null,'
            b'"prompt_token_ids":null,"token_ids":null}]%s%s}\n\n'
            % (self._head, answer, text, logprobs, finish, usage, fingerprint)
        )

    def closing(self) -> list[bytes]:
        generation = self._generation
        if not generation.include_usage:
            return [DONE]
        usage = _stream_usage(generation, self._identity)
        return [
            b'%s,"choices":[],"usage":%s,"system_fingerprint":"%s"}\n\n' % (self._head, usage, FINGERPRINT.encode()),
            DONE,
        ]


class _Responses:
    """The typed events of /v1/responses."""

    def __init__(self, generation: Generation, identity: Identity) -> None:
        self._generation = generation
        self._identity = identity
        self._item_id = f"msg_{identity.id[:16]}"
        self._place = {"content_index": 0, "item_id": self._item_id, "output_index": 0}
        self._number = -1

    def preamble(self) -> list[bytes]:
        response = _response_fields(self._generation, self._identity, done=False)
        return [
            self._event("response.created", {"response": response}),
            self._event("response.in_progress", {"response": response}),
        ]

    def opening(self) -> list[bytes]:
        item: Fields = {
            "id": self._item_id,
            "content": [],
            "role": "assistant",
            "status": "in_progress",
            "type": "message",
            "phase": None,
        }
        part = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
        return [
            self._event("response.output_item.added", {"item": item, "output_index": 0}),
            self._event("response.content_part.added", {**self._place, "part": part}),
        ]

    def event(self, answer: int, first: int, last: int) -> bytes:
        text = self._generation.answers[answer].stream.text(first, last)
        fields = {"content_index": 0, "delta": text, "item_id": self._item_id, "logprobs": [], "output_index": 0}
        return self._event("response.output_text.delta", fields)

    def closing(self) -> list[bytes]:
        content = self._generation.answers[0]
        text = content.stream.text(0, content.output_tokens)
        item = _response_item(self._generation, self._identity)
        return [
            self._event("response.output_text.done", {**self._place, "logprobs": [], "text": text}),
            self._event("response.content_part.done", {**self._place, "part": item["content"][0]}),
            self._event("response.output_item.done", {"item": item, "output_index": 0}),
            self._event(
                "response.completed", {"response": _response_fields(self._generation, self._identity, done=True)}
            ),
        ]

    def _event(self, kind: str, fields: Fields) -> bytes:
        self._number += 1
        # vLLM writes the number before the type, and among the fields in alphabetical order.
        numbered = dict(sorted({**fields, "sequence_number": self._number, "type": kind}.items()))
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), _encode(numbered))


class _Messages:
    """Anthropic's events of /v1/messages."""

    def __init__(self, generation: Generation, identity: Identity) -> None:
        self._generation = generation
        self._identity = identity

    def preamble(self) -> list[bytes]:
        return []

    def opening(self) -> list[bytes]:
        message: Fields = {
            "id": f"chatcmpl-{self._identity.id}",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self._generation.model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": self._generation.prompt_tokens, "output_tokens": 0},
        }
        block = {"content_block": {"type": "text", "text": ""}, "index": 0}
        return [self._event("message_start", {"message": message}), self._event("content_block_start", block)]

    def event(self, answer: int, first: int, last: int) -> bytes:
        delta = {"type": "text_delta", "text": self._generation.answers[answer].stream.text(first, last)}
        return self._event("content_block_delta", {"delta": delta, "index": 0})

    def closing(self) -> list[bytes]:
        delta = {"stop_reason": _anthropic_reason(self._generation.answers[0]), "stop_sequence": None}
        usage = _anthropic_usage(self._generation, self._identity)
        return [
            self._event("content_block_stop", {"index": 0}),
            self._event("message_delta", {"delta": delta, "usage": usage}),
            self._event("message_stop", {}),
        ]

    def _event(self, kind: str, fields: Fields) -> bytes:
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), _encode({"type": kind, **fields}))


class _Transcription:
    """transcription.chunk events."""

    def __init__(self, generation: Generation, identity: Identity) -> None:
        self._generation = generation
        self._identity = identity

    def preamble(self) -> list[bytes]:
        return []

    def opening(self) -> list[bytes]:
        return []

    def event(self, answer: int, first: int, last: int) -> bytes:
        content = self._generation.answers[answer]
        choice: Fields = {"delta": {"content": content.stream.text(first, last)}}
        if last == content.output_tokens:
            choice |= {"finish_reason": content.finish_reason, "stop_reason": None}
        usage = {}
        if self._generation.continuous_usage:
            usage = {"usage": _usage(content.prompt_tokens, last)}
        return self._event([choice], usage)

    def closing(self) -> list[bytes]:
        if not self._generation.include_usage:
            return [DONE]
        tokens = self._generation.answers[0]
        return [self._event([], {"usage": _usage(tokens.prompt_tokens, tokens.output_tokens)}), DONE]

    def _event(self, choices: list[Fields], usage: Fields) -> bytes:
        head = {
            "id": f"trsc-{self._identity.id}",
            "object": "transcription.chunk",
            "created": self._identity.created_s,
            "model": self._generation.model,
        }
        return b"data: %s\n\n" % _encode({**head, "choices": choices, **usage})


def error_body(error: ApiError, *, anthropic: bool = False) -> bytes:
    """vLLM's error body; its Anthropic routes use Anthropic's for all but validation errors."""
    if anthropic and error.type != "Bad Request":
        return _encode({"type": "error", "error": {"type": error.type, "message": error.message}})
    return _encode(
        {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.status}}
    )


def model_list(models: Sequence[str], max_model_len: int, created_s: int) -> bytes:
    """The body of /v1/models."""
    permission = {
        "id": "modelperm-0000000000000000",
        "object": "model_permission",
        "created": created_s,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    cards = [
        {
            "id": name,
            "object": "model",
            "created": created_s,
            "owned_by": "vllm",
            "root": name,
            "parent": None,
            "max_model_len": max_model_len,
            "permission": [permission],
        }
        for name in models
    ]
    return _encode({"object": "list", "data": cards})


def embeddings(pooling: Pooling, identity: Identity) -> bytes:
    """The body of /v1/embeddings."""
    data: list[Fields] = []
    for index, key in enumerate(pooling.keys):
        values = vector(key, pooling.dimensions)
        packed = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode() if pooling.base64 else values
        data.append({"index": index, "object": "embedding", "embedding": packed})
    return _pooling_body(pooling, identity, "embd", data)


def poolings(pooling: Pooling, identity: Identity) -> bytes:
    """The body of /pooling."""
    data = [
        {"index": index, "object": "pooling", "data": vector(key, pooling.dimensions)}
        for index, key in enumerate(pooling.keys)
    ]
    return _pooling_body(pooling, identity, "pooling", data)


def classes(pooling: Pooling, identity: Identity) -> bytes:
    """The body of /classify: two classes."""
    data = []
    for index, key in enumerate(pooling.keys):
        score = _score(key)
        probabilities = [1.0 - score, score]
        label = f"LABEL_{int(score > 0.5)}"
        data.append({"index": index, "label": label, "probs": probabilities, "num_classes": len(probabilities)})
    return _pooling_body(pooling, identity, "classify", data)


def scores(pooling: Pooling, identity: Identity) -> bytes:
    """The body of /score."""
    data = [{"index": index, "object": "score", "score": _score(key)} for index, key in enumerate(pooling.keys)]
    return _pooling_body(pooling, identity, "score", data)


def ranks(pooling: Pooling, identity: Identity) -> bytes:
    """The body of /rerank: the best `top_n` documents, best first."""
    scored = [
        {"index": index, "document": {"text": text, "multi_modal": None}, "relevance_score": _score(key)}
        for index, (text, key) in enumerate(zip(pooling.documents, pooling.keys, strict=True))
    ]
    scored.sort(key=lambda result: -result["relevance_score"])  # type: ignore[operator]
    tokens = sum(pooling.prompt_tokens)
    return _encode(
        {
            "id": f"score-{identity.id}",
            "model": pooling.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "results": scored[: pooling.top_n],
        }
    )


def _pooling_body(pooling: Pooling, identity: Identity, prefix: str, data: Sequence[Fields]) -> bytes:
    return _encode(
        {
            "id": f"{prefix}-{identity.id}",
            "object": "list",
            "created": identity.created_s,
            "model": pooling.model,
            "data": data,
            "usage": _usage(sum(pooling.prompt_tokens), 0)
            | {"prompt_tokens_details": None, "completion_tokens_details": None},
        }
    )


def _score(key: bytes) -> float:
    return int.from_bytes(key[:8], "little") / (1 << 64)


def _whole_chat(generation: Generation, identity: Identity) -> Fields:
    choices = []
    for index, answer in enumerate(generation.answers):
        message: Fields = {
            "role": "assistant",
            "content": answer.stream.text(answer.reasoning_tokens, answer.output_tokens),
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
        }
        if answer.tool is not None:
            call = _whole_call(answer)
            message["content"] = ""
            message["tool_calls"] = [
                {"id": f"chatcmpl-tool-{identity.id[:15]}{index:x}", "type": "function", "function": call}
            ]
        message["reasoning"] = answer.stream.text(0, answer.reasoning_tokens) if answer.reasoning_tokens else None
        logprobs = None
        if generation.logprobs is not None:
            logprobs = _chat_logprobs(answer, 0, answer.output_tokens, generation.logprobs)
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": answer.finish_reason,
                "stop_reason": None,
                "token_ids": None,
                "routed_experts": None,
            }
        )
    return {
        "id": f"chatcmpl-{identity.id}",
        "object": "chat.completion",
        "created": identity.created_s,
        "model": generation.model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": _whole_usage(generation, identity),
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _whole_completion(generation: Generation, identity: Identity) -> Fields:
    choices = [
        {
            "index": index,
            "text": answer.echo + answer.stream.text(0, answer.output_tokens),
            "logprobs": None
            if generation.logprobs is None
            else _completion_logprobs(answer, 0, answer.output_tokens, generation.logprobs),
            "finish_reason": answer.finish_reason,
            "stop_reason": None,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }
        for index, answer in enumerate(generation.answers)
    ]
    return {
        "id": f"cmpl-{identity.id}",
        "object": "text_completion",
        "created": identity.created_s,
        "model": generation.model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": _whole_usage(generation, identity),
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _whole_response(generation: Generation, identity: Identity) -> Fields:
    return _response_fields(generation, identity, done=True)


def _whole_message(generation: Generation, identity: Identity) -> Fields:
    answer = generation.answers[0]
    return {
        "id": f"chatcmpl-{identity.id}",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": answer.stream.text(0, answer.output_tokens)}],
        "model": generation.model,
        "stop_reason": _anthropic_reason(answer),
        "usage": _anthropic_usage(generation, identity),
    }


def _whole_transcription(generation: Generation, identity: Identity) -> Fields:
    answer = generation.answers[0]
    return {
        "text": answer.stream.text(0, answer.output_tokens),
        "usage": {"type": "duration", "seconds": -int(-generation.audio_s // 1)},
    }


def _response_item(generation: Generation, identity: Identity) -> Fields:
    answer = generation.answers[0]
    text = answer.stream.text(0, answer.output_tokens)
    return {
        "id": f"msg_{identity.id[:16]}",
        "content": [{"annotations": [], "text": text, "type": "output_text", "logprobs": None}],
        "role": "assistant",
        "status": "completed",
        "type": "message",
        "phase": None,
    }


def _response_fields(generation: Generation, identity: Identity, *, done: bool) -> Fields:
    answer = generation.answers[0]
    cut = done and answer.finish_reason == "length"
    usage = None
    if done:
        usage = {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": min(identity.cached_tokens or 0, answer.prompt_tokens),
                "cache_write_tokens": 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": answer.output_tokens,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": answer.prompt_tokens + answer.output_tokens,
        }
    return {
        "id": f"resp_{identity.id}",
        "created_at": identity.created_s,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": None,
        "metadata": None,
        "model": generation.model,
        "object": "response",
        "output": [_response_item(generation, identity)] if done else [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0,
        "background": False,
        "max_output_tokens": generation.max_tokens,
        "max_tool_calls": None,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": None,
        "service_tier": "auto",
        "status": "incomplete" if cut else "completed" if done else "in_progress",
        "text": None,
        "top_logprobs": None,
        "truncation": "disabled",
        "usage": usage,
        "user": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    }


def _anthropic_reason(answer: Answer) -> str:
    return "max_tokens" if answer.finish_reason == "length" else "end_turn"


def _anthropic_usage(generation: Generation, identity: Identity) -> Fields:
    answer = generation.answers[0]
    usage = {"input_tokens": answer.prompt_tokens, "output_tokens": answer.output_tokens}
    if identity.cached_tokens is not None:
        # Anthropic's input_tokens are those that were not read from a cache.
        cached = min(identity.cached_tokens, answer.prompt_tokens)
        usage |= {"input_tokens": answer.prompt_tokens - cached}
        usage |= {"cache_creation_input_tokens": 0, "cache_read_input_tokens": cached}
    return usage


def _usage(prompt_tokens: int, completion_tokens: int) -> Fields:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def _usage_head(prompt_tokens: int, completion_tokens: int) -> bytes:
    """A usage object without its closing brace."""
    total = prompt_tokens + completion_tokens
    return b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d' % (prompt_tokens, total, completion_tokens)


def _stream_usage(generation: Generation, identity: Identity) -> bytes:
    """The usage of a stream's last event, which has no null fields."""
    usage = _usage(generation.prompt_tokens, sum(answer.output_tokens for answer in generation.answers))
    if identity.cached_tokens is not None:
        cached = min(identity.cached_tokens, generation.prompt_tokens)
        usage["prompt_tokens_details"] = {"cached_tokens": cached, "created_cache_tokens": 0}
    if generation.reasoning:
        usage["completion_tokens_details"] = _reasoning_details(generation)
    return _encode(usage)


def _whole_usage(generation: Generation, identity: Identity) -> Fields:
    usage = _usage(generation.prompt_tokens, sum(answer.output_tokens for answer in generation.answers))
    cached = identity.cached_tokens
    usage["prompt_tokens_details"] = (
        None
        if cached is None
        else {
            "cached_tokens": min(cached, generation.prompt_tokens),
            "created_cache_tokens": 0,
            "multimodal_tokens": None,
        }
    )
    usage["completion_tokens_details"] = _reasoning_details(generation) if generation.reasoning else None
    return usage


def _reasoning_details(generation: Generation) -> Fields:
    return {"reasoning_tokens": sum(answer.reasoning_tokens for answer in generation.answers)}


def _tool_delta(answer: Answer, first: int, last: int, call_id: str) -> Fields:
    """The delta of a call's tokens: the name, then pieces of the arguments; the last token is the end of the call."""
    call: Fields = {"index": 0, "function": {}}
    if first == 0:
        call = {"id": call_id, "type": "function", "index": 0, "function": {"name": answer.tool}}
    pieces = "".join(_argument_piece(answer, position) for position in range(max(first, 1), last))
    if pieces:
        call["function"]["arguments"] = pieces
    return {"content": None, "tool_calls": [call]} if call["function"] else {}


def _argument_piece(answer: Answer, position: int) -> str:
    """The text of the arguments' token at a position: `{"name":"`, words, `"}`, and nothing for the end of the call."""
    if position == 1:
        return f'{{{_encode(answer.tool_argument).decode()}:"'
    if position < answer.output_tokens - 2:
        return answer.stream.text(position, position + 1).removeprefix(" " if position == 2 else "")
    return '"}' if position == answer.output_tokens - 2 else ""


def _whole_call(answer: Answer) -> Fields:
    pieces = (_argument_piece(answer, position) for position in range(1, answer.output_tokens))
    return {"name": answer.tool, "arguments": "".join(pieces)}


def _logprob(position: int, rank: int) -> float:
    """A plausible log-probability: the chosen token between -0.05 and -1, each alternative one less likely."""
    return -0.05 * (1 + position % 20) - rank


def _chat_logprobs(answer: Answer, first: int, last: int, alternatives: int) -> Fields:
    def entry(position: int, rank: int) -> Fields:
        token = answer.stream.text(position + rank, position + rank + 1)
        return {"token": token, "logprob": _logprob(position, rank), "bytes": list(token.encode())}

    return {
        "content": [
            entry(position, 0) | {"top_logprobs": [entry(position, rank) for rank in range(alternatives)]}
            for position in range(first, last)
        ]
    }


def _completion_logprobs(answer: Answer, first: int, last: int, alternatives: int) -> Fields:
    tokens = [answer.stream.text(position, position + 1) for position in range(first, last)]
    offset = len(answer.stream.text(0, first))
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "text_offset": offsets,
        "token_logprobs": [_logprob(position, 0) for position in range(first, last)],
        "tokens": tokens,
        "top_logprobs": [
            {
                answer.stream.text(position + rank, position + rank + 1): _logprob(position, rank)
                for rank in range(max(1, alternatives))
            }
            for position in range(first, last)
        ],
    }


_WRITERS: dict[str, Callable[[Generation, Identity], StreamWriter]] = {
    "chat": _Chat,
    "completion": _Completion,
    "responses": _Responses,
    "messages": _Messages,
    "transcription": _Transcription,
}
_WHOLES: dict[str, Callable[[Generation, Identity], Fields]] = {
    "chat": _whole_chat,
    "completion": _whole_completion,
    "responses": _whole_response,
    "messages": _whole_message,
    "transcription": _whole_transcription,
}
