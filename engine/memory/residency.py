"""Which graphs stay in memory, a device's or the computer's: what a restoration needs, against what may be used.

All of it is arithmetic on bytes, so that it is known, and can be told, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from engine.bundle.graphspec import PRECISION_DTYPES, GraphSpec, Precision
from engine.bundle.manifest import Bundle
from engine.device.interface import STREAMS
from engine.errors import BackendError, DoesNotFitError
from engine.memory.budget import MemoryBudget
from engine.recipe import GRAPHS, PHASES, STEP_GRAPHS, stream_of
from engine.sampling.tiling import Tiling
from engine.units import format_memory


@dataclass(frozen=True)
class Workload:
    """The sizes of what is restored together.

    Attributes:
        photos: how many.
        height, width: of a latent, in cells.
        texts: 1, or 2 with a negative one.
        chunks: of 77 tokens that each text fills.
        passes: how often a step sees every photo: 1 where it is unguided, 2 where it is guided.
        latent_tiles: tiles of the latent that UNet and ControlNet see one at a time; None is the whole latent.
        vae_tiles: tiles of the latent that the VAE sees one at a time; None is the whole latent.
        texts_by_tile: whether each tile has texts of its own.
        graphs: that run, which for a stage on its own are a few.
    """

    photos: int
    height: int
    width: int
    texts: int
    chunks: int
    passes: tuple[int, ...]
    latent_tiles: Tiling | None = None
    vae_tiles: Tiling | None = None
    texts_by_tile: bool = False
    graphs: tuple[str, ...] = GRAPHS

    def covers(self, other: Workload) -> bool:
        """Tell whether whoever has made room for this has room for another one."""
        same = replace(other, graphs=self.graphs, vae_tiles=self.vae_tiles) == self
        sees_vae = any(graph not in STEP_GRAPHS for graph in other.graphs)
        return same and set(other.graphs) <= set(self.graphs) and not (sees_vae and other.vae_tiles != self.vae_tiles)

    @property
    def rows(self) -> int:
        """Rows that the networks' buffers have: every photo with each text."""
        return self.photos * self.texts

    def sizes(self, spec: GraphSpec) -> tuple[dict[str, int], ...]:
        """Return every size that a graph is run at, as what its symbols stand for."""
        if spec.role == "text":
            return ({"B": self.texts * self.chunks},)
        sees_texts = spec.role == "denoiser"
        parts = self.latent_tiles if sees_texts else self.vae_tiles
        height, width = (self.height, self.width) if parts is None else (parts.rows.size, parts.columns.size)
        all_symbols = [
            {"B": self.photos * count, "h": height, "w": width, "k": self.chunks}
            for count in (self.passes if sees_texts else (1,))
        ]
        return tuple({name: symbols[name] for name in spec.symbols} for symbols in all_symbols)


@dataclass(frozen=True)
class Activations:
    """What a graph needs beside its weights.

    Attributes:
        bytes: at the largest of the sizes that were asked for; None where the library does not tell.
        streaming_bytes: more, if its weights are streamed from the host.
        is_exact: whether that is all that can be known: an opened graph may tell less.
    """

    bytes: int | None
    streaming_bytes: int = 0
    is_exact: bool = True


@dataclass(frozen=True)
class MemoryRequirements:
    """What a restoration needs, in bytes.

    Attributes:
        weights: of each graph.
        activations: of each graph; graphs of one stream share them.
        buffers: of arrays between the graphs.
        streamable: graphs whose weights may lie on the host.
    """

    weights: Mapping[str, int]
    activations: Mapping[str, Activations] = field(default_factory=dict)
    buffers: int = 0
    streamable: frozenset[str] = frozenset()

    def arenas(self, streamed: Iterable[str] = ()) -> dict[str, int]:
        """Return what each stream's graphs need at most, by the stream's name."""
        sizes = dict.fromkeys(STREAMS, 0)
        for graph, found in self.activations.items():
            extra = found.streaming_bytes if graph in streamed else 0
            stream = stream_of(graph)
            sizes[stream] = max(sizes[stream], (found.bytes or 0) + extra)
        return sizes

    @property
    def knows_activations(self) -> bool:
        return bool(self.activations) and all(found.bytes is not None for found in self.activations.values())


@dataclass(frozen=True)
class Residency:
    """What lies on the device.

    Attributes:
        kept: graphs that stay; the others are loaded and released by phase.
        on_device: bytes of weights of each graph while it is loaded: fewer than it has if it is streamed.
        streamed: graphs whose other weights stay on the host.
        arenas: bytes of activations, by stream.
        peak_bytes: in the phase that needs most, buffers included.
    """

    kept: frozenset[str]
    on_device: Mapping[str, int]
    streamed: frozenset[str]
    arenas: Mapping[str, int]
    peak_bytes: int

    @property
    def loaded_by_stage(self) -> tuple[str, ...]:
        return tuple(graph for graph in self.on_device if graph not in self.kept)


def plan_residency(need: MemoryRequirements, free_bytes: int, budget_bytes: int | None, *, where: object) -> Residency:
    """Decide what stays on the device.

    Without a budget everything stays, so that nobody is slowed down without having asked for it.

    Args:
        need: of the restoration.
        free_bytes: of the device, before anything of ours was on it.
        budget_bytes: that may be used of it, or None.
        where: the bundle, for the error.
    Raises:
        DoesNotFitError: without a budget, not everything fits; with one, not even the graphs of a phase
            do, be it with streamed weights.
    """
    allowed = free_bytes if budget_bytes is None else min(budget_bytes, free_bytes)
    fixed = sum(need.arenas().values()) + need.buffers
    everything = sum(need.weights.values()) + fixed
    by_phase = _largest(need.weights, PHASES) + fixed
    if budget_bytes is None:
        if everything <= allowed:
            return _residency(need, frozenset(need.weights), need.weights, frozenset())
        raise _too_little(need, everything, by_phase, free_bytes, None, where)
    kept = choose_kept(need.weights, PHASES, allowed - fixed)
    if kept is not None:
        return _residency(need, kept, need.weights, frozenset())
    streamed = stream_weights(need, PHASES, allowed)
    if streamed is None:
        raise _too_little(need, by_phase, by_phase, free_bytes, budget_bytes, where)
    arenas = need.arenas(streamed)
    weights = {**need.weights, **streamed}
    kept = choose_kept(weights, PHASES, allowed - need.buffers - sum(arenas.values()))
    assert kept is not None, "stream_weights has made room for every phase"
    return _residency(need, kept, weights, frozenset(streamed))


def choose_kept(
    weights: Mapping[str, int], phases: Sequence[Sequence[str]], allowed_bytes: int
) -> frozenset[str] | None:
    """Return the graphs to keep: of the sets that leave room for every phase, that of most bytes.

    Every set is tried: there are seven graphs.

    Args:
        weights: bytes by graph.
        phases: graphs that are needed together.
        allowed_bytes: for weights.
    Returns:
        None if a phase does not fit even alone.
    """
    best: tuple[int, int, frozenset[str]] | None = None
    for count in range(len(weights) + 1):
        for chosen in combinations(weights, count):
            if _largest(weights, phases, chosen) <= allowed_bytes:
                candidate = (sum(weights[graph] for graph in chosen), count, frozenset(chosen))
                if best is None or candidate[:2] > best[:2]:
                    best = candidate
    return None if best is None else best[2]


def choose_resident_graphs(bundle: Bundle, budget: MemoryBudget, compute: Precision = "fp32") -> frozenset[str]:
    """Return the graphs that stay in a computer's memory.

    Args:
        bundle: whose graphs they are.
        budget: of the computer's memory.
        compute: the type that they are computed in, which their weights are held in.
    Raises:
        BackendError: the graphs of one stage do not fit.
    """
    weights = host_weights(bundle, compute)
    kept = choose_kept(weights, PHASES, budget.weights)
    if kept is None:
        needed = MemoryBudget.for_weights(_largest(weights, PHASES))
        raise BackendError(
            "out of memory",
            where=bundle.path,
            expected=f"{format_memory(needed.bytes)} for weights in {PRECISION_DTYPES[compute]} and the rest",
            found=f"{format_memory(budget.bytes)} available",
            fix="close other programs, use a computer with more memory, or a GPU",
        )
    return kept


def resident_bytes(bundle: Bundle, kept: Iterable[str], compute: Precision = "fp32") -> int:
    """Return the bytes of weights that are in a computer's memory at once, where some graphs stay."""
    return _largest(host_weights(bundle, compute), PHASES, kept)


def host_weights(bundle: Bundle, compute: Precision = "fp32") -> dict[str, int]:
    """Return the bytes that each graph's weights take in a computer's memory, in the type they are computed in.

    Weights in int8 are counted as multiplied out: a library may do that once, when it opens the graph.
    """
    return {
        name: graph.weights_bytes
        * bytes_per_weight(compute)
        // (1 if graph.weights_in_int8 else bytes_per_weight(graph.spec.precision))
        for name, graph in bundle.manifest.graphs.items()
    }


def bytes_per_weight(precision: Precision) -> int:
    """Return the bytes of one weight in a type."""
    return 4 if precision == "fp32" else 2


def needed_beside(graph: str) -> frozenset[str]:
    """Return the graphs of all phases that a graph is part of."""
    return frozenset(other for phase in PHASES if graph in phase for other in phase)


def stream_weights(
    need: MemoryRequirements, phases: Sequence[Sequence[str]], allowed_bytes: int
) -> dict[str, int] | None:
    """Return how many bytes of weights stay on the device, of each graph that has to be streamed.

    Only graphs of phases that do not fit are streamed. They share what is left beside the other
    graphs of the phase by their sizes.

    Args:
        need: of the restoration.
        phases: graphs that are needed together.
        allowed_bytes: for everything.
    Returns:
        None if it does not fit even so.
    """
    streamed: set[str] = set()
    while True:
        room = allowed_bytes - need.buffers - sum(need.arenas(streamed).values())
        # Streaming takes memory of its own, so that it can push out another phase.
        over = [phase for phase in phases if sum(need.weights[graph] for graph in phase) > room]
        more = {graph for phase in over for graph in phase if graph in need.streamable} - streamed
        if not more:
            break
        streamed |= more
    on_device = {graph: need.weights[graph] for graph in sorted(streamed)}
    for phase in over:
        left = room - sum(need.weights[graph] for graph in phase if graph not in streamed)
        shared = sum(need.weights[graph] for graph in phase if graph in streamed)
        if left < 0 or not shared:
            return None
        for graph in phase:
            if graph in streamed:
                on_device[graph] = min(on_device[graph], left * need.weights[graph] // shared)
    return on_device


@dataclass(frozen=True)
class MemoryPlan:
    """What a restoration needs of a device's memory, and what lies there.

    Attributes:
        requirements: of the restoration.
        residency: which graphs stay.
        free_bytes: of the device, before anything of ours was on it.
    """

    requirements: MemoryRequirements
    residency: Residency
    free_bytes: int

    @property
    def activations_bytes(self) -> int | None:
        """Bytes of activations; None where the library does not tell before a graph runs."""
        return sum(self.residency.arenas.values()) if self.requirements.knows_activations else None

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights in the phase that needs most."""
        used = self.requirements.buffers + sum(self.residency.arenas.values())
        return self.residency.peak_bytes - used

    def as_data(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return {
            "text": str(self),
            "peak_bytes": self.residency.peak_bytes,
            "weights_bytes": self.weights_bytes,
            "activations_bytes": self.activations_bytes,
            "buffers_bytes": self.requirements.buffers,
            "free_bytes": self.free_bytes,
            "loaded_by_stage": list(self.residency.loaded_by_stage),
            "streamed": sorted(self.residency.streamed),
        }

    def __str__(self) -> str:
        activations = self.activations_bytes
        told = "not known beforehand" if activations is None else format_memory(activations)
        text = (
            f"needs {format_memory(self.residency.peak_bytes)} of GPU memory "
            f"(weights {format_memory(self.weights_bytes)}, activations {told}, "
            f"buffers {format_memory(self.requirements.buffers)}), {format_memory(self.free_bytes)} free"
        )
        if self.residency.loaded_by_stage:
            text += f"; loaded by stage: {', '.join(self.residency.loaded_by_stage)}"
        if self.residency.streamed:
            text += f"; weights streamed: {', '.join(sorted(self.residency.streamed))}"
        return text


def _largest(weights: Mapping[str, int], phases: Sequence[Sequence[str]], kept: Iterable[str] = ()) -> int:
    return max(sum(weights[graph] for graph in {*kept, *phase}) for phase in phases)


def _residency(
    need: MemoryRequirements, kept: frozenset[str], on_device: Mapping[str, int], streamed: frozenset[str]
) -> Residency:
    arenas = need.arenas(streamed)
    peak = _largest(on_device, PHASES, kept) + sum(arenas.values()) + need.buffers
    return Residency(kept, on_device, streamed, arenas, peak)


def _too_little(
    need: MemoryRequirements, needed: int, by_phase: int, free: int, budget: int | None, where: object
) -> DoesNotFitError:
    smaller = "restore at a smaller size (--min-size, --upscale)"
    if by_phase <= free and budget is None:
        fix = f"use --vram-budget, which loads graphs by stage, or {smaller}"
    elif by_phase <= free:
        fix = f"raise --vram-budget, or {smaller}"
    else:
        fix = f"{smaller}, use a GPU with more memory, or close other programs on it"
        if not need.streamable:
            fix += "; plans that are built with --weight-streaming need less with --vram-budget"
    have = f"{format_memory(free)} free" if budget is None else f"{format_memory(min(budget, free))} allowed"
    parts = "weights, activations and buffers" if need.knows_activations else "weights and buffers"
    return DoesNotFitError(
        f"out of GPU memory: needs {format_memory(needed)}, {have}",
        where=where,
        expected=f"room for {parts}: {format_memory(needed)}"
        + (f", or {format_memory(by_phase)} with --vram-budget" if budget is None else ""),
        found=have,
        fix=fix,
    )
