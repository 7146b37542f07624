"""What a build would do, known from the files' headers alone, before anything large is read."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.backends.trt_library import PLAN_BACKENDS, open_library
from engine.bundle.graphspec import PRECISION_DTYPES, Precision
from engine.bundle.hashing import hash_file
from engine.bundle.manifest import FORMAT, Source
from engine.bundle.profiles import Profile
from engine.bundle.storage import APP_NAME, cache_dir, plain_name
from engine.errors import BackendError, BuildError, RestoreError, UsageError
from engine.settings import Settings, validated
from export.build.int8 import has_int8_form
from export.build.presets import PRESETS, fitting
from export.build.request import BuildRequest
from export.build.trial import trial_symbols
from export.build.weights import Weight, WeightsLayout, plan_layout
from export.checkpoint.architecture import Architecture, infer_architecture
from export.checkpoint.checkpoint import Checkpoint, check_tensors, open_sdxl, open_supir, open_unet
from export.checkpoint.lora import LoadedLora, open_lora
from export.checkpoint.tensor_files import LazyTensor
from export.checkpoint.tokenizer import END_TOKEN, FILE, check_vocabulary, find_tokenizer, load_tokenizer
from export.graphs.code_key import code_key
from export.graphs.definitions import GraphDefinition, graph_definitions
from export.graphs.traces import (
    INSTALL_EXPORT,
    StaleTraceError,
    Trace,
    can_trace,
    difference_from_known,
    made_key,
    shipped_trace,
)
from export.trt.compile import DEFAULT_TARGETS, WITHOUT_BF16, PlanOptions, check_targets
from export.trt.shapes import MAX_BATCH, default_shapes, parse_shapes, profiles_for

if TYPE_CHECKING:
    from engine.device.cuda import DeviceInfo

#: A graph's structure and manifest entry are a few hundred kB; this is room for the largest.
_ROOM_PER_GRAPH_BYTES = 8 << 20
#: And for a graph's kernels, for a target and a profile.
_ROOM_PER_KERNELS_BYTES = 4 << 20
#: All code that decides the weights of a bundle, and its files but for the traces.
_EXPORT = Path(__file__).parents[1]
_SOURCES = (
    *sorted((_EXPORT / "checkpoint").glob("*.py")),
    _EXPORT / "build" / "int8.py",
    _EXPORT / "build" / "weights.py",
    _EXPORT / "graphs" / "pack.py",
    _EXPORT / "graphs" / "vae_segments.py",
)

Origin = Literal["shipped", "cached", "needed"]


@dataclass(frozen=True, eq=False)
class PlannedGraph:
    """A graph of the bundle, and where its trace comes from.

    Attributes:
        definition: of the graph.
        origin: of its trace: it ships with the project, was made on this computer, or has to be made.
        key: of the trace, see `traces.made_key`.
        parameters: names and shapes of its network's parameters, in the network's order.
        trace: None where it has to be made.
    """

    definition: GraphDefinition
    origin: Origin
    key: str
    parameters: Mapping[str, tuple[int, ...]]
    trace: Trace | None


@dataclass(frozen=True)
class BuildPlan:
    """A request that was checked against its files.

    Attributes:
        checkpoints: opened, by role.
        tensors: of the networks, by our names; complete and of the right shapes.
        layout: of the weights file.
        graphs: by name.
        defaults: of a restoration.
        presets: other settings that fit the bundle, by name.
        compiling: how they are compiled; None where the backend runs them as they are.
    """

    request: BuildRequest
    checkpoints: tuple[Checkpoint, ...]
    loras: tuple[LoadedLora, ...]
    arch: Architecture
    tensors: dict[str, LazyTensor]
    graphs: dict[str, PlannedGraph]
    layout: WeightsLayout
    defaults: Settings
    presets: dict[str, Settings]
    compiling: PlanOptions | None

    @property
    def read_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.input_files)

    @property
    def write_bytes(self) -> int:
        plain = self.layout.bytes + _ROOM_PER_GRAPH_BYTES * len(self.graphs)
        if self.compiling is None:
            return plain
        # A plan is a graph's weights, if it has them, and kernels for each target and profile.
        kernels = sum(
            _ROOM_PER_KERNELS_BYTES * len(self.compiling.targets or ("",)) * len(profiles)
            for profiles in self.compiling.profiles.values()
        )
        return plain + kernels + (0 if self.compiling.weight_stripped else self.layout.bytes)

    @property
    def input_files(self) -> tuple[Path, ...]:
        checkpoints = (file for checkpoint in self.checkpoints for file in checkpoint.files)
        return (*checkpoints, *(lora.file for lora in self.loras))

    def hash_sources(self) -> dict[Path, str]:
        """Return the SHA-256 of every input file; reads all of them."""
        with ThreadPoolExecutor() as pool:
            return dict(zip(self.input_files, pool.map(hash_file, self.input_files), strict=True))

    def sources(self, hashes: Mapping[Path, str]) -> tuple[Source, ...]:
        """Return the manifest's record of the checkpoints."""
        return tuple(
            Source(
                role=checkpoint.role,
                name=checkpoint.file_name(file),
                layout=checkpoint.layout,
                bytes=file.stat().st_size,
                sha256=hashes[file],
            )
            for checkpoint in self.checkpoints
            for file in checkpoint.files
        )

    def key(self, hashes: Mapping[Path, str]) -> dict[str, Any]:
        """Return everything that the bundle depends on; equal keys mean equal bundles."""
        tokenizer = find_tokenizer(self.request.tokenizer)
        vocabulary = [path for name in (FILE, "vocab.json", "merges.txt") if (path := tokenizer / name).is_file()]
        return {
            "format": FORMAT,
            "preset": self.request.preset,
            "precision": self.request.precision,
            "weights": self.request.weights,
            "backend": self.request.backend,
            "notice": self.request.notice,
            "defaults": self.defaults.model_dump(mode="json"),
            "presets": {name: settings.model_dump(mode="json") for name, settings in self.presets.items()},
            "sources": {
                f"{checkpoint.role} {checkpoint.file_name(file)}": hashes[file]
                for checkpoint in self.checkpoints
                for file in checkpoint.files
            },
            "loras": {
                lora.name: {
                    "file": hashes[lora.file],
                    "scale": lora.scale,
                    **({"configuration": hash_file(lora.configuration)} if lora.configuration else {}),
                }
                for lora in self.loras
            },
            "tokenizer": {path.name: hash_file(path) for path in vocabulary},
            "graphs": {name: graph.key for name, graph in self.graphs.items()},
            "verify": self.request.verify,
            "version": importlib.metadata.version(APP_NAME),
            "code": code_key(_SOURCES),
            "onnxruntime": importlib.metadata.version("onnxruntime"),
            "plans": None if self.compiling is None else self._compiling_key(self.compiling),
        }

    def _compiling_key(self, options: PlanOptions) -> dict[str, Any]:
        return {
            "library": options.library.label,
            "targets": ", ".join(options.targets),
            "device": options.device,
            "profiles": {name: "; ".join(map(str, profiles)) for name, profiles in options.profiles.items()},
            "weight_stripped": options.weight_stripped,
            "weight_streaming": options.weight_streaming,
        }

    def describe(self) -> dict[str, Any]:
        """Return what the build would read, merge and write, as plain data."""
        return {
            "output": str(self.request.output),
            "preset": self.request.preset,
            "precision": self.request.precision,
            "weights": self.request.weights,
            "backend": self.request.backend,
            "read": [
                {
                    "role": checkpoint.role,
                    "layout": checkpoint.layout,
                    "files": [str(file) for file in checkpoint.files],
                    "bytes": sum(file.stat().st_size for file in checkpoint.files),
                    "tensors": len(checkpoint.tensors),
                    "ignored": len(checkpoint.ignored),
                }
                for checkpoint in self.checkpoints
            ],
            "merge": [
                {
                    "name": lora.name,
                    "file": str(lora.file),
                    "scale": lora.scale,
                    "kinds": lora.kinds,
                    "ranks": lora.ranks,
                    "alphas": lora.alphas,
                    "layers": len(lora.deltas),
                    "left_out": lora.left_out,
                }
                for lora in self.loras
            ],
            "write": {
                "weights_bytes": self.layout.bytes,
                "parameters": sum(math.prod(shape) for shape in _parameters(self.graphs).values()),
                "graphs": [
                    {
                        "name": name,
                        "precision": graph.definition.spec.precision,
                        "trace": graph.origin,
                        "profiles": [] if self.compiling is None else list(map(str, self.compiling.profiles[name])),
                    }
                    for name, graph in self.graphs.items()
                ],
                "targets": [] if self.compiling is None else list(self.compiling.targets),
            },
        }


def make_plan(request: BuildRequest, say: Callable[[str], None] = lambda line: None) -> BuildPlan:
    """Check a request against its files; reads headers only.

    Args:
        request: what the user asked for.
        say: told what a person should know, a line each.
    Raises:
        UsageError: the options contradict each other.
        CheckpointError: a file is missing, damaged, of another model, or does not cover the networks.
        LoraError: a LoRA is damaged, unsupported, or does not fit.
        BuildError: a graph has to be traced, which needs the extra `export`; or a shipped trace is damaged.
    """
    if (request.verify == "torch" or request.retrace) and not can_trace():
        option = "--retrace" if request.retrace else "--verify torch"
        raise BuildError(f"{option} needs PyTorch", fix=INSTALL_EXPORT)
    preset = PRESETS[request.preset]
    preset.check_loras(len(request.loras))
    names = [lora.name for lora in request.loras]
    if len(set(names)) != len(names):
        raise UsageError("two LoRAs have one name", where="--lora", found=", ".join(names))
    sdxl, supir = open_sdxl(request.sdxl), open_supir(request.supir)
    checkpoints = [sdxl, supir]
    tensors = {**sdxl.tensors, **supir.tensors}
    if request.unet is not None:
        unet = open_unet(request.unet)
        checkpoints.append(unet)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("unet.")}
        tensors |= unet.tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    arch = infer_architecture(shapes)
    tokenizer = load_tokenizer(request.tokenizer)
    end_id = tokenizer.token_to_id(END_TOKEN)
    assert end_id is not None  # load_tokenizer has seen to it
    check_vocabulary(request.tokenizer, tokenizer, (arch.text_encoder.vocabulary, arch.text_encoder_2.vocabulary))
    definitions = graph_definitions(arch, request.precision, end_id, vae_precision=_vae_precision(request))
    graphs = {name: _planned(request, arch, end_id, definition, say) for name, definition in definitions.items()}
    check_tensors(tensors, _parameters(graphs))
    loras = tuple(open_lora(lora.name, lora.path, lora.scale, shapes) for lora in request.loras)
    for lora in loras:
        for warning in lora.warnings:
            say(f"LoRA {lora.name}: {warning}")
    defaults = validated({**preset.settings, **request.settings})
    return BuildPlan(
        request=request,
        checkpoints=tuple(checkpoints),
        loras=loras,
        arch=arch,
        tensors=tensors,
        graphs=graphs,
        layout=plan_layout(_wanted_weights(graphs, in_int8=request.weights == "int8")),
        defaults=defaults,
        presets=_presets(request, defaults),
        compiling=_plan_options(request, definitions, defaults.min_size, arch.vae.pixels_per_cell),
    )


def _presets(request: BuildRequest, defaults: Settings) -> dict[str, Settings]:
    """Return the other presets that fit a bundle, each of which asks for something of its own."""
    found: dict[str, Settings] = {}
    for preset in fitting(request.preset, len(request.loras)):
        settings = validated({**preset.settings, **request.settings})
        if settings not in (defaults, *found.values()):
            found[preset.name] = settings
    return found


def _planned(
    request: BuildRequest, arch: Architecture, end_id: int, definition: GraphDefinition, say: Callable[[str], None]
) -> PlannedGraph:
    """Find a graph's trace: the one that ships with the project, or one that is or will be made on this computer."""
    if not request.retrace:
        try:
            trace = shipped_trace(definition)
        except StaleTraceError as error:  # whoever changed the code is told, and need not make all traces again first
            if not can_trace():
                raise
            say(f"{definition.name}: {error.problem}; it is traced anew")
            trace = None
        if trace is not None:
            key = made_key(definition, trace.provenance.traced_with)
            return PlannedGraph(definition, "shipped", key, trace.provenance.parameters, trace)
    if not can_trace():
        raise difference_from_known(arch, end_id, definition)
    # torch takes seconds to import: only where it is needed.
    from export.graphs.builder import GraphBuilder
    from export.graphs.to_onnx import find_cached, local_key

    trace = find_cached(definition)
    parameters = GraphBuilder(definition).parameters if trace is None else trace.provenance.parameters
    return PlannedGraph(definition, "needed" if trace is None else "cached", local_key(definition), parameters, trace)


def _vae_precision(request: BuildRequest) -> Precision | None:
    """Return bf16 for the VAE of an fp16 bundle where the GPUs it is for compute in it, else None."""
    for_plans = request.precision == "fp16" and request.backend in PLAN_BACKENDS
    return "bf16" if for_plans and WITHOUT_BF16 not in request.targets else None


def _plan_options(
    request: BuildRequest, definitions: Mapping[str, GraphDefinition], min_size: int, pixels_per_cell: int
) -> PlanOptions | None:
    if request.backend not in PLAN_BACKENDS:
        for option, given in (
            ("--compute-capability", request.targets),
            ("--shapes", request.shapes),
            ("--strip-weights", request.weight_stripped),
            ("--weight-streaming", request.weight_streaming),
            ("--batch", request.batch != 1),
        ):
            if given:
                raise UsageError(f"{option} is about plans", fix=f"add --backend {' or '.join(PLAN_BACKENDS)}")
        return None
    if request.precision == "bf16":
        raise UsageError(
            "no backend runs networks in bf16", where="--precision", fix="use fp16: the VAE is in bf16 then"
        )
    if not 1 <= request.batch <= MAX_BATCH:
        raise UsageError("impossible batch", where="--batch", expected=f"1 to {MAX_BATCH}", found=request.batch)
    if request.weight_stripped and request.weight_streaming:
        # A refit of weights that lie on the host has never been tried: it needs a GPU.
        raise UsageError("--strip-weights and --weight-streaming exclude each other", fix="use one of them")
    if request.weight_stripped and request.weights is not None:  # nor has one of weights in int8
        raise UsageError("--strip-weights and --weights int8 exclude each other", fix="use one of them")
    library = open_library(request.backend)
    gpu, missing = _gpu_at_hand()
    device = None
    if library.is_rtx and not request.weight_stripped:
        targets = check_targets(library, request.targets or DEFAULT_TARGETS)
    else:
        if request.targets:
            raise UsageError(
                "TensorRT, and plans without weights, are compiled for the GPU at hand",
                where="--compute-capability",
                fix="leave it out, or use --backend tensorrt-rtx without --strip-weights",
            )
        if gpu is None:
            assert missing is not None
            raise missing.at("--strip-weights" if request.weight_stripped else f"--backend {request.backend}")
        targets, device = (gpu.compute_capability,), None if library.is_rtx else gpu.name
    shapes = parse_shapes(request.shapes) if request.shapes else default_shapes(min_size)
    profiles = {
        name: profiles_for(definition.spec, shapes, request.batch, pixels_per_cell)
        for name, definition in definitions.items()
    }
    if request.weight_stripped:
        _check_sample_fits(definitions, profiles)
    timings = None if library.is_rtx else cache_dir() / "timings" / plain_name(library.label)
    return PlanOptions(
        library,
        targets,
        device,
        profiles,
        request.weight_stripped,
        request.weight_streaming,
        None if gpu is None else gpu.compute_capability,
        timings,
    )


def _gpu_at_hand() -> tuple[DeviceInfo | None, RestoreError | None]:
    """Return the first GPU, or why there is none."""
    from engine.device.cuda import device_info

    try:
        return device_info(0), None
    except BackendError as error:
        return None, error


def _check_sample_fits(definitions: Mapping[str, GraphDefinition], profiles: Mapping[str, tuple[Profile, ...]]) -> None:
    """Refuse weight-stripped plans that could not be checked once they have weights."""
    for name, definition in definitions.items():
        symbols = trial_symbols(definition.spec)
        if not any(profile.holds(symbols) for profile in profiles[name]):
            raise UsageError(
                "weight-stripped plans are checked at a small size",
                where="--shapes",
                expected="a range from 64, such as 64-1024",
                found="; ".join(map(str, profiles[name])),
            )


def _parameters(graphs: Mapping[str, PlannedGraph]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of every graph, once; two encoders share `quant_conv`."""
    return {name: shape for graph in graphs.values() for name, shape in graph.parameters.items()}


def _wanted_weights(graphs: Mapping[str, PlannedGraph], *, in_int8: bool) -> list[Weight]:
    """Return the tensors of the weights file."""
    wanted = {}
    for graph in graphs.values():
        spec = graph.definition.spec
        for name, shape in graph.parameters.items():
            weight = Weight(name, PRECISION_DTYPES[spec.precision], shape)
            wanted[name] = weight.in_int8() if in_int8 and has_int8_form(spec, name, shape) else (weight,)
    return [weight for parts in wanted.values() for weight in parts]
