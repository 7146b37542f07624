"""Pixels of files of the kinds that users of such programs have reported: depths, signs, raws, pages, cut files.

Docstrings say where a kind was reported.
"""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from odd_files import (
    gradient,
    jpeg,
    packed_bits,
    png,
    png_rows,
    tiff,
    tiff_of,
)
from PIL import Image

from engine.errors import ImageError
from engine.image.decoding import decode_photo
from engine.image.files import list_images

tifffile = pytest.importorskip("tifffile", reason="needs the test extra")


# -- samples by their tags --------------------------------------------------------------------------

RAMP = np.repeat(np.linspace(0, 65535, 48).astype("<u2")[None], 32, 0)


def assert_ramp(photo, tolerance=1e-3):
    assert photo.rgb[0, :, 0] == pytest.approx(np.linspace(0, 1, 48), abs=tolerance)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_white_is_zero(bits):
    """darktable#18815, ITK#6636, Pillow#5655."""
    values = (65535 - RAMP).astype(np.uint32)
    stored = {8: values >> 8, 16: values, 32: values * 65537}[bits].astype(f"<u{bits // 8}")
    assert_ramp(decode_photo(tiff(stored.tobytes(), (bits,), 0)), 4e-3 if bits == 8 else 1e-4)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 10, 12, 14])
def test_grey_of_few_or_odd_bits(bits, photometric):
    """Pillow#414, #2610, nomacs#706."""
    top = 2**bits - 1
    values = np.repeat(np.linspace(0, top, 48).astype(np.int64)[None], 32, 0)
    photo = decode_photo(tiff(packed_bits(values, bits).tobytes(), (bits,), photometric))
    expected = values[0] / top if photometric == 1 else 1 - values[0] / top
    assert photo.rgb[0, :, 0] == pytest.approx(expected, abs=1e-4)
    assert photo.bits == (16 if bits > 8 else 8)


def test_colours_of_twelve_bits_deflated():
    values = np.random.default_rng(0).integers(0, 4096, (32, 48, 3))
    packed = zlib.compress(packed_bits(values.reshape(32, -1), 12).tobytes())
    data = tiff(packed, (12, 12, 12), 2, 3).replace(
        struct.pack("<HHLL", 259, 3, 1, 1), struct.pack("<HHLL", 259, 3, 1, 8)
    )
    assert decode_photo(data).rgb * 4095 == pytest.approx(values, abs=1e-2)


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize(
    ("values", "kind", "low", "high"),
    [
        ((RAMP.astype(int) - 32768).astype("i2"), "h", -32768, 32767),
        ((RAMP.astype(int) // 256 - 128).astype("i1"), "b", -128, 127),
        ((RAMP / 257).astype("f4"), "f", 0.0, 255.0),
        ((RAMP / 65535).astype("f2"), "f", 0.0, 1.0),
    ],
)
def test_signed_and_float_samples_have_the_range_that_tags_state(values, kind, low, high, white_is_zero):
    tags = [(340, kind, 1, low, True), (341, kind, 1, high, True)]
    photometric = "miniswhite" if white_is_zero else "minisblack"
    photo = decode_photo(tiff_of(values, extratags=tags, photometric=photometric))
    expected = np.linspace(0, 1, 48)
    assert photo.rgb[0, :, 0] == pytest.approx(1 - expected if white_is_zero else expected, abs=5e-3)


@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "f2", "f4"])
def test_samples_without_a_range_are_refused(kind):
    with pytest.raises(ImageError, match=r"(?s)values of unknown range.*SMinSampleValue.*no tags that say it"):
        decode_photo(tiff_of((RAMP / 1000).astype(kind)))


@pytest.mark.parametrize(
    ("pixels", "options", "found"),
    [
        (RAMP.astype("f8"), {}, "64 bits a sample"),
        (RAMP.astype("u8"), {}, "64 bits a sample"),
        (np.zeros((8, 8, 3), "u1"), {"photometric": "icclab"}, "PhotometricInterpretation 9"),
        (np.zeros((8, 8, 3), "u1"), {"photometric": "rgb", "compression": "lerc"}, "Compression 34887"),
    ],
)
def test_kinds_of_tiff_that_are_not_read_are_named(pixels, options, found):
    """libvips gives black for a compression that it lacks."""
    with pytest.raises(ImageError, match=f"(?s)of a kind that is not read.*{found}"):
        decode_photo(tiff_of(pixels, **options))


def test_sixteen_bits_that_are_read_as_eight_are_told():
    photo = decode_photo(tiff_of(np.full((8, 8, 3), 32896, "u2"), photometric="rgb", compression="zstd"))
    assert (photo.bits, photo.warnings) == (8, ("its 16 bits a channel were read as 8",))
    assert photo.rgb == pytest.approx(0.502, abs=2e-3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["lzw", "zstd"])  # libvips' and Pillow's
def test_tiffs_stand_upright_whoever_reads_them(orientation, compression):
    tag = (274, 3, 1, orientation, True)
    data = tiff_of(gradient(), photometric="rgb", compression=compression, extratags=[tag])
    plain = Image.fromarray(gradient())
    plain.getexif()[274] = orientation
    file = io.BytesIO()
    plain.save(file, "PNG", exif=plain.getexif())
    assert np.array_equal(decode_photo(data).rgb, decode_photo(file.getvalue()).rgb)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_transparent_grey_counts_in_the_files_levels(depth):
    """SixLabors/ImageSharp#740, libspng#48, Pillow#9281."""
    top = 2**depth - 1
    values = np.tile(np.arange(8) % (top + 1), (4, 1)).astype(np.uint8)
    for key in range(min(top, 16) + 1):
        rows = packed_bits(values, depth)
        data = png_rows([row.tobytes() for row in rows], (8, 4), depth, 0, [(b"tRNS", struct.pack(">H", key))])
        photo = decode_photo(data)
        assert np.array_equal(photo.alpha < 0.5, values == key)
        assert photo.rgb[:, :, 0] == pytest.approx(values / top)


# -- raws and containers ----------------------------------------------------------------------------


def dng(**raw_options):
    """A DNG whose thumbnail is 96 × 64 and whose photo is 192 × 128."""
    matrix = (3.2406, -1.5372, -0.4986, -0.9689, 1.8758, 0.0415, 0.0557, -0.2040, 1.0570)

    def fractions(values):
        return tuple(number for value in values for number in (round(value * 10_000), 10_000))

    tags = [
        (50706, "B", 4, (1, 4, 0, 0), True),
        (50708, "s", 0, "Test Camera", True),
        (50721, "2i", 9, fractions(matrix), True),
        (50728, "2I", 3, fractions((1, 1, 1)), True),
        (50778, "H", 1, 21, True),
        (271, "s", 0, "Test", True),
        (272, "s", 0, "Camera", True),
    ]
    ramp = np.repeat(np.linspace(4000, 44000, 192).astype("u2")[None], 128, 0)
    mosaic = [(33421, "H", 2, (2, 2), True), (33422, "B", 4, (0, 1, 1, 2), True), (50717, "I", 1, 65535, True)]
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(
            np.repeat(np.repeat(gradient(), 2, 0), 2, 1), photometric="rgb", subfiletype=1, subifds=1, extratags=tags
        )
        writer.write(ramp, photometric=32803, subfiletype=0, extratags=mosaic, **raw_options)
    return file.getvalue()


def test_a_raw_is_developed(tmp_path):
    """Pillow#6482, UTIF.js#93: never its thumbnail."""
    pytest.importorskip("rawpy", reason="needs the raw extra")
    photo = decode_photo(dng())
    assert (photo.size, photo.bits) == ((192, 128), 16)
    assert photo.rgb[64, 170].mean() > 2 * photo.rgb[64, 10].mean()
    assert b"Camera" in photo.exif
    assert struct.pack("<H", 50706) not in photo.exif


def test_a_raw_without_the_library_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "rawpy", None)
    for data in (
        dng(),
        b"FUJIFILMCCD-RAW 0201FF",
        b"II*\0\x10\0\0\0CR\2\0" + bytes(64),
        bytes(4) + b"ftypcrx " + bytes(64),
    ):
        with pytest.raises(ImageError, match="(?s)is a camera raw, which needs a library.*pip install rawpy"):
            decode_photo(data)


def test_a_damaged_raw_is_still_told_to_be_one():
    pytest.importorskip("rawpy", reason="needs the raw extra")
    with pytest.raises(ImageError, match="is a camera raw that cannot be developed"):
        decode_photo(dng()[:-20_000])


def test_jpeg_xl_is_read_or_named(monkeypatch):
    pytest.importorskip("pillow_jxl", reason="needs the jxl extra")
    image = Image.fromarray(gradient())
    image.getexif()[274] = 6
    file = io.BytesIO()
    image.save(file, "JXL", lossless=True, exif=image.getexif().tobytes())
    assert np.array_equal(np.rint(decode_photo(file.getvalue()).rgb * 255), np.rot90(gradient(), -1))
    monkeypatch.delitem(Image.OPEN, "JXL")
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    with pytest.raises(ImageError, match=r"(?s)is a JPEG XL photo.*restoration-engine\[jxl\]"):
        decode_photo(file.getvalue())


@pytest.mark.parametrize("kind", [{"subfiletype": 1}, {"extratags": [(255, "H", 1, 2, True)]}])
def test_smaller_copies_are_no_pictures_of_their_own(kind):
    """libvips#4, #1673, collectiveaccess#890."""
    pixels = np.repeat(np.repeat(gradient(), 4, 0), 4, 1)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(pixels, photometric="rgb", compression="zlib")
        for step in (2, 4):
            writer.write(pixels[::step, ::step], photometric="rgb", compression="zlib", **kind)
    assert np.array_equal(np.rint(decode_photo(file.getvalue()).rgb * 255), pixels)


def test_pages_are_pictures_of_their_own():
    with pytest.raises(ImageError, match="holds several pictures"):
        decode_photo(tiff_of(np.zeros((2, 8, 8, 3), "u1"), photometric="rgb"))


def test_an_animated_png_is_told():
    with pytest.raises(ImageError, match="holds several pictures"):
        decode_photo(png(gradient(), [(b"acTL", struct.pack(">LL", 2, 0))]))


def test_other_endings_of_jpegs_count(tmp_path):
    """jpegview#168, ImageGlass#1798."""
    names = ["a.jpg", "b.jfif", "c.jpe", "d.JIF"]
    for name in names:
        (tmp_path / name).write_bytes(jpeg(gradient()))
    assert [path.name for path in list_images(tmp_path)] == names


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_an_end_marker_is_whole_and_a_cut_one_is_not(progressive):
    """ComfyUI#2692, Pillow#4414."""
    whole = jpeg(np.repeat(np.repeat(gradient(), 8, 0), 8, 1), progressive=progressive)
    for short_of in (1, 2):
        photo = decode_photo(whole[:-short_of])
        assert np.array_equal(photo.rgb, decode_photo(whole).rgb)
        assert "end marker" in photo.warnings[0]
    for cut in (len(whole) // 3, len(whole) * 2 // 3, len(whole) - 3):
        with pytest.raises(ImageError, match="is truncated or damaged"):
            decode_photo(whole[:cut])
