"""Where on a computer the project keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

APP_NAME = "restoration-engine"


def cache_dir() -> Path:
    """Return the folder for traces and hashes: $RESTORE_CACHE or the user's cache folder."""
    named = os.environ.get("RESTORE_CACHE")
    return Path(named) if named else user_cache_path(APP_NAME)
