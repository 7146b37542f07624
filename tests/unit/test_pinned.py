"""Host memory for transfers: allocated once for a size, and given back at the end."""

from hypothesis import given
from hypothesis import strategies as st

from engine.device.pinned import BYTES_KEPT, PinnedPool


class Memory:
    def __init__(self):
        self.made = []

    def allocate(self, nbytes):
        self.made.append(Block(nbytes))
        return self.made[-1]


class Block:
    def __init__(self, nbytes):
        self.nbytes, self.closed = nbytes, False

    def close(self):
        assert not self.closed, "given back twice"
        self.closed = True


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40).map(lambda n: n << 24)), max_size=200))
def test_nobody_shares_a_block_and_none_is_lost(steps):
    """Take a block of a size, or give back the one that was taken first."""
    memory = Memory()
    pool = PinnedPool(memory.allocate)
    in_use = []
    for takes, nbytes in steps:
        if takes:
            block = pool.take(nbytes)
            assert block.nbytes == nbytes
            assert not block.closed
            assert all(block is not other for other in in_use)
            in_use.append(block)
        elif in_use:
            block = in_use.pop(0)
            pool.give(block.nbytes, block)
        idle = [block.nbytes for block in memory.made if not block.closed and block not in in_use]
        assert sum(idle) <= BYTES_KEPT
    assert not any(block.closed for block in in_use)
    for block in in_use:
        pool.give(block.nbytes, block)
    pool.close()
    assert all(block.closed for block in memory.made)


def test_a_second_restoration_allocates_nothing():
    memory = Memory()
    pool = PinnedPool(memory.allocate)
    for _ in range(3):
        blocks = [(nbytes, pool.take(nbytes)) for nbytes in (100, 100, 7, 3000, *range(1, 12))]
        for nbytes, block in blocks:
            pool.give(nbytes, block)
    assert len(memory.made) == 15
    assert len({id(block) for block in memory.made}) == 15


def test_sizes_that_do_not_come_again_do_not_pile_up():
    memory = Memory()
    pool = PinnedPool(memory.allocate)
    for count in range(1, 100):
        pool.give(count << 22, pool.take(count << 22))
    kept = [block.nbytes for block in memory.made if not block.closed]
    assert 0.5 * BYTES_KEPT < sum(kept) <= BYTES_KEPT
    assert kept == [block.nbytes for block in memory.made[-len(kept) :]]  # those that were used last
