"""What the benchmark says is launched, against what is; and its runtimes on a device that is none."""

import contextlib
from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from stand_in import HostBackend, HostDevice, needs_compiler

from benchmarks import machine, runtimes, torch_backend
from benchmarks.flops import WorkCounter
from benchmarks.networks import bundle_builders
from benchmarks.report import to_markdown
from benchmarks.runtimes import Configuration
from benchmarks.stages import Launch, plan_launches
from benchmarks.summary import summarize, works_of
from benchmarks.torch_backend import TorchDeviceBackend
from engine import Restorer
from engine.backends.ort import OrtBackend
from engine.bundle.manifest import open_bundle

SETTINGS = {
    "as the bundle has it": {},
    "unguided": {"cfg_scale": 1.0},
    "guided at last only": {"cfg_scale": (1.0, 2.0), "steps": 4},
    "pulled": {"restore_pull": 2.0},
    "no colour fix": {"color_fix": "none"},
    "a long prompt": {"prompt": "an old man in a wooden boat " * 30},
    "dpmpp2m": {"sampler": "dpmpp2m"},
}


class Recorded(OrtBackend):
    """Writes down every launch: its graph and what the symbols stand for."""

    def open(self, bundle, graph):
        runner = super().open(bundle, graph)
        infer = runner.infer

        def recorded(inputs):
            symbols = runner.spec.sizes_of({name: array.shape for name, array in inputs.items()})
            self.launched.append((graph, tuple(sorted(symbols.items()))))
            return infer(inputs)

        runner.infer = recorded
        return runner


@pytest.fixture(scope="module")
def recorded(bundle_fp32):
    backend = Recorded(1)
    object.__setattr__(backend, "launched", [])
    with Restorer(open_bundle(bundle_fp32), backend) as restorer:
        yield restorer, backend.launched


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_planned_is_what_is_launched(recorded, name, batch):
    restorer, launched = recorded
    launched.clear()
    restorer.stages.clear_prompt_cache()
    photos = [np.random.default_rng(seed).random((64, 64, 3), dtype=np.float32) for seed in range(batch)]
    changes = {"min_size": 64, "steps": 3, **SETTINGS[name]}
    done = restorer.restore_batch(photos, **changes)[0]
    found = sorted(launched)
    planned = [
        (launch.graph, tuple(sorted(launch.symbols.items())))
        for launch in plan_launches(restorer, done.settings, 64, batch)
        for _ in range(launch.count)
    ]
    assert sorted(planned) == found


def test_tiles_are_counted_as_they_run(recorded):
    """A CPU takes several tiles at once, so that rows are compared, not launches."""
    restorer, launched = recorded
    launched.clear()
    restorer.stages.clear_prompt_cache()
    photo = np.random.default_rng(0).random((192, 192, 3), dtype=np.float32)
    done = restorer.restore(photo, min_size=192, steps=2, tile=64, vae_tiles="fast")
    found, planned = Counter(), Counter()
    for graph, symbols in launched:
        found[graph, symbols[1:]] += dict(symbols)["B"]
    for launch in plan_launches(restorer, done.settings, 192, 1):
        symbols = tuple(sorted(launch.symbols.items()))
        planned[launch.graph, symbols[1:]] += launch.count * launch.symbols["B"]
    assert planned == found
    assert any(launch.count > 2 for launch in plan_launches(restorer, done.settings, 192, 1))


class HostMemory:
    """torch on the stand-in's memory: as `CudaMemory`, but the addresses are NumPy's."""

    place = "cpu"

    def __init__(self):
        self.streams = []

    def tensor(self, buffer):
        return torch.from_numpy(buffer.array)

    def on(self, stream):
        self.streams.append(stream.name)
        return contextlib.nullcontext()


@needs_compiler
def test_torch_in_the_engine_s_loop_gives_the_engine_s_picture(bundle_fp32, tmp_path):
    """On a GPU this is the baseline; there only the memory is another."""
    bundle, memory = open_bundle(bundle_fp32), HostMemory()
    device = HostDevice(tmp_path)
    settings = {"steps": 4, "min_size": 64, "restore_pull": 2.0}
    photo = np.random.default_rng(0).random((64, 128, 3), dtype=np.float32)
    with Restorer(bundle, OrtBackend(1)) as engine:
        expected = engine.restore(photo, **settings).photo.rgb
    with Restorer(bundle, TorchDeviceBackend(bundle, device, memory)) as baseline:
        result = baseline.restore(photo, **settings)
    assert np.abs(result.photo.rgb - expected).max() < 1e-3
    assert {"steps", "denoise encoder", "vae decoder"} <= set(result.timings.device_ms)
    assert set(memory.streams) == {"main", "side"}
    assert device.of("capture") == []  # eager PyTorch starts its kernels one by one


@needs_compiler
def test_the_baseline_of_an_fp16_bundle_has_its_vae_in_bf16(bundle_fp16, tmp_path):
    bundle = open_bundle(bundle_fp16)
    backend = TorchDeviceBackend(bundle, HostDevice(tmp_path), HostMemory())
    types = {
        graph: {weight.dtype for weight in backend.open(bundle, graph)._module.parameters()}
        for graph in ("controlnet", "vae_decoder")
    }
    assert types == {"controlnet": {torch.float16}, "vae_decoder": {torch.bfloat16}}


def test_memory_that_runs_out_is_told_in_our_words():
    from engine.errors import BackendError

    with pytest.raises(BackendError, match="one --baseline at a time"), torch_backend._translated("unet"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


@needs_compiler
@pytest.mark.parametrize("name", ["engine", "torch"])
def test_a_runtime_on_a_device_is_measured_to_the_last_table(bundle_fp32, tmp_path, monkeypatch, name):
    """All of the command but the processes, with the stand-in in the place of the GPU."""
    from benchmarks.latency import _matrix_rate

    device = HostDevice(tmp_path)
    make = (
        (lambda *_, **__: HostBackend(device))
        if name == "engine"
        else (lambda bundle, *_, **__: TorchDeviceBackend(bundle, device, HostMemory()))
    )
    monkeypatch.setattr("engine.backends.make_backend", make)
    monkeypatch.setattr(torch_backend, "make_torch_backend", make)
    monkeypatch.setattr(machine, "driver_version", lambda: "13.0")
    setup = runtimes.RunSetup(bundle_fp32, "onnxruntime", 0)
    configuration = Configuration(64, 2, 3, cfg=True)
    runtime = runtimes._Runtime(name, setup, configuration)
    runtime.open()
    told = [runtime.restore(watched=number == 0) for number in range(3)]
    assert runtime.gpu["name"] == "stand-in"
    assert told[0]["gpu_peak_bytes"] > 2 * 3 * 64 * 64 * 4  # the photos alone
    assert told[-1]["gpu_peak_bytes"] == told[0]["gpu_peak_bytes"]  # what is taken once is kept
    bundle = open_bundle(bundle_fp32)
    rate = _matrix_rate(bundle, setup, 700.0, [runtime.computed_in])
    launches = [Launch(**launch) for launch in told[0]["launches"]]
    works = works_of(launches, WorkCounter(bundle_builders(bundle)))
    measured = {
        "gpu": runtime.gpu,
        "computed_in": runtime.computed_in,
        "cold_start_ms": 1.0,
        "warm_start_ms": 1.0,
        "peak_memory_bytes": 1,
        "gpu_peak_bytes": told[0]["gpu_peak_bytes"],
        "runs": told[1:],
    }
    summary = summarize(measured, works, rate.tflops, 2)
    assert summary["stages"]["steps"]["times"] == 3
    assert summary["stages"]["steps"]["flops"] == works["controlnet"].total_flops + works["unet"].total_flops
    assert "noise and texts" in summary["stages"]
    result = {
        "configuration": "x",
        "guided_steps": 3,
        "steps": 3,
        "tiles": 1,
        "text_chunks": 1,
        "runtimes": {"engine": summary},
    }
    report = {
        "machine": machine.describe_machine(),
        "gpu": runtime.gpu,
        "bundle": {"name": "b", "digest": "d", "precision": "fp32", "vae_precision": "fp32"},
        "floor": {"tflops": rate.tflops, "how": rate.how},
        "results": [result],
        "backend": "onnxruntime",
        "threads": 0,
        "warmup": 1,
        "repeats": 2,
    }
    assert "| steps (ControlNet, UNet) | 3 |" in to_markdown(report)
