"""The recipe: what a restoration does, in order. This is the only place that says so.

    resize in ─ denoise encoder ─ text ─ stage 1 ─ stage 1 encoder ─ steps ─ vae decoder ─ color fix ─ resize out

Executors run the operations (`engine.pipeline.host` on a CPU, `engine.pipeline.device_executor` on a GPU). Phases of
memory, streams, the launches that benchmarks count and the steps of Triton's ensemble are derived from them.

Source: SPEC, "The pipeline"; the paper's Eq. 5 to 10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

#: Work on the main stream leads to the result; work on the side stream can run beside it. "host" is NumPy.
Stream = Literal["main", "side", "host"]
Kind = Literal["photo", "text", "vae", "steps"]


@dataclass(frozen=True)
class Conditions:
    """What decides which operations a restoration needs.

    Attributes:
        fixes_colors: whether the result takes its colours from stage 1.
        pulls: whether steps are pulled towards stage 1 (the restoration guidance).
    """

    fixes_colors: bool
    pulls: bool


@dataclass(frozen=True)
class Operation:
    """One operation of the recipe.

    Attributes:
        name: as times and progress call it.
        kind: what runs it: "photo" is a function on pixels, "vae" one graph from its input to its output, "text" the
            two text encoders, "steps" the sampler's loop over ControlNet and UNet.
        graphs: that it runs.
        reads, writes: names of values; what an operation reads, an earlier one has written, or the caller gives.
        stream: where it runs. A graph always runs on the same stream, for graphs of a stream share activations.
        phase: operations of one phase keep their graphs in memory together.
        when: whether a restoration needs it.
    """

    name: str
    kind: Kind
    graphs: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    stream: Stream
    phase: str
    when: Callable[[Conditions], bool] = lambda conditions: True


def _needs_stage1(conditions: Conditions) -> bool:
    return conditions.fixes_colors or conditions.pulls


def _pulls(conditions: Conditions) -> bool:
    return conditions.pulls


def _fixes_colors(conditions: Conditions) -> bool:
    return conditions.fixes_colors


#: Values: `photo` is what the caller gives, `restored` what it gets. `lq`, `stage1` and `pixels` are f32[B,3,8h,8w] in
#: about [-1, 1]; `z_lq`, `z_center` and `z` f32[B,C,h,w]; `texts` words, `conditioning` what the networks read of them.
RECIPE: tuple[Operation, ...] = (
    Operation("resize in", "photo", (), ("photo",), ("lq",), "host", "photo"),
    Operation("denoise encoder", "vae", ("denoise_encoder",), ("lq",), ("z_lq",), "main", "encode"),
    Operation("text", "text", ("text_encoder", "text_encoder_2"), ("texts",), ("conditioning",), "side", "text"),
    Operation("stage 1", "vae", ("vae_decoder",), ("z_lq",), ("stage1",), "side", "stage 1", _needs_stage1),
    Operation("stage 1 encoder", "vae", ("vae_encoder",), ("stage1",), ("z_center",), "side", "stage 1", _pulls),
    Operation("steps", "steps", ("controlnet", "unet"), ("z_lq", "conditioning", "z_center"), ("z",), "main", "sample"),
    Operation("vae decoder", "vae", ("vae_decoder",), ("z",), ("pixels",), "side", "decode"),
    Operation("color fix", "photo", (), ("pixels", "stage1"), ("pixels",), "host", "photo", _fixes_colors),
    Operation("resize out", "photo", (), ("pixels", "photo"), ("restored",), "host", "photo"),
)

#: Every graph, in the order of its first run.
GRAPHS: tuple[str, ...] = tuple(dict.fromkeys(graph for operation in RECIPE for graph in operation.graphs))


def operations(conditions: Conditions) -> tuple[Operation, ...]:
    """Return the operations that a restoration needs, in order."""
    return tuple(operation for operation in RECIPE if operation.when(conditions))


def graphs_of_phase(phase: str) -> tuple[str, ...]:
    """Return the graphs that a phase keeps in memory together."""
    return tuple(graph for operation in RECIPE if operation.phase == phase for graph in operation.graphs)


#: The graphs of the sampling loop.
STEP_GRAPHS: tuple[str, ...] = tuple(
    graph for operation in RECIPE if operation.kind == "steps" for graph in operation.graphs
)

#: The graphs of each phase that has any, in order.
PHASES: tuple[tuple[str, ...], ...] = tuple(
    graphs_of_phase(phase) for phase in dict.fromkeys(operation.phase for operation in RECIPE if operation.graphs)
)


def stream_of(graph: str) -> Stream:
    """Return the stream that a graph runs on."""
    return next(operation.stream for operation in RECIPE if graph in operation.graphs)
