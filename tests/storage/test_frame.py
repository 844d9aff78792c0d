"""Recovery: from every prefix of a segment exactly its whole frames; damage never makes a wrong one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storage.frame import HEAD_BYTES, MAX_PAYLOAD_BYTES, decode_frames, encode_frame, find_frame

payloads_of = st.lists(st.binary(min_size=1, max_size=60), max_size=8)


def test_the_bytes_of_a_frame() -> None:
    assert encode_frame(b"123456789") == b"\x09\0\0\0" + b"\x26\x39\xf4\xcb" + b"123456789"  # CRC-32's check value


@pytest.mark.parametrize("size", [0, MAX_PAYLOAD_BYTES + 1])
def test_a_payload_that_is_no_frame_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"frame payload of {size} bytes: expected 1 to {MAX_PAYLOAD_BYTES}"):
        encode_frame(bytes(size))


def test_the_longest_payload_comes_back() -> None:
    frame = encode_frame(b"x" * MAX_PAYLOAD_BYTES)
    assert decode_frames(frame) == ([b"x" * MAX_PAYLOAD_BYTES], len(frame))


@given(payloads_of, st.binary(max_size=20))
@example([b"a"], b"")
@example([], bytes(20))  # what a file system may leave behind after a power cut
def test_every_prefix_yields_exactly_the_whole_frames_in_it(payloads: list[bytes], tail: bytes) -> None:
    data = b"".join(map(encode_frame, payloads))
    ends = [0, *itertools.accumulate(len(encode_frame(payload)) for payload in payloads)]
    for cut in range(len(data) + 1):
        whole = sum(end <= cut for end in ends) - 1
        assert decode_frames(data[:cut]) == (payloads[:whole], ends[whole])
    assert decode_frames(data + bytes(len(tail))) == (payloads, len(data))


@given(st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=5), st.data())
def test_a_flipped_byte_never_yields_a_wrong_frame(payloads: list[bytes], draw: st.DataObject) -> None:
    data = bytearray().join(map(encode_frame, payloads))
    ends = list(itertools.accumulate(len(encode_frame(payload)) for payload in payloads))
    place = draw.draw(st.integers(0, len(data) - 1), label="place")
    data[place] ^= draw.draw(st.integers(1, 255), label="flip")
    hit = sum(end <= place for end in ends)
    assert decode_frames(bytes(data)) == (payloads[:hit], ends[hit - 1] if hit else 0)


@given(payloads_of.filter(bool), st.data())
def test_reading_goes_on_behind_damage(payloads: list[bytes], draw: st.DataObject) -> None:
    """A byte of the first frame is damaged: the next frame is found where it is, or none if there is none."""
    first, rest = bytearray(encode_frame(payloads[0])), b"".join(map(encode_frame, payloads[1:]))
    place = draw.draw(st.integers(0, len(first) - 1), label="place")
    first[place] ^= draw.draw(st.integers(1, 255), label="flip")
    data = bytes(first) + rest
    found = find_frame(data, 1)
    assert found == (len(first) if rest else None)
    if found is not None:
        assert decode_frames(data[found:]) == (payloads[1:], len(rest))


@pytest.mark.parametrize("length", [0, 1, HEAD_BYTES, 4096])
def test_zeros_hold_no_frame(length: int) -> None:
    assert decode_frames(bytes(length)) == ([], 0)
    assert find_frame(bytes(length), 0) is None
