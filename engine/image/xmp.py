"""XMP packets without what holds for the stored file alone: videos and gain maps behind it, its size and orientation.

All other bytes stay as they are.
"""

from __future__ import annotations

import re
from typing import Any
from xml.parsers import expat

#: Names that begin with these describe parts of the file that was read: motion photos, gain maps, depth, thumbnails.
_STALE = (
    "http://ns.google.com/photos/1.0/",
    "http://ns.google.com/photos/dd/",
    "http://ns.adobe.com/hdr-gain-map/",
    "http://ns.apple.com/HDRGainMap/",
    "http://ns.apple.com/pixeldatainfo/",
    "http://ns.adobe.com/xmp/note/ HasExtendedXMP",
    "http://ns.adobe.com/xap/1.0/ Thumbnails",
    "http://ns.adobe.com/tiff/1.0/ Orientation",
    "http://ns.adobe.com/tiff/1.0/ ImageWidth",
    "http://ns.adobe.com/tiff/1.0/ ImageLength",
    "http://ns.adobe.com/tiff/1.0/ XResolution",
    "http://ns.adobe.com/tiff/1.0/ YResolution",
    "http://ns.adobe.com/tiff/1.0/ ResolutionUnit",
    "http://ns.adobe.com/exif/1.0/ PixelXDimension",
    "http://ns.adobe.com/exif/1.0/ PixelYDimension",
    "http://ns.adobe.com/photoshop/1.0/ DocumentAncestors",
)
#: One more of Google's that is about the picture: a panorama's projection.
_KEPT = ("http://ns.google.com/photos/1.0/panorama/",)


def without_stale(packet: bytes) -> tuple[bytes | None, tuple[str, ...]]:
    """Return an XMP packet without properties of the stored file, and the names of those.

    A packet that is no XML stays as it is, unless it names one of their namespaces: then it is left out whole.
    """
    if not any(name.split(" ")[0].encode() in packet for name in _STALE):
        return packet, ()
    try:
        return _cut(packet)
    except (expat.ExpatError, _NotPlainError, UnicodeDecodeError):
        if any(b" " not in name.encode() and name.encode() in packet for name in _STALE):
            return None, ("all of its XMP, which is damaged",)
        return packet, ()


class _NotPlainError(ValueError):
    """A document with declarations of its own."""


def _cut(packet: bytes) -> tuple[bytes, tuple[str, ...]]:
    parser = expat.ParserCreate("utf-8", " ")
    parser.namespace_prefixes = True
    parser.ordered_attributes = True
    ranges: list[tuple[int, int]] = []
    names: list[str] = []
    open_at: list[tuple[int, bool]] = []
    inside = 0

    def start(name: str, attributes: list[str]) -> None:
        nonlocal inside
        at = parser.CurrentByteIndex
        stale = _is_stale(name)
        open_at.append((at, stale))
        if stale:
            inside += 1
            names.append(_short(name))
        elif not inside:
            tag = packet[at : _tag_end(packet, at)]
            for attribute in attributes[::2]:
                if _is_stale(attribute):
                    written = re.escape(_short(attribute).encode())
                    found = re.search(rb"\s+" + written + rb"\s*=\s*(\"[^\"]*\"|'[^']*')", tag)
                    if found:
                        ranges.append((at + found.start(), at + found.end()))
                        names.append(_short(attribute))

    def end(name: str) -> None:
        nonlocal inside
        at, stale = open_at.pop()
        if stale:
            inside -= 1
            if not inside:
                ranges.append((at, _tag_end(packet, parser.CurrentByteIndex)))

    def refuse(*_: Any) -> None:
        raise _NotPlainError

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler = refuse
    # Readers take what stands around the document, padding and packet marks, as part of the packet.
    begin, finish = packet.find(b"<"), packet.rfind(b">") + 1
    parser.Parse(b" " * begin + packet[begin:finish], True)
    kept = bytearray(packet)
    for first, last in sorted(ranges, reverse=True):
        del kept[first:last]
    return bytes(kept), tuple(dict.fromkeys(names))


def _is_stale(name: str) -> bool:
    return name.startswith(_STALE) and not name.startswith(_KEPT)


def _short(name: str) -> str:
    """Return prefix and name as written, of expat's "namespace name prefix"."""
    _, local, *prefix = name.split(" ")
    return f"{prefix[0]}:{local}" if prefix else local


def _tag_end(packet: bytes, start: int) -> int:
    """Return where the tag that begins at a place ends; ">" may stand in an attribute."""
    found = re.compile(rb"<(?:[^\"'>]|\"[^\"]*\"|'[^']*')*>").match(packet, start)
    if found is None:
        raise _NotPlainError
    return found.end()
