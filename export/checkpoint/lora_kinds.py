"""The change of a weight or a bias that a layer's tensors stand for: factors, their strength, and DoRA's magnitude.

s = α / rank, by the file or its configuration. Over any factors, DoRA (arXiv 2402.09353, Eq. 5) gives a
change of m · (W + ΔW) / ‖W + ΔW‖ − W, the norm per output or per input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import LoraError
from export.checkpoint.lora_factors import (
    ORIGINAL,
    OTHER_BASE,
    Parts,
    Rows,
    Shape,
    factors_of,
    finite,
    whole_change,
)
from export.checkpoint.tensor_files import LazyTensor

#: Of a weight, that are changed at a time: 8 MB in float64, so that products stay in the processor's caches.
_BLOCK_VALUES = 1 << 20


@dataclass(frozen=True)
class Scaling:
    """What a configuration says of a layer; where it is silent, α is the rank.

    Attributes:
        kind: as in `Delta`.
        decomposed: whether it has a magnitude (DoRA).
        rank_stabilized: s = α / √rank (arXiv 2312.03732).
    """

    alpha: float | None = None
    rank: int | None = None
    kind: str | None = None
    decomposed: bool = False
    rank_stabilized: bool = False


@dataclass(frozen=True)
class Delta:
    """The change of one weight.

    Attributes:
        kind: "LoRA", "LoHa", "LoKr", "difference"; "DoRA" behind it where a magnitude belongs to it.
        alpha, rank: None where the kind has none.
        prepare: reads the tensors; given the base's weight as [rows, columns] and a factor, returns what computes
            the change times the factor.
    """

    kind: str
    alpha: float | None
    rank: int | None
    prepare: Callable[[NDArray[Any], float], Rows]

    def add_to(self, merged: NDArray[np.float64], base: NDArray[Any], scale: float) -> None:
        """Add `scale` times the change, in place.

        Args:
            merged: f64, contiguous.
            base: the weight that the LoRA was trained on, of the same shape and any floating dtype.
            scale: the user's.
        Raises:
            LoraError: a value is not finite.
        """
        changed = merged.reshape(len(merged), -1)  # a view: it is contiguous
        rows_of = self.prepare(base.reshape(len(base), -1), scale)
        for rows in _blocks(changed.shape):
            changed[rows] += rows_of(rows)


def weight_delta(where: str, parts: Parts, weight: Shape, configured: Scaling) -> Delta | None:
    """Return the change of a layer's weight; None if its tensors change only the bias.

    Args:
        where: the layer, for errors.
        parts: the layer's tensors by role.
        weight: shape of the base's weight.
        configured: by a configuration beside the tensors.
    Raises:
        LoraError: a tensor is missing, or does not fit the base.
    """
    if "diff_b" in parts and not set(parts) - {"diff_b", "alpha"}:
        return None
    factors = factors_of(where, parts, weight)
    if factors.kind == "difference":
        if {"dora_scale", "magnitude"} & set(parts):
            raise LoraError(
                "a magnitude without low-rank factors",
                where=where,
                expected="a difference alone, or factors and a magnitude",
                found=sorted(parts),
                fix=ORIGINAL,
            )
        return Delta(factors.kind, None, None, lambda _, scale: factors.rows(scale))
    alpha, scaling = _scaling(where, parts, factors.kind, factors.rank, configured)
    has_magnitude = bool({"dora_scale", "magnitude"} & set(parts))
    if configured.decomposed and not has_magnitude:
        raise LoraError(
            "its configuration says DoRA, and there is no magnitude",
            where=where,
            expected="a tensor lora_magnitude_vector for each layer",
            found=sorted(parts),
            fix="give the file that belongs to the configuration",
        )
    if not has_magnitude:
        return Delta(factors.kind, alpha, factors.rank, lambda _, scale: factors.rows(scale * scaling))
    magnitude, of_outputs = _magnitude(where, parts, weight)
    return Delta(
        f"{factors.kind} with DoRA" if factors.kind != "LoRA" else "DoRA",
        alpha,
        factors.rank,
        lambda base, scale: _dora(
            factors.rows(scaling), finite(magnitude).reshape(-1), base, weight, scale, of_outputs=of_outputs
        ),
    )


def bias_delta(where: str, parts: Parts, bias: Shape | None, configured: Scaling) -> Delta | None:
    """Return the change of a layer's bias; None if its tensors change none.

    Args:
        where, parts, configured: as for `weight_delta`.
        bias: shape of the base's bias; None if the layer has none.
    Raises:
        LoraError: the base's layer has no bias, or another one.
    """
    role = next((role for role in ("diff_b", "up_bias") if role in parts), None)
    if role is None:
        return None
    change = parts[role]
    if bias is None or change.shape != bias:
        raise LoraError(
            "does not fit the base: it was made for another model",
            where=where,
            expected="no bias" if bias is None else f"a bias {list(bias)}",
            found=f"{change.name} {list(change.shape)}",
            fix=OTHER_BASE,
        )
    if role == "diff_b":
        return Delta("difference", None, None, lambda _, scale: whole_change(change, scale))
    if "down" not in parts:
        raise LoraError(
            "half of a pair is missing", where=where, expected="down matrix", found=sorted(parts), fix=ORIGINAL
        )
    rank = parts["down"].shape[0]
    alpha, scaling = _scaling(where, parts, "LoRA", rank, configured)
    return Delta("LoRA", alpha, rank, lambda _, scale: whole_change(change, scale * scaling))


def _blocks(shape: Shape) -> Iterator[slice]:
    some = max(1, _BLOCK_VALUES // max(1, shape[1]))
    return (slice(start, min(start + some, shape[0])) for start in range(0, shape[0], some))


def _scaling(where: str, parts: Parts, kind: str, rank: int | None, configured: Scaling) -> tuple[float | None, float]:
    """Return α and s = α / rank; both factors of a LoKr may be whole, which then has neither, but for PEFT's."""
    if "alpha" in parts:
        if math.prod(parts["alpha"].shape) != 1:
            raise LoraError(
                "alpha is not one number", where=where, expected="[]", found=list(parts["alpha"].shape), fix=ORIGINAL
            )
        configured = Scaling(float(parts["alpha"].read().item()))
    elif configured.kind not in (None, kind) or (None not in (rank, configured.rank) and rank != configured.rank):
        raise LoraError(
            "its configuration is of another LoRA",
            where=where,
            expected=f"{configured.kind or kind} of rank {configured.rank}, as configured",
            found=f"{kind} of rank {rank}",
            fix="put the adapter_config.json that belongs to the file beside it, or none",
        )
    rank = rank or configured.rank
    if rank is None:
        return None, 1.0
    alpha = float(rank) if configured.alpha is None else configured.alpha
    if not math.isfinite(alpha):
        raise LoraError("alpha is not a number", where=where, expected=f"such as {rank}", found=alpha, fix=ORIGINAL)
    return alpha, alpha / (math.sqrt(rank) if configured.rank_stabilized else rank)


# -- DoRA -----------------------------------------------------------------------------------------


def _magnitude(where: str, parts: Parts, weight: Shape) -> tuple[LazyTensor, bool]:
    """Return the magnitude, and whether it has a value per output rather than per input."""
    ones = (1,) * (len(weight) - 2)
    axes: dict[str, tuple[Shape, ...]]
    if "magnitude" in parts:  # a convolution's is 1 × out × 1 × 1: as many as outputs, whatever its shape says
        magnitude, axes = parts["magnitude"], {"outputs": ((weight[0],), (weight[0], 1, *ones), (1, weight[0], *ones))}
    else:
        magnitude = parts["dora_scale"]
        axes = {"outputs": ((weight[0],), (weight[0], 1, *ones)), "inputs": ((1, weight[1], *ones),)}
    for axis, shapes in axes.items():
        if magnitude.shape in shapes:
            return magnitude, axis == "outputs"
    raise LoraError(
        "DoRA's magnitude does not fit the base",
        where=where,
        expected=" or ".join(str(list(shape)) for shapes in axes.values() for shape in shapes),
        found=list(magnitude.shape),
        fix=OTHER_BASE,
    )


def _dora(
    change: Rows, magnitude: NDArray[np.float64], base: NDArray[Any], weight: Shape, scale: float, *, of_outputs: bool
) -> Rows:
    """Return scale · (m · (W + ΔW) / ‖W + ΔW‖ − W); `base` is W as [rows, columns], `weight` its shape."""

    def of_rows(rows: slice) -> NDArray[np.float64]:
        before = base[rows].astype(np.float64)
        value = change(rows)
        value += before
        if of_outputs:
            value *= _ratio(magnitude[rows], np.sqrt(np.einsum("oc,oc->o", value, value)))[:, None]
        else:
            value *= of_columns
        value -= before
        value *= scale
        return value

    if not of_outputs:  # the norms are known when all rows have been seen once
        squares = np.zeros(base.shape[1])
        for rows in _blocks(base.shape):
            value = change(rows)
            value += base[rows]
            squares += np.einsum("oc,oc->c", value, value)
        kernel = math.prod(weight[2:])
        of_columns = np.repeat(_ratio(magnitude, np.sqrt(squares.reshape(-1, kernel).sum(axis=1))), kernel)
    return of_rows


def _ratio(magnitude: NDArray[np.float64], norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return m / ‖·‖; a vector of zeros has no direction and stays zero."""
    return np.divide(magnitude, norms, out=np.zeros_like(norms), where=norms > 0)
