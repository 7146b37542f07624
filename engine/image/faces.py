"""Faces in a picture: their boxes, the squares that are cut out around them, and how squares are put back.

A square is pasted with a mask that is 1 over the face and falls to 0 at the square's border, but not along the
picture's own edge, where nothing could show a seam. Where masks of several faces add up to more than 1, each is
divided by the sum: every pixel is a weighted mean of the picture and the squares, whatever their order. Pure NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.image.photo import Pixels, Size

#: Side of the square around a face over the longer side of its box: hair and chin belong to a face, and a network sees
#: little at an edge.
_SQUARE = 1.8
#: The mask rises over the space between a square's border and its face, but never faster than over this share of it.
_SHORTEST_RAMP = 0.125


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels: `right` and `bottom` are the first column and row outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def of(self, pixels: Pixels) -> Pixels:
        """Return the part of f32[H, W, …] that lies in the box, as a view."""
        return pixels[self.top : self.bottom, self.left : self.right]

    def scaled(self, size: Size, new_size: Size) -> Box:
        """Return the box in the same picture at another size, both (width, height); it is never empty."""
        across, down = (new / old for new, old in zip(new_size, size, strict=True))
        left, top = min(round(self.left * across), new_size[0] - 1), min(round(self.top * down), new_size[1] - 1)
        right, bottom = max(left + 1, round(self.right * across)), max(top + 1, round(self.bottom * down))
        return Box(left, top, right, bottom)

    def within(self, size: Size) -> Box:
        """Return what of the box lies in a picture of (width, height) `size`; it is never empty."""
        left, top = (min(max(0, value), limit - 1) for value, limit in zip((self.left, self.top), size, strict=True))
        return Box(left, top, max(left + 1, min(self.right, size[0])), max(top + 1, min(self.bottom, size[1])))

    def as_data(self) -> list[int]:
        """Return left, top, right and bottom."""
        return [self.left, self.top, self.right, self.bottom]


@dataclass(frozen=True)
class Face:
    """A face that was found.

    Attributes:
        box: from forehead to chin and from cheek to cheek, in the photo's pixels.
        confidence: of the detector, 0 to 1.
    """

    box: Box
    confidence: float


def square_around(face: Box, size: Size) -> Box:
    """Return the square that is cut out around a face: with margin, shifted to lie inside the picture.

    Args:
        face: in the picture.
        size: (width, height) of the picture; a square is never larger than its shorter side.
    """
    side = min(round(_SQUARE * max(face.width, face.height)), *size)
    left, top = (
        min(max(0, round((low + high - side) / 2)), limit - side)
        for low, high, limit in ((face.left, face.right, size[0]), (face.top, face.bottom, size[1]))
    )
    return Box(left, top, left + side, top + side)


def mask_of(square: Box, face: Box, size: Size) -> Pixels:
    """Return what a square's pixels count over the picture's: f32[h, w] of the square, 0 to 1.

    Args:
        square: in the picture.
        face: that it was cut out around.
        size: (width, height) of the picture.
    """
    across = _ramps(square.left, square.right, face.left, face.right, size[0])
    down = _ramps(square.top, square.bottom, face.top, face.bottom, size[1])
    return np.outer(down, across)


def _ramps(start: int, end: int, face_start: int, face_end: int, limit: int) -> Pixels:
    """Return a square's mask along one axis: 0 at its first and last place, 1 over the face."""
    length = end - start
    places = np.arange(length)
    mask = np.ones(length)
    for at_edge, space, distance in (
        (start == 0, face_start - start, places),
        (end == limit, end - face_end, length - 1 - places),
    ):
        if not at_edge:
            share = np.clip(distance / max(space, _SHORTEST_RAMP * length, 1.0), 0.0, 1.0)
            mask *= share * share * (3.0 - 2.0 * share)  # smooth at both ends
    return mask.astype(np.float32)


class Paste:
    """A picture into which squares are pasted; overlapping ones are blended.

    It takes 16 bytes a pixel beside the base: less than the arrays of a restoration, which are gone by then.

    Args:
        base: f32[H, W, 3], which is not changed.
        squares: in it.
        faces: that they were cut out around, in it.
    """

    def __init__(self, base: Pixels, squares: Sequence[Box], faces: Sequence[Box]) -> None:
        self._base, self._squares, self._faces = base, squares, faces
        self.pixels = base.copy()
        self._total = np.zeros(base.shape[:2], np.float32)
        for index, square in enumerate(squares):
            square.of(self._total)[...] += self._mask(index)

    def weights(self, index: int) -> Pixels:
        """Return what a square counts, f32[h, w]; at a pixel, all squares and the picture itself add up to 1."""
        total = self._squares[index].of(self._total)
        return np.divide(self._mask(index), np.maximum(total, 1.0), dtype=np.float32)

    def add(self, index: int, pixels: Pixels) -> None:
        """Paste a square's new pixels, f32[h, w, 3]; each square once."""
        square = self._squares[index]
        part = square.of(self.pixels)
        part += self.weights(index)[:, :, None] * (pixels - square.of(self._base))

    def _mask(self, index: int) -> Pixels:
        size = self._base.shape[1], self._base.shape[0]
        return mask_of(self._squares[index], self._faces[index], size)
