"""A server's shared memory: the regions through which its Python models get their tensors, under names of its own.

Triton names regions at random and leaves them behind where it is killed. Here they carry the name of a lock that the
server's processes hold as long as one of them lives: who gets the lock knows that nobody uses the regions any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path

_FOLDER = Path("/dev/shm")


class SharedMemory:
    """The names of one server's regions, taken until `remove`.

    Attributes:
        prefix: of the names.
        descriptor: of the lock's file, which the server's processes must inherit.
    """

    def __init__(self) -> None:
        while True:
            self.prefix = f"{_ours()}{secrets.token_hex(8)}-"
            # Nobody foresees the name, and a file or link that is there is not opened.
            lock = _lock_of(self.prefix)
            self.descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self.descriptor, fcntl.LOCK_EX)
            if os.fstat(self.descriptor).st_nlink:
                return
            os.close(self.descriptor)  # somebody cleaned up before it was locked

    def bytes(self) -> int:
        """Return how much memory the regions take."""
        return sum(_bytes_of(file) for file in _regions(self.prefix))

    def close_to_others(self) -> None:
        """Keep other users of the computer from reading photos; Triton lets them, whatever the process's umask is.

        To be called when all regions are there, and before the first request is.
        """
        for file in _regions(self.prefix):
            file.chmod(0o600)

    def remove(self) -> None:
        """Remove the regions and give the names back; the server must have ended."""
        _remove(self.prefix)
        os.close(self.descriptor)


def remove_left_behind() -> list[str]:
    """Remove the shared memory of this user's servers that have ended without doing so; returns the regions' names."""
    removed = []
    for lock in _FOLDER.glob(f"{_ours()}*-lock"):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # somebody else's, or gone
            continue
        try:
            if os.fstat(descriptor).st_uid != os.getuid():
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # its server lives
            continue
        else:
            removed += _remove(lock.name.removesuffix("lock"))
        finally:
            os.close(descriptor)
    return removed


def _ours() -> str:
    return f"restoration-{os.getuid()}-"


def _lock_of(prefix: str) -> Path:
    return _FOLDER / f"{prefix}lock"


def _regions(prefix: str) -> list[Path]:
    return [file for file in _FOLDER.glob(f"{prefix}*") if file != _lock_of(prefix)]


def _remove(prefix: str) -> list[str]:
    """Remove regions, and their lock at last, so that a removal which is broken off can be finished by another."""
    regions = _regions(prefix)
    for file in (*regions, _lock_of(prefix)):
        with contextlib.suppress(OSError):  # somebody else's: the folder is everybody's
            file.unlink()
    return [file.name for file in regions]


def _bytes_of(file: Path) -> int:
    try:
        return file.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
