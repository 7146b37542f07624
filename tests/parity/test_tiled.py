"""Tiled sampling and a tiled VAE, on real graphs: what must be equal is, and what memory lacks is tried smaller."""

import numpy as np
import pytest
from golden import relative_l2

from engine import Restorer
from engine.errors import BackendError, OutOfMemoryError, UsageError
from engine.memory.size_plan import SizePlan
from engine.memory.vae_slices import SlicedVae
from engine.pipeline.plan import recorded_size_plan
from engine.sampling.tiling import Tiling

STEPS = {"steps": 2, "min_size": 64}


@pytest.fixture(scope="module")
def restorer(each_restorer):
    return each_restorer


@pytest.fixture(scope="module")
def photo():
    rng = np.random.default_rng(0)
    return rng.random((128, 192, 3), dtype=np.float32)


@pytest.fixture
def latents(restorer):
    return noise(restorer, 16, 24)


def noise(restorer, height, width):
    rng = np.random.default_rng(2)
    return rng.normal(size=(1, restorer.bundle.latent_channels, height, width)).astype(np.float32)


def sampled(restorer, z_lq, texts=None, tiles=None, **changes):
    settings = restorer.defaults.updated({**STEPS, **{k: v for k, v in changes.items() if k != "at_once"}})
    center = z_lq * np.float32(0.5)
    return restorer.stages.sample(
        z_lq,
        restorer.stages.conditioning(settings) if texts is None else texts,
        settings,
        center=center,
        tiles=tiles,
        at_once=changes.get("at_once", 1),
    )


@pytest.mark.parametrize("changes", [{}, {"sampler": "dpmpp2m", "restore_pull": 2.0}, {"churn": 3.0}])
def test_tiles_differ_from_the_whole_and_not_by_how_many_go_at_once(restorer, latents, changes):
    tiles = Tiling(16, 24, 16, 8)
    assert len(tiles) == 2
    whole = sampled(restorer, latents, **changes)
    one = sampled(restorer, latents, tiles=tiles, **changes)
    both = sampled(restorer, latents, tiles=tiles, at_once=2, **changes)
    np.testing.assert_allclose(one, both, atol=2e-4)
    assert np.isfinite(one).all()
    difference = np.sqrt(np.mean((one - whole) ** 2)) / whole.std()
    assert 1e-4 < difference < 1.0


def test_a_tile_as_large_as_the_latent_is_the_whole_bit_for_bit(restorer, latents):
    assert np.array_equal(sampled(restorer, latents), sampled(restorer, latents, tiles=Tiling(16, 24, 32, 16)))


def test_the_setting_makes_the_tiles(restorer):
    settings = restorer.defaults.updated({**STEPS, "tile": 128})
    assert restorer.plan((192, 128), settings).latent_tiles == Tiling(16, 24, 16, 8)


def test_a_prompt_for_a_tile_changes_that_tile_alone(restorer, latents):
    tiles = Tiling(16, 24, 16, 16)
    one, other = (
        restorer.stages.conditioning(restorer.defaults.updated({**STEPS, "prompt": prompt, "steps": 1}))
        for prompt in ("a dog", "a tin roof")
    )
    same = sampled(restorer, latents, lambda _: one, tiles, steps=1)
    assert np.array_equal(same, sampled(restorer, latents, one, tiles, steps=1))
    mixed = sampled(restorer, latents, lambda tile: other if tile.left else one, tiles, steps=1)
    assert np.array_equal(mixed[..., :8], same[..., :8])
    assert np.abs(mixed[..., -8:] - same[..., -8:]).max() > 1e-4


def test_tiles_of_the_vae_lie_where_they_belong(restorer, latents):
    """Tiles of random weights agree where norms see the same; a tile in the wrong place would not correlate."""
    pixels = restorer.stages.decode(latents)
    tiles = Tiling(16, 24, 16, 8)
    in_tiles = restorer.stages.decode(latents, vae_mode=tiles)
    assert in_tiles.shape == pixels.shape
    assert np.corrcoef(in_tiles.ravel(), pixels.ravel())[0, 1] > 0.9
    assert not np.array_equal(in_tiles, pixels)
    z = restorer.stages.encode_clean(pixels)
    z_in_tiles = restorer.stages.encode_clean(pixels, vae_mode=tiles)
    assert z_in_tiles.shape == z.shape
    assert np.corrcoef(z_in_tiles.ravel(), z.ravel())[0, 1] > 0.9


def test_a_tile_as_large_as_the_image_is_exact(restorer, latents):
    assert np.array_equal(
        restorer.stages.decode(latents), restorer.stages.decode(latents, vae_mode=Tiling(16, 24, 64, 48))
    )


@pytest.mark.parametrize(
    ("fixture", "backend", "slice_bytes"),
    [
        ("bundle_fp32", "onnxruntime", 1),
        ("bundle_fp32", "onnxruntime", 20_000),
        ("bundle_fp32", "onnxruntime", 1 << 30),
        ("bundle_fp16", "onnxruntime", 20_000),
        ("bundle_fp32", "openvino", 20_000),  # which compiles each segment
    ],
)
def test_the_vae_in_slices_is_exact(request, fixture, backend, slice_bytes):
    """To rounding, whatever the slices are: two rows each, some, or everything at once."""
    if backend == "openvino":
        pytest.importorskip("openvino", reason="needs the openvino extra")
    with Restorer.open(request.getfixturevalue(fixture), backend=backend, compute="auto") as restorer:
        latents = noise(restorer, 16, 24)
        pixels = restorer.stages.decode(latents)
        whole = [pixels, restorer.stages.encode_clean(pixels), restorer.stages.encode(pixels)]
        told = []
        sliced = {"vae_mode": SlicedVae(slice_bytes), "on_tile": lambda *at: told.append(at)}
        in_slices = [
            restorer.stages.decode(latents, **sliced),
            restorer.stages.encode_clean(pixels, **sliced),
            restorer.stages.encode(pixels, **sliced),
        ]
    for result, expected in zip(in_slices, whole, strict=True):
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype
        assert relative_l2(result, expected) < 1e-5
    for stage in {stage for stage, _, _ in told}:
        done = [(done, total) for name, done, total in told if name == stage]
        assert done == [(index + 1, len(done)) for index in range(len(done))]


def test_photos_of_a_batch_have_norms_of_their_own(bundle_fp32):
    with Restorer.open(bundle_fp32, backend="onnxruntime") as restorer:
        latents = noise(restorer, 8, 16)
        both = np.concatenate([latents, latents * 3 + 1])
        in_slices = restorer.stages.decode(both, vae_mode=SlicedVae(1))
        assert relative_l2(in_slices, restorer.stages.decode(both)) < 1e-5
        assert relative_l2(in_slices[1:], restorer.stages.decode(both[1:])) < 1e-5


def test_a_photo_restored_in_slices_is_the_photo(restorer, photo):
    whole = restorer.restore(photo, **STEPS)
    in_slices = restorer.restore(photo, **STEPS, vae_tiles="exact")
    assert recorded_size_plan(in_slices.provenance, (192, 128)) == SizePlan(vae_in_slices=True)
    np.testing.assert_allclose(in_slices.photo.rgb, whole.photo.rgb, atol=1e-4)


@pytest.fixture
def short_of_memory(bundle_fp32, monkeypatch):
    """A restorer whose UNet takes no latent above a width; it counts what it refused."""
    with Restorer.open(bundle_fp32) as opened:
        refused = []

        def make(limit):
            inner = opened.stages._run

            def run(graph, inputs, stage, times):
                if graph == "unet" and inputs["x"].shape[3] > limit:
                    refused.append(inputs["x"].shape)
                    raise OutOfMemoryError("out of memory", where=graph)
                return inner(graph, inputs, stage, times)

            monkeypatch.setattr(opened.stages, "_run", run)
            return opened, refused

        yield make


def test_where_memory_runs_out_the_next_smaller_plan_is_tried(short_of_memory, photo):
    restorer, refused = short_of_memory(16)
    notes = []
    result = restorer.restore(photo, **STEPS, on_note=notes.append)
    assert result.photo.size == (192, 128)
    assert len(refused) == 1
    assert notes == list(result.notes) == result.provenance["notes"]
    assert notes[0].startswith("out of memory (sampled whole, decoded whole); tried again: ")
    assert notes[0].endswith("sampled in tiles of 128 pixels, decoded in slices")
    assert recorded_size_plan(result.provenance, (192, 128)) == SizePlan(128, vae_in_slices=True)
    again = restorer.restore(photo, plan=restorer.plan((192, 128), result.settings, like=result.provenance))
    assert len(refused) == 1
    assert np.array_equal(again.photo.rgb, result.photo.rgb)
    assert "notes" not in again.provenance


def test_smaller_plans_are_tried_until_one_fits(short_of_memory, photo):
    restorer, refused = short_of_memory(16)
    result = restorer.restore(photo, steps=1, min_size=256)
    assert [shape[3] for shape in refused] == [48, 32, 32]  # whole, then tiles, with the VAE in slices and in tiles
    assert len(result.notes) == len(refused)
    assert result.provenance["plan"]["tile_px"] == 128


def test_where_no_plan_fits_it_is_an_error(short_of_memory, photo):
    restorer, refused = short_of_memory(0)
    with pytest.raises(BackendError, match="out of memory"):
        restorer.restore(photo, **STEPS)
    assert len(refused) >= 2


def test_other_errors_are_not_tried_again(restorer, photo, monkeypatch):
    calls = []

    def run(*arguments):
        calls.append(arguments)
        raise BackendError("ONNX Runtime failed")

    monkeypatch.setattr(restorer.stages, "_run", run)
    with pytest.raises(BackendError, match="ONNX Runtime failed"):
        restorer.restore(photo, prompt="not yet seen", **STEPS)
    assert len(calls) == 1


def test_the_record_says_how_it_was_worked_at(restorer, photo):
    whole = restorer.restore(photo, **STEPS)
    assert recorded_size_plan(whole.provenance, (192, 128)) == SizePlan()
    tiled = restorer.restore(photo, **STEPS, tile=128)
    assert recorded_size_plan(tiled.provenance, (192, 128)) == SizePlan(128)
    assert tiled.provenance["settings"]["tile"] == 128
    told = []
    restorer.restore(photo, **STEPS, tile=128, on_tile=lambda *at: told.append(at))
    assert told == [("step", 1, 2), ("step", 2, 2)] * 2


def test_the_record_keeps_what_was_asked_beside_what_was_chosen(restorer, photo, monkeypatch):
    """So that a folder that is gone on with knows its results, and `--like` repeats the tiles."""
    monkeypatch.setattr("engine.pipeline.restorer.choose_plan", lambda *_: SizePlan(128))
    result = restorer.restore(photo, **STEPS)
    assert result.provenance["settings"] == restorer.defaults.updated(STEPS).model_dump(mode="json")
    assert result.provenance["settings"]["tile"] == "auto"
    assert recorded_size_plan(result.provenance, (192, 128)) == SizePlan(128)


def test_a_side_that_is_no_multiple_is_refused(restorer, photo):
    with pytest.raises(UsageError, match="tiles of this size do not exist"):
        restorer.restore(photo, **STEPS, tile=100)


@pytest.mark.slow
@pytest.mark.parametrize("upscale", [1.0, 1.5])
@pytest.mark.parametrize(
    "size", [(16, 16), (17, 31), (1, 1), (257, 101), (997, 499), (5000, 300), (300, 5000), (1009, 64)]
)
def test_every_size_comes_back_as_it_is_times_the_scale(restorer, size, upscale):
    rng = np.random.default_rng(5)
    photo = rng.random((size[1], size[0], 3), dtype=np.float32)
    result = restorer.restore(photo, steps=1, min_size=64, upscale=upscale)
    assert result.photo.size == tuple(int(side * upscale + 0.5) for side in size)
    assert np.isfinite(result.photo.rgb).all()
    assert restorer.plan((64, 64), restorer.defaults).size_plan == SizePlan()


def test_a_plan_is_made_for_the_memory_that_is_left_and_stays(monkeypatch, bundle_fp32):
    """Another program has taken nearly all; what a restorer loads itself does not change the plan of the next photo."""
    available = [4 * 10**9, 10**9]
    monkeypatch.setattr("engine.memory.budget.available_memory_bytes", lambda: available.pop(0))
    with Restorer.open(bundle_fp32) as restorer:
        settings = restorer.defaults.updated({"min_size": 1024})
        first, second = (restorer.plan((1024, 1024), settings) for _ in range(2))
    assert first == second
    assert first.size_plan.vae_in_slices
    monkeypatch.setattr("engine.memory.budget.available_memory_bytes", lambda: 16 * 10**9)
    with Restorer.open(bundle_fp32) as restorer:
        assert not restorer.plan((1024, 1024), settings).size_plan.vae_in_slices
