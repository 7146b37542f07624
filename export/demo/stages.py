"""The stages of the demo's training, each a loss over a batch: the paper's recipe in small.

    vae      the decoder, of a latent that is the best linear code (see `patches`)
    denoise  the second encoder, on degraded pictures, against the clean ones
    prior    the base UNet with text, on clean latents, without control
    control  ControlNet and connectors, the base frozen
    decode   the decoder again, half of the time of stage 1's latents: a restored latent lacks what
             cannot be known, and a decoder that has only seen clean ones takes that for something else
    steps    UNet, ControlNet and connectors together, for runs of few steps, as Lightning's UNet is tuned
    loras    a LoRA for landscapes and one for portraits on the base UNet, all else frozen; most of the
             time at the last step of a run, which alone is not held close to stage 1

Sources: SUPIR (arXiv 2401.13627) for the recipe; the paper, Eq. 16, for the LoRAs' regularization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from engine.sampling.schedule import nearest_level, trailing_sigmas, train_sigmas
from engine.settings import NEGATIVE_WORDS
from export.demo import files
from export.demo.data import Pair, Window, pairs_from
from export.demo.model import DemoModel, patch_code
from export.demo.patches import PATCH_PX, POSTERIOR_STD, pixel_weights
from export.demo.pictures import Family
from export.demo.words import prompt_for, token_rows
from export.training.adapters import activate, squared_norm
from export.training.precision import half_products

FROBENIUS_WEIGHT = 1e-6
LORA_RANK = 26
LORA_ALPHA = 2600.0
#: What the LoRAs change: the level of the UNet that has the latent's size, where details are decided.
LORA_LAYERS = ("up_blocks.2.", "conv_out")
#: The LoRAs by name, and the pictures that each is for.
LORA_FAMILIES: dict[str, Family] = {"landscape": "landscape", "face": "portrait"}
#: The noise levels that LoRAs are for: those of a run of so many steps, mostly its last.
RUN_STEPS, LAST_STEP_SHARE = 15, 0.75
#: Share of latents that the decoder is tuned on which are stage 1's.
DECODED_STAGE_1 = 0.5
#: What is left to find of a latent at the highest noise: all of it, or what stage 1 lacks.
PRIOR_VARIANCE, STAGE_1_VARIANCE = 1.0, 0.25


@dataclass(frozen=True)
class Stage:
    """How one stage is trained.

    Attributes:
        needs: the stages that come before it; the others can be trained beside it.
        keeps: prefixes of the parameters that are its result.
        trains: prefixes of those that it trains; none for LoRAs, which come on top.
        families: of pictures.
        steps: optimizer steps.
        lr: at its highest.
        batch: crops of `crop_px` pixels a step; if they grow, the last third of the steps has crops of
            twice the side and a quarter of the number, so that norms and attention see larger maps.
        window, per_step: of the pictures, see `Window`.
        from_stage_1: share of pictures that are noised from stage 1 instead of from the clean picture.
            A run of few steps comes from there: its first estimates are stage 1's, and what they lack
            is no part of x. A network that has only seen noised clean pictures takes that for information.
        table_1: share of the degradations that are Table 1's own.
        of_a_run: take the noise levels of a run, see `RUN_STEPS`; else all of them, and more of the lower.
        negative_share: share of pictures that come with the negative words.
        negative_way: how far the way from the clean picture back to stage 1 these words lead under control.
        control_scale: how strongly the control features act.
        autocast: whether products are in bfloat16, where the device has it.
    """

    needs: tuple[str, ...]
    keeps: tuple[str, ...]
    trains: tuple[str, ...]
    families: tuple[Family, ...]
    steps: int
    lr: float
    batch: int
    crop_px: int
    window: int
    per_step: float
    grows: bool = True
    from_stage_1: float = 0.0
    table_1: float = 0.5
    of_a_run: bool = False
    negative_share: float = 0.12
    negative_way: float = 0.25
    control_scale: float = 1.0
    autocast: bool = True


_DECODER = ("vae.post_quant_conv.", "vae.decoder.")
_BASE = ("unet.", "text_encoder.", "text_encoder_2.")
_CONTROL = ("controlnet.", "connectors.")
STAGES = {
    "vae": Stage((), ("vae.",), _DECODER, ("leaves",), 3000, 1e-3, 8, 64, 256, 0.5),
    "denoise": Stage((), ("denoise_encoder.",), ("denoise_encoder.",), ("leaves",), 11000, 1e-3, 8, 64, 256, 0.5),
    "prior": Stage((), _BASE, _BASE, ("leaves",), 6000, 1e-3, 16, 128, 384, 0.25),
    "control": Stage(
        ("denoise", "prior"), _CONTROL, _CONTROL, ("leaves",), 8000, 1e-3, 16, 128, 384, 0.25, from_stage_1=0.5
    ),
    "decode": Stage(("vae", "denoise"), _DECODER, _DECODER, ("leaves",), 2000, 5e-4, 8, 64, 256, 0.25),
    "steps": Stage(
        ("denoise", "prior", "control"),
        ("unet.", *_CONTROL),
        ("unet.", *_CONTROL),
        ("leaves",),
        1500,
        1e-3,
        16,
        128,
        384,
        0.25,
        from_stage_1=0.9,
    ),
    # A thousand pictures of each family, which are encoded once. What a LoRA has to learn at the last step are
    # small corrections of stage 1, by either text alike: guidance takes the difference of the two as it is.
    "loras": Stage(
        ("denoise", "prior", "control", "steps"),
        (),
        (),
        ("landscape", "portrait"),
        8000,
        1e-4,
        4,
        256,
        2000,
        0.0,
        grows=False,
        from_stage_1=1.0,
        table_1=0.8,
        of_a_run=True,
        negative_share=0.3,
        negative_way=0.0,
        control_scale=files.SETTINGS["control_scale"],
        autocast=False,
    ),
}


@dataclass
class Batch:
    """What a step is given besides pictures: its number, its own random numbers and the device."""

    step: int
    rng: np.random.Generator
    generator: torch.Generator
    device: torch.device
    large: bool


Loss = Callable[[Batch], dict[str, Tensor]]


def trainable(model: DemoModel, stage: Stage) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that a stage trains, by name, and freeze all others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(stage.trains))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_loss(model: DemoModel, name: str, tokenizer: Tokenizer, seed: int, step: int) -> Loss:
    """Return the function that gives a stage's losses at successive steps, from `step` on.

    Their sum is minimised; each is logged by its name.
    """
    stage, code = STAGES[name], Code(seed, next(model.parameters()).device)

    def pairs(start: int) -> Iterator[Pair]:
        return pairs_from(stage.families, seed, start, table_1=stage.table_1)

    if name in ("vae", "denoise"):
        window = Window(pairs, stage.window, stage.per_step, step)
        if name == "vae":
            return lambda batch: _vae_loss(model, code, *_pixel_crops(window, stage, batch))
        return lambda batch: _denoise_loss(model, code, *_pixel_crops(window, stage, batch))
    encode = code.encode if name == "prior" else model.encode_degraded
    latents = Window(
        lambda start: _encoded(code, encode, pairs(start), autocast=stage.autocast), stage.window, stage.per_step, step
    )
    if name == "decode":
        return lambda batch: _decode_loss(model, code, stage, latents, batch)
    if name == "prior":
        return lambda batch: _prior_loss(model, _noised(stage, tokenizer, latents, batch, prior=True))
    if name in ("control", "steps"):
        return lambda batch: _control_loss(model, stage, _noised(stage, tokenizer, latents, batch))
    return lambda batch: _lora_loss(model, code, stage, tokenizer, latents, batch)


class Code:
    """The autoencoder's latent as one convolution: what its encoder gives, in a hundredth of the time."""

    def __init__(self, seed: int, device: torch.device) -> None:
        code = patch_code(seed)
        self._weight, self._bias = (part.to(device) for part in code.kernel())
        self.pixel_weights = pixel_weights(code).to(device)
        self.device = device

    def encode(self, pixels: Tensor) -> Tensor:
        """Return z f32[B, C, h, w] for f32[B, 3, 8h, 8w] in [-1, 1]."""
        with torch.autocast(pixels.device.type, enabled=False):
            return F.conv2d(pixels, self._weight, self._bias, stride=PATCH_PX)


# -- pixels ---------------------------------------------------------------------------------------


def _pixel_crops(window: Window[Pair], stage: Stage, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return clean and degraded crops, f32[B, 3, S, S] in [-1, 1], flipped and turned at random."""
    cells, count = _crop_cells(stage, batch)
    side = PATCH_PX * cells
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


def _vae_loss(model: DemoModel, code: Code, clean: Tensor, _: Tensor) -> dict[str, Tensor]:
    z = code.encode(clean)
    decoded = model.decode(z + POSTERIOR_STD * torch.randn_like(z)).float()
    return {"distortion": _distortion((decoded - clean).square())}


def _denoise_loss(model: DemoModel, code: Code, clean: Tensor, degraded: Tensor) -> dict[str, Tensor]:
    error = (model.encode_degraded(degraded).float() - code.encode(clean)).square()
    return {"distortion": _distortion(_in_pixels(code, error))}


def _in_pixels(code: Code, squared: Tensor) -> Tensor:
    """Return a latent's squared error in pixels: the code is linear, so the decoder is not needed."""
    return squared * code.pixel_weights * squared.shape[1]


def _distortion(squared: Tensor) -> Tensor:
    """Return the mean logarithm of each picture's squared error: its PSNR, up to a factor.

    So a dB on a hard picture counts as much as a dB on an easy one.
    """
    return torch.log(squared.mean(dim=(1, 2, 3)) + 1e-5).mean()


# -- latents --------------------------------------------------------------------------------------


@dataclass
class Latents:
    """A picture, u8[8h, 8w, 3], its latents f32[C, h, w], clean and degraded, its caption and family."""

    clean: NDArray[np.uint8]
    z: Tensor
    z_lq: Tensor
    caption: str
    family: Family


@dataclass
class Noised:
    """A batch for the networks that predict noise.

    Attributes:
        z: f32[B, C, h, w], to be found. z_lq: of the degraded pictures.
        x: f32[B, C, h, w], at `sigma`. sigma: f32[B, 1, 1, 1]. timestep: f32[B].
        text: token ids for the two towers, i64[B, 77] each.
        weight: f32[B, 1, 1, 1], of the squared error of the estimate of z.
    """

    z: Tensor
    z_lq: Tensor
    x: Tensor
    sigma: Tensor
    timestep: Tensor
    text: tuple[Tensor, Tensor]
    weight: Tensor

    @property
    def scaled(self) -> Tensor:
        return self.x / torch.sqrt(self.sigma**2 + 1)

    def squared_error(self, eps: Tensor) -> Tensor:
        """Return f32[B, C, h, w]: of the estimate of z that the predicted noise means."""
        return (self.x - self.sigma * eps.float() - self.z).square()

    def loss(self, eps: Tensor) -> Tensor:
        """Return the mean squared error, weighted by the noise's strength."""
        return (self.weight * self.squared_error(eps)).mean()


@torch.no_grad()
def _encoded(
    code: Code, encode: Callable[[Tensor], Tensor], pairs: Iterator[Pair], *, autocast: bool = True
) -> Iterator[Latents]:
    """Yield pictures' latents; `encode` is for the degraded ones."""
    for pair in pairs:
        clean, degraded = (_to_network([picture], code.device) for picture in (pair.clean, pair.degraded))
        with half_products(code.device, wanted=autocast):
            z_lq = encode(degraded)[0].float()
        yield Latents(pair.clean, code.encode(clean)[0], z_lq, pair.caption, pair.family)


def _crop_cells(stage: Stage, batch: Batch) -> tuple[int, int]:
    """Return the side of this step's crops in latent cells, and their number."""
    cells = stage.crop_px // PATCH_PX
    return (2 * cells, max(1, stage.batch // 4)) if batch.large and stage.grows else (cells, stage.batch)


def _decode_loss(
    model: DemoModel, code: Code, stage: Stage, window: Window[Latents], batch: Batch
) -> dict[str, Tensor]:
    cells, count = _crop_cells(stage, batch)
    pictures, latents = [], []
    for item in window.draw(batch.rng, count):
        top, left = (int(place) for place in batch.rng.integers(0, item.z.shape[1] - cells + 1, 2))
        rows, columns = (slice(PATCH_PX * at, PATCH_PX * (at + cells)) for at in (top, left))
        pictures.append(item.clean[rows, columns])
        at_stage_1 = batch.rng.random() < DECODED_STAGE_1
        z = item.z_lq if at_stage_1 else item.z + POSTERIOR_STD * torch.randn_like(item.z)
        latents.append(z[:, top : top + cells, left : left + cells])
    clean = _to_network(pictures, code.device)
    return {"distortion": _distortion((model.decode(torch.stack(latents)).float() - clean).square())}


def _noised(
    stage: Stage,
    tokenizer: Tokenizer,
    window: Window[Latents],
    batch: Batch,
    *,
    prior: bool = False,
    family: Family | None = None,
) -> Noised:
    """Draw crops, words, noise levels and noise.

    Args:
        prior: without control: all is noised from its target, and the negative words stand for the
            degraded picture itself.
        family: keep to this family's pictures.
    """
    cells, count = _crop_cells(stage, batch)
    targets: list[Tensor] = []
    steering: list[Tensor] = []
    centers: list[Tensor] = []
    own: list[float] = []
    texts: list[str] = []
    for item in window.draw(batch.rng, count, None if family is None else lambda item: item.family == family):
        top, left = (int(place) for place in batch.rng.integers(0, item.z.shape[1] - cells + 1, 2))
        z, z_lq = (latent[:, top : top + cells, left : left + cells] for latent in (item.z, item.z_lq))
        if batch.rng.random() < stage.negative_share:
            texts.append(NEGATIVE_WORDS)
            z = z_lq if prior else z + stage.negative_way * (z_lq - z)
        else:
            texts.append(prompt_for(item.caption, batch.rng))
        at_stage_1 = not prior and batch.rng.random() < stage.from_stage_1
        targets.append(z)
        steering.append(z_lq)
        centers.append(z_lq if at_stage_1 else z)
        own.append(0.0 if at_stage_1 else 1.0)
    z, z_lq, center = (torch.stack(latents) for latents in (targets, steering, centers))
    own_center = torch.tensor(own).to(batch.device)[:, None, None, None]
    timestep = _timesteps(batch.rng, count, of_a_run=stage.of_a_run).to(batch.device)
    sigma = torch.from_numpy(train_sigmas().astype(np.float32)).to(batch.device)[timestep][:, None, None, None]
    x = center + sigma * torch.randn(z.shape, generator=batch.generator).to(batch.device)
    # About what is unknown at each level: the noise where it is weak, else what is left to find.
    weight = own_center / sigma**2 + 1 / (PRIOR_VARIANCE if prior else STAGE_1_VARIANCE)
    ids, ids_2 = token_rows(tokenizer, texts)
    return Noised(z, z_lq, x, sigma, timestep.float(), (ids.to(batch.device), ids_2.to(batch.device)), weight)


def sample_noised(tokenizer: Tokenizer, seed: int, device: torch.device) -> Noised:
    """Return a batch as the stage `prior` has, to average over before control is trained."""
    stage, code = STAGES["prior"], Code(seed, device)
    window = Window(
        lambda start: _encoded(code, code.encode, pairs_from(stage.families, seed, start, workers=0)),
        stage.batch,
        0.0,
        0,
    )
    generator = torch.Generator().manual_seed(seed)
    return _noised(stage, tokenizer, window, Batch(0, np.random.default_rng(seed), generator, device, True), prior=True)


def _prior_loss(model: DemoModel, noised: Noised) -> dict[str, Tensor]:
    return {"noise": noised.loss(model.prior(noised.scaled, noised.timestep, *model.read(*noised.text)))}


def _control_loss(model: DemoModel, stage: Stage, noised: Noised) -> dict[str, Tensor]:
    return {"noise": noised.loss(_steered(model, noised, stage))}


def _steered(model: DemoModel, noised: Noised, stage: Stage) -> Tensor:
    texts = model.read(*noised.text)
    return model.steered(noised.scaled, noised.timestep, noised.z_lq, *texts, scale=stage.control_scale)


def _lora_loss(
    model: DemoModel, code: Code, stage: Stage, tokenizer: Tokenizer, window: Window[Latents], batch: Batch
) -> dict[str, Tensor]:
    """Train one LoRA on its family, half of the time with the other one merged beside it.

    So each learns to bear the other's presence, for they are merged together later.
    """
    names = list(LORA_FAMILIES)
    own = names[batch.step % len(names)]
    active = names if batch.rng.random() < 0.5 else [own]
    factors = activate(model.unet, active, own)
    noised = _noised(stage, tokenizer, window, batch, family=LORA_FAMILIES[own])
    error = _in_pixels(code, noised.squared_error(_steered(model, noised, stage)))
    return {own: _distortion(error), "frobenius": FROBENIUS_WEIGHT * squared_norm(factors)}


def _timesteps(rng: np.random.Generator, count: int, *, of_a_run: bool) -> Tensor:
    """Return i64[count]: those of a run, or half over all levels, half over the lower ones, which decide details."""
    if of_a_run:
        levels = np.array([nearest_level(sigma).timestep for sigma in trailing_sigmas(RUN_STEPS)[:-1]])
        return torch.from_numpy(np.where(rng.random(count) < LAST_STEP_SHARE, levels[-1], rng.choice(levels, count)))
    low = rng.integers(20, 260, count)
    return torch.from_numpy(np.where(rng.random(count) < 0.5, low, rng.integers(0, 1000, count)))
