"""Shared memory of servers that live, and of those that have died without removing it."""

import os
import stat
import subprocess
import sys

import pytest

from triton_repo import shared_memory
from triton_repo.shared_memory import SharedMemory, remove_left_behind

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="servers run on Linux")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder in place of /dev/shm, with what others have there."""
    monkeypatch.setattr(shared_memory, "_FOLDER", tmp_path)
    (tmp_path / "triton_python_backend_shm_region_x").write_text("of another server")
    (tmp_path / "restoration-999999-0000-lock").write_text("of another user")
    return tmp_path


def region(memory, folder, name="region"):
    file = folder / f"{memory.prefix}{name}"
    file.write_bytes(bytes(8192))
    return file


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_server_removes_its_own_and_nothing_else(folder):
    before = names(folder)
    first, second = SharedMemory(), SharedMemory()
    mine, others = region(first, folder), region(second, folder)
    assert first.bytes() == 8192
    mine.chmod(0o644)
    first.close_to_others()
    assert stat.S_IMODE(mine.stat().st_mode) == 0o600
    first.remove()
    assert not mine.exists()
    assert others.exists()
    second.remove()
    assert names(folder) == before


def test_what_a_dead_server_left_is_removed_and_what_a_living_one_uses_is_not(folder):
    """A server is dead when its last process is: the lock is inherited."""
    living, dead = SharedMemory(), SharedMemory()
    used, left = region(living, folder), region(dead, folder)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[dead.descriptor])
    os.close(dead.descriptor)  # as when `serve.py` is killed
    assert remove_left_behind() == []
    assert left.exists()
    child.kill()
    child.wait()
    assert remove_left_behind() == [left.name]
    assert not left.exists()
    assert used.exists()
    living.remove()
    assert remove_left_behind() == []
    assert names(folder) == ["restoration-999999-0000-lock", "triton_python_backend_shm_region_x"]


def test_a_lock_that_is_a_link_is_not_followed(folder, tmp_path_factory):
    precious = tmp_path_factory.mktemp("elsewhere") / "precious"
    precious.write_text("precious")
    link = folder / f"{shared_memory._ours()}0000-lock"
    link.symlink_to(precious)
    assert remove_left_behind() == []
    assert precious.read_text() == "precious"
    assert link.is_symlink()


def test_servers_that_start_at_once_keep_what_is_theirs(folder):
    """Each cleans up while others begin: nobody's names are taken away."""
    program = """
import sys, pathlib
from triton_repo import shared_memory
shared_memory._FOLDER = pathlib.Path(sys.argv[1])
for _ in range(200):
    shared_memory.remove_left_behind()
    memory = shared_memory.SharedMemory()
    file = shared_memory._FOLDER / f"{memory.prefix}region"
    file.touch()
    shared_memory.remove_left_behind()
    assert file.exists() and shared_memory._lock_of(memory.prefix).exists()
    memory.remove()
"""
    running = [subprocess.Popen([sys.executable, "-c", program, str(folder)]) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert len(names(folder)) == 2
