"""From an ONNX graph to plans: TensorRT's or TensorRT-RTX's compiled form of it.

Both libraries have one API; `engine.backends.trt_library` chooses. TensorRT-RTX compiles without a
GPU, for the compute capabilities that it is told; TensorRT compiles for the GPU at hand. Plans without
weights need that GPU from both: TensorRT-RTX 1.7 ends with a CUDA error where there is none. Precision is
what the graph's casts say: networks are strongly typed, and no builder flag touches it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.backends.trt_library import WEIGHT_STREAMING, TrtLibrary, make_log
from engine.bundle.files import File, describe_file
from engine.bundle.graphspec import DType, GraphSpec, parse_axis, resolve
from engine.bundle.manifest import Graph, TrtEngine, plan_key
from engine.bundle.profiles import Profile
from engine.bundle.storage import write_cache
from engine.errors import BuildError, UsageError
from export.trt.audit import HeavyLayer, audit, heavy_layers, inspect_engine

#: What TensorRT-RTX compiles for if nothing else is asked: its portable plan.
DEFAULT_TARGETS = ("8.6", "8.9", "12.0")
#: The one generation that TensorRT-RTX knows and that has no bfloat16.
WITHOUT_BF16 = "7.5"
#: Contexts work in memory that they are given, so that steps can be recorded; older libraries do so anyway.
_FLAGS = ("REQUIRE_USER_ALLOCATION",)
_WEIGHTLESS_FLAGS = ("REFIT", "STRIP_PLAN")


@dataclass(frozen=True)
class PlanOptions:
    """How graphs are compiled.

    Attributes:
        library: that compiles.
        targets: compute capabilities.
        device: the kind of GPU, where the library compiles for one alone.
        profiles: by graph.
        weight_stripped: leave the weights out; they are filled in when the plan is opened.
        weight_streaming: let weights lie on the host, where GPU memory is short.
        gpu: compute capability of the GPU at hand, None where there is none.
        timing_cache: where TensorRT keeps what it has measured, for the next build; None for
            TensorRT-RTX, which measures nothing.
    """

    library: TrtLibrary
    targets: tuple[str, ...]
    device: str | None
    profiles: dict[str, tuple[Profile, ...]]
    weight_stripped: bool
    weight_streaming: bool = False
    gpu: str | None = None
    timing_cache: Path | None = None

    @property
    def flags(self) -> tuple[str, ...]:
        known = dir(self.library.api.BuilderFlag)
        # Streaming allocates as it runs: TensorRT-RTX refuses the two together, and no such step can be recorded.
        memory = (WEIGHT_STREAMING,) if self.weight_streaming else _FLAGS
        wanted = (*memory, *(_WEIGHTLESS_FLAGS if self.weight_stripped else ()))
        return tuple(flag for flag in wanted if flag in known)

    def key(self, graph: Graph, weights: File) -> str:
        """Return the key of a graph's plan."""
        return plan_key(
            graph.file,
            None if self.weight_stripped else weights,
            library=self.library.label,
            targets=self.targets,
            device=self.device,
            profiles=self.profiles[graph.spec.name],
            flags=self.flags,
            precision=graph.spec.precision,
        )


def check_targets(library: TrtLibrary, targets: Sequence[str]) -> tuple[str, ...]:
    """Return compute capabilities such as "8.9" in order, none twice.

    Raises:
        UsageError: the library compiles for no such GPU.
    """
    known = known_targets(library)
    for target in targets:
        if target not in known:
            raise UsageError(
                "no such target", where="--compute-capability", expected=", ".join(known), found=target or "nothing"
            )
    return tuple(sorted(set(targets), key=known.index))


def known_targets(library: TrtLibrary) -> list[str]:
    """Return the compute capabilities that TensorRT-RTX can compile for, oldest first."""
    names = [name for name in dir(library.api.ComputeCapability) if name.startswith("SM")]
    return sorted((f"{name[2:-1]}.{name[-1]}" for name in names), key=lambda target: float(target))


def compile_plan(graph: Graph, folder: Path, weights: File, options: PlanOptions) -> TrtEngine:
    """Compile a graph.

    Args:
        graph: of the bundle in `folder`.
        folder: where the graph and the weights lie and the plan goes.
        weights: the bundle's weights file.
        options: what to compile for.
    Raises:
        BuildError: the library refuses the graph or fails, the graph is not as its spec says, or it
            is not in the precision that was asked for.
    """
    spec = graph.spec
    layers = _heavy_layers(options.library, spec, folder)
    found = audit(layers, spec)  # before minutes of compiling
    path = folder / f"{spec.name}.plan"
    with path.open("wb") as file:
        _Compiler(options.library, spec, folder).compile(options, file)
    if options.gpu in options.targets:
        found = audit(layers, spec, inspect_plan(options.library, path))
    return TrtEngine(
        file=describe_file(path),
        library=options.library.label,
        targets=options.targets,
        device=options.device,
        profiles=options.profiles[graph.spec.name],
        weight_stripped=options.weight_stripped,
        flags=options.flags,
        audit=found,
        key=options.key(graph, weights),
    )


def _heavy_layers(library: TrtLibrary, spec: GraphSpec, folder: Path) -> tuple[HeavyLayer, ...]:
    compiler = _Compiler(library, spec, folder)  # owns what the network points to
    return heavy_layers(library.api, compiler.network, spec)


def inspect_plan(library: TrtLibrary, file: Path) -> dict[str, str]:
    """Open a plan on the GPU at hand and ask it in which types it computes.

    Args:
        library: that compiled it.
        file: the plan.
    Returns:
        As `export.trt.audit.inspected_types`; {} if it does not open, for one because memory is short.
    """
    engine = library.api.Runtime(make_log(library.api)).deserialize_cuda_engine(file.read_bytes())
    return {} if engine is None else inspect_engine(library.api, engine)


class _Compiler:
    """A graph as the library has parsed it."""

    def __init__(self, library: TrtLibrary, spec: GraphSpec, folder: Path) -> None:
        self._api, self._spec = library.api, spec
        self._library = library
        self._log = make_log(self._api)
        self._builder = self._api.Builder(self._log)
        strongly_typed = 1 << int(self._api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self._builder.create_network(strongly_typed)
        self._parser = self._api.OnnxParser(self.network, self._log)  # owns what the network points to
        if not self._parser.parse_from_file(str(folder / f"{spec.name}.onnx")):
            raise self._refused(self._parser.get_error(0) if self._parser.num_errors else None)
        _check_network(self._api, self.network, spec)

    def compile(self, options: PlanOptions, file: BinaryIO) -> None:
        """Write the plan to a file.

        Raises:
            BuildError: the library fails.
            OSError: the file cannot be written.
        """
        config = self._builder.create_builder_config()
        if self._library.is_rtx:
            config.num_compute_capabilities = len(options.targets)
            for index, target in enumerate(options.targets):
                capability = getattr(self._api.ComputeCapability, f"SM{target.replace('.', '')}")
                config.set_compute_capability(capability, index)
        config.profiling_verbosity = self._api.ProfilingVerbosity.DETAILED  # layers keep the graph's names
        config.clear_flag(self._api.BuilderFlag.TF32)  # float32 means float32
        for flag in options.flags:
            config.set_flag(getattr(self._api.BuilderFlag, flag))
        for profile in options.profiles[self._spec.name]:
            config.add_optimization_profile(self._profile(profile))
        if options.timing_cache is not None:
            read_timing_cache(config, options.timing_cache)
        if not self._interruptible(config, file):
            raise BuildError(
                f"{self._library.label} could not compile the graph",
                where=self._spec.name,
                found=self._log.last or "no reason given",
                fix="see whether the disk and memory are full; otherwise please report it, with the library's version",
            )
        if options.timing_cache is not None:
            keep_timing_cache(config, options.timing_cache)

    def _profile(self, profile: Profile) -> Any:
        shapes = self._builder.create_optimization_profile()
        for tensor in self._spec.inputs:
            bounds = (resolve(tensor.shape, profile.at(place)) for place in ("min", "opt", "max"))
            shapes.set_shape(tensor.name, *bounds)
        return shapes

    def _interruptible(self, config: Any, file: BinaryIO) -> bool:
        """Compile in a thread, so that Ctrl-C is heard here and ends it at its next step."""
        stop = threading.Event()
        config.progress_monitor = _make_monitor(self._api, stop)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(self._write, config, file)
            try:
                return future.result()
            finally:
                stop.set()

    def _write(self, config: Any, file: BinaryIO) -> bool:
        """Compile part by part into a file, so that memory never holds a whole plan; returns whether it went well."""
        in_parts = getattr(self._builder, "build_serialized_network_to_stream", None)
        if in_parts is None:  # TensorRT 10.12
            plan = self._builder.build_serialized_network(self.network, config)
            return plan is not None and file.write(plan) > 0
        writer = _make_writer(self._api, file)
        done = in_parts(self.network, config, writer)
        if writer.error is not None:  # of which the library takes no notice
            raise writer.error
        return bool(done)

    def _refused(self, error: Any) -> BuildError:
        if error is None:
            return BuildError("the library cannot read the graph", where=self._spec.name, found=self._log.last)
        place = error.node_name() or error.node_operator() or "the graph itself"
        return BuildError(
            f"{self._library.label} refuses a node of the graph",
            where=f"{self._spec.name}: {place}",
            found=" ".join(error.desc().split()) or self._log.last,
            fix="build the bundle again from its checkpoints; if that does not help, please report it",
        )


def read_timing_cache(config: Any, file: Path) -> None:
    """Let a build use what earlier ones have measured; a cache of another GPU or version is left out."""
    blob = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(blob), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def keep_timing_cache(config: Any, file: Path) -> None:
    """Write what has been measured so far."""
    write_cache(file, bytes(config.get_timing_cache().serialize()))


def _check_network(api: Any, network: Any, spec: GraphSpec) -> None:
    """Compare what was parsed with the spec: names, types, and the axes that are fixed."""
    sides = (
        ("input", spec.inputs, [network.get_input(index) for index in range(network.num_inputs)]),
        ("output", spec.outputs, [network.get_output(index) for index in range(network.num_outputs)]),
    )
    for side, tensors, found in sides:
        names, wanted = [tensor.name for tensor in found], [tensor.name for tensor in tensors]
        if sorted(names) != sorted(wanted):
            raise BuildError(f"wrong {side}s in the graph", where=spec.name, expected=wanted, found=names)
        for parsed in found:
            tensor = spec.tensor(parsed.name)
            where = f"{spec.name}.{tensor.name}"
            if parsed.dtype != _dtype(api, tensor.dtype):
                raise BuildError(f"wrong dtype of an {side}", where=where, expected=tensor.dtype, found=parsed.dtype)
            fixed = [int(parse_axis(axis)[1]) if parse_axis(axis)[0] is None else -1 for axis in tensor.shape]
            shape = list(parsed.shape)
            # Of an output, the parser need not know every size that the spec fixes.
            fits = len(shape) == len(fixed) and all(
                want in (have, -1) or (side == "output" and have == -1) for want, have in zip(fixed, shape, strict=True)
            )
            if not fits:
                raise BuildError(f"wrong shape of an {side}", where=where, expected=list(tensor.shape), found=shape)


def _dtype(api: Any, dtype: DType) -> Any:
    names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}
    return getattr(api.DataType, names[dtype])


def _make_writer(api: Any, file: BinaryIO) -> Any:
    """Return what the library writes a plan to; the first error is kept in `error`."""

    class Writer(api.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.error = self.error or error
                return 0

    return Writer()


def _make_monitor(api: Any, stop: threading.Event) -> Any:
    """Return a progress monitor whose only task is to end a build that nobody waits for."""

    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            pass

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not stop.is_set()

    return Monitor()
