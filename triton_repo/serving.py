"""What a rendered repository tells its models: the bundle, and the limits that keep the server alive."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from engine.bundle.manifest import Bundle, open_bundle
from engine.errors import BundleError, UsageError
from engine.image.preprocess import Size
from engine.memory.budget import MemoryBudget
from engine.memory.size_plan import SizePlan, choose_plan, pixels_of_attention
from engine.pipeline.plan import RestorationPlan, make_plan
from engine.pipeline.text import Prompts
from engine.settings import Settings

#: The name of the configuration's parameter that holds all of it, as JSON.
PARAMETER = "engine"


class ServingConfig(BaseModel):
    """What every model is given.

    Attributes:
        bundle: its folder, where the server runs.
        digest: of the bundle that the repository was rendered from.
        backend: of `engine.backends`, that runs the networks inside the Python backend.
        threads: that one operator may use on a CPU; 0 is one per core.
        max_batch: photos that are restored together.
        max_image_bytes: of an encoded photo. max_photo_pixels: of a decoded one.
        max_pixels: that the networks see, of one photo; and for a batch, `max_batch` times the default size.
        max_text: characters of each text. max_steps: of a restoration.
        max_streams: that `restore_stream` serves at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: Path
    digest: str
    backend: str
    threads: int = 0
    max_batch: int = 4
    max_image_bytes: int = 64 << 20
    max_photo_pixels: int = 32_000_000
    max_pixels: int = 1 << 20
    max_text: int = 4000
    max_steps: int = 200
    max_streams: int = 16

    @classmethod
    def of(cls, arguments: dict[str, str]) -> ServingConfig:
        """Return what the server's `initialize` was given."""
        parameters = json.loads(arguments["model_config"])["parameters"]
        return cls.model_validate_json(parameters[PARAMETER]["string_value"])

    def open_bundle(self) -> Bundle:
        """Open the bundle, and check that it is the one that the repository was rendered from.

        Raises:
            BundleError: it is missing, damaged or another one.
        """
        bundle = open_bundle(self.bundle)
        if bundle.digest != self.digest:
            raise BundleError(
                "not the bundle that this model repository was rendered from",
                where=self.bundle,
                expected=f"digest {self.digest[:16]}…",
                found=f"digest {bundle.digest[:16]}…",
                fix="render the repository again: python triton_repo/render.py",
            )
        return bundle

    def pixels_allowed(self, bundle: Bundle) -> int:
        """Return how many pixels the networks may see of a photo, on this computer."""
        return min(self.max_pixels, pixels_of_attention(bundle, MemoryBudget.total().served_attention))

    def plan(self, bundle: Bundle, size: Size, settings: Settings, prompts: Prompts) -> RestorationPlan:
        """Return the plan of one photo of (width, height) pixels; see `size_plan`."""
        return make_plan(bundle, prompts, size, settings, self.size_plan(bundle, size, settings))

    def size_plan(self, bundle: Bundle, size: Size, settings: Settings) -> SizePlan:
        """Return the tiles of a photo of (width, height) pixels: sampled as the command line would, decoded whole.

        Raises:
            UsageError, ImageError: as `engine.memory.size_plan.choose_plan`.
        """
        return SizePlan(choose_plan(bundle, size, settings, MemoryBudget.total()).tile_px)

    def check(self, settings: Settings) -> None:
        """Refuse settings beyond what this server takes on.

        Raises:
            UsageError: too many steps, too long a text, or tiles of the VAE, which a server runs whole.
        """
        if settings.vae_tiles in ("exact", "fast"):
            raise UsageError(
                "a server's VAE sees the whole photo",
                where="options.vae_tiles",
                expected="auto or off",
                found=settings.vae_tiles,
            )
        if settings.steps > self.max_steps:
            raise UsageError(
                "too many steps",
                where="options.steps",
                expected=f"up to {self.max_steps} on this server",
                found=settings.steps,
            )
        for name in ("prompt", "quality_words", "negative_prompt"):
            length = len(getattr(settings, name))
            if length > self.max_text:
                raise UsageError(
                    "too long",
                    where=f"options.{name}",
                    expected=f"up to {self.max_text} characters on this server",
                    found=f"{length} characters",
                )
