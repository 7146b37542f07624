"""The engine: restores photos from a bundle. It imports neither torch nor onnx nor diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["FaceRestorer", "FaceSettings", "Restored", "Restorer", "Settings", "__version__"]

if TYPE_CHECKING:
    from engine.pipeline.faces import FaceRestorer
    from engine.pipeline.restorer import Restored, Restorer
    from engine.settings import FaceSettings, Settings


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `engine.errors` and the commands' --help need none of it.
    if name in ("Restored", "Restorer"):
        from engine.pipeline import restorer as pipeline

        return getattr(pipeline, name)
    if name == "FaceRestorer":
        from engine.pipeline.faces import FaceRestorer

        return FaceRestorer
    if name in ("FaceSettings", "Settings"):
        from engine import settings

        return getattr(settings, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
