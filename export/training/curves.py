"""The training's loss curves as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

#: Lines with more points than that are drawn faintly, and their running mean over so many parts of them.
_MANY, _PARTS = 100, 40


def draw_losses(logs: list[Path], picture: Path) -> None:
    """Draw what trainings logged: a panel for each, a line per loss.

    Args:
        logs: of JSON lines with "stage", "step", "seconds" and losses by name; what a stopped run logged twice
            counts as it was logged last.
        picture: a PNG to write.
    """
    from matplotlib.figure import Figure

    stages: dict[str, dict[str, dict[int, float]]] = {}
    for line in (line for log in logs for line in log.read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        losses, step = stages.setdefault(record.pop("stage"), {}), record.pop("step")
        record.pop("seconds")
        for loss, value in record.items():
            losses.setdefault(loss, {})[step] = value
    figure = Figure(figsize=(4.2 * len(stages), 3.2), layout="constrained")
    for axes, (stage, losses) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True):
        for loss, points in losses.items():
            steps = np.array(sorted(points))
            values = np.array([points[step] for step in steps])
            many = len(steps) > _MANY
            (drawn,) = axes.plot(steps, values, label=loss, linewidth=1, alpha=0.25 if many else 1.0)
            if many:
                width = len(steps) // _PARTS
                means = np.convolve(values, np.full(width, 1 / width), "valid")
                axes.plot(steps[width - 1 :], means, color=drawn.get_color(), linewidth=1.5)
        axes.set_title(stage)
        axes.set_xlabel("step")
        for handle in axes.legend(fontsize="small").get_lines():
            handle.set_alpha(1.0)
    figure.savefig(picture, dpi=110)
