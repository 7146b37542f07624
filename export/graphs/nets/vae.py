"""The VAE's graphs: SDXL's KL autoencoder, and the second encoder tuned on degraded photos.

Parameters are named as diffusers names them. Sources: SDXL (arXiv 2307.01952); SPEC, "VAE".
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from export.checkpoint.architecture import (
    FINE_NORM_EPS,
    IMAGE_CHANNELS,
    LATENT_SCALE,
    NORM_GROUPS,
    RESNETS_PER_LEVEL,
    VaeArch,
)
from export.graphs.nets.layers import (
    Downsample,
    SdpaProcessor,
    Upsample,
    resnet,
    to_map,
    to_tokens,
)
from export.graphs.nets.unet import Level


class MiddleBlock(nn.Module):
    """Two residual blocks around one attention of a single head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnet(channels, channels, None, FINE_NORM_EPS) for _ in range(2))
        self.attentions = nn.ModuleList(
            [
                Attention(
                    channels,
                    heads=1,
                    dim_head=channels,
                    bias=True,
                    norm_num_groups=NORM_GROUPS,
                    eps=FINE_NORM_EPS,
                    processor=SdpaProcessor(),
                )
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return f[B, C, h, w]."""
        x = self.resnets[0](x, None)
        attn = self.attentions[0]
        x = x + to_map(attn(to_tokens(attn.group_norm(x))), x)
        return self.resnets[1](x, None)


class Encoder(nn.Module):
    """Pixels to the moments of the latent, before `quant_conv`."""

    def __init__(self, arch: VaeArch) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(IMAGE_CHANNELS, arch.channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        channels = arch.channels[0]
        for level, out_channels in enumerate(arch.channels):
            inputs = [channels] + [out_channels] * (RESNETS_PER_LEVEL - 1)
            block = _level(inputs, out_channels)
            if level + 1 < len(arch.channels):
                block.downsamplers.append(Downsample(out_channels, symmetric=False))
            self.down_blocks.append(block)
            channels = out_channels
        self.mid_block = MiddleBlock(channels)
        self.conv_norm_out = nn.GroupNorm(NORM_GROUPS, channels, eps=FINE_NORM_EPS)
        self.conv_out = nn.Conv2d(channels, 2 * arch.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return f[B, 8, h, w] for f[B, 3, 8h, 8w]."""
        x = self.conv_in(pixels)
        for level in self.down_blocks:
            for block in level.resnets:
                x = block(x, None)
            for downsample in level.downsamplers:
                x = downsample(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """The latent, after `post_quant_conv`, to pixels."""

    def __init__(self, arch: VaeArch) -> None:
        super().__init__()
        channels = arch.channels[-1]
        self.conv_in = nn.Conv2d(arch.latent_channels, channels, 3, padding=1)
        self.mid_block = MiddleBlock(channels)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(arch.channels))):
            out_channels = arch.channels[level]
            block = _level([channels] + [out_channels] * RESNETS_PER_LEVEL, out_channels)
            if level > 0:
                block.upsamplers.append(Upsample(out_channels))
            self.up_blocks.append(block)
            channels = out_channels
        self.conv_norm_out = nn.GroupNorm(NORM_GROUPS, channels, eps=FINE_NORM_EPS)
        self.conv_out = nn.Conv2d(channels, IMAGE_CHANNELS, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Return f[B, 3, 8h, 8w] for f[B, 4, h, w]."""
        x = self.mid_block(self.conv_in(latent))
        for level in self.up_blocks:
            for block in level.resnets:
                x = block(x, None)
            for upsample in level.upsamplers:
                x = upsample(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VaeModules(nn.Module):
    """The parts of the VAE that a graph uses; the others stay out of its parameters."""

    def __init__(self, arch: VaeArch, *, encoder: bool = False, decoder: bool = False, quant: bool = False) -> None:
        super().__init__()
        latent = arch.latent_channels
        if encoder:
            self.encoder = Encoder(arch)
        if quant:
            self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        if decoder:
            self.post_quant_conv = nn.Conv2d(latent, latent, 1)
            self.decoder = Decoder(arch)

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights, in which it computes."""
        return next(self.parameters()).dtype

    def scaled_mode(self, moments: Tensor) -> Tensor:
        """Return z, f32[B, 4, h, w], for an encoder's moments f[B, 8, h, w]."""
        mean, _ = self.quant_conv(moments).chunk(2, dim=1)
        return mean.to(torch.float32) * LATENT_SCALE  # in bf16 the factor itself is off by 0.3 %


class DenoiseEncoderGraph(nn.Module):
    """The graph `denoise_encoder` (Eq. 5 of the paper): it shares the VAE's `quant_conv`."""

    def __init__(self, arch: VaeArch) -> None:
        super().__init__()
        self.denoise_encoder = Encoder(arch)
        self.vae = VaeModules(arch, quant=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return z f32[B, 4, h, w] for f32[B, 3, 8h, 8w] in [-1, 1]."""
        return self.vae.scaled_mode(self.denoise_encoder(pixels.to(self.vae.dtype)))


class VaeEncoderGraph(nn.Module):
    """The graph `vae_encoder`."""

    def __init__(self, arch: VaeArch) -> None:
        super().__init__()
        self.vae = VaeModules(arch, encoder=True, quant=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return z f32[B, 4, h, w] for f32[B, 3, 8h, 8w] in [-1, 1]."""
        return self.vae.scaled_mode(self.vae.encoder(pixels.to(self.vae.dtype)))


class VaeDecoderGraph(nn.Module):
    """The graph `vae_decoder` (Eq. 7 of the paper)."""

    def __init__(self, arch: VaeArch) -> None:
        super().__init__()
        self.vae = VaeModules(arch, decoder=True)

    def forward(self, z: Tensor) -> Tensor:
        """Return pixels f32[B, 3, 8h, 8w], about [-1, 1], for z f32[B, 4, h, w]."""
        latent = self.vae.post_quant_conv((z / LATENT_SCALE).to(self.vae.dtype))
        return self.vae.decoder(latent).to(torch.float32)


def _level(inputs: list[int], out_channels: int) -> Level:
    return Level([resnet(channels, out_channels, None, FINE_NORM_EPS) for channels in inputs], [])
