from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from replay.simulator.blocks import BlockPool


class ListedPool:
    """The same rules block by block, as vLLM has them: each block an entry of a list."""

    def __init__(self, total: int) -> None:
        self.queue: list[int | None] = [None] * total
        self.users: dict[int, int] = {}

    def share(self, hashes: list[int]) -> None:
        for each in hashes:
            if not self.users[each]:
                self.queue.remove(each)
            self.users[each] += 1

    def take(self, count: int) -> None:
        for _ in range(count):
            each = self.queue.pop(0)
            if each is not None:
                del self.users[each]

    def give_back(self, hashes: list[int], unnamed: int) -> None:
        self.queue += [None] * unnamed
        for each in reversed(hashes):
            self.users[each] -= 1
            if not self.users[each]:
                self.queue.append(each)


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans()), max_size=60))
def test_counted_runs_are_the_same_as_blocks_in_a_list(total: int, script: list[tuple[int, int, bool]]) -> None:
    """Prompts of one to six blocks of four families come and go; equal families share their beginnings."""
    pool, listed = BlockPool(total), ListedPool(total)
    held: list[tuple[list[int], int]] = []
    for family, blocks, is_end in script:
        if is_end and held:
            hashes, unnamed = held.pop(family % len(held))
            pool.give_back(hashes, unnamed)
            listed.give_back(hashes, unnamed)
        wanted = [family * 100 + at for at in range(blocks)]
        hits = pool.hits(wanted, blocks - 1)
        assert hits == next((at for at in range(blocks - 1) if wanted[at] not in listed.users), blocks - 1)
        if blocks - hits + pool.unused(wanted[:hits]) > pool.free:
            continue
        pool.share(wanted[:hits])
        listed.share(wanted[:hits])
        pool.take(blocks - hits)
        listed.take(blocks - hits)
        named = wanted[:hits]
        for each in wanted[hits:]:
            assert pool.name(each) == (each not in listed.users)
            if each not in listed.users:
                listed.users[each] = 1
                named.append(each)
        held.append((named, blocks - len(named)))
        assert pool.free == len(listed.queue)
    assert [each for each in range(400) if pool.hits([each], 1)] == sorted(listed.users)


def test_the_end_of_a_prefix_is_forgotten_before_its_beginning() -> None:
    pool = BlockPool(4)
    pool.take(3)
    assert all(pool.name(each) for each in (10, 11, 12))
    pool.give_back([10, 11, 12], 0)
    assert (pool.free, pool.hits([10, 11, 12], 3), pool.hits([10, 11, 12], 2)) == (4, 3, 2)
    pool.take(2)  # the block that never had a hash, and the last of the prefix
    assert pool.hits([10, 11, 12], 3) == 2
    assert pool.unused([10, 11]) == 2
    pool.share([10, 11])
    assert (pool.free, pool.unused([10, 11])) == (0, 0)
