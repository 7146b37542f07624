"""Which layer of one graph is which of another.

Names do not tell: a trace in fp16 has casts that one in fp32 lacks, and the exporter numbers what follows anew. So a
tensor is known by what it is computed from: the operator, its attributes, and its sources down to the graph's inputs
and the weights' names. A cast between floating-point types changes no meaning, and is left out. Layers that nothing
tells apart, such as two products of one tensor with constants, are matched in graph order.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass

from onnx import NodeProto, TensorProto, numpy_helper

from benchmarks.compare.graphs import FLOATS, LayerGraph
from engine.errors import UsageError
from export.build import int8


@dataclass(frozen=True)
class Match:
    """How an examined graph maps to a reference graph.

    Attributes:
        tensors: by tensor of the examined graph, the reference's of the same meaning.
        layers: by index of the examined layer, the index of the reference's; casts have none.
    """

    tensors: dict[str, str]
    layers: dict[int, int]


def is_float_cast(graph: LayerGraph, node: NodeProto) -> bool:
    """Tell whether a node only changes the floating-point type of its input."""
    return node.op_type == "Cast" and graph.is_float(node.input[0]) and graph.is_float(node.output[0])


def match(examined: LayerGraph, reference: LayerGraph) -> Match:
    """Match the layers of two graphs.

    Raises:
        UsageError: a layer of the examined graph has no counterpart; it is named.
    """
    if examined is reference:
        names = {name: name for layer in examined.layers for name in (*examined.varying(layer), *layer.output)}
        return Match(names, {index: index for index in range(len(examined.layers))})
    waiting: defaultdict[bytes, list[int]] = defaultdict(list)
    names_of = _keys(reference)
    for index, layer in enumerate(reference.layers):
        if not is_float_cast(reference, layer):
            waiting[names_of[layer.output[0]]].append(index)
    keys = _keys(examined)
    tensors = {name: name for name in examined.inputs}
    layers: dict[int, int] = {}
    for index, layer in enumerate(examined.layers):
        if is_float_cast(examined, layer):
            if layer.input[0] in tensors:  # else a cast of weights, which is folded
                tensors[layer.output[0]] = tensors[layer.input[0]]
            continue
        candidates = waiting.get(keys[layer.output[0]])
        if not candidates:
            raise UsageError(
                "the two graphs are built differently",
                where=f"{examined.name}: {layer.name}",
                expected="the same operators on the same weights, casts apart",
                found=f"a {layer.op_type} that only one of them has",
                fix="build both bundles with one version of the project",
            )
        layers[index] = candidates.pop(0)
        tensors.update(zip(layer.output, reference.layers[layers[index]].output, strict=True))
    return Match(tensors, layers)


def _keys(graph: LayerGraph) -> dict[str, bytes]:
    """Return a hash of what each tensor is computed from, by its name."""
    keys: dict[str, bytes] = {"": b""}
    for name in graph.inputs:
        keys[name] = _hash(b"input", name.encode())
    for name, tensor in graph.weights.items():
        keys[name] = _weight_key(name, tensor)
    for name, value in graph.sizes.values.items():
        keys[name] = _hash(b"constant", value.tobytes())
    folded = {node.output[0]: node for node in graph.folded.values()}
    for node in (*folded.values(), *graph.layers):
        if is_float_cast(graph, node):
            keys[node.output[0]] = keys[node.input[0]]
        elif node.op_type == "DequantizeLinear" and int8.parameter_name(node.input[0]) == node.output[0]:
            keys[node.output[0]] = _hash(b"weight", node.output[0].encode())
        else:
            attributes = sorted(each.SerializeToString(deterministic=True) for each in node.attribute)
            sources = [keys[source] for source in node.input]
            for place, output in enumerate(node.output):
                keys[output] = _hash(node.op_type.encode(), *attributes, *sources, bytes([place]))
    return keys


def _weight_key(name: str, tensor: TensorProto) -> bytes:
    if tensor.data_location == TensorProto.EXTERNAL:
        return _hash(b"weight", name.encode())
    if tensor.data_type in FLOATS:  # rounded in one precision and not in another
        return _hash(b"constant", bytes(str(list(tensor.dims)), "ascii"))
    return _hash(b"constant", numpy_helper.to_array(tensor).tobytes())


def _hash(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
