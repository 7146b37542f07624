"""The runtime directory of a server's processes: locks and sockets, for this user only, at a name nobody foresees."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from engine.errors import UsageError

#: Tells the server's processes where it is. Each would find another one where `tempfile` decides: it takes the first
#: folder that it can write to, which is not the same while a disk is full.
VARIABLE = "RESTORATION_RUNTIME_DIR"
#: Of a socket's path, by Linux, of which a stream's name takes 32 and a slash.
_LONGEST_PATH = 107 - 33


def make_runtime_dir() -> Path:
    """Make a folder for a server that is about to start.

    Raises:
        UsageError: its path is too long for sockets. OSError: it cannot be made.
    """
    folder = Path(tempfile.mkdtemp(prefix="restoration-"))
    if len(os.fsencode(folder)) > _LONGEST_PATH:
        folder.rmdir()
        raise UsageError(
            "the path of temporary files is too long for sockets",
            where=folder.parent,
            expected=f"up to {_LONGEST_PATH - len(folder.name) - 1} bytes",
            found=len(os.fsencode(folder.parent)),
            fix="set TMPDIR to a shorter one",
        )
    return folder


def runtime_dir() -> Path:
    """Return the folder of this process's server.

    Raises:
        UsageError: there is none, or somebody else owns it or could enter it.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        raise UsageError(
            "not set",
            where=VARIABLE,
            expected="a folder of this user's only",
            fix="start the server with triton_repo/serve.py, or set it",
        )
    folder = Path(name)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UsageError("others can enter it", where=folder, fix=f"set {VARIABLE} to a folder of this user's only")
    return folder
