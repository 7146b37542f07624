"""What a user asks a build for; plain data, so that a command line is checked before libraries load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from engine.bundle.graphspec import Precision

Verify = Literal["trial", "torch"]
VERIFY: tuple[Verify, ...] = get_args(Verify)


@dataclass(frozen=True)
class LoraRequest:
    """A LoRA as the user names it."""

    name: str
    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class BuildRequest:
    """What the user asked for.

    Attributes:
        sdxl: base checkpoint, a file or a diffusers folder.
        supir: SUPIR's file.
        tokenizer: folder of CLIP's vocabulary.
        output: folder of the bundle.
        unet: replaces the base's UNet.
        loras: merged in this order.
        settings: what the bundle's defaults have beside the preset's.
        weights: "int8" stores matrices so, see `export.build.int8`; None in the graphs' precision.
        backend: that the bundle is for; the others can run it where they know its precision.
        targets: compute capabilities to compile for; none means the backend's own choice.
        shapes: sizes to compile for, as `export.trt.shapes.parse_shapes` reads them; "" means by `min_size`.
        batch: photos that plans can restore together.
        weight_stripped: plans without weights, which any weights of the bundle's shapes fit.
        weight_streaming: plans whose weights may lie on the host, where GPU memory is short.
        verify: "trial" runs every graph once; "torch" compares it with its torch module as well.
        retrace: take traces that were made on this computer, never those that ship with the project.
        notice: what everybody who uses the bundle should know.
    """

    sdxl: Path
    supir: Path
    tokenizer: Path
    output: Path
    unet: Path | None = None
    loras: tuple[LoraRequest, ...] = ()
    preset: str = "ours"
    precision: Precision = "fp32"
    weights: Literal["int8"] | None = None
    backend: str = "onnxruntime"
    targets: tuple[str, ...] = ()
    shapes: str = ""
    batch: int = 1
    weight_stripped: bool = False
    weight_streaming: bool = False
    verify: Verify = "trial"
    retrace: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    notice: str = ""
