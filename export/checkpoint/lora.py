"""LoRAs: every common format parsed into one, matched to the base, merged.

    W' = W + Σᵢ scaleᵢ · (αᵢ / rᵢ) · upᵢ · downᵢ        (the paper's Eq. 11 and 14: A is `up`)

Names are not taken apart: a table of all names that each weight of the base may have, dotted or
flattened, LDM's or diffusers', is looked up instead. So a LoRA tensor either matches or is an error.
Sources: LoRA (arXiv 2106.09685); SPEC, "LoRA".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError, LoraError
from export.checkpoint import keymap
from export.checkpoint.architecture import Shapes
from export.checkpoint.checkpoint import LazyTensor, identify, is_finite, metadata_of, open_file

#: Of a weight, that are changed at a time: 8 MB in float64.
_BLOCK_VALUES = 1 << 20
#: The networks that LoRAs change: the base, not the control trunk.
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

_KOHYA_PREFIXES = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
_ROLES = (
    (re.compile(r"(?P<module>.+)\.(lora_down|lora_A(\.\w+)?|lora\.down|lora_linear_layer\.down)\.weight"), "down"),
    (re.compile(r"(?P<module>.+)\.(lora_up|lora_B(\.\w+)?|lora\.up|lora_linear_layer\.up)\.weight"), "up"),
    (re.compile(r"(?P<module>.+)\.lora_mid\.weight"), "mid"),
    (re.compile(r"(?P<module>.+)\.alpha"), "alpha"),
)
#: Kinds that change weights by another formula: refused by name rather than merged wrongly.
_UNSUPPORTED = (
    ("LoHa", re.compile(r"\.hada_")),
    ("LoKr", re.compile(r"\.lokr_")),
    ("DoRA", re.compile(r"\.(dora_scale|lora_magnitude_vector)")),
    ("OFT", re.compile(r"\.(oft_|boft_)")),
    ("IA3", re.compile(r"\.(on_input|ia3_)")),
    ("GLoRA", re.compile(r"\.(a1|a2|b1|b2)\.weight$")),
    ("a full weight difference", re.compile(r"\.(diff|diff_b)$")),
    ("LoRA with biases", re.compile(r"\.lora_[AB](\.\w+)?\.bias$")),
)


#: Ways to start a LoRA that move a part of the base into it, so that it fits no other base.
_BASE_CHANGING = ("pissa", "olora", "loftq", "corda")


@dataclass(frozen=True)
class Delta:
    """One layer's low-rank change: `alpha` / `rank` · up · (mid ·) down."""

    up: LazyTensor
    down: LazyTensor
    mid: LazyTensor | None
    alpha: float
    rank: int
    scaling: float

    def add_to(self, weight: NDArray[np.float64], scale: float) -> None:
        """Add the change to a weight, in place, with products that accumulate in float64.

        Args:
            weight: f64[out, in, …], contiguous.
            scale: the LoRA's own.
        Raises:
            LoraError: a value is not finite.
        """
        up, down = (_finite(tensor).reshape(tensor.shape[0], -1) for tensor in (self.up, self.down))
        if self.mid is not None:  # the kernel lies there: (out, r) · (r, r, kh, kw) · (r, in)
            down = np.einsum("rskl,si->rikl", _finite(self.mid), down).reshape(self.rank, -1)
        up = up * (scale * self.scaling)
        rows = weight.reshape(len(weight), -1)  # a view: the weight is contiguous
        some = max(1, _BLOCK_VALUES // rows.shape[1])
        for start in range(0, len(rows), some):  # so that the product stays in the processor's caches
            rows[start : start + some] += up[start : start + some] @ down


@dataclass
class LoadedLora:
    """A LoRA whose every tensor found its place.

    Attributes:
        name: given by the user.
        file: it was read from.
        scale: given by the user; 0 leaves the base bit-identical.
        deltas: by the name of the weight that they change.
    """

    name: str
    file: Path
    scale: float
    deltas: dict[str, Delta] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({delta.rank for delta in self.deltas.values()}))

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(sorted({delta.alpha for delta in self.deltas.values()}))


def open_lora(name: str, path: Path, scale: float, base: Shapes) -> LoadedLora:
    """Open a LoRA and match all of it to the base.

    Args:
        name: for the report.
        path: a file, or a folder that PEFT saved.
        scale: how much of it is merged; negative values take it away.
        base: shapes of the base's tensors, by our names.
    Raises:
        LoraError: damaged, of an unsupported kind, for another model, or with a tensor that
            matches nothing.
    """
    if not math.isfinite(scale):
        raise LoraError("the scale is not a number", where=name, found=scale)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
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
    _refuse_unsupported(name, file, tensors)
    modules = _group(name, file, tensors)
    alphas = _configured_alphas(name, file)
    targets = _match(name, file, modules, base)
    lora = LoadedLora(name, file, scale)
    for module, parts in modules.items():
        target = targets[module]
        if target in lora.deltas:
            raise LoraError("two of its layers change one weight", where=f"LoRA {name}: {module}", found=target)
        lora.deltas[target] = _delta(f"LoRA {name}: {module}", parts, base[target], alphas(module))
    return lora


def merge_into(weight: NDArray[Any], target: str, loras: Iterable[LoadedLora]) -> NDArray[Any]:
    """Return a weight with all LoRAs merged.

    Args:
        weight: of any floating dtype; it is not changed.
        target: its name.
        loras: in order; those of scale 0 do nothing at all.
    Returns:
        f64 of the same shape if any LoRA changes it, to be rounded once, else `weight` itself.
    """
    active = [lora for lora in loras if lora.scale != 0.0 and target in lora.deltas]
    if not active:
        return weight
    merged = weight.astype(np.float64, order="C")
    for lora in active:
        lora.deltas[target].add_to(merged, lora.scale)
    return merged


# -- parsing --------------------------------------------------------------------------------------

Parts = dict[str, LazyTensor]


def _refuse_unsupported(name: str, file: Path, tensors: Iterable[str]) -> None:
    for tensor in tensors:
        for kind, pattern in _UNSUPPORTED:
            if pattern.search(tensor):
                raise LoraError(
                    f"is of an unsupported kind: {kind}",
                    where=f"LoRA {name}: {file}",
                    expected="low-rank pairs (kohya's lora_down/lora_up or PEFT's lora_A/lora_B)",
                    found=tensor,
                    fix="convert it to a plain LoRA, or merge it into the base beforehand",
                )


def _group(name: str, file: Path, tensors: Mapping[str, LazyTensor]) -> dict[str, Parts]:
    if not tensors:
        raise LoraError("holds no tensors", where=f"LoRA {name}: {file}", expected="low-rank pairs")
    modules: dict[str, Parts] = {}
    for tensor_name, tensor in tensors.items():
        for pattern, role in _ROLES:
            match = pattern.fullmatch(tensor_name)
            if match:
                parts = modules.setdefault(match["module"], {})
                if role in parts:
                    raise LoraError(
                        "holds two adapters",
                        where=f"LoRA {name}: {file}",
                        found=f"{parts[role].name} and {tensor_name}",
                        fix="save each adapter to a file of its own, and name both with --lora",
                    )
                parts[role] = tensor
                break
        else:
            kind = identify(tensors)
            raise LoraError(
                "holds a tensor that is no part of a LoRA",
                where=f"LoRA {name}: {file}",
                found=tensor_name + ("" if kind == "LoRA" else f" (the file looks like: {kind})"),
            )
    return modules


def _match(name: str, file: Path, modules: Iterable[str], base: Shapes) -> dict[str, str]:
    table = _names_of(base)
    targets = {module: _target(module, table) for module in modules}
    unmatched = [module for module, target in targets.items() if target is None]
    if unmatched:
        none_match = len(unmatched) == len(targets)
        raise LoraError(
            "is for another model: none of its layers is in the base"
            if none_match
            else f"{len(unmatched)} of its {len(targets)} layers match nothing in the base",
            where=f"LoRA {name}: {file}",
            expected="layers of SDXL's UNet or text encoders",
            found=", ".join(unmatched[:3]) + (" …" if len(unmatched) > 3 else ""),
        )
    return {module: target for module, target in targets.items() if target is not None}


def _names_of(base: Shapes) -> dict[str, str]:
    """Return every name that a LoRA may call a weight of the base by, and the weight."""
    table: dict[str, str] = {}
    for weight in base:
        component, _, rest = weight.partition(".")
        if component not in COMPONENTS or not rest.endswith(".weight"):
            continue
        module = rest.removesuffix(".weight")
        dotted = [module]
        if component == "unet":
            dotted += keymap.unet_ldm_names(module)
        else:
            dotted.append(f"text_model.{module}")
        for alias in dotted:
            table[f"{component}.{alias}"] = weight
            table[f"{component}.{alias.replace('.', '_')}"] = weight
    return table


def _target(module: str, table: Mapping[str, str]) -> str | None:
    module = module.removeprefix("base_model.model.")
    for prefix, component in _KOHYA_PREFIXES.items():
        if module.startswith(prefix):
            return table.get(f"{component}.{module.removeprefix(prefix)}")
    # diffusers says "unet.…", ComfyUI "diffusion_model.…", PEFT on a bare UNet nothing.
    module = re.sub(r"^(model\.)?diffusion_model\.", "unet.", module)
    return table.get(module) or table.get(f"unet.{module}")


def _delta(where: str, parts: Parts, weight: tuple[int, ...], configured: _Alpha) -> Delta:
    for role in ("up", "down"):
        if role not in parts:
            raise LoraError("half of a pair is missing", where=where, expected=f"{role} matrix", found=sorted(parts))
    up, down, mid = parts["up"], parts["down"], parts.get("mid")
    misfit = LoraError(
        "does not fit the base: it was made for another model",
        where=where,
        expected=f"up and down of a weight {list(weight)}",
        found=f"up {list(up.shape)}, down {list(down.shape)}" + (f", mid {list(mid.shape)}" if mid else ""),
    )
    rank = down.shape[0] if len(down.shape) > 1 else 0
    if rank == 0:
        raise misfit
    if "alpha" in parts and math.prod(parts["alpha"].shape) != 1:
        raise LoraError("alpha is not one number", where=where, found=list(parts["alpha"].shape))
    alpha = float(parts["alpha"].read().item()) if "alpha" in parts else configured.alpha
    alpha = float(rank) if alpha is None else alpha
    if not math.isfinite(alpha):
        raise LoraError("alpha is not a number", where=where, found=alpha)
    kernel = (mid or down).shape[2:]
    fits = (
        up.shape[1:] in ((rank,), (rank, 1, 1))
        and (up.shape[0], down.shape[1]) == weight[:2]
        and kernel in (weight[2:], (1,) * len(kernel))
        and math.prod(kernel) == math.prod(weight[2:])
        and (mid is None or (mid.shape[:2] == (rank, rank) and math.prod(down.shape[2:]) == 1))
    )
    if not fits:
        raise misfit
    divisor = math.sqrt(rank) if configured.rank_stabilized else rank
    return Delta(up, down, mid, alpha, rank, alpha / divisor)


def _finite(tensor: LazyTensor) -> NDArray[np.float64]:
    value = tensor.read()
    if not is_finite(value):
        raise LoraError(
            "a tensor holds values that are not finite",
            where=f"{tensor.file}: {tensor.name}",
            fix="the file is damaged, or its training diverged: give another one",
        )
    return value.astype(np.float64)


# -- alpha from beside the tensors ----------------------------------------------------------------


@dataclass(frozen=True)
class _Alpha:
    """What a configuration says of a layer; None leaves alpha to be the rank."""

    alpha: float | None = None
    rank_stabilized: bool = False


def _configured_alphas(name: str, file: Path) -> Callable[[str], _Alpha]:
    """Return the alpha of each layer by PEFT's adapter_config.json or diffusers' file metadata."""
    where = f"LoRA {name}: {file}"
    beside = file.parent / "adapter_config.json"
    try:
        if file.name == "adapter_model.safetensors" and beside.is_file():
            return _Config(where, {"": json.loads(beside.read_text())}).alpha
        metadata = metadata_of(file).get("lora_adapter_metadata")
        if metadata:
            # A pipeline flattens its components' configurations ("unet.lora_alpha"), a model alone
            # writes its own as it is ("lora_alpha").
            components: dict[str, dict[str, Any]] = {}
            for key, value in json.loads(metadata).items():
                component, _, option = key.rpartition(".")
                components.setdefault(component, {})[option] = value
            return _Config(where, components).alpha
    except (ValueError, AttributeError) as error:
        raise LoraError("its configuration is damaged", where=where, found=str(error)) from error
    return lambda module: _Alpha()


class _Config:
    """PEFT's LoraConfig, per component ("" for all)."""

    def __init__(self, where: str, components: Mapping[str, Mapping[str, Any]]) -> None:
        self.where, self.components = where, components
        for config in components.values():
            if config.get("use_dora"):
                raise LoraError("is of an unsupported kind: DoRA", where=where, found="use_dora in its configuration")
            if str(config.get("peft_type", "LORA")).rpartition(".")[2] != "LORA":
                raise LoraError(
                    f"is of an unsupported kind: {config['peft_type']}", where=where, expected="peft_type LORA"
                )
            start = str(config.get("init_lora_weights", True)).lower()
            if start.startswith(_BASE_CHANGING):
                raise LoraError(
                    f"is of an unsupported kind: {start} changes the base before it is trained",
                    where=where,
                    expected="a LoRA for the base as it is",
                    found=f"init_lora_weights: {start}",
                    fix="convert it with PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
                )

    def alpha(self, module: str) -> _Alpha:
        module = module.removeprefix("base_model.model.")
        component, _, inside = module.partition(".")
        config = self.components.get(component) or self.components.get("")
        if config is None:
            return _Alpha()
        pattern = config.get("alpha_pattern") or {}
        layer = inside if component in self.components else module
        # PEFT takes a layer for one of a pattern if the pattern matches all of its name, or a part behind a dot.
        key = next((each for each in pattern if re.match(rf"(.*\.)?({each})$", layer)), layer)
        alpha = pattern.get(key, config.get("lora_alpha"))
        try:
            return _Alpha(None if alpha is None else float(alpha), bool(config.get("use_rslora")))
        except (TypeError, ValueError):
            raise LoraError("alpha is not a number", where=self.where, found=alpha) from None
