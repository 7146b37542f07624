"""The stages of a restoration, each on its own, from the host's arrays to the host's arrays.

Source: SPEC, "The pipeline"; the paper's Eq. 5 to 10.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.backends.runners import Runners
from engine.bundle.manifest import Bundle
from engine.device.interface import Array
from engine.errors import UsageError
from engine.image.photo import Pixels
from engine.memory.size_plan import VaeMode
from engine.pipeline.denoiser import TextsAt
from engine.pipeline.executor import OnNote, OnStep, OnTile, ignore
from engine.pipeline.plan import texts_of
from engine.pipeline.text import Conditioning, Prompts
from engine.sampling.noise import noise_source
from engine.sampling.sampler import Latent, StepTable, table_for
from engine.sampling.tiling import Tiling
from engine.settings import Settings
from engine.timings import Timings

#: Texts whose conditioning is kept: a folder of photos shares one pair.
_TEXTS_KEPT = 8


@dataclass(frozen=True)
class Sampling:
    """What a sampling is given.

    Attributes:
        z_lq: f32[B,4,h,w], latents of the degraded photos.
        texts: as `Stages.sample` takes them.
        table: of the sampler.
        noise: the field of a draw, f32[B,4,h,w]: 0 is the start, 1 + i belongs to step i.
        center: f32[B,4,h,w], what the restoration pull leads to, if it is on.
        tiles: of the latent; one may be the whole.
        at_once: tiles that go through the networks together, on a CPU.
        estimates: whether each step's estimate of the clean latent is told.
    """

    z_lq: Latent
    texts: Sequence[Conditioning] | TextsAt
    table: StepTable
    noise: Callable[[int], Latent]
    center: Latent | None
    tiles: Tiling
    at_once: int = 1
    estimates: bool = False


class Stages(ABC):
    """The stages of one bundle; those on a CPU and those on a GPU give the same.

    Attributes:
        bundle: whose graphs run.
        runners: of its graphs.
        prompts: the bundle's words.
    """

    def __init__(self, bundle: Bundle, runners: Runners) -> None:
        self.bundle, self.runners, self.prompts = bundle, runners, Prompts(bundle)
        self._texts: dict[tuple[str, ...], list[Conditioning]] = {}

    def clear_prompt_cache(self) -> None:
        """Drop the conditioning of earlier texts, so that the next restoration computes its own."""
        self._texts.clear()

    def conditioning(self, settings: Settings, *, times: Timings | None = None) -> list[Conditioning]:
        """Return what the positive and the negative text tell the networks.

        Args:
            settings: their prompt, quality words, negative prompt and guidance.
            times: that the stage's time is added to.
        Returns:
            Two, or the positive alone where no step is guided; contexts are of one length.
        """
        return self.encode_texts(texts_of(settings, table_for(settings)), times=times)

    def encode_texts(self, texts: tuple[str, ...], *, times: Timings | None = None) -> list[Conditioning]:
        """Return what each of some texts tells the networks; contexts are of one length."""
        if texts not in self._texts:
            while len(self._texts) >= _TEXTS_KEPT:
                del self._texts[next(iter(self._texts))]
            self._texts[texts] = self.prompts.encode(texts, lambda graph, ids: self._run(graph, ids, "text", times))
        return self._texts[texts]

    def encode(
        self,
        lq: Pixels,
        *,
        vae_mode: VaeMode | None = None,
        on_tile: OnTile = ignore,
        times: Timings | None = None,
    ) -> Latent:
        """Return z_lq f32[B,4,h,w] of degraded pixels f32[B,3,8h,8w] in [-1, 1]. Source: Eq. 5.

        `vae_mode`, here and below: None runs the graph on the whole image; `SlicedVae` is exact too, in less memory,
        on a CPU. Tiles of the latent let the graph see a part at a time, which is approximate: its norms and its
        attention then see no more than a tile. Tiles on a GPU are not told one by one.
        """
        return self._run_vae("denoise_encoder", lq, "denoise encoder", vae_mode, on_tile, times)

    def encode_clean(
        self,
        pixels: Pixels,
        *,
        vae_mode: VaeMode | None = None,
        on_tile: OnTile = ignore,
        times: Timings | None = None,
    ) -> Latent:
        """Return z f32[B,4,h,w] of clean pixels f32[B,3,8h,8w] in [-1, 1]: what the restoration pull leads to."""
        return self._run_vae("vae_encoder", pixels, "stage 1 encoder", vae_mode, on_tile, times)

    def decode(
        self,
        z: Latent,
        *,
        stage: str = "vae decoder",
        vae_mode: VaeMode | None = None,
        on_tile: OnTile = ignore,
        times: Timings | None = None,
    ) -> Pixels:
        """Return pixels f32[B,3,8h,8w], about [-1, 1], of z f32[B,4,h,w]. Source: Eq. 7."""
        return self._run_vae("vae_decoder", z, stage, vae_mode, on_tile, times)

    def sample(
        self,
        z_lq: Latent,
        texts: Sequence[Conditioning] | TextsAt,
        settings: Settings,
        *,
        seeds: Sequence[int] | None = None,
        noise: Latent | None = None,
        step_noise: NDArray[np.float32] | None = None,
        center: Latent | None = None,
        tiles: Tiling | None = None,
        at_once: int = 1,
        on_step: OnStep = ignore,
        on_tile: OnTile = ignore,
        on_note: OnNote = ignore,
        estimates: bool = False,
        times: Timings | None = None,
    ) -> Latent:
        """Sample a clean latent: on a GPU as `Restorer.restore` does, by steps that are recorded once and replayed.

        Source: Eq. 8 to 10.

        Args:
            z_lq: f32[B,4,h,w], from `encode`.
            texts: from `conditioning`; or, with a leading axis, each photo's own; or a function from a tile
                to its texts, so that a prompt can hold for a part of the photo.
            settings: steps, sampler, scales and what goes with them.
            seeds: one per image; None gives all of them the settings' seed.
            noise: f32[B,4,h,w], the starting noise, instead of the seeds'.
            step_noise: f32[n,B,4,h,w], the noise of each step, instead of the seeds'.
            center: f32[B,4,h,w], from `encode_clean`; needed if the restoration pull is on.
            tiles: tiles of the latent for sampling; None is the whole.
            at_once: tiles that go through the networks together, on a CPU; a GPU takes one after the other.
            on_step: called after every step, on a GPU without the latent; an exception from it ends the sampling.
            on_tile: called after every tile on a CPU; likewise.
            on_note: called with what did not go as planned.
            estimates: whether `on_step` is told the estimate of the clean latent at every step.
            times: that the stages' times are added to.
        Returns:
            z f32[B,4,h,w].
        Raises:
            UsageError: a step is guided, and there is no negative text.
            ScheduleError: the restoration pull is on, and there is no `center`.
            BackendError: a graph fails, for one because memory runs out.
        """
        table = table_for(settings)
        needed = 2 if any(step.guided for step in table.steps) else 1
        if not callable(texts):
            if len(texts) < needed:
                raise UsageError("a guided step needs a negative text", expected=f"{needed} texts", found=len(texts))
            texts = texts[:needed]
        seeds = [settings.seed] * len(z_lq) if seeds is None else seeds
        draw = noise_source(seeds, z_lq.shape[1:], noise, step_noise)
        tiling = tiles or Tiling.whole(*z_lq.shape[2:])
        given = Sampling(z_lq, texts, table, draw, center, tiling, at_once, estimates)
        return self._sample(given, on_step, on_tile, on_note, times or Timings())

    @abstractmethod
    def _sample(self, given: Sampling, on_step: OnStep, on_tile: OnTile, on_note: OnNote, times: Timings) -> Latent: ...

    @abstractmethod
    def _run_vae(
        self, graph: str, image: Array, stage: str, mode: VaeMode | None, on_tile: OnTile, times: Timings | None
    ) -> NDArray[np.float32]:
        """Run a graph of the VAE on an image, f32[B,C,H,W]."""

    def _run(self, graph: str, inputs: Mapping[str, Array], stage: str, times: Timings | None) -> dict[str, Array]:
        runner = self.runners.open(graph, times)
        with (times or Timings()).graph(stage):
            return runner.infer(inputs)
