"""Prompts of an asked length in tokens, as the target counts them, with its chat template.

A prompt is random words. `calibrate` asks the target's tokenizer once which words are one token each, which of them
also begin a prompt at one token, and what the template adds; a prompt of n tokens is then n - overhead words. `fit`
asks the target to count the very prompt and corrects it. Where the target has no tokenizer to ask, `UsageModel` learns
tokens per word from the usage of the first answers.

Every row draws its own words from (seed, row), the first one too, so that two prompts share a prefix only as long as
the draw lets them: a prefix cache gains nothing that the trace did not ask for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

CountTokens = Callable[[str], Awaitable[int]]

MAX_TRIES = 6
"""Counts of one prompt; with words of one token the first or the second is exact."""
MIN_WORDS = 8
"""Fewer words of one token than this make poor prompts; all words are used then, at their mean."""
ENOUGH_WORDS = 160
GROUP_WORDS = 16
MAX_FIRST_WORDS = 32

_TEXT = """
hello world request response session window failure queue token trace time people way day man thing woman life
child year work week case point company number group problem fact hand place right same other new good high old
great big small large next early young important few public bad able first last long own little different house
water food money story result morning door person art war history party reason research girl guy moment air
teacher force education foot boy age policy music market mind body family head side business service friend
father power hour game line end member law car city name president team minute idea kid information back parent
face others level office health community room mother area word book eye job state school student country program
question government night home state system study lot the and for are but not you all any can had her was one
our out get has him his how now see two who did its let put say she too use run may ask men read need land here
must big such follow act why men change went light kind off need picture try again animal build near self earth
father stand page should found answer grow learn plant cover sun four between keep never start light while press
close real seem together white children begin walk example paper often always music those both mark letter until
mile river feet care second enough plain usual ready above ever red list though feel talk bird soon dog direct
leave song measure product black short class wind ship half rock order fire south piece pass since top whole king
space best better true during hundred five remember step hold west ground interest reach fast sing listen six
table travel less ten simple several toward lay against pattern slow center love serve appear road map rain rule
pull cold notice voice energy hunt brother egg ride cell believe forest sit race store summer train sleep prove
leg wall catch mount wish sky board joy winter written wild glass grass cow edge sign visit past soft fun bright
gas weather month million bear finish happy hope flower strange gone trade trip receive row mouth exact symbol die
trouble shout except seed tone join suggest clean break yard rise blow oil blood touch mix cost lost brown wear
garden equal sent choose fell fit flow fair bank collect save control gentle woman captain practice separate
"""
WORDS: tuple[str, ...] = tuple(dict.fromkeys(_TEXT.split()))
"""Common English words, nearly all one token with a leading space in the vocabularies of today's models."""


@dataclass(frozen=True, slots=True)
class WordModel:
    """What is known of the target's tokens: a prompt of w words has about overhead + w * tokens_per_word."""

    words: tuple[str, ...] = WORDS
    first_words: tuple[str, ...] = WORDS
    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0
    is_exact: bool = False
    """Every word is one token, so the count is known, not guessed."""

    def words_for(self, tokens: int) -> int:
        """How many words come nearest to `tokens`; at least one, for an empty prompt is refused."""
        return max(1, round((tokens - self.overhead_tokens) / self.tokens_per_word))


def build_text(model: WordModel, word_count: int, key: Sequence[int]) -> str:
    """`word_count` >= 1 random words with single spaces. The same key gives the same words, however many."""
    rng = np.random.default_rng(list(key))
    first = model.first_words[int(rng.integers(len(model.first_words)))]
    words = model.words
    rest = rng.integers(len(words), size=word_count - 1).tolist()
    return " ".join([first, *[words[index] for index in rest]])


async def calibrate(count: CountTokens) -> WordModel:
    """The model of the target's tokenizer, in some 50 short counts for one of today's large vocabularies.

    count: tokens of a prompt, template included. What it raises goes through.
    """
    anchor = WORDS[0]
    base_tokens = await count(anchor)
    singles: list[str] = []
    for start in range(0, len(WORDS), 4 * GROUP_WORDS):
        ends = range(start, min(start + 4 * GROUP_WORDS, len(WORDS)), GROUP_WORDS)
        found = await asyncio.gather(
            *(_single_token_words(count, anchor, base_tokens, WORDS[end : end + GROUP_WORDS]) for end in ends)
        )
        singles += [word for words in found for word in words]
        if len(singles) >= ENOUGH_WORDS:
            break
    if len(singles) < MIN_WORDS:
        all_tokens = await count(" ".join((anchor, *WORDS)))
        tokens_per_word = max((all_tokens - base_tokens) / len(WORDS), 1e-3)
        return WordModel(WORDS, WORDS, tokens_per_word, base_tokens - tokens_per_word)
    candidates = singles[:MAX_FIRST_WORDS]
    alone_tokens = [await count(word) for word in candidates]
    least_tokens = min(alone_tokens)
    first_words = tuple(word for word, n in zip(candidates, alone_tokens, strict=True) if n == least_tokens)
    return WordModel(tuple(singles), first_words, 1.0, least_tokens - 1, is_exact=True)


async def _single_token_words(count: CountTokens, anchor: str, base_tokens: int, words: Sequence[str]) -> Sequence[str]:
    """Those of the words that are one token after another word; halves what does not add up."""
    added = await count(" ".join((anchor, *words))) - base_tokens
    if added == len(words):
        return words
    if len(words) == 1:
        return ()
    half = len(words) // 2
    return [
        *await _single_token_words(count, anchor, base_tokens, words[:half]),
        *await _single_token_words(count, anchor, base_tokens, words[half:]),
    ]


async def fit(count: CountTokens, model: WordModel, tokens: int, key: Sequence[int], text: str) -> tuple[str, int]:
    """The prompt nearest to `tokens` that could be found in MAX_TRIES counts, and its count.

    text: the first try, `build_text(model, model.words_for(tokens), key)`. What `count` raises goes through.
    """
    word_count = model.words_for(tokens)
    best, best_tokens = text, await count(text)
    counted = best_tokens
    tried = {word_count}
    for attempt in range(1, MAX_TRIES):
        if counted == tokens or (word_count == 1 and counted > tokens and model.is_exact):
            break
        # The same key gives the same words again, fewer or more of them; what this text showed is the better ratio.
        shown = (counted - model.overhead_tokens) / word_count
        step = (tokens - counted) / (shown if shown > 0 else model.tokens_per_word)
        word_count = max(1, word_count + round(step))
        # A length that was tried before needs other words.
        text = build_text(model, word_count, (*key, attempt) if word_count in tried else key)
        tried.add(word_count)
        counted = await count(text)
        if abs(counted - tokens) < abs(best_tokens - tokens):
            best, best_tokens = text, counted
    return best, best_tokens


class UsageModel:
    """Learns tokens = overhead + tokens_per_word * words from answers, by least squares."""

    def __init__(self) -> None:
        self._answers = 0
        self._words = self._tokens = self._words_squared = self._products = 0

    def learn(self, word_count: int, request_tokens: int) -> None:
        """Take note of one answer's usage."""
        self._answers += 1
        self._words += word_count
        self._tokens += request_tokens
        self._words_squared += word_count * word_count
        self._products += word_count * request_tokens

    def model(self) -> WordModel:
        """What is known so far; a word a token before the first answer."""
        n = self._answers
        if n == 0 or self._tokens == 0:
            return WordModel()
        spread = n * self._words_squared - self._words**2
        if spread > 0:
            slope = (n * self._products - self._words * self._tokens) / spread
            overhead = (self._tokens - slope * self._words) / n
            if 0.1 <= slope <= 10 and overhead >= 0:
                return WordModel(tokens_per_word=slope, overhead_tokens=overhead)
        return WordModel(tokens_per_word=self._tokens / self._words)
