"""Between photos and what the networks see of them."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from engine.errors import ImageError, RestoreError
from engine.geometry import Size
from engine.imageio import Photo, photo_from_array, photo_from_image, read_photo, resize

Pixels = NDArray[np.float32]
PhotoLike = Photo | Image | NDArray[Any] | str | PathLike[str]


def as_photo(photo: PhotoLike) -> Photo:
    """Return whatever a caller calls a photo as one.

    Raises:
        ImageError: it is none, or cannot be read.
    """
    if isinstance(photo, Photo):
        return photo
    if isinstance(photo, (str, PathLike)):
        return read_photo(Path(photo))
    if isinstance(photo, Image):
        return photo_from_image(photo)
    if isinstance(photo, np.ndarray):
        return photo_from_array(photo)
    expected = "a path, a Pillow image, an array or a Photo"
    raise ImageError("not a photo", expected=expected, found=type(photo).__name__)


def to_network(rgb: Pixels) -> Pixels:
    """Return f32[3, H, W] in [-1, 1] for f32[H, W, 3] in [0, 1]."""
    return np.ascontiguousarray(rgb.transpose(2, 0, 1)) * np.float32(2.0) - np.float32(1.0)


def finish(pixels: Pixels, source: Photo, size: Size) -> Photo:
    """Return the restored photo: f32[3, H, W] in [-1, 1] at the size asked for, dressed as its source."""
    rgb = (np.ascontiguousarray(pixels.transpose(1, 2, 0)) + np.float32(1.0)) * np.float32(0.5)
    if not np.isfinite(rgb).all():
        raise RestoreError(
            "the networks gave values that are not finite",
            fix="build the bundle with --precision fp32, and check the checkpoints",
        )
    alpha = None if source.alpha is None else resize(source.alpha, size)
    return replace(source, rgb=resize(rgb.clip(0.0, 1.0), size), alpha=alpha)
