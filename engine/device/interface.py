"""What an accelerator promises: buffers, streams and events, and the kernels of sampling.

`engine.device.cuda` keeps the promise on NVIDIA's GPUs; the tests keep it in NumPy, and write down every call.
Work is put on a stream and runs there in order; nothing waits for it unless a method says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.bundle.graphspec import DType

Array = NDArray[Any]

#: The first has the way to the result on it, the second what can be done beside it.
STREAMS = ("main", "side")


def host_dtype(dtype: DType) -> np.dtype[Any]:
    """Return NumPy's dtype of a spec's. NumPy has no bfloat16: such values are in float32 on the host."""
    return np.dtype("float32" if dtype == "bfloat16" else dtype)


class Buffer(Protocol):
    """Memory of the device, as an array that lies there row by row.

    Attributes:
        shape, dtype: of the array.
        address: of its first byte, for libraries.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> DType: ...

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def rows(self, start: int, stop: int) -> Buffer:
        """Return a view of some of the first axis; the memory stays this buffer's."""
        ...

    def part(self, offset: int, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """Return a view of another array that lies in the memory from a byte on; it stays this buffer's."""
        ...

    def close(self) -> None:
        """Give the memory back; no work that uses it may be under way."""
        ...


class Event(Protocol):
    """A point in a stream's work."""

    @property
    def is_done(self) -> bool: ...

    def synchronize(self) -> None:
        """Wait here until the stream has come to it; the stream goes on."""
        ...

    def ms_since(self, earlier: Event) -> float:
        """Return the milliseconds between two points that were passed."""
        ...


class Download(Protocol):
    """An array on its way to the host."""

    def result(self) -> Array:
        """Wait for it and return it."""
        ...


class Replay(Protocol):
    """Work that was recorded once and can be started with one call."""

    def launch(self, stream: Stream) -> None: ...

    def close(self) -> None: ...


class Stream(Protocol):
    """Work in order.

    Attributes:
        handle: for libraries.
    """

    @property
    def handle(self) -> int: ...

    def upload(self, target: Buffer, source: Array) -> None:
        """Copy a host array, of the buffer's shape and dtype; it may change as soon as this returns."""
        ...

    def download(self, source: Buffer) -> Download:
        """Copy a buffer to the host, as it is when the stream comes to it."""
        ...

    def copy(self, target: Buffer, source: Buffer) -> None:
        """Copy between buffers of one shape and dtype."""
        ...

    def launch(self, kernel: str, count: int, *arguments: Buffer | int | None) -> None:
        """Run one of `engine.device.kernels.KERNELS` on `count` elements; None is a buffer that is not read."""
        ...

    def record(self) -> Event:
        """Mark the end of the work so far."""
        ...

    def wait(self, event: Event) -> None:
        """Let later work wait for another stream's event; the host does not."""
        ...

    def capture(self, enqueue: Callable[[Stream], None]) -> Replay:
        """Record what `enqueue` puts on the stream it is given, without running it."""
        ...

    def synchronize(self) -> None:
        """Wait here for all work of the stream."""
        ...


class Device(Protocol):
    """An accelerator; closing it gives back everything that was made with it."""

    @property
    def name(self) -> str: ...

    @property
    def compute_capability(self) -> str: ...

    def activate(self) -> None:
        """Make it the device of the calling thread: libraries go by that."""
        ...

    def stream(self) -> Stream: ...

    def buffer(self, shape: Sequence[int], dtype: DType) -> Buffer:
        """Return new memory, its values not set.

        Raises:
            BackendError: there is not enough.
        """
        ...

    def memory_bytes(self) -> tuple[int, int]:
        """Return how much memory is free, and how much there is."""
        ...

    def close(self) -> None: ...
