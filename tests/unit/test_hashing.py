import hashlib
import os
import time

import pytest

from engine.bundle import hashing

BLOCK = bytes(range(256)) * 16


@pytest.fixture
def hashed(monkeypatch, tmp_path):
    """Small files count as large here; returns the files that were read, in order."""
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "WORTH_KEEPING_BYTES", len(BLOCK))
    read, hash_all = [], hashing._hash
    monkeypatch.setattr(hashing, "_hash", lambda path: (read.append(path.name), hash_all(path))[1])
    return read


def write(path, data, *, age_s=60.0):
    path.write_bytes(data)
    os.utime(path, ns=(then := time.time_ns() - int(age_s * 1e9), then))
    return path


def settle(monkeypatch):
    """Let the clock say what it will say in a minute."""
    now = time.time_ns
    monkeypatch.setattr(hashing.time, "time_ns", lambda: now() + 60_000_000_000)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_a_large_file_is_read_once(hashed, monkeypatch, tmp_path):
    settle(monkeypatch)
    file = write(tmp_path / "large", BLOCK)
    assert hashing.hash_file(file) == hashing.hash_file(file) == sha256(BLOCK)
    assert hashed == ["large"]


def test_a_small_file_is_read_every_time(hashed, monkeypatch, tmp_path):
    settle(monkeypatch)
    file = write(tmp_path / "small", BLOCK[1:])
    assert hashing.hash_file(file) == hashing.hash_file(file) == sha256(BLOCK[1:])
    assert hashed == ["small"] * 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("how", ["in place", "in place, times set back", "replaced"])
def test_a_file_that_was_changed_is_read_again(hashed, monkeypatch, tmp_path, how):
    settle(monkeypatch)
    file = write(tmp_path / "large", BLOCK)
    hashing.hash_file(file)
    before = file.stat()
    time.sleep(0.02)  # longer than a tick of the clock of file systems
    other = BLOCK[::-1]
    if how == "replaced":
        write(tmp_path / "new", other).replace(file)
    else:
        file.write_bytes(other)
    if how != "in place":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashing.hash_file(file) == sha256(other)
    assert hashed == ["large"] * 2


def test_a_file_that_was_changed_just_now_is_not_kept(hashed, tmp_path):
    file = write(tmp_path / "large", BLOCK, age_s=0)
    hashing.hash_file(file)
    hashing.hash_file(file)
    assert hashed == ["large"] * 2


@pytest.mark.parametrize("damage", [b"", b"{", b'{"state": 1}'])
def test_a_damaged_memory_costs_time_alone(hashed, monkeypatch, tmp_path, damage):
    settle(monkeypatch)
    file = write(tmp_path / "large", BLOCK)
    hashing.hash_file(file)
    (memory,) = (tmp_path / "cache" / "hashes").iterdir()
    memory.write_bytes(damage)
    assert hashing.hash_file(file) == sha256(BLOCK)
    assert hashed == ["large"] * 2


def test_a_cache_that_cannot_be_written_costs_time_alone(hashed, monkeypatch, tmp_path):
    settle(monkeypatch)
    (tmp_path / "cache").write_text("in the way")
    file = write(tmp_path / "large", BLOCK)
    assert hashing.hash_file(file) == sha256(BLOCK)
