"""The headline benchmark, at a size that takes seconds."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

pytest.importorskip("torch", reason="needs the export extra")


COMMAND = [sys.executable, str(ROOT / "benchmarks" / "latency.py")]


def run(*options, timeout=280):
    command = [*COMMAND, *map(str, options), "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_engine_and_torch_are_measured_in_turns(bundle_fp32, tmp_path):
    file, picture = tmp_path / "results" / "latency.json", tmp_path / "results" / "latency.png"
    options = ["--bundle", bundle_fp32, "--baseline", "torch", "--size", 64, "--steps", 2, "--cfg", "on", "off"]
    done = run(*options, "--repeats", 2, "--threads", 1, "--json", file, "--plot", picture)
    assert done.returncode == 0, done.stderr
    for text in ("| **total** |", "peak memory, MiB", "Faster than torch:", "Of its memory:", "Outside the graphs:"):
        assert text in done.stdout
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
    report = json.loads(file.read_text())
    assert [result["guided_steps"] for result in report["results"]] == [2, 0]
    for result in report["results"]:
        assert f"## {result['configuration']}" in done.stdout
        check_runtimes(result["runtimes"])
    on, off = (result["runtimes"]["engine"]["stages"]["unet"]["flops"] for result in report["results"])
    assert on == 2 * off  # guidance is a second pass
    assert report["machine"]["versions"]["torch"] != "not installed"
    assert report["machine"]["date"]
    assert report["bundle"]["digest"] in done.stdout
    assert (report["warmup"], report["repeats"]) == (1, 2)
    assert report["floor"]["how"].startswith("ONNX Runtime, float32")


def check_runtimes(runtimes):
    assert list(runtimes) == ["engine", "torch"]
    for runtime in runtimes.values():
        assert len(runtime["totals_ms"]) == 2
        assert set(runtime["stages"]) >= {"text", "denoise encoder", "controlnet", "unet", "vae decoder", "color fix"}
        for times, total_ms in zip(runtime["stages_ms"], runtime["totals_ms"], strict=True):
            assert sum(times.values()) == pytest.approx(total_ms)
            assert min(times.values()) > 0
        assert 0 < runtime["outside_share"] < 1
        unet = runtime["stages"]["unet"]
        assert unet["tflops"] == pytest.approx(unet["flops"] / unet["median_ms"] / 1e9)
        assert unet["each_ms"] == unet["median_ms"] / 2
        # A start has everything in it that a restoration has, and more.
        assert runtime["cold_start_ms"] == pytest.approx(sum(runtime["cold_start_parts_ms"].values()))
        assert min(runtime["cold_start_parts_ms"].values()) > 0
        assert runtime["warm_start_ms"] > 0
    # Both do the same work.
    assert runtimes["engine"]["total"]["flops"] == runtimes["torch"]["total"]["flops"] > 0
    # torch is in one process and not in the other.
    assert runtimes["torch"]["peak_memory_bytes"] > runtimes["engine"]["peak_memory_bytes"] + 100e6


def test_what_was_measured_is_kept_when_a_later_size_fails(bundle_fp32, tmp_path, monkeypatch):
    """A night's grid is not lost to its last, largest size."""
    from benchmarks import latency
    from engine.errors import BackendError

    measure = latency.measure

    def fails_at_128(runtimes, setup, configuration, counts, *, quiet):
        if configuration.size_px == 128:
            raise BackendError("out of memory")
        return measure(runtimes, setup, configuration, counts, quiet=quiet)

    monkeypatch.setattr(latency, "measure", fails_at_128)
    file = tmp_path / "latency.json"
    options = ["--bundle", str(bundle_fp32), "--size", "64", "128", "--steps", "1", "--repeats", "1"]
    options += ["--threads", "1", "--matrix-tflops", "0.05", "--json", str(file), "--quiet"]
    with pytest.raises(BackendError, match="out of memory"):
        latency.main(options)
    report = json.loads(file.read_text())
    assert [result["size_px"] for result in report["results"]] == [64]
    assert report["floor"] == {"tflops": {"fp32": 0.05}, "how": "given by --matrix-tflops"}


def test_an_fp16_bundle_runs_without_a_baseline(bundle_fp16):
    done = run("--bundle", bundle_fp16, "--size", 64, "--steps", 1, "--repeats", 1, "--matrix-tflops", 0.05)
    assert done.returncode == 0, done.stderr
    assert "fp16 (VAE fp32)" in done.stdout
    assert "Faster than" not in done.stdout


def test_a_runtime_that_cannot_start_is_told(bundle_fp16):
    done = run("--bundle", bundle_fp16, "--baseline", "torch", "--matrix-tflops", 0.05)
    assert done.returncode == 1
    assert "torch: " in done.stderr  # whose error it is
    assert "PyTorch is compared in float32 on CPUs" in done.stderr
    assert "to do:    measure a bundle built with --precision fp32" in done.stderr


def test_a_size_that_nothing_is_worked_at_is_told(bundle_fp32):
    done = run("--bundle", bundle_fp32, "--size", 100)
    assert done.returncode == 2
    assert "a multiple of 64" in done.stderr


def test_without_a_compiler_it_says_what_is_missing(bundle_fp32, monkeypatch):
    from benchmarks import torch_backend
    from engine.errors import BackendError

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match=r"needs what is not installed\n  expected: a compiler: g\+\+"):
        torch_backend.check_compiler(None)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(torch_backend.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(BackendError, match="Python's headers: /nowhere/Python.h"):
        torch_backend.check_compiler(None)
    if not importlib.util.find_spec("triton"):
        with pytest.raises(BackendError, match="triton"):
            torch_backend.check_compiler(0)


def test_torch_without_cuda_is_told(bundle_fp32, monkeypatch):
    import torch

    from benchmarks.torch_backend import make_torch_backend
    from engine.bundle.manifest import read_manifest
    from engine.errors import BackendError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="cannot use the GPU"):
        make_torch_backend(read_manifest(bundle_fp32), 0)


def test_a_runtime_that_dies_is_told():
    import multiprocessing

    from benchmarks.runtimes import _answer
    from engine.errors import BackendError

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=sys.exit, args=(9,))
    process.start()
    there.close()
    with pytest.raises(BackendError, match="exit status 9"):
        _answer("engine", process, here)


@pytest.mark.parametrize("option", ["--repeats", "--size", "--steps", "--batch", "--warmup"])
def test_numbers_must_be_positive(option):
    done = run(option, 0)
    assert done.returncode == 2
    assert "at least 1" in done.stderr


def test_a_matrix_rate_must_be_positive():
    done = run("--matrix-tflops", "0")
    assert done.returncode == 2
    assert "expected a number above 0" in done.stderr


def test_a_missing_bundle_is_told_once(tmp_path):
    done = run("--bundle", tmp_path / "nothing")
    assert done.returncode == 1
    assert done.stderr.count("no bundle here") == 1


def test_both_give_the_same_picture(bundle_fp32, photo_path):
    """The baseline is the same computation, or its time would mean nothing."""
    import numpy as np

    from benchmarks.torch_backend import TorchBackend
    from engine import Restorer
    from engine.bundle.manifest import open_bundle

    with (
        Restorer.open(bundle_fp32) as engine,
        Restorer(open_bundle(bundle_fp32), TorchBackend(engine.bundle)) as torch,
    ):
        pictures = [restorer.restore(photo_path, steps=3, min_size=64).photo.rgb for restorer in (engine, torch)]
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler for torch.compile")
def test_a_compiled_network_gives_the_same_numbers(bundle_fp32):
    """One of the seven: compiling all of them takes minutes."""
    import numpy as np
    import torch

    from benchmarks.torch_backend import make_torch_backend
    from engine.bundle.manifest import open_bundle

    bundle = open_bundle(bundle_fp32)
    ids = {"input_ids": np.arange(77, dtype=np.int64)[None]}
    runners = [
        make_torch_backend(bundle, None, compiled=compiled).open(bundle, "text_encoder_2") for compiled in (False, True)
    ]
    eager, compiled = (runner.infer(ids)["hidden"] for runner in runners)
    assert np.abs(eager - compiled).max() < 1e-3 * np.abs(eager).max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1  # it was compiled
