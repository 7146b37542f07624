"""A device that is no device: memory is NumPy's, streams run at once, and every call is written down.

The kernels are the real ones: `step_kernels.cu` compiled for this machine's processor, a thread at a
time. So the tests run what a GPU runs, and see in which order.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from engine.backends.ort import open_session
from engine.backends.ort_cuda import OrtBufferRunner
from engine.device.interface import STREAMS
from engine.device.kernels import cuda_source
from engine.memory.residency import Activations
from engine.recipe import stream_of

COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler for the sampler's kernels")

_HOST_CUDA = """
#define __device__ static
#define __global__
struct Place { unsigned long long x; };
static Place blockIdx, blockDim = {1}, threadIdx;
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
"""
_RUN = """
extern "C" void run_{name}(unsigned long long threads, unsigned long long count, {declared}) {{
    for (blockIdx.x = 0; blockIdx.x < threads; ++blockIdx.x) {name}(count, {passed});
}}
"""
#: How many buffers and numbers each kernel takes behind its count.
_ARGUMENTS = {
    "prepare_step": (7, 2),
    "combine_step": (8, 0),
    "advance_step": (1, 0),
    "clear": (1, 0),
    "take_tile": (5, 6),
    "add_tile": (7, 5),
    "advance_tile": (1, 1),
}


@cache
def kernels(folder: Path) -> ctypes.CDLL:
    """Compile the kernels for this processor."""
    source = _HOST_CUDA + cuda_source()
    for name, (pointers, numbers) in _ARGUMENTS.items():
        declared = [f"void* p{i}" for i in range(pointers)] + [f"unsigned int n{i}" for i in range(numbers)]
        types = _parameter_types(source, name)
        passed = [f"({types[i]})p{i}" for i in range(pointers)] + [f"n{i}" for i in range(numbers)]
        source += _RUN.format(name=name, declared=", ".join(declared), passed=", ".join(passed))
    file, library = folder / "kernels.cpp", folder / "kernels.so"
    file.write_text(source)
    exact = ("-O2", "-ffp-contract=off")
    subprocess.run([COMPILER, *exact, "-shared", "-fPIC", file, "-o", library], check=True, capture_output=True)
    return ctypes.CDLL(str(library))


def _parameter_types(source: str, kernel: str) -> list[str]:
    head = source.split(f"void {kernel}(")[1].split(")")[0]
    return [part.strip().rpartition(" ")[0] for part in head.split(",")][1:]


class HostBuffer:
    _numbers = itertools.count()

    def __init__(self, array: np.ndarray, device: HostDevice, owner: HostBuffer | None = None) -> None:
        self.array, self.device, self.owner = array, device, owner
        self.number = next(self._numbers) if owner is None else owner.number
        self.closed = False

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: str(self.array.dtype))
    address = property(lambda self: self.array.ctypes.data)
    nbytes = property(lambda self: self.array.nbytes)

    def rows(self, start: int, stop: int) -> HostBuffer:
        assert not self.closed, "a view of memory that was given back"
        return HostBuffer(self.array[start:stop], self.device, self.owner or self)

    def part(self, offset: int, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        assert not self.closed, "a view of memory that was given back"
        assert offset % 256 == 0
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        inside = self.array.reshape(-1).view(np.uint8)[offset : offset + nbytes]
        assert len(inside) == nbytes, "over the end of the memory"
        return HostBuffer(inside.view(dtype).reshape(shape), self.device, self.owner or self)

    def close(self) -> None:
        assert not self.closed, "given back twice"
        self.closed = True
        self.device.in_use -= self.nbytes
        self.device.calls.append(("free", self.number))


class HostEvent:
    def __init__(self, device: HostDevice, number: int) -> None:
        self.device, self.number = device, number
        self.is_done = False

    def synchronize(self) -> None:
        self.device.calls.append(("wait on host", self.number))

    def ms_since(self, earlier: HostEvent) -> float:
        return float(self.number - earlier.number)


class HostDownload:
    def __init__(self, array: np.ndarray) -> None:
        self._array = array.copy()

    def result(self) -> np.ndarray:
        return self._array


class HostReplay:
    def __init__(self, device: HostDevice, work: list[Any]) -> None:
        self.device, self.work = device, work

    def launch(self, stream: HostStream) -> None:
        self.device.calls.append(("replay", stream.name))
        for one in self.work:
            one()

    def close(self) -> None:
        self.device.calls.append(("close replay",))


class HostStream:
    """`recording` is the list that captured work goes into, None where work runs at once."""

    def __init__(self, device: HostDevice, name: str, recording: list[Any] | None = None) -> None:
        self.device, self.name, self.recording = device, name, recording
        self.handle = id(self)

    def _do(self, call: tuple[Any, ...], work: Any) -> None:
        self.device.calls.append(call)
        work() if self.recording is None else self.recording.append(work)

    def upload(self, target: HostBuffer, source: np.ndarray) -> None:
        assert (target.shape, target.dtype) == (source.shape, str(source.dtype))
        kept = source.copy()
        self._do(("upload", self.name, target.number), lambda: np.copyto(target.array, kept))

    def download(self, source: HostBuffer) -> HostDownload:
        self.device.calls.append(("download", self.name, source.number))
        return HostDownload(source.array)

    def copy(self, target: HostBuffer, source: HostBuffer) -> None:
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        self._do(("copy", self.name, target.number, source.number), lambda: np.copyto(target.array, source.array))

    def launch(self, kernel: str, count: int, *arguments: Any) -> None:
        pointers, numbers = _ARGUMENTS[kernel]
        assert len(arguments) == pointers + numbers
        assert not any(isinstance(item, HostBuffer) and (item.owner or item).closed for item in arguments)
        passed = [ctypes.c_void_p(0 if item is None else item.address) for item in arguments[:pointers]]
        passed += [ctypes.c_uint(item) for item in arguments[pointers:]]
        run = getattr(self.device.kernels, f"run_{kernel}")
        # A GPU runs whole blocks: more threads than elements.
        threads = ctypes.c_ulonglong(-(-count // 256) * 256)
        self._do(("launch", self.name, kernel), lambda: run(threads, ctypes.c_ulonglong(count), *passed))

    def record(self) -> HostEvent:
        event = HostEvent(self.device, next(self.device.events))
        self.device.calls.append(("record", self.name, event.number))
        return event

    def wait(self, event: HostEvent) -> None:
        self.device.calls.append(("wait", self.name, event.number))

    def capture(self, enqueue: Any) -> HostReplay:
        self.device.calls.append(("capture", self.name))
        work: list[Any] = []
        enqueue(HostStream(self.device, self.name, work))
        return HostReplay(self.device, work)

    def synchronize(self) -> None:
        self.device.calls.append(("synchronize", self.name))

    def enqueue(self, graph: str, work: Any) -> None:
        """What a runner puts on the stream."""
        self._do(("graph", self.name, graph), work)


class HostDevice:
    """`total_bytes` is what a restoration may use, weights not counted."""

    name, compute_capability = "stand-in", "0.0"

    def __init__(self, folder: Path, total_bytes: int = 1 << 40) -> None:
        self.kernels = kernels(folder)
        self.calls: list[tuple[Any, ...]] = []
        self.events = itertools.count()
        self.in_use, self.total_bytes = 0, total_bytes
        self._streams = iter(STREAMS)

    def activate(self) -> None:
        pass

    def stream(self) -> HostStream:
        return HostStream(self, next(self._streams))

    def buffer(self, shape: Any, dtype: str) -> HostBuffer:
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[...] = 0xFF  # memory of a device holds something: as floats, no numbers
        self.in_use += array.nbytes
        made = HostBuffer(array, self)
        self.calls.append(("allocate", made.number, array.nbytes))
        return made

    def memory_bytes(self) -> tuple[int, int]:
        return self.total_bytes - self.in_use, self.total_bytes

    def close(self) -> None:
        self.calls.append(("close device",))

    def of(self, *kinds: str) -> list[tuple[Any, ...]]:
        """The calls of some kinds, in order."""
        return [call for call in self.calls if call[0] in kinds]


class HostRunner(OrtBufferRunner):
    """ONNX Runtime's CPU provider on the stand-in's memory, recordable as TensorRT's runners are."""

    can_be_recorded = True
    needs = Activations(0)

    def activations(self, sizes) -> Activations:
        return self.needs

    def enqueue_impl(self, stream, symbols, inputs, outputs) -> None:
        bound = dict(inputs), dict(outputs)
        stream.enqueue(self.spec.name, lambda: super(HostRunner, self).enqueue_impl(self._stream, symbols, *bound))


class HostBackend:
    label = "stand-in"

    def __init__(self, device: HostDevice) -> None:
        self.device = device
        self.streams = {name: device.stream() for name in STREAMS}
        self.opened: list[str] = []
        #: What graphs need beside their weights; if not `known`, only once they have been opened.
        self.activations: dict[str, Activations] = {}
        self.known = True
        self.streamable: frozenset[str] = frozenset()
        self.limits: list[dict[str, int]] = []

    def known_activations(self, bundle, graph, sizes) -> Activations | None:
        return self.activations.get(graph, Activations(0)) if self.known or graph in self.opened else None

    def sizes_at_opening(self, bundle, graph) -> tuple[()]:
        return ()

    def can_stream_weights(self, bundle, graph) -> bool:
        return graph in self.streamable

    def limit_weights(self, on_device) -> None:
        self.limits.append(dict(on_device))

    def reserve(self, stream, nbytes, *, keep_larger=False) -> None:
        self.device.calls.append(("reserve", stream, nbytes))

    def open(self, bundle, graph) -> HostRunner:
        self.opened.append(graph)
        entry = bundle.manifest.graphs[graph]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = open_session(bundle.read_graph(graph), ["CPUExecutionProvider"], entry.spec, bundle.path, options)
        runner = HostRunner(session, entry.spec, self.device, self.streams[stream_of(graph)], "cpu", 0)
        runner.needs = self.activations.get(graph, Activations(0))
        return runner

    def close(self) -> None:
        self.device.close()
