"""Changes of a weight as products of factors: shapes checked when a LoRA is opened, rows computed when it is merged.

Of a weight with `out` rows, and the columns of its other axes together:

    LoRA        s · up · down                                      arXiv 2106.09685, Eq. 3
      Tucker    s · Σ up ⊗ mid ⊗ down, the kernel lies in `mid`    LoCon; LyCORIS, arXiv 2309.14859
    LoHa        s · (w1_a · w1_b) ⊙ (w2_a · w2_b)                  FedPara, arXiv 2108.06098
    LoKr        s · w1 ⊗ w2, each whole or a product               LyCORIS, arXiv 2309.14859
    difference  s · the weight's change as it stands

A change is computed a few rows at a time, in float64, so that it costs little memory beside the
weight, and products stay in the processor's caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import LoraError
from export.checkpoint.tensor_files import LazyTensor, is_finite

Shape = tuple[int, ...]
Parts = Mapping[str, LazyTensor]
#: Returns some rows of a change, f64[rows, columns].
Rows = Callable[[slice], NDArray[np.float64]]

ORIGINAL = "the file is damaged, or a converter changed it: give the original"
OTHER_BASE = "give a LoRA that was trained on the base, or give the base that it was trained on"


@dataclass(frozen=True)
class Factors:
    """The tensors of a kind, checked for shape.

    Attributes:
        rank: None where no factor is a product.
        rows: reads them; returns what computes their product times a number, which goes into a small factor.
    """

    kind: str
    rank: int | None
    rows: Callable[[float], Rows]


def finite(tensor: LazyTensor) -> NDArray[np.float64]:
    """Return a tensor in float64.

    Raises:
        LoraError: a value is not finite.
    """
    return _checked(tensor).astype(np.float64)


def _checked(tensor: LazyTensor) -> NDArray[Any]:
    value = tensor.read()
    if not is_finite(value):
        raise LoraError(
            "a tensor holds values that are not finite",
            where=f"{tensor.file}: {tensor.name}",
            expected="numbers",
            found="infinities or NaN",
            fix="the file is damaged, or its training diverged: give another one",
        )
    return value


def factors_of(where: str, parts: Parts, weight: Shape) -> Factors:
    """Return the factors of a layer's weight.

    Args:
        where: the layer, for errors.
        parts: the layer's tensors by role (`lora_names`).
        weight: shape of the base's weight.
    Raises:
        LoraError: a tensor is missing, or does not fit the base, or two kinds are there at once.
    """
    kinds = [make for roles, make in _KINDS if roles & set(parts)] or [_pair]
    if len(kinds) > 1:
        raise LoraError(
            "two kinds of change for one weight", where=where, expected="one", found=sorted(parts), fix=ORIGINAL
        )
    make = kinds[0]
    try:
        factors = make(parts, weight) if len(weight) > 1 or make is _difference else None
    except KeyError as error:
        role = str(error.args[0])
        pair = role in ("up", "down")
        raise LoraError(
            "half of a pair is missing" if pair else "a factor is missing",
            where=where,
            expected=f"{role} matrix" if pair else role,
            found=sorted(parts),
            fix=ORIGINAL,
        ) from None
    if factors is None:
        raise LoraError(
            "does not fit the base: it was made for another model",
            where=where,
            expected=f"factors of a weight {list(weight)}",
            found=", ".join(f"{role} {list(part.shape)}" for role, part in parts.items() if role != "alpha"),
            fix=OTHER_BASE,
        )
    return factors


def _pair(parts: Parts, weight: Shape) -> Factors | None:
    up, down, mid = parts["up"], parts["down"], parts.get("mid")
    rank = down.shape[0] if len(down.shape) > 1 else 0
    if not rank or up.shape[:1] != weight[:1] or up.shape[1:] not in ((rank,), (rank, 1, 1)):
        return None
    if mid is None:
        if not _covers(down.shape[1:], weight):
            return None
        return Factors(
            "LoRA",
            rank,
            lambda scale: _product(scale * finite(up).reshape(-1, rank), finite(down).reshape(rank, -1)),
        )
    if mid.shape != (rank, rank, *weight[2:]) or math.prod(down.shape) != rank * weight[1]:
        return None
    # (out, r) · (r, r, kernel) · (r, in)
    return Factors(
        "LoRA",
        rank,
        lambda scale: _product(
            scale * finite(up).reshape(-1, rank), _tucker(finite(mid), finite(down).reshape(rank, -1))
        ),
    )


def _loha(parts: Parts, weight: Shape) -> Factors | None:
    rank = parts["hada_w1_b"].shape[0] if parts["hada_w1_b"].shape else 0
    halves = [_low_rank(parts, f"hada_w{each}", f"hada_t{each}", weight) for each in (1, 2)]
    if rank == 0 or None in halves or parts["hada_w2_b"].shape[0] != rank:
        return None

    def rows(scale: float) -> Rows:
        first, second = (half(part) for half, part in zip(halves, (scale, 1.0), strict=True) if half is not None)
        return lambda some: first(some) * second(some)

    return Factors("LoHa", rank, rows)


def _lokr(parts: Parts, weight: Shape) -> Factors | None:
    """Return w1 ⊗ w2 where w1 is o1 × i1 and w2 is o2 × i2 × kernel, so that the weight is o1·o2 × i1·i2 × kernel."""
    small = _lokr_shape(parts, "lokr_w1")
    if small is None or len(small) != 2 or len(weight) < 2 or 0 in small:
        return None
    if weight[0] % small[0] or weight[1] % small[1]:
        return None
    large = (weight[0] // small[0], weight[1] // small[1], *weight[2:])
    one = _whole_or_product(parts, "lokr_w1", None, small)
    two = _whole_or_product(parts, "lokr_w2", "lokr_t2", large)
    if one is None or two is None:
        return None
    if any(f"{name}{end}" in parts for name in ("lokr_w1", "lokr_w2") if name in parts for end in ("_a", "_b")):
        return None  # a factor that is both whole and a product
    ranks = {parts[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in parts}
    if len(ranks) > 1 or 0 in ranks:
        return None

    def rows(scale: float) -> Rows:
        w1, w2 = one(scale)(slice(None)), two(1.0)

        def some(wanted: slice) -> NDArray[np.float64]:
            result = np.empty((wanted.stop - wanted.start, w1.shape[1] * math.prod(large[1:])))
            at = wanted.start
            while at < wanted.stop:  # rows that one row of w1 makes
                row, start = divmod(at, large[0])
                stop = min(large[0], start + wanted.stop - at)
                block = w1[row][None, :, None] * w2(slice(start, stop))[:, None, :]
                result[at - wanted.start :][: stop - start] = block.reshape(stop - start, -1)
                at += stop - start
            return result

        return some

    return Factors("LoKr", next(iter(ranks), None), rows)


def _difference(parts: Parts, weight: Shape) -> Factors | None:
    diff = parts["diff"]
    fits = diff.shape[:1] == weight[:1] and (len(weight) == 1 or _covers(diff.shape[1:], weight))
    return Factors("difference", None, lambda scale: whole_change(diff, scale)) if fits else None


def _lokr_shape(parts: Parts, name: str) -> Shape | None:
    if name in parts:
        return parts[name].shape
    first, second = parts[f"{name}_a"].shape, parts[f"{name}_b"].shape
    return (first[0], second[1]) if len(first) == len(second) == 2 else None


def _whole_or_product(parts: Parts, name: str, core: str | None, target: Shape) -> Callable[[float], Rows] | None:
    if name not in parts:
        return _low_rank(parts, name, core, target)
    whole = parts[name]
    fits = whole.shape[:1] == target[:1] and _covers(whole.shape[1:], target)
    return (lambda scale: whole_change(whole, scale)) if fits else None


def _low_rank(parts: Parts, name: str, core: str | None, target: Shape) -> Callable[[float], Rows] | None:
    """Return a · b, or with a core (LyCORIS' Tucker form: a is r × out, b is r × in, the core r × r × kernel)."""
    a, b, t = parts[f"{name}_a"], parts[f"{name}_b"], parts.get(core or "")
    if len(a.shape) != 2 or len(b.shape) < 2:
        return None
    rank = b.shape[0]
    if t is not None:
        if (a.shape, b.shape, t.shape) != ((rank, target[0]), (rank, target[1]), (rank, rank, *target[2:])):
            return None
        return lambda scale: _product(np.ascontiguousarray(scale * finite(a).T), _tucker(finite(t), finite(b)))
    if a.shape != (target[0], rank) or not _covers(b.shape[1:], target):
        return None
    return lambda scale: _product(scale * finite(a), finite(b).reshape(rank, -1))


def _covers(axes: Shape, weight: Shape) -> bool:
    """Tell whether a factor's other axes are those of a weight: as they are, flat, or as a kernel of one pixel."""
    if axes in (weight[1:], (math.prod(weight[1:]),)):
        return True
    return axes[:1] == weight[1:2] and set(axes[1:]) <= {1} and set(weight[2:]) <= {1}


def _product(up: NDArray[np.float64], down: NDArray[np.float64]) -> Rows:
    return lambda rows: up[rows] @ down


def _tucker(core: NDArray[np.float64], down: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Σⱼ core[i, j, …] · down[j, in] as f64[r, in · kernel]."""
    return np.einsum("ij...,jn->in...", core, down).reshape(len(core), -1)


def whole_change(tensor: LazyTensor, scale: float) -> Rows:
    """Return what computes some rows of a tensor times a number.

    Raises:
        LoraError: a value is not finite.
    """
    values = _checked(tensor).reshape(tensor.shape[0], -1)
    return lambda rows: scale * values[rows].astype(np.float64)


#: The kinds, by what their tensors are.
_KINDS: tuple[tuple[frozenset[str], Callable[[Parts, Shape], Factors | None]], ...] = (
    (frozenset({"up", "down", "mid"}), _pair),
    (frozenset(f"hada_{each}" for each in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")), _loha),
    (frozenset(f"lokr_{each}" for each in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")), _lokr),
    (frozenset({"diff"}), _difference),
)
