"""Eager PyTorch as a backend: the same networks and weights behind the same pipeline, to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from engine.backends.base import Runner
from engine.bundle import Bundle
from engine.device import Array
from engine.errors import BackendError
from export.architecture import infer_architecture
from export.graphs import GraphBuilder, call_arguments, graph_builders
from export.verify import load_module


class TorchBackend:
    """Eager PyTorch in float32, attention by `scaled_dot_product_attention`.

    Args:
        bundle: whose weights and architecture are used.
        threads: that one operator may use; 0 leaves torch's own choice.
    Raises:
        BackendError: the bundle is of another precision.
    """

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        if bundle.manifest.precision != "fp32":
            raise BackendError(
                "eager PyTorch is compared in float32",
                where=bundle.path,
                found=bundle.manifest.precision,
                fix="measure a bundle built with --precision fp32",
            )
        if threads:
            torch.set_num_threads(threads)
        self._weights = bundle.file(bundle.manifest.weights)
        with safe_open(self._weights, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        end_id = bundle.manifest.tokenizer.end_id
        self._builders = graph_builders(
            infer_architecture(shapes),
            bundle.manifest.precision,
            end_id,
            vae_precision=bundle.spec("vae_decoder").precision,
        )

    def open(self, bundle: Bundle, graph: str) -> Runner:
        """Return the module that a graph was exported from; `bundle` is the one it was made with."""
        return _TorchRunner(self._builders[graph], self._weights)

    def close(self) -> None:
        """Modules share nothing."""


class _TorchRunner(Runner):
    def __init__(self, builder: GraphBuilder, weights: Path) -> None:
        super().__init__(builder.spec)
        self._module: torch.nn.Module | None = load_module(builder, weights)

    @torch.inference_mode()
    def infer_impl(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        assert self._module is not None, f"{self.spec.name} was closed"
        outputs = self._module(*call_arguments(self.spec, tensors))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {tensor.name: value.numpy() for tensor, value in zip(self.spec.outputs, outputs, strict=True)}

    def close(self) -> None:
        self._module = None
