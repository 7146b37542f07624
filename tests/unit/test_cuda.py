"""What can be said of the GPU layer without a GPU: its errors."""

import sys

import pytest

from engine.device import cuda, cuda_library
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
    with pytest.raises(BackendError, match=words) as caught, cuda_library.translated("upload"):
        raise error
    assert str(error)[:20] in str(caught.value)


def test_out_of_memory_is_told_apart_because_its_remedy_is_known():
    with pytest.raises(OutOfMemoryError), cuda_library.translated("allocate"):
        raise CudaError("CUDA_ERROR_OUT_OF_MEMORY: the API call failed")


@pytest.mark.parametrize("bug", [AssertionError("shapes"), TypeError("arguments"), KeyError("name")])
def test_bugs_stay_bugs(bug):
    with pytest.raises(type(bug)), cuda_library.translated("upload"):
        raise bug


def test_our_own_errors_pass():
    with pytest.raises(UsageError), cuda_library.translated("upload"):
        raise UsageError("as it was")


def test_without_cuda_python_there_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    cuda_library.cuda_core.cache_clear()
    with pytest.raises(BackendError, match="needs cuda-python, which is not installed") as caught:
        cuda.CudaDevice()
    assert "pip install" in str(caught.value)
    cuda_library.cuda_core.cache_clear()
