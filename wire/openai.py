"""What burstgate reads of the OpenAI, Anthropic and vLLM wire formats; everything else passes unread.

Reading is lenient on purpose: a field of an unexpected type counts as absent, because the upstream, not the gateway,
judges requests. Nothing here raises for any bytes.
"""

from __future__ import annotations

import enum
import json
import re
from typing import Any

import msgspec

_ABSENT = msgspec.Raw()
"""A raw field that is not there: no bytes at all."""


class Family(enum.Enum):
    """Route families, by how their requests and answers spell model, streaming and usage."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"
    EMBEDDINGS = "embeddings"
    RERANK = "rerank"
    SCORE = "score"
    POOLING = "pooling"
    CLASSIFY = "classify"
    AUDIO = "audio"
    OTHER = "other"


_FAMILIES = {
    "/v1/chat/completions": Family.CHAT,
    "/v1/completions": Family.COMPLETIONS,
    "/v1/responses": Family.RESPONSES,
    "/v1/messages": Family.MESSAGES,
    "/v1/embeddings": Family.EMBEDDINGS,
    "/rerank": Family.RERANK,
    "/v1/rerank": Family.RERANK,
    "/v2/rerank": Family.RERANK,
    "/score": Family.SCORE,
    "/v1/score": Family.SCORE,
    "/pooling": Family.POOLING,
    "/classify": Family.CLASSIFY,
    "/v1/audio/transcriptions": Family.AUDIO,
    "/v1/audio/translations": Family.AUDIO,
}

POOLING_FAMILIES = frozenset({Family.EMBEDDINGS, Family.RERANK, Family.SCORE, Family.POOLING, Family.CLASSIFY})
"""Families that generate nothing: with usage present, their response tokens are a known 0."""

USAGE_ON_REQUEST = frozenset({Family.CHAT, Family.COMPLETIONS})
"""Families whose streams carry usage only when `stream_options.include_usage` asks for it."""


def family_of(path: str) -> Family:
    """The family of a request path (without query)."""
    return _FAMILIES.get(path, Family.OTHER)


class RequestFacts(msgspec.Struct, frozen=True, gc=False):
    """What a request body says; None where it says nothing readable."""

    model: str | None = None
    stream: bool = False
    asks_usage: bool = False
    """`stream_options.include_usage` is true."""
    has_stream_options: bool = False
    """A streaming request names `stream_options`, be it null."""
    max_tokens: int | None = None
    choices: int = 1
    """OpenAI's `n`."""
    session_id: str | None = None
    """From the body's own session fields, in design order."""
    previous_response_id: str | None = None
    messages: msgspec.Raw = _ABSENT
    """The raw `messages` array of a chat or Anthropic request; empty when there is none."""
    is_json: bool = False


NO_FACTS = RequestFacts()


class _StreamOptions(msgspec.Struct, gc=False):
    include_usage: bool | None = None


class _Body(msgspec.Struct, gc=False):
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    metadata: msgspec.Raw = _ABSENT
    session_id: msgspec.Raw = _ABSENT
    prompt_cache_key: msgspec.Raw = _ABSENT
    conversation: msgspec.Raw = _ABSENT
    previous_response_id: msgspec.Raw = _ABSENT
    messages: msgspec.Raw = _ABSENT


_body_decoder = msgspec.json.Decoder(_Body)
_any_decoder = msgspec.json.Decoder()
_object_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_request(body: bytes) -> RequestFacts:
    """The facts of a JSON request body; `NO_FACTS` when it is not a JSON object."""
    try:
        fields = _body_decoder.decode(body)
    except msgspec.ValidationError:
        lenient = _read_leniently(body)
        if lenient is None:
            return NO_FACTS
        fields = lenient
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return NO_FACTS
    options = fields.stream_options
    return RequestFacts(
        model=fields.model,
        stream=fields.stream is True,
        asks_usage=options is not None and options.include_usage is True,
        has_stream_options=fields.stream is True and b'"stream_options"' in body,
        max_tokens=_first_int(fields.max_completion_tokens, fields.max_tokens, fields.max_output_tokens),
        choices=fields.n if fields.n is not None else 1,
        session_id=_session_of(fields),
        previous_response_id=_text(fields.previous_response_id),
        messages=fields.messages,
        is_json=True,
    )


def _first_int(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _read_leniently(body: bytes) -> _Body | None:
    """Field by field, dropping those of the wrong type; None when the body is no JSON object."""
    try:
        raw = _object_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    kept: dict[str, Any] = {}
    for field in msgspec.structs.fields(_Body):
        if field.name in raw:
            try:
                kept[field.name] = msgspec.json.decode(raw[field.name], type=field.type)
            except (msgspec.DecodeError, RecursionError):
                continue
    return _Body(**kept)


def _text(raw: msgspec.Raw) -> str | None:
    if not raw:
        return None
    value = msgspec.json.decode(raw)
    if isinstance(value, str) and value:
        return value[:256]
    return None


def _session_of(fields: _Body) -> str | None:
    if fields.metadata:
        metadata = msgspec.json.decode(fields.metadata)
        if isinstance(metadata, dict):
            for key in ("session_id", "conversation_id", "user_session_id"):
                value = metadata.get(key)
                if isinstance(value, str) and value:
                    return value[:256]
    for raw in (fields.session_id, fields.prompt_cache_key):
        value = _text(raw)
        if value is not None:
            return value
    if fields.conversation:
        conversation = msgspec.json.decode(fields.conversation)
        if isinstance(conversation, dict):
            conversation = conversation.get("id")
        if isinstance(conversation, str) and conversation:
            return conversation[:256]
    return None


_OPTION = b'"stream_options":{"include_usage":true}'


def ask_for_usage(body: bytes, facts: RequestFacts) -> bytes | None:
    """The body with `stream_options.include_usage` set, every other byte kept; None when it can not be set.

    `continuous_usage_stats` in an option that did not ask for usage has no effect at vLLM; it is removed, so that
    asking for usage does not switch it on.
    """
    if not facts.has_stream_options:
        start = body.find(b"{") + 1
        return b"%b%b,%b" % (body[:start], _OPTION, body[start:])
    try:
        text = body.decode()
        span = _value_span(text, "stream_options")
        if span is None:
            return None
        options = json.loads(text[span[0] : span[1]])
    except (ValueError, RecursionError):
        return None
    if options is None:
        options = {}
    if not isinstance(options, dict):
        return None
    options = {key: value for key, value in options.items() if key != "continuous_usage_stats"}
    options["include_usage"] = True
    return (text[: span[0]] + json.dumps(options, separators=(",", ":")) + text[span[1] :]).encode()


_SPACE = re.compile(r"[ \t\n\r]*")


def _value_span(text: str, key: str) -> tuple[int, int] | None:
    """Where the value of the last top-level `key` of a JSON object starts and ends in `text`."""
    decoder = json.JSONDecoder()
    found = None

    def skip(position: int) -> int:
        match = _SPACE.match(text, position)
        return match.end() if match else position

    position = skip(text.index("{") + 1)
    while position < len(text) and text[position] == '"':
        name, position = decoder.raw_decode(text, position)
        start = skip(skip(position) + 1)
        _, position = decoder.raw_decode(text, start)
        if name == key:
            found = (start, position)
        position = skip(position)
        if text[position : position + 1] != ",":
            break
        position = skip(position + 1)
    return found


_FORM_MODEL = re.compile(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,256})\r\n')


def read_form(head: bytes) -> RequestFacts:
    """The facts of a multipart form from its first bytes: the model, when its part lies within them."""
    match = _FORM_MODEL.search(head)
    return RequestFacts(model=match[1].decode("utf-8", "replace")) if match else NO_FACTS


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Token counts as an upstream reported them."""

    request_tokens: int | None = None
    response_tokens: int | None = None
    cached_tokens: int | None = None


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    function_call: msgspec.Raw = _ABSENT
    refusal: str | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    delta: _Delta | None = None
    message: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Error(msgspec.Struct, gc=False):
    type: str | None = None
    code: int | str | None = None
    message: str | None = None


class Payload(msgspec.Struct, gc=False):
    """One JSON answer or stream event, whatever its family; absent fields are None."""

    id: str | None = None
    type: str | None = None
    object: str | None = None
    model: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: _Error | str | None = None
    status: str | None = None
    stop_reason: str | None = None
    response: Payload | None = None
    """In events of the Responses API."""
    message: Payload | None = None
    """In Anthropic's message_start."""
    delta: _AnyDelta | str | None = None
    """At the top level in Anthropic's and the Responses API's events."""


class _AnyDelta(msgspec.Struct, gc=False):
    """Anthropic's message_delta carries the stop reason here."""

    stop_reason: str | None = None


class _BarePayload(msgspec.Struct, gc=False):
    id: msgspec.Raw = _ABSENT
    type: msgspec.Raw = _ABSENT
    object: msgspec.Raw = _ABSENT
    model: msgspec.Raw = _ABSENT
    choices: msgspec.Raw = _ABSENT
    usage: msgspec.Raw = _ABSENT
    error: msgspec.Raw = _ABSENT
    status: msgspec.Raw = _ABSENT
    stop_reason: msgspec.Raw = _ABSENT
    response: msgspec.Raw = _ABSENT
    message: msgspec.Raw = _ABSENT
    delta: msgspec.Raw = _ABSENT


_payload_decoder = msgspec.json.Decoder(Payload)
_bare_decoder = msgspec.json.Decoder(_BarePayload)
_PAYLOAD_TYPES = {field.name: field.type for field in msgspec.structs.fields(Payload)}


def read_payload(data: bytes) -> Payload | None:
    """One JSON object of an answer; None when it is not a JSON object. Fields of a wrong type count as absent."""
    try:
        return _payload_decoder.decode(data)
    except msgspec.ValidationError:
        pass
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    try:
        bare = _bare_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    kept: dict[str, Any] = {}
    for name, kind in _PAYLOAD_TYPES.items():
        raw = getattr(bare, name)
        if raw:
            try:
                kept[name] = msgspec.json.decode(raw, type=kind)
            except (msgspec.DecodeError, RecursionError):
                continue
    return Payload(**kept)


def usage_of(usage: _Usage, family: Family) -> Usage:
    """The counts of a usage object under any of the families' names.

    Anthropic's `input_tokens` leaves out what was read from or written to the cache; those are added.
    """
    request = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
    response = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
    details = usage.prompt_tokens_details or usage.input_tokens_details
    cached = details.cached_tokens if details is not None else None
    if family is Family.MESSAGES:
        cached = usage.cache_read_input_tokens
        if request is not None:
            request += (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    if family in POOLING_FAMILIES:
        request = request if request is not None else usage.total_tokens
        response = response or 0
    return Usage(request, response, cached)


def error_type_of(payload: Payload) -> str | None:
    """The error's own type, under OpenAI's envelope or vLLM's older flat one."""
    if isinstance(payload.error, str):
        return "error"
    if payload.error is not None:
        if payload.error.type is not None:
            return payload.error.type[:128]
        return None if payload.error.code is None else str(payload.error.code)[:128]
    if payload.object == "error":
        return (payload.type or "error")[:128]
    return None
