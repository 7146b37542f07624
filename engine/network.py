"""ControlNet and UNet as the sampler sees them: one function of the noisy latent and the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from engine.backends.base import as_dtype
from engine.conditioning import Conditioning
from engine.device import Array
from engine.graphspec import GraphSpec, TensorSpec
from engine.sampler import Latent, Step

#: Runs a graph, by its name, on named inputs.
RunGraph = Callable[[str, Mapping[str, Array]], dict[str, Array]]


class GuidedNetwork:
    """Runs the positive and, where a step is guided, the negative text in one batch.

    Args:
        run: runs `controlnet` and `unet`.
        spec: of `unet`, for the precision that text is read in.
        z_lq: f32[B,4,h,w], latents of the degraded photos.
        texts: the positive and, if any step is guided, the negative one; the same for all photos, or
            with a leading axis of B, one for each.
    """

    def __init__(self, run: RunGraph, spec: GraphSpec, z_lq: Latent, texts: Sequence[Conditioning]) -> None:
        self._run = run
        self._z_lq = z_lq
        # Row by row as the batch has them: all photos with one text, then all with the other.
        self._context, self._vector = (
            np.concatenate(
                [
                    as_dtype(_for_each(getattr(text, name), spec.tensor(name), len(z_lq)), spec.tensor(name).dtype)
                    for text in texts
                ]
            )
            for name in ("context", "vector")
        )

    def __call__(self, x: Latent, step: Step) -> tuple[Latent, Latent | None]:
        """Return the predicted noise for the positive and, where guided, the negative text.

        Args:
            x: f32[B,4,h,w], the noisy latent × `step.input_scale`.
            step: tells the timestep, the control scale, and whether it is guided.
        Returns:
            f32[B,4,h,w] twice, or once and None.
        """
        passes = 2 if step.guided else 1
        rows = passes * len(x)
        shared = {
            "x": np.concatenate([x] * passes),
            "timestep": np.full(rows, step.timestep, dtype=np.float32),
            "context": self._context[:rows],
            "vector": self._vector[:rows],
        }
        controls = self._run("controlnet", {**shared, "lq": np.concatenate([self._z_lq] * passes)})
        scale = np.array([step.control_scale], dtype=np.float32)
        eps = self._run("unet", {**shared, **controls, "control_scale": scale})["eps"]
        return (eps[: len(x)], eps[len(x) :]) if step.guided else (eps, None)


def _for_each(array: Array, tensor: TensorSpec, count: int) -> Array:
    """Return a row for each of `count` photos: those given, or the one given again and again."""
    return array if array.ndim == len(tensor.shape) else np.repeat(array[None], count, axis=0)
