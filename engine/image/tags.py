"""Directories of tags, as TIFF files and EXIF blocks have them: read one tag at a time, and written back byte for byte.

libvips and Pillow parse an EXIF block and write another one: texts in UTF-8, makers' notes and whatever they do not
know are lost on the way, and one tag that cannot be written costs the whole block. Here a tag's value stays the bytes
that it was, and a damaged tag costs itself.

Source: TIFF 6.0, section 2; EXIF 2.32, 4.6; BigTIFF.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any

import numpy as np

#: A file's bytes, in memory or mapped.
Buffer = bytes | mmap
EXIF, GPS, INTEROP, SUB_IFDS = 0x8769, 0x8825, 0xA005, 0x014A
MAKER_NOTE = 0x927C
#: Directories inside of others; EXIF's holds the one for interoperability.
_CHILDREN = {EXIF: (INTEROP,)}
_MAX_DIRECTORIES = 4096

#: Of each type: bytes of an item, bytes that are swapped together, and its letter for `struct`.
_TYPES = {
    1: (1, 1, "B"),
    2: (1, 1, "s"),
    3: (2, 2, "H"),
    4: (4, 4, "I"),
    5: (8, 4, "II"),
    6: (1, 1, "b"),
    7: (1, 1, "B"),
    8: (2, 2, "h"),
    9: (4, 4, "i"),
    10: (8, 4, "ii"),
    11: (4, 4, "f"),
    12: (8, 8, "d"),
    13: (4, 4, "I"),
    16: (8, 8, "Q"),
    17: (8, 8, "q"),
    18: (8, 8, "Q"),
    129: (1, 1, "B"),  # EXIF 3.0: UTF-8
}


@dataclass(frozen=True)
class Tag:
    """A tag's value: its type, the number of its items, and its bytes in the directory's order."""

    kind: int
    count: int
    data: bytes


@dataclass
class Directory:
    """A directory of tags.

    Attributes:
        order: of its bytes, "<" or ">".
        tags: by number, without those that point to other directories.
        children: such as EXIF's and GPS' own, by the tag that points to them.
        damaged: tags that could not be read.
        following: offset of the next directory, 0 for none.
        note_offset: of the maker's note in its block: makers count offsets from the block's start.
    """

    order: str = "<"
    tags: dict[int, Tag] = field(default_factory=dict)
    children: dict[int, Directory] = field(default_factory=dict)
    damaged: list[int] = field(default_factory=list)
    following: int = 0
    note_offset: int | None = None

    def numbers(self, code: int) -> tuple[float, ...]:
        """Return a tag's values as numbers, fractions divided; empty if there are none, NaN for n/0."""
        tag = self.tags.get(code)
        if tag is None or tag.kind in (2, 129):
            return ()
        size, _, letters = _TYPES[tag.kind]
        values = [struct.unpack_from(self.order + letters, tag.data, at) for at in range(0, tag.count * size, size)]
        if len(letters) == 1:
            return tuple(value for (value,) in values)
        return tuple(top / bottom if bottom else float("nan") for top, bottom in values)

    def number(self, code: int, default: int = 0) -> int:
        """Return a tag's first value as a whole number, or the default."""
        values = self.numbers(code)
        return int(values[0]) if values and abs(values[0]) < 2**63 else default

    def raw(self, code: int) -> bytes | None:
        """Return a tag's bytes."""
        tag = self.tags.get(code)
        return None if tag is None else tag.data

    def put(self, code: int, kind: int, *values: Any) -> None:
        """Set a tag, of a type that holds bytes or numbers."""
        if kind in (2, 7, 1):
            (data,) = values
            self.tags[code] = Tag(kind, len(data), data)
            return
        _, _, letters = _TYPES[kind]
        packed = struct.pack(self.order + letters[0] * len(values), *values)
        self.tags[code] = Tag(kind, len(values) // len(letters), packed)

    def in_order(self, order: str) -> Directory:
        """Return this directory with its bytes, and its children's, in another order."""
        if order == self.order:
            return self
        tags = {}
        for code, tag in self.tags.items():
            unit = _TYPES[tag.kind][1]
            data = tag.data if unit == 1 else np.frombuffer(tag.data, f"u{unit}").byteswap().tobytes()
            tags[code] = Tag(tag.kind, tag.count, data)
        return Directory(order, tags, {code: child.in_order(order) for code, child in self.children.items()})


class TagError(ValueError):
    """Not a directory, or not one that can be read."""


@dataclass(frozen=True)
class TagFile:
    """A TIFF file, or an EXIF block, whose directories are read when they are asked for.

    Attributes:
        data: the whole file.
        order: of its bytes.
        big: whether it is a BigTIFF.
        first: offset of its first directory.
    """

    data: Buffer
    order: str
    big: bool
    first: int

    @classmethod
    def open(cls, data: Buffer) -> TagFile:
        """Return a file by its header.

        Raises:
            TagError: it has none.
        """
        order = {b"II": "<", b"MM": ">"}.get(bytes(data[:2]))
        if order is None or len(data) < 8:
            raise TagError("no header")
        (version,) = struct.unpack_from(order + "H", data, 2)
        if version == 43 and len(data) >= 16:
            return cls(data, order, True, struct.unpack_from(order + "Q", data, 8)[0])
        if version != 42:
            raise TagError("no header")
        return cls(data, order, False, struct.unpack_from(order + "I", data, 4)[0])

    def directory(self, offset: int, children: tuple[int, ...] = ()) -> Directory:
        """Return the directory at an offset, with those inside of it.

        Raises:
            TagError: there is none.
        """
        head, entry = ("Q", "HHQ") if self.big else ("H", "HHI")
        step, inline = struct.calcsize("<" + entry) + (8 if self.big else 4), 8 if self.big else 4
        start = offset + struct.calcsize("<" + head)
        if not 0 < offset <= len(self.data) - struct.calcsize("<" + head):
            raise TagError("a directory outside of the file")
        (count,) = struct.unpack_from(self.order + head, self.data, offset)
        if start + count * step > len(self.data):
            if count * step > len(self.data):
                raise TagError("a directory that does not end")
            count = (len(self.data) - start) // step
        found = Directory(self.order)
        budget = len(self.data)  # values do not overlap, so all of them together are no more than the file
        for place in range(start, start + count * step, step):
            code, kind, items = struct.unpack_from(self.order + entry, self.data, place)
            size = _TYPES.get(kind, (0, 0, ""))[0] * items
            at = place + step - inline
            if size > inline:
                (at,) = struct.unpack_from(self.order + ("Q" if self.big else "I"), self.data, at)
            if kind not in _TYPES or size > budget or at + size > len(self.data):
                found.damaged.append(code)
                continue
            budget -= size
            found.tags.setdefault(code, Tag(kind, items, bytes(self.data[at : at + size])))
            if code == MAKER_NOTE and size > inline:
                found.note_offset = at
        end = start + count * step
        if end + inline <= len(self.data):
            (found.following,) = struct.unpack_from(self.order + ("Q" if self.big else "I"), self.data, end)
        for code in children:
            if code in found.tags:
                place = found.number(code)
                del found.tags[code]
                try:
                    found.children[code] = self.directory(place, _CHILDREN.get(code, ()))
                except TagError:
                    found.damaged.append(code)
        return found

    def chain(self) -> list[Directory]:
        """Return the first directory and those that follow it, as far as they can be read.

        Raises:
            TagError: not even the first one can.
        """
        found, seen, offset = [self.directory(self.first, (EXIF, GPS))], {self.first}, 0
        while (offset := found[-1].following) and offset not in seen and len(found) < _MAX_DIRECTORIES:
            seen.add(offset)
            try:
                found.append(self.directory(offset))
            except TagError:
                break
        return found

    def below(self, directory: Directory) -> list[Directory]:
        """Return the directories that a directory's SubIFDs tag points to."""
        found = []
        for offset in directory.numbers(SUB_IFDS)[:_MAX_DIRECTORIES]:
            try:
                found.append(self.directory(int(offset)))
            except TagError:
                continue
        return found


def pack(directory: Directory, base: int, *, big: bool = False, keep_note: bool = False) -> tuple[bytes, int]:
    """Return a directory, its values and its children as bytes that begin at an offset of a file.

    Args:
        directory: with its children.
        base: offset of the bytes in their file, which must be even.
        big: whether the file is a BigTIFF.
        keep_note: whether a maker's note must lie at the offset that it had.
    Returns:
        The bytes, and the offset of the directory in the file.
    """
    order, inline, word = directory.order, 8 if big else 4, "Q" if big else "I"
    data = bytearray()
    places: dict[tuple[int, int], int] = {}
    exif = directory.children.get(EXIF)
    if keep_note and exif is not None and exif.note_offset is not None and exif.note_offset >= base:
        note = exif.tags.get(MAKER_NOTE)
        if note is not None and exif.note_offset - base < 65_536:
            data += bytes(exif.note_offset - base) + note.data
            places[EXIF, MAKER_NOTE] = exif.note_offset

    def put(code: int, current: Directory) -> int:
        """Add a directory behind what there is, children first, and return its offset."""
        tags = dict(current.tags)
        for child_code, child in current.children.items():
            if child.tags or child.children:
                offset = put(child_code, child)
                tags[child_code] = Tag(16 if big else 4, 1, struct.pack(order + word, offset))
        entries = bytearray()
        for number, tag in sorted(tags.items()):
            value = tag.data
            if len(value) > inline:
                place = places.get((code, number))
                if place is None:
                    data.extend(bytes(-len(data) % 2))
                    place = base + len(data)
                    data.extend(value)
                value = struct.pack(order + word, place)
            entries += struct.pack(order + ("HHQ" if big else "HHI"), number, tag.kind, tag.count)
            entries += value.ljust(inline, b"\0")
        data.extend(bytes(-len(data) % 2))
        offset = base + len(data)
        data.extend(struct.pack(order + ("Q" if big else "H"), len(tags)) + entries + bytes(inline))
        return offset

    offset = put(0, directory)
    return bytes(data), offset


def read_exif(block: bytes) -> Directory:
    """Return the main directory of an EXIF block, with EXIF's own, GPS' and interoperability's.

    Raises:
        TagError: it cannot be read at all.
    """
    file = TagFile.open(block.removeprefix(b"Exif\0\0"))
    return file.directory(file.first, (EXIF, GPS))


def write_exif(directory: Directory) -> bytes:
    """Return a directory as an EXIF block, a maker's note at its old offset."""
    data, offset = pack(directory, 8, keep_note=True)
    head = b"II" if directory.order == "<" else b"MM"
    return head + struct.pack(directory.order + "HI", 42, offset) + data


def without(tags: Mapping[int, Tag], codes: frozenset[int]) -> dict[int, Tag]:
    """Return tags without some of them."""
    return {code: tag for code, tag in tags.items() if code not in codes}
