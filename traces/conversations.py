"""Conversations: the rows of one session, in order of submission.

A row without a session belongs to none. A session that the trace cuts counts as what is left of it. Rows that failed
are turns too; where their lengths are unknown, growth across them is.

    gap      from one submission to the next of the same session
    think    from the end of a turn's answer to the next submission: the gap minus `elapsed_s`, where that is known; a
             next turn submitted before that end has no think time and is counted as overlapping
    growth   a request's tokens minus those of the request before it: histories grow, and are cut
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.lengths import Distribution, distribution
from traces.table import view

SHOWN_TURNS: Final = 32
"""Turns whose lengths are described one by one."""

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


class TurnLengths(msgspec.Struct, frozen=True):
    """The rows that are the `turn`-th (from 1) of their session; tokens are None where no such row's are known."""

    turn: int
    requests: int
    request_tokens: Distribution | None
    response_tokens: Distribution | None


class Switches(msgspec.Struct, frozen=True):
    """Changes of model from one turn to the next; turns of unknown model are passed over."""

    switches: int
    sessions: int
    """Sessions that have any."""
    session_share: float | None
    """Of sessions with two turns or more."""


class Conversations(msgspec.Struct, frozen=True):
    """All sessions of a trace. Durations in seconds; an empty sample is None."""

    sessions: int
    requests: int
    without_session: int
    turns: Distribution | None
    """Requests a session."""
    turn_counts: tuple[tuple[int, int], ...]
    """Number of turns and the sessions that have it, ascending."""
    gap_s: Distribution | None
    gap_log_mean: float | None
    """mu and sigma of a lognormal fitted to the gaps above 0: the mean and standard deviation of their natural log."""
    gap_log_std: float | None
    zero_gaps: int
    """Turns submitted at the very stamp of the one before; with whole-second stamps, within its second."""
    think_s: Distribution | None
    overlapping: int
    growth_tokens: Distribution | None
    duration_s: Distribution | None
    """First submission to the last, over sessions with two turns or more."""
    first_request_tokens: Distribution | None
    later_request_tokens: Distribution | None
    by_turn: tuple[TurnLengths, ...]
    """The first SHOWN_TURNS turns."""
    models: Switches


def describe_conversations(table: pl.DataFrame) -> Conversations:
    """The sessions of a table sorted by `received_at`."""
    rows = (
        table.lazy()
        .filter(pl.col("session").is_not_null())
        .select(
            "session",
            "received_at",
            "elapsed_s",
            "request_tokens",
            "response_tokens",
            model=pl.col("model").to_physical(),
        )
        .sort("session", maintain_order=True)
        .collect()
    )
    session = rows["session"].to_numpy()
    stamps_s = rows["received_at"].to_numpy()
    elapsed_s, request, response = (view(rows[name]) for name in ("elapsed_s", "request_tokens", "response_tokens"))
    n = len(session)
    goes_on: Flags = session[1:] == session[:-1]
    first = np.flatnonzero(np.concatenate((np.ones(min(n, 1), dtype=np.bool_), ~goes_on)))
    sizes = np.diff(first, append=n)
    gaps_s = np.diff(stamps_s)[goes_on]
    think_s = gaps_s - elapsed_s[:-1][goes_on]
    spans_s = stamps_s[first + sizes - 1] - stamps_s[first]
    log_mean, log_std = _log_moments(gaps_s)
    turns, sessions_with = np.unique(sizes, return_counts=True)
    is_first: Flags = np.zeros(n, dtype=np.bool_)
    is_first[first] = True
    return Conversations(
        sessions=len(first),
        requests=n,
        without_session=table.height - n,
        turns=distribution(sizes.astype(np.float64)),
        turn_counts=tuple(zip(turns.tolist(), sessions_with.tolist(), strict=True)),
        gap_s=distribution(gaps_s),
        gap_log_mean=log_mean,
        gap_log_std=log_std,
        zero_gaps=int(np.count_nonzero(gaps_s == 0)),
        think_s=distribution(think_s[think_s >= 0]),
        overlapping=int(np.count_nonzero(think_s < 0)),
        growth_tokens=distribution(np.diff(request)[goes_on]),
        duration_s=distribution(spans_s[sizes >= 2]),
        first_request_tokens=distribution(request[is_first]),
        later_request_tokens=distribution(request[~is_first]),
        by_turn=_by_turn(first, sizes, request, response),
        models=_switches(rows["model"], np.repeat(np.arange(len(first)), sizes), int(np.count_nonzero(sizes >= 2))),
    )


def session_gaps(table: pl.DataFrame) -> tuple[Ints, Array]:
    """The turns of each session, and the gaps in seconds between turns; of a table sorted by `received_at`."""
    rows = (
        table.lazy()
        .filter(pl.col("session").is_not_null())
        .select("session", "received_at")
        .sort("session", maintain_order=True)
        .collect()
    )
    session = rows["session"].to_numpy()
    goes_on: Flags = session[1:] == session[:-1]
    first = np.flatnonzero(np.concatenate((np.ones(min(len(session), 1), dtype=np.bool_), ~goes_on)))
    return np.diff(first, append=len(session)), np.diff(rows["received_at"].to_numpy())[goes_on]


def _log_moments(gaps_s: Array) -> tuple[float | None, float | None]:
    logs = np.log(gaps_s[gaps_s > 0])
    return (float(logs.mean()), float(logs.std())) if len(logs) else (None, None)


def _by_turn(first: Ints, sizes: Ints, request: NDArray[Any], response: NDArray[Any]) -> tuple[TurnLengths, ...]:
    described = []
    for turn in range(min(SHOWN_TURNS, int(sizes.max(initial=0)))):
        at = first[sizes > turn] + turn
        described.append(TurnLengths(turn + 1, len(at), distribution(request[at]), distribution(response[at])))
    return tuple(described)


def _switches(models: pl.Series, session: Ints, long_sessions: int) -> Switches:
    is_known = models.is_not_null().to_numpy()
    model, session = models.drop_nulls().to_numpy(), session[is_known]
    has_switched: Flags = (model[1:] != model[:-1]) & (session[1:] == session[:-1])
    switching = len(np.unique(session[1:][has_switched]))
    return Switches(
        switches=int(np.count_nonzero(has_switched)),
        sessions=switching,
        session_share=switching / long_sessions if long_sessions else None,
    )
