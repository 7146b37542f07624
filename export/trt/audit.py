"""What share of a plan's heavy work runs in which precision.

Heavy is what multiplies matrices: convolutions and matrix products, those of attention included; the
export makes no other layers that do. How much work each is comes from the network that the library has
parsed, at one concrete size.

In which type it runs is asked of the compiled plan, through TensorRT's engine inspector, where the plan
can be opened on this computer. That needs the GPU that it is for. Everywhere else, and where the inspector
names no layer for a piece of work or no single type, the parsed network answers: it is strongly typed, so a
layer computes in the type of its inputs, and no builder is free to change that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.bundle.graphspec import GraphSpec, Precision, resolve
from engine.bundle.manifest import Audit
from engine.errors import BuildError

#: Of the heavy work's FLOPs, in a bundle of 16-bit precision.
MIN_16_BIT_SHARE = 0.95
#: A size at which shares are counted: guided, 512 pixels for an SDXL latent.
AUDIT_SYMBOLS = {"B": 2, "h": 64, "w": 64, "k": 1}
#: How the parser marks a layer with its ONNX node, and a compiled layer with all nodes that went into it.
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
#: Words for types in what the inspector writes: "Half", or "Row major linear FP16 format".
_TYPE_WORDS = {"half": "half", "fp16": "half", "bf16": "bf16", "bfloat16": "bf16", "float": "float", "fp32": "float"}
_TYPE_KEYS = ("datatype", "format/datatype")
_WORD = re.compile(r"[a-z]+\d*")
#: Kernels of 16-bit products, such as "sm80_xmma_gemm_f16f16_f16f32_f32_tn" and "ampere_h16816gemm_128x64".
_TACTIC_OF_16_BITS = re.compile(r"f16|h\d{3,}")


@dataclass(frozen=True)
class HeavyLayer:
    """A layer of the parsed network that multiplies matrices.

    Attributes:
        name: of the layer.
        node: of the ONNX graph that it implements.
        flops: multiplications and additions.
        kind: the type it computes in, as the network says: "half", "bf16" or "float".
    """

    name: str
    node: str
    flops: int
    kind: str


def heavy_layers(api: Any, network: Any, spec: GraphSpec) -> tuple[HeavyLayer, ...]:
    """Return a network's heavy layers at the audited size.

    The network's inputs are given that size, so it is of no use for a build afterwards.

    Args:
        api: TensorRT's or TensorRT-RTX's module.
        network: as parsed from the graph.
        spec: of the graph.
    """
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        tensor.shape = resolve(spec.tensor(tensor.name).shape, AUDIT_SYMBOLS)
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        flops = layer_flops(api, layer)
        if flops:
            node = _NODE.search(layer.metadata)
            kind = layer.get_input(0).dtype.name.lower()
            found.append(HeavyLayer(layer.name, node[1] if node else layer.name, flops, kind))
    return tuple(found)


def audit(layers: Sequence[HeavyLayer], spec: GraphSpec, inspected: Mapping[str, str] | None = None) -> Audit:
    """Count the FLOPs of heavy layers by the type that they compute in.

    Args:
        layers: from `heavy_layers`.
        spec: of the graph.
        inspected: types by ONNX node, from `inspected_types`; None where no plan could be opened.
    Raises:
        BuildError: less than `MIN_16_BIT_SHARE` is in 16 bits though the graph's precision is.
    """
    answers = inspected or {}
    flops: dict[str, int] = {}
    told = 0
    widest = (0, "")
    for layer in layers:
        kind = answers.get(layer.node, layer.kind)
        told += layer.flops if layer.node in answers else 0
        flops[kind] = flops.get(kind, 0) + layer.flops
        if kind == "float":
            widest = max(widest, (layer.flops, layer.name))
    total = sum(flops.values())
    share = sum(flops.get(kind, 0) for kind in ("half", "bf16")) / total if total else 0.0
    result = Audit(
        flops=flops,
        share_16_bit=share,
        symbols={name: AUDIT_SYMBOLS[name] for name in spec.symbols},
        inspected_share=told / total if total else 0.0,
    )
    _check(result, spec.name, spec.precision, widest[1])
    return result


def inspect_engine(api: Any, engine: Any) -> dict[str, str]:
    """Ask an opened plan in which types it computes; see `inspected_types`."""
    return inspected_types(engine.create_engine_inspector().get_engine_information(api.LayerInformationFormat.JSON))


def inspected_types(text: str) -> dict[str, str]:
    """Return the types that an engine computes in, by ONNX node.

    The inspector's "Layers" are objects if the plan was built with detailed verbosity, else names, which
    tell nothing. Of an object, "Metadata" names the ONNX nodes that it runs, and each of its "Inputs" has a
    type, under "Format/Datatype" (TensorRT 10) or "DataType" (11); of its weights, "Weights" may tell it. A
    layer whose inputs are of several types, such as one that casts within, does not tell in which of them
    it multiplies, nor does one whose inputs and "TacticName" disagree.

    Args:
        text: the inspector's JSON.
    Returns:
        "half", "bf16" or "float" for each node whose layers agree on one; {} where the text tells nothing.
    """
    try:
        report = json.loads(text)
    except ValueError:
        return {}
    layers = report.get("Layers", []) if isinstance(report, dict) else []
    kinds: dict[str, set[str]] = {}
    for layer in layers:
        if isinstance(layer, dict):
            nodes = _NODE.findall(str(layer.get("Metadata", "")))
            for node in nodes:
                kinds.setdefault(node, set()).update(_input_kinds(layer))
    return {node: next(iter(found)) for node, found in kinds.items() if len(found) == 1}


def _input_kinds(layer: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for tensor in layer.get("Inputs", []):
        if isinstance(tensor, dict):
            text = " ".join(str(value) for key, value in tensor.items() if key.lower() in _TYPE_KEYS).lower()
            found.update(_TYPE_WORDS[word] for word in _WORD.findall(text) if word in _TYPE_WORDS)
    weights = layer.get("Weights")
    if found and isinstance(weights, dict):
        found.update(_TYPE_WORDS[word] for word in [str(weights.get("Type", "")).lower()] if word in _TYPE_WORDS)
    if found == {"float"} and _TACTIC_OF_16_BITS.search(str(layer.get("TacticName", "")).lower()):
        found.add("half")
    return found


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
        fix="this is a bug of the export, or of the library: please report it",
    )
