"""What a trace holds, in one pass over its batches: `burstgate stats`.

Tokens, models, outcomes and log types are counted exactly, by value: memory follows the number of distinct values, not
of rows. Two things grow with the trace: its stamps (8 bytes a row, as inter-arrival gaps need them sorted) and sessions
(8 bytes each, a 64-bit hash; two of a million sessions share one with a probability of 3 in 10^8).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from traces.record import LogType, Outcome

FIELDS: Final = (
    "received_at", "session_id", "model", "request_tokens", "response_tokens", "log_type", "outcome",
)  # fmt: skip
"""Of a record: what a summary is made from."""
COMPACT_ROWS: Final = 100_000
"""Rows of partial counts that wait before they are added up."""
RENDERED_MODELS: Final = 20
"""Models that the terminal table shows; the summary itself has all."""

_VALUE_BITS: Final = 40
"""Of the 63 of a group and a value in one integer: tokens to 10^12, and four million models."""
_NO_COUNTS: Final = pl.DataFrame(schema={"group": pl.Int64(), "value": pl.Int64(), "n": pl.Int64()})
_OUTCOMES: Final = pl.Enum([str(outcome) for outcome in Outcome])
_OUTCOME: Final = pl.col("outcome").cast(_OUTCOMES).to_physical()
_OK: Final = list(Outcome).index(Outcome.OK)
# A row's group: 0 or 1 for the log type, and from the next bit on its model's number in polars' categories, from 1.
_GROUP: Final = (
    pl.col("model").cast(pl.Categorical()).to_physical().cast(pl.Int64).fill_null(-1).add(1) * 2
    + (pl.col("log_type") == LogType.CONVERSATION.value)
).alias("group")
_LOG_TYPE_NAME: Final = (
    pl.when(pl.col("group") % 2 == 1)
    .then(pl.lit(LogType.CONVERSATION.value))
    .otherwise(pl.lit(LogType.API.value))
    .alias("log_type")
)
_MODEL_NAME: Final = (
    pl.when(pl.col("group") >= 2)
    .then(pl.col("group") // 2 - 1)
    .cast(pl.UInt32)
    .cat.to(pl.Categorical())
    .cast(pl.String)
    .alias("model")
)


class TokenStats(msgspec.Struct, frozen=True):
    """Token counts over the rows with outcome `ok` whose count is known; None where there is no such row.

    Percentiles are nearest-rank: the smallest observed count that at least that share of the rows does not exceed.
    """

    requests: int
    sum: int | None
    mean: float | None
    p50: int | None
    p90: int | None
    p99: int | None
    max: int | None


class GroupStats(msgspec.Struct, frozen=True):
    """The requests of one model or one log type; `name` is None where the model is unknown."""

    name: str | None
    requests: int
    failures: int
    failure_rate: float
    request_tokens: TokenStats
    response_tokens: TokenStats


class Summary(msgspec.Struct, frozen=True):
    """A whole trace. Every row counts as a request, failed or not; None is unknown, as in a trace of no rows.

    rate_rps: requests / span_s, None when the span is 0. iat_mean_s and iat_cv: mean, and standard deviation / mean, of
    the gaps between consecutive stamps in their sorted order; cv is None when every gap is 0 and under two gaps.
    sessions: distinct session ids. failures: rows whose outcome is not `ok`.
    """

    requests: int
    first_received_at: float | None
    last_received_at: float | None
    span_s: float | None
    rate_rps: float | None
    iat_mean_s: float | None
    iat_cv: float | None
    sessions: int
    failures: int
    failure_rate: float | None
    request_tokens: TokenStats
    response_tokens: TokenStats
    by_outcome: dict[str, int]
    by_model: tuple[GroupStats, ...]
    by_log_type: tuple[GroupStats, ...]


def summarize(batches: Iterable[pl.DataFrame]) -> Summary:
    """The summary of a trace given in batches, sorted or not; of their columns it needs FIELDS."""
    stamps_s = array("d")
    outcomes, request, response = _Counts(), _Counts(), _Counts()
    sessions = _Sessions()
    for batch in batches:
        stamps_s.frombytes(batch["received_at"].to_numpy().tobytes())
        coded = batch.select(_GROUP, _OUTCOME.cast(pl.Int64).alias("outcome"), "request_tokens", "response_tokens")
        outcomes.add(coded["group"], coded["outcome"])
        ok = coded.filter(pl.col("outcome") == _OK)
        request.add(ok["group"], ok["request_tokens"])
        response.add(ok["group"], ok["response_tokens"])
        sessions.add(batch["session_id"])

    rows = outcomes.total().with_columns(
        pl.col("value").replace_strict(dict(enumerate(_OUTCOMES.categories)), return_dtype=pl.String).alias("outcome")
    )
    counts = tuple(each.with_columns(_MODEL_NAME, _LOG_TYPE_NAME) for each in (rows, request.total(), response.total()))
    by_outcome = rows.group_by("outcome").agg(pl.col("n").sum()).sort("n", "outcome", descending=[True, False])
    failures = _failures(rows)
    gaps = _gap_stats(np.frombuffer(stamps_s, dtype=np.float64))
    n = len(stamps_s)
    return Summary(
        requests=n,
        first_received_at=gaps.first_s,
        last_received_at=gaps.last_s,
        span_s=gaps.span_s,
        rate_rps=n / gaps.span_s if gaps.span_s else None,
        iat_mean_s=gaps.mean_s,
        iat_cv=gaps.cv,
        sessions=sessions.total(),
        failures=failures,
        failure_rate=failures / n if n else None,
        request_tokens=_token_stats(counts[1]),
        response_tokens=_token_stats(counts[2]),
        by_outcome=dict(by_outcome.iter_rows()),
        by_model=_groups("model", *counts),
        by_log_type=_groups("log_type", *counts),
    )


class _Counts:
    """How many rows have each pair of a group and a value, integers >= 0; rows without a value are left out."""

    def __init__(self) -> None:
        self._parts: list[pl.DataFrame] = [_NO_COUNTS]
        self._waiting = 0

    def add(self, groups: pl.Series, values: pl.Series) -> None:
        if not (_is_within(groups, 63 - _VALUE_BITS) and _is_within(values, _VALUE_BITS)):
            rows = pl.DataFrame({"group": groups, "value": values}).drop_nulls()
            part = rows.group_by("group", "value").agg(pl.len().cast(pl.Int64).alias("n"))
        else:  # both in one integer are counted five times as fast
            packed = (groups * (1 << _VALUE_BITS) + values).drop_nulls().alias("packed").value_counts(name="n")
            part = packed.select(
                (pl.col("packed") // (1 << _VALUE_BITS)).alias("group"),
                (pl.col("packed") % (1 << _VALUE_BITS)).alias("value"),
                pl.col("n").cast(pl.Int64),
            )
        self._parts.append(part)
        self._waiting += part.height
        # The sum so far is part 0: waiting for as much again keeps the work linear.
        if self._waiting > COMPACT_ROWS + self._parts[0].height:
            self.total()

    def total(self) -> pl.DataFrame:
        """The columns `group`, `value` and `n`, a row for each pair."""
        if len(self._parts) > 1:
            self._parts = [pl.concat(self._parts).group_by("group", "value").agg(pl.col("n").sum())]
        self._waiting = 0
        return self._parts[0]


def _is_within(values: pl.Series, bits: int) -> bool:
    return bool(values.is_between(0, (1 << bits) - 1).all())


class _Sessions:
    """How many different session ids were seen."""

    def __init__(self) -> None:
        self._known = np.empty(0, dtype=np.uint64)
        self._waiting: list[NDArray[np.uint64]] = []

    def add(self, session_ids: pl.Series) -> None:
        self._waiting.append(session_ids.drop_nulls().unique().hash().to_numpy())
        if sum(map(len, self._waiting)) > COMPACT_ROWS + len(self._known):
            self.total()

    def total(self) -> int:
        self._known = np.unique(np.concatenate([self._known, *self._waiting]))
        self._waiting = []
        return len(self._known)


class _Gaps(msgspec.Struct, frozen=True):
    first_s: float | None = None
    last_s: float | None = None
    span_s: float | None = None
    mean_s: float | None = None
    cv: float | None = None


def _gap_stats(stamps_s: NDArray[np.float64]) -> _Gaps:
    """Sorts `stamps_s` in place: it may be most of the memory in use."""
    if not len(stamps_s):
        return _Gaps()
    if (stamps_s[1:] < stamps_s[:-1]).any():
        stamps_s.sort()
    first_s, last_s = float(stamps_s[0]), float(stamps_s[-1])
    span_s, gaps = last_s - first_s, len(stamps_s) - 1
    if not gaps:
        return _Gaps(first_s, last_s, span_s)
    mean_s = span_s / gaps
    if gaps < 2 or not span_s:
        return _Gaps(first_s, last_s, span_s, mean_s)
    squares = 0.0
    for start in range(0, gaps, COMPACT_ROWS):
        off_s = np.diff(stamps_s[start : start + COMPACT_ROWS + 1]) - mean_s
        squares += float(off_s @ off_s)
    return _Gaps(first_s, last_s, span_s, mean_s, (squares / gaps) ** 0.5 / mean_s)


def _failures(rows: pl.DataFrame) -> int:
    return int(rows.filter(pl.col("outcome") != Outcome.OK.value)["n"].sum()) if rows.height else 0


def _token_stats(counts: pl.DataFrame) -> TokenStats:
    if not counts.height:
        return TokenStats(0, None, None, None, None, None, None)
    by_value = counts.group_by("value").agg(pl.col("n").sum()).sort("value")
    values, cumulative = by_value["value"], by_value["n"].cum_sum().to_numpy()
    requests = int(cumulative[-1])
    # Python's integers: a sum of counts may pass 64 bits.
    total = sum(value * n for value, n in by_value.iter_rows())

    def percentile(percent: int) -> int:
        rank = -(-percent * requests // 100)
        return int(values[int(np.searchsorted(cumulative, rank))])

    p50, p90, p99 = map(percentile, (50, 90, 99))
    return TokenStats(requests, total, total / requests, p50, p90, p99, int(values[-1]))


def _groups(column: str, rows: pl.DataFrame, request: pl.DataFrame, response: pl.DataFrame) -> tuple[GroupStats, ...]:
    """By number of requests, then by name."""
    groups = []
    sizes = rows.group_by(column).agg(pl.col("n").sum()).sort("n", column, descending=[True, False])
    for name, requests in sizes.iter_rows():
        is_here = pl.col(column).eq_missing(pl.lit(name, dtype=pl.String))
        failures = _failures(rows.filter(is_here))
        groups.append(
            GroupStats(
                name=name,
                requests=requests,
                failures=failures,
                failure_rate=failures / requests,
                request_tokens=_token_stats(request.filter(is_here)),
                response_tokens=_token_stats(response.filter(is_here)),
            )
        )
    return tuple(groups)


def render(summary: Summary, console: Console) -> None:
    """Print the summary as tables, with a word on what each number is."""
    console.print(_overview(summary))
    console.print(_tokens(summary))
    if not summary.requests:
        return
    console.print(_outcomes(summary))
    console.print(_breakdown("By model", summary.by_model[:RENDERED_MODELS], len(summary.by_model)))
    console.print(_breakdown("By log type", summary.by_log_type, len(summary.by_log_type)))


def plain_table(title: str, caption: str | None = None) -> Table:
    """An empty table for a terminal."""
    return Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )


def _overview(summary: Summary) -> Table:
    table = plain_table("Trace")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("what it is")
    for row in (
        ("requests", shown_number(summary.requests), "rows of the trace, failed ones too"),
        ("first", shown_stamp(summary.first_received_at), "earliest submission, UTC"),
        ("last", shown_stamp(summary.last_received_at), "latest submission, UTC"),
        ("span", shown_number(summary.span_s, " s"), "from the first to the last"),
        ("mean rate", shown_number(summary.rate_rps, " req/s"), "requests / span"),
        ("mean gap", shown_number(summary.iat_mean_s, " s"), "between one submission and the next"),
        ("CV of gaps", shown_number(summary.iat_cv), "std / mean: 1 as Poisson, > 1 bursty"),
        ("sessions", shown_number(summary.sessions), "different session ids (conversations)"),
        ("failures", shown_number(summary.failures), "requests whose outcome is not ok"),
        ("failure rate", shown_percent(summary.failure_rate), "failures / requests"),
    ):
        table.add_row(*row)
    return table


def _tokens(summary: Summary) -> Table:
    table = plain_table(
        "Tokens, over successful requests whose count is known",
        "request: the prompt; p90: nine of ten have this many or fewer",
    )
    table.add_column("")
    for heading in ("requests", "mean", "p50", "p90", "p99", "max", "sum"):
        table.add_column(heading, justify="right")
    for name, stats in (("request", summary.request_tokens), ("response", summary.response_tokens)):
        values = (stats.requests, stats.mean, stats.p50, stats.p90, stats.p99, stats.max, stats.sum)
        table.add_row(name, *map(shown_number, values))
    return table


def _outcomes(summary: Summary) -> Table:
    table = plain_table("How requests ended")
    table.add_column("outcome")
    table.add_column("requests", justify="right")
    table.add_column("share", justify="right")
    for outcome, requests in summary.by_outcome.items():
        table.add_row(outcome, shown_number(requests), shown_percent(requests / summary.requests))
    return table


def _breakdown(title: str, groups: Sequence[GroupStats], known: int) -> Table:
    hidden = f" ({known - len(groups):,} more are not shown)" if known > len(groups) else ""
    table = plain_table(title, f"in, out: request and response tokens, as above{hidden}")
    table.add_column("", min_width=16, overflow="fold")
    for heading in ("requests", "failures", "failed", "in p50 / p99", "out p50 / p99"):
        table.add_column(heading, justify="right")
    for group in groups:
        table.add_row(
            "(unknown)" if group.name is None else one_line(group.name),
            *map(shown_number, (group.requests, group.failures)),
            shown_percent(group.failure_rate),
            *(
                f"{shown_number(stats.p50)} / {shown_number(stats.p99)}" if stats.requests else "-"
                for stats in (group.request_tokens, group.response_tokens)
            ),
        )
    return table


def one_line(name: str) -> str:
    """A name that clients chose, safe for a terminal: no control characters, no markup, no line of its own length."""
    text = "".join(character if character.isprintable() else "?" for character in name)
    return escape(text if len(text) <= 60 else f"{text[:60]}...")


def shown_number(value: float | None, unit: str = "") -> str:
    """A figure for people; - where it is unknown."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}{unit}"
    return f"{value:,.3f}{unit}" if abs(value) >= 1 else f"{value:.3g}{unit}"


def shown_percent(share: float | None) -> str:
    """A share for people."""
    return "-" if share is None else f"{share:.2%}"


def shown_stamp(epoch_s: float | None) -> str:
    """A stamp, UTC, to the millisecond."""
    # numpy's calendar does not end at the year 9999.
    return "-" if epoch_s is None else str(np.datetime64(round(epoch_s * 1e3), "ms")).replace("T", " ")
