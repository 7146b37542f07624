"""What a backend promises: open a graph, and run it on checked, named arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

from engine.bundle.graphspec import DType, GraphSpec, Precision, resolve
from engine.bundle.manifest import Bundle, VaeSegment
from engine.device.interface import Array, host_dtype
from engine.errors import BackendError


class Runner(ABC):
    """One opened graph.

    `infer` checks names, dtypes and shapes against the graph's spec, so that a mistake is named in
    the project's words rather than by a library; `infer_impl` does the work.

    Attributes:
        keeps_memory: whether what a pass took is kept for the next one, where the library can choose.
    """

    keeps_memory: bool = True

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph.

        Args:
            inputs: by name, in the dtypes and shapes of the spec.
        Returns:
            The outputs by name, in the spec's order.
        Raises:
            BackendError: an input does not fit the spec, or the backend fails.
        """
        dtypes = {tensor.name: tensor.dtype for tensor in self.spec.inputs}

        def dtype_of(name: str, array: Array) -> str:
            fits = name in dtypes and array.dtype == host_dtype(dtypes[name])
            return dtypes[name] if fits else str(array.dtype)

        symbols = self.spec.bind({name: (dtype_of(name, array), array.shape) for name, array in inputs.items()})
        outputs = self.infer_impl(inputs)
        for tensor in self.spec.outputs:
            expected = resolve(tensor.shape, symbols)
            if outputs[tensor.name].shape != expected:
                raise BackendError(
                    "the graph gave another shape than its spec",
                    where=f"{self.spec.name}.{tensor.name}",
                    expected=list(expected),
                    found=list(outputs[tensor.name].shape),
                )
        return outputs

    @abstractmethod
    def infer_impl(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph on inputs that are known to fit."""

    @abstractmethod
    def close(self) -> None:
        """Give the graph's memory back; the runner is of no use afterwards."""


class Backend(Protocol):
    """Opens the graphs of bundles."""

    @property
    def label(self) -> str:
        """The library that runs graphs, with its version, for results' metadata."""
        ...

    def open(self, bundle: Bundle, graph: str) -> Runner:
        """Return a runner for one of a bundle's graphs, by its name.

        Raises:
            BundleError: the bundle lacks what this backend runs.
            BackendError: the backend cannot run it.
        """
        ...

    def close(self) -> None:
        """Give back what its runners share; they are of no use afterwards."""
        ...


@runtime_checkable
class SegmentBackend(Protocol):
    """Opens the segments of graphs as well; see `engine.memory.vae_slices`."""

    def open_segment(
        self, segment: VaeSegment, content: bytes, folder: Path, precision: Precision = "fp32"
    ) -> AbstractContextManager[Runner]:
        """Open a segment for as long as it runs.

        Args:
            segment: of a graph.
            content: its ONNX file, from `Bundle.read_segment`.
            folder: where the file with its weights lies.
            precision: of the bundle, by which some backends choose what they compute in.
        Raises:
            BackendError: the backend cannot run it.
        """
        ...


@runtime_checkable
class ComputingBackend(Protocol):
    """Compiles graphs for the processor: for each shape, and to a type that it chooses, in which it holds weights.

    Other backends compute in float32 on a CPU. Photos go through this one's graphs one by one: another batch is
    another compiled graph, whose kernels may give other last bits.
    """

    def computes_in(self, bundle: Bundle, graph: str = "unet") -> Precision:
        """Return the type that a graph is computed in; the UNet's is told as the bundle's."""
        ...


def keeps_activations(spec: GraphSpec) -> bool:
    """Tell whether a graph's memory for activations is better kept from one pass to the next on a CPU.

    The VAE's graphs take hundreds of megabytes, and run once or twice a photo, or a tile: taking them anew costs 1 to
    2 % of a pass (measured with ONNX Runtime at 512 × 512). Kept, they would lie beside the arrays of a large photo
    when the networks are done, and in a server that waits: 594 instead of 172 MiB for the demo.
    """
    return spec.role != "vae"


def as_dtype(array: Array, dtype: DType) -> Array:
    """Return an array in a spec's dtype, as the host has it, without a copy where it has it already."""
    return array.astype(host_dtype(dtype), copy=False)
