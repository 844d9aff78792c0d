"""Pools of prompts: every format, in bounded memory, and rubbish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.pool import Pool

TEXTS = ["What is a token?", 'Say "é" and\n— twice', "third", "𝄞 four"]
SHAREGPT = [
    {"id": str(n), "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "an answer"}]}
    for n, text in enumerate(TEXTS)
]
PARTS = [{"type": "text", "text": "third"}, {"type": "image_url", "image_url": {"url": "x"}}]
MESSAGES: list[dict[str, Any]] = [
    {"prompt": TEXTS[0]},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": TEXTS[1]}]},
    {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "an answer"}]},
    {"conversations": [{"from": "user", "value": TEXTS[3]}]},
    {"conversations": [{"from": "gpt", "value": "nothing that a person says"}]},
]


def texts_of(path: Path, seed: int = 0) -> set[str]:
    pool = Pool(path, seed)
    return {pool.text(row, 30) for row in range(len(pool))}


FILES = [
    ("p.json", json.dumps(SHAREGPT)),
    ("p.json", json.dumps(SHAREGPT, ensure_ascii=False, indent=2)),
    ("noname", "\ufeff " + json.dumps(SHAREGPT, ensure_ascii=False)),
    ("p.jsonl", "\n".join(map(json.dumps, MESSAGES))),
    ("noname", "\n\n".join(json.dumps(each, ensure_ascii=False) for each in MESSAGES) + "\r\n"),
]


@pytest.mark.parametrize(("name", "content"), FILES)
def test_formats(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    found = texts_of(path)
    assert len(found) == 4
    assert all(any(text.startswith(each) for text in found) for each in TEXTS)


def test_a_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff[one]\n\n  two \r\nthree \x00 \xff\n".encode("latin-1", "replace"))
    pool = Pool(path, 0)
    assert len(pool) == 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=30), st.integers(1, 50))
def test_chunks_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk_bytes: int) -> None:
    path = tmp_path_factory.mktemp("pool") / "p.json"
    path.write_text(json.dumps([{"prompt": text} for text in texts], ensure_ascii=False), "utf-8", "replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("replay.pool.CHUNK_BYTES", chunk_bytes)
        assert len(Pool(path, 0)) == len(texts)


@given(st.integers(1, 40), st.integers(0, 2**64))
def test_each_entry_is_taken_once_before_one_is_again(
    tmp_path_factory: pytest.TempPathFactory, count: int, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "each.txt"
    path.write_text("\n".join(f"<{n}>" + "x" * 20 for n in range(count)))
    pool = Pool(path, seed)
    for first in (0, count, 7 * count):
        assert len({pool.text(row, 5) for row in range(first, first + count)}) == count
    assert [pool.is_repeated(row) for row in (0, count - 1, count)] == [False, False, True]


@settings(max_examples=50)
@given(st.integers(1, 5000), st.integers(0, 10**6))
def test_texts_are_cut_and_extended(tmp_path_factory: pytest.TempPathFactory, size_chars: int, row: int) -> None:
    path = tmp_path_factory.getbasetemp() / "few.txt"
    path.write_text("one prompt\nanother one\nx\n")
    pool = Pool(path, 3)
    text = pool.text(row, size_chars)
    assert size_chars - 2 <= len(text) <= size_chars  # blanks at the ends go
    assert pool.text(row, 2 * size_chars).startswith(text)
    assert text == text.strip()


WRONG = [
    ("p.json", b"", "expected a JSON list of conversations"),
    ("p.txt", b"", "expected prompts, got none"),
    ("p.txt", b"\n \n\r\n", "expected prompts, got none"),
    ("p.jsonl", b"", "expected prompts, got none"),
    ("p.json", b"[]", "expected prompts, got none"),
    ("p.json", b'{"a": 1}', "byte 0: expected a JSON list of conversations"),
    ("p.json", b'[{"prompt": "a"}, {"prompt": "b"', "byte 18: expected a JSON list of conversations"),
    ("p.json", b'[{"prompt": "a"} x]', "byte 17: expected a JSON list"),
    ("p.json", b"[1, 2]", "byte 1: expected a JSON object, got int"),
    ("p.json", b'[{"text": "a", "n": 1}]', "byte 1: expected a field conversations, .* prompt, got 'text', 'n'"),
    ("p.json", b"[" * 100_000, "expected a JSON list of conversations"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "byte 16: expected a JSON object"),
    ("p.jsonl", b'{"prompt": "\xff"}\n', "byte 0: expected a JSON object"),
    ("p.jsonl", b"{}\n", "byte 0: expected a field conversations, messages or prompt, got none"),
    ("p.jsonl", b'{"messages": 5}\n', "byte 0: expected a field conversations"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_rubbish(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Pool(tmp_path / name, 0)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"ok\n" + b"x" * 9000, "byte 3: expected a line of at most 4096 bytes"),
        ("p.json", b'[{"prompt": "' + b"x" * 90_000 + b'"}]', "byte 1: expected JSON with items of at most 4096 bytes"),
    ],
)
def test_a_huge_entry(name: str, content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.pool.MAX_ENTRY_BYTES", 4096)
    monkeypatch.setattr("replay.pool.CHUNK_BYTES", 1024)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Pool(tmp_path / name, 0)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Pool(tmp_path / "none", 0)
