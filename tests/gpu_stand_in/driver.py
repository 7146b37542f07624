"""The driver's own interface for tests: its order, its device, faults, counts, and what is still there."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from gpu_stand_in.build import driver_library, kernel_library

OUT_OF_MEMORY, LAUNCH_FAILED = 2, 719
#: Bytes that a context takes of the device, as the driver plays it.
CONTEXT_BYTES = 300 << 20
_COUNTED = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_long)
_TOLD = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@cache
def library() -> ctypes.CDLL:
    """Load the driver. Whoever asks for libcuda.so.1 in this process from now on gets it, by its soname."""
    os.environ["CUDA_STANDIN_KERNELS"] = str(kernel_library())
    found = ctypes.CDLL(str(driver_library()))
    found.standin_device.argtypes = [ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    found.standin_capturing.argtypes = [ctypes.c_void_p]
    found.standin_fail.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    found.standin_fail.restype = ctypes.c_long
    found.standin_peak.restype = ctypes.c_size_t
    found.cuLaunchHostFunc.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return found


def device(
    memory_bytes: int = 24 << 30, name: str = "Stand-in RTX 4090", capability: str = "8.9", cuda: str = "13.5"
) -> None:
    """Set what GPU there is."""
    major, minor = map(int, capability.split("."))
    newest, update = map(int, cuda.split("."))
    library().standin_device(memory_bytes, name.encode(), major, minor, newest * 1000 + update * 10)


def order(name: str, seed: int = 0) -> None:
    """Set when work is done: "lazy", "eager" or "random"."""
    library().standin_order(name.encode(), seed)


@contextmanager
def fault(function: str, nth: int, error: int, *, sticky: bool = False) -> Iterator[Fault]:
    """Let the nth call of a function in this context return an error, and if it is sticky, all later calls of any."""
    made = Fault()
    library().standin_fail(function.encode(), nth, error, sticky)
    try:
        yield made
    finally:
        made.happened = library().standin_fail(b"", 0, 0, False) == 0


class Fault:
    """Whether there was an nth call; known once its context has ended."""

    happened = False


def counts() -> dict[str, int]:
    """Return how often each function was called since the last time."""
    found: dict[str, int] = {}
    library().standin_counts(_COUNTED(lambda name, number: found.__setitem__(name.decode(), number)))
    return found


def alive() -> dict[str, int]:
    """Return how many of each kind were made and are still there."""
    found: dict[str, int] = {}
    library().standin_alive(_COUNTED(lambda name, number: found.__setitem__(name.decode(), number)))
    return found


def broken() -> list[str]:
    """Return the rules that were broken since the last time."""
    found: list[str] = []
    library().standin_broken(_TOLD(lambda text: found.append(text.decode())))
    return found


def peak_bytes() -> int:
    """Return the most memory of the device that was in use since the last time."""
    return int(library().standin_peak())


def is_capturing(stream: int) -> bool:
    """Tell whether a stream is being recorded, by its handle."""
    return bool(library().standin_capturing(stream))
