"""The one command for a machine with a GPU, as far as a machine without one can go."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("cuda.core", reason="needs the cuda extra")

from benchmarks import gpu_session
from engine.device.cuda import device_info
from engine.errors import BackendError, UsageError


def test_without_a_gpu_it_says_so_before_anything_is_built(tmp_path):
    try:
        device_info(0)
    except BackendError:
        pass
    else:
        pytest.skip("gpu: there is one here")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_session.py"), "--json", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "running on a GPU needs an NVIDIA GPU with its driver" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r.json").exists()


TESTS = """
import pytest

def test_passes(record_property):
    record_property("psnr_db", 51.5)

def test_fails(record_property):
    record_property("lost_bytes", 7)
    assert 1 == 2, "a number"

def test_is_skipped():
    pytest.skip("needs another GPU")

def test_was_to_be_seen(record_property):
    record_property("answer", "no")
    pytest.xfail("nobody said that it would")
"""
GPU = {"name": "NVIDIA H100 80GB HBM3", "versions": {}}


def test_outcomes_reasons_and_numbers_are_kept(tmp_path):
    """In a process of its own: pytest within pytest shares its plugins' state."""
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_it.py").write_text(TESTS)
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from pathlib import Path
from benchmarks import gpu_session
gpu_session._ROOT = Path({str(tmp_path)!r})
gpu_session.describe_gpu = lambda: {GPU!r}
sys.exit(gpu_session.main(["--tests", "-q", "-p", "no:cacheprovider"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    page, file = sorted((tmp_path / "benchmarks" / "results").iterdir(), key=lambda each: each.suffix, reverse=True)
    assert file.name.startswith("gpu-nvidia-h100-80gb-hbm3-20")
    report = json.loads(file.read_text())
    assert report["summary"] == {"expected failure": 1, "failed": 1, "passed": 1, "skipped": 1}
    tests = {test["test"].rpartition("::")[2]: test for test in report["tests"]}
    assert tests["test_passes"]["numbers"] == {"psnr_db": 51.5}
    assert "reason" not in tests["test_passes"]
    assert tests["test_fails"]["numbers"] == {"lost_bytes": 7}
    assert "a number" in tests["test_fails"]["reason"]
    assert "needs another GPU" in tests["test_is_skipped"]["reason"]
    assert tests["test_was_to_be_seen"]["reason"] == "nobody said that it would"
    assert report["machine"]["versions"]["numpy"]
    text = page.read_text()
    assert text in done.stdout  # it ends with the page
    assert "# GPU session: NVIDIA H100 80GB HBM3, 20" in text
    assert "1 expected failure, 1 failed, 1 passed, 1 skipped" in text
    assert "## Failed\n\n- `test_fails`: AssertionError: a number" in text
    assert "| `test_passes` | passed |" in text
    assert "psnr_db 51.5" in text
    assert "numpy " in text


def test_no_tests_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="no tests were run"):
        gpu_session.run_tests([str(tmp_path), "-q", "-p", "no:cacheprovider"])
