"""Runners that work on a device's buffers, on one of its streams."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from engine.backends.base import Runner
from engine.bundle.graphspec import GraphSpec, resolve
from engine.bundle.manifest import Bundle
from engine.device.interface import STREAMS, Array, Buffer, Device, Stream
from engine.device.slab import Arrays, Slab
from engine.errors import close_after, close_all
from engine.memory.residency import Activations


class BufferRunner(Runner):
    """One opened graph on a device.

    `enqueue` checks and puts the graph on a stream; `infer` does the same for host arrays, there and
    back, on the stream that the graph shares its activations with.

    Attributes:
        can_be_recorded: whether the work may be captured and replayed.
        memory_version: changes where what was recorded points to memory that is gone.
    """

    can_be_recorded = False
    memory_version = 0

    def __init__(self, spec: GraphSpec, device: Device, stream: Stream) -> None:
        super().__init__(spec)
        self._device, self._stream = device, stream

    def enqueue(self, stream: Stream, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Put the graph on a stream; nothing is waited for.

        Args:
            stream: the graph's own, or one that records it.
            inputs, outputs: by name, in the dtypes and shapes of the spec.
        Raises:
            BackendError: a buffer does not fit the spec, or the backend fails.
        """
        symbols = self.spec.bind({name: (buffer.dtype, buffer.shape) for name, buffer in inputs.items()})
        for tensor in self.spec.outputs:
            expected = (tensor.dtype, resolve(tensor.shape, symbols))
            found = (outputs[tensor.name].dtype, outputs[tensor.name].shape)
            assert found == expected, f"{self.spec.name}.{tensor.name}: {found} for {expected}"
        self.enqueue_impl(stream, symbols, inputs, outputs)

    @abstractmethod
    def enqueue_impl(
        self, stream: Stream, symbols: Mapping[str, int], inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> None:
        """Put the graph on a stream, with buffers that are known to fit."""

    def activations(self, sizes: Sequence[Mapping[str, int]]) -> Activations:
        """Return what the graph needs beside its weights.

        Args:
            sizes: that it is run at, as what its symbols stand for.
        Raises:
            BackendError: it cannot be run at one of them.
        """
        return Activations(None)

    def forget_recordings(self) -> None:
        """Learn that nothing that was recorded will be replayed again."""

    def infer_impl(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self._device.activate()
        symbols = self.spec.sizes_of({name: array.shape for name, array in inputs.items()})
        slab = Slab(self._device, tensor_arrays(self.spec, symbols))
        try:
            sources, results = (
                {tensor.name: slab[tensor.name] for tensor in tensors}
                for tensors in (self.spec.inputs, self.spec.outputs)
            )
            for name, array in inputs.items():
                self._stream.upload(sources[name], np.ascontiguousarray(array))
            self.enqueue(self._stream, sources, results)
            downloads = {name: self._stream.download(result) for name, result in results.items()}
            found = {name: download.result() for name, download in downloads.items()}
        except BaseException as error:
            # What is under way may still use the buffers, whatever has gone wrong.
            close_after(error, self._stream.synchronize, slab.close)
            raise
        close_all(self._stream.synchronize, slab.close)
        return found


def tensor_arrays(spec: GraphSpec, symbols: Mapping[str, int]) -> Arrays:
    """Return the shapes and dtypes of a graph's inputs and outputs at a size, as what its symbols stand for."""
    return {tensor.name: (resolve(tensor.shape, symbols), tensor.dtype) for tensor in (*spec.inputs, *spec.outputs)}


@runtime_checkable
class DeviceBackend(Protocol):
    """A backend whose runners share a device and its streams.

    Attributes:
        device: that everything is on.
        streams: by the names of `engine.device.interface.STREAMS`.
    """

    device: Device
    streams: dict[str, Stream]

    def open(self, bundle: Bundle, graph: str) -> BufferRunner:
        """Return a runner for one of a bundle's graphs, as `Backend.open`."""
        ...

    def known_activations(self, bundle: Bundle, graph: str, sizes: Sequence[Mapping[str, int]]) -> Activations | None:
        """Return what `BufferRunner.activations` would, or None if the graph has to be opened for it."""
        ...

    def sizes_at_opening(self, bundle: Bundle, graph: str) -> Sequence[Mapping[str, int]]:
        """Return the sizes, as what symbols stand for, at which a graph is run when it is opened, to check it."""
        ...

    def can_stream_weights(self, bundle: Bundle, graph: str) -> bool:
        """Tell whether a part of a graph's weights may stay on the host."""
        ...

    def limit_weights(self, on_device: Mapping[str, int]) -> None:
        """Say how many bytes of weights the named graphs may have on the device, once they are opened again.

        Graphs that are not named have all of them there.
        """
        ...

    def reserve(self, stream: str, nbytes: int, *, keep_larger: bool = False) -> None:
        """Set the memory for activations of a stream, or see that it has so much; nothing may be using it."""
        ...


class SelfAllocatingBackend:
    """A device's backend whose library takes its memory itself; see `DeviceBackend`.

    Args:
        device: that everything is on; closed with the backend.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.streams = {name: device.stream() for name in STREAMS}

    def known_activations(self, bundle: Bundle, graph: str, sizes: Sequence[Mapping[str, int]]) -> Activations:
        """Tell that the library's allocator grows as it runs, and that nobody knows how far."""
        return Activations(None)

    def sizes_at_opening(self, bundle: Bundle, graph: str) -> Sequence[Mapping[str, int]]:
        """Tell that opening a graph runs nothing."""
        return ()

    def can_stream_weights(self, bundle: Bundle, graph: str) -> bool:
        """Tell that all weights are on the device."""
        return False

    def limit_weights(self, on_device: Mapping[str, int]) -> None:
        """Do nothing: there is nothing that could be limited."""
        assert not on_device, "no graph's weights can be streamed"

    def reserve(self, stream: str, nbytes: int, *, keep_larger: bool = False) -> None:
        """Do nothing: the library takes its memory when it needs it."""

    def close(self) -> None:
        """Give the device back."""
        self.device.close()
