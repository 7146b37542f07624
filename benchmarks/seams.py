"""How far windows and parts are from the whole, and whether their borders show.

python benchmarks/seams.py --bundle bundles/ours --image photo.jpg --steps 4 --json seams.json

At a size where both run, each part is done whole and in windows, everything else being equal: the sampling, the
VAE's decoder, its encoder, and the encoder for degraded photos; the VAE also a few rows at a time, which is exact. The
error along the borders of windows is set against the error elsewhere: above 1.1, a seam could be seen.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe_machine
from engine import Restorer
from engine.cli.console import run_command
from engine.cli.options import path_option, whole_number
from engine.image.preprocess import frame, load_photo
from engine.memory.size_plan import SizePlan, default_window
from engine.memory.vae_slices import SlicedVae
from engine.sampling.tiling import Tiling

#: How far from a border its error is looked at, in cells, or in as many pixels of the picture.
_BAND_CELLS = 1
#: What the ratio may be.
SEAMLESS = 1.1


def border_mask(windows: Tiling, band: int = _BAND_CELLS) -> NDArray[np.bool_]:
    """Return where a window's side lies inside the image, with `band` cells on either side, bool[H,W]."""
    mask = np.zeros((windows.height, windows.width), bool)
    for window in windows:
        for side in (window.top, window.top + window.height):
            if 0 < side < windows.height:
                mask[max(0, side - band) : side + band] = True
        for side in (window.left, window.left + window.width):
            if 0 < side < windows.width:
                mask[:, max(0, side - band) : side + band] = True
    return mask


def psnr(found: NDArray[np.float32], whole: NDArray[np.float32]) -> float:
    """Return the PSNR in dB of an image over the other's range."""
    squared = float(np.mean((found.astype(np.float64) - whole) ** 2))
    return 10 * math.log10(float(whole.max() - whole.min()) ** 2 / max(squared, 1e-30))


def compare(found: NDArray[np.float32], whole: NDArray[np.float32], windows: Tiling, band: int) -> dict[str, float]:
    """Return how two images f32[1,C,H,W] differ: PSNR over the whole's range, and the border's error over the rest's.

    Args:
        found, whole: in windows, and at once.
        windows: on these images.
        band: on either side of a border.
    """
    squared = np.mean((found.astype(np.float64) - whole) ** 2, axis=(0, 1))
    border = border_mask(windows, band)
    along, elsewhere = (math.sqrt(squared[part].mean()) for part in (border, ~border))
    return {
        "psnr_db": psnr(found, whole),
        "rms_along_borders": along,
        "rms_elsewhere": elsewhere,
        "ratio": along / max(elsewhere, 1e-30),
    }


def measure(restorer: Restorer, image: Path, side: int, plan: SizePlan, steps: int) -> dict[str, Any]:
    """Return the comparison of every part, by its name."""
    bundle = restorer.bundle
    settings = restorer.defaults.updated({"steps": steps, "tile": "off", "vae_tiles": "off"})
    factor = bundle.pixels_per_cell
    lq = frame(load_photo(image), (side, side))[None]
    cells = side // factor
    tiles, windows = plan.vae_mode(bundle, cells, cells), plan.windows(bundle, cells, cells)
    assert isinstance(tiles, Tiling)
    in_pixels = tiles.scaled(factor)
    z_lq = restorer.stages.encode(lq)
    pixels = restorer.stages.decode(z_lq)
    center = restorer.stages.encode_clean(pixels)
    texts = restorer.stages.conditioning(settings)
    z = restorer.stages.sample(z_lq, texts, settings, center=center)
    in_windows = restorer.stages.sample(z_lq, texts, settings, center=center, windows=windows)
    band = _BAND_CELLS
    rows = SlicedVae()
    return {
        "denoise encoder, exact": {"psnr_db": psnr(restorer.stages.encode(lq, way=rows), z_lq)},
        "vae decoder, exact": {"psnr_db": psnr(restorer.stages.decode(z_lq, way=rows), pixels)},
        "vae encoder, exact": {"psnr_db": psnr(restorer.stages.encode_clean(pixels, way=rows), center)},
        "denoise encoder": compare(restorer.stages.encode(lq, way=tiles), z_lq, tiles, band),
        "vae decoder": compare(restorer.stages.decode(z_lq, way=tiles), pixels, in_pixels, band * factor),
        "vae encoder": compare(restorer.stages.encode_clean(pixels, way=tiles), center, tiles, band),
        "sampling, latent": compare(in_windows, z, windows, band),
        "sampling, picture": compare(
            restorer.stages.decode(in_windows), restorer.stages.decode(z), windows.scaled(factor), band * factor
        ),
    }


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=path_option, metavar="DIR")
    parser.add_argument("--image", type=path_option, required=True, metavar="FILE")
    parser.add_argument("--size", type=whole_number(64, 8192), metavar="PX", help="default: twice the bundle's window")
    parser.add_argument("--tile", type=whole_number(64, 8192), metavar="PX", help="default: the bundle's window")
    parser.add_argument("--vae-tile", type=whole_number(64, 8192), default=512, metavar="PX")
    parser.add_argument("--steps", type=whole_number(1, 1000), default=4, metavar="N")
    parser.add_argument("--json", type=path_option, metavar="FILE")
    options = parser.parse_args(arguments)
    with Restorer.open(options.bundle) as restorer:
        window = options.tile or default_window(restorer.bundle)
        side = options.size or 2 * window
        found = measure(restorer, options.image, side, SizePlan(window, options.vae_tile), options.steps)
    print(f"{side} × {side}, windows of {window}, VAE tiles of {options.vae_tile} pixels, {options.steps} steps\n")
    print("| part | PSNR, dB | error along borders | elsewhere | ratio |\n|---|---:|---:|---:|---:|")
    for part, row in found.items():
        errors = (f"{row[name]:.3g}" if name in row else "" for name in ("rms_along_borders", "rms_elsewhere", "ratio"))
        print(f"| {part} | {row['psnr_db']:.1f} | {' | '.join(errors)} |")
    if options.json is not None:
        report = {"machine": describe_machine(), "side_px": side, "window_px": window, "vae_tile_px": options.vae_tile}
        options.json.write_text(json.dumps({**report, "steps": options.steps, "parts": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
