"""NVIDIA's GPUs through `cuda.core`: the device of `engine.device.interface`, its errors told in our words.

Everything belongs to a `CudaDevice`, which is a context manager: what it made is given back with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bundle.graphspec import DType
from engine.device import interface as promises
from engine.device.cuda_library import check, check_driver, cuda_core, cuda_driver, translated
from engine.device.interface import Array
from engine.device.kernels import KERNELS, cuda_source
from engine.device.pinned import PinnedPool
from engine.errors import BackendError, OutOfMemoryError, close_after, close_all
from engine.units import format_memory

_THREADS_PER_BLOCK = 256


@dataclass(frozen=True)
class DeviceInfo:
    """What a GPU is: its name, as the driver gives it, and compute capability, such as "8.9"."""

    name: str
    compute_capability: str
    memory_bytes: int


def gpu_count() -> int:
    """Return how many GPUs there are.

    Raises:
        BackendError: there is no driver, or cuda-python is not installed.
    """
    core = cuda_core()
    check_driver()
    with translated("count the GPUs"):
        return len(core.Device.get_all_devices())


def device_info(index: int) -> DeviceInfo:
    """Return what GPU number `index` is.

    Raises:
        BackendError: there is no driver, no such GPU, or cuda-python is not installed.
    """
    with CudaDevice(index) as device:
        return DeviceInfo(device.name, device.compute_capability, device.memory_bytes()[1])


class CudaDevice:
    """A GPU.

    Raises:
        BackendError: as `device_info`.

    Attributes:
        name: as the driver gives it.
        compute_capability: such as "8.9".
        pinned: host memory for copies.
    """

    def __init__(self, index: int = 0) -> None:
        self._core = cuda_core()
        check_driver()  # what an old one says of its own accord helps nobody
        self._streams: weakref.WeakSet[CudaStream] = weakref.WeakSet()
        self._buffers: weakref.WeakSet[CudaBuffer] = weakref.WeakSet()
        with translated("open the GPU"):
            count = len(self._core.Device.get_all_devices())
            if index >= count:
                raise BackendError("no such GPU", expected=f"0 to {count - 1}" if count else "one", found=index)
            self._device = self._core.Device(index)
            self._device.set_current()
            self.name = str(self._device.name)
            major, minor = self._device.compute_capability
            self.compute_capability = f"{major}.{minor}"
        self.pinned = PinnedPool(self._allocate_pinned)
        self._kernels: dict[str, Any] = {}
        #: Of all events: their times are read, and who waits for one sleeps.
        self.event_options = self._core.EventOptions(timing_enabled=True, blocking_sync=True)
        self._allocations = self.stream()
        with translated("set up its memory"):
            self._memory = self._core.DeviceMemoryResource(self._device.device_id)
        _give_back_at_once(self._memory)

    def activate(self) -> None:
        """Make it the GPU of the calling thread, which libraries go by."""
        with translated("choose the GPU"):
            self._device.set_current()

    def __enter__(self) -> CudaDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close_after(error, self.close)

    def close(self) -> None:
        """Give back every stream and buffer that was made with it and is still there, whatever fails meanwhile.

        Raises:
            BackendError: the first failure.
        """
        streams = [stream for stream in self._streams if not stream.raw.is_closed]
        buffers = list(self._buffers)
        close_all(
            *(stream.synchronize for stream in streams),
            *(buffer.close for buffer in buffers),
            *(stream.close for stream in streams),
            self.pinned.close,
        )

    def stream(self) -> CudaStream:
        with translated("make a stream"):
            stream = CudaStream(self, self._device.create_stream())
        self._streams.add(stream)
        return stream

    def buffer(self, shape: Sequence[int], dtype: DType) -> CudaBuffer:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            with translated("allocate"):
                raw = self._memory.allocate(max(nbytes, 1), stream=self._allocations.raw)
                self._allocations.synchronize()  # from here on, any stream may use it
        except OutOfMemoryError as error:
            try:
                free, _ = self.memory_bytes()
            except BackendError:  # what is wrong is known
                raise error from None
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
        driver = cuda_driver()
        status, free, total = driver.cuMemGetInfo()
        check(driver, status, "ask for the GPU's memory")
        return int(free), int(total)

    def kernel(self, name: str) -> Any:
        """Return one of the step's kernels, compiled for this GPU."""
        if not self._kernels:
            with translated("compile the sampler's kernels"):
                code = compile_kernels(f"sm_{self.compute_capability.replace('.', '')}")
                self._kernels = {kernel: code.get_kernel(kernel) for kernel in KERNELS}
        return self._kernels[name]

    def _allocate_pinned(self, nbytes: int) -> Any:
        with translated("allocate pinned memory"):
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
        return self.part(start * (self.nbytes // self.shape[0]), (stop - start, *self.shape[1:]), self.dtype)

    def part(self, offset: int, shape: tuple[int, ...], dtype: DType) -> CudaBuffer:
        owner = self._owner or self
        view = CudaBuffer(None, self.address + offset, shape, dtype, owner)
        assert offset + view.nbytes <= self.nbytes, f"{view.nbytes} bytes from {offset} on, of {self.nbytes}"
        view.raw = cuda_core().Buffer.from_handle(view.address, view.nbytes, owner=owner)
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
        with translated("ask the GPU how far it is"):
            return bool(self.raw.is_done)

    def synchronize(self) -> None:
        with translated("wait for the GPU"):
            self.raw.sync()

    def ms_since(self, earlier: promises.Event) -> float:
        assert isinstance(earlier, CudaEvent)
        with translated("read the GPU's clock"):
            return float(self.raw - earlier.raw)


@dataclass(eq=False)
class _Transfer:
    """Host memory that a copy reads or writes, and what it needs until it is done.

    Attributes:
        nbytes: of the memory.
        staging: the memory.
        buffer: the other end.
        event: behind the copy; None where it could not be recorded, and only waiting for the stream tells.
        reader: who will read the memory, while somebody holds it.
    """

    nbytes: int
    staging: Any
    buffer: CudaBuffer
    event: CudaEvent | None = None
    reader: weakref.ref[CudaDownload] | None = None

    @property
    def is_wanted(self) -> bool:
        return self.reader is not None and self.reader() is not None


class CudaStream:
    """See `engine.device.interface.Stream`."""

    def __init__(self, device: CudaDevice, raw: Any) -> None:
        self._device, self.raw = device, raw
        self._transfers: list[_Transfer] = []

    @property
    def handle(self) -> int:
        return int(self.raw.handle)

    def upload(self, target: promises.Buffer, source: Array) -> None:
        assert isinstance(target, CudaBuffer)
        assert (source.shape, str(source.dtype)) == (target.shape, target.dtype)
        self._release(lambda transfer: transfer.event is not None and transfer.event.is_done)
        transfer = self._begin(target)
        _as_array(transfer.staging, target.shape, target.dtype)[...] = source
        with translated("upload"):
            target.raw.copy_from(transfer.staging, stream=self.raw)
        transfer.event = self.record()

    def download(self, source: promises.Buffer) -> CudaDownload:
        assert isinstance(source, CudaBuffer)
        transfer = self._begin(source)
        with translated("download"):
            source.raw.copy_to(transfer.staging, stream=self.raw)
        transfer.event = self.record()
        download = CudaDownload(self, transfer)
        transfer.reader = weakref.ref(download)
        return download

    def _begin(self, buffer: CudaBuffer) -> _Transfer:
        """Return a transfer that the stream keeps until it is done, whatever becomes of the one who asked for it."""
        transfer = _Transfer(buffer.nbytes, self._device.pinned.take(buffer.nbytes), buffer)
        self._transfers.append(transfer)
        return transfer

    def copy(self, target: promises.Buffer, source: promises.Buffer) -> None:
        assert isinstance(target, CudaBuffer)
        assert isinstance(source, CudaBuffer)
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        with translated("copy"):
            target.raw.copy_from(source.raw, stream=self.raw)

    def launch(self, kernel: str, count: int, *arguments: promises.Buffer | int | None) -> None:
        passed = [_kernel_argument(argument) for argument in arguments]
        with translated(f"launch {kernel}"):
            config = self._device.launch_config(count)
            self._device.core.launch(self.raw, config, self._device.kernel(kernel), np.uint64(count), *passed)

    def record(self) -> CudaEvent:
        with translated("record an event"):
            return CudaEvent(self.raw.record(options=self._device.event_options))

    def wait(self, event: promises.Event) -> None:
        assert isinstance(event, CudaEvent)
        with translated("wait for an event"):
            self.raw.wait(event.raw)

    def capture(self, enqueue: Callable[[promises.Stream], None]) -> CudaReplay:
        with translated("record a step"):
            builder = self.raw.create_graph_builder()
            try:
                # Not "thread_local": what Python's garbage collector gives back meanwhile, such as pinned memory, would
                # end the recording.
                builder.begin_building("relaxed")
                enqueue(CudaStream(self._device, builder.stream))
                return CudaReplay(builder.end_building().complete())
            finally:
                with contextlib.suppress(Exception):  # the first error is the one that tells
                    builder.close()  # ends a capture that failed, or the stream would stay in it

    def synchronize(self) -> None:
        with translated("wait for the GPU"):
            self.raw.sync()
        self._release(lambda _: True)

    def _release(self, is_done: Callable[[_Transfer], bool]) -> None:
        """Give host memory back for other copies, behind its own."""
        for transfer in list(self._transfers):
            if not transfer.is_wanted and is_done(transfer):
                self.end(transfer)

    def end(self, transfer: _Transfer) -> None:
        """Give back the memory of a transfer that is done."""
        self._transfers.remove(transfer)
        self._device.pinned.give(transfer.nbytes, transfer.staging)

    def close(self) -> None:
        if not self.raw.is_closed:
            close_all(self.synchronize, self.raw.close)


class CudaReplay:
    """See `engine.device.interface.Replay`."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def launch(self, stream: promises.Stream) -> None:
        assert isinstance(stream, CudaStream)
        with translated("replay a step"):
            self._graph.launch(stream.raw)

    def close(self) -> None:
        self._graph.close()


class CudaDownload:
    """See `engine.device.interface.Download`."""

    def __init__(self, stream: CudaStream, transfer: _Transfer) -> None:
        self._stream, self._transfer = stream, transfer
        self._found: Array | None = None

    def result(self) -> Array:
        if self._found is None:
            transfer = self._transfer
            assert transfer.event is not None, "a download is handed out once its event is recorded"
            transfer.event.synchronize()
            self._found = _as_array(transfer.staging, transfer.buffer.shape, transfer.buffer.dtype).copy()
            self._stream.end(transfer)
        return self._found


def compile_kernels(architecture: str) -> Any:
    """Return the sampler's kernels for an architecture such as "sm_89"; needs NVRTC, but no GPU.

    Raises:
        BackendError: NVRTC is missing or refuses them.
    """
    core = cuda_core()
    options = core.ProgramOptions(arch=architecture, std="c++17", name="step_kernels.cu")
    with translated("compile the sampler's kernels"):
        return core.Program(cuda_source(), "c++", options=options).compile("cubin")


def _kernel_argument(argument: promises.Buffer | int | None) -> Any:
    if argument is None:
        return np.uintp(0)
    return np.uint32(argument) if isinstance(argument, int) else np.uintp(argument.address)


def _as_array(staging: Any, shape: tuple[int, ...], dtype: DType) -> NDArray[Any]:
    """Return pinned memory as an array."""
    count = math.prod(shape)
    memory = (ctypes.c_char * max(count * np.dtype(dtype).itemsize, 1)).from_address(int(staging.handle))
    return np.frombuffer(memoryview(memory), dtype=np.dtype(dtype), count=count).reshape(shape)


def _give_back_at_once(memory: Any) -> None:
    """Let memory that is given back be anybody's, as soon as its stream has come to that.

    `cuda.core` makes the pool keep it; but libraries that load weights take theirs from elsewhere.
    """
    driver = cuda_driver()
    attribute = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    (status,) = driver.cuMemPoolSetAttribute(memory.handle, attribute, driver.cuuint64_t(0))
    check(driver, status, "set up its memory")
