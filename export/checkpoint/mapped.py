"""Tensors that lie in a file which is mapped into memory: nothing is read before it is asked for.

A mapped file must stay as it is. Shortening it while it is in use ends the process (SIGBUS), as
with every mapped file.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError

DOWNLOAD_AGAIN = "download it again; a download that broke off leaves a truncated file"

#: Strides can repeat one stored value over any size. More than this is an attack on whoever reads it.
MOST_REPEATED_BYTES = 1 << 26
#: What NumPy 1 can do.
MOST_DIMENSIONS = 32


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
        shape: of the tensor.
        dtype: as stored; `ml_dtypes` has those that NumPy lacks.
        offset: of its first element in the file, in bytes.
        read: returns a read-only view of the mapped file, which keeps the mapping alive. The view
            may be unaligned, and strided where the stored tensor is.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    read: Callable[[], NDArray[Any]]


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory, read-only.

    Raises:
        CheckpointError: missing, empty, or not to be opened.
    """
    if not path.is_file():
        raise CheckpointError("no such file", where=path, fix="check the path")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # the empty file, which mmap refuses
        raise CheckpointError("the file is empty", where=path, fix=DOWNLOAD_AGAIN) from None
    except OSError as error:
        raise CheckpointError("cannot read the file", where=path, found=error.strerror) from error


def tensor_at(
    mapping: mmap.mmap,
    dtype: np.dtype[Any],
    shape: Sequence[int],
    strides: Sequence[int],
    *,
    offset: int,
    start: int,
    size: int,
) -> StoredTensor:
    """Return a tensor in a storage, which is a range of a mapped file.

    Args:
        mapping: the file.
        dtype: of the elements.
        shape, strides: in elements.
        offset: of the tensor in its storage, in elements.
        start, size: of the storage in the file, in bytes. The caller has checked them.

    Raises:
        CheckpointError: the tensor reaches outside of the storage, or is impossibly large.
    """
    if not len(shape) == len(strides) <= MOST_DIMENSIONS:
        raise CheckpointError(
            "a tensor's shape is impossible", expected=f"at most {MOST_DIMENSIONS} dimensions", found=len(shape)
        )
    whole, empty = size // dtype.itemsize, 0 in shape
    # A dimension of one element never uses its stride, which may then be any number.
    used = [(n - 1, stride if n > 1 and not empty else 0) for n, stride in zip(shape, strides, strict=True)]
    last = offset + sum(steps * stride for steps, stride in used)
    if min(offset, *shape, *strides, 0) < 0 or (last >= whole and not empty):
        raise CheckpointError(
            "a tensor reaches outside of its storage",
            expected=f"at most {whole} elements",
            found=shorten(f"shape {list(shape)}, strides {list(strides)}, offset {offset}"),
            fix=DOWNLOAD_AGAIN,
        )
    if math.prod(shape) * dtype.itemsize > max(size, MOST_REPEATED_BYTES):
        raise CheckpointError(
            "a tensor is larger than what is stored of it",
            expected=f"at most {size} bytes",
            found=shorten(f"shape {list(shape)}, strides {list(strides)}"),
            fix="give a checkpoint whose weights are stored one by one",
        )
    start = 0 if empty else start + offset * dtype.itemsize
    in_bytes = [stride * dtype.itemsize for _, stride in used]
    try:
        # NumPy checks the bounds once more, against the whole file.
        view: NDArray[Any] = np.ndarray(tuple(shape), dtype, mapping, start, in_bytes)
    except ValueError as error:  # empty, and yet too large in another dimension
        raise CheckpointError("a tensor's shape is impossible", found=shorten(str(list(shape)))) from error
    return StoredTensor(tuple(shape), dtype, start, lambda: view)


def shorten(text: str, most: int = 120) -> str:
    """Return a file's own words as messages can show them: on one line, and not at any length."""
    cut = text if len(text) <= most else f"{text[:most]}…"
    return cut if cut.isprintable() else ascii(cut)[1:-1]
