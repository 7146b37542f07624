"""The slope of what grows linearly is 1; a seam shows where it is, and nowhere else."""

import numpy as np
import pytest

from benchmarks.scaling import sides, slope
from benchmarks.seams import SEAMLESS, border_mask, compare
from engine.sampling.tiling import Tiling


@pytest.mark.parametrize(("megapixels", "expected"), [(12, (4000, 3000)), (0.75, (1000, 750))])
def test_a_photo_of_so_many_pixels(megapixels, expected):
    assert sides(megapixels) == expected


@pytest.mark.parametrize("power", [1.0, 1.3, 2.0])
def test_the_slope_is_the_power(power):
    rows = [{"pixels": 10**k, "total_ms": 3.0 * (10**k) ** power} for k in (5, 6, 7)]
    assert slope(rows, "total_ms") == pytest.approx(power)


def test_borders_are_the_tiles_sides_inside_the_image():
    mask = border_mask(Tiling(48, 32, 32, 16), 1)
    assert sorted(np.flatnonzero(mask[:, 0])) == [15, 16, 31, 32]
    assert not border_mask(Tiling(32, 32, 32, 16)).any()


def test_a_seam_is_found_and_even_noise_is_not():
    rng = np.random.default_rng(0)
    tiles = Tiling(96, 96, 32, 16)
    whole = rng.normal(size=(1, 4, 96, 96)).astype(np.float32)
    noise = 0.01 * rng.normal(size=whole.shape).astype(np.float32)
    even = compare(whole + noise, whole, tiles, 1)
    assert 0.95 < even["ratio"] < SEAMLESS
    seam = compare(whole + noise + 0.01 * border_mask(tiles), whole, tiles, 1)
    assert seam["ratio"] > SEAMLESS
    assert even["psnr_db"] == pytest.approx(20 * np.log10(np.ptp(whole) / 0.01), abs=0.3)
