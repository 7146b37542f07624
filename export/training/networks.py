"""Networks of a checkpoint as torch modules to train on: opened, checked, loaded, and made lean.

The modules are those that are traced (`export.graphs.nets`), and so are their names; what is trained on is what is
built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from export.checkpoint.architecture import MIDDLE_CONNECTOR, Architecture, UNetArch, infer_architecture
from export.checkpoint.checkpoint import Checkpoint, check_tensors, open_sdxl, open_supir, open_unet
from export.checkpoint.tensor_files import LazyTensor
from export.checkpoint.tokenizer import END_TOKEN, check_vocabulary, load_tokenizer
from export.graphs.nets.connectors import Connectors
from export.graphs.nets.text import TextEncoder2Graph, TextEncoderGraph
from export.graphs.nets.unet import ControlNet, UNet
from export.graphs.nets.vae import DenoiseEncoderGraph, VaeDecoderGraph, VaeEncoderGraph
from export.training.precision import Precision, stored_type

#: Whose activations are computed a second time instead of being kept, where memory is saved.
CHECKPOINTED = (ResnetBlock2D, BasicTransformerBlock)


@dataclass(frozen=True)
class Base:
    """An opened checkpoint.

    Attributes:
        checkpoints: its files; with SUPIR's, if there are.
        arch: sizes of the networks.
        tensors: by our names, complete and of the right shapes.
        tokenizer: of its text towers.
        end_id: the tokenizer's end token.
    """

    checkpoints: tuple[Checkpoint, ...]
    arch: Architecture
    tensors: Mapping[str, LazyTensor]
    tokenizer: Tokenizer
    end_id: int

    def digest(self, *components: str) -> str:
        """Return the SHA-256 of some networks' weights, such as "vae", in hexadecimal; reads them."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            if name.partition(".")[0] in components:
                value = np.ascontiguousarray(self.tensors[name].read())
                digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
                digest.update(value.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def open_base(sdxl: Path, tokenizer: Path, *, unet: Path | None = None, supir: Path | None = None) -> Base:
    """Open a base, as a build does; reads headers only.

    Args:
        sdxl: one file, or a diffusers folder.
        tokenizer: folder of its vocabulary.
        unet: replaces the base's UNet.
        supir: SUPIR's file.
    Raises:
        CheckpointError: a file is missing, damaged, of another model, or does not cover the networks.
    """
    checkpoints = [open_sdxl(sdxl)]
    tensors = dict(checkpoints[0].tensors)
    if unet is not None:
        checkpoints.append(open_unet(unet))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("unet.")}
        tensors |= checkpoints[-1].tensors
    if supir is not None:
        checkpoints.append(open_supir(supir))
        tensors |= checkpoints[-1].tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if supir is None:  # a ControlNet would have the sizes of the UNet, whose first half it is
        half = {name: shape for name, shape in shapes.items() if name.startswith("unet.")}
        shapes |= {name.replace("unet.", "controlnet.", 1): shape for name, shape in half.items()}
    arch = infer_architecture(shapes)
    words = load_tokenizer(tokenizer)
    end_id = words.token_to_id(END_TOKEN)
    assert end_id is not None  # load_tokenizer has seen to it
    check_vocabulary(tokenizer, words, (arch.text_encoder.vocabulary, arch.text_encoder_2.vocabulary))
    with torch.device("meta"):
        networks = {
            "text_encoder": TextEncoderGraph(arch.text_encoder),
            "text_encoder_2": TextEncoder2Graph(arch.text_encoder_2, end_id),
            "vae_encoder": VaeEncoderGraph(arch.vae),
            "vae_decoder": VaeDecoderGraph(arch.vae),
            "unet": nn.ModuleDict({"unet": UNet(arch.unet)}),
        }
        if supir is not None:
            networks["denoise_encoder"] = DenoiseEncoderGraph(arch.vae)
            networks["control"] = nn.ModuleDict(
                {"controlnet": ControlNet(arch.controlnet), "connectors": Connectors(arch.unet)}
            )
    wanted = {
        name: tuple(parameter.shape) for network in networks.values() for name, parameter in network.named_parameters()
    }
    check_tensors(tensors, wanted)
    return Base(tuple(checkpoints), arch, tensors, words, end_id)


def load(
    make: Callable[[], nn.Module],
    tensors: Mapping[str, LazyTensor],
    device: torch.device,
    *,
    prefix: str = "",
    precision: Precision = "fp32",
) -> Any:
    """Return a network with its weights, frozen, one tensor read after the other.

    Args:
        make: makes it; parameters are on the meta device until they are read.
        tensors: of the checkpoint, by our names.
        device: that it is to be on.
        prefix: of its parameters' names, such as "unet.".
        precision: of its matrices, see `stored_type`.
    """
    with torch.device("meta"):
        network = make().eval()
    state = {
        name: as_torch(tensors[prefix + name].read()).to(device, stored_type(parameter, precision), copy=True)
        for name, parameter in network.named_parameters()
    }
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).to(device)  # constants, which are on the CPU


def as_torch(array: NDArray[Any]) -> Tensor:
    """Return an array as a tensor; torch does not know NumPy's bfloat16, nor files that cannot be written to."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def checkpoint_blocks(network: nn.Module) -> None:
    """Let a network keep the inputs of its blocks alone, and compute the rest again in the backward pass.

    That is one more forward pass. Source: arXiv 1604.06174.
    """
    for block in blocks_of(network):
        block.forward = partial(_checkpointed, block.forward)


def blocks_of(network: nn.Module) -> Iterable[nn.Module]:
    """Return the blocks that `checkpoint_blocks` is about."""
    return [module for module in network.modules() if isinstance(module, CHECKPOINTED)]


def _checkpointed(forward: Callable[..., Tensor], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    # No block draws random numbers.
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


# -- the UNet without and with control ------------------------------------------------------------


def without_control(unet: UNet, x: Tensor, timestep: Tensor, context: Tensor, vector: Tensor) -> Tensor:
    """Return the plain UNet's noise estimate f[B, C, h, w]; arguments as `UNet.forward`."""
    return unet(x, timestep, context, vector, (None,) * 10, None, _PLAIN_SKIPS)


class ControlledUNet(nn.Module):
    """UNet, ControlNet and connectors as one function of the noisy and the degraded latent."""

    def __init__(self, arch: UNetArch) -> None:
        super().__init__()
        self.unet = UNet(arch)
        self.controlnet = ControlNet(arch)
        self.connectors = Connectors(arch)

    def forward(
        self, x: Tensor, timestep: Tensor, lq: Tensor, context: Tensor, vector: Tensor, scale: float = 1.0
    ) -> Tensor:
        """Return the noise estimate f[B, C, h, w] under control of a scale; arguments as `ControlNet.forward`."""
        controls = self.controlnet(x, timestep, lq, context, vector)
        strength = torch.full((1,), scale, device=x.device)
        return self.unet(x, timestep, context, vector, controls, strength, self.connectors)


class _PlainSkips(Sequence):  # type: ignore[type-arg]
    """Stands in for connectors where there is no control: the skip connections of a plain UNet."""

    def __len__(self) -> int:
        return MIDDLE_CONNECTOR + 1

    def __getitem__(self, index: int) -> object:  # type: ignore[override]
        return _plain_skip


def _plain_skip(control: None, h: Tensor, *rest: Tensor | None) -> Tensor:
    skip = rest[0] if len(rest) == 2 else None
    return h if skip is None else torch.cat([h, skip], dim=1)


_PLAIN_SKIPS = _PlainSkips()
