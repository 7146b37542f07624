"""Memory, transfers and errors of a device, through the real `cuda.core`."""

import numpy as np
import pytest
from gpu_stand_in import driver

from engine.device.cuda import CudaDevice, device_info
from engine.device.cuda_library import driver_version
from engine.errors import BackendError, OutOfMemoryError

GIB = 1 << 30


@pytest.fixture
def device(nothing_left):
    with CudaDevice(0) as opened:
        yield opened


def test_a_gpu_says_what_it_is():
    driver.device(16 * GIB, "Stand-in A4000", cuda="13.1")
    try:
        info = device_info(0)
        assert (info.name, info.compute_capability, info.memory_bytes) == ("Stand-in A4000", "8.9", 16 * GIB)
        assert driver_version() == "13.1"
    finally:
        driver.device()


def test_memory_that_is_given_back_is_there_for_other_libraries(device):
    """Weights are TensorRT's own allocations: the pool must keep nothing, and the stream must have come to it."""
    free, total = device.memory_bytes()
    assert free == total - driver.CONTEXT_BYTES
    buffer = device.buffer((GIB // 4,), "float32")
    assert device.memory_bytes()[0] == free - GIB
    buffer.close()
    buffer.close()
    assert device.memory_bytes()[0] == free


def test_transfers_use_host_memory_again(device):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    stream, buffer = device.stream(), device.buffer((3, 4), "float32")
    before = driver.alive()["pinned blocks"]
    for round_ in range(3):
        stream.upload(buffer, array + round_)
        download = stream.download(buffer)
        assert np.array_equal(download.result(), array + round_)
        assert download.result() is download.result()
    stream.synchronize()
    assert driver.alive()["pinned blocks"] == before + 2  # one up, one down
    for _ in range(3):  # none of them is done before the next begins
        stream.upload(buffer, array)
    assert driver.alive()["pinned blocks"] == before + 3


def test_a_download_that_nobody_reads_gives_its_memory_back(device):
    stream, buffer = device.stream(), device.buffer((3, 4), "float32")
    for _ in range(5):
        stream.download(buffer)
        stream.synchronize()
    assert driver.alive()["pinned blocks"] == 1


def test_what_is_uploaded_may_change_at_once(device):
    stream, buffer = device.stream(), device.buffer((1000,), "float32")
    array = np.ones(1000, np.float32)
    stream.upload(buffer, array)
    array[...] = 2
    assert (stream.download(buffer).result() == 1).all()


def test_the_host_sleeps_while_it_waits_for_an_event(device):
    stream = device.stream()
    event, later = stream.record(), stream.record()
    assert event.raw.is_blocking_sync
    later.synchronize()
    assert later.ms_since(event) >= 0


def test_a_gpu_that_is_full_is_told_with_what_is_needed_and_what_there_is(device):
    with pytest.raises(OutOfMemoryError) as caught:
        device.buffer((25 * GIB // 4,), "float32")
    assert str(caught.value).startswith("Stand-in RTX 4090: out of GPU memory: needs 25 GiB more, 23.7 GiB free")
    assert "try --vram-budget, a smaller --min-size" in str(caught.value)


def test_a_gpu_that_is_not_there_is_told():
    with pytest.raises(BackendError, match="no such GPU") as caught:
        CudaDevice(3)
    assert "0 to 0" in str(caught.value)
