"""ONNX Runtime on a device's buffers: NVIDIA's GPUs without TensorRT."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort

from engine.backends.buffers import BufferRunner, SelfAllocatingBackend
from engine.backends.ort import open_session, translated
from engine.bundle.graphspec import GraphSpec
from engine.bundle.manifest import Bundle
from engine.device.interface import Buffer, Device, Stream
from engine.errors import BackendError
from engine.recipe import stream_of

_CUDA = "CUDAExecutionProvider"
#: Both packages own one folder, so that each damages the other's files: none may be there before, or stay.
INSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'"

#: Operators that do the work of a graph. Others may stay on the CPU: ONNX Runtime computes shapes there on purpose, so
#: that its own refusal of the CPU (`session.disable_cpu_ep_fallback`) would refuse every graph that takes any size.
_WORK = frozenset(
    (
        "Conv",
        "FusedConv",
        "NhwcConv",
        "NhwcFusedConv",
        "MatMul",
        "FusedMatMul",
        "Gemm",
        "Attention",
        "MultiHeadAttention",
        "Softmax",
        "Resize",
        "InstanceNormalization",
        "GroupNorm",
        "LayerNormalization",
        "SkipLayerNormalization",
    )
)


def check_provider() -> None:
    """Find out whether this ONNX Runtime can use NVIDIA's GPUs at all.

    Raises:
        BackendError: it has no CUDA provider.
    """
    if _CUDA not in ort.get_available_providers():
        raise BackendError(
            "--device cuda: this ONNX Runtime has no CUDA provider",
            found=f"onnxruntime {ort.__version__} with {', '.join(ort.get_available_providers())}",
            fix=f"{INSTALL}; without it, --device cpu",
        )


@cache
def load_cuda_libraries() -> str:
    """Load CUDA and cuDNN from the packages that `onnxruntime-gpu[cuda,cudnn]` brings, once.

    Returns:
        What ONNX Runtime says of libraries that it has not found there: others may be the system's. It
        prints that, and standard output is the report's.
    """
    said = io.StringIO()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(said):
            ort.preload_dlls()
    return " ".join(said.getvalue().split())


class OrtCudaBackend(SelfAllocatingBackend):
    """ONNX Runtime's CUDA provider, on the streams of the loop.

    Args:
        device: the GPU; closed with the backend.
        index: its number, as ONNX Runtime counts.
    """

    def __init__(self, device: Device, index: int) -> None:
        super().__init__(device)
        self._index = index

    @property
    def label(self) -> str:
        """The library and its version, for results' metadata."""
        return f"onnxruntime {ort.__version__}"

    def open(self, bundle: Bundle, graph: str) -> OrtBufferRunner:
        """Open a bundle's graph on the GPU; see `Backend`."""
        entry = bundle.manifest.graphs[graph]
        if any(tensor.dtype == "bfloat16" for tensor in (*entry.spec.inputs, *entry.spec.outputs)):
            raise BackendError(
                "the engine exchanges no bf16 with graphs",
                where=graph,
                fix="build the bundle with --precision fp16, or fp32",
            )
        stream = self.streams[stream_of(graph)]
        options = {
            "device_id": str(self._index),
            "user_compute_stream": str(stream.handle),
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",  # float32 means float32
        }
        missing = load_cuda_libraries()
        recording = ort.SessionOptions()
        recording.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers = [(_CUDA, options), "CPUExecutionProvider"]
        session = open_session(bundle.read_graph(graph), providers, entry.spec, bundle.path, recording)
        if _CUDA not in session.get_providers():  # ONNX Runtime falls back without a word
            raise BackendError(
                "ONNX Runtime's CUDA provider does not load",
                where=graph,
                found=missing[:300] or None,
                fix=f"{INSTALL}, which brings the CUDA and cuDNN that it asks for; without them, --device cpu",
            )
        check_placement(session, graph)
        return OrtBufferRunner(session, entry.spec, self.device, stream, "cuda", self._index)


def check_placement(session: Any, graph: str) -> None:
    """Find out whether ONNX Runtime left a graph's work on the CPU, which it does without a word.

    Args:
        session: opened with "session.record_ep_graph_assignment_info"; versions that do not record are believed.
        graph: its name.
    Raises:
        BackendError: operators that do the work run on the CPU.
    """
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    placed = ask() if ask is not None else ()
    nodes = [node for part in placed if part.ep_name == "CPUExecutionProvider" for node in part.get_nodes()]
    left = [node for node in nodes if node.op_type in _WORK]
    if left:
        raise BackendError(
            "ONNX Runtime left a part of the graph on the CPU",
            where=graph,
            expected="all of its work on the GPU",
            found=f"{len(left)} of {', '.join(sorted({node.op_type for node in left}))}, such as {left[0].name!r}",
            fix="use the newest onnxruntime-gpu, build the bundle with --precision fp16, or restore with --device cpu",
        )


class OrtBufferRunner(BufferRunner):
    """A session whose inputs and outputs are bound to buffers.

    Args:
        session: that runs on `stream`.
        spec: of the graph.
        device, stream: that the buffers are on.
        kind, index: of the device, as ONNX Runtime calls it.
    """

    def __init__(
        self, session: ort.InferenceSession, spec: GraphSpec, device: Device, stream: Stream, kind: str, index: int
    ) -> None:
        super().__init__(spec, device, stream)
        self._session: ort.InferenceSession | None = session
        self._kind, self._index = kind, index
        self._options = ort.RunOptions()
        # The stream goes on; whoever needs the result waits for an event.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def enqueue_impl(
        self, stream: Stream, symbols: Mapping[str, int], inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> None:
        assert self._session is not None, f"{self.spec.name} was closed"
        assert stream is self._stream, f"{self.spec.name} is bound to one stream"
        binding = self._session.io_binding()
        for bind, buffers in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, buffer in buffers.items():
                bind(name, self._kind, self._index, np.dtype(buffer.dtype).type, buffer.shape, buffer.address)
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:
            raise translated(error, self.spec.name) from error

    def close(self) -> None:
        self._session = None
