"""A `Photo` to the bytes of a file, with everything that was about it; encoding is Pillow's, but for 16-bit colours."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin

from engine.errors import OutputError
from engine.image.high_bit_depth import to_u16, write_png, write_tiff
from engine.image.photo import XMP_IN_PNG, Photo, Pixels

_WRITE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95, "method": 4},
    "TIFF": {},  # uncompressed: Pillow's compressing encoder cannot store EXIF
    "AVIF": {"quality": 90, "subsampling": "4:4:4"},
}
#: EXIF's "record of what has been done to the image": the same place in every format.
PROVENANCE_TAG = ExifTags.Base.ImageHistory
_SIZE_TAGS = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)


def encode_photo(photo: Photo, suffix: str, provenance: Mapping[str, Any], where: object = "image") -> bytes:
    """Return a photo as the bytes of a file.

    Args:
        photo: with what is to be carried along.
        suffix: ".png", ".jpg", …: the format.
        provenance: how it was made; `read_provenance` gives it back.
        where: what errors call it.
    Raises:
        OutputError: an unknown format, one that cannot hold the photo, or a library is missing.
    """
    file_format = check_format(photo, suffix, where)
    try:
        return _encode(photo, file_format, json.dumps(provenance, ensure_ascii=True), where)
    except (OSError, ValueError) as error:  # such as EXIF over 64 kB in a JPEG
        raise OutputError(
            f"cannot be stored as {file_format}", where=where, found=str(error), fix="write a PNG instead"
        ) from error


def check_format(photo: Photo, suffix: str, where: object = "image") -> str:
    """Return Pillow's name of the format that an ending means, which must hold all that belongs to the photo.

    Raises:
        OutputError: an unknown format, or one that cannot hold the photo.
    """
    file_format = format_of(suffix, where)
    if photo.alpha is not None and file_format == "JPEG":
        raise OutputError("JPEG cannot hold the photo's transparency", where=where, fix="write a PNG or WebP instead")
    return file_format


def format_of(suffix: str, where: object) -> str:
    """Return Pillow's name of the format that an ending means.

    Raises:
        OutputError: it is none that is written.
    """
    try:
        return _WRITE_FORMATS[suffix.lower()]
    except KeyError:
        raise OutputError(
            "no format that is written", where=where, expected=", ".join(_WRITE_FORMATS), found=suffix or "no ending"
        ) from None


def _encode(photo: Photo, file_format: str, note: str, where: object) -> bytes:
    exif = _exif_of(photo, note)
    options = dict(_SAVE_OPTIONS.get(file_format, {}))
    if file_format == "AVIF" and photo.alpha is not None:
        options["quality"] = 100  # the encoder has one quality for both, and transparency is kept as it was
    if photo.icc_profile:
        options["icc_profile"] = photo.icc_profile
    if photo.dpi:
        options["dpi"] = photo.dpi
    if file_format == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for keyword, text in photo.texts:
            options["pnginfo"].add_itxt(keyword, text)
        if photo.xmp:
            options["pnginfo"].add_itxt(XMP_IN_PNG, photo.xmp.decode(errors="replace"))
    elif file_format == "JPEG" and photo.texts:
        options["comment"] = "\n".join(text for _, text in photo.texts)
    elif file_format == "TIFF" and photo.xmp:
        exif[ExifTags.Base.XMLPacket] = photo.xmp
    if photo.xmp and file_format in ("JPEG", "WEBP", "AVIF"):
        options["xmp"] = photo.xmp
    options["exif"] = exif.tobytes()
    if photo.bits == 16 and file_format in ("PNG", "TIFF"):
        return _encode_wide(photo, file_format, options, exif, where)
    return _save(to_image(photo), file_format, options)


def _encode_wide(photo: Photo, file_format: str, options: dict[str, Any], exif: Image.Exif, where: object) -> bytes:
    if photo.grey and photo.alpha is None:
        return _save(Image.fromarray(to_u16(photo)), file_format, options)
    if file_format == "PNG":
        return write_png(to_u16(photo), _save(Image.new("RGB", (1, 1)), "PNG", options), where)
    if photo.icc_profile:
        exif[ExifTags.Base.InterColorProfile] = photo.icc_profile
    if photo.dpi:
        exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution] = photo.dpi
        exif[ExifTags.Base.ResolutionUnit] = 2  # inches
    # Pillow cannot read 16-bit grey with transparency from a TIFF, so that is stored as colours.
    return write_tiff(to_u16(replace(photo, grey=False)), exif)


def _exif_of(photo: Photo, note: str) -> Image.Exif:
    """Return a photo's EXIF with a note of how it was made, and its size brought up to date."""
    exif = Image.Exif()
    exif.load(photo.exif or b"")
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[PROVENANCE_TAG] = note
    for tag, side in zip(_SIZE_TAGS, photo.size, strict=True):
        if tag in details:
            details[tag] = side
    return exif


def _save(image: Image.Image, file_format: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def to_image(photo: Photo) -> Image.Image:
    """Return the pixels of a photo as a Pillow image, with 8 bits a channel."""
    image = Image.fromarray(_to_u8(photo.rgb))
    if photo.grey:
        image = image.convert("L")
    if photo.alpha is not None:
        image.putalpha(Image.fromarray(_to_u8(photo.alpha)))
    return image


def _to_u8(pixels: Pixels) -> NDArray[np.uint8]:
    return np.rint(pixels.clip(0.0, 1.0) * np.float32(255.0)).astype(np.uint8)
