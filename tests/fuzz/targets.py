"""What must hold for any bytes, for Hypothesis (quick, in CI) and for atheris (long, `make fuzz`).

Each target takes a stream and how it is cut, and raises AssertionError where the stream fed whole, byte by byte or cut
there makes a difference; any other exception is a defect as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.wire.cuts import every_byte, pieces_at
from wire.accounting import Accounted, StreamAccount
from wire.http1 import BadResponse, Headers, Response, ResponseParser
from wire.shapes import Family
from wire.sse import SseSplitter

SEEDS_HTTP = [
    b"HTTP/1.1 200 OK\r\nServer: a\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n3;x=y\r\n, y\r\n0\r\nx-t: 1\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nuntil the end",
    b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\nHTTP/1.1 500 X\r\ncontent-length: 1\r\n\r\n!",
]

SEEDS_SSE = [
    b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"content":"b\\n"}}]}\n\n'
    b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    b'data: {"id":"c","model":"m","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
    b"data: [DONE]\n\n",
    b'event: response.output_text.delta\r\ndata: {"type":"response.output_text.delta","delta":"a"}\r\n\r\n'
    b'data: {"type":"response.completed","response":{"status":"completed","usage":{"output_tokens":1}}}\r\n\r\n',
    b': ping\n\nevent: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":3}}}\n\n'
    b'data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"a"}}\n\n'
    b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":2}}\n\n'
    b'data: {"type":"message_stop"}\n\n',
]

TOKENS = [
    b"\r\n", b"\r", b"\n", b"\r\n\r\n", b"\n\n", b" ", b"\t", b"\0", b":", b";", b",", b'"', b"\\", b"0", b"1", b"-",
    b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 101 X\r\n", b"HTTP/1.0 ", b"HTTP/2.0 ",
    b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"content-length: 0\r\n", b"Connection: close\r\n",
    b"connection: keep-alive\r\n", b"Upgrade: h2c\r\n", b"gzip", b"chunked", b"0\r\n\r\n", b"x-t: 1\r\n", b"f" * 16,
    b"data: ", b"data:", b"event: x\n", b": ping\n\n", b"[DONE]", b'"usage":{}', b'"choices":[]', b'"content":"a"',
    b'"finish_reason":"stop"', b"null", b"{}", b"[", b"]", b"\xe2\x80\xa8", b"\xff", b"1e999", b"9" * 30,
]  # fmt: skip
"""What the formats are made of, for mutations to put in."""


@dataclass(frozen=True)
class Read:
    """What a parser makes of a stream."""

    status: int
    headers: Headers
    interim: list[tuple[int, Headers]]
    body: bytes
    trailers: Headers
    is_complete: bool
    is_reusable: bool
    is_refused: bool
    is_complete_at_eof: bool


def _read(pieces: list[bytes], *, is_head: bool) -> Read:
    parser = ResponseParser()
    response = Response()
    parser.begin(response, is_head=is_head)
    refusal = ""
    try:
        for piece in pieces:
            was_complete = response.is_complete
            parser.feed(piece)
            assert response.is_complete >= was_complete
    except BadResponse as error:
        refusal = str(error) or "\n"
    assert "\n" not in refusal
    is_refused = refusal != ""
    assert response.has_head or not (response.parts or response.is_complete or response.trailers or response.status)
    is_complete = response.is_complete
    is_reusable = is_complete and not is_refused and parser.is_reusable
    assert not (is_refused and is_complete)
    if not is_refused:
        parser.feed_eof()
    assert not is_complete or response.is_complete
    headers = response.headers if response.has_head else []  # else httptools has a line more or less, by the cut
    trailers = response.trailers if is_complete else []
    return Read(response.status, headers, response.interim, b"".join(response.parts), trailers,
                is_complete, is_reusable, is_refused, response.is_complete)  # fmt: skip


def check_response(stream: bytes, at: list[int], number: int) -> None:
    """Any cut of any bytes is the same response, or refused; a connection that may be reused reads the next one."""
    is_head = number % 4 == 0
    whole = _read([stream], is_head=is_head)
    assert _read(every_byte(stream), is_head=is_head) == whole
    assert _read(pieces_at(stream, at), is_head=is_head) == whole
    if whole.is_reusable:
        parser = ResponseParser(is_head=is_head)
        for piece in pieces_at(stream, at):
            parser.feed(piece)
        following = Response()
        parser.begin(following, is_head=False)
        parser.feed(SEEDS_HTTP[0])
        assert following.parts == [b"hello"]
        assert parser.is_reusable


def _split(pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    splitter = SseSplitter()
    return [block for piece in pieces for block in splitter.feed(piece)], splitter.eof()


def check_events(stream: bytes, at: list[int], number: int) -> None:
    """Any cut of any bytes is the same events, and no byte is lost."""
    blocks, rest = _split([stream])
    assert b"".join(blocks) + rest == stream
    assert _split(every_byte(stream)) == _split(pieces_at(stream, at)) == (blocks, rest)


def _account(pieces: list[bytes], family: Family, *, strip: bool, keep: bool) -> tuple[bytes, Accounted, bool]:
    account = StreamAccount(family, strip_usage=strip, keep_answer=keep)
    passed = [account.feed(7, piece) for piece in pieces]
    passed.append(account.eof(7))
    return b"".join(passed), account.result(), account.terminal


def check_account(stream: bytes, at: list[int], number: int) -> None:
    """Any cut of any bytes counts the same and passes the same on: all of them, but for a usage event."""
    families = [Family.CHAT, Family.COMPLETIONS, Family.RESPONSES, Family.MESSAGES]
    family = families[number % 4]
    for strip in (False, True):
        keep = number % 8 < 4
        whole = _account([stream], family, strip=strip, keep=keep)
        assert strip or whole[0] == stream
        assert _account(every_byte(stream), family, strip=strip, keep=keep) == whole
        assert _account(pieces_at(stream, at), family, strip=strip, keep=keep) == whole


Target = Callable[[bytes, list[int], int], None]

TARGETS: dict[str, tuple[Target, list[bytes]]] = {
    "response": (check_response, SEEDS_HTTP),
    "events": (check_events, SEEDS_SSE),
    "account": (check_account, SEEDS_SSE),
}
"""By name: what is checked, and streams to begin with."""
