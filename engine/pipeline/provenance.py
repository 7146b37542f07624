"""How a result was made: what goes into its metadata, and what `--like` reads."""

from __future__ import annotations

from typing import Any

from engine import __version__
from engine.bundle.manifest import Bundle
from engine.bundle.storage import APP_NAME
from engine.memory.size_plan import SizePlan
from engine.settings import Settings


def history_of(bundle: Bundle, settings: Settings, plan: SizePlan | None = None) -> dict[str, Any]:
    """Return what a result is made with, as plain data.

    Args:
        bundle: whose networks.
        settings: as they were asked for.
        plan: how the photo was worked at; it is left out if that was whole, or before it is chosen.
    """
    worked_at = {} if plan is None or plan == SizePlan() else {"size_plan": plan.as_data()}
    return {
        "engine": f"{APP_NAME} {__version__}",
        "bundle": {"name": bundle.manifest.name, "digest": bundle.digest},
        "settings": settings.model_dump(mode="json"),
        **worked_at,
    }
