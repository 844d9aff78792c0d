"""Analysis, fit, generation, analysis again: what comes out is what went in, within sampling error, over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest

from tests.traces.test_profile import trace
from traces.analysis import Analysis, analyze
from traces.arrivals import arrival_times_s, steady, take_until
from traces.burstiness import fit_windows, summarize_fits
from traces.conversations import describe_conversations
from traces.generation import generate
from traces.lengths import Distribution, describe_lengths
from traces.profile import (
    LEVELS,
    MONDAY_S,
    VERSION,
    Lengths,
    Service,
    Sessions,
    Slot,
    WorkloadProfile,
    decode_profile,
    encode_profile,
    fit_profile,
)
from traces.record import LogType
from traces.table import collect

SPAN_S = 12 * 1200.0


def source(seed: int, rate_rps: float = 1.0, shape: float = 0.4) -> pl.DataFrame:
    """Gamma gaps, lognormal lengths of which a longer request has the longer response, 6 % failures."""
    rng = np.random.default_rng(seed)
    stamps_s = take_until(arrival_times_s(steady(rate_rps, shape).segments(), rng))(SPAN_S) + MONDAY_S
    n = len(stamps_s)
    request, response = rng.multivariate_normal((0, 0), ((1, 0.5), (0.5, 1)), n).T
    failed = rng.random(n) < 0.06
    return trace(
        stamps_s,
        request_tokens=np.ceil(np.exp(5.8 + 0.8 * request)).astype(np.int64),
        response_tokens=pl.Series(np.ceil(np.exp(3.5 + response)).astype(np.int64)).set(pl.Series(failed), None),
        outcome=np.where(failed, "upstream_error", "ok"),
        log_type=[LogType.API.value] * n,
    )


def again(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
    profile = decode_profile(encode_profile(fit_profile([rows])))
    return pl.concat(generate(profile, seed=seed, duration_s=SPAN_S, start_s=MONDAY_S))


def known(distribution: Distribution | None) -> Distribution:
    assert distribution is not None
    return distribution


def figures(found: Analysis) -> dict[str, float | None]:
    part, lengths = found.arrivals[0], found.lengths[0].lengths
    assert part.windows.alpha is not None
    request, response = known(lengths.request.lengths), known(lengths.response.lengths)
    return {
        "requests": float(part.arrivals.requests),
        "gap_cv": part.arrivals.gap_cv,
        "alpha": part.windows.alpha.p50,
        "request p50": request.p50,
        "request p90": request.p90,
        "response p50": response.p50,
        "response p90": response.p90,
        "spearman": lengths.relation.spearman,
        "failure rate": found.failures.total.rate,
    }


TOLERANCES = {
    # Relative; n = 14,400 rows. The count's and the CV's errors are of gaps with a CV of 1.6, alpha's of its windows.
    "requests": 0.08, "gap_cv": 0.08, "alpha": 0.12,
    # Of a lognormal's quantiles sigma / sqrt(n) times 1.3 and 1.7.
    "request p50": 0.05, "request p90": 0.06, "response p50": 0.06, "response p90": 0.08,
    "spearman": 0.06, "failure rate": 0.15,
}  # fmt: skip
"""Four standard errors or more, of two traces' difference."""


@pytest.mark.parametrize("seed", range(2))
def test_analysis_fit_generation_and_analysis_are_a_fixed_point(seed: int) -> None:
    """Twice around: a bias of the fit would add up."""
    first = source(seed)
    wanted = figures(analyze([first]).analysis)
    second = again(first, 100 + seed)
    for rows in (second, again(second, 200 + seed)):
        found = figures(analyze([rows]).analysis)
        for name, tolerance in TOLERANCES.items():
            assert found[name] == pytest.approx(wanted[name], rel=tolerance), name


# BurstGPT's file 3, by its published numbers


def quantiles(**points: float) -> tuple[float, ...]:
    """At LEVELS, between the published ones (names are per mille) as a power law, whose longest is of 10^6 rows."""

    def place(shares: Sequence[float]) -> list[float]:
        return [-math.log(1 - share + 1e-6) for share in shares]

    shares = [int(name[1:]) / 1000 for name in points]
    return tuple(np.exp(np.interp(place(LEVELS), place(shares), np.log(list(points.values())))).tolist())


def copula(correlation: float, grid: int = 16) -> tuple[tuple[float, ...], ...]:
    """A normal copula of that rank correlation: Pearson's is 2 sin(pi / 6 of it)."""
    r = 2 * math.sin(math.pi / 6 * correlation)
    draws = np.random.default_rng(0).multivariate_normal((0, 0), ((1, r), (r, 1)), 400_000)
    places = np.minimum(draws.argsort(axis=0).argsort(axis=0) * grid // len(draws), grid - 1)
    counts = np.bincount(places[:, 0] * grid + places[:, 1], minlength=grid * grid).reshape(grid, grid)
    return tuple(tuple(row) for row in (counts / counts.sum(axis=1, keepdims=True)).tolist())


TURN_SHARES = (0.355, 0.204, 0.119, 0.076, 0.051, 0.037, 0.028, 0.021, 0.018, 0.013)
GAPS_S = {"p0": 1.0, "p100": 20.0, "p250": 42.0, "p500": 131.0, "p750": 533.0, "p900": 2340.0, "p990": 78_903.0,
          "p1000": 1e6}  # fmt: skip
API_REQUEST = {"p0": 1.0, "p500": 326.0, "p900": 794.0, "p990": 3141.0, "p1000": 125_591.0}
API_RESPONSE = {"p0": 1.0, "p500": 14.0, "p900": 111.0, "p990": 804.0, "p1000": 4096.0}
CHAT_RESPONSE = {"p0": 1.0, "p500": 187.0, "p900": 669.0, "p990": 1067.0, "p1000": 4096.0}


CHAT_REQUEST = {"p0": 1.0, "p500": 517.0, "p900": 2354.0, "p990": 5630.0, "p1000": 71_197.0}


def turns() -> tuple[tuple[int, float], ...]:
    """P(1) to P(10) as published; the other sessions have 11 turns or 60, so that the mean is 4.18."""
    rest = 1 - sum(TURN_SHARES)
    tail_mean = (4.18 - sum(n * share for n, share in enumerate(TURN_SHARES, 1))) / rest
    few = (60 - tail_mean) / (60 - 11)
    return (*enumerate(TURN_SHARES, 1), (11, rest * few), (60, rest * (1 - few)))


def generated(service: Service, duration_s: float, seed: int) -> pl.DataFrame:
    profile = WorkloadProfile(VERSION, service.requests, duration_s, False, LEVELS, (service,))
    batches = generate(decode_profile(encode_profile(profile)), seed=seed, duration_s=duration_s, start_s=MONDAY_S)
    return collect(batches).table


def median_cv(rows: pl.DataFrame) -> float:
    found = summarize_fits(fit_windows(rows["received_at"].to_numpy(), window_s=300, most_fits=1)).cv
    assert found is not None
    return found.p50


def check_lengths(rows: pl.DataFrame, request: dict[str, float], response: dict[str, float], spearman: float) -> None:
    """Quantiles within 5 %, and 10 % for the 99th; the correlation, of ranks here, within 0.03."""
    report = describe_lengths(rows)
    for side, published in ((report.request, request), (report.response, response)):
        found = known(side.lengths)
        assert found.p50 == pytest.approx(published["p500"], rel=0.05)
        assert found.p90 == pytest.approx(published["p900"], rel=0.05)
        assert found.p99 == pytest.approx(published["p990"], rel=0.1)
        assert found.max <= published["p1000"]
    assert report.relation.spearman == pytest.approx(spearman, abs=0.03)


@pytest.mark.parametrize("seed", range(2))
def test_file_3_s_api_comes_back(seed: int) -> None:
    """At 1 request/s instead of the file's rate, so that every window has gaps enough."""
    shape = 1 / 1.5**2
    lengths = Lengths(quantiles(**API_REQUEST), quantiles(**API_RESPONSE), copula(0.183), 1.1)
    service = Service(0, LogType.API, 5_110_404, 0.0756, 0.0, (Slot(1.0, shape, shape, 0),), lengths)
    rows = generated(service, 60_000, seed)
    # A window of 300 gaps knows its CV within 6 %, their median within 1 %; it lies 2 % under the CV of all gaps.
    assert median_cv(rows) == pytest.approx(1.5, rel=0.05)
    failed = (rows["outcome"] != "ok").mean()
    assert failed == pytest.approx(0.0756, abs=0.005)  # 4.5 standard errors
    check_lengths(rows, API_REQUEST, API_RESPONSE, 0.183)


def test_file_3_s_conversations_come_back() -> None:
    lengths = Lengths(quantiles(**CHAT_REQUEST), quantiles(**CHAT_RESPONSE), copula(0.438), 1.1)
    sessions = Sessions(turns(), quantiles(**GAPS_S), (), (), 300_000.0)
    service = Service(0, LogType.CONVERSATION, 233_617, 0.0079, 0.0, (Slot(0.04, 1.0, 1.0, 0),), lengths, sessions)
    rows = generated(service, 1_000_000, 1)
    check_lengths(rows, CHAT_REQUEST, CHAT_RESPONSE, 0.438)
    assert (rows["outcome"] != "ok").mean() == pytest.approx(0.0079, abs=0.001)
    assert median_cv(rows) == pytest.approx(0.92, abs=0.08)
    found = describe_conversations(rows)
    # Sessions that the trace cuts at an end are shorter: 2 % of them have a gap of over a tenth of it.
    turns_found = known(found.turns)
    assert (turns_found.p50, turns_found.p75) == (2, 4)
    assert turns_found.mean == pytest.approx(4.18, rel=0.06)
    assert turns_found.p90 == pytest.approx(9, abs=2)
    gaps = known(found.gap_s)
    assert gaps.p10 == pytest.approx(20, rel=0.2)  # where they are dense: a rank of 1 % less is 30 %
    assert gaps.p25 == pytest.approx(42, rel=0.1)
    assert gaps.p50 == pytest.approx(131, rel=0.1)
    assert gaps.p75 == pytest.approx(533, rel=0.1)
    assert gaps.p90 == pytest.approx(2340, rel=0.15)
