"""A restoration on a device: all graphs, two streams, and as few waits as can be.

    main   upload ─ denoise encoder ─┬─ steps … steps ─┐
    side   text ─────────────────────┴─ stage 1 (─ pull's center) ─┴─ decode ─ download

The host waits for the text, which it joins, and for the end. The steps need the text and, if the pull
is on, its center; the colour fix's stage 1 is decoded beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import numpy as np

from engine.backends.base import as_dtype
from engine.backends.buffers import BufferRunner
from engine.backends.runners import Runners
from engine.bundle.graphspec import resolve
from engine.bundle.manifest import GRAPHS, Bundle
from engine.device.interface import STREAMS, Buffer, Device, Event, Stream
from engine.device.kernels import noisy_steps
from engine.image.photo import Pixels
from engine.memory.residency import PHASES, Activations, Need, Residency, Work, arrange
from engine.pipeline.device_loop import DeviceLoop, LoopInputs, loop_arrays, stack_texts
from engine.pipeline.device_windows import VaeTiles, tile_arrays
from engine.pipeline.text import Conditioning
from engine.sampling.sampler import Latent, Progress, StepTable
from engine.sampling.tiling import Tiling
from engine.timings import Timings

#: What a session keeps beside the loop's arrays: photos, and latents.
_PIXEL_BUFFERS = ("lq", "stage 1", "restored")
_LATENT_BUFFERS = ("z_lq", "center", "z")


@dataclass(frozen=True)
class Job:
    """What is restored together.

    Attributes:
        lq: f32[B,3,8h,8w] in [-1, 1].
        work: its sizes, from `work_for`.
        texts: returns the positive and, if any step is guided, the negative text's conditioning.
        table: of the sampler.
        noise: the field of a draw, f32[B,C,h,w].
        wants_stage_1: whether the colour fix needs it.
        on_step: called after every step.
    """

    lq: Pixels
    work: Work
    texts: Callable[[], Sequence[Conditioning]]
    table: StepTable
    noise: Callable[[int], Latent]
    wants_stage_1: bool
    on_step: Callable[[Progress], None]


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
        self._main, self._side = (backend.streams[name] for name in STREAMS)
        self._bundle, self._budget_bytes = bundle, budget_bytes
        self.free_bytes = backend.device.memory_bytes()[0]
        self._buffers: dict[str, Buffer] = {}
        self._loop: DeviceLoop | None = None
        self._tiles: VaeTiles | None = None
        self._work: Work | None = None
        self._residency: Residency | None = None

    def close(self) -> None:
        """Give the buffers back; runners and streams are the caller's."""
        self._close_loop()
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        self._work = self._tiles = None

    def plan(self, work: Work) -> tuple[Need, Residency]:
        """Return what a work needs of the device's memory, and what will stay there.

        What the library alone knows is asked once for each plan: its graphs are opened for that.

        Raises:
            BackendError: it does not fit, or a plan does not take the size.
        """
        self._device.activate()
        need = self._need(work, {})
        # What does not fit even without activations is told before anything is loaded.
        self._arrange(need)
        everything_fits = sum(need.weights.values()) + need.buffers <= min(
            self.free_bytes, self._budget_bytes or self.free_bytes
        )
        activations = {}
        for graph in GRAPHS:
            sizes = work.sizes(self._bundle.spec(graph))
            known = self._backend.known_activations(self._bundle, graph, sizes)
            if known is None:
                known = self._runner(graph).activations(sizes)
                if not everything_fits:
                    self._runners.close([graph])
            activations[graph] = known
        need = self._need(work, activations)
        return need, self._arrange(need)

    def time_networks(self, repeats: int, *, guided: bool) -> float:
        """Return what ControlNet and UNet alone take per step; see `DeviceLoop.time_networks`."""
        assert self._loop is not None, "no restoration yet, or its networks were released"
        self._device.activate()
        return self._loop.time_networks(repeats, guided=guided)

    def restore(self, job: Job, times: Timings) -> tuple[Pixels, Pixels | None]:
        """Return the restored pixels and, where it is wanted, stage 1, f32[B,3,8h,8w] each.

        Raises:
            BackendError: a graph fails, or memory runs out.
        """
        self._device.activate()
        try:
            return self._restore(job, times)
        except BaseException:
            self._synchronize()  # what is under way still uses the buffers
            raise

    def _restore(self, job: Job, times: Timings) -> tuple[Pixels, Pixels | None]:
        main, side = self._main, self._side
        clock = _Clock()
        self._make_room(job.work)
        spec = self._bundle.spec("denoise_encoder")
        latent = resolve(spec.tensor("z").shape, spec.sizes_of({"pixels": job.lq.shape}))
        lq, z_lq = self._buffer("lq", job.lq.shape), self._buffer("z_lq", latent)
        main.upload(lq, job.lq)
        clock.start("denoise encoder", main)
        self._enqueue_vae(main, "denoise_encoder", lq, z_lq)
        encoded = clock.stop("denoise encoder", main)
        self._enter(1)
        texts = job.texts()
        stage_1 = center = None
        if job.wants_stage_1 or job.table.uses_center:
            self._enter(2)
            decoded = self._buffer("stage 1", job.lq.shape)
            side.wait(encoded)
            clock.start("stage 1", side)
            self._enqueue_vae(side, "vae_decoder", z_lq, decoded)
            ready = clock.stop("stage 1", side)
            if job.table.uses_center:
                center = self._buffer("center", latent)
                clock.start("stage 1 encoder", side)
                self._enqueue_vae(side, "vae_encoder", decoded, center)
                ready = clock.stop("stage 1 encoder", side)
                main.wait(ready)
            stage_1 = side.download(decoded)
        self._enter(3)
        loop = self._open_loop()
        spec = self._runner("unet").spec
        context, vector = (
            stack_texts([as_dtype(getattr(text, name), spec.tensor(name).dtype) for text in texts], len(job.lq))
            for name in ("context", "vector")
        )
        clock.start("noise and texts", main)
        loop.prepare(job.table, LoopInputs(z_lq, context, vector, job.noise, center, job.work.windows))
        clock.stop("noise and texts", main)
        clock.start("steps", main)
        for progress in loop.run(job.table):
            job.on_step(progress)
        sampled = clock.stop("steps", main)
        z = loop.latent
        if self._closed_in(4) & {"controlnet", "unet"}:  # the loop's buffers go with its networks
            kept = self._buffer("z", latent)
            main.copy(kept, z)
            z, sampled = kept, main.record()
        del loop  # what is held here could not be released by phase
        self._enter(4)
        side.wait(sampled)
        restored = self._buffer("restored", job.lq.shape)
        clock.start("vae decoder", side)
        self._enqueue_vae(side, "vae_decoder", z, restored)
        clock.stop("vae decoder", side)
        result = side.download(restored).result()
        self._synchronize()
        times.device_ms.update(clock.read())
        return result, stage_1.result() if stage_1 is not None else None

    def _enqueue_vae(self, stream: Stream, graph: str, source: Buffer, target: Buffer) -> None:
        """Put a graph of the VAE on a stream, at the whole or in tiles."""
        runner = self._runner(graph)
        assert self._work is not None
        if self._work.tiles is None:
            (given,), (made,) = runner.spec.inputs, runner.spec.outputs
            runner.enqueue(stream, {given.name: source}, {made.name: target})
            return
        if self._tiles is None:
            for name, (shape, dtype) in tile_arrays(self._bundle, self._work).items():
                self._buffers[name] = self._device.buffer(shape, dtype)
            self._tiles = VaeTiles(self._bundle, self._work.tiles, self._buffers, stream)
        self._tiles.enqueue(stream, runner, source, target)

    def _need(self, work: Work, activations: Mapping[str, Activations]) -> Need:
        bundle = self._bundle
        return Need(
            weights={graph: bundle.manifest.graphs[graph].weights_bytes for graph in GRAPHS},
            activations=activations,
            buffers=buffer_bytes(bundle, work),
            streamable=frozenset(graph for graph in GRAPHS if self._backend.can_stream_weights(bundle, graph)),
        )

    def _arrange(self, need: Need) -> Residency:
        return arrange(need, self.free_bytes, self._budget_bytes, where=self._bundle.path)

    def _make_room(self, work: Work) -> None:
        """Give back what another work needed, enter the first phase, and set the memory for activations.

        Recorded steps hold its address, so it has its size before the first step.
        """
        if work != self._work:
            _, found = self.plan(work)
            self._synchronize()
            self.close()
            changed = {graph for graph, size in found.on_device.items() if size != self._on_device(graph)}
            self._runners.close(sorted(changed))
            self._backend.limit_weights({graph: found.on_device[graph] for graph in found.streamed})
            self._work, self._residency = work, found
        assert self._residency is not None
        self._enter(0)
        for stream, nbytes in self._residency.arenas.items():
            self._backend.reserve(stream, nbytes)

    def _on_device(self, graph: str) -> int:
        """Return how many bytes of a graph's weights the present arrangement has on the device."""
        everything = self._bundle.manifest.graphs[graph].weights_bytes
        return everything if self._residency is None else self._residency.on_device[graph]

    def _buffer(self, name: str, shape: Sequence[int]) -> Buffer:
        """Return a buffer that is kept from one restoration to the next, while sizes are the same."""
        assert name in (*_PIXEL_BUFFERS, *_LATENT_BUFFERS), name
        if name not in self._buffers:
            self._buffers[name] = self._device.buffer(shape, "float32")
        return self._buffers[name]

    def _closed_in(self, phase: int) -> set[str]:
        """Return the graphs that a phase has no room for."""
        assert self._residency is not None
        return set(GRAPHS) - self._residency.kept - set(PHASES[phase])

    def _enter(self, phase: int) -> None:
        """Make room for a phase's graphs, where not all fit at once."""
        closed = sorted(graph for graph in self._closed_in(phase) if graph in self._runners.opened)
        if not closed:
            return
        self._synchronize()
        if {"controlnet", "unet"} & set(closed):
            self._close_loop()
        self._runners.close(closed)

    def _runner(self, graph: str) -> BufferRunner:
        return cast(BufferRunner, self._runners.open(graph))

    def _open_loop(self) -> DeviceLoop:
        if self._loop is None:
            self._loop = DeviceLoop(self._device, self._main, self._runner("controlnet"), self._runner("unet"))
        return self._loop

    def _close_loop(self) -> None:
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _synchronize(self) -> None:
        self._main.synchronize()
        self._side.synchronize()


def work_for(
    photos: int,
    latent: tuple[int, int],
    texts: int,
    chunks: int,
    table: StepTable,
    windows: Tiling | None = None,
    tiles: Tiling | None = None,
) -> Work:
    """Return the sizes of a restoration.

    Args:
        photos: how many are restored together.
        latent: height and width, in cells.
        table: of the sampler.
        windows, tiles: of the latent, as `engine.memory.residency.Work` takes them; of one window, they are the whole.
    """
    passes = tuple(sorted({2 if step.guided else 1 for step in table.steps}))
    parts = (None if each is None or each.is_whole else each for each in (windows, tiles))
    return Work(photos, *latent, texts, chunks, passes, len(noisy_steps(table)), *parts)


def buffer_bytes(bundle: Bundle, work: Work) -> int:
    """Return what arrays between the graphs take on a device."""
    decoder, unet = bundle.spec("vae_decoder"), bundle.spec("unet")
    symbols = {"B": work.photos, "h": work.height, "w": work.width}
    pixels, latent = (resolve(decoder.tensor(name).shape, symbols) for name in ("pixels", "z"))
    context = resolve(unet.tensor("context").shape, {"B": work.rows, "k": work.chunks})
    own, tensors = loop_arrays(unet, (latent, context, work.draws, work.windows))
    arrays = (*own.values(), *tensors.values(), *tile_arrays(bundle, work).values())
    loop = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)
    floats = len(_PIXEL_BUFFERS) * math.prod(pixels) + len(_LATENT_BUFFERS) * math.prod(latent)
    return loop + floats * np.dtype(np.float32).itemsize


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
