"""What the conversations of a replay have said so far, so that turn k's request can hold the turns before it.

The history of a session is what its latest request held plus that request and its answer; the next request takes the
leading turns that fit. Bounded: past MAX_SESSIONS sessions or MAX_BYTES of text the sessions that were longest not
used are forgotten, and start anew; nobody knows which turn of a session is its last.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field

MAX_SESSIONS = 65_536
MAX_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Turn:
    """A request's own message and its answer."""

    user: str
    assistant: str
    tokens: int
    """Of the whole conversation up to and with the answer, as the target counts them."""

    @property
    def size_bytes(self) -> int:
        """Of memory, about: a string holds at most four bytes a character, of English one."""
        return len(self.user) + len(self.assistant) + 200


Turns = tuple[Turn, ...]


@dataclass(slots=True)
class _Session:
    turns: Turns = ()
    index: int = -1
    """The row that the last of them was."""
    size_bytes: int = field(default=0)


class Histories:
    """The turns of each session that is remembered."""

    def __init__(self, max_sessions: int = MAX_SESSIONS, max_bytes: int = MAX_BYTES) -> None:
        self._max_sessions = max_sessions
        self._max_bytes = max_bytes
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        """The one longest not used first."""
        self._bytes = 0
        self.forgotten = 0
        """Sessions dropped to stay within the bounds."""

    def open(self, session_id: str) -> bool:
        """Take note that a row of the session is planned; whether one was before."""
        if session_id in self._sessions:
            self._sessions.move_to_end(session_id)
            return True
        self._sessions[session_id] = _Session()
        self._trim()
        return False

    def of(self, session_id: str) -> Turns:
        """The session's turns, first to last; none of one that is not remembered."""
        session = self._sessions.get(session_id)
        return () if session is None else session.turns

    def put(self, session_id: str, index: int, turns: Turns) -> None:
        """Row `index` of the session has been said: it is the last of `turns`. A later row's history stays."""
        session = self._sessions.setdefault(session_id, _Session())
        self._sessions.move_to_end(session_id)
        if index < session.index:
            return
        size_bytes = sum(turn.size_bytes for turn in turns)
        self._bytes += size_bytes - session.size_bytes
        session.turns, session.index, session.size_bytes = turns, index, size_bytes
        self._trim()

    def _trim(self) -> None:
        while len(self._sessions) > self._max_sessions or (self._bytes > self._max_bytes and len(self._sessions) > 1):
            _, session = self._sessions.popitem(last=False)
            self._bytes -= session.size_bytes
            self.forgotten += 1


def fitting(turns: Turns, tokens: float) -> Turns:
    """The leading turns that have at most so many tokens together."""
    return turns[: bisect_right(turns, tokens, key=lambda turn: turn.tokens)]
