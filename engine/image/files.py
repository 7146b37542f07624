"""Photos in and out: any common file to a `Photo`, and back with everything that was about it.

A result is written beside its place and moved there, so no half file is ever seen.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.bundle.storage import atomic_write
from engine.errors import ImageError, OutputError, from_os_error
from engine.image.decoding import decode_photo, exif_of
from engine.image.encoding import check_format, encode_photo
from engine.image.formats import READ_SUFFIXES, output_format
from engine.image.metadata import provenance_in
from engine.image.photo import Photo, Size

#: Bytes of a name that all common disks hold.
_MAX_NAME = 255


def read_photo(path: Path, *, max_pixels: int | None = None) -> Photo:
    """Read a photo from a file.

    Args:
        path: of the file; what it holds is told by its content, not by its ending.
        max_pixels: that it may have; it is asked for its size before it is decoded. None for any number.
    Raises:
        ImageError: missing, not an image, damaged, animated, empty, too large, or of a kind whose samples or
            library are not known.
    """
    with _file_errors(path):
        return decode_photo(path.read_bytes(), path, max_pixels=max_pixels)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Turn what reading a picture's file raises into an `ImageError`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise ImageError("is not a file", where=path, expected="an image file")
        yield
    except FileNotFoundError:
        raise ImageError("no such file", where=path, fix="check the path") from None
    except IsADirectoryError:
        raise ImageError("is a folder", where=path, expected="an image file") from None
    except PermissionError:
        raise ImageError("no permission to read it", where=path) from None
    except OSError as error:
        raise ImageError("cannot be read", where=path, found=error.strerror or str(error)) from error


def check_output(
    path: Path, photo: Photo | None = None, *, overwrite: bool = False, size: Size | None = None
) -> tuple[str, ...]:
    """Find out, before the work, whether a result could be written.

    Args:
        path: where it would go.
        photo: that it would be made from, if it was read already.
        overwrite: whether a file that is there may be replaced.
        size: (width, height) in pixels of the result; None if it is the photo's.
    Returns:
        What of the photo the format cannot hold and will be left out, a sentence each.
    Raises:
        OutputError: an unknown format, a name that is too long, a file that is there, a folder that is missing or
            not writable, or a format that cannot hold the photo.
    """
    output_format(path.suffix, path)
    check_name(path)
    if os.path.lexists(path) and (path.is_dir() or not overwrite):
        raise OutputError("exists already", where=path, fix="choose another name with -o, or allow it with --overwrite")
    folder = path.parent
    if not folder.is_dir():
        problem, fix = (
            ("is no folder", "correct the path") if folder.exists() else ("no such folder", "create it first")
        )
        raise OutputError(problem, where=folder, fix=fix)
    if not os.access(folder, os.W_OK):
        raise OutputError("no permission to write there", where=folder, fix="choose another place with -o")
    return () if photo is None else check_format(photo, path.suffix, path, size=size)


def check_name(path: Path) -> None:
    """Find out whether a file can have a name.

    Raises:
        OutputError: it is too long, or makes no sense to the disk.
    """
    if len(os.fsencode(path.name)) > _MAX_NAME:
        raise from_os_error(OSError(errno.ENAMETOOLONG, ""), path, "write the image")
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # the folder's to say
    except (OSError, ValueError) as error:
        known = error if isinstance(error, OSError) else OSError(errno.EINVAL, str(error))
        raise from_os_error(known, path, "write the image") from error


def list_images(folder: Path, *, recursive: bool = False, suffixes: tuple[str, ...] = READ_SUFFIXES) -> list[Path]:
    """Return the images of a folder by name, without hidden files.

    Args:
        folder: to look in.
        suffixes: of what counts as an image, in small letters.
        recursive: whether its subfolders are looked through too; hidden ones and links are not.
    Raises:
        InputError: a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:  # which `os.walk` would take for an empty folder
        raise from_os_error(error, error.filename or folder, "read the folder", "read") from error

    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        paths = (Path(place, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in suffixes and path.is_file()]
    return sorted(found)


def write_photo(
    path: Path,
    photo: Photo,
    provenance: Mapping[str, Any],
    *,
    overwrite: bool = False,
    quality: int | None = None,
) -> None:
    """Write a photo, whole or not at all.

    Args:
        path: its ending tells the format.
        photo: with what is to be carried along.
        provenance: how it was made; `read_provenance` gives it back.
        overwrite: replace a file that is there.
        quality: of JPEG, WebP and AVIF, 1 to 100; None for the format's own.
    Raises:
        OutputError: as `check_output`, or the disk is full.
    """
    check_output(path, photo, overwrite=overwrite)
    write_file(path, encode_photo(photo, path.suffix, provenance, path, quality=quality))


def write_file(path: Path, encoded: bytes) -> None:
    """Write an encoded image, whole or not at all.

    Raises:
        OutputError: the disk is full, or the place cannot be written to.
    """
    with atomic_write(path, "write the image") as file:
        file.write(encoded)


def read_provenance(path: Path) -> dict[str, Any]:
    """Return what `write_photo` noted in a file; its pixels are not decoded.

    Raises:
        ImageError: it cannot be read, or holds no such note.
    """
    with _file_errors(path), path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                provenance = provenance_in(exif_of(data, path))
        except ValueError:  # an empty file
            provenance = None
    if provenance is None:
        raise ImageError("holds no settings", where=path, expected="a result of this engine, not re-saved since")
    return provenance
