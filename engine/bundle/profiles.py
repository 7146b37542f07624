"""The sizes that a compiled graph takes: optimization profiles, and which of them holds an input.

A plan is compiled for ranges of sizes. One range per static size is fastest; a wide one behind them
takes everything else. Written with the graph's symbols, as its spec is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from engine.errors import DoesNotFitError


class Range(NamedTuple):
    """TensorRT's bounds of a symbol: the least and the most it may stand for, and what kernels are chosen for."""

    min: int
    opt: int
    max: int


class Profile(BaseModel):
    """A range for every symbol of a graph's inputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranges: dict[str, Range]

    def holds(self, symbols: Mapping[str, int]) -> bool:
        """Tell whether an input of this size may run under the profile."""
        return all(bounds.min <= symbols[name] <= bounds.max for name, bounds in self.ranges.items())

    def at(self, place: str) -> dict[str, int]:
        """Return every symbol's "min", "opt" or "max"."""
        return {name: getattr(bounds, place) for name, bounds in self.ranges.items()}

    def __str__(self) -> str:
        return ", ".join(
            f"{name} = {bounds.min}" if bounds.min == bounds.max else f"{name} = {bounds.min} … {bounds.max}"
            for name, bounds in self.ranges.items()
        )


def choose_profile(profiles: Sequence[Profile], symbols: Mapping[str, int], *, where: str) -> int:
    """Return the index of the first profile that holds a size.

    Args:
        profiles: of a plan, static sizes first.
        symbols: what the symbols stand for, from `GraphSpec.bind`.
        where: the graph, for the error.
    Raises:
        DoesNotFitError: none does.
    """
    for index, profile in enumerate(profiles):
        if profile.holds(symbols):
            return index
    raise DoesNotFitError(
        "the plan was not compiled for this size",
        where=where,
        expected="; or ".join(map(str, profiles)),
        found=", ".join(f"{name} = {value}" for name, value in symbols.items()),
        fix="work at another size (--min-size, --upscale) or with a shorter text, or build with other --shapes",
    )
