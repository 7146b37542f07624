"""Whole restorations on the stand-in are the CPU's, bit for bit: on every way to run on a GPU, in every order."""

import numpy as np
import pytest
from gpu_stand_in import driver, work

from engine.memory.size_plan import SizePlan

WAYS = ("rtx", "tensorrt", "streaming", "stripped", "cuda")
KINDS = {
    "edm": {"steps": 4},
    "unguided": {"steps": 3, "cfg_scale": (1.0, 1.0)},
    "guided at first only": {"steps": 5, "cfg_scale": (1.0, 2.0), "churn": 0.0},
    "everything": {
        "steps": 4,
        "churn": 2.0,
        "cfg_scale": (3.0, 1.5),
        "control_scale": (1.0, 0.6),
        "restore_pull": 4.0,
    },
    "dpmpp2m": {"steps": 4, "sampler": "dpmpp2m"},
    "dpmpp2m, pulled": {"steps": 4, "sampler": "dpmpp2m", "restore_pull": 2.0, "eta": 0.5},
    "one step": {"steps": 1},
}
ORDERS = (("lazy", 0), ("eager", 0), ("random", 1), pytest.param("random", 2, marks=pytest.mark.slow))


#: The others restore photos in the suite where restorers are closed, and with budgets.
OFTEN = ("rtx", "cuda")


@pytest.fixture(
    scope="module", params=[way if way in OFTEN else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def opened(request, open_on):
    with open_on(request.param) as restorer:
        restorer.way = request.param
        yield restorer


@pytest.mark.parametrize("kind", KINDS)
def test_a_restoration_is_the_cpus(opened, photo, same, kind):
    assert same(opened, photo, seed=3, **KINDS[kind])


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_no_order_of_work_changes_a_bit(opened, photo, tall, same, order, seed):
    driver.order(order, seed)
    for each in (photo, tall, photo):
        assert same(opened, each, **KINDS["everything"])


def test_steps_are_recorded_where_they_can_be(opened, photo, same):
    work.CALLS.clear()
    driver.counts()
    assert same(opened, photo, steps=6)
    launches = driver.counts().get("cuGraphLaunch", 0)
    assert (launches > 0) == (opened.way not in ("streaming", "cuda"))


@pytest.mark.parametrize("plan", [SizePlan(64), SizePlan(None, 64), SizePlan(64, 64)], ids=str)
def test_tiles_are_the_cpus(opened, restorer, tall, monkeypatch, plan):
    monkeypatch.setattr("engine.pipeline.restorer.choose_plan", lambda *_: plan)
    monkeypatch.setattr("engine.pipeline.restorer.device_plans", lambda *_: [plan])
    changes = {"steps": 3, "restore_pull": 3.0}
    results = [each.restore(tall, **changes).photo.rgb for each in (opened, restorer, opened)]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[2], results[1])


def test_photos_together_are_photos_alone(opened, photo, restorer):
    photos = [photo, photo[::-1].copy()]
    for seeds in ([1, 2], [7, 8]):
        found = opened.restore_batch(photos, seeds=seeds, steps=3)
        alone = [restorer.restore(each, seed=seed, steps=3) for each, seed in zip(photos, seeds, strict=True)]
        for one, other in zip(found, alone, strict=True):
            assert np.array_equal(one.photo.rgb, other.photo.rgb)


def test_sizes_in_a_row(opened, same):
    """Guided and not in turns: each size has recordings of its own, and more sizes than contexts are kept."""
    rng = np.random.default_rng(3)
    sizes = ((64, 64), (128, 64), (64, 128), (128, 128), (192, 64), (64, 64))
    for index, (height, width) in enumerate(sizes):
        each = rng.random((height, width, 3), dtype=np.float32)
        assert same(opened, each, steps=2, cfg_scale=(1.0, 1.0) if index % 2 else (4.0, 4.0)), (height, width)


def test_stages_called_by_themselves_leave_recorded_steps_right(opened, photo, same):
    assert same(opened, photo)
    opened.stages.encode(np.zeros((1, 3, 128, 192), np.float32))
    opened.stages.decode(np.zeros((1, 4, 24, 16), np.float32))
    assert same(opened, photo)


class CancelledError(Exception):
    pass


def test_a_cancelled_restoration_leaves_the_next_right(opened, photo, same):
    def stop(progress):
        if progress.step.index == 2:
            raise CancelledError

    with pytest.raises(CancelledError):
        opened.restore(photo, steps=30, on_step=stop)
    assert same(opened, photo)


def test_memory_is_flat_over_photos(opened, photo):
    opened.restore(photo, steps=2)
    before = driver.alive()
    for seed in range(5):
        opened.restore(photo, steps=2, seed=seed)
    assert driver.alive() == before
