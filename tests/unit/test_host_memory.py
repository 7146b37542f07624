import subprocess
import sys

import pytest

from engine.memory.host_memory import peak_memory_bytes, total_memory_bytes

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
    assert 10e6 < (peak_memory_bytes() or 0) < (total_memory_bytes() or 1e13)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_blocks_go_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", FREE_BLOCKS], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 250e6


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
@pytest.mark.parametrize(("when", "at_least", "at_most"), [("at once", 250e6, 270e6), ("never", -1e6, 20e6)])
def test_large_blocks_go_back_when_they_are_freed(when, at_least, at_most):
    done = subprocess.run([sys.executable, "-c", FREE_LARGE_BLOCKS, when], capture_output=True, text=True, check=True)
    assert at_least < int(done.stdout) < at_most
