"""How much memory a training takes, known before anything is read.

Activations are counted by running the network on tensors without values (torch's FakeTensor), which takes seconds and
no memory: what autograd keeps for the backward pass is exactly what it would keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.errors import DoesNotFitError
from engine.image.photo import Size
from engine.memory.host_memory import available_memory_bytes
from engine.units import format_memory
from export.checkpoint.architecture import VaeArch
from export.training.networks import blocks_of
from export.training.precision import Precision, half_products, stored_type

#: torch itself with its libraries, what a CUDA context takes on a GPU, and blocks that an allocator cannot use. With
#: it, SDXL's size in bf16 is estimated at 7.3 GiB; 7.2 GiB were held (AMD EPYC, family 25, 2026-11-29).
_LIBRARIES_BYTES = 900 << 20
#: Gradients on their way through a block, beside what it kept.
_BACKWARD_SHARE = 0.5
#: A LoRA's factors in float32: values, gradients, AdamW's two moments; one more for a running average.
_COPIES = 4


@dataclass(frozen=True)
class MemoryNeed:
    """What a training takes, in bytes.

    Attributes:
        base: frozen weights. lora: factors, gradients, moments.
        activations: of the pictures that go through the network together.
        decoder: of samples: its weights. decoding: what it computes.
        encoding: before all that: VAE or text towers, and what they compute.
    """

    base: int
    lora: int
    activations: int
    decoder: int
    decoding: int
    encoding: int

    @property
    def total(self) -> int:
        training = self.base + self.lora + self.decoder + max(self.activations, self.decoding)
        return _LIBRARIES_BYTES + max(training, self.encoding)

    def __str__(self) -> str:
        parts = (
            (self.base, "base"),
            (self.lora, "LoRA and optimizer"),
            (self.decoder, "decoder"),
            (max(self.activations, self.decoding), "activations"),
        )
        return f"{format_memory(self.total)}: " + ", ".join(f"{what} {format_memory(count)}" for count, what in parts)


def estimate(
    make: Callable[[], nn.Module],
    run: Callable[[nn.Module], Tensor],
    *,
    device: torch.device,
    precision: Precision,
    checkpointing: bool,
    average: bool,
) -> MemoryNeed:
    """Return what a training takes without its samples, and without what is encoded before.

    Args:
        make: makes the network with its LoRA, whose factors are what takes gradients; on the meta device.
        run: runs it on a batch made of `torch.empty` and the like.
        device: that it will be trained on.
        precision: of the base. checkpointing: whether blocks are computed twice, see `checkpoint_blocks`.
        average: whether a running average is kept.
    """
    with torch.device("meta"):
        network = make()
    with FakeTensorMode(), torch.device(device):
        _fake(network, precision)
        base = sum(parameter.nbytes for parameter in network.parameters() if not parameter.requires_grad)
        lora = sum(parameter.nbytes for parameter in network.parameters() if parameter.requires_grad)
        kept = _Kept(network)
        with kept, half_products(device, wanted=precision == "bf16"):
            run(network)
    return MemoryNeed(base, lora * (_COPIES + average), kept.bytes(checkpointing=checkpointing), 0, 0, 0)


def with_autoencoder(
    need: MemoryNeed, arch: VaeArch, size: Size, parameters: Mapping[str, int], *, samples: bool
) -> MemoryNeed:
    """Return what a training takes with encoding, and with samples if there are any; both are in float32.

    Args:
        need: from `estimate`.
        arch: of the autoencoder.
        size: (width, height) in pixels of the largest picture.
        parameters: how many the networks "vae", "text_encoder" and "text_encoder_2" have.
        samples: whether pictures are decoded while it trains.
    """
    # Four of the largest maps, which a decoder's last level reads: of the channels of the level before it.
    maps = 4 * 4 * arch.channels[min(1, len(arch.channels) - 1)] * size[0] * size[1]
    texts = 4 * (parameters["text_encoder"] + parameters["text_encoder_2"])
    encoding = max(4 * parameters["vae"] + maps, texts)
    decoder = 4 * parameters["vae"] if samples else 0
    return replace(need, decoder=decoder, decoding=maps if samples else 0, encoding=encoding)


def require(need: MemoryNeed, device: torch.device) -> int:
    """Return how much memory is free, if a training fits into it.

    Raises:
        DoesNotFitError: it does not.
    """
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], "on the GPU"
    else:
        free, where = available_memory_bytes(), "of memory"
    if need.total > free:
        raise DoesNotFitError(
            "the training does not fit",
            expected=str(need),
            found=f"{format_memory(free)} free {where}",
            fix="lower --at-once, --size or --rank, use --precision bf16, leave out --no-checkpointing, "
            "or end other programs",
        )
    return free


def _fake(network: nn.Module, precision: Precision) -> None:
    """Replace a network's tensors by ones without values, in the types that they are trained in."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                dtype = torch.float32 if parameter.requires_grad else stored_type(parameter, precision)
                fake = torch.empty(parameter.shape, dtype=dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps, each storage once, by the block that keeps it; parameters are counted elsewhere."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(self._keep, lambda tensor: tensor)
        self._own = {_storage(parameter) for parameter in network.parameters()}
        self._seen: dict[int, Tensor] = {}
        self._by_block: dict[int, int] = {}
        self._inputs = 0
        self._block = 0
        self._largest = 0
        for number, block in enumerate(blocks_of(network), 1):
            block.register_forward_pre_hook(lambda _, inputs, number=number: self._enter(number, inputs))
            block.register_forward_hook(lambda *_: self._enter(0, ()))

    def _enter(self, number: int, inputs: Any) -> None:
        self._block = number
        self._inputs += sum(tensor.nbytes for tensor in inputs if isinstance(tensor, Tensor))

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._own and storage not in self._seen:
            self._seen[storage] = tensor  # alive, so that no other gets its number
            count = tensor.untyped_storage().nbytes()
            self._by_block[self._block] = self._by_block.get(self._block, 0) + count
            self._largest = max(self._largest, count)
        return tensor

    def bytes(self, *, checkpointing: bool) -> int:
        """Return what is kept at most, with gradients that are on their way."""
        outside = self._by_block.get(0, 0)
        blocks = [count for block, count in self._by_block.items() if block]
        largest = max(blocks, default=0)
        kept = outside + (self._inputs + largest if checkpointing else sum(blocks))
        return kept + int(_BACKWARD_SHARE * largest) + 2 * self._largest


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
