"""One request through the gateway, as an ASGI application over real sockets, with a real journal."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.estimates import Estimates
from proxy.exchange import uuid7
from proxy.settings import JournalSettings, LimitSettings, SessionSettings, Settings, TimeoutSettings
from tests.compiled import needs_source
from tests.proxy.harness import (
    CHAT,
    DONE,
    JSON,
    PIECES,
    USAGE,
    Bench,
    Client,
    Script,
    Talk,
    Upstream,
    chat_answer,
    chat_body,
    chunk,
    closed_port,
    event,
    in_loop,
    plain,
    running,
    streaming,
    until,
    usage,
)
from traces.record import LogType, Origin, Outcome, TokenSource
from wire.accounting import StreamAccount, UnaryAccount

STREAM = chat_body("hi", stream=True)
FORM = (b"content-type", b"multipart/form-data; boundary=frontier")


# Answers that arrive whole --------------------------------------------------------------------------------------------


@in_loop
async def test_plain_answer_passes_and_is_recorded(tmp_path: Path) -> None:
    async with (
        Upstream(plain(chat_answer(prompt=7, completion=3))) as upstream,
        running(tmp_path, upstream.url) as bench,
    ):
        client = await bench.serve(Client(chat_body("hi", max_tokens=9)))
        record = bench.record()
    assert (client.status, client.body, client.is_whole) == (200, chat_answer(prompt=7, completion=3), True)
    assert (record.outcome, record.status, record.request_tokens, record.response_tokens) == (Outcome.OK, 200, 7, 3)
    assert (record.token_source, record.finish_reason, record.max_tokens) == (TokenSource.USAGE, "stop", 9)
    assert (record.model, record.served_model, record.endpoint) == ("m", "served", CHAT)
    assert (record.stream, record.ttft_s, record.tpot_s) == (False, None, None)  # nothing streamed, nothing to time
    assert (record.upstream, record.attempts, record.gateway) == (upstream.url, 1, "test")
    assert record.elapsed_s is not None
    assert 0 < record.elapsed_s < 5
    assert abs(record.received_at - time.time()) < 5


@in_loop
async def test_stream_is_asked_for_usage_which_the_client_never_sees(tmp_path: Path) -> None:
    async with Upstream(streaming()) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(STREAM))
        record = bench.record()
    assert upstream.requests[0].fields == {**json.loads(STREAM), "stream_options": {"include_usage": True}}
    assert client.body == b"".join(PIECES) + DONE
    assert client.values(b"content-type") == [b"text/event-stream; charset=utf-8"]
    assert (record.outcome, record.stream) == (Outcome.OK, True)
    assert (record.request_tokens, record.response_tokens, record.token_source) == (7, 3, TokenSource.USAGE)
    assert record.ttft_s is not None
    assert record.tpot_s is not None
    assert 0 < record.ttft_s < (record.elapsed_s or 0)


@in_loop
async def test_client_that_asks_for_usage_keeps_it(tmp_path: Path) -> None:
    body = chat_body("hi", stream=True, stream_options={"include_usage": True})
    async with Upstream(streaming()) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(body))
        record = bench.record()
    assert upstream.requests[0].body == body
    assert client.body == b"".join(PIECES) + USAGE + DONE
    assert (record.request_tokens, record.response_tokens) == (7, 3)


@in_loop
async def test_content_length_of_a_stream_that_loses_an_event_is_left_out(tmp_path: Path) -> None:
    whole = b"".join(PIECES) + USAGE + DONE
    answer = plain(whole, 200, (b"content-type", b"text/event-stream"))
    async with Upstream(answer) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(STREAM))
        bench.record()
    assert client.body == b"".join(PIECES) + DONE
    assert client.values(b"content-length") == []


@in_loop
async def test_a_redirect_to_the_upstream_leads_back_to_the_gateway(tmp_path: Path) -> None:
    def redirect(talk: Talk) -> Awaitable[None]:
        return plain(b"", 307, (b"location", talk.request.target.removeprefix(b"/to/")))(talk)

    async with Upstream(redirect) as upstream, running(tmp_path, upstream.url) as bench:
        for there, here in (
            (upstream.url + "/v1/models?a=1", "http://gate:8080/v1/models?a=1"),
            ("http://elsewhere/v1/models", "http://elsewhere/v1/models"),
            ("/v1/models", "/v1/models"),
        ):
            client = await bench.serve(Client(method="GET", path=f"/to/{there}", headers=[(b"host", b"gate:8080")]))
            assert client.values(b"location") == [here.encode()]


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, Outcome.OK),
        (201, Outcome.OK),
        (307, Outcome.OK),  # a redirect is for the client to follow
        (400, Outcome.INVALID_REQUEST),
        (401, Outcome.INVALID_REQUEST),
        (404, Outcome.INVALID_REQUEST),
        (422, Outcome.INVALID_REQUEST),
        (429, Outcome.REJECTED),
        (500, Outcome.UPSTREAM_ERROR),
        (503, Outcome.UPSTREAM_ERROR),
    ],
)
@in_loop
async def test_outcome_by_status(tmp_path: Path, status: int, outcome: Outcome) -> None:
    body = b'{"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}'
    async with Upstream(plain(body, status)) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(chat_body("hi")))
        record = bench.record()
    assert (client.status, client.body) == (status, body)
    assert (record.outcome, record.status, record.error_type) == (outcome, status, "BadRequestError")
    assert (record.request_tokens, record.response_tokens, record.token_source) == (None, None, TokenSource.NONE)


@in_loop
async def test_error_event_within_a_good_stream_is_a_failure(tmp_path: Path) -> None:
    error = event({"error": {"message": "out of memory", "type": "InternalServerError", "code": 500}})
    async with Upstream(streaming(chunk("a"), error)) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(STREAM))
        record = bench.record()
    assert client.body == chunk("a") + error + DONE
    assert (record.outcome, record.status, record.error_type) == (Outcome.UPSTREAM_ERROR, 200, "InternalServerError")


@in_loop
async def test_stream_without_usage_is_estimated(tmp_path: Path) -> None:
    async def old_upstream(talk: Talk) -> None:
        await talk.begin_stream()
        for piece in (*PIECES, DONE):
            await talk.piece(piece)
        await talk.end_stream()

    async with Upstream(old_upstream) as upstream, running(tmp_path, upstream.url) as bench:
        await bench.serve(Client(STREAM))
        record = bench.record()
    assert (record.response_tokens, record.token_source) == (3, TokenSource.ESTIMATED)
    assert record.request_tokens == round(len(STREAM) / 4)  # nothing learned yet


@pytest.mark.parametrize("encoding", [b"gzip", b"br"])
@in_loop
async def test_compressed_answer_passes_uncounted(tmp_path: Path, encoding: bytes) -> None:
    answer = plain(b"\x1f\x8b not text", 200, JSON, (b"content-encoding", encoding))
    async with Upstream(answer) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(chat_body("hi")))
        record = bench.record()
    assert client.body == b"\x1f\x8b not text"
    assert (record.outcome, record.token_source) == (Outcome.OK, TokenSource.NONE)


@pytest.mark.parametrize(
    "answer",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"usage": 3}', b"[" * 100_000, b'{"usage":{"prompt_tokens":"7"}}'],
)
@in_loop
async def test_answer_that_makes_no_sense_passes(tmp_path: Path, answer: bytes) -> None:
    async with Upstream(plain(answer)) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(chat_body("hi")))
        record = bench.record()
    assert client.body == answer
    assert (record.outcome, record.request_tokens, record.response_tokens) == (Outcome.OK, None, None)


@pytest.mark.parametrize("count", [-1, 2**63, 10**30])
@in_loop
async def test_impossible_count_from_upstream_is_unknown(tmp_path: Path, count: int) -> None:
    async with (
        Upstream(plain(chat_answer(prompt=count, completion=count))) as upstream,
        running(tmp_path, upstream.url) as bench,
    ):
        client = await bench.serve(Client(chat_body("hi")))
        record = bench.record()
    assert client.is_whole
    assert (record.outcome, record.request_tokens, record.response_tokens) == (Outcome.OK, None, None)


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[1,2]",
        b'"text"',
        b"\xff\x00",
        b"[" * 50_000,
        b'{"model": 5, "stream": "yes", "messages": {}, "n": null}',
        b'{"model": "' + b"x" * 5000 + b'"}',
        b'{"model": "a\\u0000b"}',
        b'{"model": "\\ud800", "stream": true}',
        b'{"model": "m", "max_tokens": ' + b"9" * 30 + b"}",
        b'{"model": "m", "max_tokens": -1}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"stream": true, "stream_options": 7}',
    ],
)
@in_loop
async def test_body_that_makes_no_sense_reaches_the_upstream_unchanged(tmp_path: Path, body: bytes) -> None:
    refusal = plain(b'{"error":{"type":"BadRequestError"}}', 400)
    async with Upstream(refusal) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(body))
        record = bench.record()
    assert upstream.requests[0].body == body
    assert client.status == 400
    assert (record.outcome, record.error_type) == (Outcome.INVALID_REQUEST, "BadRequestError")
    assert len(record.model or "") <= 256
    assert "\0" not in (record.model or "")
    assert record.max_tokens is None


# The path, the method and the headers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "target", "endpoint"),
    [
        (b"/v1/models", b"/v1/models", "/v1/models"),
        (b"/a%2Fb%20c/%E2%82%AC", b"/a%2Fb%20c/%E2%82%AC", "/a/b c/\u20ac"),  # an encoded slash is not a slash
        (b"/x?a=1&b=%26&&c=%2B+", b"/x?a=1&b=%26&&c=%2B+", "/x"),
        (b"/x?", b"/x?", "/x"),
        (b"//double//", b"//double//", "//double//"),
        (b"/../up/./here", b"/../up/./here", "/../up/./here"),
        (b"/%ff", b"/%ff", "/\ufffd"),
        (b"*", b"*", "*"),
        (b"http://gateway:8080/x?a=1", b"/x?a=1", "/x"),  # RFC 9112, section 3.2.2
        (b"http://gateway", b"/", "/"),
        (b"http://gateway?a=/b", b"/?a=/b", "/"),
    ],
)
@in_loop
async def test_target_passes_byte_for_byte(tmp_path: Path, sent: bytes, target: bytes, endpoint: str) -> None:
    async with Upstream(plain(b"ok")) as upstream, running(tmp_path, upstream.url) as bench:
        await bench.serve(Client(method="OPTIONS", target=sent, headers=()))
        record = bench.record()
    assert upstream.requests[0].target == target
    assert record.endpoint == endpoint


@in_loop
async def test_prefix_of_the_upstream_comes_before_the_target(tmp_path: Path) -> None:
    async with Upstream(plain()) as upstream, running(tmp_path, f"{upstream.url}/engine/") as bench:
        await bench.serve(Client(method="GET", path="/v1/models", headers=()))
        bench.record()
    assert upstream.requests[0].target == b"/engine/v1/models"


@pytest.mark.parametrize(
    ("method", "body", "headers", "length"),
    [
        ("GET", b"", (), []),
        ("DELETE", b"", (), []),
        ("OPTIONS", b"", (), []),
        ("POST", b"", (), [b"0"]),  # RFC 9110, section 8.6
        ("PUT", b"", (), [b"0"]),
        ("PATCH", b"{}", (JSON,), [b"2"]),
        ("GET", b"{}", (JSON,), [b"2"]),
        ("DELETE", b"", ((b"content-length", b"0"),), [b"0"]),
    ],
)
@in_loop
async def test_methods(
    tmp_path: Path, method: str, body: bytes, headers: tuple[tuple[bytes, bytes], ...], length: list[bytes]
) -> None:
    async with Upstream(plain(b"ok")) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(body, method=method, path="/any", headers=headers))
        record = bench.record()
    request = upstream.requests[0]
    assert (request.method, request.body, request.values(b"content-length")) == (method.encode(), body, length)
    assert client.body == b"ok"
    assert record.outcome is Outcome.OK


@in_loop
async def test_head_has_a_length_and_no_body(tmp_path: Path) -> None:
    async def head_only(talk: Talk) -> None:
        await talk.head(200, (b"content-length", b"1234"))
        talk.is_kept = True

    async with Upstream(head_only) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(method="HEAD", path="/health", headers=()))
        record = bench.record()
    assert (client.status, client.body, client.values(b"content-length")) == (200, b"", [b"1234"])
    assert record.outcome is Outcome.OK


@in_loop
async def test_headers_pass_in_order_but_for_the_hop(tmp_path: Path) -> None:
    async def answer(talk: Talk) -> None:
        await talk.head(
            200,
            (b"Server", b"uvicorn"),
            (b"Set-Cookie", b"a=1"),
            (b"X-Odd", b"\xff caf\xc3\xa9"),
            (b"Set-Cookie", b"b=2"),
            (b"Connection", b"X-Hop, Keep-Alive"),
            (b"X-Hop", b"1"),
            (b"Keep-Alive", b"timeout=5"),
            (b"X-Request-Id", b"the upstream's own"),
            (b"content-length", b"2"),
        )
        await talk.send(b"ok")

    headers = (
        (b"host", b"gateway:8080"),
        (b"authorization", b"Bearer key"),
        (b"x-a", b"1"),
        (b"x-b", b"2"),
        (b"x-a", b"3"),
        (b"connection", b"keep-alive, x-b"),
        (b"x-burstgate-run-id", b"r"),
        (b"x-request-id", b"mine"),
    )
    async with Upstream(answer) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(method="GET", path="/x", headers=headers))
        record = bench.record()
    assert upstream.requests[0].headers == [
        (b"host", upstream.url.removeprefix("http://").encode()),
        (b"authorization", b"Bearer key"),
        (b"x-a", b"1"),
        (b"x-a", b"3"),
        (b"via", b"1.1 burstgate"),
        (b"x-request-id", b"mine"),
    ]
    assert client.headers == [
        (b"Server", b"uvicorn"),
        (b"Set-Cookie", b"a=1"),
        (b"X-Odd", b"\xff caf\xc3\xa9"),
        (b"Set-Cookie", b"b=2"),
        (b"content-length", b"2"),
        (b"x-request-id", b"mine"),
    ]
    assert (record.client_request_id, record.run_id) == ("mine", "r")
    assert record.request_id != "mine"


@in_loop
async def test_request_id_is_made_where_there_is_none(tmp_path: Path) -> None:
    async with Upstream(plain()) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(method="GET", path="/x", headers=((b"x-request-id", b""),)))
        record = bench.record()
    assert client.values(b"x-request-id") == [record.request_id.encode()]
    assert upstream.requests[0].values(b"x-request-id") == [record.request_id.encode()]
    assert record.client_request_id in (None, "")


@in_loop
async def test_interim_answers_are_not_the_answer(tmp_path: Path) -> None:
    async def hints(talk: Talk) -> None:
        await talk.send(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n")
        await talk.answer(b"ok")

    async with Upstream(hints) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(method="GET", path="/x", headers=()))
        bench.record()
    assert (client.status, client.body, client.values(b"link")) == (200, b"ok", [])


@pytest.mark.parametrize("status", [204, 304])
@in_loop
async def test_answers_without_a_body(tmp_path: Path, status: int) -> None:
    async def nothing(talk: Talk) -> None:
        await talk.head(status)
        talk.is_kept = True

    async with Upstream(nothing) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(method="GET", path="/x", headers=()))
        assert bench.record().outcome is Outcome.OK
    assert (client.status, client.body, client.is_whole) == (status, b"", True)


# Request bodies -------------------------------------------------------------------------------------------------------


@in_loop
async def test_body_in_many_messages_is_one(tmp_path: Path) -> None:
    parts = [STREAM[index : index + 7] for index in range(0, len(STREAM), 7)] + [b""]
    async with Upstream(streaming()) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(parts))
        record = bench.record()
    assert upstream.requests[0].fields["stream_options"] == {"include_usage": True}
    assert client.body == b"".join(PIECES) + DONE
    assert record.model == "m"


@in_loop
async def test_long_json_is_still_read(tmp_path: Path) -> None:
    body = chat_body("x" * 3_000_000, stream=True)
    parts = [body[index : index + 65536] for index in range(0, len(body), 65536)]
    async with Upstream(streaming()) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(parts))
        record = bench.record()
    assert upstream.requests[0].fields["stream_options"] == {"include_usage": True}
    assert client.body == b"".join(PIECES) + DONE
    assert (record.model, record.stream, record.request_tokens) == ("m", True, 7)


@pytest.mark.parametrize("is_chunked", [False, True])
@in_loop
async def test_long_upload_goes_on_as_it_comes(tmp_path: Path, is_chunked: bool) -> None:
    head = b'--frontier\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--frontier\r\n'
    parts = [head] + [bytes([index]) * 100_000 for index in range(40)] + [b"\r\n--frontier--\r\n"]
    size = sum(map(len, parts))
    headers = (FORM,) if is_chunked else (FORM, (b"content-length", b"%d" % size))
    answer = json.dumps({"text": "hello", "usage": {"type": "tokens", **usage(11, 4)}}).encode()
    async with Upstream(plain(answer)) as upstream, running(tmp_path, upstream.url) as bench:
        seen: list[int] = []
        client = Client(
            parts,
            path="/v1/audio/transcriptions",
            headers=headers,
            pace_s=0.001,  # a network is not that fast either
            on_part=lambda: seen.append(len(upstream.requests)),
        )
        await bench.serve(client)
        record = bench.record()
    assert upstream.requests[0].body == b"".join(parts)
    assert len(upstream.requests[0].values(b"content-length")) == (0 if is_chunked else 1)
    assert 1 in seen[:-1]  # the upstream had the head while the client still sent
    assert (client.body, record.outcome, record.model) == (answer, Outcome.OK, "whisper-1")
    assert (record.request_tokens, record.response_tokens) == (11, 4)


@in_loop
async def test_upstream_that_answers_before_the_upload_ends_is_heard(tmp_path: Path) -> None:
    async def refuse(talk: Talk) -> None:
        await talk.answer(b'{"error":{"type":"TooLarge"}}', 413)
        talk.is_kept = False

    parts = [b"x" * 200_000] * 200
    async with (
        Upstream(refuse, reads_body=False) as upstream,
        running(tmp_path, upstream.url) as bench,
    ):
        client = await bench.serve(Client(parts, path="/v1/audio/transcriptions", headers=(FORM,)))
        record = bench.record()
    assert (client.status, record.outcome, record.error_type) == (413, Outcome.INVALID_REQUEST, "TooLarge")


@pytest.mark.parametrize(
    ("headers", "parts"),
    [
        ((JSON, (b"content-length", b"2000")), [b"x" * 2000]),
        ((JSON,), [b"x" * 2000]),  # one chunk
        ((JSON,), [b"x" * 400] * 5),
    ],
)
@in_loop
async def test_body_over_the_limit_is_refused(
    tmp_path: Path, headers: tuple[tuple[bytes, bytes], ...], parts: list[bytes]
) -> None:
    limits = LimitSettings.model_validate({"body": 1024})
    async with Upstream(plain()) as upstream, running(tmp_path, upstream.url, limits=limits) as bench:
        client = await bench.serve(Client(parts, headers=(*headers, (b"x-session-id", b"s1"))))
        record = bench.record()
    assert (client.status, client.is_whole, client.values(b"connection")) == (413, True, [b"close"])
    assert client.error["type"] == client.error["code"] == "request_too_large"
    assert client.error["message"] == "request body over 1024 bytes (limits.body)"
    assert (record.outcome, record.status, record.error_type) == (Outcome.INVALID_REQUEST, 413, "request_too_large")
    assert (record.session_id, record.log_type) == ("s1", LogType.CONVERSATION)
    assert (upstream.requests, record.attempts) == ([], 0)


@in_loop
async def test_upload_over_the_limit_is_refused_midway(tmp_path: Path) -> None:
    async def reads_on(talk: Talk) -> None:
        while await talk.reader.read(65536):
            pass

    limits = LimitSettings.model_validate({"body": 2 * 1024**2})
    async with (
        Upstream(reads_on, reads_body=False) as upstream,
        running(tmp_path, upstream.url, limits=limits) as bench,
    ):
        client = await bench.serve(Client([b"x" * 500_000] * 6, path="/v1/audio/transcriptions", headers=(FORM,)))
        record = bench.record()
    assert (client.status, record.outcome, record.status) == (413, Outcome.INVALID_REQUEST, 413)


# Upstreams that fail --------------------------------------------------------------------------------------------------


@in_loop
async def test_upstream_that_is_not_there(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    async with running(tmp_path, url) as bench:
        client = await bench.serve(Client(chat_body("hi")))
        record = bench.record()
    assert (client.status, client.error["type"]) == (502, "upstream_connect_error")
    assert client.error["message"].startswith(f"{url}: ")
    assert client.values(b"x-request-id") == [record.request_id.encode()]
    assert (record.outcome, record.status, record.error_type) == (Outcome.CONNECT_ERROR, 502, "upstream_connect_error")
    assert (record.upstream, record.attempts) == (url, 1)
    assert (record.request_tokens, record.response_tokens, record.token_source) == (None, None, TokenSource.NONE)


@in_loop
async def test_another_upstream_takes_over_while_nothing_was_sent(tmp_path: Path) -> None:
    dead = f"http://127.0.0.1:{closed_port()}"
    async with Upstream(plain(chat_answer())) as upstream, running(tmp_path, dead, upstream.url) as bench:
        for _ in range(4):
            assert (await bench.serve(Client(chat_body("hi")))).status == 200
        records = bench.records()
        retries = bench.counter("retries")
    assert {record.upstream for record in records} == {upstream.url}
    assert sorted(record.attempts for record in records) == [1, 1, 1, 2]  # then the dead one is passed over
    assert retries == 1


@in_loop
async def test_all_upstreams_down(tmp_path: Path) -> None:
    async with running(tmp_path, *(f"http://127.0.0.1:{closed_port()}" for _ in range(3))) as bench:
        client = await bench.serve(Client(chat_body("hi")))
        record = bench.record()
    assert (client.status, record.outcome, record.attempts) == (502, Outcome.CONNECT_ERROR, 3)


async def _closes(talk: Talk) -> None:
    pass


async def _resets(talk: Talk) -> None:
    talk.reset()


async def _garbage(talk: Talk) -> None:
    await talk.send(b"SSH-2.0-OpenSSH_9.6\r\n")
    await talk.gone()


async def _half_a_head(talk: Talk) -> None:
    await talk.send(b"HTTP/1.1 200 OK\r\ncontent-ty")


async def _endless_head(talk: Talk) -> None:
    await talk.send(b"HTTP/1.1 200 OK\r\n" + b"x-pad: y\r\n" * 40_000)
    await talk.gone()


async def _stream_head_then_closes(talk: Talk) -> None:
    await talk.begin_stream()


@pytest.mark.parametrize(
    ("script", "type_"),
    [
        (_closes, "upstream_disconnected"),
        (_resets, "upstream_disconnected"),
        (_half_a_head, "upstream_disconnected"),
        (_stream_head_then_closes, "upstream_disconnected"),  # no event was promised yet: still a readable error
        (_garbage, "upstream_protocol_error"),
        (_endless_head, "upstream_protocol_error"),
    ],
)
@in_loop
async def test_upstream_that_breaks_before_its_answer(tmp_path: Path, script: Script, type_: str) -> None:
    async with Upstream(script) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(STREAM))
        record = bench.record()
    assert (client.status, client.error["type"], client.is_whole) == (502, type_, True)
    assert (record.outcome, record.status, record.error_type) == (Outcome.UPSTREAM_ERROR, 502, type_)
    assert len(upstream.requests) == 1  # it may have been running: not sent twice


async def _breaks_off_stream(talk: Talk) -> None:
    await talk.begin_stream()
    for piece in PIECES[:2]:
        await talk.piece(piece)


async def _breaks_off_event(talk: Talk) -> None:
    await talk.begin_stream()
    await talk.piece(PIECES[0] + PIECES[1])
    await talk.piece(b'data: {"half')


async def _breaks_chunking(talk: Talk) -> None:
    await talk.begin_stream()
    await talk.piece(PIECES[0] + PIECES[1])
    await talk.send(b"zzz\r\nnot a chunk")
    await talk.gone()


@pytest.mark.parametrize(
    ("script", "body"),
    [
        (_breaks_off_stream, b"".join(PIECES[:2])),
        (_breaks_off_event, b"".join(PIECES[:2]) + b'data: {"half'),  # bytes in equal bytes out, to the last
        (_breaks_chunking, b"".join(PIECES[:2])),
    ],
)
@in_loop
async def test_stream_that_breaks_off_is_left_unfinished(tmp_path: Path, script: Script, body: bytes) -> None:
    async with Upstream(script) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(STREAM))
        record = bench.record()
    assert (client.status, client.body, client.is_whole) == (200, body, False)
    assert (record.outcome, record.status, record.error_type) == (Outcome.TRUNCATED, 200, "upstream_disconnected")
    assert (record.response_tokens, record.token_source) == (2, TokenSource.ESTIMATED)


@in_loop
async def test_plain_answer_that_breaks_off_is_left_unfinished(tmp_path: Path) -> None:
    async def half(talk: Talk) -> None:
        await talk.head(200, JSON, (b"content-length", b"100"))
        await talk.send(b'{"choices":')

    async with Upstream(half) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(chat_body("hi")))
        record = bench.record()
    assert (client.status, client.body, client.is_whole) == (200, b'{"choices":', False)
    assert (record.outcome, record.status, record.response_tokens) == (Outcome.TRUNCATED, 200, None)


@in_loop
async def test_upstream_that_breaks_after_done_has_given_all(tmp_path: Path) -> None:
    async def no_last_chunk(talk: Talk) -> None:
        await talk.begin_stream()
        await talk.piece(b"".join([*PIECES, USAGE, DONE]))

    async with Upstream(no_last_chunk) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(STREAM))
        record = bench.record()
    assert client.body == b"".join(PIECES) + DONE
    assert (record.outcome, record.response_tokens) == (Outcome.OK, 3)


@in_loop
async def test_idle_connection_that_the_upstream_closed_costs_no_request(tmp_path: Path) -> None:
    async def once(talk: Talk) -> None:
        await talk.answer(b"{}")
        talk.is_kept = False  # closed without a word, as at the end of a keep-alive

    async with Upstream(once) as upstream, running(tmp_path, upstream.url) as bench:
        for _ in range(5):
            assert (await bench.serve(Client(chat_body("hi")))).status == 200
        assert {record.outcome for record in bench.records()} == {Outcome.OK}


# Timers ---------------------------------------------------------------------------------------------------------------


async def _silent(talk: Talk) -> None:
    await talk.gone()


async def _head_then_silent(talk: Talk) -> None:
    await talk.begin_stream()
    await talk.gone()


async def _event_then_silent(talk: Talk) -> None:
    await talk.begin_stream()
    await talk.piece(PIECES[0])
    await talk.gone()


async def _drips(talk: Talk) -> None:
    await talk.begin_stream()
    for _ in range(1000):
        await talk.piece(PIECES[0])
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("timer", "script", "status", "rule"),
    [
        ("first_byte_s", _silent, 504, "no first byte within 0.2 s (timeouts.first_byte_s)"),
        ("first_byte_s", _head_then_silent, 504, "no first byte within 0.2 s (timeouts.first_byte_s)"),
        ("total_s", _silent, 504, "not complete within 0.2 s (timeouts.total_s)"),
        ("chunk_s", _event_then_silent, 200, ""),
        ("total_s", _drips, 200, ""),
    ],
)
@in_loop
async def test_timers_end_a_request(tmp_path: Path, timer: str, script: Script, status: int, rule: str) -> None:
    gone = asyncio.Event()

    async def watched(talk: Talk) -> None:
        try:
            await script(talk)
        finally:
            gone.set()

    timeouts = TimeoutSettings.model_validate({timer: 0.2})
    async with Upstream(watched) as upstream, running(tmp_path, upstream.url, timeouts=timeouts) as bench:
        start_s = time.monotonic()
        client = await bench.serve(Client(STREAM))
        took_s = time.monotonic() - start_s
        record = bench.record()
        async with asyncio.timeout(1.0):
            await gone.wait()
    assert 0.2 <= took_s < 1.0
    assert (client.status, client.is_whole) == (status, status == 504)
    assert (record.outcome, record.status, record.error_type) == (Outcome.UPSTREAM_TIMEOUT, status, "upstream_timeout")
    if rule:
        assert client.error["message"] == f"{upstream.url}: {rule}"


@in_loop
async def test_upload_that_the_upstream_does_not_take_ends_in_time(tmp_path: Path) -> None:
    async def deaf(talk: Talk) -> None:
        await asyncio.sleep(10)

    timeouts = TimeoutSettings.model_validate({"total_s": 0.3})
    async with (
        Upstream(deaf, reads_body=False) as upstream,
        running(tmp_path, upstream.url, timeouts=timeouts) as bench,
    ):
        parts = [b"x" * 1_000_000] * 40
        client = await bench.serve(Client(parts, path="/v1/audio/transcriptions", headers=(FORM,)))
        record = bench.record()
    assert (client.status, record.outcome) == (504, Outcome.UPSTREAM_TIMEOUT)


@in_loop
async def test_timers_of_zero_are_off(tmp_path: Path) -> None:
    async def slow(talk: Talk) -> None:
        await asyncio.sleep(0.4)
        await talk.stream(*PIECES)

    timeouts = TimeoutSettings.model_validate({"first_byte_s": 0, "chunk_s": 0, "total_s": 0})
    async with Upstream(slow) as upstream, running(tmp_path, upstream.url, timeouts=timeouts) as bench:
        client = await bench.serve(Client(STREAM))
        assert bench.record().outcome is Outcome.OK
    assert client.body == b"".join(PIECES) + DONE


# Clients that leave ---------------------------------------------------------------------------------------------------


@in_loop
async def test_client_that_leaves_while_its_body_is_read(tmp_path: Path) -> None:
    async with Upstream(plain()) as upstream, running(tmp_path, upstream.url) as bench:
        client = Client([b'{"model":', b'"m"}'], headers=(JSON, (b"x-session-id", b"s1")))
        client.is_hesitant = True
        request = bench.start(client)
        await asyncio.sleep(0.01)
        client.has_left.set()
        await request
        record = bench.record()
    assert client.raw == b""
    assert (record.outcome, record.status, record.attempts) == (Outcome.CLIENT_GONE, None, 0)
    assert (record.session_id, record.log_type) == ("s1", LogType.CONVERSATION)
    assert upstream.requests == []


@in_loop
async def test_client_that_leaves_mid_upload(tmp_path: Path) -> None:
    gone = asyncio.Event()

    async def watched(talk: Talk) -> None:
        while await talk.reader.read(65536):
            pass
        gone.set()

    async with Upstream(watched, reads_body=False) as upstream, running(tmp_path, upstream.url) as bench:
        client = Client([b"x" * 600_000] * 4, path="/v1/audio/transcriptions", headers=(FORM,))
        client.is_hesitant = True
        request = bench.start(client)
        await until(lambda: bool(upstream.requests), "the upload begins")
        client.has_left.set()
        await request
        record = bench.record()
        async with asyncio.timeout(1.0):
            await gone.wait()
    assert (record.outcome, record.status) == (Outcome.CLIENT_GONE, None)


@pytest.mark.parametrize(
    ("body", "script", "status", "tokens"),
    [
        (STREAM, _silent, None, None),  # before the head
        (STREAM, _head_then_silent, None, None),  # while the prompt is read
        (STREAM, _event_then_silent, 200, 1),  # mid-stream
        (chat_body("hi"), _silent, None, None),  # a plain request
    ],
)
@in_loop
async def test_client_that_leaves_ends_the_upstream_request_at_once(
    tmp_path: Path, body: bytes, script: Script, status: int | None, tokens: int | None
) -> None:
    gone_s: list[float] = []

    async def watched(talk: Talk) -> None:
        await script(talk)
        gone_s.append(time.monotonic())

    async with Upstream(watched) as upstream, running(tmp_path, upstream.url) as bench:
        client = Client(body)
        request = bench.start(client)
        await until(lambda: bool(client.body) == bool(tokens) and bool(upstream.requests), "it runs")
        await asyncio.sleep(0.1)
        left_s = time.monotonic()
        client.has_left.set()
        await request
        await until(lambda: bool(gone_s), "the upstream learns of it")
        record = bench.record()
    assert gone_s[0] - left_s < 0.1
    assert (record.outcome, record.status) == (Outcome.CLIENT_GONE, status)
    assert (record.response_tokens, record.error_type) == (tokens, None)


@in_loop
async def test_client_that_leaves_early_is_noticed_within_two_ticks(tmp_path: Path) -> None:
    took_s = []
    for number in range(3):  # what else runs adds to each
        async with Upstream(_silent) as upstream, running(tmp_path / str(number), upstream.url) as bench:
            client = Client(STREAM)
            request = bench.start(client)
            await until(lambda: bool(upstream.requests), "it runs")
            client.has_left.set()
            start_s = time.monotonic()
            await request
            took_s.append(time.monotonic() - start_s)
            assert bench.record().outcome is Outcome.CLIENT_GONE
    assert min(took_s) < 0.25


@in_loop
async def test_client_that_leaves_while_the_last_piece_waits_has_not_got_it(tmp_path: Path) -> None:
    async def in_two(talk: Talk) -> None:
        body = chat_answer()
        await talk.head(200, JSON, (b"content-length", b"%d" % len(body)))
        await talk.send(body[:20])
        await asyncio.sleep(0.05)
        await talk.send(body[20:])

    client = Client(chat_body("hi"), blocks=True)
    async with Upstream(in_two) as upstream, running(tmp_path, upstream.url) as bench:
        request = bench.start(client)
        await until(lambda: bool(client.body), "the first piece is there")
        await asyncio.sleep(0.15)  # the whole answer waits in the gateway
        client.has_left.set()
        await request
        assert bench.record().outcome is Outcome.CLIENT_GONE


@in_loop
async def test_request_that_outlives_the_worker_is_recorded_once(tmp_path: Path) -> None:
    async with Upstream(_event_then_silent) as upstream, running(tmp_path, upstream.url) as bench:
        client = Client(STREAM)
        request = bench.start(client)
        await until(lambda: bool(client.body), "the stream runs")
        bench.gateway.stop()
        await request
        record = bench.record()
    assert not client.is_whole
    assert (record.outcome, record.error_type) == (Outcome.GATEWAY_CRASH, "gateway_shutdown")


# The record -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "script"),
    [
        (chat_body("hi"), plain(chat_answer())),
        (STREAM, streaming()),
        (chat_body("hi", stream=True, stream_options={"include_usage": True}), streaming()),
        (chat_body("hi"), plain(b'{"error":{"type":"x"}}', 503)),
        (chat_body("hi"), _closes),
    ],
)
@in_loop
async def test_record_is_in_the_journal_before_the_client_has_the_last_piece(
    tmp_path: Path, body: bytes, script: Script
) -> None:
    ends: list[tuple[bytes, int]] = []

    def look(data: bytes) -> None:
        ends.append((data, len(bench.journal()[1])))

    async with Upstream(script) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(body, on_write=look))
        bench.record()
    assert client.is_whole
    is_stream = client.values(b"content-type") == [b"text/event-stream; charset=utf-8"]
    so_far = b""
    for data, recorded in ends:
        so_far += data
        assert recorded == (1 if not is_stream or b"[DONE]" in so_far else 0)


@in_loop
async def test_journal_without_room_lets_requests_go_on(tmp_path: Path) -> None:
    journal = JournalSettings.model_validate({"budget": 0})
    async with (
        Upstream(plain(chat_answer())) as upstream,
        running(tmp_path, upstream.url, journal=journal) as bench,
    ):
        client = await bench.serve(Client(chat_body("hi")))
        assert bench.records() == []
        assert (bench.counter("accepted"), bench.counter("dropped_budget")) == (1, 1)
        assert bench.counter("outcome_ok") == 1
    assert client.body == chat_answer()


@needs_source
@pytest.mark.parametrize(
    ("account", "method", "body", "script", "whole"),
    [
        (StreamAccount, "feed", STREAM, streaming(), b"".join(PIECES) + USAGE + DONE),
        (StreamAccount, "eof", STREAM, streaming(), b"".join(PIECES) + DONE),
        (StreamAccount, "result", STREAM, streaming(), b"".join(PIECES) + DONE),
        (UnaryAccount, "feed", chat_body("hi"), plain(chat_answer()), chat_answer()),
        (UnaryAccount, "result", chat_body("hi"), plain(chat_answer()), chat_answer()),
    ],
)
@in_loop
async def test_defect_in_accounting_is_counted_and_in_nobodys_way(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    account: type,
    method: str,
    body: bytes,
    script: Script,
    whole: bytes,
) -> None:
    def defect(*_: object) -> Any:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(account, method, defect)
    async with Upstream(script) as upstream, running(tmp_path, upstream.url) as bench:
        client = await bench.serve(Client(body))
        record = bench.record()
        assert bench.counter("accounting_errors") == 1
    assert (client.body, client.is_whole) == (whole, True)
    assert (record.outcome, record.token_source) == (Outcome.OK, TokenSource.NONE)
    assert "could not be accounted for" in caplog.text


@in_loop
async def test_long_texts_are_cut(tmp_path: Path) -> None:
    path = "/" + "p" * 5000
    headers = ((b"x-request-id", b"r" * 5000), (b"x-session-id", b"s" * 5000), (b"x-burstgate-run-id", b"n" * 5000))
    async with Upstream(plain()) as upstream, running(tmp_path, upstream.url) as bench:
        await bench.serve(Client(chat_body("hi", model="m" * 5000), path=path, headers=(JSON, *headers)))
        record = bench.record()
    texts = (record.client_request_id, record.session_id, record.run_id, record.model, record.endpoint)
    assert [len(text or "") for text in texts] == [256, 256, 256, 256, 200]
    assert upstream.requests[0].target == path.encode()
    assert upstream.requests[0].values(b"x-request-id") == [b"r" * 5000]


# Sessions and log type ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "fields", "session"),
    [
        ([(b"x-session-id", b"head")], {"metadata": {"session_id": "meta"}}, "head"),
        ([(b"x-session-id", b"")], {"metadata": {"session_id": "meta"}}, "meta"),
        ([], {"metadata": {"session_id": "meta"}, "prompt_cache_key": "cache"}, "meta"),
        ([], {"prompt_cache_key": "cache", "conversation": "conv"}, "cache"),
        ([], {"conversation": {"id": "conv"}}, "conv"),
        ([], {"metadata": {"session_id": 7}}, None),
        ([], {}, None),
    ],
)
@in_loop
async def test_session_by_precedence(
    tmp_path: Path, headers: list[tuple[bytes, bytes]], fields: dict[str, Any], session: str | None
) -> None:
    async with Upstream(plain(chat_answer())) as upstream, running(tmp_path, upstream.url) as bench:
        await bench.serve(Client(chat_body("hi", **fields), headers=(JSON, *headers)))
        record = bench.record()
    assert record.session_id == session
    assert record.log_type is (LogType.API if session is None else LogType.CONVERSATION)


@pytest.mark.parametrize(
    ("setting", "header", "has_session", "log_type"),
    [
        ("auto", None, False, LogType.API),
        ("auto", None, True, LogType.CONVERSATION),
        ("auto", b"api", True, LogType.API),
        ("api", None, True, LogType.API),
        ("conversation", None, False, LogType.CONVERSATION),
        ("conversation", b"API log", False, LogType.API),
        ("api", b"nonsense", False, LogType.API),
    ],
)
@in_loop
async def test_log_type(
    tmp_path: Path, setting: str, header: bytes | None, has_session: bool, log_type: LogType
) -> None:
    sessions = SessionSettings.model_validate({"log_type": setting, "header": "X-Chat", "log_type_header": "X-Kind"})
    headers = [JSON, *([(b"x-kind", header)] if header else []), *([(b"x-chat", b"s")] if has_session else [])]
    async with Upstream(plain()) as upstream, running(tmp_path, upstream.url, sessions=sessions) as bench:
        await bench.serve(Client(chat_body("hi"), headers=headers))
        assert bench.record().log_type is log_type
    assert upstream.requests[0].values(b"x-kind") == []
    assert upstream.requests[0].values(b"x-chat") == ([b"s"] if has_session else [])


@pytest.mark.parametrize("is_stream", [False, True])
@in_loop
async def test_conversation_is_recognised_by_its_messages(tmp_path: Path, is_stream: bool) -> None:
    script = streaming() if is_stream else plain(chat_answer("abc"))
    async with Upstream(script) as upstream, running(tmp_path, upstream.url) as bench:
        for texts in (("q1",), ("q1", "abc", "q2"), ("q1", "abc", "q2", "abc", "q3"), ("q1", "edited", "q2")):
            await bench.serve(Client(chat_body(*texts, stream=is_stream, system="be brief")))
        first, *later, other = bench.records()
    assert (first.session_id, first.log_type) == (None, LogType.API)  # the recorder names it when a second turn comes
    assert [record.session_id for record in later] == [first.request_id] * 2
    assert {record.log_type for record in later} == {LogType.CONVERSATION}
    assert other.session_id is None


@in_loop
async def test_conversation_survives_a_restart(tmp_path: Path) -> None:
    async with Upstream(plain(chat_answer("abc"))) as upstream:
        async with running(tmp_path, upstream.url) as bench:
            await bench.serve(Client(chat_body("q1")))
            first = bench.record()
        async with running(tmp_path, upstream.url) as bench:
            await bench.serve(Client(chat_body("q1", "abc", "q2")))
            assert bench.record().session_id == first.request_id


@pytest.mark.parametrize(
    ("chosen", "inferred"),
    [
        ("01234567-89ab-cdef-0123-456789abcdef", True),
        ("01234567-89AB-CDEF-0123-456789abcdef", False),  # the table holds 16 bytes: no other spelling comes back
        ("0123456789abcdef0123456789abcdef", False),
        ("user 7", False),
        ("0123", False),
    ],
)
@in_loop
async def test_session_that_the_client_chose_goes_on_under_exactly_its_name(
    tmp_path: Path, chosen: str, inferred: bool
) -> None:
    answer = plain(b'{"id": "resp_1", "object": "response", "status": "completed"}')
    async with Upstream(answer) as upstream, running(tmp_path, upstream.url) as bench:
        await bench.serve(Client(b"{}", path="/v1/responses", headers=(JSON, (b"x-session-id", chosen.encode()))))
        await bench.serve(Client(b'{"previous_response_id": "resp_1"}', path="/v1/responses"))
        assert [record.session_id for record in bench.records()] == [chosen, chosen if inferred else None]


@pytest.mark.parametrize(
    ("status", "settings", "fields"),
    [
        (500, {}, {}),  # a failed turn is no turn
        (200, {"infer": False}, {}),
        (200, {}, {"n": 2}),  # which of two answers goes on is not known
    ],
)
@in_loop
async def test_conversation_is_not_guessed(
    tmp_path: Path, status: int, settings: dict[str, Any], fields: dict[str, Any]
) -> None:
    sessions = SessionSettings.model_validate(settings)
    script = plain(chat_answer("abc"), status)
    async with Upstream(script) as upstream, running(tmp_path, upstream.url, sessions=sessions) as bench:
        await bench.serve(Client(chat_body("q1", **fields)))
        await bench.serve(Client(chat_body("q1", "abc", "q2")))
        assert [record.session_id for record in bench.records()] == [None, None]


@in_loop
async def test_previous_response_id_continues_a_conversation(tmp_path: Path) -> None:
    def answered(number: int) -> Script:
        fields = {"id": f"resp_{number}", "object": "response", "status": "completed", "model": "served"}
        return plain(json.dumps({**fields, "usage": {"input_tokens": 5, "output_tokens": 2}}).encode())

    async with Upstream(answered(1), answered(2), answered(3)) as upstream, running(tmp_path, upstream.url) as bench:
        for before in (None, "resp_1", "resp_2", "resp_unknown"):
            body = json.dumps({"model": "m", "input": "hi", "previous_response_id": before}).encode()
            await bench.serve(Client(body, path="/v1/responses"))
        first, *later, stranger = bench.records()
    assert first.session_id is None
    assert [record.session_id for record in later] == [first.request_id] * 2
    assert stranger.session_id is None
    assert (first.request_tokens, first.response_tokens, first.finish_reason) == (5, 2, "completed")


@pytest.mark.parametrize(
    ("value", "origin"),
    [
        (b"replay", Origin.REPLAY),
        (b"shadow", Origin.CLIENT),
        (b"imported", Origin.CLIENT),
        (b"", Origin.CLIENT),
    ],
)
@in_loop
async def test_origin_of_a_request(tmp_path: Path, value: bytes, origin: Origin) -> None:
    async with Upstream(plain()) as upstream, running(tmp_path, upstream.url) as bench:
        await bench.serve(Client(b"{}", headers=(JSON, (b"x-burstgate-origin", value))))
        begun = bench.journal()[0]
        assert bench.record().origin is origin
        assert begun[0].origin is origin
    assert upstream.requests[0].values(b"x-burstgate-origin") == []


# Many at once ---------------------------------------------------------------------------------------------------------


@in_loop
async def test_many_at_once_of_every_kind(tmp_path: Path) -> None:
    async def by_question(talk: Talk) -> None:
        kind = talk.request.fields["messages"][0]["content"]
        if kind == "stream":
            await talk.stream(*PIECES)
        elif kind == "plain":
            await talk.answer(chat_answer())
        elif kind == "break":
            await _breaks_off_stream(talk)
        elif kind == "leave":
            await _event_then_silent(talk)

    async def one(bench: Bench, kind: str) -> None:
        client = Client(chat_body(kind, stream=kind != "plain"))
        request = bench.start(client)
        if kind == "leave":
            await until(lambda: bool(client.body), "it runs")
            client.has_left.set()
        await request

    kinds = ["stream", "plain", "break", "leave"] * 50
    async with Upstream(by_question) as upstream, running(tmp_path, upstream.url) as bench:
        await asyncio.gather(*(one(bench, kind) for kind in kinds))
        outcomes = [record.outcome for record in bench.records()]
        counted = {outcome: bench.counter(f"outcome_{outcome}") for outcome in Outcome}
    expected = {Outcome.OK: 100, Outcome.TRUNCATED: 50, Outcome.CLIENT_GONE: 50}
    assert {outcome: outcomes.count(outcome) for outcome in set(outcomes)} == expected
    assert {outcome: count for outcome, count in counted.items() if count} == expected


@in_loop
async def test_load_is_spread_over_the_fleet(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def wait(talk: Talk) -> None:
        await release.wait()
        await talk.answer(b"{}")

    async with Upstream(wait) as one, Upstream(wait) as two, running(tmp_path, one.url, two.url) as bench:
        requests = [bench.start(Client(chat_body("hi"))) for _ in range(10)]
        await until(lambda: len(one.requests) + len(two.requests) == 10, "all are sent")
        assert (len(one.requests), len(two.requests)) == (5, 5)
        release.set()
        await asyncio.gather(*requests)
        bench.records()


# Pure parts -----------------------------------------------------------------------------------------------------------


@given(st.floats(0, 4e9), st.integers(0, 2**12 - 1), st.integers(0, 2**62 - 1))
def test_uuid7_layout(wall_s: float, high: int, low: int) -> None:
    text = uuid7(wall_s, lambda bits: {12: high, 62: low}[bits])
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", text)
    value = UUID(text).int
    assert (value >> 80, value >> 76 & 15, value >> 64 & 0xFFF) == (int(wall_s * 1000), 7, high)
    assert (value >> 62 & 3, value & (2**62 - 1)) == (2, low)


@given(st.integers(0, 2**41), st.integers(1, 10**6))
def test_uuid7_orders_by_millisecond(earlier_ms: int, gap_ms: int) -> None:
    assert uuid7((earlier_ms + 0.5) / 1000) < uuid7((earlier_ms + gap_ms + 0.5) / 1000)


def test_uuid7_draws_are_apart() -> None:
    assert len({uuid7(1.0) for _ in range(10_000)}) == 10_000


def test_estimates_learn_a_models_bytes_per_token() -> None:
    estimates = Estimates()
    assert estimates.request_tokens("m", 400) == 100  # 4 bytes a token until something is known
    estimates.learn("m", 1000, 500)
    assert estimates.request_tokens("m", 400) == 200
    assert estimates.request_tokens("other", 400) == 100
    estimates.learn("m", 1000, 1000)
    assert estimates.request_tokens("m", 1000) == 550
    assert estimates.request_tokens("m", 1) == 1
    assert estimates.request_tokens("m", 0) is None  # a body that was not read


def test_estimates_hold_a_bounded_number_of_models() -> None:
    estimates = Estimates()
    for index in range(10 * Estimates.MAX_MODELS):
        estimates.learn(f"m{index}", 10, 10)
    assert estimates.request_tokens("m0", 100) == 100
    assert estimates.request_tokens(f"m{Estimates.MAX_MODELS}", 100) == 25


# Several upstreams ----------------------------------------------------------------------------------------------------


@in_loop
async def test_prompts_blocks_are_recorded_where_that_is_asked_for(tmp_path: Path) -> None:
    async with Upstream(plain(chat_answer())) as upstream:
        async with running(tmp_path / "on", upstream.url, record={"prefix_blocks": True}) as bench:
            await bench.serve(Client(chat_body("a" * 2000, "b", "c")))
            await bench.serve(Client(chat_body("a" * 2000, "d", "e")))
            await bench.serve(Client(json.dumps({"model": "m", "prompt": "a" * 2000}).encode(), path="/v1/completions"))
            first, second, plain_prompt = (record.prefix_blocks for record in bench.records())
        async with running(tmp_path / "off", upstream.url) as bench:
            await bench.serve(Client(chat_body("a" * 2000)))
            assert bench.record().prefix_blocks is None
    assert first is not None
    assert second is not None
    assert plain_prompt is not None
    assert len(first) == len(second) == len(plain_prompt) == 7
    assert first[:7] == second[:7] != plain_prompt


@in_loop
async def test_a_prompt_that_begins_alike_goes_where_it_began(tmp_path: Path) -> None:
    async with Upstream(plain(chat_answer())) as one, Upstream(plain(chat_answer())) as other:
        async with running(tmp_path, one.url, other.url, balance={"policy": "prefix"}) as bench:
            for turn in range(6):
                for letter in "xy":
                    await bench.serve(Client(chat_body(letter * 3000, f"turn {turn}", "go on")))
            bench.records()
        assert len(one.requests) == len(other.requests) == 6
        for upstream in (one, other):
            assert len({request.fields["messages"][0]["content"] for request in upstream.requests}) == 1


@pytest.mark.parametrize("script", [plain(b'{"error":{}}', 503), _closes])
@in_loop
async def test_another_upstream_answers_in_the_place_of_one_that_fails(tmp_path: Path, script: Script) -> None:
    async with (
        Upstream(script) as bad,
        Upstream(plain(chat_answer())) as good,
        running(tmp_path, bad.url, good.url) as bench,
    ):
        clients = [await bench.serve(Client(chat_body("hi"))) for _ in range(4)]
        records = bench.records()
        assert bench.counter("retries") == len(bad.requests) > 0
    assert [client.status for client in clients] == [200] * 4
    assert {(record.outcome, record.upstream) for record in records} == {(Outcome.OK, good.url)}
    assert sum(record.attempts for record in records) == 4 + len(bad.requests)


@in_loop
async def test_failure_passes_where_nobody_else_is_left(tmp_path: Path) -> None:
    async with (
        Upstream(plain(b'{"error":{"type":"busy"}}', 503)) as one,
        Upstream(plain(b"{}", 503)) as other,
        running(tmp_path, one.url, other.url) as bench,
    ):
        client = await bench.serve(Client(chat_body("hi")))
        record = bench.record()
    assert (client.status, record.outcome, record.attempts) == (503, Outcome.UPSTREAM_ERROR, 2)
    assert client.body in (b"{}", b'{"error":{"type":"busy"}}')


@in_loop
async def test_alias_is_sent_under_the_models_own_name(tmp_path: Path) -> None:
    async with (
        Upstream(plain(chat_answer())) as upstream,
        running(tmp_path, upstream.url, aliases={"gpt": "m/own"}) as bench,
    ):
        await bench.serve(Client(chat_body("hi", model="gpt")))
        record = bench.record()
    assert upstream.requests[0].body == chat_body("hi", model="m/own")
    assert (record.model, record.served_model) == ("gpt", "served")


@in_loop
async def test_models_of_all_upstreams_are_one_list(tmp_path: Path) -> None:
    def models(name: str) -> Script:
        return plain(json.dumps({"object": "list", "data": [{"id": name, "object": "model"}]}).encode())

    async with (
        Upstream(models("a")) as one,
        Upstream(models("b")) as other,
        running(tmp_path, one.url, other.url, aliases={"gpt": "a"}) as bench,
    ):
        client = await bench.serve(Client(method="GET", path="/v1/models", headers=()))
        record = bench.record()
    assert [each["id"] for each in json.loads(client.body)["data"]] == ["a", "b", "gpt"]
    assert (client.status, record.outcome, record.endpoint) == (200, Outcome.OK, "/v1/models")


@in_loop
async def test_reload_takes_effect_for_the_next_request(tmp_path: Path) -> None:
    async with (
        Upstream(plain(b"one")) as one,
        Upstream(plain(b"other")) as other,
        running(tmp_path, one.url) as bench,
    ):
        before = await bench.serve(Client(method="GET", path="/x", headers=()))
        settings = bench.gateway.settings
        bench.gateway.apply(Settings.model_validate({**settings.model_dump(), "upstreams": (other.url,)}))
        after = await bench.serve(Client(method="GET", path="/x", headers=()))
        assert len(bench.records()) == 2
    assert (before.body, after.body) == (b"one", b"other")
