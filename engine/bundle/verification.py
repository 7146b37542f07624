"""What a bundle's manifest says of each graph's correctness."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict


def relative_l2(found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """Return |found - expected| / |expected|, in float64; NaN if either holds one or expected is 0."""
    wide = np.asarray(expected, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.linalg.norm(np.asarray(found, np.float64) - wide) / np.linalg.norm(wide))


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Agreement(_Model):
    """How far a graph agreed with its torch module.

    Attributes:
        method: what was compared with what, on which weights.
        symbols: the size it was compared at.
        relative_l2: the error of each output.
        bound: the error that would have failed it.
    """

    method: str
    symbols: dict[str, int]
    relative_l2: dict[str, float]
    bound: float

    @property
    def worst(self) -> float:
        """The largest error of an output."""
        return max(self.relative_l2.values())


class Trial(_Model):
    """A graph's run on a small input, with the bundle's own weights, when it was built; its outputs were finite.

    Attributes:
        method: what ran it.
        symbols: the size it ran at.
        in_slices: relative L2 between what its segments give and what it gives as a whole; None if it has none.
        bound: of `in_slices`, which would have failed the build.
    """

    method: str
    symbols: dict[str, int]
    in_slices: float | None = None
    bound: float | None = None


class Verification(_Model):
    """What is known of a graph's correctness.

    Attributes:
        when_traced: agreement with torch on random weights, when a trace that ships with the project was made; None
            where the graph was traced for this build.
        in_build: agreement with torch on the bundle's own weights; None where the build did not compare them.
        trial: the graph's run in the build.
    """

    when_traced: Agreement | None
    in_build: Agreement | None
    trial: Trial
