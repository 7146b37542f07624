"""A trained LoRA as a file that other programs read.

kohya's names, as its scripts write them for SDXL: layers by LDM's blocks, `lora_down`, `lora_up` and `alpha`. This
project, ComfyUI and diffusers read them. Or PEFT's, as diffusers writes them, with α multiplied into `lora_B`: readers
that look for α nowhere, or elsewhere, then take the same.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from engine.bundle.storage import atomic_write
from export.checkpoint.keymap import unet_ldm_names
from export.training.request import LoraFormat

#: In the file's metadata, how it was trained.
PROVENANCE_KEY = "restoration_engine.training"


def write_lora(
    path: Path,
    factors: Mapping[str, NDArray[Any]],
    *,
    alpha: float,
    form: LoraFormat = "kohya",
    provenance: Mapping[str, Any],
) -> None:
    """Write a LoRA on a UNet, whole or not at all; the same LoRA gives the same bytes.

    Args:
        path: of the file, which is replaced.
        factors: `LAYER.lora_A` f32[r, in, …] and `LAYER.lora_B` f32[out, r, …], layers by our names.
        alpha: the product is multiplied by alpha / r.
        form: how tensors are named.
        provenance: how it was trained, for the metadata.
    Raises:
        OutputError: the file cannot be written.
    """
    layers = [name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")]
    rank = len(factors[f"{layers[0]}.lora_A"])
    tensors: dict[str, NDArray[Any]] = {}
    for layer in layers:
        down, up = (np.ascontiguousarray(factors[f"{layer}.{part}"]) for part in ("lora_A", "lora_B"))
        if form == "kohya":
            name = kohya_name(layer)
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
            tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
        else:
            tensors[f"unet.{layer}.lora_A.weight"] = down
            tensors[f"unet.{layer}.lora_B.weight"] = up * np.float32(alpha / rank)
    metadata = {"format": "pt", PROVENANCE_KEY: json.dumps(provenance, sort_keys=True)}
    if form == "kohya":
        metadata |= {
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_network_alpha": f"{alpha:g}",
            "ss_network_dim": str(rank),
            "ss_network_module": "networks.lora",
        }
    with atomic_write(path, "write the LoRA") as file:
        file.write(_sorted(save(tensors, metadata)))


def kohya_name(layer: str) -> str:
    """Return what kohya's scripts call a layer of SDXL's UNet: `lora_unet_input_blocks_4_1_…`.

    Args:
        layer: ours, without `unet.`; the upsampler's second name is the one that SDXL has.
    """
    return "lora_unet_" + unet_ldm_names(layer)[-1].replace(".", "_")


def _sorted(content: bytes) -> bytes:
    """Return a safetensors file with its metadata in order: the library writes them in another one at each run."""
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]
