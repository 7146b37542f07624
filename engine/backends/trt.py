"""TensorRT and TensorRT-RTX: runs the bundle's plans on one of NVIDIA's GPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends.base import Runner
from engine.backends.buffers import BufferRunner
from engine.backends.trt_library import TrtLibrary, make_log
from engine.bundle import Bundle, Graph, Plan, plan_key
from engine.device import STREAMS, Buffer, Device, Stream, stream_of
from engine.errors import BackendError, BundleError
from engine.graphspec import GraphSpec, resolve
from engine.profiles import choose_profile

#: Relative L2 of a refitted plan against the merged weights in float32, by the graph's precision.
_PROBE_BOUNDS = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 4e-2}


class TrtBackend:
    """Opens the plans of bundles.

    Args:
        library: that runs them.
        device: the GPU; closed with the backend.
    """

    def __init__(self, library: TrtLibrary, device: Device) -> None:
        self.library = library
        self.device = device
        self._log = make_log(self.library.api)
        self._runtime = self.library.api.Runtime(self._log)
        self.streams = {name: device.stream() for name in STREAMS}
        self._arenas = {name: Arena(device, stream) for name, stream in self.streams.items()}

    def open(self, bundle: Bundle, graph: str) -> TrtRunner:
        """Return a runner for a graph's plan.

        Raises:
            BundleError: the bundle has no plan for this library and GPU.
            BackendError: the plan does not open.
        """
        entry = bundle.manifest.graphs[graph]
        self.device.activate()
        plan = check_plan(bundle, entry, self.library, self.device)
        file = bundle.file(plan.file)
        engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if engine is None:
            raise failed("open the plan", file, self._log, fix=_rebuild(bundle))
        place = stream_of(graph)
        runner = TrtRunner(
            engine,
            entry.spec,
            plan,
            self.library,
            self.device,
            self.streams[place],
            self._arenas[place],
            self._cache(bundle),
            self._log,
        )
        if plan.weightless:
            refit(engine, bundle, entry, self.library.api, self._log)
            check_probe(runner, bundle, entry)
        return runner

    def close(self) -> None:
        """Give the arenas and the device back."""
        for arena in self._arenas.values():
            arena.close()
        self.device.close()

    def _cache(self, bundle: Bundle) -> Path | None:
        """Return the file in which RTX keeps the kernels that it compiles for this GPU, beside the bundle."""
        if not self.library.is_rtx:
            return None
        capability = self.device.compute_capability
        return bundle.path.with_name(f".{bundle.path.name}.{self.library.version}.sm{capability}.kernels")


class Arena:
    """One piece of memory for the activations of all graphs of a stream: they run one after the other.

    It grows to what the largest needs, when that is opened. Recorded steps hold its address: a session
    opens all graphs of the main stream before it records a step, and drops recordings with their graphs.
    """

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device, self._stream = device, stream
        self._buffer: Buffer | None = None

    def at_least(self, nbytes: int) -> Buffer:
        """Return the memory, of at least this size.

        Raises:
            BackendError: the GPU has less.
        """
        if self._buffer is None or self._buffer.nbytes < nbytes:
            self.close()  # before there is a larger one, so that there are never two
            self._buffer = self._device.buffer((max(nbytes, 4) // 4 + 1,), "float32")
        return self._buffer

    def close(self) -> None:
        if self._buffer is not None:
            self._stream.synchronize()
            self._buffer.close()
            self._buffer = None


class TrtRunner(BufferRunner):
    """A plan on a GPU. For each size that it is run at it has a context, which a recording may hold."""

    can_be_recorded = True

    def __init__(
        self,
        engine: Any,
        spec: GraphSpec,
        plan: Plan,
        library: TrtLibrary,
        device: Device,
        stream: Stream,
        arena: Arena,
        cache: Path | None,
        log: Any,
    ) -> None:
        super().__init__(spec, device, stream)
        self._engine, self._plan, self._library = engine, plan, library
        self._arena, self._cache, self._log = arena, cache, log
        self._contexts: dict[tuple[int, ...], Any] = {}
        self._runtime_cache: Any = None
        self._config = self._make_config()
        arena.at_least(self.activation_bytes())

    def activation_bytes(self) -> int:
        """Return what the largest size needs, besides weights."""
        return int(self._engine.device_memory_size_v2)

    def enqueue_impl(
        self, stream: Stream, symbols: Mapping[str, int], inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> None:
        context = self._context(symbols, stream)
        bound = all(
            context.set_tensor_address(name, buffer.address) for name, buffer in (*inputs.items(), *outputs.items())
        )
        if not bound or not context.execute_async_v3(stream.handle):
            raise failed("run the graph", self.spec.name, self._log)

    def close(self) -> None:
        self._keep_cache()
        self._contexts.clear()
        self._config = None  # the engine's child, and might hold it
        self._engine = None

    def _context(self, symbols: Mapping[str, int], stream: Stream) -> Any:
        key = tuple(symbols.values())
        context = self._contexts.get(key)
        if context is None:
            index = choose_profile(self._plan.profiles, symbols, where=self.spec.name)
            context = self._engine.create_execution_context(self._config)
            if context is None:
                raise failed("make a context", self.spec.name, self._log)
            sized = context.set_optimization_profile_async(index, stream.handle) and all(
                context.set_input_shape(tensor.name, resolve(tensor.shape, symbols)) for tensor in self.spec.inputs
            )
            if not sized:
                raise failed("take the size", self.spec.name, self._log)
            self._contexts[key] = context
        needed = int(self._engine.device_memory_size_v2)
        memory = self._arena.at_least(needed)
        context.set_device_memory(memory.address, needed)
        return context

    def _make_config(self) -> Any:
        """Return how contexts are made: their activations in the arena, their kernels ready at once."""
        api = self._library.api
        ours = api.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._library.is_rtx:
            return ours
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(ours)
        # A recorded step would keep the slow kernels that stand in while better ones are compiled.
        config.dynamic_shapes_kernel_specialization_strategy = api.DynamicShapesKernelSpecializationStrategy.EAGER
        self._runtime_cache = config.create_runtime_cache()
        with contextlib.suppress(OSError):  # none yet
            self._runtime_cache.deserialize(self._cache_file().read_bytes())
        config.set_runtime_cache(self._runtime_cache)
        return config

    def _cache_file(self) -> Path:
        assert self._cache is not None
        return self._cache.with_name(f"{self._cache.name}.{self.spec.name}")

    def _keep_cache(self) -> None:
        """Write the kernels that were compiled, for the next start; not where the folder is not ours to write."""
        if self._runtime_cache is None:
            return
        file, kernels = self._cache_file(), self._runtime_cache.serialize()
        self._runtime_cache = None
        if kernels is None:
            return
        with contextlib.suppress(OSError):
            temporary = file.with_name(f"{file.name}.{os.getpid()}.part")
            temporary.write_bytes(bytes(kernels))
            temporary.replace(file)


def failed(action: str, where: object, log: Any, *, fix: str | None = None) -> BackendError:
    """Return the error of a library that could not do something, by what it logged last.

    Args:
        action: as in "open the plan".
        where: the graph or file.
        log: from `make_log`.
        fix: what helps, unless memory is what is missing.
    """
    reason, log.last = log.last or "no reason given", ""  # the next failure has its own
    if "memory" in reason.lower():
        fix = "try --vram-budget, a smaller --min-size or --upscale, or close other programs on the GPU"
    return BackendError(f"TensorRT could not {action}", where=where, found=reason, fix=fix)


def check_plan(bundle: Bundle, graph: Graph, library: TrtLibrary, device: Device) -> Plan:
    """Return the plan of a graph, if this library can run it on this GPU.

    Raises:
        BundleError: there is none, or it does not belong here; the command that makes one is named.
    """
    where = f"{bundle.path}: {graph.spec.name}"
    plan = graph.plan
    if plan is None:
        raise BundleError("the bundle holds no plans", where=where, fix=_rebuild(bundle, library.backend))
    if plan.library != library.label:
        raise BundleError(
            "the plan belongs to another library",
            where=where,
            expected=library.label,
            found=plan.library,
            fix=_rebuild(bundle, library.backend),
        )
    capability = device.compute_capability
    if capability not in plan.targets or plan.device not in (None, device.name):
        raise BundleError(
            "the plan is not for this GPU",
            where=where,
            expected=f"{device.name}, compute capability {capability}",
            found=f"{plan.device or 'any GPU'}, compute capability {', '.join(plan.targets)}",
            fix=_rebuild(bundle, library.backend, capability if library.is_rtx and not plan.weightless else None),
        )
    key = plan_key(
        graph.file,
        None if plan.weightless else bundle.manifest.weights,
        library=plan.library,
        targets=plan.targets,
        device=plan.device,
        profiles=plan.profiles,
        flags=plan.flags,
        precision=graph.spec.precision,
    )
    if key != plan.key:
        raise BundleError(
            "the plan was compiled from something else than this bundle holds",
            where=where,
            expected=f"key {key[:16]}…",
            found=f"key {plan.key[:16]}…",
            fix=_rebuild(bundle, library.backend),
        )
    return plan


def refit(engine: Any, bundle: Bundle, graph: Graph, api: Any, log: Any) -> None:
    """Fill a weightless plan with all weights of the bundle at once, never with a difference.

    Raises:
        BackendError: the library refuses, or a weight is missing.
    """
    refitter = api.Refitter(engine, log)
    parser = api.OnnxParserRefitter(refitter, log)
    done = parser.refit_from_file(str(bundle.file(graph.file)))
    missing = refitter.get_missing_weights() if done else ()
    if not done or missing or not refitter.refit_cuda_engine():
        raise BackendError(
            "the plan could not be filled with the bundle's weights",
            where=graph.spec.name,
            found=f"without {missing[0]} and {len(missing) - 1} others" if missing else log.last,
            fix=_rebuild(bundle),
        )


def check_probe(runner: Runner, bundle: Bundle, graph: Graph) -> None:
    """Run a refitted plan on the bundle's probe, before it may be used for anything else.

    Raises:
        BackendError: it disagrees with the merged weights.
    """
    assert graph.probe is not None, "a weightless plan comes with a probe"
    with np.load(bundle.file(graph.probe)) as probe:
        inputs = {tensor.name: probe[tensor.name] for tensor in graph.spec.inputs}
        expected = {tensor.name: probe[f"expected {tensor.name}"] for tensor in graph.spec.outputs}
    found = runner.infer(inputs)
    bound = _PROBE_BOUNDS[graph.spec.precision]
    for name, wanted in expected.items():
        error = float(np.linalg.norm(found[name].astype(np.float64) - wanted) / np.linalg.norm(wanted))
        if not error <= bound:
            raise BackendError(
                "the refitted plan disagrees with the bundle's weights",
                where=f"{graph.spec.name}.{name}",
                expected=f"relative L2 up to {bound:g}",
                found=f"{error:.3g}",
                fix=f"{_rebuild(bundle)}, without --weightless",
            )


def _rebuild(bundle: Bundle, backend: str | None = None, target: str | None = None) -> str:
    backend = backend or bundle.manifest.backend
    options = f" --compute-capability {target}" if target else ""
    return (
        f"build it again, with the options it was built with: python export/build_engines.py --backend {backend}"
        f"{options} --output {bundle.path}"
    )
