"""From a graph's structure to the ONNX file of a bundle: parameters point into the weights file."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

from engine.bundle.graphspec import GraphSpec
from engine.errors import BuildError
from export.build import int8
from export.build.weights import WEIGHTS, StoredType, Weight

#: ONNX's numbers for our types.
ONNX_TYPES: dict[StoredType, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
}


def pack(structure: onnx.ModelProto, spec: GraphSpec, weights: Mapping[str, Weight]) -> onnx.ModelProto:
    """Return the graph with every parameter as external data in the weights file; those in int8 are multiplied out.

    Args:
        structure: from `to_onnx.trace`; it is not changed.
        spec: of the graph.
        weights: where each tensor lies.
    Raises:
        BuildError: a parameter is not among the weights, or of another shape or type there.
    """
    model = onnx.ModelProto()
    model.CopyFrom(structure)
    graph = model.graph
    count = len(spec.inputs)
    parameters = list(graph.input)[count:]
    del graph.input[count:]
    products = []
    for parameter in parameters:
        if parameter.name + int8.VALUES in weights:
            values, scales = _in_int8(parameter)
            graph.initializer.extend(_external(part, spec.name, weights) for part in (values, scales))
            products.append(
                helper.make_node(
                    "DequantizeLinear",
                    [values.name, scales.name],
                    [parameter.name],
                    name=f"{parameter.name}.dequantized",
                    axis=0,
                )
            )
        else:
            graph.initializer.append(_external(parameter, spec.name, weights))
    if products:
        nodes = list(graph.node)
        del graph.node[:]
        graph.node.extend((*products, *nodes))  # in the order in which they run
        for opset in model.opset_import:
            opset.version = max(opset.version, int8.OPSET)
    return model


def _in_int8(parameter: onnx.ValueInfoProto) -> tuple[onnx.ValueInfoProto, onnx.ValueInfoProto]:
    """Return the integers and the scales of a parameter, one scale per index of its first axis."""
    kind = parameter.type.tensor_type
    shape = [axis.dim_value for axis in kind.shape.dim]
    return (
        helper.make_tensor_value_info(parameter.name + int8.VALUES, TensorProto.INT8, shape),
        helper.make_tensor_value_info(parameter.name + int8.SCALES, kind.elem_type, shape[:1]),
    )


def _external(parameter: onnx.ValueInfoProto, graph: str, weights: Mapping[str, Weight]) -> TensorProto:
    kind = parameter.type.tensor_type
    shape = tuple(axis.dim_value for axis in kind.shape.dim)
    weight = weights.get(parameter.name)
    if weight is None or weight.shape != shape or ONNX_TYPES[weight.dtype] != kind.elem_type:
        raise BuildError(
            "a parameter of the graph is not in the weights file",
            where=f"{graph}: {parameter.name}",
            expected=f"{TensorProto.DataType.Name(kind.elem_type)} {list(shape)}",
            found=weight,
        )
    tensor = TensorProto(
        name=parameter.name,
        data_type=kind.elem_type,
        dims=shape,
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", WEIGHTS), ("offset", weight.offset), ("length", weight.bytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
