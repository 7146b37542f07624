"""Mistakes that a real driver would have shown and mocks of `cuda.core` did not, each as it was found."""

import gc

import numpy as np
import pytest
from gpu_stand_in import driver, played_tensorrt, work

from engine.device import cuda_library
from engine.device.cuda import CudaDevice
from engine.errors import BackendError, OutOfMemoryError
from engine.memory.size_plan import SizePlan

REFUSES = "cannot be captured"


def test_a_cuda_core_without_what_is_used_is_told_by_version(monkeypatch):
    import cuda.core

    monkeypatch.setattr(cuda.core, "__version__", "1.1.0")
    cuda_library.cuda_core.cache_clear()
    with pytest.raises(BackendError, match=r"cuda-core is too old") as caught:
        CudaDevice()
    assert "1.2" in caught.value.expected
    assert caught.value.found == "1.1.0"
    cuda_library.cuda_core.cache_clear()


def test_a_step_that_failed_has_not_run_so_that_the_next_is_not_recorded(open_on, photo, same):
    """TensorRT allocates in the first run at a size: a recording of it would hold memory that is not there."""
    with open_on("rtx") as opened:
        enqueued = {"UNet": 0}
        real = played_tensorrt.Context.execute_async_v3

        def fails_once(self, stream):
            if self.engine.name == "unet" and not enqueued["UNet"]:
                enqueued["UNet"] += 1
                return False
            return real(self, stream)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(played_tensorrt.Context, "execute_async_v3", fails_once)
            with pytest.raises(BackendError, match="could not run the graph"):
                opened.restore(photo, steps=3)
        assert same(opened, photo)


def test_what_has_run_is_forgotten_with_the_recordings(open_on, photo, same):
    """Contexts that are no longer recorded may be dropped; then the next run is a first one again."""
    with open_on("rtx") as opened:
        assert same(opened, photo)
        spec = opened.bundle.spec("controlnet")
        from engine.bundle.graphspec import resolve

        for height, width in ((128, 64), (64, 128), (128, 128), (192, 64), (64, 192), (192, 192)):
            symbols = {"B": 2, "h": height // 8, "w": width // 8, "k": 1}
            inputs = {t.name: np.zeros(resolve(t.shape, symbols), t.dtype) for t in spec.inputs}
            opened.stages._run("controlnet", inputs, "controlnet", None)
            opened._session._loop._work._forget_recordings()
        assert same(opened, photo)


def test_a_retry_for_memory_holds_no_network_of_the_attempt_before_it(open_on, tall, monkeypatch):
    smaller = SizePlan(64, 64)
    monkeypatch.setattr(SizePlan, "smaller", lambda self, *_, **__: smaller if self.tile_px is None else None)
    for nth in (1, 2, 4):  # of the four that a first photo takes
        work.CALLS.clear()
        with open_on("rtx") as opened:
            with driver.fault("cuMemAllocFromPoolAsync", nth, driver.OUT_OF_MEMORY) as fault:
                notes = opened.restore(tall, steps=2).notes
            assert fault.happened
            assert notes
            alive = {}
            for kind, graph, *_ in work.CALLS:
                if kind in ("deserialize", "gone"):
                    alive[graph] = alive.get(graph, 0) + (1 if kind == "deserialize" else -1)
                    assert alive[graph] <= 1, (nth, graph)
        gc.collect()


def test_every_allocation_of_tensorrt_that_fails_is_out_of_memory(open_on, photo):
    for nth in (1, 3, 6):  # the weights of one network
        with (
            driver.fault("cuMemAlloc_v2", nth, driver.OUT_OF_MEMORY),
            open_on("rtx") as opened,
            pytest.raises(OutOfMemoryError, match="TensorRT could not open the plan"),
        ):
            opened.restore(photo, steps=1)
        gc.collect()


def networks_inputs(opened, graph):
    from engine.bundle.graphspec import resolve

    spec = opened.bundle.spec(graph)
    rng = np.random.default_rng(0)
    symbols = {"B": 2, "h": 8, "w": 8, "k": 1}
    return {t.name: rng.standard_normal(resolve(t.shape, symbols)).astype(t.dtype) for t in spec.inputs}


@pytest.mark.parametrize("function", ["cuMemcpyAsync", "cuEventRecord", "cuMemAllocHost_v2"])
def test_a_second_download_that_fails_leaves_the_first_ones_memory_in_place(open_on, function, nothing_left):
    """The first copy is still to be done: its target must be there until the stream was waited for."""
    with open_on("rtx") as opened:
        inputs = networks_inputs(opened, "controlnet")
        wanted = opened.stages._run("controlnet", inputs, "controlnet", None)
        assert len(wanted) > 2
        error = driver.OUT_OF_MEMORY if "Alloc" in function else driver.LAUNCH_FAILED
        opened._backend.device.pinned.close()  # so that each transfer allocates
        with driver.fault(function, len(inputs) + 2, error) as fault, pytest.raises(BackendError) as caught:
            opened.stages._run("controlnet", inputs, "controlnet", None)
        assert fault.happened
        assert isinstance(caught.value, OutOfMemoryError) == (error == driver.OUT_OF_MEMORY)
        del caught
        found = opened.stages._run("controlnet", inputs, "controlnet", None)
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_library_that_refuses_to_be_recorded_runs_unrecorded_with_a_note(open_on, photo, same, monkeypatch):
    real = played_tensorrt.Context.execute_async_v3

    def refuses(self, stream):
        if driver.is_capturing(stream):
            self.engine.log.log(played_tensorrt.real.ILogger.ERROR, REFUSES)
            return False
        return real(self, stream)

    monkeypatch.setattr(played_tensorrt.Context, "execute_async_v3", refuses)
    with open_on("rtx") as opened:
        first = opened.restore(photo, steps=3)
        (note,) = first.notes
        assert REFUSES in note
        assert "not recorded" in note
        assert first.provenance["notes"] == [note]
        driver.counts()
        assert same(opened, photo)
        assert driver.counts().get("cuStreamBeginCapture", 0) == 0  # asked once, not for every photo


def test_the_run_that_checks_a_refit_is_in_the_memory_plan(open_on, photo, same):
    """The check runs at a size of its own, which may need more than the photo's."""
    with open_on("stripped") as opened:
        told = opened.plan((64, 64), opened.defaults).memory.residency.peak_bytes
    driver.peak_bytes()
    before = driver.alive()["device bytes"]
    with open_on("stripped", vram_budget_gib=told / 2**30) as opened:
        assert same(opened, photo)
    assert driver.peak_bytes() - before <= told


class Knot:
    """Garbage that only the collector finds."""

    def __init__(self, *held):
        self.held, self.myself = held, self


def test_garbage_that_is_collected_while_a_step_is_recorded_does_not_break_it(nothing_left):
    with CudaDevice(0) as device:
        stream, buffer = device.stream(), device.buffer((300,), "float32")
        stream.launch("clear", 300, buffer)
        Knot(stream.download(buffer), device.buffer((5,), "float32"), stream.record(), device.stream())
        recorded = stream.capture(lambda on: (on.launch("clear", 300, buffer), gc.collect()))
        recorded.launch(stream)
        assert not stream.download(buffer).result().any()
        recorded.close()
        del recorded


@pytest.mark.parametrize("way", ["rtx", "cuda"])
def test_the_first_error_is_told_whatever_fails_after_it(open_on, photo, way):
    """A device's fault stays: every later call fails as well, also those that clean up."""
    actions = {"cuLaunchKernelEx": "launch", "cuLaunchHostFunc": "run|failed", "cuMemcpyAsync": "upload|download|copy"}
    for function, action in actions.items():
        with (
            driver.fault(function, 2, driver.LAUNCH_FAILED, sticky=True) as fault,
            pytest.raises(BackendError, match=action) as caught,
            open_on(way) as opened,
        ):
            opened.restore(photo, steps=3)
        assert fault.happened, function
        assert "wait for the GPU" not in str(caught.value)  # or another call that came after
        del caught
        gc.collect()


def test_kernels_that_were_compiled_are_kept_by_the_gpus_name(open_on, photo, same):
    """GPUs of one compute capability differ in how much they run at once, and in which kernels are fastest."""
    places = set()
    for name in ("Stand-in RTX 4090", "Stand-in RTX 4060"):
        driver.device(name=name)
        try:
            with open_on("rtx") as opened:
                assert opened._backend.device.name == name
                places.add(opened._backend._cached(opened.bundle, "unet.kernels"))
        finally:
            driver.device()
    assert len(places) == 2


def test_a_driver_that_is_too_old_is_told_by_version_before_anything_else():
    driver.device(cuda="12.4")
    driver.counts()
    try:
        with pytest.raises(BackendError, match="driver is too old") as caught:
            CudaDevice(0)
    finally:
        driver.device()
    assert "12.4" in caught.value.found
    assert "13" in caught.value.expected
    assert set(driver.counts()) <= {"cuInit", "cuDriverGetVersion"}
