"""What two prompts have in common at their beginning, as keyed hashes; never a text.

A prompt is brought into one form (below) and cut into blocks of `BLOCK_BYTES`. The hash of a block is BLAKE2b (64 bits,
key in `DATA_DIR/secret`) of the hash before it and the block's bytes: two prompts begin alike for as many whole blocks
as their lists of hashes begin alike. 256 bytes are some 64 tokens, four of vLLM's cache blocks; the first
`MAX_BLOCKS` (16 KiB of text, some 4,000 tokens) are looked at. What is left over after the last whole block is not.

The form: of each message its role, NUL, its text, NUL. JSON's escapes are undone, so that clients which escape
differently agree. The texts of a content's parts are joined; a part without text (an image) counts with its JSON. A
plain prompt is its text; of a list of prompts the first one counts; token ids are their decimal numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import msgspec

BLOCK_BYTES = 256
MAX_BLOCKS = 64
_MAX_BYTES = BLOCK_BYTES * MAX_BLOCKS


class _Message(msgspec.Struct, gc=False):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw()


class _Body(msgspec.Struct, gc=False):
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()


class _Part(msgspec.Struct, gc=False):
    text: str | None = None


_body_decoder = msgspec.json.Decoder(_Body)
_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_message_decoder = msgspec.json.Decoder(_Message)
_part_decoder = msgspec.json.Decoder(_Part)
_text_decoder = msgspec.json.Decoder(str)


def prompt_of(body: bytes) -> bytes:
    """The JSON value of a request body's `messages`, `prompt` or `input`; empty where there is none."""
    try:
        fields = _body_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return b""
    return bytes(fields.messages or fields.prompt or fields.input)


def prefix_blocks(messages_or_prompt: bytes, secret: bytes) -> tuple[int, ...]:
    """The hashes of the leading blocks, at most MAX_BLOCKS.

    messages_or_prompt: the JSON value of a request's `messages`, `prompt` or `input`; what is no such value has none.
    """
    text = bytearray()
    try:
        for piece in _pieces(messages_or_prompt):
            text += piece
            if len(text) >= _MAX_BYTES:
                break
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return ()
    blocks = []
    digest = b""
    for start in range(0, min(len(text), _MAX_BYTES) - BLOCK_BYTES + 1, BLOCK_BYTES):
        digest = hashlib.blake2b(digest + text[start : start + BLOCK_BYTES], key=secret, digest_size=8).digest()
        blocks.append(int.from_bytes(digest, "little"))
    return tuple(blocks)


def _pieces(raw: bytes) -> Iterator[bytes]:
    start = raw.lstrip()[:1] if raw[:1].isspace() else raw[:1]
    if start == b'"':
        yield _text_of(raw)
        return
    if start != b"[":
        return
    items = _list_decoder.decode(raw)
    for item in items:
        first = bytes(memoryview(item)[:1])
        if first == b"{":
            message = _message_decoder.decode(item)
            yield message.role.encode("utf-8", "surrogatepass") + b"\0"
            yield from _content(message.content)
            yield b"\0"
        elif first in (b'"', b"["):
            yield from _pieces(bytes(item))
            return
        else:
            yield bytes(item) + b","


def _content(raw: msgspec.Raw) -> Iterator[bytes]:
    first = bytes(memoryview(raw)[:1])
    if first == b'"':
        yield _text_of(bytes(raw))
    elif first == b"[":
        for part in _list_decoder.decode(raw):
            text = _part_decoder.decode(part).text if bytes(memoryview(part)[:1]) == b"{" else None
            yield bytes(part) if text is None else text.encode("utf-8", "surrogatepass")


def _text_of(raw: bytes) -> bytes:
    """The text of a JSON string; of a long one perhaps only as much as counts."""
    if b"\\" not in raw:
        return raw.strip()[1:-1]
    cut = raw.rfind(b" ", 0, 2 * _MAX_BYTES)  # no escape has a space in it
    if len(raw) > 2 * _MAX_BYTES and cut > _MAX_BYTES:
        text = _text_decoder.decode(raw[:cut] + b'"').encode("utf-8", "surrogatepass")
        if len(text) >= _MAX_BYTES:
            return text
    return _text_decoder.decode(raw).encode("utf-8", "surrogatepass")


class PrefixTable:
    """Which upstreams have lately seen which block: a bit for each of them, by the block's hash.

    Bounded: what is new goes to a young half; when that is full, the old half is forgotten and the young one becomes
    the old one. A block that is used again moves to the young half, as in an LRU, at the cost of one store.
    """

    __slots__ = ("_half", "_old", "_young", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._half = max(1, capacity // 2)
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def holders(self, blocks: Sequence[int], allowed: int) -> int:
        """Of the allowed upstreams (bits), those that have seen the longest beginning of a prompt; 0 when none has."""
        young, old = self._young, self._old
        for block in reversed(blocks):
            seen = (young.get(block, 0) | old.get(block, 0)) & allowed
            if seen:
                return seen
        return 0

    def saw(self, blocks: Sequence[int], bit: int) -> None:
        """An upstream takes a prompt."""
        young, old = self._young, self._old
        for block in blocks:
            young[block] = young.get(block, 0) | old.get(block, 0) | bit
        if len(young) >= self._half:
            self._old = young
            self._young = {}
