"""LoRAs on a network, by PEFT: which layers, how they start, what is trained, and Eq. 16's term.

Sources: LoRA (arXiv 2106.09685); the paper, Eq. 11 to 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import Parameter


def layers_of(network: nn.Module, wanted: Callable[[str], bool]) -> list[str]:
    """Return the names of a network's linear layers and convolutions that are wanted, in its order."""
    return [
        name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)) and wanted(name)
    ]


def add_lora(network: nn.Module, layers: Sequence[str], *, rank: int, alpha: float, name: str = "default") -> None:
    """Put a LoRA on some layers: one factor Gaussian, the other zero, so that it changes nothing at first.

    Args:
        network: its other parameters are frozen.
        layers: from `layers_of`, of the network without any LoRA.
        rank: of every layer.
        alpha: the product is multiplied by alpha / rank.
        name: by which several are told apart.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers), init_lora_weights="gaussian")
    inject_adapter_in_model(config, network, adapter_name=name)
    for factor in factors_of(network, name).values():  # PEFT gives them the type of the base
        factor.data = factor.data.float()


def adapted_layers(network: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the layers that have LoRAs, by the names that they had before."""
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def factors_of(network: nn.Module, name: str = "default") -> dict[str, Parameter]:
    """Return a LoRA's factors, `LAYER.lora_A` f32[r, in, …] and `LAYER.lora_B` f32[out, r, …]."""
    return {
        f"{layer}.{part}": getattr(module, part)[name].weight
        for layer, module in adapted_layers(network)
        for part in ("lora_A", "lora_B")
    }


def activate(network: nn.Module, active: Sequence[str], trained: str) -> list[Parameter]:
    """Let some of several LoRAs act, and one of them be trained.

    Args:
        network: with LoRAs.
        active: the names of those that act.
        trained: the name of the one whose factors take gradients.
    Returns:
        That one's factors.
    """
    factors: list[Parameter] = []
    for _, layer in adapted_layers(network):
        layer.set_adapter(list(active))
        for name in layer.lora_A:
            for part in (layer.lora_A[name], layer.lora_B[name]):
                part.requires_grad_(name == trained)
                if name == trained:
                    factors += part.parameters()
    return factors


def squared_norm(factors: Sequence[Tensor]) -> Tensor:
    """Return ‖A‖² + ‖B‖², summed over layers. Source: the paper, Eq. 16 (Frobenius norms)."""
    return torch.stack([factor.square().sum() for factor in factors]).sum()
