"""The computer's memory: how much this process may use, how much it has held, and giving back what is free.

A container or a service often may use less than the computer has: Linux calls that the limit of a control group.
A process may have limits of its own (`ulimit -v`, `ulimit -d`).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import psutil

from engine.errors import OutOfMemoryError
from engine.units import format_memory

#: Measured: with 300 MiB of addresses libvips ends the process, with 400 MiB every library loads.
_LIBRARIES_BYTES = 400 << 20
#: glibc's number of this parameter; setting it also ends that it changes by itself.
_M_MMAP_THRESHOLD = -3


def total_memory_bytes(root: Path = Path("/")) -> int:
    """Return how much memory this process may use in all: the computer's, its own limits, or its groups'.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    limits = [group.limit for group in (*_control_groups(root), *_own_limits())]
    return min([psutil.virtual_memory().total, *limits])


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Return how much more memory this process may take now, without pushing anything out to the disk.

    That is what the computer has left, or less where a control group or the process is nearer to a limit. Copies of
    files that nobody has used lately count as free: Linux drops them where memory is needed.

    Args:
        root: as for `total_memory_bytes`.
    """
    left = (max(0, limited.limit - limited.in_use) for limited in (*_control_groups(root), *_own_limits()))
    return min([psutil.virtual_memory().available, *left])


@dataclass(frozen=True)
class _Limited:
    """A process or a group of them with a limit, in bytes, and what they use of it that cannot be dropped."""

    limit: int
    in_use: int


#: For each version of control groups: where its hierarchy lies, and the files of limit, use and what can be dropped.
_VERSIONS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _control_groups(root: Path) -> Iterator[_Limited]:
    """Yield the groups with a limit that this process belongs to: its own, and those that hold it."""
    paths = _group_paths(root / "proc/self/cgroup")
    for path, (mount, limit_file, use_file, dropped) in zip(paths, _VERSIONS, strict=True):
        if path is None:
            continue
        # Inside a container the path may be the host's; what is not there under that name is the mount itself.
        for place in (path, *path.parents):
            folder = root / mount / place
            limit, in_use = _number(folder / limit_file), _number(folder / use_file)
            if limit is not None:
                yield _Limited(limit, max(0, (in_use or 0) - _statistic(folder / "memory.stat", dropped)))


def check_addresses() -> None:
    """Find out whether this process may have the addresses that libraries reserve when they are loaded.

    To be asked before: libvips' own ends the process where it gets none, and nothing can be said any more.

    Raises:
        OutOfMemoryError: it may not.
    """
    left = min((limited.limit - limited.in_use for limited in _own_limits(["RLIMIT_AS"])), default=_LIBRARIES_BYTES)
    if left < _LIBRARIES_BYTES:
        raise OutOfMemoryError(
            "out of memory",
            expected=f"{format_memory(_LIBRARIES_BYTES)} of addresses for libraries alone",
            found=f"{format_memory(max(0, left))} left of this process's limit",
            fix="raise the limit (ulimit -v)",
        )


def _own_limits(names: Sequence[str] = ("RLIMIT_AS", "RLIMIT_DATA")) -> Iterator[_Limited]:
    """Yield the limits of this process on its addresses and its data, which count what it has asked for."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = psutil.Process().memory_info()
    for name in names:
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY:
            yield _Limited(limit, getattr(used, "data", used.vms) if name == "RLIMIT_DATA" else used.vms)


def _group_paths(file: Path) -> list[PurePosixPath | None]:
    """Return this process's group under version 2 and under version 1, None where there is none."""
    found: list[PurePosixPath | None] = [None, None]
    try:
        lines = file.read_text().splitlines()
    except OSError:  # not Linux
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # Outside of what a container sees, a path begins with "/..".
        inside = PurePosixPath(*(part for part in PurePosixPath(path).parts if part not in ("/", "..")))
        if not controllers:
            found[0] = inside
        elif "memory" in controllers.split(","):
            found[1] = inside
    return found


def _number(file: Path) -> int | None:
    """Return the number in a group's file; None where there is no such file, or no limit ("max")."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    """Return a line's number of a group's statistics, 0 where there is none."""
    try:
        lines = (line.split() for line in file.read_text().splitlines())
        return next((int(number) for key, number in lines if key == name), 0)
    except (OSError, ValueError):
        return 0


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
