"""The noise schedule: which noise levels exist, and which ones a run of n steps visits.

Pure NumPy in float64; tables are rounded to float32 only where a network or a test needs it.
Sources: SDXL (arXiv 2307.01952) for the betas; EDM (arXiv 2206.00364), Eq. 5, for rho spacing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.errors import ScheduleError

TRAIN_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.0120
KARRAS_RHO = 7.0

Sigmas = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """A noise level that the network was trained at.

    Attributes:
        timestep: 0 … 999, what the network is told.
        sigma: its noise std in latent units.
    """

    timestep: int
    sigma: float


@lru_cache(maxsize=1)
def train_sigmas() -> Sigmas:
    """Return the 1000 noise levels of training.

    Returns:
        f64[1000], ascending from 0.0292 to 14.6146, in latent units; read-only.
    Source: SDXL's betas (linear in their square roots), sigma = sqrt((1 - abar) / abar).
    """
    betas = np.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=np.float64) ** 2
    alphas_cumprod = np.cumprod(1.0 - betas)
    sigmas = np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)
    sigmas.flags.writeable = False
    return sigmas


def nearest_level(sigma: float) -> Level:
    """Return the trained level closest to `sigma`, which may lie between or above them.

    Args:
        sigma: noise std in latent units.
    Raises:
        ScheduleError: `sigma` is not a positive finite number.
    """
    if not (np.isfinite(sigma) and sigma > 0):
        raise ScheduleError("a noise level must be positive and finite", found=sigma)
    index = int(np.argmin(np.abs(train_sigmas() - sigma)))
    return Level(timestep=index, sigma=float(train_sigmas()[index]))


def trailing_sigmas(steps: int) -> Sigmas:
    """Return the levels that a run of `steps` steps visits, from the noisiest down, then 0.

    The grid starts at the last training step, as SDXL-Lightning's does.

    Args:
        steps: 1 … 1000.
    Returns:
        f64[steps + 1], descending, in latent units; the last is 0.
    Raises:
        ScheduleError: `steps` is out of range.
    Source: SPEC, "Schedule"; SDXL-Lightning (arXiv 2402.13929).
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise ScheduleError("impossible number of steps", expected=f"1 to {TRAIN_STEPS}", found=steps)
    indices = np.linspace(TRAIN_STEPS - 1, 0, steps, endpoint=False).astype(np.int64)
    return np.append(train_sigmas()[indices], 0.0)


def karras_sigmas(steps: int) -> Sigmas:
    """Return `steps` levels spaced evenly in sigma^(1/7) over the range of the trailing grid, then 0.

    Args:
        steps: 1 … 1000.
    Returns:
        f64[steps + 1], descending, in latent units; the last is 0.
    Raises:
        ScheduleError: `steps` is out of range.
    Source: EDM (arXiv 2206.00364), Eq. 5, between the first and the last nonzero level of the grid.
    """
    grid = trailing_sigmas(steps)
    first, last = grid[0], grid[-2]
    spaced = np.linspace(first ** (1 / KARRAS_RHO), last ** (1 / KARRAS_RHO), steps) ** KARRAS_RHO
    return np.append(spaced, 0.0)
