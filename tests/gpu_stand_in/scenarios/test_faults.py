"""Each call of the driver that can fail, failing once: one error of ours, nothing left behind, the next photo right.

Which calls there are is counted, so that a new one is tried without being named here.
"""

import gc

import numpy as np
import pytest
from gpu_stand_in import driver

from engine.errors import BackendError, OutOfMemoryError

#: Calls that give something back, with what `cuda.core` asks for meanwhile: what fails there is lost, and nobody could
#: do anything about it. What `cuda.core` does for itself alone, whose failure it does not tell or, when it asks about a
#: capture that it began, loses the graph by. And what the played
#: libraries ask to hold callers to their rules.
NOT_TRIED = (
    *("Destroy", "Free", "Unload", "Release", "cuCtxGetCurrent"),
    *("cuGetError", "cuGetExportTable", "UserObject", "cuStreamGetCaptureInfo"),
    *("cuMemGetAddressRange", "cuStreamIsCapturing"),
)
#: What fails for want of memory; other calls fail with an error of the device.
ALLOCATES = "Alloc"
CHANGES = {"steps": 3, "restore_pull": 4.0}


def error_of(function):
    return driver.OUT_OF_MEMORY if ALLOCATES in function else driver.LAUNCH_FAILED


def tried(counts):
    return {name: count for name, count in sorted(counts.items()) if not any(word in name for word in NOT_TRIED)}


def places(count, every):
    """Return which calls of a function fail: all, or the first and one behind the middle."""
    return range(1, count + 1) if every else sorted({1, 1 + count // 2} & set(range(1, count + 1)))


SLOW = pytest.mark.slow


def held():
    """Return what is there but for host memory: a copy that failed may have needed a piece more, which is kept."""
    gc.collect()
    return {kind: number for kind, number in driver.alive().items() if kind != "pinned blocks"}


def attempt(restore, wanted):
    """Return how a restoration in which a call failed ended: "right", or the error that was told."""
    try:
        found = restore()
    except BackendError as error:
        return error
    assert np.array_equal(found.photo.rgb, wanted)
    return "right"


def check_error(error, function):
    if error == "right":
        return
    assert type(error) in (BackendError, OutOfMemoryError), repr(error)
    if error_of(function) == driver.OUT_OF_MEMORY:
        assert isinstance(error, OutOfMemoryError), f"{function}: {error}"
    else:
        assert not isinstance(error, OutOfMemoryError), f"{function}: {error}"


@pytest.fixture
def every(request):
    return request.config.getoption("--slow")


@pytest.mark.parametrize("way", ["rtx", pytest.param("tensorrt", marks=SLOW), pytest.param("cuda", marks=SLOW)])
def test_a_call_that_fails_during_a_restoration(
    open_on, photo, tall, expected, nothing_left, way, every, record_property
):
    """Two sizes in turns: what was allocated and recorded for the one is made anew for the other."""
    wanted = {id(each): expected(each, **CHANGES) for each in (photo, tall)}
    failed = []
    with open_on(way) as opened:

        def restore(each):
            return opened.restore(each, **CHANGES)

        for each in (photo, tall, photo):
            restore(each)
        left = held()
        driver.counts()
        restore(tall)
        calls = tried(driver.counts())
        assert len(calls) > 10, calls
        restore(photo)
        for function, count in calls.items():
            for nth in places(count, every):
                with driver.fault(function, nth, error_of(function)) as fault:
                    outcome = attempt(lambda: restore(tall), wanted[id(tall)])
                check_error(outcome, function)
                if fault.happened:
                    failed.append((function, nth, str(outcome)[:60]))
                del outcome
                for each in (tall, photo):
                    assert np.array_equal(restore(each).photo.rgb, wanted[id(each)]), (function, nth)
                assert held() == left, (function, nth)
    record_property("failed", len(failed))
    print(f"\n{way}: {len(failed)} calls of {len(calls)} functions failed", *failed, sep="\n  ")
    assert len(failed) >= len(calls)


@pytest.mark.parametrize("way", ["rtx", pytest.param("cuda", marks=SLOW)])
def test_a_call_that_fails_while_a_bundle_is_opened_and_first_used(
    open_on, photo, expected, nothing_left, way, every, record_property
):
    wanted = expected(photo, **CHANGES)

    def restore():
        with open_on(way) as opened:
            return opened.restore(photo, **CHANGES)

    restore()
    driver.counts()
    restore()
    calls = tried(driver.counts())
    failed = []
    gc.collect()
    left = driver.alive()
    for function, count in calls.items():
        for nth in places(count, every=False) if every else (1,):
            with driver.fault(function, nth, error_of(function)) as fault:
                outcome = attempt(restore, wanted)
            check_error(outcome, function)
            if fault.happened:
                failed.append((function, nth, str(outcome)[:60]))
            del outcome
            gc.collect()
            assert driver.alive() == left, (function, nth)
    assert np.array_equal(restore().photo.rgb, wanted)
    record_property("failed", len(failed))
    print(f"\n{way}: {len(failed)} calls of {len(calls)} functions failed", *failed, sep="\n  ")
