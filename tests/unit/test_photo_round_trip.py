"""Whatever a photo is, its file says: written and read again, pixels are within half a step and metadata is equal."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_files import exif, gradient, long, short
from PIL import Image, ImageCms

from engine.image.decoding import decode_photo
from engine.image.encoding import check_format, encode_photo
from engine.image.formats import output_format
from engine.image.metadata import PROVENANCE_TAG
from engine.image.photo import Photo, lying
from engine.image.pillow_images import upright
from engine.image.tags import EXIF, read_exif

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
LOSSLESS = (".png", ".tif")
#: TIFF's own, which no EXIF of a photo holds.
RESOLUTION = (282, 283, 296)


@st.composite
def photos(draw):
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    bits, grey = draw(st.sampled_from([8, 16])), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    top = 2**bits - 1
    pixels = rng.integers(0, top + 1, (height, width, 1 if grey else 3)).astype(np.float32) / np.float32(top)
    alpha = rng.integers(0, top + 1, (height, width)).astype(np.float32) / np.float32(top)
    text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)
    entries = draw(
        st.dictionaries(
            st.sampled_from([270, 271, 272, 305, 315, 33432, 40094]),
            st.tuples(st.sampled_from([2, 7, 1]), st.binary(min_size=1, max_size=40)),
            max_size=4,
        )
    )
    details = draw(
        st.dictionaries(st.sampled_from([36867, 37500, 37510, 42036]), st.binary(min_size=5, max_size=300), max_size=3)
    )
    block = exif(
        [(code, kind, len(value), value) for code, (kind, value) in entries.items()],
        [(code, 7, len(value), value) for code, value in details.items()] or [(33434, 5, 1, long(1, 60))],
    )
    return Photo(
        np.repeat(pixels, 3, axis=2) if grey else pixels,
        alpha if draw(st.booleans()) else None,
        grey=grey,
        bits=bits,
        icc_profile=draw(st.sampled_from([None, SRGB, LAB, bytes(70_000)])),
        exif=draw(st.sampled_from([None, block[6:]])),
        xmp=draw(st.sampled_from([None, b"<x:xmpmeta/>", "<x>Łódź</x>".encode()])),
        iptc=draw(st.sampled_from([None, b"\x1c\x02\x78\0\4Oma!", b"\x1c\x02\x78\0\5Odd.."])),
        dpi=draw(st.sampled_from([None, (72.0, 72.0), (300.0, 600.0)])),
        texts=tuple(draw(st.dictionaries(st.sampled_from(["Comment", "Title", "parameters"]), text)).items()),
        cicp=draw(st.sampled_from([None, bytes([9, 16, 0, 1]), bytes([12, 13, 0, 1])])),
    )


def tags_of(block):
    """Return all tags of an EXIF block but those that the engine itself writes."""
    if block is None:
        return {}
    main = read_exif(block)
    found = {(0, code): (tag.kind, tag.data) for code, tag in main.tags.items() if code not in RESOLUTION}
    for parent, child in main.children.items():
        found |= {(parent, code): (tag.kind, tag.data) for code, tag in child.tags.items() if code != PROVENANCE_TAG}
    return {key: value for key, value in found.items() if key[0] != 0 or key[1] != EXIF}


@settings(max_examples=150, deadline=None)
@given(photo=photos(), suffix=st.sampled_from([".png", ".jpg", ".webp", ".tif", ".avif"]))
def test_a_photo_is_what_its_file_says(photo, suffix):
    file_format = output_format(suffix, "test")
    if not file_format.alpha:
        photo = Photo(**{**vars(photo), "alpha": None})
    left = check_format(photo, suffix)
    again = decode_photo(encode_photo(photo, suffix, {"steps": 3}))
    assert again.size == photo.size
    assert (again.alpha is None) == (photo.alpha is None)
    if suffix in LOSSLESS:
        assert (again.bits, again.grey) == (photo.bits, photo.grey)
        half = 0.5 / (2**photo.bits - 1)
        assert np.abs(again.rgb - photo.rgb).max() <= half
        assert photo.alpha is None or np.abs(again.alpha - photo.alpha).max() <= half
    assert tags_of(again.exif) == tags_of(photo.exif)
    assert again.xmp == photo.xmp
    for block, held in (("iptc", again.iptc == photo.iptc), ("texts", dict(again.texts) == dict(photo.texts))):
        told = {"iptc": "IPTC", "texts": "texts"}[block]
        if file_format.limit(block) == 0:
            assert getattr(photo, block) in (None, ()) or any(told in each for each in left)
        elif block == "texts" and suffix == ".jpg":  # which has no keywords
            assert [text for _, text in again.texts] == [text for _, text in photo.texts]
        else:
            assert held
    if photo.icc_profile is not None:
        assert again.icc_profile == photo.icc_profile
    assert again.dpi == (None if photo.dpi is None else pytest.approx(photo.dpi, rel=1e-3))
    if suffix == ".png":
        assert again.cicp == photo.cicp
        assert not left


@settings(max_examples=60, deadline=None)
@given(
    orientation=st.integers(1, 8),
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "AVIF"]),
    mode=st.sampled_from(["L", "RGB", "RGBA"]),
    size=st.tuples(st.integers(8, 40), st.integers(8, 40)),
)
def test_every_orientation_of_every_format(orientation, kind, mode, size):
    """A file turned by Pillow's orientation is the upright one, exactly as the format's decoder gives its pixels."""
    mode = "RGB" if kind == "JPEG" and mode == "RGBA" else mode
    image = Image.fromarray(gradient(*size)).convert(mode)
    plain, turned = io.BytesIO(), io.BytesIO()
    image.save(plain, kind)
    image.save(turned, kind, exif=exif([(0x112, 3, 1, short(orientation)), (271, 2, 4, b"Cam\0")]))
    first, second = decode_photo(plain.getvalue()), decode_photo(turned.getvalue())
    assert np.array_equal(lying(second.rgb, orientation), first.rgb)
    assert np.array_equal(upright(first, orientation).rgb, second.rgb)
    assert second.alpha is None or np.array_equal(lying(second.alpha, orientation), first.alpha)
    assert 0x112 not in read_exif(second.exif).tags


def test_jpegs_and_webps_have_pillows_pixels(photo_path):
    """Both libraries decode by libjpeg-turbo and libwebp: results of 8-bit photos do not depend on who reads them."""
    image = Image.open(photo_path).convert("RGB")
    for options in (
        {"format": "JPEG", "subsampling": 2},
        {"format": "JPEG", "subsampling": 0, "progressive": True},
        {"format": "WEBP", "quality": 80},
        {"format": "PNG"},
    ):
        file = io.BytesIO()
        image.save(file, **options)
        expected = np.asarray(Image.open(file).convert("RGB"), np.float32) / np.float32(255)
        assert np.array_equal(decode_photo(file.getvalue()).rgb, expected)
