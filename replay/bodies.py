"""The bodies of a replay's requests, by endpoint, and what a user adds to them: fields and headers.

    chat          messages: the turns before it, then the prompt as the user's
    completions   prompt: the turns before it and the prompt as one text, an answer right after what it answers
    embeddings    input: the prompt; no stream and no length of an answer

`max_tokens`, `min_tokens` and `ignore_eos` force the length of an answer on vLLM; each can be left out. Fields of the
user's own replace ours of the same name. A header's value may name an environment variable (`$NAME`), so that no
secret is an argument; its value is never shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from replay.client import Endpoint, ReplayError
from replay.history import Turns
from wire.http1 import Headers

OWN_FIELDS: Final = frozenset({"model", "messages", "prompt", "input", "stream"})
"""What the replay itself decides; each has an option of its own or is the prompt."""
OWN_HEADERS: Final = frozenset(
    {
        "connection", "content-encoding", "content-length", "content-type", "expect", "host", "keep-alive",
        "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "x-request-id", "x-session-id",
    }
)  # fmt: skip
"""What HTTP needs to be right, and what the gateway reads of a replay's requests; so is all of x-burstgate-*."""
MAX_FIELDS_BYTES: Final = 16 * 1024 * 1024

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""RFC 9110, section 5.6.2."""
_VALUE = re.compile(r"[!-~]([ -~]*[!-~])?")
_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request asks: the turns before it, and its own text."""

    text: str
    turns: Turns = ()


def flat_text(prompt: Prompt) -> str:
    """The prompt as one text, for endpoints without messages."""
    if not prompt.turns:
        return prompt.text
    return " ".join((*(turn.user + turn.assistant for turn in prompt.turns), prompt.text))


def messages(prompt: Prompt) -> list[dict[str, str]]:
    """The prompt as chat messages."""
    found = []
    for turn in prompt.turns:
        found += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.assistant}]
    return [*found, {"role": "user", "content": prompt.text}]


class BodyWriter:
    """Writes the bodies of one replay's requests."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        stream: bool,
        max_tokens: bool = True,
        min_tokens: bool = True,
        ignore_eos: bool = True,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._model = model
        rest: dict[str, Any] = {}
        names: list[str] = []
        if endpoint != "embeddings":
            names = ["max_tokens"] * max_tokens + ["min_tokens"] * min_tokens
            rest |= {"ignore_eos": True} if ignore_eos else {}
            rest |= {"stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
        rest |= fields or {}
        self._starts: dict[str, bytes] = {}
        self._counted = tuple(b',"%b":%%d' % name.encode() for name in names if name not in rest)
        self._after = (b"," + _encode(rest)[1:]) if rest else b"}"

    def body(self, prompt: Prompt, response_tokens: int, model: str | None = None) -> bytes:
        """A request for exactly `response_tokens` tokens, as vLLM takes it.

        model: of the row, where the replay has none for all; without any vLLM takes its only one.
        """
        start = self._start(model)
        counts = b"".join([name % response_tokens for name in self._counted])
        if self._endpoint == "chat":
            field, value = b'"messages":', _encode(messages(prompt))
        else:
            field = b'"prompt":' if self._endpoint == "completions" else b'"input":'
            value = _encode(flat_text(prompt))
        return b"".join((start, field, value, counts, self._after))

    def _start(self, model: str | None) -> bytes:
        name = self._model or model or ""
        start = self._starts.get(name)
        if start is None:
            start = self._starts[name] = _encode({"model": name})[:-1] + b"," if name else b"{"
        return start

    def question(self, prompt: Prompt) -> bytes:
        """The body that asks vLLM's /tokenize for the prompt's tokens, the chat template included."""
        body: dict[str, Any] = {"model": self._model} if self._model else {}
        if self._endpoint == "chat":
            return _encode(body | {"messages": messages(prompt), "add_generation_prompt": True})
        return _encode(body | {"prompt": flat_text(prompt)})


def parse_fields(text: str) -> dict[str, Any]:
    """A JSON object, or @FILE that holds one. Raises ValueError naming the rule; OSError where the file is none."""
    place = "extra body"
    data = text.encode()
    if text.startswith("@"):
        place = f"extra body {text[1:]}"
        with Path(text[1:]).open("rb") as stream:
            data = stream.read(MAX_FIELDS_BYTES + 1)
    if len(data) > MAX_FIELDS_BYTES:
        raise ValueError(f"{place}: expected at most {MAX_FIELDS_BYTES} bytes, got more")
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: expected a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(found).__name__}")
    return found


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raises ValueError for a field that is the replay's own, or a value that is no JSON."""
    for name in fields:
        if name in OWN_FIELDS:
            raise ValueError(f"extra body: expected no field {name!r}, which the replay itself sets")
    try:
        _encode(fields)
    except (TypeError, ValueError, msgspec.EncodeError, RecursionError) as error:
        raise ValueError(f"extra body: expected values that JSON has: {error}") from None


def parse_header(text: str) -> tuple[str, str]:
    """NAME=VALUE or NAME=$VARIABLE. Raises ValueError naming the rule."""
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"header: expected NAME=VALUE, got {text!r}")
    check_header(name.strip(), value.strip())
    return name.strip(), value.strip()


def check_header(name: str, value: str) -> None:
    """Raises ValueError for a header that cannot be sent beside ours. Never shows the value."""
    if not _TOKEN.fullmatch(name):
        raise ValueError(f"header: expected a name of letters, digits and -, got {name!r}")
    if name.lower() in OWN_HEADERS or name.lower().startswith("x-burstgate-"):
        raise ValueError(f"header {name}: expected another name, as the replay itself sets this one")
    if value and not _VALUE.fullmatch(value):
        raise ValueError(f"header {name}: expected a value of visible ASCII characters and spaces")
    if name.lower() == "authorization" and not _VARIABLE.fullmatch(value):
        raise ValueError(f"header {name}: expected $VARIABLE of the environment, or the option --api-key-env")


def header_lines(headers: tuple[tuple[str, str], ...]) -> Headers:
    """The headers as they are sent, with what the environment holds. Raises ReplayError naming a missing variable."""
    lines: Headers = []
    for name, value in headers:
        variable = _VARIABLE.fullmatch(value)
        if variable is not None:
            held = os.environ.get(variable[1], "").strip()
            if not _VALUE.fullmatch(held):
                state = "holds more than visible ASCII characters" if held else "is not set"
                raise ReplayError(f"header {name}: the environment variable {variable[1]} {state}")
            value = held
        lines.append((name.encode(), value.encode()))
    return lines
