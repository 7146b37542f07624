"""The device's loop and session against the NumPy loop and the host's pipeline, and what they do not do."""

import json

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")

from given_faces import GivenFaces
from stand_in import HostBackend, HostDevice, needs_compiler

from engine import FaceRestorer, Restorer
from engine.bundle.manifest import open_bundle
from engine.cli.command import restore
from engine.errors import BackendError, DoesNotFitError, OutOfMemoryError, UsageError
from engine.memory.residency import Activations
from engine.memory.size_plan import SizePlan
from engine.pipeline.device_loop import LOOK_AHEAD
from engine.recipe import GRAPHS, stream_of

pytestmark = needs_compiler

SETTINGS = {
    "edm": {"steps": 5},
    "edm, unguided": {"steps": 4, "cfg_scale": (1.0, 1.0)},
    "edm, guided at first only": {"steps": 6, "cfg_scale": (1.0, 2.0), "churn": 0.0},
    "edm, everything": {
        "steps": 5,
        "churn": 2.0,
        "cfg_scale": (3.0, 1.5),
        "control_scale": (1.0, 0.6),
        "restore_pull": 4.0,
    },
    "dpmpp2m": {"steps": 5, "sampler": "dpmpp2m"},
    "dpmpp2m, pulled": {"steps": 6, "sampler": "dpmpp2m", "restore_pull": 2.0, "eta": 0.5},
    "one step": {"steps": 1},
    "no colour fix": {"steps": 3, "color_fix": "none"},
}


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).random((64, 128, 3), dtype=np.float32)


def test_stage_1_is_the_hosts_and_stages_are_told(on_device, on_host, photo):
    before = on_device.restore(photo, steps=1)
    assert np.array_equal(on_device.stage1(photo).rgb, on_host.stage1(photo).rgb)
    stages = []
    after = on_device.restore(photo, steps=1, on_stage=stages.append)
    assert np.array_equal(before.photo.rgb, after.photo.rgb)
    assert stages[:3] == ["resize in", "denoise encoder", "text"]


@pytest.mark.parametrize("sampler", ["edm", "dpmpp2m"])
def test_pictures_on_the_way_are_the_hosts_and_change_nothing(on_device, on_host, photo, sampler):
    pictures = [], []
    for restorer, shown in zip((on_device, on_host), pictures, strict=True):
        changes = {"sampler": sampler, "steps": 4, "restore_pull": 3.0}
        found = restorer.restore(photo, on_estimate=shown.append, **changes).photo.rgb
        assert np.array_equal(found, on_host.restore(photo, **changes).photo.rgb)
    assert len(pictures[0]) == 4
    assert all(np.array_equal(one, other) for one, other in zip(*pictures, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_device_restores_what_the_host_does_to_the_bit(on_device, on_host, photo, name):
    found, expected = (r.restore(photo, seed=3, **SETTINGS[name]).photo.rgb for r in (on_device, on_host))
    assert np.array_equal(found, expected)
    assert expected.std() > 0.01


def test_two_photos_together_and_again(on_device, on_host, photo, device):
    """The second run replays what the first recorded, on the same memory."""
    photos = [photo, photo[:, ::-1]]
    for seeds in ([1, 2], [7, 8]):
        found, expected = (r.restore_batch(photos, seeds=seeds, steps=3) for r in (on_device, on_host))
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one.photo.rgb, other.photo.rgb)
    assert len(device.of("capture")) == 1
    assert len(device.of("replay")) == 5  # of six steps, the first is not replayed


def test_faces_are_the_hosts_too(on_device, on_host, monkeypatch):
    """Three of them, as one batch; the photo and the squares take turns on the same memory."""
    monkeypatch.setattr("engine.pipeline.faces.LEAST_GAIN", 0.5)
    photo = np.random.default_rng(1).random((128, 192, 3), dtype=np.float32)
    detector = GivenFaces((60, 40, 84, 68), (76, 44, 100, 70), (172, 90, 192, 118), size=(192, 128))
    found, expected = (
        FaceRestorer(r, detector).restore(photo, r.restore(photo, steps=2, min_size=128)) for r in (on_device, on_host)
    )
    assert [face["done"] for face in found.provenance["faces"]["found"]] == ["restored"] * 3
    assert np.array_equal(found.photo.rgb, expected.photo.rgb)


def steps_of(device):
    """The calls from the first step's kernel to the last one's."""
    places = [
        index for index, call in enumerate(device.calls) if call[0] in ("replay",) or call[2:] == ("advance_step",)
    ]
    return device.calls[places[0] - 4 : places[-1] + 1]


def test_nothing_waits_or_is_copied_between_the_first_step_and_the_last(on_device, photo, device):
    on_device.restore(photo, steps=8, restore_pull=4.0)
    steps = steps_of(device)
    assert [call for call in steps if call[0] == "replay"] == [("replay", "main")] * 7
    kinds = {call[0] for call in steps}
    assert kinds <= {"launch", "graph", "record", "wait on host", "capture", "replay"}
    # The host waits for steps that lie LOOK_AHEAD behind, never for the newest.
    newest = -1
    for call in steps:
        if call[0] == "record":
            newest = call[2]
        if call[0] == "wait on host":
            assert call[1] <= newest - LOOK_AHEAD


def test_a_step_is_four_launches_and_two_graphs_in_order(on_device, photo, device):
    on_device.restore(photo, steps=1)
    start = device.calls.index(("launch", "main", "prepare_step"))
    assert device.calls[start : start + 5] == [
        ("launch", "main", "prepare_step"),
        ("graph", "main", "controlnet"),
        ("graph", "main", "unet"),
        ("launch", "main", "combine_step"),
        ("launch", "main", "advance_step"),
    ]


def test_stage_1_is_decoded_beside_the_steps(on_device, photo, device):
    """On the side stream, behind the encoder; the steps wait for it only if the pull needs its latent."""
    on_device.restore(photo, steps=2)
    graphs = [(call[1], call[2]) for call in device.of("graph")]
    assert graphs[:4] == [
        ("main", "denoise_encoder"),
        ("side", "text_encoder"),
        ("side", "text_encoder_2"),
        ("side", "vae_decoder"),
    ]
    assert graphs[-1] == ("side", "vae_decoder")
    assert [call[1] for call in device.of("wait")] == ["side", "side"]
    device.calls.clear()
    on_device.restore(photo, steps=2, restore_pull=4.0)
    assert [call[1] for call in device.of("wait")] == ["side", "main", "side"]
    encoded, center, sampled = (call[2] for call in device.of("wait"))
    assert encoded < center < sampled


def test_memory_is_flat_over_restorations(on_device, photo, device):
    on_device.restore(photo, steps=2)
    used, allocations = device.in_use, len(device.of("allocate"))
    for seed in range(5):
        on_device.restore(photo, steps=2, seed=seed)
    assert device.in_use == used
    assert len(device.of("allocate")) == allocations
    on_device.restore(np.ascontiguousarray(photo.transpose(1, 0, 2)), steps=2)  # another size
    on_device.restore(photo, steps=2)
    assert device.in_use == used
    on_device.close()
    assert device.in_use == 0


def test_steps_are_recorded_anew_where_memory_has_moved(on_device, on_host, photo, device):
    """As when a stage that is called by itself needs more than the recorded steps had."""
    expected = on_host.restore(photo, steps=4).photo.rgb
    on_device.restore(photo, steps=4)
    on_device._runners.opened["unet"].memory_version = 1
    assert np.array_equal(on_device.restore(photo, steps=4).photo.rgb, expected)
    assert len(device.of("capture")) == 2
    assert len(device.of("close replay")) == 1
    on_device.restore(photo, steps=4)
    assert len(device.of("capture")) == 2


class CancelledError(Exception):
    pass


def test_a_cancelled_run_ends_within_the_look_ahead_and_the_next_is_right(on_device, on_host, photo, device):
    done = []

    def stop(progress):
        done.append(progress.step.index)
        if progress.step.index == 2:
            raise CancelledError

    with pytest.raises(CancelledError):
        on_device.restore(photo, steps=50, on_step=stop)
    assert done == [0, 1, 2]
    started = len(device.of("replay")) + sum(call[2:] == ("advance_step",) for call in device.of("launch"))
    captured = len(device.of("capture"))
    assert started - captured <= 3 + LOOK_AHEAD
    assert device.calls[-1][0] == "synchronize"  # before anybody uses the buffers again
    found, expected = (r.restore(photo, steps=3).photo.rgb for r in (on_device, on_host))
    assert np.array_equal(found, expected)


def test_progress_comes_in_order_and_whole(on_device, photo):
    done = []
    on_device.restore(photo, steps=7, on_step=lambda progress: done.append(progress.step.index))
    assert done == list(range(7))


def weights(bundle):
    return {name: graph.weights_bytes for name, graph in bundle.manifest.graphs.items()}


def opened_with(bundle, folder, budget, photo, **changes):
    """A restorer's backend after two restorations of one photo, and their result."""
    backend = HostBackend(HostDevice(folder))
    for name, value in changes.items():
        setattr(backend, name, value)
    with Restorer(bundle, backend, vram_budget_bytes=budget) as restorer:
        results = [restorer.restore(photo, steps=2, restore_pull=3.0).photo.rgb for _ in range(2)]
        told = restorer.plan((128, 64), restorer.defaults.updated({"steps": 2, "restore_pull": 3.0})).memory.as_data()
    assert np.array_equal(*results)
    assert backend.device.in_use == 0
    return backend, results[0], told


def test_a_budget_keeps_what_fits_and_loads_the_rest_by_stage(bundle_fp32, folder, on_host, photo):
    bundle = open_bundle(bundle_fp32)
    expected = on_host.restore(photo, steps=2, restore_pull=3.0).photo.rgb
    backend, found, told = opened_with(bundle, folder, None, photo)
    assert np.array_equal(found, expected)
    assert sorted(backend.opened) == sorted(GRAPHS)  # each of them once
    assert told["loaded_by_stage"] == []
    fixed = told["buffers_bytes"]
    sizes = weights(bundle)
    for budget in (fixed + sizes["controlnet"] + sizes["unet"], fixed + sum(sizes.values()) - 1):
        backend, found, told = opened_with(bundle, folder, budget, photo)
        assert np.array_equal(found, expected)
        assert told["peak_bytes"] <= budget
        staged = told["loaded_by_stage"]
        # The texts are kept, and so are not encoded again; of the others, what comes and goes is opened again.
        for graph in GRAPHS:
            assert (backend.opened.count(graph) > 1) == (graph in staged and not graph.startswith("text")), graph
        assert staged


def test_a_loop_that_stays_keeps_its_recordings_while_others_come_and_go(bundle_fp32, folder, photo):
    bundle = open_bundle(bundle_fp32)
    sizes = weights(bundle)
    backend = HostBackend(HostDevice(folder))
    with Restorer(bundle, backend) as restorer:
        everything = restorer.plan((128, 64), restorer.defaults.updated({"steps": 4})).memory.residency.peak_bytes
    backend = HostBackend(HostDevice(folder))
    budget = everything - min(sizes["vae_encoder"], sizes["denoise_encoder"])
    with Restorer(bundle, backend, vram_budget_bytes=budget) as restorer:
        for _ in range(2):
            restorer.restore(photo, steps=4)
    assert backend.opened.count("unet") == 1
    assert backend.opened.count("denoise_encoder") == 2
    assert len(backend.device.of("capture")) == 1


def test_memory_for_activations_has_its_size_before_the_first_step(bundle_fp32, folder, photo):
    """Recorded steps hold its address; it is that of the stream's largest graph."""
    bundle = open_bundle(bundle_fp32)
    needs = {graph: Activations(1000 + place) for place, graph in enumerate(GRAPHS)}
    for known in (True, False):
        backend, _, told = opened_with(bundle, folder, None, photo, activations=needs, known=known)
        assert sorted(backend.opened) == sorted(GRAPHS)
        reserved = [call for call in backend.device.of("reserve") if call[0] == "reserve"]
        main = max(needs[graph].bytes for graph in GRAPHS if stream_of(graph) == "main")
        side = max(needs[graph].bytes for graph in GRAPHS if stream_of(graph) == "side")
        assert set(reserved) == {("reserve", "main", main), ("reserve", "side", side)}
        assert told["activations_bytes"] == main + side
        calls = backend.device.calls
        assert calls.index(reserved[0]) < calls.index(("launch", "main", "prepare_step"))


def test_what_only_an_opened_graph_tells_costs_one_opening_where_not_all_fit(bundle_fp32, folder, photo):
    bundle = open_bundle(bundle_fp32)
    needs = {graph: Activations(1000) for graph in GRAPHS}
    known, _, told = opened_with(bundle, folder, None, photo, activations=needs)
    budget = told["peak_bytes"] - 1
    known, first, told = opened_with(bundle, folder, budget, photo, activations=needs)
    unknown, second, told_too = opened_with(bundle, folder, budget, photo, activations=needs, known=False)
    assert np.array_equal(first, second)
    assert told == told_too
    # Weights alone would fit: what was opened to ask it stays where it may.
    assert len(unknown.opened) <= len(known.opened) + len(GRAPHS)


def test_weights_are_streamed_where_not_even_a_phase_fits(bundle_fp32, folder, on_host, photo):
    bundle = open_bundle(bundle_fp32)
    sizes = weights(bundle)
    _, expected, told = opened_with(bundle, folder, None, photo)
    budget = told["buffers_bytes"] + sizes["controlnet"] + sizes["unet"] - 1000
    with pytest.raises(BackendError, match="out of GPU memory: needs"):
        opened_with(bundle, folder, budget, photo)
    backend, found, told = opened_with(bundle, folder, budget, photo, streamable=frozenset({"unet"}))
    assert np.array_equal(found, expected)
    assert told["streamed"] == ["unet"]
    assert backend.limits[0] == {"unet": sizes["unet"] - 1000}


@pytest.mark.parametrize(
    ("budget", "words"), [(None, "use --vram-budget"), (1000, "raise --vram-budget, or restore at a smaller size")]
)
def test_too_little_memory_is_told_before_anything_is_loaded(bundle_fp32, folder, photo, budget, words):
    bundle = open_bundle(bundle_fp32)
    everything = sum(weights(bundle).values())
    backend = HostBackend(HostDevice(folder, total_bytes=everything - 1))
    backend.known = False
    with (
        Restorer(bundle, backend, vram_budget_bytes=budget) as restorer,
        pytest.raises(BackendError, match="out of GPU memory: needs .* MiB, .* MiB") as caught,
    ):
        restorer.restore(photo, steps=1)
    assert words in str(caught.value)
    assert backend.opened == []


@pytest.mark.parametrize(
    "changes", [{"steps": 3}, {"steps": 2, "cfg_scale": (1.0, 1.0)}, {"steps": 2, "prompt": "a b " * 90}]
)
def test_buffers_are_what_was_said_before(bundle_fp32, folder, photo, changes):
    """Everything that a restoration has allocated when it ends."""
    backend = HostBackend(HostDevice(folder))
    with Restorer(open_bundle(bundle_fp32), backend) as restorer:
        settings = restorer.defaults.updated({"restore_pull": 2.0, **changes})
        told = restorer.plan((128, 64), settings).memory.requirements.buffers
        restorer.restore(photo, **settings.model_dump())
        assert told == backend.device.in_use


PLANS = {"latent tiles": SizePlan(64), "VAE tiles": SizePlan(None, 64), "both": SizePlan(64, 64)}


def choose(monkeypatch, plan):
    monkeypatch.setattr("engine.pipeline.restorer.choose_plan", lambda *_: plan)
    monkeypatch.setattr("engine.pipeline.restorer.device_plans", lambda *_: [plan])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["edm", "edm, guided at first only", "edm, everything", "dpmpp2m, pulled"])
def test_latent_and_vae_tiles_equal_the_hosts_to_the_bit(on_device, on_host, photo, monkeypatch, name, plan):
    whole = on_host.restore(photo, seed=3, **SETTINGS[name]).photo.rgb
    choose(monkeypatch, PLANS[plan])
    found, expected = (r.restore(photo, seed=3, **SETTINGS[name]) for r in (on_device, on_host))
    assert np.array_equal(found.photo.rgb, expected.photo.rgb)
    assert not np.array_equal(found.photo.rgb, whole)
    assert PLANS[plan].as_data().items() <= found.provenance["plan"].items()


def test_photos_of_a_batch_have_tiles_too(on_device, on_host, photo, monkeypatch):
    choose(monkeypatch, PLANS["both"])
    photos = [photo, photo[:, ::-1]]
    for seeds in ([1, 2], [7, 8]):
        found, expected = (r.restore_batch(photos, seeds=seeds, steps=2) for r in (on_device, on_host))
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one.photo.rgb, other.photo.rgb)


def test_a_tile_is_recorded_once_and_nothing_waits_or_is_copied_between_steps(on_device, photo, device, monkeypatch):
    choose(monkeypatch, PLANS["latent tiles"])
    on_device.restore(photo, steps=4)
    assert len(device.of("capture")) == 1
    assert len(device.of("replay")) == 4 * 3 - 1  # three tiles; the first is not replayed
    starts = [index for index, call in enumerate(device.calls) if call[2:] == ("prepare_step",)]
    ends = [index for index, call in enumerate(device.calls) if call[2:] == ("advance_step",)]
    assert len(starts) == len(ends) == 4
    assert {call[0] for call in device.calls[starts[0] : ends[-1]]} <= {
        *("launch", "graph", "capture", "replay", "record", "wait on host")
    }
    step = device.calls[starts[-1] : ends[-1] + 1]
    assert [call[-1] for call in step if call[0] == "launch"] == [
        *("prepare_step", "clear", "clear", "combine_step", "advance_step")
    ]


@pytest.mark.parametrize("plan", PLANS)
def test_memory_in_tiles_is_flat_and_what_was_said(bundle_fp32, folder, photo, monkeypatch, plan):
    backend = HostBackend(HostDevice(folder))
    with Restorer(open_bundle(bundle_fp32), backend) as restorer:
        choose(monkeypatch, PLANS[plan])
        settings = restorer.defaults.updated({"restore_pull": 2.0, "steps": 2})
        told = restorer.plan((128, 64), settings).memory.requirements.buffers
        restorer.restore(photo, **settings.model_dump())
        used = backend.device.in_use
        assert told == used
        restorer.restore(photo, **settings.model_dump())
        assert backend.device.in_use == used
    assert backend.device.in_use == 0


def test_a_run_that_was_cancelled_amid_tiles_does_not_show_in_the_next(on_device, on_host, photo, monkeypatch):
    choose(monkeypatch, PLANS["latent tiles"])

    def stop(progress):
        raise CancelledError

    with pytest.raises(CancelledError):
        on_device.restore(photo, steps=20, on_step=stop)
    on_device._session._loop._work._made["latent_tile"].array[...] = 1  # as if a tile had failed
    found, expected = (r.restore(photo, steps=3).photo.rgb for r in (on_device, on_host))
    assert np.array_equal(found, expected)


def test_a_run_that_failed_amid_tiles_does_not_show_in_the_next(on_device, on_host, photo, monkeypatch):
    choose(monkeypatch, PLANS["latent tiles"])
    expected = on_host.restore(photo, steps=2).photo.rgb
    on_device.restore(photo, steps=2)
    decoder = on_device._runners.opened["vae_decoder"]
    enqueue, calls = decoder.enqueue, []

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise BackendError("the graph failed")
        enqueue(*arguments)

    monkeypatch.setattr(decoder, "enqueue", fail_at_the_second)
    with pytest.raises(BackendError, match="the graph failed"):
        on_device.restore(photo, steps=2)
    assert np.array_equal(on_device.restore(photo, steps=2).photo.rgb, expected)


def test_what_a_gpu_holds_decides_how_a_photo_is_worked_at(bundle_fp32, folder):
    """Activations that grow with the cells, as a library tells them; the test bundle's tiles have 256 pixels."""
    bundle = open_bundle(bundle_fp32)
    per_cell = 1 << 20

    class Growing(HostBackend):
        def known_activations(self, bundle, graph, sizes):
            share = {"vae_decoder": 4, "unet": 1}.get(graph, 0)
            return Activations(share * per_cell * max(size["h"] * size["w"] for size in sizes) if share else 0)

    def plan_on(gib, **changes):
        backend = Growing(HostDevice(folder, total_bytes=int(gib * 2**30)))
        with Restorer(bundle, backend) as restorer:
            settings = restorer.defaults.updated(changes)
            return restorer.plan((512, 1024), settings).size_plan

    cells = 64 * 128
    everything = (4 + 1) * cells / 1024
    assert plan_on(everything + 2, tile="off") == SizePlan()
    assert plan_on(everything + 2) == SizePlan(256)  # beyond four tiles' area
    assert plan_on(8 + 16 + 2, tile="off") == SizePlan(None, 512)
    assert plan_on(8 + 16 + 2) == SizePlan(256, 512)
    with pytest.raises(DoesNotFitError, match="out of GPU memory"):
        plan_on(0.1)
    with pytest.raises(DoesNotFitError):  # what was asked for is done or refused, never made smaller in silence
        plan_on(8 + 16 + 2, tile="off", vae_tiles="off")
    assert plan_on(1000, tile=128, vae_tiles="fast") == SizePlan(128, 512)
    with pytest.raises(UsageError, match="the VAE works in slices on the CPU only"):
        plan_on(1000, vae_tiles="exact")
    with pytest.raises(UsageError, match="tiles of this size do not exist"):
        plan_on(1000, tile=100)


def test_where_a_gpus_memory_runs_out_the_next_smaller_plan_is_tried(bundle_fp32, folder, on_host, monkeypatch):
    backend = HostBackend(HostDevice(folder))
    photo, notes = np.random.default_rng(1).random((128, 192, 3), dtype=np.float32), []
    with Restorer(open_bundle(bundle_fp32), backend) as restorer:
        make = backend.device.buffer

        def buffer(shape, dtype):
            if not notes:
                raise OutOfMemoryError("out of GPU memory", found="cuMemAlloc")
            return make(shape, dtype)

        monkeypatch.setattr(backend.device, "buffer", buffer)
        result = restorer.restore(photo, steps=2, min_size=64, on_note=notes.append)
        assert len(notes) == 1
        assert "out of memory (sampled whole, decoded whole); tried again: sampled in tiles of 128 pixels" in notes[0]
        again = on_host.restore(photo, steps=2, min_size=64, tile=128)
        assert np.array_equal(result.photo.rgb, again.photo.rgb)
    assert backend.device.in_use == 0


def test_the_stages_work_on_their_own(on_device, on_host, photo):
    pixels = np.ascontiguousarray(photo.transpose(2, 0, 1)[None])
    settings = on_host.defaults.updated({"steps": 2})
    results = []
    for restorer in (on_device, on_host):
        z = restorer.stages.encode(pixels)
        z = restorer.stages.sample(z, restorer.stages.conditioning(settings), settings)
        results.append(restorer.stages.decode(z))
    assert np.array_equal(*results)


def test_device_times_are_told_beside_the_others(on_device, photo):
    result = on_device.restore(photo, steps=2)
    assert set(result.timings.device_ms) == {"denoise encoder", "stage 1", "noise and texts", "steps", "vae decoder"}
    assert "gpu" in result.timings.graphs_ms


def test_networks_are_timed_alone_as_steps_run_them_and_change_nothing(on_device, on_host, photo, device):
    expected = on_host.restore(photo, steps=3).photo.rgb
    on_device.restore(photo, steps=3)
    device.calls.clear()
    assert on_device._session.time_networks(5, guided=True) > 0
    assert [call[0] for call in device.calls if call[0] in ("replay", "record")] == [
        *["replay"] * 2,
        "record",
        *["replay"] * 5,
        "record",
    ]
    assert device.of("launch") == []  # the sampler's kernels
    assert device.of("close replay")
    assert np.array_equal(on_device.restore(photo, steps=3).photo.rgb, expected)


def test_the_command_says_what_a_size_needs_before_it_starts(
    bundle_fp32, folder, photo_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        "engine.pipeline.restorer.make_backend", lambda name, **options: HostBackend(HostDevice(folder))
    )
    out = tmp_path / "out.png"
    arguments = [str(photo_path), "-o", str(out), "--bundle", str(bundle_fp32), "--steps", "1", "--min-size", "64"]
    assert restore([*arguments, "--upscale", "0.25", "--json"]) == 0
    said = capsys.readouterr()
    (report,) = json.loads(said.out)
    memory = report["plan"]["memory"]
    (line,) = [line for line in said.err.splitlines() if "of GPU memory" in line]
    assert memory["text"] in line
    parts = sum(memory[f"{name}_bytes"] for name in ("weights", "activations", "buffers"))
    assert parts == memory["peak_bytes"] > 0
    budget = (memory["peak_bytes"] - 1) / 2**30
    options = ["--upscale", "0.25", "--json", "--quiet", "--overwrite", "--vram-budget", str(budget)]
    assert restore([*arguments, *options]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)[0]["plan"]["memory"]["loaded_by_stage"]
    assert "of GPU memory" not in said.err
