"""Connectors: how the ControlNet's features enter the UNet's decoder.

Source: SPEC, "Connectors"; SUPIR (arXiv 2401.13627), ZeroSFT; SFT (Wang et al., CVPR 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.bundle.sdxl import HEAD_CHANNELS
from export.checkpoint.architecture import (
    CROSS_CONNECTORS,
    MIDDLE_CONNECTOR,
    NORM_EPS,
    NORM_GROUPS,
    RESNETS_PER_LEVEL,
    UNetArch,
)
from export.graphs.nets.layers import attention, to_map, to_tokens

MODULATION_CHANNELS = 128


class ZeroSFT(nn.Module):
    """Join skip and decoder features, then scale and shift them by the control feature.

    Args:
        control_channels: of the control feature.
        skip_channels: of the skip connection; 0 at the middle block, which has none.
        channels: of the decoder's feature.
    """

    def __init__(self, control_channels: int, skip_channels: int, channels: int) -> None:
        super().__init__()
        joined = channels + skip_channels
        self.norm = nn.GroupNorm(NORM_GROUPS, joined, eps=NORM_EPS)
        self.conv_shared = nn.Conv2d(control_channels, MODULATION_CHANNELS, 3, padding=1)
        self.zero_mul = nn.Conv2d(MODULATION_CHANNELS, joined, 3, padding=1)
        self.zero_add = nn.Conv2d(MODULATION_CHANNELS, joined, 3, padding=1)
        self.zero_conv = nn.Conv2d(control_channels, skip_channels or channels, 1)

    def forward(self, control: Tensor, h: Tensor, skip: Tensor | None, scale: Tensor) -> Tensor:
        """Return f[B, C + S, h, w] for control f[B, D, h, w], h f[B, C, h, w] and skip f[B, S, h, w].

        `scale` is f[1]: 0 gives the plain concatenation.
        """
        steered = self.zero_conv(control)
        if skip is None:
            raw, joined = h, h + steered
        else:
            raw, joined = torch.cat([h, skip], dim=1), torch.cat([h, skip + steered], dim=1)
        shared = F.silu(self.conv_shared(control))
        out = self.norm(joined) * (1 + self.zero_mul(shared)) + self.zero_add(shared)
        return scale * out + (1 - scale) * raw


class ZeroCrossAttn(nn.Module):
    """Let the decoder's feature attend to the control feature."""

    def __init__(self, control_channels: int, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, control_channels, eps=NORM_EPS)
        self.attn = attention(channels, source_channels=control_channels, heads=channels // HEAD_CHANNELS)

    def forward(self, control: Tensor, h: Tensor, scale: Tensor) -> Tensor:
        """Return f[B, C, h, w] for control f[B, D, h, w] and h f[B, C, h, w]; `scale` is f[1]."""
        mixed = self.attn(to_tokens(self.norm1(h)), to_tokens(self.norm2(control)))
        return h + scale * to_map(mixed, h)


class Connectors(nn.ModuleList):
    """The twelve connectors in the order of the file: index 11 follows the middle block."""

    def __init__(self, arch: UNetArch) -> None:
        features = arch.feature_channels
        middle = arch.channels[-1]
        found: list[nn.Module] = [ZeroSFT(middle, 0, middle)]
        index, channels = MIDDLE_CONNECTOR, middle
        for position in reversed(range(len(features))):
            index -= 1
            found.append(ZeroSFT(features[position], features[position], channels))
            # The decoder's levels hold one block more than the encoder's, so three features each.
            channels = arch.channels[position // (RESNETS_PER_LEVEL + 1)]
            if index - 1 in CROSS_CONNECTORS:
                index -= 1
                found.append(ZeroCrossAttn(features[position], channels))
        super().__init__(reversed(found))
