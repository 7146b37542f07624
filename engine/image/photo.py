"""A picture in memory, upright: its pixels, and what is carried from its file to its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import ImageError

#: What interpolation may add to [0, 1]; more is another scale.
_OVERSHOOT = 0.25

Pixels = NDArray[np.float32]
#: (width, height) in pixels.
Size = tuple[int, int]


@dataclass(frozen=True)
class Photo:
    """A picture, upright.

    Attributes:
        rgb: f32[H, W, 3] in [0, 1]; a grey photo has three equal channels.
        alpha: f32[H, W] in [0, 1], or None.
        grey: whether it is stored with a single channel.
        bits: a channel has in its file, 8 or 16.
        icc_profile: of the colours, as stored; None if there is none.
        exif: the block from its byte order on, without what holds for the stored file alone, as orientation.
        xmp: the packet, likewise.
        dpi: resolution, or None.
        texts: a PNG's texts by keyword; a JPEG's comment as "Comment". Bytes that are not UTF-8 are surrogates.
        iptc: the records of captions, or None.
        cicp: code points of the colours, 4 bytes (ITU-T H.273), where a file states them so; None for sRGB's.
        warnings: what could not be carried over from the file, a sentence each.
    """

    rgb: Pixels
    alpha: Pixels | None = None
    grey: bool = False
    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    texts: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    bits: int = 8
    iptc: bytes | None = None
    cicp: bytes | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]


def photo_from_array(rgb: NDArray[Any]) -> Photo:
    """Return a photo of an array.

    Args:
        rgb: u8[H, W, 3], or f32[H, W, 3] in [0, 1].
    Raises:
        ImageError: of another shape or dtype, or with values that are not finite.
    """
    array = np.asarray(rgb)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ImageError("wrong shape", where="image array", expected="[H, W, 3]", found=list(array.shape))
    if array.dtype == np.uint8:
        return Photo(array.astype(np.float32) / np.float32(255.0))
    if array.dtype != np.float32:
        raise ImageError("wrong dtype", where="image array", expected="uint8 or float32", found=array.dtype)
    if not np.isfinite(array).all():
        raise ImageError("holds values that are not finite", where="image array")
    if array.min() < -_OVERSHOOT or array.max() > 1.0 + _OVERSHOOT:
        raise ImageError(
            "holds values out of range",
            where="image array",
            expected="float32 in [0, 1]",
            found=f"{array.min():g} to {array.max():g}",
            fix="divide by the largest value, or give uint8",
        )
    return Photo(array.clip(0.0, 1.0))


def resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize by bicubic interpolation in float, antialiased when it shrinks.

    Args:
        pixels: f32[H, W] or f32[H, W, C] in [0, 1].
        size: (width, height) in pixels.
    Returns:
        f32 of that size, overshoot clipped to [0, 1]; the same array if the size is the same.
    """
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    channels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    resized = np.empty((size[1], size[0], channels.shape[2]), np.float32)
    for index in range(channels.shape[2]):
        resized[:, :, index] = resized_plane(np.ascontiguousarray(channels[:, :, index]), size)
    return resized[:, :, 0] if pixels.ndim == 2 else resized


def resized_plane(plane: Pixels, size: Size) -> Pixels:
    """Resize one channel, f32[H, W] that lies together in memory, as `resize` does."""
    if (plane.shape[1], plane.shape[0]) == size:
        return plane
    return np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC)).clip(0.0, 1.0)


def lying(upright: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return a view of an upright picture as EXIF's orientation has it lie in its file.

    Args:
        upright: [H, W, …].
        orientation: 1 to 8, as EXIF counts.
    """
    turned = upright.swapaxes(0, 1) if orientation >= 5 else upright
    down, across = {
        1: (1, 1),
        2: (1, -1),
        3: (-1, -1),
        4: (-1, 1),
        5: (1, 1),
        6: (-1, 1),
        7: (-1, -1),
        8: (1, -1),
    }[orientation]
    return turned[::down, ::across]
