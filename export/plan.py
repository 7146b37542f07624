"""What a build would do, known from the files' headers alone, before anything large is read."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bundle import FORMAT, Source, hash_file
from engine.errors import CheckpointError, UsageError
from engine.graphspec import PRECISION_DTYPES
from engine.settings import Settings, validated
from export.architecture import Architecture, Shapes, infer_architecture, missing_tensor
from export.checkpoint import Checkpoint, LazyTensor, open_sdxl, open_supir, open_unet
from export.graphs import GraphBuilder, graph_builders
from export.lora import LoadedLora, open_lora
from export.presets import PRESETS
from export.request import BuildRequest
from export.to_onnx import is_cached, trace_key
from export.tokenizer import END_TOKEN, FILE, find_tokenizer, load_tokenizer
from export.weights import Layout, Weight, plan_layout

#: A graph's structure and manifest entry are a few hundred kB; this is room for the largest.
_ROOM_PER_GRAPH_BYTES = 8 << 20


@dataclass(frozen=True)
class BuildPlan:
    """A request that was checked against its files.

    Attributes:
        checkpoints: opened, by role.
        tensors: of the networks, by our names; complete and of the right shapes.
        layout: of the weights file.
        builders: of the graphs.
    """

    request: BuildRequest
    checkpoints: tuple[Checkpoint, ...]
    loras: tuple[LoadedLora, ...]
    arch: Architecture
    tensors: dict[str, LazyTensor]
    builders: dict[str, GraphBuilder]
    layout: Layout
    defaults: Settings

    @property
    def read_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.input_files)

    @property
    def write_bytes(self) -> int:
        return self.layout.bytes + _ROOM_PER_GRAPH_BYTES * len(self.builders)

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
            "onnxruntime": importlib.metadata.version("onnxruntime"),
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
                    }
                    for name, builder in self.builders.items()
                ],
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
    builders = graph_builders(arch, request.precision, end_id)
    wanted = _wanted_weights(builders)
    _check_tensors(tensors, {weight.name: weight.shape for weight in wanted})
    loras = tuple(open_lora(lora.name, lora.path, lora.scale, shapes) for lora in request.loras)
    return BuildPlan(
        request=request,
        checkpoints=tuple(checkpoints),
        loras=loras,
        arch=arch,
        tensors=tensors,
        builders=builders,
        layout=plan_layout(wanted),
        defaults=validated({**preset.settings, **request.settings}),
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
