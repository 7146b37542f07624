"""The UNet and the ControlNet: SDXL's, with connectors in place of the plain skip connections.

Parameters are named as diffusers names them. Sources: SDXL (arXiv 2307.01952); ControlNet
(arXiv 2302.05543); SUPIR (arXiv 2401.13627); SPEC, "Networks".
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from torch.nn import functional as F

from export.checkpoint.architecture import CROSS_CONNECTORS, NORM_EPS, NORM_GROUPS, RESNETS_PER_LEVEL, UNetArch
from export.graphs.nets.connectors import Connectors
from export.graphs.nets.layers import Downsample, Sinusoid, SpatialTransformer, Upsample, resnet


class Level(nn.Module):
    """The blocks of one resolution; `attentions` and the samplers may be empty."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def block(self, index: int, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        """Run residual block `index` and the transformer behind it, if there is one."""
        x = self.resnets[index](x, embedding)
        return self.attentions[index](x, context) if len(self.attentions) else x


class EncoderHalf(nn.Module):
    """What UNet and ControlNet have in common: embeddings, the way down, the middle."""

    def __init__(self, arch: UNetArch) -> None:
        super().__init__()
        base, embedding = arch.channels[0], arch.embedding_channels
        self.sinusoid = Sinusoid(base)
        self.time_embedding = TimestepEmbedding(base, embedding)
        self.add_embedding = TimestepEmbedding(arch.vector_channels, embedding)
        self.conv_in = nn.Conv2d(arch.latent_channels, base, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        channels = base
        for level, out_channels in enumerate(arch.channels):
            block = _level(arch, [channels, out_channels], out_channels, arch.depths[level])
            if level + 1 < len(arch.channels):
                block.downsamplers.append(Downsample(out_channels, symmetric=True))
            self.down_blocks.append(block)
            channels = out_channels
        self.mid_block = Level(
            [resnet(channels, channels, embedding, NORM_EPS) for _ in range(2)],
            [SpatialTransformer(channels, arch.middle_depth, arch.context_channels)],
        )

    def embed(self, timestep: Tensor, vector: Tensor) -> Tensor:
        """Return f[B, E] for timestep f32[B] and vector f[B, V]."""
        time = self.sinusoid(timestep).to(vector.dtype)
        return self.time_embedding(time) + self.add_embedding(vector)

    def encode(self, x: Tensor, embedding: Tensor, context: Tensor) -> tuple[list[Tensor], Tensor]:
        """Walk down from the first convolution's output.

        Returns:
            The nine features, f[B, C, h, w] to f[B, C, h/4, w/4], and the middle's output.
        """
        features = [x]
        for level in self.down_blocks:
            for index in range(RESNETS_PER_LEVEL):
                x = level.block(index, x, embedding, context)
                features.append(x)
            for downsample in level.downsamplers:
                x = downsample(x)
                features.append(x)
        x = self.mid_block.resnets[0](x, embedding)
        x = self.mid_block.attentions[0](x, context)
        return features, self.mid_block.resnets[1](x, embedding)


class ControlNet(EncoderHalf):
    """Read the noisy and the low-quality latent, give ten features. Source: SPEC, Eq. 6 of the paper."""

    def __init__(self, arch: UNetArch) -> None:
        super().__init__(arch)
        self.conv_hint = nn.Conv2d(arch.latent_channels, arch.channels[0], 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, lq: Tensor, context: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        """Return `control_0` … `control_9`.

        Args:
            x: f[B, 4, h, w], noisy latent × 1/√(q² + 1).
            timestep: f32[B], 0 … 999.
            lq: f[B, 4, h, w], latent of the degraded photo, not scaled by the noise level.
            context: f[B, 77k, C], text.
            vector: f[B, V], pooled text and micro-conditioning.
        """
        embedding = self.embed(timestep, vector)
        features, middle = self.encode(self.conv_in(x) + self.conv_hint(lq), embedding, context)
        return (*features, middle)


class UNet(EncoderHalf):
    """SDXL's UNet whose way up goes through connectors."""

    def __init__(self, arch: UNetArch) -> None:
        super().__init__(arch)
        self.up_blocks = nn.ModuleList()
        skips = list(arch.feature_channels)
        channels = arch.channels[-1]
        for level in reversed(range(len(arch.channels))):
            out_channels = arch.channels[level]
            inputs = []
            for _ in range(RESNETS_PER_LEVEL + 1):
                inputs.append(channels + skips.pop())
                channels = out_channels
            block = _level(arch, inputs, out_channels, arch.depths[level])
            if level > 0:
                block.upsamplers.append(Upsample(out_channels))
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(NORM_GROUPS, arch.channels[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(arch.channels[0], arch.latent_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        vector: Tensor,
        controls: tuple[Tensor, ...],
        control_scale: Tensor,
        connectors: Connectors,
    ) -> Tensor:
        """Return the predicted noise, f[B, 4, h, w].

        Args:
            x, timestep, context, vector: as for `ControlNet.forward`.
            controls: its ten outputs.
            control_scale: f[1], how strongly they act.
            connectors: the twelve modules that let them act, used from the last to the first.
        """
        embedding = self.embed(timestep, vector)
        features, x = self.encode(self.conv_in(x), embedding, context)
        connector = len(connectors) - 1
        x = connectors[connector](controls[len(features)], x, None, control_scale)
        for level in self.up_blocks:
            for index in range(RESNETS_PER_LEVEL + 1):
                skip = features.pop()
                control = controls[len(features)]
                connector -= 1
                x = connectors[connector](control, x, skip, control_scale)
                x = level.block(index, x, embedding, context)
                if connector - 1 in CROSS_CONNECTORS:
                    connector -= 1
                    x = connectors[connector](control, x, control_scale)
            for upsample in level.upsamplers:
                x = upsample(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class UNetGraph(nn.Module):
    """The graph `unet`: UNet and connectors, float32 at the sampler's side."""

    def __init__(self, arch: UNetArch) -> None:
        super().__init__()
        self.unet = UNet(arch)
        self.connectors = Connectors(arch)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        vector: Tensor,
        controls: tuple[Tensor, ...],
        control_scale: Tensor,
    ) -> Tensor:
        """Return `eps` f32[B, 4, h, w]; arguments as `UNet.forward`, x and control_scale f32."""
        dtype = context.dtype
        scale = control_scale.to(dtype)
        eps = self.unet(x.to(dtype), timestep, context, vector, controls, scale, self.connectors)
        return eps.to(torch.float32)


class ControlNetGraph(nn.Module):
    """The graph `controlnet`: float32 latents in, features of the graph's precision out."""

    def __init__(self, arch: UNetArch) -> None:
        super().__init__()
        self.controlnet = ControlNet(arch)

    def forward(self, x: Tensor, timestep: Tensor, lq: Tensor, context: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        """Return `control_0` … `control_9`; arguments as `ControlNet.forward`, x and lq f32."""
        dtype = context.dtype
        return self.controlnet(x.to(dtype), timestep, lq.to(dtype), context, vector)


def _level(arch: UNetArch, inputs: list[int], out_channels: int, depth: int) -> Level:
    """Return a level with one residual block, and a transformer if deep, per number of input channels."""
    return Level(
        [resnet(channels, out_channels, arch.embedding_channels, NORM_EPS) for channels in inputs],
        [SpatialTransformer(out_channels, depth, arch.context_channels) for _ in inputs] if depth else [],
    )
