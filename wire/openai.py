"""What burstgate reads of the OpenAI, Anthropic and vLLM wire formats; everything else passes unread.

Reading is lenient on purpose: a field of an unexpected type counts as absent, because the upstream, not the gateway,
judges requests. Nothing here raises for any bytes. What is JSON to Python only (NaN, a lone surrogate, UTF-16) counts
as unreadable.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from wire.shapes import (
    NO_FACTS,
    CutJson,
    Family,
    Payload,
    RequestBody,
    RequestFacts,
    StreamOptions,
    Usage,
)

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


_body_decoder = msgspec.json.Decoder(RequestBody)
_object_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_BOM = b"\xef\xbb\xbf"


LONG_TEXT_BYTES = 2048
"""Texts longer than this are not looked into."""
_CUT_OVER_BYTES = 8192
_MAX_QUOTES = 64
_FIRST_QUOTES = 24
"""How many quotes are looked at, and how many before a long text has been met."""
_MARK = b"\xff"
"""What stands for a text that was taken out; no byte of UTF-8."""


def cut_texts(data: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """`data`, JSON, without the insides of its long texts, and where in `data` these are (start and end).

    In place of the n-th inside is `\\xff` and n. Only the first few quotes are looked at, each found as fast as memory
    is read: a prompt of 100 KB costs about 2 us, where a JSON decoder that skips it takes 25. Nothing is cut of what is
    short anyway, nor of what has a byte `\\xff`.
    """
    spans: list[tuple[int, int]] = []
    if len(data) <= _CUT_OVER_BYTES or 0xFF in data:
        return data, spans
    find = data.find
    pieces = []
    kept = 0
    start = find(b'"') + 1
    end = start - 1
    for number in range(_MAX_QUOTES):
        end = find(b'"', end + 1)
        if not start or end < 0 or (number == _FIRST_QUOTES and not spans):
            break
        if data[end - 1] == 0x5C and end > start:
            before = data[max(start, end - 64) : end]
            backslashes = len(before) - len(before.rstrip(b"\\"))
            if backslashes == 64:
                break
            if backslashes % 2:
                continue  # an escaped quote
        if end - start > LONG_TEXT_BYTES:
            pieces.append(data[kept:start])
            pieces.append(b"%b%d" % (_MARK, len(spans)))
            spans.append((start, end))
            kept = end
            if len(data) - end <= LONG_TEXT_BYTES:
                break
        start = find(b'"', end + 1) + 1
        end = start - 1
    if not spans:
        return data, spans
    pieces.append(data[kept:])
    return b"".join(pieces), spans


def _uncut(position: int, spans: list[tuple[int, int]]) -> int:
    """Where a position of what `cut_texts` left, outside of texts, is in what it was given."""
    for number, (start, end) in enumerate(spans):
        if position <= start:
            break
        position += end - start - len(_MARK) - len(str(number))
    return position


def read_request(body: bytes) -> RequestFacts:
    """The facts of a JSON request body; `NO_FACTS` when it is not a JSON object. Long texts are not looked into."""
    if body.startswith(_BOM):
        body = body[3:]
    cut, spans = cut_texts(body)
    if spans:
        try:
            fields = _body_decoder.decode(cut)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _read_all(body)
        if not any(_MARK in bytes(raw) for raw in _session_fields(fields) if raw):
            return _facts_of(fields, spans, body)
    return _read_all(body)


def _read_all(body: bytes) -> RequestFacts:
    try:
        fields = _body_decoder.decode(body)
    except msgspec.ValidationError:
        lenient = _read_leniently(body)
        if lenient is None:
            return NO_FACTS
        fields = lenient
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return NO_FACTS
    return _facts_of(fields, [], body)


def _facts_of(fields: RequestBody, spans: list[tuple[int, int]], body: bytes) -> RequestFacts:
    options = fields.stream_options
    is_stream = fields.stream is True
    has_session = any(_session_fields(fields))
    return RequestFacts(
        model=fields.model,
        stream=is_stream,
        asks_usage=isinstance(options, StreamOptions) and options.include_usage is True,
        has_stream_options=is_stream and options is not msgspec.UNSET,
        max_tokens=_first_int(fields.max_completion_tokens, fields.max_tokens, fields.max_output_tokens),
        choices=fields.n if fields.n is not None else 1,
        session_id=_session_of(fields) if has_session else None,
        previous_response_id=_text(_value_of(fields.previous_response_id)) if has_session else None,
        messages=CutJson(bytes(fields.messages), spans, body) if fields.messages else None,
        is_json=True,
    )


def _session_fields(fields: RequestBody) -> tuple[msgspec.Raw, ...]:
    return (
        fields.metadata,
        fields.session_id,
        fields.prompt_cache_key,
        fields.conversation,
        fields.previous_response_id,
    )


def _first_int(*values: int | None) -> int | None:
    for value in values:
        if value is not None:
            return value
    return None


def _read_leniently(body: bytes) -> RequestBody | None:
    """Field by field, dropping those of the wrong type; None when the body is no JSON object."""
    try:
        raw = _object_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    fields = RequestBody(stream_options=None if "stream_options" in raw else msgspec.UNSET)
    for field in msgspec.structs.fields(RequestBody):
        if field.name in raw:
            try:
                setattr(fields, field.name, msgspec.json.decode(raw[field.name], type=field.type))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
    return fields


def _value_of(raw: msgspec.Raw) -> Any:
    """A raw field's value; None when it is absent or, which reading past it does not find out, unreadable."""
    try:
        return msgspec.json.decode(raw) if raw else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _text(value: Any) -> str | None:
    return value[:256] if isinstance(value, str) and value else None


def _session_of(fields: RequestBody) -> str | None:
    metadata = _value_of(fields.metadata)
    if isinstance(metadata, dict):
        for key in ("session_id", "conversation_id", "user_session_id"):
            if (session := _text(metadata.get(key))) is not None:
                return session
    conversation = _value_of(fields.conversation)
    if isinstance(conversation, dict):
        conversation = conversation.get("id")
    return _text(_value_of(fields.session_id)) or _text(_value_of(fields.prompt_cache_key)) or _text(conversation)


_OPTION = b'"stream_options":{"include_usage":true}'


def ask_for_usage(body: bytes, facts: RequestFacts) -> bytes | None:
    """The body with `stream_options.include_usage` set, every other byte kept.

    body: a streaming request that does not ask for usage; facts: what `read_request` says of it.
    `continuous_usage_stats` in an option that did not ask for usage has no effect at vLLM; it is removed, so that
    asking for usage does not switch it on.
    Returns None where it can not be set, and where the option has a value that only the upstream can judge (`1`,
    `"true"`): its usage event may be one that the client waits for.
    """
    if not facts.has_stream_options:
        start = body.find(b"{") + 1
        return b"".join((body[:start], _OPTION, b",", memoryview(body)[start:]))
    cut, spans = cut_texts(body)
    try:
        text = cut.decode("utf-8", "surrogateescape" if spans else "strict")
        span = _value_span(text, "stream_options")
        if spans and span is not None and chr(0xDCFF) in text[span[0] : span[1]]:  # a mark of a text that was cut
            spans = []
            text = body.decode()
            span = _value_span(text, "stream_options")
        if span is None:
            return None
        options = json.loads(text[span[0] : span[1]])
    except (ValueError, RecursionError):
        return None
    if options is None:
        options = {}
    if not isinstance(options, dict) or options.get("include_usage") not in (None, False):
        return None
    options = {key: value for key, value in options.items() if key != "continuous_usage_stats"}
    options["include_usage"] = True
    first, last = (_uncut(len(text[:end].encode("utf-8", "surrogateescape")), spans) for end in span)
    return b"".join((body[:first], json.dumps(options, separators=(",", ":")).encode(), memoryview(body)[last:]))


_SPACE = re.compile(r"[ \t\n\r]*")
_python_decoder = json.JSONDecoder()


def _value_span(text: str, key: str) -> tuple[int, int] | None:
    """Where the value of the last top-level `key` of a JSON object starts and ends in `text`."""
    decoder = _python_decoder
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


_MODEL_KEY = re.compile(rb'"model"[ \t\n\r]*:[ \t\n\r]*')
_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]', re.DOTALL)


def with_model(body: bytes, model: str) -> bytes | None:
    """The JSON body with the text of its top-level `model` replaced, every other byte kept; None when it has none.

    Nothing but the body's structure is read, and of a body with one key of that name not even that: quotes within a
    text are escaped, so what looks like the key is one. Of several at the top level the last counts, as in vLLM.
    """
    try:
        value = bytes(_object_decoder.decode(body.removeprefix(_BOM)).get("model", b""))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not value.startswith(b'"'):
        return None
    keys = {key.start(): key.end() for key in _MODEL_KEY.finditer(body)}
    start = next(iter(keys.values())) if len(keys) == 1 else _last_at_top(keys, body)
    if start is None or not body.startswith(value, start):
        return _with_model_unescaped(body, model)
    return b"%b%b%b" % (body[:start], msgspec.json.encode(model), body[start + len(value) :])


def _last_at_top(keys: dict[int, int], body: bytes) -> int | None:
    """Of keys (where each and its value start), where the value of the last one at the top level starts."""
    found = None
    depth = 0
    for token in _STRUCTURE.finditer(body) if keys else ():
        first = body[token.start()]
        if first == 0x22:
            if depth == 1 and token.start() in keys:
                found = keys[token.start()]
        else:
            depth += 1 if first in b"{[" else -1
    return found


def _with_model_unescaped(body: bytes, model: str) -> bytes | None:
    """For a key that is spelt with escapes."""
    try:
        text = body.decode()
        span = _value_span(text, "model")
    except (ValueError, RecursionError):
        return None
    return None if span is None else (text[: span[0]] + json.dumps(model) + text[span[1] :]).encode()


_FORM_NAME = re.compile(rb';[ \t]*name[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^ \t;"]+))', re.IGNORECASE)
_TRUE = frozenset({b"true", b"1", b"on", b"yes", b"t", b"y"})


def read_form(head: bytes) -> RequestFacts:
    """The facts of a multipart form (RFC 7578) from its first bytes: `model` and `stream`, as far as they lie there."""
    boundary, _, rest = head.partition(b"\r\n")
    if not boundary.startswith(b"--"):
        return NO_FACTS
    values: dict[bytes, bytes] = {}
    for part in rest.split(b"\r\n" + boundary)[:-1]:
        headers, _, value = part.partition(b"\r\n\r\n")
        if len(value) > 256:
            continue
        for line in headers.split(b"\r\n"):
            if line[:20].lower() == b"content-disposition:" and (name := _FORM_NAME.search(line, 20)):
                values[name[1] or name[2]] = value
    model = values.get(b"model")
    return RequestFacts(
        model=model.decode("utf-8", "replace") if model else None,
        stream=values.get(b"stream", b"").lower() in _TRUE,
    )


_payload_decoder = msgspec.json.Decoder(Payload)
_PAYLOAD_FIELDS = msgspec.structs.fields(Payload)


def read_payload(data: bytes) -> Payload | None:
    """One JSON object of an answer; None when it is not a JSON object. Fields of a wrong type count as absent."""
    try:
        return _payload_decoder.decode(data)
    except msgspec.ValidationError:
        pass
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    try:
        raw = _object_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    payload = Payload()
    for field in _PAYLOAD_FIELDS:
        if field.name in raw:
            try:
                setattr(payload, field.name, msgspec.json.decode(raw[field.name], type=field.type))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
    return payload


def usage_of(payload: Payload, family: Family) -> Usage | None:
    """The counts that an answer or event reports, under any of the families' names; None when it reports none.

    Anthropic's `input_tokens` leaves out what was read from or written to the cache; those are added. Audio may be
    billed by the second: that is no count of tokens.
    """
    usage = payload.usage
    if usage is None:
        return None
    request = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
    response = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
    details = usage.prompt_tokens_details or usage.input_tokens_details
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    if family is Family.MESSAGES:
        cached = usage.cache_read_input_tokens
        if request is not None:
            request += (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    if family in POOLING_FAMILIES:
        request = request if request is not None else usage.total_tokens
        response = response or 0 if request is not None else None
    if request is None and response is None:
        return None
    return Usage(request, response, cached if isinstance(cached, int) else None)


def error_type_of(payload: Payload) -> str | None:
    """The error's own type or code, `error` when it names neither; None for what is no error.

    OpenAI's and Anthropic's envelope is `{"error": {...}}`, vLLM's older flat one `{"object": "error", ...}`, the
    Responses API's event `{"type": "error", ...}`.
    """
    error = payload.error
    kinds: tuple[Any, ...]
    if error:
        kinds = (error.get("type"), error.get("code")) if isinstance(error, dict) else ()
    elif payload.object == "error":
        kinds = (payload.type, payload.code)
    elif payload.type == "error":
        kinds = (payload.code,)
    else:
        return None
    return next((str(kind)[:128] for kind in kinds if isinstance(kind, str | int) and kind), "error")
