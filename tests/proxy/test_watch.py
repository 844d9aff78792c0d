from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxy.settings import TimeoutSettings
from proxy.watch import Timers, Watch
from tests.proxy.harness import in_loop, until

TICK_S = Watch.TICK_S


class Request:
    """A request whose client can leave."""

    def __init__(self) -> None:
        self.has_left = asyncio.Event()
        self.noted_s: float | None = None
        self.listened = 0
        self.checks: list[tuple[int, Timers]] = []
        self.more_body = 0

    async def receive(self) -> dict[str, Any]:
        self.listened += 1
        if self.more_body:
            self.more_body -= 1
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    def left(self) -> None:
        self.noted_s = time.monotonic()

    def check_timers(self, now_ns: int, timers: Timers) -> None:
        self.checks.append((now_ns, timers))


@contextlib.asynccontextmanager
async def watching(**timeouts: float) -> AsyncIterator[Watch]:
    watch = Watch(TimeoutSettings.model_validate(timeouts))
    async with asyncio.TaskGroup() as tasks, watch.running(tasks):
        yield watch


@pytest.mark.parametrize("after_s", [0.0, TICK_S / 2, 5 * TICK_S])
@in_loop
async def test_leaving_is_noticed_within_two_ticks(after_s: float) -> None:
    async with watching() as watch:
        request = Request()
        watch.add(request)
        await asyncio.sleep(after_s)
        left_s = time.monotonic()
        request.has_left.set()
        await until(lambda: request.noted_s is not None, "the leaving is noticed")
        assert request.noted_s is not None
        assert request.noted_s - left_s < 2 * TICK_S + 0.05
        watch.remove(request)


@in_loop
async def test_rest_of_a_body_is_not_a_leaving() -> None:
    async with watching() as watch:
        request = Request()
        request.more_body = 3
        watch.add(request)
        await until(lambda: request.listened == 4, "it listens on")
        assert request.noted_s is None
        request.has_left.set()
        await until(lambda: request.noted_s is not None, "the leaving is noticed")
        watch.remove(request)


@in_loop
async def test_short_request_costs_no_task() -> None:
    async with watching() as watch:
        before = asyncio.all_tasks()
        for _ in range(50):
            request = Request()
            watch.add(request)
            await asyncio.sleep(TICK_S / 25)
            watch.remove(request)
            assert request.listened == 0
        assert asyncio.all_tasks() == before


@in_loop
async def test_many_are_watched_each_for_itself() -> None:
    async with watching() as watch:
        requests = [Request() for _ in range(500)]
        for request in requests:
            watch.add(request)
        await until(lambda: all(request.listened for request in requests), "all are watched")
        for request in requests[::2]:
            request.has_left.set()
        await until(lambda: all(request.noted_s for request in requests[::2]), "the leaving is noticed")
        assert not any(request.noted_s for request in requests[1::2])
        for request in requests:
            watch.remove(request)


@in_loop
async def test_timers_are_looked_at_as_long_as_it_lasts() -> None:
    async with watching(first_byte_s=1, chunk_s=0.5, total_s=0) as watch:
        request = Request()
        watch.add(request)
        await until(lambda: len(request.checks) >= 3, "the timers are looked at")
        watch.remove(request)
        looked = len(request.checks)
        await asyncio.sleep(Watch.TIMER_TICKS * TICK_S * 1.5)
        assert len(request.checks) == looked
        request.has_left.set()
    stamps = [now_ns for now_ns, _ in request.checks]
    assert stamps == sorted(stamps)
    assert abs(stamps[0] - time.monotonic_ns()) < 5_000_000_000
    assert {timers for _, timers in request.checks} == {Timers(1_000_000_000, 500_000_000, 0)}


@in_loop
async def test_idle_watch_does_not_tick() -> None:
    async with watching() as watch:
        loop = asyncio.get_running_loop()
        planned = 0
        call_later = loop.call_later

        def noting(delay: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
            nonlocal planned
            planned += delay == TICK_S
            return call_later(delay, *args, **kwargs)

        loop.call_later = noting  # type: ignore[method-assign, assignment]
        request = Request()
        watch.add(request)
        await asyncio.sleep(4 * TICK_S)
        watch.remove(request)
        request.has_left.set()
        await asyncio.sleep(2 * TICK_S)
        assert planned > 0
        planned = 0
        await asyncio.sleep(4 * TICK_S)
        assert planned == 0
        again = Request()  # and it starts again
        watch.add(again)
        await until(lambda: again.listened == 1, "it is watched")
        watch.remove(again)


@in_loop
async def test_end_of_the_worker_ends_its_tasks() -> None:
    async with watching() as watch:
        requests = [Request() for _ in range(20)]
        for request in requests:
            watch.add(request)
        await until(lambda: all(request.listened for request in requests), "all are watched")
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 1.0
    await asyncio.sleep(3 * TICK_S)  # what still ticks is in nobody's way
    assert not any(request.noted_s for request in requests)
