"""Pickles in the format that torch wrote before version 1.6, read by torch itself; such files cannot be mapped."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import torch
from numpy.typing import NDArray

from engine.errors import CheckpointError
from export.checkpoint.mapped import DOWNLOAD_AGAIN, MOST_REPEATED_BYTES, StoredTensor


def read_torch_legacy(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file, by their names; `weights_only=True`, so no code of the file runs.

    Raises:
        CheckpointError: damaged, or a pickle of more than tensors.
    """
    try:
        with path.open("rb") as file:  # given a name, torch tells some formats by it
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "the pickle holds more than tensors, so it is not loaded: it could run any code",
            where=path,
            expected="a dictionary of tensors",
            found=_first_sentence(error),
            fix="convert it to .safetensors where you trust it",
        ) from error
    except Exception as error:  # of a damaged file, whatever the pickle's instructions stumble over
        raise CheckpointError(
            "not a whole checkpoint", where=path, found=_first_sentence(error), fix=DOWNLOAD_AGAIN
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(
            "not a dictionary of tensors", where=path, expected="tensors by name", found=type(content).__name__
        )
    return {_name(path, name): _stored(f"{path}: {name}", value) for name, value in content.items()}


def _name(path: Path, name: object) -> str:
    if not isinstance(name, str):
        raise CheckpointError("a tensor's name is no text", where=path, found=name)
    return name


def _stored(where: str, value: object) -> StoredTensor:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(
            "the pickle holds more than tensors", where=where, expected="a tensor", found=type(value).__name__
        )
    tensor = value.detach()
    plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_complex())
    if not plain or tensor.device.type != "cpu":
        raise CheckpointError(
            "the pickle holds a tensor of an unsupported kind",
            where=where,
            expected="plain tensors",
            found=f"{tensor.dtype}, {tensor.layout}, on {tensor.device}",
            fix="give a checkpoint whose tensors are dense and unquantized",
        )
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.itemsize > max(stored, MOST_REPEATED_BYTES):
        raise CheckpointError(
            "a tensor is larger than what is stored of it",
            where=where,
            expected=f"at most {stored} bytes",
            found=f"shape {list(tensor.shape)}, strides {list(tensor.stride())}",
            fix="give a checkpoint whose weights are stored one by one",
        )
    array = _as_array(tensor)
    return StoredTensor(tuple(tensor.shape), array.dtype, 0, lambda: array)


def _as_array(tensor: torch.Tensor) -> NDArray[Any]:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _first_sentence(error: Exception) -> str:
    """Return the first sentence of torch's message, which colours its advice, without the colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split("\n")[0].split(". ")[0]
