"""Request bodies to values, with vLLM 0.32's rules, messages and statuses. Pure.

A body that vLLM refuses raises `ApiError`, which is the whole error response. What vLLM ignores is ignored. The text of
an answer depends on the seed and on the body without `stream` and `stream_options`: streamed or not, asked for usage or
not, a request has one answer.
"""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from replay.simulator.config import SimulatorConfig
from replay.simulator.text import (
    WordStream,
    block_hashes,
    chat_pieces,
    count_chat_tokens,
    count_tokens,
    draw_key,
    split_pieces,
    word_stream,
)

Body = dict[str, Any]

_DEFAULT_COMPLETION_TOKENS = 16
_MAX_LOGPROBS = 20
_MAX_ANSWERS = 16_384
"""vLLM's VLLM_MAX_N_SEQUENCES."""
_LEAST_CALL_TOKENS = 5
"""The function's name, `{"argument":"`, a word, `"}` and the end."""
_MAX_SHOWN_CHARS = 200
_BOOLEANS: dict[Any, bool] = {
    **dict.fromkeys((True, 1, 1.0, "true", "1", "yes", "on", "t", "y"), True),
    **dict.fromkeys((False, 0, 0.0, "false", "0", "no", "off", "f", "n"), False),
}
_TRANSCRIPTION_PROMPT_TOKENS_PER_S = 50
"""Whisper's encoder: 1,500 positions for 30 s of audio."""
_PCM_BYTES_PER_S = 32_000
"""16 kHz, 16 bit, mono: the guess for audio that is not a WAV file."""


class ApiError(Exception):
    """A request that is refused: the status and the fields of vLLM's error body."""

    def __init__(self, message: str, *, type: str = "BadRequestError", param: str | None = None, status: int = 400):
        super().__init__(message)
        self.message = message
        self.type = type
        self.param = param
        self.status = status


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """A function call that the request demands. `named`: the request chose the function."""

    function: str
    argument: str
    named: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to generate: its words, its length and how it is divided."""

    prompt_tokens: int
    stream: WordStream
    output_tokens: int
    finish_reason: str
    reasoning_tokens: int = 0
    """How many of the output tokens, the first ones, are reasoning."""
    tool: str | None = None
    """The function called: the output is a call of it."""
    tool_argument: str = ""
    echo: str = ""
    """What precedes the answer in its text: the prompt, when a completion is asked to echo it."""
    prompt_blocks: tuple[int, ...] = ()
    """Hashes of the prompt's full KV-cache blocks, where prefixes are cached."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A request for answers, of any route family."""

    model: str
    answers: tuple[Answer, ...]
    """Prompts in order, the n answers of each prompt together."""
    prompts: int = 1
    streamed: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: int | None = None
    """How many alternatives to report for each token; None for no logprobs at all."""
    reasoning: bool = False
    max_tokens: int | None = None
    request_id: str | None = None
    audio_s: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(answer.prompt_tokens for answer in self.answers[:: max(1, len(self.answers) // self.prompts)])


@dataclass(frozen=True, slots=True)
class Pooling:
    """A request whose prompts are computed and not continued: embeddings, scores, classes."""

    model: str
    prompt_tokens: tuple[int, ...]
    keys: tuple[bytes, ...]
    """One key a prompt: the numbers that answer it are drawn from it."""
    request_id: str | None = None
    documents: tuple[str, ...] = ()
    top_n: int = 0
    dimensions: int = 0
    base64: bool = False


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """Text to tokenize: one plain prompt, or the texts of a chat."""

    texts: tuple[str, ...]
    chat: bool
    generation_prompt: bool
    token_strs: bool


def decode_body(content: bytes) -> Body:
    """The JSON object in a request body. Raises ApiError as vLLM does."""
    if not content:
        raise _invalid("missing", "body", "Field required", "None")
    try:
        body = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        body = _decode_leniently(content)
    if not isinstance(body, dict):
        rule = "Input should be a valid dictionary or object to extract fields from"
        raise _invalid("model_attributes_type", "body", rule, _shown(body))
    return body


def _decode_leniently(content: bytes) -> Any:
    """What Python's json makes of it: it takes NaN, and its messages are those that vLLM repeats."""
    try:
        value = json.loads(content)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        rule = "Input should be a valid string, unable to parse raw data as a unicode string"
        raise _invalid("string_unicode", "body", rule, "<str>") from error
    except json.JSONDecodeError as error:
        detail = {
            "type": "json_invalid",
            "loc": f"body.{error.pos}",
            "msg": "JSON decode error",
            "input": "<dict of 0 items>",
            "ctx": {"error": error.msg},
        }
        message = f"1 validation error:\n  {detail}"
        raise ApiError(message, type="Bad Request", param=f"body.{error.pos}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ApiError("There was an error parsing the body", type="Bad Request") from error


def parse_chat(body: Body, config: SimulatorConfig) -> Generation:
    """A /v1/chat/completions body."""
    texts = _message_texts(body)
    streamed, include_usage, continuous = _stream_options(body)
    logprobs: int | None = None
    top_logprobs = _int(body, "top_logprobs") or 0
    if _bool(body, "logprobs", False):
        logprobs = _checked_logprobs(top_logprobs)
    elif top_logprobs:
        raise _parameter("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    template_kwargs = body.get("chat_template_kwargs")
    thinking = isinstance(template_kwargs, dict) and template_kwargs.get("enable_thinking") is True
    tool = _tool(body)
    reasoning = tool is None and (
        body.get("include_reasoning") is True or (thinking and body.get("include_reasoning") is not False)
    )
    limit_name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    generation_prompt = _bool(body, "add_generation_prompt", True)
    return Generation(
        model=_model(body, config),
        answers=_answers(
            body,
            config,
            prompts=(count_chat_tokens(texts, generation_prompt=generation_prompt),),
            pieces=lambda at: chat_pieces(texts, generation_prompt=generation_prompt),
            limit=_int(body, limit_name),
            limit_name=limit_name,
            reasoning=reasoning,
            tool=tool,
        ),
        streamed=streamed,
        include_usage=include_usage,
        continuous_usage=continuous,
        logprobs=logprobs,
        reasoning=reasoning,
        request_id=_str(body, "request_id"),
    )


def parse_completion(body: Body, config: SimulatorConfig) -> Generation:
    """A /v1/completions body: one prompt or several, as text or as token ids."""
    prompt = body.get("prompt")
    if prompt is None or prompt == "":
        raise _parameter("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if body.get("suffix"):
        raise ApiError("suffix is only supported for models with FIM completion rendering", param="suffix")
    prompts = _prompts(prompt, "prompt")
    if not prompts:
        raise ApiError("You must pass at least one prompt")
    streamed, include_usage, continuous = _stream_options(body)
    logprobs = _int(body, "logprobs")
    limit = _int(body, "max_tokens") if "max_tokens" in body else _DEFAULT_COMPLETION_TOKENS
    counts = tuple(len(entry) if isinstance(entry, list) else count_tokens(entry) for entry in prompts)
    echo = _bool(body, "echo", False)
    return Generation(
        model=_model(body, config),
        answers=_answers(
            body,
            config,
            prompts=counts,
            pieces=lambda at: _pieces(prompts[at]),
            limit=limit or None if echo else limit,
            limit_name="max_tokens",
            echoes=tuple(entry if isinstance(entry, str) else "" for entry in prompts) if echo else (),
        ),
        prompts=len(prompts),
        streamed=streamed,
        include_usage=include_usage,
        continuous_usage=continuous,
        logprobs=None if logprobs is None else _checked_logprobs(logprobs),
        request_id=_str(body, "request_id"),
    )


def parse_responses(body: Body, config: SimulatorConfig) -> Generation:
    """A /v1/responses body."""
    # vLLM puts a request_id into the body before it looks at it, and counts it in its messages.
    given = _required({"request_id": None, **body}, "input")
    items = [given] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise _invalid("list_type", "body.input", "Input should be a valid list", _shown(items))
    texts = [
        item if isinstance(item, str) else _content_text(item, f"body.input.{at}") for at, item in enumerate(items)
    ]
    if not texts:
        raise ApiError("Cannot apply chat template to an empty conversation. Provide at least one message.")
    if body.get("instructions") is not None:
        texts.insert(0, _str(body, "instructions") or "")
    limit = _int(body, "max_output_tokens")
    return Generation(
        model=_model(body, config),
        answers=_answers(
            body,
            config,
            prompts=(count_chat_tokens(texts),),
            pieces=lambda at: chat_pieces(texts),
            limit=limit,
            limit_name="max_output_tokens",
            single=True,
        ),
        streamed=_bool(body, "stream", False),
        max_tokens=limit,
        request_id=_str(body, "request_id"),
    )


def parse_messages(body: Body, config: SimulatorConfig) -> Generation:
    """An Anthropic /v1/messages body."""
    _required(body, "model")
    texts = _message_texts(body)
    _required(body, "max_tokens")
    texts = _system_texts(body) + texts
    return Generation(
        model=_model(body, config),
        answers=_answers(
            body,
            config,
            prompts=(count_chat_tokens(texts),),
            pieces=lambda at: chat_pieces(texts),
            limit=_int(body, "max_tokens"),
            limit_name="max_completion_tokens",
            single=True,
        ),
        streamed=_bool(body, "stream", False),
    )


def count_messages(body: Body) -> int:
    """The prompt tokens of a /v1/messages/count_tokens body."""
    texts = _message_texts(body)
    return count_chat_tokens(_system_texts(body) + texts)


def parse_transcription(content: bytes, content_type: str, config: SimulatorConfig) -> Generation:
    """A /v1/audio/transcriptions form. The prompt is the audio: 50 tokens a second, as Whisper's encoder has."""
    form = _multipart(content, content_type)
    audio = form.pop("file", None)
    if audio is None:
        raise _invalid("missing", "body.file", "Field required", "None")
    body: Body = {name: value.decode("utf-8", "replace") for name, value in form.items()}
    streamed = _bool(body, "stream", False)
    include_usage = _bool(body, "stream_include_usage", False)
    if include_usage and not streamed:
        raise _parameter("Stream options can only be defined when `stream=True`.", "stream_include_usage")
    audio_s = _audio_seconds(audio)
    tokens = max(1, round(audio_s * _TRANSCRIPTION_PROMPT_TOKENS_PER_S))
    return Generation(
        model=_model(body, config),
        answers=_answers(
            {**body, "file": len(audio)},
            config,
            prompts=(min(tokens, config.max_model_len - 1),),
            limit=_int(body, "max_completion_tokens"),
            limit_name="max_completion_tokens",
            single=True,
        ),
        streamed=streamed,
        include_usage=include_usage,
        continuous_usage=include_usage and _bool(body, "stream_continuous_usage_stats", False),
        audio_s=audio_s,
    )


def parse_embeddings(body: Body, config: SimulatorConfig) -> Pooling:
    """A /v1/embeddings, /pooling or /classify body: `input`, or the `messages` of a chat."""
    if "messages" in body:
        texts = _message_texts(body)
        prompts: list[str | list[int]] = [" ".join(texts)]
        counts = [count_chat_tokens(texts, generation_prompt=_bool(body, "add_generation_prompt", False))]
    else:
        prompts = _prompts(_required(body, "input"), "input")
        counts = [len(entry) if isinstance(entry, list) else count_tokens(entry) for entry in prompts]
    dimensions = _int(body, "dimensions")
    if dimensions is not None and dimensions < 1:
        raise _parameter(f"dimensions must be at least 1, got {dimensions}.", "dimensions", dimensions)
    if dimensions is not None and dimensions > config.embedding_dimensions:
        raise _parameter(
            f"dimensions must be at most {config.embedding_dimensions}, got {dimensions}.", "dimensions", dimensions
        )
    encoding = body.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise _invalid("literal_error", "body.encoding_format", "Input should be 'float' or 'base64'", _shown(encoding))
    return _pooling(
        body,
        config,
        counts,
        [str(entry) for entry in prompts],
        dimensions=dimensions or config.embedding_dimensions,
        base64=encoding == "base64",
    )


def parse_score(body: Body, config: SimulatorConfig) -> Pooling:
    """A /score body: pairs of texts; one text on the left is paired with each on the right."""
    for names in (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")):
        if names[0] in body and names[1] in body:
            break
    left, right = _texts(body, names[0]), _texts(body, names[1])
    if len(left) == 1:
        left = left * len(right)
    if len(left) != len(right):
        raise ApiError("Input lengths must be either 1:1, 1:N or N:N")
    pairs = list(zip(left, right, strict=True))
    counts = tuple(count_tokens(first) + count_tokens(second) for first, second in pairs)
    return _pooling(body, config, counts, [f"{first}\n{second}" for first, second in pairs])


def parse_rerank(body: Body, config: SimulatorConfig) -> Pooling:
    """A /rerank body: one query against documents."""
    query, documents = _texts(body, "query"), _texts(body, "documents")
    counts = tuple(count_tokens(query[0]) + count_tokens(document) for document in documents)
    top_n = _int(body, "top_n") or 0
    return _pooling(
        body,
        config,
        counts,
        [f"{query[0]}\n{document}" for document in documents],
        documents=tuple(documents),
        top_n=top_n if top_n > 0 else len(documents),
    )


def parse_tokenize(body: Body) -> TokenizeRequest:
    """A /tokenize body: `prompt`, or `messages`."""
    token_strs = _bool(body, "return_token_strs", False)
    if "messages" in body:
        texts = tuple(_message_texts(body))
        return TokenizeRequest(texts, True, _bool(body, "add_generation_prompt", True), token_strs)
    prompt = _required(body, "prompt")
    if not isinstance(prompt, str):
        raise _invalid("string_type", "body.prompt", "Input should be a valid string", _shown(prompt))
    return TokenizeRequest((prompt,), False, False, token_strs)


def parse_detokenize(body: Body) -> list[int]:
    """The token ids of a /detokenize body."""
    tokens = _required(body, "tokens")
    if not isinstance(tokens, list):
        raise _invalid("list_type", "body.tokens", "Input should be a valid list", _shown(tokens))
    for at, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int):
            rule = "Input should be a valid integer, unable to parse string as an integer"
            raise _invalid("int_parsing", f"body.tokens.{at}", rule, _shown(token))
        if not 0 <= token < 1 << 63:
            rule = "Input should be greater than or equal to 0"
            raise _invalid("greater_than_equal", f"body.tokens.{at}", rule, _shown(token))
    return tokens


def _answers(
    body: Body,
    config: SimulatorConfig,
    *,
    prompts: tuple[int, ...],
    limit: int | None,
    limit_name: str,
    reasoning: bool = False,
    tool: ToolChoice | None = None,
    pieces: Callable[[int], Sequence[str]] | None = None,
    echoes: tuple[str, ...] = (),
    single: bool = False,
) -> tuple[Answer, ...]:
    """The answers to generate, n for each prompt, or the first of vLLM's objections to the sampling parameters.

    pieces: the tokens of a prompt, by its place; asked for when prefixes are cached.
    """
    count = 1 if single else (1 if body.get("n") is None else _int(body, "n") or 0)
    if count < 1:
        raise ApiError(f"n must be at least 1, got {count}.")
    if count > _MAX_ANSWERS:
        raise _parameter(f"n must be at most {_MAX_ANSWERS}, got {count}.", "n", count)
    if limit is not None and limit > config.max_model_len:
        raise _parameter(
            f"{limit_name}={limit} cannot be greater than max_model_len={config.max_model_len}."
            " Please request fewer output tokens.",
            limit_name,
            limit,
        )
    for prompt_tokens in prompts:
        _check_context(prompt_tokens, config)
    temperature, top_p = _float(body, "temperature"), _float(body, "top_p")
    if temperature is not None and not temperature >= 0:
        raise _parameter(f"temperature must be non-negative, got {temperature}.", "temperature", temperature)
    if temperature is not None and not temperature <= 2:
        raise _parameter(f"temperature must be in [0, 2], got {temperature}.", "temperature", temperature)
    if top_p is not None and not 0 < top_p <= 1:
        raise _parameter(f"top_p must be in (0, 1], got {top_p}.", "top_p", top_p)
    min_tokens = _int(body, "min_tokens") or 0
    if min_tokens < 0:
        raise ApiError(f"min_tokens must be greater than or equal to 0, got {min_tokens}.")
    ignore_eos = _bool(body, "ignore_eos", False)
    key = draw_key(config.seed, _answer_identity(body))
    answers = []
    for at, prompt_tokens in enumerate(prompts):
        room = config.max_model_len - prompt_tokens
        most = room if limit is None else min(limit, room)
        if most < 1:
            raise _parameter(f"max_tokens must be at least 1, got {most}.", "max_tokens", most)
        if min_tokens > most:
            raise ApiError(f"min_tokens must be less than or equal to max_tokens={most}, got {min_tokens}.")
        blocks: tuple[int, ...] = ()
        if config.enable_prefix_caching and pieces is not None:
            blocks = block_hashes(pieces(at), config.block_size)
        for index in range(count):
            stream = word_stream(key, at * count + index)
            least = max(min_tokens, _LEAST_CALL_TOKENS if tool else 1)
            drawn = max(least, stream.length_tokens(config.mean_output_tokens))
            cut = ignore_eos or drawn > most
            output_tokens = most if cut else drawn
            answers.append(
                Answer(
                    prompt_tokens=prompt_tokens,
                    stream=stream,
                    output_tokens=output_tokens,
                    # vLLM: "tool_calls" when the model chose the function, "stop" when the request named it.
                    finish_reason="length" if cut else "tool_calls" if tool and not tool.named else "stop",
                    reasoning_tokens=output_tokens // 2 if reasoning else 0,
                    tool=tool.function if tool else None,
                    tool_argument=tool.argument if tool else "",
                    echo=echoes[at] if echoes else "",
                    prompt_blocks=blocks,
                )
            )
    return tuple(answers)


def _pieces(prompt: str | list[int]) -> Sequence[str]:
    return split_pieces(prompt) if isinstance(prompt, str) else [str(token) for token in prompt]


def _pooling(
    body: Body,
    config: SimulatorConfig,
    counts: Sequence[int],
    contents: list[str],
    *,
    documents: tuple[str, ...] = (),
    top_n: int = 0,
    dimensions: int = 0,
    base64: bool = False,
) -> Pooling:
    if not counts:
        raise ApiError("You must pass at least one prompt")
    for tokens in counts:
        _check_context(tokens, config)
    return Pooling(
        model=_model(body, config),
        # A real tokenizer adds at least one special token to an empty text.
        prompt_tokens=tuple(max(1, tokens) for tokens in counts),
        keys=tuple(draw_key(config.seed, content.encode()) for content in contents),
        request_id=_str(body, "request_id"),
        documents=documents,
        top_n=top_n,
        dimensions=dimensions,
        base64=base64,
    )


def _check_context(prompt_tokens: int, config: SimulatorConfig) -> None:
    if prompt_tokens > config.max_model_len:
        # vLLM stops counting at one token too many.
        counted = config.max_model_len + 1
        raise _parameter(
            f"This model's maximum context length is {config.max_model_len} tokens. However, your prompt contains"
            f" at least {counted} input tokens, which exceeds this limit even without any output tokens."
            " Please reduce the length of the input prompt.",
            "input_tokens",
            counted,
        )


def _answer_identity(body: Body) -> bytes:
    content = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    try:
        return msgspec.json.encode(content)
    except (OverflowError, msgspec.MsgspecError):  # integers past 64 bits
        return json.dumps(content).encode()


def _model(body: Body, config: SimulatorConfig) -> str:
    return _str(body, "model") or config.models[0]


def _stream_options(body: Body) -> tuple[bool, bool, bool]:
    """(stream, include_usage, continuous_usage_stats)."""
    streamed = _bool(body, "stream", False)
    options = body.get("stream_options")
    if options is None:
        return streamed, False, False
    if not isinstance(options, dict):
        rule = "Input should be a valid dictionary or object to extract fields from"
        raise _invalid("model_attributes_type", "body.stream_options", rule, _shown(options))
    if not streamed:
        raise _parameter("Stream options can only be defined when `stream=True`.", "stream_options")
    include_usage = _bool(options, "include_usage", False)
    # vLLM: continuous usage is nothing without include_usage.
    return streamed, include_usage, include_usage and _bool(options, "continuous_usage_stats", False)


def _checked_logprobs(count: int) -> int:
    if count < 0:
        raise _parameter(f"`logprobs` must be a positive value, got {count}.", "logprobs", count)
    if count > _MAX_LOGPROBS:
        raise _parameter(
            f"Requested sample logprobs of {count}, which is greater than max allowed: {_MAX_LOGPROBS}",
            "logprobs",
            count,
        )
    return count


def _tool(body: Body) -> ToolChoice | None:
    """The function to call, when the request demands a call; `auto` never calls one."""
    choice = body.get("tool_choice")
    function = choice.get("function") if isinstance(choice, dict) else None
    wanted = function.get("name") if isinstance(function, dict) else None
    if choice != "required" and not isinstance(wanted, str):
        return None
    tools = body.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        offered = tool.get("function") if isinstance(tool, dict) else None
        if isinstance(offered, dict) and isinstance(offered.get("name"), str) and wanted in (None, offered["name"]):
            parameters = offered.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, dict) else None
            names = list(properties) if isinstance(properties, dict) else []
            return ToolChoice(offered["name"], names[0] if names else "input", named=wanted is not None)
    if not tools:
        raise _parameter("When using `tool_choice`, `tools` must be set.", "tool_choice")
    raise _parameter("The tool specified in `tool_choice` does not match any of the specified `tools`", "tool_choice")


def _message_texts(body: Body) -> list[str]:
    messages = _required(body, "messages")
    if not isinstance(messages, list):
        raise _invalid("list_type", "body.messages", "Input should be a valid list", _shown(messages))
    if not messages:
        raise ApiError("Cannot apply chat template to an empty conversation. Provide at least one message.")
    for at, message in enumerate(messages):
        if isinstance(message, dict) and not isinstance(message.get("role"), str):
            raise _invalid("missing", f"body.messages.{at}.role", "Field required", _shown(message))
    return [_content_text(message, f"body.messages.{at}") for at, message in enumerate(messages)]


def _system_texts(body: Body) -> list[str]:
    system = body.get("system")
    return [] if system is None else [_content_text({"content": system}, "body.system")]


def _content_text(message: Any, place: str) -> str:
    """The text of a message: its content, or the text of its content's parts; other parts weigh nothing."""
    if not isinstance(message, dict):
        raise _invalid("dict_type", place, "Input should be a valid dictionary", _shown(message))
    content = message.get("content", message.get("output"))
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise _invalid("string_type", f"{place}.content", "Input should be a valid string", _shown(content))
    texts = [part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, (str, dict))]
    return " ".join(text for text in texts if isinstance(text, str))


def _prompts(given: Any, name: str) -> list[str | list[int]]:
    """A prompt field's prompts: a text, token ids, or a list of either."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise _invalid("list_type", f"body.{name}", "Input should be a valid list", _shown(given))
    if given and all(_is_token(entry) for entry in given):
        return [given]
    for at, entry in enumerate(given):
        if not isinstance(entry, str) and not (isinstance(entry, list) and all(_is_token(token) for token in entry)):
            raise _invalid("string_type", f"body.{name}.{at}", "Input should be a valid string", _shown(entry))
    if any(len(entry) == 0 for entry in given):
        raise ApiError("The decoder prompt cannot be empty")
    return given


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _texts(body: Body, name: str) -> list[str]:
    given = _required(body, name)
    texts = given if isinstance(given, list) else [given]
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            raise _invalid("string_type", f"body.{name}.{at}", "Input should be a valid string", _shown(text))
    if not texts:
        raise ApiError(f"At least one text must be given in {name}")
    return texts


def _required(body: Body, name: str) -> Any:
    if name not in body:
        raise _invalid("missing", f"body.{name}", "Field required", _shown(body))
    return body[name]


def _int(body: Body, name: str) -> int | None:
    """An integer field, read as pydantic reads it: whole floats and digits in a string are integers."""
    value = body.get(name)
    if value is None or isinstance(value, int):
        return None if value is None else int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    kind, rule = "int_type", "Input should be a valid integer"
    if isinstance(value, float):
        kind, rule = "int_from_float", f"{rule}, got a number with a fractional part"
    elif isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            kind, rule = "int_parsing", f"{rule}, unable to parse string as an integer"
    raise _invalid(kind, f"body.{name}", rule, _shown(value))


def _float(body: Body, name: str) -> float | None:
    value = body.get(name)
    if value is None or isinstance(value, (int, float)):
        return None if value is None else float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            rule = "Input should be a valid number, unable to parse string as a number"
            raise _invalid("float_parsing", f"body.{name}", rule, _shown(value)) from None
    raise _invalid("float_type", f"body.{name}", "Input should be a valid number", _shown(value))


def _bool(body: Body, name: str, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    known = _BOOLEANS.get(value.lower() if isinstance(value, str) else value) if _is_scalar(value) else None
    if known is None:
        raise _invalid("bool_type", f"body.{name}", "Input should be a valid boolean", _shown(value))
    return known


def _str(body: Body, name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise _invalid("string_type", f"body.{name}", "Input should be a valid string", _shown(value))
    return value


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _invalid(kind: str, place: str, rule: str, shown: str) -> ApiError:
    """A type error in the body, as vLLM prints pydantic's."""
    detail = {"type": kind, "loc": place, "msg": rule, "input": shown}
    return ApiError(f"1 validation error:\n  {detail}", type="Bad Request", param=place)


def _parameter(message: str, name: str, value: object = None) -> ApiError:
    """A parameter whose value breaks a rule."""
    suffix = f"(parameter={name})" if value is None else f"(parameter={name}, value={value})"
    return ApiError(f"{message} {suffix}", param=name)


def _shown(value: Any) -> str:
    """A value in an error message, bounded as vLLM bounds it."""
    if isinstance(value, (list, dict)):
        return f"<{type(value).__name__} of {len(value)} items>"
    text = str(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "...[truncated]"


def _multipart(content: bytes, content_type: str) -> dict[str, bytes]:
    """The fields of a multipart form (RFC 7578), each by its name; of equal names the last one."""
    _, _, parameters = content_type.partition(";")
    boundary = next(
        (
            value.strip().strip('"')
            for name, _, value in (p.partition("=") for p in parameters.split(";"))
            if name.strip().lower() == "boundary"
        ),
        "",
    )
    if not content_type.lower().startswith("multipart/form-data") or not boundary:
        raise _invalid("missing", "body.file", "Field required", "None")
    form = {}
    for part in content.split(b"--" + boundary.encode("latin-1", "replace"))[1:]:
        head, separator, value = part.partition(b"\r\n\r\n")
        _, _, name = head.decode("utf-8", "replace").partition(' name="')
        if separator and name:
            form[name.partition('"')[0]] = value.removesuffix(b"\r\n")
    return form


def _audio_seconds(audio: bytes) -> float:
    """The duration of a WAV file; of anything else a guess from its size."""
    try:
        with wave.open(io.BytesIO(audio)) as reader:
            return float(reader.getnframes() / reader.getframerate())
    except (wave.Error, EOFError, ZeroDivisionError):
        return len(audio) / _PCM_BYTES_PER_S
