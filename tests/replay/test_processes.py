"""Several sender processes, judged by the server that they send to."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from replay.arrivals import ArrivalOptions
from replay.client import ReplayError
from replay.metrics import Summary
from replay.options import ReplayOptions, Shard, plan_file
from replay.runner import process_count, replay
from replay.source import SourceOptions
from replay.verdict import exit_status
from tests.replay.test_runner import (
    CHAT,
    END,
    STREAM_HEAD,
    Answer,
    Script,
    Seen,
    content,
    echo,
    raw,
    samples_of,
    scripted,
    status,
    usage,
    words_of,
)

ROOT = Path(__file__).parents[2]
HEADER = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


async def tokenize(seen: Seen, writer: asyncio.StreamWriter) -> None:
    await status(200, b'{"count":%d,"max_model_len":9000}' % (words_of(seen) + 5))(seen, writer)


async def counted(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """A whole answer, by the same count as `tokenize`."""
    asked = msgspec.json.decode(seen.body)["max_tokens"]
    writer.write(STREAM_HEAD + content() + usage(words_of(seen) + 5, asked) + END)


@contextmanager
def running(routes: dict[str, Answer]) -> Iterator[Script]:
    """The scripted server in a thread, so that `replay` can have the main one."""
    started, stopped = threading.Event(), threading.Event()
    found: list[Script] = []

    async def serve() -> None:
        async with scripted(routes) as script:
            found.append(script)
            started.set()
            while not stopped.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait()
    try:
        yield found[0]
    finally:
        stopped.set()
        thread.join()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """240 rows in 8 s, a third of them without a session, one failed and one without tokens."""
    lines = [
        f"{n // 30},{f's{n % 17}' if n % 3 else ''},1,m,{20 + n % 9},{3 + n % 4},{23 + n % 9 + n % 4},API log"
        for n in range(240)
    ]
    lines[100] = "3,s1,0,m,0,0,0,API log"
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "\n".join(lines) + "\n")
    return path


def index_of(seen: Seen) -> int:
    return int(seen.headers["x-request-id"].rsplit("-", 1)[1])


def sent(trace: Path, options: ReplayOptions, routes: dict[str, Answer] | None = None) -> tuple[Summary, Script]:
    with running({CHAT: counted, "/tokenize": tokenize, **(routes or {})}) as script:
        chosen = replace(options, target=script.url)
        return replay(trace, chosen, console=Console(file=io.StringIO())), script


def test_arrivals_follow_the_schedule_and_each_row_comes_once(trace: Path, tmp_path: Path) -> None:
    one, three = (bodies_judged(trace, tmp_path, processes) for processes in (1, 3))
    assert one == three


def bodies_judged(trace: Path, tmp_path: Path, processes: int) -> dict[int, bytes]:
    """The bodies by row, after a look at all else."""
    options = ReplayOptions("", "m", speed=4.0, processes=processes, samples=tmp_path / "s", run_id="r")
    summary, script = sent(trace, options)
    zero_s = time.monotonic() - (time.time() - (summary.started_at or 0.0))
    planned = {row.index: row for row in plan_file(trace, options) if row.is_sendable}
    seen = script.of(CHAT)
    assert sorted(map(index_of, seen)) == sorted(planned)
    assert (summary.rows_read, summary.failed_in_source, summary.sent, summary.ok) == (240, 1, 239, 239)
    assert (summary.unsent, summary.lost, summary.prompt_method, summary.max_model_len) == (0, 0, "tokenize", 9000)
    assert summary.prompts.exact_share == 1.0
    late_s = sorted(each.at_s - zero_s - planned[index_of(each)].due_s for each in seen)
    assert late_s[0] > -0.002
    assert late_s[120] < 0.2
    for each in seen:
        row = planned[index_of(each)]
        assert each.headers.get("x-session-id") == row.session_id
        assert msgspec.json.decode(each.body)["max_tokens"] == row.response_tokens
    assert sorted(sample.index for sample in samples_of(tmp_path / "s")) == sorted(planned)
    assert len({facts.name for facts in summary.senders}) == len(summary.senders) == processes
    assert sum(facts.sent for facts in summary.senders) == 239
    assert len(script.of("/v1/models")) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("s", "t.csv")] == []
    return {index_of(each): each.body for each in seen}


def test_shards_started_at_one_time_are_the_whole(trace: Path, tmp_path: Path) -> None:
    """As the pods of a Kubernetes Job: each its shard, one of them with two processes; the zero is agreed before."""
    start_at_s = time.time() + 2.0
    options = [
        ReplayOptions("", "m", speed=8.0, shard=Shard(n, 2), processes=n + 1, samples=tmp_path / f"{n}", run_id="r")
        for n in range(2)
    ]
    with running({CHAT: counted, "/tokenize": tokenize}) as script, ThreadPoolExecutor() as pods:
        chosen = [replace(each, target=script.url, start_at_s=start_at_s, quiet=True) for each in options]
        ended = pods.map(lambda each: replay(trace, each, console=Console()), chosen)
        assert [(each.started_at, each.shard) for each in ended] == [(start_at_s, "0/2"), (start_at_s, "1/2")]
    zero_s = time.monotonic() - (time.time() - start_at_s)
    planned = {row.index: row for row in plan_file(trace, options[0]) if row.is_sendable}
    assert sorted(map(index_of, script.of(CHAT))) == sorted(planned)
    samples = {sample.index: sample for n in "01" for sample in samples_of(tmp_path / n)}
    assert sorted(samples) == sorted(planned)
    for seen in script.of(CHAT):
        sample = samples[index_of(seen)]
        assert sample.due_s == planned[sample.index].due_s
        assert seen.at_s - zero_s > sample.due_s - 0.01
        assert sample.sent_s is not None
    far_s = sorted(abs(seen.at_s - zero_s - (samples[index_of(seen)].sent_s or 0.0)) for seen in script.of(CHAT))
    assert far_s[120] < 0.1  # what each pod says of itself is true on the one clock


def children() -> list[int]:
    """Of this process."""
    found: list[int] = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that ends meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


def is_sender(pid: int) -> bool:
    return b"replay.processes" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_killed_sender_is_lost_and_the_others_go_on(trace: Path, tmp_path: Path) -> None:
    def kill_one(script: Script) -> None:
        while len(script.of(CHAT)) < 60:
            time.sleep(0.01)
        os.kill(next(filter(is_sender, children())), signal.SIGKILL)

    with running({CHAT: counted, "/tokenize": tokenize}) as script:
        killer = threading.Thread(target=kill_one, args=(script,))
        killer.start()
        output = io.StringIO()
        options = ReplayOptions(script.url, "m", speed=4.0, processes=2, samples=tmp_path / "s", json=tmp_path / "j")
        summary = replay(trace, options, console=Console(file=output, width=200))
        killer.join()
    (lost,) = [sender.lost for sender in summary.senders if sender.lost is not None]
    assert "was killed by signal 9" in lost
    assert (summary.rows_read, summary.failed_in_source, summary.is_interrupted) == (240, 1, False)
    assert summary.lost > 60
    assert summary.sent + summary.lost == 239
    assert summary.unsent == 0
    assert len(samples_of(tmp_path / "s")) == summary.sent
    assert msgspec.json.decode((tmp_path / "j").read_bytes(), type=Summary) == summary
    assert f"{summary.lost:,} rows of lost senders have no sample" in " ".join(output.getvalue().split())
    assert (summary.verdict, exit_status(summary)) == ("invalid", 3)
    assert not list(filter(is_sender, children()))


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_drains_the_children_and_writes_everything(trace: Path, tmp_path: Path, presses: int) -> None:
    """SIGINT to the whole group, as a terminal sends it, with slow answers in flight."""
    slow = raw(0.7 if presses == 1 else 30.0, STREAM_HEAD, content(), usage(20, 3), END, close=False)
    program = (
        "import sys; from pathlib import Path; from rich.console import Console; "
        "from replay.runner import ReplayOptions, replay; "
        "replay(Path(sys.argv[1]), ReplayOptions(sys.argv[2], 'm', processes=2, samples=Path(sys.argv[3])), "
        "console=Console(width=200))"
    )
    samples = tmp_path / "s"
    with (
        running({CHAT: slow, "/tokenize": tokenize}) as script,
        subprocess.Popen(
            [sys.executable, "-c", program, str(trace), script.url, str(samples)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        ) as process,
    ):
        try:
            while len(script.of(CHAT)) < 20:
                time.sleep(0.02)
                assert process.poll() is None
            for _ in range(presses):
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(0.2)
            output, _ = process.communicate(timeout=8)
        finally:
            process.kill()
    assert process.returncode == 0, output
    assert "interrupted: the figures are of the part that was sent" in output
    assert "Traceback" not in output
    found = samples_of(samples)
    assert sorted(sample.index for sample in found) == sorted(map(index_of, script.of(CHAT)))
    assert {sample.outcome.value for sample in found} == ({"ok"} if presses == 1 else {"client_gone"})
    assert presses == 1 or {sample.failure_class for sample in found} == {"cancelled"}


def test_children_end_with_their_coordinator(trace: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from rich.console import Console; "
        "from replay.runner import ReplayOptions, replay; "
        "replay(Path(sys.argv[1]), ReplayOptions(sys.argv[2], 'm', processes=2), console=Console(width=200))"
    )
    with running({CHAT: counted, "/tokenize": tokenize}) as script:
        process = subprocess.Popen([sys.executable, "-c", program, str(trace), script.url], cwd=ROOT)
        try:
            while len(script.of(CHAT)) < 5:
                time.sleep(0.02)
                assert process.poll() is None
            senders = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
            assert len(senders) == 2
        finally:
            process.kill()
            process.wait()
        deadline_s = time.monotonic() + 10
        while any(Path(f"/proc/{pid}/status").exists() and "zombie" not in status_of(pid) for pid in senders):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def status_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "zombie"


def test_max_in_flight_is_shared(trace: Path) -> None:
    slow = raw(0.05, STREAM_HEAD, content(), usage(20, 3), END, close=False)
    options = ReplayOptions("", "m", speed=100.0, limit=60, processes=2, max_in_flight=5)
    summary, _ = sent(trace, options, {CHAT: slow})
    assert summary.ok == 60
    assert 2 <= summary.in_flight_max <= 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": Path("/nonexistent/s")}, "samples file /nonexistent/s: No such file"),
        ({"start_at_s": 5.0}, "start at: expected a time within the next 24 hours"),
        ({"format": "parquet"}, "expected"),
    ],
)
def test_what_cannot_start_says_why(trace: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((ReplayError, ValueError), match=message):
        sent(trace, ReplayOptions("", "m", processes=2, **change))


def test_a_trace_that_is_wrong_further_down_ends_before_the_first_send(trace: Path) -> None:
    with trace.open("a") as file:
        file.write("2,s1,0,m,5,5,10,API log\n")
    with running({CHAT: counted, "/tokenize": tokenize}) as script:
        with pytest.raises(ValueError, match="row 241: received_at"):
            replay(trace, ReplayOptions(script.url, "m", processes=2), console=Console(file=io.StringIO()))
        assert script.of(CHAT) == []


def test_several_senders_need_a_file_that_can_be_read_again(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ReplayError, match=r"pipe: expected a regular file, which each sender reads by itself"):
        replay(pipe, ReplayOptions("http://127.0.0.1:9", "m", processes=2), console=Console())


def test_without_a_tokenizer_each_sender_learns_from_its_own_answers(trace: Path) -> None:
    summary, _ = sent(trace, ReplayOptions("", "m", speed=8.0, processes=2), {CHAT: echo, "/tokenize": status(404)})
    assert (summary.ok, summary.prompt_method, summary.prompts.known) == (239, "usage", 239)


PROCESSES: list[tuple[Callable[[], ReplayOptions], int, int]] = [
    (lambda: ReplayOptions("", "m"), 16, 1),  # the rate is in the trace, unread
    (lambda: ReplayOptions("", "m", processes=3), 2, 3),
    (lambda: ReplayOptions("", "m", arrivals=ArrivalOptions("poisson", 900.0)), 16, 1),
    (lambda: ReplayOptions("", "m", arrivals=ArrivalOptions("poisson", 2500.0)), 16, 3),
    (lambda: ReplayOptions("", "m", arrivals=ArrivalOptions("poisson", 2500.0)), 2, 1),
    (lambda: ReplayOptions("", "m", arrivals=ArrivalOptions("poisson", 2500.0), max_in_flight=2), 16, 2),
    (lambda: ReplayOptions("", "m", source=SourceOptions(target_rps=1500.0)), 4, 2),
]


@pytest.mark.parametrize(("options", "cores", "count"), PROCESSES)
def test_the_number_of_processes(options: Callable[[], ReplayOptions], cores: int, count: int) -> None:
    assert process_count(options(), cores) == count
