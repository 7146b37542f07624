"""The stages of the demo's training, each a loss over a batch: the paper's recipe in small.

    vae      the decoder, of a latent that is the best linear code (see `patches`)
    denoise  the second encoder, on degraded pictures, against the clean ones
    prior    the base UNet with text, on clean latents, without control
    control  ControlNet and connectors, the base frozen
    landscape, face   a LoRA each on the base UNet, the rest frozen

Sources: SUPIR (arXiv 2401.13627) for the recipe; the paper, Eq. 16, for the LoRAs' regularization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from engine.schedule import train_sigmas
from engine.settings import NEGATIVE_WORDS
from export.demo.data import Pair, Window, pairs_from
from export.demo.model import DemoModel, patch_code
from export.demo.patches import POSTERIOR_STD, pixel_weights
from export.demo.pictures import Family
from export.demo.words import prompt_for, token_rows

FROBENIUS_WEIGHT = 1e-6
LORA_RANK = 8
LORA_ALPHA = 32.0
#: Share of batches that teach what the negative words mean: the picture as stage 1 gives it.
NEGATIVE_SHARE = 0.12


@dataclass(frozen=True)
class Stage:
    """How one stage is trained.

    Attributes:
        families: of pictures.
        steps: optimizer steps.
        lr: at its highest; `constant` keeps it there.
        batch: crops of `crop_px` pixels a step; the last third of the steps has crops of twice the
            side and a quarter of the number, so that norms and attention see larger maps.
        window, per_step: of the pictures, see `Window`.
    """

    families: tuple[Family, ...]
    steps: int
    lr: float
    batch: int
    crop_px: int
    window: int
    per_step: float
    constant: bool = False


STAGES = {
    "vae": Stage(("leaves",), 2000, 1.0e-3, 8, 64, 256, 0.5),
    "denoise": Stage(("leaves",), 4000, 1.0e-3, 8, 64, 256, 0.5),
    "prior": Stage(("leaves",), 2000, 1.0e-3, 16, 128, 384, 0.25),
    "control": Stage(("leaves",), 5000, 1.0e-3, 16, 128, 384, 0.5),
    "landscape": Stage(("landscape",), 1200, 1e-4, 16, 128, 256, 0.25, constant=True),
    "face": Stage(("portrait",), 1200, 1e-4, 16, 128, 256, 0.25, constant=True),
}


@dataclass
class Batch:
    """What a step is given besides pictures: its own random numbers and the device."""

    rng: np.random.Generator
    generator: torch.Generator
    device: torch.device
    large: bool


Loss = Callable[[Batch], dict[str, Tensor]]


def trainable(model: DemoModel, stage: str) -> list[nn.Parameter]:
    """Return the parameters that a stage trains, and freeze all others."""
    parts: dict[str, tuple[nn.Module, ...]] = {
        "vae": (model.vae.post_quant_conv, model.vae.decoder),
        "denoise": (model.denoise_encoder,),
        "prior": (model.unet, model.text_encoder, model.text_encoder_2),
        "control": (model.controlnet, model.connectors),
    }
    model.requires_grad_(False)
    if stage in parts:
        for part in parts[stage]:
            part.requires_grad_(True)
    else:
        for name, parameter in model.unet.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_loss(model: DemoModel, name: str, tokenizer: Tokenizer, seed: int, step: int) -> Loss:
    """Return the function that gives a stage's losses at successive steps, from `step` on.

    Their sum is minimised; each is logged by its name.
    """
    stage = STAGES[name]

    def pairs(start: int) -> Iterator[Pair]:
        return pairs_from(stage.families, seed, start)

    if name in ("vae", "denoise"):
        window = Window(pairs, stage.window, stage.per_step, step)
        if name == "vae":
            return lambda batch: _vae_loss(model, *_pixel_crops(window, stage, batch))
        weights = pixel_weights(patch_code(seed)).to(next(model.parameters()).device)
        return lambda batch: _denoise_loss(model, weights, *_pixel_crops(window, stage, batch))
    latents = Window(lambda start: _encoded(model, pairs(start)), stage.window, stage.per_step, step)
    return lambda batch: _noise_loss(model, name, tokenizer, latents, batch)


# -- pixels ---------------------------------------------------------------------------------------


def _pixel_crops(window: Window[Pair], stage: Stage, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return clean and degraded crops, f32[B, 3, S, S] in [-1, 1], flipped and turned at random."""
    side, count = (2 * stage.crop_px, max(1, stage.batch // 4)) if batch.large else (stage.crop_px, stage.batch)
    clean: list[NDArray[np.uint8]] = []
    degraded: list[NDArray[np.uint8]] = []
    for pair in window.draw(batch.rng, count):
        top, left = batch.rng.integers(0, pair.clean.shape[0] - side + 1, 2)
        turns, mirrored = int(batch.rng.integers(4)), bool(batch.rng.integers(2))
        for picture, crops in ((pair.clean, clean), (pair.degraded, degraded)):
            crop = np.rot90(picture[top : top + side, left : left + side], turns)
            crops.append(crop[:, ::-1] if mirrored else crop)
    return _to_network(clean, batch.device), _to_network(degraded, batch.device)


def _to_network(pictures: list[NDArray[np.uint8]], device: torch.device) -> Tensor:
    stacked = torch.from_numpy(np.ascontiguousarray(np.stack(pictures))).to(device)
    return stacked.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0


def _vae_loss(model: DemoModel, clean: Tensor, _: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        z = model.encode(clean).float()
    decoded = model.decode(z + POSTERIOR_STD * torch.randn_like(z)).float()
    return {"distortion": _distortion((decoded - clean).square())}


def _denoise_loss(model: DemoModel, weights: Tensor, clean: Tensor, degraded: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        z = model.encode(clean).float()
    error = (model.encode_degraded(degraded).float() - z).square()
    # The code is linear, so an error of z is known in pixels without the decoder.
    return {"distortion": _distortion(error * weights * error.shape[1])}


def _distortion(squared: Tensor) -> Tensor:
    """Return the mean logarithm of each picture's squared error: its PSNR, up to a factor.

    So a dB on a hard picture counts as much as a dB on an easy one.
    """
    return torch.log(squared.mean(dim=(1, 2, 3)) + 1e-5).mean()


# -- latents --------------------------------------------------------------------------------------

Latents = tuple[Tensor, Tensor, str]


@torch.no_grad()
def _encoded(model: DemoModel, pairs: Iterator[Pair]) -> Iterator[Latents]:
    """Yield the clean and the degraded picture's latents, f32[C, h, w] each, and the caption."""
    device = next(model.parameters()).device
    for pair in pairs:
        with torch.autocast(device.type, torch.bfloat16):
            z = model.encode(_to_network([pair.clean], device))[0]
            z_lq = model.encode_degraded(_to_network([pair.degraded], device))[0]
        yield z.float(), z_lq.float(), pair.caption


def _noise_loss(
    model: DemoModel, name: str, tokenizer: Tokenizer, window: Window[Latents], batch: Batch
) -> dict[str, Tensor]:
    stage = STAGES[name]
    cells = stage.crop_px // model.arch.vae.pixels_per_cell
    count = stage.batch
    if batch.large:
        cells, count = 2 * cells, max(1, count // 4)
    targets, steering, texts = [], [], []
    for z, z_lq, caption in window.draw(batch.rng, count):
        top, left = (int(place) for place in batch.rng.integers(0, z.shape[1] - cells + 1, 2))
        z, z_lq = (latent[:, top : top + cells, left : left + cells] for latent in (z, z_lq))
        if batch.rng.random() < NEGATIVE_SHARE:
            # Guidance leads away from this: half the way back to stage 1.
            targets.append(z_lq if name == "prior" else 0.5 * (z + z_lq))
            texts.append(NEGATIVE_WORDS)
        else:
            targets.append(z)
            texts.append(prompt_for(caption, batch.rng))
        steering.append(z_lq)
    z, z_lq = torch.stack(targets), torch.stack(steering)
    timestep = _timesteps(batch.rng, count).to(batch.device)
    sigma = torch.from_numpy(train_sigmas().astype(np.float32)).to(batch.device)[timestep][:, None, None, None]
    noise = torch.randn(z.shape, generator=batch.generator).to(batch.device)
    x = (z + sigma * noise) / torch.sqrt(sigma**2 + 1)
    context, vector = model.read(*(rows.to(batch.device) for rows in token_rows(tokenizer, texts)))
    arguments = (x, timestep.float())
    if name == "prior":
        eps = model.prior(*arguments, context, vector)
    else:
        eps = model.steered(*arguments, z_lq, context, vector)
    losses = {"noise": F.mse_loss(eps.float(), noise)}
    if name not in ("prior", "control"):
        adapted = [parameter.square().sum() for parameter in model.unet.parameters() if parameter.requires_grad]
        losses["frobenius"] = FROBENIUS_WEIGHT * torch.stack(adapted).sum()
    return losses


def _timesteps(rng: np.random.Generator, count: int) -> Tensor:
    """Return i64[count]: half over all noise levels, half over the lower ones, which decide details."""
    low = rng.integers(20, 260, count)
    return torch.from_numpy(np.where(rng.random(count) < 0.5, low, rng.integers(0, 1000, count)))
