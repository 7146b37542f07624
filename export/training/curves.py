"""The training's loss curves as a picture."""

from __future__ import annotations

import json
from pathlib import Path


def draw_losses(logs: list[Path], picture: Path) -> None:
    """Draw what `train` logged: a panel per stage, a line per loss.

    Args:
        logs: of JSON lines with "stage", "step", "seconds" and losses by name; a step that a stopped
            run logged twice counts as it was logged last.
        picture: a PNG to write.
    """
    from matplotlib.figure import Figure

    stages: dict[str, dict[int, dict[str, float]]] = {}
    for line in (line for log in logs for line in log.read_text().splitlines()):
        record = json.loads(line)
        stage, step = record.pop("stage"), record.pop("step")
        record.pop("seconds")
        stages.setdefault(stage, {})[step] = record
    figure = Figure(figsize=(4.2 * len(stages), 3.2), layout="constrained")
    for axes, (stage, records) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True):
        for loss in dict.fromkeys(loss for record in records.values() for loss in record):
            steps = sorted(step for step, record in records.items() if loss in record)
            axes.plot(steps, [records[step][loss] for step in steps], label=loss, linewidth=1)
        axes.set_title(stage)
        axes.set_xlabel("step")
        axes.legend(fontsize="small")
    figure.savefig(picture, dpi=110)
