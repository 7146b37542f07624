"""The seven graphs: for each, its spec, its torch module, and inputs to trace and verify it with.

One table feeds the ONNX export, verification, TensorRT's profiles, Triton's configs and the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.bundle import VAE_GRAPHS
from engine.graphspec import (
    PRECISION_DTYPES,
    Axis,
    DType,
    GraphSpec,
    Precision,
    TensorSpec,
    resolve,
)
from export.architecture import TOKENS, Architecture
from export.nets.text import TextEncoder2Graph, TextEncoderGraph
from export.nets.unet import ControlNetGraph, UNetGraph
from export.nets.vae import IMAGE_CHANNELS, DenoiseEncoderGraph, VaeDecoderGraph, VaeEncoderGraph

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}
#: Latent sides must be multiples of this: two halvings in the UNet, and SPEC's rule.
CELL_MULTIPLE = 8
_LATENT_SYMBOLS = {"h": CELL_MULTIPLE, "w": CELL_MULTIPLE}

#: Sizes for tracing: every symbol differs from its smallest value, or torch.export would fix it
#: (PLATFORM, "Export"), and from the others, or it would take two axes for one.
TRACE_SYMBOLS = {"B": 2, "h": 16, "w": 24, "k": 2}


@dataclass(frozen=True, eq=False)
class GraphBuilder:
    """How to make one graph; can be sent to another process.

    Attributes:
        spec: names, types and shapes of its inputs and outputs.
        constants: numbers that are built into the graph, beside what the spec says.
        module: returns its torch module with parameters on the meta device. Their names are the
            names in the bundle's weights file.
        example: returns inputs for a size (every symbol's value) and a seed.
    """

    spec: GraphSpec
    constants: Mapping[str, int]
    module: Callable[[], nn.Module]
    example: Callable[[Mapping[str, int], int], dict[str, Tensor]]

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the module's parameters."""
        return {name: tuple(parameter.shape) for name, parameter in self.module().named_parameters()}


def graph_builders(
    arch: Architecture, precision: Precision, end_id: int, *, vae_precision: Precision | None = None
) -> dict[str, GraphBuilder]:
    """Return a builder for each of the seven graphs.

    Args:
        arch: sizes of the networks.
        precision: of the networks.
        end_id: the vocabulary's end token.
        vae_precision: of the VAE's graphs; None is the networks', but fp32 for fp16, in which SDXL's
            VAE overflows (SPEC, "VAE").
    """
    vae_precision = vae_precision or ("fp32" if precision == "fp16" else precision)
    modules: dict[str, Callable[[], nn.Module]] = {
        "text_encoder": partial(TextEncoderGraph, arch.text_encoder),
        "text_encoder_2": partial(TextEncoder2Graph, arch.text_encoder_2, end_id),
        "denoise_encoder": partial(DenoiseEncoderGraph, arch.vae),
        "vae_encoder": partial(VaeEncoderGraph, arch.vae),
        "vae_decoder": partial(VaeDecoderGraph, arch.vae),
        "controlnet": partial(ControlNetGraph, arch.controlnet),
        "unet": partial(UNetGraph, arch.unet),
    }
    builders = {}
    for spec in _specs(arch, precision, vae_precision):
        dtype = TORCH_DTYPES[PRECISION_DTYPES[spec.precision]]
        builders[spec.name] = GraphBuilder(
            spec,
            {"end_id": end_id} if spec.name == "text_encoder_2" else {},
            partial(_on_meta, modules[spec.name], dtype),
            partial(_example_inputs, spec, end_id),
        )
    return builders


def _example_inputs(spec: GraphSpec, end_id: int, symbols: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Return plausible inputs of a graph: tokens, timesteps and scales in range, the rest normal.

    Returns:
        Tensors by the inputs' names, in the spec's dtypes and order.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for tensor in spec.inputs:
        shape = resolve(tensor.shape, symbols)
        dtype = TORCH_DTYPES[tensor.dtype]
        if tensor.name == "input_ids":
            value = torch.randint(0, max(end_id, 1), shape, generator=generator)
            value[:, TOKENS // 2 :] = end_id
        elif tensor.name == "timestep":
            value = torch.randint(0, 1000, shape, generator=generator).to(dtype)
        elif tensor.name == "control_scale":
            value = torch.rand(shape, generator=generator)
        else:
            value = torch.randn(shape, generator=generator).to(dtype)
        inputs[tensor.name] = value
    return inputs


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


def _on_meta(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        net = make().eval()
    for parameter in net.parameters():  # not .to(): constants stay in float32
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    return net


def _specs(arch: Architecture, precision: Precision, vae_precision: Precision) -> list[GraphSpec]:
    dtype = PRECISION_DTYPES[precision]
    factor = arch.vae.pixels_per_cell
    unet = arch.unet

    def tensor(name: str, kind: DType, *shape: Axis) -> TensorSpec:
        return TensorSpec(name=name, dtype=kind, shape=shape)

    def cells(name: str) -> TensorSpec:
        return tensor(name, "float32", "B", unet.latent_channels, "h", "w")

    ids = tensor("input_ids", "int64", "B", TOKENS)
    pixels = tensor("pixels", "float32", "B", IMAGE_CHANNELS, f"{factor}*h", f"{factor}*w")
    text = (
        tensor("context", dtype, "B", f"{TOKENS}*k", unet.context_channels),
        tensor("vector", dtype, "B", unet.vector_channels),
    )
    features = zip(
        (*unet.feature_channels, unet.channels[-1]),
        (*unet.feature_divisors, unet.feature_divisors[-1]),
        strict=True,
    )
    controls = tuple(
        tensor(f"control_{index}", dtype, "B", channels, _divided("h", divisor), _divided("w", divisor))
        for index, (channels, divisor) in enumerate(features)
    )

    def hidden(width: int) -> TensorSpec:
        return tensor("hidden", dtype, "B", TOKENS, width)

    def spec(
        name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *, latent: bool = True
    ) -> GraphSpec:
        return GraphSpec(
            name=name,
            precision=vae_precision if name in VAE_GRAPHS else precision,
            inputs=inputs,
            outputs=outputs,
            multiples=_LATENT_SYMBOLS if latent else {},
        )

    width_2 = arch.text_encoder_2.width
    timestep = tensor("timestep", "float32", "B")
    return [
        spec("text_encoder", (ids,), (hidden(arch.text_encoder.width),), latent=False),
        spec("text_encoder_2", (ids,), (hidden(width_2), tensor("pooled", dtype, "B", width_2)), latent=False),
        spec("denoise_encoder", (pixels,), (cells("z"),)),
        spec("vae_encoder", (pixels,), (cells("z"),)),
        spec("vae_decoder", (cells("z"),), (pixels,)),
        spec("controlnet", (cells("x"), timestep, cells("lq"), *text), controls),
        spec(
            "unet",
            (cells("x"), timestep, *text, *controls, tensor("control_scale", "float32", 1)),
            (cells("eps"),),
        ),
    ]


def _divided(symbol: str, divisor: int) -> str:
    return symbol if divisor == 1 else f"{symbol}/{divisor}"
