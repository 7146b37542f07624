"""How far tiled sampling and a tiled VAE are from the whole image, and whether seams show.

python benchmarks/seams.py --bundle bundles/ours --image photo.jpg --steps 4 --json seams.json

At a size where both run, each part is done whole and in tiles, all else equal: the sampling, the
VAE's decoder, its encoder, and the encoder for degraded photos; the VAE also a few rows at a time, which is exact. The
error along the borders of tiles is set against the error elsewhere: above 1.1, a seam could be seen.

With --faces, the faces of the photo are restored and pasted instead, and what the pass has changed, along the squares'
borders and elsewhere in them, takes the place of the error.
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
from engine import FaceRestorer, Restorer
from engine.cli.console import run_command
from engine.cli.options import command_parser, path_option, whole_number
from engine.errors import ImageError
from engine.image.faces import Box
from engine.image.preprocess import load_photo, preprocess
from engine.memory.size_plan import SizePlan, default_tile
from engine.memory.vae_slices import SlicedVae
from engine.pipeline.faces import told
from engine.sampling.tiling import Tiling

#: How far from a border its error is looked at, in cells, or in as many pixels of the picture.
_BAND_CELLS = 1
#: What the ratio may be.
SEAMLESS = 1.1


def border_mask(tiles: Tiling, band: int = _BAND_CELLS) -> NDArray[np.bool_]:
    """Return where a tile's side lies inside the image, with `band` cells on either side, bool[H,W]."""
    mask = np.zeros((tiles.height, tiles.width), bool)
    for tile in tiles:
        for side in (tile.top, tile.top + tile.height):
            if 0 < side < tiles.height:
                mask[max(0, side - band) : side + band] = True
        for side in (tile.left, tile.left + tile.width):
            if 0 < side < tiles.width:
                mask[:, max(0, side - band) : side + band] = True
    return mask


def psnr(found: NDArray[np.float32], whole: NDArray[np.float32]) -> float:
    """Return the PSNR in dB of an image over the other's range."""
    squared = float(np.mean((found.astype(np.float64) - whole) ** 2))
    return 10 * math.log10(float(whole.max() - whole.min()) ** 2 / max(squared, 1e-30))


def compare(found: NDArray[np.float32], whole: NDArray[np.float32], tiles: Tiling, band: int) -> dict[str, float]:
    """Return how two images f32[1,C,H,W] differ: PSNR over the whole's range, and the border's error over the rest's.

    Args:
        found, whole: in tiles, and at once.
        tiles: on these images.
        band: on either side of a border.
    """
    squared = np.mean((found.astype(np.float64) - whole) ** 2, axis=(0, 1))
    border = border_mask(tiles, band)
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
    lq = preprocess(load_photo(image), (side, side))[None]
    cells = side // factor
    vae_tiles, latent_tiles = plan.vae_mode(bundle, cells, cells), plan.latent_tiles(bundle, cells, cells)
    assert isinstance(vae_tiles, Tiling)
    vae_pixels = vae_tiles.scaled(factor)
    z_lq = restorer.stages.encode(lq)
    pixels = restorer.stages.decode(z_lq)
    center = restorer.stages.encode_clean(pixels)
    texts = restorer.stages.conditioning(settings)
    z = restorer.stages.sample(z_lq, texts, settings, center=center)
    in_tiles = restorer.stages.sample(z_lq, texts, settings, center=center, tiles=latent_tiles)
    band = _BAND_CELLS
    rows = SlicedVae()
    return {
        "denoise encoder, exact": {"psnr_db": psnr(restorer.stages.encode(lq, vae_mode=rows), z_lq)},
        "vae decoder, exact": {"psnr_db": psnr(restorer.stages.decode(z_lq, vae_mode=rows), pixels)},
        "vae encoder, exact": {"psnr_db": psnr(restorer.stages.encode_clean(pixels, vae_mode=rows), center)},
        "denoise encoder": compare(restorer.stages.encode(lq, vae_mode=vae_tiles), z_lq, vae_tiles, band),
        "vae decoder": compare(restorer.stages.decode(z_lq, vae_mode=vae_tiles), pixels, vae_pixels, band * factor),
        "vae encoder": compare(restorer.stages.encode_clean(pixels, vae_mode=vae_tiles), center, vae_tiles, band),
        "sampling, latent": compare(in_tiles, z, latent_tiles, band),
        "sampling, picture": compare(
            restorer.stages.decode(in_tiles), restorer.stages.decode(z), latent_tiles.scaled(factor), band * factor
        ),
    }


def face_seams(
    found: NDArray[np.float32], plain: NDArray[np.float32], squares: Sequence[Box], band: int
) -> dict[str, float]:
    """Return what pasting has changed along the squares' borders, and elsewhere in them.

    Args:
        found, plain: f32[H,W,3], with faces and without.
        squares: that were pasted.
        band: in pixels, on either side of a border; the picture's own edge is none.
    Returns:
        The root mean square of the change in both places, their ratio, and the ratio of how much it changes from a
        pixel to the next one: a paste without a mask has a small step everywhere but at the border.
    """
    height, width = plain.shape[:2]
    border, inside = np.zeros((height, width), bool), np.zeros((height, width), bool)
    for square in squares:
        square.of(inside)[...] = True
        rows = slice(max(0, square.top - band), square.bottom + band)
        columns = slice(max(0, square.left - band), square.right + band)
        for side, limit in ((square.left, width), (square.right, width)):
            if 0 < side < limit:
                border[rows, max(0, side - band) : side + band] = True
        for side, limit in ((square.top, height), (square.bottom, height)):
            if 0 < side < limit:
                border[max(0, side - band) : side + band, columns] = True
    change = found.astype(np.float64) - plain
    steps = np.zeros_like(change)
    steps[:, 1:] += np.abs(np.diff(change, axis=1))
    steps[1:] += np.abs(np.diff(change, axis=0))
    elsewhere = inside & ~border
    (along, rest), (along_steps, rest_steps) = (
        [math.sqrt(np.mean(values[part] ** 2)) for part in (border, elsewhere)] for values in (change, steps)
    )
    return {
        "rms_along_borders": along,
        "rms_elsewhere": rest,
        "ratio": along / max(rest, 1e-30),
        "ratio_of_steps": along_steps / max(rest_steps, 1e-30),
    }


def measure_faces(restorer: Restorer, image: Path, steps: int) -> dict[str, Any]:
    """Return the seams of a photo's faces.

    Raises:
        ImageError: it has none that are restored.
    """
    photo = load_photo(image)
    plain = restorer.restore(photo, steps=steps)
    with FaceRestorer.open(restorer) as faces:
        done = faces.restore(photo, plain)
    squares = [
        Box(*face["square_px"]).scaled(photo.size, plain.photo.size)
        for face in done.provenance["faces"]["found"]
        if face["done"] == "restored"
    ]
    if not squares:
        raise ImageError("no face of it is restored", where=image, found=told(done.provenance["faces"]))
    seams = face_seams(done.photo.rgb, plain.photo.rgb, squares, _BAND_CELLS * restorer.bundle.pixels_per_cell)
    return {"faces": len(squares), **seams}


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("python benchmarks/seams.py", __doc__)
    parser.add_argument("--bundle", type=path_option, metavar="DIR")
    parser.add_argument("--image", type=path_option, required=True, metavar="FILE")
    parser.add_argument("--size", type=whole_number(64, 8192), metavar="PX", help="default: twice the bundle's tile")
    parser.add_argument("--tile", type=whole_number(64, 8192), metavar="PX", help="default: the bundle's tile")
    parser.add_argument("--vae-tile", type=whole_number(64, 8192), default=512, metavar="PX")
    parser.add_argument("--steps", type=whole_number(1, 1000), default=4, metavar="N")
    parser.add_argument("--faces", action="store_true", help="measure the faces of the photo instead")
    parser.add_argument("--json", type=path_option, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.faces:
        return _faces(options)
    with Restorer.open(options.bundle) as restorer:
        tile = options.tile or default_tile(restorer.bundle)
        side = options.size or 2 * tile
        found = measure(restorer, options.image, side, SizePlan(tile, options.vae_tile), options.steps)
    print(f"{side} × {side}, tiles of {tile}, VAE tiles of {options.vae_tile} pixels, {options.steps} steps\n")
    print("| part | PSNR, dB | error along borders | elsewhere | ratio |\n|---|---:|---:|---:|---:|")
    for part, row in found.items():
        errors = (f"{row[name]:.3g}" if name in row else "" for name in ("rms_along_borders", "rms_elsewhere", "ratio"))
        print(f"| {part} | {row['psnr_db']:.1f} | {' | '.join(errors)} |")
    if options.json is not None:
        report = {"machine": describe_machine(), "side_px": side, "tile_px": tile, "vae_tile_px": options.vae_tile}
        options.json.write_text(json.dumps({**report, "steps": options.steps, "parts": found}, indent=1) + "\n")
    return 0


def _faces(options: argparse.Namespace) -> int:
    """Print, and write, the seams of a photo's faces."""
    with Restorer.open(options.bundle) as restorer:
        found = measure_faces(restorer, options.image, options.steps)
    print(f"{found.pop('faces')} faces of {options.image.name}, {options.steps} steps\n")
    print("| change along borders | elsewhere | ratio | ratio of steps |\n|---:|---:|---:|---:|")
    print(f"| {' | '.join(f'{value:.3g}' for value in found.values())} |")
    if options.json is not None:
        report = {"machine": describe_machine(), "image": options.image.name, "steps": options.steps, "faces": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
