"""ONNX Runtime's CUDA provider: the CPU provider on the driver's memory, behind ONNX Runtime's own API."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from gpu_stand_in.work import CALLS, DeviceMemory, Owner, broken, is_inside

_CUDA = "CUDAExecutionProvider"
#: What was opened, by its folder and graph: opening takes ten times as long as a restoration of the tests' networks.
_OPENED: dict[tuple[str, bytes], ort.InferenceSession] = {}
_real_session, _real_available = ort.InferenceSession, ort.get_available_providers
#: What a session takes of the device for its weights and, once it runs, for its activations.
_WEIGHTS_BYTES, _ARENA_BYTES = 1 << 20, 1 << 20


class _NoMemoryError(Exception):
    """As ONNX Runtime tells it."""

    __module__ = "onnxruntime.capi.onnxruntime_pybind11_state"


def _take(memory: DeviceMemory, nbytes: int) -> None:
    if memory.resize(nbytes):
        raise _NoMemoryError(f"Failed to allocate memory for requested buffer of size {nbytes}")


class Binding:
    def __init__(self) -> None:
        self.bound: list[tuple[str, Any]] = []

    def bind_input(self, name: str, kind: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        self._bind("bind_input", name, kind, index, dtype, shape, address)

    def bind_output(self, name: str, kind: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        self._bind("bind_output", name, kind, index, dtype, shape, address)

    def _bind(self, how: str, name: str, kind: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        assert (kind, type(index), type(address)) == ("cuda", int, int), (kind, index, address)
        if not is_inside(address, int(np.prod(shape)) * np.dtype(dtype).itemsize):
            broken(f"{name} runs over its memory")
        self.bound.append((how, (name, "cpu", 0, dtype, tuple(shape), address)))


class Session:
    """A session whose first provider is CUDA's."""

    def __init__(self, real: ort.InferenceSession, options: dict[str, str]) -> None:
        assert all(type(value) is str for value in options.values()), options
        self._real, self._stream = real, int(options["user_compute_stream"])
        self._owner, self._weights, self._arena = Owner(), DeviceMemory(), DeviceMemory()
        self._has_arena = False
        _take(self._weights, _WEIGHTS_BYTES)

    def __del__(self) -> None:
        self._owner.close()
        self._weights.close()
        self._arena.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return [_CUDA, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> tuple[()]:
        return ()

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        if options.get_run_config_entry("disable_synchronize_execution_providers") != "1":
            broken("a run waits for the device")
        CALLS.append(("run", self._real.get_inputs()[0].name))
        if not self._has_arena:
            _take(self._arena, _ARENA_BYTES)
            self._has_arena = True
        real, bound = self._real, list(binding.bound)

        def work() -> None:
            run = real.io_binding()
            for how, arguments in bound:
                getattr(run, how)(*arguments)
            real.run_with_iobinding(run)

        if status := self._owner.enqueue(self._stream, work):
            raise _NoMemoryError(f"CUDA failure {status}")


def inference_session(graph: Any, options: Any = None, providers: Any = (), **others: Any) -> Any:
    """Return a session, in the place of `onnxruntime.InferenceSession`."""
    first, *_ = providers
    if not isinstance(first, tuple):
        return _real_session(graph, options, providers=providers, **others)
    name, settings = first
    assert name == _CUDA, name
    options.intra_op_num_threads = 1
    folder = options.get_session_config_entry("session.model_external_initializers_file_folder_path")
    if (folder, graph) not in _OPENED:
        _OPENED[folder, graph] = _real_session(graph, options, providers=["CPUExecutionProvider"], **others)
    return Session(_OPENED[folder, graph], settings)


def install() -> None:
    """Put the provider into ONNX Runtime."""
    ort.InferenceSession = inference_session
    ort.get_available_providers = lambda: [_CUDA, *_real_available()]
