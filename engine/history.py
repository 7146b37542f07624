"""How a result was made: what goes into its metadata, and what `--like` reads."""

from __future__ import annotations

from typing import Any

from engine import __version__
from engine.bundle import Bundle
from engine.places import APP_NAME
from engine.settings import Settings


def history_of(bundle: Bundle, settings: Settings) -> dict[str, Any]:
    """Return the engine, the bundle and the settings that a result is made with, as plain data."""
    return {
        "engine": f"{APP_NAME} {__version__}",
        "bundle": {"name": bundle.manifest.name, "digest": bundle.digest},
        "settings": settings.model_dump(mode="json"),
    }
