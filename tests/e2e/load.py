"""Clients for the tests under load: raw HTTP/1.1 over asyncio, so that what a client received is known to the byte.

They share no code with the gateway. A request carries its own X-Request-Id, by which its row is found again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from traces.record import Outcome, TraceRecord

MODEL = "simulated"
PROMPT = "Describe the sea in winter."


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client asks for."""

    request_id: str
    stream: bool
    output_tokens: int

    def encode(self, authority: str, headers: Sequence[str] = ()) -> bytes:
        """The request's bytes."""
        body = json.dumps(
            {
                "model": MODEL,
                "messages": [{"role": "user", "content": PROMPT}],
                "max_tokens": self.output_tokens,
                "min_tokens": self.output_tokens,
                "ignore_eos": True,
                "stream": self.stream,
            }
        )
        lines = [
            "POST /v1/chat/completions HTTP/1.1",
            f"host: {authority}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            f"x-request-id: {self.request_id}",
            *headers,
        ]
        return "\r\n".join([*lines, "", body]).encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client received."""

    ask: Ask
    status: int | None
    """None: not even a head."""
    is_whole: bool
    """For a stream: up to and including `data: [DONE]`; for a plain answer: its full content-length."""
    elapsed_s: float
    was_connected: bool = True


async def fetch(url: str, ask: Ask) -> Answer:
    """Send one request on a connection of its own and read until the answer is whole or broken off."""
    start_s = time.monotonic()
    parts = urlsplit(url)
    status: int | None = None
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except OSError:
        return Answer(ask, None, False, time.monotonic() - start_s, was_connected=False)
    try:
        writer.write(ask.encode(parts.netloc))
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        length = re.search(rb"(?im)^content-length: *(\d+)", head)
        if length is not None:
            await reader.readexactly(int(length[1]))
        else:
            await reader.readuntil(b"data: [DONE]\n\n")
        return Answer(ask, status, True, time.monotonic() - start_s)
    except (OSError, asyncio.IncompleteReadError):
        return Answer(ask, status, False, time.monotonic() - start_s)
    finally:
        writer.transport.abort()


async def send_request(url: str, ask: Ask, *, cut_bytes: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which the request has been sent, but for its last `cut_bytes`."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    data = ask.encode(parts.netloc)
    writer.write(data[: len(data) - cut_bytes])
    await writer.drain()
    return reader, writer


def p99_s(answers: Sequence[Answer]) -> float:
    """The 99th percentile of how long the answers took."""
    return sorted(answer.elapsed_s for answer in answers)[len(answers) * 99 // 100]


class Load:
    """Clients that ask one request after another, streaming and plain by turns; `answers` holds all that came of it."""

    def __init__(self, url: Callable[[], str], *, clients: int, seed: int, pause_s: float = 0.0) -> None:
        self.answers: list[Answer] = []
        self._url = url
        self._clients = clients
        self._pause_s = pause_s
        self._rng = random.Random(seed)
        self._ids = (f"load-{seed}-{number}" for number in itertools.count())
        self._is_over = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The load is on; at the end every client finishes the request it is at."""
        self._is_over = False
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._clients):
                tasks.create_task(self._client())
            try:
                yield
            finally:
                self._is_over = True

    async def _client(self) -> None:
        while not self._is_over:
            ask = Ask(next(self._ids), self._rng.random() < 0.5, self._rng.randint(2, 24))
            answer = await fetch(self._url(), ask)
            self.answers.append(answer)
            await asyncio.sleep(self._pause_s if answer.was_connected else 0.05)


def assert_recorded(answers: Iterable[Answer], rows: Sequence[TraceRecord], request_tokens: int) -> None:
    """Each whole answer is there once as it was; each one begun and broken off once; nothing twice, nothing else.

    A broken answer without a head may have died in the kernel's queue, unseen by any worker: at most one row.
    """
    by_id: dict[str | None, list[TraceRecord]] = {}
    for row in rows:
        by_id.setdefault(row.client_request_id, []).append(row)
    for answer in answers:
        ask = answer.ask
        found = by_id.pop(ask.request_id, [])
        if answer.is_whole:
            assert answer.status == 200
            expected = [(Outcome.OK, request_tokens, ask.output_tokens, ask.stream, 200)]
            got = [(row.outcome, row.request_tokens, row.response_tokens, row.stream, row.status) for row in found]
            assert got == expected, ask
        else:
            assert len(found) == 1 or (answer.status is None and not found), (answer, found)
            # A worker may die between the record and the send: then the row says more than the client got.
            assert {row.outcome for row in found} <= {Outcome.GATEWAY_CRASH, Outcome.OK}, (answer, found)
    assert not by_id, "rows that nobody asked for"


def raise_descriptor_limit(wanted: int) -> None:
    """Room for this many descriptors in this process. Raises ValueError where the hard limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
