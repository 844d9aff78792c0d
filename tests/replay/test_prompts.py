"""Prompts: as many tokens as asked for, by tokenizers of several kinds."""

from __future__ import annotations

import asyncio
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from replay.prompts import (
    ENOUGH_WORDS,
    LEAD_WORDS,
    MAX_TRIES,
    WORDS,
    Draft,
    PromptOptions,
    Texts,
    UsageModel,
    WordModel,
    build_text,
    calibrate,
    find_block_tokens,
    fit,
    with_block_tokens,
)
from replay.schedule import Planned

TRACES = Path(os.environ.get("BURSTGATE_TRACES", Path(__file__).parents[2].parent / "shared" / "traces"))


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


def row_of(index: int, blocks: tuple[int, ...] | None = None) -> Planned:
    return Planned(index, 0.0, None, None, 1, 1, prefix_blocks=blocks)


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

    def fit(
        self, model: WordModel, tokens: int, row: Planned | None = None, texts: Texts | None = None
    ) -> tuple[str, int]:
        """The text and its count, of a row's prompt."""
        found = texts or Texts(PromptOptions(), 0)
        of = row or row_of(0)

        async def count(draft: Draft) -> int:
            return await self.count(found.text(model, of, draft))

        first = found.draft(model, tokens - model.overhead_tokens, counted=True)
        draft, counted = asyncio.run(fit(count, model, first, tokens, model.overhead_tokens))
        return found.text(model, of, draft), counted


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
    text, counted = target.fit(model, asked, row_of(index), Texts(PromptOptions(), seed))
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


@given(st.integers(1, 4000), st.integers(0, 2**63), st.integers(0, 10**7))
def test_texts_repeat_by_key_and_have_the_words(count: int, seed: int, index: int) -> None:
    key = f"{seed} {index}".encode()
    text = build_text(WordModel(), count, key)
    assert build_text(WordModel(), 2 * count, key).startswith(text)
    assert len(text.split(" ")) == count
    assert set(text.split(" ")) <= set(WORDS)


def test_prompts_of_different_rows_share_no_beginning() -> None:
    texts = Texts(PromptOptions(), 0)
    beginnings = {texts.text(WordModel(), row_of(index), Draft(20))[:25] for index in range(5000)}
    assert len(beginnings) == 5000
    assert texts.text(WordModel(), row_of(1), Draft(20)) != Texts(PromptOptions(), 1).text(
        WordModel(), row_of(1), Draft(20)
    )


@given(st.integers(0, 2**40), st.lists(st.integers(0, 2**64 - 1), max_size=8), st.integers(1, 300), st.integers(1, 40))
def test_equal_leading_blocks_give_equal_leading_text(seed: int, blocks: list[int], words: int, size: int) -> None:
    """Two rows of different lengths and other last blocks: the words of their common blocks are the same."""
    texts = Texts(PromptOptions(block_tokens=size), seed)
    one = texts.text(WordModel(), row_of(1, (*blocks, 5)), Draft(words)).split()
    two = texts.text(WordModel(), row_of(2, (*blocks, 6, 7)), Draft(2 * words)).split()
    assert (len(one), len(two)) == (words, 2 * words)
    common = min(words, size * len(blocks))
    assert one[:common] == two[:common]
    if words - common > LEAD_WORDS:
        assert one[common : common + LEAD_WORDS] != two[common : common + LEAD_WORDS]


def test_blocks_can_be_left_unused() -> None:
    texts = Texts(PromptOptions(blocks=False), 0)
    assert not texts.has_blocks(row_of(1, (1, 2)))
    assert texts.text(WordModel(), row_of(1, (1, 2)), Draft(40)) == texts.text(WordModel(), row_of(1), Draft(40))


@pytest.mark.parametrize("blocks", [(1, 2, 3), (1,), None])
@pytest.mark.parametrize("asked", [10, 30, 47, 48, 49, 5000])
@pytest.mark.parametrize("tokens", [by_words, by_pieces])
def test_blocks_have_exact_lengths(tokens: Callable[[str], int], asked: int, blocks: tuple[int, ...] | None) -> None:
    """Whether the blocks cover the prompt, more than it or less."""
    target = Target(tokens)
    text, counted = target.fit(target.model(), asked, row_of(3, blocks), Texts(PromptOptions(block_tokens=16), 0))
    assert counted == tokens(text) == asked


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([], (None, False)),
        ([(0, 0), (10, 0), (0, 3)], (None, False)),
        ([(6758, 14), (1, 1), (512, 1), (513, 2)], (512, False)),
        ([(33, 3), (16, 1)], (16, False)),
        ([(100, 4), (32, 1)], (32, False)),
        ([(100, 1), (90, 1)], (512, False)),  # the usual size, where several could be
        ([(70, 1), (141, 2), (9000, 64)], (71, True)),  # blocks that do not cover the prompt
    ],
)
def test_the_size_of_blocks(rows: list[tuple[int, int]], found: tuple[int | None, bool]) -> None:
    assert find_block_tokens(rows) == found


def test_the_size_of_a_files_blocks(tmp_path: Path) -> None:
    mooncake = tmp_path / "m.jsonl"
    mooncake.write_text('{"timestamp":0,"input_length":33,"output_length":1,"hash_ids":[1,2,3]}\n')
    plain = tmp_path / "b.csv"
    plain.write_text("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n1,a,2,3,5,API log\n")
    options = PromptOptions()
    assert with_block_tokens(options, mooncake, None) == replace(options, block_tokens=16)
    assert with_block_tokens(options, plain, None) == options
    assert with_block_tokens(replace(options, blocks=False), mooncake, None).block_tokens is None
    assert with_block_tokens(replace(options, block_tokens=9), mooncake, None).block_tokens == 9


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"no traces at {TRACES} (BURSTGATE_TRACES)")
def test_mooncakes_own_blocks() -> None:
    found = with_block_tokens(PromptOptions(), TRACES / "mooncake_conversation_trace.jsonl", None)
    assert (found.block_tokens, found.is_guessed_block) == (512, False)


POOL = [" ".join(f"pool{n}word{k}" for k in range(5 + 30 * n)) for n in range(20)]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "pool.txt"
    path.write_text("\n".join(POOL))
    return path


@pytest.mark.parametrize("asked", [10, 11, 12, 40, 333, 5000])
@pytest.mark.parametrize("tokens", [by_words, by_pieces])
def test_a_pools_prompts_have_exact_lengths(tokens: Callable[[str], int], asked: int, pool: Path) -> None:
    target = Target(tokens)
    model, texts = target.model(), Texts(PromptOptions(pool=pool), 0)
    for index in range(25):
        text, counted = target.fit(model, asked, row_of(index), texts)
        assert counted == tokens(text) == asked
        taken = [word for word in text.split() if word.startswith("pool")]
        assert asked < 100 or tokens is by_pieces or len(taken) > 0.8 * asked


def test_a_pools_prompts_begin_alike_only_where_it_does(pool: Path) -> None:
    texts = Texts(PromptOptions(pool=pool), 4)
    beginnings = {texts.text(WordModel(), row_of(index), Draft(1, 400))[:40] for index in range(200)}
    assert len(beginnings) == 200


OPTIONS_WRONG: list[tuple[dict[str, Any], str]] = [
    ({"history": "all"}, "history: expected none, synthetic or real, got 'all'"),
    ({"block_tokens": 0}, "block tokens: expected 1 to 1000000, got 0"),
    ({"extra_body": {"model": "m"}}, "extra body: expected no field 'model'"),
    ({"extra_body": {"x": object()}}, "extra body: expected values that JSON has"),
    ({"extra_headers": (("Host", "h"),)}, "header Host: expected another name"),
]


@pytest.mark.parametrize(("wrong", "message"), OPTIONS_WRONG)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptOptions(**wrong)


def test_the_same_seed_gives_the_same_text_in_another_process() -> None:
    program = (
        "from replay.prompts import *; from replay.schedule import Planned; t = Texts(PromptOptions(), 7);"
        "r = Planned(3, 0.0, 's', None, 1, 1, prefix_blocks=(8, 9));"
        "print(t.text(WordModel(), r, Draft(900, 0, 2)), t.answer(WordModel(), r, 50))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONHASHSEED"}
    printed = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=Path(__file__).parents[2], env=environment | {"PYTHONHASHSEED": seed},
            check=True, capture_output=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert printed[0] == printed[1]
    assert len(printed[0].split()) == 950


@example(1.5, 0, [20, 221])
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
        ([(10, 20)], 50, 40),  # one answer: a template of 10 tokens is likelier than words of two
        ([(10, 20), (10, 20)], 50, 40),
        ([(100, 190)], 50, 26),  # not one of 90
        ([(100, 90)], 50, 56),
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
