from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.wire.cuts import CUTS, every_byte, pieces_at
from wire.sse import MAX_BLOCK_BYTES, SseSplitter, event_data


def split(pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    """The blocks of a stream that arrives in these pieces, and what is left at its end."""
    splitter = SseSplitter()
    blocks = [block for piece in pieces for block in splitter.feed(piece)]
    return blocks, splitter.eof()


def whatwg_data(stream: bytes) -> list[bytes]:
    """The data of each event, by WHATWG HTML section 9.2.6 word for word, byte by byte.

    A stream may end within an event; that event is not dispatched.
    """
    lines, line, after_cr = [], bytearray(), False
    for byte in stream:
        if byte == 0x0A and after_cr:
            after_cr = False
            continue
        after_cr = byte == 0x0D
        if byte in (0x0A, 0x0D):
            lines.append(bytes(line))
            line.clear()
        else:
            line.append(byte)
    found, buffer = [], b""
    for text in lines:
        if not text:
            if buffer:
                found.append(buffer[:-1])
            buffer = b""
            continue
        field, colon, value = text.partition(b":")
        if colon and not field:
            continue  # a comment
        value = value.removeprefix(b" ") if colon else b""
        if field == b"data":
            buffer += value + b"\n"
    return found


ODD = 'data: {"a":"\u2028\x85\x0b\x0c\x1c"}\n\n'.encode()
"""Line ends to str.splitlines(), and nothing to an event stream."""

STREAMS = [
    # stream, blocks, rest
    (b"", [], b""),
    (b"data: a\n\n", [b"data: a\n\n"], b""),
    (b"data: a\n\ndata: b\n\n", [b"data: a\n\n", b"data: b\n\n"], b""),
    (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"data: a\r\n\r\n", b"data: b\r\n\r\n"], b""),
    # A CR at the end is held: an LF may still belong to it.
    (b"data: a\r\rdata: b\r\r", [b"data: a\r\r"], b"data: b\r\r"),
    (b"data: a\n\rdata: b\r\ndata: c\r\n\n", [b"data: a\n\r", b"data: b\r\ndata: c\r\n\n"], b""),
    (b"data: a\r\n\rdata: b\n\r\n", [b"data: a\r\n\r", b"data: b\n\r\n"], b""),
    (b": ping\n\ndata: a\n\n", [b": ping\n\n", b"data: a\n\n"], b""),
    (b"event: x\ndata: a\ndata: b\n\n", [b"event: x\ndata: a\ndata: b\n\n"], b""),
    # Three line ends are one blank line and the beginning of the next block; four are two.
    (b"data: a\n\n\ndata: b\n\n", [b"data: a\n\n", b"\ndata: b\n\n"], b""),
    (b"data: a\n\n\n\n", [b"data: a\n\n", b"\n\n"], b""),
    (b"\n\ndata: a\n\n", [b"\n\n", b"data: a\n\n"], b""),
    (b"data: a\n\ndata: [DONE]", [b"data: a\n\n"], b"data: [DONE]"),
    (b"data: a\n", [], b"data: a\n"),
    (b"\r", [], b"\r"),
    (ODD, [ODD], b""),
]  # fmt: skip


@pytest.mark.parametrize(("stream", "blocks", "rest"), STREAMS)
def test_a_stream_is_cut_at_blank_lines_only(stream: bytes, blocks: list[bytes], rest: bytes) -> None:
    assert split([stream]) == (blocks, rest)
    assert split(every_byte(stream)) == (blocks, rest)


LINE = st.one_of(
    st.sampled_from([b"", b"data", b"data:", b"data: ", b"data:  a", b": ping", b"event: x", b"id: 1", b"data : a"]),
    st.text("ab \u2028\x85\x0b:", max_size=8).map(lambda text: b"data: " + text.encode()),
    st.binary(max_size=8),  # line ends and all
)
STREAM = st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\r\n\r\n", b"\r\r", b""]))).map(
    lambda lines: b"".join(line + end for line, end in lines)
)


@given(stream=STREAM, at=CUTS)
@example(stream=b"a\r\n\r\nb", at=list(range(60)))
@example(stream=b"a\n\r\nb\r\r\nc\r\n\rd", at=list(range(60)))
def test_any_cut_gives_the_same_blocks_and_loses_no_byte(stream: bytes, at: list[int]) -> None:
    blocks, rest = split([stream])
    assert b"".join(blocks) + rest == stream
    assert split(pieces_at(stream, at)) == (blocks, rest)


@given(stream=STREAM)
def test_the_data_of_the_blocks_is_whatwgs(stream: bytes) -> None:
    blocks, rest = split([stream + b"\n\n."])  # the end of whatever was open, and a byte that settles a CR
    assert rest.endswith(b".")
    assert [data for data in map(event_data, blocks) if data] == [
        data for data in whatwg_data(stream + b"\n\n") if data
    ]


DATA = [
    # block, data
    (b"data: a\n\n", b"a"),
    (b"data:a\n\n", b"a"),
    (b"data:  a \n\n", b" a "),
    (b"data: a\r\n\r\n", b"a"),
    (b"data: a\r\r", b"a"),
    (b"data: a\ndata: b\n\n", b"a\nb"),
    (b"data: a\ndata\ndata: b\n\n", b"a\n\nb"),
    (b"event: x\ndata: a\nid: 3\n\n", b"a"),
    (b": data: a\n\n", b""),
    (b"datax: a\n\n", b""),
    (b" data: a\n\n", b""),
    (b"\n\n", b""),
    (b"", b""),
    (b"data: [DONE]", b"[DONE]"),
    (b"data: [DONE]\n", b"[DONE]"),
    (b"data: a\nx", b"a"),  # the rest of a stream that broke off
]  # fmt: skip


@pytest.mark.parametrize(("block", "data"), DATA)
def test_the_data_of_one_block(block: bytes, data: bytes) -> None:
    assert event_data(block) == data


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 10, b"data: x\r\n123456 "])
def test_a_stream_without_blank_lines_takes_bounded_memory_and_linear_time(piece: bytes) -> None:
    splitter = SseSplitter()
    start_s = time.perf_counter()
    given_back, held = 0, 0
    for _ in range(2 * MAX_BLOCK_BYTES // len(piece)):
        given_back += sum(map(len, splitter.feed(piece)))
        held = max(held, len(splitter.rest))
    assert held <= MAX_BLOCK_BYTES
    assert given_back + len(splitter.eof()) == 2 * MAX_BLOCK_BYTES // len(piece) * len(piece)
    assert time.perf_counter() - start_s < 20  # 1 s; with a copy or a search of the whole at each piece it is hours


def test_a_block_over_the_limit_passes_on_in_pieces() -> None:
    splitter = SseSplitter()
    assert splitter.feed(b"data: " + b"x" * (MAX_BLOCK_BYTES - 6)) == []
    assert list(map(len, splitter.feed(b"x"))) == [MAX_BLOCK_BYTES + 1]
    assert splitter.feed(b"\n\ndata: a\n\n") == [b"\n\n", b"data: a\n\n"]
    assert splitter.eof() == b""
