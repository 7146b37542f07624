"""The inputs of a bundle's graphs in a real restoration, as the engine's own runners get them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends import OPENVINO, make_backend
from engine.backends.base import Backend, Runner, SegmentBackend
from engine.bundle.graphspec import Precision
from engine.bundle.manifest import Bundle, VaeSegment
from engine.device.interface import Array
from engine.errors import BackendError, UsageError
from engine.pipeline.restorer import Restorer
from engine.sampling.sampler import StepOutput
from engine.settings import Settings


@dataclass(frozen=True)
class Captured:
    """What a graph was called with.

    Attributes:
        inputs: by name, in the dtypes that the host has of the graph's spec.
        stage: the operation of the recipe that called it.
    """

    inputs: dict[str, NDArray[Any]]
    stage: str


class _AllCapturedError(Exception):
    """Ends a restoration of which nothing more is needed."""


class _Recorder:
    """Decides which call of each graph is kept: the first, but of the denoiser's graphs the first in the step."""

    def __init__(self, bundle: Bundle, graphs: Sequence[str], step: int) -> None:
        self._bundle, self._wanted, self._step = bundle, frozenset(graphs), step
        self._steps_done = 0
        self._stage = ""
        self.sliced: set[str] = set()
        self.found: dict[str, Captured] = {}

    def on_stage(self, stage: str) -> None:
        self._stage = stage

    def on_step(self, _: StepOutput) -> None:
        self._steps_done += 1

    def see(self, graph: str, inputs: Mapping[str, Array]) -> None:
        """Keep a call's inputs where they are the wanted ones.

        Raises:
            _AllCapturedError: this call was the last that was wanted.
        """
        in_steps = self._bundle.spec(graph).role == "denoiser"
        if graph in self._wanted and graph not in self.found and (not in_steps or self._steps_done == self._step - 1):
            copies = {name: np.array(array) for name, array in inputs.items()}
            self.found[graph] = Captured(copies, f"step {self._step}" if in_steps else self._stage)
            if self._wanted <= self.found.keys():
                raise _AllCapturedError


class _RecordingRunner(Runner):
    def __init__(self, inner: Runner, recorder: _Recorder) -> None:
        super().__init__(inner.spec)
        self._inner, self._recorder = inner, recorder

    def infer_impl(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self._recorder.see(self.spec.name, inputs)
        return self._inner.infer_impl(inputs)

    def close(self) -> None:
        self._inner.close()


class _RecordingBackend:
    """A backend of the host whose runners tell what they are called with."""

    def __init__(self, inner: Backend, recorder: _Recorder) -> None:
        self._inner, self._recorder = inner, recorder
        self.label = inner.label

    def open(self, bundle: Bundle, graph: str) -> Runner:
        return _RecordingRunner(self._inner.open(bundle, graph), self._recorder)

    def open_segment(
        self, segment: VaeSegment, content: bytes, folder: Path, precision: Precision = "fp32"
    ) -> AbstractContextManager[Runner]:
        assert isinstance(self._inner, SegmentBackend)
        self._recorder.sliced.add(segment.spec.name.split(".")[0])
        return self._inner.open_segment(segment, content, folder, precision)

    def close(self) -> None:
        self._inner.close()


def capture(
    bundle: Bundle,
    photo: Path,
    graphs: Sequence[str],
    step: int,
    changes: Mapping[str, Any],
    *,
    threads: int = 0,
    all_must_run: bool = True,
) -> dict[str, Captured]:
    """Restore a photo as far as it takes to see the inputs of some graphs.

    It runs on the CPU: through ONNX Runtime, or through OpenVINO where the bundle is in bf16. Where a photo is sampled
    in tiles, a step's inputs are those of its first tile; the VAE's decoder is seen at its first call, which is stage
    1's where the colour fix is on.

    Args:
        bundle: that restores.
        photo: to restore.
        graphs: whose inputs are wanted.
        step: of the sampling, from 1, for the graphs that run in every step.
        changes: settings that differ from the bundle's.
        threads: of the CPU; 0 is one per core.
        all_must_run: whether a graph that this restoration does not run is an error; else it is left out.
    Returns:
        What each graph was called with, in the order of `graphs`.
    Raises:
        UsageError: no such graph, a step beyond the run's, a graph that this restoration does not run.
        ImageError, BackendError: as `Restorer.restore`.
    """
    check_graphs(bundle, graphs)
    settings = bundle.manifest.defaults.updated(dict(changes))
    check_step(settings, step)
    recorder = _Recorder(bundle, graphs, step)
    backend = make_backend(OPENVINO if bundle.manifest.precision == "bf16" else "onnxruntime", threads=threads)
    with Restorer(bundle, _RecordingBackend(backend, recorder)) as restorer, suppress(_AllCapturedError):
        restorer.restore(photo, on_step=recorder.on_step, on_stage=recorder.on_stage, **changes)
    for graph in graphs:
        if graph not in recorder.found and all_must_run:
            raise _not_run(graph, graph in recorder.sliced)
    return {graph: recorder.found[graph] for graph in graphs if graph in recorder.found}


def check_graphs(bundle: Bundle, graphs: Sequence[str]) -> None:
    """Check that a bundle has some graphs.

    Raises:
        UsageError: it lacks one.
    """
    for graph in graphs:
        if graph not in bundle.manifest.graphs:
            raise UsageError("no such graph", where="--graph", expected=", ".join(bundle.manifest.graphs), found=graph)


def check_step(settings: Settings, step: int) -> None:
    """Check that a restoration has a step.

    Raises:
        UsageError: it has fewer.
    """
    if not 1 <= step <= settings.steps:
        raise UsageError(
            "the restoration has no such step",
            where="--step",
            expected=f"1 to {settings.steps}",
            found=step,
            fix="name another step, or restore in more with --steps",
        )


def _not_run(graph: str, sliced: bool) -> UsageError | BackendError:
    if sliced:
        return BackendError(
            "the graph runs in slices at this size",
            where=graph,
            fix="take a smaller photo, or add --vae-tiles off if memory holds the whole",
        )
    return UsageError(
        "this restoration does not run the graph",
        where=graph,
        fix="choose another graph; vae_encoder runs where --restore-pull is given",
    )
