"""Words and tokens of the simulated model: a word-level tokenizer and a stream of words.

Tokenizer: text is split at white space; a word of up to 16 characters is one token, a longer one is cut into pieces of
16. A chat prompt adds 4 tokens a message and 2 for the generation prompt, so that a prompt of an exact token count is a
matter of counting words. Token texts are written as SentencePiece does: U+2581 begins a word.

Token ids: 0 to 15 are special, the next 32,768 are the model's own vocabulary, every other piece gets 2^31 plus the
CRC-32 of its text. Ids of the last kind can be turned back into text only while the tokenizer remembers the piece.

Answers: three syllables make a word, and a stream walks through all 32,768 words with an odd stride, so no two tokens
of an answer are equal. Some syllables are not ASCII: byte positions and character positions differ in every answer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from zlib import crc32

MAX_WORD_CHARS = 16
MESSAGE_TOKENS = 4
GENERATION_PROMPT_TOKENS = 2
_REMEMBERED_PIECES = 65_536

_SYLLABLES = (
    "ba be bi bo bu da de di do du ga gi go ka ke ko la le li lo ma mi mo na né no ra ro sa sø ta 語".split()  # noqa: SIM905
)
VOCABULARY = tuple(a + b + c for a in _SYLLABLES for b in _SYLLABLES for c in _SYLLABLES)
_SPECIAL = (
    "<|start|>",
    "<|role|>",
    "<|message|>",
    "<|end|>",
    "<|assistant|>",
    *(f"<|reserved_{index}|>" for index in range(5, 16)),
)
_FIRST_WORD_ID = len(_SPECIAL)
_WORD_IDS = {word: _FIRST_WORD_ID + index for index, word in enumerate(VOCABULARY)}
_FIRST_HASHED_ID = 1 << 31
_HALF = 1 << 63

# vLLM's output lengths are roughly lognormal; a sigma of 1 puts the median at 0.6 of the mean.
_OUTPUT_SIGMA = 1.0
_NORMAL = NormalDist()


def count_tokens(text: str) -> int:
    """Tokens of a text without a chat template."""
    words = text.split()
    if not words or len(max(words, key=len)) <= MAX_WORD_CHARS:
        return len(words)
    return sum(-(-len(word) // MAX_WORD_CHARS) for word in words)


def count_chat_tokens(texts: Iterable[str], *, generation_prompt: bool = True) -> int:
    """Tokens of a chat prompt whose messages have these texts."""
    return sum(MESSAGE_TOKENS + count_tokens(text) for text in texts) + GENERATION_PROMPT_TOKENS * generation_prompt


def split_pieces(text: str) -> list[str]:
    """The text's tokens as text, `\\u2581` before each that begins a word."""
    return [
        ("\u2581" if start == 0 else "") + word[start : start + MAX_WORD_CHARS]
        for word in text.split()
        for start in range(0, len(word), MAX_WORD_CHARS)
    ]


def chat_pieces(texts: Iterable[str], *, generation_prompt: bool = True) -> list[str]:
    """The tokens, as text, of a chat prompt whose messages have these texts."""
    pieces: list[str] = []
    for text in texts:
        pieces += [*_SPECIAL[:3], *split_pieces(text), _SPECIAL[3]]
    return [*pieces, _SPECIAL[0], _SPECIAL[4]] if generation_prompt else pieces


def block_hashes(pieces: Sequence[str], block_size: int) -> tuple[int, ...]:
    """One number < 2^64 for each full block of tokens; it covers the block and all before it."""
    hashes = []
    before = b""
    for end in range(block_size, len(pieces) + 1, block_size):
        content = "\0".join(pieces[end - block_size : end]).encode("utf-8", "surrogatepass")
        before = hashlib.blake2b(content, digest_size=8, key=before).digest()
        hashes.append(int.from_bytes(before, "little"))
    return tuple(hashes)


class Tokenizer:
    """Text to token ids and back. Remembers the last 65,536 pieces that are not in the vocabulary."""

    def __init__(self) -> None:
        self._pieces: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without a chat template."""
        return [self._id(piece) for piece in split_pieces(text)]

    def encode_chat(self, texts: Iterable[str], *, generation_prompt: bool = True) -> list[int]:
        """Token ids of a chat prompt whose messages have these texts."""
        ids: list[int] = []
        for text in texts:
            ids += [0, 1, 2, *self.encode(text), 3]
        return [*ids, 0, 4] if generation_prompt else ids

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each id; an id that never was a token gives a word of the vocabulary."""
        return [self._piece(token) for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, words separated by one space."""
        return "".join(self.pieces(ids)).replace("\u2581", " ").removeprefix(" ")

    def _id(self, piece: str) -> int:
        known = _WORD_IDS.get(piece[1:]) if piece.startswith("\u2581") else None
        if known is not None:
            return known
        token = _FIRST_HASHED_ID + crc32(piece.encode("utf-8", "surrogatepass"))
        if token not in self._pieces:
            if len(self._pieces) >= _REMEMBERED_PIECES:
                del self._pieces[next(iter(self._pieces))]
            self._pieces[token] = piece
        return token

    def _piece(self, token: int) -> str:
        if token < _FIRST_WORD_ID:
            return _SPECIAL[token]
        remembered = self._pieces.get(token)
        return (
            remembered if remembered is not None else "\u2581" + VOCABULARY[(token - _FIRST_WORD_ID) % len(VOCABULARY)]
        )


@dataclass(frozen=True, slots=True)
class WordStream:
    """The words of one answer, and the draw that gives its length. Equal keys give equal streams."""

    start: int
    stride: int
    uniform: float
    """In (0, 1)."""

    def words(self, first: int, last: int) -> list[str]:
        """The words at positions first to last - 1."""
        size = len(VOCABULARY)
        return [VOCABULARY[(self.start + position * self.stride) % size] for position in range(first, last)]

    def text(self, first: int, last: int) -> str:
        """The words at positions first to last - 1; every word but the stream's first is preceded by a space."""
        text = " ".join(self.words(first, last))
        return text if first == 0 or first == last else " " + text

    def token_ids(self, first: int, last: int) -> list[int]:
        """The ids of the words at positions first to last - 1."""
        return [_WORD_IDS[word] for word in self.words(first, last)]

    def length_tokens(self, mean_tokens: float) -> int:
        """A length drawn from a lognormal of this mean, at least 1."""
        deviate = _NORMAL.inv_cdf(self.uniform)
        # e^(mu + sigma^2 / 2) = mean
        factor = math.exp(_OUTPUT_SIGMA * deviate - _OUTPUT_SIGMA**2 / 2)
        return max(1, round(mean_tokens * factor))


def draw_key(seed: int, content: bytes) -> bytes:
    """16 bytes that depend on the seed and on every byte of the content."""
    return hashlib.blake2b(content, digest_size=16, key=str(seed).encode()[:64]).digest()


def word_stream(key: bytes, index: int) -> WordStream:
    """The stream of one of a request's answers: `key` from `draw_key`, `index` the answer's number."""
    low, high = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    # The golden ratio's fraction spreads the lengths of a request's n answers evenly over the distribution.
    spread = (high + index * 0x9E3779B97F4A7C15) & (2 * _HALF - 1)
    return WordStream(
        start=(low + index * 4099) % len(VOCABULARY),
        stride=(low >> 32) % len(VOCABULARY) | 1,
        uniform=(spread + 0.5) / (2 * _HALF + 1),
    )


def vector(key: bytes, size: int) -> list[float]:
    """A unit vector that depends on the key alone: an embedding."""
    raw = hashlib.shake_128(key).digest(4 * size)
    values = [int.from_bytes(raw[at : at + 4], "little") / (1 << 31) - 1.0 for at in range(0, len(raw), 4)]
    norm = math.hypot(*values) or 1.0
    return [value / norm for value in values]
