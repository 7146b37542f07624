"""A restoration on a device: all graphs, two streams, and as few waits as can be.

    main   upload ─ denoise encoder ─┬─ steps … steps ─┐
    side   text ─────────────────────┴─ stage 1 (─ pull's center) ─┴─ decode ─ download

The host waits for the text, which it joins, and for the end. The steps need the text and, if the pull
is on, its center; the colour fix's stage 1 is decoded beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from engine.backends.base import as_dtype
from engine.backends.buffers import BufferRunner
from engine.bundle import Bundle
from engine.conditioning import Conditioning
from engine.console import format_bytes
from engine.device import STREAMS, Buffer, Device, Event, Stream
from engine.device_loop import DeviceLoop, LoopInputs, stack_texts
from engine.errors import BackendError
from engine.framing import Pixels
from engine.graphspec import resolve
from engine.sampler import Latent, Progress, StepTable
from engine.timings import Timings

#: Graphs that are needed together, in the order of a restoration.
PHASES = (
    ("denoise_encoder",),
    ("text_encoder", "text_encoder_2"),
    ("vae_decoder", "vae_encoder"),
    ("controlnet", "unet"),
    ("vae_decoder",),
)


@dataclass(frozen=True)
class Job:
    """What is restored together.

    Attributes:
        lq: f32[B,3,8h,8w] in [-1, 1].
        texts: returns the positive and, if any step is guided, the negative text's conditioning.
        table: of the sampler.
        noise: the field of a draw, f32[B,C,h,w].
        wants_stage_1: whether the colour fix needs it.
        on_step: called after every step.
    """

    lq: Pixels
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
        streams: by the names of `engine.device.STREAMS`.
    """

    device: Device
    streams: dict[str, Stream]

    def open(self, bundle: Bundle, graph: str) -> BufferRunner:
        """Return a runner for one of a bundle's graphs, as `Backend.open`."""
        ...


class DeviceSession:
    """Restores on one device.

    Args:
        backend: whose device and streams are used.
        runner: returns a graph's opened runner, by its name.
        close_runners: closes some of them; they are opened again when they are asked for.
        bundle: whose graphs they are.
        budget_bytes: of the device's memory; what does not fit is opened and closed by phase. None
            means all that is free.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        runner: Callable[[str], BufferRunner],
        close_runners: Callable[[Sequence[str]], None],
        bundle: Bundle,
        budget_bytes: int | None = None,
    ) -> None:
        self._device, self._runner = backend.device, runner
        self._main, self._side = (backend.streams[name] for name in STREAMS)
        self._close_runners = close_runners
        self._all_resident = fit_together(bundle, budget_bytes, backend.device.memory_bytes()[0])
        self._buffers: dict[str, Buffer] = {}
        self._loop: DeviceLoop | None = None

    def close(self) -> None:
        """Give the buffers back; runners and streams are the caller's."""
        self._close_loop()
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()

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
        self._enter(0)
        encoder = self._runner("denoise_encoder")
        symbols = encoder.spec.sizes_of({"pixels": job.lq.shape})
        latent = resolve(encoder.spec.tensor("z").shape, symbols)
        lq, z_lq = self._buffer("lq", job.lq.shape), self._buffer("z_lq", latent)
        main.upload(lq, job.lq)
        clock.start("denoise encoder", main)
        encoder.enqueue(main, {"pixels": lq}, {"z": z_lq})
        encoded = clock.stop("denoise encoder", main)
        del encoder  # here and below: what is held here could not be released by phase
        self._enter(1)
        texts = job.texts()
        stage_1 = center = None
        if job.wants_stage_1 or job.table.uses_center:
            self._enter(2)
            decoded = self._buffer("stage 1", job.lq.shape)
            side.wait(encoded)
            clock.start("stage 1", side)
            self._runner("vae_decoder").enqueue(side, {"z": z_lq}, {"pixels": decoded})
            ready = clock.stop("stage 1", side)
            if job.table.uses_center:
                center = self._buffer("center", latent)
                clock.start("stage 1 encoder", side)
                self._runner("vae_encoder").enqueue(side, {"pixels": decoded}, {"z": center})
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
        clock.start("steps", main)
        for progress in loop.run(job.table, LoopInputs(z_lq, context, vector, job.noise, center)):
            job.on_step(progress)
        sampled = clock.stop("steps", main)
        z = loop.latent
        if not self._all_resident:  # the loop's buffers go with its networks
            kept = self._buffer("z", latent)
            main.copy(kept, z)
            z, sampled = kept, main.record()
        del loop
        self._enter(4)
        side.wait(sampled)
        restored = self._buffer("restored", job.lq.shape)
        clock.start("vae decoder", side)
        self._runner("vae_decoder").enqueue(side, {"z": z}, {"pixels": restored})
        clock.stop("vae decoder", side)
        result = side.download(restored).result()
        self._synchronize()
        times.device_ms.update(clock.read())
        return result, stage_1.result() if stage_1 is not None else None

    def _buffer(self, name: str, shape: Sequence[int]) -> Buffer:
        """Return a buffer that is kept from one restoration to the next, while sizes are the same."""
        kept = self._buffers.get(name)
        if kept is None or kept.shape != tuple(shape):
            if kept is not None:
                self._synchronize()
                del self._buffers[name]
                kept.close()
            self._buffers[name] = self._device.buffer(shape, "float32")
        return self._buffers[name]

    def _enter(self, phase: int) -> None:
        """Make room for a phase's graphs, where not all fit at once."""
        if self._all_resident:
            return
        self._synchronize()
        others = {graph for graphs in PHASES for graph in graphs} - set(PHASES[phase])
        if not {"controlnet", "unet"} <= set(PHASES[phase]):
            self._close_loop()
        self._close_runners(sorted(others))

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


def fit_together(bundle: Bundle, budget_bytes: int | None, free_bytes: int) -> bool:
    """Tell whether all graphs can stay on the device; if not, they come and go by phase.

    Args:
        bundle: whose graphs' weights count; what activations need is known to the library alone.
        budget_bytes: that may be used, or None.
        free_bytes: of the device.
    Raises:
        BackendError: without a budget, the weights are more than is free; or even those of a phase
            are more than may be used.
    """
    weights = {name: graph.weights_bytes for name, graph in bundle.manifest.graphs.items()}
    everything = sum(weights.values())
    largest = max(sum(weights[graph] for graph in phase) for phase in PHASES)
    allowed = free_bytes if budget_bytes is None else min(budget_bytes, free_bytes)
    if everything <= allowed:
        return True
    if budget_bytes is None or largest > allowed:
        raise BackendError(
            "out of GPU memory",
            where=bundle.path,
            expected=f"{format_bytes(everything)} for all weights, or {format_bytes(largest)} with --vram-budget",
            found=f"{format_bytes(allowed)} {'free' if budget_bytes is None else 'allowed'}",
            fix="use --vram-budget, which opens graphs by stage"
            if budget_bytes is None and largest <= allowed
            else "use a GPU with more memory, or close other programs on it",
        )
    return False


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
