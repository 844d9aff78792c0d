"""HTTP/1.1 framing from a raw socket: what is odd and right is served, what is wrong is refused."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from dataclasses import dataclass
from typing import Literal

import pytest

from tests.e2e.conformance.client import Answer
from tests.e2e.conformance.upstream import Talk
from tests.e2e.conformance.world import (
    BODY_BYTES,
    CHAT,
    CLOSE_S,
    END,
    JSON,
    Case,
    World,
    case,
    chunk,
    completion,
    echo_message,
    normal_service,
    until,
)

QUIET_S = 0.05
"""How long to look for a request that must not reach the upstream, once its client has been answered."""
HTTP_ERRORS = (400, 404, 405, 411, 413, 414, 417, 421, 426, 431, 501, 505)


def same_request(one: Case, at: int = 0) -> str:
    """What is wrong with the request at the upstream, as a chat; empty when nothing is."""
    try:
        got = json.loads(one.seen[at].body)
    except ValueError:
        return f"the upstream got the body {bytes(one.seen[at].body[:60])!r}"
    sent = json.loads(one.body())
    return "" if got.get("messages") == sent["messages"] else f"the upstream got other messages: {got.get('messages')}"


@dataclass(frozen=True)
class Framing:
    """A request with `%TOKEN%` for the token and `%BODY%`, `%LENGTH%`, `%CHUNKS%` for a chat's body.

    served: 200, and the upstream sees this one request. denied: an error, and the upstream sees nothing. refused: the
    same, and the connection closes, because nobody knows where the next request begins. either: served or denied.
    """

    name: str
    must_hold: str
    raw: bytes
    expect: Literal["served", "denied", "refused", "either"]

    def bytes_for(self, one: Case) -> bytes:
        body = one.body()
        raw = self.raw.replace(b"%TOKEN%", one.token).replace(b"%CHUNKS%", chunk(body) + END)
        return raw.replace(b"%LENGTH%", b"%d" % len(body)).replace(b"%BODY%", body)


START = b"POST /v1/chat/completions?case=%TOKEN% HTTP/1.1\r\n"
HOST = b"host: gateway.test\r\n"
TYPE = b"content-type: application/json\r\n"
LENGTH = b"content-length: %LENGTH%\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
REST = HOST + TYPE + LENGTH
ROWS = [
    Framing("plain", "a plain request", START + REST + b"\r\n%BODY%", "served"),
    Framing("chunked", "a chunked body", START + HOST + TYPE + CHUNKED + b"\r\n%CHUNKS%", "served"),
    Framing(
        "chunk extension",
        "extensions of chunks are ignored",
        START + HOST + TYPE + CHUNKED + b'\r\n1;a=b;c="d;e"\r\n \r\n%CHUNKS%',
        "served",
    ),
    Framing(
        "chunk size zeros",
        "a chunk size with leading zeros",
        START + HOST + TYPE + CHUNKED + b"\r\n0001\r\n \r\n%CHUNKS%",
        "served",
    ),
    Framing(
        "blank lines",
        "empty lines before a request are skipped (RFC 9112, 2.2)",
        b"\r\n\r\n" + START + REST + b"\r\n%BODY%",
        "served",
    ),
    Framing(
        "absolute form",
        "a target with scheme and host",
        b"POST http://gateway.test/v1/chat/completions?case=%TOKEN% HTTP/1.1\r\n" + REST + b"\r\n%BODY%",
        "served",
    ),
    Framing(
        "header case",
        "names in any case",
        START + b"HOST: gateway.test\r\nCONTENT-type: application/json\r\ncOnTeNt-LeNgTh: %LENGTH%\r\n\r\n%BODY%",
        "served",
    ),
    Framing(
        "no space",
        "no space after the colon",
        START + b"host:gateway.test\r\ncontent-type:application/json\r\ncontent-length:%LENGTH%\r\n\r\n%BODY%",
        "served",
    ),
    Framing(
        "tabs",
        "tabs and spaces around a value",
        START
        + b"host: \tgateway.test\t \r\ncontent-type: application/json\r\ncontent-length: \t%LENGTH% \r\n\r\n%BODY%",
        "served",
    ),
    Framing("empty value", "a header without a value", START + REST + b"x-empty:\r\n\r\n%BODY%", "served"),
    Framing(
        "latin-1 value",
        "bytes over 127 in a value",
        START + REST + b"x-name: J\xf6rg \xe2\x82\xac\r\n\r\n%BODY%",
        "served",
    ),
    Framing("8 KiB header", "a long header", START + REST + b"x-long: " + b"a" * 8192 + b"\r\n\r\n%BODY%", "served"),
    Framing(
        "100 headers",
        "many headers",
        START + REST + b"".join(b"x-%d: v\r\n" % n for n in range(90)) + b"\r\n%BODY%",
        "served",
    ),
    Framing(
        "4 KiB target",
        "a long query",
        START.replace(b"case=", b"q=" + b"a" * 4096 + b"&case=") + REST + b"\r\n%BODY%",
        "served",
    ),
    Framing("http/1.0", "a request of HTTP/1.0", START.replace(b"1.1", b"1.0") + REST + b"\r\n%BODY%", "served"),
    Framing(
        "http/1.0 without host",
        "a request of HTTP/1.0 needs no Host",
        START.replace(b"1.1", b"1.0") + TYPE + LENGTH + b"\r\n%BODY%",
        "served",
    ),
    Framing(
        "expect in any case",
        "Expect: 100-Continue with its body at once",
        START + REST + b"expect: 100-Continue\r\n\r\n%BODY%",
        "served",
    ),
    Framing(
        "upgrade",
        "an offer of h2c is left",
        START
        + REST
        + b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n\r\n%BODY%",
        "either",
    ),
    Framing(
        "lf only",
        "lines that end with LF alone",
        (START + REST + b"\r\n").replace(b"\r\n", b"\n") + b"%BODY%",
        "either",
    ),
    Framing("obs-fold", "a folded header (RFC 9112, 5.2)", START + REST + b"x-fold: a\r\n b\r\n\r\n%BODY%", "either"),
    Framing(
        "two spaces",
        "two spaces in the request line",
        START.replace(b" HTTP", b"  HTTP") + REST + b"\r\n%BODY%",
        "either",
    ),
    Framing("lower-case method", "post is not POST", START.replace(b"POST", b"post") + REST + b"\r\n%BODY%", "either"),
    Framing(
        "unknown method", "a method that nobody knows", START.replace(b"POST", b"BREW") + REST + b"\r\n%BODY%", "either"
    ),
    Framing(
        "unknown expectation", "Expect with something else", START + REST + b"expect: a-miracle\r\n\r\n%BODY%", "either"
    ),
    Framing("duplicate type", "two equal Content-Type headers", START + REST + TYPE + b"\r\n%BODY%", "either"),
    Framing("no host", "HTTP/1.1 without Host (RFC 9112, 3.2)", START + TYPE + LENGTH + b"\r\n%BODY%", "refused"),
    Framing(
        "two hosts", "two different Hosts (RFC 9112, 3.2)", START + REST + b"host: other.test\r\n\r\n%BODY%", "refused"
    ),
    Framing(
        "space before colon",
        "a space between name and colon (RFC 9112, 5.1)",
        START + REST + b"x-a : b\r\n\r\n%BODY%",
        "refused",
    ),
    Framing(
        "space before the first header",
        "a line that begins with a space",
        START + b" x-a: b\r\n" + REST + b"\r\n%BODY%",
        "refused",
    ),
    Framing("no colon", "a header line without a colon", START + REST + b"x-nothing\r\n\r\n%BODY%", "refused"),
    Framing("empty name", "a header without a name", START + REST + b": b\r\n\r\n%BODY%", "refused"),
    Framing(
        "odd name", "a name with a character that is no token's", START + REST + b"x(a): b\r\n\r\n%BODY%", "refused"
    ),
    Framing("nul in a value", "NUL in a header", START + REST + b"x-a: a\x00b\r\n\r\n%BODY%", "refused"),
    Framing("nul in a name", "NUL in a name", START + REST + b"x-\x00a: b\r\n\r\n%BODY%", "refused"),
    Framing(
        "bare cr in a value",
        "CR without LF in a value: refused, or a space instead of it (RFC 9112, 2.2)",
        START + REST + b"x-a: a\rb: c\r\n\r\n%BODY%",
        "either",
    ),
    Framing(
        "control in the target",
        "a control character in the target",
        START.replace(b"?", b"\x01?") + REST + b"\r\n%BODY%",
        "refused",
    ),
    Framing(
        "no version",
        "a request line without a version",
        b"POST /v1/chat/completions?case=%TOKEN%\r\n" + REST + b"\r\n%BODY%",
        "refused",
    ),
    Framing(
        "http/2.0", "a version that is not spoken here", START.replace(b"1.1", b"2.0") + REST + b"\r\n%BODY%", "refused"
    ),
    Framing("http/1.10", "a version that is none", START.replace(b"1.1", b"1.10") + REST + b"\r\n%BODY%", "refused"),
    Framing("words", "words", b"how are you?\r\n\r\n", "refused"),
    Framing(
        "http/2 preface",
        "HTTP/2 with prior knowledge",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        "refused",
    ),
    Framing("relative target", "a target without a slash", START.replace(b" /", b" ") + REST + b"\r\n%BODY%", "denied"),
    Framing(
        "connect", "CONNECT makes no tunnel", b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: 127.0.0.1:22\r\n\r\n", "denied"
    ),
    Framing(
        "negative length",
        "a Content-Length below 0",
        START + HOST + TYPE + b"content-length: -5\r\n\r\n%BODY%",
        "refused",
    ),
    Framing(
        "length with a sign",
        "a Content-Length with a sign",
        START + HOST + TYPE + b"content-length: +%LENGTH%\r\n\r\n%BODY%",
        "refused",
    ),
    Framing(
        "length no number",
        "a Content-Length that is no number",
        START + HOST + TYPE + b"content-length: 5x\r\n\r\n%BODY%",
        "refused",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@case
async def test_request(world: World, row: Framing) -> None:
    one = world.case()
    async with await world.connect() as client:
        await client.send(row.bytes_for(one))
        answer = await client.answer()
        await asyncio.sleep(QUIET_S)
        if row.expect == "served" or (row.expect == "either" and answer.status == 200):
            assert answer.status == 200, f"{answer}"
            assert answer.is_whole, f"{answer}"
            assert len(one.seen) == 1, f"the upstream saw {len(one.seen)} requests"
            assert (problem := same_request(one)) == "", problem
            assert re.search(rb"\r(?!\n)|\x00", one.seen[0].head) is None, "a bare CR was sent on"
        else:
            assert answer.status in (0, *HTTP_ERRORS), f"{answer}"
            assert one.seen == [], f"{answer}, and the upstream saw {one.seen[0].head.splitlines()[0]!r}"
            if row.expect == "refused":
                assert await client.is_closed(), f"{answer}, and the connection stays open"
    await normal_service(world, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65536])
@case
async def test_cut_anywhere(world: World, size: int) -> None:
    """A chunked request with extensions and trailers, sent in pieces of this many bytes."""
    one = world.case()
    body = one.body()
    chunks = b"".join(chunk(body[at : at + 5]) for at in range(0, len(body), 5)).replace(b"5\r\n", b"5;x=y\r\n", 1)
    async with await world.connect() as client:
        data = one.head(JSON, b"transfer-encoding: chunked", b"trailer: x-sum") + b"\r\n" + chunks
        await client.send_slowly(data + b"0\r\nx-sum: 1\r\n\r\n", size)
        answer = await client.answer()
        assert answer.status == 200, f"{answer}"
        assert (problem := same_request(one)) == "", problem
        await client.send(one.request())
        assert (await client.answer()).status == 200, "the next request on the connection fails"
    assert len(one.seen) == 2, f"the upstream saw {len(one.seen)} requests for 2"
    assert all(not request.values(b"x-sum") for request in one.seen), "a trailer became a header"


@case
async def test_slow_request(world: World) -> None:
    """A request that comes byte by byte, a millisecond apart."""
    one = world.case()
    async with await world.connect() as client:
        await client.send_slowly(one.request(), 1, 0.001)
        answer = await client.answer()
    assert answer.status == 200, f"{answer}"
    assert (problem := same_request(one)) == "", problem


@case
async def test_pipelined(world: World) -> None:
    """Five requests at once on one connection: five answers in their order."""

    async def script(talk: Talk) -> None:
        await asyncio.sleep(0.05 if b"n=0" in await talk.read_body() else 0.0)
        await echo_message(talk)

    one = world.case(script)
    chats = [
        json.dumps({"model": "bench-model", "messages": [{"role": "user", "content": f"{one.token.decode()} n={n}"}]})
        for n in range(5)
    ]
    async with await world.connect() as client:
        await client.send(
            b"".join(one.request(body=body.encode(), path=CHAT + b"?n=%d" % n) for n, body in enumerate(chats))
        )
        for number in range(5):
            answer = await client.answer()
            assert answer.status == 200, f"answer {number}: {answer}"
            assert b"n=%d" % number in answer.body, f"answer {number} is another's"
    assert len(one.seen) == 5


@case
async def test_keep_alive(world: World) -> None:
    """Ten requests on one connection, streams and plain ones in turn."""
    one = world.case()
    async with await world.connect() as client:
        for number in range(10):
            await client.send(one.request(body=one.body(n=1)))
            answer = await client.answer()
            assert answer.status == 200, f"request {number}: {answer}"
    assert len(one.seen) == 10


@case
async def test_connection_close(world: World) -> None:
    """Connection: close is answered and obeyed."""
    one = world.case()
    async with await world.connect() as client:
        await client.send(one.request(b"connection: close"))
        answer = await client.answer()
        assert answer.status == 200, f"{answer}"
        assert await client.is_closed(), "the connection stays open"


@case
async def test_http_1_0_closes(world: World) -> None:
    """HTTP/1.0 without keep-alive: an answer without chunks, and the connection closes."""

    async def script(talk: Talk) -> None:
        await talk.read_body()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        await talk.send(head, chunk(completion("a")), END)

    one = world.case(script)
    async with await world.connect() as client:
        await client.send(one.request(version=b"1.0"))
        answer = await client.answer()
        assert answer.status == 200, f"{answer}"
        assert not answer.is_chunked, "a client of HTTP/1.0 got chunks"
        assert await client.is_closed(), "the connection stays open"


@case
async def test_http_1_0_keep_alive(world: World) -> None:
    """HTTP/1.0 with keep-alive: kept only where the answer says so, and closed where not."""
    one = world.case()
    async with await world.connect() as client:
        await client.send(one.request(b"connection: keep-alive", version=b"1.0"))
        answer = await client.answer()
        assert answer.status == 200, f"{answer}"
        if any(value.lower() == b"keep-alive" for value in answer.values(b"connection")):
            await client.send(one.request(b"connection: keep-alive", version=b"1.0"))
            answer = await client.answer()
            assert answer.status == 200, f"the second request: {answer}"
        else:
            assert await client.is_closed(), "not kept by its answer, and the connection stays open"


@case
async def test_expect_continue(world: World) -> None:
    """Expect: 100-continue: the 100 comes while the body has not been sent."""
    one = world.case()
    body = one.body()
    async with await world.connect() as client:
        await client.send(one.head(JSON, b"content-length: %d" % len(body), b"expect: 100-continue") + b"\r\n")
        await client.wait_for(b"100 ")
        await client.wait_for(b"\r\n\r\n")
        await client.send(body)
        answer = await client.answer()
        assert answer.status == 200, f"{answer}"
    assert (problem := same_request(one)) == "", problem


@case
async def test_options_asterisk(world: World) -> None:
    """OPTIONS *: an answer, and a connection that stays in step or closes."""
    one = world.case()
    async with await world.connect() as client:
        await client.send(b"OPTIONS * HTTP/1.1\r\nhost: gateway.test\r\nx-case: " + one.token + b"\r\n\r\n")
        answer = await client.answer()
        assert answer.status, f"{answer}"
        assert all(request.target in (b"*", b"/*", b"/") for request in one.seen), f"sent on as {one.seen[0].target!r}"


@case
async def test_60_kib_head(world: World) -> None:
    """A head below the limit of 64 KiB is served."""
    one = world.case()
    answer = await one.ask(one.request(*(b"x-%d: " % n + b"a" * 6000 for n in range(9))))
    assert answer.status == 200, f"{answer}"


@case
async def test_head_over_the_limit(world: World) -> None:
    """A head of 128 KiB: 431 (RFC 6585), and the connection closes."""
    one = world.case()
    async with await world.connect() as client:
        await client.send(one.request(*(b"x-%d: " % n + b"a" * 8000 for n in range(16))))
        answer = await client.answer()
        assert answer.status == 431, f"{answer}"
        assert await client.is_closed(), "the connection stays open"
    assert one.seen == []


@case
async def test_head_without_an_end(world: World) -> None:
    """A head that does not end is refused before 8 MiB of it have come."""
    one = world.case()
    async with await world.connect() as client:
        await client.send(one.head() + b"x-long: ")
        for _ in range(128):
            await client.send(b"a" * 65536)
        answer = await client.answer()
        assert answer.status in (0, 400, 431), f"{answer}"
    await normal_service(world, 1)


@case
async def test_body_over_the_limit(world: World) -> None:
    """A Content-Length over the limit: 413 before the body is sent."""
    world.need("body-limit")
    one = world.case()
    async with await world.connect(tight=True) as client:
        await client.send(one.head(JSON, b"content-length: %d" % (BODY_BYTES + 1)) + b"\r\n")
        answer = await client.answer()
        assert answer.status == 413, f"{answer}"
    assert one.seen == []


@case
async def test_chunked_body_over_the_limit(world: World) -> None:
    """A chunked body that grows over the limit: 413."""
    world.need("body-limit")
    one = world.case()
    async with await world.connect(tight=True) as client:
        await client.send(one.head(JSON, b"transfer-encoding: chunked") + b"\r\n")
        await client.send((chunk(b" " * 65536)) * (BODY_BYTES // 65536 + 1) + chunk(b"{}") + END)
        answer = await client.answer()
        assert answer.status == 413, f"{answer}"
    assert all(not request.is_whole for request in one.seen), "the upstream got all of it"


@case
async def test_tls_hello(world: World) -> None:
    """TLS on the plain port: refused or closed, nothing sent on."""
    one = world.case()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="gateway.test")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    async with await world.connect() as client:
        await client.send(outgoing.read())
        await client.send(b"\r\n\r\n")
        answer = await client.answer()
        assert answer.status in (0, 400), f"{answer}"
    assert one.seen == []
    await normal_service(world, 1)


@case
async def test_half_closed_client(world: World) -> None:
    """A client that ends its sending side after the request: answered whole, or its upstream request aborted."""

    async def script(talk: Talk) -> None:
        await talk.read_body()
        await asyncio.sleep(0.3)
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")

    one = world.case(script)
    async with await world.connect() as client:
        await client.send(one.request())
        request = await one.arrival()
        client.half_close()
        start_s = time.monotonic()
        answer: Answer = await client.answer()
        if not (answer.status == 200 and answer.is_whole):
            await until(lambda: request.closed_s is not None, f"{answer}, and the upstream request is aborted", CLOSE_S)
        assert time.monotonic() - start_s < CLOSE_S


@case
async def test_half_a_request(world: World) -> None:
    """A client that half-closes within its request: refused or closed, nothing sent on as whole."""
    one = world.case()
    async with await world.connect() as client:
        await client.send(one.head(JSON, b"content-length: 1000") + b"\r\n" + one.body())
        client.half_close()
        answer = await client.answer()
        assert answer.status in (0, *HTTP_ERRORS), f"{answer}"
    assert all(not request.is_whole for request in one.seen), "the upstream got a whole request"
