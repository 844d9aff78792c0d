"""Shaping in a gateway: held, let go and refused over real sockets, with a real Redis where one is installed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy import shared_limits
from proxy.pacing import cv_of
from proxy.settings import KeySettings, PacingSettings, RuleSettings, Settings, ShapingSettings
from proxy.shaper import Shaper, read_pattern
from proxy.shaping import Ticket
from proxy.telemetry import WORKER_COUNTERS, ShapingMetrics, WorkerMetrics
from storage.counters import slot_count
from storage.journal import JOURNAL_COUNTERS
from storage.key_file import CachedKey, KeyLimits, key_file, key_hash, write_key_file
from tests.proxy.harness import (
    JSON,
    Bench,
    Client,
    Talk,
    Upstream,
    chat_answer,
    chat_body,
    closed_port,
    in_loop,
    plain,
    running,
    until,
)
from traces.record import Outcome

BODY = chat_body("hi", max_tokens=10)
NAMES = JOURNAL_COUNTERS + WORKER_COUNTERS


def shaped(*rules: dict[str, Any], **fields: Any) -> ShapingSettings:
    return ShapingSettings(rules=tuple(RuleSettings(**each) for each in rules), **fields)


def client(tenant: str | None = None) -> Client:
    more = [] if tenant is None else [(b"x-tenant", tenant.encode())]
    return Client(BODY, headers=[JSON, *more])


@contextlib.asynccontextmanager
async def shaping(folder: Path, *urls: str, runs: bool = False, **settings: Any) -> AsyncIterator[Bench]:
    """A gateway; `runs`: with the task that leases from Redis."""
    async with running(folder, *urls, **settings) as bench:
        chore = asyncio.create_task(bench.gateway.shaping.run()) if runs else None
        try:
            yield bench
        finally:
            if chore is not None:
                chore.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await chore


class Gate:
    """An upstream's script that answers when it is told to."""

    def __init__(self) -> None:
        self.waiting = 0
        self._opened = asyncio.Event()

    async def __call__(self, talk: Talk) -> None:
        self.waiting += 1
        await self._opened.wait()
        self.waiting -= 1
        await talk.answer(chat_answer())

    def open(self) -> None:
        self._opened.set()


@in_loop
async def test_over_the_limit_is_429_with_retry_after_at_once(tmp_path: Path) -> None:
    rule = {"name": "few", "requests_per_s": 0.1, "burst": 1, "queue": 0}
    async with (
        Upstream(plain(chat_answer())) as upstream,
        shaping(tmp_path, upstream.url, shaping=shaped(rule)) as bench,
    ):
        first = await bench.serve(client())
        for _ in range(5):
            second = await bench.serve(client())
        records = bench.records()
        assert (bench.counter("shaping_rejected"), bench.counter("shaping_held")) == (5, 0)
    assert (first.status, second.status) == (200, 429)
    assert second.values(b"retry-after") == [b"10"]
    assert second.error["code"] == second.error["type"] == "rate_limit_exceeded"
    assert "rule 'few'" in second.error["message"]
    assert len(upstream.requests) == 1
    refused = records[1]
    assert (refused.outcome, refused.status, refused.error_type) == (Outcome.REJECTED, 429, "rate_limit_exceeded")
    assert (refused.shaping_rule, refused.shaping_class, refused.queue_s) == ("few", None, 0.0)
    assert (records[0].shaping_rule, records[0].queue_s) == (None, 0.0)
    assert refused.upstream is None
    # The gateway's own time, of the fastest of five on a machine that does other things, too.
    assert min(each.elapsed_s or 1 for each in records[1:]) < 0.001


@in_loop
async def test_held_requests_go_in_turn_and_say_how_long_they_waited(tmp_path: Path) -> None:
    gate = Gate()
    rule = {"name": "one", "per": "tenant", "concurrency": 1}
    async with (
        Upstream(gate) as upstream,
        shaping(tmp_path, upstream.url, shaping=shaped(rule, tenant_header="x-tenant")) as bench,
    ):
        tasks = [bench.start(client("acme")) for _ in range(3)]
        other = bench.start(client("other"))
        await until(lambda: gate.waiting == 2, "one of each tenant at the upstream")
        assert bench.counter("shaping_waiting") == 2
        await asyncio.sleep(0.05)
        gate.open()
        clients = await asyncio.gather(*tasks, other)
        records = bench.records()
        assert (bench.counter("shaping_waiting"), bench.counter("shaping_held")) == (0, 2)
        assert bench.counter("shaping_wait_sum_us") > 90_000
    assert [each.status for each in clients] == [200] * 4
    held = [each for each in records if each.shaping_rule is not None]
    assert [(each.shaping_rule, each.shaping_class, each.tenant) for each in held] == [("one", "acme", "acme")] * 2
    assert all((each.queue_s or 0) > 0.045 for each in held)
    assert all(each.outcome is Outcome.OK for each in records)


@in_loop
async def test_a_client_that_leaves_while_it_is_held_frees_its_place(tmp_path: Path) -> None:
    gate = Gate()
    rule = {"name": "one", "concurrency": 1, "queue": 1}
    async with Upstream(gate) as upstream, shaping(tmp_path, upstream.url, shaping=shaped(rule)) as bench:
        first = bench.start(client())
        await until(lambda: gate.waiting == 1, "the first at the upstream")
        leaving = client()
        gone = bench.start(leaving)
        await until(lambda: bench.counter("shaping_waiting") == 1, "the second held")
        leaving.has_left.set()
        await gone
        assert bench.counter("shaping_waiting") == 0
        third = bench.start(client())
        await until(lambda: bench.counter("shaping_waiting") == 1, "the third held")
        gate.open()
        assert ((await first).status, (await third).status) == (200, 200)
        records = bench.records()
    assert [each.outcome for each in records] == [Outcome.CLIENT_GONE, Outcome.OK, Outcome.OK]
    assert records[0].shaping_rule == "one"
    assert len(upstream.requests) == 2


@in_loop
async def test_waiting_too_long_is_429(tmp_path: Path) -> None:
    gate = Gate()
    rule = {"name": "one", "concurrency": 1, "max_wait_s": 0.1}
    async with Upstream(gate) as upstream, shaping(tmp_path, upstream.url, shaping=shaped(rule)) as bench:
        first = bench.start(client())
        await until(lambda: gate.waiting == 1, "the first at the upstream")
        second = await bench.serve(client())
        gate.open()
        await first
        record = bench.records()[0]
    assert (second.status, second.values(b"retry-after")) == (429, [b"1"])
    assert "max_wait_s" in second.error["message"]
    assert record.queue_s == pytest.approx(0.1, abs=0.08)


@in_loop
async def test_settings_change_and_the_queue_stays(tmp_path: Path) -> None:
    gate = Gate()
    async with (
        Upstream(gate) as upstream,
        shaping(tmp_path, upstream.url, shaping=shaped({"name": "one", "concurrency": 1})) as bench,
    ):
        tasks = [bench.start(client()) for _ in range(4)]
        await until(lambda: gate.waiting == 1, "one at the upstream")
        for settings, count in ((shaped({"name": "one", "concurrency": 3}), 3), (ShapingSettings(), 4)):
            bench.gateway.apply(bench.gateway.settings.model_copy(update={"shaping": settings}))
            await until(lambda count=count: gate.waiting == count, f"{count} at the upstream")  # type: ignore[misc]
        assert bench.gateway.shaper is None
        gate.open()
        assert {each.status for each in await asyncio.gather(*tasks)} == {200}
        bench.records()


@in_loop
async def test_a_stop_ends_those_who_are_held_with_a_record(tmp_path: Path) -> None:
    gate = Gate()
    async with (
        Upstream(gate) as upstream,
        shaping(tmp_path, upstream.url, shaping=shaped({"name": "one", "concurrency": 1})) as bench,
    ):
        tasks = [bench.start(client()) for _ in range(2)]
        await until(lambda: bench.counter("shaping_waiting") == 1, "the second held")
        bench.gateway.stop()
        await asyncio.gather(*tasks)
        records = bench.records()
    assert [each.outcome for each in records] == [Outcome.GATEWAY_CRASH] * 2


@in_loop
async def test_a_keys_limits_hold_without_any_rule(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s" * 32)
    keys = [CachedKey(f"key_{name}", name, key_hash(b"s" * 32, b"bg-" + name.encode()), tenant="t",
                      limits=KeyLimits(concurrency=1) if name == "few" else KeyLimits())
            for name in ("few", "many")]  # fmt: skip
    write_key_file(key_file(tmp_path), keys)

    def ask(name: str) -> Client:
        return Client(BODY, headers=[JSON, (b"Authorization", b"Bearer bg-" + name.encode())])

    gate = Gate()
    settings = KeySettings(secret_file=tmp_path / "secret")
    async with Upstream(gate) as upstream, shaping(tmp_path, upstream.url, keys=settings) as bench:
        tasks = [bench.start(ask(name)) for name in ("few", "many", "few", "many")]
        await until(lambda: gate.waiting == 3 and bench.counter("shaping_waiting") == 1, "one of few's is held")
        gate.open()
        assert {each.status for each in await asyncio.gather(*tasks)} == {200}
        rows = [(each.shaping_rule, each.shaping_class, (each.queue_s or 0) > 0) for each in bench.records()]
        assert sorted(rows, key=str) == [("key", "key_few", True), *[(None, None, False)] * 3]
        assert [(each.name, each.held) for each in bench.gateway.shaping.view().rules] == [("key", 1)]
        bench.gateway.take_keys([msgspec.structs.replace(key, limits=KeyLimits()) for key in keys])
        assert bench.gateway.shaper is None  # nobody is asked any more


@in_loop
async def test_get_is_not_shaped(tmp_path: Path) -> None:
    rule = {"name": "none", "requests_per_s": 0.001, "burst": 1, "queue": 0}
    async with Upstream(plain()) as upstream, shaping(tmp_path, upstream.url, shaping=shaped(rule)) as bench:
        for _ in range(3):
            assert (await bench.serve(Client(method="GET", path="/health"))).status == 200
        assert {each.queue_s for each in bench.records()} == {None}


@in_loop
async def test_a_rate_is_reached_within_3_percent(tmp_path: Path) -> None:
    rule = {"name": "rate", "requests_per_s": 100, "burst": 10, "max_wait_s": 60}
    async with (
        Upstream(plain(chat_answer())) as upstream,
        shaping(tmp_path, upstream.url, shaping=shaped(rule)) as bench,
    ):
        await asyncio.gather(*(bench.serve(client()) for _ in range(201)))
        left_s = sorted(each.received_at + (each.queue_s or 0) for each in bench.records())
    # Ten leave at once; what holds one of the others up later is made good by the next.
    assert 191 / (left_s[-1] - left_s[0]) == pytest.approx(100, rel=0.03)


@in_loop
async def test_paced_requests_leave_evenly(tmp_path: Path) -> None:
    pacing = PacingSettings(mode="smooth", peak_rps=100, delay_budget_s=30)
    async with (
        Upstream(plain(chat_answer())) as upstream,
        shaping(tmp_path, upstream.url, shaping=ShapingSettings(pacing=pacing)) as bench,
    ):
        await asyncio.gather(*(bench.serve(client()) for _ in range(150)))
        records = bench.records()
        view = bench.gateway.shaping.view()
    left_s = sorted(each.received_at + (each.queue_s or 0) for each in records)
    assert 149 / (left_s[-1] - left_s[0]) == pytest.approx(100, rel=0.03)
    assert {each.shaping_rule for each in records} == {"pacing"}
    assert view.pacing is not None
    assert view.pacing.achieved_cv is not None
    assert view.pacing.mean_delay_s == pytest.approx(0.75, abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cv_in", "pacing"), [(1.0, {"mode": "smooth", "cv": 0.5}), (0.5, {"mode": "retime", "shape": 1.0})]
)
def test_cv_is_reached(tmp_path: Path, cv_in: float, pacing: dict[str, Any]) -> None:
    """50 s of 100 requests/s, in ten parts, of which the median counts: a machine that stalls spoils some of them.

    The sampling error of a part's CV is 3 to 4.5 %, of their median about 1.5 %.
    """
    draws, count = random.Random(7), 5000

    async def run() -> list[float]:
        settings = ShapingSettings(pacing=PacingSettings(delay_budget_s=2, seed=11, **pacing))
        async with (
            Upstream(plain(chat_answer())) as upstream,
            shaping(tmp_path, upstream.url, shaping=settings) as bench,
        ):
            async with asyncio.TaskGroup() as tasks:
                due_s = time.monotonic()
                for _ in range(count):
                    due_s += draws.gammavariate(1 / cv_in**2, cv_in**2) / 100
                    await asyncio.sleep(due_s - time.monotonic())
                    tasks.create_task(bench.serve(client()))
            return sorted(each.received_at + (each.queue_s or 0) for each in bench.records())

    left_s = asyncio.run(run())
    gaps_s = [after - before for before, after in itertools.pairwise(left_s[200:-200])]
    parts = [gaps_s[first : first + 460] for first in range(0, 4600, 460)]
    found = statistics.median(map(cv_of, parts))
    assert found == pytest.approx(pacing.get("cv", 1.0), rel=0.06)
    assert len(gaps_s) / sum(gaps_s) == pytest.approx(100, rel=0.05)


@in_loop
async def test_a_defect_in_shaping_lets_requests_through(tmp_path: Path) -> None:
    gate = Gate()
    async with (
        Upstream(gate) as upstream,
        shaping(tmp_path, upstream.url, shaping=shaped({"name": "one", "concurrency": 1})) as bench,
    ):
        tasks = [bench.start(client()) for _ in range(2)]
        await until(lambda: bench.counter("shaping_waiting") == 1, "the second held")
        core: Any = bench.gateway.shaping
        core._core._wakes.append((0.0, 0, None))  # what no code puts there
        tasks.append(bench.start(client()))
        await until(lambda: gate.waiting == 3, "all at the upstream")
        gate.open()
        assert {each.status for each in await asyncio.gather(*tasks)} == {200}
        assert bench.counter("accounting_errors") >= 1


def test_the_view_reaches_the_metrics(tmp_path: Path) -> None:
    metrics = WorkerMetrics(memoryview(bytearray(8 * slot_count(NAMES))).cast("Q"))
    settings = Settings(shaping=shaped({"name": "one", "concurrency": "adaptive"}))

    async def view() -> bytes:
        shaper = Shaper(settings, lambda: metrics)
        assert shaper.enter(Ticket(time.monotonic_ns(), 5))
        return msgspec.json.encode(shaper.view())

    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "shaping.json").write_bytes(asyncio.run(view()))
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "shaping.json").write_bytes(b"{")
    shown = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in ShapingMetrics(tmp_path).collect()
        for sample in metric.samples
    }
    assert shown["burstgate_shaping_rule_rejected_total", "one"] == 0
    assert shown["burstgate_shaping_rule_held_total", "one"] == 0


def test_patterns_are_read_from_traces(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    path.write_text(header + "".join(f"{at},,1,m,1,1,2,API log\n" for at in (1, 1, 5, 9)))
    gaps = read_pattern(path, seed=1)
    assert len(gaps) == 3
    assert 7 < sum(gaps) < 9  # ties lie anywhere in their second
    path.write_text(header + "1,,1,m,1,1,2,API log\n")
    with pytest.raises(ValueError, match="two arrivals"):
        read_pattern(path, seed=1)


# Redis ----------------------------------------------------------------------------------------------------------------


class Redis:
    """A server of our own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = closed_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program is not None
        self._process = subprocess.Popen(
            [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + 10
        while subprocess.run(["redis-cli", "-p", str(self.port), "ping"], capture_output=True).stdout != b"PONG\n":
            assert time.monotonic() < deadline_s
            time.sleep(0.02)

    def keys(self, pattern: str) -> list[str]:
        argv = ["redis-cli", "-p", str(self.port), "keys", pattern]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()

    def calls(self, command: str) -> int:
        argv = ["redis-cli", "-p", str(self.port), "info", "commandstats"]
        lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
        found = [line for line in lines if line.startswith(f"cmdstat_{command}:")]
        return int(found[0].split("calls=")[1].split(",")[0]) if found else 0

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    pytest.importorskip("redis", reason="needs the extra `redis`")
    # Of a server that is there, on a machine that is busy with other tests; one that is gone refuses at once.
    monkeypatch.setattr(shared_limits, "TIMEOUT_S", 5.0)
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server")
    server = Redis(tmp_path)
    yield server
    server.kill()


@contextlib.asynccontextmanager
async def leasing(*workers: Shaper) -> AsyncIterator[None]:
    chores = [asyncio.create_task(each.run()) for each in workers]
    try:
        yield
    finally:
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)


def worker(redis: Redis, workers: int = 2, **rule: Any) -> tuple[Shaper, dict[str, int]]:
    """A shaper as a worker has it, and its counters."""
    slots = memoryview(bytearray(8 * slot_count(NAMES))).cast("Q")
    fields = {"name": "all", "max_wait_s": 60, "queue": 10_000, **rule}
    settings = Settings(workers=workers, shaping=shaped(fields, backend=redis.url))
    metrics = WorkerMetrics(slots)
    return Shaper(settings, lambda: metrics), _Slots(slots)


class _Slots(dict[str, int]):
    def __init__(self, slots: memoryview) -> None:
        self._slots = slots

    def __getitem__(self, name: str) -> int:
        return int(self._slots[NAMES.index(name)])


class Caller:
    """Owns a ticket."""

    def __init__(self, gone_s: list[float]) -> None:
        self.ticket = Ticket(time.monotonic_ns(), 1, owner=self)
        self._gone_s = gone_s

    def shaped(self) -> None:
        if self.ticket.refusal is None:
            self._gone_s.append(time.monotonic())


def come(shaper: Shaper, gone_s: list[float]) -> None:
    caller = Caller(gone_s)
    if shaper.enter(caller.ticket):
        gone_s.append(time.monotonic())


@in_loop
async def test_two_workers_keep_the_global_limit_within_2_percent(redis: Redis) -> None:
    gone_s: list[float] = []
    workers = [worker(redis, requests_per_s=200, burst=10)[0] for _ in range(2)]
    async with leasing(*workers):
        for _ in range(700):
            come(workers[0], gone_s)
        for _ in range(60):  # they want unequally much, too
            come(workers[1], gone_s)
        await until(lambda: len(gone_s) >= 700, "700 gone", timeout_s=10)
    gone_s.sort()
    assert 600 / (gone_s[650] - gone_s[50]) == pytest.approx(200, rel=0.02)


@in_loop
async def test_leasing_ends_when_it_is_cancelled(redis: Redis) -> None:
    """At any moment of a round trip; redis-py swallows a cancellation."""
    gone_s: list[float] = []
    for number in range(40):
        shaper, _ = worker(redis, requests_per_s=10_000, burst=1)
        chore = asyncio.create_task(shaper.run())
        for _ in range(200):
            come(shaper, gone_s)
        await asyncio.sleep(0.002 + number * 0.0001)
        chore.cancel()
        ended, _ = await asyncio.wait([chore], timeout=2.0)
        assert ended, f"run {number}"


@in_loop
async def test_redis_killed_means_parts_and_it_comes_back(redis: Redis) -> None:
    gone_s: list[float] = []
    shaper, counted = worker(redis, requests_per_s=200, burst=10)

    async def rate_rps() -> float:
        await asyncio.sleep(0.2)
        before, at_s = len(gone_s), time.monotonic()
        await asyncio.sleep(1.0)
        return (len(gone_s) - before) / (time.monotonic() - at_s)

    async with leasing(shaper):
        for _ in range(1500):
            come(shaper, gone_s)
        await until(lambda: len(gone_s) > 100, "Redis's limit is used")
        assert shaper.view().is_shared
        redis.kill()
        await until(lambda: not shaper.view().is_shared, "parts of the limits hold")
        assert await rate_rps() == pytest.approx(100, rel=0.1)  # one of two workers: half
        assert counted["shaping_fallbacks"] == 1
        redis.start()
        await until(lambda: shaper.view().is_shared, "Redis is used again")
        assert await rate_rps() == pytest.approx(200, rel=0.1)


@in_loop
async def test_most_requests_wait_for_no_round_trip(redis: Redis) -> None:
    gone_s: list[float] = []
    shaper, counted = worker(redis, requests_per_s=10_000)
    async with leasing(shaper):
        for _ in range(300):
            come(shaper, gone_s)
            await asyncio.sleep(0.002)
        assert len(gone_s) == 300
        assert counted["shaping_held"] < 30


class Served:
    """Requests of one worker that take a while each; how many are in flight is counted over all workers."""

    def __init__(self, shaper: Shaper, in_flight: list[int], service_s: float) -> None:
        self.shaper = shaper
        self.own = 0
        self.ended = 0
        self.refused = 0
        self._in_flight = in_flight
        """The number now, and the most it has been."""
        self._service_s = service_s

    def come(self, count: int = 1) -> None:
        for _ in range(count):
            ticket = Ticket(time.monotonic_ns(), 1)
            ticket.owner = _Told(functools.partial(self._told, ticket))
            if self.shaper.enter(ticket) or ticket.refusal is not None:
                self._told(ticket)

    def _told(self, ticket: Ticket) -> None:
        if ticket.refusal is not None:
            self.refused += 1
            return
        self.own += 1
        self._in_flight[0] += 1
        self._in_flight[1] = max(self._in_flight)
        asyncio.get_running_loop().call_later(self._service_s, self._end, ticket)

    def _end(self, ticket: Ticket) -> None:
        self.own -= 1
        self.ended += 1
        self._in_flight[0] -= 1
        self.shaper.leave(ticket)


class _Told:
    def __init__(self, tell: Callable[[], None]) -> None:
        self.shaped = tell


@in_loop
async def test_places_hold_over_two_workers_and_go_where_they_are_needed(redis: Redis) -> None:
    in_flight = [0, 0]
    one, two = (Served(worker(redis, concurrency=10)[0], in_flight, 0.1) for _ in range(2))
    async with leasing(one.shaper, two.shaper):
        one.come(100)
        await until(lambda: one.own == 10, "all places are the one's that needs them", timeout_s=2)
        two.come(100)
        await until(lambda: one.own == two.own == 5, "both have as many", timeout_s=2)
        start_s, before = time.monotonic(), one.ended + two.ended
        await until(lambda: one.ended + two.ended >= before + 100, "100 more", timeout_s=10)
        took_s = time.monotonic() - start_s
        await until(lambda: one.ended == two.ended == 100, "all are served", timeout_s=10)
        assert in_flight == [0, 10]
        assert took_s > 0.95  # 10 at a time, 0.1 s each
        await until(lambda: not redis.keys("burstgate:*"), "nothing is held by the idle", timeout_s=2)


@in_loop
async def test_thousands_of_classes_have_places_and_redis_is_asked_no_more_often_for_it(redis: Redis) -> None:
    shaper, _ = worker(redis, per="session", concurrency=2)
    told: list[Ticket] = []
    async with leasing(shaper):
        tickets = [Ticket(time.monotonic_ns(), 1, session=f"s{number}") for number in range(3000)]
        for ticket in tickets:
            ticket.owner = _Told(functools.partial(told.append, ticket))
            shaper.enter(ticket)
        await until(lambda: len(told) == 3000, "all are through, one of each session", timeout_s=10)
        assert all(ticket.is_through for ticket in tickets)
        calls = redis.calls("evalsha")
        await asyncio.sleep(1.0)
        assert redis.calls("evalsha") - calls < 7500  # 3,000 classes 0.6 s apart; 50 ms apart it would be 60,000
        for ticket in tickets:
            shaper.leave(ticket)
        await until(lambda: not redis.keys("burstgate:*"), "nothing is held by the idle", timeout_s=10)


@pytest.mark.parametrize("seed", range(3))
@in_loop
async def test_places_are_never_more_than_there_are_and_none_is_kept_from_who_needs_it(redis: Redis, seed: int) -> None:
    rng = random.Random(seed)
    total = rng.randrange(1, 20)
    workers = [shared_limits.SharedLimits(redis.url) for _ in range(4)]
    used, waiting, granted = [0] * 4, [0] * 4, [0] * 4
    try:
        for _ in range(400):
            each = rng.randrange(4)
            waiting[each] = max(0, waiting[each] + rng.randrange(-2, 4))
            used[each] = max(0, used[each] - rng.randrange(3))
            needed = used[each] + waiting[each]
            asked = shared_limits.WantedPlaces("p", total, used[each], needed, rng.randrange(3))
            _, [answer] = await workers[each].lease([], [asked])
            granted[each] = answer.places
            assert answer.is_full == (answer.places < needed)
            goes = max(0, min(waiting[each], answer.places - used[each]))
            used[each] += goes
            waiting[each] -= goes
            assert sum(max(pair) for pair in zip(used, granted, strict=True)) <= total
        for _ in range(3):  # once nobody starts more than it may, all places are used: equal parts, least needs first
            for each, shared in enumerate(workers):
                used[each] = min(used[each], granted[each])
                needed = used[each] + waiting[each]
                _, [answer] = await shared.lease([], [shared_limits.WantedPlaces("p", total, used[each], needed, 0)])
                granted[each] = answer.places
        needs = [pair[0] + pair[1] for pair in zip(used, waiting, strict=True)]
        assert sum(granted) == min(total, sum(needs))
        level = max(granted)
        assert all(got == need or got >= level - 1 for got, need in zip(granted, needs, strict=True))
    finally:
        for shared in workers:
            await shared.close()


@in_loop
async def test_a_worker_that_dies_gives_its_places_back(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_limits, "PLACES_TTL_S", 0.3)
    in_flight = [0, 0]
    dead, alive = (Served(worker(redis, concurrency=4)[0], in_flight, 60.0) for _ in range(2))
    async with leasing(dead.shaper):
        dead.come(4)
        await until(lambda: dead.own == 4, "it has all places", timeout_s=2)
    async with leasing(alive.shaper):
        alive.come(4)
        await until(lambda: alive.own == 4, "they are free", timeout_s=2)
        await asyncio.sleep(0.5)
        alive.come(1)
        await asyncio.sleep(0.2)
        assert alive.own == 4  # who lives and asks keeps its own


def _goes(served: Served, number: int) -> bool:
    return served.own == number


@pytest.mark.parametrize("limit", [{"concurrency": 3}, {"requests_per_s": 0.1, "burst": 3}], ids=str)
@pytest.mark.parametrize("patience", [{"queue": 0}, {"max_wait_s": 0}], ids=str)
@in_loop
async def test_without_a_queue_redis_is_asked_before_a_request_is_refused(
    redis: Redis, limit: dict[str, Any], patience: dict[str, Any]
) -> None:
    served = Served(worker(redis, **limit, **patience)[0], [0, 0], 60.0)
    async with leasing(served.shaper):
        for number in range(3):
            served.come()
            await until(functools.partial(_goes, served, number + 1), "it goes", timeout_s=1)
        served.come(5)
        await until(lambda: served.refused == 5, "the others are refused", timeout_s=1)
        assert served.own == 3


@in_loop
async def test_places_with_redis_killed_are_parts_and_no_request_is_lost(redis: Redis) -> None:
    in_flight = [0, 0]
    served = Served(worker(redis, concurrency=8)[0], in_flight, 0.05)  # one of two workers
    async with leasing(served.shaper):
        served.come(400)
        await until(lambda: served.own == 8, "Redis's limit is used", timeout_s=2)
        redis.kill()
        await until(lambda: not served.shaper.view().is_shared and served.own == 4, "its part", timeout_s=5)
        redis.start()
        await until(lambda: served.shaper.view().is_shared and served.own == 8, "all again", timeout_s=5)
        await until(lambda: served.ended == 400, "all are served", timeout_s=10)
        assert in_flight == [0, 8]
        assert served.refused == 0


@in_loop
async def test_no_redis_at_the_start_is_no_hindrance(tmp_path: Path) -> None:
    pytest.importorskip("redis", reason="needs the extra `redis`")
    rule = {"name": "all", "requests_per_s": 1000}
    settings = shaped(rule, backend=f"redis://127.0.0.1:{closed_port()}")
    async with (
        Upstream(plain(chat_answer())) as upstream,
        shaping(tmp_path, upstream.url, runs=True, shaping=settings) as bench,
    ):
        assert (await bench.serve(client())).status == 200
        assert bench.counter("shaping_fallbacks") == 1


def test_cv_of_equal_gaps_is_zero() -> None:
    assert cv_of([1.0, 1.0, 1.0]) == 0
