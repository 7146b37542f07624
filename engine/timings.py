"""Where the time of a restoration goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Timings:
    """Milliseconds per stage; a stage inside another counts only once, as itself.

    Attributes:
        graphs_ms: time inside the backend, by stage.
        outside_ms: all other time, by stage.
        device_ms: by stage, what a device's own clock says. Stages on two streams overlap, so these
            stand beside the others, and do not add up to them.
    """

    graphs_ms: dict[str, float] = field(default_factory=dict)
    outside_ms: dict[str, float] = field(default_factory=dict)
    device_ms: dict[str, float] = field(default_factory=dict)
    _inner_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return sum(self.graphs_ms.values()) + sum(self.outside_ms.values())

    @contextmanager
    def graph(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage inside the backend."""
        with self._measure(self.graphs_ms, stage):
            yield

    @contextmanager
    def outside(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage outside the backend."""
        with self._measure(self.outside_ms, stage):
            yield

    @contextmanager
    def _measure(self, sums_ms: dict[str, float], stage: str) -> Iterator[None]:
        before_ms, self._inner_ms = self._inner_ms, 0.0
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed_ms = (time.perf_counter() - started) * 1e3
            sums_ms[stage] = sums_ms.get(stage, 0.0) + elapsed_ms - self._inner_ms
            self._inner_ms = before_ms + elapsed_ms
