"""How strongly each pull acts at a noise level: guidance, control, and the restoration pull.

Pure functions of sigma, handed to the sampler as values.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Where ramps start: the largest noise level, rounded as the original implementation rounds it.
SIGMA_MAX = 14.6146

#: A guidance scale closer to 1 than this leaves the result as it is, so the negative pass is skipped.
UNGUIDED_WITHIN = 1e-4

#: The restoration pull ends before the last, cleanest steps.
PULL_ABOVE_SIGMA = 0.05


@dataclass(frozen=True)
class Ramp:
    """A scale that goes linearly in sigma from `start` (at SIGMA_MAX) to `end` (at 0).

    It stays linear above SIGMA_MAX, where churn can lead.
    """

    start: float
    end: float

    def __call__(self, sigma: float) -> float:
        if self.start == self.end:
            return self.end  # exactly, not up to rounding: 1 must stay 1
        return self.end + (self.start - self.end) * sigma / SIGMA_MAX


@dataclass(frozen=True)
class RestorationPull:
    """The share of D that is replaced by the stage-1 latent, to stay faithful to the photo.

    Attributes:
        power: r > 0; the larger, the sooner the pull fades. None turns it off.
    Source: SUPIR (arXiv 2401.13627), restoration-guided sampling.
    """

    power: float | None

    def __call__(self, sigma: float, sigma_next: float) -> float:
        """Return the share, 0 … 1, for the step from `sigma` to `sigma_next`."""
        if self.power is None or self.power <= 0 or sigma_next <= PULL_ABOVE_SIGMA:
            return 0.0
        return (sigma / SIGMA_MAX) ** self.power


def is_unguided(scale: float) -> bool:
    """Tell whether a guidance scale is so close to 1 that the negative pass changes nothing."""
    return abs(scale - 1.0) < UNGUIDED_WITHIN
