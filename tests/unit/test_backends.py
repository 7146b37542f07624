"""Backends by name: what is given back where one cannot be made."""

from types import SimpleNamespace

import pytest

import engine.backends
from engine.backends import make_backend, ort_cuda, trt
from engine.device import cuda
from engine.errors import BackendError


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt"])
def test_a_backend_that_cannot_be_made_gives_the_gpu_back(name, monkeypatch):
    closed = []

    class Device:
        def __init__(self, index):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            closed.append("the GPU")

        def stream(self):
            raise BackendError("the GPU could not make a stream")

    api = SimpleNamespace(Runtime=lambda log: None, ILogger=object)
    monkeypatch.setattr(cuda, "CudaDevice", Device)
    monkeypatch.setattr(ort_cuda, "check_provider", lambda: None)
    monkeypatch.setattr(engine.backends, "open_library", lambda name: trt.TrtLibrary(name, api, "10"))
    with pytest.raises(BackendError, match="make a stream"):
        make_backend(name, device="cuda")
    assert closed == ["the GPU"]
    monkeypatch.setattr(Device, "stream", lambda self: None)
    make_backend(name, device="cuda")
    assert closed == ["the GPU"]  # once: a backend that was made keeps its own
