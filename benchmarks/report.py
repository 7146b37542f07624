"""The latency report as tables for a person."""

from __future__ import annotations

from typing import Any

from benchmarks import paper
from benchmarks.runtimes import ENGINE
from benchmarks.stages import LABELS, PER_STEP, STEPS
from benchmarks.summary import AIM_COMPILED, AIM_FASTER, AIM_FLOORS, AIM_MEMORY, AIM_OUTSIDE, aim_text

_NUMBER = "---:"
_STAGE_HEAD = (
    "stage",
    "times",
    "median, ms",
    "p95, ms",
    "each, ms",
    "TFLOP",
    "TFLOP/s",
    "GB/s",
    "floor, ms",
    "floor / median",
)


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown.

    Args:
        report: as `benchmarks.latency` writes it.
    """
    lines = [*_head(report)]
    for result in report["results"]:
        lines += ["", f"## {result['configuration']}", ""]
        lines += [
            f"{result['guided_steps']} of {result['steps']} steps are guided; "
            f"texts fill {_count(result['text_chunks'], 'chunk')} of 77 tokens"
            + (f"; each step samples {result['tiles']} tiles." if result.get("tiles", 1) > 1 else "."),
            "",
        ]
        for name, runtime in result["runtimes"].items():
            lines += [*_stages(name, runtime), ""]
        lines += _comparison(result["runtimes"])
        lines += ["", *_aims(result["runtimes"])]
    return "\n".join([*lines, "", *_published(report["results"])])


def _head(report: dict[str, Any]) -> list[str]:
    machine, bundle = report["machine"], report["bundle"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    rates = ", ".join(f"{rate:.4g} TFLOP/s for {name}" for name, rate in report["floor"]["tflops"].items())
    return [
        f"# Latency, {machine['date']}",
        "",
        f"- `{machine['command']}`",
        f"- {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; "
        f"{_gpu(report['gpu'])}",
        f"- Python {machine['python']}, {versions}",
        f"- bundle {bundle['name']}, {bundle['precision']} (VAE {bundle['vae_precision']}), digest {bundle['digest']}, "
        f"backend {report['backend']}",
        f"- {_count(report['warmup'], 'restoration')} for warm-up, then {report['repeats']} counted, runtimes in "
        f"turns; threads: {report['threads'] or 'one per core'}",
        f"- floor: counted FLOPs over the matrix rate: {rates} ({report['floor']['how']}); "
        "floor / median: what share of that rate is reached",
        "- GB/s: weights, inputs and outputs of every launch over its time, a lower bound: what stays inside a graph "
        "is not in it",
    ]


def _gpu(gpu: dict[str, Any] | None) -> str:
    if gpu is None:
        return "no GPU used"
    driver = gpu["driver"] or f"driver for CUDA {gpu['driver_cuda_version']}"
    return f"{gpu['name']} (compute capability {gpu['compute_capability']}, {_mib(gpu['memory_bytes'])} MiB), {driver}"


def _stages(name: str, runtime: dict[str, Any]) -> list[str]:
    lines = [f"**{name}**", "", _row(*_STAGE_HEAD), _row("---", *[_NUMBER] * (len(_STAGE_HEAD) - 1))]
    apart = runtime["beside"]
    for stage, figures in runtime["stages"].items():
        label = LABELS[stage] + (" *" if stage in apart else "")
        each = f"{figures['each_ms']:.2f}" if stage in PER_STEP else ""
        times = str(figures["times"]) if stage in PER_STEP else ""
        lines.append(_row(label, times, *_times(figures), each, *_rates(figures)))
    lines.append(_row("**total**", "", *_times(runtime["total"]), "", *_rates(runtime["total"])))
    if apart:
        lines += ["", "\\* on a stream of its own, beside other stages: not in the sum."]
    if STEPS in runtime["stages"]:
        lines += ["", "The device has one clock for the whole loop, so ControlNet and UNet are one stage."]
    return lines


def _times(figures: dict[str, float]) -> tuple[str, str]:
    return _ms(figures["median_ms"]), _ms(figures["p95_ms"])


def _rates(figures: dict[str, float]) -> tuple[str, ...]:
    if "flops" not in figures:
        return ("",) * 5
    return (
        f"{figures['flops'] / 1e12:.4g}",
        f"{figures['tflops']:.3g}",
        f"{figures['gb_s']:.3g}",
        _ms(figures["floor_ms"]),
        f"{figures['floor_share']:.1%}",
    )


def _comparison(runtimes: dict[str, dict[str, Any]]) -> list[str]:
    def row(label: str, value: Any) -> str:
        return _row(label, *(value(runtime) for runtime in runtimes.values()))

    lines = [
        _row("", *runtimes),
        _row("---", *[_NUMBER] * len(runtimes)),
        row("total, ms", lambda found: _ms(found["total"]["median_ms"])),
        row("seconds an image", lambda found: f"{found['seconds_an_image']:.3f}"),
        row("cold start, ms", lambda found: _ms(found["cold_start_ms"])),
        row("warm start, ms", lambda found: _ms(found["warm_start_ms"])),
        row("peak memory, MiB", lambda found: _mib(found["peak_memory_bytes"])),
    ]
    if any(found["gpu_peak_bytes"] is not None for found in runtimes.values()):
        lines.append(row("GPU memory, without CUDA's context, MiB", lambda found: _mib(found["gpu_peak_bytes"])))
    lines += [
        "",
        "Cold start: a new process, from its start to its first restored image, files in the system's cache. "
        "Warm start: the bundle opened again in that process, and an image restored.",
    ]
    return lines


def _aims(runtimes: dict[str, dict[str, Any]]) -> list[str]:
    engine = runtimes[ENGINE]
    on_gpu = engine["gpu"] is not None
    lines = []
    if on_gpu:
        over = engine["total"]["median_ms"] / engine["total"]["floor_ms"]
        lines.append(f"Of the floor's time: {aim_text(over, AIM_FLOORS, '{:.2f} ×', less=True)}.")
    else:
        lines.append(f"Outside the graphs: {aim_text(engine['outside_share'], AIM_OUTSIDE, '{:.1%}', less=True)}.")
    for name, base in runtimes.items():
        if name == ENGINE:
            continue
        faster = base["total"]["median_ms"] / engine["total"]["median_ms"]
        aim = {("torch", False): AIM_FASTER, ("torch-compile", True): AIM_COMPILED}.get((name, on_gpu))
        lines.append(f"Faster than {name}: {aim_text(faster, aim, '{:.2f} ×', less=False)}.")
        if name == "torch" and not on_gpu and base["peak_memory_bytes"] and engine["peak_memory_bytes"]:
            memory = engine["peak_memory_bytes"] / base["peak_memory_bytes"]
            lines.append(f"Of its memory: {aim_text(memory, AIM_MEMORY, '{:.0%}', less=True)}.")
    return lines


def _published(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Beside the paper's Table 3",
        "",
        "The paper names neither the hardware nor the size of its images: this says nothing about which is faster.",
        "",
        _row("", "seconds an image"),
        _row("---", _NUMBER),
    ]
    lines += [_row(f"*published:* {method}", f"{seconds:g}") for method, seconds in paper.TABLE_3.items()]
    for result in results:
        for name, runtime in result["runtimes"].items():
            lines.append(_row(f"{name}, {result['configuration']}", f"{runtime['seconds_an_image']:.3f}"))
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _ms(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _mib(count: int | None) -> str:
    return "not told" if count is None else f"{count / 2**20:.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
