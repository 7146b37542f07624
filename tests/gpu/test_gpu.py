"""What only a GPU can show. Skipped where there is none; no CI has one.

`python -m pytest tests/gpu -rs` says what ran and what did not, and why; `python benchmarks/gpu_session.py`
runs the same, and keeps the numbers that tests record here with `record_property`.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from golden import assert_golden

from engine import Restorer
from engine.backends import PLAN_BACKENDS
from engine.backends.trt import TrtBackend
from engine.backends.trt_library import open_library
from engine.bundle.manifest import Bundle, open_bundle, plan_key
from engine.device.cuda import CudaDevice, device_info
from engine.device.kernels import COLUMNS, pack_table
from engine.errors import BackendError
from engine.memory.size_plan import SizePlan
from engine.sampling.guidance import Ramp, RestorationPull
from engine.sampling.sampler import dpmpp2m_table, weighted_sum
from engine.sampling.schedule import karras_sigmas, nearest_level
from export.trt.compile import known_targets

MIB = 1 << 20


# -- the device -----------------------------------------------------------------------------------


def test_a_gpu_says_what_it_is(gpu):
    info = device_info(0)
    assert info.name
    assert float(info.compute_capability) >= 7.5
    print(f"\n{info}")


def test_arrays_go_there_and_come_back(gpu):
    stream = gpu.stream()
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    first, second = gpu.buffer(array.shape, "float32"), gpu.buffer(array.shape, "float32")
    stream.upload(first, array)
    array[...] = 0  # the copy is the stream's by now
    stream.copy(second, first)
    found = stream.download(second.rows(1, 2)).result()
    assert np.array_equal(found, np.arange(12, 24, dtype=np.float32).reshape(1, 3, 4))
    for buffer in (first, second):
        buffer.close()


def test_two_streams_keep_the_order_that_events_say(gpu):
    main, side = gpu.stream(), gpu.stream()
    buffers = [gpu.buffer((1 << 22,), "float32") for _ in range(2)]
    for value in range(10):
        main.upload(buffers[0], np.full(1 << 22, value, np.float32))
        side.wait(main.record())
        side.copy(buffers[1], buffers[0])
        done = side.record()
        assert side.download(buffers[1]).result()[-1] == value
        main.wait(done)
    for buffer in buffers:
        buffer.close()


def test_too_much_memory_is_one_message(gpu):
    free, total = gpu.memory_bytes()
    with pytest.raises(BackendError, match="out of GPU memory") as caught:
        gpu.buffer((2 * total,), "float32")
    assert "needs" in caught.value.problem
    assert "free" in caught.value.problem
    assert "--vram-budget" in caught.value.fix
    assert gpu.memory_bytes()[0] == pytest.approx(free, abs=64 * MIB)


def test_a_gpu_that_is_not_there_is_told(gpu):
    with pytest.raises(BackendError, match="no such GPU"):
        CudaDevice(99)


def test_a_step_s_kernels_round_as_numpy_does(gpu):
    """DPM++2M with the pull uses every term; bit for bit, as the stand-in of the other tests does."""
    rng = np.random.default_rng(0)
    table = dpmpp2m_table(
        karras_sigmas(5),
        quantize=lambda sigma: (nearest_level(sigma).timestep, nearest_level(sigma).sigma),
        cfg_scale=Ramp(3.0, 1.5),
        control_scale=Ramp(1.0, 0.5),
        pull=RestorationPull(4.0),
    )
    shape, step = (2, 4, 40, 24), 2
    names = ("x", "pos", "neg", "center", "noise", "previous")
    terms = {name: rng.standard_normal(shape, np.float32) for name in names}
    stream = gpu.stream()
    on_gpu = {name: gpu.buffer(shape, "float32") for name in names}
    for name, buffer in on_gpu.items():
        stream.upload(buffer, terms[name])
    packed = pack_table(table)
    rows, number = gpu.buffer((5, len(COLUMNS)), "float32"), gpu.buffer((1,), "uint32")
    stream.upload(rows, packed)
    stream.upload(number, np.array([step], np.uint32))
    stream.launch(
        "combine_step",
        terms["x"].size,
        rows,
        number,
        *(on_gpu[name] for name in ("pos", "neg", "center", "noise", "x", "previous")),
    )
    stream.launch("advance_step", 1, number)
    weights = table.steps[step]
    assert np.array_equal(stream.download(on_gpu["x"]).result(), weighted_sum(weights.update, terms))
    assert np.array_equal(stream.download(on_gpu["previous"]).result(), weighted_sum(weights.denoised, terms))
    assert stream.download(number).result() == [step + 1]


# -- whole restorations ---------------------------------------------------------------------------


def _built(build_bundle, folder, backend, precision, gpu):
    changes = {"precision": precision, "backend": backend}
    if backend in PLAN_BACKENDS:
        changes["shapes"] = "64,512,64-192"
    if backend == "tensorrt-rtx":
        changes["targets"] = (gpu.compute_capability,)
    return build_bundle(folder / f"{backend}-{precision}", **changes)


EVERY_BACKEND = [(backend, precision) for backend in ("onnxruntime", *PLAN_BACKENDS) for precision in ("fp32", "fp16")]


@pytest.fixture(scope="module", params=EVERY_BACKEND, ids=str)
def on_gpu(request, gpu, build_bundle, tmp_path_factory):
    """The reference model on every backend that runs on this GPU."""
    backend, precision = request.param
    _skip_without(backend, gpu)
    path = _built(build_bundle, tmp_path_factory.mktemp("gpu"), backend, precision, gpu)
    with Restorer.open(path, backend=backend, device="cuda") as restorer:
        yield restorer


def _skip_without(backend, gpu):
    """Skip where a library is not there, or not for this GPU; whatever else goes wrong is a failure."""
    if backend == "onnxruntime":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("gpu: needs onnxruntime-gpu")
        return
    try:
        library = open_library(backend)
    except BackendError as error:
        pytest.skip(f"gpu: {error.problem}")
    if library.is_rtx and gpu.compute_capability not in known_targets(library):
        pytest.skip(f"gpu: {library.label} compiles for no GPU of compute capability {gpu.compute_capability}")


@pytest.fixture
def photo():
    return np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)


def psnr(found, expected):
    return -10 * np.log10(np.square(found - expected).mean())


def test_a_restoration_is_the_cpu_s(on_gpu, restorer, photo, record_property):
    worst = np.inf
    bound = 60.0 if on_gpu.bundle.manifest.precision == "fp32" else 45.0
    for changes in ({"steps": 6}, {"steps": 5, "sampler": "dpmpp2m"}, {"steps": 5, "restore_pull": 4.0}):
        found, expected = (r.restore(photo, **changes).photo.rgb for r in (on_gpu, restorer))
        worst = min(worst, psnr(found, expected))
        record_property("psnr_db", round(float(worst), 2))
        assert worst > bound, changes


def test_latent_and_vae_tiles_equal_the_cpus(on_gpu, restorer, photo, monkeypatch, record_property):
    wide = np.concatenate([photo, photo[:, ::-1]], axis=1)
    monkeypatch.setattr("engine.pipeline.restorer.choose_plan", lambda *_: SizePlan(64, 64))
    monkeypatch.setattr("engine.pipeline.restorer.device_plans", lambda *_: [SizePlan(64, 64)])
    found, expected = (r.restore(wide, steps=4).photo.rgb for r in (on_gpu, restorer))
    worst = psnr(found, expected)
    record_property("psnr_db", round(float(worst), 2))
    assert worst > (60.0 if on_gpu.bundle.manifest.precision == "fp32" else 45.0)


def test_networks_agree_with_the_reference(on_gpu, reference):
    """The original implementation's, one call of each."""
    half = on_gpu.bundle.manifest.precision == "fp16"
    wide = np.float16 if half else np.float32
    shared = {
        "x": reference["net/x"],
        "timestep": reference["net/timestep"],
        "context": reference["net/context"].astype(wide),
        "vector": reference["net/vector"].astype(wide),
    }
    inputs = {"lq": reference["net/lq_latent"]}
    controls = on_gpu.stages._run("controlnet", {**shared, "lq": inputs["lq"]}, "controlnet", None)
    scale = np.ones(1, np.float32)
    eps = on_gpu.stages._run("unet", {**shared, **controls, "control_scale": scale}, "unet", None)["eps"]
    assert_golden(eps, reference["net/eps_control_scale_1.0"], 5e-3 if half else 5e-5)


def test_replayed_steps_are_the_steps(on_gpu, photo, monkeypatch):
    recorded = on_gpu.restore(photo, steps=6).photo.rgb
    kinds = on_gpu._session._loop._work._recorded
    assert bool(kinds) == (on_gpu.bundle.manifest.backend in PLAN_BACKENDS)
    for graph in ("controlnet", "unet"):
        monkeypatch.setattr(type(on_gpu._runners.opened[graph]), "can_be_recorded", False)
    on_gpu._session._close_loop()
    assert np.array_equal(on_gpu.restore(photo, steps=6).photo.rgb, recorded)


def test_the_same_seed_gives_the_same_photo(on_gpu, photo):
    first, second = (on_gpu.restore(photo, steps=4, seed=5).photo.rgb for _ in range(2))
    assert np.array_equal(first, second)


def test_memory_is_flat_over_a_hundred_restorations(on_gpu, photo, gpu, record_property):
    on_gpu.restore(photo, steps=2)
    before, _ = gpu.memory_bytes()
    for seed in range(100):
        on_gpu.restore(photo, steps=2, seed=seed)
    after, _ = gpu.memory_bytes()
    record_property("lost_bytes", before - after)
    assert abs(before - after) <= 2 * MIB


def test_pinned_memory_comes_back(on_gpu, photo):
    """The second restoration of a size takes what the first has given back."""
    device = on_gpu._backend.device
    on_gpu.restore(photo, steps=3)
    taken = []
    allocate = device.pinned._allocate
    device.pinned._allocate = lambda nbytes: taken.append(nbytes) or allocate(nbytes)
    try:
        on_gpu.restore(photo, steps=3)
    finally:
        device.pinned._allocate = allocate
    assert taken == []


def test_other_sizes_in_between_leave_recorded_steps_right(on_gpu, photo):
    """Sizes of another profile move the memory for activations; what was recorded in it is recorded anew."""
    expected = on_gpu.restore(photo, steps=4).photo.rgb
    wide = np.random.default_rng(1).random((128, 64, 3), dtype=np.float32)
    on_gpu.restore(wide, steps=3)
    on_gpu.stages.encode(np.zeros((1, 3, 128, 128), np.float32))  # a stage by itself
    assert np.array_equal(on_gpu.restore(photo, steps=4).photo.rgb, expected)


class CancelledError(Exception):
    pass


def test_a_cancelled_run_leaves_nothing_behind(on_gpu, photo):
    expected = on_gpu.restore(photo, steps=4).photo.rgb

    def stop(progress):
        if progress.step.index == 3:
            raise CancelledError

    with pytest.raises(CancelledError):
        on_gpu.restore(photo, steps=200, on_step=stop)
    assert np.array_equal(on_gpu.restore(photo, steps=4).photo.rgb, expected)


def test_the_loop_takes_at_most_3_percent_more_than_its_networks(on_gpu, record_property):
    """At a size at which a step is more than its launches, by the best of several runs of each."""
    large = np.random.default_rng(2).random((512, 512, 3), dtype=np.float32)
    steps = 50
    runs = [on_gpu.restore(large, steps=steps).timings for _ in range(4)][1:]  # the first one records
    loop_ms = min(times.device_ms["steps"] for times in runs)
    networks_ms = min(on_gpu._session.time_networks(steps, guided=True) for _ in range(3)) * steps
    record_property("loop_ms", round(loop_ms, 3))
    record_property("networks_ms", round(networks_ms, 3))
    record_property("device_ms", {stage: round(value, 3) for stage, value in runs[-1].device_ms.items()})
    record_property("whole_ms", round(runs[-1].total_ms, 3))
    # ONNX Runtime's steps are not recorded: the host starts every launch, at a model of this size as slowly as it runs.
    bound = 1.03 if on_gpu.bundle.manifest.backend in PLAN_BACKENDS else 1.25
    assert loop_ms <= bound * networks_ms


def test_two_streams_give_what_one_at_a_time_gives(on_gpu, photo, monkeypatch):
    """Whatever is missing between them shows when everything waits for everything."""
    changes = {"steps": 4, "restore_pull": 4.0}
    overlapped = [on_gpu.restore(photo, **changes).photo.rgb for _ in range(5)]
    stream = type(on_gpu._session.streams["main"])
    record = stream.record

    def record_and_wait(self):
        event = record(self)
        event.synchronize()
        return event

    monkeypatch.setattr(stream, "record", record_and_wait)
    expected = on_gpu.restore(photo, **changes).photo.rgb
    assert all(np.array_equal(found, expected) for found in overlapped)


def test_what_a_size_needs_is_what_it_takes(build_bundle, tmp_path_factory, gpu, photo, record_property):
    """Said before; a GPU's own overhead for kernels is not in it."""
    backend = _first_plan_backend(gpu)
    path = _built(build_bundle, tmp_path_factory.mktemp("memory"), backend, "fp16", gpu)
    before, _ = gpu.memory_bytes()
    with Restorer.open(path) as opened:
        told = opened.plan((64, 64), opened.defaults).memory.as_data()
        opened.restore(photo, steps=3)
        taken = before - gpu.memory_bytes()[0]
    record_property("told_bytes", told["peak_bytes"])
    record_property("taken_bytes", taken)
    assert taken <= told["peak_bytes"] + 512 * MIB


def _first_plan_backend(gpu):
    for backend in PLAN_BACKENDS:
        try:
            library = open_library(backend)
        except BackendError:
            continue
        if not library.is_rtx or gpu.compute_capability in known_targets(library):
            return backend
    pytest.skip("gpu: no TensorRT here compiles for this GPU")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_budget_gives_the_same_photo(build_bundle, tmp_path_factory, gpu, photo, streaming, record_property):
    """Graphs come and go by stage; or, in half of what the largest stage needs, their weights are streamed."""
    backend = _first_plan_backend(gpu)
    changes = {"targets": (gpu.compute_capability,)} if backend == "tensorrt-rtx" else {}
    path = build_bundle(
        tmp_path_factory.mktemp("budget") / "bundle",
        backend=backend,
        precision="fp16",
        shapes="64",
        weight_streaming=streaming,
        **changes,
    )
    with Restorer.open(path) as opened:
        told = opened.plan((64, 64), opened.defaults.updated({"steps": 3})).memory.as_data()
        expected = opened.restore(photo, steps=3).photo.rgb
        weights = {name: graph.weights_bytes for name, graph in opened.bundle.manifest.graphs.items()}
    fixed = told["activations_bytes"] + told["buffers_bytes"]
    stage = weights["controlnet"] + weights["unet"]
    budget = fixed + (stage // 2 if streaming else stage)
    with Restorer.open(path, vram_budget_gib=budget / 2**30) as opened:
        for _ in range(2):
            found = opened.restore(photo, steps=3).photo.rgb
        told = opened.plan((64, 64), opened.defaults.updated({"steps": 3})).memory.as_data()
    same = np.array_equal(found, expected)
    record_property("psnr_db", "same" if same else round(float(psnr(found, expected)), 2))
    assert bool(told["streamed"]) == streaming
    assert told["loaded_by_stage"] or streaming
    assert same or psnr(found, expected) > 60.0
    with Restorer.open(path, vram_budget_gib=1 / 2**20) as opened, pytest.raises(BackendError) as caught:
        opened.restore(photo, steps=3)
    assert caught.value.problem.startswith("out of GPU memory: needs")


def test_the_audit_asks_the_plan_itself(on_gpu, record_property):
    """Where TensorRT's inspector answers; RTX, which compiles kernels later, need not."""
    manifest = on_gpu.bundle.manifest
    if manifest.backend not in PLAN_BACKENDS:
        pytest.skip("gpu: ONNX Runtime has no plans")
    shares = {name: round(graph.plan.audit.inspected_share, 4) for name, graph in manifest.graphs.items()}
    record_property("inspected_share", shares)
    if manifest.backend == "tensorrt":
        assert all(share > 0 for share in shares.values()), shares
    if manifest.precision == "fp16":
        assert all(graph.plan.audit.share_16_bit >= 0.95 for graph in manifest.graphs.values())


@pytest.mark.parametrize("backend", PLAN_BACKENDS)
def test_weightless_plans_are_filled_and_agree(gpu, backend, build_bundle, tmp_path_factory, photo, restorer):
    _skip_without(backend, gpu)
    folder = tmp_path_factory.mktemp("weight_stripped") / backend
    path = build_bundle(folder, backend=backend, precision="fp16", weight_stripped=True, shapes="64-192")
    with Restorer.open(path) as opened:
        found, expected = (r.restore(photo, steps=4).photo.rgb for r in (opened, restorer))
    assert psnr(found, expected) > 45.0


def test_do_rtx_plans_run_on_this_gpu(gpu, build_bundle, tmp_path_factory, restorer, photo, record_property):
    """An open question for compute capability 9.0, which RTX's support matrix does not list.

    Passed: the portable plan opens here and computes what the CPU does. Failed: it should have. Expected
    failure, with the reason: it does not open, and nobody said that it would.
    """
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx extra")
    targets = tuple(
        target for target in ("8.0", "8.6", "8.9", "12.0") if target in known_targets(open_library("tensorrt-rtx"))
    )
    folder = tmp_path_factory.mktemp("rtx") / "bundle"
    bundle = open_bundle(build_bundle(folder, backend="tensorrt-rtx", precision="fp32", targets=targets, shapes="64"))
    backend = TrtBackend(open_library("tensorrt-rtx"), gpu)
    what = f"TensorRT-RTX {rtx.__version__}, a plan for {', '.join(targets)} on {gpu.name} ({gpu.compute_capability})"
    entry = bundle.manifest.graphs["vae_decoder"]
    # As if it was for this GPU: whether it is, is the question.
    plan = entry.plan.model_copy(update={"targets": (*targets, gpu.compute_capability)})
    plan = plan.model_copy(update={"key": _key_of(bundle, entry, plan)})
    entry = entry.model_copy(update={"plan": plan})
    graphs = {**bundle.manifest.graphs, "vae_decoder": entry}
    asked = Bundle(bundle.path, bundle.manifest.model_copy(update={"graphs": graphs}), bundle.digest)
    try:
        runner = backend.open(asked, "vae_decoder")
        z = restorer.stages.encode(np.ascontiguousarray(photo.transpose(2, 0, 1)[None]))
        found = runner.infer({"z": z})["pixels"]
        runner.close()
    except BackendError as error:
        record_property("answer", f"{what}: does not run: {error.found}")
        if gpu.compute_capability in targets:
            raise
        pytest.xfail(f"{what}: does not run: {error.found}")
    finally:
        for arena in backend._arenas.values():
            arena.close()
    record_property("answer", f"{what}: runs")
    assert_golden(found, restorer.stages.decode(z), 1e-4)


def _key_of(bundle, graph, plan):
    return plan_key(
        graph.file,
        bundle.manifest.weights,
        library=plan.library,
        targets=plan.targets,
        device=plan.device,
        profiles=plan.profiles,
        flags=plan.flags,
        precision=graph.spec.precision,
    )
