"""TensorRT's runner against a library that only writes down: sizes, addresses, memory, refits."""

from types import SimpleNamespace

import numpy as np
import pytest

from engine.backends import trt, trt_plan
from engine.backends.trt import Arena, TrtBackend, TrtRunner, stream_weights
from engine.backends.trt_library import TrtLibrary, make_log
from engine.backends.trt_memory import MemoryNotes, PlanMemory
from engine.backends.trt_plan import check_parity_sample, refit
from engine.bundle.graphspec import GraphSpec, TensorSpec
from engine.bundle.profiles import Profile, Range
from engine.errors import BackendError, OutOfMemoryError
from engine.memory.residency import Activations

SPEC = GraphSpec(
    name="unet",
    role="denoiser",
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

    def update_device_memory_size_for_shapes(self):
        """What a size needs: half of its profile's largest."""
        shapes = {call[1]: call[2] for call in self.calls if call[0] == "set_input_shape"}
        return 2048 if shapes["x"][2:] == (8, 8) and shapes["x"][0] <= 2 else 32768

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            return self.works

        return call


class Engine:
    """One whose second profile needs more; streaming adds to both."""

    streamable_weights_size, weight_streaming_scratch_memory_size = 1000, 64

    def __init__(self):
        self.contexts, self.config = [], None
        self.weight_streaming_budget_v2 = self.streamable_weights_size

    def get_device_memory_size_for_profile_v2(self, index):
        streams = self.weight_streaming_budget_v2 < self.streamable_weights_size
        return (4096, 65536)[index] + (self.weight_streaming_scratch_memory_size if streams else 0)

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
    plan = SimpleNamespace(profiles=PROFILES, flags=())
    log = SimpleNamespace(last="out of memory")
    arena = Arena(device, STREAM)
    library = TrtLibrary("tensorrt", api, "10")
    memory = PlanMemory(profiles=(4096, 65536))
    return TrtRunner(engine, SPEC, plan, library, device, STREAM, arena, None, log, memory)


def tensors(rows, height, width):
    x = Buffer((rows, 4, height, width), "float32", 1)
    return {"x": x, "vector": Buffer((rows, 10), "float16", 2)}, {"eps": Buffer(x.shape, "float32", 3)}


def test_a_size_gets_a_context_with_its_profile_shapes_addresses_and_memory(runner, engine, device):
    runner.enqueue(STREAM, *tensors(2, 8, 8))
    assert engine.config == "ours"
    (arena,) = device.made
    assert 2048 <= arena.nbytes < 4096
    assert engine.contexts[0].calls == [
        ("set_optimization_profile_async", 0, 42),
        ("set_input_shape", "x", (2, 4, 8, 8)),
        ("set_input_shape", "vector", (2, 10)),
        ("set_device_memory", arena.address, 2048),
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
    runner._log.last = "out of memory"
    with pytest.raises(OutOfMemoryError, match="unet: .*TensorRT could not run the graph") as caught:
        runner.enqueue(STREAM, *tensors(2, 8, 8))
    assert "--vram-budget" in str(caught.value)


def test_memory_for_activations_is_that_of_the_size_and_moves_when_it_has_to(runner, device):
    runner.enqueue(STREAM, *tensors(2, 8, 8))
    (small,) = device.made
    assert 2048 <= small.nbytes < 4096
    version = runner.memory_version
    runner.enqueue(STREAM, *tensors(4, 16, 16))
    assert small.closed
    assert 32768 <= device.made[-1].nbytes < 65536
    assert runner.memory_version != version  # what was recorded before points to what is gone
    version = runner.memory_version
    runner.enqueue(STREAM, *tensors(2, 8, 8))
    assert (runner.memory_version, len(device.made)) == (version, 2)
    assert runner.activations([{"B": 2, "h": 8, "w": 8}]) == Activations(2048)
    assert runner.activations([{"B": 2, "h": 8, "w": 8}, {"B": 4, "h": 8, "w": 8}]) == Activations(32768)
    with pytest.raises(BackendError, match="not compiled for this size"):
        runner.activations([{"B": 9, "h": 8, "w": 8}])


RECORDING = SimpleNamespace(handle=43)


def sizes_with_a_context(runner):
    return [key[1:] for key in runner._contexts]


def test_contexts_of_the_last_sizes_are_kept_and_of_what_is_recorded(engine, runner, device, monkeypatch):
    waited = []
    monkeypatch.setattr(runner, "_stream", SimpleNamespace(handle=42, synchronize=lambda: waited.append(1)))
    own = runner._stream
    kept = trt._CONTEXTS_KEPT
    runner.enqueue(RECORDING, *tensors(2, 8, 8))
    sides = list(range(9, 9 + kept + 2))
    for side in sides:
        runner.enqueue(own, *tensors(2, side, side))
    assert sizes_with_a_context(runner) == [(8, 8), *((side, side) for side in sides[-(kept - 1) :])]
    assert len(waited) == len(sides) - (kept - 1)  # none goes while the stream may be at work for it
    # What was used last stays longest.
    runner.enqueue(own, *tensors(2, sides[-3], sides[-3]))
    runner.enqueue(own, *tensors(2, 30, 30))
    assert sizes_with_a_context(runner) == [(8, 8), (sides[-1],) * 2, (sides[-3],) * 2, (30, 30)]
    made = len(engine.contexts)
    runner.enqueue(own, *tensors(2, 8, 8))
    assert len(engine.contexts) == made
    runner.forget_recordings()
    for side in (20, 21, 22, 23):
        runner.enqueue(own, *tensors(2, side, side))
    assert (8, 8) not in sizes_with_a_context(runner)


def test_more_recorded_contexts_than_are_kept_all_stay(runner):
    for side in range(8, 8 + trt._CONTEXTS_KEPT + 2):
        runner.enqueue(RECORDING, *tensors(2, side, side))
    assert len(sizes_with_a_context(runner)) == trt._CONTEXTS_KEPT + 2


def test_an_arena_is_one_piece_of_the_size_that_was_set_or_more(device):
    waited = []
    arena = Arena(device, SimpleNamespace(synchronize=lambda: waited.append(len(device.made))))
    first = arena.at_least(100)
    assert arena.at_least(50) is first
    second = arena.at_least(1000)
    assert second is not first
    assert first.closed
    assert waited == [1]  # before there was a second one
    arena.resize(1000)
    assert not second.closed
    arena.resize(200)  # another size of photos needs less
    assert second.closed
    assert device.made[-1].nbytes < 1000
    arena.close()
    assert all(buffer.closed for buffer in device.made)
    assert arena.moves == 3


def test_a_step_is_recorded_unless_the_library_or_the_plan_forbids_it(runner, engine, monkeypatch):
    assert runner.can_be_recorded
    runner.enqueue(STREAM, *tensors(2, 8, 8))
    assert runner.can_be_recorded
    assert engine.contexts[0].calls[-1] == ("is_stream_capturable", 42)
    engine.contexts[0].works = False
    assert not runner.can_be_recorded
    runner.enqueue(STREAM, *tensors(4, 16, 16))
    assert runner.can_be_recorded  # of the size that was run last
    monkeypatch.setattr(runner._plan, "flags", ("WEIGHT_STREAMING",))
    assert not runner.can_be_recorded


# -- weights on the host --------------------------------------------------------------------------


@pytest.mark.parametrize(("on_device", "budget"), [(1200, 1000), (700, 500), (200, 0), (100, 0)])
def test_weights_are_streamed_beyond_what_may_be_on_the_device(engine, on_device, budget):
    """Of 1200 bytes, 200 cannot be streamed."""
    graph = SimpleNamespace(spec=SPEC, weights_bytes=1200)
    stream_weights(engine, on_device, graph, SimpleNamespace(last=""))
    assert engine.weight_streaming_budget_v2 == budget


def test_a_library_that_does_not_stream_is_told():
    class Stubborn:
        streamable_weights_size = 1000
        weight_streaming_budget_v2 = property(lambda self: 1000, lambda self, value: None)

    graph = SimpleNamespace(spec=SPEC, weights_bytes=1000)
    with pytest.raises(BackendError, match="unet: TensorRT could not stream weights within"):
        stream_weights(Stubborn(), 500, graph, SimpleNamespace(last="not built for it"))


# -- the backend: what is asked once --------------------------------------------------------------


class Streams:
    """A device whose streams do nothing."""

    name, compute_capability = "a GPU", "8.9"

    def __init__(self):
        self.closed = False

    def stream(self):
        return STREAM

    def activate(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def backend(bundle, monkeypatch, tmp_path):
    """A backend whose runtime opens `Engine`, and a plan that belongs to it; says what was done."""
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path / "cache"))
    done = []
    engines = []

    class Runtime:
        def __init__(self, log):
            pass

        def deserialize_cuda_engine(self, data):
            engines.append(Engine())
            done.append("open")
            return engines[-1]

    api = SimpleNamespace(
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="ours"), Runtime=Runtime, ILogger=object
    )
    monkeypatch.setattr(trt, "check_plan", lambda bundle, graph, library, device: graph.plan)
    monkeypatch.setattr(trt, "refit", lambda *rest: done.append("refit"))
    monkeypatch.setattr(trt, "check_parity_sample", lambda *rest: done.append("parity_sample"))
    monkeypatch.setattr(trt, "make_log", lambda api: SimpleNamespace(last=""))
    made = TrtBackend(TrtLibrary("tensorrt", api, "10"), Streams())
    made.done, made.engines = done, engines
    return made


@pytest.fixture
def planned(bundle):
    (bundle.path / "unet.plan").write_bytes(b"a plan")
    plan = SimpleNamespace(
        file="unet.plan", profiles=PROFILES, weight_stripped=True, flags=("REFIT", "WEIGHT_STREAMING"), key="k"
    )
    graph = SimpleNamespace(spec=SPEC, plan=plan, weights_bytes=1200)
    bundle.manifest.graphs = {"unet": graph}
    bundle.digest = "d"
    return bundle


SIZES = [{"B": 2, "h": 8, "w": 8}]


def test_a_refitted_plan_is_refitted_each_time_and_checked_once(backend, planned):
    for _ in range(3):
        backend.open(planned, "unet").close()
    assert backend.done == ["open", "refit", "parity_sample", "open", "refit", "open", "refit"]
    planned.digest = "other weights"
    backend.open(planned, "unet")
    assert backend.done[-3:] == ["open", "refit", "parity_sample"]


def test_a_probe_that_fails_is_run_again(backend, planned, monkeypatch):
    def fail(*rest):
        backend.done.append("parity_sample")
        raise BackendError("disagrees")

    monkeypatch.setattr(trt, "check_parity_sample", fail)
    for _ in range(2):
        with pytest.raises(BackendError, match="disagrees"):
            backend.open(planned, "unet")
    assert backend.done.count("parity_sample") == 2


def test_what_a_plan_needs_is_known_after_it_was_opened_once_and_next_time_too(backend, planned, tmp_path):
    assert backend.known_activations(planned, "unet", SIZES) is None
    backend.open(planned, "unet")
    assert backend.known_activations(planned, "unet", SIZES) == Activations(4096, 64)
    again = TrtBackend(backend.library, Streams())
    assert again.known_activations(planned, "unet", SIZES) == Activations(4096, 64)
    (file,) = (tmp_path / "cache").rglob("*.json")
    assert "a-gpu" in file.parent.name  # another GPU's needs are others
    file.write_text("damaged")
    assert TrtBackend(backend.library, Streams()).known_activations(planned, "unet", SIZES) is None
    file.unlink()


def test_a_budget_for_weights_is_set_before_there_is_a_context(backend, planned):
    assert backend.can_stream_weights(planned, "unet")
    backend.limit_weights({"unet": 700})
    backend.open(planned, "unet")
    assert backend.engines[-1].weight_streaming_budget_v2 == 500
    assert backend.engines[-1].contexts == []
    # What is noted is without streaming, which is counted apart.
    assert backend.known_activations(planned, "unet", SIZES) == Activations(4096, 64)
    backend.limit_weights({})
    backend.open(planned, "unet")
    assert backend.engines[-1].weight_streaming_budget_v2 == 1000


def test_notes_of_plans_that_are_gone_are_dropped(tmp_path):
    notes = MemoryNotes(tmp_path / "notes")
    plan = SimpleNamespace(key="old", profiles=PROFILES)
    notes.keep(plan, PlanMemory(profiles=(1, 2)), {"old"})
    assert notes.get(plan) == PlanMemory(profiles=(1, 2))
    new = SimpleNamespace(key="new", profiles=PROFILES)
    notes.keep(new, PlanMemory(profiles=(3, 4)), {"new"})
    reread = MemoryNotes(tmp_path / "notes")
    assert (reread.get(plan), reread.get(new)) == (None, PlanMemory(profiles=(3, 4)))
    assert MemoryNotes(tmp_path / "no folder" / "notes").get(new) is None


# -- weight-stripped plans -----------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path):
    return SimpleNamespace(
        path=tmp_path,
        file=lambda file: tmp_path / file,
        read_graph=lambda graph: b"",
        manifest=SimpleNamespace(backend="tensorrt"),
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


GRAPH = SimpleNamespace(spec=SPEC, file="unet.onnx", parity_sample="unet.parity_sample.npz")


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
    with pytest.raises(BackendError, match="fill") as caught:
        refit("engine", bundle, GRAPH, library_that(**failure), SimpleNamespace(last="no such layer"))
    assert words in str(caught.value)


def test_a_refit_that_memory_does_not_hold_is_told_apart(bundle):
    with pytest.raises(OutOfMemoryError):
        refit("engine", bundle, GRAPH, library_that(refits=False), SimpleNamespace(last="Error Code 2: OutOfMemory"))


#: Errors as TensorRT has logged them, in their order.
NO_MEMORY = (
    ["[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"],
    ["[executionContext.cpp::initializeExecutionContext::612] Error Code 2: OutOfMemory (Requested size was 9 bytes.)"],
    ["Requested amount of GPU memory (9 bytes) could not be allocated."],
    ["Error Code 1: Cuda Runtime (out of memory)", "IRuntime::deserializeCudaEngine: Error Code 1: Internal Error"],
    ["std::bad_alloc"],
)
OTHERS = (
    [],
    ["Error Code 4: the engine plan file is not compatible with this version"],
    ["Error Code 3: setDeviceMemory: memory must be aligned"],
)


def log_of(messages):
    """Return a log in which the library has written errors."""

    class Severity:
        ERROR, INTERNAL_ERROR, WARNING = "error", "internal error", "warning"

    log = make_log(SimpleNamespace(ILogger=Severity))
    log.log("warning", "Skipping a tactic due to insufficient memory")
    for message in messages:
        log.log("error", message)
    return log


@pytest.mark.parametrize(("messages", "is_memory"), [(m, True) for m in NO_MEMORY] + [(m, False) for m in OTHERS])
def test_a_context_that_memory_does_not_hold_is_told_apart(runner, engine, monkeypatch, messages, is_memory):
    """The library returns None whatever was wrong; only its log knows."""
    runner._log = log = log_of(["Error Code 1: Cuda Runtime (out of memory)"])  # of something that went on without

    def make(config):
        for message in messages:
            log.log("error", message)

    monkeypatch.setattr(engine, "create_execution_context", make)
    with pytest.raises(BackendError) as caught:
        runner.enqueue(STREAM, *tensors(2, 8, 8))
    assert isinstance(caught.value, OutOfMemoryError) is is_memory
    assert "vram-budget" in (caught.value.fix or "") or not is_memory


@pytest.mark.parametrize(("messages", "is_memory"), [(NO_MEMORY[3], True), (OTHERS[1], False)])
def test_a_plan_that_memory_does_not_hold_is_told_apart(backend, planned, messages, is_memory):
    log = backend._log = log_of([])

    def deserialize(data):
        for message in messages:
            log.log("error", message)

    backend._runtime.deserialize_cuda_engine = deserialize
    with pytest.raises(BackendError) as caught:
        backend.open(planned, "unet")
    assert isinstance(caught.value, OutOfMemoryError) is is_memory
    assert is_memory or "build_engines.py" in caught.value.fix


def test_a_refitted_plan_must_agree_with_the_probe(bundle):
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((1, 4, 8, 8), np.float32), "vector": np.ones((1, 10), np.float16)}
    expected = rng.standard_normal((1, 4, 8, 8), np.float32)
    np.savez(bundle.path / "unet.parity_sample.npz", **inputs, **{"expected eps": expected})

    def runner(result):
        def infer(given):
            assert all(np.array_equal(given[name], array) for name, array in inputs.items())
            return {"eps": result}

        return SimpleNamespace(infer=infer)

    check_parity_sample(runner(expected * 1.001), bundle, GRAPH)
    for wrong in (expected * 1.02, np.zeros_like(expected), expected[:, ::-1], np.full_like(expected, np.nan)):
        with pytest.raises(BackendError, match=r"unet\.eps: the refitted plan disagrees"):
            check_parity_sample(runner(wrong), bundle, GRAPH)


def test_the_bound_of_each_precision_is_looser_than_its_rounding():
    assert trt_plan._PROBE_BOUNDS["fp32"] < trt_plan._PROBE_BOUNDS["fp16"] < trt_plan._PROBE_BOUNDS["bf16"] < 0.1


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
    plans = pytest.importorskip("export.trt.compile", reason="needs the export extra")
    file = tmp_path / "timings" / "tensorrt-10"
    for expected in (b" and more", b" and more and more"):
        config = Config()
        plans.read_timing_cache(config, file)
        plans.keep_timing_cache(config, file)
        assert file.read_bytes() == expected
    assert list(file.parent.iterdir()) == [file]


def test_a_timing_cache_of_another_gpu_is_left_out(tmp_path):
    plans = pytest.importorskip("export.trt.compile", reason="needs the export extra")
    file = tmp_path / ".bundle.timings"
    file.write_bytes(b"of another")
    config = Config(refuses=b"of another")
    plans.read_timing_cache(config, file)
    assert config.cache == b""
