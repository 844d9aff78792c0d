"""Header hygiene: what belongs to one connection stays there, and everything else arrives as it was sent."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.e2e.conformance.upstream import Headers, Talk
from tests.e2e.conformance.world import (
    END,
    JSON,
    World,
    case,
    chunk,
    completion,
    normal_service,
    response,
    says,
)

BODY = completion("yes")


def values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for found, value in headers if found.lower() == name]


def listed(found: list[bytes]) -> list[bytes]:
    """Of a list header, which may travel as one line or as several (RFC 9110, 5.3)."""
    return [part.strip() for value in found for part in value.split(b",")]


@dataclass(frozen=True)
class Row:
    """Header lines on one side, and those of them that the other side may and must see."""

    name: str
    must_hold: str
    lines: tuple[bytes, ...]
    gone: tuple[bytes, ...] = ()
    kept: tuple[tuple[bytes, tuple[bytes, ...]], ...] = ()
    """By name: the values in their order."""


REQUESTS = [
    Row(
        "named by Connection",
        "a header that Connection names is not sent on",
        (b"connection: x-mine", b"x-mine: 1", b"x-other: 2"),
        (b"x-mine",),
        ((b"x-other", (b"2",)),),
    ),
    Row(
        "named by Connection, odd",
        "several names, in any case, over two lines",
        (b"connection: X-Mine , close", b"x-mine: 1", b"Connection: x-TWO", b"x-two: 2"),
        (b"x-mine", b"x-two"),
    ),
    Row(
        "keep-alive",
        "Keep-Alive and Proxy-Connection are not sent on",
        (b"keep-alive: timeout=5", b"proxy-connection: keep-alive"),
        (b"keep-alive", b"proxy-connection"),
    ),
    Row("te", "TE is not sent on", (b"te: gzip;q=0.5", b"connection: te"), (b"te",)),
    Row(
        "upgrade",
        "an offer of another protocol is not sent on",
        (b"connection: upgrade", b"upgrade: websocket", b"sec-websocket-version: 13"),
        (b"upgrade",),
    ),
    Row(
        "proxy authorization",
        "the gateway's own credentials are not sent on",
        (b"proxy-authorization: Basic eDp5",),
        (b"proxy-authorization",),
    ),
    Row(
        "order",
        "equal names keep their order",
        (b"x-multi: a", b"x-between: b", b"x-multi: c, d"),
        (),
        ((b"x-multi", (b"a", b"c", b"d")), (b"x-between", (b"b",))),
    ),
    Row("via", "what Via says already is kept", (b"via: 1.0 first", b"via: 1.1 second"), (), ()),
    Row(
        "value",
        "a value's inner spaces, quotes and commas survive",
        (b'x-odd: "a, b"  ;  c=\xe2\x82\xac', b"accept: a/b;q=0.1"),
        (),
        ((b"accept", (b"a/b;q=0.1",)),),
    ),
    Row(
        "trace context",
        "traceparent, tracestate and baggage arrive",
        (b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", b"tracestate: a=b", b"baggage: c=d"),
        (),
        ((b"tracestate", (b"a=b",)), (b"baggage", (b"c=d",))),
    ),
    Row(
        "x-request-id",
        "the client's own request id arrives",
        (b"x-request-id: mine-1",),
        (),
        ((b"x-request-id", (b"mine-1",)),),
    ),
    Row("cookies", "cookies arrive", (b"cookie: a=b; c=d",), (), ((b"cookie", (b"a=b; c=d",)),)),
    Row(
        "conditional",
        "conditions and ranges arrive",
        (b'if-none-match: "e"', b"range: bytes=0-1"),
        (),
        ((b"if-none-match", (b'"e"',)), (b"range", (b"bytes=0-1",))),
    ),
    Row(
        "underscore",
        "names with an underscore arrive, and not as something else",
        (b"x_own: 1",),
        (b"x-own",),
        ((b"x_own", (b"1",)),),
    ),
    Row("length named by Connection", "Content-Length can not be named away", (b"connection: content-length",), (), ()),
]


@pytest.mark.parametrize("row", REQUESTS, ids=lambda row: row.name)
@case
async def test_to_the_upstream(world: World, row: Row) -> None:
    one = world.case()
    answer = await one.ask(one.request(*row.lines))
    assert answer.status == 200, f"{answer}"
    assert len(one.seen) == 1, f"the upstream saw {len(one.seen)} requests"
    got = one.seen[0].headers
    for name in row.gone:
        assert values(got, name) == [], f"{name.decode()} was sent on: {values(got, name)}"
    for name, expected in row.kept:
        assert listed(values(got, name)) == list(expected), f"{name.decode()} arrived as {values(got, name)}"
    assert one.seen[0].body, "the body was lost"
    if row.name == "via":
        via = listed(values(got, b"via"))
        assert via[:2] == [b"1.0 first", b"1.1 second"], f"via arrived as {via}"
    if row.name == "value":
        assert values(got, b"x-odd") == [row.lines[0].partition(b": ")[2]], f"x-odd arrived as {values(got, b'x-odd')}"


@case
async def test_one_of_each(world: World) -> None:
    """The upstream sees one Host, one way of framing, the client's credentials, and its Accept-Encoding or none."""
    one = world.case()
    answer = await one.ask()
    assert answer.status == 200, f"{answer}"
    request = one.seen[0]
    assert len(request.values(b"host")) == 1, f"hosts: {request.values(b'host')}"
    framing = request.values(b"content-length") + request.values(b"transfer-encoding")
    assert len(framing) == 1, f"framing: {framing}"
    assert request.values(b"authorization") == [b"Bearer sk-bench"], (
        f"authorization: {request.values(b'authorization')}"
    )
    assert request.values(b"accept-encoding") in ([], [b"identity"]), (
        f"accept-encoding {request.values(b'accept-encoding')}"
    )


@case
async def test_get_has_no_body(world: World) -> None:
    """A GET without a body reaches the upstream without one."""
    one = world.case()
    answer = await one.ask(one.request(method=b"GET", path=b"/v1/files/f"))
    assert answer.status == 200, f"{answer}"
    assert one.seen[0].values(b"transfer-encoding") == [], "a GET with Transfer-Encoding"
    assert one.seen[0].values(b"content-length") in ([], [b"0"]), f"{one.seen[0].values(b'content-length')}"


ANSWERS = [
    Row(
        "named by Connection",
        "a header that Connection names is not sent on",
        (b"connection: x-mine", b"x-mine: 1", b"x-other: 2"),
        (b"x-mine",),
        ((b"x-other", (b"2",)),),
    ),
    Row(
        "keep-alive",
        "Keep-Alive, Proxy-Connection and Upgrade are not sent on",
        (b"keep-alive: timeout=97", b"proxy-connection: keep-alive", b"upgrade: h2c"),
        (b"proxy-connection", b"upgrade"),
    ),
    Row(
        "set-cookie",
        "two cookies stay two headers",
        (b"set-cookie: a=1, x; Path=/", b"set-cookie: b=2; Expires=Thu, 01 Jan 2037 00:00:00 GMT"),
        (),
        ((b"set-cookie", (b"a=1, x; Path=/", b"b=2; Expires=Thu, 01 Jan 2037 00:00:00 GMT")),),
    ),
    Row(
        "order",
        "equal names keep their order",
        (b"x-multi: a", b"x-between: b", b"x-multi: c"),
        (),
        ((b"x-between", (b"b",)),),
    ),
    Row("server", "the upstream's Server is not hidden", (b"server: vllm/1",), (), ((b"server", (b"vllm/1",)),)),
    Row(
        "date",
        "the upstream's Date is not hidden",
        (b"date: Thu, 01 Jan 2037 00:00:00 GMT",),
        (),
        ((b"date", (b"Thu, 01 Jan 2037 00:00:00 GMT",)),),
    ),
    Row(
        "cors",
        "the upstream's CORS headers are not doubled",
        (b"access-control-allow-origin: http://a.test", b"vary: origin"),
        (),
        ((b"access-control-allow-origin", (b"http://a.test",)), (b"vary", (b"origin",))),
    ),
    Row(
        "own",
        "headers that nobody knows, with odd values",
        (b'x-own: "a,b" ; \xe2\x82\xac', b"openai-processing-ms: 12", b"x-ratelimit-remaining-tokens: 7"),
        (),
        (
            (b"x-own", (b'"a,b" ; \xe2\x82\xac',)),
            (b"openai-processing-ms", (b"12",)),
            (b"x-ratelimit-remaining-tokens", (b"7",)),
        ),
    ),
    Row(
        "etag",
        "validators and caching",
        (b'etag: W/"1"', b"cache-control: no-store", b"last-modified: Thu, 01 Jan 1970 00:00:00 GMT"),
        (),
        ((b"etag", (b'W/"1"',)), (b"cache-control", (b"no-store",))),
    ),
    Row("empty", "a header without a value", (b"x-empty:",), (), ((b"x-empty", (b"",)),)),
]


@pytest.mark.parametrize("row", ANSWERS, ids=lambda row: row.name)
@case
async def test_to_the_client(world: World, row: Row) -> None:
    one = world.case(says(response(BODY, *row.lines)))
    answer = await one.ask()
    assert answer.status == 200, f"{answer}"
    assert answer.is_whole, f"{answer}"
    for name in row.gone:
        assert answer.values(name) == [], f"{name.decode()} was sent on: {answer.values(name)}"
    for name, expected in row.kept:
        assert answer.values(name) == list(expected), f"{name.decode()} arrived as {answer.values(name)}"
    if row.name == "order":
        assert listed(answer.values(b"x-multi")) == [b"a", b"c"], f"x-multi arrived as {answer.values(b'x-multi')}"
    if row.name == "keep-alive":
        assert b"timeout=97" not in answer.values(b"keep-alive"), "keep-alive was sent on"
    assert answer.values(b"content-type") == [b"application/json"], f"content-type {answer.values(b'content-type')}"


@case
async def test_content_type(world: World) -> None:
    """The content type's parameters survive, and none is added."""
    one = world.case(says(response(BODY, content_type=b"content-type: application/json;charset=UTF-8")))
    answer = await one.ask()
    assert answer.values(b"content-type") == [b"application/json;charset=UTF-8"], f"{answer.values(b'content-type')}"


@case
async def test_request_id_is_returned(world: World) -> None:
    """The client's X-Request-Id comes back, once."""
    world.need("request-id")
    one = world.case()
    answer = await one.ask(one.request(b"x-request-id: mine-1"))
    assert answer.values(b"x-request-id") == [b"mine-1"], f"x-request-id {answer.values(b'x-request-id')}"


@case
async def test_request_id_is_made(world: World) -> None:
    """A request without an id gets one, the same at the upstream and in the answer."""
    world.need("request-id")
    one = world.case()
    answer = await one.ask()
    sent = one.seen[0].values(b"x-request-id")
    assert len(sent) == 1, f"{sent}"
    assert answer.values(b"x-request-id") == sent, f"{answer.values(b'x-request-id')} for {sent}"


@case
async def test_request_id_of_an_error(world: World) -> None:
    """The gateway's own errors carry the client's X-Request-Id, too."""
    world.need("request-id")

    async def script(talk: Talk) -> None:
        await talk.read_body()
        talk.close()

    one = world.case(script)
    answer = await one.ask(one.request(b"x-request-id: mine-2"))
    assert answer.status in (502, 503), f"{answer}"
    assert answer.values(b"x-request-id") == [b"mine-2"], f"x-request-id {answer.values(b'x-request-id')}"


@pytest.mark.parametrize("status", [b"100 Continue", b"102 Processing", b"103 Early Hints"], ids=lambda s: s.decode())
@case
async def test_interim_answer(world: World, status: bytes) -> None:
    """A 1xx before the answer is passed on or dropped, and the answer is intact."""
    early = b"HTTP/1.1 " + status + b"\r\nlink: </a>; rel=preload\r\n\r\n"
    one = world.case(says(early, response(BODY)))
    async with await world.connect() as client:
        for number in range(2):
            await client.send(one.request())
            answer = await client.answer()
            assert answer.status == 200, f"request {number}: {answer}"
            assert answer.body == BODY, f"request {number}: {answer}"


@case
async def test_response_trailers(world: World) -> None:
    """Trailers of an answer are passed on or dropped, its body is intact, and the connection stays in step."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n"
    one = world.case(says(head, chunk(BODY), b"0\r\nx-sum: 1\r\n\r\n"))
    async with await world.connect() as client:
        for number in range(2):
            await client.send(one.request())
            answer = await client.answer()
            assert answer.status == 200, f"request {number}: {answer}"
            assert answer.body == BODY, f"request {number}: {answer}"
            assert answer.values(b"x-sum") == [], "a trailer became a header"


@case
async def test_folded_answer_header(world: World) -> None:
    """A folded header of an answer: unfolded, or 502; never a line break of its own."""
    one = world.case(says(response(BODY, b"x-fold: a\r\n b: c")))
    answer = await one.ask()
    assert answer.status in (200, 502, 503), f"{answer}"
    assert answer.values(b"b") == [], "the second line became a header"
    await normal_service(world, 1)


@case
async def test_large_answer_head(world: World) -> None:
    """An answer with 16 KiB of headers arrives."""
    one = world.case(says(response(BODY, *(b"x-%d: " % n + b"v" * 1000 for n in range(16)))))
    answer = await one.ask()
    assert answer.status == 200, f"{answer}"
    assert answer.values(b"x-15") == [b"v" * 1000], "x-15 is missing"


@case
async def test_switching_protocols(world: World) -> None:
    """An upstream that switches protocols unasked makes no tunnel."""

    async def script(talk: Talk) -> None:
        await talk.read_body()
        await talk.send(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: own\r\n\r\nhello\r\n\r\n")
        talk.close()

    answer = await world.case(script).ask()
    assert answer.status in (502, 503), f"{answer}"
    await normal_service(world, 1)


@case
async def test_expect_is_the_gateways(world: World) -> None:
    """Expect is answered or sent on; the upstream's body comes either way."""
    one = world.case()
    data = one.head(JSON, b"transfer-encoding: chunked", b"expect: 100-continue") + b"\r\n" + chunk(one.body()) + END
    answer = await one.ask(data)
    assert answer.status == 200, f"{answer}"
    assert one.seen[0].body, "the body was lost"
