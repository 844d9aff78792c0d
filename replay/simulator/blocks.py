"""The KV cache in blocks, counted and not stored: which are free, which hold a known prompt prefix. Sans-IO.

The rules are those of vLLM's block pool:
- A full block of a prompt is known by a hash that covers it and all before it: equal hashes mean equal prefixes.
- A block with a hash stays findable after its last user has let it go, until its space is needed.
- Free blocks are given out in the order in which they became free. A sequence gives its blocks back last one first, so
  that the beginning of a prefix outlives its end.

Blocks without a hash can not be told apart, so they are counted, and neighbours in the queue of free blocks are one
entry: a pool that shares nothing costs the same for any number of blocks. Where vLLM keeps two blocks of one hash, this
pool knows the first of them only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """The blocks of one KV cache."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        """Blocks that nobody uses, those with a hash included."""
        self._users: dict[int, int] = {}
        # Hash, or a negative number for a run of blocks without one, to the number of blocks; the oldest first.
        self._queue: OrderedDict[int, int] = OrderedDict({-1: total})
        self._last_run = -1

    def hits(self, hashes: Sequence[int], most: int) -> int:
        """How many of the leading hashes, at most `most`, are in the cache."""
        users = self._users
        for at in range(min(most, len(hashes))):
            if hashes[at] not in users:
                return at
        return min(most, len(hashes))

    def unused(self, hashes: Sequence[int]) -> int:
        """How many of these blocks, which are in the cache, are free: to share them takes them out of the free ones."""
        return sum(not self._users[each] for each in hashes)

    def share(self, hashes: Sequence[int]) -> None:
        """Adds a user to blocks that are in the cache."""
        for each in hashes:
            if not self._users[each]:
                del self._queue[each]
                self.free -= 1
            self._users[each] += 1

    def take(self, count: int) -> None:
        """Takes the blocks that have been free the longest; what they held is forgotten. There must be as many."""
        self.free -= count
        queue = self._queue
        while count:
            entry = next(iter(queue))
            held = queue[entry]
            if held > count:
                queue[entry] = held - count
                return
            del queue[entry]
            if entry >= 0:
                del self._users[entry]
            count -= held

    def name(self, block_hash: int) -> bool:
        """Gives a hash to a block that has one user; False, and it stays without, where the hash is in the cache."""
        if block_hash in self._users:
            return False
        self._users[block_hash] = 1
        return True

    def give_back(self, hashes: Sequence[int], unnamed: int) -> None:
        """Takes a user from each of the blocks: those with these hashes, in the order of the prompt, and the others."""
        queue, users = self._queue, self._users
        if unnamed:
            self.free += unnamed
            last = next(reversed(queue), 0)
            if last < 0:
                queue[last] += unnamed
            else:
                self._last_run -= 1
                queue[self._last_run] = unnamed
        for each in reversed(hashes):
            users[each] -= 1
            if not users[each]:
                queue[each] = 1
                self.free += 1
