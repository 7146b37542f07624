"""Checkpoints of every layout, as tensors under our names that are read only when asked for.

Files are memory-mapped and opened read-only. Which model a file holds is told from its tensors'
names. Pickles are read by `export.checkpoint.torch_zip`, which knows tensors and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError
from export.checkpoint import keymap
from export.checkpoint.keymap import Part, Target
from export.checkpoint.mapped import DOWNLOAD_AGAIN, StoredTensor
from export.checkpoint.safetensors_file import metadata, read_safetensors
from export.checkpoint.torch_zip import is_torch_zip, read_torch_zip

_PICKLE_START = b"\x80"  # the opcode that names the protocol
_FLOATS = ("float64", "float32", "float16", "bfloat16")
#: Numbers that are no weights, so that they may be whole: a LoRA's alpha, tables of positions.
_MAY_BE_WHOLE = (".alpha", "mask_LQ", "logit_scale", "embeddings.position_ids")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, not read yet.

    Attributes:
        name: in the file.
        file: that holds it.
        shape: of what `read` returns.
        read: returns it, in the dtype of the file.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]

    def part(self, part: Part) -> LazyTensor:
        """Return a part of this tensor (see `keymap.Part`), as lazily."""
        if part == "whole":
            return self
        cut, shape = _CUTS[part]
        return LazyTensor(self.name, self.file, shape(self.shape), lambda: cut(self.read()))


_CUTS: dict[Part, tuple[Callable[[NDArray[Any]], NDArray[Any]], Callable[[tuple[int, ...]], tuple[int, ...]]]] = {
    # A kernel of one pixel; any other keeps its shape, which then fits nowhere.
    "matrix": (lambda t: t.reshape(t.shape[:2]), lambda s: s[:2] if set(s[2:]) <= {1} else s),
    "transposed": (lambda t: np.ascontiguousarray(t.T), lambda s: s[::-1]),
    "q": (lambda t: np.split(t, 3)[0], lambda s: _third(s)),
    "k": (lambda t: np.split(t, 3)[1], lambda s: _third(s)),
    "v": (lambda t: np.split(t, 3)[2], lambda s: _third(s)),
}
#: The bits of a number's exponent, by the number's size in bytes; all are set in infinities and NaN.
_EXPONENTS = {
    "float64": (np.uint64, 0x7FF0_0000_0000_0000),
    "float32": (np.uint32, 0x7F80_0000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}
_BLOCK_VALUES = 1 << 20


def is_finite(array: NDArray[Any]) -> bool:
    """Tell whether an array holds neither infinities nor NaN; whole numbers never do."""
    if array.dtype.name not in _EXPONENTS:
        return True
    # Whole numbers are compared: NumPy takes thirty times as long to compare float16 values.
    kind, exponent = _EXPONENTS[array.dtype.name]
    bits = array.reshape(-1).view(kind)
    mask: Any = kind(exponent)
    blocks = (bits[start : start + _BLOCK_VALUES] for start in range(0, len(bits), _BLOCK_VALUES))
    return all(int(np.bitwise_and(block, mask).max()) != exponent for block in blocks)


def _third(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0] // 3, *shape[1:]) if shape else ()


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
        CheckpointError: missing, damaged, or another model.
    """
    if path.is_dir():
        return _open_diffusers_folder(path)
    tensors = open_file(path)
    _require(path, tensors, "SDXL (one file)", "--sdxl")
    return _sort_ldm(Checkpoint("sdxl", "LDM, one file", (path,)), tensors, _SDXL_PREFIXES)


def open_unet(path: Path) -> Checkpoint:
    """Open a UNet that replaces the base's: diffusers' names, or the UNet of an LDM file.

    Raises:
        CheckpointError: missing, damaged, or another model.
    """
    if path.is_dir():
        folder = path / "unet" if (path / "unet").is_dir() else path
        tensors, files = _open_component(folder)
        return _diffusers_unet(Checkpoint("unet", "diffusers, UNet folder", files, folder=path), tensors)
    tensors = open_file(path)
    kind = _require(path, tensors, ("UNet (diffusers)", "SDXL (one file)"), "--unet")
    if kind == "UNet (diffusers)":
        return _diffusers_unet(Checkpoint("unet", "diffusers, UNet alone", (path,)), tensors)
    return _sort_ldm(Checkpoint("unet", "LDM, UNet of one file", (path,)), tensors, _UNET_PREFIX)


def open_supir(path: Path) -> Checkpoint:
    """Open SUPIR's part: ControlNet, connectors and denoise encoder, with or without `model.`.

    Raises:
        CheckpointError: missing, damaged, or another model.
    """
    if path.is_dir():
        raise CheckpointError("is a folder", where=path, expected="SUPIR's .ckpt or .safetensors file")
    tensors = open_file(path)
    _require(path, tensors, "SUPIR", "--supir")
    bare = not any(name.startswith("model.") for name in tensors)
    layout = "LDM, without `model.`" if bare else "LDM"
    return _sort_ldm(Checkpoint("supir", layout, (path,)), tensors, _SUPIR_PREFIXES)


def open_file(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a safetensors file or of a pickle of tensors, by their names in it.

    Raises:
        CheckpointError: missing, truncated, or a pickle of anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError("no such file", where=path, fix="check the path")
    if not os.access(path, os.R_OK):
        raise CheckpointError("no permission to read it", where=path)
    return _lazy(path, read_safetensors(path)) if path.suffix == ".safetensors" else _open_pickle(path)


def identify(names: Iterable[str]) -> str:
    """Return what kind of model a file with tensors of these names holds."""
    names = list(names)

    def has(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    for kind, found in (
        ("LoRA", has("lora", "hada_", "lokr_")),
        ("SUPIR", has("project_modules.", "denoise_encoder.")),
        ("ControlNet", has("control_model.")),
        ("Stable Diffusion 1 or 2", has("cond_stage_model.")),
        ("SDXL refiner", has("conditioner.embedders.0.model.")),
        ("SDXL (one file)", has("conditioner.embedders.1.", "model.diffusion_model.label_emb.")),
        ("Stable Diffusion 1 or 2", has("model.diffusion_model.")),
        ("UNet (diffusers)", has("down_blocks.")),
    ):
        if found:
            return kind
    return "something unknown"


_FIXES = {
    "LoRA": "give it with --lora NAME=FILE, beside a base",
    "SUPIR": "give it with --supir",
    "UNet (diffusers)": "give it with --unet, and the whole base with --sdxl",
    "SDXL (one file)": "give it with --sdxl",
}


def _require(path: Path, tensors: Mapping[str, Any], kinds: str | tuple[str, ...], option: str) -> str:
    kinds = (kinds,) if isinstance(kinds, str) else kinds
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


# -- LDM files ------------------------------------------------------------------------------------

#: Known prefixes and what lies behind them; a tensor behind one must find its place.
Prefixes = tuple[tuple[str, Callable[[str, int], Iterable[Target]]], ...]


def _some(target: Target | None) -> tuple[Target, ...]:
    return () if target is None else (target,)


_UNET_PREFIX: Prefixes = (("model.diffusion_model.", lambda name, _: _some(keymap.unet_target(name))),)
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
#: Parameters that no forward pass uses, and tables that follow from the code.
_STRAY = ("mask_LQ", "logit_scale", "embeddings.position_ids")


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
    files: list[Path] = []
    checkpoint = Checkpoint("sdxl", "diffusers folder", (), folder=path)
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        tensors, opened = _open_component(path / component)
        files += opened
        for name, tensor in tensors.items():
            if name.endswith(_STRAY):
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
    stems = [f"{stem}{variant}" for variant in ("", ".fp16") for stem in ("diffusion_pytorch_model", "model")]
    for stem in stems:
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return open_file(single), (single,)
        index = _index_of(folder, stem)
        if index is not None:
            return _open_shards(index)
    raise CheckpointError(
        "no weights here", where=folder, expected=" or ".join(f"{stem}.safetensors" for stem in stems)
    )


def _index_of(folder: Path, stem: str) -> Path | None:
    base, _, variant = stem.partition(".")
    suffix = f".{variant}" if variant else ""
    index = folder / f"{base}.safetensors.index{suffix}.json"
    return index if index.is_file() else None


def _open_shards(index: Path) -> tuple[dict[str, LazyTensor], tuple[Path, ...]]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("not an index of shards", where=index, fix=DOWNLOAD_AGAIN) from error
    files = tuple(index.parent / name for name in sorted(set(weight_map.values())))
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        tensors.update(open_file(file))
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError("a shard lacks a tensor", where=index.parent / shard, expected=name)
    return tensors, files


# -- files ----------------------------------------------------------------------------------------


def metadata_of(path: Path) -> dict[str, str]:
    """Return what a safetensors file says of itself; nothing for a file of another format.

    Raises:
        CheckpointError: damaged.
    """
    return metadata(path) if path.suffix == ".safetensors" else {}


def _lazy(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, LazyTensor]:
    tensors = {}
    for name, tensor in stored.items():
        _check_type(path, name, tensor.dtype.name, plain=tensor.dtype.name in _FLOATS)
        tensors[name] = LazyTensor(name, path, tensor.shape, tensor.read)
    return tensors


def _open_pickle(path: Path) -> dict[str, LazyTensor]:
    if is_torch_zip(path):  # what torch has written since 1.6
        return _lazy(path, read_torch_zip(path))
    with path.open("rb") as file:
        start = file.read(1)
    if start != _PICKLE_START:
        raise CheckpointError(
            "not a checkpoint", where=path, expected="a .safetensors file or a pickle", fix=DOWNLOAD_AGAIN
        )
    try:
        from export.checkpoint.torch_legacy import read_torch_legacy
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise CheckpointError(
            "written in torch's format from before version 1.6, which only torch reads",
            where=path,
            fix="install torch (pip install -e '.[export]'), or convert the file to .safetensors",
        ) from None
    return _lazy(path, read_torch_legacy(path))


def _check_type(path: Path, name: str, found: object, *, plain: bool) -> None:
    if not plain and not name.endswith(_MAY_BE_WHOLE):
        raise CheckpointError(
            "a tensor is not of a plain floating-point type",
            where=f"{path}: {name}",
            expected=", ".join(_FLOATS),
            found=found,
            fix="give an unquantized checkpoint",
        )
