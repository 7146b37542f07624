"""The latency report as a picture: a stacked bar per runtime, a panel per configuration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.stages import (
    COLOR_FIX,
    CONTROLNET,
    DECODER,
    ELSE,
    ENCODER,
    LABELS,
    NOISE,
    OPENING,
    STAGE_1,
    STAGE_1_ENCODER,
    STEPS,
    TEXT,
    UNET,
)
from engine.errors import BackendError

# The VAE's parts are shades of one colour, the loop's of another, so that the eye adds them up.
_COLORS = {
    TEXT: "#b07aa1",
    ENCODER: "#9ecae1",
    STAGE_1: "#6baed6",
    STAGE_1_ENCODER: "#3182bd",
    CONTROLNET: "#fdae6b",
    UNET: "#e6550d",
    STEPS: "#f07f2e",
    DECODER: "#08519c",
    COLOR_FIX: "#59a14f",
    NOISE: "#edc948",
    OPENING: "#d4a6c8",
    ELSE: "#969696",
}
_PALE = (ENCODER, STAGE_1, CONTROLNET, OPENING)
#: The least part of the longest bar that has room for its number.
_LEAST_LABELLED = 0.045
_PANELS_IN_A_COLUMN = 6
_DPI = 150


def check_matplotlib() -> None:
    """Find out whether pictures can be drawn, before anything is measured for one.

    Raises:
        BackendError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise BackendError(
            "--plot needs matplotlib, which is not installed",
            found=f"no module {error.name}",
            fix="pip install 'restoration-engine[benchmark]', or leave --plot out",
        ) from error


def draw(report: dict[str, Any], picture: Path) -> None:
    """Draw each runtime's stages, and the floor of their FLOPs.

    Args:
        report: as `benchmarks.latency` writes it.
        picture: a PNG to write.
    """
    make_figure(report).savefig(picture, dpi=_DPI, format="png")


def make_figure(report: dict[str, Any]) -> Any:
    """Return the picture as matplotlib's figure."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    results, machine = report["results"], report["machine"]
    columns = math.ceil(len(results) / _PANELS_IN_A_COLUMN)
    rows = math.ceil(len(results) / columns)
    bars = max(len(result["runtimes"]) for result in results)
    figure = Figure(figsize=(9.5 * columns, 1.7 + rows * (0.95 + 0.42 * bars)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel, result in zip(panels.T.flat, results, strict=False):  # the last column may have empty places
        _draw_panel(panel, result)
    for panel in list(panels.T.flat)[len(results) :]:
        panel.set_axis_off()
    found = {stage for result in results for runtime in result["runtimes"].values() for stage in _parts(runtime)}
    shown = [stage for stage in LABELS if stage in found]
    handles: list[Any] = [Patch(color=_COLORS[stage], label=LABELS[stage]) for stage in shown]
    handles.append(Line2D([], [], color="black", linewidth=2, label="floor"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False, fontsize=9)
    bundle = report["bundle"]
    figure.suptitle(
        f"One restoration: {report['gpu']['name'] if report['gpu'] else machine['processor']}, {machine['date']}\n"
        f"bundle {bundle['name']} ({bundle['precision']}), {report['backend']}, medians of {report['repeats']}; "
        "floor: FLOPs over the matrix rate",
        fontsize=10,
    )
    return figure


def _draw_panel(panel: Any, result: dict[str, Any]) -> None:
    runtimes = result["runtimes"]
    longest = max(runtime["total"]["median_ms"] for runtime in runtimes.values())
    unit, scale = ("s", 1e3) if longest >= 2000 else ("ms", 1.0)
    for place, runtime in enumerate(runtimes.values()):
        total, floor = runtime["total"]["median_ms"], runtime["total"]["floor_ms"]
        left = 0.0
        for stage, ms in _parts(runtime).items():
            color = _COLORS[stage]
            panel.barh(place, ms / scale, left=left / scale, height=0.62, color=color, edgecolor="white", linewidth=0.5)
            start, stop = _clear_of(floor, left, left + ms)
            if stop - start > _LEAST_LABELLED * longest:
                ink = "black" if stage in _PALE else "white"
                middle = (start + stop) / 2 / scale
                panel.text(middle, place, _number(ms / scale), ha="center", va="center", fontsize=7, color=ink)
            left += ms
        panel.plot([floor / scale] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2)
        words = f"  {_number(total / scale)} {unit} (floor: {runtime['total']['floor_share']:.0%})"
        panel.text(max(total, left) / scale, place, words, va="center", fontsize=8)
    panel.set_yticks(range(len(runtimes)), list(runtimes), fontsize=9)
    panel.set_ylim(len(runtimes) - 0.4, -0.6)  # the engine is above
    panel.set_xlim(0, longest / scale * 1.32)  # room for the words behind the bars
    panel.set_xlabel(unit, fontsize=9)
    panel.set_title(result["configuration"], fontsize=9, loc="left")
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _clear_of(mark: float, start: float, stop: float) -> tuple[float, float]:
    """Return the larger part of a stretch that a mark cuts in two, where a number is not crossed out."""
    if not start < mark < stop:
        return start, stop
    return (start, mark) if mark - start > stop - mark else (mark, stop)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _parts(runtime: dict[str, Any]) -> dict[str, float]:
    """Return the stages that add up to the total, with their milliseconds."""
    return {
        stage: figures["median_ms"]
        for stage, figures in runtime["stages"].items()
        if stage not in runtime["beside"] and figures["median_ms"] > 0
    }
