"""OpenVINO as a backend: devices, types, errors, and what is kept of compiled models between runs."""

import builtins
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine import backends
from engine.backends import gpu_index, make_backend, ov_cache, ov_library
from engine.backends.ov_cache import cache_key
from engine.bundle.manifest import open_bundle
from engine.bundle.onnx_file import with_weights
from engine.errors import BackendError, BundleError, OutOfMemoryError, UsageError
from engine.memory.residency import host_weights

openvino = pytest.importorskip("openvino", reason="needs the openvino extra")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


@pytest.fixture
def bundle(bundle_fp32):
    return open_bundle(bundle_fp32)


TEXT = {"input_ids": np.arange(77, dtype=np.int64)[None]}


def run_text(bundle, threads=1, compute="auto"):
    runner = make_backend("openvino", threads=threads, compute=compute).open(bundle, "text_encoder")
    return runner.infer(TEXT)["hidden"]


# -- what can be asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("openvino", {"device": "cuda"}, "does not run on NVIDIA's GPUs"),
        ("openvino", {"device": "gpu:1"}, "no such device"),
        ("onnxruntime", {"device": "npu"}, "is Intel's, for --backend openvino"),
        ("tensorrt", {"device": "gpu"}, "is Intel's, for --backend openvino"),
        ("onnxruntime", {"compute": "bf16"}, "only OpenVINO can compute in another type"),
        ("openvino", {"compute": "int8"}, "no such type"),
    ],
)
def test_what_does_not_go_together_is_refused(name, options, says):
    with pytest.raises(UsageError, match=says):
        make_backend(name, **options)


def test_openvino_uses_no_gpu_of_nvidias():
    assert [gpu_index("openvino", device) for device in ("auto", "cpu", "gpu", "npu")] == [None] * 4


def test_a_device_that_is_not_there_is_named():
    found = openvino.Core().available_devices
    if any(name.startswith("NPU") for name in found):
        pytest.skip("gpu: needs a computer without an NPU")
    with pytest.raises(BackendError, match="--device npu: OpenVINO finds none") as caught:
        make_backend("openvino", device="npu")
    assert caught.value.found == ", ".join(found)


def test_a_missing_library_says_what_installs_it(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "openvino":
            raise ModuleNotFoundError("No module named 'openvino'", name=name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match="not installed") as caught:
        make_backend("openvino")
    assert "pip install 'restoration-engine[openvino]'" in caught.value.fix


def test_an_old_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(__version__="2026.3.1-1-releases/2026/3"))
    with pytest.raises(BackendError, match="too old") as caught:
        make_backend("openvino")
    assert caught.value.expected == "2026.4 or newer"


AMX, AVX512, AVX2 = "fma amx_bf16 avx512_bf16", "fma avx512_bf16", "fma avx2"
INTEL, AMD = "GenuineIntel", "AuthenticAMD"


@pytest.fixture
def processor(monkeypatch):
    """Have the system tell of another processor."""

    def become(flags, vendor=INTEL):
        told = {"flags": flags, "vendor_id": vendor}
        monkeypatch.setattr(ov_library, "_cpu_fact", lambda name: told[name])

    return become


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/cpuinfo")
def test_the_processor_is_read():
    assert "fpu" in ov_library.cpu_flags()
    assert ov_library._cpu_fact("vendor_id") in (INTEL, AMD)


@pytest.mark.parametrize(
    ("flags", "vendor", "bundle_precision", "asked", "computed"),
    [
        (AMX, INTEL, "fp32", "auto", "fp32"),
        (AMX, INTEL, "fp16", "auto", "bf16"),
        (AMX, INTEL, "bf16", "auto", "bf16"),
        (AMX, INTEL, "fp16", "fp32", "fp32"),
        (AMX, INTEL, "fp32", "bf16", "bf16"),
        (AVX512, INTEL, "bf16", "auto", "fp32"),
        (AVX512, INTEL, "bf16", "bf16", "bf16"),
        (AVX512, AMD, "bf16", "auto", "bf16"),
        (AVX512, AMD, "fp32", "auto", "fp32"),
        (AVX2, AMD, "fp16", "auto", "fp32"),
        (AVX2, INTEL, "fp16", "bf16", None),
        ("", "", "fp16", "auto", "fp32"),  # the system does not tell
        ("", "", "fp16", "bf16", "bf16"),
    ],
)
def test_the_processor_and_the_bundle_choose_the_type(processor, flags, vendor, bundle_precision, asked, computed):
    processor(flags, vendor)
    library = SimpleNamespace(device="CPU", device_name="a processor")
    if computed is None:
        with pytest.raises(BackendError, match="no bf16 units"):
            ov_library.choose_compute(library, asked)
        return
    ov_library.choose_compute(library, asked)
    assert ov_library.compute_of(library, asked, bundle_precision, "fp32") == computed


def test_a_gpu_computes_as_the_graph_is_written():
    library = SimpleNamespace(device="GPU")
    assert [ov_library.compute_of(library, "auto", "fp16", graph) for graph in ("fp32", "fp16", "bf16")] == [
        "fp32",
        "fp16",
        "fp32",
    ]
    with pytest.raises(BackendError, match="for CPUs"):
        ov_library.choose_compute(library, "bf16")


def test_weights_are_counted_in_the_type_they_are_computed_in(bundle, bundle_fp16):
    wide, narrow = host_weights(bundle), host_weights(bundle, "bf16")
    assert all(wide[name] == graph.weights_bytes for name, graph in bundle.manifest.graphs.items())
    assert all(wide[name] == 2 * narrow[name] for name in wide)
    half = open_bundle(bundle_fp16)
    assert host_weights(half, "bf16")["unet"] == half.manifest.graphs["unet"].weights_bytes
    assert host_weights(half, "fp32")["unet"] == 2 * half.manifest.graphs["unet"].weights_bytes
    assert host_weights(half, "bf16")["vae_decoder"] == half.manifest.graphs["vae_decoder"].weights_bytes // 2


# -- compiled models ------------------------------------------------------------------------------


def blobs(folder):
    return sorted(folder.glob("*.blob"))


def test_a_second_start_takes_the_compiled_model_and_gives_the_same(bundle, cache, monkeypatch):
    first = run_text(bundle)
    (file,) = blobs(cache)
    assert file.stat().st_size < bundle.manifest.graphs["text_encoder"].weights_bytes  # it holds no weights
    backend = make_backend("openvino", threads=1)

    def compile_model(*_):
        raise AssertionError("it was compiled again")

    core = backend.library.core
    known = SimpleNamespace(get_property=core.get_property, import_model=core.import_model, compile_model=compile_model)
    object.__setattr__(backend.library, "core", known)
    again = backend.open(bundle, "text_encoder").infer(TEXT)["hidden"]
    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"\xa5" * len(content),
        lambda content: content[:-100] + bytes(100),
    ],
    ids=["cut short", "empty", "garbage", "its end is zeros"],
)
def test_a_damaged_compiled_model_is_made_again(bundle, cache, damage):
    first = run_text(bundle)
    (file,) = blobs(cache)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert np.array_equal(first, run_text(bundle))
    assert len(blobs(cache)) == 1
    assert ov_cache.load(file.stem) is not None


def test_a_model_that_is_whole_but_not_openvinos_is_made_again(bundle, cache):
    first = run_text(bundle)
    (file,) = blobs(cache)
    ov_cache.store(file.stem, b"of another version")
    assert np.array_equal(first, run_text(bundle))
    assert ov_cache.load(file.stem) != b"of another version"


def test_a_folder_that_cannot_be_written_to_only_costs_time(bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path / "file"))
    assert run_text(bundle).shape[1] == 77


def test_other_weights_are_another_model(cache, bundle, build_bundle, tmp_path):
    """The graph is the same file: what differs lies outside of it, where OpenVINO might not look."""
    first = run_text(bundle)
    other = tmp_path / "other"
    import shutil

    shutil.copytree(bundle.path, other)
    weights = other / bundle.manifest.weights.name
    content = bytearray(weights.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    values = np.frombuffer(content, np.float32, offset=header)
    values *= np.float32(1.5)
    weights.write_bytes(content)
    from engine.bundle.files import describe_file
    from engine.bundle.manifest import Bundle

    changed = bundle.manifest.model_copy(update={"weights": describe_file(weights)})
    second = run_text(Bundle(other, changed, "another"))
    assert len(blobs(cache)) == 2
    assert not np.allclose(first, second, atol=1e-3)


def test_every_part_of_a_key_matters():
    parts = {
        "version": "1",
        "processor": "a",
        "properties": {"INFERENCE_PRECISION_HINT": "f32"},
        "graph": "g",
        "weights": "w",
        "part": "whole",
        "shapes": {"x": (1, 2)},
    }
    others = [
        {"version": "2"},
        {"processor": "b"},
        {"properties": {"INFERENCE_PRECISION_HINT": "bf16"}},
        {"graph": "h"},
        {"weights": "v"},
        {"part": "from the last norm"},
        {"shapes": {"x": (2, 2)}},
    ]
    keys = {cache_key(**parts), *(cache_key(**{**parts, **change}) for change in others)}
    assert len(keys) == 1 + len(others)


def test_the_cache_stays_within_its_size(cache, monkeypatch):
    monkeypatch.setattr(ov_cache, "MAX_BYTES", 4000)
    for number in range(6):
        ov_cache.store(f"{number}", bytes(900))
        os.utime(cache / f"{number}.blob", (number, number))
        if number >= 1:
            os.utime(cache / "1.blob", (100, 100))  # used again and again
    assert [file.stem for file in blobs(cache)] == ["1", "3", "4", "5"]
    ov_cache.store("large", bytes(2000))
    assert ov_cache.load("large") is None


# -- running --------------------------------------------------------------------------------------


def test_a_graph_stays_compiled_for_the_shapes_seen_last(bundle, cache):
    runner = make_backend("openvino", threads=1).open(bundle, "text_encoder")
    for rows in (1, 2, 3, 4, 5, 1):
        runner.infer({"input_ids": np.zeros((rows, 77), np.int64)})
    assert len(runner._chains) == 4
    assert len(blobs(cache)) == 5


def test_results_are_the_callers(bundle):
    """The next call does not write over them."""
    runner = make_backend("openvino", threads=1).open(bundle, "text_encoder")
    first = runner.infer(TEXT)["hidden"]
    kept = first.copy()
    runner.infer({"input_ids": TEXT["input_ids"] + 1})
    assert np.array_equal(first, kept)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_vae_gives_its_activations_back(bundle, cache):
    from engine.memory.host_memory import release_free_memory

    def held():
        release_free_memory()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    runner = make_backend("openvino", threads=1).open(bundle, "vae_decoder")
    small, large = (np.zeros((1, bundle.latent_channels, side, side), np.float32) for side in (8, 64))
    first = runner.infer({"z": large})["pixels"]
    runner.infer({"z": small})
    released = held()
    chain = next(iter(runner._chains.values()))
    chain.infer({"z": large})  # without the runner, which would release
    assert held() - released > 2 * first.nbytes
    assert np.array_equal(runner.infer({"z": large})["pixels"], first)
    assert held() - released < first.nbytes + (8 << 20)


def test_views_of_arrays_are_read_as_they_are(bundle):
    runner = make_backend("openvino", threads=1).open(bundle, "vae_decoder")
    z = np.random.default_rng(0).normal(size=(1, bundle.latent_channels, 8, 16)).astype(np.float32)
    turned = np.ascontiguousarray(z.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    assert not turned.flags.c_contiguous
    assert np.array_equal(runner.infer({"z": z})["pixels"], runner.infer({"z": turned})["pixels"])


def test_a_graph_that_cannot_be_compiled_is_named(bundle, cache, monkeypatch):
    runner = make_backend("openvino").open(bundle, "text_encoder")
    monkeypatch.setattr(type(bundle), "file", lambda self, entry: self.path / "manifest.json")  # no graph
    with pytest.raises(BackendError, match="OpenVINO cannot compile the graph") as caught:
        runner.infer(TEXT)
    assert caught.value.where == "text_encoder"
    assert "Exception from" not in caught.value.found


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("Exception from src/core.cpp:1:\nstd::bad_alloc\n"), True),
        (RuntimeError("[GPU] out of GPU resources\nCL_OUT_OF_HOST_MEMORY"), True),
        (RuntimeError("could not allocate memory"), True),
        (RuntimeError("Exception from src/core.cpp:1:\nCheck 'x' failed\nunsupported operation Foo"), False),
    ],
    ids=str,
)
def test_errors_of_the_library_are_told_in_our_words(error, is_memory):
    for doing in ("compile", "run"):
        found = ov_library.translated(error, "unet", doing)
        assert isinstance(found, BackendError)
        assert isinstance(found, OutOfMemoryError) is is_memory
        assert found.where == "unet"
    bug = ValueError("of ours")
    assert ov_library.translated(bug, "unet", "run") is bug


#: Compiles a graph of 256 MiB of weights in a process that may have little more than it has.
SHORT_OF_MEMORY = """
import resource, sys
import numpy as np, openvino as ov
from pathlib import Path
from openvino import opset13 as ops
from engine.backends.ov_library import translated
from engine.errors import OutOfMemoryError
x = ops.parameter([1, 8192], np.float32)
weights = ops.constant(np.ones((8192, 8192), np.float32))
model = ov.Model([ops.matmul(x, weights, False, False)], [x])
core = ov.Core()
core.compile_model(ov.Model([ops.relu(x)], [x]), "CPU")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
try:
    core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"})
except Exception as error:
    assert isinstance(translated(error, "unet", "compile"), OutOfMemoryError), repr(error)
    print("told")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the address space")
def test_a_process_that_is_short_of_memory_is_told_so_when_it_compiles_a_graph():
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, check=False)
    assert done.stdout == "told\n", done.stderr[-2000:]


# -- segments -------------------------------------------------------------------------------------


def test_weights_move_into_a_graph(bundle):
    onnx = pytest.importorskip("onnx")
    for segment in bundle.manifest.graphs["vae_decoder"].segments:
        content = bundle.read_segment("vae_decoder", segment)
        whole = onnx.load(io.BytesIO(content), load_external_data=False)
        onnx.external_data_helper.load_external_data_for_model(whole, str(bundle.path))
        ours = onnx.load(io.BytesIO(with_weights(content, bundle.path, "a segment")))
        for tensor in (*whole.graph.initializer, *ours.graph.initializer):
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
        assert ours == whole


def test_weights_that_are_not_there_are_named(bundle, tmp_path):
    segment = bundle.manifest.graphs["vae_decoder"].segments[0]
    content = bundle.read_segment("vae_decoder", segment)
    backend = make_backend("openvino")
    with pytest.raises(BundleError, match=r"weights\.safetensors: cannot be read"):
        backend.open_segment(segment, content, tmp_path).__enter__()
    (tmp_path / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(BundleError, match="ends before the weights do"):
        backend.open_segment(segment, content, tmp_path).__enter__()


def test_segments_leave_no_files(bundle, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(bundle.path.iterdir())
    segment = bundle.manifest.graphs["vae_decoder"].segments[0]
    content = bundle.read_segment("vae_decoder", segment)
    z = np.zeros((1, bundle.latent_channels, 8, 8), np.float32)
    with make_backend("openvino").open_segment(segment, content, bundle.path) as runner:
        runner.infer({segment.maps[0]: z})
    assert sorted(bundle.path.iterdir()) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "built_for", "device", "flags", "installed", "expected"),
    [
        ("fp16", "onnxruntime", "auto", AMX, True, "openvino"),
        ("fp16", "onnxruntime", "cpu", AMX, True, "openvino"),
        ("fp16", "onnxruntime", "cuda", AMX, True, "onnxruntime"),
        ("fp16", "onnxruntime", "auto", AVX512, True, "onnxruntime"),
        ("fp16", "onnxruntime", "auto", AMX, False, "onnxruntime"),
        ("fp32", "onnxruntime", "auto", AMX, True, "onnxruntime"),
        ("fp16", "tensorrt-rtx", "auto", AMX, True, "tensorrt-rtx"),
        ("fp32", "openvino", "auto", "", True, "openvino"),
    ],
)
def test_the_default_is_the_fastest_that_is_installed(
    monkeypatch, processor, precision, built_for, device, flags, installed, expected
):
    processor(flags)
    monkeypatch.setattr(backends, "is_installed", lambda: installed)
    assert backends.default_backend(SimpleNamespace(precision=precision, backend=built_for), device) == expected
