"""Photos in and out: any common file to float pixels, and back with everything that was about it.

Orientation is applied, alpha and metadata are carried, colours stay in the photo's own profile
(CMYK, which no result can have, is converted to sRGB). A result is written beside its place and
moved there, so no half file is ever seen. Decoding and encoding are Pillow's.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from engine.errors import ImageError, OutputError, from_os_error

_READ_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".avif")
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
    "AVIF": {"quality": 90},
}
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")
_SIXTEEN_BITS = 65535.0
#: Pillow's ways to say that a file is damaged.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError)
_XMP_IN_PNG = "XML:com.adobe.xmp"
#: EXIF's "record of what has been done to the image": the same place in every format.
_HISTORY_TAG = ExifTags.Base.ImageHistory
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
        remarks: what could not be carried over from the file, a sentence each.
    """

    rgb: Pixels
    alpha: Pixels | None = None
    grey: bool = False
    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
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
            with Image.open(path) as image:
                return photo_from_image(image, path)
    except FileNotFoundError:
        raise ImageError("no such file", where=path, fix="check the path") from None
    except IsADirectoryError:
        raise ImageError("is a folder", where=path, expected="an image file") from None
    except PermissionError:
        raise ImageError("no permission to read it", where=path) from None
    except UnidentifiedImageError:
        raise ImageError(
            "is not an image, or of a format that is not read", where=path, expected=", ".join(_READ_SUFFIXES)
        ) from None
    except Image.DecompressionBombError as error:  # Pillow's limit: 179 million pixels
        raise ImageError("is too large", where=path, found=str(error)) from error
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
        frames = f"{getattr(image, 'n_frames', 2)} frames"
        raise ImageError("is animated", where=where, found=frames, fix="extract a frame first")
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
    if path.exists() and (path.is_dir() or not overwrite):
        raise OutputError("exists already", where=path, fix="choose another name with -o, or allow it with --overwrite")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError("no such folder", where=folder, fix="create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError("no permission to write there", where=folder, fix="choose another place with -o")
    if photo is not None and photo.alpha is not None and file_format == "JPEG":
        raise OutputError("JPEG cannot hold the photo's transparency", where=path, fix="write a PNG or WebP instead")


def list_images(folder: Path) -> list[Path]:
    """Return the images of a folder by name, without its subfolders."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _READ_SUFFIXES and path.is_file())


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(encoded)
        temporary.replace(path)
    except OSError as error:
        raise from_os_error(error, path, "write the image") from error
    finally:
        temporary.unlink(missing_ok=True)


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
    if image.mode in _GREY_MODES:
        return replace(_decode_grey(image), icc_profile=icc)
    transparent = "transparency" in image.info or image.mode in ("RGBA", "PA", "La", "RGBa")
    if image.mode == "F":
        raise ImageError("holds floating-point values of unknown range", where=where, fix="convert it to 8 or 16 bit")
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
        alpha = (values != key).astype(np.float32)
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
    exif.get_ifd(ExifTags.IFD.Exif)[_HISTORY_TAG] = note
    options = dict(_SAVE_OPTIONS.get(file_format, {}))
    options["exif"] = exif.tobytes()
    if photo.icc_profile:
        options["icc_profile"] = photo.icc_profile
    if photo.dpi:
        options["dpi"] = photo.dpi
    if photo.xmp and file_format == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt(_XMP_IN_PNG, photo.xmp.decode(errors="replace"))
    elif photo.xmp and file_format in ("JPEG", "WEBP", "AVIF"):
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
