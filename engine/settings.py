"""The settings of a restoration with their bounds and help: one definition for API, command line and bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from engine.errors import UsageError

Sampler = Literal["edm", "dpmpp2m"]
ColorFix = Literal["wavelet", "adain", "none"]
#: "auto" leaves the choice to size and memory, "off" samples the whole latent; a number is a tile's side in pixels.
TileSize = Annotated[int, Field(ge=64, le=8192)] | Literal["auto", "off"]
#: "exact" runs a few rows at a time, "fast" in tiles, which is approximate.
VaeTiles = Literal["auto", "off", "exact", "fast"]

#: Our own words; they steer guidance towards a clean photograph and away from what degrades one.
QUALITY_WORDS = (
    "a clean detailed photograph, in focus, crisp edges, natural texture of skin, hair, leaves and stone, "
    "true colours, even light, fine grain, high resolution"
)
NEGATIVE_WORDS = (
    "blur, out of focus, noise, jpeg blocks, ringing, banding, moire, smeared, waxy skin, plastic, painted, "
    "drawing, render, oversharpened, washed out, low resolution"
)

#: Likewise, for a face that fills the picture.
FACE_WORDS = (
    "close-up photograph of a person's face, sharp eyes with clear irises, natural skin with pores, "
    "fine hair and eyebrows, even teeth, true skin colours"
)

#: Characters; hundreds of chunks, each of which makes every step slower.
MAX_TEXT = 16_000


class Option(NamedTuple):
    """How a setting is shown: in a command's help, and as a control of the page.

    Attributes:
        group: that it stands in.
        metavar: what stands for its value in a command's help.
        tells_default: whether a command's help quotes its default, which is the engine's own.
    """

    group: str
    metavar: str | None = None
    tells_default: bool = False


class ScaleRange(NamedTuple):
    """A scale at the start (noisiest) and at the end (clean) of a run; written `S` or `S:END`."""

    start: float
    end: float


def _as_range(value: Any) -> Any:
    return (value, value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _bounded(low: float, high: float) -> Callable[[ScaleRange], ScaleRange]:
    def check(scale: ScaleRange) -> ScaleRange:
        if not all(low <= value <= high for value in scale):
            raise ValueError(f"must lie between {low:g} and {high:g}")
        return scale

    return check


#: Guidance and control; a number alone holds from start to end.
CfgScale = Annotated[ScaleRange, BeforeValidator(_as_range), AfterValidator(_bounded(-100.0, 100.0))]
ControlScale = Annotated[ScaleRange, BeforeValidator(_as_range), AfterValidator(_bounded(0.0, 100.0))]


class Settings(BaseModel):
    """Everything that decides a result, besides the photo and the bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    upscale: Annotated[float, Option("size", "X")] = Field(
        1.0, gt=0, le=16, description="size of the result over the photo's"
    )
    min_size: Annotated[int, Option("size", "PX")] = Field(
        1024, ge=64, le=8192, description="least shorter side that the networks see; the result's size stays"
    )
    tile: Annotated[TileSize, Option("size", "auto|off|PX")] = Field(
        "auto",
        description="sample in tiles of PX pixels that overlap by half; auto: large photos, at the bundle's own size",
    )
    vae_tiles: Annotated[VaeTiles, Option("size")] = Field(
        "auto",
        description="run the autoencoder a few rows at a time, exactly, or in tiles, which is approximate and needs "
        "least memory; auto: whole, exact or fast, the first that memory holds",
    )
    prompt: Annotated[str, Option("text", "TEXT")] = Field(
        "", max_length=MAX_TEXT, description="what the photo shows; of any length"
    )
    quality_words: Annotated[str, Option("text", "TEXT", tells_default=True)] = Field(
        QUALITY_WORDS, max_length=MAX_TEXT, description="appended to the prompt"
    )
    negative_prompt: Annotated[str, Option("text", "TEXT")] = Field(
        NEGATIVE_WORDS, max_length=MAX_TEXT, description="what guidance leads away from"
    )
    steps: Annotated[int, Option("sampling", "N")] = Field(15, ge=1, le=1000, description="sampling steps")
    sampler: Annotated[Sampler, Option("sampling")] = Field("edm", description="RestoreEDM or RestoreDPM++2M")
    cfg_scale: Annotated[CfgScale, Option("sampling", "S[:END]")] = Field(
        ScaleRange(2.0, 2.0),
        description="guidance s, from the first step to the last; 1 turns it off; the paper's lambda is s - 1",
    )
    control_scale: Annotated[ControlScale, Option("sampling", "S[:END]")] = Field(
        ScaleRange(1.0, 1.0), description="how strongly the photo steers the sampling"
    )
    restore_pull: Annotated[float | None, Option("sampling", "R")] = Field(
        None, gt=0, le=100, description="pull towards the stage-1 image, fading as (sigma/max)^R"
    )
    churn: Annotated[float, Option("sampling", "C")] = Field(
        0.0, ge=0, le=1000, description="noise added back over the run (edm)"
    )
    s_noise: Annotated[float, Option("sampling", "S")] = Field(
        1.0, ge=0, le=10, description="std of the noise added while sampling"
    )
    eta: Annotated[float, Option("sampling", "E")] = Field(
        1.0, ge=0, le=10, description="0 is deterministic, 1 the SDE (dpmpp2m)"
    )
    seed: Annotated[int, Option("sampling", "N")] = Field(
        0, ge=0, le=2**63 - 1, description="of the noise; the same seed gives the same result"
    )
    color_fix: Annotated[ColorFix, Option("sampling")] = Field("wavelet", description="take the colours of stage 1")

    def updated(self, changes: dict[str, Any]) -> Settings:
        """Return these settings with some replaced.

        Raises:
            UsageError: a name is unknown or a value out of bounds; all of them are listed.
        """
        return validated({**self.model_dump(), **changes})


class FaceSettings(BaseModel):
    """How the faces of a photo are restored, besides the settings of the photo itself.

    They are not among `Settings`: what restores faces is a pass over a restored photo, which servers do not offer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    words: str = Field(FACE_WORDS, max_length=MAX_TEXT, description="what a face shows, in place of the prompt")
    leave: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="numbers of faces that are left as the photo's own restoration made them"
    )


def validated_faces(values: Any, where: str) -> FaceSettings:
    """Return `FaceSettings` from plain values, whoever gave them.

    Args:
        values: by the settings' names.
        where: they come from, for the error.
    Raises:
        UsageError: one is unknown, of another type or out of bounds.
    """
    try:
        return FaceSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *map(str, first["loc"])])
        found = f"{first['msg'].lower()} (got {_short(first['input'])})"
        raise UsageError("impossible settings of faces", where=place, found=found) from error


def validated(values: dict[str, Any]) -> Settings:
    """Return `Settings` from plain values.

    Raises:
        UsageError: as `Settings.updated`.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg'].lower()} (got {_short(item['input'])})"
            for item in error.errors()
        )
        raise UsageError("impossible settings", found=problems, fix="give values within these bounds") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}… of {len(text)} characters"


def parse_scale(text: str) -> ScaleRange:
    """Return the range that `S` or `S:END` means.

    Raises:
        ValueError: not one or two numbers.
    """
    numbers = [float(part) for part in text.split(":")]
    if not 1 <= len(numbers) <= 2:
        raise ValueError(f"expected S or S:END, got {text!r}")
    return ScaleRange(numbers[0], numbers[-1])
