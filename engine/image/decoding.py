"""Encoded pictures of any common format to a `Photo`; decoding is Pillow's, or a library's that does what it lacks."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from engine.errors import ImageError
from engine.image.high_bit_depth import apply_high_bit_depth, read_wide
from engine.image.photo import DAMAGE, Photo, photo_from_image

READ_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".heic", ".heif")
#: Only these decoders see a stranger's file; Pillow has others that start programs.
_READ_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF")
#: What a HEIC file may say that it is, behind "ftyp"; one that says `mif1` may be an AVIF, which Pillow reads.
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def decode_photo(data: bytes, where: object = "image", *, max_pixels: int | None = None) -> Photo:
    """Read a photo from an encoded file's bytes.

    Args:
        data: of any format that is read.
        where: what errors call it.
        max_pixels: that it may have; it is asked for its size before it is decoded.
    Raises:
        ImageError: not an image, truncated, animated, empty or too large.
    """
    with image_errors(where):
        return decode(io.BytesIO(data), where, max_pixels)


def decode(source: Path | io.BytesIO, where: object, max_pixels: int | None) -> Photo:
    """Return the photo that a file, or its bytes, holds; errors as they come, see `image_errors`."""
    with open_image(source, where) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise _too_large(where, max_pixels, f"{image.width} × {image.height}")
        wide = read_wide(image, source)
        photo = photo_from_image(image, where)
        if image.info.get("bit_depth", 8) > 8:  # pillow-heif's
            photo = replace(photo, warnings=(*photo.warnings, "its bits beyond 8 a channel were left out"))
        return photo if wide is None else apply_high_bit_depth(photo, wide)


def open_image(source: Path | io.BytesIO, where: object) -> Image.Image:
    """Open a picture of a format that is read, without its pixels; errors as they come, see `image_errors`.

    Raises:
        ImageError: it is a HEIC photo, and the library for those is missing.
    """
    Image.init()
    if "HEIF" not in Image.OPEN and _is_heic(source):
        _learn_heic(where)
    formats = [name for name in _READ_FORMATS if name in Image.OPEN]  # Pillow may be built without some
    return Image.open(source, formats=formats)


def _is_heic(source: Path | io.BytesIO) -> bool:
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(64)
    else:
        start = source.getvalue()[:64]
    return start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS and b"avif" not in start[12:]


def _learn_heic(where: object) -> None:
    """Tell Pillow how HEIC is read; only here, since the library takes longer to load than most photos."""
    try:
        import pillow_heif
    except ModuleNotFoundError as error:
        raise ImageError(
            "is a HEIC photo, which needs a library to be read",
            where=where,
            found=f"no module {error.name}",
            fix="pip install pillow-heif",
        ) from error
    pillow_heif.register_heif_opener()


@contextmanager
def image_errors(where: object) -> Iterator[None]:
    """Turn what Pillow raises for a bad file into an `ImageError`."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures, which it refuses when they are huge, and of damaged
            # metadata, which becomes a warning.
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
