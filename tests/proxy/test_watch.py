from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from proxy import watch as watch_module
from proxy.settings import TimeoutSettings
from proxy.watch import Timers, Watch
from tests.compiled import needs_source
from tests.proxy.harness import in_loop, until


class Request:
    """A request that is looked at."""

    def __init__(self, *, is_broken: bool = False) -> None:
        self.checks: list[tuple[int, Timers]] = []
        self._is_broken = is_broken

    def check_timers(self, now_ns: int, timers: Timers) -> None:
        self.checks.append((now_ns, timers))
        if self._is_broken:
            raise ZeroDivisionError("a defect")

    def stopped(self) -> None:
        raise AssertionError("nobody stops")


class Connection:
    """A client's connection that is looked after."""

    def __init__(self, *, is_held: bool) -> None:
        self.is_held = is_held
        self.looks = 0
        self.sweeps = 0

    def look(self) -> None:
        self.looks += 1

    def sweep(self) -> None:
        self.sweeps += 1


@contextlib.asynccontextmanager
async def watching(*connections: Connection, **timeouts: float) -> AsyncIterator[Watch]:
    watch = Watch(set(connections))  # type: ignore[arg-type]
    watch.timers = Timers.of(TimeoutSettings.model_validate(timeouts))
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(watch.run())
        yield watch
        running.cancel()


@in_loop
async def test_every_request_is_looked_at_until_it_is_removed() -> None:
    async with watching(first_byte_s=1, chunk_s=2, total_s=0, sse_comment_s=0.5) as watch:
        first, second = Request(), Request()
        watch.add(first)
        watch.add(second)
        await until(lambda: len(first.checks) >= 2, "it is looked at twice")
        assert set(watch.requests()) == {first, second}
        watch.remove(first)
        looked, before = len(first.checks), len(second.checks)
        await until(lambda: len(second.checks) > before + 1, "the other is looked at on")
        assert len(first.checks) == looked
        watch.remove(first)  # twice is no harm
    assert second.checks[0][1] == Timers(10**9, 2 * 10**9, 0, 5 * 10**8)
    assert second.checks[1][0] > second.checks[0][0]


@in_loop
async def test_a_defect_in_one_request_is_not_the_end_of_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    async with watching() as watch:
        broken, other = Request(is_broken=True), Request()
        watch.add(broken)
        watch.add(other)
        await until(lambda: len(broken.checks) >= 2 and len(other.checks) >= 2, "both are looked at on")
    assert "timers could not be checked" in caplog.text


@needs_source
@in_loop
async def test_only_connections_that_are_not_read_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "SWEEP_S", 0.1)
    held, read = Connection(is_held=True), Connection(is_held=False)
    async with watching(held, read):
        await until(lambda: held.looks >= 2 and read.sweeps >= 2, "the watch comes by")
    assert read.looks == 0
    assert held.sweeps >= 1
