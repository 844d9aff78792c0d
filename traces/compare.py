"""Two traces against each other: what differs, by how much, how sure that is, and a verdict for each axis.

Each figure of `b` is set against that of `a`, with a bootstrap interval (percentiles of the draws; Efron & Tibshirani
1993, chapter 13). It is an equivalence test: with tolerance d, a difference is

    same        where the interval lies within -d to d
    different   where it lies outside of them
    unknown     where it does neither: the traces are too short to tell, or one of them does not know the figure

An axis is different if any figure of it is, same if all that both traces know are, else unknown; so is the whole, over
the axes that both traces know. Two short traces are unknown even if they are equal.

Arrivals and failures come in clusters: they are resampled in blocks of `block_s`, which keeps what happens within one
(moving-block bootstrap, Kuensch, Ann. Stat. 17, 1989). Lengths, gaps in sessions and latencies are resampled row by
row, so their intervals are the least uncertainty there is. Quantiles are drawn exactly: the k-th of n resampled values
is the original one of rank ceil(n U), U ~ Beta(k, n - k + 1). KS distances have the interval of Dvoretzky, Kiefer &
Wolfowitz with Massart's constant (1990), half of the error probability for each trace.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.conversations import session_gaps
from traces.failures import is_failure
from traces.latency import MEASURES
from traces.lengths import LengthCounts, count_lengths, nearest_rank
from traces.record import Outcome
from traces.table import view

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

WINDOWS_S: Final = (1, 10, 60)
"""Windows of the indices of dispersion."""
MIN_CELLS: Final = 20
"""Cells that a trace needs for intervals: under 20 windows a dispersion says nothing."""
MIN_TAIL: Final = 5
"""Values that a sample needs on either side of a quantile, and MIN_ROWS in all for a mean: under them resampling
repeats the few that there are, and finds certainty where there is none."""
MIN_ROWS: Final = 30
MAX_CELLS: Final = 1_000_000
MAX_BLOCKS: Final = 20_000
"""Blocks that one resampling draws; of a trace with more of them, each is longer."""
THIN: Final = 100_000
"""Order statistics that a sample is thinned to: its distribution function moves by 1 / 200,000 at most."""
SHARES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Verdict(enum.StrEnum):
    """What a comparison says."""

    SAME = "same"
    DIFFERENT = "different"
    UNKNOWN = "unknown"


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tolerances are relative differences, but for failure_tolerance, of shares, and ks_tolerance, of distances."""

    seed: int = 0
    rounds: int = 400
    confidence: float = 0.95
    block_s: float = 1200.0
    """Length of a block of arrivals; a quarter of the trace where that is less."""
    arrival_tolerance: float = 0.1
    length_tolerance: float = 0.05
    session_tolerance: float = 0.1
    latency_tolerance: float = 0.1
    failure_tolerance: float = 0.005
    ks_tolerance: float = 0.05


class Difference(msgspec.Struct, frozen=True):
    """One figure of both traces. difference: b / a - 1, or b - a where not `is_relative`; low, high its interval."""

    name: str
    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    is_relative: bool
    verdict: Verdict


class Distance(msgspec.Struct, frozen=True):
    """Two samples of a_n and b_n values. ks: sup |F_a - F_b|; wasserstein: in the unit of the values, no verdict."""

    name: str
    a_n: int
    b_n: int
    ks: float
    ks_low: float
    ks_high: float
    wasserstein: float
    verdict: Verdict


class Axis(msgspec.Struct, frozen=True):
    """One side of a workload. `is_known` says whether both traces have figures of it."""

    name: str
    """`arrivals`, `lengths`, `sessions`, `failures` or `latency`."""
    verdict: Verdict
    is_known: bool
    differences: tuple[Difference, ...]
    distances: tuple[Distance, ...]


class Comparison(msgspec.Struct, frozen=True):
    """The outcome, with the options that it rests on."""

    verdict: Verdict
    a_requests: int
    b_requests: int
    axes: tuple[Axis, ...]
    options: Options


@dataclass(frozen=True, slots=True)
class _Figure:
    """A figure of one trace and its bootstrap draws, shape (rounds,); no draws where it has no interval."""

    value: float | None
    draws: Array


@dataclass(frozen=True, slots=True)
class _Sample:
    """n values: `cumulative[i]` of them are values[i] or less. Both shape (k,), ascending."""

    values: Array
    cumulative: Array
    n: int

    def at_rank(self, rank: Array) -> Array:
        return self.values[np.minimum(np.searchsorted(self.cumulative, rank), len(self.values) - 1)]

    def share_up_to(self, values: Array) -> Array:
        return np.concatenate(([0.0], self.cumulative))[np.searchsorted(self.values, values, side="right")] / self.n


def compare(a: pl.DataFrame, b: pl.DataFrame, options: Options | None = None) -> Comparison:
    """Two tables sorted by `received_at`, compared on all axes. The same options give the same result.

    Raises ValueError for options that are out of range.
    """
    options = options or Options()
    check_options(options)
    rng = np.random.default_rng(options.seed)
    blocks = [_block_figures(table, options, rng) for table in (a, b)]
    axes = (
        _arrivals(blocks, options),
        _lengths(a, b, options, rng),
        _sessions(a, b, options, rng),
        _failures([a, b], blocks, options, rng),
        _latency(a, b, options, rng),
    )
    verdict = together(axis.verdict for axis in axes if axis.is_known)
    return Comparison(verdict, a.height, b.height, axes, options)


def check_options(options: Options) -> None:
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


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """Different if any is, same if all are."""
    seen = set(verdicts)
    if Verdict.DIFFERENT in seen:
        return Verdict.DIFFERENT
    return Verdict.SAME if seen == {Verdict.SAME} else Verdict.UNKNOWN


def axis_of(name: str, differences: Sequence[Difference], distances: Sequence[Distance] = ()) -> Axis:
    """An axis with the verdict of what both sides know of it."""
    known = [each.verdict for each in differences if each.a is not None and each.b is not None]
    known += [each.verdict for each in distances]
    return Axis(name, together(known), bool(known), tuple(differences), tuple(distances))


def judge(low: float, high: float, tolerance: float) -> Verdict:
    """What an interval says of a difference."""
    if -tolerance <= low and high <= tolerance:
        return Verdict.SAME
    return Verdict.DIFFERENT if low > tolerance or high < -tolerance else Verdict.UNKNOWN


def _difference(
    name: str, figures: Sequence[_Figure], tolerance: float, options: Options, *, is_relative: bool = True
) -> Difference:
    """figures: of `a` and of `b`."""

    def of(a: Any, b: Any) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            # Two zeros differ by nothing; from zero to something there is no ratio.
            return np.asarray(np.where(a == b, 0.0, b / a - 1) if is_relative else b - a, dtype=np.float64)

    a, b = figures
    if a.value is None or b.value is None:
        return Difference(name, a.value, b.value, None, None, None, is_relative, Verdict.UNKNOWN)
    point = float(of(np.float64(a.value), np.float64(b.value)))
    draws = of(a.draws, b.draws) if len(a.draws) == len(b.draws) else np.empty(0)
    if not math.isfinite(point):
        return Difference(name, a.value, b.value, None, None, None, is_relative, Verdict.UNKNOWN)
    if not len(draws) or not np.isfinite(draws).all():
        return Difference(name, a.value, b.value, point, None, None, is_relative, Verdict.UNKNOWN)
    tail = (1 - options.confidence) / 2
    low, high = (float(edge) for edge in np.quantile(draws, [tail, 1 - tail]))
    return Difference(name, a.value, b.value, point, low, high, is_relative, judge(low, high, tolerance))


def _distance(name: str, samples: Sequence[_Sample | None], options: Options) -> list[Distance]:
    """samples: of `a` and of `b`. None, or one where both have values."""
    a, b = samples
    if a is None or b is None:
        return []
    from scipy.stats import wasserstein_distance  # type: ignore[import-untyped]

    grid = np.union1d(a.values, b.values)
    ks = float(np.abs(a.share_up_to(grid) - b.share_up_to(grid)).max())
    slack = sum(math.sqrt(math.log(4 / (1 - options.confidence)) / (2 * side.n)) for side in (a, b))
    low, high = max(ks - slack, 0.0), min(ks + slack, 1.0)
    moved = wasserstein_distance(a.values, b.values, *(np.diff(side.cumulative, prepend=0) for side in (a, b)))
    return [Distance(name, a.n, b.n, ks, low, high, float(moved), judge(low, high, options.ks_tolerance))]


def _sample(values: NDArray[Any]) -> _Sample | None:
    """Of the finite values; None where there is none."""
    known = np.sort(values[np.isfinite(values)])
    n = len(known)
    if not n:
        return None
    if n <= THIN:
        return _Sample(known.astype(np.float64), np.arange(1, n + 1).astype(np.float64), n)
    # The middle of each of THIN equal parts stands for it.
    middle = (np.arange(THIN) * 2 + 1) * n // (2 * THIN)
    return _Sample(known[middle].astype(np.float64), (np.arange(1, THIN + 1) * (n / THIN)).astype(np.float64), n)


def _sample_of(lengths: LengthCounts) -> _Sample | None:
    if not lengths.n:
        return None
    return _Sample(lengths.values.astype(np.float64), np.cumsum(lengths.counts).astype(np.float64), lengths.n)


def _quantile(sample: _Sample | None, share: float, options: Options, rng: np.random.Generator) -> _Figure:
    if sample is None:
        return _Figure(None, np.empty(0))
    rank = nearest_rank(share, sample.n)
    value = float(sample.at_rank(np.array([float(rank)]))[0])
    if min(rank, sample.n - rank) < MIN_TAIL:
        return _Figure(value, np.empty(0))
    draws = np.ceil(rng.beta(rank, sample.n - rank + 1, options.rounds) * sample.n)
    return _Figure(value, sample.at_rank(np.maximum(draws, 1.0)))


def _mean(lengths: LengthCounts, options: Options, rng: np.random.Generator) -> _Figure:
    n = lengths.n
    if not n:
        return _Figure(None, np.empty(0))
    rounds = options.rounds if n >= MIN_ROWS else 0
    draws = [float(rng.multinomial(n, lengths.counts / n) @ lengths.values) / n for _ in range(rounds)]
    return _Figure(float(lengths.values @ lengths.counts) / n, np.array(draws))


class _Cells:
    """Sums over equal cells of time, from the first stamp on, the last partial cell left out: what blocks add up.

    A cell is a minute where the trace has MIN_CELLS of them, else 10 s, else 1 s, and longer where more than MAX_CELLS
    would be needed. Columns: requests, failures, gaps, their sum and sum of squares (a gap belongs to the cell of its
    later arrival), for each of WINDOWS_S that fits into a cell the sum of squared counts, and for each way of failing
    how many did.
    """

    def __init__(self, table: pl.DataFrame) -> None:
        stamps_s = view(table["received_at"])
        span_s = float(stamps_s[-1] - stamps_s[0]) if len(stamps_s) else 0.0
        self.cell_s = next((width for width in (60, 10, 1) if span_s / width >= MIN_CELLS), 0)
        if not self.cell_s:
            self.sums = np.zeros((0, 0))
            return
        self.cell_s *= math.ceil(span_s / self.cell_s / MAX_CELLS)
        self.windows_s = [width for width in WINDOWS_S if self.cell_s % width == 0]
        cells = int(span_s // self.cell_s)
        stamps_s = stamps_s[: int(np.searchsorted(stamps_s, stamps_s[0] + cells * self.cell_s))]
        off_s: Array = stamps_s - stamps_s[0]
        # Rounding may put a stamp of the last cell one further.
        cell = np.minimum((off_s / self.cell_s).astype(np.int64), cells - 1)
        failed = is_failure(table)[: len(cell)]
        gaps_s = np.diff(off_s)
        columns = [
            np.bincount(cell, minlength=cells),
            np.bincount(cell[failed], minlength=cells),
            np.bincount(cell[1:], minlength=cells),
            np.bincount(cell[1:], gaps_s, cells),
            np.bincount(cell[1:], np.square(gaps_s), cells),
        ]
        for width_s in self.windows_s:
            window = (off_s / width_s).astype(np.int64)
            first = np.flatnonzero(np.concatenate(([True], window[1:] != window[:-1])))
            counts = np.diff(first, append=len(window))
            place = np.minimum(window[first] * width_s // self.cell_s, cells - 1)
            columns.append(np.bincount(place, np.square(counts), cells))
        self.outcomes = _outcomes([table])
        columns += [
            np.bincount(cell[(table["outcome"] == name).to_numpy()[: len(cell)]], minlength=cells)
            for name in self.outcomes
        ]
        self.sums = np.column_stack(columns).astype(np.float64)

    def draws(self, options: Options, rng: np.random.Generator) -> Array:
        """Sums over as many cells as there are, in blocks drawn with replacement; shape (rounds, columns + 1).

        The last column is the number of cells drawn.
        """
        cells = len(self.sums)
        length = max(1, min(round(options.block_s / self.cell_s), cells // 4), math.ceil(cells / MAX_BLOCKS))
        blocks = math.ceil(cells / length)
        totals = np.vstack((np.zeros(self.sums.shape[1]), np.cumsum(self.sums, axis=0)))
        in_block = totals[length:] - totals[:-length]
        drawn = np.stack(
            [in_block[rng.integers(0, len(in_block), blocks)].sum(axis=0) for _ in range(options.rounds)]
        )  # fmt: skip
        return np.column_stack((drawn, np.full(options.rounds, blocks * length)))

    def whole(self) -> Array:
        """As `draws`, of the trace itself; shape (1, columns + 1)."""
        return np.append(self.sums.sum(axis=0), len(self.sums))[None, :]

    def figures(self, sums: Array) -> dict[str, Array]:
        """Each figure of each row of `sums`, as `draws` has them; NaN where it is not defined."""
        requests, failures, gaps, gap_sum, gap_squares = sums[:, :5].T
        cells = sums[:, -1]
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_s = gap_sum / gaps
            found = {
                "rate_rps": requests / (cells * self.cell_s),
                "cv": np.sqrt(np.maximum(gap_squares / gaps - mean_s**2, 0)) / mean_s,
                "failure_rate": failures / requests,
            }
            for name, column in zip(self.outcomes, sums[:, 5 + len(self.windows_s) : -1].T, strict=True):
                found[name] = column / requests
            for column, width_s in enumerate(self.windows_s, start=5):
                windows = cells * (self.cell_s / width_s)
                mean = requests / windows
                found[f"dispersion_{width_s}s"] = (sums[:, column] / windows - mean**2) / mean
        return found


def _block_figures(table: pl.DataFrame, options: Options, rng: np.random.Generator) -> dict[str, _Figure]:
    cells = _Cells(table)
    if not len(cells.sums):
        return {}
    drawn, whole = cells.figures(cells.draws(options, rng)), cells.figures(cells.whole())
    return {
        name: _Figure(float(whole[name][0]) if np.isfinite(whole[name][0]) else None, values)
        for name, values in drawn.items()
    }


NOTHING: Final = _Figure(None, np.empty(0))


def _arrivals(blocks: Sequence[Mapping[str, _Figure]], options: Options) -> Axis:
    """Over whole cells; unknown for a trace of under MIN_CELLS seconds."""
    names = ("rate_rps", "cv", *(f"dispersion_{width_s}s" for width_s in WINDOWS_S))
    return axis_of(
        "arrivals",
        [
            _difference(name, [figures.get(name, NOTHING) for figures in blocks], options.arrival_tolerance, options)
            for name in names
        ],
    )


def _failures(
    tables: Sequence[pl.DataFrame],
    blocks: Sequence[Mapping[str, _Figure]],
    options: Options,
    rng: np.random.Generator,
) -> Axis:
    """The shares of requests that failed and of each outcome that either trace has, all rows, resampled by blocks.

    Where a trace is too short for blocks, or where none or all are so, of which every resample would be the same: draws
    of the share's posterior under Jeffreys' prior, Beta(rows that are so + 1/2, rest + 1/2).
    """

    def figure(table: pl.DataFrame, rows: Flags, resampled: _Figure) -> _Figure:
        if not table.height:
            return NOTHING
        there = int(np.count_nonzero(rows))
        share = there / table.height
        if 0 < share < 1 and len(resampled.draws) and np.isfinite(resampled.draws).all():
            return _Figure(share, resampled.draws)
        return _Figure(share, rng.beta(there + 0.5, table.height - there + 0.5, options.rounds))

    differences = []
    for name in ("failure_rate", *_outcomes(tables)):
        figures = [
            figure(
                table,
                is_failure(table) if name == "failure_rate" else (table["outcome"] == name).to_numpy(),
                each.get(name, NOTHING),
            )
            for table, each in zip(tables, blocks, strict=True)
        ]
        differences.append(_difference(name, figures, options.failure_tolerance, options, is_relative=False))
    return axis_of("failures", differences)


def _outcomes(tables: Sequence[pl.DataFrame]) -> list[str]:
    """The ways of failing that any of the tables has."""
    seen = {name for table in tables for name in table["outcome"].unique().drop_nulls().to_list()}
    return [outcome.value for outcome in Outcome if outcome is not Outcome.OK and outcome.value in seen]


def _lengths(a: pl.DataFrame, b: pl.DataFrame, options: Options, rng: np.random.Generator) -> Axis:
    """Of the rows that went well."""
    is_ok = pl.col("outcome") == Outcome.OK.value
    differences: list[Difference] = []
    distances: list[Distance] = []
    for name in ("request_tokens", "response_tokens"):
        counts = [count_lengths(table.lazy().filter(is_ok).select(name).collect()[name]) for table in (a, b)]
        means = [_mean(lengths, options, rng) for lengths in counts]
        differences.append(_difference(f"{name}_mean", means, options.length_tolerance, options))
        samples = [_sample_of(lengths) for lengths in counts]
        differences += _quantiles(name, samples, options.length_tolerance, options, rng)
        distances += _distance(name, samples, options)
    return axis_of("lengths", differences, distances)


def _quantiles(
    name: str, samples: Sequence[_Sample | None], tolerance: float, options: Options, rng: np.random.Generator
) -> list[Difference]:
    return [
        _difference(f"{name}_{label}", [_quantile(each, share, options, rng) for each in samples], tolerance, options)
        for label, share in SHARES.items()
    ]


def _sessions(a: pl.DataFrame, b: pl.DataFrame, options: Options, rng: np.random.Generator) -> Axis:
    """Turns of a session and the gaps between them."""
    found = [session_gaps(table) for table in (a, b)]
    turns = [count_lengths(pl.Series(sizes)) for sizes, _ in found]
    gaps = [_sample(gaps_s) for _, gaps_s in found]
    tolerance = options.session_tolerance
    differences = [
        _difference("turns_mean", [_mean(each, options, rng) for each in turns], tolerance, options),
        *_quantiles("gap_s", gaps, tolerance, options, rng),
    ]
    distances = [
        *_distance("turns", [_sample_of(each) for each in turns], options),
        *_distance("gap_s", gaps, options),
    ]
    return axis_of("sessions", differences, distances)


def _latency(a: pl.DataFrame, b: pl.DataFrame, options: Options, rng: np.random.Generator) -> Axis:
    """Of the rows that went well."""
    differences: list[Difference] = []
    distances: list[Distance] = []
    for name in MEASURES:
        samples = [_sample(view(table[name])[~is_failure(table)]) for table in (a, b)]
        differences += _quantiles(name, samples, options.latency_tolerance, options, rng)
        distances += _distance(name, samples, options)
    return axis_of("latency", differences, distances)
