"""SHA-256 of files, and a memory of those of large ones.

A bundle of real checkpoints is 10 to 20 GB, and hashing it takes longer than loading it. So the hash of a
large file is kept in the user's cache folder and taken from there as long as the file's inode, size and
times of change are what they were: what git's index does. Any write changes them.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ValidationError

from engine.bundle.storage import cache_dir, write_cache

#: Smaller files are hashed in a tenth of a second.
WORTH_KEEPING_BYTES = 64 << 20
#: A file that was changed this recently may be changed again without another time: some clocks tick so slowly.
SETTLED_NS = 2_000_000_000
_CHUNK_BYTES = 1 << 20


class FileState(BaseModel):
    """What any write to a file changes."""

    device: int
    inode: int
    bytes: int
    modified_ns: int
    changed_ns: int


class _Entry(BaseModel):
    state: FileState
    sha256: str


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; of a large one that has not changed, from memory.

    Raises:
        OSError: it cannot be read. That the cache folder cannot be used is no error: it only costs time.
    """
    before = file_state(path)
    if before.bytes < WORTH_KEEPING_BYTES:
        return _hash(path)
    memory = cache_dir() / "hashes" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()}.json"
    with suppress(OSError, ValidationError):
        entry = _Entry.model_validate_json(memory.read_bytes())
        if entry.state == before:
            return entry.sha256
    now_ns = time.time_ns()
    found = _hash(path)
    settled = now_ns - max(before.modified_ns, before.changed_ns) > SETTLED_NS
    if settled and file_state(path) == before:
        write_cache(memory, _Entry(state=before, sha256=found).model_dump_json().encode())
    return found


def file_state(path: Path) -> FileState:
    """Return a file's state.

    Raises:
        OSError: there is no such file.
    """
    found = path.stat()
    return FileState(
        device=found.st_dev,
        inode=found.st_ino,
        bytes=found.st_size,
        modified_ns=found.st_mtime_ns,
        changed_ns=found.st_ctime_ns,
    )


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
