"""What is measured of each layer, and what of it is beyond the bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from engine.bundle.verification import relative_l2

#: Names of ONNX's types as people write them.
TYPE_NAMES = {
    int(TensorProto.FLOAT): "fp32",
    int(TensorProto.FLOAT16): "fp16",
    int(TensorProto.BFLOAT16): "bf16",
    int(TensorProto.INT64): "int64",
    int(TensorProto.INT32): "int32",
    int(TensorProto.BOOL): "bool",
}
#: Largest finite, and smallest normal value of each floating-point type.
RANGES = {
    "fp32": (3.4028235e38, 1.1754944e-38),
    "fp16": (65504.0, 6.1035156e-05),
    "bf16": (3.3895314e38, 1.1754944e-38),
}
#: Relative L2 that a layer may add by itself, its inputs equal, by the coarsest type of its result and its weights.
#: Rounding a result once costs 2e-4 in fp16 and 1.7e-3 in bf16, and up to three times as much where a layer subtracts.
LOCAL_BOUNDS = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 8e-3}
#: Relative L2 of a layer's result after all that came before it, by the coarser of the two ways' types.
BOUNDS = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 2e-1}


@dataclass(frozen=True)
class Spread:
    """The values of a tensor.

    Attributes:
        largest: magnitude of a finite value.
        nans, infinities: how many there are.
        small: share of the values other than 0 that are smaller than fp16's smallest normal value.
    """

    largest: float
    nans: int
    infinities: int
    small: float

    @classmethod
    def of(cls, values: NDArray[Any]) -> Spread:
        """Measure a tensor of any type."""
        if values.dtype.kind not in "f" or not values.size:
            return cls(float(np.abs(values.astype(np.float64)).max(initial=0)), 0, 0, 0.0)
        finite = np.isfinite(values)
        nans = int(np.isnan(values).sum())
        magnitudes = np.abs(values[finite])
        nonzero = np.count_nonzero(magnitudes)
        small = np.count_nonzero(magnitudes < RANGES["fp16"][1]) - (magnitudes.size - nonzero)
        return cls(
            float(magnitudes.max(initial=0)),
            nans,
            int(values.size - finite.sum()) - nans,
            small / nonzero if nonzero else 0.0,
        )

    @property
    def is_finite(self) -> bool:
        return not self.nans and not self.infinities


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the relative L2 of a tensor against one of its shape.

    Where both are not finite in the same places, the rest is compared; where they are not in others, it is infinite.
    """
    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(found), finite):
        return math.inf
    if not finite.all():
        found, expected = found[finite], expected[finite]
    if not np.any(expected):
        return math.inf if np.any(found) else 0.0
    return relative_l2(found, expected)


@dataclass(frozen=True)
class Layer:
    """One result of one layer of the examined graph.

    Attributes:
        index: in graph order.
        name: of the node. output: of its result. operator: of ONNX.
        place: the module of the network whose weights it uses; "" for none.
        type: of its result.
        shape: of its result.
        reference, examined: the values of both ways, after all that came before.
        error: relative L2 between the two.
        own: relative L2 that the layer adds by itself: both ways from the reference's inputs to it.
        own_spread: the values that the examined way makes of the reference's inputs.
        breaks: whether these hold NaNs or infinities though the inputs, and what the reference makes of them, do not.
        bound, own_bound: of the two errors.
    """

    index: int
    name: str
    output: str
    operator: str
    place: str
    type: str
    shape: tuple[int, ...]
    reference: Spread
    examined: Spread
    error: float
    own: float
    own_spread: Spread
    breaks: bool
    bound: float
    own_bound: float

    @property
    def is_off(self) -> bool:
        """Whether it is beyond its own bound, whatever came before it."""
        return not self.own <= self.own_bound

    @property
    def diverges(self) -> bool:
        """Whether its result is beyond the bound, after all that came before it."""
        return not self.error <= self.bound

    @property
    def exceeds_fp16(self) -> bool:
        """Whether the reference's values are larger than fp16 holds."""
        return self.reference.largest > RANGES["fp16"][0]

    @property
    def label(self) -> str:
        """What a person finds it by: its name, and the module of the network where it has one."""
        return f"{self.name} ({self.place})" if self.place else self.name

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data; what is not finite is told as text, which JSON has no number for."""
        data = asdict(self)
        for name in ("error", "own"):
            data[name] = data[name] if math.isfinite(data[name]) else str(data[name])
        return {**data, "is_off": self.is_off, "diverges": self.diverges}


@dataclass(frozen=True)
class GraphReport:
    """The comparison of one graph.

    Attributes:
        graph: its name.
        stage: of the restoration that its inputs are from.
        layers: in graph order.
        outputs: the graph's own.
        seconds: that the comparison took.
        groups: of layers, that were computed one after the other.
    """

    graph: str
    stage: str
    layers: tuple[Layer, ...]
    outputs: tuple[str, ...]
    seconds: float
    groups: int = 1

    @cached_property
    def off(self) -> tuple[Layer, ...]:
        """The layers that are off by themselves, those that break first."""
        found = [layer for layer in self.layers if layer.breaks or layer.is_off]
        return tuple(sorted(found, key=lambda layer: (not layer.breaks, layer.index)))

    @cached_property
    def first_divergence(self) -> Layer | None:
        """The first layer whose result is beyond the bound, after all that came before it."""
        return next((layer for layer in self.layers if layer.diverges), None)

    @cached_property
    def first_not_finite(self) -> Layer | None:
        """The first layer that gives NaNs or infinities where the reference gives none."""
        found = (layer for layer in self.layers if layer.reference.is_finite and not layer.examined.is_finite)
        return next(found, None)

    @cached_property
    def beyond_fp16(self) -> tuple[Layer, ...]:
        """The layers whose reference values fp16 does not hold, whatever type they are in."""
        return tuple(layer for layer in self.layers if layer.exceeds_fp16)

    @cached_property
    def agrees(self) -> bool:
        """Whether nothing is beyond a bound."""
        return not self.off and self.first_divergence is None and self.first_not_finite is None

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data."""

        def names(layers: Sequence[Layer | None]) -> list[str]:
            return [layer.name for layer in layers if layer is not None]

        return {
            "graph": self.graph,
            "stage": self.stage,
            "agrees": self.agrees,
            "off_by_itself": names(self.off),
            "first_divergence": next(iter(names([self.first_divergence])), None),
            "first_not_finite": next(iter(names([self.first_not_finite])), None),
            "beyond_fp16": names(self.beyond_fp16),
            "seconds": round(self.seconds, 2),
            "layers": [layer.as_data() for layer in self.layers],
        }
