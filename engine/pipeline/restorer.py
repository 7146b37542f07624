"""The restorer: a bundle, a planner and an executor composed into photo → photo.

The order of a restoration is the recipe's (`engine.recipe`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends import default_backend, make_backend
from engine.backends.base import Backend, ComputingBackend
from engine.backends.buffers import DeviceBackend
from engine.backends.ov_library import Compute
from engine.backends.runners import Runners
from engine.bundle.manifest import Bundle, default_bundle_dir, open_bundle
from engine.errors import BackendError, DoesNotFitError, UsageError, close_after, close_all
from engine.image.photo import Photo, Pixels, Size
from engine.image.preprocess import (
    PhotoLike,
    checked_working_size,
    fix_colors,
    load_photo,
    postprocess,
    preprocess,
    result_size,
)
from engine.image.preview import shrunk
from engine.memory.budget import MemoryBudget
from engine.memory.residency import choose_resident_graphs, resident_bytes
from engine.memory.size_plan import choose_plan, device_plans, is_out_of_memory, restoration_bytes
from engine.pipeline.device_executor import DeviceExecutor
from engine.pipeline.device_session import DeviceSession
from engine.pipeline.executor import (
    Executor,
    Listener,
    NoiseInput,
    OnEstimate,
    OnNote,
    OnStage,
    OnStep,
    OnTile,
    ignore,
)
from engine.pipeline.host import HostExecutor
from engine.pipeline.plan import RestorationPlan, make_plan, recorded_size_plan
from engine.pipeline.provenance import backend_facts, provenance_of
from engine.pipeline.stages import Stages
from engine.recipe import Operation
from engine.sampling.sampler import Latent
from engine.settings import Settings
from engine.timings import Timings


@dataclass(frozen=True)
class Restored:
    """A restored photo and how it was made.

    Attributes:
        photo: of the size asked for, with the source's alpha, profile and metadata.
        settings: that repeat it.
        timings: of the batch that it was restored in.
        provenance: what goes into the file's metadata.
        notes: what did not go as planned, a sentence each.
    """

    photo: Photo
    settings: Settings
    timings: Timings
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()


class Restorer:
    """Restores photos with one bundle on one backend.

    Graphs are opened when they are first needed, and stay open until `close` where memory holds them all.

    Args:
        bundle: whose networks run.
        backend: opens them; the restorer closes it, also where this constructor fails.
        vram_budget_bytes: of GPU memory, for everything; None means that everything stays, or an error.

    Attributes:
        bundle: as given.
        stages: each stage on its own, from the host's arrays to the host's arrays.
        backend_facts: the library that runs the bundle and, where it chooses, the type that it computes in.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, vram_budget_bytes: int | None = None) -> None:
        closes: list[Callable[[], object]] = [backend.close]  # the last one first
        try:
            if vram_budget_bytes is not None and vram_budget_bytes <= 0:
                raise UsageError("a budget of GPU memory must be above 0", found=f"{vram_budget_bytes} bytes")
            # Once: what is loaded later must not change the plan of the next photo.
            self._memory = MemoryBudget.available()
            compute = backend.computes_in(bundle) if isinstance(backend, ComputingBackend) else "fp32"
            on_host = not isinstance(backend, DeviceBackend)
            kept = choose_resident_graphs(bundle, self._memory, compute) if on_host else None
            self._weights_bytes = 0 if kept is None else resident_bytes(bundle, kept, compute)
            self.bundle = bundle
            self._runners = Runners(backend, bundle, kept)
            closes.append(self._runners.close)
            self._session: DeviceSession | None = None
            executor: HostExecutor | DeviceExecutor
            if isinstance(backend, DeviceBackend):
                executor = DeviceExecutor(backend, self._runners, bundle, vram_budget_bytes)
                self._session = executor.session
                closes.append(executor.session.close)
            else:
                executor = HostExecutor(bundle, self._runners)
            self._executor: Executor = executor
            self.stages: Stages = executor
            self._backend = backend
            self.backend_facts = backend_facts(backend, bundle)
        except BaseException as error:
            close_after(error, *reversed(closes))
            raise

    @classmethod
    def open(
        cls,
        bundle: str | PathLike[str] | None = None,
        *,
        backend: str | None = None,
        device: str = "auto",
        threads: int = 0,
        compute: Compute = "auto",
        vram_budget_gib: float | None = None,
    ) -> Restorer:
        """Open a bundle.

        Args:
            bundle: its folder; None means where `build_engines.py` builds by default.
            backend: one of `engine.backends.BACKENDS`; None means `default_backend`.
            device, threads, compute: as for `engine.backends.make_backend`.
            vram_budget_gib: of GPU memory, for everything; what does not fit is loaded and released by
                stage. None means that everything stays, or that there is an error.
        Raises:
            BundleError: there is no bundle, or it is not as it was built.
            UsageError: there is no such backend or device, or the budget is not above 0.
            BackendError: a library, the driver or the GPU is missing; or the computer's memory cannot hold
                what one stage needs.
        """
        if vram_budget_gib is not None and not vram_budget_gib > 0:
            raise UsageError("a budget of GPU memory must be above 0", where="vram_budget_gib", found=vram_budget_gib)
        path = Path(bundle) if bundle is not None else default_bundle_dir()
        opened = open_bundle(path)
        made = make_backend(
            backend or default_backend(opened.manifest, device), device=device, threads=threads, compute=compute
        )
        budget = None if vram_budget_gib is None else int(vram_budget_gib * 2**30)
        return cls(opened, made, vram_budget_bytes=budget)

    def __enter__(self) -> Restorer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        close_after(error, self.close)

    def close(self) -> None:
        """Give all graphs' memory back, and the device, if there is one; on a CPU they can be opened again."""
        close_all(self.release, self._backend.close)

    def release(self) -> None:
        """Give the memory of all graphs back; they are opened again when they are needed."""
        close_session = () if self._session is None else (self._session.close,)
        close_all(*close_session, self._runners.close)

    @property
    def defaults(self) -> Settings:
        """The bundle's settings, which hold where a call says nothing else."""
        return self.bundle.manifest.defaults

    @property
    def max_photo_pixels(self) -> int:
        """How many pixels a photo's file may have to be read: as this computer's memory allows."""
        return self._memory.file_pixels

    # -- the plan ---------------------------------------------------------------------------------

    def working_size(self, photo_size: Size, settings: Settings) -> Size:
        """Return the (width, height) in pixels that the networks would see of a photo.

        Args:
            photo_size: (width, height) in pixels of the photo.
            settings: of the restoration.
        Raises:
            ImageError: it is too large for this computer.
        """
        return checked_working_size(self.bundle, photo_size, settings, self._memory.pixels)

    def plan(
        self, photo_size: Size, settings: Settings, *, photos: int = 1, like: Mapping[str, Any] | None = None
    ) -> RestorationPlan:
        """Return what a restoration would do: its size, tiles, texts, table and memory.

        Args:
            photo_size: (width, height) in pixels of the photo.
            settings: of the restoration.
            photos: of this size, restored together.
            like: the metadata of a result whose tiles are taken again, where its size is the same.
        Raises:
            UsageError, ImageError: a tile of that side does not exist, or what was asked for does not fit.
            BackendError: the GPU's memory does not hold it, or a graph does not open.
        """
        return self._plan(self.working_size(photo_size, settings), settings, photos, like)

    def _plan(
        self, size: Size, settings: Settings, photos: int, like: Mapping[str, Any] | None = None
    ) -> RestorationPlan:
        recorded = None if like is None else recorded_size_plan(like, size)
        prompts = self.stages.prompts
        if self._session is None:
            chosen = recorded or choose_plan(self.bundle, size, settings, self._memory, self._weights_bytes)
            return make_plan(self.bundle, prompts, size, settings, chosen, photos)
        candidates = device_plans(self.bundle, size, settings) if recorded is None else [recorded]
        # What the settings leave open may be smaller still; what they ask for is done, or refused.
        if recorded is None and settings.tile == "auto" and settings.vae_tiles == "auto":
            smaller = candidates[-1].smaller(self.bundle, size, in_slices=False)
            candidates += [] if smaller is None else [smaller]
        plan = make_plan(self.bundle, prompts, size, settings, candidates[0], photos)
        error: DoesNotFitError | None = None
        for candidate in candidates:
            plan = plan.with_size_plan(self.bundle, candidate)
            try:
                return plan.with_memory(self._session.plan(plan.workload))
            except DoesNotFitError as refusal:
                error = refusal
        assert error is not None
        raise error

    def photos_at_once(self, photo_size: Size, settings: Settings, most: int) -> int:
        """Return how many photos of a size memory holds in one batch without smaller tiles, at least 1.

        Args:
            photo_size: (width, height) in pixels of each photo.
            settings: of the restoration.
            most: that are wanted.
        Raises:
            As `plan`.
        """
        if isinstance(self._backend, ComputingBackend):  # which takes photos one by one
            return 1
        plan = self.plan(photo_size, settings)
        if self._session is None:
            need = restoration_bytes(self.bundle, plan.size, plan.size_plan)
            return max(1, min(most, (self._memory.bytes - self._weights_bytes) // need))
        for count in range(most, 1, -1):
            with suppress(DoesNotFitError):
                if self._plan(plan.size, settings, count).size_plan == plan.size_plan:
                    return count
        return 1

    # -- stage 1 ----------------------------------------------------------------------------------

    def stage1(self, photo: PhotoLike) -> Photo:
        """Return a photo's stage 1: what the encoder and the decoder make of it, before any sampling.

        It is small: the shorter side is the bundle's own `min_size`, at which the networks were trained.

        Args:
            photo: as for `restore`.
        Raises:
            As `restore`.
        """
        source = load_photo(photo, max_pixels=self.max_photo_pixels)
        settings = self.defaults.updated({"upscale": 1.0})
        small = shrunk(source, settings.min_size / min(source.size))
        plan = self.plan(small.size, settings)
        lq = preprocess(small, plan.size)[None]
        pixels = self.stages.decode(self.stages.encode(lq, vae_mode=plan.vae_mode), vae_mode=plan.vae_mode)
        return postprocess(pixels[0], small, small.size)

    # -- photo to photo -------------------------------------------------------------------------

    def restore(
        self,
        photo: PhotoLike,
        *,
        plan: RestorationPlan | None = None,
        noise: Latent | None = None,
        on_step: OnStep = ignore,
        on_tile: OnTile = ignore,
        on_note: OnNote = ignore,
        on_estimate: OnEstimate | None = None,
        on_stage: OnStage = ignore,
        **changes: Any,
    ) -> Restored:
        """Restore one photo.

        Args:
            photo: a file, a Pillow image, an array u8[H, W, 3] or f32[H, W, 3] in [0, 1], or a `Photo`. A file that
                memory cannot hold is refused; `engine.image.files.read_photo` reads it all the same.
            plan: from `plan`, for a photo of this size; None makes one. Its settings hold, but for the seed.
            noise: f32[1,4,h,w], the starting noise, instead of the seed's.
            on_step: called after every sampling step; an exception from it ends the restoration.
            on_tile: called after every tile of a step or of the VAE; likewise.
            on_note: called with what did not go as planned, a sentence each.
            on_estimate: called after every step with a small picture of what comes, f32[1,h,w,3] in [0, 1].
            on_stage: called when an operation of the recipe begins, with its name; an exception ends the restoration.
            **changes: settings (see `Settings`) that differ from the bundle's, or from the plan's.
        Raises:
            ImageError: the photo cannot be read.
            UsageError: a setting is unknown or out of bounds, or the plan is for another size or other settings.
            BackendError: a graph fails, for one because memory runs out.
        """
        listener = Listener(on_step, on_tile, on_note, on_estimate, on_stage)
        source = load_photo(photo, max_pixels=self.max_photo_pixels)
        settings = (self.defaults if plan is None else plan.settings).updated(changes)
        if plan is None:
            plan = self.plan(source.size, settings)
        elif settings.updated({"seed": plan.settings.seed}) != plan.settings:
            raise UsageError("the plan is for other settings", fix="make a plan with these settings")
        elif plan.photos != 1 or plan.size != self.working_size(source.size, settings):
            raise UsageError("the plan is for another photo", expected=plan.size, found=source.size)
        return self._restore_group([source], plan, NoiseInput([settings.seed], noise), listener)[0]

    def restore_batch(
        self,
        photos: Sequence[PhotoLike],
        *,
        seeds: Sequence[int] | None = None,
        noise: Latent | None = None,
        on_step: OnStep = ignore,
        on_tile: OnTile = ignore,
        on_note: OnNote = ignore,
        **changes: Any,
    ) -> list[Restored]:
        """Restore several photos; those that the networks see at one size go together, but with OpenVINO one by one.

        Each result is what the photo gives alone.

        Args:
            photos: as for `restore`.
            seeds: one per photo; None gives all of them the settings' seed.
            noise: f32[B,4,h,w], instead of the seeds'; the networks must see all photos at one size.
            on_step, on_tile, on_note, **changes: as for `restore`.
        Returns:
            The results in the photos' order.
        Raises:
            As `restore`.
        """
        settings = self.defaults.updated(changes)
        seeds = [settings.seed] * len(photos) if seeds is None else list(seeds)
        if len(seeds) != len(photos):
            raise UsageError("one seed per photo", expected=len(photos), found=len(seeds))
        seeds = [settings.updated({"seed": seed}).seed for seed in seeds]
        listener = Listener(on_step, on_tile, on_note)
        sources = [load_photo(photo, max_pixels=self.max_photo_pixels) for photo in photos]
        alone = isinstance(self._backend, ComputingBackend)
        groups: dict[tuple[Size, int], list[int]] = {}
        for index, source in enumerate(sources):
            key = (self.working_size(source.size, settings), index if alone else 0)
            groups.setdefault(key, []).append(index)
        results: dict[int, Restored] = {}
        for (size, _), indices in groups.items():
            plan = self._plan(size, settings, len(indices))
            own = NoiseInput([seeds[index] for index in indices], None if noise is None else noise[indices])
            group = self._restore_group([sources[index] for index in indices], plan, own, listener)
            results.update(zip(indices, group, strict=True))
        return [results[index] for index in range(len(photos))]

    def _restore_group(
        self, sources: list[Photo], plan: RestorationPlan, noise: NoiseInput, listener: Listener
    ) -> list[Restored]:
        notes: list[str] = []

        def on_note(note: str) -> None:
            notes.append(note)
            listener.on_note(note)

        while True:
            try:
                photos, times = self._attempt(sources, plan, noise, replace(listener, on_note=on_note))
                break
            except (BackendError, MemoryError) as error:
                smaller = self._smaller(plan) if is_out_of_memory(error) else None
                if smaller is None:
                    raise
            # Outside the handler: what the failed attempt held in its frames is free now.
            on_note(f"out of memory ({plan.size_plan}); tried again: {smaller.size_plan}")
            self.release()
            plan = smaller
        results = []
        for photo, seed in zip(photos, noise.seeds, strict=True):
            used = plan.settings.updated({"seed": seed})
            provenance = provenance_of(self.bundle, used, plan, self.backend_facts)
            if notes:
                provenance["notes"] = notes
            results.append(Restored(photo, used, times, provenance, tuple(notes)))
        return results

    def _smaller(self, plan: RestorationPlan) -> RestorationPlan | None:
        """Return the plan to try where memory has run out, None if there is none."""
        if (size_plan := plan.size_plan.smaller(self.bundle, plan.size, in_slices=self._session is None)) is None:
            return None
        smaller = plan.with_size_plan(self.bundle, size_plan)
        return smaller if self._session is None else smaller.with_memory(self._session.plan(smaller.workload))

    def _attempt(
        self, sources: list[Photo], plan: RestorationPlan, noise: NoiseInput, listener: Listener
    ) -> tuple[list[Photo], Timings]:
        """Run the recipe once: operations on photos here, all others by the executor."""
        times = Timings()
        values: dict[str, Any] = {"photo": sources}
        last_reads = {name: operation for operation in plan.operations for name in operation.reads}
        with times.outside("everything else"):
            for on_photos, group in groupby(plan.operations, key=lambda operation: operation.kind == "photo"):
                if not on_photos:
                    values.update(self._executor.run(plan, values.pop("lq"), noise, listener, times))
                    continue
                for operation in group:
                    listener.on_stage(operation.name)
                    (target,) = operation.writes
                    with times.outside(operation.name):
                        result = self._on_photos(operation, plan)(*(values[name] for name in operation.reads))
                    # What nothing reads any more goes at once: each value may be gigabytes.
                    for name in operation.reads:
                        if last_reads[name] is operation:
                            del values[name]
                    values[target] = result
                    del result
        return values["restored"], times

    def _on_photos(self, operation: Operation, plan: RestorationPlan) -> Callable[..., Any]:
        """Return the function of an operation on photos."""
        settings = plan.settings
        functions: dict[str, Callable[..., Any]] = {
            "resize in": lambda photos: _stacked([preprocess(photo, plan.size) for photo in photos]),
            # Over the pixels, which nothing else reads: one array less beside a large photo.
            "color fix": lambda pixels, stage1: fix_colors(pixels, stage1, settings.color_fix, out=pixels),
            "resize out": lambda pixels, photos: [
                postprocess(each, photo, result_size(photo.size, settings.upscale))
                for each, photo in zip(pixels, photos, strict=True)
            ],
        }
        return functions[operation.name]


def _stacked(arrays: list[Pixels]) -> Pixels:
    """Return arrays as one with an axis more; one alone is not copied, for it may be large."""
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
