import io
import sys

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageFilter

from engine.errors import ImageError
from engine.image.decoding import decode_photo
from engine.image.files import read_photo

pillow_heif = pytest.importorskip("pillow_heif", reason="needs the heic extra")

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def heic(image, quality=-1, **options):
    pillow_heif.register_heif_opener()
    buffer = io.BytesIO()
    image.save(buffer, "HEIF", quality=quality, **options)  # -1: lossless, but for the conversion to YCbCr
    return buffer.getvalue()


@pytest.fixture
def picture(photo_path):
    # Smooth, since HEIC halves the resolution of colours.
    return Image.open(photo_path).convert("RGB").filter(ImageFilter.GaussianBlur(8)).resize((96, 64))


def test_a_phones_photo_is_read(picture, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Phone"
    (tmp_path / "a.heic").write_bytes(heic(picture, exif=exif.tobytes(), icc_profile=SRGB))
    photo = read_photo(tmp_path / "a.heic")
    assert photo.size == (96, 64)
    assert np.abs(photo.rgb * 255 - np.asarray(picture)).max() < 16
    assert photo.icc_profile == SRGB
    kept = Image.Exif()
    kept.load(photo.exif)
    assert kept[ExifTags.Base.Make] == "Phone"
    assert photo.bits == 8


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_it_stands_upright(picture, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}[orientation]
    photo = decode_photo(heic(picture, exif=exif.tobytes()))
    assert np.abs(photo.rgb * 255 - np.asarray(picture.transpose(turn))).max() < 16
    assert photo.exif is None or b"\x12\x01" not in photo.exif


def test_of_several_pictures_the_photo_is_read(picture):
    encoded = heic(picture, save_all=True, append_images=[Image.new("RGB", (32, 32), "red")])
    assert decode_photo(encoded).size == (96, 64)


def test_bits_that_are_left_out_are_told():
    deep = np.random.default_rng(0).integers(0, 65536, (64, 96, 3), dtype=np.uint16)
    buffer = io.BytesIO()
    pillow_heif.encode("RGB;16", (96, 64), deep.tobytes(), buffer, quality=-1)
    photo = decode_photo(buffer.getvalue())
    assert photo.warnings == ("its bits beyond 8 a channel were left out",)
    assert np.corrcoef(photo.rgb.ravel(), deep.ravel())[0, 1] > 0.5


def test_a_file_that_was_cut_is_told(picture):
    encoded = heic(picture)
    with pytest.raises(ImageError, match="damaged|is not an image"):
        decode_photo(encoded[: len(encoded) // 2])


def test_without_the_library_it_is_told_what_to_install(picture, monkeypatch, tmp_path):
    (tmp_path / "a.jpg").write_bytes(heic(picture))  # by what it is, not by its name
    monkeypatch.delitem(Image.OPEN, "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"(?s)a\.jpg: is a HEIC photo.*pip install pillow-heif"):
        read_photo(tmp_path / "a.jpg")


def test_an_avif_is_not_taken_for_one(picture, monkeypatch):
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    buffer = io.BytesIO()
    picture.save(buffer, "AVIF")
    for brand in (b"avif", b"mif1"):
        assert decode_photo(buffer.getvalue().replace(b"ftypavif", b"ftyp" + brand)).size == (96, 64)
