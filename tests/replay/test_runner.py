"""The replay against the simulator, and against a scripted server that misbehaves and remembers what it was sent."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from replay.arrivals import ArrivalOptions
from replay.client import MAX_ANSWER_BYTES, Reply, Request, header_value, outcome_of
from replay.metrics import Summary
from replay.prompts import PromptOptions
from replay.report import render
from replay.runner import ReplayError, ReplayOptions, Stop, plan_file, replay, run
from replay.sample import Sample
from replay.schedule import Planned
from replay.simulator.config import SimulatorConfig
from replay.simulator.server import running
from replay.source import SourceOptions
from replay.verdict import judged
from traces.record import Outcome
from wire.accounting import Accounted
from wire.http import HttpClient
from wire.shapes import Usage

TRACES = Path(os.environ.get("BURSTGATE_TRACES", Path(__file__).parents[2].parent / "shared" / "traces"))


@dataclass
class Seen:
    """A request as the scripted server received it."""

    at_s: float
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.body)
        return found


Answer = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Script:
    """A server whose answers a test writes. Without /tokenize and /v1/models unless `routes` has them."""

    routes: dict[str, Answer]
    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """One a connection."""

    def of(self, path: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.path == path]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: asyncio.Task[None] = asyncio.current_task()  # type: ignore[assignment]
        self.tasks.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {
                    name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                seen = Seen(time.monotonic(), method, path, headers, body)
                self.seen.append(seen)
                await self.routes.get(path, status(404, b"no such route"))(seen, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            self.tasks.discard(task)
            writer.close()


@asynccontextmanager
async def scripted(routes: dict[str, Answer]) -> AsyncIterator[Script]:
    script = Script(routes)
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0, limit=1 << 24)
    script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield script
    finally:
        server.close()
        tasks = list(script.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)


def status(code: int, body: bytes = b"{}", content_type: str = "application/json") -> Answer:
    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 {code} X\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)

    return answer


def raw(*parts: bytes | float, close: bool = True) -> Answer:
    """Bytes as they are, pauses in seconds between them, then the end of the connection."""

    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            if isinstance(part, float):
                await asyncio.sleep(part)
            else:
                writer.write(part)
                await writer.drain()
        if close:
            raise ConnectionError

    return answer


async def hang(seen: Seen, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def content(text: str = "x") -> bytes:
    return chunked(b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text.encode())


def usage(prompt: int, completion: int) -> bytes:
    return chunked(
        b'data: {"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}\n\n' % (prompt, completion)
    )


END = chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"
CHAT = "/v1/chat/completions"


def words_of(seen: Seen) -> int:
    """Words of a chat request's prompt."""
    return len(msgspec.json.decode(seen.body)["messages"][0]["content"].split())


async def echo(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Counts a prompt as 4 tokens and 3 for two words, and answers as many tokens as asked."""
    asked = msgspec.json.decode(seen.body)["max_tokens"]
    writer.write(STREAM_HEAD + content() + usage(4 + words_of(seen) * 3 // 2, asked) + END)


def rows(dues_s: list[float], request_tokens: int = 20, response_tokens: int = 3) -> list[Planned]:
    return [Planned(n, due_s, None, "ChatGPT", request_tokens, response_tokens) for n, due_s in enumerate(dues_s)]


def replayed(
    routes: dict[str, Answer], planned: list[Planned], options: ReplayOptions | None = None
) -> tuple[Summary, Script]:
    """Run against the scripted server."""

    async def body() -> tuple[Summary, Script]:
        async with scripted(routes) as script:
            chosen = replace(options or ReplayOptions("", "m"), target=script.url)
            return await run(planned, chosen), script

    return asyncio.run(body())


@pytest.fixture(scope="module")
def simulator() -> Iterator[str]:
    with running(SimulatorConfig.fast()) as url:
        yield url


def samples_of(path: Path) -> list[Sample]:
    return [msgspec.json.decode(line, type=Sample) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_trace_is_sent_as_it_is(simulator: str, tmp_path: Path, endpoint: str, stream: bool) -> None:
    planned = [
        Planned(0, 0.0, "s1", "GPT-4", 25, 7, "Conversation log"),
        Planned(1, 0.02, None, "ChatGPT", None, None, "API log", is_failure=True),
        Planned(2, 0.05, None, "ChatGPT", 1500, 40),
        Planned(3, 0.05, None, "ChatGPT", 30, 0),  # an embedding, say: not a failure, but nothing to ask for
        Planned(4, 0.15, "s1", "ChatGPT", 100, 1),
    ]
    options = ReplayOptions(
        simulator + "/v1/", "simulated", endpoint=endpoint, stream=stream, samples=tmp_path / "s", run_id="run"  # type: ignore[arg-type]
    )  # fmt: skip
    summary = asyncio.run(run(planned, options))
    counts = (summary.rows_read, summary.failed_in_source, summary.without_tokens, summary.unsent, summary.sent)
    assert counts == (5, 1, 1, 0, 3)
    assert (summary.ok, summary.failures, summary.errors, summary.error_rate) == (3, {}, {}, 0.0)
    assert (summary.prompt_method, summary.prompts_counted, summary.max_model_len) == ("tokenize", 3, 16384)
    assert (summary.prompts.exact_share, summary.prompts.got_tokens) == (1.0, 1625)
    assert (summary.outputs.exact_share, summary.outputs.got_tokens) == (1.0, 48)
    assert (summary.target, summary.run_id, summary.loop) == (simulator, "run", "open")
    assert (summary.ttft_s is not None) is stream
    assert (summary.tpot_s is not None and summary.tpot_s.count) == (2 if stream else None) or not stream
    samples = sorted(samples_of(tmp_path / "s"), key=lambda sample: sample.index)
    assert [sample.index for sample in samples] == [0, 2, 4]
    for sample in samples:
        assert (sample.outcome, sample.status, sample.error) == (Outcome.OK, 200, None)
        assert sample.sent_s is not None
        assert sample.dispatch_lag_s is not None
        assert sample.e2e_s is not None
        assert sample.e2e_from_due_s is not None
        assert 0 <= sample.wake_lag_s <= sample.dispatch_lag_s == pytest.approx(sample.sent_s - sample.due_s)
        assert sample.e2e_from_due_s == pytest.approx(sample.dispatch_lag_s + sample.e2e_s)
        assert not stream or 0 < (sample.ttft_s or 0) <= sample.e2e_s


def test_what_goes_over_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "sk-1")
    planned = [
        Planned(7, 0.0, "sé ss\r\nx-evil: 1", "GPT-4", 20, 3, "Conversation log"),
        Planned(8, 0.1, None, "ChatGPT", 20, 5, "API log"),
    ]
    models = status(200, b'{"object":"list","data":[{"id":"m"},{"id":"o"}]}')
    summary, script = replayed(
        {CHAT: echo, "/v1/models": models}, planned, ReplayOptions("", "m", api_key_env="THE_KEY", run_id="r-1")
    )
    assert summary.ok == 2
    first, second = script.of(CHAT)
    sent = {name: value for name, value in first.headers.items() if name not in ("host", "content-length")}
    assert sent == {
        "content-type": "application/json",
        "x-request-id": "r-1-7",
        "x-burstgate-origin": "replay",
        "x-burstgate-run-id": "r-1",
        "x-burstgate-log-type": "Conversation log",
        "x-session-id": "s%C3%A9 ss%0D%0Ax-evil: 1",
        "authorization": "Bearer sk-1",
    }
    assert "x-session-id" not in second.headers
    body = second.json()
    messages = body.pop("messages")
    assert isinstance(messages, list)
    assert messages[0]["role"] == "user"
    assert body == {
        "model": "m",
        "max_tokens": 5,
        "min_tokens": 5,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    questions = script.of("/v1/models") + script.of("/tokenize")
    assert [seen.headers["authorization"] for seen in questions] == ["Bearer sk-1"] * 2
    assert "sk-1" not in repr(summary)


def test_the_loop_is_open_and_late_requests_go_at_once(tmp_path: Path) -> None:
    """Answers take a second; 40 requests are due within 0.2 s and do not wait for them."""
    dues_s = [n * 0.005 for n in range(40)]
    slow = raw(1.0, STREAM_HEAD, content(), usage(20, 3), END, close=False)
    samples = tmp_path / "s"
    summary, script = replayed({CHAT: slow}, rows(dues_s), ReplayOptions("", "m", samples=samples))
    assert (summary.ok, summary.in_flight_max) == (40, 40)
    arrived_s = [seen.at_s for seen in script.of(CHAT)]
    assert arrived_s[-1] - arrived_s[0] < 0.9
    assert [sample.index for sample in sorted(samples_of(samples), key=lambda s: s.due_s)] == list(range(40))
    assert summary.e2e_s is not None
    assert 1.0 <= summary.e2e_s.p50 < 1.9


def test_max_in_flight_counts_as_lag() -> None:
    slow = raw(0.05, STREAM_HEAD, content(), usage(20, 3), END, close=False)
    summary, _ = replayed({CHAT: slow}, rows([0.0] * 10), ReplayOptions("", "m", max_in_flight=2))
    assert (summary.ok, summary.in_flight_max) == (10, 2)
    assert summary.dispatch_lag_s is not None
    assert summary.e2e_s is not None
    assert summary.e2e_from_due_s is not None
    assert summary.dispatch_lag_s.max > 0.19
    assert summary.e2e_from_due_s.max > summary.e2e_s.p50 + 0.15


OK_BODY = b'{"choices":[{"index":0,"message":{"content":"x"},"finish_reason":"length"}],"usage":{"prompt_tokens":20,"completion_tokens":3}}'  # noqa: E501
REFUSED_BODY = b'{"error":{"message":"a secret prompt","type":"BadRequestError"}}'
TIMED_OUT = "the answer was not whole in time"
ERROR_TEXT = "error event in the stream: InternalServerError"
NO_COMPLETION = "HTTP 200, but the answer is no completion"
ERROR_EVENT = chunked(b'data: {"error":{"message":"a secret prompt","type":"InternalServerError","code":500}}\n\n')


@pytest.mark.parametrize(
    ("answer", "outcome", "failure_class", "error"),
    [
        (raw(STREAM_HEAD, content(), usage(20, 3), END, close=False), "ok", None, None),
        # A server that does not stream though asked to: a whole answer all the same.
        (status(200, OK_BODY), "ok", None, None),
        (status(400, REFUSED_BODY), "invalid_request", "http_4xx", "HTTP 400 BadRequestError"),
        (status(307), "invalid_request", "http_3xx", "HTTP 307"),
        (status(429, b"slow down"), "rejected", "http_429", "HTTP 429"),
        (status(503, b"\xff\xfe"), "upstream_error", "http_5xx", "HTTP 503"),
        (status(200, b"<html>hello</html>", "text/html"), "upstream_error", "bad_answer", NO_COMPLETION),
        (status(200, b""), "upstream_error", "bad_answer", NO_COMPLETION),
        (raw(), "upstream_error", "no_answer", "closed by the upstream"),
        (raw(b"SSH-2.0-OpenSSH_9\r\n\r\n"), "upstream_error", "bad_answer", None),
        (raw(STREAM_HEAD, ERROR_EVENT + END), "upstream_error", "mid_stream", ERROR_TEXT),
        (raw(STREAM_HEAD, content()), "truncated", "mid_stream", "closed by the upstream"),
        (raw(STREAM_HEAD, content(), b"zz\r\n"), "truncated", "mid_stream", None),
        (raw(STREAM_HEAD, content(), b"0\r\n\r\n"), "truncated", "mid_stream", "the stream ended without [DONE]"),
        (hang, "upstream_timeout", "timeout_head", TIMED_OUT),
        (raw(STREAM_HEAD, 30.0), "upstream_timeout", "timeout_first_token", TIMED_OUT),
        (raw(STREAM_HEAD, content(), 30.0), "upstream_timeout", "timeout_mid_stream", TIMED_OUT),
    ],
)  # fmt: skip
def test_each_failure_is_a_sample_and_the_next_request_is_sent(
    answer: Answer, outcome: str, failure_class: str | None, error: str | None, tmp_path: Path
) -> None:
    async def first_only(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await (answer if seen.headers["x-request-id"].endswith("-0") else echo)(seen, writer)

    options = ReplayOptions("", "m", timeout_s=1.0, samples=tmp_path / "s")
    summary, _ = replayed({CHAT: first_only}, rows([0.0, 0.1]), options)
    assert summary.sent == 2
    assert summary.failures == ({} if outcome == "ok" else {outcome: 1})
    sample = next(sample for sample in samples_of(tmp_path / "s") if sample.index == 0)
    assert (sample.outcome, sample.failure_class) == (outcome, failure_class)
    assert error is None or sample.error == error
    assert "secret" not in (tmp_path / "s").read_text()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (raw(STREAM_HEAD, content("a\\u00e9"), content(" b"), usage(20, 3), END, close=False), "a\u00e9 b"),
        (status(200, OK_BODY), "x"),
        (status(500), None),
    ],
)
def test_an_answers_text_is_kept_when_asked(answer: Answer, text: str | None) -> None:
    async def body(*, keep_text: bool) -> Reply:
        async with scripted({CHAT: answer}) as script:
            http = HttpClient(script.url)
            reply = await Request(http, "chat", b"", b"{}", keep_text=keep_text).finish(asyncio.timeout(5))
            http.close()
            return reply

    assert asyncio.run(body(keep_text=True)).text == text
    assert asyncio.run(body(keep_text=False)).text is None


def test_a_refused_connection_has_its_class(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted({}) as script:
            url = script.url
            task = asyncio.create_task(run(rows([0.3]), ReplayOptions(url, "m", samples=tmp_path / "s")))
            await asyncio.sleep(0.15)
        await task

    asyncio.run(body())
    assert [(sample.outcome, sample.failure_class) for sample in samples_of(tmp_path / "s")] == [
        ("connect_error", "connect")
    ]


def test_a_report_is_written_when_everything_fails(tmp_path: Path) -> None:
    options = ReplayOptions("", "m", samples=tmp_path / "s")
    summary, _ = replayed({CHAT: status(503)}, rows([0.0, 0.01]), options)
    assert (summary.sent, summary.ok, summary.error_rate, summary.ttft_s) == (2, 0, 1.0, None)
    assert len(samples_of(tmp_path / "s")) == 2
    output = io.StringIO()
    Console(file=output, width=200).print(render(summary))
    assert "2 http_5xx" in output.getvalue()


def test_what_is_late_is_dropped_where_asked(tmp_path: Path) -> None:
    """One in flight at a time, 0.2 s each: of ten that are due at once the last ones are more than 0.5 s late."""
    slow = raw(0.2, STREAM_HEAD, content(), usage(20, 3), END, close=False)
    options = ReplayOptions("", "m", max_in_flight=1, late="drop", late_after_s=0.5, samples=tmp_path / "s")
    summary, script = replayed({CHAT: slow}, rows([0.0] * 10), options)
    assert summary.ok == summary.sent == len(script.of(CHAT)) == len(samples_of(tmp_path / "s"))
    assert 1 <= summary.ok <= 3
    assert (summary.late_dropped, summary.unsent, summary.rows_read) == (10 - summary.ok, 0, 10)
    held_s = sorted(sample.held_back_s or 0.0 for sample in samples_of(tmp_path / "s"))
    assert held_s[0] < 0.1
    assert summary.ok < 3 or held_s[-1] > 0.15  # each waits for the one before it


def spoken(due_s: float, index: int, session: str | None, elapsed_s: float = 0.1) -> Planned:
    return Planned(index, due_s, session, None, 20, 3, elapsed_s=elapsed_s)


SPOKEN = [spoken(0.0, 0, "a"), spoken(0.2, 1, "a"), spoken(0.3, 2, "b"), spoken(0.9, 3, "a"), spoken(0.9, 4, None)]


@pytest.mark.parametrize(
    ("sessions", "went_s"),
    [
        ("independent", [0.0, 0.2, 0.3, 0.9, 0.9]),
        ("ordered", [0.0, 0.5, 0.3, 1.0, 0.9]),
        ("think-time", [0.0, 0.6, 0.3, 1.7, 0.9]),  # 0.1 s and 0.6 s after the end of the turn before
    ],
)
def test_sessions_as_the_target_sees_them(sessions: Any, went_s: list[float], tmp_path: Path) -> None:
    """An answer takes half a second."""
    slow = raw(0.5, STREAM_HEAD, content(), usage(20, 3), END, close=False)
    options = ReplayOptions("", "m", sessions=sessions, samples=tmp_path / "s")
    summary, script = replayed({CHAT: slow}, SPOKEN, options)
    assert (summary.ok, summary.sessions, summary.gaps_estimated, summary.read_late) == (5, sessions, 0, 0)
    zero_s = time.monotonic() - (time.time() - (summary.started_at or 0.0))
    arrived_s = {int(seen.headers["x-request-id"][-1]): seen.at_s - zero_s for seen in script.of(CHAT)}
    samples = sorted(samples_of(tmp_path / "s"), key=lambda sample: sample.index)
    for index, moment_s in enumerate(went_s):
        assert moment_s - 0.001 <= arrived_s[index] < moment_s + 0.15
        sample = samples[index]
        if sessions == "independent":
            assert sample.session_wait_s is None
            continue
        assert sample.session_wait_s == pytest.approx(moment_s - SPOKEN[index].due_s, abs=0.12)
        assert 0 <= (sample.dispatch_lag_s or 0.0) < 0.12  # the wait is no lag
        assert (sample.sent_s or 0.0) - sample.due_s == pytest.approx(
            (sample.session_wait_s or 0.0) + (sample.dispatch_lag_s or 0.0)
        )


def test_one_session_that_hangs_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its turns fill the room and time out one by one; what is read late for that is counted, and nothing is lost."""
    monkeypatch.setattr("replay.turns.MAX_TURNS", 4)

    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await (hang if seen.headers.get("x-session-id") == "hangs" else echo)(seen, writer)

    planned = [spoken(0.0, n, "hangs") for n in range(5)] + [spoken(0.05 * n, 5 + n, f"s{n}") for n in range(10)]
    summary, _ = replayed({CHAT: answer}, planned, ReplayOptions("", "m", sessions="ordered", timeout_s=0.2))
    assert (summary.sent, summary.ok, summary.failures) == (15, 10, {"upstream_timeout": 5})
    assert summary.read_late > 0


def test_a_sender_tells_its_own_load(simulator: str) -> None:
    summary = asyncio.run(run(rows([n * 0.01 for n in range(30)]), ReplayOptions(simulator, "simulated")))
    (facts,) = summary.senders
    assert facts.name.endswith(f":{os.getpid()}")
    assert (facts.sent, facts.dispatch_lag_s) == (30, summary.dispatch_lag_s)
    assert facts.cpu_share is not None
    assert 0 < facts.cpu_share < 2
    assert facts.stall_max_s is not None
    assert 0 <= facts.stall_max_s < 5


def test_a_target_that_dies_is_counted() -> None:
    async def body() -> Summary:
        async with scripted({}) as script:
            server_url = script.url
            planned = iter(rows([0.3, 0.35]))
            task = asyncio.create_task(run(planned, ReplayOptions(server_url, "m")))
            await asyncio.sleep(0.15)
        return await task

    assert asyncio.run(body()).failures == {"connect_error": 2}


def test_gaps_between_chunks() -> None:
    """Chunks at 0, 0.1 and, two together, 0.2 s: gaps of 0.1, 0.1 and 0."""
    answer = raw(STREAM_HEAD + content(), 0.1, content(), 0.1, content() + content(), usage(20, 4) + END, close=False)
    summary, _ = replayed({CHAT: answer}, rows([0.0], response_tokens=4))
    assert summary.itl_s is not None
    assert summary.tpot_s is not None
    assert summary.itl_s.count == 3
    assert summary.itl_s.mean == pytest.approx(summary.tpot_s.mean) == pytest.approx(0.2 / 3, rel=0.3)


def test_without_a_tokenizer_the_length_is_learned_from_usage() -> None:
    """The first prompts are guesses; the later ones are within a token or two."""
    planned = [Planned(n, n * 0.01, None, None, 100 + 10 * (n % 7), 3) for n in range(80)]
    summary, script = replayed({CHAT: echo}, planned)
    assert (summary.ok, summary.prompt_method, summary.prompts_counted) == (80, "usage", 0)
    asked = [row.request_tokens or 0 for row in planned]
    got = {int(seen.headers["x-request-id"].rsplit("-", 1)[1]): 4 + words_of(seen) * 3 // 2 for seen in script.of(CHAT)}
    assert max(abs(got[n] - asked[n]) for n in range(40, 80)) <= 2
    assert summary.prompts.known == 80


@pytest.mark.parametrize(
    "tokenize",
    [status(404), status(200, b"rubbish"), status(200, b'{"count":-1.5}'), status(500), raw(), raw(b"HTTP/9 \r\n\r\n")],
)
def test_a_broken_tokenizer_is_no_tokenizer(tokenize: Answer) -> None:
    summary, _ = replayed({CHAT: echo, "/tokenize": tokenize}, rows([0.0]))
    assert (summary.ok, summary.prompt_method) == (1, "usage")


def test_sends_do_not_wait_for_a_slow_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts short texts at once and takes five seconds for a prompt; the schedule does not wait for it."""
    monkeypatch.setattr("replay.ahead.COUNTED_BEFORE_ZERO", 0)

    async def tokenize(seen: Seen, writer: asyncio.StreamWriter) -> None:
        words = words_of(seen)
        if words == 295:
            await asyncio.sleep(5)
        await status(200, b'{"count":%d}' % (words + 5))(seen, writer)

    summary, _ = replayed({CHAT: echo, "/tokenize": tokenize}, rows([n * 0.01 for n in range(30)], 300))
    assert (summary.ok, summary.prompt_method, summary.prompts_counted) == (30, "tokenize", 0)
    assert summary.dispatch_lag_s is not None
    assert summary.dispatch_lag_s.max < 3


def test_rows_beyond_the_model_are_counted(simulator: str) -> None:
    huge = Planned(1, 0.0, None, None, 10**15, 2)  # rubbish that must not become a prompt of a petabyte
    options = ReplayOptions(simulator, "simulated")
    assert asyncio.run(run([*rows([0.0]), Planned(1, 0.0, None, None, 16_000, 385)], options)).over_max_model_len == 1
    summary = asyncio.run(run([huge], replace(options, timeout_s=20)))
    assert (summary.sent, summary.ok, summary.over_max_model_len) == (1, 0, 1)


@pytest.mark.parametrize(
    ("routes", "options", "message"),
    [
        ({"/v1/models": status(200, b'{"data":[{"id":"a"},{"id":"b"}]}')}, {}, r"model 'm': .* serves a, b$"),
        ({"/v1/models": status(401)}, {}, r"/v1/models: the target wants another API key \(HTTP 401\)"),
        ({"/v1/models": raw(b"SSH-2.0-x\r\n\r\n")}, {}, "expected an HTTP answer"),
        ({"/v1/models": raw()}, {}, "expected an HTTP answer"),
        ({}, {"api_key_env": "BURSTGATE_NO_SUCH_KEY"}, "environment variable BURSTGATE_NO_SUCH_KEY is not set"),
        ({}, {"samples": Path("/nonexistent/s")}, "samples file /nonexistent/s: No such file"),
    ],
)  # fmt: skip
def test_what_cannot_start_says_why_in_one_line(
    routes: dict[str, Answer], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ReplayError, match=message) as caught:
        replayed({CHAT: echo, **routes}, rows([0.0]), ReplayOptions("", "m", **options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["http://127.0.0.1:9", "localhost:8000", "http://", "http://[", "ftp://h"])
def test_an_unreachable_or_wrong_target(target: str) -> None:
    with pytest.raises(ReplayError, match=r"cannot reach the target|expected http://HOST"):
        asyncio.run(run(rows([0.0]), ReplayOptions(target, "m")))


@pytest.mark.parametrize("listing", [status(404), status(200, b"rubbish"), status(200, b'{"data":[]}'), status(500)])
def test_a_target_need_not_list_its_models(listing: Answer) -> None:
    summary, _ = replayed({CHAT: echo, "/v1/models": listing}, rows([0.0]))
    assert summary.ok == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"endpoint": "images"}, "endpoint: expected chat, completions or embeddings"),
        ({"endpoint": "embeddings", "prompts": PromptOptions(history="real")}, "history: expected none with the endp"),
        (
            {"api_key_env": "A", "prompts": PromptOptions(extra_headers=(("Authorization", "$B"),))},
            "header authorization: expected without an API key",
        ),
        ({"run_id": "a b"}, "run id: expected 1 to 100 visible"),
        ({"run_id": "a\n"}, "run id: expected 1 to 100 visible"),
        ({"max_in_flight": 0}, "max in flight: expected requests >= 1"),
        ({"timeout_s": 0}, "timeout: expected seconds > 0"),
        ({"max_error_rate": 1.5}, "max error rate: expected 0 to 1"),
        ({"speed": -1}, "speed: expected"),
        ({"speed": 2, "arrivals": ArrivalOptions("poisson", 1.0)}, "speed: expected 1 with the process poisson"),
        ({"warmup_s": -1}, "warmup: expected seconds >= 0"),
        ({"sessions": "closed"}, "sessions: expected one of independent, ordered, think-time, got 'closed'"),
        ({"late": "skip"}, "late: expected send or drop, got 'skip'"),
        ({"late_after_s": -1}, "late after: expected seconds >= 0, got -1"),
        ({"processes": 0}, "processes: expected 1 to 1024, got 0"),
        ({"processes": 3, "max_in_flight": 2}, "max in flight: expected at least 1 for each of 3 senders"),
        ({"senders": 2}, "senders: expected with a Ray address only"),
        ({"ray": "auto", "processes": 2}, "processes: expected without a Ray address"),
    ],
)
def test_wrong_options(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplayOptions(**{"target": "http://h", "model": "m", **wrong})  # type: ignore[arg-type]


def test_the_trace_breaking_off_ends_the_run_with_a_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.ahead.CHUNK_ROWS", 2)
    monkeypatch.setattr("replay.ahead.UNCOUNTED_LOOK_AHEAD_ROWS", 2)

    def broken() -> Iterator[Planned]:
        yield from rows([n * 0.02 for n in range(7)])
        raise ValueError("row 8: goes backwards")

    async def body(planned: Iterator[Planned]) -> Summary:
        async with scripted({CHAT: echo}) as script:
            return await run(planned, ReplayOptions(script.url, "m"))

    summary = asyncio.run(body(broken()))
    assert (summary.ok, summary.stopped_by) == (7, "row 8: goes backwards")


def test_a_trace_that_is_wrong_from_the_start_sends_nothing() -> None:
    def broken() -> Iterator[Planned]:
        yield from rows([0.0])
        raise ValueError("row 2: goes backwards")

    async def body() -> list[Seen]:
        async with scripted({CHAT: echo}) as script:
            with pytest.raises(ValueError, match="row 2: goes backwards"):
                await run(broken(), ReplayOptions(script.url, "m"))
            return script.of(CHAT)

    assert asyncio.run(body()) == []


@pytest.mark.parametrize("presses", [1, 2])
def test_a_stop_ends_the_sending_and_still_reports(presses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three requests are in flight when it comes: one ends by itself in time, two hang."""
    monkeypatch.setattr("replay.sender.DRAIN_S", 0.5 if presses == 1 else 60.0)

    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        is_first = seen.headers["x-request-id"].endswith("-0")
        await (raw(0.4, STREAM_HEAD, content(), usage(20, 3), END, close=False) if is_first else hang)(seen, writer)

    async def body() -> Summary:
        async with scripted({CHAT: answer}) as script:
            stop = Stop()
            task = asyncio.create_task(run(rows([0.0, 0.0, 0.0, 30.0]), ReplayOptions(script.url, "m"), stop=stop))
            while len(script.of(CHAT)) < 3:
                await asyncio.sleep(0.01)
            for _ in range(presses):
                stop.press()
            return await task

    began_s = time.monotonic()
    summary = asyncio.run(body())
    assert time.monotonic() - began_s < 10
    assert (summary.is_interrupted, summary.sent, summary.unsent) == (True, 3, 1)
    assert (summary.ok, summary.failures) == ((1, {"client_gone": 2}) if presses == 1 else (0, {"client_gone": 3}))


def test_a_stop_before_the_first_send() -> None:
    async def body() -> Summary:
        async with scripted({CHAT: echo, "/tokenize": hang}) as script:
            stop = Stop()
            task = asyncio.create_task(run(rows([0.0]), ReplayOptions(script.url, "m"), stop=stop))
            await asyncio.sleep(0.1)
            stop.press()
            stop.press()
            return await task

    summary = asyncio.run(body())
    assert (summary.sent, summary.is_interrupted, summary.started_at) == (0, True, None)


def test_nothing_to_send(simulator: str) -> None:
    summary = asyncio.run(run([], ReplayOptions(simulator, "simulated")))
    assert (summary.rows_read, summary.sent, summary.error_rate, summary.stopped_by) == (0, 0, None, None)


HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def test_a_file_to_a_report(simulator: str, tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(HEADER + "5,ChatGPT,40,3,43,API log\n5,ChatGPT,0,0,0,API log\n6,ChatGPT,50,2,52,API log\n")
    console = Console(file=io.StringIO(), width=200)
    options = ReplayOptions(simulator, "simulated", speed=10, json=tmp_path / "out.json", max_error_rate=0.0)
    summary = replay(trace, options, console=console)
    assert (summary.rows_read, summary.failed_in_source, summary.ok) == (3, 1, 2)
    assert msgspec.json.decode((tmp_path / "out.json").read_bytes(), type=Summary) == summary
    failed = judged(msgspec.structs.replace(summary, error_rate=0.1), options.limits())
    assert (summary.error_rate, failed.verdict) == (0.0, "missed" if summary.verdict == "good" else "invalid")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3 read, 1 failed in the trace and were not sent" in shown
    assert "100 % exact" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "t.csv"]

    quiet = Console(file=io.StringIO())
    replay(trace, replace(options, quiet=True, json=None), console=quiet)
    assert quiet.file.getvalue() == ""  # type: ignore[attr-defined]


def test_an_unsorted_file_names_the_row(simulator: str, tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(HEADER + "5,ChatGPT,40,3,43,API log\n4,ChatGPT,40,3,43,API log\n")
    with pytest.raises(ValueError, match=r"row 2: received_at: .*; sort the trace"):
        replay(trace, ReplayOptions(simulator, "simulated"), console=Console(file=io.StringIO()))


def test_ctrl_c_in_a_terminal(simulator: str, tmp_path: Path) -> None:
    """A real process and a real SIGINT: it stops, prints the report and ends by itself."""
    trace = tmp_path / "t.csv"
    trace.write_text(HEADER + "".join(f"{second},ChatGPT,40,3,43,API log\n" for second in range(600)))
    program = (
        "import sys; from pathlib import Path; from rich.console import Console; "
        "from replay.runner import ReplayOptions, replay; "
        "replay(Path(sys.argv[1]), ReplayOptions(sys.argv[2], 'simulated', speed=5.0, samples=Path(sys.argv[3])), "
        "console=Console(width=200))"
    )
    samples = tmp_path / "s"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(trace), simulator, str(samples)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            while not samples.exists():
                time.sleep(0.05)
                assert process.poll() is None
            time.sleep(1.0)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=15)
        finally:
            process.kill()
    assert process.returncode == 0, output
    assert "interrupted: the figures are of the part that was sent" in output
    assert "Traceback" not in output


def test_signals_do_afterwards_what_they_did_before(simulator: str, tmp_path: Path) -> None:
    """uvloop leaves handlers that do nothing, so that no Ctrl-C would end what comes after a replay."""
    trace = tmp_path / "t.csv"
    trace.write_text(HEADER + "0,ChatGPT,40,3,43,API log\n")
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    seen: list[int] = []
    try:
        signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins without
        replay(trace, ReplayOptions(simulator, "simulated", quiet=True), console=Console())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"no traces at {TRACES} (BURSTGATE_TRACES)")
def test_a_real_trace(simulator: str, tmp_path: Path) -> None:
    """BurstGPT_3's first 60 rows, 4,000 times as fast: lengths exact by the server's count."""
    options = ReplayOptions(simulator, "simulated", speed=4000, limit=60, samples=tmp_path / "s", quiet=True)
    summary = replay(TRACES / "BurstGPT_3_head.csv", options, console=Console())
    assert (summary.rows_read, summary.sent + summary.failed_in_source) == (60, 60)
    assert summary.ok == summary.sent
    assert (summary.prompts.exact_share, summary.outputs.exact_share) == (1.0, 1.0)
    assert summary.dispatch_lag_s is not None
    assert summary.dispatch_lag_s.p50 < 0.05


@pytest.fixture
def hourly(tmp_path: Path) -> Path:
    """12 rows, 10 s apart, of two models, then one an hour later."""
    lines = [f"{5 + 10 * n},,1,{'a' if n % 3 else 'b'},20,3,23,API log" for n in range(12)]
    lines.append("3715,,1,a,20,3,23,API log")
    path = tmp_path / "trace.csv"
    path.write_text("Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n")
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("options", "dues_s"),
    [
        ({}, [*range(0, 120, 10), 3710]),
        ({"speed": 10}, [*range(12), 371]),
        ({"limit": 3}, [0, 10, 20]),
        ({"source": SourceOptions(start_s=95, duration_s=20)}, [0, 10]),
        ({"source": SourceOptions(models=("b",))}, [0, 30, 60, 90]),
        ({"source": SourceOptions(models=("b",), passes=2)}, [0, 30, 60, 90, 120, 150, 180, 210]),
        ({"source": SourceOptions(idle_cap_s=60)}, [*range(0, 120, 10), 170]),
        ({"source": SourceOptions(idle_cap_s=60), "speed": 10, "limit": 13}, [*range(12), 17]),
        ({"arrivals": ArrivalOptions("constant", 4.0)}, [n / 4 for n in range(13)]),
    ],
)
def test_options_choose_rows_and_times(options: dict[str, Any], dues_s: list[float], hourly: Path) -> None:
    planned = list(plan_file(hourly, ReplayOptions("", "m", ties="keep", **options)))
    offset_s = planned[0].due_s if "arrivals" in options else 0.0  # a process begins with a gap
    assert [round(row.due_s - offset_s, 6) for row in planned] == dues_s
    assert planned == list(plan_file(hourly, ReplayOptions("", "m", ties="keep", **options)))


def test_arrivals_follow_the_seed(hourly: Path) -> None:
    arrivals = ArrivalOptions("gamma", 10.0, 0.25)
    dues_s = [[row.due_s for row in plan_file(hourly, ReplayOptions("", "m", arrivals=arrivals, seed=n))]
              for n in (0, 0, 1)]  # fmt: skip
    assert dues_s[0] == dues_s[1] != dues_s[2]
    assert all(times_s == sorted(times_s) and len(times_s) == 13 for times_s in dues_s)


def test_the_warm_up_is_sent_and_not_measured(simulator: str, hourly: Path, tmp_path: Path) -> None:
    options = ReplayOptions(
        simulator, "simulated", speed=100, limit=12, warmup_s=0.55, samples=tmp_path / "s", quiet=True
    )
    summary = replay(hourly, options, console=Console())
    samples = samples_of(tmp_path / "s")
    assert [sample.is_warmup for sample in sorted(samples, key=lambda sample: sample.index)] == [True] * 6 + [False] * 6
    assert (summary.warmup, summary.sent, summary.ok, summary.unsent) == (6, 6, 6, 0)
    assert (summary.prompts.known, summary.schedule_s, summary.rows_read) == (6, 1.1, 12)
    assert summary.offered_rps == pytest.approx(6 / 0.55)
    output = io.StringIO()
    Console(file=output, width=200).print(render(summary))
    assert "6 sent in the first 0.55 s and not measured" in output.getvalue()


def test_steady_schedule_does_not_drift(simulator: str, tmp_path: Path) -> None:
    """1,000 requests at 500 a second: the last is as punctual as the first; no lateness adds up."""
    options = ReplayOptions(simulator, "simulated", samples=tmp_path / "s")
    summary = asyncio.run(run(rows([n * 0.002 for n in range(1000)], 12, 2), options))
    assert summary.ok == 1000
    lags_s = sorted(s.dispatch_lag_s or 0 for s in samples_of(tmp_path / "s"))
    assert min(lags_s) >= 0
    assert lags_s[500] < 0.05


@pytest.mark.parametrize(
    ("accounted", "is_terminal", "outcome"),
    [
        (Accounted(content_chunks=1), True, Outcome.OK),
        (Accounted(content_chunks=1, finish_reason="stop"), False, Outcome.OK),  # servers that never say [DONE]
        (Accounted(content_chunks=1), False, Outcome.TRUNCATED),
        (Accounted(), False, Outcome.TRUNCATED),
        (Accounted(usage=Usage(1, 1)), True, Outcome.OK),  # a whole answer of no visible text
    ],
)
def test_the_end_of_a_stream(accounted: Accounted, is_terminal: bool, outcome: Outcome) -> None:
    assert outcome_of(200, accounted, is_stream=True, is_terminal=is_terminal)[0] is outcome


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1722ac82-0a46", b"1722ac82-0a46"),
        ("a b:c%/?", b"a b:c%/?"),
        ("a\r\nb\x00", b"a%0D%0Ab%00"),
        ("\u8a9e\ud800", b"%E8%AA%9E?"),  # a lone surrogate is no text
        ("  ", b""),
    ],
)
def test_header_values(text: str, value: bytes) -> None:
    assert header_value(text) == value


def test_an_endless_answer_to_a_question_is_no_answer() -> None:
    async def endless(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(2 * MAX_ANSWER_BYTES // 65536):
            writer.write(b"x" * 65536)
            await writer.drain()
        raise ConnectionError

    summary, _ = replayed({CHAT: echo, "/v1/models": endless}, rows([0.0]))
    assert summary.ok == 1
