"""How a result was made: what goes into its metadata, and what `--like` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine import __version__
from engine.backends import make_backend
from engine.backends.base import Backend, ComputingBackend
from engine.backends.trt_library import PLAN_BACKENDS, open_library
from engine.bundle.manifest import Bundle
from engine.bundle.storage import APP_NAME
from engine.pipeline.plan import RestorationPlan
from engine.settings import Settings


def provenance_of(
    bundle: Bundle, settings: Settings, plan: RestorationPlan | None = None, backend: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what a result is made with, as plain data.

    Args:
        bundle: whose networks.
        settings: as they were asked for.
        plan: of the restoration; left out before it is made.
        backend: from `backend_facts`; likewise.
    """
    return {
        "engine": f"{APP_NAME} {__version__}",
        "bundle": {"name": bundle.manifest.name, "digest": bundle.digest},
        "settings": settings.model_dump(mode="json"),
        **({} if plan is None else {"plan": plan.as_data()}),
        **({} if backend is None else {"backend": dict(backend)}),
    }


def backend_facts(backend: Backend, bundle: Bundle) -> dict[str, str]:
    """Return the library that runs a bundle and, where it chooses, the type that it computes in."""
    compute = {"compute": backend.computes_in(bundle)} if isinstance(backend, ComputingBackend) else {}
    return {"library": backend.label, **compute}


def served_backend_facts(name: str, bundle: Bundle) -> dict[str, str]:
    """Return the facts of the backend called `name` where another process runs it, perhaps on a GPU: none is opened.

    Raises:
        BackendError: its library is missing.
    """
    if name in PLAN_BACKENDS:
        return {"library": open_library(name).label}
    return backend_facts(make_backend(name, device="cpu"), bundle)
