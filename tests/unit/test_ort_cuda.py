"""ONNX Runtime's CUDA provider, as far as it can be tried without a GPU: what it loads first, and its errors."""

from types import SimpleNamespace

import pytest

from engine.backends import ort_cuda
from engine.backends.ort_cuda import OrtCudaBackend, check_placement, check_provider, load_cuda_libraries
from engine.bundle.manifest import open_bundle
from engine.errors import BackendError
from engine.memory.residency import Activations


@pytest.fixture
def backend():
    device = SimpleNamespace(stream=lambda: SimpleNamespace(handle=7), close=lambda: None)
    load_cuda_libraries.cache_clear()
    yield OrtCudaBackend(device, 0)
    load_cuda_libraries.cache_clear()


def test_without_the_provider_the_message_says_how_to_replace_the_package(monkeypatch):
    monkeypatch.setattr(ort_cuda.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="this ONNX Runtime has no CUDA provider") as caught:
        check_provider()
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'" in str(
        caught.value
    )


def test_libraries_are_loaded_before_the_first_session_and_once(backend, bundle_fp32, monkeypatch, capsys):
    """What the library prints meanwhile goes into the error, not to where a report goes."""
    done = []

    def preload():
        done.append("preload")
        print("Failed to load libcudnn.so.9: cannot open shared object file")

    def open_session(graph, providers, spec, folder, options):
        done.append("session")
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(ort_cuda.ort, "preload_dlls", preload)
    monkeypatch.setattr(ort_cuda, "open_session", open_session)
    bundle = open_bundle(bundle_fp32)
    for _ in range(2):
        with pytest.raises(BackendError, match="CUDA provider does not load") as caught:
            backend.open(bundle, "unet")
    assert done == ["preload", "session", "session"]
    assert "Failed to load libcudnn.so.9" in caught.value.found
    assert "onnxruntime-gpu[cuda,cudnn]" in caught.value.fix
    assert capsys.readouterr().out == ""


def test_an_older_library_has_nothing_to_load(backend, monkeypatch):
    monkeypatch.delattr(ort_cuda.ort, "preload_dlls", raising=False)
    assert load_cuda_libraries() == ""


def test_its_memory_is_not_known_beforehand_and_its_weights_stay(backend):
    assert backend.known_activations(None, "unet", ()) == Activations(None)
    assert not backend.can_stream_weights(None, "unet")


def session_of(operators):
    """Return a real session on the CPU of a chain of operators, which records where its nodes are."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    nodes = [helper.make_node(*node, name=f"node {number}") for number, node in enumerate(operators)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "n"])
    y = helper.make_value_info("y", onnx.TypeProto())
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    options = ort_cuda.ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return ort_cuda.ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.skipif(
    not hasattr(ort_cuda.ort.InferenceSession, "get_provider_graph_assignment_info"), reason="an older onnxruntime"
)
def test_work_that_stays_on_the_cpu_is_refused_and_shapes_are_not():
    with pytest.raises(BackendError) as caught:
        check_placement(session_of([("MatMul", ["x", "x"], ["y"])]), "unet")
    assert caught.value.where == "unet"
    assert "MatMul" in caught.value.found
    check_placement(session_of([("Shape", ["x"], ["s"]), ("Expand", ["x", "s"], ["y"])]), "unet")


def test_work_on_the_gpu_and_versions_that_do_not_tell_pass():
    node = SimpleNamespace(op_type="MatMul", name="a")
    on_gpu = SimpleNamespace(ep_name="CUDAExecutionProvider", get_nodes=lambda: [node])
    check_placement(SimpleNamespace(get_provider_graph_assignment_info=lambda: [on_gpu]), "unet")
    check_placement(SimpleNamespace(), "unet")
