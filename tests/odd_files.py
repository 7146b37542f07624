"""Builders of odd picture files, byte by byte, where libraries would write proper ones."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def gradient(width=48, height=32):
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 255 // (width + height - 2)]
    return np.stack(planes, 2).astype(np.uint8)


def short(*values):
    return struct.pack(f"<{len(values)}H", *values)


def long(*values):
    return struct.pack(f"<{len(values)}L", *values)


def directory(entries, offset):
    """Return a TIFF's directory, which begins at an offset: entries are (tag, type, count, bytes)."""
    entries = sorted(entries)
    head, data, place = short(len(entries)), b"", offset + 6 + 12 * len(entries)
    for tag, kind, count, value in entries:
        field = value.ljust(4, b"\0")
        if len(value) > 4:
            field = long(place + len(data))
            data += value + b"\0" * (len(value) % 2)
        head += struct.pack("<HHL", tag, kind, count) + field
    return head + long(0) + data


def exif(entries, details=None):
    """Return an EXIF block of entries of its main directory and of EXIF's own."""
    entries = list(entries)
    if details is None:
        return b"Exif\0\0II*\0" + long(8) + directory(entries, 8)
    place = 8 + len(directory([*entries, (0x8769, 4, 1, long(0))], 8))
    main = directory([*entries, (0x8769, 4, 1, long(place))], 8)
    return b"Exif\0\0II*\0" + long(8) + main + directory(details, place)


def tiff(data, bits, photometric, channels=1, extra=(), width=48, height=32):
    """Return a TIFF of one strip."""
    entries = [
        (256, 3, 1, short(width)),
        (257, 3, 1, short(height)),
        (258, 3, len(bits), short(*bits)),
        (259, 3, 1, short(1)),
        (262, 3, 1, short(photometric)),
        (277, 3, 1, short(channels)),
        (278, 3, 1, short(height)),
        (279, 4, 1, long(len(data))),
        *extra,
    ]
    size = 8 + len(directory([*entries, (273, 4, 1, long(0))], 8))
    return b"II*\0" + long(8) + directory([*entries, (273, 4, 1, long(size))], 8) + data


def chunk(kind, data):
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def png_rows(rows, size, depth, colour, extra=()):
    """Return a PNG of rows that are packed already."""
    head = chunk(b"IHDR", struct.pack(">LLBBBBB", *size, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes(row) for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*each) for each in extra) + body + chunk(b"IEND", b"")


def png(pixels, extra=(), depth=8):
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    rows = pixels.reshape(height, -1).astype(">u2" if depth == 16 else "u1")
    return png_rows([row.tobytes() for row in rows], (width, height), depth, {1: 0, 2: 4, 3: 2, 4: 6}[channels], extra)


def packed_bits(values, depth):
    """Return rows of samples of fewer bits than their bytes."""
    bits = np.stack([(values >> (depth - 1 - bit)) & 1 for bit in range(depth)], axis=-1).astype(np.uint8)
    return np.packbits(bits.reshape(len(values), -1), axis=1)


def png_kinds(data):
    place, found = 8, []
    while place < len(data):
        (length,) = struct.unpack_from(">L", data, place)
        found.append(data[place + 4 : place + 8].decode())
        place += 12 + length
    return found


def jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92, **options)
    return file.getvalue()


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def with_segments(data, *segments):
    return data[:2] + b"".join(segments) + data[2:]


def tiff_of(pixels, **options):
    """Return what tifffile writes of an array; tests that call it need that package."""
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()
