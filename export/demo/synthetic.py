"""The demo model for now: synthetic weights in the real layouts, for which reference outputs exist.

Every value follows from its tensor's name, shape and a seed, so nothing is downloaded and nothing
large is kept in git. The networks are random: what they restore is no picture. A trained model of
the same layouts takes their place later.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, trainers

from engine.bundle import APP_NAME
from engine.settings import NEGATIVE_WORDS, QUALITY_WORDS
from export.tokenizer import END_TOKEN, FILE, START_TOKEN

MANIFEST = Path(__file__).parent / "manifest.json"
#: CLIP's ids, which the reference outputs use.
START_ID, END_ID = 49406, 49407
LORA_RANK = 4
LORAS = ("landscape", "face")
#: Worked at by default; small, as the model is.
MIN_SIZE_PX = 256

NOTICE = (
    "this is the demo model, whose weights are random numbers: it shows that everything runs, "
    "and its results are noise, not restored photos"
)

_SQRT_12 = np.float32(12.0**0.5)


@dataclass(frozen=True)
class DemoFiles:
    """The demo's checkpoints, as a user would name them on the command line."""

    sdxl: Path
    supir: Path
    loras: dict[str, Path]
    tokenizer: Path


def demo_files(folder: Path | None = None) -> DemoFiles:
    """Write the demo's checkpoints, unless they are there.

    Args:
        folder: where; None means the user's cache folder.
    """
    folder = folder if folder is not None else _cache_dir()
    files = DemoFiles(
        sdxl=folder / "sdxl.safetensors",
        supir=folder / "supir.safetensors",
        loras={name: folder / f"{name}.safetensors" for name in LORAS},
        tokenizer=folder / "tokenizer",
    )
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "demo"
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
    demo_tokenizer().save(str(folder / "tokenizer" / FILE))


def demo_tokenizer() -> Tokenizer:
    """Return a byte-level vocabulary in CLIP's form, with merges learned from our own words.

    Any text has tokens in it; the project's quality words fit into one chunk.
    """
    from transformers import CLIPTokenizer

    # Every printable byte symbol, alone and at the end of a word, then what training merges.
    base = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = base.normalizer, base.pre_tokenizer
    alphabet = sorted(_byte_symbols())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator([QUALITY_WORDS, NEGATIVE_WORDS, MERGE_WORDS], trainer)
    model = json.loads(learner.to_str())["model"]
    ordered = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    ordered += [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in set(ordered)]
    vocabulary = {token: index for index, token in enumerate(ordered)}
    vocabulary |= {START_TOKEN: START_ID, END_TOKEN: END_ID}
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges).backend_tokenizer


#: Common words of captions, so that they are single tokens.
MERGE_WORDS = (
    "a an the of in on at with and by under over near beside photo photograph picture image portrait landscape "
    "face woman man child people person eyes hair skin smile hand city street house window door building wall "
    "road car train bridge river lake sea beach mountain hill forest tree leaf flower grass field sky cloud sun "
    "moon night day morning evening snow rain fog light shadow dog cat bird horse animal food table chair book "
    "old young red green blue yellow black white grey brown small large wooden stone glass metal water close up"
)


def _byte_symbols() -> set[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def _cache_dir() -> Path:
    named = os.environ.get("RESTORE_CACHE")
    root = Path(named) if named else user_cache_path(APP_NAME)
    sources = (MANIFEST.read_bytes(), Path(__file__).read_bytes(), (QUALITY_WORDS + NEGATIVE_WORDS).encode())
    return root / "demo" / hashlib.sha256(b"".join(sources)).hexdigest()[:16]
