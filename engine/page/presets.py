"""The part of the page that is about presets: settings that the bundle has names for, put into the fields at once."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.components.base import Component

from engine.bundle.manifest import Manifest
from engine.errors import UsageError
from engine.page.controls import label_of, shown
from engine.settings import Settings


def lay_out(manifest: Manifest) -> dict[str, Component]:
    """Lay out the chooser, by its name; nothing where the bundle has one set of settings only."""
    if not manifest.presets:
        return {}
    sets = ", ".join(map(_word, _fields(manifest)))
    return {
        "preset": gr.Radio(
            [manifest.preset, *manifest.presets],
            value=manifest.preset,
            label="Preset",
            info=f"Sets {sets}; each can be changed after",
            elem_id="preset",
        )
    }


def chosen(manifest: Manifest, name: str | None) -> dict[str, Any]:
    """Return what the fields show when a preset is chosen, by their names; what a visitor wrote elsewhere stays."""
    settings = manifest.settings(name)
    return {field: shown(field, getattr(settings, field)) for field in _fields(manifest)}


def asked(manifest: Manifest, value: Any) -> str | None:
    """Return the preset that a page or a program names; None for the bundle's own settings.

    Raises:
        UsageError: the bundle has none of that name.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise UsageError("no preset", where="preset", expected="a name", found=repr(value))
    manifest.settings(value)
    return None if value == manifest.preset else value


def _word(name: str) -> str:
    """Return a setting's label as it stands within a sentence."""
    label = label_of(name)
    return label if label[1:2].isupper() else f"{label[:1].lower()}{label[1:]}"


def _fields(manifest: Manifest) -> tuple[str, ...]:
    """Return the settings in which presets differ."""
    own = manifest.defaults
    return tuple(
        name
        for name in Settings.model_fields
        if any(getattr(other, name) != getattr(own, name) for other in manifest.presets.values())
    )
