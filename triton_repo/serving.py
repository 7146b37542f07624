"""What a rendered repository tells its models: the bundle, and the limits that keep the server alive."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from engine.backends import MAX_THREADS
from engine.bundle.manifest import Bundle, open_bundle
from engine.errors import BundleError, UsageError
from engine.image.photo import Size
from engine.memory.budget import MemoryBudget
from engine.memory.size_plan import SizePlan, choose_plan, pixels_of_attention
from engine.pipeline.plan import RestorationPlan, make_plan
from engine.pipeline.text import Prompts
from engine.settings import MAX_TEXT, Settings

#: The name of the configuration's parameter that holds all of it, as JSON.
PARAMETER = "engine"


class ServingConfig(BaseModel):
    """What every model is given.

    Attributes:
        bundle: its folder, where the server runs.
        digest: of the bundle that the repository was rendered from.
        backend: of `engine.backends`, that runs the networks inside the Python backend.

    The others, `LIMITS`, are described where they are defined. A batch may have `max_batch` times the default size's
    pixels, or `max_pixels`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: Path
    digest: str
    backend: str
    threads: int = Field(0, ge=0, le=MAX_THREADS, description="of a CPU; default: one per core")
    max_batch: int = Field(
        4, ge=1, le=64, description="photos of one size that are restored together; default: 4, 1 is off"
    )
    max_pixels: int = Field(
        1 << 20,
        ge=4096,
        le=1 << 28,
        description="that the networks see of a photo; default: a square of twice the bundle's size, or 1024²",
    )
    max_photo_pixels: int = Field(
        32_000_000, ge=1, le=1 << 30, description="of photos and of results; default: 32000000"
    )
    max_image_bytes: int = Field(64 << 20, ge=1, le=1 << 30, description="of an encoded photo; default: 67108864")
    max_steps: int = Field(200, ge=1, le=1000, description="of a restoration; default: 200")
    max_text: int = Field(4000, ge=1, le=MAX_TEXT, description="characters of a text; default: 4000")
    max_streams: int = Field(16, ge=1, le=1000, description="served by restore_stream at once; default: 16")

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


#: The configuration's numbers: limits that the one who renders may change, each an option of its name.
LIMITS = {name: field for name, field in ServingConfig.model_fields.items() if field.annotation is int}
