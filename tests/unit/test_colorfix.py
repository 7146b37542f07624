import numpy as np
import pytest
from golden import assert_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.image.colorfix import adain, wavelet


def image(seed, height=37, width=53):
    return np.random.default_rng(seed).uniform(-1, 1, (2, 3, height, width)).astype(np.float32)


def test_wavelet_matches_reference(reference):
    assert_golden(wavelet(reference["color/decoded"], reference["vae/stage1"]), reference["color/wavelet"], 5e-6)


def test_adain_matches_reference(reference):
    assert_golden(adain(reference["color/decoded"], reference["vae/stage1"]), reference["color/adain"], 5e-6)


@pytest.mark.parametrize("fix", [wavelet, adain])
def test_its_own_colours_leave_an_image_as_it_is(fix):
    assert np.allclose(fix(image(0), image(0)), image(0), atol=1e-5)


@pytest.mark.parametrize("fix", [wavelet, adain])
def test_a_colour_cast_is_undone(fix):
    cast = image(0) + np.array([0.3, -0.2, 0.1], np.float32).reshape(1, 3, 1, 1)
    assert np.allclose(fix(cast, image(0)), image(0), atol=1e-5)


def test_adain_of_a_nearly_flat_image_is_held_by_its_epsilon():
    flat = 0.25 + 1e-3 * image(0)
    gain = np.std(adain(flat, image(1)), axis=(2, 3)) / np.std(flat, axis=(2, 3))
    variance = (flat.var(axis=(2, 3), ddof=1), image(1).var(axis=(2, 3), ddof=1))
    assert np.allclose(gain, np.sqrt((variance[1] + 1e-5) / (variance[0] + 1e-5)), rtol=1e-3)


@pytest.mark.parametrize("fix", [wavelet, adain])
def test_images_of_a_batch_do_not_mix(fix):
    both = fix(image(0), image(1))
    for index in range(2):
        alone = fix(image(0)[index : index + 1], image(1)[index : index + 1])
        assert np.array_equal(both[index : index + 1], alone)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_wavelet_of_flat_images_is_the_reference(height, width):
    flat = np.full((1, 3, height, width), 0.25, np.float32)
    assert np.allclose(wavelet(flat, -flat), -flat, atol=1e-6)


@pytest.mark.parametrize("fix", [wavelet, adain])
@pytest.mark.parametrize("height", [1, 40, 255, 256, 257, 300, 600])
def test_the_result_may_go_over_the_content(fix, height):
    content, reference = (np.random.default_rng(seed).random((2, 3, height, 9), np.float32) for seed in (0, 1))
    expected = fix(content, reference)
    assert fix(content, reference, out=content) is content
    assert np.array_equal(content, expected)


def test_arguments_are_not_changed():
    content, reference = image(0), image(1)
    wavelet(content, reference)
    adain(content, reference)
    assert np.array_equal(content, image(0))
    assert np.array_equal(reference, image(1))
