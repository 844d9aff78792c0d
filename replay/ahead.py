"""Requests prepared ahead of their time: rows of the plan in, bodies ready to send out, in order.

    fill    reads the plan in a thread and builds each row's prompt, up to LOOK_AHEAD_ROWS and LOOK_AHEAD_TOKENS ahead
    count   has the target's tokenizer count the prompts that wait, and corrects them; COUNTERS of these run
    next    hands out the next request as it then is, counted or not: a send never waits for a tokenizer

Without a tokenizer prompts are built late, by what the usage of the answers has taught by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

from replay.client import ASK_TIMEOUT_S, Endpoint, Unanswered, count_tokens, request_body
from replay.prompts import UsageModel, WordModel, build_text, calibrate, fit
from replay.schedule import Planned
from wire.http import HttpClient
from wire.shapes import Usage

LOOK_AHEAD_ROWS = 1024
LOOK_AHEAD_TOKENS = 1_000_000
"""Text and body of a prompt hold some 12 bytes a token."""
UNCOUNTED_LOOK_AHEAD_ROWS = 16
COUNTED_BEFORE_ZERO = 256
"""Prompts that the target has counted before the schedule starts, or as many as there are."""
COUNTERS = 4
"""Few, because the target's tokenizer also serves the requests that are measured."""
CHUNK_ROWS = 512
MAX_PROMPT_TOKENS = 1_000_000
"""Of a row that asks for more where the target does not say what its model takes: the memory is ours."""


class Prepared:
    """A row and its request, which may still change until it is sent."""

    __slots__ = ("body", "is_counted", "is_sent", "row", "text", "tokens", "word_count")

    def __init__(self, row: Planned, tokens: int, word_count: int, text: str, body: bytes) -> None:
        self.row = row
        self.tokens = tokens
        """Of the prompt that is tried for."""
        self.word_count = word_count
        self.text = text
        self.body = body
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
    ) -> None:
        self._planned = planned
        self._http = HttpClient(url)
        """Its own connections, so that no measured request finds one warm or busy because of a question."""
        self._endpoint = endpoint
        self._model = model
        self._stream = stream
        self._seed = seed
        self._api_key = api_key
        self._words: WordModel | None = None
        self._usage = UsageModel()
        self._ready: asyncio.Queue[Prepared | None] = asyncio.Queue(UNCOUNTED_LOOK_AHEAD_ROWS)
        """None ends it."""
        self._tokens = 0
        """Of the prompts in it."""
        self._room = asyncio.Event()
        self._is_filled = asyncio.Event()
        """It has been full once, or holds all there is."""
        self._to_count: asyncio.Queue[Prepared] = asyncio.Queue(LOOK_AHEAD_ROWS)
        self._to_count_rows = self._looked_at_rows = 0
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
        """The target counts tokens on demand."""
        return self._words is not None

    def close(self) -> None:
        """Close the connections of the questions."""
        self._http.close()

    async def learn(self) -> None:
        """Ask for the target's tokenizer."""
        with suppress(Unanswered, TimeoutError):
            async with asyncio.timeout(ASK_TIMEOUT_S):
                self._words = await calibrate(self._count_text)
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

    def learn_from(self, prepared: Prepared, usage: Usage | None) -> None:
        """Take note of what the target counted for a prompt that was sent."""
        if self._words is None and usage is not None and usage.request_tokens is not None:
            self._usage.learn(prepared.word_count, usage.request_tokens)

    async def fill(self) -> None:
        """Read the plan to its end; waits while as much as the bounds allow is ahead."""
        is_over = False
        while not is_over:
            rows, self.error = await asyncio.to_thread(_next_rows, self._planned)
            is_over = not rows or self.error is not None
            for row in rows:
                self.rows_read += 1
                if row.is_sendable:
                    await self._prepare(row)
                else:
                    self.failed_in_source += row.is_failure
                    self.without_tokens += not row.is_failure
        self._is_filled.set()
        await self._ready.put(None)

    async def count(self) -> None:
        """Count and correct prompts that wait, for ever."""
        while True:
            prepared = await self._to_count.get()
            if not prepared.is_sent and self._words is not None:
                row = prepared.row
                with suppress(Unanswered):
                    text, _ = await fit(self._count_text, self._words, prepared.tokens, self._key(row), prepared.text)
                    if text != prepared.text:
                        prepared.body = self._body(row, text)
                    prepared.is_counted = not prepared.is_sent
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
        return prepared

    async def _prepare(self, row: Planned) -> None:
        tokens = min(row.request_tokens or 0, self.max_model_len or MAX_PROMPT_TOKENS)
        while self._tokens and self._tokens + tokens > LOOK_AHEAD_TOKENS:
            self._is_filled.set()
            self._room.clear()
            await self._room.wait()
        model = self._words or self._usage.model()
        word_count = model.words_for(tokens)
        text = build_text(model, word_count, self._key(row))
        prepared = Prepared(row, tokens, word_count, text, self._body(row, text))
        self._tokens += tokens
        await self._ready.put(prepared)
        if self._words is not None and not self._to_count.full():
            self._to_count.put_nowait(prepared)
            self._to_count_rows += 1
        if self._ready.full():
            self._is_filled.set()
        await asyncio.sleep(0)  # building a long prompt takes a while: let sends in between

    def _key(self, row: Planned) -> tuple[int, int]:
        return self._seed, row.index

    def _body(self, row: Planned, text: str) -> bytes:
        return request_body(self._endpoint, self._model, text, row.response_tokens or 0, stream=self._stream)

    async def _count_text(self, text: str) -> int:
        counted = await count_tokens(self._http, self._endpoint, self._model, text, self._api_key)
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
