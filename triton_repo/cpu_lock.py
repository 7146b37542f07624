"""One network at a time on a CPU, whatever process of the server it runs in.

A pass uses every core. Two passes at once, each with a thread on every core, take longer than one after the other:
threads wait for those that the other pass keeps from the cores. (A guided step of the demo's UNet at 384 × 256, in two
processes: 179 ms for both at once, 143 ms in turns, medians on two cores of an AMD EPYC, 2026-11-28.)
"""

from __future__ import annotations

import fcntl
import os
from contextlib import nullcontext
from pathlib import Path


class FairLock:
    """What a process holds while it has its turn: two locks on files, which the system takes from a process that dies.

    Who waits for the turn holds the place behind it. So a process that has just had its turn, and wants another, cannot
    overtake it. For one thread of each process.

    Args:
        folder: of the lock files, the same for all processes. They are closed with the process.
    """

    def __init__(self, folder: Path) -> None:
        self._next, self._turn = (
            os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for name in ("next", "turn")
        )

    def __enter__(self) -> None:
        fcntl.flock(self._next, fcntl.LOCK_EX)
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        fcntl.flock(self._next, fcntl.LOCK_UN)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._turn, fcntl.LOCK_UN)

    def yield_to_waiter(self) -> None:
        """Let one that waits go first, within a turn; nothing happens where nobody does."""
        self.__exit__()
        self.__enter__()


class NoLock(nullcontext[None]):
    """The same for a process whose networks keep nobody waiting."""

    def yield_to_waiter(self) -> None:
        """Nobody waits."""
