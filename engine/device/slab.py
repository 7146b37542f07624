"""Arrays of a device in one piece of its memory: an allocation, and a wait for it, for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from engine.bundle.graphspec import DType
from engine.device.interface import Buffer, Device

#: Shapes and dtypes by name.
Arrays = Mapping[str, tuple[tuple[int, ...], DType]]

#: Bytes: TensorRT takes arrays that begin at multiples of 256.
_ALIGNMENT = 256


class Slab:
    """Arrays of one lifetime.

    Args:
        device: whose memory it is.
        arrays: that lie in it.
    Raises:
        OutOfMemoryError: the device has less.
    """

    def __init__(self, device: Device, arrays: Arrays) -> None:
        self._memory = device.buffer((max(1, slab_bytes(arrays) // 4),), "uint32")
        self._buffers: dict[str, Buffer] = {}
        offset = 0
        for name, (shape, dtype) in arrays.items():
            self._buffers[name] = self._memory.part(offset, shape, dtype)
            offset += _aligned(shape, dtype)

    def __getitem__(self, name: str) -> Buffer:
        return self._buffers[name]

    @property
    def buffers(self) -> Mapping[str, Buffer]:
        """The arrays by name: views, whose memory is the slab's."""
        return self._buffers

    def close(self) -> None:
        """Give the memory back; no work that uses it may be under way."""
        self._buffers = {}
        self._memory.close()


def slab_bytes(arrays: Arrays) -> int:
    """Return what a slab of some arrays takes."""
    return sum(_aligned(shape, dtype) for shape, dtype in arrays.values())


def _aligned(shape: tuple[int, ...], dtype: DType) -> int:
    return -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
