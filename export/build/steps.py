"""The build itself: stage by stage in a folder of its own, which becomes the bundle when it is whole.

A build that was stopped goes on behind its last finished stage. A build that failed leaves nothing.
A finished bundle is left alone unless something that it depends on has changed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from pydantic import BaseModel, Field

from engine.bundle.files import MANIFEST, File, describe_file
from engine.bundle.graphspec import GraphSpec
from engine.bundle.manifest import (
    FORMAT,
    Graph,
    Lora,
    Manifest,
    TokenizerFile,
    TrtEngine,
    VaeSegment,
)
from engine.bundle.storage import atomic_write
from engine.bundle.verification import Verification
from engine.errors import from_os_error
from engine.memory.host_memory import release_free_memory, return_large_blocks_at_once
from engine.units import format_bytes
from export.build.build_plan import BuildPlan, PlannedGraph
from export.build.folder import STATE, check_room, locked, partial_folder, present_manifest, repair, swap
from export.build.int8 import VALUES
from export.build.trial import try_graph
from export.build.weights import WEIGHTS, Weight, write_weights
from export.checkpoint.architecture import sinusoid_frequencies
from export.checkpoint.tokenizer import END_TOKEN, FILE, PAD_ID_2, START_TOKEN, load_tokenizer
from export.graphs.pack import pack
from export.graphs.traces import Trace
from export.graphs.vae_segments import cut, write_segments
from export.trt.compile import compile_plan

_PACKAGES = ("ml_dtypes", "numpy", "onnx", "onnxruntime", "safetensors", "tokenizers")
_TORCH_PACKAGES = ("torch", "diffusers", "onnxscript")
#: Measured on 2 cores: what a bar needs for a sensible ETA, nothing else depends on it.
_SECONDS_PER_GB = 4.0
_SECONDS_PER_PARAMETER = 0.03
_SECONDS_PER_PACK = 0.5
_SECONDS_PER_PROFILE = 4.0


class Progress(Protocol):
    """Shows how far a build is; amounts are estimated seconds."""

    def stage(self, name: str) -> None:
        """Say what is being done."""
        ...

    def advance(self, amount: float) -> None:
        """Say that work worth `amount` was done."""
        ...


@dataclass(frozen=True)
class BuildResult:
    """How a build ended.

    Attributes:
        status: "built", or "unchanged" if the bundle that was there is the one asked for.
        manifest: of the bundle.
        changes: what differed from the bundle that was there before.
        resumed: stages that an earlier, interrupted build had finished.
    """

    status: str
    manifest: Manifest
    changes: tuple[str, ...]
    resumed: tuple[str, ...]


class _State(BaseModel):
    """What a stopped build has finished, and for which key."""

    key: dict[str, Any]
    weights: File | None = None
    graphs: dict[str, Graph] = Field(default_factory=dict)


def estimate(plan: BuildPlan) -> dict[str, float]:
    """Return the stages of a build and what each is worth, in estimated seconds."""
    stages = {"hash": plan.read_bytes / 1e9, WEIGHTS: plan.write_bytes / 1e9 * _SECONDS_PER_GB}
    for name, graph in plan.graphs.items():
        tracing = len(graph.parameters) * _SECONDS_PER_PARAMETER if graph.origin == "needed" else 0.0
        compiling = 0.0 if plan.compiling is None else len(plan.compiling.profiles[name]) * _SECONDS_PER_PROFILE
        stages[name] = _SECONDS_PER_PACK + tracing + compiling
    return stages


def build(plan: BuildPlan, progress: Progress, say: Callable[[str], None]) -> BuildResult:
    """Build the bundle of a plan.

    Args:
        plan: from `make_plan`.
        progress: told about stages and work done.
        say: told what a person should know, a line each.
    Raises:
        BuildError: another build is under way, a graph disagrees with its module, or a weight does
            not fit the precision.
        CheckpointError: a weight is not finite.
        OutputError: the disk is full or not writable, or something else lies in the bundle's place.
    """
    output = plan.request.output
    return_large_blocks_at_once()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with locked(output):
            return _build(plan, progress, say)
    except OSError as error:
        raise from_os_error(error, output, "build the bundle") from error


def _build(plan: BuildPlan, progress: Progress, say: Callable[[str], None]) -> BuildResult:
    output = plan.request.output
    repair(output)
    work = estimate(plan)
    progress.stage("hashing the inputs")
    hashes = plan.hash_sources()
    key = plan.key(hashes)
    progress.advance(work["hash"])
    present = present_manifest(output)
    changes = tuple(differences(present.key, key)) if present else ()
    partial = partial_folder(output)
    if present and not changes:
        shutil.rmtree(partial, ignore_errors=True)  # of a build of something else that was stopped
        return BuildResult("unchanged", present, (), ())
    for change in changes:
        say(f"changed: {change}")

    have = check_room(plan, partial)
    say(f"writes {format_bytes(plan.write_bytes)} to a disk with {format_bytes(have)} free")
    state = _resume(partial, key)
    resumed = tuple([WEIGHTS] * (state.weights is not None) + list(state.graphs))
    if resumed:
        say(f"goes on behind: {', '.join(resumed)}")
    wanted = [graph for name, graph in plan.graphs.items() if name not in state.graphs]
    try:
        with _traces(wanted) as traced:
            _run_stages(plan, partial, state, progress, work, present, traced)
        manifest = _finish(plan, partial, state, hashes)
        progress.stage("moving into place")
        swap(partial, output)
    except KeyboardInterrupt:
        size = sum(file.stat().st_size for file in partial.glob("*"))
        say(f"stopped; the same command goes on from here, or remove {partial} ({format_bytes(size)})")
        raise
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise from_os_error(error, output, "build the bundle") from error
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return BuildResult("built", manifest, changes, resumed)


def _run_stages(
    plan: BuildPlan,
    partial: Path,
    state: _State,
    progress: Progress,
    work: Mapping[str, float],
    present: Manifest | None,
    traced: Callable[[PlannedGraph], Trace],
) -> None:
    if state.weights is None:
        progress.stage("merging weights")
        per_byte = work[WEIGHTS] / max(1, plan.layout.bytes)
        sha256 = write_weights(
            partial / WEIGHTS,
            plan.layout,
            plan.tensors,
            plan.loras,
            lambda count: progress.advance(count * per_byte),
        )
        state.weights = File(name=WEIGHTS, bytes=plan.layout.bytes, sha256=sha256)
        _save(partial, state)
    else:
        progress.advance(work[WEIGHTS])
    for name, planned in plan.graphs.items():
        if name not in state.graphs:
            graph = _pack_and_verify(plan, planned, partial, progress, traced)
            release_free_memory()  # before it is compiled: a graph's weights, each time
            if plan.compiling is not None:
                compiled = _reused(present, plan, graph, state.weights, partial)
                if compiled is None:
                    progress.stage(f"compiling {name}")
                    compiled = compile_plan(graph, partial, state.weights, plan.compiling)
                graph = graph.model_copy(update={"plan": compiled})
                release_free_memory()
            state.graphs[name] = graph
            _save(partial, state)
        progress.advance(work[name])


def _pack_and_verify(
    plan: BuildPlan,
    planned: PlannedGraph,
    partial: Path,
    progress: Progress,
    traced: Callable[[PlannedGraph], Trace],
) -> Graph:
    """Write a graph and its segments beside the weights, and verify them; returns the manifest's entry."""
    spec = planned.definition.spec
    progress.stage(f"tracing {spec.name}" if planned.trace is None else f"packing {spec.name}")
    trace = traced(planned)
    file = partial / f"{spec.name}.onnx"
    onnx.save(pack(trace.structure, spec, plan.layout.weights), file)
    segments, segments_file = _write_segments(spec, trace, partial, plan.layout.weights)
    progress.stage(f"verifying {spec.name}")
    run = try_graph(planned.definition, file, None if segments_file is None else (segments, segments_file))
    agreement, expected = None, run.outputs
    if _compares_with_torch(plan, planned):
        from export.build.verify import compare_with_torch
        from export.graphs.builder import GraphBuilder

        agreement, expected = compare_with_torch(GraphBuilder(planned.definition), file, run)
    parity_sample = None
    if plan.compiling is not None and plan.compiling.weight_stripped:
        parity_sample = partial / f"{spec.name}.parity_sample.npz"
        arrays = {**run.inputs, **{f"expected {name}": value for name, value in expected.items()}}
        np.savez(parity_sample, **arrays)  # type: ignore[arg-type]  # NumPy's stubs take the names for its own options
    return Graph(
        spec=spec,
        file=describe_file(file),
        verification=Verification(
            when_traced=trace.provenance.agreement if planned.origin == "shipped" else None,
            in_build=agreement,
            trial=run.trial,
        ),
        weights_bytes=sum(map(plan.layout.parameter_bytes, planned.parameters)),
        weights_in_int8=any(name + VALUES in plan.layout.weights for name in planned.parameters),
        parity_sample=None if parity_sample is None else describe_file(parity_sample),
        segments=segments,
        segments_file=None if segments_file is None else describe_file(segments_file),
    )


def _compares_with_torch(plan: BuildPlan, planned: PlannedGraph) -> bool:
    """Tell whether a graph is compared with its torch module: a trace that was made here has never been."""
    return plan.request.verify == "torch" or planned.origin != "shipped"


@contextmanager
def _traces(wanted: list[PlannedGraph]) -> Iterator[Callable[[PlannedGraph], Trace]]:
    """Start tracing what has to be traced; gives what returns the trace of each graph, in any order."""
    needed = [graph for graph in wanted if graph.trace is None]
    if not needed:
        yield lambda graph: _given(graph.trace)
        return
    from export.graphs.builder import GraphBuilder
    from export.graphs.tracing import traced_ahead

    builders = {graph.definition.name: GraphBuilder(graph.definition) for graph in needed}
    with traced_ahead(builders.values()) as traced:
        yield lambda graph: graph.trace or traced(builders[graph.definition.name])


def _given(trace: Trace | None) -> Trace:
    assert trace is not None
    return trace


def _write_segments(
    spec: GraphSpec, trace: Trace, partial: Path, weights: Mapping[str, Weight]
) -> tuple[tuple[VaeSegment, ...], Path | None]:
    """Write a graph's segments, if it has some; returns them and their file."""
    segments = cut(spec, trace.structure)
    if not segments:
        return (), None
    file = partial / f"{spec.name}.segments.zip"
    write_segments(segments, file, weights)
    return tuple(entry.segment for entry in segments), file


def _reused(present: Manifest | None, plan: BuildPlan, graph: Graph, weights: File, partial: Path) -> TrtEngine | None:
    """Take over a plan of the bundle that is replaced, if it is the one that is wanted.

    So another LoRA costs a weight-stripped bundle no compiling: its plans do not depend on the weights.
    """
    assert plan.compiling is not None
    old = present.graphs[graph.spec.name].plan if present else None
    if old is None or old.key != plan.compiling.key(graph, weights):
        return None
    shutil.copyfile(plan.request.output / old.file.name, partial / old.file.name)
    return old


def _finish(plan: BuildPlan, partial: Path, state: _State, hashes: Mapping[Path, str]) -> Manifest:
    request = plan.request
    tokenizer = load_tokenizer(request.tokenizer)
    tokenizer.save(str(partial / FILE))
    end_id = tokenizer.token_to_id(END_TOKEN)
    assert state.weights is not None
    manifest = Manifest(
        format=FORMAT,
        name=request.output.name,
        preset=request.preset,
        precision=request.precision,
        backend=request.backend,
        built=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        built_with={package: importlib.metadata.version(package) for package in _used_packages(plan)},
        key=state.key,
        notice=request.notice,
        defaults=plan.defaults,
        presets=plan.presets,
        weights=state.weights,
        tokenizer=TokenizerFile(
            file=describe_file(partial / FILE),
            start_id=tokenizer.token_to_id(START_TOKEN),
            end_id=end_id,
            pad_id=end_id,
            pad_id_2=PAD_ID_2,
        ),
        frequencies=tuple(sinusoid_frequencies(plan.arch.sinusoid_channels).tolist()),
        graphs=state.graphs,
        sources=plan.sources(hashes),
        loras=tuple(
            Lora(
                name=lora.name,
                file=lora.file.name,
                sha256=hashes[lora.file],
                scale=lora.scale,
                kinds=lora.kinds,
                ranks=lora.ranks,
                alphas=lora.alphas,
                layers=len(lora.deltas),
            )
            for lora in plan.loras
        ),
    )
    (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    return manifest


def _used_packages(plan: BuildPlan) -> tuple[str, ...]:
    with_torch = any(_compares_with_torch(plan, graph) for graph in plan.graphs.values())
    return (*_PACKAGES, *(_TORCH_PACKAGES if with_torch else ()))


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Return what differs between two keys, a line per leaf: "precision: fp32 → fp16"."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in [*old, *(name for name in new if name not in old)]:
            lines += differences(old.get(name), new.get(name), f"{place}.{name}" if place else name)
        return lines
    if old == new:
        return []
    return [f"{place}: {_short(old)} → {_short(new)}"]


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


# -- what a stopped build has finished ---------------------------------------------------------------


def _resume(partial: Path, key: dict[str, Any]) -> _State:
    """Return the state of a stopped build of the same bundle, or start anew."""
    try:
        state = _State.model_validate_json((partial / STATE).read_text())
    except (OSError, ValueError):
        state = None
    # Through JSON, because that is how the other side was stored.
    if state is not None and state.key == json.loads(json.dumps(key)):
        _drop_unfinished(partial, state)
        return state
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
    except OSError as error:
        raise from_os_error(error, partial.parent, "build the bundle") from error
    return _State(key=key)


def _drop_unfinished(partial: Path, state: _State) -> None:
    """Remove what a stopped build had begun, so that only what it had finished gets into the bundle."""
    finished = {STATE, *(file.name for graph in state.graphs.values() for file in graph.files)}
    if state.weights is not None:
        finished.add(state.weights.name)
    for path in partial.iterdir():
        if path.name not in finished:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _save(partial: Path, state: _State) -> None:
    with atomic_write(partial / STATE, "keep the state of the build") as file:
        file.write(state.model_dump_json().encode())
