"""The seven graphs: names, types and shapes of each, and inputs to try it with; no torch is needed.

One table feeds the ONNX export, verification, TensorRT's profiles, Triton's configs and the tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.bundle.graphspec import PRECISION_DTYPES, Axis, DType, GraphSpec, Precision, Role, TensorSpec, resolve
from engine.bundle.sdxl import TOKENS
from export.checkpoint.architecture import IMAGE_CHANNELS, Architecture, TextArch, UNetArch, VaeArch

#: NumPy's types for ours.
NUMPY_DTYPES: dict[DType, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
}
#: Latent sides must be multiples of this: two halvings in the UNet, and SPEC's rule.
CELL_MULTIPLE = 8
_LATENT_SYMBOLS = {"h": CELL_MULTIPLE, "w": CELL_MULTIPLE}


@dataclass(frozen=True)
class GraphDefinition:
    """Everything that decides a graph, apart from code.

    Attributes:
        spec: names, types and shapes of its inputs and outputs.
        arch: sizes of its network.
        end_id: the vocabulary's end token, whose first place `text_encoder_2` pools at; None for the other graphs.
    """

    spec: GraphSpec
    arch: UNetArch | VaeArch | TextArch
    end_id: int | None = None

    @property
    def name(self) -> str:
        """The graph's name."""
        return self.spec.name

    def digest(self) -> str:
        """Return a hash of the definition, in hexadecimal."""
        return hashlib.sha256(f"{self.spec.model_dump_json()}\n{self.arch!r}\n{self.end_id}".encode()).hexdigest()


def graph_definitions(
    arch: Architecture, precision: Precision, end_id: int, *, vae_precision: Precision | None = None
) -> dict[str, GraphDefinition]:
    """Return the definition of each of the seven graphs.

    Args:
        arch: sizes of the networks.
        precision: of the networks.
        end_id: the vocabulary's end token.
        vae_precision: of the VAE's graphs; None is the networks', but fp32 for fp16, in which SDXL's
            VAE overflows (SPEC, "VAE").
    """
    vae_precision = vae_precision or ("fp32" if precision == "fp16" else precision)
    return {
        spec.name: GraphDefinition(
            spec,
            arch.vae if spec.role == "vae" else getattr(arch, spec.name),
            end_id if spec.name == "text_encoder_2" else None,
        )
        for spec in _specs(arch, precision, vae_precision)
    }


def example_inputs(definition: GraphDefinition, symbols: Mapping[str, int], seed: int) -> dict[str, NDArray[Any]]:
    """Return plausible inputs of a graph: tokens, timesteps and scales in range, the rest normal.

    Args:
        definition: of the graph.
        symbols: what each symbol of its spec stands for.
        seed: of the values.
    Returns:
        Arrays by the inputs' names, in the spec's dtypes and order.
    """
    generator = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {}
    for tensor in definition.spec.inputs:
        shape = resolve(tensor.shape, symbols)
        value: NDArray[Any]
        if tensor.name == "input_ids":
            assert isinstance(definition.arch, TextArch)
            last = definition.arch.vocabulary - 1
            end_id = last if definition.end_id is None else definition.end_id
            value = generator.integers(0, max(end_id, 1), shape)
            value[:, TOKENS // 2 :] = end_id
        elif tensor.name == "timestep":
            value = generator.integers(0, 1000, shape)
        elif tensor.name == "control_scale":
            value = generator.random(shape, np.float32)
        else:
            value = generator.standard_normal(shape, np.float32)
        inputs[tensor.name] = value.astype(NUMPY_DTYPES[tensor.dtype])
    return inputs


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

    def spec(name: str, role: Role, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> GraphSpec:
        return GraphSpec(
            name=name,
            role=role,
            precision=vae_precision if role == "vae" else precision,
            inputs=inputs,
            outputs=outputs,
            multiples={} if role == "text" else _LATENT_SYMBOLS,
        )

    width_2 = arch.text_encoder_2.width
    timestep = tensor("timestep", "float32", "B")
    return [
        spec("text_encoder", "text", (ids,), (hidden(arch.text_encoder.width),)),
        spec("text_encoder_2", "text", (ids,), (hidden(width_2), tensor("pooled", dtype, "B", width_2))),
        spec("denoise_encoder", "vae", (pixels,), (cells("z"),)),
        spec("vae_encoder", "vae", (pixels,), (cells("z"),)),
        spec("vae_decoder", "vae", (cells("z"),), (pixels,)),
        spec("controlnet", "denoiser", (cells("x"), timestep, cells("lq"), *text), controls),
        spec(
            "unet",
            "denoiser",
            (cells("x"), timestep, *text, *controls, tensor("control_scale", "float32", 1)),
            (cells("eps"),),
        ),
    ]


def _divided(symbol: str, divisor: int) -> str:
    return symbol if divisor == 1 else f"{symbol}/{divisor}"
