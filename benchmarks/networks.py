"""The networks of a bundle as torch modules, with nothing but the bundle to go by."""

from __future__ import annotations

import torch
from safetensors import safe_open

from engine.bundle.graphspec import Precision
from engine.bundle.manifest import Bundle
from export.build.int8 import parameter_shapes
from export.build.verify import ParameterReader
from export.checkpoint.architecture import infer_architecture
from export.graphs.builder import GraphBuilder, graph_builders


def bundle_builders(bundle: Bundle, *, vae_precision: Precision | None = None) -> dict[str, GraphBuilder]:
    """Return the builder of each graph; the architecture is read off the weights file's header.

    Args:
        bundle: in whose precision they are.
        vae_precision: of the VAE's graphs, where not the bundle's.
    """
    with safe_open(bundle.file(bundle.manifest.weights), framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return graph_builders(
        infer_architecture(parameter_shapes(shapes)),
        bundle.manifest.precision,
        bundle.manifest.tokenizer.end_id,
        vae_precision=vae_precision or bundle.spec("vae_decoder").precision,
    )


def load_weights(builder: GraphBuilder, bundle: Bundle, place: str) -> torch.nn.Module:
    """Return a graph's module in the builder's precision, with the bundle's weights.

    Args:
        builder: of the graph.
        bundle: whose weights are read.
        place: torch's name of a device, such as "cuda:0".
    """
    module = builder.module()
    with safe_open(bundle.file(bundle.manifest.weights), framework="pt", device=place) as file:
        read = ParameterReader(file)
        state = {name: read(name).to(weight.dtype) for name, weight in module.named_parameters()}
    module.load_state_dict(state, assign=True)
    return module.to(place)  # the constants, which are made on the CPU
