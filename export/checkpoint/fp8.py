"""8-bit floating-point weights, widened exactly, with the scales that ComfyUI and others store beside them.

A weight is its 8-bit value, or that times a scale: one for the tensor, or one for each output. All
256 values are numbers of float32; a scaled one needs float64 to be exact.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError
from export.checkpoint.mapped import StoredTensor, shorten

_VALUES: dict[np.dtype[Any], NDArray[np.float32]] = {
    np.dtype(kind): np.arange(256, dtype=np.uint8).view(kind).astype(np.float32)
    for kind in (
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e4m3fnuz,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e5m2fnuz,
    )
}
#: The scale of a layer's weight, by ComfyUI's older and newer names, and DeepSeek's.
_SCALE = re.compile(r"(?P<layer>.+)\.(scale_weight|weight_scale|weight_scale_inv)")
#: Marks of a file, and scales of what goes into a layer: no part of its weights.
_UNUSED = re.compile(r"(.+\.)?(scaled_fp8|scale_input|input_scale)")
#: How ComfyUI says what a layer's weight is: JSON, as bytes.
_FORMAT = re.compile(r"(?P<layer>.+)\.comfy_quant")
_FIX = "give the checkpoint in fp16, bf16 or fp32, or in 8-bit floats with a scale per tensor or output"


def widen(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return tensors without scales and marks, and with 8-bit weights as float32, or float64 where they are scaled.

    Raises:
        CheckpointError: a scale has no weight or does not fit it, or the weights are quantized in another way.
    """
    tensors: dict[str, StoredTensor] = {}
    scales: dict[str, str] = {}
    for name, tensor in stored.items():
        scale, mark = _SCALE.fullmatch(name), _FORMAT.fullmatch(name)
        if scale:
            scales[f"{scale['layer']}.weight"] = name
        elif mark:
            _check_format(name, tensor)
        elif not _UNUSED.fullmatch(name):
            tensors[name] = (
                replace(tensor, dtype=np.dtype(np.float32), read=_widened(tensor)) if _is_fp8(tensor) else tensor
            )
    for name, scale_name in scales.items():
        if name not in tensors:
            raise CheckpointError(
                "a scale without a weight",
                where=shorten(scale_name),
                expected=shorten(name),
                found="no such tensor",
                fix=_FIX,
            )
        tensors[name] = _times(tensors[name], stored[scale_name], scale_name)
    return tensors


def _is_fp8(tensor: StoredTensor) -> bool:
    return tensor.dtype in _VALUES


def _widened(tensor: StoredTensor) -> Any:
    values = _VALUES[tensor.dtype]
    return lambda: values[tensor.read().view(np.uint8)]


def _times(tensor: StoredTensor, scale: StoredTensor, name: str) -> StoredTensor:
    outputs = tensor.shape[:1]
    per_tensor = math.prod(scale.shape) == 1
    if not per_tensor and (scale.shape[:1] != outputs or math.prod(scale.shape) != outputs[0]):
        raise CheckpointError(
            "a scale does not fit its weight",
            where=shorten(name),
            expected=f"one number, or {list(outputs)}",
            found=list(scale.shape),
            fix=_FIX,
        )
    if tensor.dtype.kind not in "fV" and tensor.dtype.name != "bfloat16":
        return tensor  # whole numbers: refused for their type, as all are
    shape = (1,) * len(tensor.shape) if per_tensor else (*outputs, *(1,) * (len(tensor.shape) - 1))

    def read() -> NDArray[np.float64]:
        return tensor.read().astype(np.float64) * scale.read().astype(np.float64).reshape(shape)

    return replace(tensor, dtype=np.dtype(np.float64), read=read)


def _check_format(name: str, tensor: StoredTensor) -> None:
    try:
        found = json.loads(np.ascontiguousarray(tensor.read()).tobytes())["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "cannot tell how a weight is quantized",
            where=shorten(name),
            expected='JSON with a "format"',
            found=shorten(str(error)),
            fix=_FIX,
        ) from error
    if not str(found).startswith("float8_"):
        raise CheckpointError(
            "a weight is quantized in a way that is not supported",
            where=shorten(name),
            expected="float8_e4m3fn or float8_e5m2",
            found=shorten(str(found)),
            fix=_FIX,
        )
