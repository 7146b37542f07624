"""Layers that all networks share, in a form that traces with dynamic sizes.

Residual blocks, transformer blocks and MLPs are diffusers'. The wrappers around them are ours where
diffusers' own branch on sizes (batch >= 64, numel > 2^31) or divide them (`view(b, -1, …)`), which
makes a dynamic trace fail or take minutes instead of seconds.
"""

from __future__ import annotations

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from engine.bundle.sdxl import HEAD_CHANNELS
from export.checkpoint.architecture import FINE_NORM_EPS, NORM_GROUPS, sinusoid_frequencies


class Sinusoid(nn.Module):
    """Embed a number in cosines, then sines, of falling frequency (`sinusoid_frequencies`)."""

    frequencies: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        # On the CPU even where parameters are made on the meta device: a constant, not a weight.
        frequencies = torch.from_numpy(sinusoid_frequencies(channels))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, number: Tensor) -> Tensor:
        """Return f32[B, channels] for f32[B]."""
        angle = number[:, None] * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class SdpaProcessor:
    """Attention of diffusers' `Attention` modules as three projections and one fused product."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """Return f32[B, L, C] for queries f32[B, L, C] and, if given, keys f32[B, M, D]."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projection(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for projection, tokens in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def attention(channels: int, *, source_channels: int | None = None, heads: int, bias: bool = False) -> Attention:
    """Return diffusers' attention with our processor; `source_channels` makes it a cross attention."""
    return Attention(
        channels,
        cross_attention_dim=source_channels,
        heads=heads,
        dim_head=channels // heads,
        bias=bias,
        processor=SdpaProcessor(),
    )


def resnet(in_channels: int, out_channels: int, embedding_channels: int | None, eps: float) -> ResnetBlock2D:
    """Return a residual block; without `embedding_channels` it takes no time embedding."""
    return ResnetBlock2D(
        in_channels=in_channels,
        out_channels=out_channels,
        temb_channels=embedding_channels,
        groups=NORM_GROUPS,
        eps=eps,
    )


class SpatialTransformer(nn.Module):
    """Transformer blocks over the cells of a feature map, with the text as second source."""

    def __init__(self, channels: int, depth: int, context_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, eps=FINE_NORM_EPS)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                channels,
                channels // HEAD_CHANNELS,
                HEAD_CHANNELS,
                cross_attention_dim=context_channels,
            )
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels)
        for module in self.transformer_blocks.modules():
            if isinstance(module, Attention):
                module.set_processor(SdpaProcessor())

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return f[B, C, h, w] for f[B, C, h, w] and the text f[B, L, D]."""
        tokens = self.proj_in(to_tokens(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=context)
        return x + to_map(self.proj_out(tokens), x)


class Downsample(nn.Module):
    """Halve a map by a strided convolution.

    Args:
        symmetric: pad all sides, as the UNet does; else right and bottom only, as the VAE does.
    """

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        """Return f[B, C, h/2, w/2]."""
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double a map by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return f[B, C, 2h, 2w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def to_tokens(x: Tensor) -> Tensor:
    """Return f[B, h·w, C] for f[B, C, h, w]."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Return tokens f[B, h·w, C] as a map of the shape of `like`, f[B, C, h, w]."""
    return tokens.transpose(1, 2).reshape(like.shape)
