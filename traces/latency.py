"""How long requests take: percentiles over time and against load, and goodput, of the requests that went well.

    ttft_s      first content chunk minus request sent
    tpot_s      (last chunk - first chunk) / (output tokens - 1); unknown under two tokens
    elapsed_s   submission to the last byte: end to end
    queue_s     time held by shaping
Each is described over the rows with outcome `ok` that know it; percentiles are nearest-rank.

Goodput is the rate of requests within their objectives: outcome `ok`, and no measure that is known above its bound. A
row that went well and knows none of the bounded measures cannot be judged; it is counted apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.failures import QUANTILES, bin_width_s, is_failure, load_bins
from traces.lengths import Distribution, distribution, nearest_rank
from traces.table import view

MEASURES: Final = ("ttft_s", "tpot_s", "elapsed_s", "queue_s")

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Percentiles(msgspec.Struct, frozen=True):
    """A few figures of one bin, seconds."""

    n: int
    p50: float
    p90: float
    p99: float
    max: float


class LatencyBin(msgspec.Struct, frozen=True):
    """One bin [low, high) of time, in epoch s, or of load; `requests` are all its rows, failed ones too.

    A measure that no row of it knows is not in `measures`.
    """

    low: float
    high: float
    requests: int
    measures: dict[str, Percentiles]


class GoodputBin(msgspec.Struct, frozen=True):
    """Requests of one bin of time; goodput_rps is over the whole width of the bin."""

    start_s: float
    requests: int
    good: int
    unjudged: int
    goodput_rps: float
    share: float | None
    """Of those that can be judged."""


class Goodput(msgspec.Struct, frozen=True):
    """Requests within their objectives. `late`: those that went well and exceed each bound; one may exceed several."""

    bounds_s: dict[str, float]
    requests: int
    good: int
    failed: int
    unjudged: int
    late: dict[str, int]
    share: float | None
    over_time: tuple[GoodputBin, ...]


class LatencyReport(msgspec.Struct, frozen=True):
    """All of this file for one trace."""

    total: dict[str, Distribution | None]
    """Every measure; None where no row knows it."""
    bin_s: float | None
    """Width of the bins of time, whose edges are its multiples; None in an empty trace."""
    over_time: tuple[LatencyBin, ...]
    """Bins with requests."""
    by_in_flight: tuple[LatencyBin, ...] | None
    """By quantile of the requests in flight at arrival; None where they were not given."""
    goodput: Goodput | None
    """None where no objectives were given."""


def describe_latency(
    table: pl.DataFrame,
    *,
    in_flight: NDArray[Any] | None = None,
    bounds_s: Mapping[str, float] | None = None,
    bin_s: float | None = None,
) -> LatencyReport:
    """The latencies of a table sorted by `received_at`.

    in_flight: shape (rows,), the load that each request found. bounds_s: a measure's name to its objective in seconds.
    bin_s: width of the bins of time; None fits it to the span. Raises ValueError for a bound of no such measure or not
    above 0, or a bin_s that is not.
    """
    stamps_s = view(table["received_at"])
    if bin_s is None:
        bin_s = bin_width_s(float(stamps_s[-1] - stamps_s[0])) if len(stamps_s) else None
    elif not bin_s > 0:
        raise ValueError(f"latency over time: expected bins wider than 0 seconds, got {bin_s:g}")
    known = {name: values for name in MEASURES if (values := _measured(table, name)) is not None}
    bins = np.empty(0) if bin_s is None else np.floor(stamps_s / bin_s)
    return LatencyReport(
        total={name: distribution(known[name]) if name in known else None for name in MEASURES},
        bin_s=bin_s,
        over_time=tuple(_over_time(bins, bin_s, known)) if bin_s is not None else (),
        by_in_flight=None if in_flight is None else by_load(known, in_flight),
        goodput=None if not bounds_s else goodput(table, bounds_s, bin_s or 1.0),
    )


def _measured(table: pl.DataFrame, name: str) -> NDArray[Any] | None:
    """Shape (rows,), NaN where unknown or the row failed; None where no row knows it."""
    if table[name].null_count() == table.height:
        return None
    return np.where(is_failure(table), np.float32("nan"), view(table[name]))


def _over_time(bins: Array, bin_s: float, known: Mapping[str, NDArray[Any]]) -> Iterator[LatencyBin]:
    for first, after in _stretches(bins):
        measures = {name: values[first:after] for name, values in known.items()}
        yield _latency_bin(float(bins[first]) * bin_s, (float(bins[first]) + 1) * bin_s, after - first, measures)


def _stretches(bins: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Begin and end of each stretch of equal values."""
    edges = (np.flatnonzero(bins[1:] != bins[:-1]) + 1).tolist()
    if len(bins):
        yield from zip([0, *edges], [*edges, len(bins)], strict=True)


def _latency_bin(low: float, high: float, requests: int, measures: Mapping[str, NDArray[Any]]) -> LatencyBin:
    described = {name: figures for name, values in measures.items() if (figures := percentiles(values)) is not None}
    return LatencyBin(low, high, requests, described)


def percentiles(values: NDArray[Any]) -> Percentiles | None:
    """Of the values that are finite; None where none is."""
    known = np.sort(values[np.isfinite(values)])
    n = len(known)
    if not n:
        return None
    p50, p90, p99 = (float(known[nearest_rank(share, n) - 1]) for share in (0.5, 0.9, 0.99))
    return Percentiles(n, p50, p90, p99, float(known[-1]))


def by_load(
    measures: Mapping[str, NDArray[Any]], load: NDArray[Any], quantiles: int = QUANTILES
) -> tuple[LatencyBin, ...]:
    """Each measure, shape (n,) and NaN where unknown, by quantile of `load`, shape (n,), as in `failures.load_bins`."""
    edges, place = load_bins(load, quantiles)
    return tuple(
        _latency_bin(
            float(edges[i]),
            float(edges[i + 1]),
            int(np.count_nonzero(here := place == i)),
            {name: values[here] for name, values in measures.items()},
        )
        for i in range(max(len(edges) - 1, 0))
    )


def goodput(table: pl.DataFrame, bounds_s: Mapping[str, float], bin_s: float) -> Goodput:
    """Requests within `bounds_s`, in total and in bins of time; the table is sorted by `received_at`.

    Raises ValueError for a bound of no such measure, or not above 0.
    """
    for name, bound_s in bounds_s.items():
        if name not in MEASURES:
            raise ValueError(f"objectives: expected one of {', '.join(MEASURES)}, got {name!r}")
        if not bound_s > 0:
            raise ValueError(f"objectives: {name}: expected seconds above 0, got {bound_s:g}")
    failed = is_failure(table)
    is_late: Flags = np.zeros(table.height, dtype=np.bool_)
    is_known: Flags = np.zeros(table.height, dtype=np.bool_)
    late = {}
    for name, bound_s in bounds_s.items():
        values = view(table[name])
        exceeds = ~failed & (values > bound_s)
        late[name] = int(np.count_nonzero(exceeds))
        is_late |= exceeds
        is_known |= np.isfinite(values)
    unjudged: Flags = ~failed & ~is_known
    good: Flags = ~failed & ~is_late & is_known
    bins = np.floor(view(table["received_at"]) / bin_s)
    sums_good, sums_unjudged = (np.concatenate(([0], np.cumsum(flags))) for flags in (good, unjudged))

    def figures(first: int, after: int) -> tuple[int, int, int, float | None]:
        n, met = after - first, int(sums_good[after] - sums_good[first])
        unknown = int(sums_unjudged[after] - sums_unjudged[first])
        return n, met, unknown, met / (n - unknown) if n > unknown else None

    over_time = []
    for first, after in _stretches(bins):
        n, met, unknown, share = figures(first, after)
        over_time.append(GoodputBin(float(bins[first]) * bin_s, n, met, unknown, met / bin_s, share))
    n, met, unknown, share = figures(0, table.height)
    return Goodput(
        bounds_s=dict(bounds_s),
        requests=n,
        good=met,
        failed=int(np.count_nonzero(failed)),
        unjudged=unknown,
        late=late,
        share=share,
        over_time=tuple(over_time),
    )
