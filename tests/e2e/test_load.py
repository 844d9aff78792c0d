"""Many at once: 2,000 streams through one worker, 500 clients that leave, two workers of which one dies."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections import Counter
from pathlib import Path

import httpx

from storage.counters import read_counters
from storage.journal import is_writer_alive, writer_directories
from storage.query import Filter
from tests.e2e.harness import Installation, Simulator, wait_until
from tests.e2e.load import MODEL, Answer, Ask, Load, assert_recorded, fetch, raise_descriptor_limit, send_request
from traces.record import LogType, Outcome, TokenSource

STREAMS = 2_000
LEAVERS = 500
ROOMY = (
    *("--max-num-seqs", "4096", "--max-batched-tokens", "200000", "--kv-capacity-tokens", "4000000"),
    *("--prefill-tokens-per-s", "1e9", "--step-per-seq-s", "0"),
)
"""A simulator whose step lasts as long as it is told, whatever is in it."""


def _in_flight(installation: Installation) -> int:
    in_flight: int = httpx.get(f"{installation.control_url}/api/v1/status", timeout=30.0).json()["in_flight"]
    return in_flight


def _metric(installation: Installation, name: str) -> float:
    text = httpx.get(f"{installation.control_url}/metrics", timeout=30.0).text
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


def test_2000_streams_at_once_through_one_worker(tmp_path: Path) -> None:
    raise_descriptor_limit(STREAMS + 512)
    with (
        Simulator(*ROOMY, "--step-base-s", "1.0") as simulator,
        Installation(simulator.url, data_dir=tmp_path / "data") as installation,
    ):

        async def all_at_once() -> list[Answer]:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(fetch(installation.gateway_url, Ask(f"stream-{n}", True, 12 + n % 5)))
                    for n in range(STREAMS)
                ]
                await asyncio.to_thread(
                    wait_until, lambda: _in_flight(installation) == STREAMS, 30.0, f"{STREAMS} in flight"
                )
                assert await asyncio.to_thread(_metric, installation, "burstgate_requests_in_flight") == STREAMS
                await asyncio.to_thread(
                    wait_until, lambda: simulator.stats().in_flight == STREAMS, 30.0, f"{STREAMS} in the simulator"
                )
            return [task.result() for task in running]

        answers = asyncio.run(all_at_once())
        assert all(answer.is_whole and answer.status == 200 for answer in answers)
        rows = installation.wait_rows(STREAMS)
        assert_recorded(answers, rows, rows[0].request_tokens or 0)
        assert {row.token_source for row in rows} == {TokenSource.USAGE}
        stats = simulator.stats()
        assert (stats.in_flight, stats.aborted, stats.finished) == (0, 0, STREAMS)
        assert _in_flight(installation) == 0
        assert installation.doctor()["accounting"].is_ok


def test_500_clients_that_leave_free_the_gpu_at_once(tmp_path: Path) -> None:
    """Half leave in the middle of a stream, half while they wait for a plain answer; 50 more while they send."""
    raise_descriptor_limit(LEAVERS + 512)
    with (
        Simulator(*ROOMY, "--step-base-s", "0.5") as simulator,
        Installation(simulator.url, data_dir=tmp_path / "data") as installation,
    ):

        async def come_and_leave() -> None:
            opened = await asyncio.gather(
                *(send_request(installation.gateway_url, Ask(f"stream-{n}", True, 2_000)) for n in range(LEAVERS // 2)),
                *(send_request(installation.gateway_url, Ask(f"plain-{n}", False, 2_000)) for n in range(LEAVERS // 2)),
                *(
                    send_request(installation.gateway_url, Ask(f"half-{n}", False, 2_000), cut_bytes=40)
                    for n in range(50)
                ),
            )
            await asyncio.gather(*(reader.readuntil(b"data: ") for reader, _ in opened[: LEAVERS // 2]))
            await asyncio.to_thread(wait_until, lambda: simulator.stats().in_flight == LEAVERS, 20.0, "all in flight")
            for _, writer in opened:
                writer.transport.abort()

        asyncio.run(come_and_leave())
        wait_until(lambda: simulator.stats().aborted == LEAVERS, 3.0, f"{LEAVERS} aborts at the simulator")
        assert simulator.stats().in_flight == 0
        wait_until(lambda: _in_flight(installation) == 0, 3.0, "nothing in flight in the gateway")
        rows = installation.wait_rows(LEAVERS + 50)
        assert {row.outcome for row in rows} == {Outcome.CLIENT_GONE}
        assert len({row.client_request_id for row in rows}) == LEAVERS + 50
        seen = Counter((row.stream, row.response_tokens is not None, row.upstream is not None) for row in rows)
        assert seen == {
            (True, True, True): LEAVERS // 2,  # the tokens that came are counted
            (False, False, True): LEAVERS // 2,
            (False, False, False): 50,  # never sent on
        }
        assert installation.doctor()["accounting"].is_ok


def test_two_workers_share_the_load_and_one_that_dies_is_replaced(tmp_path: Path) -> None:
    with (
        Simulator("--step-base-s", "0.002") as simulator,
        Installation(simulator.url, data_dir=tmp_path / "data", workers=2) as installation,
    ):
        load = Load(lambda: installation.gateway_url, clients=32, seed=3)

        def kill_one() -> None:
            old = installation.pids("worker")
            assert len(old) == 2
            os.kill(old[0], signal.SIGKILL)
            wait_until(lambda: len(set(installation.pids("worker")) | set(old)) == 3, 10.0, "another worker")
            wait_until(lambda: _both_serve(installation), 20.0, "requests in both workers again")

        async def run() -> None:
            async with load.running():
                await asyncio.to_thread(wait_until, lambda: _both_serve(installation), 10.0, "requests in both workers")
                await asyncio.to_thread(kill_one)

        asyncio.run(run())
        installation.stop()
        rows = installation.rows()
        request_tokens = next(row.request_tokens for row in rows if row.outcome is Outcome.OK)
        assert_recorded(load.answers, rows, request_tokens or 0)
        accounting = installation.doctor()["accounting"]
        assert accounting.is_ok, accounting.detail
        assert installation.output.count("ended with status -9; starting it again") == 1


def _both_serve(installation: Installation) -> bool:
    """Two workers live, and each has accepted requests."""
    living = [each for each in writer_directories(installation.data_dir / "journal") if is_writer_alive(each)]
    accepted = [read_counters(directory / "counters")["accepted"] for directory in living]
    return len(accepted) == 2 and all(accepted)


def test_a_conversation_stays_one_across_workers(tmp_path: Path) -> None:
    """Each turn comes on a connection of its own, so that the kernel deals it to either worker."""
    conversations, turns = 8, 4
    with (
        Simulator("--fast") as simulator,
        Installation(simulator.url, data_dir=tmp_path / "data", workers=2) as installation,
    ):
        url = f"{installation.gateway_url}/v1/chat/completions"
        for number in range(conversations):
            messages = [{"role": "user", "content": f"conversation {number} begins"}]
            for turn in range(turns):
                answer = httpx.post(
                    url,
                    json={"model": MODEL, "messages": messages, "max_tokens": 9},
                    headers={"x-request-id": f"{number}-{turn}"},
                ).raise_for_status()
                messages.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"]})
                messages.append({"role": "user", "content": f"and then {turn}?"})
        assert _both_serve(installation), "one worker had every turn: nothing was shown"
        installation.wait_rows(conversations * turns)
        rows = {row.client_request_id: row for row in installation.rows(Filter())}
    sessions = set()
    for number in range(conversations):
        talk = [rows[f"{number}-{turn}"] for turn in range(turns)]
        assert {row.session_id for row in talk} == {talk[0].request_id}
        assert {row.log_type for row in talk} == {LogType.CONVERSATION}
        assert all(a.received_at < b.received_at for a, b in itertools.pairwise(talk))
        sessions.add(talk[0].session_id)
    assert len(sessions) == conversations
