"""Claims on photos, so that runs into one folder share the work: each photo is restored by one of them at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

#: Behind a dot and 32 hexadecimal digits.
_LOCK = ".lock"
#: Short beside a photo's restoration, long beside a look at the disk.
_POLL_S = 0.2


@dataclass(frozen=True)
class Claim:
    """A photo that other runs leave alone until it is released. The system releases it where a run is killed.

    Attributes:
        lock: as it is held; None where the disk knows no locks. Then two runs may restore one photo, each of them
            writes the same file, and nothing but time is lost.
    """

    lock: FileLock | None

    def release(self) -> None:
        """Let other runs have the photo, if that was not done yet."""
        if self.lock is None or not self.lock.is_locked:
            return
        with contextlib.suppress(OSError):  # Windows keeps an open file
            os.unlink(self.lock.lock_file)  # while it is held: whoever comes later makes a new one
        self.lock.release()


def claim_photo(photo: Path, folder: Path) -> Claim | None:
    """Claim a photo for its results in a folder; None if another run has claimed it.

    Args:
        photo: its file, which runs on several machines must know by one path.
        folder: of its results.
    """
    digest = hashlib.sha256(os.fsencode(os.path.realpath(photo))).hexdigest()[:32]
    lock = FileLock(folder / f".{digest}{_LOCK}", thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        # Without a file nobody holds it: it was let go just now, or the disk takes no files, which writing will tell.
        return None if os.path.lexists(lock.lock_file) else Claim(None)
    except (OSError, NotImplementedError):  # no locks on this disk, or no permission, which writing will tell
        return Claim(None)
    return Claim(lock)


def wait_for_photo(photo: Path, folder: Path, stop: threading.Event) -> Claim | None:
    """Claim a photo as `claim_photo`, and wait while another run has it; None if `stop` was set meanwhile."""
    while (claim := claim_photo(photo, folder)) is None and not stop.wait(_POLL_S):
        pass
    return claim


def clean_stale_claims(folder: Path) -> None:
    """Remove what runs that were killed left of their claims in a folder; claims that are held stay."""
    for file in folder.glob(f".{'[0-9a-f]' * 32}{_LOCK}"):
        lock = FileLock(file, thread_local=False)
        with contextlib.suppress(OSError, NotImplementedError, Timeout):
            lock.acquire(blocking=False)
            Claim(lock).release()
