"""Server-sent events, sans-IO: bytes in, whole event blocks out, for cuts anywhere.

A block is the exact bytes of one event including the blank line that ends it, so that the concatenation of all blocks
and the rest at the end of the stream is the stream. Lines end at CR LF, LF or CR and nowhere else (WHATWG HTML,
section 9.2.6); `splitlines()` would also cut at U+2028 and U+0085, which legally occur inside JSON.
A block that ends in a bare CR is held until the next byte shows that no LF belongs to it.
"""

from __future__ import annotations

import re

MAX_BLOCK_BYTES = 8 * 1024 * 1024
"""A block that grows past this is passed on in pieces: a stream without blank lines must not fill the memory."""

_BLOCK_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))")
_LINE_END = re.compile(rb"\r\n|\n|\r")


class SseSplitter:
    """Cuts a byte stream into event blocks."""

    __slots__ = ("rest",)

    def __init__(self) -> None:
        self.rest = bytearray()
        """The beginning of a block whose end has not come yet."""

    def feed(self, data: bytes) -> list[bytes]:
        """The blocks that `data` completes, in order; what is left waits for more."""
        rest = self.rest
        if rest or b"\r" in data:
            blocks = self._feed_any(data)
        else:
            blocks = data.split(b"\n\n")
            rest += blocks.pop()
            blocks = [block + b"\n\n" for block in blocks]
        if len(rest) > MAX_BLOCK_BYTES:
            blocks.append(self.eof())
        return blocks

    def _feed_any(self, data: bytes) -> list[bytes]:
        rest = self.rest
        seam = max(len(rest) - 3, 0)  # an end has at most 4 bytes; what lies before was searched when it came
        rest += data
        blocks = []
        start = 0
        for match in _BLOCK_END.finditer(rest, seam):
            end = match.end()
            if end == len(rest) and rest[-1] == 0x0D:
                break
            blocks.append(bytes(rest[start:end]))
            start = end
        del rest[:start]
        return blocks

    def eof(self) -> bytes:
        """What is left when the stream has ended: an event without its blank line, or nothing."""
        rest = bytes(self.rest)
        self.rest.clear()
        return rest


def event_data(block: bytes) -> bytes:
    """The payload of a block: its `data` lines joined by LF; empty when it has none (a comment, a bare `event:`).

    A byte order mark at the start of a stream is not looked for.
    """
    if block.startswith(b"data: ") and block.find(b"\n") == len(block) - 2 and b"\r" not in block:
        return block[6:-2]
    lines = []
    for line in _LINE_END.split(block):
        if line.startswith(b"data:"):
            lines.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line == b"data":
            lines.append(b"")
    return b"\n".join(lines)
