"""The headline benchmark, at a size that takes seconds."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("torch", reason="needs the export extra")


def test_engine_and_torch_are_measured_in_turns(bundle_fp32, tmp_path):
    file = tmp_path / "results" / "latency.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "latency.py"), "--bundle", str(bundle_fp32), "--quiet"]
    command += ["--baseline", "torch", "--size", "64", "--steps", "2", "--repeats", "2", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    for text in ("| **total** |", "peak memory, MiB", "Faster than torch:", "Of its memory:", "Outside the graphs:"):
        assert text in done.stdout
    report = json.loads(file.read_text())
    contenders = report["results"][0]["contenders"]
    assert list(contenders) == ["engine", "torch"]
    for contender in contenders.values():
        assert len(contender["totals_ms"]) == 2
        assert set(contender["graphs_ms"]) >= {"text", "denoise encoder", "controlnet", "unet", "vae decoder"}
        assert 0 < contender["outside_share"] < 1
    # torch is in one process and not in the other.
    assert contenders["torch"]["peak_memory_bytes"] > contenders["engine"]["peak_memory_bytes"] + 100e6
    assert report["machine"]["versions"]["torch"] != "not installed"
    assert report["machine"]["date"]


def test_a_contender_that_cannot_start_is_told(bundle_fp16):
    command = [sys.executable, str(ROOT / "benchmarks" / "latency.py"), "--bundle", str(bundle_fp16), "--quiet"]
    done = subprocess.run([*command, "--baseline", "torch"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "eager PyTorch is compared in float32" in done.stderr


def test_a_contender_that_dies_is_told():
    import multiprocessing

    from benchmarks.latency import _answer
    from engine.errors import BackendError

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=sys.exit, args=(9,))
    process.start()
    there.close()
    with pytest.raises(BackendError, match="exit status 9"):
        _answer("engine", process, here)


@pytest.mark.parametrize("option", ["--repeats", "--size", "--steps"])
def test_numbers_must_be_positive(option):
    command = [sys.executable, str(ROOT / "benchmarks" / "latency.py"), option, "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "at least 1" in done.stderr


def test_a_missing_bundle_is_told_once(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "latency.py"), "--bundle", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert done.stderr.count("no bundle here") == 1


def test_both_give_the_same_picture(bundle_fp32, photo_path):
    """The baseline is the same computation, or its time would mean nothing."""
    import numpy as np

    from benchmarks.torch_backend import TorchBackend
    from engine import Restorer
    from engine.bundle import open_bundle

    with Restorer.open(bundle_fp32) as engine, Restorer(open_bundle(bundle_fp32), TorchBackend(engine.bundle)) as torch:
        pictures = [restorer.restore(photo_path, steps=3, min_size=64).photo.rgb for restorer in (engine, torch)]
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-3
