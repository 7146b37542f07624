"""From a graph's structure to the ONNX file of a bundle: parameters point into the weights file."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto

from engine.bundle.graphspec import DType, GraphSpec
from engine.errors import BuildError
from export.build.weights import WEIGHTS, Weight

#: ONNX's numbers for our types.
ONNX_TYPES: dict[DType, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


def pack(structure: onnx.ModelProto, spec: GraphSpec, weights: Mapping[str, Weight]) -> onnx.ModelProto:
    """Return the graph with every parameter as external data in the weights file.

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
    for parameter in parameters:
        graph.initializer.append(_external(parameter, spec.name, weights))
    return model


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
