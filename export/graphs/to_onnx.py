"""From a torch module to the structure of a typed ONNX graph, without its weights.

A graph's structure depends on the architecture alone, so modules are traced on empty parameters and
the result is kept (`export.graphs.traces`): another checkpoint or LoRA of a known architecture needs no new trace.
Parameters stay what they are, under their own names and shapes; `pack` points them into the
bundle's weights file. Precision is in the graph: products run in the graph's type; norms, softmax
and what the sampler touches in float32, by explicit casts.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import opset18 as op
from onnxscript import optimizer

from engine.bundle.graphspec import DType, GraphSpec, TensorSpec, parse_axis
from export.checkpoint.architecture import OPSET
from export.graphs.builder import TRACE_SYMBOLS, GraphBuilder, call_arguments
from export.graphs.definitions import GraphDefinition
from export.graphs.traces import Provenance, Trace, cached_trace, made_key, trace_cache_dir, trace_key, write_trace

#: Results of folding larger than this stay computed at run time. Parameters are never folded.
_FOLD_BYTES = 1 << 20
_ONNX_TYPES: dict[DType, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
}
_TRACED_WITH = ("torch", "onnx", "onnxscript", "onnx-ir", "diffusers")


def trace(builder: GraphBuilder) -> Trace:
    """Return the graph's trace, from the cache of this computer or made anew.

    Args:
        builder: of the graph.
    Raises:
        OutputError: the cache cannot be written.
        torch.onnx.errors: the module does not export, which is a bug.
    """
    cached = find_cached(builder.definition)
    if cached is not None:
        return cached
    made = make_trace(builder)
    write_trace(made, _cache_file(builder.definition))
    return made


def find_cached(definition: GraphDefinition) -> Trace | None:
    """Return a graph's trace from the cache; None where it is not there, or is damaged."""
    return cached_trace(_cache_file(definition))


def make_trace(builder: GraphBuilder) -> Trace:
    """Trace a graph, whatever was traced before; arguments and errors as of `trace`."""
    provenance = Provenance(
        key=trace_key(builder.definition),
        graph=builder.spec.name,
        precision=builder.spec.precision,
        traced=datetime.date.today().isoformat(),
        traced_with=_versions(),
        parameters=builder.parameters,
    )
    return Trace(_trace(builder), provenance)


def local_key(definition: GraphDefinition) -> str:
    """Return the key of a trace that is made on this computer."""
    return made_key(definition, _versions())


def _cache_file(definition: GraphDefinition) -> Path:
    return trace_cache_dir() / f"{definition.name}-{local_key(definition)}.onnx.xz"


def _versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in _TRACED_WITH}


def _trace(builder: GraphBuilder) -> onnx.ModelProto:
    spec, module = builder.spec, builder.module()
    for name, parameter in list(module.named_parameters()):
        # Memory that is never touched: the trace looks at shapes only.
        _replace_parameter(module, name, torch.empty_like(parameter, device="cpu"))
    arguments = call_arguments(spec, builder.example(TRACE_SYMBOLS, 0))
    with torch.no_grad(), _quiet():
        program = torch.export.export(
            module, arguments, dynamic_shapes=call_arguments(spec, _dynamic_shapes(spec)), strict=False
        )
        exported = torch.onnx.export(
            program,
            arguments,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            verbose=False,
            custom_translation_table=_TRANSLATIONS,
        )
        assert exported is not None
        model = exported.model
        parameters = [name for name, _ in module.named_parameters()]
        _parameters_to_inputs(model.graph, parameters)
        # Constants are folded; parameters are inputs now, so they keep their names and shapes.
        optimizer.optimize_ir(
            model,
            onnx_shape_inference=False,
            input_size_limit=_FOLD_BYTES,
            output_size_limit=_FOLD_BYTES,
        )
        passes.ClearMetadataAndDocStringPass()(model)
    _name_tensors(model.graph, spec)
    return ir.to_proto(model)


def _dynamic_shapes(spec: GraphSpec) -> dict[str, dict[int, Any]]:
    """Return torch.export's dimensions for each input, from the spec's symbols.

    A symbol that must be a multiple of m is traced as m times another one, so that halves and
    quarters of it stay whole.
    """
    dims = {symbol: torch.export.Dim(f"{symbol}_", min=1, max=4096) for symbol in spec.symbols}

    def dimension(axis: str) -> Any:
        symbol, ratio = parse_axis(axis)
        assert symbol is not None
        factor = ratio * spec.multiples.get(symbol, 1)
        assert factor.denominator == 1, f"{spec.name}: {axis} may be broken by its multiple"
        return dims[symbol] if factor == 1 else int(factor) * dims[symbol]

    return {
        tensor.name: {place: dimension(axis) for place, axis in enumerate(tensor.shape) if isinstance(axis, str)}
        for tensor in spec.inputs
    }


def _replace_parameter(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    parameter = torch.nn.Parameter(value, requires_grad=False)
    setattr(module.get_submodule(owner), leaf, parameter)


def _parameters_to_inputs(graph: ir.Graph, names: Sequence[str]) -> None:
    for name in names:
        if name not in graph.initializers:
            continue  # read by nobody, as CLIP-L's last layer
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)


def _name_tensors(graph: ir.Graph, spec: GraphSpec) -> None:
    """Give inputs and outputs the names, types and shapes of the spec, and check what was traced."""
    outputs = list(graph.outputs)
    assert len(outputs) == len(spec.outputs), f"{spec.name}: {len(outputs)} outputs"
    pairs = [*zip(spec.inputs, graph.inputs, strict=False), *zip(spec.outputs, outputs, strict=True)]
    for tensor, value in pairs:
        assert value.dtype == _ONNX_TYPES[tensor.dtype], f"{spec.name}.{tensor.name} traced as {value.dtype}"
    for node in graph:  # intermediate shapes carry torch's symbols, which mean nothing to a reader
        for value in node.outputs:
            value.shape = None
    for tensor, value in pairs:
        _name_tensor(tensor, value)


def _name_tensor(tensor: TensorSpec, value: ir.Value) -> None:
    value.name = tensor.name
    value.shape = ir.Shape(tensor.shape)


# -- how torch's operators become ONNX --------------------------------------------------------------


def _in_float32(value: ir.Value) -> ir.Value:
    return value if value.dtype == ir.DataType.FLOAT else op.Cast(value, to=ir.DataType.FLOAT)


def _as_type(value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    return value if dtype == ir.DataType.FLOAT else op.Cast(value, to=dtype)


def _rank(value: ir.Value) -> int:
    assert value.shape is not None
    return len(value.shape)


def _axis(value: ir.Value, place: int) -> int:
    assert value.shape is not None
    size = value.shape[place]
    assert isinstance(size, int), f"axis {place} of {value.name} is dynamic"
    return size


def _linear(x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
    if _rank(x) == 2:
        return op.Gemm(x, weight, bias, transB=1)
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _gelu(x: ir.Value, approximate: str = "none") -> ir.Value:
    assert approximate == "none"

    def number(value: float) -> ir.Value:
        return op.CastLike(op.Constant(value_float=value), x)

    # In the order of operations that runtimes recognize and fuse.
    erf = op.Erf(op.Div(x, number(math.sqrt(2.0))))
    return op.Mul(op.Mul(x, op.Add(erf, number(1.0))), number(0.5))


def _attention(
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    attn_mask: ir.Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ir.Value:
    assert not any((is_causal, enable_gqa, dropout_p))
    factor = scale if scale is not None else _axis(query, 3) ** -0.5
    scaled = op.Mul(query, op.CastLike(op.Constant(value_float=factor), query))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    scores.dtype = query.dtype  # a fresh value does not know its type yet
    scores = _in_float32(scores)
    if attn_mask is not None:
        scores = op.Add(scores, _in_float32(attn_mask))
    return op.MatMul(_as_type(op.Softmax(scores, axis=-1), query.dtype), value)


def _group_norm(
    x: ir.Value,
    groups: int,
    weight: ir.Value,
    bias: ir.Value,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> ir.Value:
    # Opset 18's own GroupNormalization scales by group, not by channel, and was withdrawn.
    grouped = op.Reshape(_in_float32(x), op.Constant(value_ints=[0, groups, -1]))
    ones, zeros = op.Constant(value_floats=[1.0] * groups), op.Constant(value_floats=[0.0] * groups)
    normal = op.Reshape(op.InstanceNormalization(grouped, ones, zeros, epsilon=eps), op.Shape(x))
    axes = op.Constant(value_ints=list(range(1, _rank(x) - 1)))
    scaled = op.Mul(normal, op.Unsqueeze(_in_float32(weight), axes))
    return _as_type(op.Add(scaled, op.Unsqueeze(_in_float32(bias), axes)), x.dtype)


def _layer_norm(
    x: ir.Value,
    normalized_shape: Sequence[int],
    weight: ir.Value,
    bias: ir.Value,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> ir.Value:
    assert len(normalized_shape) == 1
    normal, _, _ = op.LayerNormalization(_in_float32(x), _in_float32(weight), _in_float32(bias), axis=-1, epsilon=eps)
    return _as_type(normal, x.dtype)


_aten = torch.ops.aten
_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    _aten.linear.default: _linear,
    _aten.gelu.default: _gelu,
    _aten.scaled_dot_product_attention.default: _attention,
    _aten.group_norm.default: _group_norm,
    _aten.layer_norm.default: _layer_norm,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's chatter (missing torchvision, deprecations of its own)."""
    names = [name for name in logging.root.manager.loggerDict if re.match(r"(torch|onnx)", name)]
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in names:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
