from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.simulator.text import (
    VOCABULARY,
    Tokenizer,
    count_chat_tokens,
    count_tokens,
    draw_key,
    split_pieces,
    vector,
    word_stream,
)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("  \n\t", []),
        ("hi there", ["▁hi", "▁there"]),
        ("abcdefghijklmnop", ["▁abcdefghijklmnop"]),  # 16 characters are one token, 17 are two
        ("abcdefghijklmnopq", ["▁abcdefghijklmnop", "q"]),
        ("日本語\u2028x", ["▁日本語", "▁x"]),
    ],
)
def test_tokens_of_a_text(text: str, pieces: list[str]) -> None:
    assert split_pieces(text) == pieces
    assert count_tokens(text) == len(pieces)


def test_chat_overhead_is_fixed() -> None:
    assert count_chat_tokens(["a b", ""]) == 4 + 2 + 4 + 2
    assert count_chat_tokens(["a b", ""], generation_prompt=False) == 4 + 2 + 4


@given(st.lists(st.text(max_size=60), min_size=1, max_size=4), st.booleans())
def test_ids_agree_with_counts_and_decode_to_the_words(texts: list[str], generation_prompt: bool) -> None:
    tokenizer = Tokenizer()
    ids = tokenizer.encode_chat(texts, generation_prompt=generation_prompt)
    assert len(ids) == count_chat_tokens(texts, generation_prompt=generation_prompt)
    plain = tokenizer.encode(texts[0])
    if "\u2581" not in texts[0]:
        assert tokenizer.decode(plain) == " ".join(texts[0].split())
    assert all(0 <= token < 1 << 63 for token in ids)


@given(st.lists(st.integers(16, (1 << 63) - 1), max_size=50))
def test_any_ids_decode_to_as_many_tokens(ids: list[int]) -> None:
    assert count_tokens(Tokenizer().decode(ids)) == len(ids)


@given(st.integers(0, 1 << 64), st.binary(max_size=50), st.integers(0, 100))
def test_a_stream_depends_on_its_key_and_never_repeats_a_word(seed: int, content: bytes, index: int) -> None:
    key = draw_key(seed, content)
    stream = word_stream(key, index)
    assert stream == word_stream(draw_key(seed, content), index)
    words = stream.words(0, 500)
    assert len(set(words)) == 500
    assert stream.text(0, 200) + stream.text(200, 500) == " ".join(words)
    assert count_tokens(stream.text(0, 500)) == 500
    assert 0 < stream.uniform < 1


def test_seeds_and_answers_differ() -> None:
    streams = {word_stream(draw_key(seed, b"body"), index) for seed in (0, 1, 2) for index in (0, 1, 2)}
    assert len(streams) == 9


def test_lengths_have_the_mean_asked_for() -> None:
    lengths = [word_stream(draw_key(3, b"%d" % number), 0).length_tokens(200.0) for number in range(20_000)]
    assert statistics.fmean(lengths) == pytest.approx(200, rel=0.05)
    assert statistics.median(lengths) == pytest.approx(200 * math.exp(-0.5), rel=0.05)


def test_the_vocabulary_is_of_whole_tokens() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 32_768
    assert all(count_tokens(word) == 1 for word in VOCABULARY)


def test_vectors_are_unit_vectors() -> None:
    assert math.hypot(*vector(b"a", 64)) == pytest.approx(1)
    assert vector(b"a", 64) != vector(b"b", 64)
