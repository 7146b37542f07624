"""Photos in and out: any common file to a `Photo`, and back with everything that was about it.

A result is written beside its place and moved there, so no half file is ever seen.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from engine.decoding import READ_SUFFIXES, damage_told, decode
from engine.encoding import HISTORY_TAG, check_format, encode_photo, format_of
from engine.errors import ImageError, OutputError, from_os_error
from engine.photo import Photo


def read_photo(path: Path) -> Photo:
    """Read a photo from a file.

    Raises:
        ImageError: missing, not an image, truncated, animated, empty or too large.
    """
    try:
        with damage_told(path):
            if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
                raise ImageError("is not a file", where=path, expected="an image file")
            return decode(path, path, None)
    except FileNotFoundError:
        raise ImageError("no such file", where=path, fix="check the path") from None
    except IsADirectoryError:
        raise ImageError("is a folder", where=path, expected="an image file") from None
    except PermissionError:
        raise ImageError("no permission to read it", where=path) from None


def check_output(path: Path, photo: Photo | None = None, *, overwrite: bool = False) -> None:
    """Find out, before the work, whether a result could be written.

    Args:
        path: where it would go.
        photo: that it would be made from, if it was read already.
        overwrite: whether a file that is there may be replaced.
    Raises:
        OutputError: an unknown format, a file that is there, a folder that is missing or not
            writable, or a format that cannot hold the photo.
    """
    format_of(path.suffix, path)
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
    if photo is not None:
        check_format(photo, path.suffix, path)


def list_images(folder: Path) -> list[Path]:
    """Return the images of a folder by name, without hidden files and subfolders."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in READ_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def write_photo(path: Path, photo: Photo, history: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write a photo, whole or not at all.

    Args:
        path: its ending tells the format.
        photo: with what is to be carried along.
        history: how it was made; `read_history` gives it back.
        overwrite: replace a file that is there.
    Raises:
        OutputError: as `check_output`, or the disk is full.
    """
    check_output(path, photo, overwrite=overwrite)
    write_file(path, encode_photo(photo, path.suffix, history, path))


def write_file(path: Path, encoded: bytes) -> None:
    """Write an encoded image, whole or not at all.

    Raises:
        OutputError: the disk is full, or the place cannot be written to.
    """
    temporary = path.with_name(f".{os.getpid()}.part")  # short: the name itself may be as long as names can be
    try:
        try:
            temporary.write_bytes(encoded)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise from_os_error(error, path, "write the image") from error


def read_history(path: Path) -> dict[str, Any]:
    """Return what `write_photo` noted in a file.

    Raises:
        ImageError: it cannot be read, or holds no such note.
    """
    photo = read_photo(path)
    exif = Image.Exif()
    exif.load(photo.exif or b"")
    note = exif.get_ifd(ExifTags.IFD.Exif).get(HISTORY_TAG)
    try:
        history = json.loads(note) if isinstance(note, str) else None
    except ValueError:
        history = None
    if not isinstance(history, dict):
        raise ImageError("holds no settings", where=path, expected="a result of this engine, not re-saved since")
    return history
