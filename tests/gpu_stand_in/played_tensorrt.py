"""TensorRT-RTX and TensorRT: the real builder's API, and a runtime that is ONNX Runtime on the driver's memory.

Callers are held to what the documentation says. A plan holds what it was compiled for. `tensorrt` is TensorRT-RTX's
API without what RTX alone has.
"""

from __future__ import annotations

import json
import os
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnxruntime as ort
import tensorrt_rtx_bindings as real

from engine.bundle.graphspec import GraphSpec, resolve
from export.build.trial import widen
from gpu_stand_in import driver
from gpu_stand_in.work import CALLS, DeviceMemory, Owner, array_at, broken, is_inside

_NO_MEMORY = "Error Code 1: Cuda Runtime (out of memory)"
#: What a plan takes for activations: so much, and more for each cell of its input.
_FIXED_BYTES, _CELL_BYTES = 1 << 20, 4096
_STREAMING_BYTES = 3 << 18
_MAGIC = b"a plan of the stand-in\n"


def compile_plan(compiler: Any, options: Any, file: BinaryIO) -> None:
    """Write a plan, in the place of `export.trt.compile._Compiler.compile`.

    It names the graph's file rather than hold the weights: bundles of tests would be twice as large.
    """
    spec, partial = compiler._spec, compiler._folder
    name = f"{spec.name}.onnx"
    profiles = [
        {name: (bounds.min, bounds.opt, bounds.max) for name, bounds in profile.ranges.items()}
        for profile in options.profiles[spec.name]
    ]
    head = {
        "spec": spec.model_dump(mode="json"),
        "graph": str(partial.parent / partial.name.removeprefix(".").removesuffix(".building") / name),
        "weights": _weights_bytes(partial / name),
        "profiles": profiles,
        "flags": options.flags,
    }
    file.write(_MAGIC + json.dumps(head).encode())


def _weights_bytes(file: Path) -> int:
    initializers = onnx.load(file, load_external_data=False).graph.initializer
    places = ({entry.key: entry.value for entry in each.external_data} for each in initializers)
    return sum(int(place.get("length", 0)) for place in places)


@cache
def _session(file: Path, precision: str) -> ort.InferenceSession:
    """Return a session of a graph, in float32 where it is in bf16, which ONNX Runtime's CPU provider does not have."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if precision != "bf16":
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    with tempfile.TemporaryDirectory() as folder:
        return ort.InferenceSession(str(widen(file, Path(folder))), options, providers=["CPUExecutionProvider"])


class RuntimeCache:
    def __init__(self) -> None:
        self.kernels: list[str] = []

    def deserialize(self, blob: bytes) -> bool:
        CALLS.append(("cache read", len(blob)))
        self.kernels = json.loads(bytes(blob))
        return True

    def serialize(self) -> memoryview:
        CALLS.append(("cache written", len(self.kernels)))
        return memoryview(json.dumps(self.kernels).encode())


class RuntimeConfig:
    """How contexts are made; RTX's defaults."""

    dynamic_shapes_kernel_specialization_strategy = real.DynamicShapesKernelSpecializationStrategy.LAZY
    cuda_graph_strategy = real.CudaGraphStrategy.DISABLED

    def __init__(self) -> None:
        self.strategy = real.ExecutionContextAllocationStrategy.STATIC
        self.cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine:
    """An opened plan, with its weights on the device."""

    def __init__(self, head: dict[str, Any], log: Any) -> None:
        self.spec = GraphSpec.model_validate(head["spec"])
        self.profiles = head["profiles"]
        self.log = log
        self.contexts = 0
        self._graph = Path(head["graph"])
        self._weights = DeviceMemory()
        self.is_filled = "STRIP_PLAN" not in head["flags"]
        self._weights_bytes = head["weights"]
        self.total = self._weights_bytes if self.is_filled else 0
        self.streams_weights = "WEIGHT_STREAMING" in head["flags"]
        self.streamable_weights_size = self.total * 9 // 10 if self.streams_weights else 0
        self._budget = self.streamable_weights_size

    @property
    def name(self) -> str:
        return self.spec.name

    def load_weights(self, nbytes: int) -> bool:
        """Have weights on the device."""
        if self._weights.resize(nbytes):
            self.log.log(real.ILogger.ERROR, _NO_MEMORY)
            return False
        return True

    def fill(self, path: str) -> None:
        """Take the weights of an ONNX file."""
        self._graph, self.total, self.is_filled = Path(path), self._weights_bytes, True

    def __del__(self) -> None:
        CALLS.append(("gone", self.name))
        self._weights.close()

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return _STREAMING_BYTES if self.streams_weights else 0

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        assert type(value) is int, type(value)
        if self.contexts:
            broken(f"{self.name}: a budget for weights while there are contexts")
        if not self.streams_weights:
            broken(f"{self.name}: a budget for weights that cannot be streamed")
        if self.load_weights(self.total - self.streamable_weights_size + value):
            self._budget = value

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return self.activation_bytes({name: bounds[2] for name, bounds in self.profiles[index].items()})

    def activation_bytes(self, symbols: dict[str, int]) -> int:
        cells = int(np.prod([value for name, value in symbols.items() if name != "k"]))
        streamed = self._budget < self.streamable_weights_size
        return _FIXED_BYTES + _CELL_BYTES * cells + (_STREAMING_BYTES if streamed else 0)

    def create_execution_context(
        self, strategy: Any = real.ExecutionContextAllocationStrategy.STATIC
    ) -> Context | None:
        if strategy != real.ExecutionContextAllocationStrategy.USER_MANAGED:
            broken(f"{self.name}: contexts with memory of their own ({strategy})")
        return self._context(Context)

    def _context(self, kind: type[Context], *arguments: Any) -> Context | None:
        CALLS.append(("context", self.name))
        if self.total and not self._weights.is_there and not self.load_weights(self.total):
            return None
        return kind(self, *arguments)

    @property
    def session(self) -> ort.InferenceSession:
        return _session(self._graph, self.spec.precision)


class RtxEngine(Engine):
    """What TensorRT-RTX adds: a configuration for contexts."""

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig) -> Context | None:  # type: ignore[override]
        if config.strategy != real.ExecutionContextAllocationStrategy.USER_MANAGED:
            broken(f"{self.name}: contexts with memory of their own ({config.strategy})")
        return self._context(RtxContext, config)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.contexts += 1
        self._owner = Owner()
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._is_warm = False
        self._needs: int | None = None

    def __del__(self) -> None:
        self.engine.contexts -= 1
        self._owner.close()

    def _rule(self, text: str) -> bool:
        self.engine.log.log(real.ILogger.ERROR, f"Error Code 3: API Usage Error ({text})")
        return broken(f"{self.engine.name}: {text}")

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert type(index) is int, index
        assert type(stream) is int, stream
        if driver.is_capturing(stream):
            return self._rule("a profile is chosen while the stream captures")
        if not 0 <= index < len(self.engine.profiles):
            return self._rule(f"no profile {index}")
        CALLS.append(("profile", self.engine.name, index))
        self._profile, self._shapes, self._is_warm, self._needs = index, {}, False, None
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert all(type(size) is int for size in shape), shape
        if self._profile is None:
            return self._rule("a shape before a profile")
        for axis, size in zip(self.engine.spec.tensor(name).shape, shape, strict=True):
            low, _, high = self.engine.profiles[self._profile].get(axis, (0, 0, 1 << 62))
            if not low <= size <= high:
                return self._rule(f"{name}: {size} is not in the profile")
        self._shapes[name] = tuple(shape)
        self._is_warm, self._needs = False, None
        return True

    def _is_sized(self) -> bool:
        return set(self._shapes) == {tensor.name for tensor in self.engine.spec.inputs}

    def update_device_memory_size_for_shapes(self) -> int:
        if not self._is_sized():
            self._rule("memory for shapes that are not all set")
        self._needs = self.engine.activation_bytes(self.engine.spec.sizes_of(self._shapes))
        return self._needs

    def set_device_memory(self, memory: int, size: int) -> None:
        assert type(memory) is int, memory
        assert type(size) is int, size
        assert self._profile is not None
        needs = self._needs or self.engine.get_device_memory_size_for_profile_v2(self._profile)
        if memory % 256:
            self._rule("memory for activations is not aligned to 256 bytes")
        if size < needs:
            self._rule(f"{size} bytes for activations of {needs}")
        if not is_inside(memory, size):
            self._rule("memory for activations that is not the device's")
        self._memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert type(memory) is int, memory
        self.engine.spec.tensor(name)
        if memory % 256:
            return self._rule(f"{name} is not aligned to 256 bytes")
        self._addresses[name] = memory
        return True

    def _compile_kernels(self, symbols: dict[str, int]) -> None:
        """Have the kernels of a size; TensorRT's plans hold them."""

    def execute_async_v3(self, stream: int) -> bool:
        assert type(stream) is int, stream
        engine, spec = self.engine, self.engine.spec
        if not engine.is_filled:
            return self._rule("it has no weights yet")
        tensors = (*spec.inputs, *spec.outputs)
        if self._memory is None or not self._is_sized() or set(self._addresses) != {tensor.name for tensor in tensors}:
            return self._rule("it is not set up")
        captures = driver.is_capturing(stream)
        if captures and not self._is_warm:
            return self._rule("the first run at a size allocates, and is captured")
        if captures and engine.streams_weights:
            return self._rule("streaming weights allocates, and is captured")
        symbols = spec.sizes_of(self._shapes)
        CALLS.append(("capture" if captures else "run", engine.name, tuple(symbols.values())))
        self._compile_kernels(symbols)
        places = {t.name: (self._addresses[t.name], resolve(t.shape, symbols), t.dtype) for t in tensors}
        for name, (address, shape, dtype) in places.items():
            if not is_inside(address, int(np.prod(shape)) * np.dtype(dtype).itemsize):
                return self._rule(f"{name} runs over its memory")
        memory, session = self._memory, engine.session

        def work() -> None:
            array_at(memory[0], (memory[1],), "uint8")[...] = 0xFF
            given = {tensor.name: array_at(*places[tensor.name]) for tensor in spec.inputs}
            names = [tensor.name for tensor in spec.outputs]
            for name, found in zip(names, session.run(names, given), strict=True):
                array_at(*places[name])[...] = found

        status = self._owner.enqueue(stream, work)
        if status:
            engine.log.log(real.ILogger.ERROR, f"Error Code 1: Cuda Runtime (error {status})")
            return False
        self._is_warm = True
        return True


class RtxContext(Context):
    """What TensorRT-RTX adds: kernels for a size, compiled when it first runs, and kept in the cache."""

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        super().__init__(engine)
        self._config = config

    def is_stream_capturable(self, stream: int) -> bool:
        lazy = real.DynamicShapesKernelSpecializationStrategy.LAZY
        return self._config.dynamic_shapes_kernel_specialization_strategy != lazy

    def _compile_kernels(self, symbols: dict[str, int]) -> None:
        cache, kernel = self._config.cache, f"{self.engine.name} {sorted(symbols.items())}"
        if cache is not None and kernel not in cache.kernels:
            cache.kernels.append(kernel)


class Runtime:
    _engine: type[Engine] = Engine

    def __init__(self, log: Any) -> None:
        self._log = log

    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        with memoryview(plan) as view:
            content = bytes(view)
        if not content.startswith(_MAGIC):
            self._log.log(real.ILogger.ERROR, "Error Code 1: Serialization (the plan is damaged)")
            return None
        engine = self._engine(json.loads(content[len(_MAGIC) :]), self._log)
        CALLS.append(("deserialize", engine.name))
        # Weights that may be streamed are loaded once it is known how many.
        return engine if engine.streams_weights or engine.load_weights(engine.total) else None


class RtxRuntime(Runtime):
    _engine = RtxEngine


class Refitter:
    def __init__(self, engine: Engine, log: Any) -> None:
        self.engine, self.path = engine, ""

    def get_missing_weights(self) -> list[str]:
        return [] if self.path else ["every one"]

    def refit_cuda_engine(self) -> bool:
        CALLS.append(("refit", self.engine.name))
        self.engine.fill(self.path)
        return self.engine.load_weights(self.engine.total)


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, log: Any) -> None:
        self._refitter = refitter

    def refit_from_file(self, path: str) -> bool:
        assert type(path) is str, path
        self._refitter.path = path if os.path.exists(path) else ""
        return bool(self._refitter.path)


def make_modules() -> dict[str, ModuleType]:
    """Return `tensorrt_rtx` and `tensorrt`, for `sys.modules`."""
    modules = {}
    for name, runtime, version in (
        ("tensorrt_rtx", RtxRuntime, real.__version__),
        ("tensorrt", Runtime, "11.0.0"),
    ):
        module = ModuleType(name, __doc__)
        module.__dict__.update({key: value for key, value in vars(real).items() if not key.startswith("__")})
        module.__dict__.update(
            Runtime=runtime, Refitter=Refitter, OnnxParserRefitter=OnnxParserRefitter, __version__=version
        )
        modules[name] = module
    return modules
