"""The settings as controls: each is made from its one definition in `engine.settings`, with its words and bounds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import gradio as gr
from gradio.components.base import Component
from pydantic.fields import FieldInfo

from engine.cli.options import option_of, parser_of
from engine.errors import UsageError
from engine.settings import ScaleRange, Settings

#: What stands in sight; all others are folded away.
IN_SIGHT = ("prompt", "upscale", "control_scale", "seed")
FOLDED = tuple(name for name in Settings.model_fields if name not in IN_SIGHT)
#: Whole numbers up to here are exact in a browser.
_EXACT = 2**53
_CAPITALS = {"cfg": "CFG", "vae": "VAE"}


def label_of(name: str) -> str:
    """Return a setting's name as a label: the word of the command line, as in "Control scale"."""
    words = [_CAPITALS.get(word, word) for word in name.split("_")]
    return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])


def group_of(name: str) -> str:
    """Return the group that a setting stands in, as in the command's help."""
    return option_of(Settings.model_fields[name]).group


def control_of(name: str, defaults: Settings) -> Component:
    """Return the control of a setting.

    Args:
        name: of the setting.
        defaults: the bundle's, which it shows first.
    """
    field = Settings.model_fields[name]
    low, high = _bounds(field)
    common: dict[str, Any] = {
        "value": shown(name, getattr(defaults, name)),
        "label": label_of(name),
        "info": _help(field, low, high),
        "elem_id": f"setting-{name}",
        "min_width": 140 if name in IN_SIGHT else 200,
    }
    kinds = {NoneType if kind is None else kind for kind in (get_args(field.annotation) or (field.annotation,))}
    if get_origin(field.annotation) is Literal:
        return gr.Dropdown(list(get_args(field.annotation)), filterable=False, **common)
    if name == "tile":
        return gr.Dropdown(["auto", "off"], allow_custom_value=True, **common)
    # A field for numbers shows 0 where there is none, and rounds what a browser's numbers do not hold.
    if kinds & {str, ScaleRange, NoneType} or (int in kinds and high is not None and high > _EXACT):
        lines = 2 if field.annotation is str else 1
        return gr.Textbox(lines=lines, max_lines=6, max_length=_max_length(field), **common)
    if int in kinds:
        return gr.Number(precision=0, minimum=low, maximum=high, **common)
    return gr.Number(minimum=low, maximum=high, step=0.1, **common)


def shown(name: str, value: Any) -> Any:
    """Return a setting's value as its control shows it."""
    if isinstance(value, ScaleRange):
        return f"{value.start:g}" if value.start == value.end else f"{value.start:g}:{value.end:g}"
    if NoneType in get_args(Settings.model_fields[name].annotation):
        return "" if value is None else f"{value:g}"
    if isinstance(value, int) and name in ("seed", "tile"):
        return str(value)
    return value


def values_of(settings: Settings) -> dict[str, Any]:
    """Return what each control shows for some settings."""
    return {name: shown(name, getattr(settings, name)) for name in Settings.model_fields}


def settings_from(values: Mapping[str, Any], defaults: Settings) -> Settings:
    """Return the settings that controls show.

    Args:
        values: by the settings' names, as controls give them.
        defaults: for settings that are not among them.
    Raises:
        UsageError: one of them cannot be read or is out of bounds; it is named by its label.
    """
    return defaults.updated({name: _parsed(name, value) for name, value in values.items()})


def _parsed(name: str, value: Any) -> Any:
    """Return a control's value as the setting's; texts are read as the command line reads them."""
    if name not in Settings.model_fields:
        raise UsageError("no such setting", where=name, expected=", ".join(Settings.model_fields))
    field = Settings.model_fields[name]
    if field.annotation is str or get_origin(field.annotation) is Literal or not isinstance(value, str):
        if value is None and NoneType not in get_args(field.annotation):
            raise UsageError("is empty", where=label_of(name), fix=field.description)
        return value
    if not value.strip():
        if NoneType in get_args(field.annotation):
            return None
        raise UsageError("is empty", where=label_of(name), fix=field.description)
    try:
        return parser_of(name)(value.strip())
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UsageError("cannot be read", where=label_of(name), found=repr(value), fix=field.description) from error


def differences(settings: Settings, defaults: Settings, also: Sequence[str] = ("seed",)) -> list[str]:
    """Return what differs from the bundle's settings, and what is told anyway, as "steps 8"."""
    told = []
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if name in also or value != getattr(defaults, name):
            told.append(f"{name.replace('_', ' ')} {_short(name, value)}")
    return told


def _short(name: str, value: Any) -> str:
    text = "off" if value is None else str(shown(name, value))
    text = text if len(text) <= 60 else f"{text[:57]}…"
    return f"“{text}”" if isinstance(value, str) and Settings.model_fields[name].annotation is str else text


def _bounds(field: FieldInfo) -> tuple[float | None, float | None]:
    """Return the least and the greatest value, None where there is none; one that is itself excluded counts as well."""
    low = [getattr(item, word) for item in field.metadata for word in ("ge", "gt") if hasattr(item, word)]
    high = [getattr(item, word) for item in field.metadata for word in ("le", "lt") if hasattr(item, word)]
    return (low[0] if low else None), (high[0] if high else None)


def _excludes_low(field: FieldInfo) -> bool:
    return any(hasattr(item, "gt") for item in field.metadata)


def _max_length(field: FieldInfo) -> int | None:
    return next((item.max_length for item in field.metadata if hasattr(item, "max_length")), None)


def _help(field: FieldInfo, low: float | None, high: float | None) -> str:
    told = field.description or ""
    parts = [told[:1].upper() + told[1:]]
    if high is not None and high <= _EXACT:
        parts.append(f"above {low:g}, up to {high:g}" if _excludes_low(field) else f"{low:g} to {high:g}")
    if NoneType in get_args(field.annotation):
        parts.append("empty: off")
    return "; ".join(parts)
