"""Rates that hold over all workers and gateways: leases of one GCRA's cells, kept in Redis.

    KEY         burstgate:RULE:CLASS:requests (or tokens); the theoretical arrival time, microseconds of Redis's clock,
                as text; it goes when it has long passed
    lease       one script, atomic: settles what is owed, then moves the arrival time on by as many cells as are free
                until LEASE_S from now, at most the number asked for. Answers that number and how far ahead the
                arrival time was.

All leases of a moment go in one round trip. A lease that is not used is lost, so that the limit is never passed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from proxy.shaping import LEASE_S, SLACK_NS

TIMEOUT_S: Final = 0.2
"""For a round trip; requests that need a lease wait as long."""
_KEEP_MS: Final = 60_000
_LEASE: Final = """
local now = redis.call('TIME')
now = now[1] * 1000000 + now[2]
local cell, burst, wanted, owed = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local tat = (tonumber(redis.call('GET', KEYS[1])) or 0) + owed * cell
tat = math.max(tat, now - tonumber(ARGV[6]))
local free = math.floor((now + tonumber(ARGV[5]) + burst * cell - tat) / cell + 0.000001)
local granted = math.max(0, math.min(wanted, free))
local new = tat + granted * cell
redis.call('SET', KEYS[1], string.format('%.3f', new), 'PX', math.ceil(math.max(0, new - now) / 1000) + ARGV[7])
return {granted, string.format('%.3f', tat - now)}
"""


class SharedLimitsGone(Exception):
    """Redis does not answer, or not with what it should."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A lease that is asked for."""

    key: str
    interval_ns: float
    burst: float
    wanted: float
    owed: float


@dataclass(frozen=True, slots=True)
class Granted:
    """What was granted; ahead_ns: how far the arrival time was ahead of Redis's clock."""

    cells: float
    ahead_ns: float


class SharedLimits:
    """One connection to Redis."""

    def __init__(self, url: str) -> None:
        """Raises ValueError for a URL that is none, ImportError without the package `redis`."""
        import redis.asyncio
        import redis.exceptions

        self._errors = (redis.exceptions.RedisError, OSError, TimeoutError)
        self._redis: Any = redis.asyncio.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, single_connection_client=False
        )
        self._lease = self._redis.register_script(_LEASE)

    async def lease(self, wanted: Sequence[Wanted]) -> list[Granted]:
        """One round trip. Raises SharedLimitsGone."""
        try:
            async with asyncio.timeout(TIMEOUT_S), self._redis.pipeline(transaction=False) as pipeline:
                for each in wanted:
                    arguments = (each.interval_ns / 1e3, each.burst, each.wanted, each.owed, LEASE_S * 1e6,
                                 SLACK_NS / 1e3, _KEEP_MS)  # fmt: skip
                    await self._lease(keys=[f"burstgate:{each.key}"], args=arguments, client=pipeline)
                answers = await pipeline.execute()
            return [Granted(float(cells), float(ahead_us) * 1e3) for cells, ahead_us in answers]
        except self._errors as error:
            raise SharedLimitsGone(str(error) or type(error).__name__) from error

    async def ping(self) -> None:
        """Whether it answers. Raises SharedLimitsGone."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._redis.ping()
        except self._errors as error:
            raise SharedLimitsGone(str(error) or type(error).__name__) from error

    async def close(self) -> None:
        """Let go of the connection."""
        with contextlib.suppress(*self._errors):
            await self._redis.aclose()
