"""What a TIFF's tags say: whether it is a camera's raw, how many pictures it holds, and what its samples mean."""

from __future__ import annotations

import zlib
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
from engine.image.photo import Photo
from engine.image.tags import Buffer, Directory, TagFile, pack, read_exif

_SUBFILE, _OLD_SUBFILE, WIDTH, HEIGHT, BITS = 254, 255, 256, 257, 258
COMPRESSION, PHOTOMETRIC, _FILL_ORDER, _OFFSETS, _CHANNELS, _ROWS_PER_STRIP, _SIZES = 259, 262, 266, 273, 277, 278, 279
_PLANES, _PREDICTOR, _TILE_WIDTH, _EXTRA = 284, 317, 322, 338
_LOWEST, _HIGHEST = 340, 341
#: What sensors see (CFA, and DNG's linear raw), and Lab.
_RAW_PHOTOMETRICS, _CIE_LAB = (32803, 34892), 8
#: WhiteIsZero, BlackIsZero, RGB, palette, inks, YCbCr, Lab.
_PHOTOMETRICS = (0, 1, 2, 3, 5, 6, _CIE_LAB)
#: Compressions of TIFF that libvips' package reads (of others it gives black), and more that Pillow does.
_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50001)
_PILLOWS_COMPRESSIONS = (6, 34925, 50000)
#: Samples that are not whole bytes, and their compressions: none, and zlib.
PACKED_BITS = {10, 12, 14}
_UNPACKED = (1, 8, 32946)


def tiff_blocks(directory: Directory) -> Blocks:
    """Return what a TIFF's directory holds beside the pixels but its EXIF."""
    resources = directory.raw(PHOTOSHOP_TAG)
    iptc = directory.raw(IPTC_TAG) or (iptc_of(resources) if resources else None)
    left = ("layers",) if 37724 in directory.tags else ()
    return Blocks(xmp=directory.raw(XMP_TAG), iptc=iptc, icc=directory.raw(ICC_TAG), left=left)


def is_raw(file: TagFile, chain: list[Directory]) -> bool:
    """Tell whether a TIFF is a camera's raw, whose first picture is a thumbnail."""
    below = [inner for directory in chain[:16] for inner in file.below(directory)]
    if any(each.number(PHOTOMETRIC) in _RAW_PHOTOMETRICS for each in (*chain, *below)):
        return True
    largest = max((each.number(WIDTH) * each.number(HEIGHT) for each in below), default=0)
    first = chain[0]
    # A reduced picture before a larger one: a raw of a kind of its own, such as a compressed NEF.
    return bool(first.number(_SUBFILE) & 1) and largest > first.number(WIDTH) * first.number(HEIGHT)


def count_pictures(chain: list[Directory]) -> int:
    """Count a TIFF's pictures without smaller copies, masks and depth maps of the first one."""
    copies = sum(bool(each.number(_SUBFILE) & 5) or each.number(_OLD_SUBFILE) == 2 for each in chain[1:])
    return len(chain) - copies


def check_kind(directory: Directory, where: object) -> None:
    """Find out whether a TIFF's samples are of a kind that is read.

    Raises:
        ImageError: they are not.
    """
    bits, kind = set(directory.numbers(BITS)) or {1}, directory.number(PHOTOMETRIC, -1)
    compression = directory.number(COMPRESSION, 1)
    found = None
    if len(bits) > 1 or not bits <= {1, 2, 4, 8, *PACKED_BITS, 16, 32}:
        found = f"{', '.join(f'{each:g}' for each in directory.numbers(BITS))} bits a sample"
    elif kind not in _PHOTOMETRICS:
        found = f"PhotometricInterpretation {kind}"
    elif compression not in (*_COMPRESSIONS, *_PILLOWS_COMPRESSIONS):
        found = f"Compression {compression}"
    elif bits <= PACKED_BITS and (
        compression not in _UNPACKED or kind > 2 or directory.number(_PREDICTOR, 1) != 1 or not _is_plain(directory)
    ):
        found = f"{min(bits):g} bits a sample with Compression {compression}, or in tiles or planes"
    if found is not None:
        fix = "convert it to 8 or 16 bits a channel of grey or RGB"
        raise ImageError("is a TIFF of a kind that is not read", where=where, found=found, fix=fix)


def _is_plain(directory: Directory) -> bool:
    """Tell whether rows lie one after the other, the samples of a pixel together, high bits first."""
    tiles = _TILE_WIDTH in directory.tags
    return not tiles and directory.number(_PLANES, 1) == 1 and directory.number(_FILL_ORDER, 1) == 1


def needs_pillow(directory: Directory) -> bool:
    """Tell whether a TIFF is of a kind that Pillow reads and libvips' package does not."""
    lab = directory.number(PHOTOMETRIC) == _CIE_LAB and directory.number(BITS, 1) == 8
    return lab or directory.number(COMPRESSION, 1) in _PILLOWS_COMPRESSIONS


def unpack(data: Buffer, directory: Directory) -> Photo:
    """Return the picture of a TIFF whose samples have 10, 12 or 14 bits, which no library here reads; as it lies.

    Args:
        data: the file.
        directory: that `check_kind` has looked at.
    Raises:
        ValueError: the file is damaged.
    """
    width, height, bits = directory.number(WIDTH), directory.number(HEIGHT), directory.number(BITS)
    channels = directory.number(_CHANNELS, 1)
    if not 1 <= channels <= 8:
        raise ValueError(f"{channels} samples a pixel")
    row, rows = -(-width * channels * bits // 8), max(1, directory.number(_ROWS_PER_STRIP, height))
    stored = np.zeros((height, row), np.uint8)
    places = zip(directory.numbers(_OFFSETS), directory.numbers(_SIZES), strict=True)
    for top, (place, size) in zip(range(0, height, rows), places, strict=True):
        strip = data[int(place) : int(place + size)]
        count = min(rows, height - top)
        if directory.number(COMPRESSION, 1) != 1:
            strip = zlib.decompressobj().decompress(strip, count * row)
        if len(strip) < count * row:
            raise ValueError(f"strip of {len(strip)} bytes instead of {count * row}")
        stored[top : top + count] = np.frombuffer(strip, np.uint8, count * row).reshape(count, row)
    values = np.empty((height, width, channels), np.float32)
    weights = (1 << np.arange(bits)[::-1]).astype(np.float32) / np.float32((1 << bits) - 1)
    for line, packed in zip(values, stored, strict=True):  # a row at a time: each bit becomes four bytes
        line[:] = np.unpackbits(packed, count=width * channels * bits).reshape(width, channels, bits) @ weights
    if directory.number(PHOTOMETRIC) == 0:
        values = 1 - values
    grey = channels < 3
    rgb = np.repeat(values[:, :, :1], 3, axis=2) if grey else np.ascontiguousarray(values[:, :, :3])
    colours = 1 if grey else 3
    kinds = [int(kind) for kind in directory.numbers(_EXTRA)]
    transparent = channels > colours and kinds[:1] == [2]
    return Photo(rgb, np.ascontiguousarray(values[:, :, colours]) if transparent else None, grey=grey, bits=16)


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
    if directory.number(PHOTOMETRIC) == 0:  # white is the lowest
        black, white = white, black
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
