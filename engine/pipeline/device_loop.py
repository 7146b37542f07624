"""The sampling loop on a device: a table of weights, ControlNet, UNet, and one weighted sum a step.

Nothing is read back and nothing waits between the first step and the last; noise, where steps use any, is drawn and
uploaded while the device is at the steps before. Each kind of step, guided
or not, is run once as it is, recorded the second time, and replayed from then on: the device itself
keeps the number of the step. For a latent that is sampled in tiles, one tile is recorded, and
the device keeps its number as well. StepOutput comes from events that the stream passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from engine.backends.buffers import BufferRunner
from engine.bundle.graphspec import DType, GraphSpec, resolve
from engine.device.interface import Array, Buffer, Device, Download, Event, Replay, Stream
from engine.device.kernels import COLUMNS, pack_table
from engine.device.slab import Slab
from engine.errors import BackendError, OutOfMemoryError, ScheduleError, close_after, close_all
from engine.pipeline.device_tiles import TileTables
from engine.sampling.sampler import Latent, Step, StepOutput, StepTable
from engine.sampling.tiling import Tiling

#: Steps that lie on the stream beyond the last one that is known to be done: enough that it never
#: runs dry, and how far a loop that is cancelled still goes.
LOOK_AHEAD = 2
_MAX_STEPS = 1000


@dataclass(frozen=True)
class LoopInputs:
    """What a run is given.

    Attributes:
        z_lq: f32[B,C,h,w], latents of the degraded photos, on the device.
        context: f[P·B,77k,C], and vector f[P·B,V], on the host: all photos with the positive text,
            then, if P is 2, all with the negative one. In the networks' precision. With a leading axis, each tile's.
        noise: the field of a draw, f32[B,C,h,w], on the host: 0 is the start, 1 + i belongs to step i.
        center: f32[B,C,h,w], on the device; needed only if the table uses it.
        tiles: of the latent, which the networks see one at a time; None is the whole.
        estimates: whether each step's estimate of the clean latent comes to the host.
    """

    z_lq: Buffer
    context: Array
    vector: Array
    noise: Callable[[int], Latent]
    center: Buffer | None = None
    tiles: Tiling | None = None
    estimates: bool = False


class DeviceLoop:
    """Runs tables on a device. Buffers and recordings of the last size are kept for the next run.

    Args:
        device: that all buffers are on.
        stream: that all work goes on.
        controlnet, unet: the networks.
    """

    def __init__(self, device: Device, stream: Stream, controlnet: BufferRunner, unet: BufferRunner) -> None:
        self._device, self._stream = device, stream
        self._controlnet, self._unet = controlnet, unet
        self._work: LoopBuffers | None = None
        self._noise: Callable[[int], Latent] | None = None
        self._tells_estimates = False

    def close(self) -> None:
        """Give the buffers back."""
        if self._work is not None:
            self._work.close()
            self._work = None

    def prepare(self, table: StepTable, inputs: LoopInputs) -> None:
        """Upload what a run needs; it comes next.

        Raises:
            ScheduleError: the table needs `center` and there is none, or has too many steps.
            BackendError: memory runs out.
        """
        if table.uses_center and inputs.center is None:
            raise ScheduleError("the restoration pull needs the stage-1 latent as `center`")
        if len(table.steps) > _MAX_STEPS:
            raise ScheduleError("too many steps", expected=f"up to {_MAX_STEPS}", found=len(table.steps))
        self._prepare(table, inputs)

    def run(self, table: StepTable) -> Iterator[StepOutput]:
        """Run the table that was prepared, from noise to a clean latent.

        Yields:
            StepOutput after each step, in order, without latents, but for estimates that were asked for. An
            exception thrown in, or closing the generator, ends the run within `LOOK_AHEAD` steps.
        Raises:
            BackendError: a graph fails.
        """
        work = self._work
        assert work is not None, "nothing was prepared"
        pending: deque[_Enqueued] = deque()
        with self._drained_on_error():
            for step in table.steps:
                self._upload_noise(step)
                work.enqueue_step(step)
                estimate = self._stream.download(work.previous) if self._tells_estimates else None
                pending.append(_Enqueued(step, self._stream.record(), estimate))
                while pending and (len(pending) > LOOK_AHEAD or pending[0].event.is_done):
                    yield pending.popleft().output()
            while pending:
                yield pending.popleft().output()

    def _upload_noise(self, step: Step) -> None:
        """Draw and upload a step's noise, if it uses any, while the device is at the steps before it."""
        if step.uses_noise:
            assert self._work is not None
            assert self._noise is not None
            self._stream.upload(self._work.noise, self._noise(1 + step.index))

    def time_networks(self, repeats: int, *, guided: bool) -> float:
        """Return the milliseconds that the networks alone take, at the size of the last run, for each step.

        They are started as steps are: replayed where they can be recorded. This is what a run is measured against.

        Args:
            repeats: how often they run, behind two times that do not count.
            guided: whether with both texts.
        """
        work = self._work
        assert work is not None, "no run yet"
        start: Event | None = None
        with work.networks(guided) as launch:
            for index in range(repeats + 2):
                start = self._stream.record() if index == 2 else start
                launch()
            stop = self._stream.record()
            stop.synchronize()
        assert start is not None
        return stop.ms_since(start) / repeats * work.tiles_per_step

    @property
    def refusal(self) -> str | None:
        """Why the steps of this size are not recorded, None if nothing is the matter."""
        return None if self._work is None else self._work.refusal

    @property
    def latent(self) -> Buffer:
        """The x of the last run, f32[B,C,h,w]; its result once the run has ended."""
        assert self._work is not None, "no run yet"
        return self._work.x

    def _prepare(self, table: StepTable, inputs: LoopInputs) -> None:
        key = (inputs.z_lq.shape, inputs.context.shape, inputs.tiles)
        if self._work is None or self._work.key != key:
            self.close()
            self._work = LoopBuffers(self._device, self._stream, self._controlnet, self._unet, key)
        work, stream = self._work, self._stream
        stream.upload(work.x, inputs.noise(0) * np.float32(table.start_scale))
        self._noise, self._tells_estimates = inputs.noise, inputs.estimates
        packed = np.zeros(work.table.shape, dtype=np.float32)
        packed[: len(table.steps)] = pack_table(table, keep_all=inputs.estimates)
        stream.upload(work.table, packed)
        stream.upload(work.step, np.zeros(1, dtype=np.uint32))
        work.take_texts(inputs.context, inputs.vector)
        work.take_photos(inputs.z_lq)
        if inputs.center is not None:
            stream.copy(work.center, inputs.center)

    @contextmanager
    def _drained_on_error(self) -> Iterator[None]:
        """Let what is under way end before its buffers are used for something else."""
        try:
            yield
        except BaseException as error:
            close_after(error, self._stream.synchronize)
            raise


@dataclass(frozen=True)
class _Enqueued:
    """A step that lies on the stream, and the event behind it."""

    step: Step
    event: Event
    estimate: Download | None

    def output(self) -> StepOutput:
        """Wait for the step, and return what is told of it."""
        self.event.synchronize()
        return StepOutput(self.step, None, None if self.estimate is None else self.estimate.result())


#: What buffers depend on: shapes of the latents and of the texts' context, and tiles.
LoopKey = tuple[tuple[int, ...], tuple[int, ...], Tiling | None]


def loop_arrays(unet: GraphSpec, key: LoopKey) -> dict[str, tuple[tuple[int, ...], DType]]:
    """Return the shapes and dtypes of what the loop keeps on the device: its own, and what the networks read and write.

    Args:
        unet: its spec; ControlNet's inputs and outputs are among the UNet's inputs, but for `lq`.
        key: of the size.
    """
    latent, context, tiles = key
    part = latent[1:] if tiles is None else (latent[1], tiles.rows.size, tiles.columns.size)
    rows = context[-3]
    symbols = unet.sizes_of({"x": (rows, *part), "context": context[-3:]})
    arrays: dict[str, tuple[tuple[int, ...], DType]] = {
        "latent": (latent, "float32"),
        "previous": (latent, "float32"),
        "center": (latent, "float32"),
        "noise": (latent, "float32"),
        "table": ((_MAX_STEPS, len(COLUMNS)), "float32"),
        "step": ((1,), "uint32"),
    }
    if tiles is not None:
        arrays |= dict.fromkeys(("input", "photos", "pos", "neg"), (latent, "float32"))
        arrays |= {**TileTables.arrays(tiles), "latent_tile": ((1,), "uint32")}
    for tensor in (*unet.inputs, *unet.outputs):
        arrays[tensor.name] = (resolve(tensor.shape, symbols), tensor.dtype)
    if len(context) > 3:  # each tile's own
        for name in ("context", "vector"):
            (_, *rest), dtype = arrays[name]
            arrays[f"tiles' {name}"] = ((context[0] * rows, *rest), dtype)
    return {**arrays, "lq": ((rows, *part), "float32")}


class LoopBuffers:
    """Buffers of one size, and the steps that were recorded on them."""

    def __init__(
        self,
        device: Device,
        stream: Stream,
        controlnet: BufferRunner,
        unet: BufferRunner,
        key: LoopKey,
    ) -> None:
        self.key = key
        latent, context, tiles = key
        self._stream, self._controlnet, self._unet = stream, controlnet, unet
        self.photos, self.rows = latent[0], context[-3]
        #: Kinds that have run, so that libraries have allocated what they need.
        self._has_run: set[bool] = set()
        #: Why steps are not recorded, where a library refused although it had said that it would not.
        self.refusal: str | None = None
        self._recorded: dict[bool, Replay] = {}
        self._recorded_on = self._memory_version
        self._slab = Slab(device, loop_arrays(unet.spec, key))
        self._made = self._slab.buffers
        named = ("latent", "previous", "center", "noise", "table", "step")
        self.x, self.previous, self.center, self.noise, self.table, self.step = (self._made[name] for name in named)
        self._tiles = None if tiles is None else TileTables(tiles, self._made)
        # ControlNet's outputs are the UNet's inputs by name, and most inputs are both networks'.
        names = [tensor.name for runner in (controlnet, unet) for tensor in (*runner.spec.inputs, *runner.spec.outputs)]
        self._tensors = {name: self._made[name] for name in names}
        self.context, self.vector = (self._made[name] for name in ("context", "vector"))

    def close(self) -> None:
        close_all(self._forget_recordings, self._slab.close)

    @property
    def _memory_version(self) -> tuple[int, int]:
        return (self._controlnet.memory_version, self._unet.memory_version)

    def _forget_recordings(self) -> None:
        recorded, self._recorded = self._recorded, {}
        self._has_run.clear()  # contexts that nothing holds may go, and the next ones allocate again
        close_all(*(each.close for each in recorded.values()))
        for runner in (self._controlnet, self._unet):
            runner.forget_recordings()

    @property
    def tiles_per_step(self) -> int:
        return 1 if self._tiles is None else len(self._tiles.tiling)

    def take_photos(self, z_lq: Buffer) -> None:
        """Copy the latents of the degraded photos to where steps read them."""
        if self._tiles is None:
            for first in range(0, self.rows, self.photos):
                self._stream.copy(self._made["lq"].rows(first, first + self.photos), z_lq)
        else:
            self._tiles.upload(self._stream)
            self._stream.upload(self._made["latent_tile"], np.zeros(1, dtype=np.uint32))
            self._stream.copy(self._made["photos"], z_lq)

    def take_texts(self, context: Array, vector: Array) -> None:
        """Upload the texts of all tiles, or of each."""
        for name, values in (("context", context), ("vector", vector)):
            target = self._made.get(f"tiles' {name}", self._made[name])
            self._stream.upload(target, values.reshape(target.shape))

    def _take_texts_of(self, tile: int) -> None:
        """Copy a tile's texts, if it has its own, to where the networks read them."""
        for name in ("context", "vector"):
            if (texts := self._made.get(f"tiles' {name}")) is not None:
                self._stream.copy(self._made[name], texts.rows(tile * self.rows, (tile + 1) * self.rows))

    def enqueue_step(self, step: Step) -> None:
        """Put the table's next row on the stream; `step` tells whether it is guided."""
        if self._recorded and self._recorded_on != self._memory_version:
            self._stream.synchronize()
            self._forget_recordings()
        if self._tiles is None:
            self._start(step.guided, self._enqueue)
            return
        tensors, totals = self._rows(step.guided), self._totals(step.guided)
        self._prepare(self._stream, tensors, self._made["input"], 1)
        for total in totals:
            self._stream.launch("clear", self._count, total)
        for tile in range(self.tiles_per_step):
            self._take_texts_of(tile)
            self._start(step.guided, self._enqueue_tile)
        self._combine(self._stream, totals)

    def _start(self, kind: bool, enqueue: Callable[[Stream, bool], None]) -> None:
        """Start what all steps of a kind, or all their tiles, have in common: as it is, or recorded."""
        if kind in self._recorded:
            self._recorded[kind].launch(self._stream)
            return
        if kind in self._has_run and self.refusal is None and self._is_recordable:
            self._record(kind, enqueue)
            if kind in self._recorded:
                self._recorded[kind].launch(self._stream)
                return
        enqueue(self._stream, kind)
        self._has_run.add(kind)

    def _record(self, kind: bool, enqueue: Callable[[Stream, bool], None]) -> None:
        """Record what all steps of a kind have in common, or keep why that is not possible."""
        self._recorded_on = self._memory_version
        try:
            self._recorded[kind] = self._stream.capture(lambda stream: enqueue(stream, kind))
        except OutOfMemoryError:
            raise
        except BackendError as error:  # if it was not the recording that is wrong, the step itself will fail
            self.refusal = f"steps are not recorded, and so take longer to start: {error.found or error.problem}"

    @property
    def _is_recordable(self) -> bool:
        return self._controlnet.can_be_recorded and self._unet.can_be_recorded

    @contextmanager
    def networks(self, guided: bool) -> Iterator[Callable[[], None]]:
        """Give what starts the networks alone, on whatever values their inputs have."""
        tensors = self._rows(guided)
        if not self._is_recordable:
            yield lambda: self._enqueue_networks(self._stream, tensors)
            return
        self._enqueue_networks(self._stream, tensors)
        recorded = self._stream.capture(lambda stream: self._enqueue_networks(stream, tensors))
        try:
            yield lambda: recorded.launch(self._stream)
        finally:
            self._stream.synchronize()
            recorded.close()

    def _rows(self, guided: bool) -> dict[str, Buffer]:
        """Return the networks' arrays, as far as a step of a kind uses them."""
        rows = (2 if guided else 1) * self.photos
        return {
            name: buffer if name == "control_scale" else buffer.rows(0, rows) for name, buffer in self._tensors.items()
        }

    @property
    def _count(self) -> int:
        return int(np.prod(self.x.shape))

    def _totals(self, guided: bool) -> tuple[Buffer, ...]:
        """Return where the tiles' predictions are added up: the positive, and if there is one the negative text's."""
        return tuple(self._made[name] for name in (("pos", "neg") if guided else ("pos",)))

    def _predictions(self, eps: Buffer, guided: bool) -> tuple[Buffer, ...]:
        """Return the same of a network's output."""
        return tuple(
            eps.rows(first, first + self.photos) for first in range(0, (1 + guided) * self.photos, self.photos)
        )

    def _enqueue(self, stream: Stream, guided: bool) -> None:
        """Put a step at the whole latent on the stream."""
        tensors = self._rows(guided)
        self._prepare(stream, tensors, tensors["x"], 2 if guided else 1)
        self._enqueue_networks(stream, tensors)
        self._combine(stream, self._predictions(tensors["eps"], guided))

    def _enqueue_tile(self, stream: Stream, guided: bool) -> None:
        """Put a step's next tile on the stream."""
        assert self._tiles is not None
        tensors, tile = self._rows(guided), self._made["latent_tile"]
        for image, name in (("input", "x"), ("photos", "lq")):
            self._tiles.take(stream, tile, self._made[image], tensors[name], 2 if guided else 1)
        self._enqueue_networks(stream, tensors)
        for total, part in zip(self._totals(guided), self._predictions(tensors["eps"], guided), strict=True):
            self._tiles.add(stream, tile, part, total)
        stream.launch("advance_tile", 1, tile, self.tiles_per_step)

    def _prepare(self, stream: Stream, tensors: Mapping[str, Buffer], network_x: Buffer, passes: int) -> None:
        stream.launch(
            "prepare_step",
            self._count,
            self.table,
            self.step,
            self.noise,
            self.x,
            network_x,
            tensors["timestep"],
            tensors["control_scale"],
            passes,
            tensors["timestep"].shape[0],
        )

    def _combine(self, stream: Stream, predictions: Sequence[Buffer]) -> None:
        stream.launch(
            "combine_step",
            self._count,
            self.table,
            self.step,
            predictions[0],
            predictions[1] if len(predictions) > 1 else None,
            self.center,
            self.noise,
            self.x,
            self.previous,
        )
        stream.launch("advance_step", 1, self.step)

    def _enqueue_networks(self, stream: Stream, tensors: Mapping[str, Buffer]) -> None:
        for runner in (self._controlnet, self._unet):
            spec = runner.spec
            runner.enqueue(
                stream,
                {tensor.name: tensors[tensor.name] for tensor in spec.inputs},
                {tensor.name: tensors[tensor.name] for tensor in spec.outputs},
            )
