"""Files of `torch.save` since 1.6, read without torch: a zip file of a pickle and of storages.

The pickle describes the tensors, and each storage is a member of its own, uncompressed, so that it
can be mapped. See `torch/csrc/jit/serialization` and `torch/serialization.py` for the format.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from engine.errors import CheckpointError
from export.checkpoint.mapped import MOST_DIMENSIONS, StoredTensor, map_file, shorten, tensor_at
from export.checkpoint.state_pickle import MOST_BYTES, Function, damaged, load_state_pickle, refuse
from export.checkpoint.zip_members import Member, find_members


@dataclass(frozen=True)
class _StorageType:
    """What stands for `torch.FloatStorage` and so on.

    Attributes:
        dtype: of its elements.
        untyped: whether each tensor brings its own dtype.
    """

    dtype: np.dtype[Any]
    untyped: bool = False


@dataclass(frozen=True)
class _Storage:
    """A storage that the pickle refers to, which is in the file."""

    type: _StorageType
    member: Member


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the pickle describes it: in elements, unchecked but for types."""

    storage: _Storage
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_torch_zip(path: Path) -> bool:
    """Tell whether a file begins as zip files do.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(2) == b"PK"
    except OSError as error:
        raise CheckpointError("cannot read the file", where=path, found=error.strerror) from error


def read_torch_zip(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file that `torch.save` wrote, by name: of its `state_dict`, where it has one.

    The file is mapped, and only its pickle is read. Nothing checks the tensors' bytes.

    Raises:
        CheckpointError: missing, damaged, or more than a dictionary of plain tensors.
    """
    mapping = map_file(path)
    try:
        if mapping[:2] != b"PK":
            raise CheckpointError("not a zip file of torch.save", expected="PK", found=shorten(str(mapping[:2])))
        content = _read_pickle(mapping)
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        if not isinstance(content, dict):
            raise CheckpointError("not a dictionary of tensors", expected="tensors by name", found=_kind(content))
        return {_name(name): _stored(mapping, name, value) for name, value in content.items()}
    except CheckpointError as error:
        raise error.at(path) from error.__cause__


def _read_pickle(mapping: mmap.mmap) -> object:
    members = find_members(mapping)
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise CheckpointError(
            "not a checkpoint of torch.save", expected="one folder with data.pkl", found=f"{len(roots)} of them"
        )
    order = members.get(f"{roots[0]}byteorder")
    if order is not None and (found := mapping[order.start : order.start + min(order.size, 9)]) != b"little":
        raise CheckpointError(
            "the numbers have another order of bytes",
            expected="little",
            found=shorten(found.decode(errors="replace")),
            fix="load and save it again on a computer with a little-endian processor",
        )
    pickled = members[f"{roots[0]}data.pkl"]

    types: dict[str, _StorageType] = {}

    def find_storage(persistent_id: object) -> _Storage:
        return _find_storage(members, f"{roots[0]}data/", types, persistent_id)

    # One byte more than is accepted is enough to be refused.
    data = mapping[pickled.start : pickled.start + min(pickled.size, MOST_BYTES + 1)]
    return load_state_pickle(data, _find_global, find_storage)


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise CheckpointError("a tensor's name is no text", where=name)
    return name


def _stored(mapping: mmap.mmap, name: str, value: object) -> StoredTensor:
    if not isinstance(value, _Tensor):
        raise CheckpointError(
            "the pickle holds more than tensors", where=shorten(name), expected="a tensor", found=_kind(value)
        )
    try:
        member = value.storage.member
        return tensor_at(
            mapping,
            value.dtype,
            value.shape,
            value.strides,
            offset=value.offset,
            start=member.start,
            size=member.size,
        )
    except CheckpointError as error:
        raise error.at(shorten(name)) from error.__cause__


def _kind(value: object) -> str:
    return type(value).__name__.removeprefix("_")


# -- what the pickle may name ---------------------------------------------------------------------


def _find_storage(
    members: Mapping[str, Member], folder: str, known: dict[str, _StorageType], persistent_id: object
) -> _Storage:
    """Return the storage of a persistent id, whose type joins the `known` ones by key."""
    if type(persistent_id) is not tuple or len(persistent_id) != 5:
        refuse("a reference to what is no storage")
    word, kind, key, place, length = persistent_id
    classes = (type(word), type(kind), type(key), type(place), type(length))
    if classes != (str, _StorageType, str, str, int) or word != "storage":
        refuse("a reference to what is no storage")
    member = members.get(folder + key)
    if member is None:
        damaged(f"no storage {key}")
    if member.size != length * kind.dtype.itemsize:
        damaged(f"storage {key} has {member.size} bytes, not {length} × {kind.dtype.itemsize}")
    # torch writes no such file, and would read all of it as the first type.
    if known.setdefault(key, kind) != kind:
        damaged(f"storage {key} has two types")
    return _Storage(kind, member)


def _rebuild_tensor(arguments: tuple[Any, ...], dtype: np.dtype[Any] | None = None) -> _Tensor:
    """Do as `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None)`."""
    if len(arguments) not in (6, 7):
        damaged("a tensor of too few or too many arguments")
    storage, offset, shape, strides = arguments[:4]
    if type(storage) is not _Storage or storage.type.untyped != (dtype is not None):
        damaged("a tensor of another storage than its kind has")
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= MOST_DIMENSIONS:
        damaged("a tensor whose shape and strides do not fit together")
    if any(type(number) is not int for number in (offset, *shape, *strides)):
        damaged("a tensor whose shape is no numbers")
    if any(arguments[6:]):
        raise CheckpointError("a tensor is a negated or conjugated view", fix="save plain tensors")
    return _Tensor(storage, storage.type.dtype if dtype is None else dtype, offset, shape, strides)


def _rebuild_tensor_of_dtype(arguments: tuple[Any, ...]) -> _Tensor:
    """Do as `_rebuild_tensor_v3`, which has a dtype before the metadata, and untyped storages."""
    if len(arguments) < 7 or not isinstance(arguments[6], np.dtype):
        damaged("a tensor without a type")
    return _rebuild_tensor(arguments[:6] + arguments[7:], arguments[6])


def _rebuild_parameter(arguments: tuple[Any, ...]) -> _Tensor:
    """Do as `_rebuild_parameter(data, requires_grad, hooks)`, and return the tensor."""
    if len(arguments) != 3 or not isinstance(arguments[0], _Tensor):
        damaged("a parameter of too few or too many arguments, or without a tensor")
    return arguments[0]


def _ordered_dict(arguments: tuple[Any, ...]) -> OrderedDict[str, Any]:
    if arguments:
        refuse("an OrderedDict with arguments")
    return OrderedDict()


_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
#: Types without a storage class, which torch saves by `_rebuild_tensor_v3`.
_NEW_DTYPES: dict[str, Any] = {
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}
_GLOBALS: dict[str, object] = {
    "collections.OrderedDict": Function(_ordered_dict),
    "torch._utils._rebuild_tensor_v2": Function(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": Function(_rebuild_tensor_of_dtype),
    "torch._utils._rebuild_parameter": Function(_rebuild_parameter),
    "torch.storage.UntypedStorage": _StorageType(np.dtype(np.uint8), untyped=True),
    **{f"torch.{name}": _StorageType(np.dtype(dtype)) for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": np.dtype(dtype) for name, dtype in _NEW_DTYPES.items()},
}
_UNSUPPORTED = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (of the device meta)",
}


def _find_global(name: str) -> object:
    if name in _UNSUPPORTED:
        raise CheckpointError(
            "the pickle holds a tensor of an unsupported kind",
            expected="plain tensors",
            found=f"{_UNSUPPORTED[name]}: {name}",
            fix="give a checkpoint of plain tensors, or convert it with torch",
        )
    if name not in _GLOBALS:
        refuse(name)
    return _GLOBALS[name]
