"""Which upstream takes a request: pure decisions on frozen views, loads and turns.

Upstreams are named by their index in the fleet. `loads` and `weights` hold one number for each of the fleet: requests
in flight, and the share of the load that it should have (its own weight, less while it starts slowly). `credits` is the
turns' state, a number for each of the fleet that starts at 0 and is carried, and changed in place, from call to call.

Bounded load (session, prefix): an upstream may be taken while what it would then have in flight is at most `max_load`
times its share of all that is in flight, rounded up (Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded
Loads, 2018). Somebody always may.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import msgspec

Policy = Literal["least_in_flight", "round_robin", "session", "prefix"]

RING_POINTS = 128
"""Points on the ring for a weight of 1: an upstream's part of the sessions is within some 10 % of its share."""


class Decision(msgspec.Struct, frozen=True, gc=False):
    """Who was chosen, and why."""

    index: int
    policy: Policy
    """What decided: least_in_flight, too, where a session or a prefix is not known."""
    candidates: int
    """How many there were to choose from."""
    is_guess: bool = False
    """None of them was well."""


class Pool(msgspec.Struct, frozen=True, gc=False):
    """Who serves a model. A new one is made whenever something other than the load changes."""

    ready: tuple[int, ...]
    """Those to choose from."""
    reserve: tuple[int, ...] = ()
    """Those that are not well: chosen when no other is left, because a guess that may fail beats a refusal."""
    weights: tuple[float, ...] = ()
    credits: list[float] = []
    """The turns' state."""
    ring: Ring | None = None


class Ring(msgspec.Struct, frozen=True, gc=False):
    """Consistent hashing: the points of all upstreams that serve a model, well or not, in order, and whose they are."""

    points: tuple[int, ...]
    owners: tuple[int, ...]


def hash64(text: str) -> int:
    """The place of a text on the ring: the same in every worker and after every restart."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


@functools.lru_cache(maxsize=1024)
def _points(name: str, count: int) -> tuple[int, ...]:
    return tuple(hash64(f"{name}\0{number}") for number in range(count))


def build_ring(upstreams: Sequence[tuple[int, str, float]]) -> Ring:
    """upstreams: (index, name, weight) of each. What others there are does not move an upstream's points."""
    placed = sorted(
        (point, index)
        for index, name, weight in upstreams
        for point in _points(name, max(1, round(RING_POINTS * weight)))
    )
    return Ring(tuple(point for point, _ in placed), tuple(index for _, index in placed))


def take_turn(candidates: Sequence[int], weights: Sequence[float], credits: list[float]) -> int:
    """The next one of a smooth weighted round (nginx's): 5, 1, 1 give a a b a c a a and not a a a a a b c."""
    best = candidates[0]
    most = -math.inf
    total = 0.0
    for index in candidates:
        weight = weights[index]
        total += weight
        credits[index] = credit = credits[index] + weight
        if credit > most:
            best, most = index, credit
    credits[best] -= total
    return best


def least_loaded(
    candidates: Sequence[int], loads: Sequence[int], weights: Sequence[float], credits: list[float]
) -> int:
    """The one with the fewest in flight for its weight; ties take turns, so that an idle fleet is used evenly."""
    least = math.inf
    tied: list[int] = []
    for index in candidates:
        load = loads[index] / weights[index]
        if load < least:
            least = load
            tied = [index]
        elif load == least:
            tied.append(index)
    return tied[0] if len(tied) == 1 else take_turn(tied, weights, credits)


def with_room(candidates: Sequence[int], loads: Sequence[int], weights: Sequence[float], max_load: float) -> list[int]:
    """The candidates within the bound of load once they have one more request; never none."""
    in_flight = 1
    weight = 0.0
    for index in candidates:
        in_flight += loads[index]
        weight += weights[index]
    fair = max_load * in_flight / weight
    return [index for index in candidates if loads[index] < math.ceil(fair * weights[index])]


def first_on_ring(ring: Ring, key: int, candidates: Sequence[int]) -> int:
    """The first of the candidates, all of which are on the ring, from the key's place on."""
    owners = ring.owners
    start = bisect.bisect_left(ring.points, key)
    for position in range(start - len(owners), start):  # negative positions count from the end
        if owners[position] in candidates:
            return owners[position]
    raise ValueError("no candidate is on the ring")


def choose(
    pool: Pool,
    loads: Sequence[int],
    policy: Policy,
    max_load: float = math.inf,
    without: Collection[int] = (),
    key: int | None = None,
    holders: Callable[[Sequence[int]], Sequence[int]] | None = None,
    may_guess: bool = True,
) -> Decision | None:
    """One upstream of the pool that is not in `without`; None when there is none.

    key: the session's place on the ring, None without a session; holders: given some candidates, those of them that
    have seen most of the prompt's beginning. may_guess: take one that is not well when nobody is.
    """
    weights = pool.weights
    credits = pool.credits
    ready: Sequence[int] = [index for index in pool.ready if index not in without] if without else pool.ready
    size = len(ready)
    if not size:
        reserve = [index for index in pool.reserve if index not in without] if may_guess else []
        if not reserve:
            return None
        index = least_loaded(reserve, loads, weights, credits)
        return Decision(index, "least_in_flight", len(reserve), is_guess=True)
    if policy == "round_robin":
        return Decision(take_turn(ready, weights, credits), policy, size)
    if policy == "session" and key is not None and pool.ring is not None:
        return Decision(first_on_ring(pool.ring, key, with_room(ready, loads, weights, max_load)), policy, size)
    if policy == "prefix" and holders is not None:
        held = holders(with_room(ready, loads, weights, max_load))
        if held:
            return Decision(least_loaded(held, loads, weights, credits), policy, size)
    return Decision(least_loaded(ready, loads, weights, credits), "least_in_flight", size)
