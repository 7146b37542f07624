"""Backends by name; a library is imported only when its backend is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack

from engine.backends.base import Backend
from engine.backends.ov_library import Compute, is_faster_in_bf16, is_installed
from engine.backends.trt_library import PLAN_BACKENDS, open_library
from engine.bundle.manifest import Manifest
from engine.device.interface import Device
from engine.errors import UsageError

#: The backend of Intel's library, which has devices of its own.
OPENVINO = "openvino"
BACKENDS = ("onnxruntime", OPENVINO, *PLAN_BACKENDS)
#: More CPU threads than this are a mistake: there is a pool of them for each graph.
MAX_THREADS = 256
_DEVICE = re.compile(r"auto|cpu|gpu|npu|cuda(?::(?P<index>\d{1,3}))?")


def make_backend(name: str, *, device: str = "auto", threads: int = 0, compute: Compute = "auto") -> Backend:
    """Return the backend called `name`.

    Args:
        name: one of `BACKENDS`.
        device: "cpu"; "cuda", "cuda:1", … for an NVIDIA GPU; "gpu" or "npu" for Intel's, with OpenVINO. "auto" is the
            CPU for ONNX Runtime and OpenVINO, else the first NVIDIA GPU.
        threads: that one operator may use on a CPU; 0 is one per core.
        compute: the type that OpenVINO computes in; "auto" is bf16 where the bundle is not in fp32 and the CPU has
            units that are faster in it (AMX, or AMD's AVX-512), else fp32.
    Raises:
        UsageError: there is no such backend or device, the two do not fit, or the number of threads is impossible.
        BackendError: a library, the driver or the device is missing, or it does not compute in that type.
    """
    if not 0 <= threads <= MAX_THREADS:
        raise UsageError("impossible number of threads", expected=f"0 to {MAX_THREADS}", found=threads)
    index = gpu_index(name, device)
    if name == OPENVINO:
        from engine.backends.ov import OpenVinoBackend
        from engine.backends.ov_library import open_library as open_openvino

        return OpenVinoBackend(open_openvino(device), threads, compute)
    if compute != "auto":
        raise UsageError(
            "only OpenVINO can compute in another type than the graphs say",
            where=f"--compute {compute}",
            expected="--backend openvino",
            found=f"--backend {name}",
            fix=f"add --backend openvino, or leave --compute out: {name} computes as the bundle was built",
        )
    if index is None:
        from engine.backends.ort import OrtBackend

        return OrtBackend(threads)
    if name == "onnxruntime":
        from engine.backends.ort_cuda import OrtCudaBackend, check_provider

        check_provider()  # before the GPU is asked for: what is missing here is missing anyway
        return _on_gpu(index, lambda device: OrtCudaBackend(device, index))
    from engine.backends.trt import TrtBackend

    library = open_library(name)
    return _on_gpu(index, lambda device: TrtBackend(library, device))


def default_backend(manifest: Manifest, device: str = "auto") -> str:
    """Return the backend that a bundle runs on where none is named: the one that it was built for, but for one case.

    For a 16-bit bundle on a CPU that computes faster in bf16, OpenVINO, if it is installed, takes a third (AMX) to
    three quarters (AMD's AVX-512) of ONNX Runtime's time. In float32 it takes as long, or longer.
    Source: benchmarks/results/latency-openvino-2026-11-29.json, latency-cpu-bf16-2026-11-29.json.

    Args:
        manifest: of the bundle.
        device: as for `make_backend`.
    """
    in_16_bits = manifest.backend == "onnxruntime" and manifest.precision != "fp32"
    if in_16_bits and device in ("auto", "cpu") and is_faster_in_bf16() and is_installed():
        return OPENVINO
    return manifest.backend


def _on_gpu(index: int, make: Callable[[Device], Backend]) -> Backend:
    """Open a GPU and return the backend that is made of it; where that fails, the GPU is given back."""
    from engine.device.cuda import CudaDevice

    with ExitStack() as opened:
        backend = make(opened.enter_context(CudaDevice(index)))
        opened.pop_all()  # from here on, the backend closes it
    return backend


def gpu_index(name: str, device: str = "auto") -> int | None:
    """Return the number of the NVIDIA GPU that a backend would run on, None if it would use none; nothing is opened.

    Args:
        name, device: as for `make_backend`.
    Raises:
        UsageError: there is no such backend or device, or the backend does not run there.
    """
    if name not in BACKENDS:
        raise UsageError("no such backend", expected=", ".join(BACKENDS), found=name)
    place = _DEVICE.fullmatch(device)
    if place is None:
        raise UsageError("no such device", expected="auto, cpu, gpu, npu, cuda or cuda:N", found=device)
    if name == OPENVINO:
        if device.startswith("cuda"):
            fix = "--backend onnxruntime, tensorrt or tensorrt-rtx runs on NVIDIA's GPUs"
            raise UsageError(
                "OpenVINO does not run on NVIDIA's GPUs", expected="--device cpu, gpu or npu", found=device, fix=fix
            )
        return None
    if device in ("gpu", "npu"):
        raise UsageError(
            f"--device {device} is Intel's, for --backend openvino",
            expected="cpu, cuda or cuda:N",
            found=f"--backend {name}",
            fix="add --backend openvino; NVIDIA's GPUs are --device cuda",
        )
    on_cpu = device == "cpu" or (device == "auto" and name == "onnxruntime")
    if on_cpu and name in PLAN_BACKENDS:
        raise UsageError(f"--backend {name} runs on GPUs", expected="cuda or cuda:N", found=device)
    return None if on_cpu else int(place["index"] or 0)
