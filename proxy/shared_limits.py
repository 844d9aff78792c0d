"""Limits that hold over all workers and gateways: leases, kept in Redis.

    burstgate:RULE:CLASS:requests (or tokens)
        A rate: the theoretical arrival time of one GCRA, microseconds of Redis's clock, as text; it goes when it has
        long passed. A lease settles what is owed, then moves the arrival time on by as many cells as are free until
        LEASE_S from now, at most the number asked for. Answers that number and how far ahead the arrival time was. A
        lease that is not used is lost, so that the limit is never passed.
    burstgate:RULE:CLASS:places
        A concurrency: a hash from each worker to HELD:NEEDED:UNTIL. Asking says what is in flight, what is needed and
        what would be welcome beside, and answers how many may be in flight from now on: what is needed where all
        needs fit, and a part of what is left; else an equal part, least needs first. Never more than what the others
        leave: they hold what they were granted, and what they have in flight, until they ask again. A worker that
        does not ask for PLACES_TTL_S is gone, and its places are free.

Each is one script, atomic; all of a moment go in one round trip.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from proxy.shaping import LEASE_S, SLACK_NS

TIMEOUT_S: Final = 0.2
"""For a round trip; requests that need a lease wait as long."""
PLACES_TTL_S: Final = 5.0
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


_PLACES: Final = """
local now = redis.call('TIME')
now = now[1] * 1000000 + now[2]
local me, used, needed = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local beside, total = tonumber(ARGV[4]), tonumber(ARGV[5])
local all = redis.call('HGETALL', KEYS[1])
local others, sum, needs = 0, needed, {{needed, me}}
for i = 1, #all, 2 do
    if all[i] ~= me then
        local held, need, ends = string.match(all[i + 1], '^(%d+):(%d+):(%d+)$')
        if ends and tonumber(ends) > now then
            others = others + tonumber(held)
            sum = sum + tonumber(need)
            needs[#needs + 1] = {tonumber(need), all[i]}
        else
            redis.call('HDEL', KEYS[1], all[i])
        end
    end
end
if needed == 0 then
    redis.call('HDEL', KEYS[1], me)
    return {0, 0}
end
local target, left = 0, total
if sum <= total then
    target = needed + math.min(beside, math.floor((total - sum) / #needs))
else
    table.sort(needs, function(a, b) return a[1] < b[1] or (a[1] == b[1] and a[2] < b[2]) end)
    for i, each in ipairs(needs) do
        local part = math.min(each[1], math.floor(left / (#needs - i + 1)))
        left = left - part
        if each[2] == me then target = part end
    end
end
local granted = math.max(0, math.min(target, total - others))
local ttl_ms = tonumber(ARGV[6])
redis.call('HSET', KEYS[1], me, string.format('%d:%d:%.0f', math.max(used, granted), needed, now + ttl_ms * 1000))
redis.call('PEXPIRE', KEYS[1], ttl_ms)
return {granted, granted < needed and 1 or 0}
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
class WantedPlaces:
    """Places that are asked for: used are in flight, needed with those who wait, beside would be welcome."""

    key: str
    total: int
    used: int
    needed: int
    beside: int


@dataclass(frozen=True, slots=True)
class GrantedPlaces:
    """How many may be in flight; is_full: that is less than what was needed."""

    places: int
    is_full: bool


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
        self._places = self._redis.register_script(_PLACES)
        self._worker = secrets.token_hex(8)

    async def lease(
        self, wanted: Sequence[Wanted], places: Sequence[WantedPlaces] = ()
    ) -> tuple[list[Granted], list[GrantedPlaces]]:
        """One round trip. Raises SharedLimitsGone."""
        try:
            async with asyncio.timeout(TIMEOUT_S), self._redis.pipeline(transaction=False) as pipeline:
                for each in wanted:
                    arguments = (each.interval_ns / 1e3, each.burst, each.wanted, each.owed, LEASE_S * 1e6,
                                 SLACK_NS / 1e3, _KEEP_MS)  # fmt: skip
                    await self._lease(keys=[f"burstgate:{each.key}"], args=arguments, client=pipeline)
                for asked in places:
                    numbers = (asked.used, asked.needed, asked.beside, asked.total, int(PLACES_TTL_S * 1e3))
                    await self._places(keys=[f"burstgate:{asked.key}"], args=(self._worker, *numbers), client=pipeline)
                answers = await pipeline.execute()
            rates, counts = answers[: len(wanted)], answers[len(wanted) :]
            return (
                [Granted(float(cells), float(ahead_us) * 1e3) for cells, ahead_us in rates],
                [GrantedPlaces(int(granted), bool(is_full)) for granted, is_full in counts],
            )
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
