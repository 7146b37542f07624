"""Limits of memory: a photo is restored, or refused before the work with the reason; nobody is killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

MIB = 1 << 20
GROUPS = Path("/sys/fs/cgroup/memory" if Path("/sys/fs/cgroup/memory").is_dir() else "/sys/fs/cgroup")
LIMIT_FILE = "memory.limit_in_bytes" if GROUPS.name == "memory" else "memory.max"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")

#: Takes a limit, and becomes the command.
LIMITED = """
import os, resource, sys
from pathlib import Path
kind, limit, group, *command = sys.argv[1:]
if kind == "group":
    Path(group, "cgroup.procs").write_text("0")
else:
    resource.setrlimit(getattr(resource, kind), (int(limit),) * 2)
os.execv(sys.executable, [sys.executable, *command])
"""


@pytest.fixture
def group(tmp_path):
    """A control group of this computer; None where this user may make none."""
    folder = GROUPS / f"restore-attack-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / LIMIT_FILE).write_text(str(1 << 40))
    except OSError:
        folder = None
    yield folder
    if folder is not None:
        folder.rmdir()


@pytest.fixture
def restore_within(group, tmp_path):
    """Restore a photo of noise within a limit; returns whether it was restored, or else the refusal."""

    def call(bundle, size, kind, limit, *options, timeout):
        if kind == "group":
            if group is None:
                pytest.skip("no control group can be made here")
            (group / LIMIT_FILE).write_text(str(limit))
        photo, output = tmp_path / "photo.png", tmp_path / "out.png"
        Image.effect_noise(size, 60).convert("RGB").save(photo)
        command = ["-m", "engine.restore", photo, "-o", output, "--bundle", bundle, "--steps", "1", "--quiet", *options]
        head = [sys.executable, "-c", LIMITED, kind, limit, group or ""]
        done = subprocess.run([*map(str, head + command)], capture_output=True, text=True, timeout=timeout)
        assert done.returncode in (0, 1), (done.returncode, done.stderr)
        assert "Traceback" not in done.stderr
        assert output.exists() == (done.returncode == 0)
        if done.returncode:
            assert "memory" in done.stderr
            assert "to do: " in done.stderr
        return done.stderr or "restored"

    return call


@pytest.mark.parametrize(
    ("kind", "limit", "expected"),
    [
        ("RLIMIT_AS", 200, "of addresses for libraries alone"),
        ("RLIMIT_DATA", 300, "too large for the memory of this computer"),
        ("group", 200, "too large for the memory of this computer"),
        ("group", 1000, "restored"),
    ],
)
def test_a_photo_is_restored_or_refused(restore_within, bundle_fp32, kind, limit, expected):
    side = 64 if expected == "restored" else 512
    options = ["--min-size", "64", "--threads", "1"]
    assert expected in restore_within(bundle_fp32, (side, side), kind, limit * MIB, *options, timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("gibibytes", [1, 2, 4])
@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (2304, 1728), (4000, 3000)], ids=lambda size: f"{size}")
def test_the_demo_in_containers(restore_within, demo_bundle, gibibytes, size):
    outcome = restore_within(demo_bundle, size, "group", gibibytes << 30, "--threads", "1", timeout=5500)
    assert outcome == "restored"  # the largest, in tiles, within an hour or two
