"""The ways of computing a graph: in which precision, through which library, as runners of Polygraphy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper
from polygraphy import config as polygraphy_config
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnx import BytesFromOnnx
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata

from benchmarks.compare.slices import Form
from engine.backends import make_backend
from engine.backends.ov_library import OV_TYPES, choose_compute, open_library
from engine.backends.trt_library import PLAN_BACKENDS
from engine.bundle.graphspec import Precision
from engine.errors import BackendError, UsageError

#: From a slice's model and a number of CPU threads (0: one per core), a runner that is not activated yet.
MakeRunner = Callable[[onnx.ModelProto, int], BaseRunner]


@dataclass(frozen=True)
class Way:
    """A way of computing a graph.

    Attributes:
        name: on the command line.
        summary: what it is, for a person.
        form: of the models that it runs.
        make_runner: makes the runner of a model.
        check: finds out whether it runs here; raises BackendError or UsageError.
        precision: that the graph is taken in; None is the bundle's own.
        computes_in: the type that it rounds to whatever the graph says, None where the graph's types hold.
    """

    name: str
    summary: str
    form: Form
    make_runner: MakeRunner
    check: Callable[[], None]
    precision: Precision | None = None
    computes_in: Precision | None = None

    def precision_of(self, bundle_precision: Precision) -> Precision:
        """Return the precision that a graph is taken in, by that of the bundle's own."""
        return self.precision or bundle_precision

    def check_graph(self, precision: Precision) -> None:
        """Find out whether it runs graphs of a precision, and its library is there.

        Raises:
            BackendError: it does not, or is missing.
        """
        if self.name == "onnxruntime" and precision == "bf16":
            raise BackendError(
                "ONNX Runtime's CPU provider has no bf16 operators",
                where=self.name,
                fix="compare with onnxruntime-bf16, which computes in float32 and rounds every layer to bf16",
            )
        self.check()


# -- ONNX Runtime -----------------------------------------------------------------------------------


def _onnxruntime(provider: str, *, as_written: bool) -> MakeRunner:
    def make(model: onnx.ModelProto, threads: int) -> BaseRunner:
        return OnnxrtRunner(partial(_session, model, provider, as_written, threads))

    return make


def _session(model: onnx.ModelProto, provider: str, as_written: bool, threads: int) -> onnxruntime.InferenceSession:
    """Return a session; Polygraphy's own loader takes no options, and its threads would spin while they wait."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors come as exceptions
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(BytesFromOnnx(model)(), options, providers=[provider])


def _always() -> None:
    """Find nothing missing: ONNX Runtime's CPU provider is what the engine itself needs."""


def _check_cuda() -> None:
    make_backend("onnxruntime", device="cuda").close()


# -- OpenVINO ---------------------------------------------------------------------------------------


class OpenVinoRunner(BaseRunner):  # type: ignore[misc]
    """Runs a model through OpenVINO on the CPU; Polygraphy has no runner of its own for it.

    Args:
        model: of ONNX.
        compute: the type that it computes in.
        threads: of the CPU; 0 is one per core.
    """

    def __init__(self, model: onnx.ModelProto, compute: Precision, threads: int = 0) -> None:
        super().__init__(prefix="openvino-runner")
        self._model, self._compute, self._threads = model, compute, threads
        self._request: Any = None

    def activate_impl(self) -> None:
        core = open_library("cpu").core
        hints = {"INFERENCE_PRECISION_HINT": OV_TYPES[self._compute], "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
        if self._threads:
            hints["INFERENCE_NUM_THREADS"] = str(self._threads)
        read = core.read_model(BytesFromOnnx(self._model)())
        self._request = core.compile_model(read, "CPU", hints).create_infer_request()

    def get_input_metadata_impl(self) -> Any:
        metadata = TensorMetadata()
        for value in self._model.graph.input:
            kind = value.type.tensor_type
            shape = [axis.dim_value for axis in kind.shape.dim]
            metadata.add(value.name, helper.tensor_dtype_to_np_dtype(kind.elem_type), shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        started = time.perf_counter()
        results = self._request.infer(dict(feed_dict), share_inputs=True, share_outputs=False)
        self.inference_time = time.perf_counter() - started
        return {value.name: results[value.name] for value in self._model.graph.output}

    def deactivate_impl(self) -> None:
        self._request = None


def _openvino(compute: Precision) -> MakeRunner:
    return lambda model, threads: OpenVinoRunner(model, compute, threads)


def _check_openvino(compute: Precision) -> Callable[[], None]:
    def check() -> None:
        library = open_library("cpu")
        if compute == "bf16":
            choose_compute(library, "bf16")

    return check


# -- TensorRT ---------------------------------------------------------------------------------------


def _tensorrt(name: str) -> MakeRunner:
    def make(model: onnx.ModelProto, threads: int) -> BaseRunner:
        polygraphy_config.USE_TENSORRT_RTX = name == "tensorrt-rtx"  # before the library is imported
        from polygraphy.backend.trt import EngineFromNetwork, NetworkFromOnnxBytes, TrtRunner

        network = NetworkFromOnnxBytes(BytesFromOnnx(model), strongly_typed=True)
        return TrtRunner(EngineFromNetwork(network))

    return make


def _check_tensorrt(name: str) -> Callable[[], None]:
    return lambda: make_backend(name).close()


_LIST = (
    Way("onnxruntime", "ONNX Runtime on the CPU, the graph as the bundle has it", "typed",
        _onnxruntime("CPUExecutionProvider", as_written=False), _always),
    Way("onnxruntime-fp32", "the graph in fp32, by ONNX Runtime on the CPU", "rounded",
        _onnxruntime("CPUExecutionProvider", as_written=False), _always, "fp32"),
    Way("onnxruntime-fp16", "the graph in fp16: computed in fp32 by ONNX Runtime on the CPU, every layer rounded",
        "rounded", _onnxruntime("CPUExecutionProvider", as_written=True), _always, "fp16"),
    Way("onnxruntime-bf16", "the graph in bf16: computed in fp32 by ONNX Runtime on the CPU, every layer rounded",
        "rounded", _onnxruntime("CPUExecutionProvider", as_written=True), _always, "bf16"),
    Way("onnxruntime-cuda", "ONNX Runtime on an NVIDIA GPU, the graph as the bundle has it", "typed",
        _onnxruntime("CUDAExecutionProvider", as_written=False), _check_cuda),
    Way("openvino", "OpenVINO on the CPU, computing in fp32", "typed", _openvino("fp32"), _check_openvino("fp32")),
    Way("openvino-bf16", "OpenVINO on the CPU, computing in bf16", "typed", _openvino("bf16"), _check_openvino("bf16"),
        computes_in="bf16"),
    *(
        Way(name, f"{title} on the GPU at hand, the graph as the bundle has it", "typed", _tensorrt(name),
            _check_tensorrt(name))
        for name, title in zip(PLAN_BACKENDS, ("TensorRT", "TensorRT-RTX"), strict=True)
    ),
)  # fmt: skip
#: By name.
WAYS = {way.name: way for way in _LIST}


def check_pair(reference: Way, examined: Way) -> None:
    """Check that two ways go into one process.

    Raises:
        UsageError: Polygraphy drives either TensorRT or TensorRT-RTX.
    """
    if {reference.name, examined.name} == set(PLAN_BACKENDS):
        raise UsageError(
            "one process runs either TensorRT or TensorRT-RTX",
            where=f"{reference.name}, {examined.name}",
            fix="compare each of them with onnxruntime-fp32",
        )
