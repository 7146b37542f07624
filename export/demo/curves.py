"""The training's loss curves as a picture."""

from __future__ import annotations

import json
from pathlib import Path


def draw_losses(log: Path, picture: Path) -> None:
    """Draw what `train` logged: a panel per stage, a line per loss.

    Args:
        log: JSON lines with "stage", "step", "seconds" and losses by name; a step that a stopped run
            logged twice counts as it was logged last.
        picture: a PNG to write.
    """
    from matplotlib.figure import Figure

    stages: dict[str, dict[int, dict[str, float]]] = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        stage, step = record.pop("stage"), record.pop("step")
        record.pop("seconds")
        stages.setdefault(stage, {})[step] = record
    figure = Figure(figsize=(4.2 * len(stages), 3.2), layout="constrained")
    for axes, (stage, records) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True):
        steps = sorted(records)
        for loss in records[steps[-1]]:
            axes.plot(steps, [records[step][loss] for step in steps], label=loss, linewidth=1)
        axes.set_title(stage)
        axes.set_xlabel("step")
        axes.legend(fontsize="small")
    figure.savefig(picture, dpi=110)
