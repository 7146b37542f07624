"""Pixels of 16 bits a channel, in and out, where Pillow has only 8: colours, and grey with transparency.

Pillow reads and writes 16-bit grey; its colours have 8 bits in memory, so it cuts theirs. PNGs are
imagecodecs' (libpng), TIFFs are tifffile's to read. What goes beside the pixels stays Pillow's.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from engine.errors import OutputError
from engine.image.photo import Photo

Pixels16 = NDArray[np.uint16]

INSTALL = "pip install imagecodecs tifffile"
_WHITE = np.float32(65535.0)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: What Pillow makes of files that this module reads, and how it calls a PNG's pixels.
_MODES = ("RGB", "RGBA", "I;16")
_RAW_MODES = ("RGB;16", "RGBA;16", "LA;16")
#: libpng's; the higher ones take twice the time for 2 % less.
_PNG_LEVEL = 1
_BASELINE = ExifTags.Base


@dataclass(frozen=True)
class HighBitDepthPixels:
    """What a file holds beyond 8 bits: its pixels, upright, or why they are left out."""

    pixels: Pixels16 | None = None
    warning: str | None = None


def read_wide(image: Image.Image, source: Path | io.BytesIO) -> HighBitDepthPixels | None:
    """Return the 16-bit pixels of a picture that Pillow would cut to 8 bits, or None for any other.

    Args:
        image: opened but not loaded: loading turns a TIFF upright and forgets how it lay.
        source: that it was opened from.
    Raises:
        What imagecodecs and tifffile raise for a damaged file: see `engine.image.photo.DAMAGE`.
    """
    if not (_is_wide_png(image) if image.format == "PNG" else _is_wide_tiff(image)):
        return None
    if image.mode not in _MODES or _is_premultiplied(image):
        kind = "transparency that colours are multiplied by" if image.mode == "RGBA" else image.mode
        return HighBitDepthPixels(warning=f"its 16 bits a channel were read as 8 ({kind} is converted)")
    try:
        stored = _read_png(source) if image.format == "PNG" else _read_tiff(source)
    except ModuleNotFoundError as error:
        return HighBitDepthPixels(
            warning=f"its 16 bits a channel were read as 8: no module {error.name}; for 16: {INSTALL}"
        )
    if image.format == "TIFF" and image.mode == "RGB":
        stored = stored[:, :, :3]  # what a TIFF may hold beside the colours has no meaning
    return HighBitDepthPixels(_upright(stored, _orientation(image)))


def apply_high_bit_depth(photo: Photo, found: HighBitDepthPixels) -> Photo:
    """Return a photo, which was read with 8 bits a channel, with 16 where they could be read."""
    pixels = found.pixels
    if pixels is None:
        assert found.warning is not None
        return replace(photo, warnings=(*photo.warnings, found.warning))
    if pixels.shape[:2] != photo.rgb.shape[:2]:  # damaged EXIF, which Pillow and `_orientation` read apart
        return replace(photo, warnings=(*photo.warnings, "its 16 bits a channel were read as 8"))
    channels = pixels.astype(np.float32) / _WHITE
    grey = channels.shape[2] < 3
    rgb = np.repeat(channels[:, :, :1], 3, axis=2) if grey else np.ascontiguousarray(channels[:, :, :3])
    alpha = np.ascontiguousarray(channels[:, :, -1]) if channels.shape[2] in (2, 4) else None
    return replace(photo, rgb=rgb, alpha=alpha, grey=grey, bits=16)


def to_u16(photo: Photo) -> Pixels16:
    """Return u16[H, W] of a grey photo, else u16[H, W, C]: grey or RGB, then alpha if there is one."""
    planes = [photo.rgb[:, :, :1] if photo.grey else photo.rgb]
    if photo.alpha is not None:
        planes.append(photo.alpha[:, :, None])
    pixels = np.concatenate(planes, axis=2).clip(0.0, 1.0)
    rounded = np.rint(pixels * _WHITE).astype(np.uint16)
    return rounded[:, :, 0] if rounded.shape[2] == 1 else rounded


def write_png(pixels: Pixels16, beside: bytes, where: object) -> bytes:
    """Return a 16-bit PNG.

    Args:
        pixels: u16[H, W, C] with C from 2 to 4.
        beside: any PNG, whose profile, texts and other chunks it takes over.
        where: what errors call it.
    Raises:
        OutputError: imagecodecs is missing.
    """
    try:
        import imagecodecs
    except ModuleNotFoundError as error:
        raise OutputError(
            "writing colours of 16 bits needs a library",
            where=where,
            found=f"no module {error.name}",
            fix=f"{INSTALL}, or write a TIFF",
        ) from error
    header, *rest = _chunks(bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels), level=_PNG_LEVEL)))
    about = [whole for kind, whole in _chunks(beside) if kind not in (b"IHDR", b"IDAT", b"IEND")]
    return b"".join([_PNG_SIGNATURE, header[1], *about, *(whole for _, whole in rest)])


def write_tiff(pixels: Pixels16, exif: Image.Exif) -> bytes:
    """Return a 16-bit TIFF, uncompressed as Pillow's are.

    Args:
        pixels: u16[H, W, C] with C from 2 to 4.
        exif: what else its directory holds: EXIF, ICC profile, XMP, resolution.
    """
    height, width, channels = pixels.shape
    data = pixels.astype("<u2").tobytes()
    exif.endian = "<"
    layout: dict[int, Any] = {
        _BASELINE.ImageWidth: width,
        _BASELINE.ImageLength: height,
        _BASELINE.BitsPerSample: (16,) * channels,
        _BASELINE.Compression: 1,
        _BASELINE.PhotometricInterpretation: 2 if channels > 2 else 1,
        _BASELINE.StripOffsets: 0,
        _BASELINE.SamplesPerPixel: channels,
        _BASELINE.RowsPerStrip: height,
        _BASELINE.StripByteCounts: len(data),
        _BASELINE.PlanarConfiguration: 1,
    }
    if channels in (2, 4):
        layout[_BASELINE.ExtraSamples] = 2  # alpha that colours are not multiplied by
    for tag, value in layout.items():
        exif[tag] = value
    # An EXIF block is a TIFF without pixels behind six bytes, and Pillow counts strips from its end.
    return exif.tobytes()[6:] + data


def _read_png(source: Path | io.BytesIO) -> Pixels16:
    import imagecodecs

    data = source.read_bytes() if isinstance(source, Path) else source.getvalue()
    pixels = imagecodecs.png_decode(data)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _read_tiff(source: Path | io.BytesIO) -> Pixels16:
    import tifffile

    if isinstance(source, io.BytesIO):
        source = io.BytesIO(source.getvalue())  # it is closed, and Pillow reads on
    with tifffile.TiffFile(source) as file:
        page = file.pages[0]
        pixels = page.asarray()
        if page.axes == "SYX":  # a plane for each colour
            pixels = np.moveaxis(pixels, 0, 2)
    if pixels.dtype != np.uint16 or pixels.ndim != 3:
        raise ValueError(f"pixels of {pixels.dtype} {list(pixels.shape)}")
    return pixels


def _is_wide_png(image: Image.Image) -> bool:
    tiles = getattr(image, "tile", ())
    raw_mode = str(tiles[0][3]) if tiles else ""
    return raw_mode.startswith(_RAW_MODES) or (raw_mode.startswith("I;16") and "transparency" in image.info)


def _is_wide_tiff(image: Image.Image) -> bool:
    bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, ()) if isinstance(image, TiffImageFile) else ()
    return len(bits) > 1 and set(bits) == {16}


def _is_premultiplied(image: Image.Image) -> bool:
    return isinstance(image, TiffImageFile) and image.tag_v2.get(ExifTags.Base.ExtraSamples) == (1,)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged block raises nearly anything; the picture then stays as it lies
        return 1


def _upright(pixels: Pixels16, orientation: int) -> Pixels16:
    """Return pixels turned as EXIF says, by Pillow, a plane at a time."""
    if orientation == 1:
        return pixels
    planes = []
    for index in range(pixels.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(pixels[:, :, index]))
        plane.getexif()[ExifTags.Base.Orientation] = orientation
        planes.append(np.asarray(ImageOps.exif_transpose(plane)))
    return np.stack(planes, axis=2)


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield each chunk's kind, and the whole of it."""
    place = len(_PNG_SIGNATURE)
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        end = place + length + 12  # its length and kind before, its checksum behind
        yield png[place + 4 : place + 8], png[place:end]
        place = end
