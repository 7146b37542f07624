"""Pictures made by program, and what is done to them."""

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the train extra")

from export.demo.pictures import make_picture
from export.training.degrade import TABLE_1, Degradation, degrade, random_degradation

FAMILIES = ("leaves", "landscape", "portrait")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_follows_from_its_number(family):
    first, again, other = (make_picture(family, 1, index, 64) for index in (7, 7, 8))
    assert first.rgb.shape == (64, 64, 3)
    assert first.rgb.dtype == np.uint8
    assert np.array_equal(first.rgb, again.rgb)
    assert first.caption == again.caption
    assert not np.array_equal(first.rgb, other.rgb)
    assert not np.array_equal(first.rgb, make_picture(family, 2, 7, 64).rgb)


@pytest.mark.parametrize(
    ("family", "words"), [("leaves", "a picture of shapes"), ("landscape", "a landscape"), ("portrait", "a portrait")]
)
def test_captions_say_the_family_and_a_colour(family, words):
    for index in range(5):
        head, _, colour = make_picture(family, 0, index, 64).caption.rpartition(", ")
        assert head.startswith(words)
        assert colour in {"red", "yellow", "green", "blue", "white", "grey", "black"}


def test_leaves_have_the_statistics_of_natural_images():
    """Power falls about as 1/f², and gradients are far more peaked than a Gaussian's."""
    slopes, kurtoses = [], []
    for index in range(6):
        grey = make_picture("leaves", 3, index, 128).rgb.mean(axis=2) / 255
        power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
        radius = np.rint(np.hypot(*np.meshgrid(*[np.fft.fftfreq(128) * 128] * 2))).astype(int)
        profile = np.bincount(radius.ravel(), power.ravel())[4:40] / np.bincount(radius.ravel())[4:40]
        slopes.append(np.polyfit(np.log(np.arange(4, 40)), np.log(profile), 1)[0])
        gradient = np.diff(grey, axis=1).ravel()
        kurtoses.append(((gradient - gradient.mean()) ** 4).mean() / gradient.var() ** 2)
    assert -3.5 < np.mean(slopes) < -1.0
    assert np.median(kurtoses) > 5


def flat(value=0.5, side=64):
    return np.full((side, side, 3), value, np.float32)


def test_degradations_do_what_they_say():
    rng = np.random.default_rng(0)
    assert degrade(flat(), Degradation(factor=4), rng).shape == (16, 16, 3)
    noisy = degrade(flat(side=256), Degradation(noise_sigma=30), rng)
    assert (noisy - 0.5).std() * 255 == pytest.approx(30, rel=0.02)
    point = flat(0.0)
    point[32, 32] = 1.0
    blurred = degrade(point, Degradation(blur_sigma=1.0), rng)
    assert blurred[32, 32] == pytest.approx(1 / (2 * np.pi), abs=0.005)
    detailed = make_picture("leaves", 0, 0, 64).rgb.astype(np.float32) / 255
    blocky = degrade(detailed, Degradation(jpeg_quality=10), rng)
    assert 0.005 < np.abs(blocky - detailed).mean() < 0.2
    assert np.array_equal(degrade(detailed, Degradation(), rng), detailed)


@pytest.mark.parametrize("name", TABLE_1)
def test_degraded_pictures_are_eight_bit(name):
    detailed = make_picture("leaves", 0, 0, 64).rgb.astype(np.float32) / 255
    result = degrade(detailed, TABLE_1[name], np.random.default_rng(0))
    assert result.dtype == np.float32
    assert np.allclose(result * 255, np.rint(result * 255), atol=1e-3)
    assert result.min() >= 0
    assert result.max() <= 1
    assert not np.array_equal(result, detailed)


def test_the_noise_is_the_generators():
    same = [degrade(flat(), TABLE_1["blur σ=3, noise σ=30"], np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[2])


def test_random_degradations_are_of_table_1_half_of_the_time():
    rng = np.random.default_rng(0)
    drawn = [random_degradation(rng) for _ in range(400)]
    share = np.mean([degradation in TABLE_1.values() for degradation in drawn])
    assert 0.4 < share < 0.6
    assert {degradation.factor for degradation in drawn} == {1, 2, 4}
    assert any(degradation.jpeg_quality for degradation in drawn)
