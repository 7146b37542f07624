"""`benchmarks.metrics` gives piq's values, and each measure sees blur, noise, shuffled pixels and nothing at all."""

import numpy as np
import pytest

data = pytest.importorskip("skimage.data", reason="needs the quality extra")
from scipy.ndimage import gaussian_filter

from benchmarks import metrics

ALIKE = {"haarpsi": metrics.haarpsi, "gmsd": metrics.gmsd, "mdsi": metrics.mdsi}
#: piq 0.8.0's haarpsi, gmsd and mdsi of (the picture, the truth) on 2026-11-30, in float64, torch 2.13.0+cpu, its three
#: modules imported without `piq/__init__.py`, which needs torchvision. The truth is the top left of the astronaut.
PIQ = {
    (256, 256): {
        "blurred": (0.77509, 0.09879, 0.39069),
        "negative": (0.81326, 0.08212, 0.50794),
        "zeros": (0.06511, 0.38612, 0.69214),
        "grey": (0.41438, 0.00900, 0.40639),
    },
    (201, 255): {  # odd sides
        "blurred": (0.79626, 0.09393, 0.37991),
        "negative": (0.68254, 0.11527, 0.49852),
        "zeros": (0.06799, 0.38639, 0.68782),
        "grey": (0.44297, 0.00966, 0.39012),
    },
    (512, 512): {  # which MDSI halves
        "blurred": (0.73577, 0.11482, 0.34421),
        "negative": (0.79529, 0.07130, 0.55026),
        "zeros": (0.06317, 0.38483, 0.73666),
        "grey": (0.40582, 0.01762, 0.45966),
    },
}


def truth_of(height, width):
    return data.astronaut()[:height, :width].astype(np.float32) / np.float32(255)


def changed(truth):
    rng = np.random.default_rng(0)
    return {
        "blurred": gaussian_filter(truth, (2, 2, 0)),
        "negative": 1 - truth,
        "zeros": np.zeros_like(truth),
        "grey": np.repeat(truth.mean(axis=2, keepdims=True), 3, axis=2),
        "noisy": (truth + rng.normal(0, 0.1, truth.shape).astype(np.float32)).clip(0, 1),
        "shuffled": rng.permutation(truth.reshape(-1, 3)).reshape(truth.shape),
    }


@pytest.mark.parametrize("size", PIQ)
def test_values_are_piqs(size):
    truth = truth_of(*size)
    pictures = changed(truth)
    for change, expected in PIQ[size].items():
        found = [measure(truth, pictures[change]) for measure in ALIKE.values()]
        assert found == pytest.approx(expected, abs=1e-5), change


@pytest.mark.parametrize("name", ALIKE)
def test_equal_pictures_are_best_and_each_change_is_seen(name):
    truth, measure = truth_of(256, 256), ALIKE[name]
    best = 1.0 if name == "haarpsi" else 0.0
    assert measure(truth, truth) == pytest.approx(best, abs=1e-6)
    pictures = changed(truth)
    away = {change: abs(measure(truth, picture) - best) for change, picture in pictures.items()}
    assert min(away[change] for change in ("blurred", "noisy", "shuffled", "zeros")) > 0.05
    more_blurred = abs(measure(truth, gaussian_filter(truth, (4, 4, 0))) - best)
    assert away["blurred"] < more_blurred < away["shuffled"]


def test_edges_lose_by_blur_and_gain_nothing_by_noise():
    truth = truth_of(256, 256)
    pictures = changed(truth)
    found = {change: metrics.edge_sharpness(truth, picture) for change, picture in pictures.items()}
    assert metrics.edge_sharpness(truth, truth) == pytest.approx(1)
    assert metrics.edge_sharpness(truth, truth * np.float32(0.5)) == pytest.approx(0.5, abs=1e-3)
    assert found["blurred"] < 0.5
    assert found["noisy"] == pytest.approx(1, abs=0.05)
    assert found["negative"] == pytest.approx(-1, abs=1e-3)
    assert found["zeros"] == pytest.approx(0, abs=1e-3)
    assert abs(found["shuffled"]) < 0.05


def test_detail_is_counted_in_the_octave_where_it_is():
    row, column = np.mgrid[:128, :128]
    for band, (low, high) in metrics.BANDS.items():
        frequency = (low + high) / 2
        wave = np.sin(2 * np.pi * frequency * (row + 0.3 * column)) / np.hypot(1, 0.3) * 0.2
        grey = np.full((128, 128, 3), 0.5, np.float32)
        waving = (grey + wave[:, :, None]).astype(np.float32)
        found = metrics.detail_energy(grey, waving)
        assert max(found, key=found.get) == band
        assert found[band] > 20
        halved = metrics.detail_energy(waving, ((waving - grey) / 2 + grey).astype(np.float32))
        assert halved[band] == pytest.approx(20 * np.log10(0.5), abs=0.1)  # half the amplitude


def test_detail_is_lost_by_blur_and_gained_by_noise():
    truth = truth_of(256, 256)
    pictures = changed(truth)
    assert set(metrics.detail_energy(truth, truth).values()) == {0.0}
    blurred = metrics.detail_energy(truth, pictures["blurred"])
    assert 0 > blurred["coarse"] > blurred["middle"] > blurred["fine"]
    assert metrics.detail_energy(truth, pictures["noisy"])["fine"] > 3
    assert metrics.detail_energy(truth, pictures["zeros"])["coarse"] < -30


@pytest.mark.parametrize("shade", [0.0, 0.5, 1.0])
def test_flat_pictures_have_finite_figures(shade):
    flat = np.full((64, 64, 3), shade, np.float32)
    for measure in (*ALIKE.values(), metrics.edge_sharpness):
        assert np.isfinite(measure(flat, flat))
        assert np.isfinite(measure(flat, truth_of(64, 64)))
    assert set(metrics.detail_energy(flat, flat).values()) == {0.0}
