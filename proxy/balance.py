"""Which upstream takes a request: pure decisions on frozen views of the upstreams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UpstreamView:
    """What the choice needs to know of one upstream."""

    in_flight: int
    down_until_ns: int
    """Passed over until then, because a connection to it failed; 0 when it is well."""


def choose(views: Sequence[UpstreamView], now_ns: int, *, excluded: frozenset[int], turn: int) -> int | None:
    """The index of the upstream with the fewest requests in flight; None when all are excluded.

    Those that are down are chosen only when every other is excluded: a guess that may fail beats a refusal that must.
    Ties go round with `turn`, so that an idle fleet is used evenly.
    """
    candidates = [index for index in range(len(views)) if index not in excluded]
    if not candidates:
        return None
    well = [index for index in candidates if views[index].down_until_ns <= now_ns] or candidates
    return min(well, key=lambda index: (views[index].in_flight, (index - turn) % len(views)))
