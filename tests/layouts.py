"""The demo's checkpoints rewritten in every layout that people have, and shapes of files that are not here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from export.checkpoint.checkpoint import _SDXL_PREFIXES, _SUPIR_PREFIXES, Checkpoint, LazyTensor, _sort_ldm, open_sdxl
from export.checkpoint.safetensors_file import read_safetensors

#: Bytes of SDXL's and SUPIR's graphs: in fp16, the VAE's in fp32.
SDXL_WEIGHTS = {
    "text_encoder": 246 * 10**6,
    "text_encoder_2": 1390 * 10**6,
    "denoise_encoder": 137 * 10**6,
    "vae_encoder": 137 * 10**6,
    "vae_decoder": 198 * 10**6,
    "controlnet": 2480 * 10**6,
    "unet": 5244 * 10**6,
}


def our_shapes(manifest: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by our names, as `checkpoint` sorts the files of a manifest."""
    files = json.loads(manifest.read_text())["files"]
    shapes = {}
    for file, prefixes in (("sdxl.safetensors", _SDXL_PREFIXES), ("supir.safetensors", _SUPIR_PREFIXES)):
        lazy = {name: LazyTensor(name, Path(file), tuple(shape), lambda: None) for name, shape in files[file].items()}
        checkpoint = _sort_ldm(Checkpoint("test", "LDM", ()), lazy, prefixes)
        assert checkpoint.ignored == []
        shapes |= {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    return shapes


def our_tensors(sdxl: Path) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(tensor.read()) for name, tensor in open_sdxl(sdxl).tensors.items()}


def load(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, in the file's dtypes, as arrays that may be changed."""
    return {name: tensor.read().copy() for name, tensor in read_safetensors(file).items()}


def write_diffusers_folder(sdxl: Path, folder: Path, *, shards: int = 1, variant: str = "", prefix: str = "") -> Path:
    """Write unet, vae and text encoders as diffusers does."""
    tensors = our_tensors(sdxl)
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        part = {}
        for name, tensor in tensors.items():
            if name.split(".")[0] != component:
                continue
            inside = name.removeprefix(f"{component}.")
            if component.startswith("text_encoder") and not inside.startswith("text_projection"):
                inside = prefix + inside
            part[inside] = tensor
        stem = "diffusion_pytorch_model" if component in ("unet", "vae") else "model"
        write_component(part, folder / component, stem, shards, variant)
    return folder


def write_component(tensors, folder: Path, stem: str, shards: int, variant: str) -> None:
    folder.mkdir(parents=True)
    suffix = f".{variant}" if variant else ""
    if shards == 1:
        save_file(tensors, folder / f"{stem}{suffix}.safetensors")
        return
    names = sorted(tensors)
    weight_map = {}
    for index in range(shards):
        file = f"{stem}{suffix}-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[index::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index_file = folder / f"{stem}.safetensors.index{suffix}.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_diffusers_unet(sdxl: Path, file: Path) -> Path:
    """Write a UNet alone in diffusers' names, as SDXL-Lightning's UNet files are."""
    tensors = our_tensors(sdxl)
    save_file({name.removeprefix("unet."): t for name, t in tensors.items() if name.startswith("unet.")}, file)
    return file


def edit(source: Path, target: Path, *, drop=(), add=None, rename=lambda name: name, dtype=None) -> Path:
    """Copy a safetensors file, as one or as torch's pickle, with some tensors dropped, added, renamed or cast."""
    tensors = {rename(name): tensor for name, tensor in load(source).items() if name not in drop}
    tensors |= add or {}
    if dtype is not None:
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    if target.suffix == ".safetensors":
        save_file(tensors, target)
    else:
        import torch

        torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, target)
    return target
