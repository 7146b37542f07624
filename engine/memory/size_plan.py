"""Whole, in tiles, or not at all: how a photo of a size is restored, by what memory holds.

Arithmetic on shapes, so that it is known before anything is loaded. What ONNX Runtime needs beside the weights
is bounded from above: what a guess misses ends as "out of memory", and smaller plans are tried until none is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.bundle.graphspec import parse_axis, resolve
from engine.bundle.manifest import Bundle
from engine.bundle.sdxl import HEAD_CHANNELS
from engine.errors import ImageError, OutOfMemoryError, UsageError
from engine.image.photo import Size
from engine.memory.budget import MemoryBudget
from engine.memory.vae_slices import SlicedVae, peak_bytes, widest_map_bytes
from engine.sampling.tiling import Tiling, Trapezoid, gaussian
from engine.settings import Settings
from engine.units import format_memory

#: How a graph of the VAE runs on an image: in slices, or in tiles; one tile may be the whole.
VaeMode = Tiling | SlicedVae

#: A latent is sampled whole up to so many tiles' area: beyond, SDXL repeats things, and attention grows squared.
_WHOLE_UP_TO = 4
#: Smaller tiles show too little of a picture, whatever a bundle's working size.
_MIN_TILE_PX = 256
_FLOAT = np.dtype(np.float32).itemsize
#: The VAE holds so many of its widest maps at a time; SDXL's are 256 channels wide at full size.
_VAE_MAPS, _VAE_CHANNELS = 4, 256
#: Libraries' own, beside maps and arrays. Measured with the demo: 27 MiB.
_BESIDE_BYTES = 64 << 20
#: Side of the VAE's tiles and how far neighbours overlap, in latent cells.
_VAE_TILE_CELLS, _VAE_OVERLAP = 64, 16
_MIN_VAE_TILE_CELLS = 32


@dataclass(frozen=True)
class SizePlan:
    """Whether sampling and the VAE see the whole image, tiles or slices.

    Attributes:
        tile_px: side of the latent's tiles, which are sampled one by one; None is the whole latent.
        vae_tile_px: side of the VAE's tiles; None is the whole image.
        vae_in_slices: whether the VAE runs on the whole image, a few rows at a time.
    """

    tile_px: int | None = None
    vae_tile_px: int | None = None
    vae_in_slices: bool = False

    def latent_tiles(self, bundle: Bundle, height: int, width: int) -> Tiling:
        """Return the tiles of a latent of `height` × `width` cells for sampling; neighbours overlap by half."""
        if self.tile_px is None:
            return Tiling.whole(height, width)
        size = self.tile_px // bundle.pixels_per_cell
        return Tiling(height, width, size, size // 2, gaussian)

    def vae_mode(self, bundle: Bundle, height: int, width: int) -> VaeMode:
        """Return how the VAE works: in slices, or in these tiles of a latent of `height` × `width` cells."""
        if self.vae_in_slices:
            return SlicedVae()
        if self.vae_tile_px is None:
            return Tiling.whole(height, width)
        size = self.vae_tile_px // bundle.pixels_per_cell
        overlap = min(_VAE_OVERLAP, size // 2)
        return Tiling(height, width, size, size - overlap, Trapezoid(overlap / size))

    def smaller(self, bundle: Bundle, size: Size, *, in_slices: bool = True) -> SizePlan | None:
        """Return the plan to try where memory ran out, None if there is none.

        Args:
            bundle: whose networks work.
            size: (width, height) in pixels that the networks see.
            in_slices: whether the VAE can work in slices there.
        """
        tile = self.tile_px or default_tile(bundle)
        vae_tile = self.vae_tile_px or _VAE_TILE_CELLS * bundle.pixels_per_cell
        if self.vae_tile_px is None and not self.vae_in_slices and in_slices and bundle.has_segments:
            plan = SizePlan(tile, vae_in_slices=True)
        else:
            plan = SizePlan(tile, vae_tile)
        if plan == self:
            plan = plan._halved(bundle)
        while plan._cuts_nothing(size):
            previous, plan = plan, plan._halved(bundle)
            if plan == previous:
                return None
        return None if plan == self else plan

    def _cuts_nothing(self, size: Size) -> bool:
        assert self.tile_px is not None
        return min(self.tile_px, self.vae_tile_px or self.tile_px) >= max(size)

    def _halved(self, bundle: Bundle) -> SizePlan:
        assert self.tile_px is not None
        multiple = bundle.size_multiple
        tile = max(2 * multiple, self.tile_px // 2 // multiple * multiple)
        if self.vae_tile_px is None:
            return replace(self, tile_px=tile)
        vae_tile = max(_MIN_VAE_TILE_CELLS * bundle.pixels_per_cell, self.vae_tile_px // 2 // multiple * multiple)
        return replace(self, tile_px=tile, vae_tile_px=vae_tile)

    def as_data(self) -> dict[str, Any]:
        """Return the plan for the metadata of a result."""
        return {"tile_px": self.tile_px, "vae_tile_px": self.vae_tile_px, "vae_in_slices": self.vae_in_slices}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> SizePlan | None:
        """Return the plan that `as_data` wrote; None where the data is no such plan."""
        tile, vae_tile, in_slices = (data.get(name) for name in ("tile_px", "vae_tile_px", "vae_in_slices"))
        sides = all(side is None or (type(side) is int and side > 0) for side in (tile, vae_tile))
        return cls(tile, vae_tile, in_slices) if sides and isinstance(in_slices, bool) else None

    def __str__(self) -> str:
        sampled = "whole" if self.tile_px is None else f"in tiles of {self.tile_px} pixels"
        decoded = "whole"
        if self.vae_in_slices:
            decoded = "in slices"
        elif self.vae_tile_px is not None:
            decoded = f"in tiles of {self.vae_tile_px} pixels, which is approximate"
        return f"sampled {sampled}, decoded {decoded}"


def default_tile(bundle: Bundle) -> int:
    """Return the side in pixels that a bundle's networks were trained for: SDXL's 1024, the demo's 256."""
    multiple = bundle.size_multiple
    return max(_MIN_TILE_PX, bundle.manifest.defaults.min_size) // multiple * multiple


def choose_plan(bundle: Bundle, size: Size, settings: Settings, budget: MemoryBudget, held_bytes: int = 0) -> SizePlan:
    """Choose how a photo is restored on a computer; photos restored beside it do not matter.

    Args:
        bundle: whose networks work.
        size: (width, height) in pixels that the networks see.
        settings: what they leave open is chosen by size and memory; what they say is done, or refused.
        budget: of the computer's memory.
        held_bytes: of weights that are in memory at once.
    Raises:
        UsageError: tiles of that size do not exist.
        ImageError: what was asked for does not fit, or not even the smallest plan.
    """
    tile = default_tile(bundle)
    _check_tile(bundle, settings)
    if settings.vae_tiles == "exact" and not bundle.has_segments:
        raise UsageError(
            "this bundle's VAE does not work in slices",
            where="--vae-tiles",
            expected="auto, off or fast",
            found="exact",
            fix="bundles for a CPU, built by this version, have what it takes",
        )
    needed = {"tile": sampling_bytes(bundle, size), "vae_tiles": vae_bytes(bundle, size)}
    if settings.vae_tiles == "exact" and (need := slices_bytes(bundle, size)) > budget.bytes:
        raise ImageError(
            "too large for an exact VAE",
            where=f"{size[0]} × {size[1]} pixels",
            expected=f"{format_memory(need)} of memory",
            found=f"{format_memory(budget.bytes)} available",
            fix="--vae-tiles fast needs less, and is approximate",
        )
    for option, need in needed.items():
        if getattr(settings, option) == "off" and need > budget.bytes:
            name = f"--{option.replace('_', '-')}"
            raise ImageError(
                "too large for the memory of this computer",
                where=f"{size[0]} × {size[1]} pixels",
                expected=f"{format_memory(need)} of memory",
                found=f"{format_memory(budget.bytes)} available",
                fix=f"leave out {name} off: {name} auto uses tiles",
            )
    if settings.tile == "auto":
        too_large = _is_beyond_the_whole(bundle, size) or needed["tile"] > budget.activations
        tile_px = tile if too_large and max(size) > tile else None
    else:
        tile_px = None if settings.tile == "off" or settings.tile >= max(size) else settings.tile
    vae_tile_px = _VAE_TILE_CELLS * bundle.pixels_per_cell
    whole_fits = needed["vae_tiles"] <= budget.activations
    in_slices = settings.vae_tiles == "exact"
    if settings.vae_tiles == "auto" and not whole_fits:
        in_slices = bundle.has_segments and slices_bytes(bundle, size) <= budget.slices
    if in_slices:
        return _fitting(SizePlan(tile_px, vae_in_slices=True), bundle, size, settings, budget, held_bytes)
    whole = settings.vae_tiles == "off" or (settings.vae_tiles == "auto" and whole_fits) or max(size) <= vae_tile_px
    plan = SizePlan(tile_px, None if whole else vae_tile_px)
    return _fitting(plan, bundle, size, settings, budget, held_bytes)


def _fitting(
    plan: SizePlan, bundle: Bundle, size: Size, settings: Settings, budget: MemoryBudget, held_bytes: int
) -> SizePlan:
    """Return a plan, or the first smaller one that fits where the settings leave that open.

    Raises:
        ImageError: none does. Where a system ends what takes too much, nothing could be said later.
    """
    is_open = settings.tile == "auto" and settings.vae_tiles in ("auto", "fast")
    while (need := held_bytes + restoration_bytes(bundle, size, plan)) > budget.bytes:
        smaller = plan.smaller(bundle, size, in_slices=settings.vae_tiles == "auto") if is_open else None
        if smaller is None:
            raise ImageError(
                "too large for the memory of this computer",
                where=f"{size[0]} × {size[1]} pixels",
                expected=f"{format_memory(need)} of memory, {plan}",
                found=f"{format_memory(budget.bytes)} available",
                fix="lower --upscale or --min-size, close other programs, or raise a limit on memory, if one is set"
                if is_open
                else "leave --tile and --vae-tiles at auto",
            )
        plan = smaller
    return plan


def restoration_bytes(bundle: Bundle, size: Size, plan: SizePlan) -> int:
    """Return what a restoration takes at (width, height) pixels beside the weights, bounded from above."""

    def part(side: int | None) -> Size:
        return size if side is None else (min(side, size[0]), min(side, size[1]))

    vae = slices_bytes(bundle, size) if plan.vae_in_slices else vae_bytes(bundle, part(plan.vae_tile_px))
    graphs = max(vae, sampling_bytes(bundle, part(plan.tile_px)))
    return _BESIDE_BYTES + MemoryBudget.photo_bytes(size[0] * size[1]) + graphs


def device_plans(bundle: Bundle, size: Size, settings: Settings) -> list[SizePlan]:
    """Return the ways in which a GPU may restore a photo, the best first; its memory decides which one fits.

    Args:
        bundle, size, settings: as `choose_plan`.
    Raises:
        UsageError: tiles of that size do not exist, or the VAE was to work in slices.
    """
    _check_tile(bundle, settings)
    if settings.vae_tiles == "exact":
        raise UsageError(
            "the VAE works in slices on the CPU only",
            where="--vae-tiles",
            expected="auto, off or fast",
            found="exact",
            fix="leave it at auto, which takes the whole where the GPU's memory holds it, or restore on --device cpu",
        )
    tile = default_tile(bundle)
    tiles: list[int | None] = [None, tile] if max(size) > tile else [None]
    if isinstance(settings.tile, int):
        tiles = [None if settings.tile >= max(size) else settings.tile]
    elif settings.tile == "off":
        tiles = [None]
    elif _is_beyond_the_whole(bundle, size):
        tiles = tiles[-1:]
    # A tile's side too: plans may be for that one alone.
    sides = sorted({tile, _VAE_TILE_CELLS * bundle.pixels_per_cell}, reverse=True)
    smaller: list[int | None] = [side for side in sides if side < max(size)]
    vae_tiles = [None, *smaller]
    if settings.vae_tiles == "off":
        vae_tiles = [None]
    elif settings.vae_tiles == "fast" and smaller:
        vae_tiles = smaller
    return [SizePlan(tile_px, vae_tile_px) for tile_px in tiles for vae_tile_px in vae_tiles]


def _check_tile(bundle: Bundle, settings: Settings) -> None:
    multiple = bundle.size_multiple
    if isinstance(settings.tile, int) and settings.tile % multiple:
        raise UsageError(
            "tiles of this size do not exist",
            where="--tile",
            expected=f"a multiple of {multiple}, such as {default_tile(bundle)}",
            found=settings.tile,
        )


def _is_beyond_the_whole(bundle: Bundle, size: Size) -> bool:
    return size[0] * size[1] > _WHOLE_UP_TO * default_tile(bundle) ** 2


def vae_bytes(bundle: Bundle, size: Size) -> int:
    """Return what the VAE needs at (width, height) pixels: its maps, and attention of each cell with each, twice."""
    pixels = size[0] * size[1]
    cells = pixels // bundle.pixels_per_cell**2
    widest = pixels * _VAE_CHANNELS * _FLOAT
    if bundle.has_segments:
        widest = max(
            widest_map_bytes(bundle.manifest.graphs[graph].segments, _input_shape(bundle, graph, size))
            for graph in bundle.vae_graphs
        )
    return _VAE_MAPS * widest + 2 * _FLOAT * cells**2


def slices_bytes(bundle: Bundle, size: Size) -> int:
    """Return what the VAE needs at (width, height) pixels if it works in slices."""
    return max(
        peak_bytes(bundle.manifest.graphs[graph].segments, _input_shape(bundle, graph, size))
        for graph in bundle.vae_graphs
    )


def _input_shape(bundle: Bundle, graph: str, size: Size) -> tuple[int, ...]:
    """Return the shape of the VAE's input in a graph, for one image of (width, height) pixels."""
    factor = bundle.pixels_per_cell
    symbols = {"B": 1, "h": size[1] // factor, "w": size[0] // factor}
    return resolve(bundle.spec(graph).inputs[0].shape, symbols)


def pixels_of_attention(bundle: Bundle, memory_bytes: int) -> int:
    """Return how many pixels the VAE's attention takes at once, which compares each cell with each, in float32."""
    cells = math.isqrt(memory_bytes // _FLOAT)
    return cells * bundle.pixels_per_cell**2


def sampling_bytes(bundle: Bundle, size: Size) -> int:
    """Return what the UNet's attention needs at (width, height) pixels, for a guided step.

    Transformers begin at the second level, whose channels and size the control features tell.
    """
    cells = size[0] * size[1] // bundle.pixels_per_cell**2
    most = 0
    for tensor in bundle.spec("controlnet").outputs:
        _, channels, axis, _ = tensor.shape
        _, ratio = parse_axis(axis)
        if ratio < 1:
            tokens = cells * ratio * ratio
            most = max(most, int(int(channels) // HEAD_CHANNELS * tokens**2))
    return 2 * 2 * _FLOAT * most


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a smaller plan may help."""
    return isinstance(error, (MemoryError, OutOfMemoryError))
