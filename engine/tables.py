"""From settings to the sampler's table of step weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.guidance import Ramp, RestorationPull, is_unguided
from engine.sampler import StepTable, dpmpp2m_table, edm_table
from engine.schedule import karras_sigmas, nearest_level, trailing_sigmas
from engine.settings import Settings


def table_for(settings: Settings) -> StepTable:
    """Return the table that some settings ask for."""

    def quantize(sigma: float) -> tuple[int, float]:
        level = nearest_level(sigma)
        return level.timestep, level.sigma

    common: dict[str, Any] = {
        "quantize": quantize,
        "cfg_scale": _cfg(settings),
        "control_scale": Ramp(*settings.control_scale),
        "pull": RestorationPull(settings.restore_pull),
        "s_noise": settings.s_noise,
    }
    if settings.sampler == "edm":
        return edm_table(trailing_sigmas(settings.steps), churn=settings.churn, **common)
    return dpmpp2m_table(karras_sigmas(settings.steps), eta=settings.eta, **common)


def _cfg(settings: Settings) -> Callable[[float], float]:
    ramp = Ramp(*settings.cfg_scale)
    return lambda sigma: 1.0 if is_unguided(ramp(sigma)) else ramp(sigma)
