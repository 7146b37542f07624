"""A result depends on its photo, settings and seed, and on nothing else."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    return [rng.random((70, 90, 3), dtype=np.float32) for _ in range(3)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cfg_scale": (1.0, 1.0)},
        {"sampler": "dpmpp2m"},
        {"churn": 5.0, "restore_pull": 4.0},
    ],
)
def test_photos_together_give_what_they_give_alone(restorer, photos, settings):
    seeds = [7, 8, 9]
    together = restorer.restore_batch(photos, seeds=seeds, **settings)
    for photo, seed, result in zip(photos, seeds, together, strict=True):
        alone = restorer.restore(photo, seed=seed, **settings)
        assert np.array_equal(result.photo.rgb, alone.photo.rgb)
        assert result.settings == alone.settings
        assert result.settings.seed == seed


def test_sizes_may_differ_within_a_batch(restorer, photos):
    mixed = [photos[0], photos[1][:64, :64], photos[2]]
    for photo, result in zip(mixed, restorer.restore_batch(mixed), strict=True):
        assert result.photo.rgb.shape == photo.shape
        assert np.array_equal(result.photo.rgb, restorer.restore(photo).photo.rgb)


def test_the_same_seed_gives_the_same_image_and_another_one_does_not(restorer, photos):
    first, again, other = (restorer.restore(photos[0], seed=seed).photo.rgb for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert np.abs(first - other).mean() > 0.01


def test_every_setting_matters(restorer, photos):
    """An option that is dropped on the way would leave the picture as it is."""
    base = restorer.restore(photos[0], sampler="dpmpp2m", steps=4).photo.rgb
    changes = [
        {"steps": 5},
        {"cfg_scale": (4.0, 4.0)},
        {"cfg_scale": (2.0, 3.0)},
        {"control_scale": (0.5, 0.5)},
        {"restore_pull": 2.0},
        {"s_noise": 1.1},
        {"eta": 0.5},
        {"color_fix": "adain"},
        {"color_fix": "none"},
        {"min_size": 128},
        {"prompt": "a cup of coffee"},
        {"quality_words": ""},
        {"negative_prompt": "coffee"},
        {"seed": 1},
    ]
    for change in changes:
        changed = restorer.restore(photos[0], **{"sampler": "dpmpp2m", "steps": 4, **change}).photo.rgb
        assert not np.array_equal(base, changed), change
    edm = restorer.restore(photos[0], sampler="edm", steps=4).photo.rgb
    assert not np.array_equal(base, edm)
    assert not np.array_equal(edm, restorer.restore(photos[0], sampler="edm", steps=4, churn=5.0).photo.rgb)
    assert restorer.restore(photos[0], upscale=1.5).photo.size == (135, 105)


def test_long_prompts_reach_the_networks_to_their_last_word(restorer, photos):
    long = "cup " * 200
    first, second = (restorer.restore(photos[0], prompt=long + end, steps=2) for end in ("tea", "milk"))
    assert not np.array_equal(first.photo.rgb, second.photo.rgb)


def test_a_photo_may_be_a_file_an_image_or_an_array(restorer, photo_path):
    from PIL import Image

    with Image.open(photo_path) as image:
        array = np.asarray(image)
    results = [restorer.restore(photo, steps=1).photo for photo in (photo_path, Image.open(photo_path), array)]
    for result in results[1:]:
        assert np.array_equal(result.rgb, results[0].rgb)


def test_noise_and_stages_can_be_given(restorer, photos):
    """The stages on their own make up the whole."""
    from engine.imageio import photo_from_array, resize
    from engine.noise import batch_noise

    photo = photo_from_array(photos[0])
    settings = restorer.defaults.updated({"color_fix": "none"})
    size = restorer.working_size(photo, settings)
    lq = (resize(photo.rgb, size).transpose(2, 0, 1)[None] * 2 - 1).astype(np.float32)
    z_lq = restorer.encode(lq)
    texts = restorer.conditioning(settings)
    noise = batch_noise([settings.seed], 0, z_lq.shape[1:])
    z = restorer.sample(z_lq, texts, settings, noise=noise)
    pixels = restorer.decode(z)[0].transpose(1, 2, 0) / 2 + 0.5
    expected = restorer.restore(photos[0], color_fix="none", noise=noise).photo.rgb
    assert np.array_equal(expected, restorer.restore(photos[0], color_fix="none").photo.rgb)
    assert np.allclose(resize(pixels.clip(0, 1).astype(np.float32), photo.size), expected, atol=1e-6)
