"""How much of a device's memory one process holds, where others use the device too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from engine.device.interface import Device

_POLL_SECONDS = 0.005


class DeviceMemory:
    """Adds up what a process takes of a device in its turns.

    The driver tells what is free, not whose the rest is. But while it is a process's turn the others
    stand still, so all that changes is its own. CUDA's context, made before the first turn, is not in it.

    Attributes:
        peak_bytes: the most that was held.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._held_bytes = 0
        self.peak_bytes = 0

    @contextmanager
    def turn(self, *, watched: bool) -> Iterator[None]:
        """Count what the block takes.

        Args:
            watched: whether to ask all the while, which may slow the block down, or at its end alone:
                enough where memory is taken once and kept.
        """
        before = lowest = self._free()
        ended = threading.Event()

        def watch() -> None:
            nonlocal lowest
            self._device.activate()  # a driver's question is the thread's
            while not ended.wait(_POLL_SECONDS):
                lowest = min(lowest, self._free())

        watcher = threading.Thread(target=watch, daemon=True) if watched else None
        try:
            if watcher:
                watcher.start()
            yield
        finally:
            ended.set()
            if watcher:
                watcher.join()
            after = self._free()
            self.peak_bytes = max(self.peak_bytes, self._held_bytes + before - min(lowest, after))
            self._held_bytes += before - after

    def _free(self) -> int:
        return self._device.memory_bytes()[0]
