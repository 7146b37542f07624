"""Metadata of files of the kinds that users of such programs have reported, and what a format cannot hold.

Docstrings say where a kind was reported.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from odd_files import (
    chunk,
    exif,
    gradient,
    jpeg,
    long,
    png,
    png_kinds,
    segment,
    short,
    tiff,
    tiff_of,
    with_segments,
)
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import IFDRational

from engine.errors import ImageError, OutputError
from engine.image.decoding import decode_photo
from engine.image.encoding import check_format, encode_photo
from engine.image.metadata import PROVENANCE_TAG
from engine.image.tags import EXIF, read_exif

tifffile = pytest.importorskip("tifffile", reason="needs the test extra")

FORMATS = (".png", ".jpg", ".webp", ".tif", ".avif")


def through(data, suffix, provenance=None):
    """Return what a result's file holds of a photo's file."""
    return decode_photo(encode_photo(decode_photo(data), suffix, provenance or {}))


# -- metadata -----------------------------------------------------------------------------------------

TEXTS = {
    270: "Großmutter, Łódź".encode() + b"\0",
    315: "写真家".encode() + b"\0",
    33432: "© 2020".encode() + b"\0",
}
DETAILS = {
    37510: (7, b"UNICODE\0" + "Ünï".encode("utf-16-be")),
    42036: (2, "Zoë 50mm".encode() + b"\0"),
    37500: (7, b"Maker\0\1\2\3" * 9),
    33434: (5, long(1, 60)),
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_exif_survives_byte_for_byte(suffix):
    """Pillow#7120, #5254."""
    block = exif(
        [(code, 2, len(text), text) for code, text in TEXTS.items()],
        [(code, kind, len(value) // {5: 8}.get(kind, 1), value) for code, (kind, value) in DETAILS.items()],
    )
    photo = decode_photo(with_segments(jpeg(gradient()), segment(0xE1, block)))
    written = read_exif(decode_photo(encode_photo(photo, suffix, {"a": 1})).exif)
    assert {code: written.raw(code) for code in TEXTS} == TEXTS
    details = written.children[EXIF]
    assert {code: (details.tags[code].kind, details.raw(code)) for code in DETAILS} == DETAILS
    assert details.raw(PROVENANCE_TAG) == b'{"a": 1}\0'


def test_a_makers_note_stays_where_it_was():
    """Makers count offsets from the block's start."""
    note = b"Nikon\0" + bytes(range(256))
    block = exif([(271, 2, 6, b"Maker\0")], [(37500, 7, len(note), note)])[6:]
    photo = decode_photo(with_segments(jpeg(gradient()), segment(0xE1, b"Exif\0\0" + block)))
    encoded = encode_photo(photo, ".jpg", {"a": "b" * 500})
    written = encoded[encoded.index(b"Exif\0\0") + 6 :]
    assert written.index(note) == block.index(note)


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_of_either_order_goes_into_a_tiff(order):
    image = Image.fromarray(gradient())
    tags = image.getexif()
    tags.endian = order
    tags[271] = "Camera"
    tags.get_ifd(EXIF)[33434] = IFDRational(1, 60)
    tags.get_ifd(0x8825)[2] = (52.0, 31.0, 0.0)
    again = through(jpeg(gradient(), exif=tags.tobytes()), ".tif")
    kept = Image.Exif()
    kept.load(again.exif)
    assert kept[271] == "Camera"
    assert kept.get_ifd(EXIF)[33434] == pytest.approx(1 / 60)
    assert kept.get_ifd(0x8825)[2] == (52.0, 31.0, 0.0)


@pytest.mark.parametrize(
    "bad",
    [
        (0x11A, 10, 1, struct.pack("<ll", -5, 3)),  # a resolution below 0, of the wrong type
        (0x10F, 99, 4, b"abcd"),  # a type that does not exist
        (0x10F, 2, 1 << 30, long(4)),  # a value outside of the block
        (0x8825, 4, 1, long(1 << 20)),  # a directory outside of it
    ],
)
def test_one_odd_tag_costs_that_tag(bad):
    """Pillow#8965, #4037, #3973: and not the orientation."""
    block = exif([(0x112, 3, 1, short(6)), (0x13B, 2, 5, b"Jane\0"), bad])
    photo = decode_photo(with_segments(jpeg(gradient()), segment(0xE1, block)))
    assert photo.size == (32, 48)
    assert read_exif(photo.exif).raw(0x13B) == b"Jane\0"
    assert photo.dpi is None


@pytest.mark.parametrize("big", [False, True])
def test_a_bigtiffs_exif_is_a_tiffs(big):
    """exif-py#210."""
    tags = [(315, 2, 0, "Jane Doe", True), (33432, 2, 0, "(c) 2020", True)]
    photo = decode_photo(tiff_of(gradient(), photometric="rgb", bigtiff=big, extratags=tags))
    for suffix in FORMATS:
        kept = read_exif(decode_photo(encode_photo(photo, suffix, {})).exif)
        assert (kept.raw(315), kept.raw(33432)) == (b"Jane Doe\0", b"(c) 2020\0")


def iptc_jpeg():
    records = (
        b"\x1c\x02\x78"
        + struct.pack(">H", 12)
        + b"Grandma 1951"
        + b"\x1c\x02\x74"
        + struct.pack(">H", 9)
        + b"(c) 1951."
    )
    resources = b"8BIM\x04\x0c\0\0" + struct.pack(">L", 4) + b"\1\2\3\4"  # a thumbnail
    resources += b"8BIM\x04\x04\0\0" + struct.pack(">L", len(records)) + records + b"\0" * (len(records) % 2)
    return with_segments(jpeg(gradient()), segment(0xED, b"Photoshop 3.0\0" + resources)), records


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_captions_are_kept(suffix):
    """upscayl#1307, ImageProcessor#669."""
    data, records = iptc_jpeg()
    assert through(data, suffix).iptc == records
    assert not check_format(decode_photo(data), suffix)


@pytest.mark.parametrize("suffix", [".webp", ".avif"])
def test_captions_without_a_place_are_told_before_the_work(suffix):
    assert any("IPTC" in left for left in check_format(decode_photo(iptc_jpeg()[0]), suffix))


@pytest.mark.parametrize("comment", ["Zürich".encode("latin-1"), "Łódź, 写真".encode(), b"\xff\xfe\0"])
def test_a_comment_stays_byte_for_byte(comment):
    data = with_segments(jpeg(gradient()), segment(0xFE, comment))
    encoded = encode_photo(decode_photo(data), ".jpg", {})
    assert segment(0xFE, comment) in encoded
    if comment.startswith(b"Z"):
        assert Image.open(io.BytesIO(encode_photo(decode_photo(data), ".png", {}))).text["Comment"] == "Zürich"


XMP = (
    b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:GCamera="http://ns.google.com/photos/1.0/camera/" '
    b'xmlns:Container="http://ns.google.com/photos/1.0/container/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/"%s dc:format="image/jpeg">%s'
    b"<dc:title>Oma &gt; \xc5\x81\xc3\xb3d\xc5\xba</dc:title></rdf:Description></rdf:RDF></x:xmpmeta>"
    b'    <?xpacket end="w"?>'
)


def test_xmp_of_videos_and_gain_maps_is_left_out_and_the_rest_stays():
    """MotionPhoto2#2, aves#1269."""
    stale = b' GCamera:MotionPhoto="1" GCamera:MicroVideoOffset=\'2000\' hdrgm:Version="1.0" tiff:Orientation="6"'
    inner = b"<Container:Directory><rdf:Seq><rdf:li>a &gt; b</rdf:li></rdf:Seq></Container:Directory>"
    start = b"http://ns.adobe.com/xap/1.0/\0"
    data = with_segments(jpeg(gradient()), segment(0xE1, start + XMP % (stale, inner)))
    photo = decode_photo(data + b"\0\0\0\x18ftypmp42" + bytes(1988))
    assert photo.xmp == XMP % (b"", b"")
    assert "MotionPhoto" in photo.warnings[0]
    for suffix in FORMATS:
        encoded = encode_photo(photo, suffix, {})
        assert decode_photo(encoded).xmp == photo.xmp
        assert b"ftypmp42" not in encoded


@pytest.mark.parametrize("packet", [b"<x:xmpmeta/>", b"no XML at all \xff", XMP % (b"", b"")])
def test_other_xmp_stays_byte_for_byte(packet):
    data = with_segments(jpeg(gradient()), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet))
    assert through(data, ".jpg").xmp == through(data, ".tif").xmp == packet


def test_layers_and_dng_tags_are_left_out():
    """Pillow#6932, psdtags#3, #13."""
    block = b"Adobe Photoshop Document Data Block\0" + b"MIB8ryaL" + bytes(120_000)
    tags = [(37724, 7, len(block), block, True), (50706, 1, 4, (1, 4, 0, 0), True), (315, 2, 0, "Jane", True)]
    photo = decode_photo(tiff_of(gradient(), photometric="rgb", extratags=tags))
    assert "layers" in photo.warnings[0]
    for suffix in FORMATS:
        kept = read_exif(decode_photo(encode_photo(photo, suffix, {})).exif).tags
        assert 315 in kept
        assert not {37724, 50706} & set(kept)


def test_thumbnails_are_left_out():
    thumbnail = b"\xff\xd8THUMBNAIL\xff\xd9"
    block = exif([(271, 2, 6, b"Maker\0")])
    block = block[: 6 + 8 + 2 + 12] + long(len(block) - 6) + block[6 + 8 + 2 + 12 + 4 :]
    block += directory_of_thumbnail(len(block) - 6, thumbnail)
    data = with_segments(jpeg(gradient()), segment(0xE1, block))
    assert b"THUMBNAIL" in data
    assert b"THUMBNAIL" not in encode_photo(decode_photo(data), ".jpg", {})


def directory_of_thumbnail(offset, data):
    from odd_files import directory

    place = offset + len(directory([(513, 4, 1, long(0)), (514, 4, 1, long(0))], 0))
    return directory([(513, 4, 1, long(place)), (514, 4, 1, long(len(data)))], offset) + data


# -- resolution -----------------------------------------------------------------------------------------


def resolution(*values, kind=5):
    entries = [(282, kind, 1, values[0]), (283, kind, 1, values[0]), (296, 3, 1, short(2))]
    return tiff(gradient().tobytes(), (8, 8, 8), 2, 3, entries if values[0] is not None else [])


@pytest.mark.parametrize("value", [long(0, 0), long(300, 0), long(0, 1), long(2**32 - 1, 1), None])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_a_resolution_of_nonsense_is_dropped_and_absence_stays(value, suffix):
    """pillow-simd#100, Pillow#8605, #2077."""
    photo = decode_photo(resolution(value))
    assert photo.dpi is None
    encoded = encode_photo(photo, suffix, {})
    assert decode_photo(encoded).dpi is None
    info = Image.open(io.BytesIO(encoded)).info
    if suffix in (".png", ".webp"):
        assert "dpi" not in info
    elif suffix == ".jpg":
        assert info["jfif_unit"] == 0
    else:
        assert 282 not in Image.open(io.BytesIO(encoded)).tag_v2


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_resolution_is_kept(suffix):
    assert through(resolution(long(600, 2)), suffix).dpi == pytest.approx((300, 300), rel=1e-3)


# -- colours that are stated without a profile ----------------------------------------------------------


def test_code_points_of_a_png_are_kept_or_told():
    """ImageMagick#7797, #7715, imgproxy#1674, pillow_heif#365."""
    data = png(gradient().astype(np.uint16) * 257, [(b"cICP", bytes([9, 16, 0, 1]))], 16)
    photo = decode_photo(data)
    encoded = encode_photo(photo, ".png", {})
    assert b"cICP" + bytes([9, 16, 0, 1]) in encoded
    assert png_kinds(encoded)[:2] == ["IHDR", "cICP"]
    for suffix in (".jpg", ".tif"):
        assert any("BT.2020, PQ" in left for left in check_format(photo, suffix))


def converted(profile, colour):
    """Return a colour of a profile in sRGB, by lcms."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    image = Image.new("RGB", (1, 1), colour)
    return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB")).getpixel((0, 0))


def test_code_points_of_other_curves_become_a_profile():
    photo = decode_photo(png(gradient(), [(b"cICP", bytes([12, 13, 0, 1]))]))  # Display P3
    assert not check_format(photo, ".jpg")
    profile = decode_photo(encode_photo(photo, ".jpg", {})).icc_profile
    assert converted(profile, (128, 128, 128)) == pytest.approx((128, 128, 128), abs=1)
    assert converted(profile, (200, 100, 100)) == pytest.approx((213, 93, 97), abs=2)  # by CSS Color 4's matrices


def test_gamma_and_primaries_become_a_profile():
    linear = decode_photo(png(gradient(), [(b"gAMA", struct.pack(">L", 100_000))])).icc_profile
    assert converted(linear, (55, 55, 55)) == pytest.approx((128, 128, 128), abs=1)
    xy = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
    chroma = (b"cHRM", struct.pack(">8L", *(round(value * 100_000) for value in xy)))
    wide = decode_photo(png(gradient(), [chroma])).icc_profile
    assert converted(wide, (200, 100, 100)) == pytest.approx((213, 93, 97), abs=2)


def test_a_greys_gamma_becomes_a_profile_of_grey():
    photo = decode_photo(png(gradient()[:, :, 0], [(b"gAMA", struct.pack(">L", 100_000))]))
    source = ImageCms.ImageCmsProfile(io.BytesIO(photo.icc_profile))
    assert source.profile.xcolor_space == "GRAY"
    target = ImageCms.createProfile("sRGB")
    middle = ImageCms.profileToProfile(Image.new("L", (1, 1), 55), source, target, outputMode="RGB")
    assert middle.getpixel((0, 0)) == pytest.approx((128, 128, 128), abs=1)


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"gAMA", struct.pack(">L", 45455))],
        [(b"sRGB", b"\0"), (b"gAMA", struct.pack(">L", 100_000))],
        [(b"cICP", bytes([1, 13, 0, 1]))],
        [(b"gAMA", struct.pack(">L", 0))],
        [(b"cHRM", bytes(32))],
    ],
)
def test_srgb_needs_no_profile_and_nonsense_gives_none(chunks):
    photo = decode_photo(png(gradient(), chunks))
    assert photo.icc_profile is None
    assert photo.cicp is None


def test_code_points_of_an_avif_are_kept():
    file = io.BytesIO()
    Image.fromarray(gradient()).save(file, "AVIF", quality=95)
    data = file.getvalue()
    place = data.index(b"colrnclx") + 8
    p3 = data[:place] + struct.pack(">HH", 12, 13) + data[place + 4 :]
    assert decode_photo(data).cicp is None
    assert decode_photo(p3).cicp == bytes([12, 13, 0, 1])
    assert decode_photo(encode_photo(decode_photo(p3), ".jpg", {})).icc_profile is not None


# -- what a format cannot hold ---------------------------------------------------------------------------


def test_what_a_jpeg_cannot_hold_is_told_before_the_work_and_left_out():
    """waifu2x-converter-cpp#149, Pillow#6932, #8286."""
    photo = decode_photo(png(gradient(), [(b"tEXt", b"workflow\0" + b"x" * 100_000), (b"tEXt", b"Title\0Oma")]))
    (left,) = check_format(photo, ".jpg")
    assert "'workflow'" in left
    assert decode_photo(encode_photo(photo, ".jpg", {})).texts == (("Comment", "Oma"),)
    assert decode_photo(encode_photo(photo, ".png", {})).texts == photo.texts


def test_exif_over_64_kilobytes_loses_the_makers_note_first():
    note = (37500, 7, 63_000, bytes(63_000))
    block = exif([(315, 2, 5, b"Jane\0")], [note])
    photo = decode_photo(png(gradient(), [(b"eXIf", block[6:])]))
    (left,) = check_format(photo, ".jpg")
    assert "EXIF" in left
    kept = read_exif(decode_photo(encode_photo(photo, ".jpg", {"a": "b" * 3000})).exif)
    assert kept.raw(315) == b"Jane\0"
    assert 37500 not in kept.children[EXIF].tags


@pytest.mark.parametrize(("suffix", "size"), [(".webp", (16_384, 10)), (".jpg", (10, 65_536)), (".avif", (40_000, 10))])
def test_sides_that_a_format_cannot_hold_are_refused_before_the_work(suffix, size):
    """Pillow#8321."""
    photo = decode_photo(png(gradient()))
    with pytest.raises(OutputError, match=r"(?s)is too large for.*write a PNG or TIFF"):
        check_format(photo, suffix, size=size)
    assert check_format(photo, ".png", size=size) == ()


# -- large -------------------------------------------------------------------------------------------


def test_large_texts_and_profiles_of_a_png_are_read():
    """Pillow#8363, #2445, ComfyUI#3316."""
    text = b'{"nodes":[' + b",".join(b'{"id":%d}' % number for number in range(120_000)) + b"]}"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().ljust(3_000_000, b"\0")
    extra = [(b"iCCP", b"icc\0\0" + zlib.compress(profile)), (b"zTXt", b"workflow\0\0" + zlib.compress(text, 9))]
    photo = decode_photo(png(gradient(), extra))
    assert photo.texts == (("workflow", text.decode()),)
    assert photo.icc_profile == profile
    assert through(png(gradient(), extra), ".png").texts == photo.texts


def test_a_bomb_of_text_costs_the_text():
    bomb = zlib.compress(bytes(1 << 27), 9)
    photo = decode_photo(png(gradient(), [(b"zTXt", b"a\0\0" + bomb)]))
    assert photo.texts == ()
    assert "zTXt" in photo.warnings[0]


def test_a_files_pixels_are_limited_by_what_the_caller_says_and_nothing_else():
    """realesrgan-gui#34, video2x#473, upscayl#466: Pillow's constant is 179 million."""
    head = png(gradient())
    size = (16_320, 12_240)
    data = head[:8] + chunk(b"IHDR", struct.pack(">LL", *size) + head[24:29]) + head[33:]
    with pytest.raises(ImageError, match=r"(?s)is too large.*up to 100 million pixels.*16320 × 12240"):
        decode_photo(data, max_pixels=100_000_000)


def test_a_result_of_any_size_says_how_it_was_made(tmp_path):
    from engine.image.files import read_provenance

    for suffix in FORMATS:
        data = encode_photo(decode_photo(png(gradient())), suffix, {"steps": 1})
        if suffix == ".png":
            data = data[:8] + chunk(b"IHDR", struct.pack(">LL", 163_200, 122_400) + data[24:29]) + data[33:]
        (tmp_path / f"result{suffix}").write_bytes(data)
        assert read_provenance(tmp_path / f"result{suffix}") == {"steps": 1}


def test_a_tiff_over_four_gigabytes_is_a_bigtiff(monkeypatch):
    """With the limit set to nothing: the same file, small."""
    from engine.image import codec

    monkeypatch.setattr(codec, "_CLASSIC_TIFF_BYTES", 0)
    photo = decode_photo(iptc_jpeg()[0])
    data = encode_photo(photo, ".tif", {"steps": 1})
    assert data[:4] == b"II+\0"
    assert np.array_equal(tifffile.imread(io.BytesIO(data)), np.rint(photo.rgb * 255))
    again = decode_photo(data)
    assert again.iptc == photo.iptc
    assert read_exif(again.exif).children[EXIF].raw(PROVENANCE_TAG) == b'{"steps": 1}\0'
