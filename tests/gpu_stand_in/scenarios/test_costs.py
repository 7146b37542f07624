"""What a step, and a second photo of a size, cost in calls of the driver: launches, waits, allocations, copies."""

import pytest
from gpu_stand_in import driver

KINDS = {
    "launches": ("cuGraphLaunch", "cuLaunchKernelEx", "cuLaunchHostFunc"),
    "waits for a stream": ("cuStreamSynchronize",),
    "waits for an event": ("cuEventSynchronize",),
    "allocations on the device": ("cuMemAllocFromPoolAsync", "cuMemAlloc_v2"),
    "allocations of pinned memory": ("cuMemAllocHost_v2",),
    "copies": ("cuMemcpyAsync",),
    "events": ("cuEventRecord",),
}
STEP = {"launches": 1, "waits for an event": 1, "events": 1}


def costs(restore):
    driver.counts()
    restore()
    found = driver.counts()
    return {kind: sum(found.get(name, 0) for name in names) for kind, names in KINDS.items()}


def second_photos_costs(opened, photo, **changes):
    """Return what a photo costs behind one of its size."""
    opened.restore(photo, **changes)
    return costs(lambda: opened.restore(photo, **changes))


@pytest.fixture(scope="module")
def opened(open_on):
    with open_on("rtx") as restorer:
        yield restorer


def test_a_step_is_one_launch_and_one_event(opened, photo, record_property):
    changes = {"restore_pull": 4.0, "churn": 0.0}
    few, many = (second_photos_costs(opened, photo, steps=steps, **changes) for steps in (6, 16))
    step = {kind: (many[kind] - few[kind]) / 10 for kind in KINDS if many[kind] != few[kind]}
    record_property("step", step)
    print(f"\na step: {step}")
    assert step == STEP


def test_a_step_with_noise_is_one_copy_more_and_no_wait(opened, photo):
    changes = {"restore_pull": 4.0, "churn": 2.0}
    few, many = (second_photos_costs(opened, photo, steps=steps, **changes) for steps in (6, 16))
    assert many["waits for a stream"] == few["waits for a stream"]
    assert many["launches"] - few["launches"] == 10
    assert many["copies"] - few["copies"] == 10


def test_a_second_photo_of_a_size_allocates_and_records_nothing(opened, photo, record_property):
    first = costs(lambda: opened.restore(photo, steps=5, churn=0.0, restore_pull=4.0))
    second = costs(lambda: opened.restore(photo, steps=5, churn=0.0, restore_pull=4.0))
    record_property("second photo", second)
    print(f"\na first photo: {first}\na second photo: {second}")
    assert second["allocations on the device"] == second["allocations of pinned memory"] == 0
    assert second["waits for a stream"] <= 2
