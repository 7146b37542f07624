"""Whole, in tiles, or not at all: how a photo of a size is restored, by what memory holds.

Arithmetic on shapes, so that it is known before anything is loaded. What ONNX Runtime needs beside the weights
is bounded from above: what a guess misses ends as "out of memory", and the next smaller plan is tried once.
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
from engine.image.preprocess import Size
from engine.memory.vae_slices import SlicedVae, peak_bytes
from engine.sampling.tiling import Tiling, Trapezoid, gaussian
from engine.settings import Settings
from engine.units import format_memory

#: How a graph of the VAE runs on an image: by slices, or in tiles; one tile may be the whole.
VaeMode = Tiling | SlicedVae

#: Of the computer's memory, what activations may take if nobody asks for more.
_SHARE = 0.5
#: And of it, what the VAE's maps may take by rows: they are held beside everything else of a large photo.
_ROWS_SHARE = 0.25
#: A latent is sampled whole up to so many windows' area: beyond, SDXL repeats things, and attention grows squared.
_WHOLE_UP_TO = 4
#: Smaller windows show too little of a picture, whatever a bundle's working size.
_LEAST_WINDOW_PX = 256
_FLOAT = np.dtype(np.float32).itemsize
#: SDXL's VAE is 256 channels wide at full size, in float32; four such maps at a time.
_VAE_BYTES_PER_PIXEL = 4 * 256 * _FLOAT
#: Side of the VAE's tiles and how far neighbours overlap, in latent cells.
_VAE_CELLS, _VAE_OVERLAP = 64, 16
_LEAST_VAE_CELLS = 32


@dataclass(frozen=True)
class SizePlan:
    """Whether sampling and the VAE see the whole image, tiles or slices.

    Attributes:
        window_px: side of the windows that are sampled; None is the whole latent.
        vae_px: side of the VAE's tiles; None is the whole image.
        vae_by_rows: whether the VAE runs on the whole image, a few rows at a time.
    """

    window_px: int | None = None
    vae_px: int | None = None
    vae_by_rows: bool = False

    def windows(self, bundle: Bundle, height: int, width: int) -> Tiling:
        """Return the windows of a latent of `height` × `width` cells that are sampled, half a window apart."""
        if self.window_px is None:
            return Tiling.whole(height, width)
        size = self.window_px // bundle.pixels_per_cell
        return Tiling(height, width, size, size // 2, gaussian)

    def vae_mode(self, bundle: Bundle, height: int, width: int) -> VaeMode:
        """Return how the VAE works: by rows, or in these tiles of a latent of `height` × `width` cells."""
        if self.vae_by_rows:
            return SlicedVae()
        if self.vae_px is None:
            return Tiling.whole(height, width)
        size = self.vae_px // bundle.pixels_per_cell
        overlap = min(_VAE_OVERLAP, size // 2)
        return Tiling(height, width, size, size - overlap, Trapezoid(overlap / size))

    def smaller(self, bundle: Bundle, size: Size, *, by_rows: bool = True) -> SizePlan | None:
        """Return the plan to try where memory ran out, None if there is none.

        Args:
            bundle: whose networks work.
            size: (width, height) in pixels that the networks see.
            by_rows: whether the VAE can work by rows there.
        """
        window = self.window_px or default_window(bundle)
        tile = self.vae_px or _VAE_CELLS * bundle.pixels_per_cell
        if self.vae_px is None and not self.vae_by_rows and by_rows and bundle.has_pieces:
            plan = SizePlan(window, vae_by_rows=True)
        else:
            plan = SizePlan(window, tile)
        if plan == self:
            plan = plan._halved(bundle)
        while plan._cuts_nothing(size):
            previous, plan = plan, plan._halved(bundle)
            if plan == previous:
                return None
        return None if plan == self else plan

    def _cuts_nothing(self, size: Size) -> bool:
        assert self.window_px is not None
        return min(self.window_px, self.vae_px or self.window_px) >= max(size)

    def _halved(self, bundle: Bundle) -> SizePlan:
        assert self.window_px is not None
        multiple = bundle.size_multiple
        window = max(2 * multiple, self.window_px // 2 // multiple * multiple)
        if self.vae_px is None:
            return replace(self, window_px=window)
        tile = max(_LEAST_VAE_CELLS * bundle.pixels_per_cell, self.vae_px // 2 // multiple * multiple)
        return replace(self, window_px=window, vae_px=tile)

    def as_data(self) -> dict[str, Any]:
        """Return the plan for the metadata of a result."""
        return {"window_px": self.window_px, "vae_tile_px": self.vae_px, "vae_by_rows": self.vae_by_rows}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> SizePlan | None:
        """Return the plan that `as_data` wrote; None where the data is no such plan."""
        window, tile, by_rows = (data.get(name) for name in ("window_px", "vae_tile_px", "vae_by_rows"))
        sides = all(side is None or (type(side) is int and side > 0) for side in (window, tile))
        return cls(window, tile, by_rows) if sides and isinstance(by_rows, bool) else None

    def __str__(self) -> str:
        sampled = "whole" if self.window_px is None else f"in windows of {self.window_px} pixels"
        decoded = "whole" if self.vae_px is None else f"in tiles of {self.vae_px} pixels, which is approximate"
        return f"sampled {sampled}, decoded {'by rows' if self.vae_by_rows else decoded}"


def default_window(bundle: Bundle) -> int:
    """Return the side in pixels that a bundle's networks were trained for: SDXL's 1024, the demo's 256."""
    multiple = bundle.size_multiple
    return max(_LEAST_WINDOW_PX, bundle.manifest.defaults.min_size) // multiple * multiple


def choose_plan(bundle: Bundle, size: Size, settings: Settings, memory_bytes: int | None) -> SizePlan:
    """Choose how a photo is restored on a computer; photos restored beside it do not matter.

    Args:
        bundle: whose networks work.
        size: (width, height) in pixels that the networks see.
        settings: what they leave open is chosen by size and memory; what they say is done, or refused.
        memory_bytes: of the computer; None if the system does not tell.
    Raises:
        UsageError: windows of that side do not exist.
        ImageError: what was asked for does not fit.
    """
    window = default_window(bundle)
    memory = math.inf if memory_bytes is None else memory_bytes
    _check_window(bundle, settings)
    if settings.vae_tiles == "exact" and not bundle.has_pieces:
        raise UsageError(
            "this bundle's VAE does not work by rows",
            where="--vae-tiles",
            expected="auto, off or fast",
            found="exact",
            fix="bundles for a CPU, built by this version, have what it takes",
        )
    needed = {"tile": sampling_bytes(bundle, size), "vae_tiles": vae_bytes(bundle, size)}
    if settings.vae_tiles == "exact" and (need := rows_bytes(bundle, size)) > memory:
        raise ImageError(
            "too large for an exact VAE",
            where=f"{size[0]} × {size[1]} pixels",
            expected=f"{format_memory(need)} of memory",
            found=format_memory(int(memory)),
            fix="--vae-tiles fast needs less, and is approximate",
        )
    for option, need in needed.items():
        if getattr(settings, option) == "off" and need > memory:
            name = f"--{option.replace('_', '-')}"
            raise ImageError(
                "too large for the memory of this computer",
                where=f"{size[0]} × {size[1]} pixels",
                expected=f"{format_memory(need)} of memory",
                found=format_memory(int(memory)),
                fix=f"leave out {name} off: {name} auto works in windows",
            )
    if settings.tile == "auto":
        too_large = _is_beyond_the_whole(bundle, size) or needed["tile"] > _SHARE * memory
        window_px = window if too_large and max(size) > window else None
    else:
        window_px = None if settings.tile == "off" or settings.tile >= max(size) else settings.tile
    vae_px = _VAE_CELLS * bundle.pixels_per_cell
    whole_fits = needed["vae_tiles"] <= _SHARE * memory
    by_rows = settings.vae_tiles == "exact"
    if settings.vae_tiles == "auto" and not whole_fits:
        by_rows = bundle.has_pieces and rows_bytes(bundle, size) <= _ROWS_SHARE * memory
    if by_rows:
        return SizePlan(window_px, vae_by_rows=True)
    whole = settings.vae_tiles == "off" or (settings.vae_tiles == "auto" and whole_fits) or max(size) <= vae_px
    return SizePlan(window_px, None if whole else vae_px)


def device_plans(bundle: Bundle, size: Size, settings: Settings) -> list[SizePlan]:
    """Return the ways in which a GPU may restore a photo, the best first; its memory decides which one fits.

    Args:
        bundle, size, settings: as `choose_plan`.
    Raises:
        UsageError: windows of that side do not exist, or the VAE was to work by rows.
    """
    _check_window(bundle, settings)
    if settings.vae_tiles == "exact":
        raise UsageError(
            "the VAE works by rows on the CPU only",
            where="--vae-tiles",
            expected="auto, off or fast",
            found="exact",
            fix="leave it at auto, which takes the whole where the GPU's memory holds it, or restore on --device cpu",
        )
    window = default_window(bundle)
    windows: list[int | None] = [None, window] if max(size) > window else [None]
    if isinstance(settings.tile, int):
        windows = [None if settings.tile >= max(size) else settings.tile]
    elif settings.tile == "off":
        windows = [None]
    elif _is_beyond_the_whole(bundle, size):
        windows = windows[-1:]
    # A window's side too: plans may be for that one alone.
    sides = sorted({window, _VAE_CELLS * bundle.pixels_per_cell}, reverse=True)
    smaller: list[int | None] = [side for side in sides if side < max(size)]
    tiles = [None, *smaller]
    if settings.vae_tiles == "off":
        tiles = [None]
    elif settings.vae_tiles == "fast" and smaller:
        tiles = smaller
    return [SizePlan(window_px, vae_px) for window_px in windows for vae_px in tiles]


def _check_window(bundle: Bundle, settings: Settings) -> None:
    multiple = bundle.size_multiple
    if isinstance(settings.tile, int) and settings.tile % multiple:
        raise UsageError(
            "windows of this side do not exist",
            where="--tile",
            expected=f"a multiple of {multiple}, such as {default_window(bundle)}",
            found=settings.tile,
        )


def _is_beyond_the_whole(bundle: Bundle, size: Size) -> bool:
    return size[0] * size[1] > _WHOLE_UP_TO * default_window(bundle) ** 2


def vae_bytes(bundle: Bundle, size: Size) -> int:
    """Return what the VAE needs at (width, height) pixels: its maps, and attention of each cell with each, twice."""
    pixels = size[0] * size[1]
    cells = pixels // bundle.pixels_per_cell**2
    return _VAE_BYTES_PER_PIXEL * pixels + 2 * _FLOAT * cells**2


def rows_bytes(bundle: Bundle, size: Size) -> int:
    """Return what the VAE needs at (width, height) pixels if it works by rows."""
    factor = bundle.pixels_per_cell
    symbols = {"B": 1, "h": size[1] // factor, "w": size[0] // factor}
    return max(
        peak_bytes(bundle.manifest.graphs[graph].pieces, resolve(bundle.spec(graph).inputs[0].shape, symbols))
        for graph in bundle.vae_graphs
    )


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
