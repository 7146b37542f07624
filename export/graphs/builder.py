"""The seven graphs as torch modules: to trace, to verify against, and to compare the engine with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.bundle.graphspec import PRECISION_DTYPES, DType, GraphSpec, Precision
from export.checkpoint.architecture import Architecture, TextArch, UNetArch, VaeArch
from export.graphs.definitions import GraphDefinition, example_inputs, graph_definitions
from export.graphs.nets.text import TextEncoder2Graph, TextEncoderGraph
from export.graphs.nets.unet import ControlNetGraph, UNetGraph
from export.graphs.nets.vae import DenoiseEncoderGraph, VaeDecoderGraph, VaeEncoderGraph

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}

#: Sizes for tracing: every symbol differs from its smallest value, or torch.export would fix it
#: (PLATFORM, "Export"), and from the others, or it would take two axes for one.
TRACE_SYMBOLS = {"B": 2, "h": 16, "w": 24, "k": 2}


@dataclass(frozen=True, eq=False)
class GraphBuilder:
    """A graph's torch module and its inputs; can be sent to another process.

    Attributes:
        definition: of the graph.
    """

    definition: GraphDefinition

    @property
    def spec(self) -> GraphSpec:
        """Names, types and shapes of its inputs and outputs."""
        return self.definition.spec

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the module's parameters, in its order."""
        return {name: tuple(parameter.shape) for name, parameter in self.module().named_parameters()}

    def module(self) -> nn.Module:
        """Return its torch module, in its precision, with parameters on the meta device.

        Their names are the names in the bundle's weights file.
        """
        with torch.device("meta"):
            net = _MODULES[self.spec.name](self.definition).eval()
        for parameter in net.parameters():  # not .to(): constants stay in float32
            parameter.data = parameter.data.to(TORCH_DTYPES[PRECISION_DTYPES[self.spec.precision]])
            parameter.requires_grad_(False)
        return net

    def example(self, symbols: Mapping[str, int], seed: int) -> dict[str, Tensor]:
        """Return `example_inputs` as tensors."""
        inputs = example_inputs(self.definition, symbols, seed)
        return {tensor.name: as_tensor(inputs[tensor.name], tensor.dtype) for tensor in self.spec.inputs}


def graph_builders(
    arch: Architecture, precision: Precision, end_id: int, *, vae_precision: Precision | None = None
) -> dict[str, GraphBuilder]:
    """Return a builder for each of the seven graphs; arguments as of `graph_definitions`."""
    definitions = graph_definitions(arch, precision, end_id, vae_precision=vae_precision)
    return {name: GraphBuilder(definition) for name, definition in definitions.items()}


def as_tensor(array: Any, dtype: DType) -> Tensor:
    """Return an array as a tensor of one of our types; torch does not know NumPy's bfloat16."""
    plain = array.astype("float32") if dtype == "bfloat16" else array
    return torch.from_numpy(plain).to(TORCH_DTYPES[dtype])


def call_arguments(spec: GraphSpec, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a graph's inputs as its module takes them: the control features as one tuple.

    `tensors` may hold anything by the inputs' names, such as dynamic shapes.
    """
    controls = tuple(tensors[tensor.name] for tensor in spec.inputs if _is_control(tensor.name))
    arguments: list[Any] = []
    for tensor in spec.inputs:
        if not _is_control(tensor.name):
            arguments.append(tensors[tensor.name])
        elif tensor.name == "control_0":
            arguments.append(controls)
    return tuple(arguments)


def _is_control(name: str) -> bool:
    return name.startswith("control_") and name != "control_scale"


def _make(module: Callable[..., nn.Module], kind: type, definition: GraphDefinition) -> nn.Module:
    assert isinstance(definition.arch, kind)
    more = () if definition.end_id is None else (definition.end_id,)
    return module(definition.arch, *more)


_MODULES: dict[str, Callable[[GraphDefinition], nn.Module]] = {
    "text_encoder": partial(_make, TextEncoderGraph, TextArch),
    "text_encoder_2": partial(_make, TextEncoder2Graph, TextArch),
    "denoise_encoder": partial(_make, DenoiseEncoderGraph, VaeArch),
    "vae_encoder": partial(_make, VaeEncoderGraph, VaeArch),
    "vae_decoder": partial(_make, VaeDecoderGraph, VaeArch),
    "controlnet": partial(_make, ControlNetGraph, UNetArch),
    "unet": partial(_make, UNetGraph, UNetArch),
}
