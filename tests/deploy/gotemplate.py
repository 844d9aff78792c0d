"""Renders the part of Go's templates, with Helm's functions, that this chart uses; anything else is an error.

Not Helm: no packages of these exist for the registries that the tests use. What is here follows text/template's rules
(trimming, pipelines, `with` and `range` skipping empty values, `$` for the root) and sprig's for the functions named.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

_ACTION = re.compile(r"\{\{(-\s)?(.*?)(\s-)?\}\}", re.DOTALL)
_WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[()|]|[^\s()|"]+)')


class TemplateError(Exception):
    """A template that does not parse, or says `required`."""


@dataclass
class Node:
    """Text, an action, or a block with its branches: (keyword and pipeline, what is inside)."""

    kind: str
    text: str = ""
    branches: list[tuple[str, list[Node]]] = field(default_factory=list)


def parse(source: str) -> list[Node]:
    """The tree of a file. Raises TemplateError."""
    pieces: list[tuple[bool, str]] = []
    end, trims = 0, False
    for action in _ACTION.finditer(source):
        text = source[end : action.start()]
        text = text.lstrip() if trims else text
        pieces.append((False, text.rstrip() if action[1] else text))
        pieces.append((True, action[2].strip()))
        end, trims = action.end(), bool(action[3])
    rest = source[end:]
    pieces.append((False, rest.lstrip() if trims else rest))
    tree, left = _block(iter(pieces))
    if left:
        raise TemplateError(f"{left!r} without a beginning")
    return tree


def _block(pieces: Iterator[tuple[bool, str]]) -> tuple[list[Node], str]:
    """Nodes up to the `end` or `else` that closes them, and that word; empty at the source's end."""
    nodes: list[Node] = []
    for is_action, text in pieces:
        word = text.split(maxsplit=1)[0] if text.strip() else ""
        if not is_action:
            nodes.append(Node("text", text))
        elif word in ("end", "else"):
            return nodes, text
        elif word in ("if", "with", "range", "define"):
            branches, head = [], text
            while head != "end":
                inner, closing = _block(pieces)
                branches.append((head, inner))
                if not closing:
                    raise TemplateError(f"{text!r} has no end")
                head = closing
            nodes.append(Node(word, branches=branches))
        elif not text.startswith("/*"):
            nodes.append(Node("action", text))
    return nodes, ""


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", 0) or (isinstance(value, list | dict) and not value)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "<no value>" if value is None else str(value)


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=False, sort_keys=True, width=10**6)
    return text.removesuffix("...\n").rstrip("\n")


def _indent(width: int, text: str) -> str:
    return "\n".join(" " * width + line for line in text.split("\n"))


def _required(message: str, value: Any) -> Any:
    if value is None or value == "":
        raise TemplateError(message)
    return value


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "quote": lambda value: json.dumps(_show(value), ensure_ascii=False),
    "default": lambda other, value: other if _is_empty(value) else value,
    "toYaml": _yaml,
    "nindent": lambda width, text: "\n" + _indent(width, text),
    "indent": _indent,
    "printf": lambda form, *values: form.replace("%v", "%s") % tuple(map(_show, values)),
    "contains": lambda part, text: part in text,
    "trunc": lambda length, text: text[:length],
    "trimSuffix": lambda suffix, text: text.removesuffix(suffix),
    "add": lambda *values: sum(values),
    "int": int,
    "not": _is_empty,
    "and": lambda *values: next((value for value in values if _is_empty(value)), values[-1]),
    "or": lambda *values: next((value for value in values if not _is_empty(value)), values[-1]),
    "eq": lambda a, b: a == b,
    "required": _required,
    "sha256sum": lambda text: hashlib.sha256(text.encode()).hexdigest(),
}


class Chart:
    """Templates by name, and what is `define`d in them."""

    def __init__(self, sources: dict[str, str]) -> None:
        self._files = {name: parse(source) for name, source in sources.items()}
        self._defined: dict[str, list[Node]] = {}
        for tree in self._files.values():
            for node in tree:
                if node.kind == "define":
                    head, inner = node.branches[0]
                    self._defined[json.loads(head.split(maxsplit=1)[1])] = inner

    def render(self, root: dict[str, Any]) -> dict[str, str]:
        """Every file's text. Raises TemplateError."""
        return {name: self._run(tree, root, root) for name, tree in self._files.items()}

    def _run(self, nodes: list[Node], dot: Any, root: Any) -> str:
        return "".join(self._one(node, dot, root) for node in nodes)

    def _one(self, node: Node, dot: Any, root: Any) -> str:
        if node.kind == "text":
            return node.text
        if node.kind == "action":
            return _show(self._evaluate(node.text, dot, root))
        if node.kind == "define":
            return ""
        for head, inner in node.branches:
            word, _, condition = head.removeprefix("else").strip().partition(" ")
            value: Any = self._evaluate(condition, dot, root) if word else True
            if _is_empty(value):
                continue
            if not word or node.kind == "if":
                return self._run(inner, dot, root)
            each = value if node.kind == "range" else [value]
            return "".join(self._run(inner, item, root) for item in each)
        return ""

    def _evaluate(self, text: str, dot: Any, root: Any) -> Any:
        words, end = [], 0
        while match := _WORD.match(text, end):
            words.append(match[1])
            end = match.end()
        if text[end:].strip():
            raise TemplateError(f"{text!r}: not understood from {text[end:]!r}")
        value, left = self._pipeline(words, dot, root)
        if left:
            raise TemplateError(f"{text!r}: {left[0]!r} is too much")
        return value

    def _pipeline(self, words: list[str], dot: Any, root: Any) -> tuple[Any, list[str]]:
        value, words = self._command(words, [], dot, root)
        while words and words[0] == "|":
            value, words = self._command(words[1:], [value], dot, root)
        return value, words

    def _command(self, words: list[str], piped: list[Any], dot: Any, root: Any) -> tuple[Any, list[str]]:
        name, arguments = words[0], []
        is_call = name == "include" or name in FUNCTIONS
        words = words[1:] if is_call else words
        while words and words[0] not in ("|", ")"):
            argument, words = self._argument(words, dot, root)
            arguments.append(argument)
        arguments += piped
        if name == "include":
            inner, context = arguments
            return self._run(self._defined[inner], context, context), words
        if is_call:
            return FUNCTIONS[name](*arguments), words
        if len(arguments) != 1:
            raise TemplateError(f"{name!r}: no such function here")
        return arguments[0], words

    def _argument(self, words: list[str], dot: Any, root: Any) -> tuple[Any, list[str]]:
        word, words = words[0], words[1:]
        if word == "(":
            value, words = self._pipeline(words, dot, root)
            return value, words[1:]
        if word.startswith('"') or re.fullmatch(r"-?\d+|true|false", word):
            return json.loads(word), words
        if word.startswith(("$.", ".")) or word == "$":
            value = root if word.startswith("$") else dot
            for key in filter(None, word.lstrip("$").split(".")):
                if not isinstance(value, dict):
                    raise TemplateError(f"{word}: {key} of what is no mapping")
                value = value.get(key)
            return value, words
        raise TemplateError(f"{word!r}: not understood")
