"""What played libraries put on streams: Python functions, which the driver calls when a stream comes to them."""

from __future__ import annotations

import ctypes
import itertools
import traceback
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gpu_stand_in import driver

#: What a library was asked for, and rules of its documentation that were broken, in order.
CALLS: list[tuple[object, ...]] = []
BROKEN: list[str] = []
_WORK: dict[int, Callable[[], None]] = {}
_NUMBERS = itertools.count(1)


def broken(rule: str) -> bool:
    """Note that a rule was broken; returns False, as the libraries do then."""
    BROKEN.append(rule)
    return False


def _run(number: int | None) -> None:
    work = _WORK.get(number or 0)
    if work is None:
        broken("work of a library was to be done after its owner was gone")
        return
    try:
        work()
    except BaseException:
        broken(f"work of a library failed: {traceback.format_exc(limit=3)}")


_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_run)


class Owner:
    """Who puts work on streams; once it is closed, nothing of it may be left to be done."""

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def enqueue(self, stream: int, work: Callable[[], None]) -> int:
        """Put work on a stream; returns the driver's error, 0 if there is none."""
        number = next(_NUMBERS)
        if driver.is_capturing(stream):
            _WORK[number] = work  # it may run again and again
        else:
            _WORK[number] = lambda: (_WORK.pop(number), work())[1]
        self._numbers.append(number)
        return int(driver.library().cuLaunchHostFunc(stream, _RUN, number))

    def close(self) -> None:
        """Forget all work."""
        for number in self._numbers:
            _WORK.pop(number, None)
        self._numbers.clear()


class DeviceMemory:
    """Memory of the device that a library takes for itself."""

    def __init__(self) -> None:
        self._address = ctypes.c_uint64(0)

    @property
    def is_there(self) -> bool:
        return self._address.value != 0

    def resize(self, nbytes: int) -> int:
        """Have so many bytes; returns the driver's error, 0 if there is none."""
        cuda = driver.library()
        context = ctypes.c_void_p()
        cuda.cuCtxGetCurrent(ctypes.byref(context))
        if not context:  # a thread that has none yet, as the one that collects garbage may be
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
            cuda.cuCtxSetCurrent(context)
        if self._address.value:
            cuda.cuMemFree_v2(self._address)
            self._address.value = 0
        return int(cuda.cuMemAlloc_v2(ctypes.byref(self._address), ctypes.c_size_t(nbytes))) if nbytes else 0

    def close(self) -> None:
        """Give it back."""
        self.resize(0)


def array_at(address: int, shape: tuple[int, ...], dtype: str) -> NDArray[np.generic]:
    """Return memory as an array, without a copy."""
    memory = (ctypes.c_char * (int(np.prod(shape)) * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


def is_inside(address: int, nbytes: int) -> bool:
    """Tell whether so many bytes from an address on are of one piece of the device's memory."""
    base, length = ctypes.c_uint64(), ctypes.c_size_t()
    found = driver.library().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(length), ctypes.c_uint64(address))
    return found == 0 and address + nbytes <= base.value + length.value
