"""The restorer: a bundle and a backend wired into photo → photo, with the stages on their own.

Source: SPEC, "The pipeline"; the paper's Eq. 5 to 10.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends import make_backend
from engine.backends.base import Backend
from engine.backends.runners import Runners
from engine.bundle.manifest import Bundle, default_bundle_dir, open_bundle
from engine.errors import BackendError, UsageError
from engine.image.photo import Photo, Pixels
from engine.image.preprocess import (
    MAX_WORKING_PIXELS,
    PhotoLike,
    Size,
    as_photo,
    finish,
    fix_colors,
    frame,
    result_size,
    size_to_work_at,
)
from engine.memory.host_memory import total_memory_bytes
from engine.memory.residency import Work, describe, keep_on_host
from engine.memory.size_plan import SizePlan, choose_plan, device_plans, is_out_of_memory
from engine.memory.vae_slices import ByRows
from engine.pipeline.device_session import DeviceBackend, DeviceSession, Job, work_for
from engine.pipeline.provenance import history_of
from engine.pipeline.stages import OnStep, Stages
from engine.pipeline.text import texts_of
from engine.sampling.noise import noise_source
from engine.sampling.sampler import Latent
from engine.settings import Settings
from engine.timings import Timings

#: Told what a person should know while it happens, a line each.
OnNote = Callable[[str], None]

#: Arrays of a photo's size on the host: as it came, as it is worked at, stage 1, the result, the colour fix's, out.
_BYTES_PER_PIXEL = 20 * 3 * 4


@dataclass(frozen=True)
class Restored:
    """A restored photo and how it was made.

    Attributes:
        photo: of the size asked for, with the source's alpha, profile and metadata.
        settings: that repeat it.
        timings: of the batch that it was restored in.
        history: what goes into the file's metadata.
        notes: what did not go as it was meant to, a sentence each.
    """

    photo: Photo
    settings: Settings
    timings: Timings
    history: dict[str, Any]
    notes: tuple[str, ...] = ()


class Restorer(Stages):
    """Restores photos with one bundle on one backend.

    Graphs are opened when they are first needed, and stay open until `close` where memory holds them all.

    Attributes:
        on_note: told what did not go as it was meant to.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, vram_budget_bytes: int | None = None) -> None:
        memory = None if isinstance(backend, DeviceBackend) else total_memory_bytes()
        super().__init__(bundle, Runners(backend, bundle, None if memory is None else keep_on_host(bundle, memory)))
        self._backend = backend
        self._session: DeviceSession | None = None
        if isinstance(backend, DeviceBackend):
            self._session = DeviceSession(backend, self._runners, bundle, vram_budget_bytes)
        self.on_note: OnNote = lambda line: None

    @classmethod
    def open(
        cls,
        bundle: str | PathLike[str] | None = None,
        *,
        backend: str | None = None,
        device: str = "auto",
        threads: int = 0,
        vram_budget_gib: float | None = None,
    ) -> Restorer:
        """Open a bundle.

        Args:
            bundle: its folder; None means where `build_engines.py` builds by default.
            backend: one of `engine.backends.BACKENDS`; None means the one that the bundle is for.
            device: "cpu", "cuda", "cuda:1", …; "auto" is the CPU for ONNX Runtime, else the first GPU.
            threads: that one operator may use on a CPU; 0 is one per core.
            vram_budget_gib: of GPU memory, for everything; what does not fit is loaded and released by
                stage. None means that everything stays, or that there is an error.
        Raises:
            BundleError: there is no bundle, or it is not as it was built.
            UsageError: there is no such backend or device.
            BackendError: a library, the driver or the GPU is missing; or the computer's memory cannot hold
                what one stage needs.
        """
        path = Path(bundle) if bundle is not None else default_bundle_dir()
        opened = open_bundle(path)
        made = make_backend(backend or opened.manifest.backend, device=device, threads=threads)
        budget = None if vram_budget_gib is None else int(vram_budget_gib * 2**30)
        return cls(opened, made, vram_budget_bytes=budget)

    def __enter__(self) -> Restorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all graphs' memory back, and the device, if there is one; on a CPU they can be opened again."""
        with contextlib.ExitStack() as steps:  # each is done, whatever the ones before it raise
            steps.callback(self._backend.close)
            steps.callback(self._runners.close)
            if self._session is not None:
                steps.callback(self._session.close)

    @property
    def defaults(self) -> Settings:
        """The bundle's settings, which hold where a call says nothing else."""
        return self.bundle.manifest.defaults

    # -- photo to photo -------------------------------------------------------------------------

    def restore(
        self, photo: PhotoLike, *, noise: Latent | None = None, on_step: OnStep | None = None, **changes: Any
    ) -> Restored:
        """Restore one photo.

        Args:
            photo: a file, a Pillow image, an array u8[H, W, 3] or f32[H, W, 3] in [0, 1], or a `Photo`.
            noise: f32[1,4,h,w], the starting noise, instead of the seed's.
            on_step: called after every sampling step; an exception from it ends the restoration.
            **changes: settings (see `Settings`) that differ from the bundle's.
        Raises:
            ImageError: the photo cannot be read.
            UsageError: a setting is unknown or out of bounds.
            BackendError: a graph fails, for one because memory runs out.
        """
        return self.restore_batch([photo], noise=noise, on_step=on_step, **changes)[0]

    def restore_batch(
        self,
        photos: Sequence[PhotoLike],
        *,
        seeds: Sequence[int] | None = None,
        noise: Latent | None = None,
        on_step: OnStep | None = None,
        **changes: Any,
    ) -> list[Restored]:
        """Restore several photos, those of one working size together.

        Each result is what the photo gives alone.

        Args:
            photos: as for `restore`.
            seeds: one per photo; None gives all of them the settings' seed.
            noise: f32[B,4,h,w], instead of the seeds'; the photos must be of one working size.
            on_step, **changes: as for `restore`.
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
        sources = [as_photo(photo) for photo in photos]
        groups: dict[Size, list[int]] = {}
        for index, source in enumerate(sources):
            groups.setdefault(self.working_size(source, settings), []).append(index)
        results: dict[int, Restored] = {}
        for size, members in groups.items():
            batch = [sources[index] for index in members]
            group_seeds = [seeds[index] for index in members]
            own_noise = None if noise is None else noise[members]
            group = self._restore_group(batch, size, group_seeds, settings, own_noise, on_step)
            results.update(zip(members, group, strict=True))
        return [results[index] for index in range(len(photos))]

    def working_size(self, photo: Photo, settings: Settings) -> Size:
        """Return the (width, height) in pixels at which a photo would be worked at.

        Raises:
            ImageError: it is too large to be worked at in one piece.
        """
        return size_to_work_at(self.bundle, photo.size, settings, self.max_pixels)

    def gpu_memory(self, size: Size, settings: Settings) -> dict[str, Any] | None:
        """Return what a photo needs of the GPU's memory, before it is restored.

        Args:
            size: (width, height) in pixels that it is worked at.
            settings: of the restoration.
        Returns:
            Bytes by what they are for, and the same in words; see `engine.memory.residency.describe`. None on a CPU.
        Raises:
            BackendError: it does not fit.
        """
        if self._session is None:
            return None
        work = self._work((1, 3, size[1], size[0]), settings, self.size_plan(size, settings))
        need, residency = self._session.plan(work)
        return describe(need, residency, self._session.free_bytes)

    def _work(self, shape: Sequence[int], settings: Settings, plan: SizePlan) -> Work:
        """Return the sizes of a restoration of pixels of a shape."""
        latent = self.bundle.spec("denoise_encoder").sizes_of({"pixels": shape})
        cells = (latent["h"], latent["w"])
        texts = texts_of(settings)
        chunks = self._prompts.count_chunks(texts)
        tiles = plan.vae_way(self.bundle, *cells)
        assert not isinstance(tiles, ByRows)
        windows = plan.windows(self.bundle, *cells)
        return work_for(shape[0], cells, len(texts), chunks, self.table(settings), windows, tiles)

    @property
    def max_pixels(self) -> int:
        """How many pixels a photo may be worked at: what the computer holds beside windows."""
        memory = total_memory_bytes()
        return MAX_WORKING_PIXELS if memory is None else min(MAX_WORKING_PIXELS, memory // _BYTES_PER_PIXEL)

    def size_plan(self, size: Size, settings: Settings) -> SizePlan:
        """Return how a photo of a working size would be worked at: whole, or in windows.

        Raises:
            UsageError, ImageError: as `choose_plan`, or `device_plans`. What a GPU's memory
                holds in no way is an error of the restoration.
        """
        if self._session is None:
            return choose_plan(self.bundle, size, settings, total_memory_bytes())
        *plans, last = device_plans(self.bundle, size, settings)
        for plan in plans:
            with contextlib.suppress(BackendError):  # too large for the memory, or for the plans' profiles
                self._session.plan(self._work((1, 3, size[1], size[0]), settings, plan))
                return plan
        return last

    def _restore_group(
        self,
        sources: list[Photo],
        size: Size,
        seeds: list[int],
        settings: Settings,
        noise: Latent | None,
        on_step: OnStep | None,
    ) -> list[Restored]:
        times = Timings()
        with times.outside("everything else"):
            with times.outside("resize in"):
                lq = np.stack([frame(source, size) for source in sources])
            plan, notes = self.size_plan(size, settings), []
            run = self._run_on_host if self._session is None else self._run_on_device
            try:
                restored, stage1 = run(lq, settings, plan, seeds, noise, on_step, times)
            except (BackendError, MemoryError) as error:
                by_rows = self._session is None
                smaller = plan.smaller(self.bundle, size, by_rows=by_rows) if is_out_of_memory(error) else None
                if smaller is None:
                    raise
                notes.append(f"out of memory ({plan}); tried again: {smaller}")
                self.on_note(notes[-1])
                if self._session is not None:
                    self._session.close()
                self._runners.close()
                plan = smaller
                restored, stage1 = run(lq, settings, plan, seeds, noise, on_step, times)
            with times.outside("color fix"):
                restored = fix_colors(restored, stage1, settings.color_fix)
            with times.outside("resize out"):
                photos = [
                    finish(pixels, source, result_size(source.size, settings.upscale))
                    for pixels, source in zip(restored, sources, strict=True)
                ]
        results = []
        for photo, seed in zip(photos, seeds, strict=True):
            used = settings.updated({"seed": seed})
            history = history_of(self.bundle, used, plan)
            if notes:
                history["notes"] = notes
            results.append(Restored(photo, used, times, history, tuple(notes)))
        return results

    def _run_on_host(
        self,
        lq: Pixels,
        settings: Settings,
        plan: SizePlan,
        seeds: list[int],
        noise: Latent | None,
        on_step: OnStep | None,
        times: Timings,
    ) -> tuple[Pixels, Pixels | None]:
        """Return the restored pixels and stage 1, where the colour fix or the pull needs it."""
        cells = self.bundle.spec("denoise_encoder").sizes_of({"pixels": lq.shape})
        way = plan.vae_way(self.bundle, cells["h"], cells["w"])
        windows = plan.windows(self.bundle, cells["h"], cells["w"])
        texts = self.conditioning(settings, times=times)
        z_lq = self.encode(lq, way=way, times=times)
        needs_stage1 = settings.color_fix != "none" or settings.restore_pull is not None
        stage1 = self.decode(z_lq, stage="stage 1", way=way, times=times) if needs_stage1 else None
        center = None
        if settings.restore_pull is not None and stage1 is not None:
            center = self.encode_clean(stage1, way=way, times=times)
        z = self.sample(
            z_lq,
            texts,
            settings,
            seeds=seeds,
            noise=noise,
            center=center,
            windows=windows,
            on_step=on_step,
            times=times,
        )
        return self.decode(z, way=way, times=times), stage1

    def _run_on_device(
        self,
        lq: Pixels,
        settings: Settings,
        plan: SizePlan,
        seeds: list[int],
        noise: Latent | None,
        on_step: OnStep | None,
        times: Timings,
    ) -> tuple[Pixels, Pixels | None]:
        """Do the same with everything between photo and result on the device."""
        assert self._session is not None
        work = self._work(lq.shape, settings, plan)
        job = Job(
            lq,
            work,
            lambda: self.conditioning(settings, times=times),
            self.table(settings),
            noise_source(seeds, (self.bundle.latent_channels, work.height, work.width), noise),
            settings.color_fix != "none",
            on_step or (lambda _: None),
        )
        with times.graph("gpu"):
            return self._session.restore(job, times)
