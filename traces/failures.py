"""Where and when requests fail: rates by group, over time and against load, runs of failures, the error budget.

A failure is a row whose outcome is not `ok`. Every rate is failures over requests of the same rows, with its interval
by Wilson; the intervals take requests as independent, which failures that come in runs are not: read them as the least
uncertainty there is. Groups of one breakdown add up to the whole table; a name of None is an unknown value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import NormalDist
from typing import Any, Final

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.record import Outcome
from traces.table import view

CONFIDENCE: Final = 0.95
MAX_BINS: Final = 500
"""Bins of time, at most, unless their width is asked for."""
MAX_GROUPS: Final = 100
"""Groups of a breakdown that are told apart: those of most requests."""
OTHERS: Final = "(others)"
MAX_RUNS: Final = 20
"""Runs of failures that are listed one by one: the longest."""
QUANTILES: Final = 10
WIDTHS_S: Final = (1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1200.0, 3600.0, 10_800.0, 21_600.0, 86_400.0, 604_800.0)
"""Widths of a bin of time that people read."""
MINUTE_S: Final = 60.0
NOT_THE_SERVICE: Final = frozenset({Outcome.INVALID_REQUEST, Outcome.CLIENT_GONE})
"""Failures that an availability objective leaves out: the client's own doing."""

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Rate(msgspec.Struct, frozen=True):
    """Failures of requests, the share and its Wilson interval; None where there is no request."""

    requests: int
    failures: int
    rate: float | None
    low: float | None
    high: float | None


class Group(msgspec.Struct, frozen=True):
    """One value of a column; `is_rest` marks all values beyond the MAX_GROUPS largest, together."""

    name: str | None
    requests: Rate
    is_rest: bool = False


class Span(msgspec.Struct, frozen=True):
    """A bin [low, high) of time, length or load; of load bins the last includes its high end. None: unknown values."""

    low: float | None
    high: float | None
    requests: Rate


class Contrast(msgspec.Struct, frozen=True):
    """Failures inside a condition against outside.

    odds_ratio: (failed inside / ok inside) / (failed outside / ok outside); low, high by Woolf: log odds +- z sqrt(sum
    of 1 / cell) (Woolf, Ann. Hum. Genet. 19, 1955). With an empty cell, 1/2 is added to all four (Haldane 1956,
    Anscombe 1956) and `is_corrected`. None where one side has no request.
    """

    inside: Rate
    outside: Rate
    odds_ratio: float | None
    low: float | None
    high: float | None
    is_corrected: bool


class LoadEffect(msgspec.Struct, frozen=True):
    """Failure rate by quantile of a load, and the highest bin against all others together."""

    bins: tuple[Span, ...]
    highest: Contrast | None
    """None under two bins."""


class Run(msgspec.Struct, frozen=True):
    """Consecutive failures: `failures` of them, the first at start_s, the next success at end_s, None if none came."""

    start_s: float
    end_s: float | None
    failures: int


class Runs(msgspec.Struct, frozen=True):
    """The runs of consecutive failures, in order of arrival, of one upstream; of `min_failures` and more each.

    mttr_s, time to recover: mean of a run's first failure to the next success's arrival, over the runs that ended.
    mtbf_s, between failures: the time from the first arrival to the last that is in no run, over the number of runs.
    """

    name: str | None
    requests: Rate
    runs: int
    longest: int
    """Failures of the longest run; 0 without runs."""
    mtbf_s: float | None
    mttr_s: float | None
    max_recovery_s: float | None
    listed: tuple[Run, ...]
    """The MAX_RUNS longest, in order of time."""


class BurnRule(msgspec.Struct, frozen=True):
    """An alert that fires while both windows burn the budget at `burn_rate` times the sustainable rate or faster."""

    severity: str
    burn_rate: float
    long_s: float
    short_s: float


WORKBOOK_RULES: Final = (
    BurnRule("page", 14.4, 3600.0, 300.0),
    BurnRule("page", 6.0, 21_600.0, 1800.0),
    BurnRule("ticket", 1.0, 259_200.0, 21_600.0),
)
"""Multiwindow, multi-burn-rate alerts for a budget of 30 days: The Site Reliability Workbook (2018), chapter 5, table
5-8: 2 % of the budget in an hour, 5 % in six hours, 10 % in three days."""


class BurnAlert(msgspec.Struct, frozen=True):
    """What a rule says of the trace, at the end of every minute that has a request."""

    rule: BurnRule
    burn_at_end: float | None
    """Of the long window, as its maximum; 1 uses up the budget just when its period ends."""
    burn_max: float | None
    episodes: tuple[tuple[float, float], ...]
    """Start and end of the times that it fires, epoch s, whole minutes."""


class Availability(msgspec.Struct, frozen=True):
    """A service-level objective against the trace; requests that failed by the client's doing are in no figure.

    budget: the failures that the objective allows of `valid` requests; budget_used: bad / budget, above 1 is missed.
    """

    slo: float
    valid: int
    bad: int
    excluded: int
    availability: float | None
    low: float | None
    high: float | None
    is_met: bool | None
    budget: float
    budget_used: float | None
    alerts: tuple[BurnAlert, ...]


class Waste(msgspec.Struct, frozen=True):
    """Tokens of failed requests of one outcome: response tokens generated and thrown away, prompts read for nothing."""

    outcome: Outcome
    requests: int
    with_response_tokens: int
    """Those whose response count is known; of the others nothing is assumed."""
    request_tokens: int
    response_tokens: int


class Wasted(msgspec.Struct, frozen=True):
    """Aborted tokens; the shares are of all known tokens of the trace, None where there are none."""

    by_outcome: tuple[Waste, ...]
    request_tokens: int
    response_tokens: int
    request_share: float | None
    response_share: float | None


class FailureReport(msgspec.Struct, frozen=True):
    """All of this file for one trace."""

    total: Rate
    over_time_s: float | None
    """Width of the bins of `over_time`; None in an empty trace."""
    over_time: tuple[Span, ...]
    """Epoch seconds; bins without a request are left out."""
    by: dict[str, tuple[Group, ...]]
    """Column to its values: model, log_type, upstream, endpoint, origin."""
    causes: dict[str, tuple[Group, ...]]
    """outcome, status, error_type: failures with that value among all requests of the trace."""
    by_request_tokens: tuple[Span, ...]
    by_hour: tuple[Group, ...]
    """Hours of the day, `00` to `23`, in `zone`; those with requests."""
    zone: str
    by_in_flight: LoadEffect | None
    by_arrival_rate: LoadEffect | None
    bursts: Contrast | None
    """Inside burst episodes against outside; None where no episodes were given."""
    runs: tuple[Runs, ...]
    """All upstreams together (`name` None) if there is more than one, then each, most requests first."""
    availability: Availability
    wasted: Wasted


GROUPED: Final = ("model", "log_type", "upstream", "endpoint", "origin")
CAUSES: Final = ("outcome", "status", "error_type")


def describe_failures(
    table: pl.DataFrame,
    *,
    in_flight: NDArray[Any] | None = None,
    arrival_rate_rps: NDArray[Any] | None = None,
    episodes: Array | None = None,
    zone: str = "UTC",
    bin_s: float | None = None,
    slo: float = 0.999,
) -> FailureReport:
    """The failures of a table sorted by `received_at`.

    in_flight, arrival_rate_rps: shape (rows,), the load that each request found. episodes: shape (k, 2), start and end
    of bursts in epoch s. zone: IANA name of the hours of the day. bin_s: of the rate over time; None fits it to the
    span. Raises ValueError for an slo outside 0 to 1 or a bin_s that is not above 0.
    """
    failed = is_failure(table)
    stamps_s = view(table["received_at"])
    if bin_s is None:
        bin_s = bin_width_s(float(stamps_s[-1] - stamps_s[0])) if len(stamps_s) else None
    return FailureReport(
        total=rate(len(failed), int(np.count_nonzero(failed))),
        over_time_s=bin_s,
        over_time=over_time(stamps_s, failed, bin_s) if bin_s is not None else (),
        by={column: by_value(table, column) for column in GROUPED},
        causes={column: by_cause(table, column) for column in CAUSES},
        by_request_tokens=by_request_tokens(table),
        by_hour=by_hour(table, zone),
        zone=zone,
        by_in_flight=None if in_flight is None else by_load(failed, in_flight),
        by_arrival_rate=None if arrival_rate_rps is None else by_load(failed, arrival_rate_rps),
        bursts=None if episodes is None else contrast(failed, inside(stamps_s, episodes)),
        runs=runs_by_upstream(table),
        availability=availability(table, slo),
        wasted=wasted_tokens(table),
    )


def is_failure(table: pl.DataFrame) -> Flags:
    """Shape (rows,): whose outcome is not ok."""
    return (table["outcome"] != Outcome.OK.value).to_numpy()


def wilson(failures: int, requests: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The score interval of a share (Wilson, JASA 22, 1927), requests >= 1; it holds failures / requests.

    (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, n = failures / requests, requests
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The ends are exactly 0 at p = 0 and 1 at p = 1; rounding must not take p itself out.
    return min(max((middle - half) / scale, 0.0), p), max(min((middle + half) / scale, 1.0), p)


def rate(requests: int, failures: int) -> Rate:
    """The share of failures and its interval."""
    if not requests:
        return Rate(0, 0, None, None, None)
    return Rate(requests, failures, failures / requests, *wilson(failures, requests))


def bin_width_s(span_s: float, most: int = MAX_BINS) -> float:
    """The least of WIDTHS_S, or of doubled weeks, with which `span_s` has at most `most` bins."""
    for width_s in WIDTHS_S:
        if span_s / width_s < most - 1:
            return width_s
    width_s = WIDTHS_S[-1]
    while span_s / width_s >= most - 1:
        width_s *= 2
    return width_s


def over_time(stamps_s: Array, failed: Flags, bin_s: float) -> tuple[Span, ...]:
    """The rate in bins whose edges are multiples of `bin_s`; only those with requests, in order.

    stamps_s: shape (n,), ascending.
    """
    if not bin_s > 0:
        raise ValueError(f"failures over time: expected bins wider than 0 seconds, got {bin_s:g}")
    starts, requests, failures = _binned(np.floor(stamps_s / bin_s), failed)
    return tuple(
        Span(start * bin_s, (start + 1) * bin_s, rate(n, k))
        for start, n, k in zip(starts.tolist(), requests.tolist(), failures.tolist(), strict=True)
    )


def _binned(bins: NDArray[Any], failed: Flags) -> tuple[NDArray[Any], Ints, Ints]:
    """Of ascending bin numbers: each that occurs, its requests and its failures."""
    first = np.flatnonzero(np.concatenate((np.ones(min(len(bins), 1), dtype=np.bool_), bins[1:] != bins[:-1])))
    sums = np.concatenate(([0], np.cumsum(failed)))
    ends = np.append(first[1:], len(bins))[: len(first)]
    return bins[first], ends - first, sums[ends] - sums[first]


def by_value(table: pl.DataFrame, column: str) -> tuple[Group, ...]:
    """The failure rate of each value of `column`, most requests first."""
    counted = _counted(table, pl.col(column))
    return _groups((name, n, failures) for name, n, failures in counted.iter_rows())


def by_cause(table: pl.DataFrame, column: str) -> tuple[Group, ...]:
    """The failures with each value of `column` as a share of all requests, most failures first."""
    counted = _counted(table, pl.col(column)).filter(pl.col("failures") > 0).sort("failures", descending=True)
    return _groups(((name, table.height, failures) for name, _, failures in counted.iter_rows()), table.height)


def _counted(table: pl.DataFrame, name: pl.Expr) -> pl.DataFrame:
    """Columns name, n, failures; most requests first, then by name."""
    failed = pl.col("outcome") != Outcome.OK.value
    return (
        table.lazy()
        .select(name=name, failed=failed)
        .group_by("name")
        .agg(n=pl.len().cast(pl.Int64), failures=pl.col("failed").sum().cast(pl.Int64))
        .with_columns(pl.col("name").cast(pl.String))
        .sort("n", "name", descending=[True, False])
        .collect()
    )


def _groups(rows: Iterable[tuple[str | None, int, int]], whole: int | None = None) -> tuple[Group, ...]:
    """Each a name, requests and failures; `whole` is the requests of every group where they share them."""
    listed = list(rows)
    groups = [Group(name, rate(n, failures)) for name, n, failures in listed[:MAX_GROUPS]]
    if rest := listed[MAX_GROUPS:]:
        n = sum(row[1] for row in rest) if whole is None else whole
        groups.append(Group(OTHERS, rate(n, sum(row[2] for row in rest)), is_rest=True))
    return tuple(groups)


def by_request_tokens(table: pl.DataFrame) -> tuple[Span, ...]:
    """The rate by length in bins [0, 1), [1, 2), [2, 4) ... doubling; rows of unknown length come last."""
    tokens = pl.col("request_tokens").cast(pl.Int64)
    # The bit length, exactly: a float's log2 may round up just below a power of two.
    bits = 64 - pl.when(tokens.is_not_null()).then(tokens.cast(pl.UInt64)).bitwise_leading_zeros().cast(pl.Int64)
    rows = sorted(
        ((int(name) if name is not None else None, n, failures) for name, n, failures in _counted(table, bits).rows()),
        key=lambda row: (row[0] is None, row[0] or 0),
    )
    return tuple(
        Span(
            None if bit is None else float(2**bit // 2),
            None if bit is None else float(2**bit),
            rate(n, failures),
        )
        for bit, n, failures in rows
    )


def by_hour(table: pl.DataFrame, zone: str) -> tuple[Group, ...]:
    """The rate by hour of the day, as clocks in `zone` show it: in a year, one hour is there twice and one not.

    Raises ValueError for a zone that is not IANA's.
    """
    # Since 1972 every zone is off UTC by whole quarter hours: rows of one quarter share their hour.
    quarter = (pl.col("received_at") / 900).floor().cast(pl.Int64)
    counted = (
        table.lazy()
        .select(quarter=quarter, failed=pl.col("outcome") != Outcome.OK.value)
        .group_by("quarter")
        .agg(n=pl.len().cast(pl.Int64), failures=pl.col("failed").sum().cast(pl.Int64))
    )
    stamp = pl.from_epoch(pl.col("quarter") * 900, time_unit="s").dt.replace_time_zone("UTC")
    try:
        hours = (
            counted.group_by(stamp.dt.convert_time_zone(zone).dt.hour().alias("hour"))
            .agg(pl.col("n").sum(), pl.col("failures").sum())
            .sort("hour")
            .collect()
        )
    except pl.exceptions.ComputeError as error:
        raise ValueError(f"time zone: expected an IANA name such as Europe/Berlin, got {zone!r}") from error
    return tuple(Group(f"{hour:02}", rate(n, failures)) for hour, n, failures in hours.iter_rows())


def load_bins(load: NDArray[Any], quantiles: int = QUANTILES) -> tuple[Array, NDArray[np.int16]]:
    """Edges, ascending, and the bin of each value, -1 where it is not finite; equal values share a bin.

    Bins are cut at nearest-rank quantiles; a load with many equal values has fewer than `quantiles` of them. Bin i
    holds edges[i] <= load < edges[i + 1], the last one also its high end.
    """
    known = np.isfinite(load)
    values = load[known]
    if not len(values):
        return np.empty(0), np.full(len(load), -1, dtype=np.int16)
    ranks = np.append(np.arange(quantiles) * len(values) // quantiles, len(values) - 1)
    values.partition(ranks)
    edges = np.unique(values[ranks].astype(np.float64))
    del values
    # A cut at the maximum would be a bin of no width: it belongs to the last one, unless it holds all.
    inner = edges[1:-1] if len(edges) > 2 else edges[1:1]
    return (edges if len(edges) > 1 else np.repeat(edges, 2)), np.where(
        known, np.searchsorted(inner, load, side="right").astype(np.int16), np.int16(-1)
    )


def by_load(failed: Flags, load: NDArray[Any], quantiles: int = QUANTILES) -> LoadEffect:
    """Failure rate by quantile of `load`, both shape (n,); loads that are not finite are left out."""
    edges, place = load_bins(load, quantiles)
    bins = max(len(edges) - 1, 0)
    known = place >= 0
    requests = np.bincount(place[known], minlength=bins)
    failures = np.bincount(place[known & failed], minlength=bins)
    spans = tuple(
        Span(float(edges[i]), float(edges[i + 1]), rate(int(requests[i]), int(failures[i]))) for i in range(bins)
    )
    highest = contrast(failed[known], place[known] == bins - 1) if bins > 1 else None
    return LoadEffect(spans, highest)


def inside(stamps_s: Array, episodes: Array) -> Flags:
    """Which stamps, ascending, lie in an episode [start, end); episodes, shape (k, 2), may touch and overlap."""
    at = np.searchsorted(stamps_s, np.asarray(episodes, dtype=np.float64).reshape(-1, 2))
    depth: Ints = np.zeros(len(stamps_s) + 1, dtype=np.int64)
    np.add.at(depth, at[:, 0], 1)
    np.add.at(depth, at[:, 1], -1)
    return np.cumsum(depth[:-1]) > 0


def contrast(failed: Flags, is_inside: Flags) -> Contrast:
    """Failures where `is_inside` against elsewhere; both shape (n,)."""
    requests, failures = int(np.count_nonzero(is_inside)), int(np.count_nonzero(failed & is_inside))
    others, other_failures = len(failed) - requests, int(np.count_nonzero(failed)) - failures
    return contrast_of(rate(requests, failures), rate(others, other_failures))


def contrast_of(inside: Rate, outside: Rate, confidence: float = CONFIDENCE) -> Contrast:
    """The odds ratio of two rates, with its interval."""
    if not inside.requests or not outside.requests:
        return Contrast(inside, outside, None, None, None, is_corrected=False)
    cells = [float(n) for side in (inside, outside) for n in (side.failures, side.requests - side.failures)]
    is_corrected = 0 in cells
    a, b, c, d = (cell + 0.5 * is_corrected for cell in cells)
    log_odds = math.log(a) - math.log(b) - math.log(c) + math.log(d)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    return Contrast(
        inside, outside, math.exp(log_odds), math.exp(log_odds - half), math.exp(log_odds + half), is_corrected
    )


def runs_by_upstream(table: pl.DataFrame, min_failures: int = 1) -> tuple[Runs, ...]:
    """The runs of failures of the whole table, if it has more than one upstream, and of each."""
    rows = table.select("upstream", "received_at", failed=pl.col("outcome") != Outcome.OK.value)

    def of(part: pl.DataFrame, name: str | None) -> Runs:
        return failure_runs(view(part["received_at"]), part["failed"].to_numpy(), name, min_failures)

    if rows["upstream"].n_unique() <= 1:
        return (of(rows, rows["upstream"][0]),) if rows.height else ()
    each = [of(part, name) for (name,), part in rows.group_by("upstream", maintain_order=True)]
    each.sort(key=lambda runs: (-runs.requests.requests, runs.name is None, runs.name or ""))
    return (of(rows, None), *each[:MAX_GROUPS])


def failure_runs(stamps_s: Array, failed: Flags, name: str | None = None, min_failures: int = 1) -> Runs:
    """The runs of one upstream. stamps_s: shape (n,), ascending; failed: shape (n,)."""
    n = len(failed)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], failed, [False])).astype(np.int8)))
    first, after = edges[::2], edges[1::2]
    is_long = after - first >= min_failures
    first, after = first[is_long], after[is_long]
    sizes = after - first
    ended = after < n
    down_s = stamps_s[np.minimum(after, n - 1)] - stamps_s[first] if n else np.empty(0)
    up_s = float(stamps_s[-1] - stamps_s[0] - down_s.sum()) if n else 0.0
    longest = np.sort(np.argsort(-sizes, kind="stable")[:MAX_RUNS])
    return Runs(
        name=name,
        requests=rate(n, int(np.count_nonzero(failed))),
        runs=len(sizes),
        longest=int(sizes.max(initial=0)),
        # The sum of what is down may round above the span.
        mtbf_s=max(up_s, 0.0) / len(sizes) if len(sizes) else None,
        mttr_s=float(down_s[ended].mean()) if ended.any() else None,
        max_recovery_s=float(down_s[ended].max()) if ended.any() else None,
        listed=tuple(
            Run(float(stamps_s[first[i]]), float(stamps_s[after[i]]) if ended[i] else None, int(sizes[i]))
            for i in longest.tolist()
        ),
    )


def availability(
    table: pl.DataFrame,
    slo: float,
    rules: Iterable[BurnRule] = WORKBOOK_RULES,
    not_the_service: frozenset[Outcome] = NOT_THE_SERVICE,
) -> Availability:
    """How the trace stands to an objective of `slo`, a share of valid requests that must not fail, and its alerts."""
    if not 0 < slo < 1:
        raise ValueError(f"slo: expected a share above 0 and below 1, such as 0.999, got {slo:g}")
    excluded = table["outcome"].is_in([outcome.value for outcome in not_the_service]).to_numpy()
    failed = is_failure(table)
    is_valid = ~excluded
    stamps_s, bad_rows = view(table["received_at"])[is_valid], failed[is_valid]
    valid, bad = len(bad_rows), int(np.count_nonzero(bad_rows))
    share = rate(valid, bad)
    # Rounded, as 1 - 0.9999 is a little under 0.0001.
    budget = round((1 - slo) * valid, 6)
    minutes, requests, failures = _binned(np.floor(stamps_s / MINUTE_S), bad_rows)
    return Availability(
        slo=slo,
        valid=valid,
        bad=bad,
        excluded=table.height - valid,
        availability=None if share.rate is None else 1 - share.rate,
        low=None if share.high is None else 1 - share.high,
        high=None if share.low is None else 1 - share.low,
        is_met=bad <= budget if valid else None,
        budget=budget,
        budget_used=bad / budget if valid else None,
        alerts=tuple(_burn_alert(minutes, requests, failures, slo, rule) for rule in rules),
    )


def _burn_alert(minutes: Array, requests: Ints, failures: Ints, slo: float, rule: BurnRule) -> BurnAlert:
    """minutes: whole minutes of the epoch, ascending and distinct, each with its requests and failures."""
    if not len(minutes):
        return BurnAlert(rule, None, None, ())
    all_n, all_failed = (np.concatenate(([0], np.cumsum(counts))) for counts in (requests, failures))
    here = np.arange(1, len(minutes) + 1)

    def burn(window_s: float) -> Array:
        """Failure rate over what the objective allows, in the window that ends with each minute."""
        before = np.searchsorted(minutes, minutes - window_s / MINUTE_S, side="right")
        share: Array = (all_failed[here] - all_failed[before]) / (all_n[here] - all_n[before])
        return share / (1 - slo)

    long = burn(rule.long_s)
    firing = np.flatnonzero((long >= rule.burn_rate) & (burn(rule.short_s) >= rule.burn_rate))
    # Minutes without a request in between neither fire nor end an alert, until the short window has run empty.
    is_new = np.diff(firing) > 1
    is_new |= np.diff(minutes[firing]) > rule.short_s / MINUTE_S
    first = firing[np.flatnonzero(np.concatenate((np.ones(min(len(firing), 1), dtype=np.bool_), is_new)))]
    last = firing[np.flatnonzero(np.concatenate((is_new, np.ones(min(len(firing), 1), dtype=np.bool_))))]
    starts_s, ends_s = (minutes[first] * MINUTE_S).tolist(), ((minutes[last] + 1) * MINUTE_S).tolist()
    return BurnAlert(rule, float(long[-1]), float(long.max()), tuple(zip(starts_s, ends_s, strict=True)))


def wasted_tokens(table: pl.DataFrame) -> Wasted:
    """The tokens of requests that failed."""
    sums = {
        Outcome(row["outcome"]): row
        for row in table.lazy()
        .group_by("outcome")
        .agg(
            requests=pl.len().cast(pl.Int64),
            known=pl.col("response_tokens").count().cast(pl.Int64),
            request=pl.col("request_tokens").cast(pl.Int64).sum(),
            response=pl.col("response_tokens").cast(pl.Int64).sum(),
        )
        .collect()
        .iter_rows(named=True)
    }
    by_outcome = tuple(
        Waste(outcome, row["requests"], row["known"], row["request"], row["response"])
        for outcome, row in sorted(sums.items(), key=lambda item: (-item[1]["response"], item[0]))
        if outcome is not Outcome.OK
    )

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    request, response = (sum(getattr(waste, name) for waste in by_outcome) for name in
                         ("request_tokens", "response_tokens"))  # fmt: skip
    totals: Mapping[str, int] = {name: sum(row[name] for row in sums.values()) for name in ("request", "response")}
    return Wasted(by_outcome, request, response, share(request, totals["request"]), share(response, totals["response"]))
