"""NVIDIA's GPUs through `cuda.core`: the device of `engine.device.interface`, its errors told in our words.

Everything belongs to a `CudaDevice`, which is a context manager: what it made is given back with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bundle.graphspec import DType
from engine.device import interface as promises
from engine.device.interface import Array
from engine.device.kernels import KERNELS, cuda_source
from engine.device.pinned import PinnedPool
from engine.errors import BackendError, OutOfMemoryError
from engine.units import format_memory

_THREADS_PER_BLOCK = 256


@dataclass(frozen=True)
class DeviceInfo:
    """What a GPU is: its name, as the driver gives it, and compute capability, such as "8.9"."""

    name: str
    compute_capability: str
    memory_bytes: int


def device_info(index: int) -> DeviceInfo:
    """Return what GPU number `index` is.

    Raises:
        BackendError: there is no driver, no such GPU, or cuda-python is not installed.
    """
    with CudaDevice(index) as device:
        return DeviceInfo(device.name, device.compute_capability, device.memory_bytes()[1])


def driver_version() -> str:
    """Return the newest CUDA that the driver knows, such as "13.0".

    Raises:
        BackendError: the driver does not tell.
    """
    driver = _cuda_driver()
    status, version = driver.cuDriverGetVersion()
    _check(driver, status, "tell its driver's version")
    return f"{version // 1000}.{version % 1000 // 10}"


class CudaDevice:
    """A GPU.

    Raises:
        BackendError: as `device_info`.
    """

    def __init__(self, index: int = 0) -> None:
        self._core = _cuda_core()
        self._streams: weakref.WeakSet[CudaStream] = weakref.WeakSet()
        self._buffers: weakref.WeakSet[CudaBuffer] = weakref.WeakSet()
        with _translated("open the GPU"):
            count = len(self._core.Device.get_all_devices())
            if index >= count:
                raise BackendError("no such GPU", expected=f"0 to {count - 1}" if count else "one", found=index)
            self._device = self._core.Device(index)
            self._device.set_current()
        self.pinned = PinnedPool(self._allocate_pinned)
        self._kernels: dict[str, Any] = {}
        self._allocations = self.stream()
        with _translated("set up its memory"):
            self._memory = self._core.DeviceMemoryResource(self._device.device_id)
        _give_back_at_once(self._memory)

    def activate(self) -> None:
        """Make it the GPU of the calling thread, which libraries go by."""
        with _translated("choose the GPU"):
            self._device.set_current()

    def __enter__(self) -> CudaDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back every stream and buffer that was made with it and is still there."""
        streams = list(self._streams)
        for stream in streams:
            if not stream.raw.is_closed:
                stream.synchronize()
        for buffer in list(self._buffers):
            buffer.close()
        for stream in streams:
            stream.close()
        self.pinned.close()

    @property
    def name(self) -> str:
        return str(self._device.name)

    @property
    def compute_capability(self) -> str:
        major, minor = self._device.compute_capability
        return f"{major}.{minor}"

    def stream(self) -> CudaStream:
        with _translated("make a stream"):
            stream = CudaStream(self, self._device.create_stream())
        self._streams.add(stream)
        return stream

    def buffer(self, shape: Sequence[int], dtype: DType) -> CudaBuffer:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            with _translated("allocate"):
                raw = self._memory.allocate(max(nbytes, 1), stream=self._allocations.raw)
                self._allocations.synchronize()  # from here on, any stream may use it
        except OutOfMemoryError:
            free, _ = self.memory_bytes()
            raise OutOfMemoryError(
                f"out of GPU memory: needs {format_memory(nbytes)} more, {format_memory(free)} free",
                where=self.name,
                expected=f"{format_memory(nbytes)} more",
                found=f"{format_memory(free)} free",
                fix="try --vram-budget, a smaller --min-size or --upscale, or close other programs on the GPU",
            ) from None
        buffer = CudaBuffer(raw, int(raw.handle), tuple(shape), dtype, on_close=self._allocations.synchronize)
        self._buffers.add(buffer)
        return buffer

    def memory_bytes(self) -> tuple[int, int]:
        driver = _cuda_driver()
        status, free, total = driver.cuMemGetInfo()
        _check(driver, status, "ask for the GPU's memory")
        return int(free), int(total)

    def kernel(self, name: str) -> Any:
        """Return one of the step's kernels, compiled for this GPU."""
        if not self._kernels:
            with _translated("compile the sampler's kernels"):
                code = compile_kernels(f"sm_{self.compute_capability.replace('.', '')}")
                self._kernels = {kernel: code.get_kernel(kernel) for kernel in KERNELS}
        return self._kernels[name]

    def _allocate_pinned(self, nbytes: int) -> Any:
        with _translated("allocate pinned memory"):
            return self._core.LegacyPinnedMemoryResource().allocate(max(nbytes, 1))

    def launch_config(self, count: int) -> Any:
        """Return the grid for `count` elements."""
        return self._core.LaunchConfig(grid=max(1, -(-count // _THREADS_PER_BLOCK)), block=_THREADS_PER_BLOCK)

    @property
    def core(self) -> ModuleType:
        """`cuda.core`."""
        return self._core


class CudaBuffer:
    """See `engine.device.interface.Buffer`."""

    def __init__(
        self,
        raw: Any,
        address: int,
        shape: tuple[int, ...],
        dtype: DType,
        owner: CudaBuffer | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.raw, self.address, self.shape, self.dtype = raw, address, shape, dtype
        self._owner = owner  # a view keeps what it looks at
        self._on_close = on_close

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def rows(self, start: int, stop: int) -> CudaBuffer:
        assert 0 <= start <= stop <= self.shape[0], f"rows {start} to {stop} of {self.shape}"
        address = self.address + start * (self.nbytes // self.shape[0])
        view = CudaBuffer(None, address, (stop - start, *self.shape[1:]), self.dtype, self._owner or self)
        view.raw = _cuda_core().Buffer.from_handle(address, view.nbytes, owner=self._owner or self)
        return view

    def close(self) -> None:
        raw, self.raw = self.raw, None
        if raw is not None and self._owner is None:
            raw.close()
            if self._on_close is not None:
                self._on_close()  # memory is free for others once its stream has come to that


class CudaEvent:
    """See `engine.device.interface.Event`."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    @property
    def is_done(self) -> bool:
        with _translated("ask the GPU how far it is"):
            return bool(self.raw.is_done)

    def synchronize(self) -> None:
        with _translated("wait for the GPU"):
            self.raw.sync()

    def ms_since(self, earlier: promises.Event) -> float:
        assert isinstance(earlier, CudaEvent)
        with _translated("read the GPU's clock"):
            return float(self.raw - earlier.raw)


class CudaStream:
    """See `engine.device.interface.Stream`."""

    def __init__(self, device: CudaDevice, raw: Any) -> None:
        self._device, self.raw = device, raw
        self._staged: list[tuple[CudaEvent, int, Any]] = []

    @property
    def handle(self) -> int:
        return int(self.raw.handle)

    def upload(self, target: promises.Buffer, source: Array) -> None:
        assert isinstance(target, CudaBuffer)
        assert (source.shape, str(source.dtype)) == (target.shape, target.dtype)
        self._unstage(lambda event: event.is_done)
        staging = self._device.pinned.take(target.nbytes)
        _as_array(staging, target)[...] = source
        with _translated("upload"):
            target.raw.copy_from(staging, stream=self.raw)
        self._staged.append((self.record(), target.nbytes, staging))

    def download(self, source: promises.Buffer) -> CudaDownload:
        assert isinstance(source, CudaBuffer)
        staging = self._device.pinned.take(source.nbytes)
        with _translated("download"):
            source.raw.copy_to(staging, stream=self.raw)
        return CudaDownload(self.record(), staging, source, self._device.pinned)

    def copy(self, target: promises.Buffer, source: promises.Buffer) -> None:
        assert isinstance(target, CudaBuffer)
        assert isinstance(source, CudaBuffer)
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        with _translated("copy"):
            target.raw.copy_from(source.raw, stream=self.raw)

    def launch(self, kernel: str, count: int, *arguments: promises.Buffer | int | None) -> None:
        passed = [_kernel_argument(argument) for argument in arguments]
        with _translated(f"launch {kernel}"):
            config = self._device.launch_config(count)
            self._device.core.launch(self.raw, config, self._device.kernel(kernel), np.uint64(count), *passed)

    def record(self) -> CudaEvent:
        with _translated("record an event"):
            return CudaEvent(self.raw.record(options=self._device.core.EventOptions(timing_enabled=True)))

    def wait(self, event: promises.Event) -> None:
        assert isinstance(event, CudaEvent)
        with _translated("wait for an event"):
            self.raw.wait(event.raw)

    def capture(self, enqueue: Callable[[promises.Stream], None]) -> CudaReplay:
        with _translated("record a step"):
            builder = self.raw.create_graph_builder()
            try:
                builder.begin_building("thread_local")
                enqueue(CudaStream(self._device, builder.stream))
                return CudaReplay(builder.end_building().complete())
            finally:
                with contextlib.suppress(Exception):  # the first error is the one that tells
                    builder.close()  # ends a capture that failed, or the stream would stay in it

    def synchronize(self) -> None:
        with _translated("wait for the GPU"):
            self.raw.sync()
        self._unstage(lambda _: True)

    def _unstage(self, is_done: Callable[[CudaEvent], bool]) -> None:
        """Give host memory back for other copies, behind its own."""
        staged, self._staged = self._staged, []
        for event, nbytes, staging in staged:
            if is_done(event):
                self._device.pinned.give(nbytes, staging)
            else:
                self._staged.append((event, nbytes, staging))

    def close(self) -> None:
        if not self.raw.is_closed:
            self.synchronize()
            self.raw.close()


class CudaReplay:
    """See `engine.device.interface.Replay`."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def launch(self, stream: promises.Stream) -> None:
        assert isinstance(stream, CudaStream)
        with _translated("replay a step"):
            self._graph.launch(stream.raw)

    def close(self) -> None:
        self._graph.close()


class CudaDownload:
    """See `engine.device.interface.Download`."""

    def __init__(self, event: CudaEvent, staging: Any, source: CudaBuffer, pool: PinnedPool) -> None:
        self._event, self._staging, self._source, self._pool = event, staging, source, pool
        self._found: Array | None = None

    def result(self) -> Array:
        if self._found is None:
            self._event.synchronize()
            self._found = _as_array(self._staging, self._source).copy()
            self._pool.give(self._source.nbytes, self._staging)
        return self._found


def compile_kernels(architecture: str) -> Any:
    """Return the sampler's kernels for an architecture such as "sm_89"; needs NVRTC, but no GPU.

    Raises:
        BackendError: NVRTC is missing or refuses them.
    """
    core = _cuda_core()
    options = core.ProgramOptions(arch=architecture, std="c++17", name="step_kernels.cu")
    with _translated("compile the sampler's kernels"):
        return core.Program(cuda_source(), "c++", options=options).compile("cubin")


def _kernel_argument(argument: promises.Buffer | int | None) -> Any:
    if argument is None:
        return np.uintp(0)
    return np.uint32(argument) if isinstance(argument, int) else np.uintp(argument.address)


def _as_array(staging: Any, like: CudaBuffer) -> NDArray[Any]:
    """Return pinned memory as an array of a buffer's shape and dtype."""
    memory = (ctypes.c_char * max(like.nbytes, 1)).from_address(int(staging.handle))
    return np.frombuffer(memoryview(memory), dtype=np.dtype(like.dtype), count=math.prod(like.shape)).reshape(
        like.shape
    )


# -- the library and its errors -------------------------------------------------------------------

_INSTALL = "pip install 'restoration-engine[tensorrt-rtx]'"
_WITHOUT = "without a GPU, --backend onnxruntime runs bundles of --precision fp32 or fp16"


@lru_cache(maxsize=1)
def _cuda_core() -> ModuleType:
    try:
        import cuda.core as core
    except ModuleNotFoundError as error:
        raise BackendError(
            "running on a GPU needs cuda-python, which is not installed",
            found=f"no module {error.name}",
            fix=f"{_INSTALL}; {_WITHOUT}",
        ) from error
    return core


def _cuda_driver() -> Any:
    from cuda.bindings import driver

    return driver


def _check(driver: Any, status: Any, action: str) -> None:
    if status != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(status)
        found = name.decode() if name else str(status)
        if "OUT_OF_MEMORY" in found:
            raise OutOfMemoryError("out of GPU memory", found=f"the GPU could not {action}: {found}")
        raise BackendError(f"the GPU could not {action}", found=found)


def _give_back_at_once(memory: Any) -> None:
    """Let memory that is given back be anybody's, as soon as its stream has come to that.

    `cuda.core` makes the pool keep it; but libraries that load weights take theirs from elsewhere.
    """
    driver = _cuda_driver()
    attribute = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    (status,) = driver.cuMemPoolSetAttribute(memory.handle, attribute, driver.cuuint64_t(0))
    _check(driver, status, "set up its memory")


@contextmanager
def _translated(action: str) -> Iterator[None]:
    """Tell the errors of `cuda.core` in our words.

    Args:
        action: what was being done, as in "upload".
    """
    try:
        yield
    except Exception as error:
        # cuda.core's own have several bases; all other exceptions are bugs, and stay what they are.
        if not type(error).__module__.startswith("cuda.") and not isinstance(error, RuntimeError):
            raise
        text = " ".join(str(error).split())
        if type(error).__name__ == "DynamicLibNotFoundError" or "INSUFFICIENT_DRIVER" in text or "NO_DEVICE" in text:
            driver = "driver" in text.lower() or "NO_DEVICE" in text
            missing = "an NVIDIA GPU with its driver" if driver else "a CUDA library"
            raise BackendError(
                f"running on a GPU needs {missing}, which is missing or too old",
                found=text[:200],
                fix=f"{'install the driver' if driver else _INSTALL}; {_WITHOUT}",
            ) from error
        if "OUT_OF_MEMORY" in text:
            raise OutOfMemoryError("out of GPU memory", found=text[:200]) from error
        raise BackendError(f"the GPU could not {action}", found=text[:300]) from error
