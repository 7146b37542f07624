"""A bundle's files: what the manifest says of each, and the check that it is so.

A bundle may come from a stranger, so sizes are bounded, and pipes and devices, which may never end, are refused.
"""

from __future__ import annotations

import hashlib
import io
import math
import stat
import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.lib.format as npy
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from engine.bundle.hashing import FileState, file_state, hash_file
from engine.errors import BundleError, first_line

MANIFEST = "manifest.json"
REBUILD = "build it again: python export/build_engines.py --output {path}"
#: What a manifest, or a graph without its weights, may take; SDXL's largest is 3 MB.
MAX_TEXT_BYTES = 64 << 20
#: How the header of each version of `.npy` is read.
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}

#: Bytes of a file or of weights: what a disk can hold.
Bytes = Annotated[int, Field(ge=0, lt=1 << 53)]


def _plain_name(name: str) -> str:
    if not name.isprintable() or Path(name).name != name or name in ("", ".", "..", MANIFEST):
        raise ValueError("must be a file's name without a folder")
    return name


class File(BaseModel):
    """A file of the bundle, by its name inside the folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_plain_name)]
    bytes: Bytes
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def describe_file(path: Path) -> File:
    """Return the manifest's entry for a file of a bundle."""
    return File(name=path.name, bytes=path.stat().st_size, sha256=hash_file(path))


def check_file(folder: Path, entry: File) -> FileState:
    """Check a file's size and hash.

    Returns:
        The state that it had before it was hashed.
    Raises:
        BundleError: it is missing, changed, or cannot be read.
    """
    path = folder / entry.name
    try:
        size = plain_size(path)
        if size != entry.bytes:
            raise _changed(path, f"{entry.bytes} bytes", f"{size} bytes")
        state = file_state(path)
        found = hash_file(path)
    except FileNotFoundError:
        fix = REBUILD.format(path=folder)
        raise BundleError("a file of the bundle is missing", where=path, fix=fix) from None
    except OSError as error:
        raise BundleError(f"cannot be read: {error.strerror}", where=path) from error
    if found != entry.sha256:
        raise _changed(path, f"SHA-256 {entry.sha256[:16]}…", f"SHA-256 {found[:16]}…")
    return state


def check_again(folder: Path, entry: File, state: FileState) -> FileState:
    """Check that a file is still the one that was checked; one that was touched since is hashed again.

    A hard link touches a file too, as when a model repository is rendered.

    Args:
        folder: of the bundle.
        entry: of the file.
        state: that it had when it was checked.
    Returns:
        The state that it has now.
    Raises:
        BundleError: as `check_file`.
    """
    try:
        if file_state(folder / entry.name) == state:
            return state
    except OSError:
        pass  # `check_file` says what it is
    return check_file(folder, entry)


def read_checked(folder: Path, entry: File) -> bytes:
    """Return a small file's content, which is what its hash is of, whatever has become of the file since.

    Raises:
        BundleError: it is too large, changed, or cannot be read.
    """
    path = folder / entry.name
    try:
        content = read_bounded(path)
    except OSError as error:
        raise BundleError(f"cannot be read: {error.strerror}", where=path) from error
    found = hashlib.sha256(content).hexdigest()
    if found != entry.sha256:
        raise _changed(path, f"SHA-256 {entry.sha256[:16]}…", f"SHA-256 {found[:16]}…")
    return content


def read_bounded(path: Path) -> bytes:
    """Return a small file's content.

    Raises:
        OSError: there is none, or it cannot be read.
        BundleError: it is too large, or no plain file.
    """
    size = plain_size(path)
    if size > MAX_TEXT_BYTES:
        raise _too_large(path, size)
    return path.read_bytes()


def read_archived(archive: Path, name: str) -> bytes:
    """Return a small file of a zip archive.

    Raises:
        BundleError: it is not there, damaged, or too large, whatever size the archive says it has.
    """
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(name) as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    # Of a damaged archive zipfile raises a dozen kinds, from zlib.error to UnicodeDecodeError.
    except Exception as error:
        raise BundleError("cannot be read", where=f"{archive}: {name}", found=first_line(error)) from error
    if len(content) > MAX_TEXT_BYTES:
        raise _too_large(f"{archive}: {name}")
    return content


def read_archived_array(archive: Path, name: str) -> NDArray[Any]:
    """Return an array of numbers of an `.npz` archive; NumPy's own reading believes what the array says of its size.

    Raises:
        BundleError: it is not there, damaged, too large, or of objects.
    """
    content = read_archived(archive, f"{name}.npy")
    file = io.BytesIO(content)
    try:
        read_header = _HEADERS[npy.read_magic(file)]
        shape, by_columns, dtype = read_header(file)
        array = np.frombuffer(content, dtype, math.prod(shape), file.tell())  # which refuses objects
        return array.reshape(shape, order="F" if by_columns else "C")
    except Exception as error:  # of a header that is no Python, tokenize's own
        raise BundleError("is no array of numbers", where=f"{archive}: {name}", found=first_line(error)) from error


def plain_size(path: Path) -> int:
    """Return a file's size.

    Raises:
        OSError: there is none.
        BundleError: it is a pipe or a device.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BundleError("no plain file", where=path, fix="use a bundle from somebody you trust")
    return status.st_size


def _too_large(where: object, size: int | None = None) -> BundleError:
    found = None if size is None else f"{size} bytes"
    return BundleError("is too large", where=where, expected=f"up to {MAX_TEXT_BYTES} bytes", found=found)


def _changed(path: Path, expected: str, found: str) -> BundleError:
    fix = REBUILD.format(path=path.parent)
    return BundleError("a file of the bundle was changed", where=path, expected=expected, found=found, fix=fix)
