"""What is generated against what was asked, and against the source that a profile was fitted on."""

from __future__ import annotations

import io
import math
import re
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from proxy import cli
from traces import generation
from traces.arrivals import Process, arrival_times_s, steady, take_until
from traces.batch import SCHEMA, complete_batch
from traces.codec import FORMATS, open_writer, read_trace
from traces.generation import fixed_lengths, generate, plain_profile, zipf_lengths
from traces.profile import WorkloadProfile, decode_profile, fit_profile
from traces.swings import Bursts, Swing

Array = NDArray[np.float64]
PLAIN = plain_profile(fixed_lengths(100, 20))


def whole(profile: WorkloadProfile, **options: Any) -> pl.DataFrame:
    return pl.concat([pl.DataFrame(schema=SCHEMA), *generate(profile, **options)])


def source(seed: int, starts: int = 6000) -> pl.DataFrame:
    """Bursty conversations whose histories grow and are cut, and bursty API calls; 3 % and 10 % failures."""
    rng = np.random.default_rng(seed)
    turns = np.minimum(rng.geometric(0.3, starts), 40)
    starts_s = np.cumsum(rng.gamma(0.5, 4.0, starts))  # one in 2 s, a shape of 0.5
    end_s = float(starts_s[-1])
    rows: list[tuple[float, str | None, int, str, str]] = []
    for session, (start_s, n) in enumerate(zip(starts_s, turns, strict=True)):
        at_s, request = float(start_s), int(rng.lognormal(5, 1)) + 1
        for _ in range(n):
            rows.append((at_s, f"s{session}", request, "big", "Conversation log"))
            at_s += float(rng.lognormal(3.5, 0.8))
            request = request + int(rng.lognormal(5, 0.7)) if rng.random() < 0.9 else max(1, request // 3)
    calls_s = np.cumsum(rng.gamma(0.3, 1 / 0.3 / 4.0, int(end_s * 4.4)))
    rows += [(float(at_s), None, int(rng.lognormal(6, 0.8)) + 1, "small", "API log") for at_s in calls_s]
    frame = pl.DataFrame(
        rows, schema=["received_at", "session_id", "request_tokens", "model", "log_type"], orient="row"
    )
    lengths = frame["request_tokens"].to_numpy()
    response = np.rint(np.exp(2 + 0.4 * np.log(lengths) + rng.normal(0, 0.6, len(lengths)))).astype(np.int64) + 1
    share = np.where(frame["log_type"].to_numpy() == "API log", 0.1, 0.03)
    return complete_batch(
        frame.with_columns(
            request_id=pl.int_range(pl.len()).cast(pl.String),
            response_tokens=pl.Series(response),
            outcome=pl.Series(np.where(rng.random(len(lengths)) < share, "upstream_error", "ok")),
        )
        .filter(pl.col("received_at") < end_s)
        .sort("received_at")
    )


def dispersion(times_s: Array, width_s: float) -> float:
    """Variance / mean of the counts in windows."""
    counts = np.histogram(times_s, np.arange(times_s[0], times_s[-1], width_s))[0]
    return float(counts.var() / counts.mean())


def ks(a: pl.Series, b: pl.Series) -> float:
    """The two-sample Kolmogorov-Smirnov distance."""
    first, second = (np.sort(series.to_numpy()) for series in (a, b))
    both = np.concatenate((first, second))
    distances = [np.searchsorted(each, both, side="right") / len(each) for each in (first, second)]
    return float(np.abs(distances[0] - distances[1]).max())


def turns(rows: pl.DataFrame) -> Array:
    return rows.drop_nulls("session_id").group_by("session_id").len()["len"].to_numpy().astype(np.float64)


def steps(rows: pl.DataFrame) -> pl.DataFrame:
    """Within sessions: gap and growth from each turn to the next."""
    ordered = rows.drop_nulls("session_id").sort("session_id", "received_at")
    return ordered.select(
        pl.col("received_at").diff().over("session_id").alias("gap_s"),
        pl.col("request_tokens").diff().over("session_id").alias("growth"),
    ).drop_nulls()


@pytest.mark.parametrize("seed", [0, 1])
def test_generated_is_like_its_source(seed: int) -> None:
    rows = source(seed)
    profile = fit_profile([rows])
    found = whole(profile, seed=100 + seed, duration_s=profile.span_s)
    assert found.height == pytest.approx(rows.height, rel=0.05)
    for log_type in ("API log", "Conversation log"):
        a, b = (frame.filter(pl.col("log_type") == log_type) for frame in (rows, found))
        gaps = [np.diff(frame["received_at"].to_numpy()) for frame in (a, b)]
        cvs = [float(each.std() / each.mean()) for each in gaps]
        assert cvs[1] == pytest.approx(cvs[0], rel=0.1)
        for width_s in (1.0, 10.0, 60.0):
            found_dispersion = dispersion(b["received_at"].to_numpy(), width_s)
            assert found_dispersion == pytest.approx(dispersion(a["received_at"].to_numpy(), width_s), rel=0.25)
        shares = [frame.select((pl.col("outcome") != "ok").mean()).item() for frame in (a, b)]
        assert shares[1] == pytest.approx(shares[0], abs=0.015)
        a, b = (frame.filter(pl.col("outcome") == "ok") for frame in (a, b))
        # Distances of samples of this size from one distribution: 0.02; quantiles at 1/64 and growth add some.
        assert ks(a["request_tokens"], b["request_tokens"]) < 0.05
        assert ks(a["response_tokens"], b["response_tokens"]) < 0.04
        correlations = [
            frame.select(pl.corr("request_tokens", "response_tokens", method="spearman")).item() for frame in (a, b)
        ]
        assert correlations[0] > 0.3
        assert correlations[1] == pytest.approx(correlations[0], abs=0.04)
    assert turns(found).mean() == pytest.approx(turns(rows).mean(), rel=0.05)
    assert np.quantile(turns(found), [0.5, 0.75, 0.9]) == pytest.approx(
        np.quantile(turns(rows), [0.5, 0.75, 0.9]), abs=1
    )
    assert ks(steps(found)["gap_s"], steps(rows)["gap_s"]) < 0.03
    assert ks(steps(found)["growth"], steps(rows)["growth"]) < 0.08


def test_the_rate_is_the_same_from_the_first_second_on() -> None:
    """Sessions that began earlier are there too: without them the beginning has first turns only."""
    profile = fit_profile([source(3)])
    early = [whole(profile, seed=seed, duration_s=30.0).height for seed in range(40)]
    assert np.mean(early) == pytest.approx(profile.mean_rps * 30, abs=4 * float(np.std(early)) / math.sqrt(40))
    first_turns_only = sum(slot.rate_rps for service in profile.services for slot in service.slots) * 30
    assert np.mean(early) > first_turns_only + 10


@pytest.mark.parametrize("rate_rps", [0.5, 40.0])
def test_an_asked_rate_scales_arrivals_and_not_think_times(rate_rps: float) -> None:
    rows = source(4)
    found = whole(fit_profile([rows]), seed=0, rate_rps=rate_rps, rows=30_000)
    span_s = found["received_at"][-1] - found["received_at"][0]
    assert found.height / span_s == pytest.approx(rate_rps, rel=0.06)
    assert steps(found)["gap_s"].median() == pytest.approx(steps(rows)["gap_s"].median(), rel=0.06)


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0, math.inf])
def test_a_process_gives_the_arrivals_of_all_requests(shape: float) -> None:
    process = steady(25.0, shape)
    found = whole(fit_profile([source(1)]), seed=3, process=process, duration_s=800.0, start_s=1e9)
    gaps_s = np.diff(found["received_at"].to_numpy())
    assert found.height == pytest.approx(20_000, rel=0.06)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1 / math.sqrt(shape), rel=0.05, abs=1e-3)
    assert found["session_id"].null_count() == found.height
    assert found["received_at"][0] >= 1e9
    assert set(found["model"]) == {"model-0", "model-1"}


PROFILE = fit_profile([source(9, starts=300)])
BURSTY = msgspec.structs.replace(
    PROFILE,
    services=tuple(
        msgspec.structs.replace(service, bursts=Bursts(0.5, (Swing(10.0, 2.0, True), Swing(300.0, 0.5)), batch, 0.5))
        for service, batch in zip(PROFILE.services, (1.0, 3.0), strict=False)
    ),
    has_common_levels=True,
)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([PROFILE, BURSTY, PLAIN]),
    st.integers(0, 2**70),
    st.floats(0.1, 300.0),
    st.integers(1, 2000),
    st.sampled_from([None, steady(3.0, 0.3), steady(200.0, math.inf), Process((0.0, 9.0), (5.0, 0.0), (1.0, 1.0))]),
    st.sampled_from([0.0, 1.7e9]),
)
def test_any_generated_trace(
    profile: WorkloadProfile, seed: int, duration_s: float, rows: int, process: Process | None, start_s: float
) -> None:
    options: dict[str, Any] = {"seed": seed, "process": process, "start_s": start_s}
    found = whole(profile, duration_s=duration_s, rows=rows, **options)
    assert found.schema == SCHEMA
    assert found.height <= rows
    assert found["received_at"].is_sorted()
    assert found["received_at"].is_between(start_s, start_s + duration_s).all()
    assert found["request_id"].is_unique().all()
    assert found.equals(whole(profile, duration_s=duration_s, rows=rows, **options))
    # A longer trace begins with the shorter one.
    longer = whole(profile, duration_s=2 * duration_s, rows=2 * rows, **options)
    if found.height == rows:
        assert longer.head(rows).equals(found)
    else:
        assert longer.filter(pl.col("received_at") < start_s + duration_s).head(found.height).equals(found)
    is_failure = found["outcome"] != "ok"
    assert (found["response_tokens"].is_null() == is_failure).all()


def test_a_slabs_size_is_no_part_of_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SLAB_ROWS", 50)
    found = whole(PROFILE, seed=1, duration_s=600.0)
    assert found["received_at"].is_sorted()
    assert found.height == pytest.approx(PROFILE.mean_rps * 600, rel=0.25)


def test_seeds_differ_and_zero_is_a_seed() -> None:
    draws = [whole(PROFILE, seed=seed, rows=200)["received_at"].to_list() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_services_draws_do_not_shift_anothers() -> None:
    def api(profile: WorkloadProfile) -> pl.DataFrame:
        return whole(profile, seed=5, duration_s=200.0).filter(pl.col("log_type") == "API log")

    (talk,) = [service for service in PROFILE.services if service.sessions is not None]
    (calls,) = [service for service in PROFILE.services if service.sessions is None]
    noisy = msgspec.structs.replace(talk, failure_share=0.9, lengths=None)
    both = [msgspec.structs.replace(PROFILE, services=(calls, each)) for each in (talk, noisy)]
    assert api(both[0])["received_at"].equals(api(both[1])["received_at"])
    assert api(both[0])["response_tokens"].equals(api(both[1])["response_tokens"])


def test_names_of_models() -> None:
    found = whole(PROFILE, seed=0, rows=500, models=["llama"], dataset="mine")
    assert set(found["model"]) == {"llama", "model-1"}
    assert set(found["run_id"]) == {"mine"}


@pytest.mark.parametrize("format", ["burstgpt", "burstgpt6", "parquet", "jsonl"])
def test_every_row_can_be_written(format: str) -> None:
    assert format in FORMATS
    writer = open_writer(io.BytesIO(), format=format)
    for batch in generate(PROFILE, seed=0, rows=300):
        writer.write(batch)
    report = writer.close()
    assert (report.rows_in, report.rows_written) == (300, 300)


def test_zipf_lengths_follow_their_law_and_are_drawn_apart() -> None:
    found = whole(plain_profile(zipf_lengths(1.1, 4096)), seed=0, rows=40_000, process=steady(1.0, 0.5))
    n = np.arange(1, 4097)
    cumulative = np.cumsum(n**-1.1) / np.sum(n**-1.1)
    for column in ("request_tokens", "response_tokens"):
        values = np.sort(found[column].to_numpy())
        assert np.abs(np.searchsorted(values, n, side="right") / 40_000 - cumulative).max() < 0.02
    correlation = found.select(pl.corr("request_tokens", "response_tokens", method="spearman")).item()
    assert abs(correlation) < 4 / math.sqrt(40_000)


def test_generating_is_lazy() -> None:
    assert sum(batch.height for batch in islice(generate(PROFILE, seed=0), 2)) < 300_000
    assert sum(batch.height for batch in islice(generate(PLAIN, seed=0, process=steady(9.0, 1.0)), 2)) < 300_000


def test_the_calendar_ends_a_trace() -> None:
    slow = whole(PLAIN, seed=0, rows=10, process=steady(1e-10, 1.0), start_s=2.5e11)
    assert slow.height < 10
    assert whole(PLAIN, seed=0, rows=10, rate_rps=1e-6, start_s=generation.LAST_S - 2e6).height < 10


def test_a_curves_last_step_may_be_all_there_is() -> None:
    assert whole(PLAIN, seed=0, rows=5, process=Process((0.0, 60.0), (0.0, 1.0), (1.0, 1.0))).height == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed: .* got -1"),
        ({"duration_s": 0.0}, "duration: .* got 0"),
        ({"duration_s": math.inf}, "duration: .* got inf"),
        ({"rows": 0}, "rows: .* got 0"),
        ({"start_s": -1.0}, "start: .* got -1"),
        ({"start_s": math.nan}, "start: .* got nan"),
        ({"rate_rps": 0.0}, "rate: .* got 0"),
        ({"rate_rps": 1e-9}, "rate: expected at least 1e-06 requests/s, got 1e-09"),
        ({"rate_rps": 1.0, "process": Process((0.0, 60.0), (0.0, 1.0), (1.0, 1.0))}, "mean rate > 0, got 0"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(PLAIN, **{"seed": 0, "rows": 1, **wrong})


def run(*arguments: object) -> tuple[int, str]:
    """Exit status and standard error of the command."""
    done = CliRunner().invoke(cli.app, [str(each) for each in arguments], standalone_mode=False)
    if done.exception is not None:
        return 1, str(done.exception)
    return done.exit_code, done.stderr


def test_fit_and_generate_as_commands(tmp_path: Path) -> None:
    rows = source(2, starts=300)
    trace, profile, again = tmp_path / "trace.parquet", tmp_path / "profile.json", tmp_path / "again.csv"
    with trace.open("wb") as stream:
        writer = open_writer(stream, format="parquet")
        writer.write(rows)
        writer.close()
    status, text = run("fit", trace, "-o", profile)
    assert (status, text.startswith(f"{profile}: 2 services of {rows.height:,} requests, ")) == (0, True)
    assert decode_profile(profile.read_bytes()) == fit_profile([rows])
    arguments = ("generate", "--profile", profile, "--duration", 300, "--rate", 8, "--seed", 3, "-o")
    status, text = run(*arguments, again, "--model", "llama")
    assert status == 0
    kept = pl.concat(list(read_trace(again)))
    assert text == f"{again}: {kept.height:,} of {kept.height:,} rows as burstgpt\n"
    assert kept.height == pytest.approx(2400, rel=0.2)
    assert set(kept["model"]) == {"llama", "model-1"}
    # The same seed, the same bytes, whatever the file is called.
    other = tmp_path / "other.csv"
    run(*arguments, other, "--model", "llama")
    assert other.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "arguments",
    [
        ("--process", "poisson", "--rate", 20),
        ("--process", "constant", "--rate", 20),
        ("--process", "gamma", "--rate", 20, "--shape", 0.2),
        ("--process", "modeled", "--rate", 20),
    ],
)
def test_generate_by_process_as_a_command(tmp_path: Path, arguments: tuple[object, ...], format: str) -> None:
    path = tmp_path / "trace"
    status, text = run("generate", *arguments, "--rows", 50, "--start", "2026-11-02", "--format", format, "-o", path)
    assert (status, "50 of 50 rows" in text) == (0, True)
    assert [each.name for each in tmp_path.iterdir()] == ["trace"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a --profile, a --process"),
        (("--process", "trace", "--rows", 1), "name a --profile, a --process"),
        (("--process", "poisson", "--rate", 1), "name a --duration, --rows, or both"),
        (("--process", "poisson", "--rows", 1), "rate: expected with the process poisson, got none"),
        (("--process", "bursty", "--rows", 1), "process: expected one of trace, .* got 'bursty'"),
        (("--process", "gamma", "--rate", 1, "--rows", 1), "shape: expected with the process gamma, got none"),
        (("--process", "constant", "--rate", 0, "--rows", 1), "rate: expected above 0"),
        (("--process", "constant", "--rate", 1, "--rows", 0), "rows: expected an integer >= 1, got 0"),
        (("--process", "constant", "--rate", 1, "--rows", 1, "--format", "xml"), "--format: expected one of"),
        (("--process", "constant", "--rate", 1, "--rows", 1, "--start", "soon"), "--start: expected ISO 8601"),
        (("--process", "constant", "--rate", 1, "--rows", 1, "--request-tokens", 0), "request tokens: expected 1 to"),
        (("--process", "curve", "--rows", 1, "--curve", "/nowhere.csv"), "nowhere.csv"),
        (("--profile", "/nowhere.json", "--rows", 1), "nowhere.json"),
        (("--profile", "/dev/null", "--rows", 1), "profile: expected the JSON that burstgate fit writes"),
    ],
)
def test_wrong_commands(tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    status, text = run("generate", *arguments, "-o", tmp_path / "out")
    assert status == 1
    assert re.search(message, text)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("tokens", [(0, 1), (1, 2**31)])
def test_wrong_lengths(tokens: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="tokens: expected 1 to 2147483647"):
        fixed_lengths(*tokens)


def test_take_until_of_nothing() -> None:
    assert len(take_until(arrival_times_s([], np.random.default_rng(0)))(5.0)) == 0
