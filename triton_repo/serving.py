"""What a rendered repository tells its models: the bundle, and the limits that keep the server alive."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from engine.backends import MAX_THREADS
from engine.bundle.manifest import Bundle, open_bundle
from engine.errors import BundleError, ImageError, UsageError
from engine.image.decoding import decode_photo
from engine.image.photo import Photo, Size
from engine.image.preprocess import result_size
from engine.memory.budget import MemoryBudget
from engine.memory.size_plan import SizePlan, choose_plan, pixels_of_attention
from engine.pipeline.plan import RestorationPlan, make_plan
from engine.pipeline.text import TOKENS_INSIDE, Prompts
from engine.settings import MAX_TEXT, Settings
from triton_repo.protocol import IMAGE, Delivery

#: Bytes for what is small: texts, their context, latents.
_OF_REGION = 64 << 20
#: Of a request: a positive and a negative one.
MAX_TEXTS = 2
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
    max_chunks: int = Field(32, ge=1, le=1000, description="of 75 tokens, that a text fills; default: 32")
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

    @property
    def max_rows_of_text(self) -> int:
        """How many chunks the text towers are given at once: all of a request."""
        return MAX_TEXTS * self.max_chunks

    @property
    def region_bytes(self) -> int:
        """How much shared memory a model is given: what it takes and gives at these limits."""
        # As base64; a result of 16 bits with transparency, not compressed.
        photos = (self.max_image_bytes + 8 * self.max_photo_pixels) * 4 // 3
        # A batch's restored photos and their stage 1, or those that go in and those that come out.
        tensors = 2 * self.max_batch * 3 * 4 * self.max_pixels
        return photos + tensors + _OF_REGION

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
            self._check_text(len(getattr(settings, name)), self.max_text, f"options.{name}")

    def check_texts(self, lengths: Sequence[int], where: str) -> None:
        """Refuse texts beyond what this server takes on.

        Args:
            lengths: of the positive and the negative text, in characters.
            where: what the error calls them.
        Raises:
            UsageError: too many or too long.
        """
        if not 1 <= len(lengths) <= MAX_TEXTS:
            raise UsageError("one or two texts", where=where, found=len(lengths))
        # The positive text is the prompt and the quality words, with a comma between them.
        self._check_text(max(lengths), 2 * self.max_text + 2, where)

    def check_chunks(self, chunks: int, where: str) -> None:
        """Refuse texts that fill more chunks than this server takes on.

        Raises:
            UsageError: they do.
        """
        if not 1 <= chunks <= self.max_chunks:
            raise UsageError(
                "too long",
                where=where,
                expected=f"1 to {self.max_chunks} chunks of {TOKENS_INSIDE} tokens on this server",
                found=f"{chunks} chunks",
            )

    def check_working_pixels(self, pixels: int, allowed: int, where: str) -> None:
        """Refuse more pixels than the networks may see.

        Args:
            pixels: that they would see.
            allowed: from `pixels_allowed`.
            where: what the error calls them.
        Raises:
            ImageError: there are too many.
        """
        if pixels > allowed:
            raise ImageError(
                "too large for the memory of this computer",
                where=where,
                expected=f"up to {allowed} pixels on this server",
                found=f"{pixels} pixels",
            )

    def read_photo(self, sent: bytes, delivery: Delivery) -> Photo:
        """Return the photo of a request.

        Args:
            sent: as it came.
            delivery: how it came.
        Raises:
            ImageError: too many bytes or pixels, or no photo.
        """
        encoded = delivery.decode(sent)
        if len(encoded) > self.max_image_bytes:
            raise ImageError(
                "is too large",
                where=IMAGE,
                expected=f"up to {self.max_image_bytes} bytes on this server",
                found=f"{len(encoded)} bytes",
            )
        return decode_photo(encoded, IMAGE, max_pixels=self.max_photo_pixels)

    def result_size(self, size: Size, settings: Settings) -> Size:
        """Return the size of a photo's result, both (width, height) in pixels.

        Raises:
            ImageError: too many pixels.
        """
        width, height = result_size(size, settings.upscale)
        if width * height > self.max_photo_pixels:
            raise ImageError(
                "would be too large",
                where=IMAGE,
                expected=f"up to {self.max_photo_pixels / 1e6:.0f} million pixels on this server",
                found=f"{size[0]} × {size[1]} with --upscale {settings.upscale:g}",
                fix="lower --upscale",
            )
        return width, height

    @staticmethod
    def _check_text(length: int, allowed: int, where: str) -> None:
        if length > allowed:
            raise UsageError(
                "too long",
                where=where,
                expected=f"up to {allowed} characters on this server",
                found=f"{length} characters",
            )


#: The configuration's numbers: limits that the one who renders may change, each an option of its name.
LIMITS = {name: field for name, field in ServingConfig.model_fields.items() if field.annotation is int}
