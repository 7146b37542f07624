"""How well a bundle restores: Table 1 and Table 2 of the paper, on pictures whose truth is known.

    python benchmarks/quality.py --bundle bundles/ours --bundle bundles/lightning --sheet sheet.png
    python benchmarks/quality.py --runtime onnxruntime openvino-bf16

Each image is degraded as in Table 1, by noise of its own seed, and restored with each bundle's own
defaults. All figures are means over the images, in [0, 1]; PSNR and SSIM are scikit-image's,
`benchmarks/metrics.py` says what the others are. Beside the bundles stand the degraded image enlarged by bicubic
interpolation; non-local means and BM3D, told the noise's strength; Real-ESRGAN; and what the paper
publishes for its own images, which are others. Several bundles, or one in several runtimes, are also
compared with the first of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import numpy as np
from tqdm import tqdm

from benchmarks import metrics, paper
from benchmarks.classics import CLASSICS, Classic, installed_classics
from benchmarks.images import SOURCES, Rgb, contact_sheet, load_images
from benchmarks.machine import describe_machine
from benchmarks.runtimes import ENGINES
from engine.bundle.manifest import default_bundle_dir
from engine.cli.console import run_command
from engine.cli.options import command_parser, parser_of, whole_number
from engine.errors import BackendError, UsageError
from engine.image.photo import resize
from engine.settings import Settings
from export.training.degrade import TABLE_1, Degradation, degrade

Judge = Callable[[Rgb, Rgb], dict[str, float | None]]
_NO_LPIPS = "needs --lpips"
#: What the tables beyond the paper's show: by key, the column's head and its decimals.
_COLUMNS = {
    "haarpsi": ("HaarPSI ↑", 4),
    "gmsd": ("GMSD ↓", 4),
    "mdsi": ("MDSI ↓", 4),
    "edges": ("edges, 1 is best", 3),
    **{f"detail_{band}": (f"{band} detail, dB, 0 is best", 1) for band in metrics.BANDS},
}


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = _parser().parse_args(arguments)
    images = load_images(options.images, options.side)
    images = dict(list(images.items())[: options.limit])
    judge = _judge(options.lpips)
    classics, missing = installed_classics()
    wanted = CLASSICS if options.classics is None else options.classics
    for name in wanted:
        if name in missing and options.classics is not None:
            raise UsageError("the package of a method is not installed", where=name, fix=missing[name])
        if name in missing:
            print(f"{name} is left out: {missing[name]}", file=sys.stderr)
    classics = {name: method for name, method in classics.items() if name == "bicubic" or name in wanted}
    given = dict(options.set or ())
    restorers = _open(options.bundle or [default_bundle_dir()], options.runtime or [None], options.threads)
    names = list(restorers)
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "images": list(images),
        "image_sha256": {name: hashlib.sha256(rgb.tobytes()).hexdigest() for name, rgb in images.items()},
        "side_px": options.side,
        "seed": options.seed,
        "bundles": [
            {
                "variant": name,
                "digest": restorer.bundle.digest,
                "settings": restorer.defaults.updated(given).model_dump(mode="json"),
            }
            for name, restorer in restorers.items()
        ],
        "round_trip": _means([judge(truth, _round_trip(restorers[names[0]], truth)) for truth in images.values()]),
        "rows": [],
    }
    rows, labels = [], []
    with tqdm(total=len(TABLE_1) * len(images), unit="image", file=sys.stderr, disable=options.quiet) as bar:
        for name, degradation in TABLE_1.items():
            scores: dict[str, list[dict[str, float | None]]] = {}
            to_first: dict[str, list[float]] = {}
            for index, (image, truth) in enumerate(images.items()):
                lq = degrade(truth, degradation, np.random.default_rng([options.seed, index]))
                pictures = _restore_all(lq, degradation, truth, classics, restorers, given)
                for method in names[1:]:
                    to_first.setdefault(method, []).append(_psnr(pictures[names[0]], pictures[method]))
                for method, picture in pictures.items():
                    if method != "truth":
                        scores.setdefault(method, []).append(judge(truth, picture))
                kept = ["bicubic", "stage 1", names[0], "truth"]
                rows.append([pictures[method] for method in kept])
                labels.append(f"{image}: {name}")
                bar.update()
            report["rows"] += [
                {
                    "degradation": name,
                    "method": method,
                    "per_image": found,
                    **_means(found),
                    **({"psnr_to_first": to_first[method]} if method in to_first else {}),
                }
                for method, found in scores.items()
            ]
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(to_markdown(report))
    if options.sheet:
        contact_sheet(rows, labels, ["degraded", "stage 1", names[0], "truth"]).save(options.sheet)
    return 0


def _open(bundles: Sequence[Path], runtimes: Sequence[str | None], threads: int) -> dict[str, Any]:
    """Return each bundle's restorer in each runtime, by its preset, or its name where two have one preset."""
    from engine import Restorer

    opened = []
    for bundle, runtime in product(bundles, runtimes):
        if runtime is None:
            restorer = Restorer.open(bundle, threads=threads)
        else:
            backend, compute = ENGINES[runtime]
            restorer = Restorer.open(bundle, backend=backend, compute=compute, threads=threads)
        opened.append((runtime, restorer))
    manifests = {restorer.bundle.digest: restorer.bundle.manifest for _, restorer in opened}
    presets = [manifest.preset for manifest in manifests.values()]
    found = {}
    for runtime, restorer in opened:
        manifest = manifests[restorer.bundle.digest]
        name = manifest.preset if presets.count(manifest.preset) == 1 else manifest.name
        found[name if len(runtimes) == 1 else f"{name}, {runtime}"] = restorer
    return found


def _restore_all(
    lq: Rgb,
    degradation: Degradation,
    truth: Rgb,
    classics: dict[str, Classic],
    restorers: dict[str, Any],
    given: dict[str, Any],
) -> dict[str, Rgb]:
    size = (truth.shape[1], truth.shape[0])
    pictures = {name: resize(classic(lq, degradation), size) for name, classic in classics.items()}
    for name, restorer in restorers.items():
        if "stage 1" not in pictures:
            pictures["stage 1"] = _stage_1(restorer, pictures["bicubic"])
        pictures[name] = restorer.restore(lq, **{**given, "upscale": float(degradation.factor)}).photo.rgb
    return {**pictures, "truth": truth}


def _stage_1(restorer: Any, enlarged: Rgb) -> Rgb:
    """Return what the denoise encoder and the decoder make of an image, without sampling."""
    return _at_working_size(restorer, enlarged, restorer.stages.encode)


def _round_trip(restorer: Any, truth: Rgb) -> Rgb:
    """Return what the autoencoder gives back: the bound of what any restoration can reach."""
    return _at_working_size(restorer, truth, restorer.stages.encode_clean)


def _at_working_size(restorer: Any, rgb: Rgb, encode: Callable[[Any], Any]) -> Rgb:

    size = restorer.working_size((rgb.shape[1], rgb.shape[0]), restorer.defaults.updated({"upscale": 1.0}))
    pixels = resize(rgb, size).transpose(2, 0, 1)[None] * np.float32(2) - np.float32(1)
    decoded = restorer.stages.decode(encode(np.ascontiguousarray(pixels)))[0].transpose(1, 2, 0)
    return resize((decoded * 0.5 + 0.5).clip(0, 1).astype(np.float32), (rgb.shape[1], rgb.shape[0]))


def _judge(lpips: Path | None) -> Judge:
    from skimage.metrics import structural_similarity

    distance = _lpips_network(lpips) if lpips else None

    def judge(truth: Rgb, found: Rgb) -> dict[str, float | None]:
        return {
            "psnr": _psnr(truth, found),
            "ssim": float(structural_similarity(truth, found, data_range=1.0, channel_axis=2)),
            "haarpsi": metrics.haarpsi(truth, found),
            "gmsd": metrics.gmsd(truth, found),
            "mdsi": metrics.mdsi(truth, found),
            "edges": metrics.edge_sharpness(truth, found),
            **{f"detail_{band}": energy for band, energy in metrics.detail_energy(truth, found).items()},
            "lpips": None if distance is None else distance(truth, found),
        }

    return judge


def _psnr(truth: Rgb, found: Rgb) -> float:
    from skimage.metrics import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(truth, found, data_range=1.0))


def _lpips_network(file: Path) -> Callable[[Rgb, Rgb], float]:
    """Return the distance that an LPIPS network in ONNX gives: two inputs f32[1,3,H,W] in [-1, 1]."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no other base
        raise BackendError("cannot open the LPIPS network", where=file, found=str(error).split("\n")[0]) from error
    inputs = [value.name for value in session.get_inputs()]
    if len(inputs) != 2:
        raise UsageError("not an LPIPS network", where=file, expected="two inputs", found=inputs)

    def distance(truth: Rgb, found: Rgb) -> float:
        pair = (image.transpose(2, 0, 1)[None] * np.float32(2) - np.float32(1) for image in (truth, found))
        (value,) = session.run(None, dict(zip(inputs, pair, strict=True)))
        return float(np.asarray(value).ravel()[0])

    return distance


def _means(found: list[dict[str, float | None]]) -> dict[str, float | None]:
    return {
        metric: None if found[0][metric] is None else float(np.mean([scores[metric] for scores in found]))
        for metric in ("psnr", "ssim", *_COLUMNS, "lpips")
    }


def to_markdown(report: dict[str, Any]) -> str:
    """Return the paper's tables, and what PSNR does not see, for a person."""
    machine = report["machine"]
    lines = [
        f"{machine['date']}, {len(report['images'])} images of {report['side_px']} × {report['side_px']} px, "
        f"seed {report['seed']}; `{machine['command']}`",
        "",
        f"The autoencoder alone gives the images back at {report['round_trip']['psnr']:.2f} dB.",
        "",
        "### Table 1",
        "",
        "| degradation | method | PSNR | SSIM | LPIPS | the paper's PSNR | SSIM | LPIPS |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        published = paper.TABLE_1[row["degradation"]].get(row["method"])
        lines.append(f"| {row['degradation']} | {row['method']} | {_cells(row)} | {_published(published)} |")
    lines += ["", "### Table 2: means over Table 1's degradations", "", "| method | PSNR | SSIM | LPIPS |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for method in dict.fromkeys(row["method"] for row in report["rows"]):
        own = [row for row in report["rows"] if row["method"] == method]
        lines.append(f"| {method} | {_cells(_means(own))} |")
    for method, scores in paper.TABLE_2.items():
        lines.append(f"| *published, 60 other images:* {method} | {_published(scores)} |")
    heads = [head for head, _ in _COLUMNS.values()]
    lines += ["", "### What PSNR does not see", "", f"| degradation | method | {' | '.join(heads)} |"]
    lines.append(f"| --- | --- |{' ---: |' * len(heads)}")
    for row in report["rows"]:
        cells = [f"{row[key]:.{decimals}f}" for key, (_, decimals) in _COLUMNS.items()]
        lines.append(f"| {row['degradation']} | {row['method']} | {' | '.join(cells)} |")
    compared = [row for row in report["rows"] if "psnr_to_first" in row]
    if compared:
        first = report["bundles"][0]["variant"]
        lines += ["", f"### Against {first}: PSNR between the results", "", "| degradation | method | least | most |"]
        lines.append("| --- | --- | ---: | ---: |")
    for row in compared:
        least, most = min(row["psnr_to_first"]), max(row["psnr_to_first"])
        lines.append(f"| {row['degradation']} | {row['method']} | {least:.1f} | {most:.1f} |")
    return "\n".join(lines)


def _cells(scores: dict[str, Any]) -> str:
    lpips = _NO_LPIPS if scores["lpips"] is None else f"{scores['lpips']:.4f}"
    return f"{scores['psnr']:.2f} | {scores['ssim']:.4f} | {lpips}"


def _published(scores: paper.Scores | None) -> str:
    return " |  | " if scores is None else f"{scores.psnr:.2f} | {scores.ssim:.4f} | {scores.lpips:.4f}"


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python benchmarks/quality.py", __doc__)
    parser.add_argument(
        "--bundle", type=Path, action="append", metavar="DIR", help=f"repeatable; default: {default_bundle_dir()}"
    )
    parser.add_argument(
        "--images",
        default="photos",
        metavar="SOURCE",
        help=f"a folder, or: {'; '.join(f'{name}, {told}' for name, told in SOURCES.items())} (default: photos)",
    )
    parser.add_argument(
        "--side", type=int, default=256, metavar="PX", help="of the square in the middle (default: 256)"
    )
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="use the first N images only")
    parser.add_argument("--seed", type=int, default=0, help="of the degradations' noise")
    parser.add_argument(
        "--lpips", type=Path, metavar="FILE", help="an LPIPS network as ONNX: two images in, a number out"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help="write the pictures: degraded, stage 1, restored, truth"
    )
    parser.add_argument(
        "--runtime", nargs="+", choices=list(ENGINES), help="each bundle in each; default: as python -m engine.restore"
    )
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        metavar="NAME=VALUE",
        help="a setting instead of the bundle's, such as restore_pull=0.1; repeatable",
    )
    parser.add_argument(
        "--classics",
        nargs="*",
        choices=CLASSICS,
        metavar="NAME",
        help=f"what else to compare with, beside bicubic interpolation: any of {', '.join(CLASSICS)}, or nothing; "
        "default: all that are installed",
    )
    parser.add_argument(
        "--threads",
        type=whole_number(0, 1024),
        default=0,
        metavar="N",
        help="of the bundles' networks; 0: one per core",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    known = sorted(set(Settings.model_fields) - {"upscale"})
    if name not in known:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE with a NAME of {', '.join(known)}, got {text!r}")
    annotation = Settings.model_fields[name].annotation
    if value == "off" and NoneType in get_args(annotation):
        return name, None
    if get_origin(annotation) is Literal:
        return name, value
    try:
        return name, parser_of(name)(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from None


if __name__ == "__main__":
    sys.exit(run_command(main))
