"""How much was going on: requests and tokens in flight over time and at each arrival, and the rate at each arrival.

A request is in flight in [received_at, received_at + elapsed_s). One whose elapsed time is unknown or 0 is in flight
for no time at all: BurstGPT's whole seconds are 0 on many good rows, so that its figures are lower bounds. A request
that ends at the instant at which another begins does not overlap it. Its tokens, request and response, count from its
beginning to its end: the most that it can hold in a KV cache; unknown ones count 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.table import pieces, view

Array = NDArray[np.float64]


class Level(msgspec.Struct, frozen=True):
    """What was in flight, by bin: the exact mean over the bin's time, and the most at any instant of it."""

    mean: tuple[float, ...]
    max: tuple[int, ...]
    overall_mean: float
    overall_max: int


class Load(msgspec.Struct, frozen=True):
    """In flight over time, from the first arrival to the last one's end, in bins of bin_s from start_s.

    The last bin's mean is over what it has of that time. timed: requests with a known elapsed time; untimed: without.
    """

    start_s: float
    bin_s: float
    timed: int
    untimed: int
    requests: Level
    tokens: Level


def in_flight_at_arrivals(table: pl.DataFrame) -> NDArray[np.int32]:
    """The requests in flight at each arrival, itself not included.

    table: of `traces.table`. Returns shape (n,), in its order; of equal stamps each sees those that stand before it.
    """
    stamps_s = view(table["received_at"])
    is_timed, _, ends_s = _timed(table)
    ends_s.sort()
    found = np.empty(len(stamps_s), dtype=np.int32)
    begun = 0
    for here in pieces(len(stamps_s)):
        timed = is_timed[here]
        found[here] = begun + np.cumsum(timed) - timed - np.searchsorted(ends_s, stamps_s[here], side="right")
        begun += int(np.count_nonzero(timed))
    return found


def arrival_rates_rps(stamps_s: Array, window_s: float = 60.0) -> Array:
    """The rate of arrivals in the `window_s` seconds up to each, itself not included.

    stamps_s: shape (n,), non-decreasing. Returns shape (n,), requests/s: those in (stamp - window_s, stamp] that stand
    before it, over window_s. In the first `window_s` of a trace they are too low: nobody knows what came before.
    """
    rates_rps = np.empty(len(stamps_s))
    for here in pieces(len(stamps_s)):
        since = np.searchsorted(stamps_s, stamps_s[here] - window_s, side="right")
        rates_rps[here] = (np.arange(here.start, here.stop) - since) / window_s
    return rates_rps


def load_over_time(table: pl.DataFrame, *, most_bins: int = 2000) -> Load | None:
    """What was in flight over time, by a sweep over every begin and end; None where nothing was.

    table: of `traces.table`. most_bins: the bins' length is the time between, divided by it, and at least 1 s.
    """
    is_timed, starts_s, ends_s = _timed(table)
    if not len(starts_s):
        return None
    start_s, end_s = float(view(table["received_at"])[0]), float(ends_s.max())
    bin_s = max(1.0, (end_s - start_s) / most_bins)
    bins = min(most_bins, math.ceil((end_s - start_s) / bin_s)) if bin_s > 1 else math.ceil(end_s - start_s)
    edges_s = np.append(start_s + np.arange(bins) * bin_s, end_s)
    # Positions in 32 bits: a polars column has no more rows, and these are long.
    order = np.argsort(ends_s).astype(np.uint32)
    ends_s = ends_s[order]
    sweep = _Sweep(starts_s, ends_s, np.searchsorted(ends_s, starts_s, side="right").astype(np.uint32), edges_s)
    one = np.ones(len(starts_s), dtype=np.int8)
    requests = _level(sweep, one, one)
    weight = view(
        table.select(
            pl.col("request_tokens").cast(pl.Int64).fill_null(0) + pl.col("response_tokens").fill_null(0)
        ).to_series()
    )[is_timed]
    known = int(table["elapsed_s"].count())
    return Load(
        start_s=start_s,
        bin_s=bin_s,
        timed=known,
        untimed=table.height - known,
        requests=requests,
        tokens=_level(sweep, weight, weight[order]),
    )


def _timed(table: pl.DataFrame) -> tuple[NDArray[np.bool_], Array, Array]:
    """Which requests are in flight for some time, and when those begin and end."""
    stamps_s, elapsed_s = view(table["received_at"]), view(table["elapsed_s"])
    is_timed = elapsed_s > 0
    starts_s = stamps_s[is_timed]
    ends_s = starts_s + elapsed_s[is_timed]
    # A stamp of today and an elapsed time under a millionth of a second add up to the stamp.
    is_timed[is_timed] = ends_s > starts_s
    return is_timed, starts_s[ends_s > starts_s], ends_s[ends_s > starts_s]


@dataclass(frozen=True, slots=True)
class _Sweep:
    """Begins and ends, each in order, how many ends there are up to each begin, and the bins' edges."""

    starts_s: Array
    ends_s: Array
    ended: NDArray[np.uint32]
    edges_s: Array


def _level(sweep: _Sweep, begun: NDArray[np.integer], over: NDArray[np.integer]) -> Level:
    """begun: what each begin adds; over: what each end takes."""
    edges_s, bins = sweep.edges_s, len(sweep.edges_s) - 1
    # Rounding may leave the last bin without length, and then without a mean.
    lengths_s = np.maximum(np.diff(edges_s), 1e-9)
    up, down = (np.concatenate(([0], np.cumsum(amounts, dtype=np.int64))) for amounts in (begun, over))
    # What begins or ends at an edge does so in the bin after it.
    before = up[np.searchsorted(sweep.starts_s, edges_s)] - down[np.searchsorted(sweep.ends_s, edges_s)]
    mean_s = before[:-1] * np.diff(edges_s)
    for stamps_s, amounts, sign in ((sweep.starts_s, begun, 1), (sweep.ends_s, over, -1)):
        place = np.minimum(np.searchsorted(edges_s, stamps_s, side="right") - 1, bins - 1)
        mean_s += sign * np.bincount(place, amounts * (edges_s[place + 1] - stamps_s), bins)
        del place
    # The most is at a bin's first instant, when that's ends and begins are through, or right after a begin.
    at_edge = (np.searchsorted(each, edges_s[:-1], side="right") for each in (sweep.starts_s, sweep.ends_s))
    most = up[next(at_edge)] - down[next(at_edge)]
    after = down[sweep.ended]
    np.subtract(up[1:], after, out=after)
    # Begins are in order, so that those of a bin stand together.
    first = np.searchsorted(sweep.starts_s, edges_s[:-1])
    has_begins = np.diff(first, append=len(after)) > 0
    if has_begins.any():
        most[has_begins] = np.maximum(most[has_begins], np.maximum.reduceat(after, first[has_begins]))
    return Level(
        mean=tuple(np.maximum(mean_s / lengths_s, 0).tolist()),
        max=tuple(most.tolist()),
        overall_mean=float(mean_s.sum()) / float(edges_s[-1] - edges_s[0]),
        overall_max=int(most.max()),
    )
