"""From what the runtimes' processes tell to figures: medians, rates, shares of the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.stages import COLOR_FIX, CONTROLNET, ELSE, NOISE, OPENING, PER_STEP, STEPS, UNET, beside, split_times
from engine.bundle.graphspec import Precision

#: What issues ask for; printed with what was found. On CPUs of the engine, against eager PyTorch:
AIM_FASTER, AIM_MEMORY, AIM_OUTSIDE = 1.3, 0.6, 0.02
#: and on GPUs: against torch.compile, and against the floor.
AIM_COMPILED, AIM_FLOORS = 1.5, 2.0
_NO_GRAPHS = (COLOR_FIX, NOISE, OPENING, ELSE)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` per cent of the values lie below; between two of them, in proportion."""
    return float(np.percentile(values, share))


def aim_text(found: float, aim: float | None, form: str, *, less: bool) -> str:
    """Return a figure beside what the project aims at.

    Args:
        found: the figure.
        aim: None where there is none.
        form: how numbers are written, as "{:.2f}".
        less: whether less than the aim is better.
    """
    if aim is None:
        return form.format(found)
    reached = found <= aim if less else found >= aim
    bound = "at most" if less else "at least"
    return f"{form.format(found)} (aim: {bound} {form.format(aim)}, {'reached' if reached else 'missed'})"


def summarize(
    runtime: Mapping[str, Any], works: Mapping[str, Any], rates_tflops: Mapping[Precision, float], batch: int
) -> dict[str, Any]:
    """Return a runtime's figures.

    Args:
        runtime: from `benchmarks.runtimes.measure`.
        works: the `benchmarks.flops.Work` of each stage that has graphs.
        rates_tflops: the device's matrix rate by precision.
        batch: photos in a restoration.
    Returns:
        Plain data: per stage "median_ms", "p95_ms" and, where it has graphs, "each_ms" (a step's, or the
        stage's own), "flops", "bytes_moved", "tflops", "gb_s", "floor_ms", "floor_share"; and the same of
        the total.
    """
    runs = runtime["runs"]
    split = [split_times(run["graphs_ms"], run["outside_ms"], run["device_ms"], run["total_ms"]) for run in runs]
    stages = {}
    for stage in split[-1]:
        stages[stage] = _figures([times.get(stage, 0.0) for times in split])
        if stage not in _NO_GRAPHS:
            stages[stage] |= _achieved(stages[stage]["median_ms"], [works[stage]], rates_tflops)
            each = works[stage].launches if stage in PER_STEP else 1
            if stage == STEPS:
                each //= 2  # a step is two launches
            stages[stage] |= {"times": each, "each_ms": stages[stage]["median_ms"] / each}
    totals = [run["total_ms"] for run in runs]
    total = _figures(totals)
    whole = [works[stage] for stage in stages if stage in works]
    outside = [(run["total_ms"] - sum(run["graphs_ms"].values())) / run["total_ms"] for run in runs]
    return {
        **{key: value for key, value in runtime.items() if key not in ("runs", "launches")},
        "beside": [stage for stage in beside(stages) if stage in stages],
        "stages": stages,
        "total": {**total, **_achieved(total["median_ms"], whole, rates_tflops)},
        "seconds_an_image": total["median_ms"] / 1e3 / batch,
        "outside_share": percentile(outside, 50),
        "totals_ms": totals,
        "stages_ms": split,
    }


def works_of(
    launches: Sequence[Any], counter: Any, computed_in: Mapping[str, Precision] | None = None
) -> dict[str, Any]:
    """Return the work of each stage, the loop's as a whole among them.

    Args:
        launches: `benchmarks.stages.Launch` of one restoration.
        counter: a `benchmarks.flops.WorkCounter`.
        computed_in: the precision that each graph is computed in; None is that of the counter's.
    """
    names = dict.fromkeys(launch.stage for launch in launches)
    stages = {name: [launch for launch in launches if launch.stage == name] for name in names}
    stages[STEPS] = [launch for launch in launches if launch.stage in (CONTROLNET, UNET)]
    return {name: counter.work(launches, computed_in) for name, launches in stages.items()}


def _figures(values: Sequence[float]) -> dict[str, float]:
    return {"median_ms": percentile(values, 50), "p95_ms": percentile(values, 95)}


def _achieved(ms: float, works: Sequence[Any], rates_tflops: Mapping[Precision, float]) -> dict[str, float]:
    flops, moved = sum(work.total_flops for work in works), sum(work.bytes_moved for work in works)
    floor_ms = sum(work.floor_ms(rates_tflops) for work in works)
    return {
        "flops": flops,
        "bytes_moved": moved,
        "tflops": flops / (ms * 1e9),
        "gb_s": moved / (ms * 1e6),
        "floor_ms": floor_ms,
        "floor_share": floor_ms / ms,
    }
