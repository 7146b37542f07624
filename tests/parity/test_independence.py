"""A result depends on its photo, settings and seed, and on nothing else."""

import numpy as np
import pytest

from engine.errors import UsageError
from engine.pipeline import host


@pytest.fixture(scope="module")
def restorer(each_restorer):
    return each_restorer


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


def test_a_longer_negative_prompt_is_read_to_its_last_word(restorer, photos):
    long = "blur " * 200
    first, second = (
        restorer.restore(photos[0], prompt="", quality_words="", negative_prompt=long + end, steps=2)
        for end in ("tea", "milk")
    )
    assert not np.array_equal(first.photo.rgb, second.photo.rgb)


def test_a_long_prompt_is_pooled_from_its_first_chunk(restorer):
    settings = restorer.defaults.updated({"quality_words": ""})
    words = "cup " * 75
    short, long = (
        restorer.stages.conditioning(settings.updated({"prompt": text}))[0] for text in (words, words + "tea " * 75)
    )
    assert long.context.shape[0] == 2 * short.context.shape[0]
    assert np.allclose(long.vector, short.vector, atol=1e-6)


def test_special_tokens_in_a_prompt_are_plain_text(restorer):
    """As a token, the end of a text would end what the second tower pools."""
    settings = restorer.defaults.updated({"quality_words": ""})
    first, second = (
        restorer.stages.conditioning(settings.updated({"prompt": f"a cup <|endoftext|> of {end}"}))[0]
        for end in ("tea", "milk")
    )
    assert not np.allclose(first.vector, second.vector, atol=1e-4)


@pytest.mark.parametrize("settings", [{"churn": 8.0}, {"sampler": "dpmpp2m"}])
def test_the_seed_draws_the_steps_noise_too(restorer, photos, settings):
    start = np.random.default_rng(0).standard_normal((1, 4, 16, 16), dtype=np.float32)
    start = start[:, :, : 8 * (80 // 64 + 1), : 8 * (90 // 64 + 1)]
    first, second = (
        restorer.restore(photos[0][:64, :64], noise=start[:, :, :8, :8], seed=seed, steps=4, **settings).photo.rgb
        for seed in (1, 2)
    )
    assert not np.array_equal(first, second)


def test_the_pull_leads_to_the_encoded_stage_1_image(restorer, photos, monkeypatch):
    """Not to the degraded photo's latent, which is near it and would hide the mistake."""
    photo = photos[0][:64, :64]
    lq = (photo.transpose(2, 0, 1)[None] * 2 - 1).astype(np.float32)
    centre = restorer.stages.encode_clean(restorer.stages.decode(restorer.stages.encode(lq)))
    given = []
    sample = host.sample
    monkeypatch.setattr(host, "sample", lambda *a, **k: given.append(k["center"]) or sample(*a, **k))
    restorer.restore(photo, restore_pull=2.0)
    assert np.allclose(given[0], centre, atol=1e-5)
    assert not np.allclose(given[0], restorer.stages.encode(lq), atol=1e-2)


def test_a_number_is_a_scale(restorer, photos):
    pair = restorer.restore(photos[0], cfg_scale=(2.0, 2.0), steps=1).photo.rgb
    assert np.array_equal(pair, restorer.restore(photos[0], cfg_scale=2, steps=1).photo.rgb)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5])
def test_impossible_seeds_of_a_batch_are_refused(restorer, photos, seed):
    with pytest.raises(UsageError, match="seed"):
        restorer.restore_batch(photos[:1], seeds=[seed])


def test_a_photo_may_be_a_file_an_image_or_an_array(restorer, photo_path, tmp_path):
    from PIL import Image

    file = tmp_path / "small.png"
    with Image.open(photo_path) as image:
        small = image.resize((96, 64))
    small.save(file)
    photos = (file, Image.open(file), np.asarray(small))
    results = [restorer.restore(photo, steps=1).photo for photo in photos]
    for result in results[1:]:
        assert np.array_equal(result.rgb, results[0].rgb)


def test_noise_and_stages_can_be_given(restorer, photos):
    """The stages on their own make up the whole."""
    from engine.image.photo import photo_from_array, resize
    from engine.sampling.noise import batch_noise

    photo = photo_from_array(photos[0])
    settings = restorer.defaults.updated({"color_fix": "none"})
    size = restorer.working_size(photo.size, settings)
    lq = (resize(photo.rgb, size).transpose(2, 0, 1)[None] * 2 - 1).astype(np.float32)
    z_lq = restorer.stages.encode(lq)
    texts = restorer.stages.conditioning(settings)
    noise = batch_noise([settings.seed], 0, z_lq.shape[1:])
    z = restorer.stages.sample(z_lq, texts, settings, noise=noise)
    pixels = restorer.stages.decode(z)[0].transpose(1, 2, 0) / 2 + 0.5
    expected = restorer.restore(photos[0], color_fix="none", noise=noise).photo.rgb
    assert np.array_equal(expected, restorer.restore(photos[0], color_fix="none").photo.rgb)
    assert np.allclose(resize(pixels.clip(0, 1).astype(np.float32), photo.size), expected, atol=1e-6)
