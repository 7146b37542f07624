"""Where UNet, ControlNet and connectors start: the noisy latent passes through to the output.

Predicting noise needs the input itself at the output, nearly exact where noise is strong: at sigma 14
an error of 1 % of the noise is an error of 14 % of the latent. Random layers of 64 channels learn
that slowly or never, because the last norm and SiLU stand in the way. So each channel of the latent
has a pair (x, -x), which is a group of the last norm: its mean stays 0, and SiLU(x) - SiLU(-x) = x.
Before training, the UNet returns its input, each channel at unit deviation; SFT's norms are set so
that control at scale 1 changes as little as its norms allow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.graphs.nets.connectors import Connectors, ZeroSFT
from export.graphs.nets.unet import ControlNet, UNet


@torch.no_grad()
def start_unet(unet: UNet) -> None:
    """Let a UNet, whose residual branches are zero, return what it is given.

    Args:
        unet: of at least twice as many channels as the latent has, in groups of two.
    """
    count, norm = unet.conv_in.in_channels, unet.conv_norm_out
    assert norm.num_channels == 2 * norm.num_groups >= 2 * count
    places = torch.arange(count)
    unet.conv_in.weight[: 2 * count] = 0.0
    unet.conv_in.bias[: 2 * count] = 0.0
    unet.conv_in.weight[2 * places, places, 1, 1] = 1.0
    unet.conv_in.weight[2 * places + 1, places, 1, 1] = -1.0
    # The last block joins the decoder's feature and the first convolution's output, in this order.
    shortcut = unet.up_blocks[-1].resnets[-1].conv_shortcut
    skip = shortcut.in_channels - unet.conv_in.out_channels
    shortcut.weight[: 2 * count] = 0.0
    shortcut.bias[: 2 * count] = 0.0
    pairs = torch.arange(2 * count)
    shortcut.weight[pairs, skip + pairs] = 1.0
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.zero_()
    unet.conv_out.weight[places, 2 * places, 1, 1] = 1.0
    unet.conv_out.weight[places, 2 * places + 1, 1, 1] = -1.0


@torch.no_grad()
def start_controlnet(controlnet: ControlNet, unet: UNet) -> None:
    """Begin a ControlNet as a copy of the UNet's first half.

    The degraded photo's latent joins the negative half of each pair, so that a linear layer behind
    tells it from the noisy one.
    """
    own = controlnet.state_dict()
    controlnet.load_state_dict({name: value for name, value in unet.state_dict().items() if name in own}, strict=False)
    places = torch.arange(controlnet.conv_hint.in_channels)
    controlnet.conv_hint.weight.zero_()
    controlnet.conv_hint.bias.zero_()
    controlnet.conv_hint.weight[2 * places + 1, places, 1, 1] = 1.0


class NormStart:
    """Stands in for connectors once, as plain skip connections, and learns what passes.

    Each SFT's norm then gives back, on average, what it takes away: its weight is the groups' mean
    deviation, its bias their mean.
    """

    def __init__(self, connectors: Connectors) -> None:
        self._connectors = connectors

    def __len__(self) -> int:
        return len(self._connectors)

    def __getitem__(self, index: int) -> _Start:
        return _Start(self._connectors[index])


class _Start:
    def __init__(self, connector: nn.Module) -> None:
        self._connector = connector

    @torch.no_grad()
    def __call__(self, _: None, h: Tensor, *rest: Tensor | None) -> Tensor:
        if not isinstance(self._connector, ZeroSFT):
            return h
        skip = rest[0]
        joined = h if skip is None else torch.cat([h, skip], dim=1)
        norm = self._connector.norm
        grouped = joined.float().reshape(len(joined), norm.num_groups, -1)
        width = norm.num_channels // norm.num_groups
        norm.weight.copy_(grouped.std(dim=2).mean(dim=0).repeat_interleave(width))
        norm.bias.copy_(grouped.mean(dim=2).mean(dim=0).repeat_interleave(width))
        return joined
