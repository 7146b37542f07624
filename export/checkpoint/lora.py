"""LoRAs: every common format and kind, matched to the base and merged.

    W' = W + Σᵢ scaleᵢ · ΔWᵢ(W)

`lora_names` knows the layouts, `lora_kinds` the formulas, `lora_config` the configurations. Each
change is computed from the base's own weight, so the order of several LoRAs does not matter, and
scale 0 is the base. A tensor of a LoRA either finds its place or is an error.
Sources: LoRA (arXiv 2106.09685); SPEC, "LoRA".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError, LoraError
from export.checkpoint.architecture import Shapes
from export.checkpoint.lora_config import configuration_of
from export.checkpoint.lora_kinds import Delta, bias_delta, weight_delta
from export.checkpoint.lora_names import LayerNames, is_embedding, refused_kind, role_of
from export.checkpoint.model_kinds import identify, other_prediction
from export.checkpoint.tensor_files import LazyTensor, metadata_of, open_file

#: How PEFT and diffusers call the file in the folders that they write.
_FOLDER_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
_SUFFIXES = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")


@dataclass
class LoadedLora:
    """A LoRA whose every tensor found its place.

    Attributes:
        name: given by the user.
        file: it was read from.
        scale: given by the user; 0 leaves the base bit-identical.
        deltas: by the name of the weight that they change.
        left_out: names of tensors that no network uses: embeddings of words.
        configuration: the file beside it that gave α and rank, if one did.
        warnings: what a person should know, a line each.
    """

    name: str
    file: Path
    scale: float
    deltas: dict[str, Delta] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    configuration: Path | None = None
    warnings: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({delta.kind for delta in self.deltas.values()}))

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({delta.rank for delta in self.deltas.values() if delta.rank is not None}))

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(sorted({delta.alpha for delta in self.deltas.values() if delta.alpha is not None}))


@dataclass
class _Layer:
    """A LoRA's tensors for one layer of the base, by role, and what the LoRA calls the layer."""

    name: str
    parts: dict[str, LazyTensor]


def open_lora(name: str, path: Path, scale: float, base: Shapes) -> LoadedLora:
    """Open a LoRA and match all of it to the base.

    Args:
        name: for the report.
        path: a file, or a folder that PEFT or diffusers wrote.
        scale: how much of it is merged; negative values take it away.
        base: shapes of the base's tensors, by our names.
    Raises:
        LoraError: damaged, of an unsupported kind, for another model, or with a tensor that
            matches nothing.
    """
    if not math.isfinite(scale):
        raise LoraError(
            "the scale is not a number",
            where=f"LoRA {name}",
            expected="a number, such as 0.8",
            found=scale,
            fix="give one",
        )
    file = _file_of(name, path)
    where = f"LoRA {name}: {file}"
    try:
        tensors = open_file(file)
    except CheckpointError as error:
        raise LoraError(
            error.problem,
            where=f"LoRA {name}: {error.where}",
            expected=error.expected,
            found=error.found,
            fix=error.fix,
        ) from error
    embeddings = tuple(tensor for tensor in tensors if is_embedding(tensor))
    layers = _layers(where, tensors, embeddings, base)
    metadata = metadata_of(file)
    configuration = configuration_of(where, file, tensors, metadata)
    lora = LoadedLora(name, file, scale, left_out=embeddings, configuration=configuration.file)
    lora.warnings = tuple(_warnings(lora, metadata))
    for target, layer in layers.items():
        place, scaling = f"{where}: {layer.name}", configuration.scaling(layer.name)
        changes = {
            f"{target}.weight": weight_delta(place, layer.parts, base[f"{target}.weight"], scaling),
            f"{target}.bias": bias_delta(place, layer.parts, base.get(f"{target}.bias"), scaling),
        }
        lora.deltas.update({weight: delta for weight, delta in changes.items() if delta is not None})
    return lora


def merge_into(weight: NDArray[Any], target: str, loras: Iterable[LoadedLora]) -> NDArray[Any]:
    """Return a weight with all LoRAs merged.

    Args:
        weight: of any floating dtype; it is not changed.
        target: its name.
        loras: those of scale 0 do nothing at all.
    Returns:
        f64 of the same shape if any LoRA changes it, to be rounded once, else `weight` itself.
    Raises:
        LoraError: a LoRA holds a value that is not finite.
    """
    active = [lora for lora in loras if lora.scale != 0.0 and target in lora.deltas]
    if not active:
        return weight
    merged = weight.astype(np.float64, order="C")
    for lora in active:
        lora.deltas[target].add_to(merged, weight, lora.scale)
    return merged


def _file_of(name: str, path: Path) -> Path:
    """Return the file to read: the one that a folder holds, if `path` is one."""
    if not path.is_dir():
        return path
    present = [path / each for each in _FOLDER_FILES if (path / each).is_file()]
    # The same LoRA may be there in two formats; of other names there must be one.
    found = present[:1] or sorted(each for each in path.iterdir() if each.suffix in _SUFFIXES and each.is_file())
    if len(found) != 1:
        raise LoraError(
            "is a folder with several files" if found else "is a folder without a LoRA",
            where=f"LoRA {name}: {path}",
            expected=" or ".join(_FOLDER_FILES),
            found=", ".join(each.name for each in found[:4]) or "neither these nor one other file of tensors",
            fix="name the file itself",
        )
    return found[0]


def _warnings(lora: LoadedLora, metadata: Mapping[str, str]) -> Iterator[str]:
    if lora.left_out:
        names = ", ".join(lora.left_out[:3]) + (" …" if len(lora.left_out) > 3 else "")
        yield f"embeddings of words are left out, as no text here uses them: {names}"
    other = other_prediction((), metadata)
    if other is not None:
        yield f"it was trained for {other.what}, so on a base that predicts noise it may not do what it should"


def _layers(
    where: str, tensors: Mapping[str, LazyTensor], embeddings: Sequence[str], base: Shapes
) -> dict[str, _Layer]:
    """Sort a LoRA's tensors, but for `embeddings`, by the layers of the base that they change."""
    names = LayerNames(base)
    layers: dict[str, _Layer] = {}
    unmatched: dict[str, None] = {}
    seen: set[str] = set()
    for tensor_name, tensor in tensors.items():
        if tensor_name in embeddings:
            continue
        kind, role = refused_kind(tensor_name), role_of(tensor_name)
        if kind is not None:
            raise LoraError(
                f"is of an unsupported kind: {kind}",
                where=where,
                expected="LoRA, LoHa, LoKr, DoRA, or differences of weights",
                found=tensor_name,
                fix="merge it into the base with the program that trained it, and give that base",
            )
        if role is None:
            looks = identify(tensors)
            raise LoraError(
                "holds a tensor that is no part of a LoRA",
                where=where,
                expected="LoRA, LoHa, LoKr, DoRA, or differences of weights",
                found=tensor_name + ("" if looks == "LoRA" else f" (the file looks like: {looks})"),
                fix="give a LoRA with --lora; a whole model belongs to another option",
            )
        called, part, cut = role
        seen.add(called)
        target = names.find(called)
        if target is None:
            unmatched[called] = None
            continue
        layer = layers.setdefault(target, _Layer(called, {}))
        if part in layer.parts:
            _refuse_second(where, layer, part, called, tensor_name, target)
        layer.parts[part] = tensor.part(cut)
    if not seen:
        raise LoraError(
            "holds no tensors of a LoRA",
            where=where,
            expected="LoRA, LoHa, LoKr, DoRA, or differences of weights",
            found=", ".join(embeddings[:3]) or "no tensors",
            fix="give a LoRA with --lora; embeddings of words (textual inversions) have no place here",
        )
    if unmatched:
        raise LoraError(
            "is for another model: none of its layers is in the base"
            if len(unmatched) == len(seen)
            else f"{len(unmatched)} of its {len(seen)} layers match nothing in the base",
            where=where,
            expected="layers of SDXL's UNet or text encoders",
            found=", ".join(list(unmatched)[:3]) + (" …" if len(unmatched) > 3 else ""),
            fix="give a LoRA that was trained on SDXL",
        )
    return layers


def _refuse_second(where: str, layer: _Layer, role: str, called: str, tensor: str, target: str) -> None:
    if called != layer.name:
        raise LoraError(
            "two of its layers change one weight",
            where=f"{where}: {called}",
            expected="one layer for each of the base",
            found=f"{target}, as {layer.name} does",
            fix="give the file before two were put together",
        )
    raise LoraError(
        "holds two adapters",
        where=where,
        expected="one",
        found=f"{layer.parts[role].name} and {tensor}",
        fix="save each adapter to a file of its own, and name both with --lora",
    )
