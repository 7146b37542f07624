"""Encoded pictures of any common format to a `Photo`; decoding is Pillow's."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from engine.errors import ImageError
from engine.photo import DAMAGE, Photo, photo_from_image

READ_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif")
#: Only these decoders see a stranger's file; Pillow has others that start programs.
_READ_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")


def decode_photo(data: bytes, where: object = "image", *, max_pixels: int | None = None) -> Photo:
    """Read a photo from an encoded file's bytes.

    Args:
        data: of any format that is read.
        where: what errors call it.
        max_pixels: that it may have; it is asked for its size before it is decoded.
    Raises:
        ImageError: not an image, truncated, animated, empty or too large.
    """
    with damage_told(where):
        return decode(io.BytesIO(data), where, max_pixels)


def decode(source: Path | io.BytesIO, where: object, max_pixels: int | None) -> Photo:
    """Return the photo that a file, or its bytes, holds; errors as they come, see `damage_told`."""
    Image.init()
    formats = [name for name in _READ_FORMATS if name in Image.OPEN]  # Pillow may be built without some
    with Image.open(source, formats=formats) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise _too_large(where, max_pixels, f"{image.width} × {image.height}")
        return photo_from_image(image, where)


@contextmanager
def damage_told(where: object) -> Iterator[None]:
    """Turn what Pillow raises for a bad file into an `ImageError`."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures, which it refuses when they are huge, and of damaged
            # metadata, which becomes a remark.
            warnings.simplefilter("ignore")
            yield
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except UnidentifiedImageError:
        raise ImageError(
            "is not an image, or of a format that is not read", where=where, expected=", ".join(READ_SUFFIXES)
        ) from None
    except Image.DecompressionBombError as error:
        raise _too_large(where, 2 * (Image.MAX_IMAGE_PIXELS or 0)) from error
    except DAMAGE as error:
        raise ImageError("is truncated or damaged", where=where, found=str(error)) from error


def _too_large(where: object, max_pixels: int, found: str | None = None) -> ImageError:
    return ImageError(
        "is too large",
        where=where,
        expected=f"up to {max_pixels / 1e6:.0f} million pixels",
        found=found,
        fix="cut it into parts, or scale it down",
    )
