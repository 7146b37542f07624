"""The device's executor: all graphs on two streams, and as few waits as can be.

    main   upload ─ denoise encoder ─┬─ steps … steps ─┐
    side   text ─────────────────────┴─ stage 1 (─ stage 1 encoder) ─┴─ vae decoder ─ download

The order, and which operation runs on which stream, are the recipe's (`engine.recipe`). The host waits for the text,
which it joins, and for the end. A stream waits where an operation reads what the other stream has written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.backends.buffers import DeviceBackend
from engine.backends.runners import Runners
from engine.bundle.graphspec import GraphSpec
from engine.bundle.manifest import Bundle
from engine.bundle.sdxl import TOKENS
from engine.device.interface import Array, Buffer, Download, Event, Stream
from engine.errors import UsageError
from engine.image.photo import Pixels
from engine.memory.residency import Workload, needed_beside
from engine.memory.size_plan import VaeMode
from engine.memory.vae_slices import SlicedVae
from engine.pipeline.denoiser import rows_of_texts
from engine.pipeline.device_loop import DeviceLoop, LoopInputs
from engine.pipeline.device_session import DeviceSession
from engine.pipeline.executor import Listener, NoiseInput, OnNote, OnStep, OnTile
from engine.pipeline.latent_colors import cell_colors, showing
from engine.pipeline.plan import RestorationPlan
from engine.pipeline.stages import Sampling, Stages
from engine.pipeline.text import Conditioning
from engine.recipe import STEP_GRAPHS, Operation, graphs_of_phase, stream_of
from engine.sampling.sampler import Latent, StepTable
from engine.timings import Timings


class DeviceExecutor(Stages):
    """Runs a restoration, or one stage of it, on a device.

    Args:
        backend: whose device is used.
        runners: of the bundle's graphs on it.
        bundle: whose graphs they are.
        budget_bytes: as for `DeviceSession`.

    Attributes:
        session: the device's memory and streams.
    """

    def __init__(self, backend: DeviceBackend, runners: Runners, bundle: Bundle, budget_bytes: int | None) -> None:
        super().__init__(bundle, runners)
        self.session = DeviceSession(backend, runners, bundle, budget_bytes)

    def run(
        self, plan: RestorationPlan, lq: Pixels, noise: NoiseInput, listener: Listener, times: Timings
    ) -> dict[str, Pixels]:
        """Run a plan; see `Executor.run`. Steps are told without latents: those stay on the device."""
        with self.session.working(times):
            return _Run(self, plan, lq, noise, listener, times).result()

    def _sample(self, given: Sampling, on_step: OnStep, on_tile: OnTile, on_note: OnNote, times: Timings) -> Latent:
        """Run the loop, from the host's latents to the host's."""
        session, photos = self.session, len(given.z_lq)
        by_tile = callable(given.texts)
        tiles = None if given.tiles.is_whole and not by_tile else given.tiles
        context, vector = _texts_of(self.bundle.spec("unet"), given, photos)
        work = Workload(
            photos,
            given.z_lq.shape[2],
            given.z_lq.shape[3],
            texts=context.shape[-3] // photos,
            chunks=context.shape[-2] // TOKENS,
            passes=given.table.passes,
            latent_tiles=tiles,
            texts_by_tile=by_tile,
            graphs=STEP_GRAPHS,
        )
        with session.working(times):
            session.make_room_for(work)
            stream, clock, buffers = session.streams[stream_of("unet")], Clock(), {}
            for name, value in (("z_lq", given.z_lq), ("z_center", given.center)):
                if value is not None:
                    buffers[name] = session.buffer(name)
                    stream.upload(buffers[name], value)
            center = buffers.get("z_center")
            inputs = LoopInputs(buffers["z_lq"], context, vector, given.noise, center, tiles, given.estimates)
            loop = session.open_loop()
            run_loop(loop, given.table, inputs, stream, clock, on_step, on_note)
            z = stream.download(loop.latent).result()
            session.synchronize()
            times.device_ms.update(clock.read())
        return z

    def _run_vae(
        self, graph: str, image: Array, stage: str, mode: VaeMode | None, on_tile: OnTile, times: Timings | None
    ) -> NDArray[np.float32]:
        if isinstance(mode, SlicedVae):
            self.runners.open_segment(graph)  # which says that slices are for a CPU
        if mode is None or isinstance(mode, SlicedVae) or mode.is_whole:
            spec = self.bundle.spec(graph)
            return self._run(graph, {spec.inputs[0].name: image}, stage, times)[spec.outputs[0].name]
        self.session.enter(needed_beside(graph))
        return self.session.run_vae_in_tiles(graph, image, mode, times or Timings())

    def _run(self, graph: str, inputs: Mapping[str, Array], stage: str, times: Timings | None) -> dict[str, Array]:
        self.session.enter(needed_beside(graph))
        return super()._run(graph, inputs, stage, times)


class _Run:
    """One restoration: the values of the recipe as buffers, and the events that say when each is written."""

    def __init__(
        self,
        executor: DeviceExecutor,
        plan: RestorationPlan,
        lq: Pixels,
        noise: NoiseInput,
        listener: Listener,
        times: Timings,
    ) -> None:
        self._executor, self._session, self._plan, self._lq = executor, executor.session, plan, lq
        self._noise, self._listener, self._times = noise, listener, times
        self._clock = Clock()
        self._texts: Sequence[Conditioning] = ()
        #: The stream that has written a value last, and its event.
        self._written: dict[str, tuple[str, Event]] = {}
        self._downloads: dict[str, Download] = {}
        #: Values in buffers that are not the session's.
        self._own: dict[str, Buffer] = {}

    def result(self) -> dict[str, Pixels]:
        """Run the plan's operations, and return what operations on photos read of them."""
        session, plan = self._session, self._plan
        assert plan.memory is not None, "the plan is for a CPU"
        session.make_room(plan.workload, plan.memory.residency)
        on_photos = {name for each in plan.operations if each.kind == "photo" for name in each.reads}
        device_operations = [each for each in plan.operations if each.kind != "photo"]
        for index, operation in enumerate(device_operations):
            self._listener.on_stage(operation.name)
            session.enter(graphs_of_phase(operation.phase))
            if index == 0:
                session.reserve()
                session.streams[operation.stream].upload(self._buffer("lq"), self._lq)
            self._wait_for_reads(operation)
            if operation.kind == "text":
                self._texts = self._executor.encode_texts(plan.texts, times=self._times)
            elif operation.kind == "vae":
                self._run_vae(operation)
            else:
                self._run_steps(operation, following=device_operations[index + 1].phase)
            for name in operation.writes:
                if name in on_photos:
                    stream = session.streams[operation.stream]
                    self._downloads[name] = stream.download(self._buffer(name))
        results = {name: download.result() for name, download in self._downloads.items()}
        session.synchronize()
        self._times.device_ms.update(self._clock.read())
        return results

    def _buffer(self, name: str) -> Buffer:
        return self._own.get(name) or self._session.buffer(name)

    def _wait_for_reads(self, operation: Operation) -> None:
        """Have a stream wait for what the other one writes."""
        for name in operation.reads:
            writer, event = self._written.get(name, (operation.stream, None))
            if writer != operation.stream and event is not None:
                self._session.streams[operation.stream].wait(event)

    def _run_vae(self, operation: Operation) -> None:
        (graph,), (source,), (target,) = operation.graphs, operation.reads, operation.writes
        stream = self._session.streams[operation.stream]
        self._clock.start(operation.name, stream)
        self._session.enqueue_vae(stream, graph, self._buffer(source), self._buffer(target))
        self._written[target] = (operation.stream, self._clock.stop(operation.name, stream))

    def _run_steps(self, operation: Operation, following: str) -> None:
        session, plan, clock = self._session, self._plan, self._clock
        stream = session.streams[operation.stream]
        loop = session.open_loop()
        context, vector = rows_of_texts(session.bundle.spec("unet"), self._texts, plan.photos)
        center = self._buffer("z_center") if plan.table.uses_center else None
        z_lq, on_step, shows = self._buffer("z_lq"), self._listener.on_step, self._listener.on_estimate is not None
        noise = self._noise.source(z_lq.shape[1:])
        if shows:
            colors = cell_colors(self._lq, session.bundle.pixels_per_cell)
            on_step = showing(self._listener, stream.download(z_lq).result(), colors)
        inputs = LoopInputs(z_lq, context, vector, noise, center, plan.workload.latent_tiles, shows)
        sampled = run_loop(loop, plan.table, inputs, stream, clock, on_step, self._listener.on_note)
        # The loop's latent is the result, unless its buffers go with its networks before it is read.
        if session.closed_beside(graphs_of_phase(following)) & set(operation.graphs):
            stream.copy(self._buffer("z"), loop.latent)
            sampled = stream.record()
        else:
            self._own["z"] = loop.latent
        self._written["z"] = (operation.stream, sampled)


def run_loop(
    loop: DeviceLoop,
    table: StepTable,
    inputs: LoopInputs,
    stream: Stream,
    clock: Clock,
    on_step: OnStep,
    on_note: OnNote,
) -> Event:
    """Run a table on a device, and return the event behind its last step."""
    clock.start("noise and texts", stream)
    loop.prepare(table, inputs)
    clock.stop("noise and texts", stream)
    clock.start("steps", stream)
    for progress in loop.run(table):
        on_step(progress)
    if loop.refusal is not None:
        on_note(loop.refusal)
    return clock.stop("steps", stream)


def _texts_of(unet: GraphSpec, given: Sampling, photos: int) -> tuple[Array, Array]:
    """Return context and vector of a sampling as the loop takes them: of all tiles, or of each."""
    if not callable(given.texts):
        return rows_of_texts(unet, given.texts, photos)
    found = [rows_of_texts(unet, given.texts(tile), photos) for tile in given.tiles]
    lengths = {context.shape[-2] for context, _ in found}
    if len(lengths) > 1:
        raise UsageError(
            "texts of a GPU's tiles must fill as many chunks",
            expected="contexts of one length",
            found=f"{sorted(lengths)} tokens",
            fix="make the texts about as long",
        )
    contexts, vectors = zip(*found, strict=True)
    return np.stack(contexts), np.stack(vectors)


class Clock:
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
