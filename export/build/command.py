r"""Build a bundle: checkpoints and LoRAs → merged weights → verified ONNX graphs.

python export/build_engines.py                                    the demo model
python export/build_engines.py --sdxl sd_xl_base_1.0.safetensors \
        --unet sdxl_lightning_8step_unet.safetensors --supir SUPIR-v0Q.ckpt \
        --tokenizer tokenizer/ --lora landscape=landscape.safetensors --lora face=face.safetensors:0.8
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.backends import BACKENDS
from engine.bundle.graphspec import PRECISION_DTYPES
from engine.bundle.manifest import Graph, default_bundle_dir
from engine.bundle.verification import Verification
from engine.cli.options import command_parser
from engine.errors import BuildError, CheckpointError, UsageError, printable
from engine.units import format_bytes
from export.build.presets import PRESETS
from export.build.request import VERIFY, BuildRequest, LoraRequest
from export.checkpoint.tokenizer import tokenizer_place
from export.trt.compile import DEFAULT_TARGETS

#: What the extra `build` brings, and what only `export` does.
_BUILD_PACKAGES = ("google", "ml_dtypes", "onnx", "safetensors")
_EXPORT_PACKAGES = ("diffusers", "onnx_ir", "onnxscript", "torch")


def build_engines(arguments: Sequence[str]) -> int:
    """Run the command; raises RestoreError where it fails."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in (*_BUILD_PACKAGES, *_EXPORT_PACKAGES):
            raise
        extra = "build" if package in _BUILD_PACKAGES else "export"
        raise BuildError(
            "building needs more than the engine",
            found=f"no module {error.name}",
            fix=f"pip install -e '.[{extra}]'",
        ) from error


def _run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    request = _request(options)
    # After the arguments, so that --help and mistakes are quick.
    from export.build.build_plan import make_plan
    from export.build.steps import build, estimate

    plan = make_plan(request, _say)
    if options.dry_run:
        described = plan.describe()
        print(json.dumps(described, indent=1) if options.json else printable(_plan_text(described)))
        return 0
    with _Bar(sum(estimate(plan).values()), quiet=options.quiet) as bar:
        result = build(plan, bar, bar.say)
    manifest = result.manifest
    if options.json:
        report = {
            "status": result.status,
            "bundle": str(request.output),
            "changes": result.changes,
            "resumed": result.resumed,
            "seconds": round(time.monotonic() - started, 2),
            "manifest": manifest.model_dump(mode="json"),
        }
        print(json.dumps(report, indent=1))
    elif result.status == "unchanged":
        print(f"{request.output} is up to date.")
    else:
        print(f"Built {request.output} in {time.monotonic() - started:.0f} s.")
        for lora in manifest.loras:
            print(printable(f"  merged LoRA {lora.name} {_lora_text(lora.model_dump())}"))
        for name, graph in manifest.graphs.items():
            stored = ", weights in int8" if graph.weights_in_int8 else ""
            print(f"  {name:<16} {graph.spec.precision}{stored}  {_verified(graph.verification)}{_plan_of(graph)}")
    return 0


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr)


def _verified(verification: Verification) -> str:
    """Return what is known of a graph: agreement with torch, and apart from it what was seen in this build."""
    traced, built, in_slices = verification.when_traced, verification.in_build, verification.trial.in_slices
    known = []
    if built is not None:
        known.append(f"agrees with torch to {built.worst:.1e}")
    elif traced is not None:
        known.append(f"agreed with torch to {traced.worst:.1e} when it was traced")
    known.append("runs on these weights" if in_slices is None else f"runs, in slices too ({in_slices:.1e})")
    return ", ".join(known)


def _plan_of(graph: Graph) -> str:
    if graph.plan is None:
        return ""
    size, targets = format_bytes(graph.plan.file.bytes), ", ".join(graph.plan.targets)
    source = "by the engine inspector" if graph.plan.audit.inspected_share else "by the typed graph"
    share = f"{graph.plan.audit.share_16_bit:.1%} of its work in 16 bits {source}"
    return f"; compiled for {targets} ({size}), {share}"


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python export/build_engines.py",
        (__doc__ or "").split("\n\n")[0],
        epilog="With no checkpoint named, the demo is built into the place where engine.restore looks, with the\n"
        "LoRAs that --lora names, or else with its own where the preset merges some.",
    )
    files = parser.add_argument_group("checkpoints")
    files.add_argument("--sdxl", type=Path, metavar="FILE|DIR", help="base: one file, or a diffusers folder")
    files.add_argument(
        "--unet",
        type=Path,
        metavar="FILE|DIR",
        help="replaces the base's UNet (SDXL-Lightning's files), in diffusers' or LDM names",
    )
    files.add_argument("--supir", type=Path, metavar="FILE", help="SUPIR v0Q or v0F")
    files.add_argument(
        "--lora",
        type=_lora,
        action="append",
        default=[],
        metavar="NAME=FILE[:SCALE]",
        help="LoRA, LoHa, LoKr or DoRA, a file or folder; merged into the base, times SCALE (default 1); repeatable",
    )
    files.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="CLIP's vocabulary; default: tokenizer/ of a diffusers folder"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--preset", choices=PRESETS, default="ours", help="sampling defaults (default: %(default)s)")
    how.add_argument(
        "--precision", choices=PRECISION_DTYPES, help="of the networks (default: fp16 for plans, else fp32)"
    )
    how.add_argument(
        "--weights",
        choices=("int8",),
        help="store the matrices of all networks but the VAE in 8 bits, a scale per output channel: "
        "engines and bundles of 16 bits become up to half as large (default: in the precision of the networks)",
    )
    how.add_argument(
        "--min-size",
        type=int,
        metavar="PX",
        help="least shorter side that the networks see (default: 256 for the demo, else 1024)",
    )
    how.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="that the bundle is for (default: %(default)s); the others compile plans for NVIDIA's GPUs, "
        "tensorrt-rtx on any computer, tensorrt for the GPU at hand",
    )
    how.add_argument(
        "--verify",
        choices=VERIFY,
        default=VERIFY[0],
        help="trial runs every graph once on the merged weights; torch compares it with PyTorch's result as well "
        "(needs the extra `export`; default: %(default)s)",
    )
    how.add_argument(
        "--retrace",
        action="store_true",
        help="trace the networks with this computer's PyTorch instead of taking the traces that ship with the project",
    )
    plans = parser.add_argument_group("plans")
    plans.add_argument(
        "--compute-capability",
        metavar="LIST",
        default="",
        help=f"GPUs to compile for (tensorrt-rtx; default: {','.join(DEFAULT_TARGETS)})",
    )
    plans.add_argument(
        "--shapes",
        metavar="LIST",
        default="",
        help="working sizes in pixels: 1024 or 1024x768 is fixed and fastest, 512-2048 takes any side between; "
        "default: the least working size, and a range from 64 to twice as much",
    )
    plans.add_argument("--batch", type=int, default=1, metavar="N", help="photos restored together (default: 1)")
    plans.add_argument(
        "--strip-weights",
        action="store_true",
        help="plans without weights: small, and another LoRA or checkpoint needs no compiling; "
        "compiled for the GPU at hand",
    )
    plans.add_argument(
        "--weight-streaming",
        action="store_true",
        help="plans whose weights may stay in the computer's memory: for GPUs that hold not even one stage's, "
        "with engine.restore --vram-budget",
    )
    where = parser.add_argument_group("where and what")
    where.add_argument("--output", type=Path, metavar="DIR", help=f"of the bundle (default: {default_bundle_dir()})")
    where.add_argument("--dry-run", action="store_true", help="say what would be read, merged and written")
    where.add_argument("--json", action="store_true", help="print a report as JSON")
    where.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _lora(text: str) -> LoraRequest:
    name, equals, rest = text.partition("=")
    if not (name and equals and rest):
        raise argparse.ArgumentTypeError(f"expected NAME=FILE[:SCALE], got {text!r}")
    path, colon, scale = rest.rpartition(":")
    try:
        return LoraRequest(name, Path(path), float(scale)) if colon else LoraRequest(name, Path(rest))
    except ValueError:  # a colon in the file's name
        return LoraRequest(name, Path(rest))


def _request(options: argparse.Namespace) -> BuildRequest:
    common = {
        "output": options.output or default_bundle_dir(),
        "preset": options.preset,
        "precision": options.precision or ("fp32" if options.backend == BACKENDS[0] else "fp16"),
        "weights": options.weights,
        "backend": options.backend,
        "targets": tuple(part.strip() for part in options.compute_capability.split(",") if part.strip()),
        "shapes": options.shapes,
        "batch": options.batch,
        "weight_stripped": options.strip_weights,
        "weight_streaming": options.weight_streaming,
        "verify": options.verify,
        "retrace": options.retrace,
        "settings": {} if options.min_size is None else {"min_size": options.min_size},
    }
    named = [name for name in ("sdxl", "unet", "supir", "tokenizer") if getattr(options, name) is not None]
    if not named:
        return _demo_request(common, tuple(options.lora))
    for name in ("sdxl", "supir"):
        if name not in named:
            raise UsageError(
                f"--{name} is missing",
                expected="--sdxl and --supir together, or neither for the demo",
                found=", ".join(f"--{name}" for name in named),
            )
    return BuildRequest(
        sdxl=options.sdxl,
        unet=options.unet,
        supir=options.supir,
        tokenizer=tokenizer_place(options.tokenizer, options.sdxl),
        loras=tuple(options.lora),
        **common,
    )


def _demo_request(common: dict[str, Any], loras: tuple[LoraRequest, ...]) -> BuildRequest:
    from export.demo import files

    if not files.SDXL.is_file():
        raise CheckpointError(
            "the demo's weights are not here",
            where=files.WEIGHTS,
            fix="build in a whole checkout of the project, or name your own --sdxl and --supir",
        )
    if not loras and PRESETS[common["preset"]].loras == "needed":
        loras = tuple(LoraRequest(name, path) for name, path in files.LORAS.items())
    common["settings"] = {**files.SETTINGS, **common["settings"]}
    return BuildRequest(
        sdxl=files.SDXL,
        supir=files.SUPIR,
        tokenizer=files.TOKENIZER,
        loras=loras,
        notice=files.NOTICE,
        **common,
    )


class _Bar:
    """Stage, percent and time left, on stderr."""

    def __init__(self, total: float, *, quiet: bool) -> None:
        self._bar = tqdm(
            total=total,
            disable=quiet,
            file=sys.stderr,
            bar_format="{desc:<24} {percentage:3.0f} % |{bar}| {elapsed}, about {remaining} left",
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def stage(self, name: str) -> None:
        self._bar.set_description_str(name)

    def advance(self, amount: float) -> None:
        self._bar.update(min(amount, self._bar.total - self._bar.n))

    def say(self, line: str) -> None:
        self._bar.write(printable(line), file=sys.stderr)


def _plan_text(plan: dict[str, Any]) -> str:
    types = plan["precision"] + (f", weights in {plan['weights']}" if plan["weights"] else "")
    lines = [f"Would build {plan['output']}: preset {plan['preset']}, {types}, {plan['backend']}"]
    for source in plan["read"]:
        files = ", ".join(Path(file).name for file in source["files"])
        ignored = f", {source['ignored']} of no network ignored" if source["ignored"] else ""
        lines.append(
            f"  read   {source['role']:<6} {files} ({source['layout']}): "
            f"{source['tensors']} tensors, {format_bytes(source['bytes'])}{ignored}"
        )
    for lora in plan["merge"]:
        lines.append(f"  merge  {lora['name']} {_lora_text(lora)}")
    write = plan["write"]
    lines.append(f"  write  weights: {write['parameters']:,} parameters, {format_bytes(write['weights_bytes'])}")
    for graph in write["graphs"]:
        lines.append(f"  write  {graph['name']:<16} {graph['precision']}, trace {graph['trace']}")
        lines += [f"         plan for {profile}" for profile in graph["profiles"]]
    if write["targets"]:
        lines.append(f"  write  plans for compute capability {', '.join(write['targets'])}")
    return "\n".join(lines)


def _lora_text(lora: Mapping[str, Any]) -> str:
    """Return what is said of a LoRA, by the fields that a plan's description and the manifest share."""
    rank = f"rank {_list(lora['ranks'])}, alpha {_list(lora['alphas'])}, " if lora["ranks"] or lora["alphas"] else ""
    return f"× {lora['scale']:g}: {', '.join(lora['kinds'])}, {rank}{lora['layers']} weights"


def _list(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
