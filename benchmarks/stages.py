"""The stages of a restoration: which launches of graphs each consists of, and which time is whose.

On a CPU each graph's time is taken by itself. On a device a clock stands around the whole loop, so
ControlNet and UNet are one stage there, "steps"; and stages on two streams overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.memory.size_plan import SizePlan
from engine.pipeline.plan import make_plan
from engine.pipeline.restorer import Restorer
from engine.settings import Settings

TEXT, ENCODER, STAGE_1, STAGE_1_ENCODER = "text", "denoise encoder", "stage 1", "stage 1 encoder"
CONTROLNET, UNET, STEPS, DECODER = "controlnet", "unet", "steps", "vae decoder"
NOISE = "noise and texts"
OPENING, COLOR_FIX, ELSE = "opening graphs", "color fix", "everything else"
#: In the order of a restoration, with what a person calls them.
LABELS = {
    TEXT: "text",
    ENCODER: "denoise encode",
    STAGE_1: "stage-1 decode",
    STAGE_1_ENCODER: "stage-1 encode",
    NOISE: "noise and texts, uploaded",
    CONTROLNET: "ControlNet",
    UNET: "UNet",
    STEPS: "steps (ControlNet, UNet)",
    DECODER: "decode",
    COLOR_FIX: "colour fix",
    OPENING: "opening graphs",
    ELSE: "everything else",
}
#: Stages that are taken once for every sampling step.
PER_STEP = (CONTROLNET, UNET, STEPS)


@dataclass(frozen=True)
class Launch:
    """A graph that runs `count` times at one size.

    Attributes:
        symbols: what each symbol of the graph's spec stands for.
    """

    stage: str
    graph: str
    symbols: dict[str, int]
    count: int = 1


def plan_launches(restorer: Restorer, settings: Settings, size_px: int, batch: int) -> list[Launch]:
    """Return what one restoration of square photos launches, with texts that were not encoded before.

    Args:
        restorer: that restores them.
        settings: of the restoration.
        size_px: the side that the networks see.
        batch: how many photos go together.
    """
    size = (size_px, size_px)
    plan = make_plan(restorer.bundle, restorer.stages.prompts, size, settings, SizePlan(), batch)
    launches = []
    for operation in plan.operations:
        for graph in operation.graphs:
            spec = restorer.bundle.spec(graph)
            sizes = plan.workload.sizes(spec)
            if spec.role != "denoiser":
                launches.append(Launch(operation.name, graph, sizes[0]))
                continue
            # A guided step passes twice: it sees every photo with both texts.
            for passes, symbols in zip(plan.workload.passes, sizes, strict=True):
                steps = sum(step.guided == (passes == 2) for step in plan.table.steps)
                launches.append(Launch(graph, graph, symbols, steps))
    return launches


def split_times(
    graphs_ms: Mapping[str, float], outside_ms: Mapping[str, float], device_ms: Mapping[str, float], total_ms: float
) -> dict[str, float]:
    """Return each stage's milliseconds in one restoration.

    All but those `beside` add up to the total: "everything else" is what is left.

    Args:
        graphs_ms, outside_ms, device_ms: from `engine.timings.Timings`.
        total_ms: of the whole restoration.
    """
    # On a device the text's time is the host's, which waits for it; its other graphs' are one figure.
    clock = {**device_ms, TEXT: graphs_ms.get(TEXT, 0.0)} if device_ms else graphs_ms
    times = {stage: clock[stage] for stage in LABELS if stage in clock}
    opening = sum(ms for stage, ms in graphs_ms.items() if stage.startswith("load "))
    if opening and not device_ms:  # on a device they are opened while others run
        times[OPENING] = opening
    times[COLOR_FIX] = outside_ms.get(COLOR_FIX, 0.0)
    apart = beside(times)
    times[ELSE] = total_ms - sum(ms for stage, ms in times.items() if stage not in apart)
    return {stage: times[stage] for stage in LABELS if stage in times}


def beside(stages: Mapping[str, Any] | Sequence[str]) -> tuple[str, ...]:
    """Return the stages that run beside others, so that their times do not add to the total.

    On a device text and stage 1 have a stream of their own (`engine.pipeline.device_executor`); only the
    restoration pull, whose center is encoded from stage 1, makes the steps wait for it.
    """
    if STEPS not in stages:
        return ()
    return (TEXT,) if STAGE_1_ENCODER in stages else (TEXT, STAGE_1)
