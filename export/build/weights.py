"""The bundle's weights: one safetensors file, written in one pass, read by every graph.

Tensors are merged, cast and written a few at a time, so the model is never held in memory.
Graphs point into the file by offset (ONNX external data), and a new checkpoint of the same
architecture replaces this file alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from os import cpu_count
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.bundle.graphspec import DType
from engine.errors import BuildError, CheckpointError, from_os_error
from export.build import int8
from export.checkpoint.lora import LoadedLora, merge_into
from export.checkpoint.tensor_files import LazyTensor, is_finite
from export.graphs.definitions import NUMPY_DTYPES

#: What a tensor of the weights file may hold.
StoredType = DType | Literal["int8"]

WEIGHTS = "weights.safetensors"
#: Data starts at a page and large tensors at a cache line, for whoever maps the file.
_PAGE_BYTES = 4096
_LINE_BYTES = 64
_ITEM_BYTES: dict[StoredType, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_FORMAT_NAMES: dict[StoredType, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}


@dataclass(frozen=True)
class Weight:
    """Where a tensor lies in the weights file."""

    name: str
    dtype: StoredType
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def in_int8(self) -> tuple[Weight, Weight]:
        """Return the two tensors that hold a parameter in int8: its integers and its scales."""
        return Weight(self.name + int8.VALUES, "int8", self.shape), Weight(
            self.name + int8.SCALES, self.dtype, self.shape[:1]
        )


@dataclass(frozen=True)
class WeightsLayout:
    """The weights file before it is written: its header and every tensor's place."""

    header: bytes
    weights: dict[str, Weight]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(weight.bytes for weight in self.weights.values())

    def parameter_bytes(self, parameter: str) -> int:
        """Return what a parameter takes in the file, as it is or in int8."""
        places = (parameter, parameter + int8.VALUES, parameter + int8.SCALES)
        return sum(self.weights[name].bytes for name in places if name in self.weights)


def numpy_type(dtype: StoredType) -> np.dtype[Any]:
    """Return NumPy's type of a stored tensor."""
    return np.dtype(np.int8) if dtype == "int8" else NUMPY_DTYPES[dtype]


def plan_layout(wanted: Iterable[Weight]) -> WeightsLayout:
    """Return where each tensor will lie.

    Args:
        wanted: their names, dtypes and shapes; offsets are ignored.
    """
    # The format allows no gaps: what does not fill its last cache line goes to the end.
    ordered = sorted(wanted, key=lambda weight: weight.bytes % _LINE_BYTES != 0)
    starts = dict(zip(ordered, accumulate((weight.bytes for weight in ordered), initial=0), strict=False))
    entries = {
        weight.name: {
            "dtype": _FORMAT_NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [start, start + weight.bytes],
        }
        for weight, start in starts.items()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _PAGE_BYTES)  # trailing spaces are allowed, and meant for this
    header = struct.pack("<Q", len(text)) + text
    placed = {weight.name: replace(weight, offset=len(header) + start) for weight, start in starts.items()}
    return WeightsLayout(header, placed)


def write_weights(
    path: Path,
    layout: WeightsLayout,
    sources: Mapping[str, LazyTensor],
    loras: Sequence[LoadedLora],
    progress: Callable[[int], None] = lambda _: None,
) -> str:
    """Merge, cast and write all weights.

    Args:
        path: of the file; overwritten.
        layout: from `plan_layout`.
        sources: the base's tensors by the parameters' names.
        loras: merged in float64 before the cast.
        progress: told the bytes written since the last call.
    Returns:
        The file's SHA-256.
    Raises:
        CheckpointError: a value is not finite.
        BuildError: a value does not fit the precision.
        OutputError: the disk is full or not writable.
    """
    digest = hashlib.sha256(layout.header)
    try:
        with path.open("wb") as file:
            file.write(layout.header)
            for data in _merged(layout, sources, loras):
                file.write(data)
                digest.update(data)
                progress(len(data))
    except OSError as error:
        raise from_os_error(error, path, "write the weights") from error
    return digest.hexdigest()


def _merged(
    layout: WeightsLayout, sources: Mapping[str, LazyTensor], loras: Sequence[LoadedLora]
) -> Iterator[memoryview]:
    """Yield the bytes of every weight, in order; the next ones are computed while one is written."""
    workers = cpu_count() or 1
    with ThreadPoolExecutor(workers, "merging") as pool:
        ahead: deque[Future[memoryview]] = deque()
        try:
            for weight in layout.weights.values():
                parameter = int8.parameter_name(weight.name)
                ahead.append(pool.submit(_one, weight, layout, sources[parameter], loras))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()


def _one(weight: Weight, layout: WeightsLayout, source: LazyTensor, loras: Sequence[LoadedLora]) -> memoryview:
    """Return the bytes of one weight, merged and cast."""
    base = source.read()
    where = f"{source.file.name}: {source.name}"
    if not is_finite(base):
        raise CheckpointError("a tensor holds values that are not finite", where=where)
    parameter = int8.parameter_name(weight.name)
    merged = merge_into(base, parameter, loras)
    scales = layout.weights.get(parameter + int8.SCALES)
    cast: NDArray[Any]
    if scales is None:
        dtype = weight.dtype
        with np.errstate(over="ignore"):  # told below, by name
            cast = merged.astype(numpy_type(dtype), copy=False)
        fits = cast is base or is_finite(cast)
    else:  # merged once for the integers and once for the scales: the file is written in order
        dtype = scales.dtype
        cast = int8.scales_of(merged, numpy_type(dtype))
        fits = int8.fits(cast)
        if fits and weight.dtype == "int8":
            cast = int8.quantize(merged, cast)
    if not fits:
        raise BuildError(
            f"a weight does not fit {dtype}",
            where=where,
            found=f"values up to {float(np.abs(merged.astype(np.float64)).max()):.3g}",
            fix="build with --precision bf16 or fp32"
            if weight.dtype == "float16"
            else "give LoRAs smaller scales, or another checkpoint",
        )
    return np.ascontiguousarray(cast).reshape(-1).view(np.uint8).data
