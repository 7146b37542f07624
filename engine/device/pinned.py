"""Host memory that a GPU copies from and to: taken for a transfer, kept for the next of its size.

To allocate such memory stops the GPU, so a restoration should not, once the first has run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

#: Of idle blocks: a restoration of 4 million pixels has about 150 MiB, with 100 steps that each have noise.
BYTES_KEPT = 512 << 20


class Block(Protocol):
    """Memory that somebody allocated."""

    def close(self) -> None: ...


class PinnedPool:
    """Blocks by size.

    Args:
        allocate: returns new memory of a number of bytes.
    """

    def __init__(self, allocate: Callable[[int], Block]) -> None:
        self._allocate = allocate
        self._idle: list[tuple[int, Block]] = []  # what was given back last stands last
        self._is_closed = False

    def take(self, nbytes: int) -> Block:
        """Return memory of exactly this size, which is the caller's until it is given back."""
        for place in range(len(self._idle) - 1, -1, -1):
            if self._idle[place][0] == nbytes:
                return self._idle.pop(place)[1]
        return self._allocate(nbytes)

    def give(self, nbytes: int, block: Block) -> None:
        """Take memory back that nothing reads or writes any more."""
        if self._is_closed:
            block.close()
            return
        self._idle.append((nbytes, block))
        while sum(size for size, _ in self._idle) > BYTES_KEPT:
            self._idle.pop(0)[1].close()

    def close(self) -> None:
        """Give back what is not in use, and from now on what comes back."""
        self._is_closed = True
        while self._idle:
            self._idle.pop()[1].close()
