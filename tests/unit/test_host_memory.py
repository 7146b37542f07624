import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest

from engine.image.photo import Photo
from engine.memory.budget import BYTES_PER_PIXEL
from engine.memory.host_memory import available_memory_bytes, peak_memory_bytes, total_memory_bytes

#: Blocks that malloc takes from its heap, with one above them that keeps the heap from shrinking by itself.
FREE_BLOCKS = """
import ctypes, psutil
from engine.memory.host_memory import release_free_memory
libc, me = ctypes.CDLL(None), psutil.Process()
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(100_000) for _ in range(3000)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:
    libc.free(block)
held = me.memory_info().rss
release_free_memory()
print(held - me.memory_info().rss)
"""
#: Blocks of ORT's kind: one of 31 MiB was freed before, so that malloc takes 4 MiB from its heap.
FREE_LARGE_BLOCKS = """
import ctypes, psutil, sys
from engine.memory.host_memory import return_large_blocks_at_once
libc, me = ctypes.CDLL(None), psutil.Process()
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(31 << 20))
if sys.argv[1] == "at once":
    return_large_blocks_at_once()
blocks = [libc.malloc(4 << 20) for _ in range(64)]
for block in blocks:
    ctypes.memset(block, 1, 4 << 20)
held = me.memory_info().rss
for block in blocks[:-1]:
    libc.free(block)
print(held - me.memory_info().rss)
"""


def test_peak_memory_is_bytes():
    assert 10e6 < (peak_memory_bytes() or 0) < total_memory_bytes()


# -- limits of control groups ---------------------------------------------------------------------

MIB = 1 << 20
#: Names of files in both versions: limit, use, and what can be dropped, in "memory.stat".
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
#: What version 1 writes where there is no limit.
NO_LIMIT = 9223372036854771712


def group(folder, version, limit, in_use=0, dropped=0):
    """Write a control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    limit_file, use_file, key = version
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / use_file).write_text(f"{in_use}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{key} {dropped}\nfile 7\n")


def belongs_to(root, *lines):
    """Say which groups the process belongs to, as Linux does."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
    return root


def test_without_control_groups_all_of_the_computers_memory_may_be_used(tmp_path):
    assert total_memory_bytes(tmp_path) == psutil.virtual_memory().total
    assert 0 < available_memory_bytes(tmp_path) <= psutil.virtual_memory().total


def test_a_containers_limit_bounds_the_memory(tmp_path):
    """Under version 2, with a namespace of its own, a container sees its group as the root."""
    root = belongs_to(tmp_path, "0::/")
    group(root / "sys/fs/cgroup", V2, 64 * MIB, 24 * MIB, 4 * MIB)
    assert total_memory_bytes(root) == 64 * MIB
    assert available_memory_bytes(root) == 44 * MIB


def test_the_smallest_limit_of_a_group_and_those_that_hold_it_counts(tmp_path):
    root = belongs_to(tmp_path, "0::/pods/one/worker")
    place = root / "sys/fs/cgroup"
    group(place / "pods", V2, 64 * MIB, 60 * MIB)
    group(place / "pods/one", V2, 32 * MIB, 2 * MIB)
    group(place / "pods/one/worker", V2, "max", 1 * MIB)
    group(place / "pods/other", V2, 1 * MIB)
    assert total_memory_bytes(root) == 32 * MIB
    assert available_memory_bytes(root) == 4 * MIB  # others of `pods` have taken the rest


@pytest.mark.parametrize("path", ["/docker/0123", "/../../elsewhere"])
def test_a_path_that_the_container_does_not_see_is_its_own_root(tmp_path, path):
    root = belongs_to(tmp_path, f"0::{path}")
    group(root / "sys/fs/cgroup", V2, 64 * MIB)
    assert total_memory_bytes(root) == 64 * MIB


def test_version_1_has_a_hierarchy_of_its_own_for_memory(tmp_path):
    root = belongs_to(tmp_path, "5:cpu,cpuacct:/cpu", "4:memory:/jobs/one", "1:name=systemd:/", "0::/")
    place = root / "sys/fs/cgroup/memory"
    group(place, V1, NO_LIMIT, 900 * MIB)
    group(place / "jobs", V1, NO_LIMIT, 90 * MIB)
    group(place / "jobs/one", V1, 48 * MIB, 40 * MIB, 30 * MIB)
    group(place / "cpu", V1, 1 * MIB)
    assert total_memory_bytes(root) == 48 * MIB
    assert available_memory_bytes(root) == 38 * MIB


def test_more_in_use_than_the_limit_leaves_nothing(tmp_path):
    root = belongs_to(tmp_path, "0::/")
    group(root / "sys/fs/cgroup", V2, 8 * MIB, 9 * MIB)
    assert available_memory_bytes(root) == 0


#: Joins a real control group, and tells what it may use there.
JOIN = """
import sys
from pathlib import Path
from engine.memory.host_memory import available_memory_bytes, total_memory_bytes
Path(sys.argv[1], "cgroup.procs").write_text("0")
held = bytearray(64 << 20)
print(total_memory_bytes(), available_memory_bytes())
"""


@pytest.fixture
def real_group():
    """A control group of this computer, with 512 MiB; skipped where this user may make none."""
    version, mount = (V1, "memory") if Path("/sys/fs/cgroup/memory").is_dir() else (V2, "")
    folder = Path("/sys/fs/cgroup", mount, f"restore-test-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        (folder / version[0]).write_text(str(512 * MIB))
    except OSError as error:
        folder.rmdir()
        pytest.skip(f"no limit can be set here: {error}")
    yield folder
    folder.rmdir()


def test_a_process_under_a_real_limit_knows_it(real_group):
    command = [sys.executable, "-c", JOIN, str(real_group)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total, available = map(int, done.stdout.split())
    assert total == 512 * MIB
    assert 256 * MIB < available < (512 - 64) * MIB


#: Takes limits of its own, and tells what it may use then.
LIMIT = """
import resource, sys
from engine.memory.host_memory import available_memory_bytes, check_addresses, total_memory_bytes
kind, limit = getattr(resource, sys.argv[1]), int(sys.argv[2]) << 20
resource.setrlimit(kind, (limit, limit))
held = bytearray(64 << 20)
print(total_memory_bytes(), available_memory_bytes())
check_addresses()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux counts them")
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process_count(kind):
    done = subprocess.run([sys.executable, "-c", LIMIT, kind, "1000"], capture_output=True, text=True, check=True)
    total, available = map(int, done.stdout.split())
    assert total == 1000 * MIB
    assert 600 * MIB < available < (1000 - 64) * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux counts them")
def test_too_few_addresses_for_libraries_are_told_before_they_are_loaded():
    done = subprocess.run([sys.executable, "-c", LIMIT, "RLIMIT_AS", "300"], capture_output=True, text=True)
    assert "OutOfMemoryError: out of memory\n  expected: 400 MiB of addresses" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_blocks_go_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", FREE_BLOCKS], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 250e6


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
@pytest.mark.parametrize(("when", "at_least", "at_most"), [("at once", 250e6, 270e6), ("never", -1e6, 20e6)])
def test_large_blocks_go_back_when_they_are_freed(when, at_least, at_most):
    done = subprocess.run([sys.executable, "-c", FREE_LARGE_BLOCKS, when], capture_output=True, text=True, check=True)
    assert at_least < int(done.stdout) < at_most


def test_the_arrays_of_a_large_photo_are_those_that_the_budget_counts(restorer, monkeypatch):
    """A tall photo: rows that are worked on at a time count little beside it."""

    class Networks:
        def run(self, plan, lq, noise, listener, times):
            shape = lq.shape
            del lq
            return {"pixels": np.full(shape, 0.5, np.float32), "stage1": np.zeros(shape, np.float32)}

    monkeypatch.setattr(restorer, "_executor", Networks())
    photo = Photo(np.full((12_040, 200, 3), 0.25, np.float32))
    tracemalloc.start()
    try:
        restored = restorer.restore(photo, steps=1, min_size=64).photo
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert restored.size == photo.size
    seen_pixels = 12_032 * 192
    assert peak + photo.rgb.nbytes < BYTES_PER_PIXEL * seen_pixels  # the photo was there before
