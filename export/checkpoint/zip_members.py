"""Where the members of a zip file lie in it, so that they can be mapped.

Python's `zipfile` reads the directory at the end of the file. Everything that the directory claims
is checked against the members' own headers: a file in which the two differ is read differently by
different programs, and torch writes none.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from dataclasses import dataclass

from engine.errors import CheckpointError
from export.checkpoint.mapped import DOWNLOAD_AGAIN, shorten

#: 90,000 members or so. `zipfile` would read gigabytes where a damaged file asks for it.
_MOST_DIRECTORY_BYTES = 1 << 23
_HEADER = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 0x1 | 0x20 | 0x40 | 0x2000  # and patches of another file
_SIZES_FOLLOW = 0x8  # the sizes stand behind the data, and may be left out before it
_UTF_8 = 0x800
_ZIP64 = 0xFFFFFFFF  # the size is in an extra field


@dataclass(frozen=True)
class Member:
    """Where a member's bytes lie in the file."""

    start: int
    size: int


class _Reader:
    """The mapped file as `zipfile` reads it: never much at once."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._at = 0

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = offset + (0, self._at, len(self._mapping))[whence]
        if self._at < 0:
            raise OSError("before the file")  # as files do, which `zipfile` expects
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        if size > _MOST_DIRECTORY_BYTES:
            raise ValueError(f"a directory of {size} bytes")
        data = self._mapping[self._at :] if size < 0 else self._mapping[self._at : self._at + size]
        self._at += len(data)
        return data


def find_members(mapping: mmap.mmap) -> dict[str, Member]:
    """Return the members of a zip file that holds them uncompressed, by name.

    Raises:
        CheckpointError: damaged, or a zip file of a kind that torch does not write.
    """
    try:
        with zipfile.ZipFile(_Reader(mapping)) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except Exception as error:  # `zipfile` lists nowhere what it raises for damaged files
        raise _damaged(str(error)) from error
    members: dict[str, Member] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        # A gap before the first member is another file: an archive in front of this one.
        if info.header_offset < end or (not members and info.header_offset):
            raise _damaged("members overlap, or begin late", info)
        member = _locate(mapping, info)
        end = member.start + member.size
        if end > directory:
            raise _damaged("a member reaches into the directory", info)
        # Not `filename`, which zipfile cuts at a NUL.
        if info.orig_filename in members:
            raise _damaged("two members have one name", info)
        members[info.orig_filename] = member
    return members


def _locate(mapping: mmap.mmap, info: zipfile.ZipInfo) -> Member:
    """Return where a member's data lie, which only the header in front of them says."""
    if info.flag_bits & _ENCRYPTED:
        raise CheckpointError(
            "the zip file is encrypted", where=shorten(info.orig_filename), fix="decrypt it and save it again"
        )
    if info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(
            "the zip file is compressed, so it cannot be mapped",
            where=shorten(info.orig_filename),
            expected="members that are stored as they are, as torch.save writes them",
            found=f"compression method {info.compress_type}",
            fix="load and save it again with torch, or convert it to .safetensors",
        )
    try:
        signature, _, flags, method, _, _, _, packed, size, name_size, extra_size = _HEADER.unpack_from(
            mapping, info.header_offset
        )
    except struct.error:
        raise _damaged("a member's header lies outside of the file", info) from None
    name_at = info.header_offset + _HEADER.size
    name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF_8 else "cp437")
    unsaid = (_ZIP64, 0) if flags & _SIZES_FOLLOW else (_ZIP64,)
    if (
        (signature, flags, method) != (b"PK\x03\x04", info.flag_bits, zipfile.ZIP_STORED)
        or mapping[name_at : name_at + name_size] != name
        or any(here not in (info.file_size, *unsaid) for here in (packed, size))
        or info.compress_size != info.file_size
    ):
        raise _damaged("a member's header and the directory differ", info)
    return Member(name_at + name_size + extra_size, info.file_size)


def _damaged(found: str, info: zipfile.ZipInfo | None = None) -> CheckpointError:
    where = None if info is None else shorten(info.orig_filename)
    return CheckpointError("not a whole checkpoint", where=where, found=shorten(found), fix=DOWNLOAD_AGAIN)
