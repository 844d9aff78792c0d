"""Prompts of an asked length in tokens, as the target counts them, with its chat template.

    words    random words: n tokens are n - overhead words of one token each
    blocks   a text for each prefix block that the trace names, by the seed and the block's id alone, so that prompts
             begin alike exactly as those recorded did; then words of the row's own. Behind a chat template every
             block is shifted by the template's head, in all prompts alike
    pool     the text of a file's prompts (`replay.pool`), cut or extended, and a few words to come to the very count

`calibrate` asks a tokenizer once which words are one token each, which of them also begin a prompt at one token, and
what the template adds. `fit` has the very prompt counted and corrects its last words. Where there is no tokenizer to
ask, `UsageModel` learns from the usage of the first answers.

Every row draws its own first LEAD_WORDS words from (seed, row), so that two prompts share a prefix only as long as the
draw lets them: a prefix cache gains nothing that the trace did not ask for. What follows is cut from a long tape of
words, for speed.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from array import array
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from replay.bodies import check_fields, check_header
from replay.pool import Pool
from replay.schedule import Planned

CountTokens = Callable[[str], Awaitable[int]]
PromptHistory = Literal["none", "synthetic", "real"]

MAX_TRIES = 6
"""Counts of one prompt; with words of one token the first or the second is exact."""
MIN_WORDS = 8
"""Fewer words of one token than this make poor prompts; all words are used then, at their mean."""
ENOUGH_WORDS = 160
GROUP_WORDS = 16
MAX_FIRST_WORDS = 32
LEAD_WORDS = 12
"""Of a prompt, drawn one by one: some 80 bits."""
TAPE_WORDS = 1 << 16
CUT_WORDS = 1024
"""Longest cut from the tape."""
OTHER_WORDS = 8
"""The last words of a prompt, which are others when a length is tried again."""
POOL_SHARE = 0.97
"""Of a prompt's tokens that are the pool's at the first try: short of the length, so that words can fill it up."""
POOL_TRIES = 3
"""A pool's text that has not come near by then is left out."""
FIRST_CHARS_PER_TOKEN = 4.0
"""Of a pool's text, until one has been counted."""
BLOCK_TOKENS = (512, 16, *(1 << power for power in range(21)))
"""What a prefix block may have, Mooncake's and vLLM's own first."""
MAX_TEMPLATE_TOKENS = 64
"""What a chat template may add while its size is only guessed from one length of prompt."""
MAX_BLOCK_TOKENS = 1_000_000
FIRST_ROWS = 1024
"""Of a trace file, that show the size of its blocks."""

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
class PromptOptions:
    """What the prompts are made of. Raises ValueError naming the option, the value and the rule."""

    tokenizer: Path | None = None
    """A local tokenizer.json, or a folder with one; None asks the target."""
    pool: Path | None = None
    """A file of prompts; None makes prompts of blocks where the trace names them, else of words."""
    blocks: bool = True
    """Rows with prefix blocks get a text for each."""
    block_tokens: int | None = None
    """None finds it out."""
    is_guessed_block: bool = False
    """`block_tokens` is a guess of ours; see `with_block_tokens`."""
    history: PromptHistory = "none"
    """What a request holds of its session's earlier turns: nothing, answers of our own, or those that came."""
    max_tokens: bool = True
    min_tokens: bool = True
    ignore_eos: bool = True
    """Whether requests ask for the length of the answer in this way."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    extra_headers: tuple[tuple[str, str], ...] = ()
    """Names and values; `$NAME` stands for what the environment holds."""

    def __post_init__(self) -> None:
        if self.history not in get_args(PromptHistory):
            raise ValueError(f"history: expected none, synthetic or real, got {self.history!r}")
        if self.block_tokens is not None and not 1 <= self.block_tokens <= MAX_BLOCK_TOKENS:
            raise ValueError(f"block tokens: expected 1 to {MAX_BLOCK_TOKENS}, got {self.block_tokens}")
        check_fields(self.extra_body)
        for name, value in self.extra_headers:
            check_header(name, value)


class Tape:
    """Words in a fixed random order, as one text, and where each begins."""

    __slots__ = ("_starts", "_text")

    def __init__(self, words: Sequence[str]) -> None:
        length = TAPE_WORDS + CUT_WORDS
        draws = struct.unpack(f"<{length}H", hashlib.shake_128(b"tape").digest(2 * length))
        count = len(words)
        drawn = [words[draw % count] for draw in draws]
        self._text = " ".join(drawn) + " "
        self._starts = array("I", accumulate((len(word) + 1 for word in drawn), initial=0))

    def cut(self, first: int, count: int) -> str:
        """`count` words from the word `first` on, 0 <= first < TAPE_WORDS, 1 <= count <= CUT_WORDS."""
        return self._text[self._starts[first] : self._starts[first + count] - 1]


_tape_of = lru_cache(4)(Tape)


@dataclass(frozen=True)
class WordModel:
    """What is known of the target's tokens: a prompt of w words has about overhead + w * tokens_per_word."""

    words: tuple[str, ...] = WORDS
    first_words: tuple[str, ...] = WORDS
    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0
    is_exact: bool = False
    """Every word is one token, so the count is known, not guessed."""
    turn_tokens: float = 0.0
    """What the template adds for an answer and the next message after it."""

    @cached_property
    def tape(self) -> Tape:
        """The words, to cut long texts from."""
        return _tape_of(self.words)

    def words_for(self, tokens: int) -> int:
        """How many words come nearest to a prompt of `tokens`; at least one, for an empty prompt is refused."""
        return self.words_in(tokens - self.overhead_tokens)

    def words_in(self, tokens: float) -> int:
        """How many words come nearest to so many tokens; at least one."""
        return max(1, round(tokens / self.tokens_per_word))


def build_text(model: WordModel, word_count: int, key: bytes) -> str:
    """`word_count` >= 1 random words with single spaces. The same key gives the same words, however many."""
    draws = struct.unpack("<14HI", hashlib.blake2b(key, digest_size=32).digest())
    words, count = model.words, len(model.words)
    parts = [model.first_words[draws[0] % len(model.first_words)]]
    parts += [words[draw % count] for draw in draws[1 : min(word_count, LEAD_WORDS)]]
    left = word_count - LEAD_WORDS
    if left > 0:
        tape, at, step = model.tape, draws[14], draws[13] | 1
        while left > 0:
            parts.append(tape.cut(at % TAPE_WORDS, min(left, CUT_WORDS)))
            left -= CUT_WORDS
            at += CUT_WORDS + step
    return " ".join(parts)


class Draft(NamedTuple):
    """How long the parts of a prompt are."""

    words: int
    """Of ours, at least one but where the pool's text alone is the prompt."""
    pool_chars: int = 0
    """Of the pool's text before them."""
    attempt: int = 0
    """Another number gives other last words."""


class Texts:
    """The texts of one replay's prompts and answers. The same seed gives the same ones, in every process."""

    def __init__(self, options: PromptOptions, seed: int) -> None:
        """Raises as `Pool`."""
        self._seed = seed
        self._blocks = options.blocks and options.pool is None
        self._pool = None if options.pool is None else Pool(options.pool, seed)
        self._chars_per_token = FIRST_CHARS_PER_TOKEN
        self._learned = 0
        self.block_tokens = options.block_tokens
        self._block_words: int | None = None

    @property
    def pool_entries(self) -> int | None:
        """Of the pool's file; None without one."""
        return None if self._pool is None else len(self._pool)

    def has_blocks(self, row: Planned) -> bool:
        """The row's prompt is made of its prefix blocks."""
        return self._blocks and bool(row.prefix_blocks)

    def draft(self, model: WordModel, tokens: float, *, counted: bool) -> Draft:
        """The first try for a text of so many tokens. counted: it will be corrected, so the pool's part is short."""
        if self._pool is None:
            return Draft(model.words_in(tokens))
        if not counted:  # a character of the pool's is a word then: see `UsageModel`
            return Draft(0, model.words_in(tokens))
        pool_chars = max(0, int((tokens - 1) * POOL_SHARE * self._chars_per_token))
        return Draft(model.words_in(tokens - pool_chars / self._chars_per_token), pool_chars)

    def text(self, model: WordModel, row: Planned, draft: Draft) -> str:
        """The text of a row's prompt."""
        parts: list[str] = []
        left = draft.words
        if self._pool is not None and draft.pool_chars:
            if self._pool.is_repeated(row.index):
                # In characters, so that the pool's part stays as long as was asked.
                lead = build_text(model, LEAD_WORDS, self._key("lead", row.index))
                taken = f"{lead} {self._pool.text(row.index, draft.pool_chars - len(lead) - 1)}"
                parts.append(taken[: draft.pool_chars].strip())
            else:
                parts.append(self._pool.text(row.index, draft.pool_chars))
        other = min(OTHER_WORDS, left) if draft.attempt else 0
        left -= other
        if self._blocks and row.prefix_blocks:
            size = self._words_of_a_block(model)
            for block in row.prefix_blocks:
                if left <= 0:
                    break
                parts.append(build_text(model, min(left, size), self._key("block", block)))
                left -= size
        if left > 0:
            parts.append(build_text(model, left, self._key("row", row.index)))
        if other:
            parts.append(build_text(model, other, self._key(f"again{draft.attempt}", row.index)))
        return " ".join(parts)

    def answer(self, model: WordModel, row: Planned, tokens: int) -> str:
        """An answer of about so many tokens, known before the request is sent."""
        words = max(1, round(tokens / max(model.tokens_per_word, 1.0)))
        return build_text(model, words, self._key("answer", row.index))

    def learn(self, draft: Draft, model: WordModel, tokens: float) -> None:
        """Take note of what a prompt's own text was counted as: how long a token of the pool's is."""
        pool_tokens = tokens - draft.words * model.tokens_per_word
        if draft.pool_chars >= 64 and pool_tokens > 0:
            shown = min(max(draft.pool_chars / pool_tokens, 0.25), 16.0)
            self._learned += 1
            self._chars_per_token += (shown - self._chars_per_token) / min(self._learned, 32)

    def _words_of_a_block(self, model: WordModel) -> int:
        """The same in all prompts of a run, whatever is learned later."""
        if self._block_words is None:
            self._block_words = model.words_in(self.block_tokens or BLOCK_TOKENS[0])
        return self._block_words

    def _key(self, kind: str, number: int) -> bytes:
        return f"{self._seed} {kind} {number}".encode()


def find_block_tokens(rows: Iterable[tuple[int, int]]) -> tuple[int | None, bool]:
    """Tokens of a prefix block, from rows' (tokens, blocks); None where no row has blocks. And whether it is a guess.

    Where blocks cover the prompts every row has ceil(tokens / size) of them. Else it is the median row's
    ceil(tokens / blocks), a guess.
    """
    pairs = [(tokens, blocks) for tokens, blocks in rows if tokens > 0 and blocks > 0]
    if not pairs:
        return None, False
    for size in BLOCK_TOKENS:
        if all(-(-tokens // size) == blocks for tokens, blocks in pairs):
            return size, False
    return sorted(-(-tokens // blocks) for tokens, blocks in pairs)[len(pairs) // 2], True


def with_block_tokens(options: PromptOptions, trace: Path | None, format: str | None) -> PromptOptions:
    """The options with the size of a trace file's prefix blocks, where it has some: the same for all who read it.

    Raises as `traces.codec.read_trace`.
    """
    if trace is None or options.block_tokens is not None or options.pool is not None or not options.blocks:
        return options
    from traces.codec import block_tokens, read_trace, sniff

    if (format or sniff(trace)) == "parquet" and (said := block_tokens(trace, format="parquet")) is not None:
        return replace(options, block_tokens=said)
    batch = next(read_trace(trace, format=format, batch_rows=FIRST_ROWS), None)
    if batch is None:
        return options
    lengths = batch["request_tokens"].fill_null(0), batch["prefix_blocks"].list.len().fill_null(0)
    size, is_guess = find_block_tokens(zip(*lengths, strict=True))
    return replace(options, block_tokens=size, is_guessed_block=is_guess)


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


async def fit(
    count: Callable[[Draft], Awaitable[int]], model: WordModel, draft: Draft, tokens: int, base_tokens: float
) -> tuple[Draft, int]:
    """The draft whose prompt comes nearest to `tokens` of those that MAX_TRIES counts found, and its count.

    draft: the first try. base_tokens: what the prompt has beside the draft's text, about. What `count` raises goes
    through.
    """
    best, best_tokens = draft, await count(draft)
    counted = best_tokens
    tried = {draft[:2]}
    # Tokens a word, as the last two lengths show it; before there are two, of few words the ratio says little.
    is_known = model.is_exact or draft.pool_chars or draft.words < 8
    slope = model.tokens_per_word if is_known else (counted - base_tokens) / draft.words
    for attempt in range(1, MAX_TRIES):
        missing = tokens - counted
        if not missing or (missing < 0 and draft.words <= 1 and not draft.pool_chars and model.is_exact):
            break
        words, chars = draft.words, draft.pool_chars
        # What this text showed is the better ratio.
        text_tokens = max(counted - base_tokens, 1.0)
        most_words = max(2 * OTHER_WORDS, tokens // 8) if attempt <= POOL_TRIES else tokens
        if chars and not 0 <= words + missing - 1 <= most_words:
            per_char = max(text_tokens - words * model.tokens_per_word, 1.0) / chars
            wanted = tokens - base_tokens - 1 - OTHER_WORDS * model.tokens_per_word
            chars = max(0, int(wanted * POOL_SHARE / per_char)) if attempt <= POOL_TRIES else 0
            words = words if chars else model.words_in(tokens - base_tokens)
        else:
            words = max(
                1, words + round(missing / min(max(slope, model.tokens_per_word / 2), 2 * model.tokens_per_word))
            )
        # A length that was tried before needs other words.
        before, before_tokens = draft, counted
        draft = Draft(words, chars, attempt if (words, chars) in tried else 0)
        tried.add((words, chars))
        counted = await count(draft)
        if chars == before.pool_chars and abs(words - before.words) >= 8:
            slope = (counted - before_tokens) / (words - before.words)
        if abs(counted - tokens) < abs(best_tokens - tokens):
            best, best_tokens = draft, counted
    return best, best_tokens


class UsageModel:
    """Learns tokens = overhead + tokens_per_word * words from answers, by least squares.

    first_ratio: the tokens of a word before the first answer. Where prompts are a pool's, a character counts as a word.
    """

    def __init__(self, first_ratio: float = 1.0) -> None:
        self._first_ratio = first_ratio
        self._answers = 0
        self._words = self._tokens = self._words_squared = self._products = 0
        self._turns = 0
        self._turn_tokens = 0.0
        self._model: WordModel | None = None

    def learn(self, word_count: int, request_tokens: int) -> None:
        """Take note of one answer's usage."""
        self._answers += 1
        self._words += word_count
        self._tokens += request_tokens
        self._words_squared += word_count * word_count
        self._products += word_count * request_tokens
        self._model = None

    def learn_turn(self, word_count: int, request_tokens: int, before_tokens: int) -> None:
        """Take note of the usage of a request with earlier turns, of `before_tokens` up to the last answer."""
        self._turns += 1
        self._turn_tokens += request_tokens - before_tokens - word_count * self.model().tokens_per_word
        self._model = None

    def model(self) -> WordModel:
        """What is known so far."""
        if self._model is None:
            tokens_per_word, overhead_tokens = self._line()
            turn_tokens = max(0.0, self._turn_tokens / self._turns) if self._turns else 0.0
            self._model = WordModel(
                tokens_per_word=tokens_per_word, overhead_tokens=overhead_tokens, turn_tokens=turn_tokens
            )
        return self._model

    def _line(self) -> tuple[float, float]:
        """Slope and offset."""
        n = self._answers
        if n == 0 or self._tokens == 0:
            return self._first_ratio, 0.0
        spread = n * self._words_squared - self._words**2
        if spread > 0:
            slope = (n * self._products - self._words * self._tokens) / spread
            overhead = (self._tokens - slope * self._words) / n
            if 0.02 <= slope <= 10:  # below no template at all, by rounding: the line through the origin
                return (slope, overhead) if overhead >= 0 else (self._products / self._words_squared, 0.0)
        # Of one length only: today's models have a token a word, and what is over is the template.
        over = (self._tokens - self._first_ratio * self._words) / n
        if 0 <= over <= MAX_TEMPLATE_TOKENS:
            return self._first_ratio, over
        return self._tokens / self._words, 0.0
