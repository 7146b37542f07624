"""From what a file says beside its pixels to what goes into a result: EXIF, XMP, IPTC, texts, resolution, colours."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.image.blocks import Blocks, text_bytes
from engine.image.formats import Block, Format
from engine.image.photo import Photo
from engine.image.profiles import code_point_names, is_srgb, profile_of_code_points, profile_of_gamma
from engine.image.tags import EXIF, MAKER_NOTE, Directory, TagError, read_exif, without, write_exif
from engine.image.xmp import without_stale
from engine.units import format_bytes

ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 274, 282, 283, 296
XMP_TAG, IPTC_TAG, PHOTOSHOP_TAG, ICC_TAG = 700, 33723, 34377, 34675
#: EXIF's "record of what has been done to the image": the same place in every format.
PROVENANCE_TAG = 0x9213
_SIZE_TAGS = (0xA002, 0xA003)
#: EXIF shares its tags with TIFF, where some describe the file that was read, not the picture: its layout, layers and
#: previews, where its pixels lie, and what a DNG or TIFF/EP says of its sensor.
_FILE_TAGS = frozenset(
    {*range(254, 260), 262, 266, 273, ORIENTATION, 277, 278, 279, 280, 281, X_RESOLUTION, Y_RESOLUTION, 284, 290, 291}
    | {292, 293, RESOLUTION_UNIT, 297, 317, 320, *range(321, 326), 330, 332, 334, 336, 337, 338, 339, 340, 341, 347}
    | {*range(512, 522), *range(529, 533), XMP_TAG, 33421, 33422, IPTC_TAG, PHOTOSHOP_TAG, ICC_TAG, 37724, 50255}
    | {*range(50706, 51200), *range(52525, 52600)}
)
_MAX_DPI = 100_000.0
#: What a result's settings may come to in its EXIF, for checks before they are known.
PROVENANCE_BYTES = 4096


@dataclass(frozen=True)
class Carried:
    """What is carried from a file.

    Attributes:
        exif: a block that begins with its byte order, without what holds for the file alone.
        orientation: 1 to 8, how the picture is turned in its file.
        dpi: dots per inch, None if none is stated, or nonsense.
        warnings: what is left out, a sentence each.
    """

    exif: bytes | None = None
    orientation: int = 1
    dpi: tuple[float, float] | None = None
    warnings: tuple[str, ...] = ()


def carry_exif(block: bytes | None) -> Carried:
    """Return what is carried of an EXIF block; a damaged tag costs that tag."""
    if not block:
        return Carried()
    try:
        return carry_directory(read_exif(block))
    except TagError as error:
        return Carried(warnings=(f"its EXIF data is damaged and was left out ({error})",))


def carry_directory(directory: Directory) -> Carried:
    """Return what is carried of the main directory of an EXIF block or a TIFF."""
    orientation = directory.number(ORIENTATION, 1)
    dpi = _resolution(directory)
    damaged = [code for code in directory.damaged if code not in _FILE_TAGS]
    warnings: tuple[str, ...] = ()
    if damaged:
        warnings = (f"EXIF tags that are damaged were left out: {', '.join(f'0x{code:04X}' for code in damaged)}",)
    kept = replace(directory, tags=without(directory.tags, _FILE_TAGS))
    for code, tag in list(kept.tags.items()):
        if tag.kind in (16, 17, 18):  # which only a BigTIFF has
            del kept.tags[code]
    exif = write_exif(kept) if kept.tags or kept.children else None
    return Carried(exif, orientation if 1 <= orientation <= 8 else 1, dpi, warnings)


def checked_dpi(dpi: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return a resolution, None for one that no picture has."""
    if dpi is None or not all(math.isfinite(value) and 0 < value <= _MAX_DPI for value in dpi):
        return None
    return float(dpi[0]), float(dpi[1])


def _resolution(directory: Directory) -> tuple[float, float] | None:
    across, down = directory.numbers(X_RESOLUTION), directory.numbers(Y_RESOLUTION)
    unit = {2: 1.0, 3: 2.54}.get(directory.number(RESOLUTION_UNIT, 2))
    if not across or not down or unit is None:
        return None
    return checked_dpi((across[0] * unit, down[0] * unit))


def dress(photo: Photo, blocks: Blocks, carried: Carried) -> Photo:
    """Return a photo with what its file says beside the pixels, as far as it holds for a result."""
    warnings = [*photo.warnings, *carried.warnings]
    xmp = blocks.xmp
    stale: tuple[str, ...] = ()
    if xmp:
        xmp, stale = without_stale(xmp)
    if left := (*blocks.left, *(name for name in stale if "Motion" in name or "hdrgm" in name or "damaged" in name)):
        warnings.append(f"what holds for the stored file alone was left out: {', '.join(left)}")
    icc, cicp = photo.icc_profile or blocks.icc, blocks.cicp
    if cicp is not None:
        cicp = None if is_srgb(cicp) else bytes([*cicp[:2], 0, cicp[3]])  # the matrix of RGB
    if icc is None and cicp is None:
        icc = profile_of_gamma(blocks.gamma, blocks.chroma, grey=photo.grey)
    return replace(
        photo,
        exif=carried.exif,
        xmp=xmp,
        iptc=blocks.iptc,
        icc_profile=icc,
        cicp=cicp,
        dpi=checked_dpi(blocks.dpi) or carried.dpi,
        texts=blocks.texts,
        warnings=tuple(warnings),
    )


# -- into a result ----------------------------------------------------------------------------------


def blocks_for(photo: Photo, file_format: Format, note: str) -> tuple[Blocks, tuple[str, ...]]:
    """Return what goes beside a photo's pixels into a file, and what does not, a sentence each.

    Args:
        photo: whose metadata is carried.
        file_format: of the file.
        note: how the photo was made, as JSON.
    """
    left: list[str] = []

    def fits(block: Block, what: str, size: int) -> bool:
        limit = file_format.limit(block)
        if limit is None or size <= limit:
            return True
        known = f" (it has {format_bytes(size)}, up to {format_bytes(limit)} fit)" if limit else ""
        left.append(f"{file_format.name} cannot hold {what}{known}: left out")
        return False

    exif = exif_with(photo, note)
    if not fits("exif", "all of its EXIF data", len(exif)):
        exif = exif_with(photo, note, note_kept=False)
        if len(exif) > (file_format.limit("exif") or 0):
            exif = exif_with(replace(photo, exif=None), note)
    texts = photo.texts
    if not file_format.limit("texts") and file_format.limit("texts") is not None and texts:
        left.append(f"{file_format.name} cannot hold texts: left out ({', '.join(key for key, _ in texts)[:200]})")
        texts = ()
    texts = tuple((key, text) for key, text in texts if fits("texts", f"the text {key[:80]!r}", len(text_bytes(text))))
    xmp, iptc, icc, cicp = photo.xmp, photo.iptc, photo.icc_profile, photo.cicp
    if xmp and not fits("xmp", "its XMP", len(xmp)):
        xmp = None
    if iptc and not fits("iptc", "its IPTC captions", len(iptc)):
        iptc = None
    if cicp and file_format.limit("cicp") == 0:
        made = profile_of_code_points(cicp, grey=photo.grey)
        if icc is None and made is None:
            left.append(f"{file_format.name} cannot say what its colours are ({code_point_names(cicp)}): left out")
        icc, cicp = icc or made, None
    if icc and file_format.name == "JPEG" and len(icc) > 255 * 65_519:
        left.append("JPEG cannot hold its colour profile: left out")
        icc = None
    blocks = Blocks(exif=exif, xmp=xmp, icc=icc, iptc=iptc, texts=texts, dpi=photo.dpi, cicp=cicp)
    return blocks, tuple(left)


def exif_with(photo: Photo, note: str, *, note_kept: bool = True) -> bytes:
    """Return a photo's EXIF with a note of how it was made, its size and resolution brought up to date.

    Args:
        photo: of the result's size.
        note: as JSON.
        note_kept: whether the maker's note, which may be large, stays.
    """
    try:
        directory = read_exif(photo.exif) if photo.exif else Directory()
    except TagError:  # a caller's
        directory = Directory()
    for code in (X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT):
        directory.tags.pop(code, None)
    if photo.dpi is not None:
        for code, dots in zip((X_RESOLUTION, Y_RESOLUTION), photo.dpi, strict=True):
            directory.put(code, 5, *_fraction(dots))
        directory.put(RESOLUTION_UNIT, 3, 2)
    details = directory.children.setdefault(EXIF, Directory(directory.order))
    details.put(PROVENANCE_TAG, 2, note.encode("ascii") + b"\0")
    if not note_kept:
        details.tags.pop(MAKER_NOTE, None)
    for code, side in zip(_SIZE_TAGS, photo.size, strict=True):
        if code in details.tags:
            details.put(code, 4, side)
    return write_exif(directory)


def provenance_in(exif: bytes | None) -> dict[str, Any] | None:
    """Return what `exif_with` has noted in an EXIF block, None if there is no such note."""
    try:
        details = read_exif(exif).children.get(EXIF) if exif else None
        note = details.raw(PROVENANCE_TAG) if details is not None else None
        found = json.loads(note.rstrip(b"\0")) if note is not None else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def note_of(provenance: Mapping[str, Any]) -> str:
    """Return how a photo was made as the text that its EXIF holds."""
    return json.dumps(provenance, ensure_ascii=True)


def _fraction(value: float) -> tuple[int, int]:
    bottom = 10_000 if value < 100_000 else 1
    top = round(value * bottom)
    divisor = math.gcd(top, bottom) or 1
    return max(1, top) // divisor, bottom // divisor
