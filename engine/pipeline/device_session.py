"""The device's executor: all graphs on two streams, and as few waits as can be.

    main   upload ─ denoise encoder ─┬─ steps … steps ─┐
    side   text ─────────────────────┴─ stage 1 (─ stage 1 encoder) ─┴─ vae decoder ─ download

The order, and which operation runs on which stream, are the recipe's (`engine.recipe`). The host waits for the text,
which it joins, and for the end. A stream waits where an operation reads what the other stream has written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np

from engine.backends.base import as_dtype
from engine.backends.buffers import BufferRunner
from engine.backends.runners import Runners
from engine.bundle.graphspec import TensorSpec, resolve
from engine.bundle.manifest import Bundle
from engine.device.interface import STREAMS, Buffer, Device, Download, Event, Stream
from engine.errors import close_after, close_all
from engine.image.photo import Pixels
from engine.memory.residency import (
    Activations,
    MemoryPlan,
    MemoryRequirements,
    Residency,
    Workload,
    plan_residency,
)
from engine.pipeline.device_loop import DeviceLoop, LoopInputs, loop_arrays, stack_texts
from engine.pipeline.device_tiles import VaeTiles, tile_arrays
from engine.pipeline.host import Listener, NoiseInput
from engine.pipeline.plan import RestorationPlan
from engine.pipeline.text import Conditioning
from engine.recipe import GRAPHS, Operation, graphs_of_phase
from engine.timings import Timings

#: Values of the recipe that a session keeps on the device: arrays of pixels, and latents.
_PIXELS = ("lq", "stage1", "pixels")
_LATENTS = ("z_lq", "z_center", "z")

#: Returns the conditioning of texts, and adds the time that it takes.
EncodeTexts = Callable[..., Sequence[Conditioning]]


@runtime_checkable
class DeviceBackend(Protocol):
    """A backend whose runners share a device and its streams.

    Attributes:
        device: that everything is on.
        streams: by the names of `engine.device.interface.STREAMS`.
    """

    device: Device
    streams: dict[str, Stream]

    def open(self, bundle: Bundle, graph: str) -> BufferRunner:
        """Return a runner for one of a bundle's graphs, as `Backend.open`."""
        ...

    def known_activations(self, bundle: Bundle, graph: str, sizes: Sequence[Mapping[str, int]]) -> Activations | None:
        """Return what `BufferRunner.activations` would, or None if the graph has to be opened for it."""
        ...

    def sizes_at_opening(self, bundle: Bundle, graph: str) -> Sequence[Mapping[str, int]]:
        """Return the sizes, as what symbols stand for, at which a graph is run when it is opened, to check it."""
        ...

    def can_stream_weights(self, bundle: Bundle, graph: str) -> bool:
        """Tell whether a part of a graph's weights may stay on the host."""
        ...

    def limit_weights(self, on_device: Mapping[str, int]) -> None:
        """Say how many bytes of weights the named graphs may have on the device, once they are opened again.

        Graphs that are not named have all of them there.
        """
        ...

    def reserve(self, stream: str, nbytes: int) -> None:
        """Set the memory for activations of a stream; nothing that uses it may be under way."""
        ...


class DeviceSession:
    """Restores on one device.

    Args:
        backend: whose device and streams are used.
        runners: of the bundle's graphs on it.
        bundle: whose graphs they are.
        encode_texts: returns the conditioning of a plan's texts.
        budget_bytes: of the device's memory; what does not fit is opened and closed by phase. None
            means that everything stays, or that there is an error.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        runners: Runners,
        bundle: Bundle,
        encode_texts: EncodeTexts,
        budget_bytes: int | None = None,
    ) -> None:
        self._backend, self._device, self._runners = backend, backend.device, runners
        self._streams = {name: backend.streams[name] for name in STREAMS}
        self._bundle, self._encode_texts, self._budget_bytes = bundle, encode_texts, budget_bytes
        self.free_bytes = backend.device.memory_bytes()[0]
        self._buffers: dict[str, Buffer] = {}
        self._loop: DeviceLoop | None = None
        self._tiles: VaeTiles | None = None
        self._workload: Workload | None = None
        self._residency: Residency | None = None

    def close(self) -> None:
        """Give the buffers back; runners and streams are the caller's."""
        buffers, self._buffers = self._buffers, {}
        self._workload = self._tiles = None
        close_all(self._close_loop, *(buffer.close for buffer in buffers.values()))

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
        everything_fits = sum(requirements.weights.values()) + requirements.buffers <= allowed
        activations = {}
        for graph in GRAPHS:
            at_opening = self._backend.sizes_at_opening(self._bundle, graph)
            sizes = (*workload.sizes(self._bundle.spec(graph)), *at_opening)
            known = self._backend.known_activations(self._bundle, graph, sizes)
            # Where all graphs stay they are opened anyway, and know what just these sizes need.
            if known is None or (everything_fits and not known.is_exact):
                known = self._runner(graph).activations(sizes)
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

    def run(
        self, plan: RestorationPlan, lq: Pixels, noise: NoiseInput, listener: Listener, times: Timings
    ) -> dict[str, Pixels]:
        """Run a plan; see `engine.pipeline.host.Executor.run`. Steps are told without latents: those stay here."""
        self._device.activate()
        with times.graph("gpu"):
            try:
                return _Run(self, plan, lq, noise, listener, times).result()
            except BaseException as error:
                # What is under way still uses the buffers. A device that has failed fails here again.
                close_after(error, self._synchronize)
                raise

    def _enqueue_vae(self, stream: Stream, graph: str, source: Buffer, target: Buffer) -> None:
        """Put a graph of the VAE on a stream, at the whole or in tiles."""
        runner = self._runner(graph)
        assert self._workload is not None
        if self._workload.vae_tiles is None:
            (given,), (made,) = runner.spec.inputs, runner.spec.outputs
            runner.enqueue(stream, {given.name: source}, {made.name: target})
            return
        if self._tiles is None:
            for name, (shape, dtype) in tile_arrays(self._bundle, self._workload).items():
                self._buffers[name] = self._device.buffer(shape, dtype)
            self._tiles = VaeTiles(self._bundle, self._workload.vae_tiles, self._buffers, stream)
        self._tiles.enqueue(stream, runner, source, target)

    def _requirements(self, workload: Workload, activations: Mapping[str, Activations]) -> MemoryRequirements:
        bundle = self._bundle
        return MemoryRequirements(
            weights={graph: bundle.manifest.graphs[graph].weights_bytes for graph in GRAPHS},
            activations=activations,
            buffers=buffer_bytes(bundle, workload) + self._opening_bytes,
            streamable=frozenset(graph for graph in GRAPHS if self._backend.can_stream_weights(bundle, graph)),
        )

    @property
    def _opening_bytes(self) -> int:
        """Bytes of the arrays that the run which checks a graph has beside a restoration's, at most."""
        needed = 0
        for graph in GRAPHS:
            spec = self._bundle.spec(graph)
            for size in self._backend.sizes_at_opening(self._bundle, graph):
                needed = max(needed, sum(tensor_bytes(tensor, size) for tensor in (*spec.inputs, *spec.outputs)))
        return needed

    def _plan_residency(self, requirements: MemoryRequirements) -> Residency:
        return plan_residency(requirements, self.free_bytes, self._budget_bytes, where=self._bundle.path)

    def _make_room(self, plan: RestorationPlan) -> None:
        """Give back what another workload needed."""
        assert plan.memory is not None, "the plan is for a CPU"
        found = plan.memory.residency
        if plan.workload != self._workload or found != self._residency:
            self._synchronize()
            self.close()
            changed = {graph for graph, size in found.on_device.items() if size != self._on_device(graph)}
            self._runners.close(sorted(changed))
            self._backend.limit_weights({graph: found.on_device[graph] for graph in found.streamed})
            self._workload, self._residency = plan.workload, found

    def _reserve(self) -> None:
        """Set the memory for activations: recorded steps hold its address, so it has its size before the first step."""
        assert self._residency is not None
        for stream, nbytes in self._residency.arenas.items():
            self._backend.reserve(stream, nbytes)

    def _on_device(self, graph: str) -> int:
        """Return how many bytes of a graph's weights the present arrangement has on the device."""
        everything = self._bundle.manifest.graphs[graph].weights_bytes
        return everything if self._residency is None else self._residency.on_device[graph]

    def _buffer(self, name: str, shape: Sequence[int]) -> Buffer:
        """Return a buffer that is kept from one restoration to the next, while sizes are the same."""
        assert name in (*_PIXELS, *_LATENTS), name
        if name not in self._buffers:
            self._buffers[name] = self._device.buffer(shape, "float32")
        return self._buffers[name]

    def _closed_in(self, phase: str) -> set[str]:
        """Return the graphs that a phase has no room for."""
        assert self._residency is not None
        return set(GRAPHS) - self._residency.kept - set(graphs_of_phase(phase))

    def _enter(self, phase: str) -> None:
        """Make room for a phase's graphs, where not all fit at once."""
        closed = sorted(graph for graph in self._closed_in(phase) if graph in self._runners.opened)
        if not closed:
            return
        self._synchronize()
        if any(self._bundle.spec(graph).role == "denoiser" for graph in closed):
            self._close_loop()
        self._runners.close(closed)

    def _runner(self, graph: str) -> BufferRunner:
        return cast(BufferRunner, self._runners.open(graph))

    def _open_loop(self) -> DeviceLoop:
        if self._loop is None:
            self._loop = DeviceLoop(
                self._device, self._streams["main"], self._runner("controlnet"), self._runner("unet")
            )
        return self._loop

    def _close_loop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()

    def _synchronize(self) -> None:
        close_all(*(stream.synchronize for stream in self._streams.values()))


class _Run:
    """One restoration: the values of the recipe as buffers, and the events that say when each is written."""

    def __init__(
        self,
        session: DeviceSession,
        plan: RestorationPlan,
        lq: Pixels,
        noise: NoiseInput,
        listener: Listener,
        times: Timings,
    ) -> None:
        self._session, self._plan, self._lq = session, plan, lq
        self._noise, self._listener, self._times = noise, listener, times
        self._clock = _Clock()
        latent = (plan.photos, session._bundle.latent_channels, *plan.latent)
        self._shapes = {**dict.fromkeys(_PIXELS, lq.shape), **dict.fromkeys(_LATENTS, latent)}
        self._texts: Sequence[Conditioning] = ()
        #: The stream that has written a value last, and its event.
        self._written: dict[str, tuple[str, Event]] = {}
        self._downloads: dict[str, Download] = {}
        #: Values in buffers that are not the session's.
        self._own: dict[str, Buffer] = {}

    def result(self) -> dict[str, Pixels]:
        """Run the plan's operations, and return what operations on photos read of them."""
        session, plan = self._session, self._plan
        session._make_room(plan)
        on_photos = {name for each in plan.operations if each.kind == "photo" for name in each.reads}
        device_operations = [each for each in plan.operations if each.kind != "photo"]
        for index, operation in enumerate(device_operations):
            self._listener.on_stage(operation.name)
            session._enter(operation.phase)
            if index == 0:
                session._reserve()
                session._streams[operation.stream].upload(self._buffer("lq"), self._lq)
            self._wait_for_reads(operation)
            if operation.kind == "text":
                self._texts = session._encode_texts(plan.texts, times=self._times)
            elif operation.kind == "vae":
                self._run_vae(operation)
            else:
                following = device_operations[index + 1].phase
                self._run_steps(operation, following)
            for name in operation.writes:
                if name in on_photos:
                    stream = session._streams[operation.stream]
                    self._downloads[name] = stream.download(self._buffer(name))
        results = {name: download.result() for name, download in self._downloads.items()}
        session._synchronize()
        self._times.device_ms.update(self._clock.read())
        return results

    def _buffer(self, name: str) -> Buffer:
        return self._own.get(name) or self._session._buffer(name, self._shapes[name])

    def _wait_for_reads(self, operation: Operation) -> None:
        """Have a stream wait for what the other one writes."""
        for name in operation.reads:
            writer, event = self._written.get(name, (operation.stream, None))
            if writer != operation.stream and event is not None:
                self._session._streams[operation.stream].wait(event)

    def _run_vae(self, operation: Operation) -> None:
        (graph,), (source,), (target,) = operation.graphs, operation.reads, operation.writes
        stream = self._session._streams[operation.stream]
        self._clock.start(operation.name, stream)
        self._session._enqueue_vae(stream, graph, self._buffer(source), self._buffer(target))
        self._written[target] = (operation.stream, self._clock.stop(operation.name, stream))

    def _run_steps(self, operation: Operation, following: str) -> None:
        session, plan, clock = self._session, self._plan, self._clock
        stream = session._streams[operation.stream]
        loop = session._open_loop()
        spec = session._bundle.spec("unet")
        context, vector = (
            stack_texts([as_dtype(getattr(text, name), spec.tensor(name).dtype) for text in self._texts], plan.photos)
            for name in ("context", "vector")
        )
        center = self._buffer("z_center") if plan.table.uses_center else None
        noise = self._noise.source(self._shapes["z"][1:])
        clock.start("noise and texts", stream)
        inputs = LoopInputs(self._buffer("z_lq"), context, vector, noise, center, plan.workload.latent_tiles)
        loop.prepare(plan.table, inputs)
        clock.stop("noise and texts", stream)
        clock.start(operation.name, stream)
        for progress in loop.run(plan.table):
            self._listener.on_step(progress)
        if loop.refusal is not None:
            self._listener.on_note(loop.refusal)
        sampled = clock.stop(operation.name, stream)
        # The loop's latent is the result, unless its buffers go with its networks before it is read.
        if session._closed_in(following) & set(operation.graphs):
            stream.copy(self._buffer("z"), loop.latent)
            sampled = stream.record()
        else:
            self._own["z"] = loop.latent
        self._written["z"] = (operation.stream, sampled)


def buffer_bytes(bundle: Bundle, work: Workload) -> int:
    """Return what arrays between the graphs take on a device."""
    decoder, unet = bundle.spec("vae_decoder"), bundle.spec("unet")
    symbols = {"B": work.photos, "h": work.height, "w": work.width}
    pixels, latent = (resolve(decoder.tensor(name).shape, symbols) for name in ("pixels", "z"))
    context = resolve(unet.tensor("context").shape, {"B": work.rows, "k": work.chunks})
    own, tensors = loop_arrays(unet, (latent, context, work.draws, work.latent_tiles))
    arrays = (*own.values(), *tensors.values(), *tile_arrays(bundle, work).values())
    loop = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)
    floats = len(_PIXELS) * math.prod(pixels) + len(_LATENTS) * math.prod(latent)
    return loop + floats * np.dtype(np.float32).itemsize


def tensor_bytes(tensor: TensorSpec, symbols: Mapping[str, int]) -> int:
    """Return what an array takes at a size."""
    return math.prod(resolve(tensor.shape, symbols)) * np.dtype(tensor.dtype).itemsize


class _Clock:
    """Measures stages by events, without stopping a stream."""

    def __init__(self) -> None:
        self._marks: dict[str, list[Event]] = {}

    def start(self, stage: str, stream: Stream) -> Event:
        self._marks[stage] = [stream.record()]
        return self._marks[stage][0]

    def stop(self, stage: str, stream: Stream) -> Event:
        self._marks[stage].append(stream.record())
        return self._marks[stage][1]

    def read(self) -> dict[str, float]:
        """Return each stage's milliseconds; all of them must have ended."""
        return {stage: stop.ms_since(start) for stage, (start, stop) in self._marks.items()}
