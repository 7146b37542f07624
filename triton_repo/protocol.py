"""What clients and the server's models agree on: names, options, and what is said while a photo is sampled.

Options are data and nothing else: numbers, words from a list, and texts for the tokenizer. None of them names a
file or an address.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.errors import ImageError, RestoreError, UsageError
from engine.settings import Settings

#: The ensemble, and its decoupled sister.
RESTORE, RESTORE_STREAM = "restore", "restore_stream"
#: Their inputs.
IMAGE, OPTIONS = "image", "options"
#: Their outputs; `EVENT` is the stream's.
RESTORED, SETTINGS, EVENT = "restored", "settings", "event"

Format = Literal["png", "jpeg", "webp", "tiff", "avif"]
Encoding = Literal["binary", "base64"]
FORMATS: tuple[str, ...] = get_args(Format)

#: No format of photos begins with so many letters and digits.
_BASE64_START = re.compile(rb"[A-Za-z0-9+/]{32}")
#: Bytes of options. Three texts of the longest kind, every character escaped, fit.
MAX_OPTIONS_BYTES = 1 << 20


class StoppedError(RestoreError):
    """A restoration was stopped: its client has left or cancelled it, or its time is over."""


class BusyError(RestoreError):
    """The server has as much to do as it takes on; later it may have room."""


class ServerError(RestoreError):
    """The server cannot be reached, or failed at what it was right to be asked for."""


class Delivery(BaseModel):
    """How a result is delivered; options that are no settings.

    Attributes:
        format: of the encoded result.
        encoding: of photos in a request and in its answer: as they are, or as text for JSON.
        timeout_s: after which nobody waits any more: sampling stops at the next step.
        preview_every: steps between two previews of a stream; 0 is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Format = "png"
    encoding: Encoding = "binary"
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    preview_every: int = Field(0, ge=0, le=1000)

    def encode(self, image: bytes) -> bytes:
        """Return an encoded photo as the request wants it sent."""
        return base64.b64encode(image) if self.encoding == "base64" else image

    def decode(self, image: bytes) -> bytes:
        """Return the encoded photo of a request.

        Args:
            image: as it was sent.
        Raises:
            ImageError: it is base64 and ought not to be, or the other way round.
        """
        if self.encoding == "base64":
            try:
                return base64.b64decode(image, validate=True)
            except ValueError as error:  # its message may quote what was sent
                expected = "letters, digits, + and /, filled up with ="
                raise ImageError("is no base64", where=IMAGE, expected=expected) from error
        if _BASE64_START.match(image):
            raise ImageError("is base64", where=IMAGE, fix='add the option "encoding": "base64"')
        return image


class Run(BaseModel):
    """What `sample` is told beside the settings.

    Attributes:
        deadline: seconds of this computer's monotonic clock, at which it stops; None is never.
        progress_channel: the name of the stream that is told every step; see `triton_repo.progress_channel`.
        preview_every: steps between two estimates that the stream is sent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    deadline: float | None = None
    progress_channel: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    preview_every: int = Field(0, ge=0, le=1000)


def parse_options(data: bytes) -> tuple[dict[str, Any], Delivery]:
    """Return the settings that a request changes, unchecked, and how it wants its result.

    Args:
        data: a JSON object of settings (see `engine.settings.Settings`) and of `Delivery`.
    Raises:
        UsageError: it is none, is too long, or an option is unknown; or one of `Delivery` is impossible.
    """
    if len(data) > MAX_OPTIONS_BYTES:
        raise UsageError(
            "too long", where=OPTIONS, expected=f"up to {MAX_OPTIONS_BYTES} bytes", found=f"{len(data)} bytes"
        )
    try:
        options = json.loads(data.decode() or "{}", parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError("is no JSON", where=OPTIONS, found=str(error)[:200], fix="send an object") from error
    if not isinstance(options, dict):
        raise UsageError("is no JSON object", where=OPTIONS, found=type(options).__name__)
    unknown = sorted(set(options) - set(Settings.model_fields) - set(Delivery.model_fields))
    if unknown:
        shown = [name[:40] for name in unknown[:5]]
        known = ", ".join([*Settings.model_fields, *Delivery.model_fields])
        raise UsageError("unknown option", where=OPTIONS, expected=known, found=shown)
    changes = {name: value for name, value in options.items() if name in Settings.model_fields}
    try:
        delivery = Delivery(**{name: value for name, value in options.items() if name in Delivery.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{first['msg'].lower()}", where=f"{OPTIONS}.{name}", found=repr(first["input"])[:60]
        ) from error
    return changes, delivery


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
