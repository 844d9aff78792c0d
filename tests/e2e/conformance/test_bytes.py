"""Bytes in, equal bytes out: requests and answers, streaming or not."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.e2e.conformance.client import Answer
from tests.e2e.conformance.upstream import Talk
from tests.e2e.conformance.world import (
    CHAT,
    CLOSE_S,
    DONE,
    END,
    JSON,
    STREAM_HEAD,
    World,
    case,
    chunk,
    completion,
    echo_message,
    event,
    response,
    says,
)

ODD_JSON = (
    b'{ "id" : "chatcmpl-1","x":1.50e+2, "x":[ ] ,"\\u00e9":"\xc3\xa9\xe2\x80\xa8", "object":"chat.completion" }\n'
)


def error(message: str, code: int) -> bytes:
    """As vLLM spells it, with spaces of its own."""
    return b'{"error" : ' + json.dumps({"message": message, "type": "E", "param": None, "code": code}).encode() + b"} "


def differs(got: bytes, sent: bytes) -> str:
    """Where two bodies part, in one line."""
    at = next((i for i, (a, b) in enumerate(zip(got, sent, strict=False)) if a != b), min(len(got), len(sent)))
    where = f"{len(got):,} bytes for {len(sent):,}, different from byte {at:,}"
    return f"{where}: {got[at : at + 24]!r} for {sent[at : at + 24]!r}"


@dataclass(frozen=True)
class Unary:
    """One answer of an upstream."""

    name: str
    must_hold: str
    raw: tuple[bytes, ...]
    body: bytes
    status: int = 200
    kept: tuple[tuple[bytes, bytes], ...] = ()
    """Headers that must arrive."""
    ends: bool = False
    """The upstream closes after it."""


def whole(body: bytes, *lines: bytes, status: bytes = b"200 OK", content_type: bytes = JSON) -> tuple[bytes, ...]:
    return (response(body, *lines, status=status, content_type=content_type),)


BINARY = bytes(range(256)) * 8
SHORT_CHAT = completion("yes")
ZIPPED = gzip.compress(SHORT_CHAT * 20, mtime=0)
LONG_CHAT = completion("long " * 210_000)

UNARY = [
    Unary("json", "odd spacing, duplicate keys and number spellings survive", whole(ODD_JSON), ODD_JSON),
    Unary(
        "400", "the upstream's error body", whole(error("bad", 400), status=b"400 Bad Request"), error("bad", 400), 400
    ),
    Unary(
        "404", "the upstream's error body", whole(error("none", 404), status=b"404 Not Found"), error("none", 404), 404
    ),
    Unary(
        "429",
        "the upstream's error body, and its Retry-After",
        whole(error("busy", 429), b"retry-after: 7", status=b"429 Too Many Requests"),
        error("busy", 429),
        429,
        ((b"retry-after", b"7"),),
    ),
    Unary(
        "500",
        "the upstream's error body",
        whole(error("oh", 500), status=b"500 Internal Server Error"),
        error("oh", 500),
        500,
    ),
    Unary(
        "503",
        "the upstream's error body, and its Retry-After",
        whole(
            b"overloaded\n",
            b"retry-after: 3",
            status=b"503 Service Unavailable",
            content_type=b"content-type: text/plain",
        ),
        b"overloaded\n",
        503,
        ((b"retry-after", b"3"), (b"content-type", b"text/plain")),
    ),
    Unary("no reason", "a status that nobody knows, without a reason phrase", whole(b"{}", status=b"599 "), b"{}", 599),
    Unary(
        "binary",
        "a body that is no JSON",
        whole(BINARY, content_type=b"content-type: audio/wav"),
        BINARY,
        kept=((b"content-type", b"audio/wav"),),
    ),
    Unary("broken json", "a body that claims to be JSON", whole(b'{"choices": [}'), b'{"choices": [}'),
    Unary(
        "gzip",
        "a compressed body passes as it is, with its Content-Encoding",
        whole(ZIPPED, b"content-encoding: gzip"),
        ZIPPED,
        kept=((b"content-encoding", b"gzip"),),
    ),
    Unary("empty", "an empty body", whole(b""), b""),
    Unary("1 MiB", "a long body", whole(LONG_CHAT), LONG_CHAT),
    Unary(
        "chunked",
        "a body in chunks of one byte",
        (
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
            *(chunk(bytes([byte])) for byte in SHORT_CHAT),
            END,
        ),
        SHORT_CHAT,
    ),
    Unary(
        "until close",
        "a body that ends with the upstream's connection",
        (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n", SHORT_CHAT[:9], SHORT_CHAT[9:]),
        SHORT_CHAT,
        ends=True,
    ),
    Unary(
        "http/1.0 upstream",
        "an answer of HTTP/1.0",
        (b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n" + SHORT_CHAT,),
        SHORT_CHAT,
        ends=True,
    ),
    Unary("204", "no content, no body, no length to wait for", (b"HTTP/1.1 204 No Content\r\n\r\n",), b"", 204),
    Unary(
        "304",
        "not modified, no body",
        (b'HTTP/1.1 304 Not Modified\r\netag: "a"\r\n\r\n',),
        b"",
        304,
        ((b"etag", b'"a"'),),
    ),
]


@pytest.mark.parametrize("row", UNARY, ids=lambda row: row.name)
@case
async def test_answer(world: World, row: Unary) -> None:
    async def script(talk: Talk) -> None:
        await talk.read_body()
        await talk.send(*row.raw)
        if row.ends:
            talk.close()

    one = world.case(script)
    answer = await one.ask(one.request(b"accept-encoding: gzip"))
    assert answer.status == row.status, f"status {answer.status} for {row.status}"
    assert answer.is_whole, "the answer is cut off"
    assert answer.body == row.body, differs(answer.body, row.body)
    for name, value in row.kept:
        assert answer.values(name) == [value], f"{name.decode()}: {answer.values(name)} for {value!r}"
    assert len(one.seen) == 1, f"the upstream was asked {len(one.seen)} times"


@case
async def test_head(world: World) -> None:
    """HEAD: the length of the body that GET would have, and no body."""

    async def script(talk: Talk) -> None:
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 1234\r\n\r\n")

    one = world.case(script)
    async with await world.connect() as client:
        await client.send(one.request(method=b"HEAD", path=b"/v1/files/f"))
        answer = await client.answer(is_head=True)
        assert answer.status == 200, f"{answer}"
        assert answer.values(b"content-length") == [b"1234"], f"content-length {answer.values(b'content-length')}"
        await client.send(one.request(method=b"HEAD", path=b"/v1/files/f"))
        assert (await client.answer(is_head=True)).status == 200, "the connection is out of step afterwards"
    assert [request.method for request in one.seen] == [b"HEAD", b"HEAD"]


@case
async def test_unknown_route(world: World) -> None:
    """A route that nobody has heard of, with a body that is no JSON, both ways."""
    one = world.case(says(*whole(BINARY, content_type=b"content-type: application/x-own")))
    answer = await one.ask(
        one.request(body=BINARY, path=b"/v9/not/yet", content_type=b"content-type: application/x-own")
    )
    assert answer.status == 200, f"{answer}"
    assert answer.body == BINARY, differs(answer.body, BINARY)
    assert bytes(one.seen[0].body) == BINARY, differs(bytes(one.seen[0].body), BINARY)


TARGETS = [
    b"/v1/a%2Fb/c",
    b"/v1/%7euser/%E2%82%AC",
    b"/v1/a//b/",
    b"/v1/a;p=1,2/$&'()*+:@!",
    b"/v1/x?x=%41&&y&z=a+b%20c",
    b"/v1/x?u=http://h/p?q",
    b"/v1/x?a[]=1|2",
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.decode())
@case
async def test_target(world: World, target: bytes) -> None:
    """The path and the query reach the upstream as they were spelt."""
    one = world.case()
    answer = await one.ask(one.request(method=b"GET", path=target))
    assert answer.status == 200, f"{answer}"
    assert one.seen[0].target == one.target(target), f"{one.seen[0].target!r} for {one.target(target)!r}"


@case
async def test_request_body(world: World) -> None:
    """A request's odd spacing, unknown fields and duplicate keys reach the upstream."""
    one = world.case()
    messages = b'[ {"role":"user" ,"content":"\\u0041 %b \xe2\x80\xa8"} ]' % one.token
    body = b' { "model":"bench-model", "messages":%b,"n" : 1, "n":1,"x_own":{"a":[1.0,1e0]} }\n' % messages
    answer = await one.ask(one.request(body=body))
    assert answer.status == 200, f"{answer}"
    assert bytes(one.seen[0].body) == body, differs(bytes(one.seen[0].body), body)


@case
async def test_upload(world: World) -> None:
    """A multipart upload of 3 MiB reaches the upstream."""
    one = world.case()
    form = (
        b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        + BINARY * 1536
        + b"\r\n--b--\r\n"
    )
    content_type = b"content-type: multipart/form-data; boundary=b"
    answer = await one.ask(one.request(body=form, path=b"/v1/audio/transcriptions", content_type=content_type))
    assert answer.status == 200, f"{answer}"
    assert bytes(one.seen[0].body) == form, differs(bytes(one.seen[0].body), form)


@dataclass(frozen=True)
class Stream:
    """One stream, in the pieces in which the upstream writes it, a chunk each."""

    name: str
    must_hold: str
    pieces: tuple[bytes, ...]


def cut(data: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(data[at : at + size] for at in range(0, len(data), size))


PLAIN = b"".join(event(f"word {number}") for number in range(5)) + DONE
SEPARATOR = event("a\u2028b\u2029c\x85d").replace(b"\\u2028", "\u2028".encode()).replace(b"\\u2029", "\u2029".encode())
SEPARATOR = SEPARATOR.replace(b"\\u0085", "\x85".encode())

STREAMS = [
    Stream("events", "an event a chunk", (*(event(f"word {number}") for number in range(20)), DONE)),
    Stream("bytes", "a byte a chunk", cut(PLAIN, 1)),
    Stream("sevens", "cuts anywhere", cut(PLAIN, 7)),
    Stream("at once", "several events in a chunk", (PLAIN,)),
    Stream("crlf", "lines that end with CRLF, cut between CR and LF", cut(PLAIN.replace(b"\n", b"\r\n"), 3)),
    Stream("cr", "lines that end with CR", cut(PLAIN.replace(b"\n", b"\r"), 11)),
    Stream(
        "comments",
        "comments and fields that nobody asked for",
        (b": wait\n\n", b"id: 1\nretry: 10\n", PLAIN, b":bye\n\n"),
    ),
    Stream(
        "names", "named events, data over several lines", (b"event: a\ndata: {\ndata: }\n\n", b"data:{}\n\n", PLAIN)
    ),
    Stream("u+2028", "U+2028, U+2029 and U+0085 inside JSON", (SEPARATOR, DONE)),
    Stream("1 MiB", "one huge event", (*cut(event("long " * 210_000), 65536), DONE)),
    Stream("bom", "a byte order mark before the first event", (b"\xef\xbb\xbf" + PLAIN,)),
    Stream("not json", "data that is no JSON", (b"data: {oh\n\n", b"data: \xff\xfe\n\n", DONE)),
    Stream(
        "error event",
        "an error in the middle of a stream",
        (event("a"), b'data: {"error": {"message": "x"}}\n\n', DONE),
    ),
    Stream("no done", "a stream that ends without [DONE]", (event("a"), event("b"))),
    Stream("after done", "bytes after [DONE]", (PLAIN, b": more\n\n")),
    Stream("half event", "a last event without its empty line", (event("a"), b'data: {"choices": []}')),
]


@pytest.mark.parametrize("asks", [False, True], ids=["usage not asked", "usage asked"])
@pytest.mark.parametrize("row", STREAMS, ids=lambda row: row.name)
@case
async def test_stream(world: World, row: Stream, asks: bool) -> None:
    one = world.case(says(STREAM_HEAD, *map(chunk, row.pieces), END))
    more = {"stream_options": {"include_usage": True}} if asks else {}
    answer = await one.ask(one.request(body=one.body(stream=True, **more)))
    sent = b"".join(row.pieces)
    assert answer.status == 200, f"{answer}"
    assert answer.is_whole, "the stream is cut off"
    assert answer.body == sent, differs(answer.body, sent)
    assert answer.values(b"content-type") == [b"text/event-stream"], f"content-type {answer.values(b'content-type')}"


@case
async def test_stream_is_prompt(world: World, record_property: Callable[[str, object], None]) -> None:
    """Each event reaches the client before the upstream writes the next one."""
    arrived = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.read_body()
        await talk.send(STREAM_HEAD)
        for number in range(10):
            arrived.clear()
            await talk.send(chunk(event(f"word-{number}")))
            await arrived.wait()
        await talk.send(chunk(DONE), END)

    one = world.case(script)
    took_ms = []
    async with await world.connect() as client:
        await client.send(one.request(body=one.body(stream=True)))
        answer = await client.head()
        assert answer.status == 200, f"{answer}"
        for number in range(10):
            start_s = time.monotonic()
            await client.wait_for(b"word-%d" % number)
            took_ms.append((time.monotonic() - start_s) * 1000)
            arrived.set()
        await client.wait_for(b"[DONE]")
    record_property("slowest_event_ms", round(max(took_ms), 1))
    assert max(took_ms) < CLOSE_S * 1000, f"an event took {max(took_ms):.0f} ms"


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
USAGE_EVENT = event("").replace(
    b'"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": null}]', b'"choices": []'
)
USAGE_EVENT = USAGE_EVENT.replace(b"}\n\n", b', "usage": %b}\n\n' % json.dumps(USAGE).encode())


async def _stream_with_usage(world: World, *, asks: bool) -> tuple[Answer, bool, bytes]:
    """The answer, whether the upstream was asked for usage, and the stream with usage."""
    world.need("usage")
    sent = event("a") + event("b")
    asked = False

    async def script(talk: Talk) -> None:
        nonlocal asked
        options = json.loads(await talk.read_body()).get("stream_options") or {}
        asked = options.get("include_usage") is True
        usage = chunk(USAGE_EVENT) if asked else b""
        await talk.send(STREAM_HEAD, chunk(event("a")), chunk(event("b")), usage + chunk(DONE), END)

    one = world.case(script)
    more = {"stream_options": {"include_usage": True}} if asks else {}
    answer = await one.ask(one.request(body=one.body(stream=True, **more)))
    return answer, asked, sent


@case
async def test_usage_is_asked_for_and_hidden(world: World) -> None:
    """The upstream is asked for usage, and a client that did not ask sees none of it."""
    answer, asked, sent = await _stream_with_usage(world, asks=False)
    assert asked, "the upstream was not asked for usage"
    assert answer.body == sent + DONE, differs(answer.body, sent + DONE)


@case
async def test_usage_that_was_asked_for_is_left_alone(world: World) -> None:
    """A client that asked for usage gets the upstream's event."""
    answer, asked, sent = await _stream_with_usage(world, asks=True)
    assert asked
    assert answer.body == sent + USAGE_EVENT + DONE, differs(answer.body, sent + USAGE_EVENT + DONE)


@case
async def test_compressed_stream(world: World) -> None:
    """A compressed stream passes as it is."""
    zipped = gzip.compress(PLAIN, mtime=0)
    head = STREAM_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")
    one = world.case(says(head, *map(chunk, cut(zipped, 9)), END))
    answer = await one.ask(one.request(b"accept-encoding: gzip", body=one.body(stream=True)))
    assert answer.status == 200, f"{answer}"
    assert answer.body == zipped, differs(answer.body, zipped)
    assert answer.values(b"content-encoding") == [b"gzip"], f"content-encoding {answer.values(b'content-encoding')}"


@case
async def test_many_at_once(world: World) -> None:
    """Sixty-four requests at once, each with its own answer."""

    async def script(talk: Talk) -> None:
        await talk.read_body()
        await asyncio.sleep(0.05)
        await echo_message(talk)

    one = world.case(script)

    async def ask(number: int) -> Answer:
        messages = [{"role": "user", "content": f"{one.token.decode()} number <{number}>"}]
        return await one.ask(one.request(body=json.dumps({"model": "bench-model", "messages": messages}).encode()))

    answers = await asyncio.gather(*map(ask, range(64)))
    wrong = [number for number, answer in enumerate(answers) if b"<%d>" % number not in answer.body]
    assert wrong == [], f"{len(wrong)} of 64 got no answer or another's, the first {answers[wrong[0]]}"
    assert CHAT in one.seen[0].target
