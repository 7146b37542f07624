"""Parity of a packed graph with its torch module, written into the bundle.

The module runs in float32 on the weights of the bundle; so what is measured is the graph and its
arithmetic, at a size other than the one that was traced.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from safetensors import safe_open
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from engine.backends.ort import OrtBackend
from engine.bundle import Piece, Verification
from engine.errors import BuildError
from engine.graphspec import GraphSpec, Precision, TensorSpec
from engine.pieces import ByRows, run_pieces
from export.graphs import GraphBuilder, call_arguments
from export.weights import WEIGHTS

#: Unlike TRACE_SYMBOLS in every axis, so that a size frozen by the trace cannot pass.
VERIFY_SYMBOLS = {"B": 1, "h": 24, "w": 8, "k": 1}
#: Relative L2. A wrong GroupNorm eps costs 6e-5, a tanh GELU 4e-5 (reference/README.md). A graph in
#: bf16 has its constants rounded, such as GELU's root of 2, which shows even when it is widened.
_BOUNDS: dict[Precision, float] = {"fp32": 2e-5, "fp16": 1e-2, "bf16": 1e-3}
_METHODS: dict[Precision, str] = {
    "fp32": "onnxruntime (CPU) against torch, both float32",
    "fp16": "onnxruntime (CPU), float16 graph, against torch in float32",
    # ONNX Runtime's CPU provider has no bf16 operators.
    "bf16": "onnxruntime (CPU), the graph widened to float32, against torch in float32",
}


def verify(
    builder: GraphBuilder, file: Path, probe: Path | None = None, pieces: tuple[Sequence[Piece], Path] | None = None
) -> Verification:
    """Compare a packed graph with its module.

    Args:
        builder: of the graph.
        file: the ONNX file; the weights file lies beside it.
        probe: where inputs and torch's outputs are kept, for plans that get their weights later.
        pieces: of the graph, and their file: they are compared as well.
    Raises:
        BuildError: an output disagrees; the graph and the output are named.
    """
    spec = builder.spec
    inputs = builder.example(VERIFY_SYMBOLS, 1)
    expected = _run_torch(builder, inputs, file.parent / WEIGHTS)
    found = _run_onnx(spec, file, inputs)
    bound = _BOUNDS[spec.precision]
    errors = {name: relative_l2(found[name], expected[name]) for name in expected}
    if pieces is not None:
        name = spec.outputs[0].name
        in_pieces = _run_pieces(*pieces, inputs[spec.inputs[0].name].numpy())
        errors[f"{name} in pieces"] = relative_l2(in_pieces, expected[name])
    for name, error in errors.items():
        if not error <= bound:
            raise BuildError(
                "the exported graph disagrees with its torch module",
                where=f"{spec.name}.{name}",
                expected=f"relative L2 up to {bound:g}",
                found=f"{error:.3g}",
                fix="this is a bug, or an unsupported version of torch or onnxruntime: please report it",
            )
    if probe is not None:
        arrays: dict[str, Any] = {name: value.numpy() for name, value in inputs.items()}
        arrays |= {f"expected {name}": value for name, value in expected.items()}
        np.savez(probe, **arrays)
    symbols = {symbol: VERIFY_SYMBOLS[symbol] for symbol in spec.symbols}
    return Verification(method=_METHODS[spec.precision], symbols=symbols, relative_l2=errors, bound=bound)


def relative_l2(found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """Return |found - expected| / |expected|, in float64; NaN if either holds one or expected is 0."""
    wide = np.asarray(expected, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.linalg.norm(np.asarray(found, np.float64) - wide) / np.linalg.norm(wide))


def load_module(builder: GraphBuilder, weights: Path) -> torch.nn.Module:
    """Return a graph's torch module in float32, with the bundle's weights.

    Args:
        builder: of the graph, at any precision.
        weights: the bundle's weights file.
    """
    module = builder.module()
    with safe_open(weights, framework="pt") as file:
        state = {name: file.get_tensor(name).to(torch.float32) for name, _ in module.named_parameters()}
    module.load_state_dict(state, assign=True)
    return module


class Streamed(TorchFunctionMode):
    """Lets a module on the meta device run in float32: each weight is in memory only while it is used.

    SDXL's UNet is 10 GB in float32, its largest weight 59 MB. A weight that is used in another way than as an
    argument of a torch function meets the meta device, which torch refuses to mix with numbers.

    Args:
        module: from `GraphBuilder.module`; it is not changed.
        file: the bundle's weights file, opened.
    """

    def __init__(self, module: torch.nn.Module, file: Any) -> None:
        super().__init__()
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._file = file

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ != "__get__":  # shapes and the like need no values
            args, kwargs = tree_map_only(torch.nn.Parameter, self._read, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _read(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        stored: torch.Tensor = self._file.get_tensor(self._names[parameter])
        return stored.to(torch.float32)


def _run_torch(builder: GraphBuilder, inputs: dict[str, torch.Tensor], weights: Path) -> dict[str, NDArray[np.float32]]:
    module = builder.module().float()
    wide = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.inference_mode(), safe_open(weights, framework="pt") as file, Streamed(module, file):
        outputs = module(*call_arguments(builder.spec, wide))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {tensor.name: value.numpy() for tensor, value in zip(builder.spec.outputs, outputs, strict=True)}


def _run_onnx(spec: GraphSpec, file: Path, inputs: dict[str, torch.Tensor]) -> dict[str, NDArray[np.floating]]:
    if spec.precision != "bf16":
        runner = OrtBackend().open_file(file, spec)
        return runner.infer({name: value.numpy() for name, value in inputs.items()})
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        widened = Path(folder) / file.name
        onnx.save(widen(onnx.load(file)), widened, save_as_external_data=True, location="widened.data")
        runner = OrtBackend().open_file(widened, _widened_spec(spec))
        wide = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
        return runner.infer({name: value.numpy() for name, value in wide.items()})


def _run_pieces(pieces: Sequence[Piece], file: Path, image: NDArray[np.float32]) -> NDArray[np.floating]:
    """Run a graph's pieces in bands of two rows, or of two cells where attention is."""
    return run_pieces(pieces, image, partial(OrtBackend().open_piece, file), ByRows(band_bytes=1))


def widen(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn every bfloat16 of a graph, weights included, into float32, in place.

    It keeps the graph's structure and its rounded weights, and gives up its rounding in between.
    """
    graph = model.graph
    for index, tensor in enumerate(graph.initializer):
        if tensor.data_type == TensorProto.BFLOAT16:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            graph.initializer[index].CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            elif attribute.HasField("t") and attribute.t.data_type == TensorProto.BFLOAT16:
                wide = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))
    return model


def _widened_spec(spec: GraphSpec) -> GraphSpec:
    def widened(tensor: TensorSpec) -> TensorSpec:
        wide = "float32" if tensor.dtype == "bfloat16" else tensor.dtype
        return tensor.model_copy(update={"dtype": wide})

    return spec.model_copy(
        update={
            "precision": "fp32",
            "inputs": tuple(map(widened, spec.inputs)),
            "outputs": tuple(map(widened, spec.outputs)),
        }
    )
