"""Prompts: as many tokens as asked for, by tokenizers of several kinds."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.prompts import ENOUGH_WORDS, MAX_TRIES, WORDS, UsageModel, WordModel, build_text, calibrate, fit


def by_words(text: str) -> int:
    """A template of 9 tokens, then a token a word."""
    return 9 + len(text.split())


def by_pieces(text: str) -> int:
    """Few words are one token, and only after a space: the rest are bytes. Some 14 words in all are known."""
    known = {
        " the",
        " and",
        " for",
        " request",
        " response",
        " trace",
        " token",
        " session",
        " queue",
        " world",
        "hello",
    }
    return 2 + sum(1 if piece in known else len(piece) for piece in re.findall(r" ?\w+", text))


def by_characters(text: str) -> int:
    """Four characters a token, as crude servers estimate."""
    return 3 + math.ceil(len(text) / 4)


def by_bytes(text: str) -> int:
    """No merges at all: no word is one token."""
    return 1 + len(text.encode())


class Target:
    """A tokenizer behind a question, counting how often it is asked."""

    def __init__(self, tokens: Callable[[str], int]) -> None:
        self.tokens = tokens
        self.asked = 0

    async def count(self, text: str) -> int:
        assert text
        self.asked += 1
        await asyncio.sleep(0)
        return self.tokens(text)

    def model(self) -> WordModel:
        return asyncio.run(calibrate(self.count))

    def fit(self, model: WordModel, tokens: int, key: tuple[int, ...] = (0, 0)) -> tuple[str, int]:
        return asyncio.run(fit(self.count, model, tokens, key, build_text(model, model.words_for(tokens), key)))


@pytest.mark.parametrize(
    ("tokens", "overhead_tokens", "is_exact"),
    [
        (by_words, 9, True),
        (by_pieces, 4, True),  # the shortest first words without a space before them are three bytes
        (by_bytes, None, False),
    ],
)
def test_calibration(tokens: Callable[[str], int], overhead_tokens: int | None, is_exact: bool) -> None:
    model = Target(tokens).model()
    assert model.is_exact is is_exact
    if overhead_tokens is not None:
        assert model.overhead_tokens == overhead_tokens
        assert model.tokens_per_word == 1.0
        for word in model.words:
            assert tokens(f"hello {word}") - tokens("hello") == 1
        for word in model.first_words:
            assert tokens(word) == overhead_tokens + 1
    else:
        assert model.tokens_per_word == pytest.approx(sum(len(word) + 1 for word in WORDS) / len(WORDS))


def test_calibration_is_cheap_for_a_large_vocabulary() -> None:
    target = Target(by_words)
    assert len(target.model().words) >= ENOUGH_WORDS
    assert target.asked < 60


@settings(max_examples=40)
@given(st.sampled_from([by_words, by_pieces]), st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 10**7))
def test_exact_lengths(tokens: Callable[[str], int], asked: int, seed: int, index: int) -> None:
    target = Target(tokens)
    model = target.model()
    before = target.asked
    text, counted = target.fit(model, asked, (seed, index))
    shortest = int(model.overhead_tokens) + 1
    assert counted == tokens(text) == max(asked, shortest)
    assert target.asked - before <= MAX_TRIES


@pytest.mark.parametrize("asked", [10, 100, 777, 20_000])
@pytest.mark.parametrize("tokens", [by_characters, by_bytes])
def test_tokenizers_without_such_words_come_near(tokens: Callable[[str], int], asked: int) -> None:
    target = Target(tokens)
    model = target.model()
    before = target.asked
    text, counted = target.fit(model, asked)
    assert counted == tokens(text)
    assert abs(counted - asked) <= 6
    assert target.asked - before <= MAX_TRIES


def test_the_wanted_length_below_the_template_is_the_shortest_prompt() -> None:
    target = Target(by_words)
    text, counted = target.fit(target.model(), 3)
    assert (len(text.split()), counted) == (1, 10)


@given(st.integers(1, 400), st.integers(0, 2**63), st.integers(0, 10**7))
def test_texts_repeat_by_key_and_have_the_words(count: int, seed: int, index: int) -> None:
    text = build_text(WordModel(), count, (seed, index))
    assert build_text(WordModel(), 2 * count, (seed, index)).startswith(text)
    assert len(text.split(" ")) == count
    assert set(text.split(" ")) <= set(WORDS)


def test_prompts_of_different_rows_share_no_beginning() -> None:
    beginnings = {tuple(build_text(WordModel(), 20, (0, index)).split()[:4]) for index in range(2000)}
    assert len(beginnings) == 2000
    assert build_text(WordModel(), 20, (0, 1)) != build_text(WordModel(), 20, (1, 1))


@given(
    st.floats(0.5, 4),
    st.integers(0, 80),
    st.lists(st.integers(20, 5000), min_size=2, max_size=30).filter(lambda words: max(words) - min(words) > 200),
)
def test_usage_teaches_the_ratio(tokens_per_word: float, overhead_tokens: int, word_counts: list[int]) -> None:
    usage = UsageModel()
    for word_count in word_counts:
        usage.learn(word_count, round(overhead_tokens + tokens_per_word * word_count))
    # Rounding moves a count by half a token.
    for asked in (1000, 3000):
        words = usage.model().words_for(asked)
        assert overhead_tokens + tokens_per_word * words == pytest.approx(asked, abs=80 + 0.02 * asked)


@pytest.mark.parametrize(
    ("answers", "asked", "words"),
    [
        ([], 50, 50),
        ([(10, 20)], 50, 25),  # one answer: a ratio
        ([(10, 20), (10, 20)], 50, 25),
        ([(10, 15), (110, 115)], 50, 45),  # two lengths: a template of 5 tokens too
        ([(10, 0)], 50, 50),  # a server that counts nothing teaches nothing
        ([(10, 900), (1000, 1)], 50, 56),  # nonsense: the mean ratio, at least
    ],
)
def test_usage_models(answers: list[tuple[int, int]], asked: int, words: int) -> None:
    usage = UsageModel()
    for word_count, tokens in answers:
        usage.learn(word_count, tokens)
    assert usage.model().words_for(asked) == words
