"""What ONNX Runtime raises, told in our words: above all whether memory was missing."""

import subprocess
import sys

import pytest

from engine.backends import ort as backend
from engine.bundle.graphspec import GraphSpec
from engine.errors import BackendError, OutOfMemoryError

pytest.importorskip("onnx")

#: As ONNX Runtime, the C++ library and CUDA's libraries say it.
NO_MEMORY = (
    MemoryError(),
    RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 4294967296"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size)"),
    RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"),
)
OTHERS = (RuntimeError("INVALID_GRAPH : no Op registered for Foo"), OSError("no such file"))


SPEC = GraphSpec(name="unet", role="denoiser", precision="fp32", inputs=(), outputs=())


@pytest.mark.parametrize(
    ("error", "is_memory"), [(e, True) for e in NO_MEMORY] + [(e, False) for e in OTHERS], ids=lambda value: str(value)
)
def test_a_graph_that_memory_does_not_hold_is_told_apart(monkeypatch, tmp_path, error, is_memory):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(backend.ort, "InferenceSession", refuse)
    with pytest.raises(BackendError) as caught:
        backend.open_session(tmp_path / "unet.onnx", ["CPUExecutionProvider"], SPEC, tmp_path)
    assert isinstance(caught.value, OutOfMemoryError) is is_memory
    assert caught.value.where == str(tmp_path / "unet.onnx")


def test_a_run_that_memory_does_not_hold_says_how_much_was_asked_for():
    error = backend.translated(NO_MEMORY[1], "unet")
    assert isinstance(error, OutOfMemoryError)
    assert "4.29 GB" in error.found
    assert backend.translated(OTHERS[1], "unet") is OTHERS[1]


#: Opens a graph of 256 MiB of weights in a process that may have little more than it has.
SHORT_OF_MEMORY = """
import resource, sys
import numpy as np, onnx
from onnx import TensorProto, helper, numpy_helper
from pathlib import Path
from engine.backends.ort import open_session
from engine.errors import OutOfMemoryError
weights = numpy_helper.from_array(np.ones((1 << 26,), np.float32), "w")
x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1 << 26])
y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1 << 26])
graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weights])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
onnx.save(model, sys.argv[1])
del weights, graph, model
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
try:
    open_session(Path(sys.argv[1]), ["CPUExecutionProvider"], None, Path())
except OutOfMemoryError:
    print("told")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the address space")
def test_a_process_that_is_short_of_memory_is_told_so_when_it_opens_a_graph(tmp_path):
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(tmp_path / "large.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "told\n", done.stderr[-2000:]
