"""Options of the commands that open a bundle: which one, on which backend and device, with how much of the computer."""

from __future__ import annotations

import argparse
from typing import Any

from engine.backends import BACKENDS, MAX_THREADS
from engine.backends.ov_library import COMPUTES
from engine.bundle.manifest import default_bundle_dir
from engine.cli.options import gibibytes, path_option, whole_number


def add_engine(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the group of options that say how a bundle is opened, and return it."""
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--bundle",
        type=path_option,
        default=default_bundle_dir(),
        metavar="DIR",
        help=f"default: {default_bundle_dir()}",
    )
    engine.add_argument(
        "--backend",
        choices=BACKENDS,
        help="default: the one that the bundle was built for, or the fastest that is installed",
    )
    engine.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="cpu; cuda or cuda:N, an NVIDIA GPU; cuda:all, each of them with photos of its own (restore only); "
        "gpu or npu, Intel's, with openvino; "
        "default: the CPU for onnxruntime and openvino, else the first NVIDIA GPU",
    )
    engine.add_argument(
        "--compute",
        choices=COMPUTES,
        default="auto",
        help="type that openvino computes in on a CPU; default: bf16 if the bundle is in fp16 or bf16 and the CPU is "
        "faster in it (AMX, or AMD's AVX-512), else fp32",
    )
    engine.add_argument(
        "--vram-budget",
        type=gibibytes,
        metavar="GIB",
        help="GPU memory that may be used; networks that do not fit are loaded and released by stage, which is slower",
    )
    engine.add_argument(
        "--threads",
        type=whole_number(0, MAX_THREADS, " (one per core)"),
        default=0,
        metavar="N",
        help="CPU threads; default: one per core, and more than that only slows it down",
    )
    return engine


def engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `Restorer.open` is called with."""
    return {
        "bundle": options.bundle,
        "backend": options.backend,
        "device": options.device,
        "threads": options.threads,
        "compute": options.compute,
        "vram_budget_gib": options.vram_budget,
    }
