"""Samplers as tables of weights, and the loop that runs any table.

Every step of both samplers is affine: the next latent is a sum of the present one, the network's
outputs, noise, the stage-1 latent and the last estimate, with weights that depend on the step alone.
So a sampler is a function from settings to a `StepTable`, computed in float64 before the loop, and
one loop runs all of them. Another backend runs the same table; this NumPy loop is its oracle.

    x_hat    = x + churn * noise                                  (only where churn > 0)
    pos, neg = network(input_scale * x_hat)                       (neg only where guided)
    denoised = the weights `denoised` over x_hat, pos, neg, center
    x        = the weights `update`   over x_hat, pos, neg, center, noise, previous denoised
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import ScheduleError
from engine.sampling.guidance import Ramp, RestorationPull, is_unguided
from engine.sampling.schedule import karras_sigmas, nearest_level, trailing_sigmas
from engine.settings import Settings

Latent = NDArray[np.float32]
Scale = Callable[[float], float]
Pull = Callable[[float, float], float]
#: For a noise level, the nearest trained one: its timestep and its sigma.
Quantize = Callable[[float], tuple[int, float]]

_MAX_CHURN_PER_STEP = math.sqrt(2.0) - 1.0


@dataclass(frozen=True)
class Weights:
    """The scalar weights of one sum; a weight of 0 means that the term is not needed."""

    x: float = 0.0
    pos: float = 0.0
    neg: float = 0.0
    center: float = 0.0
    noise: float = 0.0
    previous: float = 0.0

    def __add__(self, other: Weights) -> Weights:
        return Weights(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Weights:
        return Weights(*(factor * getattr(self, f.name) for f in fields(self)))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Step:
    """One row of the table.

    Attributes:
        index: 0 … steps - 1.
        sigma, sigma_next: noise levels before and after, in latent units.
        timestep: what the networks are told, 0 … 999.
        input_scale: 1 / sqrt(q² + 1), what x_hat is multiplied by before the networks see it.
        cfg_scale: guidance s at this step, exactly 1 where the negative pass is not needed.
        control_scale: how strongly the control features act.
        churn: weight of the noise that turns x into x_hat; 0 where there is none.
        denoised: the estimate of the clean latent, after guidance and pull.
        update: the next x.
    """

    index: int
    sigma: float
    sigma_next: float
    timestep: int
    input_scale: float
    cfg_scale: float
    control_scale: float
    churn: float
    denoised: Weights
    update: Weights

    @property
    def guided(self) -> bool:
        return self.cfg_scale != 1.0

    @property
    def uses_noise(self) -> bool:
        return self.churn != 0.0 or self.update.noise != 0.0


@dataclass(frozen=True)
class StepTable:
    """A whole run: the scale of the starting noise and one row per step."""

    start_scale: float
    steps: tuple[Step, ...]

    @property
    def passes(self) -> tuple[int, ...]:
        """How often steps see each photo: 1 where they are not guided, 2 where they are."""
        return tuple(sorted({2 if step.guided else 1 for step in self.steps}))

    def keeps_denoised(self, index: int) -> bool:
        """Tell whether the estimate of step `index` is needed by the step after it."""
        return index + 1 < len(self.steps) and self.steps[index + 1].update.previous != 0.0

    @property
    def uses_center(self) -> bool:
        return any(step.update.center != 0.0 for step in self.steps)


class Denoiser(Protocol):
    """ControlNet and UNet at one step."""

    def __call__(self, x: Latent, step: Step) -> tuple[Latent, Latent | None]:
        """Return the network's output for the positive and, where guided, the negative text.

        Args:
            x: f32[B,C,h,w], the noisy latent, already multiplied by `step.input_scale`.
            step: tells the timestep, the control scale and whether the negative pass is needed.
        Returns:
            f32[B,C,h,w] twice, or once and None.
        """
        ...


@dataclass(frozen=True)
class StepOutput:
    """What the loop reports after each step.

    Attributes:
        step: that is done.
        x: f32[B,C,h,w]; None where the latent is on a device.
        denoised: f32[B,C,h,w], where the next step needs it or the caller asked for it.
    """

    step: Step
    x: Latent | None
    denoised: Latent | None


def edm_table(
    sigmas: Sequence[float] | NDArray[np.float64],
    *,
    quantize: Quantize,
    cfg_scale: Scale,
    control_scale: Scale,
    pull: Pull,
    churn: float = 0.0,
    s_noise: float = 1.0,
) -> StepTable:
    """Return the table of RestoreEDM: Euler steps with optional churn and restoration pull.

    Args:
        sigmas: descending noise levels in latent units, the last 0; steps + 1 of them.
        quantize: the nearest trained level of a sigma.
        cfg_scale: guidance s, taken at sigma_hat.
        control_scale: taken at sigma.
        pull: share of D that the stage-1 latent replaces, from sigma and sigma_next.
        churn: total churn over the run, >= 0; each step raises sigma by min(churn / n, sqrt(2) - 1).
        s_noise: std of the churn noise, about 1.
    Raises:
        ScheduleError: sigmas do not descend to 0.
    Source: EDM (arXiv 2206.00364), Algorithm 2 without the second-order correction; SPEC, "RestoreEDM".
    """
    levels = _checked(sigmas)
    gamma = min(churn / (len(levels) - 1), _MAX_CHURN_PER_STEP)
    steps = []
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        sigma_hat = sigma * (1.0 + gamma)
        timestep, q = quantize(sigma_hat)
        scale = cfg_scale(sigma_hat)
        denoised = _denoised(q, scale, pull(sigma, sigma_next))
        slope = (sigma_next - sigma_hat) / sigma_hat
        steps.append(
            Step(
                index=index,
                sigma=sigma,
                sigma_next=sigma_next,
                timestep=timestep,
                input_scale=1.0 / math.sqrt(q * q + 1.0),
                cfg_scale=scale,
                control_scale=control_scale(sigma),
                churn=math.sqrt(sigma_hat**2 - sigma**2) * s_noise if gamma > 0 else 0.0,
                denoised=denoised,
                update=Weights(x=1.0 + slope) + (-slope) * denoised,
            )
        )
    return StepTable(_start_scale(levels), tuple(steps))


def dpmpp2m_table(
    sigmas: Sequence[float] | NDArray[np.float64],
    *,
    quantize: Quantize,
    cfg_scale: Scale,
    control_scale: Scale,
    pull: Pull,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> StepTable:
    """Return the table of RestoreDPM++2M: second-order multistep SDE steps in t = -ln sigma.

    Args:
        sigmas: descending noise levels in latent units, the last 0; steps + 1 of them.
        quantize, cfg_scale, control_scale, pull: as for `edm_table`; all taken at sigma.
        eta: how stochastic: 0 is the ODE, 1 the SDE.
        s_noise: std of the added noise, about 1.
    Raises:
        ScheduleError: sigmas do not descend to 0.
    Source: DPM-Solver++ (arXiv 2211.01095), SDE-2M; SPEC, "RestoreDPM++2M".
    """
    levels = _checked(sigmas)
    last = len(levels) - 2
    steps = []
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        timestep, q = quantize(sigma)
        scale = cfg_scale(sigma)
        denoised = _denoised(q, scale, pull(sigma, sigma_next))
        if index == last:
            update = denoised  # h is infinite: D itself, whatever eta
        else:
            h = math.log(sigma / sigma_next)
            gain = -math.expm1(-h - eta * h)
            update = Weights(x=(sigma_next / sigma) * math.exp(-eta * h))
            if index == 0:
                update += gain * denoised
            else:
                ratio = math.log(levels[index - 1] / sigma) / h
                half = 1.0 / (2.0 * ratio)
                update += gain * (1.0 + half) * denoised + Weights(previous=-gain * half)
                update += Weights(noise=sigma_next * math.sqrt(-math.expm1(-2.0 * eta * h)) * s_noise)
        steps.append(
            Step(
                index=index,
                sigma=sigma,
                sigma_next=sigma_next,
                timestep=timestep,
                input_scale=1.0 / math.sqrt(q * q + 1.0),
                cfg_scale=scale,
                control_scale=control_scale(sigma),
                churn=0.0,
                denoised=denoised,
                update=update,
            )
        )
    return StepTable(_start_scale(levels), tuple(steps))


def sample(
    table: StepTable,
    network: Denoiser,
    noise: Callable[[int], Latent],
    *,
    center: Latent | None = None,
    estimates: bool = False,
) -> Iterator[StepOutput]:
    """Run a table from noise to a clean latent, one yield per step.

    Args:
        table: what to do, from `edm_table` or `dpmpp2m_table`.
        network: ControlNet and UNet.
        noise: the field of a draw, f32[B,C,h,w]: 0 is the start, 1 + i belongs to step i. Only the
            draws that a step uses are asked for.
        center: f32[B,C,h,w], the stage-1 latent; needed only if `table.uses_center`.
        estimates: whether every step tells its estimate of the clean latent, which costs a sum.
    Yields:
        StepOutput after each step; the last one's `x` is the result, f32[B,C,h,w].
    Raises:
        ScheduleError: the table needs `center` and there is none.
    """
    if table.uses_center and center is None:
        raise ScheduleError("the restoration pull needs the stage-1 latent as `center`")
    x = noise(0) * np.float32(table.start_scale)
    previous: Latent | None = None
    for step in table.steps:
        eps = noise(1 + step.index) if step.uses_noise else None
        if step.churn:
            assert eps is not None
            x = x + np.float32(step.churn) * eps
        pos, neg = network(x * np.float32(step.input_scale), step)
        terms = {"x": x, "pos": pos, "neg": neg, "center": center, "noise": eps, "previous": previous}
        denoised = weighted_sum(step.denoised, terms) if estimates or table.keeps_denoised(step.index) else None
        x = weighted_sum(step.update, terms)
        previous = denoised
        yield StepOutput(step, x, denoised)


def weighted_sum(weights: Weights, terms: dict[str, Latent | None]) -> Latent:
    """Return the sum of the terms that have a weight, f32 of their shape.

    Args:
        weights: scalars, rounded to float32 here.
        terms: f32[B,C,h,w] by the weights' names; a term without weight may be None.
    """
    total: Latent | None = None
    for field in fields(weights):
        weight = getattr(weights, field.name)
        if weight == 0.0:
            continue
        term = terms[field.name]
        assert term is not None, f"the table weighs {field.name!r}, which this run does not have"
        total = term * np.float32(weight) if total is None else total + term * np.float32(weight)
    assert total is not None, "a step without any weight"
    return total


def _denoised(q: float, scale: float, pull: float) -> Weights:
    """D = x - q net, guided: D_neg + s (D_pos - D_neg), and then pulled to the center."""
    guided = Weights(x=1.0, pos=-q * scale, neg=-q * (1.0 - scale))
    return (1.0 - pull) * guided + Weights(center=pull)


def _start_scale(levels: Sequence[float]) -> float:
    return math.sqrt(1.0 + levels[0] ** 2)


def _checked(sigmas: Sequence[float] | NDArray[np.float64]) -> list[float]:
    levels = [float(sigma) for sigma in sigmas]
    descends = all(a > b for a, b in pairwise(levels))
    if len(levels) < 2 or not descends or levels[-1] != 0.0:
        raise ScheduleError("noise levels must descend to 0", expected="at least two, the last 0", found=levels)
    return levels


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
