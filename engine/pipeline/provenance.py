"""How a result was made: what goes into its metadata, and what `--like` reads."""

from __future__ import annotations

from typing import Any

from engine import __version__
from engine.bundle.manifest import Bundle
from engine.bundle.storage import APP_NAME
from engine.pipeline.plan import RestorationPlan
from engine.settings import Settings


def provenance_of(bundle: Bundle, settings: Settings, plan: RestorationPlan | None = None) -> dict[str, Any]:
    """Return what a result is made with, as plain data.

    Args:
        bundle: whose networks.
        settings: as they were asked for.
        plan: of the restoration; left out before it is made.
    """
    return {
        "engine": f"{APP_NAME} {__version__}",
        "bundle": {"name": bundle.manifest.name, "digest": bundle.digest},
        "settings": settings.model_dump(mode="json"),
        **({} if plan is None else {"plan": plan.as_data()}),
    }
