"""Encoded pictures of any common format to a `Photo`: by libvips, or by a library that reads what it does not."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from engine.errors import ImageError, first_line
from engine.image import formats
from engine.image.blocks import Blocks, read_jpeg, read_png, read_webp
from engine.image.codec import Samples, dtype_of, open_pixels, read_pixels, to_srgb, vips
from engine.image.formats import Format, sniff
from engine.image.metadata import Carried, carry_directory, carry_exif, dress
from engine.image.photo import Photo
from engine.image.pillow_images import DAMAGE, blocks_of, carried_of, photo_from_image, upright
from engine.image.raw import develop
from engine.image.tags import EXIF, GPS, Buffer, Directory, TagError, TagFile
from engine.image.tiff import (
    BITS,
    HEIGHT,
    PACKED_BITS,
    WIDTH,
    check_kind,
    count_pictures,
    is_raw,
    needs_pillow,
    samples_of,
    tiff_blocks,
    unpack,
)

_READERS = {"JPEG": read_jpeg, "PNG": read_png, "WebP": read_webp}
_LOAD_OPTIONS: dict[str, dict[str, Any]] = {"PNG": {"unlimited": True}, "AVIF": {"unlimited": True}}
_END_OF_JPEG = b"\xff\xd9"
#: By Pillow's name of each format: the module that teaches it that format, if any, and the extra that brings it.
_PILLOW = {
    "BMP": ("BMP", None, None),
    "GIF": ("GIF", None, None),
    "AVIF": ("AVIF", None, None),
    "HEIC": ("HEIF", "pillow_heif", "heic"),
    "JPEG XL": ("JXL", "pillow_jxl", "jxl"),
    "TIFF": ("TIFF", None, None),
}


def decode_photo(data: bytes, where: object = "image", *, max_pixels: int | None = None) -> Photo:
    """Read a photo from an encoded file's bytes.

    Args:
        data: of any format that is read.
        where: what errors call it.
        max_pixels: that it may have; it is asked for its size before it is decoded. None for any number.
    Raises:
        ImageError: not an image, damaged, animated, empty, too large, or of a kind whose samples or library are
            not known.
    """
    file_format = sniff(data, where)
    guard = _Guard(where, max_pixels)
    try:
        if file_format is formats.RAW:
            return develop(data, where, max_pixels)
        if file_format is formats.TIFF:
            return _decode_tiff(data, guard)
        if file_format in (formats.JPEG, formats.PNG, formats.WEBP):
            return _decode_plain(data, file_format, guard)
        return _decode_by_pillow(data, file_format, guard)
    except (TagError, *DAMAGE) as error:
        raise ImageError("is truncated or damaged", where=where, found=first_line(error)) from error
    except vips().Error as error:
        raise ImageError("is truncated or damaged", where=where, found=_reason(error)) from error


class _Guard:
    """Looks at a picture's size before it is decoded."""

    def __init__(self, where: object, max_pixels: int | None) -> None:
        self.where, self.max_pixels = where, max_pixels

    def check(self, width: int, height: int, pictures: int = 1) -> None:
        """Raise an ImageError for a picture that is empty, not alone, or larger than allowed."""
        size = f"{width} × {height}"
        if width < 1 or height < 1:
            raise ImageError("has no pixels", where=self.where, found=size)
        if pictures > 1:
            fix = "extract one of them first"
            raise ImageError("holds several pictures", where=self.where, found=f"{pictures} of them", fix=fix)
        if self.max_pixels is not None and width * height > self.max_pixels:
            raise ImageError(
                "is too large",
                where=self.where,
                expected=f"up to {self.max_pixels / 1e6:.0f} million pixels",
                found=size,
                fix="allow it with --any-size, where a restoration has that option; or scale it down",
            )


def _decode_plain(data: bytes, file_format: Format, guard: _Guard) -> Photo:
    """Decode a JPEG, PNG or WebP."""
    blocks = _READERS[file_format.name](data)
    carried = carry_exif(blocks.exif)
    options = _LOAD_OPTIONS.get(file_format.name, {})
    image = open_pixels(data, file_format, fail_on="truncated", **options)
    guard.check(image.width, image.height, blocks.pictures)
    try:
        photo = _photo(image, carried.orientation, guard.where, icc=blocks.icc)
    except vips().Error:
        # A JPEG with all its pixels and no end marker, as some programs leave it, is whole. What is missing before
        # the marker is a warning of the library's.
        if file_format is not formats.JPEG or data.endswith(_END_OF_JPEG):
            raise
        ended = data + _END_OF_JPEG  # named: the library does not keep it
        image = open_pixels(ended, file_format, fail_on="warning")
        photo = _photo(image, carried.orientation, guard.where, icc=blocks.icc)
        photo = replace(photo, warnings=("its end marker is missing; all its pixels are there",))
    return dress(photo, blocks, carried)


def _photo(
    image: Any,
    orientation: int,
    where: object,
    *,
    icc: bytes | None,
    directory: Directory | None = None,
    samples: Samples | None = None,
) -> Photo:
    """Decode a picture that libvips has opened, with its profile, or sRGB's where it must be converted.

    Its samples' meaning is the format's own, a TIFF's directory's, or as given.

    Raises:
        ImageError: a profile that is needed cannot be used, or the bands have no meaning.
        pyvips.Error: the file is damaged.
    """
    dtype = dtype_of(image)
    wide = dtype.itemsize > 1
    inks, lab = image.interpretation == "cmyk", image.interpretation in ("lab", "labs", "labq")
    if (inks and icc) or lab:
        try:
            image, icc = to_srgb(image, embedded=inks, wide=wide)
        except (ValueError, vips().Error) as error:
            found = _reason(error)
            raise ImageError("its colour profile cannot be applied", where=where, found=found) from error
        directory, inks, dtype = None, False, dtype_of(image)
    if directory is not None:
        samples = samples_of(directory, image, where)
    if samples is None:
        white = float(np.iinfo(dtype).max)
        colours = 4 if inks else 1 if image.bands < 3 else 3
        samples = Samples(colours, colours if image.bands > colours else None, 0.0, white, white)
    rgb, alpha = read_pixels(image, samples, orientation)
    return Photo(rgb, alpha, grey=samples.colours == 1, bits=16 if wide else 8, icc_profile=icc)


def _decode_tiff(data: bytes, guard: _Guard) -> Photo:
    file = TagFile.open(data)
    chain = file.chain()
    first = chain[0]
    if is_raw(file, chain):
        return dress(develop(data, guard.where, guard.max_pixels), Blocks(), carry_directory(first))
    blocks, carried = tiff_blocks(first), carry_directory(first)
    guard.check(first.number(WIDTH), first.number(HEIGHT), count_pictures(chain))
    check_kind(first, guard.where)
    if set(first.numbers(BITS)) <= PACKED_BITS and first.numbers(BITS):
        return dress(upright(unpack(data, first), carried.orientation), blocks, carried)
    if needs_pillow(first):
        with _opened(data, formats.TIFF, guard.where) as opened:
            photo = photo_from_image(opened, guard.where)
        told = ("its 16 bits a channel were read as 8",) if first.number(BITS) == 16 and photo.bits == 8 else ()
        return dress(replace(photo, warnings=told), blocks, carried)
    image = open_pixels(data, formats.TIFF, fail_on="error")
    guard.check(image.width, image.height)
    photo = _photo(image, carried.orientation, guard.where, icc=blocks.icc, directory=first)
    return dress(photo, blocks, carried)


# -- by Pillow ------------------------------------------------------------------------------------


def _decode_by_pillow(data: bytes, file_format: Format, guard: _Guard) -> Photo:
    if file_format is formats.AVIF and (deep := _deep_avif(data, guard)) is not None:
        return deep
    with _opened(data, file_format, guard.where) as image:
        guard.check(image.width, image.height)
        photo = photo_from_image(image, guard.where)
        if image.info.get("bit_depth", 8) > 8:  # pillow-heif's
            photo = replace(photo, warnings=(*photo.warnings, "its bits beyond 8 a channel were left out"))
    cicp = _nclx(data) if file_format in (formats.AVIF, formats.HEIC) and not photo.icc_profile else None
    return photo if cicp is None else dress(photo, _beside(photo, cicp), Carried(photo.exif, dpi=photo.dpi))


def _beside(photo: Photo, cicp: bytes) -> Blocks:
    return Blocks(xmp=photo.xmp, texts=photo.texts, dpi=photo.dpi, iptc=photo.iptc, cicp=cicp)


def _deep_avif(data: bytes, guard: _Guard) -> Photo | None:
    """Return an AVIF of 10 or 12 bits a channel, None for one of 8: Pillow's decoder interpolates its colours."""
    image = open_pixels(data, formats.AVIF, fail_on="truncated", unlimited=True)
    bits = int(image.get("bits-per-sample")) if "bits-per-sample" in image.get_fields() else 8
    if bits <= 8:
        return None
    guard.check(image.width, image.height)
    white = float(((1 << bits) - 1) << (16 - bits))  # libvips moves samples up
    colours = 1 if image.bands < 3 else 3
    samples = Samples(colours, colours if image.bands > colours else None, 0.0, white, white)
    with _opened(data, formats.AVIF, guard.where) as described:
        blocks, carried = blocks_of(described), carried_of(described)
    photo = _photo(image, 1, guard.where, icc=blocks.icc, samples=samples)  # libvips has turned it
    return dress(photo, replace(blocks, cicp=None if blocks.icc else _nclx(data)), carried)


def _nclx(data: bytes) -> bytes | None:
    """Return the code points of the colours of an AVIF or HEIC, None if it states none."""
    place = data.find(b"colrnclx", 0, 1 << 16)
    if place < 0 or place + 15 > len(data):
        return None
    primaries, transfer = data[place + 9], data[place + 11]
    return bytes([primaries, transfer, 0, 1])


def _opened(data: bytes, file_format: Format, where: object) -> Image.Image:
    """Open a picture by Pillow, without its pixels.

    Raises:
        ImageError: it needs a library that is missing.
    """
    name, module, extra = _PILLOW[file_format.name]
    Image.init()
    if name not in Image.OPEN and module is not None:
        try:
            learned = __import__(module)
        except ModuleNotFoundError as error:
            raise ImageError(
                f"is a {file_format.name} photo, which needs a library to be read",
                where=where,
                found=f"no module {error.name}",
                fix=f"pip install {module.replace('_', '-')}, or 'restoration-engine[{extra}]'",
            ) from error
        if module == "pillow_heif":
            learned.register_heif_opener()
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the guard's to say
    try:
        return Image.open(io.BytesIO(data), formats=[name] if name in Image.OPEN else [])
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def exif_of(data: Buffer, where: object = "image") -> bytes | None:
    """Return the EXIF block of a file, without what holds for the stored file alone; its pixels are not decoded.

    Args:
        data: the file's bytes, which may be mapped from it.
        where: what errors call it.
    Raises:
        ImageError: it is of no format that is read, or damaged.
    """
    file_format = sniff(data, where)
    try:
        if file_format is formats.TIFF:
            file = TagFile.open(data)
            return carry_directory(file.directory(file.first, (EXIF, GPS))).exif
        if file_format.name in _READERS:
            return _READERS[file_format.name](data).exif
        if file_format is formats.AVIF:
            with _opened(bytes(data), file_format, where) as image:
                return carried_of(image).exif
    except (TagError, *DAMAGE) as error:
        raise ImageError("is truncated or damaged", where=where, found=first_line(error)) from error
    return None


def _reason(error: Exception) -> str:
    """Return what a library says of a file in one line."""
    lines = [line.strip() for line in str(getattr(error, "detail", error)).splitlines() if line.strip()]
    return (lines[-1] if lines else str(error))[:300]
