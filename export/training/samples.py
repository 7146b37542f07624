"""What a LoRA does to held-out pictures, as a picture to look at while it trains.

Without SUPIR, a picture is noised and sampled back from there; with it, a degraded one is restored from noise alone.
Both with the LoRA and without it, with the same noise, in the engine's own sampler, without guidance.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from engine.bundle.storage import atomic_write
from engine.sampling.noise import noise_field
from engine.sampling.sampler import Step, StepTable, edm_table, sample
from engine.sampling.schedule import nearest_level, trailing_sigmas
from export.training.degrade import TABLE_1
from export.training.encode import Sample
from export.training.objective import Network
from export.training.precision import half_products

#: Rows of the picture, and steps of a run.
SHOWN, STEPS = 4, 15
#: The noise that a picture is sampled back from without SUPIR: forms stay, details are the network's.
_START_SIGMA = 1.5
_GAP_PX, _HEAD_PX = 6, 18

Latent = NDArray[np.float32]


@dataclass(frozen=True)
class Sampler:
    """Samples held-out pictures.

    Attributes:
        network: with the LoRA.
        decoder: of latents, `VaeDecoderGraph`.
        controlled: whether SUPIR is in the loop.
        half: whether products are in bfloat16.
    """

    network: Network
    decoder: nn.Module
    device: torch.device
    seed: int
    controlled: bool = False
    half: bool = False

    @torch.no_grad()
    def run(self, item: Sample, number: int) -> Latent:
        """Return a held-out picture's latent as the network has it, f32[C, h, w].

        Args:
            item: the picture.
            number: its own, which chooses its noise and its degradation.
        """
        latents, text = item.read(), item.text.read()
        lq = latents[_lq(number)] if self.controlled else None
        table = _table(controlled=self.controlled)
        noise = noise_field(self.seed, number, item.shape)
        if not self.controlled:  # from where the picture was noised to
            noise = (latents["z"] + np.float32(table.steps[0].sigma) * noise) / np.float32(table.start_scale)
        context, vector = (self._row(text[name]) for name in ("context", "vector"))
        steering = None if lq is None else self._row(lq)

        def predict(x: Latent, step: Step) -> tuple[Latent, None]:
            timestep = torch.full((1,), float(step.timestep), device=self.device)
            with half_products(self.device, wanted=self.half):
                eps = self.network(torch.from_numpy(x).to(self.device), timestep, steering, context, vector)
            return eps.float().cpu().numpy(), None

        *_, last = sample(table, predict, lambda _: noise[None])
        assert last.x is not None  # it is on the host
        return last.x[0]

    @torch.no_grad()
    def pixels(self, z: Latent) -> NDArray[np.uint8]:
        """Return a latent f32[C, h, w] as a picture, u8[8h, 8w, 3]."""
        decoded = self.decoder(self._row(z))[0].float().cpu().numpy()
        return ((decoded.transpose(1, 2, 0) + 1) * 127.5 + 0.5).clip(0, 255).astype(np.uint8)

    def _row(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array[None]).to(self.device)


def draw_samples(sampler: Sampler, items: Sequence[Sample], without_lora: Sequence[Latent], picture: Path) -> None:
    """Draw held-out pictures, and what is made of them without and with the LoRA.

    Args:
        sampler: with the LoRA.
        items: the pictures.
        without_lora: what `Sampler.run` gave for each before training.
        picture: a PNG to write.
    Raises:
        OutputError: it cannot be written.
    """
    names = ["held out", "degraded", "without the LoRA", "with it"]
    rows = []
    for number, (item, before) in enumerate(zip(items, without_lora, strict=True)):
        latents = item.read()
        shown = [latents["z"], latents[_lq(number)] if sampler.controlled else None, before, sampler.run(item, number)]
        rows.append([sampler.pixels(z) for z in shown if z is not None])
    if not sampler.controlled:
        names.remove("degraded")
    content = io.BytesIO()
    _sheet(rows, names).save(content, "PNG")
    with atomic_write(picture, "write the samples") as file:
        file.write(content.getvalue())


def _lq(number: int) -> str:
    return f"z_lq_{number % len(TABLE_1)}"


def _table(*, controlled: bool) -> StepTable:
    sigmas = trailing_sigmas(STEPS)
    if not controlled:
        sigmas = np.concatenate([[_START_SIGMA], sigmas[sigmas < _START_SIGMA]])

    def quantize(sigma: float) -> tuple[int, float]:
        level = nearest_level(sigma)
        return level.timestep, level.sigma

    one: Callable[[float], float] = lambda sigma: 1.0  # noqa: E731
    return edm_table(sigmas, quantize=quantize, cfg_scale=one, control_scale=one, pull=lambda sigma, after: 0.0)


def _sheet(rows: Sequence[Sequence[NDArray[np.uint8]]], names: Sequence[str]) -> Image.Image:
    font = ImageFont.load_default()
    heads = [int(font.getlength(name)) + 1 for name in names]
    widths = [max(heads[column], *(row[column].shape[1] for row in rows)) for column in range(len(names))]
    heights = [max(cell.shape[0] for cell in row) for row in rows]
    sheet = Image.new(
        "RGB", (sum(widths) + _GAP_PX * (len(widths) - 1), _HEAD_PX + sum(heights) + _GAP_PX * (len(rows) - 1)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    left = 0
    for column, name in enumerate(names):
        pen.text((left, 2), name, "black", font=font)
        top = _HEAD_PX
        for row, height in zip(rows, heights, strict=True):
            sheet.paste(Image.fromarray(row[column]), (left, top))
            top += height + _GAP_PX
        left += widths[column] + _GAP_PX
    return sheet
