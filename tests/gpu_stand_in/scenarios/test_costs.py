"""What a step, and a second photo of a size, cost in calls of the driver: launches, waits, allocations, copies."""

import pytest
from gpu_stand_in.costs import STEP, costs, step_costs


@pytest.fixture(scope="module")
def opened(open_on):
    with open_on("rtx") as restorer:
        yield restorer


def test_a_step_is_one_launch_and_one_event(opened, photo, record_property):
    step = step_costs(lambda steps: opened.restore(photo, steps=steps, restore_pull=4.0, churn=0.0))
    record_property("step", step)
    print(f"\na step: {step}")
    assert step == STEP


def test_a_step_with_noise_is_one_copy_more_and_no_wait(opened, photo):
    step = step_costs(lambda steps: opened.restore(photo, steps=steps, restore_pull=4.0, churn=2.0))
    assert step["copies"] == step["launches"] == 1
    assert "waits for a stream" not in step


def test_a_first_photo_allocates_little_and_a_second_one_of_its_size_nothing(opened, photo, tall, record_property):
    opened.restore(photo, steps=5, churn=0.0, restore_pull=4.0)
    first, second = (costs(lambda: opened.restore(tall, steps=5, churn=0.0, restore_pull=4.0)) for _ in range(2))
    record_property("second photo", second)
    print(f"\na first photo: {first}\na second photo: {second}")
    assert first["allocations on the device"] <= 6
    assert second["allocations on the device"] == second["allocations of pinned memory"] == 0
    assert second["waits for a stream"] <= 2
