"""A file of real prompts to take texts from: an index of where they are in memory, the texts on disk.

    .json    ShareGPT: a list of {"conversations": [{"from": "human", "value": TEXT}, ...]}; what people say counts
    .jsonl   an object a line: {"prompt": TEXT}, {"messages": [{"role": "user", "content": TEXT}, ...]}, or as above
    .txt     a prompt a line; blank lines count for nothing

Another suffix is judged by the first character: `[` is a list, `{` lines of objects, all else text. Entries without a
text are skipped; the first MAX_ENTRIES with one are used.

Row i takes entry a * i + b (mod entries), a and b from the seed, a prime to the number of entries: each entry is taken
once before one is taken again, and what is taken again has words of the row's own before it. So two prompts begin
alike only where the file's do. A longer prompt goes on with the entries that a draw from (seed, i) names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import weakref
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import msgspec

MAX_ENTRIES: Final = 1_000_000
"""Twelve bytes of memory each."""
MAX_ENTRY_BYTES: Final = 16 * 1024 * 1024
CHUNK_BYTES: Final = 1024 * 1024
CACHED_TEXTS: Final = 256
MAX_JOINED: Final = 64
"""Entries that one prompt is made of before they are repeated."""
SPEAKERS: Final = frozenset({"human", "user"})

Kind = Literal["list", "lines", "text"]
_KINDS: dict[str, Kind] = {".json": "list", ".jsonl": "lines", ".ndjson": "lines", ".txt": "text"}
_SPACE = b" \t\r\n"
_BYTE_ORDER_MARK = "\u00ef\u00bb\u00bf"
"""Its bytes in UTF-8, as Latin-1."""
_raw_decode = json.JSONDecoder().raw_decode


class Pool:
    """The prompts of a file. `close` when done, or leave it to the garbage collector."""

    def __init__(self, path: Path, seed: int) -> None:
        """Raises ValueError naming the file, the place and the rule; OSError where it cannot be read."""
        self.path = path
        self._stream = path.open("rb", buffering=0)
        self.close = weakref.finalize(self, self._stream.close)
        self._file = self._stream.fileno()
        self._starts, self._sizes = array("Q"), array("I")
        self._kind = _kind_of(path, self._stream)
        for start, data in _entries(path, self._stream, self._kind):
            if _text_of(data, self._kind, f"{path}: byte {start}"):
                self._starts.append(start)
                self._sizes.append(len(data))
                if len(self._starts) == MAX_ENTRIES:
                    break
        if not self._starts:
            self.close()
            raise ValueError(f"{path}: expected prompts, got none")
        self._seed = seed
        draws = struct.unpack("<2Q", hashlib.blake2b(f"{seed}pool".encode(), digest_size=16).digest())
        self._step, self._first = _prime_to(draws[0] % len(self), len(self)), draws[1]
        self._text = lru_cache(CACHED_TEXTS)(self._read)

    def __len__(self) -> int:
        return len(self._starts)

    def is_repeated(self, row: int) -> bool:
        """Every entry has been taken by the rows before this one."""
        return row >= len(self)

    def text(self, row: int, size_chars: int) -> str:
        """`size_chars` characters for a row of the trace, without blanks at its ends. More begin as fewer do."""
        if size_chars < 1:
            return ""
        text = self._text((self._step * row + self._first) % len(self))
        if len(text) < size_chars:
            parts, joined = [text], len(text)
            draws = hashlib.shake_128(f"{self._seed}pool{row}".encode()).digest(4 * MAX_JOINED)
            for draw in struct.unpack(f"<{MAX_JOINED}I", draws):
                parts.append(self._text(draw % len(self)))
                joined += 1 + len(parts[-1])
                if joined >= size_chars:
                    break
            text = " ".join(parts)
            text = " ".join([text] * -(-size_chars // (len(text) + 1)))
        return text[:size_chars].strip()

    def _read(self, entry: int) -> str:
        start = self._starts[entry]
        place = f"{self.path}: byte {start}"
        return _text_of(os.pread(self._file, self._sizes[entry], start), self._kind, place)


def _kind_of(path: Path, stream: BinaryIO) -> Kind:
    known = _KINDS.get(path.suffix.lower())
    head = stream.read(CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip(_SPACE)[:1]
    stream.seek(0)
    return known or {b"[": "list", b"{": "lines"}.get(head, "text")  # type: ignore[return-value]


def _prime_to(draw: int, count: int) -> int:
    """The first number from `draw` on that has no divisor in common with `count`."""
    return next(step for step in range(max(1, draw), max(1, draw) + count + 1) if math.gcd(step, count) == 1)


def _entries(path: Path, stream: BinaryIO, kind: Kind) -> Iterator[tuple[int, bytes]]:
    """Where each entry starts, and its bytes."""
    return _items(path, stream) if kind == "list" else _lines(path, stream)


def _lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    start, carry = 0, b""
    while chunk := stream.read(CHUNK_BYTES):
        *lines, carry = (carry + chunk).split(b"\n")
        for line in lines:
            if line.strip(_SPACE):
                yield start, line
            start += len(line) + 1
        if len(carry) > MAX_ENTRY_BYTES:
            raise ValueError(f"{path}: byte {start}: expected a line of at most {MAX_ENTRY_BYTES} bytes, got more")
    if carry.strip(_SPACE):
        yield start, carry


def _items(path: Path, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The items of a JSON list. As Latin-1 a character is a byte, and JSON's own characters stay what they are."""
    text, start, at = "", 0, 0
    """start: of the text in the file; at: in the text."""
    is_open = is_first = True
    needed = 1
    while is_open:
        while len(text) - at < needed and (chunk := stream.read(CHUNK_BYTES)):
            text, start, at = text[at:] + chunk.decode("latin-1"), start + at, 0
        is_whole = len(text) - at < needed
        if is_first and text.startswith(_BYTE_ORDER_MARK):
            at = len(_BYTE_ORDER_MARK)
        at = _skip(text, at)
        mark = text[at : at + 1]
        if is_first:
            if mark != "[":
                raise ValueError(f"{path}: byte {start + at}: expected a JSON list of conversations")
            is_first, at = False, at + 1
            continue
        if mark == "]":
            is_open = False
        elif mark == ",":
            at += 1
        elif mark or is_whole:
            try:
                _, end = _raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if is_whole:
                    raise ValueError(
                        f"{path}: byte {start + at}: expected a JSON list of conversations: {error}"
                    ) from None
                needed = 2 * max(needed, CHUNK_BYTES)
                if needed > 2 * MAX_ENTRY_BYTES:
                    raise ValueError(
                        f"{path}: byte {start + at}: expected JSON with items of at most {MAX_ENTRY_BYTES} bytes"
                    ) from None
                continue
            if end == len(text) and not is_whole:
                needed = len(text) - at + 1  # a number may go on
                continue
            yield start + at, text[at:end].encode("latin-1")
            at = end
        needed = 1


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in " \t\r\n":
        at += 1
    return at


def _text_of(data: bytes, kind: Kind, place: str) -> str:
    """An entry's text, of what people say; empty where it has none. Raises ValueError naming the place."""
    if kind == "text":
        return data.decode("utf-8", "replace").removeprefix("\ufeff").strip()
    try:
        entry = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: expected a JSON object: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(entry).__name__}")
    if isinstance(entry.get("prompt"), str):
        return str(entry["prompt"]).strip()
    for name, speaker, content in (("conversations", "from", "value"), ("messages", "role", "content")):
        if isinstance(said := entry.get(name), list):
            texts = [
                _content(each.get(content)) for each in said if isinstance(each, dict) and each.get(speaker) in SPEAKERS
            ]
            return "\n".join(filter(None, texts)).strip()
    names = ", ".join(repr(str(name)[:40]) for name in list(entry)[:5])
    raise ValueError(f"{place}: expected a field conversations, messages or prompt, got {names or 'none'}")


def _content(value: Any) -> str:
    """A message's text; of a list of parts, theirs."""
    if isinstance(value, list):
        return "\n".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
    return value if isinstance(value, str) else ""
