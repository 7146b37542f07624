"""Synthetic checkpoints in the real layouts, a tenth of the width, for which reference outputs exist.

Every value follows from its tensor's name, shape and a seed, so nothing large is kept in git. The
networks are random: what they restore is no picture.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.numpy import save_file

from engine.bundle.storage import cache_dir
from engine.settings import NEGATIVE_WORDS, QUALITY_WORDS
from export.checkpoint.tokenizer import FILE
from export.demo import words
from export.demo.words import learn_tokenizer

MANIFEST = Path(__file__).parent / "data" / "reference" / "tiny_manifest.json"
#: CLIP's, as in the reference outputs; the end token is the next.
START_ID = 49406
LORA_RANK = 4
LORAS = ("landscape", "face")
_SQRT_12 = np.float32(12.0**0.5)


#: The UNet, as diffusers builds it.
TINY_UNET: dict[str, Any] = {
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 1, 2),
    "cross_attention_dim": 192,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1664,
}


@dataclass(frozen=True)
class TinyFiles:
    """The checkpoints, as a user would name them on the command line."""

    sdxl: Path
    supir: Path
    loras: dict[str, Path]
    tokenizer: Path


def tiny_files() -> TinyFiles:
    """Write the checkpoints into the user's cache folder, unless they are there."""
    folder = _cache_dir()
    files = TinyFiles(
        sdxl=folder / "sdxl.safetensors",
        supir=folder / "supir.safetensors",
        loras={name: folder / f"{name}.safetensors" for name in LORAS},
        tokenizer=folder / "tokenizer",
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # another run, or another worker of this one, may be at it
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                made = Path(temporary) / "tiny"
                made.mkdir()
                _write_all(made)
                made.rename(folder)
    return files


def weight(name: str, shape: tuple[int, ...], seed: int, gain: float) -> NDArray[np.float32]:
    """Return the synthetic tensor called `name`.

    Uniform with unit variance from PCG64's raw stream, seeded by SHA-256 of "seed:name"; matrices
    and kernels times gain / √fan_in, norm weights 1 + 0.1 u, biases 0.1 u. The reference outputs
    were computed with exactly these.

    Returns:
        f32 of `shape`.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    raw = np.random.PCG64(int.from_bytes(digest[:8], "little")).random_raw(int(np.prod(shape)))
    unit = (raw >> np.uint64(40)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)
    values = (unit * _SQRT_12).reshape(shape)
    if len(shape) > 1:
        return values * np.float32(gain / np.sqrt(np.prod(shape[1:])))
    offset = np.float32(1.0 if name.endswith("weight") else 0.0)
    return offset + np.float32(0.1) * values


def write_checkpoints(folder: Path, manifest: Mapping[str, Any], dtype: str = "float32") -> None:
    """Write every file of a manifest ({"files": {file: {tensor: shape}}, "seed": …, "gain": …})."""
    seed, gain = manifest["seed"], manifest["gain"]
    for file, tensors in manifest["files"].items():
        values = {name: weight(name, tuple(shape), seed, gain).astype(dtype) for name, shape in tensors.items()}
        save_file(values, folder / file)


def write_lora(
    path: Path, tensors: Mapping[str, tuple[int, ...]], *, name: str, rank: int = LORA_RANK, alpha: float = 2.0
) -> None:
    """Write a synthetic LoRA in kohya's format, on the attention projections of a UNet.

    Args:
        path: of the file.
        tensors: shapes by LDM names, as in an SDXL file.
        name: seeds the values.
        rank, alpha: of every layer.
    """
    prefix = "model.diffusion_model."
    values: dict[str, NDArray[np.float32]] = {}
    for tensor, shape in tensors.items():
        if not tensor.startswith(prefix) or ".attn" not in tensor or not tensor.endswith(".weight"):
            continue
        module = "lora_unet_" + tensor.removeprefix(prefix).removesuffix(".weight").replace(".", "_")
        out_channels, in_channels = shape[0], shape[1]
        values[f"{module}.lora_down.weight"] = weight(f"{name}.{module}.down", (rank, in_channels), 0, 1.0)
        values[f"{module}.lora_up.weight"] = weight(f"{name}.{module}.up", (out_channels, rank), 0, 0.3)
        values[f"{module}.alpha"] = np.array(alpha, dtype=np.float32)
    save_file(values, path)


def _write_all(folder: Path) -> None:
    manifest = json.loads(MANIFEST.read_text())
    write_checkpoints(folder, manifest)
    for name in LORAS:
        write_lora(folder / f"{name}.safetensors", manifest["files"]["sdxl.safetensors"], name=name)
    (folder / "tokenizer").mkdir()
    learn_tokenizer(start_id=START_ID).save(str(folder / "tokenizer" / FILE))


def _cache_dir() -> Path:
    sources = (
        *(path.read_bytes() for path in (MANIFEST, Path(__file__), Path(words.__file__))),
        (QUALITY_WORDS + NEGATIVE_WORDS).encode(),
    )
    return cache_dir() / "tests" / hashlib.sha256(b"".join(sources)).hexdigest()[:16]
