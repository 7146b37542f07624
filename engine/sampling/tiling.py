"""Tiles over an image, and how what is computed in them becomes one image again.

Tiles are of one shape, so that a network sees one static size whatever the image's. They lie on a grid;
the last of a row or column is shifted inward. A place that several tiles cover takes a weighted mean,
whose weights are products of one profile along each axis: symmetric in both, and their sum is one everywhere.
Pure NumPy.

Sources: MultiDiffusion (arXiv 2302.08113) for blending at every step; Mixture of Diffusers (arXiv 2302.02412)
for Gaussian weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
#: The share of each place of a tile's side, by its length: f64[length], symmetric, above 0.
Profile = Callable[[int], NDArray[np.float64]]

#: Of a tile's side: the Gaussian's standard deviation.
_DEVIATION = 0.1


@dataclass(frozen=True)
class Tile:
    """A part of an image: its corner and its size, in the image's own cells or pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: Array) -> Array:
        """Return the part f32[B,C,height,width] of an image f32[B,C,H,W], as a view."""
        return image[:, :, self.top : self.top + self.height, self.left : self.left + self.width]


def gaussian(length: int) -> NDArray[np.float64]:
    """Return a bell over a tile's side: the middle, where a network sees most around, counts most."""
    places = np.arange(length) - (length - 1) / 2
    return np.exp(-0.5 * (places / (_DEVIATION * length)) ** 2)


@dataclass(frozen=True)
class Trapezoid:
    """A profile that is flat, falls along the overlap, and leaves out what lies at a cut.

    Attributes:
        overlap: of neighbouring tiles, as a share of a tile's side.
    """

    overlap: float

    def __call__(self, length: int) -> NDArray[np.float64]:
        """Return f64[length]: nothing over the outer quarter of the overlap, all behind three quarters."""
        places = np.arange(length) + 0.5
        depth = np.minimum(places, length - places) / max(self.overlap * length, 1.0)
        # Not quite nothing: along the image's own edge there is no other tile.
        return np.clip((depth - 0.25) * 2.0, 1e-9, 1.0)


@dataclass(frozen=True, eq=False)
class Axis:
    """Windows along one side of an image.

    Attributes:
        starts: of each tile.
        weights: of its places, f32[n, size]; a place's sum over all tiles is 1.
    """

    starts: tuple[int, ...]
    weights: Array

    @property
    def size(self) -> int:
        """Side of a tile."""
        return int(self.weights.shape[1])


@dataclass(frozen=True)
class Tiling:
    """The tiles of an image, row by row.

    Attributes:
        height, width: of the image.
        size: side of a tile; where the image is smaller, a tile has the image's side.
        stride: from one tile to the next, at most `size`.
        profile: of the weights along a side.
    """

    height: int
    width: int
    size: int
    stride: int
    profile: Profile = gaussian

    @classmethod
    def whole(cls, height: int, width: int) -> Tiling:
        """Return the one tile that holds an image."""
        side = max(height, width)
        return cls(height, width, side, side)

    def scaled(self, factor: int) -> Tiling:
        """Return the same tiles on an image with `factor` pixels for each cell."""
        return replace(
            self,
            height=self.height * factor,
            width=self.width * factor,
            size=self.size * factor,
            stride=self.stride * factor,
        )

    @property
    def is_whole(self) -> bool:
        """Tell whether one tile holds everything."""
        return len(self) == 1

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def __iter__(self) -> Iterator[Tile]:
        height, width = min(self.size, self.height), min(self.size, self.width)
        for top in self.rows.starts:
            for left in self.columns.starts:
                yield Tile(top, left, height, width)

    def weights(self, index: int) -> Array:
        """Return what the values of tile number `index` count, f32[height,width]; all tiles' sum is 1."""
        row, column = divmod(index, len(self.columns.starts))
        return np.outer(self.rows.weights[row], self.columns.weights[column])

    def add(self, total: Array, index: int, values: Array) -> None:
        """Add a tile's values, f32[B,C,height,width], weighted, to the image f32[B,C,H,W]."""
        part = self._tiles[index].of(total)
        part += values * self.weights(index)

    @cached_property
    def _tiles(self) -> tuple[Tile, ...]:
        return tuple(self)

    @cached_property
    def rows(self) -> Axis:
        """The tiles from top to bottom."""
        return self._axis(self.height)

    @cached_property
    def columns(self) -> Axis:
        """The tiles from left to right."""
        return self._axis(self.width)

    def _axis(self, length: int) -> Axis:
        size = min(self.size, length)
        starts = starts_of(length, size, min(self.stride, size))
        profile = self.profile(size)
        total = np.zeros(length)
        for start in starts:
            total[start : start + size] += profile
        weights = np.stack([profile / total[start : start + size] for start in starts])
        return Axis(starts, weights.astype(np.float32))


def starts_of(length: int, size: int, stride: int) -> tuple[int, ...]:
    """Return where tiles start along an axis: `stride` apart, the last one shifted inward.

    Args:
        length: of the axis.
        size: of a tile, at most `length`.
        stride: 1 … size.
    """
    assert 1 <= stride <= size <= length, (length, size, stride)
    return (*range(0, length - size, stride), length - size)


def run_tiled(
    source: Array,
    tiles: Tiling,
    target: Tiling,
    run: Callable[[Array], Array],
    on_tile: Callable[[int, int], None] | None = None,
) -> Array:
    """Run a network that maps images to images tile by tile, and blend what it gives.

    Args:
        source: f32[B,C,H,W].
        tiles: of the source.
        target: the same tiles on the result.
        run: takes f32[B,C,height,width] of a tile.
        on_tile: told how many tiles are done, and how many there are.
    Returns:
        f32[B,D,H',W'].
    """
    total: Array | None = None
    for index, tile in enumerate(tiles):
        values = run(np.ascontiguousarray(tile.of(source)))
        if total is None:
            total = np.zeros((*values.shape[:2], target.height, target.width), np.float32)
        target.add(total, index, values)
        if on_tile is not None:
            on_tile(index + 1, len(tiles))
    assert total is not None
    return total
