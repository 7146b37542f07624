"""ONNX Runtime: runs the bundle's ONNX graphs anywhere, here on the CPU."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnxruntime as ort

from engine.backends.base import Runner, keeps_activations
from engine.bundle.graphspec import GraphSpec, Precision
from engine.bundle.manifest import Bundle, VaeSegment
from engine.device.interface import Array
from engine.errors import BackendError, OutOfMemoryError, first_line
from engine.units import format_bytes

# From 1.32 on, its wheels for Linux report what they run to their makers, unless they are told not to.
ort.disable_telemetry_events()

#: Errors come as exceptions; the log would say them a second time, in colours.
_FATAL_ONLY = 4
#: The exporter has folded what can be folded. What is left are weights, turned over or widened, which the
#: CPU provider would hold twice while it folds them: 16.2 instead of 10.7 GiB for SDXL's UNet in fp16.
_WITHOUT = ("ConstantFolding",)
#: What ONNX Runtime, the C++ library and CUDA's libraries say where memory runs out.
_NO_MEMORY = re.compile(r"allocate|bad_alloc|out of memory|ALLOC_FAILED|OUT_OF_MEMORY")


@dataclass(frozen=True)
class OrtBackend:
    """ONNX Runtime's CPU provider.

    Attributes:
        threads: that one operator may use; 0 is one per core.
        as_written: run graphs without optimizing them. A graph in fp16 then holds no copy of its weights in float32:
            each is widened when it is used. SDXL's UNet takes 4.2 instead of 11.5 GiB, and opens in 1 s instead of
            22 s, but every step widens all weights again.
    """

    threads: int = 0
    as_written: bool = False

    @property
    def label(self) -> str:
        """The library and its version, for results' metadata."""
        return f"onnxruntime {ort.__version__}"

    def open(self, bundle: Bundle, graph: str) -> Runner:
        """Open a bundle's graph; see `Backend`."""
        spec = bundle.spec(graph)
        return self._open(bundle.read_graph(graph), bundle.path, spec)

    def close(self) -> None:
        """Sessions share an arena that is the process's; there is nothing to give back."""

    def open_file(self, file: Path, spec: GraphSpec) -> Runner:
        """Open a graph; weights are mapped from the file beside it.

        Raises:
            BackendError: it is not a graph that this provider can run.
        """
        return self._open(file, file.parent, spec)

    @contextmanager
    def open_segment(
        self, segment: VaeSegment, content: bytes, folder: Path, precision: Precision = "fp32"
    ) -> Iterator[Runner]:
        """Open one of a graph's segments for as long as it runs; see `SegmentBackend`."""
        runner = self._open(content, folder, segment.spec)
        try:
            yield runner
        finally:
            runner.close()

    def _open(self, graph: Path | bytes, folder: Path, spec: GraphSpec) -> OrtRunner:
        options = self._options(spec)
        session = open_session(graph, ["CPUExecutionProvider"], spec, folder, options, without=_WITHOUT)
        return OrtRunner(session, spec, keeps_memory=keeps_activations(spec))

    def _options(self, spec: GraphSpec) -> ort.SessionOptions:
        if spec.precision == "bf16":
            raise BackendError(
                "ONNX Runtime's CPU provider has no bf16 operators",
                where=spec.name,
                fix="run it with --backend openvino, or build the bundle with --precision fp32 or fp16",
            )
        _share_arena()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.use_env_allocators", "0" if self.as_written else "1")
        # Weights do not come from the arena, which would keep them when the graph is closed.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        # A pattern is one more block of the size of all activations, beside the arena's chunks.
        options.enable_mem_pattern = False
        # Threads that spin on after their graph has ended take the cores from the next graph.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.as_written:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
            # In the default order many weights are widened long before they are used.
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            # An arena would keep what it took for each of them.
            options.enable_cpu_mem_arena = False
        if self.threads > (os.cpu_count() or 1):
            # Threads that wait by spinning keep the others from the cores.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options


class OrtRunner(Runner):
    """A session of ONNX Runtime."""

    def __init__(self, session: ort.InferenceSession, spec: GraphSpec, *, keeps_memory: bool = True) -> None:
        super().__init__(spec)
        self.keeps_memory = keeps_memory
        self._session: ort.InferenceSession | None = session
        self._outputs = [tensor.name for tensor in spec.outputs]

    def infer_impl(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert self._session is not None, f"{self.spec.name} was closed"
        try:
            results = self._session.run(self._outputs, dict(inputs), None if self.keeps_memory else _give_back())
        except Exception as error:
            raise translated(error, self.spec.name) from error
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        self._session = None


def open_session(
    graph: Path | bytes,
    providers: Sequence[Any],
    spec: GraphSpec,
    folder: Path,
    options: ort.SessionOptions | None = None,
    *,
    without: Sequence[str] = (),
) -> ort.InferenceSession:
    """Return a session for a graph.

    Args:
        graph: the ONNX file, or its content.
        providers: as ONNX Runtime takes them.
        spec: of the graph.
        folder: where its weights lie.
        options: of the session; the log level and the folder are set here.
        without: ONNX Runtime's names of optimizations that are left out.
    Raises:
        BackendError: it is not a graph that the providers can run, or not the one that its spec is of.
        OutOfMemoryError: memory does not hold it.
    """
    options = options or ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    if isinstance(graph, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    where = graph if isinstance(graph, Path) else spec.name
    try:
        source = str(graph) if isinstance(graph, Path) else graph
        session = ort.InferenceSession(source, options, providers=list(providers), disabled_optimizers=list(without))
    except Exception as error:  # ONNX Runtime's own exceptions share no other base
        if _is_out_of_memory(error):
            fix = "close other programs, or use a bundle of smaller weights: --precision fp16"
            raise OutOfMemoryError(
                "out of memory while the graph is opened", where=where, found=first_line(error), fix=fix
            ) from error
        # It reads no weights outside of their folder, to which a download cache's links lead.
        is_link = "escapes model directory" in str(error)
        raise BackendError(
            "ONNX Runtime cannot open the graph",
            where=where,
            found=first_line(error),
            fix="give a copy of the bundle without links: cp -rL" if is_link else None,
        ) from error
    for expected, found in ((spec.inputs, session.get_inputs()), (spec.outputs, session.get_outputs())):
        names = {tensor.name for tensor in expected}, {value.name for value in found}
        if names[0] != names[1]:
            raise BackendError(
                "not the graph that its bundle describes",
                where=where,
                expected=sorted(names[0]),
                found=sorted(names[1]),
            )
    return session


@lru_cache(maxsize=1)
def _share_arena() -> None:
    """Let all sessions of the process take their activations from one arena.

    Graphs run one after the other, so together they need as much as the largest, not the sum.
    """
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    as_requested = 1  # instead of doubling the arena each time
    ort.create_and_register_allocator(place, ort.OrtArenaCfg({"arena_extend_strategy": as_requested}))


@lru_cache(maxsize=1)
def _give_back() -> ort.RunOptions:
    """Return what has a pass give the arena's memory back to the system at its end."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def translated(error: Exception, graph: str) -> Exception:
    """Return an error of ONNX Runtime in our words; others as they are."""
    if _is_out_of_memory(error):
        asked = re.search(r"buffer of size (\d+)", str(error))
        return OutOfMemoryError(
            "out of memory",
            where=graph,
            found=f"{format_bytes(int(asked[1]))} more were asked for" if asked else first_line(error),
            fix="restore at a smaller size: a lower --upscale or --min-size",
        )
    if type(error).__module__.startswith("onnxruntime"):
        return BackendError("ONNX Runtime failed", where=graph, found=first_line(error))
    return error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None
