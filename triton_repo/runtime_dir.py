"""The runtime directory of a server's processes: for this user only, named by the process that started them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from engine.errors import UsageError


def runtime_dir_of(server_pid: int) -> Path:
    """Return the folder of a server's processes."""
    return Path(tempfile.gettempdir()) / f"restoration-{os.getuid()}-{server_pid}"


def runtime_dir() -> Path:
    """Return the folder of this process's server, which is its parent.

    Raises:
        UsageError: somebody else owns it, or could enter it.
    """
    folder = runtime_dir_of(os.getppid())
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UsageError("belongs to somebody else", where=folder, fix="remove it")
    return folder
