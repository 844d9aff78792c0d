"""A profile: what it knows of a trace, what it does not, and what is made of wrong ones."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest

from traces.arrivals import Process, arrival_times_s, steady, take_until
from traces.batch import complete_batch, empty_batch
from traces.codec import read_trace
from traces.generation import fixed_lengths, generate, plain_profile
from traces.profile import (
    FITTED_MODELS,
    LEVELS,
    Service,
    WorkloadProfile,
    decode_profile,
    encode_profile,
    fit_profile,
    fit_zipf,
)

TRACES = Path(os.environ.get("BURSTGATE_TRACES", Path(__file__).parents[2].parent / "shared" / "traces"))
HOUR_S = 3600.0


def trace(stamps_s: Any, **columns: Any) -> pl.DataFrame:
    frame = pl.DataFrame({"received_at": pl.Series(stamps_s, dtype=pl.Float64)})
    n = frame.height
    defaults = {"request_id": [str(row) for row in range(n)], "model": ["m"] * n,
                "request_tokens": [10] * n, "response_tokens": [5] * n}  # fmt: skip
    return complete_batch(frame.with_columns(**{k: pl.Series(v) for k, v in {**defaults, **columns}.items()}))


def only(profile: WorkloadProfile) -> Service:
    (service,) = profile.services
    return service


def arrivals(process: Process, end_s: float, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return take_until(arrival_times_s(process.segments(), np.random.default_rng(seed)))(end_s)


@pytest.mark.parametrize("shape", [0.5, 1.0, 4.0])
def test_rate_and_shape_of_a_renewal_process_are_recovered(shape: float) -> None:
    rates, moments, mles = [], [], []
    for seed in range(12):
        service = only(fit_profile([trace(arrivals(steady(1.0, shape), 6000.0, seed))]))
        (slot,) = service.slots
        assert service.bursts is None
        rates.append(slot.rate_rps)
        moments.append(slot.shape)
        mles.append(slot.shape_mle)
    # Var N = t / shape; Var of the shape by moments 2 k (k + 1) / n: 12 runs of some 6,000 gaps.
    assert abs(np.mean(rates) - 1) < 4 * math.sqrt(1 / shape / 6000 / 12)
    error = 4 * math.sqrt(2 * shape * (shape + 1) / 6000 / 12)
    assert abs(np.mean(moments) - shape) < error + 0.01 * shape
    assert abs(np.mean(mles) - shape) < error + 0.01 * shape


def test_whole_seconds_are_spread_before_the_fit() -> None:
    """At one request in 5 s rounding hides little; unspread, gaps of 0 would make any fit by likelihood absurd."""
    service = only(fit_profile([trace(np.floor(arrivals(steady(0.2, 1.0), 60_000.0, 2)))]))
    assert service.slots[0].shape == pytest.approx(1.0, abs=0.06)
    assert service.slots[0].shape_mle == pytest.approx(1.0, abs=0.06)
    # At 20 a second all of a burst inside its second is lost: a shape of 0.25 comes out nearer to 1.
    dense = only(fit_profile([trace(np.floor(arrivals(steady(20.0, 0.25), 2000.0, 2)))]))
    assert 0.25 < dense.slots[0].shape < 0.9


def test_hours_of_the_week_have_their_own_rate_and_shape() -> None:
    # Monday 0:00 UTC on; 14 days, busy and even from 9 to 17, quiet and bursty else.
    hours = np.arange(24)
    busy = (hours >= 9) & (hours < 17)
    day = Process(tuple(hours * HOUR_S), tuple(np.where(busy, 0.3, 0.05)), tuple(np.where(busy, 4.0, 0.5)), 24 * HOUR_S)
    monday_s = 4 * 24 * HOUR_S
    service = only(fit_profile([trace(monday_s + arrivals(day, 14 * 24 * HOUR_S, 5))]))
    assert len(service.slots) == 168
    rates = np.array([slot.rate_rps for slot in service.slots]).reshape(7, 24)
    shapes = np.array([slot.shape for slot in service.slots]).reshape(7, 24)
    assert rates[:, busy].mean() == pytest.approx(0.3, rel=0.03)
    assert rates[:, ~busy].mean() == pytest.approx(0.05, rel=0.08)
    assert shapes[:, busy].mean() == pytest.approx(4.0, rel=0.1)
    assert np.median(shapes[:, ~busy]) < 1.0


def test_levels_that_vary_are_seen_as_such() -> None:
    rng = np.random.default_rng(0)
    starts_s = np.concatenate(([0.0], np.cumsum(rng.exponential(1200.0, 400))))
    levels = rng.gamma(2.0, 0.5, len(starts_s))  # a relative variance of 0.5
    process = Process(tuple(starts_s), tuple(levels * 0.5), (1.0,) * len(starts_s))
    service = only(fit_profile([trace(arrivals(process, 480_000.0, 1))]))
    assert service.bursts is not None
    # Some of it may be told as a shorter swing.
    assert math.prod(1 + swing.variance for swing in service.bursts.swings) - 1 == pytest.approx(0.5, rel=0.3)
    assert sum(swing.hold_s * swing.variance for swing in service.bursts.swings) > 300
    assert not any(swing.is_on_off for swing in service.bursts.swings)
    # Levels that change inside a window make its gaps somewhat more uneven; across windows they would give 0.5.
    assert 0.7 < service.slots[0].shape < 1.05


def test_a_profile_holds_no_names_ids_or_stamps() -> None:
    rows = trace(
        np.arange(1_700_000_000, 1_700_000_200) + 0.5,
        model=["secret-model"] * 150 + ["other"] * 50,
        session_id=["alice"] * 100 + ["bob"] * 100,
        log_type=["Conversation log"] * 200,
        tenant=["acme"] * 200,
        request_id=["req-xyz"] * 200,
    )
    text = encode_profile(fit_profile([rows])).decode()
    for name in ("secret", "other", "alice", "bob", "acme", "xyz", "1700000"):
        assert name not in text
    assert [service.model for service in decode_profile(text.encode()).services] == [0, 1]


def busy(seed: int, n: int, **columns: Any) -> pl.DataFrame:
    """Two weeks of chats and calls of two models, a few of a third, with odd rows at every end."""
    rng = np.random.default_rng(seed)
    hour = rng.choice(14 * 24, n, p=(weights := (np.arange(14 * 24) % 24 > 8) + 0.01) / weights.sum())
    is_chat = rng.random(n) < 0.5
    defaults = {
        "model": np.where(np.arange(n) < 5, "rare", np.where(rng.random(n) < 0.7, "a", "b")).tolist(),
        "log_type": np.where(is_chat, "Conversation log", "API log").tolist(),
        "session_id": [f"s{i // 4}" if chat else None for i, chat in enumerate(is_chat.tolist())],
        "request_tokens": np.rint(rng.lognormal(5, 1.5, n)).astype(np.int64),
        "response_tokens": np.rint(rng.lognormal(4, 1, n)).astype(np.int64),
        "outcome": np.where(rng.random(n) < 0.01, "truncated", "ok").tolist(),
    }
    return trace(np.sort(hour * HOUR_S + rng.random(n) * HOUR_S), **{**defaults, **columns})


@pytest.mark.parametrize("least", [2, 20, 50])
@pytest.mark.parametrize("n", [600, 6000])
def test_with_a_least_count_no_smaller_cell_survives(n: int, least: int) -> None:
    rows = busy(least, n)
    profile = decode_profile(encode_profile(fit_profile([rows], least=least)))
    assert profile.has_whole_second_stamps
    assert profile.span_s % 60 == 0
    assert profile.least == least
    good = rows.filter(pl.col("outcome") == "ok")
    for service in profile.services:
        name = ("a", "b", "rare")[service.model]
        mine = pl.col("model").eq(name) & pl.col("log_type").eq(service.log_type)
        here = rows.filter(mine)
        failures = here.filter(pl.col("outcome") != "ok").height
        assert service.requests % least == 0
        assert service.failure_share == pytest.approx(failures / here.height if failures >= least else 0, rel=1e-5)
        starts = here.group_by("session_id").agg(pl.col("received_at").min()) if service.sessions else here
        # Slots of one rate stand together: what they hold is what the rate is of.
        hours = np.bincount((starts["received_at"] // HOUR_S % 168).cast(pl.Int64).to_numpy(), minlength=168)
        held = dict.fromkeys({slot.rate_rps for slot in service.slots}, 0)
        for place, slot in enumerate(service.slots):
            held[slot.rate_rps] += int(
                hours[(place + 4 * 24) % 168]
            )  # slots count from a Monday, the epoch is Thursday
        assert min(held.values()) >= least
        assert all(slot.gaps == 0 or slot.gaps >= least for slot in service.slots)
        lengths = service.lengths
        assert lengths is not None
        n_good, grid = good.filter(mine).height, len(lengths.copula)
        for row in lengths.copula:
            assert all(share == 0 or share * n_good / grid >= least - 1 for share in row) or len(set(row)) == 1
        if service.sessions is not None:
            sizes = here["session_id"].value_counts()["count"]
            assert all(share * len(sizes) >= least * 0.999 for _, share in service.sessions.turns)


def test_with_a_least_count_no_single_request_shows() -> None:
    plain = busy(1, 3000)
    odd = plain.with_columns(
        request_tokens=pl.when(pl.int_range(pl.len()) == 1500).then(987_654).otherwise("request_tokens"),
        session_id=pl.when(pl.int_range(pl.len()) == 1500).then(pl.lit("loner")).otherwise("session_id"),
    )
    assert any(987_654.0 in service.lengths.request for service in fit_profile([odd]).services if service.lengths)
    for service in fit_profile([odd], least=20).services:
        assert service.lengths is not None
        assert service.lengths.request[-1] < 987_654 / 10
    assert {service.model for service in fit_profile([plain], least=20).services} == {0, 1}, "rare is left out"
    assert {service.model for service in fit_profile([plain]).services} == {0, 1, 2}


@pytest.mark.parametrize("n", [0, 1, 5, 15])
def test_with_a_least_count_too_little_is_nothing(n: int) -> None:
    with pytest.raises(ValueError, match="fit: expected"):
        fit_profile([busy(0, n)], least=20)


def test_with_a_least_count_a_profile_is_still_its_trace() -> None:
    profile = fit_profile([busy(3, 20_000)], least=20)
    again = pl.concat(list(generate(profile, seed=1, duration_s=profile.span_s)))
    assert again.height == pytest.approx(20_000, rel=0.1)
    source = busy(3, 20_000)
    for name in ("request_tokens", "response_tokens"):
        assert again[name].median() == pytest.approx(source[name].median(), rel=0.1)


def test_a_profile_is_small_whatever_the_trace() -> None:
    models = [f"model-{number % 40}" for number in range(30_000)]
    assert len(encode_profile(fit_profile([busy(0, 30_000, model=models)]))) < 600_000
    assert len(encode_profile(fit_profile([busy(0, 30_000)]))) < 200_000


def test_services_and_failures() -> None:
    rows = trace(
        np.arange(100.0),
        model=["rare"] * 20 + ["often"] * 80,
        log_type=["API log"] * 10 + ["Conversation log"] * 90,
        session_id=[None] * 10 + ["s"] * 5 + [None] * 85,
        outcome=["ok"] * 60 + ["upstream_error"] * 40,
        response_tokens=[5] * 60 + [None] * 40,
    )
    profile = fit_profile([rows])
    found = [(s.model, str(s.log_type), s.requests, s.failure_share, s.sessions is not None) for s in profile.services]
    assert found == [
        (0, "Conversation log", 80, 0.5, False),
        (1, "API log", 10, 0.0, False),
        (1, "Conversation log", 5, 0.0, False),
        (1, "Conversation log", 5, 0.0, True),
    ]
    assert profile.mean_rps == pytest.approx(1.0)
    assert profile.has_whole_second_stamps


def test_order_and_batches_do_not_matter() -> None:
    rows = trace(
        arrivals(steady(1.0, 0.5), 500.0, 0),
        session_id=[f"s{n % 7}" for n in range(len(arrivals(steady(1.0, 0.5), 500.0, 0)))],
    )
    profile = fit_profile([rows])
    assert fit_profile(rows.iter_slices(13)) == profile
    assert fit_profile([rows.sample(fraction=1.0, shuffle=True, seed=1)]) == profile


def test_sessions() -> None:
    # Sessions of 1, 2 and 3 turns; gaps of 10 s; each request 100 tokens longer than the last.
    sizes = [1, 2, 3] * 50
    rows = [(1000.0 * k + 10 * t, f"s{k}", 50 + 100 * t) for k, n in enumerate(sizes) for t in range(n)]
    stamps_s, sessions, request = zip(*rows, strict=True)
    service = only(fit_profile([trace([*stamps_s], session_id=[*sessions], request_tokens=[*request])]))
    assert service.sessions is not None
    assert [turns for turns, _ in service.sessions.turns] == [1, 2, 3]
    assert [share for _, share in service.sessions.turns] == pytest.approx([1 / 3] * 3)
    assert service.sessions.mean_turns == pytest.approx(2)
    assert service.sessions.turn_gap_s == pytest.approx([10.0] * len(LEVELS), abs=1.0)
    assert set(service.sessions.first_request) == {50.0}
    assert {value for growth in service.sessions.growth for value in growth.quantiles} == {100.0}
    assert service.slots[0].rate_rps == pytest.approx(150 / 149_021, rel=0.001)
    assert service.mean_rps == pytest.approx(300 / 149_021, rel=0.001)


def test_ties_claim_no_dependence_and_pairs_keep_theirs() -> None:
    rng = np.random.default_rng(3)
    request = rng.integers(1, 4, 4000)
    tied = only(fit_profile([trace(np.arange(4000.0), request_tokens=request, response_tokens=[7] * 4000)]))
    assert tied.lengths is not None
    assert np.array(tied.lengths.copula) == pytest.approx(np.full((16, 16), 1 / 16), abs=0.05)
    same = only(
        fit_profile([trace(np.arange(4000.0), request_tokens=np.arange(4000), response_tokens=np.arange(4000))])
    )
    assert same.lengths is not None
    assert np.array(same.lengths.copula) == pytest.approx(np.eye(16))


@pytest.mark.parametrize("theta", [0.6, 1.1, 2.0])
def test_zipf_is_recovered(theta: float) -> None:
    n = np.arange(1, 4097)
    shares = n**-theta / np.sum(n**-theta)
    tokens = np.random.default_rng(0).choice(n, 20_000, p=shares)
    support = np.log(n)
    variance = float(shares @ support**2 - (shares @ support) ** 2)
    # The score's variance is that of log n; the largest of 20,000 draws stands for the end of the support.
    assert fit_zipf(tokens.astype(np.float64)) == pytest.approx(theta, abs=4 / math.sqrt(20_000 * variance) + 0.01)


@pytest.mark.parametrize(
    "batches",
    [[], [empty_batch()], [trace([5.0])], [trace([5.0, 5.0, 5.0])]],
    ids=["none", "empty", "one row", "one stamp"],
)
def test_too_little_to_fit(batches: list[pl.DataFrame]) -> None:
    with pytest.raises(ValueError, match="fit: expected rows with at least two different stamps"):
        fit_profile(batches)


@pytest.mark.parametrize(
    "rows",
    [
        trace([0.0, 1e-6]),
        trace([0.0, 10.0], model=[None, None], request_tokens=[None, None]),
        trace([0.0, 1e6], session_id=["a", "a"]),
        trace([0.0, 0.0, 1.0], outcome=["upstream_error"] * 3, session_id=["a", None, ""]),
        trace([0.0, 1.0], request_tokens=[2**62, 1], response_tokens=[0, 0]),
        trace([0.5] * 5000 + [700.0], session_id=["a"] * 5001),
    ],
)
def test_odd_traces_give_profiles_that_can_be_read_and_generated(rows: pl.DataFrame) -> None:
    profile = fit_profile([rows])
    assert decode_profile(encode_profile(profile)) == profile
    assert sum(batch.height for batch in generate(profile, seed=0, rows=50)) <= 50


def test_a_trace_of_two_rows_in_a_year() -> None:
    profile = fit_profile([trace([0.0, 4e7], session_id=["a", "a"])])
    assert decode_profile(encode_profile(profile)) == profile
    with pytest.raises(ValueError, match="rate: expected at least 1e-06 requests/s, got "):
        generate(profile, seed=0, rows=50)


def test_more_models_than_classes_share_the_last() -> None:
    profile = fit_profile([trace(np.arange(200.0), model=[f"m{n % 100}" for n in range(200)])])
    assert {service.model for service in profile.services} == set(range(FITTED_MODELS))
    assert sum(service.requests for service in profile.services) == 200


PROFILE = fit_profile(
    [trace(np.arange(300.0) * 9, session_id=[f"s{n % 99}" for n in range(300)], request_tokens=range(300))]
)


def changed(path: str, value: object) -> bytes:
    """The profile's JSON with the value at a path such as services.0.lengths.copula replaced."""
    whole = msgspec.json.decode(encode_profile(PROFILE))
    *parents, last = path.split(".")
    place = whole
    for name in parents:
        place = place[int(name)] if name.isdigit() else place[name]
    place[last] = value
    return msgspec.json.encode(whole)


BURSTS = {"shape": 1.0, "swings": []}


def swings(*each: tuple[float, float]) -> bytes:
    told = [{"hold_s": hold_s, "variance": variance} for hold_s, variance in each]
    return changed("services.0.bursts", BURSTS | {"swings": told})


def test_a_profile_of_the_first_version_is_read_and_means_what_it_did() -> None:
    whole = msgspec.json.decode(encode_profile(PROFILE))
    whole["burstgate_profile"] = 1
    del whole["has_common_levels"]
    for service in whole["services"]:
        del service["bursts"]
        service["level_variance"] = 0.5
    profile = decode_profile(msgspec.json.encode(whole))
    assert not profile.has_common_levels
    assert only(profile).bursts is None
    heights = [sum(batch.height for batch in generate(profile, seed=seed, duration_s=1e5)) for seed in range(20)]
    assert np.mean(heights) == pytest.approx(profile.mean_rps * 1e5, rel=0.1)
    # 83 windows with levels of a relative variance of 0.5.
    assert np.std(heights) > 0.5 * math.sqrt(0.5 / 83) * np.mean(heights)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: b"", "profile: expected the JSON that burstgate fit writes"),
        (lambda: b"\xff\xfe", "profile: expected the JSON"),
        (lambda: b"[1]", "profile: expected the JSON"),
        (lambda: b'{"burstgate_profile": 3}', "burstgate_profile: expected version 1 to 2, got 3"),
        (lambda: changed("x", 1), "unknown field `x`"),
        (lambda: changed("levels", [0, 0.5, 0.4, 1]), "levels: expected 0 to 1, ascending"),
        (lambda: changed("services", []), "services: expected at least one"),
        (lambda: changed("services.0.model", -1), r"services\[0\]\.model: expected 0 to 63"),
        (lambda: changed("services.0.failure_share", 1.5), r"failure_share: expected 0 to 1"),
        (lambda: changed("services.0.slots", []), "slots: expected 1 slot or"),
        (lambda: changed("services.0.lengths.copula", [[0.5]]), "copula: expected a square"),
        (lambda: changed("services.0.lengths.request", [1.0]), "request: expected 73 numbers"),
        (lambda: changed("services.0.lengths.request", [-1.0] * len(LEVELS)), "request: expected ascending numbers, 0"),
        (lambda: changed("services.0.sessions.turns", [[0, 1.0]]), "turns: expected 1 to 100000"),
        (lambda: changed("services.0.sessions.turns", [[1, 0.5]]), "turns: expected shares that sum to 1"),
        (lambda: changed("services.0.sessions.turn_gap_s", [1e300] * len(LEVELS)), "turn_gap_s: expected ascending"),
        (lambda: changed("services.0.level_variance", "x"), "Expected `float`"),
        (
            lambda: changed("services.0.bursts", BURSTS | {"shape": 0}),
            r"bursts\.shape: expected 0\.001 to 1e6, or null",
        ),
        (lambda: changed("services.0.bursts", BURSTS | {"batch": 0.5}), r"bursts\.batch: expected 1 to 100000 rows"),
        (lambda: changed("services.0.bursts", BURSTS | {"batch_variance": -1}), r"batch_variance: expected 0 to 1000"),
        (lambda: swings((0.1, 1.0)), "swings: expected holds of 1, 10, 60, 300, 1200 seconds, ascending"),
        (lambda: swings((10.0, 1.0), (10.0, 1.0)), "swings: expected holds of .* ascending"),
        (lambda: swings((10.0, 1e9)), "swings: expected variances of 0 to 1000"),
        (lambda: swings((1.0, 500.0), (10.0, 500.0)), "swings: expected variances whose product of .* at most 1000"),
    ],
)
def test_wrong_profiles(data: Callable[[], bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_profile(data())


def test_a_plain_profile_is_one_too() -> None:
    profile = plain_profile(fixed_lengths(3, 4))
    assert decode_profile(encode_profile(profile)) == profile


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"no traces at {TRACES} (BURSTGATE_TRACES)")
@pytest.mark.parametrize("name", ["BurstGPT_1_head.csv", "BurstGPT_3_head.csv"])
def test_real_heads_are_fitted_and_generated_again(name: str) -> None:
    rows = pl.concat(list(read_trace(TRACES / name)))
    profile = fit_profile([rows])
    assert profile.requests == 400
    assert profile.mean_rps * profile.span_s == pytest.approx(400)
    assert sum(service.failure_share * service.requests for service in profile.services) == pytest.approx(
        (rows["outcome"] != "ok").sum()
    )
    # Twenty times as long: what differs then is the profile's, not chance.
    found = pl.concat(list(generate(profile, seed=1, duration_s=20 * profile.span_s)))
    # 600 levels of 20 minutes, of a relative variance of 3 to 6.
    assert found.height == pytest.approx(8000, rel=0.35)
    for column in ("request_tokens", "response_tokens"):
        source, again = (frame.filter(pl.col("outcome") == "ok")[column].drop_nulls() for frame in (rows, found))
        values = np.sort(source.to_numpy())
        ks = np.abs(
            np.searchsorted(values, values, side="right") / len(values)
            - np.searchsorted(np.sort(again.to_numpy()), values, side="right") / again.len()
        ).max()
        # 1.36 / sqrt(400) is chance's 95 % already; heads' sessions grow from few first turns.
        assert ks < 0.15
    shares = [dict(frame["log_type"].value_counts(normalize=True).iter_rows()) for frame in (rows, found)]
    assert shares[0] == pytest.approx(shares[1], abs=0.02)
