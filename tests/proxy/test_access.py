"""Keys and routes: the rules, and people who try to get past them at a real gateway."""

from __future__ import annotations

import asyncio
import os
import re
import string
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.access import MANAGEMENT, MAX_DECODINGS, Access, RouteRules, access_of
from proxy.errors import GatewayError
from proxy.request_head import RequestHead
from proxy.settings import KeySettings, RouteSettings, UpstreamSettings
from storage.key_file import CachedKey, key_file, key_hash, read_key_file, write_key_file
from tests.proxy.harness import JSON, Client, Upstream, chat_answer, chat_body, in_loop, plain, running
from traces.record import LogType, Outcome

SECRET = b"s" * 32
DEFAULT = RouteRules(deny_management=True, allow=(), deny=())
EXACT = [entry for entry in MANAGEMENT if not entry.endswith("/*")]


# Routes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/responses/resp_1", b"/v1/messages",
        b"/v1/responses/resp_1/cancel", b"/v1/models", b"/v1/embeddings", b"/v1/rerank", b"/v2/rerank", b"/score",
        b"/tokenize", b"/detokenize", b"/pooling", b"/classify", b"/invocations", b"/ping", b"/health", b"/metrics",
        b"/version", b"/load", b"/v1/audio/transcriptions", b"/inference/v1/generate", b"/", b"*", b"",
        b"/anything/else", b"/v1/files?path=/sleep", b"/v1/sleeping", b"/asleep", b"/v1//models/", b"/v1/x%20y",
        b"/v1/sleep/deep", b"/%E4%BD%A0",
    ],
)  # fmt: skip
def test_what_vllm_serves_to_clients_passes(target: bytes) -> None:
    assert not DEFAULT.refuses(target)


@pytest.mark.parametrize(
    "target",
    [
        *(entry.replace("/*", "/x").encode() for entry in MANAGEMENT),
        b"/v1/load_lora_adapter", b"/v1/unload_lora_adapter", b"/inference/v1/abort_requests",
        b"/fault_tolerance/apply",
        b"/sleep/", b"//sleep", b"/./sleep", b"/v1/../sleep", b"/%73leep", b"/%2573leep", b"/SLEEP", b"/sleep?level=1",
        b"/sleep#x", b"/sleep%23x", b"/sleep%3Fx", b"/sleep;x=1", b"/v1;x/..;y/sleep", b"\\sleep", b"/v1\\..\\sleep",
        b"/v1%2f..%2fsleep", b"/v1/%2e%2e/sleep", b"/v1/.%2e/sleep", b"/sleep%00", b"/sl\teep", b"/sleep%20",
        b"/sleep/.",
        b"/root-path/sleep", b"/a%3F%2F..%2Fsleep", b"/sleep/x/..",
        b"/%" + b"25" * 20 + b"73leep",
    ],
)  # fmt: skip
def test_management_is_refused_however_it_is_spelt(target: bytes) -> None:
    assert DEFAULT.refuses(target)


def encoded(path: str, picks: list[bool]) -> str:
    return "".join(f"%{ord(char):02x}" if pick else char for char, pick in zip(path, picks, strict=False))


@st.composite
def spellings(draw: st.DrawFn) -> bytes:
    """A management route as somebody might spell it who wants to slip past."""
    path = draw(st.sampled_from(EXACT))
    junk = st.text(string.ascii_lowercase, min_size=1, max_size=5)
    for step in draw(
        st.lists(st.sampled_from(["case", "up", "slashes", "dots", "prefix", "parameter", "tail"]), max_size=4)
    ):
        if step == "case":
            flips = draw(st.lists(st.booleans(), min_size=len(path), max_size=len(path)))
            path = "".join(char.upper() if flip else char for char, flip in zip(path, flips, strict=True))
        elif step == "up":
            path = f"/{draw(junk)}/..{path}"
        elif step == "slashes":
            path = path.replace("/", draw(st.sampled_from(["//", "///", "\\", "/\\"])))
        elif step == "dots":
            path = path.replace("/", "/./")
        elif step == "prefix":
            path = f"/{draw(junk)}{path}"
        elif step == "parameter":
            path = f"{path};{draw(junk)}"
        else:
            path += draw(st.sampled_from(["/", "//", "/.", "?x=/v1/models", "#/v1/models"]))
            break
    for _ in range(draw(st.integers(0, 3))):
        path = path[:1] + encoded(path[1:], draw(st.lists(st.booleans(), min_size=len(path), max_size=len(path))))
    return path.encode()


@given(spellings())
def test_no_spelling_slips_past(target: bytes) -> None:
    assert DEFAULT.refuses(target)


@given(st.binary(max_size=60))
def test_whatever_vllm_reads_as_management_is_refused(tail: bytes) -> None:
    """uvicorn decodes a path once; Starlette compares it whole."""
    target = b"/" + tail.replace(b"\r", b"").replace(b"\n", b"")
    path = unquote(target.partition(b"?")[0].partition(b"#")[0].decode("latin-1"), "latin-1")
    assert DEFAULT.refuses(target) >= (path in EXACT)


def test_an_endless_encoding_is_refused_at_once() -> None:
    start_s = time.perf_counter()
    assert DEFAULT.refuses(b"/%" + b"25" * 32_000 + b"73leep")
    assert DEFAULT.refuses(b"/" + b"../" * 20_000 + b"sleep")
    assert time.perf_counter() - start_s < 1.0
    assert MAX_DECODINGS < 20


@pytest.mark.parametrize(
    ("allow", "deny", "target", "expected"),
    [
        ((), ("/metrics",), b"/metrics", True),
        ((), ("/metrics",), b"/%6detrics", True),
        ((), ("/metrics",), b"/v1/models", False),
        ((), ("/internal/*",), b"/internal/x", True),
        ((), ("/internal/*",), b"/internal", False),
        ((), ("/internal/*",), b"/v1/../internal/x", True),
        (("/sleep",), (), b"/sleep", False),
        (("/sleep",), (), b"/wake_up", True),
        (("/sleep",), (), b"/x/../sleep", True),  # can be read otherwise
        (("/v1/*",), (), b"/v1/load_lora_adapter", True),  # management is the more exact entry
        (("/v1/load_lora_adapter",), (), b"/v1/load_lora_adapter", False),
        (("/v1/load_lora_adapter",), ("/v1/load_lora_adapter",), b"/v1/load_lora_adapter", True),
        (("/v1/*",), ("/*",), b"/v1/models", False),
        (("/v1/*", "/health"), ("/*",), b"/health", False),
        (("/v1/*",), ("/*",), b"/metrics", True),
        (("/v1/*",), ("/*",), b"/v1/../metrics", True),
        (("/v1/*",), ("/*",), b"/v1/..%2fmetrics", True),
        ((), ("/",), b"/", True),
        ((), ("/",), b"/v1/models", False),
    ],
)
def test_entries(allow: tuple[str, ...], deny: tuple[str, ...], target: bytes, expected: bool) -> None:
    assert RouteRules(deny_management=True, allow=allow, deny=deny).refuses(target) is expected


def test_management_passes_where_the_settings_say_so() -> None:
    assert not RouteRules(deny_management=False, allow=(), deny=()).refuses(b"/sleep")


def test_the_list_covers_the_vllm_that_is_installed() -> None:
    """Every route of vLLM's folders for developers, trainers and operators is refused."""
    home = Path(os.environ.get("VLLM_CPU_HOME", "~/.cache/vllm-cpu")).expanduser()
    found = list(home.glob("venv/lib/python*/site-packages/vllm/entrypoints"))
    if not found:
        pytest.skip(f"needs the vLLM build at {home} (VLLM_CPU_HOME)")
    routes = set()
    for part in ("serve/dev", "serve/lora", "serve/profile", "serve/elastic_ep", "serve/fault_tolerance", "rl"):
        for path in (found[0] / part).rglob("*.py"):
            routes |= set(re.findall(r'router\.(?:get|post|put|delete)\(\s*"(/[^"]+)"', path.read_text()))
    assert {"/sleep", "/collective_rpc", "/v1/load_lora_adapter", "/update_weights"} <= routes
    assert [route for route in sorted(routes) if not DEFAULT.refuses(route.encode())] == []


# Keys -----------------------------------------------------------------------------------------------------------------

GOOD = CachedKey("key_1", "alice", key_hash(SECRET, b"bg-good"), "team-a")
OLD = CachedKey("key_2", "old", key_hash(SECRET, b"bg-old"), expires_at=100.0)
ADMIN = CachedKey("key_3", "ops", key_hash(SECRET, b"bga-admin"), role="admin")
KEYS = (GOOD, OLD, ADMIN)


def head(*headers: tuple[bytes, bytes]) -> RequestHead:
    return RequestHead(list(headers), b"x-session-id", b"x-burstgate-log-type")


def bearer(token: bytes) -> tuple[bytes, bytes]:
    return (b"Authorization", b"Bearer " + token)


@pytest.mark.parametrize(
    ("headers", "required", "optional"),
    [
        ([bearer(b"bg-good")], GOOD, GOOD),
        ([(b"authorization", b"bearer   bg-good ")], GOOD, GOOD),
        ([(b"X-Api-Key", b"bg-good")], GOOD, GOOD),
        ([bearer(b"sk-other"), (b"x-api-key", b"bg-good")], GOOD, GOOD),
        ([bearer(b"bg-good"), bearer(b"bg-wrong")], GOOD, GOOD),
        ([], "no API key", None),
        ([(b"Authorization", b"Basic YmctZ29vZA==")], "no API key", None),
        ([(b"Authorization", b"bg-good")], "no API key", None),
        ([bearer(b"")], "no API key", None),
        ([bearer(b"sk-other")], "not known", None),  # the upstream's to judge, where none of ours is required
        ([bearer(b"bg-goo")], "not known", "not known"),
        ([bearer(b"bg-good2")], "not known", "not known"),
        ([bearer(b"BG-GOOD")], "not known", None),
        ([bearer(b"bg-old")], "has expired", "has expired"),
        ([bearer(b"bga-admin")], "not known", None),  # an administrator's token is no client's key
        ([bearer(b"\xff\x00bg-good")], "not known", None),
        ([bearer(b"x")] * 4 + [bearer(b"bg-good")], "not known", None),  # a bounded number is looked at
    ],
)
def test_who_is_let_in(headers: list[tuple[bytes, bytes]], required: Any, optional: Any) -> None:
    for is_required, expected in ((True, required), (False, optional)):
        found = Access(KEYS, SECRET, required=is_required).check(head(*headers), 100.0)
        if isinstance(expected, str):
            assert isinstance(found, GatewayError)
            assert (found.status, found.type) == (401, "invalid_api_key")
            assert expected in found.message
            assert "bg-" not in found.message
        else:
            assert found == expected


@given(st.binary(max_size=64))
def test_only_a_key_is_a_key(token: bytes) -> None:
    found = Access(KEYS, SECRET, required=True).check(head(bearer(token)), 100.0)
    assert isinstance(found, GatewayError) or token.strip(b" \t") == b"bg-good"


@pytest.mark.parametrize(
    ("keys", "required", "expected"), [(None, False, False), (None, True, True), ((), False, True), (KEYS, False, True)]
)
def test_nothing_is_checked_where_there_is_nothing_to_check(keys: Any, required: bool, expected: bool) -> None:
    assert (access_of(keys, SECRET, required=required) is not None) is expected


# At a gateway ---------------------------------------------------------------------------------------------------------


def own_secret(tmp_path: Path) -> KeySettings:
    path = tmp_path / "key-secret"
    path.write_bytes(SECRET)
    return KeySettings(required=True, secret_file=path)


@in_loop
async def test_a_key_gives_tenant_and_log_type_and_stays_here(tmp_path: Path) -> None:
    key = CachedKey("key_1", "a", GOOD.hash, "team-a", log_type=LogType.CONVERSATION)
    write_key_file(key_file(tmp_path), [key])
    async with (
        Upstream(plain(chat_answer())) as upstream,
        running(tmp_path, upstream.url, keys=own_secret(tmp_path)) as bench,
    ):
        client = await bench.serve(
            Client(chat_body("a"), headers=[JSON, bearer(b"bg-good"), (b"x-api-key", b"bg-good")])
        )
        assert client.status == 200
        record = bench.record()
        assert (record.tenant, record.log_type, record.outcome) == ("team-a", LogType.CONVERSATION, Outcome.OK)
        (seen,) = upstream.requests
        assert b"bg-good" not in repr(seen).encode()
        assert bench.gateway.keys_used == {"key_1"}
        begun, _ = bench.journal()
        assert [each.tenant for each in begun] == ["team-a"]


@in_loop
async def test_without_a_key_nothing_reaches_the_upstream(tmp_path: Path) -> None:
    write_key_file(key_file(tmp_path), KEYS)
    async with Upstream(plain()) as upstream, running(tmp_path, upstream.url, keys=own_secret(tmp_path)) as bench:
        for headers in ([JSON], [JSON, bearer(b"bg-wrong")], [JSON, bearer(b"bg-old")]):
            client = await bench.serve(Client(chat_body("a"), headers=headers))
            assert client.status == 401
            assert client.error["type"] == client.error["code"] == "invalid_api_key"
            assert client.values(b"www-authenticate") == [b"Bearer"]
        assert upstream.requests == []
        assert {(each.outcome, each.status, each.tenant) for each in bench.records()} == {
            (Outcome.INVALID_REQUEST, 401, None)
        }
        assert bench.counter("keys_refused") == 3


@in_loop
async def test_a_client_without_a_key_is_refused_before_its_body(tmp_path: Path) -> None:
    write_key_file(key_file(tmp_path), KEYS)
    async with Upstream(plain()) as upstream, running(tmp_path, upstream.url, keys=own_secret(tmp_path)) as bench:
        client = Client([b"x" * 10, b"y" * 10], headers=[JSON, (b"Content-Length", b"1000000")])
        client.is_hesitant = True
        assert (await bench.serve(client)).status == 401


@in_loop
async def test_a_revoked_key_stops_and_a_new_one_begins(tmp_path: Path) -> None:
    write_key_file(key_file(tmp_path), KEYS)
    async with (
        Upstream(plain(chat_answer())) as upstream,
        running(tmp_path, upstream.url, keys=own_secret(tmp_path)) as bench,
    ):
        ask = Client
        assert (await bench.serve(ask(chat_body("a"), headers=[JSON, bearer(b"bg-good")]))).status == 200
        write_key_file(key_file(tmp_path), [CachedKey("key_9", "n", key_hash(SECRET, b"bg-new"))])
        bench.gateway.take_keys(read_key_file(key_file(tmp_path)))
        assert (await bench.serve(ask(chat_body("a"), headers=[JSON, bearer(b"bg-good")]))).status == 401
        assert (await bench.serve(ask(chat_body("a"), headers=[JSON, bearer(b"bg-new")]))).status == 200


@in_loop
async def test_a_reload_that_requires_keys_does_so_at_once(tmp_path: Path) -> None:
    async with Upstream(plain(chat_answer())) as upstream, running(tmp_path, upstream.url) as bench:
        assert (await bench.serve(Client(chat_body("a")))).status == 200
        settings = bench.gateway.settings
        for required, status in ((True, 401), (False, 200)):
            bench.gateway.apply(settings.model_copy(update={"keys": KeySettings(required=required)}))
            assert (await bench.serve(Client(chat_body("a")))).status == status


@in_loop
async def test_a_foreign_credential_passes_where_no_key_is_required(tmp_path: Path) -> None:
    write_key_file(key_file(tmp_path), KEYS)
    async with Upstream(plain(chat_answer())) as upstream, running(tmp_path, upstream.url) as bench:
        assert (await bench.serve(Client(chat_body("a"), headers=[JSON, bearer(b"sk-other")]))).status == 200
        assert upstream.requests[0].values(b"Authorization") == [b"Bearer sk-other"]


@pytest.mark.parametrize(
    "target",
    [b"/sleep", b"//sleep", b"/v1/%2e%2e/sleep", b"http://h/sleep", b"http://h/v1/load_lora_adapter#x", b"/sleep#x"],
)
@in_loop
async def test_management_does_not_reach_the_upstream(tmp_path: Path, target: bytes) -> None:
    async with Upstream(plain()) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(b"{}", target=target))
        assert (client.status, client.error["type"]) == (403, "route_not_allowed")
        assert upstream.requests == []
        assert bench.record().outcome is Outcome.INVALID_REQUEST
        assert bench.counter("routes_refused") == 1


@in_loop
async def test_routes_change_while_running(tmp_path: Path) -> None:
    async with Upstream(plain()) as upstream, running(tmp_path, upstream.url) as bench:
        assert (await bench.serve(Client(b"{}", path="/sleep"))).status == 403
        settings = bench.gateway.settings.model_copy(
            update={"routes": RouteSettings(allow=("/sleep",), deny=("/metrics",))}
        )
        bench.gateway.apply(settings)
        assert (await bench.serve(Client(b"{}", path="/sleep"))).status == 200
        assert (await bench.serve(Client(method="GET", path="/metrics"))).status == 403


# Upstreams ------------------------------------------------------------------------------------------------------------


@in_loop
async def test_an_upstreams_key_replaces_the_clients(tmp_path: Path) -> None:
    file = tmp_path / "vllm-key"
    file.write_text("first\n")
    async with Upstream(plain(chat_answer())) as one, Upstream(plain(chat_answer())) as other:
        settings = [
            UpstreamSettings(url=one.url, api_key_file=file, models=("m",)),
            UpstreamSettings(url=other.url, models=("n",)),
        ]
        async with running(tmp_path, *settings) as bench:  # type: ignore[arg-type]
            mine = [JSON, bearer(b"mine"), (b"X-API-Key", b"mine")]
            await bench.serve(Client(chat_body("a"), headers=mine))
            await bench.serve(Client(chat_body("a", model="n"), headers=mine))
            file.write_text("second")
            bench.gateway.fleet.reread_keys()
            await bench.serve(Client([chat_body("a")], headers=mine))
            await bench.serve(Client(method="GET", path="/v1/models", headers=mine))
        keys = [
            [value for name, value in each.headers if name.lower() in (b"authorization", b"x-api-key")]
            for each in one.requests
        ]
        assert keys == [[b"Bearer first"], [b"Bearer second"], [b"Bearer second"]]
        assert [each.values(b"Authorization") for each in other.requests] == [[b"Bearer mine"]] * 2


@pytest.mark.parametrize(
    ("target", "headers", "more"),
    [
        (b"http://ELSEWHERE/v1/chat/completions", [], {}),
        (b"/v1/chat/completions", [(b"Host", b"ELSEWHERE")], {}),
        (b"/v1/chat/completions", [(b"X-Forwarded-Host", b"ELSEWHERE"), (b"Forwarded", b"host=ELSEWHERE")], {}),
        (
            b"/v1/chat/completions",
            [(b"X-Upstream", b"http://ELSEWHERE"), (b"x-burstgate-upstream", b"http://ELSEWHERE")],
            {},
        ),
        (
            b"/v1/chat/completions",
            [(b"X-Original-URL", b"http://ELSEWHERE/x"), (b"X-Rewrite-URL", b"http://ELSEWHERE/x")],
            {},
        ),
        (b"/v1/chat/completions?api_base=http://ELSEWHERE&base_url=http://ELSEWHERE", [], {}),
        (b"/v1/chat/completions", [], {"api_base": "http://ELSEWHERE", "base_url": "http://ELSEWHERE"}),
        (b"/v1/chat/completions", [], {"model": "http://ELSEWHERE/m", "upstream": "http://ELSEWHERE"}),
        (b"//ELSEWHERE/v1/chat/completions", [], {}),
        (b"/@ELSEWHERE/v1/chat/completions", [], {}),
    ],
)
@in_loop
async def test_a_client_can_not_choose_the_upstream(
    tmp_path: Path, target: bytes, headers: list[tuple[bytes, bytes]], more: dict[str, Any]
) -> None:
    async with Upstream(plain(chat_answer())) as ours, Upstream(plain(b"stolen")) as elsewhere:
        there = elsewhere.url.removeprefix("http://")
        async with running(tmp_path, ours.url) as bench:
            client = Client(
                chat_body("a", **{name: value.replace("ELSEWHERE", there) for name, value in more.items()}),
                target=target.replace(b"ELSEWHERE", there.encode()),
                headers=[JSON, *((name, value.replace(b"ELSEWHERE", there.encode())) for name, value in headers)],
            )
            assert b"stolen" not in (await bench.serve(client)).body
            await asyncio.sleep(0)
        assert (len(ours.requests), elsewhere.connections) == (1, 0)
        assert ours.requests[0].values(b"host") == [ours.url.removeprefix("http://").encode()]
