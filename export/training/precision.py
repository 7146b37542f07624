"""In which types training computes: products in bfloat16 where the device has them, everything else in float32."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]


def has_bf16(device: torch.device) -> bool:
    """Tell whether a device multiplies in bfloat16 by instructions of its own.

    Where a processor has none, torch works them out one by one: a convolution of 96 channels over
    4 × 64 × 64 places takes 3.3 s instead of 0.03 s (AMD EPYC, family 25, model 1, 2026-11-25).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def half_products(device: torch.device, *, wanted: bool) -> torch.autocast:
    """Return the context in which products are in bfloat16, if that is wanted and the device computes in it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_bf16(device))


def stored_type(parameter: torch.Tensor, precision: Precision) -> torch.dtype:
    """Return the type that a frozen parameter is kept in.

    Matrices and kernels take the memory, and autocast rounds them anyway. Norms and biases stay in float32: a
    GroupNorm on a CPU takes bfloat16 with float32 weights, and not the other way round.
    """
    return torch.bfloat16 if precision == "bf16" and parameter.ndim > 1 else torch.float32
