"""Stages, percentiles, shares of the floor, tables and pictures, of times that are made up."""

import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="needs the export extra")

from PIL import Image

from benchmarks import paper, plot
from benchmarks.flops import GraphCost
from benchmarks.matrix_rate import MatrixRate, _fastest_tflops, _onnx_product, given_rate, measure_rate
from benchmarks.memory import DeviceMemory
from benchmarks.report import to_markdown
from benchmarks.stages import LABELS, Launch, beside, split_times
from benchmarks.summary import percentile, summarize, works_of
from engine.errors import BackendError

HOST = {"text": 2.0, "denoise encoder": 10.0, "stage 1": 20.0, "controlnet": 30.0, "unet": 60.0, "vae decoder": 20.0}
DEVICE = {"denoise encoder": 10.0, "stage 1": 20.0, "noise and texts": 1.0, "steps": 90.0, "vae decoder": 20.0}
LAUNCHES = [
    Launch("text", "text_encoder", {}),
    Launch("text", "text_encoder_2", {}),
    Launch("denoise encoder", "denoise_encoder", {}),
    Launch("stage 1", "vae_decoder", {}),
    Launch("controlnet", "controlnet", {}, 3),
    Launch("unet", "unet", {}, 3),
    Launch("vae decoder", "vae_decoder", {}),
]


class Counter:
    """1 GFLOP and 1 MB for each launch."""

    def work(self, launches, computed_in=None):
        count = sum(launch.count for launch in launches)
        return GraphCost({"fp16": count * 10**9}, count * 10**6, count)


def runtime(runs, gpu=None):
    return {
        "gpu": gpu,
        "launches": [],
        "cold_start_ms": 900.0,
        "warm_start_ms": 400.0,
        "peak_memory_bytes": 100 << 20,
        "gpu_peak_bytes": 7 << 20 if gpu else None,
        "runs": runs,
    }


def on_host(factor=1.0):
    graphs = {stage: ms * factor for stage, ms in HOST.items()}
    return {"graphs_ms": graphs, "outside_ms": {"color fix": 4.0}, "device_ms": {}, "total_ms": 142 * factor + 8}


def on_device():
    graphs = {"text": 5.0, "gpu": 125.0}
    return {"graphs_ms": graphs, "outside_ms": {"color fix": 4.0}, "device_ms": DEVICE, "total_ms": 140.0}


def summary(runs, gpu=None, rate=0.1, batch=1):
    return summarize(runtime(runs, gpu), works_of(LAUNCHES, Counter()), {"fp16": rate}, batch)


def report(runtimes, gpu=None, configurations=("64 × 64 px, batch 1, 3 steps, cfg on",)):
    result = {"steps": 3, "guided_steps": 2, "tiles": 1, "text_chunks": 1, "runtimes": runtimes}
    return {
        "machine": {
            "date": "2026-11-24",
            "command": "latency.py --size 64",
            "processor": "a processor",
            "cores": 2,
            "memory_gib": 8.0,
            "system": "Linux",
            "python": "3.11",
            "versions": {"numpy": "2.4"},
        },
        "gpu": gpu,
        "bundle": {"name": "tiny", "digest": "abc123", "precision": "fp16", "vae_precision": "bf16"},
        "backend": "onnxruntime",
        "threads": 0,
        "warmup": 1,
        "repeats": 3,
        "floor": {"tflops": {"fp16": 0.1}, "how": "a large product"},
        "results": [{**result, "configuration": name} for name in configurations],
    }


GPU = {
    "name": "NVIDIA H200",
    "compute_capability": "9.0",
    "memory_bytes": 140 << 30,
    "driver": "NVRM version 580",
    "driver_cuda_version": "13.0",
}


def test_percentiles_lie_between_values_in_proportion():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert percentile(values, 50) == 3.0
    assert percentile(values, 95) == pytest.approx(4.8)
    assert percentile([7.0], 95) == 7.0


def test_stages_on_a_host_add_up_to_the_total():
    times = split_times(HOST, {"color fix": 4.0, "resize in": 1.0}, {}, 160.0)
    assert times["everything else"] == 160 - sum(HOST.values()) - 4
    assert sum(times.values()) == pytest.approx(160)
    assert list(times) == [stage for stage in LABELS if stage in times]
    assert beside(times) == ()


def test_graphs_that_are_opened_on_the_way_are_a_stage():
    times = split_times({**HOST, "load unet": 40.0, "load controlnet": 20.0}, {}, {}, 210.0)
    assert times["opening graphs"] == 60
    assert sum(times.values()) == pytest.approx(210)


def test_stages_on_a_device_that_run_beside_others_are_not_in_the_sum():
    times = split_times({"text": 5.0, "gpu": 125.0}, {"color fix": 4.0}, DEVICE, 140.0)
    assert beside(times) == ("text", "stage 1")
    assert times["text"] == 5
    assert times["steps"] == 90
    assert times["everything else"] == 140 - (10 + 1 + 90 + 20 + 4)
    # The pull makes the steps wait for stage 1.
    pulled = split_times({"text": 5.0}, {}, {**DEVICE, "stage 1 encoder": 3.0}, 150.0)
    assert beside(pulled) == ("text",)
    assert pulled["everything else"] == 150 - (10 + 1 + 90 + 20 + 20 + 3)


def test_rates_and_the_floor():
    found = summary([on_host(), on_host(2.0), on_host()], batch=2)
    unet = found["stages"]["unet"]
    assert (unet["median_ms"], unet["each_ms"], unet["times"]) == (60, 20, 3)
    assert unet["p95_ms"] == pytest.approx(60 + 0.9 * 60)
    assert unet["tflops"] == pytest.approx(3e9 / 60e-3 / 1e12)
    assert unet["gb_s"] == pytest.approx(3e6 / 60e-3 / 1e9)
    assert unet["floor_ms"] == pytest.approx(3e9 / 0.1e12 * 1e3)
    assert unet["floor_share"] == pytest.approx(0.5)
    total = found["total"]
    assert total["flops"] == 11e9
    assert total["floor_ms"] == pytest.approx(110)
    assert total["floor_share"] == pytest.approx(110 / 150)
    assert found["seconds_an_image"] == pytest.approx(0.150 / 2)
    assert found["outside_share"] == pytest.approx(8 / 150)
    assert "flops" not in found["stages"]["color fix"]


def test_the_loop_of_a_device_is_one_stage():
    found = summary([on_device()], GPU)
    steps = found["stages"]["steps"]
    assert (steps["flops"], steps["times"], steps["each_ms"]) == (6e9, 3, 30)
    assert "unet" not in found["stages"]
    assert found["total"]["flops"] == 11e9  # no launch twice, none left out
    assert found["beside"] == ["text", "stage 1"]


def test_the_report_says_what_repeats_it():
    text = to_markdown(report({"engine": summary([on_host()]), "torch": summary([on_host(2.0)])}))
    for words in (
        "latency.py --size 64",
        "a processor",
        "numpy 2.4",
        "2026-11-24",
        "abc123",
        "1 restoration for warm-up",
    ):
        assert words in text
    assert "| UNet | 3 | 60.0 | 60.0 | 20.00 | 0.003 | 0.05 | 0.05 | 30.0 | 50.0% |" in text
    assert "| floor, ms | floor / median |" in text
    assert "| **total** |" in text
    assert "Faster than torch: 1.95 × (aim: at least 1.30 ×, reached)" in text
    assert "Of its memory: 100% (aim: at most 60%, missed)" in text
    assert "Outside the graphs: 5.3% (aim: at most 2.0%, missed)" in text
    assert "names neither the hardware nor the size" in text
    for method, seconds in paper.TABLE_3.items():
        assert f"{method} | {seconds:g} |" in text


def test_the_report_of_a_gpu_has_its_own_aims():
    found = {"engine": summary([on_device()], GPU), "torch-compile": summary([on_device()], GPU)}
    text = to_markdown(report(found, GPU))
    assert "NVIDIA H200 (compute capability 9.0, 143360 MiB), NVRM version 580" in text
    assert "Of the floor's time: 1.27 × (aim: at most 2.00 ×, reached)" in text
    assert "Faster than torch-compile: 1.00 × (aim: at least 1.50 ×, missed)" in text
    assert "| stage-1 decode * |" in text
    assert "ControlNet and UNet are one stage" in text
    assert "| GPU memory, without CUDA's context, MiB | 7 | 7 |" in text
    assert "Outside the graphs" not in text


def test_every_stage_has_a_colour():
    assert set(plot._COLORS) == set(LABELS)


def test_the_picture_shows_each_runtime_of_each_configuration(tmp_path):
    found = {"engine": summary([on_host()]), "torch": summary([on_host(2.0)])}
    made = report(found, configurations=[f"configuration {index}" for index in range(7)])
    figure = plot.make_figure(made)
    panels = sorted((panel for panel in figure.axes if panel.axison), key=lambda panel: panel.get_title(loc="left"))
    assert [panel.get_title(loc="left") for panel in panels] == [f"configuration {index}" for index in range(7)]
    for panel in panels:
        assert [label.get_text() for label in panel.get_yticklabels()] == ["engine", "torch"]
        ends = {}
        for bar in panel.patches:
            ends[bar.get_y()] = max(ends.get(bar.get_y(), 0), bar.get_x() + bar.get_width())
        assert list(ends.values()) == pytest.approx([150, 292])  # the bars are as long as the totals
        assert [line.get_xdata()[0] for line in panel.lines] == pytest.approx([110, 110])  # the floor
        assert panel.get_xlabel() == "ms"
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [LABELS[stage] for stage in found["engine"]["stages"]] + ["floor"]
    assert "a processor" in figure.get_suptitle()
    assert "2026-11-24" in figure.get_suptitle()
    plot.draw(made, tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > len(LABELS)


def test_numbers_stand_clear_of_the_floor():
    assert plot._clear_of(5, 6, 9) == (6, 9)
    assert plot._clear_of(7, 6, 9) == (7, 9)
    assert plot._clear_of(8.5, 6, 9) == (6, 8.5)


def test_long_times_are_drawn_in_seconds():
    slow = summary([on_host(100.0)])
    (panel,) = plot.make_figure(report({"engine": slow})).axes
    assert panel.get_xlabel() == "s"
    assert max(bar.get_x() + bar.get_width() for bar in panel.patches) == pytest.approx(14.208)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(BackendError, match=r"restoration-engine\[benchmark\]"):
        plot.check_matplotlib()


def test_the_faster_of_two_measurements_is_the_floor():
    first, second = MatrixRate({"fp16": 1.0, "fp32": 5.0}, "so"), MatrixRate({"fp16": 2.0, "fp32": 4.0}, "so")
    assert first.or_faster(second).tflops == {"fp16": 2.0, "fp32": 5.0}
    third = MatrixRate({"fp16": 1.5, "bf16": 3.0, "fp32": 4.5}, "and so")
    assert first.or_faster(third) == MatrixRate({"fp16": 1.5, "fp32": 5.0, "bf16": 3.0}, "and so")
    assert given_rate(790.0, ["fp16", "bf16"]).tflops == {"fp16": 790.0, "bf16": 790.0}


def test_a_rate_is_two_flops_for_each_product_over_the_fastest_time(monkeypatch):
    clock = iter([0.0, 4.0, 4.0, 5.0, 5.0, 8.0, 8.0, 10.0, 10.0, 15.0])
    monkeypatch.setattr("benchmarks.matrix_rate.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert _fastest_tflops(lambda: None, 1000, 3) == pytest.approx(3 * 2 * 1000**3 / 1.0 / 1e12)


def test_the_cpu_s_rate_is_measured_and_the_same_in_float32_and_float16(monkeypatch):
    monkeypatch.setattr("benchmarks.matrix_rate._LEAST_SECONDS", 0.0)
    monkeypatch.setattr("benchmarks.matrix_rate._CPU_SIDE", 256)
    rate = measure_rate(["fp32", "fp16"], None, 1)
    assert 1e-4 < rate.tflops["fp32"] == rate.tflops["fp16"] < 1e2
    assert "float32, 256 × 256" in rate.how
    both = measure_rate(["fp32", "bf16"], None, 1)
    assert 1e-4 < both.tflops["bf16"] < 1e3
    assert both.how == "ONNX Runtime, float32 and torch, bfloat16, 256 × 256"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_product_runs_in_every_type_that_this_provider_has(dtype):
    _onnx_product(dtype, 64, 3, None, 1)()


def test_no_library_for_the_gpu_is_an_error_that_names_the_option(monkeypatch):
    import onnxruntime
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="--matrix-tflops"):
        measure_rate(["fp16"], 0)


class Pool:
    """A device of which others use a part."""

    def __init__(self):
        self.free, self.activated = 1000, []

    def activate(self):
        self.activated.append(threading.get_ident())

    def memory_bytes(self):
        return self.free, 2000


def test_memory_is_what_changes_in_ones_own_turn(monkeypatch):
    device = Pool()
    memory = DeviceMemory(device)
    with memory.turn(watched=False):
        device.free -= 100
    device.free -= 500  # another's turn
    with memory.turn(watched=False):
        device.free -= 30
    assert memory.peak_bytes == 130
    with memory.turn(watched=False):
        device.free += 60
    assert memory.peak_bytes == 130
    with memory.turn(watched=False):
        device.free -= 10
    assert memory.peak_bytes == 130  # 80 are held


def test_memory_that_comes_and_goes_is_seen_by_watching(monkeypatch):
    monkeypatch.setattr("benchmarks.memory._POLL_SECONDS", 0.001)
    device, seen = Pool(), threading.Event()
    ask = device.memory_bytes

    def asked():
        if device.free == 300:
            seen.set()
        return ask()

    device.memory_bytes = asked
    memory = DeviceMemory(device)
    with memory.turn(watched=True):
        device.free = 300
        assert seen.wait(10)
        device.free = 900
    assert memory.peak_bytes == 700
    assert device.activated != [threading.get_ident()]  # by the thread that asks
