"""The stages of a restoration on their own: text, encoding, sampling, decoding, on the host's arrays.

Source: SPEC, "The pipeline"; the paper's Eq. 5 to 10.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engine.backends.runners import Runners
from engine.bundle.manifest import Bundle
from engine.device.interface import Array
from engine.image.photo import Pixels
from engine.image.preprocess import Size
from engine.memory.size_plan import SizePlan, VaeWay
from engine.memory.vae_slices import ByRows, run_pieces
from engine.pipeline.denoiser import GuidedNetwork, TextsAt, TiledNetwork
from engine.pipeline.text import Conditioning, Prompts, texts_of
from engine.sampling.noise import noise_source
from engine.sampling.sampler import Latent, Network, Progress, StepTable, sample, table_for
from engine.sampling.tiling import Tiling, run_tiled
from engine.settings import Settings
from engine.timings import Timings

OnStep = Callable[[Progress], None]
#: Told a stage, how many of its windows are done, and how many there are; for a step, of that step.
OnTile = Callable[[str, int, int], None]

#: Texts whose conditioning is kept: a folder of photos shares one pair.
_TEXTS_KEPT = 8


class Stages(ABC):
    """What a restoration is made of.

    Attributes:
        bundle: whose graphs run.
        on_tile: told how far a stage that works in windows is; an exception from it ends the restoration.
    """

    def __init__(self, bundle: Bundle, runners: Runners) -> None:
        self.bundle = bundle
        self.on_tile: OnTile = lambda stage, done, total: None
        self._runners = runners
        self._texts: dict[tuple[str, ...], list[Conditioning]] = {}
        self._prompts = Prompts(bundle)

    @abstractmethod
    def size_plan(self, size: Size, settings: Settings) -> SizePlan:
        """Return how a photo of a working size, (width, height) in pixels, would be worked at: whole, or in windows."""

    def forget_texts(self) -> None:
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
        texts = texts_of(settings)
        if texts not in self._texts:
            while len(self._texts) >= _TEXTS_KEPT:
                del self._texts[next(iter(self._texts))]
            self._texts[texts] = self._prompts.encode(texts, lambda graph, ids: self._run(graph, ids, "text", times))
        return self._texts[texts]

    def encode(self, lq: Pixels, *, way: VaeWay | None = None, times: Timings | None = None) -> Latent:
        """Return z_lq f32[B,4,h,w] of degraded pixels f32[B,3,8h,8w] in [-1, 1]. Source: Eq. 5.

        `way`, here and below: None runs the graph on the whole; `ByRows` is exact as well, and needs less memory.
        Tiles of the latent let the graph see a part at a time, which is approximate: its norms and its attention
        then see no more than a tile.
        """
        return self._run_vae("denoise_encoder", lq, "denoise encoder", way, times)

    def encode_clean(self, pixels: Pixels, *, way: VaeWay | None = None, times: Timings | None = None) -> Latent:
        """Return z f32[B,4,h,w] of clean pixels f32[B,3,8h,8w] in [-1, 1]: the pull's center."""
        return self._run_vae("vae_encoder", pixels, "stage 1 encoder", way, times)

    def decode(
        self, z: Latent, *, stage: str = "vae decoder", way: VaeWay | None = None, times: Timings | None = None
    ) -> Pixels:
        """Return pixels f32[B,3,8h,8w], about [-1, 1], of z f32[B,4,h,w]. Source: Eq. 7."""
        return self._run_vae("vae_decoder", z, stage, way, times)

    def table(self, settings: Settings) -> StepTable:
        """Return the sampler's table of step weights for some settings."""
        return table_for(settings)

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
        windows: Tiling | None = None,
        at_once: int = 1,
        on_step: OnStep | None = None,
        estimates: bool = False,
        times: Timings | None = None,
    ) -> Latent:
        """Sample a clean latent. Source: Eq. 8 to 10.

        Args:
            z_lq: f32[B,4,h,w], from `encode`.
            texts: from `conditioning`; or, with a leading axis, each photo's own; or a function from a window
                to its texts, so that a prompt can hold for a part of the photo.
            settings: steps, sampler, scales and what goes with them.
            seeds: one per image; None gives all of them the settings' seed.
            noise: f32[B,4,h,w], the starting noise, instead of the seeds'.
            step_noise: f32[n,B,4,h,w], the noise of each step, instead of the seeds'.
            center: f32[B,4,h,w], from `encode_clean`; needed if the restoration pull is on.
            windows: of the latent; None is what the settings and the size ask for.
            at_once: windows that go through the networks together.
            on_step: called after every step; an exception from it ends the sampling.
            estimates: whether `on_step` is told the estimate of the clean latent at every step.
            times: that the stages' times are added to.
        Returns:
            z f32[B,4,h,w].
        """
        times = times or Timings()
        seeds = [settings.seed] * len(z_lq) if seeds is None else seeds
        draw = noise_source(seeds, z_lq.shape[1:], noise, step_noise)

        def run(graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
            return self._run(graph, inputs, graph, times)

        def make(rows: Latent, row_texts: Sequence[Conditioning]) -> Network:
            return GuidedNetwork(run, self.bundle.spec("unet"), rows, row_texts)

        if windows is None:
            height, width = (side * self.bundle.pixels_per_cell for side in z_lq.shape[2:])
            windows = self.size_plan((width, height), settings).windows(self.bundle, *z_lq.shape[2:])
        network: Network
        if windows.is_whole and not callable(texts):
            network = make(z_lq, texts)
        else:
            told = partial(self.on_tile, "step")
            network = TiledNetwork(make, windows, z_lq, texts, at_once=at_once, on_tile=told)
        z: Latent | None = None
        for progress in sample(self.table(settings), network, draw, center=center, estimates=estimates):
            z = progress.x
            if on_step is not None:
                on_step(progress)
        assert z is not None
        return z

    def _run_vae(
        self, graph: str, image: Array, stage: str, way: VaeWay | None, times: Timings | None
    ) -> NDArray[np.float32]:
        """Run a graph of the VAE on an image, f32[B,C,H,W]."""
        spec = self.bundle.spec(graph)
        source, target = spec.inputs[0].name, spec.outputs[0].name

        def run(part: Array) -> Array:
            return self._run(graph, {source: part}, stage, times)[target]

        if isinstance(way, ByRows):
            open_piece = self._runners.open_piece(graph)
            with (times or Timings()).graph(stage):
                return run_pieces(
                    self.bundle.manifest.graphs[graph].pieces, image, open_piece, way, partial(self.on_tile, stage)
                )
        if way is None or way.is_whole:
            return run(image)
        pixels = way.scaled(self.bundle.pixels_per_cell)
        ways = (way, pixels) if source == "z" else (pixels, way)
        return run_tiled(image, *ways, run, partial(self.on_tile, stage))

    def _run(self, graph: str, inputs: Mapping[str, Array], stage: str, times: Timings | None) -> dict[str, Array]:
        runner = self._runners.open(graph, times)
        with (times or Timings()).graph(stage):
            return runner.infer(inputs)
