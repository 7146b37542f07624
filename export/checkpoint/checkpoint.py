"""Checkpoints of every layout, as tensors under our names that are read only when asked for.

`tensor_files` reads the files; `model_kinds` tells which model one holds, and refuses those that the
engine cannot sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from export.checkpoint import keymap
from export.checkpoint.architecture import Shapes, missing_tensor
from export.checkpoint.keymap import Target
from export.checkpoint.mapped import DOWNLOAD_AGAIN
from export.checkpoint.model_kinds import (
    identify,
    other_prediction,
    require_noise_scheduler,
    require_text_to_image,
)
from export.checkpoint.small_files import read_object
from export.checkpoint.tensor_files import LazyTensor, metadata_of, open_file


@dataclass
class Checkpoint:
    """A role's tensors under our names.

    Attributes:
        role: "sdxl", "unet" or "supir".
        layout: how its files name tensors.
        files: that were opened.
        tensors: by our names.
        ignored: names that belong to no network, such as EMA copies and schedules.
        folder: that `files` are told apart in; None for a single file.
    """

    role: str
    layout: str
    files: tuple[Path, ...]
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    folder: Path | None = None

    def file_name(self, file: Path) -> str:
        """Return a file's name as records have it: `unet/model.safetensors` in a folder."""
        return file.name if self.folder is None else file.relative_to(self.folder).as_posix()

    def add(self, source: LazyTensor, targets: Iterable[Target]) -> None:
        """Take a tensor of a known prefix in.

        Raises:
            CheckpointError: it has no place in the networks, or its place is taken.
        """
        targets = list(targets)
        if not targets:
            raise CheckpointError(
                "a tensor has no place in the networks",
                where=f"{source.file.name}: {source.name}",
                found=list(source.shape),
                fix="the file holds another model, or a variant that is not supported",
            )
        for target in targets:
            if target.name in self.tensors:
                raise CheckpointError(
                    "two tensors claim one place",
                    where=f"{source.file.name}: {source.name}",
                    found=f"also {self.tensors[target.name].name}",
                )
            self.tensors[target.name] = source.part(target.part)


def open_sdxl(path: Path) -> Checkpoint:
    """Open a base model: one LDM file, or a diffusers folder.

    Raises:
        CheckpointError: missing, damaged, another model, or one that does not predict noise.
    """
    if path.is_dir():
        return _open_diffusers_folder(path)
    tensors = open_file(path)
    _require(path, tensors, ("SDXL (one file)",), "--sdxl")
    _require_base(path, tensors, _UNET)
    return _sort_ldm(Checkpoint("sdxl", "LDM, one file", (path,)), tensors, _SDXL_PREFIXES)


def open_unet(path: Path) -> Checkpoint:
    """Open a UNet that replaces the base's: diffusers' or LDM's names, alone, in a folder, or in a whole file.

    Raises:
        CheckpointError: missing, damaged, another model, or one that does not predict noise.
    """
    if path.is_dir():
        require_noise_scheduler(path)
        folder = path / "unet" if (path / "unet").is_dir() else path
        tensors, files = _open_component(folder)
        _require_base(files[0], tensors, "")
        return _diffusers_unet(Checkpoint("unet", "diffusers, UNet folder", files, folder=path), tensors)
    tensors = open_file(path)
    kind = _require(path, tensors, ("UNet (diffusers)", "UNet (LDM)", "SDXL (one file)"), "--unet")
    if kind == "UNet (diffusers)":
        _require_base(path, tensors, "")
        return _diffusers_unet(Checkpoint("unet", "diffusers, UNet alone", (path,)), tensors)
    layout = "LDM, UNet of one file"
    if kind == "UNet (LDM)":  # with or without `diffusion_model.`: as in a whole file from here on
        layout = "LDM, UNet alone"
        tensors = {_UNET + name.removeprefix("diffusion_model."): tensor for name, tensor in tensors.items()}
    _require_base(path, tensors, _UNET)
    return _sort_ldm(Checkpoint("unet", layout, (path,)), tensors, _UNET_PREFIX)


def open_supir(path: Path) -> Checkpoint:
    """Open SUPIR's part: ControlNet, connectors and denoise encoder, with or without `model.`.

    Raises:
        CheckpointError: missing, damaged, or another model.
    """
    if path.is_dir():
        raise CheckpointError("is a folder", where=path, expected="SUPIR's .ckpt or .safetensors file")
    tensors = open_file(path)
    _require(path, tensors, ("SUPIR",), "--supir")
    bare = not any(name.startswith("model.") for name in tensors)
    layout = "LDM, without `model.`" if bare else "LDM"
    return _sort_ldm(Checkpoint("supir", layout, (path,)), tensors, _SUPIR_PREFIXES)


def check_tensors(tensors: Mapping[str, LazyTensor], wanted: Shapes) -> None:
    """Check that tensors are those of some networks: all of them, no others, of the right shapes.

    Args:
        tensors: by our names.
        wanted: shapes of the networks' parameters.
    Raises:
        CheckpointError: a tensor is missing, unknown or misshapen.
    """
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


_FIXES = {
    "LoRA": "give it with --lora NAME=FILE, beside a base",
    "SUPIR": "give it with --supir",
    "UNet (diffusers)": "give it with --unet, and the whole base with --sdxl",
    "UNet (LDM)": "give it with --unet, and the whole base with --sdxl",
    "SDXL (one file)": "give it with --sdxl",
}


def _require(path: Path, tensors: Mapping[str, Any], kinds: tuple[str, ...], option: str) -> str:
    kind = identify(tensors)
    if kind not in kinds:
        raise CheckpointError(
            f"another model than {option} needs",
            where=path,
            expected=" or ".join(kinds),
            found=kind,
            fix=_FIXES.get(kind, f"give a checkpoint of the SDXL family with {option}"),
        )
    return kind


def _require_base(path: Path, tensors: Mapping[str, LazyTensor], prefix: str) -> None:
    """Refuse a base, or the UNet of one, that the engine cannot sample; `prefix` is that of the UNet's names."""
    other = other_prediction(tensors, metadata_of(path))
    if other is not None:
        raise other.error(path)
    unet = {name[len(prefix) :]: tensor.shape for name, tensor in tensors.items() if name.startswith(prefix)}
    require_text_to_image(path, unet)


# -- LDM files ------------------------------------------------------------------------------------

#: Known prefixes and what lies behind them; a tensor behind one must find its place.
Prefixes = tuple[tuple[str, Callable[[str, int], Iterable[Target]]], ...]


def _some(target: Target | None) -> tuple[Target, ...]:
    return () if target is None else (target,)


_UNET = "model.diffusion_model."
_UNET_PREFIX: Prefixes = ((_UNET, lambda name, _: _some(keymap.unet_target(name))),)
_SDXL_PREFIXES: Prefixes = (
    *_UNET_PREFIX,
    ("first_stage_model.", lambda name, levels: _some(keymap.vae_target(name, levels))),
    ("conditioner.embedders.0.transformer.", lambda name, _: (keymap.clip_target(name, "text_encoder"),)),
    ("conditioner.embedders.1.model.", lambda name, _: keymap.open_clip_targets(name, "text_encoder_2")),
)
_SUPIR_PREFIXES: Prefixes = (
    ("model.control_model.", lambda name, _: _some(keymap.unet_target(name, "controlnet"))),
    ("model.diffusion_model.project_modules.", lambda name, _: _some(keymap.connector_target(name))),
    (
        "first_stage_model.denoise_encoder.",
        lambda name, levels: _some(keymap.vae_target(f"encoder.{name}", levels, "denoise_encoder")),
    ),
    # Anything else of the networks does not belong into this file.
    ("model.", lambda name, _: ()),
    ("first_stage_model.", lambda name, _: ()),
)
#: Parameters that no forward pass uses, and tables that follow from the code. SDXL pools bigG alone.
_STRAY = (
    "mask_LQ",
    "logit_scale",
    "embeddings.position_ids",
    "conditioner.embedders.0.transformer.text_projection.weight",
    "conditioner.embedders.1.model.attn_mask",
)


def _sort_ldm(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], prefixes: Prefixes) -> Checkpoint:
    vae_names = (name.partition("first_stage_model.")[2].removeprefix("denoise_") for name in tensors)
    levels = keymap.vae_levels(name for name in vae_names if name)
    for name, tensor in tensors.items():
        full = name if not name.startswith(("control_model.", "diffusion_model.")) else f"model.{name}"
        if full.endswith(_STRAY):
            continue
        for prefix, targets in prefixes:
            if full.startswith(prefix):
                checkpoint.add(tensor, targets(full.removeprefix(prefix), levels))
                break
        else:
            checkpoint.ignored.append(name)
    return checkpoint


# -- diffusers folders ----------------------------------------------------------------------------


def _open_diffusers_folder(path: Path) -> Checkpoint:
    require_noise_scheduler(path)
    files: list[Path] = []
    checkpoint = Checkpoint("sdxl", "diffusers folder", (), folder=path)
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        tensors, opened = _open_component(path / component)
        files += opened
        if component == "unet":
            _require_base(opened[0], tensors, "")
        for name, tensor in tensors.items():
            if name.endswith(_STRAY) or (component, name) == ("text_encoder", "text_projection.weight"):
                continue
            if component == "unet":
                targets = [Target(f"unet.{name}")]
            elif component == "vae":
                targets = [keymap.diffusers_vae_target(name)]
            else:
                targets = [keymap.clip_target(name, component)]
            checkpoint.add(tensor, targets)
    checkpoint.files = tuple(files)
    return checkpoint


def _diffusers_unet(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor]) -> Checkpoint:
    for name, tensor in tensors.items():
        checkpoint.add(tensor, [Target(f"unet.{name}")])
    return checkpoint


def _open_component(folder: Path) -> tuple[dict[str, LazyTensor], tuple[Path, ...]]:
    """Open the one or the sharded weights file of a diffusers component."""
    if not folder.is_dir():
        raise CheckpointError(
            "no such folder",
            where=folder,
            expected="a diffusers folder with unet, vae, text_encoder and text_encoder_2",
        )
    names = [
        f"{stem}{variant}.{suffix}"
        for suffix, whole in (("safetensors", "model"), ("bin", "pytorch_model"))
        for variant in ("", ".fp16")
        for stem in ("diffusion_pytorch_model", whole)
    ]
    for name in names:
        if (folder / name).is_file():
            return open_file(folder / name), (folder / name,)
        index = _index_of(folder, name)
        if index.is_file():
            return _open_shards(index)
    raise CheckpointError("no weights here", where=folder, expected=" or ".join(names))


def _index_of(folder: Path, name: str) -> Path:
    """Return where diffusers puts the index of a sharded file: model.safetensors.index.fp16.json, say."""
    stem, *variant, suffix = name.split(".")
    return folder / ".".join([stem, suffix, "index", *variant, "json"])


def _open_shards(index: Path) -> tuple[dict[str, LazyTensor], tuple[Path, ...]]:
    weight_map = read_object(index, "not an index of shards", "weight_map").get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_shard, weight_map.values())):
        raise CheckpointError(
            "not an index of shards", where=index, expected="weight_map: files beside it", fix=DOWNLOAD_AGAIN
        )
    files = tuple(index.parent / name for name in sorted(set(weight_map.values())))
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        tensors.update(open_file(file))
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError("a shard lacks a tensor", where=index.parent / shard, expected=name)
    return tensors, files


def _is_shard(name: object) -> bool:
    """Tell whether an index names a file of its own folder."""
    return isinstance(name, str) and name.isprintable() and Path(name).name == name and len(name.encode()) < 256
