"""Tensors of a safetensors file, mapped.

The library checks the file and then is not asked for tensors: `safe_open(…, "numpy")` of
safetensors 0.8 copies each one, cannot read 8-bit floats, and reads bfloat16 only where something
has imported `ml_dtypes`. The format is simple enough to map: eight bytes of length, a JSON header
with the place of each tensor, and the tensors, contiguous and not necessarily aligned.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from engine.errors import CheckpointError
from export.checkpoint.mapped import DOWNLOAD_AGAIN, StoredTensor, map_file, shorten, tensor_at

#: 100,000 tensors or so. Reading a header of JSON takes ten times its size.
_MOST_HEADER_BYTES = 1 << 24

_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "C64": np.complex64,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, in the order of the header.

    Raises:
        CheckpointError: missing, damaged, or with a type that is no whole number of bytes.
    """
    mapping = map_file(path)
    try:
        return _read(path, mapping)
    except CheckpointError as error:
        raise error.at(path) from error.__cause__


def metadata(path: Path) -> dict[str, str]:
    """Return the text that a safetensors file's header has beside the tensors.

    Raises:
        CheckpointError: missing or damaged.
    """
    mapping = map_file(path)
    try:
        _header_size(mapping)
        return dict(_validated(path).metadata() or {})
    except CheckpointError as error:
        raise error.at(path) from error.__cause__


def _read(path: Path, mapping: mmap.mmap) -> dict[str, StoredTensor]:
    size = _header_size(mapping)
    handle = _validated(path)
    try:
        header: dict[str, Any] = json.loads(mapping[8 : 8 + size])
    except (ValueError, RecursionError) as error:  # of fields that the library does not look at
        raise _damaged(str(error)) from error
    header.pop("__metadata__", None)
    if set(header) != set(handle.keys()):
        raise _damaged("a header that can be read in two ways")
    tensors = {}
    for name, entry in header.items():
        try:
            view = handle.get_slice(name)
            tensors[name] = _tensor(mapping, 8 + size, entry, view.get_dtype(), view.get_shape())
        except CheckpointError as error:
            raise error.at(shorten(name)) from error.__cause__
    return tensors


def _header_size(mapping: mmap.mmap) -> int:
    size = int.from_bytes(mapping[:8], "little")
    if size > _MOST_HEADER_BYTES:
        raise _damaged(f"a header of {size} bytes")
    return size


def _validated(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise _damaged(str(error)) from error


def _tensor(mapping: mmap.mmap, data: int, entry: dict[str, Any], name: str, shape: list[int]) -> StoredTensor:
    """Return a tensor of the header, which the library must have understood in the same way.

    Args:
        data: where the tensors begin in the file.
        entry: of the header, as `json` reads it.
        name, shape: of the type, and of the tensor, as the library reads them.
    """
    if (entry["dtype"], entry["shape"]) != (name, shape):
        raise _damaged("a header that can be read in two ways")
    if name not in _DTYPES:
        raise CheckpointError(
            "a tensor is of a type that cannot be read",
            expected=", ".join(_DTYPES),
            found=name,
            fix="give an unquantized checkpoint",
        )
    dtype = _DTYPES[name]
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(mapping) - data or end - begin != math.prod(shape) * dtype.itemsize:
        raise _damaged("a tensor that lies outside of the file")
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return tensor_at(mapping, dtype, shape, strides, offset=0, start=data + begin, size=end - begin)


def _damaged(found: str) -> CheckpointError:
    return CheckpointError("not a whole safetensors file", found=shorten(found), fix=DOWNLOAD_AGAIN)
