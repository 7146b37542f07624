"""A bundle's opened graphs: opened when they are first needed, and kept, or closed stage by stage."""

from __future__ import annotations

from collections.abc import Iterable

from engine.backends.base import Backend, Runner, SegmentBackend
from engine.bundle.manifest import Bundle
from engine.errors import BackendError, close_all
from engine.memory.host_memory import release_free_memory
from engine.memory.residency import needed_beside
from engine.memory.vae_slices import OpenSegment
from engine.timings import Timings


class Runners:
    """The runners of one bundle on one backend.

    Args:
        backend: opens them; it is the caller's to close.
        bundle: whose graphs they are.
        kept: those that stay open; any other one is closed when a graph of another stage is opened.
            None means that all stay.

    Attributes:
        opened: by the graphs' names.
    """

    def __init__(self, backend: Backend, bundle: Bundle, kept: frozenset[str] | None = None) -> None:
        self._backend, self._bundle, self._kept = backend, bundle, kept
        self.opened: dict[str, Runner] = {}

    def open(self, graph: str, times: Timings | None = None) -> Runner:
        """Return a graph's runner.

        Args:
            graph: its name.
            times: that the time for opening it is added to.
        Raises:
            BundleError, BackendError: as `Backend.open`.
        """
        runner = self.opened.get(graph)
        if runner is None:
            self._make_room(graph)
            with (times or Timings()).graph(f"load {graph}"):
                runner = self.opened[graph] = self._backend.open(self._bundle, graph)
        return runner

    def open_segment(self, graph: str) -> OpenSegment:
        """Return what opens the segments of a graph of the VAE, for a run over them.

        Raises:
            BackendError: the bundle has no segments, or the backend runs whole graphs only.
        """
        self._make_room(graph)
        backend, bundle = self._backend, self._bundle
        if not bundle.manifest.graphs[graph].segments or not isinstance(backend, SegmentBackend):
            raise BackendError(
                "the VAE cannot run in slices here",
                where=graph,
                expected="a bundle with segments, on a CPU",
                fix="restore with --vae-tiles auto, fast or off",
            )
        return lambda segment: backend.open_segment(
            segment, bundle.read_segment(graph, segment), bundle.path, bundle.manifest.precision
        )

    def _make_room(self, graph: str) -> None:
        """Close what is not kept and not needed beside a graph."""
        if self._kept is not None:
            self.close(set(self.opened) - self._kept - needed_beside(graph))

    def close(self, graphs: Iterable[str] | None = None) -> None:
        """Give the memory of some graphs back, or of all; they are opened again when they are needed."""
        closing = [
            runner
            for graph in list(self.opened if graphs is None else graphs)
            if (runner := self.opened.pop(graph, None))
        ]
        close_all(*(runner.close for runner in closing))
        if closing:
            release_free_memory()
