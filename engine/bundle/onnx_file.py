"""What an ONNX file may hold, checked before a library sees it.

A bundle may come from a stranger, and libraries differ in what they let a graph do: ONNX Runtime 1.20 to 1.23 read any
file of the computer as a weight. So a graph may name one file, the bundle's weights, and is made of standard operators
without graphs inside: no loops, no functions, nothing of a library's own.

Only the fields that are looked at are declared here; protobuf keeps the others as they are. Source: onnx.proto,
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from engine.errors import BundleError

#: Fields of each message: name, number, and type: a message, or one of `_SCALARS`; those with * are repeated.
_MESSAGES: dict[str, tuple[tuple[str, int, str], ...]] = {
    "StringStringEntryProto": (("key", 1, "string"), ("value", 2, "string")),
    "TensorProto": (
        ("name", 8, "string"),
        ("raw_data", 9, "bytes"),
        ("external_data", 13, "*StringStringEntryProto"),
        ("data_location", 14, "int32"),
    ),
    "AttributeProto": (
        ("t", 5, "TensorProto"),
        ("g", 6, "bytes"),
        ("tensors", 10, "*TensorProto"),
        ("graphs", 11, "*bytes"),
        ("sparse_tensor", 22, "bytes"),
        ("sparse_tensors", 23, "*bytes"),
    ),
    "NodeProto": (("op_type", 4, "string"), ("domain", 7, "string"), ("attribute", 5, "*AttributeProto")),
    "TensorTypeProto": (("shape", 2, "bytes"),),
    "TypeProto": (("tensor_type", 1, "TensorTypeProto"),),
    "ValueInfoProto": (("name", 1, "string"), ("type", 2, "TypeProto")),
    "GraphProto": (
        ("node", 1, "*NodeProto"),
        ("initializer", 5, "*TensorProto"),
        ("input", 11, "*ValueInfoProto"),
        ("output", 12, "*ValueInfoProto"),
        ("value_info", 13, "*bytes"),
        ("sparse_initializer", 15, "*bytes"),
    ),
    "ModelProto": (("graph", 7, "GraphProto"), ("training_info", 20, "*bytes"), ("functions", 25, "*bytes")),
}
_SCALARS = {"string": 9, "bytes": 12, "int32": 5}
_MESSAGE, _OPTIONAL, _REPEATED = 11, 1, 3
_PACKAGE = "restoration_engine.onnx"
#: The names of ONNX's own operators' domain.
_STANDARD = ("", "ai.onnx")


def check_graph(content: bytes, where: object, *, weights: str, weights_bytes: int) -> None:
    """Check that a graph's only file is the bundle's weights, and that it is made of standard operators.

    Args:
        content: of the ONNX file.
        where: it is, for errors.
        weights: name of the bundle's weights file.
        weights_bytes: its size.
    Raises:
        BundleError: it is no ONNX graph, or holds what a bundle's graph may not hold.
    """
    graph = parse(content, where).graph
    for node in graph.node:
        if node.domain not in _STANDARD:
            raise _refused(where, "operators of ONNX's own", f"{node.op_type} of {node.domain}")
        for attribute in node.attribute:
            if attribute.g or attribute.graphs or attribute.sparse_tensor or attribute.sparse_tensors:
                raise _refused(where, "nodes without graphs or sparse tensors", node.op_type)
            if any(tensor.external_data or tensor.data_location for tensor in (attribute.t, *attribute.tensors)):
                raise _refused(where, "constants in the graph's own file", node.op_type)
    for tensor in graph.initializer:
        if tensor.external_data or tensor.data_location:
            _check_place({entry.key: entry.value for entry in tensor.external_data}, where, weights, weights_bytes)


def parse(content: bytes, where: object) -> Any:
    """Return an ONNX file's ModelProto with the fields that are declared here; the others are kept.

    Raises:
        BundleError: it is no ONNX file, or holds functions, training or sparse weights.
    """
    try:
        model = _types()["ModelProto"].FromString(content)
    except DecodeError as error:
        raise _refused(where, "an ONNX graph", str(error)) from error
    if not model.graph.node or model.functions or model.training_info or model.graph.sparse_initializer:
        raise _refused(where, "a graph without functions, training or sparse weights", "another kind of ONNX file")
    return model


def with_weights(content: bytes, folder: Path, where: object) -> bytes:
    """Return a graph that holds its weights itself.

    Args:
        content: of an ONNX file that `check_graph` has passed.
        folder: of the weights file.
        where: the graph is, for errors.
    Raises:
        BundleError: the weights cannot be read, or end too early.
    """
    model = parse(content, where)
    for tensor in model.graph.initializer:
        if not tensor.external_data:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(place["offset"]), int(place["length"])
        try:
            with (folder / place["location"]).open("rb") as file:
                file.seek(offset)
                tensor.raw_data = file.read(length)
        except OSError as error:
            raise BundleError(f"cannot be read: {error.strerror}", where=folder / place["location"]) from error
        if len(tensor.raw_data) != length:
            raise BundleError("ends before the weights do", where=folder / place["location"])
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return bytes(model.SerializeToString())


def with_free_shapes(content: bytes, where: object) -> bytes:
    """Return a graph whose inputs and outputs have no shapes, so that it takes images of any size.

    For graphs that were exported for one size though their operators take any. Weights that old exporters list among
    the inputs are no inputs any more, so that the library folds them.

    Args:
        content: of an ONNX file.
        where: it is, for errors.
    Raises:
        BundleError: as `parse`.
    """
    model = parse(content, where)
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    for index in reversed(range(len(graph.input))):
        if graph.input[index].name in weights:
            del graph.input[index]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.ClearField("shape")
    del graph.value_info[:]
    return bytes(model.SerializeToString())


def _check_place(place: dict[str, str], where: object, weights: str, weights_bytes: int) -> None:
    """Check where a tensor's data lies, by its external_data."""
    if place.get("location") != weights:
        raise _refused(where, f"weights in {weights}", place.get("location", "weights without a file"))
    numbers = [place.get(key, "") for key in ("offset", "length")]
    if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in numbers):
        raise _refused(where, "an offset and a length", f"{numbers[0]}, {numbers[1]}"[:100])
    if sum(map(int, numbers)) > weights_bytes:
        raise _refused(where, f"weights inside the {weights_bytes} bytes of {weights}", f"{numbers[0]} + {numbers[1]}")


def _refused(where: object, expected: str, found: str) -> BundleError:
    return BundleError(
        "a graph that no bundle of this engine holds",
        where=where,
        expected=expected,
        found=found,
        fix="use a bundle from somebody you trust, or build one: python export/build_engines.py",
    )


@cache
def _types() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="restoration_engine/onnx.proto", package=_PACKAGE, syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            label = _REPEATED if kind.startswith("*") else _OPTIONAL
            kind = kind.removeprefix("*")
            if kind in _SCALARS:
                message.field.add(name=field, number=number, label=label, type=_SCALARS[kind])
            else:
                message.field.add(
                    name=field, number=number, label=label, type=_MESSAGE, type_name=f".{_PACKAGE}.{kind}"
                )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }
