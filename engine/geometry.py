"""Sizes: what the result has, and what is worked at. Pure integers; (width, height) in pixels."""

from __future__ import annotations

import math

Size = tuple[int, int]


def result_size(size: Size, upscale: float) -> Size:
    """Return the size of the result: the photo's times `upscale`, rounded, at least 1 × 1."""
    return _scaled(size[0], upscale), _scaled(size[1], upscale)


def working_size(size: Size, min_size: int, multiple: int) -> Size:
    """Return the size that the networks work at.

    Args:
        size: of the result.
        min_size: the shorter side is scaled up to it if it is smaller.
        multiple: both sides are rounded to a multiple of it, and are at least one.
    Source: SPEC, "Before and after the networks".
    """
    scale = max(1.0, min_size / min(size))
    width, height = (max(1, _scaled(side, scale / multiple)) * multiple for side in size)
    return width, height


def _scaled(side: int, factor: float) -> int:
    return max(1, math.floor(side * factor + 0.5))
