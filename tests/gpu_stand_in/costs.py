"""What something costs in calls of the driver: launches, waits, allocations, copies."""

from __future__ import annotations

from collections.abc import Callable

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
#: Of a step that uses no noise.
STEP = {"launches": 1, "waits for an event": 1, "events": 1}


def costs(work: Callable[[], object]) -> dict[str, int]:
    """Do something and return how many calls of each kind it took."""
    driver.counts()
    work()
    found = driver.counts()
    return {kind: sum(found.get(name, 0) for name in names) for kind, names in KINDS.items()}


def step_costs(work: Callable[[int], object]) -> dict[str, float]:
    """Return what each step costs, by the difference between 16 and 6 of them, where each size was run before.

    Args:
        work: runs a number of steps.
    """

    def second(steps: int) -> dict[str, int]:
        work(steps)
        return costs(lambda: work(steps))

    few, many = second(6), second(16)
    return {kind: (many[kind] - few[kind]) / 10 for kind in KINDS if many[kind] != few[kind]}
