"""Agreement of a packed graph with its torch module.

The module runs in float32 on the weights of the bundle; so what is measured is the graph and its
arithmetic, at a size other than the one that was traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from engine.bundle.verification import Agreement, relative_l2
from engine.errors import BuildError
from export.build import int8
from export.build.trial import BOUNDS, METHODS, TrialRun, trial_symbols
from export.build.weights import WEIGHTS
from export.graphs.builder import GraphBuilder, as_tensor, call_arguments


def compare_with_torch(
    builder: GraphBuilder, file: Path, run: TrialRun, weights: str = "the bundle's weights"
) -> tuple[Agreement, dict[str, NDArray[Any]]]:
    """Compare what a packed graph gave with what its module gives.

    Args:
        builder: of the graph.
        file: the ONNX file; the weights file lies beside it.
        run: the graph's trial.
        weights: what the weights are, for the record.
    Returns:
        The agreement, and torch's outputs in float32.
    Raises:
        BuildError: an output disagrees; the graph and the output are named.
    """
    spec = builder.spec
    expected = run_torch(builder, run.inputs, file.parent / WEIGHTS)
    errors = {name: relative_l2(run.outputs[name], expected[name]) for name in expected}
    bound = BOUNDS[spec.precision]
    for name, error in errors.items():
        if not error <= bound:
            raise BuildError(
                "the exported graph disagrees with its torch module",
                where=f"{spec.name}.{name}",
                expected=f"relative L2 up to {bound:g}",
                found=f"{error:.3g}",
                fix="this is a bug, or an unsupported version of torch or onnxruntime: please report it",
            )
    method = f"{METHODS[spec.precision]} against torch in float32, on {weights}"
    agreement = Agreement(method=method, symbols=trial_symbols(spec), relative_l2=errors, bound=bound)
    return agreement, expected


def load_module(builder: GraphBuilder, weights: Path) -> torch.nn.Module:
    """Return a graph's torch module in float32, with the bundle's weights.

    Args:
        builder: of the graph, at any precision.
        weights: the bundle's weights file.
    """
    module = builder.module()
    with safe_open(weights, framework="pt") as file:
        read = ParameterReader(file)
        state = {name: read(name) for name, _ in module.named_parameters()}
    module.load_state_dict(state, assign=True)
    return module


class ParameterReader:
    """Reads parameters from a bundle's weights file in float32; those in int8 are multiplied out.

    Args:
        file: opened by `safetensors.safe_open` for torch.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = frozenset(file.keys())

    def __call__(self, name: str) -> torch.Tensor:
        if name in self._names:
            stored: torch.Tensor = self._file.get_tensor(name)
            return stored.to(torch.float32)
        values, scales = (self._file.get_tensor(name + part).to(torch.float32) for part in (int8.VALUES, int8.SCALES))
        product: torch.Tensor = values * scales.reshape(-1, *(1,) * (values.ndim - 1))
        return product


class Streamed(TorchFunctionMode):
    """Lets a module on the meta device run in float32: each weight is in memory only while it is used.

    SDXL's UNet is 10 GB in float32, its largest weight 59 MB. A weight that is used in another way than as an
    argument of a torch function meets the meta device, which torch refuses to mix with numbers.

    Args:
        module: from `GraphBuilder.module`; it is not changed.
        file: the bundle's weights file, opened.
    """

    def __init__(self, module: torch.nn.Module, file: Any) -> None:
        super().__init__()
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._stored = ParameterReader(file)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ != "__get__":  # shapes and the like need no values
            args, kwargs = tree_map_only(torch.nn.Parameter, self._read, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _read(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        return self._stored(self._names[parameter])


def run_torch(builder: GraphBuilder, inputs: Mapping[str, NDArray[Any]], weights: Path) -> dict[str, NDArray[Any]]:
    """Return what the torch module makes of some inputs, in float32.

    Args:
        builder: of the graph.
        inputs: by name, in the spec's dtypes.
        weights: the bundle's weights file.
    """
    module = builder.module().float()
    tensors = {tensor.name: as_tensor(inputs[tensor.name], tensor.dtype) for tensor in builder.spec.inputs}
    wide = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    with torch.inference_mode(), safe_open(weights, framework="pt") as file, Streamed(module, file):
        outputs = module(*call_arguments(builder.spec, wide))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {tensor.name: value.numpy() for tensor, value in zip(builder.spec.outputs, outputs, strict=True)}
