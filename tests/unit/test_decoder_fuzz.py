"""Damaged files of every format: a photo or an error of the engine, never a crash, never memory over a limit.

The suite tries a few of each in this process; `--slow` tries 10,000 of each in processes of their own, whose memory
is limited, so that a crash of a library is a failed test and not the end of all tests.
"""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from odd_files import exif, gradient, jpeg, png, segment, short, with_segments
from PIL import Image

from engine.errors import ImageError
from engine.image.decoding import decode_photo

FORMATS = ("PNG", "PNG16", "JPEG", "WEBP", "TIFF", "TIFF16", "BIGTIFF", "TIFF12", "AVIF", "GIF", "BMP", "HEIF", "JXL")
SEED = 20261129
MAX_PIXELS = 1 << 22
#: Address space of a fuzzing process: the libraries' own, and several times a picture of MAX_PIXELS.
LIMIT_BYTES = 6 << 30


def sample(kind):
    """Return a good file of a format, with metadata; None where its library is missing."""
    block = exif([(0x112, 3, 1, short(6)), (271, 2, 4, b"Cam\0")], [(37500, 7, 40, bytes(40))])
    pixels, file = gradient(64, 48), io.BytesIO()
    if kind == "JPEG":
        xmp = b"http://ns.adobe.com/xap/1.0/\0<x xmlns:h='http://ns.adobe.com/hdr-gain-map/1.0/' h:Version='1'/>"
        photoshop = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x08\x1c\x02\x78\0\3Oma"
        return with_segments(jpeg(pixels), segment(0xE1, block), segment(0xE1, xmp), segment(0xED, photoshop))
    if kind == "PNG16":
        return png(pixels.astype(np.uint16) * 257, [(b"eXIf", block[6:]), (b"cICP", bytes([9, 16, 0, 1]))], 16)
    if kind == "TIFF12":
        from odd_files import packed_bits, tiff

        return tiff(packed_bits(pixels[:, :, 0].astype(int) * 16, 12).tobytes(), (12,), 0, width=64, height=48)
    if kind in ("TIFF16", "BIGTIFF"):
        import tifffile

        wide = pixels.astype(np.uint16) * 257
        tifffile.imwrite(file, wide, photometric="rgb", compression="lzw", bigtiff=kind == "BIGTIFF", rowsperstrip=8)
        return file.getvalue()
    if kind == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    if kind == "JXL":
        import pillow_jxl  # noqa: F401
    options = {} if kind in ("GIF", "BMP") else {"exif": block}
    if kind == "TIFF":
        options = {"compression": "tiff_deflate"}
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def mutated(good, rng):
    """Return a file with a few bytes changed, cut, doubled or left out; most of them near its head."""
    data = bytearray(good)
    for _ in range(rng.integers(1, 9)):
        end = len(data) if rng.random() < 0.4 else min(len(data), 400)
        place = int(rng.integers(0, max(1, end)))
        kind = rng.random()
        if kind < 0.6:
            data[place : place + 1] = bytes([rng.choice([0, 1, 127, 255, int(rng.integers(256))])])
        elif kind < 0.75:
            width = int(rng.integers(1, 9))
            data[place : place + width] = rng.bytes(width)
        elif kind < 0.85:
            del data[place : place + int(rng.integers(1, 20))]
        elif kind < 0.95:
            data[place:place] = data[place : place + int(rng.integers(1, 20))]
        else:
            del data[int(rng.integers(1, len(data) + 1)) :]
        if not data:
            break
    return bytes(data)


def fuzz(kind, first, count):
    """Decode files number `first` and on; return how many were pictures."""
    good = sample(kind)
    assert decode_photo(good).size
    pictures = 0
    for number in range(first, first + count):
        data = mutated(good, np.random.default_rng([SEED, FORMATS.index(kind), number]))
        try:
            photo = decode_photo(data, max_pixels=MAX_PIXELS)
        except ImageError:
            continue
        assert np.isfinite(photo.rgb).all(), (kind, number)
        assert photo.rgb.min() >= 0, (kind, number)
        assert photo.rgb.max() <= 1, (kind, number)
        pictures += 1
    return pictures


LIBRARIES = {"HEIF": "pillow_heif", "JXL": "pillow_jxl", "TIFF16": "tifffile", "BIGTIFF": "tifffile"}


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_told_or_read(kind):
    if kind in LIBRARIES:
        pytest.importorskip(LIBRARIES[kind])
    fuzz(kind, 0, 60)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", FORMATS)
def test_ten_thousand_damaged_files_of_each_format(kind):
    code = (
        "import resource, sys; from test_decoder_fuzz import *; "
        f"resource.setrlimit(resource.RLIMIT_AS, ({LIMIT_BYTES}, {LIMIT_BYTES})); "
        "print(fuzz(sys.argv[1], int(sys.argv[2]), 1000))"
    )
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    for first in range(0, 10_000, 1000):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {folders!r}; {code}", kind, str(first)],
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, f"files {first} and on: {done.returncode}\n{done.stderr[-2000:]}"
