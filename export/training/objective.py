"""What a LoRA is trained by: the noise in a noisy latent, at random levels; and the same on held-out pictures.

Everything random about a picture in a step follows from the seed, the step and the picture's place in it. So it
depends neither on how many go through the network together, nor on the device, nor on where a run was stopped.
Sources: the paper, Eq. 4 and Eq. 16; SPEC, "Schedule" and "Text".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.schedule import TRAIN_STEPS, train_sigmas
from export.training.adapters import squared_norm
from export.training.degrade import TABLE_1
from export.training.encode import Sample, Text
from export.training.loop import Losses
from export.training.precision import half_products

#: Noise levels at which each held-out picture is judged, spread evenly over all.
HELD_OUT_LEVELS = 8
#: First numbers of seeds, so that no two purposes share random numbers.
_ORDER, _DRAW, _HELD_OUT = 1, 2, 3


class Network(Protocol):
    """A UNet, with or without control, as what is trained sees it."""

    def __call__(self, x: Tensor, timestep: Tensor, lq: Tensor | None, context: Tensor, vector: Tensor) -> Tensor:
        """Return the noise estimate f[B, C, h, w].

        Args:
            x: f32[B, C, h, w], noisy latent × 1/√(σ² + 1).
            timestep: f32[B], 0 … 999.
            lq: f32[B, C, h, w], of the degraded pictures; None where SUPIR is not in the loop.
            context: f32[B, 77k, C]. vector: f32[B, V].
        """
        ...


@dataclass(frozen=True)
class Draw:
    """A picture that goes through the network.

    Attributes:
        text: its caption's, or that of no words.
        level: 0 … 999.
        rng: of its noise and its degradation.
    """

    sample: Sample
    text: Text
    level: int
    rng: np.random.Generator

    @property
    def alike(self) -> tuple[int, ...]:
        """What pictures that go through the network together have in common."""
        return (*self.sample.shape, self.text.tokens)


@dataclass(frozen=True)
class Objective:
    """Eq. 4 over samples, with Eq. 16's term.

    Attributes:
        network: that is trained.
        factors: of the LoRA.
        samples, held_out: pictures to train on, and to judge by.
        no_text: what a picture without words has.
        batch: pictures of a step. at_once: those that go through the network together.
        seed: of everything random.
        no_text_share: of the pictures that come without words, so that guidance has something to lead away from.
        frobenius: λ of Eq. 16.
        controlled: whether SUPIR is in the loop.
        half: whether products are in bfloat16.
    """

    network: Network
    factors: Sequence[Tensor]
    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    no_text: Text
    device: torch.device
    batch: int
    at_once: int = 1
    seed: int = 0
    no_text_share: float = 0.1
    frobenius: float = 0.0
    controlled: bool = False
    half: bool = False

    def losses_at(self, step: int) -> Iterator[Losses]:
        """Yield a step's losses, a part for each group that goes through the network together; see `LossesAt`."""
        draws = sorted((self._draw(step, place) for place in range(self.batch)), key=lambda draw: draw.alike)
        for group in _groups(draws, self.at_once):
            yield {"noise": self._squared_errors(group).sum() / self.batch}
        if self.frobenius:
            yield {"frobenius": self.frobenius * squared_norm(self.factors)}

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean of Eq. 4 over held-out pictures, each at the same levels and with the same noise."""
        draws = sorted(
            (self._judged(index, part) for index in range(len(self.held_out)) for part in range(HELD_OUT_LEVELS)),
            key=lambda draw: draw.alike,
        )
        errors = [self._squared_errors(group) for group in _groups(draws, self.at_once)]
        return float(torch.cat(errors).double().mean())

    def _squared_errors(self, draws: Sequence[Draw]) -> Tensor:
        """Return each picture's mean squared error of the noise, f32[B]. Source: the paper, Eq. 4."""
        latents = [draw.sample.read() for draw in draws]
        texts = [draw.text.read() for draw in draws]
        lq = None
        if self.controlled:
            which = [f"z_lq_{draw.rng.integers(len(TABLE_1))}" for draw in draws]
            lq = self._stack([each[name] for each, name in zip(latents, which, strict=True)])
        z, context, vector = (
            self._stack([each[name] for each in read])
            for name, read in (("z", latents), ("context", texts), ("vector", texts))
        )
        noise = self._stack([draw.rng.standard_normal(draw.sample.shape, np.float32) for draw in draws])
        sigma = self._stack([np.float32(train_sigmas()[draw.level]) for draw in draws])[:, None, None, None]
        timestep = torch.tensor([draw.level for draw in draws], dtype=torch.float32, device=self.device)
        x = (z + sigma * noise) / torch.sqrt(sigma**2 + 1)
        with half_products(self.device, wanted=self.half):
            eps = self.network(x, timestep, lq, context, vector)
        return (noise - eps.float()).square().mean(dim=(1, 2, 3))

    def _stack(self, arrays: Sequence[Any]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(self.device)

    def _draw(self, step: int, place: int) -> Draw:
        epoch, index = divmod(step * self.batch + place, len(self.samples))
        sample = self.samples[_order(self.seed, epoch, len(self.samples))[index]]
        rng = np.random.default_rng([self.seed, _DRAW, step, place])
        level = int(rng.integers(TRAIN_STEPS))
        return Draw(sample, self.no_text if rng.random() < self.no_text_share else sample.text, level, rng)

    def _judged(self, index: int, part: int) -> Draw:
        sample = self.held_out[index]
        rng = np.random.default_rng([self.seed, _HELD_OUT, index, part])
        return Draw(sample, sample.text, int((part + 0.5) * TRAIN_STEPS / HELD_OUT_LEVELS), rng)


@lru_cache(maxsize=2)  # a step may reach into the next round
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the order of the samples in one round over all of them."""
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(count)


def _groups(draws: Sequence[Draw], at_once: int) -> Iterator[list[Draw]]:
    """Yield neighbours that are alike, at most so many at a time."""
    for _, alike in groupby(draws, key=lambda draw: draw.alike):
        group = list(alike)
        yield from (group[first : first + at_once] for first in range(0, len(group), at_once))
