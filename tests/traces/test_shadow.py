from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from traces.compare import Axis, Difference, Verdict
from traces.shadow import PAIRS, Change, ShadowOptions, check_options, compare_shadow

N = 600


def pairs(n: int = N, seed: int = 1, **columns: Any) -> pl.DataFrame:
    """Pairs that went well and are alike; columns replace theirs."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, 400, n)
    latency_s = rng.gamma(4, 0.1, n)
    fields: dict[str, Any] = {
        **dict.fromkeys(("a_outcome", "b_outcome"), ["ok"] * n),
        **dict.fromkeys(("a_status", "b_status"), [200] * n),
        **dict.fromkeys(("a_request_tokens", "b_request_tokens"), tokens),
        **dict.fromkeys(("a_response_tokens", "b_response_tokens"), tokens),
        **dict.fromkeys(("a_finish_reason", "b_finish_reason"), ["stop"] * n),
        "agreement": np.ones(n),
    }
    for name in ("ttft_s", "tpot_s", "elapsed_s"):
        fields[f"a_{name}"] = latency_s
        fields[f"b_{name}"] = latency_s * rng.normal(1, 0.02, n)
    fields |= columns
    return pl.DataFrame({name: pl.Series(fields[name], dtype=dtype) for name, dtype in PAIRS.items()})


def axes(table: pl.DataFrame, **options: Any) -> dict[str, Axis]:
    found = compare_shadow([table], "next", ShadowOptions(rounds=100, **options))
    return {axis.name: axis for axis in found.axes}


def figure(axis: Axis, name: str) -> Difference:
    (found,) = [each for each in axis.differences if each.name == name]
    return found


def test_a_target_that_is_as_production_is_the_same_on_every_axis() -> None:
    found = compare_shadow([pairs()[:100], pairs()[100:]], "next", ShadowOptions(rounds=100))
    assert (found.verdict, found.pairs, found.unpaired, found.changes) == (Verdict.SAME, N, 0, ())
    assert {axis.name: axis.verdict for axis in found.axes} == dict.fromkeys(
        ("outcome", "tokens", "latency", "output"), Verdict.SAME
    )


half = [200] * (N // 2) + [503] * (N // 2)
slow = pairs()["a_elapsed_s"] * 1.4
longer = pairs()["a_response_tokens"] * 1.2
DIFFERENT: list[tuple[str, str, dict[str, Any], float]] = [
    ("outcome", "failure_rate", {"b_outcome": ["ok"] * (N - 60) + ["upstream_error"] * 60}, 0.1),
    ("outcome", "status_differs", {"b_status": half}, 0.5),
    ("tokens", "response_tokens_mean", {"b_response_tokens": longer.cast(pl.Int64)}, 0.2),
    ("tokens", "finish_reason_differs", {"b_finish_reason": ["length"] * 120 + ["stop"] * (N - 120)}, 0.2),
    ("latency", "e2e_s_pair", {"b_elapsed_s": slow}, 0.4),
    ("latency", "e2e_s_p99", {"b_elapsed_s": slow}, 0.4),
    ("latency", "ttft_s_p50", {"b_ttft_s": slow}, 0.4),
    ("output", "agreement_mean", {"agreement": np.full(N, 0.7)}, -0.3),
]


@pytest.mark.parametrize(("axis", "name", "columns", "difference"), DIFFERENT, ids=[row[1] for row in DIFFERENT])
def test_what_differs_is_found(axis: str, name: str, columns: dict[str, Any], difference: float) -> None:
    found = axes(pairs(**columns))
    each = figure(found[axis], name)
    assert each.difference is not None
    assert each.difference == pytest.approx(difference, abs=0.01)
    assert each.low is not None
    assert each.high is not None
    assert each.low <= each.difference <= each.high
    assert each.verdict is Verdict.DIFFERENT
    assert found[axis].verdict is Verdict.DIFFERENT


def test_a_pair_is_compared_with_itself() -> None:
    """Requests differ a thousandfold, their pairs by 5 %: only the paired figure can tell."""
    base_s = np.random.default_rng(2).lognormal(0, 2, 80)
    found = axes(pairs(80, a_elapsed_s=base_s, b_elapsed_s=base_s * 1.05), latency_tolerance=0.03)
    assert figure(found["latency"], "e2e_s_pair").verdict is Verdict.DIFFERENT


def test_few_pairs_tell_nothing() -> None:
    found = compare_shadow([pairs(5)], "next", ShadowOptions(rounds=100))
    assert found.verdict is Verdict.UNKNOWN


def test_no_pairs_at_all() -> None:
    found = compare_shadow([], "next")
    assert (found.verdict, found.pairs) == (Verdict.UNKNOWN, 0)
    assert [axis.is_known for axis in found.axes] == [False] * 4


def test_shadows_without_a_primary_are_counted_and_left_out() -> None:
    lost = ["ok"] * (N - 7) + [None] * 7
    found = compare_shadow([pairs(a_outcome=lost)], "next", ShadowOptions(rounds=20))
    assert (found.pairs, found.unpaired) == (N - 7, 7)


def test_what_was_not_compared_is_not_judged() -> None:
    found = compare_shadow([pairs(agreement=[None] * N)], "next", ShadowOptions(rounds=100))
    assert not found.axes[-1].is_known
    assert found.verdict is Verdict.SAME


def test_outcomes_that_change_are_listed_most_frequent_first() -> None:
    a = ["ok"] * 590 + ["upstream_error"] * 10
    b = ["truncated"] * 3 + ["upstream_timeout"] * 20 + ["ok"] * 577
    found = compare_shadow([pairs(a_outcome=a, b_outcome=b)], "next", ShadowOptions(rounds=20))
    assert found.changes == (
        Change("ok", "upstream_timeout", 20),
        Change("upstream_error", "ok", 10),
        Change("ok", "truncated", 3),
    )


def test_the_same_seed_gives_the_same_answer() -> None:
    table = pairs()
    assert compare_shadow([table], "next", ShadowOptions(rounds=50)) == compare_shadow(
        [table], "next", ShadowOptions(rounds=50)
    )


@pytest.mark.parametrize("field", ["latency_tolerance", "rounds", "confidence"])
def test_options_out_of_range_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        check_options(ShadowOptions(**{field: 0}))
