"""How much work a graph is: FLOPs, counted over its torch module, and bytes that it cannot do without.

Nothing runs and no weight is read: the modules are on the meta device, where tensors have shapes only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stages import Launch
from engine.bundle.graphspec import GraphSpec, Precision, resolve
from export.graphs.builder import TORCH_DTYPES, GraphBuilder, call_arguments

#: Modules of UNet and ControlNet that see neither the picture nor the noise, only text, size and noise level.
_CONSTANT_OF_A_RUN = ("attn2.to_k", "attn2.to_v", "time_embedding", "add_embedding", "time_emb_proj")


@dataclass(frozen=True)
class GraphCost:
    """What the launches of a stage do in one restoration.

    Attributes:
        flops: multiplications and additions of convolutions and matrix products, attention's included,
            by the precision that they are computed in.
        bytes_moved: weights, inputs and outputs of each launch: what it reads and writes at least.
        launches: of graphs.
    """

    flops: dict[Precision, int]
    bytes_moved: int
    launches: int

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    def floor_ms(self, rates_tflops: Mapping[Precision, float]) -> float:
        """Return how long the FLOPs take at a device's matrix rates, in TFLOP/s by precision."""
        return sum(count / (rates_tflops[precision] * 1e9) for precision, count in self.flops.items())


class WorkCounter:
    """Counts the work of a bundle's graphs; every size is counted once.

    Args:
        builders: of the graphs, in the precision that they run in.
    """

    def __init__(self, builders: Mapping[str, GraphBuilder]) -> None:
        self._builders = builders
        self._counted: dict[tuple[str, tuple[tuple[str, int], ...]], tuple[int, int]] = {}

    def work(self, launches: Iterable[Launch], computed_in: Mapping[str, Precision] | None = None) -> GraphCost:
        """Return what some launches do together.

        Args:
            launches: of the graphs.
            computed_in: the precision that each graph is computed in; None is that of its builder.
        """
        flops: dict[Precision, int] = {}
        moved = total = 0
        for launch in launches:
            builder = self._builders[launch.graph]
            key = launch.graph, tuple(sorted(launch.symbols.items()))
            if key not in self._counted:
                self._counted[key] = graph_flops(builder, launch.symbols), graph_bytes(builder, launch.symbols)
            each_flops, each_bytes = self._counted[key]
            precision = builder.spec.precision if computed_in is None else computed_in[launch.graph]
            flops[precision] = flops.get(precision, 0) + launch.count * each_flops
            moved += launch.count * each_bytes
            total += launch.count
        return GraphCost(flops, moved, total)


def graph_flops(builder: GraphBuilder, symbols: Mapping[str, int]) -> int:
    """Return the FLOPs of one launch of a graph.

    Args:
        builder: of the graph.
        symbols: the size: what each symbol of its spec stands for.
    """
    return int(_counted_graph(builder, symbols).get_total_flops())


def constant_flops(builder: GraphBuilder, symbols: Mapping[str, int]) -> int:
    """Return those of a launch's FLOPs whose results are the same in every run with the same texts and steps.

    It bounds what computing them once could save: keys and values of the text, embeddings of time and size.

    Args:
        builder: of the UNet or the ControlNet.
        symbols: as for `graph_flops`.
    """
    by_module = _counted_graph(builder, symbols).get_flop_counts()
    return sum(sum(counts.values()) for name, counts in by_module.items() if name.endswith(_CONSTANT_OF_A_RUN))


def module_flops(module: nn.Module, *arguments: Any) -> int:
    """Return the FLOPs of one call: 2 for each multiplication and addition of a product of matrices.

    Source: torch's own counter, `torch.utils.flop_counter`. On the meta device attention is not one
    operator but its two products, so it is counted wherever a real device would fuse it.
    """
    return int(_counted(module, *arguments).get_total_flops())


def _counted_graph(builder: GraphBuilder, symbols: Mapping[str, int]) -> FlopCounterMode:
    inputs = {
        tensor.name: torch.empty(resolve(tensor.shape, symbols), dtype=TORCH_DTYPES[tensor.dtype], device="meta")
        for tensor in builder.spec.inputs
    }
    module = builder.module().to("meta")  # its constants too, or torch finds two devices
    return _counted(module, *call_arguments(builder.spec, inputs))


def _counted(module: nn.Module, *arguments: Any) -> FlopCounterMode:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*arguments)
    return counter


def graph_bytes(builder: GraphBuilder, symbols: Mapping[str, int]) -> int:
    """Return the bytes that one launch of a graph reads and writes at least: weights, inputs, outputs.

    An embedding's table is left out: a launch reads the rows of its tokens, not the table.
    """
    module = builder.module()
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    weights = sum(weight.nbytes for weight in module.parameters() if id(weight) not in tables)
    return weights + _exchanged_bytes(builder.spec, symbols)


def _exchanged_bytes(spec: GraphSpec, symbols: Mapping[str, int]) -> int:
    return sum(
        math.prod(resolve(tensor.shape, symbols)) * _itemsize(tensor.dtype) for tensor in (*spec.inputs, *spec.outputs)
    )


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize  # NumPy has no bfloat16
