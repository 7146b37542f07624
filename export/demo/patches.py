"""Where the autoencoder starts: the best linear code of 8 × 8 patches, built into its convolutions.

From random weights, a small autoencoder of SDXL's structure does not learn colours: with 32 channels
its last norm has groups of one channel, which forget each channel's mean and contrast, and the
picture comes back in other colours. So the weights begin as a linear code that is exact in spite of
the norm, and its width leaves three channels to a group:

    a group (x, -x, K) has the mean K/3, and nearly the deviation K·√2/3, whatever x is;
    SiLU(x) - SiLU(-x) = x.

The encoder is that code, the patches' principal components. The decoder begins with each patch's
mean colour and learns the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.checkpoint.architecture import LATENT_SCALE
from export.graphs.nets.vae import Decoder, Encoder

PATCH_PX = 8
#: Values of a quarter of a patch, 4 × 4 × 3.
_QUARTER = 48
#: A patch's values as three halvings sort them: by the quarter, its quarter, and the place in that.
_SORTED = np.arange(PATCH_PX * PATCH_PX * 3).reshape(2, 2, 2, 2, 2, 2, 3).transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1)
#: K above: large against any x, so that the group's deviation hardly depends on x.
_LATENT_CONSTANT, _COLOUR_CONSTANT = 100.0, 8.0
#: Deviation of the noise that stands for the posterior's; it keeps the decoder smooth.
POSTERIOR_STD = 0.03


@dataclass(frozen=True)
class PatchCode:
    """A linear code of patches: component i is gain[i] · basis[:, i] · (patch - mean).

    Attributes:
        basis: f64[192, C], orthonormal; a patch is [row, column, colour], flat, in [-1, 1].
        mean: f64[192].
        gain: f64[C]: brings components closer to each other, and z to unit deviation over all.
        variance: f64[C], of the components with their gain.
        quarter: f64[48, N], orthonormal: the largest principal components of a patch's quarters, each
            sorted by the place in its own quarters, then by the place in theirs. The code reads a patch
            through them, because a level of N channels carries no more of a quarter.
    """

    basis: NDArray[np.float64]
    mean: NDArray[np.float64]
    gain: NDArray[np.float64]
    variance: NDArray[np.float64]
    quarter: NDArray[np.float64]

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Return the code as a convolution of stride 8: its weight f32[C, 3, 8, 8] and its bias f32[C]."""
        scaled = self.gain[:, None] * self.basis.T
        weight = scaled.reshape(-1, PATCH_PX, PATCH_PX, 3).transpose(0, 3, 1, 2)
        return torch.from_numpy(weight.copy()).float(), torch.from_numpy(-scaled @ self.mean).float()


def learn_patch_code(pictures: NDArray[np.uint8], components: int, quarter_components: int) -> PatchCode:
    """Return the principal components of the pictures' patches.

    Each gain is the fourth root of its variance, inverted: half the way from equal errors in pixels
    to equal components, which is best where noise of one deviation falls on all of them.

    Args:
        pictures: u8[N, H, W, 3].
        components: how many are kept.
        quarter_components: how many a patch's quarter is read through, 48 at most.
    """
    count, height, width, _ = pictures.shape
    split = pictures.reshape(count, height // PATCH_PX, PATCH_PX, width // PATCH_PX, PATCH_PX, 3)
    patches = split.transpose(0, 1, 3, 2, 4, 5).reshape(-1, PATCH_PX * PATCH_PX * 3).astype(np.float64) / 127.5 - 1.0
    mean = patches.mean(axis=0)
    quarters = (patches - mean)[:, _SORTED].reshape(-1, _QUARTER)
    quarter = np.linalg.svd(quarters.T @ quarters)[0][:, :quarter_components]
    seen = (quarters @ quarter).reshape(len(patches), -1)
    basis_seen, variances, _ = np.linalg.svd(np.cov(seen.T))
    basis = np.empty((mean.size, components))
    basis[_SORTED] = np.kron(np.eye(4), quarter) @ basis_seen[:, :components]
    kept = variances[:components]
    gain = kept**-0.25
    gain /= np.sqrt((gain**2 * kept).mean())
    return PatchCode(basis, mean, gain, gain**2 * kept, quarter)


@torch.no_grad()
def start_encoder(encoder: Encoder, code: PatchCode) -> None:
    """Make an encoder the code: its means are the components, its log-variances constant.

    Args:
        encoder: whose residual branches are zero.
        code: of as many components as its latent has channels.
    """
    count = code.gain.size
    levels = encoder.down_blocks
    _pass_on(encoder.conv_in, 3)
    channels = 3
    last = (code.gain[:, None] * code.basis.T)[:, _SORTED].reshape(count, 4, _QUARTER) @ code.quarter
    steps = (np.eye(12), code.quarter.T, last.reshape(count, -1))
    for level, matrix in zip(levels, steps, strict=False):
        _shortcut(level.resnets[0], channels)
        conv = level.downsamplers[0].conv
        conv.weight[: len(matrix)] = 0.0
        for place in range(4):  # which pixel of the 2 × 2, row by row
            part = torch.from_numpy(matrix[:, place * channels : (place + 1) * channels]).float()
            conv.weight[: len(matrix), :channels, place // 2, place % 2] = part
        conv.bias[: len(matrix)] = 0.0
        channels = len(matrix)
    conv.bias[:count] = -torch.from_numpy(code.gain * (code.basis.T @ code.mean)).float()
    _spread(levels[-1].resnets[0].conv_shortcut, count, _LATENT_CONSTANT)
    _read_groups(encoder.conv_norm_out, encoder.conv_out, count, _LATENT_CONSTANT, code.variance)
    encoder.conv_out.bias[count:] = 2.0 * float(np.log(POSTERIOR_STD))


@torch.no_grad()
def start_quantizers(quant: nn.Conv2d, post_quant: nn.Conv2d) -> None:
    """Let z be the code: undo the latent's fixed scale in the convolutions around it."""
    for conv, factor in ((quant, 1.0 / LATENT_SCALE), (post_quant, LATENT_SCALE)):
        nn.init.zeros_(conv.bias)
        conv.weight.copy_(factor * torch.eye(conv.in_channels)[:, :, None, None])
    latent = post_quant.in_channels
    quant.weight[latent:] *= LATENT_SCALE
    quant.bias[latent:] = -2.0 * float(np.log(LATENT_SCALE))


@torch.no_grad()
def start_decoder(decoder: Decoder, code: PatchCode) -> None:
    """Let a decoder begin with each patch's mean colour."""
    to_colour = code.basis.reshape(-1, 3, code.gain.size).mean(axis=0) / code.gain
    decoder.conv_in.weight[:3] = 0.0
    decoder.conv_in.weight[:3, :, 1, 1] = torch.from_numpy(to_colour).float()
    decoder.conv_in.bias[:3] = torch.from_numpy(code.mean.reshape(-1, 3).mean(axis=0)).float()
    for level in decoder.up_blocks:
        for upsample in level.upsamplers:
            _pass_on(upsample.conv, 3)
    for level in decoder.up_blocks[:-1]:
        _shortcut(level.resnets[0], 3)
    _spread(decoder.up_blocks[-1].resnets[0].conv_shortcut, 3, _COLOUR_CONSTANT)
    _read_groups(decoder.conv_norm_out, decoder.conv_out, 3, _COLOUR_CONSTANT, np.full(3, 0.25))


def _pass_on(conv: nn.Conv2d, channels: int) -> None:
    """Let the first channels pass a 3 × 3 convolution as they are."""
    conv.weight[:channels] = 0.0
    conv.weight[:channels, :channels, 1, 1] = torch.eye(channels)
    conv.bias[:channels] = 0.0


def _shortcut(block: nn.Module, channels: int) -> None:
    """Let the first channels pass a residual block whose width changes."""
    conv = block.conv_shortcut
    if conv is not None:
        conv.weight[:channels] = 0.0
        conv.weight[:channels, :channels, 0, 0] = torch.eye(channels)
        conv.bias[:channels] = 0.0


def _spread(conv: nn.Conv2d, count: int, constant: float) -> None:
    """Turn the first channels into groups (x, -x, constant)."""
    group = conv.out_channels // 32
    conv.weight[: group * count] = 0.0
    conv.bias[: group * count] = 0.0
    for index in range(count):
        conv.weight[group * index, index] = 1.0
        conv.weight[group * index + 1, index] = -1.0
        conv.bias[group * index + 2] = constant


def _read_groups(
    norm: nn.GroupNorm, conv: nn.Conv2d, count: int, constant: float, variance: NDArray[np.float64]
) -> None:
    """Take x out of the norm's groups again; the convolution's first channels become it."""
    group = norm.num_channels // norm.num_groups
    assert group == 3, "the groups are made for three channels"
    deviation = np.sqrt(2.0 * variance / 3.0 + 2.0 * constant**2 / 9.0)
    conv.weight.zero_()
    conv.bias.zero_()
    for index in range(count):
        place = group * index
        norm.weight[place : place + 2] = float(deviation[index])
        norm.bias[place : place + 2] = constant / 3.0
        norm.weight[place + 2] = norm.bias[place + 2] = 0.0
        conv.weight[index, place, 1, 1] = 1.0
        conv.weight[index, place + 1, 1, 1] = -1.0


def pixel_weights(code: PatchCode) -> Tensor:
    """Return f32[C, 1, 1]: what a squared error of each component costs in squared pixel values."""
    return torch.from_numpy(code.gain**-2.0 / code.basis.shape[0]).float()[:, None, None]
