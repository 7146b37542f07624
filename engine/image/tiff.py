"""What a TIFF's tags say: whether it is a camera's raw, how many pictures it holds, and what its samples mean."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.errors import ImageError
from engine.image.blocks import Blocks, iptc_of
from engine.image.codec import Samples, dtype_of
from engine.image.metadata import (
    ICC_TAG,
    IPTC_TAG,
    PHOTOSHOP_TAG,
    RESOLUTION_UNIT,
    X_RESOLUTION,
    XMP_TAG,
    Y_RESOLUTION,
)
from engine.image.tags import Directory, TagFile, pack, read_exif

_SUBFILE, _OLD_SUBFILE, WIDTH, HEIGHT, BITS = 254, 255, 256, 257, 258
_COMPRESSION, _PHOTOMETRIC, _EXTRA = 259, 262, 338
_LOWEST, _HIGHEST = 340, 341
#: What sensors see (CFA, and DNG's linear raw), and Lab.
_RAW_PHOTOMETRICS, _CIE_LAB = (32803, 34892), 8
#: Compressions of TIFF that libvips' package reads; Pillow has a few more.
_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50001)


def tiff_blocks(directory: Directory) -> Blocks:
    """Return what a TIFF's directory holds beside the pixels but its EXIF."""
    resources = directory.raw(PHOTOSHOP_TAG)
    iptc = directory.raw(IPTC_TAG) or (iptc_of(resources) if resources else None)
    left = ("layers",) if 37724 in directory.tags else ()
    return Blocks(xmp=directory.raw(XMP_TAG), iptc=iptc, icc=directory.raw(ICC_TAG), left=left)


def is_raw(file: TagFile, chain: list[Directory]) -> bool:
    """Tell whether a TIFF is a camera's raw, whose first picture is a thumbnail."""
    below = [inner for directory in chain[:16] for inner in file.below(directory)]
    if any(each.number(_PHOTOMETRIC) in _RAW_PHOTOMETRICS for each in (*chain, *below)):
        return True
    largest = max((each.number(WIDTH) * each.number(HEIGHT) for each in below), default=0)
    first = chain[0]
    # A reduced picture before a larger one: a raw of a kind of its own, such as a compressed NEF.
    return bool(first.number(_SUBFILE) & 1) and largest > first.number(WIDTH) * first.number(HEIGHT)


def count_pictures(chain: list[Directory]) -> int:
    """Count a TIFF's pictures without smaller copies, masks and depth maps of the first one."""
    copies = sum(bool(each.number(_SUBFILE) & 5) or each.number(_OLD_SUBFILE) == 2 for each in chain[1:])
    return len(chain) - copies


def needs_pillow(directory: Directory) -> bool:
    """Tell whether a TIFF is of a kind that libvips' package does not read: rare compressions, 8-bit Lab, 12 bits."""
    if directory.number(_COMPRESSION, 1) not in _COMPRESSIONS or directory.number(BITS, 1) == 12:
        return True
    return directory.number(_PHOTOMETRIC) == _CIE_LAB and directory.number(BITS, 1) == 8


def samples_of(directory: Directory, image: Any, where: object) -> Samples:
    """Return what a TIFF's bands mean, by its tags.

    Raises:
        ImageError: nothing says which values are black and white.
    """
    dtype = dtype_of(image)
    extra = [int(value) for value in directory.numbers(_EXTRA)]
    colours = image.bands - len(extra) if extra and image.interpretation != "cmyk" else image.bands
    colours = 4 if image.interpretation == "cmyk" else 1 if colours < 3 else 3
    alpha = next((colours + index for index, kind in enumerate(extra) if kind in (1, 2)), None)
    if alpha is not None and alpha >= image.bands:
        alpha = None
    if dtype.kind == "u":
        white = float(np.iinfo(dtype).max)
        return Samples(colours, alpha, 0.0, white, white)
    lowest, highest = directory.numbers(_LOWEST), directory.numbers(_HIGHEST)
    kind = "signed" if dtype.kind == "i" else "floating-point"
    if not lowest or not highest or not np.isfinite([*lowest, *highest]).all() or min(lowest) >= max(highest):
        raise unknown_range(f"{kind} samples of {directory.number(BITS)} bits, and no tags that say it", where)
    black, white = float(min(lowest)), float(max(highest))
    if directory.number(_PHOTOMETRIC) == 0:  # white is the lowest
        black, white = white, black
        if dtype.kind == "f":  # libvips has taken them from 1
            black, white = 1 - black, 1 - white
    return Samples(colours, alpha, black, white, max(abs(black), abs(white)))


def unknown_range(found: str, where: object) -> ImageError:
    """Return the error of samples whose black and white nothing states."""
    return ImageError(
        "holds values of unknown range",
        where=where,
        expected="whole numbers without sign, or the tags SMinSampleValue and SMaxSampleValue",
        found=found,
        fix="convert it to 8 or 16 bits a channel",
    )


def write_tiff(encoded: bytes, blocks: Blocks) -> bytes:
    """Return a TIFF whose directory, moved to its end, holds blocks too."""
    file = TagFile.open(encoded)
    directory = file.directory(file.first)
    for code in (X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT):  # libvips states one always
        directory.tags.pop(code, None)
    exif = read_exif(blocks.exif or b"").in_order(file.order)
    directory.tags = {**exif.tags, **directory.tags}
    directory.children = exif.children
    for code, kind, value in ((XMP_TAG, 1, blocks.xmp), (IPTC_TAG, 7, blocks.iptc), (ICC_TAG, 7, blocks.icc)):
        if value:
            directory.put(code, kind, value)
    body, offset = pack(directory, len(encoded) + len(encoded) % 2, big=file.big)
    at, width = (8, 8) if file.big else (4, 4)
    first = offset.to_bytes(width, "little" if file.order == "<" else "big")
    return b"".join([encoded[:at], first, encoded[at + width :], bytes(len(encoded) % 2), body])
