"""A device's matrix rate: what it reaches on one large product, which no network will go beyond.

It is measured by the library at hand, in a process of its own. On CPUs that is ONNX Runtime in float32, which
is what its CPU provider computes fp16 graphs in too, and torch in bfloat16; on GPUs torch, or ONNX Runtime's CUDA
provider where torch has no CUDA.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.bundle.graphspec import Precision
from engine.errors import BackendError

_CPU_SIDE, _GPU_SIDE = 2048, 8192
#: Products in a row, so that a call's overhead is a small part: 8 on a fast GPU are about 10 ms.
_GPU_CHAIN = 8
_LEAST_SECONDS, _LEAST_RUNS = 2.0, 5


@dataclass(frozen=True)
class MatrixRate:
    """How fast products of matrices go.

    Attributes:
        tflops: 1e12 multiplications and additions a second, by the precision of a graph.
        how: library, types and size, in words.
    """

    tflops: dict[Precision, float]
    how: str

    def or_faster(self, other: MatrixRate) -> MatrixRate:
        """Return, for each precision of either, the faster of two measurements."""
        names = dict.fromkeys([*self.tflops, *other.tflops])
        both = {name: [each.tflops[name] for each in (self, other) if name in each.tflops] for name in names}
        longer = max((self, other), key=lambda each: len(each.tflops))
        return MatrixRate({name: max(rates) for name, rates in both.items()}, longer.how)


def given_rate(tflops: float, precisions: Sequence[Precision]) -> MatrixRate:
    """Return the rate that the user states, for all precisions alike."""
    return MatrixRate(dict.fromkeys(precisions, tflops), "given by --matrix-tflops")


def measure_rate(precisions: Sequence[Precision], gpu: int | None, threads: int = 0) -> MatrixRate:
    """Measure the matrix rate of a device; the fastest of several runs counts.

    Args:
        precisions: that the graphs are computed in which are to be compared with it.
        gpu: its number, None for the CPU.
        threads: of the CPU; 0 is one per core.
    Raises:
        BackendError: no library at hand can use the GPU.
    """
    if gpu is None:
        return _cpu_rate(precisions, threads)
    library, product = _gpu_library(gpu)
    rates = {
        precision: _fastest_tflops(product(_DTYPES[precision]), _GPU_SIDE, _GPU_CHAIN)
        for precision in dict.fromkeys(precisions)
    }
    types = ", ".join(_DTYPES[precision] for precision in rates)
    return MatrixRate(rates, f"{library}, {types}, {_GPU_SIDE} × {_GPU_SIDE}")


def _cpu_rate(precisions: Sequence[Precision], threads: int) -> MatrixRate:
    rates: dict[Precision, float] = {}
    how = []
    if wide := [precision for precision in precisions if precision != "bf16"]:
        rate = _fastest_tflops(_onnx_product("float32", _CPU_SIDE, 1, None, threads), _CPU_SIDE, 1)
        rates, how = dict.fromkeys(wide, rate), ["ONNX Runtime, float32"]
    if "bf16" in precisions:
        import torch

        if threads:
            torch.set_num_threads(threads)
        product = _torch_product("bfloat16", torch.device("cpu"), _CPU_SIDE, 1)
        rates["bf16"] = _fastest_tflops(product, _CPU_SIDE, 1)
        how.append("torch, bfloat16")
    return MatrixRate(rates, f"{' and '.join(how)}, {_CPU_SIDE} × {_CPU_SIDE}")


_DTYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def _gpu_library(gpu: int) -> tuple[str, Callable[[str], Callable[[], None]]]:
    try:
        import torch
    except ModuleNotFoundError:
        pass
    else:
        if torch.cuda.is_available():
            place = torch.device("cuda", gpu)
            return "torch", lambda dtype: _torch_product(dtype, place, _GPU_SIDE, _GPU_CHAIN)
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        from engine.backends.ort_cuda import load_cuda_libraries

        load_cuda_libraries()
        return "ONNX Runtime (CUDA)", lambda dtype: _onnx_product(dtype, _GPU_SIDE, _GPU_CHAIN, gpu, 0)
    raise BackendError(
        "nothing here can measure the GPU's matrix rate",
        expected="torch with CUDA, or onnxruntime-gpu",
        fix="install one of them, or give the rate: --matrix-tflops",
    )


def _fastest_tflops(product: Callable[[], None], side: int, chain: int) -> float:
    product()  # allocates, chooses a kernel, wakes the clocks up
    seconds: list[float] = []
    while sum(seconds) < _LEAST_SECONDS or len(seconds) < _LEAST_RUNS:
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return chain * 2 * side**3 / min(seconds) / 1e12


def _torch_product(dtype: str, place: Any, side: int, chain: int) -> Callable[[], None]:
    """Return a call that multiplies matrices `chain` times on a `torch.device`, and waits for the result."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32, as in the engine
    left, right = (torch.randn(side, side, device=place).to(getattr(torch, dtype)) for _ in range(2))
    result = torch.empty_like(left)

    def product() -> None:
        for _ in range(chain):
            torch.matmul(left, right, out=result)
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    return product


def _onnx_product(dtype: str, side: int, chain: int, gpu: int | None, threads: int) -> Callable[[], None]:
    """Return a call that multiplies a matrix `chain` times, on the device: nothing is copied to or from it."""
    import onnxruntime
    from onnx import TensorProto, helper

    kind, index = ("cpu", 0) if gpu is None else ("cuda", gpu)
    inner = getattr(TensorProto, dtype.upper().replace("FLOAT32", "FLOAT"))
    # NumPy has no bfloat16, so what is bound is float32, and cast inside; a cast is nothing beside a product.
    nodes = [helper.make_node("Cast", [name], [f"{name}_0"], to=inner) for name in ("left", "right")]
    nodes += [helper.make_node("MatMul", [f"left_{i}", "right_0"], [f"left_{i + 1}"]) for i in range(chain)]
    nodes.append(helper.make_node("Cast", [f"left_{chain}"], ["result"], to=TensorProto.FLOAT))
    left, right, result = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side]) for name in ("left", "right", "result")
    )
    graph = helper.make_graph(nodes, "product", [left, right], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    provider: Any = "CPUExecutionProvider" if gpu is None else ("CUDAExecutionProvider", {"use_tf32": "0"})
    if gpu is not None:
        provider[1]["device_id"] = str(gpu)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
    if gpu is not None and "CUDAExecutionProvider" not in session.get_providers():  # it falls back without a word
        raise BackendError(
            "ONNX Runtime's CUDA provider does not load",
            where="the GPU's matrix rate",
            fix="install what onnxruntime-gpu asks for, or give the rate: --matrix-tflops",
        )
    binding = session.io_binding()
    random = np.random.default_rng(0)
    for name, scale in (("left", 1.0), ("right", side**-0.5)):  # the product's values stay about 1
        values = (random.standard_normal((side, side), dtype=np.float32) * scale).astype(np.float32)
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values, kind, index))
    place = onnxruntime.OrtValue.ortvalue_from_shape_and_type([side, side], np.float32, kind, index)
    binding.bind_ortvalue_output("result", place)
    return lambda: session.run_with_iobinding(binding)
