"""The host's executor: a restoration in NumPy and ONNX Runtime, and its stages.

Source: SPEC, "The pipeline"; the paper's Eq. 5 to 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.device.interface import Array
from engine.image.photo import Pixels
from engine.memory.size_plan import VaeMode
from engine.memory.vae_slices import SlicedVae, run_slices
from engine.pipeline.denoiser import CFGDenoiser, TextsAt, TiledDenoiser
from engine.pipeline.executor import Listener, NoiseInput, OnNote, OnStep, OnTile
from engine.pipeline.latent_colors import cell_colors, showing
from engine.pipeline.plan import RestorationPlan
from engine.pipeline.stages import Sampling, Stages
from engine.pipeline.text import Conditioning
from engine.sampling.sampler import Denoiser, Latent, sample
from engine.sampling.tiling import Tiling, run_tiled
from engine.timings import Timings

#: Values of the recipe, by their names.
Values = Mapping[str, Any]


class HostExecutor(Stages):
    """Runs a restoration, or one stage of it, on the host's arrays."""

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
                values["z"] = self._run_steps(plan, values, noise, listener, times)
        return {name: values[name] for name in ("pixels", "stage1") if name in values}

    def _run_steps(
        self, plan: RestorationPlan, values: Values, noise: NoiseInput, listener: Listener, times: Timings
    ) -> Latent:
        z_lq: Latent = values["z_lq"]
        draw, shows = noise.source(z_lq.shape[1:]), listener.on_estimate is not None
        on_step = showing(listener, z_lq, values["colors"]) if shows else listener.on_step
        given = Sampling(
            z_lq,
            values["conditioning"],
            plan.table,
            draw,
            values.get("z_center"),
            plan.latent_tiles,
            estimates=shows,
        )
        return self._sample(given, on_step, listener.on_tile, listener.on_note, times)

    def _sample(self, given: Sampling, on_step: OnStep, on_tile: OnTile, on_note: OnNote, times: Timings) -> Latent:
        network = self._network(given.z_lq, given.texts, given.tiles, given.at_once, on_tile, times)
        z: Latent | None = None
        for progress in sample(given.table, network, given.noise, center=given.center, estimates=given.estimates):
            z = progress.x
            on_step(progress)
        assert z is not None, "a table has at least one step"
        return z

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
