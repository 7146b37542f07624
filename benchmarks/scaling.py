"""How time and memory grow with a photo's pixels.

python benchmarks/scaling.py --bundle bundles/ours --megapixels 0.25 0.5 1 2 4 8 12 --steps 2 --json scaling.json

Each size is the command `python -m engine.restore` in a process of its own, so that its peak memory is its own.
The picture is one photo, resized to 4 : 3. The slope is that of log time over log pixels: 1 is linear. Sizes up
to four of the bundle's tiles are sampled whole, larger ones in tiles: `--tile` and `--vae-tiles` fix the
way, so that one slope is about one way.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.machine import describe_machine
from engine.cli.console import run_command
from engine.cli.options import command_parser, path_option, whole_number
from engine.errors import RestoreError
from engine.units import format_memory

_RATIO = 4 / 3


def sides(megapixels: float) -> tuple[int, int]:
    """Return (width, height) of a 4 : 3 photo of so many million pixels."""
    height = round((megapixels * 1e6 / _RATIO) ** 0.5)
    return round(height * _RATIO), height


def slope(rows: Sequence[dict[str, Any]], value: str) -> float:
    """Return the slope of a value over the pixels, both as logarithms, by least squares."""
    pixels, values = ([float(row[name]) for row in rows] for name in ("pixels", value))
    return float(np.polyfit(np.log(pixels), np.log(values), 1)[0])


def measure(size: tuple[int, int], image: Path, options: Sequence[str], folder: Path) -> dict[str, Any]:
    """Restore the image at a size and return what the command reports.

    Raises:
        RestoreError: the command failed; its message is part of it.
    """
    photo, output = folder / "photo.png", folder / "out.png"
    with Image.open(image) as opened:
        opened.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(photo, compress_level=1)
    command = [
        sys.executable,
        "-m",
        "engine.restore",
        str(photo),
        "-o",
        str(output),
        "--overwrite",
        "--quiet",
        "--json",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RestoreError("the command failed", where=f"{size[0]} × {size[1]}", found=done.stderr.strip()[-500:])
    report = json.loads(done.stdout)[0]
    return {
        "size": size,
        "pixels": size[0] * size[1],
        "total_ms": report["total_ms"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "graphs_ms": report["graphs_ms"],
        "outside_ms": report["outside_ms"],
        "size_plan": report.get("size_plan"),
    }


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("python benchmarks/scaling.py", __doc__)
    parser.add_argument("--bundle", type=path_option, metavar="DIR")
    parser.add_argument("--image", type=path_option, default=Path("tests/data/coffee.jpg"), metavar="FILE")
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4, 8, 12], metavar="MP")
    parser.add_argument("--steps", type=whole_number(1, 1000), default=2, metavar="N")
    parser.add_argument("--tile", default="auto", metavar="auto|off|PX")
    parser.add_argument("--vae-tiles", default="auto", metavar="auto|off|exact|fast")
    parser.add_argument("--json", type=path_option, metavar="FILE")
    options = parser.parse_args(arguments)
    passed = ["--steps", str(options.steps), "--tile", options.tile, "--vae-tiles", options.vae_tiles]
    passed += [] if options.bundle is None else ["--bundle", str(options.bundle)]
    rows: list[dict[str, Any]] = []
    print("| size | megapixels | s | s per megapixel | peak memory | way |\n|---|---:|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for megapixels in tqdm(sorted(options.megapixels), unit="size", file=sys.stderr):
            row = measure(sides(megapixels), options.image, passed, Path(folder))
            rows.append(row)
            _print(row)
            if options.json is not None:  # each time: the largest sizes take long, and may be stopped
                _write(options.json, rows, options.steps)
    if len(rows) > 1:
        print(f"\nslope of time: {slope(rows, 'total_ms'):.2f}")
    return 0


def _print(row: dict[str, Any]) -> None:
    size, seconds, million = row["size"], row["total_ms"] / 1e3, row["pixels"] / 1e6
    plan = row["size_plan"] or {}
    ways = [
        f"{what} {plan[key]}" for what, key in (("tiles", "tile_px"), ("VAE tiles", "vae_tile_px")) if plan.get(key)
    ]
    way = ", ".join(ways + ["VAE in slices"] * bool(plan.get("vae_in_slices")))
    memory = format_memory(row["peak_memory_bytes"])
    per_million = seconds / million
    cells = (f"{size[0]} × {size[1]}", f"{million:.2f}", f"{seconds:.1f}", f"{per_million:.1f}", memory, way or "whole")
    print(f"| {' | '.join(cells)} |", flush=True)


def _write(file: Path, rows: list[dict[str, Any]], steps: int) -> None:
    found: dict[str, Any] = {"machine": describe_machine(), "steps": steps, "rows": rows}
    if len(rows) > 1:
        found["slope"] = slope(rows, "total_ms")
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
