"""Bodies of every endpoint, and what a user adds to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.bodies import BodyWriter, Prompt, check_fields, header_lines, parse_fields, parse_header
from replay.client import Endpoint, ReplayError
from replay.history import Turn

ASKED = {"model": "m", "max_tokens": 7, "min_tokens": 7, "ignore_eos": True, "stream": False}
STREAMED = {**ASKED, "stream": True, "stream_options": {"include_usage": True}}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("endpoint", "options", "expected"),
    [
        ("chat", {"stream": True}, {**STREAMED, "messages": HELLO}),
        ("chat", {"stream": False}, {**ASKED, "messages": HELLO}),
        ("completions", {"stream": True}, {**STREAMED, "prompt": "hello"}),
        ("embeddings", {"stream": True}, {"model": "m", "input": "hello"}),
        ("embeddings", {"stream": False, "fields": {"user": "u"}}, {"model": "m", "input": "hello", "user": "u"}),
        (
            "completions",
            {"stream": False, "max_tokens": False, "min_tokens": False, "ignore_eos": False},
            {"model": "m", "prompt": "hello", "stream": False},
        ),
        (
            "completions",
            {"stream": False, "min_tokens": False, "fields": {"max_tokens": 2, "ignore_eos": False, "top_k": 1}},
            {"model": "m", "prompt": "hello", "max_tokens": 2, "ignore_eos": False, "stream": False, "top_k": 1},
        ),
    ],
)  # fmt: skip
def test_bodies(endpoint: Endpoint, options: dict[str, Any], expected: dict[str, Any]) -> None:
    assert json.loads(BodyWriter(endpoint, "m", **options).body(Prompt("hello"), 7)) == expected


TURNS = (Turn("one", "two", 3), Turn("three", "four", 6))


def test_earlier_turns() -> None:
    prompt = Prompt("five", TURNS)
    said = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"), ("user", "five")]
    messages = [{"role": role, "content": content} for role, content in said]
    chat = BodyWriter("chat", "m", stream=False)
    assert json.loads(chat.body(prompt, 1))["messages"] == messages
    assert json.loads(chat.question(prompt)) == {"model": "m", "messages": messages, "add_generation_prompt": True}
    completions = BodyWriter("completions", "m", stream=False)
    assert json.loads(completions.body(prompt, 1))["prompt"] == "onetwo threefour five"
    assert json.loads(completions.question(prompt)) == {"model": "m", "prompt": "onetwo threefour five"}


@given(st.text(), st.text(max_size=20), st.integers(0, 10**9))
def test_any_text_comes_through(text: str, model: str, tokens: int) -> None:
    body = json.loads(BodyWriter("completions", model, stream=True).body(Prompt(text), tokens))
    assert (body["prompt"], body.get("model", ""), body["max_tokens"], body["min_tokens"]) == (
        text,
        model,
        tokens,
        tokens,
    )


def test_fields_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "fields.json"
    path.write_text('{"temperature": 0}')
    assert parse_fields(f"@{path}") == parse_fields('{"temperature":0}') == {"temperature": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "extra body: expected a JSON object: "),
        ("{", "extra body: expected a JSON object: "),
        ("[1]", "extra body: expected a JSON object, got list"),
        ("[" * 100_000, "extra body: expected a JSON object: "),
        ("\x00", "extra body: expected a JSON object: "),
    ],
)
def test_wrong_fields(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_fields(text)


@pytest.mark.parametrize("name", ["model", "messages", "prompt", "input", "stream"])
def test_fields_that_are_the_replays_own(name: str) -> None:
    with pytest.raises(ValueError, match=f"extra body: expected no field '{name}'"):
        check_fields({name: 1})


def test_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_SECRET", "s3cret")
    parsed = [parse_header(text) for text in ("x-team=a b", "api-key=$THE_SECRET", "x-price=$5=6", "x-none=")]
    assert parsed == [("x-team", "a b"), ("api-key", "$THE_SECRET"), ("x-price", "$5=6"), ("x-none", "")]
    assert header_lines(tuple(parsed)) == [
        (b"x-team", b"a b"),
        (b"api-key", b"s3cret"),
        (b"x-price", b"$5=6"),
        (b"x-none", b""),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "header: expected NAME=VALUE, got 'nothing'"),
        ("=v", "header: expected a name"),
        ("a b=v", "header: expected a name"),
        ("a:=v", "header: expected a name"),
        ("x=a\r\nevil: 1", "header x: expected a value of visible ASCII"),
        ("x=é", "header x: expected a value of visible ASCII"),
        ("Content-Length=3", "header Content-Length: expected another name"),
        ("host=h", "header host: expected another name"),
        ("X-BurstGate-Origin=client", "expected another name"),
        ("authorization=Bearer s3cret", "header authorization: expected \\$VARIABLE of the environment"),
    ],
)
def test_wrong_headers(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_header(text)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"), [(None, "is not set"), ("", "is not set"), ("s3\ncret", "visible ASCII")]
)
def test_a_variable_without_a_value(value: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THE_SECRET", raising=False)
    if value is not None:
        monkeypatch.setenv("THE_SECRET", value)
    with pytest.raises(ReplayError, match=f"header api-key: the environment variable THE_SECRET .*{message}") as caught:
        header_lines((("api-key", "$THE_SECRET"),))
    assert "cret" not in str(caught.value).replace("THE_SECRET", "")
