"""`sample`: the loop, which an ensemble cannot hold: `Restorer.stages.sample`, which is the command line's loop.

ControlNet and UNet are the engine's own runners in this process, not models: a step's control features are ten
tensors, 54 MB in fp16 for each text of a photo at 1024², which would go from process to process at every step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends import make_backend
from engine.bundle.graphspec import resolve
from engine.bundle.sdxl import TOKENS
from engine.errors import UsageError
from engine.pipeline.restorer import Restorer
from engine.pipeline.text import Conditioning
from engine.sampling.sampler import Latent, StepOutput, StepTable, table_for
from engine.sampling.tiling import Tiling
from engine.settings import Settings
from engine.timings import Timings
from triton_repo.models.common import Metrics, array, call, check_finite, failed, log_note, parsed, response
from triton_repo.models.device import cpu_lock_of, device_of
from triton_repo.progress_channel import ProgressSender
from triton_repo.protocol import Run, StoppedError
from triton_repo.serving import MAX_TEXTS, ServingConfig


@dataclass
class PendingRequest:
    """A request.

    Attributes:
        index: its place in the batch.
        table, tiles: its sampler's, and of its latent; jobs with equal ones run together.
        error: why it ended, if it did.
    """

    index: int
    request: Any
    settings: Settings
    run: Run
    table: StepTable
    tiles: Tiling
    texts: tuple[Conditioning, ...]
    z_lq: Latent
    progress: ProgressSender | None = None
    error: Exception | None = None
    z: Latent | None = None

    def check_wanted(self, step: int) -> None:
        """Find out whether somebody still waits for the result.

        Raises:
            StoppedError: nobody does.
        """
        where = f"step {step} of {len(self.table.steps)}"
        if self.run.deadline is not None and time.monotonic() > self.run.deadline:
            raise StoppedError("its time is over", where=where)
        if self.request.is_cancelled():
            raise StoppedError("was cancelled", where=where)

    def report(self, progress: StepOutput, row: int) -> None:
        """Tell the stream of a step that is done, and note whether the job is to end."""
        if self.error is not None:
            return
        try:
            step, steps = progress.step.index + 1, len(self.table.steps)
            self.check_wanted(step)
            if self.progress is not None:
                wanted = self.run.preview_every and step % self.run.preview_every == 0 and step < steps
                estimate = progress.denoised[row] if wanted and progress.denoised is not None else None
                self.progress.tell(step, steps, estimate)
        except StoppedError as error:
            self.error = error


class _AllStopped(Exception):  # noqa: N818 - no error: it leaves the loop
    """Nobody wants this batch any more."""


class TritonPythonModel:
    """The server's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        serving = self._serving = ServingConfig.of(args)
        bundle = serving.open_bundle()
        device = device_of(args)
        self._is_on_gpu = device != "cpu"
        backend = make_backend(serving.backend, device=device, threads=serving.threads)
        self._restorer = Restorer(bundle, backend)
        self._lock = cpu_lock_of(args, serving)
        self._max_pixels = serving.pixels_allowed(bundle)
        self._metrics = Metrics(args["model_name"])
        self._warm_up()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a batch; the batcher gives requests of one shape."""
        jobs, errors = [], {}
        for index, request in enumerate(requests):
            try:
                jobs.append(self._job(index, request))
            except Exception as error:
                errors[index] = error
        for batch in self._batches(jobs):
            try:
                self._run(batch)
            except Exception as error:
                for job in batch:
                    job.error = job.error or error
            finally:
                for job in batch:
                    if job.progress is not None:
                        job.progress.close()
        errors |= {job.index: job.error for job in jobs if job.error is not None}
        answers = {index: failed(requests[index], error, self._metrics) for index, error in errors.items()}
        answers |= {job.index: response(z=job.z) for job in jobs if job.error is None and job.z is not None}
        return [answers[index] for index in range(len(requests))]

    def finalize(self) -> None:
        self._restorer.close()

    def _job(self, index: int, request: Any) -> PendingRequest:
        settings, run = parsed(request, "settings", Settings), parsed(request, "run", Run)
        self._serving.check(settings)
        context, vector = array(request, "context"), array(request, "vector")
        z_lq = array(request, "z_lq")
        stage1 = array(request, "stage1")
        bundle, (rows, columns) = self._restorer.bundle, z_lq.shape[2:]
        size = (columns * bundle.pixels_per_cell, rows * bundle.pixels_per_cell)
        self._serving.check_working_pixels(size[0] * size[1], self._max_pixels, "z_lq")
        if any(side < 1 or side % bundle.size_multiple for side in size):
            expected = f"multiples of {bundle.size_multiple // bundle.pixels_per_cell} cells"
            raise UsageError("no working size", where="z_lq", expected=expected, found=f"{columns} × {rows}")
        if stage1.shape[2:] != size[::-1]:
            found = f"{stage1.shape[3]} × {stage1.shape[2]}"
            raise UsageError("does not fit z_lq", where="stage1", expected=f"{size[0]} × {size[1]}", found=found)
        for name, value in (("z_lq", z_lq), ("stage1", stage1), ("context", context), ("vector", vector)):
            if len(value) != 1:
                raise UsageError("one photo for each request", where=name, found=len(value))
            check_finite(value, name)
        table = table_for(settings)
        needed = 2 if any(step.guided for step in table.steps) else 1
        if context.shape[1] != vector.shape[1] or not needed <= context.shape[1] <= MAX_TEXTS:
            expected = f"{needed} to {MAX_TEXTS} texts"
            raise UsageError(
                "texts that do not fit",
                where="context, vector",
                expected=expected,
                found=f"{context.shape}, {vector.shape}",
            )
        chunks, rest = divmod(context.shape[2], TOKENS)
        if rest:
            raise UsageError(
                "no whole chunks", where="context", expected=f"a multiple of {TOKENS}", found=context.shape
            )
        self._serving.check_chunks(chunks, "context")
        texts = tuple(Conditioning(context[:, text], vector[:, text]) for text in range(context.shape[1]))
        tiles = self._serving.size_plan(bundle, size, settings).latent_tiles(bundle, rows, columns)
        job = PendingRequest(index, request, settings, run, table, tiles, texts, z_lq)
        job.check_wanted(0)
        job.progress = None if run.progress_channel is None else ProgressSender(run.progress_channel)
        return job

    def _batches(self, jobs: Sequence[PendingRequest]) -> Iterator[list[PendingRequest]]:
        """Group what can share a pass: one sampler's table and tiles, and pixels that one large photo could have."""
        groups: dict[tuple[Any, ...], list[PendingRequest]] = {}
        for job in jobs:
            key = (job.table, job.z_lq.shape, job.tiles, job.texts[0].context.shape, len(job.texts))
            groups.setdefault(key, []).append(job)
        for (_, shape, *_), group in groups.items():
            pixels = shape[2] * shape[3] * self._restorer.bundle.pixels_per_cell**2
            size = max(1, self._max_pixels // pixels)
            yield from (group[start : start + size] for start in range(0, len(group), size))

    def _run(self, batch: Sequence[PendingRequest]) -> None:
        times = Timings()

        def on_step(progress: StepOutput) -> None:
            self._metrics.stepped()
            for row, job in enumerate(batch):
                job.report(progress, row)
            if all(job.error is not None for job in batch):
                raise _AllStopped
            if any(job.run.preview_every for job in batch):
                self._lock.yield_to_waiter()  # a preview is of use while it is one

        texts = [
            Conditioning(*(np.concatenate([getattr(text, part) for text in pair]) for part in ("context", "vector")))
            for pair in zip(*(job.texts for job in batch), strict=True)
        ]
        self._metrics.ran_together(len(batch))
        center = self._center(batch)  # by another process, so before this one holds the lock
        try:
            with self._lock, times.outside("sampling, outside the graphs"):
                z = self._restorer.stages.sample(
                    np.concatenate([job.z_lq for job in batch]),
                    texts,
                    batch[0].settings,
                    seeds=[job.settings.seed for job in batch],
                    center=center,
                    tiles=batch[0].tiles,
                    on_step=on_step,
                    on_note=log_note,
                    estimates=any(job.run.preview_every for job in batch),
                    times=times,
                )
        except _AllStopped:
            return
        finally:
            self._metrics.timed(times)
        for row, job in enumerate(batch):
            job.z = z[row : row + 1]

    def _center(self, batch: Sequence[PendingRequest]) -> Latent | None:
        """Return where the restoration pull leads, if it is on: the clean encoder's latents of stage 1."""
        if not batch[0].table.uses_center:
            return None
        stage1 = np.concatenate([array(job.request, "stage1") for job in batch])
        return call("vae_encoder", {"pixels": stage1}, ["z"])["z"]

    def _warm_up(self) -> None:
        """Open the networks and run guided steps at the default working size: a GPU records the second one."""
        bundle = self._restorer.bundle
        side = bundle.manifest.defaults.min_size
        cells = -(-side // bundle.size_multiple) * bundle.size_multiple
        sizes = bundle.spec("denoise_encoder").sizes_of({"pixels": (1, 3, cells, cells)})
        spec = bundle.spec("unet")

        def zeros(name: str, **symbols: int) -> NDArray[Any]:
            return np.zeros(resolve(spec.tensor(name).shape, {"B": 1, "k": 1, **sizes, **symbols}), np.float32)

        text = Conditioning(zeros("context")[:, :TOKENS], zeros("vector"))
        steps = 2 if self._is_on_gpu else 1
        settings = bundle.manifest.defaults.updated({"steps": steps, "cfg_scale": (2.0, 2.0), "restore_pull": None})
        self._restorer.stages.sample(zeros("x"), [text, text], settings)
