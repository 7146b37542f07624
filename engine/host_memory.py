"""The computer's memory: how much there is, how much was held, and giving back what is free."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from typing import Any


def total_memory_bytes() -> int | None:
    """Return how much memory the computer has, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def peak_memory_bytes() -> int | None:
    """Return the most memory that this process has held, None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_free_memory() -> None:
    """Give memory that this process has freed back to the system.

    glibc keeps blocks under 32 MiB that were freed for the next allocation: of a graph's weights that is most. After
    ONNX Runtime has closed SDXL's second text tower, 3.2 GiB were held, and 0.4 GiB after this. Other C
    libraries give memory back by themselves, or do not let themselves be asked.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
