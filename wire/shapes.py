"""The shapes of what burstgate reads of requests and answers, as msgspec decodes them.

Apart from the code that reads them, because mypyc can not compile them: it forgets what a field's type is made of.
"""

from __future__ import annotations

import enum
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


class CutJson(msgspec.Struct, frozen=True, gc=False):
    """A part of a JSON text without the insides of its long strings, as `wire.openai.cut_texts` leaves it."""

    cut: bytes
    spans: list[tuple[int, int]]
    """Where in `whole` the insides are; empty where nothing was taken out."""
    whole: bytes


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
    messages: CutJson | None = None
    """The raw `messages` array of a chat or Anthropic request."""
    is_json: bool = False


NO_FACTS = RequestFacts()


class StreamOptions(msgspec.Struct, gc=False):
    """Of a request."""

    include_usage: bool | None = None


class RequestBody(msgspec.Struct, gc=False):
    """A JSON request, of any family; fields that may be of several types are left raw."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | msgspec.UnsetType | None = msgspec.UNSET
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


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Token counts as an upstream reported them."""

    request_tokens: int | None = None
    response_tokens: int | None = None
    cached_tokens: int | None = None


class ReportedUsage(msgspec.Struct, gc=False):
    """A `usage` object, of any family."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: Any = None
    input_tokens_details: Any = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class Delta(msgspec.Struct, gc=False):
    """A message, or what is new of it. The values of its parts are not judged: only whether they are there counts."""

    role: Any = None
    content: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None
    type: Any = None
    """In Anthropic's events."""
    stop_reason: str | None = None
    """In Anthropic's message_delta."""


class Choice(msgspec.Struct, gc=False):
    """One of the answers to a request, or what is new of it."""

    index: int = 0
    delta: Delta | None = None
    message: Delta | None = None
    text: Any = None
    finish_reason: str | None = None

    @property
    def has_output(self) -> bool:
        """Something was generated.

        Be it an empty text: vLLM sends one for a token that shows nothing yet. Beside a role it only opens the message.
        """
        delta = self.delta
        if delta is None:
            return self.text is not None
        if delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls or delta.refusal:
            return True
        if delta.role is None:
            return delta.content is not None or delta.reasoning is not None or delta.reasoning_content is not None
        return bool(delta.function_call)


class Payload(msgspec.Struct, gc=False):
    """One JSON answer or stream event, whatever its family; absent fields are None."""

    id: str | None = None
    type: str | None = None
    object: str | None = None
    model: str | None = None
    choices: list[Choice] | None = None
    usage: ReportedUsage | None = None
    error: Any = None
    code: Any = None
    status: str | None = None
    stop_reason: str | None = None
    response: Payload | None = None
    """In events of the Responses API."""
    message: Payload | None = None
    """In Anthropic's message_start."""
    delta: Delta | str | None = None
    """At the top level in Anthropic's and the Responses API's events."""
