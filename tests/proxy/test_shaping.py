"""The rules of shaping, on a clock that the tests turn: limits in every window, nobody idle, nobody forgotten."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.settings import RuleSettings
from proxy.shaping import (
    ADAPTIVE_RANGE,
    ADAPTIVE_START,
    NEVER_NS,
    OTHERS,
    QUANTUM_TOKENS,
    SLACK_NS,
    Gradient,
    Shaping,
    Ticket,
)
from storage.key_file import KeyLimits
from traces.record import LogType, Origin

S = 1_000_000_000


def rule(name: str = "all", **fields: Any) -> RuleSettings:
    return RuleSettings(name=name, **fields)


@dataclass
class Run:
    """A shaper and its clock: whoever is through stays for `service_ns`."""

    shaping: Shaping
    service_ns: int = 0

    def __post_init__(self) -> None:
        self.now_ns = S
        self.gone: list[tuple[int, Ticket]] = []
        self.refused: list[tuple[int, Ticket]] = []
        self._ends: list[tuple[int, Ticket]] = []

    def _through(self, ticket: Ticket) -> None:
        self.gone.append((self.now_ns, ticket))
        self._ends.append((self.now_ns + self.service_ns, ticket))

    def _advance(self) -> None:
        for ticket in self.shaping.advance(self.now_ns):
            if ticket.refusal is None:
                self._through(ticket)
            else:
                self.refused.append((self.now_ns, ticket))

    def offer(self, ticket: Ticket) -> Ticket:
        if self.shaping.offer(ticket, self.now_ns):
            self._through(ticket)
        elif ticket.refusal is not None:
            self.refused.append((self.now_ns, ticket))
        self._advance()
        return ticket

    def come(self, tokens: int = 1, **facts: Any) -> Ticket:
        return self.offer(Ticket(self.now_ns, tokens, **facts))

    def until(self, at_ns: int) -> None:
        """Let time pass, stopping wherever something is due."""
        while True:
            self._ends.sort(key=lambda each: each[0])
            end_ns = self._ends[0][0] if self._ends else NEVER_NS
            due_ns = min(self.shaping.next_ns, end_ns)
            if due_ns > at_ns:
                break
            self.now_ns = max(self.now_ns, due_ns)
            while self._ends and self._ends[0][0] <= self.now_ns:
                self.shaping.leave(self._ends.pop(0)[1], self.now_ns)
            self._advance()
        self.now_ns = max(self.now_ns, at_ns)

    def finish(self) -> None:
        self.until(self.now_ns + 4000 * S)


def shaping(*rules: RuleSettings, **fields: Any) -> Shaping:
    return Shaping(rules, **fields)


def most_over(costs: list[tuple[int, float]], per_s: float) -> float:
    """By how much the costs of any window exceed what its length allows, beyond the burst: the largest excess."""
    worst = 0.0
    level, last_ns = 0.0, costs[0][0] if costs else 0
    for (
        at_ns,
        cost,
    ) in costs:  # the level of a bucket that leaks at the rate is the maximum over all windows that end now
        level = max(0.0, level - (at_ns - last_ns) / S * per_s) + cost
        last_ns = at_ns
        worst = max(worst, level)
    return worst


arrivals = st.lists(
    st.tuples(
        st.floats(0, 2) | st.just(0.0),  # gap, s
        st.integers(1, 4000),  # tokens
        st.sampled_from("abc"),  # tenant, and session
        st.sampled_from(["m", "n"]),
    ),
    min_size=1,
    max_size=60,
)
limits = st.fixed_dictionaries(
    {},
    optional={
        "requests_per_s": st.floats(0.5, 50),
        "burst": st.integers(1, 5),
        "tokens_per_s": st.floats(500, 50_000),
        "concurrency": st.integers(1, 5),
    },
).filter(lambda each: ("burst" not in each or "requests_per_s" in each) and set(each) - {"burst"} != set())


def played(run: Run, comings: list[tuple[float, int, str, str]]) -> list[Ticket]:
    tickets = []
    for gap_s, tokens, who, model in comings:
        run.until(run.now_ns + int(gap_s * S))
        tickets.append(run.come(tokens, tenant=who, session=who, model=model))
    run.finish()
    return tickets


@settings(deadline=None, max_examples=150)
@given(arrivals, limits, limits, st.sampled_from(["none", "session", "tenant"]), st.integers(0, 2 * S))
def test_no_window_is_over_any_limit_and_everybody_is_served(
    comings: list[tuple[float, int, str, str]],
    broad: dict[str, Any],
    narrow: dict[str, Any],
    fair: str,
    service_ns: int,
) -> None:
    rules = (
        rule("all", max_wait_s=3600, fair_by=fair, **broad),
        rule("tenant", max_wait_s=3600, per="tenant", **narrow),
    )
    run = Run(shaping(*rules), service_ns)
    tickets = played(run, comings)
    assert sorted(each.seq for _, each in run.gone) == [each.seq for each in tickets]
    assert run.shaping.waiting == 0
    for limit, classes in ((broad, ["abc"]), (narrow, ["a", "b", "c"])):
        for names in classes:
            mine = [(at_ns, each) for at_ns, each in run.gone if each.tenant and each.tenant in names]
            slack_s = SLACK_NS / S
            if per_s := limit.get("requests_per_s"):
                burst = max(1.0, limit.get("burst") or per_s)
                assert most_over([(at_ns, 1.0) for at_ns, _ in mine], per_s) <= burst + slack_s * per_s + 1e-3
            if per_s := limit.get("tokens_per_s"):
                most = max(per_s, *(float(each.tokens) for _, each in mine), 0.0)
                costs = [(at_ns, float(each.tokens)) for at_ns, each in mine]
                assert most_over(costs, per_s) <= most + slack_s * per_s + 1e-3
            if places := limit.get("concurrency"):
                times = [at_ns for at_ns, _ in mine]
                assert all(sum(b <= a < b + service_ns for b in times) <= places for a in times)


@settings(deadline=None, max_examples=100)
@given(arrivals, limits, st.integers(0, S))
def test_nobody_waits_while_there_is_room(
    comings: list[tuple[float, int, str, str]], limit: dict[str, Any], service_ns: int
) -> None:
    run = Run(shaping(rule(max_wait_s=3600, **limit)), service_ns)
    (bucket,) = [run.shaping.rules[0].bucket(None, 0)]
    for gap_s, tokens, who, model in comings:
        run.until(run.now_ns + int(gap_s * S))
        run.come(tokens, tenant=who, model=model)
        if bucket.queue.size:
            head = bucket.queue.head(run.now_ns, 0)
            assert bucket.ready_ns(head.tokens) > run.now_ns


@settings(deadline=None, max_examples=100)
@given(arrivals, limits, st.integers(0, 5), st.floats(0, 3))
def test_a_queue_is_bounded_in_length_and_wait(
    comings: list[tuple[float, int, str, str]], limit: dict[str, Any], length: int, wait_s: float
) -> None:
    run = Run(shaping(rule(queue=length, max_wait_s=wait_s, **limit)), S)
    for gap_s, tokens, who, model in comings:
        run.until(run.now_ns + int(gap_s * S))
        run.come(tokens, tenant=who, model=model)
        assert run.shaping.waiting <= length
    run.finish()
    assert len(run.gone) + len(run.refused) == len(comings)
    for at_ns, ticket in run.gone + run.refused:
        assert at_ns - ticket.arrived_ns <= int(wait_s * S)
        assert ticket.left_ns == at_ns
    assert {each.retry_after_s >= 1 for _, each in run.refused} <= {True}
    assert run.shaping.rules[0].rejected == len(run.refused)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3000)), min_size=30, max_size=80), st.integers(0, 9))
def test_turns_differ_by_a_quantum_and_two_requests(wanted: list[tuple[str, int]], seed: int) -> None:
    """Of those who have waited from the beginning, and wait still, none has had more than that before another."""
    random.Random(seed).shuffle(wanted)
    run = Run(shaping(rule(concurrency=1, fair_by="session", max_wait_s=3600, queue=100)), S // 100)
    run.come(1, session="first")
    for who, tokens in wanted:
        run.come(tokens, session=who)
    left: dict[str, int] = defaultdict(int)
    for who, _ in wanted:
        left[who] += 1
    served = dict.fromkeys(left, 0)
    run.finish()
    for _, ticket in run.gone[1:]:
        assert ticket.session is not None
        served[ticket.session] += ticket.tokens
        left[ticket.session] -= 1
        if not all(left.values()):
            break
        assert max(served.values()) - min(served.values()) <= QUANTUM_TOKENS + 2 * 3000


def test_priorities_are_strict_until_somebody_has_waited_long() -> None:
    rules = (rule("vip", match={"tenant": "vip"}, priority=1), rule("all", concurrency=1, max_wait_s=3600))
    run = Run(Shaping(rules, ageing_s=10), S)
    run.come(tenant="x")
    low = run.come(tenant="x")
    for _ in range(40):  # a VIP comes twice a second, one request a second is served
        run.come(tenant="vip")
        run.until(run.now_ns + S // 2)
    (at_ns,) = [at_ns for at_ns, ticket in run.gone if ticket is low]
    assert 10 * S <= at_ns - low.arrived_ns <= 21 * S  # after 10 s it is a VIP's equal, and older
    assert (low.held_by and low.held_by.rule.settings.name) == "all"


def test_without_ageing_a_higher_priority_always_goes_first() -> None:
    rules = (rule("vip", match={"tenant": "vip"}, priority=1), rule("all", concurrency=1, max_wait_s=3600))
    run = Run(Shaping(rules, ageing_s=0), S)
    run.come()
    low = run.come(tenant="x")
    vips = [run.come(tenant="vip") for _ in range(30)]
    run.finish()
    order = [ticket for _, ticket in run.gone]
    assert order[1:] == [*vips, low]


def test_a_full_queue_makes_room_for_a_higher_priority() -> None:
    rules = (rule("vip", match={"tenant": "vip"}, priority=1), rule("all", concurrency=1, queue=1))
    run = Run(shaping(*rules), S)
    run.come()
    low = run.come(tenant="x")
    vip = run.come(tenant="vip")
    assert low.refusal is not None
    assert "higher priority" in low.refusal
    assert vip.refusal is None
    assert run.come(tenant="y").refusal is not None


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"tenant": "a"}, {"tenant": "a"}, True),
        ({"tenant": "a"}, {"tenant": "b"}, False),
        ({"tenant": None}, {"tenant": None}, True),  # whoever is not known shares one class
    ],
)
def test_classes(first: dict[str, Any], second: dict[str, Any], same: bool) -> None:
    run = Run(shaping(rule(per="tenant", requests_per_s=1, queue=0)))
    assert run.come(**first).is_through
    assert run.come(**second).is_through is not same


@pytest.mark.parametrize(
    ("match", "facts", "matches"),
    [
        ({}, {}, True),
        ({"model": "llama-*"}, {"model": "llama-3"}, True),
        ({"model": "llama-*"}, {"model": "Llama-3"}, False),  # as names of models are compared
        ({"model": "llama-*"}, {}, False),
        ({"tenant": "*"}, {}, True),
        ({"tenant": "?*"}, {}, False),
        ({"log_type": "api"}, {"log_type": LogType.CONVERSATION}, False),
        ({"log_type": "conversation"}, {"log_type": LogType.CONVERSATION}, True),
        ({"origin": "replay"}, {"origin": Origin.REPLAY}, True),
        ({"origin": "client", "model": "a"}, {"model": "b"}, False),  # every pattern must match
    ],
)
def test_whom_a_rule_is_for(match: dict[str, str], facts: dict[str, Any], matches: bool) -> None:
    run = Run(shaping(rule(match=match, concurrency=1, queue=0)), S)
    run.come(**facts)
    assert (run.come(**facts).refusal is not None) is matches


def test_of_a_group_the_first_that_matches_applies() -> None:
    rules = (
        rule("gold", group="tenants", match={"tenant": "gold"}, concurrency=3, queue=0),
        rule("others", group="tenants", per="tenant", concurrency=1, queue=0),
        rule("all", concurrency=100, queue=0),
    )
    run = Run(shaping(*rules), S)
    assert [run.come(tenant="gold").is_through for _ in range(4)] == [True, True, True, False]
    refused = [run.come(tenant="x") for _ in range(2)]
    assert [each.is_through for each in refused] == [True, False]
    assert refused[1].refusal == (
        "over the limits of shaping rule 'others', tenant 'x': no room, and no queue; try again in 1 s"
    )


def test_a_slow_tenant_holds_up_nobody_else() -> None:
    rules = (
        rule("all", requests_per_s=100, burst=1, fair_by="tenant"),
        rule("slow", per="tenant", match={"tenant": "slow"}, requests_per_s=0.1, burst=1),
    )
    run = Run(shaping(*rules))
    for _ in range(20):
        run.come(tenant="slow")
    others = [run.come(tenant="x") for _ in range(20)]
    run.until(run.now_ns + S // 4)
    assert all(each.is_through for each in others)


def test_who_leaves_frees_its_place_at_once() -> None:
    run = Run(shaping(rule(concurrency=1, queue=1), rule("t", per="tenant", concurrency=1)), 100 * S)
    first = run.come(tenant="a")
    second = run.come(tenant="b")
    run.shaping.leave(second, run.now_ns)
    third = run.come(tenant="b")  # its place in the queue, and its tenant's, are free again
    assert third.refusal is None
    run.shaping.leave(first, run.now_ns)
    assert run.shaping.advance(run.now_ns) == [third]
    assert run.shaping.waiting == 0


def test_tokens_are_settled_by_their_true_number() -> None:
    limit = rule(tokens_per_s=100, burst_tokens=1000)
    run = Run(shaping(limit), 0)
    ticket = run.come(1000)
    run.shaping.settle(ticket, 100)  # 900 come back
    assert run.come(900).is_through
    ticket = run.come(100)
    assert not ticket.is_through
    run.finish()
    assert run.gone[-1][0] == pytest.approx(2 * S, abs=2 * SLACK_NS)  # 1 s for 100 tokens


def test_costs_above_the_burst_pass_and_are_owed() -> None:
    run = Run(shaping(rule(tokens_per_s=100, burst_tokens=100, max_wait_s=100)))
    assert run.come(1000).is_through
    late = run.come(1)
    run.finish()
    assert late.left_ns - late.arrived_ns == pytest.approx(9.01 * S, abs=2 * SLACK_NS)


def test_limits_change_and_whoever_waits_stays() -> None:
    run = Run(shaping(rule(requests_per_s=1, burst=1, max_wait_s=100)))
    tickets = [run.come() for _ in range(5)]
    run.shaping.configure(
        (rule(requests_per_s=1000, burst=10),), ageing_s=1, shares=1, is_leased=False, now_ns=run.now_ns
    )
    run.until(run.now_ns + S)
    assert all(each.is_through for each in tickets)
    assert [ticket.seq for _, ticket in run.gone] == [each.seq for each in tickets]
    run.shaping.configure((), ageing_s=1, shares=1, is_leased=False, now_ns=run.now_ns)
    assert run.come().is_through


def test_rules_that_go_let_those_who_wait_for_them_go() -> None:
    run = Run(shaping(rule(concurrency=1)), 100 * S)
    run.come()
    waiting = run.come()
    run.shaping.configure((), ageing_s=1, shares=1, is_leased=False, now_ns=run.now_ns)
    assert run.shaping.advance(run.now_ns) == [waiting]


def test_each_worker_has_its_part() -> None:
    run = Run(shaping(rule(concurrency=8, queue=0), shares=4), S)
    assert sum(run.come().is_through for _ in range(10)) == 2


def test_classes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.shaping.MAX_CLASSES", 3)
    run = Run(shaping(rule(per="session", requests_per_s=1)), 0)
    for number in range(10):
        run.come(session=str(number))
        run.until(run.now_ns + 2 * S)  # idle ones are forgotten
    assert len(run.shaping.rules[0].buckets) <= 3
    busy = Run(shaping(rule(per="session", concurrency=1)), 100 * S)
    for number in range(10):
        busy.come(session=str(number))
    assert len(busy.shaping.rules[0].buckets) <= 4
    assert OTHERS in busy.shaping.rules[0].buckets


# Keys -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "through"),
    [
        (KeyLimits(concurrency=2), 2),
        (KeyLimits(requests_per_s=3), 3),
        (KeyLimits(tokens_per_s=40), 4),  # of ten each
        (KeyLimits(requests_per_s=5, concurrency=1), 1),
        (KeyLimits(requests_per_s=1e12), 9),  # more than a rule takes is as much as it takes
    ],
)
def test_a_keys_own_limits_hold_for_it_alone(limits: KeyLimits, through: int) -> None:
    run = Run(Shaping((), keys={"key_a": limits}), S)
    assert sum(run.come(10, key_id="key_a").is_through for _ in range(9)) == through
    assert all(run.come(10, key_id=other).is_through for other in ("key_b", None) for _ in range(9))


def test_a_keys_refusal_names_it() -> None:
    run = Run(Shaping((), keys={"key_a": KeyLimits(requests_per_s=0.1)}), S)
    come = [run.come(key_id="key_a") for _ in range(1002)]
    assert [come[0].is_through, come[1].refusal] == [True, None]
    assert str(come[1001].refusal).startswith("over the limits of shaping rule 'key', id 'key_a': 1000 requests wait")
    assert come[1001].held_by is not None
    assert (come[1001].held_by.rule.settings.name, come[1001].held_by.name) == ("key", "key_a")


def test_a_key_stands_between_sessions_and_tenants() -> None:
    rules = (rule("tenants", per="tenant", concurrency=9), rule("sessions", per="session", concurrency=9))
    shaped = shaping(*rules, keys={"key_a": KeyLimits(concurrency=9)})
    ticket = Run(shaped, S).come(key_id="key_a", session="s", tenant="t")
    assert [bucket.rule.settings.name for bucket in ticket.buckets] == ["sessions", "key", "tenants"]


def test_a_keys_limits_change_and_whoever_waits_stays() -> None:
    run = Run(Shaping((), keys={"key_a": KeyLimits(concurrency=1)}), 100 * S)
    come = [run.come(key_id="key_a") for _ in range(4)]
    more = {"key_a": KeyLimits(concurrency=3)}
    run.shaping.configure((), keys=more, ageing_s=1, shares=1, is_leased=False, now_ns=run.now_ns)
    run.until(run.now_ns)
    assert [each.is_through for each in come] == [True, True, True, False]
    run.shaping.configure(
        (), ageing_s=1, shares=1, is_leased=False, now_ns=run.now_ns
    )  # it was revoked: what it has begun goes on
    run.until(run.now_ns)
    assert come[3].is_through
    run.until(run.now_ns + 200 * S)
    assert run.shaping.waiting == 0


# Leases ---------------------------------------------------------------------------------------------------------------


def test_a_leased_rate_waits_for_its_lease_and_keeps_to_it() -> None:
    run = Run(Shaping((rule(requests_per_s=100, burst=1, max_wait_s=100),), is_leased=True))
    tickets = [run.come() for _ in range(5)]
    ((rate, needed),) = run.shaping.leases.values()
    assert (needed, rate.wanted(needed, run.now_ns)) == (5, 5)
    rate.lease(3, 0.0, run.now_ns)
    run.shaping.touch_all()
    run.until(run.now_ns + S)
    assert [each.is_through for each in tickets] == [True] * 3 + [False] * 2
    assert tickets[2].left_ns - tickets[0].left_ns == pytest.approx(2 * S / 100, abs=2 * SLACK_NS)


# The adaptive limit ---------------------------------------------------------------------------------------------------


def fed(gradient: Gradient, ttft_s: float, *, seconds: int, in_flight: int, dropped: bool = False) -> float:
    for _ in range(seconds * 20):
        gradient_ns[0] += S // 20
        gradient.sample(ttft_s, 1.0, dropped=dropped, in_flight=in_flight, now_ns=gradient_ns[0])
    return gradient.limit


gradient_ns = [S]


def test_the_adaptive_limit_follows_the_time_to_first_token() -> None:
    gradient = Gradient()
    grown = fed(gradient, 0.1, seconds=20, in_flight=1000)
    assert grown > ADAPTIVE_START + 10  # nothing queues: more
    shrunk = fed(gradient, 1.0, seconds=20, in_flight=1000)
    assert shrunk < grown * 0.7  # ten times the latency: less
    assert fed(gradient, 0.1, seconds=30, in_flight=1000) > shrunk
    assert fed(gradient, 0.1, seconds=5, in_flight=0) == gradient.limit  # not used: not moved
    assert fed(gradient, 0.1, seconds=100, in_flight=1000, dropped=True) == ADAPTIVE_RANGE[0]


def test_plain_answers_stand_in_until_a_stream_comes() -> None:
    gradient = Gradient()
    for step in range(400):
        gradient.sample(None, 0.5, dropped=False, in_flight=100, now_ns=S + step * S // 20)
    assert gradient.limit > ADAPTIVE_START
    assert not gradient.has_ttft
