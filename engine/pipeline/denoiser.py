"""ControlNet and UNet as the sampler sees them: one function of the noisy latent and the step.

A latent that is sampled in tiles is such a function too, so every sampler runs both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from engine.backends.base import as_dtype
from engine.bundle.graphspec import GraphSpec, TensorSpec
from engine.device.interface import Array
from engine.errors import UsageError
from engine.pipeline.text import Conditioning
from engine.sampling.sampler import Denoiser, Latent, Step
from engine.sampling.tiling import Tile, Tiling

#: Runs a graph, by its name, on named inputs.
RunGraph = Callable[[str, Mapping[str, Array]], dict[str, Array]]
#: Makes the network of some rows of latents: z_lq f32[R,4,h,w], and texts with a leading axis of R.
MakeDenoiser = Callable[[Latent, Sequence[Conditioning]], Denoiser]
TextsAt = Callable[[Tile], Sequence[Conditioning]]


class CFGDenoiser:
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
        self._context, self._vector = rows_of_texts(spec, texts, len(z_lq))

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


class TiledDenoiser:
    """Runs a network in tiles and blends the noise that it predicts, at every step.

    What surrounds the network stays whole: noise is one field, and guidance, the restoration pull and the
    sampler's sums act place by place. Each tile sees its own part of the degraded photo. The text and the
    micro-conditioning are what they are for a whole photo: SUPIR says "1024 × 1024, not cropped" whatever
    the size is, which for SDXL's tiles is even true.

    Args:
        make: the network of some rows.
        tiling: of the latent, in cells.
        z_lq: f32[B,4,h,w], latents of the degraded photos.
        texts: as `CFGDenoiser` takes them, or a function from a tile to its own.
        at_once: tiles that go through the networks together.
        on_tile: told how many tiles of a step are done, and how many there are.
    Raises:
        UsageError: texts of tiles that go together are of different lengths.
    """

    def __init__(
        self,
        make: MakeDenoiser,
        tiling: Tiling,
        z_lq: Latent,
        texts: Sequence[Conditioning] | TextsAt,
        *,
        at_once: int = 1,
        on_tile: Callable[[int, int], None] | None = None,
    ) -> None:
        self._tiling, self._on_tile = tiling, on_tile
        tiles = tuple(tiling)
        self._batches: list[tuple[tuple[Tile, ...], Denoiser]] = []
        for first in range(0, len(tiles), at_once):
            batch = tiles[first : first + at_once]
            found = [texts(tile) if callable(texts) else texts for tile in batch]
            rows = np.concatenate([tile.of(z_lq) for tile in batch])
            self._batches.append((batch, make(rows, _join_texts(found, len(z_lq)))))

    def __call__(self, x: Latent, step: Step) -> tuple[Latent, Latent | None]:
        """Return the blended noise for the positive and, where guided, the negative text; see `CFGDenoiser`."""
        pos, neg = np.zeros_like(x), np.zeros_like(x) if step.guided else None
        index = 0
        for batch, network in self._batches:
            found = network(np.concatenate([tile.of(x) for tile in batch]), step)
            for place in range(len(batch)):
                rows = slice(place * len(x), (place + 1) * len(x))
                for total, values in zip((pos, neg), found, strict=True):
                    if total is not None and values is not None:
                        self._tiling.add(total, index, values[rows])
                index += 1
            if self._on_tile is not None:
                self._on_tile(index, len(self._tiling))
        return pos, neg


def _join_texts(tiles: Sequence[Sequence[Conditioning]], photos: int) -> list[Conditioning]:
    """Return the texts of some tiles with a row for each tile and photo, all photos of a tile together."""

    def rows(array: Array, rank: int) -> Array:
        return array if array.ndim == rank else np.repeat(array[None], photos, axis=0)

    lengths = {text.context.shape[-2] for texts in tiles for text in texts}
    if len(lengths) > 1:
        raise UsageError(
            "texts of tiles that go through the networks together must fill as many chunks",
            expected="contexts of one length",
            found=f"{sorted(lengths)} tokens",
            fix="run one tile at a time, or make the texts about as long",
        )
    return [
        Conditioning(
            np.concatenate([rows(text.context, 3) for text in same]),
            np.concatenate([rows(text.vector, 2) for text in same]),
        )
        for same in zip(*tiles, strict=True)
    ]


def rows_of_texts(spec: GraphSpec, texts: Sequence[Conditioning], photos: int) -> tuple[Array, Array]:
    """Return a batch's texts, row by row as the networks take them: all photos with one text, then with the other.

    Args:
        spec: of `unet`, for the precision that text is read in.
        texts: the same for all photos, or with a leading axis, one for each.
        photos: how many.
    Returns:
        context f[P·B,77k,C] and vector f[P·B,V], for P texts.
    """
    context, vector = (
        np.concatenate(
            [
                as_dtype(_for_each(getattr(text, name), spec.tensor(name), photos), spec.tensor(name).dtype)
                for text in texts
            ]
        )
        for name in ("context", "vector")
    )
    return context, vector


def _for_each(array: Array, tensor: TensorSpec, count: int) -> Array:
    """Return a row for each of `count` photos: those given, or the one given again and again."""
    return array if array.ndim == len(tensor.shape) else np.repeat(array[None], count, axis=0)
