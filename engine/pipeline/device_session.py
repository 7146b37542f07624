"""What a bundle's graphs and arrays are on a device: which are there, where, and which make room for which."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import numpy as np

from engine.backends.buffers import BufferRunner, DeviceBackend, tensor_arrays
from engine.backends.runners import Runners
from engine.bundle.graphspec import DType, resolve
from engine.bundle.manifest import Bundle
from engine.device.interface import STREAMS, Array, Buffer, Stream
from engine.device.slab import Slab, slab_bytes
from engine.errors import close_after, close_all
from engine.memory.residency import (
    Activations,
    MemoryPlan,
    MemoryRequirements,
    Residency,
    Workload,
    plan_residency,
)
from engine.pipeline.device_loop import DeviceLoop, loop_arrays
from engine.pipeline.device_tiles import Arrays, VaeTiles, tile_arrays
from engine.recipe import GRAPHS, STEP_GRAPHS, stream_of
from engine.sampling.tiling import Tiling
from engine.timings import Timings

#: Values of the recipe that a session keeps on the device: arrays of pixels, and latents.
PIXELS = ("lq", "stage1", "pixels")
LATENTS = ("z_lq", "z_center", "z")


class DeviceSession:
    """One device's memory and streams, arranged for what is run on it.

    Args:
        backend: whose device and streams are used.
        runners: of the bundle's graphs on it.
        bundle: whose graphs they are.
        budget_bytes: of the device's memory; what does not fit is opened and closed by phase. None
            means that everything stays, or that there is an error.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        runners: Runners,
        bundle: Bundle,
        budget_bytes: int | None = None,
    ) -> None:
        self._backend, self._device, self._runners = backend, backend.device, runners
        self.streams = {name: backend.streams[name] for name in STREAMS}
        self.bundle, self._budget_bytes = bundle, budget_bytes
        self.free_bytes = backend.device.memory_bytes()[0]
        self._slab: Slab | None = None
        self._loop: DeviceLoop | None = None
        self._tiles: VaeTiles | None = None
        self._workload: Workload | None = None
        self._residency: Residency | None = None

    def close(self) -> None:
        """Give the buffers back; runners and streams are the caller's."""
        slab, self._slab = self._slab, None
        self._workload = self._tiles = None
        close_all(self._close_loop, *(() if slab is None else (slab.close,)))

    def plan(self, workload: Workload) -> MemoryPlan:
        """Return what a workload needs of the device's memory, and what will stay there.

        What the library alone knows is asked once for each plan: its graphs are opened for that.

        Raises:
            DoesNotFitError: memory does not hold it, or a TensorRT plan does not take the size.
            BackendError: a graph does not open.
        """
        self._device.activate()
        requirements = self._requirements(workload, {})
        # What does not fit even without activations is told before anything is loaded.
        self._plan_residency(requirements)
        allowed = self.free_bytes if self._budget_bytes is None else min(self.free_bytes, self._budget_bytes)
        # While graphs are asked, what is there for another workload still is.
        beside = max(requirements.buffers, self._bytes_beside_weights)
        everything_fits = sum(requirements.weights.values()) + beside <= allowed
        activations = {}
        for graph in workload.graphs:
            at_opening = self._backend.sizes_at_opening(self.bundle, graph)
            sizes = (*workload.sizes(self.bundle.spec(graph)), *at_opening)
            known = self._backend.known_activations(self.bundle, graph, sizes)
            # Where all graphs stay they are opened anyway, and know what just these sizes need.
            if known is None or (everything_fits and not known.is_exact):
                known = self.runner(graph).activations(sizes)
                if not everything_fits:
                    self._runners.close([graph])
            activations[graph] = known
        requirements = self._requirements(workload, activations)
        return MemoryPlan(requirements, self._plan_residency(requirements), self.free_bytes)

    def time_networks(self, repeats: int, *, guided: bool) -> float:
        """Return what ControlNet and UNet alone take per step; see `DeviceLoop.time_networks`."""
        assert self._loop is not None, "no restoration yet, or its networks were released"
        self._device.activate()
        return self._loop.time_networks(repeats, guided=guided)

    @contextmanager
    def working(self, times: Timings) -> Iterator[None]:
        """Have the device be the calling thread's, count the time, and let nothing be under way behind an error."""
        self._device.activate()
        with times.graph("gpu"):
            try:
                yield
            except BaseException as error:
                # What is under way still uses the buffers. A device that has failed fails here again.
                close_after(error, self.synchronize)
                raise

    def enqueue_vae(self, stream: Stream, graph: str, source: Buffer, target: Buffer) -> None:
        """Put a graph of the VAE on a stream, at the whole or in tiles."""
        runner = self.runner(graph)
        assert self._workload is not None
        if self._workload.vae_tiles is None:
            (given,), (made,) = runner.spec.inputs, runner.spec.outputs
            runner.enqueue(stream, {given.name: source}, {made.name: target})
            return
        if self._tiles is None:
            self._tiles = VaeTiles(self.bundle, self._workload.vae_tiles, self._memory.buffers, stream)
        self._tiles.enqueue(stream, runner, source, target)

    def run_vae_in_tiles(self, graph: str, image: Array, tiles: Tiling, times: Timings) -> Array:
        """Run a graph of the VAE on an image f32[B,C,H,W] in tiles of the latent, and return what it makes of it."""
        spec = self.bundle.spec(graph)
        (given,), (made,) = spec.inputs, spec.outputs
        shapes = [resolve(tensor.shape, spec.sizes_of({given.name: image.shape})) for tensor in (given, made)]
        with self.working(times):
            stream, runner = self.streams[stream_of(graph)], self.runner(graph)
            ends: dict[str, tuple[tuple[int, ...], DType]] = {
                name: (shape, "float32") for name, shape in zip(("source", "target"), shapes, strict=True)
            }
            slab = Slab(self._device, {**ends, **tile_arrays(self.bundle, len(image), tiles)})
            try:
                stream.upload(slab["source"], np.ascontiguousarray(image))
                in_tiles = VaeTiles(self.bundle, tiles, slab.buffers, stream)
                in_tiles.enqueue(stream, runner, slab["source"], slab["target"])
                found = stream.download(slab["target"]).result()
            except BaseException as error:
                close_after(error, self.synchronize, slab.close)
                raise
            close_all(self.synchronize, slab.close)
        return found

    def _requirements(self, workload: Workload, activations: Mapping[str, Activations]) -> MemoryRequirements:
        bundle = self.bundle
        there = {*workload.graphs, *self._runners.opened}
        return MemoryRequirements(
            weights={graph: bundle.manifest.graphs[graph].weights_bytes if graph in there else 0 for graph in GRAPHS},
            activations=activations,
            buffers=buffer_bytes(bundle, workload) + self._opening_bytes,
            streamable=frozenset(graph for graph in GRAPHS if self._backend.can_stream_weights(bundle, graph)),
        )

    @property
    def _bytes_beside_weights(self) -> int:
        """What arrays and activations of the present arrangement take."""
        if self._workload is None or self._residency is None:
            return 0
        return buffer_bytes(self.bundle, self._workload) + sum(self._residency.arenas.values())

    @property
    def _opening_bytes(self) -> int:
        """Bytes of the arrays that the run which checks a graph has beside a restoration's, at most."""
        needed = 0
        for graph in GRAPHS:
            spec = self.bundle.spec(graph)
            for size in self._backend.sizes_at_opening(self.bundle, graph):
                needed = max(needed, slab_bytes(tensor_arrays(spec, size)))
        return needed

    def _plan_residency(self, requirements: MemoryRequirements) -> Residency:
        return plan_residency(requirements, self.free_bytes, self._budget_bytes, where=self.bundle.path)

    def make_room_for(self, workload: Workload) -> None:
        """Plan a workload and make room for it, unless there is room for it already.

        Raises:
            As `plan`.
        """
        if self._workload is None or not self._workload.covers(workload):
            self.make_room(workload, self.plan(workload).residency)
        self.enter(workload.graphs)
        self.reserve(keep_larger=self._budget_bytes is None)

    def make_room(self, workload: Workload, found: Residency) -> None:
        """Give back what another workload needed."""
        if workload != self._workload or found != self._residency:
            self.synchronize()
            self.close()
            opened = set(self._runners.opened)
            changed = {graph for graph in opened if found.on_device[graph] != self._on_device(graph)}
            self._runners.close(sorted(changed))
            self._backend.limit_weights({graph: found.on_device[graph] for graph in found.streamed})
            self._workload, self._residency = workload, found

    def reserve(self, *, keep_larger: bool = False) -> None:
        """Set the memory for activations: recorded steps hold its address, so it has its size before the first step.

        Args:
            keep_larger: whether what another stage has needed stays, so that stages in turns move nothing.
        """
        assert self._residency is not None
        for stream, nbytes in self._residency.arenas.items():
            self._backend.reserve(stream, nbytes, keep_larger=keep_larger)

    def _on_device(self, graph: str) -> int:
        """Return how many bytes of a graph's weights the present arrangement has on the device."""
        if self._residency is not None and graph in self._residency.streamed:
            return self._residency.on_device[graph]
        return self.bundle.manifest.graphs[graph].weights_bytes

    def buffer(self, name: str) -> Buffer:
        """Return the array of one of the recipe's values, which stays while sizes are the same."""
        return self._memory[name]

    @property
    def _memory(self) -> Slab:
        if self._slab is None:
            assert self._workload is not None
            self._slab = Slab(self._device, _arrays_between(self.bundle, self._workload))
        return self._slab

    def closed_beside(self, graphs: Collection[str]) -> set[str]:
        """Return the graphs that there is no room for beside those of a phase."""
        if self._budget_bytes is None:
            return set()
        found = self._residency
        # What was not there when the present arrangement was made was not counted.
        kept = set() if found is None else {graph for graph in found.kept if found.on_device[graph]}
        return set(GRAPHS) - kept - set(graphs)

    def enter(self, graphs: Collection[str]) -> None:
        """Make room for a phase's graphs, where not all fit at once."""
        closed = sorted(graph for graph in self.closed_beside(graphs) if graph in self._runners.opened)
        if not closed:
            return
        self.synchronize()
        if any(self.bundle.spec(graph).role == "denoiser" for graph in closed):
            self._close_loop()
        self._runners.close(closed)

    def runner(self, graph: str) -> BufferRunner:
        return cast(BufferRunner, self._runners.open(graph))

    def open_loop(self) -> DeviceLoop:
        if self._loop is None:
            self._loop = DeviceLoop(self._device, self.streams["main"], self.runner("controlnet"), self.runner("unet"))
        return self._loop

    def _close_loop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()

    def synchronize(self) -> None:
        close_all(*(stream.synchronize for stream in self.streams.values()))


def buffer_bytes(bundle: Bundle, work: Workload) -> int:
    """Return what arrays between the graphs take on a device."""
    unet = bundle.spec("unet")
    latent = (work.photos, bundle.latent_channels, work.height, work.width)
    context = resolve(unet.tensor("context").shape, {"B": work.rows, "k": work.chunks})
    if work.texts_by_tile and work.latent_tiles is not None:
        context = (len(work.latent_tiles), *context)
    return slab_bytes(loop_arrays(unet, (latent, context, work.latent_tiles))) + slab_bytes(
        _arrays_between(bundle, work)
    )


def _arrays_between(bundle: Bundle, work: Workload) -> Arrays:
    """Return the arrays of the recipe's values, and what a VAE in tiles needs."""
    symbols = {"B": work.photos, "h": work.height, "w": work.width}
    decoder = bundle.spec("vae_decoder")
    pixels, latent = (resolve(decoder.tensor(name).shape, symbols) for name in ("pixels", "z"))
    arrays: Arrays = dict.fromkeys(LATENTS, (latent, "float32"))
    if set(work.graphs) <= set(STEP_GRAPHS):
        return arrays
    arrays |= dict.fromkeys(PIXELS, (pixels, "float32"))
    return {**arrays, **tile_arrays(bundle, work.photos, work.vae_tiles)}
