"""How much two outputs agree. Pure.

`exact` is equality. `similarity` is 2 L / (|a| + |b|) over characters, L the length of the longest common subsequence:
what an edit script of insertions and deletions leaves alone (1 - Indel distance / (|a| + |b|)). L is computed bit by
bit in whole numbers as long as the text (Hyyrö, "Bit-parallel LCS-length computation revisited", AWOCA 2004): some
milliseconds for two texts of MAX_CHARS, where difflib takes minutes and finds less.
"""

from __future__ import annotations

from collections.abc import Callable

MAX_CHARS = 8192
"""Of each text so many characters from its beginning are compared."""
_PAUSE_EVERY = 256


def exact(a: bytes, b: bytes) -> float:
    """1 for equal outputs, else 0."""
    return 1.0 if a == b else 0.0


def similarity(a: bytes, b: bytes, pause: Callable[[], None] | None = None) -> float:
    """0 to 1; 1 where the compared parts are equal, two empty ones included.

    a, b: UTF-8; what is not counts as U+FFFD. pause: called every few hundred characters, so that a thread that
    computes can let others run.
    """
    if a == b:
        return 1.0
    first, second = (text[: 4 * MAX_CHARS].decode("utf-8", "replace")[:MAX_CHARS] for text in (a, b))
    total = len(first) + len(second)
    return 2 * common_length(first, second, pause) / total if total else 1.0


def common_length(a: str, b: str, pause: Callable[[], None] | None = None) -> int:
    """Length of the longest common subsequence."""
    start = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        start += 1
    a, b = a[start:], b[start:]
    places: dict[str, int] = {}
    for place, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << place
    mask = (1 << len(a)) - 1
    row = mask
    for done, letter in enumerate(b):
        matches = row & places.get(letter, 0)
        row = ((row + matches) | (row - matches)) & mask
        if pause is not None and done % _PAUSE_EVERY == 0:
            pause()
    return start + len(a) - row.bit_count()
