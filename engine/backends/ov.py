"""OpenVINO: runs the bundle's ONNX graphs on Intel's and other x86 processors, Intel's GPUs and NPUs."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends import ov_cache
from engine.backends.base import Runner, keeps_activations
from engine.backends.ov_library import OV_TYPES, Compute, OvLibrary, choose_compute, compute_of, cpu_flags, translated
from engine.backends.ov_parts import Chain, Part, take_part
from engine.bundle.graphspec import GraphSpec, Precision
from engine.bundle.interface import interface_outputs
from engine.bundle.manifest import Bundle, VaeSegment
from engine.bundle.onnx_file import with_weights
from engine.device.interface import Array
from engine.memory.residency import host_weights

#: Shapes that a graph stays compiled for: a step has two, guided and not, and a folder of photos a few.
_SHAPES_KEPT = 4
#: And of their weights, which each holds for itself, all together; one shape stays in any case.
_WEIGHTS_KEPT_BYTES = 1 << 30
#: Graphs whose last norm, and what comes behind it, is computed in fp32 where the rest is in bf16.
_LAST_LAYERS_IN_FP32 = frozenset({"denoise_encoder", "vae_encoder"})

_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class OpenVinoBackend:
    """OpenVINO on one device.

    Args:
        library: with the device.
        threads: of the CPU that one graph may use; 0 is one per core.
        compute: the type to compute in; see `engine.backends.ov_library.compute_of`.
    Raises:
        BackendError: the device does not compute in that type.
    """

    def __init__(self, library: OvLibrary, threads: int = 0, compute: Compute = "auto") -> None:
        self.library = library
        self._threads = threads
        self._compute = choose_compute(library, compute)

    @property
    def label(self) -> str:
        """The library and its version, for results' metadata."""
        return self.library.label

    def open(self, bundle: Bundle, graph: str) -> Runner:
        """Return a runner for one of a bundle's graphs; it is compiled when it first sees a shape; see `Backend`."""
        entry = bundle.manifest.graphs[graph]
        compute = self.computes_in(bundle, graph)
        weights_bytes = host_weights(bundle, compute)[graph]
        parts = {part: self._properties(type_) for part, type_ in _part_types(graph, compute).items()}
        compiler = _GraphCompiler(self.library, parts, bundle, graph)
        kept = max(1, min(_SHAPES_KEPT, _WEIGHTS_KEPT_BYTES // weights_bytes))
        keeps_memory = keeps_activations(entry.spec) or self.library.device != "CPU"
        return OpenVinoRunner(entry.spec, compiler, kept, keeps_memory=keeps_memory)

    def close(self) -> None:
        """Runners share nothing that has to be given back."""

    def computes_in(self, bundle: Bundle, graph: str = "unet") -> Precision:
        """Return the type that a graph is computed in, but for an encoder's last layers; see `ComputingBackend`."""
        return compute_of(self.library, self._compute, bundle.manifest.precision, bundle.spec(graph).precision)

    @contextmanager
    def open_segment(
        self, segment: VaeSegment, content: bytes, folder: Path, precision: Precision = "fp32"
    ) -> Iterator[Runner]:
        """Open one of a graph's segments for as long as it runs; see `SegmentBackend`.

        It is compiled once for slices of all heights: static shapes are no faster here, and compiling one for each
        height takes twice as long.
        """
        # OpenVINO finds weights beside a graph's file only, and segments lie in a zip file; they are small.
        graph = with_weights(content, folder, segment.spec.name)
        compute = self._segment_compute(segment, precision)

        def compile_segment(_: _Shapes) -> Chain:
            core = self.library.core
            model = _with_host_arrays(self.library, core.read_model(graph))
            return Chain([core.compile_model(model, self.library.device, self._properties(compute))])

        runner = OpenVinoRunner(segment.spec, compile_segment, 1, any_shape=True)
        try:
            yield runner
        finally:
            runner.close()

    def _segment_compute(self, segment: VaeSegment, bundle_precision: Precision) -> Precision:
        """Return the type that a segment is computed in: as the part of the whole graph that it is of."""
        compute = compute_of(self.library, self._compute, bundle_precision, segment.spec.precision)
        graph, given = segment.spec.name.split(".", 1)  # a segment is named after its graph and what it gives
        types = tuple(_part_types(graph, compute).values())
        return types[-1 if given in interface_outputs(graph) else 0]

    def _properties(self, compute: Precision) -> dict[str, Any]:
        """Return what models are compiled with; the type is always said, so that no release chooses another."""
        properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": OV_TYPES[compute]}
        if self.library.device != "CPU":
            return properties
        return {
            **properties,
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(self._threads or _cores()),
            # Every process would pin its threads to the same first cores, also where others are idle.
            "ENABLE_CPU_PINNING": "NO",
            # It would round what meets weights in int8 to 8 bits too, which moves results by 5e-3.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }


class OpenVinoRunner(Runner):
    """A graph, compiled for the shapes that it has seen last.

    Args:
        spec: of the graph.
        compiled: returns it compiled for the shapes of its inputs.
        kept: shapes that it stays compiled for, at most.
        any_shape: whether one compiled model takes all shapes.
        keeps_memory: see `Runner`.
    """

    def __init__(
        self,
        spec: GraphSpec,
        compiled: Callable[[_Shapes], Chain],
        kept: int,
        *,
        any_shape: bool = False,
        keeps_memory: bool = True,
    ) -> None:
        super().__init__(spec)
        self.keeps_memory = keeps_memory
        self._compiled, self._kept, self._any_shape = compiled, kept, any_shape
        self._chains: OrderedDict[_Shapes, Chain] = OrderedDict()
        self._closed = False

    def infer_impl(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert not self._closed, f"{self.spec.name} was closed"
        shapes = () if self._any_shape else tuple((name, inputs[name].shape) for name in sorted(inputs))
        chain = self._chain(shapes)
        try:
            results = chain.infer({name: np.ascontiguousarray(array) for name, array in inputs.items()})
            if not self.keeps_memory:
                chain.release_memory()
            return {tensor.name: results[tensor.name] for tensor in self.spec.outputs}
        except Exception as error:
            raise translated(error, self.spec.name, "run") from error

    def _chain(self, shapes: _Shapes) -> Chain:
        chain = self._chains.pop(shapes, None)
        if chain is None:
            while len(self._chains) >= self._kept:  # before the next one takes its memory
                self._chains.popitem(last=False)
            try:
                chain = self._compiled(shapes)
            except Exception as error:
                raise translated(error, self.spec.name, "compile") from error
        self._chains[shapes] = chain
        return chain

    def close(self) -> None:
        self._closed = True
        self._chains.clear()


class _GraphCompiler:
    """Compiles one of a bundle's graphs, or takes it compiled from the cache.

    Args:
        library: that compiles.
        parts: of the graph, in the order in which they run, and the properties that each is compiled with.
        bundle, graph: whose it is, and its name.
    """

    def __init__(self, library: OvLibrary, parts: Mapping[Part, Mapping[str, Any]], bundle: Bundle, graph: str) -> None:
        self._library = library
        self._parts = parts
        self._bundle, self._graph = bundle, graph
        self._weights = bundle.file(bundle.manifest.weights)
        self._entry = bundle.manifest.graphs[graph].file
        self._hashes = {"graph": self._entry.sha256, "weights": bundle.manifest.weights.sha256}

    def __call__(self, shapes: _Shapes) -> Chain:
        return Chain([self._compiled(shapes, part, properties) for part, properties in self._parts.items()])

    def _compiled(self, shapes: _Shapes, part: Part, properties: Mapping[str, Any]) -> Any:
        core, device = self._library.core, self._library.device
        if device != "CPU":
            return core.compile_model(self._model(shapes, part), device, dict(properties))
        # Models without weights, which are found by the place of their file.
        properties = {**properties, "CACHE_MODE": "OPTIMIZE_SIZE"}
        key = ov_cache.cache_key(
            version=self._library.version,
            processor=f"{self._library.device_name} {' '.join(sorted(cpu_flags()))}",
            properties=properties,
            part=part,
            shapes=dict(shapes),
            **self._hashes,
        )
        found = ov_cache.load(key)
        if found is not None:
            try:
                return core.import_model(found, device, {**properties, "WEIGHTS_PATH": str(self._weights)})
            except RuntimeError:  # whole, and still not what this library reads
                ov_cache.drop(key)
        compiled = core.compile_model(self._model(shapes, part), device, properties)
        blob = io.BytesIO()
        compiled.export_model(blob)
        ov_cache.store(key, blob.getvalue())
        return compiled

    def _model(self, shapes: _Shapes, part: Part) -> Any:
        """Read a part of the graph for some shapes."""
        api = self._library.api
        self._bundle.read_graph(self._graph)  # checked, before the library reads it
        model = self._library.core.read_model(self._bundle.file(self._entry))
        self._bundle.file(self._entry)  # and still the same
        model.reshape({name: api.PartialShape(list(shape)) for name, shape in shapes})
        return _with_host_arrays(self._library, take_part(api, model, part))


def _part_types(graph: str, compute: Precision) -> dict[Part, Precision]:
    """Return the parts that a graph runs in, in order, and the type that each is computed in."""
    if compute == "bf16" and graph in _LAST_LAYERS_IN_FP32:
        return {"before the last norm": "bf16", "from the last norm": "fp32"}
    return {"whole": compute}


def _with_host_arrays(library: OvLibrary, model: Any) -> Any:
    """Return a model whose inputs and outputs of bfloat16 are float32, as the host has them; see `host_dtype`."""
    api = library.api
    steps = api.preprocess.PrePostProcessor(model)
    for ports, part in ((model.inputs, steps.input), (model.outputs, steps.output)):
        for index, port in enumerate(ports):
            if port.get_element_type() == api.Type.bf16:
                part(index).tensor().set_element_type(api.Type.f32)
    return steps.build()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
