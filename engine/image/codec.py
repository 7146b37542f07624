"""libvips: pixels out of JPEG, PNG, WebP, TIFF and AVIF files, a few rows at a time, and into them."""

from __future__ import annotations

import io
import logging
import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageCms

from engine.image.formats import Format
from engine.image.photo import Photo, Pixels, lying

#: Rows that are decoded at a time: few enough for small buffers, and whole strips or blocks of most files.
_ROWS = 256
_LOADERS = {"JPEG": "jpegload", "PNG": "pngload", "WebP": "webpload", "TIFF": "tiffload", "AVIF": "heifload"}
_DTYPES: dict[str, type[np.generic]] = {
    "uchar": np.uint8,
    "char": np.int8,
    "ushort": np.uint16,
    "short": np.int16,
    "uint": np.uint32,
    "int": np.int32,
    "float": np.float32,
    "double": np.float64,
}
#: A classic TIFF's offsets have 32 bits; some of them are needed for what follows the pixels.
_CLASSIC_TIFF_BYTES = 0xF000_0000
_lock = threading.Lock()


@dataclass(frozen=True)
class Samples:
    """What a picture's bands mean.

    Attributes:
        colours: how many of them are colours: 1, 3, or 4 for inks.
        alpha: the band of transparency, None if there is none.
        black, white: values of no light and of full light.
        clear: alpha of what is not transparent at all.
    """

    colours: int
    alpha: int | None
    black: float
    white: float
    clear: float


@lru_cache(maxsize=1)
def vips() -> Any:
    """Return the library; only here, since not every command reads photos."""
    # It warns on standard error of what errors tell anyway.
    os.environ.setdefault("VIPS_WARNING", "1")
    with _lock:
        import pyvips

        logging.getLogger("pyvips").setLevel(logging.ERROR)
        pyvips.cache_set_max(0)  # it would keep the last photos
    return pyvips


def open_pixels(data: bytes, file_format: Format, *, fail_on: str, **options: Any) -> Any:
    """Return a file's picture without its pixels, which are decoded as they are asked for, from the top.

    Args:
        data: the file.
        file_format: of it.
        fail_on: what of "truncated", "error" and "warning" ends it.
        **options: of the format's loader.
    Raises:
        pyvips.Error: the file is damaged.
    """
    library = vips()
    library.vips_lib.vips_error_clear()  # what earlier files left there fills the room for this one's errors
    source = library.Source.new_from_memory(data)
    load = getattr(library.Image, f"{_LOADERS[file_format.name]}_source")
    return load(source, access="sequential", fail_on=fail_on, **options)


def dtype_of(image: Any) -> np.dtype[Any]:
    """Return the type of a picture's samples.

    Raises:
        ValueError: they are complex numbers.
    """
    if image.format not in _DTYPES:
        raise ValueError(f"samples are {image.format}")
    return np.dtype(_DTYPES[image.format])


def to_srgb(image: Any, *, embedded: bool, wide: bool) -> tuple[Any, bytes]:
    """Return a print or Lab picture in sRGB, and sRGB's profile.

    Args:
        image: as opened.
        embedded: whether its own profile is used, which print colours need.
        wide: whether the result has 16 bits a channel.
    Raises:
        pyvips.Error: the profile cannot be used.
        ValueError: it is none of print colours; the library would take its own instead.
    """
    if embedded:
        try:
            space = ImageCms.ImageCmsProfile(io.BytesIO(image.get("icc-profile-data"))).profile.xcolor_space
        except (ImageCms.PyCMSError, OSError) as error:
            raise ValueError(str(error)) from error
        if space.strip() != "CMYK":
            raise ValueError(f"a profile of {space.strip()} colours")
        image = image.icc_transform("srgb", embedded=True, intent="perceptual", depth=16 if wide else 8)
    else:
        image = image.colourspace("rgb16" if wide else "srgb")
    return image, bytes(vips().Operation.call("profile_load", "srgb"))


def read_pixels(image: Any, samples: Samples, orientation: int) -> tuple[Pixels, Pixels | None]:
    """Decode a picture, upright.

    Args:
        image: as opened.
        samples: what its bands mean.
        orientation: 1 to 8, as EXIF counts.
    Returns:
        f32[H, W, 3] and f32[H, W] or None, in [0, 1].
    Raises:
        pyvips.Error: the file is damaged.
        ValueError: samples are not finite.
    """
    size = (image.height, image.width) if orientation < 5 else (image.width, image.height)
    rgb = np.empty((*size, 3), np.float32)
    alpha = None if samples.alpha is None else np.empty(size, np.float32)
    rgb_rows, alpha_rows = lying(rgb, orientation), None if alpha is None else lying(alpha, orientation)
    region = vips().Region.new(image)
    dtype = dtype_of(image)
    span = np.float32(samples.white - samples.black)
    for top in range(0, image.height, _ROWS):
        count = min(_ROWS, image.height - top)
        fetched = region.fetch(0, top, image.width, count)
        strip = np.frombuffer(fetched, dtype).reshape(count, image.width, image.bands)
        if dtype.kind == "f" and not np.isfinite(strip).all():
            raise ValueError("samples that are not finite")
        colours = _unit(strip[:, :, : samples.colours], samples.black, span)
        if samples.colours == 4:  # inks, of which the last is black
            colours = (1 - colours[:, :, :3]) * (1 - colours[:, :, 3:])
        rgb_rows[top : top + count] = colours
        if alpha_rows is not None:
            alpha_rows[top : top + count] = _unit(strip[:, :, samples.alpha], 0.0, np.float32(samples.clear))
    return rgb, alpha


def _unit(values: NDArray[Any], black: float, span: np.float32) -> Pixels:
    exact = np.dtype(np.float32 if values.dtype.itemsize < 4 else np.float64)  # which holds what the samples hold
    moved: NDArray[Any] = values.astype(exact)
    if black:
        moved -= exact.type(black)
    moved /= exact.type(span)
    return moved.clip(0.0, 1.0).astype(np.float32, copy=False)


# -- into files -------------------------------------------------------------------------------------


def encode_pixels(photo: Photo, file_format: Format, quality: int | None) -> bytes:
    """Return a photo's pixels as a PNG, JPEG, WebP or TIFF with nothing beside them.

    Args:
        photo: of which only the pixels are stored.
        file_format: one of the four.
        quality: of JPEG and WebP, 1 to 100; None for the format's own.
    Raises:
        pyvips.Error: the format cannot hold the picture.
    """
    wide = photo.bits == 16 and file_format.bits == 16
    pixels = stored_pixels(photo, wide=wide)
    interpretation = ("grey16" if wide else "b-w") if photo.grey else "rgb16" if wide else "srgb"
    image = vips().Image.new_from_array(pixels, interpretation=interpretation)
    quality = quality or file_format.quality
    if file_format.name == "PNG":
        # Level 1 for 16 bits, whose noise does not compress: the higher ones take twice the time for 2 % less.
        encoded = image.pngsave_buffer(compression=1 if wide else 6, filter="all", keep="none")
    elif file_format.name == "JPEG":
        encoded = image.jpegsave_buffer(Q=quality, subsample_mode="off", optimize_coding=True, keep="none")
    elif file_format.name == "WebP":
        encoded = image.webpsave_buffer(Q=quality, effort=4, keep="none")
    else:
        encoded = image.tiffsave_buffer(bigtiff=pixels.nbytes > _CLASSIC_TIFF_BYTES, keep="none")
    return bytes(encoded)


def stored_pixels(photo: Photo, *, wide: bool) -> NDArray[Any]:
    """Return a photo's pixels as they are stored: u16 or u8 [H, W, C], grey or RGB, then alpha if there is one."""
    white, dtype = (65535.0, np.uint16) if wide else (255.0, np.uint8)
    rgb = photo.rgb[:, :, :1] if photo.grey else photo.rgb
    stored = np.empty((*rgb.shape[:2], rgb.shape[2] + (photo.alpha is not None)), dtype)
    for top in range(0, len(stored), _ROWS):
        rows = slice(top, top + _ROWS)
        stored[rows, :, : rgb.shape[2]] = np.rint(rgb[rows].clip(0.0, 1.0) * np.float32(white))
        if photo.alpha is not None:
            stored[rows, :, -1] = np.rint(photo.alpha[rows].clip(0.0, 1.0) * np.float32(white))
    return stored
