"""A model's own tokenizer and chat template, from local files, to count prompts as the server counts them.

A folder as Hugging Face's tools write it, or the tokenizer.json in one:

    tokenizer.json          the tokenizer
    chat_template.jinja     the chat template; else `chat_template` in tokenizer_config.json, of several the one named
                            default
    tokenizer_config.json   bos_token, eos_token and the like, which templates use

A template is rendered as Hugging Face's `apply_chat_template` does, with a generation prompt, and its text is encoded
without further special tokens; plain text is encoded with them. Nothing is ever downloaded.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from replay.bodies import Prompt, flat_text, messages

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_FILE_BYTES = 256 * 1024 * 1024
"""Of a tokenizer.json; the largest published ones have some 35 MB."""

_MARK = "burstgate mark"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class LocalTokenizer:
    """Counts the tokens of prompts. Its methods may run in any thread."""

    def __init__(self, tokenizer: Tokenizer, render: Callable[[list[dict[str, str]]], str] | None) -> None:
        """render: a chat's messages as one text; None for endpoints without messages."""
        self._tokenizer = tokenizer
        self._render = render
        self._around = None if render is None else _surroundings(render)

    def count(self, prompt: Prompt) -> int:
        """The prompt's tokens, its chat template included. Raises ValueError where the template refuses it."""
        if self._render is None:
            text = flat_text(prompt)
        elif self._around is not None and not prompt.turns and prompt.text == prompt.text.strip():
            text = prompt.text.join(self._around)
        else:
            text = self._render(messages(prompt))
        # In this form the interpreter is free while it counts, and no offsets are made.
        return len(self._tokenizer.encode_batch_fast([text], add_special_tokens=self._render is None)[0])


def load_tokenizer(path: Path, *, chat: bool) -> LocalTokenizer:
    """The tokenizer in a folder or in a tokenizer.json, with the chat template beside it if `chat`.

    Raises ValueError naming the file and what is wrong with it, OSError where one cannot be read.
    """
    from tokenizers import Tokenizer

    folder = path if path.is_dir() else path.parent
    file = folder / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"tokenizer {path}: expected a tokenizer.json, or a folder with one")
    data = _read(file)
    try:
        tokenizer = Tokenizer.from_str(data)
    except Exception as error:  # noqa: BLE001 - it raises Exception itself, for every kind of wrong file
        raise ValueError(f"{file}: expected a tokenizer as Hugging Face's: {_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return LocalTokenizer(tokenizer, _renderer(folder) if chat else None)


def _renderer(folder: Path) -> Callable[[list[dict[str, str]]], str]:
    """Renders messages with the folder's chat template. Raises ValueError where it has none or a wrong one."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    config = _config(folder / "tokenizer_config.json")
    file, source = folder / "chat_template.jinja", None
    if file.is_file():
        source = _read(file)
    else:
        file = folder / "tokenizer_config.json"
        source = config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
            source = named.get("default")
    if not isinstance(source, str):
        wanted = "a chat template in chat_template.jinja or tokenizer_config.json, as the endpoint is chat"
        raise ValueError(f"{folder}: expected {wanted}, got none")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)  # noqa: DTZ005 - the server's template means its local time too

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **rest: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **rest)

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what an assistant said, for training; its inside is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    special = {name: text for name in _SPECIAL if (text := _token_text(config.get(name))) is not None}
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"{file}: expected a chat template: {_line(error)}") from None

    def render(chat: list[dict[str, str]]) -> str:
        try:
            return template.render(messages=chat, tools=None, documents=None, add_generation_prompt=True, **special)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"{file}: the chat template fails: {_line(error)}") from None

    render([{"role": "user", "content": _MARK}])
    return render


def _surroundings(render: Callable[[list[dict[str, str]]], str]) -> tuple[str, str] | None:
    """What a template puts before and after a single message, which it may strip; None where that depends on it."""

    def single(text: str) -> str:
        return render([{"role": "user", "content": text}])

    before, mark, after = single(_MARK).partition(_MARK)
    probes = ("a", "of two words", f"{'much longer ' * 2000}text")
    if not mark or _MARK in after or any(single(text) != text.join((before, after)) for text in probes):
        return None
    return before, after


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = msgspec.json.decode(_read(file))
    except msgspec.DecodeError as error:
        raise ValueError(f"{file}: expected JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found


def _token_text(value: Any) -> str | None:
    """A special token, written as its text or as an object with its text."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _read(file: Path) -> str:
    with file.open("rb") as stream:
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{file}: expected at most {MAX_FILE_BYTES} bytes, got more")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8: {error}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
