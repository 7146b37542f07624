"""A packed graph's run on a small input, with the bundle's own weights: what a build checks without torch.

Every parameter must lie in the weights file as the graph expects it, ONNX Runtime must open the graph, its outputs must
be finite, and the VAE's segments must agree with the whole. Agreement with torch is `export.build.verify`'s.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from engine.backends.base import Runner
from engine.backends.ort import OrtBackend
from engine.bundle.files import read_archived
from engine.bundle.graphspec import GraphSpec, Precision, TensorSpec
from engine.bundle.manifest import VaeSegment
from engine.bundle.verification import Trial, relative_l2
from engine.errors import BuildError
from engine.memory.vae_slices import SlicedVae, run_slices
from export.build.weights import WEIGHTS
from export.checkpoint.mapped import StoredTensor
from export.checkpoint.safetensors_file import read_safetensors
from export.graphs.definitions import GraphDefinition, example_inputs

#: Unlike the sizes of a trace in every axis, so that a size frozen by the trace cannot pass.
TRIAL_SYMBOLS = {"B": 1, "h": 24, "w": 8, "k": 1}
#: Relative L2. A wrong GroupNorm eps costs 6e-5, a tanh GELU 4e-5 (reference/README.md). A graph in
#: bf16 has its constants rounded, such as GELU's root of 2, which shows even when it is widened.
BOUNDS: dict[Precision, float] = {"fp32": 2e-5, "fp16": 1e-2, "bf16": 1e-3}
#: ONNX Runtime's CPU provider has no bf16 operators.
METHODS: dict[Precision, str] = {
    "fp32": "onnxruntime (CPU)",
    "fp16": "onnxruntime (CPU), float16 graph",
    "bf16": "onnxruntime (CPU), the graph widened to float32",
}


@dataclass(frozen=True)
class TrialRun:
    """A graph's trial, and the arrays of it.

    Attributes:
        trial: for the manifest.
        inputs: by name, in the spec's dtypes.
        outputs: by name; float32 where the graph was widened.
    """

    trial: Trial
    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]


def try_graph(
    definition: GraphDefinition, file: Path, segments: tuple[Sequence[VaeSegment], Path] | None = None
) -> TrialRun:
    """Run a packed graph once, and its segments.

    Args:
        definition: of the graph.
        file: the ONNX file; the weights file lies beside it.
        segments: of the graph, and their file.
    Raises:
        BuildError: a parameter is not in the weights file, an output is not finite, or the segments disagree.
        BackendError: ONNX Runtime does not open the graph.
    """
    spec = definition.spec
    _check_parameters(spec, file)
    inputs = example_inputs(definition, TRIAL_SYMBOLS, 1)
    outputs = _run(spec, file, inputs)
    for name, value in outputs.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise BuildError(
                "the graph gives values that are not finite",
                where=f"{spec.name}.{name}",
                fix="build with --precision bf16 or fp32; if it is in fp32, the checkpoint is damaged",
            )
    in_slices = None
    if segments is not None:
        whole = outputs[spec.outputs[0].name]
        in_slices = relative_l2(_run_in_slices(*segments, inputs[spec.inputs[0].name]), whole)
        if not in_slices <= BOUNDS[spec.precision]:
            raise BuildError(
                "the graph in slices disagrees with the whole",
                where=spec.name,
                expected=f"relative L2 up to {BOUNDS[spec.precision]:g}",
                found=f"{in_slices:.3g}",
                fix="this is a bug, or an unsupported version of onnxruntime: please report it",
            )
    trial = Trial(
        method=METHODS[spec.precision],
        symbols=trial_symbols(spec),
        in_slices=in_slices,
        bound=None if in_slices is None else BOUNDS[spec.precision],
    )
    return TrialRun(trial, inputs, outputs)


def trial_symbols(spec: GraphSpec) -> dict[str, int]:
    """Return the size at which a graph is tried."""
    return {symbol: TRIAL_SYMBOLS[symbol] for symbol in spec.symbols}


def _check_parameters(spec: GraphSpec, file: Path) -> None:
    """Compare every parameter of a graph with the header of the weights file beside it."""
    stored = read_safetensors(file.parent / WEIGHTS)
    for parameter in onnx.load(file, load_external_data=False).graph.initializer:
        if parameter.data_location != TensorProto.EXTERNAL:
            continue  # a constant of the graph's own
        found = stored.get(parameter.name)
        if found is None or _expected(parameter) != _found(found):
            raise BuildError(
                "a parameter of the graph is not in the weights file",
                where=f"{spec.name}: {parameter.name}",
                expected=_expected(parameter),
                found=None if found is None else _found(found),
                fix="this is a bug: please report it",
            )


def _expected(parameter: TensorProto) -> tuple[str, tuple[int, ...], int]:
    """Return dtype, shape and place of a parameter, as the graph has them."""
    place = {entry.key: entry.value for entry in parameter.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(parameter.data_type).name
    return dtype, tuple(parameter.dims), int(place["offset"])


def _found(tensor: StoredTensor) -> tuple[str, tuple[int, ...], int]:
    return tensor.dtype.name, tensor.shape, tensor.offset


def _run(spec: GraphSpec, file: Path, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    if spec.precision != "bf16":
        # One run is not worth a copy of all weights in float32.
        return OrtBackend(as_written=spec.precision == "fp16").open_file(file, spec).infer(inputs)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        wide = {name: _widened_array(value) for name, value in inputs.items()}
        return OrtBackend().open_file(widen(file, Path(folder)), _widened_spec(spec)).infer(wide)


def _is_bf16(value: NDArray[Any]) -> bool:
    return value.dtype.name == "bfloat16"


def _widened_array(value: NDArray[Any]) -> NDArray[Any]:
    return value.astype(np.float32) if _is_bf16(value) else value


def _run_in_slices(segments: Sequence[VaeSegment], file: Path, image: NDArray[Any]) -> NDArray[np.floating]:
    """Run a graph in slices, several of every map: one in the middle has neighbours on both sides."""
    backend = OrtBackend()

    @contextmanager
    def open_segment(segment: VaeSegment) -> Iterator[Runner]:
        content = read_archived(file, segment.file_name)
        if segment.spec.precision != "bf16":
            with backend.open_segment(segment, content, file.parent) as runner:
                yield runner
            return
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            widened = widen_graph(onnx.load_from_string(content), file.parent, Path(folder) / segment.file_name)
            yield backend.open_file(widened, _widened_spec(segment.spec))

    return run_slices(segments, _widened_array(image), open_segment, SlicedVae(min_slices=4))


# -- bf16 as float32 --------------------------------------------------------------------------------


def widen(file: Path, folder: Path) -> Path:
    """Write a graph with every bfloat16, weights included, turned into float32; returns its file.

    Args:
        file: the ONNX file; the weights file lies beside it.
        folder: where the widened graph and its weights go.
    """
    return widen_graph(onnx.load(file, load_external_data=False), file.parent, folder / file.name)


def widen_graph(model: onnx.ModelProto, weights_folder: Path, file: Path) -> Path:
    """Write a graph with every bfloat16, weights included, turned into float32; returns its file.

    It keeps the graph's structure and its rounded weights, and gives up its rounding in between. Weights are
    widened one after the other, so it takes no memory.

    Args:
        model: the graph, which is changed.
        weights_folder: where its weights file lies.
        file: the widened graph, which gets a weights file beside it.
    """
    graph = model.graph
    with (file.parent / WEIGHTS).open("wb") as data:
        for index, tensor in enumerate(graph.initializer):
            wide = _widened_array(numpy_helper.to_array(tensor, str(weights_folder)))
            if tensor.data_location != TensorProto.EXTERNAL:
                graph.initializer[index].CopyFrom(numpy_helper.from_array(wide, tensor.name))
                continue
            start = data.tell()
            data.write(wide.tobytes())
            tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(wide.dtype)
            del tensor.external_data[:]
            for key, number in (("location", WEIGHTS), ("offset", start), ("length", wide.nbytes)):
                tensor.external_data.add(key=key, value=str(number))
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            elif attribute.HasField("t") and attribute.t.data_type == TensorProto.BFLOAT16:
                constant = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(constant, attribute.t.name))
    onnx.save(model, file)
    return file


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
