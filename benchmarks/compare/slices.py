"""A few layers of a graph as an ONNX model of their own, with its weights and every layer's output marked.

A chain computes layer after layer. In a cut every layer reads what it is given instead of what the layer before it
made, so that one run tells of each layer what it does by itself.

In a typed model tensors have the types that the graph declares. A rounded model computes every layer in float32 and
rounds its result to the declared type: what 16-bit hardware does that adds up in float32. ONNX Runtime's CPU provider
does not do so by itself: it computes fp16 layers in float32 too, but leaves out the rounding between them, so that
neither an overflow nor an error of rounding reaches the next layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from polygraphy.backend.onnx import modify_outputs

from benchmarks.compare.graphs import FLOATS, LayerGraph, round_to

Form = Literal["typed", "rounded"]
#: Layers that hand on values as they are: what is rounded before them stays so.
_MOVES = frozenset(
    (
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    )
)


@dataclass(frozen=True)
class LayerSlice:
    """Some layers as a model.

    Attributes:
        model: with weights.
        inputs: by the names of its inputs, the values that they are given; see `make_slice`.
        outputs: the names of its outputs, by the graph's tensors that they hold.
        types: that the model's inputs are in, by their names.
    """

    model: onnx.ModelProto
    inputs: dict[str, str]
    outputs: dict[str, str]
    types: dict[str, int]

    def feed(self, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the model's inputs; values are in float32, or integers."""
        dtypes = {name: helper.tensor_dtype_to_np_dtype(kind) for name, kind in self.types.items()}
        return {name: np.asarray(values[value], dtypes[name], order="C") for name, value in self.inputs.items()}


def make_slice(
    graph: LayerGraph, layers: Sequence[NodeProto], form: Form, *, cut: Sequence[Sequence[str]] | None = None
) -> LayerSlice:
    """Return some layers of a graph as a model.

    Args:
        graph: that they are of.
        layers: in graph order.
        form: of the model.
        cut: names of the values that each layer reads, in the order of its inputs that are no constants. None makes a
            chain: a layer reads what those before it made, and from outside the graph's tensors by their names.
    """
    maker = _Maker(graph, form)
    made: set[str] = set()
    for index, layer in enumerate(layers):
        maker.add_constants(layer)
        node = NodeProto()
        node.CopyFrom(layer)
        names = iter(graph.varying(layer) if cut is None else cut[index])
        for place, tensor in enumerate(layer.input):
            if not graph.is_constant(tensor):
                name = next(names)
                if cut is not None:
                    node.input[place] = maker.given(tensor, name, f"given.{name}")
                elif tensor not in made:
                    node.input[place] = maker.given(tensor, name, tensor)
        maker.add(node)
        made.update(layer.output)
    return maker.finish([tensor for layer in layers for tensor in layer.output if tensor])


class _Maker:
    """Collects the parts of a model."""

    def __init__(self, graph: LayerGraph, form: Form) -> None:
        self._graph, self._form = graph, form
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._folded: set[str] = set()
        self._inputs: dict[str, str] = {}
        self._types: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...] | None] = {}
        self._inside: dict[str, str] = {}

    def _declared(self, tensor: str) -> int:
        """Return a tensor's type in the model, before any cast at its borders."""
        kind = self._graph.sizes.types[tensor]
        return TensorProto.FLOAT if self._form == "rounded" and kind in FLOATS else kind

    def given(self, tensor: str, value: str, name: str) -> str:
        """Make an input of the model, of a tensor's type and shape, for a value; returns what nodes read."""
        if name not in self._inputs:
            declared = self._declared(tensor)
            # NumPy has no bfloat16: such values come and go in float32.
            in_float32 = declared == TensorProto.BFLOAT16
            self._inputs[name] = value
            self._shapes[name] = self._graph.sizes.shapes.get(tensor)
            self._types[name] = TensorProto.FLOAT if in_float32 else declared
            self._inside[name] = f"{name}.bf16" if in_float32 else name
            if in_float32:
                self._nodes.append(helper.make_node("Cast", [name], [self._inside[name]], to=declared))
        return self._inside[name]

    def add_constants(self, layer: NodeProto) -> None:
        """Add the weights that a layer reads, and the nodes that depend on weights alone."""
        nodes, names = self._graph.constants_of(layer)
        for name in names:
            if name not in self._constants:
                value = self._graph.constant(name)
                if self._form == "rounded":
                    value = round_to(value, self._graph.sizes.types[name])
                self._constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        for name, node in nodes.items():
            if name not in self._folded:
                self._folded.add(name)
                copy = NodeProto()
                copy.CopyFrom(node)
                self.add(copy)

    def add(self, node: NodeProto) -> None:
        """Add a node; in a rounded model, with the rounding of its results."""
        if self._form == "typed":
            self._nodes.append(node)
            return
        rounded = {
            place: self._graph.sizes.types[tensor]
            for place, tensor in enumerate(node.output)
            if node.op_type not in _MOVES
            and self._graph.sizes.types.get(tensor) in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        }
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in FLOATS:
                attribute.i = TensorProto.FLOAT
            elif attribute.HasField("t") and attribute.t.data_type in FLOATS:
                wide = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))
        results = {place: node.output[place] for place in rounded}
        for place, tensor in results.items():
            node.output[place] = f"{tensor}.exact"
        self._nodes.append(node)
        for place, tensor in results.items():
            self._nodes.append(helper.make_node("Cast", [f"{tensor}.exact"], [f"{tensor}.half"], to=rounded[place]))
            self._nodes.append(helper.make_node("Cast", [f"{tensor}.half"], [tensor], to=TensorProto.FLOAT))

    def finish(self, outputs: Sequence[str]) -> LayerSlice:
        """Return the model with its outputs marked."""
        marked = {tensor: tensor for tensor in outputs}
        for tensor in outputs:
            if self._declared(tensor) == TensorProto.BFLOAT16:
                marked[tensor] = f"{tensor}.float32"
                self._nodes.append(helper.make_node("Cast", [tensor], [marked[tensor]], to=TensorProto.FLOAT))
        shapes = self._graph.sizes.shapes
        infos = []
        for tensor, name in marked.items():
            kind = TensorProto.FLOAT if name != tensor else self._declared(tensor)
            infos.append(helper.make_tensor_value_info(name, kind, shapes.get(tensor)))
        model = helper.make_model(
            helper.make_graph(
                self._nodes,
                self._graph.name,
                [helper.make_tensor_value_info(name, self._types[name], self._shapes[name]) for name in self._inputs],
                infos[:1],
                initializer=list(self._constants.values()),
                value_info=infos,
            ),
            opset_imports=[helper.make_opsetid("", self._graph.opset)],
            ir_version=self._graph.ir_version,
        )
        model = modify_outputs(model, outputs=list(marked.values()))
        return LayerSlice(model, dict(self._inputs), marked, dict(self._types))
