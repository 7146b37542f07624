"""Options that commands share: a restoration's settings, names of files, numbers within bounds.

It imports nothing heavy: a client that only talks to a server has the same options.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.settings import QUALITY_WORDS, ScaleRange, parse_scale

#: Options that are settings, by the settings' names.
_SETTINGS = (
    "upscale",
    "min_size",
    "tile",
    "vae_tiles",
    "prompt",
    "quality_words",
    "negative_prompt",
    "steps",
    "sampler",
    "cfg_scale",
    "control_scale",
    "restore_pull",
    "churn",
    "s_noise",
    "eta",
    "seed",
    "color_fix",
)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given on a command line, by name; the others are the bundle's."""
    given = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    if options.no_restore_pull:
        given["restore_pull"] = None
    return given


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for each of `Settings`."""
    size = parser.add_argument_group("size")
    size.add_argument("--upscale", type=float, metavar="X", help="size of the result over the photo's")
    size.add_argument(
        "--min-size", type=int, metavar="PX", help="least shorter side that the networks see; the result's size stays"
    )
    size.add_argument(
        "--tile",
        type=_tile,
        metavar="auto|off|PX",
        help="sample in tiles of PX pixels that overlap by half; auto: large photos, at the bundle's own size",
    )
    size.add_argument(
        "--vae-tiles",
        choices=("auto", "off", "exact", "fast"),
        help="run the autoencoder a few rows at a time, exactly, or in tiles, which is approximate and needs least "
        "memory; auto: whole, exact or fast, the first that memory holds",
    )
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", metavar="TEXT", help="what the photo shows; of any length")
    text.add_argument("--quality-words", metavar="TEXT", help=f'appended to the prompt; default: "{QUALITY_WORDS}"')
    text.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--steps", type=int, metavar="N")
    sampling.add_argument("--sampler", choices=("edm", "dpmpp2m"), help="RestoreEDM or RestoreDPM++2M")
    sampling.add_argument(
        "--cfg-scale",
        type=_scale,
        metavar="S[:END]",
        help="guidance s, from the first step to the last; 1 turns it off; the paper's lambda is s - 1",
    )
    sampling.add_argument(
        "--control-scale", type=_scale, metavar="S[:END]", help="how strongly the photo steers the sampling"
    )
    pull = sampling.add_mutually_exclusive_group()
    pull.add_argument(
        "--restore-pull", type=float, metavar="R", help="pull towards the stage-1 image, fading as (sigma/max)^R"
    )
    pull.add_argument("--no-restore-pull", action="store_true", help="switch the pull off, if the bundle has it on")
    sampling.add_argument("--churn", type=float, metavar="C", help="noise added back over the run (edm)")
    sampling.add_argument("--s-noise", type=float, metavar="S", help="std of the noise added while sampling")
    sampling.add_argument("--eta", type=float, metavar="E", help="0 is deterministic, 1 the SDE (dpmpp2m)")
    sampling.add_argument("--seed", type=int, metavar="N", help="of the noise; the same seed gives the same result")
    sampling.add_argument("--color-fix", choices=("wavelet", "adain", "none"), help="take the colours of stage 1")


def path_option(text: str) -> Path:
    """Return a file's or folder's name; an empty one is refused."""
    if not text:  # which Path would take for the current folder
        raise argparse.ArgumentTypeError("expected a name, got an empty one")
    return Path(text)


def whole_number(low: int, high: int, meaning: str = "") -> Callable[[str], int]:
    """Return the parser of a whole number from `low`, which means `meaning`, to `high`."""

    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected {low}{meaning} to {high}, got {text!r}")
        return int(text)

    return number


def _tile(text: str) -> int | str:
    if text in ("auto", "off"):
        return text
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected auto, off, or a tile's side in pixels, got {text!r}")


def _scale(text: str) -> ScaleRange:
    try:
        return parse_scale(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected S or S:END, such as 2 or 4:1, got {text!r}") from None


def gibibytes(text: str) -> float:
    """Return an amount of memory in GiB."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 100_000:
        raise argparse.ArgumentTypeError(f"expected gibibytes such as 8 or 7.5, got {text!r}")
    return value
