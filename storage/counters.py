"""Counters that outlive their process: one memory-mapped file of named unsigned 64-bit slots, one writer each.

Layout: 8,192 bytes of header, then 8 bytes little-endian a slot. The header is one line of JSON (`{"format":
"burstgate-counters", "version": 1, "names": [...]}`) padded with spaces; the names say what each slot is, so that a
reader of another version still finds what it knows. A slot is changed by one aligned 8-byte store: readers in other
processes see the old or the new value, and a `kill -9` loses nothing.

A name such as `series[640]` is a block of 640 slots, whose owner knows what is in it. A file may end inside a block:
slots that are not there are zeros, which `trim_counters` takes away once the writer is gone.
"""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

HEADER_BYTES = 8192
_FORMAT = "burstgate-counters"


def slots_of(name: str) -> int:
    """How many slots a name stands for."""
    return int(name[name.index("[") + 1 : -1]) if name.endswith("]") else 1


def slot_count(names: Sequence[str]) -> int:
    """How many slots these names have together."""
    return sum(map(slots_of, names))


def places(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Each name, a block's without its size, and its first slot."""
    firsts = itertools.accumulate(map(slots_of, names), initial=0)
    for name, first in zip(names, firsts):  # noqa: B905 (the last of `firsts` is the end)
        yield name.partition("[")[0], first


class Counters:
    """The writing side. `counters.slots[i] += n` is the whole interface of the hot path."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        """Create the file. Raises OSError when it can not be written, ValueError when the names do not fit."""
        header = json.dumps({"format": _FORMAT, "version": 1, "names": list(names)}, separators=(",", ":")).encode()
        if len(header) >= HEADER_BYTES:
            raise ValueError(f"{path}: {len(names)} counter names do not fit into a header of {HEADER_BYTES} bytes")
        slots = slot_count(names)
        size = HEADER_BYTES + 8 * slots
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if os.write(descriptor, header.ljust(HEADER_BYTES - 1) + b"\n" + bytes(8 * slots)) != size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self.slots = memoryview(self._map)[HEADER_BYTES:].cast("Q")

    def close(self) -> None:
        """Release the map; the file stays."""
        self.slots.release()
        self._map.close()


def read_counters(path: Path) -> dict[str, int]:
    """Every slot of a counters file by name, without the blocks. Raises OSError, or ValueError naming what is none."""
    return read_blocks(path)[0]


def read_blocks(path: Path) -> tuple[dict[str, int], dict[str, memoryview]]:
    """The slots by name, and the blocks, cut where the file ends. Raises as `read_counters`."""
    data = path.read_bytes()
    names, slots = _parse(path, data)
    values = {}
    blocks = {}
    for full, (name, first) in zip(names, places(names), strict=True):
        if full.endswith("]"):
            blocks[name] = slots[first : first + slots_of(full)]
        else:
            values[name] = slots[first]
    return values, blocks


def trim_counters(path: Path) -> None:
    """Cut off the zeros at the end of the file's last block. For a writer that is gone. Raises as `read_counters`."""
    data = path.read_bytes()
    names, slots = _parse(path, data)
    used = max(_plain_end(names), (len(slots.tobytes().rstrip(b"\0")) + 7) // 8)
    os.truncate(path, HEADER_BYTES + 8 * used)


def _plain_end(names: Sequence[str]) -> int:
    """Behind the last slot that is in no block."""
    ends = [first + 1 for full, (_, first) in zip(names, places(names), strict=True) if not full.endswith("]")]
    return max(ends, default=0)


def _parse(path: Path, data: bytes) -> tuple[list[str], memoryview]:
    try:
        header = json.loads(data[:HEADER_BYTES])
        names = header["names"]
        if header["format"] != _FORMAT or len(data) < HEADER_BYTES + 8 * _plain_end(names):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a {_FORMAT} file") from None
    end = min(len(data) - (len(data) - HEADER_BYTES) % 8, HEADER_BYTES + 8 * slot_count(names))
    return names, memoryview(data)[HEADER_BYTES:end].cast("Q")
