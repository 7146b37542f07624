"""Small pictures of latents: the colours are the photo's own, and nothing of the result changes for them."""

import numpy as np
import pytest

from engine.errors import RestoreError
from engine.pipeline.latent_colors import LatentColors, cell_colors

RNG = np.random.default_rng(0)


def test_colors_that_are_linear_in_the_latent_are_found():
    z = RNG.standard_normal((2, 4, 20, 30)).astype(np.float32)
    mix, constant = RNG.standard_normal((3, 4)) * 0.2, np.array([0.1, -0.2, 0.0])
    colors = (np.einsum("dc,bchw->bdhw", mix, z) + constant[:, None, None]).astype(np.float32)
    other = RNG.standard_normal((1, 4, 20, 30)).astype(np.float32)
    expected = np.einsum("dc,bchw->bhwd", mix, other) + constant
    found = LatentColors.fit(z, colors).picture(other)
    np.testing.assert_allclose(found, (expected / 2 + 0.5).clip(0, 1), atol=1e-5)


def test_a_cell_has_the_mean_of_its_pixels():
    pixels = RNG.standard_normal((1, 3, 16, 24)).astype(np.float32)
    found = cell_colors(pixels, 8)
    assert found.shape == (1, 3, 2, 3)
    assert found[0, 1, 1, 2] == pytest.approx(pixels[0, 1, 8:, 16:].mean(), abs=1e-6)


def test_a_large_latent_is_thinned_out():
    z = RNG.standard_normal((1, 4, 500, 100)).astype(np.float32)
    picture = LatentColors.fit(z, z[:, :3]).picture(z)
    assert picture.shape == (1, 167, 34, 3)


def test_estimates_follow_every_step_and_change_nothing(each_restorer):
    photo = RNG.integers(0, 256, (72, 96, 3), dtype=np.uint8)
    seen = []
    shown = each_restorer.restore(photo, on_estimate=seen.append)
    assert [picture.shape for picture in seen] == [(1, *shown_size(shown), 3)] * shown.settings.steps
    assert all(picture.min() >= 0 and picture.max() <= 1 for picture in seen)
    plain = each_restorer.restore(photo)
    assert np.array_equal(shown.photo.rgb, plain.photo.rgb)


def test_every_operation_of_the_recipe_is_told_as_it_begins(each_restorer):
    photo = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for changes in ({"color_fix": "none", "restore_pull": None}, {"color_fix": "adain", "restore_pull": 3.0}):
        told, done = [], []
        each_restorer.restore(photo, steps=1, on_stage=told.append, on_step=lambda _: done.append(len(told)), **changes)  # noqa: B023
        plan = each_restorer.plan((64, 64), each_restorer.defaults.updated({"steps": 1, **changes}))
        assert told == [operation.name for operation in plan.operations]
        assert done == [told.index("steps") + 1]


def shown_size(result):
    width, height = result.provenance["plan"]["size_px"]
    return height // 8, width // 8


def test_an_estimate_can_end_a_restoration(restorer):
    def stop(picture):
        raise RestoreError("enough")

    with pytest.raises(RestoreError, match="enough"):
        restorer.restore(np.zeros((64, 64, 3), np.uint8), on_estimate=stop)
