from __future__ import annotations

import asyncio
import os
import time

import pytest
import uvloop

from replay.timer import Alarm


@pytest.fixture(params=["uvloop", "asyncio"])
def runner(request: pytest.FixtureRequest) -> asyncio.Runner:
    return asyncio.Runner(loop_factory=uvloop.new_event_loop if request.param == "uvloop" else None)


def test_wakes_at_each_moment_and_never_before(runner: asyncio.Runner) -> None:
    async def main() -> list[int]:
        alarm = Alarm()
        zero_ns = time.monotonic_ns()
        lates_ns = []
        for number in range(1, 101):
            at_ns = zero_ns + number * 700_000  # less than a loop's own timer can tell apart
            await alarm.until(at_ns)
            lates_ns.append(time.monotonic_ns() - at_ns)
        alarm.close()
        return lates_ns

    with runner:
        lates_ns = runner.run(main())
    assert min(lates_ns) >= 0
    assert sorted(lates_ns)[50] < 5_000_000  # benchmarks/replay.py has the real figure


def test_a_moment_that_has_passed_is_now(runner: asyncio.Runner) -> None:
    async def main() -> None:
        alarm = Alarm()
        sleeping = [asyncio.ensure_future(alarm.until(at_ns)) for at_ns in (time.monotonic_ns() - 1, 0)]
        await asyncio.sleep(0)
        assert all(each.done() for each in sleeping)
        alarm.close()

    with runner:
        runner.run(main())


def test_a_sleeper_that_is_cancelled_leaves_the_next_one_its_own_time(runner: asyncio.Runner) -> None:
    async def main() -> None:
        alarm = Alarm()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await alarm.until(time.monotonic_ns() + 50_000_000)
        at_ns = time.monotonic_ns() + 100_000_000
        await alarm.until(at_ns)
        assert time.monotonic_ns() >= at_ns
        alarm.close()

    with runner:
        runner.run(main())


def test_where_there_is_no_timerfd_the_loop_wakes(runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        """As on a system without it."""

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Libc())

    async def main() -> None:
        alarm = Alarm()
        at_ns = time.monotonic_ns() + 5_000_000
        await alarm.until(at_ns)
        assert time.monotonic_ns() >= at_ns
        alarm.close()

    with runner:
        runner.run(main())


def test_nothing_is_left_open(runner: asyncio.Runner) -> None:
    async def main() -> None:
        before = os.listdir("/proc/self/fd")
        for _ in range(10):
            alarm = Alarm()
            await alarm.until(time.monotonic_ns() + 1_000)
            alarm.close()
        assert os.listdir("/proc/self/fd") == before

    with runner:
        runner.run(main())


def test_a_ring_ends_the_sleep_and_one_without_a_sleeper_is_nothing(runner: asyncio.Runner) -> None:
    async def main() -> None:
        alarm = Alarm()
        alarm.ring()
        for at_ns in (None, time.monotonic_ns() + 60_000_000_000):
            asyncio.get_running_loop().call_later(0.01, alarm.ring)
            async with asyncio.timeout(5):
                await alarm.until(at_ns)
        at_ns = time.monotonic_ns() + 20_000_000
        await alarm.until(at_ns)
        assert time.monotonic_ns() >= at_ns
        alarm.close()

    with runner:
        runner.run(main())
