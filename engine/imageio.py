"""Photos in and out: any common file to a `Photo`, and back with everything that was about it.

A result is written beside its place and moved there, so no half file is ever seen. Decoding and
encoding are Pillow's.
"""

from __future__ import annotations

import io
import json
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from engine.errors import ImageError, OutputError, from_os_error
from engine.photo import DAMAGE, XMP_IN_PNG, Photo, Pixels, photo_from_image

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
#: EXIF's "record of what has been done to the image": the same place in every format.
_HISTORY_TAG = ExifTags.Base.ImageHistory
_SIZE_TAGS = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)


def read_photo(path: Path) -> Photo:
    """Read a photo from a file.

    Raises:
        ImageError: missing, not an image, truncated, animated, empty or too large.
    """
    try:
        with _damage_told(path):
            if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
                raise ImageError("is not a file", where=path, expected="an image file")
            return _decoded(path, path, None)
    except FileNotFoundError:
        raise ImageError("no such file", where=path, fix="check the path") from None
    except IsADirectoryError:
        raise ImageError("is a folder", where=path, expected="an image file") from None
    except PermissionError:
        raise ImageError("no permission to read it", where=path) from None


def decode_photo(data: bytes, where: object = "image", *, max_pixels: int | None = None) -> Photo:
    """Read a photo from an encoded file's bytes.

    Args:
        data: of any format that is read.
        where: what errors call it.
        max_pixels: that it may have; it is asked for its size before it is decoded.
    Raises:
        ImageError: not an image, truncated, animated, empty or too large.
    """
    with _damage_told(where):
        return _decoded(io.BytesIO(data), where, max_pixels)


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
    _format_of(path.suffix, path)
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
    if photo is not None:
        check_format(photo, path.suffix, path)


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
    write_file(path, encode_photo(photo, path.suffix, history, path))


def encode_photo(photo: Photo, suffix: str, history: Mapping[str, Any], where: object = "image") -> bytes:
    """Return a photo as the bytes of a file.

    Args:
        photo: with what is to be carried along.
        suffix: ".png", ".jpg", …: the format.
        history: how it was made; `read_history` gives it back.
        where: what errors call it.
    Raises:
        OutputError: an unknown format, or one that cannot hold the photo.
    """
    file_format = check_format(photo, suffix, where)
    try:
        return _encode(photo, file_format, json.dumps(history, ensure_ascii=True))
    except (OSError, ValueError) as error:  # such as EXIF over 64 kB in a JPEG
        raise OutputError(
            f"cannot be stored as {file_format}", where=where, found=str(error), fix="write a PNG instead"
        ) from error


def check_format(photo: Photo, suffix: str, where: object = "image") -> str:
    """Return Pillow's name of the format that an ending means, which must hold all that belongs to the photo.

    Raises:
        OutputError: an unknown format, or one that cannot hold the photo.
    """
    file_format = _format_of(suffix, where)
    if photo.alpha is not None and file_format == "JPEG":
        raise OutputError("JPEG cannot hold the photo's transparency", where=where, fix="write a PNG or WebP instead")
    return file_format


def write_file(path: Path, encoded: bytes) -> None:
    """Write an encoded image, whole or not at all.

    Raises:
        OutputError: the disk is full, or the place cannot be written to.
    """
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


def _decoded(source: Path | io.BytesIO, where: object, max_pixels: int | None) -> Photo:
    Image.init()
    formats = [name for name in _READ_FORMATS if name in Image.OPEN]  # Pillow may be built without some
    with Image.open(source, formats=formats) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise _too_large(where, max_pixels, f"{image.width} × {image.height}")
        return photo_from_image(image, where)


@contextmanager
def _damage_told(where: object) -> Iterator[None]:
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
            options["pnginfo"].add_itxt(XMP_IN_PNG, photo.xmp.decode(errors="replace"))
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


def _format_of(suffix: str, where: object) -> str:
    try:
        return _WRITE_FORMATS[suffix.lower()]
    except KeyError:
        raise OutputError(
            "no format that is written", where=where, expected=", ".join(_WRITE_FORMATS), found=suffix or "no ending"
        ) from None
