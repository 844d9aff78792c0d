"""A client's connection, byte by byte, without a kernel before it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy import server
from proxy.errors import GatewayError
from proxy.request_head import RequestHead
from proxy.server import MAX_WAITING, MAX_WAITING_BYTES, ClientConnection, Incoming
from proxy.settings import LimitSettings
from tests.proxy.harness import CHAT, Bench, Script, Talk, Upstream, Wire, chat_answer, in_loop, plain, running, until
from traces.record import Outcome
from wire.http1 import Headers

GET = b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n"


class Peer:
    """The other end of a connection, as the tests see it."""

    def __init__(self) -> None:
        self.raw = b""
        self.has_ended = asyncio.Event()
        """The gateway has closed its side."""
        self.wire = Wire(self)
        self.connection: ClientConnection

    def written(self, data: bytes) -> None:
        self.raw += data

    def send(self, data: bytes) -> None:
        self.connection.data_received(data)

    async def sent(self, pattern: bytes, count: int = 1) -> None:
        """Wait until so many matches are there."""
        await until(lambda: len(re.findall(pattern, self.raw)) >= count, f"{pattern!r} in {self.raw!r}")

    @property
    def statuses(self) -> list[int]:
        return [int(status) for status in re.findall(rb"HTTP/1.1 (\d{3}) ", self.raw)]

    def leave(self) -> None:
        if not self.connection.is_gone:
            self.connection.connection_lost(None)
        self.wire.drop()


@contextlib.asynccontextmanager
async def connected(bench: Bench) -> AsyncIterator[Peer]:
    peer = Peer()
    peer.connection = ClientConnection(bench.gateway, asyncio.get_running_loop(), set())
    peer.connection.connection_made(peer.wire)
    try:
        yield peer
    finally:
        peer.leave()


@contextlib.asynccontextmanager
async def served(
    data_dir: Path, *scripts: Script, reads_body: bool = True
) -> AsyncIterator[tuple[Peer, Upstream, Bench]]:
    async with (
        Upstream(*scripts, reads_body=reads_body) as upstream,
        running(data_dir, upstream.url) as bench,
        connected(bench) as peer,
    ):
        yield peer, upstream, bench


# What is no request ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status", "rule"),
    [
        (b"GET /x HTTP/1.1\r\n\r\n", 400, "expected one Host header, got 0"),  # RFC 9112, section 3.2
        (b"GET /x HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n", 400, "expected one Host header, got 2"),
        (b"GET /x HTTP/1.0\r\nHost: a\r\nhost: b\r\n\r\n", 400, "expected one Host header, got 2"),
        (b"CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n", 400, "CONNECT is not for this server"),
        (b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400, None),
        (b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n", 400, None),
        (b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, None),
        (b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400, None),
        (b"GET /x HTTP/1.1\r\nHost: h\r\nX : 1\r\n\r\n", 400, None),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400, None),  # TLS on a plain port
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, None),
        (b"GET /x\r\nHost: h\r\n\r\n", 400, None),
        (b"GET /x HTTP/2.0\r\nHost: h\r\n\r\n", 505, "expected HTTP/1.1 or HTTP/1.0, got 2.0"),
    ],
)
@in_loop
async def test_what_is_no_request_is_refused_and_ends_the_connection(
    tmp_path: Path, data: bytes, status: int, rule: str | None
) -> None:
    async with served(tmp_path, plain()) as (peer, upstream, bench):
        peer.send(data)
        peer.send(GET)  # nothing behind it is read
        await asyncio.wait_for(peer.has_ended.wait(), 5.0)
        head, _, body = peer.raw.partition(b"\r\n\r\n")
        error = json.loads(body)["error"]
        assert (peer.statuses, error["type"]) == ([status], "invalid_http" if status == 400 else error["code"])
        assert b"connection: close" in head
        assert rule is None or error["message"] == rule
        assert (upstream.requests, bench.records()) == ([], [])


@in_loop
async def test_head_over_the_limit_is_refused_while_it_is_still_coming(tmp_path: Path) -> None:
    limits = LimitSettings.model_validate({"headers": 1024})
    async with (
        Upstream(plain()) as upstream,
        running(tmp_path, upstream.url, limits=limits) as bench,
        connected(bench) as peer,
    ):
        peer.send(b"GET /x HTTP/1.1\r\nHost: h\r\nX-Long: ")
        for _ in range(21):
            assert peer.raw == b""
            peer.send(b"a" * 100)
        assert peer.statuses == [431]
        assert b"request line and headers over 1024 bytes" in peer.raw


@in_loop
async def test_body_that_is_no_body_is_refused_and_recorded(tmp_path: Path) -> None:
    async with served(tmp_path, plain()) as (peer, upstream, bench):
        peer.send(b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n")
        await asyncio.wait_for(peer.has_ended.wait(), 5.0)
        record = bench.record()
        assert peer.statuses == [400]
    assert (record.outcome, record.status, record.error_type) == (Outcome.INVALID_REQUEST, 400, "invalid_http")
    assert upstream.requests == []


@in_loop
async def test_rubbish_behind_a_request_waits_for_its_answer(tmp_path: Path) -> None:
    async with served(tmp_path, plain(b"first")) as (peer, _, bench):
        peer.send(GET + b"rubbish\r\n\r\n")
        await asyncio.wait_for(peer.has_ended.wait(), 5.0)
        assert peer.statuses == [200, 400]
        assert b"first" in peer.raw
        assert bench.record().outcome is Outcome.OK


@in_loop
async def test_body_in_a_pipeline_that_breaks_is_recorded_and_the_others_are_answered(tmp_path: Path) -> None:
    async with served(tmp_path, plain(b"first")) as (peer, upstream, bench):
        peer.send(GET + b"POST /y HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        await asyncio.wait_for(peer.has_ended.wait(), 5.0)
        assert peer.statuses == [200, 400]
        assert sorted(record.outcome for record in bench.records()) == [Outcome.CLIENT_GONE, Outcome.OK]
    assert [request.target for request in upstream.requests] == [b"/x"]


# One after the other --------------------------------------------------------------------------------------------------


@in_loop
async def test_a_bounded_number_of_requests_waits_and_all_are_answered(tmp_path: Path) -> None:
    may_go = asyncio.Event()

    async def slow(talk: Talk) -> None:
        await may_go.wait()
        await talk.answer(talk.request.target)

    async with served(tmp_path, slow) as (peer, upstream, bench):
        for index in range(MAX_WAITING + 1):
            assert peer.wire.reads.is_set()
            peer.send(GET.replace(b"/x", b"/%d" % index))
        assert not peer.wire.reads.is_set()
        may_go.set()
        await peer.sent(b"HTTP/1.1 200", MAX_WAITING + 1)
        assert peer.wire.reads.is_set()
        assert len(bench.records()) == MAX_WAITING + 1
    assert [request.target for request in upstream.requests] == [b"/%d" % index for index in range(MAX_WAITING + 1)]


@in_loop
async def test_a_bounded_number_of_body_bytes_waits(tmp_path: Path) -> None:
    may_go = asyncio.Event()

    async def slow(talk: Talk) -> None:
        await may_go.wait()
        await talk.answer(b"%d" % len(talk.request.body))

    body = b"x" * (MAX_WAITING_BYTES + 1)
    async with served(tmp_path, slow) as (peer, _, bench):
        peer.send(GET)
        peer.send(b"POST /y HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        assert not peer.wire.reads.is_set()
        may_go.set()
        await peer.sent(b"HTTP/1.1 200", 2)
        assert peer.wire.reads.is_set()
        assert peer.raw.endswith(b"%d" % len(body))
        assert len(bench.records()) == 2


@in_loop
async def test_client_that_leaves_unread_is_noticed(tmp_path: Path) -> None:
    async def deaf(talk: Talk) -> None:
        with contextlib.suppress(ConnectionError):
            while await talk.reader.read(65536):
                await asyncio.sleep(3600)

    body = b"x" * 4_000_000
    async with served(tmp_path, deaf, reads_body=False) as (peer, upstream, bench):
        head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: h\r\nContent-Type: multipart/form-data\r\n"
        peer.send(head + b"Content-Length: 60000000\r\n\r\n")
        while peer.wire.reads.is_set():
            peer.send(body)
            await asyncio.sleep(0)
        await until(lambda: bool(upstream.requests), "the upload runs")
        await asyncio.sleep(0.1)
        assert not peer.has_ended.is_set()
        peer.wire.hang_up()
        await asyncio.wait_for(peer.has_ended.wait(), 5.0)
        peer.connection.connection_lost(None)
        assert bench.record().outcome is Outcome.CLIENT_GONE


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "lines", "stays", "header"),
    [
        (b"1.1", b"", True, None),
        (b"1.1", b"Connection: close\r\n", False, b"connection: close"),
        (b"1.0", b"", False, b"connection: close"),
        (b"1.0", b"Connection: keep-alive\r\n", True, b"connection: keep-alive"),
        (b"1.1", b"Connection: Upgrade\r\nUpgrade: h2c\r\n", False, b"connection: close"),
    ],
)
@in_loop
async def test_connection_stays_where_both_sides_want_it(
    tmp_path: Path, version: bytes, lines: bytes, stays: bool, header: bytes | None
) -> None:
    async with served(tmp_path, plain(b"ok")) as (peer, _, _bench):
        peer.send(b"GET /x HTTP/%b\r\nHost: h\r\n%b\r\n" % (version, lines))
        await peer.sent(b"ok$")
        assert peer.has_ended.is_set() is not stays
        found = re.findall(rb"\r\n(connection: [^\r]*)", peer.raw)
        assert found == ([] if header is None else [header])


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("is_cut", [False, True])
@in_loop
async def test_request_that_would_upgrade_keeps_its_body(tmp_path: Path, framing: bytes, is_cut: bool) -> None:
    async with served(tmp_path, plain(b"ok")) as (peer, upstream, bench):
        data = b"POST /x HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" + framing + GET
        for piece in [data[index : index + 1] for index in range(len(data))] if is_cut else [data]:
            peer.send(piece)
        await asyncio.wait_for(peer.has_ended.wait(), 5.0)
        assert peer.statuses == [200]
        assert len(bench.records()) == 1
    (request,) = upstream.requests
    assert (request.body, request.values(b"upgrade")) == (b"hello", [])


@in_loop
async def test_answer_without_a_length_breaks_off_with_a_reset_for_http_1_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(talk: Talk) -> None:
        await talk.begin_stream()
        await talk.piece(b"data: 1\n\n")
        await asyncio.sleep(0.05)
        talk.reset()

    async with served(tmp_path, breaks) as (peer, _, bench):
        peer.send(b"GET /x HTTP/1.0\r\nHost: h\r\n\r\n")
        await asyncio.wait_for(peer.has_ended.wait(), 5.0)
        assert peer.raw.endswith(b"data: 1\n\n")
        linger = peer.wire.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        assert linger == (1).to_bytes(4, "little") + bytes(4)
        assert bench.record().outcome is Outcome.TRUNCATED


@in_loop
async def test_trailers_and_interim_answers_pass(tmp_path: Path) -> None:
    async def answer(talk: Talk) -> None:
        await talk.send(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n")
        await talk.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await talk.head(200, (b"Trailer", b"X-Sum"), (b"transfer-encoding", b"chunked"))
        await talk.send(b"2\r\nok\r\n0\r\nX-Sum: 42\r\n\r\n")
        talk.is_kept = True

    async with served(tmp_path, answer) as (peer, _, bench):
        peer.send(GET)
        await peer.sent(b"X-Sum: 42\r\n\r\n$")
        assert peer.statuses == [103, 200]
        assert peer.raw.startswith(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\nHTTP/1.1 200 OK\r\n")
        assert b"Trailer: X-Sum\r\n" in peer.raw
        assert peer.raw.endswith(b"\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 42\r\n\r\n")
        peer.raw = b""
        peer.send(b"GET /x HTTP/1.0\r\nHost: h\r\n\r\n")  # which knows of neither
        await asyncio.wait_for(peer.has_ended.wait(), 5.0)
        assert peer.statuses == [200]
        assert peer.raw.endswith(b"\r\n\r\nok")
        assert len(bench.records()) == 2


@in_loop
async def test_trailers_of_a_request_pass(tmp_path: Path) -> None:
    trailers: list[bytes] = []

    async def read(talk: Talk) -> None:
        trailers.append(await talk.reader.readuntil(b"\r\n\r\n"))
        await talk.answer(b"ok")

    async with served(tmp_path, read, reads_body=False) as (peer, upstream, _):
        peer.send(b"POST /x HTTP/1.1\r\nHost: h\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n")
        peer.send(b"3\r\nabc\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n")
        await peer.sent(b"ok$")
    assert trailers == [b"3\r\nabc\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n"]
    assert upstream.requests[0].values(b"transfer-encoding") == [b"chunked"]
    assert upstream.requests[0].values(b"content-length") == []


@in_loop
async def test_own_headers_can_be_switched_off(tmp_path: Path) -> None:
    async with Upstream(plain(b"ok")) as upstream:
        for is_on in (True, False):
            shown = {"overhead": is_on, "upstream": is_on}
            async with running(tmp_path, upstream.url, response_headers=shown) as bench, connected(bench) as peer:
                peer.send(GET)
                await peer.sent(b"ok$")
                named = re.findall(rb"\r\nx-burstgate-upstream: ([^\r]+)", peer.raw)
                own_ms = re.findall(rb"\r\nx-burstgate-overhead-ms: (\d+\.\d{3})\r\n", peer.raw)
            assert named == ([upstream.url.encode()] if is_on else [])
            assert len(own_ms) == is_on
            assert all(float(each) < 5000 for each in own_ms)


@in_loop
async def test_overhead_is_without_the_upstreams_time(tmp_path: Path) -> None:
    async def slow(talk: Talk) -> None:
        await asyncio.sleep(1.0)
        await talk.answer(b"ok")

    async with served(tmp_path, slow) as (peer, _, _bench):
        peer.send(GET)
        await peer.sent(b"ok$")
        (own_ms,) = re.findall(rb"x-burstgate-overhead-ms: ([\d.]+)", peer.raw)
        assert 0 < float(own_ms) < 900


@in_loop
async def test_comments_while_the_first_event_is_awaited(tmp_path: Path) -> None:
    may_go = asyncio.Event()

    async def prefills(talk: Talk) -> None:
        await talk.begin_stream()
        await may_go.wait()
        await talk.piece(b"data: 1\n\n")
        await asyncio.sleep(0.6)  # silence behind the first event is the client's own to judge
        await talk.piece(b"data: [DONE]\n\n")
        await talk.end_stream()

    timeouts = {"sse_comment_s": 0.2}
    async with (
        Upstream(prefills) as upstream,
        running(tmp_path, upstream.url, timeouts=timeouts) as bench,
        connected(bench) as peer,
    ):
        body = b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}'
        length = len(body)
        peer.send(b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), length, body))
        comment = b"e\r\n: keep-alive\n\n\r\n"
        await peer.sent(comment, 2)
        may_go.set()
        await peer.sent(b"0\r\n\r\n$")
        _, _, rest = peer.raw.partition(b"\r\n\r\n")
        count = rest.count(comment)
        assert rest == comment * count + b"9\r\ndata: 1\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        assert bench.record().outcome is Outcome.OK


# The end of a worker --------------------------------------------------------------------------------------------------


@in_loop
async def test_idle_connection_of_a_stopping_worker_may_ask_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path, plain(b"ok")) as (peer, _, bench):
        peer.send(GET)
        await peer.sent(b"ok$")
        bench.gateway.is_stopping = True
        peer.connection.shutdown()
        assert not peer.has_ended.is_set()
        peer.send(GET)  # it was on its way
        await asyncio.wait_for(peer.has_ended.wait(), 0.9)
        assert peer.statuses == [200, 200]
        assert peer.raw.count(b"connection: close") == 1
        assert len(bench.records()) == 2


@in_loop
async def test_idle_connection_of_a_stopping_worker_is_closed_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LINGER_S", 0.05)
    async with served(tmp_path, plain(b"ok")) as (peer, _, _bench):
        peer.connection.shutdown()
        await asyncio.wait_for(peer.has_ended.wait(), 5.0)
        assert peer.raw == b""


@in_loop
async def test_connection_made_while_the_worker_stops_is_served_once(tmp_path: Path) -> None:
    async with served(tmp_path, plain(b"ok")) as (_, _upstream, bench):
        bench.gateway.is_stopping = True
        async with connected(bench) as late:
            late.send(GET)
            await asyncio.wait_for(late.has_ended.wait(), 5.0)
            assert late.statuses == [200]
            assert b"connection: close" in late.raw


@in_loop
async def test_connection_that_idles_is_closed_after_so_many_sweeps(tmp_path: Path) -> None:
    async with served(tmp_path, plain(b"ok")) as (peer, _, _bench):
        for _ in range(server.IDLE_SWEEPS):
            peer.connection.sweep()
        peer.send(GET)
        await peer.sent(b"ok$")
        peer.send(b"GET /half HTTP/1.1\r\n")  # a head that never ends is no request
        for _ in range(server.IDLE_SWEEPS):
            assert not peer.has_ended.is_set()
            peer.connection.sweep()
        peer.connection.sweep()
        assert peer.has_ended.is_set()


# Any cut of any bytes -------------------------------------------------------------------------------------------------


class _Noted(Incoming):
    """Writes down what it is told, and answers nothing."""

    def __init__(
        self, notes: list[object], connection: ClientConnection, method: bytes, target: bytes, head: RequestHead
    ):
        super().__init__(connection, method, target, head)
        self._notes = notes
        self._body = b""

    def start(self) -> None:
        self._notes.append(("start", self.method, self.target, self.content_length, self.head.lines))

    def received(self, data: bytes) -> None:
        self._body += data

    def received_all(self) -> None:
        self._notes.append(("all", self._body, self.trailers))
        if self.connection.current is self:
            self._answer()

    def _answer(self) -> None:
        self.connection.begin(200, b"content-length: 0\r\n", is_sized=True)
        self.connection.end()

    def broken(self, error: GatewayError) -> None:
        self._notes.append(("broken", error.message))
        self.connection.begin(400, b"content-length: 0\r\n", is_sized=True)
        self.connection.end()

    def writable(self) -> None:
        raise AssertionError("nothing is blocked")

    def left(self) -> None:
        self._notes.append("left")


class _Site:
    """Requests that answer themselves at once."""

    head_limit = 256
    is_stopping = False

    def __init__(self) -> None:
        self.connections: set[ClientConnection] = set()
        self.notes: list[object] = []

    def read_head(self, headers: Headers) -> RequestHead:
        return RequestHead(headers, b"x-session-id", b"x-burstgate-log-type")

    def incoming(self, connection: ClientConnection, method: bytes, target: bytes, head: RequestHead) -> Incoming:
        return _Noted(self.notes, connection, method, target, head)


async def _told(pieces: list[bytes]) -> tuple[list[object], bytes]:
    """What a connection makes of these pieces: what its requests are told, and what the client gets."""
    site = _Site()
    peer = Peer()
    peer.connection = ClientConnection(site, asyncio.get_running_loop(), set())
    peer.connection.connection_made(peer.wire)
    for piece in pieces:
        peer.send(piece)
    peer.leave()
    return site.notes, peer.raw


_WHOLE = [
    b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /b HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nX-T: 1\r\n\r\n",
    b"GET http://h/c?d HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nX-A: \xff\r\n\r\n",
    b"\r\n\r\nHEAD / HTTP/1.1\r\nHost: h\r\nConnection: x-a, close\r\nX-A: 1\r\n\r\n",
    b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 12\r\n\r\nhello, again",
    b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n",
    b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: +5\r\n\r\nhello",
    b"GET / HTTP/1.1\r\nhost: h\r\nX-Big: " + b"b" * 500 + b"\r\n\r\n",
]


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(st.one_of(st.sampled_from(_WHOLE), st.binary(max_size=40)), min_size=1, max_size=4),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=2),
    cuts=st.lists(st.integers(0, 1000), max_size=6),
)
def test_any_cut_of_any_bytes_tells_the_same(
    requests: list[bytes], flips: list[tuple[int, int]], cuts: list[int]
) -> None:
    stream = bytearray(b"".join(requests))
    for index, byte in flips:
        if index < len(stream):
            stream[index] = byte
    data = bytes(stream)
    points = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[start:end] for start, end in itertools.pairwise(points)]

    async def told() -> None:
        whole = await _told([data])
        if not flips:  # each in a piece of its own: one whose head is known is not parsed again
            assert await _told(requests) == whole
        assert await _told(pieces) == whole
        assert await _told([data[index : index + 1] for index in range(len(data))]) == whole

    asyncio.run(told())


@in_loop
async def test_a_head_that_is_known_means_what_it_means_now(tmp_path: Path) -> None:
    """Only its length may differ, and a reload forgets it."""
    async with served(tmp_path, plain(b"ok")) as (peer, upstream, bench):
        head = b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\nX-A: %b\r\n\r\n%b"
        bodies = [b"one", b"another", b"{}", b"x" * 70_000, b"last"]
        for count, body in enumerate(bodies):
            peer.send(head % (len(body), b"1", body))
            await peer.sent(b"HTTP/1.1 200", count + 1)
        peer.send(head % (1, b"2", b"z"))
        await peer.sent(b"HTTP/1.1 200", 6)
        for connection in bench.gateway.connections:
            connection.forget_head()
        peer.send(head % (1, b"3", b"y"))
        await peer.sent(b"HTTP/1.1 200", 7)
        bench.records()
    assert [request.body for request in upstream.requests] == [*bodies, b"z", b"y"]
    assert [request.values(b"X-A") for request in upstream.requests] == [[b"1"]] * 5 + [[b"2"], [b"3"]]


@in_loop
async def test_chat_through_a_connection_leaves_nothing_behind(tmp_path: Path) -> None:
    async with served(tmp_path, plain(chat_answer())) as (peer, _, bench):
        body = b'{"model":"m","messages":[]}'
        for _ in range(3):
            peer.send(b"POST %b HTTP/1.1\r\nHost: h\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(body)) + body)
        await peer.sent(b"HTTP/1.1 200", 3)
        assert bench.gateway.watch.requests() == ()
        peer.leave()
        assert bench.gateway.connections == set()
        bench.records()
