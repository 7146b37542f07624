"""Traced graphs: those that ship with the package, and those that were traced on this computer.

A trace is a graph's structure without its weights. It depends on the graph's definition and on our code alone, so for
the architectures that people have it ships with the package, and building needs no torch. A trace is one
xz-compressed ONNX file that says in its metadata where it comes from and how well it agreed with torch.

    export/graphs/shipped/sdxl/architecture.json      sizes of the networks, as read off SDXL's and SUPIR's files
    export/graphs/shipped/sdxl/unet.fp16.onnx.xz      and so on, for each graph and precision

$RESTORE_TRACES names more such folders. `python -m export.graphs.make_traces` makes all of them again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import lzma
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ConfigDict, ValidationError

from engine.bundle import graphspec, sdxl
from engine.bundle.graphspec import Precision
from engine.bundle.storage import atomic_write, cache_dir
from engine.bundle.verification import Agreement
from engine.errors import BuildError, from_os_error
from export.checkpoint import architecture
from export.checkpoint.architecture import Architecture
from export.graphs.code_key import code_key
from export.graphs.definitions import GraphDefinition, graph_definitions

SHIPPED = Path(__file__).parent / "shipped"
ARCHITECTURE = "architecture.json"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
_SUFFIX = ".onnx.xz"
_METADATA = "restoration-engine.trace"
#: SDXL's UNet takes 3 MB; a file that unpacks to more than this is no trace.
_MAX_BYTES = 256 << 20
#: All code that decides a graph's structure.
_HERE = Path(__file__).parent
_SOURCES = (
    *(Path(str(module.__file__)) for module in (graphspec, sdxl, architecture)),
    *(_HERE / name for name in ("definitions.py", "builder.py", "to_onnx.py")),
    *sorted((_HERE / "nets").glob("*.py")),
)
#: What tracing needs beside the extra `build`.
_TRACING_PACKAGES = ("torch", "diffusers", "onnxscript")
MAKE_AGAIN = "make the shipped traces again: make traces"
INSTALL_EXPORT = "install what tracing needs: pip install -e '.[export]'"


class Provenance(BaseModel):
    """Where a trace comes from.

    Attributes:
        key: of the definition and of the code that made it, see `trace_key`.
        graph, precision: of its definition.
        traced: the day, as ISO 8601 has it.
        traced_with: versions of the libraries that made it.
        parameters: names and shapes of the network's parameters, in its order; the graph need not use all.
        agreement: with its torch module, on random weights; None where it is only measured in each build.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    graph: str
    precision: Precision
    traced: str
    traced_with: dict[str, str]
    parameters: dict[str, tuple[int, ...]]
    agreement: Agreement | None = None


@dataclass(frozen=True, eq=False)
class Trace:
    """A graph's structure.

    Attributes:
        structure: inputs and outputs as in the graph's spec, then one input per parameter that it uses.
        provenance: where it comes from.
    """

    structure: onnx.ModelProto
    provenance: Provenance


class KnownArchitecture(BaseModel):
    """What traces of a folder are of.

    Attributes:
        what: which checkpoints have this architecture.
        arch: sizes of the networks.
        end_id: the vocabulary's end token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    arch: Architecture
    end_id: int

    def definition(self, graph: str, precision: Precision) -> GraphDefinition:
        """Return the definition of one of its graphs."""
        return graph_definitions(self.arch, precision, self.end_id, vae_precision=precision)[graph]

    def definitions(self, precisions: Sequence[Precision] = PRECISIONS) -> Iterator[GraphDefinition]:
        """Yield the graphs that bundles of this architecture may have, in some precisions."""
        for precision in precisions:
            for definition in graph_definitions(self.arch, precision, self.end_id, vae_precision=precision).values():
                if precision != "fp16" or definition.spec.role != "vae":  # SDXL's overflows in fp16: no bundle has it
                    yield definition


class StaleTraceError(BuildError):
    """A trace was made by another version of the code."""


def trace_key(definition: GraphDefinition) -> str:
    """Return a hash of a graph's definition and of all code that decides its structure."""
    return hashlib.sha256(f"{definition.digest()} {code_key(_SOURCES)}".encode()).hexdigest()[:32]


def made_key(definition: GraphDefinition, versions: Mapping[str, str]) -> str:
    """Return the key of a trace that some versions of the libraries make: others may trace otherwise."""
    return hashlib.sha256(f"{trace_key(definition)} {sorted(versions.items())}".encode()).hexdigest()[:32]


def can_trace() -> bool:
    """Tell whether the libraries are installed that tracing needs."""
    return all(importlib.util.find_spec(package) is not None for package in _TRACING_PACKAGES)


# -- traces that ship ------------------------------------------------------------------------------


def shipped_trace(definition: GraphDefinition) -> Trace | None:
    """Return the trace of a graph that ships with the package, None where there is none.

    Raises:
        StaleTraceError: it was made by another version of the code.
        BuildError: it is damaged, or of another graph than its name says.
    """
    for folder, known in _known_architectures():
        if known.definition(definition.name, definition.spec.precision) == definition:
            file = trace_file(folder, definition)
            if file.is_file():
                return _checked(file, definition)
    return None


def trace_file(folder: Path, definition: GraphDefinition) -> Path:
    """Return a trace's place in an architecture's folder."""
    return folder / f"{definition.name}.{definition.spec.precision}{_SUFFIX}"


def difference_from_known(arch: Architecture, end_id: int, definition: GraphDefinition) -> BuildError:
    """Return the error for a graph that no shipped trace fits where tracing is not possible.

    Args:
        arch, end_id: of the checkpoints.
        definition: of the graph.
    """
    found = {**_sizes(arch), "end token": end_id}
    nearest = min(
        (
            (known.what, {name: size for name, size in _known_sizes(known).items() if found.get(name) != size})
            for _, known in _known_architectures()
        ),
        key=lambda row: len(row[1]),
        default=None,
    )
    where = f"{definition.name}, {definition.spec.precision}"
    if nearest is None or not nearest[1]:
        missing = None if nearest is None else f"{nearest[0]} is known, but its trace for this precision is missing"
        return BuildError("no trace of the graph ships", where=where, found=missing, fix=INSTALL_EXPORT)
    what, sizes = nearest
    return BuildError(
        "no trace ships for this architecture",
        where=where,
        expected=f"{_listed(sizes)}, as in {what}",
        found=_listed({name: found.get(name) for name in sizes}),
        fix=INSTALL_EXPORT,
    )


def _known_architectures() -> Iterator[tuple[Path, KnownArchitecture]]:
    more = [Path(name) for name in os.environ.get("RESTORE_TRACES", "").split(os.pathsep) if name]
    for place in (SHIPPED, *more):
        for file in sorted(place.glob(f"*/{ARCHITECTURE}")):
            yield file.parent, read_architecture(file)


@lru_cache
def read_architecture(file: Path) -> KnownArchitecture:
    """Return what an architecture's file says.

    Raises:
        BuildError: it is damaged.
    """
    try:
        return KnownArchitecture.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise BuildError(
            "the description of an architecture is damaged", where=file, found=str(error)[:200], fix=MAKE_AGAIN
        ) from error


def _known_sizes(known: KnownArchitecture) -> dict[str, object]:
    return {**_sizes(known.arch), "end token": known.end_id}


def _sizes(arch: Architecture) -> dict[str, object]:
    return {
        f"{net}.{name}": tuple(size) if isinstance(size, list) else size
        for net, sizes in dataclasses.asdict(arch).items()
        for name, size in sizes.items()
    }


def _listed(sizes: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


# -- traces that were made here ----------------------------------------------------------------------


def trace_cache_dir() -> Path:
    """Return where traces that were made here are kept: in $RESTORE_CACHE or the user's cache folder."""
    return cache_dir() / "traces"


def cached_trace(file: Path) -> Trace | None:
    """Return a trace from the cache, None where it is not there or damaged: it is then made again."""
    with suppress(BuildError, OSError):
        return read_trace(file)
    return None


# -- files ------------------------------------------------------------------------------------------


def read_trace(file: Path) -> Trace:
    """Return what a trace's file holds.

    Raises:
        BuildError: it is damaged. OSError: it cannot be read.
    """
    model = onnx.ModelProto()
    try:
        unpacker = lzma.LZMADecompressor(memlimit=_MAX_BYTES)
        data = unpacker.decompress(file.read_bytes(), max_length=_MAX_BYTES)
        if not unpacker.eof:
            raise ValueError("cut off, or too large")
        model.ParseFromString(data)
        (entry,) = (each.value for each in model.metadata_props if each.key == _METADATA)
        provenance = Provenance.model_validate_json(entry)
    except (lzma.LZMAError, EOFError, DecodeError, ValueError) as error:  # pydantic's errors are ValueErrors
        raise BuildError(
            "the trace is damaged", where=file, found=str(error).split("\n")[0][:200], fix=_mend(file)
        ) from error
    del model.metadata_props[:]
    return Trace(model, provenance)


def write_trace(trace: Trace, file: Path) -> None:
    """Write a trace; the folder is made if it is missing.

    Raises:
        OutputError: the place cannot be written to, or the disk is full.
    """
    model = onnx.ModelProto()
    model.CopyFrom(trace.structure)
    model.metadata_props.add(key=_METADATA, value=trace.provenance.model_dump_json())
    data = lzma.compress(model.SerializeToString(deterministic=True), preset=9 | lzma.PRESET_EXTREME)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, file, "keep the trace") from error
    with atomic_write(file, "keep the trace") as whole:
        whole.write(data)


def _checked(file: Path, definition: GraphDefinition) -> Trace:
    try:
        trace = read_trace(file)
    except OSError as error:
        raise BuildError(f"the trace cannot be read: {error.strerror}", where=file, fix=_mend(file)) from error
    found = trace.provenance
    wanted = (definition.name, definition.spec.precision)
    if (found.graph, found.precision) != wanted:
        raise BuildError(
            "the trace is of another graph or precision",
            where=file,
            expected=", ".join(wanted),
            found=f"{found.graph}, {found.precision}",
            fix=_mend(file),
        )
    if found.key != trace_key(definition):
        raise StaleTraceError(
            "the trace was made by another version of the code",
            where=file,
            expected=f"key {trace_key(definition)[:12]}…",
            found=f"key {found.key[:12]}…",
            fix=_mend(file),
        )
    return trace


def _mend(file: Path) -> str:
    if file.is_relative_to(SHIPPED):
        return f"install the project again, or {MAKE_AGAIN}"
    return f"{MAKE_AGAIN}, or remove it"
