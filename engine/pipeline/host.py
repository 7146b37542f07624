"""The host's executor: a restoration in NumPy and ONNX Runtime, and its stages on their own.

Source: SPEC, "The pipeline"; the paper's Eq. 5 to 10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.backends.runners import Runners
from engine.bundle.manifest import Bundle
from engine.device.interface import Array
from engine.image.photo import Pixels
from engine.memory.size_plan import VaeMode
from engine.memory.vae_slices import SlicedVae, run_slices
from engine.pipeline.denoiser import CFGDenoiser, TextsAt, TiledDenoiser
from engine.pipeline.latent_colors import LatentColors, cell_colors
from engine.pipeline.plan import RestorationPlan, texts_of
from engine.pipeline.text import Conditioning, Prompts
from engine.sampling.noise import noise_source
from engine.sampling.sampler import Denoiser, Latent, StepOutput, sample, table_for
from engine.sampling.tiling import Tiling, run_tiled
from engine.settings import Settings
from engine.timings import Timings

OnStep = Callable[[StepOutput], None]
#: Told a stage, how many of its tiles are done, and how many there are; for a step, of that step.
OnTile = Callable[[str, int, int], None]
#: Told a line that a person should read while it happens.
OnNote = Callable[[str], None]
#: Told the operation of the recipe that begins; on a GPU, that is put on its stream.
OnStage = Callable[[str], None]
#: Told a small picture of each photo's estimate, f32[B,h,w,3] in [0, 1], a pixel for a cell of the latent.
OnEstimate = Callable[[Pixels], None]
#: Values of the recipe, by their names.
Values = Mapping[str, Any]

#: Texts whose conditioning is kept: a folder of photos shares one pair.
_TEXTS_KEPT = 8


def ignore(*_: Any) -> None:
    """Do nothing: what is called where nobody listens."""


@dataclass(frozen=True)
class Listener:
    """Who is told how a restoration goes. An exception from any of them ends it.

    Attributes:
        on_step: called after every sampling step.
        on_tile: called after every tile or slice.
        on_note: called with what did not go as planned.
        on_estimate: called after every step with a small picture; None spares making it. Not on a GPU, where
            latents stay.
        on_stage: called when an operation begins.
    """

    on_step: OnStep = ignore
    on_tile: OnTile = ignore
    on_note: OnNote = ignore
    on_estimate: OnEstimate | None = None
    on_stage: OnStage = ignore


@dataclass(frozen=True)
class NoiseInput:
    """The noise of a restoration: each photo's seed, or a starting noise f32[B,C,h,w] of the caller's."""

    seeds: Sequence[int]
    start: Latent | None = None

    def source(self, shape: Sequence[int]) -> Callable[[int], Latent]:
        """Return the field of a draw, f32[B, *shape]."""
        return noise_source(self.seeds, tuple(shape), self.start)


class Executor(Protocol):
    """What runs the operations of the recipe between the photo's pixels and the result's."""

    def run(
        self, plan: RestorationPlan, lq: Pixels, noise: NoiseInput, listener: Listener, times: Timings
    ) -> dict[str, Pixels]:
        """Run a plan's operations but for those on photos.

        Args:
            plan: for as many photos as `lq` has.
            lq: f32[B,3,8h,8w] in [-1, 1].
            noise: of the sampling.
            listener: told how it goes.
            times: that each operation's time is added to.
        Returns:
            `pixels` and, where the plan needs it, `stage1`, f32[B,3,8h,8w] each, on the host.
        Raises:
            BackendError: a graph fails. OutOfMemoryError, MemoryError: memory runs out.
        """
        ...


@dataclass
class HostExecutor:
    """Runs a restoration, or one stage of it, on the host's arrays.

    Attributes:
        bundle: whose graphs run.
        runners: of its graphs.
    """

    bundle: Bundle
    runners: Runners
    _texts: dict[tuple[str, ...], list[Conditioning]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompts = Prompts(self.bundle)

    def run(
        self, plan: RestorationPlan, lq: Pixels, noise: NoiseInput, listener: Listener, times: Timings
    ) -> dict[str, Pixels]:
        """Run a plan; see `Executor.run`."""
        values: dict[str, Any] = {"lq": lq}
        if listener.on_estimate is not None:
            values["colors"] = cell_colors(lq, self.bundle.pixels_per_cell)
        del lq
        for operation in plan.operations:
            if operation.kind == "photo":
                continue
            listener.on_stage(operation.name)
            if operation.kind == "vae":
                (graph,), (source,), (target,) = operation.graphs, operation.reads, operation.writes
                # Nothing else reads the photo's pixels, which are given back once they are encoded.
                image = values.pop(source) if source == "lq" else values[source]
                mode = plan.vae_mode
                values[target] = self._run_vae(graph, image, operation.name, mode, listener.on_tile, times)
                del image
            elif operation.kind == "text":
                values["conditioning"] = self.encode_texts(plan.texts, times=times)
            elif operation.kind == "steps":
                values["z"] = self._sample(plan, values, noise, listener, times)
        return {name: values[name] for name in ("pixels", "stage1") if name in values}

    def _sample(
        self, plan: RestorationPlan, values: Values, noise: NoiseInput, listener: Listener, times: Timings
    ) -> Latent:
        z_lq: Latent = values["z_lq"]
        network = self._network(z_lq, values["conditioning"], plan.latent_tiles, 1, listener.on_tile, times)
        draw = noise.source(z_lq.shape[1:])
        if listener.on_estimate is None:
            return _last(sample(plan.table, network, draw, center=values.get("z_center")), listener.on_step)
        colors, show = LatentColors.fit(z_lq, values["colors"]), listener.on_estimate

        def on_step(progress: StepOutput) -> None:
            listener.on_step(progress)
            assert progress.denoised is not None
            show(colors.picture(progress.denoised))

        return _last(sample(plan.table, network, draw, center=values.get("z_center"), estimates=True), on_step)

    # -- stages on their own ---------------------------------------------------------------------

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

        `vae_mode`, here and below: None runs the graph on the whole image; `SlicedVae` is exact too, in less memory.
        Tiles of the latent let the graph see a part at a time, which is approximate: its norms and its attention
        then see no more than a tile.
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
        estimates: bool = False,
        times: Timings | None = None,
    ) -> Latent:
        """Sample a clean latent. Source: Eq. 8 to 10.

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
            at_once: tiles that go through the networks together.
            on_step: called after every step; an exception from it ends the sampling.
            on_tile: called after every tile; likewise.
            estimates: whether `on_step` is told the estimate of the clean latent at every step.
            times: that the stages' times are added to.
        Returns:
            z f32[B,4,h,w].
        """
        seeds = [settings.seed] * len(z_lq) if seeds is None else seeds
        draw = noise_source(seeds, z_lq.shape[1:], noise, step_noise)
        tiling = tiles or Tiling.whole(*z_lq.shape[2:])
        network = self._network(z_lq, texts, tiling, at_once, on_tile, times or Timings())
        return _last(sample(table_for(settings), network, draw, center=center, estimates=estimates), on_step)

    def _network(
        self,
        z_lq: Latent,
        texts: Sequence[Conditioning] | TextsAt,
        tiles: Tiling,
        at_once: int,
        on_tile: OnTile,
        times: Timings,
    ) -> Denoiser:
        def run(graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
            return self._run(graph, inputs, graph, times)

        def make(rows: Latent, row_texts: Sequence[Conditioning]) -> Denoiser:
            return CFGDenoiser(run, self.bundle.spec("unet"), rows, row_texts)

        if tiles.is_whole and not callable(texts):
            return make(z_lq, texts)
        return TiledDenoiser(make, tiles, z_lq, texts, at_once=at_once, on_tile=partial(on_tile, "step"))

    def _run_vae(
        self, graph: str, image: Array, stage: str, mode: VaeMode | None, on_tile: OnTile, times: Timings | None
    ) -> NDArray[np.float32]:
        """Run a graph of the VAE on an image, f32[B,C,H,W]."""
        spec = self.bundle.spec(graph)
        source, target = spec.inputs[0].name, spec.outputs[0].name

        def run(part: Array) -> Array:
            return self._run(graph, {source: part}, stage, times)[target]

        if isinstance(mode, SlicedVae):
            open_segment = self.runners.open_segment(graph)
            with (times or Timings()).graph(stage):
                return run_slices(
                    self.bundle.manifest.graphs[graph].segments, image, open_segment, mode, partial(on_tile, stage)
                )
        if mode is None or mode.is_whole:
            return run(image)
        # A tiling is of the latent; pixels have the same tiles, larger.
        tilings = {"z": mode, "pixels": mode.scaled(self.bundle.pixels_per_cell)}
        return run_tiled(image, tilings[source], tilings[target], run, partial(on_tile, stage))

    def _run(self, graph: str, inputs: Mapping[str, Array], stage: str, times: Timings | None) -> dict[str, Array]:
        runner = self.runners.open(graph, times)
        with (times or Timings()).graph(stage):
            return runner.infer(inputs)


def _last(steps: Any, on_step: OnStep) -> Latent:
    """Follow a sampling to its end and return its last latent."""
    z: Latent | None = None
    for progress in steps:
        z = progress.x
        on_step(progress)
    assert z is not None, "a table has at least one step"
    return z
