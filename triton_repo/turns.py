"""One network at a time on a CPU, whatever process of the server it runs in.

A pass uses every core. Two passes at once, each with a thread on every core, take longer than one after the other:
threads wait for those that the other pass keeps from the cores. (The demo's UNet twice: 90 instead of 75 ms, on two
cores of an AMD EPYC, 2026-11-28.)
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

from engine.backends.base import Backend, Runner
from engine.bundle import Bundle
from engine.device import Array


class Turn:
    """What a process holds while it has its turn: two locks on files, which the system takes from a process that dies.

    Who waits for the turn holds the place behind it. So a process that has just had its turn, and wants another, cannot
    overtake it. A turn within a turn is the same turn. For one thread of each process.

    Args:
        folder: of the lock files, the same for all processes.
    """

    def __init__(self, folder: Path) -> None:
        self._next, self._turn = (
            os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for name in ("next", "turn")
        )
        self._depth = 0

    def __enter__(self) -> None:
        if not self._depth:
            self._take()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            fcntl.flock(self._turn, fcntl.LOCK_UN)

    def let_pass(self) -> None:
        """Let one that waits go first, within a turn; nothing happens where nobody does."""
        fcntl.flock(self._turn, fcntl.LOCK_UN)
        self._take()

    def _take(self) -> None:
        fcntl.flock(self._next, fcntl.LOCK_EX)
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        fcntl.flock(self._next, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the files back."""
        os.close(self._next)
        os.close(self._turn)


class InTurns:
    """A backend whose graphs run in turns with those of the server's other processes.

    Args:
        backend: that runs them.
        folder: see `Turn`.

    Attributes:
        turn: of this process, for work of several passes.
    """

    def __init__(self, backend: Backend, folder: Path) -> None:
        self._backend, self.turn = backend, Turn(folder)

    def open(self, bundle: Bundle, graph: str) -> Runner:
        """Open a bundle's graph; see `Backend`."""
        return _RunsInTurns(self._backend.open(bundle, graph), self.turn)

    def close(self) -> None:
        """Give everything back."""
        self._backend.close()
        self.turn.close()


class _RunsInTurns(Runner):
    def __init__(self, runner: Runner, turn: Turn) -> None:
        super().__init__(runner.spec)
        self._runner, self._turn = runner, turn

    def infer_impl(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with self._turn:
            return self._runner.infer_impl(inputs)

    def close(self) -> None:
        self._runner.close()
