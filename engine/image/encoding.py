"""A `Photo` to the bytes of a file, with everything that is carried along."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from engine.errors import OutputError
from engine.image import formats
from engine.image.blocks import Blocks, write_jpeg, write_png, write_webp
from engine.image.codec import encode_pixels, stored_pixels, vips
from engine.image.formats import Format, output_format
from engine.image.metadata import PROVENANCE_BYTES, blocks_for, note_of
from engine.image.photo import Photo, Size
from engine.image.tiff import write_tiff


def encode_photo(
    photo: Photo,
    suffix: str,
    provenance: Mapping[str, Any],
    where: object = "image",
    *,
    quality: int | None = None,
) -> bytes:
    """Return a photo as the bytes of a file.

    What the format has no place for, as `check_format` tells, is left out.

    Args:
        photo: with what is to be carried along.
        suffix: ".png", ".jpg", …: the format.
        provenance: how it was made; `read_provenance` gives it back.
        where: what errors call it.
        quality: of JPEG, WebP and AVIF, 1 to 100; None for the format's own.
    Raises:
        OutputError: an unknown format, or one that cannot hold the photo or its provenance.
    """
    file_format = output_format(suffix, where)
    check_size(file_format, photo.size, where)
    _check_alpha(file_format, photo, where)
    blocks, _ = blocks_for(photo, file_format, note_of(provenance))
    limit = file_format.limit("exif")
    if limit is not None and len(blocks.exif or b"") > limit:
        raise OutputError(
            f"cannot be stored as {file_format.name}",
            where=where,
            expected=f"settings of up to {limit} bytes",
            found=f"{len(blocks.exif or b'')} bytes",
            fix="write a PNG instead",
        )
    try:
        if file_format is formats.AVIF:
            return _avif(photo, blocks, quality)
        encoded = encode_pixels(photo, file_format, quality)
    except (OSError, ValueError, vips().Error) as error:
        fix = "write a PNG instead"
        raise OutputError(f"cannot be stored as {file_format.name}", where=where, found=str(error), fix=fix) from error
    if file_format is formats.JPEG:
        return write_jpeg(encoded, blocks)
    if file_format is formats.PNG:
        return write_png(encoded, blocks)
    if file_format is formats.WEBP:
        return write_webp(encoded, blocks, photo.size, alpha=photo.alpha is not None)
    return write_tiff(encoded, blocks)


def check_format(photo: Photo, suffix: str, where: object = "image", *, size: Size | None = None) -> tuple[str, ...]:
    """Find out whether a format holds a photo's result, before the work.

    Args:
        photo: as it was read.
        suffix: of the result.
        where: what errors call it.
        size: (width, height) in pixels of the result; None if it is the photo's.
    Returns:
        What will be left out, a sentence each.
    Raises:
        OutputError: an unknown format, or one that cannot hold the pixels.
    """
    file_format = output_format(suffix, where)
    check_size(file_format, size or photo.size, where)
    _check_alpha(file_format, photo, where)
    return blocks_for(photo, file_format, " " * PROVENANCE_BYTES)[1]


def check_size(file_format: Format, size: Size, where: object) -> None:
    """Find out whether a format holds a picture of (width, height) pixels.

    Raises:
        OutputError: it does not.
    """
    most = file_format.max_pixels
    if max(size) <= file_format.max_side and (most is None or size[0] * size[1] <= most):
        return
    expected = f"up to {file_format.max_side} pixels a side" + (f", {most / 1e6:.0f} million in all" if most else "")
    raise OutputError(
        f"is too large for {file_format.name}",
        where=where,
        expected=expected,
        found=f"{size[0]} × {size[1]}",
        fix="write a PNG or TIFF instead",
    )


def _check_alpha(file_format: Format, photo: Photo, where: object) -> None:
    if photo.alpha is not None and not file_format.alpha:
        raise OutputError(
            f"{file_format.name} cannot hold the photo's transparency", where=where, fix="write a PNG or WebP instead"
        )


def _avif(photo: Photo, blocks: Blocks, quality: int | None) -> bytes:
    """Return an AVIF, by Pillow: libvips writes another EXIF block than the one it is given."""
    options: dict[str, Any] = {"quality": quality or formats.AVIF.quality, "subsampling": "4:4:4"}
    if photo.alpha is not None:
        options["quality"] = 100  # the encoder has one quality for both, and transparency is kept as it was
    for name, value in (("icc_profile", blocks.icc), ("exif", blocks.exif), ("xmp", blocks.xmp)):
        if value:
            options[name] = value
    buffer = io.BytesIO()
    to_image(photo).save(buffer, "AVIF", **options)
    return buffer.getvalue()


def to_image(photo: Photo) -> Image.Image:
    """Return the pixels of a photo as a Pillow image, with 8 bits a channel."""
    pixels = stored_pixels(photo, wide=False)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
