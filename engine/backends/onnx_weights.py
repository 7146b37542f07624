"""A graph's external weights moved into the graph, byte by byte, without the onnx package.

OpenVINO finds external weights beside a graph's file only, and the pieces of the VAE's graphs lie in a zip file. So
a piece is read into memory, and its weights, which are small, with it. The numbers are those of onnx.proto:
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

#: Fields of ModelProto, GraphProto, TensorProto and StringStringEntryProto.
_GRAPH, _INITIALIZER = 7, 5
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14
_KEY, _VALUE = 1, 2
#: Wire types of protobuf.
_VARINT, _EIGHT_BYTES, _WITH_LENGTH, _FOUR_BYTES = 0, 1, 2, 5


def with_weights(model: bytes, folder: Path) -> bytes:
    """Return an ONNX model that holds its weights itself.

    Args:
        model: the content of an ONNX file.
        folder: that the locations of its external weights are relative to.
    Raises:
        ValueError: it is not an ONNX model, or its weights' file is shorter than they are.
        OSError: the weights' file cannot be read.
    """
    return b"".join(
        _field(_GRAPH, _graph(value, folder)) if number == _GRAPH and value is not None else raw
        for number, value, raw in _fields(model)
    )


def _graph(graph: bytes, folder: Path) -> bytes:
    return b"".join(
        _field(_INITIALIZER, _tensor(value, folder)) if number == _INITIALIZER and value is not None else raw
        for number, value, raw in _fields(graph)
    )


def _tensor(tensor: bytes, folder: Path) -> bytes:
    """Return a TensorProto with its external data, if it has any, as its raw data."""
    kept: list[bytes] = []
    place: dict[str, str] = {}
    for number, value, raw in _fields(tensor):
        if number == _EXTERNAL_DATA and value is not None:
            entry = {key: text.decode() for key, text, _ in _fields(value) if text is not None}
            place[entry[_KEY]] = entry[_VALUE]
        elif number != _DATA_LOCATION:
            kept.append(raw)
    if not place:
        return tensor
    length = int(place["length"])
    with (folder / place["location"]).open("rb") as file:
        file.seek(int(place.get("offset", 0)))
        data = file.read(length)
    if len(data) != length:
        raise ValueError(f"{place['location']} ends before the weights do")
    return b"".join([*kept, _field(_RAW_DATA, data)])


def _fields(message: bytes) -> Iterator[tuple[int, bytes | None, bytes]]:
    """Yield a message's fields: number, content if it is one with a length, and all of its bytes."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        kind = tag & 7
        value = None
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind == _EIGHT_BYTES:
            at += 8
        elif kind == _FOUR_BYTES:
            at += 4
        elif kind == _WITH_LENGTH:
            length, at = _varint(message, at)
            value = message[at : at + length]
            at += length
        else:
            raise ValueError("not an ONNX model")
        if at > len(message):
            raise ValueError("not an ONNX model, or cut short")
        yield tag >> 3, value, message[start:at]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place behind it."""
    number = shift = 0
    while at < len(message):
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise ValueError("not an ONNX model, or cut short")


def _field(number: int, content: bytes) -> bytes:
    return _as_varint(number << 3 | _WITH_LENGTH) + _as_varint(len(content)) + content


def _as_varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
