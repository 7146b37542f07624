"""Where files are kept, and how they are written: beside their place, then moved there, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from platformdirs import user_cache_path

from engine.errors import OutputError, from_os_error

#: How a file is called while it is written, behind a dot and 32 hexadecimal digits.
_PART = ".part"
#: Nothing is written to for so long: a part is one write of what is in memory.
_PART_IS_STALE_S = 600.0


@contextmanager
def atomic_write(path: Path, action: str) -> Iterator[BinaryIO]:
    """Give a file to write to, which gets its name when it is whole, whatever ends the program or the computer.

    Args:
        path: that it gets; what is there is replaced.
        action: what errors call it, as in "write the image".
    Raises:
        OutputError: the disk is full, or the place cannot be written to.
    """
    # Short, since the name itself may be as long as names can be; and nobody else's, on any machine.
    temporary = path.with_name(f".{uuid.uuid4().hex}{_PART}")
    try:
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the name without the content
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise from_os_error(error, path, action) from error


def clean_stale_temp_files(folder: Path) -> None:
    """Remove what writers that were killed left in a folder; a part that may still be written to is left."""
    for part in folder.glob(f".{'[0-9a-f]' * 32}{_PART}"):
        with contextlib.suppress(OSError):  # somebody else's, or just now moved to its place
            if time.time() - part.stat().st_mtime > _PART_IS_STALE_S:
                part.unlink()


def plain_name(text: str) -> str:
    """Return a name as files have it, such as "nvidia-h200" of "NVIDIA H200"."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())


APP_NAME = "restoration-engine"


def cache_dir() -> Path:
    """Return the folder for all that can be made again: $RESTORE_CACHE or the user's cache folder."""
    named = os.environ.get("RESTORE_CACHE")
    return Path(named) if named else user_cache_path(APP_NAME)


def bundle_cache_dir(digest: str) -> Path:
    """Return the cache's folder for what a library has made of one bundle, such as kernels."""
    return cache_dir() / "bundles" / digest[:32]


def write_cache(path: Path, data: bytes) -> None:
    """Write a file of the cache; where that is not possible nothing is lost but time."""
    with contextlib.suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "write the cache") as file:
            file.write(data)
