"""Requests prepared ahead of their time: rows of the plan in, bodies ready to send out, in order.

    fill    reads the plan in a thread and builds each row's prompt, up to LOOK_AHEAD_ROWS and LOOK_AHEAD_TOKENS ahead
    count   has the tokenizer count the prompts that wait, and corrects them; COUNTERS of these run
    next    hands out the next request as it then is, counted or not: a send never waits for a tokenizer

A local tokenizer counts at once, while `fill` builds, long prompts in a thread. Without a tokenizer prompts are built
late, by what the usage of the answers has taught by then.

With a history, a row of a session holds the leading turns of that session that fit into its length, then a message of
its own. Synthetic answers are known ahead, so bodies are too. Real answers are known when they have come: such a row is
built when it is handed out, again when an answer of its session comes before it is sent, and by `settle`; a row whose
previous turn has not ended when it is sent goes with the turns that have. A turn that failed is left out. Rows with
prefix blocks have no history: their blocks say what they share.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice

import msgspec

from replay.bodies import BodyWriter, Prompt, header_lines
from replay.client import ASK_TIMEOUT_S, Endpoint, Unanswered, auth_headers, count_tokens
from replay.history import Histories, Turn, Turns, fitting
from replay.prompts import (
    FIRST_CHARS_PER_TOKEN,
    Draft,
    PromptOptions,
    Texts,
    UsageModel,
    WordModel,
    build_text,
    calibrate,
    find_block_tokens,
    fit,
)
from replay.schedule import Planned
from replay.tokenizer import load_tokenizer
from wire.http import HttpClient
from wire.shapes import Usage

LOOK_AHEAD_ROWS = 1024
LOOK_AHEAD_TOKENS = 1_000_000
"""Text and body of a prompt hold some 12 bytes a token."""
UNCOUNTED_LOOK_AHEAD_ROWS = 16
COUNTED_BEFORE_ZERO = 256
"""Prompts that have been counted before the schedule starts, or as many as there are."""
COUNTERS = 4
"""Few, because the target's tokenizer also serves the requests that are measured."""
CHUNK_ROWS = 512
MAX_PROMPT_TOKENS = 1_000_000
"""Of a row that asks for more where the target does not say what its model takes: the memory is ours."""
INLINE_CHARS = 4096
"""A longer text is counted in a thread: a local tokenizer takes some 0.1 ms for a thousand characters."""
TURN_NS = 200_000
"""How long `fill` builds before it lets the loop turn."""
COMPARED_ANSWERS = 64
"""Whose usage is compared with the local count."""


class Prepared:
    """A row and its request, which may still change until it is sent."""

    __slots__ = (
        "body", "counted_tokens", "draft", "has_earlier_turns", "head", "is_counted", "is_sent", "row", "text",
        "tokens", "turns",
    )  # fmt: skip

    def __init__(self, row: Planned, tokens: int, head: bytes = b"", *, has_earlier_turns: bool) -> None:
        self.row = row
        self.head = head
        self.tokens = tokens
        """Of the prompt that is tried for."""
        self.has_earlier_turns = has_earlier_turns
        """The session had rows before in this run, and its history counts."""
        self.turns: Turns | None = None
        """Of the history, in the body; None before it is built."""
        self.draft = Draft(0)
        self.text = ""
        """The request's own message."""
        self.body = b""
        self.counted_tokens: int | None = None
        self.is_counted = False
        self.is_sent = False


class Ahead:
    """`learn` first, then `fill` and `count` as tasks beside `next`."""

    def __init__(
        self,
        planned: Iterator[Planned],
        url: str,
        *,
        endpoint: Endpoint,
        model: str,
        stream: bool,
        seed: int,
        api_key: str | None,
        prompts: PromptOptions | None = None,
        head: Callable[[Planned], bytes] = lambda _row: b"",
    ) -> None:
        """head: makes the header lines of a row's request, long before its moment. Reads the local tokenizer and the
        pool of prompts. Raises ValueError or OSError naming their file, and ReplayError naming an environment variable
        that is not set."""
        self._options = options = prompts or PromptOptions()
        self._endpoint = endpoint
        self._head = head
        self._headers = [*auth_headers(api_key), *header_lines(options.extra_headers)]
        self._texts = Texts(options, seed)
        self._local = None if options.tokenizer is None else load_tokenizer(options.tokenizer, chat=endpoint == "chat")
        if self._local is not None and options.history != "none":
            self._local.count(Prompt("a", (Turn("a", "a", 0),)))  # a template that takes no answers says so now
        self._bodies = BodyWriter(
            endpoint, model, stream=stream, max_tokens=options.max_tokens, min_tokens=options.min_tokens,
            ignore_eos=options.ignore_eos, fields=options.extra_body,
        )  # fmt: skip
        self._planned = planned
        self._http = HttpClient(url)
        """Its own connections, so that no measured request finds one warm or busy because of a question."""
        self._words: WordModel | None = None
        self._usage = UsageModel() if options.pool is None else UsageModel(1 / FIRST_CHARS_PER_TOKEN)
        self._histories = Histories()
        self._handed: Prepared | None = None
        """The last one that `next` gave."""
        self._ready: asyncio.Queue[Prepared | None] = asyncio.Queue(UNCOUNTED_LOOK_AHEAD_ROWS)
        """None ends it."""
        self._tokens = 0
        """Of the prompts in it."""
        self._room = asyncio.Event()
        self._is_filled = asyncio.Event()
        """It has been full once, or holds all there is."""
        self._to_count: asyncio.Queue[Prepared] = asyncio.Queue(LOOK_AHEAD_ROWS)
        self._to_count_rows = self._looked_at_rows = 0
        self._turned_ns = 0
        """When `fill` last let the loop turn."""
        self._differences: Counter[int] = Counter()
        """Of the target's count and the local one, by answers."""
        self._is_guessed_block = options.is_guessed_block
        self.max_model_len: int | None = None
        """The tokens that the target's model takes, where it says so."""
        self.rows_read = 0
        self.failed_in_source = 0
        """Rows that failed in the trace and cannot be sent."""
        self.without_tokens = 0
        """Other rows that cannot be sent."""
        self.error: Exception | None = None
        """What ended the reading of the trace early."""

    @property
    def has_tokenizer(self) -> bool:
        """Prompts are counted, here or by the target."""
        return self._words is not None

    @property
    def method(self) -> str:
        """Who counts: `local`, `tokenize` (the target) or `usage` (nobody)."""
        return "local" if self._local is not None else "tokenize" if self.has_tokenizer else "usage"

    @property
    def wants_text(self) -> bool:
        """`answered` needs what the target said."""
        return self._options.history == "real"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the prompts, a line each."""
        lines = []
        if self._is_guessed_block:
            size = self._texts.block_tokens
            lines.append(f"prefix blocks: {size} tokens each, a guess, as the trace does not say")
        answers = self._differences.total()
        if answers:
            (difference, times), *_ = self._differences.most_common(1)
            if difference and times >= 0.9 * answers:
                shown = f"the target's count differs by {difference:+d} tokens"
                lines.append(f"local tokenizer: {shown} in {times} of the first {answers} answers")
        if self._histories.forgotten:
            lines.append(f"history: {self._histories.forgotten:,} sessions forgotten to bound the memory")
        return tuple(lines)

    def close(self) -> None:
        """Close the connections of the questions."""
        self._http.close()

    async def learn(self) -> None:
        """Learn the tokenizer's words: the local one's, else the target's."""
        try:
            async with asyncio.timeout(None if self._local is not None else ASK_TIMEOUT_S):
                words = await calibrate(lambda text: self._count(Prompt(text)))
                if self._options.history != "none":
                    words = replace(words, turn_tokens=await self._turn_tokens(words))
        except (Unanswered, TimeoutError):
            return
        self._words = words
        self._ready = asyncio.Queue(LOOK_AHEAD_ROWS)

    @property
    def learned(self) -> tuple[WordModel | None, int | None]:
        """What `learn` found, for another process's `adopt`."""
        return self._words, self.max_model_len

    def adopt(self, learned: tuple[WordModel | None, int | None]) -> None:
        """Instead of `learn`: the target has been asked already."""
        self._words, self.max_model_len = learned
        if self._words is not None:
            self._ready = asyncio.Queue(LOOK_AHEAD_ROWS)

    async def _turn_tokens(self, words: WordModel) -> float:
        """What the template adds for an answer and the next message."""
        user, answer, again = (build_text(words, 1, key) for key in (b"1", b"2", b"3"))
        turn = Turn(user, self._joined(answer), 0)
        both = await self._count(Prompt(again, (turn,)))
        return max(0.0, both - await self._count(Prompt(user)) - 2 * words.tokens_per_word)

    def needs_history(self, prepared: Prepared) -> bool:
        """Real answers are wanted and the session has earlier turns in this run: `settle` is worth calling."""
        return self.wants_text and prepared.has_earlier_turns

    async def settle(self, prepared: Prepared) -> None:
        """Build the body on the history as it is now: an estimate at once, then corrected to the length.

        May be cancelled, and may be overtaken by the send: the body is whole at any time.
        """
        if prepared.is_sent:
            return
        self._build(prepared)
        if self._words is not None:
            with suppress(Unanswered):
                await self._fit(prepared)

    def answered(self, prepared: Prepared, text: str | None, usage: Usage | None, ok: bool) -> None:
        """A request has ended, once: learn from its usage, and add its turn to the session's history.

        text: what the target said, where `wants_text`.
        """
        row = prepared.row
        got = usage.request_tokens if usage is not None else None
        if got is not None:
            self._learn(prepared, got)
        if not (self.wants_text and ok and self._in_history(row)):
            return
        assert row.session_id is not None  # by _in_history
        said = usage.response_tokens if usage is not None else None
        tokens = (got or prepared.counted_tokens or prepared.tokens) + (said or row.response_tokens or 0)
        turn = Turn(prepared.text, text or "", tokens)
        self._histories.put(row.session_id, row.index, (*(prepared.turns or ()), turn))
        waiting = self._handed
        if waiting is not None and not waiting.is_sent and waiting.row.session_id == row.session_id:
            self._build(waiting)
            self._let_count(waiting)

    def _learn(self, prepared: Prepared, got_tokens: int) -> None:
        if self._words is None:
            units = prepared.draft.pool_chars or prepared.draft.words
            if prepared.turns:
                self._usage.learn_turn(units, got_tokens, prepared.turns[-1].tokens)
            else:
                self._usage.learn(units, got_tokens)
        elif self.method == "local" and prepared.is_counted and self._differences.total() < COMPARED_ANSWERS:
            self._differences[got_tokens - (prepared.counted_tokens or 0)] += 1

    async def fill(self) -> None:
        """Read the plan to its end; waits while as much as the bounds allow is ahead."""
        is_embeddings = self._endpoint == "embeddings"
        reading = asyncio.ensure_future(asyncio.to_thread(_next_rows, self._planned))
        try:
            while True:
                rows, self.error = await reading
                is_over = not rows or self.error is not None
                if not is_over:  # the next are read while these are prepared: nobody waits for a file
                    reading = asyncio.ensure_future(asyncio.to_thread(_next_rows, self._planned))
                self._find_block_tokens(rows)
                for row in rows:
                    self.rows_read += 1
                    if row.request_tokens if is_embeddings else row.is_sendable:
                        # An embedding has no answer's length: none is asked for.
                        await self._prepare(msgspec.structs.replace(row, response_tokens=0) if is_embeddings else row)
                    else:
                        self.failed_in_source += row.is_failure
                        self.without_tokens += not row.is_failure
                if is_over:
                    break
        finally:
            reading.cancel()
        self._is_filled.set()
        await self._ready.put(None)

    async def count(self) -> None:
        """Count and correct prompts that wait, for ever."""
        while True:
            prepared = await self._to_count.get()
            if not prepared.is_sent and self._words is not None:
                with suppress(Unanswered):
                    await self._fit(prepared)
            self._looked_at_rows += 1

    async def first_prompts(self) -> None:
        """Wait until the schedule can start with its first prompts counted; not for longer than ASK_TIMEOUT_S."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ASK_TIMEOUT_S):
                await self._is_filled.wait()
                while self._looked_at_rows < min(COUNTED_BEFORE_ZERO, self._to_count_rows):
                    await asyncio.sleep(0.01)

    async def next(self) -> Prepared | None:
        """The next request; None after the last."""
        prepared = await self._ready.get()
        if prepared is not None:
            self._tokens -= prepared.tokens
            self._room.set()
            if self.needs_history(prepared):
                self._handed = prepared
                self._build(prepared)
                self._let_count(prepared)
        return prepared

    async def _prepare(self, row: Planned) -> None:
        tokens = min(row.request_tokens or 0, self.max_model_len or MAX_PROMPT_TOKENS)
        while self._tokens and self._tokens + tokens > LOOK_AHEAD_TOKENS:
            self._is_filled.set()
            self._room.clear()
            await self._room.wait()
        has_earlier_turns = self._in_history(row) and self._histories.open(row.session_id or "")
        prepared = Prepared(row, tokens, self._head(row), has_earlier_turns=has_earlier_turns)
        if not self.needs_history(prepared):
            self._build(prepared)
            is_synthetic = self._options.history == "synthetic" and self._in_history(row)
            # The turn after this one is built on its text, so what will change has to change now.
            is_counted_now = self._words is not None and is_synthetic and not self._words.is_exact
            if self._local is not None or is_counted_now:
                with suppress(Unanswered):
                    await self._fit(prepared)
            if is_synthetic:
                self._say(prepared)
        self._tokens += tokens
        await self._ready.put(prepared)
        if not prepared.is_counted and prepared.body:
            self._let_count(prepared)
        if self._ready.full():
            self._is_filled.set()
        if time.monotonic_ns() - self._turned_ns > TURN_NS:  # let sends in between
            await asyncio.sleep(0)
            self._turned_ns = time.monotonic_ns()

    def _find_block_tokens(self, rows: list[Planned]) -> None:
        if self._texts.block_tokens is None:
            blocks = ((row.request_tokens or 0, len(row.prefix_blocks or ())) for row in rows)
            self._texts.block_tokens, self._is_guessed_block = find_block_tokens(blocks)

    def _in_history(self, row: Planned) -> bool:
        return self._options.history != "none" and row.session_id is not None and not self._texts.has_blocks(row)

    def _say(self, prepared: Prepared) -> None:
        """Add a row and its synthetic answer to its session's history."""
        row = prepared.row
        answer_tokens = row.response_tokens or 1
        answer = self._joined(self._texts.answer(self._model(), row, answer_tokens))
        turn = Turn(prepared.text, answer, (prepared.counted_tokens or prepared.tokens) + answer_tokens)
        self._histories.put(row.session_id or "", row.index, (*(prepared.turns or ()), turn))

    def _joined(self, answer: str) -> str:
        """A synthetic answer as it stands behind its prompt; in one text a space is between them."""
        return answer if self._endpoint == "chat" else f" {answer}"

    def _model(self) -> WordModel:
        return self._words or self._usage.model()

    def _build(self, prepared: Prepared, turns: Turns | None = None) -> None:
        """The body by what is known now, uncounted. turns: those of the history to hold; None takes what fits."""
        row, model = prepared.row, self._model()
        if turns is None:
            turns = ()
            if prepared.has_earlier_turns:
                least_tokens = model.turn_tokens + model.tokens_per_word
                turns = fitting(self._histories.of(row.session_id or ""), prepared.tokens - least_tokens)
        prepared.turns = turns
        own_tokens = prepared.tokens - self._base_tokens(model, turns)
        prepared.draft = self._texts.draft(model, own_tokens, counted=self._words is not None)
        prepared.counted_tokens = None
        prepared.is_counted = False
        self._write(prepared)

    def _base_tokens(self, model: WordModel, turns: Turns) -> float:
        """What a prompt has beside its own message's words."""
        return turns[-1].tokens + model.turn_tokens if turns else model.overhead_tokens

    def _write(self, prepared: Prepared) -> None:
        row = prepared.row
        prepared.text = self._texts.text(self._model(), row, prepared.draft)
        prepared.body = self._bodies.body(
            Prompt(prepared.text, prepared.turns or ()), row.response_tokens or 0, row.model
        )

    async def _fit(self, prepared: Prepared) -> None:
        """Correct a prompt to its length, with fewer turns where they are longer than was known."""
        row, model = prepared.row, self._model()
        while not prepared.is_sent:
            turns = prepared.turns or ()

            async def count(draft: Draft, turns: Turns = turns) -> int:
                is_first = draft == prepared.draft and turns is (prepared.turns or ())
                text = prepared.text if is_first else self._texts.text(model, row, draft)
                return await self._count(Prompt(text, turns))

            base_tokens = self._base_tokens(model, turns)
            draft, counted = await fit(count, model, prepared.draft, prepared.tokens, base_tokens)
            if prepared.is_sent or (prepared.turns or ()) is not turns:
                return  # it went as it was, or was built anew
            if counted > prepared.tokens and turns and draft.words <= 1:
                self._build(prepared, turns[:-1])
                continue
            if draft != prepared.draft:
                prepared.draft = draft
                self._write(prepared)
            self._texts.learn(draft, model, counted - base_tokens)
            prepared.counted_tokens = counted
            prepared.is_counted = True
            return

    def _let_count(self, prepared: Prepared) -> None:
        if self._words is not None and not self._to_count.full():
            self._to_count.put_nowait(prepared)
            self._to_count_rows += 1

    async def _count(self, prompt: Prompt) -> int:
        """Raises Unanswered, also where the local template refuses the prompt."""
        if self._local is not None:
            size_chars = len(prompt.text) + sum(len(turn.user) + len(turn.assistant) for turn in prompt.turns)
            try:
                if size_chars <= INLINE_CHARS:
                    return self._local.count(prompt)
                return await asyncio.to_thread(self._local.count, prompt)
            except ValueError as error:
                raise Unanswered(str(error)) from None
        counted = await count_tokens(self._http, self._bodies.question(prompt), self._headers)
        self.max_model_len = counted.max_model_len
        return counted.count


def _next_rows(planned: Iterator[Planned]) -> tuple[list[Planned], Exception | None]:
    """The next CHUNK_ROWS rows, none at the end; with the error that the trace ends in, if it does."""
    rows: list[Planned] = []
    try:
        rows.extend(islice(planned, CHUNK_ROWS))
    except (ValueError, OSError) as error:
        return rows, error
    return rows, None
