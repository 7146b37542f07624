"""A bundle's graph as layers in graph order, with the type and the shape of every tensor, in any precision.

In the bundle's own precision it is the bundle's ONNX file. In another one it is the trace that a build with
`--precision` would take, on the bundle's weights: so norms, softmax and sinusoids are in float32 where they are in a
real build. No build makes an fp16 VAE, which overflows in SDXL's; here it can be had, from the trace in bf16.

Weights are read when a slice of the graph needs them, never all at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper
from polygraphy.backend.onnx import onnx_from_bytes

from benchmarks.compare.sizes import Sizes, infer_sizes
from engine.bundle.graphspec import PRECISION_DTYPES, Precision
from engine.bundle.manifest import Bundle
from engine.errors import BuildError, UsageError
from export.build import int8
from export.checkpoint.architecture import infer_architecture
from export.checkpoint.mapped import StoredTensor
from export.checkpoint.safetensors_file import read_safetensors
from export.graphs.definitions import graph_definitions
from export.graphs.pack import ONNX_TYPES
from export.graphs.traces import can_trace, shipped_trace

#: ONNX's floating-point types that graphs hold, with NumPy's.
FLOATS: dict[int, np.dtype[Any]] = {
    int(TensorProto.FLOAT): np.dtype(np.float32),
    int(TensorProto.FLOAT16): np.dtype(np.float16),
    int(TensorProto.BFLOAT16): np.dtype(ml_dtypes.bfloat16),
}
#: Reads a weight by its name, in the type that the graph declares.
ReadWeight = Callable[[str], NDArray[Any]]


@dataclass(frozen=True)
class LayerGraph:
    """A graph taken apart.

    Attributes:
        name: of the graph.
        opset: of its operators.
        ir_version: of its file.
        layers: the nodes that depend on the values of an input, in graph order.
        folded: by output, the nodes that depend on weights alone, such as a matrix turned over: parts of the layers
            that use them.
        weights: by name, the weights and constants, without their data.
        read_weight: returns one's data.
        sizes: types and shapes of all tensors, and the integers that follow from the shapes.
        inputs, outputs: of the graph.
    """

    name: str
    opset: int
    ir_version: int
    layers: tuple[NodeProto, ...]
    folded: dict[str, NodeProto]
    weights: dict[str, TensorProto]
    read_weight: ReadWeight
    sizes: Sizes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def is_constant(self, tensor: str) -> bool:
        """Tell whether a tensor depends on weights or shapes alone, or is left out ("")."""
        return not tensor or tensor in self.weights or tensor in self.folded or tensor in self.sizes.values

    def is_float(self, tensor: str) -> bool:
        """Tell whether a tensor holds floating-point values."""
        return self.sizes.types.get(tensor) in FLOATS

    def varying(self, layer: NodeProto) -> list[str]:
        """Return the inputs of a layer that depend on the graph's inputs, in order."""
        return [tensor for tensor in layer.input if not self.is_constant(tensor)]

    def bytes_of(self, tensor: str) -> int:
        """Return what a tensor takes in float32, in bytes; where its size is not known, that of the largest known."""
        shape = self.sizes.shapes.get(tensor)
        if shape is None:
            return max((math.prod(each) for each in self.sizes.shapes.values()), default=0) * 4
        return math.prod(shape) * 4

    def constants_of(self, layer: NodeProto) -> tuple[dict[str, NodeProto], list[str]]:
        """Return the folded nodes of a layer, in order, by their first output, and all constants that it reads."""
        nodes: dict[str, NodeProto] = {}
        constants: dict[str, None] = {}

        def visit(tensor: str) -> None:
            if tensor in self.weights or tensor in self.sizes.values:
                constants[tensor] = None
            elif tensor in self.folded and self.folded[tensor].output[0] not in nodes:
                node = self.folded[tensor]
                for source in node.input:
                    visit(source)
                nodes[node.output[0]] = node

        for tensor in layer.input:
            visit(tensor)
        return nodes, list(constants)

    def constant(self, name: str) -> NDArray[Any]:
        """Return the values of a weight, or of integers that follow from the shapes."""
        return self.sizes.values[name] if name in self.sizes.values else self.read_weight(name)

    def place(self, layer: NodeProto) -> str:
        """Return the network's module that a layer belongs to, by its weights' names; "" where it has none."""
        for name in self.constants_of(layer)[1]:
            tensor = self.weights.get(name)
            if tensor is not None and tensor.data_location == TensorProto.EXTERNAL:
                return int8.parameter_name(name).rpartition(".")[0]
        return ""


def round_to(array: NDArray[Any], onnx_type: int) -> NDArray[Any]:
    """Return floating-point values as a type holds them, in float32; others as they are."""
    dtype = FLOATS.get(onnx_type)
    if dtype is None or array.dtype.kind in "iub":
        return array
    with np.errstate(over="ignore"):
        return array.astype(dtype).astype(np.float32)


def load_graph(bundle: Bundle, graph: str, precision: Precision, shapes: Mapping[str, tuple[int, ...]]) -> LayerGraph:
    """Return a bundle's graph in a precision.

    Args:
        bundle: whose weights are read.
        graph: its name.
        precision: of the graph.
        shapes: of its inputs.
    Raises:
        BundleError: its file was changed. BuildError: there is no trace of it in that precision.
    """
    if bundle.spec(graph).precision == precision:
        model = onnx_from_bytes(bundle.read_graph(graph))
        folder = str(bundle.path)
        weights = {tensor.name: tensor for tensor in model.graph.initializer}

        def read(name: str) -> NDArray[Any]:
            return numpy_helper.to_array(weights[name], folder)

    else:
        model = _traced(bundle, graph, precision)
        stored = read_safetensors(bundle.file(bundle.manifest.weights))
        weights = {tensor.name: tensor for tensor in model.graph.initializer}

        def read(name: str) -> NDArray[Any]:
            tensor = weights[name]
            if tensor.data_location != TensorProto.EXTERNAL:
                return numpy_helper.to_array(tensor)
            with np.errstate(over="ignore"):  # a weight that is too large for fp16 breaks its layer, which is told
                return _parameter(stored, name).astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))

    return _taken_apart(model, graph, weights, read, shapes)


def check_precision(bundle: Bundle, graph: str, precision: Precision) -> None:
    """Check that a bundle's graph can be had in a precision.

    Raises:
        BuildError: there is no trace of it.
    """
    if bundle.spec(graph).precision != precision:
        _traced(bundle, graph, precision)


def _parameter(stored: Mapping[str, StoredTensor], name: str) -> NDArray[Any]:
    """Return a parameter as the bundle stores it, or as its integers and scales multiply out to, in float32."""
    if name in stored:
        return stored[name].read().astype(np.float32)
    values, scales = (stored[name + part].read().astype(np.float32) for part in (int8.VALUES, int8.SCALES))
    product: NDArray[Any] = values * scales.reshape(-1, *(1,) * (values.ndim - 1))
    return product


def _traced(bundle: Bundle, graph: str, precision: Precision) -> onnx.ModelProto:
    """Return the trace of a bundle's graph in another precision, its parameters as weights without data."""
    stored = read_safetensors(bundle.file(bundle.manifest.weights))
    arch = infer_architecture(int8.parameter_shapes({name: tensor.shape for name, tensor in stored.items()}))
    is_fp16_vae = precision == "fp16" and bundle.spec(graph).role == "vae"
    traced_in: Precision = "bf16" if is_fp16_vae else precision
    definition = graph_definitions(arch, traced_in, bundle.manifest.tokenizer.end_id, vae_precision=traced_in)[graph]
    trace = shipped_trace(definition)
    if trace is None and can_trace():
        from export.graphs.to_onnx import find_cached

        trace = find_cached(definition)
    if trace is None:
        raise BuildError(
            f"there is no trace of the graph in {precision}",
            where=graph,
            found="an architecture that does not ship with the project",
            fix=f"build a second bundle with --precision {precision}, and compare with that",
        )
    model = onnx.ModelProto()
    model.CopyFrom(trace.structure)
    count = len(definition.spec.inputs)
    for parameter in list(model.graph.input)[count:]:
        kind = parameter.type.tensor_type
        dims = [axis.dim_value for axis in kind.shape.dim]
        model.graph.initializer.add(
            name=parameter.name, data_type=kind.elem_type, dims=dims, data_location=TensorProto.EXTERNAL
        )
    del model.graph.input[count:]
    return _bf16_as_fp16(model) if is_fp16_vae else model


def _bf16_as_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with every bfloat16 turned into float16; the graph is changed."""
    old, new = TensorProto.BFLOAT16, TensorProto.FLOAT16
    graph = model.graph
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type == old:
            info.type.tensor_type.elem_type = new
    for tensor in graph.initializer:
        if tensor.data_type == old:
            if tensor.data_location == TensorProto.EXTERNAL:
                tensor.data_type = new
            else:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == old:
                attribute.i = new
            elif attribute.HasField("t") and attribute.t.data_type == old:
                value = numpy_helper.to_array(attribute.t).astype(np.float16)
                attribute.t.CopyFrom(numpy_helper.from_array(value, attribute.t.name))
    return model


def _taken_apart(
    model: onnx.ModelProto,
    name: str,
    weights: dict[str, TensorProto],
    read: ReadWeight,
    shapes: Mapping[str, tuple[int, ...]],
) -> LayerGraph:
    graph = model.graph
    sizes = infer_sizes(model, shapes)
    layers, folded = [], {}
    constant = {"", *weights, *sizes.values}
    for node in graph.node:
        if sizes.values.keys() >= set(node.output):
            continue
        if constant.issuperset(node.input):
            constant.update(node.output)
            folded.update(dict.fromkeys(node.output, node))
        else:
            layers.append(node)
    return LayerGraph(
        name=name,
        opset=next(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")),
        ir_version=model.ir_version,
        layers=tuple(layers),
        folded=folded,
        weights=weights,
        read_weight=read,
        sizes=sizes,
        inputs=tuple(value.name for value in graph.input),
        outputs=tuple(value.name for value in graph.output),
    )


def check_same_network(first: Bundle, second: Bundle, graph: str) -> None:
    """Check that a graph of two bundles is of one architecture.

    Raises:
        UsageError: a weight of one is missing in the other or of another shape; it is named.
    """
    ours, theirs = (_parameters(bundle, graph) for bundle in (first, second))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UsageError(
                "the two bundles are of different architectures",
                where=f"{graph}: {name}",
                expected=f"{_size(ours, name)}, as in {first.path}",
                found=f"{_size(theirs, name)} in {second.path}",
                fix="compare bundles of the same networks: in another precision, or of other weights or LoRAs",
            )


def _size(parameters: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(list(parameters[name])) if name in parameters else "no such weight"


def _parameters(bundle: Bundle, graph: str) -> dict[str, tuple[int, ...]]:
    model = onnx_from_bytes(bundle.read_graph(graph))
    external = (each for each in model.graph.initializer if each.data_location == TensorProto.EXTERNAL)
    return int8.parameter_shapes({tensor.name: tuple(tensor.dims) for tensor in external})


def precision_type(precision: Precision) -> int:
    """Return ONNX's number of a precision's type."""
    return ONNX_TYPES[PRECISION_DTYPES[precision]]
