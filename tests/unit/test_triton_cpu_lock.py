"""Networks of several processes run one at a time, and nobody is overtaken twice."""

import fcntl
import multiprocessing
import os
import shutil
import tempfile
import time

import pytest

from engine.errors import UsageError
from triton_repo.cpu_lock import FairLock
from triton_repo.models.device import cpu_lock_of
from triton_repo.runtime_dir import VARIABLE, make_runtime_dir, runtime_dir
from triton_repo.serving import ServingConfig

SPAWN = multiprocessing.get_context("spawn")
PATIENCE_S = 60


def count_up(folder, counter, times):
    """Add to a number without any care, so that what is done at the same time is lost."""
    lock = FairLock(folder)
    for _ in range(times):
        with lock:
            value = counter.value
            time.sleep(0.001)
            counter.value = value + 1


def test_one_process_at_a_time(tmp_path):
    counter = SPAWN.Value("i", lock=False)
    processes = [SPAWN.Process(target=count_up, args=(tmp_path, counter, 50)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    assert counter.value == 150


def take_turn_after_turn(folder, taken, stop):
    lock = FairLock(folder)
    while not stop.is_set():
        with lock:
            taken.value += 1
            time.sleep(0.02)


def test_who_waits_is_next(tmp_path):
    taken, stop = SPAWN.Value("i"), SPAWN.Event()
    greedy = SPAWN.Process(target=take_turn_after_turn, args=(tmp_path, taken, stop))
    greedy.start()
    lock = FairLock(tmp_path)
    try:
        while not taken.value:
            time.sleep(0.01)
        for _ in range(10):
            before = taken.value
            with lock:
                assert taken.value - before <= 2  # the one under way, and one that had been waiting
    finally:
        stop.set()
        greedy.join(PATIENCE_S)


def test_nobody_else_has_a_turn_meanwhile(tmp_path):
    lock = FairLock(tmp_path)
    with lock:
        assert not is_free(tmp_path)
        lock.yield_to_waiter()  # nobody waits
        assert not is_free(tmp_path)
    assert is_free(tmp_path)


def is_free(folder):
    with (folder / "turn").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def wait_for_turn(folder, waits, had):
    lock = FairLock(folder)
    waits.set()
    with lock:
        had.set()


def test_who_waits_can_go_first_within_a_turn(tmp_path):
    waits, had = SPAWN.Event(), SPAWN.Event()
    other = SPAWN.Process(target=wait_for_turn, args=(tmp_path, waits, had))
    lock = FairLock(tmp_path)
    with lock:
        other.start()
        assert waits.wait(PATIENCE_S)
        assert not had.wait(0.2)
        while not had.is_set():
            lock.yield_to_waiter()
            time.sleep(0.01)
        assert not is_free(tmp_path)
    other.join(PATIENCE_S)


def hold(folder, held):
    with FairLock(folder):
        held.set()
        time.sleep(PATIENCE_S)


def test_a_process_that_dies_gives_its_turn_up(tmp_path):
    held = SPAWN.Event()
    holder = SPAWN.Process(target=hold, args=(tmp_path, held))
    holder.start()
    assert held.wait(PATIENCE_S)
    holder.kill()
    with FairLock(tmp_path):
        holder.join(PATIENCE_S)
    assert holder.exitcode != 0


@pytest.mark.parametrize(
    ("kind", "threads", "is_locked"),
    [("CPU", 0, True), ("CPU", 1, False), ("CPU", 4, True), ("CPU", 8, True), ("GPU", 0, False)],
)
def test_turns_are_for_those_that_use_every_core(kind, threads, is_locked, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    tmp_path.chmod(0o700)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    serving = ServingConfig(bundle=tmp_path, digest="", backend="onnxruntime", threads=threads)
    lock = cpu_lock_of({"model_instance_kind": kind, "model_instance_device_id": "0"}, serving)
    assert isinstance(lock, FairLock) == is_locked
    with lock:
        lock.yield_to_waiter()


def test_processes_meet_where_nobody_else_can_go(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", tempfile.mkdtemp(dir="/tmp"))
    folders = [make_runtime_dir(), make_runtime_dir()]
    assert folders[0] != folders[1]
    monkeypatch.setenv(VARIABLE, str(folders[0]))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where another process would look
    assert runtime_dir() == folders[0]
    assert runtime_dir().stat().st_mode & 0o777 == 0o700
    runtime_dir().chmod(0o755)
    with pytest.raises(UsageError, match="others can enter it"):
        runtime_dir()
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(UsageError, match=f"{VARIABLE}: not set"):
        runtime_dir()
    shutil.rmtree(folders[0].parent)


def test_a_folder_that_no_socket_could_lie_in_is_refused(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(UsageError, match="TMPDIR"):
        make_runtime_dir()
    assert list(long.iterdir()) == []
