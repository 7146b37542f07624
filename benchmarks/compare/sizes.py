"""Types and shapes of all tensors of a graph whose inputs' shapes are known, without running it.

ONNX's shape inference stops where a graph computes a shape from others by arithmetic that it does not follow. So the
integers that depend on known shapes alone are computed, put in as constants, and inference goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

#: Each round lets shapes pass one more computation that inference does not follow; graphs of ours need two.
_MAX_ROUNDS = 8
_INTEGERS = (TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)


@dataclass(frozen=True)
class Sizes:
    """What is known of a graph's tensors without running it.

    Attributes:
        types: ONNX's number of each tensor's type.
        shapes: of each tensor whose shape can be told.
        values: of the integers that follow from the shapes, such as the new shape of a Reshape.
    """

    types: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    values: dict[str, NDArray[Any]]


def infer_sizes(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
    """Return the types and shapes of a graph's tensors.

    Args:
        model: a graph; its weights' data is not read.
        shapes: of its inputs.
    """
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    graph = sized.graph
    for value in graph.input:
        value.type.tensor_type.shape.CopyFrom(_as_proto(shapes[value.name]))
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    constants = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type in _INTEGERS and tensor.data_location != TensorProto.EXTERNAL
    }
    types: dict[str, int] = {}
    found: dict[str, tuple[int, ...]] = {}
    values = dict(constants)
    for _ in range(_MAX_ROUNDS):
        del graph.value_info[:]
        _read(onnx.shape_inference.infer_shapes(sized, data_prop=True).graph, types, found)
        if not _compute(graph, types, found, values):
            break
    return Sizes(types, found, {name: value for name, value in values.items() if name not in constants})


def _read(graph: onnx.GraphProto, types: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
    for tensor in graph.initializer:
        types[tensor.name], shapes[tensor.name] = tensor.data_type, tuple(tensor.dims)
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        types[value.name] = kind.elem_type
        axes = [axis.dim_value for axis in kind.shape.dim if axis.HasField("dim_value")]
        if kind.HasField("shape") and len(axes) == len(kind.shape.dim):
            shapes[value.name] = tuple(axes)


def _compute(
    graph: onnx.GraphProto,
    types: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    values: dict[str, NDArray[Any]],
) -> int:
    """Turn nodes whose integers are known into constants; returns how many."""
    outputs = {value.name for value in graph.output}
    nodes = []
    for node in graph.node:
        result = None if outputs.intersection(node.output) else _result(node, types, shapes, values)
        if result is None:
            nodes.append(node)
            continue
        values[node.output[0]] = result
        graph.initializer.append(numpy_helper.from_array(result, node.output[0]))
    done = len(graph.node) - len(nodes)
    del graph.node[:]
    graph.node.extend(nodes)
    return done


def _result(
    node: NodeProto,
    types: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping[str, NDArray[Any]],
) -> NDArray[Any] | None:
    """Return the integers that a node gives, None where they are not known yet or it gives others."""
    if node.op_type == "Shape":
        shape = shapes.get(node.input[0])
        if shape is None:
            return None
        ends = {attribute.name: attribute.i for attribute in node.attribute}
        return np.array(shape[ends.get("start", 0) : ends.get("end", len(shape))], np.int64)
    if len(node.output) != 1 or types.get(node.output[0]) not in _INTEGERS:
        return None
    if not all(name in values for name in node.input if name):
        return None
    (result,) = ReferenceEvaluator(node).run(None, {name: values[name] for name in node.input if name})
    return np.asarray(result)


def _as_proto(sizes: tuple[int, ...]) -> onnx.TensorShapeProto:
    shape = onnx.TensorShapeProto()
    for size in sizes:
        shape.dim.add(dim_value=size)
    return shape
