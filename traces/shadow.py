"""A shadow target against production, pair by pair: what they differ in, how sure that is, a verdict an axis.

A pair is a primary (`a`) and one of its shadows (`b`), joined by `shadow_of`: the same prompt at the same time, so that
what differs between requests is not what differs between the servers. Intervals are bootstrap percentiles over pairs
(Efron & Tibshirani 1993, chapter 13); verdicts as in `traces.compare`.

    outcome   the share that failed, b - a, and of pairs whose status differs. Shares are drawn from their posterior
              under Jeffreys' prior (Dirichlet, 1/2 each), so that what was not seen is not taken for impossible
    tokens    means, b / a - 1, of pairs that both went well and both know it; the share whose finish reason differs
    latency   of the same pairs: the median of each pair's own ratio, and quantiles of b over those of a
    output    the mean agreement of the outputs, against 1; known where the mirror was asked to compare them

Of more than MAX_PAIRS pairs a draw of so many gives latency's intervals, which are wider by that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.compare import MIN_ROWS, MIN_TAIL, Axis, Difference, Verdict, axis_of, judge, together
from traces.lengths import nearest_rank
from traces.record import Outcome

Array = NDArray[np.float64]

MAX_PAIRS: Final = 50_000
MOST_CHANGES: Final = 8
MEASURES: Final = ("ttft_s", "tpot_s", "elapsed_s")
SHARES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_SIDE: Final[dict[str, pl.DataType]] = {
    "outcome": pl.String(),
    "status": pl.Int64(),
    "request_tokens": pl.Int64(),
    "response_tokens": pl.Int64(),
    "finish_reason": pl.String(),
    **dict.fromkeys(MEASURES, pl.Float64()),
}
PAIR_FIELDS: Final = tuple(_SIDE)
"""Fields of the record that both sides of a pair have."""
PAIRS: Final[dict[str, pl.DataType]] = {
    **{f"{side}_{name}": dtype for side in "ab" for name, dtype in _SIDE.items()},
    "agreement": pl.Float64(),
}
"""Columns of a table of pairs; `a_outcome` is null where the primary is not there."""


class ShadowOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tolerances: relative differences of lengths and latencies, else differences of shares."""

    seed: int = 0
    rounds: int = 400
    confidence: float = 0.95
    failure_tolerance: float = 0.005
    length_tolerance: float = 0.05
    finish_tolerance: float = 0.05
    latency_tolerance: float = 0.1
    agreement_tolerance: float = 0.05


class Change(msgspec.Struct, frozen=True):
    """Pairs whose outcomes differ in this way."""

    primary: str
    shadow: str
    requests: int


class ShadowComparison(msgspec.Struct, frozen=True):
    """The outcome, with the options that it rests on."""

    verdict: Verdict
    target: str
    pairs: int
    unpaired: int
    """Shadows whose primary is not in the database: not yet, or not any more."""
    axes: tuple[Axis, ...]
    changes: tuple[Change, ...]
    """Most frequent first, at most MOST_CHANGES."""
    options: ShadowOptions


def check_options(options: ShadowOptions) -> None:
    """Raises ValueError naming the option that is out of range."""
    for name, value in msgspec.structs.asdict(options).items():
        if name == "seed":
            is_good, rule = value >= 0, "0 or more"
        elif name == "rounds":
            is_good, rule = 20 <= value <= 100_000, "20 to 100,000"
        elif name == "confidence":
            is_good, rule = 0.5 <= value < 1, "0.5 to below 1"
        else:
            is_good, rule = 0 < value < math.inf, "a number above 0"
        if not is_good:
            raise ValueError(f"compare: {name}: expected {rule}, got {value:g}")


def compare_shadow(
    batches: Iterable[pl.DataFrame], target: str, options: ShadowOptions | None = None
) -> ShadowComparison:
    """Pairs, in batches of PAIRS, compared on all axes. The same options give the same result.

    Raises ValueError for options that are out of range.
    """
    options = options or ShadowOptions()
    check_options(options)
    rng = np.random.default_rng(options.seed)
    table = pl.concat([pl.DataFrame(schema=PAIRS), *batches])
    pairs = table.filter(pl.col("a_outcome").is_not_null())
    ok = Outcome.OK.value
    good = pairs.filter((pl.col("a_outcome") == ok) & (pl.col("b_outcome") == ok))
    axes = (
        _outcome(pairs, options, rng),
        _tokens(good, options, rng),
        _latency(good, options, rng),
        _output(good, options, rng),
    )
    changes = (
        pairs.filter(pl.col("a_outcome") != pl.col("b_outcome"))
        .group_by("a_outcome", "b_outcome")
        .agg(pl.len().alias("n"))
        .sort("n", "a_outcome", "b_outcome", descending=[True, False, False])
        .head(MOST_CHANGES)
    )
    return ShadowComparison(
        together(axis.verdict for axis in axes if axis.is_known),
        target,
        pairs.height,
        table.height - pairs.height,
        axes,
        tuple(Change(*row) for row in changes.iter_rows()),
        options,
    )


def _difference(
    name: str,
    a: float,
    b: float,
    draws: Array,
    tolerance: float,
    options: ShadowOptions,
    *,
    is_relative: bool = False,
    point: float | None = None,
) -> Difference:
    """draws: of the difference, shape (rounds,), or empty where there is no interval. point: where it is not b - a."""
    if point is None:
        point = (0.0 if a == b else b / a - 1 if a else math.inf) if is_relative else b - a
    if not math.isfinite(point):
        return Difference(name, a, b, None, None, None, is_relative, Verdict.UNKNOWN)
    if not len(draws) or not np.isfinite(draws).all():
        return Difference(name, a, b, point, None, None, is_relative, Verdict.UNKNOWN)
    tail = (1 - options.confidence) / 2
    low, high = (float(edge) for edge in np.quantile(draws, [tail, 1 - tail]))
    return Difference(name, a, b, point, low, high, is_relative, judge(low, high, tolerance))


def _unknown(name: str, *, is_relative: bool = False) -> Difference:
    return Difference(name, None, None, None, None, None, is_relative, Verdict.UNKNOWN)


def _differing_share(
    name: str, n: int, differing: int, tolerance: float, options: ShadowOptions, rng: np.random.Generator
) -> Difference:
    """The share of n pairs that differ, against none."""
    if not n:
        return _unknown(name)
    draws = rng.beta(differing + 0.5, n - differing + 0.5, options.rounds)
    return _difference(name, 0.0, differing / n, draws, tolerance, options)


def _outcome(pairs: pl.DataFrame, options: ShadowOptions, rng: np.random.Generator) -> Axis:
    n = pairs.height
    if not n:
        return axis_of("outcome", [_unknown("failure_rate"), _unknown("status_differs")])
    a, b = (pairs[f"{side}_outcome"].to_numpy() != Outcome.OK.value for side in "ab")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    drawn = rng.dirichlet((only_a + 0.5, only_b + 0.5, n - only_a - only_b + 0.5), options.rounds)
    differing = int(pairs.select((~pl.col("a_status").eq_missing(pl.col("b_status"))).sum()).item())
    tolerance = options.failure_tolerance
    return axis_of(
        "outcome",
        [
            _difference(
                "failure_rate", float(a.mean()), float(b.mean()), drawn[:, 1] - drawn[:, 0], tolerance, options
            ),
            _differing_share("status_differs", n, differing, tolerance, options, rng),
        ],
    )


def _known(good: pl.DataFrame, name: str) -> tuple[Array, Array]:
    """Both sides of the pairs that know a field; shape (n,) each."""
    both = good.select(f"a_{name}", f"b_{name}").drop_nulls()
    return both[f"a_{name}"].cast(pl.Float64).to_numpy(), both[f"b_{name}"].cast(pl.Float64).to_numpy()


def _tokens(good: pl.DataFrame, options: ShadowOptions, rng: np.random.Generator) -> Axis:
    found = [_mean_ratio(name, *_known(good, name), options, rng) for name in ("request_tokens", "response_tokens")]
    reasons = good.filter(pl.col("a_finish_reason").is_not_null() | pl.col("b_finish_reason").is_not_null())
    differing = reasons.filter(~pl.col("a_finish_reason").eq_missing(pl.col("b_finish_reason"))).height
    tolerance = options.finish_tolerance
    found.append(_differing_share("finish_reason_differs", reasons.height, differing, tolerance, options, rng))
    return axis_of("tokens", found)


def _mean_ratio(name: str, a: Array, b: Array, options: ShadowOptions, rng: np.random.Generator) -> Difference:
    n = len(a)
    if not n:
        return _unknown(f"{name}_mean", is_relative=True)
    draws = np.empty(0)
    mean_a, mean_b = float(a.mean()), float(b.mean())
    if n >= MIN_ROWS:
        a, b, at = _drawn(a, b, options, rng)
        sums = np.array([(a[rows].sum(), b[rows].sum()) for rows in at])
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = np.where(sums[:, 0] == sums[:, 1], 0.0, sums[:, 1] / sums[:, 0] - 1)
    tolerance = options.length_tolerance
    return _difference(f"{name}_mean", mean_a, mean_b, draws, tolerance, options, is_relative=True)


def _drawn(
    a: Array, b: Array, options: ShadowOptions, rng: np.random.Generator
) -> tuple[Array, Array, Iterable[NDArray[np.int64]]]:
    """At most MAX_PAIRS pairs, and which of them each round takes."""
    if len(a) > MAX_PAIRS:
        kept = rng.choice(len(a), MAX_PAIRS, replace=False)
        a, b = a[kept], b[kept]
    n = len(a)
    return a, b, (rng.integers(0, n, n) for _ in range(options.rounds))


def _latency(good: pl.DataFrame, options: ShadowOptions, rng: np.random.Generator) -> Axis:
    found: list[Difference] = []
    for name in MEASURES:
        a, b = _known(good, name)
        keep = a > 0
        found += _ratios("e2e_s" if name == "elapsed_s" else name, a[keep], b[keep], options, rng)
    return axis_of("latency", found)


def _ratios(name: str, a: Array, b: Array, options: ShadowOptions, rng: np.random.Generator) -> list[Difference]:
    n = len(a)
    if not n:
        return [_unknown(f"{name}_{label}", is_relative=True) for label in ("pair", *SHARES)]
    ranks = {label: nearest_rank(share, n) for label, share in SHARES.items()}
    sides = [(np.sort(a)[rank - 1], np.sort(b)[rank - 1]) for rank in ranks.values()]
    tolerance = options.latency_tolerance
    own = float(np.median(b / a) - 1)
    drawn: Mapping[str, Array] = {}
    if n >= 2 * MIN_TAIL:
        drawn = _drawn_ratios(*_drawn(a, b, options, rng))
    none = np.empty(0)
    found = [
        _difference(
            f"{name}_pair", float(np.median(a)), float(np.median(b)), drawn.get("pair", none), tolerance, options,
            is_relative=True, point=own,
        )
    ]  # fmt: skip
    for (label, rank), (low, high) in zip(ranks.items(), sides, strict=True):
        draws = drawn.get(label, none) if min(rank, n - rank) >= MIN_TAIL else none
        found.append(
            _difference(f"{name}_{label}", float(low), float(high), draws, tolerance, options, is_relative=True)
        )
    return found


def _drawn_ratios(a: Array, b: Array, rounds: Iterable[NDArray[np.int64]]) -> dict[str, Array]:
    shares = list(SHARES.values())
    rows = []
    for at in rounds:
        of_a, of_b = a[at], b[at]
        quantiles = [np.quantile(each, shares, method="inverted_cdf") for each in (of_a, of_b)]
        with np.errstate(divide="ignore", invalid="ignore"):
            rows.append([np.median(of_b / of_a) - 1, *(quantiles[1] / quantiles[0] - 1)])
    return dict(zip(("pair", *SHARES), np.array(rows).T, strict=True))


def _output(good: pl.DataFrame, options: ShadowOptions, rng: np.random.Generator) -> Axis:
    values = good["agreement"].drop_nulls().to_numpy()
    n = len(values)
    if not n:
        return axis_of("output", [_unknown("agreement_mean")])
    draws = np.empty(0)
    if n >= MIN_ROWS:
        kept, _, rounds = _drawn(values, values, options, rng)
        draws = np.array([kept[at].mean() for at in rounds]) - 1
        if not draws.any():  # all agree, of which every resample would be the same: as for shares
            draws = -rng.beta(0.5, n + 0.5, options.rounds)
    tolerance = options.agreement_tolerance
    mean = _difference("agreement_mean", 1.0, float(values.mean()), draws, tolerance, options)
    return axis_of("output", [mean])
