"""The VAE's graphs cut into segments, each exact on a few rows of an image; `engine.memory.vae_slices` runs them.

A convolution needs its neighbours' rows, a norm the whole image's mean and deviation, attention every cell. So a
trace is cut before each norm, whose statistics a segment is given, before each change of resolution, and around
attention. Whether the segments add up to the graph is measured in every build (`export.build.trial`).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engine.bundle.graphspec import PRECISION_DTYPES, Axis, GraphSpec, TensorSpec
from engine.bundle.manifest import STATISTICS, Norm, VaeSegment
from engine.errors import BuildError
from export.build.weights import Weight
from export.graphs.pack import ONNX_TYPES, pack

#: A zip's files have dates; equal bundles shall be equal files.
_NO_DATE = (1980, 1, 1, 0, 0, 0)
#: The shape that makes f[B, C, h·w, 1] of f[B, C, h, w].
_COLUMN = helper.make_tensor("column", TensorProto.INT64, [4], [0, 0, -1, 1])


@dataclass(frozen=True, eq=False)
class TracedSegment:
    """A segment, and its graph without weights: inputs as in its spec, then one input per parameter."""

    segment: VaeSegment
    structure: onnx.ModelProto


def cut(spec: GraphSpec, structure: onnx.ModelProto) -> tuple[TracedSegment, ...]:
    """Return the segments of a graph of the VAE, in the order in which they run; () for another graph.

    Args:
        spec: of the graph.
        structure: its trace; it is not changed.
    Raises:
        BuildError: a norm or attention is not made of the nodes that `export.graphs.to_onnx` writes.
    """
    if spec.role != "vae":
        return ()
    try:
        return tuple(_Cutter(spec, structure).segments())
    except KeyError as error:
        fix = "this is a bug, or an unsupported version of torch or onnxscript: please report it"
        raise BuildError("the graph cannot be cut into segments", where=f"{spec.name}: {error}", fix=fix) from error


def write_segments(segments: Iterable[TracedSegment], file: Path, weights: Mapping[str, Weight]) -> None:
    """Write the segments' graphs into one file, each under its spec's name.

    Args:
        segments: from `cut`.
        file: a zip file, which is written.
        weights: where each tensor lies in the weights file beside it.
    Raises:
        BuildError: a parameter is not among the weights.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for traced in segments:
            model = pack(traced.structure, traced.segment.spec, weights)
            entry = zipfile.ZipInfo(traced.segment.file_name, _NO_DATE)
            archive.writestr(entry, model.SerializeToString(deterministic=True), zipfile.ZIP_DEFLATED)


class _Cutter:
    """Rewrites a trace so that every cut is at a map, f[B, C, rows, columns], and takes out what is between cuts."""

    def __init__(self, spec: GraphSpec, structure: onnx.ModelProto) -> None:
        self._spec, self._structure = spec, onnx.ModelProto()
        self._structure.CopyFrom(structure)
        graph = self._structure.graph
        self._parameters = {value.name: value for value in graph.input[len(spec.inputs) :]}
        self._constants = {tensor.name: tensor for tensor in (*graph.initializer, _COLUMN)}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._consumers = {name: node for node in reversed(graph.node) for name in node.input}
        self._norms: dict[str, Norm] = {}  # by the name of the normalized value
        self._cuts = {spec.outputs[0].name}
        self._nodes = list(self._rewritten(graph.node))
        self._cuts |= {norm.map for norm in self._norms.values()}
        self._cuts |= {node.input[0] for node in self._nodes if self._scale(node) != 1}
        self._producers = {name: node for node in self._nodes for name in node.output}
        self._maps = {tensor.name: _with_axes(tensor, "h", "w") for tensor in spec.inputs}

    def segments(self) -> Iterator[TracedSegment]:
        """Yield the segments, each with the map of the next cut as its result."""
        return (self._segment(name) for name in self._producers if name in self._cuts)

    def _rewritten(self, nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
        """Yield the nodes: norms take `STATISTICS`, and what attention takes and gives is also there as a map."""
        norms = {
            self._after(node.output[0], "Reshape").output[0]: node
            for node in nodes
            if node.op_type == "InstanceNormalization"
        }
        cells = {name for node in nodes if node.op_type == "Softmax" for name in self._cells(node)}
        for node in nodes:
            result = node.output[0]
            if result in norms:
                yield from self._given_statistics(norms[result], result)
            else:
                node.input[:] = [f"{name}.again" if name in cells else name for name in node.input]
                yield node
            if result in cells:
                yield from self._as_map(result)

    def _given_statistics(self, norm: NodeProto, result: str) -> Iterator[NodeProto]:
        """Yield what stands for a norm of groups, which is traced as Reshape, InstanceNormalization, Reshape."""
        x = self._before(norm.input[0], "Reshape").input[0]
        cast = self._producers[x]
        name = cast.input[0] if cast.op_type == "Cast" else x
        groups = self._constants[norm.input[1]].dims[0]
        self._norms[result] = Norm(map=name, groups=groups, eps=helper.get_node_attr_value(norm, "epsilon"))
        mean, inverse = STATISTICS
        yield helper.make_node("Sub", [x, mean], [f"{result}.centered"])
        yield helper.make_node("Mul", [f"{result}.centered", inverse], [result])

    def _cells(self, softmax: NodeProto) -> Iterator[str]:
        """Yield queries, keys, values and result of an attention of one head, f[B, h·w, 1, C] each."""
        scores = self._before(softmax.input[0], "MatMul")
        mixed = self._after(softmax.output[0], "MatMul")
        for operand in (*scores.input, mixed.input[1]):
            yield self._before(operand, "Reshape").output[0]
        yield self._after(mixed.output[0], "Transpose").output[0]

    def _as_map(self, cells: str) -> Iterator[NodeProto]:
        """Yield what makes f[B, C, h, w] of f[B, h·w, 1, C], where the cut is, and the same again of it."""
        self._cuts.add(f"{cells}.map")
        yield helper.make_node("Transpose", [cells], [f"{cells}.column"], perm=[0, 3, 1, 2])
        yield helper.make_node("Shape", [cells], [f"{cells}.shape"])
        yield helper.make_node("Reshape", [f"{cells}.column", f"{cells}.shape"], [f"{cells}.map"])
        yield helper.make_node("Reshape", [f"{cells}.map", _COLUMN.name], [f"{cells}.read"])
        yield helper.make_node("Transpose", [f"{cells}.read"], [f"{cells}.again"], perm=[0, 2, 3, 1])

    def _before(self, name: str, kind: str) -> NodeProto:
        """Return the nearest node of a kind that a value comes from, along first inputs."""
        while (node := self._producers[name]).op_type != kind:
            name = node.input[0]
        return node

    def _after(self, name: str, kind: str) -> NodeProto:
        """Return the nearest node of a kind that a value goes to."""
        while (node := self._consumers[name]).op_type != kind:
            name = node.output[0]
        return node

    def _segment(self, name: str) -> TracedSegment:
        """Return the segment that gives the map `name`."""
        nodes = self._nodes_for(name)
        read = list(dict.fromkeys(value for node in nodes if node.op_type != "Shape" for value in node.input))
        maps = [self._maps[value] for value in read if value in self._maps]
        for node in nodes:
            if node.op_type == "Shape":  # a trace asks the first map of a size; a segment asks its own
                node.input[0] = maps[0].name
        halo, scale = self._halo_and_scale(nodes)
        result = self._result(name)
        self._maps[name] = _with_axes(result, "h", "w")
        result = _with_axes(result, _scaled("h", scale), _scaled("w", scale))
        whole: tuple[str, ...] = ()
        if any(node.op_type == "Softmax" for node in nodes):  # the queries of some cells meet all keys and values
            whole = tuple(tensor.name for tensor in maps[1:])
            maps[0], result = (_with_axes(tensor, "n", 1) for tensor in (maps[0], result))
        norm = next((self._norms[value] for node in nodes for value in node.output if value in self._norms), None)
        if norm is not None:
            shape = (*self._maps[norm.map].shape[:2], 1, 1)
            maps += [TensorSpec(name=statistic, dtype="float32", shape=shape) for statistic in STATISTICS]
        update = {"name": f"{self._spec.name}.{name}", "inputs": tuple(maps), "outputs": (result,), "multiples": {}}
        spec = self._spec.model_copy(update=update)
        parameters = [self._parameters[value] for value in read if value in self._parameters]
        constants = [self._constants[value] for value in read if value in self._constants]
        inputs = [*map(_value_info, maps), *parameters]
        graph = helper.make_graph(nodes, spec.name, inputs, [_value_info(result)], constants)
        opsets, version = self._structure.opset_import, self._structure.ir_version
        model = helper.make_model(graph, opset_imports=opsets, ir_version=version)
        return TracedSegment(VaeSegment(spec=spec, norm=norm, halo=halo, whole=whole), model)

    def _nodes_for(self, name: str) -> list[NodeProto]:
        """Return the nodes that make a map of those of earlier cuts."""
        wanted, nodes = {name}, []
        for node in reversed(self._nodes):
            if not wanted.isdisjoint(node.output):
                nodes.append(node)
                if node.op_type != "Shape":
                    wanted.update(value for value in node.input if value not in self._cuts)
        return nodes[::-1]

    def _result(self, name: str) -> TensorSpec:
        """Return a new map: it has the channels of the convolution that it comes from, or of the map before."""
        if name == self._spec.outputs[0].name:
            return self._spec.outputs[0]
        node = self._producers[name]
        while node.op_type != "Conv" and node.input[0] not in self._maps:
            node = self._producers[node.input[0]]
        if node.op_type == "Conv":
            channels: Axis = self._parameters[node.input[1]].type.tensor_type.shape.dim[0].dim_value
        else:
            channels = self._maps[node.input[0]].shape[1]
        return TensorSpec(name=name, dtype=PRECISION_DTYPES[self._spec.precision], shape=("B", channels, "h", "w"))

    def _halo_and_scale(self, nodes: Iterable[NodeProto]) -> tuple[tuple[int, int], Fraction]:
        """Return the rows that are seen above and below a slice's own, and rows of the result per row of a map."""
        above, below, scale = Fraction(0), Fraction(0), Fraction(1)
        for node in nodes:
            if node.op_type == "Conv":
                kernel, stride, padding = (
                    helper.get_node_attr_value(node, attribute)[0] for attribute in ("kernel_shape", "strides", "pads")
                )
                above += padding / scale
                below += (kernel - stride - padding) / scale
            scale *= self._scale(node)
        step = max(1, int(1 / scale))  # where rows are halved, slices begin and end at even ones
        return (step * math.ceil(above / step), step * math.ceil(below / step)), scale

    def _scale(self, node: NodeProto) -> Fraction:
        """Return how many rows a node gives per row that it takes."""
        if node.op_type == "Conv":
            return Fraction(1, helper.get_node_attr_value(node, "strides")[0])
        if node.op_type == "Resize":
            return Fraction(numpy_helper.to_array(self._constants[node.input[2]])[2].item())
        return Fraction(1)


def _with_axes(tensor: TensorSpec, rows: Axis, columns: Axis) -> TensorSpec:
    return tensor.model_copy(update={"shape": (*tensor.shape[:2], rows, columns)})


def _scaled(symbol: str, scale: Fraction) -> Axis:
    if scale == 1:
        return symbol
    return f"{scale}*{symbol}" if scale > 1 else f"{symbol}/{1 / scale}"


def _value_info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, ONNX_TYPES[tensor.dtype], tensor.shape)
