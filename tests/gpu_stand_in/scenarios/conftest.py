"""What scenarios share: bundles for each kind of plan, restorers on the stand-in, and the CPU's results.

They are collected only where the stand-in is (`python tests/gpu_stand_in`): its driver must be the first of a process.
"""

import gc
import os
from pathlib import Path

import numpy as np
import pytest

SETTINGS = {"min_size": 64, "steps": 3}
#: How a bundle is built for each way of running on a GPU; "cuda" is ONNX Runtime's CUDA provider.
WAYS = {
    "rtx": {"backend": "tensorrt-rtx", "targets": ("8.9",), "shapes": "64,64-192", "batch": 2},
    "tensorrt": {"backend": "tensorrt", "shapes": "64,64-192", "batch": 2},
    "streaming": {
        "backend": "tensorrt-rtx",
        "targets": ("8.9",),
        "shapes": "64,64-192",
        "batch": 2,
        "weight_streaming": True,
    },
    "stripped": {"backend": "tensorrt-rtx", "shapes": "64,64-192", "batch": 2, "weight_stripped": True},
    "cuda": {},
}


def pytest_ignore_collect(collection_path, config):
    return True if not config.pluginmanager.hasplugin("gpu_stand_in.plugin") else None


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Make a folder once, for all processes that run scenarios where `STAND_IN_BUNDLES` names a place for them."""
    place = Path(os.environ.get("STAND_IN_BUNDLES") or tmp_path_factory.mktemp("made-once"))

    def made(name, make):
        from filelock import FileLock

        place.mkdir(exist_ok=True)
        with FileLock(place / f"{name}.lock"):
            if not (place / name).exists():  # it has its name when it is whole
                make(place / name)
        return place / name

    return made


@pytest.fixture(scope="session")
def bundle_for(build_bundle, once, bundle_fp32):
    """Return the bundle of one of `WAYS`; each is built once."""

    def make(way):
        if way == "cuda":
            return bundle_fp32
        return once(f"on-stand-in-{way}", lambda folder: build_bundle(folder, **WAYS[way]))

    return make


@pytest.fixture(scope="session")
def open_on(bundle_for):
    """Open a restorer on the stand-in, one of `WAYS`."""
    from engine import Restorer

    def opened(way, **options):
        if way == "cuda":
            options |= {"backend": "onnxruntime", "device": "cuda"}
        return Restorer.open(bundle_for(way), **options)

    return opened


@pytest.fixture(scope="session")
def photo():
    return np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)


@pytest.fixture(scope="session")
def tall():
    return np.random.default_rng(1).random((128, 64, 3), dtype=np.float32)


@pytest.fixture(scope="session")
def expected(restorer):
    """Return what the CPU makes of a photo; each is computed once."""
    known = {}

    def of(photo, **changes):
        key = (photo.tobytes(), photo.shape, tuple(sorted(changes.items())))
        if key not in known:
            known[key] = restorer.restore(photo, **changes).photo.rgb
        return known[key]

    return of


@pytest.fixture
def same(expected):
    """Restore a photo and say whether the result is the CPU's, bit for bit."""

    def restores(opened, photo, **changes):
        changes = {"steps": 3, **changes}
        return np.array_equal(opened.restore(photo, **changes).photo.rgb, expected(photo, **changes))

    return restores


@pytest.fixture
def nothing_left():
    """Fail a test that leaves anything in the driver."""
    from gpu_stand_in import driver

    gc.collect()
    before = driver.alive()
    yield
    gc.collect()
    assert driver.alive() == before
