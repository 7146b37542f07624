"""16 bits a channel, in and out, held against other readers: libpng by imagecodecs, and tifffile."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_files import png
from PIL import ExifTags, Image, ImageCms

from engine.errors import ImageError
from engine.image.decoding import decode_photo
from engine.image.encoding import encode_photo
from engine.image.files import read_photo, read_provenance, write_photo

imagecodecs = pytest.importorskip("imagecodecs", reason="needs the test extra")
tifffile = pytest.importorskip("tifffile", reason="needs the test extra")

HISTORY = {"engine": "test", "settings": {"steps": 15}}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MODES = {2: "LA", 3: "RGB", 4: "RGBA"}


def noise(channels=3, width=13, height=7, seed=0):
    return np.random.default_rng(seed).integers(0, 65536, (height, width, channels), dtype=np.uint16)


def tiff(pixels, **options):
    buffer = io.BytesIO()
    alpha = {"extrasamples": ["unassalpha"]} if 4 in (pixels.shape[0], pixels.shape[2]) else {}
    tifffile.imwrite(buffer, pixels, photometric="rgb", **alpha, **options)
    return buffer.getvalue()


def read_back(encoded, suffix):
    """By the library, not by the engine."""
    return imagecodecs.png_decode(encoded) if suffix == ".png" else tifffile.imread(io.BytesIO(encoded))


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_go_through(channels, suffix):
    pixels = noise(channels)
    photo = decode_photo(imagecodecs.png_encode(pixels))
    assert photo.bits == 16
    assert photo.grey is (channels == 2)
    assert not photo.warnings
    again = read_back(encode_photo(photo, suffix, HISTORY), suffix)
    assert np.array_equal(again, pixels)
    assert np.array_equal(decode_photo(encode_photo(photo, suffix, HISTORY)).rgb, photo.rgb)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_stays_grey(suffix):
    buffer = io.BytesIO()
    values = noise(1)[:, :, 0]
    Image.fromarray(values).save(buffer, "PNG")
    photo = decode_photo(buffer.getvalue())
    assert photo.bits == 16
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_photo(photo, suffix, HISTORY)))), values)


def test_a_transparent_grey_value_of_sixteen_bits():
    values = noise(1)[:, :, 0]
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", transparency=int(values[2, 3]))
    photo = decode_photo(buffer.getvalue())
    assert photo.bits == 16
    written = imagecodecs.png_decode(encode_photo(photo, ".png", HISTORY))
    assert np.array_equal(written[:, :, 0], values)
    assert np.array_equal(written[:, :, 1] == 0, values == values[2, 3])


@pytest.mark.parametrize(
    "options",
    [
        {"byteorder": ">"},
        {"compression": "lzw", "predictor": 2},
        {"compression": "zlib", "tile": (16, 16)},
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "compression": "lzw", "byteorder": ">"},
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [3, 4])
def test_tiffs_of_every_layout(options, channels):
    pixels = noise(channels)
    stored = np.moveaxis(pixels, 2, 0) if "planarconfig" in options else pixels
    photo = decode_photo(tiff(np.ascontiguousarray(stored), **options))
    assert photo.bits == 16
    assert np.array_equal(tifffile.imread(io.BytesIO(encode_photo(photo, ".tif", HISTORY))), pixels)


@settings(max_examples=25, deadline=None)
@given(
    channels=st.sampled_from([3, 4]),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    orientation=st.integers(1, 8),
    kind=st.sampled_from([".png", ".tif"]),
    out=st.sampled_from([".png", ".tif"]),
)
def test_orientation_is_applied_as_to_eight_bits(tmp_path_factory, channels, width, height, orientation, kind, out):
    pixels = noise(channels, width, height)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    if kind == ".tif":
        stored = tiff(pixels, extratags=[(274, 3, 1, orientation, True)])
    else:
        stored = png(pixels, [(b"eXIf", exif.tobytes()[6:])], 16)
    buffer = io.BytesIO()
    Image.fromarray((pixels >> 8).astype(np.uint8), MODES[channels]).save(buffer, "PNG", exif=exif)
    photo, small = decode_photo(stored), decode_photo(buffer.getvalue())
    assert photo.bits == 16
    assert photo.size == small.size
    written = read_back(encode_photo(photo, out, HISTORY), out)
    eight = np.rint(small.rgb * 255).astype(np.uint8)
    assert np.array_equal((written[:, :, :3] >> 8).astype(np.uint8), eight)
    assert np.array_equal(np.sort(written, axis=None), np.sort(pixels, axis=None))
    assert decode_photo(encode_photo(photo, out, HISTORY)).size == small.size  # and is not turned again


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_what_is_about_the_photo_is_kept(tmp_path, channels, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2020:01:02 03:04:05"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    from dataclasses import replace

    photo = replace(
        decode_photo(imagecodecs.png_encode(noise(channels))),
        icc_profile=SRGB,
        exif=exif.tobytes(),
        xmp=b"<x:xmpmeta/>",
        dpi=(300.0, 300.0),
        texts=(("Comment", "Grüße"),),
    )
    path = tmp_path / f"a{suffix}"
    write_photo(path, photo, HISTORY)
    again = read_photo(path)
    assert read_provenance(path) == HISTORY
    assert (again.bits, again.icc_profile, again.xmp) == (16, SRGB, b"<x:xmpmeta/>")
    assert again.dpi == pytest.approx((300.0, 300.0), rel=1e-3)
    kept = Image.Exif()
    kept.load(again.exif)
    assert kept[ExifTags.Base.Make] == "Camera"
    assert kept.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] == "2020:01:02 03:04:05"
    assert kept.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
    if suffix == ".png":
        assert again.texts == photo.texts
    write_photo(tmp_path / f"b{suffix}", again, HISTORY)  # nothing of the layout was carried along
    assert np.array_equal(read_photo(tmp_path / f"b{suffix}").rgb, photo.rgb)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".avif"])
def test_formats_of_eight_bits_hold_eight(suffix):
    photo = decode_photo(imagecodecs.png_encode(np.full((8, 8, 3), 32896, np.uint16)))
    again = decode_photo(encode_photo(photo, suffix, HISTORY))
    assert again.bits == 8
    assert np.abs(again.rgb - photo.rgb).max() < 0.02


def test_print_colours_are_converted_at_sixteen_bits():
    pixels = np.random.default_rng(0).integers(0, 65536, (7, 13, 4), dtype=np.uint16)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="separated")
    photo = decode_photo(buffer.getvalue())
    assert (photo.bits, photo.warnings, photo.icc_profile) == (16, (), None)
    ink = pixels.astype(np.float64) / 65535
    assert photo.rgb == pytest.approx((1 - ink[:, :, :3]) * (1 - ink[:, :, 3:]), abs=1e-5)


def test_a_fourth_channel_without_a_meaning_is_left_out():
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, noise(4), photometric="rgb", extrasamples=["unspecified"])
    photo = decode_photo(buffer.getvalue())
    assert photo.alpha is None
    assert np.array_equal(imagecodecs.png_decode(encode_photo(photo, ".png", HISTORY)), noise(4)[:, :, :3])


def test_premultiplied_colours_are_divided_at_sixteen_bits():
    buffer = io.BytesIO()
    pixels = np.full((4, 4, 4), (8192, 16384, 32768, 32768), np.uint16)
    tifffile.imwrite(buffer, pixels, photometric="rgb", extrasamples=["assocalpha"])
    photo = decode_photo(buffer.getvalue())
    assert (photo.bits, photo.warnings) == (16, ())
    assert photo.rgb[0, 0] == pytest.approx([0.25, 0.5, 1.0], abs=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_mangled_files_give_photos_or_image_errors(data):
    pixels = noise(3, 40, 30)
    raw = bytearray(data.draw(st.sampled_from([imagecodecs.png_encode(pixels), tiff(pixels, compression="lzw")])))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        photo = decode_photo(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    except ImageError:
        return
    assert np.isfinite(photo.rgb).all()
