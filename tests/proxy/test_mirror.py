"""Shadow traffic, over real sockets with a real journal: what leaves, what is dropped and why, what is recorded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config_error import ConfigError
from proxy.mirror import Windows, is_drawn, keep_headers, public_target, read_key
from proxy.settings import CollectSettings, MirrorTargetSettings, Settings, show_value
from proxy.telemetry import MIRROR_DROPS
from tests.proxy.harness import (
    CHAT,
    JSON,
    PIECES,
    Bench,
    Client,
    Script,
    Talk,
    Upstream,
    chat_answer,
    chat_body,
    chunk,
    closed_port,
    in_loop,
    plain,
    running,
    streaming,
    until,
)
from traces.record import Origin, Outcome, TokenSource, TraceRecord

BODY = chat_body("hi")


def mirror(*targets: Any) -> dict[str, Any]:
    """The settings with these shadow targets."""
    return {"mirror": {"targets": list(targets)}}


def target(url: str, **more: Any) -> dict[str, Any]:
    return {"url": url, "name": "staging", **more}


def counts(bench: Bench) -> dict[str, int]:
    """What the mirror counted, but for zeros."""
    names = ["offered", "sent", "queued", "in_flight", *(f"dropped_{reason}" for reason in MIRROR_DROPS)]
    found = {name: bench.counter(f"mirror_{name}") for name in names}
    return {name: value for name, value in found.items() if value}


async def settled(bench: Bench) -> list[TraceRecord]:
    """The shadows' records, once nothing of the mirror is in flight."""
    mirror = bench.gateway.any_mirror
    assert mirror is not None

    def is_over() -> bool:
        return not (bench.counter("mirror_queued") or mirror.is_busy or mirror.waiting or bench.writer.open_requests)

    await until(is_over, "the mirror is idle")
    assert [each.held_bytes for each in mirror.targets] == [0] * len(mirror.targets)
    return [record for record in bench.records() if record.origin is Origin.SHADOW]


def stall() -> Script:
    async def script(talk: Talk) -> None:
        await talk.gone()

    return script


# Pure -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_is_what_is_drawn(share: float) -> None:
    threshold = int(share * 2**64)
    drawn = sum(is_drawn(f"session-{number}", b"k" * 32, threshold) for number in range(20_000))
    assert abs(drawn / 20_000 - share) < 0.015


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_what_a_smaller_one_has(name: str, a: float, b: float) -> None:
    low, high = sorted((int(a * 2**64), int(b * 2**64)))
    assert is_drawn(name, b"key", low) <= is_drawn(name, b"key", high)


@given(
    st.floats(0.1, 100),
    st.floats(0.1, 10),
    st.lists(st.floats(0, 50), min_size=1, max_size=50),
)
def test_collected_requests_leave_in_order_after_their_window_with_their_gaps(
    collect_s: float, speed: float, gaps_s: list[float]
) -> None:
    windows = Windows(CollectSettings(collect_s=collect_s, speed=speed))
    now_ns = 1
    came, due = [], []
    for gap_s in gaps_s:
        now_ns += int(gap_s * 1e9)
        came.append(now_ns)
        due.append(windows.due_ns(now_ns))
    assert due == sorted(due)
    begun_ns = came[0]
    for (a_came, a_due), (b_came, b_due) in zip(
        zip(came, due, strict=True), list(zip(came, due, strict=True))[1:], strict=False
    ):
        if b_came >= begun_ns + int(collect_s * 1e9):
            begun_ns = b_came
            assert b_due >= b_came + int(collect_s * 1e9)
        else:
            assert abs((b_due - a_due) - (b_came - a_came) / speed) <= 2


CREDENTIALS = [
    b"Authorization", b"x-api-key", b"API-Key", b"Cookie", b"Proxy-Authorization", b"X-Auth-Token", b"x-goog-api-key",
    b"Ocp-Apim-Subscription-Key", b"X-Amz-Security-Token", b"x-client-secret", b"X-Forwarded-For", b"set-cookie",
]  # fmt: skip


@given(st.lists(st.sampled_from([*CREDENTIALS, b"Content-Type", b"X-Session-Id", b"User-Agent", b"x-team"])))
def test_no_credential_leaves_whatever_its_place_and_case(names: list[bytes]) -> None:
    headers = [(name, b"client-secret-value") for name in names]
    settings = MirrorTargetSettings(url="http://h", headers={"X-Set": "1"}, drop_headers=("X-Team",))
    kept = keep_headers(headers, settings, "own-key")
    assert [name for name, _ in kept if name not in (b"authorization", b"x-set")] == [
        name for name in names if name in (b"Content-Type", b"X-Session-Id", b"User-Agent")
    ]
    assert dict(kept)[b"authorization"] == b"Bearer own-key"
    assert dict(kept)[b"x-set"] == b"1"


def test_a_header_that_is_set_takes_the_place_of_the_key() -> None:
    settings = MirrorTargetSettings(url="http://h", headers={"Authorization": "Basic eA=="})
    assert keep_headers([(b"authorization", b"Bearer client")], settings, "own") == [(b"authorization", b"Basic eA==")]


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        (b"/v1/x", b"/v1/x"),
        (b"/v1/x?api-version=2", b"/v1/x?api-version=2"),
        (b"/v1/x?api_key=s", b"/v1/x"),
        (b"/v1/x?a=1&Token=s&b=2", b"/v1/x?a=1&b=2"),
    ],
)
def test_query_parameters_that_sound_like_credentials_stay(target: bytes, shown: bytes) -> None:
    assert public_target(target) == shown


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"share": 1.5}, "less than or equal to 1"),
        ({"shares": 1}, "nearest known one is 'share'"),
        ({"headers": {"host": "x"}}, "no header that can be set"),
        ({"headers": {"x-a": "p\r\ninjected: 1"}}, "visible ASCII"),
        ({"api_key_env": "A", "api_key_file": "b"}, "not both"),
        ({"ca_file": "x"}, "https"),
        ({"release": {"collect_s": 0}}, "greater than 0"),
        ({"url": "ftp://h"}, "expected http"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Settings(**mirror({"url": "http://h", **fields}))


def test_two_targets_have_two_names() -> None:
    with pytest.raises(ValueError, match="named once"):
        Settings(**mirror("http://h", "http://h/"))


# What leaves ----------------------------------------------------------------------------------------------------------


@in_loop
async def test_what_leaves_on_the_wire_has_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw socket in the shadow's place: the bytes as they came."""
    seen: list[bytes] = []

    async def raw(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        seen.append(head + await reader.readexactly(len(BODY)))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-type: application/json\r\n\r\n{}")
        await writer.drain()
        writer.close()

    monkeypatch.setenv("STAGING_KEY", "sk-staging")
    server = await asyncio.start_server(raw, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    headers = [
        JSON, (b"Authorization", b"Bearer sk-client"), (b"X-API-Key", b"sk-client"), (b"Cookie", b"sid=sk-client"),
        (b"X-Request-Id", b"req-7"), (b"X-Session-Id", b"s1"), (b"X-Team", b"sk-client"), (b"User-Agent", b"sdk"),
        (b"X-Forwarded-For", b"10.9.8.7"),
    ]  # fmt: skip
    async with (
        Upstream(plain(chat_answer())) as upstream,
        running(
            tmp_path,
            upstream.url,
            **mirror(target(url, api_key_env="STAGING_KEY", headers={"x-env": "staging"}, drop_headers=["x-team"])),
        ) as bench,
    ):
        await bench.serve(Client(BODY, headers=headers, target=b"/v1/chat/completions?api_key=sk-client"))
        await settled(bench)
    server.close()
    (raw_bytes,) = seen
    head, _, body = raw_bytes.partition(b"\r\n\r\n")
    assert body == BODY
    assert b"sk-client" not in raw_bytes
    assert b"10.9.8.7" not in raw_bytes
    assert sorted(head.lower().split(b"\r\n")[1:]) == sorted(
        [
            b"host: " + url.removeprefix("http://").encode(), b"content-type: application/json", b"x-session-id: s1",
            b"user-agent: sdk", b"authorization: bearer sk-staging", b"x-env: staging", b"x-request-id: req-7",
            b"content-length: %d" % len(BODY),
        ]
    )  # fmt: skip
    assert upstream.requests[0].values(b"Authorization") == [b"Bearer sk-client"]


@in_loop
async def test_a_shadow_is_recorded_beside_its_primary(tmp_path: Path) -> None:
    stream = chat_body("hi", stream=True, max_tokens=5)
    async with (
        Upstream(streaming()) as upstream,
        Upstream(streaming(chunk("a"), chunk("b"), chunk(finish="length"))) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url, models={"m": "m-next"}, tells=True))) as bench,
    ):
        client = await bench.serve(Client(stream, headers=[JSON, (b"x-session-id", b"s1")]))
        (record,) = await settled(bench)
        (primary,) = [each for each in bench.records() if each.origin is Origin.CLIENT]
        assert counts(bench) == {"offered": 1, "sent": 1}
        assert bench.counter("mirror_outcome_ok") == 1
        assert bench.counter("outcome_ok") == 1  # the client's alone
    assert client.body.startswith(PIECES[0])
    assert shadow.requests[0].fields == {
        **json.loads(stream),
        "model": "m-next",
        "stream_options": {"include_usage": True},
    }
    assert shadow.requests[0].values(b"x-burstgate-shadow-of") == [primary.request_id.encode()]
    assert (record.origin, record.shadow_of, record.upstream) == (Origin.SHADOW, primary.request_id, "staging")
    assert record.request_id != primary.request_id
    assert (record.model, record.served_model, record.session_id) == ("m-next", "served", "s1")
    assert (record.outcome, record.status, record.finish_reason) == (Outcome.OK, 200, "length")
    assert (record.request_tokens, record.response_tokens, record.token_source) == (7, 3, TokenSource.USAGE)
    assert (record.stream, record.endpoint, record.max_tokens, record.attempts) == (True, CHAT, 5, 1)
    assert record.agreement is None
    assert record.ttft_s is not None
    assert record.tpot_s is not None
    assert 0 < record.ttft_s <= (record.elapsed_s or 0) < 5


@in_loop
async def test_sessions_stay_together_and_the_rest_is_drawn_by_request(tmp_path: Path) -> None:
    async with (
        Upstream(plain(chat_answer())) as upstream,
        Upstream(plain(chat_answer())) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url, share=0.5))) as bench,
    ):
        for number in range(120):
            headers = [JSON, (b"x-session-id", b"s%d" % (number % 20))] if number < 80 else [JSON]
            await bench.serve(Client(chat_body(f"hi {number}"), headers=headers))
        records = await settled(bench)
    sessions = [record.session_id for record in records if record.session_id is not None]
    drawn = set(sessions)
    assert 2 <= len(drawn) <= 18
    assert len(sessions) == 4 * len(drawn)  # each of a session's requests, or none
    assert 5 <= len(records) - len(sessions) <= 35


@in_loop
async def test_an_inferred_session_stays_together_from_its_first_turn(tmp_path: Path) -> None:
    """A first turn has no session yet: it is drawn by its own id, which is the session's afterwards."""
    async with (
        Upstream(plain(chat_answer("hello"))) as upstream,
        Upstream(plain(chat_answer("hello"))) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url, share=0.5))) as bench,
    ):
        for number in range(30):
            await bench.serve(Client(chat_body(f"hi {number}")))
            await bench.serve(Client(chat_body(f"hi {number}", "hello", "more")))
        await settled(bench)
        primaries = {each.request_id: each for each in bench.records() if each.origin is Origin.CLIENT}
        shadows = [each for each in bench.records() if each.origin is Origin.SHADOW]
    turns: dict[str, int] = {}
    for record in shadows:
        primary = primaries[str(record.shadow_of)]
        conversation = primary.session_id or primary.request_id
        turns[conversation] = turns.get(conversation, 0) + 1
    assert 0 < len(turns) < 30
    assert set(turns.values()) == {2}


@in_loop
async def test_copies_leave_together_or_late_by_their_jitter(tmp_path: Path) -> None:
    async with (
        Upstream(plain(chat_answer())) as upstream,
        Upstream(plain(chat_answer())) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url, copies=4, jitter_s=0.2))) as bench,
    ):
        await bench.serve(Client(BODY))
        records = await settled(bench)
        assert counts(bench) == {"offered": 4, "sent": 4}
    assert len({record.request_id for record in records}) == 4
    assert len({record.shadow_of for record in records}) == 1
    sent_s = sorted(record.received_at for record in records)
    assert 0.001 < sent_s[-1] - sent_s[0] < 0.5


@in_loop
async def test_collected_requests_leave_later_and_faster(tmp_path: Path) -> None:
    release = {"collect_s": 0.5, "speed": 4}
    async with (
        Upstream(plain(chat_answer())) as upstream,
        Upstream(plain(chat_answer())) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url, release=release))) as bench,
    ):
        for _ in range(3):
            await bench.serve(Client(BODY))
            await asyncio.sleep(0.12)
        assert not shadow.requests
        assert counts(bench) == {"offered": 3, "queued": 3}
        records = await settled(bench)
        primaries = [each for each in bench.records() if each.origin is Origin.CLIENT]
    came = [each.received_at for each in primaries]
    left = [each.received_at for each in sorted(records, key=lambda each: each.received_at)]
    assert left[0] - came[0] == pytest.approx(0.5, abs=0.1)
    assert left[2] - left[0] == pytest.approx((came[2] - came[0]) / 4, abs=0.04)


@in_loop
async def test_what_changes_something_at_a_server_is_not_mirrored(tmp_path: Path) -> None:
    async with (
        Upstream(plain()) as upstream,
        Upstream(plain()) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url))) as bench,
    ):
        for method, path in (("GET", "/v1/models"), ("DELETE", "/v1/responses/r"), ("POST", "/v1/load_lora_adapter")):
            await bench.serve(Client(method=method, path=path))
        assert await settled(bench) == []
        assert counts(bench) == {}


# What is dropped ------------------------------------------------------------------------------------------------------


DROPPED: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [
    ("queue_full", {"queue": 1, "concurrency": 1}, {}, 4),
    ("bytes", {"queue_bytes": 2500, "concurrency": 1}, {"body": chat_body("x" * 900)}, 4),
    ("too_large", {"max_body": 1024}, {"body": chat_body("x" * 2000)}, 1),
]


@pytest.mark.parametrize(("reason", "fields", "client", "requests"), DROPPED, ids=[row[0] for row in DROPPED])
@in_loop
async def test_drops_are_counted_by_reason(
    tmp_path: Path, reason: str, fields: dict[str, Any], client: dict[str, Any], requests: int
) -> None:
    async with (
        Upstream(plain(chat_answer())) as upstream,
        Upstream(stall()) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url, timeout_s=0.3, **fields))) as bench,
    ):
        for _ in range(requests):
            answered = await bench.serve(Client(client.get("body", BODY)))
            assert (answered.status, answered.body) == (200, chat_answer())
            await asyncio.sleep(0.01)
        dropped = counts(bench)[f"dropped_{reason}"]
        assert dropped == max(1, requests - 2)
        records = await settled(bench)
        assert counts(bench) == {
            "offered": requests,
            **({"sent": requests - dropped} if requests > dropped else {}),
            f"dropped_{reason}": dropped,
        }
    assert {record.outcome for record in records} <= {Outcome.UPSTREAM_TIMEOUT}
    assert len(records) == requests - dropped


@in_loop
async def test_a_model_that_can_not_be_rewritten_and_an_upload_are_dropped(tmp_path: Path) -> None:
    form = (b"content-type", b"multipart/form-data; boundary=b")
    parts = [b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b\r\n', b"x" * 600_000, b"y" * 600_000]
    async with (
        Upstream(plain(b"{}")) as upstream,
        Upstream(plain(b"{}")) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url, models={"*": "other"}))) as bench,
    ):
        path = "/v1/audio/transcriptions"
        assert (await bench.serve(Client(parts[0], path=path, headers=[form]))).status == 200
        assert (await bench.serve(Client(parts, path=path, headers=[form]))).status == 200
        await settled(bench)
        assert counts(bench) == {"offered": 2, "dropped_model": 1, "dropped_upload": 1}
    assert shadow.requests == []


@in_loop
async def test_a_dead_target_opens_its_breaker_and_closes_it_when_it_is_back(tmp_path: Path) -> None:
    port = closed_port()
    fields = target(f"http://127.0.0.1:{port}", breaker={"pause_s": 0.1, "max_pause_s": 0.1, "trials": 1})
    async with Upstream(plain(chat_answer())) as upstream, running(tmp_path, upstream.url, **mirror(fields)) as bench:
        for _ in range(5):
            assert (await bench.serve(Client(BODY))).status == 200
            await asyncio.sleep(0.005)
        records = await settled(bench)
        assert {record.outcome for record in records} == {Outcome.CONNECT_ERROR}
        assert {record.error_type for record in records} == {"upstream_connect_error"}
        found = counts(bench)
        assert found["dropped_breaker_open"] >= 2
        assert found["offered"] == 5 == found["sent"] + found["dropped_breaker_open"]
        async with Upstream(plain(chat_answer()), port=port):
            await asyncio.sleep(0.15)
            for _ in range(3):
                await bench.serve(Client(BODY))
                await settled(bench)
            records = await settled(bench)
    assert [record.outcome for record in records][-3:] == [Outcome.OK] * 3


@pytest.mark.parametrize(
    ("script", "outcome", "status"),
    [
        (plain(b'{"error":{"type":"busy"}}', 503), Outcome.UPSTREAM_ERROR, 503),
        (plain(b'{"error":{"type":"slow down"}}', 429), Outcome.REJECTED, 429),
        (plain(b"{}", 400), Outcome.INVALID_REQUEST, 400),
        (stall(), Outcome.UPSTREAM_TIMEOUT, None),
    ],
)
@in_loop
async def test_a_shadow_that_fails_is_recorded_and_its_primary_does_not_notice(
    tmp_path: Path, script: Script, outcome: Outcome, status: int | None
) -> None:
    async with (
        Upstream(plain(chat_answer())) as upstream,
        Upstream(script) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url, timeout_s=0.2))) as bench,
    ):
        client = await bench.serve(Client(BODY))
        (record,) = await settled(bench)
    assert (client.status, client.body) == (200, chat_answer())
    assert (record.outcome, record.status) == (outcome, status)


@in_loop
async def test_a_shadow_that_breaks_off_is_truncated(tmp_path: Path) -> None:
    async def broken(talk: Talk) -> None:
        await talk.begin_stream()
        await talk.piece(PIECES[0])
        await asyncio.sleep(0.05)
        talk.reset()

    async with (
        Upstream(streaming()) as upstream,
        Upstream(broken) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url))) as bench,
    ):
        await bench.serve(Client(chat_body("hi", stream=True)))
        (record,) = await settled(bench)
    assert (record.outcome, record.error_type) == (Outcome.TRUNCATED, "upstream_disconnected")


# The primary never waits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dead", "stalled", "slow"])
@in_loop
async def test_the_primary_never_waits(tmp_path: Path, kind: str) -> None:
    async def slow(talk: Talk) -> None:
        await asyncio.sleep(0.3)
        await talk.answer(chat_answer())

    async with (
        Upstream(plain(chat_answer())) as upstream,
        Upstream(slow if kind == "slow" else stall()) as shadow,
        running(
            tmp_path,
            upstream.url,
            **mirror(
                target(
                    f"http://127.0.0.1:{closed_port()}" if kind == "dead" else shadow.url,
                    concurrency=4,
                    queue=8,
                    timeout_s=0.5,
                )
            ),
        ) as bench,
    ):
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        for _ in range(20):
            client = await bench.serve(Client(BODY))
            assert (client.status, client.body) == (200, chat_answer())
        assert loop.time() - start_s < 0.25  # less than any shadow takes
        found = counts(bench)
        assert found["offered"] == 20
        await settled(bench)
        found = counts(bench)
        assert found["offered"] == found["sent"] + sum(v for name, v in found.items() if name.startswith("dropped_"))


# Agreement ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("is_primary_late", [False, True])
@pytest.mark.parametrize(
    ("mode", "texts", "agreement"),
    [
        ("exact", ("one two", "one two"), 1.0),
        ("exact", ("one two", "one"), 0.0),
        ("similarity", ("one two", "one two"), 1.0),
        ("similarity", ("one two", "one"), 0.6),
        ("none", ("one two", "one two"), None),
    ],
)
@in_loop
async def test_outputs_are_compared(
    tmp_path: Path, *, mode: str, texts: tuple[str, str], agreement: float | None, is_stream: bool, path: str,
    is_primary_late: bool,
) -> None:  # fmt: skip
    def answering(text: str, delay_s: float) -> Callable[[Talk], Any]:
        async def script(talk: Talk) -> None:
            await asyncio.sleep(delay_s)
            pieces = [text[at : at + 2] for at in range(0, len(text), 2)]
            if path == CHAT and is_stream:
                await talk.stream(*map(chunk, pieces), chunk(finish="stop"))
            elif path == CHAT:
                await talk.answer(chat_answer(text))
            else:
                choice = {"index": 0, "logprobs": None, "finish_reason": None}
                bodies = [{"id": "c", "model": "served", "choices": [{**choice, "text": each}]} for each in pieces]
                if is_stream:
                    await talk.stream(*[b"data: " + json.dumps(each).encode() + b"\n\n" for each in bodies])
                else:
                    bodies[0]["choices"] = [{**choice, "text": text}]
                    await talk.answer(json.dumps(bodies[0]).encode())

        return script

    async with (
        Upstream(answering(texts[0], 0.05 * is_primary_late)) as upstream,
        Upstream(answering(texts[1], 0.05 * (not is_primary_late))) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url, agreement=mode))) as bench,
    ):
        await bench.serve(Client(chat_body("hi", stream=is_stream), path=path))
        (record,) = await settled(bench)
    assert record.outcome is Outcome.OK
    assert record.agreement == (None if agreement is None else pytest.approx(agreement))


@in_loop
async def test_a_failed_primary_is_not_compared(tmp_path: Path) -> None:
    async with (
        Upstream(plain(b"{}", 500)) as upstream,
        Upstream(plain(chat_answer())) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url, agreement="exact"))) as bench,
    ):
        await bench.serve(Client(BODY))
        (record,) = await settled(bench)
    assert (record.outcome, record.agreement) == (Outcome.OK, None)


@in_loop
async def test_texts_that_wait_count_as_bytes_held(tmp_path: Path) -> None:
    """Collected requests wait with their primaries' outputs: these are bounded, too."""
    release = {"collect_s": 0.3, "speed": 1}
    fields = target("", agreement="exact", release=release, queue_bytes=8_000)
    async with (
        Upstream(plain(chat_answer("y" * 6000))) as upstream,
        Upstream(plain(chat_answer("y" * 6000))) as shadow,
        running(tmp_path, upstream.url, **mirror({**fields, "url": shadow.url})) as bench,
    ):
        for _ in range(3):
            await bench.serve(Client(BODY))
        (held,) = [each.held_bytes for each in bench.gateway.mirror.targets] if bench.gateway.mirror else [0]
        assert 6000 < held <= 8000
        records = await settled(bench)
    assert (
        sorted(record.agreement is None for record in records) == [False, True, True]
        or [record.agreement for record in records].count(None) >= 1
    )


# While it runs --------------------------------------------------------------------------------------------------------


@in_loop
async def test_targets_come_change_and_go_while_running(tmp_path: Path) -> None:
    async with (
        Upstream(plain(chat_answer())) as upstream,
        Upstream(plain(chat_answer())) as shadow,
        running(tmp_path, upstream.url) as bench,
    ):
        now = bench.gateway.settings

        async def serve(**fields: Any) -> int:
            """Requests that the shadow got of one, after a reload."""
            before = len(shadow.requests)
            found = mirror(target(shadow.url, **fields)) if fields is not None else mirror()
            bench.gateway.apply(Settings(**{**dict(now), **found}))
            await bench.serve(Client(BODY))
            await settled(bench)
            return len(shadow.requests) - before

        assert bench.gateway.mirror is None
        assert await serve(share=1) == 1
        first = bench.gateway.mirror
        assert await serve(share=0) == 0
        assert await serve(copies=3) == 3
        assert await serve(headers={"x-a": "1"}) == 1
        assert await serve(headers={"x-a": "2"}) == 1
        assert [request.values(b"x-a") for request in shadow.requests[-2:]] == [[b"1"], [b"2"]]
        assert bench.gateway.mirror is first
        with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
            await serve(api_key_env="NO_SUCH_KEY")
        assert await serve(share=1) == 1
        bench.gateway.apply(now)
        assert bench.gateway.mirror is None
        await bench.serve(Client(BODY))
        assert counts(bench)["offered"] == 7


@in_loop
async def test_what_waits_is_dropped_and_what_is_in_flight_is_recorded_when_the_worker_stops(tmp_path: Path) -> None:
    async with (
        Upstream(plain(chat_answer())) as upstream,
        Upstream(stall()) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url, concurrency=1))) as bench,
    ):
        for _ in range(3):
            await bench.serve(Client(BODY))
        await until(lambda: len(shadow.requests) == 1, "one is in flight")
        bench.gateway.stop()
        records = await settled(bench)
        assert counts(bench) == {"offered": 3, "sent": 1, "dropped_stopping": 2}
    assert [(record.outcome, record.error_type) for record in records] == [(Outcome.GATEWAY_CRASH, "gateway_shutdown")]


@in_loop
async def test_nothing_is_drawn_while_the_worker_stops(tmp_path: Path) -> None:
    async with (
        Upstream(plain(chat_answer())) as upstream,
        Upstream(plain(chat_answer())) as shadow,
        running(tmp_path, upstream.url, **mirror(target(shadow.url))) as bench,
    ):
        assert bench.gateway.mirror is not None
        await bench.gateway.mirror.drain()
        assert (await bench.serve(Client(BODY))).status == 200
        assert counts(bench) == {"offered": 1, "dropped_stopping": 1}


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"api_key_file": "/nowhere"}, "api_key_file: /nowhere: No such file"),
        ({"api_key_file": "/dev/null"}, "expected a key, it is empty"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
        ({"api_key_env": "BROKEN_KEY"}, "expected visible ASCII without spaces"),
    ],
)
def test_an_unreadable_key_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], rule: str
) -> None:
    monkeypatch.setenv("BROKEN_KEY", "sk-1\r\nx-injected: 1")
    with pytest.raises(ConfigError, match=rule) as found:
        read_key(MirrorTargetSettings(url="http://h", **fields))
    assert "injected" not in str(found.value)


def test_a_key_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-2\n")
    assert read_key(MirrorTargetSettings(url="http://h", api_key_file=tmp_path / "key")) == "sk-2"


def test_headers_are_shown_without_their_values() -> None:
    settings = Settings(**mirror(target("http://h", headers={"x-key": "sk-3"})))
    assert "sk-3" not in show_value(settings.mirror.targets)
    assert "***" in show_value(settings.mirror.targets)
