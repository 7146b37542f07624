"""Photos in and out: any common file to float pixels, and back with everything that was about it.

Orientation is applied, alpha and metadata are carried, colours stay in the photo's own profile
(CMYK, which no result can have, is converted to sRGB). A result is written beside its place and
moved there, so no half file is ever seen. Decoding and encoding are Pillow's.
"""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from engine.errors import ImageError, OutputError, from_os_error

READ_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif")
#: Only these decoders see a stranger's file; Pillow has others that start programs.
_READ_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
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
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")
_SIXTEEN_BITS = 65535.0
#: What interpolation may add to [0, 1]; more is another scale.
_OVERSHOOT = 0.25
#: Pillow's ways to say that a file is damaged.
_DAMAGE = (
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
#: EXIF's "record of what has been done to the image": the same place in every format.
_HISTORY_TAG = ExifTags.Base.ImageHistory
_SIZE_TAGS = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)
#: EXIF shares its tags with TIFF, where some describe the file that was read, not the picture.
_LAYOUT_TAGS = frozenset(
    {*range(254, 260), 262, 266, 273, 274, 277, 278, 279, 282, 283, 284, 296, 317, 320}
    | {*range(322, 326), 330, 338, 339, 347, 513, 514, *range(529, 533), 700, 34377, 34675}
)

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Photo:
    """A picture, upright.

    Attributes:
        rgb: f32[H, W, 3] in [0, 1]; a grey photo has three equal channels.
        alpha: f32[H, W] in [0, 1], or None.
        grey: whether it is stored with a single channel.
        icc_profile, exif, xmp: as stored, orientation removed; None if there is none.
        dpi: resolution, or None.
        texts: a PNG's texts by keyword; a JPEG's comment as "Comment".
        remarks: what could not be carried over from the file, a sentence each.
    """

    rgb: Pixels
    alpha: Pixels | None = None
    grey: bool = False
    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    texts: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]


def read_photo(path: Path) -> Photo:
    """Read a photo.

    Raises:
        ImageError: missing, not an image, truncated, animated, empty or too large.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures, which it refuses when they are huge, and of damaged
            # metadata, which becomes a remark.
            warnings.simplefilter("ignore")
            if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
                raise ImageError("is not a file", where=path, expected="an image file")
            Image.init()
            formats = [name for name in _READ_FORMATS if name in Image.OPEN]  # Pillow may be built without some
            with Image.open(path, formats=formats) as image:
                return photo_from_image(image, path)
    except FileNotFoundError:
        raise ImageError("no such file", where=path, fix="check the path") from None
    except IsADirectoryError:
        raise ImageError("is a folder", where=path, expected="an image file") from None
    except PermissionError:
        raise ImageError("no permission to read it", where=path) from None
    except UnidentifiedImageError:
        raise ImageError(
            "is not an image, or of a format that is not read", where=path, expected=", ".join(READ_SUFFIXES)
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError(
            "is too large",
            where=path,
            expected=f"up to {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels",
            fix="cut it into parts, or scale it down",
        ) from error
    except _DAMAGE as error:
        raise ImageError("is truncated or damaged", where=path, found=str(error)) from error


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
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's MPO is a photo and its twin
        frames = f"{getattr(image, 'n_frames', 2)} of them"
        raise ImageError("holds several pictures", where=where, found=frames, fix="extract one of them first")
    try:
        image.load()
        exif, remarks = _read_exif(image)
        upright = image if remarks else ImageOps.exif_transpose(image)
        photo = _decode(upright, where)
    except _DAMAGE as error:
        raise ImageError("is truncated or damaged", where=where, found=str(error)) from error
    xmp, dpi = upright.info.get("xmp") or upright.info.get(_XMP_IN_PNG), upright.info.get("dpi")
    return replace(
        photo,
        exif=exif,
        xmp=xmp.encode() if isinstance(xmp, str) else xmp,
        dpi=(float(dpi[0]), float(dpi[1])) if dpi else None,
        texts=_read_texts(image),
        remarks=remarks,
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


def check_output(path: Path, photo: Photo | None = None, *, overwrite: bool = False) -> None:
    """Find out, before the work, whether a result could be written.

    Args:
        path: where it would go.
        photo: that it would be made from, if it was read already.
        overwrite: whether a file that is there may be replaced.
    Raises:
        OutputError: an unknown format, a file that is there, a folder that is missing or not
            writable, or a format that cannot hold the photo.
    """
    file_format = _format_of(path)
    if os.path.lexists(path) and (path.is_dir() or not overwrite):
        raise OutputError("exists already", where=path, fix="choose another name with -o, or allow it with --overwrite")
    folder = path.parent
    if not folder.is_dir():
        problem, fix = (
            ("is no folder", "correct the path") if folder.exists() else ("no such folder", "create it first")
        )
        raise OutputError(problem, where=folder, fix=fix)
    if not os.access(folder, os.W_OK):
        raise OutputError("no permission to write there", where=folder, fix="choose another place with -o")
    if photo is not None and photo.alpha is not None and file_format == "JPEG":
        raise OutputError("JPEG cannot hold the photo's transparency", where=path, fix="write a PNG or WebP instead")


def list_images(folder: Path) -> list[Path]:
    """Return the images of a folder by name, without hidden files and subfolders."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in READ_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def write_photo(path: Path, photo: Photo, history: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write a photo, whole or not at all.

    Args:
        path: its ending tells the format.
        photo: with what is to be carried along.
        history: how it was made; `read_history` gives it back.
        overwrite: replace a file that is there.
    Raises:
        OutputError: as `check_output`, or the disk is full.
    """
    check_output(path, photo, overwrite=overwrite)
    file_format = _format_of(path)
    try:
        encoded = _encode(photo, file_format, json.dumps(history, ensure_ascii=True))
    except (OSError, ValueError) as error:  # such as EXIF over 64 kB in a JPEG
        raise OutputError(
            f"cannot be stored as {file_format}", where=path, found=str(error), fix="write a PNG instead"
        ) from error
    temporary = path.with_name(f".{os.getpid()}.part")  # short: the name itself may be as long as names can be
    try:
        try:
            temporary.write_bytes(encoded)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise from_os_error(error, path, "write the image") from error


def read_history(path: Path) -> dict[str, Any]:
    """Return what `write_photo` noted in a file.

    Raises:
        ImageError: it cannot be read, or holds no such note.
    """
    photo = read_photo(path)
    exif = Image.Exif()
    exif.load(photo.exif or b"")
    note = exif.get_ifd(ExifTags.IFD.Exif).get(_HISTORY_TAG)
    try:
        history = json.loads(note) if isinstance(note, str) else None
    except ValueError:
        history = None
    if not isinstance(history, dict):
        raise ImageError("holds no settings", where=path, expected="a result of this engine, not re-saved since")
    return history


# -- reading --------------------------------------------------------------------------------------


def _read_texts(image: Image.Image) -> tuple[tuple[str, str], ...]:
    """Return a PNG's texts and a JPEG's comment; what is stored elsewhere in a `Photo` is left out."""
    texts = {key: str(text) for key, text in getattr(image, "text", {}).items() if key != _XMP_IN_PNG}
    comment = image.info.get("comment")
    if isinstance(comment, bytes) and comment:
        texts["Comment"] = comment.decode("utf-8", errors="replace")
    return tuple(texts.items())


def _read_exif(image: Image.Image) -> tuple[bytes | None, tuple[str, ...]]:
    """Return the EXIF block without what holds for the stored file alone, and a remark if it is damaged."""
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
    return Photo(np.repeat(grey[:, :, None], 3, axis=2), alpha, grey=True)


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


# -- writing --------------------------------------------------------------------------------------


def _encode(photo: Photo, file_format: str, note: str) -> bytes:
    image = _to_image(photo)
    exif = Image.Exif()
    exif.load(photo.exif or b"")
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[_HISTORY_TAG] = note
    for tag, side in zip(_SIZE_TAGS, photo.size, strict=True):
        if tag in details:
            details[tag] = side
    if photo.xmp and file_format == "TIFF":
        exif[ExifTags.Base.XMLPacket] = photo.xmp
    options = dict(_SAVE_OPTIONS.get(file_format, {}))
    if file_format == "AVIF" and photo.alpha is not None:
        options["quality"] = 100  # the encoder has one quality for both, and transparency is kept as it was
    options["exif"] = exif.tobytes()
    if photo.icc_profile:
        options["icc_profile"] = photo.icc_profile
    if photo.dpi:
        options["dpi"] = photo.dpi
    if file_format == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for keyword, text in photo.texts:
            options["pnginfo"].add_itxt(keyword, text)
        if photo.xmp:
            options["pnginfo"].add_itxt(_XMP_IN_PNG, photo.xmp.decode(errors="replace"))
    elif file_format == "JPEG" and photo.texts:
        options["comment"] = "\n".join(text for _, text in photo.texts)
    if photo.xmp and file_format in ("JPEG", "WEBP", "AVIF"):
        options["xmp"] = photo.xmp
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _to_image(photo: Photo) -> Image.Image:
    image = Image.fromarray(_to_u8(photo.rgb))
    if photo.grey:
        image = image.convert("L")
    if photo.alpha is not None:
        image.putalpha(Image.fromarray(_to_u8(photo.alpha)))
    return image


def _to_u8(pixels: Pixels) -> NDArray[np.uint8]:
    return np.rint(pixels.clip(0.0, 1.0) * np.float32(255.0)).astype(np.uint8)


def _format_of(path: Path) -> str:
    try:
        return _WRITE_FORMATS[path.suffix.lower()]
    except KeyError:
        raise OutputError(
            "no format that is written",
            where=path,
            expected=", ".join(_WRITE_FORMATS),
            found=path.suffix or "no ending",
        ) from None
