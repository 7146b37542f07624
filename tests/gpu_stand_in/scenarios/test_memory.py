"""Budgets: what is used is what was said and no more than was allowed, and the photo is the same."""

import gc

import pytest
from gpu_stand_in import driver, work

MIB = 1 << 20
#: Shares of what everything would take.
SHARES = {
    "rtx": (0.99, 0.75, 0.62),
    "streaming": (0.75, 0.4, 0.3),
    "stripped": (0.75,),
}


@pytest.mark.parametrize(("way", "share"), [(way, share) for way, shares in SHARES.items() for share in shares])
def test_a_budget_is_kept_and_the_photo_the_same(open_on, photo, tall, same, nothing_left, way, share):
    with open_on(way) as opened:
        everything = opened.plan((64, 64), opened.defaults.updated({"steps": 3})).memory.residency.peak_bytes
    gc.collect()
    budget = int(everything * share)
    before = driver.alive()["device bytes"]
    with open_on(way, vram_budget_gib=budget / 2**30) as opened:
        for each in (photo, tall, photo):
            size = (each.shape[1], each.shape[0])
            told = opened.plan(size, opened.defaults.updated({"steps": 3})).memory
            driver.peak_bytes()
            assert same(opened, each)
            assert same(opened, each, restore_pull=4.0)
            used = driver.peak_bytes() - before
            assert used <= budget
            assert told.residency.peak_bytes <= budget
            assert bool(told.residency.streamed) == (way == "streaming" and share < 0.5)
            assert told.residency.loaded_by_stage or told.residency.streamed


def test_what_a_size_was_said_to_need_is_what_it_takes(open_on, photo, same):
    gc.collect()
    before = driver.alive()["device bytes"]
    with open_on("rtx") as opened:
        told = opened.plan((64, 64), opened.defaults.updated({"steps": 3, "restore_pull": 4.0})).memory
        driver.peak_bytes()
        assert same(opened, photo, restore_pull=4.0)
        used = driver.peak_bytes() - before
    assert told.residency.peak_bytes - MIB < used <= told.residency.peak_bytes + 4096  # with each piece's own rounding


def test_activations_are_those_of_the_photos_size_not_of_the_largest(open_on, tall, same):
    """The profile goes to 192 pixels; a photo of 64 × 128 has less than a quarter of the cells."""
    with open_on("rtx") as opened:
        plan = opened.plan((64, 128), opened.defaults.updated({"steps": 3}))
        largest = opened.plan((192, 192), opened.defaults.updated({"steps": 3}))
        assert plan.memory.activations_bytes < largest.memory.activations_bytes / 1.2
        assert same(opened, tall)
    with open_on("rtx") as opened:  # noted for the next start
        assert opened.plan((64, 128), opened.defaults.updated({"steps": 3})).memory == plan.memory
        assert not any(call[0] == "deserialize" for call in work.CALLS[-1:])


def test_kernels_are_written_when_there_are_new_ones(open_on, photo, tall, same, tmp_path, monkeypatch):
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path))

    def written():
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*.kernels")}

    with open_on("rtx") as opened:
        assert same(opened, photo)
    first = written()
    assert "unet.kernels" in first
    with open_on("rtx") as opened:
        assert same(opened, photo)
    assert written() == first
    with open_on("rtx") as opened:
        assert same(opened, tall)
    assert written()["unet.kernels"] > first["unet.kernels"]
