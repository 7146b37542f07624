"""PyTorch as a backend: the same networks and weights behind the same pipeline, to compare with.

On a CPU it takes the pipeline's arrays. On a GPU it takes the place of TensorRT in the engine's own loop:
buffers, streams and the sampler's kernels are the engine's, and nothing goes by the host. So what differs
is the networks alone, and PyTorch is given a better loop than it mostly has.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.networks import bundle_builders, load_weights
from engine.backends.base import Backend, Runner
from engine.backends.buffers import BufferRunner, SelfAllocatingBackend
from engine.bundle.graphspec import GraphSpec, Precision
from engine.bundle.manifest import Bundle
from engine.device.interface import Array, Buffer, Device, Stream
from engine.errors import BackendError, OutOfMemoryError
from engine.recipe import stream_of
from export.graphs.builder import call_arguments


def make_torch_backend(
    bundle: Bundle, gpu: int | None, *, compiled: bool = False, in_bf16: bool = False, threads: int = 0
) -> Backend:
    """Return the backend that a bundle's networks run on in PyTorch.

    Args:
        bundle: whose weights and architecture are used.
        gpu: its number, None for the CPU.
        compiled: whether the networks go through `torch.compile`; eager otherwise.
        in_bf16: on a CPU, by autocast, with channels last: PyTorch's fastest where there are units for it.
        threads: that one operator may use on a CPU; 0 leaves torch's own choice.
    Raises:
        BackendError: PyTorch cannot run it there, or a compiler is missing.
    """
    if compiled:
        check_compiler(gpu)
    if gpu is None:
        return TorchBackend(bundle, threads, compiled=compiled, in_bf16=in_bf16)
    if in_bf16:
        raise BackendError("PyTorch's bf16 is a baseline on CPUs", where="--baseline", fix="measure torch instead")
    if not torch.cuda.is_available():
        raise BackendError(
            "this PyTorch cannot use the GPU",
            found=f"torch {torch.__version__}",
            fix="install PyTorch's CUDA build, or measure without --baseline",
        )
    from engine.device.cuda import CudaDevice

    return TorchDeviceBackend(bundle, CudaDevice(gpu), CudaMemory(gpu), compiled=compiled)


def baseline_vae_precision(bundle: Bundle, gpu: int | None) -> Precision:
    """Return the precision of the baseline's VAE: SDXL's overflows in fp16, and bf16 is what a GPU has for it."""
    own = bundle.spec("vae_decoder").precision
    return "bf16" if gpu is not None and bundle.manifest.precision == "fp16" else own


def check_compiler(gpu: int | None) -> None:
    """Find out whether `torch.compile` has what it needs: it fails late, and not in the user's words.

    Raises:
        BackendError: a compiler or a header is missing.
    """
    variable, names = ("CC", ("gcc", "cc", "clang")) if gpu is not None else ("CXX", ("g++", "clang++"))
    named = os.environ.get(variable)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = {
        f"a compiler: {', '.join(names)}, or ${variable}": not any(map(shutil.which, [named] if named else names)),
        f"Python's headers: {header}": not header.is_file(),
        "triton": gpu is not None and importlib.util.find_spec("triton") is None,
    }
    if any(missing.values()):
        raise BackendError(
            "torch.compile needs what is not installed",
            where="--baseline torch-compile",
            expected="; ".join(what for what, absent in missing.items() if absent),
            fix="install it, or leave that baseline out",
        )


class TorchBackend:
    """PyTorch on a CPU, in float32 or by autocast in bf16, attention by `scaled_dot_product_attention`.

    Args:
        bundle: whose weights and architecture are used.
        threads: that one operator may use; 0 leaves torch's own choice.
        compiled, in_bf16: as for `make_torch_backend`.
    Raises:
        BackendError: the bundle is of another precision.
    """

    def __init__(self, bundle: Bundle, threads: int = 0, *, compiled: bool = False, in_bf16: bool = False) -> None:
        # PyTorch's CPU operators for fp16 are slow, and ONNX Runtime computes fp16 graphs in float32.
        if bundle.manifest.precision != "fp32":
            raise BackendError(
                "PyTorch is compared in float32 on CPUs",
                where=bundle.path,
                found=bundle.manifest.precision,
                fix="measure a bundle built with --precision fp32",
            )
        if threads:
            torch.set_num_threads(threads)
        self._builders, self._compiled, self._in_bf16 = bundle_builders(bundle), compiled, in_bf16

    @property
    def label(self) -> str:
        """The library and its version, for results' metadata."""
        return f"torch {torch.__version__}"

    def open(self, bundle: Bundle, graph: str) -> Runner:
        """Return the module that a graph was exported from; `bundle` is the one it was made with."""
        builder = self._builders[graph]
        module = load_weights(builder, bundle, "cpu")
        if self._in_bf16:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return _TorchRunner(builder.spec, _ready(module, self._compiled), in_bf16=self._in_bf16)

    def close(self) -> None:
        """Modules share nothing."""


class _TorchRunner(Runner):
    def __init__(self, spec: GraphSpec, module: Any, *, in_bf16: bool) -> None:
        super().__init__(spec)
        self._module: Any = module
        self._in_bf16 = in_bf16

    @torch.inference_mode()
    def infer_impl(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._in_bf16):
            outputs = _call(self._module, self.spec, {name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: value.float().numpy() for name, value in outputs.items()}

    def close(self) -> None:
        self._module = None


class Memory(Protocol):
    """How torch gets at a device's buffers and streams.

    Attributes:
        place: torch's name of the device.
    """

    place: str

    def tensor(self, buffer: Buffer) -> torch.Tensor:
        """Return the buffer as a tensor, without a copy."""
        ...

    def on(self, stream: Stream) -> Any:
        """Return a context in which torch's work goes on that stream."""
        ...


class CudaMemory:
    """NVIDIA's: tensors by address, streams by handle."""

    def __init__(self, gpu: int) -> None:
        self._device = torch.device("cuda", gpu)
        self.place = str(self._device)

    def tensor(self, buffer: Buffer) -> torch.Tensor:
        return torch.as_tensor(_CudaArray(buffer), device=self._device)

    def on(self, stream: Stream) -> Any:
        theirs = torch.cuda.ExternalStream(stream.handle, device=self._device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(theirs)


class _CudaArray:
    """A buffer as libraries exchange them. Source: Numba's "CUDA Array Interface", version 3."""

    def __init__(self, buffer: Buffer) -> None:
        self.__cuda_array_interface__ = {
            "shape": buffer.shape,
            "typestr": np.dtype(buffer.dtype).str,
            "data": (buffer.address, False),
            "version": 3,
        }


class TorchDeviceBackend(SelfAllocatingBackend):
    """PyTorch on a device's buffers, in the bundle's precision, its VAE in bf16 where that is fp16.

    Args:
        bundle: whose weights and architecture are used.
        device: that everything is on; closed with the backend.
        memory: how torch gets at it.
        compiled: as for `make_torch_backend`.
    Raises:
        BackendError: the bundle is in bf16.
    """

    def __init__(self, bundle: Bundle, device: Device, memory: Memory, *, compiled: bool = False) -> None:
        if bundle.manifest.precision == "bf16":
            raise BackendError(
                "the engine exchanges no bf16 with graphs",
                where=bundle.path,
                fix="measure a bundle built with --precision fp16, or fp32",
            )
        super().__init__(device)
        self._memory, self._compiled = memory, compiled
        self._builders = bundle_builders(bundle, vae_precision=baseline_vae_precision(bundle, 0))
        torch.backends.cudnn.benchmark = True  # sizes stay what they are: let it choose the fastest
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as in the engine

    @property
    def label(self) -> str:
        """The library and its version, for results' metadata."""
        return f"torch {torch.__version__}"

    def open(self, bundle: Bundle, graph: str) -> BufferRunner:
        """Return the module that a graph was exported from; `bundle` is the one it was made with."""
        self.device.activate()
        builder, stream = self._builders[graph], self.streams[stream_of(graph)]
        with _translated(graph), self._memory.on(stream):
            module = _ready(load_weights(builder, bundle, self._memory.place), self._compiled)
        return _TorchBufferRunner(builder.spec, self.device, stream, module, self._memory)


class _TorchBufferRunner(BufferRunner):
    def __init__(self, spec: GraphSpec, device: Device, stream: Stream, module: Any, memory: Memory) -> None:
        super().__init__(spec, device, stream)
        self._module, self._memory = module, memory

    def enqueue_impl(
        self, stream: Stream, symbols: Mapping[str, int], inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> None:
        assert stream is self._stream, f"{self.spec.name} is bound to one stream"
        with _translated(self.spec.name), self._memory.on(stream), torch.inference_mode():
            tensors = {name: self._memory.tensor(buffer) for name, buffer in inputs.items()}
            for name, value in _call(self._module, self.spec, tensors).items():
                # On a GPU under a thousandth of a step: 0.1 GB of control features at 1024 pixels.
                self._memory.tensor(outputs[name]).copy_(value)

    def close(self) -> None:
        self._module = None


def _ready(module: torch.nn.Module, compiled: bool) -> Any:
    return torch.compile(module, dynamic=False) if compiled else module


def _call(module: Any, spec: GraphSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    assert module is not None, f"{spec.name} was closed"
    outputs = module(*call_arguments(spec, tensors))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {tensor.name: value for tensor, value in zip(spec.outputs, outputs, strict=True)}


@contextmanager
def _translated(graph: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            "out of GPU memory",
            where=f"PyTorch: {graph}",
            found=str(error).split(".")[0],
            fix="measure a smaller --size or --batch, or one --baseline at a time: all runtimes share the GPU",
        ) from error
