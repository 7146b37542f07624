"""Weights in int8: a scale per output channel, and the graph multiplies them out where it uses them.

w ≈ q · s with q in −127 … 127, s = max |w| / 127 over an output channel, in the graph's type; symmetric, because
TensorRT takes no zero points. Only where weights lie and what is read of them is smaller: products stay in the graph's
type. ONNX: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bundle.graphspec import GraphSpec

#: What a parameter's integers and their scales are called in graphs and in the weights file, behind its own name.
VALUES, SCALES = ".int8", ".int8_scale"
#: The ONNX opset from which scales may be of 16 bits.
OPSET = 19
_LARGEST = 127


def has_int8_form(spec: GraphSpec, name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether `--weights int8` stores a parameter so: matrices and kernels, but for tables of embeddings.

    The VAE's stay as they are: they are 2.5 % of all weights, and a photo that the demo restores with the decoder's
    alone in int8 is 39.9 dB PSNR from the one without, with those of all other networks 48.7 dB (2026-11-29).

    Args:
        spec: of the graph that uses it.
        name, shape: of the parameter; axis 0 is the output channel.
    """
    return spec.role != "vae" and len(shape) > 1 and not name.endswith("_embedding.weight")


def parameter_name(stored: str) -> str:
    """Return the parameter that a tensor of the weights file belongs to: mostly the one of its own name."""
    return stored.removesuffix(VALUES).removesuffix(SCALES)


def parameter_shapes(stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that a weights file holds, by those of its tensors."""
    return {parameter_name(name): shape for name, shape in stored.items() if not name.endswith(SCALES)}


def scales_of(values: NDArray[np.floating], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the scale of each output channel, rounded up so that no value is cut off.

    Args:
        values: f[O, …], finite.
        dtype: of the scales; a channel that does not fit it gives infinity.
    Returns:
        dtype[O], above 0.
    """
    exact = np.abs(values.reshape(len(values), -1)).max(axis=1).astype(np.float64) / _LARGEST
    with np.errstate(over="ignore"):
        scales = exact.astype(dtype)
        scales = np.where(scales.astype(np.float64) < exact, np.nextafter(scales, dtype.type(np.inf)), scales)
    return np.where(exact == 0, dtype.type(1), scales)


def quantize(values: NDArray[np.floating], scales: NDArray[Any]) -> NDArray[np.int8]:
    """Return the nearest integers, i8[O, …] in −127 … 127.

    Args:
        values: f[O, …]. scales: from `scales_of`.
    """
    along = scales.astype(values.dtype).reshape(-1, *(1,) * (values.ndim - 1))
    return np.rint(values / along).clip(-_LARGEST, _LARGEST).astype(np.int8)


def fits(scales: NDArray[Any]) -> bool:
    """Tell whether the largest value of every channel is finite in the scales' type."""
    with np.errstate(over="ignore"):
        largest = (scales.astype(np.float32) * _LARGEST).astype(scales.dtype)
    return bool(np.isfinite(largest.astype(np.float32)).all())
