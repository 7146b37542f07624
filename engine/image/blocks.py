"""The metadata in image files, block by block: read from JPEG, PNG and WebP, and put into them.

libvips decodes and encodes the pixels. It would write blocks too, but not as they were (see `engine.image.tags`), so
files are encoded without any and each block is put in whole.
"""

from __future__ import annotations

import binascii
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

#: Bytes that a PNG's texts may come to, all together: more is an attack.
_MAX_TEXT = 1 << 26
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_XMP_KEYWORD = "XML:com.adobe.xmp"
#: How ImageMagick and exiftool store what PNG has no chunk for.
_PROFILE = "Raw profile type "
_EXIF_START, _XMP_START = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_LONG_XMP_START, _ICC_START = b"http://ns.adobe.com/xmp/extension/\0", b"ICC_PROFILE\0"
_PHOTOSHOP_START = b"Photoshop 3.0\0"
_ICC_PART = 65_519
_METRE = 0.0254


@dataclass
class Blocks:
    """What stands beside a file's pixels.

    Attributes:
        exif, xmp, icc: as stored.
        iptc: the records alone, as IPTC's IIM has them.
        texts: by keyword. Bytes of a comment that are not UTF-8 are kept as surrogates, as in names of files.
        dpi: dots per inch, across and down.
        cicp: a code each for primaries, transfer function and matrix, and 1 for full range (ITU-T H.273).
        gamma, chroma: a PNG's exponent, and x, y of its white, red, green and blue.
        pictures: how many there are to see.
        left: what describes the stored file alone and is not carried, a few words each.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    icc: bytes | None = None
    iptc: bytes | None = None
    texts: tuple[tuple[str, str], ...] = ()
    dpi: tuple[float, float] | None = None
    cicp: bytes | None = None
    gamma: float | None = None
    chroma: tuple[float, ...] | None = None
    pictures: int = 1
    left: tuple[str, ...] = ()


# -- JPEG -----------------------------------------------------------------------------------------


def read_jpeg(data: bytes | mmap) -> Blocks:
    """Return what stands before the pixels of a JPEG; a damaged segment ends it."""
    found = Blocks()
    icc: dict[int, bytes] = {}
    photoshop, left, comments = b"", [], []
    for marker, body in _segments(data):
        if marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 12:
            unit, across, down = struct.unpack_from(">BHH", body, 7)
            if unit in (1, 2):
                found.dpi = (across, down) if unit == 1 else (across * 2.54, down * 2.54)
        elif marker == 0xE1 and body.startswith(_EXIF_START):
            found.exif = found.exif or bytes(body[len(_EXIF_START) :])
        elif marker == 0xE1 and body.startswith(_XMP_START):
            found.xmp = found.xmp or bytes(body[len(_XMP_START) :])
        elif marker == 0xE1 and body.startswith(_LONG_XMP_START):
            left.append("the part of its XMP beyond 64 kB")
        elif marker == 0xE2 and body.startswith(_ICC_START) and len(body) > 14:
            icc.setdefault(body[12], bytes(body[14:]))
        elif marker == 0xE2 and body.startswith(b"MPF\0"):
            left.append("the pictures behind the first one")
        elif marker == 0xED and body.startswith(_PHOTOSHOP_START):
            photoshop += bytes(body[len(_PHOTOSHOP_START) :])
        elif marker == 0xFE and body:
            comments.append(("Comment", body.decode("utf-8", "surrogateescape")))
    found.icc = b"".join(icc[number] for number in sorted(icc)) or None
    found.iptc, found.texts, found.left = iptc_of(photoshop), tuple(comments), tuple(dict.fromkeys(left))
    return found


def write_jpeg(data: bytes, blocks: Blocks) -> bytes:
    """Return a JPEG with blocks, each of which must fit (see `engine.image.formats`)."""
    across, down = (min(65_535, max(1, round(dots))) for dots in blocks.dpi or (1, 1))
    parts = [b"\xff\xd8", _segment(0xE0, b"JFIF\0\1\1" + struct.pack(">BHH", bool(blocks.dpi), across, down) + b"\0\0")]
    if blocks.exif:
        parts.append(_segment(0xE1, _EXIF_START + blocks.exif))
    if blocks.xmp:
        parts.append(_segment(0xE1, _XMP_START + blocks.xmp))
    if blocks.iptc:
        parts.append(_segment(0xED, _PHOTOSHOP_START + _photoshop(blocks.iptc)))
    if blocks.icc:
        pieces = [blocks.icc[at : at + _ICC_PART] for at in range(0, len(blocks.icc), _ICC_PART)]
        parts += [
            _segment(0xE2, _ICC_START + bytes([number, len(pieces)]) + piece) for number, piece in enumerate(pieces, 1)
        ]
    parts += [_segment(0xFE, text_bytes(text)) for _, text in blocks.texts]
    return b"".join([*parts, data[2:]])


def _segments(data: bytes | mmap) -> Iterator[tuple[int, bytes]]:
    """Yield marker and content of each segment up to the pixels."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # may be repeated
            place += 1
            continue
        if marker in (0xDA, 0xD9):
            return
        if marker == 1 or 0xD0 <= marker <= 0xD7:  # stand alone
            place += 2
            continue
        (length,) = struct.unpack_from(">H", data, place + 2)
        if length < 2:
            return
        yield marker, bytes(data[place + 4 : place + 2 + length])
        place += 2 + length


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def text_bytes(text: str) -> bytes:
    """Return a text as the bytes that it came from, or UTF-8."""
    return text.encode("utf-8", "surrogateescape")


# -- Photoshop's resources, of which only IPTC is about the picture -------------------------------------


def iptc_of(resources: bytes) -> bytes | None:
    """Return the IPTC records of Photoshop's image resources, None if there are none."""
    place = 0
    while place + 12 <= len(resources) and resources[place : place + 4] == b"8BIM":
        (number,) = struct.unpack_from(">H", resources, place + 4)
        name = resources[place + 6] + 1
        place += 6 + name + name % 2
        if place + 4 > len(resources):
            return None
        (size,) = struct.unpack_from(">I", resources, place)
        if number == 0x0404:
            return resources[place + 4 : place + 4 + size] or None
        place += 4 + size + size % 2
    return None


def _photoshop(iptc: bytes) -> bytes:
    return b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc + bytes(len(iptc) % 2)


# -- PNG ------------------------------------------------------------------------------------------


def read_png(data: bytes | mmap) -> Blocks:
    """Return the metadata of a PNG's chunks; a damaged chunk is left out."""
    found = Blocks()
    texts: list[tuple[str, str]] = []
    budget, srgb, left = _MAX_TEXT, False, []
    for kind, body in _chunks(data):
        if kind == b"eXIf":
            found.exif = body
        elif kind == b"cICP" and len(body) == 4:
            found.cicp = body
        elif kind == b"sRGB":
            srgb = True
        elif kind == b"gAMA" and len(body) == 4:
            found.gamma = int.from_bytes(body, "big") / 100_000
        elif kind == b"cHRM" and len(body) == 32:
            found.chroma = tuple(value / 100_000 for value in struct.unpack(">8I", body))
        elif kind == b"pHYs" and len(body) == 9:
            across, down, unit = struct.unpack(">IIB", body)
            found.dpi = (across * _METRE, down * _METRE) if unit == 1 else None
        elif kind == b"acTL" and len(body) == 8:
            found.pictures = int.from_bytes(body[:4], "big")
        elif kind in (b"iCCP", b"tEXt", b"zTXt", b"iTXt"):
            try:
                keyword, value = _png_text(kind, body, budget)
            except (ValueError, zlib.error, IndexError):
                left.append(f"a damaged or huge {kind.decode()} chunk")
                continue
            budget -= len(value)
            if kind == b"iCCP":
                found.icc = value
            elif keyword == _XMP_KEYWORD:
                found.xmp = value
            elif keyword.startswith(_PROFILE) and (profile := _unwrapped(value)) is not None:
                name = keyword.removeprefix(_PROFILE)
                if name in ("exif", "APP1") and not profile.startswith(_XMP_START):
                    found.exif = found.exif or profile
                elif name in ("xmp", "APP1"):
                    found.xmp = found.xmp or profile.removeprefix(_XMP_START)
                elif name == "iptc":
                    found.iptc = iptc_of(profile) or profile
                elif name in ("icc", "icm"):
                    found.icc = found.icc or profile
            else:
                encoding = "latin-1" if kind != b"iTXt" else "utf-8"
                texts.append((keyword, value.decode(encoding, "replace")))
    if srgb:  # which overrides them
        found.gamma = found.chroma = None
    found.texts, found.left = tuple(texts), tuple(dict.fromkeys(left))
    return found


def write_png(data: bytes, blocks: Blocks) -> bytes:
    """Return a PNG with blocks in place of all that it has beside its pixels."""
    about = []
    if blocks.cicp:
        about.append(_chunk(b"cICP", blocks.cicp))
    if blocks.icc:
        about.append(_chunk(b"iCCP", b"icc\0\0" + zlib.compress(blocks.icc)))
    if blocks.exif:
        about.append(_chunk(b"eXIf", blocks.exif))
    if blocks.dpi:
        about.append(_chunk(b"pHYs", struct.pack(">IIB", *(min(2**31 - 1, round(d / _METRE)) for d in blocks.dpi), 1)))
    if blocks.xmp:
        about.append(_chunk(b"iTXt", _XMP_KEYWORD.encode() + b"\0\0\0\0\0" + blocks.xmp))
    if blocks.iptc:
        wrapped = binascii.hexlify(resources := _photoshop(blocks.iptc))
        lines = b"\n".join(wrapped[at : at + 72] for at in range(0, len(wrapped), 72))
        about.append(_chunk(b"tEXt", f"{_PROFILE}iptc\0\niptc\n{len(resources):8}\n".encode() + lines + b"\n"))
    for keyword, text in blocks.texts:
        about.append(_text_chunk(keyword, text))
    out = io.BytesIO()
    out.write(_PNG_SIGNATURE)
    for kind, start, end in _places(data):
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            out.write(data[start:end])
        if kind == b"IHDR":
            out.write(b"".join(about))
    return out.getvalue()


def _text_chunk(keyword: str, text: str) -> bytes:
    name = keyword.encode("latin-1", "replace")[:79]
    value = text_bytes(text)
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:  # a comment in an older encoding, of which Latin-1 is the likely one
        return _chunk(b"tEXt", name + b"\0" + value)
    return _chunk(b"tEXt", name + b"\0" + value) if text.isascii() else _chunk(b"iTXt", name + b"\0\0\0\0\0" + value)


def _png_text(kind: bytes, body: bytes, budget: int) -> tuple[str, bytes]:
    """Return keyword and value of a text or profile chunk.

    Raises:
        ValueError, IndexError, zlib.error: it is damaged, or larger than the budget.
    """
    name, value = body.split(b"\0", 1)
    keyword = name.decode("latin-1")
    packed = kind in (b"iCCP", b"zTXt")
    if kind == b"iTXt":
        packed = value[0] == 1
        _, _, value = value[2:].split(b"\0", 2)
    elif packed:
        value = value[1:]  # the method, of which there is one
    if packed:
        inflate = zlib.decompressobj()
        value = inflate.decompress(value, max(1, budget))
        if inflate.unconsumed_tail or not inflate.eof:
            raise ValueError("too large, or cut")
    return keyword, value


def _unwrapped(text: bytes) -> bytes | None:
    """Return what ImageMagick has stored as hexadecimal digits behind its name and length, None if it is none."""
    parts = text.split(None, 2)
    try:
        return binascii.unhexlify(b"".join(parts[2].split()))
    except (IndexError, ValueError):
        return None


def _places(data: bytes | mmap) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's kind, and where the whole of it begins and ends."""
    place = len(_PNG_SIGNATURE)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + length + 12  # its length and kind before, its checksum behind
        yield bytes(data[place + 4 : place + 8]), place, end
        place = end


def _chunks(data: bytes | mmap) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of each chunk but the pixels'."""
    for kind, start, end in _places(data):
        if kind != b"IDAT":
            yield kind, bytes(data[start + 8 : end - 4])


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


# -- WebP -----------------------------------------------------------------------------------------


def read_webp(data: bytes | mmap) -> Blocks:
    """Return the metadata of a WebP's chunks."""
    found, frames = Blocks(), 0
    for kind, body in _riff(data):
        if kind == b"EXIF":
            found.exif = bytes(body).removeprefix(_EXIF_START)
        elif kind == b"XMP ":
            found.xmp = bytes(body)
        elif kind == b"ICCP":
            found.icc = bytes(body)
        elif kind == b"ANMF":
            frames += 1
    found.pictures = max(1, frames)
    return found


def write_webp(data: bytes, blocks: Blocks, size: tuple[int, int], *, alpha: bool) -> bytes:
    """Return a WebP with blocks in place of all that it has beside its pixels."""
    flags = 0x20 * bool(blocks.icc) | 0x10 * alpha | 0x08 * bool(blocks.exif) | 0x04 * bool(blocks.xmp)
    sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
    chunks = [(b"VP8X", bytes([flags, 0, 0, 0]) + sides)]
    chunks += [(b"ICCP", blocks.icc)] if blocks.icc else []
    chunks += [(kind, bytes(body)) for kind, body in _riff(data) if kind in (b"ALPH", b"VP8 ", b"VP8L")]
    chunks += [(b"EXIF", blocks.exif)] if blocks.exif else []
    chunks += [(b"XMP ", blocks.xmp)] if blocks.xmp else []
    body = b"".join(kind + struct.pack("<I", len(value)) + value + bytes(len(value) % 2) for kind, value in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _riff(data: bytes | mmap) -> Iterator[tuple[bytes, bytes]]:
    place = 12
    while place + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, place + 4)
        yield bytes(data[place : place + 4]), bytes(data[place + 8 : place + 8 + length])
        place += 8 + length + length % 2
