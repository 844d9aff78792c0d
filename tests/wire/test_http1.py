from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.wire.cuts import CUTS, every_byte, pieces_at
from wire.http1 import (
    MAX_HEAD_BYTES,
    MAX_INTERIM,
    BadResponse,
    Headers,
    HeadMemory,
    Response,
    ResponseParser,
    encode_head,
    encode_lines,
)

OK = b"HTTP/1.1 200 OK\r\n"


@dataclass(frozen=True)
class Read:
    """What a parser makes of a stream of bytes, before the connection's end."""

    status: int = 200
    body: bytes = b""
    is_complete: bool = True
    is_reusable: bool = True
    headers: Headers | None = None


def read(pieces: list[bytes], *, is_head: bool = False, is_eof: bool = False, headers: bool = False) -> Read:
    """Feed the pieces to a parser. Raises BadResponse."""
    parser = ResponseParser(is_head=is_head)
    for piece in pieces:
        parser.feed(piece)
    if is_eof:
        parser.feed_eof()
    assert parser.response.has_head or not parser.is_complete
    shown = parser.response.headers if headers else None
    is_reusable = parser.is_complete and parser.is_reusable
    return Read(parser.status, b"".join(parser.response.parts), parser.is_complete, is_reusable, shown)


CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
RESPONSES: list[tuple[bytes, Read]] = [
    (OK + b"content-length: 2\r\n\r\nhi", Read(body=b"hi")),
    (OK + b"Content-Length: 0\r\n\r\n", Read()),
    (OK + b"content-length: 3\r\n\r\nhi", Read(body=b"hi", is_complete=False, is_reusable=False)),
    (b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nhi", Read(404, b"hi")),
    (b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nhi", Read(body=b"hi")),  # no reason, nor its space
    (b"HTTP/1.1 599 \xc3\xa9\r\ncontent-length: 0\r\n\r\n", Read(599)),
    (OK + CHUNKED + b"2\r\nhi\r\n3;x=y\r\n, y\r\n0\r\n\r\n", Read(body=b"hi, y")),
    (OK + CHUNKED + b"A\r\n0123456789\r\n0\r\n\r\n", Read(body=b"0123456789")),
    (OK + CHUNKED + b"2\r\nhi\r\n0\r\nx-checksum: 7\r\n\r\n", Read(body=b"hi")),
    (OK + CHUNKED + b"2\r\nhi\r\n0\r\n", Read(body=b"hi", is_complete=False, is_reusable=False)),
    (OK + b"Transfer-Encoding: \t CHUNKED \r\n\r\n2\r\nhi\r\n0\r\n\r\n", Read(body=b"hi")),
    # Interim answers are none.
    (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nlink: x\r\n\r\n" + OK + CHUNKED + b"2\r\nhi\r\n0\r\n\r\n",
        Read(body=b"hi"),
    ),
    (b"HTTP/1.1 100 Continue\r\n\r\n", Read(0, is_complete=False, is_reusable=False)),
    # No body, whatever the headers say.
    (b"HTTP/1.1 204 No Content\r\n\r\n", Read(204)),
    (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", Read(304)),
    (b"HTTP/1.1 304 Not Modified\r\n" + CHUNKED, Read(304)),
    # Which connections can be kept.
    (OK + b"connection: close\r\ncontent-length: 2\r\n\r\nhi", Read(body=b"hi", is_reusable=False)),
    (OK + b"Connection: Keep-Alive\r\ncontent-length: 2\r\n\r\nhi", Read(body=b"hi")),
    (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", Read(body=b"hi", is_reusable=False)),
    (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nhi", Read(body=b"hi")),
    # An offer to upgrade, as Apache makes it, is no upgrade.
    (OK + b"upgrade: h2,h2c\r\nconnection: Upgrade, Keep-Alive\r\ncontent-length: 2\r\n\r\nhi", Read(body=b"hi")),
    (OK + b"upgrade: h2c\r\nconnection: Upgrade\r\n" + CHUNKED + b"2\r\nhi\r\n0\r\n\r\n", Read(body=b"hi")),
    # RFC 9112, section 6.1: HTTP/1.0 has no chunks; read, but no more from there.
    (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\n" + CHUNKED + b"2\r\nhi\r\n0\r\n\r\n",
     Read(body=b"hi", is_reusable=False)),
    # An answer that has no body, and announces one: what comes next may be it.
    (b"HTTP/1.1 204 X\r\ncontent-length: 5\r\n\r\n", Read(204, is_reusable=False)),
    (b"HTTP/1.1 204 X\r\ncontent-length: 0\r\n\r\n", Read(204)),
    (b"HTTP/1.1 204 X\r\n" + CHUNKED, Read(204, is_reusable=False)),
    # What llhttp takes for framing in a trailer, too.
    (OK + CHUNKED + b"0\r\nconnection: close\r\n\r\n", Read(is_reusable=False)),
    (OK + CHUNKED + b"0\r\ntransfer-encoding: gzip\r\n\r\n", Read(is_reusable=False)),
    # The head of an interim answer says nothing of the next one.
    (b"HTTP/1.1 102 X\r\n" + CHUNKED + OK + b"content-length: 2\r\n\r\nhi", Read(body=b"hi")),
    (b"HTTP/1.1 102 X\r\n" + CHUNKED + OK + CHUNKED + b"2\r\nhi\r\n0\r\n\r\n", Read(body=b"hi")),
    # More than was asked for.
    (OK + b"content-length: 2\r\n\r\nhi.", Read(body=b"hi", is_reusable=False)),
    (OK + CHUNKED + b"2\r\nhi\r\n0\r\n\r\n\0", Read(body=b"hi", is_reusable=False)),
    (OK + b"content-length: 2\r\n\r\nhiHTTP/1.1 500 X\r\n" + CHUNKED + b"1\r\n!", Read(body=b"hi", is_reusable=False)),
    (OK + b"content-length: 2\r\n\r\nhiH", Read(body=b"hi", is_reusable=False)),
    (OK + b"connection: close\r\ncontent-length: 2\r\n\r\nhi" + OK, Read(body=b"hi", is_reusable=False)),
    (b"HTTP/1.1 204 X\r\n\r\nhi", Read(204, is_reusable=False)),
]  # fmt: skip


@pytest.mark.parametrize(("stream", "expected"), RESPONSES)
def test_a_response(stream: bytes, expected: Read) -> None:
    assert read([stream]) == expected
    assert read(every_byte(stream)) == expected
    after = read([stream], is_eof=True)
    assert after == Read(expected.status, expected.body, expected.is_complete, is_reusable=False)


UNTIL_CLOSE = [
    OK + b"\r\nhi",
    OK + b"connection: close\r\n\r\nhi",
    b"HTTP/1.0 200 OK\r\n\r\nhi",
    OK + b"Connection: keep-alive\r\n\r\nhi",
]


@pytest.mark.parametrize("stream", UNTIL_CLOSE)
def test_a_body_without_a_length_ends_with_the_connection(stream: bytes) -> None:
    for pieces in ([stream], every_byte(stream)):
        assert read(pieces) == Read(body=b"hi", is_complete=False, is_reusable=False)
        assert read(pieces, is_eof=True) == Read(body=b"hi", is_reusable=False)


HEADS = [
    (OK + b"content-length: 5\r\n\r\n", Read()),
    (OK + CHUNKED, Read()),
    (OK + b"connection: close\r\ncontent-length: 5\r\n\r\n", Read(is_reusable=False)),
    (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"content-length: 5\r\n\r\n", Read()),
    (OK + b"content-length: 5\r\n\r\nhello", Read(is_reusable=False)),  # a body that must not be there
    (OK + CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", Read(is_reusable=False)),
]


@pytest.mark.parametrize(("stream", "expected"), HEADS)
def test_an_answer_to_head_has_no_body(stream: bytes, expected: Read) -> None:
    assert read([stream], is_head=True) == expected
    assert read(every_byte(stream), is_head=True) == expected


def test_headers_interim_answers_and_trailers_stay_as_they_came() -> None:
    stream = (
        b"HTTP/1.1 100 Continue\r\nX-Dropped: 1\r\n\r\n"
        + b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nlink: b \r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
        + OK
        + b'Set-Cookie: a\r\nSET-cookie:  b \t \r\nX-Odd: \xff\xe9, "\r\nEmpty:\r\nTransfer-Encoding: chunked\r\n\r\n'
        + b"2;x=y\r\nhi\r\n0\r\nX-Trailer: one \r\nHost: no\r\nx-trailer: two\r\n\r\n"
    )
    headers = [
        (b"Set-Cookie", b"a"),
        (b"SET-cookie", b"b"),
        (b"X-Odd", b'\xff\xe9, "'),
        (b"Empty", b""),
        (b"Transfer-Encoding", b"chunked"),
    ]
    for pieces in ([stream], every_byte(stream)):
        parser = ResponseParser()
        for piece in pieces:
            parser.feed(piece)
        response = parser.response
        assert response.headers == headers
        assert response.interim == [(103, [(b"Link", b"</a>; rel=preload"), (b"link", b"b")]), (102, [])]
        assert response.trailers == [(b"X-Trailer", b"one"), (b"x-trailer", b"two")]
        assert response.is_complete
        assert parser.is_reusable


def test_one_parser_reads_the_answers_of_a_connection_one_after_the_other() -> None:
    """Each as if it were the first: nothing of one is left in the next."""
    parser = ResponseParser()
    answers = [stream for stream, expected in RESPONSES if expected.is_reusable] * 2
    for number, stream in enumerate(answers):
        is_head = number % 3 == 0
        stream = stream[: stream.index(b"\r\n\r\n", stream.rindex(b"HTTP/1")) + 4] if is_head else stream
        response = Response()
        parser.begin(response, is_head=is_head)
        for piece in every_byte(stream) if number % 2 else [stream]:
            parser.feed(piece)
        alone = read([stream], is_head=is_head, headers=True)
        assert alone == Read(response.status, b"".join(response.parts), True, parser.is_reusable, response.headers)
        assert parser.is_reusable


REFUSED = [
    b"<html>",
    b"SSH-2.0-OpenSSH\r\n",
    b"\x16\x03\x01\x02\x00",  # TLS
    b"HTTP/2 200 OK\r\n\r\n",
    b"HTTP/3.1 200 OK\r\n\r\n",
    b"HTTP/1.1 20x OK\r\n\r\n",
    b"HTTP/0.9 200 OK\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\nproxy-connection: keep-alive\r\n\r\n",
    b"HTTP/1.1 099 X\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1  200 OK\r\ncontent-length: 0\r\n\r\n",
    # RFC 9112, section 7: nobody asked for a coding, and here nobody could undo one.
    OK + b"transfer-encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    OK + b"transfer-encoding: chunked, gzip\r\n\r\nhi",
    OK + b"transfer-encoding: gzip\r\n\r\nhi",
    OK + b"transfer-encoding: identity\r\n\r\nhi",
    OK + b"transfer-encoding: xchunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    OK + b"transfer-encoding: chunked\t\r\n\r\n2\r\nhi\r\n0\r\n\r\n",  # which llhttp reads until close
    OK + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    OK + b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    OK + CHUNKED + b"2\r\nhi\r\n0\r\ncontent-length: 2\r\n\r\n",
    OK + b"content-length: +2\r\n\r\nhi",
    OK + b"content-length: \r\n\r\nhi",
    OK + b"content-length: 2 2\r\n\r\nhi",
    b"HTTP/1.1 304 X\r\ncontent-length: 5\r\n" + CHUNKED,
    OK + b"content-length: 2\r\ncontent-length: 2\r\n\r\nhi",
    OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\nhi",
    OK + b"content-length: 2, 2\r\n\r\nhi",
    OK + b"content-length: -2\r\n\r\nhi",
    OK + b"content-length: 0x2\r\n\r\nhi",
    OK + b"content-length: 99999999999999999999999\r\n\r\nhi",
    OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    OK + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    OK + CHUNKED + b"zz\r\nhi",
    OK + CHUNKED + b"-2\r\nhi",
    OK + CHUNKED + b"fffffffffffffffff\r\nhi",
    OK + CHUNKED + b"2\r\nhi.\r\n0\r\n\r\n",
    OK + b"x : y\r\n\r\n",
    OK + b"x: y\r\n folded\r\n\r\n",
    OK + b"x: \0\r\n\r\n",
    b"HTTP/1.1 200 OK\ncontent-length: 0\n\n",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
]


@pytest.mark.parametrize("stream", REFUSED)
def test_what_is_no_http_is_refused(stream: bytes) -> None:
    for pieces in ([stream], every_byte(stream)):
        with pytest.raises(BadResponse, match=r"^.+$"):
            read(pieces)


@pytest.mark.parametrize("interim", [b"", b"HTTP/1.1 103 Early Hints\r\nx: " + b"y" * 999 + b"\r\n\r\n"])
def test_a_head_over_the_limit_is_refused_wherever_it_is_cut(interim: bytes) -> None:
    start, end = interim + OK + b"content-length: 2\r\nx: ", b"\r\n\r\n"
    fits = start + b"x" * (MAX_HEAD_BYTES - len(start) - len(end)) + end + b"hi"
    too_long = fits.replace(b"x: x", b"x: xx")
    for cuts in ([], [7], [MAX_HEAD_BYTES - 1], [MAX_HEAD_BYTES], list(range(0, len(fits), 65536))):
        assert read(pieces_at(fits, cuts)) == Read(body=b"hi")
        with pytest.raises(BadResponse, match="response head over 262144 bytes"):
            read(pieces_at(too_long, cuts))
    # A body may be as long as it likes.
    assert read([OK + b"content-length: 999999\r\n\r\n" + b"x" * 999999]).is_complete
    # Nor do endless interim answers pass.
    with pytest.raises(BadResponse, match="response head over"):
        read([b"HTTP/1.1 100 Continue\r\n\r\n"] * 20_000)


@pytest.mark.parametrize("trailer", [b"x: " + b"y" * 4093, b"x: " + b"y" * 600_000])
def test_trailers_over_the_limit_are_refused_wherever_they_are_cut(trailer: bytes) -> None:
    start = OK + CHUNKED + b"2\r\nhi\r\n0\r\n"
    stream = start + (trailer + b"\r\n") * 80 + b"\r\n"
    for cuts in ([], [len(start)], list(range(0, len(stream), 1000))):
        with pytest.raises(BadResponse, match="response trailers over 262144 bytes"):
            read(pieces_at(stream, cuts))


def test_framing_that_comes_apart_from_the_body_is_not_counted_together() -> None:
    """A server that writes a chunk's size and its bytes each for itself."""
    parser = ResponseParser()
    parser.feed(OK + CHUNKED)
    size = b"1;" + b"x" * 998
    for _ in range(1000):
        parser.feed(size)
        parser.feed(b"\r\na\r\n")
    parser.feed(b"0\r\n\r\n")
    assert parser.is_complete
    assert b"".join(parser.response.parts) == b"a" * 1000


def test_interim_answers_that_nobody_looks_at_are_refused() -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\n\r\n"
    final = OK + b"content-length: 0\r\n\r\n"
    assert read([b"HTTP/1.1 100 Continue\r\n\r\n" * 99 + interim * MAX_INTERIM + final]) == Read()
    with pytest.raises(BadResponse, match="more than 16 interim responses"):
        read([interim * (MAX_INTERIM + 1)])
    parser = ResponseParser()
    for _ in range(3 * MAX_INTERIM):
        parser.feed(interim)
        assert parser.response.interim == [(103, [])]
        parser.response.interim.clear()
    parser.feed(final)
    assert parser.is_complete


BODY = st.lists(st.binary(min_size=1, max_size=20), max_size=4)


@st.composite
def responses(draw: st.DrawFn) -> tuple[bytes, int, bytes]:
    """A response's bytes, its status and its body."""
    parts = draw(BODY)
    status = draw(st.sampled_from([200, 201, 400, 429, 503]))
    interim = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n"]))
    head = interim + b"HTTP/1.1 %d X\r\nServer: a\r\n" % status
    if draw(st.booleans()):
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + body, status, b"".join(parts)
    body = b"".join(parts)
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body, status, body


@given(response=responses(), at=CUTS, extra=st.sampled_from([b"", b".", b"HTTP/1.1 500 X\r\n\r\n"]))
@example(response=(OK + b"content-length: 2\r\n\r\nhi", 200, b"hi"), at=list(range(60)), extra=b"")
def test_any_cut_reads_the_same_response(response: tuple[bytes, int, bytes], at: list[int], extra: bytes) -> None:
    stream, status, body = response
    assert read(pieces_at(stream + extra, at)) == Read(status, body, is_reusable=not extra)
    for end in {*at, len(stream) - 1}:  # and no beginning of it is taken for the whole
        assert not read([stream[: end % len(stream)]], is_eof=True).is_complete


@given(
    pieces=st.lists(st.binary(max_size=20) | st.sampled_from([OK, CHUNKED, b"\r\n"]), max_size=6), is_head=st.booleans()
)
def test_rubbish_is_read_or_refused(pieces: list[bytes], is_head: bool) -> None:
    with contextlib.suppress(BadResponse):
        read(pieces, is_head=is_head, is_eof=True)


def test_a_request_head() -> None:
    headers = [(b"host", b"h:1"), (b"X-A", b"\xff"), (b"x-a", b"")]
    assert (
        encode_head(b"POST", b"/v1?a=b", headers) == b"POST /v1?a=b HTTP/1.1\r\nhost: h:1\r\nX-A: \xff\r\nx-a: \r\n\r\n"
    )
    assert encode_head(b"GET", b"/", []) == b"GET / HTTP/1.1\r\n\r\n"
    assert encode_lines(headers) == b"host: h:1\r\nX-A: \xff\r\nx-a: \r\n"
    assert encode_lines([]) == b""


REPEATED = [
    b"HTTP/1.1 200 OK\r\ndate: a\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\ndate: a\r\ncontent-length: 12\r\n\r\nhello, again",
    b"HTTP/1.1 200 OK\r\ndate: b\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\ndate: a\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ndate: a\r\nContent-Length:5\r\n\r\nhello",
    b"HTTP/1.1 404 No\r\ndate: a\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 100 C\r\n\r\nHTTP/1.1 200 OK\r\ndate: a\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ndate: a\r\ncontent-length: 5\r\n\r\nhello, too much",
    b"HTTP/1.1 200 OK\r\ndate: a\r\ncontent-length: 5\r\n\r\nhel",
    b"HTTP/1.1 200 OK\r\ndate: a\r\ncontent-length: +5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\ndate: a\r\ncontent-length: 5 \r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello",
]


@given(st.lists(st.sampled_from(REPEATED), max_size=8))
def test_a_head_that_is_known_is_read_as_if_it_were_not(answers: list[bytes]) -> None:
    memory = HeadMemory()

    def read(data: bytes, memory: HeadMemory) -> tuple[object, ...]:
        parser = ResponseParser(memory=memory)
        response = parser.response
        try:
            parser.feed(data)
        except BadResponse as error:
            return (str(error),)
        return (response.status, response.headers, response.has_head, b"".join(response.parts), response.is_complete,
                parser.is_reusable, response.trailers, response.interim)  # fmt: skip

    for data in answers:
        assert read(data, memory) == read(data, HeadMemory())


def test_a_head_is_known_from_its_second_time_on() -> None:
    parser = ResponseParser(memory=HeadMemory())
    known = []
    for data in (REPEATED[0], REPEATED[1], REPEATED[2], REPEATED[0]):
        response = Response()
        parser.begin(response, is_head=False)
        parser.feed(data)
        assert response.is_complete
        known.append(response.known)
    assert known[0] is None
    assert known[1] is not None
    assert known[2:] == [None, None]
