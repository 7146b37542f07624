"""From photos to the networks' input, and from their output to photos."""

from __future__ import annotations

import math
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from engine.bundle.manifest import Bundle
from engine.errors import ImageError, RestoreError
from engine.image import colorfix
from engine.image.files import read_photo
from engine.image.photo import Photo, Pixels, Size, photo_from_array, resize, resized_plane
from engine.image.pillow_images import photo_from_image
from engine.settings import ColorFix, Settings

_COLOR_FIXES = {"wavelet": colorfix.wavelet, "adain": colorfix.adain}
PhotoLike = Photo | Image | NDArray[Any] | str | PathLike[str]


def load_photo(photo: PhotoLike, *, max_pixels: int | None = None) -> Photo:
    """Return a photo given as a path, a Pillow image, an array or a `Photo`.

    Args:
        photo: one of these.
        max_pixels: that a file may have; None for any number.
    Raises:
        ImageError: it is none of these, or cannot be read.
    """
    if isinstance(photo, Photo):
        return photo
    if isinstance(photo, (str, PathLike)):
        return read_photo(Path(photo), max_pixels=max_pixels)
    if isinstance(photo, Image):
        return photo_from_image(photo)
    if isinstance(photo, np.ndarray):
        return photo_from_array(photo)
    expected = "a path, a Pillow image, an array or a Photo"
    raise ImageError("not a photo", expected=expected, found=type(photo).__name__)


def checked_working_size(bundle: Bundle, photo_size: Size, settings: Settings, max_pixels: int) -> Size:
    """Return a photo's working size, (width, height) in pixels, if the networks can take it.

    Args:
        bundle: whose networks work.
        photo_size: (width, height) in pixels of the photo.
        settings: of the restoration.
        max_pixels: limit of the networks' input.
    Raises:
        ImageError: it is too large for the memory of this computer.
    """
    size = working_size(result_size(photo_size, settings.upscale), settings.min_size, bundle.size_multiple)
    if size[0] * size[1] > max_pixels:
        raise ImageError(
            "too large for the memory of this computer",
            where=f"a photo of {photo_size[0]} × {photo_size[1]} pixels",
            expected=f"up to {max_pixels / 1e6:.1f} million pixels on this computer",
            found=f"{size[0]} × {size[1]} with --upscale {settings.upscale:g} --min-size {settings.min_size}",
            fix="lower --upscale or --min-size, or cut the photo into parts",
        )
    return size


def preprocess(photo: Photo, size: Size) -> Pixels:
    """Return the networks' input for a photo: f32[3, H, W] in [-1, 1], resized to (width, height) `size`."""
    return to_network(resize(photo.rgb, size))


def fix_colors(restored: Pixels, stage1: Pixels | None, kind: ColorFix, *, out: Pixels | None = None) -> Pixels:
    """Return restored pixels with the colours of stage 1, both f32[B, 3, H, W] in about [-1, 1].

    `out` is where they go, as in NumPy; it may be `restored`.
    """
    return restored if kind == "none" or stage1 is None else _COLOR_FIXES[kind](restored, stage1, out=out)


def to_network(rgb: Pixels) -> Pixels:
    """Return f32[3, H, W] in [-1, 1] for f32[H, W, 3] in [0, 1]."""
    pixels = np.array(rgb.transpose(2, 0, 1), np.float32, order="C")  # a copy, which may be changed
    pixels *= np.float32(2.0)
    pixels -= np.float32(1.0)
    return pixels


def from_network(pixels: Pixels) -> Pixels:
    """Return f32[H, W, 3] in [0, 1] for f32[3, H, W] in about [-1, 1]; what lies outside is clipped."""
    return ((pixels.transpose(1, 2, 0) + np.float32(1.0)) * np.float32(0.5)).clip(0.0, 1.0)


def postprocess(pixels: Pixels, source: Photo, size: Size) -> Photo:
    """Return f32[3, H, W] in [-1, 1] as a photo of (width, height) `size`, with its source's other data.

    Raises:
        RestoreError: the networks gave values that are not finite.
    """
    rgb = np.empty((size[1], size[0], 3), np.float32)
    for channel, plane in enumerate(pixels):  # one after the other: a large photo fills most of the memory
        if not all(np.isfinite(row).all() for row in plane):
            raise RestoreError(
                "the networks gave values that are not finite",
                fix="build the bundle with --precision fp32, and check the checkpoints",
            )
        unit = plane + np.float32(1.0)
        unit *= np.float32(0.5)
        np.clip(unit, 0.0, 1.0, out=unit)
        rgb[:, :, channel] = resized_plane(unit, size)
    alpha = None if source.alpha is None else resize(source.alpha, size)
    return replace(source, rgb=rgb, alpha=alpha)


def result_size(size: Size, upscale: float) -> Size:
    """Return the size of the result: the photo's times `upscale`, rounded, at least 1 × 1."""
    return _scaled(size[0], upscale), _scaled(size[1], upscale)


def working_size(size: Size, min_size: int, multiple: int) -> Size:
    """Return the size that the networks see.

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
