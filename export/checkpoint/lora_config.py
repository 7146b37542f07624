"""α and rank of a LoRA from beside its tensors: PEFT's adapter_config.json, or what diffusers puts into the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic_core import SchemaError, SchemaValidator, core_schema

from engine.errors import CheckpointError, LoraError
from export.checkpoint.lora_kinds import Scaling
from export.checkpoint.lora_names import unwrapped
from export.checkpoint.small_files import parse_object, read_small_text

_CONFIG = "adapter_config.json"
#: Of a safetensors file's metadata.
_DIFFUSERS_KEY = "lora_adapter_metadata"
#: Only PEFT calls tensors so, or files; a LoRA of another trainer may lie beside a configuration by chance.
_PEFT_NAMES = re.compile(r"^base_model\.model\.|\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")
_PEFT_FILE = "adapter_model"
#: PEFT's names of the kinds that are merged.
_KINDS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}
#: Ways to start a LoRA that move a part of the base into it, so that it fits no other base.
_BASE_CHANGING = ("pissa", "olora", "loftq", "corda", "lora_ga")
#: Options of PEFT's under which a pair is no longer W + s · B · A.
_OTHER_FORMULAS = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_DAMAGED, _OPTIONS = "its configuration is damaged", "PEFT's options, as JSON"
#: What trainers write: for them a dot is a dot.
_PLAIN_NAME = re.compile(r"[\w.-]+")
#: What people write by hand.
_MOST_EXPRESSIONS, _MOST_CHARACTERS = 64, 256


def configuration_of(where: str, file: Path, tensors: Iterable[str], metadata: Mapping[str, str]) -> Configuration:
    """Return what a LoRA's configuration says; it is empty where there is none.

    Args:
        where: the LoRA, for errors.
        file: of its tensors.
        tensors: their names.
        metadata: of its file.
    Raises:
        LoraError: the configuration is damaged, or of a kind that is not merged.
    """
    try:
        if _DIFFUSERS_KEY in metadata:
            # A pipeline flattens its components' configurations ("unet.lora_alpha"), a model alone writes its own
            # as it is ("lora_alpha").
            components: dict[str, dict[str, Any]] = {}
            for key, value in parse_object(metadata[_DIFFUSERS_KEY], _DAMAGED, where, _OPTIONS).items():
                component, _, option = key.rpartition(".")
                components.setdefault(component, {})[option] = value
            return Configuration(where, components)
        beside = file.parent / _CONFIG
        by_peft = file.stem == _PEFT_FILE or any(_PEFT_NAMES.search(name) for name in tensors)
        if by_peft and beside.is_file():
            where = f"{where}, by {_CONFIG} beside it"
            return Configuration(where, {"": parse_object(read_small_text(beside), _DAMAGED, where, _OPTIONS)}, beside)
    except CheckpointError as error:
        raise LoraError(
            error.problem, where=error.where, expected=error.expected, found=error.found, fix=error.fix
        ) from error
    return Configuration(where, {})


class Configuration:
    """PEFT's LoraConfig, LoHaConfig or LoKrConfig.

    Attributes:
        components: options per network, by the name before the first dot of a layer's; "" for all.
        file: that it was read from; None for the tensors' own, or where there is none.
    """

    def __init__(self, where: str, components: Mapping[str, Mapping[str, Any]], file: Path | None = None) -> None:
        self.where, self.components, self.file = where, components, file
        for config in components.values():
            if _type_of(config) not in _KINDS:
                raise LoraError(
                    f"is of an unsupported kind: {config['peft_type']}",
                    where=where,
                    expected=f"peft_type {', '.join(_KINDS)}",
                    found=f"peft_type: {config['peft_type']}",
                    fix="merge it into the base with PEFT, and give that base",
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
            for option in _OTHER_FORMULAS:
                if config.get(option):
                    raise LoraError(
                        f"is of an unsupported kind: {option}",
                        where=where,
                        expected="a plain LoRA, LoHa, LoKr or DoRA",
                        found=f"{option}: {config[option]}",
                        fix="merge it into the base with PEFT, and give that base",
                    )

    def scaling(self, layer: str) -> Scaling:
        """Return what it says of a layer, by the name that the LoRA gives it.

        Raises:
            LoraError: it is damaged.
        """
        layer = unwrapped(layer)
        component, _, inside = layer.partition(".")
        config = self.components.get(component) or self.components.get("")
        if config is None:
            return Scaling()
        key = inside if component in self.components else layer
        try:
            alpha = _of_layer(config, key, "alpha_pattern", config.get("lora_alpha", config.get("alpha")))
            rank = _of_layer(config, key, "rank_pattern", config.get("r"))
            if rank is not None and int(rank) < 1:
                raise ValueError(f"rank {rank}")
            return Scaling(
                None if alpha is None else float(alpha),
                None if rank is None else int(rank),
                _KINDS[_type_of(config)] if "peft_type" in config else None,
                bool(config.get("use_dora")),
                bool(config.get("use_rslora")),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise LoraError(
                _DAMAGED,
                where=self.where,
                expected="numbers as alpha and rank, and patterns of layers' names",
                found=str(error),
                fix="download or save it again",
            ) from error


def _type_of(config: Mapping[str, Any]) -> str:
    return str(config.get("peft_type", "LORA")).rpartition(".")[2]  # some write "PeftType.LORA"


def _of_layer(config: Mapping[str, Any], layer: str, option: str, default: Any) -> Any:
    values = config.get(option) or {}
    if not isinstance(values, dict):
        raise TypeError(f"{option}: {type(values).__name__}")
    key = _patterns(tuple(values)).first_match(layer)
    return default if key is None else values[key]


class _Patterns:
    """Keys of PEFT's patterns: names of layers, or regular expressions.

    PEFT takes a layer for one of a pattern if the pattern matches all of its name, or a part behind a dot. Keys are
    strangers', and Python's own matching can take forever: Rust's, which is pydantic's, takes time in proportion
    to the name and the pattern.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._names = {key: index for index, key in enumerate(keys) if _PLAIN_NAME.fullmatch(key)}
        expressions = [(index, key) for index, key in enumerate(keys) if key not in self._names]
        if len(expressions) > _MOST_EXPRESSIONS:
            raise ValueError(f"more than {_MOST_EXPRESSIONS} regular expressions")
        self._expressions = [(index, key, _expression(key)) for index, key in expressions]

    def first_match(self, layer: str) -> str | None:
        """Return the first key that a layer is one of, None if it is of none."""
        parts = layer.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        found = [(self._names[end], end) for end in ends if end in self._names]
        found += [(index, key) for index, key, matcher in self._expressions if matcher.isinstance_python(layer)]
        return min(found, default=(0, None))[1]


@lru_cache(maxsize=8)
def _patterns(keys: tuple[str, ...]) -> _Patterns:
    return _Patterns(keys)


def _expression(key: str) -> SchemaValidator:
    # A repetition of a repetition makes a short expression a large machine.
    if len(key) > _MOST_CHARACTERS or "{" in key:
        raise ValueError(f"a regular expression with braces, or of over {_MOST_CHARACTERS} characters: {key[:40]}")
    try:
        return SchemaValidator(core_schema.str_schema(pattern=rf"^(.*\.)?({key})$"))
    except SchemaError as error:
        raise ValueError(f"no regular expression: {key}") from error
