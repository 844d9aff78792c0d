"""No smuggling: the gateway and its upstream always agree on where a request or an answer ends.

Every attack hides `GET /smuggled` where one reading of the request ends and another goes on. It holds when the upstream
never sees that request, never gets a head that could be read in two ways, and when later clients get their own answers.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

import pytest

from tests.e2e.conformance.upstream import Gone, Request, Talk
from tests.e2e.conformance.world import END, JSON, World, case, chunk, completion, echo, normal_service, response

QUIET_S = 0.1
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: gateway.test\r\n\r\n"


def ambiguity(request: Request) -> str:
    """Why two servers could read this head differently; empty when they can not."""
    lengths = request.values(b"content-length")
    codings = request.values(b"transfer-encoding")
    if lengths and codings:
        return f"sent on with Content-Length {lengths} and Transfer-Encoding {codings}"
    if len(lengths) > 1 or any(not re.fullmatch(rb"\d+", length) for length in lengths):
        return f"sent on with Content-Length {lengths}"
    if codings and codings != [b"chunked"]:
        return f"sent on with Transfer-Encoding {codings}"
    if len(request.values(b"host")) != 1:
        return f"sent on with {len(request.values(b'host'))} Hosts"
    for line in request.head.split(b"\r\n")[1:-2]:
        if not re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\x00]*", line):
            return f"sent on with the line {line[:60]!r}"
    if len(request.head.split(b"\r\n", 1)[0].split(b" ")) != 3:
        return f"sent on with the request line {request.head.splitlines()[0][:80]!r}"
    return ""


@dataclass(frozen=True)
class Attack:
    """A request whose framing is `lines`, and what stands after its head.

    body: `%HIDDEN%` is the smuggled request, `%CHAT%` a chat's body; `%LENGTH%` in a line is the length of all of it.
    refused: a 4xx or 501 is the only right answer, and the connection closes.
    """

    name: str
    must_hold: str
    lines: tuple[bytes, ...]
    body: bytes
    refused: bool = False
    target: bytes = b""
    """Put into the request line behind the path."""


SHORT = b"content-length: 5"
FULL = b"content-length: %LENGTH%"
TE = b"transfer-encoding: "
IN_A_CHUNK = b"%CHUNK%" + END
"""All of it is one request for who reads chunks; for who reads a short length, the second request is in the chunk."""
AFTER_CHUNKS = END + b"%HIDDEN%"
"""One request for who reads the length; for who reads chunks, a second one follows."""

CODINGS = [
    ("chunked", TE + b"chunked", False),
    ("xchunked", TE + b"xchunked", True),
    ("chunked, identity", TE + b"chunked, identity", True),
    ("identity", TE + b"identity", True),
    ("gzip", TE + b"gzip", True),
    ("identity, chunked", TE + b"identity, chunked", False),
    ("chunked twice", TE + b"chunked, chunked", True),
    ("two lines", TE + b"chunked\r\n" + TE + b"identity", True),
    ("two lines, other order", TE + b"identity\r\n" + TE + b"chunked", False),
    ("two lines chunked", TE + b"chunked\r\n" + TE + b"chunked", True),
    ("tab", b"transfer-encoding:\tchunked", False),
    ("trailing space", TE + b"chunked ", False),
    ("vertical tab", TE + b"\x0bchunked", True),
    ("space before colon", b"transfer-encoding : chunked", True),
    ("folded", b"transfer-encoding:\r\n chunked", False),
    ("leading space", b" transfer-encoding: chunked", False),
    ("quoted", TE + b'"chunked"', True),
    ("upper case", b"TRANSFER-ENCODING: CHUNKED", False),
    ("comma", TE + b",chunked", False),
    ("parameter", TE + b"chunked;q=1", True),
    ("after nul", TE + b"\x00chunked", True),
    ("underscore", b"transfer_encoding: chunked", False),
    ("bare cr", b"x-a: b\rtransfer-encoding: chunked", False),
    ("bare lf", b"x-a: b\ntransfer-encoding: chunked", False),
    ("empty", TE, False),
]

ATTACKS = [
    *(
        Attack(
            f"cl.te {name}",
            "length and coding, the coding spelt like this; the request is in a chunk",
            (SHORT, line),
            IN_A_CHUNK,
            refused,
        )
        for name, line, refused in CODINGS
    ),
    *(
        Attack(
            f"te.cl {name}",
            "coding and length, the coding spelt like this; the request is after the last chunk",
            (line, FULL),
            AFTER_CHUNKS,
            refused,
        )
        for name, line, refused in CODINGS
    ),
    Attack("two lengths", "different Content-Lengths", (SHORT, FULL), b"12345%HIDDEN%", True),
    Attack("two lengths, other order", "different Content-Lengths", (FULL, SHORT), b"12345%HIDDEN%", True),
    Attack(
        "length list",
        "different Content-Lengths in one line",
        (b"content-length: 5, %LENGTH%",),
        b"12345%HIDDEN%",
        True,
    ),
    Attack("equal lengths", "equal Content-Lengths: one of them, or refused", (FULL, FULL), b"%CHAT%"),
    Attack("length with a sign", "Content-Length: +N", (b"content-length: +%LENGTH%",), b"12345%HIDDEN%", True),
    Attack("length in hex", "Content-Length: 0xN", (b"content-length: 0x5",), b"12345%HIDDEN%", True),
    Attack("length with underscores", "Content-Length: 1_0", (b"content-length: 1_0",), b"1234567890%HIDDEN%", True),
    Attack("length with space", "Content-Length: 5 5", (b"content-length: 5 5",), b"12345%HIDDEN%", True),
    Attack(
        "length in other digits",
        "Content-Length in digits of Latin-1",
        (b"content-length: \xb2",),
        b"12%HIDDEN%",
        True,
    ),
    Attack(
        "length overflows",
        "Content-Length 2^64 + 5",
        (b"content-length: 18446744073709551621",),
        b"12345%HIDDEN%",
        True,
    ),
    Attack("length empty", "Content-Length without a value", (b"content-length:",), b"%HIDDEN%", True),
    Attack("length, space before colon", "Content-Length : N", (b"content-length : %LENGTH%",), b"%HIDDEN%", True),
    Attack("length folded", "Content-Length on the next line", (b"content-length:\r\n %LENGTH%",), b"%CHAT%"),
    Attack("chunk size negative", "a chunk size below 0", (TE + b"chunked",), b"-1\r\n%HIDDEN%", True),
    Attack("chunk size 0x", "a chunk size with 0x", (TE + b"chunked",), b"0x5\r\n12345\r\n0\r\n\r\n%HIDDEN%", True),
    Attack(
        "chunk size plus", "a chunk size with a sign", (TE + b"chunked",), b"+5\r\n12345\r\n0\r\n\r\n%HIDDEN%", True
    ),
    Attack(
        "chunk size underscore",
        "a chunk size with an underscore",
        (TE + b"chunked",),
        b"0_5\r\n12345\r\n0\r\n\r\n%HIDDEN%",
        True,
    ),
    Attack(
        "chunk size overflows",
        "a chunk size of 2^64 + 5",
        (TE + b"chunked",),
        b"10000000000000005\r\n12345\r\n0\r\n\r\n%HIDDEN%",
        True,
    ),
    Attack("chunk size empty", "no chunk size", (TE + b"chunked",), b"\r\n12345\r\n0\r\n\r\n%HIDDEN%", True),
    Attack(
        "chunk size word", "a chunk size that is none", (TE + b"chunked",), b"five\r\n12345\r\n0\r\n\r\n%HIDDEN%", True
    ),
    Attack("chunk too long", "bytes behind a chunk", (TE + b"chunked",), b"5\r\n12345678\r\n0\r\n\r\n%HIDDEN%", True),
    Attack("chunk without its end", "no CRLF behind a chunk", (TE + b"chunked",), b"5\r\n123450\r\n\r\n%HIDDEN%", True),
    Attack(
        "chunk size ends with lf", "a chunk size that ends with LF", (TE + b"chunked",), b"5\n12345\r\n0\r\n\r\n", False
    ),
    Attack(
        "chunk size ends with cr",
        "a chunk size that ends with CR",
        (TE + b"chunked",),
        b"5\r12345\r\n0\r\n\r\n%HIDDEN%",
        True,
    ),
    Attack(
        "chunk extension with lf",
        "LF in a chunk's extension",
        (TE + b"chunked",),
        b"5;a\nb\r\n12345\r\n0\r\n\r\n",
        False,
    ),
    Attack(
        "crlf in the target",
        "encoded line ends in the target stay encoded",
        (FULL,),
        b"%CHAT%",
        False,
        b"&x=%0d%0aGET%20/smuggled%20HTTP/1.1%0d%0a%0d%0a",
    ),
    Attack(
        "request in the target",
        "a second request line in the target",
        (FULL,),
        b"%CHAT%",
        False,
        b"&x= HTTP/1.1\r\nx: GET /smuggled",
    ),
    Attack("get with a body", "a body of GET is one", (FULL,), b"%HIDDEN%"),
    Attack("te in http/1.0", "chunks in HTTP/1.0", (TE + b"chunked", FULL), AFTER_CHUNKS),
]


@pytest.mark.parametrize("row", ATTACKS, ids=lambda row: row.name)
@case
async def test_request(world: World, row: Attack) -> None:
    one = world.case()
    hidden = SMUGGLED.replace(b"host:", b"x-case: %b\r\nhost:" % one.token)
    body = row.body.replace(b"%HIDDEN%", hidden).replace(b"%CHUNK%", chunk(hidden)[:-2] + b"\r\n")
    body = body.replace(b"%CHAT%", one.body())
    lines = tuple(line.replace(b"%LENGTH%", b"%d" % len(body)) for line in row.lines)
    method = b"GET" if row.name == "get with a body" else b"POST"
    head = one.head(JSON, *lines, method=method, version=b"1.0" if "1.0" in row.name else b"1.1")
    head = head.replace(b" HTTP/1", row.target + b" HTTP/1", 1)
    async with await world.connect() as client:
        await client.send(head + b"\r\n" + body)
        answer = await client.answer()
        await asyncio.sleep(QUIET_S)
        first = len(one.seen)
        assert all(not request.target.startswith(b"/smuggled") for request in one.seen), (
            f"{answer}, and the hidden request went through"
        )
        for request in one.seen:
            assert (problem := ambiguity(request)) == "", problem
        assert first <= 1, f"{answer}, and the upstream saw {first} requests"
        if row.refused:
            assert answer.status == 0 or 400 <= answer.status < 500 or answer.status == 501, f"{answer}"
            assert await client.is_closed(), f"{answer}, and the connection stays open"
        else:
            assert answer.status < 500 or answer.status == 501, f"{answer}"
    await normal_service(world, 2)


RAW_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
CHAT_BODY = completion("right")
POISON = response(completion("<poison>"))
ANSWERS = [
    (
        "length and coding",
        RAW_HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(CHAT_BODY) + END,
    ),
    ("two lengths", RAW_HEAD + b"content-length: 5\r\ncontent-length: %d\r\n\r\n" % len(CHAT_BODY) + CHAT_BODY),
    ("an answer too many", RAW_HEAD + b"content-length: %d\r\n\r\n" % len(CHAT_BODY) + CHAT_BODY + POISON),
    ("bytes too many", RAW_HEAD + b"content-length: %d\r\n\r\n" % len(CHAT_BODY) + CHAT_BODY + b"\r\n\r\nmore"),
    ("a body of 204", b"HTTP/1.1 204 No Content\r\ncontent-length: %d\r\n\r\n" % len(POISON) + POISON),
    ("a body of 304", b"HTTP/1.1 304 Not Modified\r\n\r\n" + POISON),
    ("line end in a value", RAW_HEAD + b"x-a: b\rx-b: c\r\ncontent-length: %d\r\n\r\n" % len(CHAT_BODY) + CHAT_BODY),
    ("chunk size with a sign", RAW_HEAD + b"transfer-encoding: chunked\r\n\r\n+5\r\n12345\r\n0\r\n\r\n" + POISON),
    ("length with a sign", RAW_HEAD + b"content-length: +5\r\n\r\n12345" + POISON),
    ("odd coding", RAW_HEAD + b"transfer-encoding: chunked, identity\r\n\r\n" + chunk(CHAT_BODY) + END),
]


@pytest.mark.parametrize("name", [name for name, _ in ANSWERS])
@case
async def test_answer(world: World, name: str) -> None:
    """An answer that can be read in two ways, or is followed by another: later clients get their own answers."""
    raw = dict(ANSWERS)[name]

    async def script(talk: Talk) -> None:
        await talk.read_body()
        await talk.send(raw)
        raise Gone  # closes after what was sent

    async def keeps(talk: Talk) -> None:
        await talk.read_body()
        await talk.send(raw)

    for upstream in (script,) if name == "odd coding" else (script, keeps):  # that one ends with the connection
        one = world.case(upstream)
        async with await world.connect() as client:
            await client.send(one.request())
            answer = await client.answer()  # asserts itself that the answer's framing is one
            assert b"<poison>" not in answer.body, "another answer was taken for this one's"
            await client.send(one.request())
            answer = await client.answer()
            assert b"<poison>" not in answer.body, "another answer was taken for the next one's"
        await normal_service(world)


@case
async def test_pipelined_after_a_refusal(world: World) -> None:
    """What follows a refused request on the same connection is not served."""
    one = world.case(echo)
    bad = one.head(JSON, b"content-length: 5", b"content-length: 6") + b"\r\n12345"
    async with await world.connect() as client:
        await client.send(bad + one.request())
        answer = await client.answer()
        assert answer.status == 0 or 400 <= answer.status < 500, f"{answer}"
        assert await client.is_closed(), "the connection stays open"
    assert one.seen == [], f"the upstream saw {len(one.seen)} requests"
