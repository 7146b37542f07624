"""A picture in memory, upright, from any Pillow image or array.

Orientation is applied, alpha and metadata are carried, colours stay in the photo's own profile
(CMYK, which no result can have, is converted to sRGB).
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps

from engine.errors import ImageError

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")
_SIXTEEN_BITS = 65535.0
#: What interpolation may add to [0, 1]; more is another scale.
_OVERSHOOT = 0.25
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
XMP_IN_PNG = "XML:com.adobe.xmp"
#: EXIF shares its tags with TIFF, where some describe the file that was read, not the picture.
_LAYOUT_TAGS = frozenset(
    {*range(254, 260), 262, 266, 273, 274, 277, 278, 279, 282, 283, 284, 296, 317, 320}
    | {*range(322, 326), 330, 338, 339, 347, 513, 514, *range(529, 533), 700, 34377, 34675}
)

#: Formats that say which of their pictures is the photo: a phone's MPO holds its twin, a HEIC its series.
_PHOTO_FIRST = ("MPO", "HEIF")

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Photo:
    """A picture, upright.

    Attributes:
        rgb: f32[H, W, 3] in [0, 1]; a grey photo has three equal channels.
        alpha: f32[H, W] in [0, 1], or None.
        grey: whether it is stored with a single channel.
        bits: a channel has in its file, 8 or 16.
        icc_profile, exif, xmp: as stored, orientation removed; None if there is none.
        dpi: resolution, or None.
        texts: a PNG's texts by keyword; a JPEG's comment as "Comment".
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

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]


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
        image.load()
        exif, warnings = _read_exif(image)
        upright = image if warnings else ImageOps.exif_transpose(image)
        photo = _decode(upright, where)
    except DAMAGE as error:
        raise ImageError("is truncated or damaged", where=where, found=str(error)) from error
    xmp, dpi = upright.info.get("xmp") or upright.info.get(XMP_IN_PNG), upright.info.get("dpi")
    return replace(
        photo,
        exif=exif,
        xmp=xmp.encode() if isinstance(xmp, str) else xmp,
        dpi=(float(dpi[0]), float(dpi[1])) if dpi else None,
        texts=_read_texts(image),
        warnings=warnings,
    )


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
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(channels[:, :, index])).resize(size, Image.Resampling.BICUBIC))
        for index in range(channels.shape[2])
    ]
    stacked = np.stack(planes, axis=2).clip(0.0, 1.0)
    return stacked[:, :, 0] if pixels.ndim == 2 else stacked


def _read_texts(image: Image.Image) -> tuple[tuple[str, str], ...]:
    """Return a PNG's texts and a JPEG's comment; what is stored elsewhere in a `Photo` is left out."""
    texts = {key: str(text) for key, text in getattr(image, "text", {}).items() if key != XMP_IN_PNG}
    comment = image.info.get("comment")
    if isinstance(comment, bytes) and comment:
        texts["Comment"] = comment.decode("utf-8", errors="replace")
    return tuple(texts.items())


def _read_exif(image: Image.Image) -> tuple[bytes | None, tuple[str, ...]]:
    """Return the EXIF block without what holds for the stored file alone, and a warning if it is damaged."""
    try:
        stored = image.getexif()
        for directory in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            if directory in stored:
                stored.get_ifd(directory)  # read now, or a TIFF's stays behind in its file
        exif = Image.Exif()
        exif.load(stored.tobytes())
        for tag in _LAYOUT_TAGS & set(exif):
            del exif[tag]
        return exif.tobytes() if exif else None, ()
    except Exception as error:  # a damaged block raises nearly anything
        return None, (f"its EXIF data is damaged and was left out ({error})",)


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
    bits = 16 if image.mode.startswith("I") and alpha is None else 8
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
