"""Pillow's images as photos: those that callers give, and files of formats that libvips' package does not read."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from engine.errors import ImageError
from engine.image.blocks import Blocks
from engine.image.metadata import Carried, carry_exif, dress
from engine.image.photo import Photo, Pixels, lying

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")
_SIXTEEN_BITS = 65535.0
#: Pillow's ways to say that a file is damaged.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    TypeError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
)
_XMP_IN_PNG = "XML:com.adobe.xmp"
#: Formats that say which of their pictures is the photo: a phone's MPO holds its twin, a HEIC its series.
_PHOTO_FIRST = ("MPO", "HEIF")


def photo_from_image(image: Image.Image, where: object = "image") -> Photo:
    """Return a photo of a Pillow image, whose file may still be unread.

    Args:
        image: of any mode but floating point.
        where: what errors call it.
    Raises:
        ImageError: animated, empty, of a mode that is not read, or damaged.
    """
    if 0 in image.size:
        raise ImageError("has no pixels", where=where, found=f"{image.width} × {image.height}")
    if getattr(image, "is_animated", False) and image.format not in _PHOTO_FIRST:
        frames = f"{getattr(image, 'n_frames', 2)} of them"
        raise ImageError("holds several pictures", where=where, found=frames, fix="extract one of them first")
    try:
        with warnings.catch_warnings():  # of damaged metadata
            warnings.simplefilter("ignore")
            carried = carry_exif(_exif_block(image))
            image.load()
            # Pillow turns a TIFF upright while it loads it, and no other.
            orientation = 1 if image.format == "TIFF" else carried.orientation
            photo = _decode(image, where)
    except DAMAGE as error:
        raise ImageError("is truncated or damaged", where=where, found=str(error)) from error
    return dress(upright(photo, orientation), blocks_of(image), carried)


def upright(photo: Photo, orientation: int) -> Photo:
    """Return a photo that lies as EXIF's orientation says, turned upright."""
    if orientation == 1:
        return photo
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    rgb = np.ascontiguousarray(lying(photo.rgb, inverse))
    alpha = None if photo.alpha is None else np.ascontiguousarray(lying(photo.alpha, inverse))
    return replace(photo, rgb=rgb, alpha=alpha)


def carried_of(image: Image.Image) -> Carried:
    """Return what is carried of the EXIF of a Pillow image."""
    return carry_exif(_exif_block(image))


def _exif_block(image: Image.Image) -> bytes | None:
    """Return an image's EXIF as it was stored, or as Pillow writes it where only that is known."""
    stored = image.info.get("exif")
    if isinstance(stored, bytes):
        return stored
    try:
        return image.getexif().tobytes() or None
    except Exception:  # a damaged block raises nearly anything
        return None


def blocks_of(image: Image.Image) -> Blocks:
    """Return what stands beside the pixels of a Pillow image but its EXIF."""
    xmp = image.info.get("xmp") or image.info.get(_XMP_IN_PNG)
    texts = {key: str(text) for key, text in getattr(image, "text", {}).items() if key != _XMP_IN_PNG}
    comment = image.info.get("comment")
    if isinstance(comment, bytes) and comment:
        texts["Comment"] = comment.decode("utf-8", "surrogateescape")
    dpi = image.info.get("dpi")
    return Blocks(
        xmp=xmp.encode() if isinstance(xmp, str) else xmp,
        icc=image.info.get("icc_profile"),
        texts=tuple(texts.items()),
        # Pillow says 1 where a TIFF says nothing.
        dpi=(float(dpi[0]), float(dpi[1])) if dpi and tuple(dpi) != (1, 1) else None,
    )


def _decode(image: Image.Image, where: object) -> Photo:
    icc = image.info.get("icc_profile")
    if image.mode in ("CMYK", "LAB"):
        image, icc = _to_srgb(image, icc, where)
    if image.mode == "F" or (image.mode == "I" and np.asarray(image).max() > _SIXTEEN_BITS):
        raise ImageError("holds values of unknown range", where=where, fix="convert it to 8 or 16 bit")
    if image.mode in _GREY_MODES:
        return replace(_decode_grey(image), icc_profile=icc)
    transparent = "transparency" in image.info or image.mode in ("RGBA", "PA", "La", "RGBa")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # Pillow has cut 16-bit pixels to 8, but not the colour's
        image.info["transparency"] = tuple(value >> 8 for value in key)
    try:
        array = np.asarray(image.convert("RGBA" if transparent else "RGB"), dtype=np.float32) / np.float32(255.0)
    except ValueError as error:
        raise ImageError(f"is of a mode that is not read: {image.mode}", where=where) from error
    return Photo(array[:, :, :3], array[:, :, 3] if transparent else None, icc_profile=icc)


def _decode_grey(image: Image.Image) -> Photo:
    values = np.asarray(image)
    alpha: Pixels | None = None
    if image.mode == "LA":
        values, alpha = values[:, :, 0], values[:, :, 1].astype(np.float32) / np.float32(255.0)
    elif isinstance(key := image.info.get("transparency"), int):  # one grey value means "nothing here"
        alpha = (values != (key > 0 if image.mode == "1" else key)).astype(np.float32)
    white = {"1": 1.0, "L": 255.0, "LA": 255.0}.get(image.mode, _SIXTEEN_BITS)
    grey = (values.astype(np.float32) / np.float32(white)).clip(0.0, 1.0)
    bits = 16 if image.mode.startswith("I") else 8
    return Photo(np.repeat(grey[:, :, None], 3, axis=2), alpha, grey=True, bits=bits)


def _to_srgb(image: Image.Image, icc: bytes | None, where: object) -> tuple[Image.Image, bytes | None]:
    """Convert a print or Lab image to RGB: through its profile if it has one."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        if icc:
            source: Any = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        elif image.mode == "LAB":
            source = ImageCms.createProfile("LAB")
        else:
            return image.convert("RGB"), None
        converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise ImageError("its colour profile cannot be applied", where=where, found=str(error)) from error
    assert converted is not None
    return converted, ImageCms.ImageCmsProfile(srgb).tobytes()
