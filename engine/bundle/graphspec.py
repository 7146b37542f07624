"""What a graph takes and gives: the one place for names, types and shapes.

`export` traces, verifies and packs by a `GraphSpec`; the bundle's manifest carries it; runners check
every call against it. Shapes are written with symbols: an axis is a number, a symbol, or a symbol
with a factor or a divisor ("B", "8*h", "h/2", "77*k").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.errors import BackendError

DType = Literal["float32", "float16", "bfloat16", "int64", "uint32"]
Precision = Literal["fp32", "fp16", "bf16"]
Axis = int | str
#: Which of SDXL's networks a graph is a part of: a text encoder, the VAE, or what predicts noise (ControlNet and UNet).
Role = Literal["text", "vae", "denoiser"]

PRECISION_DTYPES: dict[Precision, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

_AXIS = re.compile(r"(?:(?P<factor>\d+)\*)?(?P<symbol>[A-Za-z]\w*)(?:/(?P<divisor>\d+))?")


class TensorSpec(BaseModel):
    """A graph's input or output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: DType
    shape: tuple[Axis, ...]


class GraphSpec(BaseModel):
    """A graph's inputs and outputs, in order.

    Attributes:
        role: which network it is a part of; graphs of the denoiser see every photo with each text.
        multiples: what a symbol must be a multiple of, where not of 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    role: Role
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    multiples: dict[str, int] = Field(default_factory=dict)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols of its inputs, in order of appearance."""
        found = (parse_axis(axis)[0] for spec in self.inputs for axis in spec.shape)
        return tuple(dict.fromkeys(symbol for symbol in found if symbol is not None))

    def tensor(self, name: str) -> TensorSpec:
        """Return the input or output called `name`.

        Raises:
            BackendError: there is none.
        """
        for spec in (*self.inputs, *self.outputs):
            if spec.name == name:
                return spec
        known = [spec.name for spec in (*self.inputs, *self.outputs)]
        raise BackendError("no such input or output", where=self.name, expected=known, found=name)

    def bind(self, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, int]:
        """Check named inputs and return what the symbols stand for.

        Args:
            tensors: dtype name and shape of each input.
        Raises:
            BackendError: a name is missing or unknown, or a dtype, rank or axis is wrong.
        """
        expected_names = [spec.name for spec in self.inputs]
        if set(tensors) != set(expected_names):
            raise BackendError("wrong set of inputs", where=self.name, expected=expected_names, found=sorted(tensors))
        symbols: dict[str, int] = {}
        for spec in self.inputs:
            dtype, shape = tensors[spec.name]
            if dtype != spec.dtype:
                raise BackendError("wrong dtype", where=f"{self.name}.{spec.name}", expected=spec.dtype, found=dtype)
            self._bind_shape(spec, shape, symbols)
        return symbols

    def sizes_of(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Return what the symbols of some inputs stand for, by their names and shapes.

        Raises:
            BackendError: a rank or axis is wrong.
        """
        symbols: dict[str, int] = {}
        for name, shape in shapes.items():
            self._bind_shape(self.tensor(name), shape, symbols)
        return symbols

    def _bind_shape(self, spec: TensorSpec, shape: Sequence[int], symbols: dict[str, int]) -> None:
        fits = len(shape) == len(spec.shape)
        for axis, size in zip(spec.shape, shape, strict=False):
            symbol, ratio = parse_axis(axis)
            if symbol is None:
                fits &= size == ratio
                continue
            value = Fraction(size) / ratio
            multiple = self.multiples.get(symbol, 1)
            whole = value.denominator == 1 and value > 0 and value % multiple == 0
            fits &= whole and symbols.setdefault(symbol, int(value)) == value
        if not fits:
            known = ", ".join(
                [f"{name} = {value}" for name, value in symbols.items()]
                + [f"{name} a multiple of {value}" for name, value in self.multiples.items()]
            )
            raise BackendError(
                "wrong shape",
                where=f"{self.name}.{spec.name}",
                expected=f"{list(spec.shape)}" + (f" with {known}" if known else ""),
                found=list(shape),
            )


@cache
def parse_axis(axis: Axis) -> tuple[str | None, Fraction]:
    """Return an axis as (symbol, ratio); a number has no symbol and its ratio is the number.

    Raises:
        ValueError: not in the grammar.
    """
    if isinstance(axis, int):
        return None, Fraction(axis)
    match = _AXIS.fullmatch(axis)
    if match is None:
        raise ValueError(f"not an axis: {axis!r}")
    return match["symbol"], Fraction(int(match["factor"] or 1), int(match["divisor"] or 1))


def resolve(shape: Sequence[Axis], symbols: Mapping[str, int]) -> tuple[int, ...]:
    """Return a symbolic shape as numbers."""
    sizes = []
    for axis in shape:
        symbol, ratio = parse_axis(axis)
        size = ratio if symbol is None else ratio * symbols[symbol]
        assert size.denominator == 1, f"{axis} is no whole number with {dict(symbols)}"
        sizes.append(int(size))
    return tuple(sizes)
