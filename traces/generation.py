"""A trace out of a WorkloadProfile, or out of an arrival process and lengths: batches in order of time.

    profile     each service's arrivals follow its slots, with the shape by moments or as its bursts say, so that the
                CV of gaps and counts in windows are the trace's; a session's turns follow its start. What went on
                before the start is generated too and left out, so that the rate is the same from the first second on
                (within BURN_IN_ROWS).
    process     one process is the arrivals of all requests together; there are no sessions

Turns, gaps and growth are drawn apart from each other; request and response lengths are drawn as pairs. Each service
and each purpose has its own stream of random numbers, spawned from the seed. Rows have what BurstGPT has but the
elapsed time, which nobody has spent: it is unknown. Failures keep their request's length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count, pairwise
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.arrivals import CHUNK, MAX_RATE_RPS, Process, Segment, arrival_times_s, take_until
from traces.batch import complete_batch
from traces.burstgpt import request_ids
from traces.profile import (
    HOUR_S,
    LEVELS,
    MAX_TOKENS,
    MONDAY_S,
    VERSION,
    WEEK_S,
    WINDOW_S,
    Lengths,
    Service,
    Sessions,
    Slot,
    WorkloadProfile,
)
from traces.record import LogType, Origin, Outcome, TokenSource
from traces.swings import COMMON_HOLD_S, HOLDS_S, MAX_BATCH, Bursts, Levels, level_blocks

SLAB_ROWS: Final = 32_768
"""Rows generated at once, about."""
MAX_SLAB_S: Final = 30 * 86_400.0
MAX_BURN_IN_S: Final = 30 * 86_400.0
BURN_IN_ROWS: Final = 2_000_000
"""Rows, about, that may be generated and left out before the start; they take some seconds."""
MIN_RATE_RPS: Final = 1e-6
"""A profile's: one request in 12 days. Below it generating is but a walk through empty hours."""
LAST_S: Final = 253_402_300_800.0
"""The year 10000, which no record reaches."""

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


def generate(
    profile: WorkloadProfile,
    *,
    seed: int,
    duration_s: float | None = None,
    rows: int | None = None,
    start_s: float = 0.0,
    rate_rps: float | None = None,
    process: Process | None = None,
    models: Sequence[str] = (),
    dataset: str = "generated",
) -> Iterator[pl.DataFrame]:
    """A trace in batches of `traces.batch.SCHEMA`, in order of time and in memory that does not grow.

    seed: the same gives the same bytes, and a longer trace begins with the shorter one.
    duration_s, rows: the trace ends at the first that is reached, or with the year 9999.
    start_s: epoch seconds; a profile's hours of the week are found by it, a process's time counts from it.
    rate_rps: the mean rate wanted. It scales the arrivals, not the gaps inside sessions.
    process: the arrivals of requests instead of the profile's; each is of a service by that service's share.
    models: names by model class; the rest are `model-N`. dataset: the rows' run_id, and part of their ids.
    Raises ValueError naming the option, the value and the rule.
    """
    if seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed}")
    if duration_s is not None and not 0 < duration_s < math.inf:
        raise ValueError(f"duration: expected seconds > 0, got {duration_s:g}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows: expected an integer >= 1, got {rows}")
    if not 0 <= start_s < LAST_S:
        raise ValueError(f"start: expected epoch seconds in the years 1970 to 9999, got {start_s:g}")
    if rate_rps is not None and not 0 < rate_rps <= MAX_RATE_RPS:
        raise ValueError(f"rate: expected above 0 to {MAX_RATE_RPS:g} requests/s, got {rate_rps:g}")
    mean_rps = profile.mean_rps if process is None else process.mean_rps
    if mean_rps <= 0 and (process is None or rate_rps is not None):
        raise ValueError("rate: expected a profile or process with a mean rate > 0, got 0")
    if process is None and (rate_rps or mean_rps) < MIN_RATE_RPS:
        raise ValueError(f"rate: expected at least {MIN_RATE_RPS:g} requests/s, got {rate_rps or mean_rps:g}")
    scale = 1.0 if rate_rps is None else rate_rps / mean_rps
    seeds = np.random.SeedSequence(seed)
    end_s = math.inf if duration_s is None else start_s + duration_s
    if process is None:
        parts = _by_services(profile, seeds, start_s, min(end_s, LAST_S), scale)
    else:
        parts = _by_process(profile, seeds, start_s, process.scaled(scale))
    return _batches(_cut(parts, min(end_s, LAST_S), rows), profile, models, dataset, f"{dataset}-{seed}")


def plain_profile(lengths: Lengths) -> WorkloadProfile:
    """A profile of API requests to one model, for `generate` with a process: it knows lengths and no arrivals."""
    service = Service(0, LogType.API, 1, 0.0, 0.0, (Slot(1.0, 1.0, 1.0, 0),), lengths)
    return WorkloadProfile(VERSION, 0, 0.0, False, LEVELS, (service,))


def fixed_lengths(request_tokens: int, response_tokens: int) -> Lengths:
    """Every request and every response of one length. Raises ValueError for a length below 1 or past MAX_TOKENS."""
    for name, tokens in (("request tokens", request_tokens), ("response tokens", response_tokens)):
        if not 1 <= tokens <= MAX_TOKENS:
            raise ValueError(f"{name}: expected 1 to {MAX_TOKENS}, got {tokens}")
    request, response = ((float(tokens),) * len(LEVELS) for tokens in (request_tokens, response_tokens))
    return Lengths(request, response, ((1.0,),), 0.0)


def zipf_lengths(theta: float, max_tokens: int) -> Lengths:
    """Lengths by Zipf's law, P(n) ~ n^-theta for n = 1 to max_tokens; request and response apart from each other.

    theta: 1.1 is the paper's, whose sum over all n would have no mean; hence the end, which the paper does not name.
    Raises ValueError for theta outside 0 to 10 or max_tokens outside 1 to 2^20.
    """
    if not 0 <= theta <= 10:
        raise ValueError(f"theta: expected 0 to 10, got {theta:g}")
    if not 1 <= max_tokens <= 1 << 20:
        raise ValueError(f"max tokens: expected 1 to {1 << 20}, got {max_tokens}")
    cumulative = np.cumsum(np.arange(1, max_tokens + 1, dtype=np.float64) ** -theta)
    places = np.searchsorted(cumulative, np.array(LEVELS) * cumulative[-1])
    tokens = tuple((np.minimum(places, max_tokens - 1) + 1.0).tolist())
    return Lengths(tokens, tokens, ((1.0,),), theta)


def _cut(parts: Iterator[pl.DataFrame], end_s: float, rows: int | None) -> Iterator[pl.DataFrame]:
    """The parts up to the end, none empty."""
    left = rows
    for part in parts:
        ends = bool(part.height) and part["at_s"][-1] >= end_s
        kept = part.head(int(np.searchsorted(part["at_s"].to_numpy(), end_s))) if ends else part
        kept = kept if left is None else kept.head(left)
        if kept.height:
            yield kept
        if left is not None:
            left -= kept.height
        if ends or left == 0:
            return


def _batches(
    parts: Iterator[pl.DataFrame], profile: WorkloadProfile, models: Sequence[str], dataset: str, prefix: str
) -> Iterator[pl.DataFrame]:
    numbers = [service.model for service in profile.services]
    names = pl.Series([models[number] if number < len(models) else f"model-{number}" for number in numbers])
    log_types = pl.Series([str(service.log_type) for service in profile.services])
    done = 0
    for part in parts:
        micros = np.round(part["at_s"].to_numpy() * 1e6).astype(np.int64)
        failed = pl.col("is_failure")
        yield complete_batch(
            part.select(
                request_ids(micros, done, dataset),
                pl.Series("received_at", micros / 1e6),
                pl.when(pl.col("session") >= 0)
                .then(pl.format("{}-{}-{}", pl.lit(prefix), "service", "session"))
                .alias("session_id"),
                names.gather(part["service"]).alias("model"),
                log_types.gather(part["service"]).alias("log_type"),
                "request_tokens",
                pl.when(~failed).then("response_tokens").alias("response_tokens"),
                pl.when(failed).then(pl.lit(str(Outcome.UPSTREAM_ERROR))).otherwise(pl.lit(str(Outcome.OK))).alias("outcome"),
                pl.when(failed).then(pl.lit(str(TokenSource.NONE))).otherwise(pl.lit(str(TokenSource.USAGE))).alias("token_source"),
                pl.lit(str(Origin.IMPORTED)).alias("origin"),
                pl.lit(dataset).alias("run_id"),
            )
        )  # fmt: skip
        done += part.height


def _by_process(
    profile: WorkloadProfile, seeds: np.random.SeedSequence, start_s: float, process: Process
) -> Iterator[pl.DataFrame]:
    arrivals, mix, *lengths = map(np.random.default_rng, seeds.spawn(2 + len(profile.services)))
    shares = np.cumsum([service.mean_rps for service in profile.services])
    draws = [_Rows(number, each, profile, lengths[number]) for number, each in enumerate(profile.services)]
    for times_s in arrival_times_s(process.segments(), arrivals):
        service = np.searchsorted(shares, mix.random(len(times_s)) * shares[-1], side="right")
        parts = [
            draw.independent(start_s + times_s[here])
            for number, draw in enumerate(draws)
            if len(here := np.flatnonzero(service == number))
        ]
        yield _in_order(parts)


def _by_services(
    profile: WorkloadProfile, seeds: np.random.SeedSequence, start_s: float, end_s: float, scale: float
) -> Iterator[pl.DataFrame]:
    peak_rps = scale * sum(
        max(slot.rate_rps for slot in service.slots) * (service.sessions.mean_turns if service.sessions else 1.0)
        for service in profile.services
    )
    slab_s = min(SLAB_ROWS / peak_rps, MAX_SLAB_S)
    of_services, common = seeds.spawn(len(profile.services)), seeds.spawn(len(HOLDS_S))
    streams = [
        _Stream(number, service, profile, seed, common, start_s, scale, slab_s)
        for number, (service, seed) in enumerate(zip(profile.services, of_services, strict=True))
        if service.mean_rps > 0
    ]
    for number in range(1, math.ceil((end_s - start_s) / slab_s) + 1):
        yield _in_order([stream.take(start_s + number * slab_s) for stream in streams])


def _in_order(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(parts).sort("at_s", "service", "session", "turn", maintain_order=True)


class _Stream:
    """One service's rows in time."""

    def __init__(
        self,
        number: int,
        service: Service,
        profile: WorkloadProfile,
        seed: np.random.SeedSequence,
        common_seeds: Sequence[np.random.SeedSequence],
        start_s: float,
        scale: float,
        slab_s: float,
    ) -> None:
        arrivals, levels, rows = map(np.random.default_rng, seed.spawn(3))
        self._rows = _Rows(number, service, profile, rows)
        self._sessions = service.sessions
        self._start_s = start_s
        self._pending: list[pl.DataFrame] = []
        self._session_count = 0
        burn_in_s = 0.0
        if service.sessions is not None:
            burn_in_s = min(service.sessions.span_p99_s, BURN_IN_ROWS / (service.mean_rps * scale), MAX_BURN_IN_S)
        first_s = start_s - burn_in_s
        if service.bursts is not None:
            own = seed.spawn(len(HOLDS_S))
            blocks = level_blocks(
                service.bursts.swings,
                [
                    common if profile.has_common_levels and hold_s >= COMMON_HOLD_S else each
                    for hold_s, common, each in zip(HOLDS_S, common_seeds, own, strict=True)
                ],
            )
        self._starts_s = take_until(
            arrival_times_s(_segments(service, first_s, scale, levels), arrivals)
            if service.bursts is None
            else _bursty_times_s(service, service.bursts, blocks, first_s, scale, arrivals, levels)
        )
        for step in range(math.floor(burn_in_s / slab_s), 0, -1):
            self._begin(start_s - step * slab_s)
        self._begin(start_s)

    def take(self, until_s: float) -> pl.DataFrame:
        """The rows before `until_s` that were not yet taken."""
        self._begin(until_s)
        whole = pl.concat(self._pending)
        is_due = whole["at_s"] < until_s
        self._pending = [whole.filter(~is_due)]
        return whole.filter(is_due)

    def _begin(self, until_s: float) -> None:
        """Draw what starts before `until_s`, with all that follows from it and is not before the start."""
        starts_s = self._starts_s(until_s)
        if self._sessions is None:
            rows = self._rows.independent(starts_s)
        else:
            rows = self._rows.sessions(self._sessions, starts_s, self._session_count)
            self._session_count += len(starts_s)
        self._pending.append(rows.filter(pl.col("at_s") >= self._start_s))


def _segments(service: Service, start_s: float, scale: float, rng: np.random.Generator) -> Iterator[Segment]:
    """The service's rate in epoch time, for ever; a level is drawn for each window where levels vary."""
    variance = service.level_variance
    if variance == 0 and len(service.slots) == 1:
        yield Segment(start_s, math.inf, service.slots[0].rate_rps * scale, service.slots[0].shape)
        return
    width_s = WINDOW_S if variance else HOUR_S
    for first, last in pairwise(count(math.floor(start_s / width_s))):
        slot = _slot(service, first * width_s)
        level = rng.gamma(1 / variance, variance) if variance else 1.0
        rate_rps = min(slot.rate_rps * scale * level, MAX_RATE_RPS)
        yield Segment(max(first * width_s, start_s), last * width_s, rate_rps, slot.shape)


def _slot(service: Service, at_s: float) -> Slot:
    return service.slots[int((at_s - MONDAY_S) % WEEK_S // HOUR_S) % len(service.slots)]


def _bursty_times_s(
    service: Service,
    bursts: Bursts,
    levels: Callable[[float, float], Levels],
    start_s: float,
    scale: float,
    arrivals: np.random.Generator,
    sizes: np.random.Generator,
) -> Iterator[Array]:
    """The arrivals of a service with bursts, as `arrival_times_s` gives them: hour by hour, each in its own tau."""
    hour, taus = Levels(np.empty(0), np.empty(0)), np.empty(0)

    def segments() -> Iterator[Segment]:
        nonlocal hour, taus
        for first, last in pairwise(count(math.floor(start_s / HOUR_S))):
            slot = _slot(service, first * HOUR_S)
            hour = levels(max(first * HOUR_S, start_s), last * HOUR_S)
            rates_rps = np.full(len(hour.values), slot.rate_rps * scale / bursts.batch)
            if bursts.batch == 1:
                rates_rps = np.minimum(rates_rps * hour.values, MAX_RATE_RPS)
            ends_s = np.append(hour.starts_s[1:], last * HOUR_S)
            taus = np.concatenate(([0.0], np.cumsum((ends_s - hour.starts_s) * rates_rps)))
            yield Segment(0.0, float(taus[-1]), 1.0, slot.shape if bursts.shape is None else bursts.shape)

    for each in arrival_times_s(segments(), arrivals):
        end_s = math.floor(hour.starts_s[0] / HOUR_S + 1) * HOUR_S
        times_s = np.interp(each, taus, np.append(hour.starts_s, end_s))
        if bursts.batch == 1:
            yield times_s
            continue
        more = (bursts.batch - 1) * hour.values[np.searchsorted(hour.starts_s, times_s, side="right") - 1]
        if bursts.batch_variance:
            more *= sizes.gamma(1 / bursts.batch_variance, bursts.batch_variance, len(more))
        rows = np.minimum(1 + np.floor(more + sizes.random(len(more))), MAX_BATCH).astype(np.int64)
        step = max(1, int(CHUNK / bursts.batch))
        for here in range(0, len(rows), step):
            yield np.repeat(times_s[here : here + step], rows[here : here + step])


class _Rows:
    """Draws all of a row but its time, for one service."""

    def __init__(self, number: int, service: Service, profile: WorkloadProfile, rng: np.random.Generator) -> None:
        self._number = number
        self._failure_share = service.failure_share
        self._lengths = service.lengths
        self._levels = np.array(profile.levels)
        self._rng = rng
        if service.lengths is not None:
            self._copula = np.cumsum(np.array(service.lengths.copula), axis=1)

    def independent(self, at_s: Array) -> pl.DataFrame:
        """Rows without a session."""
        ranks = self._rng.random(len(at_s))
        return self._frame(at_s, np.full(len(at_s), -1), np.zeros(len(at_s), dtype=np.int64), ranks, None)

    def sessions(self, sessions: Sessions, starts_s: Array, first: int) -> pl.DataFrame:
        """Whole sessions, numbered from `first`: their rows by session and turn."""
        rng = self._rng
        turns, shares = (np.array(column) for column in zip(*sessions.turns, strict=True))
        cumulative = np.cumsum(shares)
        places = np.searchsorted(cumulative, rng.random(len(starts_s)) * cumulative[-1], side="right")
        sizes = turns.astype(np.int64)[places]
        heads = np.cumsum(sizes) - sizes
        n = int(sizes.sum())
        session = np.repeat(np.arange(len(sizes)), sizes)
        gaps_s = np.interp(rng.random(n), self._levels, sessions.turn_gap_s)
        gaps_s[heads] = 0.0
        since_s = np.cumsum(gaps_s)
        at_s = starts_s[session] + (since_s - since_s[heads][session])
        request = self._histories(sessions, sizes, heads) if sessions.first_request else None
        ranks = rng.random(n)
        return self._frame(at_s, first + session, np.arange(n) - heads[session], ranks, request)

    def _histories(self, sessions: Sessions, sizes: Ints, heads: Ints) -> Array | None:
        """Request tokens, a session's turns one after another; None where nothing is known of how they go on."""
        if self._lengths is None or not (sessions.growth or sizes.max(initial=1) == 1):
            return None
        least, most = self._lengths.request[0], self._lengths.request[-1]
        tokens = np.empty(int(sizes.sum()))
        tokens[heads] = np.rint(np.interp(self._rng.random(len(heads)), self._levels, sessions.first_request))
        edges = np.array([growth.after_tokens for growth in sessions.growth])
        tables = np.array([growth.quantiles for growth in sessions.growth])
        # The longest first: those that have a turn are then the beginning of the list.
        order = np.argsort(-sizes, kind="stable")
        heads, sizes = heads[order], sizes[order]
        for turn in range(1, int(sizes.max(initial=1))):
            here = heads[: int(np.searchsorted(-sizes, -turn))] + turn
            before = tokens[here - 1]
            table = np.maximum(np.searchsorted(edges, before, side="right") - 1, 0)
            rank = self._rng.random(len(here))
            level = np.minimum(np.searchsorted(self._levels, rank, side="right") - 1, len(self._levels) - 2)
            part = (rank - self._levels[level]) / (self._levels[level + 1] - self._levels[level])
            grown = tables[table, level] * (1 - part) + tables[table, level + 1] * part
            tokens[here] = np.clip(np.rint(before + grown), least, most)
        return tokens

    def _frame(self, at_s: Array, session: Ints, turn: Ints, ranks: Array, request: Array | None) -> pl.DataFrame:
        n = len(at_s)
        is_failure = self._rng.random(n) < self._failure_share
        columns = {
            "at_s": at_s,
            "service": np.full(n, self._number, dtype=np.uint32),
            "session": session,
            "turn": turn,
            "is_failure": is_failure,
        }
        if self._lengths is None:
            tokens = {name: pl.Series([None] * n, dtype=pl.Int64) for name in ("request_tokens", "response_tokens")}
            return pl.DataFrame({**columns, **tokens})
        if request is None:
            request = np.rint(np.interp(ranks, self._levels, self._lengths.request))
        else:
            ranks = self._ranks(request, ranks)
        grid = len(self._copula)
        rows = np.minimum((ranks * grid).astype(np.int64), grid - 1)
        picks, inside = self._rng.random(n), self._rng.random(n)
        places = np.minimum((self._copula[rows] <= picks[:, None]).sum(axis=1), grid - 1)
        response = np.rint(np.interp((places + inside) / grid, self._levels, self._lengths.response))
        columns["request_tokens"] = request.astype(np.int64)
        columns["response_tokens"] = response.astype(np.int64)
        return pl.DataFrame(columns)

    def _ranks(self, request: Array, uniform: Array) -> Array:
        """Where each request lies in the distribution of all, 0 to 1; in a run of equal quantiles anywhere."""
        assert self._lengths is not None
        quantiles: Array = np.array(self._lengths.request)
        last = len(quantiles) - 1
        left = np.searchsorted(quantiles, request)
        right = np.searchsorted(quantiles, request, side="right") - 1
        low, high = np.minimum(left, last), np.clip(right, 0, last)
        within = self._levels[low] + uniform * (self._levels[high] - self._levels[low])
        ranks: Array = np.where(right >= left, within, np.interp(request, quantiles, self._levels))
        return ranks
