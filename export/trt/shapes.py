"""The sizes that plans are compiled for: what `--shapes` and `--batch` mean for each graph."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.bundle.graphspec import GraphSpec
from engine.bundle.profiles import Profile, Range
from engine.errors import UsageError

#: Chunks of 75 tokens that texts may fill, in the profiles that are ranges.
MAX_CHUNKS = 8
MAX_BATCH = 64
_MAX_SIDE_PX = 8192
#: Of the range that is compiled for if no other is asked: the sizes of verification fit.
_LEAST_SIDE_PX = 64
_SHAPE = re.compile(r"(?P<width>\d+)(?:x(?P<height>\d+))?|(?P<low>\d+)-(?P<high>\d+)", re.ASCII)


@dataclass(frozen=True)
class WorkShape:
    """A working size, or a range of sizes, in pixels; `width` and `height` are (least, most)."""

    width: tuple[int, int]
    height: tuple[int, int]

    @property
    def is_static(self) -> bool:
        return self.width[0] == self.width[1] and self.height[0] == self.height[1]


def parse_shapes(text: str) -> tuple[WorkShape, ...]:
    """Return the sizes that a list such as "512,1024x768,256-2048" names, static ones first.

    Raises:
        UsageError: not such a list.
    """
    shapes = []
    for part in text.replace(" ", "").split(","):
        match = _SHAPE.fullmatch(part)
        if match is None:
            raise _not_a_shape(part)
        if match["low"] is not None:
            side = (int(match["low"]), int(match["high"]))
            shape = WorkShape(side, side)
        else:
            width, height = int(match["width"]), int(match["height"] or match["width"])
            shape = WorkShape((width, width), (height, height))
        if not all(0 < least <= most <= _MAX_SIDE_PX for least, most in (shape.width, shape.height)):
            raise _not_a_shape(part)
        shapes.append(shape)
    return tuple(sorted(dict.fromkeys(shapes), key=lambda shape: not shape.is_static))


def default_shapes(min_size: int) -> tuple[WorkShape, ...]:
    """Return the square that most photos have as their working size, and a range around it for all others."""
    sides = (_LEAST_SIDE_PX, 2 * min_size)
    return (WorkShape((min_size, min_size), (min_size, min_size)), WorkShape(sides, sides))


def profiles_for(
    spec: GraphSpec, shapes: tuple[WorkShape, ...], batch: int, pixels_per_cell: int
) -> tuple[Profile, ...]:
    """Return a graph's optimization profiles, one per shape and none twice.

    Args:
        spec: of the graph.
        shapes: in pixels; static ones are for texts of one chunk and one photo at a time.
        batch: photos that are restored together at most.
        pixels_per_cell: side of what a latent cell stands for.
    Raises:
        UsageError: a side is no multiple of what the graph works in.
    """
    rows = 2 if spec.role == "denoiser" else 1  # a guided step sees every photo with both texts
    if spec.role == "text":  # a row for each chunk of either text
        return (Profile(ranges={"B": Range(1, 2, 2 * MAX_CHUNKS)}),)
    profiles = []
    for shape in shapes:
        photos, chunks = (1, 1) if shape.is_static else (batch, MAX_CHUNKS)
        ranges = {"B": Range(1, rows, rows * photos), "k": Range(1, 1, chunks)}
        for symbol, (least, most) in (("h", shape.height), ("w", shape.width)):
            multiple = pixels_per_cell * spec.multiples.get(symbol, 1)
            if least % multiple or most % multiple:
                raise UsageError(
                    "a side that the networks cannot take",
                    where="--shapes",
                    expected=f"multiples of {multiple}",
                    found=f"{least}" if least == most else f"{least}-{most}",
                )
            least, most = least // pixels_per_cell, most // pixels_per_cell
            ranges[symbol] = Range(least, least if shape.is_static else _between(least, most, spec, symbol), most)
        profiles.append(Profile(ranges={symbol: ranges[symbol] for symbol in spec.symbols}))
    return tuple(profiles)


def _between(least: int, most: int, spec: GraphSpec, symbol: str) -> int:
    """Return the middle of a range, as a multiple: what a range's kernels are chosen for."""
    multiple = spec.multiples.get(symbol, 1)
    return max(least, (least + most) // 2 // multiple * multiple)


def _not_a_shape(part: str) -> UsageError:
    return UsageError(
        "not a size",
        where="--shapes",
        expected=f"pixels up to {_MAX_SIDE_PX}: 512, 1024x768 (width, height) or 256-2048 (any side between)",
        found=repr(part),
    )
