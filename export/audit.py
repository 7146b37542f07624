"""What share of a plan's heavy work runs in which precision.

A network is strongly typed: a layer computes in the type of its inputs, and no builder changes that.
So the network that the builder is given, at one concrete size, tells what the plan will do; that
needs no GPU. Heavy is what multiplies matrices: convolutions and matrix products, those of attention
included; the export makes no other layers that do.
"""

from __future__ import annotations

import math
from typing import Any

from engine.bundle import Audit
from engine.errors import BuildError
from engine.graphspec import GraphSpec, Precision, resolve

#: Of the heavy work's FLOPs, in a bundle of 16-bit precision.
MIN_16_BIT_SHARE = 0.95
#: A size at which shares are counted: guided, 512 pixels for an SDXL latent.
AUDIT_SYMBOLS = {"B": 2, "h": 64, "w": 64, "k": 1}


def audit_network(api: Any, network: Any, spec: GraphSpec) -> Audit:
    """Count the FLOPs of heavy layers by the type that they compute in.

    The network's inputs are given the audited size, so it is of no use for a build afterwards.

    Args:
        api: TensorRT's or TensorRT-RTX's module.
        network: as parsed from the graph.
        spec: of the graph.
    Raises:
        BuildError: less than `MIN_16_BIT_SHARE` is in 16 bits though the graph's precision is.
    """
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        tensor.shape = resolve(spec.tensor(tensor.name).shape, AUDIT_SYMBOLS)
    flops: dict[str, int] = {}
    widest = (0, "")
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        count = layer_flops(api, layer)
        if count:
            kind = layer.get_input(0).dtype.name.lower()
            flops[kind] = flops.get(kind, 0) + count
            if kind == "float":
                widest = max(widest, (count, layer.name))
    total = sum(flops.values())
    share = sum(flops.get(kind, 0) for kind in ("half", "bf16")) / total if total else 0.0
    audit = Audit(flops=flops, share_16_bit=share, symbols={name: AUDIT_SYMBOLS[name] for name in spec.symbols})
    _check(audit, spec.name, spec.precision, widest[1])
    return audit


def layer_flops(api: Any, layer: Any) -> int:
    """Return a layer's multiplications and additions at its present shapes; 0 if it is not heavy."""
    if layer.type == api.LayerType.CONVOLUTION:
        layer.__class__ = api.IConvolutionLayer
        source, result = layer.get_input(0).shape, layer.get_output(0).shape
        return 2 * math.prod(result) * math.prod(layer.kernel_size_nd) * source[1] // layer.num_groups
    if layer.type == api.LayerType.MATRIX_MULTIPLY:
        layer.__class__ = api.IMatrixMultiplyLayer
        source, result = layer.get_input(0).shape, layer.get_output(0).shape
        inner = source[-2] if layer.op0 == api.MatrixOperation.TRANSPOSE else source[-1]
        return 2 * math.prod(result) * inner
    return 0


def _check(audit: Audit, graph: str, precision: Precision, widest: str) -> None:
    if precision == "fp32" or audit.share_16_bit >= MIN_16_BIT_SHARE:
        return
    raise BuildError(
        "too much of the graph's work is in float32",
        where=f"{graph}: {widest}" if widest else graph,
        expected=f"at least {MIN_16_BIT_SHARE:.0%} of its FLOPs in {precision}",
        found=f"{audit.share_16_bit:.1%}",
        fix="this is a bug of the export, or of the library's parser: please report it",
    )
