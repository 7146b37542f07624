"""Render a model repository for NVIDIA's Triton Inference Server from a bundle.

    python triton_repo/render.py --bundle bundles/ours --output repository
    python triton_repo/render.py --bundle bundles/ours --output repository --backend onnxruntime --gpus 0

`--backend python` runs the engine's own runners inside the server's Python backend, and needs nothing else.
`onnxruntime` and `tensorrt` have the server's backends of NVIDIA's container run text towers and VAE.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from annotated_types import Ge, Le
from google.protobuf import text_format

from engine.backends.trt_library import PLAN_BACKENDS
from engine.bundle.manifest import Bundle, default_bundle_dir, open_bundle
from engine.cli.console import run_command
from engine.cli.options import command_parser, gibibytes, path_option, whole_number
from engine.errors import BundleError, OutputError, UsageError, from_os_error
from engine.memory.budget import MemoryBudget
from engine.memory.residency import host_weights
from engine.units import format_memory
from triton_repo.repository import BACKEND_FILES, MEMBERS, PYTHON_MEMBERS, SERVED_BY, DeploymentConfig, configurations
from triton_repo.serving import LIMITS, ServingConfig

#: Says that a folder is ours, and may be rendered again.
_MARK = ".rendered"
_MODEL = '''"""Rendered by triton_repo/render.py; the model is `triton_repo.models.{module}`."""

from triton_repo.models.{module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class Request:
    """What is rendered.

    Attributes:
        bundle: the bundle's folder. output: the repository's.
        served_from: the bundle's folder as the server will see it; None is where it lies now.
        layout: how it is served.
        limits: those fields of `Serving` that differ from its defaults.
        memory_bytes: of the computer or GPU that serves; None is this computer's.
    """

    bundle: Path
    output: Path
    served_from: Path | None = None
    layout: DeploymentConfig = field(default_factory=DeploymentConfig)
    limits: Mapping[str, Any] | None = None
    memory_bytes: int | None = None


def render(request: Request) -> list[str]:
    """Render a repository; what was rendered there before is replaced.

    Returns:
        The models' names.
    Raises:
        BundleError: it cannot be served like this. OutputError: the folder cannot be written.
        UsageError: more instances than the memory holds.
    """
    bundle = open_bundle(request.bundle)
    layout = request.layout
    _check(bundle, layout)
    _check_memory(bundle, request)
    side = max(1024, 2 * bundle.manifest.defaults.min_size)
    limits = {"max_pixels": side * side, **(request.limits or {})}
    place = (request.served_from or bundle.path).absolute()
    serving = ServingConfig(bundle=place, digest=bundle.digest, backend=bundle.manifest.backend, **limits)
    configs = configurations(bundle, serving, layout)
    temporary = _emptied(request.output)
    try:
        for name, config in configs.items():
            (temporary / name / "1").mkdir(parents=True)
            (temporary / name / "config.pbtxt").write_text(text_format.MessageToString(config))
            if name in PYTHON_MEMBERS or (name in MEMBERS and layout.served_by == "python"):
                module = name if name in PYTHON_MEMBERS else "graph"
                (temporary / name / "1" / "model.py").write_text(_MODEL.format(module=module))
            elif name in MEMBERS:
                _link_graph(bundle, name, temporary / name / "1", layout)
        (temporary / _MARK).write_text(f"{bundle.digest}\n")
        if request.output.exists():
            shutil.rmtree(request.output)
        temporary.rename(request.output)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise from_os_error(error, request.output, "write the model repository") from error
    return list(configs)


def _check(bundle: Bundle, layout: DeploymentConfig) -> None:
    manifest = bundle.manifest
    if manifest.precision == "bf16":
        raise BundleError(
            "the server's Python backend has no bf16 arrays",
            where=bundle.path,
            fix="build the bundle with --precision fp16 or fp32",
        )
    on_gpu = manifest.backend in PLAN_BACKENDS
    if (on_gpu or layout.served_by == "tensorrt") and not layout.gpus:
        raise UsageError(
            "plans run on GPUs", where="--gpus", expected="the GPUs to serve on, such as --gpus 0", found="none"
        )
    if layout.served_by != "tensorrt":
        return
    for name in MEMBERS:
        plan = manifest.graphs[name].plan
        if manifest.backend != "tensorrt" or plan is None or plan.weight_stripped:
            raise BundleError(
                "the server's tensorrt backend runs whole TensorRT plans",
                where=f"{bundle.path}: {name}",
                expected="a bundle of --backend tensorrt, without --strip-weights",
                found=f"backend {manifest.backend}"
                + (", weight-stripped" if plan is not None and plan.weight_stripped else ""),
                fix="build such a bundle, or render with --backend python",
            )


def _check_memory(bundle: Bundle, request: Request) -> None:
    """Refuse copies of networks that the memory does not hold: they would be swapped out, or kill the server."""
    budget = None if request.memory_bytes is None else MemoryBudget(request.memory_bytes)
    if budget is None:
        if request.layout.gpus and request.layout.instances > 1:
            raise UsageError("how much memory has a GPU?", where="--instances", fix="tell with --memory GIB")
        if request.layout.gpus:
            return
        budget = MemoryBudget.total()
    weights = host_weights(bundle)
    if request.layout.gpus:
        weights = {name: graph.weights_bytes for name, graph in bundle.manifest.graphs.items()}
    shared = sum(weights[name] for name in MEMBERS)
    copied = weights["controlnet"] + weights["unet"]
    needed = shared + request.layout.instances * copied
    if needed > budget.weights:
        fitting = max(0, (budget.weights - shared) // copied)
        raise UsageError(
            "out of memory",
            where="--instances",
            expected=f"at most {fitting}, as {format_memory(budget.bytes)} hold",
            found=f"{request.layout.instances}, whose weights take {format_memory(needed)}",
        )


def _link_graph(bundle: Bundle, name: str, folder: Path, layout: DeploymentConfig) -> None:
    """Put a graph where the server's backend looks for it, without a second copy where the disk allows."""
    graph = bundle.manifest.graphs[name]
    _, target = BACKEND_FILES[layout.served_by]
    if layout.served_by == "tensorrt":
        assert graph.plan is not None
        _link(bundle.file(graph.plan.file), folder / target)
        return
    bundle.read_graph(name)  # checked, before the server's library reads it
    _link(bundle.file(graph.file), folder / target)
    _link(bundle.file(bundle.manifest.weights), folder / bundle.manifest.weights.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def _emptied(output: Path) -> Path:
    """Return a new folder beside a repository, which must be ours to replace."""
    ours = (output / _MARK).is_file() or (output.is_dir() and not any(output.iterdir()))
    if os.path.lexists(output) and not ours:
        raise OutputError(
            "something that is no rendered repository lies there", where=output, fix="choose another place"
        )
    temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise from_os_error(error, output, "write the model repository") from error
    return temporary


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("python triton_repo/render.py", __doc__)
    parser.add_argument("--bundle", type=path_option, metavar="DIR", help=f"default: {default_bundle_dir()}")
    parser.add_argument("--output", type=path_option, metavar="REPO", required=True, help="the model repository")
    parser.add_argument(
        "--served-from", type=path_option, metavar="DIR", help="the bundle as the server will see it, in its container"
    )
    add_layout(parser)
    options = parser.parse_args(arguments)
    models = render(request_of(options, options.bundle or default_bundle_dir(), options.output, options.served_from))
    print(f"{options.output}: {', '.join(models)}")
    return 0


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a bundle is served."""
    default = DeploymentConfig()
    serving = parser.add_argument_group("serving")
    serving.add_argument(
        "--backend",
        choices=SERVED_BY,
        default=default.served_by,
        help="what runs text towers and VAE (default: python)",
    )
    serving.add_argument(
        "--instances",
        type=whole_number(1, 64),
        default=default.instances,
        metavar="N",
        help="copies of the sampling networks, on each device; on a CPU, with --threads (default: 1)",
    )
    serving.add_argument("--gpus", type=_gpus, default=default.gpus, metavar="N[,N…]", help="default: the CPU")
    serving.add_argument(
        "--memory",
        type=gibibytes,
        metavar="GIB",
        help="of the computer or of each GPU that serves; default: this computer's",
    )
    serving.add_argument(
        "--queue-delay-ms",
        type=whole_number(0, 10_000),
        default=default.queue_delay_us // 1000,
        metavar="MS",
        help="to wait for photos of the same size (default: %(default)s)",
    )
    serving.add_argument(
        "--max-queue",
        type=whole_number(1, 100_000),
        default=default.max_queue,
        metavar="N",
        help="requests that wait; more are refused (default: %(default)s)",
    )
    serving.add_argument("--no-cache", action="store_true", help="compute equal requests again")
    bounds = parser.add_argument_group("bounds of a request")
    for name, limit in LIMITS.items():
        low = next(bound.ge for bound in limit.metadata if isinstance(bound, Ge))
        high = next(bound.le for bound in limit.metadata if isinstance(bound, Le))
        assert isinstance(low, int)
        assert isinstance(high, int)
        option = f"--{name.replace('_', '-')}"
        bounds.add_argument(option, type=whole_number(low, high), metavar="N", help=limit.description)


def request_of(options: argparse.Namespace, bundle: Path, output: Path, served_from: Path | None = None) -> Request:
    """Return what the options of `add_layout` ask for."""
    limits = {name: value for name in LIMITS if (value := getattr(options, name)) is not None}
    memory = None if options.memory is None else int(options.memory * 2**30)
    layout = DeploymentConfig(
        options.backend,
        options.instances,
        options.gpus,
        options.queue_delay_ms * 1000,
        options.max_queue,
        not options.no_cache,
    )
    return Request(bundle, output, served_from, layout, limits, memory)


def _gpus(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) < 64 for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers such as 0 or 0,1, got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))


if __name__ == "__main__":
    sys.exit(run_command(main))
