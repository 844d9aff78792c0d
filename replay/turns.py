"""When a session's turn goes, where turns wait for one another: a pure queue, times in, requests out.

    ordered      a turn goes at its due time, or when the turn before it has ended, whichever is later
    think-time   a turn goes (its arrival - the recorded end of the turn before) / speed after the real end of that one;
                 at once where the trace has turns that overlap

In both a session's first turn, and a row without a session, goes at its due time. A turn that failed or was dropped
ends like any other. The recorded end is arrival + elapsed; where the trace has no elapsed time it is estimated as
`ESTIMATED_S_PER_TOKEN` times the response tokens, and counted.

Turns wait apart from the queue, so one session that hangs holds up no other. At most `MAX_TURNS` rows and `MAX_TOKENS`
tokens of prompts are held; then nothing more is read ahead until one has gone. A turn of think-time that comes due
before it was read (the target is that much faster than the recorded one) goes when it is read, at most at its due time.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from typing import Literal, NamedTuple

from replay.ahead import Prepared
from replay.schedule import Planned

MAX_TURNS = 4096
MAX_TOKENS = 2_000_000
"""Text and body of a prompt hold some 12 bytes a token."""
MAX_SESSIONS = 100_000
"""Whose last end is remembered; a turn of one that is forgotten is a first turn again."""
ESTIMATED_S_PER_TOKEN = 0.0257
"""BurstGPT_3's conversations: 7.00 s for 272 tokens, in the mean."""


class Turn(NamedTuple):
    """A request and its moment, in monotonic nanoseconds."""

    ready_ns: int
    number: int
    """In the order of reading, for turns of one moment."""
    prepared: Prepared


class _Ended(NamedTuple):
    real_ns: int
    recorded_s: float
    """In the plan's time."""
    is_estimated: bool


class Turns:
    """Rows in by `add`, in the plan's order; out by `pop` at `first_ns`; `ended` for each that was popped."""

    def __init__(self, mode: Literal["ordered", "think-time"], speed: float, zero_ns: int) -> None:
        self._is_ordered = mode == "ordered"
        self._speed = speed
        self._zero_ns = zero_ns
        self._heap: list[Turn] = []
        self._waiting: dict[str, deque[Prepared]] = {}
        """By session, where a turn is in the heap or in flight: those that wait for it."""
        self._ended: OrderedDict[str, _Ended] = OrderedDict()
        """By session, the turn before; the oldest first."""
        self._added = self._rows = self._tokens = 0
        self._is_closed = False
        self.estimated = 0
        """Gaps that were computed from an estimated end."""

    @property
    def first_ns(self) -> int | None:
        """The next moment; None while nothing has one."""
        return self._heap[0].ready_ns if self._heap else None

    @property
    def is_full(self) -> bool:
        """No more rows are to be added now."""
        return self._rows >= MAX_TURNS or self._tokens >= MAX_TOKENS

    @property
    def is_over(self) -> bool:
        """Nothing will come out any more."""
        return self._is_closed and not self._rows

    def close(self) -> None:
        """The last row has been added."""
        self._is_closed = True

    def add(self, prepared: Prepared, now_ns: int) -> None:
        """Take the next row of the plan."""
        self._rows += 1
        self._tokens += prepared.tokens
        session = prepared.row.session_id
        if session is not None and session in self._waiting:
            self._waiting[session].append(prepared)
            return
        if session is not None:
            self._waiting[session] = deque()
        self._push(prepared, now_ns)

    def pop(self) -> Turn:
        """The request whose moment `first_ns` is."""
        turn = heapq.heappop(self._heap)
        self._rows -= 1
        self._tokens -= turn.prepared.tokens
        return turn

    def ended(self, prepared: Prepared, end_ns: int) -> Prepared | None:
        """A turn has ended; returns the one that waited for it and has its moment now."""
        row = prepared.row
        if row.session_id is None:
            return None
        elapsed_s = row.elapsed_s
        if elapsed_s is None:
            elapsed_s = ESTIMATED_S_PER_TOKEN * (row.response_tokens or 0)
        self._ended[row.session_id] = _Ended(end_ns, row.due_s + elapsed_s / self._speed, row.elapsed_s is None)
        self._ended.move_to_end(row.session_id)
        if len(self._ended) > MAX_SESSIONS:
            self._ended.popitem(last=False)
        waiting = self._waiting[row.session_id]
        if not waiting:
            del self._waiting[row.session_id]
            return None
        released = waiting.popleft()
        self._push(released, end_ns)
        return released

    def _push(self, prepared: Prepared, now_ns: int) -> None:
        self._added += 1
        heapq.heappush(self._heap, Turn(self._ready_ns(prepared.row, now_ns), self._added, prepared))

    def _ready_ns(self, row: Planned, now_ns: int) -> int:
        due_ns = self._zero_ns + round(row.due_s * 1e9)
        before = None if row.session_id is None else self._ended.get(row.session_id)
        if before is None:
            return due_ns
        if self._is_ordered:
            return max(due_ns, before.real_ns)
        self.estimated += before.is_estimated
        think_ns = round(max(row.due_s - before.recorded_s, 0.0) * 1e9)
        return max(before.real_ns + think_ns, min(now_ns, due_ns))
