"""Sizes of the networks, read off the shapes of their tensors; no configuration file is needed.

Names are ours (see `keymap`). The structure is SDXL's and fixed: three levels, two residual blocks
each, heads of 64 channels. Widths, depths, channels of the latent, and the VAE's levels are free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.bundle.sdxl import HEAD_CHANNELS, MICRO_CONDITIONS
from engine.errors import CheckpointError
from export.checkpoint.keymap import ldm_name

#: Of the ONNX graphs, whoever writes them.
OPSET = 18
NORM_GROUPS = 32
#: GroupNorm eps of residual blocks, output and connectors; of transformers' input and the VAE.
NORM_EPS = 1e-5
FINE_NORM_EPS = 1e-6
#: z = LATENT_SCALE × the autoencoder's mode, so that z has about unit variance.
LATENT_SCALE = 0.13025
IMAGE_CHANNELS = 3
#: The longest period of the sinusoids that embed numbers.
MAX_PERIOD = 10000.0
UNET_LEVELS = 3
RESNETS_PER_LEVEL = 2
CONTROL_FEATURES = 10
#: Where, among the twelve connectors, the cross attentions of the two upsampling blocks stand.
CROSS_CONNECTORS = (3, 7)
MIDDLE_CONNECTOR = 11

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class UNetArch:
    """A UNet, or a ControlNet, which is its first half.

    Attributes:
        latent_channels: of the latent that it denoises.
        channels: of each level.
        depths: transformer blocks per residual block, of each level; 0 is none.
        middle_depth: transformer blocks in the middle.
        context_channels: of the text's hidden states.
        vector_channels: of pooled text and micro-conditioning together.
    """

    latent_channels: int
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    middle_depth: int
    context_channels: int
    vector_channels: int

    @property
    def embedding_channels(self) -> int:
        return 4 * self.channels[0]

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the nine encoder features, from the first convolution down."""
        features = [self.channels[0]]
        for level, channels in enumerate(self.channels):
            features += [channels] * RESNETS_PER_LEVEL
            if level + 1 < len(self.channels):
                features.append(channels)
        return tuple(features)

    @property
    def feature_divisors(self) -> tuple[int, ...]:
        """How many times smaller than the latent each of the nine encoder features is."""
        divisors = [1]
        for level in range(len(self.channels)):
            divisors += [2**level] * RESNETS_PER_LEVEL
            if level + 1 < len(self.channels):
                divisors.append(2 ** (level + 1))
        return tuple(divisors)


@dataclass(frozen=True)
class VaeArch:
    """An autoencoder: channels of each level from the pixels down, and of the latent."""

    channels: tuple[int, ...]
    latent_channels: int

    @property
    def pixels_per_cell(self) -> int:
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True)
class TextArch:
    """A CLIP text tower.

    Attributes:
        activation: of its MLPs, as transformers names it.
        projected: whether it has a projection of the pooled state.
    """

    width: int
    layers: int
    mlp_channels: int
    vocabulary: int
    activation: str
    projected: bool

    @property
    def heads(self) -> int:
        return self.width // HEAD_CHANNELS


@dataclass(frozen=True)
class Architecture:
    """All networks of a bundle."""

    unet: UNetArch
    controlnet: UNetArch
    vae: VaeArch
    text_encoder: TextArch
    text_encoder_2: TextArch

    @property
    def sinusoid_channels(self) -> int:
        """Channels of the sinusoid that embeds each number of micro-conditioning; SDXL's has 256."""
        return (self.unet.vector_channels - self.text_encoder_2.width) // len(MICRO_CONDITIONS)


def infer_architecture(shapes: Shapes) -> Architecture:
    """Read the architecture off tensor shapes.

    Args:
        shapes: of every tensor, by our names.
    Raises:
        CheckpointError: a tensor that tells a size is missing, or the sizes contradict each other.
    """
    reader = _Reader(shapes)
    architecture = Architecture(
        unet=reader.unet("unet"),
        controlnet=reader.unet("controlnet"),
        vae=reader.vae("vae"),
        text_encoder=reader.text("text_encoder", "quick_gelu", projected=False),
        text_encoder_2=reader.text("text_encoder_2", "gelu", projected=True),
    )
    _check_consistent(architecture)
    return architecture


class _Reader:
    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        if name not in self.shapes:
            raise missing_tensor(name)
        shape = self.shapes[name]
        if len(shape) != rank:
            raise CheckpointError(
                "a tensor has the wrong shape", where=ldm_name(name), expected=f"{rank} axes", found=list(shape)
            )
        return shape

    def count(self, pattern: str) -> int:
        """Return how many of pattern.format(0), pattern.format(1), … exist."""
        total = 0
        while pattern.format(total) in self.shapes:
            total += 1
        return total

    def unet(self, net: str) -> UNetArch:
        channels, latent_channels, *_ = self.shape(f"{net}.conv_in.weight", 4)
        levels = self.count(f"{net}.down_blocks.{{}}.resnets.0.conv1.weight")
        if levels != UNET_LEVELS:
            raise CheckpointError(
                "the network has another structure than SDXL's",
                where=net,
                expected=f"{UNET_LEVELS} levels",
                found=f"{levels} levels",
                fix="give a checkpoint of the SDXL family",
            )
        sizes = tuple(self.shape(f"{net}.down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in range(levels))
        blocks = "transformer_blocks.{}.attn1.to_q.weight"
        depths = tuple(self.count(f"{net}.down_blocks.{level}.attentions.0.{blocks}") for level in range(levels))
        middle = f"{net}.mid_block.attentions.0"
        if sizes[0] != channels:
            raise CheckpointError("the first level must keep its width", where=net, expected=channels, found=sizes[0])
        arch = UNetArch(
            latent_channels=latent_channels,
            channels=sizes,
            depths=depths,
            middle_depth=self.count(f"{middle}.{blocks}"),
            context_channels=self.shape(f"{middle}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
            vector_channels=self.shape(f"{net}.add_embedding.linear_1.weight", 2)[1],
        )
        for size, depth in zip((*sizes, sizes[-1]), (*depths, arch.middle_depth), strict=True):
            _check_divides(net, "heads", HEAD_CHANNELS if depth else 1, size)
            _check_divides(net, "groups of its norms", NORM_GROUPS, size)
        return arch

    def vae(self, net: str) -> VaeArch:
        levels = self.count(f"{net}.encoder.down_blocks.{{}}.resnets.0.conv1.weight")
        if levels == 0:
            raise missing_tensor(f"{net}.encoder.down_blocks.0.resnets.0.conv1.weight")
        channels = tuple(
            self.shape(f"{net}.encoder.down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in range(levels)
        )
        for size in channels:
            _check_divides(net, "groups of its norms", NORM_GROUPS, size)
        return VaeArch(channels, self.shape(f"{net}.decoder.conv_in.weight", 4)[1])

    def text(self, net: str, activation: str, *, projected: bool) -> TextArch:
        vocabulary, width = self.shape(f"{net}.embeddings.token_embedding.weight", 2)
        _check_divides(net, "heads", HEAD_CHANNELS, width)
        return TextArch(
            width=width,
            layers=self.count(f"{net}.encoder.layers.{{}}.mlp.fc1.weight"),
            mlp_channels=self.shape(f"{net}.encoder.layers.0.mlp.fc1.weight", 2)[0],
            vocabulary=vocabulary,
            activation=activation,
            projected=projected,
        )


def sinusoid_frequencies(channels: int) -> NDArray[np.float32]:
    """Return the frequencies of a sinusoid of `channels` channels, f32[channels / 2].

    Exponents are computed in float32, as the networks were trained; their exponentials are rounded once, because
    the last bit of a float32 exp differs between Intel's and AMD's processors.

    Source: SPEC, "Networks"; frequencies exp(-ln 10000 · i / (d/2)).
    """
    half = channels // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(MAX_PERIOD) / half)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def missing_tensor(name: str, also: int = 0) -> CheckpointError:
    """Return the error for a tensor that no checkpoint gave, by the name that files use.

    Args:
        name: ours.
        also: how many more are missing.
    """
    supir = ("controlnet", "connectors", "denoise_encoder")
    options = {"unet": "--unet, or --sdxl where there is none,", **dict.fromkeys(supir, "--supir")}
    option = options.get(name.split(".")[0], "--sdxl")
    return CheckpointError(
        f"a tensor is missing, and {also} more" if also else "a tensor is missing",
        where=ldm_name(name),
        fix=f"check that {option} names the right file and that its download is complete",
    )


def _check_divides(net: str, what: str, divisor: int, size: int) -> None:
    if size % divisor:
        raise CheckpointError(
            f"the width does not divide into {what}", where=net, expected=f"a multiple of {divisor}", found=size
        )


def _check_consistent(arch: Architecture) -> None:
    towers = arch.text_encoder.width + arch.text_encoder_2.width
    # Of any even width, as the networks are; what is left over then belongs to another text tower.
    sinusoid = max(2, arch.sinusoid_channels - arch.sinusoid_channels % 2)
    pooled = arch.text_encoder_2.width + len(MICRO_CONDITIONS) * sinusoid
    for place, expected, found in (
        ("the UNet's text width against the two text towers'", towers, arch.unet.context_channels),
        ("the UNet's vector width against the pooled text's", pooled, arch.unet.vector_channels),
        ("the UNet's latent channels against the VAE's", arch.vae.latent_channels, arch.unet.latent_channels),
        ("the ControlNet's sizes against the UNet's", arch.unet, arch.controlnet),
    ):
        if expected != found:
            raise CheckpointError(
                "the checkpoints do not belong together",
                where=place,
                expected=expected,
                found=found,
                fix="give an SDXL checkpoint and the SUPIR checkpoint made for it",
            )
