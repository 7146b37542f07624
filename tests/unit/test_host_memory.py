import subprocess
import sys

import pytest

from engine.host_memory import peak_memory_bytes, total_memory_bytes

#: Blocks that malloc takes from its heap, with one above them that keeps the heap from shrinking by itself.
FREE_BLOCKS = """
import ctypes, psutil
from engine.host_memory import release_free_memory
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


def test_peak_memory_is_bytes():
    assert 10e6 < (peak_memory_bytes() or 0) < (total_memory_bytes() or 1e13)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_blocks_go_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", FREE_BLOCKS], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 250e6
