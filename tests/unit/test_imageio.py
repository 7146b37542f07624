import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from engine.bundle.storage import clean_stale_temp_files
from engine.errors import ImageError, InputError, OutputError
from engine.image.files import check_output, list_images, read_photo, read_provenance, write_photo
from engine.image.photo import Photo, photo_from_array, resize

HISTORY = {"engine": "test", "settings": {"prompt": 'a "cup", Straße, 猫', "steps": 15}}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def ramp(width=13, height=7, channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def u8(pixels):
    return np.rint(pixels * 255).astype(np.uint8)


# -- reading --------------------------------------------------------------------------------------


def test_rgb_is_read_as_it_is(tmp_path):
    photo = read_photo(save(tmp_path / "a.png", Image.fromarray(ramp())))
    assert photo.rgb.dtype == np.float32
    assert np.array_equal(u8(photo.rgb), ramp())
    assert photo.alpha is None
    assert not photo.grey
    assert photo.size == (13, 7)


def test_grey_is_three_equal_channels(tmp_path):
    photo = read_photo(save(tmp_path / "a.png", Image.fromarray(ramp()[:, :, 0])))
    assert photo.grey
    assert np.array_equal(u8(photo.rgb), np.repeat(ramp()[:, :, :1], 3, axis=2))


def test_sixteen_bits_keep_their_precision(tmp_path):
    values = np.linspace(0, 65535, 91).astype(np.uint16).reshape(7, 13)
    photo = read_photo(save(tmp_path / "a.png", Image.fromarray(values)))
    assert photo.grey
    assert np.allclose(photo.rgb[:, :, 0] * 65535, values, atol=0.01)


def test_one_bit_is_black_and_white(tmp_path):
    photo = read_photo(save(tmp_path / "a.png", Image.fromarray(ramp()[:, :, 0] > 100)))
    assert photo.grey
    assert set(np.unique(photo.rgb)) == {0.0, 1.0}


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_kept_apart(tmp_path, mode):
    photo = read_photo(save(tmp_path / "a.png", Image.fromarray(ramp(channels=4)).convert(mode)))
    assert photo.alpha is not None
    assert np.array_equal(u8(photo.alpha), ramp(channels=4)[:, :, 3])
    assert photo.grey is (mode == "LA")


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(ramp()).quantize(16)
    image.info["transparency"] = 3
    path = save(tmp_path / "a.png", image, transparency=3)
    photo = read_photo(path)
    assert np.array_equal(u8(photo.rgb), np.asarray(image.convert("RGB")))
    assert photo.alpha is not None
    assert np.array_equal(photo.alpha == 0, np.asarray(image) == 3)


@pytest.mark.parametrize("sixteen", [False, True])
def test_a_transparent_grey_value(tmp_path, sixteen):
    values = ramp()[:, :, 0].astype(np.uint16 if sixteen else np.uint8)
    key = int(values[2, 3])
    path = save(tmp_path / "a.png", Image.fromarray(values), transparency=key)
    photo = read_photo(path)
    assert photo.alpha is not None
    assert np.array_equal(photo.alpha == 0, values == key)


def test_one_bit_with_a_transparent_value(tmp_path):
    values = ramp()[:, :, 0] > 100
    photo = read_photo(save(tmp_path / "a.png", Image.fromarray(values), transparency=255))
    assert np.array_equal(photo.alpha == 0, values)


def test_sixteen_bit_colours_with_a_transparent_one(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = np.array([[[0x1234, 0x5678, 0x9ABC], [0xFFFF, 0, 0]]], dtype=">u2")
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"tRNS", pixels[0, 0].tobytes())
        + chunk(b"IDAT", zlib.compress(b"\0" + pixels.tobytes()))
        + chunk(b"IEND", b"")
    )
    assert read_photo(tmp_path / "a.png").alpha.tolist() == [[0.0, 1.0]]


def test_a_print_image_goes_through_its_profile(tmp_path):
    """The profile says that ink 0 is black paper: without it the result is the opposite."""
    image = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    path = save(tmp_path / "a.tif", image, icc_profile=b"not a profile")
    with pytest.raises(ImageError, match="colour profile cannot be applied"):
        read_photo(path)


def test_lab_becomes_srgb(tmp_path):
    lab = Image.fromarray(np.full((8, 8, 3), (137, 0, 0), np.uint8), "LAB")  # L 53.6: middle grey
    photo = read_photo(save(tmp_path / "a.tif", lab))
    assert u8(photo.rgb)[4, 4].tolist() == pytest.approx([128, 128, 128], abs=3)


def test_xmp_of_a_png_is_read_whoever_wrote_it(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("XML:com.adobe.xmp", "<x:xmpmeta/>")
    path = save(tmp_path / "a.png", Image.fromarray(ramp()), pnginfo=info)
    assert read_photo(path).xmp == b"<x:xmpmeta/>"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".avif"])
def test_xmp_is_carried_into_every_format(tmp_path, suffix):
    write_photo(tmp_path / f"a{suffix}", Photo(ramp().astype(np.float32) / 255, xmp=b"<x:xmpmeta/>"), HISTORY)
    assert read_photo(tmp_path / f"a{suffix}").xmp == b"<x:xmpmeta/>"
    assert read_provenance(tmp_path / f"a{suffix}") == HISTORY


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_comment_is_carried(tmp_path, suffix):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Comment", "Grüße aus Wien")
    save(tmp_path / "in.png", Image.fromarray(ramp()), pnginfo=info)
    photo = read_photo(tmp_path / "in.png")
    assert photo.texts == (("Comment", "Grüße aus Wien"),)
    write_photo(tmp_path / f"out{suffix}", photo, HISTORY)
    assert read_photo(tmp_path / f"out{suffix}").texts == photo.texts


def test_the_recorded_size_follows_the_result(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] = 4000
    photo = Photo(ramp().astype(np.float32) / 255, exif=exif.tobytes())
    write_photo(tmp_path / "a.jpg", photo, HISTORY)
    written = Image.open(tmp_path / "a.jpg").getexif().get_ifd(ExifTags.IFD.Exif)
    assert written[ExifTags.Base.ExifImageWidth] == 13
    assert ExifTags.Base.ExifImageHeight not in written


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".avif"])
def test_alpha_comes_back_exactly(tmp_path, suffix):
    alpha = ramp(64, 64)[:, :, 0].astype(np.float32) / 255
    photo = Photo(ramp(64, 64).astype(np.float32) / 255, alpha=alpha)
    write_photo(tmp_path / f"a{suffix}", photo, HISTORY)
    assert np.array_equal(u8(read_photo(tmp_path / f"a{suffix}").alpha), u8(alpha))


def test_decoders_that_start_programs_are_not_used(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="is not an image"):
        read_photo(tmp_path / "a.png")


def test_a_long_name_is_written(tmp_path):
    path = tmp_path / ("x" * 251 + ".png")  # as long as names can be
    write_photo(path, Photo(ramp().astype(np.float32) / 255), HISTORY)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("values", [255.0, -1.0])
def test_arrays_of_another_scale_are_refused(values):
    with pytest.raises(ImageError, match=r"expected: +float32 in \[0, 1\]"):
        photo_from_array(np.full((4, 4, 3), values, np.float32))


def test_cmyk_becomes_srgb(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    photo = read_photo(save(tmp_path / "a.jpg", image, quality=100))
    assert u8(photo.rgb)[4, 4].tolist() == pytest.approx([255, 0, 0], abs=3)
    assert photo.icc_profile is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_forgotten(tmp_path, orientation):
    upright = Image.fromarray(ramp())
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert np.array_equal(u8(read_photo(save(tmp_path / "b.png", stored, exif=exif)).rgb), ramp())
    exif[ExifTags.Base.Make] = "Camera"
    photo = read_photo(save(tmp_path / "a.png", stored, exif=exif))
    assert np.array_equal(u8(photo.rgb), ramp())
    kept = Image.Exif()
    kept.load(photo.exif)
    assert kept[ExifTags.Base.Make] == "Camera"
    assert ExifTags.Base.Orientation not in kept


def truncated(path):
    data = io.BytesIO()
    Image.fromarray(ramp(200, 200)).save(data, "PNG")
    path.write_bytes(data.getvalue()[: len(data.getvalue()) // 2])


def bomb(path):
    """A PNG whose header promises 10^9 pixels."""
    data = io.BytesIO()
    Image.new("L", (1, 1)).save(data, "PNG")
    raw = bytearray(data.getvalue())
    raw[16:24] = (40_000).to_bytes(4, "big") + (25_000).to_bytes(4, "big")
    import zlib

    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    path.write_bytes(bytes(raw))


def no_pixels(path):
    path.write_bytes(
        b"GIF89a\x00\x00\x00\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff,\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00;"
    )


def animated(path):
    frames = [Image.new("L", (8, 8), level) for level in (0, 255)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b""), "is not an image"),
        (lambda path: path.write_text("hello"), "is not an image"),
        (truncated, "is truncated or damaged"),
        (bomb, "is too large"),
        (no_pixels, "no pixels|is not an image|damaged"),
        (animated, "holds several pictures"),
        (lambda path: Image.new("F", (4, 4)).save(path, "TIFF"), "values of unknown range"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, make, message):
    path = tmp_path / "photo.png"
    make(path)
    with pytest.raises(ImageError, match=rf"photo\.png: .*({message})"):
        read_photo(path, max_pixels=500_000_000)


def test_damaged_exif_costs_only_the_exif(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(ramp()), exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    photo = read_photo(path)
    assert np.array_equal(u8(photo.rgb), ramp())
    assert photo.exif is None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mangled_files_give_photos_or_image_errors(tmp_path_factory, data):
    file_format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF"]))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(ramp(40, 30)).save(buffer, file_format, exif=exif.tobytes(), icc_profile=SRGB)
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("mangled") / "a.img"
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        photo = read_photo(path)
    except ImageError:
        return
    assert np.isfinite(photo.rgb).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4), np.uint8), "wrong shape"),
        (np.zeros((0, 4, 3), np.uint8), "wrong shape"),
        (np.zeros((4, 4, 3), np.int32), "wrong dtype"),
        (np.full((4, 4, 3), np.nan, np.float32), "not finite"),
    ],
)
def test_arrays_that_are_no_photos(array, message):
    with pytest.raises(ImageError, match=message):
        photo_from_array(array)


# -- resizing -------------------------------------------------------------------------------------


def test_resizing_to_the_same_size_changes_nothing():
    pixels = ramp().astype(np.float32) / 255
    assert resize(pixels, (13, 7)) is pixels


@pytest.mark.parametrize("size", [(26, 14), (5, 3), (1, 1), (40, 2)])
def test_resizing_keeps_flat_areas_and_range(size):
    flat = np.full((7, 13, 3), 0.3, np.float32)
    assert np.allclose(resize(flat, size), 0.3, atol=1e-6)
    resized = resize(ramp().astype(np.float32) / 255, size)
    assert resized.shape == (size[1], size[0], 3)
    assert resized.min() >= 0.0
    assert resized.max() <= 1.0


def test_resizing_is_pillows_bicubic_without_its_rounding():
    values = 64 + ramp() // 2  # no overshoot, which Pillow clips after each of its two passes
    expected = np.asarray(Image.fromarray(values).resize((29, 17), Image.Resampling.BICUBIC), np.float32)
    difference = np.abs(resize(values.astype(np.float32) / 255, (29, 17)) * 255 - expected)
    assert difference.max() < 1.5
    assert np.abs(difference - difference.round()).max() > 0.1  # it did not round


# -- writing --------------------------------------------------------------------------------------


def photo_with_everything():
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2020:01:02 03:04:05"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    return Photo(
        rgb=ramp().astype(np.float32) / 255,
        icc_profile=SRGB,
        exif=exif.tobytes(),
        xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
        dpi=(300.0, 300.0),
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".avif"])
def test_metadata_survives_every_format(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    write_photo(path, photo_with_everything(), HISTORY)
    assert read_provenance(path) == HISTORY
    photo = read_photo(path)
    assert photo.icc_profile == SRGB
    exif = Image.Exif()
    exif.load(photo.exif)
    assert exif[ExifTags.Base.Make] == "Camera"
    assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] == "2020:01:02 03:04:05"
    assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
    if suffix != ".tif":  # Pillow writes XMP into every other format
        assert photo.xmp == photo_with_everything().xmp
    if suffix in (".png", ".jpg", ".tif"):
        assert photo.dpi == pytest.approx((300.0, 300.0), rel=1e-3)
    if suffix in (".png", ".tif"):
        assert np.array_equal(u8(photo.rgb), ramp())


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_alpha_is_written_as_it_was(tmp_path, suffix):
    alpha = ramp(channels=1)[:, :, 0].astype(np.float32) / 255
    photo = Photo(ramp().astype(np.float32) / 255, alpha)
    write_photo(tmp_path / f"out{suffix}", photo, HISTORY)
    again = read_photo(tmp_path / f"out{suffix}").alpha
    assert again is not None
    assert np.array_equal(u8(again), u8(alpha))


def test_grey_photos_stay_grey(tmp_path):
    photo = Photo(np.repeat(ramp(channels=1).astype(np.float32) / 255, 3, axis=2), grey=True)
    write_photo(tmp_path / "out.png", photo, HISTORY)
    assert Image.open(tmp_path / "out.png").mode == "L"
    assert read_photo(tmp_path / "out.png").grey


def test_layout_of_a_tiff_is_not_carried_into_the_result(tmp_path):
    path = save(tmp_path / "in.tif", Image.fromarray(ramp()), compression="tiff_lzw")
    write_photo(tmp_path / "out.tif", read_photo(path), HISTORY)
    assert np.array_equal(u8(read_photo(tmp_path / "out.tif").rgb), ramp())
    write_photo(tmp_path / "out.png", read_photo(path), HISTORY)
    assert set(Image.open(tmp_path / "out.png").getexif()) <= {ExifTags.IFD.Exif}


def test_a_result_has_the_permissions_of_any_file(tmp_path):
    write_photo(tmp_path / "out.png", photo_with_everything(), HISTORY)
    (tmp_path / "plain").touch()
    assert (tmp_path / "out.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("name", "photo", "message"),
    [
        ("out.bmp", None, "no format that is written"),
        ("out", None, "no format that is written"),
        ("there.png", None, "exists already"),
        ("missing/out.png", None, "no such folder"),
        ("there.png/out.png", None, "is no folder"),
        ("out.jpg", Photo(np.zeros((2, 2, 3), np.float32), np.zeros((2, 2), np.float32)), "transparency"),
    ],
)
def test_outputs_are_checked_before_the_work(tmp_path, name, photo, message):
    (tmp_path / "there.png").touch()
    with pytest.raises(OutputError, match=message):
        check_output(tmp_path / name, photo)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_photo(tmp_path / "out.png", photo_with_everything(), HISTORY)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_is_asked_for(tmp_path):
    path = tmp_path / "out.png"
    write_photo(path, photo_with_everything(), HISTORY)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        write_photo(path, photo_with_everything(), {})
    assert path.read_bytes() == before
    write_photo(path, photo_with_everything(), {"new": 1}, overwrite=True)
    assert read_provenance(path) == {"new": 1}
    assert os.listdir(tmp_path) == ["out.png"]


def test_history_too_long_for_jpeg_is_told(tmp_path):
    with pytest.raises(OutputError, match=r"(?s)cannot be stored as JPEG.*write a PNG"):
        write_photo(tmp_path / "out.jpg", photo_with_everything(), {"prompt": "x" * 70_000})
    write_photo(tmp_path / "out.png", photo_with_everything(), {"prompt": "x" * 70_000})


def test_a_picture_without_history_is_told(tmp_path):
    with pytest.raises(ImageError, match="holds no settings"):
        read_provenance(save(tmp_path / "a.png", Image.fromarray(ramp())))


def test_folders_list_their_images(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "c.png").mkdir()
    for folder in ("sub/deeper", ".trash"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "d.heic").touch()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.JPG"]
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path, recursive=True)]
    assert found == ["a.png", "b.JPG", "sub/deeper/d.heic"]


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir(mode=0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the folders above are closed to others
    root = os.geteuid() == 0
    if root:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(InputError, match="closed: cannot read the folder: no permission"):
            list_images(Path("."), recursive=True)
    finally:
        if root:
            os.seteuid(0)


def test_what_a_killed_writer_left_is_removed_but_not_what_is_being_written(tmp_path):
    old, new, other = (tmp_path / f".{letter * 32}.part" for letter in "abz")  # z is no hexadecimal digit
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (1, 1))
    clean_stale_temp_files(tmp_path)
    assert sorted(tmp_path.iterdir()) == [new, other]
