"""The comparison itself: a group of layers at a time, so that neither a graph's weights nor its results are all held.

Two errors are measured of each layer. The first is that of its result, after all that came before it; but rounding adds
up along a graph, so that a large error deep in it need not be that layer's fault, and hides one that is. So each layer
is computed once more by both ways, from the reference's inputs to it, rounded to the types that the examined way holds
them in. What differs then is the layer's own: a scale that is 1 % off shows as 1 %, however deep it lies.

A group costs four runs: each way's layers in a chain, and each way's layers cut apart. Between groups, what later
layers still read is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from benchmarks.compare.findings import BOUNDS, LOCAL_BOUNDS, TYPE_NAMES, GraphReport, Layer, Spread, difference
from benchmarks.compare.graphs import LayerGraph, precision_type, round_to
from benchmarks.compare.matching import Match, is_float_cast, match
from benchmarks.compare.slices import make_slice
from benchmarks.compare.ways import Way
from engine.errors import BackendError, RestoreError, first_line

Values = dict[str, NDArray[Any]]
#: Told how many of a graph's layers are done, and how many there are.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Side:
    """A graph, the way it is computed, and how many CPU threads that may take; 0 is one per core."""

    graph: LayerGraph
    way: Way
    threads: int = 0

    def type_of(self, tensor: str) -> int:
        """Return ONNX's number of the type that a tensor is in."""
        declared = self.graph.sizes.types[tensor]
        if self.way.computes_in is not None and declared == TensorProto.FLOAT:
            return precision_type(self.way.computes_in)
        return declared

    def held_in(self, tensor: str) -> int:
        """Return ONNX's number of the type that a tensor's values are rounded to: a cast widens no value."""
        source = self._widened.get(tensor)
        return self.type_of(tensor) if source is None else self.held_in(source)

    @cached_property
    def _widened(self) -> dict[str, str]:
        """The results of casts to fp32, with what they are casts of."""
        casts = (layer for layer in self.graph.layers if is_float_cast(self.graph, layer))
        return {cast.output[0]: cast.input[0] for cast in casts if self.type_of(cast.output[0]) == TensorProto.FLOAT}


@dataclass(frozen=True)
class Limits:
    """What is allowed, and how much is held at once.

    Attributes:
        bound: relative L2 of a layer's result; None is by the types.
        own_bound: relative L2 that a layer may add by itself; None is by its type.
        group_bytes: of a group's results in float32, and of its weights; a single layer may take more.
    """

    bound: float | None = None
    own_bound: float | None = None
    group_bytes: int = 256 << 20


def compare_layers(
    reference: Side,
    examined: Side,
    inputs: Mapping[str, NDArray[Any]],
    stage: str,
    limits: Limits | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> GraphReport:
    """Compare two ways of computing a graph, layer by layer.

    Args:
        reference: that is trusted.
        examined: whose layers are judged.
        inputs: of the graph, by name.
        stage: where they are from, for the report.
        limits: bounds, and memory.
        on_progress: called after every group.
    Raises:
        UsageError: the two graphs have not the same layers.
        BackendError: a way cannot run a layer.
    """
    return _Comparison(reference, examined, inputs, limits or Limits()).run(stage, on_progress)


class _Chain:
    """One way's run through a graph, a slice at a time; keeps what later layers read."""

    def __init__(self, side: Side, inputs: Mapping[str, NDArray[Any]]) -> None:
        self.side = side
        self.position = 0
        self.values: Values = {
            name: round_to(_in_float32(inputs[name]), side.held_in(name)) for name in side.graph.inputs
        }
        layers = side.graph.layers
        self._last_use = {tensor: index for index, layer in enumerate(layers) for tensor in layer.input}

    def advance(self, stop: int) -> None:
        """Compute the layers up to `stop`."""
        if stop > self.position:
            layers = self.side.graph.layers[self.position : stop]
            self.values.update(run_layers(self.side, layers, self.values))
            self.position = stop

    def drop(self, still_needed: Callable[[str], bool]) -> None:
        """Forget what no later layer reads and nobody else needs."""
        for name in list(self.values):
            if self._last_use.get(name, -1) < self.position and not still_needed(name):
                del self.values[name]


class _Comparison:
    def __init__(self, reference: Side, examined: Side, inputs: Mapping[str, NDArray[Any]], limits: Limits) -> None:
        self._reference, self._examined, self._limits = reference, examined, limits
        self._match: Match = match(examined.graph, reference.graph)
        self._chains = _Chain(reference, inputs), _Chain(examined, inputs)
        self._index_of = {
            tensor: index for index, layer in enumerate(reference.graph.layers) for tensor in layer.output
        }
        # Until which examined layer a value of the reference is needed.
        self._needed = {
            self._match.tensors[tensor]: index
            for index, layer in enumerate(examined.graph.layers)
            for tensor in (*examined.graph.varying(layer), *layer.output)
            if tensor in self._match.tensors
        }
        coarser = max(
            (side.way.computes_in or _precision(side.graph) for side in (reference, examined)), key=_roughness
        )
        self._bound = limits.bound or BOUNDS[coarser]

    def run(self, stage: str, on_progress: OnProgress) -> GraphReport:
        started = time.perf_counter()
        layers = self._examined.graph.layers
        found: list[Layer] = []
        start = groups = 0
        while start < len(layers):
            stop = self._group_end(start)
            found += self._group(start, stop)
            start, groups = stop, groups + 1
            on_progress(start, len(layers))
        outputs = self._examined.graph.outputs
        seconds = time.perf_counter() - started
        return GraphReport(self._examined.graph.name, stage, tuple(found), outputs, seconds, groups)

    def _group_end(self, start: int) -> int:
        """Return the end of the group that begins at a layer: as many as memory is allowed for, and at least one."""
        graph, budget = self._examined.graph, self._limits.group_bytes
        results = weights = 0
        seen: set[str] = set()
        for index in range(start, len(graph.layers)):
            layer = graph.layers[index]
            results += sum(graph.bytes_of(tensor) for tensor in layer.output if tensor)
            fresh = set(graph.constants_of(layer)[1]) - seen
            weights += sum(graph.bytes_of(tensor) for tensor in fresh)
            seen |= fresh
            if max(results, weights) > budget and index > start:
                return index
        return len(graph.layers)

    def _group(self, start: int, stop: int) -> list[Layer]:
        reference, examined = self._chains
        layers = self._examined.graph.layers[start:stop]
        wanted = [
            self._index_of[name]
            for layer in layers
            for tensor in layer.output
            if (name := self._match.tensors.get(tensor)) in self._index_of
        ]
        reference.advance(max(wanted, default=-1) + 1)
        examined.advance(stop)
        expected = {
            tensor: reference.values[self._match.tensors[tensor]]
            for layer in layers
            for tensor in layer.output
            if tensor in self._match.tensors
        }
        found = {tensor: examined.values[tensor] for tensor in expected}
        errors = _differences(found, expected)
        own_found, own_expected = self._apart(start, stop)
        own_errors = _differences(own_found, own_expected)
        rows = [
            Layer(
                index=index,
                name=layer.name,
                output=tensor,
                operator=layer.op_type,
                place=self._examined.graph.place(layer),
                type=TYPE_NAMES[self._examined.type_of(tensor)],
                shape=tuple(found[tensor].shape),
                reference=Spread.of(expected[tensor]),
                examined=Spread.of(found[tensor]),
                error=errors[tensor],
                own=own_errors[tensor],
                own_spread=(own_spread := Spread.of(own_found[tensor])),
                breaks=not own_spread.is_finite and Spread.of(own_expected[tensor]).is_finite,
                bound=self._bound,
                own_bound=self._own_bound(layer, tensor),
            )
            for index, layer in enumerate(layers, start)
            for tensor in layer.output
            # Integers are told only where they differ.
            if tensor in expected and (self._examined.graph.is_float(tensor) or errors[tensor] > 0)
        ]
        examined.drop(lambda name: False)
        reference.drop(lambda name: self._needed.get(name, -1) >= stop)
        return rows

    def _apart(self, start: int, stop: int) -> tuple[Values, Values]:
        """Return what each layer makes of the reference's inputs, rounded as the examined way holds them: by the
        examined way, and by the reference.
        """
        graph = self._examined.graph
        layers = graph.layers[start:stop]
        given = {
            tensor: round_to(self._chains[0].values[self._match.tensors[tensor]], self._examined.held_in(tensor))
            for layer in layers
            for tensor in graph.varying(layer)
        }
        found = run_layers(self._examined, layers, given, cut=[graph.varying(layer) for layer in layers])
        expected: Values = {}
        pairs = []
        for index, layer in enumerate(layers, start):
            if is_float_cast(graph, layer):
                expected[layer.output[0]] = given[layer.input[0]]
            else:
                pairs.append((layer, self._reference.graph.layers[self._match.layers[index]]))
        expected.update(self._reference_apart(pairs, given))
        return found, expected

    def _reference_apart(self, pairs: Sequence[tuple[NodeProto, NodeProto]], given: Values) -> Values:
        """Return what the reference's layers make of what the examined ones are given, by the examined names."""
        graph, examined = self._reference.graph, self._examined.graph
        same = all(
            given[ours] is self._chains[0].values[theirs]
            for layer, other in pairs
            for ours, theirs in zip(examined.varying(layer), graph.varying(other), strict=True)
        )
        if same:  # the chain has computed it already
            return {
                ours: self._chains[0].values[theirs]
                for layer, other in pairs
                for ours, theirs in zip(layer.output, other.output, strict=True)
            }
        results = {
            theirs: ours for layer, other in pairs for ours, theirs in zip(layer.output, other.output, strict=True)
        }
        reads = [examined.varying(layer) for layer, _ in pairs]
        made = run_layers(self._reference, [other for _, other in pairs], given, cut=reads)
        return {results[name]: value for name, value in made.items()}

    def _own_bound(self, layer: NodeProto, tensor: str) -> float:
        """Return how much a layer may add by itself: by the coarsest type of its result and its weights."""
        if self._limits.own_bound is not None:
            return self._limits.own_bound
        types = {self._examined.type_of(tensor), self._reference.type_of(self._match.tensors[tensor])}
        types.update(map(self._examined.type_of, self._examined.graph.constants_of(layer)[1]))
        return max((LOCAL_BOUNDS.get(TYPE_NAMES.get(each, ""), 0.0) for each in types), default=0.0)


def run_layers(
    side: Side, layers: Sequence[NodeProto], values: Values, *, cut: Sequence[Sequence[str]] | None = None
) -> Values:
    """Run some layers of a graph, through Polygraphy; returns all their results, floating-point ones in float32.

    Args:
        side: the graph and the way.
        layers: in graph order.
        values: that the layers read, by name.
        cut: the names of what each layer reads; None lets it read what those before it made; see `make_slice`.
    Raises:
        BackendError: the way cannot run them.
    """
    part = make_slice(side.graph, layers, side.way.form, cut=cut)
    if not part.outputs:
        return {}
    try:
        # What Polygraphy would print is told by this command, and its errors are exceptions.
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            runner = side.way.make_runner(part.model, side.threads)
            ((_, (result,)),) = Comparator.run([runner], data_loader=[part.feed(values)])
        return {tensor: _in_float32(result[name]) for tensor, name in part.outputs.items()}
    except (RestoreError, MemoryError):
        raise
    except Exception as error:  # each library's own
        raise BackendError(
            f"{side.way.name} cannot run the layers", where=side.graph.name, found=first_line(error)
        ) from error


def _differences(found: Values, expected: Values) -> dict[str, float]:
    """Compare results by name.

    Polygraphy's `compare_accuracy` would sort every tensor several times, for statistics that it logs and that nobody
    reads here: more time than running the layers takes.
    """
    return {name: difference(value, expected[name]) for name, value in found.items()}


def _in_float32(array: NDArray[Any]) -> NDArray[Any]:
    return array if array.dtype.kind in "iub" else array.astype(np.float32, copy=False)


def _precision(graph: LayerGraph) -> str:
    """Return the coarsest type that a graph's layers have."""
    kinds = {
        TYPE_NAMES.get(graph.sizes.types[tensor], "") for layer in graph.layers for tensor in layer.output if tensor
    }
    return max(kinds & BOUNDS.keys(), key=_roughness, default="fp32")


def _roughness(precision: str) -> float:
    return BOUNDS[precision]
