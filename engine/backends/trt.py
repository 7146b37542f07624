"""TensorRT and TensorRT-RTX: runs the bundle's plans on one of NVIDIA's GPUs."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.backends.buffers import BufferRunner
from engine.backends.trt_library import WEIGHT_STREAMING, TrtLibrary, make_log
from engine.backends.trt_memory import MemoryNotes, PlanMemory, size_key
from engine.backends.trt_plan import check_parity_sample, check_plan, failed, parity_sample_size, rebuild, refit
from engine.bundle.graphspec import GraphSpec, resolve
from engine.bundle.manifest import Bundle, Graph, TrtEngine
from engine.bundle.profiles import choose_profile
from engine.bundle.storage import bundle_cache_dir, plain_name, write_cache
from engine.device.interface import STREAMS, Buffer, Device, Stream
from engine.errors import close_all
from engine.memory.residency import Activations
from engine.recipe import stream_of
from engine.units import format_memory

#: Sizes whose contexts are kept: a step has two, guided and not, and a folder of photos a few shapes.
_CONTEXTS_KEPT = 4


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
        self._on_device: dict[str, int] = {}
        self._notes: dict[Path, MemoryNotes] = {}
        self._checked: set[tuple[str, str]] = set()

    @property
    def label(self) -> str:
        """The library and its version, for results' metadata."""
        return self.library.label

    def open(self, bundle: Bundle, graph: str) -> TrtRunner:
        """Return a runner for a graph's plan.

        A plan without weights is refitted whenever it is opened, so also each time that it comes back
        under `--vram-budget`; what the weights make of it is checked the first time.

        Raises:
            BundleError: the bundle has no plan for this library and GPU.
            BackendError: the plan does not open.
            OutOfMemoryError: memory does not hold it.
        """
        entry = bundle.manifest.graphs[graph]
        self.device.activate()
        plan = check_plan(bundle, entry, self.library, self.device)
        file = bundle.file(plan.file)
        self._log.last = ""  # of something else, which was no failure
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self._runtime.deserialize_cuda_engine(content)  # without a second copy in the host's memory
        if engine is None:
            raise failed("open the plan", file, self._log, fix=rebuild(bundle))
        # All that a plan says of its memory, before a part of its weights is kept on the host.
        memory = plan_memory(engine, plan)
        keys = {other.plan.key for other in bundle.manifest.graphs.values() if other.plan is not None}
        notes = self._notes_of(bundle)
        notes.keep(plan, memory, keys)
        if graph in self._on_device:
            stream_weights(engine, self._on_device[graph], entry, self._log)
        place = stream_of(graph)
        runner = TrtRunner(
            engine,
            entry.spec,
            plan,
            self.library,
            self.device,
            self.streams[place],
            self._arenas[place],
            self._cached(bundle, f"{graph}.kernels"),
            self._log,
            memory,
            lambda asked: notes.keep(plan, asked, keys),
        )
        if plan.weight_stripped:
            refit(engine, bundle, entry, self.library.api, self._log)
            once = (bundle.digest, graph)
            if once not in self._checked:
                check_parity_sample(runner, bundle, entry)
                self._checked.add(once)
        return runner

    def known_activations(self, bundle: Bundle, graph: str, sizes: Sequence[Mapping[str, int]]) -> Activations | None:
        """Return what a plan needs beside its weights, None if it has to be opened for that.

        At a size that no opened plan was asked about, that is what its profile's largest needs.

        Raises:
            BundleError: as `open`.
            BackendError: the plan does not take one of the sizes.
        """
        plan = check_plan(bundle, bundle.manifest.graphs[graph], self.library, self.device)
        note = self._notes_of(bundle).get(plan)
        return None if note is None else note.at(plan, sizes, where=graph)

    def sizes_at_opening(self, bundle: Bundle, graph: str) -> Sequence[Mapping[str, int]]:
        """Return the size of the run that checks a refitted plan; see `DeviceBackend`."""
        entry = bundle.manifest.graphs[graph]
        return () if entry.parity_sample is None else (parity_sample_size(bundle, entry),)

    def can_stream_weights(self, bundle: Bundle, graph: str) -> bool:
        """Tell whether a graph's plan was built with `--weight-streaming`."""
        plan = bundle.manifest.graphs[graph].plan
        return plan is not None and WEIGHT_STREAMING in plan.flags

    def limit_weights(self, on_device: Mapping[str, int]) -> None:
        """See `DeviceBackend`."""
        self._on_device = dict(on_device)

    def reserve(self, stream: str, nbytes: int, *, keep_larger: bool = False) -> None:
        """Set the size of a stream's arena, or see that it has so much; see `DeviceBackend`."""
        if keep_larger:
            self._arenas[stream].at_least(nbytes)
        else:
            self._arenas[stream].resize(nbytes)

    def close(self) -> None:
        """Give the arenas and the device back."""
        close_all(*(arena.close for arena in self._arenas.values()), self.device.close)

    def _notes_of(self, bundle: Bundle) -> MemoryNotes:
        file = self._cached(bundle, "activations.json")
        if file not in self._notes:
            self._notes[file] = MemoryNotes(file)
        return self._notes[file]

    def _cached(self, bundle: Bundle, what: str) -> Path:
        """Return a file of the cache for what holds for this bundle, this library and GPUs of this name.

        Of this name: GPUs of one compute capability differ in how much they run at once.
        """
        return bundle_cache_dir(bundle.digest) / plain_name(f"{self.library.label} {self.device.name}") / what


class Arena:
    """One piece of memory for the activations of all graphs of a stream: they run one after the other.

    A session sets its size to what the largest of them needs before it records a step, for recordings
    hold its address. Whatever needs more later moves it; `moves` counts that, so that a recording that
    points to memory that is gone is not replayed.
    """

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device, self._stream = device, stream
        self._buffer: Buffer | None = None
        self._nbytes = 0
        self.moves = 0

    def at_least(self, nbytes: int) -> Buffer:
        """Return the memory, of at least this size.

        Raises:
            BackendError: the GPU has less.
        """
        if self._buffer is None or self._nbytes < nbytes:
            self.resize(nbytes)
        assert self._buffer is not None
        return self._buffer

    def resize(self, nbytes: int) -> None:
        """Have the memory in this size.

        Raises:
            BackendError: the GPU has less.
        """
        if self._buffer is not None and self._nbytes == nbytes:
            return
        self.close()  # before there is another one, so that there are never two
        self._buffer = self._device.buffer((max(1, -(-nbytes // 4)),), "float32")
        self._nbytes = nbytes

    def close(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self.moves += 1
            close_all(self._stream.synchronize, buffer.close)


class TrtRunner(BufferRunner):
    """A plan on a GPU. It has a context for each of the last sizes, and for all that recordings hold."""

    def __init__(
        self,
        engine: Any,
        spec: GraphSpec,
        plan: TrtEngine,
        library: TrtLibrary,
        device: Device,
        stream: Stream,
        arena: Arena,
        cache: Path,
        log: Any,
        memory: PlanMemory,
        keep_memory: Callable[[PlanMemory], None] = lambda memory: None,
    ) -> None:
        super().__init__(spec, device, stream)
        self._engine, self._plan, self._library = engine, plan, library
        self._arena, self._cache, self._log = arena, cache, log
        self._memory, self._keep_memory = memory, keep_memory
        self._contexts: dict[tuple[int, ...], _Context] = {}
        self._runtime_cache: Any = None
        self._kernels = b""
        self._config = self._make_config()

    @property
    def can_be_recorded(self) -> bool:  # type: ignore[override]
        """Whether the last size that was run may be recorded: RTX knows, once it has a context."""
        if WEIGHT_STREAMING in self._plan.flags:  # weights are copied, and memory is taken, by the host
            return False
        last = next(reversed(self._contexts.values()), None)
        ask = getattr(last.raw, "is_stream_capturable", None) if last is not None else None
        return ask is None or bool(ask(self._stream.handle))

    @property
    def memory_version(self) -> int:  # type: ignore[override]
        return self._arena.moves

    def activations(self, sizes: Sequence[Mapping[str, int]]) -> Activations:
        """Return what the plan says of these sizes: of some, a profile's largest needs many times as much.

        Where weights are streamed, that depends on how many are: then the profile's largest has to do.
        """
        self._memory.at(self._plan, sizes, where=self.spec.name)  # it takes all of them
        if WEIGHT_STREAMING not in self._plan.flags and not self._memory.knows(sizes):
            needs = {size_key(size): self._context(size, self._stream).needs for size in sizes}
            self._memory = self._memory.with_sizes(needs)
            self._keep_memory(self._memory)
        return self._memory.at(self._plan, sizes, where=self.spec.name)

    def forget_recordings(self) -> None:
        for context in self._contexts.values():
            context.is_recorded = False

    def enqueue_impl(
        self, stream: Stream, symbols: Mapping[str, int], inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> None:
        context = self._context(symbols, stream)
        context.is_recorded |= stream is not self._stream
        raw = context.raw
        raw.set_device_memory(self._arena.at_least(context.needs).address, context.needs)
        bound = all(
            raw.set_tensor_address(name, buffer.address) for name, buffer in (*inputs.items(), *outputs.items())
        )
        if not bound or not raw.execute_async_v3(stream.handle):
            raise failed("run the graph", self.spec.name, self._log)

    def close(self) -> None:
        self._keep_cache()
        self._contexts.clear()
        self._config = None  # the engine's child, and might hold it
        self._engine = None

    def _context(self, symbols: Mapping[str, int], stream: Stream) -> _Context:
        key = tuple(symbols.values())
        context = self._contexts.pop(key, None)
        if context is None:
            self._drop_contexts()
            index = choose_profile(self._plan.profiles, symbols, where=self.spec.name)
            self._log.last = ""
            raw = self._engine.create_execution_context(self._config)
            if raw is None:
                raise failed("make a context", self.spec.name, self._log)
            sized = raw.set_optimization_profile_async(index, stream.handle) and all(
                raw.set_input_shape(tensor.name, resolve(tensor.shape, symbols)) for tensor in self.spec.inputs
            )
            if not sized:
                raise failed("take the size", self.spec.name, self._log)
            context = _Context(raw, self._needs(raw, index))
        self._contexts[key] = context  # last in order, as the one that was used last
        return context

    def _needs(self, raw: Any, profile: int) -> int:
        """Return the bytes that a context needs at its size, with what streaming adds, if it does."""
        if WEIGHT_STREAMING in self._plan.flags:
            return int(self._engine.get_device_memory_size_for_profile_v2(profile))
        needs = int(raw.update_device_memory_size_for_shapes())
        if needs <= 0:
            raise failed("tell the memory of a size", self.spec.name, self._log)
        return needs

    def _drop_contexts(self) -> None:
        """Make room for one more context; those that were used longest ago go, but for recorded ones."""
        idle = [key for key, context in self._contexts.items() if not context.is_recorded]
        too_many = idle[: max(0, len(self._contexts) + 1 - _CONTEXTS_KEPT)]
        if too_many:
            self._stream.synchronize()  # it may still be at work for one of them
        for key in too_many:
            del self._contexts[key]

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
            self._kernels = self._cache.read_bytes()
            self._runtime_cache.deserialize(self._kernels)
        config.set_runtime_cache(self._runtime_cache)
        return config

    def _keep_cache(self) -> None:
        """Write the kernels that were compiled, for the next start, if there are new ones."""
        if self._runtime_cache is None:
            return
        kernels, self._runtime_cache = self._runtime_cache.serialize(), None
        if kernels is not None and bytes(kernels) != self._kernels:
            write_cache(self._cache, bytes(kernels))


@dataclass
class _Context:
    """An execution context of a size, the bytes that it needs, and whether a recorded step runs it."""

    raw: Any
    needs: int
    is_recorded: bool = False


def plan_memory(engine: Any, plan: TrtEngine) -> PlanMemory:
    """Return what an engine that was just opened says of its memory."""
    return PlanMemory(
        profiles=tuple(int(engine.get_device_memory_size_for_profile_v2(i)) for i in range(len(plan.profiles))),
        streaming_bytes=int(engine.weight_streaming_scratch_memory_size) if WEIGHT_STREAMING in plan.flags else 0,
    )


def stream_weights(engine: Any, on_device: int, graph: Graph, log: Any) -> None:
    """Keep a part of an engine's weights on the host; before it has a context, which would hold them.

    Args:
        engine: whose plan was built for that.
        on_device: bytes of all its weights that may be on the device.
        graph: its name.
        log: from `make_log`.
    Raises:
        BackendError: the library refuses.
    """
    streamable = int(engine.streamable_weights_size)
    fixed = max(0, graph.weights_bytes - streamable)  # those that cannot be streamed are there anyway
    budget = min(streamable, max(0, on_device - fixed))
    engine.weight_streaming_budget_v2 = budget
    if int(engine.weight_streaming_budget_v2) > budget:
        raise failed(f"stream weights within {format_memory(budget)}", graph.spec.name, log)
