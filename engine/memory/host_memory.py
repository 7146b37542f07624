"""The computer's memory: how much there is, how much was held, and giving back what is free."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache

#: glibc's number of this parameter; setting it also ends that it changes by itself.
_M_MMAP_THRESHOLD = -3


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

    glibc keeps freed blocks under 32 MiB for the next allocation: of a graph's weights that is most. After
    ONNX Runtime has closed SDXL's second text tower, 3.2 GiB were held, and 0.4 GiB after this. Other C
    libraries give memory back by themselves, or do not let themselves be asked.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def return_large_blocks_at_once() -> None:
    """Let blocks over 1 MiB go back to the system whenever they are freed, from now on, in this process.

    Once a block of nearly 32 MiB was freed, glibc takes all smaller ones from a heap that only ever shrinks at
    its end. Compiling SDXL's ControlNet then held 8.3 GiB at its peak, and holds 5.9 GiB in a fresh process. For
    programs that work in large blocks and seldom: each costs a system call.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@lru_cache(maxsize=1)
def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if libc is not None and hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
