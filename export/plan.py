"""What a build would do, known from the files' headers alone, before anything large is read."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.backends.trt_library import PLAN_BACKENDS, open_library
from engine.bundle import FORMAT, Source
from engine.errors import BackendError, CheckpointError, RestoreError, UsageError
from engine.graphspec import PRECISION_DTYPES, Precision
from engine.hashing import hash_file
from engine.profiles import Profile
from engine.settings import Settings, validated
from export.architecture import Architecture, Shapes, infer_architecture, missing_tensor
from export.checkpoint import Checkpoint, LazyTensor, open_sdxl, open_supir, open_unet
from export.graphs import GraphBuilder, graph_builders
from export.lora import LoadedLora, open_lora
from export.pieces import pieces_key
from export.plans import DEFAULT_TARGETS, WITHOUT_BF16, PlanOptions, check_targets
from export.presets import PRESETS
from export.request import BuildRequest
from export.shapes import MAX_BATCH, default_shapes, parse_shapes, profiles_for
from export.to_onnx import is_cached, trace_key
from export.tokenizer import END_TOKEN, FILE, find_tokenizer, load_tokenizer
from export.verify import VERIFY_SYMBOLS
from export.weights import Layout, Weight, plan_layout

if TYPE_CHECKING:
    from engine.cuda import DeviceInfo

#: A graph's structure and manifest entry are a few hundred kB; this is room for the largest.
_ROOM_PER_GRAPH_BYTES = 8 << 20
#: And for a graph's kernels, for a target and a profile.
_ROOM_PER_KERNELS_BYTES = 4 << 20


@dataclass(frozen=True)
class BuildPlan:
    """A request that was checked against its files.

    Attributes:
        checkpoints: opened, by role.
        tensors: of the networks, by our names; complete and of the right shapes.
        layout: of the weights file.
        builders: of the graphs.
        compiling: how they are compiled; None where the backend runs them as they are.
    """

    request: BuildRequest
    checkpoints: tuple[Checkpoint, ...]
    loras: tuple[LoadedLora, ...]
    arch: Architecture
    tensors: dict[str, LazyTensor]
    builders: dict[str, GraphBuilder]
    layout: Layout
    defaults: Settings
    compiling: PlanOptions | None

    @property
    def read_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.input_files)

    @property
    def write_bytes(self) -> int:
        plain = self.layout.bytes + _ROOM_PER_GRAPH_BYTES * len(self.builders)
        if self.compiling is None:
            return plain
        # A plan is a graph's weights, if it has them, and kernels for each target and profile.
        kernels = sum(
            _ROOM_PER_KERNELS_BYTES * len(self.compiling.targets or ("",)) * len(profiles)
            for profiles in self.compiling.profiles.values()
        )
        return plain + kernels + (0 if self.compiling.weightless else self.layout.bytes)

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
            "backend": self.request.backend,
            "notice": self.request.notice,
            "defaults": self.defaults.model_dump(mode="json"),
            "sources": {
                f"{checkpoint.role} {checkpoint.file_name(file)}": hashes[file]
                for checkpoint in self.checkpoints
                for file in checkpoint.files
            },
            "loras": {lora.name: {"file": hashes[lora.file], "scale": lora.scale} for lora in self.loras},
            "tokenizer": {path.name: hash_file(path) for path in vocabulary},
            "graphs": {name: trace_key(builder) for name, builder in self.builders.items()},
            "pieces": {name: key for name, builder in self.builders.items() if (key := pieces_key(builder))},
            "onnxruntime": importlib.metadata.version("onnxruntime"),
            "plans": None if self.compiling is None else self._compiling_key(self.compiling),
        }

    def _compiling_key(self, options: PlanOptions) -> dict[str, Any]:
        return {
            "library": options.library.label,
            "targets": ", ".join(options.targets),
            "device": options.device,
            "profiles": {name: "; ".join(map(str, profiles)) for name, profiles in options.profiles.items()},
            "weightless": options.weightless,
            "weight_streaming": options.weight_streaming,
        }

    def describe(self) -> dict[str, Any]:
        """Return what the build would read, merge and write, as plain data."""
        return {
            "output": str(self.request.output),
            "preset": self.request.preset,
            "precision": self.request.precision,
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
                    "ranks": lora.ranks,
                    "alphas": lora.alphas,
                    "layers": len(lora.deltas),
                }
                for lora in self.loras
            ],
            "write": {
                "weights_bytes": self.layout.bytes,
                "parameters": sum(math.prod(weight.shape) for weight in self.layout.weights.values()),
                "graphs": [
                    {
                        "name": name,
                        "precision": builder.spec.precision,
                        "trace": "cached" if is_cached(builder) else "needed",
                        "profiles": [] if self.compiling is None else list(map(str, self.compiling.profiles[name])),
                    }
                    for name, builder in self.builders.items()
                ],
                "targets": [] if self.compiling is None else list(self.compiling.targets),
            },
        }


def make_plan(request: BuildRequest) -> BuildPlan:
    """Check a request against its files; reads headers only.

    Raises:
        UsageError: the options contradict each other.
        CheckpointError: a file is missing, damaged, of another model, or does not cover the networks.
        LoraError: a LoRA is damaged, unsupported, or does not fit.
    """
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
    _check_vocabulary(request.tokenizer, max(tokenizer.get_vocab().values()), arch)
    builders = graph_builders(arch, request.precision, end_id, vae_precision=_vae_precision(request))
    wanted = _wanted_weights(builders)
    _check_tensors(tensors, {weight.name: weight.shape for weight in wanted})
    loras = tuple(open_lora(lora.name, lora.path, lora.scale, shapes) for lora in request.loras)
    defaults = validated({**preset.settings, **request.settings})
    return BuildPlan(
        request=request,
        checkpoints=tuple(checkpoints),
        loras=loras,
        arch=arch,
        tensors=tensors,
        builders=builders,
        layout=plan_layout(wanted),
        defaults=defaults,
        compiling=_plan_options(request, builders, defaults.min_size, arch.vae.pixels_per_cell),
    )


def _vae_precision(request: BuildRequest) -> Precision | None:
    """Return bf16 for the VAE of an fp16 bundle where the GPUs it is for compute in it, else None."""
    for_plans = request.precision == "fp16" and request.backend in PLAN_BACKENDS
    return "bf16" if for_plans and WITHOUT_BF16 not in request.targets else None


def _plan_options(
    request: BuildRequest, builders: Mapping[str, GraphBuilder], min_size: int, pixels_per_cell: int
) -> PlanOptions | None:
    if request.backend not in PLAN_BACKENDS:
        for option, given in (
            ("--compute-capability", request.targets),
            ("--shapes", request.shapes),
            ("--weightless", request.weightless),
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
    if request.weightless and request.weight_streaming:
        # A refit of weights that lie on the host has never been tried: it needs a GPU.
        raise UsageError("--weightless and --weight-streaming exclude each other", fix="use one of them")
    library = open_library(request.backend)
    gpu, missing = _gpu_at_hand()
    device = None
    if library.is_rtx and not request.weightless:
        targets = check_targets(library, request.targets or DEFAULT_TARGETS)
    else:
        if request.targets:
            raise UsageError(
                "TensorRT, and plans without weights, are compiled for the GPU at hand",
                where="--compute-capability",
                fix="leave it out, or use --backend tensorrt-rtx without --weightless",
            )
        if gpu is None:
            assert missing is not None
            raise missing.at("--weightless" if request.weightless else f"--backend {request.backend}")
        targets, device = (gpu.compute_capability,), None if library.is_rtx else gpu.name
    shapes = parse_shapes(request.shapes) if request.shapes else default_shapes(min_size)
    profiles = {
        name: profiles_for(builder.spec, shapes, request.batch, pixels_per_cell) for name, builder in builders.items()
    }
    if request.weightless:
        _check_probe_fits(builders, profiles)
    timings = None if library.is_rtx else request.output.with_name(f".{request.output.name}.timings")
    return PlanOptions(
        library,
        targets,
        device,
        profiles,
        request.weightless,
        request.weight_streaming,
        None if gpu is None else gpu.compute_capability,
        timings,
    )


def _gpu_at_hand() -> tuple[DeviceInfo | None, RestoreError | None]:
    """Return the first GPU, or why there is none."""
    from engine.cuda import device_info

    try:
        return device_info(0), None
    except BackendError as error:
        return None, error


def _check_probe_fits(builders: Mapping[str, GraphBuilder], profiles: Mapping[str, tuple[Profile, ...]]) -> None:
    """Refuse weightless plans that could not be checked once they have weights."""
    for name, builder in builders.items():
        symbols = {symbol: VERIFY_SYMBOLS[symbol] for symbol in builder.spec.symbols}
        if not any(profile.holds(symbols) for profile in profiles[name]):
            raise UsageError(
                "weightless plans are checked at a small size",
                where="--shapes",
                expected="a range from 64, such as 64-1024",
                found="; ".join(map(str, profiles[name])),
            )


def _wanted_weights(builders: Mapping[str, GraphBuilder]) -> list[Weight]:
    """Return every parameter of every graph, once; two encoders share `quant_conv`."""
    wanted = {}
    for builder in builders.values():
        dtype = PRECISION_DTYPES[builder.spec.precision]
        for name, shape in builder.parameters.items():
            wanted[name] = Weight(name, dtype, shape)
    return list(wanted.values())


def _check_tensors(tensors: Mapping[str, LazyTensor], wanted: Shapes) -> None:
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise missing_tensor(missing[0], also=len(missing) - 1)
    for name, tensor in tensors.items():
        where = f"{tensor.file.name}: {tensor.name}"
        if name not in wanted:
            raise CheckpointError(
                "a tensor has no place in the networks",
                where=where,
                found=list(tensor.shape),
                fix="the file holds another model, or a variant that is not supported",
            )
        if tensor.shape != wanted[name]:
            raise CheckpointError(
                "a tensor has the wrong shape", where=where, expected=list(wanted[name]), found=list(tensor.shape)
            )


def _check_vocabulary(folder: Path, last_id: int, arch: Architecture) -> None:
    for net in (arch.text_encoder, arch.text_encoder_2):
        if last_id >= net.vocabulary:
            raise CheckpointError(
                "the tokenizer has tokens that the text towers lack",
                where=folder,
                expected=f"ids below {net.vocabulary}",
                found=f"ids up to {last_id}",
                fix="give the tokenizer that belongs to the base with --tokenizer",
            )
