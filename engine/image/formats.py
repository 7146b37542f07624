"""The formats of image files: their endings, how a file's first bytes tell them, and what each can hold."""

from __future__ import annotations

from dataclasses import dataclass
from mmap import mmap
from typing import Literal

from engine.errors import ImageError, OutputError

#: Kinds of metadata that are carried from a photo to its result.
Block = Literal["exif", "xmp", "iptc", "texts", "cicp"]

#: A segment of a JPEG holds 65,535 bytes with its own length; the rest is the kind's signature.
_SEGMENT = 65_533


@dataclass(frozen=True)
class Format:
    """A format of image files.

    Attributes:
        name: as messages call it.
        suffixes: of its files; the first one is the usual one.
        written: whether results can be written in it.
        bits: a channel of a result has at most.
        alpha: whether it holds transparency.
        max_side: pixels of its longer side at most.
        max_pixels: in all, None where only the sides count.
        quality: from 1 to 100 where nothing else is asked for, None where it loses nothing.
        blocks: bytes of each kind of metadata that it holds at most; None means as many as there are.
    """

    name: str
    suffixes: tuple[str, ...]
    written: bool = False
    bits: int = 8
    alpha: bool = True
    max_side: int = 0
    max_pixels: int | None = None
    quality: int | None = None
    blocks: tuple[tuple[Block, int | None], ...] = ()

    def limit(self, block: Block) -> int | None:
        """Return how many bytes of metadata of a kind it holds, 0 for none, None for any number."""
        return dict(self.blocks).get(block, 0)


PNG = Format(
    "PNG",
    (".png", ".apng"),
    written=True,
    bits=16,
    max_side=2**31 - 1,
    blocks=(("exif", None), ("xmp", None), ("iptc", None), ("texts", None), ("cicp", None)),
)
JPEG = Format(
    "JPEG",
    (".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".jfi"),
    written=True,
    alpha=False,
    max_side=65_500,  # libjpeg's
    quality=95,
    blocks=(("exif", _SEGMENT - 6), ("xmp", _SEGMENT - 29), ("iptc", _SEGMENT - 27), ("texts", _SEGMENT)),
)
WEBP = Format("WebP", (".webp",), written=True, max_side=16_383, quality=95, blocks=(("exif", None), ("xmp", None)))
TIFF = Format(
    "TIFF",
    (".tif", ".tiff"),
    written=True,
    bits=16,
    max_side=2**31 - 1,
    blocks=(("exif", None), ("xmp", None), ("iptc", None)),
)
AVIF = Format(
    "AVIF",
    (".avif",),
    written=True,
    max_side=32_768,  # decoders refuse larger ones
    max_pixels=1 << 28,
    quality=90,
    blocks=(("exif", None), ("xmp", None)),
)
BMP = Format("BMP", (".bmp", ".dib"))
GIF = Format("GIF", (".gif",))
HEIC = Format("HEIC", (".heic", ".heif", ".hif"))
JPEG_XL = Format("JPEG XL", (".jxl",))
RAW = Format(
    "camera raw",
    (
        *(".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".sr2", ".srf", ".raf", ".orf", ".rw2", ".raw"),
        *(".pef", ".srw", ".3fr", ".fff", ".iiq", ".x3f", ".mrw", ".dcr", ".kdc", ".erf", ".mef", ".mos", ".rwl"),
    ),
)
FORMATS = (PNG, JPEG, WEBP, TIFF, AVIF, BMP, GIF, HEIC, JPEG_XL, RAW)
_BY_SUFFIX = {suffix: entry for entry in FORMATS for suffix in entry.suffixes}
_WRITTEN = {entry.name.lower(): entry for entry in FORMATS if entry.written}
#: Names of the formats that results are written in.
WRITTEN = tuple(_WRITTEN)
#: Endings of what is taken for a photo in a folder. Camera raws are not: they lie beside their JPEGs.
READ_SUFFIXES = tuple(suffix for entry in FORMATS if entry is not RAW for suffix in entry.suffixes)

#: First bytes of raws that are not TIFFs, or not quite: Canon, Fujifilm, Olympus, Panasonic, Sigma, Minolta.
_RAW_STARTS = (
    *(b"II\x1a\0\0\0HEAPCCDR", b"II*\0\x10\0\0\0CR", b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0"),
    *(b"FOVb", b"\0MRM"),
)
#: What a HEIC file may say that it is, behind "ftyp"; `mif1` may be an AVIF.
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def format_of_suffix(suffix: str) -> Format | None:
    """Return the format that an ending means, None if it is no image's."""
    return _BY_SUFFIX.get(suffix.lower())


def output_format(suffix: str, where: object) -> Format:
    """Return the format that a result's ending means.

    Raises:
        OutputError: it is none that is written.
    """
    found = format_of_suffix(suffix)
    if found is None or not found.written:
        expected = ", ".join(suffix for entry in _WRITTEN.values() for suffix in entry.suffixes)
        raise OutputError("no format that is written", where=where, expected=expected, found=suffix or "no ending")
    return found


def output_suffix(name: str, source: str) -> str:
    """Return the ending of a result.

    Args:
        name: one of `WRITTEN`, or "same": the photo's format, PNG where that is not written.
        source: the photo's ending.
    """
    if name != "same":
        return _WRITTEN[name].suffixes[0]
    found = format_of_suffix(source)
    return source if found is not None and found.written else PNG.suffixes[0]


def sniff(data: bytes | mmap, where: object = "image") -> Format:
    """Return the format of a file by its first bytes; a raw that is a TIFF is told by its directories, later.

    Args:
        data: the file's bytes, 64 of them at least.
        where: what errors call it.
    Raises:
        ImageError: it is of no format that is read.
    """
    start = bytes(data[:64])
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if start.startswith(b"\xff\xd8\xff"):
        return JPEG
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return WEBP
    if start.startswith(_RAW_STARTS) or start[4:12] == b"ftypcrx ":
        return RAW
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return TIFF
    if start[:2] == b"BM":
        return BMP
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return GIF
    if start[:2] == b"\xff\x0a" or start[:12] == b"\0\0\0\x0cJXL \r\n\x87\n":
        return JPEG_XL
    if start[4:8] == b"ftyp":
        if b"avif" in start[8:] or b"avis" in start[8:]:
            return AVIF
        if start[8:12] in _HEIC_BRANDS:
            return HEIC
    raise ImageError("is not an image, or of a format that is not read", where=where, expected=", ".join(READ_SUFFIXES))
