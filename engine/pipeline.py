"""The restorer: a bundle and a backend wired into photo → photo, with the stages on their own.

Source: SPEC, "The pipeline"; the paper's Eq. 5 to 10.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import __version__, colorfix
from engine.backends import make_backend
from engine.backends.base import Backend
from engine.bundle import Bundle, default_bundle_dir, open_bundle
from engine.conditioning import Conditioning, PromptTokenizer, SpecialIds, join_context, join_vector
from engine.device import Array
from engine.device_session import DeviceBackend, DeviceSession, Job, work_for
from engine.errors import ImageError, UsageError
from engine.framing import PhotoLike, Pixels, as_photo, finish, to_network
from engine.geometry import Size, result_size, working_size
from engine.guidance import is_unguided
from engine.host_memory import total_memory_bytes
from engine.imageio import Photo, resize
from engine.network import GuidedNetwork
from engine.noise import noise_source
from engine.places import APP_NAME
from engine.residency import Work, describe, keep_on_host
from engine.runners import Runners
from engine.sampler import Latent, Progress, StepTable, sample
from engine.settings import Settings
from engine.tables import table_for
from engine.timings import Timings

OnStep = Callable[[Progress], None]

_COLOR_FIXES = {"wavelet": colorfix.wavelet, "adain": colorfix.adain}
#: Beyond this, no computer's memory holds the activations of even a small VAE.
MAX_WORKING_PIXELS = 1 << 26
#: Texts whose conditioning is kept: a folder of photos shares one pair.
_TEXTS_KEPT = 8


@dataclass(frozen=True)
class Restored:
    """A restored photo and how it was made.

    Attributes:
        photo: of the size asked for, with the source's alpha, profile and metadata.
        settings: that repeat it.
        timings: of the batch that it was restored in.
        history: what goes into the file's metadata.
    """

    photo: Photo
    settings: Settings
    timings: Timings
    history: dict[str, Any]


class Restorer:
    """Restores photos with one bundle on one backend.

    Graphs are opened when they are first needed, and stay open until `close` where memory holds them all.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, vram_budget_bytes: int | None = None) -> None:
        self.bundle = bundle
        self._backend = backend
        self._session: DeviceSession | None = None
        if isinstance(backend, DeviceBackend):
            self._runners = Runners(backend, bundle)
            self._session = DeviceSession(backend, self._runners, bundle, vram_budget_bytes)
        else:
            memory = total_memory_bytes()
            self._runners = Runners(backend, bundle, None if memory is None else keep_on_host(bundle, memory))
        self._texts: dict[tuple[str, ...], list[Conditioning]] = {}
        ids = bundle.manifest.tokenizer
        special = SpecialIds(ids.start_id, ids.end_id, ids.pad_id, ids.pad_id_2)
        self._tokenizer = PromptTokenizer(bundle.file(ids.file), special)

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

    def forget_texts(self) -> None:
        """Drop the conditioning of earlier texts, so that the next restoration computes its own."""
        self._texts.clear()

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
        wanted = result_size(photo.size, settings.upscale)
        size = working_size(wanted, settings.min_size, self.bundle.size_multiple)
        if size[0] * size[1] > self.max_pixels:
            raise ImageError(
                "too large to be worked at in one piece",
                where=f"a photo of {photo.size[0]} × {photo.size[1]} pixels",
                expected=f"up to {self.max_pixels / 1e6:.1f} million pixels on this computer",
                found=f"{size[0]} × {size[1]} with --upscale {settings.upscale:g} --min-size {settings.min_size}",
                fix="lower --upscale or --min-size, or cut the photo into parts",
            )
        return size

    def gpu_memory(self, size: Size, settings: Settings) -> dict[str, Any] | None:
        """Return what a photo needs of the GPU's memory, before it is restored.

        Args:
            size: (width, height) in pixels that it is worked at.
            settings: of the restoration.
        Returns:
            Bytes by what they are for, and the same in words; see `engine.residency.describe`. None on a CPU.
        Raises:
            BackendError: it does not fit.
        """
        if self._session is None:
            return None
        need, residency = self._session.plan(self._work((1, 3, size[1], size[0]), settings))
        return describe(need, residency, self._session.free_bytes)

    def _work(self, shape: Sequence[int], settings: Settings) -> Work:
        """Return the sizes of a restoration of pixels of a shape."""
        latent = self.bundle.spec("denoise_encoder").sizes_of({"pixels": shape})
        texts = self._texts_of(settings)
        chunks = max(self._tokenizer.count_chunks(text) for text in texts)
        return work_for(shape[0], (latent["h"], latent["w"]), len(texts), chunks, self.table(settings))

    @property
    def max_pixels(self) -> int:
        """How many pixels can be worked at: the VAE's attention compares each cell with each, in float32."""
        memory = total_memory_bytes()
        if memory is None:
            return MAX_WORKING_PIXELS
        cells = math.isqrt(memory // np.dtype(np.float32).itemsize)
        return min(MAX_WORKING_PIXELS, cells * self.bundle.pixels_per_cell**2)

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
                lq = np.stack([to_network(resize(source.rgb, size)) for source in sources])
            run = self._run_on_host if self._session is None else self._run_on_device
            restored, stage1 = run(lq, settings, seeds, noise, on_step, times)
            with times.outside("color fix"):
                if settings.color_fix != "none" and stage1 is not None:
                    restored = _COLOR_FIXES[settings.color_fix](restored, stage1)
            with times.outside("resize out"):
                photos = [
                    finish(pixels, source, result_size(source.size, settings.upscale))
                    for pixels, source in zip(restored, sources, strict=True)
                ]
        results = []
        for photo, seed in zip(photos, seeds, strict=True):
            used = settings.updated({"seed": seed})
            results.append(Restored(photo, used, times, self._history(used)))
        return results

    def _run_on_host(
        self,
        lq: Pixels,
        settings: Settings,
        seeds: list[int],
        noise: Latent | None,
        on_step: OnStep | None,
        times: Timings,
    ) -> tuple[Pixels, Pixels | None]:
        """Return the restored pixels and stage 1, where the colour fix or the pull needs it."""
        texts = self.conditioning(settings, times=times)
        z_lq = self.encode(lq, times=times)
        needs_stage1 = settings.color_fix != "none" or settings.restore_pull is not None
        stage1 = self.decode(z_lq, stage="stage 1", times=times) if needs_stage1 else None
        center = None
        if settings.restore_pull is not None and stage1 is not None:
            center = self.encode_clean(stage1, times=times)
        z = self.sample(z_lq, texts, settings, seeds=seeds, noise=noise, center=center, on_step=on_step, times=times)
        return self.decode(z, times=times), stage1

    def _run_on_device(
        self,
        lq: Pixels,
        settings: Settings,
        seeds: list[int],
        noise: Latent | None,
        on_step: OnStep | None,
        times: Timings,
    ) -> tuple[Pixels, Pixels | None]:
        """Do the same with everything between photo and result on the device."""
        assert self._session is not None
        work = self._work(lq.shape, settings)
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

    def _history(self, settings: Settings) -> dict[str, Any]:
        return {
            "engine": f"{APP_NAME} {__version__}",
            "bundle": {"name": self.bundle.manifest.name, "digest": self.bundle.digest},
            "settings": settings.model_dump(mode="json"),
        }

    # -- the stages on their own ----------------------------------------------------------------

    def conditioning(self, settings: Settings, *, times: Timings | None = None) -> list[Conditioning]:
        """Return what the positive and the negative text tell the networks.

        Args:
            settings: their prompt, quality words, negative prompt and guidance.
            times: that the stage's time is added to.
        Returns:
            Two, or the positive alone where no step is guided; contexts are of one length.
        """
        texts = self._texts_of(settings)
        if texts not in self._texts:
            while len(self._texts) >= _TEXTS_KEPT:
                del self._texts[next(iter(self._texts))]
            self._texts[texts] = self._encode_texts(texts, times or Timings())
        return self._texts[texts]

    def encode(self, lq: Pixels, *, times: Timings | None = None) -> Latent:
        """Return z_lq f32[B,4,h,w] of degraded pixels f32[B,3,8h,8w] in [-1, 1]. Source: Eq. 5."""
        return self._run("denoise_encoder", {"pixels": lq}, "denoise encoder", times)["z"]

    def encode_clean(self, pixels: Pixels, *, times: Timings | None = None) -> Latent:
        """Return z f32[B,4,h,w] of clean pixels f32[B,3,8h,8w] in [-1, 1]: the pull's center."""
        return self._run("vae_encoder", {"pixels": pixels}, "stage 1 encoder", times)["z"]

    def decode(self, z: Latent, *, stage: str = "vae decoder", times: Timings | None = None) -> Pixels:
        """Return pixels f32[B,3,8h,8w], about [-1, 1], of z f32[B,4,h,w]. Source: Eq. 7."""
        return self._run("vae_decoder", {"z": z}, stage, times)["pixels"]

    def table(self, settings: Settings) -> StepTable:
        """Return the sampler's table of step weights for some settings."""
        return table_for(settings)

    def sample(
        self,
        z_lq: Latent,
        texts: Sequence[Conditioning],
        settings: Settings,
        *,
        seeds: Sequence[int] | None = None,
        noise: Latent | None = None,
        step_noise: NDArray[np.float32] | None = None,
        center: Latent | None = None,
        on_step: OnStep | None = None,
        times: Timings | None = None,
    ) -> Latent:
        """Sample a clean latent. Source: Eq. 8 to 10.

        Args:
            z_lq: f32[B,4,h,w], from `encode`.
            texts: from `conditioning`.
            settings: steps, sampler, scales and what goes with them.
            seeds: one per image; None gives all of them the settings' seed.
            noise: f32[B,4,h,w], the starting noise, instead of the seeds'.
            step_noise: f32[n,B,4,h,w], the noise of each step, instead of the seeds'.
            center: f32[B,4,h,w], from `encode_clean`; needed if the restoration pull is on.
            on_step: called after every step.
            times: that the stages' times are added to.
        Returns:
            z f32[B,4,h,w].
        """
        times = times or Timings()
        seeds = [settings.seed] * len(z_lq) if seeds is None else seeds
        draw = noise_source(seeds, z_lq.shape[1:], noise, step_noise)

        def run(graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
            return self._run(graph, inputs, graph, times)

        network = GuidedNetwork(run, self.bundle.spec("unet"), z_lq, texts)
        z: Latent | None = None
        for progress in sample(self.table(settings), network, draw, center=center):
            z = progress.x
            if on_step is not None:
                on_step(progress)
        assert z is not None
        return z

    def _texts_of(self, settings: Settings) -> tuple[str, ...]:
        positive = ", ".join(text for text in (settings.prompt, settings.quality_words) if text)
        unguided = all(is_unguided(scale) for scale in settings.cfg_scale)
        return (positive,) if unguided else (positive, settings.negative_prompt)

    def _encode_texts(self, texts: Sequence[str], times: Timings) -> list[Conditioning]:
        count = max(self._tokenizer.count_chunks(text) for text in texts)
        pairs = [self._tokenizer.chunks(text, count) for text in texts]
        ids, ids_2 = (np.concatenate(part) for part in zip(*pairs, strict=True))
        hidden = self._run("text_encoder", {"input_ids": ids}, "text", times)["hidden"]
        second = self._run("text_encoder_2", {"input_ids": ids_2}, "text", times)
        hidden_2, pooled = second["hidden"], second["pooled"]
        frequencies = self.bundle.manifest.frequencies
        found = []
        for index in range(len(texts)):
            part = slice(index * count, (index + 1) * count)
            vector = join_vector(pooled[index * count], frequencies)
            found.append(Conditioning(join_context(hidden[part], hidden_2[part]), vector))
        return found

    def _run(self, graph: str, inputs: Mapping[str, Array], stage: str, times: Timings | None) -> dict[str, Array]:
        runner = self._runners.open(graph, times)
        with (times or Timings()).graph(stage):
            return runner.infer(inputs)
