from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from proxy.balance import Decision
from proxy.config_error import ConfigError
from proxy.settings import Settings
from proxy.upstream import Fleet, Selection, Upstream, build_fleet
from tests.proxy.harness import closed_port, in_loop, until
from wire.http import ConnectFailed

OFF = {"interval_s": 0, "models_interval_s": 0}
"""Nobody asks by himself."""
FAST = {"interval_s": 0.02, "models_interval_s": 0.02, "timeout_s": 0.5, "pause_s": 0.05}


class Server:
    """An upstream on a real socket that can be switched between its moods."""

    def __init__(self, *models: str) -> None:
        self.models = models
        self.mood = "well"
        self.targets: Counter[str] = Counter()
        self.headers: list[bytes] = []
        self.port = 0
        self.connections = 0
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            await asyncio.sleep(0)

    def _answer(self, target: str) -> tuple[int, bytes]:
        if self.mood == "sick":
            return 503, b"{}"
        if target == "/health":
            return 200, b""
        if self.mood == "secretive":
            return 401, b"{}"
        if self.mood == "odd":
            return 200, b'{"data":[{"no":"id"}]}'
        if self.mood == "endless":
            return 200, b" " * (5 * 1024 * 1024)
        own = [
            {"id": model, "object": "model", "owned_by": f"port {self.port}", "max_model_len": 7}
            for model in self.models
        ]
        return 200, json.dumps({"object": "list", "data": own}).encode()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                target = head.split(b" ", 2)[1].decode()
                self.targets[target] += 1
                self.headers.append(head)
                if self.mood == "silent":
                    await reader.read()  # until the other side gives up
                    return
                if self.mood == "cuts" or self._server is None:
                    return
                status, body = self._answer(target)
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.connections -= 1


@contextlib.asynccontextmanager
async def servers(*models: str) -> AsyncIterator[list[Server]]:
    """Servers, each with models as in "a,b"."""
    made = [Server(*each.split(",")) if each else Server() for each in models]
    for server in made:
        await server.start()
    try:
        yield made
    finally:
        for server in made:
            await server.stop()


def fleet(*urls: Any, health: dict[str, Any] | None = None, **settings: Any) -> Fleet:
    return build_fleet(Settings(upstreams=urls, health=OFF if health is None else health, **settings))


def select(of: Fleet, model: str | None = "m", session: str | None = None, prefix: tuple[int, ...] = ()) -> Selection:
    return of.select(model=model, session=session, prefix=prefix)


def ask(of: Fleet, status: int = 200, **about: Any) -> str:
    """One request that is answered; gives the upstream's name."""
    selection = select(of, **about)
    upstream = selection.pick()
    assert upstream is not None, selection.problem
    selection.answered(status)
    selection.release()
    return upstream.name


def states(of: Fleet) -> list[str]:
    return [str(view.state) for view in of.views()]


HOSTS = tuple(f"http://host-{index}" for index in range(4))


# One request's way ----------------------------------------------------------------------------------------------------


def test_slots_are_taken_and_given_back_once() -> None:
    of = fleet(*HOSTS[:2])
    selection = select(of)
    first = selection.pick()
    assert first is not None
    assert first is selection.upstream
    assert (first.in_flight, selection.attempts) == (1, 1)
    selection.connect_failed("refused")
    second = selection.pick()
    assert second is not None
    assert second is not first
    assert [upstream.in_flight for upstream in of.upstreams] == [0, 1]
    selection.answered(200)
    selection.release()
    selection.release()
    assert [upstream.in_flight for upstream in of.upstreams] == [0, 0]
    assert selection.attempts == 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_is_tried_once_after_failed_connections_whatever_the_budget(count: int) -> None:
    of = fleet(*HOSTS[:count], retry={"max_attempts": 1, "budget": 0, "min_per_s": 0})
    selection = select(of)
    tried = []
    while (upstream := selection.pick()) is not None:
        tried.append(upstream.name)
        selection.connect_failed(f"{upstream.name}: refused")
        assert selection.may_retry() == (len(tried) < count)
    assert sorted(tried) == list(HOSTS[:count])
    assert selection.problem == f"{tried[-1]}: refused"
    assert [upstream.in_flight for upstream in of.upstreams] == [0] * count


def test_attempts_are_bounded() -> None:
    of = fleet(*HOSTS, retry={"max_attempts": 3})
    selection = select(of)
    names = []
    while (upstream := selection.pick()) is not None:
        names.append(upstream.name)
        selection.failed("status 503")
    assert len(set(names)) == len(names) == selection.attempts == 3
    assert selection.problem == f"{names[-1]}: status 503"
    assert not selection.may_retry()


def test_asking_twice_uses_the_budget_once() -> None:
    of = fleet(*HOSTS, retry={"budget": 0, "min_per_s": 0.2})  # two in ten seconds
    allowed = []
    for _ in range(3):
        selection = select(of)
        selection.pick()
        selection.failed("lost")
        allowed.append((selection.may_retry(), selection.may_retry(), selection.pick() is not None))
        selection.release()
    assert allowed == [(True,) * 3, (True,) * 3, (False,) * 3]


def test_retries_are_a_share_of_the_requests() -> None:
    of = fleet(
        *HOSTS[:2], retry={"budget": 0.2, "min_per_s": 0}, health={**OFF, "max_failures": 9999, "outlier_margin": 0}
    )
    retried = 0
    for _ in range(100):
        selection = select(of)
        selection.pick()
        selection.failed("lost")
        retried += selection.pick() is not None
        selection.release()
    assert retried == 20


def test_no_retry_where_only_the_unwell_are_left() -> None:
    of = fleet(*HOSTS[:2])
    of.upstreams[1].connect_failed()
    selection = select(of)
    assert selection.pick() is of.upstreams[0]
    selection.failed("status 503")  # an answer that can still be passed on is worth more than a guess
    assert not selection.may_retry()
    assert selection.pick() is None
    selection = select(of)
    assert selection.pick() is of.upstreams[0]
    selection.connect_failed("refused")
    assert selection.may_retry()
    assert selection.pick() is of.upstreams[1]
    assert selection.decision == Decision(1, "least_in_flight", 1, is_guess=True)
    selection.release()


@pytest.mark.parametrize(
    ("upstreams", "model", "problem"),
    [
        ((), "m", "no upstream is configured"),
        (({"url": "http://a", "drain": True},), "m", "http://a: draining"),
        (({"url": "http://a", "drain": True}, {"url": "http://b", "drain": True}), "m", "every upstream is draining"),
        (({"url": "http://a", "drain": True, "models": ["m"]}, "http://b"), "m",
         "model 'm': every upstream that serves it is draining"),
    ],
)  # fmt: skip
def test_nobody_to_choose(upstreams: tuple[Any, ...], model: str, problem: str) -> None:
    selection = select(fleet(*upstreams), model)
    assert selection.pick() is None
    assert (selection.upstream, selection.attempts, selection.problem) == (None, 0, problem)
    selection.answered(200)
    selection.failed("x")
    selection.broke_off()
    selection.release()


def test_draining_upstream_gets_nothing_new() -> None:
    of = fleet(HOSTS[0], {"url": HOSTS[1], "drain": True})
    assert {ask(of) for _ in range(9)} == {HOSTS[0]}
    assert states(of) == ["up", "draining"]


# Policies -------------------------------------------------------------------------------------------------------------


def test_weights_share_out_an_idle_fleet() -> None:
    for policy in ("least_in_flight", "round_robin"):
        of = fleet({"url": "http://a", "weight": 3}, {"url": "http://b"}, balance={"policy": policy})
        assert Counter(ask(of) for _ in range(40)) == {"http://a": 30, "http://b": 10}


def test_least_in_flight_counts_what_is_in_flight() -> None:
    of = fleet({"url": "http://a", "weight": 2}, {"url": "http://b"})
    running = [select(of) for _ in range(9)]
    assert Counter(upstream.name for each in running if (upstream := each.pick())) == {"http://a": 6, "http://b": 3}


def test_models_take_turns_of_their_own() -> None:
    of = fleet(*({"url": url, "models": ["m", "n"]} for url in HOSTS[:2]), balance={"policy": "round_robin"})
    taken = Counter((model, ask(of, model=model)) for model in ("m", "n") * 4)
    assert set(taken.values()) == {2}


def test_session_keeps_its_upstream_until_that_is_out() -> None:
    of = fleet(*HOSTS, balance={"policy": "session"})
    home = {session: ask(of, session=session) for session in map(str, range(40))}
    assert set(home.values()) == set(HOSTS)
    assert {session: ask(of, session=session) for session in home} == home
    of.upstreams[0].connect_failed()
    of.apply(of.settings)
    moved = {session: ask(of, session=session) for session in home}
    assert all(moved[session] == home[session] for session in home if home[session] != HOSTS[0])
    assert HOSTS[0] not in moved.values()
    assert ask(of, session=None) in HOSTS[1:]


def test_prefix_goes_where_it_was_and_spreads_under_load() -> None:
    of = fleet(*HOSTS, balance={"policy": "prefix"})
    assert of.needs_prefix
    talk = (11, 12, 13)
    home = ask(of, prefix=talk)
    assert {ask(of, prefix=(*talk, 14 + turn)) for turn in range(9)} == {home}
    assert {ask(of, prefix=talk[:1]) for _ in range(9)} == {home}
    assert {ask(of, prefix=()) for _ in range(12)} == set(HOSTS)
    running = [select(of, prefix=talk) for _ in range(16)]
    assert all(each.pick() for each in running)
    assert max(upstream.in_flight for upstream in of.upstreams) <= 6  # 1.5 times 16 / 4
    decision = running[0].decision
    assert decision is not None
    assert decision.policy == "prefix"


# Models ---------------------------------------------------------------------------------------------------------------


def test_model_goes_only_to_those_who_serve_it() -> None:
    of = fleet({"url": "http://a", "models": ["m"]}, {"url": "http://b", "models": ["n"]}, "http://c")
    assert {ask(of, model="m") for _ in range(9)} == {"http://a"}
    assert {ask(of, model="n") for _ in range(9)} == {"http://b"}
    assert {ask(of, model="?") for _ in range(9)} == {"http://a", "http://b", "http://c"}
    assert {ask(of, model=None) for _ in range(9)} == {"http://a", "http://b", "http://c"}
    of.upstreams[0].connect_failed()
    of.apply(of.settings)
    selection = select(of, "m")
    assert selection.pick() is of.upstreams[0]  # nobody else would know the model
    selection.connect_failed("refused")
    assert selection.pick() is None


def route(of: Fleet, model: str) -> list[tuple[str, str | None]]:
    """Where a request goes and under which name, when every connection fails."""
    selection = select(of, model)
    found = []
    while (upstream := selection.pick()) is not None:
        found.append((upstream.name, selection.model))
        selection.connect_failed("refused")
    return found


TWO = ({"url": "http://a", "models": ["m"]}, {"url": "http://b", "models": ["n"]})


@pytest.mark.parametrize(
    ("settings", "model", "way"),
    [
        ({}, "m", [("http://a", None)]),
        ({"aliases": {"x": "m"}}, "x", [("http://a", "m")]),
        ({"aliases": {"n": "m"}}, "n", [("http://a", "m")]),  # an alias may hide a model
        ({"fallbacks": {"m": ["n"]}}, "m", [("http://a", None), ("http://b", "n")]),
        ({"fallbacks": {"m": ["n"]}, "aliases": {"x": "m"}}, "x", [("http://a", "m"), ("http://b", "n")]),
        ({"fallbacks": {"x": ["n"]}, "aliases": {"x": "m"}}, "x", [("http://a", "m"), ("http://b", "n")]),
        ({"fallbacks": {"m": "y"}, "aliases": {"y": "n"}}, "m", [("http://a", None), ("http://b", "n")]),
        ({"fallbacks": {"gone": ["n"]}}, "gone", [("http://b", "n"), ("http://a", None)]),
        ({"fallbacks": {"n": ["m"]}}, "m", [("http://a", None)]),
    ],
)
def test_aliases_and_fallbacks(settings: dict[str, Any], model: str, way: list[tuple[str, str | None]]) -> None:
    of = fleet(*TWO, **settings)
    assert not of.is_plain
    assert route(of, model) == way


def test_fallback_is_taken_at_once_when_nobody_who_serves_the_model_is_well() -> None:
    of = fleet(*TWO, fallbacks={"m": ["n"]})
    of.upstreams[0].connect_failed()
    of.apply(of.settings)
    assert route(of, "m") == [("http://b", "n"), ("http://a", None)]


@pytest.mark.parametrize(
    ("upstreams", "settings", "is_plain"),
    [
        (("http://a",), {}, True),
        (("http://a", "http://b"), {}, False),
        (("http://a",), {"aliases": {"x": "m"}}, False),
        (("http://a",), {"fallbacks": {"x": "m"}}, False),
        ((), {}, False),
    ],
)
def test_plain(upstreams: tuple[str, ...], settings: dict[str, Any], is_plain: bool) -> None:
    assert fleet(*upstreams, **settings).is_plain == is_plain


def test_alias_with_one_upstream() -> None:
    assert route(fleet("http://a", aliases={"x": "m"}), "x") == [("http://a", "m")]
    assert route(fleet("http://a", aliases={"x": "m"}), "m") == [("http://a", None)]


@in_loop
async def test_models_are_discovered_before_the_first_request_and_again() -> None:
    async with servers("m,both", "n,both", "") as (a, b, c):
        of = fleet(a.url, b.url, c.url, health={**FAST, "interval_s": 0})
        async with of:
            assert [view.models for view in of.views()] == [("m", "both"), ("n", "both"), ()]
            assert {ask(of, model="n") for _ in range(5)} == {b.url}
            assert {ask(of, model="both") for _ in range(6)} == {a.url, b.url}
            a.models = ("m", "n")
            await until(lambda: of.upstreams[0].models == ("m", "n"), "the new model is known")
            assert {ask(of, model="n") for _ in range(6)} == {a.url, b.url}
            a.mood = "secretive"
            b.mood = "odd"
            c.mood = "endless"
            asked = a.targets["/v1/models"], c.targets["/v1/models"]
            await until(
                lambda: a.targets["/v1/models"] > asked[0] + 2 and c.targets["/v1/models"] > asked[1] + 1, "asked"
            )
            assert [view.models for view in of.views()] == [("m", "n"), ("n", "both"), ()]  # what was known stays


@in_loop
async def test_upstreams_that_do_not_say_what_they_serve_do_not_hold_up_the_start() -> None:
    async with servers("m", "n", "o") as (silent, known, secretive):
        silent.mood = "silent"
        secretive.mood = "secretive"
        gone = f"http://127.0.0.1:{closed_port()}"
        upstreams = (silent.url, {"url": known.url, "models": ["k"]}, secretive.url, gone)
        of = fleet(*upstreams, health={**OFF, "models_interval_s": 30, "timeout_s": 0.1})
        async with of:
            assert [view.models for view in of.views()] == [None, ("k",), None, None]
            assert known.targets["/v1/models"] == 0
            assert {ask(of, model="x") for _ in range(8)} == {silent.url, known.url, secretive.url, gone}


@in_loop
async def test_one_upstream_is_not_asked_for_models() -> None:
    async with servers("m") as (a,):
        async with fleet(a.url, health=FAST):
            await until(lambda: a.targets["/health"] > 2, "probed")
        assert a.targets["/v1/models"] == 0
        probes = a.targets["/health"]
        await asyncio.sleep(0.1)
        assert a.targets["/health"] <= probes + 1  # one may have been on its way


@in_loop
async def test_merged_models() -> None:
    async with servers("m,both", "both,n", "x", "hidden") as (a, b, sick, drained):
        sick.mood = "sick"
        gone = f"http://127.0.0.1:{closed_port()}"
        upstreams = (a.url, b.url, sick.url, gone, {"url": drained.url, "drain": True})
        of = fleet(*upstreams, aliases={"fast": "n", "both": "m", "none": "nowhere"})
        headers = [(b"authorization", b"Bearer k"), (b"accept-encoding", b"gzip"), (b"if-none-match", b"x")]
        body = await of.models(headers)
        assert body is not None
        merged = json.loads(body)
        assert merged["object"] == "list"
        own = {"object": "model", "max_model_len": 7}
        by_a, by_b = f"port {a.port}", f"port {b.port}"
        assert merged["data"] == [
            {"id": "m", "owned_by": by_a, **own},
            {"id": "both", "owned_by": by_a, "root": "m", **own},
            {"id": "n", "owned_by": by_b, **own},
            {"id": "fast", "owned_by": by_b, "root": "n", **own},
        ]
        assert b"authorization: Bearer k" in a.headers[0]
        assert not any(word in a.headers[0] for word in (b"gzip", b"if-none-match"))
        assert drained.targets["/v1/models"] == 0
        for server in (a, b):
            server.mood = "secretive"
        assert await of.models([]) is None
        of.close()


# Health ---------------------------------------------------------------------------------------------------------------


@in_loop
async def test_probes_take_an_upstream_out_and_bring_it_back(caplog: pytest.LogCaptureFixture) -> None:
    async with servers("m", "m") as (a, b):
        of = fleet(a.url, b.url, health=FAST, balance={"slow_start_s": 0})
        async with of:
            assert {ask(of) for _ in range(4)} == {a.url, b.url}
            for mood, error in [
                ("sick", "GET /health: status 503"),
                ("cuts", "GET /health: *"),
                ("silent", "no answer"),
            ]:
                a.mood = mood
                await until(lambda: states(of) == ["down", "up"], f"{mood}: down")
                assert {ask(of) for _ in range(4)} == {b.url}
                assert error.rstrip("*") in (of.views()[0].error or "")
                a.mood = "well"
                await until(lambda: states(of) == ["up", "up"], f"{mood}: up again")
                assert {ask(of) for _ in range(4)} == {a.url, b.url}
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines[0] == f"upstream {a.url}: down: GET /health: status 503"
    assert lines[1::2] == [f"upstream {a.url}: well again"] * 3


@in_loop
async def test_a_server_that_knows_no_health_route_is_well() -> None:
    async with servers("m", "m") as (a, b):
        a.mood = "secretive"
        of = fleet(a.url, b.url, health={**FAST, "path": "/v1/nothing", "unhealthy_after": 1})
        async with of:
            await until(lambda: a.targets["/v1/nothing"] > 3, "probed")
            assert states(of) == ["up", "up"]


async def talk(of: Fleet, **about: Any) -> tuple[str | None, int]:
    """One request over the wire, as a gateway makes it: (who answered, attempts)."""
    selection = select(of, **about)
    while (upstream := selection.pick()) is not None:
        try:
            exchange = await upstream.client.request(b"GET", b"/v1/chat", [])
            await exchange.wait_head()
        except ConnectFailed as error:
            selection.connect_failed(str(error))
        except Exception as error:
            selection.failed(str(error))
        else:
            while not exchange.is_complete:
                await exchange.wait()
                exchange.take()
            if exchange.status in of.settings.retry.statuses:
                selection.failed(f"status {exchange.status}")
                if selection.may_retry():
                    continue
            selection.answered(exchange.status)
            selection.release()
            return upstream.name, selection.attempts
    selection.release()
    return None, selection.attempts


@in_loop
async def test_an_upstream_that_dies_and_comes_back_by_traffic_alone() -> None:
    async with servers("m", "m") as (a, b):
        health = {**OFF, "pause_s": 0.05, "trials": 2}
        of = fleet(a.url, b.url, health=health, balance={"slow_start_s": 0}, timeouts={"upstream_idle_s": 0})
        assert {(await talk(of))[0] for _ in range(4)} == {a.url, b.url}
        await a.stop()
        answers = [await talk(of) for _ in range(10)]
        assert {who for who, _ in answers} == {b.url}
        assert 1 <= sum(attempts - 1 for _, attempts in answers) <= 2  # after the first it is passed over
        await until(lambda: states(of)[0] == "half_open", "half open")
        await talk(of)
        await a.start()
        back = []
        for _ in range(200):
            back.append((await talk(of))[0])
            if states(of) == ["up", "up"]:
                break
            await asyncio.sleep(0.005)
        assert states(of) == ["up", "up"]
        assert None not in back
        assert {(await talk(of))[0] for _ in range(4)} == {a.url, b.url}
        assert [upstream.health.trials for upstream in of.upstreams] == [0, 0]
        of.close()


@in_loop
async def test_an_upstream_that_answers_503_is_ejected_and_nobody_notices() -> None:
    async with servers("m", "m", "m") as (a, b, c):
        a.mood = "sick"
        of = fleet(a.url, b.url, c.url, health={**OFF, "pause_s": 60, "max_failures": 3})
        answers = [await talk(of) for _ in range(30)]
        assert {who for who, _ in answers} == {b.url, c.url}
        assert sum(attempts - 1 for _, attempts in answers) == 3
        assert states(of) == ["ejected", "up", "up"]
        assert of.views()[0].error == "status 503"
        of.close()


@pytest.mark.parametrize(
    ("status", "state"), [(500, "ejected"), (503, "ejected"), (501, "up"), (429, "up"), (404, "up")]
)
def test_which_answers_are_an_upstreams_fault(status: int, state: str) -> None:
    of = fleet(*HOSTS[:2], health={**OFF, "max_failures": 2, "outlier_margin": 0})
    for _ in range(20):
        ask(of, status)
    assert (states(of)[0] == "ejected") == (state == "ejected")
    assert "up" in states(of)  # only half of a fleet is ejected


def test_answers_cut_off_in_a_row_eject_although_they_began_well() -> None:
    of = fleet(*HOSTS[:2], health={**OFF, "max_failures": 3, "outlier_margin": 0})
    for _ in range(12):
        selection = select(of)
        upstream = selection.pick()
        selection.answered(200)
        if upstream is of.upstreams[0]:
            selection.broke_off()
            selection.broke_off()
        selection.release()
    assert states(of) == ["ejected", "up"]
    assert of.upstreams[0].health.failures == 3


def test_error_rate_far_above_the_rest_ejects() -> None:
    of = fleet(*HOSTS[:3], health={**OFF, "max_failures": 1000, "min_requests": 10})
    for number in range(300):
        selection = select(of)
        upstream = selection.pick()
        assert upstream is not None
        selection.answered(500 if upstream is of.upstreams[1] and number % 2 else 200)
        selection.release()
    assert states(of) == ["up", "ejected", "up"]
    assert of.views()[1].error == "fails more often than the rest: status 500"


def test_when_all_fail_alike_nobody_is_ejected_beyond_the_share_and_somebody_is_chosen() -> None:
    of = fleet(*HOSTS, health={**OFF, "max_failures": 2})
    for _ in range(100):
        ask(of, 500)
    assert states(of).count("ejected") == 2
    for upstream in of.upstreams:
        upstream.connect_failed()
    of.apply(of.settings)
    assert states(of).count("up") == 0
    assert set(Counter(ask(of) for _ in range(40))) <= set(HOSTS)


def test_trials_are_bounded_and_end_with_their_requests() -> None:
    of = fleet(*HOSTS[:2], health={**OFF, "pause_s": 0.000001, "trials": 2})
    of.upstreams[0].connect_failed()
    of.apply(of.settings)
    running = []
    for _ in range(60):
        selection = select(of)
        selection.pick()
        running.append(selection)
    assert of.upstreams[0].in_flight == of.upstreams[0].health.trials == 2
    for selection in running:
        selection.release()  # their clients left: nothing is known
    assert of.upstreams[0].health.trials == 0
    assert states(of)[0] == "half_open"


def test_slow_start_gives_little_at_first() -> None:
    balance = {"policy": "round_robin", "slow_start_s": 1000}
    of = fleet(HOSTS[1], balance=balance)
    of.apply(Settings(upstreams=HOSTS[:2], balance=balance, health=OFF))
    taken = Counter(ask(of) for _ in range(110))
    assert taken == {HOSTS[0]: 10, HOSTS[1]: 100}
    assert states(of)[0] == "slow_start"
    assert of.views()[0].share == pytest.approx(0.1)


# Configuration --------------------------------------------------------------------------------------------------------


@in_loop
async def test_reload_keeps_what_stays() -> None:
    async with servers("m", "m", "m") as (a, b, c):
        of = fleet(a.url, b.url, health=FAST)
        async with of:
            kept, gone = of.upstreams
            assert {(await talk(of))[0] for _ in range(4)} == {a.url, b.url}
            connections = a.connections
            going = [select(of) for _ in range(4)]
            assert all(each.pick() for each in going)
            wanted = Settings(
                upstreams=({"url": a.url + "/", "weight": 5, "name": "first"}, c.url),
                health=FAST,
                balance={"policy": "session"},
                aliases={"x": "m"},
            )
            of.apply(wanted)
            assert of.upstreams[0] is kept
            assert (kept.in_flight, kept.name, kept.client.url.text) == (2, "first", a.url)
            assert a.connections == connections > 0
            assert states(of) == ["up", "slow_start"]  # a new one is cold
            assert of.policy == "session"
            await until(lambda: of.upstreams[1].models == ("m",), "the new one's models are known")
            await until(lambda: c.targets["/health"] > 1, "the new one is probed")
            assert gone.in_flight == 2
            for each in going:
                each.answered(200)
                each.release()
            assert [gone.in_flight, kept.in_flight] == [0, 0]
            await until(lambda: b.connections == 0, "the removed one's connections are closed")
            assert {ask(of, session=str(number)) for number in range(40)} == {"first", c.url}
            probes = b.targets["/health"]
            await until(lambda: c.targets["/health"] > 5, "time passes")
            assert b.targets["/health"] == probes


def test_reload_that_can_not_be_done_changes_nothing(tmp_path: Path) -> None:
    of = fleet("https://a", "http://b")
    before = of.upstreams
    bad = tmp_path / "ca.pem"
    bad.write_text("no certificate")
    with pytest.raises(ConfigError, match=rf"^upstreams: https://a: .*{bad.name}.*$"):
        of.apply(Settings(upstreams=({"url": "https://a", "ca_file": bad}, "http://c")))
    assert of.upstreams == before
    assert not any(upstream.is_retired for upstream in before)
    with pytest.raises(ConfigError, match=r"^upstreams: https://a: .*missing.pem.*$"):
        build_fleet(Settings(upstreams=({"url": "https://a", "ca_file": tmp_path / "missing.pem"},)))


def test_request_in_the_middle_of_a_reload_goes_on() -> None:
    of = fleet(*HOSTS[:3])
    selection = select(of)
    first = selection.pick()
    assert first is not None
    of.apply(Settings(upstreams=tuple(url for url in reversed(HOSTS) if url != first.name), health=OFF))
    selection.connect_failed("refused")
    names = set()
    while (upstream := selection.pick()) is not None:
        names.add(upstream.name)
        selection.connect_failed("refused")
    assert names == set(HOSTS) - {first.name}
    assert first.in_flight == 0


def test_names() -> None:
    of = fleet({"url": "http://a/", "name": "alpha"}, "http://b/")
    assert [view.name for view in of.views()] == ["alpha", "http://b"]


def test_fleet_of_upstreams() -> None:
    of = Fleet([Upstream(url, connect_timeout_s=1, idle_s=1) for url in HOSTS[:2]])
    assert sorted([ask(of), ask(of)]) == list(HOSTS[:2])
    of.close()
