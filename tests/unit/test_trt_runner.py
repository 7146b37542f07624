"""TensorRT's runner against a library that only writes down: sizes, addresses, memory, refits."""

from types import SimpleNamespace

import numpy as np
import pytest

from engine.backends import trt
from engine.backends.trt import Arena, TrtRunner, check_probe, refit
from engine.backends.trt_library import TrtLibrary
from engine.errors import BackendError
from engine.graphspec import GraphSpec, TensorSpec
from engine.profiles import Profile, Range

SPEC = GraphSpec(
    name="unet",
    precision="fp16",
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("B", 4, "h", "w")),
        TensorSpec(name="vector", dtype="float16", shape=("B", 10)),
    ),
    outputs=(TensorSpec(name="eps", dtype="float32", shape=("B", 4, "h", "w")),),
)
PROFILES = (
    Profile(ranges={"B": Range(1, 2, 2), "h": Range(8, 8, 8), "w": Range(8, 8, 8)}),
    Profile(ranges={"B": Range(1, 2, 4), "h": Range(8, 16, 32), "w": Range(8, 16, 32)}),
)


class Buffer:
    def __init__(self, shape, dtype, address):
        self.shape, self.dtype, self.address, self.closed = tuple(shape), dtype, address, False
        self.nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize

    def close(self):
        self.closed = True


class Device:
    def __init__(self):
        self.made = []

    def buffer(self, shape, dtype):
        self.made.append(Buffer(shape, dtype, 0x1000 * (1 + len(self.made))))
        return self.made[-1]


class Context:
    def __init__(self):
        self.calls, self.works = [], True

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            return self.works

        return call


class Engine:
    device_memory_size_v2 = 4096

    def __init__(self):
        self.contexts, self.config = [], None

    def create_execution_context(self, config):
        self.config = config
        self.contexts.append(Context())
        return self.contexts[-1]


STREAM = SimpleNamespace(handle=42, synchronize=lambda: None)


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def runner(engine, device):
    api = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="ours"))
    plan = SimpleNamespace(profiles=PROFILES)
    log = SimpleNamespace(last="out of memory")
    arena = Arena(device, STREAM)
    return TrtRunner(engine, SPEC, plan, TrtLibrary("tensorrt", api, "10"), device, STREAM, arena, None, log)


def tensors(rows, height, width):
    x = Buffer((rows, 4, height, width), "float32", 1)
    return {"x": x, "vector": Buffer((rows, 10), "float16", 2)}, {"eps": Buffer(x.shape, "float32", 3)}


def test_a_size_gets_a_context_with_its_profile_shapes_addresses_and_memory(runner, engine, device):
    runner.enqueue(STREAM, *tensors(2, 8, 8))
    assert engine.config == "ours"
    (arena,) = device.made
    assert arena.nbytes >= 4096
    assert engine.contexts[0].calls == [
        ("set_optimization_profile_async", 0, 42),
        ("set_input_shape", "x", (2, 4, 8, 8)),
        ("set_input_shape", "vector", (2, 10)),
        ("set_device_memory", arena.address, 4096),
        ("set_tensor_address", "x", 1),
        ("set_tensor_address", "vector", 2),
        ("set_tensor_address", "eps", 3),
        ("execute_async_v3", 42),
    ]


def test_each_size_keeps_its_own_context_because_a_recording_may_hold_it(runner, engine):
    for rows, side in ((2, 8), (4, 16), (2, 8)):
        runner.enqueue(STREAM, *tensors(rows, side, side))
    assert [context.calls[0] for context in engine.contexts] == [
        ("set_optimization_profile_async", 0, 42),
        ("set_optimization_profile_async", 1, 42),
    ]
    assert engine.contexts[0].calls.count(("execute_async_v3", 42)) == 2


def test_a_size_without_a_profile_a_wrong_type_and_a_failure_are_told(runner, engine):
    with pytest.raises(BackendError, match="not compiled for this size"):
        runner.enqueue(STREAM, *tensors(2, 64, 8))
    inputs, outputs = tensors(2, 8, 8)
    inputs["vector"] = Buffer((2, 10), "float32", 2)
    with pytest.raises(BackendError, match=r"unet\.vector: wrong dtype"):
        runner.enqueue(STREAM, inputs, outputs)
    runner.enqueue(STREAM, *tensors(2, 8, 8))
    engine.contexts[0].works = False
    with pytest.raises(BackendError, match="unet: TensorRT could not run the graph") as caught:
        runner.enqueue(STREAM, *tensors(2, 8, 8))
    assert "--vram-budget" in str(caught.value)


def test_an_arena_is_one_piece_that_grows_when_nothing_uses_it(device):
    waited = []
    arena = Arena(device, SimpleNamespace(synchronize=lambda: waited.append(len(device.made))))
    first = arena.at_least(100)
    assert arena.at_least(50) is first
    second = arena.at_least(1000)
    assert second is not first
    assert first.closed
    assert waited == [1]  # before there was a second one
    arena.close()
    assert second.closed


# -- weightless plans -----------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path):
    return SimpleNamespace(
        path=tmp_path, file=lambda file: tmp_path / file, manifest=SimpleNamespace(backend="tensorrt")
    )


def library_that(*, parses=True, missing=(), refits=True):
    calls = []

    class Refitter:
        def __init__(self, engine, log):
            calls.append(engine)

        def get_missing_weights(self):
            return list(missing)

        def refit_cuda_engine(self):
            calls.append("refit")
            return refits

    class Parser:
        def __init__(self, refitter, log):
            pass

        def refit_from_file(self, path):
            calls.append(path)
            return parses

    return SimpleNamespace(Refitter=Refitter, OnnxParserRefitter=Parser, calls=calls)


GRAPH = SimpleNamespace(spec=SPEC, file="unet.onnx", probe="unet.probe.npz")


def test_a_refit_takes_all_weights_of_the_graph_at_once(bundle):
    api = library_that()
    refit("engine", bundle, GRAPH, api, SimpleNamespace(last=""))
    assert api.calls == ["engine", str(bundle.path / "unet.onnx"), "refit"]


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ({"parses": False}, "no such layer"),
        ({"missing": ["unet.conv_in.weight", "b"]}, "without unet.conv_in.weight and 1 others"),
        ({"refits": False}, "no such layer"),
    ],
)
def test_a_refit_that_fails_is_told_and_nothing_runs(bundle, failure, words):
    with pytest.raises(BackendError, match="could not be filled") as caught:
        refit("engine", bundle, GRAPH, library_that(**failure), SimpleNamespace(last="no such layer"))
    assert words in str(caught.value)


def test_a_refitted_plan_must_agree_with_the_probe(bundle):
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((1, 4, 8, 8), np.float32), "vector": np.ones((1, 10), np.float16)}
    expected = rng.standard_normal((1, 4, 8, 8), np.float32)
    np.savez(bundle.path / "unet.probe.npz", **inputs, **{"expected eps": expected})

    def runner(result):
        def infer(given):
            assert all(np.array_equal(given[name], array) for name, array in inputs.items())
            return {"eps": result}

        return SimpleNamespace(infer=infer)

    check_probe(runner(expected * 1.001), bundle, GRAPH)
    for wrong in (expected * 1.02, np.zeros_like(expected), expected[:, ::-1], np.full_like(expected, np.nan)):
        with pytest.raises(BackendError, match=r"unet\.eps: the refitted plan disagrees"):
            check_probe(runner(wrong), bundle, GRAPH)


def test_the_bound_of_each_precision_is_looser_than_its_rounding():
    assert trt._PROBE_BOUNDS["fp32"] < trt._PROBE_BOUNDS["fp16"] < trt._PROBE_BOUNDS["bf16"] < 0.1


# -- TensorRT's timing cache ----------------------------------------------------------------------


class Config:
    def __init__(self, refuses=b""):
        self.refuses, self.cache = refuses, None

    def create_timing_cache(self, blob):
        return blob

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        if cache and cache == self.refuses:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return SimpleNamespace(serialize=lambda: self.cache + b" and more")


def test_a_timing_cache_grows_from_build_to_build(tmp_path):
    plans = pytest.importorskip("export.plans", reason="needs the export extra")
    file = tmp_path / ".bundle.timings"
    for expected in (b" and more", b" and more and more"):
        config = Config()
        plans.read_timing_cache(config, file)
        plans.keep_timing_cache(config, file)
        assert file.read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == [".bundle.timings"]


def test_a_timing_cache_of_another_gpu_is_left_out(tmp_path):
    plans = pytest.importorskip("export.plans", reason="needs the export extra")
    file = tmp_path / ".bundle.timings"
    file.write_bytes(b"of another")
    config = Config(refuses=b"of another")
    plans.read_timing_cache(config, file)
    assert config.cache == b""
