r"""Train a LoRA for an SDXL checkpoint on a folder of pictures.

python export/train_lora.py --sdxl sd_xl_base_1.0.safetensors --tokenizer tokenizer/ \
        --images faces/ --output face.safetensors
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from engine.bundle.storage import cache_dir
from engine.cli.captions import SIDECAR, add_captions
from engine.cli.options import command_parser, path_option, whole_number
from engine.errors import RestoreError, UsageError, printable
from engine.units import format_duration
from export.checkpoint.tokenizer import tokenizer_place
from export.training.request import FORMATS, LAYERS, TrainRequest

#: What the extra `train` brings beside the engine.
_PACKAGES = ("diffusers", "matplotlib", "ml_dtypes", "peft", "safetensors", "scipy", "torch")
_MULTIPLE_PX = 64


def train(arguments: Sequence[str]) -> int:
    """Run the command; raises RestoreError where it fails."""
    options = _parser().parse_args(arguments)
    request = _request(options)
    started = time.monotonic()
    try:  # after the arguments, so that --help and mistakes are quick
        from export.training.prepare import Reporter
        from export.training.run import train_lora

        trained = train_lora(request, Reporter(_say, options.quiet))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        raise RestoreError(
            "training needs more than the engine",
            found=f"no module {error.name}",
            fix="pip install -e '.[train]'",
        ) from error
    if options.json:
        seconds = round(time.monotonic() - started, 1)
        print(json.dumps({**asdict(trained), "seconds": seconds}, indent=1, default=str))
        return 0
    print(
        printable(
            f"Wrote {trained.output}: {trained.steps} steps on {trained.trained_on} pictures in "
            f"{format_duration(time.monotonic() - started)}.\n"
            f"  held-out loss {trained.before:.4f} before, {trained.after:.4f} after; curves: {trained.curves}\n"
            f"  merge it: python export/build_engines.py --lora {trained.output.stem}={trained.output} …"
        )
    )
    return 0


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr)


def _request(options: argparse.Namespace) -> TrainRequest:
    if options.size % _MULTIPLE_PX:
        raise UsageError(
            "impossible size", where="--size", expected=f"a multiple of {_MULTIPLE_PX}", found=options.size
        )
    return TrainRequest(
        sdxl=options.sdxl,
        unet=options.unet,
        supir=options.supir,
        tokenizer=tokenizer_place(options.tokenizer, options.sdxl),
        images=options.images,
        recursive=options.recursive,
        output=options.output,
        overwrite=options.overwrite,
        work=options.work or options.output.with_suffix(".training"),
        cache=options.cache or cache_dir() / "training",
        size_px=options.size,
        buckets=options.buckets,
        caption=options.caption,
        caption_model=options.caption_model,
        layers=options.layers,
        rank=options.rank,
        alpha=float(options.rank) if options.alpha is None else options.alpha,
        form=options.format,
        steps=options.steps,
        batch=options.batch,
        at_once=min(options.at_once, options.batch),
        learning_rate=options.learning_rate,
        warm_up=options.warm_up,
        frobenius=options.frobenius,
        ema=options.ema,
        no_text_share=options.no_text,
        held_out=options.held_out,
        every=options.every,
        samples=not options.no_samples,
        precision=options.precision,
        device=options.device,
        checkpointing=not options.no_checkpointing,
        seed=options.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python export/train_lora.py",
        (__doc__ or "").rstrip(),
        epilog="A training that was stopped goes on where its last state was written, to the same bytes: run the same\n"
        "command again.",
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--sdxl", type=path_option, required=True, metavar="FILE|DIR", help="base: one file, or a diffusers folder"
    )
    files.add_argument(
        "--images", type=path_option, required=True, metavar="DIR", help="pictures; those that cannot be used are told"
    )
    files.add_argument("--recursive", action="store_true", help="those in its subfolders too")
    files.add_argument(
        "--output", type=path_option, required=True, metavar="FILE", help="the LoRA, a .safetensors file"
    )
    files.add_argument("--overwrite", action="store_true", help="replace it, if it is there")
    files.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="names of its tensors: kohya's, which build_engines.py, ComfyUI and diffusers read, or PEFT's as "
        "diffusers writes them (default: %(default)s)",
    )
    files.add_argument("--unet", type=path_option, metavar="FILE|DIR", help="replaces the base's UNet")
    files.add_argument(
        "--supir",
        type=path_option,
        metavar="FILE",
        help="SUPIR v0Q or v0F: train under its control, on pictures degraded as in the paper's Table 1",
    )
    files.add_argument(
        "--tokenizer", type=path_option, metavar="DIR", help="CLIP's vocabulary; default: that of a diffusers folder"
    )
    files.add_argument(
        "--work",
        type=path_option,
        metavar="DIR",
        help="folder of state, log, curves and samples; default: beside the output, as NAME.training",
    )
    files.add_argument(
        "--cache", type=path_option, metavar="DIR", help="folder of latents and texts; default: in the user's cache"
    )
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument(
        "--size", type=whole_number(64, 2048), default=512, metavar="PX", help="side of each (default: %(default)s)"
    )
    pictures.add_argument(
        "--buckets", action="store_true", help="keep their shapes, in steps of 64 pixels, at about the same area"
    )
    pictures.add_argument(
        "--held-out",
        type=whole_number(1, 10_000),
        metavar="N",
        help="pictures that are not trained on, to judge by; default: a tenth, at most 100",
    )
    add_captions(parser, default=SIDECAR, what="what pictures show, for the networks to learn")
    lora = parser.add_argument_group("LoRA")
    lora.add_argument(
        "--layers",
        choices=tuple(LAYERS),
        default="attention",
        help="; ".join(f"{name}: {meaning}" for name, meaning in LAYERS.items()) + " (default: %(default)s)",
    )
    lora.add_argument(
        "--rank", type=whole_number(1, 1024), default=16, metavar="N", help="of each layer (default: %(default)s)"
    )
    lora.add_argument(
        "--alpha", type=_positive, metavar="X", help="the change is multiplied by alpha / rank; default: the rank"
    )
    lora.add_argument(
        "--frobenius",
        type=_not_negative,
        default=0.0,
        metavar="X",
        help="weight of the factors' squared norms in the loss, λ of the paper's Eq. 16 (default: %(default)s)",
    )
    lora.add_argument(
        "--ema", type=_share, metavar="X", help="write a running average of this decay, such as 0.999; default: none"
    )
    steps = parser.add_argument_group("training")
    steps.add_argument(
        "--steps",
        type=whole_number(1, 1_000_000),
        default=1000,
        metavar="N",
        help="of the optimizer (default: %(default)s); a finished training goes on if there are more",
    )
    steps.add_argument(
        "--batch",
        type=whole_number(1, 65_536),
        default=256,
        metavar="N",
        help="pictures of each step, whose gradients are summed (default: %(default)s, the paper's)",
    )
    steps.add_argument(
        "--at-once",
        type=whole_number(1, 1024),
        default=1,
        metavar="N",
        help="of them, that go through the network together: faster, and more memory (default: %(default)s)",
    )
    steps.add_argument(
        "--learning-rate", type=_positive, default=1e-4, metavar="X", help="AdamW's (default: %(default)s, the paper's)"
    )
    steps.add_argument(
        "--warm-up",
        type=whole_number(0, 1_000_000),
        default=0,
        metavar="N",
        help="steps over which it rises (default: %(default)s)",
    )
    steps.add_argument(
        "--no-text",
        type=_share,
        default=0.1,
        metavar="X",
        help="share of pictures that come without their captions, for guidance (default: %(default)s)",
    )
    steps.add_argument(
        "--seed", type=whole_number(0, 2**31 - 1), default=0, metavar="N", help="of all that is random (default: 0)"
    )
    steps.add_argument(
        "--every",
        type=whole_number(1, 1_000_000),
        default=100,
        metavar="N",
        help="steps between two looks at held-out pictures: their loss, samples, curves (default: %(default)s)",
    )
    steps.add_argument("--no-samples", action="store_true", help="only their loss and curves")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", metavar="NAME", help="cpu or cuda:N; default: a GPU, if there is one")
    machine.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="of the frozen base and of products; the LoRA is in fp32; default: bf16 where the device computes in it",
    )
    machine.add_argument(
        "--no-checkpointing",
        action="store_true",
        help="keep all activations instead of computing them twice: faster, and more memory",
    )
    report = parser.add_argument_group("output")
    report.add_argument("--quiet", action="store_true", help="no progress bars")
    report.add_argument("--json", action="store_true", help="print a report as JSON")
    return parser


def _positive(text: str) -> float:
    value = _not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return value


def _share(text: str) -> float:
    value = _not_negative(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return value
