from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.faults import KINDS, FaultPlan, Faults

API, CHAT = "API log", "Conversation log"


def drawing(*draws: float, **fields: object) -> Faults:
    return Faults(msgspec.convert(fields, FaultPlan), iter(draws).__next__)


@pytest.mark.parametrize(
    ("drawn", "fault"),
    [
        (0.0, "status_429"),
        (0.0999, "status_429"),
        (0.1, "stall"),
        (0.2999, "stall"),
        (0.301, None),  # past the shares
        (0.999, None),
    ],
)
def test_a_draw_falls_into_the_shares_in_order(drawn: float, fault: str | None) -> None:
    assert drawing(drawn, status_429=0.1, stall=0.2).draw("m", None, API) == fault


@pytest.mark.parametrize(
    ("fields", "model", "tenant", "is_hit"),
    [
        ({}, None, None, True),
        ({"models": ["m"]}, "m", None, True),
        ({"models": ["m"]}, "n", None, False),
        ({"models": ["m"]}, None, None, False),
        ({"tenants": ["t"]}, "m", "t", True),
        ({"tenants": ["t"]}, "m", None, False),
        ({"models": ["m"], "tenants": ["t"]}, "m", "u", False),
    ],
)
def test_only_the_models_and_tenants_named(
    fields: dict[str, object], model: str | None, tenant: str | None, is_hit: bool
) -> None:
    assert (drawing(0.5, reset=1.0, **fields).draw(model, tenant, API) == "reset") is is_hit


def test_failure_shares_say_how_many_and_the_faults_in_what_proportions() -> None:
    plan = FaultPlan(status_500=0.03, reset=0.01, failure_shares={API: 0.4, CHAT: 0.0})
    faults = Faults(plan, random.Random(1).random)
    drawn = Counter(faults.draw("m", None, API) for _ in range(20_000))
    assert drawn["status_500"] == pytest.approx(6_000, rel=0.05)
    assert drawn["reset"] == pytest.approx(2_000, rel=0.08)
    assert {faults.draw("m", None, CHAT) for _ in range(100)} == {None}
    assert {faults.draw("m", None, "another") for _ in range(100)} == {None}


@given(st.lists(st.floats(0.001, 1), min_size=6, max_size=6), st.floats(0, 1, exclude_max=True))
def test_every_draw_is_a_fault_or_none_by_the_total(weights: list[float], drawn: float) -> None:
    shares = {kind: weight / sum(weights) / 2 for kind, weight in zip(KINDS, weights, strict=True)}
    found = drawing(drawn, **shares).draw("m", None, API)
    assert (found is None) == (drawn >= sum(shares.values()))
    assert found is None or found in KINDS


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({}, "faults: expected shares whose sum is above 0 and at most 1, got 0"),
        ({"reset": 0.6, "stall": 0.6}, "at most 1, got 1.2"),
        ({"reset": -0.1}, "faults: reset: expected a share of 0 to 1, got -0.1"),
        ({"stall": 0.1, "stall_s": 0}, "faults: stall_s: expected seconds above 0 to 3600, got 0"),
        ({"reset": 0.1, "seed": -1}, "faults: seed: expected an integer >= 0, got -1"),
        ({"reset": 0.1, "failure_shares": {API: 2}}, "failure_shares: API log: expected a share of 0 to 1, got 2"),
        ({"status_418": 0.1}, "unknown field `status_418`"),
    ],
)
def test_bad_faults_are_named(fields: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        msgspec.convert(fields, FaultPlan)
