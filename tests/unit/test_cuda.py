"""What can be said of the GPU layer without a GPU: its errors."""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from engine.device import cuda
from engine.errors import BackendError, OutOfMemoryError, UsageError


class CudaError(Exception):
    __module__ = "cuda.core._utils.cuda_utils"


class DynamicLibNotFoundError(CudaError):
    __module__ = "cuda.pathfinder"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DynamicLibNotFoundError('"cuda" is an NVIDIA driver library'), "needs an NVIDIA GPU with its driver"),
        (DynamicLibNotFoundError('Failure finding "nvrtc.so"'), "needs a CUDA library"),
        (CudaError("CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected"), "needs an NVIDIA GPU with its driver"),
        (CudaError("CUDA_ERROR_INSUFFICIENT_DRIVER: older than"), "needs an NVIDIA GPU with its driver"),
        (CudaError("CUDA_ERROR_ILLEGAL_ADDRESS: somewhere"), "the GPU could not upload"),
        (RuntimeError("something else"), "the GPU could not upload"),
    ],
)
def test_errors_of_the_library_are_told_in_our_words(error, words):
    with pytest.raises(BackendError, match=words) as caught, cuda._translated("upload"):
        raise error
    assert str(error)[:20] in str(caught.value)


def test_out_of_memory_is_told_apart_because_its_remedy_is_known():
    with pytest.raises(OutOfMemoryError), cuda._translated("allocate"):
        raise CudaError("CUDA_ERROR_OUT_OF_MEMORY: the API call failed")


@pytest.mark.parametrize("bug", [AssertionError("shapes"), TypeError("arguments"), KeyError("name")])
def test_bugs_stay_bugs(bug):
    with pytest.raises(type(bug)), cuda._translated("upload"):
        raise bug


def test_our_own_errors_pass():
    with pytest.raises(UsageError), cuda._translated("upload"):
        raise UsageError("as it was")


def test_without_cuda_python_there_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    cuda._cuda_core.cache_clear()
    with pytest.raises(BackendError, match="needs cuda-python, which is not installed") as caught:
        cuda.CudaDevice()
    assert "pip install" in str(caught.value)
    cuda._cuda_core.cache_clear()


# -- a library that keeps its memory on the host and writes down what it was asked -----------------


class Memory:
    """A piece of memory, as `cuda.core` has them."""

    def __init__(self, calls, nbytes):
        self._calls, self.size = calls, nbytes
        self._bytes = (ctypes.c_char * nbytes)()
        self.handle = ctypes.addressof(self._bytes)

    def copy_from(self, source, *, stream):
        ctypes.memmove(self.handle, source.handle, self.size)

    def copy_to(self, target, *, stream):
        ctypes.memmove(target.handle, self.handle, self.size)

    def close(self):
        self._calls.append(("free", self.size))


class Event:
    def __init__(self, stream):
        self._stream = stream

    is_done = property(lambda self: self._stream.is_fast)

    def sync(self):
        pass


class Stream:
    is_closed, handle = False, 7

    def __init__(self, calls):
        self._calls, self.is_fast = calls, True

    def record(self, options):
        return Event(self)

    def sync(self):
        self._calls.append("sync")

    def close(self):
        self.is_closed = True


FREE, TOTAL = 10 << 30, 24 << 30


@pytest.fixture
def library(monkeypatch):
    calls = []

    class Device:
        device_id, name, compute_capability = 0, "a GPU", (8, 9)

        def __init__(self, index):
            pass

        @staticmethod
        def get_all_devices():
            return ["the only one"]

        def set_current(self):
            pass

        def create_stream(self):
            return Stream(calls)

    class Pool:
        handle = "the pool"

        def __init__(self, device_id):
            calls.append(("pool", device_id))

        def allocate(self, nbytes, *, stream):
            if nbytes > FREE:
                raise CudaError("CUDA_ERROR_OUT_OF_MEMORY: the API call failed")
            return Memory(calls, nbytes)

    class Pinned:
        def allocate(self, nbytes):
            calls.append(("pinned", nbytes))
            return Memory(calls, nbytes)

    def set_attribute(pool, attribute, value):
        calls.append((pool, attribute, value))
        return (0,)

    core = SimpleNamespace(
        Device=Device,
        DeviceMemoryResource=Pool,
        LegacyPinnedMemoryResource=Pinned,
        EventOptions=lambda timing_enabled: None,
        Buffer=SimpleNamespace(from_handle=lambda address, nbytes, owner: Memory.__new__(Memory)),
    )
    driver = SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
        CUmemPool_attribute=SimpleNamespace(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD="keeps"),
        cuuint64_t=int,
        cuMemPoolSetAttribute=set_attribute,
        cuMemGetInfo=lambda: (0, FREE, TOTAL),
        cuDriverGetVersion=lambda: (0, 13010),
    )
    monkeypatch.setattr(cuda, "_cuda_core", lambda: core)
    monkeypatch.setattr(cuda, "_cuda_driver", lambda: driver)
    return calls


def test_memory_that_is_given_back_is_there_for_other_libraries(library):
    """Weights are TensorRT's own allocations: the pool must keep nothing, and the stream must have come to it."""
    with cuda.CudaDevice(0) as device:
        assert library == [("pool", 0), ("the pool", "keeps", 0)]
        buffer = device.buffer((4, 8), "float32")
        library.clear()
        buffer.close()
        buffer.close()
        assert library == [("free", 128), "sync"]


def test_transfers_reuse_host_memory_and_give_it_back_at_the_end(library):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    with cuda.CudaDevice(0) as device:
        stream = device.stream()
        buffer = device.buffer(array.shape, "float32")
        for round_ in range(3):
            stream.upload(buffer, array + round_)
            download = stream.download(buffer)
            assert np.array_equal(download.result(), array + round_)
            assert download.result() is download.result()
        stream.synchronize()
        assert library.count(("pinned", 48)) == 2  # one up, one down
        stream.raw.is_fast = False
        for _ in range(3):  # none of them is done before the next begins
            stream.upload(buffer, array)
        assert library.count(("pinned", 48)) == 3
        library.clear()
    assert library.count(("free", 48)) == 3 + 1  # and the buffer


def test_a_gpu_that_is_full_is_told_with_what_is_needed_and_what_there_is(library):
    with cuda.CudaDevice(0) as device, pytest.raises(OutOfMemoryError) as caught:
        device.buffer((12 << 28,), "float32")
    assert str(caught.value).startswith("a GPU: out of GPU memory: needs 12 GiB more, 10 GiB free")
    assert "try --vram-budget, a smaller --min-size" in str(caught.value)


def test_a_gpu_that_is_not_there_is_told(library):
    with pytest.raises(BackendError, match="no such GPU") as caught:
        cuda.CudaDevice(3)
    assert "0 to 0" in str(caught.value)


def test_the_driver_s_version_is_as_people_write_it(library):
    assert cuda.driver_version() == "13.1"
