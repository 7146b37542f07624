"""Files of tensors, told by their content, as tensors that are read only when asked for.

Files are memory-mapped and opened read-only. Pickles are read by `export.checkpoint.torch_zip`,
which knows tensors and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError
from export.checkpoint import fp8
from export.checkpoint.keymap import Part
from export.checkpoint.mapped import DOWNLOAD_AGAIN, StoredTensor, shorten
from export.checkpoint.safetensors_file import metadata, read_safetensors
from export.checkpoint.torch_zip import is_torch_zip, read_torch_zip

_FLOATS = ("float64", "float32", "float16", "bfloat16")
#: Numbers that are no weights, so that they may be whole: a LoRA's alpha, tables of positions, marks of a model.
_MAY_BE_WHOLE = (".alpha", "mask_LQ", "logit_scale", "embeddings.position_ids", "v_pred", "ztsnr")
#: What people have instead of a checkpoint, by how the file begins, and what to do.
_NO_CHECKPOINTS = (
    (b"GGUF", "a GGUF file, which holds quantized weights", "give the checkpoint as .safetensors, in fp16 or fp8"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file", "run git lfs pull, or download the file itself"),
    (b"<", "a web page", DOWNLOAD_AGAIN),
)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, not read yet.

    Attributes:
        name: in the file.
        file: that holds it.
        shape: of what `read` returns.
        read: returns it, in the dtype of the file; 8-bit floats are widened, see `fp8`.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]

    def part(self, part: Part) -> LazyTensor:
        """Return a part of this tensor (see `keymap.Part`), as lazily."""
        if part == "whole":
            return self
        cut, shape = _CUTS[part]
        return LazyTensor(self.name, self.file, shape(self.shape), lambda: cut(self.read()))


def _third(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0] // 3, *shape[1:]) if shape else ()


_CUTS: dict[Part, tuple[Callable[[NDArray[Any]], NDArray[Any]], Callable[[tuple[int, ...]], tuple[int, ...]]]] = {
    # A kernel of one pixel; any other keeps its shape, which then fits nowhere.
    "matrix": (lambda t: t.reshape(t.shape[:2]), lambda s: s[:2] if set(s[2:]) <= {1} else s),
    "transposed": (lambda t: np.ascontiguousarray(t.T), lambda s: s[::-1]),
    "q": (lambda t: np.split(t, 3)[0], _third),
    "k": (lambda t: np.split(t, 3)[1], _third),
    "v": (lambda t: np.split(t, 3)[2], _third),
}
#: The bits of a number's exponent, by the number's size in bytes; all are set in infinities and NaN.
_EXPONENTS = {
    "float64": (np.uint64, 0x7FF0_0000_0000_0000),
    "float32": (np.uint32, 0x7F80_0000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}
_BLOCK_VALUES = 1 << 20


def is_finite(array: NDArray[Any]) -> bool:
    """Tell whether an array holds neither infinities nor NaN; whole numbers never do."""
    if array.dtype.name not in _EXPONENTS:
        return True
    # Whole numbers are compared: NumPy takes thirty times as long to compare float16 values.
    kind, exponent = _EXPONENTS[array.dtype.name]
    bits = array.reshape(-1).view(kind)
    mask: Any = kind(exponent)
    blocks = (bits[start : start + _BLOCK_VALUES] for start in range(0, len(bits), _BLOCK_VALUES))
    return all(int(np.bitwise_and(block, mask).max()) != exponent for block in blocks)


def open_file(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a safetensors file or of a pickle of tensors, by their names in it.

    Raises:
        CheckpointError: missing, truncated, quantized, or a pickle of anything but tensors.
    """
    try:
        is_there = path.is_file()
    except OSError as error:  # a name that is too long
        raise CheckpointError("no such file", where=path, found=error.strerror, fix="check the path") from error
    if not is_there:
        raise CheckpointError("no such file", where=path, fix="check the path")
    if not os.access(path, os.R_OK):
        raise CheckpointError("no permission to read it", where=path)
    stored = _stored(path)
    try:
        stored = fp8.widen(stored)
    except CheckpointError as error:
        raise error.at(path) from error.__cause__
    tensors = {}
    for name, tensor in stored.items():
        if tensor.dtype.name not in _FLOATS and not name.endswith(_MAY_BE_WHOLE):
            raise CheckpointError(
                "a tensor is not of a plain floating-point type",
                where=f"{path}: {name}",
                expected=f"{', '.join(_FLOATS)}, or 8-bit floats",
                found=tensor.dtype.name,
                fix="give an unquantized checkpoint",
            )
        tensors[name] = LazyTensor(name, path, tensor.shape, tensor.read)
    return tensors


def metadata_of(path: Path) -> dict[str, str]:
    """Return what a safetensors file says of itself; nothing for a file of another format.

    Raises:
        CheckpointError: damaged.
    """
    return metadata(path) if _is_safetensors(_start(path)) else {}


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(32)
    except OSError as error:
        raise CheckpointError("cannot read the file", where=path, found=error.strerror) from error


def _is_safetensors(start: bytes) -> bool:
    """Tell a safetensors file by its header: a length in eight bytes, the upper ones zero, and an object of JSON."""
    return start[4:9] == b"\0\0\0\0{"


def _stored(path: Path) -> Mapping[str, StoredTensor]:
    start = _start(path)
    if _is_safetensors(start):
        return read_safetensors(path)
    if is_torch_zip(path):  # what torch has written since 1.6
        return read_torch_zip(path)
    if start.startswith(b"\x80"):  # the opcode that names a pickle's protocol
        return _read_legacy(path)
    for beginning, what, fix in _NO_CHECKPOINTS:
        if start.lstrip().startswith(beginning):
            raise CheckpointError(
                "not a checkpoint", where=path, expected="a .safetensors file or a pickle", found=what, fix=fix
            )
    if path.suffix == ".safetensors":
        return read_safetensors(path)  # whose error says what is damaged
    raise CheckpointError(
        "not a checkpoint",
        where=path,
        expected="a .safetensors file or a pickle",
        found=f"a file that begins with {shorten(str(start[:16]))}",
        fix=DOWNLOAD_AGAIN,
    )


def _read_legacy(path: Path) -> Mapping[str, StoredTensor]:
    try:
        from export.checkpoint.torch_legacy import read_torch_legacy
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise CheckpointError(
            "written in torch's format from before version 1.6, which only torch reads",
            where=path,
            fix="install torch (pip install -e '.[export]'), or convert the file to .safetensors",
        ) from None
    return read_torch_legacy(path)
