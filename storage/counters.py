"""Counters that outlive their process: one memory-mapped file of named unsigned 64-bit slots, one writer each.

Layout: 8,192 bytes of header, then 8 bytes little-endian a slot. The header is one line of JSON (`{"format":
"burstgate-counters", "version": 1, "names": [...]}`) padded with spaces; the names say what each slot is, so that a
reader of another version still finds what it knows. A slot is changed by one aligned 8-byte store: readers in other
processes see the old or the new value, and a `kill -9` loses nothing.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

HEADER_BYTES = 8192
_FORMAT = "burstgate-counters"


class Counters:
    """The writing side. `counters.slots[i] += n` is the whole interface of the hot path."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        """Create the file. Raises OSError when it can not be written, ValueError when the names do not fit."""
        header = json.dumps({"format": _FORMAT, "version": 1, "names": list(names)}, separators=(",", ":")).encode()
        if len(header) >= HEADER_BYTES:
            raise ValueError(f"{path}: {len(names)} counter names do not fit into a header of {HEADER_BYTES} bytes")
        size = HEADER_BYTES + 8 * len(names)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if os.write(descriptor, header.ljust(HEADER_BYTES - 1) + b"\n" + bytes(8 * len(names))) != size:
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
    """Every slot of a counters file by name. Raises OSError, or ValueError naming the file that is none."""
    data = path.read_bytes()
    try:
        header = json.loads(data[:HEADER_BYTES])
        names = header["names"]
        if header["format"] != _FORMAT or len(data) < HEADER_BYTES + 8 * len(names):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a {_FORMAT} file") from None
    values = memoryview(data)[HEADER_BYTES : HEADER_BYTES + 8 * len(names)].cast("Q")
    return dict(zip(names, values, strict=True))
