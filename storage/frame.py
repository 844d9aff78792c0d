"""Framing of journal segments, pure.

A frame is `length u32 LE | crc32 u32 LE | payload`. length counts the payload alone and is at least 1: a run of zero
bytes, which a file system may leave behind after a power cut, is therefore never a frame. The CRC is zlib's, over the
payload. A segment is frames from its first byte on; whatever follows the last whole frame is its torn tail.
"""

from __future__ import annotations

import struct
import zlib

_HEAD = struct.Struct("<II")
HEAD_BYTES = _HEAD.size
MAX_PAYLOAD_BYTES = 256 * 1024
"""Beyond this a length is taken for garbage. A record is a few hundred bytes."""


def encode_frame(payload: bytes) -> bytes:
    """One frame. Raises ValueError for a payload that is empty or too long."""
    if not 0 < len(payload) <= MAX_PAYLOAD_BYTES:
        raise ValueError(f"frame payload of {len(payload)} bytes: expected 1 to {MAX_PAYLOAD_BYTES}")
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def decode_frames(data: bytes) -> tuple[list[bytes], int]:
    """The payloads of the whole frames at the start of `data`, and the offset behind the last of them."""
    payloads = []
    offset = 0
    end = len(data)
    read_head, crc32 = _HEAD.unpack_from, zlib.crc32
    while end - offset > HEAD_BYTES:
        length, crc = read_head(data, offset)
        start = offset + HEAD_BYTES
        stop = start + length
        if stop > end or not 0 < length <= MAX_PAYLOAD_BYTES:
            break
        payload = data[start:stop]
        if crc32(payload) != crc:
            break
        payloads.append(payload)
        offset = stop
    return payloads, offset


def find_frame(data: bytes, start: int) -> int | None:
    """The first offset at or after `start` where a whole frame begins: how reading goes on behind damage."""
    for offset in range(start, len(data) - HEAD_BYTES):
        length, crc = _HEAD.unpack_from(data, offset)
        begin = offset + HEAD_BYTES
        if 0 < length <= min(MAX_PAYLOAD_BYTES, len(data) - begin) and zlib.crc32(data[begin : begin + length]) == crc:
            return offset
    return None
