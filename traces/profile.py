"""What a site can publish instead of its trace: a WorkloadProfile, fitted from batches, and its JSON form.

A profile holds numbers about services; a service is the rows of one model class, log type and with or without sessions.
It holds no name, id or stamp: models are numbered by how often they are asked for. Without a least count it is no proof
of anonymity: of a service with few rows, quantiles may be single rows' values.

    arrivals    of requests, or where the service has sessions, of their first turns. By slot (the hours of the week in
                UTC from Monday 0:00, or one slot where the trace is under a week): the rate, and the Gamma shape of
                the gaps within 20-minute windows, by moments and by maximum likelihood. Stamps that are all whole
                seconds are first spread evenly inside their second, which hides burstiness within a second.
    bursts      where counts in windows of 1 s to 20 minutes vary more, or less, than such gaps explain, or where rows
                share stamps: how the rate swings, and how many rows come together (`traces.swings`)
    lengths     quantiles of request and response tokens at LEVELS and a copula: the share of each response rank bin in
                each request rank bin. Pairs are drawn together; a rank inside its bin is uniform.
    sessions    turns, gaps from one submission to the next, the first request's length, and quantiles of how much a
                request is longer than the one before it, by that one's length (histories grow, and are cut)

**Least count.** With `least` above 1 every number is of that many requests, or sessions, at least, so that none tells
of a single one. Stamps are cut to whole seconds and the span to whole minutes. A service of fewer requests, or
sessions, is left out. Neighbouring hours are pooled until they hold enough, and so are neighbouring numbers of turns.
A quantile is the mean of the `least` values around its rank, its ends too. Cells of the copula that hold fewer are 0,
and so is the share of fewer failures; counts of requests are multiples of it. It is no differential privacy: two
profiles of nearly the same trace may differ by what one request adds to a mean.

Lengths and sessions are fitted on all rows of a service, or where it has more, on a sample of SAMPLED_ROWS; arrivals,
failures and the mix always on all. `traces.generation` makes a trace of it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.arrivals import MAX_RATE_RPS, SHAPE_RANGE, ShapeFit, fit_gamma_shape
from traces.record import LogType, Outcome
from traces.swings import (
    COMMON_HOLD_S,
    HOLDS_S,
    MAX_BATCH,
    MAX_PEAK,
    MAX_VARIANCE,
    MIN_WINDOWS,
    Bursts,
    Counted,
    fit_bursts,
    have_common_levels,
)

VERSION: Final = 2
READABLE: Final = (1, VERSION)
"""Version 1 has no bursts."""
WINDOW_S: Final = 1200.0
"""The paper's window for the shape of gaps."""
HOUR_S: Final = 3600.0
WEEK_S: Final = 168 * HOUR_S
MONDAY_S: Final = 4 * 86_400.0
"""The first Monday 0:00 UTC after epoch zero, a Thursday."""
MIN_GAPS: Final = 50
"""Gaps that a slot's own shape needs; with fewer it has the service's."""
SAMPLED_ROWS: Final = 1_000_000
"""Rows of a service from which lengths, and turns, are fitted: quantiles of as many have errors below 0.001."""
MAX_MODELS: Final = 64
FITTED_MODELS: Final = 12
"""Model classes of a fit; rarer models are one class together, the last. A profile may have MAX_MODELS."""
DIGITS: Final = 7
"""Significant digits of what was fitted."""
PRIVATE_COUNT: Final = 20
"""The least count of `burstgate fit --privacy`."""
MAX_GRID: Final = 16
MAX_GROWTH_BINS: Final = 8
MAX_TURNS: Final = 100_000
MAX_SPAN_S: Final = 1e12
MAX_TOKENS: Final = 2**31 - 1

LEVELS: Final = (
    0.0,
    0.0005,
    0.002,
    0.005,
    *(step / 64 for step in range(1, 64)),
    0.99,
    0.995,
    0.998,
    0.9995,
    0.9999,
    1.0,
)
"""Where quantiles are kept: dense in the tail, as BurstGPT's longest request is 40 times its 99th percentile."""

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Table = tuple[tuple[float, ...], ...]


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arrivals in one slot; `gaps` says what the shapes were fitted on, 0 where they are the service's or 1."""

    rate_rps: float
    shape: float
    shape_mle: float
    gaps: int


class Lengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Joint lengths in tokens of the rows that went well."""

    request: tuple[float, ...]
    """Quantiles at the profile's levels, as `response`."""
    response: tuple[float, ...]
    copula: Table
    """Square; row r, column c: the share of request rank bin r whose response is in rank bin c."""
    request_theta: float
    """The exponent of a Zipf distribution cut at the longest request: the paper's theta."""


class Growth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How requests grow in a session: quantiles of the difference to the one before, of at least `after_tokens`."""

    after_tokens: float
    quantiles: tuple[float, ...]


class Sessions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sessions as they were seen: one that the trace cuts counts as what is left of it."""

    turns: tuple[tuple[int, float], ...]
    """Number of turns and the share of sessions that have it, in ascending order."""
    turn_gap_s: tuple[float, ...]
    """Quantiles, submission to submission."""
    first_request: tuple[float, ...]
    """Quantiles of the first turn's request tokens; empty where they are unknown, as is `growth`."""
    growth: tuple[Growth, ...]
    span_p99_s: float

    @property
    def mean_turns(self) -> float:
        """Requests a session."""
        return sum(turns * share for turns, share in self.turns) / sum(share for _, share in self.turns)


class Service(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model class and log type."""

    model: int
    """0 is the model asked for most."""
    log_type: LogType
    requests: int
    failure_share: float
    level_variance: float
    """Version 1's: each 20-minute window's rate is multiplied by Gamma(1 / v, mean 1). 0 since `bursts` say it."""
    slots: tuple[Slot, ...]
    lengths: Lengths | None = None
    """None where no row that went well has both counts."""
    sessions: Sessions | None = None
    bursts: Bursts | None = None
    """None where arrivals are renewals with the slots' rates and shapes."""

    @property
    def mean_rps(self) -> float:
        """Requests a second, over all slots."""
        starts_rps = math.fsum(slot.rate_rps for slot in self.slots) / len(self.slots)
        return starts_rps * (1.0 if self.sessions is None else self.sessions.mean_turns)


class WorkloadProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A workload. `encode_profile` and `decode_profile` are its JSON form."""

    burstgate_profile: int
    """The version of this form."""
    requests: int
    span_s: float
    has_whole_second_stamps: bool
    levels: tuple[float, ...]
    services: tuple[Service, ...]
    has_common_levels: bool = False
    """Whether services' slow swings are the same ones (`traces.swings`)."""
    least: int = 1
    """Requests, or sessions, that every number is of, at least."""

    @property
    def mean_rps(self) -> float:
        """Requests a second, all services together."""
        return math.fsum(service.mean_rps for service in self.services)


def encode_profile(profile: WorkloadProfile) -> bytes:
    """The profile as JSON on one line: indented, its thousands of numbers take twice the room."""
    return msgspec.json.encode(profile) + b"\n"


def decode_profile(data: bytes) -> WorkloadProfile:
    """The profile in `data`. Raises ValueError naming the place, the rule and the value."""
    try:
        version = msgspec.json.decode(data, type=_Version).burstgate_profile
        if version not in READABLE:
            raise ValueError(f"profile: burstgate_profile: expected version 1 to {VERSION}, got {version}")
        profile = msgspec.json.decode(data, type=WorkloadProfile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"profile: expected the JSON that burstgate fit writes: {error}") from error
    _check(profile)
    return profile


class _Version(msgspec.Struct, frozen=True):
    burstgate_profile: int


def _check(profile: WorkloadProfile) -> None:
    """What the types do not say, so that generating cannot fail on it."""
    levels = profile.levels
    _require(len(levels) >= 2 and levels[0] == 0 and levels[-1] == 1 and _rises(levels), "levels", "0 to 1, ascending")
    _require(bool(profile.services), "services", "at least one")
    for number, service in enumerate(profile.services):
        place = f"services[{number}]"
        _require(0 <= service.model < MAX_MODELS, f"{place}.model", f"0 to {MAX_MODELS - 1}")
        _require(0 <= service.failure_share <= 1, f"{place}.failure_share", "0 to 1")
        _require(0 <= service.level_variance <= 1e6, f"{place}.level_variance", "0 to 1e6")
        _require(len(service.slots) in (1, 168), f"{place}.slots", "1 slot or the 168 hours of a week")
        for slot in service.slots:
            _require(0 <= slot.rate_rps <= MAX_RATE_RPS, f"{place}.slots", f"rates of 0 to {MAX_RATE_RPS:g} requests/s")
            _require(SHAPE_RANGE[0] <= slot.shape <= SHAPE_RANGE[1], f"{place}.slots", "shapes of 0.001 to 1e6")
        if service.bursts is not None:
            _check_bursts(service.bursts, f"{place}.bursts")
        if service.lengths is not None:
            _check_lengths(service.lengths, levels, f"{place}.lengths")
        if service.sessions is not None:
            _check_sessions(service.sessions, levels, f"{place}.sessions")


def _check_bursts(bursts: Bursts, place: str) -> None:
    shape = 1.0 if bursts.shape is None else bursts.shape
    _require(SHAPE_RANGE[0] <= shape <= SHAPE_RANGE[1], f"{place}.shape", "0.001 to 1e6, or null")
    _require(1 <= bursts.batch <= MAX_BATCH, f"{place}.batch", f"1 to {MAX_BATCH:g} rows")
    _require(0 <= bursts.batch_variance <= MAX_VARIANCE, f"{place}.batch_variance", f"0 to {MAX_VARIANCE:g}")
    holds_s = [swing.hold_s for swing in bursts.swings]
    _require(
        _rises(holds_s) and set(holds_s) <= set(HOLDS_S),
        f"{place}.swings",
        f"holds of {', '.join(f'{hold_s:g}' for hold_s in HOLDS_S)} seconds, ascending",
    )
    for swing in bursts.swings:
        _require(0 <= swing.variance <= MAX_VARIANCE, f"{place}.swings", f"variances of 0 to {MAX_VARIANCE:g}")
    _require(
        math.prod(1 + swing.variance for swing in bursts.swings) <= MAX_PEAK * (1 + 1e-9),
        f"{place}.swings",
        f"variances whose product of 1 + variance is at most {MAX_PEAK:g}",
    )


def _check_lengths(lengths: Lengths, levels: tuple[float, ...], place: str) -> None:
    for name, values in (("request", lengths.request), ("response", lengths.response)):
        _require_quantiles(values, levels, 0, MAX_TOKENS, f"{place}.{name}")
    rows = lengths.copula
    is_square = bool(rows) and all(len(row) == len(rows) and min(row) >= 0 for row in rows)
    _require(
        is_square and all(math.isclose(sum(row), 1, abs_tol=1e-6) for row in rows),
        f"{place}.copula",
        "a square of shares >= 0 whose rows sum to 1",
    )


def _check_sessions(sessions: Sessions, levels: tuple[float, ...], place: str) -> None:
    turns = [turns for turns, _ in sessions.turns]
    _require(
        bool(turns) and turns[0] >= 1 and turns[-1] <= MAX_TURNS and _rises(turns),
        f"{place}.turns",
        f"1 to {MAX_TURNS}, ascending",
    )
    shares = [share for _, share in sessions.turns]
    _require(min(shares) >= 0 and math.isclose(sum(shares), 1, abs_tol=1e-6), f"{place}.turns", "shares that sum to 1")
    _require_quantiles(sessions.turn_gap_s, levels, 0, MAX_SPAN_S, f"{place}.turn_gap_s")
    if sessions.first_request:
        _require_quantiles(sessions.first_request, levels, 0, MAX_TOKENS, f"{place}.first_request")
    _require(_rises([growth.after_tokens for growth in sessions.growth]), f"{place}.growth", "ascending after_tokens")
    for growth in sessions.growth:
        _require_quantiles(growth.quantiles, levels, -MAX_TOKENS, MAX_TOKENS, f"{place}.growth")
    _require(0 <= sessions.span_p99_s <= MAX_SPAN_S, f"{place}.span_p99_s", f"0 to {MAX_SPAN_S:g} seconds")


def _require_quantiles(values: Sequence[float], levels: Sequence[float], least: float, most: float, place: str) -> None:
    _require(len(values) == len(levels), place, f"{len(levels)} numbers, one for each of the levels")
    is_sorted = all(a <= b for a, b in pairwise(values))
    _require(
        is_sorted and least <= values[0] and values[-1] <= most, place, f"ascending numbers, {least:g} to {most:g}"
    )


def _require(holds: bool, place: str, rule: str) -> None:
    if not holds:
        raise ValueError(f"profile: {place}: expected {rule}")


def _rises(values: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def fit_profile(batches: Iterable[pl.DataFrame], *, least: int = 1) -> WorkloadProfile:
    """The profile of a trace, sorted or not. Deterministic: what is random in it (ties, samples) has a fixed seed.

    least: the least count of the head of this file. batches: with at least the columns FIELDS.
    Memory: 8 bytes a row for its stamp and 16 a session; of lengths and of
    sessions' turns at most SAMPLED_ROWS of each service are kept, pairs at random and sessions whole.
    Raises ValueError for a trace without two different stamps, or in which nothing is left; for a `least` under 1.
    """
    if least < 1:
        raise ValueError(f"fit: least count: expected 1 or more, got {least}")
    rng = np.random.default_rng(0)
    classes: dict[str | None, int] = {}
    gathered: dict[tuple[int, str, bool], _Gathered] = {}
    first_s, last_s, rows, has_whole_stamps = math.inf, -math.inf, 0, True
    for batch in batches:
        frame = _needed(batch, classes)
        if least > 1:
            frame = frame.with_columns(pl.col("received_at").floor())
        if frame.is_empty():
            continue
        stamps_s = frame["received_at"].to_numpy()
        first_s, last_s = min(first_s, float(stamps_s.min())), max(last_s, float(stamps_s.max()))
        has_whole_stamps = has_whole_stamps and bool((stamps_s == np.floor(stamps_s)).all())
        rows += frame.height
        for (model, log_type, has_session), part in frame.group_by(
            "model", "log_type", pl.col("session").is_not_null().alias("has_session"), maintain_order=True
        ):
            key = (model, log_type, has_session)
            gathered.setdefault(key, _Gathered(has_session)).add(part, rng)
    if not first_s < last_s:
        raise ValueError(f"fit: expected rows with at least two different stamps, got {rows} rows without")
    span_s = last_s - first_s + has_whole_stamps
    services, counts = [], []
    windows = int(span_s // COMMON_HOLD_S)
    for (model, log_type, _), of_service in _ranked(gathered).items():
        if of_service.count() < least:
            continue
        counts.append(of_service.counts(first_s, COMMON_HOLD_S, windows))
        services.append(
            _fit_service(model, LogType(log_type), of_service, first_s, span_s, has_whole_stamps, rng, least)
        )
    if not services:
        raise ValueError(f"fit: expected a service of at least {least} requests and sessions, got none in {rows} rows")
    return WorkloadProfile(
        burstgate_profile=VERSION,
        requests=rows if least == 1 else sum(service.requests for service in services),
        span_s=span_s if least == 1 else max(60.0, span_s // 60 * 60),
        has_whole_second_stamps=has_whole_stamps,
        levels=LEVELS,
        services=tuple(sorted(map(_rounded, services), key=lambda s: (s.model, s.log_type, s.sessions is not None))),
        has_common_levels=windows >= MIN_WINDOWS and have_common_levels(counts),
        least=least,
    )


def _rounded(service: Service) -> Service:
    """The same to DIGITS digits, which is more than any of it is known to; whole numbers stay."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [short(each) for each in value]
        return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and value % 1 else value

    return msgspec.convert(short(msgspec.to_builtins(service)), Service)


FIELDS: Final = ("received_at", "session_id", "model", "request_tokens", "response_tokens", "log_type", "outcome")
"""Of a record: what a profile is made from."""


def _needed(batch: pl.DataFrame, classes: dict[str | None, int]) -> pl.DataFrame:
    """What the fit needs: sessions as hashes, models as classes, lengths only where both are known."""
    is_known = (
        (pl.col("outcome") == Outcome.OK.value)
        & pl.col("request_tokens").is_between(0, MAX_TOKENS)
        & pl.col("response_tokens").is_between(0, MAX_TOKENS)
    )
    return batch.select(
        pl.col("received_at").cast(pl.Float64),
        pl.when(pl.col("session_id").is_not_null()).then(pl.col("session_id").hash()).alias("session"),
        _numbered(batch["model"], classes),
        pl.when(is_known).then("request_tokens").cast(pl.Int32).alias("request_tokens"),
        pl.when(is_known).then("response_tokens").cast(pl.Int32).alias("response_tokens"),
        pl.col("log_type"),
        (pl.col("outcome") != Outcome.OK.value).alias("is_failure"),
    )


class _Gathered:
    """One service's rows so far, in bounded memory but for the stamps."""

    def __init__(self, has_session: bool) -> None:
        self.has_session = has_session
        self.requests = 0
        self.failures = 0
        self._stamps_s: list[Array] = []
        self._starts = _NO_STARTS
        self._waiting: list[pl.DataFrame] = []
        self._pairs = _NO_PAIRS
        self._turns = _NO_TURNS
        self._turns_of = 1 << 64
        """Sessions whose hash is below this are kept whole."""

    def add(self, rows: pl.DataFrame, rng: np.random.Generator) -> None:
        """Go on with these rows."""
        self.requests += rows.height
        self.failures += int(rows["is_failure"].sum())
        pairs = rows.select("request_tokens", "response_tokens").drop_nulls()
        self._keep_pairs(pairs.with_columns(draw=pl.Series(rng.random(pairs.height))))
        if self.has_session:
            self._waiting.append(rows.group_by("session").agg(pl.col("received_at").min()))
            if sum(part.height for part in self._waiting) > SAMPLED_ROWS + self._starts.height:
                self._merge_starts()
            self._keep_turns(rows.select("session", "received_at", "request_tokens"))
        else:
            self._stamps_s.append(rows["received_at"].to_numpy())

    def merge(self, other: _Gathered) -> None:
        """Go on with another service's rows."""
        self.requests += other.requests
        self.failures += other.failures
        self._stamps_s += other._stamps_s
        self._waiting += [other._starts, *other._waiting]
        self._turns_of = min(self._turns_of, other._turns_of)
        self._keep_pairs(other._pairs)
        self._keep_turns(other._turns)

    def count(self) -> int:
        """Requests, or where there are sessions, those."""
        if self.has_session:
            self._merge_starts()
            return self._starts.height
        return self.requests

    def starts_s(self) -> Array:
        """When requests arrived, or where there are sessions, their first turns; in order."""
        if self.has_session:
            self._merge_starts()
            return np.sort(self._starts["received_at"].to_numpy())
        return np.sort(np.concatenate(self._stamps_s))

    def counts(self, first_s: float, window_s: float, windows: int) -> Array:
        """How many requests, or first turns, came in each window from `first_s` on."""
        if self.has_session:
            self._merge_starts()
        counts = np.zeros(windows)
        for stamps_s in [self._starts["received_at"].to_numpy()] if self.has_session else self._stamps_s:
            place = ((stamps_s - first_s) // window_s).astype(np.int64)
            counts += np.bincount(place, minlength=windows)[:windows]
        return counts

    @property
    def pairs(self) -> tuple[Array, Array]:
        """Request and response tokens of rows of which both are known."""
        request, response = (self._pairs[name].to_numpy().astype(np.float64) for name in self._pairs.columns[:2])
        return request, response

    @property
    def turns(self) -> pl.DataFrame:
        """Whole sessions' session, received_at and request_tokens, in order of time."""
        return self._turns.sort("received_at", maintain_order=True)

    def _keep_pairs(self, pairs: pl.DataFrame) -> None:
        # Those with the smallest draws are a sample without replacement, however rows came in batches.
        self._pairs = pl.concat((self._pairs, pairs))
        if self._pairs.height > 2 * SAMPLED_ROWS:
            self._pairs = self._pairs.bottom_k(SAMPLED_ROWS, by="draw")

    def _keep_turns(self, turns: pl.DataFrame) -> None:
        self._turns = pl.concat((self._turns, turns if self._turns_of >= 1 << 64 else turns.filter(self._is_kept())))
        while self._turns.height > SAMPLED_ROWS and self._turns_of > 1:
            self._turns_of //= 2
            self._turns = self._turns.filter(self._is_kept())

    def _is_kept(self) -> pl.Expr:
        return pl.col("session") < pl.lit(self._turns_of, dtype=pl.UInt64)

    def _merge_starts(self) -> None:
        whole = pl.concat((self._starts, *self._waiting))
        self._starts, self._waiting = whole.group_by("session").agg(pl.col("received_at").min()), []


_NO_STARTS: Final = pl.DataFrame(schema={"session": pl.UInt64, "received_at": pl.Float64})
_NO_PAIRS: Final = pl.DataFrame(schema={"request_tokens": pl.Int32, "response_tokens": pl.Int32, "draw": pl.Float64})
_NO_TURNS: Final = pl.DataFrame(schema={"session": pl.UInt64, "received_at": pl.Float64, "request_tokens": pl.Int32})


def _ranked(gathered: Mapping[tuple[int, str, bool], _Gathered]) -> dict[tuple[int, str, bool], _Gathered]:
    """The same by rank of the model: 0 is the one asked for most, those past FITTED_MODELS are the last together."""
    sizes = np.zeros(1 + max(model for model, _, _ in gathered), dtype=np.int64)
    for (model, _, _), part in gathered.items():
        sizes[model] += part.requests
    ranks = np.empty(len(sizes), dtype=np.int64)
    ranks[np.argsort(-sizes, kind="stable")] = np.minimum(np.arange(len(sizes)), FITTED_MODELS - 1)
    ranked: dict[tuple[int, str, bool], _Gathered] = {}
    for (model, log_type, has_session), part in gathered.items():
        key = (int(ranks[model]), log_type, has_session)
        if key in ranked:
            ranked[key].merge(part)
        else:
            ranked[key] = part
    return ranked


def _numbered(names: pl.Series, classes: dict[str | None, int]) -> pl.Series:
    """The number of each row's class; names not seen before become the next classes."""
    for name in names.unique(maintain_order=True):
        classes.setdefault(name, len(classes))
    known = pl.DataFrame({"model": pl.Series(list(classes), dtype=pl.String), "class": range(len(classes))})
    rows = names.to_frame("model").join(known, on="model", how="left", nulls_equal=True, maintain_order="left")
    return rows["class"].cast(pl.UInt32).alias("model")


def _fit_service(
    model: int,
    log_type: LogType,
    rows: _Gathered,
    first_s: float,
    span_s: float,
    has_whole_stamps: bool,
    rng: np.random.Generator,
    least: int,
) -> Service:
    def spread(stamps_s: Array) -> Array:
        """In order; rows of one second stay in the file's order, as sessions' turns must not change places."""
        return np.sort(stamps_s + rng.random(len(stamps_s))) if has_whole_stamps else stamps_s

    sessions = None
    if rows.has_session:
        turns = rows.turns
        sessions = _fit_sessions(turns.with_columns(received_at=spread(turns["received_at"].to_numpy())), least)
    slots, bursts = _fit_arrivals(spread(rows.starts_s()), first_s, span_s, has_whole_stamps, least)
    return Service(
        model=model,
        log_type=log_type,
        requests=rows.requests // least * least,
        failure_share=rows.failures / rows.requests if rows.failures >= least else 0.0,
        level_variance=0.0,
        slots=slots,
        lengths=_fit_lengths(*rows.pairs, rng, least),
        sessions=sessions,
        bursts=bursts,
    )


def _fit_arrivals(
    stamps_s: Array, first_s: float, span_s: float, has_whole_stamps: bool, least: int
) -> tuple[tuple[Slot, ...], Bursts | None]:
    """The slots, and what they do not explain."""
    is_weekly = span_s >= WEEK_S
    width_s, slots = (HOUR_S, 168) if is_weekly else (math.inf, 1)

    def slot_of(times_s: Array) -> Ints:
        if not is_weekly:
            return np.zeros(len(times_s), dtype=np.int64)
        return (((times_s - MONDAY_S) % WEEK_S) // width_s).astype(np.int64) % slots

    # Whole hours of the span, and its two ends: an hour lies in one slot.
    edges_s = np.concatenate(
        ([first_s], np.arange(math.floor(first_s / HOUR_S) + 1, math.ceil((first_s + span_s) / HOUR_S)) * HOUR_S)
    )
    exposure_s = np.bincount(slot_of(edges_s), np.diff(edges_s, append=first_s + span_s), slots).astype(np.float64)
    counts = np.bincount(slot_of(stamps_s), minlength=slots)
    pools = _pools(counts, least) if least > 1 else np.arange(slots)
    pooled_s = np.maximum(np.bincount(pools, exposure_s), 1e-9)
    rates_rps: Array = (np.bincount(pools, counts) / pooled_s)[pools]
    fits = _fit_shapes(stamps_s, first_s, slot_of, slots, max(MIN_GAPS, least))
    counted = Counted(stamps_s, first_s, span_s, slot_of, rates_rps, exposure_s)
    bursts = fit_bursts(counted, np.array([fit.moments for fit in fits]), has_batches=not has_whole_stamps)
    fitted = zip(rates_rps.tolist(), fits, strict=True)
    return tuple(Slot(rate_rps, fit.moments, fit.mle, fit.gaps) for rate_rps, fit in fitted), bursts


def _pools(counts: Ints, least: int) -> Ints:
    """Which neighbouring counts go together, pools numbered from 0, each of `least` at least or of all there is."""
    pools = np.empty(len(counts), dtype=np.int64)
    pool, held = 0, 0
    for place, count in enumerate(counts.tolist()):
        if held >= least:
            pool, held = pool + 1, 0
        pools[place] = pool
        held += count
    return np.minimum(pools, max(pool - 1, 0)) if held < least else pools


def _fit_shapes(
    stamps_s: Array, first_s: float, slot_of: Callable[[Array], Ints], slots: int, min_gaps: int
) -> list[ShapeFit]:
    """The shape of each slot; of one with few gaps that of all, with 0 gaps."""
    window = ((stamps_s - first_s) // WINDOW_S).astype(np.int64)
    is_inside = window[1:] == window[:-1]
    gaps_s: Array = np.diff(stamps_s)[is_inside]
    window, slot = window[1:][is_inside], slot_of(stamps_s[:-1])[is_inside]
    whole = fit_gamma_shape(gaps_s, window)
    default = ShapeFit(1.0, 1.0, 0) if whole is None or whole.gaps < min_gaps else whole._replace(gaps=0)
    fits = []
    order = np.argsort(slot, kind="stable")
    bounds = np.searchsorted(slot[order], np.arange(slots + 1))
    for number in range(slots):
        here = order[bounds[number] : bounds[number + 1]]
        fit = fit_gamma_shape(gaps_s[here], window[here]) if len(here) >= min_gaps else None
        fits.append(fit or default)
    return fits


def _fit_lengths(request: Array, response: Array, rng: np.random.Generator, least: int) -> Lengths | None:
    n = len(request)
    if n < least:
        return None
    grid = max(1, min(MAX_GRID, int(math.sqrt(n / max(10, 2 * least)))))
    places = [(_ranks(values, rng) * grid // n).astype(np.int64) for values in (request, response)]
    cells = np.bincount(places[0] * grid + places[1], minlength=grid * grid).reshape(grid, grid)
    cells[cells < least] = 0
    # A request of a row without a cell of its own goes with any response.
    cells[cells.sum(axis=1) == 0] = 1
    return Lengths(
        request=_quantiles(request, least),
        response=_quantiles(response, least),
        copula=tuple(tuple((row / row.sum()).tolist()) for row in cells),
        request_theta=fit_zipf(request),
    )


def _ranks(values: Array, rng: np.random.Generator) -> Ints:
    """Ranks from 0; those of equal values in random order, so that ties claim no dependence."""
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.lexsort((rng.random(len(values)), values))] = np.arange(len(values))
    return ranks


def _quantiles(values: Array, least: int, levels: Sequence[float] = LEVELS) -> tuple[float, ...]:
    """Each the value at its rank, the smallest that its share does not exceed; with more than one for the least count,
    the mean of so many around it, to whole numbers. values: at least as many."""
    if least == 1:
        return tuple(np.quantile(values, levels, method="inverted_cdf").tolist())
    n = len(values)
    sums = np.concatenate(([0.0], np.cumsum(np.sort(values))))
    middle = np.ceil(np.asarray(levels) * n).astype(np.int64) - least // 2
    first = np.clip(middle, 0, n - least)
    means: Array = np.maximum.accumulate(np.rint((sums[first + least] - sums[first]) / least))
    return tuple(means.tolist())


def fit_zipf(tokens: Array) -> float:
    """theta of P(n) ~ n^-theta for n = 1 to the largest count, by maximum likelihood, within 0 to 10.

    tokens: shape (n,), n >= 1; counts below 1 are taken as 1. The score is E log n = mean log n.
    """
    logs = np.log(np.maximum(tokens, 1.0))
    support = np.log(np.arange(1, min(int(tokens.max()), 1 << 20) + 1, dtype=np.float64))
    target, low, high = float(logs.mean()), 0.0, 10.0
    for _ in range(30):
        theta = (low + high) / 2
        weights = np.exp(-theta * support)
        low, high = (theta, high) if float(weights @ support) > target * float(weights.sum()) else (low, theta)
    return (low + high) / 2


def _fit_sessions(rows: pl.DataFrame, least: int) -> Sessions:
    ordered = rows.sort("session", maintain_order=True)
    session = ordered["session"].to_numpy()
    goes_on = session[1:] == session[:-1]
    gaps_s = np.diff(ordered["received_at"].to_numpy())[goes_on]
    first = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    sizes = np.diff(first, append=len(session))
    spans_s = ordered["received_at"].to_numpy()[first + sizes - 1] - ordered["received_at"].to_numpy()[first]
    turns, counts = np.unique(np.minimum(sizes, MAX_TURNS), return_counts=True)
    request = ordered["request_tokens"].cast(pl.Float64).fill_null(math.nan).to_numpy()
    span_s = _quantiles(spans_s, least, (0.99,))[0] if len(spans_s) >= least else 0.0
    first_request = request[first][np.isfinite(request[first])]
    pairs: Array = np.column_stack((request[:-1], request[1:]))[goes_on]
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if least > 1 and min(len(sizes), len(gaps_s)) < least:
        turns, counts = np.ones(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    elif least > 1:
        pools = _pools(counts, least)
        sums = np.bincount(pools, counts * turns)
        counts = np.bincount(pools, counts).astype(np.int64)
        turns = np.rint(sums / counts).astype(np.int64)
    return Sessions(
        turns=tuple(zip(turns.tolist(), (counts / counts.sum()).tolist(), strict=True)),
        turn_gap_s=_quantiles(gaps_s, least) if len(gaps_s) >= least else (0.0,) * len(LEVELS),
        first_request=_quantiles(first_request, least) if len(first_request) >= least else (),
        growth=_fit_growth(pairs, least),
        span_p99_s=float(np.quantile(spans_s, 0.99)) if least == 1 else span_s,
    )


def _fit_growth(pairs: Array, least: int) -> tuple[Growth, ...]:
    """pairs: shape (n, 2), the tokens of a request and of the one after it."""
    if len(pairs) < least:
        return ()
    bins = max(1, min(MAX_GROWTH_BINS, len(pairs) // max(50, least)))
    edges: Array = np.unique(np.array(_quantiles(pairs[:, 0], least, (np.arange(bins) / bins).tolist())))
    # With a least count an edge is a mean, and may lie above the least request.
    place = np.maximum(np.searchsorted(edges, pairs[:, 0], side="right") - 1, 0)
    if least > 1:
        pools = _pools(np.bincount(place, minlength=len(edges)), least)
        place, edges = pools[place], edges[np.unique(pools, return_index=True)[1]]
    return tuple(
        Growth(float(edge), _quantiles(pairs[place == number, 1] - pairs[place == number, 0], least))
        for number, edge in enumerate(edges)
    )
