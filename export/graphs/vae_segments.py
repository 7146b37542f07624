"""The VAE's graphs cut into pieces, each exact on a few rows of an image; `engine.memory.vae_slices` runs them.

A convolution needs its neighbours' rows, a norm the whole image's mean and deviation, attention every cell. So a
graph is cut at each norm, whose statistics a piece is given, and around attention. Pieces are written as ONNX, without
a trace: the parameters' names and shapes say which blocks there are. Whether they add up to the graph is measured in
every build (`export.build.verify`).
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from engine.bundle.graphspec import PRECISION_DTYPES, Axis, DType, GraphSpec, TensorSpec
from engine.bundle.manifest import STATISTICS, Norm, Piece
from export.build.weights import Weight
from export.checkpoint.architecture import FINE_NORM_EPS, LATENT_SCALE, NORM_GROUPS, OPSET
from export.graphs.pack import ONNX_TYPES, pack

#: The IR version that goes with the opset.
_IR_VERSION = 8
#: A zip's files have dates; equal bundles shall be equal files.
_NO_DATE = (1980, 1, 1, 0, 0, 0)
_HALO_OF_3X3 = (1, 1)
#: Strided, over rows that are padded below: two of the next row's.
_HALO_OF_HALVING = (0, 2)


@dataclass(frozen=True, eq=False)
class PieceStructure:
    """A piece, and its graph without weights: inputs as in its spec, then one input per parameter."""

    piece: Piece
    structure: onnx.ModelProto


@dataclass(frozen=True)
class _Map:
    """What a piece takes or gives: f[B, channels, rows, columns]."""

    name: str
    channels: int
    dtype: DType


def cut(spec: GraphSpec, parameters: Mapping[str, tuple[int, ...]]) -> tuple[PieceStructure, ...]:
    """Return the pieces of a graph of the VAE, in the order in which they run; () for another graph.

    A graph in bf16 has none: no CPU provider runs it.

    Args:
        spec: of the graph.
        parameters: names and shapes of its network's parameters.
    """
    if spec.role != "vae" or spec.precision == "bf16":
        return ()
    cutter = _Cutter(spec, parameters)
    return cutter.decoder() if cutter.decodes else cutter.encoder()


def pieces_key(pieces: tuple[PieceStructure, ...]) -> str | None:
    """Return a hash of a graph's pieces, weights apart; None if it has none."""
    digest = hashlib.sha256()
    for each in pieces:
        digest.update(each.piece.model_dump_json().encode())
        digest.update(each.structure.SerializeToString(deterministic=True))
    return digest.hexdigest()[:32] if pieces else None


def write_pieces(pieces: tuple[PieceStructure, ...], file: Path, weights: Mapping[str, Weight]) -> None:
    """Write the pieces' graphs into one file, each under its spec's name.

    Args:
        pieces: from `cut`.
        file: a zip file, which is written.
        weights: where each tensor lies in the weights file beside it.
    Raises:
        BuildError: a parameter is not among the weights.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for each in pieces:
            model = pack(each.structure, each.piece.spec, weights)
            entry = zipfile.ZipInfo(each.piece.file_name, _NO_DATE)
            archive.writestr(entry, model.SerializeToString(deterministic=True), zipfile.ZIP_DEFLATED)


class _Cutter:
    """Goes through a graph's blocks by its parameters' names; the order is that of `export.graphs.nets.vae`."""

    def __init__(self, spec: GraphSpec, parameters: Mapping[str, tuple[int, ...]]) -> None:
        self._spec, self._parameters = spec, parameters
        self.decodes = spec.inputs[0].name == "z"
        own = any(
            name.startswith(f"{spec.name}.") for name in parameters
        )  # SUPIR's second encoder stands beside the VAE
        self._prefix = spec.name if own else spec.name.replace("_", ".", 1)
        self._dtype = PRECISION_DTYPES[spec.precision]
        self._pieces: list[PieceStructure] = []

    def encoder(self) -> tuple[PieceStructure, ...]:
        """Return the pieces from pixels to z."""
        x = self._conv_in()
        for level in self._numbered("down_blocks.{}.resnets.0.conv1.weight"):
            x = self._resnets(f"down_blocks.{level}", x)
            if self._has(sampler := f"down_blocks.{level}.downsamplers.0.conv"):
                x = self._halved(sampler, x)
        self._end(self._middle(x))
        return tuple(self._pieces)

    def decoder(self) -> tuple[PieceStructure, ...]:
        """Return the pieces from z to pixels."""
        x = self._middle(self._conv_in())
        for level in self._numbered("up_blocks.{}.resnets.0.conv1.weight"):
            x = self._resnets(f"up_blocks.{level}", x)
            if self._has(sampler := f"up_blocks.{level}.upsamplers.0.conv"):
                x = self._doubled(sampler, x)
        self._end(x)
        return tuple(self._pieces)

    def _conv_in(self) -> _Map:
        tensor = self._spec.inputs[0]
        assert isinstance(tensor.shape[1], int)
        source = _Map(tensor.name, tensor.shape[1], tensor.dtype)
        sketch = self._sketch(source)
        x = source.name
        if self.decodes:
            x = sketch.node("Div", x, sketch.number(LATENT_SCALE))
        x = sketch.cast(x, self._dtype)
        if self.decodes:
            x = sketch.conv(x, "vae.post_quant_conv")
        x = sketch.conv(x, f"{self._prefix}.conv_in")
        return self._add("conv_in", sketch, x, self._channels("conv_in"), halo=_HALO_OF_3X3)

    def _end(self, x: _Map) -> None:
        tensor = self._spec.outputs[0]
        sketch = self._sketch(x)
        y = sketch.conv(sketch.silu(sketch.norm(x, f"{self._prefix}.conv_norm_out")), f"{self._prefix}.conv_out")
        assert isinstance(tensor.shape[1], int)
        if self.decodes:
            y = sketch.cast(y, "float32")
        else:
            moments = sketch.conv(y, "vae.quant_conv")
            mean = sketch.node("Slice", moments, *map(sketch.whole_numbers, (0, tensor.shape[1], 1)))
            y = sketch.node("Mul", sketch.cast(mean, "float32"), sketch.number(LATENT_SCALE))
        self._add("conv_out", sketch, y, tensor.shape[1], halo=_HALO_OF_3X3, dtype="float32", name=tensor.name)

    def _resnets(self, level: str, x: _Map) -> _Map:
        for index in self._numbered(f"{level}.resnets.{{}}.conv1.weight"):
            x = self._resnet(f"{level}.resnets.{index}", x)
        return x

    def _resnet(self, block: str, x: _Map) -> _Map:
        name = f"{self._prefix}.{block}"
        first = self._sketch(x)
        middle = first.conv(first.silu(first.norm(x, f"{name}.norm1")), f"{name}.conv1")
        half = self._add(f"{block}.conv1", first, middle, self._channels(f"{block}.conv1"), halo=_HALO_OF_3X3)
        second = self._sketch(half, x)
        y = second.conv(second.silu(second.norm(half, f"{name}.norm2")), f"{name}.conv2")
        skip = second.conv(x.name, f"{name}.conv_shortcut") if self._has(f"{block}.conv_shortcut") else x.name
        return self._add(block, second, second.node("Add", skip, y), half.channels, halo=_HALO_OF_3X3)

    def _middle(self, x: _Map) -> _Map:
        x = self._resnet("mid_block.resnets.0", x)
        x = self._attention("mid_block.attentions.0", x)
        return self._resnet("mid_block.resnets.1", x)

    def _attention(self, block: str, x: _Map) -> _Map:
        name = f"{self._prefix}.{block}"

        def projected(part: str) -> _Map:
            sketch = self._sketch(x)
            tokens = sketch.to_tokens(sketch.norm(x, f"{name}.group_norm"))
            y = sketch.to_map(sketch.linear(tokens, f"{name}.to_{part}"))
            return self._add(f"{block}.to_{part}", sketch, y, x.channels)

        mixed = self._mixed(block, *map(projected, "qkv"))
        after = self._sketch(mixed, x)
        y = after.to_map(after.linear(after.to_tokens(mixed.name), f"{name}.to_out.0"))
        return self._add(block, after, after.node("Add", x.name, y), x.channels)

    def _mixed(self, block: str, query: _Map, key: _Map, value: _Map) -> _Map:
        """Add the attention of some cells' queries to all cells; cells are rows of one column."""
        sketch = self._sketch(query, key, value)
        # f[B, C, n], n cells each.
        q, k, v = (sketch.node("Reshape", each.name, sketch.whole_numbers(0, 0, -1)) for each in (query, key, value))
        scaled = sketch.node("Mul", q, sketch.node("CastLike", sketch.number(query.channels**-0.5), q))
        scores = sketch.node("MatMul", sketch.node("Transpose", scaled, perm=[0, 2, 1]), k)
        shares = sketch.node("Softmax", sketch.cast(scores, "float32"), axis=-1)
        found = sketch.node("MatMul", sketch.cast(shares, self._dtype), sketch.node("Transpose", v, perm=[0, 2, 1]))
        cells = sketch.node("Transpose", found, perm=[0, 2, 1])
        y = sketch.node("Unsqueeze", cells, sketch.whole_numbers(3))
        inputs = (
            self._tensor(query, "n", 1),
            self._tensor(key, "h", "w"),
            self._tensor(value, "h", "w"),
        )
        return self._add(
            f"{block}.mixed", sketch, y, query.channels, inputs=inputs, axes=("n", 1), whole=(key.name, value.name)
        )

    def _halved(self, block: str, x: _Map) -> _Map:
        sketch = self._sketch(x)
        padded = sketch.node("Pad", x.name, sketch.whole_numbers(0, 0, 0, 0, 0, 0, 1, 1))
        y = sketch.conv(padded, f"{self._prefix}.{block}", stride=2, padding=0)
        return self._add(block, sketch, y, self._channels(block), axes=("h/2", "w/2"), halo=_HALO_OF_HALVING)

    def _doubled(self, block: str, x: _Map) -> _Map:
        sketch = self._sketch(x)
        scales = sketch.numbers(1.0, 1.0, 2.0, 2.0)
        doubled = sketch.node(
            "Resize",
            x.name,
            "",
            scales,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        y = sketch.conv(doubled, f"{self._prefix}.{block}")
        return self._add(block, sketch, y, self._channels(block), axes=("2*h", "2*w"), halo=_HALO_OF_3X3)

    def _add(
        self,
        block: str,
        sketch: _Sketch,
        y: str,
        channels: int,
        *,
        halo: tuple[int, int] = (0, 0),
        axes: tuple[Axis, Axis] = ("h", "w"),
        dtype: DType | None = None,
        name: str | None = None,
        inputs: tuple[TensorSpec, ...] | None = None,
        whole: tuple[str, ...] = (),
    ) -> _Map:
        """Add a piece that ends in the value `y`; returns the map that it gives."""
        found = _Map(name or block, channels, dtype or self._dtype)
        result = self._tensor(found, *axes)
        inputs = inputs or tuple(self._tensor(each, "h", "w") for each in sketch.maps)
        if sketch.normed is not None:
            each = sketch.normed
            inputs += tuple(
                TensorSpec(name=statistic, dtype="float32", shape=("B", each.channels, 1, 1))
                for statistic in STATISTICS
            )
        spec = GraphSpec(
            name=f"{self._spec.name}.{block}",
            role=self._spec.role,
            precision=self._spec.precision,
            inputs=inputs,
            outputs=(result,),
        )
        norm = None if sketch.normed is None else Norm(map=sketch.normed.name, groups=NORM_GROUPS, eps=FINE_NORM_EPS)
        piece = Piece(spec=spec, norm=norm, halo=halo, whole=whole)
        self._pieces.append(PieceStructure(piece, sketch.model(spec, y)))
        return found

    def _sketch(self, *maps: _Map) -> _Sketch:
        return _Sketch(maps, self._parameters, self._dtype)

    def _tensor(self, each: _Map, *axes: Axis) -> TensorSpec:
        return TensorSpec(name=each.name, dtype=each.dtype, shape=("B", each.channels, *axes))

    def _has(self, block: str) -> bool:
        return f"{self._prefix}.{block}.weight" in self._parameters

    def _channels(self, block: str) -> int:
        return self._parameters[f"{self._prefix}.{block}.weight"][0]

    def _numbered(self, pattern: str) -> list[int]:
        return list(takewhile(lambda number: f"{self._prefix}.{pattern.format(number)}" in self._parameters, count()))


class _Sketch:
    """The nodes of a piece, in the order of the calls; every method returns the name of a value.

    Args:
        maps: that the piece takes.
        parameters: of the whole graph: names and shapes.
        dtype: of the weights, and of products.
    """

    def __init__(self, maps: tuple[_Map, ...], parameters: Mapping[str, tuple[int, ...]], dtype: DType) -> None:
        self.maps, self._parameters, self._dtype = maps, parameters, dtype
        self.normed: _Map | None = None
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[TensorProto] = []
        self._used: dict[str, None] = {}

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def cast(self, x: str, dtype: DType) -> str:
        return self.node("Cast", x, to=ONNX_TYPES[dtype])

    def conv(self, x: str, name: str, *, stride: int = 1, padding: int | None = None) -> str:
        kernel = self._parameters[f"{name}.weight"][2]
        pads = [kernel // 2 if padding is None else padding] * 4
        inputs = (x, self._parameter(f"{name}.weight"), self._parameter(f"{name}.bias"))
        return self.node("Conv", *inputs, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads)

    def linear(self, x: str, name: str) -> str:
        weight = self.node("Transpose", self._parameter(f"{name}.weight"), perm=[1, 0])
        return self.node("Add", self.node("MatMul", x, weight), self._parameter(f"{name}.bias"))

    def norm(self, x: _Map, name: str) -> str:
        """Normalize by the statistics that the piece is given; in float32, as the graph does."""
        assert self.normed is None
        self.normed = x
        axes = self.whole_numbers(1, 2)
        weight, bias = (
            self.node("Unsqueeze", self.cast(self._parameter(f"{name}.{part}"), "float32"), axes)
            for part in ("weight", "bias")
        )
        mean, inverse = STATISTICS
        centered = self.node("Sub", self.cast(x.name, "float32"), mean)
        scaled = self.node("Mul", self.node("Mul", centered, inverse), weight)
        return self.cast(self.node("Add", scaled, bias), self._dtype)

    def silu(self, x: str) -> str:
        return self.node("Mul", x, self.node("Sigmoid", x))

    def to_tokens(self, x: str) -> str:
        """Put the channels last, f[B, h, w, C]."""
        return self.node("Transpose", x, perm=[0, 2, 3, 1])

    def to_map(self, x: str) -> str:
        return self.node("Transpose", x, perm=[0, 3, 1, 2])

    def number(self, value: float) -> str:
        return self._constant(TensorProto.FLOAT, (), [value])

    def numbers(self, *values: float) -> str:
        return self._constant(TensorProto.FLOAT, (len(values),), values)

    def whole_numbers(self, *values: int) -> str:
        return self._constant(TensorProto.INT64, (len(values),), values)

    def model(self, spec: GraphSpec, y: str) -> onnx.ModelProto:
        """Return the graph that ends in the value `y`."""
        output = spec.outputs[0]
        nodes = [*self._nodes, helper.make_node("Identity", [y], [output.name])]
        parameters = [
            helper.make_tensor_value_info(name, ONNX_TYPES[self._dtype], self._parameters[name]) for name in self._used
        ]
        graph = helper.make_graph(
            nodes,
            spec.name,
            [*map(_value_info, spec.inputs), *parameters],
            [_value_info(output)],
            self._constants,
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(
            graph, ir_version=_IR_VERSION, opset_imports=[opset], producer_name="restoration-engine"
        )

    def _parameter(self, name: str) -> str:
        self._used[name] = None
        return name

    def _constant(self, kind: int, shape: tuple[int, ...], values: Any) -> str:
        assert math.prod(shape) == len(values)
        name = f"c{len(self._constants)}"
        self._constants.append(helper.make_tensor(name, kind, shape, values))
        return name


def _value_info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, ONNX_TYPES[tensor.dtype], tensor.shape)
